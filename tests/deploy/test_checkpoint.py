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
"""Sparse models on disk: saved and loaded by transformers, and what happens to files that are not in order."""

import copy
import json
import os
import random
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support import fresh
from support.models import default_dtype, tiny_bert, tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from peft_elastic import ElasticLoraConfig, SparseLinear, densify_linears, sparsify_linears
from peft_elastic.common.safetensors_files import check_safetensors
from peft_elastic.deploy import checkpoint
from peft_elastic.layers import extension


if not extension.is_built():
    pytest.skip("the C++ extension is not built", allow_module_level=True)


def ids(length=6):
    return torch.arange(1, 1 + length)[None]


def make(build=tiny_llama, dtype="bf16", model_dtype=torch.float32, **settings):
    with default_dtype(model_dtype):
        model = build(**settings)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                module.weight *= torch.rand_like(module.weight.float()) < 0.5
    sparsify_linears(model, dtype, when="always")
    return model


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def sparse_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def edit_config(folder, change):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))


FRESH = """
import sys, torch
import peft_elastic
from transformers import AutoModelForCausalLM
ids = torch.arange(1, 7)[None]
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        result = {"logits": model(ids).logits, "tokens": model.generate(ids, max_new_tokens=8, do_sample=False)}
    result["sparse"] = [type(module).__name__ for module in model.modules()].count("SparseLinear")
    torch.save(result, folder + "/answer.pt")
"""


def run_fresh(folders, prologue=""):
    run = fresh.run(
        [sys.executable, "-W", "always", "-c", prologue + FRESH, *map(str, folders)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / "answer.pt") for folder in folders], run.stderr


def test_a_fresh_process_gives_the_same_bits(tmp_path):
    models = []
    for dtype in ("bf16", "int8"):
        for model_dtype in (torch.float32, torch.bfloat16):
            for options in ({}, {"max_shard_size": "5KB"}):
                folder = tmp_path / str(len(models))
                models.append(make(dtype=dtype, model_dtype=model_dtype))
                models[-1].save_pretrained(folder, **options)
                assert (len(list(folder.glob("*.safetensors"))) > 3) == bool(options)
                assert len(sparse_layers(models[-1])) == 14
    # what the tuner makes
    config = ElasticLoraConfig(r=4, elastic_ranks=[4, 2], target_modules=["q_proj"], init_lora_weights=False)
    tuned = get_peft_model(densify_linears(make()), config).eval()
    models.append(tuned.merge_and_unload(sparse_kernel=True))
    models[-1].save_pretrained(tmp_path / "8")
    assert len(sparse_layers(models[-1])) == 12

    answers, errors = run_fresh([tmp_path / str(index) for index in range(len(models))])
    assert "dense" not in errors
    for model, answer in zip(models, answers, strict=True):
        assert torch.equal(answer["logits"], logits(model)) and answer["logits"].dtype == model.dtype
        assert torch.equal(answer["tokens"], model.generate(ids(), max_new_tokens=8, do_sample=False))
        assert answer["sparse"] == len(sparse_layers(model))


def test_without_the_extension_the_layers_are_dense(tmp_path):
    model = make(dtype="int8")
    model.save_pretrained(tmp_path)
    (found,), errors = run_fresh([tmp_path], prologue="import sys; sys.modules['peft_elastic._C'] = None\n")
    assert found["sparse"] == 0
    assert errors.count("loaded as dense ones: the C++ extension") == 1
    torch.testing.assert_close(found["logits"], logits(model), atol=2e-5, rtol=1e-4)


def test_a_model_that_stayed_dense_is_saved_as_any_other(tmp_path, monkeypatch):
    model = make()
    model.save_pretrained(tmp_path / "sparse")
    monkeypatch.setattr("peft_elastic.layers.ops._C", None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    assert sum("loaded as dense" in str(w.message) for w in caught) == 1
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(again), logits(dense))


