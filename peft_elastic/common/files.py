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
"""Files that belong together and are replaced together, whenever the process that does it may be killed.

`replaced_files` is what writers use: they fill a folder of scratch and never touch the one that readers see.

    with replaced_files("out", last="config.json") as new:
        model.save_pretrained(new)

`scratch_folder` is what it stands on, and is of use to whoever needs a folder for a while.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout


_LOCK = ".lock"


@contextmanager
def scratch_folder(parent: str | os.PathLike[str], name: str) -> Iterator[Path]:
    """
    A new, empty folder in `parent`, `.{name}.{random}.partial`, which is removed at the end.

    Killed processes leave theirs behind. Each is locked while its process lives, and what is not locked is removed when the
    next folder of this name is asked for. The lock tells the living from the dead where process numbers do not: in containers
    that share a folder.

    Raises:
        OSError: `parent` does not exist or cannot be written to.
    """
    parent = Path(parent)
    remove_abandoned(parent, name)
    folder, lock = _claim(parent, name)
    try:
        yield folder
    finally:
        _remove(folder, lock)


def remove_abandoned(parent: Path, name: str) -> None:
    """Remove what processes that are no more have left of `scratch_folder(parent, name)`."""
    pattern = re.compile(re.escape(_prefix(name)) + r"[0-9a-f]{16}\.partial")
    try:
        entries = list(os.scandir(parent))
    except PermissionError:  # one may write to what is in a folder that one may not list
        return
    for entry in entries:
        if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
            lock = _lock(Path(entry.path))
            if lock is not None:
                _remove(Path(entry.path), lock)


@contextmanager
def replaced_files(
    path: str | os.PathLike[str], *, last: str, stale: Callable[[str], bool] = lambda name: False
) -> Iterator[Path]:
    """
    An empty folder to fill. When the block ends, what is in it takes its place in `path`; after an exception, `path` is as it
    was, and was not there if it was not.

    What else is in `path` stays. A process that is killed leaves the old files, the new ones, or a folder without `last`, for
    which every reader has an error: never files of both. So `last` has to be what all readers ask for first, such as the
    "config.json" of a model.

    A folder that does not exist appears with all its files at once. In one that does, the old files step aside, `last` first,
    and then the new ones step in, `last` last. What was killed in between keeps the old files in
    `path/.*.partial/old` until `path` is next written to.

    Args:
        path: a folder, which need not exist.
        last: the name of a file that the block writes.
        stale: whether a file of the old ones, given by its name, is removed though no new one takes its place.

    Raises:
        ValueError: `path` is a file, or the block did not write `last`.
        OSError: as of any writing.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise ValueError(f"{os.fspath(path)!r} is a file; it must be a folder.")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        remove_abandoned(target.parent, target.name)  # by one who was to be the first
    # Within the folder, if there is one: its parent may be on another disk, or not ours.
    with scratch_folder(target if target.is_dir() else target.parent, target.name) as scratch:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        yield new
        if not (new / last).is_file():
            raise ValueError(f"{last!r} was not written.")
        _sync_all(new)
        if not target.exists():
            try:
                os.rename(new, target)
            except OSError:
                if not target.is_dir():  # else another process was quicker
                    raise
        if new.exists():
            old.mkdir()
            with alone(target):
                _step_in(new, old, target, last, stale)
        else:
            _sync(target.parent)


def _step_in(new: Path, old: Path, target: Path, last: str, stale: Callable[[str], bool]) -> None:
    arriving = sorted(os.listdir(new), key=lambda name: (name == last, name))
    leaving = [name for name in os.listdir(target) if name in arriving or stale(name)]
    leaving.sort(key=lambda name: (name != last, name))
    moves = [(target / name, old / name) for name in leaving] + [(new / name, target / name) for name in arriving]
    try:
        for source, destination in moves:
            if source == new / last:
                _sync(target)
            os.replace(source, destination)
            if source == target / last:
                _sync(target)
    except BaseException:
        for source, destination in reversed(moves):
            if not os.path.lexists(source):  # it had moved
                os.replace(destination, source)
        raise
    _sync(target)


@contextmanager
def alone(folder: Path, wait: bool = True) -> Iterator[None]:
    """One process at a time, where the system can lock a folder: the files of two must not mix.

    Raises:
        BlockingIOError: another process is there, and this one is not to wait.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # disks on the network
                raise
        yield
    finally:
        os.close(number)


def _prefix(name: str) -> str:
    return f".{name[:128]}."  # names of files end at 255


def _claim(parent: Path, name: str) -> tuple[Path, BaseFileLock | None]:
    while True:
        folder = parent / f"{_prefix(name)}{secrets.token_hex(8)}.partial"
        folder.mkdir()
        try:
            lock = FileLock(folder / _LOCK)
            lock.acquire(timeout=0)
        except (Timeout, FileNotFoundError):  # taken for abandoned before it was locked
            continue
        except (NotImplementedError, OSError):  # a disk without locks, on which nobody will ever take it for abandoned
            return folder, None
        if (folder / _LOCK).exists():
            return folder, lock
        lock.release()


def _lock(folder: Path) -> BaseFileLock | None:
    """The lock of a folder that belongs to nobody."""
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, NotImplementedError, OSError):  # it lives, it cannot be known, or it is another user's
        return None
    return lock


def _remove(folder: Path, lock: BaseFileLock | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)  # some systems keep a file that is locked


def _sync_all(folder: Path) -> None:
    """Wait until a folder is on disk, with all that is in it."""
    for path, _, names in os.walk(folder):
        for name in names:
            _sync(Path(path, name))
        _sync(Path(path))


def _sync(path: Path) -> None:
    if os.name != "posix" or not path.exists():  # elsewhere folders have no such thing; and a link may lead nowhere
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some disks on the network do not do it for folders
            raise
    finally:
        os.close(number)


__all__ = ["alone", "remove_abandoned", "replaced_files", "scratch_folder"]
