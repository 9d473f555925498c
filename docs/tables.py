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
"""Tables of the docs that the code knows best. `python docs/tables.py` writes them anew; a test compares."""

from __future__ import annotations

import sys
from pathlib import Path

from marked import main, put

from peft_elastic.layers.backends import ABILITIES, BACKENDS


PAGE = Path(__file__).with_name("compatibility.md")


def backends() -> str:
    """What can be done with each kind of base, and why not."""
    notes: dict[str, int] = {}
    lines = [
        "| base | " + " | ".join(ABILITIES.values()) + " |",
        "|---" * (len(ABILITIES) + 1) + "|",
    ]
    for backend in sorted(BACKENDS, key=lambda backend: backend.packed or backend.on_grid):
        cells = []
        for ability in ABILITIES:
            reason = backend.obstacle(ability)
            cells.append("yes" if reason is None else f"no ({notes.setdefault(reason, len(notes) + 1)})")
        lines.append(f"| {backend.layers} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. ... {reason}" for reason, number in notes.items())]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page as it should be."""
    return put(PAGE, text, "backends", backends())


if __name__ == "__main__":
    sys.exit(main(PAGE, "backends", backends()))