def test_without_the_import_transformers_names_the_package(tmp_path):
    make().save_pretrained(tmp_path)
    script = (
        "from transformers import AutoModelForCausalLM; import sys; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "warning"},
        capture_output=True,
        text=True,
    )
    assert "Unknown quantization type, got peft_elastic" in run.stderr + run.stdout


def test_size_on_disk(tmp_path):
    model = make(hidden_size=128, intermediate_size=256, vocab_size=8)
    weights = sum(layer.in_features * layer.out_features for layer in sparse_layers(model).values())
    nonzeros = sum(layer.nnz for layer in sparse_layers(model).values())
    rest = sum(parameter.numel() * 4 for name, parameter in model.named_parameters())
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    header = struct.unpack("<Q", (tmp_path / "model.safetensors").read_bytes()[:8])[0]
    # 2 bytes a nonzero and a bit a weight: 2 d + 1/8 bytes a weight at density d
    assert size == 8 + header + rest + weights // 8 + 2 * nonzeros


def test_saved_again_and_in_other_dtypes(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert logits(half).dtype == torch.bfloat16
    for name, layer in sparse_layers(half).items():
        assert torch.equal(layer.packed, model.get_submodule(name).packed)
    # densify, change, sparsify again: the file describes what is there now
    densify_linears(loaded)
    with torch.no_grad():
        loaded.model.layers[0].mlp.up_proj.weight.normal_()
    sparsify_linears(loaded, when="always")
    loaded.save_pretrained(tmp_path / "c")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "c")), logits(loaded))
    assert len(json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]["layers"]) == 13


