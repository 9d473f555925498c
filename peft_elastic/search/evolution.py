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
"""NSGA-II and R-NSGA-II as pymoo runs them, told of subnets. pymoo takes long to import, so what needs it stands here alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.rnsga2 import RNSGA2
from pymoo.core.duplicate import DuplicateElimination
from pymoo.core.evaluator import Evaluator
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.repair import Repair
from pymoo.core.termination import NoTermination
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.problems.static import StaticProblem

from ..supernet.space import SearchSpace
from .constraints import Constraints
from .proposals import Indices, lowered


class SubnetProblem(Problem):
    """One integer variable per choice, the index of its option (0 is the largest); every objective is minimised, and a
    constraint is kept where its value is not positive.

    It has no `_evaluate`: `search_subnet` asks the algorithm for subnets, evaluates them and tells it the result.
    """

    def __init__(self, space: SearchSpace, n_objectives: int, n_constraints: int = 0) -> None:
        super().__init__(
            n_var=len(space),
            n_obj=n_objectives,
            n_ieq_constr=n_constraints,
            xl=np.zeros(len(space)),
            xu=np.array([len(choice.options) - 1 for choice in space]),
            vtype=int,
        )


class Lower(Repair):
    """Lowers offspring until they keep the constraints; the reference subnets stay as they are."""

    def __init__(self, space: SearchSpace, constraints: Constraints, references: frozenset[Indices]) -> None:
        super().__init__()
        self._space, self._constraints, self._references = space, constraints, references

    def _do(self, problem: Any, X: np.ndarray, random_state: Any = None, **kwargs: Any) -> np.ndarray:
        rows = [tuple(int(index) for index in row) for row in X]
        return np.array(
            [
                row if row in self._references else lowered(self._space, row, random_state, self._constraints)
                for row in rows
            ]
        )


class NeverTwice(DuplicateElimination):
    """Drops individuals that were asked before in any generation; pymoo's own looks at the present one only."""

    def __init__(self, seen: set[Indices]) -> None:
        super().__init__()
        self._seen = seen

    def _do(self, pop: Population, other: Population | None, is_duplicate: np.ndarray) -> np.ndarray:
        known = set(self._seen) if other is None else {indices(individual) for individual in other}
        for i, individual in enumerate(pop):
            key = indices(individual)
            is_duplicate[i] = key in known
            if other is None:
                known.add(key)
        return is_duplicate


def indices(individual: Any) -> Indices:
    """The subnet of an individual."""
    return tuple(int(index) for index in individual.X)


def begin(
    problem: SubnetProblem,
    reference_points: np.ndarray | None,
    population: int,
    seed: int,
    first: Sequence[Indices],
    seen: set[Indices],
    repair: Lower | None,
) -> Any:
    """The algorithm of pymoo, with the operators of LoNAS: R-NSGA-II if there are reference points, else NSGA-II.

    Args:
        first (`Sequence[Indices]`): the first generation.
        seen (`set[Indices]`): what must not be proposed again; the caller extends it.
    """
    settings = {
        "pop_size": population,
        "sampling": np.array(first),
        "crossover": SBX(prob=0.9, eta=10, vtype=float, repair=RoundingRepair()),
        "mutation": PM(prob=1.0, prob_var=0.02, eta=3, vtype=float, repair=RoundingRepair()),
        "eliminate_duplicates": NeverTwice(seen),
        "repair": repair,
    }
    if reference_points is None:
        algorithm = NSGA2(**settings)
    else:
        algorithm = RNSGA2(ref_points=reference_points, normalization="ever", **settings)
    algorithm.setup(problem, seed=seed, termination=NoTermination())
    return algorithm


def ask(algorithm: Any) -> Population:
    """The next generation; empty if crossover and mutation found nothing new."""
    asked = algorithm.ask()
    if asked is None:  # pymoo would stop here
        algorithm.termination.force_termination = False
        asked = Population.empty()
    return asked


def joined(asked: Population, newcomers: Sequence[Indices]) -> Population:
    """A generation with further subnets."""
    return Population.merge(asked, Population.new(X=np.array(newcomers))) if newcomers else asked


def tell(algorithm: Any, problem: SubnetProblem, asked: Population, outputs: Mapping[str, np.ndarray]) -> None:
    """Tell the objectives ("F"), and the violations of constraints ("G") if there are some, of a generation."""
    Evaluator().eval(StaticProblem(problem, **outputs), asked)
    # R-NSGA-II divides by the range of each objective, which may be zero
    with np.errstate(divide="ignore", invalid="ignore"):
        algorithm.tell(infills=asked)
