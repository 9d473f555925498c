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
"""Subnets as the indices of their options, and how new ones are drawn."""

from __future__ import annotations

import numpy as np

from ..supernet.space import SearchSpace, Subnet
from .constraints import Constraints


Indices = tuple[int, ...]  # of each choice's value among its options; 0 is the largest


def reference_subnets(space: SearchSpace) -> dict[Subnet, str]:
    """The max, min and heuristic subnet with their names, without repetition, in the order of their evaluation."""
    named: dict[Subnet, str] = {}
    for name in ("max", "min", "heuristic"):
        named.setdefault(space.subnet(name), name)
    return named


def lowered(space: SearchSpace, indices: Indices, rng: np.random.Generator, constraints: Constraints) -> Indices:
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


def unseen(
    space: SearchSpace, seen: set[Indices], number: int, rng: np.random.Generator, constraints: Constraints
) -> list[Indices]:
    """Up to `number` different subnets outside `seen` that keep the constraints, drawn at random; fewer only if there are
    no more."""
    found: dict[Indices, None] = {}
    number = min(number, space.size - len(seen))
    for _ in range(100 * number):
        if len(found) == number:
            return list(found)
        indices = lowered(space, space.encode(space.sample(rng)), rng, constraints)
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
