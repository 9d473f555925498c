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
"""BatchNorm in a narrowed model (stand-in until helper recal)."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F

from .narrowed import Narrowed, NarrowedParameter, Ranges, change_class, narrowed_class, plain_class, stored_tensor, take


class NarrowedBatchNorm(Narrowed):
    @property
    def weight(self) -> Any:
        full = stored_tensor(self, "weight")
        return full if full is None else take(full, 0, self.active_out)

    @property
    def running_mean(self) -> Any:
        full = self._buffers["running_mean"]
        return full if full is None else take(full, 0, self.active_out)

    @property
    def running_var(self) -> Any:
        full = self._buffers["running_var"]
        return full if full is None else take(full, 0, self.active_out)

    @property
    def num_features(self) -> int:
        whole = self.__dict__["num_features"]
        return whole if self.active_out is None else sum(b - a for a, b in self.active_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training or self.running_mean is None:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        mean, var = self.__dict__.get("statistics") or (self.running_mean, self.running_var)
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)


def set_norm_narrowed(layer: nn.Module, ranges: Optional[Ranges], whole: bool) -> None:
    layer.__dict__.pop("statistics", None)
    layer.__dict__.pop("active_out", None)
    if whole:
        change_class(layer, plain_class(layer))
        return
    if ranges is not None:
        layer.__dict__["active_out"] = ranges
    if not isinstance(layer, Narrowed):
        change_class(layer, narrowed_class(type(layer), NarrowedBatchNorm))
