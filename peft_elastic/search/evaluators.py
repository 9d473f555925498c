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
"""Ready-made functions for `search_subnet(evaluate=...)`.

Each is called with the model, measures it in evaluation mode without gradients, leaves every module in the mode it was
in, and returns one number. `name` and `mode` tell `search_subnet` what the number is and in which direction it is good.
"""

from __future__ import annotations

import inspect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..common.checks import check_choice
from ..structure.inputs import is_language_model
from ..supernet.context import eval_mode


class Evaluator(ABC):
    """A measurement on a model. Subclasses implement `measure` and set `name` and `mode`."""

    name: str = "accuracy"
    mode: str = "max"

    def __call__(self, model: nn.Module) -> float:
        with eval_mode(model), torch.no_grad():
            return self.measure(model)

    @abstractmethod
    def measure(self, model: nn.Module) -> float:
        """The value for `model`, which is in evaluation mode."""


class LossEvaluator(Evaluator):
    """Mean negative log-likelihood, in nats, over all labels that are not -100.

    The model's own loss of each batch is weighted by the number of labels it averages over, so that neither the batch
    size nor padding changes the result.

    Args:
        data (`Iterable` or `Dataset`):
            Batches for the model, dicts of tensors with `labels`; with `collator`, single examples instead. It is read
            once per subnet, so a generator will not do.
        collator (`Callable`, *optional*):
            Makes a batch of a list of examples, e.g. `DataCollatorForLanguageModeling(tokenizer, mlm=False)`.
        batch_size (`int`, defaults to 8):
            Examples per batch, with `collator`.
        shift (`bool`, *optional*):
            Whether the model predicts label t + 1 at position t, so that the first label does not count. By default
            true for a transformers model that generates text and has no encoder.

    Raises:
        ValueError: if `data` can be read only once; when called, if there are no labels or the model returns no loss.
    """

    name = "loss"
    mode = "min"

    def __init__(
        self,
        data: Iterable[Any],
        collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        batch_size: int = 8,
        shift: bool | None = None,
    ) -> None:
        if iter(data) is data:
            raise ValueError("`data` can be read only once; pass a list, a dataset or a DataLoader, not a generator.")
        self.batches: Iterable[Any] = data
        if collator is not None:
            self.batches = DataLoader(cast(Dataset, data), batch_size=batch_size, collate_fn=collator)
        self.shift = shift

    def measure(self, model: nn.Module) -> float:
        shift = _is_causal(model) if self.shift is None else self.shift
        device = next(model.parameters()).device
        total, count = 0.0, 0
        for batch in self.batches:
            labels = batch.get("labels")
            if labels is None:
                raise ValueError(f"`data` holds a batch without 'labels', it has {sorted(batch)}.")
            if shift:
                labels = labels[..., 1:]
            number = int((labels != -100).sum())
            if number == 0:  # the model's loss would be 0 / 0
                continue
            inputs = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
            loss = getattr(model(**inputs), "loss", None)
            if loss is None:
                raise ValueError(f"{type(model).__name__} returned no loss for a batch with {sorted(batch)}.")
            total += float(loss) * number
            count += number
        if count == 0:
            raise ValueError("`data` holds no labels other than -100.")
        return total / count


class PerplexityEvaluator(LossEvaluator):
    """Perplexity: exp of the mean negative log-likelihood over all tokens. Arguments as for `LossEvaluator`."""

    name = "perplexity"

    def measure(self, model: nn.Module) -> float:
        loss = super().measure(model)
        return math.exp(loss) if loss < 700 else math.inf  # exp(710) overflows


