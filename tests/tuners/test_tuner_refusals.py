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
"""What elastic LoRA does not do: refused with a message, before anything is changed; and what peft ties to the type LORA
by name."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, XLoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from peft.utils.warning import PeftWarning
from support.models import (
    AttentionNet,
    ConvNet,
    EmbeddingNet,
    OddLora,
    build,
    net,
    outputs,
    randomize,
    tiny_gemma,
    tiny_llama,
    tiny_mixtral,
    tokens,
)
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from peft_elastic import ElasticLoraConfig


pytestmark = pytest.mark.filterwarnings("ignore")

QV = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


def snapshot(model):
    """Everything about a model that a refused adapter must leave as it was."""
    modules = {name: (id(module), type(module), module.training) for name, module in model.named_modules()}
    parameters = {n: (id(p), p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    layers = {n: m.active_adapters for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    configs = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    return modules, parameters, layers, configs


def assert_unchanged(model, before):
    modules, parameters, layers, configs = snapshot(model)
    assert modules == before[0]
    assert parameters.keys() == before[1].keys()
    for name, (identity, requires_grad, values) in parameters.items():
        assert (identity, requires_grad) == before[1][name][:2], name
        assert torch.equal(values, before[1][name][2]), name
    assert layers == before[2]
    assert configs == before[3]


REFUSED = {
    "unknown group": (tiny_llama, {**QV, "rank_groups": [["nope"]]}, r"`rank_groups` names \['nope'\]"),
    "two groups": (
        tiny_llama,
        {**QV, "rank_groups": [["q_proj"], ["self_attn.q_proj"]]},
        "puts the module 'model.layers.0.self_attn.q_proj' into several groups",
    ),
    "different ranks": (
        tiny_llama,
        {**QV, "rank_groups": "block", "rank_pattern": {"q_proj": 4}},
        "whose maximal ranks in `rank_pattern` differ",
    ),
    "unknown target": (
        tiny_mixtral,
        {**QV, "target_modules": ["v_prjo"], "target_parameters": ["experts.down_proj"]},
        r"`target_modules` names \['v_prjo'\], which are not in the base model",
    ),
    "no target": (
        tiny_llama,
        {**QV, "target_modules": ["nope"]},
        "not found in the base model|No modules were targeted",
    ),
    "unknown rank_pattern": (
        tiny_llama,
        {**QV, "rank_pattern": {"q_proj": 4, "k_proj": 4}},
        r"`rank_pattern` has the keys \['k_proj'\], which match no module that gets an adapter",
    ),
    "unknown alpha_pattern": (tiny_llama, {**QV, "alpha_pattern": {"q": 4}}, r"`alpha_pattern` has the keys \['q'\]"),
    "unknown parameter": (
        tiny_mixtral,
        {**QV, "target_parameters": ["experts.nope"]},
        r"`target_parameters` names \['experts.nope'\]",
    ),
    "subnet": (tiny_llama, {**QV, "active_subnet": {"rank:x": 1}}, "`active_subnet` in the configuration"),
    "grouped convolution": (
        lambda: net(ConvNet, 2, 4),
        {"r": 8, "target_modules": ["conv", "grouped"], "elastic_ranks": [8, 6, 4]},
        r"'grouped' is a convolution with groups=4; each of its ranks must be divisible by that, got \[8, 6, 4\]",
    ),
    "mica embedding": (
        lambda: net(EmbeddingNet),
        {"target_modules": ["linear", "embedding"], "init_lora_weights": "mica"},
        "'embedding' is an embedding, which cannot be elastic with `init_lora_weights='mica'`",
    ),
    # refused by peft, half-way through
    "unsupported module": (tiny_llama, {**QV, "target_modules": ["q_proj", "input_layernorm"]}, "is not supported"),
    "dora attention": (
        lambda: net(AttentionNet),
        {"target_modules": ["first", "attention"], "use_dora": True},
        "does not support DoRA",
    ),
    "bias on embedding": (
        lambda: net(EmbeddingNet),
        {"target_modules": ["conv1d", "embedding"], "lora_bias": True},
        "lora_bias=True is not supported",
    ),
    "trainable tokens": (
        tiny_llama,
        {**QV, "target_modules": ["q_proj"], "trainable_token_indices": {"nowhere": [1]}},
        None,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_for_the_first_adapter(case):
    make, settings, message = REFUSED[case]
    model = make()
    next(model.parameters()).requires_grad_(False)  # flags are put back, not set
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, ElasticLoraConfig(**settings))
    assert_unchanged(model, before)
    assert not hasattr(model, "peft_config") and not any("elastic" in name for name in vars(model))
    # and can be adapted all the same
    target = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    get_peft_model(model, ElasticLoraConfig(r=8, target_modules=[target])).set_subnet("min")


@pytest.mark.parametrize("case", REFUSED)
def test_refused_for_a_second_adapter(case):
    make, settings, message = REFUSED[case]
    base = make()
    first = {
        tiny_llama: {"target_modules": ["q_proj", "up_proj"]},
        tiny_mixtral: {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    }.get(make, {"target_modules": [next(n for n, m in base.named_modules() if isinstance(m, nn.Linear))]})
    modules_to_save = {"modules_to_save": ["lm_head"]} if make is tiny_llama else {}
    model = get_peft_model(base, ElasticLoraConfig(r=8, **first, **modules_to_save))
    randomize(model)
    model.set_subnet("min")
    if make is tiny_mixtral:  # stock peft wants the same parameters for all
        message = "must target the same set|names"
    before = snapshot(model)
    subnet, tuner_names = model.active_subnet, list(model.targeted_module_names)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", ElasticLoraConfig(**settings, **modules_to_save))
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]
    assert model.active_subnet == subnet and model.targeted_module_names == tuner_names
    model.set_subnet("heuristic")


def test_a_refusal_leaves_the_base_weights_of_pissa_alone():
    """PiSSA changes the base weights while it is injected, so everything is looked at before."""
    model = tiny_llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="`active_subnet` in the configuration"):
        get_peft_model(model, ElasticLoraConfig(**QV, init_lora_weights="pissa", active_subnet={"rank:x": 3}))
    assert_unchanged(model, before)


def test_custom_layers_of_unknown_kinds_are_refused_by_name():
    """Only once they exist can it be seen what their A and B are."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = snapshot(model)
    config = ElasticLoraConfig(target_modules=["0", "1"])
    config._register_custom_module({nn.LayerNorm: OddLora})
    with pytest.raises(ValueError, match="'1' cannot be elastic: its adapter consists of Bilinear and Bilinear"):
        get_peft_model(model, config)
    assert_unchanged(model, before)
    # beside an adapter that exists
    model = get_peft_model(model, ElasticLoraConfig(r=8, target_modules=["0"]))
    model.set_subnet("min")
    before = snapshot(model)
    with pytest.raises(ValueError, match="'1' cannot be elastic"):
        model.add_adapter("second", config)
    assert_unchanged(model, before)


