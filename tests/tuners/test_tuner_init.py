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
"""Initialisations, those that change the base weights too, and their conversion into adapters for the original base."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, LoraGAConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from support.models import EmbeddingNet, net, outputs, randomize, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_opt, tokens

from peft_elastic import ElasticLoraConfig


pytestmark = pytest.mark.filterwarnings("ignore")

QD = {"r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"], "elastic_ranks": [8, 5, 3]}


def train(model, steps=2):
    """Move the adapter, and whatever else is trained, away from its initial state; several subnets."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for step in range(steps):
        model.sample_subnet(model.search_space.sample(step))
        model(input_ids=tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def preprocess(model, config):
    """What CorDA and LoRA-GA want to see before the adapter is built."""
    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, run_model=lambda: model(input_ids=tokens(batch=1, length=50)))
    elif config.init_lora_weights == "lora_ga":
        preprocess_loraga(model, config, train_step=lambda: model(input_ids=tokens(), labels=tokens()).loss.backward())


def initialised(build, tmp_path, adapter_name="default", **settings):
    """A trained adapter whose initial state lies in `tmp_path / "initial"`, as peft's documentation says."""
    model = build()
    config = ElasticLoraConfig(**(QD | settings))
    preprocess(model, config)
    model = get_peft_model(model, config, adapter_name=adapter_name)
    init = config.init_lora_weights
    model.peft_config[adapter_name].init_lora_weights = True
    model.save_pretrained(tmp_path / "saved")
    model.peft_config[adapter_name].init_lora_weights = init
    shutil.copytree(tmp_path / "saved" / (adapter_name if adapter_name != "default" else ""), tmp_path / "initial")
    return train(model)


BASE_CHANGING = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="ipm")},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
}
VARIATIONS = {
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 7}},
    # ranks for which rounding could go either way, and ranks that collapse into one
    "odd rank_pattern": {"rank_pattern": {"q_proj": 3, "down_proj": 2}, "elastic_ranks": [8, 6, 4, 1]},
    "groups": {"rank_groups": [["q_proj", "down_proj"]]},
    "default ranks": {"elastic_ranks": None, "r": 6},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize(
    "settings",
    [*BASE_CHANGING.values(), *({"init_lora_weights": "pissa"} | v for v in VARIATIONS.values())],
    ids=[*BASE_CHANGING, *VARIATIONS],
)
def test_conversion_holds_for_every_subnet(tmp_path, settings):
    """The converted adapter on the original base computes what the adapter computes on the changed base."""
    model = initialised(tiny_llama, tmp_path, **settings)
    base = tiny_llama()
    chosen = model.search_space.sample(7)
    model.set_subnet(chosen)
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))

    # what is in memory has not changed
    assert list(model.peft_config) == ["default"] and model.active_subnet == chosen
    converted = PeftModel.from_pretrained(base, tmp_path / "converted").eval()
    config = converted.peft_config["default"]
    assert config.init_lora_weights is True and config.r == 2 * model.peft_config["default"].r
    shift = {choice.key: choice.options[0] for choice in model.search_space}
    assert {c.key: c.options for c in converted.search_space} == {
        c.key: tuple(shift[c.key] + k for k in c.options) for c in model.search_space
    }
    assert converted.active_subnet == {key: shift[key] + k for key, k in chosen.items()}

    # the base of the converted adapter is the original one, to the bit
    reference = tiny_llama()
    with converted.disable_adapter():
        assert torch.equal(outputs(converted, tokens()), outputs(reference, tokens()))
    with model.disable_adapter():
        assert (outputs(model, tokens()) - outputs(reference, tokens())).abs().max() > 1e-3

    space = model.search_space
    for subnet in (chosen, space.max, space.min, space.heuristic, *(space.sample(seed) for seed in range(3))):
        model.set_subnet(subnet)
        converted.set_subnet({key: shift[key] + k for key, k in subnet.items()})
        torch.testing.assert_close(outputs(converted, tokens()), outputs(model, tokens()), rtol=2e-5, atol=2e-5)


def test_conversion_of_conv1d(tmp_path):
    model = initialised(tiny_gpt2, tmp_path, init_lora_weights="pissa", target_modules=["c_attn", "mlp.c_proj"])
    model.set_subnet("min")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    converted = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "converted").eval()
    torch.testing.assert_close(outputs(converted, tokens()), outputs(model, tokens()), rtol=1e-4, atol=1e-4)
    # no subnet was chosen: none is after conversion
    model = initialised(tiny_gpt2, tmp_path / "other", init_lora_weights="pissa", target_modules=["c_attn"])
    model.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "other" / "initial")
    )
    assert json.loads((tmp_path / "converted" / "adapter_config.json").read_text())["active_subnet"] is None


def test_conversion_of_a_named_adapter_among_others(tmp_path):
    model = initialised(tiny_llama, tmp_path, adapter_name="trained", init_lora_weights="pissa")
    model.add_adapter("other", ElasticLoraConfig(r=4, target_modules=["k_proj"]))
    randomize(model, adapter_name="other")
    model.set_subnet("min", adapter_name="trained")
    model.set_subnet("min", adapter_name="other")
    expected = outputs(model, tokens())
    model.set_adapter("other")  # the adapter that is saved need not be the active one
    model.save_pretrained(
        tmp_path / "converted",
        selected_adapters=["trained"],
        path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
    )
    assert list(model.peft_config) == ["trained", "other"]
    assert model.get_active_subnet("other") == model.get_search_space("other").min
    converted = PeftModel.from_pretrained(tiny_llama(), tmp_path / "converted" / "trained").eval()
    assert converted.search_space.choices[0].options == (16, 13, 11)
    assert converted.active_subnet == converted.search_space.min
    torch.testing.assert_close(outputs(converted, tokens()), expected, rtol=1e-4, atol=1e-4)


