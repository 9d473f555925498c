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
"""Files of JSON lines that long work writes its results to, and reads them from when it is continued."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .documents import Record, parse_json
from .writing import atomic_write_text, writing


class Journal:
    """A file of JSON lines: a header that says which work it belongs to, then one row per result.

    Each row is on disk before `append` returns. A process that is killed while it writes leaves at most one torn line at
    the end, which is dropped when the file is opened again.

    Args:
        path (`str` or `os.PathLike`): created with its folder if it does not exist.
        header (`Mapping[str, Any]`): JSON values that identify the work, among them its `format`.
        work (`str`): what it is, for messages: "search".
        row (`Record`): what every row holds.
        argument (`str`): by which the user named the place, for messages.

    Attributes:
        rows (`list[dict]`): what is on file.

    Raises:
        ValueError: if the file cannot be written, is damaged, or has another header; the message says what differs.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: Mapping[str, Any],
        work: str,
        row: Record,
        argument: str = "save_dir",
    ) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        self._work = work
        self._row = row
        self._argument = argument
        try:
            if self.path.exists():
                self._read(dict(header))
            else:
                atomic_write_text(self.path, json.dumps(dict(header)) + "\n")
            with open(self.path, "ab") as file:  # better refused now than after the first result
                self._end = file.seek(0, os.SEEK_END)
        except OSError as error:
            raise ValueError(f"`{self._argument}`: cannot use {os.fspath(self.path)!r}: {error}") from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row and wait until it is on disk.

        Raises:
            ValueError: if another process has written to the file in the meantime.
            OSError: if it cannot be written, naming it; it is then as it was.
        """
        if self.path.stat().st_size != self._end:
            raise ValueError(f"`{self._argument}`: another process writes to {os.fspath(self.path)!r}.")
        line = (json.dumps(row) + "\n").encode()
        with writing(self.path):
            try:
                with open(self.path, "ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:  # a full disk takes a part of it
                os.truncate(self.path, self._end)
                raise
        self._end += len(line)
        self.rows.append(dict(row))

    def _read(self, header: dict[str, Any]) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        found = _parse(lines[0]) if lines else None
        if not isinstance(found, dict) or found.get("format") != header["format"]:
            raise ValueError(f"`{self._argument}`: {os.fspath(self.path)!r} is not the history of a {self._work}.")
        names = [name for name in {**found, **header} if found.get(name) != header.get(name)]
        if names:
            differences = "; ".join(
                f"{name} is {found.get(name)!r} there, {header.get(name)!r} here" for name in names
            )
            raise ValueError(
                f"`{self._argument}` holds another {self._work} ({os.fspath(self.path)!r}): {differences}. Use another folder, or the "
                "same settings to continue it."
            )
        for number, line in enumerate(lines[1:], start=2):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("it has no end")
                self.rows.append(self._row.check(parse_json(line), "it"))
            except ValueError as error:
                if number < len(lines):
                    raise ValueError(
                        f"`{self._argument}`: line {number} of {os.fspath(self.path)!r} is damaged: {error}. Remove it and what "
                        "follows to have that done again."
                    ) from None
                os.truncate(self.path, self.path.stat().st_size - len(line))  # torn by the end of who wrote it


def _parse(line: bytes) -> Any:
    """What is on a line, None if it is damaged."""
    try:
        return parse_json(line)
    except ValueError:
        return None


__all__ = ["Journal"]
