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
"""Neural low-rank adapter search (an elastic LoRA) against LoRA of fixed rank, on a pruned encoder.

The encoder is pruned once with Wanda. Then every method trains on the same sentences, from the same classifier head and
in the same order for a given seed, so that two methods can be compared seed by seed. Subnets are selected on validation
sentences, and every reported accuracy is that of held-out sentences which neither training nor selection has seen.

    python benchmarks/nls_vs_lora.py --data FOLDER                 # FOLDER holds sst2_train.tsv and sst2_dev.tsv
    python benchmarks/nls_vs_lora.py                               # the movie reviews that the package fetches
    python benchmarks/nls_vs_lora.py --smoke --out outputs/smoke   # a toy encoder and toy sentences, seconds

Every finished run is kept in OUT/runs.jsonl; the same command continues where a broken one stopped. OUT/results.json
holds settings, machine, versions, runs and comparisons, and the tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import random
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy
import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from scipy import stats
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

import peft_elastic
from peft_elastic import ElasticLoraConfig, SubnetSamplingCallback, WandaConfig, prune
from peft_elastic.common import assets
from peft_elastic.common.progress import progress_bar
from peft_elastic.common.writing import atomic_write_text


@dataclass(frozen=True)
class Method:
    """One way to train: `rank` and `sampling` (None: fixed rank), on the pruned or the dense encoder."""

    rank: int
    sampling: str | None = None
    pruned: bool = True


# lora-24 is what a user of plain LoRA trains who wants the size of the heuristic subnet.
METHODS = {
    "lora-32": Method(32),
    "lora-24": Method(24),
    "nls": Method(32, sampling="uniform"),
    "nls-balanced": Method(32, sampling="balanced"),
    "lora-32-dense": Method(32, pruned=False),
}
ELASTIC_RANKS = [32, 24, 16]
SCALING = 2  # lora_alpha / r for every method
# As in Shears: query, key and value share one rank, both layers of the MLP have their own.
TARGET_MODULES = r".*\.(query|key|value)|.*\.layer\.\d+\.(intermediate|output)\.dense"
RANK_GROUPS = [["query", "key", "value"], ["intermediate.dense"], ["output.dense"]]
# (method:subnet, method:subnet). The first is what Shears claims, and was chosen before any run; the others explain it.
COMPARISONS = [
    ("nls:searched", "lora-32:fixed"),
    ("nls:max", "lora-32:fixed"),
    ("nls:heuristic", "lora-32:fixed"),
    ("nls:min", "lora-32:fixed"),
    ("nls:searched", "lora-24:fixed"),
    ("nls:heuristic", "lora-24:fixed"),
    ("nls:searched", "nls:heuristic"),
    ("lora-24:fixed", "lora-32:fixed"),
    ("nls-balanced:searched", "nls:searched"),
    ("lora-32-dense:fixed", "lora-32:fixed"),
]
CALIBRATION_SENTENCES = 128
SPLIT_SEED = 0

Example = tuple[str, int]  # sentence, label (0 or 1)
Batch = dict[str, torch.Tensor]


@dataclass
class Task:
    """The data, tokenized: `train` as examples for the Trainer, the other two as padded batches."""

    tokenizer: Any
    train: list[dict[str, Any]]
    validation: list[Batch]
    test: list[Batch]

    @property
    def sizes(self) -> dict[str, int]:
        def count(batches: list[Batch]) -> int:
            return sum(len(batch["labels"]) for batch in batches)

        return {"train": len(self.train), "validation": count(self.validation), "test": count(self.test)}


# -- data and models ---------------------------------------------------------------------------------------------------


def read_tsv(path: Path) -> list[Example]:
    """One `sentence <tab> label` per line."""
    rows = [line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(text, int(label)) for text, label in rows]


def load_sentences(args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """Sentences to learn from and held-out sentences."""
    if args.smoke:
        return toy_sentences(240), toy_sentences(60, seed=1)
    if args.data is not None:
        return read_tsv(args.data / "sst2_train.tsv"), read_tsv(args.data / "sst2_dev.tsv")
    rated = {row["text"]: row["rating"] for row in assets.movie_reviews()}  # by text: two occur twice
    sentences = [(text, int(rating > 0)) for text, rating in rated.items() if abs(rating) >= 1]
    random.Random(SPLIT_SEED).shuffle(sentences)
    held_out = len(sentences) // 8
    return sentences[held_out:], sentences[:held_out]


def load_task(args: argparse.Namespace, tokenizer: Any) -> Task:
    """The validation sentences come out of those to learn from; the held-out ones are all for the report."""
    sentences, held_out = load_sentences(args)
    random.Random(SPLIT_SEED).shuffle(sentences)
    validation, train = sentences[: args.validation], sentences[args.validation :]
    if args.train_sentences is not None:
        train = train[: args.train_sentences]

    def encode(examples: list[Example]) -> list[dict[str, Any]]:
        texts = [text for text, _ in examples]
        encoded = tokenizer(texts, truncation=True, max_length=args.max_length)
        return [{**{k: v[i] for k, v in encoded.items()}, "labels": examples[i][1]} for i in range(len(texts))]

    return Task(
        tokenizer,
        encode(train),
        padded_batches(tokenizer, encode(validation)),
        padded_batches(tokenizer, encode(held_out)),
    )


def padded_batches(tokenizer: Any, examples: list[dict[str, Any]], size: int = 32) -> list[Batch]:
    """Sorted by length, so that little is padded."""
    examples = sorted(examples, key=lambda example: len(example["input_ids"]))
    collate = DataCollatorWithPadding(tokenizer)
    return [dict(collate(examples[i : i + size])) for i in range(0, len(examples), size)]


def toy_sentences(number: int, seed: int = 0) -> list[Example]:
    """Sentences whose sentiment is that of the majority of their words."""
    rng = random.Random(seed)
    words = {0: ["dull", "bad", "flat", "tired"], 1: ["bright", "good", "warm", "alive"]}
    examples = []
    for _ in range(number):
        label = rng.randrange(2)
        chosen = rng.choices(words[label], k=3) + rng.choices(words[1 - label], k=rng.randrange(2))
        chosen += rng.choices(["the", "film", "is", "a", "story"], k=rng.randrange(2, 6))
        rng.shuffle(chosen)
        examples.append((" ".join(chosen), label))
    return examples


def make_toy_encoder(folder: Path) -> None:
    """A BERT of random weights with two narrow layers, and its tokenizer."""
    set_seed(0)
    words = sorted({word for text, _ in toy_sentences(240) for word in text.split()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    BertModel(config).save_pretrained(folder)


def prune_encoder(source: Path | str, target: Path, task: Task, sparsity: float) -> dict[str, Any]:
    """Write the pruned encoder to `target`, unless it is there; returns the report of `prune`."""
    report_path = target / "pruning_report.json"
    if not report_path.exists():
        encoder = AutoModel.from_pretrained(source)
        sentences = [{k: v for k, v in row.items() if k != "labels"} for row in task.train[:CALIBRATION_SENTENCES]]
        calibration = padded_batches(task.tokenizer, sentences)
        report = prune(encoder, WandaConfig(sparsity=sparsity), calibration)
        encoder.save_pretrained(target)
        task.tokenizer.save_pretrained(target)
        report.save(report_path)  # last: its presence says that the folder is complete
    return json.loads(report_path.read_text())


# -- one run -----------------------------------------------------------------------------------------------------------


def build_model(method: Method, encoder: Path | str, seed: int, dropout: float) -> PeftModel:
    """The encoder with a new head and a new adapter; the head depends on the seed alone."""
    set_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    common: dict[str, Any] = {
        "r": method.rank,
        "lora_alpha": SCALING * method.rank,
        "lora_dropout": dropout,
        "target_modules": TARGET_MODULES,
        "modules_to_save": ["classifier"],
        "task_type": "SEQ_CLS",
    }
    if method.sampling is None:
        return get_peft_model(model, LoraConfig(**common))
    return get_peft_model(model, ElasticLoraConfig(**common, elastic_ranks=ELASTIC_RANKS, rank_groups=RANK_GROUPS))


def train(model: PeftModel, method: Method, task: Task, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train with the Trainer; returns seconds, steps and the mean training loss."""
    training_args = TrainingArguments(
        output_dir=str(args.out / "trainer"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type="linear",
        warmup_steps=0.06,
        train_sampling_strategy="group_by_length",
        seed=seed,
        data_seed=seed,
        bf16=args.bf16,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        label_names=["labels"],
        dataloader_pin_memory=False,
    )
    callbacks = [] if method.sampling is None else [SubnetSamplingCallback(method.sampling)]
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=task.train,
        data_collator=DataCollatorWithPadding(task.tokenizer),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    output = trainer.train()
    return {
        "seconds": time.perf_counter() - start,
        "steps": output.global_step,
        "loss": output.training_loss,
    }


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Batch], bf16: bool) -> float:
    """Share of right answers, in [0, 1]."""
    model.eval()
    right = total = 0
    with torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            right += int((model(**inputs).logits.argmax(-1) == batch["labels"]).sum())
            total += len(batch["labels"])
    return right / total


