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
"""The compressed weights of `sparsify_linears`: `SparseLinear`, which is deployed and not changed any more."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..sparse_linear import SparseLinear
from .base import ABILITIES, PackedBackend


class SparseBackend(PackedBackend):
    """`SparseLinear`."""

    name = "the sparse kernels"
    layers = "`SparseLinear`"
    listed = False
    obstacles = dict.fromkeys(
        ABILITIES,
        "whose weight is compressed for deployment. `peft_elastic.densify_linears(model)` puts ordinary layers in its place.",
    )

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, SparseLinear)

    def dequantize(self, layer: Any) -> torch.Tensor:
        weight: torch.Tensor = layer.to_linear().weight.detach()
        return weight

    def stored_bytes(self, layer: Any) -> int:
        return int(layer.nbytes)


SPARSE = SparseBackend()
