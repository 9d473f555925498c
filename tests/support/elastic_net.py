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
"""A small elastic network that is no LoRA model of peft, searches of it, and accuracies with a known optimum."""

import torch
from torch import nn

from peft_elastic.search import search_subnet
from peft_elastic.supernet import Choice, SearchSpace, Subnet, get_elastic_host


class LowRankLinear(nn.Module):
    """base(x) + B[:, :k] A[:k] x"""

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.base_layer = nn.Linear(dim, dim, bias=False)
        self.lora_A = nn.Linear(dim, rank, bias=False)
        self.lora_B = nn.Linear(rank, dim, bias=False)
        self.lora_dropout = nn.Dropout(0.5)
        self.rank = rank

    def forward(self, x):
        a, b = self.lora_A.weight[: self.rank], self.lora_B.weight[:, : self.rank]
        return self.base_layer(x) + self.lora_dropout(x) @ a.T @ b.T


class ElasticNet(nn.Module):
    """Implements `ElasticHost`: a chosen subnet, and a sampled one that `eval()` drops."""

    def __init__(self, n_layers: int = 6, options: tuple[int, ...] = (8, 6, 4, 2), dim: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(LowRankLinear(dim, options[0]) for _ in range(n_layers))
        self.search_space = SearchSpace(
            Choice("rank", f"layers.{i}", options, modules=(f"layers.{i}",), unit_parameters=2 * dim)
            for i in range(n_layers)
        )
        self.chosen = self.search_space.max
        self.__dict__["_peft_elastic_host"] = self

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x

    @property
    def active_subnet(self):
        return Subnet({f"rank:layers.{i}": layer.rank for i, layer in enumerate(self.layers)})

    def _activate(self, subnet):
        for i, layer in enumerate(self.layers):
            layer.rank = subnet[f"rank:layers.{i}"]

    def set_subnet(self, subnet):
        self.chosen = self.search_space.subnet(subnet)
        self._activate(self.chosen)

    def sample_subnet(self, subnet):
        self._activate(self.search_space.subnet(subnet))

    def restore_subnet(self):
        self._activate(self.chosen)

    def train(self, mode=True):
        if not mode:
            self.restore_subnet()
        return super().train(mode)


def quality(model):
    """An accuracy with a known optimum: later layers matter more, with diminishing returns. It is read from the layers."""
    ranks = [layer.rank for layer in get_elastic_host(model).layers]
    return sum((i + 1) * (1 - (1 - rank / 8) ** 2) for i, rank in enumerate(ranks)) / 21


def search(model, evaluate=quality, **kwargs):
    if kwargs.get("algorithm") == "r-nsga2":
        kwargs.setdefault("reference_points", {"accuracy": 0.8, "macs": 1000})
    return search_subnet(model, evaluate, **{"n_evals": 30, "progress": False, **kwargs})


def value_of(model):
    """An accuracy that every choice adds to, later blocks more."""
    subnet, space = model.active_subnet, model.search_space
    shares = [(i + 1) * subnet[c.key] / c.options[0] for i, c in enumerate(space)]
    return sum(shares) / sum(range(1, len(space) + 1))
