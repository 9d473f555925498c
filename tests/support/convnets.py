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
"""Convolutional networks of every shape that papers have, small, written by hand: what tracing has to understand, or to refuse.

`NETS` has, by name: the class, the shape of its input, and what is true of it: names of channels that must be elastic, and names that
must be fixed with a part of the reason.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm


class Plain(nn.Module):
    """Biases, max pooling, and a linear layer that reads every position."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 5, padding=2)
        self.b = nn.Conv2d(16, 24, 3, padding=1, stride=2)
        self.hidden = nn.Linear(24 * 4 * 4, 32)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.a(x)), 2)
        x = F.gelu(self.b(x)).flatten(1)
        return self.head(self.drop(torch.tanh(self.hidden(x))))


class Basic(nn.Module):
    def __init__(self, channels, width=None):
        super().__init__()
        width = width or channels
        self.a, self.an = nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.b, self.bn = nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.bn(self.b(F.relu(self.an(self.a(x))))))


class Residual(nn.Module):
    """Of blocks that add to their input, some of which end in a gamma of zero."""

    def __init__(self, zero_gamma=False):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Basic(16, 24), Basic(16), Basic(16, 32))
        self.down = nn.Conv2d(16, 32, 1, stride=2)
        self.last = nn.ModuleList([Basic(32, 16)])
        self.head = nn.Linear(32, 5)
        if zero_gamma:
            for block in self.blocks:
                nn.init.zeros_(block.bn.weight)
                nn.init.zeros_(block.bn.bias)

    def forward(self, x):
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        x = self.last[0](self.down(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Separable(nn.Module):
    """Depthwise convolutions, the second with two outputs for each channel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise, self.norm = nn.Conv2d(16, 16, 5, padding=2, groups=16), nn.BatchNorm2d(16)
        self.point = nn.Conv2d(16, 24, 1)
        self.more, self.more_norm = nn.Conv2d(24, 48, 3, padding=1, groups=24), nn.BatchNorm2d(48)
        self.last = nn.Conv2d(48, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu6(self.norm(self.depthwise(F.relu6(self.stem(x)))))
        x = F.hardswish(self.more_norm(self.more(self.point(x))))
        return self.head(self.last(x).mean((2, 3)))


class Grouped(nn.Module):
    """ResNeXt: 8 groups of 4 channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.an = nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32)
        self.g, self.gn = nn.Conv2d(32, 32, 3, padding=1, groups=8), nn.BatchNorm2d(32)
        self.b, self.bn = nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.relu(self.gn(self.g(F.relu(self.an(self.a(x))))))
        return self.head((x + self.bn(self.b(y))).mean((2, 3)))


class DenseLayer(nn.Module):
    def __init__(self, channels, growth):
        super().__init__()
        self.n, self.c = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.m, self.d = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x):
        return torch.cat([x, self.d(F.relu(self.m(self.c(F.relu(self.n(x))))))], 1)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.Sequential(DenseLayer(16, 8), DenseLayer(24, 8), DenseLayer(32, 8))
        self.norm, self.head = nn.BatchNorm2d(40), nn.Linear(40, 5)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.layers(self.stem(x)))).mean((2, 3)))


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one = nn.Conv2d(16, 8, 1)
        self.three = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1))
        self.five = nn.Sequential(nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, (5, 1), padding=(2, 0)))
        self.pool = nn.Conv2d(16, 8, 1)
        self.last, self.head = nn.Conv2d(40, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        pooled = F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([self.one(x), self.three(x), self.five(x), self.pool(pooled)], 1)
        return self.head(self.last(F.relu(x)).mean((2, 3)))


class Squeeze(nn.Module):
    """Squeeze-excitation, by convolutions and by linear layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.down, self.up = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.next = nn.Conv2d(32, 16, 3, padding=1)
        self.fall, self.rise = nn.Linear(16, 4), nn.Linear(4, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))
        x = self.next(x)
        gate = F.hardsigmoid(self.rise(F.relu(self.fall(x.mean((2, 3))))))
        return self.head((x * gate[:, :, None, None]).mean((2, 3)))


class Activations(nn.Module):
    """PReLU of one number for each channel, and of one number; GroupNorm of several groups and of one."""

    def __init__(self):
        super().__init__()
        self.a, self.p, self.gn = nn.Conv2d(3, 16, 3, padding=1), nn.PReLU(16), nn.GroupNorm(4, 16)
        self.b, self.q, self.one = nn.Conv2d(16, 24, 3, padding=1), nn.PReLU(), nn.GroupNorm(1, 24)
        self.c, self.plain = nn.Conv2d(24, 16, 3, padding=1), nn.GroupNorm(2, 16, affine=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.gn(self.p(self.a(x)))
        x = self.one(self.q(self.b(x)))
        return self.head(self.plain(self.c(x)).mean((2, 3)))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class NextBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.dw, self.norm = nn.Conv2d(channels, channels, 7, padding=3, groups=channels), nn.LayerNorm(channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x):
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class Next(nn.Module):
    """ConvNeXt: LayerNorm with channels last and first, and a layer scale."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 2, stride=2), LayerNorm2d(16)
        self.blocks = nn.Sequential(NextBlock(16), NextBlock(16))
        self.down, self.next = nn.Sequential(LayerNorm2d(16), nn.Conv2d(16, 24, 2, stride=2)), NextBlock(24)
        self.last, self.head = nn.LayerNorm(24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.next(self.down(self.blocks(self.norm(self.stem(x)))))
        return self.head(self.last(x.mean((-2, -1))))


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)
        self.c, self.out = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 3, 1)

    def forward(self, x):
        x = F.relu(self.b(F.pixel_unshuffle(F.relu(self.a(x)), 2)))
        return self.out(self.c(F.pixel_shuffle(x, 2)))


