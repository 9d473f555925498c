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
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from ..common.checks import check_whole, wrong
from .space import SearchSpace, Subnet


class SubnetSampler(Protocol):
    """Draws subnets; any callable with this signature will do."""

    def __call__(self, space: SearchSpace, rng: np.random.Generator) -> Subnet:
        """Draw a subnet of `space`; all randomness comes from `rng`."""


@runtime_checkable
class StepSampler(Protocol):
    """Draws all the subnets that one optimizer step trains, for `ElasticTrainer`; any object with this method will do."""

    def subnets_of_step(self, space: SearchSpace, rng: np.random.Generator) -> list[Subnet]:
        """Draw at least one subnet of `space`, in the order of training; all randomness comes from `rng`."""


class UniformSampler:
    """Every choice independently and uniformly, as in Shears and LoNAS. With many choices nearly all subnets then have
    nearly the same size."""

    def __call__(self, space: SearchSpace, rng: np.random.Generator) -> Subnet:
        return space.sample(rng)


class BalancedSampler:
    """Subnets spread evenly over the number of active parameters, from the smallest to the largest subnet (the calibrated
    sampling of Sukthanker et al. 2024, https://huggingface.co/papers/2405.10299): those of the adapter, and in a space with
    `layers` also those of the base model that width and depth change.

    The range of parameter counts is cut into 16 bins.

    Where ranks alone differ, so that a count is a sum over the choices, one of the bins that hold a subnet is drawn, then one of the
    parameter counts in it, then one of the subnets with that count, each time uniformly. Counts are exact where the
    range is at most 4096 of their largest common steps (any space of SmolLM2-135M, say), else rounded, option by option,
    to that many steps.

    With width and depth, a bin is drawn uniformly, and then every choice independently, its options weighted by an
    exponential of what they save, so that the expected count is the centre of the bin. What falls outside of the bin is drawn
    again, up to 64 times; if nothing falls inside, the nearest is taken.
    """

    _BINS = 16
    _STEPS = 4096
    _TRIES = 64

    def __init__(self) -> None:
        self._space: SearchSpace | None = None

    def __call__(self, space: SearchSpace, rng: np.random.Generator) -> Subnet:
        if space != self._space:
            self._exact = _only_ranks(space)
            if self._exact:
                self._prepare(space)
            else:
                self._prepare_tilts(space)
        return self._draw_exact(space, rng) if self._exact else self._draw_tilted(space, rng)

    def _draw_exact(self, space: SearchSpace, rng: np.random.Generator) -> Subnet:
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

    def _draw_tilted(self, space: SearchSpace, rng: np.random.Generator) -> Subnet:
        bin_ = int(rng.integers(self._BINS))
        nearest, distance = space.max, math.inf
        for _ in range(self._TRIES):
            draws = rng.random(len(space)).tolist()
            indices = [min(bisect(c, u), len(c) - 1) for c, u in zip(self._cumulative[bin_], draws, strict=True)]
            subnet = space.decode(indices)
            off = abs(_count(space, subnet) - self._centres[bin_])
            if off < distance:
                nearest, distance = subnet, off
            if distance <= self._half_width:
                break
        return nearest

    def _prepare_tilts(self, space: SearchSpace) -> None:
        """For each bin the cumulative probabilities of the options of each choice."""
        low, high = _count(space, space.min), _count(space, space.max)
        self._half_width = (high - low) / self._BINS / 2
        self._centres = [low + (2 * i + 1) * self._half_width for i in range(self._BINS)]
        # what each option saves against the largest, in a network that is whole otherwise; 1 is the mean of the choices
        savings = [
            np.array([high - _count(space, {**space.max, choice.key: option}) for option in choice.options])
            for choice in space
        ]
        unit = sum(float(saved.max()) for saved in savings) / len(space) or 1.0

        def probabilities(tilt: float) -> list[np.ndarray]:
            weights = [np.exp(tilt * saved / unit - (tilt * saved / unit).max()) for saved in savings]
            return [weight / weight.sum() for weight in weights]

        self._cumulative = []
        for centre in self._centres:
            least, most = -1e3, 1e3  # the expected count falls as the tilt rises
            for _ in range(50):
                tilt = (least + most) / 2
                above = _expected_count(space, probabilities(tilt)) > centre
                least, most = (tilt, most) if above else (least, tilt)
            self._cumulative.append([list(accumulate(p.tolist())) for p in probabilities(least)])
        self._space = space

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


