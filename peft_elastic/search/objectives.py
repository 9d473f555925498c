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
"""What a search optimises: names, directions, and where each value comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch

from ..cost.counts import COST_NAMES, COSTS
from .constraints import NEEDS_LATENCY
from .evaluators import Evaluator
from .values import plain


# What a search computes itself; always minimised.
_BUILT_IN = tuple(COSTS)

# What `evaluate` and `held_out` are: functions of the model that return a number or a dict of named numbers.
Evaluate = Callable[[Any], float | Mapping[str, float]]
# An entry of `objectives` as a user may write it.
ObjectiveLike = str | tuple[str, Callable[[Any], float]] | Mapping[str, Callable[[Any], float]]


@dataclass(frozen=True)
class Objective:
    """One objective of a search.

    Args:
        name (`str`): its key in `Evaluation.metrics`.
        direction (`str`): `"max"` or `"min"`.
        function (`Callable`, *optional*): computes it from the model; without it, it is a built-in cost or a value that
            `evaluate` returns.
    """

    name: str
    direction: str
    function: Callable[[Any], float] | None = None

    @property
    def measured(self) -> bool:
        """Whether the value must come from `evaluate`."""
        return self.function is None and self.name not in _BUILT_IN


def parse_objectives(
    objectives: str | Sequence[ObjectiveLike] | None,
    mode: str | Mapping[str, str] | None,
    evaluate: Callable,
    with_latency: bool = False,
) -> list[Objective]:
    """Check `objectives` and `mode` of `search_subnet`, whose documentation says what they may be.

    Args:
        with_latency (`bool`): whether the search has a latency model.

    Raises:
        ValueError: if an entry, a name or a direction is not allowed.
    """
    if objectives is None:
        objectives = (evaluate.name if isinstance(evaluate, Evaluator) else "accuracy", "macs")
    entries = _entries(objectives)
    names = [name for name, _ in entries]
    if len(set(names)) != len(names):
        raise ValueError(f"`objectives` holds a name twice: {names}.")
    if ("latency", None) in entries and not with_latency:
        raise ValueError(f"the objective 'latency' {NEEDS_LATENCY}")
    taken_names = _BUILT_IN if with_latency else COST_NAMES
    first, function = entries[0]
    if function is not None or first in _BUILT_IN:
        raise ValueError(
            f"the first of `objectives` must name the value that `evaluate` returns, e.g. 'accuracy', got {first!r}."
        )
    taken = [name for name, function in entries if function is not None and name in taken_names]
    if taken:
        raise ValueError(f"`objectives` gives a function the name {taken[0]!r}, which is built in; choose another.")

    if mode is None:
        mode = evaluate.mode if isinstance(evaluate, Evaluator) else "max"
    if not isinstance(mode, Mapping):
        mode = {name: mode for name, function in entries if function is None and name not in _BUILT_IN}
    for name, direction in mode.items():
        if direction not in ("max", "min"):
            raise ValueError(f"`mode` must be 'max' or 'min', got {direction!r} for {name!r}.")
        if name not in names:
            raise ValueError(f"`mode` names {name!r}, which is not among the objectives {names}.")
        if name in taken_names and direction != "min":
            raise ValueError(f"`mode` asks to maximise {name!r}, which is always minimised.")

    def default(name: str, function: Callable | None) -> str:
        return "min" if function is not None or name in _BUILT_IN else "max"

    return [Objective(name, mode.get(name, default(name, function)), function) for name, function in entries]


def _entries(objectives: str | Sequence[ObjectiveLike]) -> list[tuple[str, Callable | None]]:
    entries: list[tuple[Any, Any]] = []
    if isinstance(objectives, (str, Mapping)):
        objectives = [objectives]
    if not isinstance(objectives, Sequence):
        raise ValueError(f"`objectives` must be a sequence of names and functions, got {objectives!r}.")
    for entry in objectives:
        if isinstance(entry, str):
            entries.append((entry, None))
        elif isinstance(entry, Mapping):
            entries.extend(entry.items())
        elif isinstance(entry, (tuple, list)) and len(entry) == 2:
            entries.append((entry[0], entry[1]))
        else:
            raise ValueError(f"an entry of `objectives` must be a name or a pair (name, function), got {entry!r}.")
    if not entries:
        raise ValueError("`objectives` is empty, it needs at least the name of what `evaluate` returns.")
    for name, function in entries:
        if not isinstance(name, str) or not name:
            raise ValueError(f"the names in `objectives` must be non-empty strings, got {name!r}.")
        if function is not None and not callable(function):
            raise ValueError(f"objective {name!r} must be a function of the model, got {function!r}.")
    return entries


def read_values(value: Any, name: str, source: str, where: str) -> dict[str, float]:
    """The numbers that a user's function returned, by name.

    Args:
        value: a number, or a dict of numbers.
        name (`str`): the name of a value that is not a dict.
        source (`str`): the function, for messages.
        where (`str`): the subnet, for messages.

    Returns:
        `dict[str, float]`: NaN and infinite ones among them as they came.

    Raises:
        ValueError: if a value is not a number; the message names the subnet and the value.
    """
    values = dict(value) if isinstance(value, Mapping) else {name: value}
    for key, item in values.items():
        if not isinstance(key, str):
            raise ValueError(f"{source} returned a dict with the key {key!r} for {where}; keys must be strings.")
        values[key] = _number(item)
        if values[key] is None:
            raise ValueError(f"{source} returned {item!r} as {key!r} for {where}; it must be a number.")
    return values


def _number(value: Any) -> float | None:
    """`value` as a plain Python number, or None if it is not a number."""
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, (int, np.integer)) else plain(float(value))
