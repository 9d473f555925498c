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
"""Checks of the Triton kernels in Triton's interpreter, one process for all: `python -m support.in_interpreter` runs those
named, or all, and prints a line of JSON for each. TRITON_INTERPRET=1 has to be set."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import traceback
import warnings
from typing import Any

import torch

from peft_elastic.layers.grid import Grid, fit_grid
from peft_elastic.tuners.sparse_qa_lora import devices
from peft_elastic.tuners.sparse_qa_lora.effective_weight import _Update, effective_linear, effective_weight


in_triton: Any = None  # imported by `main`: whoever asks for `checks` may have no Triton, or want it as it is

SHAPES = [(1, 1), (5, 1), (3, 5), (17, 33), (16, 128), (33, 260)]
LAYOUTS = {
    "contiguous": lambda w: w,
    "transposed": lambda w: torch.empty(w.shape[::-1], dtype=w.dtype).copy_(w.T).T,
    "rows of a wider matrix": lambda w: torch.cat([w, w], dim=1)[:, : w.shape[1]],
    "every other row": lambda w: w.repeat_interleave(2, dim=0)[::2],
    "backwards": lambda w: torch.cat([w[:1], w])[1:],
}


def make_grid(kind: str | None, weight: torch.Tensor) -> Grid | None:
    """One that clips a part of the weights."""
    if kind is None:
        return None
    out_features, in_features = weight.shape
    if kind == "act-order":
        groups = min(3, in_features)
        g_idx = torch.randperm(in_features) % groups
        scales, zeros = torch.rand(out_features, groups) * 0.1 + 0.02, torch.randint(0, 16, (out_features, groups))
        return Grid(scales, zeros, in_features=in_features, bits=4, g_idx=g_idx)
    bits = int(kind[0])
    return fit_grid(
        weight.float() * 0.7, bits, in_features if in_features % 4 else in_features // 2, "symmetric" in kind
    )


GRIDS = [None, "2 bits", "4 bits", "4 bits symmetric", "8 bits", "act-order"]


def make(
    shape: tuple[int, int], dtype: torch.dtype, kind: str | None
) -> tuple[torch.Tensor, torch.Tensor, Grid | None]:
    """An update, a weight with zeros in it, and a grid."""
    weight = (0.3 * torch.randn(shape) * (torch.rand(shape) > 0.4)).to(dtype)
    return 0.2 * torch.randn(shape), weight, make_grid(kind, weight)


def by_torch(panel, weight, masked, adds, grid, rows, subtract, with_slopes):
    """The operators of torch, with which the kernel is compared. A weight beside the one of the layer is not needed here."""
    update = _Update(weight, torch.zeros(weight.shape[0], 1), torch.zeros(1, weight.shape[1]), masked, grid, None)
    update.minus = "weight" if subtract or not adds else None
    assert update._adds == adds
    return update._fill_at_once(panel.clone(), weight[rows], rows, with_slopes)


def truncated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the interpreter makes of a float32: bfloat16 is cut off there, not rounded, as it would be on a GPU."""
    if dtype != torch.bfloat16:
        return values.to(dtype)
    return (values.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


def compare(panel, weight, masked, adds, grid, rows, subtract, dtype):
    with_slopes = masked or grid is not None
    arguments = weight[rows], masked, adds, grid, rows, subtract, dtype, with_slopes
    found, slopes = in_triton.fill(panel[rows].clone(), *arguments)
    expected, expected_slopes = by_torch(panel[rows], weight, masked, adds, grid, rows, subtract, with_slopes)
    assert found.dtype == dtype
    torch.testing.assert_close(found, truncated(expected, dtype), rtol=0, atol=0, equal_nan=True)
    if with_slopes:
        assert torch.equal(slopes.bool(), expected_slopes) and slopes.max() <= 1


def check_every_combination() -> None:
    """masked, added, rounded, subtracted, each or not, on shapes that no block fits; in turns, as all with all would take
    minutes."""
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16])
    outs = itertools.cycle([torch.float32, torch.float16])
    shapes = itertools.cycle(SHAPES)
    for kind, masked, adds, subtract in itertools.product(GRIDS, [True, False], [True, False], [True, False]):
        if kind is None and subtract or kind is not None and not adds:
            continue  # which nobody asks for
        panel, weight, grid = make(next(shapes), next(dtypes), kind)
        compare(panel, weight, masked, adds, grid, slice(0, weight.shape[0]), subtract, next(outs))


def check_every_shape_and_type() -> None:
    for shape, dtype in itertools.product(SHAPES, [torch.float32, torch.bfloat16, torch.float16]):
        panel, weight, grid = make(shape, dtype, "4 bits")
        compare(panel, weight, True, True, grid, slice(0, shape[0]), False, dtype)


def check_rows_of_a_layer() -> None:
    for kind in (None, "4 bits", "act-order"):
        panel, weight, grid = make((33, 20), torch.float32, kind)
        compare(panel, weight, True, True, grid, slice(16, 32), False, torch.float32)
        compare(panel, weight, True, True, grid, slice(32, 33), False, torch.float32)


def check_layouts_of_the_weight() -> None:
    for name, shape in itertools.product(LAYOUTS, [(17, 33), (7, 1)]):
        panel, weight, grid = make(shape, torch.float32, "4 bits")
        other = LAYOUTS[name](weight)
        assert torch.equal(other, weight), name
        compare(panel, other, True, True, grid, slice(0, shape[0]), False, torch.float32)
        gradient = torch.randn(shape)
        expected = gradient * (weight != 0)
        assert torch.equal(in_triton.mask_gradient(gradient.clone(), other), expected), name


