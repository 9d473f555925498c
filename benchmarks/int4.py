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
"""What int4 with group scales gains over bf16 and int8, on one layer, one row of activations and cold weights.

    python benchmarks/int4.py --out benchmarks/results
    python benchmarks/int4.py --smoke                       # tiny layers, seconds

Contenders, in turns (see _support/kernels.py): sparse int4, int8 and bf16 of the same sparsity, dense int4, our own dense
bf16, torch's dense bf16 and float32, and the streaming read. The sparse weights are pruned at random.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _support import RESULTS, DenseKernel, dense_kernel_of, describe_machine, machine, summarize, table, write_into
from _support.kernels import READ, Case, check, copies, dense_cases, rotating
from torch import Tensor

from peft_elastic.common.progress import progress_bar
from peft_elastic.common.writing import atomic_write_text
from peft_elastic.layers import extension, ops
from peft_elastic.layers.values import FORMATS, ROUNDED


SHAPES = ("4096x4096", "11008x4096", "4096x11008", "576x1536")  # out_features x in_features
SPARSITIES = (0.5, 0.7)
SEED = 0


def int4_tensors(weight: Tensor, group_size: int, sparse: bool) -> dict[str, Tensor]:
    """A grid of 4 bits with one scale for each group, zeros kept; how well it fits is not the question here."""
    outs, ins = weight.shape
    groups = -(-ins // group_size)
    padded = torch.zeros(outs, groups * group_size)
    padded[:, :ins] = weight
    scales = (padded.view(outs, groups, group_size).abs().amax(2) / 7).clamp_min(1e-3).half().float()
    q = 8 + torch.round(padded.view(outs, groups, group_size) / scales[:, :, None]).clamp(-8, 7).to(torch.int64)
    zeros = torch.full((outs, groups), 8)
    q = torch.where(
        (q == 8) & (padded.view_as(q) != 0), 9, q
    )  # what is not pruned stays so, whatever it is rounded to
    return FORMATS["int4"].compress(q.view(outs, -1)[:, :ins], scales, zeros, None, group_size, sparse)


def cases_of(weight: Tensor, rank: Tensor, x: Tensor, levels: list[str], group_sizes: list[int]) -> list[Case]:
    outs, ins = weight.shape
    cases: list[Case] = []

    def add(engine: str, values: str, sparsity: float, pack: Callable[[], Tensor], scales: Tensor | None) -> None:
        first = pack()
        weight_bytes = first.numel() + (0 if scales is None else 4 * outs)
        packed = copies(first.clone, weight_bytes)
        exact = x @ ops.to_dense(packed[0], scales, torch.float32).T
        for level in levels:
            extension.select_level(level)
            check(f"{level} {engine}", ops.forward(x, packed[0], scales, None, outs), exact, 0.01)

            def call(copy: Tensor) -> Tensor:
                return ops.forward(x, copy, scales, None, outs)

            cases.append(
                Case(engine, 1, weight_bytes, rotating(call, packed, weight_bytes, level), level, values, sparsity)
            )

    for sparsity in SPARSITIES:
        pruned = torch.where(rank < sparsity, 0, weight)
        for values in ROUNDED:
            stored = FORMATS[values].compress(pruned)
            bits, numbers = stored["weight_bitmask"], stored["weight_values"]
            add(
                f"sparse {values}", values, sparsity, lambda: ops.pack(bits, numbers, ins), stored.get("weight_scales")
            )
        for group_size in group_sizes:
            tensors = int4_tensors(pruned, group_size, sparse=True)
            add(
                f"sparse int4, groups of {group_size}",
                "int4",
                sparsity,
                lambda: ops.pack_int4(tensors, ins, group_size),
                None,
            )
    for group_size in group_sizes:
        tensors = int4_tensors(weight, group_size, sparse=False)
        add(f"dense int4, groups of {group_size}", "int4", 0.0, lambda: ops.pack_int4(tensors, ins, group_size), None)

    for name, dtype in (("torch bf16", torch.bfloat16), ("torch fp32", torch.float32)):
        weight_bytes = weight.numel() * dtype.itemsize
        dense = copies(lambda: weight.to(dtype, copy=True), weight_bytes)
        sample = rotating(lambda w, at=x.to(dtype): torch.nn.functional.linear(at, w), dense, weight_bytes)
        cases.append(Case(name, 1, weight_bytes, sample))
    kernels = {name: DenseKernel(name) for name in sorted({dense_kernel_of(level) for level in levels} - {None})}
    return cases + dense_cases(weight, x, kernels)


def measure_shape(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    outs, ins = map(int, name.split("x"))
    generator = torch.Generator().manual_seed(SEED)
    weight, rank = torch.randn(outs, ins, generator=generator), torch.rand(outs, ins, generator=generator)
    cases = cases_of(weight, rank, torch.randn(1, ins, generator=generator), args.levels, args.group_sizes)
    seconds: list[list[float]] = [[] for _ in cases]
    order = np.random.default_rng(SEED)
    for number in progress_bar(range(-1, args.rounds), desc=f"{name}: rounds of {len(cases)} cases"):
        for index in order.permutation(len(cases)):
            value = cases[index].sample(1)
            if number >= 0:  # the round before the first warms up
                seconds[index].append(value)
    rows = []
    read = max(
        case.weight_bytes / min(times) for case, times in zip(cases, seconds, strict=True) if case.engine == READ
    )
    for case, times in zip(cases, seconds, strict=True):
        row = {"shape": name, **{key: value for key, value in case._asdict().items() if key != "sample"}}
        # the share of what the same shape's streaming read reached, as memory is shared with other machines
        speed = case.weight_bytes / float(np.median(times))
        over = {
            (f"{peer.engine} {peer.sparsity:.0%}" if peer.engine.startswith("sparse") else peer.engine): float(
                np.median(np.divide(peer_times, times))
            )
            for peer, peer_times in zip(cases, seconds, strict=True)
            if peer.level in ("", case.level, dense_kernel_of(case.level))
        }
        rows.append(
            row | {"seconds": summarize(times), "gigabytes_per_s": speed / 1e9, "share": speed / read, "over": over}
        )
    return rows


def report(results: dict[str, Any]) -> str:
    parts = [
        f"{describe_machine(results['machine'])} One thread, one row of float32 activations, median of {results['rounds']} rounds "
        "(10th to 90th percentile); ratios are medians of the ratios of a round."
    ]
    for shape in dict.fromkeys(row["shape"] for row in results["rows"]):
        lines = []
        for row in results["rows"]:
            if row["shape"] != shape:
                continue
            times = row["seconds"]
            own = f" {row['sparsity']:.0%}" if row["engine"].startswith("sparse") else ""
            same = f" {row['sparsity'] or 0.5:.0%}"  # dense int4 against the sparse ones of 50%
            over = [
                f"{row['over'][peer]:.2f}x"
                if row["engine"].split()[0] in ("sparse", "dense") and peer in row["over"]
                else ""
                for peer in (
                    "own dense bf16",
                    "torch bf16",
                    f"sparse bf16{same}",
                    f"sparse int8{same}",
                    results["dense_int4"],
                )
            ]
            label = row["engine"] + own + (f" ({row['level']})" if row["level"] else "")
            time = f"{times['median'] * 1e3:.3f} ({times['p10'] * 1e3:.3f} to {times['p90'] * 1e3:.3f})"
            size = f"{row['weight_bytes'] / 1e6:.1f}"
            if row["engine"] == READ:
                time = size = ""
            lines.append([label, size, time, f"{row['gigabytes_per_s']:.1f}", f"{row['share']:.0%}", *over])
        header = ["", "MB", "ms", "GB/s", "share", "/ own dense bf16", "/ torch bf16"]
        header += ["/ sparse bf16", "/ sparse int8", f"/ {results['dense_int4']}"]
        parts += [f"### {shape}", table(header, lines)]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usable = [level["name"] for level in extension.levels() if level["usable"]]
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument(
        "--levels", nargs="+", choices=usable, default=[name for name in usable if name in ("avx512", "avx2")]
    )
    parser.add_argument("--group-sizes", nargs="+", type=int, default=[128, 32], metavar="INPUTS")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of int4.json and .md, default %(default)s")
    parser.add_argument("--document", type=Path, help="also put the tables into this file (docs/performance.md)")
    parser.add_argument("--smoke", action="store_true", help="tiny layers, few rounds: the figures mean nothing")
    args = parser.parse_args(argv)
    if not usable:
        parser.error("the C++ extension is not there: `peft-elastic info` says how to get it")
    if args.smoke:
        args.shapes, args.rounds = ["64x96", "160x64"], 3
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [row for shape in args.shapes for row in measure_shape(shape, args)]
    results = {
        "machine": machine(),
        "rounds": args.rounds,
        "dense_int4": f"dense int4, groups of {args.group_sizes[0]}",
        "rows": rows,
    }
    markdown = report(results)
    print(markdown)
    args.out.mkdir(parents=True, exist_ok=True)
    shorter = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    atomic_write_text(args.out / "int4.json", json.dumps(shorter))
    atomic_write_text(args.out / "int4.md", markdown + "\n")
    if args.document is not None:
        write_into(args.document, "int4", markdown)


if __name__ == "__main__":
    main()
