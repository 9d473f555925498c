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
"""What a search tells while it runs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any

from ..common.tables import text_table
from ..cost.counts import COSTS, cost_in
from ..supernet.space import SearchSpace
from .hypervolume import HypervolumeTracker
from .result import SearchResult


logger = logging.getLogger(__name__)


def say(bar: Any, text: str) -> None:
    """Above the progress bar, or to the log if there is none."""
    if bar.disable:
        logger.info(text)
    else:
        bar.write(text, file=sys.stderr)


def profile(space: SearchSpace, references: Mapping[str, Mapping[str, float]], bounds: Mapping[str, float]) -> str:
    """The costs of the max, min and heuristic subnet, and the bounds on them, as a table."""
    rows = dict(references) | ({"at most": bounds} if bounds else {})
    whole = references["max"]
    columns = [name for name in COSTS if name in whole]
    table = [["", *(cost_in(space, name).title for name in columns)]]
    for row, costs in rows.items():
        cells = []
        for name in columns:
            factor, form = COSTS[name].factor, COSTS[name].form
            share = f"{costs[name] / whole[name]:>6.1%}" if name in costs and whole[name] else ""
            cells.append(f"{format(factor * costs[name], form)} {share}" if name in costs else "")
        table.append([row, *cells])
    return "\n".join(text_table(table))


def show(bar: Any, result: SearchResult, tracker: HypervolumeTracker | None) -> None:
    if bar.disable:
        return
    direction = result.objectives[result.metric]
    values = [e.metrics[result.metric] for e in result.history if result.is_eligible(e)]
    shown: dict[str, Any] = {}
    if values:
        shown[f"best {result.metric}"] = f"{(max if direction == 'max' else min)(values):.4g}"
    shown["pareto"] = len(result.pareto)
    if result.failed:
        shown["failed"] = len(result.failed)
    if tracker is not None:
        shown["hypervolume"] = f"{tracker.value:.3f}"
    bar.set_postfix(shown, refresh=False)
    bar.update()