def check_no_rows() -> None:
    for shape in [(0, 5), (5, 0), (0, 0)]:
        panel, weight = torch.empty(shape), torch.empty(shape)
        found, slopes = in_triton.fill(panel, weight, True, True, None, slice(0, shape[0]), False, torch.float16, True)
        assert found.shape == slopes.shape == shape and found.dtype == torch.float16
        assert in_triton.mask_gradient(panel, weight).shape == shape


def check_halves_go_to_even() -> None:
    weight = torch.arange(-40, 40).float()[None] / 2
    grid = Grid(torch.ones(1, 1), torch.tensor([[7]]), in_features=80, bits=4)
    compare(torch.zeros(1, 80), weight, False, True, grid, slice(0, 1), False, torch.float32)
    found, _ = in_triton.fill(torch.zeros(1, 80), weight, False, True, grid, slice(0, 1), False, torch.float32, False)
    assert found.min() == -7 and found.max() == 8


def check_values_that_are_not_finite() -> None:
    for kind, masked in itertools.product([None, "4 bits", "act-order"], [True, False]):
        panel, weight, grid = make((17, 33), torch.float32, kind)
        panel[3] = torch.tensor([float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-40]).repeat(6)[:33]
        compare(panel, weight, masked, True, grid, slice(0, 17), False, torch.float32)


def check_the_gradient() -> None:
    for shape, dtype in itertools.product(
        [(17, 33), (1, 1), (16, 130)], [torch.float32, torch.bfloat16, torch.float16]
    ):
        gradient, (_, weight, _) = torch.randn(shape).to(dtype), make(shape, dtype, None)
        for mask in (weight, (weight != 0).to(torch.uint8)):
            expected = gradient.float() * (weight != 0)
            given = gradient.clone()
            found = in_triton.mask_gradient(given, mask)
            assert found.dtype == torch.float32 and torch.equal(found, expected)
            assert (found is given) == (dtype == torch.float32)
            space = torch.empty(shape)
            assert in_triton.mask_gradient(gradient.clone(), mask, space) is space and torch.equal(space, expected)


def _both_passes(dtype, kind, masked, minus, megabytes, autocast=False):
    shape = (37, 24)
    _, weight, grid = make(shape, dtype, kind)
    minus = make_grid("2 bits", weight) if minus == "grid" else minus
    inputs = torch.randn(5, 24).to(dtype), torch.randn(37).to(dtype), 0.2 * torch.randn(37, 3), torch.randn(3, 24)
    x, bias, lora_B, lora_A = (t.requires_grad_() for t in inputs)
    results = []
    devices.set_panel_memory(megabytes)
    for choice in ("always", "never"):
        devices.set_triton(choice)
        with torch.autocast("cpu", enabled=autocast):
            output = effective_linear(x, weight, bias, lora_B, lora_A, masked, grid, minus)
        grad = torch.autograd.grad(output, (x, bias, lora_B, lora_A), torch.ones_like(output).cumsum(1))
        results.append([output, *grad, effective_weight(weight, lora_B, lora_A, masked, grid)])
    return results


def check_layers() -> None:
    """Both passes through Triton and through torch: the same bits where the interpreter rounds as a GPU does."""
    dtypes = itertools.cycle([torch.float32, torch.float16])
    cases = itertools.product([None, "4 bits", "act-order"], [True, False], [None, "weight", "grid"])
    for number, (kind, masked, minus) in enumerate(cases):
        dtype = next(dtypes)
        found, expected = _both_passes(dtype, kind, masked, minus, 1000 if number % 3 else 1e-6)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b), (dtype, kind, masked, minus, (a - b).abs().max())


def check_layers_in_bfloat16() -> None:
    for kind, autocast in itertools.product([None, "4 bits"], [False, True]):
        dtype = torch.float32 if autocast else torch.bfloat16
        found, expected = _both_passes(dtype, kind, True, None, 1000, autocast)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            assert (a.double() - b.double()).norm() <= 2**-6 * b.double().norm()


def check_torch_can_go_on_in_the_middle() -> None:
    """Triton may fail for the gradient after it has made the panel."""
    for kind, dtype in itertools.product([None, "4 bits"], [torch.float32, torch.float16]):
        _, weight, grid = make((17, 33), torch.float32, kind)
        factors, rows = (0.2 * torch.randn(17, 3), torch.randn(3, 33)), slice(0, 17)
        devices.set_panel_memory(1000)
        results = []
        for then in ("always", "never"):
            devices.set_triton("always")
            update = _Update(weight, *factors, True, grid, None)
            _, slopes = update.panel(rows, dtype, True)
            devices.set_triton(then)
            gradient = torch.ones(17, 33, dtype=dtype).cumsum(1)
            results.append(update.gradient(gradient, rows, slopes))
        assert results[0].dtype == results[1].dtype == torch.float32 and torch.equal(*results)


def check_the_clamp_and_the_mask_matter() -> None:
    """Otherwise the comparisons would show nothing."""
    for kind in GRIDS[1:]:
        panel, weight, grid = make((33, 260), torch.float32, kind)
        _, slopes = by_torch(panel, weight, False, True, grid, slice(0, 33), False, True)
        assert 0.02 < 1 - slopes.float().mean() < 0.9, kind


def checks() -> list[str]:
    return [name.removeprefix("check_") for name in globals() if name.startswith("check_")]


def main() -> None:
    global in_triton
    in_triton = importlib.import_module("peft_elastic.tuners.sparse_qa_lora.in_triton")
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # of numpy, for infinite values
    for name in sys.argv[1:] or checks():
        torch.manual_seed(0)
        try:
            globals()[f"check_{name}"]()
            answer = "passed"
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps([name, answer]), flush=True)


if __name__ == "__main__":
    main()
