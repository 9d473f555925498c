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
"""What every method does with a layer: a rounded matrix, its row in the report, and the layer that takes its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..common.tensors import zero_share
from ..layers.grid import Grid, fit_grid
from ..layers.quantized_linear import QuantizedLinear
from ..structure.hessian import output_error
from ..structure.modules import replace_layers
from ..structure.residence import residence_of
from .config import QuantizationConfig
from .saving import guard_saving


Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Rounded:
    """The result of a quantisation of one matrix.

    Args:
        weight: (out, in), as it was right before it was rounded, so `grid.quantize(weight)` gives the integers.
        grid: scales and zero points.
    """

    weight: torch.Tensor
    grid: Grid


def round_to_nearest(weight: torch.Tensor, config: QuantizationConfig) -> Rounded:
    return Rounded(weight, fit_grid(weight, config.bits, config.group_size, config.symmetric, config.clipping))


def report_row(name: str, weight: torch.Tensor, rounded: Rounded, hessian: torch.Tensor | None) -> dict[str, Any]:
    """The row of the report for a layer whose weight was `weight` (out, in)."""
    weight = wide(weight)
    values = rounded.grid.round(wide(rounded.weight))
    difference = weight - values
    norm = weight.square().sum().item()
    return {
        "name": name,
        "shape": list(weight.shape),
        "bits": rounded.grid.bits,
        "group_size": rounded.grid.group_size,
        "weight_error": difference.square().sum().item() / norm if norm else 0.0,
        "output_error": None if hessian is None else output_error(difference, weight, hessian),
        "sparsity": zero_share(weight),
        "zeros": zero_share(values),
    }


def commit(model: nn.Module, layers: dict[str, nn.Module], rounded: dict[str, Rounded], rows: Rows) -> None:
    """Puts the quantised layers in the place of `layers`; `rows` are those of the report, of these layers and of others."""
    for name in layers:
        residence_of(model).note(name, rows[name])
    replacements: list[tuple[nn.Module, nn.Module]] = []
    for name, layer in layers.items():
        quantized = QuantizedLinear.from_linear(layer, rounded[name].grid)
        quantized.weight.data.copy_(rounded[name].weight)
        replacements.append((layer, quantized))
    replace_layers(model, replacements)
    guard_saving(model)


def wide(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
