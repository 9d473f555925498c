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
"""Packed weights of everybody else (HQQ, AWQ, AQLM, EETQ, FP8, ...). peft may put adapters beside them; here they are not read."""

from __future__ import annotations

import torch
from torch import nn

from .base import ABILITIES, PackedBackend


# Packages whose linear layers show by nothing else that their weight is packed.
_PACKAGES = ("aqlm", "eetq", "hqq", "vptq")


class ForeignBackend(PackedBackend):
    """Linear layers with a tensor `qweight`, of one of the packages above, or with a weight of integers or of 8-bit floats."""

    name = "another package"
    layers = "packed layers of other packages (HQQ, AWQ, AQLM, EETQ, FP8, ...)"
    obstacles = dict.fromkeys(
        [ability for ability in ABILITIES if ability not in ("merge", "sort", "prune", "quantize", "sparsify")],
        "whose packed weight is not read here. Load the model in floating point, or use `ElasticLoraConfig`.",
    )

    def matches(self, layer: nn.Module) -> bool:
        if _has(layer, "qweight"):
            return True
        if not (_has(layer, "in_features") and _has(layer, "out_features")):
            return False
        weight = layer._parameters.get("weight")
        odd = weight is not None and (not weight.is_floating_point() or weight.element_size() == 1)
        if odd or isinstance(layer, nn.Linear):
            return odd
        return type(layer).__module__.partition(".")[0] in _PACKAGES

    def dequantize(self, layer: nn.Module) -> torch.Tensor:
        raise ValueError(f"The packed weight of a {type(layer).__name__} is not read here.")

    def stored_bytes(self, layer: nn.Module) -> int:
        tensors = [*layer.parameters(), *layer.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors)


def _has(layer: nn.Module, name: str) -> bool:
    """`hasattr`, which takes several times as long to find nothing in a module."""
    if name in layer.__dict__ or name in layer._buffers or name in layer._parameters:
        return True
    return hasattr(type(layer), name)


FOREIGN = ForeignBackend()
