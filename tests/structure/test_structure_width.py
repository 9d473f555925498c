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
"""Elastic width: a narrowed model computes what the whole one computes without the other heads and channels, and computes less."""

import copy
import io
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from support import sparse_qa
from support.elastic_models import (
    ALL,
    RANK,
    SETTINGS,
    WIDTH,
    MatrixProducts,
    adapted,
    close,
    elastic,
    inputs_of,
    masked,
    readers,
    some_subnets,
)
from support.elastic_models import build as build_model
from support.models import (
    BLOCKS,
    TRANSFORMERS_ADAPTERS,
    default_dtype,
    outputs,
    randomize,
    tiny_gpt2,
    tiny_llama,
    tokens,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_elastic import ElasticLoraConfig, SparseQALoraConfig, quantize
from peft_elastic.layers.narrowed import plain_class
from peft_elastic.structure.narrow import is_narrowed
from peft_elastic.supernet import get_elastic_host


pytestmark = pytest.mark.filterwarnings("ignore")


def loss_of(model, inputs):
    logits = model(**inputs).logits
    return (logits * torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)).square().mean()


def gradients(model, inputs):
    model.zero_grad()
    loss_of(model, inputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- every architecture against the masked model -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_outputs_and_gradients_are_those_of_the_masked_model(name):
    model, inputs = elastic(name, torch.float64)
    choices = [choice for choice in model.search_space if choice.kind != "rank"]
    assert {choice.key for choice in choices} == set(readers(name))
    whole = outputs(model, inputs)
    for subnet in some_subnets(model):
        model.set_subnet("max")
        with masked(model, name, subnet):
            expected, logits = gradients(model, inputs), outputs(model, inputs)
        model.set_subnet(subnet)
        assert model.active_subnet == subnet
        found = gradients(model, inputs)
        close(outputs(model, inputs), logits, 1e-10)
        assert found.keys() == expected.keys()
        for key in found:
            close(found[key], expected[key], 1e-10)
        assert (logits - whole).abs().max() > 1e-3
    model.set_subnet("max")
    assert torch.equal(outputs(model, inputs), whole)


@pytest.mark.parametrize("name", ALL)
def test_less_is_computed(name):
    """The products of the narrowed base are those of the model that is physically smaller."""
    model, inputs = elastic(name)
    for subnet in some_subnets(model, 1):
        model.set_subnet(subnet)
        with MatrixProducts() as narrowed:
            found = outputs(model, inputs)
        smaller = model.extract_subnet(sparse_kernel=False)
        with MatrixProducts() as expected:
            close(outputs(smaller, inputs), found, 3e-5)  # sums in other orders
        assert narrowed.of_base == expected.of_base and expected.of_base
    model.set_subnet("max")
    with MatrixProducts() as whole:
        outputs(model, inputs)
    assert whole.of_base != narrowed.of_base and whole.of_base.total() == narrowed.of_base.total()


def test_less_is_computed_in_training():
    # sizes of which no two are equal: 4 heads of 12 are 48 features, of the 32 of the residual stream
    model = adapted(
        tiny_llama(head_dim=12, intermediate_size=40), elastic_width={"heads": [4, 2], "mlp": [40, 16]}
    ).train()
    inputs = inputs_of("llama")
    sizes = {}
    for subnet in ("max", "min"):
        model.set_subnet(subnet)
        model.zero_grad()
        with MatrixProducts() as products:
            loss_of(model, inputs).backward()
        sizes[subnet] = {size for shape in products.shapes for size in shape}
        assert any(RANK in shape for shape in products.shapes)
    assert {48, 40} <= sizes["max"] and not {48, 40} & sizes["min"]
    assert {24, 16} <= sizes["min"]


def test_gradients_are_those_of_stock_lora_on_a_smaller_llama():
    """Heads 0 and 1 with the first key and value head, and 24 channels, cut out by hand."""
    model = adapted(tiny_llama(), elastic_width={"heads": [4, 2], "mlp": [48, 24]})
    state = {k.replace(".base_layer", "").removeprefix("base_model.model."): v for k, v in model.state_dict().items()}
    rows = {"q_proj": 16, "k_proj": 8, "v_proj": 8, "gate_proj": 24, "up_proj": 24}
    columns = {"o_proj": 16, "down_proj": 24}

    def cut(key, tensor):
        layer = next((name for name in [*rows, *columns] if f".{name}." in key), "")
        if layer in rows and "lora_A" not in key:
            return tensor[: rows[layer]]
        return tensor[:, : columns[layer]] if layer in columns and "lora_B" not in key else tensor

    small = tiny_llama(num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=24)
    small = get_peft_model(small, LoraConfig(r=RANK, lora_alpha=10, target_modules="all-linear")).eval()
    own = {k.replace(".base_layer", "").removeprefix("base_model.model."): v for k, v in small.state_dict().items()}
    assert own.keys() == state.keys()
    for key, tensor in own.items():
        tensor.copy_(cut(key, state[key]))
    model.set_subnet("min")
    inputs = inputs_of("llama")
    close(outputs(model, inputs), outputs(small, inputs), 1e-6)
    found, expected = gradients(model, inputs), gradients(small, inputs)
    assert found.keys() == expected.keys() and len(found) == 28
    for key in found:
        close(cut(key, found[key]), expected[key], 1e-5)
        assert found[key].count_nonzero() == cut(key, found[key]).count_nonzero()  # and nothing elsewhere


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "bert"])
def test_attention_implementations(name, attention):
    model, inputs = elastic(name)
    model.get_base_model().set_attn_implementation(attention)
    subnet = model.search_space.min
    with masked(model, name, subnet):
        expected = outputs(model, inputs)
    model.set_subnet(subnet)
    close(outputs(model, inputs), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model, inputs = elastic("llama")
    model.train()
    model.set_subnet(model.search_space.sample(3))
    expected = gradients(model, inputs)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    found = gradients(model, inputs)
    assert found.keys() == expected.keys()
    for key in found:
        close(found[key], expected[key], 1e-6)


def test_autocast_and_bfloat16():
    model, inputs = elastic("llama")
    subnet = model.search_space.min
    for cast in (True, False):
        model = model if cast else model.bfloat16()
        model.set_subnet("max")
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            with masked(model, "llama", subnet):
                expected = outputs(model, inputs)
            model.set_subnet(subnet)
            close(outputs(model, inputs).float(), expected.float(), 0.05)


# -- with elastic ranks, masks, grids and quantised bases --------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "t5"])
def test_with_elastic_ranks(name):
    model, inputs = elastic(name, torch.float64, elastic_ranks=[RANK, 2], rank_groups="block")
    for seed in range(3):
        subnet = model.search_space.sample(seed)
        model.set_subnet({**subnet, **{key: model.search_space.max[key] for key in readers(name)}})
        with masked(model, name, subnet):
            expected = outputs(model, inputs)
        model.set_subnet(subnet)
        close(outputs(model, inputs), expected, 1e-10)


@pytest.mark.parametrize("kind", sparse_qa.ALL_KINDS)
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox"])
def test_masks_and_grids_follow_the_width(name, kind):
    with default_dtype(torch.float64):
        base = sparse_qa.pruned(build_model(name).double())
        settings = {**SETTINGS, "elastic_ranks": [RANK, 3], **sparse_qa.ALL_KINDS[kind]}
        model = get_peft_model(base, SparseQALoraConfig(**settings)).eval()
    randomize(model)
    inputs = inputs_of(name)
    whole = {key: model.search_space.max[key] for key in readers(name)}
    for subnet in some_subnets(model):
        model.set_subnet({**subnet, **whole})
        with masked(model, name, subnet):
            expected, slopes = outputs(model, inputs), gradients(model, inputs)
        model.set_subnet(subnet)
        close(outputs(model, inputs), expected, 1e-9)
        found = gradients(model, inputs)
        assert found.keys() == slopes.keys()
        for key in found:
            close(found[key], slopes[key], 1e-9)
        extracted = model.extract_subnet(sparse_kernel=False)
        close(outputs(extracted, inputs), expected, 1e-9)
        if "sparse" in kind:
            for path, layer in extracted.named_modules():
                if isinstance(layer, (nn.Linear, Conv1D)) and path.startswith(BLOCKS[name].path.partition("{")[0]):
                    assert 0.3 < (layer.weight == 0).double().mean() < 0.7


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("aware", [False, True])
def test_quantised_bases(name, method, aware):
    from peft_elastic import GPTQConfig, RTNConfig

    base = build_model(name)
    config = (RTNConfig if method == "rtn" else GPTQConfig)(bits=4, group_size=16)
    inputs = inputs_of(name)
    quantize(base, config, **({"calibration": [inputs]} if method == "gptq" else {}))
    config = SparseQALoraConfig(**SETTINGS, sparse_adapter=False, quantization_aware=True) if aware else None
    model = get_peft_model(base, config or ElasticLoraConfig(**SETTINGS)).eval()
    randomize(model)
    for subnet in some_subnets(model):
        model.set_subnet("max")
        with masked(model, name, subnet):
            expected = outputs(model, inputs)
        model.set_subnet(subnet)
        close(outputs(model, inputs), expected)
        if aware:
            close(outputs(model.extract_subnet(sparse_kernel=False), inputs), expected)
        else:
            with pytest.raises(ValueError, match="is quantised and adapter 'default' is not quantisation-aware"):
                model.merge_and_unload()
            close(outputs(model, inputs), expected)  # nothing has been changed


BNB_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8}


