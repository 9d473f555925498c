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
"""Everything that peft does with adapters, done with masked and quantisation-aware ones."""

import contextlib
import io
import json
import sys

import pytest
import torch
from peft import PeftModel, get_layer_status, get_model_status, get_peft_model, get_peft_model_state_dict
from support import fresh
from support.models import TRANSFORMERS_ADAPTERS, default_dtype, net, outputs, randomize, tiny_llama, tokens
from support.places import TESTS
from support.sparse_qa import (
    ALL_KINDS,
    KINDS,
    QUANTIZED,
    TARGETS,
    adapted,
    base_weights,
    config,
    effective_weights,
    layers,
    pruned,
    quantized,
)
from torch import nn

from peft_elastic import ElasticLoraConfig, SparseLinear, SparseQALoraConfig, WandaConfig, prune
from peft_elastic.quantization import Grid, QuantizedLinear, fit_grid


pytestmark = pytest.mark.filterwarnings("ignore")


def formula(layer, name, k=None):
    """W + s B[:, :k] A[:k] * M, rounded, of one layer."""
    base_layer, grid = layer.get_base_layer(), layer.lora_grid[name] if name in layer.lora_grid else None
    weight = base_layer.weight.detach()
    A, B = layer.lora_A[name].full_weight.detach()[:k], layer.lora_B[name].full_weight.detach()[:, :k]
    delta = layer.scaling[name] * B @ A
    if layer.masked[name]:
        delta = delta * (weight != 0)
    return weight + delta if grid is None else grid.round(weight + delta)


# -- ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_subnets_compute_with_the_first_ranks(kind):
    with default_dtype(torch.float64):
        model = adapted(**ALL_KINDS[kind])
        for subnet in ("max", "min", model.search_space.sample(0)):
            model.set_subnet(subnet)
            ranks = {m: model.active_subnet[choice.key] for choice in model.search_space for m in choice.modules}
            found = effective_weights(model)
            for path, k in ranks.items():
                layer = layers(model)[f"base_model.model.{path}"]
                torch.testing.assert_close(found[path], formula(layer, "default", k), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_go_to_the_active_ranks(kind):
    model = adapted(**KINDS[kind])
    model.set_subnet("min")
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            assert parameter.grad[:2].any() and not parameter.grad[2:].any()
        elif "lora_B" in name:
            assert parameter.grad[:, :2].any() and not parameter.grad[:, 2:].any()
        else:
            assert parameter.grad is None


@pytest.mark.parametrize(
    "settings", [{"use_rslora": True}, {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}}]
)
def test_scalings(settings):
    model = adapted(**QUANTIZED, **settings)
    found = effective_weights(model)
    for name, layer in layers(model).items():
        weight = formula(layer, "default", layer.lora_A["default"].kept)
        torch.testing.assert_close(found[name.removeprefix("base_model.model.")], weight)
    before = outputs(model, tokens())
    torch.testing.assert_close(
        outputs(model.merge_and_unload(sparse_kernel=False), tokens()), before, rtol=1e-4, atol=1e-4
    )


# -- dropout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_dropout_acts_on_the_update_alone(kind):
    with default_dtype(torch.float64):
        base = pruned(nn.Sequential(nn.Linear(32, 24)))
        model = adapted(base, target_modules=["0"], lora_dropout=0.4, **ALL_KINDS[kind])
    (layer,) = layers(model).values()
    weight, x = layer.get_base_layer().weight, torch.randn(200, 32, dtype=torch.float64)
    bias, effective = layer.get_base_layer().bias, formula(layer, "default")
    torch.testing.assert_close(outputs(model, x), nn.functional.linear(x, effective, bias))
    model.train()
    torch.manual_seed(5)
    found = outputs(model, x)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.4)
    torch.testing.assert_close(found, nn.functional.linear(x, weight, bias) + dropped @ (effective - weight).T)
    # all is dropped: the base is left, to the last bit
    layer.lora_dropout["default"].p = 1.0
    assert torch.equal(outputs(model, x), nn.functional.linear(x, weight, bias))


