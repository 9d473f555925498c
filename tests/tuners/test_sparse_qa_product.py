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
"""The product with a masked or quantised effective weight: against autograd on the formulas of the paper, kernel against torch,
and what is kept for the backward pass."""

import itertools

import pytest
import torch
from torch import nn

from peft_elastic.layers import extension
from peft_elastic.quantization import Grid, fit_grid
from peft_elastic.tuners.sparse_qa_lora import devices
from peft_elastic.tuners.sparse_qa_lora import effective_weight as module
from peft_elastic.tuners.sparse_qa_lora.effective_weight import effective_linear, effective_weight


GRIDS = {
    "none": None,
    "2 bits": {"bits": 2, "group_size": -1},
    "4 bits": {"bits": 4, "group_size": 1},
    "4 bits symmetric": {"bits": 4, "group_size": -1, "symmetric": True},
    "8 bits": {"bits": 8, "group_size": -1},
    "act-order": {"bits": 4, "group_size": -1, "act_order": True},
}
SHAPES = [(1, 1), (1, 7), (5, 1), (3, 5), (17, 33), (37, 24)]  # (out, in)


def random_grid(weight, bits, group_size, symmetric=False, act_order=False):
    """A grid that clips a part of the weights."""
    grid = fit_grid(weight.double() * 0.7, bits, group_size, symmetric)
    if not act_order:
        return grid
    out_features, in_features = weight.shape
    groups = min(3, in_features)
    scales = grid.scales.double() * (1 + torch.rand(out_features, groups, dtype=torch.float64))
    g_idx = torch.randperm(in_features) % groups
    g_idx[: min(in_features, groups)] = torch.arange(groups).flip(0)
    zeros = torch.randint(0, 2**bits, scales.shape)
    return Grid(scales, zeros, in_features=in_features, bits=bits, g_idx=g_idx)


def problem(shape=(17, 33), rank=3, grid=None, dtype=torch.float64, sparsity=0.5, batch=(4,), std=0.3):
    """(x, weight, bias, B, A, grid), with whole rows and columns of zeros among the rest."""
    out_features, in_features = shape
    weight = torch.randn(shape, dtype=torch.float64)
    weight *= torch.rand(shape) >= sparsity
    weight = weight.to(dtype)
    grid = None if grid is None else random_grid(weight, **grid)
    x = torch.randn(*batch, in_features, dtype=dtype)
    bias = torch.randn(out_features, dtype=dtype)
    factors = torch.float64 if dtype == torch.float64 else torch.float32
    lora_B = std * torch.randn(out_features, rank, dtype=factors)
    lora_A = torch.randn(rank, in_features, dtype=factors)
    for tensor in (x, bias, lora_B, lora_A):
        tensor.requires_grad_()
    return x, weight, bias, lora_B, lora_A, grid


def naive_weight(weight, lora_B, lora_A, masked, grid):
    """W + D * M, and its rounding with a straight-through estimator, as METHODS has them; in plain autograd."""
    total = weight + lora_B @ lora_A * (weight != 0) if masked else weight + lora_B @ lora_A
    if grid is None:
        return total
    scales = grid.scales.to(total.dtype)[:, grid.g_idx.long()]
    zeros = grid.zeros.to(total.dtype)[:, grid.g_idx.long()]
    ratio = total / scales
    rounded = ratio + (torch.round(ratio) - ratio).detach()
    return scales * (torch.clamp(rounded + zeros, 0, 2**grid.bits - 1) - zeros)


def naive_linear(x, weight, bias, lora_B, lora_A, masked, grid, minus=None):
    effective = naive_weight(weight, lora_B, lora_A, masked, grid)
    if minus == "weight":
        effective = effective - weight
    elif minus is not None:
        effective = effective - naive_weight(weight, torch.zeros_like(lora_B), lora_A, masked, minus)
    return nn.functional.linear(x, effective, bias)


