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
"""A CUDA device without a GPU: fake tensors, which have a device, a type and a shape and no numbers, go through real forward
and backward passes. What cannot run on a GPU without stopping for it, or not at all, raises: reading a number (`.item()`, `if
tensor:`, `torch.equal`), shapes that depend on values, tensors of two devices in one operator, copies to the CPU.

    script = '''
    from support.fake_device import fake_cuda
    with fake_cuda() as operators:
        model = build().to("cuda")
        ...
    print(operators.total)
    '''
    output = run_with_fake_cuda(script)

A script needs an interpreter of its own, as the device has to be there before torch is imported. It is a small library,
compiled once for each version of torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from support.compiling import COMPILER
from support.operators import Operators
from support.places import REPOSITORY, TESTS


_SOURCE = TESTS / "support" / "fake_cuda.cpp"
_OLDEST_TORCH = "2.13"  # the C++ interface of devices changes; this is the oldest that was tried
_PRELUDE = """
import ctypes
ctypes.CDLL({folder!r} + "/libtorch_global_deps.so", mode=ctypes.RTLD_GLOBAL)
ctypes.CDLL({library!r})
"""


def run_with_fake_cuda(script: str, *arguments: str, env: dict[str, str] | None = None) -> str:
    """Run a script in a fresh interpreter where `fake_cuda` works, and return what it prints. The test is skipped where the
    device cannot be compiled for want of a compiler or a torch without CUDA."""
    torch = _torch_folder()
    code = _PRELUDE.format(folder=str(torch / "lib"), library=str(_library(torch))) + script
    path = os.pathsep.join([str(REPOSITORY), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


class _Watch(Operators):
    """Counts operators, and refuses copies from the device to the CPU, for which it would have to finish everything."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import torch

        result = super().__torch_dispatch__(function, types, args, kwargs)
        if isinstance(result, torch.Tensor) and result.device.type == "cpu":
            given = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
            if any(tensor.device.type != "cpu" for tensor in given):
                raise RuntimeError(f"{function} copies from the device to the CPU, which waits for the device.")
        return result


@contextmanager
def fake_cuda(autocast: Any = None) -> Iterator[Operators]:
    """Inside of it tensors are fake, and may be made on "cuda", and the operators that are not views are counted.

    Args:
        autocast: a dtype for autocast on "cuda"; `torch.autocast` itself looks for a driver.
    """
    import torch

    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with _mode(), _Watch() as operators:
        if autocast is not None:
            torch.set_autocast_enabled("cuda", True)
            torch.set_autocast_dtype("cuda", autocast)
        try:
            yield operators
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])


def to_fake_cuda(module: Any) -> Any:
    """Inside of `fake_cuda`: a module that was built outside of it, with fake tensors on the device in place of its own. What
    is tied stays tied."""
    import torch

    made: dict[int, Any] = {}

    def fake(tensor: Any) -> Any:
        if tensor is None or isinstance(tensor, torch._subclasses.FakeTensor):
            return tensor
        if id(tensor) not in made:
            on_device = _mode().from_tensor(tensor).detach().to("cuda")
            if isinstance(tensor, torch.nn.Parameter):
                on_device = torch.nn.Parameter(on_device, tensor.requires_grad)
            made[id(tensor)] = on_device
        return made[id(tensor)]

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            tensors.update({name: fake(tensor) for name, tensor in tensors.items()})
    return module


@cache
def _mode() -> Any:
    """One for the process: tensors of two modes do not go together."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _library(torch_folder: Path) -> Path:
    import torch

    if COMPILER is None:
        pytest.skip("no C++ compiler for the fake device")
    if torch.version.cuda is not None or not sys.platform.startswith("linux"):
        pytest.skip("a fake CUDA device needs a torch for CPUs, on Linux")
    if Version(torch.__version__) < Version(_OLDEST_TORCH):
        pytest.skip(f"the fake device needs torch {_OLDEST_TORCH} or newer")
    key = hashlib.sha256(_SOURCE.read_bytes() + f"{torch.__version__} {torch_folder}".encode()).hexdigest()[:16]
    target = REPOSITORY / "build" / "fake_device" / f"{key}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:  # several processes of pytest may come here at once
        made = Path(folder) / target.name
        lib = torch_folder / "lib"
        options = ["-std=c++20", "-w", "-O0", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        linked = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"]
        subprocess.run([COMPILER, *options, abi, str(_SOURCE), "-o", str(made), *linked], check=True)
        made.replace(target)
    return target
