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
"""The on-disk form of a sparse weight: a bitmask and the packed nonzeros, in plain torch and numpy.

| tensor | dtype, shape | what it is |
|---|---|---|
| `weight_bitmask` | uint8 `(out, ceil(in / 8))` | bit j of byte b of a row is column 8b + j; unused bits are zero |
| `weight_values` | bfloat16 or int8 `(nnz,)` | the nonzeros, row by row, columns ascending |
| `weight_scales` | float32 `(out,)`, int8 only | weight = value * scale of its row, values in -127..127 |

int4 holds what GPTQ and its relatives make, weight = scale * (q - zero), with q and zero in 0..15 and a scale and a zero for each
row and group of columns. Column i is in group `i // group_size`, or `weight_g_idx[i]`. What is q = zero is a zero of the weight:

| tensor | dtype, shape | what it is |
|---|---|---|
| `weight_bitmask` | as above | where q is not its zero; absent where all q are stored ("dense int4") |
| `weight_values` | uint8 `(ceil(count / 2),)` | the q, row by row, two to a byte, the first one low; a last odd nibble is zero |
| `weight_scales` | float16 (where that is exact) or float32 `(out, groups)` | finite |
| `weight_zeros` | uint8 `(out, groups)` | 0..15 |
| `weight_g_idx` | int32 `(in,)` | only if it is not `i // group_size` |

It does not depend on the instruction set; `ops.pack` and `ops.pack_int4` make the tiled forms that the kernels read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .addresses import is_plain


__all__ = ["compress", "compress_int4", "decompress", "decompress_int4", "verify", "verify_int4"]

VALUE_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8}  # that a floating point weight can be rounded to


def compress(weight: torch.Tensor, dtype: str = "bf16") -> dict[str, torch.Tensor]:
    """The on-disk tensors of a dense weight.

    Zeros are counted after rounding: what becomes zero in `dtype` is not stored. int8 is symmetric with one scale for
    each row, scale = max |w| / 127 in float32, rounded half to even.

    Args:
        weight (`torch.Tensor`): floating point `(out, in)`, finite, neither dimension 0. It is not changed.
        dtype (`str`): `"bf16"` or `"int8"`.

    Returns:
        `dict[str, torch.Tensor]` on the CPU: `weight_bitmask`, `weight_values` and, for int8, `weight_scales`.

    Raises:
        ValueError: on any other `dtype`, or a weight that is none of that, or not finite once rounded to `dtype`.
    """
    check_dtype("dtype", dtype)
    if weight.dim() != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ValueError(
            f"`weight` is {weight.dtype} {tuple(weight.shape)}; it has to be floating point (out, in), neither of them 0."
        )
    dense = weight.detach().cpu()
    tensors: dict[str, torch.Tensor] = {}
    if dtype == "bf16":
        rounded = dense.to(torch.bfloat16)
        finite = bool(torch.isfinite(rounded).all())
    else:
        dense = dense.float()
        finite = bool(torch.isfinite(dense).all())
    if not finite:
        raise ValueError(f"`weight` has infinite or NaN entries in {dtype}; all have to be finite.")
    if dtype == "int8":
        scales = dense.abs().amax(dim=1) / 127
        # a row of zeros, or one so small that its scale underflows, has scale 0 and no values
        divisor = scales.masked_fill(scales == 0, 1.0)[:, None]
        # the clamp acts only where a subnormal scale is too coarse for the row's maximum
        rounded = (dense / divisor).round_().clamp_(-127, 127).to(torch.int8)
        tensors["weight_scales"] = scales
    mask = rounded != 0
    tensors["weight_bitmask"] = torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    tensors["weight_values"] = rounded[mask]
    return tensors


def decompress(
    bitmask: torch.Tensor,
    values: torch.Tensor,
    scales: torch.Tensor | None,
    in_features: int,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The dense weight `(out, in)` of tensors that `verify` has passed, scaled in float32 and rounded once.

    Args:
        bitmask, values, scales (`torch.Tensor`): as on disk, on the CPU; `scales` is None for bfloat16 values.
        in_features (`int`): columns of the weight.
        dtype (`torch.dtype`): of the result; by default bfloat16, or float32 for int8 values.
    """
    mask = torch.from_numpy(np.unpackbits(bitmask.numpy(), axis=1, count=in_features, bitorder="little")).bool()
    dense = torch.zeros(mask.shape, dtype=values.dtype, device="cpu")
    dense[mask] = values
    if scales is not None:
        dense = dense.float() * scales[:, None]
    return dense if dtype is None else dense.to(dtype)


