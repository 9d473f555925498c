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
the statistics that were averaged for the active subnet, if they were (`structure/recalibration.py`).
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from ..common.checks import wrong
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
        return self._buffers["running_mean"] if is_asked_by_name() else self._kept("running_mean")

    @property
    def running_var(self) -> Optional[torch.Tensor]:
        return self._buffers["running_var"] if is_asked_by_name() else self._kept("running_var")

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
        used: Any = self.__dict__.get("statistics") or (self.running_mean, self.running_var)
        # a copy that nn.DataParallel makes has the statistics of the first device
        mean, variance = (tensor.to(input.device) for tensor in used)
        return F.batch_norm(input, mean, variance, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, active={self.num_features}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        if (statistics := self.__dict__.get("statistics")) is not None:
            self.__dict__["statistics"] = tuple(fn(tensor) for tensor in statistics)
        return self


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module normalises with running statistics: a BatchNorm of torch, or one of the copies that libraries have of their
    own (torchvision's `FrozenBatchNorm2d`, transformers' `DetrFrozenBatchNorm2d`), which holds them as buffers."""
    return isinstance(module, _BatchNorm) or (
        "BatchNorm" in type(module).__name__ and "running_mean" in module._buffers
    )


def check_narrowable_norm(name: str, layer: nn.Module) -> None:
    """ValueError unless a layer is a BatchNorm that can be narrowed.

    Args:
        name (`str`): of the layer in its model, for the message.
        layer (`nn.Module`): of the class `nn.BatchNorm1d`, `2d` or `3d`, or one that takes their forward as it is.
    """
    cls = plain_class(layer)
    reason = None
    if isinstance(layer, nn.SyncBatchNorm):
        reason = "it averages over processes in a forward of its own; make the model elastic before it is converted"
    elif not isinstance(layer, _BatchNorm):
        reason = "it is no nn.BatchNorm1d, 2d or 3d"
    elif getattr(layer, "has_uninitialized_params", bool)():
        reason = "it has not seen any input yet, so its channels are unknown; run the model once"
    elif getattr(cls, "forward", None) is not _BatchNorm.forward:  # such as one with an activation in it
        reason = "it has a forward of its own"
    if reason is not None:
        raise ValueError(f"layer {name!r} ({cls.__name__}) cannot be narrowed: {reason}.")


def set_norm_narrowed(layer: nn.Module, ranges: Optional[Ranges], whole: bool, name: str = "") -> None:
    """Tell a BatchNorm which of its channels are active; statistics that were averaged for another subnet are forgotten.

    Args:
        layer: see `check_narrowable_norm`.
        ranges: of channels, ascending runs (start, stop); None for all.
        whole (`bool`): whether all of the model is active, so that the layer is of its own class.
        name (`str`): of the layer in its model, for messages.

    Raises:
        ValueError: if the layer cannot be narrowed, has no such channels, or is to have some of them where all of the model is active.
            Nothing has changed then.
    """
    if not whole or isinstance(layer, NarrowedBatchNorm):  # what is whole anyway may be of any class
        check_narrowable_norm(name, layer)
        _check_ranges(ranges, layer.__dict__["num_features"], whole)
    if whole:
        change_class(layer, plain_class(layer))
    elif not isinstance(layer, Narrowed):
        change_class(layer, narrowed_class(type(layer), NarrowedBatchNorm))  # type: ignore[arg-type]
    layer.__dict__.pop("statistics", None)
    if ranges is None:
        layer.__dict__.pop("active_out", None)
    else:
        layer.__dict__["active_out"] = ranges


def _check_ranges(ranges: Any, size: int, whole: bool) -> None:
    if ranges is None:
        return
    if whole:
        raise wrong("ranges", "None where `whole` is True", ranges)
    ends = [0, *(end for run in ranges for end in run)]
    ascending = all(a <= b for a, b in zip(ends, ends[1:])) and all(start < stop for start, stop in ranges)
    if not ranges or not ascending or ends[-1] > size:
        raise wrong("ranges", f"ascending runs (start, stop) of channels from 0 to {size}, or None", ranges)
