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

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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


METRICS, HELD_OUT = "metrics", "held_out"  # what of a subnet is measured
Values = dict[str, float]


@dataclass(frozen=True)
class Probe:
    """What has to be run on a model to measure a subnet of it, on whichever copy of that model.

    Args:
        evaluate, held_out (`Callable`): as given.
        targets (`tuple[Objective, ...]`): the objectives, the metric first.
        recorded (`tuple[str, ...]`): the costs that are computed otherwise, whose names are taken.
        seed (`int`): of the global generators, before each call.
        prepare (`Callable`, *optional*): what is done to the model before each call.
    """

    evaluate: Evaluate
    held_out: Evaluate | None
    targets: tuple[Objective, ...]
    recorded: tuple[str, ...]
    seed: int
    prepare: Callable[[Any], Any] | None = None

    @property
    def preparation(self) -> str | None:
        """What tells `prepare` from others: its name, and its attribute `fingerprint` if it has one."""
        if self.prepare is None:
            return None
        return fingerprint_of(self.prepare)

    @property
    def functions(self) -> dict[str, Callable[[Any], Any]]:
        """Those of the user, by the name that messages give them."""
        functions = {"`evaluate`": self.evaluate} | ({} if self.held_out is None else {"`held_out`": self.held_out})
        functions |= {} if self.prepare is None else {"`prepare`": self.prepare}
        named = {_objective(target.name): target.function for target in self.targets if target.function is not None}
        return functions | named

    def with_functions(self, functions: Mapping[str, Any]) -> Probe:
        """The same with other functions under these names."""
        targets = tuple(replace(target, function=functions.get(_objective(target.name))) for target in self.targets)
        held_out, prepare = functions.get("`held_out`"), functions.get("`prepare`")
        return replace(self, evaluate=functions["`evaluate`"], held_out=held_out, targets=targets, prepare=prepare)

    def read(
        self, what: str, model: torch.nn.Module, host: ElasticHost, evaluation: Evaluation
    ) -> tuple[Values, Values]:
        """What `evaluate` (or `held_out`) returns for a subnet, and the values of the objectives that are functions.

        Raises:
            ValueError: if a function does not return numbers under the expected names, or changes the active subnet.
        """
        name, where = self.targets[0].name, _where(evaluation)
        if what == HELD_OUT:
            assert self.held_out is not None
            return self._call(self.held_out, "`held_out`", name, model, host, evaluation), {}
        measured = self._call(self.evaluate, "`evaluate`", name, model, host, evaluation)
        missing = [target.name for target in self.targets if target.measured and target.name not in measured]
        if missing:
            raise ValueError(f"`evaluate` returned {measured} without {missing}, which `objectives` names ({where}).")
        functions = {target.name: target.function for target in self.targets if target.function is not None}
        twice = [name for name in measured if name in functions or name in self.recorded]
        if twice:
            raise ValueError(
                f"`evaluate` returned {twice}, which are computed otherwise; choose other names ({where})."
            )
        computed: Values = {}
        for name, function in functions.items():
            values = self._call(function, _objective(name), name, model, host, evaluation)
            if list(values) != [name]:
                raise ValueError(f"{_objective(name)} must return a number, not {values} ({where}).")
            computed |= values
        return measured, computed

    def _call(
        self,
        function: Callable[[Any], Any],
        what: str,
        name: str,
        model: torch.nn.Module,
        host: ElasticHost,
        evaluation: Evaluation,
    ) -> Values:
        host.set_subnet(evaluation.subnet)
        with eval_mode(model), seeded(self.seed), torch.no_grad():
            if self.prepare is not None:
                self.prepare(model)
                if host.active_subnet != evaluation.subnet:
                    raise ValueError(f"`prepare` changed the active subnet of the model ({_where(evaluation)}).")
        with eval_mode(model), seeded(self.seed), torch.no_grad():
            value = function(model)
        if host.active_subnet != evaluation.subnet:
            raise ValueError(f"{what} changed the active subnet of the model ({_where(evaluation)}).")
        return read_values(value, name, what, _where(evaluation))


class Meter:
    """Knows all that a search records of the subnets of one model, and measures them one after the other.

    Attributes:
        probe (`Probe`): the part that needs a model to run.
        at_once (`int`): how many subnets it is worth to ask for together.
    """

    at_once = 1

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
        sequence_length: int | None = None,
        prepare: Callable[[Any], Any] | None = None,
    ) -> None:
        self.model, self.host = model, host
        self.cost_model, self.latency = CostModel(model, host.search_space, sequence_length), latency
        asked = {target.name for target in targets if target.function is None} | set(bounded)
        self.recorded = [name for name in COSTS if name in {*asked, *ALWAYS_RECORDED}]
        self.probe = Probe(evaluate, held_out, tuple(targets), tuple(self.recorded), seed, prepare)
        self.costs = lru_cache(maxsize=4096)(self._compute_costs)

    def _compute_costs(self, subnet: Subnet) -> dict[str, float]:
        """All costs that are known without an evaluation, by name."""
        costs: dict[str, float] = dict(self.cost_model.costs(subnet))
        if self.latency is not None:
            costs["latency"] = self.latency.predict(subnet)
        return costs

    def read(self, what: str, evaluation: Evaluation) -> tuple[Values, Values]:
        """What `Probe.read` gives on the model of the search itself."""
        return self.probe.read(what, self.model, self.host, evaluation)

    def measure(
        self, what: str, evaluations: Sequence[Evaluation]
    ) -> Generator[tuple[Evaluation, Values], None, None]:
        """Each of the evaluations with what was measured, as soon as it is known; other crews give them in another order."""
        for evaluation in evaluations:
            yield evaluation, self.recorded_values(what, evaluation, self.read(what, evaluation))

    def recorded_values(self, what: str, evaluation: Evaluation, read: tuple[Values, Values]) -> Values:
        """What goes on file: what was read from a model, and for metrics the costs."""
        measured, computed = read
        if what == HELD_OUT:
            return measured
        costs = self.costs(evaluation.subnet)
        return measured | {name: costs[name] for name in self.recorded} | computed


def fingerprint_of(prepare: Any) -> str:
    """What tells a preparation from others: its name, and its attribute `fingerprint` if it has one."""
    named = prepare if hasattr(prepare, "__qualname__") else type(prepare)
    return f"{named.__qualname__} {getattr(prepare, 'fingerprint', '')}".strip()


def _objective(name: str) -> str:
    return f"objective {name!r}"


def _where(evaluation: Evaluation) -> str:
    return f"evaluation {evaluation.index}, {evaluation.source}, {evaluation.subnet!r}"
