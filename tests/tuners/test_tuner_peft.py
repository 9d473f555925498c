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
"""Everything that peft does with LoRA adapters, done with elastic ones, at the maximal and at other subnets."""

import contextlib
import copy
import io
import json
import pickle
import warnings

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    PeftType,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import DoraCaching, rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from support.models import (
    ARCHITECTURES,
    AttentionNet,
    ConvNet,
    EmbeddingNet,
    net,
    outputs,
    randomize,
    tiny_bert,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_mixtral,
    tiny_opt,
    tokens,
)
from torch import nn

from peft_elastic import ElasticLoraConfig
from peft_elastic.structure.blocks import Structure
from peft_elastic.structure.importance import measure_importance


pytestmark = pytest.mark.filterwarnings("ignore")

QV = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def elastic(model=None, adapter_name="default", seed=0, **settings):
    model = tiny_llama() if model is None else model
    model = get_peft_model(model, ElasticLoraConfig(**(QV | settings)), adapter_name=adapter_name).eval()
    randomize(model, seed=seed)
    return model


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def each_subnet(model):
    """Activate max, heuristic, min and a random subnet, one after the other."""
    for subnet in ("max", "heuristic", "min", model.search_space.sample(1)):
        model.set_subnet(subnet)
        yield subnet


# -- saving and loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 4]},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}, "rank_groups": "module"},
        {"rank_groups": [["q_proj", "v_proj"]], "elastic_ranks": [8, 1]},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_save_and_load(tmp_path, settings, low_cpu_mem_usage):
    model = elastic(**settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(torch.randn_like(parameter))
    full = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    for subnet in each_subnet(model):
        before = outputs(model, tokens())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert loaded.active_subnet == model.active_subnet == model.search_space.subnet(subnet)
        assert loaded.search_space == model.search_space
        assert torch.equal(outputs(loaded, tokens()), before)
        # nothing but the choice depends on the subnet
        reloaded = get_peft_model_state_dict(loaded)
        assert reloaded.keys() == full.keys()
        assert all(torch.equal(reloaded[name], full[name]) for name in full)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_auto_classes(tmp_path, is_trainable):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    model = elastic(base, task_type="CAUSAL_LM")
    model.set_subnet("min")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=is_trainable).eval()
    assert loaded.active_subnet == model.search_space.min
    assert torch.equal(outputs(loaded, tokens()), outputs(model, tokens()))
    assert any(p.requires_grad for p in loaded.parameters()) is is_trainable


def test_auto_class_for_classification(tmp_path):
    """With a head that peft saves along with the adapter."""
    tiny_bert().save_pretrained(tmp_path / "base")
    base = type(tiny_bert()).from_pretrained(tmp_path / "base")
    model = elastic(base, task_type="SEQ_CLS", target_modules=["query", "value"])
    model.set_subnet("min")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    assert loaded.active_subnet == model.search_space.min
    assert torch.equal(outputs(loaded, tokens()), outputs(model, tokens()))


def test_saving_as_pickle(tmp_path):
    model = elastic()
    model.set_subnet("min")
    model.save_pretrained(tmp_path, safe_serialization=False)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(outputs(loaded, tokens()), outputs(model, tokens()))


def test_state_dict_functions():
    """`get_peft_model_state_dict` and `set_peft_model_state_dict` carry all ranks, whatever is active."""
    source, target = elastic(seed=1), elastic(seed=2)
    source.set_subnet("min")
    target.set_subnet("heuristic")
    state_dict = get_peft_model_state_dict(source)
    assert {tensor.shape for name, tensor in state_dict.items() if "lora_A" in name} == {(8, 32)}
    assert not set_peft_model_state_dict(target, state_dict).unexpected_keys
    assert target.active_subnet == target.search_space.heuristic
    for subnet in each_subnet(source):
        target.set_subnet(subnet)
        assert torch.equal(outputs(target, tokens()), outputs(source, tokens()))
    # as are the optimizer's parameters and the plain state dict
    assert all(8 in p.shape for p in source.parameters() if p.requires_grad)
    assert source.state_dict().keys() == get_peft_model(tiny_llama(), LoraConfig(**QV)).state_dict().keys()


def test_an_adapter_of_stock_lora_can_be_made_elastic(tmp_path):
    """The tensors of a saved adapter have the names and shapes of stock LoRA: its weights start a super-adapter."""
    stock = get_peft_model(tiny_llama(), LoraConfig(**QV)).eval()
    randomize(stock)
    model = elastic(seed=5)
    set_peft_model_state_dict(model, get_peft_model_state_dict(stock))
    assert torch.equal(outputs(model, tokens()), outputs(stock, tokens()))


def test_a_sampled_subnet_is_not_saved(tmp_path):
    model = elastic()
    model.set_subnet("heuristic")
    model.sample_subnet("min")
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_llama(), tmp_path).active_subnet == model.search_space.heuristic
    model.eval()
    assert model.active_subnet == model.search_space.heuristic


