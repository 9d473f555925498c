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
"""int4 values: the whole numbers of a grid, weight = scale * (q - zero), with q and zero in 0..15 and a scale and a zero for each row
and group of columns."""

from __future__ import annotations

import torch

from ...common.checks import is_whole, wrong
from .. import ops
from ..groups import groups_in_order, order_of_groups
from . import base
from .base import LIMIT, Sizes, Tensors, ValueFormat


def _compress(
    q: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor | None,
    group_size: int,
    sparse: bool,
) -> Tensors:
    """The on-disk tensors of a quantized weight, without any rounding; the arguments are those of `_check`, and `sparse`
    whether to leave out what is zero."""
    _check(q, scales, zeros, g_idx, group_size)
    stored_scales = scales.detach().cpu().float()
    tensors: Tensors = {}
    groups_of = groups_in_order(q.shape[1], group_size)
    if g_idx is not None:
        given = g_idx.detach().cpu().to(torch.int32)
        if not torch.equal(given, groups_of):
            tensors["weight_g_idx"] = groups_of = given.clone()
    codes, stored_zeros = q.detach().cpu().to(torch.uint8), zeros.detach().cpu().to(torch.uint8)
    if sparse:
        mask = codes != stored_zeros[:, groups_of]
        tensors["weight_bitmask"] = base.to_bits(mask)
        codes = codes[mask]
    tensors["weight_values"] = _pack_nibbles(codes.flatten())
    tensors["weight_scales"] = _as_stored(stored_scales)
    tensors["weight_zeros"] = stored_zeros.clone()
    return tensors


