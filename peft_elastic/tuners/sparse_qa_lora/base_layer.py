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

import copy
from collections.abc import Callable
from typing import Any, Optional

import torch
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...quantization import Grid, QuantizedLinear
from ...quantization.gptqmodel import is_gptqmodel, read_layer


def is_float(layer: nn.Module) -> bool:
    """Whether the weight is a parameter in floating point."""
    return isinstance(layer, (nn.Linear, Conv1D)) and not get_bnb_param_type(layer.weight)


def is_bitsandbytes(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and bool(get_bnb_param_type(layer.weight))


def is_supported(layer: nn.Module) -> bool:
    return is_float(layer) or is_bitsandbytes(layer) or is_gptqmodel(layer)


def weight_of(layer: nn.Module) -> torch.Tensor:
    """The weight (out, in): a view of the parameter of a layer in floating point (before rounding, for a `QuantizedLinear`),
    dequantised anew otherwise."""
    if is_bitsandbytes(layer):
        return _dequantized(layer.weight, getattr(layer, "state", None))
    if is_gptqmodel(layer):
        integers, grid = read_layer(layer)
        return grid.dequantize(integers)
    weight = layer.get_parameter("weight").detach()
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
    known = type(layer) in (nn.Linear, Conv1D, QuantizedLinear) or is_gptqmodel(layer)
    return known and not hooks and "forward" not in layer.__dict__


def replace_weight(layer: nn.Module, weight: torch.Tensor) -> Callable[[], None]:
    """Write another weight (out, in), quantised again where the layer is of bitsandbytes.

    Returns:
        A function that puts the old one back, bit by bit.
    """
    if is_bitsandbytes(layer):
        return _replace_bitsandbytes(layer, weight)
    if is_gptqmodel(layer):
        raise ValueError(
            "A layer of GPTQModel cannot be written to, so adapters are not merged in place. `merge_and_unload()` puts a "
            "QuantizedLinear in its place; `peft_elastic.load_gptq` loads a checkpoint with such layers."
        )
    parameter = layer.get_parameter("weight")
    old_data = parameter.data
    parameter.data = weight.T.contiguous() if isinstance(layer, Conv1D) else weight

    def restore() -> None:
        parameter.data = old_data

    return restore


def _dequantized(weight: Any, state: Any) -> torch.Tensor:
    quant_state: Any = getattr(weight, "quant_state", None)
    if not getattr(quant_state, "packing_format_for_cpu", False):
        return dequantize_bnb_weight(weight, state=state)
    # From its first forward pass in evaluation mode on, bitsandbytes keeps 4 bits in another order on some processors.
    from bitsandbytes import functional

    unpacked: Any = copy.copy(quant_state)
    unpacked.original_nested = False
    values, unpacked = functional._convert_weight_packed_for_cpu_inverse(weight.data, unpacked)
    unpacked.absmax = quant_state.absmax.T.reshape(-1).float().contiguous()  # which that function leaves in its order
    return functional.dequantize_4bit(values, unpacked)


def _replace_bitsandbytes(layer: nn.Module, weight: torch.Tensor) -> Callable[[], None]:
    import bitsandbytes as bnb

    old: Any = layer.weight
    new: Any
    if get_bnb_param_type(old) == "4bit":
        old_state = old.quant_state
        options = {
            key: getattr(old, key) for key in ("quant_type", "quant_storage", "compress_statistics", "blocksize")
        }
        new = bnb.nn.Params4bit(weight.to("cpu"), requires_grad=False, module=layer, **options)  # type: ignore[arg-type]
        layer.weight = new.to(old.device)

        def put_back_4bit() -> None:
            layer.weight = old
            layer.quant_state = old_state

        return put_back_4bit

    # An 8-bit layer moves the scales from its weight to its state in its first forward pass.
    state: Any = layer.state
    scales = old.CB, old.SCB, state.CB, state.SCB
    new = bnb.nn.Int8Params(weight.to("cpu"), requires_grad=False, has_fp16_weights=old.has_fp16_weights)
    layer.weight = new.to(old.device)
    state.CB = state.SCB = None

    def put_back_8bit() -> None:
        layer.weight = old
        old.CB, old.SCB, state.CB, state.SCB = scales

    return put_back_8bit