def verify(
    name: str,
    tensors: dict[str, torch.Tensor],
    *,
    out_features: int,
    in_features: int,
    nnz: int,
    dtype: str,
) -> None:
    """Check the tensors of one layer, which may come from a damaged or hostile file, against what is said of them.

    Takes memory in proportion to the tensors, whatever the numbers claim.

    Args:
        name (`str`): path of the layer, for the messages.
        tensors (`dict[str, torch.Tensor]`): the three tensors by their names on disk; others (`bias`) are not looked at.
        out_features, in_features, nnz (`int`), dtype (`str`): what the checkpoint's configuration says.

    Raises:
        ValueError: naming the tensor (or the number) that is wrong, what it is and what it has to be.
    """
    check_dtype(f"{name}: dtype", dtype)
    _check_shape(name, out_features, in_features, nnz)
    bytes_per_row = -(-in_features // 8)
    bitmask = _take(name, tensors, "weight_bitmask", torch.uint8, (out_features, bytes_per_row))
    values = _take(name, tensors, "weight_values", VALUE_DTYPES[dtype], (nnz,))
    if dtype == "int8":
        scales = _take(name, tensors, "weight_scales", torch.float32, (out_features,))
        if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
            raise ValueError(f"{name}.weight_scales has entries that are negative, infinite or NaN.")
        if bool((values == -128).any()):
            raise ValueError(f"{name}.weight_values has the value -128; allowed are -127 to 127.")
    elif "weight_scales" in tensors:
        raise ValueError(f"{name}.weight_scales must not be there: the values are bfloat16.")

    _check_bitmask(name, bitmask, in_features, nnz)


def _check_shape(name: str, out_features: int, in_features: int, nnz: int) -> None:
    for key, number, least in (("out_features", out_features, 1), ("in_features", in_features, 1), ("nnz", nnz, 0)):
        if type(number) is not int or not least <= number < 2**62:
            raise ValueError(f"{name}: {key} is {number!r}; it has to be a whole number from {least} up.")
    if nnz > out_features * in_features:
        raise ValueError(f"{name}: nnz is {nnz}, more than the {out_features} x {in_features} weights.")


def _check_bitmask(name: str, bitmask: torch.Tensor, in_features: int, nnz: int) -> None:
    bits = bitmask.numpy()
    used = in_features % 8
    if used and bool((bits[:, -1] >> used).any()):
        raise ValueError(f"{name}.weight_bitmask has bits set past column {in_features - 1}, the last one.")
    # int(), as a uint8 count would be summed in a type that depends on the platform
    population = int(np.bitwise_count(bits).sum(dtype=np.int64))
    if population != nnz:
        raise ValueError(f"{name}.weight_bitmask has {population} bits set, but there are {nnz} values.")


def _take(name: str, tensors: dict[str, Any], key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = tensors.get(key)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name}.{key} is missing; it has to be {dtype} {shape}.")
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}.{key} is {tensor.dtype} {tuple(tensor.shape)}; it has to be {dtype} {shape}.")
    if not is_plain(tensor):
        raise ValueError(
            f"{name}.{key} is a {type(tensor).__name__} on {tensor.device}; it has to be an ordinary dense tensor on the CPU."
        )
    return tensor


def check_dtype(argument: str, dtype: Any) -> None:
    """ValueError unless `dtype` names a type of values."""
    if not isinstance(dtype, str) or dtype not in VALUE_DTYPES:
        raise ValueError(f"`{argument}` is {dtype!r}; allowed are {sorted(VALUE_DTYPES)}.")


# -- int4 --------------------------------------------------------------------------------------------------------------


