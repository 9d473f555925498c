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
"""Products with the effective weight of an adapted layer, which is never kept.

The effective weight is

    E = W + D * M            (SparsePEFT, https://huggingface.co/papers/2410.03750, equation 1)
    E = s (q - z), q = clamp(round((W + D * M) / s) + z, 0, 2^bits - 1)    (QA-SparsePEFT, section 3.3)

with the update D = B A (the scaling is in B) and the mask M = (W != 0), or one everywhere. Autograd would keep several
tensors of the size of W for the backward pass of each layer. Here the backward pass makes E again, and both passes work on
some rows of W at a time, so that no more than these exist at any moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Optional

import torch
import torch.utils.checkpoint

from ...layers import extension
from ...layers.addresses import address, is_plain, is_watched
from ...layers.grid import Grid


# Of W at a time: for a product, which is efficient with a few hundred rows, and for what goes over a panel element by
# element, several times, which is faster in the cache.
_PANEL_ELEMENTS = 2**21
_BLOCK_ELEMENTS = 2**16
_KERNEL_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # to what C++ calls them


def effective_weight(
    weight: torch.Tensor, lora_B: torch.Tensor, lora_A: torch.Tensor, masked: bool, grid: Optional[Grid]
) -> torch.Tensor:
    """E, (out, in), of the dtype of `weight`; float32 if that cannot tell the values of the grid apart (8 bits in bfloat16).

    Args:
        weight: W (out, in), floating point.
        lora_B, lora_A: (out, k) with the scaling in it, and (k, in).
        masked: whether the update is masked by the zeros of W.
        grid: rounds to these values; None does not round.
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        update = _Update(weight, lora_B, lora_A, masked, grid, None)
        result = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        for rows in _slices(weight, _PANEL_ELEMENTS):
            panel = update.rows(rows)
            result[rows] = panel
            if (
                grid is not None
                and result.dtype != panel.dtype
                and not torch.equal(grid.round_rows(result[rows], rows), panel)
            ):
                result = result.to(panel.dtype)
                result[: rows.start] = grid.round_rows(result[: rows.start], slice(0, rows.start))
                result[rows] = panel
    return result


