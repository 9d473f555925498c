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
"""The device that tests/device runs on: that which `PEFT_ELASTIC_TEST_DEVICE` names, else CUDA if there is one."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from support import pretend
from torch import nn
from transformers import TrainingArguments


VARIABLE = "PEFT_ELASTIC_TEST_DEVICE"


@functools.cache
def chosen() -> torch.device | None:
    """None if there is nothing to test. RuntimeError if the variable names a device that is not there."""
    name = os.environ.get(VARIABLE)
    if not name:
        return torch.device("cuda:0") if torch.cuda.is_available() else None
    if name.partition(":")[0] == pretend.NAME:
        pretend.load()
    try:
        torch.zeros(1, device=name).add_(1).cpu()
    except Exception as error:
        raise RuntimeError(f"{VARIABLE} is {name!r}, which cannot be used: {error}") from error
    device = torch.device(name)
    return device if device.type in ("cpu", "mps") or device.index is not None else torch.device(device.type, 0)


def others(device: torch.device) -> list[torch.device]:
    """The further devices of this kind."""
    module = getattr(torch, device.type, None)
    count = module.device_count() if device.type not in ("cpu", "mps") and module is not None else 0
    return [torch.device(device.type, i) for i in range(count) if i != device.index]


def is_on(device: torch.device, *things: Any) -> bool:
    """Whether all parameters and buffers of these modules, and these tensors, are there."""
    tensors = []
    for thing in things:
        tensors += [*thing.parameters(), *thing.buffers()] if isinstance(thing, nn.Module) else [thing]
    return all(tensor.device == device or device.type == tensor.device.type == "mps" for tensor in tensors)


def moved(batch: Any, device: torch.device | str) -> Any:
    if isinstance(batch, dict):
        return {key: moved(value, device) for key, value in batch.items()}
    return batch.to(device) if isinstance(batch, torch.Tensor) else batch


def reference(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in float64."""
    return copy.deepcopy(model).double()


@contextmanager
def without_waiting(device: torch.device) -> Iterator[None]:
    """What makes the host wait for the device is an error, where that can be found out."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    before = pretend.waited() if device.type == pretend.NAME else 0
    yield
    after = pretend.waited() if device.type == pretend.NAME else 0
    assert after == before, f"the host has waited {after - before} times"


class Arguments(TrainingArguments):
    """Of a Trainer on this device: accelerate takes the first CUDA, XPU, MPS, ... device that is there, and no pretended one."""

    on: Any = None

    @functools.cached_property
    def _setup_devices(self) -> torch.device:
        device = super()._setup_devices
        if self.on is None or self.on.type == "cpu":
            return device
        self.distributed_state.device = self.on
        self._n_gpu = 1  # and no copies on the others, if there are any
        if self.on.type == "cuda":
            torch.cuda.set_device(self.on)
        return self.on
