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
"""`peft-elastic info`: show versions, processor features, what is built and what is used."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from typing import Any

from peft_elastic.common import assets
from peft_elastic.layers import extension
from peft_elastic.version import __version__

from ._options import summary


_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "datasets", "pymoo", "numpy", "safetensors")
_OPTIONAL = ("gguf", "trl", "bitsandbytes", "lm-eval", "evaluate")

_HOW_TO_BUILD = (
    "install a C++17 compiler (on Debian and Ubuntu: apt-get install g++), then "
    "`pip install --force-reinstall --no-deps --no-cache-dir --no-binary peft-elastic peft-elastic`, "
    "or `pip install .` in a checkout"
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "info",
        help=summary(__doc__),
        description="Show the versions of this package and of those it stands on, what the processor can do and the\n"
        "operating system allows, whether the C++ extension was built, and the threads, memory and cache in use.\n"
        "Put its output into bug reports.",
        epilog="examples:\n  peft-elastic info\n  peft-elastic info --json > info.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    report = collect()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(_format(report))
    return 0


def collect() -> dict[str, Any]:
    """Collect what `info` shows, as plain data. `cpu` is None without the extension; sizes are in bytes."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    return {
        "versions": {
            "peft-elastic": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _LIBRARIES + _OPTIONAL},
        },
        "platform": platform.platform(),
        "cpu": extension.cpu_report(),
        "extension": {
            "built": extension.is_built(),
            "file": getattr(extension._C, "__file__", None),
            "error": None if extension.IMPORT_ERROR is None else str(extension.IMPORT_ERROR),
        },
        "kernels": {"levels": extension.levels(), "selected": extension.selected_level()},
        "torch": {
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "cuda_devices": torch.cuda.device_count(),
        },
        "cores": _usable_cores(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "memory": {"total": memory.total, "available": memory.available},
        "cache": {"folder": _cache_folder(), "holds": assets.cached()},
    }


def _cache_folder() -> str | None:
    try:
        return str(assets.home())
    except assets.AssetError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _format(report: dict[str, Any]) -> str:
    lines = ["Versions"]
    for name, version in report["versions"].items():
        lines.append(f"  {name:<14}{version or '-  (optional, not installed)'}")
    lines.append(f"  {'platform':<14}{report['platform']}")

    cpu, extension, torch = report["cpu"], report["extension"], report["torch"]
    lines.append("Processor")
    if cpu is None:
        lines.append("  not known: the C++ extension that asks it was not built")
    else:
        caches = ", ".join(f"{name} {_size(n)}" for name, n in cpu["cache_bytes"].items() if n)
        features = [name for name, usable in cpu["features"].items() if usable]
        lines.append(f"  {'name':<14}{cpu['brand'] or 'not known'} ({cpu['architecture']})")
        lines.append(f"  {'caches':<14}{caches or 'not known'}")
        lines.append(f"  {'usable':<14}{_wrap(features) or 'none of the x86 extensions'}")
        lines.append(f"  {'not there':<14}{_wrap([name for name in cpu['features'] if name not in features])}")
        if cpu["features"]["amx_tile"]:
            lines.append(f"  {'AMX tiles':<14}{'granted' if cpu['amx_permitted'] else 'refused'} by the system")

    lines.append("In use")
    if extension["built"]:
        lines.append(f"  {'extension':<14}built ({cpu['compiler']}): {extension['file']}")
        lines.append(f"  {'sparse kernels':<14} {_describe_levels(report['kernels'])}")
    else:
        lines.append(f"  {'extension':<14}NOT built: {extension['error']}")
        lines.append(f"  {'':<14}everything works without it; to get it, {_HOW_TO_BUILD}")
    lines.append(f"  {'torch':<14}{torch['instructions']} kernels, {torch['cuda_devices']} CUDA device(s)")
    omp = "" if report["OMP_NUM_THREADS"] is None else f" (OMP_NUM_THREADS={report['OMP_NUM_THREADS']})"
    lines.append(f"  {'threads':<14}{torch['threads']} of {report['cores']} usable cores{omp}")
    memory = report["memory"]
    lines.append(f"  {'memory':<14}{_size(memory['available'])} of {_size(memory['total'])} available")
    cache = report["cache"]
    empty = "empty" if cache["folder"] else "this user has no home; PEFT_ELASTIC_HOME can name a folder"
    lines.append(f"  {'cache':<14}{cache['folder'] or 'none'}: {', '.join(cache['holds']) or empty}")
    return "\n".join(lines)


def _describe_levels(kernels: dict[str, Any]) -> str:
    states = []
    for level in kernels["levels"]:
        state = (
            "in use"
            if level["name"] == kernels["selected"]
            else "usable"
            if level["usable"]
            else "not on this processor"
        )
        states.append(f"{level['name']}: {state if level['built'] else 'not built'}")
    return f"{', '.join(states)} (PEFT_ELASTIC_ISA chooses)"


def _wrap(words: list[str], indent: int = 16, width: int = 100) -> str:
    import textwrap

    return textwrap.fill(" ".join(words), width - indent, break_on_hyphens=False).replace("\n", "\n" + " " * indent)


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"
