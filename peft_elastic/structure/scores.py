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
"""Scores of importance that a training has learned, in files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..common.documents import FINITE, TEXT, Document, ListOf, MapOf, Nullable, Record
from ..common.writing import atomic_write_text
from .blocks import Structure
from .importance import note_scores, noted_scores, order_digest
from .parts import Width


SCORES = Document(
    "file of importance scores",
    "peft-elastic/importance-scores",
    1,
    Record(structure=TEXT, order=Nullable(TEXT), scores=MapOf(ListOf(FINITE))),
)


def save_scores(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the scores that a training with `MovementCallback` has learned of a model to a JSON file.

    Args:
        model (`nn.Module`): a transformers model, or a `PeftModel`.
        path: of the file.

    Raises:
        ValueError: if none are noted on the model.
        OSError: naming the file, if it cannot be written.
    """
    base = base_of(model)
    scores = noted_scores(base)
    if not scores:
        raise ValueError("`model` has learned no scores: train it with `MovementCallback` first.")
    fields = {"structure": _structure_of(base, scores), "order": order_digest(base)}
    values = {name: score.tolist() for name, score in scores.items()}
    atomic_write_text(path, json.dumps(SCORES.wrap({**fields, "scores": values})))


def load_scores(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Read scores that `save_scores` wrote and note them on the model, for `sort_by_importance(model, "movement")`.

    Args:
        model (`nn.Module`): of the same structure as the one that learned them, its units in the same order.
        path: of the file.

    Returns:
        `dict[str, torch.Tensor]`: float32 (units,) by the name of each order.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: naming the file, if it is another one, damaged, or of another model.
    """
    base = base_of(model)
    fields = SCORES.read(path)
    scores = {name: torch.tensor(values, dtype=torch.float32) for name, values in fields["scores"].items()}
    where = f"The scores in {os.fspath(path)!r}"
    if not scores or fields["structure"] != _structure_of(base, scores):
        raise ValueError(f"{where} are of another model than `model` ({type(base).__name__}).")
    if fields["order"] != order_digest(base):
        raise ValueError(
            f"{where} are of units in another order than those of `model`: one of the two was sorted before. Load them on the model "
            "as it was when they were saved."
        )
    note_scores(base, scores)
    return dict(scores)


def _structure_of(model: nn.Module, scores: Mapping[str, torch.Tensor]) -> str:
    """The fingerprint of what has these scores in a model; empty if some are of other sizes."""
    widths = [width for width in Structure(model).widths if any(order.name in scores for order in width.orders)]
    units = {order.name: width.units for width in widths for order in width.orders}
    return fingerprint(widths) if {name: len(score) for name, score in scores.items()} == units else ""


def fingerprint(widths: Sequence[Width]) -> str:
    """What tells the units of these widths, and the layers they are in, from others."""
    lines = [
        f"{order.name} {width.units} {[(slot.path, slot.side, slot.parts) for slot in order.slots]}"
        for width in widths
        for order in width.orders
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def base_of(model: nn.Module) -> nn.Module:
    """The model without the wrapper of peft, on which orders and scores are noted."""
    return getattr(model, "get_base_model", lambda: model)()
