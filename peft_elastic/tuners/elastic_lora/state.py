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
"""What an elastic tuner knows besides what peft's own tuner knows, and what it finds in the layers."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Optional

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn

from ...structure.blocks import Structure
from ...supernet.groups import plain_path
from ...supernet.space import SearchSpace, Subnet
from .config import ElasticLoraConfig
from .layer import is_elastic


# What an injection is going to adapt: path -> (module, its maximal rank).
Plan = dict[str, tuple[nn.Module, int]]


class ElasticAdapter(NamedTuple):
    """One adapter: its layers by their path in the base model, and what can be chosen for them."""

    layers: dict[str, LoraLayer]
    space: SearchSpace
    # of the base, if subnets differ in its width or depth; one object for all adapters, as it knows what is active
    structure: Optional[Structure]


@dataclass(eq=False)  # by identity: several stand in one weak set
class ElasticState:
    """The state of an `ElasticLoraModel`, all of it: the class adds no attribute of its own to those of peft's `LoraModel`."""

    # The adapters that have elastic layers, by name.
    adapters: dict[str, ElasticAdapter] = field(default_factory=dict)

    # By adapter, the values of the choices of width and depth in its active subnet.
    structural_values: dict[str, dict[str, int]] = field(default_factory=dict)
    # Which adapters were active, if any, when the base was narrowed last.
    followed: Optional[list[str]] = None
    # Keeps the base narrowed as the active adapter wants it, whoever activates that; a hook on the base model.
    follower: Any = None
    # Tells that the weights of an adapter fit a sorted base only; a hook on the base model, until that is sorted.
    order_guard: Any = None
    # The noted orders of the base when the first adapter came.
    own_orders: dict[str, torch.Tensor] = field(default_factory=dict)

    # During the dry run of an injection, what has been found so far.
    plan: Optional[Plan] = None
    # The adapter that `add_weighted_adapter` is about to create.
    weighted_adapter: Optional[str] = None
    # Whether a PeftModel wraps the tuner; transformers' `model.add_adapter` and `load_adapter` do without one.
    in_peft_model: bool = False
    # Whether the base model got its tag from the tuner.
    tagged: bool = False

    # Whether a subnet other than the chosen one is active; only ever between `sample_subnet` and `restore_subnet`.
    sampled: bool = False
    # By adapter, what was active when evaluation mode interrupted a training step, and is again in training mode.
    suspended: dict[str, Subnet] = field(default_factory=dict)
    # Some adapter weights when the model was last put into training mode, to notice one-subnet training.
    trained_version: Optional[list[float]] = None
    warned_about_sampling: bool = False

    def handed_over(self, names: Container[str]) -> ElasticState:
        """Make the state of the next tuner on the same base: what it says of the base, and of these adapters."""
        return ElasticState(
            adapters={name: adapter for name, adapter in self.adapters.items() if name in names},
            structural_values={name: values for name, values in self.structural_values.items() if name in names},
            followed=self.followed,
            follower=self.follower,
            order_guard=self.order_guard,
            own_orders=self.own_orders,
            tagged=self.tagged,
        )

    def adapter(self, adapter_name: str) -> ElasticAdapter:
        """Get an adapter, which must have layers.

        Raises:
            ValueError: if it has none.
        """
        if adapter_name not in self.adapters:
            raise ValueError(f"Adapter {adapter_name!r} has no elastic layers, so it has no search space.")
        return self.adapters[adapter_name]

    def layers(self, adapter_name: str) -> dict[str, LoraLayer]:
        """Get the layers of an adapter, by their path in the base model, all still elastic.

        Raises:
            ValueError: if it has none, or somebody has put fixed matrices into one of them.
        """
        layers = self.adapter(adapter_name).layers
        replaced = [name for name, layer in layers.items() if not is_elastic(layer, adapter_name)]
        if replaced:
            raise ValueError(
                f"The weights of adapter {adapter_name!r} in {replaced[0]!r} have been replaced by a fixed-rank layer, "
                "for example by `prepare_model_for_compiled_hotswap`, which elastic adapters do not support."
            )
        return layers


def elastic_configs(configs: Mapping[str, Any]) -> dict[str, ElasticLoraConfig]:
    """Pick the configurations that are elastic: transformers lets adapters of other types stand beside."""
    return {name: config for name, config in configs.items() if isinstance(config, ElasticLoraConfig)}


def active_adapters(model: nn.Module, configs: Mapping[str, Any]) -> list[str]:
    """Read the active elastic adapters from the layers: transformers' `model.set_adapter` does not tell the tuner."""
    active = next((m.active_adapters for m in model.modules() if isinstance(m, LoraLayer)), [])
    return [name for name in active if isinstance(configs.get(name), ElasticLoraConfig)]


def find_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """Find everything in a base model that carries the adapter: (path as it is without adapters and wrappers, layer)."""
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter_name not in module.lora_A and adapter_name not in module.lora_embedding_A:
            continue
        name = re.sub(r"(^|\.)base_layer(?=\.|$)", "", plain_path(path)).lstrip(".")
        if isinstance(module, ParamWrapper):
            name = f"{name}.{module.parameter_name}"
        yield name, module
