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
"""A super-network by hand: a tiny Llama whose ranks, heads, MLP channels and blocks are elastic, and its subnets as models
that are physically smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from support.models import tiny_llama
from torch import nn

from peft_elastic.supernet import Choice, SearchSpace, Subnet
from peft_elastic.supernet.space import LayerShape


_PARTS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


class NarrowLinear(nn.Module):
    """The first rows and columns of a linear layer and of its adapter."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base_layer = linear
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        self.size, self.rank = (linear.out_features, linear.in_features), rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out_features, in_features = self.size
        bias = None if self.base_layer.bias is None else self.base_layer.bias[:out_features]
        base = nn.functional.linear(x, self.base_layer.weight[:out_features, :in_features], bias)
        a = self.lora_A.weight[: self.rank, :in_features]
        return base + (x @ a.T) @ self.lora_B.weight[:out_features, : self.rank].T


class NarrowLlama(nn.Module):
    """Implements `ElasticHost`. Every block has a rank, heads (of 4), MLP channels (of 48) and a depth choice."""

    def __init__(self, base: Any = None, ranks=(4, 2), heads=(4, 2), mlp=(48, 32, 16), depth: bool = True) -> None:
        super().__init__()
        self.model = tiny_llama() if base is None else base
        self.blocks = list(self.model.model.layers)
        choices, layers = [], []
        for number, block in enumerate(self.blocks):
            path = f"model.layers.{number}"
            there = (f"depth:{path}",) if depth else ()
            units = 0
            for part, names in _PARTS.items():
                parent = getattr(block, part)
                width, full = ("heads", 4) if part == "self_attn" else ("mlp", 48)
                for name in names:
                    linear = getattr(parent, name)
                    setattr(parent, name, NarrowLinear(linear, ranks[0]))
                    units += linear.in_features + linear.out_features
                    layers.append(
                        LayerShape(
                            f"{path}.{part}.{name}",
                            linear.out_features,
                            linear.in_features,
                            bias=linear.bias is not None,
                            width=f"{width}:{path}",
                            full_width=full,
                            narrows="in" if name == names[-1] else "out",
                            rank=f"rank:{path}",
                            depth=there,
                        )
                    )
            choices += [
                Choice("rank", path, ranks, (path,), units),
                Choice("heads", path, heads),
                Choice("mlp", path, mlp),
            ]
            if depth:
                choices.append(Choice("depth", path, (1, 0)))
                norms = sum(p.numel() for n, p in block.named_parameters() if "norm" in n)
                layers.append(LayerShape(path, norms, 0, bias=True, depth=there))
                block.forward = self._skippable(path, block.forward)
        self.search_space = SearchSpace(choices, layers)
        self.active_subnet = self.chosen = self.search_space.max
        self.__dict__["_peft_elastic_host"] = self

    def _skippable(self, path: str, forward: Callable) -> Callable:
        def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return forward(x, *args, **kwargs) if self.active_subnet[f"depth:{path}"] else x

        return run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def sample_subnet(self, subnet: Subnet) -> None:
        self.active_subnet = self.search_space.subnet(subnet)
        for layer in self.search_space.layers:
            if layer.in_features and all(layer.size(self.active_subnet)):
                narrow: Any = self.model.get_submodule(layer.name)
                narrow.size, narrow.rank = layer.size(self.active_subnet), self.active_subnet[layer.rank]

    def set_subnet(self, subnet: Subnet | Mapping[str, int] | str) -> None:
        self.chosen = self.search_space.subnet(subnet)
        self.sample_subnet(self.chosen)

    def restore_subnet(self) -> None:
        self.sample_subnet(self.chosen)


def extract(space: SearchSpace, subnet: Mapping[str, int], base: Any = None) -> Any:
    """The base model of a subnet, without its adapters, as an ordinary smaller one; `base` is cut."""
    model = tiny_llama() if base is None else base
    for layer in space.layers:
        out_features, in_features = layer.size(subnet)
        if out_features and in_features:
            parent, _, name = layer.name.rpartition(".")
            whole: Any = model.get_submodule(layer.name)
            cut = nn.Linear(in_features, out_features, whole.bias is not None, dtype=whole.weight.dtype)
            cut.weight = nn.Parameter(whole.weight.detach()[:out_features, :in_features].clone())
            if whole.bias is not None:
                cut.bias = nn.Parameter(whole.bias.detach()[:out_features].clone())
            setattr(model.get_submodule(parent), name, cut)
    kept = [b for n, b in enumerate(model.model.layers) if subnet.get(f"depth:model.layers.{n}", 1)]
    for number, block in enumerate(kept):
        block.self_attn.layer_idx = number
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    return model
