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
"""The commands, each run as a user would, on a tiny model; and how they read data."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AutoPeftModelForCausalLM, PeftModel
from support import folders
from support.commands import fill_folder
from support.places import REPOSITORY
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, trainer

from peft_elastic import SearchResult, Subnet
from peft_elastic.cli import _common, _data, _evaluation, main
from peft_elastic.cli._examples import Collator, Example, encode, pack
from peft_elastic.cli._training import last_checkpoint
from peft_elastic.cli.quickstart.smoke import smoke_examples
from peft_elastic.cli.quickstart.splits import split_examples
from peft_elastic.cost import timing
from peft_elastic.quantization import load_gptq
from peft_elastic.structure.folder_run import FolderRun


GROUPS = ["q_proj,k_proj,v_proj", "up_proj,gate_proj", "down_proj"]
TRAIN = ["--r", "4", "--ranks", "4", "3", "2", "--groups", *GROUPS, "--targets", *",".join(GROUPS).split(",")]
TRAIN += ["--batch-size", "8", "--lr", "0.01"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model, and data with the columns prompt and label."""
    return fill_folder(tmp_path_factory.mktemp("cli"))


@pytest.fixture(scope="module")
def pruned(folder):
    data = ["--dataset", folder / "train.jsonl", "--samples", "8", "--max-length", "32"]
    assert run("prune", "--model", folder / "model", "--sparsity", "0.5", *data, "--out", folder / "pruned") == 0
    return folder / "pruned"


@pytest.fixture(scope="module")
def adapter(folder, pruned):
    data = ["--dataset", folder / "train.jsonl"]
    assert run("train", "--model", pruned, *data, *TRAIN, "--steps", "12", "--out", folder / "adapter") == 0
    return folder / "adapter"