def _check(
    q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor | None, group_size: int
) -> None:
    """Check what int4 is made from.

    Args:
        q (`torch.Tensor`): whole numbers `(out, in)`, 0 to 15.
        scales (`torch.Tensor`): floating point `(out, groups)`, finite.
        zeros (`torch.Tensor`): whole numbers `(out, groups)`, 0 to 15.
        g_idx (`torch.Tensor`, *optional*): the group of each column, `(in,)`. All groups have `group_size` columns, but the last
            one may have fewer. Without it column i is in group `i // group_size`.
        group_size (`int`): a multiple of 4, or at least `in`.

    Raises:
        ValueError: naming the argument that is none of that.
    """
    if not is_whole(group_size) or not 1 <= group_size < LIMIT:
        raise wrong("group_size", "a whole number >= 1, below 2^62", group_size)
    if q.dim() != 2 or 0 in q.shape or q.is_floating_point() or q.is_complex() or q.dtype == torch.bool:
        raise ValueError(f"`q` must be whole numbers (out, in), neither of them 0, got {q.dtype} {tuple(q.shape)}.")
    out_features, in_features = q.shape
    groups = -(-in_features // group_size)
    if groups > 1 and group_size % 4:
        raise wrong("group_size", f"a multiple of 4, or one group for all {in_features} columns", group_size)
    for key, tensor, floating in (("scales", scales, True), ("zeros", zeros, False)):
        if (
            tuple(tensor.shape) != (out_features, groups)
            or tensor.is_floating_point() != floating
            or tensor.is_complex()
        ):
            raise ValueError(
                f"`{key}` must be {'floating point' if floating else 'whole numbers'} {(out_features, groups)}, for groups of "
                f"{group_size}, got {tensor.dtype} {tuple(tensor.shape)}."
            )
    for key, tensor in (("q", q), ("zeros", zeros)):
        least, most = int(tensor.min()), int(tensor.max())
        if least < 0 or most > 15:
            raise ValueError(f"`{key}` must be 0 to 15, got values from {least} to {most}.")
    if not bool(torch.isfinite(scales.float()).all()):
        raise ValueError("`scales` must be finite, got entries that are infinite or NaN in float32.")
    if g_idx is not None:
        order_of_groups("`g_idx`", g_idx, in_features, group_size)


def _codes(tensors: Tensors, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    zeros, in_features = tensors["weight_zeros"], sizes.in_features
    groups_of = tensors.get("weight_g_idx")
    groups_of = groups_in_order(in_features, sizes.group_size) if groups_of is None else groups_of
    if "weight_bitmask" not in tensors:
        count = zeros.shape[0] * in_features
        return _unpack_nibbles(tensors["weight_values"], count).view(zeros.shape[0], in_features), groups_of
    mask, codes = base.from_bits(tensors["weight_bitmask"], in_features), zeros[:, groups_of]
    codes[mask] = _unpack_nibbles(tensors["weight_values"], int(mask.sum()))
    return codes, groups_of


def _decompress(tensors: Tensors, sizes: Sizes, dtype: torch.dtype | None = None) -> torch.Tensor:
    codes, groups_of = _codes(tensors, sizes)
    steps = codes.to(torch.int8) - tensors["weight_zeros"].to(torch.int8)[:, groups_of]
    return (steps.float() * tensors["weight_scales"].float()[:, groups_of]).to(dtype or torch.float32)


def _verify(name: str, tensors: Tensors, sizes: Sizes) -> None:
    # that no stored value of a sparse weight is its zero, `pack` sees to
    base.check_sizes(name, sizes)
    out_features, in_features, nnz, group_size, sparse = sizes
    if not is_whole(group_size) or not 1 <= group_size < LIMIT:
        raise ValueError(f"{name}: group_size must be a whole number >= 1, got {group_size!r:.50}.")
    if type(sparse) is not bool:
        raise ValueError(f"{name}: sparse must be true or false, got {sparse!r:.50}.")
    groups = -(-in_features // group_size)
    if groups > 1 and group_size % 4:
        raise ValueError(
            f"{name}: group_size must be a multiple of 4, or one group for all columns, got {group_size}."
        )
    count = nnz if sparse else out_features * in_features
    if sparse:
        base.check_bitmask(name, base.take_bitmask(name, tensors, sizes), sizes)
    elif "weight_bitmask" in tensors:
        raise ValueError(f"{name}.weight_bitmask must not be there: the weight is dense.")
    values = base.take(name, tensors, "weight_values", torch.uint8, (-(-count // 2),))
    if count % 2 and int(values[-1]) >> 4:
        raise ValueError(f"{name}.weight_values has a value behind the {count} that belong to it.")
    half = getattr(tensors.get("weight_scales"), "dtype", None) == torch.float16
    of_scales = torch.float16 if half else torch.float32
    scales = base.take(name, tensors, "weight_scales", of_scales, (out_features, groups))
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(f"{name}.weight_scales must be finite, got infinite or NaN entries.")
    zeros = base.take(name, tensors, "weight_zeros", torch.uint8, (out_features, groups))
    if bool((zeros > 15).any()):
        raise ValueError(f"{name}.weight_zeros must be 0 to 15, got {int(zeros.max())}.")
    if "weight_g_idx" in tensors:
        g_idx = base.take(name, tensors, "weight_g_idx", torch.int32, (in_features,))
        order_of_groups(f"{name}.weight_g_idx", g_idx, in_features, group_size)


def _pack(tensors: Tensors, sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor | None]:
    return ops.pack_int4(tensors, sizes.in_features, sizes.group_size), None  # its scales are packed with it


def _unpack(packed: torch.Tensor, scales: torch.Tensor | None) -> Tensors:
    tensors = ops.unpack_int4(packed)
    return tensors | {"weight_scales": _as_stored(tensors["weight_scales"])}


def _bytes(sizes: Sizes) -> int:
    count = sizes.nnz if sizes.sparse else sizes.out_features * sizes.in_features
    groups = sizes.out_features * -(-sizes.in_features // sizes.group_size)
    return base.bitmask_bytes(sizes) + -(-count // 2) + 3 * groups  # float16 scales, a byte for each zero


def _as_stored(scales: torch.Tensor) -> torch.Tensor:
    """float16, where that is exact."""
    half = scales.half()
    return half if torch.equal(half.float(), scales) else scales.clone()


def _pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return codes[::2] | codes[1::2] << 4


def _unpack_nibbles(values: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack((values & 15, values >> 4), dim=1).flatten()[:count]


INT4 = ValueFormat(
    name="int4",
    tensors={
        "weight_bitmask": (torch.uint8,),
        "weight_values": (torch.uint8,),
        "weight_scales": (torch.float16, torch.float32),
        "weight_zeros": (torch.uint8,),
        "weight_g_idx": (torch.int32,),
    },
    compress=_compress,
    verify=_verify,
    decompress=_decompress,
    pack=_pack,
    unpack=_unpack,
    bytes=_bytes,
    bits=4,
    check=_check,
    codes=_codes,
    optional=frozenset({"weight_g_idx"}),
)
