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
"""The greedy loop: stage after stage, one removal after the other, each the least harmful one that fits."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .cost import Costs
from .metric import Measurement, Metric
from .units import Move, State, Units


@dataclass(frozen=True)
class Stage:
    """
    Args:
        granularities: what it removes.
        target: the cost it comes as near to as it can.
        choose: "metric", "score", "uniform" or "random".
        metric: name of the metric of its evaluations; None if it chooses without any.
        per_cost: whether harm is divided by what a removal saves.
    """

    granularities: tuple[str, ...]
    target: float
    choose: str
    metric: str | None
    per_cost: bool = False


class GreedyPruning:
    """
    Args:
        units: what can be removed.
        costs: of the states.
        metrics: by the names that stages call them by.
        slack: see `StructuredPruningConfig`.
        scores: of the units of each order, the most important first; for the choice "score".
        seed: of the choice "random".
        report: called with a description of the state after every evaluation and every removal.

    Attributes:
        state: what has been removed.
        history: a row for each removal.
    """

    def __init__(
        self,
        units: Units,
        costs: Costs,
        metrics: Mapping[str, Metric],
        slack: float,
        scores: Mapping[str, torch.Tensor],
        seed: int,
        report: Callable[[GreedyPruning], None],
    ) -> None:
        self._units, self._costs, self._metrics, self._slack, self._scores = units, costs, metrics, slack, scores
        self._random = random.Random(seed)
        self._report = report
        self.state: dict[str, int] = {}
        self.history: list[dict[str, Any]] = []
        self.cost = costs({})
        self.value = math.nan  # of the state, by the metric of the stage
        self.evaluations = 0
        self.block_passes = 0.0
        self.seconds = 0.0

    def measure(self, metric: str, state: State) -> Measurement:
        """A measurement, by the metric of that name, of a state that is near to the present one."""
        measured = self._metrics[metric](state, self.state)
        self.evaluations += 1
        self.block_passes += measured.block_passes
        self.seconds += measured.seconds
        self._report(self)
        return measured

    def run(self, stage: Stage) -> None:
        """Remove until nothing fits that brings the cost nearer to the target of the stage."""
        if stage.choose == "uniform":
            self._run_evenly(stage)
            return
        pick = {"metric": self._least_harmful, "score": self._least_important, "random": self._any}[stage.choose]
        harm: dict[str, float] = {}
        self.value = math.nan
        while moves := [move for move in self._moves(stage) if self._is_nearer(stage, [move])]:
            before = self.evaluations, self.block_passes, self.seconds
            self._remove(stage, pick(stage, moves, harm), len(moves), before)

    def _run_evenly(self, stage: Stage) -> None:
        """A move of every block, again and again."""
        self.value = math.nan
        while (moves := self._moves(stage)) and self._is_nearer(stage, moves):
            for move in moves:
                self._remove(stage, move, len(moves), (self.evaluations, self.block_passes, self.seconds))

    def _moves(self, stage: Stage) -> list[Move]:
        return [move for name in stage.granularities for move in self._units.moves(name, self.state)]

    def _is_nearer(self, stage: Stage, moves: list[Move]) -> bool:
        """Whether the cost after some moves is nearer to the target than it is now."""
        state: State = self.state
        for move in moves:
            state = self._units.after(state, move)
        cost = self._costs(state)
        return cost < self.cost and abs(cost - stage.target) < self.cost - stage.target

    def _remove(self, stage: Stage, move: Move, candidates: int, before: tuple[int, float, float]) -> None:
        """Make a move that was chosen among so many; `before` are the evaluations, block passes and seconds before that."""
        self.state = self._units.after(self.state, move)
        self.cost = self._costs(self.state)
        self.history.append(
            {
                "stage": "+".join(stage.granularities),
                "removed": move[0],
                "left": move[1],
                "value": None if math.isnan(self.value) else self.value,
                "cost": self.cost,
                "parameters": self._costs.parameters(self.state),
                "candidates": candidates,
                "evaluations": self.evaluations - before[0],
                "block_passes": self.block_passes - before[1],
                "seconds": self.seconds - before[2],
            }
        )
        self._report(self)

    def _least_harmful(self, stage: Stage, moves: list[Move], harm: dict[str, float]) -> Move:
        """The move that raises the metric least.

        What a removal costs changes slowly, and mostly grows, as more is removed. So candidates are evaluated by what they cost
        when they were evaluated last (of a layer that was narrowed then: what that cost), and the rest is left alone once their
        old costs are clearly above the lowest new one.
        """
        assert stage.metric is not None
        if math.isnan(self.value):
            self.value = self.measure(stage.metric, self.state).value
        best: tuple[float, int] | None = None
        values: dict[int, float] = {}
        for place in sorted(range(len(moves)), key=lambda place: (harm.get(moves[place][0], -math.inf), place)):
            move = moves[place]
            if best is not None and harm.get(move[0], -math.inf) > best[0] + self._slack * abs(best[0]):
                break
            after = self._units.after(self.state, move)
            values[place] = self.measure(stage.metric, after).value
            increase = values[place] - self.value
            if stage.per_cost:
                increase /= self.cost - self._costs(after)
            harm[move[0]] = increase
            best = min(best or (math.inf, place), (increase, place))
        assert best is not None
        self.value = values[best[1]]
        return moves[best[1]]

    def _least_important(self, stage: Stage, moves: list[Move], harm: dict[str, float]) -> Move:
        """The move whose units have the lowest sum of squared scores."""

        def importance(move: Move) -> float:
            width = self._units.widths[move[0]]
            now, then = self.state.get(move[0], width.full) // width.unit, move[1] // width.unit
            return sum(float(self._scores[order.name][then:now].double().square().sum()) for order in width.orders)

        return min(moves, key=importance)

    def _any(self, stage: Stage, moves: list[Move], harm: dict[str, float]) -> Move:
        return self._random.choice(moves)


def smallest_state(units: Units, granularities: tuple[str, ...]) -> dict[str, int]:
    """What is left when everything is removed that may be."""
    state: dict[str, int] = {}
    for granularity in granularities:
        while (move := next(units.moves(granularity, state), None)) is not None:
            state = units.after(state, move)
    return state