def test_dropout_on_a_quantised_base():
    base = quantized(pruned(nn.Sequential(nn.Linear(32, 24))), ["0"])
    plain = base[0]
    model = adapted(base, target_modules=["0"], lora_dropout=0.4, quantization_aware=True)
    (layer,) = layers(model).values()
    x = torch.randn(50, 32)
    model.train()
    torch.manual_seed(5)
    found = outputs(model, x)
    torch.manual_seed(5)
    dropped = nn.functional.dropout(x, 0.4)
    rounded = plain.grid.round(plain.weight.detach())
    torch.testing.assert_close(found, plain(x) + dropped @ (formula(layer, "default") - rounded).T)
    layer.lora_dropout["default"].p = 1.0
    assert torch.equal(outputs(model, x), plain(x))


# -- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_autocast(kind, dropout):
    model = adapted(lora_dropout=dropout, **ALL_KINDS[kind]).train()
    ids = tokens()
    expected = model(input_ids=ids, labels=ids)
    wanted = torch.autograd.grad(expected.loss, [p for p in model.parameters() if p.requires_grad])
    with torch.autocast("cpu", torch.bfloat16):
        result = model(input_ids=ids, labels=ids)
        assert (
            layers(model)["base_model.model.model.layers.0.self_attn.q_proj"](torch.randn(2, 32)).dtype
            == torch.bfloat16
        )
    result.loss.backward()
    torch.testing.assert_close(result.logits.float(), expected.logits, rtol=0.1, atol=0.1)
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad.dtype == torch.float32 for grad in found)
    cosine = torch.cosine_similarity(
        torch.cat([g.flatten() for g in found]), torch.cat([g.flatten() for g in wanted]), dim=0
    )
    assert cosine > 0.99
    # merged it is the same under autocast
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        before = outputs(model, ids)
        after = outputs(model.merge_and_unload(sparse_kernel=False), ids)
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_bases(kind, dtype, autocast_adapter_dtype):
    expected = outputs(adapted(**ALL_KINDS[kind]), tokens())
    base = pruned(tiny_llama()).to(dtype)
    model = get_peft_model(base, config(**ALL_KINDS[kind]), autocast_adapter_dtype=autocast_adapter_dtype)
    randomize(model)
    adapters = torch.float32 if autocast_adapter_dtype else dtype
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {adapters}
    assert all(
        grid.scales.dtype == torch.float16 for layer in layers(model).values() for grid in layer.lora_grid.values()
    )
    found = model.eval()(input_ids=tokens(), labels=tokens())
    assert found.logits.dtype == dtype
    if "quantised" not in kind:  # another rounding changes the model
        torch.testing.assert_close(found.logits.float(), expected, rtol=0.1, atol=0.15)
    found.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)


def test_casts_leave_grids_alone():
    model = adapted(**QUANTIZED)
    before = {n: b.clone() for n, b in model.named_buffers() if "lora_grid" in n}
    assert {b.dtype for b in before.values()} == {torch.float16, torch.uint8, torch.int32}
    for cast in (torch.bfloat16, torch.float64, torch.float32):
        model.to(cast)
        assert all(
            torch.equal(b, before[n]) and b.dtype == before[n].dtype for n, b in model.named_buffers() if n in before
        )


# -- several adapters ----------------------------------------------------------------------------------------------


def several(**first):
    """An adapter of each kind."""
    model = adapted(**first)
    for seed, (name, settings) in enumerate(ALL_KINDS.items()):
        model.add_adapter(name.replace(" ", "_"), config(**settings))
        randomize(model, seed=seed + 5, adapter_name=name.replace(" ", "_"))
    return model.eval()


def alone(model, name):
    model.set_adapter(name)
    result = outputs(model, tokens())
    return result