def effective_linear(
    x: torch.Tensor,
    weight: Optional[torch.Tensor],
    bias: Optional[torch.Tensor],
    lora_B: torch.Tensor,
    lora_A: torch.Tensor,
    masked: bool,
    grid: Optional[Grid],
    minus: Grid | str | None = None,
    read: Optional[Callable[[], torch.Tensor]] = None,
) -> torch.Tensor:
    """y = x E^T + bias, or with E less what the base layer multiplies with, differentiable in x, lora_B and lora_A.

    Args:
        x: (..., in), of any floating dtype; the products are computed in it, or in the dtype of autocast.
        lora_B, lora_A, masked, grid: as in `effective_weight`. E is made in float32 (float64 for float64 weights)
            and rounded once.
        bias: (out,) or None.
        weight: may be None where `read` gives it, in each pass anew.
        minus: "weight" for E - W, which is the masked update itself without a grid; a grid for E less W rounded to it; None for
            E.

    Returns:
        (..., out), of the dtype of the products.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    arguments = x, weight, bias, lora_B, lora_A, masked, grid, minus, dtype, read
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        # otherwise the compiler sees that both passes make E, and keeps it
        return torch.utils.checkpoint.checkpoint(_EffectiveLinear.apply, *arguments, use_reentrant=False)
    return _EffectiveLinear.apply(*arguments)


class _EffectiveLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
        lora_B: torch.Tensor,
        lora_A: torch.Tensor,
        masked: bool,
        grid: Optional[Grid],
        minus: Grid | str | None,
        dtype: torch.dtype,
        read: Optional[Callable[[], torch.Tensor]],
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, lora_B, lora_A)
        ctx.read = read
        ctx.options = masked, grid, minus
        ctx.dtype = dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        with torch.autocast(x.device.type, enabled=False):
            if weight is None:
                weight = read()  # type: ignore[misc]
            inputs = x.reshape(-1, x.shape[-1]).to(dtype)
            update = _Update(weight, lora_B, lora_A, *ctx.options)
            if torch.compiler.is_compiling():  # which knows no slices as `out`
                panel = update.rows(slice(0, weight.shape[0])).to(dtype)
                output = torch.nn.functional.linear(inputs, panel, None if bias is None else bias.to(dtype))
                return output.view(*x.shape[:-1], weight.shape[0])
            output = inputs.new_empty(inputs.shape[0], weight.shape[0])
            for rows in _slices(weight, _PANEL_ELEMENTS):
                panel = update.rows(rows).to(dtype)
                if bias is None:
                    torch.mm(inputs, panel.T, out=output[:, rows])
                else:
                    torch.addmm(bias[rows].to(dtype), inputs, panel.T, out=output[:, rows])
            return output.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        x, weight, lora_B, lora_A = ctx.saved_tensors
        needs_x, _, needs_bias, needs_B, needs_A = ctx.needs_input_grad[:5]
        grad_x = grad_bias = grad_B = grad_A = None
        with torch.autocast(x.device.type, enabled=False):
            if weight is None:
                weight = ctx.read()
            inputs = x.reshape(-1, x.shape[-1]).to(ctx.dtype)
            grad = grad_output.reshape(-1, grad_output.shape[-1]).to(ctx.dtype)
            update = _Update(weight, lora_B, lora_A, *ctx.options)
            if needs_x:
                # the sum over the panels is not to be rounded to bfloat16 after each
                grad_x = torch.zeros_like(inputs, dtype=torch.promote_types(ctx.dtype, update.dtype))
            if needs_B:
                grad_B = torch.empty_like(lora_B, dtype=update.dtype)
            if needs_A:
                grad_A = torch.zeros_like(lora_A, dtype=update.dtype)
            needs_factors = needs_A or needs_B
            for rows in _slices(weight, _PANEL_ELEMENTS):
                slopes = update.slopes(rows) if needs_factors and update.grid is not None else None
                panel = update.rows(rows, slopes)
                part = grad[:, rows]
                if grad_x is not None:
                    if grad_x.dtype == panel.dtype == ctx.dtype:
                        torch.addmm(grad_x, part, panel, beta=int(rows.start > 0), out=grad_x)
                    else:
                        grad_x.add_(part @ panel.to(ctx.dtype))
                if needs_factors:
                    # the gradient of these rows of the weight: formed, masked and contracted at once, in the space of the panel
                    free = panel if panel.dtype == ctx.dtype and not torch.compiler.is_compiling() else None
                    grad_panel = update.gradient(torch.mm(part.T, inputs, out=free), rows, slopes)
                    if grad_B is not None:
                        torch.mm(grad_panel, update.lora_A.T, out=grad_B[rows])
                    if grad_A is not None:
                        grad_A.addmm_(update.lora_B[rows].T, grad_panel)
            if needs_bias:
                grad_bias = grad.sum(0).to(ctx.bias_dtype)
            if grad_x is not None:
                grad_x = grad_x.view(x.shape).to(x.dtype)
            if grad_B is not None:
                grad_B = grad_B.to(lora_B.dtype)
            if grad_A is not None:
                grad_A = grad_A.to(lora_A.dtype)
        return grad_x, None, grad_bias, grad_B, grad_A, None, None, None, None, None


def _slices(matrix: torch.Tensor, elements: int) -> Iterator[slice]:
    """The rows of a matrix, so many elements at a time."""
    count, length = matrix.shape
    if torch.compiler.is_compiling():
        return iter((slice(0, count),))  # a loop would be unrolled; the compiler makes blocks of its own
    step = max(16, elements // max(1, length))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


class _Update:
    """Makes rows of what the inputs are multiplied with."""

    def __init__(
        self,
        weight: torch.Tensor,
        lora_B: torch.Tensor,
        lora_A: torch.Tensor,
        masked: bool,
        grid: Optional[Grid],
        minus: Grid | str | None,
    ) -> None:
        self.dtype = torch.promote_types(torch.promote_types(weight.dtype, lora_A.dtype), torch.float32)
        self.weight, self.lora_B, self.lora_A = weight, lora_B.to(self.dtype), lora_A.to(self.dtype)
        self.masked, self.grid, self.minus = masked, grid, minus
        self._panel: Optional[torch.Tensor] = None
        self._slopes: Optional[torch.Tensor] = None

    def slopes(self, rows: slice) -> torch.Tensor:
        """Space for the slopes of these rows, the same for all."""
        self._slopes = self._space(self._slopes, rows)
        return self._slopes[: rows.stop - rows.start]

    def _space(self, space: Optional[torch.Tensor], rows: slice) -> torch.Tensor:
        # Memory from the system costs as much as going over it several times.
        if space is not None:
            return space
        return self.weight.new_empty((rows.stop - rows.start, self.weight.shape[1]), dtype=self.dtype)

    def rows(self, rows: slice, slopes: Optional[torch.Tensor] = None) -> torch.Tensor:
        """These rows, (len(rows), in). `slopes`, of that shape, is filled with 1 where they follow the update and with 0
        where they are constant."""
        if torch.compiler.is_compiling():
            panel = self.lora_B[rows] @ self.lora_A
        else:
            self._panel = self._space(self._panel, rows)
            panel = torch.mm(self.lora_B[rows], self.lora_A, out=self._panel[: rows.stop - rows.start])
        self._go_over(panel, rows, slopes, self._adds, self.grid)
        if isinstance(self.minus, Grid):
            panel.sub_(self.minus.round_rows(self.weight[rows].to(self.dtype), rows))
        elif self.minus == "weight" and self._adds:
            panel.sub_(self.weight[rows])
        return panel

    def gradient(self, gradient: torch.Tensor, rows: slice, slopes: Optional[torch.Tensor]) -> torch.Tensor:
        """The gradient with respect to these rows of the update, given that with respect to what `rows` returned with these
        `slopes`; both are changed. Without a grid the mask is all there is to it, and slopes are not needed."""
        gradient = gradient.to(self.dtype)
        if slopes is not None:
            return slopes.mul_(gradient)
        if self.masked:
            self._go_over(gradient, rows, None, adds=False, grid=None)
        return gradient

    @property
    def _adds(self) -> bool:
        return self.grid is not None or self.minus != "weight"

    def _go_over(
        self, panel: torch.Tensor, rows: slice, slopes: Optional[torch.Tensor], adds: bool, grid: Optional[Grid]
    ) -> None:
        """Mask the panel, add the weight, and round the sum, each as asked for, in place."""
        if self._has_kernel():
            self._fill_by_kernel(panel, rows, slopes, adds, grid)
            return
        for part in _slices(panel, _BLOCK_ELEMENTS):
            here = slice(rows.start + part.start, rows.start + part.stop)
            self._fill(panel[part], here, None if slopes is None else slopes[part], adds, grid)

    def _fill(
        self, block: torch.Tensor, rows: slice, slopes: Optional[torch.Tensor], adds: bool, grid: Optional[Grid]
    ) -> None:
        weight = self.weight[rows].to(self.dtype)
        if self.masked:
            # a mask of floats, as comparisons and products are several times as fast with it as with one of bools
            block.mul_(torch.ne(weight, 0, out=torch.empty_like(block) if slopes is None else slopes))
        elif slopes is not None:
            slopes.fill_(1)
        if adds:
            block.add_(weight)
        if grid is not None:
            # the gradient passes straight through the rounding, and not where the clamp is constant
            inside = None if slopes is None else torch.empty_like(slopes)
            block.copy_(grid.round_rows(block, rows, inside))
            if slopes is not None and inside is not None:
                slopes.mul_(inside)

    def _has_kernel(self) -> bool:
        weight, grid = self.weight, self.grid
        return (
            extension._C is not None
            and not is_watched()
            and is_plain(weight)
            and weight.dtype in _KERNEL_DTYPES
            and self.dtype == torch.float32
            and weight.stride(1) == 1
            and weight.stride(0) >= weight.shape[1]  # not so in the weight of a Conv1D with one output
            and (grid is None or grid.in_order)
        )

    def _fill_by_kernel(
        self, panel: torch.Tensor, rows: slice, slopes: Optional[torch.Tensor], adds: bool, grid: Optional[Grid]
    ) -> None:
        """What `_fill` computes, to the last bit, in one pass."""
        weight = self.weight[rows]
        scales = zeros = None
        if grid is not None:
            scales, zeros = grid.scales[rows].float().contiguous(), grid.zeros[rows].float().contiguous()
            groups = weight.shape[0], weight.shape[1] // grid.group_size
        extension._C.effective_panel(  # type: ignore[union-attr]
            weight=weight.data_ptr(),
            weight_type=getattr(extension._C.FloatType, _KERNEL_DTYPES[weight.dtype]),  # type: ignore[union-attr]
            rows=weight.shape[0],
            columns=weight.shape[1],
            weight_stride=weight.stride(0),
            panel=address("panel", panel, torch.float32, weight.shape),
            slopes=0 if slopes is None else address("slopes", slopes, torch.float32, weight.shape),
            masked=self.masked,
            add=adds,
            scales=0 if scales is None else address("scales", scales, torch.float32, groups),
            zeros=0 if zeros is None else address("zeros", zeros, torch.float32, groups),
            group_size=0 if grid is None else grid.group_size,
            top=0 if grid is None else 2**grid.bits - 1,
            threads=torch.get_num_threads(),
        )
