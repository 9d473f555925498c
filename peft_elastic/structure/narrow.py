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
"""Layers that compute with a part of their features, and modules that are skipped.

Both are a change of class, which is taken back at full width: a model that is not narrowed consists of the very modules that
it came with. A narrowed layer holds its whole weight as its parameter, and its attribute `weight` is what is active, so that
whoever reads it (its own forward, adapters around it) computes with less.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..common.parameters import check_parameters
from ..layers.backends.bitsandbytes import dequantize, is_bitsandbytes
from ..layers.quantized_linear import QuantizedLinear
from .features import layer_at
from .layouts import Skip
from .modules import module_at
from .parts import Block, Ranges, Width
from .removed import keep_places, main_first


def take(tensor: torch.Tensor, dim: int, ranges: Optional[Ranges]) -> torch.Tensor:
    """These runs of one dimension: a view if there is one run, a copy if there are several."""
    if ranges is None:
        return tensor
    runs = [tensor.narrow(dim, start, stop - start) for start, stop in ranges]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim)


def stored_tensor(layer: nn.Module, name: str) -> Any:
    """The whole parameter `name` of a layer whose attribute of that name is a part of it, or None."""
    if (replicated := layer.__dict__.get("_replicated")) is not None and name in replicated:
        return replicated[name]
    return layer._parameters.get(name)


def store_in_replica(layer: nn.Module, name: str, value: torch.Tensor) -> bool:
    """Keep what `nn.DataParallel` assigns to a copy of a layer, which has no parameters, only tensors computed from them.
    Returns False, and does nothing, for a layer that is no such copy."""
    if not layer.__dict__.get("_is_replica"):
        return False
    layer.__dict__.setdefault("_replicated", {})[name] = value
    return True


def is_asked_by_name() -> bool:
    """Whether the property that calls this is read by `get_parameter`, of whatever module above. torch fetches the parameter as
    an attribute there, and whoever goes by names, as TRL does to copy one adapter to another, means the whole parameter."""
    if torch.compiler.is_compiling():  # cannot look at frames, and a forward pass does not go by names
        return False
    return sys._getframe(2).f_code is nn.Module.get_parameter.__code__


class _Narrow(nn.Module):
    """Mixin in front of the class of a layer."""

    plain_class: type[nn.Module]
    # the dimension of the weight that holds the outputs
    out_dim = 0
    active_out: Optional[Ranges] = None
    active_in: Optional[Ranges] = None

    @property
    def weight(self) -> torch.Tensor:
        full = stored_tensor(self, "weight")
        if is_asked_by_name():
            return full
        return take(take(full, self.out_dim, self.active_out), 1 - self.out_dim, self.active_in)

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        set_in_replica(self, "weight", value)

    @property
    def bias(self) -> Optional[torch.Tensor]:
        full = stored_tensor(self, "bias")
        return full if full is None or is_asked_by_name() else take(full, 0, self.active_out)

    @bias.setter
    def bias(self, value: torch.Tensor) -> None:
        set_in_replica(self, "bias", value)

    def extra_repr(self) -> str:
        shape = tuple(self.weight.shape)
        return f"{super().extra_repr()}, active={shape}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copies and pickles are made from the plain class, which takes the ranges along in its state
        return _new_narrow, (self.plain_class,), self.__dict__


def _new_narrow(plain_class: type[nn.Module]) -> nn.Module:
    cls = _narrow_class(plain_class)  # type: ignore[arg-type]
    return cls.__new__(cls)


def set_in_replica(layer: nn.Module, name: str, value: torch.Tensor) -> None:
    """`store_in_replica`, or a ValueError."""
    if not store_in_replica(layer, name, value):
        raise ValueError(f"`{name}` of this layer is the active part of its parameter and cannot be assigned.")


class _NarrowConv1D(_Narrow):
    out_dim = 1

    @property
    def nf(self) -> int:
        return self.weight.shape[1]


class _NarrowEmbedding(_Narrow):
    """Of whose columns, here called outputs, a part is active."""

    out_dim = 1


class _NarrowQuantized(_Narrow):
    @property
    def grid(self) -> Any:
        full: Any = self._modules["grid"]
        return full.take(self.active_out, self.active_in)


class _NarrowBitsAndBytes(_Narrow):
    """Dequantised as a whole, as its blocks of numbers do not follow the features."""

    @property  # type: ignore[misc]
    def weight(self) -> Any:  # not to be assigned: Trainer does not use `nn.DataParallel` with bitsandbytes
        return self._parameters["weight"]

    def active_weight(self) -> torch.Tensor:
        full = dequantize(self._parameters["weight"], getattr(self, "state", None))
        return take(take(full, 0, self.active_out), 1, self.active_in)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias
        return nn.functional.linear(x, self.active_weight().to(x.dtype), None if bias is None else bias.to(x.dtype))

    def extra_repr(self) -> str:
        return "narrowed"


_MIXINS: dict[type, type] = {
    nn.Linear: _Narrow,
    Conv1D: _NarrowConv1D,
    nn.Embedding: _NarrowEmbedding,
    QuantizedLinear: _NarrowQuantized,
}


def _mixin(layer: nn.Module) -> type | None:
    if is_bitsandbytes(layer):
        return _NarrowBitsAndBytes
    return _MIXINS.get(plain_class(layer))


def check_narrowable(layer: nn.Module, name: str) -> None:
    """ValueError if this layer cannot compute with a part of its features."""
    check_parameters({name: layer})
    if _mixin(layer) is None:
        known = ", ".join(sorted(cls.__name__ for cls in _MIXINS))
        raise ValueError(
            f"{name!r} is of type {type(layer).__name__}, which cannot be narrowed; known are {known} and the layers of "
            "bitsandbytes. Load a GPTQ checkpoint with `peft_elastic.load_gptq`."
        )


def plain_class(layer: nn.Module) -> type:
    """The class of a layer when it is not narrowed."""
    return layer.plain_class if isinstance(layer, _Narrow) else type(layer)


@functools.cache
def _narrow_class(cls: type[nn.Module], mixin: type | None = None) -> type[nn.Module]:
    mixin = _MIXINS.get(cls, _NarrowBitsAndBytes) if mixin is None else mixin
    return type(f"Narrow{cls.__name__}", (mixin, cls), {"plain_class": cls, "__module__": __name__})


def set_active(layer: nn.Module, side: str, ranges: Optional[Ranges]) -> None:
    """Let a layer compute with these features of one of its sides alone; None: with all of them."""
    attribute = f"active_{side}"
    if ranges == layer.__dict__.get(attribute):
        return
    if is_skipped(layer):  # the layers of an MLP without a module around them, as OPT's
        skip = type(layer).skip_function  # type: ignore[attr-defined]
        layer.__class__ = layer.plain_class  # type: ignore[assignment]
        set_active(layer, side, ranges)
        layer.__class__ = _skipped_class(type(layer), skip)  # type: ignore[arg-type]
        return
    plain = plain_class(layer)
    if ranges is not None:
        layer.__dict__[attribute] = ranges
    other = "active_in" if side == "out" else "active_out"
    narrowed = ranges is not None or other in layer.__dict__
    layer.__class__ = _narrow_class(plain) if narrowed else plain
    if ranges is None:  # last: interrupted before, this is done once more
        del layer.__dict__[attribute]


def active_ranges(layer: nn.Module) -> tuple[Optional[Ranges], Optional[Ranges]]:
    """The active outputs and inputs of a layer; None for all."""
    return layer.__dict__.get("active_out"), layer.__dict__.get("active_in")


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
        return _new_skipped, (self.plain_class, type(self).skip_function), self.__dict__


def _new_skipped(plain: type[nn.Module], skip: Skip) -> nn.Module:
    cls = _skipped_class(plain, skip)  # type: ignore[arg-type]
    return cls.__new__(cls)


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
            module.__class__ = _skipped_class(type(module), skip)  # type: ignore[arg-type]
        else:
            module.__class__ = module.plain_class  # type: ignore[assignment]
            del module.__dict__["cache_layers"]


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
    return any(isinstance(module, (_Narrow, _Skipped)) for module in model.modules())


__all__ = [
    "active_ranges",
    "cache_layers",
    "check_narrowable",
    "is_narrowed",
    "is_skipped",
    "plain_class",
    "set_active",
    "set_in_replica",
    "set_skipped",
    "set_width",
    "store_in_replica",
    "stored_tensor",
    "take",
]
