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
"""The clock of measurements: a processor that sleeps until a device is done has spent no time of its own."""

import time

import pytest
import torch

from peft_elastic.cost.timing import clock


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", torch.device("xpu")])
def test_other_devices_are_timed_by_the_time_that_passes(device):
    assert torch.get_num_threads() == 1
    assert clock(device) is time.perf_counter


def test_one_thread_is_timed_by_what_it_takes():
    before, now = clock()(), clock()
    time.sleep(0.2)
    assert now is clock("cpu") and (now is time.perf_counter or now() - before < 0.1)
