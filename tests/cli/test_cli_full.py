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
"""`peft-elastic train --full`, and the other commands on what it writes, each run as a user would, on a tiny model."""

import errno
import json
import os
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import folders
from support.commands import fill_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, trainer

from peft_elastic import ElasticModel, SearchResult, Subnet, bounds_by_importance
from peft_elastic.cli import _common, _evaluation, _training, main
from peft_elastic.cli._data import load_records, to_examples
from peft_elastic.cli._training import last_checkpoint
from peft_elastic.quantization import load_gptq
from peft_elastic.structure.blocks import Structure
from peft_elastic.structure.importance import measure_importance


FULL = ["--full", "--elastic-width", "heads=1.0,0.5", "mlp=96,72,48", "--elastic-depth", "1"]
FULL += ["--strategy", "sandwich", "--distillation", "max", "--batch-size", "8", "--lr", "0.003"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model, and data with the columns prompt and label."""
    return fill_folder(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def trained(folder):
    """What `train --full` wrote; not to be changed."""
    data = ["--dataset", folder / "train.jsonl"]
    assert run("train", "--model", folder / "model", *data, *FULL, "--steps", "12", "--out", folder / "trained") == 0
    return folder / "trained"


@pytest.fixture
def supernet(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "supernet")


@pytest.fixture
def logits(folder):
    """A function that computes the logits of a model for a fixed input."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    inputs = tokenizer("Review: The plot is great and the cast too.\nSentiment:", return_tensors="pt")["input_ids"]

    @torch.no_grad()
    def compute(model):
        return model.eval()(input_ids=inputs).logits

    return compute


@pytest.fixture
def search(folder, supernet):
    """The beginning of the command."""
    return [
        "search",
        "--model",
        supernet,
        "--dataset",
        folder / "validation.jsonl",
        "--samples",
        "8",
        "--population",
        "4",
    ]


# -- train ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_an_ordinary_checkpoint_and_a_supernet(folder, trained, logits):
    model = ElasticModel.from_pretrained(trained)
    assert {c.kind: c.options for c in model.search_space} == {"heads": (4, 2), "mlp": (96, 72, 48), "depth": (1, 0)}
    assert model.active_subnet == model.search_space.max and model.elastic_config.importance == "activation"
    plain = AutoModelForCausalLM.from_pretrained(trained)
    assert not isinstance(plain, ElasticModel) and torch.equal(logits(plain), logits(model))
    tokenizer = AutoTokenizer.from_pretrained(trained)

    # all weights have moved, and for the better, those of the smallest subnet too
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    moved = dict(plain.named_parameters())
    assert not any(torch.equal(weight, moved[name]) for name, weight in base.named_parameters())
    examples = to_examples(load_records(str(folder / "validation.jsonl")))
    evaluate = _evaluation.loss_evaluator(base, tokenizer, examples, 64, 16)
    before = evaluate(base.eval())
    for subnet in ("max", "min"):
        model.set_subnet(subnet)
        assert evaluate(model) < before - 0.5
    assert not (folder / "trained-checkpoints").exists() and not list(folder.glob(".*"))


def test_half_precision_is_trained_in_single(folder, tmp_path, monkeypatch):
    half = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "half")
    rates = []
    monkeypatch.setattr("peft_elastic.cli.train.fit", lambda *args, **options: rates.append(options["learning_rate"]))
    command = ["train", "--model", tmp_path / "half", "--dataset", folder / "train.jsonl", "--full"]
    command += ["--elastic-depth", "all", "--out", tmp_path / "out"]
    seen = []
    monkeypatch.setattr("peft_elastic.cli.train.get_elastic_model", lambda model, config: seen.append(model) or model)
    monkeypatch.setattr("peft_elastic.cli.train.sort", lambda model, calibration: setattr(model, "search_space", ""))
    assert run(*command) == run(*command, "--lr", "1e-3") == run(*command, "--dtype", "bfloat16") == 0
    assert [model.dtype for model in seen] == [torch.float32, torch.float32, torch.bfloat16]
    assert rates == [2e-5, 1e-3, 2e-5]


