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
"""Upper bounds on costs that are known before a subnet is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ..common.checks import is_finite, wrong
from ..cost.counts import COSTS, parse_bound
from ..supernet.space import SearchSpace, Subnet


# Room for rounding when metrics and costs are compared: 0.81 - 0.80 is a little more than 0.01 in binary.
TOLERANCE = 1e-9

# Keyword of `search_subnet` -> cost that it bounds.
BOUND_KEYWORDS = {f"max_{name}": name for name in COSTS} | {"max_params": "parameters"}


class Constraints:
    """Upper bounds on the costs of a subnet; without bounds everything is allowed.

    Args:
        bounds (`Mapping[str, float]`): largest value by name of the cost.
        costs (`Callable`): the costs of a subnet by name.
    """

    def __init__(self, bounds: Mapping[str, float], costs: Callable[[Subnet], Mapping[str, float]]) -> None:
        self.bounds = dict(bounds)
        self._costs = costs

    def violations(self, subnet: Subnet) -> list[float]:
        """By how much each bound is exceeded, as a share of it; not positive where it is kept."""
        if not self.bounds:
            return []
        costs = self._costs(subnet)
        excesses = [excess(costs[name], bound) for name, bound in self.bounds.items()]
        return [min(value, 0.0) if value <= TOLERANCE else value for value in excesses]

    def allows(self, subnet: Subnet) -> bool:
        """Whether the subnet keeps all bounds."""
        return all(value <= 0 for value in self.violations(subnet))


def collect_bounds(constraints: Any, keywords: Mapping[str, Any], with_latency: bool) -> dict[str, Any]:
    """The bounds of `search_subnet`, as the user wrote them, by name of the cost.

    Raises:
        ValueError: if an argument is of the wrong type, names an unknown cost, or bounds the same cost as another.
    """
    if constraints is not None and not isinstance(constraints, Mapping):
        raise wrong("constraints", "a dict such as {'macs': '75%'}", constraints)
    allowed = sorted(set(BOUND_KEYWORDS.values()))
    bounds: dict[str, Any] = {}
    for name, bound in (constraints or {}).items():
        if name not in allowed:
            raise wrong("constraints", f"bounds on some of {allowed}", name)
        bounds[name] = bound
    for keyword, bound in keywords.items():
        name = BOUND_KEYWORDS[keyword]
        if bound is not None and name in bounds:
            raise ValueError(f"`{keyword}` bounds {name!r}, which another argument bounds already.")
        if bound is not None:
            bounds[name] = bound
    if "latency" in bounds and not with_latency:
        raise ValueError(f"a bound on the latency (here {bounds['latency']!r}) {NEEDS_LATENCY}")
    for name, bound in bounds.items():
        if not is_bound(parse_bound(bound, 1.0)):
            raise ValueError(
                f"the bound on {name!r} must be a positive number or a share of the max subnet's such as '60%', got {bound!r}."
            )
    return dict(sorted(bounds.items()))


def resolve_bounds(
    bounds: Mapping[str, Any], space: SearchSpace, costs: Callable[[Subnet], Mapping[str, float]]
) -> dict[str, float]:
    """The bounds as numbers, in the units of the costs.

    Raises:
        ValueError: if the min subnet, the cheapest of the space, exceeds one.
    """
    largest, smallest = costs(space.max), costs(space.min)
    resolved = {name: float(parse_bound(bound, largest[name])) for name, bound in bounds.items()}
    for name, bound in resolved.items():
        if excess(smallest[name], bound) > TOLERANCE:
            raise ValueError(
                f"no subnet keeps the bound {bounds[name]!r} on {name!r}: the smallest reachable value is that of the min subnet, "
                f"{smallest[name]:,.6g} ({smallest[name] / largest[name]:.1%} of the max subnet's {largest[name]:,.6g})."
            )
    return resolved


# The end of a message about the latency, wherever it is asked for.
NEEDS_LATENCY = (
    "needs a measured latency model: pass `latency=LatencyModel(model, inputs)` with a batch of the inputs that the model "
    "will serve (`from peft_elastic import LatencyModel`)."
)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float, np.number)) and is_finite(value)


def is_bound(value: Any) -> bool:
    """Whether it is a number that can bound a cost."""
    return is_number(value) and value > 0


def excess(value: float, limit: float) -> float:
    """By how much a value exceeds a limit, as a share of it."""
    return (value - limit) / limit