@pytest.fixture
def logits(folder):
    """A function that computes the logits of a model for a fixed input."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    inputs = tokenizer("Review: The plot is great and the cast too.\nSentiment:", return_tensors="pt")["input_ids"]

    @torch.no_grad()
    def compute(model):
        return model.eval()(input_ids=inputs).logits

    return compute


# -- the commands --------------------------------------------------------------------------------------------------


def zeros(model):
    return {
        name: (module.weight == 0).float().mean().item()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    }


def test_prune(folder, pruned):
    dense, model = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "model", pruned))
    assert set(zeros(model).values()) == {0.5}
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    AutoTokenizer.from_pretrained(pruned)
    report = json.loads((pruned / "pruning_report.json").read_text())
    assert report["method"] == "wanda" and report["calibration_tokens"] == 8 * 32 and report["sparsity"] == 0.5
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("options, share", [(["--sparsity", "0.25"], 0.25), (["--pattern", "1:4"], 0.75)])
def test_prune_by_magnitude(folder, tmp_path, options, share):
    out = tmp_path / "new" / "pruned"
    assert run("prune", "--model", folder / "model", "--method", "magnitude", *options, "--out", out) == 0
    assert set(zeros(AutoModelForCausalLM.from_pretrained(out)).values()) == {share}


def test_prune_block_by_block(folder, pruned, tmp_path, monkeypatch, capsys):
    """The same weights, and files beside them; by itself where the memory is too small; an interrupted run goes on."""
    command = ["prune", "--model", folder / "model", "--sparsity", "0.5", "--out", tmp_path / "out"]
    command += ["--dataset", folder / "train.jsonl", "--samples", "8", "--max-length", "32"]
    finish = FolderRun.finish

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderRun, "finish", interrupted)
    assert run(*command, "--stream") == 130
    assert not (tmp_path / "out" / "config.json").exists()
    monkeypatch.setattr(FolderRun, "finish", finish)
    assert run(*command[:4], "0.4", *command[5:], "--stream") == 2
    assert "`output` holds another pruning" in capsys.readouterr().err
    monkeypatch.setattr(_common.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert run(*command) == 0
    assert "block by block, as with --stream" in capsys.readouterr().out
    assert folders.same(folders.tensors(tmp_path / "out"), folders.tensors(pruned))
    assert json.loads((tmp_path / "out" / "pruning_report.json").read_text())["sparsity"] == 0.5
    AutoTokenizer.from_pretrained(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in pruned.iterdir()}
    assert run(*command, "--stream") == 2 and "exists already" in capsys.readouterr().err
    assert run("prune", "--model", "some/name", "--sparsity", "0.5", "--out", tmp_path / "x", "--stream") == 2
    assert "needs a folder as `--model`" in capsys.readouterr().err


def test_merge_block_by_block(folder, adapter, tmp_path, capsys):
    command = ["merge", "--adapter", adapter, "--subnet", "min"]
    assert run(*command, "--out", tmp_path / "in_memory") == 0
    said = capsys.readouterr().out
    assert run(*command, "--out", tmp_path / "out", "--stream") == 0
    assert "Zeros in the merged layers: 50.0% before" in said and "50.0% before" in capsys.readouterr().out
    assert folders.same(folders.tensors(tmp_path / "out"), folders.tensors(tmp_path / "in_memory"))
    assert run(*command, "--out", tmp_path / "x", "--stream", "--sparse", "bf16") == 2
    assert "`--stream` goes with `--out`, and without `--sparse`" in capsys.readouterr().err


def test_quantize_block_by_block(folder, pruned, tmp_path):
    command = ["quantize", "--model", pruned, "--group-size", "16", "--method", "rtn"]
    assert run(*command, "--out", tmp_path / "in_memory") == 0
    assert run(*command, "--out", tmp_path / "out", "--stream") == 0
    assert folders.same(folders.tensors(tmp_path / "out"), folders.tensors(tmp_path / "in_memory"))
    assert (tmp_path / "out" / "quantization_report.json").exists()


@pytest.mark.parametrize(
    "options, sym", [(["--method", "rtn", "--symmetric"], True), (["--act-order", "--bits", "2"], False)]
)
def test_quantize(folder, pruned, tmp_path, options, sym, capsys):
    out = tmp_path / "int"
    data = [] if "rtn" in options else ["--dataset", folder / "train.jsonl", "--samples", "8", "--max-length", "32"]
    assert run("quantize", "--model", pruned, "--group-size", "16", *options, *data, "--out", out) == 0
    assert "quantised model" in capsys.readouterr().out
    model = load_gptq(out)
    assert all(share >= 0.5 for share in zeros(model).values())
    AutoTokenizer.from_pretrained(out)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["sym"] is sym
    assert len(json.loads((out / "quantization_report.json").read_text())["layers"]) == len(zeros(model))
    assert run("quantize", "--model", pruned, "--method", "rtn", "--act-order", "--out", tmp_path / "x") == 2
    assert "`--act-order` is of no use" in capsys.readouterr().err


def test_pruning_differs_with_the_calibration_data_alone(folder, pruned, tmp_path, capsys):
    def weights(name, seed):
        data = ["--dataset", folder / "train.jsonl", "--samples", "8", "--max-length", "32", "--seed", seed]
        assert run("prune", "--model", folder / "model", "--sparsity", "0.5", *data, "--out", tmp_path / name) == 0
        return (tmp_path / name / "model.safetensors").read_bytes()

    assert weights("same", 0) == (pruned / "model.safetensors").read_bytes()
    assert weights("other", 1) != (pruned / "model.safetensors").read_bytes()
    assert f"peft-elastic train --model {tmp_path}/other --dataset" in capsys.readouterr().out


def test_train(folder, pruned, adapter, capsys):
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert model.active_peft_config.base_model_name_or_path == str(pruned)
    space = model.search_space
    assert len(space) == 2 * 3 and all(choice.options == (4, 3, 2) for choice in space)
    assert model.active_subnet == space.max
    assert all(p.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)
    assert not (folder / "adapter-checkpoints").exists()


def test_training_learns(folder, pruned, adapter):
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    examples = _data.to_examples(_data.load_records(str(folder / "validation.jsonl")))
    base = AutoModelForCausalLM.from_pretrained(pruned).eval()
    evaluate = _evaluation.loss_evaluator(base, tokenizer, examples, 64, 16)
    before = evaluate(base)
    assert evaluate(PeftModel.from_pretrained(base, adapter)) < before - 0.5


class InterruptAtStep6(TrainerCallback):
    """Ctrl-C after the checkpoint of step 4."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), 2)


