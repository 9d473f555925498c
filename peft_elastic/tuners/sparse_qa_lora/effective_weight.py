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
some rows of W at a time, so that no more than these exist at any moment. How many they are is a matter of the device
(devices.py).

E is made by C++ or by torch on the CPU, by Triton or by torch elsewhere, and by torch wherever it must see each operator
(torch.compile, modes of dispatch). Nothing here reads a value on the host: a GPU is never waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.utils.checkpoint

from ...layers import extension
from ...layers.addresses import address, is_plain, is_watched
from ...layers.grid import Grid
from . import devices


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
        for rows in update.slices():
            panel, _ = update.panel(rows, update.dtype)
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
            slices = update.slices()
            if len(slices) == 1:
                panel, _ = update.panel(slices[0], dtype)
                output = torch.nn.functional.linear(inputs, panel, None if bias is None else bias.to(dtype))
                return output.view(*x.shape[:-1], weight.shape[0])
            output = inputs.new_empty(inputs.shape[0], weight.shape[0])
            for rows in slices:
                panel, _ = update.panel(rows, dtype)
                if bias is None:
                    torch.mm(inputs, panel.T, out=output[:, rows])
                else:
                    torch.addmm(bias[rows].to(dtype), inputs, panel.T, out=output[:, rows])
                del panel  # before the next one is made
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
            needs_factors = needs_A or needs_B
            slices = update.slices()
            for rows in slices:
                panel, slopes = update.panel(rows, ctx.dtype, needs_factors)
                part = grad if len(slices) == 1 else grad[:, rows]
                if needs_x:
                    if len(slices) == 1:
                        grad_x = torch.mm(part, panel)
                    elif ctx.dtype == update.dtype:
                        grad_x = torch.mm(part, panel) if grad_x is None else grad_x.addmm_(part, panel)
                    else:
                        # the sum over the panels is not to be rounded to bfloat16 after each
                        summand = torch.mm(part, panel)
                        wide = torch.promote_types(ctx.dtype, update.dtype)
                        grad_x = summand.to(wide) if grad_x is None else grad_x.add_(summand)
                if not needs_factors:
                    del panel, slopes
                    continue
                # the gradient of these rows of the weight: formed, masked and contracted at once, in the space of the panel
                free = None if torch.compiler.is_compiling() else panel
                grad_panel = update.gradient(torch.mm(part.T, inputs, out=free), rows, slopes)
                if needs_B and len(slices) == 1:
                    grad_B = torch.mm(grad_panel, update.lora_A.T)
                elif needs_B:
                    if grad_B is None:
                        grad_B = torch.empty_like(lora_B, dtype=update.dtype)
                    torch.mm(grad_panel, update.lora_A.T, out=grad_B[rows])
                if needs_A:
                    factor = update.lora_B[rows].T
                    grad_A = torch.mm(factor, grad_panel) if grad_A is None else grad_A.addmm_(factor, grad_panel)
                del panel, slopes, free, grad_panel  # before the next of them are made
            if needs_bias:
                grad_bias = grad.sum(0).to(ctx.bias_dtype)
            if grad_x is not None:
                grad_x = grad_x.view(x.shape).to(x.dtype)
            if grad_B is not None:
                grad_B = grad_B.to(lora_B.dtype)
            if grad_A is not None:
                grad_A = grad_A.to(lora_A.dtype)
        return grad_x, None, grad_bias, grad_B, grad_A, None, None, None, None, None


