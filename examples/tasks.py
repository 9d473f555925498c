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
"""The tasks of the Shears, SQFT and LoNAS papers: how their records become examples, and how an answer is judged.

A task reads a dataset on the hub, or a local .json, .jsonl or .tsv file, whose columns it recognises:

- math: GSM8K (`question`, `answer`), MAWPS (`original_text`, `ans`), LLM-Adapters' math_10k (`instruction`, `output`)
- commonsense: any multiple choice (`question`, `choices`, `label`)
- GLUE: one or two texts and a class (`sentence`, `label`, and what its other tasks call them)
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset


def read(source: str, split: str) -> Dataset:
    """A local .json or .jsonl file, a .tsv file with texts and classes, or `name` or `name:config` on the hub."""
    if source.endswith((".json", ".jsonl", ".tsv")):
        if not Path(source).is_file():
            raise FileNotFoundError(f"{source!r} does not exist")
        if source.endswith(".tsv"):
            options = {"sep": "\t", "quoting": csv.QUOTE_NONE, "column_names": ["text", "label"]}
            return load_dataset("csv", data_files=source, split="train", **options)
        return load_dataset("json", data_files=source, split="train")
    name, _, config = source.partition(":")
    return load_dataset(name, config or None, split=split)


@dataclass
class Example:
    """One record: what the model reads, what it should write, and what counts as right."""

    prompt: str
    target: str
    answer: str
    choices: list[str]


def math_example(record: dict[str, Any]) -> Example:
    """A word problem; the answer is a number."""
    if "original_text" in record:
        question, target = record["original_text"], f"#### {record['ans']:g}"
    elif "instruction" in record:
        question, target = record["instruction"], record["output"]
    else:
        question, target = record["question"], re.sub(r"<<.*?>>", "", record["answer"])
    return Example(f"Problem: {question}\nSolution:", f" {target}", str(last_number(target)), [])


def commonsense_example(record: dict[str, Any]) -> Example:
    """A question with several possible answers."""
    choices = [f" {choice}" for choice in record["choices"]]
    target = choices[record["label"]]
    return Example(f"Question: {record['question']}\nAnswer:", target, target, choices)


# What the tasks of GLUE that are judged by accuracy call their texts.
_TEXTS = (
    ("text",),
    ("sentence1", "sentence2"),  # mrpc, rte
    ("question1", "question2"),  # qqp
    ("question", "sentence"),  # qnli
    ("premise", "hypothesis"),  # mnli
    ("sentence",),  # sst2
)


@dataclass
class Labelled:
    """One record of a classification: a text or two, and its class."""

    texts: list[str]
    label: int


def glue_example(record: dict[str, Any]) -> Labelled:
    """One or two texts with a class."""
    names = next((names for names in _TEXTS if set(names) <= set(record)), None)
    if names is None:
        raise ValueError(f"the columns {sorted(record)} are not those of a known task")
    return Labelled([record[name] for name in names], record["label"])


def last_number(text: str) -> float | None:
    """The last number in a text, e.g. 1234.5 for "#### $1,234.5."; None if there is none."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


class ExactAnswer:
    """Accuracy of greedily generated answers: the last number generated must be the right one.

    Args:
        tokenizer: with a padding token.
        examples (`list[Example]`): what to ask.
        batch_size (`int`): prompts per batch.
        max_new_tokens (`int`): length of an answer.
    """

    def __init__(self, tokenizer: Any, examples: list[Example], batch_size: int = 16, max_new_tokens: int = 256):
        self.tokenizer = tokenizer
        self.examples = examples
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def __call__(self, model: Any) -> float:
        right = 0
        for start in range(0, len(self.examples), self.batch_size):
            batch = self.examples[start : start + self.batch_size]
            inputs = self.tokenizer([e.prompt for e in batch], return_tensors="pt", padding=True, padding_side="left")
            inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
            output = model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            texts = self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(str(last_number(text)) == e.answer for text, e in zip(texts, batch))
        return right / len(self.examples)


class Classification:
    """Accuracy of a sequence classifier.

    Args:
        features (`list[dict]`): encoded examples with `labels`.
        collator: makes a batch of some of them.
        batch_size (`int`): examples per batch.
    """

    def __init__(self, features: list[dict[str, Any]], collator: Any, batch_size: int = 64):
        self.batches = [collator(features[i : i + batch_size]) for i in range(0, len(features), batch_size)]
        self.examples = len(features)

    @torch.inference_mode()
    def __call__(self, model: Any) -> float:
        right = 0
        for batch in self.batches:
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            labels = inputs.pop("labels")
            right += int((model(**inputs).logits.argmax(-1) == labels).sum())
        return right / self.examples
