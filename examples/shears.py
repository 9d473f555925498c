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
"""The Shears pipeline: prune the base model, train an elastic super-adapter, search it, report on held-out data.

    dense model --prune()--> sparse model --Trainer + SubnetSamplingCallback--> super-adapter
                --search_subnet(validation)--> subnet --evaluate(test)--> table, plain LoRA adapter on disk

Settings are those of the paper (https://huggingface.co/papers/2404.10934): 50% unstructured Wanda sparsity, r = 32,
lora_alpha = 64, ranks 32/24/16 tied over {q, k, v}, {up, gate} and {down} within each block, dropout 0.1, learning rate
3e-4, 3 epochs, batch 16.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tasks
from peft import get_peft_model
from pipeline import Accuracy, Prepared, adapter_settings, fit, make_parser, prepare

from peft_elastic import ElasticLoraConfig, SubnetSamplingCallback, WandaConfig, prune


def shears_parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The command line of the examples that begin with pruning; `defaults` are what differs between them."""
    parser = make_parser(description, **{"out": Path("shears-out"), **defaults})
    parser.add_argument("--sparsity", type=float, default=0.5)
    return parser


def train(model: Any, data: Prepared, args: argparse.Namespace) -> None:
    """Train the adapter, another subnet in each step."""
    fit(model, data, args, callbacks=[SubnetSamplingCallback()])


def search(model: Any, data: Prepared, args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Search for the best subnet on the validation data, measure it and the plain choices, and leave it active."""
    result = model.search_subnet(
        data.validation_accuracy,
        n_evals=args.evals,
        population=args.population,
        save_dir=args.out / "search",
        seed=args.seed,
    )
    result.plot(args.out / "pareto.png")
    for name in ("max", "heuristic", "min"):
        model.set_subnet(name)
        results[f"tuned, {name} subnet"] = data.test_accuracy(model)
    model.set_subnet(result.best())
    results["tuned, searched subnet"] = data.test_accuracy(model)
    print(model.subnet_summary().describe())
    model.save_pretrained(args.out / "adapter")


def report(results: dict[str, Any], args: argparse.Namespace) -> None:
    """Write and print the accuracies."""
    args.out.joinpath("results.json").write_text(json.dumps(results, indent=2))
    print(f"\nTest accuracy ({results['test examples']} examples):")
    for name, value in results.items():
        if isinstance(value, float):
            print(f"  {name:<24} {100 * value:5.1f}%")


def run(
    args: argparse.Namespace,
    to_example: Callable[[dict[str, Any]], tasks.Example],
    make_accuracy: Callable[[Any, list[tasks.Example], argparse.Namespace], Accuracy],
) -> None:
    """Run the pipeline; writes the accuracies on the test data to `args.out`/results.json."""
    data = prepare(args, to_example, make_accuracy)
    results: dict[str, Any] = {"test examples": data.test_examples, "dense": data.test_accuracy(data.model)}
    calibration = data.calibration(args.calibration_samples)
    print(prune(data.model, WandaConfig(sparsity=args.sparsity), calibration=calibration))
    results["pruned"] = data.test_accuracy(data.model)

    model = get_peft_model(data.model, ElasticLoraConfig(**adapter_settings(args)))
    model.print_trainable_parameters()
    train(model, data, args)
    search(model, data, args, results)
    model.export_lora(args.out / "lora")
    report(results, args)
