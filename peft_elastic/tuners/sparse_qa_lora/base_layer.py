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
"""What the adapters need to know of their base layer: its weight as a matrix, its grid, and how to write it back."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Optional

import torch
from peft.utils.integrations import get_bnb_param_type
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...layers.backends.bitsandbytes import dequantize, is_bitsandbytes
from ...layers.backends.gptqmodel import is_gptqmodel, read_layer
from ...layers.grid import Grid
from ...layers.quantized_linear import QuantizedLinear
from ...structure.narrow import active_ranges, plain_class


def is_float(layer: nn.Module) -> bool:
    """Whether the weight is a parameter in floating point."""
    return isinstance(layer, (nn.Linear, Conv1D)) and not get_bnb_param_type(layer.weight)


def is_supported(layer: nn.Module) -> bool:
    return is_float(layer) or is_bitsandbytes(layer) or is_gptqmodel(layer)


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The active weight (out, in): a view of the parameter of a layer in floating point (before rounding, for a
    `QuantizedLinear`), dequantised anew otherwise."""
    if is_bitsandbytes(layer):
        if active_ranges(layer) != (None, None):
            return layer.active_weight()  # type: ignore[operator]
        return dequantize(layer.weight, getattr(layer, "state", None))
    if is_gptqmodel(layer):
        integers, grid = read_layer(layer)
        return grid.dequantize(integers)
    parameter: Any = layer.weight  # a plain tensor in `torch.func.functional_call`
    weight: torch.Tensor = parameter.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def is_rounded(layer: nn.Module) -> bool:
    """Whether the layer computes with the values of a grid."""
    return isinstance(layer, QuantizedLinear) or is_gptqmodel(layer)


def grid_of(layer: nn.Module) -> Optional[Grid]:
    """The grid that the layer computes with, if it has one."""
    if is_gptqmodel(layer):
        return read_layer(layer)[1]
    return layer.grid if isinstance(layer, QuantizedLinear) else None


def computes_plainly(layer: nn.Module) -> bool:
    """Whether a forward pass is x W^T + b with `weight_of`, or its rounding, and nobody watches it."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    known = plain_class(layer) in (nn.Linear, Conv1D, QuantizedLinear) or is_gptqmodel(layer)
    return known and not hooks and "forward" not in layer.__dict__


@dataclass
class OldWeight:
    """What a layer computed with before `replace_weight`. It holds no function, so that copies and pickles of a merged model take
    it along."""

    values: Any  # the data of a parameter in floating point, a parameter of bitsandbytes
    written: Optional[torch.dtype] = None  # in floating point: of what has replaced it
    grid: Optional[Grid] = None  # if that has been replaced as well
    state: tuple[Any, ...] = ()  # what bitsandbytes keeps beside

    def matrix(self, layer: nn.Module) -> torch.Tensor:
        """The old weight as `weight_of` gives it."""
        if is_bitsandbytes(layer):
            scales = SimpleNamespace(SCB=next((scale for scale in self.state[1::2] if scale is not None), None))
            return dequantize(self.values, scales)
        return self._data(layer).T if isinstance(layer, Conv1D) else self._data(layer)

    def put_back(self, layer: nn.Module) -> None:
        """Bit by bit."""
        if not is_bitsandbytes(layer):
            layer.get_parameter("weight").data = self._data(layer)
            if self.grid is not None:
                layer.grid = self.grid
            return
        layer.weight = self.values
        if get_bnb_param_type(self.values) == "4bit":
            (layer.quant_state,) = self.state
        else:
            state: Any = layer.state
            self.values.CB, self.values.SCB, state.CB, state.SCB = self.state

    def _data(self, layer: nn.Module) -> torch.Tensor:
        weight = layer.get_parameter("weight")
        if weight.dtype == self.written:
            return self.values.to(weight.device)
        return self.values.to(weight)  # the model has been cast in the meantime


def replace_weight(layer: nn.Module, weight: torch.Tensor, grid: Optional[Grid] = None) -> OldWeight:
    """Write another weight (out, in), quantised again where the layer is of bitsandbytes.

    Args:
        grid: of the weight, which a `QuantizedLinear` takes over. An ordinary layer gets the values in its own dtype.
    """
    if is_bitsandbytes(layer):
        return _replace_bitsandbytes(layer, weight)
    if is_gptqmodel(layer):
        raise ValueError(
            "A layer of GPTQModel cannot be written to, so adapters are not merged in place. `merge_and_unload()` puts a "
            "QuantizedLinear in its place; `peft_elastic.load_gptq` loads a checkpoint with such layers."
        )
    parameter = layer.get_parameter("weight")
    old = OldWeight(parameter.data)
    if not isinstance(layer, QuantizedLinear):
        weight = weight.to(parameter.dtype)
    elif grid is not None and not grid.equals(layer.grid):
        old.grid, layer.grid = layer.grid, Grid.copy_of(grid)
    parameter.data = weight.T.contiguous() if isinstance(layer, Conv1D) else weight
    old.written = parameter.dtype
    return old


def _replace_bitsandbytes(layer: nn.Module, weight: torch.Tensor) -> OldWeight:
    import bitsandbytes as bnb

    old: Any = layer.weight
    new: Any
    if get_bnb_param_type(old) == "4bit":
        old_weight = OldWeight(old, state=(old.quant_state,))
        options = {
            key: getattr(old, key) for key in ("quant_type", "quant_storage", "compress_statistics", "blocksize")
        }
        new = bnb.nn.Params4bit(weight.to("cpu"), requires_grad=False, module=layer, **options)  # type: ignore[arg-type]
        layer.weight = new.to(old.device)
        return old_weight

    # An 8-bit layer moves the scales from its weight to its state in its first forward pass.
    state: Any = layer.state
    old_weight = OldWeight(old, state=(old.CB, old.SCB, state.CB, state.SCB))
    new = bnb.nn.Int8Params(weight.to("cpu"), requires_grad=False, has_fp16_weights=old.has_fp16_weights)
    layer.weight = new.to(old.device)
    state.CB = state.SCB = None
    return old_weight
