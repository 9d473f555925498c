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
"""Pruning of a folder block by block: the same bits as in memory, never more than two blocks there, and what goes wrong on the way."""

import json
import os
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import folders
from support.full_disk import limit
from support.models import tiny_llama

from peft_elastic import (
    MagnitudeConfig,
    RTNConfig,
    SparseGPTConfig,
    WandaConfig,
    prune,
    prune_folder,
    quantize,
    sort_by_importance,
)
from peft_elastic.common.safetensors_files import write_alone
from peft_elastic.common.writing import WriteError
from peft_elastic.structure import sequential
from peft_elastic.structure.calibration import calibration_mode
from peft_elastic.structure.folder_run import FolderRun
from peft_elastic.structure.modules import find_stacks
from peft_elastic.structure.selection import select_layers
from peft_elastic.structure.sequential import BlockWalker


WANDA = WandaConfig(sparsity=0.5)
CASES = [
    ("llama", WANDA, torch.bfloat16),
    ("llama", SparseGPTConfig(pattern="2:4"), torch.float32),
    ("llama", MagnitudeConfig(sparsity=0.5, target_modules=["lm_head", "down_proj"]), torch.bfloat16),
    ("gpt2", WandaConfig(sparsity=0.3, exclude_modules=["c_fc"]), torch.float32),
    ("mixtral", WandaConfig(sparsity=0.5, max_samples=3), torch.bfloat16),
    ("t5", WANDA, torch.bfloat16),
    ("gemma3", SparseGPTConfig(sparsity=0.5), torch.bfloat16),
    ("opt", MagnitudeConfig(sparsity=0.4, scope="row"), torch.float16),
]


@pytest.mark.filterwarnings("ignore:.*three-dimensional parameters")
@pytest.mark.parametrize(("name", "config", "dtype"), CASES, ids=[f"{c[0]}-{c[1].method}" for c in CASES])
def test_bits_are_those_of_memory(name, config, dtype, tmp_path):
    model = folders.MODELS[name]()
    data = folders.batches(model)
    source = folders.saved(model, tmp_path / "model", dtype)
    (source / "tokenizer.json").write_text("{}")
    before = folders.contents(source)
    full = type(model).from_pretrained(source, dtype="auto")
    expected = prune(full, config, data, progress=False)
    full.save_pretrained(tmp_path / "expected")

    report = prune_folder(source, tmp_path / "out", config, data, progress=False)
    assert report.layers == expected.layers and report.calibration_tokens == expected.calibration_tokens
    assert (report.config, report.routers, report.method) == (expected.config, expected.routers, expected.method)
    assert folders.same(folders.tensors(tmp_path / "out"), folders.tensors(tmp_path / "expected"))
    again = type(model).from_pretrained(tmp_path / "out", dtype="auto")
    assert folders.same(again.state_dict(), full.state_dict())
    for file in ("config.json", "generation_config.json"):
        assert (
            [json.loads((tmp_path / folder / file).read_text()) for folder in ("out", "expected")]
            == [json.loads((tmp_path / "expected" / file).read_text())] * 2
            if (tmp_path / "expected" / file).exists()
            else not (tmp_path / "out" / file).exists()
        )
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert folders.contents(source) == before
    shards = {path.name for path in source.glob("*.safetensors")}
    assert len(shards) > 2 and shards == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_single_file_and_another_dtype(tmp_path):
    source = folders.saved(tiny_llama(), tmp_path / "model", torch.float32, "1GB")
    data = folders.batches(tiny_llama())
    full = type(tiny_llama()).from_pretrained(source, dtype=torch.bfloat16)
    prune(full, WANDA, data, progress=False)
    prune_folder(source, tmp_path / "out", WANDA, data, dtype="bfloat16", progress=False)
    assert folders.same(folders.tensors(tmp_path / "out"), full.state_dict())
    assert type(full).from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_names_and_tensors_that_the_model_does_not_have(tmp_path):
    """Names on disk without the prefix of the model, tied weights that are there twice, and a tensor that is in no model."""
    source = folders.saved(folders.MODELS["gpt2"](), tmp_path / "model", torch.float32, "1GB")

    def change(found):
        for name in list(found):
            found[name.removeprefix("transformer.")] = found.pop(name)
        found["lm_head.weight"] = found["wte.weight"].clone()
        found["h.0.attn.masked_bias"] = torch.ones(1)

    folders.rewrite(source / "model.safetensors", change)
    kind = folders.MODELS["gpt2"]
    full = type(kind()).from_pretrained(source, dtype="auto")
    prune(full, WANDA, folders.batches(full), progress=False)
    prune_folder(source, tmp_path / "out", WANDA, folders.batches(full), progress=False)
    found = folders.tensors(tmp_path / "out")
    assert found.keys() == load_file(source / "model.safetensors").keys() - {"h.0.attn.masked_bias"}
    again = type(full).from_pretrained(tmp_path / "out", dtype="auto")
    assert folders.same(again.state_dict(), full.state_dict())
    with pytest.raises(ValueError, match="lm_head shares its weight"):
        prune_folder(source, tmp_path / "x", MagnitudeConfig(sparsity=0.5, target_modules=["lm_head"]), progress=False)


