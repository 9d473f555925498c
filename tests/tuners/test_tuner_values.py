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
"""A configuration is a value: what an adapter finds and chooses stays with that adapter, and fields mean what they say when the
adapter is made."""

import copy
import dataclasses
import json
import warnings

import peft
import pytest
import torch
import transformers
from packaging import version
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from support import sparse_qa
from support.models import (
    VOCABULARY,
    ConvNet,
    EmbeddingNet,
    build,
    net,
    outputs,
    randomize,
    tiny_llama,
    tiny_llama_classifier,
    tiny_mixtral,
    tokens,
)
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_elastic import ElasticLoraConfig, MagnitudeConfig, SparseQALoraConfig, prune
from peft_elastic.supernet import get_elastic_host
from peft_elastic.tuners.elastic_lora import ElasticLoraModel


QV = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def elastic(model=None, config=None, **settings):
    config = ElasticLoraConfig(**(QV | settings)) if config is None else config
    model = get_peft_model(tiny_llama() if model is None else model, config).eval()
    randomize(model)
    return model


def values(config):
    """The fields of a configuration, without what peft itself writes into it."""
    fields = copy.deepcopy(vars(config))
    return {name: value for name, value in fields.items() if name != "base_model_name_or_path"}


# -- one object, several adapters ------------------------------------------------------------------------------------


def two_adapters(config):
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("b", config)
    return (model.base_model, "default"), (model.base_model, "b")


def two_models(config):
    return [(get_peft_model(tiny_llama(), config).base_model, "default") for _ in range(2)]


def two_injections(config):
    models = [inject_adapter_in_model(config, tiny_llama()) for _ in range(2)]
    return [(get_elastic_host(model), "default") for model in models]


def one_dict(config):
    configs = {"default": config}
    return [(ElasticLoraModel(tiny_llama(), configs, "default"), "default") for _ in range(2)]


def from_another_adapter(config):
    """As TRL's trainers make their frozen reference."""
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("ref", model.peft_config["default"])
    return (model.base_model, "default"), (model.base_model, "ref")


def in_transformers(config):
    if version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION):
        pytest.skip(f"this transformers adds adapters with peft {MIN_PEFT_VERSION} or later only")
    model = tiny_llama()
    model.add_adapter(config, "a")
    model.add_adapter(config, "b")
    host = get_elastic_host(model)
    return (host, "a"), (host, "b")


@pytest.mark.parametrize(
    "make", [two_adapters, two_models, two_injections, one_dict, from_another_adapter, in_transformers]
)
def test_a_subnet_stays_with_its_adapter(make):
    config = ElasticLoraConfig(**QV)
    before = values(config)
    (first, first_name), (second, second_name) = make(config)
    second.set_subnet("min", adapter_name=second_name)
    first.restore_subnet()
    second.restore_subnet()
    assert first.subnet_summary(first_name).name == "max"
    assert second.subnet_summary(second_name).name == "min"
    assert first.peft_config[first_name].active_subnet is None
    assert values(config) == before


def test_a_sorted_base_stays_with_its_model():
    config = ElasticLoraConfig(**QV, elastic_width={"mlp": [1.0, 0.5]}, importance="magnitude")
    first = elastic(config=config)
    assert first.peft_config["default"].sorted_base
    assert not config.sorted_base
    second, again = elastic(config=config), tiny_llama()
    assert second.peft_config["default"].sorted_base
    assert not torch.equal(
        second.get_base_model().model.layers[0].mlp.up_proj.weight, again.model.layers[0].mlp.up_proj.weight
    )


def test_the_grid_of_a_base_stays_with_its_model():
    config = SparseQALoraConfig(r=4, target_modules=sparse_qa.TARGETS, quantization_aware=True, sparse_adapter=False)
    before = values(config)
    for bits, group_size in ((4, 16), (8, 8)):
        model = get_peft_model(sparse_qa.quantized(tiny_llama(), bits=bits, group_size=group_size), config)
        own = model.peft_config["default"]
        assert (own.bits, own.group_size) == (bits, group_size)
        assert values(config) == before