def test_adapters_beside_each_other():
    model = several()
    names = list(model.peft_config)
    results = {name: alone(model, name) for name in names}
    assert all((results[a] - results[b]).abs().max() > 1e-2 for i, a in enumerate(names) for b in names[:i])
    for name in names:
        other = adapted(**ALL_KINDS.get(name.replace("_", " "), {}))
        state = get_peft_model_state_dict(model, adapter_name=name)
        with torch.no_grad():
            for key, tensor in get_peft_model_state_dict(other).items():
                tensor.copy_(state[key])
        torch.testing.assert_close(outputs(other, tokens()), results[name])
    # mixed batches
    ids = tokens(len(names) + 1)
    found = outputs(model, {"input_ids": ids}, adapter_names=["__base__", *names])
    for i, name in enumerate(names):
        model.set_adapter(name)
        expected = outputs(model, {"input_ids": ids[i + 1 : i + 2]})
        torch.testing.assert_close(found[i + 1 : i + 2], expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(found[:1], outputs(model, {"input_ids": ids[:1]}), rtol=1e-4, atol=1e-4)
    # deletion
    model.delete_adapter("sparse_and_quantised")
    assert all(
        "sparse_and_quantised" not in d for layer in layers(model).values() for d in (layer.lora_grid, layer.masked)
    )
    for name in names[:-1]:
        torch.testing.assert_close(alone(model, name), results[name])
    model.add_adapter("sparse_and_quantised", config(**QUANTIZED))
    model.set_adapter("sparse_and_quantised")


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_adapters_together(kind):
    """Updates add up, before the mask and the rounding."""
    with default_dtype(torch.float64):
        base = pruned(nn.Sequential(nn.Linear(32, 24)))
        model = adapted(base, target_modules=["0"], **ALL_KINDS[kind])
        model.add_adapter(
            "other", config(target_modules=["0"], r=3, elastic_ranks=[3], **{"lora_alpha": 9, **ALL_KINDS[kind]})
        )
        randomize(model, seed=9, adapter_name="other")
        model.base_model.set_adapter(["default", "other"])
        (layer,) = layers(model).values()
        weight = layer.get_base_layer().weight.detach()
        delta = sum(layer.scaling[n] * layer.lora_B[n].weight @ layer.lora_A[n].weight for n in ("default", "other"))
        expected = weight + (delta * (weight != 0) if layer.masked["default"] else delta)
        if "quantised" in kind:
            expected = layer.lora_grid["default"].round(expected)
        x = torch.randn(5, 32)
        for dropout in (0.0, 1e-9):
            for name in ("default", "other"):
                layer.lora_dropout[name] = nn.Dropout(dropout)
            for training in (False, True):
                model.train(training)
                torch.testing.assert_close(
                    outputs(model, x), nn.functional.linear(x, expected, layer.get_base_layer().bias)
                )


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_disabling(kind):
    base = pruned(tiny_llama())
    before = outputs(base, tokens())
    model = adapted(base, **ALL_KINDS[kind])
    with model.disable_adapter():
        assert torch.equal(outputs(model, tokens()), before)
    assert torch.equal(outputs(model.unload(), tokens()), before)


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_weighted_adapters(kind, combination):
    """The update is the weighted sum of the updates; the mask and the rounding are those of the adapters."""
    model = adapted(**ALL_KINDS[kind])
    model.add_adapter("other", config(**ALL_KINDS[kind]))
    randomize(model, seed=9, adapter_name="other")
    for layer in layers(model).values():  # grids that were loaded, say
        for name in layer.lora_grid:
            layer.lora_grid[name].scales.mul_(1.5)
    options = {"svd_rank": 8} if combination == "svd" else {}
    model.base_model.add_weighted_adapter(
        ["default", "other"], [0.7, -0.4], "sum", combination_type=combination, **options
    )
    model.set_adapter("sum")
    assert model.peft_config["sum"].sparse_adapter == ("sparse" in kind)
    found = effective_weights(model)
    for name, layer in layers(model).items():
        weight = layer.get_base_layer().weight.detach()
        A, B = ({n: m[n].weight.detach() for n in ("default", "other")} for m in (layer.lora_A, layer.lora_B))
        if combination == "linear":  # as in peft: A and B are added up
            factors = {"default": 0.7, "other": -0.4}
            sums = [
                sum(
                    abs(f * layer.scaling[n]) ** 0.5 * (-1 if matrix is A and f < 0 else 1) * matrix[n]
                    for n, f in factors.items()
                )
                for matrix in (A, B)
            ]
            delta = sums[1] @ sums[0]
        else:
            delta = layer.scaling["default"] * (0.7 * B["default"] @ A["default"] - 0.4 * B["other"] @ A["other"])
        expected = weight + (delta * (weight != 0) if layer.masked["default"] else delta)
        if "quantised" in kind:
            assert layer.lora_grid["sum"].equals(layer.lora_grid["default"])
            expected = layer.lora_grid["default"].round(expected)
            close = (found[name.removeprefix("base_model.model.")] - expected).abs() < 1e-5
            assert close.float().mean() > 0.99, name  # but for ties
            continue
        torch.testing.assert_close(found[name.removeprefix("base_model.model.")], expected, rtol=1e-3, atol=1e-4)


def test_weighted_adapters_of_different_kinds_are_refused():
    model = several()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for pair in (["default", "plain"], ["default", "sparse_and_quantised"]):
        with pytest.raises(ValueError, match="cannot be combined|cannot be active together"):
            model.base_model.add_weighted_adapter(pair, [1.0, 1.0], "sum", combination_type="cat")
        assert "sum" not in model.peft_config
        assert model.state_dict().keys() == state.keys()


# -- saving and loading --------------------------------------------------------------------------------------------


LOAD = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import peft_elastic
from support.models import tiny_llama, tokens, outputs
from peft import PeftModel
from support.sparse_qa import effective_weights, layers, pruned
folder, dtype = sys.argv[2], getattr(torch, sys.argv[3])
torch.set_num_threads(1)
model = PeftModel.from_pretrained(pruned(tiny_llama()).to(dtype), folder).eval()
grids = {n: {k: v for k, v in layer.lora_grid["default"].state_dict().items()} for n, layer in layers(model).items() if len(layer.lora_grid)}
torch.save({"outputs": outputs(model, tokens()), "grids": grids, "masked": [l.masked for l in layers(model).values()]}, folder + "/result.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_loading_in_another_process(tmp_path, kind):
    model = adapted(**ALL_KINDS[kind])
    model.set_subnet("min")
    before = outputs(model, tokens())
    model.save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", LOAD, TESTS, str(tmp_path), dtype]
        fresh.run(command, check=True, timeout=200)
        result = torch.load(tmp_path / "result.pt")
        if dtype == "float32":
            torch.testing.assert_close(result["outputs"], before)
        for name, layer in layers(model).items():
            if "quantised" in kind:
                for key, tensor in layer.lora_grid["default"].state_dict().items():
                    assert torch.equal(result["grids"][name][key], tensor)
        assert result["masked"] == [layer.masked for layer in layers(model).values()]


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_save_and_load(tmp_path, kind, low_cpu_mem_usage):
    model = adapted(**ALL_KINDS[kind])
    for subnet in ("max", "min"):
        model.set_subnet(subnet)
        before = outputs(model, tokens())
        model.save_pretrained(tmp_path)
        base = pruned(tiny_llama())
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert torch.equal(outputs(loaded, tokens()), before)
        loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
        loaded.set_adapter("second")
        assert torch.equal(outputs(loaded, tokens()), before)
        merged = loaded.merge_and_unload(sparse_kernel=False)
        torch.testing.assert_close(outputs(merged, tokens()), before, rtol=1e-4, atol=1e-4)


def test_the_files_are_small(tmp_path):
    """Neither masks nor weights are saved."""
    model = adapted(**QUANTIZED)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["bits"], saved["group_size"]) == ("SPARSE_QA_LORA", 4, 16)
    state = get_peft_model_state_dict(model)
    assert {key.rpartition(".")[2] for key in state} == {"weight", "scales", "zeros", "g_idx"}
    assert all(tensor.numel() <= 4 * 48 for tensor in state.values())


QUANTISED_BASES = {
    "groups": lambda base: quantized(base, bits=4, group_size=8),
    "whole rows": lambda base: quantized(base, bits=8, group_size=-1),
    "symmetric": lambda base: quantized(base, bits=2, group_size=16, symmetric=True),
    "act-order": lambda base: act_order(base),
}


def act_order(base):
    for module in quantized(base).modules():
        if isinstance(module, QuantizedLinear):
            g_idx = torch.randperm(module.in_features) // 16
            module.grid = Grid(
                module.grid.scales, module.grid.zeros, in_features=module.in_features, bits=4, g_idx=g_idx
            )
    return base


@pytest.mark.parametrize(
    ("dtype", "low_cpu_mem_usage"),
    # in peft, `low_cpu_mem_usage` rounds the weights of an adapter to the dtype of the base
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)],
)
@pytest.mark.parametrize("case", QUANTISED_BASES)
def test_the_grid_travels_with_the_adapter(tmp_path, case, dtype, low_cpu_mem_usage):
    """From a quantised base to one in floating point, in another dtype, and to one that was quantised in another way."""
    model = adapted(QUANTISED_BASES[case](pruned(tiny_llama()).to(dtype).float()), quantization_aware=True)
    before, weights = outputs(model, tokens()), base_weights(model)
    grids = {name: layer.lora_grid["default"] for name, layer in layers(model).items()}
    model.save_pretrained(tmp_path)
    others = [pruned(tiny_llama()).to(dtype)]
    if case == "groups":
        others.append(quantized(pruned(tiny_llama()).to(dtype), bits=4, group_size=8, clipping="mse"))
    for base in others:
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert all(layer.lora_grid["default"].equals(grids[name]) for name, layer in layers(loaded).items())
        assert all(
            layer.lora_grid["default"].in_order == grids[name].in_order for name, layer in layers(loaded).items()
        )
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(outputs(loaded, tokens()).float(), before, rtol=tolerance, atol=tolerance)
        expected = {name: grid.quantize(formula(layers(model)[name], "default")) for name, grid in grids.items()}
        merged = loaded.merge_and_unload(sparse_kernel=False)
        for name, q in expected.items():
            path = name.removeprefix("base_model.model.")
            assert torch.equal(merged.get_submodule(path).integers(), q)
            assert merged.get_submodule(path).weight[weights[path] == 0].eq(0).all()


