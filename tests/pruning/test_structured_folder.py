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
"""Structured pruning from folder to folder: what is written is what `extract` and `save_pretrained` write, plans of folders are those
of the model in memory, interrupted runs go on; and the search on models that accelerate has offloaded."""

import json
import math
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import folders
from support.fresh import run_fresh
from support.full_disk import limit
from support.models import tiny_bert, tiny_gpt_neox, tiny_llama, tiny_phi3

from peft_elastic import (
    BlockPrunerConfig,
    MultiPrunerConfig,
    PruningPlan,
    WidthPrunerConfig,
    extract_folder,
    importance_of_folder,
    plan_folder,
    prune_structured,
    sort_folder,
)
from peft_elastic.common.safetensors_files import ShardFile
from peft_elastic.common.writing import WriteError
from peft_elastic.pruning.structured.plan import describe_model
from peft_elastic.structure.blocks import Structure
from peft_elastic.structure.folder_run import FolderRun
from peft_elastic.structure.residence import StoredResidence
from peft_elastic.structure.stored_model import StoredModel


MODELS = {
    **{name: folders.MODELS[name] for name in ("llama", "gpt2", "mixtral", "t5", "gemma3", "opt")},
    "bert": tiny_bert,
    "phi3": tiny_phi3,
    "gpt_neox": tiny_gpt_neox,
}
# what is left of each model: blocks of different sizes with units from anywhere; blocks that are alike; parts and blocks that are gone
CASES = [
    ("llama", {"mlp:model.layers.0": 31, "heads:model.layers.1": 2, "mlp:model.layers.1": 7}),
    ("llama", {f"{kind}:model.layers.{i}": n for kind, n in (("heads", 2), ("mlp", 40)) for i in range(2)}),
    ("llama", {"depth:model.layers.0": 0, "heads:model.layers.1": 2}),
    ("llama", {"depth:model.layers.0.attention": 0, "depth:model.layers.1.mlp": 0, "mlp:model.layers.0": 9}),
    ("llama", {"mlp:model.layers.0": 48}),  # nothing is removed, and the units are put into another order
    ("gpt2", {"heads:transformer.h.0": 1, "mlp:transformer.h.0": 100, "heads:transformer.h.1": 3}),
    ("gpt2", {"depth:transformer.h.0": 0}),
    ("bert", {"heads:bert.encoder.layer.0": 3, "mlp:bert.encoder.layer.0": 17, "depth:bert.encoder.layer.1.mlp": 0}),
    ("mixtral", {"depth:model.layers.0": 0}),
    ("mixtral", {"heads:model.layers.1": 2}),
    ("t5", {"heads:encoder.block": 2, "mlp:decoder.block.0": 5, "depth:decoder.block.1": 0}),
    ("gemma3", {"depth:model.layers.1": 0, "heads:model.layers.2": 2, "mlp:model.layers.0": 20}),
    ("opt", {"depth:model.decoder.layers.0.mlp": 0, "heads:model.decoder.layers.2": 3}),
    ("phi3", {"mlp:model.layers.0": 20, "heads:model.layers.1": 2}),
    ("gpt_neox", {"heads:gpt_neox.layers.0": 3, "depth:gpt_neox.layers.1.attention": 0}),
]


class Stop(Exception):
    pass


def whole(source, **kwargs):
    """The model in a folder, in memory."""
    return type(StoredModel(source).model).from_pretrained(source, **{"dtype": "auto", **kwargs})


