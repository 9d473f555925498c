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
"""Hypervolume: how much of the space of objectives a search has covered so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pymoo.indicators.hv import Hypervolume


if TYPE_CHECKING:
    from .result import SearchResult


class HypervolumeTracker:
    """Normalised hypervolume of points that come one by one.

    In each objective the reference point is 1 and the ideal point 0. A point that is no better than the reference point in
    some objective adds nothing; one that is better than the ideal point can bring the volume above 1.

    Args:
        reference, ideal (`Sequence[float]`): in the units of the objectives, turned so that smaller is better. An objective
            in which they are equal is left in its own unit.
    """

    def __init__(self, reference: Sequence[float], ideal: Sequence[float]) -> None:
        self._reference = np.array(reference, dtype=float)
        scale = self._reference - np.array(ideal, dtype=float)
        self._scale = np.where(scale > 0, scale, 1.0)
        self._front = np.empty((0, len(self._reference)))
        self.value = 0.0

    def add(self, point: Sequence[float]) -> float:
        """The hypervolume with this point (turned so that smaller is better)."""
        new = (np.array(point, dtype=float) - self._reference) / self._scale + 1.0
        if (new < 1).all() and not (self._front <= new).all(axis=1).any():
            kept = self._front[~(new <= self._front).all(axis=1)]
            self._front = np.vstack([kept, new])
            if len(new) == 1:
                self.value = float(1 - new[0])
            else:  # rounding must not let it fall
                self.value = max(self.value, float(Hypervolume(ref_point=np.ones(len(new)))(self._front)))
        return self.value


def hypervolume_of(result: SearchResult, reference: Mapping[str, float], ideal: Mapping[str, float]) -> list[float]:
    """The hypervolume after each evaluation of a search, normalised so that the box between `reference` and `ideal` is 1.

    `SearchResult.hypervolume` does this with the result's own box. To compare two searches of the same model, measure both
    with one box: `hypervolume_of(other, *result.hypervolume_box)`.

    Args:
        result (`SearchResult`): evaluations that violate its constraints or have failed add nothing.
        reference, ideal (`Mapping[str, float]`): a bad and a good value of every objective, in its own unit.

    Returns:
        `list[float]`: never falling, as long as the history.

    Raises:
        ValueError: if a mapping does not name exactly the objectives, or an ideal value is worse than the reference.
    """
    for argument, values in (("reference", reference), ("ideal", ideal)):
        if set(values) != set(result.objectives):
            raise ValueError(f"`{argument}` names {sorted(values)}, the objectives are {sorted(result.objectives)}.")
    points = [[v[n] * (1 if d == "min" else -1) for n, d in result.objectives.items()] for v in (reference, ideal)]
    if any(good > bad for bad, good in zip(*points, strict=True)):
        raise ValueError(f"`ideal` {dict(ideal)!r} is worse than `reference` {dict(reference)!r} in an objective.")
    tracker = HypervolumeTracker(*points)
    return [tracker.add(result.minimised(e)) if result.is_eligible(e) else tracker.value for e in result.history]
