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
"""int8 values: a weight rounded symmetrically, with one scale for each row, scale = max |w| / 127 in float32, half to even."""

from __future__ import annotations

from functools import partial

import torch

from . import base
from .base import Sizes, Tensors, ValueFormat


def _compress(weight: torch.Tensor) -> Tensors:
    dense = base.check_weight(weight).float()
    base.check_finite(dense, "int8")
    scales = dense.abs().amax(dim=1) / 127
    # a row of zeros, or one so small that its scale underflows, has scale 0 and no values
    divisor = scales.masked_fill(scales == 0, 1.0)[:, None]
    # the clamp acts only where a subnormal scale is too coarse for the row's maximum
    return base.store((dense / divisor).round_().clamp_(-127, 127).to(torch.int8)) | {"weight_scales": scales}


def _verify(name: str, tensors: Tensors, sizes: Sizes) -> None:
    base.check_sizes(name, sizes)
    bitmask = base.take_bitmask(name, tensors, sizes)
    values = base.take(name, tensors, "weight_values", torch.int8, (sizes.nnz,))
    scales = base.take(name, tensors, "weight_scales", torch.float32, (sizes.out_features,))
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise ValueError(f"{name}.weight_scales must be finite and >= 0, got negative, infinite or NaN entries.")
    if bool((values == -128).any()):
        raise ValueError(f"{name}.weight_values must be -127 to 127, got -128.")
    base.check_bitmask(name, bitmask, sizes)


def _decompress(tensors: Tensors, sizes: Sizes, dtype: torch.dtype | None = None) -> torch.Tensor:
    dense = base.restore(tensors, sizes).float() * tensors["weight_scales"][:, None]
    return dense if dtype is None else dense.to(dtype)


INT8 = ValueFormat(
    name="int8",
    tensors={"weight_bitmask": (torch.uint8,), "weight_values": (torch.int8,), "weight_scales": (torch.float32,)},
    compress=_compress,
    verify=_verify,
    decompress=_decompress,
    pack=partial(base.pack, "int8"),
    unpack=partial(base.unpack, torch.int8),
    bytes=lambda sizes: base.bitmask_bytes(sizes) + sizes.nnz + 4 * sizes.out_features,
)
