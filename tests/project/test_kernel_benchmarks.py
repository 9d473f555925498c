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
"""benchmarks/kernels.py and generate.py run, and their tables are made of their measurements. Figures are not tested.

Peers take part if the environment names their interpreters, as in the scripts: PEFT_ELASTIC_BENCH_DEEPSPARSE and
PEFT_ELASTIC_BENCH_LLAMA.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from support.places import BENCHMARKS

from peft_elastic.layers import extension


LEVELS = [level["name"] for level in extension.levels() if level["usable"]]
# Figures are written with six digits each, so the quotient of two is off by up to 1e-5 of itself.
SIX_DIGITS = 2e-5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory and libraries are read from /proc"),
    pytest.mark.skipif(not LEVELS, reason="needs the C++ extension"),
]


def run(name, out, *arguments):
    """(results, what was printed) of a smoke run with one thread."""
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), "--smoke", "--threads", "1", "--out", str(out), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == (out / f"{name}.md").read_text().strip()
    assert (out / f"{name}.png").stat().st_size > 1000
    return json.loads((out / f"{name}.json").read_text()), result.stdout


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_kernels(tmp_path):
    results, printed = run("kernels", tmp_path)
    rows = results["rows"]
    engines = {row["engine"] for row in rows}
    assert engines >= {"sparse", "torch fp32", "torch bf16", "torch int8", "torch CSR"}
    assert ("DeepSparse" in engines) == ("PEFT_ELASTIC_BENCH_DEEPSPARSE" in os.environ)
    assert {row["level"] for row in rows if row["engine"] == "sparse"} == set(LEVELS)
    assert all(row["seconds"]["p10"] <= row["seconds"]["median"] <= row["seconds"]["p90"] for row in rows)

    def find(**wanted):
        (row,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
        return row

    at = {"shape": "64x96", "batch": 1, "threads": 1}
    mine = find(engine="sparse", level=LEVELS[0], values="bf16", sparsity=0.5, activations="fp32", **at)
    seconds = mine["seconds"]["median"]
    assert mine["gigabytes_per_s"] == pytest.approx(mine["weight_bytes"] / seconds / 1e9, rel=SIX_DIGITS)
    peer = find(engine="torch bf16", **at)
    assert mine["speed_up_over"]["torch bf16"] == pytest.approx(peer["seconds"]["median"] / seconds, rel=SIX_DIGITS)
    assert find(engine="torch CSR", sparsity=0.7, **at)["values"] == "fp32"
    if "own dense bf16" in engines:
        share = mine["weight_bytes"] / seconds / results["bandwidth"]["1"]
        assert mine["share_of_bandwidth"] == pytest.approx(share, rel=SIX_DIGITS)
        bar = next(bar for bar in results["bars"] if "own dense bf16" in bar["bar"] and bar["level"] == LEVELS[0])
        assert bar["cases"]["64x96, bf16 50%, batch 1, fp32 activations"] == mine["speed_up_over"]["own dense bf16"]
    for bar in results["bars"]:
        assert bar["worst"] == (max if bar["bar"].startswith("packing") else min)(bar["cases"].values())
        assert f"| {bar['bar']} | {bar['level']} | {bar['wanted']:.2f} | {bar['worst']:.2f} |" in printed


def test_generate(tmp_path):
    results, printed = run("generate", tmp_path)
    rows = {(row["configuration"], row["step"]): row for row in results["rows"]}
    names = {"dense fp32", "dense bf16", "sparse bf16 50%", "sparse bf16 70%", "sparse int8 50%", "sparse int8 70%"}
    peers = (
        {"llama.cpp f16", "llama.cpp bf16", "llama.cpp q8_0"} if "PEFT_ELASTIC_BENCH_LLAMA" in os.environ else set()
    )
    assert rows.keys() == {(name, step) for name in names for step in (False, True)} | {
        (name, False) for name in peers
    }
    for row in rows.values():
        assert row["tokens_per_second"]["count"] == results["settings"]["rounds"]
        assert row["peak_bytes"] > row["peak_bytes_above_start"] > 0
        assert len(row["tokens"]) == results["settings"]["new_tokens"]
    reference = rows["dense fp32", False]["tokens"]
    assert len(set(reference)) > 2  # otherwise equal tokens would show nothing
    # rows of the same weights, rounded to no less than bfloat16, begin alike
    for same in [("dense fp32", True), *((name, False) for name in peers - {"llama.cpp q8_0"})]:
        assert rows[same]["same_tokens"] == len(reference)
        assert rows[same]["tokens"] == reference
    assert all(f"| {name}{' + step' * step} |" in printed for name, step in rows)


@pytest.mark.skipif("avx2" not in LEVELS, reason="this processor has no AVX2")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_held_to_avx2(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), "--smoke", "--only-avx2", "--threads", "1"]
    command += ["--out", str(tmp_path), "--deepsparse-python", ""]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "kernels-avx2.json").read_text())["rows"]
    assert {row["level"] for row in rows if row["engine"] == "sparse"} == {"avx2"}
    assert "Everything held to AVX2." in result.stdout


@pytest.mark.skipif("avx2" not in LEVELS, reason="this processor has no AVX2")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_expansion(tmp_path):
    """The program checks its own products before it takes the time."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(BENCHMARKS / "expansion.py"), "--smoke", "--out", str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(json.loads((tmp_path / "expansion.json").read_text())["from L2"]) == 6
    assert "| int8, 2:4 |" in result.stdout


def test_crossover(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(BENCHMARKS / "crossover.py"), "--smoke", "--threads", "1", "--out", str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(json.loads((tmp_path / "crossover.json").read_text())["rows"]) == 4
    assert "| 64x96 | bf16 | 1 | 16 |" in result.stdout


@pytest.mark.skipif("avx2" not in LEVELS, reason="this processor has no AVX2")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_int4(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(BENCHMARKS / "int4.py"), "--smoke", "--levels", "avx2", "--out", str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {row["engine"] for row in json.loads((tmp_path / "int4.json").read_text())["rows"]} >= {
        "sparse int4, groups of 128",
        "dense int4, groups of 32",
        "torch bf16",
    }
    assert "| sparse int4, groups of 128 70% (avx2) |" in result.stdout
