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
"""The pretended device refuses what a GPU refuses, and computes what the CPU does: else the other tests here would show nothing."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from support import pretend
from support.places import TESTS


@pytest.fixture(autouse=True)
def _pretended(device):
    if device.type != pretend.NAME:
        pytest.skip(f"{device} is no pretended device")


def some(*sizes, on="pretend:0", seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(on)


def test_computes():
    a, b = some(5, 7), some(7, 3, seed=1)
    assert str(a.device) == "pretend:0" and str((a @ b).device) == "pretend:0"
    assert torch.equal((a @ b).cpu(), a.cpu() @ b.cpu())
    c = a.clone().requires_grad_()
    (c @ b).square().sum().backward()
    d = a.cpu().requires_grad_()
    (d @ b.cpu()).square().sum().backward()
    assert torch.equal(c.grad.cpu(), d.grad) and c.grad.device == a.device
    a[1:3].mul_(2.0)  # through a view
    assert torch.equal(a[1:3].cpu(), 2 * d.detach()[1:3])
    e = a.T[:, ::2].contiguous()
    assert torch.equal(e.cpu(), a.cpu().T[:, ::2])
    assert float(a[0, 0]) == float(a.cpu()[0, 0])


@pytest.mark.parametrize(
    "mix",
    [
        lambda a, b: a + b,
        lambda a, b: a @ b.T,
        lambda a, b: a.mul_(b),
        lambda a, b: torch.cat([a, b]),
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: a.index_select(0, torch.tensor([1], device=b.device)),
        lambda a, b: torch.nn.functional.linear(a, b),
        lambda a, b: torch.nn.functional.embedding(torch.tensor([1], device=b.device), a),
        lambda a, b: a.index_copy_(0, torch.tensor([1], device=a.device), b[:1]),
        lambda a, b: torch.mm(a, a.T, out=torch.empty(3, 3, device=b.device)),
        lambda a, b: torch.equal(a, b),
    ],
)
def test_mixed_devices_are_refused(mix):
    for b in (some(3, 4, on="cpu", seed=1), some(3, 4, on="pretend:1", seed=1)):
        with pytest.raises(RuntimeError, match="same device"):
            mix(some(3, 4), b)
        with pytest.raises(RuntimeError, match="same device"):
            mix(b, some(3, 4))


def test_what_a_gpu_takes():
    a = some(3, 4)
    assert torch.equal((a * torch.tensor(2.0)).cpu(), a.cpu() * 2)  # a scalar of the host
    assert torch.equal(a[torch.tensor([2, 0])].cpu(), a.cpu()[[2, 0]])  # indices of the host
    assert torch.equal(a.to("pretend:1").cpu(), a.cpu())


def test_nothing_else_reads_its_memory():
    a = some(3)
    with pytest.raises(TypeError, match="numpy"):
        a.numpy()
    code = "from support import pretend; pretend.load(); import torch, ctypes; ctypes.string_at(torch.ones(3, device='pretend').data_ptr(), 4)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(TESTS)}, capture_output=True
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr.decode()


def test_what_it_has_not():
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3, dtype=torch.float64, device="pretend")
    with pytest.raises(RuntimeError, match="generator"):
        some(3).normal_(generator=torch.Generator())

    @torch.library.custom_op("support::of_the_cpu", mutates_args=(), device_types="cpu")
    def of_the_cpu(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    with pytest.raises(NotImplementedError, match="of_the_cpu"):
        of_the_cpu(some(3))


def test_waiting_is_counted():
    a, before = some(3, 4), pretend.waited()
    (a @ a.T).relu_().sum()
    assert pretend.waited() == before
    for wait in (
        lambda: a.sum().item(),
        lambda: a.cpu(),
        lambda: a[a > 0],
        lambda: torch.equal(a, a),
        lambda: bool(a.any()),
    ):
        before = pretend.waited()
        wait()
        assert pretend.waited() > before


def test_autocast():
    a, b = some(3, 4), some(4, 5)
    with torch.autocast("pretend", dtype=torch.bfloat16):
        product = a @ b
        assert product.dtype == torch.bfloat16 and product.float().softmax(-1).dtype == torch.float32
        assert torch.nn.functional.linear(a, b.T).dtype == torch.bfloat16
    assert (a @ b).dtype == torch.float32