def plan_of(model, values, seed=0):
    """A plan that leaves these values, of units that are chosen by lot."""
    generator = torch.Generator().manual_seed(seed)
    structure = Structure(model)
    units = {
        order.name: torch.randperm(width.units, generator=generator)[: values[width.key] // width.unit].tolist()
        for width in structure.widths
        if width.key in values
        for order in width.orders
    }
    return PruningPlan("by hand", {}, describe_model(model, structure), values, units, {}, {})


def extracted(source, plan, output, **kwargs):
    """What the plan leaves of the model in memory, saved."""
    model = whole(source, **kwargs)
    plan.extract(model)
    model.save_pretrained(output)
    return model


# --- the same bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "values"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_bits_are_those_of_memory(name, values, tmp_path):
    model = MODELS[name]()
    source = folders.saved(model, tmp_path / "model", torch.bfloat16 if name != "bert" else torch.float32)
    (source / "tokenizer.json").write_text("{}")
    before = folders.contents(source)
    plan = PruningPlan.from_json(plan_of(whole(source), values).to_json())
    small = extracted(source, plan, tmp_path / "expected")

    extract_folder(source, tmp_path / "out", plan, progress=False)
    found, expected = (folders.tensors(tmp_path / folder) for folder in ("out", "expected"))
    assert folders.same(found, expected)
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "expected/config.json").read_text()
    data = folders.batches(model)[0]
    again = whole(tmp_path / "out")
    assert folders.same(again.state_dict(), small.state_dict())
    assert torch.equal(again(**data)[0], small(**data)[0])
    index = folders.index(tmp_path / "out")
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_parameters"] == small.num_parameters()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert set(index["weight_map"].values()) == set(files)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert folders.contents(source) == before
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_single_file_and_another_dtype(tmp_path):
    source = folders.saved(tiny_llama(), tmp_path / "model", torch.float32, "1GB")
    plan = plan_of(whole(source), {"mlp:model.layers.0": 11})
    small = extracted(source, plan, tmp_path / "expected", dtype=torch.bfloat16)
    extract_folder(source, tmp_path / "out", plan, dtype="bfloat16", progress=False)
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert folders.same(folders.tensors(tmp_path / "out"), small.state_dict())
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "expected/config.json").read_text()


def test_an_empty_plan_and_a_folder_that_was_pruned_before(tmp_path):
    source = folders.saved(tiny_llama(num_hidden_layers=3), tmp_path / "model")
    extract_folder(source, tmp_path / "same", plan_of(whole(source), {}), progress=False)
    assert folders.same(folders.tensors(source), folders.tensors(tmp_path / "same"))
    plan = plan_of(whole(source), {"depth:model.layers.1": 0, "mlp:model.layers.2": 20})
    extract_folder(source, tmp_path / "once", plan, progress=False)
    second = plan_of(whole(tmp_path / "once"), {"mlp:model.layers.1": 8, "depth:model.layers.0.attention": 0})
    small = extracted(tmp_path / "once", second, tmp_path / "expected")
    extract_folder(tmp_path / "once", tmp_path / "twice", second, progress=False)
    assert folders.same(folders.tensors(tmp_path / "twice"), folders.tensors(tmp_path / "expected"))
    assert folders.same(whole(tmp_path / "twice").state_dict(), small.state_dict())


def test_it_loads_in_a_fresh_process(tmp_path):
    source = folders.saved(tiny_llama(), tmp_path / "model", torch.float32)
    plan = plan_of(whole(source), {"mlp:model.layers.0": 31, "heads:model.layers.1": 2})
    small = extracted(source, plan, tmp_path / "expected")
    extract_folder(source, tmp_path / "out", plan, progress=False)
    code = f"""
import peft_elastic, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({os.fspath(tmp_path / "out")!r}, dtype="auto")
torch.save(model(torch.arange(3, 10)[None]).logits.detach(), {os.fspath(tmp_path / "logits")!r})
"""
    run_fresh(code)
    assert torch.equal(torch.load(tmp_path / "logits"), small(torch.arange(3, 10)[None]).logits)


