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
"""The part of a search in parallel that runs in the workers.

A worker is a process. It makes its model with the first task it gets, compares it with that of the search, and keeps it. All that
goes to and fro is bytes, so that what cannot be unpickled is an answer and not the end of the worker.

Where an executor runs tasks in a thread beside others, as Dask does, that thread starts a process for them: the others draw from the
generators that an evaluation has seeded (Dask's own threads from that of `random`).
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..supernet.host import get_elastic_host
from .identity import Identity
from .meter import Probe


CHECK = "check"  # a task that only makes the model

# The kinds of answers.
DONE = "done"  # what was read
UNKNOWN = "unknown"  # the worker has not been told of this search
UNLIKE = "unlike"  # the identity of a model that is another one
UNUSABLE = "unusable"  # a sentence, and an exception: there is no model to measure
RAISED = "raised"  # the exception of a function of the user

_TOKEN = uuid.uuid4().hex


def process_token() -> tuple[str, int]:
    """What no other process has, also one that was forked from this one or runs on another machine."""
    return _TOKEN, os.getpid()


@dataclass(frozen=True)
class Setup:
    """What a worker needs to know of a search.

    Args:
        functions (`dict[str, bytes]`): those of the user, pickled each on its own, by the name that messages give them.
        probe (`bytes`): a pickled `Probe` with the names of functions in their places.
        digest (`str`): of the `Identity` of the model.
        devices (`tuple[str, ...]`, *optional*): one for each worker of a machine.
        threads (`int`): that torch may take for an evaluation.
        search (`str`): an identifier of this run of the search.
        driver (`tuple`): the host and the process of the search, and its `process_token`.
    """

    functions: dict[str, bytes]
    probe: Probe
    digest: str
    devices: tuple[str, ...] | None
    threads: int
    search: str
    driver: tuple[str, int, tuple[str, int]]


@dataclass(frozen=True)
class SavedModel:
    """Makes the model of a folder that `save_pretrained` wrote, of an elastic adapter on the base model that it names, or of another
    kind of host, which says how (`ElasticModel.loader`).

    Args:
        folder (`str`): the folder, or a name of the hub.
        load (`Callable`, *optional*): of the host; None for adapters.
    """

    folder: str
    load: Callable[[str], Any] | None = None

    def __call__(self) -> Any:
        if self.load is not None:
            return self.load(self.folder).eval()
        import peft

        task = peft.PeftConfig.from_pretrained(self.folder).task_type
        name = "AutoPeftModel" if task is None else f"AutoPeftModelFor{_TASKS[task]}"
        return getattr(peft, name).from_pretrained(self.folder).eval()


_TASKS = {
    "CAUSAL_LM": "CausalLM",
    "FEATURE_EXTRACTION": "FeatureExtraction",
    "QUESTION_ANS": "QuestionAnswering",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
}


class Unusable(Exception):
    """There is nothing to measure in this worker; the cause says why."""


class _Unlike(Exception):
    """The model of this worker is another one."""


class _Station:
    """A model in a worker, and what is measured on it."""

    def __init__(self, key: str, setup: Setup) -> None:
        self.key, self.threads = key, setup.threads
        if setup.driver[2] == process_token():
            raise Unusable(
                "`executor` runs its tasks in the process of the search, with its generators of random numbers; use one with "
                "processes, such as `executor=2`"
            )
        watch_driver(*setup.driver[:2])
        functions = {}
        for name, data in setup.functions.items():
            try:
                functions[name] = pickle.loads(data)
            except BaseException as error:
                raise Unusable(
                    f"{name} cannot be loaded in a worker (is its module there? Where cloudpickle is installed, functions of a "
                    "notebook or of a script are sent whole)"
                ) from error
        self.probe = setup.probe.with_functions(functions)
        device = None
        if setup.devices is not None:
            self.number = _claim(setup.search)
            device = torch.device(setup.devices[self.number.value % len(setup.devices)])
            if device.type == "cuda":
                torch.cuda.set_device(device)  # so that "cuda" means this one
        with bounded_threads(self.threads):
            try:
                model = functions["`worker_model`"]()
                if device is not None:
                    model = model.to(device)
            except BaseException as error:
                raise Unusable("`worker_model` failed in a worker") from error
            try:
                self.host = get_elastic_host(model)
            except ValueError as error:
                raise Unusable("`worker_model` made no elastic model in a worker") from error
            self.model = model
            identity = Identity.of(model, self.host)
        if identity.digest != setup.digest:
            raise _Unlike(identity)


_station: _Station | None = None


def work(key: str, setup: bytes | None, task: bytes) -> bytes:
    """Do a task.

    Args:
        key (`str`): of the search.
        setup (`bytes`, *optional*): a pickled `Setup`. It is not sent with every task: evaluation data may be large.
        task (`bytes`): pickled: what to read, the `Evaluation`, and the number of the call.

    Returns:
        `bytes`: a pickled pair: the kind of answer, and what belongs to it.
    """
    if threading.current_thread() is not threading.main_thread():
        return _in_process_of_thread(key, setup, task)
    global _station
    try:
        if _station is None or _station.key != key:
            if setup is None:
                return pickle.dumps((UNKNOWN, None))
            _station = None  # the model of another search leaves before the next one comes
            _station = _Station(key, pickle.loads(setup))
        what, evaluation, _ = pickle.loads(task)
        if what == CHECK:
            return pickle.dumps((DONE, None))
        with bounded_threads(_station.threads):
            read = _station.probe.read(what, _station.model, _station.host, evaluation)
        return pickle.dumps((DONE, read))
    except _Unlike as error:
        return pickle.dumps((UNLIKE, error.args[0]))
    except Unusable as error:
        cause = None if error.__cause__ is None else pack_error(error.__cause__)
        return pickle.dumps((UNUSABLE, (str(error), cause)))
    except BaseException as error:
        return pickle.dumps((RAISED, pack_error(error)))


_of_thread = threading.local()  # its process, whose standard input closes with the thread, upon which it ends


def _in_process_of_thread(*call: Any) -> bytes:
    process: Any = getattr(_of_thread, "process", None)
    if process is None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        process = _of_thread.process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
        )
    try:
        pickle.dump(call, process.stdin)
        process.stdin.flush()
        return pickle.load(process.stdout)
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        del _of_thread.process
        process.kill()
        raise ChildProcessError(f"the process of a worker has ended with status {process.wait()}") from error


def serve() -> None:
    """Do what comes through the standard input, until it closes. What the functions of the user print goes to the errors."""
    with os.fdopen(os.dup(0), "rb") as calls, os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        while True:
            try:
                call = pickle.load(calls)
            except EOFError:
                return
            pickle.dump(work(*call), answers)
            answers.flush()


@contextmanager
def bounded_threads(threads: int | None) -> Iterator[None]:
    """Torch takes at most so many threads inside; None for as many as it does anyway."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- errors ----------------------------------------------------------------------------------------------------------


