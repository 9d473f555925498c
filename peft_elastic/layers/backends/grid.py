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
"""Weights on a grid, of `quantize` and `load_gptq`: `QuantizedLinear`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
from torch import nn

from ..grid import Grid
from ..narrowed import Narrowed, NarrowedParameter, Ranges
from ..quantized_linear import QuantizedLinear
from .base import OldWeight
from .float import FloatBackend, OldFloat


MERGED_IS_ROUNDED = (
    "whose merged weight would be rounded to other values than the adapter was trained with. "
    "`peft_elastic.merge_and_requantize(model)` does that, and reports the error; train with "
    "`SparseQALoraConfig(quantization_aware=True)` to avoid it."
)


class OldOnGrid(OldFloat):
    """The values of the parameter, and the grid if it has been replaced as well."""

    def put_back(self, layer: nn.Module) -> None:
        super().put_back(layer)
        if self.grid is not None:
            layer.grid = self.grid


class GridBackend(FloatBackend):
    """`QuantizedLinear`, which keeps its weight in floating point and rounds it to its grid whenever it computes."""

    name = "peft_elastic"
    layers = "`QuantizedLinear`"
    on_grid = True
    exact = (QuantizedLinear,)
    obstacles = {
        "merge": MERGED_IS_ROUNDED,
        "quantize": "which is quantised already; quantise the floating-point model.",
    }

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, QuantizedLinear)

    def grid(self, layer: nn.Module) -> Optional[Grid]:
        return layer.grid  # type: ignore[return-value]

    def replace(self, layer: nn.Module, weight: torch.Tensor, grid: Optional[Grid] = None) -> OldWeight:
        parameter, own = layer.get_parameter("weight"), self.grid(layer)
        old = OldOnGrid(parameter.data, transposed=False)
        if grid is not None and own is not None and not grid.equals(own):
            old.grid, layer.grid = own, Grid.copy_of(grid)
        self._write(layer, parameter, weight)  # in a dtype that holds all values of the grid
        old.written = parameter.dtype
        return old

    def mixin(self, layer: nn.Module) -> Optional[type[Narrowed]]:
        return NarrowedQuantized if self.is_exact(layer) else None

    def cut(
        self, layer: Any, outputs: Optional[Ranges], inputs: Optional[Ranges], undo: list[Callable[[], None]]
    ) -> None:
        super().cut(layer, outputs, inputs, undo)
        layer.grid = Grid.copy_of(layer.grid.take(outputs, inputs))

    def permute(self, layer: Any, side: str, index: torch.Tensor) -> None:
        super().permute(layer, side, index)
        layer._modules["grid"].permute(side, index)


class NarrowedQuantized(NarrowedParameter):
    """Mixin in front of `QuantizedLinear`."""

    @property
    def grid(self) -> Any:
        full: Any = self._modules["grid"]
        return full.take(self.active_out, self.active_in)


def grid_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The layers on a grid of a model, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


GRID = GridBackend()
