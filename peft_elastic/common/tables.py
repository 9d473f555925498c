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
"""Tables of text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def text_table(rows: Sequence[Sequence[str]], left: int | Collection[int] = 1, gap: str = "  ") -> list[str]:
    """Lay out rows of cells in columns that are as wide as their widest cell.

    Args:
        rows: of the same number of cells, the titles among them.
        left: the columns that are aligned left, or how many of the first ones; the others are aligned right.
        gap: between two columns.

    Returns:
        One line a row, without spaces at its end.
    """
    widths = [max(map(len, column)) for column in zip(*rows)]
    at_left = set(range(left) if isinstance(left, int) else left)
    return [
        gap.join(
            cell.ljust(width) if i in at_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
