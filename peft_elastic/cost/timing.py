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
"""How long a linear layer takes here, dense or sparse: measured once a machine, and kept in a file."""

from __future__ import annotations

import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock

from ..common import assets
from ..common.documents import FINITE, ListOf, MapOf, read_json
from ..common.writing import atomic_write_text
from ..layers import extension, ops
from ..layers.values import Sizes, parse_values
from ..version import __version__


_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 5, 200, 0.2
_MAX_COPIES_BYTES = 2**30
_LOCK_SECONDS = 10  # a process that was stopped while it writes must not stop the others
_SPARSITY_STEP = 0.05

_known: dict[str, list[float]] | None = None  # what the file holds


# Faster by less than that is within the noise of the measurement.
CLEARLY_FASTER = 1.05


class Timing(NamedTuple):
    """Medians of one call, in seconds, the weights not in the caches."""

    dense: float
    sparse: float


class DenseLayer(NamedTuple):
    """A dense linear layer and the number of rows of activations that one call of it gets."""

    out_features: int
    in_features: int
    bias: bool
    rows: int
    dtype: torch.dtype


def timings_file() -> Path:
    """Where the measurements are kept."""
    return assets.home() / "kernel_timings.json"


def clock(device: torch.device | str = "cpu") -> Callable[[], float]:
    """The clock to time with what ends with a value of this device. One thread is timed by the processor time it takes, which does
    not grow when other processes compete for the core; several, which wait for each other, and other devices, which the processor
    may wait for asleep, by the time that passes."""
    fine = hasattr(time, "thread_time") and time.get_clock_info("thread_time").resolution <= 1e-6
    alone = torch.get_num_threads() == 1 and torch.device(device).type == "cpu"
    return time.thread_time if fine and alone else time.perf_counter


def measure(
    out_features: int,
    in_features: int,
    sparsity: float,
    value_dtype: str,
    linear_dtype: torch.dtype,
    group_size: int | None = None,
    rows: int = 1,
) -> Timing:
    """Time a dense layer of `linear_dtype` against a sparse one with random weights.

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
        rows (`int`, defaults to 1): of activations.
    """
    rounded = 0.5 if not parse_values(value_dtype)[1] else round(round(sparsity / _SPARSITY_STEP) * _SPARSITY_STEP, 2)
    layer = [out_features, in_features, rounded, value_dtype, str(linear_dtype).removeprefix("torch.")]
    layer += [] if group_size is None else [group_size]
    layer += [] if rows == 1 else [f"{rows} rows"]
    key = json.dumps([*_machine(), *layer])
    known = _all_known()
    if len(known.get(key, ())) != 2:
        known[key] = list(_time(out_features, in_features, rounded, value_dtype, linear_dtype, group_size, rows))
        _write({key: known[key]})
    return Timing(*known[key])


def measure_dense(layers: Collection[DenseLayer]) -> dict[DenseLayer, float]:
    """Seconds of one call of dense layers, which take turns, so that what else happens on the machine hits all alike.

    As with `measure`, the weights are read from memory, the medians are kept in `timings_file()` and not measured again, and
    hold for this machine and number of threads. The extension is not needed.
    """
    known, keys = _all_known(), {}
    for layer in layers:
        kind = ["dense", *layer[:-1], str(layer.dtype).removeprefix("torch.")]
        keys[layer] = json.dumps([*_machine(), *kind])
    missing = [layer for layer in keys if len(known.get(keys[layer], ())) != 1]
    if missing:
        new = {keys[layer]: [seconds] for layer, seconds in zip(missing, _time_dense(missing), strict=True)}
        known.update(new)
        _write(new)
    return {layer: known[key][0] for layer, key in keys.items()}


def _all_known() -> dict[str, list[float]]:
    global _known
    if _known is None:
        _known = _read()
    return _known


def _machine() -> list[Any]:
    """What a measurement depends on besides the layer."""
    report = extension.cpu_report()
    if report is None or extension._C is None:
        return [
            platform.processor() or platform.machine(),
            None,
            torch.get_num_threads(),
            torch.__version__,
            __version__,
        ]
    built = Path(str(extension._C.__file__)).stat().st_mtime_ns
    return [
        report["brand"],
        extension.selected_level(),
        torch.get_num_threads(),
        torch.__version__,
        __version__,
        built,
    ]


def _read() -> dict[str, list[float]]:
    """What the file holds; nothing, with a warning, if it is damaged: it is a cache, so measure again."""
    try:
        data = MapOf(ListOf(FINITE)).check(read_json(timings_file()), "it")
    except OSError:  # it is not there, or there is no place for it
        return {}
    except ValueError as error:
        warnings.warn(f"The kernels are timed again: their timings on file are damaged ({error}).", stacklevel=4)
        return {}
    return {key: entry for key, entry in data.items() if all(value > 0 for value in entry)}