def bitsandbytes_llama(bits):
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_llama(**BNB_SIZES)
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and path != "lm_head":
            if bits == 4:
                new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
            model.set_submodule(path, new)
    if bits == 4:
        model.is_loaded_in_4bit = True
    else:
        model.is_loaded_in_8bit = True
    return model.to("cpu")


@pytest.mark.parametrize("adapter", ["plain", "masked"])
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, adapter):
    model = bitsandbytes_llama(bits)
    config = ElasticLoraConfig(**SETTINGS) if adapter == "plain" else SparseQALoraConfig(**SETTINGS)
    model = get_peft_model(model, config).eval()
    randomize(model, std=0.1)
    inputs = inputs_of("llama")
    whole = outputs(model, inputs)
    subnet = {**model.search_space.min, "mlp:model.layers.1": 128}

    # 8-bit products round the activations too, so the reference computes with the dequantised weights
    def dense_copy():
        from peft_elastic.layers.backends.bitsandbytes import dequantize

        dense = tiny_llama(**BNB_SIZES)
        for path, layer in model.get_base_model().named_modules():
            if isinstance(layer, LoraLayer):
                base = layer.get_base_layer()
                dense.get_submodule(path).weight.data = dequantize(base.weight, getattr(base, "state", None)).float()
        dense = get_peft_model(dense, config).eval()
        dense.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
        return dense

    dense = dense_copy()

    def far(a, b):
        return ((a - b).norm() / b.norm()).item()

    # of bfloat16, or of rounded activations
    tolerance = 0.02 if bits == 4 else 0.1
    dense.set_subnet("max")
    assert far(whole, outputs(dense, inputs)) < tolerance
    with masked(dense, "llama", subnet):
        expected = outputs(dense, inputs)
    model.set_subnet(subnet)
    assert far(outputs(model, inputs), expected) < tolerance
    assert far(expected, whole) > 0.3
    gradients_found = gradients(model, inputs)
    assert all(torch.isfinite(g).all() for g in gradients_found.values()) and len(gradients_found) == 28
    model.set_subnet("max")
    assert far(outputs(model, inputs), whole) < tolerance
    model.set_subnet(subnet)
    extracted = model.extract_subnet(sparse_kernel=False)
    assert far(outputs(extracted, inputs), expected) < tolerance  # and all of it in floating point
    assert all(type(m) is not type(model) and "bnb" not in type(m).__module__ for m in extracted.modules())
    assert not hasattr(extracted, f"is_loaded_in_{bits}bit")
    assert type(extracted.model.layers[0].mlp.up_proj) is nn.Linear
    assert extracted.model.layers[0].mlp.up_proj.weight.shape == (24, 64)


