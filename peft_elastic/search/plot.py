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
"""Drawing a search result."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ..common.writing import atomic_path


if TYPE_CHECKING:
    from .result import Evaluation, SearchResult


# Colours of Okabe and Ito, distinguishable with every kind of colour vision; the shapes tell them apart in print.
_EVALUATED, _LINE = "#9a9a9a", "#0072b2"
_MARKS = {"max": ("^", "#d55e00"), "min": ("v", "#009e73"), "heuristic": ("D", "#e69f00")}
_HYPERVOLUME = "#cc79a7"
_LABELS = {"bytes": "bytes", "latency": "latency (s)", "macs": "MACs per token", "parameters": "parameters"}


def draw(result: SearchResult, path: str | os.PathLike[str] | None) -> Figure:
    """The figure behind `SearchResult.plot`."""
    several = len(result.objectives) > 1
    figure = Figure(figsize=(11, 4.4) if several else (6, 4.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if path is not None and Path(path).suffix[1:] not in canvas.get_supported_filetypes():
        formats = sorted(canvas.get_supported_filetypes())
        raise ValueError(f"`path` must end in one of {formats}, got {os.fspath(path)!r}.")
    axes = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    _progress(axes[0], result)
    if several:
        _front(axes[1], result)
    labelled = {label: handle for a in figure.axes for handle, label in zip(*a.get_legend_handles_labels())}
    figure.legend(
        labelled.values(), labelled, loc="outside lower center", ncols=len(labelled) if several else 3, fontsize=9
    )
    if path is not None:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150)
    return figure


def _progress(axes: Axes, result: SearchResult) -> None:
    x = [e.index + 1 for e in result.history]
    y = np.array([_drawn(e.metrics[result.metric]) for e in result.history])
    # what violates a constraint or has failed is not the best; NaN until something is
    kept = np.array([v if result.is_eligible(e) else np.nan for v, e in zip(y, result.history)])
    best = np.fmax.accumulate(kept) if result.objectives[result.metric] == "max" else np.fmin.accumulate(kept)
    axes.scatter(x, y, s=16, color=_EVALUATED, alpha=0.6, linewidths=0, label="evaluated")
    axes.step(x, best, where="post", color=_LINE, linewidth=1.8, label="best so far")
    _mark(axes, result, lambda e: (e.index + 1, _drawn(e.metrics[result.metric])))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Progress of the search", fontsize=11)
    axes.set_xlabel("evaluations")
    axes.set_ylabel(result.metric)
    _finish(axes)
    if len(result.objectives) > 1:
        right = axes.twinx()
        right.plot(x, result.hypervolume, color=_HYPERVOLUME, linewidth=1.2, linestyle="--", label="hypervolume")
        right.set_ylabel("hypervolume", color=_HYPERVOLUME)
        right.set_ylim(bottom=0)
        right.spines["top"].set_visible(False)


def _front(axes: Axes, result: SearchResult) -> None:
    def point(e: Evaluation) -> tuple[float, float]:
        return _drawn(e.metrics[result.cost]), _drawn(e.metrics[result.metric])

    x, y = zip(*(point(e) for e in result.history))
    axes.scatter(x, y, s=16, color=_EVALUATED, alpha=0.6, linewidths=0, label="evaluated")
    front_x, front_y = [point(e)[0] for e in result.pareto], [point(e)[1] for e in result.pareto]
    # with another objective the front does not lie in this plane, and a line through its points would mean nothing
    in_plane = list(result.objectives) == [result.metric, result.cost]
    line = {"drawstyle": "steps-post", "linewidth": 1.4} if in_plane else {"linestyle": ""}
    axes.plot(front_x, front_y, color=_LINE, marker="o", markersize=5, label=f"Pareto front ({len(front_x)})", **line)
    _mark(axes, result, point)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_title("Evaluated subnets", fontsize=11)
    axes.set_xlabel(_LABELS.get(result.cost, result.cost))
    axes.set_ylabel(result.metric)
    _finish(axes)


def _drawn(value: float) -> float:
    """The value, or NaN, which leaves no mark, for one that would stretch the axis without end."""
    return float(value) if math.isfinite(value) else math.nan


def _mark(axes: Axes, result: SearchResult, point: Callable[[Evaluation], tuple[float, float]]) -> None:
    """Mark the max, min and heuristic subnets; in a small space they may coincide."""
    names: dict[int, list[str]] = {}
    for name in _MARKS:
        # the three are the first of the history, unless it is shorter
        for e in result.history[:3]:
            if e.subnet == getattr(result.space, name):
                names.setdefault(e.index, []).append(name)
    for index, same in names.items():
        marker, color = _MARKS[same[0]]
        x, y = point(result.history[index])
        axes.scatter(x, y, s=70, marker=marker, color=color, edgecolors="white", zorder=3, label=", ".join(same))


def _finish(axes: Axes) -> None:
    axes.grid(color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