def test_no_more_than_two_blocks_are_in_memory(tmp_path):
    source = folders.saved(tiny_llama(num_hidden_layers=5), tmp_path / "model")
    data = folders.batches(tiny_llama())
    run = FolderRun(source, tmp_path / "out", "test", {})
    layers = select_layers(run.model, None, None)
    (blocks,) = find_stacks(run.model)
    most = 0

    def look(module, args):
        nonlocal most
        most = max(most, sum(any(not p.is_meta for p in block.parameters()) for block in blocks.values()))

    keys = {name: run.stored.key_of_weight(name) for name in layers}
    new = {name: {keys[name]: ("BF16", tuple(layer.weight.shape))} for name, layer in layers.items()}
    written = []

    def after(unit):
        written.extend(unit)
        return {keys[name]: layer.weight for name, layer in unit.items()}, []

    with run.working(new, {name: [key] for name, key in keys.items()}, before=lambda name: None, after=after):
        hooks = [layer.register_forward_pre_hook(look) for layer in layers.values()]
        with calibration_mode(run.model):
            for unit in BlockWalker(run.model, data, layers):
                for index in range(len(data)):
                    unit.feed(index)
                assert not any(layer.weight.is_meta for layer in unit.layers.values())
                assert run.model.lm_head.weight.is_meta  # of no use for the blocks
        for hook in hooks:
            hook.remove()
        run.finish()
    assert most == 1 and written == list(layers)
    assert all(p.is_meta for p in run.model.parameters()) and "forward" not in run.model.__dict__
    assert folders.same(folders.tensors(tmp_path / "out"), folders.tensors(source))


@pytest.mark.parametrize(("name", "config"), [("llama", WANDA), ("t5", SparseGPTConfig(sparsity=0.5))])
def test_activations_on_disk(name, config, tmp_path, monkeypatch):
    model = folders.MODELS[name]()
    source, data = folders.saved(model, tmp_path / "model"), folders.batches(model)
    prune_folder(source, tmp_path / "in_memory", config, data, progress=False)
    written = []
    monkeypatch.setattr(
        sequential, "write_alone", lambda path, tensor: (written.append(path), write_alone(path, tensor))[1]
    )
    (tmp_path / "out").mkdir()
    prune_folder(source, tmp_path / "out", config, data, activations_on_disk=True, progress=False)
    assert {path.parent for path in written} == {tmp_path / "out" / ".activations.partial"} and len(written) >= 6
    assert folders.contents(tmp_path / "out") == folders.contents(tmp_path / "in_memory")
    with pytest.raises(ValueError, match="`activations_on_disk` must be True or False"):
        prune_folder(source, tmp_path / "x", config, data, activations_on_disk="yes", progress=False)


# --- bad input ---------------------------------------------------------------------------------------------------------


def _missing_shard(source):
    (source / "model-00002-of-00003.safetensors").unlink()