def test_what_the_user_does_to_the_object_afterwards_is_not_seen():
    config = ElasticLoraConfig(**QV, rank_pattern={"q_proj": 4})
    model = elastic(config=config)
    config.r, config.elastic_ranks = 16, [16]
    config.rank_pattern["q_proj"] = 16
    own = model.peft_config["default"]
    assert (own.r, own.elastic_ranks, own.rank_pattern) == (8, None, {"q_proj": 4})


# -- fields that are set after construction ----------------------------------------------------------------------------


def by_attribute(config, **changes):
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def by_dict(config, **changes):
    return type(config)(**(config.to_dict() | changes))


def by_json(config, **changes):
    fields = {name: list(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return type(config)(**(json.loads(json.dumps(fields)) | changes))


def by_copy(config, **changes):
    return by_attribute(copy.copy(copy.deepcopy(config)), **changes)


CHANGES = [by_attribute, dataclasses.replace, by_dict, by_json, by_copy]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("r", "ranks"), [(16, (16, 12, 8)), (3, (3, 2)), (1, (1,))])
def test_default_ranks_follow_a_change_of_r(change, r, ranks):
    config = change(ElasticLoraConfig(**QV), r=r)
    model = elastic(config=config)
    assert {choice.options for choice in model.search_space} == {ranks}
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape[0] == r
    assert layer.scaling["default"] == 16 / r


@pytest.mark.parametrize("change", CHANGES)
def test_other_fields_follow_a_change(change):
    changed = {"lora_alpha": 4, "target_modules": ["up_proj"], "rank_groups": "block", "elastic_depth": [1]}
    changed["elastic_width"] = {"mlp": [0.5, 1.0]}
    model = elastic(config=change(ElasticLoraConfig(**QV, importance="none"), **changed))
    expected = elastic(importance="none", **changed)
    assert list(model.search_space) == list(expected.search_space)
    torch.testing.assert_close(outputs(model, tokens()), outputs(expected, tokens()))


def test_a_single_block_may_be_named_after_construction():
    config = ElasticLoraConfig(**QV)
    config.elastic_depth = 1  # as an `int`, which the constructor takes as well
    assert [choice.kind for choice in elastic(config=config).search_space].count("depth") == 1


@pytest.mark.parametrize(
    ("config_cls", "changes", "message"),
    [
        (ElasticLoraConfig, {"r": 0}, "`r` must be a whole number >= 1, got 0"),
        (
            ElasticLoraConfig,
            {"elastic_ranks": [4, 2]},
            "largest of `elastic_ranks` must be `r`, got elastic_ranks=.* with r=8",
        ),
        (ElasticLoraConfig, {"rank_groups": "layer"}, "`rank_groups` must be"),
        (ElasticLoraConfig, {"elastic_width": {"layers": [1.0]}}, "`elastic_width`"),
        (ElasticLoraConfig, {"elastic_depth": []}, "`elastic_depth` must be at least one block"),
        (ElasticLoraConfig, {"importance": "taste"}, "`importance` must be 'activation', 'gradient'"),
        (ElasticLoraConfig, {"init_lora_weights": "eva"}, "`init_lora_weights='eva'`"),
        (SparseQALoraConfig, {"bits": 4}, "belong to `quantization_aware=True`"),
        (SparseQALoraConfig, {"quantization_aware": True, "bits": 5}, "`bits`"),
        (SparseQALoraConfig, {"use_dora": True}, "`use_dora` cannot be combined"),
    ],
)
def test_fields_are_checked_when_the_adapter_is_made(config_cls, changes, message):
    config, base = config_cls(**QV), tiny_llama()
    names = list(base.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, by_attribute(config, **changes))
    assert list(base.state_dict()) == names


def test_explicit_ranks_contradict_another_r():
    config = ElasticLoraConfig(**QV, elastic_ranks=[8, 2])
    config.r = 16
    with pytest.raises(ValueError, match=r"got elastic_ranks=\[8, 2\] with r=16"):
        get_peft_model(tiny_llama(), config)


# -- loading over a name that is taken ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("saved", "before"), [("min", "max"), ("max", "min"), ("heuristic", "min"), (None, "min")])
def test_the_saved_subnet_comes_with_the_weights(tmp_path, saved, before):
    first = elastic()
    if saved:
        first.set_subnet(saved)
    first.save_pretrained(tmp_path / "first")
    second = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV)).eval()
    second.set_subnet(before)
    second.load_adapter(tmp_path / "first", "default", is_trainable=True)
    assert second.active_subnet == first.active_subnet
    torch.testing.assert_close(outputs(second, tokens()), outputs(first, tokens()), rtol=0, atol=0)
    second.restore_subnet()  # as after a step of training
    assert second.active_subnet == first.active_subnet


