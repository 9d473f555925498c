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
"""Which is faster here for one token, the dense layer or the sparse one: measured once a machine, and kept in a file."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock

from .. import _native, assets
from ..utils import atomic_write_text
from ..version import __version__
from . import ops
from .format import compress, compress_int4


_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 5, 200, 0.2
_MAX_COPIES_BYTES = 2**30
_SPARSITY_STEP = 0.05

_known: dict[str, list[float]] | None = None  # what the file holds


class Timing(NamedTuple):
    """Medians of one call with one row of activations, in seconds, the weights not in the caches."""

    dense: float
    sparse: float


def timings_file() -> Path:
    """Where the measurements are kept."""
    return assets.home() / "kernel_timings.json"


def measure(
    out_features: int,
    in_features: int,
    sparsity: float,
    value_dtype: str,
    linear_dtype: torch.dtype,
    group_size: int | None = None,
) -> Timing:
    """Time a dense layer of `linear_dtype` against a sparse one with random weights, for one row of activations.

    The weights are read from memory, as in a model that does not fit into the caches: copies take turns until they
    are twice as large as the last-level cache. The two are timed alternately. A result holds for `torch.get_num_threads()`
    threads, this processor, the kernel level in use and this build, and for sparsities that round to the same 5%; it is
    kept in `timings_file()` and not measured again.

    Args:
        out_features, in_features (`int`): of the layer.
        sparsity (`float`): share of zeros, 0 to 1.
        value_dtype (`str`): "bf16", "int8", "int4", or "int4 dense", which stores its zeros and so has one speed for all
            sparsities.
        linear_dtype (`torch.dtype`): float32, bfloat16 or float16, of the dense layer and the activations.
        group_size (`int`, *optional*): of int4.
    """
    global _known
    rounded = 0.5 if value_dtype == "int4 dense" else round(round(sparsity / _SPARSITY_STEP) * _SPARSITY_STEP, 2)
    layer = [out_features, in_features, rounded, value_dtype, str(linear_dtype).removeprefix("torch.")]
    layer += [] if group_size is None else [group_size]
    key = json.dumps([*_machine(), *layer])
    if _known is None:
        _known = _read(timings_file())
    if key not in _known:
        _known[key] = list(_time(out_features, in_features, rounded, value_dtype, linear_dtype, group_size))
        _write(key, _known[key])
    return Timing(*_known[key])


def _machine() -> list[Any]:
    """What a measurement depends on besides the layer."""
    report = _native.cpu_report()
    assert report is not None and _native._C is not None
    built = Path(str(_native._C.__file__)).stat().st_mtime_ns
    return [report["brand"], _native.selected_level(), torch.get_num_threads(), torch.__version__, __version__, built]


def _read(file: Path) -> dict[str, list[float]]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return {
            key: [float(value) for value in entry]
            for key, entry in data.items()
            if len(entry) == 2 and all(value > 0 for value in entry)
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, OSError):
        return {}  # damaged or unreadable: a cache, so measure again


def _write(key: str, entry: list[float]) -> None:
    file = timings_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            atomic_write_text(file, json.dumps({**_read(file), key: entry}, indent=0))
    except OSError:
        return  # a cache folder that cannot be written to: the measurement lasts as long as the process


@torch.no_grad()
def _time(
    out_features: int,
    in_features: int,
    sparsity: float,
    value_dtype: str,
    linear_dtype: torch.dtype,
    group_size: int | None,
) -> Timing:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight *= torch.rand(out_features, in_features, generator=generator) >= sparsity
    x = torch.randn(1, in_features, generator=generator).to(linear_dtype)
    scales = None
    if value_dtype in ("bf16", "int8"):
        tensors = compress(weight, value_dtype)
        packed = ops.pack(tensors["weight_bitmask"], tensors["weight_values"], in_features)
        scales = tensors.get("weight_scales")
    else:
        assert group_size is not None
        groups = torch.full((out_features, -(-in_features // group_size)), 8)
        codes = torch.where(weight == 0, 8, torch.randint(9, 16, weight.shape, generator=generator))
        tensors = compress_int4(codes, groups.float(), groups, None, group_size, sparse=value_dtype == "int4")
        packed = ops.pack_int4(tensors, in_features, group_size)

    def dense(copy: torch.Tensor) -> None:
        torch.nn.functional.linear(x, copy)

    def sparse(copy: torch.Tensor) -> None:
        ops.forward(x, copy, scales, None, out_features)

    contenders: list[tuple[Callable[[torch.Tensor], None], list[torch.Tensor]]] = [
        (dense, _copies(weight.to(linear_dtype))),
        (sparse, _copies(packed)),
    ]
    seconds: list[list[float]] = [[], []]
    start = time.perf_counter()
    for round_ in range(_MAX_ROUNDS):
        if round_ >= _MIN_ROUNDS and time.perf_counter() - start > _SECONDS:
            break
        for (call, copies), times in zip(contenders, seconds, strict=True):
            copy = copies[round_ % len(copies)]
            before = time.perf_counter()
            call(copy)
            times.append(time.perf_counter() - before)
    # the first call of each starts threads and loads code
    return Timing(*(statistics.median(times[1:]) for times in seconds))


def _copies(tensor: torch.Tensor) -> list[torch.Tensor]:
    report = _native.cpu_report()
    last_level = (report["cache_bytes"]["l3"] or report["cache_bytes"]["l2"]) if report else 0
    size = tensor.numel() * tensor.element_size()
    wanted = min(2 * (last_level or 32 * 2**20), _MAX_COPIES_BYTES)
    return [tensor, *(tensor.clone() for _ in range(-(-wanted // size) - 1))]
