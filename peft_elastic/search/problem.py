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
"""The search as pymoo sees it."""

from __future__ import annotations

import numpy as np
from pymoo.core.problem import Problem

from ..supernet.space import SearchSpace


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
