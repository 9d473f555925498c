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
"""Death at the wrong moment: work in a child process that is killed at each of its file operations in turn."""

import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any


CHANGES = ("os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate")


def deaths(work: Callable[[], object]) -> Iterator[int]:
    """
    Runs `work` in a forked child that kills itself (SIGKILL) right before its first change of a file or a folder, yields 1,
    runs it in another one that does so before its second change, yields 2, and so on until one comes to its end.

    A change is what Python's audit events tell of: what opens a file for writing, and `CHANGES`; `os.replace` is "os.rename".
    """
    number, alive = 0, False
    while not alive:
        number += 1
        child = os.fork()
        if child == 0:
            _die_before_change(number)
            try:
                work()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        alive = os.WIFEXITED(status)
        assert not alive or os.WEXITSTATUS(status) == 0
        assert alive or os.WTERMSIG(status) == signal.SIGKILL
        if not alive:
            yield number


def random_deaths(work: Callable[[], object], seed: int, points: int = 20) -> Iterator[str]:
    """As `deaths`, at so many random points of `work` alone: half of them before a change, half of them at any time. The last one
    is not killed; what it yields is empty."""
    rng = random.Random(seed)
    counter = multiprocessing.Value("i", 0)
    seconds = _run(work, lambda: _count_changes(counter))
    assert seconds is not None and counter.value > 0
    for point in range(points):
        if point % 2:
            number = rng.randint(1, counter.value)
            _run(work, lambda number=number: _die_before_change(number))
            yield f"before change {number} of {counter.value}"
        else:
            after = rng.uniform(0, seconds)
            _run(work, lambda: None, after)
            yield f"after {after:.3f} of {seconds:.3f} s"
    assert _run(work, lambda: None) is not None
    yield ""


def _run(work: Callable[[], object], begin: Callable[[], None], kill_after: float | None = None) -> float | None:
    """Seconds that a forked child takes for `work`; None if it is killed."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            begin()
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        return time.monotonic() - start
    assert os.WTERMSIG(status) == signal.SIGKILL
    return None


def _count_changes(counter: Any) -> None:
    def hook(event: str, args: tuple) -> None:
        if _is_change(event, args):
            counter.value += 1

    sys.addaudithook(hook)


def _is_change(event: str, args: tuple) -> bool:
    return event in CHANGES or (event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))


def _die_before_change(number: int) -> None:
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if _is_change(event, args):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