def test_the_model_card_is_tagged(tmp_path):
    model = elastic()
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "\n- lora\n" in card and "library_name: peft" in card
    # but what becomes of the base model later is no LoRA
    assert "lora" not in (model.merge_and_unload().model_tags or [])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"rank:model.layers.0.self_attn.q_proj": 4}, "no value for"),
        ({"rank:nowhere": 4}, "unknown choices 'rank:nowhere'"),
        ({}, "no value for"),
        ("every choice 7", "must be one of \\[8, 6, 4\\], got 7"),
        ("every choice -4", "non-negative integers, got -4"),
        ("every choice four", "non-negative integers, got 'four'"),
        ([8, 8], "must be a dict from choice key to value, got \\[8, 8\\]"),
        ("max", "must be a dict"),
    ],
)
def test_a_corrupt_subnet_is_refused_when_loading(tmp_path, value, message):
    model = elastic()
    model.save_pretrained(tmp_path)
    if isinstance(value, str) and value.startswith("every choice"):
        number = value.split()[-1]
        number = int(number) if number.lstrip("-").isdigit() else number
        value = dict.fromkeys((choice.key for choice in model.search_space), number)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"active_subnet": value}))
    base = tiny_llama()
    modules = [type(module) for module in base.modules()]
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert [type(module) for module in base.modules()] == modules
    assert all(p.requires_grad for p in base.parameters())
    host = elastic()
    before = [type(module) for module in host.modules()]
    with pytest.raises(ValueError, match=message):
        host.load_adapter(tmp_path, adapter_name="other")
    assert list(host.peft_config) == ["default"]
    assert [type(module) for module in host.modules()] == before


def test_a_subnet_of_another_space_is_refused(tmp_path):
    other = elastic(tiny_llama(num_hidden_layers=3))
    other.set_subnet("min")
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="active_subnet.*unknown choices 'rank:model.layers.2.self_attn.q_proj'"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    model = elastic()
    with pytest.raises(ValueError, match="unknown choices"):
        model.set_subnet(other.search_space.min)
    with pytest.raises(ValueError, match=r"must be one of \[8, 6, 4\], got 5"):
        model.set_subnet(dict.fromkeys((choice.key for choice in model.search_space), 5))
    with pytest.raises(ValueError, match="must be a Subnet, a dict, 'max', 'min' or 'heuristic', got 'small'"):
        model.set_subnet("small")
    assert model.active_subnet == model.search_space.max


# -- several adapters --------------------------------------------------------------------------------------------------


def three_adapters():
    """`default` on two kinds of modules, `b` with another space on others, `c` in block groups."""
    model = elastic()
    model.add_adapter("b", ElasticLoraConfig(r=6, elastic_ranks=[6, 1], lora_alpha=3, target_modules=["up_proj"]))
    model.add_adapter("c", ElasticLoraConfig(r=4, target_modules=["q_proj", "down_proj"], rank_groups="block"))
    randomize(model, seed=3)
    return model.eval()


def alone(model, name):
    """The named adapter in a model of its own, with the same weights and the same subnet."""
    config = copy.deepcopy(model.peft_config[name])
    single = get_peft_model(tiny_llama(), config).eval()
    set_peft_model_state_dict(single, get_peft_model_state_dict(model, adapter_name=name))
    return single


