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
"""What can be removed from a model, granularity by granularity, and what is left of it then.

A state of the model is a mapping from the key of a choice to its value, as in a `Subnet`: `"depth:model.layers.3.mlp"` -> 0
(skipped), `"mlp:model.layers.3"` -> channels, `"heads:model.layers.3"` -> query heads. What it does not name is whole. A move is
one more entry. To add a granularity is to add its moves to `GRANULARITIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from ...structure.blocks import Structure
from ...structure.parts import Block, Width
from ...structure.space import PARTS, layer_shapes
from ...supernet.space import Choice, SearchSpace, choice_key


State = Mapping[str, int]
Move = tuple[str, int]


class Units:
    """What can be removed from one model.

    Args:
        model (`nn.Module`): the whole model.
        structure (`Structure`): of `model`.
        groups (`Mapping[str, int]`): how many channels ("mlp") and key-value groups ("heads") a step removes; a kind that is not
            there is not narrowed.
        without (`Collection[str]`): keys of choices that are left alone.

    Attributes:
        space (`SearchSpace`): the choices that its states give values to.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, groups: Mapping[str, int], without: Collection[str] = ()
    ) -> None:
        self.structure, self.without = structure, without
        self.widths = {w.key: w for w in structure.widths if w.kind in groups}
        self.groups = {key: groups[width.kind] * width.unit for key, width in self.widths.items()}
        choices = [_width_choice(width, self.groups[key]) for key, width in self.widths.items()]
        for block in structure.blocks:
            for part in ("block", *PARTS):
                if part in block.skips:
                    choices.append(Choice("depth", block.depth_key(part).partition(":")[2], (1, 0), (block.path,)))
        self.space = SearchSpace(choices, layer_shapes(model, structure, choices, {}))

    def moves(self, granularity: str, state: State) -> Iterator[Move]:
        """All that this granularity allows in a state, in the order of the model."""
        return (move for move in GRANULARITIES[granularity].moves(self, state) if move[0] not in self.without)

    def after(self, state: State, move: Move) -> dict[str, int]:
        """The state after a move. A block without attention and MLP is one that is skipped as a whole, and what is skipped has no
        width."""
        values = {**state, move[0]: move[1]}
        for block in self.structure.blocks:
            keys = [block.depth_key(part) for part in PARTS if part not in block.removed]
            known = all(part in block.skips or part in block.removed for part in PARTS)
            whole = block.depth_key()
            if (
                known
                and "block" in block.skips
                and whole not in self.without
                and all(values.get(key) == 0 for key in keys)
            ):
                values[whole] = 0
            for part, kind in (("attention", "heads"), ("mlp", "mlp")):
                if not self.is_there(values, block, part):
                    values.pop(choice_key(kind, block.path), None)
        return values

    def is_there(self, state: State, block: Block, part: str) -> bool:
        """Whether "attention" or "mlp" of a block is computed."""
        keys = (block.depth_key(), block.depth_key(part))
        return part not in block.removed and all(state.get(key, 1) for key in keys)

    def leaves_something(self, state: State) -> bool:
        """Whether every stack keeps an attention or an MLP."""
        stacks: dict[str, bool] = {path.rpartition(".")[0]: True for path in self.structure.unknown}
        for block in self.structure.blocks:
            there = any(self.is_there(state, block, part) for part in PARTS)
            stacks[block.stack] = stacks.get(block.stack, False) or there
        return all(stacks.values())


def _skips(units: Units, state: State, parts: tuple[str, ...]) -> Iterator[Move]:
    for block in units.structure.blocks:
        for part in parts:
            inside = PARTS if part == "block" else (part,)
            if part not in block.skips or not any(units.is_there(state, block, name) for name in inside):
                continue
            move = (block.depth_key(part), 0)
            if units.leaves_something(units.after(state, move)):
                yield move


def _narrowings(units: Units, state: State, kind: str) -> Iterator[Move]:
    part = "attention" if kind == "heads" else "mlp"
    for key, width in units.widths.items():
        if width.kind != kind:
            continue
        blocks = [block for block in units.structure.blocks if width.name in (block.path, block.stack)]
        value = state.get(key, width.full) - units.groups[key]
        if value in units.space[key].options and any(units.is_there(state, block, part) for block in blocks):
            yield key, value


@dataclass(frozen=True)
class Granularity:
    """A kind of unit.

    Args:
        moves (`Callable`): f(units, state) gives what may be removed next.
        narrows (`bool`): the units have an order of importance within their block, and a block can lose some of them.
    """

    moves: Callable[[Units, State], Iterator[Move]]
    narrows: bool = False


GRANULARITIES = {
    "blocks": Granularity(lambda units, state: _skips(units, state, ("block",))),
    "sub-blocks": Granularity(lambda units, state: _skips(units, state, PARTS)),
    "attentions": Granularity(lambda units, state: _skips(units, state, ("attention",))),
    "mlps": Granularity(lambda units, state: _skips(units, state, ("mlp",))),
    "channels": Granularity(lambda units, state: _narrowings(units, state, "mlp"), narrows=True),
    "heads": Granularity(lambda units, state: _narrowings(units, state, "heads"), narrows=True),
}


def _width_choice(width: Width, group: int) -> Choice:
    modules = tuple(dict.fromkeys(slot.path for slot in width.slots))
    return Choice(width.kind, width.name, tuple(range(width.full, min(group, width.full) - 1, -group)), modules)