def test_tensor_parallel_models_are_refused():
    model = tiny_llama()
    model._tp_size = 2
    before = snapshot(model)
    with pytest.raises(ValueError, match="Tensor-parallel models cannot get elastic adapters"):
        get_peft_model(model, ElasticLoraConfig(**QV))
    assert_unchanged(model, before)


def test_unknown_names_in_default_target_modules_are_no_error():
    """peft's own lists name modules that only some models of a type have."""

    class Named(nn.Module):
        config = {"model_type": "blip-2"}  # ["q", "v", "q_proj", "v_proj"]

        def __init__(self):
            super().__init__()
            self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)

    model = get_peft_model(Named(), ElasticLoraConfig())
    assert {choice.name for choice in model.search_space} == {"q", "v"}


# -- what peft keys on the type LORA -----------------------------------------------------------------------------------


def saved(path, config_cls=ElasticLoraConfig, **settings):
    model = get_peft_model(tiny_llama(), config_cls(**(QV | settings)))
    randomize(model)
    if config_cls is ElasticLoraConfig:
        model.set_subnet("min")
    model.save_pretrained(path)
    return model


def test_mixed_models_are_refused():
    with pytest.raises(ValueError, match="'ELASTIC_LORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_llama(), ElasticLoraConfig(**QV), mixed=True)
    model = get_peft_model(tiny_llama(), LoraConfig(**QV), mixed=True)
    assert isinstance(model, PeftMixedModel)
    with pytest.raises(ValueError, match="'ELASTIC_LORA' is not compatible with the `PeftMixedModel`"):
        model.add_adapter("elastic", ElasticLoraConfig(**QV))


def test_other_types_in_the_same_peft_model_are_refused(tmp_path):
    for first, second in ((LoraConfig, ElasticLoraConfig), (ElasticLoraConfig, LoraConfig)):
        model = get_peft_model(tiny_llama(), first(**QV))
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            model.add_adapter("second", second(**QV))
        saved(tmp_path, second)
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            model.load_adapter(tmp_path, adapter_name="second")
        assert list(model.peft_config) == ["default"]


def test_hotswapping_is_refused(tmp_path):
    model = saved(tmp_path / "elastic")
    saved(tmp_path / "plain", LoraConfig)
    before = outputs(model, tokens())
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but ELASTIC_LORA was passed"):
        hotswap_adapter(model, tmp_path / "elastic", adapter_name="default", torch_device="cpu")
    with pytest.raises(ValueError, match="Incompatible PEFT types found: ELASTIC_LORA and LORA"):
        hotswap_adapter(model, tmp_path / "plain", adapter_name="default", torch_device="cpu")
    assert torch.equal(outputs(model, tokens()), before)
    # an exported adapter swaps as any other
    model.export_lora(tmp_path / "exported")
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    hotswap_adapter(stock, tmp_path / "exported", adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(outputs(stock, tokens()), before, rtol=1e-5, atol=1e-5)


def test_intruder_reduction_is_refused():
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV))
    with pytest.raises(ValueError, match="not using LoRA and is therefore not supported"):
        reduce_intruder_dimension(model)