# -- what stays as it was ----------------------------------------------------------------------------------------------


def test_the_whole_model_is_not_touched():
    base = tiny_llama()
    before = {name: (type(module), dict(module.__dict__)) for name, module in base.named_modules()}
    weights = {name: parameter.clone() for name, parameter in base.named_parameters()}
    model = adapted(base)
    keys = list(model.state_dict())
    for seed in range(3):
        model.set_subnet(model.search_space.sample(seed))
        assert list(model.state_dict()) == keys  # and nothing but whole tensors
        assert all(tensor.shape == weights.get(k, tensor).shape for k, tensor in model.state_dict().items())
    model.set_subnet("min")
    assert is_narrowed(model)
    base = model.unload()
    assert not is_narrowed(base)
    for name, module in base.named_modules():
        cls, attributes = before[name]
        assert type(module) is cls
        assert {k: v for k, v in module.__dict__.items() if isinstance(v, (int, float, str))} == {
            k: v for k, v in attributes.items() if isinstance(v, (int, float, str))
        }
    assert all(torch.equal(parameter, weights[name]) for name, parameter in base.named_parameters())


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_copies_and_pickles_of_a_narrowed_model(name):
    model, inputs = elastic(name, elastic_depth=[1, "0.mlp"])
    model.set_subnet(model.search_space.min)
    expected = outputs(model, inputs)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (twin, torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(other, inputs), expected)
        other.set_subnet("max")
        model.set_subnet("max")
        assert torch.equal(outputs(other, inputs), outputs(model, inputs))
        other.set_subnet("min")
        model.set_subnet("min")
        assert torch.equal(outputs(other, inputs), outputs(model, inputs))
        assert {type(m).__name__ for m in other.modules()} == {type(m).__name__ for m in model.modules()}
        assert {plain_class(m).__module__ for m in other.modules()} == {
            plain_class(m).__module__ for m in model.modules()
        }


