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
"""The LoNAS pipeline: a super-network of elastic width around a frozen model, and a smaller ordinary model out of it.

    model --sort_by_importance()--> sorted model --ElasticTrainer--> super-network
          --search_subnet(validation)--> subnet --extract_subnet()--> smaller model on disk --> a fresh process loads it

LoNAS (Munoz, Yuan, Zheng, Jain: "LoNAS: Elastic Low-Rank Adapters for Efficient Large Language Models", LREC-COLING 2024)
narrows MLPs and heads in the order in which the checkpoint has their channels, and trains one random subnet in each step:
`--order none --strategy uniform`. By default the model is sorted by importance first. `--strategy sandwich`,
`--distillation`, `--depth` and `--progressive` go further.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from pipeline import Prepared, fit, make_parser, save_and_reload

from peft_elastic import ElasticLoraConfig, ElasticTrainer, Stage


def lonas_parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The command line of the examples with elastic width; `defaults` are what differs between them."""
    parser = make_parser(description, **{"out": Path("lonas-out"), **defaults})
    parser.add_argument("--heads", type=number, nargs="+", help="numbers of heads, or shares of them, 1.0 0.75 ...")
    parser.add_argument("--mlp", type=number, nargs="+", help="numbers of MLP channels, or shares of them")
    parser.add_argument("--depth", nargs="+", help="blocks that may be skipped, not all of them: 5, 4-8, all.mlp, ...")
    parser.add_argument("--order", choices=("activation", "gradient", "magnitude", "none"), default="activation")
    parser.add_argument("--strategy", choices=("sandwich", "uniform", "balanced"), default="uniform")
    parser.add_argument("--distillation", action="store_true", help="from the largest subnet, with sandwich")
    parser.add_argument("--progressive", action="store_true", help="first ranks, then width, then depth are elastic")
    parser.add_argument("--max-drop", type=float, help="choose the cheapest within it (default: the most accurate)")
    parser.add_argument("--budget", help="choose among those of at most this share of the MACs, such as 80%%")
    parser.set_defaults(**defaults)
    return parser


def number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def run(args: argparse.Namespace, data: Prepared, adapter: dict[str, Any]) -> None:
    """Run the pipeline; writes the table to `args.out`/results.json and the searched model to `args.out`/extracted.

    Args:
        args: of the command line.
        data: what `prepare` returned.
        adapter: settings of the adapter but for width and depth.
    """
    width = {kind: options for kind, options in (("heads", args.heads), ("mlp", args.mlp)) if options}
    config = ElasticLoraConfig(**adapter, elastic_width=width or None, elastic_depth=args.depth, importance=args.order)
    model = get_peft_model(data.model, config)
    print(model.search_space)
    model.print_trainable_parameters()
    if width and args.order in ("activation", "gradient"):
        model.sort_by_importance(data.calibration(args.calibration_samples))
    fit(
        model,
        data,
        args,
        trainer=ElasticTrainer,
        strategy=args.strategy,
        distillation="max" if args.distillation else None,
        stages=make_stages(args) if args.progressive else None,
    )
    result = model.search_subnet(
        data.validation_accuracy,
        n_evals=args.evals,
        population=args.population,
        save_dir=args.out / "search",
        seed=args.seed,
    )
    result.plot(args.out / "pareto.png")
    searched = result.best(max_drop=args.max_drop, budget=args.budget)
    model.set_subnet(searched)
    model.save_pretrained(args.out / "adapter")

    batch = next(iter(torch.utils.data.DataLoader(data.encoded, 1, collate_fn=data.collator)))
    rows = {}
    for name, subnet in (("max", "max"), ("heuristic", "heuristic"), ("searched", searched), ("min", "min")):
        extracted = model.extract_subnet(subnet, sparse_kernel=False).eval()
        metrics = result.evaluation(subnet).metrics
        rows[name] = {
            "validation accuracy": metrics["accuracy"],
            "test accuracy": data.test_accuracy(extracted),
            "macs": metrics["macs"],
            "parameters": sum(parameter.numel() for parameter in extracted.parameters()),
            "seconds": measure_latency(extracted, batch),
        }
        if name == "searched":
            save_and_reload(extracted, data, batch, args.out / "extracted")
    report(rows, data, args)


def make_stages(args: argparse.Namespace) -> list[Stage]:
    """One after the other ranks, width and depth become elastic; each for the same part of the training."""
    more = [["heads", "mlp"]] if args.heads or args.mlp else []
    more += [["depth"]] if args.depth else []
    kinds = [["rank"]]
    for new in more:
        kinds.append(kinds[-1] + new)
    return [Stage(some, epochs=args.epochs / len(kinds)) for some in kinds]


@torch.inference_mode()
def measure_latency(model: Any, batch: Any, repeats: int = 20) -> float:
    """Median of the seconds of a forward pass over one example."""
    batch = {name: value.to(model.device) for name, value in batch.items()}
    seconds = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        model(**batch)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[3:])


def report(rows: dict[str, dict[str, float]], data: Prepared, args: argparse.Namespace) -> None:
    """Write and print the table."""
    results = {"test examples": data.test_examples, "subnets": rows}
    args.out.joinpath("results.json").write_text(json.dumps(results, indent=2))
    print(f"\n{'':<10} validation %     test %    MACs/token    parameters     ms")
    for name, row in rows.items():
        print(
            f"{name:<10} {100 * row['validation accuracy']:>12.1f} {100 * row['test accuracy']:>10.1f} {row['macs']:>13,d} "
            f"{row['parameters']:>13,d} {1000 * row['seconds']:>6.1f}"
        )
    print(
        f"test: {data.test_examples} examples that neither training nor search has seen, and test accuracy, parameters and the\n"
        "time of one forward pass over one example are those of extracted models. MACs: of the subnet, its adapters apart."
    )
