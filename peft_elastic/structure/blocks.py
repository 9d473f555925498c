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
"""The blocks of a model: what can be narrowed and what can be skipped, by the layouts of `layouts.py`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import Cache, EncoderDecoderCache

from ..layers.backends import find_backend, find_linear_backend
from ..layers.narrowed import Ranges
from .layouts import AttentionLayout, BlockLayout, Skip, layouts
from .modules import find_stacks, module_at
from .proof import prove


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


class Removed(nn.Module):
    """Stands where a part of a block, or a block, has been removed for good.

    Args:
        module (`nn.Module`): what it stands for; plain attributes are taken over, as other modules may read them.
        skip (`Skip`): what it returns.
        cache_layers (`tuple[int, ...]`): numbers of the layers of the key-value cache that belong to it.
    """

    skip: Skip
    cache_layers: tuple[int, ...]
    stands_for: str
    absent: str

    def __init__(self, module: nn.Module, skip: Skip, cache_layers: tuple[int, ...]) -> None:
        super().__init__()
        plain = {k: v for k, v in module.__dict__.items() if isinstance(v, (bool, int, float, str))}
        self.__dict__.update(plain | {"training": module.training})
        self.__dict__.update(_traces_of(module, skip, cache_layers))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = main_first(args, kwargs)
        keep_places((*args[1:], *kwargs.values()), self.cache_layers, args[0])
        return self.skip(self, *args, **kwargs)

    def extra_repr(self) -> str:
        return self.stands_for

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Where this package is not imported, transformers would make up the weights of what was removed. An empty tensor in
        # the place of one lets it fail. A model on the meta device, though, is being loaded, and expects nothing here.
        if self.absent and not any(isinstance(t, torch.Tensor) and t.is_meta for t in destination.values()):
            destination[f"{prefix}{self.absent}"] = torch.empty(0, device="cpu")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is loaded, and the empty tensor is expected."""


def _traces_of(module: nn.Module, skip: Skip, cache_layers: tuple[int, ...]) -> dict[str, Any]:
    """What `Removed` keeps of a module."""
    parameters = [(name, p) for name, p in module.named_parameters() if "lora_" not in name]
    # one of the parameters that are not there, by which checkpoints name it. transformers renames and splits those of experts
    absent = next((name for name, parameter in parameters if parameter.dim() < 3), "").replace("base_layer.", "")
    traces = {"skip": skip, "cache_layers": cache_layers, "stands_for": _own_class(module).__name__, "absent": absent}
    return traces | {"_is_hf_initialized": True}  # there is nothing to, whatever the class of a block has


def empty_block(module: nn.Module, skip: Skip, cache_layers: tuple[int, ...]) -> None:
    """Leave nothing of a block, which stays where it is. It is of its class and keeps its hooks: transformers collects hidden
    states by these."""
    module.__dict__.update(_traces_of(module, skip, cache_layers))
    module.__class__ = _empty_class(_own_class(module))  # type: ignore[arg-type]
    for name in ("_modules", "_parameters", "_buffers"):
        module.__dict__[name].clear()


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before any part of it was made inactive."""
    cls = type(module)
    while hasattr(cls, "plain_class"):
        cls = cls.plain_class
    return cls


class _Empty(Removed):
    plain_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_empty, (self.plain_class,), self.__dict__


def _new_empty(plain_class: type[nn.Module]) -> nn.Module:
    cls = _empty_class(plain_class)  # type: ignore[arg-type]
    return cls.__new__(cls)


@functools.cache
def _empty_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_Empty, cls), {"plain_class": cls, "__module__": cls.__module__})


def main_first(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a forward with the main one by position, as skips take it. Models that name it give it first."""
    if args:
        return args, kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


def keep_places(arguments: Iterable[Any], layers: tuple[int, ...], hidden_states: torch.Tensor) -> None:
    """Note the new tokens in the layers of a key-value cache that nobody fills: positions are counted in one of them.

    Args:
        arguments: of the forward, one of which may be the cache. Models give it different names, or none.
        layers: numbers of these layers.
        hidden_states: the new tokens, (sequences, length, features).
    """
    cache: Any = next((argument for argument in arguments if isinstance(argument, Cache)), None)
    if cache is None or not layers:
        return
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for layer in layers:
        made = None
        if layer < len(cache.layers):
            if not hasattr(cache.layers[layer], "keys"):  # a state, which has no places
                continue
            made = cache.layers[layer].keys  # by whoever made the cache
        heads, size = (1, 1) if made is None else (made.shape[1], made.shape[3])
        place = hidden_states.new_zeros(hidden_states.shape[0], heads, hidden_states.shape[1], size)
        cache.update(place, place, layer)


