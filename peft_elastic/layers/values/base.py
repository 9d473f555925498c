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
"""What a type of values is, and what those that come after a bitmap have in common.

The on-disk form of a weight is a few tensors, described in README.md. It does not depend on the instruction set; `pack` makes the
tiled form that the kernels read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ...common.checks import is_whole
from .. import ops
from ..addresses import is_plain


Tensors = dict[str, torch.Tensor]
LIMIT = 2**62  # of what is counted


class Sizes(NamedTuple):
    """What is said of a stored weight besides its tensors.

    Args:
        out_features, in_features (`int`): its shape.
        nnz (`int`): values that are not zero.
        group_size (`int`): columns that share a scale and a zero; 0 without groups.
        sparse (`bool`): whether the zeros are left out, and a bitmap says where they are.
    """

    out_features: int
    in_features: int
    nnz: int
    group_size: int = 0
    sparse: bool = True


@dataclass(frozen=True)
class ValueFormat:
    """A type of the values of a stored weight: its form on disk, and the way to the kernels.

    Args:
        name (`str`): as users write it, and as C++ calls it.
        tensors (`Mapping[str, tuple[torch.dtype, ...]]`): the tensors on disk by their names, and the types that each may have.
            `weight_bitmask` is there only if the zeros are left out.
        compress (`Callable`): of a type that weights are rounded to `(weight) -> tensors`, of a grid `(q, scales, zeros, g_idx,
            group_size, sparse) -> tensors`. ValueError naming the argument that does not fit.
        verify (`Callable`): `(name, tensors, sizes) -> None`: ValueError, naming the tensor or the number that is wrong, for tensors
            that may come from a damaged or hostile file; tensors of other names (`bias`) are not looked at. Takes memory in
            proportion to the tensors, whatever the numbers claim.
        decompress (`Callable`): `(tensors, sizes, dtype=None) -> weight`, dense `(out, in)`, of tensors that `verify` has passed:
            computed in float32 and rounded once.
        pack (`Callable`): `(tensors, sizes) -> (packed, scales)` for `ops.linear`.
        unpack (`Callable`): the inverse of `pack`.
        bytes (`Callable`): `(sizes) -> int`, what it takes on disk.
        bits (`int`, *optional*): of a grid, whose whole numbers are stored as they are; None if weights are rounded.
        check (`Callable`, *optional*): of a grid, `(q, scales, zeros, g_idx, group_size) -> None`: ValueError naming what it cannot hold.
        codes (`Callable`, *optional*): of a grid, `(tensors, sizes) -> (q, groups)` of tensors that `verify` has passed: uint8
            `(out, in)`, and the group of each column, `(in,)`.
        optional (`frozenset[str]`): the tensors that may be missing.
    """

    name: str
    tensors: Mapping[str, tuple[torch.dtype, ...]]
    compress: Callable[..., Tensors]
    verify: Callable[[str, Tensors, Sizes], None]
    decompress: Callable[..., torch.Tensor]
    pack: Callable[[Tensors, Sizes], tuple[torch.Tensor, torch.Tensor | None]]
    unpack: Callable[[torch.Tensor, torch.Tensor | None], Tensors]
    bytes: Callable[[Sizes], int]
    bits: int | None = None
    check: Callable[..., None] | None = None
    codes: Callable[[Tensors, Sizes], tuple[torch.Tensor, torch.Tensor]] | None = None
    optional: frozenset[str] = frozenset()

    @property
    def is_grid(self) -> bool:
        """Whether it holds the whole numbers of a grid, with groups, and may store the zeros too."""
        return self.bits is not None

    def variants(self, sparse: bool) -> list[str]:
        """What a layer on a grid can become, by the names that `parse_values` takes: storing the zeros needs none."""
        return [self.name, f"{self.name} dense"] if sparse else [f"{self.name} dense"]


# -- what files may hold -----------------------------------------------------------------------------------------------


def check_sizes(name: str, sizes: Sizes) -> None:
    """ValueError unless the shape and the number of values can be."""
    for key, least in (("out_features", 1), ("in_features", 1), ("nnz", 0)):
        number: Any = getattr(sizes, key)
        if not is_whole(number) or not least <= number < LIMIT:
            raise ValueError(f"{name}: {key} must be a whole number >= {least}, got {number!r:.50}.")
    if sizes.nnz > sizes.out_features * sizes.in_features:
        raise ValueError(
            f"{name}: nnz is {sizes.nnz}, more than the {sizes.out_features} x {sizes.in_features} weights."
        )


def take(name: str, tensors: Tensors, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor `key`; ValueError unless it is an ordinary one of this type and shape."""
    tensor = tensors.get(key)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}.{key} is missing; it must be {dtype} {shape}.")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}.{key} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}.")
    if not is_plain(tensor):
        raise ValueError(
            f"{name}.{key} must be an ordinary dense tensor on the CPU, got a {type(tensor).__name__} on {tensor.device}."
        )
    return tensor


