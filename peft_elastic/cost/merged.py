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
"""The modules of a base model as they are after the merge: what the cost and the latency of a deployed subnet rest on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..common.tensors import zero_share
from ..layers.backends import backend_of, find_linear_backend
from ..layers.values import Sizes, grid_format
from ..layers.values.bf16 import BF16
from ..structure.modules import output_head


# From this share of zeros on a layer counts as sparse; the default of `sparsify_linears`.
MIN_SPARSITY = 0.3


@dataclass(frozen=True)
class MergedLinear:
    """A linear layer in floating point or on a grid, once its adapter is merged.

    Args:
        name (`str`): its path in the model, without the wrapper of the adapter.
        module (`nn.Module`): what the model calls: the layer itself, or the adapter around it.
        out_features, in_features (`int`): of the whole layer.
        bias (`bool`): whether it has one.
        dtype (`torch.dtype`): of the weight.
        sparsity (`float`): share of the zeros that the merge keeps: those of a layer without adapter, or whose adapter is
            masked by them; 0 for any other, for a weight that another module shares or an output embedding, which stay
            dense, and for one that is not in memory.
        bits, group_size (`int`, *optional*): of the grid, if the merged layer is on one.
    """

    name: str
    module: nn.Module
    out_features: int
    in_features: int
    bias: bool
    dtype: torch.dtype
    sparsity: float
    bits: int | None = None
    group_size: int | None = None

    def stored_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes on disk of its weight when cut to this size; zeros are taken to be spread evenly (see `CostModel`)."""
        weights = out_features * in_features
        value_format = BF16 if self.bits is None else grid_format(self.bits)
        if self.sparsity >= MIN_SPARSITY and value_format is not None:
            nnz = weights - round(self.sparsity * weights)
            return value_format.bytes(Sizes(out_features, in_features, nnz, self.group_size or 0))
        if self.bits is None:
            return weights * self.dtype.itemsize
        assert self.group_size is not None
        groups = out_features * -(-in_features // self.group_size)
        return -(-weights * self.bits // 8) + 2 * groups + -(-groups * self.bits // 8)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model, without the wrappers and internals of adapters.

    `modules_to_save` holds trained copies of `original_module`, of the same shape: the original stands for them.
    """
    for name, module in model.named_modules():
        path = name.split(".")
        if any(part.startswith("lora_") or part == "modules_to_save" for part in path):
            continue
        if "base_layer" not in dict(module.named_children()):
            yield name.removesuffix(".base_layer"), module


def is_mergeable(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is a floating point matrix, to be rounded to a grid or not."""
    backend = find_linear_backend(module)
    return backend is not None and not backend.packed and module._parameters.get("weight") is not None


def merged_linears(model: nn.Module) -> dict[str, MergedLinear]:
    """The linear layers of the base model that `is_mergeable`, by their path. Weights that are not in memory count as dense."""
    shared = Counter(
        id(parameter)
        for _, module in base_modules(model)
        for parameter in module.parameters(recurse=False)
        if parameter is not None
    )
    inner: Any = model
    while not isinstance(inner, PreTrainedModel) and isinstance(getattr(inner, "model", None), nn.Module):
        inner = inner.model
    output = output_head(inner)
    linears = {}
    for name, module in base_modules(model):
        if not is_mergeable(module):
            continue
        weight: Any = module._parameters["weight"]  # all of it, whatever width is active
        called = model.get_submodule(name) if name else module
        backend = backend_of(module)
        out_features, in_features = backend.weight(module, whole=True).shape
        masked, grid = _adapter(called)
        if grid is None and backend.on_grid:
            grid = module._modules["grid"]
        stays_dense = shared[id(weight)] > 1 or module is output
        sparsity = 0.0
        if masked and not stays_dense and weight.numel() and not weight.is_meta:
            # an adapter on a grid is masked by the zeros from before the rounding
            rounded = called is module and backend.on_grid
            values = grid.round(weight.detach()) if rounded else weight
            sparsity = zero_share(values)
        linears[name] = MergedLinear(
            name,
            called,
            int(out_features),
            int(in_features),
            module._parameters.get("bias") is not None,
            weight.dtype,
            sparsity,
            None if grid is None else grid.bits,
            None if grid is None else grid.group_size,
        )
    return linears


def _adapter(called: Any) -> tuple[bool, Any]:
    """Whether the zeros of a layer survive the merge, and the grid that its adapter rounds to."""
    if not isinstance(getattr(called, "base_layer", None), nn.Module):
        return True, None
    names = [name for name in getattr(called, "active_adapters", ()) if name in called.lora_A]
    if not names and hasattr(called, "active_adapters"):
        return True, None
    # what a masked or quantisation-aware layer of SparseQALora knows of its adapters, and no other layer has
    masked, grids = getattr(called, "masked", {}), getattr(called, "lora_grid", {})
    on_grid = [name for name in names if name in grids]
    return bool(names) and all(masked.get(name, False) for name in names), grids[on_grid[0]] if on_grid else None
