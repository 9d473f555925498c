# Copyright 2026 The peft-elastic authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""By what the states of a model are judged: the loss on calibration data, or a metric of the user's, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ...structure.blocks import Structure
from ...structure.calibration import calibration_batches
from ...structure.inputs import is_language_model
from .config import StructuredPruningConfig
from .metric import CalibrationLoss, Metric, UserMetric
from .units import GRANULARITIES


class Evaluation:
    """The metric of a run, and on how much of the calibration data each stage is judged by it.

    Args:
        model: that is pruned.
        config: how many sequences the stages are judged on.
        batches: of calibration data, None without any.
        metric: the user's own, None for the loss on the calibration data.
        mode: "min" or "max", whether a small or a large value of it is good.

    Attributes:
        name: of the metric, for the plan: "perplexity", "loss", or that of the user's.
    """

    def __init__(
        self,
        model: nn.Module,
        config: StructuredPruningConfig,
        batches: list[dict[str, Any]] | None,
        metric: Callable[[nn.Module], float] | None,
        mode: str,
    ) -> None:
        self.batches, self.mode, self._metric = batches, mode, metric
        self._limits = {True: config.width_samples, False: config.block_samples}
        self._apart = config.split != "auto"  # else all stages are one, and judged alike
        if metric is not None:
            self.name = str(getattr(metric, "name", None) or getattr(metric, "__name__", None) or "metric")
        else:
            self.name = "perplexity" if is_language_model(model) else "loss"

    def data_of(self, stage: str) -> str | None:
        """What a stage is judged on, as the journal calls it: the number of sequences, or the name of the user's metric. None
        without calibration data, where nothing is evaluated."""
        if self._metric is not None:
            return self.name
        return None if self.batches is None else f"{self.sequences(self._limit(stage))} sequences"

    def sequences(self, limit: int | None) -> int:
        """How many there are, at most `limit`."""
        assert self.batches is not None
        there = sum(map(_sequences_in, self.batches))
        return there if limit is None else min(limit, there)

    def metrics(self, model: nn.Module, structure: Structure, cache_bytes: float) -> dict[str, Metric]:
        """What measures states of `model`, by the name of the data that it is judged on. A loss needs `calibration_mode`.

        Raises:
            ValueError: the model computes no finite loss on the data, or there is nothing to predict in it.
        """
        if self._metric is not None:
            return {self.name: UserMetric(model, structure, self._metric, self.mode)}
        metrics: dict[str, Metric] = {}
        for stage in ("sub-blocks", "channels"):  # one that removes, and one that narrows
            data = self.data_of(stage)
            if data is not None and data not in metrics:
                batches = calibration_batches(self.batches, self._limit(stage))
                metrics[data] = CalibrationLoss(model, structure, batches, cache_bytes)
        return metrics

    def shown(self, value: float | None) -> float | None:
        """What is said of a value that is minimised; None if there is none."""
        if value is None or math.isnan(value):
            return None
        if self.name == "perplexity" and self._metric is None:
            return math.exp(value) if value < 700 else math.inf
        return -value if self.mode == "max" else value

    def _limit(self, stage: str) -> int | None:
        return self._limits[GRANULARITIES[stage].narrows and self._apart]


def _sequences_in(batch: Mapping[str, Any]) -> int:
    return next(value for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()).shape[0]
