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
"""Scripts in processes of their own, without the seconds in which torch, transformers and peft are imported: a process that has
imported them, and nothing of this package, forks for each script. It is started with the first script of a pytest process.

`run` takes the place of `subprocess.run` for a command that begins with `sys.executable`. Where the imports themselves are what is
tested, or a variable differs that these libraries have read, the command needs an interpreter of its own, and `run` starts one.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from support.places import REPOSITORY, TESTS


# Variables that are read by what a script imports, or by nothing.
_READ_LATE = ("PYTHONPATH", "PEFT_ELASTIC_", "PYTEST_", "COLUMNS", "LINES", "TMPDIR", "_PEFT_ELASTIC_")

_at_first: dict[str, str] = {}


def note_environment() -> None:
    """To be called when all tests have been collected, as modules of tests set variables. The server gets these, whichever test
    starts it: that one may have changed something for itself."""
    _at_first.clear()
    _at_first.update(os.environ)


def first_environment() -> dict[str, str]:
    """That of the process which forks, unless it has been started before the tests were collected."""
    return {"OMP_NUM_THREADS": "1", **(_at_first or os.environ)}


def run_fresh(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, which finds this package first."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    return run(command, env=environment, capture_output=True, text=True, timeout=300)


def run(
    command: list[Any],
    env: dict[str, str] | None = None,
    cwd: str | Path | None = None,
    capture_output: bool = False,
    text: bool = True,
    check: bool = False,
    timeout: float | None = None,
    input: bytes = b"",
) -> subprocess.CompletedProcess[str]:
    """Run `[sys.executable, "-W", ..., "-c" code or "-m" module or a script, arguments...]` as `subprocess.run` would; the output
    is text."""
    command = [str(word) for word in command]
    environment = {"OMP_NUM_THREADS": "1", **(os.environ if env is None else env)}
    warmed = _server()
    if warmed is None or command[0] != sys.executable or _early(environment) != _early(warmed.environment):
        options: dict[str, Any] = {"env": environment, "cwd": cwd, "check": check, "timeout": timeout}
        done = subprocess.run(command, input=input, capture_output=capture_output, **options)
        return _as_text(done)
    with tempfile.TemporaryDirectory() as folder:
        into, out, err = (Path(folder) / name for name in ("in", "out", "err"))
        into.write_bytes(input)
        code = warmed.ask(
            {
                "command": command[1:],
                "environment": environment,
                "cwd": str(cwd or os.getcwd()),
                "in": str(into),
                "out": str(out),
                "err": str(err),
            },
            timeout,
        )
        texts = [path.read_text(errors="replace") for path in (out, err)]
    if code is None:
        assert timeout is not None
        raise subprocess.TimeoutExpired(command, timeout, *texts)
    if not capture_output:
        sys.stdout.write(texts[0])
        sys.stderr.write(texts[1])
    done = subprocess.CompletedProcess(command, code, *(texts if capture_output else (None, None)))
    if check:
        done.check_returncode()
    return done


def _as_text(done: subprocess.CompletedProcess[bytes]) -> subprocess.CompletedProcess[str]:
    texts = [None if stream is None else stream.decode(errors="replace") for stream in (done.stdout, done.stderr)]
    return subprocess.CompletedProcess(done.args, done.returncode, *texts)


def _early(environment: dict[str, str]) -> dict[str, str]:
    """The variables that the libraries, or the interpreter, may have read already."""
    return {name: value for name, value in environment.items() if not name.startswith(_READ_LATE)}


class _Server:
    def __init__(self) -> None:
        self.environment = first_environment()
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**self.environment, "PYTHONPATH": str(TESTS)},
            text=True,
            start_new_session=True,  # Ctrl-C is for pytest; without it, this process ends at the end of its input
        )
        self.works = self._read(None) == "ready"

    def _read(self, timeout: float | None) -> str | None:
        assert self._process.stdout is not None
        if timeout is not None and not select.select([self._process.stdout], [], [], timeout)[0]:
            return None
        return self._process.stdout.readline().strip()

    def ask(self, request: dict[str, Any], timeout: float | None) -> int | None:
        """The exit status, negative for a signal; None if it took too long."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        child = self._read(None)
        assert child, "the process that forks has ended"
        code = self._read(timeout)
        if code is None:
            os.kill(int(child), 9)
            self._read(None)
            return None
        return int(code)


@cache
def _server() -> _Server | None:
    """None where there is no fork, or the libraries have started threads, which would not be there after it."""
    if not sys.platform.startswith("linux"):
        return None
    server = _Server()
    return server if server.works else None


# -- the process that forks ----------------------------------------------------------------------------------------


def _serve() -> None:
    import gc

    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    alone = len(os.listdir("/proc/self/task")) == 1 and "peft_elastic" not in sys.modules
    gc.collect()
    gc.freeze()
    _tell("ready" if alone else "threads")
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(request)
        _tell(child)
        _tell(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _tell(word: Any) -> None:
    print(word, flush=True)


def _become(request: dict[str, Any]) -> None:
    """Do what an interpreter with this command would, and never return."""
    import atexit
    import runpy
    import signal
    import threading
    import traceback
    import types
    import warnings

    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for target, path in ((0, request["in"]), (1, request["out"]), (2, request["err"])):
            handle = os.open(path, os.O_RDONLY if target == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(handle, target)
            os.close(handle)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        words = list(request["command"])
        sys.orig_argv = [sys.executable, *words]
        while words[0] == "-W":
            warnings.simplefilter(words[1])
            words = words[2:]
        kind = words.pop(0) if words[0] in ("-c", "-m") else "script"
        what, arguments = words[0], words[1:]
        first = {"-c": "", "-m": os.getcwd(), "script": os.path.dirname(os.path.abspath(what))}[kind]
        # without this file's folder and the path of the process that forks
        paths = [path for path in request["environment"].get("PYTHONPATH", "").split(os.pathsep) if path]
        sys.path[:] = [first, *paths, *(path for path in sys.path[1:] if path != str(TESTS))]
        sys.argv = [kind if kind != "script" else what, *arguments]
        for name in [name for name in sys.modules if name == "support" or name.startswith("support.")]:
            del sys.modules[name]
        try:
            if kind == "-c":
                main = sys.modules["__main__"] = types.ModuleType("__main__")
                exec(compile(what, "<string>", "exec"), main.__dict__)
            elif kind == "-m":
                runpy.run_module(what, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(what, run_name="__main__")
            code = 0
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    _serve()
