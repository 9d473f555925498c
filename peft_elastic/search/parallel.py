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
"""Who measures the subnets of a search: the workers of an executor, or the processes that a launcher has started. The search itself,
its algorithm, costs and files, is in one process only, which gives out evaluations and takes what comes back."""

from __future__ import annotations

import os
import pickle
import queue
import shutil
import socket
import sys
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Protocol, TypeVar

import torch

from ..common import ranks
from ..common.checks import check_whole, is_whole, wrong
from ..supernet.context import subnet_restored
from . import worker
from .identity import Identity
from .meter import Meter, Values
from .result import Evaluation
from .worker import bounded_threads, pack_error, unpack_error


Result = TypeVar("Result")
Settings = TypeVar("Settings")

RANKS = "ranks"
# Beside others that are under way, a worker's death may be the fault of any; alone, only of this one.
_DEATHS_IN_COMPANY, _DEATHS_ALONE = 3, 3
_AT_ONCE = 64  # proposals of algorithms that learn nothing; a worker that is done early waits for the last of them


class Crew(Protocol):
    """Measures subnets. `Meter` itself is the crew of a search in one process."""

    at_once: int

    def measure(
        self, what: str, evaluations: Sequence[Evaluation]
    ) -> Generator[tuple[Evaluation, Values], None, None]:
        """Each of the evaluations with what goes on file, as soon as it is known, in any order. If some fail, those that had begun
        come first; then the error of the one with the lowest index is raised."""


@dataclass(frozen=True)
class Parallel:
    """Where a search in parallel runs: arguments of `search_subnet`, whose documentation says what they mean."""

    make: Callable[[], Executor] | None
    executor: Executor | None
    worker_model: Callable[[], Any]
    devices: tuple[str, ...] | None
    threads: int

    @classmethod
    def checked(
        cls,
        executor: Any,
        worker_model: Any,
        devices: Any,
        worker_threads: Any,
        load: Callable[[str], Any] | None = None,
    ) -> Parallel | None:
        """From what a user wrote, and what loads a saved model where that is no adapter; None if there is no executor.

        Raises:
            ValueError: if an argument is not allowed.
        """
        given = {"worker_model": worker_model, "devices": devices, "worker_threads": worker_threads}
        if executor is None or (isinstance(executor, str) and executor == RANKS):
            needless = [name for name, value in given.items() if value is not None]
            if needless:
                raise ValueError(f"`{needless[0]}` is for the workers of an `executor`, got executor={executor!r}.")
            return None
        if is_whole(executor):
            check_whole("executor", executor, least=1)
        elif isinstance(executor, Executor):
            _check_executor(executor)
        elif not callable(executor):
            raise wrong(
                "executor",
                "a concurrent.futures.Executor, a function that makes one, a number of processes, 'ranks' or None",
                executor,
            )
        if isinstance(worker_model, (str, os.PathLike)):
            worker_model = worker.SavedModel(os.fspath(worker_model), load)
        if not callable(worker_model) or isinstance(worker_model, torch.nn.Module):
            raise wrong(
                "worker_model",
                "a function without arguments that makes a copy of `model`, or the folder of a saved one, for with `executor` "
                "each worker has a copy of its own",
                worker_model,
            )
        check_whole("worker_threads", worker_threads, least=1, optional=True)
        return cls(
            make=_processes(executor) if is_whole(executor) else None if isinstance(executor, Executor) else executor,
            executor=executor if isinstance(executor, Executor) else None,
            worker_model=worker_model,
            devices=_check_devices(devices),
            threads=worker_threads or 1,
        )


def _check_devices(devices: Any) -> tuple[str, ...] | None:
    if devices is None:
        return None
    allowed = "a list of devices such as ['cuda:0', 'cuda:1'], or None"
    if isinstance(devices, str) or not isinstance(devices, Sequence) or not devices:
        raise wrong("devices", allowed, devices)
    try:
        return tuple(str(torch.device(device)) for device in devices)
    except (RuntimeError, TypeError) as error:
        raise wrong("devices", allowed, devices) from error


