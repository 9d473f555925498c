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
"""Ordinary linear layers around weights that are there."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def ordinary_linear(
    weight: nn.Parameter, bias: Optional[nn.Parameter], training: bool, conv1d: bool = False
) -> nn.Module:
    """Make an `nn.Linear`, or a `Conv1D`, without the memory and the random numbers of the weight that it would make itself.

    Args:
        weight: (out, in), for a `Conv1D` (in, out); it becomes the layer's own.
        bias: (out,); likewise.
        training: the mode of the layer.
        conv1d: whether it is transformers' `Conv1D`, which always has a bias.
    """
    with torch.device("meta"):
        linear: Any = (
            Conv1D(weight.shape[1], weight.shape[0])
            if conv1d
            else nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        )
    linear.weight, linear.bias = weight, bias
    return linear.train(training)
