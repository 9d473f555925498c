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
"""What the command line settles before torch is imported, and what it writes into a log file."""

import io
import logging
import os
import subprocess
import sys
import time

import pytest

from peft_elastic import _process
from peft_elastic._process import is_command, is_program, settle
from peft_elastic.common import progress
from peft_elastic.search.shown import say


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def short(monkeypatch):
    """A tenth of a second between lines."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.1)


class TestProgress:
    def test_a_short_one_leaves_a_line(self):
        log = io.StringIO()
        assert list(progress.progress_bar(range(5000), file=log, desc="search")) == list(range(5000))
        assert log.getvalue().count("\n") == 1 and log.getvalue().startswith("search: 100% 5000/5000 [")

    @pytest.mark.parametrize("by_hand", [False, True])
    def test_a_long_one_writes_a_line_now_and_then(self, by_hand, short):
        log = io.StringIO()
        begin = time.monotonic()
        bar = progress.progress_bar(None if by_hand else range(40), total=40, file=log, desc="search", unit="subnet")
        for _ in range(40) if by_hand else bar:
            time.sleep(0.01)
            if by_hand:
                bar.set_postfix(best=1)
                bar.update()
                bar.refresh()
        bar.close()
        seconds = time.monotonic() - begin
        lines = log.getvalue().split("\n")
        assert "\r" not in log.getvalue() and lines.pop() == ""
        assert 3 <= len(lines) <= seconds / 0.1 + 2
        assert all(line.startswith("search: ") and "/40" in line for line in lines) and "40/40" in lines[-1]

    def test_of_another_format_and_with_words_between(self, short):
        log = io.StringIO()
        form = "{desc}: {percentage:3.0f}%|{bar}|"
        with progress.progress_bar(total=100.0, file=log, desc="pruning", bar_format=form) as bar:
            for _ in range(25):
                time.sleep(0.01)
                bar.update(4)
                bar.write("found", file=log)
        assert log.getvalue().count("found\n") == 25 and log.getvalue().count("pruning: ") >= 2
        assert "\r" not in log.getvalue()

    def test_disabled(self, monkeypatch):
        log = io.StringIO()
        monkeypatch.setattr(sys, "stderr", log)
        with progress.progress_bar(total=3, disable=True) as bar:
            bar.update()
            say(bar, "to the log")
        assert log.getvalue() == "" and list(progress.progress_bar([1, 2], disable=True)) == [1, 2]

    def test_on_a_terminal_it_is_a_bar(self):
        screen = Terminal()
        list(progress.progress_bar(range(3), file=screen, desc="search"))
        assert "\rsearch: " in screen.getvalue() and "3/3" in screen.getvalue()

    def test_without_stderr(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", None)
        assert list(progress.progress_bar(range(3))) == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["python", "/usr/local/bin/peft-elastic", "info"], True),
        (["python.exe", "peft-elastic.exe", "info"], True),
        (["python", "C/peft-elastic-script.py"], True),
        (["python", "-m", "peft_elastic.cli.quickstart.serving", "x"], True),
        (["python", "-m", "peft_elastic.cli"], True),
        (["python", "-m", "peft_elastic.clients"], False),
        (["python", "-m", "pytest", "peft_elastic.cli"], False),
        (["python", "-m"], False),
        (["python", "train.py", "-m", "peft_elastic.cli"], False),
        (["python", "my-peft-elastic.py"], False),
        (["python"], False),
        ([], False),
    ],
)
def test_which_processes_are_the_command_line(line, expected):
    assert is_command(line, {}) is expected
    assert is_command(line, {"_PEFT_ELASTIC_COMMAND": "1"})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["python", "/usr/local/bin/peft-elastic", "info"], True),
        (["python.exe", "peft-elastic.exe", "info"], True),
        (["python", "C/peft-elastic-script.py"], True),
        (["python", "-m", "peft_elastic.cli.quickstart.serving", "x"], False),
        (["python", "train.py", "peft-elastic"], False),
        (["python"], False),
        ([], False),
    ],
)
def test_which_process_is_the_program_itself(line, expected):
    """It alone imports what a command needs when one runs, whatever its children inherit."""
    assert is_program(line) is expected


def test_what_is_settled():
    environment = {}
    settle(environment, is_terminal=True)
    assert environment == {"_PEFT_ELASTIC_COMMAND": "1", "GOMP_SPINCOUNT": str(_process.SPIN_COUNT)}
    settle(environment, is_terminal=False)
    assert environment["TQDM_MININTERVAL"] == environment["TQDM_MAXINTERVAL"] == "30"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_what_the_user_says_stays(name):
    environment = {name: "7", "TQDM_MININTERVAL": "2"}
    settle(environment, is_terminal=False)
    assert environment[name] == "7" and environment["TQDM_MININTERVAL"] == "2"
    assert {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & environment.keys() == {name}


def test_a_program_that_imports_the_package_is_left_alone():
    assert "_PEFT_ELASTIC_COMMAND" not in os.environ
    assert _process._is_wanted not in logging.getLogger("bitsandbytes.backends.cpu.ops").filters


def test_the_command_line_in_its_process(tmp_path):
    """Everything at once, as it is in a log file: the setting comes before torch, and bitsandbytes is not heard."""
    script = tmp_path / "peft-elastic"
    script.write_text(
        "import sys\n"
        "for name in ('torch', 'tqdm', 'peft'): assert name not in sys.modules\n"
        "from peft_elastic.cli import main\n"
        "import logging, os, torch, tqdm\n"
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('Failed to load CPU gemm_4bit_forward from there')\n"
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('another')\n"
        "print(os.environ['GOMP_SPINCOUNT'], tqdm.tqdm([]).mininterval)\n"
        "raise SystemExit(main(['--version']))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in _process._SPIN}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[:2] == [str(_process.SPIN_COUNT), "30.0"]
    assert "gemm_4bit_forward" not in done.stderr and "another" in done.stderr
    if sys.platform.startswith("linux"):  # what libgomp read
        assert f"GOMP_SPINCOUNT = '{_process.SPIN_COUNT}'" in done.stderr
