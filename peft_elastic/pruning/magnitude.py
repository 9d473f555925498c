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

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..common.progress import progress_bar
from ..structure.modules import weight_matrix
from .config import MagnitudeConfig
from .masks import pruning_mask


def prune_magnitude(
    model: nn.Module, layers: dict[str, nn.Module], config: MagnitudeConfig, calibration: Any, progress: bool
) -> int:
    """Prunes `layers` in place (see `MagnitudeConfig`). Uses no data: returns 0 calibration tokens."""
    with torch.no_grad():
        for layer in progress_bar(layers.values(), desc="magnitude", unit="layer", disable=not progress):
            weight = weight_matrix(layer)
            weight.masked_fill_(pruning_mask(weight, weight.abs(), config.sparsity, config.n_of_m, config.scope), 0)
    return 0