class ShuffleUnit(nn.Module):
    def __init__(self, half):
        super().__init__()
        self.a, self.an = nn.Conv2d(half, half, 1), nn.BatchNorm2d(half)
        self.d, self.dn = nn.Conv2d(half, half, 3, padding=1, groups=half), nn.BatchNorm2d(half)
        self.b, self.bn = nn.Conv2d(half, half, 1), nn.BatchNorm2d(half)

    def forward(self, x):
        kept, x = x.chunk(2, 1)
        x = F.relu(self.bn(self.b(self.dn(self.d(F.relu(self.an(self.a(x))))))))
        x = torch.cat([kept, x], 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.units = nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(ShuffleUnit(8), ShuffleUnit(8))
        self.last, self.head = nn.Conv2d(16, 24, 1), nn.Linear(24, 5)

    def forward(self, x):
        return self.head(F.relu(self.last(self.units(self.stem(x)))).mean((2, 3)))


class GroupShuffle(nn.Module):
    """ShuffleNet v1: the channels are shuffled between two grouped convolutions; and a norm over all of them hides that from masks."""

    def __init__(self, norm=True):
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(1, 16) if norm else nn.Identity()
        self.b, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(self.a(x))
        n, c, h, w = x.shape
        x = x.reshape(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.b(x)).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.mid, self.norm = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.up1, self.c = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.Conv2d(32, 16, 3, padding=1)
        self.up2, self.d = (
            nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1),
            nn.Conv2d(16, 8, 3, padding=1),
        )
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.b(F.max_pool2d(a, 2)))
        x = F.relu(self.norm(self.mid(F.avg_pool2d(b, 2))))
        x = F.relu(self.c(torch.cat([self.up1(x), b], 1)))
        return self.out(F.relu(self.d(torch.cat([self.up2(x), a], 1))))


class Sequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv1d(4, 16, 5, padding=4, dilation=2), nn.BatchNorm1d(16)
        self.b = nn.Conv1d(16, 16, 3, padding="same", groups=4)
        self.hidden, self.m, self.head = nn.Linear(16, 24), nn.BatchNorm1d(24), nn.Linear(24, 5)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.n(self.a(x)))))
        return self.head(F.relu(self.m(self.hidden(F.adaptive_max_pool1d(x, 1).squeeze(-1)))))


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.b, self.up = nn.Conv3d(8, 16, 3, stride=2, padding=1), nn.ConvTranspose3d(16, 8, 2, stride=2)
        self.out = nn.Conv3d(8, 3, 1)

    def forward(self, x):
        x = F.relu(self.n(self.a(x)))
        return self.out(x + self.up(F.relu(self.b(x))))


class Twice(nn.Module):
    """One layer, one norm without parameters and one residual block at work twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16, affine=False, track_running_stats=False)
        self.block, self.head = Basic(16, 24), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.norm(self.shared(F.relu(self.shared(x)))))
        return self.head(self.block(self.block(x)).mean((2, 3)))


class Tied(nn.Module):
    """Two layers with one weight, in a residual stream: the same channels on both sides; and one module under two names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.b.weight = self.a.weight
        self.first = self.again = Basic(16, 24)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x + F.relu(self.a(x))
        x = x + F.relu(self.b(x))
        return self.head(self.again(self.first(x)).mean((2, 3)))


