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
"""Affine quantisation in groups: the grid of a layer, and how it is fitted to a weight.

A weight W (out, in) is cut along its inputs into groups; group g of output o has a scale s and a zero point z, and

    q = clamp(round(W / s) + z, 0, 2^bits - 1),    W is about s (q - z)

(SQFT, https://huggingface.co/papers/2410.03750, section 3; GPTQ, https://huggingface.co/papers/2210.17323). z is a whole
number, so that a weight of zero becomes exactly z, and s (q - z) exactly zero: sparsity survives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..common.checks import check_bool, check_choice, wrong


BITS = (2, 4, 8)
CLIPPING = ("minmax", "mse")

# The shares of the range of a group that clipping by the squared error tries.
_SHRINKS = [1 - 0.02 * step for step in range(31)]
_SMALLEST_SCALE = 2.0**-24  # of float16
_LARGEST_SCALE = 65504.0


def check_grid_options(bits: Any, group_size: Any, symmetric: Any) -> None:
    """ValueError that names the argument which is out of range."""
    check_choice("bits", bits, BITS)
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise wrong("group_size", "a whole number of inputs, or -1 for one group over all inputs", group_size)
    check_bool("symmetric", symmetric)


def check_group_size(name: str, in_features: int, group_size: int) -> None:
    """ValueError if the inputs of the layer `name` cannot be cut into such groups."""
    if group_size != -1 and in_features % group_size:
        divisors = [size for size in (256, 128, 64, 32, 16, 8) if in_features % size == 0]
        raise ValueError(
            f"`group_size` is {group_size}, which does not divide the {in_features} inputs of {name!r}. Choose a divisor "
            f"(such as {', '.join(map(str, divisors)) or in_features}), -1 for one group over all inputs, or leave the layer "
            "out of `target_modules`."
        )


class Grid(nn.Module):
    """The values that the weight of one layer may take. It has no parameters; casts of a model do not change it.

    Args:
        scales (`torch.Tensor`): (out, groups), positive; rounded to float16, which is what checkpoints hold.
        zeros (`torch.Tensor`): (out, groups), whole numbers in 0 .. 2^bits - 1.
        in_features (`int`): inputs of the layer.
        bits (`int`): 2, 4 or 8.
        g_idx (`torch.Tensor`, *optional*): (in,), whole numbers: the group of each input. By default groups of equal size
            one after the other.
        persistent (`bool`): whether the tensors belong to the state dict.

    Attributes:
        group_size (`int`): inputs of a group.

    Raises:
        ValueError: naming the tensor whose shape or values are wrong.
    """

    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    in_order: bool
    # The last part that was taken, which one it is, and of which scales.
    _taken: tuple[Any, torch.Tensor, Grid] | None
    # `g_idx` on the CPU, as soon as somebody asks for it; and what `equals` has said last, of which versions of which tensors.
    _host_g_idx: torch.Tensor | None
    _compared: tuple[list[torch.Tensor], list[int], bool] | None

    def __init__(
        self,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        *,
        in_features: int,
        bits: int,
        g_idx: torch.Tensor | None = None,
        persistent: bool = False,
    ) -> None:
        super().__init__()
        check_grid_options(bits, -1, False)
        if scales.dim() != 2 or 0 in scales.shape or not scales.is_floating_point():
            raise ValueError(
                f"`scales` is {scales.dtype} {tuple(scales.shape)}; it must be floating point (out, groups)."
            )
        half = scales.detach().to(torch.float16)
        if not bool((torch.isfinite(half) & (half > 0)).all()):
            raise ValueError("`scales` must be positive and finite in float16.")
        if zeros.shape != scales.shape or zeros.is_floating_point():
            raise ValueError(
                f"`zeros` is {zeros.dtype} {tuple(zeros.shape)}; it must be whole numbers {tuple(scales.shape)}."
            )
        if bool(((zeros < 0) | (zeros > 2**bits - 1)).any()):  # 2**bits itself does not fit into uint8
            raise ValueError(f"`zeros` must be 0 to {2**bits - 1} with {bits} bits.")
        groups = scales.shape[1]
        if g_idx is not None:
            if g_idx.shape != (in_features,) or g_idx.is_floating_point():
                raise ValueError(
                    f"`g_idx` is {g_idx.dtype} {tuple(g_idx.shape)}; it must be whole numbers ({in_features},)."
                )
            if bool(((g_idx < 0) | (g_idx >= groups)).any()):
                raise ValueError(f"`g_idx` must be 0 to {groups - 1}, as there are {groups} groups.")
            g_idx = g_idx.to(scales.device)
        else:
            g_idx = torch.arange(in_features, device=scales.device) // -(-in_features // groups)
        self._fill(half, zeros.detach(), g_idx, in_features, bits, persistent)
        self._note_order()

    def _fill(
        self,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        g_idx: torch.Tensor,
        in_features: int,
        bits: int,
        persistent: bool = False,
    ) -> None:
        """What `__init__` does with arguments that are right, but for `in_order`. It reads no value, for which a GPU would
        stop."""
        self.bits, self.in_features = bits, in_features
        self.__dict__.update(_taken=None, _host_g_idx=None, _compared=None)  # no submodule
        self.group_size = -(-in_features // scales.shape[1])
        self.register_buffer("scales", scales.contiguous(), persistent)
        self.register_buffer("zeros", zeros.to(torch.uint8).contiguous(), persistent)
        self.register_buffer("g_idx", g_idx.to(torch.int32).contiguous(), persistent)

    @classmethod
    def copy_of(cls, grid: Grid, persistent: bool = False) -> Grid:
        """The same grid, with tensors of its own."""
        g_idx = None if grid.in_order else grid.g_idx.clone()
        return cls(
            grid.scales.clone(),
            grid.zeros.clone(),
            in_features=grid.in_features,
            bits=grid.bits,
            g_idx=g_idx,
            persistent=persistent,
        )

    def take(self, outputs: tuple[tuple[int, int], ...] | None, inputs: tuple[tuple[int, int], ...] | None) -> Grid:
        """The grid of a part of the layer, given as runs (start, stop) of its outputs and inputs; None for all."""
        if outputs is None and inputs is None:
            return self
        taken = self._taken
        # asked for in every forward, and with other runs in every step of a super-network of several widths
        if taken is None or taken[0] != (outputs, inputs) or taken[1] is not self.scales:
            scales, zeros, g_idx, host = self.scales, self.zeros, self.g_idx, self._on_host()
            if outputs is not None:
                scales, zeros = (torch.cat([t[a:b] for a, b in outputs]) for t in (scales, zeros))
            if inputs is not None:
                g_idx, host = (torch.cat([t[a:b] for a, b in inputs]) for t in (g_idx, host))
                last = int(host.max()) + 1
                scales, zeros = scales[:, :last], zeros[:, :last]
            grid = Grid.__new__(Grid)
            nn.Module.__init__(grid)
            grid._fill(scales, zeros, g_idx, len(host), self.bits)
            grid.in_order = grid._is_in_order(host)
            grid.__dict__["_host_g_idx"] = host
            taken = (outputs, inputs), self.scales, grid
            self.__dict__["_taken"] = taken
        return taken[2]

    def _on_host(self) -> torch.Tensor:
        """`g_idx` on the CPU. A GPU is waited for once."""
        if self._host_g_idx is None:
            self.__dict__["_host_g_idx"] = self.g_idx.cpu()
        host: torch.Tensor = self.__dict__["_host_g_idx"]
        return host

    def permute(self, side: str, index: torch.Tensor) -> None:
        """Put the outputs (`side` "out") or the inputs ("in") into another order: number i becomes what `index[i]` was."""
        index = index.to(self.scales.device)
        if side == "out":
            self.scales, self.zeros = self.scales[index].contiguous(), self.zeros[index].contiguous()
        else:
            self.g_idx = self.g_idx[index].contiguous()
        self.__dict__["_taken"] = None

    def _note_order(self) -> None:
        """Whether the groups follow each other and are equal; all is faster then."""
        self.__dict__.update(_taken=None, _host_g_idx=None)
        if not self.g_idx.is_meta:
            self.in_order = self._is_in_order(self.g_idx)

    def _is_in_order(self, g_idx: torch.Tensor) -> bool:
        in_order = torch.arange(self.in_features, device=g_idx.device) // self.group_size
        return self.in_features % self.group_size == 0 and torch.equal(g_idx.long(), in_order)

    # Other indices come with the weights of an adapter.
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._note_order()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "g_idx":
            self._note_order()

    def equals(self, other: Grid) -> bool:
        """Whether both round every weight to the same values. Asked for in every forward where several adapters are active,
        so that a GPU is waited for only after one of them has changed."""
        if (self.bits, self.in_features) != (other.bits, other.in_features):
            return False
        pairs = (self.scales, other.scales), (self.zeros, other.zeros), (self.g_idx, other.g_idx)
        tensors = [tensor for pair in pairs for tensor in pair]
        # tensors of inference mode count no versions
        versions = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
        before = self._compared
        if before is not None and -1 not in versions and before[1] == versions:
            if all(a is b for a, b in zip(before[0], tensors)):
                return before[2]
        answer = all(a.shape == b.shape and torch.equal(a, b.to(a.device)) for a, b in pairs)
        self.__dict__["_compared"] = tensors, versions, answer
        return answer

    @property
    def out_features(self) -> int:
        return self.scales.shape[0]

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is in the middle."""
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    def quantize(self, weight: torch.Tensor) -> torch.Tensor:
        """The integers q, uint8 (out, in), of a weight (out, in)."""
        steps = self._join(self._steps(weight, slice(None))[1])
        return steps.add_(self._spread(self.zeros)).to(torch.uint8)

    def dequantize(self, integers: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight s (q - z), (out, in), computed in float32 and rounded once to `dtype`."""
        scales, zeros = self._spread(self.scales).float(), self._spread(self.zeros).float()
        return integers.float().sub_(zeros).mul_(scales).to(dtype)

    def into_cells(self, weight: torch.Tensor, integers: torch.Tensor) -> torch.Tensor:
        """`weight` (out, in) with the entries that are rounded to something else than `integers`, uint8 (out, in), moved as
        little as it takes, but for a thousandth of a step and the rounding of the dtype. bfloat16 has no number in some of the
        cells that are more than 128 steps from zero, which 8 bits can have: such entries get the closest there is."""
        wrong = self.quantize(weight) != integers
        if not bool(wrong.any()):
            return weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        middle, reach = self.dequantize(integers, wide), self._spread(self.scales).to(wide) * 0.499
        moved = torch.minimum(torch.maximum(weight.to(wide), middle - reach), middle + reach)
        moved = torch.where(wrong, moved.to(weight.dtype), weight)
        return torch.where(self.quantize(moved) != integers, middle.to(weight.dtype), moved)

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """The values of the grid that stand for a weight (out, in), of its dtype: `dequantize(quantize(weight))`."""
        return self.round_rows(weight, slice(None)).to(weight.dtype)

    def round_rows(self, weight: torch.Tensor, rows: slice, inside: torch.Tensor | None = None) -> torch.Tensor:
        """What the rows `rows` of a weight, given as (len(rows), in), are rounded to: float32 (float64 for float64).

        `inside`, of that shape and dtype, is filled with 1 where they lie inside of the range, and with 0 outside, where
        the clamp is constant.
        """
        free, steps, scales = self._steps(weight, rows)
        if inside is not None:
            torch.eq(free, steps, out=self._cut(inside))
        return self._join(steps.mul_(scales))

    def round_rows_(
        self, matrix: torch.Tensor, rows: slice, with_inside: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`round_rows` of a matrix of float32 or float64 that may be overwritten, in as few operators as there can be; and,
        `with_inside`, where it lay inside of the range (bool)."""
        if self.in_order:
            low, high, scales = self._ends(matrix.dtype, rows)
            free = self._cut(matrix).div_(scales).round_()
            steps = torch.clamp(free, low, high) if with_inside else free.clamp_(low, high)
            inside = torch.eq(free, steps) if with_inside else None
        else:
            # every matrix here is as large as the weight, so that small types and q in place of q - z are less
            scales, zeros = (each[rows].index_select(1, self.g_idx) for each in (self.scales, self.zeros))
            free = matrix.div_(scales).round_().add_(zeros)
            top = 2**self.bits - 1
            steps = torch.clamp(free, 0, top) if with_inside else free.clamp_(0, top)
            inside = torch.eq(free, steps) if with_inside else None
            steps.sub_(zeros)
        return self._join(steps.mul_(scales)), None if inside is None else self._join(inside)

    def _steps(self, weight: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q - z of these rows before and after the clamp, and the scales; cut into groups where these are in order."""
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        low, high, scales = self._ends(wide.dtype, rows)
        free = (self._cut(wide) / scales).round_()
        return free, torch.clamp(free, low, high), scales

    def _ends(self, dtype: torch.dtype, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Between what q - z is clamped in these rows, and the scales in float16, which operators widen by themselves; for what
        `_cut` returns."""
        scales, low = self.scales[rows], self.zeros[rows].to(dtype).neg_()
        high = low + (2**self.bits - 1)
        if self.in_order:
            return low[..., None], high[..., None], scales[..., None]
        return low.index_select(1, self.g_idx), high.index_select(1, self.g_idx), scales.index_select(1, self.g_idx)

    def _cut(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.unflatten(1, (-1, self.group_size)) if self.in_order else matrix

    def _join(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.flatten(1) if self.in_order else matrix

    def _spread(self, per_group: torch.Tensor) -> torch.Tensor:
        """(out, groups) to (out, in)."""
        return per_group[:, self.g_idx.long()]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Grid:
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != torch.float16:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        order = "" if self.in_order else ", act-order"
        return f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric}{order}"


def fit_grid(
    weight: torch.Tensor,
    bits: int,
    group_size: int = 128,
    symmetric: bool = False,
    clipping: str = "minmax",
    persistent: bool = False,
) -> Grid:
    """The grid of a weight for rounding to nearest.

    Args:
        weight (`torch.Tensor`): floating point (out, in), finite.
        bits (`int`): 2, 4 or 8.
        group_size (`int`): inputs of a group; it divides them. -1: all.
        symmetric (`bool`): zero points in the middle, 2^(bits - 1), and scales 2 max |w| / (2^bits - 1), as in GPTQ.
            Otherwise the range is from min(w, 0) to max(w, 0), or a little more, so that zero points are at least 1.
        clipping (`str`): "minmax", or "mse", which shrinks the range of each group to the share (1.00, 0.98, ... 0.40) with
            the smallest squared error.
        persistent (`bool`): as in `Grid`.

    Raises:
        ValueError: for an option out of range, or a weight whose scales float16 cannot hold.
    """
    check_grid_options(bits, group_size, symmetric)
    check_choice("clipping", clipping, CLIPPING)
    in_features = weight.shape[1]
    check_group_size("the weight", in_features, group_size)
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    groups = wide.unflatten(1, (-1, in_features if group_size == -1 else group_size))
    low, high = groups.amin(2).clamp_(max=0), groups.amax(2).clamp_(min=0)
    if not bool(torch.isfinite(high - low).all()):
        raise ValueError("`weight` must be finite, got infinite or NaN entries.")
    scales, zeros = range_to_grid(low, high, bits, symmetric)
    if clipping == "mse":
        best = torch.full_like(scales, float("inf"))
        for shrink in _SHRINKS:
            candidate, zero = range_to_grid(low * shrink, high * shrink, bits, symmetric)
            steps = (groups / candidate[..., None]).round_()
            steps = steps.clamp_(-zero[..., None], 2**bits - 1 - zero[..., None])
            error = steps.mul_(candidate[..., None]).sub_(groups).square_().sum(2)
            better = error < best
            best = torch.where(better, error, best)
            scales, zeros = torch.where(better, candidate, scales), torch.where(better, zero, zeros)
    return Grid(scales, zeros.to(torch.int32), in_features=in_features, bits=bits, persistent=persistent)


def range_to_grid(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, rounded to what float16 can hold, and zero points (whole numbers as floats) of groups whose weights run from
    `low` (at most 0) to `high` (at least 0).

    Raises:
        ValueError: if a scale is too large for float16.
    """
    top = 2**bits - 1
    if symmetric:
        scales = 2 * torch.maximum(-low, high) / top
    else:
        scales = (high - low) / top
        # No zero point of 0, which the first version of the GPTQ format cannot hold: next to no groups would have one.
        scales = torch.where((-low / scales).round() < 1, high / (top - 1), scales)
    if bool((scales > _LARGEST_SCALE).any()):
        raise ValueError(f"The weight needs the scale {scales.max():.3g}, and float16 ends at {_LARGEST_SCALE:.0f}.")
    rounded = scales.to(torch.float16).to(scales.dtype).clamp_(min=_SMALLEST_SCALE)
    scales = torch.where(scales > 0, rounded, 1.0)  # a group of zeros has any scale
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if symmetric else (-low / scales).round_().clamp_(1, top)
    return scales, zeros