def test_interrupted_training_continues_in_its_order(folder, tmp_path, capsys, monkeypatch):
    """Even if the calibration would find another order now."""
    train = ["train", "--model", folder / "model", "--dataset", folder / "train.jsonl", *FULL]
    train += ["--samples", "40", "--steps", "4", "--save-steps", "2"]
    assert run(*train, "--out", tmp_path / "whole") == 0

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, Stop])
        assert run(*train, "--out", tmp_path / "broken") == 130
    assert last_checkpoint(tmp_path / "broken-checkpoints") and "--resume" in capsys.readouterr().out
    assert run(*train, "--importance", "gradient", "--out", tmp_path / "broken", "--resume") == 2
    assert "`--resume`" in capsys.readouterr().err
    monkeypatch.setattr(_training, "measure_importance", None)
    monkeypatch.setattr(ElasticModel, "sort_by_importance", None)
    assert run(*train, "--out", tmp_path / "broken", "--resume") == 0
    assert folders.same(folders.tensors(tmp_path / "whole"), folders.tensors(tmp_path / "broken"))
    files = [(tmp_path / name / "elastic_model.json").read_text() for name in ("whole", "broken")]
    assert files[0] == files[1]


def test_bounds(folder, tmp_path, capsys):
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    scores = measure_importance(base, Structure(base).widths, "magnitude")
    bounds = bounds_by_importance(base, scores, targets=["100%", "80%", "70%"])
    bounds.save(tmp_path / "bounds.json")
    options = ["--bounds", tmp_path / "bounds.json", "--importance", "magnitude", "--steps", "1", "--samples", "8"]
    command = ["train", "--model", folder / "model", "--dataset", folder / "train.jsonl", *options]
    assert run(*command, "--full", "--out", tmp_path / "full") == 0
    assert run(*command, "--r", "4", "--targets", "q_proj", "--out", tmp_path / "adapter") == 0
    config = ElasticModel.from_pretrained(tmp_path / "full").elastic_config
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert bounds.elastic_width and config.elastic_width == bounds.elastic_width == saved["elastic_width"]
    assert config.elastic_depth == bounds.elastic_depth == saved["elastic_depth"]
    base.config.num_hidden_layers = 1
    type(base)(base.config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "other")
    command[2] = tmp_path / "other"
    capsys.readouterr()
    assert run(*command, "--full", "--out", tmp_path / "x") == 2
    assert "the bounds are for" in capsys.readouterr().err


# -- search and merge ----------------------------------------------------------------------------------------------


def test_search_and_merge(folder, supernet, search, logits, tmp_path, capsys):
    out = tmp_path / "search"
    before = {path.name: path.read_bytes() for path in supernet.iterdir()}
    assert run(*search, "--evals", "6", "--out", out) == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1]) == [
        "peft-elastic", "merge", "--model", str(supernet), "--out", "small", "--subnet", str(out / "subnet.json"),
    ]  # fmt: skip
    assert {path.name: path.read_bytes() for path in supernet.iterdir()} == before

    # asked for more, it continues; and now the super-network is told
    assert run(*search, "--evals", "9", "--max-drop", "1", "--budget", "85%", "--select", "--out", out) == 0
    following = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert following == ["peft-elastic", "merge", "--model", str(supernet), "--out", "small"]
    result, chosen = SearchResult.load(out), Subnet.load(out / "subnet.json")
    assert len(result.history) == 9 and chosen == result.best(max_drop=1, budget="85%") != result.space.max
    changed = {path.name for path in supernet.iterdir() if before.get(path.name) != path.read_bytes()}
    assert changed == {"elastic_model.json"}
    model = ElasticModel.from_pretrained(supernet)
    assert model.active_subnet == chosen

    # by default the active subnet is cut out; others by name and from a file
    unequal = Subnet({**model.search_space.max, "mlp:model.layers.0": 48})
    unequal.save(tmp_path / "unequal.json")
    for name, subnet, option, ordinary in (
        ("chosen", chosen, [], None),
        ("min", "min", ["--subnet", "min"], True),
        ("unequal", unequal, ["--subnet", tmp_path / "unequal.json"], False),
    ):
        assert run("merge", "--model", supernet, *option, "--out", tmp_path / name) == 0
        said = capsys.readouterr().out
        assert "smaller model" in said and ordinary in (None, "import peft_elastic" not in said)
        small = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(tmp_path / name)
        assert not (tmp_path / name / "elastic_model.json").exists()
        model.set_subnet(subnet)
        torch.testing.assert_close(logits(small), logits(model), rtol=0, atol=1e-5)
        assert small.num_parameters() < model.num_parameters()


