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

from __future__ import annotations

import torch


def lowest_mask(score: torch.Tensor, count: int) -> torch.Tensor:
    """
    Marks the `count` lowest entries along the last dimension; among equal ones the first.

    Args:
        score: (..., n), floating, no NaN.
        count: 0 <= count <= n.

    Returns:
        Boolean tensor of the shape of `score` with exactly `count` True in each last dimension.
    """
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = score.kthvalue(count, dim=-1, keepdim=True).values
    below = score < threshold
    ties = score == threshold
    # Equal scores are common (dead inputs, low-precision weights): take only as many as are still missing.
    missing = count - below.sum(dim=-1, keepdim=True)
    return below | (ties & (ties.cumsum(dim=-1, dtype=torch.int32) <= missing))


def pruning_mask(
    weight: torch.Tensor,
    score: torch.Tensor,
    sparsity: float | None,
    n_of_m: tuple[int, int] | None,
    scope: str = "row",
) -> torch.Tensor:
    """
    Chooses the weights to prune.

    Args:
        weight: (out, in).
        score: (out, in), floating, >= 0; the lowest are pruned, weights that are already zero before all others.
        sparsity: fraction of each comparison group to prune, rounded down to whole weights. Used without `n_of_m`.
        n_of_m: (n, m) keeps n of every m consecutive inputs; `in` must be divisible by m.
        scope: comparison group of unstructured pruning, "row" or "layer".

    Returns:
        Boolean (out, in), True where the weight goes.
    """
    score = score.masked_fill(weight == 0, -1.0)
    if n_of_m is not None:
        n, m = n_of_m
        return lowest_mask(score.reshape(score.shape[0], -1, m), m - n).reshape(score.shape)
    if sparsity is None:
        raise ValueError("`sparsity` must be a number where there is no `n_of_m`, got None.")
    groups = score if scope == "row" else score.reshape(1, -1)
    # 0.29 * 100 is 28.999...: the small term keeps such products from losing a weight.
    count = int(sparsity * groups.shape[-1] + 1e-6)
    return lowest_mask(groups, count).reshape(score.shape)
