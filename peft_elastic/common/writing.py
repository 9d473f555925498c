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
"""Writing files: all of a file or nothing, and errors that name it and say what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import scratch_folder


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
