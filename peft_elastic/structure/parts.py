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
"""What a model consists of, in words of its structure: blocks, attentions, widths, and the sides of the layers that they narrow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..layers.narrowed import Ranges
from ..supernet.space import choice_key
from .layouts import AttentionLayout, BlockLayout, Skip


KINDS = ("heads", "mlp")


@dataclass(frozen=True)
class Slot:
    """The side of a layer that a width narrows. Each of its parts is cut into as many equal pieces as there are units; the
    first pieces of every part are kept.

    Args:
        path (`str`): of the layer in the base model.
        side (`"out"` or `"in"`): which of its features.
        parts (`tuple`): (start, length) of each part.
    """

    path: str
    side: str
    parts: tuple[tuple[int, int], ...]

    def ranges(self, kept: int, units: int) -> Ranges:
        """What is active when `kept` of `units` are."""
        return tuple((start, start + length * kept // units) for start, length in self.parts)

    def index(self, order: torch.Tensor) -> torch.Tensor:
        """Where each feature comes from, int64 (features,), when unit i is to be what unit `order[i]` was."""
        size = max(start + length for start, length in self.parts)
        index = torch.arange(size)
        for start, length in self.parts:
            pieces = torch.arange(start, start + length).view(len(order), -1)
            index[start : start + length] = pieces[order].flatten()
        return index


@dataclass(frozen=True)
class Order:
    """Layers whose units can be put into another order together, without a change to what the model computes.

    Args:
        name (`str`): path of the attention, or of the block whose MLP it is.
        slots (`tuple[Slot, ...]`): the layers.
    """

    name: str
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Attention:
    """An attention in the base model.

    Args:
        path (`str`): of the module that splits the projections into heads.
        layout (`AttentionLayout`): how it is built.
        heads, kv_heads, head_dim (`int`): of the whole attention.
        per_head (`tuple[str, ...]`): paths of the embeddings with one column for each head that it has.
    """

    path: str
    layout: AttentionLayout
    heads: int
    kv_heads: int
    head_dim: int
    per_head: tuple[str, ...] = ()

    def set_heads(self, module: nn.Module, heads: int) -> None:
        """Tell the attention module how many query heads it has."""
        kv_heads = heads * self.kv_heads // self.heads
        values = dict.fromkeys(self.layout.heads, heads)
        values |= dict.fromkeys(self.layout.kv_heads, kv_heads)
        values |= dict.fromkeys(self.layout.features, heads * self.head_dim)
        for name, value in values.items():
            if name in module.__dict__:
                module.__dict__[name] = value
        if self.layout.reads_config:
            config: Any = module.config
            config = config.whole if isinstance(config, ConfigOfPart) else config
            numbers = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
            # not so at full width either, if the blocks of the model have different sizes
            fits = all(getattr(config, name) == number for name, number in numbers.items())
            module.__dict__["config"] = config if fits else ConfigOfPart(config, numbers)


class ConfigOfPart:
    """A configuration in which some numbers are those of one narrowed module."""

    def __init__(self, whole: Any, numbers: dict[str, int]) -> None:
        self.whole, self.numbers = whole, numbers

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("whole", "numbers"):
            raise AttributeError(name)  # asked for while it is being copied
        return self.numbers[name] if name in self.numbers else getattr(self.whole, name)


@dataclass(frozen=True)
class Width:
    """Heads or MLP channels of one block, or of all blocks of a stack whose heads are tied.

    Args:
        kind (`"heads"` or `"mlp"`): query heads or MLP channels.
        name (`str`): path of the block or of the stack.
        full (`int`): how many there are.
        units (`int`): in how many pieces they move: key and value groups, or channels.
        orders (`tuple[Order, ...]`): what is narrowed, by what is sorted together.
        attentions (`tuple[Attention, ...]`): the attentions that must know the number of heads.
        numbers (`tuple`): (path of a module, attribute) where the number of channels stands.
    """

    kind: str
    name: str
    full: int
    units: int
    orders: tuple[Order, ...]
    attentions: tuple[Attention, ...] = ()
    numbers: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        """Of its choice in a subnet."""
        return choice_key(self.kind, self.name)

    @property
    def slots(self) -> Iterator[Slot]:
        return (slot for order in self.orders for slot in order.slots)

    @property
    def unit(self) -> int:
        """Heads or channels of a unit."""
        return self.full // self.units


@dataclass
class Block:
    """A transformer block of the base model.

    Args:
        path (`str`): of the block.
        stack (`str`): path of the list that it is in.
        index (`int`): its place there.
        layout (`BlockLayout`): how it is built.
        attentions (`list[Attention]`): its attentions.
        skips (`dict[str, dict[str, Skip]]`): what may be skipped, "block", "attention" and "mlp" -> path of the module -> what
            it returns then.
        problems (`dict[str, str]`): "heads" or "mlp" -> why that cannot be narrowed.
        fixed (`dict[str, str]`): part that the layout can skip -> why it cannot be skipped here.
        removed (`set[str]`): which of "attention" and "mlp" are not there any more.
    """

    path: str
    stack: str
    index: int
    layout: BlockLayout
    attentions: list[Attention] = field(default_factory=list)
    skips: dict[str, dict[str, Skip]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, str] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)

    def depth_key(self, part: str = "block") -> str:
        """The key of the choice to skip the block, or its "attention" or "mlp"."""
        return choice_key("depth", self.path if part == "block" else f"{self.path}.{part}")
