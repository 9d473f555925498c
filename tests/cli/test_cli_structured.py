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
"""`peft-elastic prune --structured`, run as a user would, on a tiny model."""

import json
import math
import os
import shlex
import signal
from types import SimpleNamespace

import pytest
import torch
from support import folders
from support.fresh import run_fresh
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from peft_elastic import MultiPrunerConfig, PruningPlan, TwoStagePrunerConfig, WidthPrunerConfig, prune_structured
from peft_elastic.cli import _common, _structured, main
from peft_elastic.cli.main import build_parser
from peft_elastic.cli.prune import calibration_batches
from peft_elastic.cli.quickstart.smoke import smoke_examples, smoke_model
from peft_elastic.common.journal import Journal
from peft_elastic.pruning.structured import cost, from_pruning_config
from peft_elastic.structure.folder_run import FolderRun


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model of four blocks, and text."""
    folder = tmp_path_factory.mktemp("structured")
    examples = smoke_examples()
    model, tokenizer = smoke_model(examples)
    model.config.num_hidden_layers, model.config.layer_types = 4, None
    torch.manual_seed(0)
    LlamaForCausalLM(model.config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [json.dumps({"prompt": e.prompt, "label": e.completion.strip()}) for e in examples]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def data(folder):
    return ["--dataset", folder / "train.jsonl", "--samples", "6", "--max-length", "16"]


@pytest.fixture
def prune(folder):
    """The beginning of every command."""
    return ["prune", "--model", folder / "model", "--structured"]


SMALL = ["--ratio", "0.3", "--mlp-group", "16"]


def weights(path):
    return (path / "model.safetensors").read_bytes()


def next_command(printed):
    return shlex.split(printed.rstrip().splitlines()[-1])[1:]


# -- what comes out ------------------------------------------------------------------------------------------------


def test_multipruner(folder, prune, data, tmp_path, capsys, monkeypatch):
    """The plan is that of the one call; the model loads in another process, and the command that is printed works."""
    monkeypatch.chdir(tmp_path)
    assert run(*prune, *SMALL, *data, "--out", "pruned") == 0
    printed = capsys.readouterr().out
    out = tmp_path / "pruned"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]  # neither evaluations nor half a model
    plan = PruningPlan.load(out / "plan.json")
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert not (out / "pruning_config.json").exists()  # which could not say which channels are left
    assert str(plan) in printed and "perplexity: " in printed and "6 sequences of 16 tokens" in printed
    assert "An interrupted run can continue from pruned-evaluations." in printed

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [example.text for example in smoke_examples()]
    batches = calibration_batches(tokenizer, texts, 6, 16, 0)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.num_parameters() == plan.before["parameters"]
    expected = prune_structured(
        model, MultiPrunerConfig(ratio=0.3, mlp_group=16, block_samples=None), batches, progress=False
    )
    assert expected.values == plan.values and expected.after == plan.after
    assert plan.before["perplexity"] == pytest.approx(expected.before["perplexity"])
    assert 0.25 < 1 - plan.after["parameters"] / plan.before["parameters"] < 0.35

    assert "import peft_elastic; AutoModelForCausalLM" in printed
    done = run_fresh(
        "import sys, torch, peft_elastic; from transformers import AutoModelForCausalLM as A, AutoTokenizer as T\n"
        "m = A.from_pretrained(sys.argv[1]).eval(); T.from_pretrained(sys.argv[1])\n"
        "print(m.num_parameters()); torch.save(m(torch.arange(3, 11)[None]).logits.detach(), sys.argv[2])",
        out,
        tmp_path / "logits.pt",
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) == plan.after["parameters"]
    with torch.no_grad():
        logits = model.eval()(torch.arange(3, 11)[None]).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits, rtol=0, atol=1e-5)

    command = next_command(printed)
    assert command[:3] == ["train", "--model", "pruned"]
    assert run(*command, "--steps", "2", "--r", "4") == 0
    assert run("merge", "--adapter", "adapter", "--out", "merged") == 0
    assert AutoModelForCausalLM.from_pretrained("merged").num_parameters() == plan.after["parameters"]


@pytest.mark.parametrize(
    "options, intels, drawn",
    [
        (["--method", "blockpruner"], True, True),
        (["--method", "two-stage", "--order", "l1"], True, True),
        (["--method", "width", "--choose", "random", "--order", "none", "--seed", "3"], False, False),
        (["--method", "width", "--choose", "score", "--order", "magnitude", "--measure", "macs"], False, False),
        (["--stages", "channels", "--order", "gradient", "--width-samples", "2", "--slack", "inf"], False, True),
        (["--stages", "sub-blocks", "channels", "--stage-split", "auto", "--cache-gb", "0"], False, True),
    ],
)
def test_methods(prune, data, tmp_path, options, intels, drawn, capsys):
    out = tmp_path / "new" / "pruned"
    assert run(*prune, *SMALL, *data, *options, "--out", out) == 0
    assert "perplexity: " in capsys.readouterr().out
    plan = PruningPlan.load(out / "plan.json")
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == plan.after["parameters"]
    assert ((out / "pruning_config.json").exists(), (out / "plan.png").exists()) == (intels, drawn)
    assert plan.values and math.isfinite(plan.after["perplexity"])


class FakeLatency:
    """What is measured on real machines takes long, and is never the same."""

    asked: list = []

    @classmethod
    def of_space(cls, model, space, activate, inputs, mode):
        cls.asked.append((dict(inputs), mode))
        return cls()

    def predict(self, values):
        return 1e-3 + sum(value for key, value in values.items() if key.startswith("depth"))


def test_latency(prune, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cost, "LatencyModel", FakeLatency)
    options = ["--measure", "latency", "--latency-of", "2x8", "--latency-mode", "forward"]
    assert run(*prune, *SMALL, *data, *options, "--out", tmp_path / "pruned") == 0
    assert FakeLatency.asked == [({"input_ids": (2, 8)}, "forward")]
    printed = capsys.readouterr().out
    assert "Measuring latencies of 2x8 tokens (forward)" in printed and "latency: 12 -> 8.001" in printed


def test_equal_blocks_load_without_the_package(folder, prune, data, tmp_path, capsys):
    whole = AutoModelForCausalLM.from_pretrained(folder / "model")
    ratio = 4 * 3 * 64 * 24 / whole.num_parameters()  # a quarter of the channels of every block, exactly
    options = ["--method", "width", "--stages", "channels", "--choose", "uniform", "--mlp-group", "0.25"]
    assert run(*prune, "--ratio", ratio, *options, *data, "--out", tmp_path / "pruned") == 0
    assert "import peft_elastic;" not in capsys.readouterr().out
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["intermediate_size"] == 72 and "quantization_config" not in config


# every field of the config can be said on the command line
@pytest.mark.parametrize(
    "options, expected",
    [
        ([], MultiPrunerConfig(ratio=0.1)),
        (["--samples", "64", "--choose", "random"], MultiPrunerConfig(ratio=0.1, block_samples=64, choose="random")),
        (
            ["--method", "width", "--choose", "uniform", "metric", "--stage-split", "9", "1", "--mlp-group", "0.1"],
            WidthPrunerConfig(ratio=0.1, choose=("uniform", "metric"), split=(9, 1), mlp_group=0.1),
        ),
        (
            ["--method", "two-stage", "--head-group", "2", "--width-samples", "5", "--cache-gb", "1", "--seed", "7"],
            TwoStagePrunerConfig(ratio=0.1, head_group=2, width_samples=5, cache_gb=1, seed=7),
        ),
        (
            ["--stages", "blocks", "mlps", "--stage-split", "auto", "--order", "l1", "--slack", "inf"],
            MultiPrunerConfig(
                ratio=0.1,
                stages=("blocks", "mlps"),
                split="auto",
                order="l1",
                slack=math.inf,
            ),
        ),
        (
            ["--measure", "latency", "--latency-of", "2x64", "--mlp-group", "64"],
            MultiPrunerConfig(
                ratio=0.1,
                measure="latency",
                latency_inputs={"input_ids": (2, 64)},
                mlp_group=64,
            ),
        ),
    ],
)
def test_options_are_fields_of_the_config(options, expected):
    args = build_parser().parse_args(
        ["prune", "--model", "m", "--out", "o", "--structured", "--ratio", "0.1", *options]
    )
    assert _structured.make_config(args) == expected


# -- plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_first(prune, data, tmp_path, capsys, monkeypatch):
    """--plan-only writes no model, and the command that it prints makes the one that the whole command would have made."""
    monkeypatch.chdir(tmp_path)
    assert run(*prune, *SMALL, *data, "--out", "at-once") == 0
    assert run(*prune, *SMALL, *data, "--out", "look", "--plan-only") == 0
    assert sorted(path.name for path in (tmp_path / "look").iterdir()) == ["plan.json", "plan.png"]
    assert run(*next_command(capsys.readouterr().out)) == 0
    printed = capsys.readouterr().out
    assert "perplexity: " in printed and next_command(printed)[:3] == ["train", "--model", "pruned"]
    assert weights(tmp_path / "pruned") == weights(tmp_path / "at-once")
    assert (tmp_path / "pruned" / "config.json").read_text() == (tmp_path / "at-once" / "config.json").read_text()
    again, plan = (PruningPlan.load(tmp_path / name / "plan.json") for name in ("pruned", "look"))
    assert again == plan and (tmp_path / "pruned" / "plan.png").exists()
    AutoTokenizer.from_pretrained("pruned")


def test_block_by_block(folder, prune, data, tmp_path, capsys, monkeypatch):
    """Scores alone choose the same in a folder, and a plan is carried out there; an interrupted run goes on."""
    monkeypatch.chdir(tmp_path)
    options = ["--method", "width", "--choose", "score", "--mlp-group", "8", "--ratio", "0.2", *data]
    assert run(*prune, *options, "--out", "in_memory") == 0
    capsys.readouterr()
    finish = FolderRun.finish

    def interrupted(self, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderRun, "finish", interrupted)
    assert run(*prune, *options, "--stream", "--out", "out") == 130
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(FolderRun, "finish", finish)
    assert run(*prune, *options, "--stream", "--activations-on-disk", "--out", "out") == 0
    printed = capsys.readouterr().out
    plan, expected = (PruningPlan.load(tmp_path / name / "plan.json") for name in ("out", "in_memory"))
    assert plan.values == expected.values and plan.units == expected.units and plan.values
    assert (
        "import peft_elastic; AutoModelForCausalLM" in printed
        and f"parameters: {plan.before['parameters']:,}" in printed
    )
    assert folders.same(folders.tensors(tmp_path / "out"), folders.tensors(tmp_path / "in_memory"))
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "in_memory/config.json").read_bytes()
    AutoTokenizer.from_pretrained(tmp_path / "out")

    assert run(*prune, *options, "--stream", "--plan-only", "--out", "plan") == 0
    assert [path.name for path in (tmp_path / "plan").iterdir()] == ["plan.json"]
    following = next_command(capsys.readouterr().out)
    assert "--stream" in following and run(*following) == 0
    assert folders.same(folders.tensors(tmp_path / "pruned"), folders.tensors(tmp_path / "out"))
    # by itself where the memory is too small
    monkeypatch.setattr(_common.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert run(*prune, "--plan", "plan/plan.json", "--out", "again") == 0
    assert "block by block, as with --stream" in capsys.readouterr().out
    assert folders.same(folders.tensors(tmp_path / "again"), folders.tensors(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "in_memory", "out", "plan", "pruned"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--ratio", "0.2"], "`choose` must be 'score', 'uniform' or 'random' for a model in a folder"),
        (["--ratio", "0.2", "--method", "width", "--choose", "score", "--order", "l1"], "`order` must be"),
        (
            ["--ratio", "0.2", "--method", "width", "--choose", "random", "--evaluations", "E"],
            "`--evaluations` is of no use",
        ),
        (["--plan", "pruning_config.json"], "`--stream` needs a plan.json as `--plan`"),
        (["--plan", "plan.json", "--activations-on-disk"], "`--activations-on-disk` is of no use with `--plan`"),
    ],
)
def test_what_needs_the_whole_model_is_refused(words, message, prune, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pruning_config.json").write_text("{}")
    (tmp_path / "plan.json").write_text(
        PruningPlan("by hand", {}, {"class": "", "blocks": {}}, {}, {}, {}, {}).to_json()
    )
    assert run(*prune, *words, "--stream", "--out", "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_needs_the_whole_model_does_not_stream_by_itself(prune, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_common.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert run(*prune, *SMALL, *data, "--activations-on-disk", "--out", tmp_path / "out") == 2
    assert "`--activations-on-disk` goes with `--stream`" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["l1", "none"])
def test_plans_of_intel(folder, prune, tmp_path, order, capsys):
    config = {
        "pruned_attn_idx": [2],
        "pruned_mlp_idx": [1, 2],
        "pruned_attn_width": {"0": 32, "1": 64, "2": 64, "3": 64},
        "pruned_mlp_width": {"0": 48, "1": 96, "2": 96, "3": 96},
    }
    (tmp_path / "theirs.json").write_text(json.dumps(config))
    option = [] if order == "l1" else ["--order", order]
    assert run(*prune, "--plan", tmp_path / "theirs.json", *option, "--out", tmp_path / "pruned") == 0
    assert "MLPs removed: 1" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    plan = from_pruning_config(config, model, order=order)
    expected = plan.extract(model)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert pruned.num_parameters() == plan.after["parameters"]
    ids = torch.arange(3, 11)[None]
    torch.testing.assert_close(pruned(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    assert not (tmp_path / "pruned" / "plan.png").exists()
    # what is written says the same again
    written = tmp_path / "pruned" / "pruning_config.json"
    assert written.exists() == (order == "l1")
    if order == "l1":
        whole = AutoModelForCausalLM.from_pretrained(folder / "model")
        assert from_pruning_config(written, whole).values == plan.values


# -- interruptions -------------------------------------------------------------------------------------------------


KILLED = """
import os, sys, signal
from peft_elastic.common import journal
from peft_elastic.cli import main

