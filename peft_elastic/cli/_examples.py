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
"""Examples for a causal language model, and how they become batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Example:
    """A prompt and its right continuation; plain text is a continuation of nothing.

    Args:
        prompt (`str`): what the model is given.
        completion (`str`): what it learns to say, with the leading space.
        choices (`tuple[str, ...]`): the continuations to choose from, among them `completion`; empty if it is free text.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return self.prompt + self.completion


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[dict[str, list[int]]]:
    """Make token ids, with labels on the completion alone; examples of more than `max_length` tokens are left out. Plain text
    (no prompts) is joined and cut instead, see `pack`.

    A completion that is no choice gets an end token, so that the model learns to stop.

    Raises:
        ValueError: if nothing remains.
    """
    if not any(example.prompt for example in examples):
        pieces = pack(tokenizer, [example.text for example in examples], max_length)
        return [{"input_ids": piece, "labels": list(piece)} for piece in pieces]
    features = []
    for example in examples:
        prompt = _without_end(tokenizer, tokenizer(example.prompt)["input_ids"])
        # together, as the model will see them; a token across the border belongs to the completion
        whole = _without_end(tokenizer, tokenizer(example.text)["input_ids"])
        shared = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole) - 1))
        if not example.choices and tokenizer.eos_token_id is not None:
            whole = [*whole, tokenizer.eos_token_id]
        if len(whole) <= max_length:
            features.append({"input_ids": whole, "labels": [-100] * shared + whole[shared:]})
    if not features:
        raise ValueError(
            f"`--max-length` {max_length} is less than the tokens of every one of {len(examples)} examples."
        )
    return features


def pack(tokenizer: Any, texts: Iterable[str], length: int, limit: int | None = None) -> list[list[int]]:
    """Make token ids of the texts, joined by the end token and cut into pieces of `length` tokens, `limit` pieces at most. A
    shorter rest is dropped, unless it is all there is."""
    ids: list[int] = []
    for text in texts:
        ids += _without_end(tokenizer, tokenizer(text)["input_ids"])
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if limit is not None and len(ids) >= limit * length:
            break
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return pieces[:limit] or [ids]


def _without_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Without the end token that some tokenizers add."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


class Collator:
    """Pads encoded examples on the right, and asks the model for no more logits than the labels need: for short
    completions the output layer of a small model is a quarter of the work.

    Args:
        model: the model; whether it can leave out logits is read from its signature.
    """

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # several GPUs in one process would tear the list of positions apart
        self.trims = "logits_to_keep" in inspect.signature(base.forward).parameters and torch.cuda.device_count() < 2

    def __call__(self, features: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Make tensors of shape (batch, length): `input_ids`, `attention_mask` and `labels`, -100 where there is none; `labels`
        is shorter, as is the tensor of positions `logits_to_keep`, if logits are left out."""
        length = max(len(feature["input_ids"]) for feature in features)

        def pad(rows: Iterable[Sequence[int]], value: int) -> torch.Tensor:
            return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])

        batch = {
            "input_ids": pad((feature["input_ids"] for feature in features), 0),
            "attention_mask": pad(([1] * len(feature["input_ids"]) for feature in features), 0),
            "labels": pad((feature["labels"] for feature in features), -100),
        }
        if self.trims:
            # the logits at a position predict the next label
            first = max(0, int((batch["labels"] != -100).any(0).nonzero()[0]) - 1)
            batch["labels"] = batch["labels"][:, first:]
            batch["logits_to_keep"] = torch.arange(first, length)
        return batch


def batches(
    features: Sequence[Mapping[str, list[int]]], collator: Callable[..., dict[str, torch.Tensor]], size: int
) -> list[dict[str, torch.Tensor]]:
    """Put all examples in batches of similar length."""
    ordered = sorted(features, key=lambda feature: len(feature["input_ids"]))
    return [collator(ordered[start : start + size]) for start in range(0, len(ordered), size)]
