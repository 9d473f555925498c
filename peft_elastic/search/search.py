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
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import closing
from typing import Any

import numpy as np
import torch

from ..common.progress import progress_bar
from ..cost.latency import LatencyModel
from ..supernet.context import subnet_restored
from ..supernet.host import ElasticHost, get_elastic_host
from ..supernet.space import SearchSpace, Subnet
from .algorithms import ALGORITHMS, SearchAlgorithm
from .constraints import Constraints, resolve_bounds
from .history import HistoryFile
from .hypervolume import HypervolumeTracker
from .meter import HELD_OUT, METRICS, Meter, Values
from .objectives import Evaluate, ObjectiveLike
from .parallel import Crew, Parallel, Workers, on_ranks
from .proposals import reference_subnets
from .result import Evaluation, SearchResult, minimised
from .settings import LATENCY_FILE, ReferencePoints, SearchSettings
from .shown import profile, say, show


# Subnets that are looked through at most to see whether an exhaustive search is within `n_evals`.
_MAX_LISTED = 10**5


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
    executor: Executor | Callable[[], Executor] | int | str | None = None,
    worker_model: Callable[[], Any] | str | os.PathLike[str] | None = None,
    devices: Sequence[str] | None = None,
    worker_threads: int | None = None,
    sequence_length: int | None = None,
    prepare: Callable[[torch.nn.Module], Any] | None = None,
) -> SearchResult:
    """Search the subnets of an elastic model for the best trade-offs.

    First the costs of the max, min and heuristic subnet are shown. These three are evaluated first, then those that the
    algorithm proposes; none twice. The model is left as it was found: the chosen and the sampled subnet, and the training
    mode of every module, also if an exception ends the search.

    Args:
        model (`nn.Module`):
            An `ElasticModel`, or a model with an elastic adapter; anything `get_elastic_host` accepts.
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
        executor (`Executor`, `Callable`, `int` or `"ranks"`, *optional*):
            Who evaluates, if not this process alone. A `concurrent.futures.Executor` whose workers are processes, anywhere
            (`ProcessPoolExecutor`, loky, MPI, Dask's `client.get_executor()`, `peft_elastic.search.RayExecutor`); a function
            without arguments that makes one, which is called again if a worker's death has broken it, and what it made is shut
            down at the end; or a number of processes of this machine. The same seed gives the same result as without, if
            torch computes with as many threads. With `"ranks"` all processes of a run under torchrun or `accelerate launch`
            call this function, each with its copy of the model; each evaluates a share, rank 0 alone writes, and all
            return the same result.
        worker_model (`Callable` or `str`, needed with an executor):
            A function without arguments that makes a copy of `model` in a worker, or the folder (or hub name) of a saved
            adapter or `ElasticModel`. It is called once in each worker, and the copy compared with `model`: space and every weight.
        devices (`Sequence[str]`, *optional*):
            The worker with number i of a machine moves its model to `devices[i % len(devices)]`; a CUDA device is the current
            one already when `worker_model` is called. By default the model stays where `worker_model` puts it.
        worker_threads (`int`, defaults to 1 with an executor):
            Threads of torch in each worker, on the CPU. The last bits of a value may depend on it.
        sequence_length (`int`, *optional*):
            Tokens of the sequences whose attention products `"macs"` counts, as published figures do; by default it counts
            none of them (see `CostModel`).
        prepare (`Callable`, *optional*):
            Called as `prepare(model)` when a subnet has been activated, before each call of `evaluate`, `held_out` and functions among the
            objectives: `BatchNormRecalibration` averages the statistics of BatchNorm for the subnet. Its attribute `fingerprint`, or
            its name, is part of what a continued search must have in common with the one in `save_dir`.

    Returns:
        `SearchResult`: all evaluations, with `pareto`, `best(...)`, `plot(...)`.

    Raises:
        ValueError: if an argument is not allowed; if no subnet keeps a constraint; if `save_dir` belongs to another search; if
            `evaluate`, `held_out` or an objective does not return numbers under the expected names, or changes the active
            subnet. What was evaluated before stays in `save_dir`. NaN and infinity are numbers: such an evaluation is recorded,
            counts towards `n_evals`, and is never chosen (`SearchResult.failed`). If a function cannot be sent to the workers,
            `worker_model` fails there or makes another model.
        ChildProcessError: if an evaluation ends its worker again and again. One that dies is replaced, where the executor can, and its
            evaluation done again. An exception of `evaluate` in a worker is raised here, with the worker's traceback.
    """
    load = getattr(model, "loader", None) if isinstance(model, ElasticHost) else None
    parallel = Parallel.checked(executor, worker_model, devices, worker_threads, load)
    arguments: dict[str, Any] = {
        "evaluate": evaluate,
        "held_out": held_out,
        "objectives": objectives,
        "mode": mode,
        "algorithm": algorithm,
        "n_evals": n_evals,
        "population": population,
        "seed": seed,
        "save_dir": save_dir,
        "latency": latency,
        "sequence_length": sequence_length,
        "prepare": prepare,
        "constraints": constraints,
        "keywords": {
            "max_bytes": max_bytes,
            "max_latency": max_latency,
            "max_macs": max_macs,
            "max_parameters": max_parameters,
            "max_params": max_params,
        },
        "reference_points": reference_points,
    }

    def checked() -> tuple[SearchSettings, Meter]:
        host = get_elastic_host(model)
        settings = SearchSettings.checked(host.search_space, **arguments)
        functions = settings.evaluate, settings.held_out, settings.targets
        costs = settings.latency, settings.bounds, settings.sequence_length
        return settings, Meter(model, host, *functions, settings.seed, *costs, settings.prepare)

    if isinstance(executor, str):  # "ranks"
        return on_ranks(checked, lambda settings, meter, crew: _search(settings, meter, crew, progress))
    settings, meter = checked()
    if parallel is None:
        return _search(settings, meter, meter, progress)
    with Workers(meter, parallel) as workers:
        return _search(settings, meter, workers, progress)


