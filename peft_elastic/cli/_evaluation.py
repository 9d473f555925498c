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
"""How the commands measure a model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from peft_elastic.search import LossEvaluator, MultipleChoiceEvaluator, PerplexityEvaluator

from ._examples import Collator, Example, batches, encode


class ChoiceEvaluator:
    """Accuracy and loss on examples with choices. The loss moves with every change of the model, the accuracy only when
    an example changes sides: on few examples the loss tells subnets apart sooner.

    Args:
        examples: with choices.
        tokenizer: the model's.
        batch_size: sequences per forward pass.
    """

    def __init__(self, examples: Sequence[Example], tokenizer: Any, batch_size: int = 16) -> None:
        self._scorer = MultipleChoiceEvaluator(
            [
                {"prompt": e.prompt, "choices": list(e.choices), "label": e.choices.index(e.completion)}
                for e in examples
            ],
            tokenizer,
            batch_size,
        )

    def __call__(self, model: Any) -> dict[str, float]:
        correct, loss = self.per_example(model)
        return {"loss": sum(loss) / len(loss), "accuracy": sum(correct) / len(correct)}

    def per_example(self, model: Any) -> tuple[list[int], list[float]]:
        """Say for each example whether the right choice is the most likely one, 0 or 1, and -log of its probability among the
        choices, in nats. The model should be in evaluation mode."""
        correct, loss = [], []
        for scores, label in zip(self._scorer.scores(model), self._scorer.labels):
            log_probs = torch.tensor(scores, dtype=torch.float64).log_softmax(0)
            correct.append(int(log_probs.argmax() == label))
            loss.append(-float(log_probs[label]))
        return correct, loss


def text_perplexity(model: Any, tokenizer: Any, texts: Sequence[str], max_length: int = 512) -> float:
    """Measure the perplexity of texts, each on its own, over all their tokens but the first."""
    ids = [tokenizer(text)["input_ids"][:max_length] for text in texts]
    features = [{"input_ids": row, "labels": row} for row in ids if len(row) > 1]
    return PerplexityEvaluator(batches(features, Collator(model), 16))(model)


def loss_evaluator(
    model: Any, tokenizer: Any, examples: Sequence[Example], max_length: int, batch_size: int
) -> LossEvaluator:
    """Make the evaluator of the mean negative log-likelihood of the completions, in nats per token."""
    features = encode(tokenizer, examples, max_length)
    return LossEvaluator(batches(features, Collator(model), batch_size))


def tokens_per_second(model: Any, prompt_tokens: int, new_tokens: int, repeats: int) -> float:
    """Time the generation of one sequence after a prompt of any tokens: the median of so many runs."""
    prompt = torch.arange(prompt_tokens)[None] % (model.config.vocab_size - 4) + 3
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + repeats):
            start = time.perf_counter()
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                pad_token_id=0,
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
            )
            seconds.append(time.perf_counter() - start)
    return new_tokens / statistics.median(seconds[1:])  # the first starts threads


def measure(model: Any, tokenizer: Any, examples: Sequence[Example], texts: int = 100) -> dict[str, Any]:
    """Measure what `quickstart` reports of a model: `correct` and `loss` per example (see `ChoiceEvaluator`), and the `perplexity`
    of the first `texts` prompts."""
    correct, loss = ChoiceEvaluator(examples, tokenizer).per_example(model)
    prompts = [example.prompt for example in examples[:texts]]
    return {"correct": correct, "loss": loss, "perplexity": text_perplexity(model, tokenizer, prompts)}