@TRANSFORMERS_ADAPTERS
@pytest.mark.parametrize("case", ["groups", "act-order"])
def test_transformers_own_integration(tmp_path, case):
    model = QUANTISED_BASES[case](pruned(tiny_llama()))
    model.add_adapter(config(quantization_aware=True))
    randomize(model)
    before = outputs(model.eval(), tokens())
    grids = [layer.lora_grid["default"] for layer in layers(model).values()]
    model.save_pretrained(tmp_path)
    loaded = pruned(tiny_llama())
    loaded.load_adapter(str(tmp_path))
    for layer, grid in zip(layers(loaded).values(), grids, strict=True):
        assert layer.lora_grid["default"].equals(grid)
    torch.testing.assert_close(outputs(loaded.eval(), tokens()), before)
    # on a base with another grid
    other = QUANTISED_BASES[case](pruned(tiny_llama(seed=1)))
    other.load_state_dict(pruned(tiny_llama()).state_dict())
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(outputs(other.eval(), tokens()), before)


# -- the rest ------------------------------------------------------------------------------------------------------


def test_hooks_on_base_layers_see_the_base():
    """Whoever watches a base layer gets to see it; the output stays what it was."""
    for settings in ALL_KINDS.values():
        model = adapted(**settings)
        before, seen = outputs(model, tokens()), []
        (layer, *_) = layers(model).values()
        handles = [
            layer.get_base_layer().register_forward_hook(lambda module, args, output: seen.append(args[0].shape)),
            layer.get_base_layer().register_forward_pre_hook(lambda module, args: seen.append(args[0].shape)),
        ]
        torch.testing.assert_close(outputs(model, tokens()), before, rtol=1e-4, atol=1e-4)
        assert seen == [(3, 7, 32)] * 2
        for handle in handles:
            handle.remove()
        assert torch.equal(outputs(model, tokens()), before) and len(seen) == 2


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_pruning_a_model_that_has_adapters(kind):
    model = adapted(tiny_llama(), **ALL_KINDS[kind])
    prune(model, WandaConfig(sparsity=0.5), calibration=[{"input_ids": tokens(4, 8, seed=s)} for s in range(2)])
    weights = base_weights(model)
    assert all(0.4 < weight.eq(0).float().mean() < 0.6 for weight in weights.values())
    before = outputs(model, tokens())
    merged = model.merge_and_unload(sparse_kernel=False)
    torch.testing.assert_close(outputs(merged, tokens()), before, rtol=1e-4, atol=1e-4)
    if "sparse" in kind:
        assert all(merged.get_submodule(path).weight[weight == 0].eq(0).all() for path, weight in weights.items())


