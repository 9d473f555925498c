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
"""Search algorithms: each proposes batches of subnets (`ask`) and learns their objectives (`tell`).

None of them proposes a subnet twice, all begin with the max, the min and the heuristic subnet, and all own their random
state: the proposals depend on the space, the seed, the constraints and what was told, on no global generator and not on
`n_evals`. Costs are known before an evaluation, so but for those three only subnets that keep the constraints are proposed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.rnsga2 import RNSGA2
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.evaluator import Evaluator
from pymoo.core.population import Population
from pymoo.core.repair import Repair
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.problems.static import StaticProblem

from ..supernet.space import SearchSpace, Subnet
from .constraints import Constraints
from .problem import SubnetProblem


Indices = tuple[int, ...]


class SearchAlgorithm(Protocol):
    """What `search_subnet` needs of an algorithm."""

    def __init__(
        self,
        space: SearchSpace,
        n_objectives: int,
        population: int,
        seed: int,
        constraints: Constraints,
        reference_points: np.ndarray | None,
    ) -> None:
        """`reference_points` (points, objectives), to be minimised, are for `r-nsga2` alone."""

    def ask(self) -> list[Subnet]:
        """The next subnets to evaluate, none that was asked before; empty once none is left that keeps the constraints."""

    def tell(self, values: Sequence[Sequence[float]]) -> None:
        """The objectives, all to be minimised, of the subnets of the last `ask`, in the same order."""


def reference_subnets(space: SearchSpace) -> dict[Subnet, str]:
    """The max, min and heuristic subnet with their names, without repetition, in the order of their evaluation."""
    named: dict[Subnet, str] = {}
    for name in ("max", "min", "heuristic"):
        named.setdefault(space.subnet(name), name)
    return named


class RandomSearch:
    """Different subnets, drawn uniformly. A draw that violates a constraint is lowered, one random choice after the other
    by one option, until it keeps it: near a tight bound uniform draws would hardly ever do."""

    def __init__(
        self,
        space: SearchSpace,
        n_objectives: int,
        population: int,
        seed: int,
        constraints: Constraints,
        reference_points: np.ndarray | None = None,
    ) -> None:
        self._space = space
        self._constraints = constraints
        self._rng = np.random.default_rng(seed)
        self._seen: set[Indices] = set()
        self._first = [space.encode(subnet) for subnet in reference_subnets(space)]

    def ask(self) -> list[Subnet]:
        batch, self._first = self._first, []
        batch = batch or list(_unseen(self._space, self._seen, 1, self._rng, self._constraints))
        self._seen.update(batch)
        return [self._space.decode(indices) for indices in batch]

    def tell(self, values: Sequence[Sequence[float]]) -> None:
        pass  # nothing to learn


class ExhaustiveSearch:
    """Every subnet of the space that keeps the constraints."""

    def __init__(
        self,
        space: SearchSpace,
        n_objectives: int,
        population: int,
        seed: int,
        constraints: Constraints,
        reference_points: np.ndarray | None = None,
    ) -> None:
        first = reference_subnets(space)
        rest = (subnet for subnet in space.subnets() if subnet not in first and constraints.allows(subnet))
        self._subnets = itertools.chain(first, rest)

    def ask(self) -> list[Subnet]:
        return list(itertools.islice(self._subnets, 1))

    def tell(self, values: Sequence[Sequence[float]]) -> None:
        pass  # nothing to learn


class NSGA2Search:
    """NSGA-II (Deb et al., 2002) on the option indices, with the operators of LoNAS (Munoz et al., LREC-COLING 2024):
    SBX with probability 0.9 and eta 10, polynomial mutation with probability 0.02 per variable and eta 3.

    Where these find nothing new, which is the rule in a space of few choices (with 3 of them 94% of the offspring are not
    mutated at all), random newcomers fill the generation. Offspring that violate a constraint are lowered like the draws of
    `RandomSearch`; pymoo's constraint handling sorts out the reference subnets that do.
    """

    def __init__(
        self,
        space: SearchSpace,
        n_objectives: int,
        population: int,
        seed: int,
        constraints: Constraints,
        reference_points: np.ndarray | None = None,
    ) -> None:
        self._space = space
        self._population = population
        self._constraints = constraints
        self._problem = SubnetProblem(space, n_objectives, len(constraints.bounds))
        self._seen: set[Indices] = set()
        rng = np.random.default_rng((seed, 0))  # another stream than the one that pymoo draws from `seed`
        first = [space.encode(subnet) for subnet in reference_subnets(space)]
        repair = _Lower(space, constraints, frozenset(first)) if constraints.bounds else None
        first += _unseen(space, set(first), population - len(first), rng, constraints)
        self._algorithm = self._make(
            reference_points,
            pop_size=population,
            sampling=np.array(first),
            crossover=SBX(prob=0.9, eta=10, vtype=float, repair=RoundingRepair()),
            mutation=PM(prob=1.0, prob_var=0.02, eta=3, vtype=float, repair=RoundingRepair()),
            eliminate_duplicates=_NeverTwice(self._seen),
            repair=repair,
        )
        self._algorithm.setup(self._problem, seed=seed, termination=NoTermination())
        self._asked = Population.empty()

    def _make(self, reference_points: np.ndarray | None, **settings: Any) -> Any:
        return NSGA2(**settings)

    def ask(self) -> list[Subnet]:
        asked = self._algorithm.ask()
        if asked is None:  # crossover and mutation found nothing new; pymoo would stop here
            self._algorithm.termination.force_termination = False
            asked = Population.empty()
        batch = [_indices(individual) for individual in asked]
        self._seen.update(batch)
        # in a nearly exhausted neighbourhood, random newcomers fill the generation
        missing = self._population - len(batch)
        newcomers = _unseen(self._space, self._seen, missing, self._algorithm.random_state, self._constraints)
        self._seen.update(newcomers)
        if newcomers:
            asked = Population.merge(asked, Population.new(X=np.array(newcomers)))
        self._asked = asked
        return [self._space.decode(indices) for indices in batch + newcomers]

    def tell(self, values: Sequence[Sequence[float]]) -> None:
        outputs = {"F": np.array(values, dtype=float)}
        if self._constraints.bounds:
            asked = [self._space.decode(_indices(individual)) for individual in self._asked]
            outputs["G"] = np.array([self._constraints.violations(subnet) for subnet in asked])
        Evaluator().eval(StaticProblem(self._problem, **outputs), self._asked)
        # R-NSGA-II divides by the range of each objective, which may be zero
        with np.errstate(divide="ignore", invalid="ignore"):
            self._algorithm.tell(infills=self._asked)


class RNSGA2Search(NSGA2Search):
    """R-NSGA-II (Deb and Sundar, 2006): NSGA-II that prefers, among equally good subnets, those near reference points.
    Distances are in units of the range of each objective over all evaluations so far."""

    def _make(self, reference_points: np.ndarray | None, **settings: Any) -> Any:
        return RNSGA2(ref_points=reference_points, normalization="ever", **settings)


# Name in `search_subnet(algorithm=...)` -> class.
ALGORITHMS: dict[str, type[SearchAlgorithm]] = {
    "exhaustive": ExhaustiveSearch,
    "nsga2": NSGA2Search,
    "r-nsga2": RNSGA2Search,
    "random": RandomSearch,
}
# Those that work in generations.
EVOLUTIONARY = ("nsga2", "r-nsga2")


class _Lower(Repair):
    """Lowers offspring until they keep the constraints; the reference subnets stay as they are."""

    def __init__(self, space: SearchSpace, constraints: Constraints, references: frozenset[Indices]) -> None:
        super().__init__()
        self._space, self._constraints, self._references = space, constraints, references

    def _do(self, problem: Any, X: np.ndarray, random_state: Any = None, **kwargs: Any) -> np.ndarray:
        rows = [tuple(int(index) for index in row) for row in X]
        return np.array(
            [
                row if row in self._references else _lowered(self._space, row, random_state, self._constraints)
                for row in rows
            ]
        )


class _NeverTwice(DuplicateElimination):
    """Drops individuals that were asked before in any generation; pymoo's own looks at the present one only."""

    def __init__(self, seen: set[Indices]) -> None:
        super().__init__()
        self._seen = seen

    def _do(self, pop: Population, other: Population | None, is_duplicate: np.ndarray) -> np.ndarray:
        known = set(self._seen) if other is None else {_indices(individual) for individual in other}
        for i, individual in enumerate(pop):
            key = _indices(individual)
            is_duplicate[i] = key in known
            if other is None:
                known.add(key)
        return is_duplicate


