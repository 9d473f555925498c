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
"""The sparse kernels against float64, on every level that this processor can run."""

import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import fresh
from support.places import TESTS

from peft_elastic.layers import extension


if not extension.is_built():
    pytest.skip("the C++ extension is not built", allow_module_level=True)

from peft_elastic.layers import ops


USABLE = [level["name"] for level in extension.levels() if level["usable"]]
# Relative to sum |x| |w|: float32 accumulation, then one rounding to the type of x.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.fixture(autouse=True)
def restore():
    threads, level = torch.get_num_threads(), extension.selected_level()
    yield
    torch.set_num_threads(threads)
    extension.select_level(level)


def make(out_features, in_features, sparsity, kind, seed=0):
    """`(weight to pack, scales, the same in float64)`."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight *= torch.rand(out_features, in_features, generator=generator) >= sparsity
    if kind == "bf16":
        return weight.bfloat16(), None, weight.bfloat16().double()
    scales = weight.abs().amax(1) / 127
    values = torch.round(weight / torch.where(scales > 0, scales, 1.0)[:, None]).to(torch.int8)
    return values, scales, values.double() * scales[:, None].double()


def check(x, y, reference, bias=None):
    expected, size = x.double() @ reference.T, x.double().abs() @ reference.abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert (
        (y.double() - expected).abs()
        <= TOLERANCE[x.dtype] * size + torch.finfo(x.dtype).smallest_normal * TOLERANCE[x.dtype]
    ).all()


@pytest.mark.parametrize("level", USABLE)
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@settings(max_examples=60, deadline=None)
@given(
    out_features=st.integers(1, 80),
    in_features=st.integers(1, 300),
    rows=st.integers(1, 40),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.99, 1.0]),
    dtype=st.sampled_from(list(TOLERANCE)),
    with_bias=st.booleans(),
    threads=st.integers(1, 8),
    seed=st.integers(0, 2**16),
)
def test_product(level, kind, out_features, in_features, rows, sparsity, dtype, with_bias, threads, seed):
    extension.select_level(level)
    torch.set_num_threads(threads)
    weight, scales, reference = make(out_features, in_features, sparsity, kind, seed)
    x = torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias = torch.randn(out_features).to(dtype) if with_bias else None
    check(x, ops.sparse_linear(x, ops.pack_dense(weight), scales, bias, out_features), reference, bias)


@pytest.mark.parametrize("level", USABLE)
@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 2, 3, 31, 32, 33, 63, 64, 200])
def test_batches_of_a_wide_layer(level, kind, rows, monkeypatch):
    monkeypatch.setattr(ops, "DENSE_ROWS", 64)  # less takes the portable level less time
    extension.select_level(level)
    weight, scales, reference = make(200, 1536, 0.5, kind)
    x = torch.randn(rows, 1536)
    check(x, ops.sparse_linear(x, ops.pack_dense(weight), scales, None, 200), reference)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_same_bits_with_any_number_of_threads(kind):
    weight, scales, _ = make(300, 257, 0.5, kind)
    packed, x = ops.pack_dense(weight), torch.randn(5, 257)
    results = []
    for threads in range(1, 9):
        torch.set_num_threads(threads)
        results.append(ops.sparse_linear(x, packed, scales, None, 300))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("level", USABLE)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 17, 32, 40])
@pytest.mark.parametrize("in_features", [200, 1536])
def test_int8_activations(level, rows, in_features):
    extension.select_level(level)
    weight, scales, reference = make(50, in_features, 0.5, "int8")
    x = torch.randn(rows, in_features)
    x[rows // 2] = 0
    step = x.abs().amax(1, keepdim=True) / 127
    rounded = torch.round(x / torch.where(step > 0, step, 1.0)) * step
    y = ops.sparse_linear(x, ops.pack_dense(weight), scales, None, 50, "int8")
    check(rounded, y, reference)
    x[0, 0] = float("inf")
    y = ops.sparse_linear(x, ops.pack_dense(weight), scales, None, 50, "int8")
    assert y[0].isnan().all() and y[1:].isfinite().all()


@pytest.mark.parametrize("level", USABLE)
def test_int8_products_do_not_saturate(level):
    """The largest products of either sign, side by side: instructions of 16 bits would cut them off."""
    extension.select_level(level)
    signs = torch.randint(0, 2, (32, 300)) * 2 - 1
    signs[:4] = torch.tensor([1, -1, 1, -1])[:, None]
    packed = ops.pack_dense((127 * signs).to(torch.int8))
    x = (torch.randint(0, 2, (5, 300)) * 2 - 1).float()
    x[:2] = torch.tensor([1.0, -1.0])[:, None]
    y = ops.sparse_linear(x, packed, torch.full((32,), 1 / 127), None, 32, "int8")
    torch.testing.assert_close(y, x @ signs.T.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("level", USABLE)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values_spread_as_in_a_dense_layer(level, value):
    extension.select_level(level)
    weight, _, reference = make(40, 70, 0.5, "bf16")
    weight[5, 3] = reference[5, 3] = value
    for rows in (1, 4):
        x = torch.randn(rows, 70)
        x[0, 9] = value
        y = ops.sparse_linear(x, ops.pack_dense(weight), None, None, 40)
        expected = x.double() @ reference.T
        assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(y.isinf(), expected.isinf())


def test_rounding_to_half_precision():
    """The conversions, over the whole range of float16, subnormal numbers and overflow included."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    identity = ops.pack_dense(torch.eye(1).bfloat16())
    y = ops.forward(values[:, None][:63], identity, None, None, 1)
    for part in values.split(63):
        y = ops.forward(part[:, None], identity, None, None, 1)[:, 0]
        assert torch.equal(y.nan_to_num(7.0), part.nan_to_num(7.0)) and torch.equal(y.isnan(), part.isnan())
    thirds = torch.tensor([[1 / 3, 65519.0, 65520.0, 1e-8, 3e-8, 5.9e-8, 6.1e-5, 1e6]]).T
    y = ops.forward(
        torch.ones(1, 1, dtype=torch.float16), ops.pack_dense(torch.zeros(8, 1).bfloat16()), None, thirds[:, 0], 8
    )
    assert torch.equal(y[0], thirds[:, 0].half())