def test_the_weight_of_a_narrowed_layer_cannot_be_replaced_by_accident():
    model, _ = elastic("llama")
    model.set_subnet("min")
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.shape == (8, 32) and layer._parameters["weight"].shape == (48, 32)
    assert "active=(8, 32)" in repr(layer)
    with pytest.raises(TypeError, match="cannot assign"):
        layer.weight = layer.weight * 2


@pytest.mark.parametrize("name", ["llama", "phi3", "t5", "bert"])
def test_save_and_load(tmp_path, name):
    model, inputs = elastic(name, elastic_ranks=[RANK, 2])
    for subnet in some_subnets(model, 1):
        model.set_subnet(subnet)
        expected = outputs(model, inputs)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(build_model(name), tmp_path).eval()
        assert loaded.active_subnet == subnet and loaded.search_space == model.search_space
        assert torch.equal(outputs(loaded, inputs), expected)
        trainable = PeftModel.from_pretrained(build_model(name), tmp_path, is_trainable=True).eval()
        assert torch.equal(outputs(trainable, inputs), expected)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["elastic_width"] == WIDTH and saved["sorted_base"] is False


def test_counts_of_adapter_parameters():
    model, _ = elastic("llama", elastic_ranks=[RANK, 2])
    for subnet in some_subnets(model):
        model.set_subnet(subnet)
        active = sum(
            factor.weight.numel()
            for layer in model.modules()
            if isinstance(layer, LoraLayer)
            for factor in (layer.lora_A["default"], layer.lora_B["default"])
        )
        assert model.search_space.count_parameters(subnet) == active


def test_the_space_survives_json():
    space = elastic("t5", elastic_depth=["encoder.block.1", "decoder.block.1.attention"])[0].search_space
    assert type(space).from_json(space.to_json()) == space


# -- several adapters --------------------------------------------------------------------------------------------------


