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
"""Reading the weights of bitsandbytes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import nn


def is_bitsandbytes(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and bool(get_bnb_param_type(layer._parameters.get("weight")))


def dequantize(weight: Any, state: Any) -> torch.Tensor:
    """The weight (out, in) of a layer of bitsandbytes: of its parameter and, with 8 bits, what the layer keeps beside."""
    quant_state: Any = getattr(weight, "quant_state", None)
    if not getattr(quant_state, "packing_format_for_cpu", False):
        return dequantize_bnb_weight(weight, state=state)
    # From its first forward pass in evaluation mode on, bitsandbytes keeps 4 bits in another order on some processors.
    from bitsandbytes import functional

    unpacked: Any = copy.copy(quant_state)
    unpacked.original_nested = False
    values, unpacked = functional._convert_weight_packed_for_cpu_inverse(weight.data, unpacked)
    unpacked.absmax = quant_state.absmax.T.reshape(-1).float().contiguous()  # which that function leaves in its order
    return functional.dequantize_4bit(values, unpacked)
