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

from peft_elastic.layers.format import compress, decompress, verify


def pruned(rows: int, columns: int, density: float = 0.5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) < density)


def shape(tensors, weight, dtype):
    numbers = {"out_features": weight.shape[0], "in_features": weight.shape[1], "dtype": dtype}
    return numbers | {"nnz": tensors["weight_values"].numel()}


def restore(tensors, columns, dtype=None):
    return decompress(
        tensors["weight_bitmask"], tensors["weight_values"], tensors.get("weight_scales"), columns, dtype
    )


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 99))
def test_round_trip(rows, columns, density, seed):
    weight = pruned(rows, columns, density, seed)
    tensors = compress(weight)
    verify("layer", tensors, **shape(tensors, weight, "bf16"))
    assert torch.equal(restore(tensors, columns), weight.bfloat16())
    tensors = compress(weight, "int8")
    verify("layer", tensors, **shape(tensors, weight, "int8"))
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((restore(tensors, columns) - weight).abs() <= 0.5001 * step).all())


def test_bits_are_little_endian_and_values_row_by_row():
    weight = torch.zeros(2, 9)
    weight[0, 1], weight[0, 8], weight[1, 0] = 1.0, 2.0, 3.0
    tensors = compress(weight)
    assert tensors["weight_bitmask"].tolist() == [[2, 1], [1, 0]]
    assert tensors["weight_values"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-44])
def test_rows_of_zeros_and_subnormals_stay_finite(tiny):
    weight = torch.tensor([[tiny, 0.0], [1.0, -1.0]])
    tensors = compress(weight, "int8")
    verify("layer", tensors, **shape(tensors, weight, "int8"))
    assert torch.isfinite(restore(tensors, 2)).all()
    assert tensors["weight_values"].tolist()[-2:] == [127, -127]


@pytest.mark.parametrize("weight", [torch.full((2, 2), float("nan")), torch.zeros(3), torch.zeros(0, 2)])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_refuses_other_weights(weight, dtype):
    with pytest.raises(ValueError, match="`weight`"):
        compress(weight, dtype)


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
    "truncated": (_change("weight_values", lambda t: t[:-1]), "layer.weight_values is"),
    "extra dimension": (_change("weight_values", lambda t: t[None]), "layer.weight_values is"),
    "wrong dtype": (_change("weight_bitmask", lambda t: t.to(torch.int8)), "layer.weight_bitmask is"),
    "bit flip": (_change("weight_bitmask", lambda t: _set((0, 0), t[0, 0] ^ 1)(t)), "layer.weight_bitmask has"),
    "stray bit": (_change("weight_bitmask", _set((0, -1), 0x80)), "layer.weight_bitmask has bits set past"),
    "-128": (_change("weight_values", _set(0, -128)), "layer.weight_values has the value -128"),
    "NaN scale": (_change("weight_scales", _set(0, float("nan"))), "layer.weight_scales has"),
    "negative scale": (_change("weight_scales", _set(0, -1.0)), "layer.weight_scales has"),
    "short scales": (_change("weight_scales", lambda t: t[:-1]), "layer.weight_scales is"),
    "huge shape": (lambda t, n: n.update(out_features=2**40, in_features=2**40), "layer.weight_bitmask is"),
    "wrong nnz": (lambda t, n: n.update(nnz=n["nnz"] - 1), "layer.weight_values is"),
    "nnz above the size": (lambda t, n: n.update(nnz=10**6), "layer: nnz"),
    "bool": (lambda t, n: n.update(in_features=True), "layer: in_features"),
    "dtype": (lambda t, n: n.update(dtype="bf16"), "layer.weight_values is"),
    "unknown dtype": (lambda t, n: n.update(dtype=["int8"]), "layer: dtype"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_verify_names_what_is_wrong(name):
    weight = pruned(5, 11)
    tensors = compress(weight, "int8")
    numbers = shape(tensors, weight, "int8")
    breaks, message = BROKEN[name]
    breaks(tensors, numbers)
    with pytest.raises(ValueError, match=message):
        verify("layer", tensors, **numbers)
