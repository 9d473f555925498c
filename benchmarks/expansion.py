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
"""Whether a memory layout of its own for N:M patterns would pay on AVX2: see csrc/expansion.cpp.

    python benchmarks/expansion.py --out benchmarks/results

Batch 1, one thread, 50% zeros. With as many nonzeros behind each byte of the bitmap the places of the values are
constants. `from memory` reads weights that no cache holds; `from L2` a small one again and again, which leaves the
instructions alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from _support import RESULTS, describe_machine, machine, summarize, table, write_into

from peft_elastic.common.writing import atomic_write_text


ROOT = Path(__file__).parents[1]
NAMES = {
    "bf16": "bf16, as it is",
    "bf16 2:4": "bf16, 2:4",
    "bf16 4:8": "bf16, 4:8",
    "bf16 8:16": "bf16, 8:16",
    "int8": "int8, as it is",
    "int8 2:4": "int8, 2:4",
}


def build(folder: Path, optimize: bool = True) -> Path:
    program = folder / "expansion"
    # All of the extension but what speaks Python: a list of files would be out of date with the next one.
    library = sorted(file for file in (ROOT / "csrc").rglob("*.cpp") if file.name != "module.cpp")
    flags = ["-std=c++17", "-O3" if optimize else "-O0", "-fPIC", "-fwrapv", "-w", "-pthread"]
    flags += ["-mavx2", "-mfma", "-mbmi2", "-mpopcnt", f"-I{ROOT / 'csrc'}"]
    sources = [ROOT / "benchmarks" / "csrc" / "expansion.cpp", *library]
    subprocess.run([os.environ.get("CXX", "g++"), *flags, *sources, "-o", program], check=True)
    return program


def measure(program: Path, out_features: int, in_features: int, copies: int, rounds: int) -> dict[str, Any]:
    arguments = map(str, (out_features, in_features, copies, rounds))
    answer = subprocess.run([program, *arguments], check=True, capture_output=True, text=True)
    weights = out_features * in_features
    return {name: summarize([weights / t for t in seconds]) for name, seconds in json.loads(answer.stdout).items()}


def report(results: dict[str, Any]) -> str:
    lines = []
    for name, title in NAMES.items():
        line = [title]
        for place in ("from memory", "from L2"):
            speed, base = (results[place][key] for key in (name, name.split()[0]))
            ratio = speed["median"] / base["median"]
            line += [
                f"{speed['median'] / 1e9:.1f} ({speed['p10'] / 1e9:.1f} to {speed['p90'] / 1e9:.1f})",
                f"{ratio:.2f}x",
            ]
        lines.append(line)
    header = ["", "G weights/s from memory", "over as it is", "G weights/s from L2", "over as it is"]
    return f"{describe_machine(results['machine'])} Medians (10th to 90th percentile).\n\n{table(header, lines)}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of expansion.json and .md, default %(default)s"
    )
    parser.add_argument("--document", type=Path, help="also put the table into this file (docs/performance.md)")
    parser.add_argument("--smoke", action="store_true", help="tiny layers, few rounds: the figures mean nothing")
    args = parser.parse_args(argv)
    about = machine()
    if "avx2" not in about["features"]:
        print("Nothing to measure: this processor has no AVX2.")
        return
    l3 = about["cache_bytes"].get("l3", 0) or 32 * 2**20
    size, copies = (64, 2) if args.smoke else (4096, 1 + math.ceil(2 * l3 / (4096 * 4096 * 5 / 8)))
    rounds = 3 if args.smoke else args.rounds
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder), optimize=not args.smoke)
        results: dict[str, Any] = {
            "machine": about,
            "rounds": rounds,
            "from memory": measure(program, size, size, copies, rounds),
            "from L2": measure(program, 256, 1024, 1, 10 * rounds),
        }
    markdown = report(results)
    print(markdown)
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(args.out / "expansion.json", json.dumps(results, indent=1))
    atomic_write_text(args.out / "expansion.md", markdown + "\n")
    if args.document is not None:
        write_into(args.document, "expansion", markdown)


if __name__ == "__main__":
    main()