def _check_executor(executor: Any) -> None:
    if isinstance(executor, ThreadPoolExecutor):
        raise ValueError(
            f"`executor` is a {type(executor).__name__}: threads share one model and the generators of random numbers. Use one with "
            "processes, such as `executor=2`."
        )


def _processes(number: int) -> Callable[[], Executor]:
    host_and_process = socket.gethostname(), os.getpid()

    def make() -> Executor:
        # a forked process would inherit the threads' locks of torch, but not the threads
        context = get_context("spawn")
        return ProcessPoolExecutor(number, context, initializer=worker.watch_driver, initargs=host_and_process)

    return make


# -- workers ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Task:
    what: str
    evaluation: Evaluation | None
    deaths: int = 0
    deaths_alone: int = 0
    has_company: bool = False  # whether others were under way at the same time
    with_setup: bool = False

    @property
    def is_doubtful(self) -> bool:
        return self.deaths >= _DEATHS_IN_COMPANY

    def __str__(self) -> str:
        return "making the model" if self.evaluation is None else f"evaluation {self.evaluation.index}"


class Workers:
    """The workers of an executor. A context manager: an executor that was made here is shut down at the end."""

    at_once = _AT_ONCE

    def __init__(self, meter: Meter, parallel: Parallel) -> None:
        self._meter, self._parallel = meter, parallel
        self._executor, self._is_checked = parallel.executor, False
        self._n_calls = 0
        self._in_vain = 0  # executors that were made since the last answer
        self._here = False  # whether the executor is gone, and this process does the rest
        self._key = uuid.uuid4().hex
        self._identity: Identity | None = None
        self._setup = b""

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._parallel.make is not None and self._executor is not None:
            self._executor.shutdown(wait=True)
        shutil.rmtree(worker.lock_folder(self._key), ignore_errors=True)

    def measure(
        self, what: str, evaluations: Sequence[Evaluation]
    ) -> Generator[tuple[Evaluation, Values], None, None]:
        """See `Crew`."""
        if evaluations and not self._is_checked:
            self._prepare()
            for _ in self._run([_Task(worker.CHECK, None)]):  # no evaluation is spent if no model can be made
                pass
            self._is_checked = True
        for task, read in self._run([_Task(what, evaluation) for evaluation in evaluations]):
            assert task.evaluation is not None
            yield task.evaluation, self._meter.recorded_values(what, task.evaluation, read)

    def _prepare(self) -> None:
        if self._executor is None:
            self._executor = self._made()
        self._identity = Identity.of(self._meter.model, self._meter.host)
        functions = self._meter.probe.functions | {"`worker_model`": self._parallel.worker_model}
        setup = worker.Setup(
            {name: _pickled(name, function, self._executor) for name, function in functions.items()},
            self._meter.probe.with_functions(dict.fromkeys(functions)),
            self._identity.digest,
            self._parallel.devices,
            self._parallel.threads,
            self._key,
            (socket.gethostname(), os.getpid(), worker.process_token()),
        )
        self._setup = pickle.dumps(setup)

    def _made(self) -> Executor:
        assert self._parallel.make is not None
        executor = self._parallel.make()
        if not isinstance(executor, Executor):
            raise wrong("executor", "a function that makes a concurrent.futures.Executor", executor)
        _check_executor(executor)
        return executor

    def _run(self, tasks: Sequence[_Task]) -> Generator[tuple[_Task, tuple[Values, Values]], None, None]:
        waiting, under_way = deque(tasks), dict[Future, _Task]()
        arrived: queue.SimpleQueue[Future] = queue.SimpleQueue()
        errors: dict[int, BaseException] = {}
        try:
            while under_way or (waiting and not errors):
                while waiting and not errors and not self._here and self._may_begin(waiting[0], under_way):
                    future = self._submit(waiting[0])
                    if future is not None:
                        task = waiting.popleft()
                        task.has_company = bool(under_way)
                        for other in under_way.values():
                            other.has_company = True
                        under_way[future] = task
                        future.add_done_callback(arrived.put)
                if not under_way:
                    if self._here and waiting and not errors:
                        task = waiting.popleft()
                        yield task, self._read_here(task)
                    continue
                future = arrived.get()
                task = under_way.pop(future)
                if future.cancelled() and errors:
                    continue
                try:
                    kind, content = pickle.loads(future.result())
                except BaseException as error:  # whatever an executor says: there is no answer
                    if isinstance(error, (KeyboardInterrupt, SystemExit)):
                        raise
                    if not errors:
                        self._note_death(task, error)
                        (waiting.append if task.is_doubtful else waiting.appendleft)(task)
                    continue
                self._in_vain = 0
                if kind == worker.DONE:
                    yield task, content
                elif kind == worker.UNKNOWN:
                    task.with_setup = True
                    waiting.appendleft(task)
                else:
                    errors[-1 if task.evaluation is None else task.evaluation.index] = self._error(kind, content)
                    for begun in list(under_way):  # what has begun comes to its end, and is not lost
                        begun.cancel()
            if errors:
                raise errors[min(errors)]
        finally:
            for future in under_way:
                future.cancel()

    def _may_begin(self, task: _Task, under_way: dict[Future, _Task]) -> bool:
        if task.is_doubtful or any(other.is_doubtful for other in under_way.values()):
            return not under_way
        # the next ones wait at the workers, but no more than these: what waits there is lost with them
        number: Any = getattr(self._executor, "_max_workers", None)
        return len(under_way) < (2 * number if is_whole(number) else _AT_ONCE)

    def _submit(self, task: _Task) -> Future | None:
        """None if the executor takes nothing any more; it has been replaced then."""
        assert self._executor is not None
        setup = self._setup if task.with_setup else None
        # no two calls are equal: Dask answers one that it has seen with what came of the first, also if that is a death
        self._n_calls += 1
        call = pickle.dumps((task.what, task.evaluation, self._n_calls))
        try:
            return self._executor.submit(worker.work, self._key, setup, call)
        except RuntimeError as error:  # broken, or shut down
            if self._parallel.make is not None:
                self._in_vain += 1
                if self._in_vain > _DEATHS_IN_COMPANY + _DEATHS_ALONE:
                    raise ChildProcessError(
                        f"`executor` makes executors that take no work ({_line(error)})."
                    ) from error
                self._executor.shutdown(wait=False)
                self._executor = self._made()
                return None
            warnings.warn(
                f"`executor` takes no more work ({_line(error)}). This process evaluates the rest, one after the other. With a "
                "function that makes the executor, `executor=lambda: ...`, it would be made anew.",
                RuntimeWarning,
                stacklevel=2,
            )
            self._here = True
            return None

    def _read_here(self, task: _Task) -> tuple[Values, Values]:
        if task.evaluation is None:
            return {}, {}
        with bounded_threads(self._parallel.threads):
            return self._meter.read(task.what, task.evaluation)

    def _note_death(self, task: _Task, error: BaseException) -> None:
        task.deaths += 1
        task.deaths_alone += not task.has_company
        if task.deaths >= _DEATHS_IN_COMPANY and task.deaths_alone >= _DEATHS_ALONE:
            raise ChildProcessError(
                f"a worker of `executor` ended {task.deaths} times in the middle of {task}, {task.deaths_alone} of them with nothing "
                f"else to do ({_line(error)}). What was measured before is in `save_dir`, if there is one."
            ) from error

    def _error(self, kind: str, content: Any) -> BaseException:
        if kind == worker.RAISED:
            return unpack_error(content)
        if kind == worker.UNLIKE:
            assert self._identity is not None
            difference = self._identity.difference(content)
            return ValueError(f"`worker_model` made another model in a worker than `model`: {difference}.")
        text, packed = content
        cause = None if packed is None else unpack_error(packed)
        error = ValueError(f"{text}." if cause is None else f"{text}: {_line(cause)}")
        error.__cause__ = cause
        return error


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0].removesuffix(": ")


