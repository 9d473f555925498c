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
"""Models larger than memory: time and peak memory of pruning, sorting and narrowing a folder block by block.

    python benchmarks/larger_than_memory.py --work /scratch --out outputs/larger    # 8.6 GB of weights; 18 GB of disk; an hour
    python benchmarks/larger_than_memory.py --smoke --work /scratch/x --out outputs/larger-smoke    # seconds

A random model of the shape of Llama-7B with fewer blocks is written to WORK/model, file by file, unless it is there. Each method then
runs in a process of its own, whose private writable memory cannot exceed --limit (RLIMIT_DATA: more is an error in it), and
`peak` is the high-water mark of its resident set (VmHWM). A model with two of the blocks is worked on in memory as well, and the
weights are compared bit by bit. OUT/larger_than_memory.json holds everything, and the table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _support import describe_machine, log, machine, table
from safetensors import safe_open
from safetensors.torch import save_file
from training import resident
from transformers import LlamaConfig, LlamaForCausalLM

from peft_elastic import (
    MagnitudeConfig,
    WandaConfig,
    WidthPrunerConfig,
    extract_folder,
    plan_folder,
    prune,
    prune_folder,
    prune_structured,
    sort_by_importance,
    sort_folder,
)
from peft_elastic.common.writing import atomic_write_text


Work = tuple[Callable[[Path, Path, list[torch.Tensor]], Any], Callable[[Any, list[torch.Tensor]], Any]]


def works(smoke: bool) -> dict[str, Work]:
    """What is done from folder to folder, and the same with a model in memory. A tiny model is mostly embeddings."""
    magnitude, wanda = MagnitudeConfig(sparsity=0.5), WandaConfig(sparsity=0.5)
    width = WidthPrunerConfig(ratio=0.01 if smoke else 0.2, choose="uniform")
    return {
        "magnitude": (
            lambda source, target, data: prune_folder(source, target, magnitude),
            lambda model, data: prune(model, magnitude),
        ),
        "wanda": (
            lambda source, target, data: prune_folder(source, target, wanda, data),
            lambda model, data: prune(model, wanda, data),
        ),
        "sort": (
            lambda source, target, data: sort_folder(source, target, "activation", data),
            lambda model, data: sort_by_importance(model, "activation", data),
        ),
        "structured": (
            lambda source, target, data: extract_folder(source, target, plan_folder(source, width, data)),
            lambda model, data: prune_structured(model, width, data),
        ),
    }


WORKS = tuple(works(smoke=True))
VOCABULARY = 32000


def write_model(folder: Path, shape: dict[str, int], seed: int) -> int:
    """A random model in bfloat16, a file for each block, so that it never is in memory. Returns the bytes of its weights."""
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, dtype="bfloat16", **shape)
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[1] == "layers" else "", []).append(name)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map = {}
    for number, names in enumerate(groups.values(), start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        tensors = {
            name: torch.ones(shapes[name], dtype=torch.bfloat16)
            if len(shapes[name]) == 1
            else torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            for name in names
        }
        save_file(tensors, partial / file, metadata={"format": "pt"})
    size = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(partial)
    partial.rename(folder)
    return size


def calibration(sequences: int, length: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(VOCABULARY, (sequences, length), generator=generator).split(1))


def run_here(args: argparse.Namespace) -> dict[str, Any]:
    in_folder, in_memory = works(args.smoke)[args.run]
    data = calibration(args.sequences, args.length, args.seed)
    before = resident("VmRSS")
    start = time.perf_counter()
    if args.in_memory:
        model = LlamaForCausalLM.from_pretrained(args.model, dtype="auto")
        in_memory(model, data)
        model.save_pretrained(args.target)
        del model
    else:
        in_folder(args.model, args.target, data)
    return {"seconds": time.perf_counter() - start, "before_bytes": before, "peak_bytes": resident("VmHWM")}


def measured(
    args: argparse.Namespace, model: Path, work: str, target: Path, in_memory: bool = False
) -> dict[str, Any]:
    shutil.rmtree(target, ignore_errors=True)
    command = [
        sys.executable,
        __file__,
        "--out",
        "-",
        "--work",
        "-",
        "--run",
        work,
        "--model",
        model,
        "--target",
        target,
    ]
    command += ["--sequences", args.sequences, "--length", args.length, "--seed", args.seed]
    command += ["--in-memory"] if in_memory else []
    command += ["--smoke"] if args.smoke else []
    limit = None if in_memory or args.smoke else int(args.limit * 2**30)

    def begin() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    answer = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, check=True, preexec_fn=begin)
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return {"work": work, "in_memory": in_memory, "model_bytes": size, "limit_bytes": limit, **found}


def tensors_of(folder: Path) -> dict[str, Path]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            found |= dict.fromkeys(stream.keys(), file)
    return found


def differences(one: Path, other: Path) -> int:
    """How many tensors of two folders are not the same, bit by bit."""
    here, there = tensors_of(one), tensors_of(other)
    different = len(here.keys() ^ there.keys())
    for name in here.keys() & there.keys():
        with safe_open(here[name], "pt") as first, safe_open(there[name], "pt") as second:
            different += not torch.equal(first.get_tensor(name), second.get_tensor(name))
    return different


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder on a disk with room for two such models")
    parser.add_argument("--blocks", type=int, default=20, help="of 405 MB")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--limit", type=float, default=4.0, help="GiB of private writable memory of a process")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the calibration data")
    parser.add_argument("--keep", action="store_true", help="keep the model for the next run")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, and no limit")
    for hidden in ("--run", "--model", "--target"):  # how the script calls itself
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--in-memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.run:
        found = run_here(args)
        print(json.dumps(found))
        return found

    shape = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": args.blocks,
    }
    if args.smoke:
        shape |= {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3}
        args.length = 16
    big, small, target = (args.work / name for name in ("model", "small", "pruned"))
    for folder, blocks in ((big, shape["num_hidden_layers"]), (small, 2)):
        if not folder.is_dir():
            log(f"writing {folder}")
            write_model(folder, shape | {"num_hidden_layers": blocks}, args.seed)
    rows = []
    for work in args.works:
        rows.append(measured(args, big, work, target))
        log(f"{work}: {rows[-1]}")
        rows.append(measured(args, small, work, target))
        rows.append(measured(args, small, work, args.work / "reference", in_memory=True))
        rows[-2]["different_tensors"] = differences(target, args.work / "reference")
    results = {
        "machine": machine(),
        "settings": {**shape, "sequences": args.sequences, "length": args.length, "seed": args.seed},
        "rows": rows,
    }
    for folder in (target, args.work / "reference", *(() if args.keep else (big, small))):
        shutil.rmtree(folder, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(args.out / "larger_than_memory.json", json.dumps(results, indent=2) + "\n")
    print(
        f"{describe_machine(results['machine'])} {args.sequences} sequences of {args.length} tokens, seed {args.seed}.\n"
    )
    print(
        table(
            ["work", "weights, GB", "where", "limit, GiB", "peak, GB", "seconds", "tensors that differ"],
            [
                [
                    row["work"],
                    f"{row['model_bytes'] / 1e9:.2f}",
                    "in memory" if row["in_memory"] else "folder",
                    "-" if row["limit_bytes"] is None else f"{row['limit_bytes'] / 2**30:g}",
                    f"{row['peak_bytes'] / 1e9:.2f}",
                    f"{row['seconds']:.0f}",
                    str(row.get("different_tensors", "-")),
                ]
                for row in rows
            ],
        )
    )
    return results


if __name__ == "__main__":
    main()
