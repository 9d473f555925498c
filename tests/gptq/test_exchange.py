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
"""Checkpoints that go from peft_elastic to GPTQModel and back: the same integers, scales and zeros, the same logits."""

import copy
import json

import pytest
import torch
from checkpoints import (
    GROUP_SIZE,
    KINDS,
    SHAPE,
    as_gptqmodel_computes,
    assert_close,
    assert_same_weights,
    gptqmodel_layers,
    load,
    name_of,
    own_layers,
    pruned,
)
from support.models import outputs, tiny_llama, tiny_qwen2, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from peft_elastic.quantization import GPTQConfig, Grid, QuantizedLinear, RTNConfig, load_gptq, quantize, save_gptq


pytestmark = pytest.mark.filterwarnings("ignore")


def calibration():
    return [tokens(8, 16, seed=seed) for seed in range(4)]


def assert_gptqmodel_agrees(model, folder, gptqmodel):
    """transformers with GPTQModel, in float32, and GPTQModel by itself, in float16, compute what `model` does."""
    expected = outputs(model, tokens())
    theirs = load(folder)
    assert_same_weights(model, theirs)
    logits = outputs(theirs, tokens())
    assert_close(logits, expected)
    torch.testing.assert_close(
        logits, outputs(as_gptqmodel_computes(copy.deepcopy(model)), tokens()), rtol=1e-5, atol=1e-5
    )

    alone = load_alone(gptqmodel, folder)
    assert_same_weights(model, alone)
    assert_close(outputs(alone, tokens()).float(), expected, rtol=1e-2)


def load_alone(gptqmodel, folder):
    """GPTQModel without the loading of transformers. By default it would choose bfloat16, for the scales too."""
    backend = gptqmodel.BACKEND.GPTQ_TORCH
    return gptqmodel.GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16).model