def test_interrupted_training_continues_to_the_same_result(folder, pruned, tmp_path, capsys, monkeypatch, ctrl_c):
    """Ctrl-C once there is a checkpoint, then --resume."""
    command = ["train", "--model", pruned, "--dataset", folder / "train.jsonl", *TRAIN, "--samples", "40"]
    command += ["--steps", "12", "--save-steps", "4"]
    assert run(*command, "--out", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "DEFAULT_CALLBACKS", [*trainer.DEFAULT_CALLBACKS, InterruptAtStep6])
        status = run(*command, "--out", tmp_path / "broken")
    assert status == 130
    assert last_checkpoint(tmp_path / "broken-checkpoints")
    assert "--resume" in capsys.readouterr().out and not (tmp_path / "broken").exists()

    assert run(*command, "--out", tmp_path / "broken") == 2  # never over a checkpoint without being told
    assert run(*command, "--out", tmp_path / "broken", "--resume") == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_search_and_merge(folder, pruned, adapter, logits, tmp_path, capsys):
    out, merged, lora = tmp_path / "search", tmp_path / "merged", tmp_path / "lora"
    search = [
        "search",
        "--adapter",
        adapter,
        "--dataset",
        folder / "validation.jsonl",
        "--out",
        out,
        "--population",
        "4",
    ]
    assert run(*search, "--evals", "6") == 0
    first = (out / "history.jsonl").read_text()
    printed = capsys.readouterr().out
    assert "heuristic" in printed and f"--subnet {out}/subnet.json" in printed
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    before = (adapter / "adapter_model.safetensors").read_bytes()

    # asked for more, it continues; and now the adapter is told
    assert run(*search, "--evals", "9", "--max-drop", "1", "--budget", "99.9%", "--select") == 0
    assert (out / "history.jsonl").read_text().startswith(first)
    result = SearchResult.load(out)
    assert len(result.history) == 9 and result.objectives == {"loss": "min", "macs": "min"}
    assert {"loss", "accuracy"} <= set(result.history[0].metrics)
    chosen = Subnet.load(out / "subnet.json")
    assert chosen == result.best(max_drop=1, budget="99.9%") and chosen != result.space.max
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert model.active_subnet == chosen
    assert (adapter / "adapter_model.safetensors").read_bytes() == before

    # by default the active subnet is merged; what comes out needs nothing of ours
    expected = logits(model)
    assert run("merge", "--adapter", adapter, "--out", merged, "--export-lora", lora) == 0
    assert "a merged model is dense" in " ".join(capsys.readouterr().out.split())
    plain = AutoModelForCausalLM.from_pretrained(merged)
    AutoTokenizer.from_pretrained(merged)
    torch.testing.assert_close(logits(plain), expected, atol=1e-5, rtol=0)
    exported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pruned), lora)
    assert exported.active_peft_config.peft_type == peft.PeftType.LORA
    torch.testing.assert_close(logits(exported), expected, atol=1e-5, rtol=0)

    # another subnet by name and from a file
    model.set_subnet("max")
    model.active_subnet.save(tmp_path / "max.json")
    for name, subnet in (("a", "max"), ("b", tmp_path / "max.json")):
        assert run("merge", "--model", pruned, "--adapter", adapter, "--subnet", subnet, "--out", tmp_path / name) == 0
        other = logits(AutoModelForCausalLM.from_pretrained(tmp_path / name))
        torch.testing.assert_close(other, logits(model), atol=1e-5, rtol=0)
        assert (other - expected).abs().max() > 1e-4


