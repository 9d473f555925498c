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
"""Merging adapters that are masked or quantisation-aware: zeros and integers stay, outputs too, and unmerging gives back the very
bits of the base."""

import copy
import io
import pickle

import pytest
import torch
import transformers
from peft import get_peft_model
from support.models import ARCHITECTURES, default_dtype, outputs, randomize, tiny_gpt2, tiny_llama, tokens
from support.sparse_qa import (
    ALL_KINDS,
    KINDS,
    QUANTIZED,
    TARGETS,
    adapted,
    adapted_architecture,
    base_weights,
    config,
    layers,
    pruned,
    quantized,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_elastic import ElasticLoraConfig
from peft_elastic.quantization import Grid, QuantizedLinear, fit_grid


pytestmark = pytest.mark.filterwarnings("ignore")

# Rounding in an earlier layer can push the input of a later one, never its integers.
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
}


@torch.no_grad()
def integers(model):
    """q of what the forward pass of each layer multiplies with, by path, read off its output for the unit matrix."""
    found = {}
    for name, layer in layers(model).items():
        adapters = [n for n in layer.active_adapters if n in layer.lora_A]
        bias, layer.get_base_layer().bias = layer.get_base_layer().bias, None
        eye = torch.eye(
            layer.in_features, dtype=torch.promote_types(torch.float32, layer.get_base_layer().weight.dtype)
        )
        if isinstance(layer.get_base_layer(), Conv1D):
            layer.get_base_layer().bias = nn.Parameter(torch.zeros(layer.out_features))
        grid = layer.lora_grid[adapters[0]]
        found[name.removeprefix("base_model.model.")] = q = grid.quantize(layer(eye).T)
        assert torch.equal(grid.dequantize(q, eye.dtype), layer(eye).T)
        layer.get_base_layer().bias = bias
    return found


def assert_zeros_are_kept(model, before, transposed=False):
    for path, weight in before.items():
        layer = model.get_submodule(path)
        after = layer.weight
        if transposed and type(layer) is QuantizedLinear:
            weight = weight.T
        assert 0.3 < weight.eq(0).float().mean() < 0.7
        assert after[weight == 0].eq(0).all(), path
        assert (after != weight).any(), path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [(architecture, torch.float32) for architecture in ("llama", "gpt2", "bert", "opt", "t5")]
    + [(architecture, dtype) for architecture in ("llama", "gpt2") for dtype in (torch.bfloat16, torch.float64)],
)
def test_the_merged_model_computes_the_same(architecture, dtype, kind):
    with default_dtype(torch.float64) if dtype == torch.float64 else torch.no_grad():
        model, inputs = adapted_architecture(architecture, **KINDS[kind])
    model = model.to(dtype)
    expected_type = nn.Linear if "quantised" not in kind else QuantizedLinear
    for subnet in ("max", "min"):
        model.set_subnet(subnet)
        each = copy.deepcopy(model)
        before, weights = outputs(each, inputs), base_weights(each)
        expected = integers(each) if "quantised" in kind else None
        merged = each.merge_and_unload(sparse_kernel=False)
        torch.testing.assert_close(outputs(merged, inputs), before, **TOLERANCE[dtype])
        if "sparse" in kind:
            assert_zeros_are_kept(merged, weights, transposed=architecture == "gpt2")
        for path in weights:
            layer = merged.get_submodule(path)
            assert type(layer) in (expected_type, Conv1D)
            if expected is not None:
                assert type(layer) is QuantizedLinear and torch.equal(layer.integers(), expected[path]), path


