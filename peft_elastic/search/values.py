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
"""Measured values that are no finite numbers: a subnet that gives NaN is a result like any other, but none to choose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


# JSON knows no such numbers, and what Python writes for them is refused by other readers.
_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def plain(value: float) -> float:
    """The value; NaN as the one object that is equal to itself in a comparison of dicts."""
    return math.nan if math.isnan(value) else value


def to_json(values: Mapping[str, float]) -> dict[str, float | str]:
    """The values with a name in the place of each that is not finite; the inverse of `from_json`."""
    names = {str(number): name for name, number in _NAMES.items()}
    return {key: value if math.isfinite(value) else names[str(float(value))] for key, value in values.items()}


def from_json(values: Mapping[str, Any]) -> dict[str, float]:
    """What `to_json` was given.

    Raises:
        ValueError: if a value is neither a number nor one of the names.
    """
    found: dict[str, Any] = {
        key: _NAMES.get(value, value) if isinstance(value, str) else value for key, value in values.items()
    }
    wrong = [key for key, value in found.items() if isinstance(value, bool) or not isinstance(value, (int, float))]
    if wrong:
        raise ValueError(f"{wrong[0]!r} is {found[wrong[0]]!r}, which is no number")
    return {key: plain(value) for key, value in found.items()}
