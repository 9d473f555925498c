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
"""Tests on the device that `PEFT_ELASTIC_TEST_DEVICE` names ("cuda", "cuda:1", "xpu", "mps", "cpu", "pretend"), or the first CUDA device."""

import pytest
import torch
from support import devices


@pytest.fixture(scope="session")
def device() -> torch.device:
    chosen = devices.chosen()
    if chosen is None:
        pytest.skip(
            f'there is no CUDA device; {devices.VARIABLE} names another one, such as xpu, mps or cpu, and "pretend" a pretended one'
        )
    return chosen


@pytest.fixture
def second(device: torch.device) -> torch.device:
    """Another device of the kind."""
    found = devices.others(device)
    if not found:
        pytest.skip(f"there is no second {device.type} device")
    return found[0]
