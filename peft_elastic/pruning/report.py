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

import json
import os
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from ..utils import atomic_write_text


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
    """

    method: str
    config: dict[str, Any]
    layers: list[dict[str, Any]] = field(repr=False)
    seconds: float
    calibration_tokens: int = 0

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all weights of the pruned layers."""
        return _mean_sparsity(self.layers, "sparsity_after")

    def to_dict(self) -> dict[str, Any]:
        """Everything above and the total `sparsity`, ready for JSON."""
        return {"sparsity": self.sparsity, **asdict(self)}

    def save(self, path: str | os.PathLike) -> None:
        """Writes `to_dict()` as JSON, atomically."""
        atomic_write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        # The same layer of all blocks makes one line.
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.layers:
            kind = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", row["name"])
            groups.setdefault((kind, "x".join(map(str, row["shape"]))), []).append(row)
        table = [(*key, *_summary(rows)) for key, rows in groups.items()]
        table = [
            ("layer", "out x in", "layers", "weights", "before", "after"),
            *table,
            ("total", "", *_summary(self.layers)),
        ]
        widths = [max(len(line[column]) for line in table) for column in range(6)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
            )
            for line in table
        ]
        tokens = f", {self.calibration_tokens:,} calibration tokens" if self.calibration_tokens else ""
        return "\n".join([f"{self.method}: {self.seconds:.1f} s{tokens}", *lines])


def _weights(row: dict[str, Any]) -> int:
    return row["shape"][0] * row["shape"][1]


def _mean_sparsity(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] * _weights(row) for row in rows) / sum(map(_weights, rows))


def _summary(rows: list[dict[str, Any]]) -> tuple[str, str, str, str]:
    before, after = (_mean_sparsity(rows, key) for key in ("sparsity_before", "sparsity_after"))
    return str(len(rows)), f"{sum(map(_weights, rows)):,}", f"{before:.2%}", f"{after:.2%}"