def test_other_architectures_and_classes(tmp_path):
    bert = make(tiny_bert)
    bert.save_pretrained(tmp_path / "bert")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert")), logits(bert))
    base = AutoModel.from_pretrained(tmp_path / "bert")  # the model without its head: other paths
    assert len(sparse_layers(base)) == 13
    with torch.no_grad():
        expected = bert.bert(ids()).last_hidden_state
        assert torch.equal(base(ids()).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")  # a new head
    assert len(sparse_layers(again)) == 13
    with torch.no_grad():
        assert torch.equal(again.bert(ids()).last_hidden_state, expected)

    gpt2 = make(tiny_gpt2)
    gpt2.save_pretrained(tmp_path / "gpt2")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2")), logits(gpt2))


def test_biases_and_tied_embeddings(tmp_path):
    model = make(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.model.layers[0].mlp.up_proj.bias.abs().sum() > 0


def test_a_deep_copy_is_saved_like_its_original(tmp_path):
    model = make()
    twin = copy.deepcopy(model)
    densify_linears(model)
    twin.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(twin))


def test_refuses_another_quantization(tmp_path):
    pytest.importorskip("bitsandbytes")
    dense = tiny_llama()
    dense.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    with pytest.raises(ValueError, match="quantized by bitsandbytes"):
        sparsify_linears(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here these maps may mean the GPU")
@pytest.mark.parametrize(
    "device_map",
    ["auto", "balanced", "balanced_low_0", "sequential", "cpu", "cpu:0", torch.device("cpu"), {"": "cpu"}]
    + [{"": torch.device("cpu", 0)}, {"model": "cpu", "lm_head": "cpu"}],
)
def test_device_maps_that_come_down_to_the_cpu(tmp_path, device_map):
    model = make()
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*sparse layers.*")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    sparse = [name for name, layer in loaded.named_modules() if isinstance(layer, SparseLinear)]
    assert sparse and sparse == [name for name, layer in model.named_modules() if isinstance(layer, SparseLinear)]
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("device_map", [0, "cuda:1", {"": 0}, {"model": "cpu", "lm_head": "cuda"}, {"": "mps"}])
def test_device_maps_with_an_accelerator_mean_dense_layers(device_map):
    quantizer = checkpoint.SparseQuantizer(checkpoint.SparseCheckpointConfig({"a": {}}))
    quantizer.validate_environment(device_map="auto")
    quantizer.validate_environment(device_map=device_map)
    assert "run on the CPU alone" in quantizer._stays_dense
    quantizer.validate_environment(device_map={"": "cpu"})
    assert not quantizer._stays_dense


def test_disk_offload_is_refused(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`device_map` must place sparse layers on .*, got \"disk\""):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "offload")


# -- files that are not in order -------------------------------------------------------------------------------------

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "model"
    make(dtype="int8").save_pretrained(folder)
    return folder


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def flip_a_value(tensors):
    tensors[f"{LAYER}.weight_values"][3] ^= 1


def flip_a_bit(tensors):
    tensors[f"{LAYER}.weight_bitmask"][0, 0] ^= 1


@pytest.mark.parametrize(
    "change, match",
    [
        (flip_a_value, f"{LAYER}.weight_values is damaged"),
        (flip_a_bit, f"{LAYER}.weight_bitmask has"),
        (lambda t: t[f"{LAYER}.weight_scales"].mul_(2), f"{LAYER}.weight_scales is damaged"),
        (lambda t: t[f"{LAYER}.weight_scales"].fill_(float("nan")), f"{LAYER}.weight_scales must be finite"),
        (lambda t: t.pop(f"{LAYER}.weight_values"), f"{LAYER}.weight_values must be .*, got torch.int8 \\(0,\\)"),
        (lambda t: t.pop(f"{LAYER}.weight_bitmask"), f"{LAYER}.weight_bitmask must be .*, got torch.uint8 \\(0,\\)"),
        (
            lambda t: t.update({f"{LAYER}.weight_values": t[f"{LAYER}.weight_values"][:-1].clone()}),
            f"{LAYER}.weight_values must be torch.int8",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_bitmask": t[f"{LAYER}.weight_bitmask"].flatten()}),
            f"{LAYER}.weight_bitmask must be torch.uint8",
        ),
        (
            lambda t: t.update({f"{LAYER}.weight_scales": t[f"{LAYER}.weight_scales"].half()}),
            f"{LAYER}.weight_scales is damaged",
        ),
    ],
)
def test_tensors_that_do_not_fit(saved, change, match):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda c: c.update(version=2), "version is 2"),
        (lambda c: c.update(layers=[]), "layers must be an object"),
        (lambda c: c["layers"].update({LAYER: 3}), f"layer '{LAYER}' must have"),
        (lambda c: c["layers"][LAYER].pop("nnz"), f"layer '{LAYER}' must have"),
        (lambda c: c["layers"][LAYER].update(value_dtype="int3"), f"{LAYER}: value_dtype must be .*, got 'int3'"),
        (
            lambda c: c["layers"][LAYER].update(value_dtype=["bf16"]),
            f"{LAYER}: value_dtype must be .*, got \\['bf16'\\]",
        ),
        (lambda c: c["layers"][LAYER].update(linear_dtype="int8"), f"{LAYER}: linear_dtype must be .*, got 'int8'"),
        (lambda c: c["layers"][LAYER].update(crc32={}), f"{LAYER}: crc32 must have"),
        (lambda c: c["layers"][LAYER].update(nnz=-1), f"{LAYER}: nnz must be .*, got -1"),
        (lambda c: c["layers"][LAYER].update(nnz=2**63), f"{LAYER}: nnz must be .*, got {2**63}"),
        (lambda c: c["layers"][LAYER].update(nnz=7), f"{LAYER}.weight_values must be"),
        (lambda c: c["layers"][LAYER].update(nnz=7.5), f"{LAYER}: nnz must be .*, got 7.5"),
        (lambda c: c["layers"][LAYER].update(out_features=10**9), f"layer '{LAYER}' is 1000000000 x 32"),
        (lambda c: c["layers"].update({"lm_heads": c["layers"][LAYER]}), "the model has no layer 'lm_heads'"),
        (lambda c: c["layers"].update({"model.norm": c["layers"][LAYER]}), "'model.norm' is a LlamaRMSNorm"),
    ],
)
def test_descriptions_that_do_not_fit(saved, change, match):
    edit_config(saved, change)
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_missing_bias_is_named(tmp_path):
    make(mlp_bias=True).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(f"{LAYER}.bias"))
    with pytest.raises(ValueError, match=f"{LAYER}.bias is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def header_of(file):
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_header(file, header, rest):
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + rest)


