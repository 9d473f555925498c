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

import copy
import json
import shutil
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import fresh
from support.models import ARCHITECTURES, outputs, tiny_bert, tiny_gpt2, tiny_llama, tokens
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)

from peft_elastic.layers.gptq_format import FORMATS, TENSORS, pack_gptq, unpack_gptq
from peft_elastic.pruning import MagnitudeConfig, prune
from peft_elastic.quantization import GPTQConfig, Grid, QuantizedLinear, RTNConfig, load_gptq, quantize, save_gptq


def random_layer(bits, out_features, in_features, group_size, act_order, seed, lowest_zero=0):
    """As of `QuantizedLinear.quantized()`."""
    generator = torch.Generator().manual_seed(seed)
    groups = in_features // group_size
    g_idx = None
    if act_order:
        g_idx = (torch.arange(in_features) // group_size)[torch.randperm(in_features, generator=generator)].int()
    return {
        "q": torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8),
        "scales": torch.rand(out_features, groups, generator=generator).half() + 0.01,
        "zeros": torch.randint(lowest_zero, 2**bits, (out_features, groups), generator=generator, dtype=torch.uint8),
        "g_idx": g_idx,
        "group_size": group_size,
        "bits": bits,
    }


def shape_of(layer, checkpoint_format="gptq"):
    out_features, in_features = layer["q"].shape
    return {
        "out_features": out_features, "in_features": in_features, "bits": layer["bits"],
        "group_size": layer["group_size"], "checkpoint_format": checkpoint_format,
    }  # fmt: skip