def _search(settings: SearchSettings, meter: Meter, crew: Crew, progress: bool) -> SearchResult:
    host = meter.host
    space, directions = host.search_space, settings.directions
    bounds = Constraints(resolve_bounds(settings.bounds, space, meter.costs), meter.costs)
    if settings.algorithm == "exhaustive":
        _check_exhaustive(space, settings.n_evals, bounds)
    file, held_out_file = _journals(space, settings, meter)
    constraints = {"constraints": bounds.bounds} if settings.bounds else {}

    limit = min(settings.n_evals, space.size)
    named = reference_subnets(space)
    result = SearchResult(space, directions, [], settings.recorded | constraints)
    history = result.history
    algorithm = ALGORITHMS[settings.algorithm](
        space, len(settings.targets), settings.population, settings.seed, bounds, settings.minimised_points
    )
    tracker = None
    with subnet_restored(host), progress_bar(total=limit, desc="search", disable=not progress) as bar:
        say(bar, profile(space, {name: meter.costs(subnet) for subnet, name in named.items()}, bounds.bounds))
        if file is not None and file.n_rows:
            say(bar, f"{min(file.n_rows, limit)} of {limit} evaluations found in {os.fspath(file.path)!r}")
        while len(history) < limit:
            batch = [
                Evaluation(len(history) + number, named.get(subnet, "search"), subnet, metrics={})
                for number, subnet in enumerate(_proposals(algorithm, crew.at_once, limit - len(history)))
            ]
            if not batch:
                say(bar, f"Only {len(history)} subnets keep the constraints; all are evaluated.")
                break
            with closing(_recall_or_measure(file, METRICS, batch, crew)) as values:
                for evaluation, metrics in zip(batch, values):
                    history.append(dataclasses.replace(evaluation, metrics=metrics))
                    if result.has_failed(history[-1]):
                        shown = {name: metrics[name] for name in directions}
                        say(
                            bar,
                            f"evaluation {evaluation.index} ({evaluation.source}) has failed with {shown}; it will not be chosen",
                        )
                    if len(history) == min(len(named), limit):
                        name = result.metric
                        say(bar, f"{name}: " + ", ".join(f"{e.source} {e.metrics[name]:.4g}" for e in history))
                        tracker = _begin_tracking(result)
                    elif tracker is not None and result.is_eligible(history[-1]):
                        tracker.add(result.minimised(history[-1]))
                    show(bar, result, tracker)
            if len(history) < limit:
                algorithm.tell(_told(result, history[-len(batch) :]))

        if settings.held_out is not None:
            reported = {e.index for e in result.pareto}
            reported |= {e.index for e in history if e.source in ("max", "heuristic")}
            rest = [history[index] for index in sorted(reported)]
            with closing(_recall_or_measure(held_out_file, HELD_OUT, rest, crew)) as values:
                for evaluation in progress_bar(rest, desc="held-out", disable=not progress):
                    history[evaluation.index] = dataclasses.replace(evaluation, held_out=next(values))
    if settings.folder is not None:
        result.save(settings.folder)
    return result