def test_weights_of_the_base_can_be_trained_too():
    model = adapted()
    for layer in layers(model).values():
        layer.get_base_layer().weight.requires_grad_()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(layer.get_base_layer().weight.grad.abs().max() > 0 for layer in layers(model).values())


def test_biases_of_the_base_can_be_trained_too():
    for settings in ALL_KINDS.values():
        base = pruned(nn.Sequential(nn.Linear(32, 24)))
        model = adapted(base, target_modules=["0"], bias="all", **settings)
        model(torch.randn(3, 32)).sum().backward()
        torch.testing.assert_close(model.base_model.model[0].get_base_layer().bias.grad, torch.full((24,), 3.0))


def printed(function):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function()
    return out.getvalue()


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_status(kind):
    model = adapted(**ALL_KINDS[kind])
    stock = get_peft_model(pruned(tiny_llama()), ElasticLoraConfig(r=4, elastic_ranks=[4, 2], target_modules=TARGETS))
    assert printed(model.print_trainable_parameters) == printed(stock.print_trainable_parameters)
    status = get_model_status(model)
    assert (
        status.peft_types == {"default": "SPARSE_QA_LORA"} and status.enabled and status.active_adapters == ["default"]
    )
    assert status.trainable_params == get_model_status(stock).trainable_params
    assert all(layer.devices == {"default": ["cpu"]} for layer in get_layer_status(model))
    assert "lora.lora" not in repr(model) and "SparseLoraLinear" in repr(model)
    assert model.subnet_summary().total_parameters == stock.subnet_summary().total_parameters