def gradients(function, x, weight, bias, lora_B, lora_A, *options):
    inputs = [t for t in (x, bias, lora_B, lora_A) if t is not None]
    output = function(x, weight, bias, lora_B, lora_A, *options)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    return [output, *torch.autograd.grad(output, inputs, grad_output)]


def assert_all_close(found, expected, **tolerance):
    for name, a, b in zip(("output", "x", "bias", "B", "A"), found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def panel_memory():
    """Sets the megabytes of a layer, and puts back what was."""
    before = devices.set_panel_memory(None)
    yield devices.set_panel_memory
    devices.set_panel_memory(before)


@pytest.fixture(params=["one panel", "panels", "at once", "panels at once"])
def panels(request, monkeypatch, panel_memory):
    """As on a CPU and as on a GPU; and with many small panels (of small blocks): 16 rows are the least."""
    if request.param == "panels":
        monkeypatch.setattr(devices, "CPU_PANEL_ELEMENTS", 5)
        monkeypatch.setattr(devices, "CPU_BLOCK_ELEMENTS", 5)
    elif request.param != "one panel":
        panel_memory(1000 if request.param == "at once" else 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
def test_outputs_and_gradients_are_those_of_the_formula(shape, grid, masked, panels):
    x, weight, bias, lora_B, lora_A, grid = problem(shape, grid=GRIDS[grid])
    for with_bias in (bias, None):
        arguments = (x, weight, with_bias, lora_B, lora_A, masked, grid)
        found, expected = gradients(effective_linear, *arguments), gradients(naive_linear, *arguments)
        if with_bias is None:
            found.insert(2, None), expected.insert(2, None)
        assert_all_close(found, expected, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        expected = naive_weight(weight, lora_B, lora_A, masked, grid)
        torch.testing.assert_close(effective_weight(weight, lora_B, lora_A, masked, grid), expected)


def test_the_clamp_and_the_mask_matter_in_these_problems():
    """Otherwise the comparison above would show nothing."""
    for name, options in GRIDS.items():
        x, weight, bias, lora_B, lora_A, grid = problem(grid=options)
        plain = gradients(naive_linear, x, weight, bias, lora_B, lora_A, False, None)
        masked = gradients(naive_linear, x, weight, bias, lora_B, lora_A, True, grid)
        assert all((a - b).abs().max() > 1e-2 for a, b in zip(plain[3:], masked[3:])), name
        if grid is not None:
            q = grid.quantize(naive_weight(weight, lora_B, lora_A, True, None).detach())
            assert q.eq(0).any() and q.eq(2**grid.bits - 1).any() and q.unique().numel() > 3, name


@pytest.mark.parametrize("grid", ["none", "4 bits", "act-order"])
@pytest.mark.parametrize("masked", [True, False])
def test_what_the_base_layer_computes_is_subtracted(grid, masked, panels):
    x, weight, _, lora_B, lora_A, grid = problem(grid=GRIDS[grid])
    others = [random_grid(weight, **GRIDS[name]) for name in ("2 bits", "act-order")]
    for minus in ("weight", *others, *([] if grid is None else [grid])):
        arguments = (x, weight, None, lora_B, lora_A, masked, grid, minus)
        found, expected = gradients(effective_linear, *arguments), gradients(naive_linear, *arguments)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (0, 3), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("grid", ["none", "4 bits"])
def test_any_number_of_dimensions(batch, grid):
    arguments = problem(grid=GRIDS[grid], batch=batch)
    arguments = (*arguments[:5], True, arguments[5])
    found, expected = gradients(effective_linear, *arguments), gradients(naive_linear, *arguments)
    assert found[0].shape == (*batch, 17)
    assert_all_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
@pytest.mark.parametrize("grid", ["none", "4 bits", "act-order"])
def test_bases_without_zeros_and_of_nothing_but_zeros(sparsity, grid):
    x, weight, bias, lora_B, lora_A, grid = problem(grid=GRIDS[grid], sparsity=sparsity)
    for masked in (True, False):
        arguments = (x, weight, bias, lora_B, lora_A, masked, grid)
        found, expected = gradients(effective_linear, *arguments), gradients(naive_linear, *arguments)
        assert_all_close(found, expected, rtol=1e-11, atol=1e-11)
        if masked and sparsity == 1.0:
            assert torch.equal(found[0], bias.expand(4, -1)) and not found[3].any() and not found[4].any()


@pytest.mark.parametrize("minus", [None, "weight"])
@pytest.mark.parametrize("masked", [True, False])
def test_gradcheck(masked, minus, panels):
    x, weight, bias, lora_B, lora_A, _ = problem((19, 5), rank=2)

    def function(x, bias, lora_B, lora_A):
        return effective_linear(x, weight, bias, lora_B, lora_A, masked, None, minus)

    assert torch.autograd.gradcheck(function, (x, bias, lora_B, lora_A))


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_what_is_needed_is_computed(needed):
    x, weight, bias, lora_B, lora_A, _ = problem()
    inputs = [t.detach().requires_grad_(flag) for t, flag in zip((x, bias, lora_B, lora_A), needed)]
    x, bias, lora_B, lora_A = inputs
    result = effective_linear(x, weight, bias, lora_B, lora_A, True, None)
    assert result.requires_grad == any(needed)
    if any(needed):
        result.sum().backward()
    assert [t.grad is not None for t in inputs] == list(needed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", ["none", "4 bits", "8 bits", "act-order"])
def test_lower_precisions_are_close_to_float64(dtype, grid, panels):
    """The effective weight is made in float32 and rounded once."""
    arguments = problem((37, 24), grid=GRIDS[grid], dtype=dtype)
    x, weight, bias, lora_B, lora_A, grid = arguments
    found = gradients(effective_linear, x, weight, bias, lora_B, lora_A, True, grid)
    assert [t.dtype for t in found] == [dtype, dtype, dtype, torch.float32, torch.float32]
    effective = naive_weight(weight.float(), lora_B, lora_A, True, grid).detach().to(dtype)
    expected = nn.functional.linear(x.double(), effective.double(), bias.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(found[0].double(), expected, rtol=tolerance, atol=tolerance)
    reference = gradients(
        naive_linear,
        *(t.detach().double().requires_grad_() for t in (x, weight, bias, lora_B, lora_A)),
        True,
        grid,
    )
    for a, b in zip(found[1:], reference[1:]):
        assert (a.double() - b).norm() <= 2 * tolerance * b.norm()


@pytest.mark.parametrize("at_once", [False, True])
def test_many_panels_do_not_add_up_rounding_errors(monkeypatch, panel_memory, at_once):
    """The gradient of the inputs is a sum over panels."""
    x, weight, bias, lora_B, lora_A, _ = problem((1024, 64), dtype=torch.bfloat16, batch=(32,))
    errors = []
    for elements in (2**21, 1):
        monkeypatch.setattr(devices, "CPU_PANEL_ELEMENTS", elements)
        panel_memory(elements * 16 / 2**20 if at_once else None)
        output = effective_linear(x, weight, bias, lora_B, lora_A, True, None)
        grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        (found,) = torch.autograd.grad(output, x, grad_output.bfloat16())
        expected = grad_output.bfloat16().double() @ naive_weight(weight, lora_B, lora_A, True, None).detach().double()
        errors.append(float((found.double() - expected).norm() / expected.norm()))
    assert errors[1] < 1.5 * errors[0]


# -- the kernel ----------------------------------------------------------------------------------------------------


USABLE = [level["name"] for level in extension.levels() if level["usable"]]


@pytest.fixture(params=USABLE)
def level(request):
    before = extension.selected_level()
    extension.select_level(request.param)
    yield request.param
    extension.select_level(before)


def both_ways(monkeypatch, weight, lora_B, lora_A, masked, grid, minus):
    """(panel, slopes) of the kernel and of torch, both with and without slopes."""
    results = []
    for kernel in (True, False):
        with monkeypatch.context() as patch:
            if not kernel:
                patch.setattr(module._Update, "_has_kernel", lambda self: False)
            update = module._Update(weight, lora_B, lora_A, masked, grid, minus)
            assert update._has_kernel() == kernel
            with torch.no_grad():
                rows = slice(0, weight.shape[0])
                panel, slopes = (None if t is None else t.clone() for t in update.panel(rows, torch.float32, True))
                if slopes is None:  # the mask is all there is to it
                    slopes = update.gradient(torch.ones_like(panel), rows, None)
                results.append((panel, slopes, update.panel(rows, torch.float32)[0]))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", ["none", "2 bits", "4 bits", "4 bits symmetric", "8 bits"])
def test_the_kernel_computes_what_torch_does(monkeypatch, level, dtype, grid):
    for shape, masked, minus in itertools.product([*SHAPES, (16, 200)], [True, False], [None, "weight"]):
        _, weight, _, lora_B, lora_A, made = problem(shape, grid=GRIDS[grid], dtype=dtype)
        (panel, slopes, alone), expected = both_ways(monkeypatch, weight, lora_B, lora_A, masked, made, minus)
        assert torch.equal(panel, expected[0]) and torch.equal(alone, panel)
        assert torch.equal(slopes, expected[1]) and slopes.unique().tolist() in ([0], [1], [0, 1])


def test_the_kernel_rounds_halves_as_torch_does(monkeypatch, level):
    weight = torch.arange(-40, 40).float()[None] / 2
    grid = Grid(torch.ones(1, 1), torch.tensor([[7]]), in_features=80, bits=4)
    lora_B, lora_A = torch.zeros(1, 1), torch.zeros(1, 80)
    (panel, slopes, _), expected = both_ways(monkeypatch, weight, lora_B, lora_A, False, grid, None)
    assert torch.equal(panel, expected[0]) and torch.equal(slopes, expected[1])
    assert panel.min() == -7 and panel.max() == 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 3e38])
@pytest.mark.parametrize("grid", ["none", "4 bits"])
def test_updates_that_are_not_finite(monkeypatch, level, value, grid):
    x, weight, _, lora_B, lora_A, grid = problem(grid=GRIDS[grid], dtype=torch.float32)
    lora_B, lora_A = lora_B.detach(), lora_A.detach()
    lora_B[3, 1] = value
    for masked in (True, False):
        (panel, slopes, _), expected = both_ways(monkeypatch, weight, lora_B, lora_A, masked, grid, None)
        torch.testing.assert_close(panel, expected[0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(slopes, expected[1])
        assert torch.isfinite(panel[:3]).all() and torch.isfinite(panel[4:]).all()
    lora_B.requires_grad_()
    effective_linear(x, weight, None, lora_B, lora_A, True, grid).sum().backward()


@pytest.mark.skipif(not USABLE, reason="the C++ extension is not built")
def test_the_kernel_in_several_threads(monkeypatch):
    _, weight, _, lora_B, lora_A, grid = problem((37, 24), grid=GRIDS["4 bits"], dtype=torch.float32)
    _, expected = both_ways(monkeypatch, weight, lora_B, lora_A, True, grid, None)
    for threads in (2, 3, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        (panel, slopes, _), _ = both_ways(monkeypatch, weight, lora_B, lora_A, True, grid, None)
        assert torch.equal(panel, expected[0]) and torch.equal(slopes, expected[1])


LAYOUTS = {
    "rows of a wider matrix": lambda w: torch.cat([w, w], dim=1)[:, : w.shape[1]],
    "transposed": lambda w: torch.empty(w.shape[::-1]).copy_(w.T).T,
    "every other row": lambda w: w.repeat_interleave(2, dim=0)[::2],
    "not at the start": lambda w: torch.cat([w[:1], w])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (37, 24)], ids=str)
@pytest.mark.parametrize("grid", ["none", "4 bits"])
def test_weights_that_are_not_contiguous(layout, shape, grid, panels):
    """The weight of a Conv1D is read transposed."""
    x, weight, bias, lora_B, lora_A, grid = problem(shape, grid=GRIDS[grid], dtype=torch.float32)
    expected = gradients(effective_linear, x, weight, bias, lora_B, lora_A, True, grid)
    other = LAYOUTS[layout](weight)
    assert torch.equal(other, weight)
    found = gradients(effective_linear, x, other, bias, lora_B, lora_A, True, grid)
    assert_all_close(found, expected)


def test_grids_that_are_not_contiguous():
    """GPTQ stores scales (groups, out), so that a grid may hold them transposed."""
    x, weight, bias, lora_B, lora_A, _ = problem((37, 24), dtype=torch.float32)
    grid = fit_grid(weight, 4, 8)
    expected = gradients(effective_linear, x, weight, bias, lora_B, lora_A, True, grid)
    other = Grid(grid.scales.T.contiguous().T, grid.zeros.T.contiguous().T, in_features=24, bits=4)
    assert other.equals(grid)
    for grid in (other, Grid.copy_of(other)):
        found = gradients(effective_linear, x, weight, bias, lora_B, lora_A, True, grid)
        assert_all_close(found, expected)


# -- what is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", ["none", "4 bits", "act-order"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("minus", [None, "weight"])
def test_nothing_of_the_size_of_the_weight_is_kept_for_the_backward_pass(grid, dtype, minus):
    x, weight, bias, lora_B, lora_A, grid = problem((64, 48), grid=GRIDS[grid], dtype=dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = effective_linear(x, weight, bias, lora_B, lora_A, True, grid, minus)
    large = [t for t in kept if t.numel() >= weight.numel() // 2]
    assert kept and all(t.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() for t in large)
    node = result.grad_fn
    held = [value for value in vars(node).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.numel() < weight.numel() // 2 for tensor in held)


def test_a_weight_that_is_read_anew_is_not_kept():
    x, weight, bias, lora_B, lora_A, _ = problem((64, 48))
    reads, kept = [], []

    def read():
        reads.append(1)
        return weight.clone()

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = effective_linear(x, None, bias, lora_B, lora_A, True, None, None, read)
    assert all(t.numel() < weight.numel() // 2 for t in kept)
    found.sum().backward()
    assert len(reads) == 2
    grads = [t.grad for t in (x, bias, lora_B, lora_A)]
    expected = torch.autograd.grad(
        naive_linear(x, weight, bias, lora_B, lora_A, True, None).sum(), (x, bias, lora_B, lora_A)
    )
    assert_all_close([found, *grads], [naive_linear(x, weight, bias, lora_B, lora_A, True, None), *expected])


def test_a_weight_changed_between_the_passes_is_noticed():
    x, weight, bias, lora_B, lora_A, _ = problem()
    result = effective_linear(x, weight, bias, lora_B, lora_A, True, None)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


# -- the weight that is merged -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_merged_weight(dtype, grid, panels):
    """Its integers are those of the forward pass, and zeros of the base stay zero, in every dtype."""
    x, weight, _, lora_B, lora_A, grid = problem((37, 24), grid=GRIDS[grid], dtype=dtype, std=1.0)
    merged = effective_weight(weight, lora_B, lora_A, True, grid)
    assert merged[weight == 0].eq(0).all()
    wide = torch.promote_types(dtype, torch.float32)
    expected = naive_weight(weight.to(wide), lora_B.to(wide), lora_A.to(wide), True, grid).detach()
    if grid is None:
        assert merged.dtype == dtype
        torch.testing.assert_close(merged, expected.to(dtype))
    else:
        assert torch.equal(grid.quantize(merged), grid.quantize(expected))
        # wide enough to tell the integers apart, and not wider
        assert merged.dtype == dtype or not torch.equal(grid.quantize(expected.to(dtype)), grid.quantize(expected))
        # what the forward pass multiplies with
        forward = effective_linear(torch.eye(24, dtype=wide), weight, None, lora_B, lora_A, True, grid).T
        torch.testing.assert_close(merged.to(wide), forward.to(merged.dtype).to(wide), rtol=0, atol=0)
