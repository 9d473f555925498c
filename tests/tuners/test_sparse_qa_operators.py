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
"""The effective weight as it is made on a GPU, without one: how many operators that takes, how much memory, and that nothing
waits."""

import weakref

import pytest
import torch
from support.fake_device import run_with_fake_cuda
from support.operators import Operators, benchmark
from support.sparse_qa import KINDS, adapted, layers
from test_sparse_qa_product import GRIDS, problem
from torch.utils._python_dispatch import TorchDispatchMode

from peft_elastic.tuners.sparse_qa_lora import devices
from peft_elastic.tuners.sparse_qa_lora.effective_weight import effective_linear


# what one layer may launch in both passes
BOUNDS = {"sparse": 25, "sparse-half": 25, "qa": 45, "qa-half": 45, "qa-act-order": 45}


@pytest.fixture
def on_a_gpu():
    with benchmark.as_on_a_gpu():
        yield


def counted(kind, size, dtype, autocast, bias=False):
    base = torch.nn.Linear(size, size, bias=bias, dtype=dtype)
    base.weight.data.mul_(torch.rand(size, size) > 0.5)
    model = benchmark.adapted(kind, base, rank=32)
    return benchmark.count(model, torch.randn(4, size, dtype=dtype), autocast)


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_few_operators(kind, bias, dtype, autocast, on_a_gpu):
    forward, backward = counted(kind, 96, dtype, autocast, bias)
    # the one more is the cast of the bias
    assert forward.total + backward.total <= BOUNDS[kind] + bias, (forward.counts, backward.counts)
    assert not {
        name
        for name in forward.counts | backward.counts
        if "equal" in name or "scalar_dense" in name or "nonzero" in name
    }


@pytest.mark.parametrize("kind", ["sparse-half", "qa-half"])
def test_they_are_as_few_in_a_large_layer(kind, on_a_gpu):
    """One panel is all of 4096 x 4096."""
    (forward, backward), small = (counted(kind, size, torch.float32, True) for size in (4096, 96))
    assert (forward.counts, backward.counts) == (small[0].counts, small[1].counts)
    assert forward.total + backward.total <= BOUNDS[kind]


def test_elastic_ranks_cost_two_operators(on_a_gpu):
    """The gradients of A and B, which are of all ranks, are filled up with zeros."""
    lora, largest, half = (
        sum(p.total for p in counted(k, 96, torch.float32, False)) for k in ("lora", "elastic", "elastic-half")
    )
    assert lora == largest and half - lora == 2


class Memory(TorchDispatchMode):
    """The bytes of all that is made while it is active, as long as it exists: the most of them at one time."""

    def __init__(self, *there):
        super().__init__()
        self.now = self.most = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in there}  # before, and views of it are nothing new

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage):
        address = storage._cdata
        if address not in self.known:
            self.known.add(address)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._forget, address, storage.nbytes())

    def _forget(self, address, count):
        self.known.discard(address)
        self.now -= count


