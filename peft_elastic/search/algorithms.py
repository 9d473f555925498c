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

from ..supernet.space import SearchSpace, Subnet
from .constraints import Constraints
from .proposals import Indices, reference_subnets, unseen


class SearchAlgorithm(Protocol):
    """What `search_subnet` needs of an algorithm.

    Attributes:
        learns (`bool`): whether what it is told changes what it proposes.
    """

    learns: bool

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


class RandomSearch:
    """Different subnets, drawn uniformly. A draw that violates a constraint is lowered, one random choice after the other
    by one option, until it keeps it: near a tight bound uniform draws would hardly ever do."""

    learns = False

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
        batch = batch or list(unseen(self._space, self._seen, 1, self._rng, self._constraints))
        self._seen.update(batch)
        return [self._space.decode(indices) for indices in batch]

    def tell(self, values: Sequence[Sequence[float]]) -> None:
        pass  # nothing to learn


class ExhaustiveSearch:
    """Every subnet of the space that keeps the constraints."""

    learns = False

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

    learns = True

    def __init__(
        self,
        space: SearchSpace,
        n_objectives: int,
        population: int,
        seed: int,
        constraints: Constraints,
        reference_points: np.ndarray | None = None,
    ) -> None:
        from . import evolution  # only now: pymoo takes long to import

        self._pymoo: Any = evolution
        self._space = space
        self._population = population
        self._constraints = constraints
        self._problem = evolution.SubnetProblem(space, n_objectives, len(constraints.bounds))
        self._seen: set[Indices] = set()
        rng = np.random.default_rng((seed, 0))  # another stream than the one that pymoo draws from `seed`
        references = [space.encode(subnet) for subnet in reference_subnets(space)]
        others = unseen(space, set(references), population - len(references), rng, constraints)
        repair = evolution.Lower(space, constraints, frozenset(references)) if constraints.bounds else None
        self._algorithm = evolution.begin(
            self._problem, reference_points, population, seed, references + others, self._seen, repair
        )
        self._asked: Any = None

    def ask(self) -> list[Subnet]:
        asked = self._pymoo.ask(self._algorithm)
        batch = [self._pymoo.indices(individual) for individual in asked]
        self._seen.update(batch)
        # in a nearly exhausted neighbourhood, random newcomers fill the generation
        missing = self._population - len(batch)
        newcomers = unseen(self._space, self._seen, missing, self._algorithm.random_state, self._constraints)
        self._seen.update(newcomers)
        self._asked = self._pymoo.joined(asked, newcomers)
        return [self._space.decode(indices) for indices in batch + newcomers]

    def tell(self, values: Sequence[Sequence[float]]) -> None:
        outputs = {"F": np.array(values, dtype=float)}
        if self._constraints.bounds:
            asked = [self._space.decode(self._pymoo.indices(individual)) for individual in self._asked]
            outputs["G"] = np.array([self._constraints.violations(subnet) for subnet in asked])
        self._pymoo.tell(self._algorithm, self._problem, self._asked, outputs)


class RNSGA2Search(NSGA2Search):
    """R-NSGA-II (Deb and Sundar, 2006): NSGA-II that prefers, among equally good subnets, those near its reference points.
    Distances are in units of the range of each objective over all evaluations so far."""


# Name in `search_subnet(algorithm=...)` -> class.
ALGORITHMS: dict[str, type[SearchAlgorithm]] = {
    "exhaustive": ExhaustiveSearch,
    "nsga2": NSGA2Search,
    "r-nsga2": RNSGA2Search,
    "random": RandomSearch,
}
# Those that work in generations.
EVOLUTIONARY = ("nsga2", "r-nsga2")
