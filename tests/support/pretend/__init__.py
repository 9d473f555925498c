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
"""A second device for tests on machines without a GPU: `load()` compiles device.cpp and makes "pretend:0" and "pretend:1" known to torch.

What runs there is computed by the CPU, on memory that nothing but its operators can read. So the values are those of the CPU, and what
takes the one device for the other fails as it would on a GPU. What a GPU has of its own (order of sums, streams, speed, Triton) it
has not.

A process has one such device for the rest of its life: tests on it run in processes of their own.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from packaging.version import Version


NAME = "pretend"
CARDS = 2
SOURCE = Path(__file__).parent / "device.cpp"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def why_not() -> str | None:
    """What is missing for it, or None."""
    if sys.platform != "linux":
        return "device.cpp is for Linux"
    if COMPILER is None or shutil.which(COMPILER) is None:
        return "there is no C++ compiler"
    if Version(torch.__version__) < Version("2.13"):
        return "device.cpp is written for the headers of torch 2.13 and newer"
    return None


def compiled() -> Path:
    """The library, made anew where the source, torch or the compiler is another one than before."""
    command = [
        COMPILER,
        "-std=c++17",
        "-O0",
        "-w",
        "-fPIC",
        "-shared",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
    ]
    home = Path(torch.__file__).parent
    command += [f"-I{home / 'include'}", str(SOURCE), f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
    key = hashlib.sha256(SOURCE.read_bytes() + " ".join([*map(str, command), torch.__version__]).encode()).hexdigest()[
        :16
    ]
    folder = Path(tempfile.gettempdir()) / f"peft-elastic-pretend-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to somebody else.")
    library = folder / f"{key}.so"
    with FileLock(folder / "lock"):
        if not library.exists():
            subprocess.run([*command, "-o", f"{library}.unfinished"], check=True)
            os.replace(f"{library}.unfinished", library)
    return library


@functools.cache
def load() -> None:
    torch.ops.load_library(str(compiled()))
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    _autocast()


def launched() -> int:
    """The operators that have computed or copied something on the cards so far."""
    return torch.ops.pretend.launched()


def waited() -> int:
    """How often the host has needed a value of a card so far, and a GPU would have had to finish what it was at."""
    return torch.ops.pretend.waited()


def _module() -> types.ModuleType:
    """What torch looks for in `torch.cuda`, `torch.xpu`, ..."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.init = module._lazy_init = lambda: None
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: CARDS
    module.current_device = lambda: torch.ops.pretend.current_device()
    module.set_device = lambda device: torch.ops.pretend.set_device(torch.device(device).index or 0)
    module.synchronize = lambda device=None: None
    module.empty_cache = lambda: None
    # one generator, that of the CPU, draws for all
    module.manual_seed = module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=NAME: torch.get_rng_state()
    module.set_rng_state = lambda state, device=NAME: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return module


# Products in the dtype of autocast, and sums of many values in float32: of the lists for CUDA, what the models of the tests use.
_LOWER = ("mm", "matmul", "bmm", "linear", "addmm", "baddbmm", "scaled_dot_product_attention")
_FLOAT32 = (
    "softmax.int",
    "log_softmax.int",
    "nll_loss",
    "layer_norm",
    "rsqrt",
    "pow.Tensor_Scalar",
    "cross_entropy_loss",
)
_kept: list[torch.library.Library] = []


def _autocast() -> None:
    library = torch.library.Library("aten", "IMPL")
    everything = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel)
    _kept.extend((library, everything))
    for name in (*_LOWER, *_FLOAT32):
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(operator, _in_dtype(operator, None if name in _LOWER else torch.float32), "AutocastPrivateUse1")


def _in_dtype(operator: Any, dtype: torch.dtype | None) -> Any:
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def call(*args: Any, **kwargs: Any) -> Any:
        target = dtype or torch.get_autocast_dtype(NAME)

        def cast(value: Any) -> Any:
            fits = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(target) if fits and value.device.type == NAME else value

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*map(cast, args), **{key: cast(value) for key, value in kwargs.items()})

    return call
