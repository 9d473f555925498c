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
"""Structured pruning of SmolLM2-135M without training: MultiPruner against other methods at equal parameters, what it costs, and
what a little training recovers.

    python benchmarks/structured.py --text wikitext2_valid.txt --arc arc_easy_test.jsonl --out outputs/structured
    python benchmarks/structured.py --smoke --out outputs/structured-smoke       # random model, a minute

The first fifth of --text is for calibration, the next three for recovery, the last for perplexity ("same source"). Movie reviews
are the other source: text that is not the calibration source for perplexity, and other reviews for sentiment (by the likelihood of
" negative" and " positive" after the review, without training). Parts, each of which continues what is in OUT:

- methods: for each draw of the calibration data and each share of the parameters. Block-only pruning can remove whole parts alone, so
  that it comes only near to the share; all others are to remove what it has removed, and may differ by 0.25% of all parameters.
- cost: evaluations, passes of single blocks and seconds of the loop as it is, and of the plain one, which evaluates every candidate
  of every step by passes of the whole model; both run, on fewer tokens. And whether they make the same plan.
- speed: tokens/s of the extracted models of the first draw, greedy, batch 1 behind 128 tokens; models take turns.
- recovery: LoRA of a fixed budget on the pruned model, merged, and the same on the dense model.

OUT/structured.jsonl holds every row, OUT/structured.json all of it with the settings, and the tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _support import describe_machine, machine, table
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, LlamaConfig, LlamaForCausalLM, set_seed

from peft_elastic import (
    BlockPrunerConfig,
    MultiPrunerConfig,
    PruningPlan,
    TwoStagePrunerConfig,
    WidthPrunerConfig,
    prune_structured,
)
from peft_elastic.common import assets
from peft_elastic.common.writing import atomic_write_text
from peft_elastic.pruning.structured import StructuredPruningConfig
from peft_elastic.search import MultipleChoiceEvaluator, PerplexityEvaluator


PARTS = ("methods", "cost", "speed", "recovery")
ALLOWED = 0.0025  # of all parameters
BASE = "block-only"

# name -> config of a share of the parameters and a seed
METHODS: dict[str, Callable[[float, int], StructuredPruningConfig]] = {
    BASE: lambda ratio, seed: BlockPrunerConfig(ratio=ratio),
    "MultiPruner": lambda ratio, seed: MultiPrunerConfig(ratio=ratio),
    "MultiPruner, split auto": lambda ratio, seed: MultiPrunerConfig(ratio=ratio, split="auto"),
    "uniform width": lambda ratio, seed: WidthPrunerConfig(ratio=ratio, split=(1, 0), choose="uniform"),
    "two-stage score": lambda ratio, seed: TwoStagePrunerConfig(ratio=ratio),
    "random": lambda ratio, seed: MultiPrunerConfig(ratio=ratio, choose="random", seed=seed),
}


class Data:
    """Text, reviews and questions, each for one purpose."""

    def __init__(self, tokenizer: Any, args: argparse.Namespace) -> None:
        self._tokenizer = tokenizer
        records = random.Random(0).sample(list(assets.movie_reviews()), assets.movie_reviews().num_rows)
        reviews = [row["text"] for row in records]
        text = args.text.read_text() if args.text else "\n".join(reviews[: len(reviews) // 2])
        fifth = len(text) // 5
        self.pool = self._sequences(text[:fifth], args.length)
        self.training = self._sequences(text[fifth : 4 * fifth], args.length)
        self.tests = {
            "same source": self._some(self._sequences(text[4 * fifth :], args.length), args.test),
            "reviews": self._some(self._sequences("\n".join(reviews[len(reviews) // 2 :]), args.length), args.test),
        }
        self._evaluators: dict[str, Callable[[nn.Module], float]] = {
            f"perplexity, {name}": PerplexityEvaluator(
                [{"input_ids": batch, "labels": batch} for batch in torch.stack(rows).split(4)]
            )
            for name, rows in self.tests.items()
        }
        examples = [example for example in records[len(records) // 2 :] if len(example["text"]) < 160]
        examples = [example for example in examples if abs(example["rating"]) >= 1][: args.examples]
        self._evaluators["sentiment"] = MultipleChoiceEvaluator(
            [
                {
                    "prompt": f"Review: {example['text']}\nSentiment:",
                    "choices": [" negative", " positive"],
                    "label": int(example["rating"] > 0),
                }
                for example in examples
            ],
            tokenizer,
        )
        if args.arc:
            questions = [json.loads(line) for line in args.arc.read_text().splitlines()][: args.examples]
            self._evaluators["ARC-Easy"] = MultipleChoiceEvaluator(
                [
                    {
                        "prompt": f"Question: {question['question']}\nAnswer:",
                        "choices": [f" {choice}" for choice in question["choices"]],
                        "label": question["label"],
                    }
                    for question in questions
                ],
                tokenizer,
            )

    def calibration(self, seed: int, sequences: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.pool), generator=generator)[:sequences]
        return list(torch.stack([self.pool[i] for i in order]).split(4))

    def measure(self, model: nn.Module, only: str = "") -> dict[str, float]:
        return {name: evaluate(model) for name, evaluate in self._evaluators.items() if name.startswith(only)}

    def _sequences(self, text: str, length: int) -> list[torch.Tensor]:
        ids = torch.tensor(self._tokenizer(text)["input_ids"])
        return list(ids[: len(ids) // length * length].view(-1, length))

    @staticmethod
    def _some(rows: list[torch.Tensor], number: int) -> list[torch.Tensor]:
        return rows[:: max(1, len(rows) // number)][:number]


class Rows:
    """What has been measured, one line each; what is there is not measured again."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.all: list[dict[str, Any]] = []
        if path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            if lines[0] != settings:
                raise ValueError(f"--out holds rows of other settings: {lines[0]}; they are {settings} now.")
            self.all = lines[1:]
        else:
            atomic_write_text(path, json.dumps(settings) + "\n")

    def of(self, part: str) -> list[dict[str, Any]]:
        return [row for row in self.all if row["part"] == part]

    def find(self, **key: Any) -> dict[str, Any] | None:
        return next((row for row in self.all if all(row.get(k) == v for k, v in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        self.all.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({key: value for key, value in row.items() if key != "plan"}), flush=True)


def compare(model: Any, data: Data, rows: Rows, args: argparse.Namespace) -> None:
    """Every method at the parameters of block-only pruning."""
    if rows.find(part="methods", method="dense") is None:
        rows.add({"part": "methods", "method": "dense", "seed": 0, "share": 0.0, **data.measure(model)})
    whole = sum(parameter.numel() for parameter in model.parameters())
    for seed in args.seeds:
        calibration = data.calibration(seed, args.calibration)
        for share in args.shares:
            for method in METHODS:
                key = {"part": "methods", "method": method, "seed": seed, "share": share}
                if method not in args.methods or rows.find(**key) is not None:
                    continue
                ratio = share
                if method != BASE:
                    base = rows.find(part="methods", method=BASE, seed=seed, share=share)
                    if base is None:
                        raise ValueError(f"--methods: {BASE} is measured first, as the others follow its parameters.")
                    ratio = base["removed"]
                plan = prune_structured(
                    model,
                    METHODS[method](ratio, seed),
                    calibration,
                    save_dir=args.out / "evaluations" / str(seed),
                    extract=False,
                )
                path = args.out / "plans" / f"{method.replace(', ', '-').replace(' ', '-')}-{share:g}-{seed}.json"
                plan.save(path)
                removed = 1 - plan.after["parameters"] / whole
                if abs(removed - ratio) > ALLOWED and method != BASE:
                    raise RuntimeError(f"{method} has removed {removed:.2%} instead of {ratio:.2%}.")
                plan.narrow(model)
                measured = data.measure(model)
                plan.restore(model)
                cost = {"evaluations": plan.evaluations, "block_passes": plan.block_passes}
                cost |= {"plain_block_passes": plan.plain_block_passes, "seconds": plan.seconds}
                rows.add({**key, "removed": removed, **measured, **cost, "plan": str(path.relative_to(args.out))})


def cost(model: Any, data: Data, rows: Rows, args: argparse.Namespace) -> None:
    """The loop as it is against the plain one, both in full."""
    for seed in args.seeds:
        calibration = data.calibration(seed, args.cost_calibration)
        for share in args.cost_shares:
            if rows.find(part="cost", seed=seed, share=share) is not None:
                continue
            row: dict[str, Any] = {"part": "cost", "seed": seed, "share": share}
            plans = {}
            for name, options in (("ours", {}), ("plain", {"slack": math.inf, "cache_gb": 0.0})):
                start = time.perf_counter()
                plan = prune_structured(model, MultiPrunerConfig(ratio=share, **options), calibration, extract=False)
                row[name] = {
                    "seconds": time.perf_counter() - start,
                    "evaluations": plan.evaluations,
                    "block_passes": plan.block_passes,
                    "removals": len(plan.history),
                    "perplexity": plan.after["perplexity"],
                }
                plan.narrow(model)
                row[name] |= data.measure(model, only="perplexity")
                plan.restore(model)
                plans[name] = plan
            row["same"] = plans["ours"].values == plans["plain"].values
            pairs = zip(plans["ours"].history, plans["plain"].history)
            row["same_removals"] = sum(a["removed"] == b["removed"] for a, b in pairs)
            row["ours_values"], row["plain_values"] = plans["ours"].values, plans["plain"].values
            rows.add(row)


def speed(model: Any, rows: Rows, args: argparse.Namespace) -> None:
    """Tokens/s of the extracted models."""
    if rows.of("speed"):
        return
    models: dict[tuple[str, float], Any] = {("dense", 0.0): model}
    for row in rows.of("methods"):
        if row["seed"] == args.seeds[0] and row["method"] != "dense":
            plan = PruningPlan.load(args.out / row["plan"])
            models[row["method"], row["share"]] = plan.extract(copy.deepcopy(model))
    prompt = torch.randint(3, 1000, (1, 128), generator=torch.Generator().manual_seed(0))
    seconds: dict[tuple[str, float], list[float]] = {key: [] for key in models}

    @torch.no_grad()
    def decode(model: Any) -> float:
        step = model(prompt, use_cache=True)
        # versions of transformers give it different names
        name, cache = next((name, value) for name, value in step.items() if isinstance(value, Cache))
        start = time.perf_counter()
        for _ in range(args.tokens):
            token = step.logits[:, -1:].argmax(-1)
            step = model(token, **{name: cache}, use_cache=True)
        return (time.perf_counter() - start) / args.tokens

    for round_ in range(args.rounds + 1):
        for key, one in models.items():
            taken = decode(one)
            if round_:  # the first one warms up
                seconds[key].append(taken)
    for (method, share), times in seconds.items():
        median = statistics.median(times)
        speeds = sorted(1 / taken for taken in times)
        row = {"part": "speed", "method": method, "share": share, "tokens_per_second": 1 / median}
        ratios = [dense / own for dense, own in zip(seconds["dense", 0.0], times)]
        rows.add({**row, "least": speeds[0], "largest": speeds[-1], "times_dense": statistics.median(ratios)})


def recovery(model: Any, data: Data, rows: Rows, args: argparse.Namespace) -> None:
    """LoRA of a fixed budget on the pruned model and on the dense one, merged."""
    for seed in args.seeds:
        for method, share in [("dense", 0.0), *((args.recover, share) for share in args.recovery_shares)]:
            key = {"part": "recovery", "method": method, "share": share, "seed": seed}
            if rows.find(**key) is not None:
                continue
            trained = copy.deepcopy(model)
            if method != "dense":
                found = rows.find(part="methods", method=method, share=share, seed=seed)
                if found is None:
                    continue
                PruningPlan.load(args.out / found["plan"]).extract(trained)
            before = data.measure(trained)
            start = time.perf_counter()
            trained = train(trained, data, seed, args)
            seconds = time.perf_counter() - start
            rows.add({**key, "before": before, "after": data.measure(trained), "seconds": seconds})


def train(model: Any, data: Data, seed: int, args: argparse.Namespace) -> nn.Module:
    """The paper's adapters (r 16, alpha 32) for `--steps` steps; returns the merged model."""
    set_seed(seed)
    adapted = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    adapted.train()
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.1 * args.steps)) * (1 - step / args.steps)
    )
    for batch in draws(data.training, args.batch, args.steps, seed):
        adapted(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return adapted.merge_and_unload().eval()


def draws(pool: list[torch.Tensor], batch: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < batch:
            order += torch.randperm(len(pool), generator=generator).tolist()
        yield torch.stack([pool[i] for i in order[:batch]])
        order = order[batch:]


# -- report --------------------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int = 1) -> str:
    if not values:
        return ""
    text = f"{statistics.mean(values):,.{digits}f}"
    return f"{text} [{min(values):,.{digits}f}, {max(values):,.{digits}f}]" if len(values) > 1 else text


def report(results: dict[str, Any]) -> str:
    rows, settings = results["rows"], results["settings"]
    parts = [describe_machine(results["machine"])]
    methods = [row for row in rows if row["part"] == "methods"]
    metrics = [name for name in ("perplexity, reviews", "perplexity, same source", "ARC-Easy", "sentiment") if methods]
    metrics = [name for name in metrics if name in methods[0]]
    speeds = {(row["method"], row["share"]): row for row in rows if row["part"] == "speed"}

    def cells(method: str, share: float) -> list[str]:
        mine = [row for row in methods if (row["method"], row["share"]) == (method, share)]
        found = []
        for name in metrics:
            percent = 1 if name.startswith("perplexity") else 100
            found.append(spread([percent * row[name] for row in mine]))
        seconds = [row["seconds"] for row in mine if "seconds" in row]
        fast = speeds.get((method, share))
        found.append(spread(seconds, 0))
        found.append(f"{fast['tokens_per_second']:.1f} ({fast['times_dense']:.2f}x)" if fast else "")
        return found

    if methods:
        lines = [["dense", "0%", *cells("dense", 0.0)]]
        for share in sorted({row["share"] for row in methods} - {0.0}):
            for method in [name for name in METHODS if any(row["method"] == name for row in methods)]:
                removed = [100 * r["removed"] for r in methods if (r["method"], r["share"]) == (method, share)]
                if removed:
                    lines.append([method, f"{statistics.mean(removed):.2f}%", *cells(method, share)])
        parts.append(table(["method", "fewer parameters", *metrics, "seconds", "tokens/s"], lines))
        parts.append(ratios(methods))
    if costs := [row for row in rows if row["part"] == "cost"]:
        lines = []
        for row in costs:
            ours, plain = row["ours"], row["plain"]
            lines.append(
                [
                    f"{100 * row['share']:g}%, draw {row['seed']}",
                    f"{plain['block_passes']:,.0f} -> {ours['block_passes']:,.0f}",
                    f"{plain['block_passes'] / ours['block_passes']:.1f}x",
                    f"{plain['seconds']:,.0f} -> {ours['seconds']:,.0f}",
                    f"{plain['seconds'] / ours['seconds']:.1f}x",
                    "yes" if row["same"] else f"no, {row['same_removals']} of {plain['removals']} removals",
                    f"{plain['perplexity, reviews']:.2f} -> {ours['perplexity, reviews']:.2f}",
                ]
            )
        header = ["removed", "block passes", "fewer", "seconds", "faster", "same plan", "perplexity, reviews"]
        tokens = settings["cost_calibration"] * settings["length"]
        parts.append(f"Plain loop -> ours, {tokens:,} calibration tokens.\n\n{table(header, lines)}")
    if recovered := [row for row in rows if row["part"] == "recovery"]:
        lines = []
        for method, share in dict.fromkeys((row["method"], row["share"]) for row in recovered):
            mine = [row for row in recovered if (row["method"], row["share"]) == (method, share)]
            line = [method, f"{100 * share:g}%"]
            for name in metrics:
                percent = 1 if name.startswith("perplexity") else 100
                pairs = [spread([percent * row[when][name] for row in mine]) for when in ("before", "after")]
                line.append(" -> ".join(pairs))
            lines.append([*line, spread([row["seconds"] for row in mine], 0)])
        budget = f"{settings['steps']} steps of {settings['batch']} x {settings['length']} tokens"
        parts.append(f"LoRA, {budget}.\n\n{table(['model', 'fewer parameters', *metrics, 'seconds'], lines)}")
    return "\n\n".join(parts)


def ratios(methods: list[dict[str, Any]]) -> str:
    """Perplexity against block-only's, draw by draw."""
    lines = []
    for share in sorted({row["share"] for row in methods} - {0.0}):
        for method in METHODS:
            cells = [method, f"{100 * share:g}%"]
            for name in ("perplexity, reviews", "perplexity, same source"):
                base = {r["seed"]: r[name] for r in methods if (r["method"], r["share"]) == (BASE, share)}
                own = {r["seed"]: r[name] for r in methods if (r["method"], r["share"]) == (method, share)}
                cells.append(spread([own[seed] / base[seed] for seed in own if seed in base], 3))
            if method != BASE and any(cells[2:]):
                lines.append(cells)
    return table(["times the perplexity of block-only", "removed", "reviews", "same source"], lines)


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    folder = args.model or str(assets.smollm2_135m())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not args.smoke:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 6}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=3, head_dim=8, **sizes)
    config.vocab_size = 49152 if len(tokenizer) > 49152 else len(tokenizer)
    return LlamaForCausalLM(config).eval(), tokenizer


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/structured"), help="folder, default %(default)s")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", help="path or hub name of a causal language model; default: SmolLM2-135M")
    parser.add_argument("--text", type=Path, help="a text file; default: one half of the movie reviews")
    parser.add_argument("--arc", type=Path, help="arc_easy_test.jsonl; without it there is no ARC-Easy")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.15], help="of all parameters")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="draws of the calibration data")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--test", type=int, default=12, help="sequences of each source")
    parser.add_argument("--examples", type=int, default=100, help="questions, and reviews for sentiment")
    parser.add_argument("--calibration", type=int, default=4, help="sequences")
    parser.add_argument("--cost-calibration", type=int, default=1, help="sequences for part cost")
    parser.add_argument("--cost-shares", type=float, nargs="+", default=[0.03])
    parser.add_argument("--recover", choices=list(METHODS), default="MultiPruner", help="method of part recovery")
    parser.add_argument("--recovery-shares", type=float, nargs="+", default=[0.1])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--tokens", type=int, default=24, help="tokens of part speed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a random model, short texts")
    args = parser.parse_args(argv)
    if args.smoke:
        args.seeds, args.shares, args.cost_shares, args.recovery_shares = [0], [0.004], [0.004], [0.004]
        args.length, args.test, args.examples, args.calibration, args.cost_calibration = 16, 4, 8, 4, 2
        args.steps, args.batch, args.tokens, args.rounds = 2, 2, 2, 2
    fixed = (
        "length",
        "test",
        "examples",
        "calibration",
        "cost_calibration",
        "steps",
        "batch",
        "lr",
        "tokens",
        "rounds",
    )
    settings = {name: getattr(args, name) for name in fixed}
    settings |= {"model": "random" if args.smoke else args.model or "SmolLM2-135M"}
    settings |= {"text": args.text.name if args.text else "movie reviews"}
    rows = Rows(args.out / "structured.jsonl", settings)
    model, tokenizer = load(args)
    data = Data(tokenizer, args)
    if "methods" in args.parts:
        compare(model, data, rows, args)
    if "cost" in args.parts:
        cost(model, data, rows, args)
    if "speed" in args.parts:
        speed(model, rows, args)
    if "recovery" in args.parts:
        recovery(model, data, rows, args)
    results = {"settings": settings, "machine": machine(), "rows": rows.all}
    atomic_write_text(args.out / "structured.json", json.dumps(results))
    print(f"\n{report(results)}")
    return results


if __name__ == "__main__":
    main()
