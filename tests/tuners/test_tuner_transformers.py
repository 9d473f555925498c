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
"""transformers' own integration of peft, `model.add_adapter` and its kin. It throws the tuner away, so the subnet is
controlled through `get_elastic_host(model)`."""

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft import set_peft_model_state_dict as set_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from support.models import (
    TRANSFORMERS_ADAPTERS,
    OddLora,
    outputs,
    randomize,
    tiny_bert,
    tiny_gemma,
    tiny_llama,
    tiny_mixtral,
    tokens,
)
from transformers import AutoModelForCausalLM

from peft_elastic import ElasticLoraConfig
from peft_elastic.supernet import get_elastic_host


pytestmark = [pytest.mark.filterwarnings("ignore"), TRANSFORMERS_ADAPTERS]

QV = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def with_adapter(model=None, adapter_name="default", **settings):
    model = tiny_llama() if model is None else model
    model.add_adapter(ElasticLoraConfig(**(QV | settings)), adapter_name)
    randomize(model, adapter_name=adapter_name)
    return model.eval()


def as_peft_model(model, build=tiny_llama, adapter_name="default"):
    """The same adapter, with the same subnet, in a PeftModel."""
    twin = get_peft_model(build(), copy.deepcopy(model.peft_config[adapter_name])).eval()
    state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name)
    set_state_dict(twin, {f"base_model.model.{k}": v for k, v in state_dict.items()})
    return twin


def test_add_adapter():
    model = with_adapter()
    host = get_elastic_host(model)
    results = []
    for subnet in ("max", "heuristic", "min", host.search_space.sample(0)):
        host.set_subnet(subnet)
        found = outputs(model, tokens())
        assert torch.equal(found, outputs(as_peft_model(model), tokens()))
        results.append(found)
    assert (results[0] - results[2]).abs().max() > 1e-2
    model.disable_adapters()
    assert torch.equal(outputs(model, tokens()), outputs(tiny_llama(), tokens()))
    model.enable_adapters()
    assert torch.equal(outputs(model, tokens()), results[-1])


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize(
    "settings",
    # not DoRA: transformers does not find the magnitudes that it saved, of stock LoRA either
    [
        {},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"rank_groups": [["q_proj", "v_proj"]]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_save_and_load(tmp_path, settings, is_trainable):
    """transformers compares the shapes of what it loads with those of `weight`, which must not show a part of it yet."""
    model = with_adapter(**settings)
    host = get_elastic_host(model)
    for subnet in ("max", "min", host.search_space.sample(1)):
        host.set_subnet(subnet)
        model.save_pretrained(tmp_path)
        before = outputs(model, tokens())

        loaded = tiny_llama()
        info = loaded.load_adapter(tmp_path, is_trainable=is_trainable)
        assert not info.missing_keys and not info.mismatched_keys and not info.unexpected_keys
        assert get_elastic_host(loaded).active_subnet == host.active_subnet
        assert torch.equal(outputs(loaded.eval(), tokens()), before)
        assert any(p.requires_grad for n, p in loaded.named_parameters() if "lora_" in n) is is_trainable
        # the other ranks have been loaded as well
        for m in (model, loaded):
            get_elastic_host(m).set_subnet("max")
        assert torch.equal(outputs(loaded, tokens()), outputs(model, tokens()))

        # and in a PeftModel
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
        assert torch.equal(outputs(loaded, tokens()), before)


def test_from_pretrained_with_an_adapter(tmp_path):
    """`AutoModelForCausalLM.from_pretrained` takes the folder of an adapter and finds its base model."""
    tiny_llama().save_pretrained(tmp_path / "base")
    model = with_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    get_elastic_host(model).set_subnet("min")
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "ELASTIC_LORA"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    host = get_elastic_host(loaded)
    assert host.active_subnet == host.search_space.min
    assert torch.equal(outputs(loaded, tokens()), outputs(model, tokens()))


def test_an_adapter_of_a_peft_model_can_be_loaded(tmp_path):
    source = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV)).eval()
    randomize(source)
    source.set_subnet("heuristic")
    source.save_pretrained(tmp_path)
    model = tiny_llama()
    model.load_adapter(tmp_path)
    assert torch.equal(outputs(model, tokens()), outputs(source, tokens()))


