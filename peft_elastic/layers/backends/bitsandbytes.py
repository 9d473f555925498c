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
"""Weights of bitsandbytes, 4 and 8 bit."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, Optional

import torch
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import nn

from ..grid import Grid
from .base import OldWeight, PackedBackend


class OldBitsAndBytes(OldWeight):
    """A parameter of bitsandbytes, and what is kept beside it."""

    def __init__(self, parameter: Any, state: tuple[Any, ...]) -> None:
        self.parameter, self.state = parameter, state

    def matrix(self, layer: nn.Module) -> torch.Tensor:
        scales = SimpleNamespace(SCB=next((scale for scale in self.state[1::2] if scale is not None), None))
        return dequantize(self.parameter, scales)

    def put_back(self, layer: nn.Module) -> None:
        layer.weight = self.parameter
        if get_bnb_param_type(self.parameter) == "4bit":
            (layer.quant_state,) = self.state
        else:
            state: Any = layer.state
            self.parameter.CB, self.parameter.SCB, state.CB, state.SCB = self.state


class BitsAndBytesBackend(PackedBackend):
    """`Linear4bit` and `Linear8bitLt`, known by their parameter."""

    name = "bitsandbytes"
    layers = "the layers of bitsandbytes"

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and bool(get_bnb_param_type(layer._parameters.get("weight")))

    def dequantize(self, layer: nn.Module) -> torch.Tensor:
        return dequantize(layer._parameters["weight"], getattr(layer, "state", None))

    def stored_bytes(self, layer: nn.Module) -> int:
        weight: Any = layer._parameters["weight"]
        state = getattr(layer, "state", None)
        scales = [
            next((s for s in (getattr(weight, "SCB", None), getattr(state, "SCB", None)) if s is not None), None)
        ]
        quant_state = getattr(weight, "quant_state", None)
        while quant_state is not None:  # the scales may be quantised as well
            scales.append(quant_state.absmax)
            quant_state = quant_state.state2 if quant_state.nested else None
        return sum(t.numel() * t.element_size() for t in (weight.data, *scales) if t is not None)

    def replace(self, layer: nn.Module, weight: torch.Tensor, grid: Optional[Grid] = None) -> OldWeight:
        import bitsandbytes as bnb

        old: Any = layer.weight
        new: Any
        if get_bnb_param_type(old) == "4bit":
            old_weight = OldBitsAndBytes(old, (old.quant_state,))
            options = {
                key: getattr(old, key) for key in ("quant_type", "quant_storage", "compress_statistics", "blocksize")
            }
            new = bnb.nn.Params4bit(weight.to("cpu"), requires_grad=False, module=layer, **options)  # type: ignore[arg-type]
            layer.weight = new.to(old.device)
            return old_weight

        # An 8-bit layer moves the scales from its weight to its state in its first forward pass.
        state: Any = layer.state
        old_weight = OldBitsAndBytes(old, (old.CB, old.SCB, state.CB, state.SCB))
        new = bnb.nn.Int8Params(weight.to("cpu"), requires_grad=False, has_fp16_weights=old.has_fp16_weights)
        layer.weight = new.to(old.device)
        state.CB = state.SCB = None
        return old_weight


def dequantize(weight: Any, state: Any) -> torch.Tensor:
    """The weight (out, in) of a layer of bitsandbytes: of its parameter and, with 8 bits, what the layer keeps beside."""
    quant_state: Any = getattr(weight, "quant_state", None)
    if not getattr(quant_state, "packing_format_for_cpu", False):
        return dequantize_bnb_weight(weight, state=state)
    from bitsandbytes import functional

    return functional.dequantize_4bit(*_unpacked(weight.data, quant_state))


def unpack(layer: nn.Module) -> None:
    """Put the weight of a layer with 4 bits back into the order that everybody expects.

    From its first forward pass in evaluation mode on, bitsandbytes keeps it in another order on processors with AVX512. Its
    own backward pass and whatever of peft reads such a weight (merging, unmerging, the norms of DoRA) take it for the usual
    one, without a word."""
    if not hasattr(layer, _PACKS):
        return
    weight: Any = layer._parameters["weight"]
    quant_state = getattr(weight, "quant_state", None)
    if getattr(quant_state, "packing_format_for_cpu", False):
        weight.data, weight.quant_state = _unpacked(weight.data, quant_state)
        layer.quant_state = weight.quant_state


def keep_unpacked(layer: nn.Module) -> None:
    """`unpack` a layer of bitsandbytes and do not let it reorder its weight again."""
    unpack(layer)
    if getattr(layer, _PACKS, False):
        setattr(layer, _PACKS, False)
        layer.__dict__[_KEPT] = True


def unpack_for_gradients(layer: nn.Module) -> None:
    """From now on, `unpack` a layer of bitsandbytes before a forward pass that has a backward pass to come: also in evaluation mode, in
    which one without gradients has reordered its weight."""
    if hasattr(layer, _PACKS) and _HOOK not in layer.__dict__:
        layer.__dict__[_HOOK] = layer.register_forward_pre_hook(_unpack_if_differentiated)


def _unpack_if_differentiated(layer: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.is_grad_enabled() and args and args[0].requires_grad:
        unpack(layer)


def allow_packing(layer: nn.Module) -> None:
    """The inverse of `keep_unpacked` and of `unpack_for_gradients`."""
    if (hook := layer.__dict__.pop(_HOOK, None)) is not None:
        hook.remove()
    if layer.__dict__.pop(_KEPT, False):
        setattr(layer, _PACKS, True)


# Of a layer of bitsandbytes, whether it reorders its weight; and the note that `keep_unpacked` has switched that off.
_PACKS = "support_avx512bf16_for_cpu"
_KEPT = "_peft_elastic_kept_unpacked"
_HOOK = "_peft_elastic_unpacks_for_gradients"


def _unpacked(data: torch.Tensor, quant_state: Any) -> tuple[torch.Tensor, Any]:
    """Values and a new state in the usual order. The scales stay rounded to bfloat16, as bitsandbytes computed with them."""
    from bitsandbytes import functional

    plain: Any = copy.copy(quant_state)
    plain.original_nested = False
    values, plain = functional._convert_weight_packed_for_cpu_inverse(data, plain)
    plain.absmax = quant_state.absmax.T.reshape(-1).float().contiguous()  # which that function leaves in its order
    return values, plain


BITSANDBYTES = BitsAndBytesBackend()
