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
"""The effective weight on a GPU, in one pass over the update, and the gradient of the update: kernels in Triton.

They compute what the operators of torch do in effective_weight.py, in the same order: products, sums and the division are
rounded one by one (no product is fused with a sum, see `_OPTIONS`; the division is the exact one), to nearest, halves to even.

Importing this module imports Triton. `TRITON_INTERPRET=1`, set before that, lets it run on the CPU, slowly.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import triton
import triton.language as tl

from ...layers.grid import Grid


# Entries of a matrix that one program works on: some rows, as a transposed weight (Conv1D) is read down its columns.
_BLOCK_ROWS = 16
_BLOCK_COLUMNS = 128
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# Adding and subtracting this rounds float32 to a whole number, half to even, below 2^22 in magnitude: 1.5 * 2^23.
_ROUND = tl.constexpr(12582912.0)


@triton.jit
def _fill_kernel(
    panel,
    weight,
    scales,
    zeros,
    g_idx,
    out,
    slopes,
    rows,
    columns,
    weight_row,
    weight_column,
    groups,
    group_size,
    TOP: tl.constexpr,
    MASKED: tl.constexpr,
    ADD: tl.constexpr,
    GRID: tl.constexpr,
    IN_ORDER: tl.constexpr,
    SUBTRACT: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    there = (row < rows) & (column < columns)
    wide_row, wide_column = row.to(tl.int64), column.to(tl.int64)  # a weight may have more than 2^31 elements
    at = wide_row * columns + wide_column
    w = tl.load(weight + wide_row * weight_row + wide_column * weight_column, mask=there, other=0).to(tl.float32)
    value = tl.load(panel + at, mask=there, other=0)
    slope = there
    if MASKED:
        slope = w != 0
        value = value * slope.to(tl.float32)
    if ADD:
        value = value + w
    if GRID:
        if IN_ORDER:
            group = column // group_size
        else:
            group = tl.load(g_idx + column, mask=column < columns, other=0)
        of_group = wide_row * groups + group
        scale = tl.load(scales + of_group, mask=there, other=1).to(tl.float32)
        low = -tl.load(zeros + of_group, mask=there, other=0).to(tl.float32)
        high = low + TOP
        # one step outside of the range is enough to tell that it is outside; a NaN stays one
        steps = tl.div_rn(value, scale)
        steps = tl.where(steps < low - 1, low - 1, steps)
        steps = tl.where(steps > high + 1, high + 1, steps)
        steps = (steps + _ROUND) - _ROUND
        slope = slope & (steps >= low) & (steps <= high)
        steps = tl.where(steps < low, low, steps)
        steps = tl.where(steps > high, high, steps)
        value = steps * scale
    if SUBTRACT:
        value = value - w
    tl.store(out + at, value.to(out.dtype.element_ty), mask=there)
    if SLOPES:
        tl.store(slopes + at, slope.to(tl.uint8), mask=there)


@triton.jit
def _mask_kernel(
    gradient,
    mask,
    out,
    rows,
    columns,
    mask_row,
    mask_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    there = (row < rows) & (column < columns)
    wide_row, wide_column = row.to(tl.int64), column.to(tl.int64)
    at = wide_row * columns + wide_column
    keep = tl.load(mask + wide_row * mask_row + wide_column * mask_column, mask=there, other=0) != 0
    value = tl.load(gradient + at, mask=there, other=0).to(tl.float32)
    tl.store(out + at, value * keep.to(tl.float32), mask=there)


def fill(
    panel: torch.Tensor,
    weight: torch.Tensor,
    masked: bool,
    adds: bool,
    grid: Optional[Grid],
    rows: slice,
    subtract: bool,
    dtype: torch.dtype,
    with_slopes: bool,
) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
    """The update masked, added to the weight and rounded, each as asked for, less the weight if `subtract`.

    Args:
        panel: rows `rows` of the update, float32 and contiguous. Written to where `dtype` is float32 too.
        weight: those rows of the weight, of any floating dtype up to float32 and any strides.
        grid: that of the whole layer, on the same device.
        dtype: what to round the result to.

    Returns:
        The result, and, `with_slopes`, uint8: 1 where it follows the update and 0 where it is constant.
    """
    count, columns = panel.shape
    out = panel if panel.dtype == dtype else torch.empty_like(panel, dtype=dtype)
    slopes = torch.empty_like(panel, dtype=torch.uint8) if with_slopes else None
    if panel.numel() == 0:
        return out, slopes
    if grid is None:
        scales = zeros = g_idx = panel  # not read
        groups = group_size = top = 1
        in_order = True
    else:
        scales, zeros, g_idx = grid.scales[rows].contiguous(), grid.zeros[rows].contiguous(), grid.g_idx
        groups, group_size, top, in_order = scales.shape[1], grid.group_size, 2**grid.bits - 1, grid.in_order
    _launch(
        _fill_kernel,
        panel,
        (
            panel,
            weight,
            scales,
            zeros,
            g_idx,
            out,
            panel if slopes is None else slopes,
            count,
            columns,
            *weight.stride(),
        ),
        groups=groups,
        group_size=group_size,
        TOP=top,
        MASKED=masked,
        ADD=adds,
        GRID=grid is not None,
        IN_ORDER=in_order,
        SUBTRACT=subtract,
        SLOPES=with_slopes,
    )
    return out, slopes


def mask_gradient(gradient: torch.Tensor, mask: torch.Tensor, space: Optional[torch.Tensor] = None) -> torch.Tensor:
    """The gradient (rows, columns), contiguous, in float32, where `mask`, of any dtype and strides, is not zero, and zero
    elsewhere. Written into `space`, of that shape, float32 and contiguous; else over `gradient`, if that is float32, or into
    memory of its own."""
    out = gradient if space is None and gradient.dtype == torch.float32 else space
    if out is None:
        out = torch.empty_like(gradient, dtype=torch.float32)
    if gradient.numel():
        _launch(_mask_kernel, gradient, (gradient, mask, out, *gradient.shape, *mask.stride()))
    return out


def _launch(kernel: Any, like: torch.Tensor, arguments: tuple[Any, ...], **options: Any) -> None:
    rows, columns = like.shape
    programs = triton.cdiv(rows, _BLOCK_ROWS), triton.cdiv(columns, _BLOCK_COLUMNS)
    options.update(BLOCK_ROWS=_BLOCK_ROWS, BLOCK_COLUMNS=_BLOCK_COLUMNS, **_OPTIONS)
    if like.device.type == "cpu":
        kernel[programs](*arguments, **options)
        return
    # Triton launches on the current device, which need not be that of the tensors in a model on several
    with torch.get_device_module(like.device).device(like.device):
        kernel[programs](*arguments, **options)