def test_the_saved_subnet_of_a_subfolder(tmp_path):
    first = elastic()
    first.add_adapter("b", ElasticLoraConfig(**QV))
    first.set_subnet("min", adapter_name="b")
    first.save_pretrained(tmp_path)
    second = elastic()
    second.load_adapter(tmp_path, "default", subfolder="b")
    assert second.subnet_summary().name == "min"


def test_a_subnet_of_another_space_is_refused_before_anything_is_loaded(tmp_path):
    other = elastic(elastic_ranks=[8, 3])
    other.set_subnet("min")
    other.save_pretrained(tmp_path)
    model = elastic()
    model.set_subnet("heuristic")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="`active_subnet` in the configuration of adapter 'default' is wrong"):
        model.load_adapter(tmp_path, "default")
    assert model.subnet_summary().name == "heuristic"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.restore_subnet()
    assert model.subnet_summary().name == "heuristic"


def test_weights_alone_leave_the_choice(tmp_path):
    first = elastic()
    first.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    second = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV))
    second.set_subnet("min")
    second.load_adapter(tmp_path, "default")
    assert second.subnet_summary().name == "min"
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A"
    loaded = load_file(tmp_path / "adapter_model.safetensors")[f"{key}.weight"]
    assert torch.equal(second.get_parameter(f"{key}.default.weight"), loaded)


def test_a_given_configuration_goes_before_the_file(tmp_path):
    first = elastic()
    first.set_subnet("min")
    first.save_pretrained(tmp_path)
    config = ElasticLoraConfig.from_pretrained(tmp_path)
    config.active_subnet = None
    assert PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config).subnet_summary().name == "max"
    assert PeftModel.from_pretrained(tiny_llama(), tmp_path).subnet_summary().name == "min"
    copied = copy.deepcopy(PeftModel.from_pretrained(tiny_llama(), tmp_path, config=config))
    copied.load_adapter(tmp_path, "default")
    assert copied.subnet_summary().name == "min"


# -- convolutions in groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "settings", "options"),
    [
        (2, {}, (8, 6, 4)),
        (4, {}, (8, 4)),
        (4, {"r": 12}, (12, 8)),
        (4, {"r": 4}, (4,)),
        (2, {"r": 6}, (6, 4)),
        (4, {"rank_pattern": {"grouped": 16}}, (16, 12, 8)),
        (4, {"rank_pattern": {"grouped": 16}, "elastic_ranks": [8, 3]}, (16, 8)),
        (4, {"elastic_ranks": [8, 4]}, (8, 4)),
    ],
)
@pytest.mark.parametrize("dim", [1, 2])
def test_ranks_divide_by_the_groups(groups, settings, options, dim):
    settings = {"target_modules": ["grouped"], **settings}
    model = elastic(net(ConvNet, dim, groups), **settings)
    (choice,) = model.search_space
    assert choice.options == options
    x = torch.randn(2, 3, *[9] * dim)
    for subnet in ("max", "min"):
        model.set_subnet(subnet)
        assert torch.isfinite(outputs(model, x)).all()
    stock = get_peft_model(
        net(ConvNet, dim, groups), LoraConfig(**{k: v for k, v in (QV | settings).items() if k != "elastic_ranks"})
    )
    randomize(stock)
    model.set_subnet("max")
    torch.testing.assert_close(outputs(model, x), outputs(stock.eval(), x))


