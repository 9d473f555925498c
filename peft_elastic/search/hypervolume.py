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

from collections.abc import Iterable, Sequence

import numpy as np


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
            else:
                from pymoo.indicators.hv import Hypervolume  # only now: pymoo takes long to import

                # rounding must not let it fall
                self.value = max(self.value, float(Hypervolume(ref_point=np.ones(len(new)))(self._front)))
        return self.value


def hypervolumes(
    points: Iterable[Sequence[float] | None], reference: Sequence[float], ideal: Sequence[float]
) -> list[float]:
    """The hypervolume after each point; None adds nothing. All are turned so that smaller is better."""
    tracker = HypervolumeTracker(reference, ideal)
    return [tracker.value if point is None else tracker.add(point) for point in points]
