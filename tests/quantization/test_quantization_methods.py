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

import copy
import importlib
import json
import re
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.calibration import Experts, inputs_by_full_passes, linears
from support.models import ARCHITECTURES, ConvNet, outputs, tiny_gpt2, tiny_llama, tiny_t5, tokens
from torch import nn
from transformers import AutoModelForCausalLM

from peft_elastic import MultiPrunerConfig, prune_structured, sparsify_linears
from peft_elastic.layers import ops
from peft_elastic.pruning import MagnitudeConfig, measure_sparsity, prune
from peft_elastic.quantization import GPTQConfig, QuantizationConfig, QuantizedLinear, RTNConfig, fit_grid, quantize
from peft_elastic.quantization.gptq import gptq
from peft_elastic.structure.hessian import inverse_factor, output_error
from peft_elastic.structure.modules import weight_matrix


# --- references, written from the formulas, in float64 -------------------------------------------------------------------


def reference_grid(values, bits, symmetric, clipping="minmax"):
    """Scale and zero point of one group of weights."""
    top = 2**bits - 1
    low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)

    def candidate(share):
        if low == high == 0:
            return 1.0, 2 ** (bits - 1) if symmetric else 1
        if symmetric:
            return half(2 * share * max(-low, high) / top), 2 ** (bits - 1)
        scale = share * (high - low) / top
        if round(-low * share / scale) < 1:
            return half(share * high / (top - 1)), 1
        scale = half(scale)
        return scale, min(max(round(-low * share / scale), 1), top)

    def half(value):
        return torch.tensor(value, dtype=torch.float64).half().double().item()

    shares = [1.0] if clipping == "minmax" else [1 - 0.02 * i for i in range(31)]
    return min(
        (candidate(share) for share in shares),
        key=lambda grid: (values - reference_round(values, *grid, bits)).square().sum().item(),
    )


