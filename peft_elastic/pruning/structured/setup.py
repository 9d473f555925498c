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
"""What a run of structured pruning is going to do: everything that can be refused or decided before the model is evaluated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...common.checks import check_choice, wrong
from ...structure.blocks import Structure
from ...structure.calibration import calibration_batches
from ...structure.description import undescribable
from ...structure.features import layer_at
from ...structure.importance import check_sortable
from ...structure.parts import Width
from ...structure.space import PARTS
from ...supernet.host import HOST_ATTRIBUTE
from .config import StructuredPruningConfig
from .cost import Costs, measure_latency
from .evaluation import Evaluation
from .greedy import Stage, smallest_state
from .plan import check_here_to_narrow, check_whole
from .units import Units


# The kind of width that a stage narrows.
_KINDS = {"channels": "mlp", "heads": "heads"}


@dataclass(frozen=True, eq=False)
class Setup:
    """A run of structured pruning, checked and decided, on which `execute` acts.

    Args:
        model: whole.
        config: what the user asked for.
        structure: of `model`.
        units: what can be removed.
        shares: of the ratio that each stage removes, by its name and in this order: of those that have something to do; the sum
            is 1.
        costs: of the states of the model.
        target: the cost of what is to be left.
        stages: what is done, one after the other.
        evaluation: by what candidates are judged.
    """

    model: nn.Module
    config: StructuredPruningConfig
    structure: Structure
    units: Units
    shares: Mapping[str, float]
    costs: Costs
    target: float
    stages: tuple[Stage, ...]
    evaluation: Evaluation

    @property
    def sorted_kinds(self) -> tuple[str, ...]:
        """The kinds of width whose units are sorted before anything is removed."""
        return sorted_kinds(self.config, self.shares)

    @property
    def sorted_widths(self) -> list[Width]:
        """The widths of these kinds."""
        return [width for width in self.structure.widths if width.kind in self.sorted_kinds]

    @property
    def needs_order_data(self) -> bool:
        """Whether the order of the units is measured on the calibration data."""
        return needs_order_data(self.config, self.shares)


def plan_run(
    model: nn.Module,
    config: StructuredPruningConfig,
    calibration: Any = None,
    metric: Callable[[nn.Module], float] | None = None,
    mode: str = "min",
) -> Setup:
    """
    Checks the arguments of `prune_structured`, and decides what there is to do. Nothing of the model is changed, and it is not
    run, but for the measure "latency", which times it.

    Raises:
        ValueError: as `prune_structured`, before anything is changed.
    """
    _check_arguments(config, metric, mode)
    if hasattr(model, HOST_ATTRIBUTE):
        raise ValueError(
            "model: it has an elastic adapter, or is elastic itself; merge it (`merge_and_unload`), or extract a subnet "
            "(`extract_subnet`), before."
        )
    check_whole(model)
    structure = Structure(model)
    if not structure.blocks:
        raise ValueError(
            f"model: no block of this {type(model).__name__} has a known layout. Describe its architecture with "
            "`peft_elastic.structure.register_layout`."
        )
    shares = stage_shares(config)
    units = Units(model, structure, step_sizes(config, structure))
    _check_units(model, units, config, shares)
    units = _describable(model, units, config, shares)
    batches = _read(calibration, config)
    if batches is None and (
        needs_order_data(config, shares) or (metric is None and "metric" in config.choose and shares)
    ):
        raise wrong("calibration", "an iterable of batches, e.g. a DataLoader, for this method", None)
    latency = measure_latency(model, units, config) if config.measure == "latency" else None
    costs = Costs(model, units, config.measure, latency)
    whole = costs({})
    target = whole * (1 - config.ratio)
    least = costs(smallest_state(units, tuple(shares)))
    if least > target and config.ratio > 0:
        raise ValueError(
            f"`ratio` must be at most the share that can be removed, got {config.ratio}: {list(shares)} are only "
            f"{1 - least / whole:.1%} of the {config.measure} of this model, as far as they can be removed."
        )
    evaluation = Evaluation(model, config, batches, metric, mode)
    stages = make_stages(config, shares, whole, target, evaluation.data_of)
    return Setup(model, config, structure, units, shares, costs, target, stages, evaluation)


def stage_shares(config: StructuredPruningConfig) -> dict[str, float]:
    """Of the stages that have something to do, in their order; the sum is 1."""
    if config.ratio == 0:
        return {}
    if isinstance(config.split, str):
        return dict.fromkeys(config.stages, 1 / len(config.stages))
    total = sum(config.split)
    return {name: share / total for name, share in zip(config.stages, config.split) if share > 0}


def step_sizes(config: StructuredPruningConfig, structure: Structure) -> dict[str, int]:
    """How many channels ("mlp") and key-value groups ("heads") a step removes, of the kinds that a stage narrows."""
    sizes = {}
    if "heads" in config.stages:
        sizes["heads"] = config.head_group
    widest = max((width.full for width in structure.widths if width.kind == "mlp"), default=0)
    if "channels" in config.stages and widest:
        sizes["mlp"] = _channels_of_step(config, widest)
    return sizes


def _channels_of_step(config: StructuredPruningConfig, widest: int) -> int:
    if isinstance(config.mlp_group, int):
        return config.mlp_group
    if config.mlp_group is None and dict(zip(config.stages, config.choose))["channels"] == "uniform":
        return 8 if widest % 8 == 0 else 1  # a step removes as much from every block, and costs nothing
    share = (1 / 14 if config.mlp_group is None else config.mlp_group) * widest
    multiple = next(multiple for multiple in (64, 8, 1) if share >= multiple / 2)
    return max(1, round(share / multiple)) * multiple


def make_stages(
    config: StructuredPruningConfig,
    shares: Mapping[str, float],
    whole: float,
    target: float,
    data_of: Callable[[str], str | None],
) -> tuple[Stage, ...]:
    """The stages of a run.

    Args:
        config: how they choose.
        shares: of the ratio, by stage.
        whole, target: the cost of the whole model, and of what is to be left.
        data_of: what a stage is judged on.
    """
    names = tuple(shares)
    if not names:
        return ()
    if config.split == "auto":
        return (Stage(names, target, "metric", data_of(names[-1]), per_cost=True),)
    choose = dict(zip(config.stages, config.choose))
    stages, share = [], 0.0
    for name in names:
        share += shares[name]
        aim = target if name == names[-1] else whole - share * (whole - target)
        stages.append(Stage((name,), aim, choose[name], data_of(name)))
    # what one stage could not give, the others do
    return (*stages, *(Stage((name,), target, choose[name], data_of(name)) for name in reversed(names)))


def sorted_kinds(config: StructuredPruningConfig, shares: Mapping[str, float]) -> tuple[str, ...]:
    """The kinds of width whose units are sorted before anything is removed."""
    return () if config.order == "none" else tuple(_KINDS[name] for name in shares if name in _KINDS)


def needs_order_data(config: StructuredPruningConfig, shares: Mapping[str, float]) -> bool:
    """Whether the order of the units is measured on the calibration data."""
    return bool(sorted_kinds(config, shares)) and config.order in ("activation", "gradient")


def _check_arguments(config: Any, metric: Any, mode: Any) -> None:
    if not isinstance(config, StructuredPruningConfig):
        raise wrong("config", "a `MultiPrunerConfig` or another structured config", config)
    if metric is not None and not callable(metric):
        raise wrong("metric", "a function of the model, or None", metric)
    check_choice("mode", mode, ("min", "max"))
    if mode == "max" and metric is None:
        raise wrong("mode", "'min' without a `metric`, as the loss is to be small", mode)


def _read(calibration: Any, config: StructuredPruningConfig) -> list[dict[str, Any]] | None:
    if calibration is None:
        return None
    samples = (config.block_samples, config.width_samples)
    most = None if None in samples else max(count for count in samples if count is not None)
    return calibration_batches(calibration, most)


def _check_units(model: nn.Module, units: Units, config: StructuredPruningConfig, shares: Mapping[str, float]) -> None:
    """ValueError if a stage has nothing to remove in this model, or what it removes cannot be."""
    removable = {name: next(units.moves(name, {}), None) for name in shares}
    if shares and not any(removable.values()):
        parts = {"blocks": ("block",), "attentions": ("attention",), "mlps": ("mlp",), "sub-blocks": PARTS}
        reasons = [
            reason
            for name in shares
            for block in units.structure.blocks
            for reason in (block.problems.get(_KINDS.get(name, "")), *map(block.fixed.get, parts.get(name, ())))
        ]
        why = next((reason for reason in reasons if reason is not None), None)
        raise ValueError(
            f"stages: nothing of {list(shares)} can be removed from this model"
            + (f": {why}." if why else "; are its groups smaller than `mlp_group` and `head_group`?")
        )
    narrowed = {_KINDS[name] for name in shares if name in _KINDS}
    for key, width in units.widths.items():
        if width.kind in narrowed and len(units.space[key].options) > 1:
            for slot in width.slots:
                check_here_to_narrow(layer_at(model, slot.path), slot.path)
            if sorted_kinds(config, shares):
                check_sortable(model, [width])
    if isinstance(config.order, Mapping):
        choose = dict(zip(config.stages, config.choose))
        chosen = {_KINDS.get(name) for name in shares if choose[name] == "score"}
        names = [order.name for w in units.structure.widths if w.kind in chosen for order in w.orders]
        if missing := [name for name in names if name not in config.order]:
            raise ValueError(f"order: it has no scores for {missing[0]!r}, which the choice 'score' needs.")


def _describable(
    model: nn.Module, units: Units, config: StructuredPruningConfig, shares: Mapping[str, float]
) -> Units:
    """The units without what could be removed and saved, but not loaded. ValueError if a stage has nothing else."""
    reasons = undescribable(model, smallest_state(units, tuple(shares)))
    for name in shares if reasons else ():
        reasons |= undescribable(model, smallest_state(units, (name,)))
    if not reasons:
        return units
    key, why = next(iter(reasons.items()))
    left = Units(model, units.structure, step_sizes(config, units.structure), frozenset(reasons))
    for name in shares:
        if next(units.moves(name, {}), None) and not next(left.moves(name, {}), None):
            raise ValueError(f"stages: {name!r} of this model could be removed and saved, but not loaded. {why}")
    warnings.warn(
        f"{len(reasons)} units such as {key!r} stay as they are: without them, the model could not be loaded. {why}"
    )
    return left