def test_a_rank_group_suits_all_its_members():
    model = elastic(net(ConvNet, 2, 4), target_modules=["grouped", "head"], rank_groups=[["grouped", "head"]])
    (choice,) = model.search_space
    assert choice.options == (8, 4)


def test_explicit_ranks_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="groups=4; each of its ranks must be divisible"):
        elastic(net(ConvNet, 2, 4), target_modules=["grouped"], elastic_ranks=[8, 6])
    with pytest.raises(ValueError, match="groups=4 and rank 6"):  # by peft
        elastic(net(ConvNet, 2, 4), target_modules=["grouped"], r=6)


# -- parameters by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"lora_bias": True}, {"elastic_width": {"heads": [1.0, 0.5]}, "importance": "none"}]
)
def test_a_name_gives_the_whole_parameter(settings):
    model = elastic(**{"target_modules": ["q_proj", "o_proj"], **settings})
    whole = dict(model.named_parameters())
    model.set_subnet("min")
    for name, parameter in model.named_parameters():
        assert parameter is whole[name]
        assert model.get_parameter(name) is parameter
        assert model.base_model.get_parameter(name.removeprefix("base_model.")) is parameter
        assert model.get_base_model().get_parameter(name.removeprefix("base_model.model.")) is parameter
    attention = model.get_base_model().model.layers[0].self_attn
    for name, parameter in attention.named_parameters():
        assert attention.get_parameter(name) is parameter
    for module in (attention.q_proj.lora_A["default"], attention.q_proj.lora_B["default"]):
        assert module.get_parameter("weight") is module.full_weight
        assert module.weight.shape != module.full_weight.shape  # and what computes still sees the active part


def test_a_name_gives_the_whole_parameter_of_an_embedding():
    model = elastic(net(EmbeddingNet), target_modules=["embedding", "linear"])
    model.set_subnet("min")
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter


def test_adapters_are_copied_by_name_as_trl_does():
    model = elastic()
    model.set_subnet("min")
    expected = outputs(model, tokens())
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    model.set_subnet("max")
    randomize(model, seed=1, adapter_name="default")
    model.set_adapter("ref")
    torch.testing.assert_close(outputs(model, tokens()), expected, rtol=0, atol=0)


# -- names that match nothing ------------------------------------------------------------------------------------------


def test_names_of_other_architectures_are_a_warning():
    with pytest.warns(
        UserWarning, match=r"`target_modules` names \['query_key_value'\], which are not in the base model"
    ):
        model = elastic(target_modules=["q_proj", "query_key_value"])
    assert {module for choice in model.search_space for module in choice.modules} == {
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    }


def test_long_lists_are_looked_at_as_well():
    """peft shortens them."""
    others = [f"h.{i}.c_attn" for i in range(30)]
    with pytest.warns(UserWarning, match=r"h\.29\.c_attn"):
        elastic(target_modules=["q_proj", *others])


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["query_key_value", "c_attn"]},
        {"target_modules": r".*\.(query_key_value|c_attn)"},
        {"target_modules": ["query_key_value"], "target_parameters": ["mlp.experts.down_proj"]},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.up_proj"]},
        {"rank_pattern": {"c_attn": 4}},
    ],
)
def test_targets_that_match_nothing_at_all_are_an_error(settings):
    with pytest.raises(ValueError, match="not in the base model|not found in the base model|match no module"):
        elastic(tiny_mixtral(), **settings)


# -- "all-linear" ------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MIXTURES = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "HunYuanMoEV1": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "Qwen2Moe": {**EXPERTS, "shared_expert_intermediate_size": 24},
    "Qwen3Moe": {**EXPERTS, "head_dim": 8},
    "DeepseekV3": {
        **LATENT,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "DeepseekV2": {
        **LATENT,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "Glm4Moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
    },
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Llama": {},
}


def mixture(family):
    config_cls = getattr(transformers, f"{family}Config")
    return build(getattr(transformers, f"{family}ForCausalLM"), config_cls, **SIZES, **MIXTURES[family])


