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
"""The processes of one run that a launcher (torchrun, `accelerate launch`, `deepspeed`) has started: which one this is, and what they
do together.

In one process everything here is a no-op: rank 0 of 1. torch is not imported before it is needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar


T = TypeVar("T")

# What `init_process_group` needs to find the others; only all of them together tell that a launcher is at work: some of
# these names are common in containers.
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# The others wait while the main process writes or evaluates, which may take long. A process that dies is noticed by the launcher.
_TIMEOUT = timedelta(days=1)

_FAILED = "peft_elastic/failed"

_apart = False


def world_size() -> int:
    """How many processes the run has; as long as they have not joined, what the launcher says."""
    return _distributed().get_world_size() if is_joined() else _launched()[1]


def rank() -> int:
    """Which of the processes this is, from 0."""
    return _distributed().get_rank() if is_joined() else _launched()[0]


def is_main() -> bool:
    """Whether this process is the one that writes files and prints: rank 0."""
    return rank() == 0


def is_joined() -> bool:
    """Whether the process is connected with the others, by `join` or by anybody (Trainer does it too)."""
    # who has not imported the module has no process group
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def are_together() -> bool:
    """Whether several processes have joined and all do the same now, so that one may reduce over them: False inside `apart`."""
    return is_joined() and world_size() > 1 and not _apart


@contextmanager
def apart() -> Iterator[None]:
    """Inside, each of the processes does something of its own, so nothing that is called there may wait for the others."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def join(device: str | None = None) -> None:
    """Connect this process with the others of the run. Does nothing in a run of one process, or if it is connected.

    Args:
        device (`str`, *optional*): "cpu" if the run is to leave the GPUs of this machine alone. Otherwise the process takes the
            GPU of its local rank.
    """
    if is_joined() or world_size() == 1:
        return
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available() and not str(device).startswith("cpu"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank())) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_TIMEOUT)


def leave() -> None:
    """Take the connection down, after everybody has come this far. Does nothing if there is none."""
    if is_joined():
        barrier()
        _distributed().destroy_process_group()


def barrier() -> None:
    """Wait for all processes. They must have joined."""
    gather(None)  # as objects, which goes by the CPU also where tensors go from GPU to GPU


def share(value: T | None) -> T:
    """Return in all processes what the main one passes, which must be picklable."""
    if world_size() == 1:
        return value  # type: ignore[return-value]
    _check_joined()
    held = [value]
    _distributed().broadcast_object_list(held, src=0)
    return held[0]  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """Return in all processes what each of them passes, by rank. The values must be picklable."""
    if world_size() == 1:
        return [value]
    _check_joined()
    values: list[Any] = [None] * world_size()
    _distributed().all_gather_object(values, value)
    return values


@contextmanager
def main_first() -> Iterator[bool]:
    """The main process runs the body, then the others do; the value is whether this is the main one."""
    if not is_main():
        barrier()
    yield is_main()
    if is_main():
        barrier()


def is_first_to_fail() -> bool:
    """Whether this process is to say why the run fails: of all that fail, the first one that asks.

    The same bad input makes all processes fail, and one that fails alone makes the others fail later, in whatever they do together.
    """
    if world_size() == 1:
        return True
    if not is_joined():
        return is_main()  # what fails that early fails everywhere
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return int(_get_default_store().add(_FAILED, 1)) == 1
    except RuntimeError:  # the process that keeps the store has gone: it has failed before
        return False


def _launched() -> tuple[int, int]:
    """Rank and number of processes, as the launcher says."""
    if all(os.environ.get(name) for name in _LAUNCHED):
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


def _check_joined() -> None:
    if not is_joined():
        raise RuntimeError("The processes of the run have not joined; call `peft_elastic.common.ranks.join()` first.")


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed
