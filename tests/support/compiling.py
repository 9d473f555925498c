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
"""The options that setup.py compiles a C++ file with."""

import functools
import os
import platform
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools
from support.places import REPOSITORY


CSRC = REPOSITORY / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


@functools.cache
def _setup():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.chdir(REPOSITORY)
        return runpy.run_path("setup.py")


def level_flags(source: Path) -> list[str]:
    """Of a file in csrc; empty on a processor that is no x86."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    return _setup()["level_flags"](source.relative_to(REPOSITORY))


def compile_file(source: Path, target: Path, *options: str) -> Path:
    """With the compiler of the tests, as C++17, for the instructions that setup.py gives it."""
    command = [COMPILER, "-std=c++17", "-w", f"-I{CSRC}", *level_flags(source), *options, "-c", source, "-o", target]
    subprocess.run(command, check=True)
    return target