def _write(entries: dict[str, list[float]]) -> None:
    try:
        file = timings_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock"), timeout=_LOCK_SECONDS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the damage that this mends
                kept = _read()
            atomic_write_text(file, json.dumps({**kept, **entries}, indent=0))
    except (OSError, NotImplementedError):
        return  # no folder that can be written to or locked: the measurement lasts as long as the process


@torch.no_grad()
def _time(
    out_features: int,
    in_features: int,
    sparsity: float,
    value_dtype: str,
    linear_dtype: torch.dtype,
    group_size: int | None,
    rows: int,
) -> Timing:
    generator = torch.Generator("cpu").manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator, device="cpu")
    weight *= torch.rand(out_features, in_features, generator=generator, device="cpu") >= sparsity
    x = torch.randn(rows, in_features, generator=generator, device="cpu").to(linear_dtype)
    value_format, stored_sparse = parse_values(value_dtype)
    if value_format.bits is None:
        tensors = value_format.compress(weight)
    else:
        assert group_size is not None
        zero = 2 ** (value_format.bits - 1)
        groups = torch.full((out_features, -(-in_features // group_size)), zero, device="cpu")
        codes = torch.randint(zero + 1, 2 * zero, weight.shape, generator=generator, device="cpu")
        codes.masked_fill_(weight == 0, zero)
        tensors = value_format.compress(codes, groups.float(), groups, None, group_size, stored_sparse)
    sizes = Sizes(out_features, in_features, int(torch.count_nonzero(weight)), group_size or 0, stored_sparse)
    packed, scales = value_format.pack(tensors, sizes)

    def dense(copy: torch.Tensor) -> None:
        torch.nn.functional.linear(x, copy)

    def sparse(copy: torch.Tensor) -> None:
        ops.forward(x, copy, scales, None, out_features)

    contenders: list[tuple[Callable[[torch.Tensor], None], list[torch.Tensor]]] = [
        (dense, _copies(weight.to(linear_dtype))),
        (sparse, _copies(packed)),
    ]
    seconds: list[list[float]] = [[], []]
    now = clock()
    start = time.perf_counter()
    for round_ in range(_MAX_ROUNDS):
        if round_ >= _MIN_ROUNDS and time.perf_counter() - start > _SECONDS:
            break
        for (call, copies), times in zip(contenders, seconds, strict=True):
            copy = copies[round_ % len(copies)]
            before = now()
            call(copy)
            times.append(now() - before)
    # the first call of each starts threads and loads code
    return Timing(*(statistics.median(times[1:]) for times in seconds))


@torch.no_grad()
def _time_dense(layers: list[DenseLayer]) -> list[float]:
    generator = torch.Generator("cpu").manual_seed(0)
    pools = {}
    for dtype in {layer.dtype for layer in layers}:
        largest = max(layer.out_features * layer.in_features for layer in layers if layer.dtype == dtype)
        block = torch.randn(2**20, generator=generator, device="cpu").to(dtype)
        pools[dtype] = block.repeat(-(-max(_wanted_bytes() // block.element_size(), largest) // len(block)))
    inputs = [
        torch.randn(layer.rows, layer.in_features, generator=generator, device="cpu").to(layer.dtype)
        for layer in layers
    ]
    biases = [
        torch.zeros(layer.out_features, dtype=layer.dtype, device="cpu") if layer.bias else None for layer in layers
    ]
    seconds: list[list[float]] = [[] for _ in layers]
    at = dict.fromkeys(pools, 0)
    now = clock()
    start = time.perf_counter()
    for round_ in range(_MAX_ROUNDS):
        if round_ > _MIN_ROUNDS and time.perf_counter() - start > _SECONDS * len(layers):
            break
        for layer, x, bias, times in zip(layers, inputs, biases, seconds, strict=True):
            pool, size = pools[layer.dtype], layer.out_features * layer.in_features
            if at[layer.dtype] + size > len(pool):
                at[layer.dtype] = 0
            weight = pool[at[layer.dtype] : at[layer.dtype] + size].view(layer.out_features, layer.in_features)
            at[layer.dtype] += -(-size // 64) * 64
            before = now()
            torch.nn.functional.linear(x, weight, bias)
            times.append(now() - before)
    return [statistics.median(times[1:]) for times in seconds]


def _copies(tensor: torch.Tensor) -> list[torch.Tensor]:
    size = tensor.numel() * tensor.element_size()
    return [tensor, *(tensor.clone() for _ in range(-(-_wanted_bytes() // size) - 1))]


def _wanted_bytes() -> int:
    """Of weights, so that none of them is still in the caches when its turn comes again."""
    report = extension.cpu_report()
    last_level = (report["cache_bytes"]["l3"] or report["cache_bytes"]["l2"]) if report else 0
    return min(2 * (last_level or 32 * 2**20), _MAX_COPIES_BYTES)