def test_merge_with_sparse_layers(adapter, tmp_path, capsys, monkeypatch):
    faster = timing.Timing(2.0, 1.0)
    monkeypatch.setattr(timing, "measure", lambda *args: faster)
    assert run("merge", "--adapter", adapter, "--out", tmp_path / "sparse", "--sparse", "int8") == 0
    out = capsys.readouterr().out
    assert "yes: 2.00 times as fast" in out and "import peft_elastic; AutoModelForCausalLM" in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    # the adapter has filled the zeros of all layers but these
    kinds = {name.rpartition(".")[2]: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["o_proj"] == "SparseLinear" and kinds["q_proj"] == "Linear"
    faster = timing.Timing(1.0, 2.0)
    assert run("merge", "--adapter", adapter, "--out", tmp_path / "dense", "--sparse", "bf16") == 0
    assert "import peft_elastic" not in capsys.readouterr().out
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()


@pytest.mark.parametrize("bits", [None, 4])
def test_adapters_that_merge_without_loss(folder, pruned, logits, tmp_path, bits, capsys):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    options = [] if bits is None else ["--bits", bits, "--group-size", "16"]
    data = ["--dataset", folder / "train.jsonl", "--steps", "4"]
    assert run("train", "--model", pruned, *data, *TRAIN, "--sparse-adapter", *options, "--out", adapter) == 0
    expected = logits(AutoPeftModelForCausalLM.from_pretrained(adapter))
    as_gptq = [] if bits is None else ["--gptq"]
    assert run("merge", "--model", pruned, "--adapter", adapter, *as_gptq, "--out", merged) == 0
    assert "has no zeros" not in capsys.readouterr().out
    model = load_gptq(merged) if bits else AutoModelForCausalLM.from_pretrained(merged)
    assert all(share >= 0.5 for share in zeros(model).values())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    AutoTokenizer.from_pretrained(merged)
    if bits is None:
        assert run("merge", "--adapter", adapter, "--gptq", "--out", tmp_path / "x") == 2
        assert "was not trained with `--bits`" in capsys.readouterr().err and not (tmp_path / "x").exists()


WIDTH = ["--elastic-width", "heads=1.0,0.5", "mlp=96,72,48", "--elastic-depth", "1"]


def test_width_and_depth(folder, logits, tmp_path, capsys):
    """From training to a smaller model; the adapter belongs to the sorted base, and is loaded on the one that was given."""
    adapter, search = tmp_path / "adapter", tmp_path / "search"
    train = ["train", "--model", folder / "model", "--dataset", folder / "train.jsonl", *TRAIN, *WIDTH]
    sandwich = ["--strategy", "sandwich", "--distillation", "max", "--steps", "4"]
    assert run(*train, *sandwich, "--out", adapter) == 0
    model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    config, space = model.active_peft_config, model.search_space
    assert config.sorted_base and config.importance == "activation"
    options = {choice.kind: choice.options for choice in space}
    assert options == {"rank": (4, 3, 2), "heads": (4, 2), "mlp": (96, 72, 48), "depth": (1, 0)}

    data = ["--dataset", folder / "validation.jsonl", "--samples", "8"]
    limit = ["--cost", "parameters", "--budget", "90%"]
    assert run("search", "--adapter", adapter, *data, *limit, "--evals", "5", "--select", "--out", search) == 0
    assert SearchResult.load(search).objectives == {"loss": "min", "parameters": "min"}
    # the costs are those of before, with a narrow subnet active now
    assert run("search", "--adapter", adapter, *data, *limit, "--evals", "7", "--select", "--out", search) == 0
    bounds = ["--cost", "latency", "--latency-of", "1x8", "--latency-mode", "forward", "--max-parameters", "95%"]
    assert run("search", "--adapter", adapter, *data, *bounds, "--evals", "6", "--out", tmp_path / "bounded") == 0
    bounded = SearchResult.load(tmp_path / "bounded")
    assert bounded.objectives == {"loss": "min", "latency": "min"} and set(bounded.constraints) == {"parameters"}
    assert all(e.source != "search" or bounded.keeps_constraints(e) for e in bounded.history)
    capsys.readouterr()

    chosen = AutoPeftModelForCausalLM.from_pretrained(adapter).active_subnet
    unequal = Subnet({**space.max, "mlp:model.layers.0": 48})
    unequal.save(tmp_path / "unequal.json")
    for name, subnet, ordinary in (
        ("chosen", chosen, None),
        ("min", space.min, True),
        ("unequal", unequal, False),
    ):
        option = {"chosen": [], "min": ["--subnet", "min"], "unequal": ["--subnet", tmp_path / "unequal.json"]}[name]
        assert run("merge", "--adapter", adapter, *option, "--out", tmp_path / name) == 0
        assert ordinary in (None, "import peft_elastic" not in capsys.readouterr().out)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        model.set_subnet(subnet)
        torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
        assert sum(p.numel() for p in merged.parameters()) < sum(
            p.numel() for key, p in model.named_parameters() if ".lora_" not in key
        )
    assert (
        len(merged.model.layers) == 2 and len(AutoModelForCausalLM.from_pretrained(tmp_path / "min").model.layers) == 1
    )
    assert run("merge", "--adapter", adapter, "--subnet", "min", "--export-lora", tmp_path / "lora") == 2
    assert "plain LoRA adapter cannot say" in capsys.readouterr().err and not (tmp_path / "lora").exists()


def test_resumed_training_is_of_the_same_sorted_base(folder, tmp_path):
    train = [
        "train",
        "--model",
        folder / "model",
        "--dataset",
        folder / "train.jsonl",
        *TRAIN,
        *WIDTH,
        "--save-steps",
        "2",
    ]
    assert run(*train, "--samples", "40", "--steps", "4", "--out", tmp_path / "whole") == 0

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    callbacks = trainer.DEFAULT_CALLBACKS
    try:
        trainer.DEFAULT_CALLBACKS = [*callbacks, Stop]
        assert run(*train, "--samples", "40", "--steps", "4", "--out", tmp_path / "broken") == 130
    finally:
        trainer.DEFAULT_CALLBACKS = callbacks
    assert run(*train, "--samples", "40", "--steps", "4", "--out", tmp_path / "broken", "--resume") == 0
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]


def test_bench_of_layers(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "peft_elastic.cli.bench.measure", lambda *args: asked.append(args) or timing.Timing(3e-3, 2e-3)
    )
    assert run("bench", "--shapes", "64x32", "--sparsity", "0.6", "--values", "int8", "--dtype", "bfloat16") == 0
    assert asked == [(64, 32, 0.6, "int8", torch.bfloat16)]
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line == ["64x32", "60%", "3.000", "ms", "2.000", "ms", "1.50x"]


