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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_elastic import ElasticLoraConfig, SubnetSamplingCallback, WandaConfig, prune


GROUPS = [["q_proj", "k_proj", "v_proj"], ["up_proj", "gate_proj"], ["down_proj"]]
Accuracy = Callable[[Any], float]


def parse_args(description: str, **defaults: Any) -> argparse.Namespace:
    """The command line of the examples; `defaults` are what differs between them."""
    return make_parser(description, **defaults).parse_args()


def make_parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="yahma/llama-7b-hf", help="hub name or folder of a causal language model")
    parser.add_argument("--train", help="training data: hub name (name or name:config) or a .json/.jsonl file")
    parser.add_argument("--test", help="held-out data; only the final table sees it")
    parser.add_argument("--out", type=Path, default=Path("shears-out"), help="folder for everything that is written")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--lora-alpha", type=float, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 24, 16])
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=16, help="examples per optimizer step and device")
    parser.add_argument("--max-length", type=int, default=512, help="tokens; longer examples are left out")
    parser.add_argument("--validation-samples", type=int, default=200, help="taken from the training data")
    parser.add_argument("--test-samples", type=int, help="use only that many test examples")
    parser.add_argument("--evals", type=int, default=200, help="evaluations of the search")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--smoke", action="store_true", help="a minute on a laptop: tiny random model, a few examples")
    parser.set_defaults(**defaults)
    return parser


@dataclass
class Prepared:
    """What both kinds of examples start from."""

    tokenizer: Any
    model: Any
    encoded: list[dict[str, list[int]]]  # training examples
    collator: Any
    validation_accuracy: Accuracy
    test_accuracy: Accuracy
    test_examples: int

    def calibration(self, samples: int) -> Any:
        return torch.utils.data.DataLoader(self.encoded[:samples], 8, collate_fn=self.collator)


def prepare(
    args: argparse.Namespace,
    to_example: Callable[[dict[str, Any]], tasks.Example],
    make_accuracy: Callable[[Any, list[tasks.Example], argparse.Namespace], Accuracy],
) -> Prepared:
    """Read the data and load the dense model."""
    set_seed(args.seed)
    train_records, test_records = tasks.read(args.train, "train"), tasks.read(args.test, "test")
    if args.smoke:
        make_small(args)
        train_records = train_records.select(range(min(64, len(train_records))))
    train = [to_example(record) for record in train_records.shuffle(seed=args.seed)]
    train, validation = train[args.validation_samples :], train[: args.validation_samples]
    test = [to_example(record) for record in test_records][: args.test_samples]

    if args.smoke:
        tokenizer, model = tiny_model([example.prompt + example.target for example in train])
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map="auto")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return Prepared(
        tokenizer,
        model,
        [features for example in train if (features := encode(tokenizer, example, args.max_length))],
        DataCollatorForSeq2Seq(tokenizer),
        make_accuracy(tokenizer, validation, args),
        make_accuracy(tokenizer, test, args),
        len(test),
    )


def fit(model: Any, data: Prepared, args: argparse.Namespace) -> None:
    """Train the adapter, another subnet in each step."""
    Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out / "checkpoints"),
            per_device_train_batch_size=args.batch,
            num_train_epochs=args.epochs,
            learning_rate=args.lr,
            warmup_steps=0 if args.smoke else 100,
            logging_steps=1 if args.smoke else 20,
            seed=args.seed,
            ddp_find_unused_parameters=False,
            report_to=[],
        ),
        train_dataset=data.encoded,
        data_collator=data.collator,
        callbacks=[SubnetSamplingCallback()],
    ).train()
    model.save_pretrained(args.out / "adapter")


def search(model: Any, data: Prepared, args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Search for the best subnet on the validation data, measure it and the plain choices, and leave it active."""
    result = model.search_subnet(
        data.validation_accuracy, n_evals=args.evals, save_dir=args.out / "search", seed=args.seed
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
    fit(model, data, args)
    search(model, data, args, results)
    model.export_lora(args.out / "lora")
    report(results, args)


def adapter_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "r": args.r,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.dropout,
        "elastic_ranks": args.ranks,
        "rank_groups": GROUPS,
        "target_modules": [name for group in GROUPS for name in group],
        "task_type": "CAUSAL_LM",
    }


def encode(tokenizer: Any, example: tasks.Example, max_length: int) -> dict[str, list[int]] | None:
    """Token ids, with labels on the target alone; None if the example is too long."""
    prompt = tokenizer(example.prompt)["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]
    target = tokenizer(example.target, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    if len(prompt) + len(target) > max_length:
        return None
    return {
        "input_ids": prompt + target,
        "attention_mask": [1] * (len(prompt) + len(target)),
        "labels": [-100] * len(prompt) + target,
    }


# -- smoke mode ----------------------------------------------------------------------------------------------------


def make_small(args: argparse.Namespace) -> None:
    """Settings that take a minute on a laptop, whatever the command line says."""
    args.r, args.lora_alpha, args.ranks = 8, 16, [8, 6, 4]
    args.epochs, args.validation_samples, args.test_samples, args.evals = 1, 8, 8, 6
    args.calibration_samples, args.max_length = 16, 256


def tiny_model(texts: list[str]) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """A small random Llama and a byte-level tokenizer trained on the spot."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=500, special_tokens=["<pad>", "<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, LlamaForCausalLM(config)
