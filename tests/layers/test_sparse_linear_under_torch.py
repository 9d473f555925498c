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
"""SparseLinear under what torch can do to a layer: tracers, modes, transforms, default devices, tensors that are not plain memory.

The dense layer with the same weights says what is right.
"""

import copy
import io
import pickle
import sys

import pytest
import torch
from support import fresh
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from peft_elastic.layers import extension


if not extension.is_built():
    pytest.skip("the C++ extension is not built", allow_module_level=True)

from peft_elastic.deploy import SparseLinear
from peft_elastic.layers import ops
from peft_elastic.layers.addresses import is_watched


KINDS = ("bf16", "int8", "int4")


def make(kind="bf16", in_features=44, out_features=21, seed=0):
    """A sparse layer and the dense one with the same weights."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    if kind == "int4":
        q = torch.randint(0, 16, (out_features, in_features), generator=generator)
        scales = random(out_features, -(-in_features // 16)) / 100
        zeros = torch.full(scales.shape, 7)
        sparse = SparseLinear.from_quantized(q, scales, zeros, group_size=16, bias=random(out_features))
    else:
        linear = nn.Linear(in_features, out_features)
        linear.weight.data = random(out_features, in_features) * (random(out_features, in_features) < 0) / 5
        linear.bias.data = random(out_features)
        sparse = SparseLinear.from_linear(linear, kind)
    return sparse.eval(), sparse.to_linear().requires_grad_(False).eval()


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


X, T = torch.randn(2, 3, 44, generator=torch.Generator().manual_seed(1))


def tangent(layer, x=X, t=T):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t))).tangent


def second_order(layer):
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x)[0]


def biases(layer):
    many = torch.linspace(-1, 1, 4 * 21).view(4, 21)
    mapped = vmap(lambda bias: functional_call(layer, {"bias": bias}, (X,)))(many)
    slope = grad(lambda bias: functional_call(layer, {"bias": bias}, (X,)).sin().sum())(many[0])
    return torch.cat([mapped.flatten(), slope])


WAYS = {
    "jvp": lambda layer: jvp(layer, (X,), (T,))[1],
    "jvp without gradients": lambda layer: torch.no_grad()(jvp)(layer, (X,), (T,))[1],
    "vmap": lambda layer: vmap(layer, in_dims=1, out_dims=1)(X.T),
    "grad": lambda layer: grad(lambda x: layer(x).sin().sum())(X),
    "hessian": lambda layer: hessian(lambda x: layer(x).sin().sum())(X[:1]),
    "jacfwd": lambda layer: jacfwd(layer)(X[0]),
    "jacrev": lambda layer: jacrev(layer)(X[0]),
    "functionalize": lambda layer: functionalize(layer)(X),
    "biases": biases,
    "dual level": tangent,
    "dual level and gradients": lambda layer: tangent(lambda x: layer(x * torch.ones(44, requires_grad=True))),
    "second order": second_order,
    "inference mode": lambda layer: torch.inference_mode()(layer)(X),
    "negated view": lambda layer: layer(torch._neg_view(X)),
    "zero tensor": lambda layer: layer(torch._efficientzerotensor(X.shape)),
    "negated bias": lambda layer: functional_call(layer, {"bias": torch._neg_view(layer.bias.detach())}, (X,)),
    "many rows": lambda layer: tangent(layer, X.repeat(400, 1), T.repeat(400, 1)),
    "make_fx": lambda layer: make_fx(layer)(X)(T),
    "export": lambda layer: torch.export.export(layer, (X,), strict=False).module()(T),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_is_as_the_dense_layer(way, kind):
    sparse, dense = make(kind)
    close(WAYS[way](sparse), WAYS[way](dense))


@pytest.mark.parametrize("kind", KINDS)
def test_torchscript(kind):
    sparse, dense = make(kind)
    model = nn.Sequential(sparse, nn.ReLU())
    for rows in (3, 1200):
        x, other = torch.randn(rows, 44), torch.randn(rows, 44)
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, x), file)
        file.seek(0)
        close(torch.jit.load(file)(other), dense(other).relu())
    close(torch.jit.script(model)(X), dense(X).relu())
    with pytest.raises(ValueError, match="torch.jit.trace cannot record"):
        torch.jit.trace(lambda x: nn.functional.linear(x, sparse.to_linear().weight), X)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_default_devices_change_nothing(kind, device):
    sparse, dense = make(kind)
    with torch.device(device):
        assert not is_watched()  # and so they cost nothing
        close(sparse(X), dense(X))
        close(sparse(X.repeat(400, 1)), dense(X.repeat(400, 1)))
        x = X.clone().requires_grad_()
        sparse(x).sum().backward()
        assert x.grad.device.type == "cpu"
        again = copy.deepcopy(sparse)
        again.load_state_dict(sparse.state_dict())
        assert torch.equal(again.to_linear().weight, dense.weight)
        assert torch.equal(pickle.loads(pickle.dumps(again))(X), sparse(X))


def test_default_devices_and_new_layers():
    linear = nn.Linear(20, 9)
    expected = {dtype: SparseLinear.from_linear(linear, dtype)(X[:, :20]) for dtype in ("bf16", "int8")}
    with torch.device("meta"):
        for dtype, y in expected.items():
            assert torch.equal(SparseLinear.from_linear(linear, dtype)(X[:, :20]), y)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    sparse, _ = make()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = sparse(mode.from_tensor(X))
        assert y.shape == (3, 21) and type(y).__name__ == "FakeTensor"
        with pytest.raises(ValueError, match="plain, contiguous CPU tensor"):
            ops.describe(mode.from_tensor(sparse.packed))


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operator():
    sparse, dense = make()
    with Names() as names, torch.no_grad():
        y = sparse(X)
    close(y, dense(X))
    assert names.found == ["peft_elastic.sparse_linear.default"]


class OfAUser(torch.Tensor):
    pass


def test_subclasses_of_tensor():
    sparse, dense = make()
    y = sparse(X.as_subclass(OfAUser))
    assert type(y) is OfAUser
    close(y.as_subclass(torch.Tensor), dense(X))
    sparse.bias = nn.Parameter(sparse.bias.detach().as_subclass(OfAUser), requires_grad=False)
    close(torch.Tensor(sparse(X)), dense(X))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_for_a_dense_layer(kind, dtype):
    sparse, dense = make(kind)
    x = X.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        y = sparse(x)
        close(y, dense(X), 4e-2)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_the_bare_operator_refuses_tangents():
    sparse, dense = make()

    def operator(x):
        return torch.ops.peft_elastic.sparse_linear(x, sparse.packed, sparse.scales, sparse.bias, 21)

    with pytest.raises(NotImplementedError, match="call SparseLinear"):
        tangent(operator)
    close(vmap(operator)(X), dense(X))
    close(operator(X), dense(X))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_transforms(kind):
    sparse, dense = make(kind)
    for way in ("jvp", "vmap", "grad", "dual level"):
        close(torch.compile(WAYS[way], backend="aot_eager")(sparse), WAYS[way](dense))
        torch.compiler.reset()


STRIDES = {
    "every second": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "expanded": lambda tensor: tensor.flatten()[:1].expand(tensor.shape),
    "reversed": lambda tensor: tensor.flatten().flip(0).view(tensor.shape),
    "of a transposed one": lambda tensor: tensor.T.contiguous().T if tensor.dim() == 2 else tensor,
    "behind another": lambda tensor: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_with_strides(kind, how, assign):
    """Whatever lies behind a tensor of a state dict: its numbers count."""
    sparse, _ = make(kind)
    state = sparse.state_dict()
    for key in state:
        layer = copy.deepcopy(sparse)
        odd = STRIDES[how](state[key])
        plain = {**state, key: odd.clone(memory_format=torch.contiguous_format)}
        try:
            layer.load_state_dict({**state, key: odd}, assign=assign)
        except RuntimeError:
            with pytest.raises(RuntimeError):  # its numbers are wrong, however they lie
                layer.load_state_dict(plain)
            continue
        expected = copy.deepcopy(sparse)
        expected.load_state_dict(plain)
        assert torch.equal(layer(X), expected(X))
        assert torch.equal(layer(X.bfloat16()), expected(X.bfloat16()))
        before = layer(X)
        if key == "weight_scales" and how == "every second":
            odd.zero_()  # the layer has its own
            assert torch.equal(layer(X), before)


@pytest.mark.parametrize(
    "odd", [lambda t: t.to_sparse(), lambda t: t.to("meta"), lambda t: torch._neg_view(t), lambda t: t.double()]
)
def test_state_dicts_that_are_no_memory_are_refused(odd):
    sparse, _ = make("int8")
    state, before = sparse.state_dict(), sparse(X)
    with pytest.raises(RuntimeError, match="weight_scales must be"):
        sparse.load_state_dict({**state, "weight_scales": odd(state["weight_scales"])})
    assert torch.equal(sparse(X), before)


def test_bias_put_there_by_hand():
    sparse, dense = make()
    sparse.bias.data = torch.linspace(0, 1, 42)[::2]
    close(sparse(X), dense(X) - dense.bias + sparse.bias)
    for bad in (torch.ones(20), torch.ones(21).double(), torch.ones(21, dtype=torch.int64)):
        sparse.bias.data = bad
        with pytest.raises(ValueError, match="`bias` must be a float tensor"):
            sparse(X)


@pytest.mark.parametrize("group_size", [2**31 - 1, 2**31, 2**32 + 4, 2**61, 45, 2**62, 2**70])
def test_large_groups(group_size):
    q, zeros, scales = torch.randint(0, 16, (5, 44)), torch.randint(0, 16, (5, 1)), torch.rand(5, 1)
    if group_size >= 2**62:
        with pytest.raises(ValueError, match="`group_size` must be"):
            SparseLinear.from_quantized(q, scales, zeros, group_size=group_size)
        return
    layer = SparseLinear.from_quantized(q, scales, zeros, torch.zeros(44, dtype=torch.int64), group_size=group_size)
    close(layer(X), X @ ((q - zeros) * scales).T)
    assert layer.group_size == group_size and torch.equal(layer.to_quantized()["q"].long(), q)
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(X), layer(X))


FORKED = """
import os, signal, sys
import torch
from peft_elastic import SparseLinear
torch.set_num_threads(2)
linear = torch.nn.Linear(512, 512, bias=False)
sparse, x = SparseLinear.from_linear(linear), torch.randn(4, 512)
torch.randn(2_000_000).exp()  # the threads of OpenMP are there now, and no kernel of ours has run on them
child = os.fork()
if child == 0:
    signal.alarm(60)
    with torch.no_grad():
        y = sparse(x)
        os._exit(0 if torch.equal(y, sparse(x)) and bool(y.any()) else 1)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system cannot fork")
def test_a_child_forked_before_the_first_kernel():
    result = fresh.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "done", result.stderr