def test_nothing_but_the_tensors_that_are_written_is_read(tmp_path, monkeypatch):
    """One after the other, and none of what is removed."""
    source = folders.saved(tiny_llama(num_hidden_layers=3), tmp_path / "model")
    plan = plan_of(whole(source), {"depth:model.layers.1": 0, "mlp:model.layers.2": 20})
    read, brought = [], []
    real = StoredModel.read
    monkeypatch.setattr(StoredModel, "read", lambda self, names: (read.append(list(names)), real(self, read[-1]))[1])
    monkeypatch.setattr(StoredResidence, "_bring", lambda self, part: brought.append(part))
    extract_folder(source, tmp_path / "out", plan, progress=False)
    names = [f"model.layers.2.mlp.{layer}.weight" for layer in ("gate_proj", "up_proj", "down_proj")]
    assert sorted(read) == sorted([name] for name in names) and not brought


# --- plans of folders ----------------------------------------------------------------------------------------------------


PLANS = [
    ("llama", WidthPrunerConfig(ratio=0.12, choose="score", mlp_group=5)),
    (
        "llama",
        WidthPrunerConfig(ratio=0.1, choose=("score", "uniform"), split=(60, 40), measure="macs", width_samples=3),
    ),
    ("gpt2", WidthPrunerConfig(ratio=0.2, choose="uniform", order="magnitude")),
    ("gpt2", MultiPrunerConfig(ratio=0.2, choose="random", order="none", mlp_group=7, split=(60, 30, 10), seed=3)),
    ("t5", WidthPrunerConfig(ratio=0.1, choose="score", mlp_group=4)),
    ("llama", WidthPrunerConfig(ratio=0)),
]


@pytest.mark.parametrize(("name", "config"), PLANS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(PLANS)])
def test_plans_are_those_of_memory(name, config, tmp_path):
    model = MODELS[name]()
    data = folders.batches(model)
    source = folders.saved(model, tmp_path / "model")
    expected = prune_structured(whole(source), config, data, extract=False, progress=False)
    plan = plan_folder(source, config, data, progress=False)
    assert config.ratio == 0 or plan.values
    for field in ("method", "values", "units", "config", "model"):
        assert getattr(plan, field) == getattr(expected, field), field
    assert [{**row, "seconds": 0} for row in plan.history] == [{**row, "seconds": 0} for row in expected.history]
    assert plan.after["parameters"] == expected.after["parameters"] and plan.evaluations == 0
    assert "removed" in str(plan) or "left" in str(plan) or config.ratio == 0
    extracted(source, expected, tmp_path / "expected")
    extract_folder(source, tmp_path / "out", plan, progress=False)
    assert folders.same(folders.tensors(tmp_path / "out"), folders.tensors(tmp_path / "expected"))


def test_own_scores(tmp_path):
    source = folders.saved(tiny_llama(), tmp_path / "model")
    config = WidthPrunerConfig(
        ratio=0.2, choose="score", order=importance_of_folder(source, "magnitude", progress=False)
    )
    plan = plan_folder(source, config, progress=False)
    assert plan.values and plan.config["order"] == "scores"
    assert plan.units == plan_folder(source, replace(config, order="magnitude"), progress=False).units
    # what comes first in a sorted folder is what is kept
    sort_folder(source, tmp_path / "sorted", "magnitude", progress=False)
    first = plan_folder(tmp_path / "sorted", replace(config, order="none", choose="uniform"), progress=False)
    assert all(kept == list(range(len(kept))) for kept in first.units.values()) and first.units


