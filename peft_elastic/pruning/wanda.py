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

"""Pruning by weights and the activations they meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..common.checks import check_max_samples
from ..common.progress import progress_bar
from ..structure.calibration import calibration_batches, calibration_mode
from ..structure.inputs import InputCollector, is_encoder_decoder
from ..structure.modules import weight_matrix
from ..structure.sequential import BlockWalker, Unit
from .config import PruningConfig
from .masks import pruning_mask
from .methods import pruning_method


@dataclass(frozen=True)
class WandaConfig(PruningConfig):
    """
    Wanda (Sun et al. 2024, "A Simple and Effective Pruning Approach for Large Language Models", equation 1): the score of a
    weight is |W_ij| * ||X_j||_2, with the norm taken over all calibration tokens of input j of that layer. The lowest
    scores of each output row (with `pattern`: of each group of m inputs) go. Blocks are pruned in order, so that later ones
    see the activations of the pruned earlier ones. Needs calibration data.

    Args:
        max_samples (`int`, *optional*):
            Number of calibration sequences to use at most; by default all that `calibration` yields. The paper uses 128.
    """

    max_samples: int | None = field(
        default=None, metadata={"help": "Calibration sequences used at most. Default: all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_max_samples(self.max_samples)


@pruning_method("wanda", WandaConfig, calibrated=True)
def prune_wanda(
    model: nn.Module, layers: dict[str, nn.Module], config: WandaConfig, calibration: Any, progress: bool
) -> int:
    """Prunes `layers` in place (see `WandaConfig`) and returns the number of tokens that entered the first of them."""
    batches = calibration_batches(calibration, config.max_samples)
    with calibration_mode(model):
        collector = InputNorms(batches, is_encoder_decoder(model), fallback="pruned by magnitude")
        for unit in progress_bar(
            BlockWalker(model, batches, layers), desc="Wanda", unit="block", disable=not progress
        ):
            norms = collector.collect(unit)
            # All masks of a block before any change, so that an interrupted run leaves whole blocks and can be repeated.
            masks = {}
            for name, layer in unit.layers.items():
                weight = weight_matrix(layer)
                score = weight.abs() * norms[name] if name in norms else weight.abs().float()
                masks[name] = pruning_mask(weight, score, config.sparsity, config.n_of_m)
            for name, layer in unit.layers.items():
                weight_matrix(layer).masked_fill_(masks[name], 0)
    return collector.tokens


class InputNorms(InputCollector):
    """The norms of the inputs of layers over all calibration tokens, ||X_j||_2 in equation 1 of the Wanda paper: (in,)."""

    def _measure(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.square().sum(dim=0)

    def collect(self, unit: Unit) -> dict[str, torch.Tensor]:
        return {name: squares.sqrt() for name, squares in super().collect(unit).items()}