def run(
    name: str, seed: int, encoders: dict[bool, Path | str], task: Task, args: argparse.Namespace
) -> dict[str, Any]:
    """Train one method with one seed; returns validation and held-out accuracy of each subnet that is reported."""
    method = METHODS[name]
    model = build_model(method, encoders[method.pruned], seed, args.dropout)
    train_info = train(model, method, task, seed, args)
    start = time.perf_counter()
    subnets = {}
    if method.sampling is None:
        subnets["fixed"] = {
            "validation": accuracy(model, task.validation, args.bf16),
            "test": accuracy(model, task.test, args.bf16),
            "adapter_parameters": sum(p.numel() for n, p in model.named_parameters() if "lora_" in n),
        }
    else:
        found = model.search_subnet(
            lambda candidate: accuracy(candidate, task.validation, args.bf16),
            objectives=("accuracy", "macs"),
            n_evals=args.n_evals,
            seed=seed,
            progress=False,
        )
        space = model.search_space
        for subnet_name in ("max", "heuristic", "min", "searched"):
            subnet = found.best() if subnet_name == "searched" else space.subnet(subnet_name)
            model.set_subnet(subnet)
            subnets[subnet_name] = {
                "validation": found.evaluation(subnet).metrics["accuracy"],
                "test": accuracy(model, task.test, args.bf16),
                "adapter_parameters": space.count_parameters(subnet),
            }
    evaluation_seconds = time.perf_counter() - start
    return {
        "method": name,
        "seed": seed,
        "subnets": subnets,
        "train": train_info,
        "evaluation_seconds": evaluation_seconds,
    }


