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
"""int4 with group scales and zeros: kernels, format, layer, checkpoint and swap, against float64 and the integers themselves."""

import copy
import io
import json
import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import fresh
from support.models import tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from peft_elastic import SparseLinear, densify_linears, optimize_generation, sparsify_linears
from peft_elastic.layers import extension


if not extension.is_built():
    pytest.skip("the C++ extension is not built", allow_module_level=True)

from peft_elastic.cost import timing
from peft_elastic.layers import ops
from peft_elastic.layers.values import FORMATS, Sizes


USABLE = [level["name"] for level in extension.levels() if level["usable"]]
# Activations are rounded to 24 bits of the largest one in their group.
COARSE = 2.0**-23


@pytest.fixture(autouse=True)
def restore():
    threads, level = torch.get_num_threads(), extension.selected_level()
    yield
    torch.set_num_threads(threads)
    extension.select_level(level)


def make(out_features, in_features, group_size, sparsity=0.5, scattered=False, seed=0):
    """What `from_quantized` takes, and the weight in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_size)
    q = torch.randint(0, 16, (out_features, in_features), generator=generator)
    zeros = torch.randint(0, 16, (out_features, groups), generator=generator)
    scales = torch.randn(out_features, groups, generator=generator)
    g_idx = torch.arange(in_features) // group_size
    if scattered:
        g_idx = g_idx[torch.randperm(in_features, generator=generator)]
    pruned = torch.rand(out_features, in_features, generator=generator) < sparsity
    q = torch.where(pruned, zeros[:, g_idx], q)
    grid = {"q": q, "scales": scales, "zeros": zeros, "g_idx": g_idx, "group_size": group_size}
    return grid, scales[:, g_idx].double() * (q - zeros[:, g_idx])


def bound(x, weight, g_idx):
    """By how much float32 may be off."""
    size = 3e-6 * (x.double().abs() @ weight.abs().T)
    for group in range(int(g_idx.max()) + 1):
        members = g_idx == group
        size += COARSE * x[:, members].double().abs().amax(1)[:, None] * weight[:, members].abs().sum(1)
    return size


def check(x, y, weight, g_idx, bias=None):
    expected = x.double() @ weight.T + (0 if bias is None else bias.double())
    allowed = bound(x, weight, g_idx) + 1e-30
    if x.dtype != torch.float32:
        allowed = allowed + {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[x.dtype] * (expected.abs() + 1e-4)
    if bias is not None:
        allowed = allowed + 3e-7 * bias.double().abs()
    assert y.dtype == x.dtype and ((y.double() - expected).abs() <= allowed).all()


shapes = st.tuples(st.integers(1, 50), st.integers(1, 280))
group_sizes = st.sampled_from([4, 12, 32, 64, 128, 512])


@pytest.mark.parametrize("level", USABLE)
@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    group_size=group_sizes,
    sparsity=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    sparse=st.booleans(),
    scattered=st.booleans(),
    rows=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    with_bias=st.booleans(),
    threads=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_product(level, shape, group_size, sparsity, sparse, scattered, rows, dtype, with_bias, threads, seed):
    extension.select_level(level)
    torch.set_num_threads(threads)
    grid, weight = make(*shape, group_size, sparsity, scattered, seed)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if with_bias else None
    layer = SparseLinear.from_quantized(**grid, bias=bias, sparse=sparse)
    x = torch.randn(rows, shape[1], generator=generator).to(dtype)
    check(x, layer(x), weight, grid["g_idx"], bias)


@pytest.mark.parametrize("level", USABLE)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 32, 33, 70])
def test_batches_of_a_wide_layer(level, sparse, rows, monkeypatch):
    monkeypatch.setattr(ops, "DENSE_ROWS", 64)
    extension.select_level(level)
    grid, weight = make(40, 1536, 128, scattered=True)
    x = torch.randn(rows, 1536, generator=torch.Generator().manual_seed(rows))
    y = SparseLinear.from_quantized(**grid, sparse=sparse)(x)
    check(x, y, weight, grid["g_idx"])


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_levels_agree(sparse, sparsity):
    grid, weight = make(50, 300, 64, sparsity)
    layer = SparseLinear.from_quantized(**grid, sparse=sparse)
    for rows in (1, 5):
        x = torch.randn(rows, 300, generator=torch.Generator().manual_seed(rows))
        results = []
        for level in USABLE:
            extension.select_level(level)
            results.append(layer(x))
        allowed = 2 * bound(x, weight, grid["g_idx"])
        assert all(((result - results[-1]).double().abs() <= allowed).all() for result in results)


@pytest.mark.parametrize("level", USABLE)
@pytest.mark.parametrize("sparse", [True, False])
def test_special_inputs(level, sparse):
    extension.select_level(level)
    grid, weight = make(20, 70, 32)
    layer = SparseLinear.from_quantized(**grid, sparse=sparse)
    x = torch.randn(3, 70)
    x[0] = 0
    x[1, :32] = 1e-35
    assert not layer(x)[0].any() and layer(x).isfinite().all()
    for value in (float("nan"), float("inf")):
        x[1, 5] = value
        y = layer(x)
        assert y[1].isnan().any() and not y[0].any() and y[2].isfinite().all()
    big = torch.full((1, 70), 1e30)
    check(big, layer(big), weight, grid["g_idx"])


def test_same_bits_with_any_number_of_threads():
    grid, _ = make(300, 257, 32)
    layer, x, results = SparseLinear.from_quantized(**grid), torch.randn(5, 257), []
    for threads in range(1, 6):
        torch.set_num_threads(threads)
        results.append(layer(x))
    assert all(torch.equal(result, results[0]) for result in results)


@settings(max_examples=100, deadline=None)
@given(shapes, group_sizes, st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_nothing_is_lost(shape, group_size, sparsity, sparse, scattered, seed):
    grid, weight = make(*shape, group_size, sparsity, scattered, seed)
    layer = SparseLinear.from_quantized(**grid, sparse=sparse)
    nnz = int((weight != 0).sum())
    assert (layer.nnz, layer.group_size, layer.has_bitmask) == (nnz, group_size, sparse)
    tensors = layer.stored_tensors()
    sizes = Sizes(*shape, nnz, group_size, sparse)
    FORMATS["int4"].verify("layer", tensors, sizes)
    assert layer.sizes == sizes and torch.equal(FORMATS["int4"].pack(tensors, sizes)[0], layer.packed)
    assert torch.equal(layer.to_linear().weight, weight.float())
    assert torch.equal(FORMATS["int4"].decompress(tensors, sizes), weight.float())
    back = layer.to_quantized()
    assert all(torch.equal(back[key].to(grid[key].dtype), grid[key]) for key in ("q", "scales", "zeros"))
    natural = torch.equal(grid["g_idx"], torch.arange(shape[1]) // group_size)
    assert back["g_idx"] is None if natural else torch.equal(back["g_idx"].long(), grid["g_idx"])
    assert torch.equal(SparseLinear.from_quantized(**back, sparse=sparse).packed, layer.packed)


def test_form_on_disk():
    q = torch.tensor([[3, 8, 15, 0, 8], [1, 1, 1, 2, 1]])
    zeros, scales = torch.tensor([[8, 8], [1, 1]]), torch.tensor([[0.5, 2.0], [1.0, 0.1]])
    tensors = FORMATS["int4"].compress(q, scales, zeros, None, 4, sparse=True)
    assert tensors["weight_bitmask"].tolist() == [[0b01101], [0b01000]]
    assert tensors["weight_values"].tolist() == [0xF3, 0x20] and tensors["weight_scales"].dtype == torch.float32
    assert "weight_g_idx" not in tensors
    tensors = FORMATS["int4"].compress(q, scales.round(), zeros, torch.tensor([0, 0, 1, 0, 0]), 4, sparse=False)
    assert tensors["weight_values"].tolist() == [0x83, 0x0F, 0x18, 0x11, 0x12] and "weight_bitmask" not in tensors
    assert tensors["weight_scales"].dtype == torch.float16 and tensors["weight_g_idx"].tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "`group_size` must be a whole number"),
        ({"group_size": 6}, "`group_size` must be a multiple of 4, .* got 6"),
        ({"group_size": 16}, "`scales` must be"),
        ({"q": torch.full((3, 20), 16)}, "`q` must be 0 to 15, got values from 16 to 16"),
        ({"q": torch.zeros(3, 20)}, "`q` must be whole numbers .* got torch.float32"),
        ({"zeros": torch.full((3, 3), -1)}, "`zeros` must be 0 to 15, got values from -1"),
        ({"zeros": torch.zeros(3, 2, dtype=torch.int64)}, "`zeros` must be"),
        ({"scales": torch.full((3, 3), float("nan"))}, "`scales` must be finite"),
        ({"g_idx": torch.zeros(20, dtype=torch.int64)}, "`g_idx` does not put 8 of the 20 columns"),
        ({"g_idx": torch.zeros(19, dtype=torch.int64)}, "`g_idx` must be whole numbers"),
        ({"bias": torch.zeros(4)}, "`bias` must be"),
        ({"linear_dtype": torch.int8}, "`linear_dtype` must be"),
    ],
)
def test_refuses(change, message):
    grid, _ = make(3, 20, 8)
    with pytest.raises(ValueError, match=message):
        SparseLinear.from_quantized(**(grid | change))


def test_only_int4_layers_have_integers():
    with pytest.raises(ValueError, match="bf16 values"):
        SparseLinear.from_linear(nn.Linear(4, 4)).to_quantized()


def first(key, value):
    def change(tensors):
        tensors[key].view(-1)[0] = value

    return change


def shorter(key):
    def change(tensors):
        tensors[key] = tensors[key][:-1].clone()

    return change


DAMAGE = {
    "values cut": (shorter("weight_values"), "weight_values"),
    "values missing": (lambda t: t.pop("weight_values"), "weight_values"),
    "a value is its zero": (lambda t: t["weight_zeros"].fill_(int(t["weight_values"][0]) & 15), "weight_values"),
    "a nibble too many": (lambda t: t["weight_values"].view(-1)[-1:].fill_(0xFF), "weight_values"),
    "a bit more": (lambda t: t["weight_bitmask"][0].fill_(0xFF), "weight_"),
    "a stray bit": (lambda t: t["weight_bitmask"][:, -1].fill_(0x80), "weight_bitmask"),
    "bitmask of another type": (
        lambda t: t.update(weight_bitmask=t["weight_bitmask"].to(torch.int8)),
        "weight_bitmask",
    ),
    "bitmask missing": (lambda t: t.pop("weight_bitmask"), "weight_bitmask"),
    "a scale is NaN": (first("weight_scales", float("nan")), "weight_scales"),
    "scales cut": (shorter("weight_scales"), "weight_scales"),
    "scales as float64": (lambda t: t.update(weight_scales=t["weight_scales"].double()), "weight_scales"),
    "a zero is 16": (first("weight_zeros", 16), "weight_zeros"),
    "zeros missing": (lambda t: t.pop("weight_zeros"), "weight_zeros"),
    "a group too large": (first("weight_g_idx", 2), "weight_g_idx"),
    "a group of nowhere": (first("weight_g_idx", -1), "weight_g_idx"),
    "g_idx cut": (shorter("weight_g_idx"), "weight_g_idx"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_state_names_the_tensor_and_changes_nothing(name):
    change, key = DAMAGE[name]
    # 7 x 13 weights, of which an odd number is stored
    grid, _ = next(
        pair for pair in (make(7, 13, 8, seed=seed, scattered=True) for seed in range(99)) if (pair[1] != 0).sum() % 2
    )
    layer = nn.Sequential(SparseLinear.from_quantized(**grid))
    x = torch.randn(2, 13)
    before = layer(x)
    tensors = {name: tensor.clone() for name, tensor in layer[0].stored_tensors().items()}
    change(tensors)
    with pytest.raises(RuntimeError, match=f"0.{key}"):
        layer.load_state_dict({f"0.{name}": tensor for name, tensor in tensors.items()})
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("sparse", [True, False])
def test_state_dict_copies_casts_and_gradients(sparse):
    grid, weight = make(20, 70, 32, scattered=True)
    layer = SparseLinear.from_quantized(**grid, bias=torch.randn(20), sparse=sparse, linear_dtype=torch.bfloat16)
    other = SparseLinear.from_quantized(**make(20, 70, 32, seed=1)[0], bias=torch.randn(20), sparse=sparse)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 70)
    assert torch.equal(other(x), layer(x)) and torch.equal(other.packed, layer.packed)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    dense = layer.to_linear()
    assert dense.weight.dtype == torch.bfloat16 and torch.equal(dense.weight, weight.float().bfloat16())
    text = repr(layer)
    assert "int4" + " dense" * (not sparse) + ", group_size=32" in text
    x.requires_grad_()
    seed = torch.randn(3, 20)
    layer(x).backward(seed)
    torch.testing.assert_close(x.grad, (seed.double() @ weight).float(), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    torch.library.opcheck(
        torch.ops.peft_elastic.sparse_linear.default,
        (x.detach().requires_grad_(), layer.packed, None, layer.bias.data, 20),
    )


def test_scales_belong_to_the_packed_weight():
    layer = SparseLinear.from_quantized(**make(8, 16, 8)[0])
    with pytest.raises(ValueError, match="scales go with"):
        ops.sparse_linear(torch.randn(1, 16), layer.packed, torch.ones(8), None, 8)
    with pytest.raises(ValueError, match="`activations`"):
        ops.sparse_linear(torch.randn(1, 16), layer.packed, None, None, 8, "int8")


# -- models ----------------------------------------------------------------------------------------------------------


class Quantized(nn.Linear):
    """A linear layer as a quantizer leaves it: a grid, and the dense weight on it."""

    bits = 4

    def quantized(self):
        return self.grid | {"bits": self.bits}

    @classmethod
    def make(cls, linear, group_size=8, sparsity=0.5, scattered=False, seed=0):
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None)
        layer.grid, _ = make(*linear.weight.shape, group_size, sparsity, scattered, seed)
        layer.grid["scales"] = (0.01 * layer.grid["scales"]).half().float()
        dense = layer.grid["scales"][:, layer.grid["g_idx"]] * (
            layer.grid["q"] - layer.grid["zeros"][:, layer.grid["g_idx"]]
        )
        layer.weight = nn.Parameter(dense)
        return layer.eval()


def quantized_llama(**arguments):
    model = tiny_llama()
    for seed, (name, module) in enumerate(list(model.named_modules())):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, Quantized.make(module, seed=seed, **arguments))
    return model


def ids():
    return torch.arange(1, 7)[None]


def int4_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


@pytest.mark.parametrize("sparsity", [0.5, 0.1])
def test_swap_keeps_the_integers(sparsity):
    model = quantized_llama(sparsity=sparsity, scattered=True)
    grids = {name: module.grid for name, module in model.named_modules() if isinstance(module, Quantized)}
    expected = model(ids()).logits
    report = sparsify_linears(model, when="always")
    layers = int4_layers(model)
    assert set(report.swapped) == set(layers) == set(grids)
    kind = "int4" if sparsity == 0.5 else "int4 dense"
    assert {d.values for d in report.decisions if d.swapped} == {kind} and f"are sparse ({kind})" in str(report)
    for name, layer in layers.items():
        assert torch.equal(layer.to_quantized()["q"].long(), grids[name]["q"]) and layer.has_bitmask == (
            sparsity == 0.5
        )
    torch.testing.assert_close(model(ids()).logits, expected, atol=2e-5, rtol=1e-5)
    densify_linears(model)
    torch.testing.assert_close(model(ids()).logits, expected, atol=2e-5, rtol=1e-5)


def test_swap_measures_sparse_and_dense(monkeypatch):
    asked = []

    def measure(outs, ins, sparsity, values, dtype, group_size):
        asked.append((values, group_size))
        return timing.Timing(3.0, {"int4": 2.0, "int4 dense": 1.0}[values])

    monkeypatch.setattr(timing, "measure", measure)
    report = sparsify_linears(quantized_llama())
    assert {d.values for d in report.decisions if d.swapped} == {"int4 dense"} and set(asked) == {
        ("int4", 8),
        ("int4 dense", 8),
    }
    assert {d.reason for d in report.decisions if d.swapped} == {"3.00 times as fast as dense"}
    monkeypatch.setattr(timing, "measure", lambda *args: timing.Timing(1.0, 1.0))
    assert not sparsify_linears(quantized_llama()).swapped


def test_swap_leaves_what_is_no_int4():
    model = nn.ModuleDict(
        {"eight": Quantized.make(nn.Linear(16, 8)), "odd": Quantized.make(nn.Linear(16, 8), group_size=6)}
    )
    model["eight"].bits = 8
    report = sparsify_linears(model, when="always")
    reasons = {decision.name: decision.reason for decision in report.decisions}
    assert reasons["eight"] == "quantized to 8 bits; the kernels take 4 and fewer"
    assert reasons["odd"].startswith("no int4: `group_size` must be a multiple of 4") and not report.swapped


def test_timing(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "timings_file", lambda: tmp_path / "timings.json")
    monkeypatch.setattr(timing, "_known", None)
    monkeypatch.setattr(timing, "_SECONDS", 0.01)
    monkeypatch.setattr(timing, "_MAX_COPIES_BYTES", 2**20)
    for values in ("int4", "int4 dense"):
        assert min(timing.measure(96, 72, 0.5, values, torch.float32, 32)) > 0


FRESH = """
import sys, torch, peft_elastic
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save([model(torch.arange(1, 7)[None]).logits, [type(m).__name__ for m in model.modules()].count("SparseLinear")], sys.argv[2])
"""


@pytest.mark.parametrize("sparsity", [0.5, 0.0])
def test_a_fresh_process_gives_the_same_bits(tmp_path, sparsity):
    model = quantized_llama(scattered=True, sparsity=sparsity)
    sparsify_linears(model, when="always")
    model.save_pretrained(tmp_path / "model")
    results = {}
    for name, prologue in (("same", ""), ("dense", "import sys; sys.modules['peft_elastic._C'] = None\n")):
        fresh.run(
            [sys.executable, "-c", prologue + FRESH, str(tmp_path / "model"), str(tmp_path / name)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
        results[name] = torch.load(tmp_path / name)
    with torch.no_grad():
        expected = model(ids()).logits
    assert torch.equal(results["same"][0], expected) and results["same"][1] == len(int4_layers(model))
    torch.testing.assert_close(results["dense"][0], expected, atol=2e-5, rtol=1e-4)
    assert results["dense"][1] == 0


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("group_size", 4, "weight_scales must be"),
        ("group_size", 0, "group_size must be .* got 0"),
        ("group_size", "8", "group_size must be .* got '8'"),
        ("sparse", False, "weight_bitmask"),
        ("sparse", 1, "sparse must be .* got 1"),
        ("scale_dtype", "int8", "scale_dtype must be .* got 'int8'"),
        ("scale_dtype", "float32", "weight_scales"),
        ("value_dtype", "int8", "must have"),
        ("nnz", 3, "weight_bitmask has"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path, key, value, match):
    model = quantized_llama()
    sparsify_linears(model, when="always")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers["model.layers.1.mlp.up_proj"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "model.layers.1.mlp.up_proj" in str(error.value)


@pytest.mark.parametrize("sparsity", [0.5, 0.0])
def test_generation_in_one_call(sparsity):
    model = quantized_llama(scattered=True, sparsity=sparsity)
    sparsify_linears(model, when="always")
    expected = model.generate(ids(), max_new_tokens=8, do_sample=False)
    optimize_generation(model)
    assert torch.equal(model.generate(ids(), max_new_tokens=8, do_sample=False), expected)
    assert model.model.forward.layers.fused is not None  # C++, not torch
