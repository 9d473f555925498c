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
"""Counting the operators that a computation launches, as benchmarks/operators.py does."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from support.places import BENCHMARKS


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_of_operators", BENCHMARKS / "operators.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


benchmark = _load()
Operators = benchmark.Operators
