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

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback

from support.fresh import run_fresh


_PATIENCE = 30  # seconds to end in, as torchrun has it

_COMMANDS = """
import json, os, sys, tempfile
import datasets
from peft_elastic.cli import prune, train
from peft_elastic.cli.main import main
from support.processes import in_processes

def command(words):
    sys.exit(main([word.replace("{rank}", os.environ["RANK"]) for word in words]))

results = []
for words in json.loads(sys.argv[2]):
    places = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        code = in_processes(int(sys.argv[1]), command, words)
        for place, kept in enumerate(places, 1):
            os.dup2(kept, place)
            os.close(kept)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        results.append([code, *texts])
print(json.dumps(results))
"""


def run_in_processes(number, commands):
    """Run command lines of `peft-elastic`, one after the other, each in several processes; `{rank}` in a word is the rank."""
    lines = json.dumps([[str(word) for word in words] for words in commands])
    done = run_fresh(_COMMANDS, str(number), lines)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return [subprocess.CompletedProcess(words, *result) for words, result in zip(commands, results, strict=True)]


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