def compress_int4(
    q: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    g_idx: torch.Tensor | None,
    group_size: int,
    sparse: bool,
) -> dict[str, torch.Tensor]:
    """The on-disk tensors of a quantized weight, without any rounding.

    Args:
        q (`torch.Tensor`): whole numbers `(out, in)`, 0 to 15.
        scales (`torch.Tensor`): floating point `(out, groups)`, finite.
        zeros (`torch.Tensor`): whole numbers `(out, groups)`, 0 to 15.
        g_idx (`torch.Tensor`, *optional*): the group of each column, `(in,)`. All groups have `group_size` columns, but the last
            one may have fewer. Without it column i is in group `i // group_size`.
        group_size (`int`): a multiple of 4, or at least `in`.
        sparse (`bool`): whether to leave out what is zero.

    Raises:
        ValueError: naming the argument that is none of that.
    """
    check_int4(q, scales, zeros, g_idx, group_size)
    stored_scales = scales.detach().cpu().float()
    tensors: dict[str, torch.Tensor] = {}
    groups_of = groups_in_order(q.shape[1], group_size)
    if g_idx is not None:
        given = g_idx.detach().cpu().to(torch.int32)
        if not torch.equal(given, groups_of):
            tensors["weight_g_idx"] = groups_of = given.clone()
    codes, stored_zeros = q.detach().cpu().to(torch.uint8), zeros.detach().cpu().to(torch.uint8)
    if sparse:
        mask = codes != stored_zeros[:, groups_of]
        tensors["weight_bitmask"] = torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
        codes = codes[mask]
    half = stored_scales.half()
    tensors["weight_values"] = _pack_nibbles(codes.flatten())
    tensors["weight_scales"] = half if torch.equal(half.float(), stored_scales) else stored_scales.clone()
    tensors["weight_zeros"] = stored_zeros.clone()
    return tensors