def test_strides_and_empty_input():
    weight, _, reference = make(24, 48, 0.5, "bf16")
    packed = ops.pack_dense(weight)
    wide = torch.randn(4, 3, 96)
    for x in (wide[..., ::2], wide[..., :48], wide[:, :, 48:].transpose(0, 1), wide[1, 1, :48], wide[:0, :, :48]):
        y = ops.sparse_linear(x, packed, None, None, 24)
        assert y.shape == (*x.shape[:-1], 24)
        if x.numel():
            check(x, y, reference)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 70), st.integers(1, 200), st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.integers(0, 99))
def test_pack_and_unpack_are_inverse(kind, out_features, in_features, sparsity, seed):
    weight, scales, reference = make(out_features, in_features, sparsity, kind, seed)
    packed = ops.pack_dense(weight)
    bitmask, values = ops.unpack(packed)
    assert torch.equal(ops.pack(bitmask, values, in_features), packed)
    assert ops.describe(packed)[:4] == (out_features, in_features, int(weight.count_nonzero()), kind)
    assert torch.equal(ops.to_dense(packed, scales, torch.float32), reference.float())


def test_negative_zeros_are_zeros():
    assert ops.describe(ops.pack_dense(torch.tensor([[-0.0, 1.0]], dtype=torch.bfloat16))).nnz == 1


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(["bf16", "int8"]),
    st.integers(0, 10**6),
    st.integers(1, 255),
    st.sampled_from(["flip", "cut", "grow"]),
)
def test_damaged_buffers_are_refused_or_harmless(kind, position, change, how):
    weight, _, _ = make(20, 70, 0.5, kind)
    packed = ops.pack_dense(weight)
    if how == "flip":
        packed[position % packed.numel()] ^= change
    elif how == "cut":
        packed = packed[: position % packed.numel()].clone()
    else:
        packed = torch.cat([packed, packed.new_zeros(1 + position % 300)])
    try:
        bitmask, values = ops.unpack(packed)
    except ValueError:
        return
    assert how == "flip"
    ops.pack(bitmask, values, ops.describe(packed).in_features)


@pytest.mark.parametrize(
    ("bitmask", "values", "in_features", "message"),
    [
        ([[0b11]], [1.0], 8, "2 bits set, but there are 1 values"),
        ([[0b1]], [1.0], 9, "bitmask has 1 bytes, expected 2"),
        ([[0b10000000]], [1.0], 7, "behind in_features"),
        ([[0b1]], [0.0], 8, "stored value is zero"),
        ([[0b1]], [1.0], 0, "in_features must be"),
        ([[0b1]], [1.0], 2**40, "in_features must be"),
    ],
)
def test_pack_refuses(bitmask, values, in_features, message):
    with pytest.raises(ValueError, match=message):
        ops.pack(torch.tensor(bitmask, dtype=torch.uint8), torch.tensor(values, dtype=torch.bfloat16), in_features)


def test_int8_values_end_at_127():
    with pytest.raises(ValueError, match="-128"):
        ops.pack_dense(torch.tensor([[-128]], dtype=torch.int8))


