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
"""Commands in several processes, as torchrun starts them."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.places import REPOSITORY
from support.processes import run_in_processes

from peft_elastic.cli import main
from peft_elastic.cli.quickstart.smoke import smoke_examples, smoke_model


TRAIN = [
    "--max-rank",
    "4",
    "--ranks",
    "4",
    "3",
    "2",
    "--targets",
    "q_proj",
    "down_proj",
    "--lr",
    "0.01",
    "--dropout",
    "0",
]
TRAIN += ["--steps", "8", "--device", "cpu", "--elastic-width", "mlp=1.0,0.5", "--importance", "activation"]
TRAIN += ["--strategy", "sandwich"]
FULL = ["--full", "--lr", "0.001", *TRAIN[TRAIN.index("--steps") :]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model, and data of one length, which are drawn in the same order whatever the size of a batch."""
    folder = tmp_path_factory.mktemp("ranks")
    examples = smoke_examples()
    model, tokenizer = smoke_model(examples)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lengths = [len(tokenizer(example.prompt + example.completion)["input_ids"]) for example in examples]
    usual = max(set(lengths), key=lengths.count)
    records = [
        {"prompt": example.prompt, "completion": example.completion}
        for example, length in zip(examples, lengths)
        if length == usual
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def command(folder, out, *options, train=TRAIN):
    return ["train", "--model", folder / "model", "--dataset", folder / "train.jsonl", "--out", out, *train, *options]


@pytest.fixture(scope="module")
def alone(folder):
    assert main([str(word) for word in command(folder, folder / "alone", "--batch-size", "8")]) == 0
    return folder / "alone"


def assert_same_adapter(out, alone):
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in alone.iterdir())
    found, expected = (load_file(path / "adapter_model.safetensors") for path in (out, alone))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (out, alone)]
    for config in configs:
        del config["weights_crc32"]
        config["target_modules"].sort()  # of a set
    assert configs[0] == configs[1]


# options, and what the one error says
BAD = {
    "rank": (["--r", "0"], "`r`"),
    "data": (["--dataset", "nowhere.jsonl"], "nowhere.jsonl"),
    # there for the main process alone, as on the first of two machines
    "data of one process": (["--dataset", "{folder}/rank-{rank}.jsonl"], "rank-1.jsonl"),
    "device": (["--device", "cuda:0"], "`--device` 'cuda:0' is one device for all 2 processes"),
    "option": (["--bits", "5"], "argument --bits: invalid choice"),
    "resume": (["--resume"], "`--resume`: there is no checkpoint"),
}


@pytest.fixture(scope="module")
def done(folder):
    """What came of each of these commands in two processes, and the folder in which it was to write, by name."""
    (folder / "rank-0.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    places = {name: folder / "in two" / name for name in ("train", "full", "prune", *BAD)}
    commands = {"train": command(folder, places["train"] / "out", "--batch-size", "4")}
    commands["full"] = command(folder, places["full"] / "out", "--batch-size", "4", train=FULL)
    commands["prune"] = [
        "prune",
        "--model",
        folder / "model",
        "--method",
        "magnitude",
        "--out",
        places["prune"] / "out",
    ]
    for name, (options, _) in BAD.items():
        words = [word.replace("{folder}", str(folder)) for word in options]
        commands[name] = command(folder, places[name] / "out", *words)
    for place in places.values():
        place.mkdir(parents=True)
    results = run_in_processes(2, commands.values())
    return {name: (result, places[name]) for name, result in zip(commands, results)}


def test_train_in_two_processes(done, alone):
    result, place = done["train"]
    assert result.returncode == 0, result.stderr
    assert_same_adapter(place / "out", alone)
    assert [path.name for path in place.iterdir()] == ["out"]
    assert result.stdout.count("Written:") == result.stdout.count("training examples") == 1


def test_train_all_weights_in_two_processes(done, folder):
    result, place = done["full"]
    assert result.returncode == 0, result.stderr
    alone = folder / "full alone"
    assert main([str(word) for word in command(folder, alone, "--batch-size", "8", train=FULL)]) == 0
    assert [path.name for path in place.iterdir()] == ["out"]
    assert sorted(path.name for path in alone.iterdir()) == sorted(path.name for path in (place / "out").iterdir())
    for name in ("elastic_model.json", "config.json"):
        assert (place / "out" / name).read_text() == (alone / name).read_text()
    found, expected = (load_file(path / "model.safetensors") for path in (place / "out", alone))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-4)
    assert result.stdout.count("Written:") == result.stdout.count("training all") == 1


@pytest.mark.slow
def test_train_under_torchrun(folder, alone, tmp_path):
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "peft_elastic",
    ]
    words += command(folder, tmp_path / "two", "--batch-size", "4")
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_adapter(tmp_path / "two", alone)
    assert done.stdout.count("Written:") == 1


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_once(done, name):
    result, place = done[name]
    assert result.returncode == 2
    assert result.stderr.count(BAD[name][1]) == 1 and result.stderr.count("error:") == 1, result.stderr
    assert "Traceback" not in result.stderr and not list(place.iterdir())


def test_commands_for_one_process_refuse_several(done):
    result, place = done["prune"]
    assert result.returncode == 2
    assert result.stderr.count("a launcher such as torchrun has started 2") == 1, result.stderr
    assert not list(place.iterdir())