def test_bench_of_a_model(folder, capsys, monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda *args: timing.Timing(2.0, 1.0))
    before = sorted(folder.rglob("*"))
    assert run("bench", "--model", folder / "model", "--sparsity", "0.5", "--tokens", "4", "--threads", "1") == 0
    out = capsys.readouterr().out
    assert "14 of 15 linear layers are sparse" in out and sorted(folder.rglob("*")) == before
    for line in out.splitlines()[-2:]:
        name, dense, sparse = line.split()
        assert name in ("generate", "optimize_generation") and float(dense) > 0 and float(sparse) > 0


def histories(*folders):
    """The rows, which come in the order of their arrival, and the results."""
    for folder in folders:
        header, *rows = (folder / "history.jsonl").read_text().splitlines()
        yield header, sorted(rows), SearchResult.load(folder)


@pytest.mark.slow
def test_search_in_parallel(folder, adapter, tmp_path, capsys):
    """In processes of this machine, and in those of a launcher: what one process finds, and one of them writes."""
    limits = ["--cost", "latency", "--max-macs", "98%", "--latency-of", "1x8", "--population", "4", "--evals", "9"]
    command = ["search", "--adapter", adapter, "--dataset", folder / "validation.jsonl", *limits, "--out"]
    assert run(*command, tmp_path / "one") == 0
    capsys.readouterr()
    # latencies are measured anew where there are none: begin with the same ones
    for name in ("workers", "ranks"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "one" / "latency.json", tmp_path / name)
    assert run(*command, tmp_path / "workers", "--workers", "2") == 0
    assert "Written:" in capsys.readouterr().out
    program = Path(sys.executable).parent / "peft-elastic"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--no-python",
        program,
    ]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in [*launch, *command, tmp_path / "ranks"]]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Written:") == done.stdout.count("validation examples") == 1
    one, workers, launched = histories(*(tmp_path / name for name in ("one", "workers", "ranks")))
    assert one == workers == launched and len(one[1]) == 9
    assert (tmp_path / "ranks" / "subnet.json").read_text() == (tmp_path / "one" / "subnet.json").read_text()


def test_options_of_a_search_in_parallel(folder, adapter, tmp_path, capsys, monkeypatch):
    command = ["search", "--adapter", adapter, "--dataset", folder / "validation.jsonl", "--out", tmp_path / "s"]
    assert run(*command, "--worker-threads", "2") == 2
    assert "`--worker-threads` goes with `--workers`" in capsys.readouterr().err
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert run(*command, "--workers", "2") == 2
    assert "`--workers` is for a run of one process" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_search_near_reference_points(folder, adapter, tmp_path):
    data = ["--dataset", folder / "validation.jsonl", "--samples", "8", "--evals", "6", "--population", "4"]
    points = ["--reference-point", "loss=0.5", "macs=5e4", "--reference-point", "loss=0.1", "macs=1e5"]
    command = ["search", "--adapter", adapter, *data, "--algorithm", "r-nsga2", *points, "--out", tmp_path / "s"]
    assert run(*command) == 0
    result = SearchResult.load(tmp_path / "s")
    assert result.settings["algorithm"] == "r-nsga2" and len(result.history) == 6
    assert result.settings["reference_points"] == [[0.5, 5e4], [0.1, 1e5]]
    assert run(*command, "--reference-point", "loss=0.2", "macs=1e5") == 2  # another search


def test_search_by_accuracy(folder, adapter, tmp_path):
    data = ["--dataset", folder / "validation.jsonl", "--samples", "8"]
    metric = ["--metric", "accuracy", "--cost", "parameters"]
    assert run("search", "--adapter", adapter, *data, *metric, "--evals", "4", "--out", tmp_path / "s") == 0
    assert SearchResult.load(tmp_path / "s").objectives == {"accuracy": "max", "parameters": "min"}


def test_search_of_plain_text(folder, adapter, tmp_path):
    """Without choices the loss of all tokens is the metric; parameters are the other objective if asked for."""
    (tmp_path / "text.txt").write_text("The plot is great.\nThe cast is awful.\n\n" * 8)
    data = ["--dataset", tmp_path / "text.txt", "--max-length", "16", "--batch-size", "2"]
    assert (
        run("search", "--adapter", adapter, *data, "--cost", "parameters", "--evals", "4", "--out", tmp_path / "s")
        == 0
    )
    result = SearchResult.load(tmp_path / "s")
    assert list(result.objectives.items()) == [("loss", "min"), ("parameters", "min")]
    assert all(math.isfinite(e.metrics["loss"]) for e in result.history)