def _pickled(name: str, function: Any, executor: Executor) -> bytes:
    """A function of the user as bytes: by its name if the workers find it there, else whole, which takes cloudpickle.

    Raises:
        ValueError: if that is not possible.
    """
    try:
        import cloudpickle
    except ImportError:
        cloudpickle = None
    # the standard library's processes run the main script again, which others do not; a notebook has none
    finds_main = isinstance(executor, ProcessPoolExecutor) and hasattr(sys.modules["__main__"], "__file__")
    try:
        data = pickle.dumps(function)
        if finds_main or cloudpickle is None or b"__main__" not in data:
            return data
    except Exception as error:
        if cloudpickle is None:
            raise ValueError(
                f"{name} cannot be sent to the workers of `executor`: {_line(error)}. Define it at the top of a module, or install "
                "cloudpickle."
            ) from error
    try:
        return cloudpickle.dumps(function)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be sent to the workers of `executor`: {_line(error)}. What it holds on to must be picklable; "
            "`worker_model` may make it in the worker."
        ) from error


# -- ranks -----------------------------------------------------------------------------------------------------------

_MEASURE, _END = "measure", "end"


class Ranks:
    """The processes that a launcher has started. The search is in rank 0; the others `serve` it.

    They go round by round, one evaluation each, so that after each round everything is on file.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.at_once = ranks.world_size()

    def measure(
        self, what: str, evaluations: Sequence[Evaluation]
    ) -> Generator[tuple[Evaluation, Values], None, None]:
        """See `Crew`."""
        for start in range(0, len(evaluations), self.at_once):
            part = evaluations[start : start + self.at_once]
            ranks.share((_MEASURE, (what, part)))
            answers = ranks.gather(_answer(self._meter, what, part))
            for evaluation, (read, _) in zip(part, answers):
                if read is not None:
                    yield evaluation, self._meter.recorded_values(what, evaluation, read)
            for _, packed in answers:
                if packed is not None:
                    raise unpack_error(packed)


def _answer(meter: Meter, what: str, part: Sequence[Evaluation]) -> tuple[Any, Any]:
    """What this process has to say of a round: what it read, or its exception; neither if nothing was left for it."""
    mine = part[ranks.rank() : ranks.rank() + 1]
    try:
        with ranks.apart():
            return (meter.read(what, mine[0]) if mine else None), None
    except Exception as error:
        return None, pack_error(error)


def on_ranks(
    checked: Callable[[], tuple[Settings, Meter]], search: Callable[[Settings, Meter, Crew], Result]
) -> Result:
    """Run a search in rank 0 with all processes as its crew; all of them return its result, or raise its error.

    Args:
        checked (`Callable`): checks the arguments of this process, and gives the settings and the `Meter`.
        search (`Callable`): the search, given these and its crew.
    """
    mine: tuple[Settings, Meter] | None = None
    packed = identity = preparation = None
    try:
        mine = checked()
        preparation = mine[1].probe.preparation
        identity = Identity.of(mine[1].model, mine[1].host)
    except Exception as error:
        packed = pack_error(error)
    started = ranks.gather((packed, identity, preparation))
    for failed, *_ in started:
        if failed is not None:
            raise unpack_error(failed)
    assert mine is not None
    identities = [found for _, found, _ in started if found is not None]
    for number, other in enumerate(identities):
        difference = identities[0].difference(other)
        if difference:
            raise ValueError(
                f"`executor='ranks'`: rank {number} has another model than rank 0, whose is `model`: {difference}."
            )
    preparations = [found for *_, found in started]
    for number, found in enumerate(preparations):
        if found != preparations[0]:
            raise ValueError(
                f"`executor='ranks'`: `prepare` of rank {number} is {found!r}, that of rank 0 is {preparations[0]!r}. Each rank evaluates "
                "other subnets, so all need the same."
            )
    settings, meter = mine
    if not ranks.is_main():
        with subnet_restored(meter.host):
            return _serve(meter)
    try:
        result = search(settings, meter, Ranks(meter))
    except BaseException as error:
        ranks.share((_END, (None, pack_error(error))))
        raise
    ranks.share((_END, (result, None)))
    return result


def _serve(meter: Meter) -> Any:
    while True:
        said: tuple[str, Any] = ranks.share(None)
        order, content = said
        if order == _MEASURE:
            ranks.gather(_answer(meter, *content))
            continue
        result, packed = content
        if packed is not None:
            raise unpack_error(packed)
        return result
