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
"""The keys and values of a cache that grows without being copied."""

from __future__ import annotations

from array import array
from operator import is_

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from ...layers.addresses import is_plain


class Room:
    """The keys and values of a cache in buffers with room to grow, where the cache itself copies all for each token.

    The layers of the cache hold views of the buffers. What others do to such a layer (reordering, cropping, updates of its
    own) replaces the view, which is how the room notices that it holds no longer.
    """

    def __init__(self, cached: list[DynamicLayer]) -> None:
        self.length = cached[0].keys.shape[2]
        self.capacity = self.length + max(64, self.length // 4)
        self.buffers: list[Tensor] = []  # keys and values of each layer in turn, [batch, kv_heads, capacity, head_dim]
        for each in cached:  # one after the other, so that no more than one layer is held twice
            self.buffers += [self._with_room(each.keys), self._with_room(each.values)]
            each.keys, each.values = (buffer.narrow(2, 0, self.length) for buffer in self.buffers[-2:])
        self.views = [view for each in cached for view in (each.keys, each.values)]
        self.is_plain = all(map(is_plain, self.buffers))
        self.addresses = array("Q", [buffer.data_ptr() for buffer in self.buffers] if self.is_plain else [])

    def _with_room(self, old: Tensor) -> Tensor:
        new = old.new_empty((*old.shape[:2], self.capacity, old.shape[3]))
        new.narrow(2, 0, self.length).copy_(old)
        return new

    def holds(self, held: list[Tensor]) -> bool:
        """Whether `held`, what the cache holds now, is what the room gave to it, and one more position finds room."""
        return (
            self.length < self.capacity
            and len(self.views) == len(held)
            and all(map(is_, self.views, held))
            # made in inference mode, it cannot be written to outside
            and (torch.is_inference_mode_enabled() or not self.buffers[0].is_inference())
        )

    def advance(self) -> None:
        """Makes the views one position longer."""
        self.length += 1
        self.views = [buffer.narrow(2, 0, self.length) for buffer in self.buffers]

    def hand_over(self, cached: list[DynamicLayer]) -> None:
        """Gives the views to the cache."""
        for each, keys, values in zip(cached, self.views[::2], self.views[1::2], strict=True):
            each.keys, each.values = keys, values