@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ours(bits, symmetric, form, gptqmodel, tokenizer, tmp_path):
    model = pruned()
    zeros = {name: layer.weight == 0 for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    # one method for each combination of the others
    method = GPTQConfig if (bits + symmetric + (form == "gptq")) % 2 else RTNConfig
    config = method(bits=bits, group_size=GROUP_SIZE, symmetric=symmetric)
    quantize(model, config, calibration(), progress=False)
    save_gptq(model, tmp_path, checkpoint_format=form, tokenizer=tokenizer)
    if form == "gptq" and not symmetric:  # which GPTQModel takes from itself alone
        with pytest.raises(ValueError, match="sym"):
            load_alone(gptqmodel, tmp_path)
        assert_same_weights(model, load(tmp_path))  # and transformers takes from anyone
        return
    assert_gptqmodel_agrees(model, tmp_path, gptqmodel)
    for name, layer in gptqmodel_layers(load(tmp_path)).items():
        assert not layer.dequantize_weight().T[zeros[name]].any()


def assert_same_logits(actual, expected):
    assert torch.equal(outputs(actual, tokens()), outputs(expected, tokens()))


@pytest.mark.parametrize("group_size", [64, -1])
def test_group_sizes(group_size, gptqmodel, tokenizer, tmp_path):
    model = pruned()
    quantize(model, RTNConfig(group_size=group_size, symmetric=True, clipping="mse"), progress=False)
    save_gptq(model, tmp_path, tokenizer=tokenizer)
    assert_gptqmodel_agrees(model, tmp_path, gptqmodel)


def test_order_of_the_activations(gptqmodel, tokenizer, tmp_path):
    """Our `act_order`, whose groups are in order, and a grid whose groups are not."""
    model = pruned()
    quantize(model, GPTQConfig(group_size=GROUP_SIZE, act_order=True), calibration(), progress=False)
    save_gptq(model, tmp_path / "ours", tokenizer=tokenizer)
    assert_gptqmodel_agrees(model, tmp_path / "ours", gptqmodel)
    for name, layer in own_layers(model).items():
        order = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(len(name)))
        grid = Grid(
            layer.grid.scales, layer.grid.zeros, bits=4, in_features=layer.in_features, g_idx=layer.grid.g_idx[order]
        )
        model.set_submodule(name, QuantizedLinear.from_linear(layer, grid))
    save_gptq(model, tmp_path / "shuffled", tokenizer=tokenizer)
    assert json.loads((tmp_path / "shuffled" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    assert_gptqmodel_agrees(model, tmp_path / "shuffled", gptqmodel)


@pytest.mark.parametrize(
    "choice",
    [
        {"target_modules": ["gate_proj"]},
        {"target_modules": ["1.mlp.gate_proj", "q_proj"]},
        {"exclude_modules": ["down_proj", "0.self_attn.q_proj"]},
    ],
    ids=["alike", "few", "most"],
)
def test_some_layers(choice, gptqmodel, tokenizer, tmp_path):
    """The others stay dense, as the head always does here."""
    model = pruned()
    quantize(model, RTNConfig(group_size=GROUP_SIZE, **choice), progress=False)
    save_gptq(model, tmp_path, tokenizer=tokenizer)
    assert_gptqmodel_agrees(model, tmp_path, gptqmodel)


def test_layers_that_differ(gptqmodel, tokenizer, tmp_path):
    """4 bits, 8 in larger groups, 2 in one layer, and some dense. transformers takes one kind alone."""
    model = pruned()
    excluded = ["down_proj", "o_proj", "1.mlp.up_proj"]
    quantize(model, RTNConfig(group_size=GROUP_SIZE, exclude_modules=excluded), progress=False)
    quantize(model, RTNConfig(bits=8, group_size=64, target_modules=["down_proj"]), progress=False)
    quantize(model, RTNConfig(bits=2, group_size=GROUP_SIZE, target_modules=["1.mlp.up_proj"]), progress=False)
    save_gptq(model, tmp_path, tokenizer=tokenizer)
    alone = load_alone(gptqmodel, tmp_path)
    layers = gptqmodel_layers(alone)
    assert len(layers) == 12
    assert {(layer.bits, layer.group_size) for layer in layers.values()} == {(4, 32), (8, 64), (2, 32)}
    assert_same_weights(model, alone)
    assert_close(outputs(alone, tokens()).float(), outputs(model, tokens()), rtol=1e-2)
    with pytest.raises(RuntimeError, match="mismatched"):
        load(tmp_path)


def test_biases(gptqmodel, tokenizer, tmp_path):
    """Qwen2's q, k and v have one, its other layers none."""
    model = pruned(tiny_qwen2)
    quantize(model, GPTQConfig(group_size=GROUP_SIZE), calibration(), progress=False)
    save_gptq(model, tmp_path, tokenizer=tokenizer)
    assert model.model.layers[0].self_attn.q_proj.bias.any()
    assert_gptqmodel_agrees(model, tmp_path, gptqmodel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, gptqmodel, tokenizer, tmp_path):
    """A model in 16 bits, its biases too. They are in bfloat16 on disk, and in GPTQModel's layers as it likes them."""
    model = pruned(tiny_qwen2).to(dtype)
    quantize(model, RTNConfig(group_size=GROUP_SIZE), progress=False)
    save_gptq(model, tmp_path, tokenizer=tokenizer)
    theirs = load(tmp_path)
    assert_same_weights(model, theirs)
    rtol = 1e-2 if dtype == torch.float16 else 5e-2
    assert_close(outputs(theirs, tokens()), outputs(model, tokens()).float(), rtol)
    assert_close(outputs(load(tmp_path, dtype), tokens()).float(), outputs(model, tokens()).float(), rtol)


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_theirs(quantized_folder, kind):
    """`load_gptq` of what GPTQModel wrote, and written again by us."""
    folder = quantized_folder(**kind)
    model, theirs = load_gptq(folder), load(folder)
    assert_same_weights(model, theirs)
    for name, layer in gptqmodel_layers(theirs).items():
        own = own_layers(model)[name]
        assert torch.equal(own.grid.scales.T, layer.scales.half()) and torch.equal(own.grid.g_idx, layer.g_idx.int())
        assert own.grid.in_order != kind.get("desc_act", False)
        assert own.grid.symmetric == kind.get("sym", True)
    logits = outputs(theirs, tokens())
    assert_close(model, logits)
    torch.testing.assert_close(
        outputs(as_gptqmodel_computes(copy.deepcopy(model)), tokens()), logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", [{}, {"sym": False, "desc_act": True, "form": "gptq_v2"}], ids=name_of)
def test_theirs_written_again(quantized_folder, kind, tmp_path):
    folder = quantized_folder(**kind)
    model = load_gptq(folder)
    save_gptq(model, tmp_path)
    theirs = load(tmp_path)
    assert_same_weights(model, theirs)
    assert_same_logits(load_gptq(tmp_path), model)
    torch.testing.assert_close(outputs(theirs, tokens()), outputs(load(folder), tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [{}, {"sym": False, "desc_act": True, "form": "gptq_v2"}], ids=name_of)
def test_theirs_with_the_dense_original(quantized_folder, dense_folder, kind):
    folder = quantized_folder(**kind)
    model = load_gptq(folder, dense=dense_folder)
    assert_same_weights(model, load(folder))
    assert_same_logits(model, load_gptq(folder))
    dense = dict(AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32).named_parameters())
    kept = [
        (layer.weight == dense[f"{name}.weight"]).float().mean().item() for name, layer in own_layers(model).items()
    ]
    assert 0.1 < min(kept)  # GPTQ moves the others into the next cell
    assert not any(layer.exact for layer in own_layers(model).values())
    assert (outputs(model, tokens()) - outputs(tiny_llama(**SHAPE), tokens())).abs().mean() < 0.5
