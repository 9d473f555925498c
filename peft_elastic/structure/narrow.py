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
"""Blocks that compute with a part of their heads and channels, and modules that are skipped.

Both are a change of class of layers (`layers.narrowed`) and modules, which is taken back at full width: a model that is not
narrowed consists of the very modules that it came with.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Optional

from torch import nn

from ..common.parameters import check_parameters
from ..layers.backends import BACKENDS, backend_of, find_backend
from ..layers.convolutional import NarrowedTensors
from ..layers.narrowed import Narrowed, Ranges, change_class, is_of_class, plain_class
from .features import layer_at
from .layouts import Skip
from .modules import module_at
from .parts import Block, Width
from .removed import keep_places, main_first


def check_narrowable(layer: nn.Module, name: str) -> None:
    """ValueError if this layer cannot compute with a part of its features."""
    check_parameters({name: layer})
    backend = find_backend(layer)
    obstacle = None if backend is None else backend.obstacle("narrow")
    if obstacle:
        raise ValueError(f"{name!r} is of type {type(layer).__name__}, {obstacle}")
    if backend is None or backend.mixin(layer) is None:
        able = [backend for backend in BACKENDS if not backend.obstacle("narrow")]
        classes = sorted(cls.__name__ for backend in able for cls in backend.exact)
        packed = " and ".join(backend.name for backend in able if backend.packed)
        raise ValueError(
            f"{name!r} is of type {type(layer).__name__}, which cannot be narrowed; known are {', '.join(classes)} and the "
            f"layers of {packed}. Load a GPTQ checkpoint with `peft_elastic.load_gptq`."
        )


def set_active(layer: nn.Module, side: str, ranges: Optional[Ranges]) -> None:
    """Let a layer compute with these features of one of its sides alone; None: with all of them."""
    attribute = f"active_{side}"
    if ranges == layer.__dict__.get(attribute):
        return
    if is_skipped(layer):  # the layers of an MLP without a module around them, as OPT's
        skip = type(layer).skip_function  # type: ignore[attr-defined]
        change_class(layer, layer.plain_class)  # type: ignore[arg-type]
        set_active(layer, side, ranges)
        change_class(layer, _skipped_class(type(layer), skip))  # type: ignore[arg-type]
        return
    plain = plain_class(layer)
    if ranges is not None:
        layer.__dict__[attribute] = ranges
    other = "active_in" if side == "out" else "active_out"
    narrowed = ranges is not None or other in layer.__dict__
    if not narrowed:
        change_class(layer, plain)
    elif not isinstance(layer, Narrowed):
        change_class(layer, backend_of(layer).narrowed_class(layer))
    if ranges is None:  # last: interrupted before, this is done once more
        del layer.__dict__[attribute]


class _Skipped(nn.Module):
    """Mixin in front of the class of a module that is skipped."""

    plain_class: type[nn.Module]
    skip_function: Skip
    # numbers of the layers of the key-value cache that belong to the self-attentions in the module
    cache_layers: tuple[int, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = main_first(args, kwargs)
        keep_places((*args[1:], *kwargs.values()), self.cache_layers, args[0])
        return type(self).skip_function(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain, skip = self.plain_class, type(self).skip_function
        if issubclass(plain, NarrowedTensors):  # a block that owns narrowed tensors, whose class is made as well
            make, arguments, state = plain.reduce(self)  # type: ignore[attr-defined]
            return _new_skipped_owner, (skip, make, arguments), state
        return _new_skipped, (plain, skip), self.__dict__


def _new_skipped(plain: type[nn.Module], skip: Skip) -> nn.Module:
    cls = _skipped_class(plain, skip)  # type: ignore[arg-type]
    return cls.__new__(cls)


def _new_skipped_owner(skip: Skip, make: Any, arguments: Any) -> nn.Module:
    owner: nn.Module = make(*arguments)
    owner.__class__ = _skipped_class(type(owner), skip)  # type: ignore[arg-type]
    return owner


@functools.cache
def _skipped_class(cls: type[nn.Module], skip: Skip) -> type[nn.Module]:
    # The name stays: transformers, accelerate and FSDP find blocks by it.
    members = {"plain_class": cls, "skip_function": staticmethod(skip), "__module__": cls.__module__}
    return type(cls.__name__, (_Skipped, cls), members)


def is_skipped(module: nn.Module) -> bool:
    return isinstance(module, _Skipped)


def set_skipped(model: nn.Module, block: Block, part: str, skipped: bool) -> None:
    """Skip `part` ("block", "attention" or "mlp") of a block, or compute it again."""
    for path, skip in block.skips[part].items():
        module = module_at(model, path)
        if is_skipped(module) == skipped:
            continue
        if skipped:
            module.__dict__["cache_layers"] = cache_layers(model, block, path)
            change_class(module, _skipped_class(type(module), skip))  # type: ignore[arg-type]
        else:
            change_class(module, module.plain_class)  # type: ignore[arg-type]
            del module.__dict__["cache_layers"]


def check_skippable(model: nn.Module, blocks: Iterable[Block], values: Mapping[str, int]) -> None:
    """ValueError if something is to be skipped that computes with another forward than that of its class, which being skipped
    would not change."""
    for block in blocks:
        for part, skips in block.skips.items():
            for path in () if values.get(block.depth_key(part), 1) else skips:
                module = module_at(model, path)
                own = module.__dict__.get("_old_forward", module.__dict__.get("forward"))
                if own is not None and not is_of_class(module, own):
                    raise ValueError(
                        f"{path!r} cannot be skipped: somebody has given this one module a forward of its own (Liger kernels do, "
                        "`use_liger_kernel`). Leave that out, or the depth fixed."
                    )


def check_units(model: nn.Module, widths: Iterable[Width]) -> None:
    """Raise a ValueError if FSDP2 shards layers that are to be narrowed on their own: it has given them classes of its own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for path in (slot.path for width in widths for slot in width.slots):
        if isinstance(layer_at(model, path), fsdp.FSDPModule):
            raise ValueError(
                f"`fully_shard` was called on {path!r} itself, which cannot be narrowed then. Call it on the transformer blocks "
                "(`transformer_layer_cls_to_wrap` in accelerate's and Trainer's configuration), and not on the linear layers in them."
            )


def cache_layers(model: nn.Module, block: Block, path: str) -> tuple[int, ...]:
    """Of the self-attentions in the module at `path`, whether or not the layout can read their heads."""
    cross = tuple(f"{block.path}.{layout.module}." for layout in block.layout.attentions if layout.cross)
    numbers: set[int] = set()
    for name, module in module_at(model, path).named_modules(prefix=path):
        if not f"{name}.".startswith(cross):
            number = module.__dict__.get("layer_idx")
            numbers.update(module.__dict__.get("cache_layers", ()))  # of what was removed from it
            numbers.update([number] if isinstance(number, int) else ())
    return tuple(sorted(numbers))


def set_width(model: nn.Module, width: Width, value: int) -> None:
    """Let a block compute with its first `value` heads or channels."""
    kept = value // width.unit
    for slot in width.slots:
        ranges = None if value == width.full else slot.ranges(kept, width.units)
        set_active(layer_at(model, slot.path), slot.side, ranges)
    for attention in width.attentions:
        attention.set_heads(module_at(model, attention.path), value)
    for path, name in width.numbers:
        module_at(model, path).__dict__[name] = value


def is_narrowed(model: nn.Module) -> bool:
    """Whether a model computes with less than all of it."""
    return any(isinstance(module, (Narrowed, _Skipped)) for module in model.modules())
