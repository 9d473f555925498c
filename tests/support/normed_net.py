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
"""A small convolutional network with BatchNorm and dropout, elastic by hand: its channels are sliced in its own forward."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from peft_elastic.layers.batch_norm import set_norm_narrowed
from peft_elastic.supernet import Choice, SearchSpace, Subnet


WIDTHS = (8, 6, 4)


class NormedNet(nn.Module):
    """Implements `ElasticHost`. `first` and `second` have as many channels as their choices say; `last` always all, but other inputs."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.last = nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(5, 4)
        for norm in self.norms().values():
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        self.search_space = SearchSpace(
            Choice("rank", name, WIDTHS, modules=(name,), unit_parameters=9) for name in ("first", "second")
        )
        self.widths = self.chosen = self.search_space.max
        self.__dict__["_peft_elastic_host"] = self
        self.eval()

    def norms(self):
        return {"first": self.first, "second": self.second, "last": self.last}

    def forward(self, x):
        a, b = self.widths.values()
        x = F.relu(self.first(F.conv2d(x, self.conv1.weight[:a], self.conv1.bias[:a], padding=1)))
        x = self.dropout(x)
        x = F.relu(self.second(F.conv2d(x, self.conv2.weight[:b, :a], self.conv2.bias[:b], padding=1)))
        x = self.dropout(x)
        x = self.last(F.conv2d(x, self.conv3.weight[:, :b], self.conv3.bias))
        return self.head(x.mean((2, 3)))

    @property
    def active_subnet(self):
        return self.widths

    def sample_subnet(self, subnet):
        self.widths = self.search_space.subnet(subnet)
        whole = self.widths == self.search_space.max
        for (name, norm), width in zip(self.norms().items(), [*self.widths.values(), 5]):
            everything = width == norm.__dict__["num_features"]
            set_norm_narrowed(norm, None if everything else ((0, width),), whole, name)

    def set_subnet(self, subnet):
        self.sample_subnet(subnet)
        self.chosen = self.widths

    def restore_subnet(self):
        self.sample_subnet(self.chosen)

    def subnet(self, first, second):
        return Subnet({"rank:first": first, "rank:second": second})


def images(sizes=(7, 4, 5), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 6, 6, generator=generator) * (i + 1) for i, size in enumerate(sizes)]


def reference(model, batches):
    """{norm: (mean, variance)} in float64 by NumPy, with nothing but the definition: each batch normalised by its own statistics."""
    a, b = model.widths.values()
    w = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    inputs = {name: [] for name in model.norms()}

    def conv(x, weight, bias):
        pad = weight.shape[-1] // 2
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))
        return np.einsum("nchwij,ocij->nohw", windows, weight) + bias[:, None, None]

    def norm(name, x):
        width = x.shape[1]
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
        inputs[name].append((len(x), mean, x.var((0, 2, 3), ddof=1)))
        x = (x - mean[:, None, None]) / np.sqrt(var + 1e-5)[:, None, None]
        return x * w[f"{name}.weight"][:width, None, None] + w[f"{name}.bias"][:width, None, None]

    for batch in batches:
        x = conv(batch.double().numpy(), w["conv1.weight"][:a], w["conv1.bias"][:a])
        x = conv(np.maximum(norm("first", x), 0), w["conv2.weight"][:b, :a], w["conv2.bias"][:b])
        norm("last", conv(np.maximum(norm("second", x), 0), w["conv3.weight"][:, :b], w["conv3.bias"]))
    return {
        name: [sum(n * values[k] for n, *values in rows) / sum(n for n, *_ in rows) for k in (0, 1)]
        for name, rows in inputs.items()
    }
