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
"""benchmarks/gpu.py, as far as it can be tried without a GPU: what it writes, when it stops, and that it does not pass for a result."""

import json
import time

import pytest
from support.fresh import run_fresh
from support.places import BENCHMARKS

from peft_elastic.common.checks import is_finite


START = """
import sys, time
begin = time.monotonic()
sys.path.insert(0, sys.argv[1])
import gpu
"""


def start(script, *arguments):
    return run_fresh(START + script, BENCHMARKS, *arguments)


@pytest.mark.slow
def test_what_it_writes(tmp_path):
    done = start("gpu.main(['--smoke', '--out', sys.argv[2]], begin=begin)", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu-smoke.json", "gpu-smoke.md"]
    results = json.loads((tmp_path / "gpu-smoke.json").read_text())
    text = (tmp_path / "gpu-smoke.md").read_text()
    assert results["smoke"] and text.startswith("**A smoke run") and "do not compute the same" not in text
    assert results["unfinished"] == []
    variants = ["lora", "elastic", "sparse", "qa", "naive"]
    assert [row["variant"] for row in results["training"]] == [row["variant"] for row in results["counts"]] == variants
    assert all(len(row["seconds"]) == row["rounds"] >= 1 for row in results["training"])
    losses = {row["variant"]: row["loss"] for row in results["training"]}
    gradients = {row["variant"]: row["gradient"] for row in results["training"]}
    assert losses["naive"] == pytest.approx(losses["lora"], rel=0.05)
    assert gradients["naive"] == pytest.approx(gradients["sparse"], rel=0.02)
    assert gradients["lora"] != pytest.approx(gradients["sparse"], rel=0.1)  # so the mask is what has been compared
    assert [row["method"] for row in results["methods"]][:2] == ["magnitude", "Wanda"] and len(results["methods"]) == 6
    assert all(is_finite(row["seconds"]) for row in results["methods"])


@pytest.mark.slow
def test_it_stops_in_the_middle_of_anything(tmp_path):
    """What hangs is cut off when the minutes are over, and what was there is on disk."""
    script = """
gpu.measure_counts = lambda *arguments: time.sleep(1000)
gpu.measure_training = lambda base, args, device, budget, results: results["training"].append({"variant": "lora", "seq": 8, "batch": 1})
gpu.main(["--smoke", "--minutes", str((time.monotonic() - begin + 20) / 60), "--out", sys.argv[2]], begin=begin)
"""
    begin = time.monotonic()
    done = start(script, tmp_path)
    assert done.returncode == 3 and "The time is over." in done.stderr
    assert time.monotonic() - begin < 200
    results = json.loads((tmp_path / "gpu-smoke.json").read_text())
    assert results["unfinished"] == ["methods", "counts (cut off)"] and len(results["training"]) == 1
    assert results["seconds"] <= 60 * results["settings"]["minutes"]


@pytest.mark.slow
def test_it_wants_a_gpu(tmp_path):
    done = start("gpu.main(['--device', 'cpu', '--out', sys.argv[2]], begin=begin)", tmp_path)
    assert done.returncode == 2 and "there is no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir()) and not (BENCHMARKS / "results" / "gpu-smoke.json").exists()
