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
"""The layers of a decoder one by one, in torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .room import Room


def _normalize(hidden: Tensor, norm: Any) -> Tensor:
    """RMSNorm over the last dimension, as the classes of transformers compute it: in float32, the weight last."""
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(hidden.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return norm.weight * torch.mul(hidden, scale, out=torch.empty_like(hidden))


def run_layers(layers: list[Any], hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, room: Room) -> Tensor:
    """The layers one by one, in torch, with whatever linear layers they have."""
    batch, dim = hidden.shape[0], cos.shape[-1]
    # x cos + rotate_half(x) sin, where rotate_half swaps the halves and negates the first: put the sign into sin
    sin = torch.cat((-sin[..., : dim // 2], sin[..., dim // 2 :]), dim=-1)
    if mask is not None:
        mask = mask[:, None, None, :]
    for layer, keys, values in zip(layers, room.views[::2], room.views[1::2], strict=True):
        attention = layer.self_attn
        x = _normalize(hidden, layer.input_layernorm)
        query = attention.q_proj(x).reshape(batch, -1, dim)
        key = attention.k_proj(x).reshape(batch, -1, dim)
        value = attention.v_proj(x).reshape(batch, -1, dim)
        if hasattr(attention, "q_norm"):
            query = _normalize(query, attention.q_norm)
            key = _normalize(key, attention.k_norm)
        heads, kv_heads = query.shape[1], key.shape[1]
        both = torch.cat((query, key), dim=1)
        swapped = both.view(batch, -1, 2, dim // 2).flip(2).view(batch, -1, dim)
        query, key = torch.addcmul(both * cos, swapped, sin).split((heads, kv_heads), dim=1)
        keys.select(2, -1).copy_(key)
        values.select(2, -1).copy_(value)
        # one position: query heads that share a key-value head are as good as positions of that head
        query = query.view(batch, kv_heads, heads // kv_heads, dim)
        attended = nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=attention.scaling
        )
        hidden = hidden + attention.o_proj(attended.reshape(batch, 1, heads * dim))
        hidden = hidden + layer.mlp(_normalize(hidden, layer.post_attention_layernorm))
    return hidden
