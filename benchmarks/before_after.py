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
"""Whether another state of the package is slower: training steps, activating a subnet, a decoding step, imports and the command line.

Two checkouts with their extensions built are measured by turns, in fresh processes, in processor time of one thread; what is compared is the
least time of each process, and what is said is the median of the ratios with its quartiles.

    python benchmarks/before_after.py --before ../before --after . --rounds 7
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path


WORK = """
import json, sys, time, warnings
begin = time.process_time()
import peft
after_peft = time.process_time()
import peft_elastic
times = {"import peft_elastic, after peft": time.process_time() - after_peft}
warnings.simplefilter("ignore")
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from peft_elastic import ElasticLoraConfig, MagnitudeConfig, SparseQALoraConfig, optimize_generation, prune, sparsify_linears

torch.set_num_threads(1)
shape = dict(vocab_size=512, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4)


def base(sparse=False):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape))
    if sparse:
        prune(model, MagnitudeConfig(sparsity=0.5), progress=False)
    return model


def least(work, repeats):
    found = []
    for _ in range(repeats):
        start = time.thread_time()
        work()
        found.append(time.thread_time() - start)
    return min(found)


tokens = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(1))
targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
elastic = dict(r=16, elastic_ranks=[16, 8, 4], target_modules=targets, task_type="CAUSAL_LM")
configs = {
    "ranks": (ElasticLoraConfig(**elastic), False),
    "width and depth": (
        ElasticLoraConfig(**elastic, elastic_width={"mlp": [1.0, 0.5], "heads": [1.0, 0.5]}, elastic_depth=[2, 5], importance="none"), False
    ),
    "SparsePEFT": (SparseQALoraConfig(**elastic, sparse_adapter=True), True),
    "QA-SparsePEFT": (SparseQALoraConfig(**elastic, quantization_aware=True, bits=4, group_size=32), True),
}
for name, (config, sparse) in configs.items():
    begin = time.process_time()
    model = get_peft_model(base(sparse), config)
    times[f"get_peft_model, {name}"] = time.process_time() - begin
    space = model.search_space
    subnets = [space.max, space.min, space.heuristic]
    turn = iter(range(10**9))

    def step():
        model.base_model.sample_subnet(subnets[next(turn) % 3])
        model(input_ids=tokens, labels=tokens).loss.backward()
        model.zero_grad()

    model.train()
    step()
    times[f"training step, {name}"] = least(lambda: [step() for _ in range(3)], REPEATS)
    times[f"sample_subnet, {name}"] = least(lambda: [model.base_model.sample_subnet(s) for s in subnets], REPEATS)

model = base(True)
sparsify_linears(model, "int8", when="always")
optimize_generation(model.eval())
prompt = tokens[:1, :8]
generate = lambda: model.generate(prompt, max_new_tokens=32, do_sample=False, pad_token_id=0)
generate()
times["generate 32 tokens, int8"] = least(generate, REPEATS)
print(json.dumps(times))
"""


def run(folder: Path, code: list[str]) -> tuple[str, float]:
    """What a fresh process says, and the processor seconds that it took."""
    environment = os.environ | {
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    before = os.times()
    done = subprocess.run([sys.executable, *code], env=environment, cwd=folder, capture_output=True, text=True)
    after = os.times()
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr[-2000:]}")
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "", seconds


def measure(folder: Path, repeats: int) -> dict[str, float]:
    times = json.loads(run(folder, ["-W", "ignore", "-c", WORK.replace("REPEATS", str(repeats))])[0])
    start = run(folder, ["-c", "pass"])[1]
    for option in ("--version", "--help"):
        code = f"import sys; sys.argv = ['peft-elastic', {option!r}]; sys.orig_argv = ['python', 'peft-elastic', {option!r}]"
        code += "; from peft_elastic.cli import main; main()"
        times[f"peft-elastic {option}, after Python's start"] = run(folder, ["-c", f"{code}"])[1] - start
    return times


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout, its extension built in place")
    parser.add_argument(
        "--after", type=Path, default=Path(__file__).resolve().parents[1], help="another (default: this)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="pairs of processes (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=15, help="of each measurement in a process (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="folder for before_after.md and .json")
    parser.add_argument("--smoke", action="store_true", help="one pair, one repeat: only to see it run")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.rounds = args.repeats = 1
    found: dict[str, list[dict[str, float]]] = {"before": [], "after": []}
    for number in range(args.rounds):
        for name in ("before", "after") if number % 2 else ("after", "before"):
            found[name].append(measure(getattr(args, name).resolve(), args.repeats))
    lines = ["| what | before, ms | after, ms | ratio | quartiles |", "|---|---|---|---|---|"]
    for what in found["after"][0]:
        before, after = ([1e3 * row[what] for row in found[name]] for name in ("before", "after"))
        ratios = [b / a for a, b in zip(before, after)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        lines.append(
            f"| {what} | {statistics.median(before):.2f} | {statistics.median(after):.2f} | {statistics.median(ratios):.3f} | "
            f"{low:.3f}-{high:.3f} |"
        )
    print("\n".join(lines))
    if args.out:
        commits = {
            name: subprocess.run(
                ["git", "-C", getattr(args, name), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
            ).stdout.strip()
            for name in found
        }
        import torch
        import transformers

        versions = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "")
        head = f"{commits}, {cpu}, one thread, {versions}, {args.rounds} pairs of processes, processor time, least of {args.repeats}."
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "before_after.md").write_text("\n".join([head, "", *lines, ""]))
        (args.out / "before_after.json").write_text(
            json.dumps({"commits": commits, "cpu": cpu, "versions": versions, **found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
