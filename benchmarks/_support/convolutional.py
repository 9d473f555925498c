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
"""Convolutional networks for small images: data, a residual network, its training, and BatchNorm statistics by momentum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from peft_elastic.common import assets


Batch = tuple[torch.Tensor, torch.Tensor]


# -- data --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images (n, 1, side, side), float32 of mean 0 and standard deviation 1 over the training part, and their digits (n,).

    Args:
        train, validation, held_out: (images, digits) to train on, to choose on and to report on.
    """

    train: Batch
    validation: Batch
    held_out: Batch

    def calibration(self, batches: int, size: int = 64) -> list[torch.Tensor]:
        """The first training images, without their digits."""
        return list(self.train[0][: batches * size].split(size))

    def first(self, train: int, others: int) -> Images:
        """The first of each part."""
        cut = (train, others, others)
        return Images(*((x[:n], y[:n]) for (x, y), n in zip((self.train, self.validation, self.held_out), cut)))


def mnist(train: int, validation: int) -> Images:
    """MNIST: the first `train` of its training images, `validation` of its validation images, and all 10,000 test images."""
    parts = [
        (torch.tensor(images[:limit]), torch.tensor(digits[:limit]))
        for (images, digits), limit in ((assets.mnist("train"), train), (assets.mnist("validation"), validation))
    ]
    images, digits = assets.mnist("test")
    parts.append((torch.tensor(images), torch.tensor(digits)))
    return _scaled(parts)


def digits() -> Images:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, in a random order that is always the same: 1,000 to train on, 297 to choose on, 500
    held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(images).view(-1, 8, 8)[order], torch.tensor(labels)[order]
    return _scaled(list(zip(images.split([1000, 297, 500]), labels.split([1000, 297, 500]))))


def _scaled(parts: list[Batch]) -> Images:
    floats = [images[:, None].float() for images, _ in parts]
    mean, deviation = floats[0].mean(), floats[0].std()
    return Images(*(((x - mean) / deviation, labels.long()) for x, (_, labels) in zip(floats, parts)))  # type: ignore[arg-type]


# -- network -----------------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm, added to the input (through a 1 x 1 convolution where shapes differ)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (n, outputs, height / stride, width / stride) of (n, inputs, height, width)."""
        y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(self.shortcut(x) + y)


class ResidualNet(nn.Module):
    """A classifier of 6 residual blocks of 16, 16, 32, 32, 64 and 64 channels.

    Args:
        stride (`int`): of the stem.
        classes (`int`): outputs.
    """

    def __init__(self, stride: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(
            ResidualBlock(16, 16, 1),
            ResidualBlock(16, 16, 1),
            ResidualBlock(16, 32, 2),
            ResidualBlock(32, 32, 1),
            ResidualBlock(32, 64, 2),
            ResidualBlock(64, 64, 1),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(64, classes)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """Compute the logits (n, classes) of images (n, 1, height, width); with labels (n,) a dict of `loss` and `logits`, as transformers'
        Trainer takes it."""
        x = self.blocks(torch.relu(self.norm(self.stem(pixel_values))))
        logits = self.classifier(self.pool(x).flatten(1))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


# Of whose channels the part "order" narrows: those inside of the blocks.
INNER = [f"blocks.{number}.conv1" for number in range(6)]


def reset(model: nn.Module, seed: int) -> nn.Module:
    """Draw all weights of a model anew, in place."""
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model


# -- training and evaluation -------------------------------------------------------------------------------------------


def quality(data: Batch, size: int = 250) -> Callable[[nn.Module], dict[str, float]]:
    """Mean loss of a model, and its share of right answers in percent."""
    images, labels = data

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        logits = torch.cat([model(batch) for batch in images.split(size)])
        right = int((logits.argmax(1) == labels).sum())
        return {"loss": float(F.cross_entropy(logits, labels)), "accuracy": 100 * right / len(labels)}

    return evaluate


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9; weight decay 1e-4, none of norms and biases."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 1e-4}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def minibatches(data: Batch, size: int, steps: int, seed: int) -> Iterator[Batch]:
    """That many batches; each epoch in an order of its own, what is left of it over is not used."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(labels))
    done = 0
    while done < steps:
        order = torch.randperm(len(labels), generator=generator)
        for index in order[: len(order) // size * size].split(size)[: steps - done]:
            yield images[index], labels[index]
            done += 1


def train(model: nn.Module, data: Batch, steps: int, lr: float, seed: int, size: int = 64) -> None:
    """Train an ordinary model; the learning rate falls as a cosine. In evaluation mode afterwards."""
    optimizer = make_optimizer(model, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps))
    model.train()
    for images, labels in minibatches(data, size, steps, seed):
        optimizer.zero_grad()
        model(images, labels=labels)["loss"].backward()
        optimizer.step()
        schedule.step()
    model.eval()


# -- what a recalibration by momentum does -----------------------------------------------------------------------------


class RunningStatistics:
    """Statistics of the BatchNorms of a super-network that move on with each subnet, as NNCF 2.7.0 has them: momentum 0.1, and those of
    the subnet before to begin with. In plain PyTorch, on extracted subnets whose channels are the first of the whole model.

    Args:
        model: the whole model, from whose statistics they start.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = {name: [t.clone() for t in _statistics(norm)] for name, norm in _norms(model)}

    @torch.no_grad()
    def adapt(self, subnet: nn.Module, batches: list[torch.Tensor]) -> nn.Module:
        """Run batches through an extracted subnet in training mode, from the statistics as they are now, and keep what becomes of them."""
        for name, norm in _norms(subnet):
            for mine, kept in zip(_statistics(norm), self._kept[name]):
                mine.copy_(kept[: len(mine)])
        subnet.train()
        for batch in batches:
            subnet(batch)
        subnet.eval()
        for name, norm in _norms(subnet):
            for mine, kept in zip(_statistics(norm), self._kept[name]):
                kept[: len(mine)] = mine
        return subnet


def _norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def _statistics(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return norm.running_mean, norm.running_var
