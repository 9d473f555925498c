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

import re
from collections.abc import Callable
from typing import Any

from ..common.tables import text_table


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

    titles = ("layer", "out x in", "layers", "weights", *columns)
    rows = ((*key, *line(rows)) for key, rows in groups.items())
    return text_table([titles, *rows, ("total", "", *line(layers))], left=2)


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
