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
"""Processes that are forked in place of new interpreters look like these to a script, and to who started it."""

import os
import signal
import subprocess
import sys

import pytest
from support import fresh


ROWS = {
    "output": "import sys; print('out'); print('err', file=sys.stderr)",
    "arguments": "import sys; print(sys.argv, sys.orig_argv[1:3], __name__)",
    "input": "import sys; print(sys.stdin.read())",
    "status": "import sys; sys.exit(3)",
    "words": "import sys; sys.exit('not so')",
    "error": "1 / 0",
    "signal": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "at the end": "import atexit; atexit.register(print, 'last'); print('first')",
    "main": "class A: pass\nimport pickle; print(type(pickle.loads(pickle.dumps(A()))).__module__)",
    "environment": "import os; print(os.environ['PEFT_ELASTIC_TEST'], os.getcwd())",
}


@pytest.mark.parametrize("code", ROWS.values(), ids=list(ROWS))
def test_as_an_interpreter_would(code, tmp_path):
    environment = os.environ | {"PEFT_ELASTIC_TEST": "x", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "a", "b"]
    ours = fresh.run(command, env=environment, cwd=tmp_path, capture_output=True, input=b"given")
    theirs = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, input="given", text=True)
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert ours.stderr.splitlines()[-1:] == theirs.stderr.splitlines()[-1:]


def test_modules_and_scripts(tmp_path):
    (tmp_path / "beside.py").write_text("value = 7\n")
    (tmp_path / "script.py").write_text("import beside, sys\nprint(__name__, __file__, beside.value, sys.argv[1:])\n")
    for command in (["-m", "script", "x"], [str(tmp_path / "script.py"), "x"]):
        outputs = [
            run([sys.executable, *command], cwd=tmp_path, capture_output=True, text=True)
            for run in (fresh.run, subprocess.run)
        ]
        assert outputs[0].stdout == outputs[1].stdout != ""


def test_nothing_of_ours_is_there_before_the_script():
    code = "import sys; print({'peft_elastic', 'support'} & {name.partition('.')[0] for name in sys.modules})"
    assert fresh.run([sys.executable, "-c", code], capture_output=True).stdout == "set()\n"
    if sys.platform.startswith("linux"):
        code = "import sys; print('torch' in sys.modules, 'peft' in sys.modules)"
        environment = fresh.first_environment()  # with another one it would be an interpreter
        assert fresh.run([sys.executable, "-c", code], env=environment, capture_output=True).stdout == "True True\n"


def test_what_the_libraries_have_read_already_takes_an_interpreter():
    code = "import sys, os; print('torch' in sys.modules, os.environ['TRANSFORMERS_VERBOSITY'])"
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "warning"}
    assert fresh.run([sys.executable, "-c", code], env=environment, capture_output=True).stdout == "False warning\n"


def test_too_long_and_wrong():
    with pytest.raises(subprocess.TimeoutExpired):
        fresh.run([sys.executable, "-c", "import time; time.sleep(60)"], capture_output=True, timeout=0.5)
    with pytest.raises(subprocess.CalledProcessError):
        fresh.run([sys.executable, "-c", "raise SystemExit(1)"], check=True)
    interrupted = fresh.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"], capture_output=True)
    assert interrupted.returncode == -signal.SIGTERM
