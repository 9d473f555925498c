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
"""Rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..common.progress import progress_bar
from ..structure.modules import weight_matrix
from ..structure.sequential import LayerWalker
from .config import QuantizationConfig
from .methods import quantization_method
from .rounding import Rows, commit, report_row, round_to_nearest


@dataclass(frozen=True)
class RTNConfig(QuantizationConfig):
    """Rounding to nearest: each weight by itself, on the grid of its group. Needs no data."""


@quantization_method("rtn", RTNConfig)
def quantize_rtn(
    model: nn.Module, layers: dict[str, nn.Module], config: RTNConfig, calibration: Any, progress: bool
) -> tuple[Rows, int]:
    rows: Rows = {}
    for unit in progress_bar(LayerWalker(model, layers), desc="RTN", unit="block", disable=not progress):
        for name, layer in unit.items():
            rounded = round_to_nearest(weight_matrix(layer), config)
            rows[name] = report_row(name, weight_matrix(layer), rounded, None)
            commit(model, {name: layer}, {name: rounded}, rows)
    return rows, 0
