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
"""Several processes of one run, started as torchrun starts them, but by fork: the imports are done once."""

import os
import signal
import socket
import sys
import time
import traceback

from support.fresh import run_fresh


_PATIENCE = 30  # seconds to end in, as torchrun has it

_COMMAND = """
import os, sys
import datasets
from peft_elastic.cli import prune, train
from peft_elastic.cli.main import main
from support.processes import in_processes

def command():
    sys.exit(main([word.replace("{rank}", os.environ["RANK"]) for word in sys.argv[2:]]))

sys.exit(in_processes(int(sys.argv[1]), command))
"""


def run_in_processes(number, words):
    """Run a command line of `peft-elastic` in several processes; `{rank}` in a word is the rank."""
    return run_fresh(_COMMAND, number, *words)


def in_processes(number, function, *arguments):
    """Call a function in several processes. If one fails, the others are ended. Returns the exit status of the first that failed,
    or 0."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    children = [_fork(rank, number, port, function, arguments) for rank in range(number)]
    status, deadline = 0, None
    while children:
        child, code = os.waitpid(-1, os.WNOHANG)
        if child:
            children.remove(child)
            if code and not status:
                status, deadline = os.waitstatus_to_exitcode(code), time.monotonic() + _PATIENCE
                for other in children:
                    os.kill(other, signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            for other in children:
                os.kill(other, signal.SIGKILL)
        else:
            time.sleep(0.05)
    return status


def _fork(rank, number, port, function, arguments):
    if child := os.fork():
        return child
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    code = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
