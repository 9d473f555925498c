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
"""What a search found."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.checks import wrong
from ..common.documents import (
    ANYTHING,
    COUNT,
    MEASURED,
    NUMBER,
    TEXT,
    Document,
    ListOf,
    MapOf,
    Nullable,
    OneOf,
    Record,
)
from ..common.writing import atomic_write_text
from ..cost.counts import COSTS, cost_in, parse_bound
from ..supernet.space import SearchSpace, Subnet
from .constraints import TOLERANCE, excess, is_bound, is_number
from .hypervolume import hypervolumes
from .values import from_json, to_json


if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


_FILE_NAME = "search_result.json"
_EVALUATION = Record(
    index=COUNT, source=TEXT, subnet=MapOf(COUNT), metrics=MapOf(MEASURED), held_out=Nullable(MapOf(MEASURED))
)
_DOCUMENT = Document(
    "search result",
    "peft-elastic/search-result",
    1,
    Record(
        space=MapOf(ANYTHING),
        objectives=MapOf(OneOf("max", "min")),
        settings=Record({"constraints": Nullable(MapOf(NUMBER))}, ANYTHING),
        history=ListOf(_EVALUATION),
    ),
)


@dataclass(frozen=True)
class Evaluation:
    """A subnet and what was measured on it.

    Args:
        index (`int`): position in the history, from 0.
        source (`str`): `"max"`, `"min"`, `"heuristic"`, or `"search"` for a subnet that the algorithm proposed.
        subnet (`Subnet`): the subnet.
        metrics (`dict[str, float]`): the objectives (which may be NaN or infinite), whatever else `evaluate` returned, `macs` and `parameters`, and
            `bytes` and `latency` (seconds) where they were an objective or bounded.
        held_out (`dict[str, float]`, *optional*): measured after the search on other data; it steers nothing.
    """

    index: int
    source: str
    subnet: Subnet
    metrics: dict[str, float]
    held_out: dict[str, float] | None = None


@dataclass
class SearchResult:
    """All evaluations of a search. Equal results have equal spaces, objectives, settings and histories.

    Args:
        space (`SearchSpace`): the space that was searched.
        objectives (`dict[str, str]`): name -> `"max"` or `"min"`; the first is the metric, the others are costs or
            further metrics.
        history (`list[Evaluation]`): in the order of evaluation; the first is the max subnet.
        settings (`dict[str, Any]`): algorithm, seed and population; `constraints`, the bounds by name of the cost, and
            `reference_points`, where the search had some.
    """

    space: SearchSpace
    objectives: dict[str, str]
    history: list[Evaluation]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def metric(self) -> str:
        """Name of the first objective."""
        return next(iter(self.objectives))

    @property
    def cost(self) -> str:
        """Name of the first minimised objective after the metric; `"macs"` if there is none."""
        return next((name for name in list(self.objectives)[1:] if self.objectives[name] == "min"), "macs")

    @property
    def reference(self) -> Evaluation:
        """The max subnet: what `max_drop` and percentages refer to."""
        return self.history[0]

    @property
    def constraints(self) -> dict[str, float]:
        """The upper bounds of the search, by name of the cost."""
        return dict(self.settings.get("constraints") or {})

    def keeps_constraints(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation keeps `constraints`; of those of a search, only max, min and heuristic may not."""
        return all(excess(evaluation.metrics[name], bound) <= TOLERANCE for name, bound in self.constraints.items())

    def has_failed(self, evaluation: Evaluation) -> bool:
        """Whether an objective of it is NaN or infinite. Such an evaluation is in the history, and is never chosen."""
        return not all(math.isfinite(evaluation.metrics[name]) for name in self.objectives)

    def is_eligible(self, evaluation: Evaluation) -> bool:
        """Whether an evaluation keeps `constraints` and has not failed."""
        return self.keeps_constraints(evaluation) and not self.has_failed(evaluation)

    @property
    def failed(self) -> list[Evaluation]:
        """The evaluations with an objective that is NaN or infinite."""
        return [e for e in self.history if self.has_failed(e)]

    @property
    def pareto(self) -> list[Evaluation]:
        """The evaluations that no other beats in one objective without being worse in another, cheapest first, among those
        that keep `constraints` and have not failed.

        Subnets with equal objectives are all listed. With a single objective these are the best ones.
        """
        allowed = [e for e in self.history if self.is_eligible(e)]
        if not allowed:
            return []
        from pymoo.util.nds.non_dominated_sorting import find_non_dominated  # only now: pymoo takes long to import

        values = np.array([self.minimised(e) for e in allowed], dtype=float)
        front = [allowed[i] for i in find_non_dominated(values).tolist()]
        return sorted(front, key=lambda e: (e.metrics[self.cost], -self._quality(e), e.index))

    def minimised(self, evaluation: Evaluation) -> list[float]:
        """The objectives of an evaluation in order, turned so that smaller is better."""
        return minimised(evaluation.metrics, self.objectives)

    @property
    def hypervolume_box(self) -> tuple[dict[str, float], dict[str, float]]:
        """Reference and ideal point of `hypervolume`: in each objective the worst and the best value of the max, min and
        heuristic subnet. Searches of the same model with the same `evaluate` share them. Where all of these have failed, both
        are the first subnet that has not; NaN without any."""
        usable = [e for e in self.history if not self.has_failed(e)]
        references = [e for e in usable if e.source != "search"] or usable[:1]
        if not references:
            return dict.fromkeys(self.objectives, math.nan), dict.fromkeys(self.objectives, math.nan)
        low, high = ({n: f(e.metrics[n] for e in references) for n in self.objectives} for f in (min, max))
        worst = {name: high[name] if direction == "min" else low[name] for name, direction in self.objectives.items()}
        best = {name: low[name] if direction == "min" else high[name] for name, direction in self.objectives.items()}
        return worst, best

    @property
    def hypervolume(self) -> list[float]:
        """The hypervolume after each evaluation; it never falls, and evaluations that violate `constraints` or have failed add
        nothing.

        It is the volume that the Pareto front dominates, in units of the box between the two points of `hypervolume_box`: 0
        while nothing is better than the reference point in every objective, 1 for a subnet that has the best value of each
        reference subnet at once, and more than 1 only if the search finds better ones.
        """
        return hypervolume_of(self, *self.hypervolume_box) if self.history else []

    def evaluation(self, subnet: Subnet | Mapping[str, int] | str) -> Evaluation:
        """The evaluation of a subnet, also by name: `"max"`, `"min"`, `"heuristic"`.

        Raises:
            ValueError: if the subnet is not of this space or was not evaluated.
        """
        wanted = self.space.subnet(subnet)
        for evaluation in self.history:
            if evaluation.subnet == wanted:
                return evaluation
        raise ValueError(f"`subnet` {subnet!r} was not evaluated in this search.")

    def best(
        self,
        max_drop: float | None = None,
        budget: float | str | Mapping[str, float | str] | None = None,
        constrained: bool = True,
    ) -> Subnet:
        """The subnet to use, chosen by the metrics of the search alone (never by `held_out`).

        Without `max_drop`, the subnet with the best metric (the cheapest of equals) of those that have not failed. With `max_drop`, the cheapest
        subnet whose metric is at most that much worse than that of the max subnet (the best of equals).

        Args:
            max_drop (`float`, *optional*):
                Largest loss of the metric against the max subnet, absolute, in the metric's own unit: 0.01 is one point
                of an accuracy given as a fraction.
            budget (`float`, `str` or `dict`, *optional*):
                Upper bound on `cost`, or bounds by name of minimised objectives, `"macs"`, `"parameters"` or other
                costs that were recorded. A number, or a share of what the max subnet costs, such as `"60%"`.
            constrained (`bool`, defaults to `True`):
                Keep to the `constraints` of the search as well.

        Raises:
            ValueError: if an argument is not allowed, or no evaluated subnet satisfies it; the message says which comes
                closest.
        """
        limits = self._limits(budget)
        for name, bound in (self.constraints if constrained else {}).items():
            limits[name] = min(bound, limits.get(name, math.inf))
        if max_drop is not None and (not is_number(max_drop) or max_drop < 0):
            raise wrong("max_drop", "a number >= 0", max_drop)

        def violation(evaluation: Evaluation) -> float:
            """The largest violation of a limit, as a share of it; not positive if all are kept."""
            return max((excess(evaluation.metrics[name], limit) for name, limit in limits.items()), default=0.0)

        usable = [e for e in self.history if not self.has_failed(e)]
        if not usable:
            raise ValueError(
                f"none of the {len(self.history)} evaluations has finite objectives ({', '.join(self.objectives)}): there is nothing to "
                "choose. Look at what `evaluate` computes, and in which dtype."
            )
        affordable = [e for e in usable if violation(e) <= TOLERANCE]
        if not affordable:
            bounds = f"`budget` {budget!r}" if budget is not None else "the constraints"
            closest = self._describe(min(usable, key=violation))
            raise ValueError(f"no evaluated subnet keeps {bounds}. The closest is {closest}.")
        best = min(affordable, key=lambda e: (-self._quality(e), e.metrics[self.cost], e.index))
        if max_drop is None:
            return best.subnet
        if self.has_failed(self.reference):
            raise ValueError(
                f"`max_drop` {max_drop!r} is counted from the max subnet, whose evaluation has failed: {self._describe(self.reference)}."
            )
        floor = self._quality(self.reference) - max_drop
        floor -= TOLERANCE * max(1.0, abs(floor))
        good = [e for e in affordable if self._quality(e) >= floor]
        if not good:
            raise ValueError(
                f"no evaluated subnet{' within the budget' if limits else ''} has a {self.metric} at most `max_drop` "
                f"{max_drop!r} worse than that of the max subnet ({self.reference.metrics[self.metric]:g}). The closest "
                f"is {self._describe(best)}."
            )
        return min(good, key=lambda e: (e.metrics[self.cost], -self._quality(e), e.index)).subnet

    def _limits(self, budget: float | str | Mapping[str, float | str] | None) -> dict[str, float]:
        if budget is None:
            return {}
        bounds = budget if isinstance(budget, Mapping) else {self.cost: budget}
        minimised = [name for name, direction in self.objectives.items() if direction == "min"]
        recorded = [name for name in COSTS if name in self.reference.metrics]
        allowed = list(dict.fromkeys([*minimised, *recorded]))
        limits = {}
        for name, bound in bounds.items():
            if name not in allowed:
                raise wrong("budget", f"bounds on some of {allowed}", name)
            limits[name] = parse_bound(bound, self.reference.metrics[name])
            if not is_bound(limits[name]):
                raise ValueError(
                    f"`budget` must be positive numbers or shares of the max subnet's cost such as '60%', got {bound!r} "
                    f"for {name!r}."
                )
        return limits

    def _quality(self, evaluation: Evaluation) -> float:
        """The metric, turned so that larger is better."""
        value = evaluation.metrics[self.metric]
        return value if self.objectives[self.metric] == "max" else -value

    def _describe(self, evaluation: Evaluation) -> str:
        metrics = ", ".join(f"{name} {value:g}" for name, value in evaluation.metrics.items())
        return f"evaluation {evaluation.index} ({evaluation.source}): {metrics}"

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per evaluation: `source`, `pareto`, a column per metric, `held_out_<name>` where measured, and a column
        per choice; the index is that of the evaluation."""
        import pandas

        front = {e.index for e in self.pareto}
        rows = [
            {
                "index": e.index,
                "source": e.source,
                "pareto": e.index in front,
                **e.metrics,
                **{f"held_out_{name}": value for name, value in (e.held_out or {}).items()},
                **e.subnet,
            }
            for e in self.history
        ]
        return pandas.DataFrame(rows).set_index("index")

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the progress of the search and, with several objectives, the Pareto front of metric and `cost`.

        Args:
            path (`str` or `os.PathLike`, *optional*): where to write it, e.g. `"pareto.png"`; the suffix gives the format.

        Returns:
            `matplotlib.figure.Figure`: the figure; pyplot's state is not touched.

        Raises:
            ValueError: if matplotlib cannot write the format.
        """
        from .plot import Picture, Point, draw  # only now: matplotlib takes long to import

        # the three are the first of the history, unless it is shorter
        names = ("max", "min", "heuristic")
        named = {e.index: [n for n in names if e.subnet == getattr(self.space, n)] for e in self.history[:3]}
        points = [
            Point(
                e.index + 1, e.metrics[self.metric], e.metrics[self.cost], self.is_eligible(e), named.get(e.index, [])
            )
            for e in self.history
        ]
        picture = Picture(
            points,
            [(e.metrics[self.cost], e.metrics[self.metric]) for e in self.pareto],
            self.hypervolume,
            self.metric,
            self.objectives[self.metric] == "max",
            self.cost,
            list(self.objectives),
            cost_in(self.space, self.cost).axis if self.cost in COSTS else self.cost,
        )
        return draw(picture, path)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `search_result.json` into `directory`, atomically."""
        data = {
            "space": json.loads(self.space.to_json()),
            "objectives": self.objectives,
            "settings": self.settings,
            "history": [_to_json(e) for e in self.history],
        }
        atomic_write_text(Path(directory) / _FILE_NAME, json.dumps(_DOCUMENT.wrap(data), indent=1))

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> SearchResult:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a search result; the message names it.
        """
        path = Path(directory) / _FILE_NAME
        data = _DOCUMENT.read(path)
        try:
            space = SearchSpace.from_json(json.dumps(data["space"]))
            history = [_from_json(row, space) for row in data["history"]]
            result = cls(space, data["objectives"], history, data["settings"])
            result._check()
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is not a search result: {error}") from None
        return result

    def _check(self) -> None:
        """ValueError unless everything that the methods ask of an evaluation is there."""
        needed = {*self.objectives, *self.constraints, self.cost}
        if not self.objectives:
            raise ValueError("it has no objectives")
        indices: set[int] = set()
        for number, evaluation in enumerate(self.history):
            if evaluation.index in indices:
                raise ValueError(f"history[{number}].index is {evaluation.index}, as of another evaluation")
            indices.add(evaluation.index)
            missing = sorted(needed - set(evaluation.metrics))
            if missing:
                raise ValueError(f"history[{number}].metrics lacks {missing[0]!r}")


