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
"""Weights of torchao, which are tensors of its own classes in an `nn.Linear`. They are read, and not written: how a tensor was
quantised is not to be seen from it, and only peft's own layers are told."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import PackedBackend


_ORDINARY = (type(None), nn.Parameter, torch.Tensor)


class TorchaoBackend(PackedBackend):
    """`nn.Linear` whose weight is a tensor of torchao."""

    name = "torchao"
    layers = "the layers of torchao"
    obstacles = {
        **dict.fromkeys(
            ("write", "requantize"),
            "whose weight torchao alone can write. Load the model in floating point, or use `ElasticLoraConfig`, which merges "
            "through it.",
        ),
        "narrow": "which cannot be narrowed. Load the model in floating point.",
    }

    def matches(self, layer: nn.Module) -> bool:
        kind = type(layer._parameters.get("weight"))
        # the first condition comes first, as torch.compile cannot follow the last one
        return kind not in _ORDINARY and isinstance(layer, nn.Linear) and kind.__module__.startswith("torchao.")

    def dequantize(self, layer: nn.Module) -> torch.Tensor:
        weight: Any = layer._parameters["weight"]
        try:
            return weight.detach().dequantize()
        except NotImplementedError as error:
            raise ValueError(f"torchao cannot dequantise a {type(weight).__name__}.") from error

    def stored_bytes(self, layer: nn.Module) -> int:
        return _bytes(layer._parameters["weight"])


def _bytes(tensor: Any) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.numel() * tensor.element_size())
    return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


TORCHAO = TorchaoBackend()
