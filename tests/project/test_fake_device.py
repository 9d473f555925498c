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
"""The fake CUDA device of the tests: it computes shapes, and what would make a GPU wait raises there."""

from support.fake_device import run_with_fake_cuda


SCRIPT = """
import torch
from support.fake_device import fake_cuda

WAITING = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: bool((x > 0).any()),
    "equal": lambda x: torch.equal(x, x),
    "nonzero": lambda x: x.nonzero(),
    "a mask as index": lambda x: x[x > 0],
    "two devices": lambda x: x + torch.ones(8),
    "to the CPU": lambda x: x.cpu(),
    "copied to the CPU": lambda x: torch.empty(4, 8).copy_(x),
    "list": lambda x: x.tolist(),
}
with fake_cuda(torch.bfloat16) as operators:
    x = torch.randn(4, 8, device="cuda", requires_grad=True)
    weight = torch.randn(16, 8, device="cuda", requires_grad=True)
    before = operators.total
    y = torch.nn.functional.linear(x, weight)
    y.float().sum().backward()
    print(y.dtype, y.device, x.grad.shape == x.shape, weight.grad.device, operators.total - before)
    for name, function in WAITING.items():
        try:
            function(x.detach())
        except Exception as error:
            print(name, "raises", type(error).__name__)
        else:
            print(name, "passes")
print(torch.is_autocast_enabled("cuda"))
"""


def test_the_fake_device_computes_both_passes_and_refuses_to_wait():
    lines = run_with_fake_cuda(SCRIPT).splitlines()
    dtype, device, *rest = lines[0].split()
    assert (dtype, device, rest[:2]) == ("torch.bfloat16", "cuda:0", ["True", "cuda:0"]) and int(rest[2]) > 5
    assert len(lines) == 11 and all(" raises " in line for line in lines[1:-1]), lines
    assert lines[-1] == "False"
