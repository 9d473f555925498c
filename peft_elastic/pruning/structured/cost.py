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
"""What a state of a model costs: parameters, multiply-accumulates, or seconds on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ...cost.counts import CostModel
from ...cost.latency import LatencyModel
from ...structure.blocks import Structure
from ...structure.space import activate
from .config import StructuredPruningConfig
from .units import State, Units


class Costs:
    """What the ratio of a run is of, and what a plan says besides.

    Args:
        model: the whole model, nothing of it narrowed.
        units: of `model`.
        measure: a name of `peft_elastic.cost.counts.COSTS`.
        latency: of the model, if that is measured.
    """

    def __init__(self, model: nn.Module, units: Units, measure: str, latency: LatencyModel | None = None) -> None:
        self._whole = units.space.max.to_dict()
        self._model = CostModel(model, units.space)
        self._measure: Callable[[Mapping[str, int]], float]
        self._measure = getattr(self._model, measure) if latency is None else latency.predict

    def __call__(self, state: State) -> float:
        """What the ratio is of."""
        return self._measure({**self._whole, **state})

    def parameters(self, state: State) -> int:
        """Parameters of a model that consists of this state alone."""
        return self._model.parameters({**self._whole, **state})

    def macs(self, state: State) -> int:
        """Its multiply-accumulates per token."""
        return self._model.macs({**self._whole, **state})


def measure_latency(model: nn.Module, units: Units, config: StructuredPruningConfig) -> LatencyModel:
    """Time the parts of a model with the inputs of the config; it is whole afterwards."""
    structure = Structure(model)
    try:
        return LatencyModel.of_space(
            model,
            units.space,
            lambda subnet: activate(model, structure, subnet),
            config.latency_inputs,
            mode=config.latency_mode,
        )
    finally:
        activate(model, structure, units.space.max)
