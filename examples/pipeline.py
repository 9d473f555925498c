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
"""What all examples share: their command line, data and model, the training of the super-adapter, and the smoke mode."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_elastic import PruningPlan, prune_structured
from peft_elastic.pruning.structured import StructuredPruningConfig


# The modules of Llama whose ranks are tied in the papers.
GROUPS = [["q_proj", "k_proj", "v_proj"], ["up_proj", "gate_proj"], ["down_proj"]]
Accuracy = Callable[[Any], float]


def make_parser(description: str, adapter: bool = True, **defaults: Any) -> argparse.ArgumentParser:
    """The options of every example, or of those without an adapter; `defaults` are what differs between them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="yahma/llama-7b-hf", help="hub name or folder of the model")
    parser.add_argument("--train", help="training data: hub name (name or name:config), or a local file")
    parser.add_argument("--test", help="held-out data; only the final table sees it")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for everything that is written")
    parser.add_argument("--calibration-samples", type=int, default=128)
    if adapter:
        parser.add_argument("--r", type=int, default=32)
        parser.add_argument("--lora-alpha", type=float, default=64)
        parser.add_argument("--ranks", type=int, nargs="+", default=[32, 24, 16])
        parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of --epochs")
    parser.add_argument("--batch", type=int, default=16, help="examples per optimizer step and device")
    parser.add_argument("--warmup", type=float, default=100, help="optimizer steps, or below 1 a share of them")
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--max-length", type=int, default=512, help="tokens; longer examples are left out")
    parser.add_argument("--validation-samples", type=int, default=200, help="taken from the training data")
    parser.add_argument("--test-samples", type=int, help="use only that many test examples")
    parser.add_argument("--evals", type=int, default=200, help="evaluations of the search")
    parser.add_argument("--population", type=int, default=8, help="subnets per generation of the search")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--smoke", action="store_true", help="a minute on a laptop: tiny random model, a few examples")
    parser.set_defaults(**defaults)
    return parser


@dataclass
class Prepared:
    """What every example starts from."""

    tokenizer: Any
    model: Any
    encoded: list[dict[str, Any]]  # training examples
    collator: Any
    validation_accuracy: Accuracy
    test_accuracy: Accuracy  # whatever `make_accuracy` returned
    test_examples: int

    def calibration(self, samples: int) -> Any:
        return torch.utils.data.DataLoader(self.encoded[:samples], 8, collate_fn=self.collator)

    def running_text(self, samples: int, length: int) -> list[torch.Tensor]:
        """Batches of training examples one after the other, prompts and targets, in sequences of `length` tokens."""
        # an end token is nothing that text has in its middle: it costs so much that all else would hardly count
        between = self.tokenizer("\n\n", add_special_tokens=False)["input_ids"]
        pieces = (example["input_ids"][:-1] + between for example in self.encoded)
        return list(tasks.pack(pieces, length, samples).split(8))


def read_examples(
    args: argparse.Namespace, to_example: Callable[[dict[str, Any]], Any], test_split: str = "test"
) -> tuple[list[Any], list[Any], list[Any]]:
    """Training, validation and test examples; validation is taken from the training data. There may be no test data."""
    set_seed(args.seed)
    train_records = tasks.read(args.train, "train")
    test_records = tasks.read(args.test, test_split).shuffle(seed=args.seed) if args.test else []
    if args.smoke:
        make_small(args)
    train_records = train_records.shuffle(seed=args.seed)
    if args.smoke:
        train_records = train_records.select(range(min(64, len(train_records))))
    train = [to_example(record) for record in train_records]
    test = [to_example(record) for record in test_records][: args.test_samples]
    return train[args.validation_samples :], train[: args.validation_samples], test


def prepare(
    args: argparse.Namespace,
    to_example: Callable[[dict[str, Any]], tasks.Example],
    make_accuracy: Callable[[Any, list[tasks.Example], argparse.Namespace], Accuracy],
) -> Prepared:
    """Read the data of a language model and load the model."""
    train, validation, test = read_examples(args, to_example)
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


