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
"""Wall time of one search with 1, 2 and 4 workers, against that in one process; the histories must be the same.

    python benchmarks/parallel_search.py --out benchmarks/results                    # about ten minutes on two cores
    python benchmarks/parallel_search.py --smoke --out outputs/parallel-search-smoke # a tiny model, seconds

A random Llama-shaped model with an elastic adapter; its loss on random tokens is what is searched for. Every evaluation, here and in
the workers, takes one thread. The kinds of search take turns, and the ratios are those of one round. Workers are new processes each
time: to start them and to load the model counts, and is also shown alone, as the time of a search with a single evaluation. Run it on
a quiet machine: `load average` in the results says whether it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _support import describe_machine, machine, summarize, table
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_elastic import ElasticLoraConfig
from peft_elastic.common.writing import atomic_write_text
from peft_elastic.search import LossEvaluator, search_subnet


def build(folder: Path, hidden: int, layers: int) -> Any:
    """The model, saved so that workers can load it."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = ElasticLoraConfig(
        r=16,
        elastic_ranks=[16, 8, 4],
        target_modules="all-linear",
        elastic_width={"mlp": [1.0, 0.75, 0.5]},
        importance="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder / "adapter")
    return model.eval()


def report(results: dict[str, Any]) -> str:
    rows = []
    for name, seconds in results["seconds"].items():
        shares = summarize([one / own for one, own in zip(results["seconds"]["one process"], seconds, strict=True)])
        rows.append(
            [
                name,
                f"{statistics.median(seconds):.1f}",
                f"{statistics.median(results['seconds_of_one_evaluation'][name]):.1f}",
                f"{shares['median']:.2f}x ({min(one / own for one, own in zip(results['seconds']['one process'], seconds)):.2f} to "
                f"{max(one / own for one, own in zip(results['seconds']['one process'], seconds)):.2f})",
            ]
        )
    settings = results["settings"]
    header = [
        "",
        f"s for {settings['evals']} evaluations",
        "of these to start, and one evaluation",
        "as fast as one process",
    ]
    return (
        f"{describe_machine(results['machine'])} Load average at the beginning {results['load_before']}. "
        f"{settings['rounds']} rounds; medians, and of ratios smallest and largest. All histories are the same: "
        f"{results['same_history']}.\n\n{table(header, rows)}"
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/parallel_search"), help="folder, default %(default)s"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--evals", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batches", type=int, default=8, help="of 4 sequences of 128 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, workers that are forked")
    args = parser.parse_args(argv)
    if args.smoke:
        args.workers, args.evals, args.rounds, args.hidden, args.layers, args.batches = [2], 6, 1, 16, 1, 1
    before = machine()["load_average"]
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(512, (4, 8 if args.smoke else 128), generator=generator) for _ in range(args.batches)]
    evaluate = LossEvaluator([{"input_ids": batch, "labels": batch} for batch in tokens])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = build(Path(folder), args.hidden, args.layers)

        def search(workers: int | None, evals: int) -> tuple[float, Any]:
            parallel: dict[str, Any] = {}
            if workers is not None:
                context = get_context("fork")
                executor: Any = (lambda: ProcessPoolExecutor(workers, context)) if args.smoke else workers
                parallel = {"executor": executor, "worker_model": Path(folder) / "adapter"}
            start = time.perf_counter()
            result = search_subnet(model, evaluate, n_evals=evals, seed=args.seed, progress=False, **parallel)
            return time.perf_counter() - start, result

        kinds: dict[str, int | None] = {"one process": None} | {
            f"{n} workers" if n > 1 else "1 worker": n for n in args.workers
        }
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        single: dict[str, list[float]] = {name: [] for name in kinds}
        expected = None
        for _ in range(args.rounds):
            for name, workers in kinds.items():
                single[name].append(search(workers, 1)[0])
                took, result = search(workers, args.evals)
                seconds[name].append(took)
                expected = expected or result
                if result != expected:
                    raise RuntimeError(f"The history with {name} differs from that of one process.")
                print(json.dumps({"kind": name, "seconds": took}), flush=True)
    results = {
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "machine": machine(),
        "load_before": before,
        "seconds": seconds,
        "seconds_of_one_evaluation": single,
        "same_history": True,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(args.out / "parallel_search.json", json.dumps(results))
    markdown = report(results)
    atomic_write_text(args.out / "parallel_search.md", markdown + "\n")
    print(f"\n{markdown}")
    return results


if __name__ == "__main__":
    main()