@pytest.mark.filterwarnings("ignore:.*only .* of the weights")
@pytest.mark.parametrize("family", MIXTURES)
def test_all_linear_adapts_what_lora_does(family):
    stock = get_peft_model(mixture(family), LoraConfig(r=4, target_modules="all-linear"))
    shapes = {name: tuple(parameter.shape) for name, parameter in stock.named_parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not in the base model")
        model = get_peft_model(mixture(family), ElasticLoraConfig(r=4, target_modules="all-linear"))
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == shapes


# PhiMoE's router is an `nn.Linear` that returns a tuple: stock LoRA fails on it as well
@pytest.mark.parametrize("family", [family for family in MIXTURES if family != "Phimoe"])
def test_all_linear_masks_the_linear_layers(family):
    base = mixture(family)
    prune(base, MagnitudeConfig(sparsity=0.5), progress=False)
    stock = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules="all-linear"))
    linear = {
        name
        for name, module in stock.named_modules()
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear)
    }
    model = get_peft_model(base, SparseQALoraConfig(r=4, target_modules="all-linear")).eval()
    randomize(model)
    assert {name for name, module in model.named_modules() if isinstance(module, LoraLayer)} == linear
    expected = outputs(model, tokens())
    zeros = {name: module.get_base_layer().weight == 0 for name, module in model.named_modules() if name in linear}
    merged = model.merge_and_unload(sparse_kernel=False)
    torch.testing.assert_close(outputs(merged, tokens()), expected, rtol=1e-4, atol=1e-4)
    for name, mask in zeros.items():
        weight = merged.get_parameter(f"{name.removeprefix('base_model.model.')}.weight")
        assert not weight[mask].any()


def test_routers_and_experts_that_are_named_are_refused_by_the_masked_adapter():
    with pytest.raises(ValueError, match="MixtralTopKRouter"):
        get_peft_model(tiny_mixtral(), SparseQALoraConfig(r=4, target_modules=["q_proj", "gate"]))


@pytest.mark.parametrize(
    ("model_cls", "task_type", "head"),
    [
        (transformers.BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (transformers.BertForQuestionAnswering, "QUESTION_ANS", "qa_outputs"),
        (transformers.BertForSequenceClassification, "SEQ_CLS", "classifier"),
    ],
)
def test_heads_are_saved_with_the_adapter(tmp_path, model_cls, task_type, head):
    """peft writes their names into the configuration after the adapter has been made."""

    def base():
        sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
        return build(model_cls, transformers.BertConfig, **sizes)

    config = ElasticLoraConfig(r=4, target_modules=["query"], task_type=task_type)
    model = get_peft_model(base(), config)
    randomize(model)
    nn.init.normal_(model.get_parameter(f"base_model.model.{head}.modules_to_save.default.weight"))
    model.save_pretrained(tmp_path)
    assert head in json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"]
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    inputs = {"input_ids": tokens()}
    torch.testing.assert_close(model.eval()(**inputs)[0], loaded(**inputs)[0], rtol=0, atol=0)


def test_a_classifier_keeps_its_own_modules_to_save():
    config = ElasticLoraConfig(**QV, task_type="SEQ_CLS")
    first, second = (get_peft_model(tiny_llama_classifier(), config) for _ in range(2))
    own = first.peft_config["default"]
    assert set(own.modules_to_save) == {"classifier", "score"}
    second.peft_config["default"].modules_to_save.append("head")
    assert "head" not in own.modules_to_save


# -- as in peft --------------------------------------------------------------------------------------------------------


def test_the_card_of_any_model_has_the_tag(tmp_path):
    base = net(ConvNet)
    model = elastic(base, target_modules=["head"])
    model.save_pretrained(tmp_path)
    assert "- lora" in (tmp_path / "README.md").read_text()
    model.unload()
    assert not hasattr(base, "model_tags")


def test_a_model_with_adapters_can_get_others_around_them():
    inner = elastic(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), target_modules=["0"])
    with pytest.warns(UserWarning, match="second time"):
        outer = elastic(inner, target_modules="base_model.model.1")
    assert torch.isfinite(outputs(outer, torch.randn(2, 6))).all()
