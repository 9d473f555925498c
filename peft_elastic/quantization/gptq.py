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
"""GPTQ of one matrix. What walks through the model is in quantize.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layers.grid import Grid, fit_grid
from .config import GPTQConfig


@dataclass(frozen=True)
class Rounded:
    """The result of a quantisation of one matrix.

    Args:
        weight: (out, in), as it was right before it was rounded, so `grid.quantize(weight)` gives the integers.
        grid: scales and zero points.
    """

    weight: torch.Tensor
    grid: Grid


def gptq(weight: torch.Tensor, hessian: torch.Tensor, config: GPTQConfig, name: str = "the weight") -> Rounded:
    """
    Algorithm 1 of GPTQ (https://huggingface.co/papers/2210.17323), rows independent of each other.

    With U the upper triangular factor of the inverse Hessian, H^-1 = U^T U, input j is rounded as

        e = (w_j - s (q_j - z)) / U_jj,    w_k -= e U_jk for all k > j

    Args:
        weight: float32 or float64 (out, in). Its zeros are kept: they are "rounded" to zero, whatever they would have become.
        hessian: X^T X (in, in), of the same dtype, over the tokens X (tokens, in); any positive multiple of it will do.
        config: the options of the method.
        name: of the layer, for messages.

    Raises:
        ValueError: the Hessian is not positive definite, however much it is damped.
    """
    out_features, in_features = weight.shape
    group_size = in_features if config.group_size == -1 else config.group_size
    order = hessian.diagonal().argsort(descending=True, stable=True) if config.act_order else None
    if order is not None:
        hessian = hessian[order][:, order]
    factor = inverse_factor(hessian, config.damping, name)
    scales = weight.new_empty(in_features // group_size, out_features)
    zeros = torch.empty_like(scales)

    def fit(columns: torch.Tensor, group: int) -> None:
        """The grid of group number `group`, and all after it, from their columns (out, n)."""
        grid = fit_grid(columns, config.bits, group_size, config.symmetric, config.clipping)
        scales[group : group + grid.scales.shape[1]] = grid.scales.T.to(scales.dtype)
        zeros[group : group + grid.zeros.shape[1]] = grid.zeros.T.to(zeros.dtype)

    if order is not None:
        fit(weight, 0)
    # Inputs are rows in here: what belongs together lies together in memory.
    rows = (weight.T if order is None else weight.T[order]).clone(memory_format=torch.contiguous_format)
    kept = rows != 0
    before = torch.empty_like(rows)
    top = 2**config.bits - 1
    begin = 0
    while begin < in_features:
        end = min(begin + config.block_size, in_features)
        if order is None and begin < end // group_size * group_size:
            # Where a group starts inside, it must be inside as a whole: the rest of the matrix is not up to date.
            end = end // group_size * group_size
        errors = torch.empty_like(rows[begin:end])
        local = factor[begin:end, begin:end]
        for j in range(begin, end):
            group = j // group_size if order is None else int(order[j]) // group_size
            if order is None and j % group_size == 0:
                fit((rows[j : j + group_size] * kept[j : j + group_size]).T, group)
            row = torch.mul(rows[j], kept[j], out=before[j])
            steps = (row / scales[group]).round_()
            steps = torch.minimum(torch.maximum(steps, -zeros[group]), top - zeros[group])
            i = j - begin
            error = torch.sub(rows[j], steps.mul_(scales[group]), out=errors[i]).div_(local[i, i])
            rows[j + 1 : end].addr_(local[i, i + 1 :], error, alpha=-1)
        rows[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
        begin = end
    if order is not None:
        before = torch.empty_like(before).index_copy_(0, order, before)
    grid = Grid(scales.T.contiguous(), zeros.T.contiguous().to(torch.int32), in_features=in_features, bits=config.bits)
    return Rounded(before.T.contiguous(), grid)


def inverse_factor(hessian: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """
    The upper triangular U with U^T U = (H + d I)^-1, d = damping * mean(diag H).

    Inputs that are always zero have zero rows and columns in H; with the damping they are independent of all others, and their
    weights are rounded to nearest.

    Raises:
        ValueError: no damping up to the mean of the diagonal makes H positive definite.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not mean > 0:
        mean = torch.ones_like(mean)  # no input was ever anything but zero
    share = damping
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(mean * share)
        # H = R R^T with R upper triangular is Cholesky's H = L L^T with the order of the inputs turned round, and U = R^-1.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if bool(torch.isfinite(factor).all()):
                return factor
        if share >= 1:
            raise ValueError(
                f"`damping` is {damping}, and the Hessian of {name} is not positive definite with any up to 1; give more, or "
                "more varied, calibration data, or a model in float32."
            )
        share = min(share * 10, 1.0)


def output_error(difference: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float | None:
    """||X D^T|| / ||X W^T|| (Frobenius norms) for D (out, in), from H = X^T X; None if X W^T is zero."""
    total = ((weight @ hessian) * weight).sum()
    wrong = ((difference @ hessian) * difference).sum()
    return (wrong.clamp(min=0) / total).sqrt().item() if total > 0 else None