def prepare_classifier(args: argparse.Namespace, test_split: str, **measure: Any) -> Prepared:
    """Read the data of a task with classes and load an encoder.

    Args:
        args: of the command line.
        test_split: of the test data.
        measure: more arguments of `tasks.Classification`.
    """
    train, validation, test = read_examples(args, tasks.glue_example, test_split)
    labels = 1 + max(example.label for example in train)
    if args.smoke:
        tokenizer, model = tiny_encoder([text for example in train for text in example.texts], labels)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels)
    collator = DataCollatorWithPadding(tokenizer)
    accuracies = [
        tasks.Classification(encode_labelled(tokenizer, examples, args.max_length), collator, **measure)
        for examples in (validation, test)
    ]
    encoded = encode_labelled(tokenizer, train, args.max_length)
    return Prepared(tokenizer, model, encoded, collator, *accuracies, len(test))


def prune_structures(model: Any, config: StructuredPruningConfig, calibration: Any, out: Path) -> PruningPlan:
    """Make the model smaller, in place, and write what was removed to `out`: plan.json and plan.png."""
    plan = prune_structured(model, config, calibration)
    print(plan)
    out.mkdir(parents=True, exist_ok=True)
    plan.save(out / "plan.json")
    if any(row["value"] is not None for row in plan.history):  # else there is nothing to draw
        plan.plot(out / "plan.png")
    return plan


def fit(
    model: Any, data: Prepared, args: argparse.Namespace, trainer: type[Trainer] = Trainer, **options: Any
) -> None:
    """Train the adapter and save it.

    Args:
        model: with an adapter, elastic or not.
        data: what `prepare` returned.
        args: of the command line.
        trainer: the class.
        options: more of its arguments, by which it learns to sample subnets.
    """
    trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out / "checkpoints"),
            per_device_train_batch_size=args.batch,
            num_train_epochs=args.epochs,
            max_steps=args.steps or -1,
            learning_rate=args.lr,
            weight_decay=args.weight_decay,
            warmup_steps=0 if args.smoke else args.warmup,
            logging_steps=1 if args.smoke else 20,
            seed=args.seed,
            # adapters in a block that is skipped have no gradient; all others have one, whatever the subnet
            ddp_find_unused_parameters=any(choice.kind == "depth" for choice in getattr(model, "search_space", ())),
            report_to=[],
        ),
        train_dataset=data.encoded,
        data_collator=data.collator,
        **options,
    ).train()
    model.save_pretrained(args.out / "adapter")


def adapter_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Of the adapter of a model with the modules of Llama."""
    return {
        "r": args.r,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.dropout,
        "elastic_ranks": args.ranks,
        "rank_groups": GROUPS,
        "target_modules": [name for group in GROUPS for name in group],
        "task_type": "CAUSAL_LM",
    }


@torch.inference_mode()
def save_and_reload(model: Any, data: Prepared, batch: Any, folder: Path) -> None:
    """Save a model, and let another process load it and compute the same."""
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    expected = folder.with_name("expected.pt")
    torch.save({"inputs": batch, "logits": model(**batch).logits}, expected)
    script = Path(__file__).with_name("reload.py")
    subprocess.run([sys.executable, script, folder, expected], check=True)


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


def encode_labelled(tokenizer: Any, examples: list[tasks.Labelled], max_length: int) -> list[dict[str, Any]]:
    """Token ids of one or two texts, and their class."""
    return [
        {**tokenizer(*example.texts, truncation=True, max_length=max_length), "labels": example.label}
        for example in examples
    ]


# -- smoke mode ----------------------------------------------------------------------------------------------------


def make_small(args: argparse.Namespace) -> None:
    """Settings that take a minute on a laptop, whatever the command line says."""
    args.r, args.lora_alpha, args.ranks = 8, 16, [8, 6, 4]
    args.epochs, args.validation_samples, args.test_samples, args.evals, args.population = 1, 8, 8, 6, 4
    args.calibration_samples, args.max_length = 16, 256


def tiny_tokenizer(texts: list[str], **special_tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer trained on the spot."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=500, special_tokens=list(special_tokens.values()), show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special_tokens)


def tiny_model(texts: list[str]) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """A small random Llama and its tokenizer."""
    tokenizer = tiny_tokenizer(texts, pad_token="<pad>", eos_token="<eos>")
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


def tiny_encoder(texts: list[str], labels: int) -> tuple[PreTrainedTokenizerFast, BertForSequenceClassification]:
    """A small random BERT and its tokenizer."""
    tokenizer = tiny_tokenizer(texts, pad_token="<pad>", unk_token="<unk>")
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=labels,
    )
    return tokenizer, BertForSequenceClassification(config)
