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
"""What a call of `prune` did, and how sparse a model is."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..common.writing import atomic_write_text
from ..layers.backends import backend_of
from ..structure.modules import linear_layers, zero_fraction
from ..structure.report import layer_table, mean_over_weights, routers_line


@dataclass
class PruningReport:
    """
    What a call of `prune` did.

    Args:
        method: "wanda", "magnitude", ...
        config: the fields of the config used.
        layers: one row per pruned layer, in model order (`pandas.DataFrame(report.layers)` works): `name`, `shape` ([out, in]),
            `sparsity_before` and `sparsity_after` (fractions of zero weights).
        seconds: wall time.
        calibration_tokens: tokens (for images: patches) that entered the first pruned layer, padding not counted; 0 for a
            method without data.
        routers: the layers by which mixtures of experts choose, which are left alone unless `target_modules` names them.
    """

    method: str
    config: dict[str, Any]
    layers: list[dict[str, Any]] = field(repr=False)
    seconds: float
    calibration_tokens: int = 0
    routers: list[str] = field(default_factory=list, repr=False)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all weights of the pruned layers."""
        return mean_over_weights(self.layers, "sparsity_after")

    def to_dict(self) -> dict[str, Any]:
        """Everything above and the total `sparsity`, ready for JSON."""
        return {"sparsity": self.sparsity, **asdict(self)}

    def save(self, path: str | os.PathLike) -> None:
        """Writes `to_dict()` as JSON, atomically."""
        atomic_write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        lines = layer_table(self.layers, ("before", "after"), _summary)
        tokens = f", {self.calibration_tokens:,} calibration tokens" if self.calibration_tokens else ""
        return "\n".join([f"{self.method}: {self.seconds:.1f} s{tokens}", *lines, *routers_line(self.routers)])


def _summary(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(f"{mean_over_weights(rows, key):.2%}" for key in ("sparsity_before", "sparsity_after"))


def measure_sparsity(model: nn.Module) -> dict[str, float]:
    """
    Fraction of zero weights of each linear layer.

    Args:
        model: any module. Layers with packed or integer weights are left out, since their zeros mean nothing.

    Returns:
        {layer name: fraction in [0, 1]}; for a layer wrapped by a peft adapter that of its base weight, of a narrowed one that
        of its active part.
    """
    return {name: zero_fraction(layer) for name, layer in linear_layers(model).items() if not backend_of(layer).packed}