def test_merging_changes_the_output():
    """Otherwise the test above would show nothing."""
    results = []
    for kind in ALL_KINDS.values():
        model = adapted(**kind)
        for subnet in ("max", "min"):
            model.set_subnet(subnet)
            results.append(outputs(model, tokens()))
    with model.disable_adapter():
        results.append(outputs(model, tokens()))
    assert all((a - b).abs().max() > 1e-2 for i, a in enumerate(results) for b in results[:i])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("options", [{"group_size": -1}, {"group_size": 8, "symmetric": True, "clipping": "mse"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grids(bits, options, dtype):
    model = adapted(pruned(tiny_llama()).to(dtype), quantization_aware=True, bits=bits, **options)
    before, weights, expected = outputs(model, tokens()), base_weights(model), integers(model)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, tokens()), before, **TOLERANCE[dtype])
    model.unmerge_adapter()
    merged = model.merge_and_unload(sparse_kernel=False)
    torch.testing.assert_close(outputs(merged, tokens()), before, **TOLERANCE[dtype])
    assert_zeros_are_kept(merged, weights)
    for path, q in expected.items():
        layer = merged.get_submodule(path)
        assert torch.equal(layer.integers(), q) and layer.exact
        assert (layer.grid.bits, layer.grid.symmetric) == (bits, "symmetric" in options)
        assert q.unique().numel() > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_unmerging_gives_back_every_bit(kind, dtype):
    model = adapted(pruned(tiny_llama()).to(dtype), **ALL_KINDS[kind])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = outputs(model, tokens())
    merged = []
    for _ in range(2):
        model.merge_adapter()
        merged.append(outputs(model, tokens()))
        assert all(layer.merged for layer in layers(model).values())
        model.unmerge_adapter()
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(outputs(model, tokens()), before)
    assert torch.equal(*merged)
    torch.testing.assert_close(merged[0], before, **TOLERANCE[dtype])
    # disabling unmerges, as in peft
    model.merge_adapter()
    with model.disable_adapter():
        outputs(model, tokens())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_merge_adapter_and_then_unload(kind):
    expected = outputs(adapted(**KINDS[kind]).merge_and_unload(sparse_kernel=False), tokens())
    model = adapted(**KINDS[kind])
    model.merge_adapter()
    assert torch.equal(outputs(model.merge_and_unload(sparse_kernel=False), tokens()), expected)
    model = adapted(**KINDS[kind])
    base = {n: p.clone() for n, p in pruned(tiny_llama()).named_parameters()}
    unloaded = model.unload()
    assert all(torch.equal(p, base[n]) for n, p in unloaded.named_parameters())


def two_adapters(kind, **second):
    model = adapted(**KINDS[kind])
    model.add_adapter("other", config(**{**KINDS[kind], "target_modules": ["q_proj", "up_proj"], **second}))
    randomize(model, seed=7, adapter_name="other")
    model.base_model.set_adapter(["default", "other"])
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_two_adapters(kind):
    model = two_adapters(kind)
    before, weights = outputs(model, tokens()), base_weights(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    at_once = outputs(model, tokens())
    torch.testing.assert_close(at_once, before, **TOLERANCE[torch.float32])
    if "sparse" in kind:
        assert_zeros_are_kept(model.base_model.model, {f"{k}.base_layer": v for k, v in weights.items()})
    model.unmerge_adapter()
    for order in (["default", "other"], ["other", "default"]):
        for name in order:
            model.merge_adapter(adapter_names=[name])
        torch.testing.assert_close(outputs(model, tokens()), at_once, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    merged = model.merge_and_unload(sparse_kernel=False)
    torch.testing.assert_close(outputs(merged, tokens()), before, **TOLERANCE[torch.float32])


def test_masked_and_unmasked_adapters_together():
    model = two_adapters("sparse", sparse_adapter=False)
    before = outputs(model, tokens())
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, tokens()), before, **TOLERANCE[torch.float32])
    model.unmerge_adapter()
    merged = model.merge_and_unload(sparse_kernel=False)
    torch.testing.assert_close(outputs(merged, tokens()), before, **TOLERANCE[torch.float32])
    masked = {
        path: merged.get_submodule(path).weight.eq(0).float().mean() for path in base_weights(two_adapters("sparse"))
    }
    assert all((zeros > 0.3) == ("v_proj" in path or "down_proj" in path) for path, zeros in masked.items())


def test_one_of_two_adapters_is_merged():
    model = two_adapters("sparse and quantised", group_size=8)  # cannot be active together
    for name in ("default", "other"):
        model.set_adapter(name)
        before = outputs(model, tokens())
        model.merge_adapter()
        torch.testing.assert_close(outputs(model, tokens()), before, **TOLERANCE[torch.float32])
        model.unmerge_adapter()
    # named, not active
    expected = outputs(model, tokens())
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["other"], sparse_kernel=False)
    torch.testing.assert_close(outputs(merged, tokens()), expected, **TOLERANCE[torch.float32])


