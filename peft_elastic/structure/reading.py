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
"""What the names of the layers say of the blocks of a model, by the layouts of `layouts.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from ..layers.backends import find_linear_backend
from .features import layer_at, layer_sizes
from .layouts import AttentionLayout, BlockLayout, Skip, layouts
from .modules import find_stacks
from .parts import Attention, Block, Order, Slot, Width
from .removed import Removed


class Reading:
    """What can be narrowed and skipped in a model, as its names say; nobody has tried it.

    Args:
        model (`nn.Module`): with weights or without.
        chosen (`Mapping[str, BlockLayout]`, *optional*): the layouts of the blocks at these paths; for the others, the first that
            fits by its names.

    Attributes:
        blocks (`list[Block]`): all blocks that some layout fits, in the order of the model.
        widths (`list[Width]`): all that can be narrowed, in that order.
        unknown (`list[str]`): paths of the blocks that no layout fits.
        active (`dict[str, int]`): what of it is narrowed or skipped now, by the key of the choice; see `activate`.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[str, BlockLayout] = {}) -> None:
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
        return next(width for width in self.widths if width.key == key)


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
