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

"""SIGKILL at random points of everything that writes: the same command, started again, comes to the result of one that was never
interrupted, what can be loaded is the old or the new, and nothing is left behind."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from support import folders
from support.killing import random_deaths
from support.models import tiny_llama
from transformers import AutoModelForCausalLM, set_seed

from peft_elastic import (
    ElasticLoraConfig,
    MultiPrunerConfig,
    PruningPlan,
    RTNConfig,
    SearchResult,
    WandaConfig,
    load_gptq,
    prune_folder,
    prune_structured,
    quantize,
    save_gptq,
    search_subnet,
    sparsify_linears,
)
from peft_elastic.cli._training import fit
from peft_elastic.cli.main import main
from peft_elastic.cli.quickstart import smoke
from peft_elastic.layers import extension


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(os, "fork") or sys.platform == "darwin", reason="forks a process that has used torch"
    ),
    pytest.mark.filterwarnings("ignore"),
]
IDS = torch.arange(3, 11)[None]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    yield
    torch.set_num_threads(before)


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if not p.is_dir())


def leftovers(folder):
    """Names of what is ours and no result. `.tmp*` is what safetensors writes a file to, beside its place."""
    return [name for name in files(folder) if ".partial" in name or "/.tmp" in f"/{name}"]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def dense(seed, zeros=0.5):
    model = tiny_llama(num_hidden_layers=3)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight *= torch.rand_like(layer.weight) > zeros
    return model


def adapted(seed=0, subnet="max"):
    base = dense(0)
    torch.manual_seed(seed)
    config = ElasticLoraConfig(r=4, elastic_ranks=[4, 2], target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config)
    model.set_subnet(subnet)
    return model


# --- work that is continued ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_folders(name, tmp_path):
    model = folders.MODELS[name]()
    source, data = folders.saved(model, tmp_path / "model"), folders.batches(model)

    out, journal = tmp_path / "out", tmp_path / "out" / ".peft_elastic_run.jsonl"

    def work():
        if (out / "config.json").exists() and not journal.exists():  # whole; the next run has to be a new one
            out.rename(tmp_path / f"whole{time.monotonic_ns()}")
        prune_folder(source, out, WandaConfig(sparsity=0.5), data, progress=False)

    work()
    expected = folders.contents(out)
    for point in random_deaths(work, seed=len(name), points=30):
        if (out / "config.json").exists():
            assert folders.same(folders.tensors(out), folders.tensors_in(expected)), point
    assert folders.contents(out) == expected
    assert all(folders.contents(whole) == expected for whole in tmp_path.glob("whole*"))


def test_search(tmp_path):
    model = adapted()

    def work():
        def evaluate(model):
            return float(logits(model).mean())

        search_subnet(model, evaluate, n_evals=24, save_dir=tmp_path / "out", progress=False)

    expected = None
    for point in random_deaths(work, 0):
        if expected is None:  # nothing has run here before but the one that was counted
            expected = SearchResult.load(tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
            continue
        if not point:
            assert SearchResult.load(tmp_path / "out") == expected
            assert files(tmp_path / "out") == ["history.jsonl", "search_result.json"]


def test_structured_pruning(tmp_path):
    model, batches = dense(0), [torch.arange(64).view(2, 32)]

    def work():
        config = MultiPrunerConfig(ratio=0.3, mlp_group=4)
        prune_structured(model, config, batches, save_dir=tmp_path, extract=False, progress=False).save(
            tmp_path / "plan.json"
        )

    expected = None
    for point in random_deaths(work, 1):
        if expected is None:
            expected = PruningPlan.load(tmp_path / "plan.json")
            shutil.rmtree(tmp_path)
            continue
        if not point:
            found = PruningPlan.load(tmp_path / "plan.json")
            assert (found.values, found.units, found.after) == (expected.values, expected.units, expected.after)
            assert [row["removed"] for row in found.history] == [row["removed"] for row in expected.history]
            assert len(files(tmp_path)) == 3 and not leftovers(tmp_path)


def test_training(tmp_path):
    set_seed(0)
    features = [{"input_ids": torch.randint(3, 90, (12,)).tolist()} for _ in range(32)]
    features = [{**row, "labels": row["input_ids"]} for row in features]
    base = adapted()

    def work():
        set_seed(0)
        fit(
            base,
            features,
            tmp_path / "checkpoints",
            strategy="uniform",
            seed=0,
            max_steps=12,
            save_steps=2,
            per_device_train_batch_size=4,
            disable_tqdm=True,
        )
        base.save_pretrained(tmp_path / "adapter")

    expected = None
    for point in random_deaths(work, 2):
        if expected is None:
            expected = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
            shutil.rmtree(tmp_path)
            continue
        if not point:
            assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == expected


# --- one model over another -------------------------------------------------------------------------------------------


def over_another(tmp_path, save, load, old, new, seed, others=()):
    """Saves `new` over `old` with a death at each point: what then loads computes what one of the two does."""
    folder = tmp_path / "m"
    results = []
    for model in (old, new):
        save(model, folder)
        results.append(load(folder))
        shutil.rmtree(folder)
    assert not torch.equal(*results)
    outcomes = {"old": 0, "new": 0, "refused": 0}

    def work():
        save(new, folder)

    def start():
        shutil.rmtree(folder, ignore_errors=True)
        save(old, folder)

    start()
    first = True
    for point in random_deaths(work, seed):
        if not first and point:
            try:
                found = load(folder)
            except (ValueError, OSError, SafetensorError):
                outcomes["refused"] += 1
            else:
                equal = [torch.equal(found, result) for result in results]
                assert any(equal), point
                outcomes["old" if equal[0] else "new"] += 1
        save(new, folder)  # the same again, after every death
        assert torch.equal(load(folder), results[1])
        assert not set(leftovers(folder)) - {name for name in files(folder) if name.startswith(".tmp") and others}, (
            point
        )
        first = False
        start()
    print(outcomes)
    return outcomes


@pytest.mark.skipif(not extension.is_built(), reason="needs the C++ extension")
@pytest.mark.parametrize("shards", ["50GB", "40KB"])
def test_save_pretrained_of_a_sparse_model(shards, tmp_path):
    def sparse(seed):
        model = dense(seed)
        sparsify_linears(model, when="always")
        return model

    over_another(
        tmp_path,
        lambda model, folder: model.save_pretrained(folder, max_shard_size=shards),
        lambda folder: logits(AutoModelForCausalLM.from_pretrained(folder)),
        sparse(1),
        sparse(2),
        3,
        others=[".tmp"],  # safetensors writes them in the folder of transformers
    )


def test_save_pretrained_of_an_adapter(tmp_path):
    over_another(
        tmp_path,
        lambda model, folder: model.save_pretrained(folder),
        lambda folder: logits(PeftModel.from_pretrained(dense(0), folder)),
        adapted(1, "max"),
        adapted(2, "min"),
        4,
        others=[".tmp"],
    )


def test_export_lora(tmp_path):
    over_another(
        tmp_path,
        lambda model, folder: model.export_lora(folder),
        lambda folder: logits(PeftModel.from_pretrained(dense(0), folder)),
        adapted(1, "max"),
        adapted(2, "min"),
        7,
    )


def test_save_gptq(tmp_path):
    models = dense(1), dense(2)
    for model, symmetric in zip(models, (True, False)):
        quantize(model, RTNConfig(bits=4, group_size=16, symmetric=symmetric), progress=False)
    over_another(tmp_path, lambda m, folder: save_gptq(m, folder), lambda f: logits(load_gptq(f)), *models, 5)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    examples = smoke.smoke_examples()
    model, tokenizer = smoke.smoke_model(examples)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    rows = [{"prompt": example.prompt, "completion": example.completion} for example in examples]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    config = ElasticLoraConfig(
        r=4, elastic_ranks=[4, 2], target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "model"), config)
    adapter.save_pretrained(root / "adapter")
    return root


COMMANDS = {
    "quantize": ["quantize", "--model", "{model}", "--method", "rtn", "--group-size", "32", "--out", "out"],
    "merge": ["merge", "--model", "{model}", "--adapter", "{adapter}", "--out", "out", "--export-lora", "lora"],
    "prune": ["prune", "--model", "{model}", "--method", "magnitude", "--sparsity", "0.5", "--out", "out"],
    "structured": [
        "prune",
        "--model",
        "{model}",
        "--structured",
        "--ratio",
        "0.1",
        "--dataset",
        "{data}",
        "--samples",
        "4",
    ]
    + ["--max-length", "32", "--out", "out"],
    "search": [
        "search",
        "--model",
        "{model}",
        "--adapter",
        "{adapter}",
        "--dataset",
        "{data}",
        "--samples",
        "8",
        "--evals",
    ]
    + ["6", "--out", "out", "--select"],
}
VOLATILE = ("seconds", "time", "block_passes")


def content(folder):
    """What is in the files, without times, and without the pictures, which have them drawn in."""
    found = {}
    for name in files(folder):
        raw = (folder / name).read_bytes()
        if name.endswith((".json", ".jsonl")):
            rows = [json.loads(line) for line in raw.splitlines()] if name.endswith("l") else json.loads(raw)
            found[name] = without_times(rows)
        elif not name.endswith(".png"):
            found[name] = raw
    return found


def without_times(data):
    if isinstance(data, dict):
        if isinstance(names := data.get("target_modules"), list):  # a set of peft's, in any order
            data = data | {"target_modules": sorted(names)}
        return {k: without_times(v) for k, v in data.items() if k not in VOLATILE}
    return [without_times(value) for value in data] if isinstance(data, list) else data


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name, inputs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs / "adapter", tmp_path / "adapter")
    places = {"model": inputs / "model", "data": inputs / "data.jsonl", "adapter": "adapter"}
    command = [word.format(**places) for word in COMMANDS[name]]

    def work():
        status = main(command)
        assert status == 0 or "exists already" in capfd.readouterr().err, status

    def start():
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
        shutil.copytree(inputs / "adapter", tmp_path / "adapter")

    expected, first = None, True
    for point in random_deaths(work, 6):
        if first:  # the first point is one of a second run over a finished one
            start()
            work()
            expected = content(tmp_path)
            assert len(expected) > 4
        if point:
            for folder in ("out", "lora"):  # what is there is whole, but for a search, which is continued
                if (tmp_path / folder).exists() and name != "search":
                    there = {n: value for n, value in content(tmp_path).items() if n.startswith(f"{folder}/")}
                    assert there == {n: v for n, v in expected.items() if n.startswith(f"{folder}/")}, point
        try:
            work()
        finally:
            capfd.readouterr()
        if not (name == "merge" and (tmp_path / "out").exists() != (tmp_path / "lora").exists()):
            assert content(tmp_path) == expected, point
            assert not leftovers(tmp_path), point
        first = False
        start()