def test_several_adapters(tmp_path):
    model = with_adapter()
    model = with_adapter(model, "b", r=4, target_modules=["up_proj"], elastic_ranks=[4, 1])
    host = get_elastic_host(model)
    assert model.active_adapters() == ["b"]
    assert len(host.search_space) == 2  # that of the active adapter, which the model knows and no tuner
    host.set_subnet("min")
    of_b = outputs(model, tokens())
    model.set_adapter("default")
    assert len(host.search_space) == 4
    assert host.active_subnet == host.search_space.max
    host.set_subnet("heuristic")
    assert torch.equal(outputs(model, tokens()), outputs(as_peft_model(model), tokens()))
    model.save_pretrained(tmp_path)
    model.set_adapter("b")
    assert torch.equal(outputs(model, tokens()), of_b)
    host.sample_subnet(host.search_space.max)
    host.restore_subnet()
    assert host.active_subnet == host.search_space.min
    assert host.get_active_subnet("default") == host.get_search_space("default").heuristic

    # a further one is loaded beside them, with its subnet
    model.load_adapter(tmp_path, "c")
    model.set_adapter("c")
    host = get_elastic_host(model)
    assert host.active_subnet == host.search_space.heuristic
    assert host.get_active_subnet("b") == host.get_search_space("b").min
    assert torch.equal(outputs(model, tokens()), outputs(as_peft_model(model, adapter_name="c"), tokens()))

    model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match=r"2 elastic adapters are active, \['default', 'b'\]"):
        host.set_subnet("min")


def test_delete_adapter():
    model = with_adapter(with_adapter(), "b", r=4)
    get_elastic_host(model).set_subnet("min", adapter_name="default")
    model.delete_adapter("b")
    model.set_adapter("default")
    host = get_elastic_host(model)
    assert host.active_subnet == host.search_space.min
    host.set_subnet("heuristic")
    with pytest.raises(ValueError, match=r"one of the elastic adapters \['default'\], got 'b'"):
        host.get_search_space("b")
    model.delete_adapter("default")
    assert torch.equal(outputs(model, tokens()), outputs(tiny_llama(), tokens()))
    with pytest.raises(ValueError, match="0 elastic adapters are active"):
        host.set_subnet("min")
    # the names are free again
    model = with_adapter(model, "b", r=2, target_modules=["k_proj"])
    host = get_elastic_host(model)
    assert host.search_space.choices[0].options == (2, 1)
    assert torch.equal(outputs(model, tokens()), outputs(as_peft_model(model, adapter_name="b"), tokens()))


@pytest.mark.parametrize("elastic_first", [True, False])
def test_beside_adapters_of_stock_lora(tmp_path, elastic_first):
    """A PeftModel holds one type only; transformers does not mind."""
    model = tiny_llama()
    configs = {
        "elastic": ElasticLoraConfig(**QV),
        "plain": LoraConfig(**(QV | {"target_modules": ["q_proj", "up_proj"]})),
    }
    for name in ("elastic", "plain") if elastic_first else ("plain", "elastic"):
        model.add_adapter(configs[name], name)
    randomize(model)
    model.eval()
    host = get_elastic_host(model)
    model.set_adapter("plain")
    of_plain = outputs(model, tokens())
    with pytest.raises(ValueError, match="0 elastic adapters are active"):
        host.set_subnet("min")
    model.set_adapter("elastic")
    host.set_subnet("min")
    assert torch.equal(outputs(model, tokens()), outputs(as_peft_model(model, adapter_name="elastic"), tokens()))
    host.sample_subnet("max")
    host.restore_subnet()
    assert host.active_subnet == host.search_space.min
    model.save_pretrained(tmp_path / "elastic")
    model.set_adapter("plain")
    assert torch.equal(outputs(model, tokens()), of_plain)
    model.save_pretrained(tmp_path / "plain")
    for name in ("elastic", "plain"):
        assert type(PeftModel.from_pretrained(tiny_llama(), tmp_path / name).peft_config["default"]) is type(
            configs[name]
        )
    # both at once: only one of them has subnets
    model.set_adapter(["plain", "elastic"])
    host.set_subnet("heuristic")
    assert host.active_subnet == host.search_space.heuristic


def test_injecting_without_any_model(tmp_path):
    """peft's low-level functions, as diffusers uses them."""
    model = with_adapter()
    host = get_elastic_host(model)
    host.set_subnet("min")
    state_dict = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(copy.deepcopy(model.peft_config["default"]), tiny_llama())
    set_state_dict(other, state_dict)
    assert torch.equal(outputs(other.eval(), tokens()), outputs(model, tokens()))
    assert get_elastic_host(other).active_subnet == host.active_subnet
    other = inject_adapter_in_model(copy.deepcopy(model.peft_config["default"]), tiny_llama(), low_cpu_mem_usage=True)
    set_state_dict(other, state_dict, low_cpu_mem_usage=True)
    assert torch.equal(outputs(other.eval(), tokens()), outputs(model, tokens()))
    # from the names in a state dict alone
    other = inject_adapter_in_model(ElasticLoraConfig(r=8, lora_alpha=16), tiny_llama(), state_dict=state_dict)
    set_state_dict(other, state_dict)
    assert torch.equal(outputs(other.eval(), tokens()), outputs(as_max(model), tokens()))


def as_max(model):
    get_elastic_host(model).set_subnet("max")
    return model


