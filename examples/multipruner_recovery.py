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
"""MultiPruner on a language model, recovery with an adapter, and the merge of both: a smaller ordinary model.

    python examples/multipruner_recovery.py                                          # Llama-3.1-8B, Alpaca, 20% removed
    python examples/multipruner_recovery.py --split 30 70 0 --test arc_easy_test.jsonl
    python examples/multipruner_recovery.py --elastic                                # ranks 16/12/8 in training, 16 after it
    python examples/multipruner_recovery.py --elastic-width 1.0 0.875                # MLPs of elastic width as well
    python examples/multipruner_recovery.py --smoke --train gsm8k_train.jsonl --text wikitext2_valid.txt

Settings of the paper (https://huggingface.co/papers/2501.09949): 20% of the parameters, divided 44:52:4 among attentions and MLPs,
MLP channels and heads, 256 sequences of 2048 tokens of Alpaca to choose them by (for channels and heads 128); recovery on Alpaca
with LoRA, r = 16, lora_alpha = 32, learning rate 1e-4, 2 epochs. The order of channels within a block is that of their
activations; `--order l1` is the paper's. `--split` has other best values for other models: 30 70 0 for Llama-3.1-8B, 10 90 0 for
Llama-3.2-3B, 50 50 0 for Qwen2.5-7B.

--train is a file or dataset with `instruction`, `input`, `output` or with `question`, `answer`; --text, for the perplexity, has a
column `text` or is a .txt file; --test, if it is given, has questions with choices as for shears_commonsense.py. The table goes to
results.json, what was removed to plan.json and plan.png, the model to merged/, from where another process loads it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import tasks
import torch
from lonas import number
from peft import LoraConfig, get_peft_model
from pipeline import Accuracy, Prepared, adapter_settings, fit, make_parser, prepare, prune_structures, save_and_reload
from shears_commonsense import accuracy

from peft_elastic import ElasticLoraConfig, ElasticTrainer, MultiPrunerConfig
from peft_elastic.common.writing import atomic_write_text
from peft_elastic.pruning.structured.config import ORDERS


def to_example(record: dict[str, Any]) -> tasks.Example:
    return tasks.commonsense_example(record) if "choices" in record else tasks.instruction_example(record)


def make_accuracy(tokenizer: Any, examples: list[tasks.Example], args: argparse.Namespace) -> Accuracy | None:
    """Of questions with choices; instructions have no right answer, and there may be no test data."""
    return accuracy(tokenizer, examples, args) if examples and examples[0].choices else None


def held_out_text(args: argparse.Namespace, tokenizer: Any) -> tasks.TextPerplexity:
    records = tasks.read(args.text, "test")
    if "text" not in records.column_names:
        raise ValueError(f"`--text`: {args.text!r} has no column 'text', it has {records.column_names}")
    # as everybody measures WikiText: all lines are one text
    return tasks.TextPerplexity(tokenizer, ["\n\n".join(records["text"])], args.text_length, args.text_samples)


def recover(data: Prepared, args: argparse.Namespace) -> Any:
    """Train an adapter on the pruned model; returns the two as one."""
    settings = adapter_settings(args)
    if args.elastic or args.elastic_width:
        width = {"mlp": args.elastic_width} if args.elastic_width else None
        model = get_peft_model(data.model, ElasticLoraConfig(**settings, elastic_width=width))
        print(model.search_space)
        if width:
            model.sort_by_importance(data.running_text(args.calibration_samples, args.calibration_length))
        fit(model, data, args, trainer=ElasticTrainer, strategy="uniform")
        model.set_subnet("max")
        model.save_pretrained(args.out / "adapter")
    else:
        plain = {key: value for key, value in settings.items() if key not in ("elastic_ranks", "rank_groups")}
        model = get_peft_model(data.model, LoraConfig(**plain))
        fit(model, data, args)
    model.print_trainable_parameters()
    return model.eval().merge_and_unload()


def measure(model: Any, data: Prepared, text: tasks.TextPerplexity, seconds: float) -> dict[str, Any]:
    model.eval()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "perplexity": text(model),
        "accuracy": data.test_accuracy(model) if data.test_accuracy else None,
        "seconds": seconds,
    }


def report(rows: dict[str, dict[str, Any]], data: Prepared, args: argparse.Namespace) -> None:
    """Write and print the table."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    results = {"settings": settings, "test examples": data.test_examples, "models": rows}
    atomic_write_text(args.out / "results.json", json.dumps(results, indent=2))
    print(f"\n{'':<10} {'parameters':>15} {'perplexity':>11} {'accuracy %':>11} {'seconds':>8}")
    for name, row in rows.items():
        share = "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}"
        print(f"{name:<10} {row['parameters']:>15,d} {row['perplexity']:>11.2f} {share:>11} {row['seconds']:>8,.0f}")
    print(
        f"perplexity: of {args.text}, in sequences of {args.text_length} tokens; accuracy: of {data.test_examples} questions; neither "
        "was seen by the\npruning or the training. seconds: of the step. recovered: merged; another process has loaded it and "
        "computes the same."
    )


