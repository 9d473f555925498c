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
"""Intel's `pruning_config.json`, so that configurations published with MultiPruner can be applied, and ours compared with them.

It names the removed attentions and MLPs of a model with one stack of blocks by their numbers, and gives the channels that are
left: of MLPs, and of attentions (query heads times their size). Which channels these are it does not say: those with the largest
L1 norm, for which the weights were sorted before (see `l1_scores`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ...common.checks import check_choice
from ...common.documents import read_json
from ...structure.blocks import Structure
from ...structure.importance import noted_orders
from ...structure.parts import Block, Width
from .cost import Costs
from .importance import l1_scores
from .plan import PruningPlan, check_whole, describe_model
from .units import Units


_PARTS = {"pruned_attn_idx": "attention", "pruned_mlp_idx": "mlp"}
_WIDTHS = {"pruned_attn_width": "heads", "pruned_mlp_width": "mlp"}


def to_pruning_config(plan: PruningPlan, model: nn.Module) -> dict[str, Any]:
    """A plan in the words of Intel's `pruning_config.json`.

    Args:
        plan: of `model`.
        model: whole, for the size of its heads.

    Returns:
        what `json.dump` writes to that file. It warns where channels or heads of the plan were not chosen by their L1 norm, as
        the file cannot say which they are.

    Raises:
        ValueError: if the plan does not fit the model, or the model has several stacks of blocks.
    """
    structure = plan.check(model)
    blocks = _one_stack(structure)
    if plan.units and plan.config.get("order") != "l1":
        warnings.warn(
            "Intel's pruning_config.json cannot say which channels and heads are left: its reader keeps those with the largest L1 "
            f"norm, and this plan was made with the order {plan.config.get('order')!r}.",
            stacklevel=2,
        )
    config: dict[str, Any] = {}
    for name, part in _PARTS.items():
        keys = [(block.depth_key(), block.depth_key(part)) for block in blocks]
        config[name] = [number for number, pair in enumerate(keys) if any(plan.values.get(key) == 0 for key in pair)]
    for name, kind in _WIDTHS.items():
        widths = _widths(structure, blocks, kind)
        left = {number: plan.values.get(width.key, width.full) for number, width in widths.items()}
        config[name] = {str(number): value * _per_unit(widths[number]) for number, value in left.items()}
    return config


def from_pruning_config(
    config: Mapping[str, Any] | str | os.PathLike[str], model: nn.Module, *, order: str = "l1"
) -> PruningPlan:
    """The plan of one of Intel's `pruning_config.json`.

    Args:
        config: the path of the file, or what is in it.
        model: the base model that it was made for. Its weights say which channels and heads are left.
        order (`str`): "l1", as published configurations were made, or "none" for those of models that were not sorted.

    Raises:
        ValueError: if `config` is not of that form, or does not fit the model; the message says what differs.
    """
    check_choice("order", order, ("l1", "none"))
    check_whole(model)
    read = _read(config)
    structure = Structure(model)
    blocks = _one_stack(structure)
    values: dict[str, int] = {}
    for name, part in _PARTS.items():
        for number in read.get(name, []):
            if type(number) is not int or not 0 <= number < len(blocks) or part not in blocks[number].skips:
                raise ValueError(f"config: {name!r} has {number!r}; the model has {len(blocks)} blocks, from 0.")
            values[blocks[number].depth_key(part)] = 0
    units = Units(model, structure, {"mlp": 1, "heads": 1})
    for name, kind in _WIDTHS.items():
        widths = _widths(structure, blocks, kind)
        for number, channels in read.get(name, {}).items():
            width = widths.get(int(number)) if str(number).isdecimal() else None
            if width is None:
                raise ValueError(f"config: {name!r} has a block {number!r}, of which the model has no {kind}.")
            value, rest = divmod(channels, _per_unit(width)) if type(channels) is int else (0, 0)
            if rest or not 0 < value <= width.full or value % width.unit:
                step = width.unit * _per_unit(width)
                raise ValueError(
                    f"config: {name!r} gives block {number} {channels!r} channels; these must be multiples of {step} up to "
                    f"{width.full * _per_unit(width)}."
                )
            if value < width.full and units.is_there(
                values, blocks[int(number)], "mlp" if kind == "mlp" else "attention"
            ):
                values[width.key] = value
    state: dict[str, int] = {}
    for move in values.items():
        state = units.after(state, move)
    if not units.leaves_something(state):
        raise ValueError("config: it removes every attention and MLP of the model.")
    costs = Costs(model, units, "parameters")
    return PruningPlan(
        method="multipruner",
        config={"order": order, "ratio": 1 - costs.parameters(state) / costs.parameters({}), "measure": "parameters"},
        model=describe_model(model, structure),
        values=dict(sorted(state.items())),
        units=_kept(model, structure, state, order),
        before={"parameters": costs.parameters({}), "macs": costs.macs({})},
        after={"parameters": costs.parameters(state), "macs": costs.macs(state)},
    )


def _kept(model: nn.Module, structure: Structure, state: Mapping[str, int], order: str) -> dict[str, list[int]]:
    noted = noted_orders(model)
    kept = {}
    for width in structure.widths:
        value = state.get(width.key)
        if value is None:
            continue
        scores = l1_scores(model, [width]) if order == "l1" else {}
        for one in width.orders:
            now = noted.get(one.name, torch.arange(width.units))
            if one.name in scores:
                now = now[torch.argsort(scores[one.name], descending=True, stable=True)]
            kept[one.name] = now[: value // width.unit].tolist()
    return kept


def _read(config: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    if not isinstance(config, Mapping):
        try:
            config = read_json(config)
        except ValueError as error:
            raise ValueError(f"config: {error}.") from None
    forms = dict.fromkeys(_PARTS, list) | dict.fromkeys(_WIDTHS, dict)
    if not isinstance(config, Mapping) or not config or set(config) - set(forms):
        raise ValueError(f"config: a pruning_config.json has the entries {list(forms)}, and no others.")
    for name, value in config.items():
        if not isinstance(value, forms[name]):
            raise ValueError(f"config: {name!r} must be a {forms[name].__name__}, got {type(value).__name__}.")
    return config


def _one_stack(structure: Structure) -> list[Block]:
    stacks = {block.stack for block in structure.blocks}
    if len(stacks) != 1 or structure.unknown:
        raise ValueError(f"model: it has {len(stacks)} stacks of known blocks; a pruning_config.json describes one.")
    return structure.blocks


def _widths(structure: Structure, blocks: list[Block], kind: str) -> dict[int, Width]:
    numbers = {block.path: number for number, block in enumerate(blocks)}
    return {numbers[w.name]: w for w in structure.widths if w.kind == kind and w.name in numbers}


def _per_unit(width: Width) -> int:
    """Channels of a head, or of a channel."""
    return width.attentions[0].head_dim if width.kind == "heads" else 1
