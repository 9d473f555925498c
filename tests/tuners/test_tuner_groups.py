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
"""Rank groups and transformer blocks on every architecture, without knowing any by name."""

import pytest
import torch
from peft import get_peft_model
from support.models import ARCHITECTURES, AttentionNet, ConvNet, net, randomize, tiny_llama, tiny_mixtral
from torch import nn

from peft_elastic import ElasticLoraConfig
from peft_elastic.supernet.groups import find_blocks, group_modules


def elastic(model, **settings):
    return get_peft_model(model, ElasticLoraConfig(**{"r": 8} | settings))


def groups(model):
    """group name -> module paths"""
    return {choice.name: set(choice.modules) for choice in model.search_space}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rank_groups_on_every_architecture(architecture):
    arch = ARCHITECTURES[architecture]
    names = [
        path
        for path, module in arch.build().named_modules()
        if any(path.endswith(f".{target}") for target in arch.modules)
    ]
    assert len(names) == sum(arch.modules.values())

    alone = elastic(arch.build(), target_modules=list(arch.modules))
    assert groups(alone) == {name: {name} for name in names}

    by_block = elastic(arch.build(), target_modules=list(arch.modules), rank_groups="block")
    assert groups(by_block) == {
        block: {name for name in names if name.startswith(f"{block}.")} for block in arch.blocks
    }
    assert set().union(*groups(by_block).values()) == set(names)

    tied = elastic(arch.build(), target_modules=list(arch.modules), rank_groups=arch.groups)
    expected = {}
    for block in arch.blocks:
        inside = [name for name in names if name.startswith(f"{block}.")]
        for group in arch.groups:
            expected[f"{block}.{'+'.join(group)}"] = {n for n in inside if any(n.endswith(f".{g}") for g in group)}
    grouped = set().union(*expected.values())
    expected |= {name: {name} for name in names if name not in grouped}
    assert groups(tied) == expected
    assert all(expected.values())

    # a group moves as one, and nothing else moves with it
    choice = next(choice for choice in tied.search_space if len(choice.modules) > 1)
    tied.set_subnet(tied.search_space.max.to_dict() | {choice.key: 4})
    ranks = {
        path: module.lora_A["default"].weight.shape[0]
        for path, module in tied.base_model.model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }
    assert ranks == {name: 4 if name in choice.modules else 8 for name in names}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_on_every_architecture(architecture):
    """What stock LoRA adapts, elastic LoRA adapts."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    def adapted(config):
        model = get_peft_model(ARCHITECTURES[architecture].build(), config)
        return {n for n, m in model.base_model.model.named_modules() if isinstance(m, LoraLayer)}, model

    stock, _ = adapted(LoraConfig(target_modules="all-linear"))
    found, model = adapted(ElasticLoraConfig(target_modules="all-linear"))
    assert found == stock
    assert set().union(*groups(model).values()) == stock


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "vit"])
def test_unknown_names_are_refused_before_the_model_is_touched(architecture):
    arch = ARCHITECTURES[architecture]
    model = arch.build()
    modules = [id(module) for module in model.modules()]
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    known = next(iter(arch.modules))
    with pytest.raises(ValueError, match=r"`rank_groups` names \['q_prjo'\]"):
        elastic(model, target_modules=list(arch.modules), rank_groups=[[known, "q_prjo"]])
    # in the model, but not adapted
    first, second = list(arch.modules)[:2]
    with pytest.raises(ValueError, match="match no module that carries an adapter"):
        elastic(model, target_modules=[first], rank_groups=[[first, second]])
    assert [id(module) for module in model.modules()] == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert not hasattr(model, "peft_config")


def test_a_module_in_two_groups():
    with pytest.raises(ValueError, match=r"`rank_groups` names \['q_proj'\] more than once"):
        ElasticLoraConfig(rank_groups=[["q_proj", "k_proj"], ["q_proj"]])
    with pytest.raises(ValueError, match=r"puts the module 'model.layers.0.self_attn.q_proj' into several groups"):
        elastic(
            tiny_llama(),
            target_modules=["q_proj", "k_proj"],
            rank_groups=[["q_proj", "k_proj"], ["self_attn.q_proj"]],
        )
    # twice in the same group is no contradiction
    model = elastic(tiny_llama(), target_modules=["q_proj", "k_proj"], rank_groups=[["q_proj", "self_attn.q_proj"]])
    assert len(model.search_space) == 4


def test_paths_tie_across_blocks_only_if_they_lie_outside_of_blocks():
    model = elastic(
        tiny_llama(tie_word_embeddings=False),
        target_modules=["embed_tokens", "lm_head", "q_proj"],
        rank_groups=[["embed_tokens", "lm_head"], ["layers.1.self_attn.q_proj"]],
    )
    assert groups(model) == {
        "embed_tokens+lm_head": {"model.embed_tokens", "lm_head"},
        "model.layers.1.layers.1.self_attn.q_proj": {"model.layers.1.self_attn.q_proj"},
        "model.layers.0.self_attn.q_proj": {"model.layers.0.self_attn.q_proj"},
    }


def test_rank_pattern_within_a_group():
    settings = {"target_modules": ["q_proj", "k_proj"], "rank_groups": [["q_proj", "k_proj"]]}
    base = tiny_llama()
    modules = [id(module) for module in base.modules()]
    with pytest.raises(ValueError, match=r"whose maximal ranks in `rank_pattern` differ: \[4, 8\]"):
        elastic(base, rank_pattern={"q_proj": 4}, **settings)
    with pytest.raises(ValueError, match="maximal ranks in `rank_pattern` differ"):
        elastic(base, rank_pattern={"q_proj": 4}, **settings | {"rank_groups": "block"})
    assert [id(module) for module in base.modules()] == modules
    # the same rank for the whole group is fine, and other blocks may have another
    model = elastic(base, rank_pattern={r"layers\.0\..*": 12}, **settings)
    assert [choice.options for choice in model.search_space] == [(12, 9, 6), (8, 6, 4)]


def test_rank_pattern_scales_the_options():
    model = elastic(
        tiny_llama(), target_modules=["q_proj", "k_proj"], elastic_ranks=[8, 3], rank_pattern={"q_proj": 4}
    )
    options = {choice.name.rpartition(".")[2]: choice.options for choice in model.search_space}
    assert options == {"q_proj": (4, 2), "k_proj": (8, 3)}
    for choice in model.search_space:
        layer = model.base_model.model.get_submodule(choice.name)
        assert choice.unit_parameters == layer.in_features + layer.out_features


def test_group_parameters_are_counted():
    model = elastic(tiny_llama(), target_modules="all-linear", rank_groups="block")
    randomize(model)
    total = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert model.search_space.count_parameters(model.search_space.max) == total
    for seed in range(3):
        subnet = model.search_space.sample(seed)
        model.set_subnet(subnet)
        active = sum(
            module.weight.numel()
            for name, module in model.named_modules()
            if name.endswith(("A.default", "B.default"))
        )
        assert model.search_space.count_parameters(subnet) == active


def test_experts_form_their_own_groups_within_the_block():
    model = elastic(
        tiny_mixtral(),
        target_modules=["q_proj", "k_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_groups=[["q_proj", "k_proj"], ["gate_up_proj", "down_proj"]],
    )
    assert groups(model) == {
        f"model.layers.{i}.{name}": {f"model.layers.{i}.{member}" for member in members}
        for i in range(2)
        for name, members in {
            "q_proj+k_proj": ["self_attn.q_proj", "self_attn.k_proj"],
            "gate_up_proj+down_proj": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        }.items()
    }
    active = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert model.search_space.count_parameters(model.search_space.max) == active


def test_models_that_are_no_transformers():
    assert groups(elastic(net(ConvNet), target_modules=["conv", "head"], rank_groups="block")) == {
        "conv": {"conv"},
        "head": {"head"},
    }
    assert groups(elastic(net(ConvNet), target_modules=["conv", "head"], rank_groups=[["conv", "head"]])) == {
        "conv+head": {"conv", "head"}
    }
    # nn.MultiheadAttention has two adapters
    assert groups(elastic(net(AttentionNet), target_modules=["attention"])) == {
        "attention": {"attention"},
        "attention.out_proj": {"attention.out_proj"},
    }
    assert groups(
        elastic(net(AttentionNet), target_modules=["attention"], rank_groups=[["attention", "out_proj"]])
    ) == {"attention+out_proj": {"attention", "attention.out_proj"}}


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4), "out": nn.Linear(4, 4)}) for _ in range(2))


def test_blocks_of_unknown_models_are_the_outermost_list_entries():
    model = nn.Module()
    model.stages = nn.ModuleList(Stage() for _ in range(2))
    model.head = nn.Linear(4, 4)
    block_of = find_blocks(model)
    assert block_of("stages.1.blocks.0.fc") == "stages.1"
    assert block_of("head") is None
    assert block_of("stages.1") is None  # an entry is not inside of itself
    names = ["stages.0.blocks.0.fc", "stages.0.blocks.1.out", "stages.1.blocks.0.fc", "head"]
    assert group_modules(names, "block", block_of) == {
        "stages.0": names[:2],
        "stages.1": names[2:3],
        "head": ["head"],
    }


def test_blocks_stay_the_same_when_the_model_is_adapted():
    model = ARCHITECTURES["t5"].build()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    before = [find_blocks(model)(name) for name in names]
    assert before[0] == "encoder.block.0"
    elastic(model, target_modules="all-linear")
    assert [find_blocks(model)(name) for name in names] == before


def test_layers_to_transform():
    model = elastic(tiny_llama(), target_modules=["q_proj"], layers_to_transform=[1], rank_groups="block")
    assert groups(model) == {"model.layers.1": {"model.layers.1.self_attn.q_proj"}}


def test_layer_replication():
    """peft builds the model from repeated layers, each with an adapter, and so a rank, of its own."""
    torch.manual_seed(0)
    model = elastic(
        tiny_llama(),
        target_modules=["q_proj"],
        layer_replication=[[0, 2], [0, 2]],
        rank_groups="block",
    )
    assert list(groups(model)) == [f"model.layers.{i}" for i in range(4)]


def test_regular_expressions():
    model = elastic(
        tiny_llama(), target_modules=r".*layers\.1.*\.(q_proj|up_proj)", rank_groups=[["q_proj", "up_proj"]]
    )
    assert groups(model) == {
        "model.layers.1.q_proj+up_proj": {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    }