append, rows = journal.Journal.append, []

def append_until_killed(self, row):
    append(self, row)
    rows.append(row)
    if len(rows) == 7:
        os.kill(os.getpid(), signal.SIGKILL)

journal.Journal.append = append_until_killed
main(sys.argv[1:])
"""


def test_a_killed_run_continues(prune, data, tmp_path, monkeypatch, capsys):
    command = [*prune, *SMALL, *data]
    done = run_fresh(KILLED, *command, "--out", tmp_path / "broken")
    assert done.returncode == -signal.SIGKILL, done.stderr
    evaluations = tmp_path / "broken-evaluations"
    rows = (evaluations / "evaluations.jsonl").read_text().splitlines()
    assert len(rows) == 8 and not (tmp_path / "broken").exists()

    measured = []
    append = Journal.append
    monkeypatch.setattr(Journal, "append", lambda self, row: (measured.append(row), append(self, row)))
    assert run(*command, "--out", tmp_path / "broken") == 0
    again = len(measured)
    printed = capsys.readouterr().out
    assert f"An interrupted run is continued from {evaluations}." in printed and not evaluations.exists()
    assert run(*command, "--out", tmp_path / "whole") == 0
    assert len(measured) - again == again + 7
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


def test_ctrl_c(prune, data, tmp_path, monkeypatch, capsys):
    def interrupt(self, row):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", interrupt)
        assert run(*prune, *SMALL, *data, "--out", tmp_path / "pruned") == 130
    assert "the same command continues from there" in capsys.readouterr().out
    assert not (tmp_path / "pruned").exists()
    assert run(*prune, *SMALL, *data, "--out", tmp_path / "pruned") == 0


def test_evaluations_are_kept_for_other_ratios(prune, data, tmp_path, monkeypatch, capsys):
    keep = ["--evaluations", tmp_path / "kept"]
    measured = []
    append = Journal.append
    monkeypatch.setattr(Journal, "append", lambda self, row: (measured.append(row), append(self, row)))
    assert run(*prune, *SMALL, *data, *keep, "--out", tmp_path / "a") == 0
    first = len(measured)
    assert (tmp_path / "kept" / "evaluations.jsonl").exists() and os.fspath(
        tmp_path / "kept"
    ) in capsys.readouterr().out
    assert run(*prune, *SMALL, "--ratio", "0.25", *data, *keep, "--out", tmp_path / "b") == 0
    assert len(measured) - first < PruningPlan.load(tmp_path / "b" / "plan.json").evaluations
    # other data: another folder, or none
    assert run(*prune, *SMALL, *data, "--seed", "1", *keep, "--out", tmp_path / "c") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "`--evaluations` holds another pruning" in error and not (tmp_path / "c").exists()


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "`--structured` needs `--ratio`, the share of the model to remove, or `--plan`"),
        ("--ratio 0.1 --sparsity 0.5", "`--sparsity` goes without `--structured`"),
        ("--ratio 0.1 --pattern 2:4", "`--pattern` goes without `--structured`"),
        ("--ratio 0.1 --method wanda", "`--method wanda` goes without `--structured`"),
        ("--ratio 1.5", "`ratio` must be a number in [0, 1), got 1.5"),
        ("--ratio 0.95", "are only"),
        ("--ratio 0.1 --stages heads channels", "`--stages` needs `--stage-split`"),
        ("--ratio 0.1 --stage-split 1 x", "`--stage-split` must be numbers or 'auto', got '1 x'"),
        ("--ratio 0.1 --stage-split 1 2", "3 numbers"),
        (
            "--ratio 0.1 --choose score",
            "`choose` must be 'metric' or 'random' for the stage 'sub-blocks', got 'score'",
        ),
        ("--ratio 0.1 --mlp-group 0", "`mlp_group` must be"),
        ("--ratio 0.1 --latency-of 1x8", "`--latency-of` goes with `--measure latency`"),
        ("--ratio 0.1 --measure latency --latency-of 8", "`--latency-of` must be sequences x tokens"),
        ("--ratio 0.1 --evaluations {new}/kept", "must not be in `--out`"),
        (
            "--ratio 0.1 --max-length 9999",
            " tokens, less than one sequence of `--max-length` 9999: give a `--dataset`",
        ),
        ("--ratio 0.1 --out {model}", "exists already"),
        ("--plan {plan} --ratio 0.1", "`--ratio` is of no use with `--plan`"),
        ("--plan {plan} --plan-only", "`--plan-only` is of no use with `--plan`"),
        ("--plan {plan} --method width", "`--method` is of no use with `--plan`"),
        ("--plan {plan} --dataset {train}", "`--dataset` is of no use with `--plan`"),
        ("--plan {plan} --order l1", "`--order` is of no use with `--plan`"),
        ("--plan {plan}", "for a BertModel in which"),
        ("--plan {theirs} --order activation", "`--order` must be l1 or none"),
        ("--plan {theirs}", "the model has 4 blocks"),
        ("--plan {train}", "is not JSON"),
        ("--plan {model}/config.json", "cannot be carried out: config: a pruning_config.json has the entries"),
        ("--plan {new}", "cannot be read: No such file"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(words, message, folder, prune, data, tmp_path, capsys):
    plan = PruningPlan("width", {}, {"class": "BertModel", "blocks": {"x": {}}}, {}, {}, {}, {})
    plan.save(tmp_path / "plan.json")
    (tmp_path / "theirs.json").write_text(json.dumps({"pruned_mlp_idx": [7]}))
    names = {name: tmp_path / f"{name}.json" for name in ("plan", "theirs")}
    names |= {"new": tmp_path / "new", "model": folder / "model", "train": folder / "train.jsonl"}
    before = sorted([*tmp_path.rglob("*"), *folder.rglob("*")])
    command = [*prune, *([] if "--plan " in words else data), "--out", names["new"], *words.format(**names).split()]
    assert run(*command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("peft-elastic: error: ") and message in error
    assert sorted([*tmp_path.rglob("*"), *folder.rglob("*")]) == before


@pytest.mark.parametrize(
    "words, option",
    [
        ("--ratio 0.1", "--ratio"),
        ("--plan plan.json", "--plan"),
        ("--plan-only", "--plan-only"),
        ("--stages heads", "--stages"),
        ("--stage-split auto", "--stage-split"),
        ("--mlp-group 0.1", "--mlp-group"),
        ("--latency-of 1x8", "--latency-of"),
        ("--method width", "--method width"),
    ],
)
def test_options_that_need_structured(words, option, folder, tmp_path, capsys):
    command = ["prune", "--model", folder / "model", "--sparsity", "0.5", *words.split(), "--out", tmp_path / "new"]
    assert run(*command) == 2
    assert f"`{option}` goes with `--structured`" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["prune", "--sparsity", "0.5"], ["quantize", "--group-size", "16"]])
def test_too_little_text(command, folder, tmp_path, capsys):
    """The other commands that calibrate."""
    (tmp_path / "text.txt").write_text("some words\n")
    arguments = ["--model", folder / "model", "--dataset", tmp_path / "text.txt", "--out", tmp_path / "new"]
    assert run(*command, *arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert " tokens, less than one sequence of `--max-length` 512" in error and "`--dataset`" in error


def test_models_that_predict_no_tokens(folder, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    model.config.architectures = ["LlamaForSequenceClassification"]
    model.config.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(weights(folder / "model"))
    options = ["--dataset", folder / "train.jsonl", "--max-length", "16", "--out", tmp_path / "new"]
    assert run("prune", "--model", tmp_path / "model", "--structured", "--ratio", "0.1", *options) == 2
    assert "this command knows causal language models" in capsys.readouterr().err
