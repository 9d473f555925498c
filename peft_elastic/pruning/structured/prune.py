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

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...common.documents import FINITE, ListOf, Record, read_json
from ...common.progress import progress_bar
from ...common.writing import atomic_write_text
from ...cost.timing import clock
from ...structure.blocks import Structure, Width, layer_at
from ...structure.calibration import calibration_batches, calibration_mode
from ...structure.description import undescribable
from ...structure.importance import apply_orders, check_sortable, measure_importance
from ...structure.narrow import check_narrowable
from ...structure.space import PARTS
from ...supernet.host import HOST_ATTRIBUTE
from .config import StructuredPruningConfig
from .cost import Costs
from .greedy import GreedyPruning, Stage, smallest_state
from .importance import l1_scores
from .metric import CalibrationLoss, Metric, UserMetric, is_language_model
from .plan import PruningPlan, check_whole, describe_model, keep_whole, kept_units
from .recall import Recalled, open_journal
from .units import GRANULARITIES, State, Units


_REFRESH = 0.2  # seconds


def prune_structured(
    model: nn.Module,
    config: StructuredPruningConfig,
    calibration: Any = None,
    *,
    metric: Callable[[nn.Module], float] | None = None,
    mode: str = "min",
    save_dir: str | os.PathLike[str] | None = None,
    extract: bool = True,
    progress: bool = True,
) -> PruningPlan:
    """
    Removes whole blocks, attentions, MLPs, MLP channels and attention heads of a model, without training.

    The same arguments give the same plan. The model is put back if the call fails or is interrupted; the error then has the
    attribute `plan` with what had been decided, which `plan.save(path)` keeps.

    Args:
        model: a transformers model whose blocks have a known layout (see `peft_elastic.structure.register_layout`), without
            adapters, in any floating-point type.
        config: `MultiPrunerConfig`, or that of another method: `BlockPrunerConfig`, `WidthPrunerConfig`, `TwoStagePrunerConfig`.
        calibration: an iterable of batches, as in `prune`. Of a language model every token but the first of a sequence is
            predicted, or `labels` if there are any; any other model needs `labels`. Use text like that the model will see.
        metric (`Callable`, *optional*): `metric(model) -> float`, in place of the perplexity (of models that are no language
            models: the loss) of the calibration data. It is called with the model in evaluation mode.
        mode (`str`): "min" or "max", whether a small or a large `metric` is good.
        save_dir (*optional*): a folder that every evaluation is written to. A second call finds there what an interrupted one
            has evaluated; so does one with another ratio, split or method on the same model and data.
        extract (`bool`): whether to make the model smaller, in place. Otherwise it is left as it was, and the plan can be carried
            out later: `plan.extract(model)`.
        progress (`bool`): show a progress bar with the perplexity and the number of parameters.

    Returns:
        the plan: what was removed, step by step. Save it with `plan.save(path)`.

    Raises:
        ValueError: before anything is changed: an argument that is not allowed, a model whose blocks are not known, with
            adapters or packed weights, or which no configuration describes without what a stage removes, a ratio that cannot be reached, or calibration data that is missing, empty or without
            anything to predict; or `save_dir` holds the evaluations of another model or other data.

    Example:
        >>> plan = prune_structured(model, MultiPrunerConfig(ratio=0.1), calibration=loader)
        >>> print(plan)
        >>> model.save_pretrained("pruned")
    """
    run = _Run(model, config, calibration, metric, mode, save_dir, progress)
    plan = run.make_plan()
    if extract:
        try:
            plan.extract(model)
        except BaseException as error:
            hand_out(error, plan)
            raise
    return plan


def hand_out(error: BaseException, plan: PruningPlan) -> None:
    """Let an error carry a plan that would be lost."""
    error.plan = plan  # type: ignore[attr-defined]
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(f"What had been decided is the attribute `plan` of this error ({len(plan.history)} removals).")