def _indices(individual: Any) -> Indices:
    return tuple(int(index) for index in individual.X)


def _lowered(space: SearchSpace, indices: Indices, rng: np.random.Generator, constraints: Constraints) -> Indices:
    """The subnet itself if it keeps the constraints; else with random choices lowered, option by option, until it does."""
    if not constraints.bounds:
        return indices
    row, last = list(indices), [len(choice.options) - 1 for choice in space]
    while not constraints.allows(space.decode(row)):
        higher = [i for i, index in enumerate(row) if index < last[i]]
        if not higher:
            break  # the min subnet, which keeps them
        row[higher[rng.integers(len(higher))]] += 1
    return tuple(row)


def _unseen(
    space: SearchSpace, seen: set[Indices], number: int, rng: np.random.Generator, constraints: Constraints
) -> list[Indices]:
    """Up to `number` different subnets outside `seen` that keep the constraints, drawn at random; fewer only if there are
    no more."""
    found: dict[Indices, None] = {}
    number = min(number, space.size - len(seen))
    for _ in range(100 * number):
        if len(found) == number:
            return list(found)
        indices = _lowered(space, space.encode(space.sample(rng)), rng, constraints)
        if indices not in seen:
            found[indices] = None
    if len(found) < number:
        # 100 draws for each one wanted were not enough, so most of what is allowed is seen: walk through it from the min
        # subnet upwards, in random order, until enough is found
        frontier = [space.encode(space.min)]
        reached = set(frontier)
        while frontier and len(found) < number:
            at = int(rng.integers(len(frontier)))
            frontier[at], frontier[-1] = frontier[-1], frontier[at]
            node = frontier.pop()
            if node not in seen:
                found[node] = None
            for i, index in enumerate(node):
                raised = (*node[:i], index - 1, *node[i + 1 :])
                if index > 0 and raised not in reached and constraints.allows(space.decode(raised)):
                    reached.add(raised)
                    frontier.append(raised)
    return list(found)