def test_several_adapters_have_spaces_and_subnets_of_their_own(tmp_path):
    model = three_adapters()
    assert [len(model.get_search_space(name)) for name in ("default", "b", "c")] == [4, 2, 2]
    model.set_subnet("min", adapter_name="b")
    model.set_subnet("heuristic", adapter_name="c")
    assert model.active_subnet == model.search_space.max
    for name in ("default", "b", "c"):
        model.set_adapter(name)
        assert model.search_space == model.get_search_space(name)
        close(outputs(model, tokens()), outputs(alone(model, name), tokens()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    loaded.load_adapter(tmp_path / "b", adapter_name="b")
    loaded.load_adapter(tmp_path / "c", adapter_name="c", low_cpu_mem_usage=True)
    loaded.eval()
    for name in ("default", "b", "c"):
        assert loaded.get_active_subnet(name) == model.get_active_subnet(name)
        for m in (model, loaded):
            m.set_adapter(name)
        assert torch.equal(outputs(model, tokens()), outputs(loaded, tokens()))


def test_two_active_adapters_need_a_name():
    model = three_adapters()
    model.base_model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match=r"2 elastic adapters are active, \['default', 'b'\]"):
        model.set_subnet("min")
    with pytest.raises(ValueError, match=r"one of the elastic adapters \['default', 'b', 'c'\], got 'd'"):
        model.set_subnet("min", adapter_name="d")
    model.set_subnet("min", adapter_name="b")
    assert model.get_active_subnet("b") == model.get_search_space("b").min
    model.eval()
    model.train()


def test_mixed_batches():
    """One forward, another adapter for each sample: each with its own active subnet."""
    model = three_adapters()
    for default, b in (("max", "max"), ("min", "heuristic"), ("heuristic", "min")):
        model.set_subnet(default, adapter_name="default")
        model.set_subnet(b, adapter_name="b")
        inputs = tokens(batch=4)
        mixed = outputs(model, {"input_ids": inputs}, adapter_names=["b", "default", "__base__", "c"])
        for row, name in enumerate(["b", "default", None, "c"]):
            with model.disable_adapter() if name is None else contextlib.nullcontext():
                model.set_adapter(name or "default")
                close(mixed[row : row + 1], outputs(model, inputs[row : row + 1]))


def test_mixed_batches_of_other_layers():
    model = get_peft_model(net(EmbeddingNet), ElasticLoraConfig(r=8, target_modules=["embedding", "conv1d"])).eval()
    model.add_adapter("b", ElasticLoraConfig(r=4, target_modules=["embedding", "linear"]))
    randomize(model)
    model.set_subnet("min")
    x = torch.randint(0, 20, (2, 5))
    mixed = outputs(model, x, adapter_names=["b", "default"])
    close(mixed[1:], outputs(model, x[1:]))
    model.set_adapter("b")
    close(mixed[:1], outputs(model, x[:1]))


def test_disable_adapter():
    model = elastic()
    base = outputs(tiny_llama(), tokens())
    for _ in each_subnet(model):
        before = outputs(model, tokens())
        assert (before - base).abs().max() > 1e-2
        with model.disable_adapter():
            assert torch.equal(outputs(model, tokens()), base)
        assert torch.equal(outputs(model, tokens()), before)


def test_delete_adapter():
    model = three_adapters()
    model.set_subnet("min", adapter_name="c")
    expected = outputs(alone(model, "c"), tokens())
    model.delete_adapter("default")
    model.set_adapter("c")
    assert list(model.peft_config) == ["b", "c"]
    close(outputs(model, tokens()), expected)
    with pytest.raises(ValueError, match="got 'default'"):
        model.get_search_space("default")
    # the name may be used again, with another space
    model.add_adapter("default", ElasticLoraConfig(r=2, target_modules=["k_proj"]))
    assert model.get_search_space("default").choices[0].options == (2, 1)
    model.delete_adapter("b")
    model.delete_adapter("c")
    model.delete_adapter("default")
    # (peft's own forward fails without any adapter)
    assert torch.equal(outputs(model.base_model, tokens()), outputs(tiny_llama(), tokens()))
    with pytest.raises(ValueError, match="0 elastic adapters are active"):
        model.set_subnet("min")


def test_second_embedding_adapter_keeps_the_first_one_elastic():
    model = elastic(target_modules=["embed_tokens"])
    model.set_subnet("min")
    before = outputs(model, tokens())
    model.add_adapter("b", ElasticLoraConfig(r=2, target_modules=["embed_tokens"]))
    assert torch.equal(outputs(model, tokens()), before)
    model.delete_adapter("default")
    model.add_adapter("default", ElasticLoraConfig(r=6, target_modules=["embed_tokens"]))
    assert model.get_active_subnet("default") == model.get_search_space("default").max


# -- merging -----------------------------------------------------------------------------------------------------------

MERGED = {
    "llama": (tiny_llama, {"target_modules": "all-linear"}, tokens),
    "dora": (tiny_llama, {"target_modules": "all-linear", "use_dora": True}, tokens),
    "rslora": (tiny_llama, {"use_rslora": True}, tokens),
    "gpt2": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj"]}, tokens),
    "gpt2-dora": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}, tokens),
    "lora_bias": (tiny_opt, {"target_modules": ["fc1", "q_proj"], "lora_bias": True}, tokens),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj"]}, tokens),
    "embedding-dora": (tiny_llama, {"target_modules": ["embed_tokens"], "use_dora": True}, tokens),
    "experts": (
        tiny_mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        tokens,
    ),
    "conv1d": (lambda: net(ConvNet, 1), {"target_modules": ["conv", "pointwise"]}, lambda: torch.randn(2, 3, 9)),
    "conv2d": (lambda: net(ConvNet, 2), {"target_modules": ["conv", "pointwise"]}, lambda: torch.randn(2, 3, 7, 8)),
    "conv2d-dora": (
        lambda: net(ConvNet, 2),
        {"target_modules": ["conv", "pointwise"], "use_dora": True},
        lambda: torch.randn(2, 3, 7, 8),
    ),
    # peft fails to merge a pointwise Conv3d
    "conv3d": (lambda: net(ConvNet, 3), {"target_modules": ["conv"]}, lambda: torch.randn(2, 3, 4, 5, 6)),
    "attention": (lambda: net(AttentionNet), {"target_modules": ["attention"]}, lambda: torch.randn(2, 5, 12)),
    "modules_to_save": (tiny_llama, {"modules_to_save": ["lm_head"]}, tokens),
}


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("case", MERGED)
def test_merge_and_unmerge(case, safe_merge):
    build, settings, inputs = MERGED[case]
    model, x = elastic(build(), **settings), inputs()
    for subnet in each_subnet(model):
        before = outputs(model, x)
        model.merge_adapter(safe_merge=safe_merge)
        close(outputs(model, x), before)
        for change in (model.set_subnet, model.sample_subnet):
            with pytest.raises(ValueError, match="'default' is merged.*unmerge_adapter"):
                change("max")
        assert model.active_subnet == model.search_space.subnet(subnet)
        model.unmerge_adapter()
        close(outputs(model, x), before)


@pytest.mark.parametrize("case", MERGED)
def test_merge_and_unload(case):
    build, settings, inputs = MERGED[case]
    x = inputs()
    types = [type(module) for module in build().modules()]
    for subnet in ("max", "min"):
        model = elastic(build(), **settings)
        model.set_subnet(subnet)
        before = outputs(model, x)
        merged = model.merge_and_unload()
        close(outputs(merged, x), before)
        assert [type(module) for module in merged.modules()] == types
        assert not hasattr(merged, "peft_config") and not any("elastic" in name for name in vars(merged))


def test_merging_grouped_convolutions_is_refused_as_in_peft():
    model = elastic(net(ConvNet), target_modules=["grouped"], elastic_ranks=[8, 4])
    model.set_subnet("min")
    with pytest.raises(NotImplementedError, match="groups > 1"):
        model.merge_adapter()


