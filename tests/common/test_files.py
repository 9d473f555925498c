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

import errno
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from filelock import FileLock
from support.killing import deaths

from peft_elastic.common.files import replaced_files, scratch_folder


OLD = {"config.json": "old", "model.safetensors": "old", "tokenizer.json": "old"}
NEW = {"config.json": "new", "model-1.safetensors": "new", "model-2.safetensors": "new", "tokenizer.json": "new"}
FOREIGN = {"README.md": "mine", "notes/a.txt": "mine"}


def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def visible(folder):
    return {name: text for name, text in content(folder).items() if ".partial/" not in name}


def stale(name):
    return name.startswith("model")


def replace(path, files=NEW):
    with replaced_files(path, last="config.json", stale=stale) as new:
        fill(new, files)


# --- a process that lives ------------------------------------------------------------------------------------------------


def test_a_new_folder_appears_with_all_its_files(tmp_path):
    target = tmp_path / "deep" / "out"
    with replaced_files(target, last="config.json") as new:
        fill(new, NEW)
        assert not target.exists()
    assert content(target) == NEW and os.listdir(target.parent) == ["out"]
    assert target.stat().st_mode == (tmp_path / "deep").stat().st_mode


def test_old_files_are_replaced_and_others_stay(tmp_path):
    fill(tmp_path / "out", OLD | FOREIGN)
    (tmp_path / "link").symlink_to("out")
    with replaced_files(tmp_path / "link", last="config.json", stale=stale) as new:
        fill(new, NEW)
        assert visible(tmp_path / "out") == OLD | FOREIGN
    assert content(tmp_path / "out") == NEW | FOREIGN
    assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "out"]


def test_folders_are_replaced_as_files_are(tmp_path):
    fill(tmp_path, {"config.json": "old", "templates/a": "old", "templates/b": "old"})
    replace(tmp_path, {"config.json": "new", "templates/a": "new"})
    assert content(tmp_path) == {"config.json": "new", "templates/a": "new"}


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("exists", [True, False])
def test_an_exception_leaves_everything_as_it_was(error, exists, tmp_path):
    if exists:
        fill(tmp_path / "out", OLD | FOREIGN)
    with pytest.raises(error), replaced_files(tmp_path / "out", last="config.json", stale=stale) as new:
        fill(new, NEW)
        raise error
    assert content(tmp_path) == ({f"out/{k}": v for k, v in (OLD | FOREIGN).items()} if exists else {})
    assert os.listdir(tmp_path) == (["out"] if exists else [])


@pytest.mark.parametrize("before", [True, False])  # the exception comes before or after the file has moved
@pytest.mark.parametrize("number", range(7))
def test_an_exception_between_two_files(before, number, tmp_path, monkeypatch):
    fill(tmp_path, OLD | FOREIGN)
    real, calls = os.replace, []

    def interrupted(source, destination):
        calls.append(source)
        if before or len(calls) != number + 1:
            if len(calls) == number + 1:
                raise KeyboardInterrupt
            real(source, destination)
        else:
            real(source, destination)
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(tmp_path)
    assert content(tmp_path) == OLD | FOREIGN


