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
"""Merging into a folder block by block: the same bits as in memory, also after an interruption."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import folders
from support.models import tiny_llama

from peft_elastic import ElasticLoraConfig, MagnitudeConfig, SparseQALoraConfig, merge_folder, prune, save_gptq
from peft_elastic.structure.folder_run import FolderRun


RANKS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
GRID = {"quantization_aware": True, "group_size": 16}
CONFIGS = {
    "lora": lambda: LoraConfig(**RANKS),
    "elastic": lambda: ElasticLoraConfig(**RANKS, elastic_ranks=[4, 2]),
    "sparse": lambda: SparseQALoraConfig(**RANKS, elastic_ranks=[4, 2]),
    "qa": lambda: SparseQALoraConfig(**RANKS, elastic_ranks=[4, 2], bits=4, **GRID),
    "qa8": lambda: SparseQALoraConfig(**RANKS, elastic_ranks=[4], bits=8, symmetric=True, **GRID),
}
CASES = [
    ("llama", "lora", torch.bfloat16, False),
    ("llama", "elastic", torch.float32, False),
    ("gpt2", "elastic", torch.float32, False),
    ("llama", "sparse", torch.bfloat16, False),
    ("t5", "sparse", torch.float32, False),
    ("llama", "qa", torch.bfloat16, False),
    ("gpt2", "qa", torch.float32, False),
    ("llama", "qa", torch.bfloat16, True),
    ("gpt2", "qa", torch.float32, True),
    ("llama", "qa8", torch.float32, True),
]


def made(name, kind, dtype, folder):
    """The folders of a pruned model and of an adapter on it."""
    model = folders.MODELS[name]()
    prune(model, MagnitudeConfig(sparsity=0.5), progress=False)
    source = folders.saved(model, folder / "model", dtype)
    torch.manual_seed(1)
    adapted = get_peft_model(type(model).from_pretrained(source, dtype="auto"), CONFIGS[kind]())
    adapted.save_pretrained(folder / "adapter")
    return type(model), source, folder / "adapter"


@pytest.mark.parametrize(
    ("name", "kind", "dtype", "gptq"), CASES, ids=[f"{c[0]}-{c[1]}{'-gptq' * c[3]}" for c in CASES]
)
def test_bits_are_those_of_memory(name, kind, dtype, gptq, tmp_path):
    model_type, source, adapter = made(name, kind, dtype, tmp_path)
    before = folders.contents(source)
    model = PeftModel.from_pretrained(model_type.from_pretrained(source, dtype="auto"), adapter)
    options = {}
    if kind != "lora":
        model.set_subnet("min")
        options = {"sparse_kernel": False}
    merged = model.merge_and_unload(safe_merge=True, **options)
    (save_gptq if gptq else type(merged).save_pretrained)(merged, tmp_path / "expected")

    subnet = {} if kind == "lora" else {"subnet": "min"}
    rows = merge_folder(source, adapter, tmp_path / "out", gptq=gptq, progress=False, **subnet)
    assert folders.same(folders.tensors(tmp_path / "out"), folders.tensors(tmp_path / "expected"))
    assert not folders.same(folders.tensors(tmp_path / "out"), folders.tensors(source))
    for file in ("config.json", "quantize_config.json") if gptq else ("config.json",):
        assert json.loads((tmp_path / "out" / file).read_text()) == json.loads(
            (tmp_path / "expected" / file).read_text()
        )
    assert {row["sparsity_before"] for row in rows} == {0.5}
    assert all(row["sparsity_after"] >= 0.5 for row in rows) == (kind not in ("lora", "elastic"))
    assert folders.contents(source) == before


class Stop(BaseException):
    pass


@pytest.mark.parametrize("kind", ["sparse", "qa"])
def test_an_interrupted_run_goes_on(kind, tmp_path, monkeypatch):
    _, source, adapter = made("llama", kind, torch.float32, tmp_path)
    rows = merge_folder(source, adapter, tmp_path / "whole", subnet="max", progress=False)
    after, seen = FolderRun.after, []

    def stops(self, layers):
        seen.append(1)
        if len(seen) > 1:
            raise Stop
        after(self, layers)

    monkeypatch.setattr(FolderRun, "after", stops)
    with pytest.raises(Stop):
        merge_folder(source, adapter, tmp_path / "out", subnet="max", progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="output` holds another merge .*subnet is 'max' there, 'min' here"):
        merge_folder(source, adapter, tmp_path / "out", subnet="min", progress=False)
    assert merge_folder(source, adapter, tmp_path / "out", subnet="max", progress=False) == rows
    assert folders.contents(tmp_path / "out") == folders.contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["elastic", "sparse", "qa"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_models_that_accelerate_has_offloaded(kind, when, tmp_path):
    """The base is offloaded before the adapter is loaded, or with it: refused by name, or merged to the same weights."""
    accelerate = pytest.importorskip("accelerate")
    model_type, source, adapter = made("llama", kind, torch.float32, tmp_path)
    expected = PeftModel.from_pretrained(model_type.from_pretrained(source), adapter).merge_and_unload(
        sparse_kernel=False
    )
    base = model_type.from_pretrained(source)
    if when == "before":
        accelerate.cpu_offload(base, execution_device="cpu")
        with pytest.raises(ValueError, match="merge_folder|`quantization_aware`: the weight of .* is not in memory"):
            PeftModel.from_pretrained(base, adapter).merge_and_unload(sparse_kernel=False)
        return
    model = PeftModel.from_pretrained(base, adapter)
    accelerate.cpu_offload(model, execution_device="cpu")
    if kind == "elastic":
        merged = model.merge_and_unload(sparse_kernel=False)
        data = folders.batches(merged)[0]
        with torch.no_grad():
            assert torch.equal(merged(**data).logits, expected(**data).logits)
    else:
        with pytest.raises(ValueError, match="accelerate has offloaded the weights of the base.*merge_folder"):
            model.merge_and_unload(sparse_kernel=False)


def test_what_needs_the_whole_base_is_refused_by_name(tmp_path):
    source = folders.saved(tiny_llama(), tmp_path / "model")
    ranks = {**RANKS, "target_modules": ["q_proj"]}
    for number, (config, message) in enumerate(
        [
            (LoraConfig(**ranks, use_dora=True), "has `use_dora`"),
            (LoraConfig(**ranks, modules_to_save=["lm_head"]), "has `modules_to_save`"),
            (
                LoraConfig(**{**ranks, "target_modules": ["embed_tokens"]}),
                "embed_tokens is a Embedding; only linear layers",
            ),
            (ElasticLoraConfig(**ranks, elastic_width={"mlp": [1.0, 0.5]}, importance="none"), "has `elastic_width`"),
        ]
    ):
        model = get_peft_model(type(tiny_llama()).from_pretrained(source, dtype="auto"), config)
        model.save_pretrained(tmp_path / f"adapter{number}")
        with pytest.raises(ValueError, match=message):
            merge_folder(source, tmp_path / f"adapter{number}", tmp_path / "out", progress=False)
    _, _, adapter = made("llama", "lora", torch.float32, tmp_path / "other")
    for arguments, options, message in [
        ((source, tmp_path / "nowhere"), {}, "`adapter` .* must be a folder with an adapter_config.json"),
        ((source, adapter), {"gptq": True}, "`gptq` must be False"),
        ((source, adapter), {"subnet": "max"}, "`subnet` must be None"),
        ((folders.saved(tiny_llama(hidden_size=64), tmp_path / "wide"), adapter), {}, "`adapter` "),
    ]:
        with pytest.raises(ValueError, match=message):
            merge_folder(*arguments, tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()
