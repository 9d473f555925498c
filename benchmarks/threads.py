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
"""What the threads of OpenMP should do at a barrier: spin, which is fast on a quiet machine, or sleep, which leaves the
processor to others.

    python benchmarks/threads.py --out benchmarks/results

Every setting trains a small model in a process of its own, since OpenMP reads its environment when it is loaded. The
settings take turns, alone and beside `--busy` processes that never rest; ratios are those of neighbours in time. Run it on a
quiet machine: `load average` in the results says whether it was.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


SETTINGS: dict[str, dict[str, str]] = {
    "as it is": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
}
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "GOMP_CPU_AFFINITY", "OMP_PROC_BIND")


def train(seconds: float, threads: int) -> float:
    """Steps a second of a small transformer, of the size that the quickstart trains."""
    import torch  # alone: every process starts anew

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layers = [torch.nn.TransformerEncoderLayer(256, 4, 768, dropout=0.0, batch_first=True) for _ in range(6)]
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = torch.randn(4, 32, 256)
    steps = 0
    begin = last = time.perf_counter()
    while steps < 2 or last - begin < seconds:
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        if steps == 1:  # the first one starts the threads
            begin = time.perf_counter()
        last = time.perf_counter()
    return (steps - 1) / (last - begin)


def measure(setting: str, seconds: float, threads: int) -> float:
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES}
    command = [sys.executable, __file__, "--train", str(seconds), str(threads)]
    done = subprocess.run(command, env=environment | SETTINGS[setting], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    # it ends with its parent, whatever ends that
    script = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def report(results: dict[str, Any]) -> str:
    from _support import describe_machine, summarize, table

    lines = []
    for setting in SETTINGS:
        line = [setting]
        for place, rates in results["steps_per_second"].items():
            found, base = rates[setting], rates["as it is"]
            ratios = summarize([one / other for one, other in zip(found, base, strict=True)])
            line += [
                f"{summarize(found)['median']:.2f}",
                f"{ratios['median']:.2f}x ({ratios['p10']:.2f} to {ratios['p90']:.2f})",
            ]
        lines.append(line)
    header = [""]
    for place in results["steps_per_second"]:
        header += [f"steps/s, {place}", "over as it is"]
    return f"{describe_machine(results['machine'])} {results['threads']} threads.\n\n{table(header, lines)}"


def main(argv: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["--train"]:  # in its process, without the imports below
        print(train(float(arguments[1]), int(arguments[2])))
        return
    from _support import RESULTS, machine, usable_cores

    from peft_elastic.common.writing import atomic_write_text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: all usable cores")
    parser.add_argument("--busy", type=int, default=1, help="processes beside it, default 1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10, help="of training in each process, default 10")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of threads.json and .md, default %(default)s"
    )
    parser.add_argument("--smoke", action="store_true", help="no time at all: the figures mean nothing")
    args = parser.parse_args(argv)
    if args.smoke:
        args.rounds, args.seconds = 1, 0.0
    places = {"alone": 0, f"beside {args.busy} busy": args.busy}
    rates: dict[str, dict[str, list[float]]] = {place: {setting: [] for setting in SETTINGS} for place in places}
    for _ in range(args.rounds):
        for place, count in places.items():
            with busy(count):
                for setting in SETTINGS:
                    rates[place][setting].append(measure(setting, args.seconds, args.threads))
    results = {"machine": machine(), "threads": args.threads, "steps_per_second": rates}
    markdown = report(results)
    print(markdown)
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(args.out / "threads.json", json.dumps(results))
    atomic_write_text(args.out / "threads.md", markdown + "\n")


if __name__ == "__main__":
    main()