# -- what is refused -----------------------------------------------------------------------------------------------


TRAIN_HERE = ["train", "--model", "{model}", "--dataset", "{train}", "--out", "{new}"]
PRUNE_HERE = ["prune", "--model", "{model}", "--dataset", "{train}", "--out", "{new}"]
SEARCH_HERE = ["search", "--adapter", "{adapter}", "--dataset", "{train}", "--out", "{new}"]

R_NSGA2 = [*SEARCH_HERE, "--algorithm", "r-nsga2", "--reference-point"]


@pytest.mark.parametrize(
    "command, message",
    [
        ([*TRAIN_HERE, "--elastic-width", "mlp"], "such as mlp=1.0,0.75"),
        ([*TRAIN_HERE, "--elastic-width", "layers=2"], "['heads', 'mlp']"),
        ([*TRAIN_HERE, "--elastic-width", "heads=4,3"], "which move in groups of 2"),
        ([*TRAIN_HERE, "--elastic-depth", "7"], "the blocks are 0 to 1"),
        ([*TRAIN_HERE, "--distillation", "max"], "`--strategy sandwich`"),
        ([*TRAIN_HERE, "--prompt-column", "nope"], "'nope' is not a column; there are 'prompt', 'label'"),
        ([*TRAIN_HERE, "--text-column", "prompt", "--label-column", "label"], "goes without"),
        ([*TRAIN_HERE, "--template", "{nope}"], "{prompt}, {label}"),
        ([*TRAIN_HERE, "--split", "test", "--dataset", "{disk}"], "not a split"),
        ([*TRAIN_HERE, "--dataset", "{odd}"], "There are 'colour', 'size'"),
        ([*TRAIN_HERE, "--dataset", "{broken}"], "cannot be read"),
        ([*TRAIN_HERE, "--dataset", "{empty}"], "is empty"),
        ([*TRAIN_HERE, "--dataset", "missing.jsonl"], "no such file"),
        ([*TRAIN_HERE, "--dataset", "./missing"], "no such file"),
        ([*TRAIN_HERE, "--dataset", "{model}/config.json", "--label-column", "nope"], "is not a column"),
        ([*TRAIN_HERE, "--dataset", "{model}/model.safetensors"], "files may end in"),
        ([*TRAIN_HERE, "--max-length", "3"], "`--max-length` 3"),
        ([*TRAIN_HERE, "--r", "8", "--ranks", "16", "8"], "Set r=16"),
        ([*TRAIN_HERE, "--ranks", "0"], "positive integers"),
        ([*TRAIN_HERE, "--groups", "nope"], "'nope'"),
        ([*TRAIN_HERE, "--targets", "nope"], "nope"),
        ([*TRAIN_HERE, "--model", "./missing"], "no such folder"),
        ([*TRAIN_HERE, "--model", "{disk}"], "no config.json"),
        ([*TRAIN_HERE, "--device", "nope"], "`--device` 'nope'"),
        ([*TRAIN_HERE, "--out", "{model}"], "exists already"),
        ([*TRAIN_HERE, "--resume"], "no checkpoint"),
        ([*SEARCH_HERE, "--max-macs", "few"], "`--max-macs` must be a number or a share"),
        ([*SEARCH_HERE, "--latency-of", "128"], "`--latency-of` must be sequences x tokens"),
        ([*PRUNE_HERE, "--sparsity", "1.5"], "[0, 1)"),
        ([*PRUNE_HERE], "sparsity"),
        ([*PRUNE_HERE, "--pattern", "2:7"], "7"),
        ([*PRUNE_HERE, "--sparsity", "0.5", "--method", "magnitude"], "looks at the weights alone"),
        ([*SEARCH_HERE, "--adapter", "./missing"], "no such folder"),
        ([*SEARCH_HERE, "--adapter", "{model}"], "no adapter_config.json"),
        ([*SEARCH_HERE, "--budget", "some"], "`--budget`"),
        ([*SEARCH_HERE, "--algorithm", "r-nsga2"], "needs `--reference-point`"),
        ([*SEARCH_HERE, "--reference-point", "loss=1", "macs=1"], "goes with `--algorithm r-nsga2`"),
        ([*R_NSGA2, "loss=1"], "`--reference-point` must be loss=NUMBER macs=NUMBER, got 'loss=1'"),
        ([*R_NSGA2, "loss=1", "macs=few"], "`--reference-point` must be loss=NUMBER macs=NUMBER"),
        ([*R_NSGA2, "loss=1", "bytes=1"], "`--reference-point` must be loss=NUMBER macs=NUMBER"),
        ([*R_NSGA2, "loss=nan", "macs=1"], "must be finite numbers"),
        ([*SEARCH_HERE, "--evals", "0"], "`n_evals`"),
        ([*SEARCH_HERE, "--metric", "accuracy", "--dataset", "{text}"], "needs labels of a few kinds"),
        (["merge", "--adapter", "{adapter}"], "nothing to do"),
        (["merge", "--adapter", "{adapter}", "--out", "{new}", "--subnet", "missing.json"], "missing.json"),
        (["merge", "--adapter", "{adapter}", "--out", "{new}", "--subnet", "{train}"], "not a subnet file"),
        (["merge", "--adapter", "{adapter}", "--export-lora", "{new}", "--sparse", "bf16"], "`--sparse` goes with"),
        (["bench", "--shapes", "4096"], "`--shapes` must be OUTxIN, such as 4096x11008, got '4096'"),
        (["bench", "--sparsity", "1.5"], "`--sparsity` must be a share from 0 to 1, got 1.5"),
        (["bench", "--model", "{model}", "--sparsity", "0.5", "0.7"], "takes one number"),
        (["bench", "--model", "./missing"], "no such folder"),
        (["quickstart", "--out", "{model}"], "exists already"),
        (["quickstart", "--smoke", "--dataset", "{train}", "--out", "{new}"], "--smoke"),
        (["quickstart", "--smoke", "--sparsity", "1", "--out", "{new}"], "sparsity"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(command, message, folder, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {name: tmp_path / name for name in ("new", "disk")}
    for name, text in (
        ("odd.csv", "colour,size\nred,3\n"),
        ("broken.json", '{"prompt": "a", "la'),
        ("empty.jsonl", ""),
        ("text.txt", "some words\nand more\n"),
    ):
        names[name.partition(".")[0]] = tmp_path / name
        (tmp_path / name).write_text(text)
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"]})).save_to_disk(tmp_path / "disk")
    names |= {"model": folder / "model", "adapter": adapter, "train": folder / "train.jsonl"}
    before = sorted([*tmp_path.rglob("*"), *folder.rglob("*")])
    capsys.readouterr()

    assert run(*(word if word == "{nope}" else word.format(**names) for word in command)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("peft-elastic: error: ") and message in error
    assert sorted([*tmp_path.rglob("*"), *folder.rglob("*")]) == before


@pytest.mark.parametrize("command", ["quickstart", "prune", "train", "search", "merge", "bench"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(command, "--help")
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "examples:" in text and text.count(f"peft-elastic {command}") >= 3


# -- data ----------------------------------------------------------------------------------------------------------


RECORDS = [{"question": "one?", "answer": "yes"}, {"question": "two?", "answer": "maybe"}]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d"])
def test_formats(name, tmp_path):
    path = tmp_path / name
    table = datasets.Dataset.from_list(RECORDS)
    if name == "d":
        table.save_to_disk(path)
    elif name == "d.json":
        path.write_text(json.dumps(RECORDS))
    elif name == "d.jsonl":
        table.to_json(path)
    else:
        table.to_csv(path, sep="\t" if name == "d.tsv" else ",")
    examples = _data.to_examples(_data.load_records(str(path)))
    assert examples == [Example("one?", " yes"), Example("two?", " maybe")]


def read(columns, features=None, **options):
    return _data.to_examples(datasets.Dataset.from_dict(columns, features=features), **options)


def test_plain_text(tmp_path):
    (tmp_path / "d.txt").write_text("first line\n\nsecond\n")
    records = _data.load_records(str(tmp_path / "d.txt"))
    assert [e.text for e in _data.to_examples(records)] == ["first line", "second"]
    assert [e.text for e in read({"text": ["a"], "other": ["b"]})] == ["a"]
    assert [e.text for e in read({"x": ["a"], "prompt": ["b"]}, text_column="x")] == ["a"]


def test_labels_become_words():
    classes = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    columns = {"text": ["a", "b"], "label": [1, 0]}
    both = (" bad", " good")
    expected = [Example("a", " good", both), Example("b", " bad", both)]
    assert read(columns, classes) == expected
    assert read(columns, label_names=["bad", "good"]) == expected
    # multiple choice, each question with its own
    columns = {"question": ["a", "b"], "choices": [["x", "y"], ["z", "w", "v"]], "label": [1, 2]}
    assert read(columns) == [Example("a", " y", (" x", " y")), Example("b", " v", (" z", " w", " v"))]
    # answers that come again and again are classes, others are not
    assert read({"prompt": list("abcd"), "label": ["no", "yes", "no", "no"]})[0].choices == (" no", " yes")
    assert read({"prompt": list("abcd"), "label": list("wxyz")})[0].choices == ()
    with pytest.raises(ValueError, match="record 1 must be from 0 to 1"):
        read({"text": ["a", "b"], "label": [1, 2]}, label_names=["bad", "good"])
    with pytest.raises(ValueError, match="record 0 must be text or a number, got None"):
        read({"prompt": ["a", "b"], "label": [None, "x"]})


def test_template():
    columns = {"title": ["T"], "text": ["x"], "label": ["good"]}
    (example,) = read(columns, template="{title}: {}\\nSentiment: ")
    assert example.prompt == "T: x\nSentiment: " and example.completion == "good"


prompts = st.text(st.sampled_from("ab .!A"), max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(prompts, min_size=1, max_size=40), st.integers(0, 9), st.integers(0, 9), st.integers(0, 3))
def test_splits_do_not_leak(texts, test, validation, seed):
    """No prompt is on two sides, however it is spelled; sizes are as asked for; the order of the data changes nothing."""
    examples = [Example(text, str(number)) for number, text in enumerate(texts)]
    sizes = {"test": test, "validation": validation}

    def spelling(example):
        return tuple(example.prompt.lower().replace("!", " ").replace(".", " ").split())

    distinct = len(set(map(spelling, examples)))
    try:
        splits = split_examples(examples, sizes, seed)
    except ValueError as error:
        assert "more for training" in str(error) and distinct <= test + validation
        return
    assert {name: len(splits[name]) for name in sizes} == sizes and splits["train"]
    sides = [{spelling(example) for example in part} for part in splits.values()]
    assert sum(map(len, sides)) == len(set.union(*sides))
    assert len({id(e) for part in splits.values() for e in part}) == sum(map(len, splits.values()))
    turned = split_examples(examples[::-1], sizes, seed)
    assert [{spelling(e) for e in part} for part in turned.values()] == sides


def test_labels_are_on_the_completion(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    examples = [
        Example("The plot:", " great"),
        Example("The plot:", " great", (" great", " dull")),
        Example("The plot is much too long:", " dull"),
    ]
    features = encode(tokenizer, examples, max_length=12)
    targets = [[token for token in feature["labels"] if token != -100] for feature in features]
    assert [tokenizer.decode(target) for target in targets] == [" great<end>", " great"]  # the third is too long
    for feature, example in zip(features, examples):
        assert tokenizer.decode(feature["input_ids"]).removesuffix("<end>") == example.text


def test_packing(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = ["The plot is great.", "The cast", "is awful"]
    pieces = pack(tokenizer, texts, 5)
    whole = "<end>".join(texts) + "<end>"
    assert len(pieces) >= 2 and all(len(piece) == 5 for piece in pieces)
    assert whole.startswith(tokenizer.decode([token for piece in pieces for token in piece]))
    assert pack(tokenizer, texts, 5, limit=1) == pieces[:1]
    assert [tokenizer.decode(piece) for piece in pack(tokenizer, texts, 999)] == [whole]


def test_leaving_out_logits_does_not_change_the_loss(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    examples = [
        Example("The plot is:", " great"),
        Example("And the cast", " is dull"),
    ]
    collator = Collator(model)
    features = encode(tokenizer, examples, max_length=64)
    batch = collator(features)
    assert batch["labels"].shape[1] == len(batch["logits_to_keep"]) < batch["input_ids"].shape[1]
    collator.trims = False
    full = collator(features)
    assert "logits_to_keep" not in full and full["labels"].shape == full["input_ids"].shape
    torch.testing.assert_close(model(**batch).loss, model(**full).loss)


def test_choice_evaluator(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    examples = smoke_examples()[::50]
    correct, loss = _evaluation.ChoiceEvaluator(examples, tokenizer).per_example(model)
    for example, right, value in zip(examples, correct, loss):
        log_likelihoods = []
        for choice in example.choices:
            ids = tokenizer(example.prompt + choice, return_tensors="pt")["input_ids"]
            start = len(tokenizer(example.prompt)["input_ids"])
            with torch.no_grad():
                log_probs = model(ids).logits[0].log_softmax(-1)
            log_likelihoods.append(sum(log_probs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])))
        index = example.choices.index(example.completion)
        expected = -torch.tensor(log_likelihoods).log_softmax(0)[index].item()
        assert value == pytest.approx(expected, abs=1e-4)
        assert right == (log_likelihoods[index] == max(log_likelihoods))


def test_paths_are_shown_as_given(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["prune", "--model", folder / "model", "--method", "magnitude", "--sparsity", "0.5", "--out", "a b"]
    assert run(*command) == 0
    assert "--model 'a b'" in capsys.readouterr().out and Path("a b/config.json").is_file()