@pytest.mark.slow
def test_search_in_workers(search, tmp_path):
    for out, options in (("one", []), ("two", ["--workers", "2"])):
        assert run(*search, "--evals", "6", *options, "--out", tmp_path / out) == 0
    one, two = (SearchResult.load(tmp_path / out) for out in ("one", "two"))
    assert [(e.subnet, e.metrics) for e in one.history] == [(e.subnet, e.metrics) for e in two.history]


def test_a_selection_that_fails_leaves_the_file_as_it_was(supernet, monkeypatch):
    before = (supernet / "elastic_model.json").read_bytes()
    model = ElasticModel.from_pretrained(supernet)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="supernet"):
            _common.set_active_subnet(model, model.search_space.min, supernet)
    assert (supernet / "elastic_model.json").read_bytes() == before
    assert not [path for path in supernet.iterdir() if path.name.startswith(".") or "tmp" in path.name]
    _common.set_active_subnet(model, model.search_space.min, supernet)
    assert ElasticModel.from_pretrained(supernet).active_subnet == model.search_space.min


# -- as the ordinary checkpoint that it is -------------------------------------------------------------------------


def test_other_commands_take_the_ordinary_checkpoint(folder, supernet, trained, tmp_path):
    """Whatever subnet is active; block by block too, where the file of the super-network, which it is none any more, stays behind."""
    model = ElasticModel.from_pretrained(supernet)
    model.set_subnet("min")
    model.save_pretrained(supernet)
    commands = {
        "pruned": ["prune", "--method", "magnitude", "--sparsity", "0.5"],
        "quantized": ["quantize", "--method", "rtn", "--group-size", "16"],
    }
    for name, (command, *options) in commands.items():
        for out, source, more in ((name, trained, []), (f"{name} stream", supernet, ["--stream"])):
            assert run(command, "--model", source, *options, *more, "--out", tmp_path / out) == 0
            assert not (tmp_path / out / "elastic_model.json").exists()
        assert folders.same(*(folders.tensors(tmp_path / out) for out in (name, f"{name} stream")))
    assert load_gptq(tmp_path / "quantized").num_parameters()
    assert run(
        "prune", "--model", supernet, "--structured", "--dataset", folder / "train.jsonl", "--samples", "4",
        "--max-length", "16", "--ratio", "0.3", "--mlp-group", "16", "--out", tmp_path / "structured",
    ) == 0  # fmt: skip
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "structured").num_parameters() < model.num_parameters()
    assert not (tmp_path / "structured" / "elastic_model.json").exists()
    # and an adapter can be trained on it
    assert run(
        "train", "--model", supernet, "--dataset", folder / "train.jsonl", "--steps", "1", "--r", "4", "--targets", "q_proj",
        "--samples", "8", "--out", tmp_path / "adapter",
    ) == 0  # fmt: skip
    assert run("merge", "--adapter", tmp_path / "adapter", "--out", tmp_path / "merged") == 0
    merged, whole = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", trained))
    assert {name for name in whole if not torch.equal(merged[name], whole[name])} == {
        f"model.layers.{number}.self_attn.q_proj.weight" for number in (0, 1)
    }