def quantized_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def assert_same_layers(a, b):
    a, b = quantized_layers(a), quantized_layers(b)
    assert a.keys() == b.keys() and a
    for name in a:
        for key, value in a[name].quantized().items():
            other = b[name].quantized()[key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, (name, key)


# --- one layer -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([2, 4, 8]), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.booleans(),
    st.sampled_from(FORMATS), st.integers(0, 2**16),
)  # fmt: skip
def test_pack_and_unpack(bits, outputs_, inputs, groups, act_order, checkpoint_format, seed):
    per_word = 32 // bits
    layer = random_layer(bits, outputs_ * per_word, inputs * groups * per_word, inputs * per_word, act_order, seed)
    tensors = pack_gptq("layer", layer, checkpoint_format)
    assert [tensors[key].dtype for key in TENSORS] == [torch.int32, torch.int32, torch.float16, torch.int32]
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    back = unpack_gptq("layer", tensors, **shape_of(layer, checkpoint_format))
    for key, value in layer.items():
        if key == "g_idx" and value is not None and bool((value.diff() >= 0).all()):
            value = None  # a permutation that changes nothing
        assert torch.equal(value, back[key]) if isinstance(value, torch.Tensor) else back[key] == value, key


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_layout_bit_by_bit(bits):
    per_word = 32 // bits
    layer = random_layer(bits, per_word, 2 * per_word, per_word, False, 0, lowest_zero=1)
    for checkpoint_format, offset in (("gptq", 1), ("gptq_v2", 0)):
        tensors = pack_gptq("layer", layer, checkpoint_format)
        for i in range(2 * per_word):
            for o in range(per_word):
                word = tensors["qweight"][i // per_word, o].item() & 0xFFFFFFFF
                assert (word >> (i % per_word * bits)) & (2**bits - 1) == layer["q"][o, i]
        for group in range(2):
            word = tensors["qzeros"][group, 0].item() & 0xFFFFFFFF
            for o in range(per_word):
                assert (word >> (o * bits)) & (2**bits - 1) == layer["zeros"][o, group] - offset
        assert torch.equal(tensors["scales"], layer["scales"].T)
        assert tensors["g_idx"].tolist() == [0] * per_word + [1] * per_word


@pytest.mark.parametrize("what, shape", [("outputs", (12, 16)), ("inputs", (16, 12))])
def test_shapes_that_do_not_fill_words(what, shape):
    layer = random_layer(4, *shape, 4, False, 0)
    with pytest.raises(ValueError, match=rf"model.q has 12 {what}; .* only multiples of 8 are allowed"):
        pack_gptq("model.q", layer, "gptq")
    with pytest.raises(ValueError, match=rf"model.q has 12 {what}"):
        unpack_gptq("model.q", {}, **shape_of(layer))


@pytest.mark.parametrize(
    "tensor, change, message",
    [
        *((key, None, "is missing") for key in TENSORS),
        ("qweight", lambda t: t.long(), "must be torch.int32.*, got torch.int64"),
        ("qzeros", lambda t: t.float(), "must be torch.int32.*, got torch.float32"),
        ("scales", lambda t: t.int(), "must be torch.float16.*, got torch.int32"),
        ("g_idx", lambda t: t.to(torch.uint8), "must be .*got torch.uint8"),
        ("qweight", lambda t: t[:-1], r"is \(3, 16\); a layer 16 x 32 with 4 bits and groups of 8 has \(4, 16\)"),
        ("qzeros", lambda t: t.T.contiguous(), r"is \(2, 4\)"),
        ("scales", lambda t: t[:2], r"is \(2, 16\)"),
        ("g_idx", lambda t: t[None], r"is \(1, 32\)"),
        ("g_idx", lambda t: t - 1, "must be 0 to 3; it runs from -1 to 2"),
        ("g_idx", lambda t: t + 1, "must be 0 to 3; it runs from 1 to 4"),
        ("g_idx", lambda t: t * 0, "has 32 inputs in group 0; groups have 8"),
        ("scales", lambda t: t.index_fill(0, torch.tensor(1), float("nan")), "must be finite in float16"),
        ("scales", lambda t: t * float("inf"), "must be finite in float16"),
        ("scales", lambda t: t.float() * 1e6, "must be finite in float16"),
        ("scales", lambda t: t.float() * 1e-7, "has .* values that are too small for float16"),
    ],
)
def test_damaged_tensors(tensor, change, message):
    layer = random_layer(4, 16, 32, 8, False, 0)
    tensors = pack_gptq("model.q", layer, "gptq")
    if change is None:
        del tensors[tensor]
    else:
        tensors[tensor] = change(tensors[tensor])
    with pytest.raises(ValueError, match=f"model.q.{tensor} {message}"):
        unpack_gptq("model.q", tensors, **shape_of(layer))


@pytest.mark.parametrize(
    "key, value",
    [("bits", 3), ("bits", "4"), ("bits", None), ("group_size", 0), ("group_size", "128"), ("group_size", 16)],
)
def test_a_config_that_does_not_fit_the_tensors(key, value):
    layer = random_layer(4, 16, 32, 8, False, 0)
    tensors = pack_gptq("model.q", layer, "gptq")
    with pytest.raises(ValueError, match=rf"model\.q.*{key}|model\.q\.qzeros is \(4, 2\)"):
        unpack_gptq("model.q", tensors, **shape_of(layer) | {key: value})


def test_other_dtypes_of_scales():
    layer = random_layer(4, 16, 32, 8, False, 0)
    layer["scales"] = layer["scales"].bfloat16().half()
    tensors = pack_gptq("q", layer, "gptq_v2")
    for dtype in (torch.float32, torch.bfloat16):
        back = unpack_gptq("q", tensors | {"scales": tensors["scales"].to(dtype)}, **shape_of(layer, "gptq_v2"))
        assert torch.equal(back["scales"], layer["scales"]) and back["scales"].dtype == torch.float16


# --- checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, checkpoint_format",
    [
        (GPTQConfig(group_size=16), None),
        (GPTQConfig(group_size=16, act_order=True), "gptq"),
        (RTNConfig(bits=2, group_size=16, symmetric=True), None),
        (RTNConfig(bits=8, group_size=-1), "gptq_v2"),
    ],
)
def test_save_and_load(config, checkpoint_format, tmp_path):
    model = tiny_llama()
    prune(model, MagnitudeConfig(sparsity=0.5), progress=False)
    quantize(model, config, [tokens()], progress=False)
    save_gptq(model, tmp_path / "out", checkpoint_format=checkpoint_format)
    assert not hasattr(model.config, "quantization_config") and [p.name for p in tmp_path.iterdir()] == ["out"]
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert entry == json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert entry["quant_method"] == "gptq" and entry["bits"] == config.bits and entry["sym"] == config.symmetric
    assert entry["group_size"] == config.group_size and entry["desc_act"] is False and "dynamic" not in entry
    assert entry["checkpoint_format"] == (checkpoint_format or ("gptq" if config.symmetric else "gptq_v2"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight" not in stored and "lm_head.weight" in stored
    loaded = load_gptq(tmp_path / "out")
    assert_same_layers(model, loaded)
    assert torch.equal(outputs(loaded, {"input_ids": tokens()}), outputs(model, {"input_ids": tokens()}))
    assert all(layer.exact for layer in quantized_layers(loaded).values())
    assert not loaded.training and loaded.dtype == torch.float32


@pytest.mark.parametrize(
    "architecture, auto_class",
    [("gpt2", AutoModelForCausalLM), ("bert", AutoModelForSequenceClassification), ("t5", AutoModelForSeq2SeqLM),
     ("gemma", AutoModelForCausalLM), ("opt", AutoModelForCausalLM)],
)  # fmt: skip
def test_architectures(architecture, auto_class, tmp_path):
    model, inputs = ARCHITECTURES[architecture].build(), ARCHITECTURES[architecture].inputs()
    quantize(model, RTNConfig(group_size=16), progress=False)
    save_gptq(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_gptq(tmp_path, auto_class=auto_class)
    assert_same_layers(model, loaded)
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    loaded.save_pretrained(tmp_path / "plain")  # exact: an ordinary checkpoint, Conv1D the right way round
    plain = auto_class.from_pretrained(tmp_path / "plain")
    assert torch.equal(outputs(plain, inputs), outputs(model, inputs))
    if architecture == "gemma":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_fresh_process(tmp_path):
    model = tiny_llama()
    quantize(model, GPTQConfig(group_size=16), [tokens()], progress=False)
    model.generation_config.max_length = 33
    tokenizer = types.SimpleNamespace(save_pretrained=lambda folder: (folder / "tokenizer.txt").write_text("words"))
    save_gptq(model, tmp_path / "out", tokenizer=tokenizer)
    assert (tmp_path / "out" / "tokenizer.txt").read_text() == "words"
    torch.save({"ids": tokens(), "logits": outputs(model, {"input_ids": tokens()})}, tmp_path / "expected.pt")
    torch.save({name: layer.integers() for name, layer in quantized_layers(model).items()}, tmp_path / "integers.pt")
    code = """if True:
        import sys, torch
        from peft_elastic.quantization import QuantizedLinear, load_gptq
        torch.set_num_threads(1)
        model = load_gptq(sys.argv[1] + "/out")
        expected = torch.load(sys.argv[1] + "/expected.pt")
        with torch.no_grad():
            assert torch.equal(model(expected["ids"]).logits, expected["logits"])
        integers = torch.load(sys.argv[1] + "/integers.pt")
        layers = {n: m.integers() for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        assert layers.keys() == integers.keys() and all(torch.equal(layers[n], integers[n]) for n in layers)
        assert model.generation_config.max_length == 33
        print("the same")
    """
    run = fresh.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "the same" in run.stdout, run.stderr


def act_order_model():
    """As GPTQModel's `desc_act` leaves it: groups whose inputs are not next to each other, zero points of 0."""
    model = tiny_llama()
    prune(model, MagnitudeConfig(sparsity=0.3), progress=False)
    for seed, (name, linear) in enumerate(list(model.named_modules())):
        if isinstance(linear, nn.Linear) and "layers" in name:
            layer = random_layer(4, *linear.weight.shape, 16, True, seed)
            layer["scales"] *= 0.05
            grid = Grid(
                layer["scales"], layer["zeros"].int(), in_features=linear.in_features, bits=4, g_idx=layer["g_idx"]
            )
            model.set_submodule(name, QuantizedLinear.from_linear(linear, grid))
    return model


def test_act_order(tmp_path):
    model = act_order_model()
    with pytest.raises(ValueError, match=r"`checkpoint_format` is 'gptq', which cannot hold the zero points of 0"):
        save_gptq(model, tmp_path / "v1", checkpoint_format="gptq")
    assert not (tmp_path / "v1").exists()
    save_gptq(model, tmp_path / "v2")
    entry = json.loads((tmp_path / "v2" / "config.json").read_text())["quantization_config"]
    assert entry["desc_act"] is True and entry["checkpoint_format"] == "gptq_v2"
    loaded = load_gptq(tmp_path / "v2")
    assert_same_layers(model, loaded)
    assert not any(layer.grid.in_order for layer in quantized_layers(loaded).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("from_path", [True, False])
def test_with_the_dense_original(dtype, from_path, tmp_path):
    dense = tiny_llama()
    prune(dense, MagnitudeConfig(sparsity=0.3), progress=False)
    dense.save_pretrained(tmp_path / "dense")
    model = copy.deepcopy(dense)
    quantize(model, GPTQConfig(group_size=16), [tokens()], progress=False)
    save_gptq(model, tmp_path / "out")
    loaded = load_gptq(tmp_path / "out", dense=tmp_path / "dense" if from_path else dense, dtype=dtype)
    unchanged, nonzero = 0, 0
    for name, layer in quantized_layers(loaded).items():
        original = dense.get_submodule(name).weight.to(dtype)
        integers = quantized_layers(model)[name].integers()
        assert torch.equal(layer.integers(), integers) and layer.weight.dtype == dtype
        zero = layer.grid.round(layer.weight) == 0
        assert zero[original == 0].all() and (layer.weight[zero] == 0).all() and (layer.weight[~zero] != 0).all()
        agrees = (layer.grid.quantize(original) == integers) & ~zero
        assert torch.equal(layer.weight[agrees], original[agrees])
        unchanged, nonzero = unchanged + agrees.sum(), nonzero + (~zero).sum()
    assert 0.5 < unchanged / nonzero < 1
    with pytest.raises(ValueError, match=r"save_gptq"):
        loaded.save_pretrained(tmp_path / "refused")


def test_the_wrong_dense_original(tmp_path):
    model = tiny_llama()
    quantize(model, RTNConfig(group_size=16), progress=False)
    save_gptq(model, tmp_path)
    for dense, message in (
        (
            tiny_llama(intermediate_size=64),
            r"`dense`: model.layers.0.mlp.down_proj must be .*\(32, 48\); it is .*\(32, 64\)",
        ),
        (tiny_llama(num_hidden_layers=1), r"`dense`: model.layers.1.mlp.down_proj must be .*not there"),
        (nn.Linear(3, 3), r"`dense`: model.layers.0.mlp.down_proj must be .*not there"),
    ):
        with pytest.raises(ValueError, match=message):
            load_gptq(tmp_path, dense=dense)


def test_layers_that_differ(tmp_path):
    """8 bits here, larger groups there, one block left out: as `dynamic` rules, one for all blocks where possible."""
    model = tiny_llama()
    quantize(
        model, RTNConfig(group_size=16, exclude_modules=["down_proj", "o_proj", "0.self_attn.q_proj"]), progress=False
    )
    quantize(model, RTNConfig(bits=8, group_size=24, target_modules=["down_proj"]), progress=False)
    save_gptq(model, tmp_path / "mixed")
    entry = json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]
    assert entry["dynamic"] == {
        r"+:^model\.layers\.\d+\.mlp\.down_proj$": {"bits": 8, "group_size": 24},
        r"-:^model\.layers\.\d+\.self_attn\.o_proj$": {},
        r"-:^model\.layers\.0\.self_attn\.q_proj$": {},
    }
    assert set(entry["modules_in_block_to_quantize"][0]) == quantized_layers(model).keys()
    loaded = load_gptq(tmp_path / "mixed")
    assert_same_layers(model, loaded)
    assert type(loaded.model.layers[0].self_attn.o_proj) is nn.Linear
    assert torch.equal(outputs(loaded, {"input_ids": tokens()}), outputs(model, {"input_ids": tokens()}))

    model = tiny_llama()
    quantize(model, RTNConfig(group_size=16, exclude_modules=["down_proj"]), progress=False)
    quantize(model, RTNConfig(group_size=16, target_modules=["lm_head"]), progress=False)
    save_gptq(model, tmp_path / "alike")
    entry = json.loads((tmp_path / "alike" / "config.json").read_text())["quantization_config"]
    assert list(entry["dynamic"]) == [r"-:^model\.layers\.\d+\.mlp\.down_proj$"] and entry["lm_head"] is True
    assert len(entry["modules_in_block_to_quantize"][0]) == 6
    assert_same_layers(model, load_gptq(tmp_path / "alike"))


def test_checkpoints_of_autogptq(tmp_path):
    """Its config is in a file of its own and names no format; the weights have a name of their own, and biases of zeros."""
    model = tiny_llama()
    quantize(model, RTNConfig(group_size=16), progress=False)
    save_gptq(model, tmp_path, checkpoint_format="gptq")
    tensors = load_file(tmp_path / "model.safetensors")
    for name, layer in quantized_layers(model).items():
        tensors[f"{name}.bias"] = torch.zeros(layer.out_features, dtype=torch.float16)
    save_file(tensors, tmp_path / "gptq_model-4bit-16g.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 16, "desc_act": false, "sym": false}')
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_layers(model, load_gptq(tmp_path, auto_class=LlamaForCausalLM))


def test_a_merged_model_is_saved_in_place_of_the_old(tmp_path):
    model = tiny_llama()
    quantize(model, RTNConfig(group_size=16), progress=False)
    save_gptq(model, tmp_path, max_shard_size="20KB")
    (tmp_path / "notes.txt").write_text("stays")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_gptq(tmp_path)
    with torch.no_grad():
        for layer in quantized_layers(loaded).values():
            layer.weight.add_(0.01)
    save_gptq(loaded, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "notes.txt", "quantize_config.json",
    ]  # fmt: skip
    assert_same_layers(loaded, load_gptq(tmp_path))


def test_an_interrupted_save_leaves_the_old_model(tmp_path, monkeypatch):
    model = tiny_llama()
    quantize(model, RTNConfig(group_size=16), progress=False)
    save_gptq(model, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    tokenizer = types.SimpleNamespace(save_pretrained=lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_gptq(model, tmp_path / "out", checkpoint_format="gptq", tokenizer=tokenizer)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match=r"save_gptq"):  # and the model is guarded as it was
        model.save_pretrained(tmp_path / "refused")


def test_models_that_cannot_be_saved(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"`model` has no quantised layers"):
        save_gptq(model, tmp_path / "x")
    quantize(model, RTNConfig(group_size=16), progress=False)
    with pytest.raises(ValueError, match=r"`checkpoint_format` must be 'gptq' or 'gptq_v2', got 'marlin'"):
        save_gptq(model, tmp_path / "x", checkpoint_format="marlin")
    with pytest.raises(ValueError, match=r"`model` is a LlamaMLP; it must be a model of transformers"):
        save_gptq(model.model.layers[0].mlp, tmp_path / "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`save_directory` is .*file', which is a file"):
        save_gptq(model, tmp_path / "file")
    with pytest.raises(ValueError, match=r"`model` has adapters; save_gptq\(model.merge_and_unload\(\), ...\)"):
        save_gptq(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), tmp_path / "x")
    odd = tiny_llama(intermediate_size=44)
    quantize(odd, RTNConfig(group_size=4), progress=False)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.gate_proj has 44 outputs; .*multiples of 8"):
        save_gptq(odd, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- damaged checkpoints -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = tiny_llama()
    quantize(model, RTNConfig(group_size=16), progress=False)
    folder = tmp_path_factory.mktemp("gptq") / "model"
    save_gptq(model, folder)
    return folder


def edit_tensors(**changes):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        for name, change in changes.items():
            name = name.replace("__", ".")
            if change is None:
                del tensors[name]
            else:
                tensors[name] = change(tensors.get(name)).contiguous()
        save_file(tensors, folder / "model.safetensors")

    return edit


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            if value is None:
                config["quantization_config"].pop(key)
            else:
                config["quantization_config"][key] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


def without_config(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").unlink()


def write(name, text, remove=None):
    def edit(folder):
        (folder / name).write_text(text)
        if remove:
            (folder / remove).unlink()

    return edit


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


_Q = "model__layers__0__self_attn__q_proj__"


@pytest.mark.parametrize(
    "damage, message",
    [
        (edit_tensors(**{_Q + "qzeros": None}), r"self_attn.q_proj.qzeros is missing"),
        (edit_tensors(**{_Q + "qweight": None}), r"self_attn.q_proj.qweight is missing"),
        (edit_tensors(**{_Q + "scales": lambda t: t * float("nan")}), r"q_proj.scales must be finite in float16"),
        (edit_tensors(**{_Q + "g_idx": lambda t: t + 7}), r"q_proj.g_idx must be 0 to 1"),
        (edit_tensors(**{_Q + "bias": lambda t: torch.ones(32)}), r"q_proj.bias is not zero"),
        (edit_tensors(**{"model__norm__weight": None}), r"lacks 1 tensors, such as model.norm.weight"),
        (edit_tensors(**{"model__norm__weight": lambda t: t[:5]}), r"does not fit its config"),
        (
            edit_tensors(other__qweight=lambda t: torch.zeros(4, 32, dtype=torch.int32)),
            r"other has quantised weights, but",
        ),
        (edit_config(bits=8), r"qweight is"),
        (edit_config(bits=3), r"bits must be .*got 3"),
        (edit_config(group_size=8), r"qzeros is"),
        (edit_config(bits=None), r"bits and group_size must be there"),
        (edit_config(quant_method="awq"), r"quant_method must be .*awq"),
        (edit_config(checkpoint_format="marlin"), r"checkpoint_format must be .*marlin"),
        (edit_config(pack_dtype="int16"), r"pack_dtype must be .*int16"),
        (edit_config(dynamic={"+:(": {}}), r"no regular expression"),
        (edit_config(dynamic=[1]), r"dynamic must be an object"),
        (without_config, r"is no GPTQ checkpoint"),
        (truncated, r"model.safetensors is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"must have model.safetensors.*found: none"),
        (write("model.safetensors.index.json", "{"), r"index.json is damaged: it is not JSON"),
        (
            write("model.safetensors.index.json", '{"weight_map": {"a": "../a"}}'),
            r"weight_map must give a file of this folder",
        ),
        (
            write("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}'),
            r"gone.safetensors is missing",
        ),
    ],
)
def test_damaged_checkpoints(damage, message, checkpoint, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_gptq(folder)


def test_bad_arguments_of_load_gptq(checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r"`dtype` must be .*, got torch.int8"):
        load_gptq(checkpoint, dtype=torch.int8)
    with pytest.raises(
        ValueError, match=r"`path` is .*nowhere/at/all'; it must be a folder or the name of a repository"
    ):
        load_gptq("nowhere/at/all")
    model = tiny_bert()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no GPTQ checkpoint"):
        load_gptq(tmp_path, auto_class=AutoModelForSequenceClassification)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 16}')
    with pytest.raises(ValueError, match=r"has no quantised layers"):
        load_gptq(tmp_path, auto_class=AutoModelForSequenceClassification)


def test_8_bits_do_not_fit_into_bfloat16(tmp_path):
    model = tiny_gpt2()
    quantize(model, RTNConfig(bits=8, group_size=16), progress=False)
    save_gptq(model, tmp_path)
    with pytest.raises(ValueError, match=r"`dtype` is torch.bfloat16, which cannot hold the 8-bit weights of"):
        load_gptq(tmp_path, dtype=torch.bfloat16)
    assert_same_layers(model, load_gptq(tmp_path, dtype=torch.float16))
