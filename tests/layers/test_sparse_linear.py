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
"""SparseLinear against the dense layer that holds the same weights."""

import copy
import io
import pickle
import sys

import pytest
import torch
from support import fresh
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_elastic.layers import extension


if not extension.is_built():
    pytest.skip("the C++ extension is not built", allow_module_level=True)

from peft_elastic.deploy import SparseLinear


def make_linear(in_features=70, out_features=50, bias=True, dtype=torch.float32):
    linear = nn.Linear(in_features, out_features, bias).to(dtype)
    with torch.no_grad():
        linear.weight *= torch.rand_like(linear.weight.float()) < 0.5
    return linear


@pytest.mark.parametrize("value_dtype", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_dense_layer(value_dtype, dtype, bias):
    linear = make_linear(bias=bias, dtype=dtype)
    sparse = SparseLinear.from_linear(linear, value_dtype)
    dense = sparse.to_linear()
    assert dense.weight.dtype == dtype and dense.training == linear.training
    step = linear.weight.abs().amax(1, keepdim=True) / 127 if value_dtype == "int8" else linear.weight.abs() / 128
    assert ((dense.weight - linear.weight).abs() <= step).all()
    x = torch.randn(3, 5, 70, dtype=dtype)
    eps = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(sparse(x), dense(x), rtol=eps, atol=eps)
    assert not sparse.to_linear().weight[linear.weight == 0].any()


def test_conv1d():
    layer = Conv1D(50, 70)
    sparse = SparseLinear.from_linear(layer)
    x = torch.randn(4, 70)
    torch.testing.assert_close(sparse(x), layer(x), rtol=1e-2, atol=1e-2)


def test_from_linear_refuses():
    with pytest.raises(ValueError, match="`linear` must be an nn.Linear"):
        SparseLinear.from_linear(nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match="`linear` must be on the CPU"):
        SparseLinear.from_linear(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="dtype"):
        SparseLinear.from_linear(nn.Linear(2, 2), "int4")


@pytest.mark.parametrize("value_dtype", ["bf16", "int8"])
def test_state_dict(value_dtype):
    source = SparseLinear.from_linear(make_linear(), value_dtype)
    target = SparseLinear.from_linear(make_linear(), value_dtype)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, 70)
    assert torch.equal(target(x), source(x)) and torch.equal(target.packed, source.packed)


@pytest.mark.parametrize("key", ["weight_bitmask", "weight_values", "weight_scales"])
def test_damaged_state_is_refused_and_changes_nothing(key):
    layer = nn.Sequential(SparseLinear.from_linear(make_linear(), "int8"))
    x = torch.randn(2, 70)
    before = layer(x)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="0.weight_"):
        layer.load_state_dict({**state, f"0.{key}": state[f"0.{key}"][:-1]})
    with pytest.raises(RuntimeError, match=f"0.{key}"):
        layer.load_state_dict({name: value for name, value in state.items() if name != f"0.{key}"})
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("value_dtype", ["bf16", "int8"])
def test_copies_and_casts(value_dtype):
    layer = SparseLinear.from_linear(make_linear(), value_dtype)
    x = torch.randn(2, 70)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    y = layer(x)
    assert layer.bfloat16().bias.dtype == torch.bfloat16 and layer(x).dtype == torch.float32
    torch.testing.assert_close(layer(x), y, rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="to_linear"):
        layer.to("meta")


def test_gradients_and_compile():
    layer = SparseLinear.from_linear(make_linear())
    dense = layer.to_linear()
    x, z = torch.randn(3, 70, requires_grad=True), torch.randn(3, 70, requires_grad=True)
    z.data = x.data.clone()
    layer(x).square().sum().backward()
    dense(z).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    assert not [name for name, parameter in layer.named_parameters() if parameter.requires_grad]


def test_wrong_input():
    layer = SparseLinear.from_linear(make_linear())
    for x in (torch.randn(2, 69), torch.randn(2, 70).double(), torch.randn(2, 70, device="meta")):
        with pytest.raises(ValueError, match="`x` must be"):
            layer(x)


def test_repr():
    text = repr(SparseLinear.from_linear(make_linear(), "int8"))
    assert "in_features=70, out_features=50" in text and "int8, sparsity=" in text and "bytes" in text


def test_without_the_extension():
    code = (
        "import sys; sys.modules['peft_elastic._C'] = None\n"
        "import torch, peft_elastic\n"
        "peft_elastic.SparseLinear.from_linear(torch.nn.Linear(2, 2))"
    )
    result = fresh.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "ValueError: The sparse kernels need the C++ extension" in result.stderr
