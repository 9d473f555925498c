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
"""Elastic depth: blocks, attentions and MLPs that are skipped, in training, in generation with caches, and for good."""

import copy

import pytest
import torch
from peft import PeftModel
from support.elastic_models import (
    ALL,
    SETTINGS,
    MatrixProducts,
    adapted,
    blocks_of,
    build,
    close,
    elastic,
    inputs_of,
    masked,
)
from support.models import BLOCKS, T5S, outputs, tiny_gemma3, tiny_gpt2, tiny_llama, tokens
from torch import nn
from transformers import StaticCache

from peft_elastic import ElasticLoraConfig
from peft_elastic.structure.narrow import is_narrowed


pytestmark = pytest.mark.filterwarnings("ignore")

DECODERS = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
]


def depths_of(name):
    """Everything that may be skipped."""
    if name in T5S:
        parts = ["encoder.block.1", "encoder.block.1.attention", "encoder.block.0.mlp"]
        return [*parts, *(part.replace("encoder", "decoder") for part in parts)]
    return [f"0-{BLOCKS[name].count - 1}", "all.attention", "all.mlp"]


def deep(name, dtype=torch.float32, **settings):
    return elastic(name, dtype, **{"elastic_width": None, "elastic_depth": depths_of(name), **settings})


def skipping(model, *names):
    subnet = {**model.search_space.max}
    for name in names:
        assert f"depth:{name}" in subnet
        subnet[f"depth:{name}"] = 0
    return subnet


@pytest.mark.parametrize("name", ALL)
def test_each_part_alone_and_several(name):
    model, inputs = deep(name, torch.float64)
    choices = [choice.name for choice in model.search_space if choice.kind == "depth"]
    assert len(choices) == (6 if name in T5S else 3 * BLOCKS[name].count)
    whole = outputs(model, inputs)
    samples = [model.search_space.sample(seed) for seed in (1, 2)]
    for subnet in [*(skipping(model, choice) for choice in choices), *samples]:
        model.set_subnet("max")
        skipped = dict(subnet)
        for key, computed in subnet.items():  # a skipped block leaves nothing of its parts
            for part in ("attention", "mlp"):
                if key.startswith("depth:") and not computed and f"{key}.{part}" in skipped:
                    skipped[f"{key}.{part}"] = 1
        if name in T5S:
            skipped = {k: v for k, v in skipped.items() if v == 0 or not k.startswith("depth")}
        with t5_masked(model, skipped) if name in T5S else masked(model, name, skipped):
            expected = outputs(model, inputs)
        model.set_subnet(subnet)
        close(outputs(model, inputs), expected, 1e-10)
        if 0 in subnet.values():
            assert (expected - whole).abs().max() > 1e-4
    model.set_subnet("max")
    assert torch.equal(outputs(model, inputs), whole) and not is_narrowed(model)


