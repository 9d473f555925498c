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
"""What a state of a model costs: parameters, multiply-accumulates, or seconds on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ...cost.counts import CostModel
from ...cost.latency import LatencyModel
from ...structure.blocks import Structure
from ...structure.space import activate
from ...supernet.host import HOST_ATTRIBUTE
from ...supernet.space import SearchSpace, Subnet
from .config import StructuredPruningConfig
from .units import State, Units


class Costs:
    """
    Args:
        model: the whole model, nothing of it narrowed.
        units: of `model`.
        config: what is measured, and for latencies of which inputs.
    """

    def __init__(self, model: nn.Module, units: Units, config: StructuredPruningConfig) -> None:
        self._whole = units.space.max.to_dict()
        self._model = CostModel(model, units.space)
        self._measure: Callable[[Mapping[str, int]], float]
        if config.measure == "latency":
            self._measure = _latency_model(model, units, config).predict
        else:
            self._measure = getattr(self._model, config.measure)

    def __call__(self, state: State) -> float:
        """What the ratio is of."""
        return self._measure({**self._whole, **state})

    def parameters(self, state: State) -> int:
        """Parameters of a model that consists of this state alone."""
        return self._model.parameters({**self._whole, **state})

    def macs(self, state: State) -> int:
        """Its multiply-accumulates per token."""
        return self._model.macs({**self._whole, **state})


def _latency_model(model: nn.Module, units: Units, config: StructuredPruningConfig) -> LatencyModel:
    host = _Host(model, units)
    model.__dict__[HOST_ATTRIBUTE] = host
    try:
        return LatencyModel(model, config.latency_inputs, mode=config.latency_mode)
    finally:
        del model.__dict__[HOST_ATTRIBUTE]
        host.set_subnet("max")


class _Host:
    """A model without adapters whose structure can be chosen as that of a super-network; see `ElasticHost`."""

    def __init__(self, model: nn.Module, units: Units) -> None:
        self._model, self._structure = model, Structure(model)
        self.search_space: SearchSpace = units.space
        self.active_subnet: Subnet = units.space.max

    def set_subnet(self, subnet: Any) -> None:
        self.active_subnet = self.search_space.subnet(subnet)
        activate(self._model, self._structure, self.active_subnet)

    sample_subnet = set_subnet

    def restore_subnet(self) -> None:
        """Nothing is sampled."""