def test_configs_that_need_the_whole_model_are_refused(tmp_path, monkeypatch):
    source = folders.saved(tiny_llama(), tmp_path / "model")
    data = folders.batches(tiny_llama())
    score = WidthPrunerConfig(choose="score", mlp_group=8)
    for config, message in [
        (MultiPrunerConfig(), "`choose` must be 'score', 'uniform' or 'random' for a model in a folder"),
        (replace(score, order="gradient"), "`order` must be 'activation', 'magnitude'.*got 'gradient'"),
        (replace(score, order="l1"), "`order` must be .*got 'l1'"),
        (replace(score, measure="latency"), "`measure` must be 'parameters' or 'macs'"),
        (replace(score, measure="bytes"), "`measure` must be 'parameters' or 'macs'"),
        ("width", "`config` must be a `WidthPrunerConfig`"),
    ]:
        with pytest.raises(ValueError, match=message):
            plan_folder(source, config, data)
    with pytest.raises(ValueError, match="`calibration` must be an iterable of batches"):
        plan_folder(source, score)
    # what cannot be reached is refused before the importance is measured
    monkeypatch.setattr(StoredResidence, "_bring", None)
    with pytest.raises(ValueError, match="`ratio` must be at most"):
        plan_folder(source, replace(score, ratio=0.95), data)


# --- what is refused, and interruptions ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return folders.saved(tiny_llama(num_hidden_layers=3), tmp_path_factory.mktemp("llama") / "model", shard="25KB")


@pytest.fixture(scope="module")
def plan(llama):
    values = {"mlp:model.layers.0": 31, "heads:model.layers.1": 2, "depth:model.layers.2.attention": 0}
    return plan_of(whole(llama), values)