def t5_masked(model, subnet):
    """By hand: a T5 layer adds to the residual stream, and a block consists of layers."""
    from contextlib import ExitStack

    hooks = ExitStack()
    base = model.get_base_model()
    for key in (key for key, value in subnet.items() if key.startswith("depth:") and not value):
        path = key.removeprefix("depth:")
        part = path.rpartition(".")[2]
        block = path.removesuffix(f".{part}") if part in ("attention", "mlp") else path
        layers = list(base.get_submodule(block).layer)
        if part == "mlp":
            layers = layers[-1:]
        elif part == "attention":
            layers = layers[:-1]
        for layer in layers:
            inner = layer.DenseReluDense if hasattr(layer, "DenseReluDense") else None
            inner = inner or getattr(layer, "SelfAttention", None) or layer.EncDecAttention

            def nothing(module, args, output):
                if isinstance(output, tuple):
                    return (torch.zeros_like(output[0]), *output[1:])
                return torch.zeros_like(output)

            hooks.enter_context(inner.register_forward_hook(nothing))
    return hooks


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert", "opt", "t5"])
def test_nothing_of_it_is_computed(name):
    model, inputs = deep(
        name,
        target_modules=["q_proj", "c_attn", "query_key_value", "query", "q"][:1]
        if name in ("llama", "opt")
        else {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "bert": ["query"], "t5": ["q"]}[name],
    )
    for subnet in (model.search_space.max, model.search_space.sample(3), model.search_space.sample(4)):
        model.set_subnet(subnet)
        with MatrixProducts() as products:
            found = outputs(model, inputs)
        parts = ("", ".attention", ".mlp")
        there = [[subnet.get(f"depth:{block}{part}", 1) for part in parts] for block in blocks_of(name)]
        if name != "t5" and not any(block and (attention or mlp) for block, attention, mlp in there):
            continue  # cannot be extracted
        extracted = model.extract_subnet(sparse_kernel=False)
        with MatrixProducts() as expected:
            close(outputs(extracted, inputs), found)
        assert products.of_base == expected.of_base


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("names", [["0"], ["1", "0.attention"], ["0.mlp", "1.attention"], ["0", "1"]], ids="+".join)
def test_gradient_checkpointing(names, use_reentrant):
    model, inputs = deep("llama", lora_dropout=0.0)
    model.set_subnet(skipping(model, *(f"model.layers.{name}" for name in names)))

    def gradients():
        model.zero_grad()
        model.train()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        if loss.requires_grad:
            loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    found = gradients()
    assert found.keys() == expected.keys()
    for key in found:
        close(found[key], expected[key], 1e-6)
    skipped = [f".{name}." for name in names if "." not in name]
    assert not any(part in key for part in skipped for key in found)


# -- generation --------------------------------------------------------------------------------------------------------


def generated(model, inputs, **settings):
    return model.generate(**inputs, **{"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **settings})


def left_padded():
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


SKIPPED = [["0"], ["1"], ["0.attention"], ["1.attention", "0.mlp"], ["0.attention", "1"]]


@pytest.mark.parametrize("names", SKIPPED, ids="+".join)
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_a_cache_is_generation_without(name, names):
    model, _ = deep(name)
    model.set_subnet(skipping(model, *(BLOCKS[name].path.format(part) for part in names)))
    inputs = left_padded()
    expected = generated(model, inputs, use_cache=False)
    assert torch.equal(generated(model, inputs), expected)
    whole = generated(model.get_base_model(), inputs, use_cache=False)
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("names", [["0"], ["0.attention"]], ids="+".join)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "gemma3", "opt"])
def test_beam_search(name, names):
    model, _ = deep(name)
    model.set_subnet(skipping(model, *(BLOCKS[name].path.format(part) for part in names)))
    expected = generated(model, left_padded(), num_beams=3, use_cache=False)
    assert torch.equal(generated(model, left_padded(), num_beams=3), expected)


@pytest.mark.parametrize("names", [["0"], ["0.attention", "1"]], ids="+".join)
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "opt"])
def test_static_cache(name, names):
    model, _ = deep(name)
    settings = {"cache_implementation": "static", "disable_compile": True}
    expected = generated(model, left_padded(), use_cache=False)
    assert torch.equal(generated(model, left_padded(), **settings), expected)  # in the whole model
    model.set_subnet(skipping(model, *(BLOCKS[name].path.format(part) for part in names)))
    expected = generated(model, left_padded(), use_cache=False)
    assert torch.equal(generated(model, left_padded(), **settings), expected)


