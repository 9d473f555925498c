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
"""Grids of quantised layers: parts of them, comparing them, and rounding in place."""

import itertools

import pytest
import torch

from peft_elastic.quantization import Grid, fit_grid


def random_grid(out_features=6, in_features=24, groups=4, bits=4, act_order=False):
    scales = torch.rand(out_features, groups) + 0.1
    zeros = torch.randint(0, 2**bits, (out_features, groups))
    g_idx = torch.randint(0, groups, (in_features,)) if act_order else None
    return Grid(scales, zeros, in_features=in_features, bits=bits, g_idx=g_idx)


RUNS = [None, ((0, 12),), ((0, 6), (12, 18)), ((2, 7), (9, 23)), ((18, 24),), ((0, 24),), ((5, 6),)]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("inputs", RUNS, ids=str)
@pytest.mark.parametrize("outputs", [None, ((0, 3),), ((1, 2), (4, 6))], ids=str)
def test_a_part_rounds_as_the_whole_does(act_order, inputs, outputs):
    grid = random_grid(act_order=act_order)
    weight = torch.randn(6, 24) * 3
    columns = torch.cat([torch.arange(a, b) for a, b in inputs or ((0, 24),)])
    rows = torch.cat([torch.arange(a, b) for a, b in outputs or ((0, 6),)])
    part = grid.take(outputs, inputs)
    assert torch.equal(part.round(weight[rows][:, columns]), grid.round(weight)[rows][:, columns])
    # what a grid from its own tensors says of itself
    again = Grid(part.scales, part.zeros, in_features=part.in_features, bits=part.bits, g_idx=part.g_idx)
    assert (again.in_order, again.group_size) == (part.in_order, part.group_size) and again.equals(part)
    assert grid.take(outputs, inputs) is part
    assert torch.equal(part._on_host(), part.g_idx)


def test_a_part_follows_its_grid():
    """It is remembered, and made again when the grid has changed in whatever way."""
    grid, other, weight = random_grid(), random_grid(), torch.randn(6, 24)
    runs = ((0, 3),), ((0, 12),)
    before = grid.take(*runs)
    grid.permute("in", torch.arange(24).flip(0))
    assert torch.equal(grid.take(*runs).round(weight[:3, :12]), grid.round(weight)[:3, :12])
    grid.permute("out", torch.arange(6).flip(0))
    assert torch.equal(grid.take(*runs).round(weight[:3, :12]), grid.round(weight)[:3, :12])
    persistent = Grid.copy_of(grid, persistent=True)
    persistent.take(*runs)
    persistent.load_state_dict(Grid.copy_of(other, persistent=True).state_dict())
    assert torch.equal(persistent.take(*runs).round(weight[:3, :12]), other.round(weight)[:3, :12])
    assert persistent.equals(other) and not before.equals(grid.take(*runs))


def test_equality_is_found_again_after_a_change():
    grid = random_grid()
    other = Grid.copy_of(grid)
    third = random_grid()
    for _ in range(2):
        assert grid.equals(other) and other.equals(grid) and not grid.equals(third)
    other.scales[0, 0] *= 2  # in place
    assert not grid.equals(other)
    grid.scales = other.scales.clone()
    assert grid.equals(other) and grid.equals(other)
    other.permute("in", torch.arange(24).flip(0))
    assert not grid.equals(other)
    with torch.inference_mode():  # whose tensors count no versions
        mine, its = Grid.copy_of(grid), Grid.copy_of(grid)
        assert mine.equals(its)
        its.zeros[0, 0] = 15 - its.zeros[0, 0]
        assert not mine.equals(its)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_in_place_is_rounding(act_order, bits, dtype):
    grid = random_grid(bits=bits, act_order=act_order)
    for rows, with_inside in itertools.product([slice(0, 6), slice(2, 5)], [False, True]):
        weight = 2**bits * torch.randn(rows.stop - rows.start, 24, dtype=dtype)
        inside = torch.empty_like(weight)
        expected = grid.round_rows(weight, rows, inside)
        found, also = grid.round_rows_(weight.clone(), rows, with_inside)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert also is None if not with_inside else torch.equal(also, inside.bool())
        assert 0 < inside.mean() < 1


def test_halves_go_to_even():
    grid = Grid(torch.ones(1, 1), torch.tensor([[7]]), in_features=80, bits=4)
    weight = torch.arange(-40, 40).float()[None] / 2
    expected = torch.tensor([[round(value / 2) for value in range(-40, 40)]]).clamp(-7, 8)  # Python's are to even
    assert torch.equal(grid.round(weight), expected.float())
    assert fit_grid(weight, 4, -1).round(weight).isfinite().all()
