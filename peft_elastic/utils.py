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
"""Small helpers shared by all parts."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from tqdm.std import tqdm as plain_tqdm

from ._process import SECONDS_BETWEEN_LINES
from .files import scratch_folder


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


# What a disk says that takes no more, and what to do about it.
_FULL = {
    errno.ENOSPC: "free some space there, or choose another folder",
    errno.EDQUOT: "free some of your quota there, or choose another folder",
    errno.EFBIG: "the limit on the size of files is too small (`ulimit -f`)",
    errno.EROFS: "choose a folder that can be written to",
}
# The same where it is known that something was to be written.
_REMEDIES = _FULL | {
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EIO: "the disk may be failing; choose another folder",
    errno.EMFILE: "the limit on open files is too small (`ulimit -n`)",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class WriteError(OSError):
    """A file or a folder could not be written. The message names it and says what to do."""

    def __str__(self) -> str:
        what = f"cannot write {os.fspath(self.filename)!r}" if self.filename else "cannot write"
        return f"{what}: {self.strerror}; {_REMEDIES[self.errno or 0]}"


class NotPermittedError(WriteError, PermissionError):
    """A `WriteError` for want of permission."""


def write_error(error: BaseException, path: str | os.PathLike[str] | None = None) -> WriteError | None:
    """What a disk that is full, or cannot be written to, has to do with an error; None if it has nothing. safetensors and torch
    have errors of their own for it.

    Args:
        error: of whoever writes.
        path: what was written, if that is known.
    """
    if isinstance(error, OSError):
        number = error.errno
        if path is not None and error.filename is not None and not isinstance(error.filename, int):
            # an error of reading something elsewhere is none of writing this
            folder = os.path.dirname(os.path.realpath(path))
            number = number if os.path.realpath(os.fspath(error.filename)).startswith(folder) else None
    elif type(error).__name__ == "SafetensorError":
        match = re.search(r"\(os error (\d+)\)", str(error))  # Rust's words
        number = int(match[1]) if match else None
    elif isinstance(error, RuntimeError) and re.search("PytorchStreamWriter failed|inline_container", str(error)):
        number = errno.ENOSPC  # it does not say why; this is the reason there is
    else:
        number = None
    if number not in (_FULL if path is None else _REMEDIES):
        return None
    assert number is not None
    name = getattr(error, "filename", None) if path is None else os.fspath(path)
    kind = NotPermittedError if number in (errno.EACCES, errno.EPERM) else WriteError
    return kind(number, os.strerror(number), name)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Makes what goes wrong when `path` is written, whoever writes, a `WriteError` that names it and says what to do.

    Args:
        path: a file or a folder.
    """
    try:
        yield
    except Exception as error:
        found = write_error(error, path)
        if found is None:
            raise
        raise found from error


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path to write a file to; the file replaces `path` on success and is removed on failure, so that a reader never sees half
    of it. What killed processes left of the same file is removed as well.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    target = Path(path)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target.parent, target.name) as folder:
            temporary = folder / target.name
            yield temporary
            os.replace(temporary, target)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, creating its folder, through `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