def test_xlora_is_refused_and_takes_what_is_exported(tmp_path):
    """X-LoRA loads its experts as stock LoRA of full rank, whatever their configuration says."""
    settings = {"task_type": "CAUSAL_LM", "hidden_size": 32, "xlora_depth": 1}
    model = saved(tmp_path / "elastic")
    base = tiny_llama(use_cache=False)
    with pytest.raises(ValueError, match="is elastic, but is being loaded by a method that knows fixed ranks only"):
        get_peft_model(base, XLoraConfig(**settings, adapters={"0": str(tmp_path / "elastic")}))
    model.export_lora(tmp_path / "plain")
    adapters = {"0": str(tmp_path / "plain")}
    mixture = get_peft_model(tiny_llama(use_cache=False), XLoraConfig(**settings, adapters=adapters))
    assert torch.isfinite(outputs(mixture, {"input_ids": tokens()})).all()


def test_stock_lora_does_not_take_an_elastic_configuration():
    """`LoraModel` would fix the rank without a word; what loads weights into it notices."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV))
    tuner = LoraModel(tiny_llama(), ElasticLoraConfig(**QV), "default")
    with pytest.raises(ValueError, match="Load what `model.export_lora` writes instead"):
        set_peft_model_state_dict(tuner, get_peft_model_state_dict(model))


@pytest.mark.parametrize("target", ["out_proj", "conv1d"])
def test_the_guard_for_mamba_works(target):
    """peft refuses modules whose LoRA layer Mamba would never call."""
    settings = {"vocab_size": 96, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    for config_cls in (LoraConfig, ElasticLoraConfig):
        model = build(MambaForCausalLM, MambaConfig, **settings)
        before = snapshot(model)
        with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
            get_peft_model(model, config_cls(target_modules=[target]))
        assert_unchanged(model, before)


@pytest.mark.parametrize(
    "target_modules",
    ["all-linear", ["q_proj", "w1", "w2", "w3"], ["w1", "w3"], r".*\.(v_proj|w1|w2|w3)"],
    ids=str,
)
def test_old_names_of_experts_are_converted(target_modules):
    """transformers 5 fused Mixtral's experts; peft turns their old names into `target_parameters`."""

    def adapted(config):
        model = get_peft_model(tiny_mixtral(), config).eval()
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if "lora_" in n}
        return model, shapes

    stock, expected = adapted(LoraConfig(r=4, lora_alpha=6, target_modules=target_modules))
    model, found = adapted(ElasticLoraConfig(r=4, lora_alpha=6, target_modules=target_modules))
    assert found == expected
    for m in (model, stock):
        randomize(m)
    assert torch.equal(outputs(model, tokens()), outputs(stock, tokens()))
    # what is fused of two gets twice the rank, and with it the options
    options = {choice.name.rpartition(".")[2]: choice.options for choice in model.search_space}
    assert options["gate_up_proj"] == (8, 6, 4)
    model.set_subnet("min")
    assert (outputs(model, tokens()) - outputs(stock, tokens())).abs().max() > 1e-3
    with pytest.raises(ValueError, match="without also targeting w3"):
        get_peft_model(tiny_mixtral(), ElasticLoraConfig(target_modules=["w1"]))


