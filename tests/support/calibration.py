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
"""What the tests of methods with calibration data share: the inputs of layers, seen in passes of the whole model, and a block of
which a layer gets no token."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def linears(module):
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, (nn.Linear, Conv1D))}


def inputs_by_full_passes(model, block, batches):
    """Of each linear layer in the block at this path, by its name there: all its inputs, (tokens, in)."""
    layers = linears(model.get_submodule(block))
    seen = {name: [] for name in layers}
    hooks = [
        layer.register_forward_hook(lambda m, args, out, kept=seen[name]: kept.append(args[0].flatten(0, -2).clone()))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(inputs) for name, inputs in seen.items()}


class Experts(nn.Module):
    """Three layers (16, 16), the last of which is never called."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, hidden):
        return self.experts[0](hidden) + self.experts[1](hidden)