def test_adapters_that_cannot_be_merged_together_leave_the_model_as_it_was():
    """Of two layers only the second one has both."""
    model = two_adapters("sparse and quantised", group_size=8, target_modules=["v_proj"])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be active together: they round to different grids"):
        outputs(model, tokens())
    for merge in (
        lambda: model.merge_adapter(),
        lambda: model.merge_adapter(adapter_names=["default", "other"]),
        lambda: model.merge_and_unload(sparse_kernel=False),
    ):
        with pytest.raises(ValueError, match="cannot be active together: they round to different grids"):
            merge()
        assert not any(layer.merged for layer in layers(model).values())
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.set_adapter("default")
    model.merge_and_unload(sparse_kernel=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unload", [False, True])
def test_broken_weights_leave_the_model_as_it_was(kind, unload):
    """The last layer is the broken one, when all others could be merged already."""
    model = adapted(**KINDS[kind])
    list(layers(model).values())[-1].lora_A["default"].full_weight.data[0] = float("nan")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = list(model.modules())
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True, sparse_kernel=False) if unload else model.merge_adapter(
            safe_merge=True
        )
    assert not any(layer.merged for layer in layers(model).values())
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, equal_nan=True)
    model.merge_adapter()  # peft merges them if it is not asked to look


def test_a_broken_second_adapter_leaves_the_first_one_merged():
    model = two_adapters("sparse")
    for layer in layers(model).values():
        if "other" in layer.lora_A:
            layer.lora_A["other"].full_weight.data[0] = float("inf")
    model.merge_adapter(adapter_names=["default"])
    before = base_weights(model)
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(adapter_names=["other"], safe_merge=True)
    assert all(torch.equal(weight, before[path]) for path, weight in base_weights(model).items())
    assert all(layer.merged_adapters in ([], ["default"]) for layer in layers(model).values())
    model.unmerge_adapter()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_independent(kind, merged):
    model = adapted(**KINDS[kind])
    before, weights = outputs(model, tokens()), base_weights(model)
    if merged:
        model.merge_adapter()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        torch.testing.assert_close(outputs(other, tokens()), before, **TOLERANCE[torch.float32])
        if merged:
            other.unmerge_adapter()
        assert torch.equal(outputs(other, tokens()), before)
        assert all(torch.equal(weight, weights[path]) for path, weight in base_weights(other).items())
        for parameter in other.parameters():
            parameter.data.zero_()
    if merged:
        model.unmerge_adapter()
    assert torch.equal(outputs(model, tokens()), before)


def test_a_model_that_is_cast_while_it_is_merged():
    model = adapted()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    outputs(model, tokens())


# -- quantised bases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_adapters_on_a_quantised_base(kind):
    settings = {k: v for k, v in ALL_KINDS[kind].items() if k not in ("bits", "group_size")}
    base = quantized(pruned(tiny_llama()))
    rounded = {p: m.grid.round(m.weight.detach()) for p, m in base.named_modules() if isinstance(m, QuantizedLinear)}
    zeros = {p: m.weight.eq(0) for p, m in base.named_modules() if isinstance(m, QuantizedLinear)}
    plain = outputs(base, tokens())
    model = adapted(base, **settings)
    before = outputs(model, tokens())
    with model.disable_adapter():
        assert torch.equal(outputs(model, tokens()), plain)
    assert len(layers(model)) == 6
    # what each layer computes
    x = torch.randn(5, 32)
    for name, layer in layers(model).items():
        path = name.removeprefix("base_model.model.")
        base_layer = layer.get_base_layer()
        assert not zeros[path].all()
        delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        if settings.get("sparse_adapter", True):
            delta = delta * ~zeros[path]
        if "quantised" in kind:
            assert layer.lora_grid["default"].equals(base_layer.grid)
            expected = base_layer.grid.round(base_layer.weight.detach() + delta)
        else:
            expected = rounded[path] + delta
        x = torch.randn(5, layer.in_features)
        torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-4, atol=1e-4)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if "quantised" not in kind:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="is not quantisation-aware"):
                merge()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(outputs(model, tokens()), before)
        return
    expected = integers(model)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, tokens()), before, **TOLERANCE[torch.float32])
    model.unmerge_adapter()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    merged = model.merge_and_unload(sparse_kernel=False)
    torch.testing.assert_close(outputs(merged, tokens()), before, **TOLERANCE[torch.float32])
    for path, q in expected.items():
        assert torch.equal(merged.get_submodule(path).integers(), q)
        if settings.get("sparse_adapter", True):
            assert merged.get_submodule(path).weight[zeros[path]].eq(0).all()


