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
from transformers.pytorch_utils import Conv1D

from .modules import module_at


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """The layer of the base model at `path`, without the adapters around it."""
    module = module_at(model, path)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, or of an embedding as (columns, rows), with all of its features."""
    weight = layer._parameters.get("weight")
    if isinstance(layer, Conv1D):
        assert weight is not None
        return weight.shape[1], weight.shape[0]
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def set_sizes(layer: nn.Module) -> None:
    """Let the attributes of a layer follow the shape of its weight."""
    sizes = layer.get_parameter("weight").shape
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf = sizes
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = sizes[1]
    else:
        layer.__dict__["out_features"], layer.__dict__["in_features"] = sizes


def permute(module: nn.Module, side: str, index: torch.Tensor) -> None:
    """Put the features of one side of a layer and of the adapters around it into another order, in place."""
    if isinstance(module, LoraLayer):
        factors, dim = (module.lora_B, 0) if side == "out" else (module.lora_A, 1)
        for factor in factors.values():
            _permute_parameter(factor._parameters["weight"], dim, index)
            if side == "out":
                _permute_parameter(factor._parameters.get("bias"), 0, index)
        for magnitude in module.lora_magnitude_vector.values() if side == "out" else ():
            _permute_parameter(magnitude.weight, 0, index)
        for grid in getattr(module, "lora_grid", {}).values():
            grid.permute(side, index)
    layer: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    transposed = isinstance(layer, (Conv1D, nn.Embedding))
    _permute_parameter(layer._parameters["weight"], int((side == "in") != transposed), index)
    if side == "out":
        _permute_parameter(layer._parameters.get("bias"), 0, index)
    if (grid := layer._modules.get("grid")) is not None:
        grid.permute(side, index)


@torch.no_grad()
def _permute_parameter(parameter: torch.Tensor | None, dim: int, index: torch.Tensor) -> None:
    if parameter is not None:
        parameter.data = parameter.data.index_select(dim, index.to(parameter.device))
