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
"""Progress bars: tqdm's, and lines of text where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm
from tqdm.std import tqdm as plain_tqdm

from .._process import SECONDS_BETWEEN_LINES


class _Lines(plain_tqdm):
    """A progress bar where there is no terminal to draw it on: a line of text now and then, and a last one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        seconds = SECONDS_BETWEEN_LINES
        self._said: float = -1  # the position that was written last
        self._next = time.monotonic() + seconds
        rare = {"mininterval": seconds, "maxinterval": seconds, "delay": seconds, "ncols": 0}
        super().__init__(*args, **kwargs | rare)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None and time.monotonic() >= self._next:
            self._say()

    def clear(self, nolock: bool = False) -> None:
        pass  # lines stay

    def close(self) -> None:
        if not self.disable and self._said != self.n:
            self._say()
        super().close()

    def _say(self) -> None:
        self._said, self._next = self.n, time.monotonic() + SECONDS_BETWEEN_LINES
        self.fp.write(f"{self}\n")
        self.fp.flush()


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """tqdm's progress bar, on a terminal or in a notebook; elsewhere, in a log file, a line every half minute and one at the end.

    Args:
        iterable: to go through, if `total` is not given.
        options: of tqdm, such as `desc`, `unit`, `total` and `disable`.
    """
    in_notebook = any(kind.__name__ == "tqdm_notebook" for kind in tqdm.__mro__)
    stream = options.get("file") or sys.stderr
    if in_notebook or (stream is not None and stream.isatty()):
        return tqdm(iterable, **options)
    if stream is None:  # a program without a console
        options["disable"] = True
    return _Lines(iterable, **options | {"leave": False})
