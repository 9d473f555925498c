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
"""What a run of structured pruning does with a model, once `plan_run` has decided what there is to do."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from ...common.progress import progress_bar
from ...cost.timing import clock
from ...structure.calibration import calibration_mode
from .config import StructuredPruningConfig
from .greedy import GreedyPruning
from .importance import order_name, sort_units
from .plan import PruningPlan, describe_model, keep_whole, kept_units
from .recall import Recalled, open_journal
from .setup import Setup
from .units import State


_REFRESH = 0.2  # seconds


def execute(setup: Setup, save_dir: str | os.PathLike[str] | None = None, progress: bool = True) -> PruningPlan:
    """
    Finds out what to remove. The model is afterwards what it was before.

    Args:
        setup: what is to be done.
        save_dir: a folder that every evaluation is written to, and read from.
        progress: whether to show a progress bar.

    Raises:
        ValueError: `save_dir` holds the evaluations of another model or other data; or the model computes no finite loss on the
            calibration data.
    """
    put_back = keep_whole(setup.model)
    with calibration_mode(setup.model):
        try:
            return _execute(setup, None if save_dir is None else Path(save_dir), progress)
        finally:
            put_back()


def _execute(setup: Setup, folder: Path | None, progress: bool) -> PruningPlan:
    evaluation, config = setup.evaluation, setup.config
    metrics = evaluation.metrics(setup.model, setup.structure, config.cache_gb * 1e9)
    journal = None
    if folder is not None:
        journal = open_journal(folder, setup.model, evaluation.batches, f"{evaluation.name}, {evaluation.mode}")
    device = next(setup.model.parameters()).device
    now = clock(device)
    start = now()
    scores = sort_units(setup, folder, progress)
    sorting = now() - start
    order = order_name(setup)
    recalled = {name: Recalled(metric, name, order, journal, device) for name, metric in metrics.items()}
    with _Progress(setup, progress) as bar:
        greedy = GreedyPruning(setup.units, setup.costs, recalled, config.slack, scores, config.seed, bar.show)
        judge = evaluation.data_of("sub-blocks")
        whole = math.nan if judge is None else greedy.measure(judge, {}).value
        try:
            for stage in setup.stages:
                greedy.run(stage)
            final = math.nan if judge is None else greedy.measure(judge, greedy.state).value
        except BaseException as error:
            hand_out(error, _plan_of(setup, greedy, whole, math.nan, sorting))
            raise
    return _plan_of(setup, greedy, whole, final, sorting)


def _plan_of(setup: Setup, greedy: GreedyPruning, whole: float, final: float, sorting: float) -> PruningPlan:
    """What has been removed so far; the metric of the whole model and of what is left, and the seconds that sorting took."""
    shown = setup.evaluation.shown
    return PruningPlan(
        method=setup.config.method,
        config=_as_json(setup.config),
        model=describe_model(setup.model, setup.structure),
        values=dict(sorted(greedy.state.items())),
        units=kept_units(setup.model, setup.structure, greedy.state),
        before=_summary(setup, {}, whole),
        after=_summary(setup, greedy.state, final),
        metric=setup.evaluation.name,
        history=[{**row, "value": shown(row["value"])} for row in greedy.history],
        evaluations=greedy.evaluations,
        block_passes=greedy.block_passes,
        seconds=greedy.seconds + sorting,
    )


def _summary(setup: Setup, state: State, value: float) -> dict[str, float]:
    costs = setup.costs
    summary: dict[str, float] = {"parameters": costs.parameters(state), "macs": costs.macs(state)}
    summary[setup.config.measure] = costs(state)
    shown = setup.evaluation.shown(value)
    return summary if shown is None else {**summary, setup.evaluation.name: shown}


def hand_out(error: BaseException, plan: PruningPlan) -> None:
    """Let an error carry a plan that would be lost."""
    error.plan = plan  # type: ignore[attr-defined]
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(f"What had been decided is the attribute `plan` of this error ({len(plan.history)} removals).")


class _Progress:
    """A bar from the whole model to the target."""

    def __init__(self, setup: Setup, progress: bool) -> None:
        self._whole, self._target, self._evaluation = setup.costs({}), setup.target, setup.evaluation
        self._bar = progress_bar(
            total=100.0,
            desc="pruning",
            disable=not progress,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| [{elapsed}{postfix}]",
        )
        self._next = 0.0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def show(self, greedy: GreedyPruning) -> None:
        removed = (self._whole - greedy.cost) / (self._whole - self._target) if self._whole > self._target else 1.0
        self._bar.n = min(100.0, 100 * removed)
        last = next((row for row in reversed(greedy.history) if row["value"] is not None), None)
        values = {"evaluations": f"{greedy.evaluations:,}"}
        if greedy.history:
            values["parameters"] = f"{greedy.history[-1]['parameters'] / 1e6:,.1f}M"
        if last is not None:
            values[self._evaluation.name] = f"{self._evaluation.shown(last['value']):.4g}"
        self._bar.set_postfix(values, refresh=False)
        if time.monotonic() > self._next:
            self._next = time.monotonic() + _REFRESH
            self._bar.refresh()


def _as_json(config: StructuredPruningConfig) -> dict[str, Any]:
    values = {**vars(config), "latency_inputs": {k: list(v) for k, v in config.latency_inputs.items()}}
    if not isinstance(config.order, str):
        values["order"] = "scores"
    return json.loads(json.dumps(values))
