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
"""Layers of convolutional models that compute with a part of their channels, or with a smaller kernel.

Being narrowed is a change of class, as in `narrowed.py`. The numbers that torch's layers keep of themselves (`groups`,
`num_groups`, `padding`, ...) are those of the part then; the layer holds the whole ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F

from ..common.parameters import is_spread
from .narrowed import (
    Narrowed,
    NarrowedParameter,
    Ranges,
    change_class,
    is_asked_by_name,
    narrowed_class,
    plain_class,
    stored_tensor,
    take,
)


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# of the names of the matrices that change a kernel of the first size into one of the second
_MATRIX = "kernel_matrix_{}_to_{}"


def _number(name: str, active: Any) -> property:
    """An attribute that is a number of the whole layer in its `__dict__`, and shows that of the active part."""

    def get(layer: Any) -> Any:
        return active(layer, layer.__dict__[name])

    def put(layer: Any, value: Any) -> None:
        layer.__dict__[name] = value

    return property(get, put)


def _of_out(layer: Narrowed, whole: int) -> int:
    return whole if layer.active_out is None else _length(layer.active_out)


def _of_in(layer: Narrowed, whole: int) -> int:
    return whole if layer.active_in is None else _length(layer.active_in)


def _length(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


class NarrowedConvolution(NarrowedParameter):
    """Mixin in front of a convolution. Of one with groups whole groups are active, on both sides."""

    # the kernel size; None for the whole
    active_kernel: Optional[int] = None

    @property
    def weight(self) -> torch.Tensor:
        full = stored_tensor(self, "weight")
        if is_asked_by_name() or is_spread(full):
            return full
        part = take(full, self.out_dim, self.active_out)
        if self.__dict__["groups"] == 1:
            part = take(part, 1 - self.out_dim, self.active_in)
        return part if self.active_kernel is None else crop_kernel(self, part, self.active_kernel)

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        NarrowedParameter.weight.fset(self, value)  # type: ignore[attr-defined]

    in_channels = _number("in_channels", _of_in)
    out_channels = _number("out_channels", _of_out)
    groups = _number(
        "groups", lambda layer, whole: whole * layer.in_channels // layer.__dict__["in_channels"] if whole > 1 else 1
    )
    kernel_size = _number("kernel_size", lambda layer, whole: cropped_size(whole, layer.active_kernel))
    padding = _number("padding", lambda layer, whole: cropped_padding(layer, whole))
    _reversed_padding_repeated_twice = _number(
        "_reversed_padding_repeated_twice",
        lambda layer, whole: whole if layer.active_kernel is None else _both_ends(layer),
    )


class NarrowedTransposedConvolution(NarrowedConvolution):
    """Mixin in front of a transposed convolution, whose weight has the inputs first."""

    out_dim = 1


class NarrowedChannels(Narrowed):
    """Mixin in front of a layer with one number, or none, for each channel: GroupNorm, LayerNorm, RMSNorm, PReLU, InstanceNorm."""

    @property
    def weight(self) -> Optional[torch.Tensor]:
        full = stored_tensor(self, "weight")
        whole = full is None or full.numel() == 1 or is_asked_by_name() or is_spread(full)
        return full if whole else take(full, 0, self.active_out)

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        NarrowedParameter.weight.fset(self, value)  # type: ignore[attr-defined]

    num_channels = _number("num_channels", _of_out)
    num_features = _number("num_features", _of_out)
    num_parameters = _number("num_parameters", lambda layer, whole: whole if whole == 1 else _of_out(layer, whole))
    num_groups = _number(
        "num_groups",
        lambda layer, whole: max(1, whole * layer.num_channels // layer.__dict__["num_channels"]),
    )
    normalized_shape = _number("normalized_shape", lambda layer, whole: (_of_out(layer, whole[0]),))


class NarrowedTensors(Narrowed):
    """Mixin in front of a module that computes with parameters or buffers of its own: layer scales, tokens, embeddings of positions."""

    # name -> dimension -> what is active
    active_tensors: Mapping[str, Mapping[int, Ranges]] = {}


def layer_mixin(layer: nn.Module) -> Optional[type[Narrowed]]:
    """What stands in front of the class of a layer while it is narrowed by its channels; None for a module that is none of torch's
    layers with channels."""
    plain = plain_class(layer)
    if issubclass(plain, CONVOLUTIONS):
        return NarrowedConvolution
    if issubclass(plain, TRANSPOSED):
        return NarrowedTransposedConvolution
    if issubclass(plain, nn.Linear):
        return _NarrowedLinear
    if issubclass(plain, (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.PReLU)):
        return NarrowedChannels
    if issubclass(plain, _INSTANCE_NORMS) and layer._buffers.get("running_mean") is None:
        return NarrowedChannels
    return None


class _NarrowedLinear(NarrowedParameter):
    """Mixin in front of `nn.Linear` that also shows how many features are active."""

    in_features = _number("in_features", _of_in)
    out_features = _number("out_features", _of_out)


def set_active_channels(layer: nn.Module, side: str, ranges: Optional[Ranges]) -> None:
    """Let a layer of torch compute with these channels of one of its sides, "out" or "in"; None: with all of them."""
    _set(layer, f"active_{side}", ranges)


def set_kernel(layer: nn.Module, size: Optional[int]) -> None:
    """Let a convolution compute with a kernel of this size; None: with the whole."""
    _set(layer, "active_kernel", size)


def _set(layer: nn.Module, attribute: str, value: Any) -> None:
    if layer.__dict__.get(attribute) == value:
        return
    if value is not None:
        layer.__dict__[attribute] = value
    others = {"active_out", "active_in", "active_kernel"} - {attribute}
    narrowed = value is not None or any(other in layer.__dict__ for other in others)
    if not narrowed:
        change_class(layer, plain_class(layer))
    elif not isinstance(layer, Narrowed):
        mixin = layer_mixin(layer)
        assert mixin is not None, type(layer)
        change_class(layer, narrowed_class(type(layer), mixin))  # type: ignore[arg-type]
    if value is None:  # last: interrupted before, this is done once more
        del layer.__dict__[attribute]


def set_active_tensor(module: nn.Module, name: str, dims: Mapping[int, Ranges]) -> None:
    """Let a module compute with a part of one of its own parameters or buffers; no dimensions: with all of it."""
    active = {**module.__dict__.get("active_tensors", {}), name: dict(dims)}
    active = {name: dims for name, dims in active.items() if dims}
    if active == module.__dict__.get("active_tensors", {}):
        return
    plain = plain_class(module)
    module.__dict__["active_tensors"] = active
    change_class(module, with_active_tensors(plain, module))
    if not active:
        del module.__dict__["active_tensors"]


def with_active_tensors(cls: type[nn.Module], module: nn.Module) -> type[nn.Module]:
    """A class that shows of the tensors of a module what is active, or the class itself if that is all."""
    names = tuple(sorted(module.__dict__.get("active_tensors", {})))
    return _tensors_class(cls, names) if names else cls  # type: ignore[arg-type]


def _active_tensor(name: str) -> property:
    def get(module: Any) -> Any:
        stored = module._parameters if name in module._parameters else module._buffers
        full = stored_tensor(module, name) if name in module._parameters else stored[name]
        if full is None or is_asked_by_name() or is_spread(full):
            return full
        for dim, ranges in module.active_tensors.get(name, {}).items():
            full = take(full, dim, ranges)
        return full

    return property(get)


@functools.cache
def _tensors_class(cls: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    members: dict[str, Any] = {name: _active_tensor(name) for name in names}
    members |= {"plain_class": cls, "__module__": cls.__module__}
    members |= {
        "reduce": lambda module: _reduce_owner(cls, module),
        "__reduce_ex__": lambda module, protocol: _reduce_owner(cls, module),
    }
    return type(cls.__name__, (NarrowedTensors, cls), members)


def _reduce_owner(cls: type[nn.Module], module: Any) -> Any:
    names = tuple(sorted(module.active_tensors))
    if cls.__reduce_ex__ is object.__reduce_ex__:
        return _new_owner, (names, cls.__new__, (cls,)), module.__dict__
    # a class that is made itself, as that of an elastic model is
    reduced: Any = cls.__reduce_ex__(module, 2)
    make, arguments, state = reduced[:3]
    return _new_owner, (names, make, arguments), state


def _new_owner(names: tuple[str, ...], make: Any, arguments: Any) -> nn.Module:
    owner: nn.Module = make(*arguments)
    owner.__class__ = _tensors_class(type(owner), names)  # type: ignore[arg-type]
    return owner


# -- kernels -----------------------------------------------------------------------------------------------------------


def cropped_size(size: tuple[int, ...], kernel: Optional[int]) -> tuple[int, ...]:
    """A kernel size where each dimension is at most `kernel`."""
    return size if kernel is None else tuple(min(k, kernel) for k in size)


def cropped_padding(layer: Any, padding: Any) -> Any:
    """The padding with which a smaller kernel gives outputs of the same shape at the same places: less by dilation * (k - k') / 2 on each side."""
    if layer.active_kernel is None or isinstance(padding, str):
        return padding
    whole = layer.__dict__["kernel_size"]
    return tuple(
        p - d * (k - small) // 2
        for p, d, k, small in zip(padding, layer.dilation, whole, cropped_size(whole, layer.active_kernel))
    )


def _both_ends(layer: Any) -> list[int]:
    """As torch keeps it for the paddings that are no zeros: (left, right) of the last dimension first."""
    if isinstance(layer.padding, str):
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
        return [end for total in reversed(totals) for end in (total // 2, total - total // 2)]
    return [p for p in reversed(layer.padding) for _ in range(2)]


def kernel_problem(layer: nn.Module, kernel: int) -> Optional[str]:
    """Why a convolution cannot have outputs of the same shape with this kernel size; None if it can."""
    size = cropped_size(layer.kernel_size, kernel)  # type: ignore[arg-type]
    if size == layer.kernel_size:
        return "its kernel is not larger"
    if any((k - small) % 2 for k, small in zip(layer.kernel_size, size)):  # type: ignore[arg-type]
        return f"its kernel {layer.kernel_size} has a side of another parity, whose middle is no kernel of that size"
    padding: Any = layer.padding
    if padding == "same":
        return None
    if padding == "valid":
        padding = (0,) * len(size)
    for p, d, k, small in zip(padding, layer.dilation, layer.kernel_size, size):  # type: ignore[arg-type]
        if d * (k - small) // 2 > p:
            return (
                f"with a kernel of {small} in the place of {k} and the padding {p} its outputs would be more than they are; "
                "the padding must be at least dilation * (k - k') / 2"
            )
    return None


def matrix_name(larger: int, smaller: int) -> str:
    return _MATRIX.format(larger, smaller)


def is_matrix_name(name: str) -> bool:
    """Whether a parameter of a convolution is such a matrix."""
    return name.rpartition(".")[2].startswith("kernel_matrix_")


def add_matrices(layer: nn.Module, sizes: tuple[int, ...]) -> None:
    """Give a convolution the matrices of its kernel sizes, from large to small, as parameters: identities at first.

    Args:
        layer: a convolution of `n` dimensions.
        sizes: values of its choice; the first is the whole.
    """
    weight: Any = layer._parameters["weight"]
    for larger, smaller in zip(sizes, sizes[1:]):
        area = math.prod(cropped_size(layer.kernel_size, smaller))  # type: ignore[arg-type]
        matrix = torch.eye(area, dtype=weight.dtype, device=weight.device)
        layer.register_parameter(
            matrix_name(larger, smaller), nn.Parameter(matrix, requires_grad=weight.requires_grad)
        )


def remove_matrices(layer: nn.Module) -> None:
    for name in [name for name in layer._parameters if is_matrix_name(name)]:
        del layer._parameters[name]


def crop_kernel(layer: Any, weight: torch.Tensor, kernel: int) -> torch.Tensor:
    """The middle of a kernel, times the learned matrix of each step on the way to that size (Once-for-All,
    https://arxiv.org/abs/1908.09791, section 3.3).

    Args:
        layer: that has the matrices; the middle alone where it has none.
        weight: (out, in, *kernel).
        kernel: the size.

    Returns:
        `torch.Tensor`: (out, in, *smaller kernel).
    """
    names = [name for name in layer._parameters if is_matrix_name(name)]
    steps = sorted(((int(name.split("_")[4]), name) for name in names), reverse=True)
    for smaller, name in steps or [(kernel, None)]:
        if smaller < kernel:
            break
        size = cropped_size(tuple(weight.shape[2:]), smaller)
        for dim, (whole, small) in enumerate(zip(weight.shape[2:], size), 2):
            weight = weight.narrow(dim, (whole - small) // 2, small)
        if name is not None:
            shape = weight.shape
            weight = F.linear(weight.reshape(*shape[:2], -1), stored_tensor(layer, name)).view(shape)
    return weight