def test_merging_broken_weights_is_refused_as_in_peft():
    """`safe_merge` looks at what is active: the ranks outside of the subnet may hold anything."""
    model = elastic()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].full_weight.data[-1] = torch.nan
    model.set_subnet("min")
    model.merge_adapter(safe_merge=True)
    model.unmerge_adapter()
    model.set_subnet("max")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)


def test_merging_several_adapters():
    model = three_adapters()
    model.set_subnet("min", adapter_name="default")
    model.base_model.set_adapter(["default", "b"])
    before = outputs(model, tokens())
    close(outputs(model.merge_and_unload(adapter_names=["default", "b"]), tokens()), before)


@pytest.mark.parametrize("case", [case for case in MERGED if case != "modules_to_save"])
def test_unload_leaves_the_base_untouched(case):
    build, settings, inputs = MERGED[case]
    expected = build().state_dict()
    model = elastic(build(), **settings)
    for _ in each_subnet(model):
        outputs(model, inputs())
    found = model.unload().state_dict()
    assert found.keys() == expected.keys()
    if case == "attention":  # peft merges and unmerges this one in every forward
        assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    else:
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_set_subnet_does_not_touch_any_weight():
    model = elastic(target_modules="all-linear")
    before = {name: (tensor.clone(), tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    for _ in each_subnet(model):
        outputs(model, tokens())
    after = model.state_dict()
    assert all(torch.equal(after[n], t) and after[n].data_ptr() == p for n, (t, p) in before.items())


# -- combining ---------------------------------------------------------------------------------------------------------

COMBINATIONS = [
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


def zero_padded(model, name):
    """State dict of the adapter in which everything outside of its active subnet is zero."""
    subnet, state_dict = model.get_active_subnet(name), get_peft_model_state_dict(model, adapter_name=name)
    ranks = {n: subnet[choice.key] for choice in model.get_search_space(name) for n in choice.modules}
    padded = {}
    for key, tensor in state_dict.items():
        if ".lora_" not in key:  # the embedding itself, which peft saves too
            continue
        if "magnitude" in key:
            padded[key] = tensor
            continue
        tensor = tensor.clone()
        k = ranks[key.removeprefix("base_model.model.").rpartition(".lora_")[0]]
        (tensor if "_A" in key else tensor.T)[k:] = 0
        padded[key] = tensor
    return padded


@pytest.mark.parametrize("combination_type", COMBINATIONS)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["embed_tokens", "q_proj"]], ids=["linear", "embedding"])
def test_add_weighted_adapter(combination_type, targets):
    """The result is that of stock peft for adapters that hold what is active here."""
    settings = {"target_modules": targets}
    kwargs = {"combination_type": combination_type}
    if combination_type not in ("linear", "cat", "svd"):
        kwargs["density"] = 0.6
    model = elastic(**settings)
    model.add_adapter("b", ElasticLoraConfig(**(QV | settings | {"elastic_ranks": [8, 2]})))
    randomize(model)
    stock = get_peft_model(tiny_llama(), LoraConfig(**(QV | settings))).eval()
    stock.add_adapter("b", LoraConfig(**(QV | settings)))
    model.set_subnet("heuristic", adapter_name="default")
    model.set_subnet("min", adapter_name="b")
    for name in ("default", "b"):
        set_peft_model_state_dict(stock, zero_padded(model, name), adapter_name=name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    configs = copy.deepcopy(model.peft_config)

    for m in (model, stock):
        torch.manual_seed(1)
        m.add_weighted_adapter(["default", "b"], [0.7, -0.4], "mix", **kwargs)
        m.set_adapter("mix")
    close(outputs(model, tokens()), outputs(stock, tokens()), 1e-4)

    # the sources are as they were, and the mixture has a fixed rank
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert {name: model.peft_config[name] for name in ("default", "b")} == configs
    assert model.get_active_subnet("default") == model.get_search_space("default").heuristic
    assert model.get_active_subnet("b") == model.get_search_space("b").min
    assert model.get_search_space("mix").size == 1
    assert (
        model.peft_config["mix"].elastic_ranks
        == [model.peft_config["mix"].r]
        == [16 if "cat" in kwargs.values() else 8]
    )


def test_a_weighted_adapter_can_be_saved_and_exported(tmp_path):
    model = elastic()
    model.add_adapter("b", ElasticLoraConfig(**QV))
    randomize(model)
    model.set_subnet("min")
    model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "mix", combination_type="cat")
    model.set_adapter("mix")
    before = outputs(model, tokens())
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    close(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path / "mix").eval(), tokens()), before)
    model.export_lora(tmp_path / "plain")
    close(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval(), tokens()), before)


def test_weighted_adapters_of_grouped_convolutions():
    """The rank of a grouped convolution comes in several parts."""
    settings = {"target_modules": ["grouped"], "elastic_ranks": [8, 4], "lora_alpha": 8}
    model = elastic(net(ConvNet), **settings)
    model.add_adapter("b", ElasticLoraConfig(**(QV | settings)))
    randomize(model)
    model.set_subnet("min")
    x = torch.randn(2, 3, 7, 8)
    before = outputs(model, x)
    model.add_weighted_adapter(["default"], [1.0], "copy")
    model.set_adapter("copy")
    close(outputs(model, x), before)