def two_adapters():
    """ "a" narrowed, "b" whole and without any choice of width, on one base."""
    model, inputs = elastic("llama", adapter_name="a")
    model.set_subnet("min")
    model.add_adapter("b", ElasticLoraConfig(r=4, elastic_ranks=[4, 2], target_modules=["q_proj", "down_proj"]))
    randomize(model, seed=5, adapter_name="b")
    return model.eval(), inputs


def alone(adapter_name):
    model = tiny_llama()
    if adapter_name == "a":
        model = adapted(model)
        model.set_subnet("min")
    else:
        model = get_peft_model(
            model,
            ElasticLoraConfig(r=4, elastic_ranks=[4, 2], target_modules=["q_proj", "down_proj"]),
            adapter_name="b",
        ).eval()
        randomize(model, seed=5, adapter_name="b")
    return model


def test_set_adapter():
    model, inputs = two_adapters()
    a, b = outputs(alone("a"), inputs), outputs(alone("b"), inputs)
    base = outputs(tiny_llama(), inputs)
    for name, expected in (("a", a), ("b", b), ("a", a)):
        model.set_adapter(name)
        assert is_narrowed(model) == (name == "a")
        close(outputs(model, inputs), expected)
        with model.disable_adapter():
            close(outputs(model, inputs), base)
            assert not is_narrowed(model)
        assert is_narrowed(model) == (name == "a")
    # both: "b" is narrowed along
    model.base_model.set_adapter(["a", "b"])
    both = outputs(model, inputs)
    assert torch.isfinite(both).all() and (both - a).abs().max() > 1e-3
    model.base_model.set_adapter("b")
    # the subnet of an adapter that is not active does not touch the base
    model.set_subnet(model.base_model.get_search_space("a").sample(1), adapter_name="a")
    close(outputs(model, inputs), b)


def test_deleting_the_narrowed_adapter_gives_the_base_back():
    model, inputs = two_adapters()
    model.delete_adapter("a")
    assert not is_narrowed(model)
    model.set_adapter("b")
    close(outputs(model, inputs), outputs(alone("b"), inputs))


@pytest.mark.parametrize("second", ["masked", "grid"])
def test_an_adapter_added_to_a_narrowed_base_is_whole(second):
    model, inputs = two_adapters()
    del model, inputs
    base = sparse_qa.pruned(tiny_llama())
    first = SparseQALoraConfig(**SETTINGS)
    model = get_peft_model(base, first, adapter_name="a").eval()
    model.set_subnet("min")
    settings = sparse_qa.QUANTIZED if second == "grid" else {}
    config = SparseQALoraConfig(r=4, elastic_ranks=[4], target_modules=["o_proj", "up_proj"], **settings)
    model.add_adapter("b", copy.deepcopy(config))
    model.set_adapter("b")
    randomize(model, seed=2, adapter_name="b")
    expected = get_peft_model(sparse_qa.pruned(tiny_llama()), config, adapter_name="b").eval()
    randomize(expected, seed=2, adapter_name="b")
    close(outputs(model, {"input_ids": tokens()}), outputs(expected, {"input_ids": tokens()}))


def test_different_widths_cannot_be_active_together():
    model, inputs = elastic("llama", adapter_name="a")
    model.add_adapter("b", ElasticLoraConfig(**SETTINGS))
    model.set_subnet("min", adapter_name="a")
    expected = outputs(model, inputs)
    with pytest.raises(ValueError, match=r"\['a', 'b'\] cannot be active together: their subnets differ in the width"):
        model.base_model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"] and torch.equal(outputs(model, inputs), expected)
    model.set_subnet("min", adapter_name="b")
    model.base_model.set_adapter(["a", "b"])  # the same width
    expected = outputs(model, inputs)
    with pytest.raises(ValueError, match="cannot be active together"):
        model.set_subnet("max", adapter_name="b")
    assert model.base_model.get_active_subnet("b") == model.base_model.get_search_space("b").min
    assert torch.equal(outputs(model, inputs), expected)


