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
"""Layers of GPTQModel as it leaves them in memory, read without importing it."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn

from ..gptq_format import TENSORS, unpack_gptq
from ..grid import Grid
from ..quantized_linear import QuantizedLinear
from .base import PackedBackend
from .grid import MERGED_IS_ROUNDED


class GPTQModelBackend(PackedBackend):
    """The quantised linear layers of GPTQModel, whichever its kernel."""

    name = "GPTQModel"
    layers = "the layers of GPTQModel"
    on_grid = True
    obstacles = {
        "merge": MERGED_IS_ROUNDED,
        "write": "which cannot be written to, so adapters are not merged in place. `merge_and_unload()` puts a QuantizedLinear in "
        "its place; `peft_elastic.load_gptq` loads a checkpoint with such layers.",
        "narrow": "which cannot be narrowed. Load a GPTQ checkpoint with `peft_elastic.load_gptq`.",
    }

    def matches(self, layer: nn.Module) -> bool:
        return any(
            cls.__name__ == "BaseQuantLinear" and cls.__module__.startswith("gptqmodel.")
            for cls in type(layer).__mro__
        )

    def is_exact(self, layer: nn.Module) -> bool:
        return True

    def dequantize(self, layer: nn.Module) -> torch.Tensor:
        integers, grid = read_layer(layer)
        return grid.dequantize(integers)

    def grid(self, layer: nn.Module) -> Optional[Grid]:
        return read_layer(layer)[1]

    def stored_bytes(self, layer: nn.Module) -> int:
        tensors = [getattr(layer, key, None) for key in TENSORS]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    def writable(self, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
        return to_quantized_linear(layer, dtype=dtype)


def read_layer(layer: Any, name: str = "the layer") -> tuple[torch.Tensor, Grid]:
    """The integers, uint8 (out, in), and the grid of a layer of GPTQModel. Whatever the file had, its zero points in memory
    are stored as they are ("gptq_v2").

    Raises:
        ValueError: if the layer has been repacked, as some of its kernels do in their first forward pass in 16 bits.
    """
    tensors = {key: getattr(layer, key) for key in TENSORS if isinstance(getattr(layer, key, None), torch.Tensor)}
    try:
        stored = unpack_gptq(
            name,
            tensors,
            out_features=layer.out_features,
            in_features=layer.in_features,
            bits=layer.bits,
            group_size=layer.group_size,
            checkpoint_format="gptq_v2",
        )
    except ValueError as error:
        raise ValueError(
            f"The weight of {name}, a {type(layer).__name__} of GPTQModel, cannot be read ({error}) Load the model with "
            "`quantization_config=GPTQConfig(bits=..., backend='gptq_torch')`, or with `peft_elastic.load_gptq`."
        ) from None
    grid = Grid(
        stored["scales"], stored["zeros"], in_features=layer.in_features, bits=layer.bits, g_idx=stored["g_idx"]
    )
    return stored["q"], grid


def to_quantized_linear(layer: Any, name: str = "the layer", dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    """The same layer without GPTQModel, with weights of `dtype`. Raises ValueError as `read_layer` does."""
    integers, grid = read_layer(layer, name)
    bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    weight = grid.into_cells(grid.dequantize(integers, dtype), integers)
    return QuantizedLinear(nn.Parameter(weight, requires_grad=False), bias, grid).train(layer.training)


def leave_gptqmodel(model: nn.Module) -> None:
    """Replace the layers of GPTQModel that are left in `model` by `QuantizedLinear`, and let transformers forget that it loaded
    a quantised model, so that it can be saved (`save_gptq`) as it is now."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name, layer in list(model.named_modules()):
        if GPTQMODEL.matches(layer):
            model.set_submodule(name, to_quantized_linear(layer, name, dtype))
    quantizer = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantizer, "quantization_config", None), "quant_method", None)
    if getattr(method, "value", method) == "gptq":
        quantizer.remove_quantization_config(model)  # type: ignore[union-attr]
        model.config._is_quantized = False  # type: ignore[union-attr]


GPTQMODEL = GPTQModelBackend()