def test_add_weighted_adapter_of_unknown_adapters_is_refused_as_in_peft():
    model = elastic()
    with pytest.raises(ValueError, match="Adapter nope does not exist"):
        model.add_weighted_adapter(["default", "nope"], [1.0, 1.0], "mix")
    assert list(model.peft_config) == ["default"]
    model.add_adapter("b", ElasticLoraConfig(**(QV | {"r": 4})))
    config = copy.deepcopy(model.peft_config["default"])
    with pytest.raises(ValueError, match="same r value"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "mix", combination_type="linear")
    assert model.peft_config["default"] == config
    assert model.active_subnet == model.search_space.max


def test_conversion_to_lora(tmp_path):
    """peft's `convert_to_lora` and `save_as_lora` see the active subnet."""
    from peft import convert_to_lora, save_as_lora

    model = elastic()
    model.set_subnet("min")
    before = outputs(model, tokens())
    config, state_dict = convert_to_lora(model, rank=4)
    assert config.peft_type == "LORA" and config.r == 4
    stock = get_peft_model(tiny_llama(), config).eval()
    assert not set_peft_model_state_dict(stock, state_dict).unexpected_keys
    close(outputs(stock, tokens()), before, 1e-4)
    save_as_lora(tmp_path, model, rank=0.9999999)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert loaded.peft_config["default"].peft_type == PeftType.LORA
    close(outputs(loaded, tokens()), before, 1e-2)


# -- looking at models -------------------------------------------------------------------------------------------------


def test_status():
    model = three_adapters()
    model.set_subnet("min")
    for found, expected in zip(get_layer_status(model), get_layer_status(three_adapters())):
        assert found == expected
    status = get_model_status(model)
    assert status.adapter_model_type == "ElasticLoraModel"
    assert status.peft_types == {"default": "ELASTIC_LORA", "b": "ELASTIC_LORA", "c": "ELASTIC_LORA"}
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.num_adapter_layers == 8
    stock = get_peft_model(tiny_llama(), LoraConfig(**QV))
    assert elastic().get_nb_trainable_parameters() == stock.get_nb_trainable_parameters()


def printed(function):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        function()
    return text.getvalue()


def test_print_trainable_parameters():
    model = elastic()
    stock = printed(get_peft_model(tiny_llama(), LoraConfig(**QV)).print_trainable_parameters)
    line = "active subnet of adapter 'default': {} ({} of 1,792 adapter parameters, {}%)\n"
    assert printed(model.print_trainable_parameters) == stock + line.format("max", "1,792", "100.0")
    model.set_subnet("min")
    expected = stock + line.format("min", "896", "50.0")
    assert printed(model.print_trainable_parameters) == expected
    # a copy speaks for itself
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert printed(twin.print_trainable_parameters) == expected
        twin.set_subnet("max")
        assert printed(twin.print_trainable_parameters) == stock + line.format("max", "1,792", "100.0")
    assert printed(model.print_trainable_parameters) == expected
    model.add_adapter("b", ElasticLoraConfig(r=2, target_modules=["up_proj"]))
    model.base_model.set_adapter(["default", "b"])
    assert "adapter 'b': max" in printed(model.print_trainable_parameters)


def test_subnet_summary():
    model = elastic(rank_groups=[["q_proj", "v_proj"]])
    model.set_subnet("heuristic")
    summary = model.subnet_summary()
    assert (summary.name, summary.active_parameters, summary.total_parameters) == ("heuristic", 1344, 1792)
    assert str(summary).splitlines() == [
        "active subnet of adapter 'default': heuristic (1,344 of 1,792 adapter parameters, 75.0%)",
        "rank:model.layers.0.q_proj+v_proj       6  of [8, 6, 4]",
        "rank:model.layers.1.q_proj+v_proj       6  of [8, 6, 4]",
    ]
    subnet = model.search_space.max.to_dict() | {"rank:model.layers.1.q_proj+v_proj": 4}
    model.set_subnet(subnet)
    assert model.subnet_summary().name == "custom"


def test_repr_shows_what_is_active():
    model = elastic(rank_groups="block")
    assert "active" not in repr(model)
    model.set_subnet("min")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert "in_features=32, out_features=8, bias=False, active=4" in repr(layer)


def test_copies_are_independent(tmp_path):
    model = three_adapters()
    model.set_subnet("min")
    before = outputs(model, tokens())
    torch.save(model, tmp_path / "model.pt")
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "model.pt", weights_only=False),
    ]
    for twin in twins:
        assert torch.equal(outputs(twin, tokens()), before)
        assert twin.active_subnet == model.active_subnet
        twin.set_subnet("max")
        assert (outputs(twin, tokens()) - before).abs().max() > 1e-3
        assert torch.equal(outputs(model, tokens()), before)
    # copies are complete: they can be trained, saved and get further adapters
    twin = twins[0]
    twin.set_subnet("heuristic")
    twin.save_pretrained(tmp_path / "twin")
    chosen = dict.fromkeys((f"rank:model.layers.{i}.self_attn.k_proj" for i in range(2)), 2)
    twin.add_adapter("d", ElasticLoraConfig(r=4, target_modules=["k_proj"], active_subnet=chosen))
    assert twin.get_active_subnet("d") == chosen
    assert "d" not in model.peft_config


# -- peft's options ----------------------------------------------------------------------------------------------------