@pytest.mark.parametrize("kind", KINDS)
def test_search(kind):
    model = adapted(**KINDS[kind])
    calls = []

    def evaluate(model):
        calls.append(1)
        return -float(model(input_ids=tokens(), labels=tokens()).loss)

    result = model.search_subnet(evaluate, objectives=("accuracy", "parameters"), n_evals=8, seed=0)
    assert calls and len(result.pareto) >= 1
    model.set_subnet(result.best())
    outputs(model, tokens())


def test_fixed_ranks():
    model = adapted(elastic_ranks=[4], **QUANTIZED)
    assert model.search_space.size == 1
    before = outputs(model, tokens())
    torch.testing.assert_close(
        outputs(model.merge_and_unload(sparse_kernel=False), tokens()), before, rtol=1e-4, atol=1e-4
    )


def test_a_plain_configuration_adapts_other_layers_too():
    from support.models import EmbeddingNet

    model = get_peft_model(
        net(EmbeddingNet), config(sparse_adapter=False, target_modules=["embedding", "conv1d", "linear"])
    ).eval()
    randomize(model)
    ids = torch.randint(0, 20, (3, 4))
    before = outputs(model, ids)
    assert len(layers(model)) == 2
    torch.testing.assert_close(outputs(model.merge_and_unload(sparse_kernel=False), ids), before, rtol=1e-4, atol=1e-4)


def test_the_default_group_is_that_of_the_paper():
    model = get_peft_model(
        nn.Sequential(nn.Linear(256, 3)), SparseQALoraConfig(quantization_aware=True, target_modules=["0"])
    )
    (layer,) = layers(model).values()
    grid, weight = layer.lora_grid["default"], layer.get_base_layer().weight
    assert (grid.bits, grid.group_size, grid.symmetric) == (4, 128, False)
    assert grid.equals(fit_grid(weight, 4, 128))
    assert (model.peft_config["default"].bits, model.peft_config["default"].group_size) == (4, 128)


@pytest.mark.parametrize("merged", [False, True])
def test_generation(merged):
    model = adapted(**QUANTIZED)
    ids = tokens(2, 5)
    expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    if merged:
        model = model.merge_and_unload(sparse_kernel=False)
    else:
        model.merge_adapter()
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6, do_sample=False), expected)


def test_masked_adapters_are_deployed_sparse():
    """The zeros are still there, so that the sparse layers can be swapped in without pruning once more."""
    model = adapted()
    before, kept = outputs(model, tokens()), len(layers(model))
    deployed = model.merge_and_unload(sparse_kernel=True)
    swapped = [module for module in deployed.modules() if isinstance(module, SparseLinear)]
    assert len(swapped) >= kept
    torch.testing.assert_close(outputs(deployed, tokens()), before, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_weights_are_refused(kind):
    """accelerate brings the weight of a base layer for the forward pass of that layer alone."""
    from accelerate import cpu_offload

    model = adapted(**KINDS[kind])
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="accelerate has offloaded the weights of the base"):
        outputs(model, tokens())