class Structure:
    """What can be narrowed and skipped in a model.

    Attributes:
        blocks (`list[Block]`): all blocks that some layout fits, in the order of the model.
        widths (`list[Width]`): all that can be narrowed, in that order.
        unknown (`list[str]`): paths of the blocks that no layout fits.
        active (`dict[str, int]`): what of it is narrowed or skipped now, by the key of the choice; see `activate`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._read(model, {})
        prove(self, model)
        # a layout that is not true of a block gives way to another one of the same layers
        if others := {block.path: other for block in self.blocks for other in _others(block)[:1]}:
            second = Structure.by_names(model, {block.path: block.layout for block in self.blocks} | others)
            prove(second, model)
            if not any("heads" in block.problems for block in second.blocks if block.path in others):
                self.__dict__.update(second.__dict__)

    @classmethod
    def by_names(cls, model: nn.Module, chosen: Mapping[str, BlockLayout]) -> Structure:
        """What the names of the layers say, which nobody has tried; with these layouts for the blocks at these paths."""
        structure = cls.__new__(cls)
        structure._read(model, chosen)
        return structure

    def _read(self, model: nn.Module, chosen: Mapping[str, BlockLayout]) -> None:
        self.blocks: list[Block] = []
        self.widths: list[Width] = []
        self.unknown: list[str] = []
        self.active: dict[str, int] = {}
        for stack in find_stacks(model):
            found = list(self._read_stack(model, stack, chosen))
            self.blocks += found
            self.widths += _tied_heads(found) if found and found[0].layout.tied_heads else []

    def _read_stack(
        self, model: nn.Module, stack: dict[str, nn.Module], chosen: Mapping[str, BlockLayout]
    ) -> Iterator[Block]:
        for index, (path, module) in enumerate(stack.items()):
            if isinstance(module, Removed):
                continue
            layout = chosen.get(path)
            if layout is None:
                layout = next((layout for layout in layouts() if _fits(module, layout)), None)
            if layout is None:
                self.unknown.append(path)
                continue
            block = Block(path, path.rpartition(".")[0], index, layout, removed=_removed_parts(module, layout))
            for attention_layout in layout.attentions if "attention" not in block.removed else ():
                attention = _read_attention(module, path, attention_layout)
                if isinstance(attention, str):
                    block.problems["heads"] = attention
                else:
                    block.attentions.append(attention)
            if "heads" not in block.problems and block.attentions and not layout.tied_heads:
                self.widths.append(_heads_of(block.path, block.attentions))
            if layout.mlp is not None and "mlp" not in block.removed:
                mlp = _read_mlp(module, block)
                if isinstance(mlp, str):
                    block.problems["mlp"] = mlp
                else:
                    self.widths.append(mlp)
            block.skips = _skips(block, index)
            yield block

    def width(self, key: str) -> Width:
        """By its kind and name, `"heads:model.layers.0"`."""
        return next(width for width in self.widths if f"{width.kind}:{width.name}" == key)


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """The layer of the base model at `path`, without the adapters around it."""
    module = module_at(model, path)
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def layer_sizes(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, or of an embedding as (columns, rows), with all of its features."""
    backend = find_backend(layer)
    if backend is not None:
        return backend.sizes(layer)
    return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]


def _others(block: Block) -> list[BlockLayout]:
    """Layouts of the same layers, where the one that was taken is wrong about the heads."""
    if "heads" not in block.problems or not block.attentions:
        return []
    return [layout for layout in layouts() if layout is not block.layout and layout.paths() == block.layout.paths()]


def _removed_parts(block: nn.Module, layout: BlockLayout) -> set[str]:
    skips = {"attention": [path for part in layout.attentions for path in part.skip]}
    skips["mlp"] = [] if layout.mlp is None else list(layout.mlp.skip)
    modules = dict(block.named_modules())
    return {part for part, paths in skips.items() if any(isinstance(modules.get(path), Removed) for path in paths)}


def _fits(block: nn.Module, layout: BlockLayout) -> bool:
    for path in layout.paths(_removed_parts(block, layout)):
        try:
            layer = layer_at(block, path)
        except AttributeError:
            return False
        if find_linear_backend(layer) is None and not hasattr(layer, "in_features"):
            return False
    return True


