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
"""What the benchmarks of deployment share: the machine, files, tables, and the dense kernel to compare with."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import peft_elastic
from peft_elastic.common.writing import atomic_write_text
from peft_elastic.layers import extension


RESULTS = Path(__file__).parents[1] / "results"


def machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    report = extension.cpu_report() or {}
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "family": _cpuinfo("cpu family"),
        "model": _cpuinfo("model"),
        "usable_cores": usable_cores(),
        "cache_bytes": report.get("cache_bytes", {}),
        "features": sorted(name for name, present in report.get("features", {}).items() if present),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft_elastic": peft_elastic.__version__,
            "compiler of peft_elastic": report.get("compiler", ""),
        },
    }


def _cpuinfo(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), "")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(at: dict[str, Any]) -> str:
    """One paragraph for above a table."""
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items() if version)
    l3 = at["cache_bytes"].get("l3", 0) / 2**20
    return (
        f"{at['cpu']} (family {at['family']}, model {at['model']}), {at['usable_cores']} cores usable, {l3:.0f} MiB of L3, "
        f"load average at the end {at['load_average']}; {versions}."
    )


def summarize(values: list[float]) -> dict[str, float]:
    p10, median, p90 = np.quantile(values, [0.1, 0.5, 0.9])
    return {"median": float(median), "p10": float(p10), "p90": float(p90), "count": len(values)}


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def write(folder: Path, name: str, results: dict[str, Any], markdown: str, figure: Any) -> None:
    """`name`.json, `name`.md and `name`.png in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    shorter = json.loads(json.dumps(results), parse_float=lambda text: float(f"{float(text):.6g}"))
    atomic_write_text(folder / f"{name}.json", json.dumps(shorter))
    atomic_write_text(folder / f"{name}.md", markdown + "\n")
    figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
    log(f"Written to {folder}.")


def write_into(document: Path, name: str, markdown: str) -> None:
    """Replaces what stands between the comments `name: begin` and `name: end` of a document."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    head, _, rest = document.read_text().partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"{document} has no lines {begin!r} and {end!r}.")
    atomic_write_text(document, f"{head}{begin}\n{markdown}\n\n{end}{tail}")


class Worker:
    """A process that takes a command a line on its standard input and answers each with a line, both JSON."""

    def __init__(self, command: list[str]):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @classmethod
    def peer(cls, python: str, script: str, *arguments: str) -> Worker:
        """A script of _peers, run by the interpreter of another environment."""
        path = Path(__file__).parents[1] / "_peers" / script
        return cls([python, "-I", str(path), *arguments])  # -I: PYTHONPATH is meant for this environment

    def ask(self, **command: Any) -> dict[str, Any]:
        try:
            self.process.stdin.write(json.dumps(command) + "\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # it has ended, which `answer` reports
        return self.answer()

    def answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}.")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


# -- the dense kernel ------------------------------------------------------------------------------------------------

_DENSE_FLAGS = {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx512f"]}


class DenseKernel:
    """csrc/dense_gemv.cpp, compiled for "avx2" or "avx512". It runs on the OpenMP threads of torch, as our kernels do."""

    def __init__(self, instructions: str):
        source = Path(__file__).parents[1] / "csrc" / "dense_gemv.cpp"
        compiler = os.environ.get("CXX", "g++")
        compile_command = [compiler, "-std=c++17", "-O3", "-fPIC", "-fopenmp", *_DENSE_FLAGS[instructions]]
        key = hashlib.sha256(source.read_bytes() + " ".join(compile_command).encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"peft-elastic-bench-{os.getuid()}"
        library = folder / f"dense_gemv_{instructions}_{key}.so"
        if not library.exists():
            folder.mkdir(mode=0o700, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                unlinked, linked = f"{scratch}/gemv.o", f"{scratch}/gemv.so"
                subprocess.run([*compile_command, "-c", str(source), "-o", unlinked], check=True)
                subprocess.run([compiler, "-shared", unlinked, "-o", linked, _openmp_of_torch()], check=True)
                os.replace(linked, library)
        functions = ctypes.CDLL(str(library))
        self.gemv = functions.dense_gemv
        self.gemv.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int,
        ]
        self.gemv.restype = None
        self.read = functions.stream_read
        self.read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self.read.restype = ctypes.c_uint64


def _openmp_of_torch() -> str:
    # Linked to by its path: the runtime of the compiler would be a second one, whose threads fight with torch's.
    names = ("libgomp", "libiomp5", "libomp")
    files = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
    found = sorted(file for file in files if Path(file).name.startswith(names))
    if not found:
        raise RuntimeError("torch has loaded no OpenMP runtime, which the dense kernel of the benchmark runs on.")
    return next((file for file in found if file.startswith(str(Path(torch.__file__).parent))), found[0])


def dense_kernel_of(level: str) -> str | None:
    """The instruction set of the dense kernel that a level of ours is compared with."""
    return {"amx": "avx512", "avx512_bf16": "avx512", "avx512": "avx512", "avx2": "avx2"}.get(level)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