def test_modules_to_save_and_biases_are_trained():
    model = elastic(tiny_opt(), bias="lora_only", modules_to_save=["fc1"])
    model.set_subnet("min")
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    stock = get_peft_model(tiny_opt(), LoraConfig(**(QV | {"bias": "lora_only", "modules_to_save": ["fc1"]})))
    assert trained == {n for n, p in stock.named_parameters() if p.requires_grad}
    assert any(n.endswith("q_proj.base_layer.bias") for n in trained)
    assert all(p.grad is not None for n, p in model.named_parameters() if n in trained)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_saved(tmp_path, bias):
    model = elastic(tiny_opt(), bias=bias)
    model.set_subnet("min")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name.endswith(".bias"):
                parameter.add_(1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_opt(), tmp_path).eval()
    assert torch.equal(outputs(loaded, tokens()), outputs(model, tokens()))


def test_default_target_modules():
    """As in peft, they follow from the model's type."""
    for build in (tiny_llama, tiny_gpt2, tiny_bert):
        found = get_peft_model(build(), ElasticLoraConfig()).targeted_module_names
        assert found == get_peft_model(build(), LoraConfig()).targeted_module_names


@pytest.mark.parametrize("target_modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]])
def test_tied_embeddings(tmp_path, target_modules):
    """`ensure_weight_tying` gives embedding and output layer the same adapter weights, and so the same rank."""
    settings = {"target_modules": target_modules, "ensure_weight_tying": True}
    model = elastic(tiny_gemma(), **settings)
    choice = next(choice for choice in model.search_space if "lm_head" in choice.modules)
    assert choice.modules == ("model.embed_tokens", "lm_head")
    for _ in each_subnet(model):
        embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
        assert torch.equal(embedding.lora_embedding_A["default"], head.lora_B["default"].weight.T)
        assert torch.equal(embedding.lora_embedding_B["default"], head.lora_A["default"].weight.T)
        before = outputs(model, tokens())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_gemma(), tmp_path).eval()
        assert loaded.active_subnet == model.active_subnet
        assert torch.equal(outputs(loaded, tokens()), before)
    stock = get_peft_model(tiny_gemma(), LoraConfig(**(QV | settings))).eval()
    model.set_subnet("max")
    set_peft_model_state_dict(stock, get_peft_model_state_dict(model))
    assert torch.equal(outputs(model, tokens()), outputs(stock, tokens()))


def test_tied_adapters_in_explicit_groups():
    model = elastic(
        tiny_gemma(),
        target_modules=["embed_tokens", "lm_head", "q_proj"],
        ensure_weight_tying=True,
        rank_groups=[["lm_head", "q_proj"]],
    )
    modules = {choice.name: set(choice.modules) for choice in model.search_space}
    assert modules["model.embed_tokens"] == {"model.embed_tokens", "lm_head"}


def test_scaling_is_that_of_the_maximal_rank():
    model = elastic(rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 5})
    for _ in each_subnet(model):
        layer = model.base_model.model.model.layers[0].self_attn
        assert (layer.q_proj.scaling["default"], layer.v_proj.scaling["default"]) == (4.0, 0.625)
        layer.q_proj.set_scale("default", 2)
        assert layer.q_proj.scaling["default"] == 8.0
        layer.q_proj.unscale_layer()
        assert layer.q_proj.scaling["default"] == 4.0
    before = outputs(model, tokens())
    with rescale_adapter_scale(model, multiplier=0.0):
        close(outputs(model, tokens()), outputs(tiny_llama(), tokens()))
    close(outputs(model, tokens()), before)


def test_dora_caches_follow_the_subnet():
    model = elastic(use_dora=True)
    expected = [outputs(model, tokens()) for _ in each_subnet(model)]
    with DoraCaching():
        found = [outputs(model, tokens()) for _ in each_subnet(model)]
    for a, b in zip(found, expected):
        close(a, b)


def test_alora():
    """Activated LoRA: the adapter applies from its invocation tokens on."""
    settings = {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}
    ids = tokens(batch=2, length=8, low=10)
    ids[0, 3:5] = torch.tensor([5, 6])
    model = elastic(**settings)
    stock = get_peft_model(tiny_llama(), LoraConfig(**(QV | settings))).eval()
    base = outputs(tiny_llama(), ids)
    for _ in each_subnet(model):
        found = outputs(model, ids)
        close(found[1], base[1])
        close(found[0, :3], base[0, :3])
        assert (found[0, 4:] - base[0, 4:]).abs().max() > 1e-2
    model.set_subnet("min")
    set_peft_model_state_dict(stock, zero_padded(model, "default"))
    close(outputs(model, ids), outputs(stock, ids))


def test_velora():
    """VeLoRA compresses what A saves for its gradient, along A's inputs."""
    settings = {"velora_config": {"num_groups": 4, "init_type": "random"}}
    model = elastic(**settings)
    stock = get_peft_model(tiny_llama(), LoraConfig(**(QV | settings)))
    model.set_subnet("min")
    set_peft_model_state_dict(stock, zero_padded_with_buffers(model))
    for m in (model, stock):
        m.train()
        m(input_ids=tokens(), labels=tokens()).loss.backward()
    close(outputs(model.eval(), tokens()), outputs(stock.eval(), tokens()))
    expected = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad, reference = ((p.grad, p.grad.T)["lora_B" in name] for p in (parameter, expected[name]))
            close(grad[:4], reference[:4])
            assert grad[4:].eq(0).all() and grad[:4].abs().max() > 0


def zero_padded_with_buffers(model):
    state_dict = get_peft_model_state_dict(model)
    for name, tensor in state_dict.items():
        if name.endswith(("lora_A.weight", "lora_B.weight")):
            state_dict[name] = tensor = tensor.clone()
            (tensor if "_A" in name else tensor.T)[4:] = 0
    return state_dict


