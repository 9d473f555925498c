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
from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_elastic.layers.values import FORMATS, Sizes, grid_format, parse_values


BF16, INT8, INT4 = (FORMATS[name] for name in ("bf16", "int8", "int4"))


def pruned(rows: int, columns: int, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) < density)


def sizes_of(tensors, weight):
    return Sizes(*weight.shape, nnz=tensors["weight_values"].numel())


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_round_trip(rows, columns, density, seed):
    weight = pruned(rows, columns, density, seed)
    tensors = BF16.compress(weight)
    sizes = sizes_of(tensors, weight)
    BF16.verify("layer", tensors, sizes)
    assert torch.equal(BF16.decompress(tensors, sizes), weight.bfloat16())
    tensors = INT8.compress(weight)
    sizes = sizes_of(tensors, weight)
    INT8.verify("layer", tensors, sizes)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((INT8.decompress(tensors, sizes) - weight).abs() <= 0.5001 * step).all())


def test_bits_are_little_endian_and_values_row_by_row():
    weight = torch.zeros(2, 9)
    weight[0, 1], weight[0, 8], weight[1, 0] = 1.0, 2.0, 3.0
    tensors = BF16.compress(weight)
    assert tensors["weight_bitmask"].tolist() == [[2, 1], [1, 0]]
    assert tensors["weight_values"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-44])
def test_rows_of_zeros_and_subnormals_stay_finite(tiny):
    weight = torch.tensor([[tiny, 0.0], [1.0, -1.0]])
    tensors = INT8.compress(weight)
    sizes = sizes_of(tensors, weight)
    INT8.verify("layer", tensors, sizes)
    assert torch.isfinite(INT8.decompress(tensors, sizes)).all()
    assert tensors["weight_values"].tolist()[-2:] == [127, -127]


@pytest.mark.parametrize("weight", [torch.full((2, 2), float("nan")), torch.zeros(3), torch.zeros(0, 2)])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_refuses_other_weights(weight, dtype):
    with pytest.raises(ValueError, match="`weight`"):
        FORMATS[dtype].compress(weight)


def _change(key, change):
    def apply(tensors, numbers):
        tensors[key] = change(tensors[key].clone())

    return apply


def _set(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


BROKEN = {
    "missing": (lambda t, n: t.pop("weight_values"), "layer.weight_values is missing"),
    "truncated": (_change("weight_values", lambda t: t[:-1]), "layer.weight_values must be"),
    "extra dimension": (_change("weight_values", lambda t: t[None]), "layer.weight_values must be"),
    "wrong dtype": (_change("weight_bitmask", lambda t: t.to(torch.int8)), "layer.weight_bitmask must be"),
    "bit flip": (_change("weight_bitmask", lambda t: _set((0, 0), t[0, 0] ^ 1)(t)), "layer.weight_bitmask has"),
    "stray bit": (_change("weight_bitmask", _set((0, -1), 0x80)), "layer.weight_bitmask has bits set past"),
    "-128": (_change("weight_values", _set(0, -128)), "layer.weight_values must be -127 to 127, got -128"),
    "NaN scale": (_change("weight_scales", _set(0, float("nan"))), "layer.weight_scales must be finite"),
    "negative scale": (_change("weight_scales", _set(0, -1.0)), "layer.weight_scales must be finite"),
    "short scales": (_change("weight_scales", lambda t: t[:-1]), "layer.weight_scales must be"),
    "huge shape": (lambda t, n: n.update(out_features=2**40, in_features=2**40), "layer.weight_bitmask must be"),
    "wrong nnz": (lambda t, n: n.update(nnz=n["nnz"] - 1), "layer.weight_values must be"),
    "nnz above the size": (lambda t, n: n.update(nnz=10**6), "layer: nnz"),
    "bool": (lambda t, n: n.update(in_features=True), "layer: in_features"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_verify_names_what_is_wrong(name):
    weight = pruned(5, 11)
    tensors = INT8.compress(weight)
    numbers = sizes_of(tensors, weight)._asdict()
    breaks, message = BROKEN[name]
    breaks(tensors, numbers)
    with pytest.raises(ValueError, match=message):
        INT8.verify("layer", tensors, Sizes(**numbers))


def test_values_of_another_type_are_refused():
    weight = pruned(5, 11)
    tensors = INT8.compress(weight)
    with pytest.raises(ValueError, match="layer.weight_values must be torch.bfloat16"):
        BF16.verify("layer", tensors, sizes_of(tensors, weight))
    tensors["weight_values"] = tensors["weight_values"].bfloat16()
    with pytest.raises(ValueError, match="layer.weight_scales must not be there"):
        BF16.verify("layer", tensors, sizes_of(tensors, weight))


def stored(value_format, weight, sparse):
    """A weight in a type of values, and what is said of it."""
    if not value_format.is_grid:
        tensors = value_format.compress(weight)
        return tensors, Sizes(*weight.shape, tensors["weight_values"].numel())
    zeros = torch.full((weight.shape[0], -(-weight.shape[1] // 8)), 8)
    q = torch.where(weight == 0, 8, 9 + (weight > 0).long())
    tensors = value_format.compress(q, zeros.half(), zeros, None, 8, sparse)
    return tensors, Sizes(*weight.shape, int((q != 8).sum()), 8, sparse)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_every_type_says_what_it_stores(name, sparse):
    value_format, weight = FORMATS[name], pruned(6, 21)
    tensors, sizes = stored(value_format, weight, sparse)
    value_format.verify("layer", tensors, sizes)
    allowed = set(value_format.tensors) - (set() if sizes.sparse else {"weight_bitmask"})
    assert set(tensors) <= allowed and set(tensors) >= allowed - value_format.optional
    assert all(tensor.dtype in value_format.tensors[key] for key, tensor in tensors.items())
    assert value_format.bytes(sizes) == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def test_names_of_values():
    assert parse_values("int4 dense") == (INT4, False) and parse_values("bf16") == (BF16, True)
    assert [parse_values(each) for each in INT4.variants(True)] == [(INT4, True), (INT4, False)]
    assert INT4.variants(False) == ["int4 dense"]
    assert (grid_format(2), grid_format(4), grid_format(5)) == (INT4, INT4, None)