def _slices(matrix: torch.Tensor, elements: int) -> list[slice]:
    """The rows of a matrix, so many elements at a time, at least 16 rows."""
    count, length = matrix.shape
    step = max(16, elements // max(1, length))
    return [slice(start, min(start + step, count)) for start in range(0, max(1, count), step)]


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
        # `torch.promote_types` is an operator
        self.dtype = torch.float64 if torch.float64 in (weight.dtype, lora_A.dtype) else torch.float32
        self.weight, self.lora_B, self.lora_A = weight, lora_B.to(self.dtype), lora_A.to(self.dtype)
        self.masked, self.grid, self.minus = masked, grid, minus
        # the compiler makes blocks of its own, and would unroll a loop
        self._compiling = torch.compiler.is_compiling()
        self._in_cache = not self._compiling and devices.works_in_cache(weight.device)
        self._spaces: dict[str, torch.Tensor] = {}

    def slices(self) -> list[slice]:
        """The rows that are made at a time, all together once."""
        if self._compiling:
            return [slice(0, self.weight.shape[0])]
        return _slices(self.weight, devices.panel_elements(self.weight.device, self.dtype))

    def panel(
        self, rows: slice, dtype: torch.dtype, with_slopes: bool = False
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """These rows, (len(rows), in), in `dtype`, and, `with_slopes`, what `gradient` wants to know of them. Both may be
        overwritten, and are with the next call."""
        if self._in_cache:
            return self._panel_in_cache(rows, dtype, with_slopes)
        panel = torch.mm(self.lora_B[rows], self.lora_A)
        weight, minus = self.weight[rows], isinstance(self.minus, Grid)
        slopes: Optional[torch.Tensor] = None
        done = None
        if self._by_triton():
            with_slopes = with_slopes and self.grid is not None
            subtract = self.minus == "weight" and self._adds
            made = self.dtype if minus else dtype
            options = self.masked, self._adds, self.grid, rows, subtract, made, with_slopes
            done = devices.by_triton(lambda triton: triton.fill(panel, weight, *options))
        if done is not None:
            panel, slopes = done
        else:
            panel, slopes = self._fill_at_once(panel, weight, rows, with_slopes)
        if minus:
            rounded, _ = self.minus.round_rows_(weight.to(self.dtype, copy=True), rows, False)  # type: ignore[union-attr]
            panel.sub_(rounded)
        if panel.dtype != dtype and not self._compiling:
            self._spaces["gradient"] = panel
        return panel.to(dtype), slopes

    def gradient(self, gradient: torch.Tensor, rows: slice, slopes: Optional[torch.Tensor]) -> torch.Tensor:
        """The gradient with respect to these rows of the update, given that with respect to what `panel` returned with these
        `slopes`; both are changed. Without a grid the mask is all there is to it."""
        if self._in_cache:
            gradient = gradient.to(self.dtype)
            if slopes is not None:
                return slopes.mul_(gradient)
            if self.masked:
                self._go_over(gradient, rows, None, adds=False, grid=None)
            return gradient
        if slopes is None and not self.masked:
            return gradient.to(self.dtype)
        space = self._spaces.pop("gradient", None)
        if self._by_triton():
            mask = self.weight[rows] if slopes is None else slopes
            done = devices.by_triton(lambda triton: triton.mask_gradient(gradient, mask, space))
            if done is not None:
                return done
        if slopes is None:
            slopes = self.weight[rows] != 0
        elif slopes.dtype != torch.bool:  # Triton made them
            slopes = slopes.bool()
        if space is not None:
            return torch.mul(gradient, slopes, out=space)
        return gradient.mul_(slopes).to(self.dtype)

    @property
    def _adds(self) -> bool:
        return self.grid is not None or self.minus != "weight"

    def _by_triton(self) -> bool:
        return (
            self.dtype == torch.float32 and devices.triton_is_for(self.weight) and devices.triton_is_for(self.lora_A)
        )

    # -- at once, where an operator costs more than memory does --------------------------------------------------------

    def _fill_at_once(
        self, panel: torch.Tensor, weight: torch.Tensor, rows: slice, with_slopes: bool
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """What the inputs are multiplied with, but for `minus` a grid, of the update, which is overwritten; and the slopes,
        bool."""
        slopes: Optional[torch.Tensor] = None
        if self.masked:
            mask = weight != 0
            panel.mul_(mask)
            slopes = mask if with_slopes else None
        if self._adds:
            panel.add_(weight)
        if self.grid is not None:
            # the gradient passes straight through the rounding, and not where the clamp is constant
            panel, inside = self.grid.round_rows_(panel, rows, with_slopes)
            slopes = inside if slopes is None or inside is None else slopes.logical_and_(inside)
        if self.minus == "weight" and self._adds:
            panel.sub_(weight)
        return panel, slopes

    # -- on the CPU, in its cache ----------------------------------------------------------------------------------------

    def _panel_in_cache(
        self, rows: slice, dtype: torch.dtype, with_slopes: bool
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        slopes = self._space("slopes", rows) if with_slopes and self.grid is not None else None
        panel = torch.mm(self.lora_B[rows], self.lora_A, out=self._space("panel", rows))
        self._go_over(panel, rows, slopes, self._adds, self.grid)
        if isinstance(self.minus, Grid):
            panel.sub_(self.minus.round_rows(self.weight[rows].to(self.dtype), rows))
        elif self.minus == "weight" and self._adds:
            panel.sub_(self.weight[rows])
        return panel.to(dtype), slopes

    def _space(self, name: str, rows: slice) -> torch.Tensor:
        """Space for these rows, the same for all: memory from the system costs as much as going over it several times."""
        count = rows.stop - rows.start
        if name not in self._spaces:
            self._spaces[name] = self.weight.new_empty((count, self.weight.shape[1]), dtype=self.dtype)
        return self._spaces[name][:count]

    def _go_over(
        self, panel: torch.Tensor, rows: slice, slopes: Optional[torch.Tensor], adds: bool, grid: Optional[Grid]
    ) -> None:
        """Mask the panel, add the weight, and round the sum, each as asked for, in place."""
        if self._has_kernel():
            self._fill_by_kernel(panel, rows, slopes, adds, grid)
            return
        for part in _slices(panel, devices.CPU_BLOCK_ELEMENTS):
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