class TiedApart(nn.Module):
    """Two layers with one weight whose channels are different ones."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.b.weight = self.a.weight
        self.last, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.last(F.relu(self.b(F.relu(self.a(F.relu(self.stem(x))))))).mean((2, 3)))


class OptionA(nn.Module):
    """A shortcut that fills the new channels with zeros."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 24, 3, 2, 1),
            nn.Conv2d(24, 16, 3, padding=1),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.b(F.relu(self.a(x)))
        return self.head(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).mean((2, 3)))


class Wrapped(nn.Module):
    """Weights that are computed from other parameters."""

    def __init__(self):
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Conv2d(3, 16, 3, padding=1))
        self.b = nn.Conv2d(16, 24, 3, padding=1)
        prune.l1_unstructured(self.b, "weight", 0.3)
        self.c, self.d = nn.Conv2d(24, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))
        return self.head(F.relu(self.d(x)).mean((2, 3)))


class Instance(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True)
        self.b, self.m = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, affine=False)
        self.c, self.o = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16, track_running_stats=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.m(self.b(F.relu(self.n(self.a(x))))))
        return self.head(F.relu(self.o(self.c(x))).mean((2, 3)))


class Dropped(nn.Module):
    """Dropout of channels, and of whole branches."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.n = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.drop, self.head = nn.Dropout2d(0.2), nn.Linear(16, 5)

    def forward(self, x):
        x = self.drop(F.relu(self.stem(x)))
        y = self.n(self.a(x))
        if self.training:
            y = y * torch.rand(len(y), 1, 1, 1, device=y.device).gt(0.5) * 2
        return self.head((x + y).mean((2, 3)))


class Attention(nn.Module):
    """A softmax over channels, and an average over them that says where to look."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 1)
        self.where, self.last, self.head = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x * F.softmax(self.gate(x.mean((2, 3), keepdim=True)), 1)
        look = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        x = x * torch.sigmoid(self.where(look))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Outputs(nn.Module):
    """Two heads and features, as a dict."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, 24, 3, padding=1),
        )
        self.classes, self.boxes = nn.Linear(24, 5), nn.Conv2d(24, 4, 1)

    def forward(self, x):
        features = self.a(F.relu(self.stem(x)))
        y = F.relu(self.b(F.relu(features)))
        return {"classes": self.classes(y.mean((2, 3))), "rest": [self.boxes(y), features]}


class Normalized(nn.Module):
    """Constants of the images and a scale of its own in the outermost module."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1))
        self.stem, self.a = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.scale, self.shift = nn.Parameter(torch.rand(16, 1, 1) + 0.5), nn.Parameter(torch.randn(1, 16, 1, 1))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.stem((x - self.mean) / self.std.sqrt()))
        return self.head(F.relu(self.a(x * self.scale) + self.shift).mean((2, 3)))


class Mixture(nn.Module):
    """What no rule knows, beside what is ordinary: a product of features with themselves, a recurrent layer, a half of the channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 3, padding=1)
        self.recurrent, self.free, self.head = nn.GRU(16, 16, batch_first=True), nn.Linear(16, 24), nn.Linear(24, 5)

    def forward(self, x):
        x = self.a(F.relu(self.stem(x)))
        x = x + x.flip(1)
        x = self.b(F.relu(x))
        x, _ = self.recurrent(x.flatten(2).transpose(1, 2))
        x = x + torch.einsum("nlc,nlc->nl", x, x)[..., None]
        return self.head(F.relu(self.free(x.mean(1))))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = x * 2 if x.mean() > 0 else x
        return self.head(x.mean((2, 3)))


class OldWeightNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a = weight_norm(nn.Conv2d(3, 16, 3, padding=1)), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(F.relu(self.a(self.stem(x))).mean((2, 3)))


class Arguments(nn.Module):
    """A block with another argument, which nn.Identity does not take."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x, scale):
            return x + self.a(x) * scale

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.plain = nn.Conv2d(3, 16, 3, padding=1), self.Block(), Basic(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.plain(self.block(self.stem(x), 0.5)).mean((2, 3)))


