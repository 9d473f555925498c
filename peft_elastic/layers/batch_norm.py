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
"""BatchNorm in a model of which a part is active.

The statistics that a BatchNorm keeps are those of the whole model. While any part of the model is not active, its inputs are distributed in another
way, also where it is whole itself: in training it normalizes by the batch then and leaves what it keeps alone, and in evaluation it takes
the statistics that were averaged for the active subnet, if they were (`supernet/recalibration.py`).
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F

from ..common.parameters import is_spread
from .narrowed import (
    Narrowed,
    Ranges,
    change_class,
    is_asked_by_name,
    narrowed_class,
    plain_class,
    set_in_replica,
    stored_tensor,
    take,
)


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# (mean, variance) of the active channels
Statistics = tuple[torch.Tensor, torch.Tensor]


class StatisticsSums:
    """What a BatchNorm adds up over the batches of a recalibration: float64 sums of the batches' means and unbiased variances, times their
    number of samples."""

    def __init__(self) -> None:
        self.samples = 0.0
        self.mean: torch.Tensor | None = None
        self.variance: torch.Tensor | None = None

    def add(self, samples: int, mean: torch.Tensor, variance: torch.Tensor) -> None:
        mean, variance = mean.double() * samples, variance.double() * samples
        self.samples += samples
        self.mean = mean if self.mean is None else self.mean + mean
        self.variance = variance if self.variance is None else self.variance + variance


class NarrowedBatchNorm(Narrowed):
    """Mixin in front of a BatchNorm of a model of which a part is active."""

    eps: float

    @property
    def weight(self) -> Optional[torch.Tensor]:
        full = stored_tensor(self, "weight")
        return full if full is None or is_asked_by_name() or is_spread(full) else take(full, 0, self.active_out)

    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        set_in_replica(self, "weight", value)

    @property
    def running_mean(self) -> Optional[torch.Tensor]:
        return self._kept("running_mean")

    @property
    def running_var(self) -> Optional[torch.Tensor]:
        return self._kept("running_var")

    @property
    def num_features(self) -> int:
        whole: int = self.__dict__["num_features"]
        return whole if self.active_out is None else sum(stop - start for start, stop in self.active_out)

    def _kept(self, name: str) -> Optional[torch.Tensor]:
        full: Any = self._buffers.get(name)
        return full if full is None else take(full, 0, self.active_out)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)  # type: ignore[operator]
        if self.training or self.running_mean is None:
            sums: StatisticsSums | None = self.__dict__.get("sums")
            if sums is None:
                return F.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)
            # with a momentum of one these are the statistics of the batch itself
            mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_mean)  # type: ignore[arg-type]
            output = F.batch_norm(input, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            sums.add(input.shape[0], mean, variance)
            return output
        mean, variance = self.__dict__.get("statistics") or (self.running_mean, self.running_var)
        return F.batch_norm(input, mean, variance, self.weight, self.bias, False, 0.0, self.eps)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if (statistics := self.__dict__.get("statistics")) is not None:
            self.__dict__["statistics"] = tuple(fn(tensor) for tensor in statistics)
        return self


def set_norm_narrowed(layer: nn.Module, ranges: Optional[Ranges], whole: bool) -> None:
    """Tell a BatchNorm which of its channels are active; statistics that were averaged for another subnet are forgotten.

    Args:
        layer: one of `BATCH_NORMS`.
        ranges: of channels; None for all.
        whole (`bool`): whether all of the model is active, so that the layer is of its own class.
    """
    if whole:
        change_class(layer, plain_class(layer))
    elif not isinstance(layer, Narrowed):
        change_class(layer, narrowed_class(type(layer), NarrowedBatchNorm))
    layer.__dict__.pop("statistics", None)
    if ranges is None:
        layer.__dict__.pop("active_out", None)
    else:
        layer.__dict__["active_out"] = ranges
