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
"""What training and searching a super-network of width gains: a real encoder, several seeds, data that nothing has seen.

all-MiniLM-L6-v2 (6 layers, 12 heads, 1536 MLP channels) is sorted by importance and becomes an elastic super-network in rank,
heads and MLP channels. It is trained on movie reviews in several ways, all but one with as many backward passes:

- `uniform`: one random subnet a step, 4 times the steps.
- `uniform, fewer passes`: one random subnet a step, as many steps as with the sandwich rule, so a quarter of the passes.
- `sandwich`: the largest, the smallest and two random subnets a step.
- `sandwich + distillation`: the same, the smaller ones also learn from the largest (in place).
- `uniform, unsorted`: as `uniform`, on channels in the order in which they come (LoNAS).

NSGA-II then searches each super-network on validation reviews. The report compares, on held-out reviews, the heuristic subnet with
the searched one: the lowest loss on validation data at no more MACs than the heuristic. On the first super-network of each seed NSGA-II
and random search are compared by hypervolume at equal evaluations (--hypervolume-seeds).

    python benchmarks/lonas.py --out outputs/lonas                # 3 seeds, about two hours on two cores
    python benchmarks/lonas.py --smoke --out outputs/lonas-smoke  # a few steps, a minute

Every finished part is kept in OUT, and the same command continues where a broken one stopped. OUT/lonas.json holds everything, and
the tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from _support import describe_machine, machine, table
from _support.classification import Example, batches, collate, quality, student
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from peft_elastic import ElasticLoraConfig, ElasticTrainer, SearchResult, search_subnet
from peft_elastic.common import assets
from peft_elastic.common.progress import progress_bar
from peft_elastic.common.writing import atomic_write_text
from peft_elastic.search import hypervolume_of


METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"strategy": "uniform"},
    "uniform, fewer passes": {"strategy": "uniform", "fewer_passes": True},
    "sandwich": {"strategy": "sandwich"},
    "sandwich + distillation": {"strategy": "sandwich", "distillation": "max"},
    "uniform, unsorted": {"strategy": "uniform", "importance": "none"},
}
# What is compared on held-out reviews, and with how many digits.
KEYS = (("held_out", 2), ("held_out_loss", 4))
SUBNETS = 4  # of a step of the sandwich rule
# Of search_subnet: the loss tells subnets apart that have the same accuracy on a few hundred reviews.
SEARCH: dict[str, Any] = {"objectives": ("loss", "macs"), "mode": {"loss": "min"}, "progress": False}
RANKS = [16, 12, 8]
WIDTH = {"heads": [1.0, 0.75, 0.5], "mlp": [1.0, 0.75, 0.5, 0.25]}

# -- data --------------------------------------------------------------------------------------------------------------


def reviews(longest: int) -> list[Example]:
    """The reviews with a clear sentiment and at most so many characters, in an order of their own."""
    rows = {row["text"]: row["rating"] for row in assets.movie_reviews()}  # by text: two occur twice
    found = [
        {"text": text, "label": int(rating > 0)}
        for text, rating in rows.items()
        if abs(rating) >= 0.5 and len(text) <= longest
    ]
    random.Random(0).shuffle(found)
    return found


# -- super-networks ----------------------------------------------------------------------------------------------------


def build(folder: str, seed: int, importance: str) -> PeftModel:
    torch.manual_seed(seed)  # of the classifier, which is new
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    config = ElasticLoraConfig(
        task_type="SEQ_CLS",
        r=RANKS[0],
        lora_alpha=2 * RANKS[0],
        elastic_ranks=RANKS,
        rank_groups="block",
        target_modules=["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
        elastic_width=WIDTH,
        importance=importance,
    )
    return get_peft_model(base, config)


def train(
    folder: str, tokenizer: Any, data: list[Example], method: str, seed: int, args: argparse.Namespace, out: Path
) -> None:
    """Train one super-network and save its adapter."""
    options = dict(METHODS[method])
    importance = options.pop("importance", "activation")
    fewer_passes = options.pop("fewer_passes", False)
    model = build(folder, seed, importance)
    if importance != "none":
        model.sort_by_importance(batches(tokenizer, data[: args.calibration], 32), progress=False)
    steps = args.steps * (SUBNETS if options["strategy"] == "uniform" and not fewer_passes else 1)
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=args.batch,
        max_steps=steps,
        learning_rate=args.lr,
        lr_scheduler_type="linear",
        warmup_steps=steps // 10,
        weight_decay=0.0,
        seed=seed,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = ElasticTrainer(
        model=model,
        args=arguments,
        train_dataset=data,  # type: ignore[arg-type]
        data_collator=lambda examples: collate(tokenizer, examples),
        seed=seed,
        **options,
    )
    trainer.train()
    model.save_pretrained(out)


def load(folder: str, seed: int, adapter: Path) -> PeftModel:
    torch.manual_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    return PeftModel.from_pretrained(base, adapter).eval()


# -- report ------------------------------------------------------------------------------------------------------------


def best_within(result: SearchResult, limit: float) -> Any:
    """The evaluation with the lowest loss at no more MACs than that; the cheapest of equals."""
    affordable = [evaluation for evaluation in result.history if evaluation.metrics["macs"] <= limit]
    return min(affordable, key=lambda e: (e.metrics["loss"], e.metrics["macs"]))


def report(results: dict[str, Any]) -> str:
    settings, rows = results["settings"], results["rows"]
    header = ["", "subnet", "MACs", "held-out %", "per seed", "held-out loss", "per seed"]
    lines, differences = [], []
    for method in [name for name in METHODS if any(row["method"] == name for row in rows)]:
        own = [row for row in rows if row["method"] == method]
        for subnet in ("max", "heuristic", "searched", "min"):
            entries = [row[subnet] for row in own]
            held_out = [entry["held_out"] for entry in entries]
            lines.append(
                [
                    method if subnet == "max" else "",
                    subnet,
                    f"{100 * mean(entry['macs'] / row['max']['macs'] for entry, row in zip(entries, own)):.0f}%",
                    f"{mean(held_out):.1f}",
                    " / ".join(f"{value:.1f}" for value in held_out),
                    f"{mean(entry['held_out_loss'] for entry in entries):.3f}",
                    " / ".join(f"{entry['held_out_loss']:.3f}" for entry in entries),
                ]
            )
        differences.append(
            [
                f"{method}: searched - heuristic",
                *[
                    student([row["searched"][key] - row["heuristic"][key] for row in own], digits)
                    for key, digits in KEYS
                ],
            ]
        )
    for first, second in (
        ("sandwich", "uniform"),
        ("sandwich", "uniform, fewer passes"),
        ("sandwich + distillation", "sandwich"),
        ("uniform", "uniform, unsorted"),
    ):
        pairs = {row["seed"]: row for row in rows if row["method"] == first}
        others = {row["seed"]: row for row in rows if row["method"] == second}
        for subnet in ("max", "heuristic", "searched", "min"):
            shared = sorted(pairs.keys() & others)
            values = [[pairs[s][subnet][key] - others[s][subnet][key] for s in shared] for key, _ in KEYS]
            if shared:
                cells = [student(found, digits) for found, (_, digits) in zip(values, KEYS)]
                differences.append([f"{first} - {second}, {subnet}", *cells])
    parts = [
        f"all-MiniLM-L6-v2, movie reviews: {settings['train']} to train on, {settings['validation']} to search on, "
        f"{settings['test']} held out; {settings['steps']} steps of {SUBNETS} x {settings['batch']} examples, "
        f"{settings['evaluations']} evaluations of NSGA-II, {settings['seeds']} seeds. {describe_machine(results['machine'])}",
        table(header, lines),
        table(["difference on held-out reviews, mean ± 95% over seeds", "accuracy, points", "loss"], differences),
    ]
    volumes = results["hypervolume"]
    if volumes:
        names = list(dict.fromkeys(row["algorithm"] for row in volumes))
        cells = [
            [
                name,
                f"{mean(row['hypervolume'] for row in volumes if row['algorithm'] == name):.4f}",
                " / ".join(f"{row['hypervolume']:.4f}" for row in volumes if row["algorithm"] == name),
            ]
            for name in names
        ]
        parts.append("Hypervolume of validation loss and MACs, the box from (ln 2, all MACs) to (0, none) being 1:")
        parts.append(
            table([f"hypervolume after {settings['hypervolume_evaluations']} evaluations", "mean", "per seed"], cells)
        )
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/lonas"), help="folder, default %(default)s")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--longest", type=int, default=110, help="characters of a review")
    parser.add_argument("--train", type=int, default=3000)
    parser.add_argument("--validation", type=int, default=300)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--evaluations", type=int, default=80)
    parser.add_argument("--hypervolume-seeds", type=int, default=5)
    parser.add_argument("--hypervolume-evaluations", type=int, default=80)
    parser.add_argument("--train-only", action="store_true", help="stop after the training")
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    args = parser.parse_args(argv)
    if args.smoke:
        args.seeds, args.steps, args.batch, args.evaluations = 1, 2, 4, 8
        args.train, args.validation, args.test, args.calibration = 40, 16, 16, 8
        args.hypervolume_seeds, args.hypervolume_evaluations = 2, 8
    folder = str(assets.minilm_l6())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = reviews(args.longest)
    if len(data) < args.train + args.validation + args.test:
        raise ValueError(f"There are {len(data)} such reviews, fewer than --train, --validation and --test ask for.")
    held_out = quality(batches(tokenizer, data[: args.test], 64))
    data = data[args.test :]
    validation = quality(batches(tokenizer, data[: args.validation], 64))
    training = data[args.validation : args.validation + args.train]
    seeds = range(args.first_seed, args.first_seed + args.seeds)

    runs = [(method, seed) for seed in seeds for method in args.methods]
    for method, seed in progress_bar(runs, desc="training"):
        out = args.out / f"{method}-{seed}"
        if not (out / "adapter_config.json").exists():
            train(folder, tokenizer, training, method, seed, args, out)
    if args.train_only:
        return {}

    rows = []
    for method, seed in progress_bar(runs, desc="search"):
        out = args.out / f"{method}-{seed}"
        model = load(folder, seed, out)
        result = search_subnet(
            model, validation, n_evals=args.evaluations, seed=seed, save_dir=out / "search", **SEARCH
        )
        heuristic = result.evaluation("heuristic")
        chosen = {
            "max": result.evaluation("max"),
            "heuristic": heuristic,
            "searched": best_within(result, heuristic.metrics["macs"]),
            "min": result.evaluation("min"),
        }
        row: dict[str, Any] = {"method": method, "seed": seed}
        for name, evaluation in chosen.items():
            model.set_subnet(evaluation.subnet)
            metrics = evaluation.metrics
            row[name] = {
                "macs": metrics["macs"],
                "parameters": metrics["parameters"],
                "subnet": evaluation.subnet.to_dict(),
            }
            found = held_out(model)
            row[name] |= {"validation": metrics["accuracy"], "validation_loss": metrics["loss"]}
            row[name] |= {"held_out": found["accuracy"], "held_out_loss": found["loss"]}
        rows.append(row)
        shown = {name: round(row[name]["held_out"], 1) for name in chosen}
        print(f"{method}, seed {seed}: held-out {shown}", flush=True)

    volumes = []
    model = load(folder, seeds[0], args.out / f"{args.methods[0]}-{seeds[0]}")
    for seed in progress_bar(range(args.hypervolume_seeds), desc="hypervolume"):
        for algorithm in ("nsga2", "random"):
            result = search_subnet(
                model,
                validation,
                algorithm=algorithm,
                n_evals=args.hypervolume_evaluations,
                seed=seed,
                save_dir=args.out / f"{algorithm}-{seed}",
                **SEARCH,
            )
            # between guessing at the price of all MACs and knowing for nothing
            worst = {"loss": math.log(2), "macs": result.reference.metrics["macs"]}
            volume = hypervolume_of(result, worst, {"loss": 0.0, "macs": 0.0})
            volumes.append({"algorithm": algorithm, "seed": seed, "hypervolume": volume[-1], "after_each": volume})

    settings = {key: value for key, value in vars(args).items() if key not in ("out", "methods", "train_only")}
    results = {"settings": settings, "machine": machine(), "rows": rows, "hypervolume": volumes}
    atomic_write_text(args.out / "lonas.json", json.dumps(results))
    print(f"\n{report(results)}")
    return results


if __name__ == "__main__":
    main()
