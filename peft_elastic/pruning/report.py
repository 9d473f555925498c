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
from collections.abc import Callable
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


def layer_table(
    layers: list[dict[str, Any]],
    columns: tuple[str, ...],
    summary: Callable[[list[dict[str, Any]]], tuple[str, ...]],
) -> list[str]:
    """The lines of a table of layers, the same layer of all blocks in one line, and a line for all of them.

    Args:
        layers: rows with `name` and `shape` ([out, in]).
        columns: titles of what `summary` returns for some rows.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in layers:
        kind = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", row["name"])
        groups.setdefault((kind, "x".join(map(str, row["shape"]))), []).append(row)

    def line(rows: list[dict[str, Any]]) -> tuple[str, ...]:
        return str(len(rows)), f"{sum(map(weights_of, rows)):,}", *summary(rows)

    table = [
        ("layer", "out x in", "layers", "weights", *columns),
        *((*key, *line(rows)) for key, rows in groups.items()),
        ("total", "", *line(layers)),
    ]
    widths = [max(map(len, column)) for column in zip(*table)]
    return [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(cells, widths))
        )
        for cells in table
    ]


def routers_line(routers: list[str]) -> list[str]:
    """What a report says of the routers that were left out."""
    if not routers:
        return []
    return [
        f"left alone: {len(routers)} routers of mixtures of experts, such as {routers[0]} (`target_modules` can name them)"
    ]


def weights_of(row: dict[str, Any]) -> int:
    return row["shape"][0] * row["shape"][1]


def mean_over_weights(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] * weights_of(row) for row in rows) / sum(map(weights_of, rows))


def _summary(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(f"{mean_over_weights(rows, key):.2%}" for key in ("sparsity_before", "sparsity_after"))