def _truncated(source):
    file = source / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _not_in_its_file(source):
    data = folders.index(source)
    data["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(data))


def _outside(source):
    data = folders.index(source)
    data["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(data))


def _missing_tensor(source):
    data = folders.index(source)
    file = source / data["weight_map"].pop("model.layers.1.mlp.up_proj.weight")
    folders.rewrite(file, lambda found: found.pop("model.layers.1.mlp.up_proj.weight"))
    (source / "model.safetensors.index.json").write_text(json.dumps(data))


def _other_shape(source):
    file = source / folders.index(source)["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    folders.rewrite(file, lambda found: found.update({"model.layers.1.mlp.up_proj.weight": torch.ones(3, 5)}))


def _twice(source):
    file = source / "model-00003-of-00003.safetensors"
    folders.rewrite(file, lambda found: found.update({"model.embed_tokens.weight": torch.ones(96, 32)}))


def _two_models(source):
    save_file({"a": torch.ones(1)}, source / "model.safetensors")


def _quantised(source):
    data = json.loads((source / "config.json").read_text())
    data["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (source / "config.json").write_text(json.dumps(data))


def _no_config(source):
    (source / "config.json").unlink()


def _no_weights(source):
    for file in [*source.glob("*.safetensors"), source / "model.safetensors.index.json"]:
        file.unlink()


BAD = {
    _missing_shard: "model-00002-of-00003.safetensors is missing in .*model.safetensors.index.json names it",
    _truncated: "in model-00002-of-00003.safetensors lies at bytes .* it is truncated or damaged",
    _not_in_its_file: "model.norm.weight is not in model-00001-of-00003.safetensors",
    _outside: "weight_map",
    _missing_tensor: "model.layers.1.mlp.up_proj.weight is missing in the files",
    _other_shape: r"model.layers.1.mlp.up_proj.weight in .* is \(3, 5\); by config.json it is \(48, 32\)",
    _twice: "model.embed_tokens.weight is in model-00001-of-00003.safetensors and in model-00003-of-00003.safetensors",
    _two_models: "holds model.safetensors and model.safetensors.index.json",
    _quantised: "is quantised or packed already \\(gptq\\)",
    _no_config: "holds no config.json",
    _no_weights: "holds neither model.safetensors nor",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = folders.saved(tiny_llama(num_hidden_layers=3), tmp_path_factory.mktemp("llama") / "model", shard="25KB")
    assert len(list(folder.glob("*.safetensors"))) == 3
    return folder


@pytest.mark.parametrize("damage", BAD, ids=lambda f: f.__name__)
def test_damaged_folders_are_refused_by_name(damage, llama, tmp_path):
    source = shutil.copytree(llama, tmp_path / "model")
    damage(source)
    with pytest.raises(ValueError, match=BAD[damage]):
        prune_folder(source, tmp_path / "out", MagnitudeConfig(sparsity=0.5), progress=False)
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_refused_before_anything_is_made(llama, tmp_path):
    data = folders.batches(tiny_llama())
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for arguments, message in [
        ((tmp_path / "nowhere", tmp_path / "out", WANDA, data), "is no folder"),
        ((llama, llama, WANDA, data), "is the folder of the model itself"),
        ((llama, tmp_path / "file", WANDA, data), "is a file"),
        ((llama, tmp_path / "full", WANDA, data), "exists already"),
        ((llama, tmp_path / "out", WANDA), "`calibration` must be"),
        ((llama, tmp_path / "out", object(), data), "`config` must be"),
        (
            (llama, tmp_path / "out", WandaConfig(sparsity=0.5, target_modules=["nothing"]), data),
            "matches no linear layer",
        ),
        ((llama, tmp_path / "out", WandaConfig(pattern="3:7"), data), "divides the inputs"),
    ]:
        with pytest.raises(ValueError, match=message):
            prune_folder(*arguments, progress=False)
    with pytest.raises(ValueError, match="`dtype` must be"):
        prune_folder(llama, tmp_path / "out", WANDA, data, dtype="int8", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_a_weight_that_is_not_finite_is_named(llama, tmp_path):
    source = shutil.copytree(llama, tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    file = source / folders.index(source)["weight_map"][name]
    folders.rewrite(file, lambda found: found[name].view(-1)[7].fill_(float("nan")))
    with pytest.raises(ValueError, match="weight of model.layers.1.mlp.up_proj holds NaN"):
        prune_folder(source, tmp_path / "out", MagnitudeConfig(sparsity=0.5), progress=False)
    assert not (tmp_path / "out" / "config.json").exists()


# --- interruptions -----------------------------------------------------------------------------------------------------


class Stop(BaseException):
    pass


@pytest.fixture(scope="module")
def pruned(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "out"
    report = prune_folder(llama, out, WANDA, folders.batches(tiny_llama()), progress=False)
    return out, report


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_run_goes_on(done, llama, pruned, tmp_path, monkeypatch):
    data = folders.batches(tiny_llama())
    seen = []
    after = FolderRun.after

    def stops(self, layers):
        seen.append(list(layers))
        if len(seen) > done:
            raise Stop
        after(self, layers)

    monkeypatch.setattr(FolderRun, "after", stops)
    with pytest.raises(Stop):
        prune_folder(llama, tmp_path / "out", WANDA, data, progress=False)
    assert not (tmp_path / "out" / "config.json").exists()
    for other, message in [
        ((llama, WandaConfig(sparsity=0.6), data), "output` holds another pruning .*config is .*'sparsity': 0.6"),
        ((llama, WANDA, data[:2]), "output` holds another pruning .*calibration is"),
        ((llama, MagnitudeConfig(sparsity=0.5), None), "output` holds another pruning .*method is 'wanda' there"),
    ]:
        before = folders.contents(tmp_path / "out")
        with pytest.raises(ValueError, match=message):
            prune_folder(other[0], tmp_path / "out", *other[1:], progress=False)
        assert folders.contents(tmp_path / "out") == before
    source = folders.saved(tiny_llama(num_hidden_layers=3, initializer_range=0.2), tmp_path / "other", shard="25KB")
    with pytest.raises(ValueError, match="output` holds another pruning .*source is"):
        prune_folder(source, tmp_path / "out", WANDA, data, progress=False)
    monkeypatch.setattr(FolderRun, "after", lambda self, layers: (seen.append(list(layers)), after(self, layers)))
    seen.clear()
    report = prune_folder(llama, tmp_path / "out", WANDA, data, progress=False)
    assert len(seen) == 3 - done  # what was done is not done again
    assert folders.contents(tmp_path / "out") == folders.contents(pruned[0])
    assert report.layers == pruned[1].layers and report.calibration_tokens == pruned[1].calibration_tokens
    with pytest.raises(ValueError, match="exists already"):
        prune_folder(llama, tmp_path / "out", WANDA, data, progress=False)


def test_what_was_written_and_is_gone_is_an_error(llama, tmp_path, monkeypatch):
    data = folders.batches(tiny_llama())
    after = FolderRun.after

    def stops(self, layers):
        after(self, layers)
        raise Stop

    monkeypatch.setattr(FolderRun, "after", stops)
    with pytest.raises(Stop):
        prune_folder(llama, tmp_path / "out", WANDA, data, progress=False)
    (tmp_path / "out" / ".model-00001-of-00003.safetensors.partial").unlink()
    with pytest.raises(ValueError, match="model-00001-of-00003.safetensors.partial in .* is gone, or another one"):
        prune_folder(llama, tmp_path / "out", WANDA, data, progress=False)


def test_a_full_disk(llama, pruned, tmp_path, monkeypatch):
    """Before anything is written, in the second block, and when the files get the rest of their tensors."""
    data = folders.batches(tiny_llama())
    with limit(20_000), pytest.raises(WriteError, match="cannot write .*out.*partial': File too large; "):
        prune_folder(llama, tmp_path / "out", WANDA, data, progress=False)
    for step, name in enumerate(("after", "_complete", "finish")):
        method = getattr(FolderRun, name)
        calls = []

        def full(self, *args, method=method, calls=calls, step=step):
            calls.append(1)
            with limit(10 if len(calls) > step % 2 else 10**6):
                return method(self, *args)

        monkeypatch.setattr(FolderRun, name, full)
        with pytest.raises(WriteError, match="cannot write .*out.*': File too large; "):
            prune_folder(llama, tmp_path / "out", WANDA, data, progress=False)
        monkeypatch.undo()
        assert not (tmp_path / "out" / "config.json").exists()
    prune_folder(llama, tmp_path / "out", WANDA, data, progress=False)
    assert folders.contents(tmp_path / "out") == folders.contents(pruned[0])


def test_a_disk_with_too_little_space(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="`output` .* free space, and .* GB more are needed"):
        prune_folder(llama, tmp_path / "out", MagnitudeConfig(sparsity=0.5), progress=False)
    assert not (tmp_path / "out").exists()


def test_another_process_in_the_same_folder(llama, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    number = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(number, fcntl.LOCK_EX)
    try:
        with pytest.raises(ValueError, match="another process works on it"):
            prune_folder(llama, tmp_path / "out", MagnitudeConfig(sparsity=0.5), progress=False)
    finally:
        os.close(number)


# --- models that accelerate has dispatched ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_dispatched_models_are_refused_by_name(kind, llama, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = type(tiny_llama()).from_pretrained(llama)
    if kind == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path / "offload", execution_device="cpu")
    for config in (WANDA, MagnitudeConfig(sparsity=0.5)):
        with pytest.raises(ValueError, match="accelerate keeps the weight of model.layers.0.*prune_folder"):
            prune(model, config, folders.batches(tiny_llama()), progress=False)
    with pytest.raises(ValueError, match="accelerate keeps the weight of model.layers.0.*quantize_folder"):
        quantize(model, RTNConfig(group_size=16), progress=False)
    for importance in ("magnitude", "activation", "gradient"):
        with pytest.raises(
            ValueError, match="`importance`: the weight of 'model.layers.0.* is not in memory.*sort_folder"
        ):
            sort_by_importance(model, importance, folders.batches(tiny_llama()), progress=False)


def test_warnings_are_those_of_prune(tmp_path):
    source = folders.saved(folders.mixtral(), tmp_path / "model")
    with pytest.warns(UserWarning, match="three-dimensional parameters"), warnings.catch_warnings():
        prune_folder(source, tmp_path / "out", MagnitudeConfig(sparsity=0.5), progress=False)
