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
"""Pruning, quantisation and structured pruning on the device against the same on the CPU in float64."""

import copy

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from support.devices import is_on, moved, reference
from support.masked_states import calibration_of
from support.models import outputs, randomize, tiny_gpt2, tiny_llama, tokens
from support.sparse_qa import pruned

from peft_elastic import (
    BlockPrunerConfig,
    GPTQConfig,
    MagnitudeConfig,
    MultiPrunerConfig,
    QuantizedLinear,
    RTNConfig,
    SparseGPTConfig,
    TwoStagePrunerConfig,
    WandaConfig,
    WidthPrunerConfig,
    load_gptq,
    merge_and_requantize,
    prune,
    prune_structured,
    quantize,
    save_gptq,
    sort_by_importance,
)
from peft_elastic.structure.modules import linear_layers, weight_matrix


BASES = {"llama": tiny_llama, "gpt2": tiny_gpt2}
CALIBRATION = [{"input_ids": tokens(8, 24, seed=s)} for s in range(3)]
INPUTS = {"input_ids": tokens(3, 9), "attention_mask": torch.ones(3, 9, dtype=torch.long)}


def matrices(model):
    return {name: weight_matrix(layer).detach().cpu().double() for name, layer in linear_layers(model).items()}


def calibration_on(device, where):
    """A batch on the host, as a DataLoader gives it, and one that has been brought to the device already."""
    return CALIBRATION if where == "host" else moved(CALIBRATION[0], device)


def share_of_differences(a, b):
    return sum(int((a[n] != b[n]).sum()) for n in a) / sum(each.numel() for each in a.values())


# -- unstructured ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["host", pytest.param("device", marks=pytest.mark.slow)])
@pytest.mark.parametrize("pattern", [{"sparsity": 0.5}, {"pattern": "2:4"}])
@pytest.mark.parametrize("method", [MagnitudeConfig, WandaConfig, SparseGPTConfig])
def test_pruning(method, pattern, where, base, device):
    if base == "gpt2" and where == "device":
        pytest.skip("as for Llama")
    model = BASES[base]()
    wanted = reference(model)
    model.to(device)
    config = method(**pattern)
    report = prune(model, config, calibration_on(device, where), progress=False)
    expected = prune(wanted, config, calibration_on("cpu", where), progress=False)
    assert is_on(device, model) and report.sparsity == pytest.approx(expected.sparsity, abs=1e-6)
    found, right = matrices(model), matrices(wanted)
    zeros = [{name: weight == 0 for name, weight in each.items()} for each in (found, right)]
    # two scores that differ in the last bit may change places
    assert share_of_differences(*zeros) <= (0 if method is MagnitudeConfig else 2e-3)
    if pattern.get("pattern"):
        for name, layer in found.items():
            if (layer == 0).any():
                assert ((layer.view(len(layer), -1, 4) == 0).sum(-1) >= 2).all(), name
    torch.testing.assert_close(
        outputs(model, moved(INPUTS, device)).cpu().double(), outputs(wanted, INPUTS), rtol=0, atol=0.02
    )


@pytest.mark.parametrize(
    "options",
    [
        {"act_order": True},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({}, {"clipping": "mse"}, {"symmetric": True})),
    ],
)
@pytest.mark.parametrize("method", [RTNConfig, GPTQConfig])
def test_quantization(method, options, device, tmp_path):
    if method is RTNConfig and "act_order" in options:
        pytest.skip("of GPTQ alone")
    model = pruned(tiny_llama())
    wanted = copy.deepcopy(model)
    plain = matrices(model)
    model.to(device)
    config = method(group_size=16, **options)
    report = quantize(model, config, CALIBRATION, progress=False)
    expected = quantize(wanted, config, CALIBRATION, progress=False)
    assert is_on(device, model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    found, right = ({n: m.get_submodule(n).integers().cpu() for n in layers} for m in (model, wanted))
    grids, right_grids = ({n: m.get_submodule(n).grid for n in layers} for m in (model, wanted))
    assert layers and share_of_differences(found, right) <= (1e-3 if method is RTNConfig else 0.02)
    for name, grid in grids.items():
        off = (grid.scales.cpu() != right_grids[name].scales).double().mean()
        assert off <= (0.01 if method is RTNConfig else 0.05)
    for row, other in zip(report.layers, expected.layers):
        assert row["name"] == other["name"]
        assert row["weight_error"] == pytest.approx(other["weight_error"], rel=0.02)
        if row.get("output_error") is not None:
            assert row["output_error"] == pytest.approx(other["output_error"], rel=0.02)
    # zeros stay zeros, and what is written is what computes, wherever it is read
    for name, integers in found.items():
        grid = right_grids[name]
        assert torch.equal(
            (plain[name] == 0) & (integers != grid._spread(grid.zeros)), torch.zeros_like(plain[name]).bool()
        )
    before = outputs(model, moved(INPUTS, device))
    save_gptq(model, tmp_path)
    loaded = load_gptq(tmp_path)
    assert is_on(torch.device("cpu"), loaded)
    torch.testing.assert_close(outputs(loaded, INPUTS), before.cpu(), rtol=1e-3, atol=1e-4)
    again = outputs(loaded.to(device), moved(INPUTS, device))
    torch.testing.assert_close(again, before, rtol=1e-4, atol=1e-5)
    for name in layers:
        assert torch.equal(loaded.get_submodule(name).integers().cpu(), found[name])


def test_rounding_again(device):
    results = []
    for place in ("cpu", device):
        model = tiny_llama().to(place)
        quantize(model, RTNConfig(group_size=16), progress=False)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        randomize(model, std=0.1)
        merged, report = merge_and_requantize(model)
        assert is_on(torch.device(place), merged)
        results.append((outputs(merged, moved(INPUTS, place)).cpu(), report.update_error))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-3)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-3)