class MultipleChoiceEvaluator(Evaluator):
    """Share of examples whose right choice is the most likely continuation of the prompt, in [0, 1].

    A choice's score is the sum of log p(token | prompt, tokens before) over its tokens. Only the logits of those
    positions are computed, where the model allows it, and inputs that several choices share are run once: labels of one
    token each cost one forward pass per prompt.

    Args:
        examples (`Iterable[Mapping]`):
            Each with `prompt` (`str`), `choices` (`list[str]`, continuations with their leading space) and `label`
            (`int`, index of the right choice).
        tokenizer:
            The model's tokenizer.
        batch_size (`int`, defaults to 16):
            Sequences per forward pass. They are sorted by length and padded on the right.
        normalization (`str`, *optional*):
            Divide the score by the number of `"tokens"` or `"bytes"` of the choice (lm-eval's `acc_norm` uses bytes).
        max_length (`int`, *optional*):
            Longer inputs lose the beginning of their prompt.

    Raises:
        ValueError: if there are no examples, or one is malformed; the message names it.
    """

    def __init__(
        self,
        examples: Iterable[Mapping[str, Any]],
        tokenizer: Any,
        batch_size: int = 16,
        normalization: str | None = None,
        max_length: int | None = None,
    ) -> None:
        check_choice("normalization", normalization, (None, "tokens", "bytes"))
        self.batch_size = batch_size
        self.labels: list[int] = []
        self.requests: list[list[_Request]] = []  # per example, per choice
        rows: dict[tuple[int, ...], int] = {}
        for number, example in enumerate(examples):
            prompt, choices, label = _read_example(example, number)
            requests = []
            for choice in choices:
                context, continuation = _tokenize(tokenizer, prompt, choice, number)
                if max_length is not None and len(continuation) > max_length:
                    raise ValueError(
                        f"`max_length` {max_length} is less than the {len(continuation)} tokens of a choice of example "
                        f"{number}."
                    )
                inputs = (context + continuation)[:-1]  # the last token is only predicted
                inputs = inputs[-max_length:] if max_length else inputs
                divisor = {None: 1, "tokens": len(continuation), "bytes": len(choice.encode())}[normalization]
                requests.append(_Request(rows.setdefault(inputs, len(rows)), continuation, divisor))
            self.labels.append(label)
            self.requests.append(requests)
        if not self.labels:
            raise ValueError("`examples` is empty.")
        self.rows = list(rows)

    def measure(self, model: nn.Module) -> float:
        scores = self.scores(model)
        right = sum(choices.index(max(choices)) == label for choices, label in zip(scores, self.labels))
        return right / len(scores)

    @torch.no_grad()
    def scores(self, model: nn.Module) -> list[list[float]]:
        """The (normalised) log-likelihood of each choice of each example; higher is more likely."""
        of_row: dict[int, list[_Request]] = {}
        for request in itertools.chain(*self.requests):
            of_row.setdefault(request.row, []).append(request)
        found: dict[_Request, float] = {}
        order = sorted(range(len(self.rows)), key=lambda row: len(self.rows[row]), reverse=True)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            first = [len(self.rows[row]) - max(len(r.continuation) for r in of_row[row]) for row in batch]
            for row, log_probs in zip(batch, self._log_probs(model, batch, min(first))):
                for request in of_row[row]:
                    targets = torch.tensor(request.continuation, device=log_probs.device)
                    tokens = log_probs[-len(targets) :].gather(1, targets[:, None])
                    found[request] = float(tokens.sum()) / request.divisor
        return [[found[request] for request in requests] for requests in self.requests]

    def _log_probs(self, model: nn.Module, batch: Sequence[int], first: int) -> Iterator[torch.Tensor]:
        """For each row of the batch the log-probabilities of the next token, (positions from `first` on, vocabulary)."""
        device = next(model.parameters()).device
        lengths = [len(self.rows[row]) for row in batch]
        # padded on the right: no position depends on what comes after it, so padding changes nothing
        input_ids = torch.zeros(len(batch), max(lengths), dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(batch):
            input_ids[i, : lengths[i]] = torch.tensor(self.rows[row])
            attention_mask[i, : lengths[i]] = 1
        inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
        if "logits_to_keep" in inspect.signature(_unwrap(model).forward).parameters:
            logits = model(**inputs, logits_to_keep=torch.arange(first, max(lengths), device=device)).logits
        else:
            logits = model(**inputs).logits[:, first:]
        for row_logits, length in zip(logits, lengths):
            yield row_logits[: length - first].float().log_softmax(-1)


@dataclass(frozen=True)
class _Request:
    """A continuation to score: the row of inputs whose last positions predict it, its tokens, what to divide by."""

    row: int
    continuation: tuple[int, ...]
    divisor: int


class MetricEvaluator(Evaluator):
    """A metric in the style of the `evaluate` library on predictions that a function makes.

    Args:
        metric: an object with `compute(predictions=..., references=...)` that returns a dict, such as an
            `evaluate.Metric`.
        predict (`Callable`): `predict(model)` returns the predictions.
        references (`Sequence`): what `predict` should return.
        key (`str`, *optional*): which entry of the dict to use; needed if there are several.
        mode (`str`, defaults to `"max"`): `"min"` if smaller is better.
        compute_kwargs: passed to `metric.compute`, e.g. `average="macro"`.

    Raises:
        ValueError: if `metric` has no `compute`, or the dict has no such key.
    """

    def __init__(
        self,
        metric: Any,
        predict: Callable[[nn.Module], Sequence[Any]],
        references: Sequence[Any],
        key: str | None = None,
        mode: str = "max",
        **compute_kwargs: Any,
    ) -> None:
        if not callable(getattr(metric, "compute", None)):
            raise ValueError(f"`metric` must have a method `compute`, got {metric!r}.")
        self.metric, self.predict, self.references, self.key = metric, predict, references, key
        self.compute_kwargs = compute_kwargs
        self.name = key or getattr(metric, "name", None) or "metric"
        self.mode = mode

    def measure(self, model: nn.Module) -> float:
        values = self.metric.compute(
            predictions=self.predict(model), references=self.references, **self.compute_kwargs
        )
        key = next(iter(values)) if self.key is None and len(values) == 1 else self.key
        if key not in values:
            raise ValueError(f"`key` must name one of the values of the metric {sorted(values)}, got {self.key!r}.")
        return values[key]


class LMEvalEvaluator(Evaluator):
    """Tasks of EleutherAI's lm-evaluation-harness (`pip install peft-elastic[eval]`).

    Args:
        tasks (`str` or `list[str]`): names, or paths of YAML files, of tasks; the mean over several is used.
        tokenizer: the model's tokenizer.
        metric (`str`, defaults to `"acc"`): the metric's name in the harness, e.g. `"acc_norm"` or `"exact_match"`; with
            a filter as `"exact_match,strict-match"`.
        mode (`str`, defaults to `"max"`): `"min"` if smaller is better.
        limit (`int` or `float`, *optional*): the first examples only, or a share of them if less than 1.
        num_fewshot (`int`, *optional*): examples in the prompt; by default what the task says.
        batch_size (`int`, defaults to 8): sequences per forward pass.
        include_path (`str`, *optional*): a folder with further task files.

    Raises:
        ImportError: if lm-eval is not installed.
        ValueError: when called, if the results of a task do not have the metric.
    """

    def __init__(
        self,
        tasks: str | Sequence[str],
        tokenizer: Any,
        metric: str = "acc",
        mode: str = "max",
        limit: float | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
        include_path: str | None = None,
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ImportError("`LMEvalEvaluator` needs lm-eval: pip install 'peft-elastic[eval]'.") from error
        self.tasks = [tasks] if isinstance(tasks, str) else list(tasks)
        # the thousands of tasks that come with the harness are indexed only if one of them may be meant
        local = include_path is None and all(task.endswith((".yaml", ".yml")) for task in self.tasks)
        self.task_manager = TaskManager(include_path=include_path, include_defaults=not local)
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.metric, self.name, self.mode = metric, metric, mode
        self.limit, self.num_fewshot = limit, num_fewshot
        self._lm: Any = None

    def measure(self, model: nn.Module) -> float:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        if self._lm is None or self._lm.model is not model:
            self._lm = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=self.batch_size)
        results = simple_evaluate(
            model=self._lm,
            tasks=list(self.tasks),
            task_manager=self.task_manager,
            limit=self.limit,
            num_fewshot=self.num_fewshot,
            bootstrap_iters=0,
            log_samples=False,
        )["results"]
        # a group stands for its tasks; a task from a file is listed under the name it has inside
        results = {name: results[name] for name in self.tasks if name in results} or results
        key = self.metric if "," in self.metric else f"{self.metric},none"
        for task, values in results.items():
            if key not in values:
                metrics = sorted(name for name in values if "," in name)
                raise ValueError(f"`metric` {self.metric!r} is not among the results of task {task!r}: {metrics}.")
        return sum(values[key] for values in results.values()) / len(results)


def _unwrap(model: Any) -> Any:
    """The transformers model inside DDP, torch.compile and peft."""
    for wrapper in ("_orig_mod", "module"):
        model = getattr(model, wrapper, model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_causal(model: nn.Module) -> bool:
    base = _unwrap(model)
    if not hasattr(base, "can_generate") or not hasattr(base, "config"):
        raise ValueError(f"cannot tell whether {type(base).__name__} predicts the next token; pass `shift`.")
    return is_language_model(base)


def _read_example(example: Mapping[str, Any], number: int) -> tuple[str, list[str], int]:
    try:
        prompt, choices, label = example["prompt"], list(example["choices"]), example["label"]
    except KeyError as error:
        raise ValueError(
            f"example {number} of `examples` has no {error}; it needs 'prompt', 'choices', 'label'."
        ) from error
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"`choices` of example {number} must be non-empty strings, got {choices!r}.")
    if label not in range(len(choices)):
        raise ValueError(f"`label` of example {number} must be from 0 to {len(choices) - 1}, got {label!r}.")
    return prompt, choices, int(label)


def _tokenize(tokenizer: Any, prompt: str, choice: str, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokens of the prompt and of the choice after it.

    Both are tokenised together, as a model would see them. Where the end of the prompt and the start of the choice merge
    into one token, that token belongs to the choice.
    """
    context = _without_end(tokenizer, tokenizer(prompt)["input_ids"])
    whole = _without_end(tokenizer, tokenizer(prompt + choice)["input_ids"])
    shared = 0
    while shared < min(len(context), len(whole) - 1) and context[shared] == whole[shared]:
        shared += 1
    context, continuation = whole[:shared], whole[shared:]
    if not context:  # an empty prompt, and a tokenizer that adds no token at the start
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise ValueError(f"`prompt` of example {number} is empty and the tokenizer has no token to begin with.")
        context = [start]
    return tuple(context), tuple(continuation)


def _without_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Without the end token that some tokenizers add."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
