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
"""EfficientNet-Lite0 as a plain module, with its ImageNet weights (`peft_elastic.common.assets.efficientnet_lite0`).

The network of https://huggingface.co/papers/1905.11946 without squeeze-excitation and with ReLU6 for swish: a stem, 16 blocks of an
expansion, a depthwise convolution and a projection, a head. Strided convolutions pad as TensorFlow does for images of even
sides, more on the right and at the bottom.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peft_elastic.common import assets


# Of each stage: blocks, kernel size, stride of the first block, expansion, channels out.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
IMAGE_SIZE = 224
# Names in the file of weights -> those here.
_NAMES = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_conv_head": "head.conv",
    "_bn1": "head.norm",
    "_fc": "classifier",
}
_NAMES_IN_BLOCK = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}


class ConvNorm(nn.Module):
    """A convolution without bias, its BatchNorm and, but for projections, ReLU6."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        total = kernel - stride  # of the padding of both sides, for even sizes
        inside = 0 if stride > 1 else total // 2
        self.pad: nn.Module = nn.Identity()
        if stride > 1:
            self.pad = nn.ZeroPad2d((total // 2, total - total // 2) * 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, inside, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)
        self.act: nn.Module = nn.ReLU6() if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (n, outputs, height / stride, width / stride) of (n, inputs, height, width)."""
        return self.act(self.norm(self.conv(self.pad(x))))  # type: ignore[no-any-return]


class Block(nn.Module):
    """An inverted residual block: wide inside, narrow outside; with a skip connection where both ends have one shape."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand: nn.Module = ConvNorm(inputs, wide) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, kernel, stride, groups=wide)
        self.project = ConvNorm(wide, outputs, act=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute (n, outputs, height / stride, width / stride) of (n, inputs, height, width)."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y  # type: ignore[no-any-return]


class EfficientNetLite0(nn.Module):
    """A classifier of 224 x 224 images, 4.65 million parameters with 1,000 classes.

    Args:
        classes (`int`): outputs of the last layer.
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, 2)
        blocks, inputs = [], 32
        for number, kernel, stride, expansion, outputs in _STAGES:
            for i in range(number):
                blocks.append(Block(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNorm(inputs, 1280)
        self.pool, self.dropout = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.2)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits (n, classes) of images (n, 3, height, width), (pixel / 255 - 0.5) / 0.5; sides are multiples of 32."""
        x = self.pool(self.head(self.blocks(self.stem(x)))).flatten(1)
        return self.classifier(self.dropout(x))  # type: ignore[no-any-return]


def pretrained() -> EfficientNetLite0:
    """The network with its ImageNet weights, in evaluation mode.

    Raises:
        AssetError: as `assets.efficientnet_lite0`.
    """
    from safetensors.torch import load_file

    model = EfficientNetLite0()
    weights = load_file(assets.efficientnet_lite0() / "model.safetensors")
    model.load_state_dict({_renamed(name): tensor for name, tensor in weights.items()})
    return model.eval()


def preprocessed(image: Any) -> torch.Tensor:
    """An image as the network takes it: its shorter side made 256 pixels, the middle cut out, (pixel / 255 - 0.5) / 0.5.

    Args:
        image: uint8 (height, width, 3), RGB.

    Returns:
        `torch.Tensor`: float32 (3, 224, 224).
    """
    x = torch.tensor(image).permute(2, 0, 1)[None].float()
    height, width = x.shape[2:]
    scale = 256 / min(height, width)
    size = (round(height * scale), round(width * scale))
    x = nn.functional.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 255)
    top, left = ((side - IMAGE_SIZE) // 2 for side in size)
    return x[0, :, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE] / 127.5 - 1


def _renamed(name: str) -> str:
    parts = name.split(".")
    if parts[0] == "_blocks":
        return ".".join(["blocks", parts[1], _NAMES_IN_BLOCK[parts[2]], *parts[3:]])
    return ".".join([_NAMES[parts[0]], *parts[1:]])
