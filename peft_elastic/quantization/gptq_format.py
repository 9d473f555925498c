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
    scales   float16 (groups, out)
    g_idx    int32 (in,)               the group of each input

There are two conventions for zero points. "gptq_v2" stores z. "gptq", of AutoGPTQ, stores z - 1: here, as in GPTQModel, 1 is
subtracted from each field of a word as if the word were one number, so a field with z = 0 borrows from the field above it.
Other readers add 1 to each field by itself, and some then have 2^bits for z = 0. So z = 0 has no meaning in "gptq" that all
readers share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .grid import BITS


FORMATS = ("gptq", "gptq_v2")
TENSORS = ("qweight", "qzeros", "scales", "g_idx")

_WORD = 32
_SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


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
) -> dict[str, Any]:
    """
    A layer as in `QuantizedLinear.quantized()`, from its tensors, by the names in `TENSORS`.

    Args:
        name: of the layer, for messages.
        out_features, in_features: of the layer in the model.
        bits, group_size, checkpoint_format: of the checkpoint's config.

    Raises:
        ValueError: naming the tensor that is missing or is not of a layer of this shape.
    """
    if isinstance(bits, bool) or bits not in BITS:
        raise ValueError(f"{name}: bits is {bits!r} in the checkpoint's config; allowed are {list(BITS)}.")
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise ValueError(
            f"{name}: group_size is {group_size!r} in the checkpoint's config; allowed are -1 and 1 upwards."
        )
    check_packable(name, out_features, in_features, bits)
    size = in_features if group_size == -1 else group_size
    groups = -(-in_features // size)
    shapes = {
        "qweight": (in_features * bits // _WORD, out_features),
        "qzeros": (groups, out_features * bits // _WORD),
        "scales": (groups, out_features),
        "g_idx": (in_features,),
    }
    for key, shape in shapes.items():
        if key not in tensors:
            raise ValueError(f"{name}.{key} is missing.")
        found, dtypes = tensors[key], _SCALE_DTYPES if key == "scales" else (torch.int32,)
        if found.dtype not in dtypes:
            raise ValueError(f"{name}.{key} is {found.dtype}; allowed are {', '.join(map(str, dtypes))}.")
        if tuple(found.shape) != shape:
            raise ValueError(
                f"{name}.{key} is {tuple(found.shape)}; a layer {out_features} x {in_features} with {bits} bits and groups of "
                f"{size} has {shape}."
            )
    scales = tensors["scales"].to(torch.float16)
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        raise ValueError(f"{name}.scales must be positive and finite in float16.")
    g_idx = tensors["g_idx"]
    if bool(((g_idx < 0) | (g_idx >= groups)).any()):
        raise ValueError(
            f"{name}.g_idx must be 0 to {groups - 1}; it runs from {int(g_idx.min())} to {int(g_idx.max())}."
        )
    members = torch.bincount(g_idx, minlength=groups)
    if int(members.max()) > size:
        raise ValueError(
            f"{name}.g_idx has {int(members.max())} inputs in group {int(members.argmax())}; groups have {size}."
        )
    qzeros = tensors["qzeros"]
    if checkpoint_format == "gptq":
        qzeros = qzeros + _ones(bits)
    in_order = torch.equal(g_idx, (torch.arange(in_features, device=g_idx.device) // size).to(torch.int32))
    return {
        "q": _unpack(tensors["qweight"].T, bits),
        "scales": scales.T.contiguous(),
        "zeros": _unpack(qzeros, bits).T.contiguous(),
        "g_idx": None if in_order and in_features % size == 0 else g_idx,
        "group_size": size,
        "bits": bits,
    }


def check_packable(name: str, out_features: int, in_features: int, bits: int) -> None:
    """ValueError if a layer of this shape does not fill whole words."""
    per_word = _WORD // bits
    for what, number in (("inputs", in_features), ("outputs", out_features)):
        if number % per_word:
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
