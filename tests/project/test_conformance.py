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
"""The comparison of peft's own tests with elastic LoRA and with stock, on a folder of tests made here."""

import json
import subprocess
import sys

import pytest
from support import places


TESTS = """
import pytest
import torch
from peft import IA3Config, KasaConfig, LoraConfig, get_peft_model


@pytest.mark.parametrize("config_cls", [LoraConfig, IA3Config])
def test_both(config_cls):
    get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))


def test_stock_fails():
    assert LoraConfig().r == 0


def test_without_lora():
    pass


def test_refused():
    LoraConfig(kasa_config=KasaConfig())


def test_differs():
    assert not hasattr(LoraConfig(), "elastic_ranks")
"""


@pytest.mark.slow
def test_rows_that_differ_are_explained_or_reported(tmp_path):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_lora.py").write_text(TESTS)
    script = places.TESTS / "conformance" / "compare.py"
    command = [sys.executable, str(script), str(folder), "--out", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 rows use LoRA and pass with stock, 1 of them with ElasticLoraConfig." in done.stdout
    groups = json.loads((tmp_path / "rows.json").read_text())["groups"]
    assert groups.pop("variants and initialisations that are refused") == ["tests/test_lora.py::test_refused"]
    ((title, rows),) = groups.items()
    assert title.startswith("UNEXPLAINED") and rows == ["tests/test_lora.py::test_differs"]