def reference_round(values, scale, zero, bits):
    return (((values / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale


def reference_gptq(weight, hessian, config):
    """Each input in turn, with the inverse of what remains of the Hessian computed anew: the definition, O(n^4)."""
    size = weight.shape[1] if config.group_size == -1 else config.group_size
    weight, mask = weight.clone(), weight != 0
    integers, values = torch.empty_like(weight), torch.empty_like(weight)
    hessian = hessian + config.damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    order = list(range(len(hessian)))
    grids = {}

    def fit(group):
        columns = slice(group * size, (group + 1) * size)
        for row in range(len(weight)):
            part = weight[row, columns] * mask[row, columns]
            grids[row, group] = reference_grid(part, config.bits, config.symmetric, config.clipping)

    if config.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
        for group in range(len(order) // size):
            fit(group)
    while order:
        j = order[0]
        if not config.act_order and j % size == 0:
            fit(j // size)
        inverse = torch.linalg.inv(hessian[order][:, order])
        scale, zero = torch.tensor([grids[row, j // size] for row in range(len(weight))], dtype=torch.float64).T
        steps = ((weight[:, j] * mask[:, j] / scale).round() + zero).clamp(0, 2**config.bits - 1) - zero
        integers[:, j], values[:, j] = steps + zero, steps * scale
        weight[:, order] -= ((weight[:, j] - values[:, j]) / inverse[0, 0])[:, None] * inverse[0]
        order = order[1:]
    return integers, values


def problem(out_features=7, in_features=24, samples=60, seed=0, sparsity=0.0):
    """A weight with zeros, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, in_features, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    weight[torch.rand(weight.shape, generator=generator) < sparsity] = 0
    return weight, inputs.T @ inputs


def quantized_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def all_integers(model):
    return {name: layer.integers() for name, layer in quantized_layers(model).items()}


def same_integers(a, b):
    a, b = all_integers(a), all_integers(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- grids ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_grid_by_brute_force(bits, symmetric, clipping):
    weight, _ = problem(6, 32, sparsity=0.3)
    weight[0], weight[1, :8], weight[2, 8:] = weight[0].abs(), 0, -weight[2, 8:].abs()
    weight[3, 5] *= 20  # which clipping leaves out
    grid = fit_grid(weight, bits, 8, symmetric, clipping)
    rounded = grid.round(weight)
    for row in range(6):
        for group in range(4):
            part = slice(8 * group, 8 * group + 8)
            scale, zero = reference_grid(weight[row, part], bits, symmetric, clipping)
            if clipping == "minmax":
                assert (grid.scales[row, group].item(), grid.zeros[row, group].item()) == (scale, zero)
                assert torch.equal(rounded[row, part], reference_round(weight[row, part], scale, zero, bits))
            best = (weight[row, part] - reference_round(weight[row, part], scale, zero, bits)).norm().item()
            assert (weight[row, part] - rounded[row, part]).norm().item() == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert (rounded[weight == 0] == 0).all() and (grid.zeros > 0).all()


def test_weights_moved_into_cells():
    weight, _ = problem(5, 32, sparsity=0.4)
    for bits in (2, 4, 8):
        grid = fit_grid(weight, bits, 16)
        other = weight + 0.3 * torch.randn_like(weight)
        integers = grid.quantize(weight)
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            start = other.to(dtype)
            moved = grid.into_cells(start, integers)
            assert moved.dtype == dtype and torch.equal(grid.quantize(moved), integers)
            stays = grid.quantize(start) == integers
            assert torch.equal(moved[stays], start[stays])
            step = grid.scales.repeat_interleave(16, 1).float()
            assert ((moved.float() - grid.round(weight).float()).abs() <= step * 0.51)[~stays].all()


def test_rounding_has_no_gradient():
    weight = nn.Parameter(torch.randn(4, 16))
    assert not fit_grid(weight, 4, 8).round(weight).requires_grad


# --- GPTQ of one matrix --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize(
    "options",
    [
        {"group_size": 8},
        {"group_size": 8, "act_order": True},
        {"group_size": 8, "block_size": 5},  # cuts groups
        {"group_size": 6, "block_size": 8, "bits": 2},  # 8 is no multiple of 6
        {"group_size": 12, "block_size": 4, "symmetric": True},  # a group over several blocks
        {"group_size": -1, "bits": 8, "clipping": "mse"},
        {"group_size": 24, "act_order": True, "block_size": 1, "bits": 2, "damping": 0.1},
    ],
)
def test_gptq_equals_its_definition(options, sparsity):
    config = GPTQConfig(**options)
    weight, hessian = problem(sparsity=sparsity)
    result = gptq(weight, hessian, config)
    integers, values = reference_gptq(weight, hessian, config)
    assert torch.equal(result.grid.quantize(result.weight).double(), integers)
    torch.testing.assert_close(result.grid.round(result.weight), values, rtol=1e-12, atol=1e-12)
    assert result.weight.dtype == torch.float64 and result.grid.in_order
    assert (result.weight[weight == 0] == 0).all() and (values[weight == 0] == 0).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_gptq_has_smaller_output_errors_than_rounding_to_nearest(sparsity):
    weight, hessian = problem(64, 128, 150, sparsity=sparsity)
    nearest = output_error(weight - fit_grid(weight, 4, 32).round(weight), weight, hessian)
    for act_order in (False, True):
        result = gptq(weight, hessian, GPTQConfig(group_size=32, act_order=act_order))
        assert (
            output_error(weight - result.grid.round(result.weight), weight, hessian)
            < (0.9 if sparsity else 0.7) * nearest
        )


def test_output_error_is_that_of_the_outputs():
    weight = torch.randn(5, 8, dtype=torch.float64)
    inputs = torch.randn(30, 8, dtype=torch.float64)
    difference = torch.randn(5, 8, dtype=torch.float64)
    expected = ((inputs @ difference.T).norm() / (inputs @ weight.T).norm()).item()
    assert output_error(difference, weight, inputs.T @ inputs) == pytest.approx(expected)
    assert output_error(difference, torch.zeros(5, 8).double(), inputs.T @ inputs) is None


def test_the_factor():
    _, hessian = problem()
    factor = inverse_factor(hessian, 0.01, "layer")
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(24, dtype=torch.float64))
    assert torch.equal(factor, factor.triu())


def test_dead_inputs_are_rounded_to_nearest():
    weight, hessian = problem()
    dead = [0, 5, 23]
    hessian[dead] = 0
    hessian[:, dead] = 0
    for act_order in (False, True):
        result = gptq(weight, hessian, GPTQConfig(group_size=8, act_order=act_order))
        assert torch.equal(result.weight[:, dead], weight[:, dead])
    nothing = gptq(weight, torch.zeros(24, 24).double(), GPTQConfig(group_size=8))
    assert torch.equal(nothing.weight, weight)  # no input is ever anything but zero


def test_damping_grows_until_it_is_enough():
    weight, hessian = problem(samples=3)  # rank 3
    result = gptq(weight.float(), hessian.float(), GPTQConfig(group_size=8, damping=1e-12))
    assert torch.isfinite(result.weight).all()
    hessian[3, 3] = -1e9
    with pytest.raises(ValueError, match=r"`damping` is 0.01, and the Hessian of model.q is not positive definite"):
        gptq(weight, hessian, GPTQConfig(group_size=8), "model.q")


# --- models --------------------------------------------------------------------------------------------------------------


def naive_gptq(model, batches, config, block_names):
    """GPTQ of a model by its definition: full forward passes for each block in turn."""
    integers = {}
    for block in block_names:
        found = inputs_by_full_passes(model, block, batches)
        for inner, layer in linears(model.get_submodule(block)).items():
            name, inputs = f"{block}.{inner}", found[inner]
            integers[name], values = reference_gptq(weight_matrix(layer), inputs.T @ inputs, config)
            weight_matrix(layer).copy_(values)
    return integers


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "opt", "t5"])
def test_gptq_of_a_model_equals_full_forward_passes(architecture):
    details = ARCHITECTURES[architecture]
    model = details.build().double()
    prune(model, MagnitudeConfig(sparsity=0.4), progress=False)
    sparse = {name: share for name, share in measure_sparsity(model).items() if share}
    batches = [details.inputs() for _ in range(2)]
    batches[1]["input_ids"] = tokens(2, 5, seed=3)
    batches[1]["attention_mask"] = torch.ones_like(batches[1]["input_ids"])
    if architecture == "t5":
        batches[1]["decoder_input_ids"] = tokens(2, 4, seed=4)
    expected = copy.deepcopy(model)
    config = GPTQConfig(group_size=16, bits=4)
    integers = naive_gptq(expected, batches, config, details.blocks)
    report = quantize(model, config, iter(batches), progress=False)

    found = all_integers(model)
    assert found.keys() == integers.keys() == {row["name"] for row in report.layers} == sparse.keys()
    for name, layer in quantized_layers(model).items():
        assert torch.equal(found[name].double(), integers[name]), name
        assert torch.equal(layer.grid.round(layer.weight), weight_matrix(expected.get_submodule(name))), name
    torch.testing.assert_close(outputs(model, batches[0]), outputs(expected, batches[0]), rtol=1e-9, atol=1e-9)
    for row in report.layers:
        assert row["sparsity"] == pytest.approx(sparse[row["name"]]) and row["zeros"] >= row["sparsity"]
        assert 0 < row["output_error"] < 0.5 and 0 < row["weight_error"] < 0.1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
def test_rounding_to_nearest_of_a_model(architecture):
    model = ARCHITECTURES[architecture].build()
    prune(model, MagnitudeConfig(sparsity=0.5), progress=False)
    before = copy.deepcopy(model)
    report = quantize(model, RTNConfig(bits=8, group_size=16), progress=False)
    assert report.method == "rtn" and report.calibration_tokens == 0
    for name, layer in quantized_layers(model).items():
        weight = weight_matrix(before.get_submodule(name))
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.grid.round(layer.weight), fit_grid(weight, 8, 16).round(weight))
    inputs = ARCHITECTURES[architecture].inputs()
    torch.testing.assert_close(outputs(model, inputs), outputs(before, inputs), rtol=0.1, atol=0.1)
    named = dict(model.named_parameters())  # everything else is as it was
    for name, parameter in before.named_parameters():
        if name.removesuffix(".weight") not in quantized_layers(model):
            assert torch.equal(named[name], parameter)


def test_padding_does_not_count():
    model = tiny_llama().double()
    sequences = [tokens(1, 4 + 3 * i, seed=i) for i in range(3)]
    ids, mask = torch.full((3, 10), 7), torch.zeros(3, 10, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : sequence.shape[1]], mask[row, : sequence.shape[1]] = sequence[0], 1
    alone, config = copy.deepcopy(model), GPTQConfig(group_size=16)
    quantize(alone, config, sequences, progress=False)
    report = quantize(model, config, {"input_ids": ids, "attention_mask": mask}, progress=False)
    assert report.calibration_tokens == 4 + 7 + 10
    assert same_integers(model, alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_half_precision_keeps_the_integers(dtype, bits, monkeypatch):
    """The weight at the moment of its rounding is known in float32; in half precision it has to be rounded to the same."""
    module = importlib.import_module("peft_elastic.quantization.gptq")
    results = []
    original = module.gptq
    monkeypatch.setattr(module, "gptq", lambda *args: results.append(original(*args)) or results[-1])
    model = tiny_llama().to(dtype)
    quantize(model, GPTQConfig(bits=bits, group_size=16), [tokens()], progress=False)
    expected = torch.cat([result.grid.quantize(result.weight).flatten() for result in results])
    layers = quantized_layers(model)
    blocks = [f"model.layers.{i}." for i in range(2)]
    order = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj"]
    found = [layers[b + n].integers().flatten() for b in blocks for n in [*order, "mlp.up_proj", "mlp.down_proj"]]
    difference = (torch.cat(found).int() - expected.int()).abs()
    # bfloat16 has 8 significant bits: beyond 128 steps from zero some integers are out of reach
    assert difference.max() == (1 if (bits, dtype) == (8, torch.bfloat16) else 0) and difference.float().mean() < 0.01
    assert len(results) == 8  # q, k, v at once, and gate, up
    assert all(layer.weight.dtype == dtype for layer in layers.values())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_whole_blocks_and_goes_on(error):
    model, config, batches = tiny_llama(num_hidden_layers=3), GPTQConfig(group_size=16), [tokens()]
    unbroken = copy.deepcopy(model)
    quantize(unbroken, config, batches, progress=False)
    calls = []

    def fail(module, args):
        calls.append(0)
        if len(calls) == 3:  # the trial, the observation, and the pass that leads to the last block
            raise error("stop here")

    model.train()
    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(error, match=r"stop here"):
        quantize(model, config, batches, progress=False)
    handle.remove()
    assert model.training and len(quantized_layers(model)) == 14
    assert {name.split(".")[2] for name in quantized_layers(model)} == {"0", "1"}
    with pytest.raises(ValueError, match=r"save_gptq"):
        model.save_pretrained("/nowhere")
    with pytest.warns(UserWarning, match=r"14 layers, such as model.layers.0.self_attn.q_proj, are quantised already"):
        report = quantize(model, config, batches, progress=False)
    assert len(report.layers) == 7
    assert same_integers(model, unbroken)


def test_layers_without_tokens_are_rounded_to_nearest():
    model = nn.Sequential(Experts(), Experts())
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"No calibration token reaches \d\.experts\.2: rounded to nearest"):
        report = quantize(model, GPTQConfig(group_size=8), [{"input": torch.randn(20, 16)}], progress=False)
    assert torch.equal(model[0].experts[2].weight, before[0].experts[2].weight)
    assert not torch.equal(model[0].experts[1].weight, before[0].experts[1].weight)
    assert [row["output_error"] is None for row in report.layers] == [False, False, True] * 2
    assert "0.experts" in str(report) or "*.experts" in str(report)


def test_base_layers_of_adapters():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "down_proj"]))
    plain = tiny_llama()
    quantize(plain, GPTQConfig(group_size=16), [tokens()], progress=False)
    quantize(model, GPTQConfig(group_size=16), [tokens()], progress=False)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.base_layer, QuantizedLinear) and layer.lora_A.default.weight.requires_grad
    assert len(quantized_layers(model)) == 14
    for name, found in all_integers(plain).items():
        match = next(n for n in quantized_layers(model) if n.removesuffix(".base_layer").endswith(name))
        assert torch.equal(quantized_layers(model)[match].integers(), found)
    with pytest.raises(ValueError, match=r"a Conv1D with an adapter"):
        quantize(
            get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)),
            RTNConfig(group_size=16),
        )


def test_the_report():
    model = tiny_llama()
    report = quantize(model, GPTQConfig(group_size=16, max_samples=2), [tokens()], progress=False)
    assert report.calibration_tokens == 14  # two sequences of 7
    data = json.loads(json.dumps(report.to_dict()))
    assert data["method"] == "gptq" and data["config"]["group_size"] == 16 and len(data["layers"]) == 14
    row = data["layers"][0]
    assert row["name"] == "model.layers.0.self_attn.q_proj" and row["shape"] == [32, 32] and row["bits"] == 4
    table = str(report).splitlines()
    assert len(table) == 1 + 1 + 7 + 1 and "14 calibration tokens" in table[0]
    assert all(len(line) == len(table[1]) for line in table[1:])


def test_sub_bits_and_act_order_pay():
    """On correlated inputs, over a whole model: fewer bits are worse, GPTQ is better than rounding to nearest."""
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    calibration = [tokens(16, 32, seed=i) for i in range(4)]
    held_out = {"input_ids": tokens(8, 32, seed=99)}
    dense = outputs(model, held_out)
    error = {}
    for name, config in {
        "rtn": RTNConfig(bits=2, group_size=32),
        "gptq": GPTQConfig(bits=2, group_size=32),
        "act": GPTQConfig(bits=2, group_size=32, act_order=True),
        "gptq4": GPTQConfig(bits=4, group_size=32),
        "gptq8": GPTQConfig(bits=8, group_size=32),
    }.items():
        one = copy.deepcopy(model)
        quantize(one, config, calibration, progress=False)
        error[name] = ((outputs(one, held_out) - dense).norm() / dense.norm()).item()
    assert error["gptq8"] < error["gptq4"] < error["gptq"] < error["rtn"]
    assert error["act"] < error["rtn"]


# --- saving as an ordinary model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_unrounded_weights_are_not_saved(build, tmp_path):
    model = build()
    quantize(model, RTNConfig(group_size=16), progress=False)
    inputs = {"input_ids": tokens()}
    expected = outputs(model, inputs)
    for one in (model, copy.deepcopy(model), model.base_model):
        with pytest.raises(ValueError, match=r"Use peft_elastic.save_gptq\(model, folder\) for the integers"):
            one.save_pretrained(tmp_path / "refused")
    assert not list(tmp_path.rglob("*.safetensors"))
    rounded, plain = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for layer in quantized_layers(rounded).values():
            layer.weight.copy_(layer.grid.round(layer.weight))
    plain.dequantize()
    assert not quantized_layers(plain)
    for name, one in {"rounded": rounded, "plain": plain}.items():
        assert torch.equal(outputs(one, inputs), expected)
        one.save_pretrained(tmp_path / name)
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(outputs(reloaded, inputs), expected)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"] if build is tiny_llama else ["c_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")  # holds the adapter alone
    assert not re.search("quant", (tmp_path / "rounded" / "config.json").read_text())


# --- bad arguments, before anything is changed ---------------------------------------------------------------------------


@pytest.mark.parametrize("config_class", [RTNConfig, GPTQConfig])
@pytest.mark.parametrize(
    "argument, value",
    [
        ("bits", 3), ("bits", "4"), ("bits", True), ("group_size", 0), ("group_size", -2), ("group_size", 32.0),
        ("symmetric", 1), ("clipping", "max"), ("target_modules", []), ("exclude_modules", "("),
    ],
)  # fmt: skip
def test_bad_options(config_class, argument, value):
    with pytest.raises(ValueError, match=argument):
        config_class(**{argument: value})


@pytest.mark.parametrize(
    "argument, value",
    [("act_order", 1), ("damping", 0), ("damping", 2), ("damping", "much"), ("block_size", 0), ("max_samples", 0)],
)
def test_bad_options_of_gptq(argument, value):
    with pytest.raises(ValueError, match=argument):
        GPTQConfig(**{argument: value})


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    "message, config, change, calibration",
    [
        ("`config` must be", QuantizationConfig(), None, [tokens()]),
        ("`target_modules`: 'x_proj' matches no linear layer", RTNConfig(target_modules=["x_proj"]), None, None),
        (
            "does not divide the 48 inputs of 'model.layers.0.mlp.down_proj'",
            GPTQConfig(group_size=32),
            None,
            [tokens()],
        ),
        ("`calibration` must be an iterable of batches", GPTQConfig(group_size=16), None, None),
        ("calibration: it yielded no data", GPTQConfig(group_size=16), None, []),
        ("down_proj holds NaN", RTNConfig(group_size=16), "nan", None),
        ("down_proj is a OwnLinear", RTNConfig(group_size=16), "subclass", None),
        ("lm_head shares its weight", RTNConfig(group_size=16, target_modules=["down_proj", "lm_head"]), "tied", None),
        ("is quantised with somehow already", RTNConfig(group_size=16), "other", None),
        (
            "does not use model.spare.0",
            GPTQConfig(group_size=16, target_modules=".*(down_proj|spare.*)"),
            "spare",
            [tokens()],
        ),
    ],
)
def test_bad_arguments(message, config, change, calibration):
    model = tiny_llama()
    layer = model.model.layers[1].mlp.down_proj
    if change == "nan":
        layer.weight.data[0, 0] = float("nan")
    elif change == "subclass":
        layer.__class__ = OwnLinear
    elif change == "tied":
        model.lm_head.weight = model.model.embed_tokens.weight
    elif change == "spare":
        model.model.spare = nn.ModuleList([nn.Linear(16, 16)])
    elif change == "other":
        quantize(model, RTNConfig(group_size=16, target_modules=["lm_head"]), progress=False)
        model.hf_quantizer = copy.copy(model.hf_quantizer)
        model.hf_quantizer.__class__ = type("Other", (type(model.hf_quantizer).__mro__[1],), {
            "is_serializable": None, "is_trainable": None,
        })  # fmt: skip
        model.hf_quantizer.quantization_config.quant_method = "somehow"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(model, config, calibration, progress=False)
    assert modules == list(model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num())


def test_quantised_models_are_refused():
    model = tiny_llama()
    quantize(model, RTNConfig(group_size=16), progress=False)
    with pytest.raises(
        ValueError, match=r"model.layers.0.self_attn.q_proj is quantised already, with 4 bits and groups of 16"
    ):
        quantize(model, RTNConfig(group_size=16), progress=False)
    model = tiny_llama()
    quantize(model, RTNConfig(group_size=16, target_modules=["q_proj"]), progress=False)
    with pytest.raises(ValueError, match=r"q_proj is quantised already"):
        quantize(model, RTNConfig(bits=8, group_size=16), progress=False)
    quantize(model, RTNConfig(bits=8, group_size=16, exclude_modules=["q_proj"]), progress=False)
    assert {layer.grid.bits for layer in quantized_layers(model).values()} == {4, 8}


def test_activations_that_are_not_finite():
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokens()[0, 0], 0] = float("inf")
    with pytest.raises(ValueError, match=r"calibration: the inputs of model.layers.0.*not finite"):
        quantize(model, GPTQConfig(group_size=16), [tokens()], progress=False)
    assert not quantized_layers(model)


def test_models_that_are_not_of_transformers():
    model = ConvNet()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(model, RTNConfig(group_size=6), progress=False)
    assert list(quantized_layers(model)) == ["head"]


def test_tied_modules_are_replaced_in_both_places():
    model = tiny_t5()
    block = model.encoder.block[0].layer[0].SelfAttention
    block.again = block.q  # the same module, under two names
    quantize(model, RTNConfig(group_size=16), progress=False)
    assert block.again is block.q and isinstance(block.q, QuantizedLinear)


@pytest.mark.parametrize("config", [RTNConfig(group_size=16), GPTQConfig(group_size=16)])
def test_a_model_with_blocks_of_different_sizes(config, tmp_path):
    # its checkpoint says how large each block is, in the place where that of a quantised model says how
    model = tiny_llama()
    pruning = MultiPrunerConfig(ratio=0.2, mlp_group=16, order="magnitude")
    prune_structured(model, pruning, calibration=[tokens()], progress=False)
    sizes = [layer.mlp.down_proj.in_features for layer in model.model.layers if hasattr(layer.mlp, "down_proj")]
    assert len(set(sizes)) > 1 or len(sizes) < len(model.model.layers)
    quantize(model, config, calibration=[tokens()], progress=False)
    expected = model(tokens()).logits
    with pytest.raises(ValueError, match="as they were before the rounding"):
        model.save_pretrained(tmp_path / "refused")
    model.dequantize()
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(tokens()).logits, expected)


@pytest.mark.skipif(not ops.is_available(), reason="needs the C++ extension")
def test_packed_layers_are_refused():
    model = tiny_llama()
    prune(model, MagnitudeConfig(sparsity=0.5))
    sparsify_linears(model, when="always", skip=["down_proj"])
    with pytest.raises(ValueError, match="quantised with peft_elastic already"):
        quantize(model, RTNConfig(group_size=16), progress=False)