@dataclass
class Net:
    make: type
    shape: tuple = (2, 3, 8, 8)
    elastic: tuple = ()
    # name -> a part of the reason
    fixed: dict = field(default_factory=dict)
    # that can be skipped
    blocks: tuple = ()


OUTPUT = "it is an output"
NETS = {
    "plain": Net(Plain, (2, 3, 16, 16), ("a", "b", "hidden"), {"head": OUTPUT}),
    "residual": Net(
        Residual,
        elastic=("stem", "blocks.0.a", "blocks.1.a", "blocks.2.a", "down", "last.0.a"),
        fixed={"head": OUTPUT},
        blocks=("blocks.0", "blocks.1", "blocks.2", "last.0"),
    ),
    "zero-gamma": Net(
        lambda: Residual(True), elastic=("stem", "blocks.1.a"), blocks=("blocks.0", "blocks.1", "blocks.2", "last.0")
    ),
    "separable": Net(Separable, elastic=("stem", "point", "last"), fixed={"head": OUTPUT}),
    "grouped": Net(Grouped, elastic=("stem", "a"), fixed={"head": OUTPUT}),
    "dense": Net(Dense, elastic=("stem", "layers.0.c", "layers.0.d", "layers.1.d", "layers.2.c", "layers.2.d")),
    "inception": Net(Inception, elastic=("stem", "one", "three.0", "three.2", "five.0", "five.2", "pool", "last")),
    "squeeze": Net(Squeeze, elastic=("stem", "down", "next", "fall")),
    "activations": Net(Activations, elastic=("a", "b", "c")),
    "next": Net(
        Next, (2, 3, 16, 16), ("stem", "blocks.0.up", "down.1", "next.up"), blocks=("blocks.0", "blocks.1", "next")
    ),
    "pixels": Net(Pixels, elastic=("a", "b", "c"), fixed={"out": OUTPUT}),
    "shuffle": Net(Shuffle, elastic=("units.0.a", "last"), fixed={"stem": "chunk"}),
    "group-shuffle": Net(GroupShuffle, elastic=("b",), fixed={"a": "copies"}),
    "unet": Net(UNet, elastic=("a", "b", "mid", "up1", "c", "up2", "d"), fixed={"out": OUTPUT}),
    "sequence": Net(Sequence, (3, 4, 12), ("a", "hidden")),
    "volume": Net(Volume, (2, 2, 4, 4, 4), ("a", "b")),
    "twice": Net(Twice, elastic=("stem", "block.a"), blocks=("block",)),
    "tied": Net(Tied, elastic=("first.a",), fixed={"stem": "is one of 'b' too"}, blocks=("first",)),
    "tied-apart": Net(TiedApart, elastic=("last",), fixed={"a": "is one of 'b' too"}),
    "option-a": Net(OptionA, elastic=("a",), fixed={"stem": "put together", "b": "put together"}),
    "wrapped": Net(Wrapped, elastic=("d",), fixed={"a": "", "b": ""}),
    "instance": Net(Instance, elastic=("a", "b", "c")),
    "dropped": Net(Dropped, elastic=("stem",)),
    "attention": Net(Attention, elastic=("stem", "last")),
    "outputs": Net(Outputs, elastic=("stem", "b"), fixed={"a": OUTPUT, "classes": OUTPUT, "boxes": OUTPUT}),
    "normalized": Net(Normalized, elastic=("stem", "a")),
    "mixture": Net(Mixture, elastic=("stem", "free"), fixed={"a": "flip", "b": "gru"}),
    "arguments": Net(Arguments, elastic=("stem", "plain.a"), blocks=("plain",)),
}


def make_net(name, seed=0):
    """A net with weights and statistics that are not those of a new one, in evaluation mode."""
    torch.manual_seed(seed)
    net = NETS[name].make().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
            if (
                isinstance(module, nn.modules.batchnorm._NormBase)
                and module.weight is not None
                and module.weight.any()
            ):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
    return net


def images_for(name, seed=1):
    return torch.randn(NETS[name].shape, generator=torch.Generator().manual_seed(seed))


def counted_macs(model, *inputs):
    """Multiplications of all convolutions and linear layers for one sample, counted where they are done."""
    total = 0

    def count(layer, args, output):
        nonlocal total
        weight = layer.weight
        if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            positions = args[0].numel() // args[0].shape[1]
        else:
            positions = output.numel() // weight.shape[0]
        total += positions * weight.numel()

    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, kinds)]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return total / inputs[0].shape[0]
