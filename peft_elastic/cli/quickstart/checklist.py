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
"""The work of `quickstart` in stages, so that a run that was interrupted continues where it stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft_elastic.common.documents import ANYTHING, NUMBER, MapOf, Record, read_json
from peft_elastic.common.writing import atomic_write_text


_STAGES = Record(settings=MapOf(ANYTHING), done=MapOf(Record(None, ANYTHING, seconds=NUMBER)))


class Checklist:
    """Runs stages in order and keeps what each returned in a JSON file; a stage that is in the file is not run again.

    Args:
        path: the file.
        settings: JSON values that the results depend on.
        stages: number of stages, for the display.

    Raises:
        ValueError: if the file belongs to other settings, or is no such file.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], stages: int) -> None:
        self.path, self.settings, self.stages = path, dict(settings), stages
        self.results: dict[str, dict[str, Any]] = {}
        self._start = time.perf_counter()
        if path.exists():
            self._read()
        else:
            self._write()

    def _read(self) -> None:
        try:
            data = _STAGES.check(read_json(self.path), "it")
        except ValueError as error:
            raise ValueError(f"{os.fspath(self.path)!r} is damaged ({error}); start again with `--fresh`.") from error
        settings, self.results = data["settings"], data["done"]
        names = [name for name in {**settings, **self.settings} if settings.get(name) != self.settings.get(name)]
        if names:
            differences = "; ".join(
                f"{name} is {settings.get(name)!r} there, {self.settings.get(name)!r} here" for name in names
            )
            raise ValueError(
                f"`--out` {os.fspath(self.path.parent)!r} holds a run with other settings: {differences}. Use another "
                "folder, the same settings to continue it, or `--fresh` to delete it."
            )

    def _write(self) -> None:
        atomic_write_text(self.path, json.dumps({"settings": self.settings, "done": self.results}))

    def run(self, name: str, title: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of `work`, from the file if it is there. `seconds` is added to it."""
        number = list(self.results).index(name) + 1 if name in self.results else len(self.results) + 1
        print(f"\n[{number}/{self.stages}] {title}", flush=True)
        if name in self.results:
            print(f"      done before, in {self.results[name]['seconds']:.0f} s")
            return self.results[name]
        start = time.perf_counter()
        result = work()
        result["seconds"] = round(time.perf_counter() - start, 2)
        self.results[name] = result
        self._write()
        elapsed = time.perf_counter() - self._start
        print(
            f"      {result['seconds']:.0f} s; {elapsed // 60:.0f} min {elapsed % 60:02.0f} s since the start",
            flush=True,
        )
        return result

    @property
    def seconds(self) -> dict[str, float]:
        """Time that each stage took when it was run, in seconds."""
        return {name: result["seconds"] for name, result in self.results.items()}
