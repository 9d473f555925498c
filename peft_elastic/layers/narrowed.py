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
"""Layers that compute with a part of their features.

Being narrowed is a change of class, which is taken back at full width. A narrowed layer holds its whole weight as its parameter,
and its attribute `weight` is what is active, so that whoever reads it (its own forward, adapters around it) computes with less.
Which class stands in front of that of a layer is for its backend to say.
"""

from __future__ import annotations

import functools
import sys
import types
from typing import Any, Optional

import torch
from torch import nn

from ..common.parameters import is_spread


# Features as runs (start, stop).
Ranges = tuple[tuple[int, int], ...]

_FSDP = "torch.distributed.fsdp."


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
    # by index, as an attribute is read: ZeRO-3 gathers what is read so in a forward pass
    return layer._parameters[name] if name in layer._parameters else None


def store_in_replica(layer: nn.Module, name: str, value: torch.Tensor) -> bool:
    """Keep what `nn.DataParallel` assigns to a copy of a layer, which has no parameters, only tensors computed from them.
    Returns False, and does nothing, for a layer that is no such copy."""
    if not layer.__dict__.get("_is_replica"):
        return False
    layer.__dict__.setdefault("_replicated", {})[name] = value
    return True


def set_in_replica(layer: nn.Module, name: str, value: torch.Tensor) -> None:
    """`store_in_replica`, or a ValueError."""
    if not store_in_replica(layer, name, value):
        raise ValueError(f"`{name}` of this layer is the active part of its parameter and cannot be assigned.")


def is_asked_by_name() -> bool:
    """Whether the property that calls this is read by `get_parameter` or `get_buffer`, of whatever module above, or by FSDP2. torch
    fetches the parameter as an attribute there, and whoever goes by names, as TRL does to copy one adapter to another, means the whole
    parameter; and so does FSDP2, which looks in the first forward pass whether its shards have been replaced."""
    if torch.compiler.is_compiling():  # cannot look at frames, and a forward pass does not go by names
        return False
    frame = sys._getframe(2)
    by_name = nn.Module.get_parameter.__code__, nn.Module.get_buffer.__code__
    return frame.f_code in by_name or frame.f_globals.get("__name__", "").startswith(_FSDP)


class Narrowed(nn.Module):
    """Mixin in front of the class of a layer, of whose features a part is active; None for all."""

    plain_class: type[nn.Module]
    active_out: Optional[Ranges] = None
    active_in: Optional[Ranges] = None

    @property
    def bias(self) -> Optional[torch.Tensor]:
        full = stored_tensor(self, "bias")
        return full if full is None or is_asked_by_name() or is_spread(full) else take(full, 0, self.active_out)

    @bias.setter
    def bias(self, value: torch.Tensor) -> None:
        set_in_replica(self, "bias", value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copies and pickles are made from the plain class, which takes the ranges along in its state
        mixin = next(cls for cls in type(self).__mro__[1:] if issubclass(cls, Narrowed))
        return _new_narrowed, (self.plain_class, mixin), self.__dict__


class NarrowedParameter(Narrowed):
    """Mixin in front of a layer whose weight is a parameter in floating point."""

    # the dimension of the weight that holds the outputs
    out_dim = 0

    @property
    def weight(self) -> torch.Tensor:
        full = stored_tensor(self, "weight")
        if is_asked_by_name() or is_spread(full):
            return full
        return take(take(full, self.out_dim, self.active_out), 1 - self.out_dim, self.active_in)

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        set_in_replica(self, "weight", value)

    def extra_repr(self) -> str:
        shape = tuple(self.weight.shape)
        return f"{super().extra_repr()}, active={shape}"


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Let a module be of another class. accelerate (`device_map`) puts its hooks in front of the forward of the class that it finds,
    and leaves that forward on the module when it takes them off: both go on with that of the new class."""
    noted = [name for name in ("_old_forward", "forward") if is_of_class(module, module.__dict__.get(name))]
    module.__class__ = cls
    for name in noted:
        module.__dict__[name] = types.MethodType(cls.forward, module)


def is_of_class(module: nn.Module, method: Any) -> bool:
    """Whether this is the forward that the class of the module has, bound to the module."""
    bound = getattr(method, "__self__", None) is module
    return bound and getattr(method, "__func__", None) is type(module).forward


def plain_class(layer: nn.Module) -> type:
    """The class of a layer when it is not narrowed."""
    return layer.plain_class if isinstance(layer, Narrowed) else type(layer)


@functools.cache
def narrowed_class(cls: type[nn.Module], mixin: type[Narrowed]) -> type[nn.Module]:
    """The class of narrowed layers that are a `cls` when they are not."""
    return type(f"Narrow{cls.__name__}", (mixin, cls), {"plain_class": cls, "__module__": __name__})


def _new_narrowed(cls: type[nn.Module], mixin: type[Narrowed]) -> nn.Module:
    narrowed = narrowed_class(cls, mixin)  # type: ignore[arg-type]
    return narrowed.__new__(narrowed)


def active_ranges(layer: nn.Module) -> tuple[Optional[Ranges], Optional[Ranges]]:
    """The active outputs and inputs of a layer; None for all."""
    return layer.__dict__.get("active_out"), layer.__dict__.get("active_in")


def other_ranges(ranges: Ranges, size: int) -> Ranges:
    """The runs between, before and behind these."""
    ends = [0, *(stop for _, stop in ranges)]
    starts = [*(start for start, _ in ranges), size]
    return tuple((end, start) for end, start in zip(ends, starts) if end < start)
