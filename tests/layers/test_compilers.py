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
"""The kernels with compilers other than the one that built the extension, where these are installed."""

import shutil
import subprocess

import pytest
from support.compiling import CSRC, level_flags


SOURCES = sorted(path for path in CSRC.rglob("*.cpp") if path.name != "module.cpp")  # needs pybind11


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
@pytest.mark.parametrize("compiler", ["clang++", "aarch64-linux-gnu-g++"])
def test_compiles_without_warnings(compiler, source, tmp_path):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    flags = level_flags(source) if compiler == "clang++" else []
    command = [compiler, "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror", *flags, f"-I{CSRC}", "-c", source]
    run = subprocess.run([*command, "-o", tmp_path / "object.o"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