def test_a_converted_adapter_can_be_exported_and_trained_on(tmp_path):
    model = initialised(tiny_llama, tmp_path, init_lora_weights="pissa")
    model.set_subnet("min")
    with pytest.raises(ValueError, match="`init_lora_weights='pissa'` fits only the base weights it has changed"):
        model.export_lora(tmp_path / "wrong")
    # peft's documentation has users reset the field, which changes nothing about the weights
    model.peft_config["default"].init_lora_weights = True
    with pytest.raises(ValueError, match="fits only the base weights it has changed"):
        model.export_lora(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    model.peft_config["default"].init_lora_weights = "pissa"
    expected = outputs(model, tokens())
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    converted = PeftModel.from_pretrained(tiny_llama(), tmp_path / "converted", is_trainable=True)
    converted.export_lora(tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    assert type(plain.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(outputs(plain, tokens()), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs(converted.eval().merge_and_unload(), tokens()), expected, rtol=1e-4, atol=1e-4)


def test_what_peft_refuses_to_convert_is_refused(tmp_path):
    model = initialised(tiny_llama, tmp_path, init_lora_weights="pissa", use_rslora=True, rank_pattern={"q_proj": 4})
    with pytest.raises(ValueError, match="not supported when using `rank_pattern` or `alpha_pattern`"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))


def test_conversion_of_experts_is_refused(tmp_path):
    """peft would mix the ranks of different experts."""
    config = ElasticLoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    model = get_peft_model(tiny_mixtral(), config)
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="does not work with `target_parameters`"):
        model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_saving_without_conversion(tmp_path, init):
    """As in peft: a saved PiSSA or OLoRA adapter changes the base again, identically, when it is loaded."""
    model = train(get_peft_model(tiny_llama(), ElasticLoraConfig(**(QD | {"init_lora_weights": init}))))
    model.set_subnet("min")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, tokens()), outputs(model, tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "pissa", "olora", "mica"])
def test_initial_outputs_are_those_of_stock_lora(init):
    """At the maximal rank an untrained elastic adapter is an untrained LoRA adapter."""
    settings = {k: v for k, v in QD.items() if k != "elastic_ranks"} | {"init_lora_weights": init}
    torch.manual_seed(3)
    base = tiny_llama()
    torch.manual_seed(4)
    stock = get_peft_model(base, LoraConfig(**settings)).eval()
    base = tiny_llama()
    torch.manual_seed(4)
    model = get_peft_model(base, ElasticLoraConfig(**settings)).eval()
    assert torch.equal(outputs(model, tokens()), outputs(stock, tokens()))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in stock.named_parameters() if p.requires_grad
    ]
    if init in (True, "gaussian", "mica"):  # these begin with a product of zero, at any rank
        model.set_subnet("min")
        assert torch.equal(outputs(model, tokens()), outputs(tiny_llama(), tokens()))


def test_mica_keeps_b_frozen_at_every_subnet():
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**(QD | {"init_lora_weights": "mica"})))
    for subnet in ("min", "max"):
        model.set_subnet(subnet)
        model.set_adapter("default")
        trained = {n.rpartition("lora_")[2][:1] for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {"A"}
    # peft would unfreeze the B of an embedding that shows a part of itself
    with pytest.raises(ValueError, match="'embedding' is an embedding, which cannot be elastic with"):
        get_peft_model(net(EmbeddingNet), ElasticLoraConfig(target_modules=["embedding"], init_lora_weights="mica"))


def test_weighted_adapters_of_pissa_adapters_leave_the_base_alone(tmp_path):
    """peft copies the configuration of the first adapter; initialising by PiSSA once more would change the base."""
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**(QD | {"init_lora_weights": "pissa"}))).eval()
    model.set_subnet("min")
    before, expected = {n: p.clone() for n, p in model.named_parameters()}, outputs(model, tokens())
    model.add_weighted_adapter(["default"], [1.0], "copy", combination_type="cat")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    model.set_adapter("copy")
    torch.testing.assert_close(outputs(model, tokens()), expected, rtol=1e-4, atol=1e-4)
    assert model.peft_config["default"].init_lora_weights == "pissa"
    with pytest.raises(ValueError, match="fits only the base weights it has changed"):
        model.export_lora(tmp_path)


def test_writing_to_an_active_weight_writes_to_the_parameter():
    """`nn.init` and other code that works in place reaches the active ranks and no others."""
    model = get_peft_model(tiny_opt(), ElasticLoraConfig(r=8, target_modules=["fc1"]))
    lora_A = model.base_model.model.model.decoder.layers[0].fc1.lora_A["default"]
    torch.nn.init.ones_(lora_A.weight)
    model.set_subnet("min")
    torch.nn.init.constant_(lora_A.weight, 2)
    assert lora_A.full_weight[:4].eq(2).all() and lora_A.full_weight[4:].eq(1).all()