class _Run:
    """One call of `prune_structured`: its arguments, checked, and what is made of them."""

    def __init__(
        self,
        model: nn.Module,
        config: StructuredPruningConfig,
        calibration: Any,
        metric: Callable[[nn.Module], float] | None,
        mode: str,
        save_dir: str | os.PathLike[str] | None,
        progress: bool,
    ) -> None:
        if not isinstance(config, StructuredPruningConfig):
            raise ValueError(f"config: got {config!r}; it must be a `MultiPrunerConfig` or another structured config.")
        if metric is not None and not callable(metric):
            raise ValueError(f"metric: got {metric!r}; it must be a function of the model, or None.")
        if mode not in ("min", "max"):
            raise ValueError(f"mode: got {mode!r}; it must be 'min' or 'max'.")
        if mode == "max" and metric is None:
            raise ValueError("mode: got 'max' without a `metric`; the loss is to be small.")
        if hasattr(model, HOST_ATTRIBUTE):
            raise ValueError("model: it has an elastic adapter; merge it (`merge_and_unload`) before.")
        check_whole(model)
        self.model, self.config, self.user_metric, self.mode = model, config, metric, mode
        self.save_dir = None if save_dir is None else Path(save_dir)
        self.progress = progress
        self.structure = Structure(model)
        self.shares = _shares(config)
        if not self.structure.blocks:
            raise ValueError(
                f"model: no block of this {type(model).__name__} has a known layout. Describe its architecture with "
                "`peft_elastic.structure.register_layout`."
            )
        self.units = Units(model, self.structure, config)
        self._check_units()
        self._leave_undescribable()
        self.batches: list[dict[str, Any]] | None = None
        if calibration is not None:
            samples = (config.block_samples, config.width_samples)
            most = None if None in samples else max(count for count in samples if count is not None)
            self.batches = calibration_batches(calibration, most)
        elif self._needs_order_data() or (metric is None and "metric" in config.choose and self.shares):
            raise ValueError("calibration: got None; this method needs an iterable of batches, e.g. a DataLoader.")

    def _needs_order_data(self) -> bool:
        return bool(self._sorted_kinds()) and self.config.order in ("activation", "gradient")

    def _sorted_kinds(self) -> tuple[str, ...]:
        if self.config.order == "none":
            return ()
        kinds = {"channels": "mlp", "heads": "heads"}
        return tuple(kinds[name] for name in self.shares if name in kinds)

    def _check_units(self) -> None:
        """ValueError if a stage has nothing to remove in this model, or what it removes cannot be."""
        removable = {name: next(self.units.moves(name, {}), None) for name in self.shares}
        if self.shares and not any(removable.values()):
            kinds = {"channels": "mlp", "heads": "heads"}
            parts = {"blocks": ("block",), "attentions": ("attention",), "mlps": ("mlp",), "sub-blocks": PARTS}
            reasons = [
                reason
                for name in self.shares
                for block in self.structure.blocks
                for reason in (block.problems.get(kinds.get(name, "")), *map(block.fixed.get, parts.get(name, ())))
            ]
            why = next((reason for reason in reasons if reason is not None), None)
            raise ValueError(
                f"stages: nothing of {list(self.shares)} can be removed from this model"
                + (f": {why}." if why else "; are its groups smaller than `mlp_group` and `head_group`?")
            )
        for key, width in self.units.widths.items():
            if ("channels" if width.kind == "mlp" else "heads") in self.shares and len(
                self.units.space[key].options
            ) > 1:
                for slot in width.slots:
                    check_narrowable(layer_at(self.model, slot.path), slot.path)
                if self._sorted_kinds():
                    check_sortable(self.model, [width])
        if isinstance(self.config.order, Mapping):
            choose = dict(zip(self.config.stages, self.config.choose))
            kinds = {"channels": "mlp", "heads": "heads"}
            chosen = {kinds.get(name) for name in self.shares if choose[name] == "score"}
            names = [order.name for w in self.structure.widths if w.kind in chosen for order in w.orders]
            if missing := [name for name in names if name not in self.config.order]:
                raise ValueError(f"order: it has no scores for {missing[0]!r}, which the choice 'score' needs.")

    def _leave_undescribable(self) -> None:
        """Take out of the units what could be removed and saved, but not loaded. ValueError if a stage has nothing else."""
        reasons = undescribable(self.model, smallest_state(self.units, tuple(self.shares)))
        for name in self.shares if reasons else ():
            reasons |= undescribable(self.model, smallest_state(self.units, (name,)))
        if not reasons:
            return
        key, why = next(iter(reasons.items()))
        before, self.units = self.units, Units(self.model, self.structure, self.config, frozenset(reasons))
        for name in self.shares:
            if next(before.moves(name, {}), None) and not next(self.units.moves(name, {}), None):
                raise ValueError(f"stages: {name!r} of this model could be removed and saved, but not loaded. {why}")
        warnings.warn(
            f"{len(reasons)} units such as {key!r} stay as they are: without them, the model could not be loaded. {why}"
        )

    # -- the plan -----------------------------------------------------------------------------------------------------

    def make_plan(self) -> PruningPlan:
        """The plan; the model is afterwards what it was before."""
        costs = Costs(self.model, self.units, self.config)
        target = costs({}) * (1 - self.config.ratio)
        self._check_reachable(costs, target)
        put_back = keep_whole(self.model)
        with calibration_mode(self.model):
            try:
                return self._make_plan(costs, target)
            finally:
                put_back()

    def _check_reachable(self, costs: Costs, target: float) -> None:
        least = costs(smallest_state(self.units, tuple(self.shares)))
        if least > target and self.config.ratio > 0:
            raise ValueError(
                f"ratio: got {self.config.ratio}, but {list(self.shares)} are only {1 - least / costs({}):.1%} of the "
                f"{self.config.measure} of this model, as far as they can be removed."
            )

    def _make_plan(self, costs: Costs, target: float) -> PruningPlan:
        metrics = self._metrics()
        journal = None
        if self.save_dir is not None:
            metric = f"{self._metric_name}, {self.mode}"
            journal = open_journal(self.save_dir, self.model, self.batches, metric)
        now = clock()
        start = now()
        scores = self._sort()
        sorting = now() - start
        order = self._order_name()
        recalled = {name: Recalled(metric, name, order, journal) for name, metric in metrics.items()}
        with _Progress(costs, target, self._metric_name, self._shown, self.progress) as bar:
            greedy = GreedyPruning(self.units, costs, self.config.slack, scores, self.config.seed, bar.show)
            whole = greedy.measure(recalled[self._sequences("sub-blocks")], {}).value if recalled else math.nan
            try:
                for stage in self._stages(costs({}), target, recalled):
                    greedy.run(stage)
                last = greedy.state
                final = greedy.measure(recalled[self._sequences("sub-blocks")], last).value if recalled else math.nan
            except BaseException as error:
                hand_out(error, self._plan_of(greedy, costs, whole, math.nan, sorting))
                raise
        return self._plan_of(greedy, costs, whole, final, sorting)

    def _plan_of(self, greedy: GreedyPruning, costs: Costs, whole: float, final: float, sorting: float) -> PruningPlan:
        """What has been removed so far; the metric of the whole model and of what is left, and the seconds that sorting took."""
        return PruningPlan(
            method=self.config.method,
            config=_as_json(self.config),
            model=describe_model(self.model, self.structure),
            values=dict(sorted(greedy.state.items())),
            units=kept_units(self.model, self.structure, greedy.state),
            before=self._summary(costs, {}, whole),
            after=self._summary(costs, greedy.state, final),
            metric=self._metric_name,
            history=[{**row, "value": self._shown(row["value"])} for row in greedy.history],
            evaluations=greedy.evaluations,
            block_passes=greedy.block_passes,
            seconds=greedy.seconds + sorting,
        )

    def _stages(self, whole: float, target: float, metrics: Mapping[str, Metric]) -> list[Stage]:
        def metric(name: str) -> Metric | None:
            return metrics[self._sequences(name)] if metrics else None  # nothing is evaluated without data

        names = tuple(self.shares)
        if not names:
            return []
        if self.config.split == "auto":
            return [Stage(names, target, "metric", metric(names[-1]), per_cost=True)]
        choose = dict(zip(self.config.stages, self.config.choose))
        stages, share = [], 0.0
        for name in names:
            share += self.shares[name]
            aim = target if name == names[-1] else whole - share * (whole - target)
            stages.append(Stage((name,), aim, choose[name], metric(name)))
        # what one stage could not give, the others do
        rest = [Stage((name,), target, choose[name], metric(name)) for name in reversed(names)]
        return stages + rest

    # -- what it stands on ----------------------------------------------------------------------------------------------

    def _sequences(self, stage: str) -> str:
        """Name of the metric that a stage is evaluated by: the number of sequences, or that it is the user's."""
        if self.user_metric is not None:
            return self._metric_name
        narrows = GRANULARITIES[stage].narrows and self.config.split != "auto"
        limit = self.config.width_samples if narrows else self.config.block_samples
        return f"{len(self._samples(limit))} sequences"

    def _samples(self, limit: int | None) -> list[int]:
        """The batch that each sequence is in, of as many sequences as are used."""
        assert self.batches is not None
        places = [number for number, batch in enumerate(self.batches) for _ in range(_sequences_in(batch))]
        return places[:limit]

    @property
    def _metric_name(self) -> str:
        if self.user_metric is not None:
            named = getattr(self.user_metric, "name", None) or getattr(self.user_metric, "__name__", None)
            return str(named or "metric")
        return "perplexity" if is_language_model(self.model) else "loss"

    def _shown(self, value: float | None) -> float | None:
        """What is said of a value that is minimised."""
        if value is None or math.isnan(value):
            return None
        if self._metric_name == "perplexity" and self.user_metric is None:
            return math.exp(value) if value < 700 else math.inf
        return -value if self.mode == "max" else value

    def _metrics(self) -> dict[str, Metric]:
        if self.user_metric is not None:
            return {self._metric_name: UserMetric(self.model, self.structure, self.user_metric, self.mode)}
        metrics: dict[str, Metric] = {}
        for name, limit in (("sub-blocks", self.config.block_samples), ("channels", self.config.width_samples)):
            if self.batches is not None and self._sequences(name) not in metrics:
                batches = calibration_batches(self.batches, limit)
                bytes_ = self.config.cache_gb * 1e9
                metrics[self._sequences(name)] = CalibrationLoss(self.model, self.structure, batches, bytes_)
        return metrics

    def _summary(self, costs: Costs, state: State, value: float) -> dict[str, float]:
        summary: dict[str, float] = {"parameters": costs.parameters(state), "macs": costs.macs(state)}
        summary[self.config.measure] = costs(state)
        shown = self._shown(value)
        return summary if shown is None else {**summary, self._metric_name: shown}

    def _order_name(self) -> str:
        order = self.config.order
        if not isinstance(order, str):
            text = json.dumps({name: torch.as_tensor(score).tolist() for name, score in sorted(order.items())})
            return f"scores-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        return f"{order}-{len(self._samples(self.config.width_samples))}" if self._needs_order_data() else order

    def _sort(self) -> dict[str, torch.Tensor]:
        """Sort channels and heads; returns their scores, in the new order."""
        kinds = self._sorted_kinds()
        if not kinds:
            return {}
        path = None if self.save_dir is None else self.save_dir / f"order-{self._order_name()}-{'-'.join(kinds)}.json"
        if path is not None and path.exists():
            scores = _read_scores(path, [width for width in self.structure.widths if width.kind in kinds])
        else:
            scores = self._measure_scores(kinds)
            if path is not None:
                atomic_write_text(path, json.dumps({name: score.tolist() for name, score in scores.items()}))
        orders = {name: torch.argsort(score, descending=True, stable=True) for name, score in scores.items()}
        apply_orders(self.model, [width for width in self.structure.widths if width.kind in kinds], orders)
        return {name: score[orders[name]] for name, score in scores.items()}

    def _measure_scores(self, kinds: tuple[str, ...]) -> dict[str, torch.Tensor]:
        widths = [width for width in self.structure.widths if width.kind in kinds]
        if self.config.order == "l1":
            return l1_scores(self.model, widths)
        return measure_importance(
            self.model,
            widths,
            self.config.order,
            self.batches,
            max_samples=self.config.width_samples,
            progress=self.progress,
        )


