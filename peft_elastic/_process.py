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
"""What has to be settled before torch, tqdm and peft are imported, in the processes of the command line alone. A program that
imports this package decides for itself. The package imports this module first; child processes inherit what it sets."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path


_MARK = "_PEFT_ELASTIC_COMMAND"  # set for the children of the command line
_SPIN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
# Some tens of microseconds. On a quiet machine that costs nothing that could be measured, and beside one busy process training
# makes 1.4 times the steps of libgomp's own setting; 10,000 and more are slower than that: benchmarks/results/threads.md.
SPIN_COUNT = 1_000
SECONDS_BETWEEN_LINES = 30


def is_command(arguments: Sequence[str], environment: MutableMapping[str, str]) -> bool:
    """Whether a process with this command line is `peft-elastic`, one of its modules, or was started by one."""
    return (
        _MARK in environment
        or is_program(arguments)
        or (
            arguments[1:2] == ["-m"]
            and arguments[2:3] != []
            and arguments[2].split(".")[:2] == ["peft_elastic", "cli"]
        )
    )


def is_program(arguments: Sequence[str] | None = None) -> bool:
    """Whether a process with this command line (default: this process) is `peft-elastic` itself, and nothing that it started."""
    arguments = sys.orig_argv if arguments is None else arguments
    program = Path(arguments[1]).name if len(arguments) > 1 else ""
    return program.removesuffix(".exe").removesuffix("-script.py") == "peft-elastic"


def settle(environment: MutableMapping[str, str], is_terminal: bool) -> None:
    """Say how threads wait, unless the user has said; and in a log, how often the progress bars of all libraries are written."""
    environment[_MARK] = "1"
    if not any(name in environment for name in _SPIN):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    if not is_terminal:
        for name in ("TQDM_MININTERVAL", "TQDM_MAXINTERVAL"):
            environment.setdefault(name, str(SECONDS_BETWEEN_LINES))


def _is_wanted(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()


if is_command(sys.orig_argv, os.environ):
    settle(os.environ, sys.stderr is not None and sys.stderr.isatty())
    # peft imports bitsandbytes wherever that is installed, and it says in every process that a package is not there which
    # would make its own 4-bit layers faster on some processors.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_wanted)
