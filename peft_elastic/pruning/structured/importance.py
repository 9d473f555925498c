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
"""The order of channels and heads that MultiPruner's published configurations were made with."""

from __future__ import annotations

import torch
from torch import nn

from ...structure.blocks import Width, layer_at
from ...structure.modules import weight_matrix


def l1_scores(model: nn.Module, widths: list[Width]) -> dict[str, torch.Tensor]:
    """The importance that MultiPruner's published configurations were made with, float32 (units,) by the name of each order: the
    sum of the absolute weights of the layers that make a channel or head, in which key and value heads count once for each query
    head that reads them."""
    scores = {}
    for width in widths:
        for order in width.orders:
            total = torch.zeros(width.units)
            makers = [slot for slot in order.slots if slot.side == "out"]
            longest = max(length for slot in makers for _, length in slot.parts)
            for slot in makers:
                rows = weight_matrix(layer_at(model, slot.path)).abs().float().sum(1).cpu()
                for start, length in slot.parts:
                    part = rows[start : start + length].view(width.units, -1).sum(1)
                    total += part * (longest / length)
            scores[order.name] = total
    return scores
