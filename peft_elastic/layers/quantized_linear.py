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
from transformers.pytorch_utils import Conv1D

from .grid import Grid
from .ordinary import ordinary_linear


class QuantizedLinear(nn.Linear):
    """A linear layer whose weight takes the values of a grid: y = x W_q^T + b with W_q = s (q - z), q = quantize(weight).

    `weight` (out, in) stays in floating point, as it was before the rounding: quantisation-aware adapters start from it. It
    is what `save_pretrained` would write; `peft_elastic.save_gptq` writes the integers.

    Attributes:
        grid (`Grid`): scales and zero points, fixed.
        exact (`bool`): whether `weight` holds values of the grid, so that nothing is lost if it is saved as it is.
        conv1d (`bool`): whether it stands for a `Conv1D` of transformers, whose weight is (in, out) on disk.
    """

    grid: Grid

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, grid: Grid, *, conv1d: bool = False) -> None:
        out_features, in_features = weight.shape
        if (grid.out_features, grid.in_features) != (out_features, in_features):
            raise ValueError(
                f"`grid` is of a layer {grid.out_features} x {grid.in_features}, the weight is {out_features} x {in_features}."
            )
        super().__init__(in_features, out_features, bias is not None, device="meta", dtype=weight.dtype)
        self.weight = weight
        self.bias = bias  # type: ignore[assignment]
        self.grid = grid
        self.conv1d = conv1d

    @classmethod
    def from_linear(cls, linear: nn.Module, grid: Grid) -> QuantizedLinear:
        """With the parameters of `linear` (`nn.Linear` or transformers' `Conv1D`, whose weight is transposed)."""
        weight, bias = linear.get_parameter("weight"), linear._parameters.get("bias")
        if isinstance(linear, Conv1D):
            weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)
        return cls(weight, bias, grid, conv1d=isinstance(linear, Conv1D)).train(linear.training)

    def to_linear(self) -> nn.Module:
        """The ordinary layer, `nn.Linear` or `Conv1D`, with the rounded weight."""
        weight = self.grid.round(self.weight.detach())
        weight = nn.Parameter(weight.T.contiguous() if self.conv1d else weight, self.weight.requires_grad)
        return ordinary_linear(weight, self.bias, self.training, self.conv1d)

    @property
    def exact(self) -> bool:
        weight = self.weight.detach()
        return torch.equal(self.grid.round(weight), weight)

    def integers(self) -> torch.Tensor:
        """The integers q, uint8 (out, in)."""
        return self.grid.quantize(self.weight.detach())

    def quantized(self) -> dict[str, Any]:
        """The layer as it is stored: q uint8 (out, in), scales float16 (out, groups), zeros uint8 (out, groups), g_idx int32
        (in,) or None where the groups follow each other, group_size, bits."""
        grid = self.grid
        return {
            "q": self.integers(),
            "scales": grid.scales,
            "zeros": grid.zeros,
            "g_idx": None if grid.in_order else grid.g_idx,
            "group_size": grid.group_size,
            "bits": grid.bits,
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.grid.round(self.weight.detach())
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
