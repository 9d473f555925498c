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
"""How the subnet of a training step is drawn."""

from __future__ import annotations

import math
from bisect import bisect
from itertools import accumulate
from typing import Protocol

import numpy as np

from .space import SearchSpace, Subnet


class SubnetSampler(Protocol):
    """Draws subnets; any callable with this signature will do."""

    def __call__(self, space: SearchSpace, rng: np.random.Generator) -> Subnet:
        """A subnet of `space`; all randomness comes from `rng`."""


class UniformSampler:
    """Every choice independently and uniformly, as in Shears and LoNAS. With many choices nearly all subnets then have
    nearly the same size."""

    def __call__(self, space: SearchSpace, rng: np.random.Generator) -> Subnet:
        return space.sample(rng)


class BalancedSampler:
    """Subnets spread evenly over the number of active adapter parameters, from the smallest to the largest subnet (the
    calibrated sampling of Sukthanker et al. 2024, https://huggingface.co/papers/2405.10299).

    The range of parameter counts is cut into 16 bins. One of the bins that hold a subnet is drawn, then one of the
    parameter counts in it, then one of the subnets with that count, each time uniformly. Counts are exact where the
    range is at most 4096 of their largest common steps (any space of SmolLM2-135M, say), else rounded, option by option,
    to that many steps.
    """

    _BINS = 16
    _STEPS = 4096

    def __init__(self) -> None:
        self._space: SearchSpace | None = None

    def __call__(self, space: SearchSpace, rng: np.random.Generator) -> Subnet:
        if space != self._space:
            self._prepare(space)
        cells = self._bins[rng.integers(len(self._bins))]
        cell = int(cells[rng.integers(len(cells))])
        # Undo the sum, last choice first: an option is as likely as the number of ways to reach what is left of `cell`
        # with the choices before it.
        indices = []
        for costs, before, u in zip(self._costs[::-1], self._log_ways[-2::-1], rng.random(len(space)).tolist()):
            ways = [before[cell - cost] if cost <= cell else -math.inf for cost in costs]
            most = max(ways)
            cumulative = list(accumulate(math.exp(way - most) for way in ways))
            index = bisect(cumulative, u * cumulative[-1])
            indices.append(index)
            cell -= costs[index]
        return space.decode(indices[::-1])

    def _prepare(self, space: SearchSpace) -> None:
        """Count the subnets of each size: `_log_ways[i][c]` is the logarithm of the number of ways in which the first i
        choices come to c steps above the smallest subnet."""
        costs = [
            [(option - choice.options[-1]) * choice.unit_parameters for option in choice.options] for choice in space
        ]
        total = sum(cost[0] for cost in costs)
        step = max(math.gcd(*(c for cost in costs for c in cost)), total / self._STEPS) or 1
        self._costs = [[round(c / step) for c in cost] for cost in costs]
        size = sum(cost[0] for cost in self._costs) + 1
        self._log_ways = np.full((len(space) + 1, size), -np.inf)
        self._log_ways[0, 0] = 0.0
        for before, after, cost in zip(self._log_ways, self._log_ways[1:], self._costs):
            for c in cost:
                np.logaddexp(after[c:], before[: size - c], out=after[c:])
        cells = np.flatnonzero(np.isfinite(self._log_ways[-1]))
        bin_of_cell = np.minimum(cells * self._BINS // max(1, size - 1), self._BINS - 1)
        self._bins = [cells[bin_of_cell == b] for b in np.unique(bin_of_cell)]
        self._space = space