def _to_json(evaluation: Evaluation) -> dict[str, Any]:
    held_out = None if evaluation.held_out is None else to_json(evaluation.held_out)
    values = {"subnet": evaluation.subnet.to_dict(), "metrics": to_json(evaluation.metrics), "held_out": held_out}
    return {**asdict(evaluation), **values}


def _from_json(row: dict[str, Any], space: SearchSpace) -> Evaluation:
    held_out = None if row.get("held_out") is None else from_json(row["held_out"])
    values = {"subnet": space.subnet(row["subnet"]), "metrics": from_json(row["metrics"]), "held_out": held_out}
    return Evaluation(**{**row, **values})


def minimised(metrics: Mapping[str, float], objectives: Mapping[str, str]) -> list[float]:
    """The objectives in order, turned so that smaller is better."""
    return [metrics[name] if direction == "min" else -metrics[name] for name, direction in objectives.items()]


def hypervolume_of(result: SearchResult, reference: Mapping[str, float], ideal: Mapping[str, float]) -> list[float]:
    """The hypervolume after each evaluation of a search, normalised so that the box between `reference` and `ideal` is 1.

    `SearchResult.hypervolume` does this with the result's own box. To compare two searches of the same model, measure both
    with one box: `hypervolume_of(other, *result.hypervolume_box)`.

    Args:
        result (`SearchResult`): evaluations that violate its constraints or have failed add nothing.
        reference, ideal (`Mapping[str, float]`): a bad and a good value of every objective, in its own unit.

    Returns:
        `list[float]`: never falling, as long as the history.

    Raises:
        ValueError: if a mapping does not name exactly the objectives, or an ideal value is worse than the reference.
    """
    for argument, values in (("reference", reference), ("ideal", ideal)):
        if set(values) != set(result.objectives):
            raise ValueError(f"`{argument}` names {sorted(values)}, the objectives are {sorted(result.objectives)}.")
    bad, good = (minimised(point, result.objectives) for point in (reference, ideal))
    if any(best > worst for worst, best in zip(bad, good, strict=True)):
        raise ValueError(f"`ideal` {dict(ideal)!r} is worse than `reference` {dict(reference)!r} in an objective.")
    return hypervolumes((result.minimised(e) if result.is_eligible(e) else None for e in result.history), bad, good)
