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
"""How fast one sparse linear layer is on this CPU, and how fast the alternatives are, in the same run.

    python benchmarks/kernels.py --out benchmarks/results
    python benchmarks/kernels.py --deepsparse-python DEEPSPARSE_ENV/bin/python     # with DeepSparse 1.8 as a peer
    python benchmarks/kernels.py --only-avx2                                        # as on a processor without AVX512
    python benchmarks/kernels.py --smoke                                            # tiny layers, seconds

y = x W^T for a random W of each shape, pruned at random (unstructured), by:

- `sparse`: the kernels of this package, on every level (instruction set) that the machine can run;
- `own dense bf16`: csrc/dense_gemv.cpp, a dense bf16 product that runs at the speed of memory (batch 1);
- `torch fp32`, `torch bf16`, `torch int8` (dynamic quantisation, FBGEMM) on the dense weight, `torch CSR` (float32);
- `DeepSparse` (float32, the same sparsity) in a process of its own, if its interpreter is given.

All cases of a shape take turns, in an order that changes from round to round, so that what else happens on the machine
meets all of them. Weights come from memory, not from a cache: a case goes through copies of its weight that are more
than twice as large as the last-level cache together. A sample is one call, or of small layers the mean of some calls
on different copies. GB/s counts the bytes of the weight as stored; the share is that of the fastest streaming read of
the same run and number of threads.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from peft_elastic.common.progress import progress_bar
from peft_elastic.layers import extension, ops
from peft_elastic.layers.values import FORMATS, ROUNDED

from . import (
    RESULTS,
    DenseKernel,
    Worker,
    dense_kernel_of,
    describe_machine,
    machine,
    summarize,
    table,
    usable_cores,
    write,
    write_into,
)


SHAPES = ("4096x4096", "11008x4096", "4096x11008", "576x1536")  # out_features x in_features
BATCHES = (1, 2, 4, 8, 16, 32)
SPARSITIES = (0.5, 0.7)
DEEPSPARSE_BATCHES = (1, 2, 4, 8, 16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SAMPLE_BYTES = 16 * 2**20  # of weights that a sample reads at least
SEED = 0
READ = "streaming read"


class Case(NamedTuple):
    """One thing that is timed. `sample` takes the number of threads and returns the seconds of a call."""

    engine: str
    batch: int
    weight_bytes: int
    sample: Callable[[int], float]
    level: str = ""
    values: str = ""  # of the weight
    sparsity: float = 0.0
    activations: str = "fp32"


def l3_bytes() -> int:
    return (extension.cpu_report() or {}).get("cache_bytes", {}).get("l3", 0) or 32 * 2**20


def rotating(
    call: Callable[[Any], Any], weights: list[Any], weight_bytes: int, level: str = ""
) -> Callable[[int], float]:
    """A `Case.sample` that calls `call` with each weight in turn."""
    calls = min(len(weights), math.ceil(SAMPLE_BYTES / weight_bytes))
    position = 0

    def sample(threads: int) -> float:
        nonlocal position
        if level:
            extension.select_level(level)
        turn = [weights[(position + i) % len(weights)] for i in range(calls)]
        position += calls
        start = time.perf_counter()
        for weight in turn:
            call(weight)
        return (time.perf_counter() - start) / calls

    return sample


def copies(make: Callable[[], Any], weight_bytes: int) -> list[Any]:
    """So many of a weight that going through them leaves none in the caches."""
    count = max(2, 1 + math.ceil(2 * l3_bytes() / weight_bytes))
    return [make() for _ in range(min(count, 256))]  # fewer only for toy layers


# -- the cases of one shape ------------------------------------------------------------------------------------------


def check(name: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    error = (got.float() - wanted).abs().max().item()
    if not error <= tolerance * wanted.abs().max().item():
        raise RuntimeError(f"{name} is off by {error}, where the largest output is {wanted.abs().max().item()}.")


def sparse_cases(weight: Tensor, sparsity: float, inputs: dict[int, Tensor], levels: list[str]) -> list[Case]:
    cases = []
    for values in ROUNDED:
        stored = FORMATS[values].compress(weight)
        scales = stored.get("weight_scales")

        def pack(stored: dict[str, Tensor] = stored) -> Tensor:
            return ops.pack(stored["weight_bitmask"], stored["weight_values"], weight.shape[1])

        weight_bytes = pack().numel() + (0 if scales is None else 4 * len(scales))
        packed = copies(pack, weight_bytes)
        exact = ops.to_dense(packed[0], scales, torch.float32)
        for level in levels:
            for batch, x in inputs.items():
                if level == "portable" and batch > 1:
                    continue  # there for correctness
                kinds = ["fp32"] if level == "portable" else ["fp32", "bf16"]
                for kind in kinds + ["int8"] * (values == "int8" and batch > 1 and level != "portable"):
                    at = x.to(DTYPES.get(kind, torch.float32))
                    arguments = (scales, None, weight.shape[0], "int8" if kind == "int8" else "float")

                    def call(weight: Tensor, at: Tensor = at, arguments: tuple = arguments) -> Tensor:
                        return ops.forward(at, weight, *arguments)

                    extension.select_level(level)
                    name = f"{level} {values} {sparsity} x {kind}"
                    check(name, call(packed[0]), at.float() @ exact.T, 0.01 if kind == "fp32" else 0.05)
                    sample = rotating(call, packed, weight_bytes, level)
                    cases.append(Case("sparse", batch, weight_bytes, sample, level, values, sparsity, kind))
    return cases


def torch_cases(weight: Tensor, inputs: dict[int, Tensor]) -> list[Case]:
    cases = []
    for kind, dtype in DTYPES.items():
        weight_bytes = weight.numel() * dtype.itemsize
        dense = copies(lambda dtype=dtype: weight.to(dtype, copy=True), weight_bytes)
        for batch, x in inputs.items():
            sample = rotating(lambda w, x=x.to(dtype): nn.functional.linear(x, w), dense, weight_bytes)
            cases.append(Case(f"torch {kind}", batch, weight_bytes, sample, values=kind, activations=kind))
    cases.extend(int8_cases(weight, inputs))
    return cases


def int8_cases(weight: Tensor, inputs: dict[int, Tensor]) -> list[Case]:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)

    def quantize() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao moves to torchao
            return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)[0]

    torch.backends.quantized.engine = "fbgemm"  # here never slower than the default, "x86"
    quantized = copies(quantize, weight.numel())
    cases = []
    for batch, x in inputs.items():
        sample = rotating(lambda layer, x=x: layer(x), quantized, weight.numel())
        cases.append(Case("torch int8", batch, weight.numel(), sample, values="int8"))
    return cases


def csr_cases(weight: Tensor, sparsity: float, inputs: dict[int, Tensor]) -> list[Case]:
    def convert() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that CSR is in beta state
            return weight.to_sparse_csr()

    parts = (convert().values(), convert().col_indices(), convert().crow_indices())
    weight_bytes = sum(part.numel() * part.element_size() for part in parts)
    matrices = copies(convert, weight_bytes)
    cases = []
    for batch, x in inputs.items():
        columns = x[0] if batch == 1 else x.T
        sample = rotating(lambda w, columns=columns: w @ columns, matrices, weight_bytes)
        cases.append(Case("torch CSR", batch, weight_bytes, sample, values="fp32", sparsity=sparsity))
    return cases


def dense_cases(weight: Tensor, x: Tensor, kernels: dict[str, DenseKernel]) -> list[Case]:
    """Our own dense bf16, and the streaming read."""
    weight_bytes = 2 * weight.numel()
    dense = copies(lambda: weight.bfloat16(), weight_bytes)
    buffers = [torch.ones(4 * l3_bytes(), dtype=torch.uint8) for _ in range(2)]
    y = torch.empty(weight.shape[0])
    cases = []
    for instructions, kernel in kernels.items():

        def gemv(w: Tensor, threads: int, kernel: DenseKernel = kernel) -> None:
            kernel.gemv(w.data_ptr(), *weight.shape, x.data_ptr(), y.data_ptr(), threads)

        def read(buffer: Tensor, threads: int, kernel: DenseKernel = kernel) -> None:
            kernel.read(buffer.data_ptr(), buffer.numel(), threads)

        gemv(dense[0], 2)
        check(f"dense {instructions}", y, (dense[0].float() @ x[0]), 1e-3)
        for engine, call, operands, size, values in (
            ("own dense bf16", gemv, dense, weight_bytes, "bf16"),
            (READ, read, buffers, buffers[0].numel(), ""),
        ):
            sample = threaded(call, operands, size)
            cases.append(Case(engine, 1, size, sample, level=instructions, values=values))
    return cases


def threaded(call: Callable[[Any, int], None], operands: list[Any], size: int) -> Callable[[int], float]:
    """`rotating` for a call that takes the number of threads."""
    samples = {n: rotating(lambda w, n=n: call(w, n), operands, size) for n in range(1, usable_cores() + 1)}
    return lambda threads: samples[threads](threads)


def deepsparse_cases(
    worker: Worker, shape: tuple[int, int], sparsity: float, batches: list[int], threads: list[int]
) -> list[Case]:
    worker_copies = math.ceil(SAMPLE_BYTES / (4 * shape[0] * shape[1] * (1 - sparsity)))
    cases = []
    for batch in batches:
        keys = {n: f"{sparsity} {batch} {n}" for n in threads}
        for n, key in keys.items():
            worker.ask(load=key, shape=shape, sparsity=sparsity, batch=batch, threads=n, copies=worker_copies)

        def sample(threads: int, keys: dict[int, str] = keys) -> float:
            return worker.ask(run=keys[threads])["seconds"]

        # How it stores the weight is its own affair, so there are no bytes to count.
        cases.append(Case("DeepSparse", batch, 0, sample, values="fp32", sparsity=sparsity))
    return cases


# -- measuring -------------------------------------------------------------------------------------------------------


def measure_shape(name: str, args: argparse.Namespace, worker: Worker | None) -> list[dict[str, Any]]:
    """A row for each case and number of threads."""
    outs, ins = shape = tuple(map(int, name.split("x")))
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(shape, generator=generator) / ins**0.5
    rank = torch.rand(shape, generator=generator)
    inputs = {batch: torch.randn(batch, ins, generator=generator) for batch in args.batches}
    kernels = {name: DenseKernel(name) for name in dense_instructions(args.levels)}

    cases = torch_cases(weight, inputs) + dense_cases(weight, torch.randn(1, ins, generator=generator), kernels)
    for sparsity in args.sparsities:
        pruned = torch.where(rank < sparsity, 0, weight)
        cases += sparse_cases(pruned, sparsity, inputs, args.levels) + csr_cases(pruned, sparsity, inputs)
        if worker is not None:
            batches = [batch for batch in args.batches if batch in DEEPSPARSE_BATCHES]
            cases += deepsparse_cases(worker, shape, sparsity, batches, args.threads)

    seconds: dict[tuple[int, int], list[float]] = {(n, i): [] for n in args.threads for i in range(len(cases))}
    rng = np.random.default_rng(SEED)
    for number in progress_bar(range(-1, args.rounds), desc=f"{name}: rounds of {len(cases)} cases"):
        for threads in args.threads:
            torch.set_num_threads(threads)
            for index in rng.permutation(len(cases)):
                value = cases[index].sample(threads)
                if number >= 0:  # the round before the first warms up
                    seconds[threads, index].append(value)
    if worker is not None:
        worker.ask(forget=True)

    rows = []
    for (threads, index), values in seconds.items():
        case = cases[index]._asdict()
        del case["sample"]
        rows.append({"shape": name, "threads": threads, **case, "seconds": summarize(values), "fastest": min(values)})
    return rows


def dense_instructions(levels: list[str]) -> list[str]:
    return sorted({name for name in map(dense_kernel_of, levels) if name is not None})


def measure_packing(shape: str, repeats: int = 5) -> dict[str, Any]:
    """Seconds that one thread needs to bring a layer into the form of the kernels, from dense and from the form on disk."""
    outs, ins = map(int, shape.split("x"))
    weight = torch.where(torch.rand(outs, ins) < 0.5, 0, torch.randn(outs, ins)).bfloat16()
    torch.set_num_threads(1)
    stored = FORMATS["bf16"].compress(weight)
    ways = {
        "from dense": lambda: ops.pack_dense(weight),
        "from disk": lambda: ops.pack(stored["weight_bitmask"], stored["weight_values"], ins),
    }
    result: dict[str, Any] = {"shape": shape}
    for way, call in ways.items():
        values = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            values.append(time.perf_counter() - start)
        result[way] = summarize(values)
    return result


def add_comparisons(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Adds GB/s, share of the bandwidth and speed-ups to the rows; returns the bandwidth (bytes/s) by number of threads."""
    bandwidth: dict[int, float] = {}
    for row in rows:
        if row["engine"] == READ:
            bandwidth[row["threads"]] = max(bandwidth.get(row["threads"], 0), row["weight_bytes"] / row["fastest"])
    for row in rows:
        median = row["seconds"]["median"]
        row["gigabytes_per_s"] = row["weight_bytes"] / median / 1e9
        if row["threads"] in bandwidth:
            row["share_of_bandwidth"] = row["weight_bytes"] / median / bandwidth[row["threads"]]
        if row["engine"] == "sparse":
            peers = {}
            for peer in rows:
                same = all(peer[key] == row[key] for key in ("shape", "threads", "batch"))
                dense = peer["engine"] == "own dense bf16" and peer["level"] == dense_kernel_of(row["level"])
                pruned = peer["engine"] in ("torch CSR", "DeepSparse") and peer["sparsity"] == row["sparsity"]
                if same and (dense or pruned or peer["engine"] in ("torch fp32", "torch bf16", "torch int8")):
                    peers[peer["engine"]] = peer["seconds"]["median"] / median
            row["speed_up_over"] = peers
    return bandwidth


