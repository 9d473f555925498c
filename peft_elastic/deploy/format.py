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

It does not depend on the instruction set; `ops.pack` makes the tiled form that the kernels read.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


__all__ = ["compress", "decompress", "verify"]

VALUE_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8}


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
        divisor = torch.where(scales > 0, scales, 1.0)[:, None]
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
    dense = torch.zeros(mask.shape, dtype=values.dtype)
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
    for key, number, least in (("out_features", out_features, 1), ("in_features", in_features, 1), ("nnz", nnz, 0)):
        if type(number) is not int or not least <= number < 2**62:
            raise ValueError(f"{name}: {key} is {number!r}; it has to be a whole number from {least} up.")
    if nnz > out_features * in_features:
        raise ValueError(f"{name}: nnz is {nnz}, more than the {out_features} x {in_features} weights.")

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
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(f"{name}.{key} is on {tensor.device}; it has to be a dense tensor on the CPU.")
    return tensor


def check_dtype(argument: str, dtype: Any) -> None:
    """ValueError unless `dtype` names a type of values."""
    if not isinstance(dtype, str) or dtype not in VALUE_DTYPES:
        raise ValueError(f"`{argument}` is {dtype!r}; allowed are {sorted(VALUE_DTYPES)}.")