def test_elastic_lora_on_a_quantised_base():
    base = quantized(pruned(tiny_llama()))
    plain = outputs(base, tokens())
    model = get_peft_model(base, ElasticLoraConfig(r=4, target_modules=TARGETS)).eval()
    assert torch.equal(outputs(model, tokens()), plain)
    randomize(model)
    for subnet in ("max", "min"):
        model.set_subnet(subnet)
        assert (outputs(model, tokens()) - plain).abs().max() > 1e-2
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="is not quantisation-aware"):
        model.merge_adapter()
    assert torch.equal(outputs(model.unload(), tokens()), plain)


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_adapter_with_another_grid_than_its_quantised_base(hook, training):
    """As when an adapter that was trained on the base in floating point is loaded on a quantised one."""
    base = pruned(nn.Sequential(nn.Linear(32, 24)))
    weight = base[0].weight.detach().clone()
    own, other = fit_grid(weight, 4, 16), fit_grid(weight * 1.3, 4, 16)
    base[0] = QuantizedLinear.from_linear(base[0], own)
    model = adapted(base, target_modules=["0"], quantization_aware=True, lora_dropout=1e-9 if training else 0.0)
    (layer,) = layers(model).values()
    layer.lora_grid["default"] = Grid.copy_of(other, persistent=True)
    if hook:
        layer.get_base_layer().register_forward_hook(lambda module, args, output: None)
    model.train(training)
    delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    effective = other.round(weight + delta.detach() * (weight != 0))
    x = torch.randn(7, 32)
    expected = nn.functional.linear(x, effective, layer.get_base_layer().bias)
    torch.testing.assert_close(outputs(model, x), expected)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, x), expected)
    model.unmerge_adapter()
    assert layer.get_base_layer().grid is own and torch.equal(layer.get_base_layer().weight, weight)
    merged = model.merge_and_unload(sparse_kernel=False)
    torch.testing.assert_close(outputs(merged, x), expected)
    assert torch.equal(merged[0].integers(), other.quantize(effective))


def test_act_order():
    """Groups in any order of the inputs, as in GPTQ checkpoints."""
    base = pruned(nn.Sequential(nn.Linear(32, 24)))
    weight = base[0].weight.detach().clone()
    scales = fit_grid(weight, 4, 8).scales * (1 + torch.rand(24, 4))
    g_idx = torch.randperm(32) // 8
    grid = Grid(scales, torch.randint(0, 16, (24, 4)), in_features=32, bits=4, g_idx=g_idx)
    base[0] = QuantizedLinear.from_linear(base[0], grid)
    model = adapted(base, target_modules=["0"], quantization_aware=True)
    x = torch.randn(7, 32)
    before, expected = outputs(model, x), integers(model)["0"]
    merged = model.merge_and_unload(sparse_kernel=False)
    torch.testing.assert_close(outputs(merged, x), before)
    assert torch.equal(merged[0].integers(), expected) and torch.equal(merged[0].grid.g_idx.long(), g_idx)
    steps = merged[0].integers().float() - grid.zeros[:, g_idx]
    torch.testing.assert_close(merged[0].weight, steps * grid.scales.float()[:, g_idx])
    assert merged[0].weight[weight == 0].eq(0).all()


