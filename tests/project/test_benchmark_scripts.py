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
"""Every script of benchmarks/ runs: the smallest run that each of them knows, in this process. What their tables say is
tested in test_benchmarks.py, test_kernel_benchmarks.py and test_training_benchmark.py, most of it slow."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.places import BENCHMARKS, REPOSITORY
from test_benchmarks import load

from peft_elastic.common import assets
from peft_elastic.layers import extension, ops


BUILT = str(getattr(extension._C, "__file__", None))
EXTENSION = pytest.mark.skipif(not extension.is_built(), reason="needs the C++ extension")
COMPILER = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
PROC = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory and libraries are read from /proc")


def asset(name):
    cached = any(folder.startswith(f"{name}-") for folder in assets.cached())
    return pytest.mark.skipif(not cached, reason=f"{name} is not cached, and is not downloaded for this")


EFFICIENTNET = asset("efficientnet-lite0")
SMOLLM2, MINILM, REVIEWS = asset("smollm2-135m-instruct"), asset("all-minilm-l6-v2"), asset("vader-icwsm2014")


# the arguments of the smallest run, beside `--out` in the list that begins with it
SCRIPTS = {
    "before_after": (
        ["--out", "--smoke", "--before", str(REPOSITORY), "--after", str(REPOSITORY)],
        [EXTENSION, pytest.mark.slow],
    ),
    "bootstrapnas": (["--out", "--smoke"], [EFFICIENTNET]),
    "crossover": (["--out", "--smoke", "--threads", "1"], [EXTENSION]),
    "eftnas": (["--out", "--smoke"], [MINILM, REVIEWS]),
    "expansion": (["--out", "--smoke"], [EXTENSION, COMPILER]),
    "generate": (["--out", "--smoke", "--threads", "1", "--sparsities", "0.5"], [EXTENSION, PROC]),
    "gpu": (["--out", "--smoke"], []),
    "importance": (["--out", "--smoke"], [MINILM, REVIEWS]),
    "int4": (["--out", "--smoke"], [EXTENSION, COMPILER]),
    "kernels": (["--out", "--smoke", "--threads", "1", "--deepsparse-python", ""], [EXTENSION, COMPILER, PROC]),
    "larger_than_memory": (["--out", "--smoke", "--work", "{tmp_path}/work"], [PROC]),
    "levels_before_after": (["--out", "--smoke", "--before", BUILT, "--after", BUILT], [EXTENSION]),
    "lonas": (["--out", "--smoke", "--methods", "sandwich"], [MINILM, REVIEWS]),
    "merging": (["--model", "tiny"], [PROC]),
    "nls_vs_lora": ([], [pytest.mark.skip("test_benchmarks.py runs it")]),
    "operators": (["--size", "32"], []),
    "parallel_search": (["--out", "--smoke"], [pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]),
    "pruning": (["--out", "--smoke"], [SMOLLM2, REVIEWS]),
    "sqft": (["--out", "--smoke", "--methods", "qa"], [SMOLLM2, REVIEWS]),
    "structured": (
        ["--out", "--smoke", "--parts", "methods", "speed", "--methods", "block-only"],
        [SMOLLM2, REVIEWS],
    ),
    "threads": (["--out", "--smoke", "--threads", "1"], []),
    "training": (["--model", "tiny", "--steps", "1", "--memory-runs", "1", "--seq", "8", "--device", "cpu"], [PROC]),
    "widths": (["--out", "--smoke"], [SMOLLM2, MINILM]),
}


def test_every_script_is_here():
    assert {path.stem for path in BENCHMARKS.glob("*.py")} == SCRIPTS.keys()


def calls_itself_here(module):
    """Stands in for `subprocess` in a module: calls of the script itself run in this process, which saves the seconds of
    importing torch, and all others as they are."""

    def run(command, **options):
        if [str(part) for part in command[:2]] != [sys.executable, module.__file__]:
            return subprocess.run(command, **options)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            module.main([str(part) for part in command[2:]])
        return SimpleNamespace(stdout=said.getvalue(), returncode=0)

    return SimpleNamespace(**vars(subprocess) | {"run": run})


@pytest.mark.parametrize(
    ("name", "arguments"),
    [pytest.param(name, arguments, id=name, marks=marks) for name, (arguments, marks) in SCRIPTS.items()],
)
def test_smallest_run(name, arguments, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setitem(sys.modules, "training", None)  # there is one among the tests, too; put back at the end
    del sys.modules["training"]
    monkeypatch.setattr(ops, "DENSE_ROWS", ops.DENSE_ROWS)  # crossover.py sets it
    if name == "kernels":  # the script itself sets what torch reads when it is loaded
        from _support import kernels as module
    else:
        module = load(name)
    if hasattr(module, "subprocess") and hasattr(module, "__file__"):
        monkeypatch.setattr(module, "subprocess", calls_itself_here(module))
    if name == "generate":

        def start(configuration, folder, args):
            served = module.Served(str(folder / configuration.file), configuration.dtype)
            served.close = lambda: None
            return served, served.about

        monkeypatch.setattr(module, "start", start)
    if arguments[0] == "--out":
        arguments = ["--out", str(tmp_path), *(word.replace("{tmp_path}", str(tmp_path)) for word in arguments[1:])]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        module.main(arguments)
    assert "|" in said.getvalue()  # a table
    for file in tmp_path.rglob("*.json"):
        json.loads(file.read_text())
