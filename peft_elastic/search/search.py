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
"""The search itself: ask an algorithm for subnets, evaluate them, write them down, tell the algorithm."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.progress import progress_bar
from ..cost.counts import ALWAYS_RECORDED, CostModel
from ..cost.latency import LatencyModel
from ..supernet.context import eval_mode, seeded, subnet_restored
from ..supernet.host import ElasticHost, get_elastic_host
from ..supernet.space import SearchSpace, Subnet
from .algorithms import ALGORITHMS, EVOLUTIONARY, reference_subnets
from .constraints import Constraints, collect_bounds, is_number, resolve_bounds
from .history import HistoryFile
from .hypervolume import HypervolumeTracker
from .objectives import Objective, ObjectiveLike, parse_objectives, read_values
from .result import Evaluation, SearchResult, minimised


logger = logging.getLogger(__name__)

_LATENCY_FILE = "latency.json"
# Subnets that are looked through at most to see whether an exhaustive search is within `n_evals`.
_MAX_LISTED = 10**5

# What `evaluate` and `held_out` are: functions of the model that return a number or a dict of named numbers.
Evaluate = Callable[[Any], float | Mapping[str, float]]
# One point or several, each by name or in the order of the objectives.
ReferencePoints = Mapping[str, float] | Sequence[Mapping[str, float] | Sequence[float]]


def search_subnet(
    model: torch.nn.Module,
    evaluate: Evaluate,
    objectives: str | Sequence[ObjectiveLike] | None = None,
    algorithm: str = "nsga2",
    n_evals: int = 200,
    population: int = 8,
    seed: int = 0,
    save_dir: str | os.PathLike[str] | None = None,
    mode: str | Mapping[str, str] | None = None,
    held_out: Evaluate | None = None,
    progress: bool = True,
    latency: LatencyModel | None = None,
    constraints: Mapping[str, float | str] | None = None,
    max_latency: float | str | None = None,
    max_parameters: float | str | None = None,
    max_params: float | str | None = None,
    max_macs: float | str | None = None,
    max_bytes: float | str | None = None,
    reference_points: ReferencePoints | None = None,
) -> SearchResult:
    """Search the subnets of an elastic model for the best trade-offs.

    First the costs of the max, min and heuristic subnet are shown. These three are evaluated first, then those that the
    algorithm proposes; none twice. The model is left as it was found: the chosen and the sampled subnet, and the training
    mode of every module, also if an exception ends the search.

    Args:
        model (`nn.Module`):
            A model with an elastic adapter; anything `get_elastic_host` accepts.
        evaluate (`Callable`):
            Called as `evaluate(model)` with this very object, in evaluation mode, under `torch.no_grad()` and with the
            subnet active. Returns a number or a dict of named numbers; all values of a dict are recorded. Use
            *validation* data: what is selected on is no longer a fair estimate. Before each call the global random
            generators (`random`, NumPy, PyTorch) are seeded with `seed`, and put back afterwards.
        objectives (`Sequence`, *optional*, defaults to `("accuracy", "macs")`):
            What to optimise. The first is the name of the number that `evaluate` returns (an evaluator of this package
            brings its own name), or of an entry of its dict. The others are `"macs"`, `"parameters"` and `"bytes"` (see
            `CostModel`), `"latency"` in seconds (see `latency`), further entries of the dict, or functions of the model as
            `(name, function)` or `{name: function}`. The first alone makes a single-objective search.
        algorithm (`str`, defaults to `"nsga2"`):
            `"nsga2"`, `"r-nsga2"` (see `reference_points`), `"random"`, or `"exhaustive"`, which evaluates the whole space.
        n_evals (`int`, defaults to 200):
            Number of evaluations, exactly; fewer only if fewer subnets keep the constraints.
        population (`int`, defaults to 8):
            Subnets per generation of `"nsga2"` and `"r-nsga2"`, at least 4. LoNAS uses 8 for language models, 40 for GLUE.
        seed (`int`, defaults to 0):
            The same seed gives the same search, independent of the global random generators.
        save_dir (`str` or `os.PathLike`, *optional*):
            Folder for `history.jsonl`, which grows by one line per evaluation, and for the result at the end. A search
            that was interrupted, or is called again with a larger `n_evals`, continues from there to the result of an
            unbroken run. The same `model`, `evaluate` and `held_out` are expected; this cannot be verified.
        mode (`str` or `Mapping[str, str]`, *optional*):
            `"max"` (default) or `"min"`: the direction of what `evaluate` returns. Or the directions of single
            objectives by name. An evaluator of this package brings its own. Functions are minimised unless named here.
        held_out (`Callable`, *optional*):
            Like `evaluate`, on data that neither training nor search has seen. Called after the search for the Pareto
            front, the max and the heuristic subnet; the values go to `Evaluation.held_out` and steer nothing.
        progress (`bool`, defaults to `True`):
            Show a progress bar with the best metric, the size of the Pareto front and the hypervolume.
        latency (`LatencyModel`, *optional*):
            Predicts the latency of a subnet once it is deployed, for the objective `"latency"` and for bounds on it. With
            `save_dir` its measurements are kept there (`latency.json`), and a search that is continued goes on with those
            it began with.
        constraints (`Mapping`, *optional*):
            Upper bounds by name of a cost, `"latency"` (seconds), `"parameters"`, `"macs"` or `"bytes"`: a number, or a
            share of what the max subnet costs such as `"60%"`. Costs are known beforehand, so no evaluation is spent on a
            subnet that exceeds one, but for max, min and heuristic; `SearchResult.best` and `pareto` keep to them.
        max_latency, max_parameters (or max_params), max_macs, max_bytes (`float` or `str`, *optional*):
            The same as entries of `constraints`.
        reference_points (`Mapping` or `Sequence`, *optional*):
            Of `"r-nsga2"`, where on the front to search: one point as `{objective: value}`, or a list of such points or of
            lists in the order of the objectives, in the units of the objectives.

    Returns:
        `SearchResult`: all evaluations, with `pareto`, `best(...)`, `plot(...)`.

    Raises:
        ValueError: if an argument is not allowed; if no subnet keeps a constraint; if `save_dir` belongs to another search; if
            `evaluate`, `held_out` or an objective does not return numbers under the expected names, or changes the active
            subnet. What was evaluated before stays in `save_dir`. NaN and infinity are numbers: such an evaluation is recorded,
            counts towards `n_evals`, and is never chosen (`SearchResult.failed`).
    """
    host = get_elastic_host(model)
    space = host.search_space
    _check_arguments(space, evaluate, held_out, algorithm, n_evals, population, seed, latency)
    targets = parse_objectives(objectives, mode, evaluate, latency is not None)
    directions = {target.name: target.direction for target in targets}
    keywords = {
        "max_bytes": max_bytes,
        "max_latency": max_latency,
        "max_macs": max_macs,
        "max_parameters": max_parameters,
        "max_params": max_params,
    }
    wanted = collect_bounds(constraints, keywords, latency is not None)
    points = _parse_reference_points(reference_points, algorithm, directions)
    settings: dict[str, Any] = {
        "algorithm": algorithm,
        "seed": seed,
        "population": population if algorithm in EVOLUTIONARY else None,
    }
    if points is not None:
        settings["reference_points"] = points
    if latency is not None and save_dir is not None:
        latency = latency.as_begun(Path(save_dir) / _LATENCY_FILE)
    meter = _Meter(model, host, evaluate, held_out, targets, seed, latency, wanted)
    bounds = Constraints(resolve_bounds(wanted, space, meter.costs), meter.costs)
    if algorithm == "exhaustive":
        _check_exhaustive(space, n_evals, bounds)

    file, held_out_file = None, None
    if save_dir is not None:
        costs = meter.costs(space.max)
        header = {"space": repr(space), "fingerprint": space.fingerprint, "objectives": directions} | settings
        header |= {f"{name} of the max subnet": costs[name] for name in ALWAYS_RECORDED}
        header |= {"constraints": wanted} if wanted else {}
        header |= {"latency": latency.workload} if latency is not None else {}
        file = HistoryFile(Path(save_dir) / "history.jsonl", header, [*directions, *meter.recorded])
        held_out_file = HistoryFile(Path(save_dir) / "held_out.jsonl", header) if held_out is not None else None
        if latency is not None:
            latency.save(Path(save_dir) / _LATENCY_FILE)
    if wanted:
        settings["constraints"] = bounds.bounds

    limit = min(n_evals, space.size)
    named = reference_subnets(space)
    result = SearchResult(space, directions, [], settings)
    history = result.history
    minimised_points = None
    if points is not None:
        minimised_points = np.array([minimised(dict(zip(directions, point)), directions) for point in points])
    search = ALGORITHMS[algorithm](space, len(targets), population, seed, bounds, minimised_points)
    tracker = None
    with subnet_restored(host), progress_bar(total=limit, desc="search", disable=not progress) as bar:
        _say(bar, _profile({name: meter.costs(subnet) for subnet, name in named.items()}, bounds.bounds))
        if file is not None and file.n_rows:
            _say(bar, f"{min(file.n_rows, limit)} of {limit} evaluations found in {os.fspath(file.path)!r}")
        while len(history) < limit:
            batch = search.ask()[: limit - len(history)]
            if not batch:
                _say(bar, f"Only {len(history)} subnets keep the constraints; all are evaluated.")
                break
            for subnet in batch:
                evaluation = Evaluation(len(history), named.get(subnet, "search"), subnet, metrics={})
                metrics = _recall_or_measure(file, evaluation, meter.metrics)
                history.append(dataclasses.replace(evaluation, metrics=metrics))
                if result.has_failed(history[-1]):
                    shown = {name: metrics[name] for name in directions}
                    _say(
                        bar,
                        f"evaluation {evaluation.index} ({evaluation.source}) has failed with {shown}; it will not be chosen",
                    )
                if len(history) == min(len(named), limit):
                    name = result.metric
                    _say(bar, f"{name}: " + ", ".join(f"{e.source} {e.metrics[name]:.4g}" for e in history))
                    tracker = _begin_tracking(result)
                elif tracker is not None and result.is_eligible(history[-1]):
                    tracker.add(result.minimised(history[-1]))
                _show(bar, result, tracker)
            if len(history) < limit:
                search.tell(_told(result, history[-len(batch) :]))

        if held_out is not None:
            reported = {e.index for e in result.pareto}
            reported |= {e.index for e in history if e.source in ("max", "heuristic")}
            for index in progress_bar(sorted(reported), desc="held-out", disable=not progress):
                values = _recall_or_measure(held_out_file, history[index], meter.held_out_values)
                history[index] = dataclasses.replace(history[index], held_out=values)
    if save_dir is not None:
        result.save(save_dir)
    return result


class _Meter:
    """Measures subnets of one model."""

    def __init__(
        self,
        model: torch.nn.Module,
        host: ElasticHost,
        evaluate: Evaluate,
        held_out: Evaluate | None,
        targets: Sequence[Objective],
        seed: int,
        latency: LatencyModel | None,
        bounded: Iterable[str],
    ) -> None:
        self.model, self.host, self.seed = model, host, seed
        self.evaluate, self.held_out, self.targets = evaluate, held_out, targets
        self.cost_model, self.latency = CostModel(model, host.search_space), latency
        asked = {target.name for target in targets if target.function is None} | set(bounded)
        self.recorded = [
            name for name in ("macs", "parameters", "bytes", "latency") if name in {*asked, *ALWAYS_RECORDED}
        ]
        self.costs = lru_cache(maxsize=4096)(self._compute_costs)

    def _compute_costs(self, subnet: Subnet) -> dict[str, float]:
        """All costs that are known without an evaluation, by name."""
        costs: dict[str, float] = dict(self.cost_model.costs(subnet))
        if self.latency is not None:
            costs["latency"] = self.latency.predict(subnet)
        return costs

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        """All objectives of a subnet, what else `evaluate` returns, and the built-in costs."""
        name, where = self.targets[0].name, _where(evaluation)
        metrics = self._call(self.evaluate, "`evaluate`", name, evaluation)
        missing = [target.name for target in self.targets if target.measured and target.name not in metrics]
        if missing:
            raise ValueError(f"`evaluate` returned {metrics} without {missing}, which `objectives` names ({where}).")
        functions = {target.name: target.function for target in self.targets if target.function is not None}
        costs = self.costs(evaluation.subnet)
        computed: dict[str, float] = {name: costs[name] for name in self.recorded}
        twice = [name for name in metrics if name in functions or name in computed]
        if twice:
            raise ValueError(
                f"`evaluate` returned {twice}, which are computed otherwise; choose other names ({where})."
            )
        metrics.update(computed)
        for name, function in functions.items():
            values = self._call(function, f"objective {name!r}", name, evaluation)
            if list(values) != [name]:
                raise ValueError(f"objective {name!r} must return a number, not {values} ({where}).")
            metrics.update(values)
        return metrics

    def held_out_values(self, evaluation: Evaluation) -> dict[str, float]:
        """What `held_out` returns for a subnet."""
        assert self.held_out is not None
        return self._call(self.held_out, "`held_out`", self.targets[0].name, evaluation)

    def _call(self, function: Callable[[Any], Any], what: str, name: str, evaluation: Evaluation) -> dict[str, float]:
        self.host.set_subnet(evaluation.subnet)
        with eval_mode(self.model), seeded(self.seed), torch.no_grad():
            value = function(self.model)
        if self.host.active_subnet != evaluation.subnet:
            raise ValueError(f"{what} changed the active subnet of the model ({_where(evaluation)}).")
        return read_values(value, name, what, _where(evaluation))


def _check_arguments(
    space: SearchSpace,
    evaluate: Any,
    held_out: Any,
    algorithm: str,
    n_evals: int,
    population: int,
    seed: int,
    latency: Any,
) -> None:
    if not callable(evaluate):
        raise ValueError(f"`evaluate` must be a function of the model, got {evaluate!r}.")
    if held_out is not None and not callable(held_out):
        raise ValueError(f"`held_out` must be a function of the model, got {held_out!r}.")
    if algorithm not in ALGORITHMS:
        raise ValueError(f"`algorithm` must be one of {sorted(ALGORITHMS)}, got {algorithm!r}.")
    for name, value, low, high in (
        ("n_evals", n_evals, 1, None),
        ("population", population, 4, None),
        ("seed", seed, 0, 2**32 - 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high and value > high):
            allowed = f"from {low} to {high}" if high else f"of at least {low}"
            raise ValueError(f"`{name}` must be an integer {allowed}, got {value!r}.")
    if latency is not None and not isinstance(latency, LatencyModel):
        raise ValueError(f"`latency` must be a LatencyModel, got {latency!r}.")
    if latency is not None and latency.space != space:
        raise ValueError(
            f"`latency` was measured for another search space ({latency.space!r}) than that of `model` ({space!r})."
        )


def _check_exhaustive(space: SearchSpace, n_evals: int, constraints: Constraints) -> None:
    number = space.size
    if n_evals < number <= _MAX_LISTED:
        named = reference_subnets(space)
        number = sum(subnet in named or constraints.allows(subnet) for subnet in space.subnets())
    if number > n_evals:
        which = f"all {number} subnets of the space"
        if constraints.bounds and space.size <= _MAX_LISTED:
            which = f"the {number} subnets that keep the constraints, and max, min and heuristic"
        raise ValueError(f"`algorithm='exhaustive'` evaluates {which}, but `n_evals` is {n_evals}.")


def _parse_reference_points(
    points: ReferencePoints | None, algorithm: str, directions: Mapping[str, str]
) -> list[list[float]] | None:
    """The points as lists of numbers in the order of the objectives, in their units."""
    names = list(directions)
    if algorithm != "r-nsga2":
        if points is not None:
            raise ValueError(f"`reference_points` are for `algorithm='r-nsga2'`, not for {algorithm!r}.")
        return None
    example = "{" + ", ".join(f"{name!r}: ..." for name in names) + "}"
    if len(names) < 2:
        raise ValueError(f"`algorithm='r-nsga2'` needs at least two `objectives`, got {names}.")
    if isinstance(points, Mapping):
        points = [points]
    if not isinstance(points, Sequence) or isinstance(points, str) or not points:
        raise ValueError(f"`reference_points` must be a point such as {example} or a list of points, got {points!r}.")
    parsed = []
    for point in points:
        if isinstance(point, Mapping) and set(point) == set(names):
            values = [point[name] for name in names]
        elif isinstance(point, Sequence) and not isinstance(point, str) and len(point) == len(names):
            values = list(point)
        else:
            raise ValueError(
                f"a point of `reference_points` must be like {example}, with every objective, got {point!r}."
            )
        if not all(is_number(value) for value in values):
            raise ValueError(f"the values in `reference_points` must be finite numbers, got {point!r}.")
        parsed.append([float(value) for value in values])
    return parsed


def _recall_or_measure(
    file: HistoryFile | None, evaluation: Evaluation, measure: Callable[[Evaluation], dict[str, float]]
) -> dict[str, float]:
    values = None if file is None else file.recall(evaluation)
    if values is None:
        values = measure(evaluation)
        if file is not None:
            file.record(evaluation, values)
    return values


def _told(result: SearchResult, evaluations: Sequence[Evaluation]) -> list[list[float]]:
    """The objectives, turned so that smaller is better; those of a failed evaluation worse than any that was seen."""
    finite = np.array([result.minimised(e) for e in result.history if not result.has_failed(e)], dtype=float)
    if not len(finite):
        finite = np.zeros((1, len(result.objectives)))
    span = finite.max(axis=0) - finite.min(axis=0)
    worse = finite.max(axis=0) + 1e-3 * np.where(span > 0, span, 1.0)
    return [worse.tolist() if result.has_failed(e) else result.minimised(e) for e in evaluations]


def _where(evaluation: Evaluation) -> str:
    return f"evaluation {evaluation.index}, {evaluation.source}, {evaluation.subnet!r}"


def _say(bar: Any, text: str) -> None:
    """Above the progress bar, or to the log if there is none."""
    if bar.disable:
        logger.info(text)
    else:
        bar.write(text, file=sys.stderr)


_UNITS = {
    "parameters": ("parameters", 1, ",.0f"),
    "macs": ("MACs per token", 1, ",.0f"),
    "bytes": ("MB", 1e-6, ",.2f"),
    "latency": ("ms", 1e3, ",.3f"),
}


def _profile(references: Mapping[str, Mapping[str, float]], bounds: Mapping[str, float]) -> str:
    """The costs of the max, min and heuristic subnet, and the bounds on them, as a table."""
    rows = dict(references) | ({"at most": bounds} if bounds else {})
    whole = references["max"]
    columns = [name for name in _UNITS if name in whole]
    table = [["", *(_UNITS[name][0] for name in columns)]]
    for row, costs in rows.items():
        cells = []
        for name in columns:
            _, factor, form = _UNITS[name]
            share = f"{costs[name] / whole[name]:>6.1%}" if name in costs and whole[name] else ""
            cells.append(f"{format(factor * costs[name], form)} {share}" if name in costs else "")
        table.append([row, *cells])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in table
    )


def _begin_tracking(result: SearchResult) -> HypervolumeTracker:
    """The hypervolume of the reference subnets, which also give its scale."""
    tracker = HypervolumeTracker(*(minimised(point, result.objectives) for point in result.hypervolume_box))
    for evaluation in result.history:
        if result.is_eligible(evaluation):
            tracker.add(result.minimised(evaluation))
    return tracker


def _show(bar: Any, result: SearchResult, tracker: HypervolumeTracker | None) -> None:
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