def test_dropout_and_training_mode():
    model = elastic(lora_dropout=0.5)
    model.set_subnet("min")
    model.train()
    torch.manual_seed(0)
    first = outputs(model, tokens())
    assert (first - outputs(model, tokens())).abs().max() > 1e-3
    model.eval()
    assert torch.equal(outputs(model, tokens()), outputs(model, tokens()))


def test_generation():
    model = elastic(task_type="CAUSAL_LM")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    results = []
    for _ in each_subnet(model):
        found = model.generate(input_ids=tokens(batch=2), **settings)
        merged = copy.deepcopy(model).merge_and_unload()
        assert torch.equal(found, merged.generate(input_ids=tokens(batch=2), **settings))
        results.append(found)
    assert any(not torch.equal(results[0], other) for other in results[1:])


def test_inputs_require_gradients_for_checkpointing():
    model = elastic()
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable()
    model.train()
    model.set_subnet("min")
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("subnet", ["max", "min"])
def test_offloaded_weights(tmp_path, subnet):
    """accelerate keeps the adapter's weights, too, on disk and brings them back for each forward: what it brings back
    takes its shape from what is active, so other than the maximal subnet is refused."""
    from accelerate import dispatch_model

    model = elastic()
    model.set_subnet(subnet)
    before = outputs(model, tokens())
    device_map = {"lm_head": "cpu"} | {f"model.{name}": "cpu" for name, _ in model.model.model.named_children()}
    del device_map["model.layers"]
    device_map |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    device_map = {f"base_model.model.{name}": device for name, device in device_map.items()}
    dispatch_model(model, device_map=device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.model.model.layers[0].self_attn.q_proj.lora_A["default"].full_weight.is_meta
    if subnet == "max":
        close(outputs(model, tokens()), before)
    else:
        with pytest.raises(ValueError, match="offloaded the weights of an elastic adapter"):
            outputs(model, tokens())


# -- bitsandbytes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A function that loads the tiny model in 4 or 8 bits, as a user would."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = tmp_path_factory.mktemp("base")
    tiny_llama(hidden_size=64, num_attention_heads=4, intermediate_size=64).save_pretrained(path)

    def load(bits, packs=False, **options):
        config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options)
        model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, device_map="cpu").eval()
        for module in model.modules():
            # on processors with AVX512, an evaluation reorders the weights, which stock peft and autograd then misread
            if hasattr(module, "support_avx512bf16_for_cpu") and not packs:
                module.support_avx512bf16_for_cpu = False
        return model

    return load


# DoRA on 8 bits fails in peft's own layer at the second forward on a CPU
@pytest.mark.parametrize(("bits", "use_dora"), [(4, False), (4, True), (8, False)])
def test_bitsandbytes(quantized, bits, use_dora):
    """Forward, a training step and merging, all as in stock LoRA that has nothing but the active ranks."""
    from peft import prepare_model_for_kbit_training

    settings = QV | {"target_modules": "all-linear", "use_dora": use_dora}
    model = elastic(prepare_model_for_kbit_training(quantized(bits)), **settings)
    stock = get_peft_model(prepare_model_for_kbit_training(quantized(bits)), LoraConfig(**settings)).eval()
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert {type(layer).__name__ for layer in layers} == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    largest = outputs(model, tokens())
    model.set_subnet("min")
    assert (largest - outputs(model, tokens())).abs().max() > 1e-2
    set_peft_model_state_dict(stock, get_peft_model_state_dict(model) | zero_padded(model, "default"))
    close(outputs(model, tokens()), outputs(stock, tokens()), 1e-4)

    for m in (model, stock):
        m.train()
        m(input_ids=tokens(), labels=tokens()).loss.backward()
    expected = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            active = (parameter.grad, parameter.grad.T)["lora_B" in name]
            assert active[4:].eq(0).all() and active[:4].abs().max() > 0
            close(active[:4], (expected[name].grad, expected[name].grad.T)["lora_B" in name][:4], 1e-4)
    merged = [outputs(m.eval().merge_and_unload(), tokens()) for m in (model, stock)]
    close(*merged, 1e-4)


@pytest.fixture
def packing(quantized):
    if not quantized(4, packs=True).model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes reorders weights on processors with AVX512 and bfloat16")


def after_an_evaluation(quantized, adapter=None, nested=False, quant_type="fp4"):
    """A model that has been evaluated and one that has not, with the same adapter."""
    options = {"bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_type": quant_type}
    settings = {"target_modules": ["q_proj", "up_proj", "down_proj"], "use_dora": False} | (adapter or {})
    models = [elastic(quantized(4, packs=packs, **options), **settings).eval() for packs in (True, False)]
    outputs(models[0], tokens())
    return models


def bnb_weight(layer):
    """The weight that a layer in the usual order multiplies with."""
    from bitsandbytes.functional import dequantize_4bit

    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


# rounding to 4 bits once more, of scales that have been rounded to bfloat16, can move a weight by a level
BNB_ROUNDING = 0.1  # garbage is off by 1 and more