def _read_attention(block: nn.Module, path: str, layout: AttentionLayout) -> Attention | str:
    """The attention, or why its heads cannot be narrowed."""
    module = block.get_submodule(layout.module)
    head_dim = next((module.__dict__[name] for name in layout.head_dim if name in module.__dict__), None)
    features = layer_sizes(layer_at(block, layout.path(layout.out)))[1]
    rows = [layer_sizes(layer_at(block, layout.path(name)))[0] for name in layout.qkv]
    where = f"{path}.{layout.module}"
    if not isinstance(head_dim, int) or features % head_dim:
        return f"{where} has no attribute {' or '.join(layout.head_dim)} that divides its {features} features"
    heads = features // head_dim
    if len(rows) == 1:
        kv_heads = (rows[0] // head_dim - heads) // 2
        fits = rows[0] == (heads + 2 * kv_heads) * head_dim
    else:
        kv_heads = rows[1] // head_dim
        fits = rows == [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    if not fits or kv_heads < 1 or heads % kv_heads or (layout.interleaved and kv_heads != heads):
        return f"the projections of {where} have {rows} rows, which are no {heads} heads of {head_dim}"
    known = {layout.path(name) for name in (*layout.qkv, layout.out, *layout.per_head)}
    sizes = {heads, kv_heads, heads * head_dim, kv_heads * head_dim}
    for name, parameter in module.named_parameters():
        owner = f"{layout.module}.{name}".rpartition(".")[0]
        if any(owner == path or owner.startswith(f"{path}.") for path in known) or tuple(parameter.shape) == (
            head_dim,
        ):
            continue
        if sizes & set(parameter.shape):
            return f"{where}.{name} {tuple(parameter.shape)} seems to belong to heads, and the layout does not know it"
    per_head = tuple(f"{where}.{name}" for name in layout.per_head if name in module._modules)
    return Attention(where, layout, heads, kv_heads, head_dim, per_head)


def _order_of(attention: Attention, block_path: str) -> Order:
    layout, heads, kv_heads, dim = attention.layout, attention.heads, attention.kv_heads, attention.head_dim
    queries, keys = heads * dim, kv_heads * dim
    paths = [f"{block_path}.{layout.path(name)}" for name in layout.qkv]
    if len(paths) == 1:
        whole = queries + 2 * keys
        parts = ((0, whole),) if layout.interleaved else ((0, queries), (queries, keys), (queries + keys, keys))
        slots = [Slot(paths[0], "out", parts)]
    else:
        slots = [Slot(path, "out", ((0, length),)) for path, length in zip(paths, (queries, keys, keys))]
    slots.append(Slot(f"{block_path}.{layout.path(layout.out)}", "in", ((0, queries),)))
    return Order(attention.path, tuple(slots))


def _heads_of(block_path: str, attentions: list[Attention]) -> Width:
    first = attentions[0]
    orders = tuple(_order_of(attention, block_path) for attention in attentions)
    return Width("heads", block_path, first.heads, first.kv_heads, orders, tuple(attentions))


def _tied_heads(blocks: list[Block]) -> list[Width]:
    """One width for the heads of a whole stack. The self-attentions have one order, as they share a bias for each head."""
    if any("heads" in block.problems for block in blocks):
        return []
    attentions = [attention for block in blocks for attention in block.attentions]
    if len({(attention.heads, attention.kv_heads) for attention in attentions}) > 1:
        for block in blocks:
            block.problems["heads"] = (
                f"the blocks of {block.stack} share their heads, and have different numbers of them"
            )
        return []
    shared: list[Slot] = []
    orders: list[Order] = []
    for block in blocks:
        for attention in block.attentions:
            order = _order_of(attention, block.path)
            if attention.layout.cross:
                orders.append(order)
                continue
            shared += order.slots
            shared += [Slot(path, "out", ((0, attention.heads),)) for path in attention.per_head]
    stack, first = blocks[0].stack, attentions[0]
    orders.insert(0, Order(stack, tuple(shared)))
    return [Width("heads", stack, first.heads, first.kv_heads, tuple(orders), tuple(attentions))]


def _read_mlp(module: nn.Module, block: Block) -> Width | str:
    """The channels, or why they cannot be narrowed."""
    layout = block.layout.mlp
    assert layout is not None
    channels = layer_sizes(layer_at(module, layout.out))[1]
    parts = tuple((i * channels, channels) for i in range(layout.stacked))
    for name in layout.inputs:
        rows = layer_sizes(layer_at(module, name))[0]
        if rows != layout.stacked * channels:
            return f"{block.path}.{name} has {rows} rows for {channels} channels"
    slots = [Slot(f"{block.path}.{name}", "out", parts) for name in layout.inputs]
    slots.append(Slot(f"{block.path}.{layout.out}", "in", ((0, channels),)))
    holder = layout.out.rpartition(".")[0]
    attributes = vars(module.get_submodule(holder))
    active = layer_at(module, layout.out).__dict__.get("active_in")  # of a model that is narrowed now
    now = channels if active is None else sum(stop - start for start, stop in active)
    numbers = [(f"{block.path}.{holder}".rstrip("."), name) for name in layout.features if attributes.get(name) == now]
    return Width("mlp", block.path, channels, channels, (Order(block.path, tuple(slots)),), numbers=tuple(numbers))


def _skips(block: Block, index: int) -> dict[str, dict[str, Skip]]:
    layout = block.layout
    skips: dict[str, dict[str, Skip]] = {}
    if not layout.first_is_fixed or index > 0:
        skips["block"] = {block.path: layout.skip}
        attention = {f"{block.path}.{path}": skip for part in layout.attentions for path, skip in part.skip.items()}
        if attention and "attention" not in block.removed:
            skips["attention"] = attention
    if layout.mlp is not None and layout.mlp.skip and "mlp" not in block.removed:
        skips["mlp"] = {f"{block.path}.{path}": skip for path, skip in layout.mlp.skip.items()}
    return skips
