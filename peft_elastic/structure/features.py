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
"""The features of a layer of the base model: how many, and in which order."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..layers.backends import backend_of, find_backend
from ..layers.backends.float import permute_parameter
from .modules import module_at


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """The layer of the base model at `path`, without the adapters around it."""
    module = module_at(model, path)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, or of an embedding as (columns, rows), with all of its features."""
    backend = find_backend(layer)
    if backend is not None:
        return backend.sizes(layer)
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def permute(module: nn.Module, side: str, index: torch.Tensor) -> None:
    """Put the features of one side of a layer and of the adapters around it into another order, in place."""
    if isinstance(module, LoraLayer):
        factors, dim = (module.lora_B, 0) if side == "out" else (module.lora_A, 1)
        for factor in factors.values():
            permute_parameter(factor._parameters["weight"], dim, index)
            if side == "out":
                permute_parameter(factor._parameters.get("bias"), 0, index)
        for magnitude in module.lora_magnitude_vector.values() if side == "out" else ():
            permute_parameter(magnitude.weight, 0, index)
        for grid in getattr(module, "lora_grid", {}).values():
            grid.permute(side, index)
    layer: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    backend_of(layer).permute(layer, side, index)
