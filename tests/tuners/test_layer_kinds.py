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
"""Layers whose weight torch computes from other parameters, and the routers of mixtures of experts."""

import copy

import pytest
import torch
from peft import get_peft_model
from support.models import tiny_llama
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, spectral_norm, weight_norm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeModel,
    SwitchTransformersConfig,
    SwitchTransformersModel,
)

import peft_elastic
from peft_elastic import (
    ElasticLoraConfig,
    GPTQConfig,
    MagnitudeConfig,
    MultiPrunerConfig,
    RTNConfig,
    SparseLinear,
    SparseQALoraConfig,
    WandaConfig,
    prune_structured,
    quantize,
    sort_by_importance,
    sparsify_linears,
)
from peft_elastic.structure.modules import routers, weight_matrix


class Halved(nn.Module):
    def forward(self, tensor):
        return tensor / 2


def masked_bias(layer):
    layer.bias = nn.Parameter(torch.ones(layer.out_features))
    prune.random_unstructured(layer, "bias", amount=0.5)


# what computes a tensor of a layer, and the words that undo it
WAYS = {
    "mask": (lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5), "prune.remove"),
    "two masks": (
        lambda layer: [prune.random_unstructured(layer, "weight", amount=0.2) for _ in range(2)],
        "prune.remove",
    ),
    "mask of the bias": (masked_bias, "prune.remove"),
    "parametrization": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
        "remove_parametrizations",
    ),
    "weight norm": (parametrizations.weight_norm, "remove_parametrizations"),
    "older weight norm": (weight_norm, "remove_weight_norm"),
    "older spectral norm": (spectral_norm, "remove_spectral_norm"),
}
LORA = {"r": 2, "target_modules": "all-linear"}
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
CALLS = {
    "sparsify_linears": lambda model: sparsify_linears(model, when="always"),
    "prune": lambda model: peft_elastic.prune(model, MagnitudeConfig(sparsity=0.5)),
    "wanda": lambda model: peft_elastic.prune(model, WandaConfig(sparsity=0.5), [IDS]),
    "rtn": lambda model: quantize(model, RTNConfig(group_size=8)),
    "gptq": lambda model: quantize(model, GPTQConfig(group_size=8), [IDS]),
    "SparseQALora": lambda model: get_peft_model(model, SparseQALoraConfig(**LORA)),
    "quantisation-aware": lambda model: get_peft_model(
        model, SparseQALoraConfig(**LORA, quantization_aware=True, group_size=8)
    ),
    "merge": lambda model: get_peft_model(model, ElasticLoraConfig(**LORA)).merge_and_unload(),
    "merge in place": lambda model: get_peft_model(model, ElasticLoraConfig(**LORA)).merge_adapter(),
    "width": lambda model: get_peft_model(model, ElasticLoraConfig(**LORA, elastic_width={"mlp": [1.0, 0.5]})),
    "sort": lambda model: sort_by_importance(model, "magnitude"),
    "structured": lambda model: prune_structured(
        model, MultiPrunerConfig(ratio=0.2, choose="random", order="none", mlp_group=8), [IDS]
    ),
}


def model_with(way):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, layer in model.model.named_modules():
        if isinstance(layer, nn.Linear) and "layers.1" in name:
            WAYS[way][0](layer)
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS)
def test_refused_by_name_and_nothing_is_changed(call, way):
    model = model_with(way)
    with torch.no_grad():
        before = model(IDS).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"layers\.1\..*_proj is no parameter.*{WAYS[way][1]}\(.*get_submodule"):
        CALLS[call](model)
    if "merge" not in call:  # which has put an adapter there, as stock peft does, and merged nothing
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert len(state) == len(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, before)


def test_once_undone_it_works():
    model = model_with("mask")
    with torch.no_grad():
        before = model(IDS).logits
    for layer in list(model.modules()):
        if prune.is_pruned(layer) and isinstance(layer, nn.Linear):
            prune.remove(layer, "weight")
    report = sparsify_linears(model, when="always")
    assert len(report.swapped) == 7
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, before, rtol=2e-2, atol=2e-2)