# -- layers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (16, 16)], ids=str)
def test_small_conv1d(kind, shape):
    n_in, n_out = shape
    settings = KINDS[kind] | ({"group_size": -1} if "quantised" in kind else {})
    base = nn.Sequential(Conv1D(n_out, n_in))
    nn.init.normal_(base[0].weight)
    model = adapted(pruned(base, 0.2), target_modules=["0"], **settings)
    x = torch.randn(3, n_in)
    before = outputs(model, x)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model, x), before)
    model.unmerge_adapter()
    assert torch.equal(outputs(model, x), before)
    torch.testing.assert_close(outputs(model.merge_and_unload(sparse_kernel=False), x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_delta_weights(kind):
    """What peft calls the delta weight, merged or not."""
    model = adapted(pruned(tiny_gpt2()), target_modules=["c_attn"], **KINDS[kind])
    deltas = [layer.get_delta_weight("default") for layer in layers(model).values()]
    before = [layer.get_base_layer().weight.detach().clone() for layer in layers(model).values()]
    model.merge_adapter()
    for layer, delta, weight in zip(layers(model).values(), deltas, before):
        torch.testing.assert_close(layer.get_base_layer().weight - weight, delta)
        torch.testing.assert_close(layer.get_delta_weight("default"), delta)


def test_no_buffer_or_parameter_is_as_large_as_the_weight():
    for settings in (*ALL_KINDS.values(), {**QUANTIZED, "bits": 8}):
        model = adapted(pruned(tiny_llama(hidden_size=64, intermediate_size=128)), **settings)
        for layer in layers(model).values():
            size = layer.get_base_layer().weight.numel()
            tensors = {n: t for n, t in [*layer.named_parameters(), *layer.named_buffers()] if "base_layer" not in n}
            assert tensors and all(tensor.numel() <= size / 8 for tensor in tensors.values())
            assert not any(isinstance(value, torch.Tensor) for value in vars(layer).values())


def test_all_architectures_have_adapters_of_this_kind():
    for name in ARCHITECTURES:
        model, inputs = adapted_architecture(name)
        assert len(layers(model)) == sum(ARCHITECTURES[name].modules.values())
        before = outputs(model, inputs)
        merged = model.merge_and_unload(sparse_kernel=False)
        torch.testing.assert_close(outputs(merged, inputs), before, rtol=1e-4, atol=1e-4)


# -- bitsandbytes --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bitsandbytes_llama(tmp_path_factory):
    """A function that loads a pruned model in 4 or 8 bits."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("bitsandbytes")
    pruned(tiny_llama(hidden_size=64, intermediate_size=128)).save_pretrained(folder)

    def load(bits):
        options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
        quantization = transformers.BitsAndBytesConfig(**options)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, device_map="cpu"
        ).eval()

    return load


def dense(layer):
    """The weight that a layer of bitsandbytes multiplies with, read off its output for the unit matrix."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)).T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["sparse", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 1e-9])
def test_bitsandbytes(bitsandbytes_llama, bits, kind, dropout):
    plain = bitsandbytes_llama(bits)
    weights = {n: dense(m) for n, m in plain.named_modules() if n.endswith(("q_proj", "v_proj", "down_proj"))}
    before = outputs(plain, tokens())
    model = adapted(bitsandbytes_llama(bits), lora_dropout=dropout, **ALL_KINDS[kind])
    tolerance = {"rtol": 0.03, "atol": 0.03}  # 8-bit layers round their inputs too
    assert len(layers(model)) == len(weights) == 6
    for path, weight in weights.items():
        layer = layers(model)[f"base_model.model.{path}"]
        delta = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        if kind == "sparse":
            assert 0.3 < weight.eq(0).float().mean() < 0.7
            delta = delta * (weight != 0)
        found = dense(layer)
        torch.testing.assert_close(found, weight + delta.detach(), **tolerance)
        if kind == "sparse":
            assert found[weight == 0].abs().max() < 1e-5
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model, tokens()), before)
    unmerged = outputs(model, tokens())
    # a fresh one, whose scales no evaluation has rounded
    fresh = adapted(bitsandbytes_llama(bits), lora_dropout=dropout, **ALL_KINDS[kind]).train()
    fresh(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in fresh.parameters() if p.requires_grad)
    torch.testing.assert_close(outputs(fresh.eval(), tokens()), unmerged)
    # merging rounds again, which bitsandbytes does in its own way; unmerging gives back every bit
    for _ in range(2):
        model.merge_adapter()
        merged = outputs(model, tokens())
        assert (merged - unmerged).norm() < 0.5 * (unmerged - before).norm()
        model.unmerge_adapter()
        assert torch.equal(outputs(model, tokens()), unmerged)
    unloaded = model.merge_and_unload(sparse_kernel=False)
    torch.testing.assert_close(outputs(unloaded, tokens()), merged)
    if kind == "sparse":
        for path, weight in weights.items():
            assert dense(unloaded.get_submodule(path))[weight == 0].abs().max() < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_two_adapters_are_merged_into_bitsandbytes(bitsandbytes_llama, bits):
    model = adapted(bitsandbytes_llama(bits))
    model.add_adapter("other", config())
    randomize(model, seed=7, adapter_name="other")
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    before = outputs(model, tokens())
    model.merge_adapter()
    at_once = outputs(model, tokens())
    model.unmerge_adapter()
    assert torch.equal(outputs(model, tokens()), before)
    for name in ("default", "other"):
        model.merge_adapter(adapter_names=[name])
    torch.testing.assert_close(outputs(model, tokens()), at_once)
    deltas = [layer.get_delta_weight("default") for layer in layers(model).values()]
    model.unmerge_adapter()
    assert torch.equal(outputs(model, tokens()), before)
    for layer, delta in zip(layers(model).values(), deltas):
        torch.testing.assert_close(layer.get_delta_weight("default"), delta)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_to_a_grid_on_bitsandbytes_is_refused(bitsandbytes_llama, bits):
    model = bitsandbytes_llama(bits)
    with pytest.raises(
        ValueError, match="is quantised by bitsandbytes, whose values are no grid of scales and zero points"
    ):
        get_peft_model(model, config(**QUANTIZED))
    assert not layers(model)
