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
"""Gates in front of the units of a model, and what the loss says of them: the structured form of movement pruning's masks.

A unit (key-value group of heads, MLP channel) has one score S. The layer that reads it gets it times 1[S > threshold], and the
gradient of S is, straight through that step, the sum over all weights W of the unit, in all layers that make or read it, of
dL/dW' W, with W' = W 1[S > threshold]; a bias goes with its row. That sum is had without the gradients of weights: of a layer that
reads the unit it is the sum over tokens and features of x dL/dx', of one that makes it of y dL/dy.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from itertools import chain
from types import FrameType
from typing import Any, Optional

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from .modules import module_at
from .parts import Order, Slot, Width


# Products are summed over so many elements at a time: what they need in float32 beside the model stays small, and in the cache.
_AT_A_TIME = 2**18


class _Gate(torch.autograd.Function):
    """Features (..., features) -> the same, times `mask` if there is one. The gradient of `score` (units,) is the sum of
    features times the gradient of the output, over tokens and the features of each unit."""

    @staticmethod
    def forward(
        ctx: Any, features: torch.Tensor, score: torch.Tensor, mask: Optional[torch.Tensor], slot: Slot
    ) -> Any:
        ctx.save_for_backward(features, mask)
        ctx.slot, ctx.score = slot, (len(score), score.dtype, score.device)
        return features if mask is None else features * mask

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        features, mask = ctx.saved_tensors
        units, dtype, device = ctx.score
        sums = _sum_of_products(features, gradient)
        pieces = [sums[start : start + length].view(units, -1).sum(1) for start, length in ctx.slot.parts]
        score = torch.stack(pieces).sum(0).to(device=device, dtype=dtype)
        if not ctx.needs_input_grad[0]:
            return None, score, None, None
        return gradient if mask is None else gradient * mask, score, None, None


def _sum_of_products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of a * b: two (..., features) -> (features,), float32 or wider whatever they are."""
    features = a.shape[-1]
    dtype = torch.promote_types(a.dtype, torch.float32)
    tokens = max(1, _AT_A_TIME // features)
    total = torch.zeros(features, dtype=dtype, device=a.device)
    for x, y in zip(a.reshape(-1, features).split(tokens), b.reshape(-1, features).split(tokens)):
        total += (x.to(dtype) * y.to(dtype)).sum(0)
    return total


class UnitGates:
    """The scores of the units of a model, and the hooks by which it computes with their gates and learns their gradients.

    The hooks are on the layers as the model calls them: where an adapter is around a layer, base and adapter together are what is
    measured. They work with frozen weights, gradient checkpointing and autocast. A layer that is called several times in a pass,
    as one whose blocks share it, counts each time.

    Args:
        model (`nn.Module`): the base model.
        widths (`Iterable[Width]`): of `Structure(model)`.
        dtype (`torch.dtype`): of the scores.

    Attributes:
        scores (`dict[str, torch.Tensor]`): by the name of each `Order`, (units,), 0 at first; leaves with a gradient, on the device of
            the layer that reads the units.
        reached (`set[str]`): paths of the layers that have computed since the hooks were first attached.
    """

    def __init__(self, model: nn.Module, widths: Iterable[Width], dtype: torch.dtype = torch.float32) -> None:
        self._orders = {order.name: order for width in widths for order in width.orders}
        units = {order.name: width.units for width in widths for order in width.orders}
        self._layers = {
            slot.path: module_at(model, slot.path) for order in self._orders.values() for slot in order.slots
        }
        self.scores: dict[str, torch.Tensor] = {}
        for name, order in self._orders.items():
            device = _device(self._layers[order.slots[-1].path])
            self.scores[name] = torch.zeros(units[name], dtype=dtype, device=device, requires_grad=True)
        self.reached: set[str] = set()
        self._open: dict[str, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._owner: Optional[tuple[FrameType, int]] = None

    @property
    def orders(self) -> Iterable[Order]:
        return self._orders.values()

    @property
    def slots(self) -> list[Slot]:
        """Of all layers with gates."""
        return [slot for order in self._orders.values() for slot in order.slots]

    def shut(self, threshold: float) -> None:
        """Let the gates of the units whose score is not above a threshold be closed from now on, and the others open."""
        masks = {name: score.detach() > threshold for name, score in self.scores.items()}
        device = next(iter(masks.values())).device
        whole = torch.stack([mask.all().to(device) for mask in masks.values()]).tolist()  # one wait for the device
        self._open = {name: mask for (name, mask), all_open in zip(masks.items(), whole) if not all_open}

    def attach(self, owner: FrameType) -> None:
        """Add the hooks. They are there until `detach`; if the function that `owner` is a call of ends before that, by an exception,
        they do nothing more, and the next one that is called removes them all.
        """
        self.detach()
        self._owner = (owner, threading.get_ident())
        for order in self._orders.values():
            score, is_open = self.scores[order.name], self._open.get(order.name)
            for slot in order.slots:
                layer = self._layers[slot.path]
                if slot.side == "out":
                    self._handles.append(layer.register_forward_hook(self._out_hook(slot, score)))
                else:
                    hook = self._in_hook(slot, score, is_open)
                    self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._owner = [], None

    def _in_hook(self, slot: Slot, score: torch.Tensor, is_open: Optional[torch.Tensor]) -> Any:
        masks: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            if not self._is_owned():
                return None
            self.reached.add(slot.path)
            features = (*args, *kwargs.values())[0]
            mask = None
            if is_open is not None:
                kind = (features.device, features.dtype)
                if kind not in masks:
                    masks[kind] = _spread(slot, is_open, features)
                mask = masks[kind]
            gated = _Gate.apply(features, score, mask, slot)
            if args:
                return (gated, *args[1:]), kwargs
            return args, {**kwargs, next(iter(kwargs)): gated}

        return hook

    def _out_hook(self, slot: Slot, score: torch.Tensor) -> Any:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> Any:
            if not self._is_owned():
                return None
            self.reached.add(slot.path)
            return _Gate.apply(output, score, None, slot)

        return hook

    def _is_owned(self) -> bool:
        """Whether the call that added the hooks still runs."""
        if self._owner is None:  # of a copy of the model
            return False
        owner, thread = self._owner
        # the backward pass of a GPU, which computes blocks a second time under checkpointing, has a thread of its own
        here = thread == threading.get_ident()
        frame: Optional[FrameType] = sys._getframe() if here else sys._current_frames().get(thread)
        while frame is not None:
            if frame is owner:
                return True
            frame = frame.f_back
        self.detach()
        return False


def _spread(slot: Slot, units: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """A mask of units as one of features, 1 for those that belong to no unit."""
    mask = features.new_ones(features.shape[-1])
    for start, length in slot.parts:
        mask[start : start + length] = units.to(mask).repeat_interleave(length // len(units))
    return mask


def _device(layer: nn.Module) -> torch.device:
    tensor = next(chain(layer.parameters(), layer.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
