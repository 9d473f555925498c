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
"""The figure of a plan."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from ...common.writing import atomic_path


_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw(
    title: str,
    history: Sequence[Mapping[str, Any]],
    before: Mapping[str, float],
    metric: str,
    path: str | os.PathLike[str] | None,
) -> Figure:
    """Draw the metric against the parameters, removal by removal; see `PruningPlan`, whose fields these are.

    Raises:
        ValueError: no removal was evaluated, or `path` has an unknown ending.
    """
    rows = [row for row in history if row["value"] is not None and "parameters" in row]
    if not rows:
        raise ValueError("plot: no removal of this plan was evaluated, so there is nothing to draw.")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if path is not None and os.fspath(path).rpartition(".")[2] not in canvas.get_supported_filetypes():
        formats = sorted(canvas.get_supported_filetypes())
        raise ValueError(f"`path` must end in one of {formats}, got {os.fspath(path)!r}.")
    axes = figure.subplots()
    last = None
    if metric in before and "parameters" in before:
        last = (before["parameters"], before[metric])
        axes.scatter([last[0]], [last[1]], color="#333333", marker="D", s=40, zorder=3, label="whole model")
    for number, stage in enumerate(dict.fromkeys(row["stage"] for row in rows)):
        points = [(row["parameters"], row["value"]) for row in rows if row["stage"] == stage]
        colour = _COLOURS[number % len(_COLOURS)]
        joined = [*([last] if last else []), *points]
        axes.plot([x for x, _ in joined], [y for _, y in joined], color=colour, linewidth=1.4)
        label = f"{stage} ({len(points)} removal{'s' if len(points) > 1 else ''})"
        axes.scatter([x for x, _ in points], [y for _, y in points], color=colour, s=22, zorder=2, label=label)
        last = points[-1]
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlabel("parameters")
    axes.set_ylabel(f"{metric} of the calibration data" if metric == "perplexity" else metric)
    axes.set_title(title, fontsize=11)
    axes.grid(color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9)
    if path is not None:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150)
    return figure