def test_a_fresh_adapter_waits_for_its_weights():
    """An adapter that is added, not loaded, has no trained subnet: it computes its maximal one, and says so, until the
    chosen one is restored."""
    space = get_elastic_host(with_adapter()).search_space
    model = with_adapter(active_subnet=space.min.to_dict())
    host = get_elastic_host(model)
    assert host.active_subnet == space.max
    layer = model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (8, 32)
    host.restore_subnet()
    assert host.active_subnet == space.min
    assert layer.lora_A["default"].weight.shape == (4, 32)


def test_export_and_copies(tmp_path):
    model = with_adapter()
    host = get_elastic_host(model)
    host.set_subnet("min")
    host.export_lora(tmp_path)
    plain = tiny_llama()
    plain.load_adapter(tmp_path)
    assert type(plain.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(outputs(plain, tokens()), outputs(model, tokens()), rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(model)
    get_elastic_host(twin).set_subnet("max")
    assert host.active_subnet == host.search_space.min
    assert (outputs(twin, tokens()) - outputs(model, tokens())).abs().max() > 1e-3
    assert "(1,344 of" not in str(host.subnet_summary()) and "min (896 of 1,792" in str(host.subnet_summary())


def test_a_refused_adapter_leaves_the_model_usable():
    model = tiny_llama()
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="match no module that carries an adapter"):
        model.add_adapter(ElasticLoraConfig(**QV, rank_groups=[["nope"]]))
    assert [type(module) for module in model.modules()] == types
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="has no elastic adapter"):
        get_elastic_host(model)
    # a second attempt works, which stock peft and transformers do not manage
    model = with_adapter(model)
    get_elastic_host(model).set_subnet("min")
    before = outputs(model, tokens())
    with pytest.raises(ValueError, match="match no module that carries an adapter"):
        model.add_adapter(ElasticLoraConfig(r=4, target_modules=["up_proj"], rank_groups=[["nope"]]), "b")
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters() == ["default"]
    assert sum(isinstance(m, BaseTunerLayer) for m in model.modules()) == 4
    assert torch.equal(outputs(model, tokens()), before)


def test_a_refusal_after_injection_brings_back_the_active_adapter():
    """Another tuner activates its adapter while it injects it, and peft would fall back on any that is left."""
    model = with_adapter(with_adapter(), "a")
    model.set_adapter("default")
    before = outputs(model, tokens())
    config = ElasticLoraConfig(r=4, target_modules=["q_proj", "input_layernorm"])
    config._register_custom_module({type(model.model.norm): OddLora})
    with pytest.raises(ValueError, match="'model.layers.0.input_layernorm' cannot be elastic"):
        model.add_adapter(config, "odd")
    assert model.active_adapters() == ["default"] and list(model.peft_config) == ["default", "a"]
    assert sum(isinstance(m, BaseTunerLayer) for m in model.modules()) == 4
    assert torch.equal(outputs(model, tokens()), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if n.endswith("default.weight")}
    get_elastic_host(model).set_subnet("min")


def test_a_corrupt_subnet_is_refused_when_loading(tmp_path):
    with_adapter().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"active_subnet": {"rank:nowhere": 3}}))
    model = tiny_llama()
    with pytest.raises(
        ValueError, match="`active_subnet` in the configuration of adapter 'default' is wrong.*nowhere"
    ):
        model.load_adapter(tmp_path)
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())


def test_training():
    model = with_adapter(tiny_bert(), target_modules=["query", "value"])
    model.train()
    host = get_elastic_host(model)
    host.sample_subnet("min")
    labels = torch.tensor([0, 1, 2])
    model(input_ids=tokens(), labels=labels).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in n and p.grad is not None for n, p in trained.items())
    assert all((p.grad if "lora_A" in n else p.grad.T)[4:].eq(0).all() for n, p in trained.items())


def test_tied_embeddings():
    """transformers fails to save these, of stock LoRA too."""
    model = with_adapter(tiny_gemma(), target_modules=["embed_tokens"], ensure_weight_tying=True)
    host = get_elastic_host(model)
    assert [choice.modules for choice in host.search_space] == [("model.embed_tokens", "lm_head")]
    for subnet in ("min", "max"):
        host.set_subnet(subnet)
        assert torch.equal(outputs(model, tokens()), outputs(as_peft_model(model, tiny_gemma), tokens()))


def test_experts(tmp_path):
    model = with_adapter(
        tiny_mixtral(),
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    host = get_elastic_host(model)
    host.set_subnet("min")
    model.save_pretrained(tmp_path)
    loaded = tiny_mixtral()
    info = loaded.load_adapter(tmp_path)
    assert not info.missing_keys and not info.mismatched_keys
    assert get_elastic_host(loaded).active_subnet == host.active_subnet
    torch.testing.assert_close(outputs(loaded, tokens()), outputs(model, tokens()), rtol=1e-5, atol=1e-5)


def test_hotswapping_is_refused(tmp_path):
    model = with_adapter()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Hotswapping is currently only supported for LoRA"):
        model.load_adapter(tmp_path, adapter_name="default", hotswap=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(outputs(model, tokens())).all()