@pytest.fixture(scope="module")
def smaller(llama, plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("smaller") / "out"
    extract_folder(llama, out, plan, progress=False)
    return out


def test_bad_arguments_are_refused_before_anything_is_made(llama, plan, tmp_path):
    for other, message in [
        ("plan.json", "`plan` must be a `PruningPlan`"),
        (
            replace(plan, values={**plan.values, "mlp:model.layers.7": 3}),
            "'mlp:model.layers.7' is no part of the model",
        ),
        (replace(plan, units={"model.layers.0": [0, 0]}), "units: 'model.layers.0' must have 31 different numbers"),
        (
            replace(plan, values={f"depth:model.layers.{i}": 0 for i in range(3)}, units={}),
            "every block of 'model.layers'",
        ),
        (plan_of(tiny_llama(), {"mlp:model.layers.0": 3}), "model: the plan is for a LlamaForCausalLM in which"),
    ]:
        with pytest.raises(ValueError, match=message):
            extract_folder(llama, tmp_path / "out", other)
    with pytest.raises(ValueError, match="is the folder of the model itself"):
        extract_folder(llama, llama, plan)
    with pytest.raises(ValueError, match="`dtype` must be"):
        extract_folder(llama, tmp_path / "out", plan, dtype="int4")
    copy = tmp_path / "model"
    shutil.copytree(llama, copy)
    file = sorted(copy.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name} is missing in"):
        extract_folder(copy, tmp_path / "out", plan)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_run_goes_on(done, llama, plan, smaller, tmp_path, monkeypatch):
    sync = ShardFile.sync
    calls = []

    def stops(self):
        calls.append(1)
        if len(calls) > done:
            raise Stop
        sync(self)

    monkeypatch.setattr(ShardFile, "sync", stops)
    with pytest.raises(Stop):
        extract_folder(llama, tmp_path / "out", plan, progress=False)
    monkeypatch.undo()
    files = sorted((tmp_path / "out").glob("model*.safetensors"))
    assert len(files) == done and not (tmp_path / "out" / "config.json").exists()
    before = folders.contents(tmp_path / "out")
    with pytest.raises(ValueError, match="output` holds another extraction .*plan is"):
        extract_folder(llama, tmp_path / "out", replace(plan, units={}), progress=False)
    assert folders.contents(tmp_path / "out") == before
    times = [file.stat().st_mtime_ns for file in files]
    extract_folder(llama, tmp_path / "out", plan, progress=False)
    assert [file.stat().st_mtime_ns for file in files] == times  # what was written is not written again
    assert folders.contents(tmp_path / "out") == folders.contents(smaller)
    with pytest.raises(ValueError, match="exists already"):
        extract_folder(llama, tmp_path / "out", plan, progress=False)


def test_a_full_disk(llama, plan, smaller, tmp_path, monkeypatch):
    with limit(10_000), pytest.raises(WriteError, match="cannot write .*out.*partial': File too large; "):
        extract_folder(llama, tmp_path / "out", plan, progress=False)
    complete = FolderRun._complete

    def full(self, *args):
        with limit(10):
            complete(self, *args)

    monkeypatch.setattr(FolderRun, "_complete", full)
    with pytest.raises(WriteError, match="cannot write .*out.*': File too large; "):
        extract_folder(llama, tmp_path / "out", plan, progress=False)
    monkeypatch.undo()
    assert not (tmp_path / "out" / "config.json").exists()
    extract_folder(llama, tmp_path / "out", plan, progress=False)
    assert folders.contents(tmp_path / "out") == folders.contents(smaller)


def test_the_disk_needs_room_for_what_is_left_alone(llama, plan, smaller, tmp_path, monkeypatch):
    size = sum(path.stat().st_size for path in smaller.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(ValueError, match="`output` .* free space, and .* GB more are needed"):
        extract_folder(llama, tmp_path / "out", plan, progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    extract_folder(llama, tmp_path / "out", plan, progress=False)
    assert folders.contents(tmp_path / "out") == folders.contents(smaller)


# --- models that accelerate has offloaded --------------------------------------------------------------------------------


def offloaded(kind, source, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = whole(source)
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path / "offload", execution_device="cpu")
    return model


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_whole_parts_of_offloaded_models(kind, llama, tmp_path):
    """The search gives the plan of the model in memory, `save_dir` too, and the plan is carried out from folder to folder."""
    data = folders.batches(tiny_llama())
    config = BlockPrunerConfig(ratio=0.3)
    model = offloaded(kind, llama, tmp_path)
    options = {"extract": False, "progress": False, "save_dir": tmp_path / "evaluations"}
    plan = prune_structured(model, config, data, **options)
    full = whole(llama)
    expected = prune_structured(full, config, data, **options)  # the evaluations are taken for those of this model
    assert plan.values == expected.values and len(plan.values) > 1
    assert plan.evaluations == expected.evaluations and plan.seconds == pytest.approx(expected.seconds, abs=1e-3)
    assert math.isfinite(plan.after["perplexity"])
    plan.narrow(model)
    logits = model(**data[0]).logits
    plan.restore(model)
    with pytest.raises(ValueError, match="accelerate keeps the weight of .*`extract_folder`"):
        plan.extract(model)
    assert torch.equal(logits, plan.extract(full)(**data[0]).logits)
    extract_folder(llama, tmp_path / "out", plan, progress=False)
    assert folders.same(whole(tmp_path / "out").state_dict(), full.state_dict())


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_the_rest_is_refused_by_name(kind, llama, tmp_path):
    data = folders.batches(tiny_llama())
    model = offloaded(kind, llama, tmp_path)
    for config in (
        MultiPrunerConfig(ratio=0.2, mlp_group=8),
        WidthPrunerConfig(ratio=0.2, choose="uniform", order="none"),
    ):
        with pytest.raises(
            ValueError, match="accelerate keeps the weight of model.layers.0.*cannot be narrowed.*plan_folder"
        ):
            prune_structured(model, config, data, extract=False, progress=False)
    with pytest.raises(ValueError, match="accelerate keeps the weight of .*`extract=False`.*extract_folder"):
        prune_structured(model, BlockPrunerConfig(ratio=0.3), data, progress=False)


def test_an_empty_tensor_stands_for_what_is_removed(smaller):
    """Where this package is not imported, loading fails instead of making weights up."""
    config = json.loads((smaller / "config.json").read_text())
    assert config["peft_elastic_blocks"]["model.layers.2"]["skip"] == ["attention"]
    assert folders.tensors(smaller)["model.layers.2.self_attn.q_proj.weight"].shape == (0,)
