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
"""benchmarks/training.py runs and its table is made of its measurements. Its figures are not tested."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support.places import BENCHMARKS


BENCHMARK = BENCHMARKS / "training.py"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_training_benchmark(tmp_path):

    command = [
        "--model",
        "tiny",
        "--steps",
        "3",
        "--memory-runs",
        "1",
        "--seq",
        "16",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    result = subprocess.run(
        [sys.executable, str(BENCHMARK), *command, "--json", str(tmp_path / "out.json")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert set(results["variants"]) == {
        "lora",
        "lora-again",
        "elastic-max",
        "elastic-sampled",
        "sparse",
        "qa",
        "naive",
    }
    lora = results["variants"]["lora"]
    for name, row in results["variants"].items():
        wall, reference = np.array(row["all_seconds"])[:, 0], np.array(lora["all_seconds"])[:, 0]
        assert row["time_ratio"]["median"] == pytest.approx(np.median(wall / reference))
        assert row["peak_ratio"] == pytest.approx(row["peak_bytes"] / lora["peak_bytes"])
        assert all(run["peak"] >= run["before"] > 0 for run in row["all_memory"])
        assert f"| {name} | {row['seconds']['median']:.3f} |" in result.stdout
    assert "28 elastic ranks" in results["trained"]
