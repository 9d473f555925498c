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
"""bfloat16 values: a weight rounded to them, without scales."""

from __future__ import annotations

from functools import partial

import torch

from . import base
from .base import Sizes, Tensors, ValueFormat


def _compress(weight: torch.Tensor) -> Tensors:
    rounded = base.check_weight(weight).to(torch.bfloat16)
    base.check_finite(rounded, "bf16")
    return base.store(rounded)


def _verify(name: str, tensors: Tensors, sizes: Sizes) -> None:
    base.check_sizes(name, sizes)
    bitmask = base.take_bitmask(name, tensors, sizes)
    base.take(name, tensors, "weight_values", torch.bfloat16, (sizes.nnz,))
    if "weight_scales" in tensors:
        raise ValueError(f"{name}.weight_scales must not be there: the values are bfloat16.")
    base.check_bitmask(name, bitmask, sizes)


def _decompress(tensors: Tensors, sizes: Sizes, dtype: torch.dtype | None = None) -> torch.Tensor:
    return base.restore(tensors, sizes).to(dtype or torch.bfloat16)


BF16 = ValueFormat(
    name="bf16",
    tensors={"weight_bitmask": (torch.uint8,), "weight_values": (torch.bfloat16,)},
    compress=_compress,
    verify=_verify,
    decompress=_decompress,
    pack=partial(base.pack, "bf16"),
    unpack=partial(base.unpack, torch.bfloat16),
    bytes=lambda sizes: base.bitmask_bytes(sizes) + 2 * sizes.nnz,
)