def test_what_cannot_be_replaced(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file' is a file; it must be a folder"):
        replace(tmp_path / "file")
    fill(tmp_path / "out", OLD)
    with pytest.raises(ValueError, match=r"'config.json' was not written"):
        replace(tmp_path / "out", {"model-1.safetensors": "new"})
    assert content(tmp_path) == {"file": "x", **{f"out/{k}": v for k, v in OLD.items()}}


# --- a process that dies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [None, pytest.param(FOREIGN, marks=pytest.mark.slow), OLD | FOREIGN])
def test_killed_at_every_file_operation(before, tmp_path):
    """What can be read is the old, the new, or without its most important file; and the next one cleans up."""
    target = tmp_path / "work" / "out"

    def start():
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        target.parent.mkdir()
        if before is not None:
            target.mkdir()
            fill(target, before)

    start()
    seen = set()
    for number in deaths(lambda: replace(target)):
        found = visible(target) if target.exists() else None
        kept = {k: v for k, v in (found or {}).items() if k not in FOREIGN}
        foreign = {k: v for k, v in (found or {}).items() if k in FOREIGN}
        assert foreign == {k: v for k, v in (before or {}).items() if k in FOREIGN}, number
        if "config.json" in kept:
            assert kept in (OLD, NEW), number
        else:
            assert len(set(kept.values())) <= 1, number  # not even then files of both
        if "config.json" in (before or {}) and "config.json" not in kept:
            aside = list(target.glob(".*.partial/old/config.json"))
            assert len(aside) == 1 and aside[0].read_text() == "old"
        seen.add(tuple(sorted(kept.items())))
        replace(target, OLD)
        assert visible(target) == content(target) == OLD | foreign, number
        assert os.listdir(target.parent) == ["out"]
        start()
    assert content(target) == NEW | {k: v for k, v in (before or {}).items() if k in FOREIGN}
    assert os.listdir(target.parent) == ["out"]
    assert len(seen) > (4 if before else 1)


def test_the_folder_of_a_living_process_stays(tmp_path):
    with scratch_folder(tmp_path, "x") as mine:
        (mine / "a").write_text("1")
        code = """if True:
            import sys
            sys.path.insert(0, sys.argv[2])
            from files import scratch_folder
            with scratch_folder(sys.argv[1], "x") as other:
                print(other)
        """
        package = Path(sys.modules["peft_elastic.common.files"].__file__).parent
        run = subprocess.run([sys.executable, "-c", code, tmp_path, package], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert Path(run.stdout.strip()) != mine and not Path(run.stdout.strip()).exists()
        with scratch_folder(tmp_path, "x") as second:  # nor that of another thread
            assert mine != second
        assert (mine / "a").read_text() == "1"
        assert re.fullmatch(r"\.x\.[0-9a-f]{16}\.partial", mine.name)
    assert not any(tmp_path.iterdir())


def test_only_what_is_abandoned_is_removed(tmp_path):
    for name in (".x.0123456789abcdef.partial", ".xy.0123456789abcdef.partial", ".x.mine.partial", ".x.partial"):
        fill(tmp_path / name, {"a": "1"})
    with scratch_folder(tmp_path, "x"):
        pass
    assert sorted(os.listdir(tmp_path)) == [".x.mine.partial", ".x.partial", ".xy.0123456789abcdef.partial"]


def test_two_processes_do_not_mix_their_files(tmp_path, monkeypatch):
    """They are slow, so that they meet; each writes files that hold its own name."""
    fill(tmp_path / "out", OLD)
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *args: [real(*args), time.sleep(0.005)])
    children = []
    for child in ("a", "b"):
        number = os.fork()
        if number == 0:
            try:
                for _ in range(5):
                    replace(tmp_path / "out", dict.fromkeys(NEW, child))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(number)
    assert [os.waitpid(number, 0)[1] for number in children] == [0, 0]
    assert content(tmp_path) in ({f"out/{name}": child for name in NEW} for child in ("a", "b"))


def test_a_disk_without_locks(tmp_path, monkeypatch):
    def fails(self, **kwargs):
        raise OSError(errno.ENOLCK, "no locks")

    with monkeypatch.context() as patch:
        patch.setattr(FileLock, "acquire", fails)
        fill(tmp_path / ".out.0123456789abcdef.partial", {"a": "1"})
        replace(tmp_path / "out")
        replace(tmp_path / "out", OLD)
        assert sorted(os.listdir(tmp_path)) == [".out.0123456789abcdef.partial", "out"]  # nobody knows whose that is
    replace(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"] and content(tmp_path / "out") == NEW


def test_long_and_odd_names(tmp_path):
    for name in ("n" * 250, "a[b]*.(c", ".hidden"):
        replace(tmp_path / name)
        replace(tmp_path / name, OLD)
        assert content(tmp_path / name) == OLD
