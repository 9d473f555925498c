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
"""A pytest plugin that lets the tests of peft run with a configuration of ours in the place of `LoraConfig`, and notes how
each test ended. `compare.py` starts it.

`CONFORMANCE_CONFIG` names the configuration, empty for stock LoRA. `CONFORMANCE_LOG` is the file that gets one line of JSON
for each test: its id, how it ended, the traceback, and how many LoRA configurations it made. `CONFORMANCE_ROWS`, if set, is a
file with the ids of the tests to run.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig

import peft_elastic


_NAME = os.environ["CONFORMANCE_CONFIG"]
_CONFIG = getattr(peft_elastic, _NAME) if _NAME else LoraConfig
_HOMES = (peft, peft.tuners, peft.tuners.lora)

_made = 0
_made_before = 0


class _AlwaysCached(dict):
    """Stands for peft's note of the models that its tests have downloaded before: none may ask the hub."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: object) -> int:
        return 0


def _show(config_cls: Any) -> None:
    for home in _HOMES:
        home.LoraConfig = config_cls


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "single_gpu_tests: of peft",
        "multi_gpu_tests: of peft",
        "regression: of peft",
        "bitsandbytes: of peft",
    ):
        config.addinivalue_line("markers", line)
    torch.set_num_threads(1)
    finish = LoraConfig.__post_init__

    def count(self: LoraConfig) -> None:
        global _made
        _made += 1
        finish(self)

    LoraConfig.__post_init__ = count  # type: ignore[method-assign]
    _show(_CONFIG)  # while the modules of tests are imported, and not for what peft itself imports later


def _other_tuners(item: pytest.Item) -> bool:
    """Whether the test is a row of another configuration than LoRA's."""
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    classes = [value for value in values if inspect.isclass(value) and issubclass(value, PeftConfig)]
    return bool(classes) and _CONFIG not in classes


def _row(nodeid: str) -> str:
    """The id of a test, the same with each configuration."""
    return nodeid.replace(_NAME.removesuffix("Config"), "Lora") if _NAME else nodeid


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rows = os.environ.get("CONFORMANCE_ROWS")
    if rows:
        with open(rows) as file:
            asked = set(json.load(file))
        items[:] = [item for item in items if _row(item.nodeid) in asked]
    else:
        items[:] = [item for item in items if not _other_tuners(item)]
    _show(LoraConfig)
    for name, module in list(sys.modules.items()):
        if name.endswith("testing_utils") and hasattr(module, "_HUB_MODEL_ACCESSES"):
            module._HUB_MODEL_ACCESSES = _AlwaysCached()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    global _made_before
    _made_before = _made
    torch.manual_seed(0)
    return (yield)


_ends: dict[str, tuple[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    before = _ends.get(report.nodeid, ("passed", ""))
    if report.outcome != "passed" and before[0] != "failed":
        _ends[report.nodeid] = (report.outcome, report.longreprtext[-6000:])
    if report.when == "teardown":
        outcome, message = _ends.pop(report.nodeid, ("passed", ""))
        if hasattr(report, "wasxfail"):
            outcome = "skipped"
        line = {
            "row": _row(report.nodeid),
            "outcome": outcome,
            "message": message,
            "lora_configs": _made - _made_before,
        }
        with open(os.environ["CONFORMANCE_LOG"], "a") as file:
            file.write(json.dumps(line) + "\n")