def _journals(
    space: SearchSpace, settings: SearchSettings, meter: Meter
) -> tuple[HistoryFile | None, HistoryFile | None]:
    """The files of the evaluations and of the held-out ones, where there is a folder; what latency there is goes there too."""
    folder, latency = settings.folder, settings.latency
    if folder is None:
        return None, None
    header = settings.header(space, meter.costs(space.max))
    file = HistoryFile(folder / "history.jsonl", header, [*settings.directions, *meter.recorded])
    held_out = None if settings.held_out is None else HistoryFile(folder / "held_out.jsonl", header)
    if latency is not None:
        latency.save(folder / LATENCY_FILE)
    return file, held_out


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


def _proposals(algorithm: SearchAlgorithm, at_once: int, most: int) -> list[Subnet]:
    """The next subnets to evaluate together, at most `most`; none if there are no more. How many it are changes nothing: more than an
    algorithm proposes by itself are only taken of those that learn nothing."""
    subnets = algorithm.ask()
    while not algorithm.learns and len(subnets) < min(at_once, most):
        more = algorithm.ask()
        if not more:
            break
        subnets = [*subnets, *more]
    return subnets[:most]


def _recall_or_measure(
    file: HistoryFile | None, what: str, evaluations: Sequence[Evaluation], crew: Crew
) -> Generator[Values, None, None]:
    """The values of these evaluations, in their order. What is measured is on file as soon as it is known, in whatever order."""
    known: dict[int, Values] = {}
    for evaluation in evaluations:
        recalled = None if file is None else file.recall(evaluation)
        if recalled is not None:
            known[evaluation.index] = recalled
    missing = [evaluation for evaluation in evaluations if evaluation.index not in known]
    with closing(crew.measure(what, missing)) as measured:
        for evaluation in evaluations:
            while evaluation.index not in known:
                done, values = next(measured)
                if file is not None:
                    file.record(done, values)
                known[done.index] = values
            yield known[evaluation.index]


def _told(result: SearchResult, evaluations: Sequence[Evaluation]) -> list[list[float]]:
    """The objectives, turned so that smaller is better; those of a failed evaluation worse than any that was seen."""
    finite = np.array([result.minimised(e) for e in result.history if not result.has_failed(e)], dtype=float)
    if not len(finite):
        finite = np.zeros((1, len(result.objectives)))
    span = finite.max(axis=0) - finite.min(axis=0)
    worse = finite.max(axis=0) + 1e-3 * np.where(span > 0, span, 1.0)
    return [worse.tolist() if result.has_failed(e) else result.minimised(e) for e in evaluations]


def _begin_tracking(result: SearchResult) -> HypervolumeTracker:
    """The hypervolume of the reference subnets, which also give its scale."""
    tracker = HypervolumeTracker(*(minimised(point, result.objectives) for point in result.hypervolume_box))
    for evaluation in result.history:
        if result.is_eligible(evaluation):
            tracker.add(result.minimised(evaluation))
    return tracker
