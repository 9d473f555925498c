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
"""Context managers that put things back as they were, whatever happens inside."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from .host import ElasticHost


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the training mode of every single module as before outside."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


@contextmanager
def subnet_restored(host: ElasticHost) -> Iterator[None]:
    """The chosen subnet and, during training, the sampled one are the same afterwards as before."""
    active = host.active_subnet
    host.restore_subnet()
    chosen = host.active_subnet
    try:
        yield
    finally:
        host.set_subnet(chosen)
        if active != chosen:
            host.sample_subnet(active)


def _devices_in_use() -> tuple[str, list[int]]:
    """The kind of accelerator, and the numbers of its devices, each of which has a generator; none where nothing has used one yet, as
    asking would start it, after which a process cannot fork."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return "cuda", []
    module = torch.get_device_module(accelerator)
    if not getattr(module, "is_initialized", lambda: True)():
        return accelerator.type, []
    return accelerator.type, list(range(module.device_count()))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of `random`, NumPy and PyTorch seeded inside, and as before outside."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    kind, devices = _devices_in_use()
    with torch.random.fork_rng(devices=devices, device_type=kind):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
