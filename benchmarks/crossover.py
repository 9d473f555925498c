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
"""From how many rows on torch's dense product of an expanded weight is faster than the sparse kernel.

    python benchmarks/crossover.py --out benchmarks/results

Prompts have many rows, and a product of many rows is bound by arithmetic, not by memory. For each shape, type of the
activations and number of rows: the sparse kernel, the same layer as `ops.forward` would do it beyond `ops.DENSE_ROWS`
(expand the weight, then torch), and torch alone on a dense weight. bf16 values, 50% zeros, in turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _support import RESULTS, describe_machine, machine, summarize, table, usable_cores, write_into

from peft_elastic.common.writing import atomic_write_text
from peft_elastic.layers import extension, ops


SHAPES = ((4096, 4096), (1536, 576))  # out_features, in_features
ROWS = (16, 64, 128, 256, 512, 1024)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = ("kernel", "expanded", "torch")


def ways(out_features: int, in_features: int, dtype: torch.dtype) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    weight *= torch.rand(out_features, in_features, generator=generator) >= 0.5
    packed, dense = ops.pack_dense(weight.bfloat16()), weight.to(dtype)

    def forced(limit: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            ops.DENSE_ROWS = limit
            return ops.forward(x, packed, None, None, out_features)

        return call

    return {"kernel": forced(2**62), "expanded": forced(0), "torch": lambda x: torch.nn.functional.linear(x, dense)}


def measure(shape: tuple[int, int], dtype: str, rows: int, threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    x = torch.randn(rows, shape[1], dtype=DTYPES[dtype])
    calls = ways(*shape, DTYPES[dtype])
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(1 + rounds):  # the first warms up
        for way in WAYS:
            start = time.perf_counter()
            calls[way](x)
            seconds[way].append(time.perf_counter() - start)
    return {
        "shape": "x".join(map(str, shape)),
        "activations": dtype,
        "rows": rows,
        "threads": threads,
        **{way: summarize(seconds[way][1:]) for way in WAYS},
    }


def report(results: dict[str, Any]) -> str:
    lines = []
    for row in results["rows"]:
        times = [
            f"{row[way]['median'] * 1e3:.2f} ({row[way]['p10'] * 1e3:.2f} to {row[way]['p90'] * 1e3:.2f})"
            for way in WAYS
        ]
        ratios = [f"{row[way]['median'] / row['kernel']['median']:.2f}x" for way in WAYS[1:]]
        lines.append([row["shape"], row["activations"], str(row["threads"]), str(row["rows"]), *times, *ratios])
    header = [
        "shape",
        "activations",
        "threads",
        "rows",
        "kernel, ms",
        "expanded, ms",
        "dense, ms",
        "expanded / kernel",
        "dense / kernel",
    ]
    return (
        f"{describe_machine(results['machine'])} Kernel level {results['level']}. Medians (10th to 90th percentile).\n\n"
        f"{table(header, lines)}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, usable_cores()}))
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of crossover.json and .md, default %(default)s"
    )
    parser.add_argument("--document", type=Path, help="also put the table into this file (docs/performance.md)")
    parser.add_argument("--smoke", action="store_true", help="tiny layers, few rounds: the figures mean nothing")
    args = parser.parse_args(argv)
    if not ops.is_available():
        parser.error("the C++ extension is not there: `peft-elastic info` says how to get it")
    shapes, rows, rounds = (((64, 96),), (2, 16), 2) if args.smoke else (SHAPES, ROWS, args.rounds)
    with torch.inference_mode():
        measured = [
            measure(shape, dtype, count, threads, rounds)
            for shape in shapes
            for dtype in DTYPES
            for threads in args.threads
            for count in rows
        ]
    results = {"machine": machine(), "level": extension.selected_level(), "rounds": rounds, "rows": measured}
    markdown = report(results)
    print(markdown)
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(args.out / "crossover.json", json.dumps(results))
    atomic_write_text(args.out / "crossover.md", markdown + "\n")
    if args.document is not None:
        write_into(args.document, "crossover", markdown)


if __name__ == "__main__":
    main()
