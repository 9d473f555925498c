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
state: the proposals depend on the space, the seed and what was told, on no global generator and not on `n_evals`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.evaluator import Evaluator
from pymoo.core.population import Population
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.problems.static import StaticProblem

from ..supernet.space import SearchSpace, Subnet
from .problem import SubnetProblem


Indices = tuple[int, ...]


class SearchAlgorithm(Protocol):
    """What `search_subnet` needs of an algorithm."""

    def __init__(self, space: SearchSpace, n_objectives: int, population: int, seed: int) -> None: ...

    def ask(self) -> list[Subnet]:
        """The next subnets to evaluate: at least one while some are left, and none that was asked before."""

    def tell(self, values: Sequence[Sequence[float]]) -> None:
        """The objectives, all to be minimised, of the subnets of the last `ask`, in the same order."""


def reference_subnets(space: SearchSpace) -> dict[Subnet, str]:
    """The max, min and heuristic subnet with their names, without repetition, in the order of their evaluation."""
    named: dict[Subnet, str] = {}
    for name in ("max", "min", "heuristic"):
        named.setdefault(space.subnet(name), name)
    return named


class RandomSearch:
    """Different subnets, drawn uniformly."""

    def __init__(self, space: SearchSpace, n_objectives: int, population: int, seed: int) -> None:
        self._space = space
        self._rng = np.random.default_rng(seed)
        self._seen: set[Indices] = set()
        self._first = [space.encode(subnet) for subnet in reference_subnets(space)]

    def ask(self) -> list[Subnet]:
        batch, self._first = self._first, []
        batch = batch or list(_unseen(self._space, self._seen, 1, self._rng))
        self._seen.update(batch)
        return [self._space.decode(indices) for indices in batch]

    def tell(self, values: Sequence[Sequence[float]]) -> None:
        pass  # nothing to learn


class ExhaustiveSearch:
    """Every subnet of the space."""

    def __init__(self, space: SearchSpace, n_objectives: int, population: int, seed: int) -> None:
        first = reference_subnets(space)
        self._subnets = itertools.chain(first, (subnet for subnet in space.subnets() if subnet not in first))

    def ask(self) -> list[Subnet]:
        return list(itertools.islice(self._subnets, 1))

    def tell(self, values: Sequence[Sequence[float]]) -> None:
        pass  # nothing to learn


class NSGA2Search:
    """NSGA-II (Deb et al., 2002) on the option indices, with the operators of LoNAS (Munoz et al., LREC-COLING 2024):
    SBX with probability 0.9 and eta 10, polynomial mutation with probability 0.02 per variable and eta 3."""

    def __init__(self, space: SearchSpace, n_objectives: int, population: int, seed: int) -> None:
        self._space = space
        self._population = population
        self._problem = SubnetProblem(space, n_objectives)
        self._seen: set[Indices] = set()
        rng = np.random.default_rng((seed, 0))  # another stream than the one that pymoo draws from `seed`
        first = [space.encode(subnet) for subnet in reference_subnets(space)]
        first += _unseen(space, set(first), population - len(first), rng)
        self._algorithm = NSGA2(
            pop_size=population,
            sampling=np.array(first),
            crossover=SBX(prob=0.9, eta=10, vtype=float, repair=RoundingRepair()),
            mutation=PM(prob=1.0, prob_var=0.02, eta=3, vtype=float, repair=RoundingRepair()),
            eliminate_duplicates=_NeverTwice(self._seen),
        )
        self._algorithm.setup(self._problem, seed=seed, termination=NoTermination())
        self._asked = Population.empty()

    def ask(self) -> list[Subnet]:
        asked = self._algorithm.ask()
        if asked is None:  # crossover and mutation found nothing new; pymoo would stop here
            self._algorithm.termination.force_termination = False
            asked = Population.empty()
        batch = [_indices(individual) for individual in asked]
        self._seen.update(batch)
        # in a nearly exhausted neighbourhood, random newcomers fill the generation
        missing = self._population - len(batch)
        newcomers = _unseen(self._space, self._seen, missing, self._algorithm.random_state)
        self._seen.update(newcomers)
        if newcomers:
            asked = Population.merge(asked, Population.new(X=np.array(newcomers)))
        self._asked = asked
        return [self._space.decode(indices) for indices in batch + newcomers]

    def tell(self, values: Sequence[Sequence[float]]) -> None:
        Evaluator().eval(StaticProblem(self._problem, F=np.array(values, dtype=float)), self._asked)
        self._algorithm.tell(infills=self._asked)


# Name in `search_subnet(algorithm=...)` -> class.
ALGORITHMS: dict[str, type[SearchAlgorithm]] = {
    "exhaustive": ExhaustiveSearch,
    "nsga2": NSGA2Search,
    "random": RandomSearch,
}


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


def _unseen(space: SearchSpace, seen: set[Indices], number: int, rng: np.random.Generator) -> list[Indices]:
    """Up to `number` different subnets outside `seen`, uniformly; fewer only if there are no more."""
    found: dict[Indices, None] = {}
    number = min(number, space.size - len(seen))
    for _ in range(100 * number):
        if len(found) == number:
            return list(found)
        indices = space.encode(space.sample(rng))
        if indices not in seen:
            found[indices] = None
    if len(found) < number:
        # 100 draws for each one wanted were not enough, so most of the space is seen: short enough to list the rest
        sizes = [range(len(choice.options)) for choice in space]
        rest = [indices for indices in itertools.product(*sizes) if indices not in seen and indices not in found]
        found.update(dict.fromkeys(rest[i] for i in rng.permutation(len(rest))[: number - len(found)].tolist()))
    return list(found)