def take_bitmask(name: str, tensors: Tensors, sizes: Sizes) -> torch.Tensor:
    """The bitmap, of which `check_bitmask` looks at the bits."""
    return take(name, tensors, "weight_bitmask", torch.uint8, (sizes.out_features, -(-sizes.in_features // 8)))


def check_bitmask(name: str, bitmask: torch.Tensor, sizes: Sizes) -> None:
    """ValueError unless `nnz` bits are set, all of them of a column."""
    bits = bitmask.numpy()
    used = sizes.in_features % 8
    if used and bool((bits[:, -1] >> used).any()):
        raise ValueError(f"{name}.weight_bitmask has bits set past column {sizes.in_features - 1}, the last one.")
    # int(), as a uint8 count would be summed in a type that depends on the platform
    population = int(np.bitwise_count(bits).sum(dtype=np.int64))
    if population != sizes.nnz:
        raise ValueError(f"{name}.weight_bitmask has {population} bits set, but there are {sizes.nnz} values.")


# -- values after a bitmap ---------------------------------------------------------------------------------------------


def to_bits(mask: torch.Tensor) -> torch.Tensor:
    """The bitmap of a mask `(out, in)`."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def from_bits(bitmask: torch.Tensor, in_features: int) -> torch.Tensor:
    """The mask `(out, in)` of a bitmap."""
    return torch.from_numpy(np.unpackbits(bitmask.numpy(), axis=1, count=in_features, bitorder="little")).bool()


def bitmask_bytes(sizes: Sizes) -> int:
    """Bytes of the bitmap."""
    return sizes.out_features * -(-sizes.in_features // 8) if sizes.sparse else 0


def check_weight(weight: torch.Tensor) -> torch.Tensor:
    """The weight on the CPU, without its gradient; ValueError unless it is a floating point matrix."""
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ValueError(
            f"`weight` must be floating point (out, in), neither of them 0, got {weight.dtype} {tuple(weight.shape)}."
        )
    return weight.detach().cpu()


def check_finite(weight: torch.Tensor, name: str) -> None:
    """ValueError naming the type of values unless all of the weight is finite in it."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"`weight` must be finite, got infinite or NaN entries in {name}.")


def store(rounded: torch.Tensor) -> Tensors:
    """The bitmap and the values of a weight that is rounded: what became zero is not stored."""
    mask = rounded != 0
    return {"weight_bitmask": to_bits(mask), "weight_values": rounded[mask]}


def restore(tensors: Tensors, sizes: Sizes) -> torch.Tensor:
    """The rounded weight that `store` was given."""
    mask = from_bits(tensors["weight_bitmask"], sizes.in_features)
    dense = torch.zeros(mask.shape, dtype=tensors["weight_values"].dtype, device="cpu")
    dense[mask] = tensors["weight_values"]
    return dense


def pack(kind: str, tensors: Tensors, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`ValueFormat.pack` of values after a bitmap, with or without a scale for each row; `kind` is their type in C++."""
    packed = ops.pack(tensors["weight_bitmask"], tensors["weight_values"], sizes.in_features, kind)
    return packed, tensors.get("weight_scales")


def unpack(dtype: torch.dtype, packed: torch.Tensor, scales: torch.Tensor | None) -> Tensors:
    """The inverse of `pack`, with values of `dtype`."""
    bitmask, values = ops.unpack(packed, dtype)
    tensors = {"weight_bitmask": bitmask, "weight_values": values}
    return tensors if scales is None else {**tensors, "weight_scales": scales}