def test_truncated_files_name_the_tensor(saved):
    file = saved / "model.safetensors"
    data = file.read_bytes()
    header, _ = header_of(file)
    del header["__metadata__"]
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    file.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{last} in model.safetensors lies at .* truncated"):
        AutoModelForCausalLM.from_pretrained(saved)
    for cut in (0, 5, 8, 100):
        file.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="model.safetensors is damaged"):
            AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda e: e.update(data_offsets=[0, 2**60]), "lies at bytes 0 to"),
        (lambda e: e.update(data_offsets=[8, 4]), "lies at bytes 8 to 4"),
        (lambda e: e.update(data_offsets=[-1, 4]), "is described wrongly"),
        (lambda e: e.update(data_offsets="all"), "is described wrongly"),
        (lambda e: e.update(shape=[2**31, 2**31]), ".* which is not"),
        (lambda e: e.update(shape=[-1]), "is described wrongly"),
        (lambda e: e.update(shape=[1.5]), "is described wrongly"),
        (lambda e: e.update(dtype="F64"), ".* which is not F64"),
        (lambda e: e.pop("dtype"), "is described wrongly"),
    ],
)
def test_hostile_headers_name_the_tensor(saved, change, match):
    file, name = saved / "model.safetensors", f"{LAYER}.weight_values"
    header, rest = header_of(file)
    change(header[name])
    write_header(file, header, rest)
    with pytest.raises(ValueError, match=f"{name} in model.safetensors {match}"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_overlapping_tensors_are_refused(saved):
    file = saved / "model.safetensors"
    header, rest = header_of(file)
    first, second = f"{LAYER}.weight_values", "model.layers.0.mlp.up_proj.weight_scales"
    begin = header[first]["data_offsets"][0]
    length = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    header[second]["data_offsets"] = [begin + 1, begin + 1 + length]
    write_header(file, header, rest)
    with pytest.raises(ValueError, match="overlaps the tensor before it"):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("header", [b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 3}', b'{"a": {}}'])
def test_headers_that_are_none(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="model.safetensors"):
        check_safetensors(file)


@pytest.mark.parametrize("seed", range(3))
def test_mutated_checkpoints_load_the_same_or_are_refused(saved, seed):
    """Random damage anywhere in the file or in the description. Only the tensors of dense layers have no checksum: they
    are left out here by sparing their bytes."""
    rng = random.Random(seed)
    file, config_file = saved / "model.safetensors", saved / "config.json"
    data, config = file.read_bytes(), config_file.read_text()
    header, _ = header_of(file)
    begin = len(data) - max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
    ours = [
        begin + offset
        for name, entry in header.items()
        if name.rpartition(".")[2].startswith("weight_")
        for offset in range(*entry["data_offsets"])
    ]
    expected = logits(AutoModelForCausalLM.from_pretrained(saved))
    refused = 0
    for _ in range(25):
        mutated, description = bytearray(data), json.loads(config)
        kind = rng.randrange(3)
        if kind == 0:
            mutated[rng.choice(ours)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del mutated[rng.randrange(len(mutated)) :]
        else:
            entry = rng.choice(list(description["quantization_config"]["layers"].values()))
            key = rng.choice(sorted(entry))
            entry[key] = rng.choice([0, -1, 2**40, 1.5, None, "", "bf16", [], {}, True, 33])
        file.write_bytes(mutated)
        config_file.write_text(json.dumps(description))
        try:
            model = AutoModelForCausalLM.from_pretrained(saved)
        except ValueError as error:
            assert "model." in str(error), error
            refused += 1
        else:
            assert torch.equal(logits(model), expected)
    assert refused >= 15


def test_the_registration_is_idempotent():
    import importlib

    importlib.reload(checkpoint)
    assert Path(checkpoint.__file__).name == "checkpoint.py"