@pytest.mark.parametrize(("nested", "quant_type"), [(False, "nf4"), (True, "nf4"), (False, "fp4")])
@pytest.mark.parametrize("way", ["unload", "in place", "safe", "twice"])
def test_merging_into_bitsandbytes_after_an_evaluation(quantized, packing, nested, quant_type, way):
    def merged(model):
        layers = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
        bases = [layer.get_base_layer() for layer in layers.values()]
        if way == "unload":
            model.merge_and_unload(sparse_kernel=False)
        elif way == "twice":
            model.merge_adapter()
            outputs(model, tokens())
            model.unmerge_adapter()
            outputs(model, tokens())
            model.merge_adapter()
        else:
            model.merge_adapter(safe_merge=way == "safe")
        return [bnb_weight(base) for base in bases]

    evaluated, fresh = after_an_evaluation(quantized, nested=nested, quant_type=quant_type)
    for weight, expected in zip(merged(evaluated), merged(fresh), strict=True):
        assert (weight - expected).norm() < BNB_ROUNDING * expected.norm()


def test_unmerging_from_bitsandbytes_by_disabling(quantized, packing):
    """A forward pass with adapters disabled unmerges, in the layers themselves."""
    evaluated, fresh = after_an_evaluation(quantized)
    for model in (evaluated, fresh):
        model.merge_adapter()
        outputs(model, tokens())
        with model.disable_adapter():
            outputs(model, tokens())
        model.train()
    for a, b in zip(evaluated.modules(), fresh.modules(), strict=True):
        if type(a).__module__.startswith("bitsandbytes"):
            assert (bnb_weight(a) - bnb_weight(b)).norm() < BNB_ROUNDING * bnb_weight(b).norm()


def test_dora_on_bitsandbytes_evaluates_as_it_trains(quantized, packing):
    evaluated, fresh = after_an_evaluation(quantized, adapter={"use_dora": True, "lora_dropout": 0.0})
    close(
        outputs(evaluated, tokens()), outputs(fresh, tokens()), 0.05
    )  # layers without an adapter compute in bfloat16
    # the base was evaluated before it got its adapter, and its norms were taken then
    base = quantized(4, packs=True)
    base(tokens())
    late = elastic(base, target_modules=["q_proj", "up_proj", "down_proj"], use_dora=True)
    close(outputs(late, tokens()), outputs(fresh, tokens()), 0.05)
    late.unload()
    assert all(getattr(m, "support_avx512bf16_for_cpu", True) and not m._forward_pre_hooks for m in base.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_training_on_bitsandbytes_goes_on_after_an_evaluation(quantized, packing, mode):
    """Nothing flows back through a weight that is in the order of inference, in whatever mode."""
    evaluated, fresh = after_an_evaluation(quantized)
    for model in (evaluated, fresh):
        model.train(mode)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
    for a, b in zip(evaluated.parameters(), fresh.parameters(), strict=True):
        if a.requires_grad:
            assert (a.grad - b.grad).norm() < 0.05 * b.grad.norm() + 1e-6


def test_importance_by_gradient_after_an_evaluation(quantized, packing):
    models = [quantized(4, packs=packs).eval() for packs in (True, False)]
    outputs(models[0], tokens())
    found, expected = (
        measure_importance(model, Structure(model).widths, "gradient", [{"input_ids": tokens()}], progress=False)
        for model in models
    )
    for name, score in expected.items():
        assert (found[name] - score).norm() < 0.1 * score.norm()


# -- warnings and mistakes ---------------------------------------------------------------------------------------------


def steps(model, n, sample):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(n):
            if sample:
                model.sample_subnet(model.search_space.sample(step))
            model.train()
            model(input_ids=tokens(), labels=tokens()).loss.backward()
            optimizer.step()
    return [str(w.message) for w in caught if "SubnetSamplingCallback" in str(w.message)]


def test_training_one_subnet_warns_once():
    model = elastic()
    assert len(steps(model, 5, sample=False)) == 1
    assert steps(elastic(), 5, sample=True) == []
    # a fixed rank is what the user asked for
    assert steps(elastic(elastic_ranks=[8]), 5, sample=False) == []
    # other code may switch to training mode and back without training
    model = elastic()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model.train()
            model.eval()


def test_two_adapters_trained_together_do_not_break_the_warning():
    model = three_adapters()
    model.base_model.set_adapter(["default", "b"])
    assert len(steps(model, 3, sample=False)) == 1


def test_padding_for_hotswap_is_noticed():
    """peft's function replaces A and B by plain layers; the subnet could not be changed any more."""
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    model = elastic()
    prepare_model_for_compiled_hotswap(model, target_rank=16)
    for use in (lambda: model.set_subnet("min"), lambda: model.active_subnet, lambda: model.export_lora("nowhere")):
        with pytest.raises(ValueError, match="replaced by a fixed-rank layer, for example by `prepare_model_for_comp"):
            use()


def test_all_architectures_roundtrip(tmp_path):
    for name, arch in ARCHITECTURES.items():
        model = elastic(arch.build(), target_modules=list(arch.modules), rank_groups=arch.groups)
        model.set_subnet(model.search_space.sample(3))
        before = outputs(model, arch.inputs())
        model.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(arch.build(), tmp_path / name).eval()
        assert torch.equal(outputs(loaded, arch.inputs()), before), name
        close(outputs(loaded.merge_and_unload(), arch.inputs()), before)


def test_other_models_are_left_alone():
    """The registration hook acts on PeftModels with an elastic tuner alone."""
    stock = get_peft_model(tiny_llama(), LoraConfig(**QV))
    assert "print_trainable_parameters" not in vars(stock) and "search_subnet" not in vars(stock)
    module = nn.Module()
    module.base_model = elastic().base_model
    assert "search_subnet" not in vars(module)