def test_a_static_cache_made_beforehand():
    model, _ = deep("llama")
    model.set_subnet(skipping(model, "model.layers.0"))
    ids = tokens(2, 6)
    config = model.get_base_model().config
    cache = StaticCache(config=config, max_cache_len=8)
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=8, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        first = model(ids[:, :4], past_key_values=cache, use_cache=True).logits
        second = model(ids[:, 4:], past_key_values=cache, use_cache=True).logits
        close(torch.cat([first, second], 1), model(ids).logits)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize(
    "names",
    [["decoder.block.1"], ["decoder.block.1.attention", "encoder.block.1"], ["encoder.block.0.mlp"]],
    ids="+".join,
)
@pytest.mark.parametrize("name", T5S)
def test_encoder_decoders(name, names, num_beams):
    model, inputs = deep(name)
    model.set_subnet(skipping(model, *names))
    inputs = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    expected = generated(model, inputs, use_cache=False, num_beams=num_beams)
    assert torch.equal(generated(model, inputs, num_beams=num_beams), expected)
    extracted = model.extract_subnet(sparse_kernel=False)
    assert torch.equal(generated(extracted, inputs, num_beams=num_beams), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "gpt2", "gpt_neox", "opt", "phi3"])
def test_extracted_models_generate_the_same(name):
    model, _ = deep(name)
    for names in SKIPPED:
        model.set_subnet(skipping(model, *(BLOCKS[name].path.format(part) for part in names)))
        expected = generated(model, left_padded())
        extracted = model.extract_subnet(sparse_kernel=False)
        assert torch.equal(generated(extracted, left_padded()), expected)
        assert torch.equal(generated(extracted, left_padded(), use_cache=False), expected)


def test_the_sliding_attentions_stay_with_their_blocks():
    model, inputs = deep("gemma3")
    model.set_subnet(skipping(model, "model.layers.0"))
    expected = outputs(model, inputs)
    extracted = model.extract_subnet(sparse_kernel=False)
    assert extracted.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in extracted.model.layers] == [0, 1]
    close(outputs(extracted, inputs), expected)


def test_the_cache_holds_no_keys_of_skipped_blocks():
    model, _ = deep("llama")
    model.set_subnet(skipping(model, "model.layers.0"))
    cache = model(tokens(), use_cache=True).past_key_values
    assert cache.layers[0].keys.shape == (3, 1, 7, 1) and cache.layers[1].keys.shape == (3, 2, 7, 8)
    assert cache.get_seq_length() == 7


# -- all -----------------------------------------------------------------------------------------------------------


def test_a_model_without_blocks_is_not_extracted():
    model, inputs = deep("llama")
    before = {name: id(module) for name, module in model.named_modules()}
    model.set_subnet(skipping(model, "model.layers.0", "model.layers.1.attention", "model.layers.1.mlp"))
    with pytest.raises(ValueError, match="at least one attention or MLP must stay"):
        model.extract_subnet()
    model.set_subnet(skipping(model, "model.layers.0", "model.layers.1"))
    found = outputs(model, inputs)
    base = model.get_base_model()
    with torch.no_grad():  # what is left
        close(found, base.lm_head(base.model.norm(base.model.embed_tokens(inputs["input_ids"]))))
    for refused in (model.merge_and_unload, model.extract_subnet):
        with pytest.raises(
            ValueError, match="Every block of 'model.layers' is skipped; at least one attention or MLP must stay"
        ):
            refused()
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert torch.equal(outputs(model, inputs), found)


def test_save_and_load(tmp_path):
    model, inputs = deep("gemma3")
    model.set_subnet(model.search_space.sample(5))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_gemma3(), tmp_path).eval()
    assert loaded.active_subnet == model.active_subnet and loaded.search_space == model.search_space
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


def test_with_width():
    model, inputs = deep("gpt2", torch.float64, elastic_width=SETTINGS["elastic_width"])
    for seed in range(4):
        subnet = model.search_space.sample(seed)
        if not (subnet["depth:transformer.h.0"] or subnet["depth:transformer.h.1"]):
            continue
        model.set_subnet("max")
        reference = {k: v for k, v in subnet.items() if v or not k.endswith((".attention", ".mlp"))}
        for key in [k for k, v in subnet.items() if not v and k.endswith((".attention", ".mlp"))]:
            if subnet[key.rpartition(".")[0]]:
                reference[key] = 0
        with masked(model, "gpt2", reference):
            expected = outputs(model, inputs)
        model.set_subnet(subnet)
        close(outputs(model, inputs), expected, 1e-10)


