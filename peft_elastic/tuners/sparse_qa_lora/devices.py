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
"""What the effective weight is made with on which device: how much of it at a time, and whether Triton does it.

Two environment variables, read when this module is imported, choose otherwise (docs/training.md): PEFT_ELASTIC_PANEL_MB and
PEFT_ELASTIC_TRITON.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Optional, TypeVar

import torch

from ...layers.addresses import is_watched


_Made = TypeVar("_Made")

# Rows of W with so many elements make a product efficient on a CPU, and so many are faster gone over, several times, as they
# stay in its cache.
CPU_PANEL_ELEMENTS = 2**21
CPU_BLOCK_ELEMENTS = 2**16
# On other devices each operator costs microseconds whatever it does, and memory is quick to get: a panel is as large as this
# allows.
DEFAULT_MEGABYTES = 1024
# Matrices of the size of a panel that exist at one time, at most, in the dtype that E is made in.
_MATRICES = 4

TRITON_CHOICES = ("auto", "never", "always")
_TRITON_DEVICES = ("cuda", "xpu")  # "cuda" is AMD too


def _checked_megabytes(value: object, name: str) -> Optional[float]:
    if value is None or value == "":
        return None
    try:
        megabytes = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        megabytes = float("nan")
    if isinstance(value, bool) or not 0 < megabytes < float("inf"):
        raise ValueError(f"{name} must be a positive number of megabytes, got {value!r}.")
    return megabytes


def _checked_triton(value: str, name: str) -> str:
    if value not in TRITON_CHOICES:
        raise ValueError(f"{name} must be one of {list(TRITON_CHOICES)}, got {value!r}.")
    return value


_megabytes = _checked_megabytes(os.environ.get("PEFT_ELASTIC_PANEL_MB"), "Environment variable PEFT_ELASTIC_PANEL_MB")
_triton = _checked_triton(os.environ.get("PEFT_ELASTIC_TRITON") or "auto", "Environment variable PEFT_ELASTIC_TRITON")
_failure: Optional[str] = None  # why Triton is not used any more
_failing = threading.Lock()


# -- how much at a time --------------------------------------------------------------------------------------------------


def set_panel_memory(megabytes: Optional[float]) -> Optional[float]:
    """Choose how much memory the temporary matrices of one layer may take, from now on, in place of PEFT_ELASTIC_PANEL_MB.

    Args:
        megabytes: positive. It holds on every device: the CPU then computes as a GPU without Triton does, which is slower
            than what it does by itself. None is the default: `DEFAULT_MEGABYTES` on accelerators, pieces that fit into the
            cache on the CPU.

    Returns:
        What was chosen before.

    Raises:
        ValueError: for a number that is not positive.
    """
    global _megabytes
    before, _megabytes = _megabytes, _checked_megabytes(megabytes, "`megabytes`")
    return before


def works_in_cache(device: torch.device) -> bool:
    """Whether E is made on this device in pieces that fit into a cache, and not in matrices as large as memory allows."""
    return device.type == "cpu" and _megabytes is None


def panel_elements(device: torch.device, dtype: torch.dtype) -> int:
    """How many elements of a weight are worked on at a time, in matrices of `dtype`."""
    if works_in_cache(device):
        return CPU_PANEL_ELEMENTS
    megabytes = DEFAULT_MEGABYTES if _megabytes is None else _megabytes
    return int(megabytes * 2**20) // (_MATRICES * dtype.itemsize)


# -- Triton --------------------------------------------------------------------------------------------------------------


def set_triton(choice: str) -> str:
    """Choose whether Triton makes E, from now on, in place of PEFT_ELASTIC_TRITON.

    Args:
        choice: "auto", on GPUs if it is there, and torch does after it has failed once; "never"; "always", on any device,
            whose failures are raised (on the CPU it takes Triton's interpreter, TRITON_INTERPRET=1, which is for tests).

    Returns:
        What was chosen before.

    Raises:
        ValueError: for anything else.
    """
    global _triton, _failure
    before, _triton = _triton, _checked_triton(choice, "`choice`")
    _failure = None
    return before


def triton_is_for(tensor: torch.Tensor) -> bool:
    """Whether Triton is to be tried with tensors like this one."""
    if _triton == "never" or (
        _triton == "auto" and (_failure is not None or tensor.device.type not in _TRITON_DEVICES)
    ):
        return False
    plain = (
        type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided and not tensor.is_neg()
    )
    return plain and not is_watched()


def by_triton(compute: Callable[[ModuleType], _Made]) -> Optional[_Made]:
    """`compute` with the module of the kernels; None where Triton cannot run. Then a warning says why, once, and it is not
    tried again."""
    global _failure
    try:
        from . import in_triton

        return compute(in_triton)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # an import, a compiler that is missing, a driver that is too old, a chip that Triton does not know: any kind of error
        if _triton == "always":
            raise
        with _failing:
            first, _failure = _failure is None, f"{type(error).__name__}: {error}"
        if first and not isinstance(error, ModuleNotFoundError):
            warnings.warn(
                f"Triton does not work here ({_failure}); masked and quantisation-aware layers are computed with the "
                "operators of torch, which is slower. PEFT_ELASTIC_TRITON=never says so from the start, "
                "PEFT_ELASTIC_TRITON=always shows the error."
            )
        return None