# -- the bars --------------------------------------------------------------------------------------------------------


def select(rows: list[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The rows with these values; a tuple stands for any of its elements."""

    def fits(row: dict[str, Any]) -> bool:
        return all(row[key] in (value if isinstance(value, tuple) else (value,)) for key, value in wanted.items())

    return [row for row in rows if fits(row)]


def judge(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the kernels are to reach, and whether they do: the worst case of each bar, and all of its cases."""
    rows, bars = results["rows"], []

    def bar(name: str, level: str, wanted: float, cases: dict[str, float], below: bool = False) -> None:
        if cases:
            worst = (max if below else min)(cases, key=lambda key: cases[key])
            passed = cases[worst] <= wanted if below else cases[worst] >= wanted
            bars.append(
                {"bar": name, "level": level, "wanted": wanted, "worst": cases[worst], "at": worst, "passed": passed}
                | {"cases": cases}
            )

    one, shapes = min(results["settings"]["threads"]), results["settings"]["shapes"]
    most = max(results["settings"]["threads"])
    large = tuple(name for name in shapes if math.prod(map(int, name.split("x"))) > 4e6) or tuple(shapes)
    for level in results["settings"]["levels"]:
        if level == "portable":
            continue
        mine = select(rows, engine="sparse", level=level)
        single = select(mine, batch=1, threads=one)

        def over(peer: str, among: list[dict[str, Any]], **wanted: Any) -> dict[str, float]:
            return {
                describe_case(row): row["speed_up_over"][peer]
                for row in select(among, **wanted)
                if peer in row["speed_up_over"]
            }

        fp32 = {"values": "bf16", "activations": "fp32"}
        for sparsity, wanted in ((0.5, 1.5), (0.7, 1.8)):
            cases = over("own dense bf16", single, sparsity=sparsity, **fp32)
            bar(f"bf16 {sparsity:.0%} over our own dense bf16, batch 1", level, wanted, cases)
        cases = over("torch bf16", single, sparsity=0.5, values="bf16", activations="bf16", shape=large)
        bar("bf16 50% over torch bf16, batch 1, large shapes", level, 3.0, cases)
        cases = over("torch int8", single, sparsity=0.5, values="int8", activations="fp32")
        bar("int8 50% over torch int8, batch 1", level, 1.3, cases)
        cases = {
            describe_case(row): row["share_of_bandwidth"]
            for row in select(single, sparsity=0.5, shape=large, **fp32)
            if "share_of_bandwidth" in row
        }
        bar("bf16 50%: share of the bandwidth, batch 1, large shapes", level, 0.85, cases)

        batched = select(mine, batch=tuple(range(2, 17)), threads=one)
        some = select(batched, activations=("fp32", "bf16"))  # what is on by default
        cases = {}
        for row in some:
            peers = [
                row["speed_up_over"][peer] for peer in ("torch fp32", "torch bf16") if peer in row["speed_up_over"]
            ]
            if peers:
                cases[describe_case(row)] = min(peers)
        bar("over the faster of torch fp32 and bf16, batch 2 to 16", level, 1.0, cases)
        bar("over DeepSparse, batch 2 to 16", level, 1.0, over("DeepSparse", some))
        fastest: dict[str, float] = {}  # float or int8 activations, whichever is faster
        for row in select(batched, values="int8", activations=("fp32", "int8"), batch=tuple(range(4, 17))):
            key = f"{row['shape']}, {row['sparsity']:.0%}, batch {row['batch']}"
            fastest[key] = max(fastest.get(key, 0), row["speed_up_over"].get("torch int8", 0))
        bar("int8 over torch int8, batch 4 to 16", level, 1.0, fastest)

        scaling = {}
        for row in select(single, sparsity=0.5, shape=large, **fp32) if most > one else []:
            same = {
                key: row[key] for key in ("engine", "shape", "level", "batch", "values", "sparsity", "activations")
            }
            (many,) = select(rows, threads=most, **same)
            scaling[describe_case(row)] = row["seconds"]["median"] / many["seconds"]["median"]
        bar(f"bf16 50%: {most} threads over one, batch 1, large shapes", level, 0.9 * most, scaling)
    packing = results["packing"]
    cases = {way: packing[way]["median"] for way in packing if way != "shape"}
    bar(f"packing {packing['shape']} with one thread, seconds", "", 0.5, cases, below=True)
    return bars


def describe_case(row: dict[str, Any]) -> str:
    return f"{row['shape']}, {row['values']} {row['sparsity']:.0%}, batch {row['batch']}, {row['activations']} activations"


# -- report ----------------------------------------------------------------------------------------------------------


def label(row: dict[str, Any]) -> str:
    if row["engine"] == "sparse":
        kind = "" if row["activations"] == "fp32" else f", {row['activations']} activations"
        return f"sparse {row['values']} {row['sparsity']:.0%} ({row['level']}{kind})"
    sparsity = f" {row['sparsity']:.0%}" if row["sparsity"] else ""
    return f"{row['engine']}{sparsity}{' (' + row['level'] + ')' if row['level'] else ''}"


def report(results: dict[str, Any], short: bool = False) -> str:
    """The results as Markdown; `short`: without the tables of all batches."""
    rows, settings = results["rows"], results["settings"]
    bandwidth = ", ".join(f"{value / 1e9:.1f} GB/s with {n}" for n, value in results["bandwidth"].items())
    parts = [
        f"{describe_machine(results['machine'])} DeepSparse: {results['deepsparse'] or 'not in this run'}."
        + (" Everything held to AVX2." if settings["only_avx2"] else ""),
        f"Median of {settings['rounds']} rounds (10th to 90th percentile). Fastest streaming read by threads: {bandwidth}.",
        "### Bars",
        bars_table(results["bars"]),
    ]
    for shape in settings["shapes"]:
        parts += [f"### {shape}, batch 1", batch1_table(select(rows, shape=shape, batch=1), settings["threads"])]
        for threads in settings["threads"]:
            if len(settings["batches"]) > 1 and not short:
                at = select(rows, shape=shape, threads=threads)
                title = f"### {shape}, all batches, {threads} thread{'s' * (threads > 1)}: milliseconds"
                parts += [title, batches_table(at, settings["batches"])]
    return "\n\n".join(parts)


def bars_table(bars: list[dict[str, Any]]) -> str:
    header = ["bar", "level", "wanted", "worst case", "where", "passed"]
    lines = [
        [
            bar["bar"],
            bar["level"],
            f"{bar['wanted']:.2f}",
            f"{bar['worst']:.2f}",
            bar["at"],
            f"{'yes' if bar['passed'] else 'no'} ({count_passed(bar)} of {len(bar['cases'])} cases)",
        ]
        for bar in bars
    ]
    return table(header, lines)


def count_passed(bar: dict[str, Any]) -> int:
    below = bar["passed"] != (bar["worst"] >= bar["wanted"])
    return sum((value <= bar["wanted"]) if below else (value >= bar["wanted"]) for value in bar["cases"].values())


def batch1_table(rows: list[dict[str, Any]], threads: list[int]) -> str:
    peers = ("torch fp32", "torch bf16", "torch int8", "own dense bf16", "torch CSR", "DeepSparse")
    peers = tuple(peer for peer in peers if select(rows, engine=peer))
    header = ["", *(f"ms, {n} thread{'s' * (n > 1)}" for n in threads), "GB/s", "share", *(f"/ {p}" for p in peers)]
    lines = []
    for row in select(rows, threads=threads[0]):
        (*same,) = (other for other in rows if label(other) == label(row))
        times = [format_seconds(other["seconds"]) for other in same]
        if row["engine"] == READ:
            times = ["" for _ in times]
        speed = [f"{row['gigabytes_per_s']:.1f}", f"{row.get('share_of_bandwidth', math.nan):.0%}"]
        ups = row.get("speed_up_over", {})
        ups = [f"{ups[peer]:.2f}x" if peer in ups else "" for peer in peers]
        lines.append([label(row), *times, *(speed if row["weight_bytes"] else ["", ""]), *ups])
    return table(header, lines)


def format_seconds(seconds: dict[str, float]) -> str:
    return f"{seconds['median'] * 1e3:.3f} ({seconds['p10'] * 1e3:.3f} to {seconds['p90'] * 1e3:.3f})"


def batches_table(rows: list[dict[str, Any]], batches: list[int]) -> str:
    times: dict[str, dict[int, float]] = {}
    for row in rows:
        times.setdefault(label(row), {})[row["batch"]] = row["seconds"]["median"]
    lines = [
        [name, *(f"{by_batch[batch] * 1e3:.3f}" if batch in by_batch else "" for batch in batches)]
        for name, by_batch in times.items()
        if len(by_batch) > 1
    ]
    return table(["batch", *map(str, batches)], lines)


def plot(results: dict[str, Any]) -> Any:
    """For each shape: above, batch 1; below, all batches; fewest threads, fp32 activations, our best level; no CSR (slow)."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    settings = results["settings"]
    threads, level, shapes = min(settings["threads"]), settings["levels"][0], settings["shapes"]
    rows = []
    for row in select(results["rows"], threads=threads):
        shown = {
            "sparse": (level, "fp32"),
            "own dense bf16": (dense_kernel_of(level), "fp32"),
            READ: (),
            "torch CSR": (),
        }
        if shown.get(row["engine"], (row["level"], row["activations"])) == (row["level"], row["activations"]):
            rows.append(row)
    names = list(dict.fromkeys(label(row) for row in rows))
    colors = {name: colormaps["tab20"](index) for index, name in enumerate(names)}
    figure = Figure(figsize=(6 * len(shapes), 9))
    axes = figure.subplots(2, len(shapes), squeeze=False)
    for top, bottom, shape in zip(*axes, shapes, strict=True):
        for row in sorted(select(rows, shape=shape, batch=1), key=lambda row: -row["seconds"]["median"]):
            p10, median, p90 = (row["seconds"][key] * 1e3 for key in ("p10", "median", "p90"))
            top.barh(label(row), median, xerr=[[median - p10], [p90 - median]], color=colors[label(row)])
        top.set(title=f"{shape}, batch 1", xlabel="ms (median, 10th to 90th percentile)")
        for name in names:
            line = [row for row in select(rows, shape=shape) if label(row) == name]
            points = [1e3 * row["seconds"]["median"] for row in line]
            bottom.plot([row["batch"] for row in line], points, "o-", label=name, color=colors[name])
        bottom.set(title=f"{shape}, all batches", xscale="log", yscale="log", xlabel="batch", ylabel="ms")
        bottom.set_xticks(settings["batches"], map(str, settings["batches"]))
        bottom.set_xticks([], minor=True)
    figure.suptitle(
        f"{results['machine']['cpu']}, {threads} thread{'s' * (threads > 1)}, cold weights; sparse: {level}"
    )
    figure.tight_layout()
    figure.legend(
        *axes[1][0].get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2 * len(shapes)
    )
    return figure


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usable = [level["name"] for level in extension.levels() if level["usable"]]
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), metavar="ROWS")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), metavar="SHARE")
    parser.add_argument("--levels", nargs="+", choices=usable, default=usable, help="default: all usable ones")
    parser.add_argument(
        "--threads", nargs="+", type=int, default=sorted({1, usable_cores()}), help="default: 1 and all usable cores"
    )
    parser.add_argument("--rounds", type=int, default=21, help="samples of each case, default 21")
    parser.add_argument(
        "--deepsparse-python",
        default=os.environ.get("PEFT_ELASTIC_BENCH_DEEPSPARSE"),
        help="a Python with deepsparse 1.8 and onnx; default: $PEFT_ELASTIC_BENCH_DEEPSPARSE, else DeepSparse is left out",
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of kernels.json, .md and .png, default %(default)s"
    )
    parser.add_argument("--document", type=Path, help="also put the tables into this file (docs/performance.md)")
    parser.add_argument(
        "--only-avx2",
        action="store_true",
        help="hold everything to AVX2, the peers too, as on a processor that has no more; writes kernels-avx2 instead",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny layers, few rounds: the figures mean nothing")
    args = parser.parse_args(argv)
    if args.only_avx2:
        args.levels = ["avx2"]
        if torch.backends.cpu.get_cpu_capability() != "AVX2":
            parser.error("--only-avx2: torch was loaded without it; run benchmarks/kernels.py")
    if args.smoke:
        args.shapes, args.batches, args.rounds = ["64x96", "160x64"], [1, 2, 16], 3
    if not usable:
        parser.error("the C++ extension is not there: `peft-elastic info` says how to get it")
    if max(args.threads) > usable_cores():
        parser.error(f"--threads: this process may use {usable_cores()} cores")

    worker = deepsparse = None
    if args.deepsparse_python:
        worker = Worker.peer(args.deepsparse_python, "deepsparse_layer.py")
        tiny = {"shape": [16, 16], "sparsity": 0.5, "batch": 1, "threads": 1, "copies": 1}
        deepsparse = worker.ask(load="first", **tiny)["version"]
    rows = []
    with torch.inference_mode():
        for shape in args.shapes:
            rows += measure_shape(shape, args, worker)
        packing = measure_packing("64x96" if args.smoke else "4096x11008")
    if worker is not None:
        worker.close()
    bandwidth = add_comparisons(rows)
    kept = ("shapes", "batches", "sparsities", "levels", "threads", "rounds", "only_avx2")
    settings = {key: getattr(args, key) for key in kept}
    results: dict[str, Any] = {
        "machine": machine(),
        "deepsparse": deepsparse,
        "settings": settings,
        "bandwidth": bandwidth,
        "packing": packing,
        "rows": rows,
    }
    results["bars"] = judge(results)
    markdown = report(results)
    print(markdown)
    name = "kernels-avx2" if args.only_avx2 else "kernels"
    write(args.out, name, results, markdown, plot(results))
    if args.document is not None:
        write_into(args.document, name, report(results, short=True))
    return results