def test_skipped_layers_may_be_what_they_are():
    model = model_with("older weight norm")
    names = [name for name, layer in model.named_modules() if hasattr(layer, "weight_g")]
    report = sparsify_linears(model, when="always", min_sparsity=0, skip=names)
    assert len(report.swapped) == 7 and not set(names) & set(report.swapped)
    layer = model.get_submodule(names[0])
    with pytest.raises(ValueError, match="remove_weight_norm"):
        SparseLinear.from_linear(layer)
    with pytest.raises(ValueError, match="remove_weight_norm"):
        weight_matrix(layer)
    remove_weight_norm(layer)
    assert weight_matrix(layer).shape == layer.weight.shape


def test_adapters_train_beside_masks():
    """As in peft: the base computes with its mask, whatever the adapter learns."""
    model = get_peft_model(model_with("mask"), ElasticLoraConfig(**LORA))
    model(IDS, labels=IDS).loss.backward()
    with pytest.raises(ValueError, match="prune.remove"):
        model.merge_and_unload()
    assert model(IDS).logits.isfinite().all()


class Chooser(nn.Module):
    """A mixture of a user's own, which calls nothing what others call it."""

    def __init__(self, experts=3, shared=True):
        super().__init__()
        self.pick = nn.Linear(16, experts)
        self.inner = nn.Linear(16, 16)
        self.parts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(experts)
        )
        self.amount = nn.Linear(16, 1) if shared else None

    def forward(self, x):
        weights = self.pick(x).softmax(-1)
        mixed = sum(weights[..., i : i + 1] * part(x) for i, part in enumerate(self.parts))
        return mixed + self.amount(x).sigmoid() * self.inner(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mixture, self.gate = nn.LayerNorm(16), Chooser(), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.gate(self.mixture(self.norm(x)))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Own, [f"blocks.{i}.mixture.{name}" for i in range(2) for name in ("pick", "amount")]),
        (
            lambda: PhimoeForCausalLM(PhimoeConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)),
            [f"model.layers.{i}.mlp.router" for i in range(2)],
        ),
        (
            lambda: Qwen2MoeModel(
                Qwen2MoeConfig(
                    **SIZES, num_key_value_heads=2, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8
                )
            ),
            [f"layers.{i}.mlp.shared_expert_gate" for i in range(2)],
        ),
        (
            lambda: SwitchTransformersModel(
                SwitchTransformersConfig(
                    vocab_size=64, d_model=16, d_ff=24, d_kv=4, num_heads=4, num_layers=2, num_decoder_layers=2,
                    num_sparse_encoder_layers=1, num_sparse_decoder_layers=0, num_experts=4,
                )
            ),
            ["encoder.block.1.layer.1.mlp.router.classifier", "decoder.block.1.layer.2.mlp.router.classifier"],
        ),
        (tiny_llama, []),
    ],
)  # fmt: skip
def test_routers(make, expected):
    assert routers(make()) == expected


def test_routers_are_left_alone_unless_named():
    torch.manual_seed(0)
    model = Own()
    report = peft_elastic.prune(model, MagnitudeConfig(sparsity=0.5))
    names = {row["name"] for row in report.layers}
    assert "blocks.0.mixture.inner" in names and "blocks.0.gate" in names and "blocks.1.mixture.parts.2.2" in names
    assert report.routers == routers(model) and not names & set(report.routers)
    assert "4 routers of mixtures of experts, such as blocks.0.mixture.pick" in str(report)
    assert model.blocks[0].mixture.pick.weight.all()
    assert report.to_dict()["routers"] == report.routers

    x = torch.randn(2, 5, 16)
    for config in (RTNConfig(group_size=8), GPTQConfig(group_size=8)):
        quantized = copy.deepcopy(model)
        found = quantize(quantized, config, [{"x": x}])
        assert found.routers == routers(model) and type(quantized.blocks[1].mixture.pick) is nn.Linear
    swapped = sparsify_linears(model, when="always", min_sparsity=0)
    reasons = {decision.name: decision.reason for decision in swapped.decisions}
    assert reasons["blocks.0.mixture.pick"] == "the router of a mixture of experts"
    assert "blocks.0.mixture.inner" in swapped.swapped

    model = Own()
    report = peft_elastic.prune(model, MagnitudeConfig(sparsity=0.5, target_modules=["pick"]))
    assert [row["name"] for row in report.layers] == [f"blocks.{i}.mixture.pick" for i in range(2)]
    assert not model.blocks[0].mixture.pick.weight.all() and len(report.routers) == 2