def test_mixed_batches():
    model, _ = two_adapters()
    ids = tokens(2)
    model.set_adapter("a")
    with pytest.raises(
        ValueError, match="`adapter_names`: all adapters of a batch compute with one base, and that of '__base"
    ):
        model(ids, adapter_names=["a", "__base__"])
    with pytest.raises(ValueError, match="that of 'b' has another width"):
        model(ids, adapter_names=["b", "b"])
    close(model(ids, adapter_names=["a", "a"]).logits, model(ids).logits)
    model.set_subnet("max", adapter_name="a")
    mixed = model(ids, adapter_names=["a", "b"]).logits
    close(mixed[0], model(ids).logits[0])
    model.set_adapter("b")
    close(mixed[1], model(ids).logits[1])


def test_dora_beside_a_narrowed_base_is_refused():
    model, inputs = elastic("llama", adapter_name="a")
    model.add_adapter("b", ElasticLoraConfig(r=4, elastic_ranks=[4], target_modules=["q_proj"], use_dora=True))
    model.set_subnet("min", adapter_name="a")
    with pytest.raises(ValueError, match="DoRA cannot be active beside one that narrows"):
        model.base_model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"] and torch.isfinite(outputs(model, inputs)).all()


@pytest.mark.parametrize("combination_type", ["linear", "cat", "svd"])
def test_add_weighted_adapter_of_narrowed_adapters(combination_type):
    model, inputs = elastic("llama", adapter_name="a")
    model.add_adapter("b", ElasticLoraConfig(**SETTINGS))
    randomize(model, seed=7, std=0.1, adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "whole", combination_type)
    model.set_subnet("min", adapter_name="a")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], "narrowed", combination_type)
    assert is_narrowed(model)  # "a" is active still
    found = []
    for name in ("whole", "narrowed"):
        model.set_adapter(name)
        found.append(outputs(model, inputs))
        model.set_subnet("min", adapter_name=name)
        assert torch.isfinite(outputs(model, inputs)).all()
    close(*found, 1e-4)


@TRANSFORMERS_ADAPTERS
def test_transformers_own_integration():
    """It sets and disables adapters without a word to the tuner."""
    model = tiny_llama()
    model.add_adapter(ElasticLoraConfig(**SETTINGS), "a")
    randomize(model, std=0.1, adapter_name="a")
    model.eval()
    inputs = inputs_of("llama")
    get_elastic_host(model).set_subnet("min")
    narrowed = outputs(model, inputs)
    close(narrowed, outputs(alone("a"), inputs))
    model.disable_adapters()
    close(outputs(model, inputs), outputs(tiny_llama(), inputs))
    model.enable_adapters()
    close(outputs(model, inputs), narrowed)
    config = ElasticLoraConfig(r=4, elastic_ranks=[4, 2], target_modules=["q_proj", "down_proj"])
    model.add_adapter(config, "b")
    randomize(model, seed=5, adapter_name="b")
    model.set_adapter("b")
    close(outputs(model, inputs), outputs(alone("b"), inputs))
    model.set_adapter("a")
    close(outputs(model, inputs), narrowed)


# -- merging in place --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "masked"])
def test_merging_in_place_while_narrowed_is_refused(kind):
    config = ElasticLoraConfig(**SETTINGS) if kind == "plain" else SparseQALoraConfig(**SETTINGS)
    model = get_peft_model(tiny_llama(), config).eval()
    randomize(model)
    inputs = inputs_of("llama")
    model.set_subnet("min")
    expected = outputs(model, inputs)
    with pytest.raises(ValueError, match="narrows or skips parts of the base.*in place"):
        model.merge_adapter()
    assert torch.equal(outputs(model, inputs), expected)
    model.set_subnet("max")
    whole = outputs(model, inputs)
    model.merge_adapter()
    close(outputs(model, inputs), whole)
    with pytest.raises(ValueError, match="is merged"):
        model.set_subnet("min")
    model.unmerge_adapter()
    close(outputs(model, inputs), whole)


def test_narrowing_a_base_with_something_merged_is_refused():
    model, _ = two_adapters()
    model.set_adapter("b")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"The adapters \['b'\] are merged into the base, which cannot be narrowed"):
        model.set_adapter("a")
    model.unmerge_adapter()
    model.set_adapter("a")
    assert is_narrowed(model)


