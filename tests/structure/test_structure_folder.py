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
"""Importance and sorting of a folder block by block: the same bits as in memory, one block at a time, and what goes wrong on the way."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import folders
from support.fresh import run_fresh
from support.full_disk import limit
from support.models import tiny_bert, tiny_gated_t5, tiny_gpt_neox, tiny_llama, tiny_phi3

from peft_elastic import importance_of_folder, sort_by_importance, sort_folder
from peft_elastic.common.safetensors_files import ShardFile
from peft_elastic.common.writing import WriteError
from peft_elastic.structure import sequential
from peft_elastic.structure.blocks import Structure
from peft_elastic.structure.folder_run import FolderRun
from peft_elastic.structure.importance import measure_importance
from peft_elastic.structure.modules import find_stacks
from peft_elastic.structure.residence import StoredResidence
from peft_elastic.structure.rewriting import takes_of
from peft_elastic.structure.stored_model import StoredModel


# grouped heads, fused projections that are stored as (in, out) and a tied embedding, an encoder, experts that transformers fuses when
# it loads them, heads that are tied over a stack
MODELS = {
    **{name: folders.MODELS[name] for name in ("llama", "gpt2", "mixtral", "t5", "gemma3")},
    "bert": tiny_bert,
    "phi3": tiny_phi3,
    "gpt_neox": tiny_gpt_neox,
    "gated_t5": tiny_gated_t5,
}
CASES = [(name, how) for name in MODELS for how in ("activation", "magnitude")]


class Stop(Exception):
    pass


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def whole(source):
    """The model in a folder, in memory."""
    kind = type(StoredModel(source).model)
    return kind.from_pretrained(source, dtype="auto")


def sorted_in_memory(source, output, *args, **kwargs):
    model = whole(source)
    scores = sort_by_importance(model, *args, progress=False, **kwargs)
    model.save_pretrained(output)
    return model, scores


# --- the same bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "importance"), CASES)
def test_bits_are_those_of_memory(name, importance, tmp_path):
    model = MODELS[name]()
    data = folders.batches(model)
    source = folders.saved(model, tmp_path / "model")
    (source / "tokenizer.json").write_text("{}")
    before = folders.contents(source)
    full = whole(source)
    scores = importance_of_folder(source, importance, data, progress=False)
    assert equal(scores, measure_importance(full, Structure(full).widths, importance, data, progress=False))

    full, expected = sorted_in_memory(source, tmp_path / "expected", importance, data)
    found = sort_folder(source, tmp_path / "out", importance, data, progress=False)
    assert equal(found, expected)
    assert all(torch.equal(found[key], scores[key].sort(descending=True, stable=True).values) for key in found)
    assert folders.same(folders.tensors(tmp_path / "out"), folders.tensors(tmp_path / "expected"))
    assert not folders.same(folders.tensors(tmp_path / "out"), folders.tensors(source))
    configs = [(tmp_path / folder / "config.json").read_text() for folder in ("out", "expected")]
    assert configs[0] == configs[1] and "peft_elastic_order" in configs[0]
    again = whole(tmp_path / "out")
    assert folders.same(again.state_dict(), full.state_dict())
    # the same function, up to the order of its sums
    assert torch.allclose(again(**data[0])[0].float(), whole(source)(**data[0])[0].float(), atol=0.05)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert folders.contents(source) == before
    shards = {path.name for path in source.glob("*.safetensors")}
    assert len(shards) > 2 and shards == {path.name for path in (tmp_path / "out").glob("*.safetensors")}
    assert folders.index(source) == folders.index(tmp_path / "out")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", ["heads", "mlp"])
def test_one_kind_and_some_of_the_data(kind, tmp_path):
    model = tiny_llama()
    data = folders.batches(model)
    source = folders.saved(model, tmp_path / "model", torch.float32, "1GB")
    options = {"kinds": (kind,), "max_samples": 3}
    scores = importance_of_folder(source, "activation", data, progress=False, dtype="bfloat16", **options)
    full = type(model).from_pretrained(source, dtype=torch.bfloat16)
    expected = sort_by_importance(full, "activation", data, progress=False, **options)
    assert scores.keys() == expected.keys() == {p for p in scores if p.endswith("attn") == (kind == "heads")}
    found = sort_folder(source, tmp_path / "out", "activation", data, dtype="bfloat16", progress=False, **options)
    assert equal(found, expected)
    assert folders.same(folders.tensors(tmp_path / "out"), full.state_dict())
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
    # a score of some of the data is another one
    assert not equal(scores, importance_of_folder(source, "activation", data, kinds=(kind,), progress=False))


def test_own_scores_of_some_of_the_units(tmp_path):
    source = folders.saved(tiny_llama(), tmp_path / "model")
    scores = {"model.layers.1": torch.arange(48.0), "model.layers.0.self_attn": [1, 2]}
    _, expected = sorted_in_memory(source, tmp_path / "expected", scores)
    found = sort_folder(source, tmp_path / "out", scores, progress=False)
    assert equal(found, expected)
    assert folders.same(folders.tensors(tmp_path / "out"), folders.tensors(tmp_path / "expected"))
    assert (tmp_path / "out/config.json").read_text() == (tmp_path / "expected/config.json").read_text()
    # those that were measured on the folder are taken as well
    measured = importance_of_folder(source, "magnitude", progress=False)
    sort_folder(source, tmp_path / "own", measured, progress=False)
    sort_folder(source, tmp_path / "magnitude", "magnitude", progress=False)
    assert folders.contents(tmp_path / "own") == folders.contents(tmp_path / "magnitude")


def test_names_without_the_prefix_and_tied_weights_that_are_there_twice(tmp_path):
    source = folders.saved(MODELS["gpt2"](), tmp_path / "model", torch.float32, "1GB")

    def change(found):
        for name in list(found):
            found[name.removeprefix("transformer.")] = found.pop(name)
        found["lm_head.weight"] = found["wte.weight"].clone()
        found["h.0.attn.masked_bias"] = torch.ones(1)

    folders.rewrite(source / "model.safetensors", change)
    full, _ = sorted_in_memory(source, tmp_path / "expected", "magnitude")
    sort_folder(source, tmp_path / "out", "magnitude", progress=False)
    assert folders.same(folders.tensors(tmp_path / "out"), folders.tensors(tmp_path / "expected"))
    assert folders.same(whole(tmp_path / "out").state_dict(), full.state_dict())


def test_a_tied_weight_under_its_other_name(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    source = folders.saved(model, tmp_path / "model", torch.float32, "1GB")
    folders.rewrite(
        source / "model.safetensors", lambda f: f.update({"lm_head.weight": f.pop("model.embed_tokens.weight")})
    )
    full, _ = sorted_in_memory(source, tmp_path / "expected", "activation", folders.batches(model))
    assert (
        torch.equal(full.lm_head.weight, model.lm_head.weight)
        and full.lm_head.weight is full.model.embed_tokens.weight
    )
    sort_folder(source, tmp_path / "out", "activation", folders.batches(model), progress=False)
    assert folders.same(folders.tensors(tmp_path / "out"), folders.tensors(tmp_path / "expected"))
    assert folders.same(whole(tmp_path / "out").state_dict(), full.state_dict())


def test_a_sorted_folder_loads_in_a_fresh_process(tmp_path):
    """Without this package too: the model is an ordinary one."""
    source = folders.saved(tiny_llama(), tmp_path / "model", torch.float32)
    sort_folder(source, tmp_path / "out", "magnitude", progress=False)
    ids = torch.arange(3, 10)[None]
    expected = whole(tmp_path / "out")(ids).logits
    code = f"""
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({os.fspath(tmp_path / "out")!r}, dtype="auto")
torch.save(model(torch.arange(3, 10)[None]).logits.detach(), {os.fspath(tmp_path / "logits")!r})
"""
    run_fresh(code)
    assert torch.equal(torch.load(tmp_path / "logits"), expected)


def test_takes_are_the_orders_and_the_ranges():
    """Of a fused projection, whose output is in three parts, after sorting and cutting: against rows that say where they are from."""
    model = folders.MODELS["gpt2"]()
    width = next(width for width in Structure(model).widths if width.key == "heads:transformer.h.0")
    takes = takes_of(model, [width], {"transformer.h.0.attn": torch.tensor([2, 0, 3, 1])}, {width.key: 2})
    heads = [*range(16, 24), *range(0, 8)]
    qkv = [*heads, *(32 + head for head in heads), *(64 + head for head in heads)]
    assert {name: {dim: index.tolist() for dim, index in take.items()} for name, take in takes.items()} == {
        "transformer.h.0.attn.c_attn.weight": {1: qkv},
        "transformer.h.0.attn.c_attn.bias": {0: qkv},
        "transformer.h.0.attn.c_proj.weight": {0: heads},
    }


# --- memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["activation", "magnitude"])
def test_one_block_at_a_time_is_in_memory(importance, tmp_path, monkeypatch):
    source = folders.saved(tiny_llama(num_hidden_layers=5), tmp_path / "model")
    bring = StoredResidence._bring
    counts, heads = [], []

    def look(self, part):
        bring(self, part)
        (blocks,) = find_stacks(self._stored.model)
        counts.append(sum(any(not p.is_meta for p in block.parameters()) for block in blocks.values()))
        heads.append(not self._stored.model.lm_head.weight.is_meta)

    monkeypatch.setattr(StoredResidence, "_bring", look)
    importance_of_folder(source, importance, folders.batches(tiny_llama()), progress=False)
    assert max(counts) == 1 and counts.count(1) >= 5 and not any(heads)


def test_activations_on_disk(tmp_path, monkeypatch):
    source = folders.saved(tiny_llama(), tmp_path / "model")
    data = folders.batches(tiny_llama())
    expected = importance_of_folder(source, "activation", data, progress=False)
    written = []
    write = sequential.write_alone
    monkeypatch.setattr(sequential, "write_alone", lambda path, t: (written.append(path), write(path, t))[1])
    assert equal(expected, importance_of_folder(source, "activation", data, scratch=tmp_path / "s", progress=False))
    assert len({path.parent for path in written}) == 1 and written[0].parent.parent == tmp_path / "s"
    assert not list((tmp_path / "s").iterdir())
    sort_folder(source, tmp_path / "a", "activation", data, progress=False)
    written.clear()
    sort_folder(source, tmp_path / "b", "activation", data, activations_on_disk=True, progress=False)
    assert written and written[0].parent.parent == tmp_path / "b"
    assert folders.contents(tmp_path / "a") == folders.contents(tmp_path / "b")


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return folders.saved(tiny_llama(num_hidden_layers=3), tmp_path_factory.mktemp("llama") / "model", shard="25KB")


@pytest.fixture(scope="module")
def data():
    return folders.batches(tiny_llama())


def test_bad_arguments_are_refused_before_anything_is_made(llama, data, tmp_path):
    for importance, kwargs, message in [
        ("gradient", {}, "'gradient' needs a backward pass through the whole model"),
        ("wanda", {}, "`importance` must be 'activation', 'magnitude' or your own scores, got 'wanda'"),
        ("none", {}, "`importance` must be 'activation'.*got 'none'"),
        (7, {}, "`importance` must be one of"),
        ("activation", {"calibration": None}, "`calibration`: importance 'activation' needs data"),
        ("activation", {"calibration": []}, "calibration: it yielded no data"),
        ("magnitude", {"kinds": ("rows",)}, "`kinds` must be"),
        ("magnitude", {"dtype": "int8"}, "`dtype` must be"),
    ]:
        kwargs = {"calibration": data, **kwargs}
        for call in (
            lambda **k: sort_folder(llama, tmp_path / "out", **k),
            lambda **k: importance_of_folder(llama, **k),
        ):
            with pytest.raises(ValueError, match=message):
                call(importance=importance, **kwargs)
    with pytest.raises(ValueError, match="`importance` must be 'activation' or 'magnitude', which are measured"):
        importance_of_folder(llama, {"model.layers.0": torch.ones(48)})
    for scores, message in [
        ({"model.layers.9": torch.ones(48)}, "scores for 'model.layers.9'; the names of this model are"),
        ({"model.layers.0": torch.ones(47)}, "the scores of 'model.layers.0' must be 48 finite numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            sort_folder(llama, tmp_path / "out", scores, progress=False)
    with pytest.raises(ValueError, match="is the folder of the model itself"):
        sort_folder(llama, llama, "magnitude")
    assert not (tmp_path / "out").exists()


def test_damaged_folders_are_refused_by_name(llama, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(llama, copy)
    file = sorted(copy.glob("*.safetensors"))[1]
    file.rename(copy / "elsewhere")
    for call in (
        lambda: importance_of_folder(copy, "magnitude"),
        lambda: sort_folder(copy, tmp_path / "o", "magnitude"),
    ):
        with pytest.raises(ValueError, match=f"{file.name} is missing in"):
            call()
    (copy / "elsewhere").rename(file)
    with open(file, "r+b") as stream:
        stream.truncate(file.stat().st_size - 10)
    with pytest.raises(ValueError, match="is truncated or damaged"):
        sort_folder(copy, tmp_path / "o", "magnitude")
    assert not (tmp_path / "o").exists()


# --- interruptions -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_order(llama, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("sorted") / "out"
    return out, sort_folder(llama, out, "activation", data, progress=False)


@pytest.mark.parametrize("done", [0, 1, 3])
def test_measuring_goes_on_where_it_was(done, llama, data, in_order, tmp_path, monkeypatch):
    seen = []
    after = FolderRun.after

    def stops(self, layers):
        seen.append(list(layers))
        if len(seen) > done:
            raise Stop
        after(self, layers)
        if done == 3 == len(seen):  # all is measured, and nothing written
            raise Stop

    monkeypatch.setattr(FolderRun, "after", stops)
    with pytest.raises(Stop):
        sort_folder(llama, tmp_path / "out", "activation", data, progress=False)
    assert not list((tmp_path / "out").glob("model*.safetensors"))
    for args, message in [
        (("activation", data[:2]), "output` holds another sorting .*calibration is"),
        (("magnitude",), "output` holds another sorting .*importance is 'activation' there"),
        (({"model.layers.0": torch.ones(48)},), "output` holds another sorting .*here"),
    ]:
        before = folders.contents(tmp_path / "out")
        with pytest.raises(ValueError, match=message):
            sort_folder(llama, tmp_path / "out", *args, progress=False)
        assert folders.contents(tmp_path / "out") == before
    monkeypatch.setattr(FolderRun, "after", lambda self, layers: (seen.append(list(layers)), after(self, layers)))
    seen.clear()
    assert equal(sort_folder(llama, tmp_path / "out", "activation", data, progress=False), in_order[1])
    assert len(seen) == 3 - done  # what was measured is not measured again
    assert folders.contents(tmp_path / "out") == folders.contents(in_order[0])
    with pytest.raises(ValueError, match="exists already"):
        sort_folder(llama, tmp_path / "out", "activation", data, progress=False)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_writing_goes_on_where_it_was(done, llama, data, in_order, tmp_path, monkeypatch):
    sync = ShardFile.sync
    calls = []

    def stops(self):
        calls.append(1)
        if len(calls) > done:
            raise Stop
        sync(self)

    monkeypatch.setattr(ShardFile, "sync", stops)
    with pytest.raises(Stop):
        sort_folder(llama, tmp_path / "out", "activation", data, progress=False)
    monkeypatch.undo()
    files = sorted((tmp_path / "out").glob("model*.safetensors"))
    assert len(files) == done and not (tmp_path / "out" / "config.json").exists()
    times = [file.stat().st_mtime_ns for file in files]
    assert equal(sort_folder(llama, tmp_path / "out", "activation", data, progress=False), in_order[1])
    assert [file.stat().st_mtime_ns for file in files] == times
    assert folders.contents(tmp_path / "out") == folders.contents(in_order[0])


def test_a_full_disk(llama, data, in_order, tmp_path, monkeypatch):
    with limit(20_000), pytest.raises(WriteError, match="cannot write .*out.*partial': File too large; "):
        sort_folder(llama, tmp_path / "out", "activation", data, progress=False)
    for name in ("after", "_complete"):
        method = getattr(FolderRun, name)

        def full(self, *args, method=method):
            with limit(10):
                return method(self, *args)

        monkeypatch.setattr(FolderRun, name, full)
        with pytest.raises(WriteError, match="cannot write .*out.*': File too large; "):
            sort_folder(llama, tmp_path / "out", "activation", data, progress=False)
        monkeypatch.undo()
        assert not (tmp_path / "out" / "config.json").exists()
    sort_folder(llama, tmp_path / "out", "activation", data, progress=False)
    assert folders.contents(tmp_path / "out") == folders.contents(in_order[0])


def test_a_disk_with_too_little_space(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match="`output` .* free space, and .* GB more are needed"):
        sort_folder(llama, tmp_path / "out", "magnitude", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_sorted_folder_is_noted_as_one(in_order, llama):
    """The digest of the order in config.json, by which adapters of this base know it."""
    config = json.loads((in_order[0] / "config.json").read_text())
    assert len(config["peft_elastic_order"]) == 16 and "peft_elastic_order" not in (llama / "config.json").read_text()
    names = load_file(next(iter(sorted(in_order[0].glob("*.safetensors"))))).keys()
    assert names == load_file(next(iter(sorted(llama.glob("*.safetensors"))))).keys()