# -- all runs ----------------------------------------------------------------------------------------------------------


def settings_of(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """All that changes the outcome of a run, and so must be equal for runs that are compared."""
    names = ["sparsity", "epochs", "batch_size", "lr", "max_length", "dropout", "n_evals", "bf16", "smoke"]
    return {
        "model": "toy" if args.smoke else args.model or "all-MiniLM-L6-v2",
        **{name: getattr(args, name) for name in names},
        "data": "toy" if args.smoke else "movie reviews" if args.data is None else "SST-2",
        "sentences": task.sizes,
        "elastic_ranks": ELASTIC_RANKS,
        "methods": {name: asdict(method) for name, method in METHODS.items()},
    }


def open_runs(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs of an earlier call; a new file for `settings` if there was none.

    Raises:
        ValueError: if they were made with other settings.
    """
    if not path.exists():
        write_runs(path, settings, [])
    header, *runs = [json.loads(line) for line in path.read_text().splitlines()]
    if header != settings:
        changed = sorted(key for key in settings if header.get(key) != settings[key])
        raise ValueError(f"`--out`: {str(path)!r} holds runs of other settings (they differ in {changed}).")
    return runs


def write_runs(path: Path, settings: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """The settings and then the runs, one JSON object per line."""
    atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in [settings, *runs]))


def schedule(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """(method, seed). The references get fewer seeds: no claim rests on them."""
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name in args.methods:
            if METHODS[name].pruned or seed < args.first_seed + args.dense_seeds:
                yield name, seed


# -- report ------------------------------------------------------------------------------------------------------------


def scores(runs: list[dict[str, Any]], column: str) -> dict[int, float]:
    """Seed -> held-out accuracy in percent, for a column such as "nls:searched"."""
    name, subnet = column.split(":")
    return {
        row["seed"]: 100 * row["subnets"][subnet]["test"]
        for row in runs
        if row["method"] == name and subnet in row["subnets"]
    }


def columns(runs: list[dict[str, Any]]) -> list[str]:
    names = {f"{row['method']}:{subnet}": None for row in runs for subnet in row["subnets"]}
    return sorted(names, key=lambda column: list(METHODS).index(column.split(":")[0]))  # sorted() is stable


def t_interval(values: list[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean and half the width of Student's t interval; the width is NaN below two values."""
    if len(values) < 2:
        return mean(values), math.nan
    quantile = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1))
    return mean(values), quantile * stdev(values) / math.sqrt(len(values))


