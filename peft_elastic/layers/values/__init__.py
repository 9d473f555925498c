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
"""Types of the values of a stored weight, one file each, and the table of them. README.md says how to add one."""

from __future__ import annotations

from .base import Sizes, ValueFormat
from .bf16 import BF16
from .int4 import INT4
from .int8 import INT8


__all__ = ["FORMATS", "ROUNDED", "STORED_NAMES", "Sizes", "ValueFormat", "grid_format", "most_bits", "parse_values"]

FORMATS: dict[str, ValueFormat] = {each.name: each for each in (BF16, INT8, INT4)}
ROUNDED = tuple(
    name for name, each in FORMATS.items() if not each.is_grid
)  # that a floating point weight can be rounded to
STORED_NAMES = tuple(dict.fromkeys(name for each in FORMATS.values() for name in each.tensors))


def grid_format(bits: int) -> ValueFormat | None:
    """The narrowest type that holds whole numbers of so many bits; None if there is none."""
    able = [each for each in FORMATS.values() if each.bits is not None and each.bits >= bits]
    return min(able, key=lambda each: each.bits or 0, default=None)


def most_bits() -> int:
    """The most bits of a grid that a type holds."""
    return max(each.bits or 0 for each in FORMATS.values())


def parse_values(values: str) -> tuple[ValueFormat, bool]:
    """The type, and whether zeros are left out, of "bf16", "int4" or, with all values stored, "int4 dense"."""
    return FORMATS[values.removesuffix(" dense")], not values.endswith(" dense")
