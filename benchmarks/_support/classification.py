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
"""What the benchmarks that classify sentences share. An example is a dict with `text` and `label`."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import torch
from scipy import stats
from torch import nn


Example = dict[str, Any]


def batches(tokenizer: Any, data: list[Example], size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of examples of similar length."""
    data = sorted(data, key=lambda example: len(example["text"]))
    return [collate(tokenizer, data[i : i + size]) for i in range(0, len(data), size)]


def collate(tokenizer: Any, examples: list[Example]) -> dict[str, torch.Tensor]:
    encoded = tokenizer([example["text"] for example in examples], padding=True, return_tensors="pt")
    return {**encoded, "labels": torch.tensor([example["label"] for example in examples])}


def quality(data: list[dict[str, torch.Tensor]]) -> Callable[[nn.Module], dict[str, float]]:
    """Mean loss of a model, and its share of right answers in percent."""
    count = sum(len(batch["labels"]) for batch in data)

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, float]:
        loss, right = 0.0, 0
        for batch in data:
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
            loss += float(nn.functional.cross_entropy(logits, batch["labels"], reduction="sum"))
            right += int((logits.argmax(1) == batch["labels"]).sum())
        return {"loss": loss / count, "accuracy": 100 * right / count}

    return evaluate


def student(values: list[float], digits: int, sign: str = "+") -> str:
    """Mean and 95% interval by Student's t."""
    if len(values) < 2:
        return f"{values[0]:{sign}.{digits}f}"
    width = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return f"{mean(values):{sign}.{digits}f} ± {width:.{digits}f}"