def check_int4(
    q: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor | None, group_size: int
) -> None:
    """ValueError unless these are what `compress_int4` takes."""
    if type(group_size) is not int or not 1 <= group_size < 2**62:
        raise ValueError(f"`group_size` is {group_size!r}; it has to be a whole number from 1 up, below 2^62.")
    if q.dim() != 2 or 0 in q.shape or q.is_floating_point() or q.is_complex() or q.dtype == torch.bool:
        raise ValueError(
            f"`q` is {q.dtype} {tuple(q.shape)}; it has to be whole numbers (out, in), neither of them 0."
        )
    out_features, in_features = q.shape
    groups = -(-in_features // group_size)
    if groups > 1 and group_size % 4:
        raise ValueError(
            f"`group_size` is {group_size}; allowed is a multiple of 4, or one group for all {in_features} columns."
        )
    for key, tensor, floating in (("scales", scales, True), ("zeros", zeros, False)):
        if (
            tuple(tensor.shape) != (out_features, groups)
            or tensor.is_floating_point() != floating
            or tensor.is_complex()
        ):
            raise ValueError(
                f"`{key}` is {tensor.dtype} {tuple(tensor.shape)}; it has to be {'floating point' if floating else 'whole numbers'} "
                f"{(out_features, groups)}, for groups of {group_size}."
            )
    for key, tensor in (("q", q), ("zeros", zeros)):
        least, most = int(tensor.min()), int(tensor.max())
        if least < 0 or most > 15:
            raise ValueError(f"`{key}` has values from {least} to {most}; allowed are 0 to 15.")
    if not bool(torch.isfinite(scales.float()).all()):
        raise ValueError("`scales` has entries that are infinite or NaN in float32; all have to be finite.")
    if g_idx is not None:
        order_of_groups("`g_idx`", g_idx, in_features, group_size)


def int4_codes(
    tensors: dict[str, torch.Tensor], in_features: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(q, groups)` of tensors that `verify_int4` has passed: uint8 `(out, in)`, and the group of each column, `(in,)`."""
    zeros = tensors["weight_zeros"]
    groups_of = tensors.get("weight_g_idx")
    groups_of = groups_in_order(in_features, group_size) if groups_of is None else groups_of
    if "weight_bitmask" not in tensors:
        count = zeros.shape[0] * in_features
        return _unpack_nibbles(tensors["weight_values"], count).view(zeros.shape[0], in_features), groups_of
    bits = np.unpackbits(tensors["weight_bitmask"].numpy(), axis=1, count=in_features, bitorder="little")
    mask, codes = torch.from_numpy(bits).bool(), zeros[:, groups_of]
    codes[mask] = _unpack_nibbles(tensors["weight_values"], int(mask.sum()))
    return codes, groups_of


def decompress_int4(
    tensors: dict[str, torch.Tensor], in_features: int, group_size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The dense weight `(out, in)` of tensors that `verify_int4` has passed, computed in float32 and rounded once."""
    codes, groups_of = int4_codes(tensors, in_features, group_size)
    steps = codes.to(torch.int8) - tensors["weight_zeros"].to(torch.int8)[:, groups_of]
    return (steps.float() * tensors["weight_scales"].float()[:, groups_of]).to(dtype)


def verify_int4(
    name: str,
    tensors: dict[str, torch.Tensor],
    *,
    out_features: int,
    in_features: int,
    nnz: int,
    group_size: int,
    sparse: bool,
) -> None:
    """As `verify`, for int4 values. That no stored value of a sparse weight is its zero, `ops.pack_int4` sees to.

    Args:
        nnz (`int`): how many q are not their zero.
        group_size (`int`), sparse (`bool`): as of `compress_int4`.
    """
    _check_shape(name, out_features, in_features, nnz)
    if type(group_size) is not int or not 1 <= group_size < 2**62:
        raise ValueError(f"{name}: group_size is {group_size!r}; it has to be a whole number from 1 up.")
    if type(sparse) is not bool:
        raise ValueError(f"{name}: sparse is {sparse!r}; it has to be true or false.")
    groups = -(-in_features // group_size)
    if groups > 1 and group_size % 4:
        raise ValueError(
            f"{name}: group_size is {group_size}; allowed is a multiple of 4, or one group for all columns."
        )
    count = nnz if sparse else out_features * in_features
    if sparse:
        bitmask = _take(name, tensors, "weight_bitmask", torch.uint8, (out_features, -(-in_features // 8)))
        _check_bitmask(name, bitmask, in_features, nnz)
    elif "weight_bitmask" in tensors:
        raise ValueError(f"{name}.weight_bitmask must not be there: the weight is dense.")
    values = _take(name, tensors, "weight_values", torch.uint8, (-(-count // 2),))
    if count % 2 and int(values[-1]) >> 4:
        raise ValueError(f"{name}.weight_values has a value behind the {count} that belong to it.")
    half = getattr(tensors.get("weight_scales"), "dtype", None) == torch.float16
    scales = _take(name, tensors, "weight_scales", torch.float16 if half else torch.float32, (out_features, groups))
    if not bool(torch.isfinite(scales).all()):
        raise ValueError(f"{name}.weight_scales has entries that are infinite or NaN.")
    zeros = _take(name, tensors, "weight_zeros", torch.uint8, (out_features, groups))
    if bool((zeros > 15).any()):
        raise ValueError(f"{name}.weight_zeros has the value {int(zeros.max())}; allowed are 0 to 15.")
    if "weight_g_idx" in tensors:
        g_idx = _take(name, tensors, "weight_g_idx", torch.int32, (in_features,))
        order_of_groups(f"{name}.weight_g_idx", g_idx, in_features, group_size)


def groups_in_order(in_features: int, group_size: int) -> torch.Tensor:
    """The group of each column where they are in order, int32 `(in,)`. `group_size` may be beyond any type of numbers."""
    return torch.arange(in_features, dtype=torch.int32, device="cpu") // min(group_size, in_features)


def order_of_groups(name: str, g_idx: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor | None:
    """The columns in the order of their groups, int32 `(in,)`, or None if they are in order.

    Raises:
        ValueError: naming `name`, unless each group has `group_size` columns, the last one what is left.
    """
    if (
        tuple(g_idx.shape) != (in_features,)
        or g_idx.is_floating_point()
        or g_idx.is_complex()
        or g_idx.dtype == torch.bool
    ):
        raise ValueError(f"{name} is {g_idx.dtype} {tuple(g_idx.shape)}; it has to be whole numbers ({in_features},).")
    groups_of = groups_in_order(in_features, group_size).long()
    given = g_idx.detach().cpu().long()
    if torch.equal(given, groups_of):
        return None
    found, order = torch.sort(given, stable=True)
    if not torch.equal(found, groups_of):
        raise ValueError(
            f"{name} does not put {group_size} of the {in_features} columns into each of {int(groups_of[-1]) + 1} groups "
            "(the last one may have fewer)."
        )
    return order.to(torch.int32)


def _pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return codes[::2] | codes[1::2] << 4


def _unpack_nibbles(values: torch.Tensor, count: int) -> torch.Tensor:
    return torch.stack((values & 15, values >> 4), dim=1).flatten()[:count]