def split(text: str) -> float | str:
    return text if text == "auto" else float(text)


def main() -> None:
    parser = make_parser(
        __doc__,
        model="meta-llama/Llama-3.1-8B",
        train="tatsu-lab/alpaca",
        test=None,
        out=Path("multipruner-out"),
        calibration_samples=256,
        r=16,
        lora_alpha=32,
        ranks=[16, 12, 8],
        dropout=0.05,
        lr=1e-4,
        epochs=2,
        validation_samples=0,
    )
    parser.add_argument(
        "--text", default="Salesforce/wikitext:wikitext-2-raw-v1", help="for the perplexity: name or file"
    )
    parser.add_argument("--text-length", type=int, default=2048, help="tokens of a sequence of it")
    parser.add_argument("--text-samples", type=int, help="use only that many sequences of it")
    parser.add_argument("--calibration-length", type=int, default=2048, help="tokens of a calibration sequence")
    parser.add_argument("--ratio", type=float, default=0.2, help="share of the parameters to remove")
    parser.add_argument("--split", type=split, nargs="+", default=[44, 52, 4], help="of the ratio, or auto")
    parser.add_argument("--order", choices=ORDERS, default="activation", help="of channels and heads in a block")
    parser.add_argument(
        "--mlp-group", type=number, help="channels that one step removes, or a share (default: a 14th)"
    )
    parser.add_argument("--head-group", type=int, default=1, help="key-value groups that one step removes")
    parser.add_argument(
        "--elastic", action="store_true", help="elastic ranks in training, see --ranks; else plain LoRA"
    )
    parser.add_argument("--elastic-width", type=float, nargs="+", help="the same, and shares of the MLP channels")
    args = parser.parse_args()
    data = prepare(args, to_example, make_accuracy)
    if args.smoke:
        args.calibration_length, args.text_length, args.text_samples, args.steps = 32, 32, 16, 4
        args.mlp_group = args.mlp_group or 16
    config = MultiPrunerConfig(
        ratio=args.ratio,
        split="auto" if args.split == ["auto"] else tuple(args.split),
        order=args.order,
        mlp_group=args.mlp_group,
        head_group=args.head_group,
        block_samples=args.calibration_samples,
        width_samples=max(1, args.calibration_samples // 2),
        seed=args.seed,
    )
    text = held_out_text(args, data.tokenizer)
    batch = next(iter(torch.utils.data.DataLoader(data.encoded, 1, collate_fn=data.collator)))

    rows = {"dense": measure(data.model, data, text, 0.0)}
    start = time.perf_counter()
    prune_structures(
        data.model, config, data.running_text(args.calibration_samples, args.calibration_length), args.out
    )
    rows["pruned"] = measure(data.model, data, text, time.perf_counter() - start)
    start = time.perf_counter()
    model = recover(data, args)
    rows["recovered"] = measure(model, data, text, time.perf_counter() - start)
    save_and_reload(model, data, batch, args.out / "merged")
    report(rows, data, args)


if __name__ == "__main__":
    main()
