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
"""The order of channels and heads within a block, of which the last go first."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from ...common.documents import FINITE, ListOf, Record, read_json
from ...common.writing import atomic_write_text
from ...structure.features import layer_at
from ...structure.importance import apply_orders, measure_importance
from ...structure.modules import weight_matrix
from ...structure.parts import Width
from .setup import Setup


def sort_units(setup: Setup, folder: Path | None, progress: bool) -> dict[str, torch.Tensor]:
    """Sort channels and heads of the model, by scores that are kept in `folder`, if there is one.

    Returns:
        their scores, float (units,) by the name of each order, in the order in which they are now.

    Raises:
        ValueError: the file with the scores is damaged.
    """
    widths = setup.sorted_widths
    if not widths:
        return {}
    kinds = "-".join(setup.sorted_kinds)
    path = None if folder is None else folder / f"order-{order_name(setup)}-{kinds}.json"
    if path is not None and path.exists():
        scores = read_scores(path, widths)
    else:
        scores = _measure(setup, widths, progress)
        if path is not None:
            atomic_write_text(path, json.dumps({name: score.tolist() for name, score in scores.items()}))
    orders = {name: torch.argsort(score, descending=True, stable=True) for name, score in scores.items()}
    apply_orders(setup.model, widths, orders)
    return {name: score[orders[name]] for name, score in scores.items()}


def order_name(setup: Setup) -> str:
    """By which evaluations of sorted units are told from others in a journal."""
    order = setup.config.order
    if not isinstance(order, str):
        text = json.dumps({name: torch.as_tensor(score).tolist() for name, score in sorted(order.items())})
        return f"scores-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return f"{order}-{setup.evaluation.sequences(setup.config.width_samples)}" if setup.needs_order_data else order


def _measure(setup: Setup, widths: list[Width], progress: bool) -> dict[str, torch.Tensor]:
    config = setup.config
    if config.order == "l1":
        return l1_scores(setup.model, widths)
    batches = setup.evaluation.batches
    return measure_importance(
        setup.model, widths, config.order, batches, max_samples=config.width_samples, progress=progress
    )


def read_scores(path: Path, widths: Iterable[Width]) -> dict[str, torch.Tensor]:
    """The scores in a file, of as many units as there are.

    Raises:
        ValueError: naming the file and what is wrong in it.
    """
    wanted = {order.name: width.units for width in widths for order in width.orders}
    try:
        data = Record(**dict.fromkeys(wanted, ListOf(FINITE))).check(read_json(path), "it")
        for name, units in wanted.items():
            if len(data[name]) != units:
                raise ValueError(f"{name!r} must have {units} scores, got {len(data[name])}")
    except ValueError as error:
        raise ValueError(
            f"`save_dir`: {os.fspath(path)!r} is damaged: {error}. Delete it to have the importance measured again."
        ) from None
    return {name: torch.tensor(values) for name, values in data.items()}


def l1_scores(model: nn.Module, widths: list[Width]) -> dict[str, torch.Tensor]:
    """The importance that MultiPruner's published configurations were made with, float32 (units,) by the name of each order: the
    sum of the absolute weights of the layers that make a channel or head, in which key and value heads count once for each query
    head that reads them."""
    scores = {}
    for width in widths:
        for order in width.orders:
            total = torch.zeros(width.units)
            makers = [slot for slot in order.slots if slot.side == "out"]
            longest = max(length for slot in makers for _, length in slot.parts)
            for slot in makers:
                rows = weight_matrix(layer_at(model, slot.path)).abs().float().sum(1).cpu()
                for start, length in slot.parts:
                    part = rows[start : start + length].view(width.units, -1).sum(1)
                    total += part * (longest / length)
            scores[order.name] = total
    return scores