def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paired differences of `COMPARISONS` that the runs allow, in points of held-out accuracy."""
    rows = []
    for left, right in COMPARISONS:
        first, second = scores(runs, left), scores(runs, right)
        seeds = sorted(first.keys() & second.keys())
        if not seeds:
            continue
        differences = [first[seed] - second[seed] for seed in seeds]
        centre, half_width = t_interval(differences)
        rows.append(
            {
                "first": left,
                "second": right,
                "seeds": len(seeds),
                "mean_difference": centre,
                "interval_95": None if math.isnan(half_width) else [centre - half_width, centre + half_width],
                "better_equal_worse": [
                    sum(d > 0 for d in differences),
                    sum(d == 0 for d in differences),
                    sum(d < 0 for d in differences),
                ],
            }
        )
    return rows


def markdown(runs: list[dict[str, Any]]) -> str:
    """The tables of docs/results.md."""
    names = columns(runs)
    lines = ["| seed | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    table = {name: scores(runs, name) for name in names}
    for seed in sorted({row["seed"] for row in runs}):
        cells = [f"{table[name][seed]:.2f}" if seed in table[name] else "" for name in names]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    lines.append("| mean | " + " | ".join(f"{mean(table[name].values()):.2f}" for name in names) + " |")
    deviations = [f"{stdev(table[name].values()):.2f}" if len(table[name]) > 1 else "" for name in names]
    lines.append("| standard deviation | " + " | ".join(deviations) + " |")
    sizes = [
        mean(
            row["subnets"][name.split(":")[1]]["adapter_parameters"]
            for row in runs
            if row["method"] == name.split(":")[0]
        )
        for name in names
    ]
    lines.append("| adapter parameters (mean) | " + " | ".join(f"{size:,.0f}" for size in sizes) + " |")
    lines += [
        "",
        "| difference (points) | seeds | mean | 95% interval | better / equal / worse |",
        "|---|---|---|---|---|",
    ]
    for row in compare(runs):
        low_high = row["interval_95"]
        interval = "" if low_high is None else f"[{low_high[0]:+.2f}, {low_high[1]:+.2f}]"
        counts = " / ".join(map(str, row["better_equal_worse"]))
        lines.append(
            f"| {row['first']} - {row['second']} | {row['seeds']} | {row['mean_difference']:+.2f} | {interval} | {counts} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures depend on besides the settings."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    packages = {module.__name__: module.__version__ for module in (numpy, peft, peft_elastic, torch, transformers)}
    return {
        "cpu": models[0].partition(":")[2].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **packages},
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("outputs/nls_vs_lora"),
        help="folder of the results, default %(default)s; the same command continues a broken run in it",
    )
    parser.add_argument(
        "--data", type=Path, help="folder with sst2_train.tsv and sst2_dev.tsv; default: movie reviews"
    )
    parser.add_argument("--model", help="path or hub name of a BERT encoder; default: all-MiniLM-L6-v2 from PyPI")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--dense-seeds", type=int, default=2, help="seeds of the reference that is not pruned")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--dropout", type=float, default=0.1, help="of the adapters")
    parser.add_argument("--max-length", type=int, default=64, help="tokens; longer sentences are cut")
    parser.add_argument("--train-sentences", type=int, help="use only so many; default: all")
    parser.add_argument("--validation", type=int, default=400, help="sentences taken from training for the search")
    parser.add_argument("--n-evals", type=int, default=40, help="evaluations of each search")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast in training and evaluation")
    parser.add_argument("--smoke", action="store_true", help="toy encoder and sentences, two seeds; needs no files")
    args = parser.parse_args(argv)
    if args.smoke:
        args.seeds, args.dense_seeds, args.epochs, args.lr, args.n_evals, args.validation = 2, 1, 4, 1e-2, 6, 40
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.smoke:
        source = args.out / "toy"
        make_toy_encoder(source)
    else:
        source = args.model or assets.minilm_l6()
    task = load_task(args, AutoTokenizer.from_pretrained(source))
    path, settings = args.out / "runs.jsonl", settings_of(args, task)
    runs = open_runs(path, settings)
    pruned = args.out / "pruned"
    pruning = prune_encoder(source, pruned, task, args.sparsity)

    done = {(row["method"], row["seed"]) for row in runs}
    wanted = list(schedule(args))
    bar = progress_bar([key for key in wanted if key not in done], desc="runs")
    for name, seed in bar:
        row = run(name, seed, {True: pruned, False: source}, task, args)
        runs.append(row)
        write_runs(path, settings, runs)
        accuracies = ", ".join(f"{key} {100 * value['test']:.2f}" for key, value in row["subnets"].items())
        bar.write(f"{name} seed {seed}: {accuracies}")

    runs = sorted((row for row in runs if (row["method"], row["seed"]) in wanted), key=itemgetter("seed"))
    results = {
        "run_info": {
            "command": shlex.join([Path(sys.argv[0]).name, *(argv if argv is not None else sys.argv[1:])]),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **machine(),
        },
        "settings": settings,
        "pruning": {key: pruning[key] for key in ("method", "sparsity", "calibration_tokens", "seconds")},
        "comparisons": compare(runs),
        "runs": runs,
    }
    atomic_write_text(args.out / "results.json", json.dumps(results, indent=1) + "\n")
    print(f"\n{markdown(runs)}")
    return results


if __name__ == "__main__":
    main()
