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
"""What stands between two marks in a page is written by a script."""

from __future__ import annotations

from pathlib import Path


def put(page: Path, text: str, name: str, content: str) -> str:
    """The text of a page, with `content` between the marks that begin with `name`.

    Raises:
        ValueError: the page lacks one of them.
    """
    begin, end = f"<!-- {name}: written by docs/", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    script, closed, rest = rest.partition("-->")
    _, ended, after = rest.partition(end)
    if not (found and closed and ended):
        raise ValueError(f"{page.name} lacks {begin}... --> or {end}.")
    return f"{before}{begin}{script}-->\n\n{content}\n\n{end}{after}"


def main(page: Path, name: str, content: str) -> int:
    """Write the page anew."""
    page.write_text(put(page, page.read_text(encoding="utf-8"), name, content), encoding="utf-8")
    return 0
