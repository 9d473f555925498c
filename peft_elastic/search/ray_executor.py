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
"""Ray's workers as an executor. Ray has none of its own that is a `concurrent.futures.Executor`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future
from typing import Any

from ..common.checks import check_whole


class RayExecutor(Executor):
    """Runs calls in actors of Ray, processes of this machine or of others (`pip install "peft-elastic[ray]"`).

    An actor that dies takes the call with it that it was busy with, and another one takes its place. The actors live until
    `shutdown`.

    Args:
        max_workers (`int`): number of actors.
        options: of each actor, as in `ray.remote`: `num_cpus=4`, `num_gpus=1`, `resources={...}`. With `num_gpus=1` Ray gives each a GPU
            of its own, which is "cuda:0" there.

    Raises:
        ImportError: if Ray is not installed.
        ValueError: if `max_workers` is no number.
    """

    def __init__(self, max_workers: int, **options: Any) -> None:
        check_whole("max_workers", max_workers, least=1)
        try:
            import ray
        except ImportError as error:
            raise ImportError("`RayExecutor` needs Ray: pip install 'peft-elastic[ray]'.") from error
        self._ray: Any = ray
        if not ray.is_initialized():
            ray.init()
        self._actor = ray.remote(**{"num_cpus": 1, **options})(_Actor)
        self._max_workers = max_workers
        self._calls: queue.SimpleQueue[tuple[Future, Callable[..., Any], tuple, dict] | None] = queue.SimpleQueue()
        self._lock, self._is_shut = threading.Lock(), False
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(max_workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """See `concurrent.futures.Executor.submit`. The future of a call whose actor died raises `BrokenExecutor`, but the executor goes
        on."""
        future: Future = Future()
        with self._lock:
            if self._is_shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._calls.put((future, fn, args, kwargs))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See `concurrent.futures.Executor.shutdown`. Ray itself goes on; `ray.shutdown()` ends it."""
        with self._lock:
            if not self._is_shut:
                self._is_shut = True
                if cancel_futures:
                    while not self._calls.empty():
                        call = self._calls.get()
                        if call is not None:
                            call[0].cancel()
                for _ in self._threads:
                    self._calls.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _serve(self) -> None:
        """One thread for each actor, which waits for it."""
        actor: Any = None
        while (call := self._calls.get()) is not None:
            future, fn, args, kwargs = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                actor = actor or self._actor.remote()
                value = self._ray.get(actor.call.remote(fn, args, kwargs))
            except self._ray.exceptions.RayActorError as error:
                actor = None
                broken = BrokenExecutor(f"an actor of Ray has ended: {str(error).splitlines()[0]}")
                broken.__cause__ = error
                future.set_exception(broken)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(value)
        if actor is not None:
            self._ray.kill(actor)


class _Actor:
    def call(self, fn: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        return fn(*args, **kwargs)