@pytest.mark.parametrize("grid", ["none", "4 bits groups", "act-order"])
@pytest.mark.parametrize("minus", [None, "weight", "grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("panels", [1, 4])
def test_the_memory_that_is_allowed_is_enough(grid, minus, dtype, panels):
    """Inputs, outputs and factors are small here; all the rest is matrices of the size of a panel."""
    shape = (256, 512)
    options = {"bits": 4, "group_size": 32} if grid == "4 bits groups" else GRIDS[grid]
    x, weight, _, lora_B, lora_A, made = problem(shape, rank=1, grid=options, dtype=dtype, batch=(1,))
    minus = problem(shape, grid={"bits": 2, "group_size": -1}, dtype=dtype)[5] if minus == "grid" else minus
    width = max(4, dtype.itemsize)
    allowed = 4 * width * weight.numel() // panels
    x, small = x.detach().requires_grad_(), 20_000
    before = devices.set_panel_memory(allowed / 2**20)
    try:
        assert devices.panel_elements(weight.device, lora_A.dtype) == weight.numel() // panels
        with Memory(x, weight, lora_B, lora_A) as memory:
            output = effective_linear(x, weight, None, lora_B, lora_A, True, made, minus)
            output.sum().backward()
    finally:
        devices.set_panel_memory(before)
    assert weight.numel() // panels * width <= memory.most <= allowed + small, (memory.most, allowed)


@pytest.mark.parametrize("grid", ["none", "4 bits", "act-order"])
@pytest.mark.parametrize("minus", [None, "weight"])
def test_nothing_of_the_size_of_the_weight_is_kept(grid, minus, on_a_gpu):
    x, weight, bias, lora_B, lora_A, grid = problem((64, 48), grid=GRIDS[grid], dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = effective_linear(x, weight, bias, lora_B, lora_A, True, grid, minus)
    large = [t for t in kept if t.numel() >= weight.numel() // 2]
    assert kept and all(t.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() for t in large)
    held = [value for value in vars(result.grad_fn).values() if isinstance(value, torch.Tensor)]
    assert all(tensor.numel() < weight.numel() // 2 for tensor in held)


def test_adapters_that_round_to_one_grid_are_compared_once():
    """A GPU would be waited for in every layer and pass."""
    model = adapted(**KINDS["sparse and quantised"])
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    model.train()
    inputs = torch.ones(1, 4, dtype=torch.long)
    comparisons = []
    for _ in range(3):
        with Operators() as operators:
            model(inputs).logits.sum().backward()
        comparisons.append(sum(count for name, count in operators.counts.items() if "equal" in name))
    assert comparisons[0] >= 3 * len(layers(model)) and comparisons[1:] == [0, 0]


# -- on a device, without one ------------------------------------------------------------------------------------------

FAKE = """
import itertools
import torch
from support.fake_device import fake_cuda, to_fake_cuda
from support.operators import benchmark
from support.sparse_qa import KINDS
from transformers.pytorch_utils import Conv1D
from peft import get_peft_model
from peft_elastic import SparseQALoraConfig
from peft_elastic.quantization import QuantizedLinear, fit_grid
from peft_elastic.tuners.sparse_qa_lora import devices

# (name, model, inputs)
cases = []
for kind, dtype in itertools.product(["sparse-half", "qa-half", "qa-act-order", "elastic-half"],
                                     [torch.float32, torch.bfloat16, torch.float16, torch.float64]):
    base = torch.nn.Linear(64, 64, bias=True, dtype=dtype)
    cases.append((f"{kind} {dtype}", benchmark.adapted(kind, base, 8), (4, 64), dtype))
settings = {"r": 8, "elastic_ranks": [8, 4], "target_modules": ["linear"]}
for kind, options in KINDS.items():
    for fan_in_fan_out in (False, True):
        layer = Conv1D(48, 64) if fan_in_fan_out else torch.nn.Linear(64, 48)
        model = torch.nn.Sequential()
        model.add_module("linear", layer)
        config = SparseQALoraConfig(**settings, **options, lora_dropout=0.1, fan_in_fan_out=fan_in_fan_out)
        model = get_peft_model(model, config).train()
        cases.append((f"{kind} {type(layer).__name__} dropout", model, (2, 3, 64), torch.float32))
for kind, dropout in itertools.product(KINDS, (0.0, 0.1)):
    linear = torch.nn.Linear(64, 48)
    model = torch.nn.Sequential()
    model.add_module("linear", QuantizedLinear.from_linear(linear, fit_grid(linear.weight, 4, 16)))
    own = {} if kind == "sparse" else {"quantization_aware": True, "sparse_adapter": "sparse" in kind}
    config = SparseQALoraConfig(**settings, **own, lora_dropout=dropout)
    model = get_peft_model(model, config).train()
    cases.append((f"{kind} on a quantised base, dropout {dropout}", model, (4, 64), torch.float32))

for megabytes, autocast, chosen in ((None, None, cases), (None, torch.bfloat16, cases), (1e-6, torch.bfloat16, cases[::3])):
    devices.set_panel_memory(megabytes)
    for name, model, shape, dtype in chosen:
        with fake_cuda(autocast) as operators:
            to_fake_cuda(model)
            output = model(torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True))
            output.float().square().sum().backward()
            trained = [p for p in model.parameters() if p.requires_grad]
            assert trained and all(p.grad is not None and p.grad.device.type == "cuda" for p in trained), name
            assert output.device.type == "cuda"
            for p in trained:
                p.grad = None
        assert operators.total > 0
        print(name, megabytes, autocast)
"""


def test_nothing_waits_for_the_device_and_nothing_is_left_on_the_cpu():
    """Both passes of every kind of layer on a fake GPU, in one panel and in several, with and without autocast."""
    lines = run_with_fake_cuda(FAKE).splitlines()
    assert len(lines) == len(set(lines)) == 2 * 28 + 10
