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
"""What merging costs: LoRA, SparsePEFT and QA-SparsePEFT on a pruned language model, against rounding after the merge.

SmolLM2-135M is pruned once with Wanda. For each seed every method trains on the same movie reviews in the same order, and
everything that can be deployed from it is measured on the same held-out reviews:

- `lora`: plain LoRA. `unmerged` keeps the adapter beside the sparse base; `merged` is dense.
- `sparse`: SparsePEFT, merged: as sparse as the base. Rounded to --bits bits afterwards: `+ RTN` (to nearest), `+ RTN, mse`
  (ranges shrunk to the smallest squared error), `+ GPTQ` (with act-order, on training reviews).
- `qa`: QA-SparsePEFT on the base that GPTQ has quantised on the reviews Wanda saw; merged: sparse, and --bits bits.
- `pruned`, `pruned + GPTQ`: the base before any training.

    python benchmarks/sqft.py --out outputs/sqft                    # 3 seeds, about 40 minutes on two cores
    python benchmarks/sqft.py --smoke --out outputs/sqft-smoke      # a random model and a few steps, a minute

Every measured row is kept in OUT/rows.jsonl, and the same command continues where a broken one stopped. OUT/sqft.json holds
everything, and the tables are printed as Markdown. MB: linear layers of the blocks as the checkpoint would hold them (bf16;
bitmap and nonzeros where sparse; bits, scales and zero points where quantised), the rest and the adapter in bf16.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _support import describe_machine, machine, table
from peft import LoraConfig, get_peft_model
from scipy import stats
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_elastic import GPTQConfig, QuantizedLinear, RTNConfig, SparseQALoraConfig, WandaConfig, prune, quantize
from peft_elastic.common import assets
from peft_elastic.common.progress import progress_bar
from peft_elastic.common.writing import atomic_write_text
from peft_elastic.pruning import measure_sparsity
from peft_elastic.search import MultipleChoiceEvaluator


CHOICES = [" negative", " positive"]
RANK = 32
METHODS = ("lora", "sparse", "qa")
# The last comparison is what QA-SparsePEFT is for. (first, second): differences are first - second.
COMPARISONS = [
    ("lora merged", "lora unmerged"),
    ("sparse merged", "lora unmerged"),
    ("sparse merged", "sparse unmerged"),
    ("qa merged", "qa unmerged"),
    ("qa merged", "sparse merged"),
    ("qa merged", "sparse merged + RTN"),
    ("qa merged", "sparse merged + RTN, mse"),
    ("qa merged", "sparse merged + GPTQ"),
]

Example = dict[str, Any]  # prompt, choices, label: index of the right choice


# -- data and models ---------------------------------------------------------------------------------------------------


def examples() -> list[Example]:
    """The movie reviews with a clear sentiment and fewer than 160 characters, in an order of their own."""
    rows = {row["text"]: row["rating"] for row in assets.movie_reviews()}  # by text: two occur twice
    found = [
        {"prompt": f"Review: {text}\nSentiment:", "choices": CHOICES, "label": int(rating > 0)}
        for text, rating in rows.items()
        if abs(rating) >= 1 and len(text) < 160
    ]
    random.Random(0).shuffle(found)
    return found


def encode(tokenizer: Any, batch: list[Example]) -> dict[str, torch.Tensor]:
    """Padded on the right; only the answer has labels."""
    prompts = [tokenizer(example["prompt"])["input_ids"] for example in batch]
    answers = [tokenizer(example["choices"][example["label"]])["input_ids"] for example in batch]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers))
    ids, mask, labels = (torch.full((len(batch), length), fill) for fill in (0, 0, -100))
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def calibration(tokenizer: Any, train: list[Example], sequences: int) -> list[torch.Tensor]:
    """Training reviews one after the other, in sequences of 128 tokens."""
    ids = [token for example in train for token in tokenizer(example["prompt"])["input_ids"]]
    return [torch.tensor(ids[i * 128 : (i + 1) * 128])[None] for i in range(min(sequences, len(ids) // 128))]


def build(method: str, bases: dict[str, nn.Module], args: argparse.Namespace, seed: int) -> nn.Module:
    base = copy.deepcopy(bases["pruned + GPTQ" if method == "qa" else "pruned"])
    settings: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    torch.manual_seed(seed)
    if method == "lora":
        return get_peft_model(base, LoraConfig(**settings))
    config = SparseQALoraConfig(**settings, elastic_ranks=[RANK], quantization_aware=method == "qa")
    return get_peft_model(base, config)


def train(model: nn.Module, tokenizer: Any, data: list[Example], args: argparse.Namespace, seed: int) -> float:
    """AdamW with a linear decay after a tenth of warm-up; returns the seconds of the median step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr)
    warm_up = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (args.steps - step) / (args.steps - warm_up + 1))
    )
    order = random.Random(seed)
    seconds = []
    model.train()
    for _ in progress_bar(range(args.steps), desc="train", leave=False):
        start = time.perf_counter()
        loss = model(**encode(tokenizer, order.sample(data, args.batch))).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - start)
    model.eval()
    return sorted(seconds)[len(seconds) // 2]


def quantized(model: nn.Module, tokenizer: Any, data: list[Example], how: str, args: argparse.Namespace) -> nn.Module:
    model = copy.deepcopy(model)
    options: dict[str, Any] = {"bits": args.bits, "group_size": args.group_size}
    if how == "GPTQ":
        quantize(
            model,
            GPTQConfig(**options, act_order=True),
            calibration(tokenizer, data, args.calibration),
            progress=False,
        )
    else:
        quantize(model, RTNConfig(**options, clipping="mse" if how == "RTN, mse" else "minmax"), progress=False)
    return model


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(model: nn.Module, scorer: MultipleChoiceEvaluator) -> dict[str, Any]:
    """For each held-out example whether the right choice is the most likely one, and -log of its probability."""
    correct, loss = [], []
    for scores, label in zip(scorer.scores(model), scorer.labels):
        log_probs = torch.tensor(scores, dtype=torch.float64).log_softmax(0)
        correct.append(int(log_probs.argmax() == label))
        loss.append(round(-float(log_probs[label]), 5))
    return {"correct": correct, "loss": loss}


def zeros(model: nn.Module) -> float:
    """Share of zeros in the linear layers of the blocks, as they compute."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    count = total = 0
    for name in measure_sparsity(model):
        layer = model.get_submodule(name)
        if layer is head:
            continue
        weight = layer.grid.round(layer.weight) if isinstance(layer, QuantizedLinear) else layer.weight
        count += weight.numel() - int(weight.count_nonzero())
        total += weight.numel()
    return count / total


def megabytes(model: nn.Module, adapter: int = 0) -> float:
    """Of a checkpoint; `adapter`: its parameters."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    names = [name for name in measure_sparsity(model) if model.get_submodule(name) is not head]
    size = 2.0 * (sum(p.numel() for p in model.parameters()) + adapter)
    for name in names:
        layer: Any = model.get_submodule(name)
        count = layer.weight.numel()
        is_quantized = isinstance(layer, QuantizedLinear)
        weight = layer.grid.round(layer.weight) if is_quantized else layer.weight
        kept = int(weight.count_nonzero())
        bits = layer.grid.bits if is_quantized else 16
        size -= 2 * count
        size += min(kept * bits / 8 + count / 8, count * bits / 8)
        if is_quantized:
            size += layer.grid.scales.numel() * 3  # a scale of 16 bits, a zero point of 8
    return size / 1e6


def measure_method(
    method: str,
    seed: int,
    bases: dict[str, nn.Module],
    tokenizer: Any,
    splits: dict[str, Any],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Train, and measure all that can be deployed."""
    model = build(method, bases, args, seed)
    seconds = train(model, tokenizer, splits["train"], args, seed)
    adapter = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    base = model.get_base_model()

    def row(name: str, measured: nn.Module, **more: Any) -> dict[str, Any]:
        return {"name": name, "seed": seed, "step_seconds": seconds, **measure(measured, splits["scorer"]), **more}

    size = megabytes(bases["pruned + GPTQ" if method == "qa" else "pruned"], adapter)
    yield row(f"{method} unmerged", model, zeros=None, megabytes=size)
    merged = model.merge_and_unload(**({} if method == "lora" else {"sparse_kernel": False}))
    assert merged is base
    yield row(f"{method} merged", merged, zeros=zeros(merged), megabytes=megabytes(merged))
    if method == "sparse":
        for how in ("RTN", "RTN, mse", "GPTQ"):
            rounded = quantized(merged, tokenizer, splits["train"], how, args)
            yield row(f"sparse merged + {how}", rounded, zeros=zeros(rounded), megabytes=megabytes(rounded))


# -- report ------------------------------------------------------------------------------------------------------------


def per_seed(rows: list[dict[str, Any]], name: str, key: str) -> dict[int, float]:
    return {row["seed"]: mean(row[key]) * (100 if key == "correct" else 1) for row in rows if row["name"] == name}


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences of accuracy (points) and loss (nats): means over seeds with Student's t interval, and over all pairs of
    examples with the standard error of the mean."""
    found = []
    by_key = {(row["name"], row["seed"]): row for row in rows}
    for first, second in COMPARISONS:
        seeds = sorted({seed for name, seed in by_key if name == first} & {s for n, s in by_key if n == second})
        if not seeds:
            continue
        entry: dict[str, Any] = {"first": first, "second": second, "seeds": len(seeds)}
        for key, scale in (("correct", 100), ("loss", 1)):
            pairs = [
                [scale * (a - b) for a, b in zip(by_key[first, seed][key], by_key[second, seed][key], strict=True)]
                for seed in seeds
            ]
            means = [mean(values) for values in pairs]
            width = math.nan
            if len(seeds) > 1:
                width = float(stats.t.ppf(0.975, len(seeds) - 1)) * stdev(means) / math.sqrt(len(seeds))
            flat = [value for values in pairs for value in values]
            entry[key] = {
                "mean": mean(means),
                "half_width_95": width,
                "standard_error": stdev(flat) / math.sqrt(len(flat)),
                "per_seed": means,
            }
        found.append(entry)
    return found


def report(results: dict[str, Any]) -> str:
    rows = results["rows"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = []
    for name in names:
        own = [row for row in rows if row["name"] == name]
        accuracy, loss = per_seed(rows, name, "correct"), per_seed(rows, name, "loss")
        share = "" if own[0]["zeros"] is None else f"{100 * mean(row['zeros'] for row in own):.1f}"
        lines.append(
            [
                name,
                f"{mean(accuracy.values()):.1f}",
                " / ".join(f"{value:.1f}" for value in accuracy.values()),
                f"{mean(loss.values()):.3f}",
                share,
                f"{mean(row['megabytes'] for row in own):.0f}",
            ]
        )
    first = table(["", "accuracy %", "per seed", "loss", "zeros %", "MB"], lines)
    differences = [
        [
            f"{entry['first']} - {entry['second']}",
            f"{entry['correct']['mean']:+.2f} ± {entry['correct']['half_width_95']:.2f}",
            f"{entry['correct']['standard_error']:.2f}",
            f"{entry['loss']['mean']:+.4f} ± {entry['loss']['half_width_95']:.4f}",
            f"{entry['loss']['standard_error']:.4f}",
        ]
        for entry in results["comparisons"]
    ]
    header = ["difference", "accuracy, points (95% over seeds)", "standard error over examples", "loss", "the same"]
    settings = results["settings"]
    return "\n\n".join(
        [
            f"{settings['model']}, {settings['sparsity']:.0%} zeros, {settings['steps']} steps of {settings['batch']}, "
            f"{settings['bits']} bits in groups of {settings['group_size']}, {settings['test']} held-out reviews, "
            f"{settings['seeds']} seeds. {describe_machine(results['machine'])}",
            first,
            table(header, differences),
        ]
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/sqft"), help="folder, default %(default)s")
    parser.add_argument("--model", help="path or hub name of a causal language model; default: SmolLM2-135M")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS, help="run these alone (default: all)"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--test", type=int, default=600, help="held-out reviews")
    parser.add_argument("--calibration", type=int, default=32, help="sequences of 128 tokens")
    parser.add_argument("--smoke", action="store_true", help="a random model, a few steps")
    args = parser.parse_args(argv)
    if args.smoke:
        args.seeds, args.steps, args.batch, args.test, args.calibration, args.group_size = 2, 3, 2, 12, 2, 32
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.model or str(assets.smollm2_135m())
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "model", "methods")}
    settings["model"] = "random" if args.smoke else args.model or "SmolLM2-135M"
    file = args.out / "rows.jsonl"
    header, *rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else [settings]
    if {**header, "seeds": args.seeds} != settings:
        raise ValueError(f"`--out`: {str(file)!r} holds rows of other settings: {header}.")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = examples()
    test, training = data[: args.test], data[args.test :]
    splits = {"train": training, "scorer": MultipleChoiceEvaluator(test, tokenizer)}
    if args.smoke:
        model = _random_model(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prune(
        model, WandaConfig(sparsity=args.sparsity), calibration(tokenizer, training, args.calibration), progress=False
    )
    bases = {"pruned": model}
    if "qa" in args.methods:
        bases["pruned + GPTQ"] = quantized(model, tokenizer, training, "GPTQ", args)

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        atomic_write_text(file, "".join(json.dumps(line) + "\n" for line in [settings, *rows]))
        print(
            f"{row['name']}, seed {row['seed']}: {100 * mean(row['correct']):.1f} %, loss {mean(row['loss']):.4f}",
            flush=True,
        )

    for name, base in bases.items():
        if not any(row["name"] == name for row in rows):
            sizes = {"zeros": zeros(base), "megabytes": megabytes(base)}
            keep({"name": name, "seed": -1, **measure(base, splits["scorer"]), **sizes})
    for seed in range(args.seeds):
        for method in args.methods:
            last = {"lora": "lora merged", "sparse": "sparse merged + GPTQ", "qa": "qa merged"}[method]
            if any((row["name"], row["seed"]) == (last, seed) for row in rows):
                continue
            rows = [row for row in rows if not (row["seed"] == seed and row["name"].startswith(method))]
            for row in measure_method(method, seed, bases, tokenizer, splits, args):
                keep(row)

    results = {"settings": settings, "machine": machine(), "comparisons": compare(rows), "rows": rows}
    atomic_write_text(args.out / "sqft.json", json.dumps(results))
    print(f"\n{report(results)}")
    return results


def _random_model(folder: str) -> nn.Module:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    config.update({"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


if __name__ == "__main__":
    main()
