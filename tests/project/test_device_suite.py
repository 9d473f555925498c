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
"""tests/device, which is for GPUs, on a pretended one: every machine finds what would mix devices there."""

import os
import sys

import pytest
from support import devices, fresh, pretend
from support.places import REPOSITORY, TESTS


FILES = sorted(path.name for path in (TESTS / "device").glob("test_*.py"))


def run(file, device, *arguments):
    environment = os.environ | {devices.VARIABLE: device}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "-p",
        "no:cacheprovider",
        f"tests/device/{file}",
        *arguments,
    ]
    return fresh.run(command, env=environment, cwd=REPOSITORY, capture_output=True, timeout=1800)


def passes(done):
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("file", FILES)
def test_on_a_pretended_device(file):
    if reason := pretend.why_not():
        pytest.skip(reason)
    passes(run(file, pretend.NAME, "-m", "not slow"))


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in FILES if file != "test_pretend.py"])
def test_the_slow_ones_on_a_pretended_device(file):
    if reason := pretend.why_not():
        pytest.skip(reason)
    passes(run(file, pretend.NAME, "-m", "slow"))


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in FILES if file != "test_pretend.py"])
def test_on_the_cpu(file):
    passes(run(file, "cpu"))


def test_a_device_that_is_not_there():
    done = run("test_pretend.py", "cuda:77", "-k", "computes")
    assert done.returncode == 1 and "PEFT_ELASTIC_TEST_DEVICE is 'cuda:77', which cannot be used" in done.stdout
