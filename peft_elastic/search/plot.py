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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from ..common.writing import atomic_path


# Colours of Okabe and Ito, distinguishable with every kind of colour vision; the shapes tell them apart in print.
_EVALUATED, _LINE = "#9a9a9a", "#0072b2"
_MARKS = {"max": ("^", "#d55e00"), "min": ("v", "#009e73"), "heuristic": ("D", "#e69f00")}
_HYPERVOLUME = "#cc79a7"


class Point(NamedTuple):
    """An evaluation, as it is drawn.

    Args:
        number (`int`): of the evaluation, from 1.
        metric, cost (`float`): its values.
        eligible (`bool`): whether it can be the best.
        names (`list[str]`): what of "max", "min" and "heuristic" it is; in a small space they may coincide.
    """

    number: int
    metric: float
    cost: float
    eligible: bool
    names: list[str]


@dataclass(frozen=True)
class Picture:
    """What a figure of a search shows.

    Args:
        points (`Sequence[Point]`): the evaluations.
        front (`Sequence[tuple[float, float]]`): cost and metric of the Pareto front, cheapest first.
        hypervolume (`Sequence[float]`): after each evaluation.
        metric, cost (`str`): their names.
        maximised (`bool`): whether a larger metric is better.
        objectives (`Sequence[str]`): the names of all.
        axis (`str`): the cost in words.
    """

    points: Sequence[Point]
    front: Sequence[tuple[float, float]]
    hypervolume: Sequence[float]
    metric: str
    maximised: bool
    cost: str
    objectives: Sequence[str]
    axis: str


def draw(picture: Picture, path: str | os.PathLike[str] | None) -> Figure:
    """The figure behind `SearchResult.plot`."""
    several = len(picture.objectives) > 1
    figure = Figure(figsize=(11, 4.4) if several else (6, 4.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if path is not None and Path(path).suffix[1:] not in canvas.get_supported_filetypes():
        formats = sorted(canvas.get_supported_filetypes())
        raise ValueError(f"`path` must end in one of {formats}, got {os.fspath(path)!r}.")
    axes = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    _progress(axes[0], picture)
    if several:
        _front(axes[1], picture)
    labelled = {label: handle for a in figure.axes for handle, label in zip(*a.get_legend_handles_labels())}
    figure.legend(
        labelled.values(), labelled, loc="outside lower center", ncols=len(labelled) if several else 3, fontsize=9
    )
    if path is not None:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=150)
    return figure


def _progress(axes: Axes, picture: Picture) -> None:
    x = [point.number for point in picture.points]
    y = np.array([_drawn(point.metric) for point in picture.points])
    # what violates a constraint or has failed is not the best; NaN until something is
    kept = np.array([v if point.eligible else np.nan for v, point in zip(y, picture.points)])
    best = np.fmax.accumulate(kept) if picture.maximised else np.fmin.accumulate(kept)
    axes.scatter(x, y, s=16, color=_EVALUATED, alpha=0.6, linewidths=0, label="evaluated")
    axes.step(x, best, where="post", color=_LINE, linewidth=1.8, label="best so far")
    _mark(axes, picture, lambda point: (point.number, _drawn(point.metric)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Progress of the search", fontsize=11)
    axes.set_xlabel("evaluations")
    axes.set_ylabel(picture.metric)
    _finish(axes)
    if len(picture.objectives) > 1:
        right = axes.twinx()
        right.plot(x, picture.hypervolume, color=_HYPERVOLUME, linewidth=1.2, linestyle="--", label="hypervolume")
        right.set_ylabel("hypervolume", color=_HYPERVOLUME)
        right.set_ylim(bottom=0)
        right.spines["top"].set_visible(False)


def _front(axes: Axes, picture: Picture) -> None:
    def place(point: Point) -> tuple[float, float]:
        return _drawn(point.cost), _drawn(point.metric)

    x, y = zip(*map(place, picture.points))
    axes.scatter(x, y, s=16, color=_EVALUATED, alpha=0.6, linewidths=0, label="evaluated")
    front_x, front_y = (
        [_drawn(value) for value in values] for values in (zip(*picture.front) if picture.front else ((), ()))
    )
    # with another objective the front does not lie in this plane, and a line through its points would mean nothing
    in_plane = list(picture.objectives) == [picture.metric, picture.cost]
    line = {"drawstyle": "steps-post", "linewidth": 1.4} if in_plane else {"linestyle": ""}
    axes.plot(front_x, front_y, color=_LINE, marker="o", markersize=5, label=f"Pareto front ({len(front_x)})", **line)
    _mark(axes, picture, place)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_title("Evaluated subnets", fontsize=11)
    axes.set_xlabel(picture.axis)
    axes.set_ylabel(picture.metric)
    _finish(axes)


def _drawn(value: float) -> float:
    """The value, or NaN, which leaves no mark, for one that would stretch the axis without end."""
    return float(value) if math.isfinite(value) else math.nan


def _mark(axes: Axes, picture: Picture, place: Callable[[Point], tuple[float, float]]) -> None:
    """Mark the max, min and heuristic subnets."""
    for point in sorted((p for p in picture.points if p.names), key=lambda p: list(_MARKS).index(p.names[0])):
        marker, color = _MARKS[point.names[0]]
        x, y = place(point)
        axes.scatter(
            x, y, s=70, marker=marker, color=color, edgecolors="white", zorder=3, label=", ".join(point.names)
        )


def _finish(axes: Axes) -> None:
    axes.grid(color="#e5e5e5", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
