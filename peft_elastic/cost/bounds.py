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
"""How wide each block of a super-network should be able to become: found from the importance of its heads and channels and a few
target costs, as EFTNAS does (LREC-COLING 2024)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from ..common.checks import check_choice, check_whole, is_finite, wrong
from ..common.documents import (
    COUNT,
    FINITE,
    POSITIVE,
    TEXT,
    Document,
    ListOf,
    MapOf,
    Nullable,
    OneOf,
    Record,
)
from ..common.tables import text_table
from ..common.writing import atomic_write_text
from ..structure.blocks import Structure
from ..structure.features import layer_at, layer_sizes
from ..structure.narrow import is_narrowed
from ..structure.parts import KINDS, Block, Width
from ..structure.space import (
    PARTS,
    activate,
    check_narrowable_layers,
    checked_depth,
    checked_width,
    layer_shapes,
    structural_choices,
)
from ..supernet.space import SearchSpace, Subnet, choice_key
from .counts import COSTS, CostModel, parse_bound
from .latency import LatencyModel


TARGETS = ("100%", "80%", "60%", "50%", "40%")
SCORES_PER = ("unit", "cost")
# A subnet whose cost is further from its target, as a share of it, is marked.
_CLOSE = 0.01
# Room for rounding when a target is compared with what is reachable.
_TOLERANCE = 1e-9

_TARGET = Record(
    asked=Nullable(TEXT),
    cost=FINITE,
    reached=FINITE,
    subnet=MapOf(COUNT),
)
_DOCUMENT = Document(
    "bounds",
    "peft-elastic/bounds",
    1,
    Record(
        cost=OneOf(*COSTS),
        sequence_length=Nullable(POSITIVE),
        whole=FINITE,
        targets=ListOf(_TARGET),
        elastic_width=Nullable(MapOf(MapOf(ListOf(POSITIVE)))),
        elastic_depth=Nullable(ListOf(TEXT)),
        shapes=TEXT,
    ),
)


@dataclass(frozen=True)
class Target:
    """A cost that a subnet was looked for with.

    Args:
        asked (`str`, *optional*): the share of the whole model as it was given, "50%"; None if a cost was given.
        cost (`float`): what that is, or what was given.
        reached (`float`): cost of the nearest subnet that a threshold on the scores gives.
        subnet (`Subnet`): that subnet, by the choices of width and depth. What it skips has its full width there, which costs nothing.
    """

    asked: str | None
    cost: float
    reached: float
    subnet: Subnet

    @property
    def off(self) -> float:
        """(reached - cost) / cost."""
        return self.reached / self.cost - 1

    @property
    def is_close(self) -> bool:
        """Whether it was reached to 1%."""
        return abs(self.off) <= _CLOSE


@dataclass(frozen=True)
class Bounds:
    """What each block of a super-network should be able to become. `str(bounds)` is a table of the targets:
    `ElasticLoraConfig(elastic_width=bounds.elastic_width, elastic_depth=bounds.elastic_depth)`.

    Args:
        cost (`str`): of the targets, a name of `peft_elastic.cost.counts.COSTS`.
        sequence_length (`int`, *optional*): whose attention products the cost counts.
        whole (`float`): cost of the whole model.
        targets (`tuple[Target, ...]`): in the order in which they were given.
        elastic_width (`dict`, *optional*): "heads" and "mlp" -> path of a block, or of a stack with tied heads -> its options, from
            the full width down. What has the full width alone is not there; None if nothing is.
        elastic_depth (`list[str]`, *optional*): the blocks, attentions and MLPs that some target leaves out; None if there are none.
        shapes (`str`): digest of the blocks, heads, channels and layer sizes of the model.
    """

    cost: str
    sequence_length: int | None
    whole: float
    targets: tuple[Target, ...]
    elastic_width: dict[str, dict[str, list[int]]] | None
    elastic_depth: list[str] | None
    shapes: str

    def check(self, model: nn.Module) -> None:
        """ValueError unless these are the bounds of a model of the same shapes."""
        if _shapes(_base(model), Structure(_base(model))) != self.shapes:
            raise ValueError(
                f"`model` ({type(model).__name__}) has other blocks, heads, channels or layers than the one the bounds are for."
            )

    def __str__(self) -> str:
        cost = COSTS[self.cost]

        def shown(value: float) -> str:
            return f"{value * cost.factor:{cost.form}}"

        rows = [("target", cost.title, "reached", "of the whole", "off")]
        for target in self.targets:
            off = "" if target.is_close else f"{target.off:+.1%}, the nearest"
            share = f"{target.reached / self.whole:.1%}"
            rows.append((target.asked or "", shown(target.cost), shown(target.reached), share, off))
        lines = text_table(rows, left={0, 4})
        for kind, widths in (self.elastic_width or {}).items():
            counts = [len(options) for options in widths.values()]
            numbers = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{counts[0]}"
            lines.append(f"{kind}: {len(counts)} elastic, with {numbers} options")
        if self.elastic_depth:
            lines.append(f"may be skipped: {_few(self.elastic_depth)}")
        return "\n".join(lines)

    # -- JSON ------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """JSON text; the inverse of `from_json`."""
        targets = [{**vars(target), "subnet": target.subnet.to_dict()} for target in self.targets]
        return json.dumps(_DOCUMENT.wrap({**vars(self), "targets": targets}), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Bounds:
        """Parse what `to_json` wrote.

        Raises:
            ValueError: if the text is not JSON, or no bounds, or of a newer version.
        """
        return cls._of(_DOCUMENT.parse(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json()` to `path`, atomically."""
        atomic_write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Bounds:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds no bounds; the message names the file.
        """
        fields = _DOCUMENT.read(path)
        try:
            return cls._of(fields)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is not a bounds file: {error}") from None

    @classmethod
    def _of(cls, fields: dict[str, Any]) -> Bounds:
        width = fields["elastic_width"]
        if checked_width(width) != width:
            raise wrong("elastic_width", "options that fall strictly", width)
        checked_depth(fields["elastic_depth"])
        if not fields["whole"] > 0 or not all(row["cost"] > 0 for row in fields["targets"]):
            raise ValueError("the costs of bounds must be positive")
        targets = tuple(Target(**{**row, "subnet": Subnet(row["subnet"])}) for row in fields["targets"])
        return cls(**{**fields, "targets": targets})


def bounds_by_importance(
    model: nn.Module,
    scores: Mapping[str, torch.Tensor],
    cost: str = "macs",
    targets: Sequence[str | float] = TARGETS,
    *,
    kinds: tuple[str, ...] = KINDS,
    sequence_length: int | None = None,
    latency_inputs: Mapping[str, Any] | None = None,
    latency_mode: str = "forward",
    per: str = "unit",
    multiple: int = 8,
    skip_below: float = 0.02,
) -> Bounds:
    """The options of each block, from scores of its heads and MLP channels and the costs that subnets should have.

    For each target one threshold on the scores of the whole model is looked for, with which the subnet of all heads and channels
    that score as much costs as near to the target as it can. The options of a block are the widths that it has in these subnets,
    and its full width. The same scores have to sort the model, `sort_by_importance(model, scores)`: the first heads and channels
    are then those above the threshold. The model itself is not changed, and it does not matter whether it is sorted already, if
    the scores are.

    - Heads stay or go in whole key-value groups, channels in multiples of `multiple`: their number is rounded up.
    - What would keep less than `skip_below` of its units is skipped: the attention, the MLP, or the block where nothing else is in
      it. Where that cannot be skipped its smallest width stays. A stack is never emptied: of what could go, the part that would go
      last stays at its smallest width.
    - Where several orders are cut at one number (the attentions of a T5 decoder, whose heads are tied in the whole stack), the k-th
      unit has the mean of the k-th largest scores of all of them.
    - Units with equal scores stay or go together, and so do those that are rounded up. Costs move in jumps, and a target between
      two subnets gives the nearer one, the cheaper one if both are as near. `str` of the result marks what is off by more than 1%.

    Args:
        model (`nn.Module`): a transformers model, or a `PeftModel`, whose adapters are not counted; nothing of it may be narrowed.
        scores (`Mapping[str, torch.Tensor]`): one number for each unit, larger for what is more important, by the name of each
            order of the `kinds`: what `sort_by_importance` returns.
        cost (`str`, defaults to `"macs"`): what the targets are of: `"macs"` per token, `"parameters"` or `"bytes"` (see
            `peft_elastic.search.CostModel`), or `"latency"` in seconds, which is predicted from measurements of every width that a layer
            can have: a `multiple` of 64 or more makes that quicker. Of latencies, which may rise where a layer becomes smaller,
            the result is the nearest of those that were looked at.
        targets (`Sequence`): shares of the cost of the whole model, `"50%"`, or costs; no two alike. `numpy.linspace(11.2e9,
            4.4e9, 5) / 128` are five, spaced evenly.
        kinds (`tuple[str, ...]`): "heads", "mlp" or both; what is not named keeps its width.
        sequence_length (`int`, *optional*): of `"macs"`, to count the attention products of sequences of that many tokens.
        latency_inputs (`Mapping`): of `"latency"`, a batch as the model will serve; `inputs` of `LatencyModel`.
        latency_mode (`str`): of `"latency"`, `"forward"` or `"decode"`.
        per (`"unit"` or `"cost"`): whether scores are compared as they are, or divided by what a unit costs, with which a head has to
            score as much as the channels that could stay in its place.
        multiple (`int`): of the channels; an MLP whose channels it does not divide is cut at any number.
        skip_below (`float`): share of the units; 0 to skip nothing.

    Raises:
        ValueError: if an argument is not allowed, the scores are not finite or those of another model, the model cannot be
            narrowed, or a target is out of reach.
    """
    check_choice("cost", cost, COSTS)
    if not isinstance(kinds, (tuple, list)) or not kinds or any(kind not in KINDS for kind in kinds):
        raise wrong("kinds", f"{KINDS} or one of them", kinds)
    check_choice("per", per, SCORES_PER)
    check_whole("multiple", multiple, least=1)
    if not is_finite(skip_below) or not 0 <= skip_below < 1:
        raise wrong("skip_below", "a share from 0 to below 1", skip_below)
    if sequence_length is not None and cost != "macs":
        raise ValueError(f"`sequence_length` is for `cost='macs'`, not for {cost!r}.")
    if (latency_inputs is None) == (cost == "latency"):
        raise ValueError(f"`latency_inputs` must be given with `cost='latency'`, and with no other, got {cost!r}.")
    given = _checked_targets(targets, cost)
    base = _base(model)
    if is_narrowed(base):
        raise ValueError("A part of `model` is not active; choose the widest subnet first, `model.set_subnet('max')`.")
    structure = Structure(base)
    groups = _Groups(structure, tuple(kinds), scores, multiple, float(skip_below))
    space = groups.space(base)
    if cost == "latency":
        assert latency_inputs is not None
        measure: Callable[[Subnet], float] = _measured_latency(base, structure, space, latency_inputs, latency_mode)
    else:
        measure = getattr(CostModel(base, space, sequence_length), cost)
    if per == "cost":
        groups.divide_by_cost(measure, space)
    groups.keep_stacks()
    thresholds = groups.thresholds()

    @cache
    def cost_at(index: int) -> float:
        return float(measure(groups.subnet(space, thresholds[index])))

    whole, least = cost_at(0), cost_at(len(thresholds) - 1)
    found = []
    for asked, value in _resolved(given, cost, whole, least):
        index = _nearest(value, len(thresholds) - 1, cost_at)
        found.append(Target(asked, value, cost_at(index), groups.subnet(space, thresholds[index])))
    widths, depth = groups.options(space, [target.subnet for target in found])
    there = {choice.key for choice in structural_choices(structure, widths, depth)}
    shown = [replace(t, subnet=Subnet({k: v for k, v in t.subnet.items() if k in there})) for t in found]
    return Bounds(cost, sequence_length, whole, tuple(shown), widths, depth, _shapes(base, structure))


@dataclass(frozen=True)
class _Group:
    """Units of which the first ones stay.

    Args:
        width: what they are units of.
        scores: float64 (units,), falling; that of the k-th unit.
        step: by how many units it is narrowed.
        needed: fewer units are none.
        blocks: that they are in.
        may_vanish: whether none of them may be left.
    """

    width: Width
    scores: np.ndarray
    step: int
    needed: int
    blocks: tuple[Block, ...]
    may_vanish: bool

    @property
    def part(self) -> str:
        return "attention" if self.width.kind == "heads" else "mlp"

    def size(self, threshold: float) -> int:
        """Heads or channels that are left when all with this score or more stay; 0 if the part vanishes."""
        count = int(np.searchsorted(-self.scores, -threshold, side="right"))
        if count < self.needed and self.may_vanish:
            return 0
        return min(max(1, -(-count // self.step)) * self.step, self.width.units) * self.width.unit


class _Groups:
    """All groups of a model."""

    def __init__(
        self, structure: Structure, kinds: tuple[str, ...], scores: Any, multiple: int, skip_below: float
    ) -> None:
        self._structure, self._kinds = structure, [kind for kind in KINDS if kind in kinds]
        widths = [width for width in structure.widths if width.kind in kinds]
        checked = _checked_scores(structure, widths, scores)
        self._groups = []
        for width in widths:
            part = "attention" if width.kind == "heads" else "mlp"
            blocks = tuple(block for block in structure.blocks if width.name in (block.path, block.stack))
            falling = np.mean([np.sort(checked[order.name])[::-1] for order in width.orders], axis=0)
            step = multiple if width.kind == "mlp" and width.units % multiple == 0 else 1
            needed = max(1, math.ceil(skip_below * width.units - _TOLERANCE))
            may_vanish = skip_below > 0 and all(part in block.skips for block in blocks)
            self._groups.append(_Group(width, falling, step, needed, blocks, may_vanish))

    def space(self, model: nn.Module) -> SearchSpace:
        """Of all that thresholds can give.

        Raises:
            ValueError: if the model cannot be narrowed or skipped so.
        """
        options: dict[str, dict[str, list[int]]] = {kind: {} for kind in self._kinds}
        for group in self._groups:
            width = group.width
            units = range(width.units, min(group.step, width.units) - 1, -group.step)
            options[width.kind][width.name] = [number * width.unit for number in units]
        vanishing = {(block.path, group.part) for group in self._groups for block in group.blocks if group.may_vanish}
        depth: list[int | str] = []
        for block in self._structure.blocks:
            if _is_empty(block, vanishing) and "block" in block.skips:
                depth.append(block.path)
            depth += [f"{block.path}.{part}" for part in PARTS if (block.path, part) in vanishing]
        choices = structural_choices(self._structure, {k: v or [1.0] for k, v in options.items()}, depth)
        check_narrowable_layers(model, self._structure, choices)
        return SearchSpace(choices, layer_shapes(model, self._structure, choices, {}))

    def divide_by_cost(self, measure: Callable[[Subnet], float], space: SearchSpace) -> None:
        """Make scores those of one unit of cost: of what the group costs, divided by its units."""
        whole = measure(space.max)
        for i, group in enumerate(self._groups):
            left = group.size(math.inf)
            saved = whole - measure(Subnet({**space.max, **_values(group, left)}))
            units = group.width.units - left // group.width.unit
            # a group that cannot be cut saves nothing, and by measurement another one may not either
            self._groups[i] = replace(group, scores=group.scores * (units / max(saved, _TOLERANCE * whole)))

    def thresholds(self) -> list[float]:
        """All that may give different subnets, the lowest first, which keeps everything; nothing is above the last one."""
        return [*np.unique(np.concatenate([group.scores for group in self._groups])).tolist(), math.inf]

    def keep_stacks(self) -> None:
        """Let the part that would vanish last stay in every stack that would be empty without it."""
        blocks = self._structure.blocks
        for stack in dict.fromkeys(block.stack for block in blocks):
            inside = [group for group in self._groups if group.may_vanish and group.blocks[0].stack == stack]
            vanishing = {(block.path, group.part) for group in inside for block in group.blocks}
            others = any(path.rpartition(".")[0] == stack for path in self._structure.unknown)
            if others or not all(_is_empty(block, vanishing) for block in blocks if block.stack == stack):
                continue
            last = max(inside, key=lambda group: group.scores[group.needed - 1], default=None)
            self._groups = [replace(g, may_vanish=False) if g is last else g for g in self._groups]

    def subnet(self, space: SearchSpace, threshold: float) -> Subnet:
        """What is left when all units with this score or more stay."""
        values = space.max.to_dict()
        vanished = set()
        for group in self._groups:
            size = group.size(threshold)
            values |= _values(group, size)
            vanished |= {(block.path, group.part) for block in group.blocks if size == 0}
        for block in self._structure.blocks:
            if (key := block.depth_key()) in values and _is_empty(block, vanished):
                values |= {block.depth_key(part): 1 for part in PARTS if part not in block.removed} | {key: 0}
        return Subnet(values)

    def options(
        self, space: SearchSpace, subnets: Iterable[Subnet]
    ) -> tuple[dict[str, dict[str, list[int]]] | None, list[str] | None]:
        """`elastic_width` and `elastic_depth` with which these subnets, and the whole model, are there."""
        subnets = [space.max, *subnets]
        widths: dict[str, dict[str, list[int]]] = {}
        for group in self._groups:
            options = sorted({subnet[group.width.key] for subnet in subnets}, reverse=True)
            if len(options) > 1:
                widths.setdefault(group.width.kind, {})[group.width.name] = options
        depth = [c.name for c in space if c.kind == "depth" and not all(subnet[c.key] for subnet in subnets)]
        return widths or None, depth or None


def _values(group: _Group, size: int) -> dict[str, int]:
    """Of the choices of a group, when this many heads or channels are left."""
    if size:
        return {group.width.key: size}
    return {block.depth_key(group.part): 0 for block in group.blocks}


def _is_empty(block: Block, vanished: Collection[tuple[str, str]]) -> bool:
    """Whether nothing of a block is left without these parts of blocks."""
    return all(part in block.removed or (block.path, part) in vanished for part in PARTS)


def _nearest(value: float, last: int, cost_at: Callable[[int], float]) -> int:
    """The index from 0 to `last` whose cost, which falls, is nearest; the larger index of two."""
    costly, cheap = 0, last
    visited = [costly, cheap]
    while cheap - costly > 1:
        middle = (costly + cheap) // 2
        visited.append(middle)
        if cost_at(middle) >= value:
            costly = middle
        else:
            cheap = middle
    return min(visited, key=lambda index: (abs(cost_at(index) - value), cost_at(index), index))


def _checked_targets(targets: Any, cost: str) -> list[Any]:
    """ValueError unless these are shares of a cost, or costs."""
    given = [] if isinstance(targets, (str, Mapping)) or not isinstance(targets, Iterable) else list(targets)
    if not given:
        raise wrong("targets", "a list such as ['100%', '50%']", targets)
    for target in given:
        value = parse_bound(target, 1.0)
        if not is_finite(value) or value <= 0:
            what = f"shares of the whole model such as '50%', or positive numbers of {COSTS[cost].unit}"
            raise wrong("targets", what, target)
    return given


def _resolved(targets: list[Any], cost: str, whole: float, least: float) -> list[tuple[str | None, float]]:
    """Each target as the share that was given, and as a cost.

    Raises:
        ValueError: if one is out of reach, or there twice.
    """
    unit = COSTS[cost].unit
    resolved: list[tuple[str | None, float]] = []
    for given in targets:
        value = float(parse_bound(given, whole))
        room = _TOLERANCE * whole
        if not least - room <= value <= whole + room:
            hint = "" if isinstance(given, str) or value > 1 else f" A share is a string: '{value:.0%}'."
            raise ValueError(
                f"`targets` has {given!r}, {value:,.6g} {unit}, which is out of reach: the subnets cost {least:,.6g} "
                f"({least / whole:.1%}) to {whole:,.6g}.{hint}"
            )
        if any(math.isclose(value, other, rel_tol=_TOLERANCE) for _, other in resolved):
            raise ValueError(f"`targets` must differ, and {given!r} is there twice, {value:,.6g} {unit}.")
        resolved.append((given if isinstance(given, str) else None, value))
    return resolved


def _checked_scores(structure: Structure, widths: Sequence[Width], scores: Any) -> dict[str, np.ndarray]:
    """The scores of the orders of these widths, float64 (units,)."""
    if not isinstance(scores, Mapping):
        raise wrong("scores", "a dict from the name of an order to one number for each unit", scores)
    units = {order.name: width.units for width in structure.widths for order in width.orders}
    if unknown := [name for name in scores if name not in units]:
        raise ValueError(f"`scores` are those of another model: it has no {unknown[0]!r}, but {_few(units)}.")
    needed = [order.name for width in widths for order in width.orders]
    if missing := [name for name in needed if name not in scores]:
        raise ValueError(
            f"`scores` must be of all heads and channels that `kinds` names; {_few(missing)} are missing."
        )
    checked = {}
    for name in needed:
        try:
            score = torch.as_tensor(scores[name]).detach().to("cpu", torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise wrong(f"scores[{name!r}]", f"{units[name]} numbers", scores[name]) from None
        if score.shape != (units[name],):
            raise ValueError(
                f"`scores` are those of another model: {name!r} has {units[name]} units, the scores are of shape "
                f"{tuple(score.shape)}."
            )
        if not torch.isfinite(score).all():
            raise ValueError(f"`scores` must be finite numbers, those of {name!r} are not.")
        checked[name] = score.numpy()
    return checked


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(map(repr, listed[:3])) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _measured_latency(
    model: nn.Module, structure: Structure, space: SearchSpace, inputs: Mapping[str, Any], mode: str
) -> Callable[[Subnet], float]:
    """Times the parts of a model; it is whole afterwards."""
    try:
        return LatencyModel.of_space(
            model, space, lambda subnet: activate(model, structure, subnet), inputs, mode=mode
        ).predict
    finally:
        activate(model, structure, {})


def _base(model: nn.Module) -> nn.Module:
    return getattr(model, "get_base_model", lambda: model)()


def _shapes(model: nn.Module, structure: Structure) -> str:
    """Digest of what bounds depend on."""
    lines: list[Any] = [block.path for block in structure.blocks]
    for width in structure.widths:
        layers = [[slot.path, slot.side, *layer_sizes(layer_at(model, slot.path))] for slot in width.slots]
        lines.append([choice_key(width.kind, width.name), width.full, width.units, layers])
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]
