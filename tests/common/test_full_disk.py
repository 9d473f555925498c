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

"""Disks that are full: here, files that may not be longer than a limit, which is the same to whoever writes."""

import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from support import fresh
from support.full_disk import limit

from peft_elastic import ElasticLoraConfig
from peft_elastic.cli import _common, _data
from peft_elastic.cli.main import main
from peft_elastic.cli.quickstart import smoke
from peft_elastic.common.documents import COUNT, Record
from peft_elastic.common.journal import Journal
from peft_elastic.common.writing import WriteError, atomic_path, atomic_write_text, write_error, writing


pytest.importorskip("resource")


# --- what is written -----------------------------------------------------------------------------------------------------


WRITERS = {
    "text": lambda path: path.write_text("x" * 100_000),
    "safetensors": lambda path: save_file({"a": torch.zeros(100_000)}, path),
    "torch": lambda path: torch.save(torch.zeros(100_000), path),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_the_path_and_the_remedy_are_named(kind, tmp_path):
    with limit(10_000), pytest.raises(WriteError) as error, writing(tmp_path / "out"):
        WRITERS[kind](tmp_path / "out")
    assert str(error.value).startswith(f"cannot write '{tmp_path / 'out'}': ") and "; " in str(error.value)
    assert isinstance(error.value, OSError) and error.value.errno in (errno.EFBIG, errno.ENOSPC)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_earlier_file_stays(kind, tmp_path):
    atomic_write_text(tmp_path / "out", "before")
    with limit(10_000), pytest.raises(WriteError, match="out': "), atomic_path(tmp_path / "out") as path:
        WRITERS[kind](path)
    with pytest.raises(ZeroDivisionError), atomic_path(tmp_path / "out") as path:
        path.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "out").read_text() == "before" and os.listdir(tmp_path) == ["out"]


def test_errors_that_are_none_of_writing(tmp_path):
    for error in (ValueError("No space left on device"), RuntimeError("x"), KeyError("os error 28"), OSError("y")):
        assert write_error(error) is None
        with pytest.raises(type(error)) as raised, writing(tmp_path / "out"):
            raise error
        assert raised.value is error
    # nor is one of reading elsewhere
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/elsewhere/data")
    with pytest.raises(PermissionError) as raised, writing(tmp_path / "out"):
        raise elsewhere
    assert raised.value is elsewhere
    with pytest.raises(PermissionError, match="out': Permission denied; choose a folder that you may write to"):
        with writing(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "out" / "file"))


def test_a_journal_keeps_its_rows(tmp_path):
    journal = Journal(tmp_path / "j", {"format": "x"}, "test", Record(n=COUNT))
    for n in range(20):
        journal.append({"n": n})
    size = (tmp_path / "j").stat().st_size
    with limit(size + 3), pytest.raises(WriteError, match="j': "):
        journal.append({"n": 20})
    assert (tmp_path / "j").stat().st_size == size
    journal.append({"n": 20})
    again = Journal(tmp_path / "j", {"format": "x"}, "test", Record(n=COUNT))
    assert [row["n"] for row in again.rows] == list(range(21))


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    examples = smoke.smoke_examples()
    model, tokenizer = smoke.smoke_model(examples)
    _common.save_model(model, tokenizer, root / "model")
    rows = [{"prompt": example.prompt, "completion": example.completion} for example in examples]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ElasticLoraConfig(r=4, elastic_ranks=[4, 2], target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(root / "adapter")
    return root


COMMANDS = {
    "prune": ["--model", "{}/model", "--method", "magnitude", "--sparsity", "0.5"],
    "quantize": ["--model", "{}/model", "--method", "rtn", "--group-size", "32"],
    "merge": ["--model", "{}/model", "--adapter", "{}/adapter", "--export-lora", "lora"],
    "train": [
        "--model",
        "{}/model",
        "--dataset",
        "{}/data.jsonl",
        "--steps",
        "2",
        "--save-steps",
        "1",
        "--batch-size",
        "2",
    ]
    + ["--r", "4"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_end_with_one_line(name, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [name, *(word.format(inputs) for word in COMMANDS[name]), "--out", "out"]
    if name == "train":
        _data.load_records(str(inputs / "data.jsonl"))  # which is cached elsewhere
    with limit(30_000):
        assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(lines) == 1 and lines[0].startswith("peft-elastic: error: cannot write '"), lines
    assert ("out" in lines[0] or "lora" in lines[0]) and "; " in lines[0]
    assert os.listdir(tmp_path) == []
    if name != "train":  # and nothing is in the way of the next attempt
        assert main(command) == 0


def test_a_full_standard_output(monkeypatch, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["info"]) == 2
        monkeypatch.undo()
    assert capsys.readouterr().err.count("No space left on device") == 1


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", "{}", '{"peft_type": 3}'])
def test_damaged_inputs_of_others_are_one_line(text, inputs, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(text)
    merge = ["merge", "--out", str(tmp_path / "out")]
    assert main([*merge, "--model", str(inputs / "model"), "--adapter", str(tmp_path / "adapter")]) == 2
    assert (
        main(["prune", "--method", "magnitude", "--sparsity", "0.5", "--out", "x", "--model", str(tmp_path / "model")])
        == 2
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if "peft-elastic: error:" in line]
    assert "`--adapter`" in lines[0] and "`--model`" in lines[1] and len(lines) == 2


def test_data_without_a_cache(inputs, tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text((inputs / "data.jsonl").read_text())
    with limit(30_000), pytest.raises(ValueError, match="--dataset.*cannot write .*; the limit on the size of files"):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        _data.load_records(str(tmp_path / "data.jsonl"))
    expected = _data.load_records(str(inputs / "data.jsonl")).to_list()
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tempfile.gettempdir()))
    for cache in ("~/.cache/huggingface/datasets", str(inputs / "data.jsonl" / "x")):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        assert _data.load_records("data.jsonl").to_list() == expected
    assert not Path("~").exists() and sorted(os.listdir(tempfile.gettempdir())) == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk")
def test_a_disk_of_its_own(inputs, tmp_path):
    """The same as with limits, on a real disk of 100 kB, in a process of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "none", disk]).returncode:
        pytest.skip("cannot mount")
    try:
        command = [
            "prune",
            "--model",
            inputs / "model",
            "--method",
            "magnitude",
            "--sparsity",
            "0.5",
            "--out",
            disk / "out",
        ]
        code = "import sys; from peft_elastic.cli.main import main; sys.exit(main())"
        run = fresh.run([sys.executable, "-c", code, *map(str, command)], capture_output=True, text=True)
        assert run.returncode == 2 and "Traceback" not in run.stderr
        assert f"cannot write '{disk / 'out'}': No space left on device; free some space there" in run.stderr
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)
