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
"""What a search measures of a subnet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch

from ..cost.counts import ALWAYS_RECORDED, COSTS, CostModel
from ..cost.latency import LatencyModel
from ..supernet.context import eval_mode, seeded
from ..supernet.host import ElasticHost
from ..supernet.space import Subnet
from .objectives import Evaluate, Objective, read_values
from .result import Evaluation


class Meter:
    """Measures subnets of one model."""

    def __init__(
        self,
        model: torch.nn.Module,
        host: ElasticHost,
        evaluate: Evaluate,
        held_out: Evaluate | None,
        targets: Sequence[Objective],
        seed: int,
        latency: LatencyModel | None,
        bounded: Iterable[str],
    ) -> None:
        self.model, self.host, self.seed = model, host, seed
        self.evaluate, self.held_out, self.targets = evaluate, held_out, targets
        self.cost_model, self.latency = CostModel(model, host.search_space), latency
        asked = {target.name for target in targets if target.function is None} | set(bounded)
        self.recorded = [name for name in COSTS if name in {*asked, *ALWAYS_RECORDED}]
        self.costs = lru_cache(maxsize=4096)(self._compute_costs)

    def _compute_costs(self, subnet: Subnet) -> dict[str, float]:
        """All costs that are known without an evaluation, by name."""
        costs: dict[str, float] = dict(self.cost_model.costs(subnet))
        if self.latency is not None:
            costs["latency"] = self.latency.predict(subnet)
        return costs

    def metrics(self, evaluation: Evaluation) -> dict[str, float]:
        """All objectives of a subnet, what else `evaluate` returns, and the built-in costs."""
        name, where = self.targets[0].name, _where(evaluation)
        metrics = self._call(self.evaluate, "`evaluate`", name, evaluation)
        missing = [target.name for target in self.targets if target.measured and target.name not in metrics]
        if missing:
            raise ValueError(f"`evaluate` returned {metrics} without {missing}, which `objectives` names ({where}).")
        functions = {target.name: target.function for target in self.targets if target.function is not None}
        costs = self.costs(evaluation.subnet)
        computed: dict[str, float] = {name: costs[name] for name in self.recorded}
        twice = [name for name in metrics if name in functions or name in computed]
        if twice:
            raise ValueError(
                f"`evaluate` returned {twice}, which are computed otherwise; choose other names ({where})."
            )
        metrics.update(computed)
        for name, function in functions.items():
            values = self._call(function, f"objective {name!r}", name, evaluation)
            if list(values) != [name]:
                raise ValueError(f"objective {name!r} must return a number, not {values} ({where}).")
            metrics.update(values)
        return metrics

    def held_out_values(self, evaluation: Evaluation) -> dict[str, float]:
        """What `held_out` returns for a subnet."""
        assert self.held_out is not None
        return self._call(self.held_out, "`held_out`", self.targets[0].name, evaluation)

    def _call(self, function: Callable[[Any], Any], what: str, name: str, evaluation: Evaluation) -> dict[str, float]:
        self.host.set_subnet(evaluation.subnet)
        with eval_mode(self.model), seeded(self.seed), torch.no_grad():
            value = function(self.model)
        if self.host.active_subnet != evaluation.subnet:
            raise ValueError(f"{what} changed the active subnet of the model ({_where(evaluation)}).")
        return read_values(value, name, what, _where(evaluation))


def _where(evaluation: Evaluation) -> str:
    return f"evaluation {evaluation.index}, {evaluation.source}, {evaluation.subnet!r}"