class _Progress:
    """A bar from the whole model to the target."""

    def __init__(
        self, costs: Costs, target: float, metric: str, shown: Callable[[float | None], float | None], progress: bool
    ) -> None:
        self._whole, self._target, self._metric, self._shown = costs({}), target, metric, shown
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
            values[self._metric] = f"{self._shown(last['value']):.4g}"
        self._bar.set_postfix(values, refresh=False)
        if time.monotonic() > self._next:
            self._next = time.monotonic() + _REFRESH
            self._bar.refresh()


def _shares(config: StructuredPruningConfig) -> dict[str, float]:
    """Of the stages that have something to do, in their order; the sum is 1."""
    if config.ratio == 0:
        return {}
    if isinstance(config.split, str):
        return dict.fromkeys(config.stages, 1 / len(config.stages))
    total = sum(config.split)
    return {name: share / total for name, share in zip(config.stages, config.split) if share > 0}


def _sequences_in(batch: Mapping[str, Any]) -> int:
    return next(value for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()).shape[0]


def _read_scores(path: Path, widths: Iterable[Width]) -> dict[str, torch.Tensor]:
    """The scores in a file, of as many units as there are.

    Raises:
        ValueError: naming the file and what is wrong in it.
    """
    wanted = {order.name: width.units for width in widths for order in width.orders}
    try:
        data = Record(**dict.fromkeys(wanted, ListOf(FINITE))).check(read_json(path), "it")
        for name, units in wanted.items():
            if len(data[name]) != units:
                raise ValueError(f"{name!r} must have {units} scores, got {len(data[name])}")
    except ValueError as error:
        raise ValueError(
            f"`save_dir`: {os.fspath(path)!r} is damaged: {error}. Delete it to have the importance measured again."
        ) from None
    return {name: torch.tensor(values) for name, values in data.items()}


def _as_json(config: StructuredPruningConfig) -> dict[str, Any]:
    values = {**vars(config), "latency_inputs": {k: list(v) for k, v in config.latency_inputs.items()}}
    if not isinstance(config.order, str):
        values["order"] = "scores"
    return json.loads(json.dumps(values))
