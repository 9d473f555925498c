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
"""Adapters on weights that several modules share: a merge keeps the outputs, or is refused before anything changes."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support.models import VOCABULARY, build, outputs, randomize, tiny_gemma, tiny_gpt2, tiny_llama, tiny_opt, tokens
from torch import nn

from peft_elastic import ElasticLoraConfig, MagnitudeConfig, SparseQALoraConfig, merge_and_requantize, prune


def tiny_t5():
    return build(
        transformers.T5ForConditionalGeneration,
        transformers.T5Config,
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        initializer_factor=1.0,
        tie_word_embeddings=True,
    )


BASES = {
    "llama": (lambda: tiny_llama(tie_word_embeddings=True), "q_proj", "model.embed_tokens", "lm_head"),
    "gemma": (tiny_gemma, "down_proj", "model.embed_tokens", "lm_head"),
    "gpt2": (tiny_gpt2, "c_attn", "transformer.wte", "lm_head"),
    "opt": (lambda: tiny_opt(tie_word_embeddings=True), "fc1", "model.decoder.embed_tokens", "lm_head"),
}


def adapted(base, targets, cls=ElasticLoraConfig, **settings):
    model = get_peft_model(base, cls(r=8, lora_alpha=16, target_modules=targets, **settings))
    # a tied adapter is two views of the same values, which each would be filled anew
    seen = set()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.data_ptr() not in seen:
            seen.add(parameter.data_ptr())
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


WAYS = {
    "merge_and_unload": lambda model: model.merge_and_unload(sparse_kernel=False),
    "merge_adapter": lambda model: model.merge_adapter(),
    "safe merge": lambda model: model.merge_adapter(safe_merge=True),
    "by name": lambda model: model.merge_adapter(adapter_names=["default"]),
    "extract_subnet": lambda model: model.extract_subnet("min", sparse_kernel=False),
    "merge_and_requantize": merge_and_requantize,
}


@pytest.mark.parametrize(
    ("base", "way"),
    [
        *(("llama", way) for way in WAYS),
        *((base, "merge_and_unload") for base in BASES if base != "llama"),
        ("gpt2", "extract_subnet"),
    ],
)
@pytest.mark.parametrize("side", [0, 1])
def test_one_side_is_refused_before_anything_changes(base, side, way):
    make, inner, *sides = BASES[base]
    model = adapted(make(), [inner, sides[side].rpartition(".")[2]])
    before = outputs(model, tokens())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{sides[side]!r}.*is tied with that of {sides[1 - side]!r}") as error:
        WAYS[way](model)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(outputs(model, tokens()), before)
    # what the message says to do
    layer = model.get_base_model().get_submodule(sides[side]).get_base_layer()
    assert f"get_submodule({sides[side]!r}).get_base_layer()" in str(error.value)
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    model.config.tie_word_embeddings = False
    if way == "extract_subnet":
        model.set_subnet("min")
        before = outputs(model, tokens())
    merged = WAYS[way](model)
    merged = merged[0] if isinstance(merged, tuple) else merged
    close(outputs(model if merged is None else merged, tokens()), before)


@pytest.mark.parametrize("kind", [{}, {"quantization_aware": True, "group_size": 16}])
def test_masked_adapters_are_refused_too(kind):
    base = tiny_llama(tie_word_embeddings=True)
    prune(base, MagnitudeConfig(sparsity=0.5), progress=False)
    model = adapted(base, ["q_proj", "lm_head"], SparseQALoraConfig, **kind)
    before = outputs(model, tokens())
    with pytest.raises(ValueError, match="'lm_head'.* tied"):
        model.merge_and_unload(sparse_kernel=False)
    assert torch.equal(outputs(model, tokens()), before)


def test_stock_lora_is_refused_by_merge_and_requantize():
    model = adapted(tiny_gemma(), ["lm_head"], LoraConfig)
    with pytest.raises(ValueError, match="'lm_head'.* tied"):
        merge_and_requantize(model)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("subnet", ["max", "min"])
def test_both_sides_with_one_adapter_merge_exactly(base, subnet, tmp_path):
    make, inner, embedding, output = BASES[base]
    names = [inner, embedding.rpartition(".")[2], output]
    model = adapted(make(), names, ensure_weight_tying=True)
    model.set_subnet(subnet)
    before = outputs(model, tokens())
    weight = model.get_base_model().get_submodule(embedding).get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="cannot be merged in place"):
        model.merge_adapter()
    extracted = model.extract_subnet(sparse_kernel=False)
    close(outputs(extracted, tokens()), before)
    assert torch.equal(outputs(model, tokens()), before)
    merged = model.merge_and_unload(sparse_kernel=False)
    for result in (extracted, merged):
        assert result.get_submodule(output).weight is result.get_submodule(embedding).weight
        assert (result.get_submodule(embedding).weight - weight).abs().max() > 0.01
    close(outputs(merged, tokens()), before)
    merged.save_pretrained(tmp_path)
    close(outputs(type(merged).from_pretrained(tmp_path).eval(), tokens()), before)


def test_both_sides_of_a_masking_tuner_without_masks():
    settings = {"sparse_adapter": False, "ensure_weight_tying": True}
    model = adapted(tiny_gemma(), ["embed_tokens", "lm_head"], SparseQALoraConfig, **settings)
    before = outputs(model, tokens())
    close(outputs(model.merge_and_unload(sparse_kernel=False), tokens()), before)


@pytest.mark.parametrize("cls", [LoraConfig, ElasticLoraConfig])
def test_both_sides_are_merged_once_by_merge_and_requantize(cls):
    model = adapted(tiny_gemma(), ["embed_tokens", "lm_head"], cls, ensure_weight_tying=True)
    before = outputs(model, tokens())
    merged, _ = merge_and_requantize(model)
    close(outputs(merged, tokens()), before)


def test_both_sides_with_different_updates_are_refused():
    model = adapted(tiny_gemma(), ["embed_tokens", "lm_head"], ensure_weight_tying=True)
    layer = model.get_base_model().lm_head
    layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data + 0.01  # trained apart
    with pytest.raises(ValueError, match="is tied with that of"):
        model.merge_and_unload()
    two = adapted(tiny_gemma(), ["embed_tokens", "lm_head"])
    with pytest.raises(ValueError, match="is tied with that of"):
        two.extract_subnet()


def test_the_embeddings_of_an_encoder_decoder():
    model = adapted(tiny_t5(), ["q", "decoder.embed_tokens"])
    with pytest.raises(
        ValueError, match="'decoder.embed_tokens'.* tied with that of '(shared|encoder.embed_tokens|lm_head)'"
    ):
        model.merge_and_unload()


def test_what_merges_without_touching_the_tied_weight():
    model = adapted(tiny_gemma(), ["q_proj"])
    before = outputs(model, tokens())
    close(outputs(model.merge_and_unload(sparse_kernel=False), tokens()), before)
    # another adapter stands on the tied layer, and is not merged
    model = adapted(tiny_gemma(), ["q_proj"])
    model.add_adapter("head", ElasticLoraConfig(r=4, target_modules=["lm_head"]))
    randomize(model, seed=3, adapter_name="head")
    model.eval()
    before = outputs(model, tokens())
    close(outputs(copy.deepcopy(model).merge_and_unload(sparse_kernel=False), tokens()), before)
    with pytest.raises(ValueError, match="carries adapter 'head'"):
        model.merge_and_unload(adapter_names=["default", "head"])


def test_a_trained_copy_of_the_output_layer_is_not_tied():
    """`modules_to_save`: the copy computes, the tied original does not."""
    model = adapted(tiny_gemma(), ["embed_tokens"], modules_to_save=["lm_head"])
    before = outputs(model, tokens())
    close(outputs(model.merge_and_unload(sparse_kernel=False), tokens()), before)