class RemoteTraceback(Exception):
    """The traceback of another process, as text: the cause of an exception that came from there."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def pack_error(error: BaseException) -> tuple[bytes | None, str, str]:
    """An exception for another process: pickled if it survives that, a line that says what it is, and its traceback."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    line = "".join(traceback.format_exception_only(type(error), error)).strip()
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return None, line, text
    return data, line, text


def unpack_error(packed: tuple[bytes | None, str, str]) -> BaseException:
    """The exception itself, with the traceback of the other process as its cause; a RuntimeError with its text if it could not be sent."""
    data, line, text = packed
    error: BaseException = RuntimeError(line)
    if data is not None:
        try:
            error = pickle.loads(data)
        except Exception:  # its class is known there alone
            error = RuntimeError(line)
    error.__cause__ = RemoteTraceback(text)
    return error


# -- processes -------------------------------------------------------------------------------------------------------

_watched: set[int] = set()


def watch_driver(host: str, pid: int) -> None:
    """End this process when the one of the search ends, if that one has started it: killed, it cannot tell its workers, and they would
    wait for ever with a model each."""
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid != pid or host != socket.gethostname() or os.getpid() in _watched:
        return
    _watched.add(os.getpid())

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="peft-elastic-watch", daemon=True).start()


def lock_folder(search: str) -> Path:
    """Where the workers of a search on this machine say which number they have."""
    return Path(tempfile.gettempdir()) / f"peft-elastic-{search}"


@dataclass
class _Number:
    value: int
    lock: Any  # held as long as the process, or its number, lives


def _claim(search: str) -> _Number:
    """The lowest number that no living worker of the search on this machine has."""
    folder = lock_folder(search)
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count():
        lock = FileLock(folder / f"{number}.lock", thread_local=False)
        try:
            lock.acquire(timeout=0)
            return _Number(number, lock)
        except Timeout:
            continue
    raise AssertionError