# -- what is refused -----------------------------------------------------------------------------------------------

TRAIN_HERE = ["train", "--full", "--model", "{model}", "--dataset", "{train}", "--out", "{new}"]
WIDE = [*TRAIN_HERE, "--elastic-width", "mlp=1.0,0.5"]
SEARCH_HERE = ["search", "--dataset", "{train}", "--out", "{new}"]
MERGE_HERE = ["merge", "--model", "{supernet}"]


@pytest.mark.parametrize(
    "command, message",
    [
        *(
            ([*WIDE, *words], f"`{words[0]}` is of an adapter")
            for words in (
                ["--r", "32"],
                ["--max-rank", "32"],
                ["--ranks", "32"],
                ["--alpha", "64"],
                ["--dropout", "0.1"],
                ["--targets", "all-linear"],
                ["--groups", "module"],
                ["--sparse-adapter"],
                ["--bits", "4"],
                ["--group-size", "64"],
            )
        ),
        (TRAIN_HERE, "`--full` needs `--elastic-width`, `--elastic-depth` or both"),
        ([*TRAIN_HERE, "--elastic-width", "heads=4,3"], "which move in groups of 2"),
        ([*TRAIN_HERE, "--elastic-width", "heads=0.5"], "options with the whole width"),
        ([*TRAIN_HERE, "--elastic-depth", "7"], "the blocks are 0 to 1"),
        ([*WIDE, "--bounds", "{train}"], "`--bounds` goes without `--elastic-width`"),
        ([*TRAIN_HERE, "--bounds", "missing.json"], "missing.json"),
        ([*WIDE, "--distillation", "max"], "`--strategy sandwich`"),
        ([*WIDE, "--resume"], "no checkpoint"),
        ([*WIDE, "--out", "{model}"], "exists already"),
        (SEARCH_HERE, "`--adapter` is needed, or `--model` with a super-network"),
        ([*SEARCH_HERE, "--model", "{model}"], "holds no elastic_model.json"),
        ([*SEARCH_HERE, "--model", "./missing"], "no such folder"),
        ([*SEARCH_HERE, "--model", "some/name", "--select"], "`--select` needs a local super-network"),
        ([*SEARCH_HERE, "--adapter", "{supernet}"], "no adapter_config.json"),
        (["merge", "--out", "{new}"], "`--adapter` is needed, or `--model` with a super-network"),
        (["merge", "--model", "{model}", "--out", "{new}"], "holds no elastic_model.json"),
        (MERGE_HERE, "nothing to do"),
        ([*MERGE_HERE, "--export-lora", "{new}"], "`--export-lora` goes with `--adapter`"),
        ([*MERGE_HERE, "--out", "{new}", "--gptq"], "`--gptq` goes with `--adapter`"),
        ([*MERGE_HERE, "--out", "{new}", "--stream"], "`--stream` goes with `--adapter`"),
        ([*MERGE_HERE, "--out", "{new}", "--subnet", "{train}"], "not a subnet file"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(command, message, folder, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"new": tmp_path / "new", "model": folder / "model", "train": folder / "train.jsonl", "supernet": trained}
    before = sorted([*tmp_path.rglob("*"), *folder.rglob("*")])
    capsys.readouterr()
    assert run(*(word.format(**names) for word in command)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("peft-elastic: error: ") and message in error
    assert sorted([*tmp_path.rglob("*"), *folder.rglob("*")]) == before


def test_a_damaged_supernet(supernet, search, tmp_path, capsys):
    (supernet / "elastic_model.json").write_text("{}")
    assert run(*search, "--out", tmp_path / "search") == 2
    assert "cannot be loaded as a super-network" in capsys.readouterr().err