def test_wrong_arguments():
    weight, scales, _ = make(8, 16, 0.5, "int8")
    packed, x = ops.pack_dense(weight), torch.randn(2, 16)
    for arguments, message in [
        ((torch.randn(2, 15), packed, scales, None, 8), "do not fit"),
        ((x, packed, scales, None, 9), "do not fit"),
        ((x.double(), packed, scales, None, 8), "`x` must be"),
        ((x, packed, None, None, 8), "scales go with"),
        ((x, packed, scales[:-1], None, 8), "`scales`"),
        ((x, packed, scales, torch.ones(7), 8), "`bias`"),
        ((x, packed, scales, None, 8, "int4"), "`activations`"),
        ((x, packed[:64], scales, None, 8), "shorter than its header"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.sparse_linear(*arguments)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_gradients(kind):
    weight, scales, reference = make(40, 33, 0.5, kind)
    packed = ops.pack_dense(weight)
    x, bias = torch.randn(3, 2, 33, requires_grad=True), torch.randn(40, requires_grad=True)
    seed = torch.randn(3, 2, 40)
    ops.sparse_linear(x, packed, scales, bias, 40).backward(seed)
    torch.testing.assert_close(x.grad, (seed.double() @ reference).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.grad, seed.sum((0, 1)), rtol=1e-5, atol=1e-5)


def test_weights_have_no_gradient():
    weight, scales, _ = make(8, 16, 0.5, "int8")
    with pytest.raises(ValueError, match="no gradient"):
        ops.sparse_linear(torch.randn(2, 16), ops.pack_dense(weight), scales.requires_grad_(), None, 8)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_operator_contract(kind):
    weight, scales, _ = make(40, 33, 0.5, kind)
    arguments = (torch.randn(3, 33, requires_grad=True), ops.pack_dense(weight), scales, torch.randn(40), 40)
    torch.library.opcheck(torch.ops.peft_elastic.sparse_linear.default, arguments)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        weight, _, self.reference = make(32, 64, 0.5, "bf16")
        self.register_buffer("packed", ops.pack_dense(weight))

    def forward(self, x):
        return torch.relu(ops.sparse_linear(x * 2, self.packed, None, None, 32))


def test_compile_and_export():
    layer, x = Layer(), torch.randn(3, 64)
    expected = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    rows = torch.export.Dim("rows", min=2, max=50)
    exported = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: rows}})
    assert torch.equal(exported.module()(x), expected)
    y = torch.randn(7, 64)
    assert torch.equal(exported.module()(y), layer(y))


def test_inference_mode_and_autocast():
    layer, x = Layer(), torch.randn(3, 64)
    expected = layer(x)
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), expected)


def make_work(seed):
    weight, _, reference = make(64, 96, 0.5, "bf16", seed)
    x, packed = torch.randn(3, 96), ops.pack_dense(weight)
    y = ops.sparse_linear(x, packed, None, None, 64)
    check(x, y, reference)
    return x, packed, y


def repeat(work):
    """Whether the kernel gives the same again. It alone: after a fork torch's own matrix product hangs (OpenMP)."""
    x, packed, y = work
    return all(torch.equal(ops.forward(x, packed, None, None, 64), y) for _ in range(50))


def test_calls_from_several_threads():
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(repeat, map(make_work, range(12))))


def repeat_on_two_threads(work):
    torch.set_num_threads(2)
    return repeat(work)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(method):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system cannot {method}")
    torch.set_num_threads(2)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert all(pool.map_async(repeat_on_two_threads, map(make_work, range(4))).get(timeout=120))


OWN_POOL = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
sys.path[:0] = {paths!r}
import torch
from peft_elastic.layers import extension
from test_kernels import make_work, repeat
extension._C.use_openmp(0, 0, 0)
torch.set_num_threads(4)
works = [make_work(seed) for seed in range(4)]
with ThreadPoolExecutor(4) as pool:
    assert all(pool.map(repeat, works))
child = os.fork()
if child == 0:
    os._exit(0 if repeat(works[0]) else 1)
assert os.waitpid(child, 0)[1] == 0
print("done")
"""


def test_pool_of_its_own():
    script = OWN_POOL.format(paths=[str(Path(__file__).parent), str(TESTS)])
    result = fresh.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180)
    assert result.stdout.strip() == "done", result.stderr


def test_level_from_the_environment():
    def run(level):
        code = "from peft_elastic.layers import extension; print(extension.selected_level())"
        environment = {**os.environ, "PEFT_ELASTIC_ISA": level}
        return fresh.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)

    assert run("portable").stdout.strip() == "portable"
    failed = run("sse9")
    assert failed.returncode and "PEFT_ELASTIC_ISA" in failed.stderr and "'portable'" in failed.stderr