def test_hidden_states_and_module_names():
    """transformers, accelerate and FSDP find blocks by the names of their classes."""
    model, inputs = deep("llama")
    names = [type(module).__name__ for module in model.modules()]
    model.set_subnet(skipping(model, "model.layers.0", "model.layers.1.attention"))
    assert [type(module).__name__ for module in model.modules()] == names
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == 3 and torch.equal(states[0], states[1])


def test_a_second_adapter_without_depth():
    model, inputs = deep("llama")
    whole = outputs(build("llama"), inputs)
    model.add_adapter("b", ElasticLoraConfig(r=2, elastic_ranks=[2], target_modules=["q_proj"]))
    model.set_subnet(skipping(model, "model.layers.0"), adapter_name="default")
    assert (outputs(model, inputs) - whole).abs().max() > 0.1
    model.set_adapter("b")  # its B is zero
    assert torch.equal(outputs(model, inputs), whole)


def test_blocks_of_a_base_model_without_head():
    model = tiny_gpt2(n_layer=3).transformer
    model = adapted(model, elastic_width=None, elastic_depth=[0, "2.mlp"], target_modules=["c_attn"])
    assert {c.name for c in model.search_space if c.kind == "depth"} == {"h.0", "h.2.mlp"}
    model.set_subnet("min")
    expected = model(tokens()).last_hidden_state
    extracted = model.merge_and_unload()
    close(extracted(tokens()).last_hidden_state, expected)
    assert len(extracted.h) == 2 and isinstance(extracted.h[0].mlp.c_fc, nn.Module)


def test_inputs_of_every_kind():
    model, _ = deep("llama")
    model.set_subnet(skipping(model, "model.layers.0.attention"))
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(tokens())
        close(model(inputs_embeds=embeddings).logits, model(tokens()).logits)
        assert model(**inputs_of("llama"), use_cache=False).past_key_values is None
    assert isinstance(tiny_llama(), nn.Module)


def test_all_leaves_out_the_first_block_and_training_needs_one():
    model, _ = deep("llama", elastic_depth="all")
    assert [choice.name for choice in model.search_space if choice.kind == "depth"] == [
        f"model.layers.{index}" for index in range(1, BLOCKS["llama"].count)
    ]
    model, _ = deep("llama", elastic_depth=f"0-{BLOCKS['llama'].count - 1}")
    with pytest.raises(ValueError, match="skips every block of 'model.layers'; one has to stay"):
        model.sample_subnet("min")
    assert model.active_subnet == model.search_space.max


def test_a_layer_that_is_skipped_and_narrowed():
    """OPT's MLP has no module around its two layers, so that without adapters on them both change the class of the same layer."""
    model, inputs = deep("opt", torch.float64, target_modules=["q_proj"], elastic_width={"mlp": [1.0, 0.5]})
    block = "model.decoder.layers.0"
    both = {f"mlp:{block}": 24}, {f"depth:{block}.mlp": 0}, {f"mlp:{block}": 24, f"depth:{block}.mlp": 0}, {}
    subnets = [{**model.search_space.max, **changes} for changes in both]
    classes = [type(module) for module in model.modules()]
    expected = []
    for subnet in subnets:
        with masked(model, "opt", subnet):
            expected.append(outputs(model, inputs))
    for first in range(len(both)):
        for second in range(len(both)):
            model.set_subnet(subnets[first])
            model.set_subnet(subnets[second])
            close(outputs(model, inputs), expected[second], 1e-10)
            close(outputs(copy.deepcopy(model), inputs), expected[second], 1e-10)
    model.set_subnet("max")
    assert [type(module) for module in model.modules()] == classes
