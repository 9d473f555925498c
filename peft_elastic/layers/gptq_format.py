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
"""The tensors of one layer in a GPTQ checkpoint, and the integers that they hold.

With n = 32 / bits values in each 32-bit word, the first in the lowest bits:

    qweight  int32 (in / n, out)       q, packed along the inputs
    qzeros   int32 (groups, out / n)   zero points, packed along the outputs
    scales   float16 (groups, out)     any sign; float32 or bfloat16 in some files
    g_idx    int32 (in,)               the group of each input; int64 in some files, and not there in old ones

There are two conventions for zero points. "gptq_v2" stores z. "gptq", of AutoGPTQ, stores z - 1: here, as in GPTQModel, 1 is
subtracted from each field of a word as if the word were one number, so a field with z = 0 borrows from the field above it.
Other readers add 1 to each field by itself, and some then have 2^bits for z = 0. So z = 0 has no meaning in "gptq" that all
readers share.

A symmetric layer has z = 2^(bits - 1) everywhere, whatever the convention is called: see `convention_of`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .grid import BITS


FORMATS = ("gptq", "gptq_v2")
TENSORS = ("qweight", "qzeros", "scales", "g_idx")

_WORD = 32
_ROUNDING = 2.0**-11  # of float16, relative; less exact only next to zero
_DTYPES = {
    "qweight": (torch.int32,),
    "qzeros": (torch.int32,),
    "scales": (torch.float16, torch.bfloat16, torch.float32),
    "g_idx": (torch.int32, torch.int64),
}


def pack_gptq(name: str, layer: Mapping[str, Any], checkpoint_format: str) -> dict[str, torch.Tensor]:
    """
    The tensors of a layer, by the names in `TENSORS`.

    Args:
        name: of the layer, for messages.
        layer: what `QuantizedLinear.quantized()` returns: `q` uint8 (out, in), `scales` (out, groups), `zeros` uint8 (out,
            groups), `g_idx` (in,) or None, `group_size` and `bits`.
        checkpoint_format: "gptq" or "gptq_v2".

    Raises:
        ValueError: the numbers of inputs and outputs do not fill whole words.
    """
    q, bits, g_idx = layer["q"], layer["bits"], layer["g_idx"]
    check_packable(name, q.shape[0], q.shape[1], bits)
    if g_idx is None:
        g_idx = torch.arange(q.shape[1], device=q.device) // layer["group_size"]
    qzeros = _pack(layer["zeros"].T, bits)
    if checkpoint_format == "gptq":
        qzeros -= _ones(bits)
    return {
        "qweight": _pack(q, bits).T.contiguous(),
        "qzeros": qzeros.contiguous(),
        "scales": layer["scales"].T.to(torch.float16).contiguous(),
        "g_idx": g_idx.to(torch.int32),
    }


def unpack_gptq(
    name: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    out_features: int,
    in_features: int,
    bits: int,
    group_size: int,
    checkpoint_format: str,
    desc_act: bool | None = None,
) -> dict[str, Any]:
    """
    A layer as in `QuantizedLinear.quantized()`, from its tensors, by the names in `TENSORS`.

    Groups with a negative scale come back as their mirror image, -s (z - q), and groups with a scale of zero as q = z: the
    weights are the same.

    Args:
        name: of the layer, for messages.
        out_features, in_features: of the layer in the model.
        bits, group_size, checkpoint_format: of the checkpoint's config. A group size above `in_features` is one group.
        desc_act: of the config: False lets `g_idx` be missing, for groups that follow each other.

    Raises:
        ValueError: naming the tensor that is missing or is not of a layer of this shape, or the scales that float16 cannot hold.
    """
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"{name}: the config's bits must be one of {list(BITS)}, got {bits!r:.100}.")
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise ValueError(
            f"{name}: the config's group_size must be -1 or a whole number >= 1, got {group_size!r:.100}."
        )
    check_packable(name, out_features, in_features, bits)
    size = in_features if group_size == -1 else min(group_size, in_features)
    groups = -(-in_features // size)
    device = next(iter(tensors.values())).device if tensors else None
    in_order = torch.arange(in_features, dtype=torch.int32, device=device) // size
    if "g_idx" not in tensors and desc_act is False:
        tensors = {**tensors, "g_idx": in_order}
    for key, shape in packed_shapes(out_features, in_features, bits, groups).items():
        if key not in tensors:
            hint = " The config has to say that desc_act is false for groups to follow each other." * (key == "g_idx")
            raise ValueError(f"{name}.{key} is missing.{hint}")
        found, dtypes = tensors[key], _DTYPES[key]
        if found.dtype not in dtypes:
            raise ValueError(f"{name}.{key} must be {' or '.join(map(str, dtypes))}, got {found.dtype}.")
        if tuple(found.shape) != shape:
            raise ValueError(
                f"{name}.{key} is {tuple(found.shape)}; a layer {out_features} x {in_features} with {bits} bits and groups of "
                f"{size} has {shape}."
            )
    g_idx = tensors["g_idx"]
    if bool(((g_idx < 0) | (g_idx >= groups)).any()):
        raise ValueError(
            f"{name}.g_idx must be 0 to {groups - 1}; it runs from {int(g_idx.min())} to {int(g_idx.max())}."
        )
    g_idx = g_idx.to(torch.int32)
    members = torch.bincount(g_idx, minlength=groups)
    if int(members.max()) > size:
        raise ValueError(
            f"{name}.g_idx has {int(members.max())} inputs in group {int(members.argmax())}; groups have {size}."
        )
    qzeros = tensors["qzeros"]
    if checkpoint_format == "gptq":
        qzeros = qzeros + _ones(bits)
    q = _unpack(tensors["qweight"].T, bits)
    zeros = _unpack(qzeros, bits).T.contiguous()
    scales = _half(f"{name}.scales", tensors["scales"]).T.contiguous()
    q, zeros = _with_positive(scales, q, zeros, g_idx.long(), 2**bits - 1)
    return {
        "q": q,
        "scales": torch.where(scales == 0, 1, scales.abs()),
        "zeros": zeros,
        "g_idx": None if torch.equal(g_idx, in_order) and in_features % size == 0 else g_idx,
        "group_size": size,
        "bits": bits,
    }


def packed_shapes(out_features: int, in_features: int, bits: int, groups: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a layer with so many groups, by the names in `TENSORS`."""
    return {
        "qweight": (in_features * bits // _WORD, out_features),
        "qzeros": (groups, out_features * bits // _WORD),
        "scales": (groups, out_features),
        "g_idx": (in_features,),
    }


def stored_zeros(qzeros: torch.Tensor, bits: int) -> list[int]:
    """The different values in the fields of `qzeros`, as they are stored."""
    fields: list[int] = _unpack(qzeros, bits).unique().tolist()
    return fields


def convention_of(name: str, fields: list[int], bits: int) -> str:
    """The convention in which the zero points of a symmetric layer are stored, all of which are 2^(bits - 1) by definition. Some
    writers store them as they are whatever they call the format, and readers with kernels for symmetric layers never look.

    Args:
        name: of the layer, for messages.
        fields: what `stored_zeros` returns.

    Raises:
        ValueError: they are neither.
    """
    middle: int = 2 ** (bits - 1)
    if fields == [middle - 1]:
        return "gptq"
    if fields == [middle]:
        return "gptq_v2"
    raise ValueError(
        f"{name}.qzeros holds {_listed(fields)}; by the config the layer is symmetric (sym), which with {bits} bits means "
        f"{middle - 1} everywhere ('gptq') or {middle} ('gptq_v2')."
    )


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")


def _half(name: str, scales: torch.Tensor) -> torch.Tensor:
    """Scales as float16, which is what grids are made of and what other readers make of them."""
    half = scales.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"{name} must be finite in float16.")
    lost = (half.to(torch.float64) - scales.to(torch.float64)).abs() > _ROUNDING * scales.to(torch.float64).abs()
    if bool(lost.any()):
        raise ValueError(
            f"{name} has {int(lost.sum())} values that are too small for float16, such as {scales[lost][0].item():.3g}."
        )
    return half


def _with_positive(
    scales: torch.Tensor, q: torch.Tensor, zeros: torch.Tensor, g_idx: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (out, in) and zero points (out, groups) that mean the same with the absolute values of the scales (out, groups), 1 for 0."""
    negative, none = scales < 0, scales == 0
    if bool(negative.any()):
        zeros = torch.where(negative, top - zeros, zeros)
        q = torch.where(negative[:, g_idx], top - q, q)
    if bool(none.any()):
        q = torch.where(none[:, g_idx], zeros[:, g_idx], q)
    return q, zeros


def check_packable(name: str, out_features: int, in_features: int, bits: int) -> None:
    """ValueError if a layer of this shape does not fill whole words."""
    per_word = _WORD // bits
    for what, number in (("inputs", in_features), ("outputs", out_features)):
        if number < 1 or number % per_word:
            raise ValueError(
                f"{name} has {number} {what}; the GPTQ format packs {per_word} values of {bits} bits into a word, so only "
                f"multiples of {per_word} are allowed. Leave the layer out of the quantisation (exclude_modules)."
            )


def _ones(bits: int) -> int:
    """A word whose fields are all 1."""
    return sum(1 << shift for shift in range(0, _WORD, bits))


def _pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 (rows, n * words) to int32 (rows, words)."""
    per_word = _WORD // bits
    words = values[:, ::per_word].to(torch.int32)
    for place in range(1, per_word):
        words |= values[:, place::per_word].to(torch.int32) << (place * bits)
    return words


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 (rows, words) to uint8 (rows, n * words)."""
    per_word = _WORD // bits
    values = torch.empty(*words.shape, per_word, dtype=torch.uint8, device=words.device)
    for place in range(per_word):
        values[..., place] = (words >> (place * bits)) & (2**bits - 1)
    return values.flatten(1)
