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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..supernet.host import ElasticHost, get_elastic_host
from ..supernet.space import SearchSpace
from .algorithms import ALGORITHMS, reference_subnets
from .context import eval_mode, seeded, subnet_restored
from .cost import CostModel
from .history import HistoryFile
from .objectives import Objective, ObjectiveLike, parse_objectives, read_values
from .result import Evaluation, SearchResult, minimised, non_dominated


logger = logging.getLogger(__name__)

# What `evaluate` and `held_out` are: functions of the model that return a number or a dict of named numbers.
Evaluate = Callable[[Any], float | Mapping[str, float]]


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
) -> SearchResult:
    """Search the subnets of an elastic model for the best trade-offs.

    The max, min and heuristic subnets are evaluated first, then those that the algorithm proposes; none twice. The model
    is left as it was found: the chosen and the sampled subnet, and the training mode of every module, also if an
    exception ends the search.

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
            brings its own name), or of an entry of its dict. The others are `"macs"` and `"parameters"` (see
            `CostModel`), further entries of the dict, or functions of the model as `(name, function)` or
            `{name: function}`. The first alone makes a single-objective search.
        algorithm (`str`, defaults to `"nsga2"`):
            `"nsga2"`, `"random"`, or `"exhaustive"`, which evaluates the whole space.
        n_evals (`int`, defaults to 200):
            Number of evaluations, exactly; fewer only if the space has fewer subnets.
        population (`int`, defaults to 8):
            Subnets per generation of `"nsga2"`, at least 4. LoNAS uses 8 for language models, 40 for GLUE.
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
            Show a progress bar with the best metric and the size of the Pareto front.

    Returns:
        `SearchResult`: all evaluations, with `pareto`, `best(...)`, `plot(...)`.

    Raises:
        ValueError: if an argument is not allowed; if `save_dir` belongs to another search; if `evaluate`, `held_out` or
            an objective does not return finite numbers under the expected names, or changes the active subnet. What was
            evaluated before stays in `save_dir`.
    """
    host = get_elastic_host(model)
    space = host.search_space
    _check_arguments(space, evaluate, held_out, algorithm, n_evals, population, seed)
    targets = parse_objectives(objectives, mode, evaluate)
    directions = {target.name: target.direction for target in targets}
    settings = {"algorithm": algorithm, "seed": seed, "population": population if algorithm == "nsga2" else None}
    meter = _Meter(model, host, evaluate, held_out, targets, seed)
    file, held_out_file = None, None
    if save_dir is not None:
        costs = {f"{name} of the max subnet": cost for name, cost in meter.cost_model.costs(space.max).items()}
        header = {"space": repr(space), "fingerprint": space.fingerprint, "objectives": directions} | settings | costs
        file = HistoryFile(Path(save_dir) / "history.jsonl", header)
        held_out_file = HistoryFile(Path(save_dir) / "held_out.jsonl", header) if held_out is not None else None

    limit = min(n_evals, space.size)
    named = reference_subnets(space)
    history: list[Evaluation] = []
    search = ALGORITHMS[algorithm](space, len(targets), population, seed)
    with subnet_restored(host), tqdm(total=limit, desc="search", disable=not progress) as bar:
        if file is not None and file.n_rows:
            _say(bar, f"{min(file.n_rows, limit)} of {limit} evaluations found in {os.fspath(file.path)!r}")
        while True:
            batch = search.ask()[: limit - len(history)]
            for subnet in batch:
                evaluation = Evaluation(len(history), named.get(subnet, "search"), subnet, metrics={})
                metrics = _recall_or_measure(file, evaluation, meter.metrics)
                history.append(dataclasses.replace(evaluation, metrics=metrics))
                if len(history) == min(len(named), limit):
                    _say(bar, _profile(history, targets[0].name))
                _show(bar, history, directions)
            if len(history) == limit:
                break
            search.tell([minimised(e.metrics, directions) for e in history[-len(batch) :]])

        result = SearchResult(space, directions, history, settings)
        if held_out is not None:
            reported = {e.index for e in result.pareto}
            reported |= {e.index for e in history if e.source in ("max", "heuristic")}
            for index in tqdm(sorted(reported), desc="held-out", disable=not progress):
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
    ) -> None:
        self.model, self.host, self.seed = model, host, seed
        self.evaluate, self.held_out, self.targets = evaluate, held_out, targets
        self.cost_model = CostModel(model, host.search_space)

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        """All objectives of a subnet, what else `evaluate` returns, and the built-in costs."""
        name, where = self.targets[0].name, _where(evaluation)
        metrics = self._call(self.evaluate, "`evaluate`", name, evaluation)
        missing = [target.name for target in self.targets if target.measured and target.name not in metrics]
        if missing:
            raise ValueError(f"`evaluate` returned {metrics} without {missing}, which `objectives` names ({where}).")
        functions = {target.name: target.function for target in self.targets if target.function is not None}
        computed = self.cost_model.costs(evaluation.subnet)
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
    if algorithm == "exhaustive" and space.size > n_evals:
        raise ValueError(
            f"`algorithm='exhaustive'` evaluates all {space.size} subnets of the space, but `n_evals` is {n_evals}."
        )


def _recall_or_measure(
    file: HistoryFile | None, evaluation: Evaluation, measure: Callable[[Evaluation], dict[str, float]]
) -> dict[str, float]:
    values = None if file is None else file.recall(evaluation)
    if values is None:
        values = measure(evaluation)
        if file is not None:
            file.append(evaluation, values)
    return values


def _where(evaluation: Evaluation) -> str:
    return f"evaluation {evaluation.index}, {evaluation.source}, {evaluation.subnet!r}"


def _say(bar: tqdm, text: str) -> None:
    """Above the progress bar, or to the log if there is none."""
    if bar.disable:
        logger.info(text)
    else:
        bar.write(text, file=sys.stderr)


def _profile(references: Sequence[Evaluation], metric: str) -> str:
    """A line for each of the max, min and heuristic subnets."""
    return "\n".join(
        f"{e.source:<10}{metric} {e.metrics[metric]:.4g}, {e.metrics['macs']:,d} MACs per token, "
        f"{e.metrics['parameters']:,d} parameters"
        for e in references
    )


def _show(bar: tqdm, history: Sequence[Evaluation], directions: Mapping[str, str]) -> None:
    if bar.disable:
        return
    metric, direction = next(iter(directions.items()))
    best = (max if direction == "max" else min)(e.metrics[metric] for e in history)
    bar.set_postfix(
        {f"best {metric}": f"{best:.4g}", "pareto": len(non_dominated(history, directions))}, refresh=False
    )
    bar.update()