def test_converted_experts_survive_saving(tmp_path):
    model = get_peft_model(tiny_mixtral(), ElasticLoraConfig(r=4, target_modules=["q_proj", "w1", "w2", "w3"])).eval()
    randomize(model)
    for subnet in ("max", "min"):
        model.set_subnet(subnet)
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny_mixtral(), tmp_path).eval()
        assert loaded.active_subnet == model.active_subnet
        assert torch.equal(outputs(loaded, tokens()), outputs(model, tokens()))


def test_empty_tensors_of_a_sharded_model_are_reported(tmp_path):
    """peft warns when a LoRA adapter is saved without having been gathered."""
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].full_weight.data = torch.zeros(0)
    with pytest.warns(PeftWarning, match="have invalid shape"):
        model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftWarning)
        saved(tmp_path)


def test_tied_weights_warn_as_in_peft():
    for config_cls in (LoraConfig, ElasticLoraConfig):
        with pytest.warns(UserWarning, match="`ensure_weight_tying` is not set to True"):
            get_peft_model(tiny_gemma(), config_cls(target_modules=["embed_tokens"]))


def test_warnings_of_peft_are_given_once():
    """Looking at the model before it is changed must not double them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_peft_model(net(ConvNet), ElasticLoraConfig(target_modules=["grouped"], elastic_ranks=[8, 4]))
    assert sum("groups > 1" in str(w.message) for w in caught) == 1


def test_the_dry_run_finds_exactly_what_is_adapted():
    """The names that are checked before injection are those that the layers get."""
    from peft_elastic.tuners.elastic_lora.model import ElasticLoraModel
    from peft_elastic.tuners.elastic_lora.state import find_layers

    seen = {}

    class Watched(ElasticLoraModel):
        def _plan_injection(self, *args):
            seen["plan"] = super()._plan_injection(*args)
            return seen["plan"]

    cases = [
        (tiny_llama, {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3}}),
        (tiny_llama, {"target_modules": r".*\.(q|k)_proj", "exclude_modules": ["k_proj"]}),
        (tiny_gemma, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
        (tiny_gemma, {"target_modules": "all-linear", "modules_to_save": ["q_proj"]}),
        (tiny_mixtral, {"target_modules": "all-linear"}),
        (tiny_mixtral, {"target_modules": [], "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]}),
        (lambda: net(AttentionNet), {"target_modules": ["first", "attention"]}),
        (lambda: net(EmbeddingNet), {"target_modules": ["embedding", "conv1d"], "layers_to_transform": None}),
    ]
    for make, settings in cases:
        tuner = Watched(make(), ElasticLoraConfig(**settings), "default")
        layers = dict(find_layers(tuner.model, "default"))
        assert seen["plan"].keys() == layers.keys()
        assert {name: rank for name, (_, rank) in seen["plan"].items()} == {
            name: layer.r["default"] for name, layer in layers.items()
        }
        tuner.peft_config["second"] = ElasticLoraConfig(**settings)
        tuner.inject_adapter(tuner.model, "second")
        assert seen["plan"].keys() == dict(find_layers(tuner.model, "second")).keys()
    assert PEFT_TYPE_TO_TUNER_MAPPING["ELASTIC_LORA"] is ElasticLoraModel