class SandwichSampler:
    """The sandwich rule (Yu & Huang 2019, https://arxiv.org/abs/1903.05134): each step trains the largest subnet, then
    the smallest, then `n_random` others. It takes an `ElasticTrainer`.

    Args:
        n_random (`int`, defaults to 2): subnets drawn beside the largest and the smallest.
        sampler (`"uniform"`, `"balanced"` or a `SubnetSampler`, defaults to `"uniform"`): how they are drawn.

    Raises:
        ValueError: if `n_random` is not a whole number >= 0 or the sampler is unknown.
    """

    def __init__(self, n_random: int = 2, sampler: str | SubnetSampler = "uniform") -> None:
        check_whole("n_random", n_random, least=0)
        self.n_random = n_random
        self.sampler = _find(sampler, "sampler", _strategies(several=False))

    def subnets_of_step(self, space: SearchSpace, rng: np.random.Generator) -> list[Subnet]:
        return [space.max, space.min, *(self.sampler(space, rng) for _ in range(self.n_random))]


# Names in `strategy=`, and in `peft-elastic train --strategy`.
STRATEGIES: dict[str, type] = {"uniform": UniformSampler, "balanced": BalancedSampler, "sandwich": SandwichSampler}


def _strategies(several: bool) -> dict[str, type]:
    """All of them, or those of one subnet a step."""
    return {name: cls for name, cls in STRATEGIES.items() if several or not hasattr(cls, "subnets_of_step")}


def sampler_of(strategy: str | SubnetSampler | StepSampler, several: bool) -> SubnetSampler | StepSampler:
    """Find the sampler that the argument `strategy` of a callback or trainer stands for.

    Args:
        strategy: the name of a sampler, or a sampler.
        several (`bool`): whether a step may train several subnets.

    Raises:
        ValueError: if it is neither, or needs several subnets a step where one is trained.
    """
    steps = isinstance(strategy, StepSampler) and not isinstance(strategy, type)  # a class is no sampler
    unfit = isinstance(strategy, str) and strategy in STRATEGIES and strategy not in _strategies(several)
    if not several and (steps or unfit):
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise ValueError(
            f"`strategy` {name!r} trains several subnets in each step, which takes several backward passes: use "
            "`ElasticTrainer(..., strategy=...)` instead of a callback."
        )
    if steps:
        return cast(StepSampler, strategy)
    return _find(strategy, "strategy", _strategies(several))


def _find(value: Any, argument: str, named: dict[str, type]) -> Any:
    if isinstance(value, str) and value in named:
        return named[value]()
    if callable(value) and not isinstance(value, type):
        return value
    raise wrong(argument, f"one of {sorted(named)} or a callable (space, rng) -> Subnet", value)


def _only_ranks(space: SearchSpace) -> bool:
    """Whether the base is whole in every subnet, as in a stage of ranks alone."""
    whole = {key: value for layer in space.layers for key, value in layer.whole_values.items()}
    return all(space[key].options == (value,) for key, value in whole.items())


def _count(space: SearchSpace, subnet: Mapping[str, int]) -> int:
    return space.count_parameters(subnet) + space.count_base_parameters(subnet)


def _expected_count(space: SearchSpace, probabilities: list[np.ndarray]) -> float:
    """Mean number of active parameters where every choice is drawn on its own: each term of `_count` is a product of numbers
    that depend on different choices."""
    mean = {choice.key: float(p @ choice.options) for choice, p in zip(space, probabilities, strict=True)}
    of_key = {choice.key: p for choice, p in zip(space, probabilities, strict=True)}
    total = sum(mean[choice.key] * choice.unit_parameters for choice in space)

    def mean_of(key: str | None, number: Callable[[dict[str, int]], int]) -> float:
        """Of a number that depends on one choice, or none."""
        if key is None:
            return float(number({}))
        return float(of_key[key] @ [number({key: option}) for option in space[key].options])

    for layer in space.layers:
        # a depth choice is 0 or 1, so that its mean is the probability that the layer is there
        there = math.prod(mean[key] for key in layer.depth)
        outs, ins = ([mean_of(run.choice, run.active) for run in side] for side in layer.sides)
        area = mean_of(layer.kernel, layer.area)
        elements = sum(outs) * sum(ins)
        for i, run in enumerate(layer.sides[0]):  # where both sides depend on the same choice they are large together
            for j, other in enumerate(layer.sides[1]):
                if run.choice is not None and run.choice == other.choice:
                    options = [{run.choice: option} for option in space[run.choice].options]
                    both = of_key[run.choice] @ [run.active(option) * other.active(option) for option in options]
                    elements += float(both) - outs[i] * ins[j]
        total += there * (elements * area + (layer.bias + layer.per_output) * sum(outs))
        if layer.rank is not None:
            total -= mean[layer.rank] * (layer.whole_of_rank - there * (sum(outs) + sum(ins) * area))
    return total
