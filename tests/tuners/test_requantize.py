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
"""`merge_and_requantize`: what it merges, what it rounds to, and what its report says. tests/gptq has GPTQModel's layers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import outputs, randomize, tiny_llama, tiny_qwen2, tokens
from support.sparse_qa import pruned, quantized
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from peft_elastic import ElasticLoraConfig, SparseQALoraConfig, merge_and_requantize
from peft_elastic.quantization import Grid, QuantizedLinear


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def adapted(model, config):
    model = get_peft_model(model, config).eval()
    randomize(model, std=0.1)
    return model


def with_act_order(model):
    """The same layers, whose groups are of inputs that are not next to each other."""
    for seed, (name, layer) in enumerate(list(model.named_modules())):
        if isinstance(layer, QuantizedLinear):
            order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(seed))
            grid = Grid(
                layer.grid.scales,
                layer.grid.zeros,
                in_features=layer.in_features,
                bits=layer.grid.bits,
                g_idx=layer.grid.g_idx[order],
            )
            model.set_submodule(name, QuantizedLinear.from_linear(layer, grid))
    return model


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("config", [LoraConfig, ElasticLoraConfig, SparseQALoraConfig])
def test_weights_and_report(config, act_order):
    base = quantized(pruned(tiny_llama()))
    if act_order:
        with_act_order(base)
    before = {name: layer for name, layer in base.named_modules() if isinstance(layer, QuantizedLinear)}
    model = adapted(base, config(**LORA))
    if config is not LoraConfig:
        model.set_subnet("min")
    updates = {
        name.removeprefix("base_model.model."): (
            layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        ).detach()
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    merged, report = merge_and_requantize(model)
    assert [row["name"] for row in report.layers] == list(before) == list(updates)
    for row in report.layers:
        old, update = before[row["name"]], updates[row["name"]]
        start = old.to_linear().weight.detach()
        if config is SparseQALoraConfig:
            update = update * (start != 0)
        layer = merged.get_submodule(row["name"])
        assert layer.grid.equals(old.grid) and layer.grid is not old.grid and layer.exact
        assert torch.equal(layer.weight, old.grid.round(start + update))
        error = (layer.weight - start - update).norm()
        assert row["update_error"] == pytest.approx((error / update.norm()).item(), rel=1e-4)
        assert row["weight_error"] == pytest.approx((error / (start + update).norm()).item(), rel=1e-4)
        assert row["zeros_before"] == pytest.approx((start == 0).float().mean().item(), abs=1e-6)
        assert row["zeros_after"] == pytest.approx((layer.weight == 0).float().mean().item(), abs=1e-6)
    assert report.layers[0]["name"].replace(".0.", ".*.") in str(report)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_refitting(bits, act_order):
    """The groups stay what they are, and the errors are smaller, as updates leave the range of the old grid."""
    errors = []
    for refit in (False, True):
        base = quantized(pruned(tiny_llama()), bits=bits)
        if act_order:
            with_act_order(base)
        g_idx = {n: layer.grid.g_idx for n, layer in base.named_modules() if isinstance(layer, QuantizedLinear)}
        merged, report = merge_and_requantize(adapted(base, LoraConfig(**LORA)), refit=refit)
        for name, expected in g_idx.items():
            assert torch.equal(merged.get_submodule(name).grid.g_idx, expected)
        errors.append(report.update_error)
    assert errors[1] < errors[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_with_biases(dtype):
    model = adapted(quantized(tiny_qwen2()).to(dtype), LoraConfig(**LORA))
    expected = outputs(model, tokens())
    merged, _ = merge_and_requantize(model)
    assert merged.model.layers[0].self_attn.q_proj.bias.any()
    assert outputs(merged, tokens()).dtype == dtype
    assert (outputs(merged, tokens()) - expected).abs().mean() < 0.5


def test_layers_that_merge_exactly():
    """Quantisation-aware layers are in no report, and dense ones merge as in `merge_and_unload`."""
    model = adapted(quantized(pruned(tiny_llama())), SparseQALoraConfig(**LORA, quantization_aware=True))
    expected = outputs(model, tokens())
    merged, report = merge_and_requantize(model)
    assert report.layers == [] and "no quantised layer" in str(report)
    torch.testing.assert_close(outputs(merged, tokens()), expected, rtol=1e-4, atol=1e-4)

    model = adapted(quantized(pruned(tiny_llama()), ["down_proj"]), LoraConfig(**LORA))
    merged, report = merge_and_requantize(model)
    assert {row["name"].rpartition(".")[2] for row in report.layers} == {"down_proj"}
    assert type(merged.model.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"use_dora": True}, "no product B A"), ({"lora_bias": True}, "no product B A")],
    ids=["DoRA", "lora_bias"],
)
def test_what_cannot_be_merged(settings, message):
    base = quantized(tiny_qwen2())
    model = adapted(base, LoraConfig(**LORA, **settings))
    expected = outputs(model, tokens())
    with pytest.raises(ValueError, match=message):
        merge_and_requantize(model)
    with pytest.raises(ValueError, match=r"`adapter_names` has \['other'\]"):
        merge_and_requantize(model, ["other"])
    assert torch.equal(outputs(model, tokens()), expected)
    with pytest.raises(ValueError, match="must be a PeftModel with LoRA adapters, got Qwen2"):
        merge_and_requantize(base)


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_plain_lora_into_bitsandbytes(options, tmp_path):
    pytest.importorskip("bitsandbytes")
    pruned(tiny_llama(hidden_size=64, intermediate_size=128)).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    ).eval()
    before = outputs(base, tokens())
    model = adapted(base, LoraConfig(**LORA))
    tuned = outputs(model, tokens())
    merged, report = merge_and_requantize(model)
    assert type(merged.get_submodule(report.layers[0]["name"])).__module__.startswith("bitsandbytes")
    assert all(0 < row["update_error"] < 1 and row["zeros_after"] < row["zeros_before"] for row in report.layers)
    found = outputs(merged, tokens())
    assert (found - tuned).norm() < 0.5 * (tuned - before).norm()