def test_the_base_must_be_sorted_first():
    model = adapted(tiny_llama(), importance="activation")
    with pytest.raises(ValueError, match="not sorted by importance.*sort_by_importance"):
        model.set_subnet("min")
    assert model.active_subnet == model.search_space.max and not is_narrowed(model)
    with pytest.raises(ValueError, match="not sorted by importance"):
        adapted(tiny_gpt2(), importance="gradient", elastic_width={"heads": [0.5]})


def test_training_moves_the_active_part_alone():
    model, inputs = elastic("llama")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    model.sample_subnet("min")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    loss_of(model, inputs).backward()
    optimizer.step()
    model.eval()
    assert model.active_subnet == model.search_space.max
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    factor = "base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"
    now = model.get_parameter(factor)
    assert torch.equal(now[8:], before[factor][8:]) and not torch.equal(now[:8], before[factor][:8])


def test_merging_another_adapter_than_the_narrowed_one():
    model, inputs = two_adapters()
    model.set_adapter("a")
    expected = outputs(model, inputs)
    with pytest.raises(ValueError, match=r"`adapter_names`: \['b'\] belong to another width or depth"):
        model.merge_and_unload(adapter_names=["b"])
    model.set_adapter("b")
    with pytest.raises(ValueError, match=r"`adapter_names`: \['a'\] belong to another width or depth"):
        model.merge_and_unload(adapter_names=["a"])
    model.set_adapter("a")
    assert torch.equal(outputs(model, inputs), expected)
    close(outputs(model.merge_and_unload(adapter_names=["a"], sparse_kernel=False), inputs), expected)


def test_the_summary_counts_the_base(capsys):
    model, _ = elastic("llama")
    space = model.search_space
    model.set_subnet("min")
    active, total = (f"{space.count_base_parameters(s):,d}" for s in (space.min, space.max))
    assert f"{active} of {total} base parameters in elastic blocks" in model.subnet_summary().describe()
    model.print_trainable_parameters()
    assert "base parameters in elastic blocks" in capsys.readouterr().out


def test_options_may_differ_from_block_to_block():
    config = ElasticLoraConfig(
        r=4,
        target_modules="all-linear",
        elastic_width={"mlp": {"layers.0": [0.5, 1.0], "model.layers.1": [12, 24]}, "heads": {"layers.1": [1.0, 0.5]}},
        importance="none",
    )
    model = get_peft_model(tiny_llama(intermediate_size=24), config)
    options = {choice.key: choice.options for choice in model.search_space if choice.kind != "rank"}
    assert options == {
        "heads:model.layers.1": (4, 2),
        "mlp:model.layers.0": (24, 16),  # 12 is no multiple of 8
        "mlp:model.layers.1": (24, 12),
    }
    again = ElasticLoraConfig(**json.loads(json.dumps(config.to_dict())))
    assert again.elastic_width == config.elastic_width


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ({"layers.7": [1.0]}, r"elastic_width\['mlp'\]` has 'layers.7', which is no block of the model with elastic mlp; there are"),
        ({"": [1.0]}, r"elastic_width\['mlp'\]` must be a list, or a dict from the path of a block"),
        ({}, r"elastic_width\['mlp'\]` must be a list, or a dict from the path of a block"),
        ({"layers.0": []}, r"elastic_width\['mlp'\]\['layers.0'\]` must be a list of fractions or whole numbers, got \[\]"),
        ({"layers.0": [1.5]}, r"elastic_width\['mlp'\]\['layers.0'\]` must be fractions above 0, at most 1"),
        ({"layers.0": [1.0], "model.layers.0": [0.5]}, r"has 'model.layers.0' twice, also as 'model.layers.0'"),
        ({"layers.0": [9999]}, r"elastic_width\['mlp'\]` has 9999, but 'model.layers.0' has"),
    ],
)  # fmt: skip
def test_options_of_blocks_are_checked(width, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        get_peft_model(
            model, ElasticLoraConfig(target_modules="all-linear", elastic_width={"mlp": width}, importance="none")
        )
    assert not hasattr(model, "peft_config")
