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
"""Groups of columns that share a scale and a zero, as GPTQ and its relatives have them."""

from __future__ import annotations

import torch


def groups_in_order(in_features: int, group_size: int) -> torch.Tensor:
    """The group of each column where they are in order, int32 `(in,)`. `group_size` may be beyond any type of numbers."""
    return torch.arange(in_features, dtype=torch.int32, device="cpu") // min(group_size, in_features)


def order_of_groups(name: str, g_idx: torch.Tensor, in_features: int, group_size: int) -> torch.Tensor | None:
    """The columns in the order of their groups, int32 `(in,)`, or None if they are in order.

    Raises:
        ValueError: naming `name`, unless each group has `group_size` columns, the last one what is left.
    """
    if (
        tuple(g_idx.shape) != (in_features,)
        or g_idx.is_floating_point()
        or g_idx.is_complex()
        or g_idx.dtype == torch.bool
    ):
        raise ValueError(f"{name} must be whole numbers ({in_features},), got {g_idx.dtype} {tuple(g_idx.shape)}.")
    groups_of = groups_in_order(in_features, group_size).long()
    given = g_idx.detach().cpu().long()
    if torch.equal(given, groups_of):
        return None
    found, order = torch.sort(given, stable=True)
    if not torch.equal(found, groups_of):
        raise ValueError(
            f"{name} does not put {group_size} of the {in_features} columns into each of {int(groups_of[-1]) + 1} groups "
            "(the last one may have fewer)."
        )
    return order.to(torch.int32)
