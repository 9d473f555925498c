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
"""What masked and quantisation-aware adapters do not do: refused with a message, before anything is changed."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import (
    ARCHITECTURES,
    ConvNet,
    EmbeddingNet,
    net,
    outputs,
    randomize,
    tiny_llama,
    tiny_mixtral,
    tokens,
)
from support.sparse_qa import ALL_KINDS, KINDS, QUANTIZED, adapted, config, layers, pruned, quantized
from test_tuner_refusals import assert_unchanged, snapshot
from torch import nn

from peft_elastic import ElasticLoraConfig, SparseQALoraConfig
from peft_elastic.quantization import QuantizedLinear, fit_grid


BAD_CONFIGS = {
    "bits": ({"quantization_aware": True, "bits": 3}, r"`bits` must be 2, 4 or 8, got 3"),
    "bits are no flag": ({"quantization_aware": True, "bits": True}, "`bits` must be 2, 4 or 8, got True"),
    "no group": (
        {"quantization_aware": True, "group_size": 0},
        "`group_size` must be a whole number of inputs, .*got 0",
    ),
    "half a group": (
        {"quantization_aware": True, "group_size": 16.0},
        "`group_size` must be a whole number of inputs, .*got 16.0",
    ),
    "symmetric": ({"quantization_aware": True, "symmetric": 1}, "`symmetric` must be True or False, got 1"),
    "clipping": (
        {"quantization_aware": True, "clipping": "max"},
        "`clipping` must be 'minmax' or 'mse', got 'max'",
    ),
    "flag": ({"sparse_adapter": 1}, "`sparse_adapter` must be True or False, got 1"),
    "other flag": ({"quantization_aware": None}, "`quantization_aware` must be True or False, got None"),
    "bits without rounding": ({"bits": 4}, "belong to `quantization_aware=True`"),
    "group without rounding": ({"group_size": 32}, "belong to `quantization_aware=True`"),
    "symmetric without rounding": ({"symmetric": False}, "belong to `quantization_aware=True`"),
    "clipping without rounding": ({"clipping": "mse"}, "belong to `quantization_aware=True`"),
    "ranks": ({"elastic_ranks": [3]}, "largest of `elastic_ranks`"),
}
# Each of them would be ignored, or lost in the merge.
BAD_OPTIONS = {
    "dora": ({"use_dora": True}, "`use_dora` cannot be combined with `SparseQALoraConfig`, got True"),
    "bias": ({"lora_bias": True}, "`lora_bias` cannot be combined"),
    "alora": ({"alora_invocation_tokens": [1]}, "`alora_invocation_tokens` cannot be combined"),
    "experts": ({"target_parameters": ["experts.down_proj"]}, "`target_parameters` cannot be combined"),
    "pissa": ({"init_lora_weights": "pissa"}, "`init_lora_weights` must be one of .*, got 'pissa'"),
    "olora": ({"init_lora_weights": "olora"}, "`init_lora_weights` must be one of .*, got 'olora'"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations(case):
    settings, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        SparseQALoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings})


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_variants_of_lora(case, kind):
    settings, message = BAD_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        SparseQALoraConfig(target_modules=["q_proj"], **settings, **ALL_KINDS[kind])


def with_weight(value):
    model = pruned(tiny_llama())
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = value
    return model


QA = {"quantization_aware": True}
REFUSED = {
    "group": (
        lambda: pruned(tiny_llama()),
        {**QA, "group_size": 32, "target_modules": ["q_proj", "down_proj"]},
        "`group_size` is 32, which does not divide the 48 inputs of 'model.layers.0.mlp.down_proj'. Choose a divisor .such as 16, 8",
    ),
    "default group": (lambda: pruned(tiny_llama()), QA, "`group_size` is 128, which does not divide the 32 inputs"),
    "group of a Conv1D": (
        lambda: pruned(ARCHITECTURES["gpt2"].build()),
        {**QA, "group_size": 64, "target_modules": ["mlp.c_proj", "c_fc"]},
        "`group_size` is 64, which does not divide the 32 inputs",
    ),
    "embedding": (
        lambda: pruned(net(EmbeddingNet)),
        {"target_modules": ["linear", "embedding"]},
        "'embedding' is of type Embedding; `sparse_adapter` and `quantization_aware` work on linear layers",
    ),
    "convolution": (
        lambda: net(ConvNet),
        {**QA, "group_size": -1, "sparse_adapter": False, "target_modules": ["head", "conv"]},
        "'conv' is of type Conv2d",
    ),
    "experts": (
        lambda: tiny_mixtral(),
        {"target_modules": ["q_proj", "w2"]},
        "is of type MixtralExperts",
    ),
    "not finite": (lambda: with_weight(float("nan")), QUANTIZED, "infinite or NaN"),
    "too large": (lambda: with_weight(1e30), QUANTIZED, "float16 ends at"),
    "bits of the base": (
        lambda: quantized(pruned(tiny_llama())),
        {**QA, "bits": 8},
        r"`bits` is 8, but 'model.layers.0.self_attn.q_proj' is quantised with 4. Leave it unset",
    ),
    "group of the base": (
        lambda: quantized(pruned(tiny_llama())),
        {**QA, "group_size": 8},
        "`group_size` is 8, but .* with 16",
    ),
    "one group": (
        lambda: quantized(pruned(tiny_llama())),
        {**QA, "group_size": -1},
        "`group_size` is 32, but .* with 16",
    ),
    "symmetry of the base": (
        lambda: quantized(pruned(tiny_llama())),
        {**QA, "symmetric": True},
        "`symmetric` is True, but .* with False",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_refused_for_the_first_adapter(case):
    make, settings, message = REFUSED[case]
    model = make()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(**settings))
    assert not layers(model) and not hasattr(model, "peft_config")
    if case != "not finite":
        assert_unchanged(model, before)
    target = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    get_peft_model(model, ElasticLoraConfig(r=8, target_modules=[target]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [case for case in REFUSED if case not in ("not finite", "experts")])
def test_refused_for_a_second_adapter(case):
    make, settings, message = REFUSED[case]
    base = make()
    target = next(name for name, module in base.named_modules() if isinstance(module, nn.Linear))
    model = adapted(base, target_modules=[target])
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", config(**settings))
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]
    for layer in layers(model).values():
        assert "second" not in layer.masked and "second" not in layer.lora_grid


def test_a_base_without_zeros_gets_a_warning():
    with pytest.warns(
        UserWarning, match="`sparse_adapter=True`, but only 0.00% of the weights that get an adapter are zero"
    ):
        get_peft_model(tiny_llama(), config())
    for model, settings in (
        (pruned(tiny_llama()), {}),
        (tiny_llama(), {"sparse_adapter": False}),
        (pruned(tiny_llama()), QUANTIZED),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            get_peft_model(model, config(**settings))
        assert not [w for w in caught if "sparse_adapter" in str(w.message)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "second", [{**QUANTIZED, "group_size": 8}, {**QUANTIZED, "bits": 8}, {}, {"sparse_adapter": False, **QUANTIZED}]
)
def test_adapters_that_round_differently_are_not_active_together(second):
    model = adapted(**QUANTIZED)
    model.add_adapter("other", config(**second))
    randomize(model, adapter_name="other")
    results = []
    for name in ("default", "other"):
        model.set_adapter(name)
        results.append(outputs(model, tokens()))
    model.base_model.set_adapter(["default", "other"])
    before = snapshot(model)
    for use in (lambda: outputs(model, tokens()), model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be active together"):
            use()
        assert_unchanged(model, before)
    for name, result in zip(("default", "other"), results):
        model.set_adapter(name)
        assert torch.equal(outputs(model, tokens()), result)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_export_is_refused(tmp_path, kind):
    model = adapted(**KINDS[kind])
    with pytest.raises(ValueError, match=r"which a plain LoRA adapter is not. Merge it: `merge_and_unload\(\)`"):
        model.export_lora(tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.filterwarnings("ignore")
def test_plain_adapters_are_exported(tmp_path):
    from peft import PeftModel

    model = adapted(sparse_adapter=False)
    model.set_subnet("min")
    before = outputs(model, tokens())
    model.export_lora(tmp_path)
    stock = PeftModel.from_pretrained(pruned(tiny_llama()), tmp_path).eval()
    assert type(stock.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(outputs(stock, tokens()), before, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_subnets_are_not_changed_while_merged():
    model = adapted(**QUANTIZED)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"call `unmerge_adapter\(\)` before choosing another subnet"):
        model.set_subnet("min")
    with pytest.raises(ValueError, match="[Mm]erged"):
        outputs(model, {"input_ids": tokens(2)}, adapter_names=["default", "__base__"])


@pytest.mark.filterwarnings("ignore")
def test_merging_what_is_merged_or_not_there_changes_nothing():
    model = adapted()
    model.unmerge_adapter()  # peft warns
    before = outputs(model, tokens())
    model.merge_adapter(adapter_names=["nobody"])
    model.merge_adapter(adapter_names=[])
    assert not any(layer.merged for layer in layers(model).values())
    model.merge_adapter()
    model.merge_adapter()
    assert all(layer.merged_adapters == ["default"] for layer in layers(model).values())
    model.unmerge_adapter()
    assert torch.equal(outputs(model, tokens()), before)


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_are_named_for_a_merge_are_checked_not_the_active_ones():
    """On a quantised base one of the two merges exactly, and the other cannot."""
    model = adapted(quantized(pruned(tiny_llama())), quantization_aware=True)
    model.add_adapter("plain", config())
    randomize(model, adapter_name="plain", seed=4)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'plain' is not quantisation-aware"):
        model.merge_adapter(adapter_names=["plain"])
    assert_unchanged(model, before)
    expected = outputs(model, tokens())
    model.set_adapter("plain")
    merged = model.merge_and_unload(adapter_names=["default"], sparse_kernel=False)
    torch.testing.assert_close(outputs(merged, tokens()), expected, rtol=1e-4, atol=1e-4)


def test_grids_of_another_shape():
    linear = nn.Linear(32, 24)
    with pytest.raises(ValueError, match="`grid` is of a layer 24 x 16, the weight is 24 x 32"):
        QuantizedLinear.from_linear(linear, fit_grid(torch.randn(24, 16), 4, 8))
