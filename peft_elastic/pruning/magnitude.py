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

"""Pruning by weights alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ..common.checks import check_choice
from ..common.progress import progress_bar
from ..structure.modules import weight_matrix
from ..structure.sequential import LayerWalker
from .config import PruningConfig
from .masks import pruning_mask
from .methods import pruning_method


@dataclass(frozen=True)
class MagnitudeConfig(PruningConfig):
    """
    Magnitude pruning: the weights with the smallest |W_ij| go. Needs no data.

    Args:
        scope (`str`):
            The weights compared with each other: `"layer"` (the usual baseline, also that of the Wanda paper) or `"row"`,
            each output row by itself. With `pattern` the groups of m inputs are compared, whatever the scope.
    """

    scope: Literal["layer", "row"] = field(
        default="layer", metadata={"help": "Weights that are compared with each other: those of a layer, or of a row."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scope", self.scope, ("layer", "row"))


@pruning_method("magnitude", MagnitudeConfig)
def prune_magnitude(
    model: nn.Module, layers: dict[str, nn.Module], config: MagnitudeConfig, calibration: Any, progress: bool
) -> int:
    """Prunes `layers` in place (see `MagnitudeConfig`). Uses no data: returns 0 calibration tokens."""
    with torch.no_grad():
        for unit in progress_bar(LayerWalker(model, layers), desc="magnitude", unit="block", disable=not progress):
            for weight in map(weight_matrix, unit.values()):
                mask = pruning_mask(weight, weight.abs(), config.sparsity, config.n_of_m, config.scope)
                weight.masked_fill_(mask, 0)
    return 0