# -- structured --------------------------------------------------------------------------------------------------------

EVERYTHING = {"stages": ("blocks", "sub-blocks", "channels", "heads"), "split": (25, 25, 40, 10), "mlp_group": 4}
STRUCTURED = {
    "multi": MultiPrunerConfig(ratio=0.4, **EVERYTHING),
    "multi, l1": MultiPrunerConfig(ratio=0.4, order="l1", **EVERYTHING),
    "blocks": BlockPrunerConfig(ratio=0.3),
    "width": WidthPrunerConfig(ratio=0.3, mlp_group=4),
    "two stages": TwoStagePrunerConfig(ratio=0.3, mlp_group=4),
}


@pytest.mark.parametrize(
    ("method", "base"),
    [
        ("multi", "llama"),
        *(pytest.param(method, "llama", marks=pytest.mark.slow) for method in STRUCTURED if method != "multi"),
        pytest.param("multi", "gpt2", marks=pytest.mark.slow),
    ],
)
def test_structured(method, base, device, tmp_path):
    model = BASES[base](**{"n_layer" if base == "gpt2" else "num_hidden_layers": 3})
    wanted, same_plan = reference(model), reference(model)
    narrowed = copy.deepcopy(model).to(device)
    model.to(device)
    calibration = calibration_of(base)
    plan = prune_structured(model, STRUCTURED[method], calibration, progress=False)
    expected = prune_structured(wanted, STRUCTURED[method], calibration, progress=False)
    assert is_on(device, model)
    # of two candidates that are worth the same to six digits either may go, and the rest follows from that
    assert plan.before["perplexity"] == pytest.approx(expected.before["perplexity"], rel=1e-4)
    assert plan.after["parameters"] == pytest.approx(expected.after["parameters"], rel=0.15)
    assert plan.after["perplexity"] == pytest.approx(expected.after["perplexity"], rel=0.1)
    assert plan.after["parameters"] == sum(p.numel() for p in model.parameters())
    found = outputs(model, moved(INPUTS, device))
    plan.narrow(same_plan)
    torch.testing.assert_close(found.cpu().double(), outputs(same_plan, INPUTS), rtol=0, atol=1e-4)
    # the plan does the same to another copy, and takes it back
    whole = outputs(narrowed, moved(INPUTS, device))
    plan.narrow(narrowed)
    assert is_on(device, narrowed)
    torch.testing.assert_close(outputs(narrowed, moved(INPUTS, device)), found, rtol=0, atol=1e-4)
    plan.restore(narrowed)
    torch.testing.assert_close(outputs(narrowed, moved(INPUTS, device)), whole, rtol=0, atol=1e-5)
    # and what is saved there is loaded anywhere
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(outputs(loaded, INPUTS), found.cpu(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("importance", ["activation", "magnitude", "gradient"])
def test_sorting(importance, device):
    model = tiny_llama()
    wanted = reference(model)
    model.to(device)
    before = outputs(model, moved(INPUTS, device))
    for each in (model, wanted):
        sort_by_importance(each, importance, *([] if importance == "magnitude" else [CALIBRATION]), progress=False)
    assert is_on(device, model)
    torch.testing.assert_close(outputs(model, moved(INPUTS, device)), before, rtol=0, atol=1e-4)
    for name, parameter in wanted.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).cpu().double(), parameter, rtol=0, atol=0)


CHANGES = {
    "Wanda": lambda model: prune(model, WandaConfig(sparsity=0.5), CALIBRATION, progress=False),
    "SparseGPT": lambda model: prune(model, SparseGPTConfig(sparsity=0.5), CALIBRATION, progress=False),
    "GPTQ": lambda model: quantize(model, GPTQConfig(group_size=16), CALIBRATION, progress=False),
    "sorting": lambda model: sort_by_importance(model, "activation", CALIBRATION, progress=False),
    "sorting by gradients": lambda model: sort_by_importance(model, "gradient", CALIBRATION, progress=False),
    "structured": lambda model: prune_structured(model, STRUCTURED["multi"], CALIBRATION, progress=False),
}


@pytest.mark.parametrize(
    "change", [pytest.param(key, marks=[] if key == "Wanda" else pytest.mark.slow) for key in CHANGES]
)
def test_a_model_on_two_devices(change, device, second):
    """Blocks on two devices, as `device_map` lays them out: what is done to each stays where it is."""
    places = {"model.embed_tokens": device, "model.rotary_emb": device, "model.layers.0": device}
    places |= {"model.layers.1": second, "model.layers.2": second, "model.norm": second, "lm_head": second}
    names = {name: str(place) for name, place in places.items()}
    wanted = tiny_llama(num_hidden_layers=3)
    model = dispatch_model(tiny_llama(num_hidden_layers=3), names, main_device=str(device), force_hooks=True)
    CHANGES[change](model)
    CHANGES[change](wanted)
    assert is_on(device, model.model.embed_tokens) and is_on(second, model.lm_head)
    for block in model.model.layers:  # structured pruning may have removed one
        assert is_on(device, block) or is_on(second, block)
    torch.testing.assert_close(outputs(model, moved(INPUTS, device)).cpu(), outputs(wanted, INPUTS), rtol=0, atol=0.02)
