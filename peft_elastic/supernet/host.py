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
"""What the rest of the package needs to know of an elastic model, whatever tuner made it elastic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import nn

from .space import SearchSpace, Subnet


# Where an elastic tuner leaves a reference to itself on the base model. transformers' `model.add_adapter` throws the
# tuner object away; through this attribute its search space can still be reached.
HOST_ATTRIBUTE = "_peft_elastic_host"


@runtime_checkable
class ElasticHost(Protocol):
    """A model whose active subnet can be chosen: a `PeftModel` with an elastic adapter, its tuner, or an `ElasticModel`.

    One that stages of a training can sort (`Stage(sort=True)`) has four methods more: `sort_by_importance(calibration, optimizer=,
    averaged=, progress=)`; `check_sort(calibration, optimizer=, averaged=)`, a ValueError where that would be refused; `noted_orders()`,
    which unit of the original each unit is now, by the name of the order; and `resume_orders(orders, averaged=)`, called when the weights
    of a checkpoint in these orders have been loaded.
    """

    @property
    def search_space(self) -> SearchSpace:
        """The choices of the model, or of its active adapter."""

    @property
    def active_subnet(self) -> Subnet:
        """What the layers compute now."""

    def set_subnet(self, subnet: Subnet | Mapping[str, int] | str) -> None:
        """Choose the subnet to use from now on, also in training mode; it is saved with the adapter or the model."""

    def sample_subnet(self, subnet: Subnet) -> None:
        """Activate a subnet for training; `model.eval()` brings back the chosen one."""

    def restore_subnet(self) -> None:
        """Leave the sampled subnet, back to the chosen one."""


def get_elastic_host(model: Any) -> ElasticHost:
    """The object that controls the subnet of `model`.

    Args:
        model: what `get_elastic_model` returned, a `PeftModel`, a tuner, or a transformers model that got its elastic adapter from
            `model.add_adapter` or `model.load_adapter`; wrapped by DDP, FSDP or `torch.compile` or not.

    Raises:
        ValueError: if the model is not elastic.
    """
    inner = model
    # DDP keeps its model under `module` and, unlike the other wrappers, does not pass on other attributes
    while (host := getattr(inner, HOST_ATTRIBUTE, None)) is None and isinstance(inner, nn.Module):
        inner = getattr(inner, "module", None)
    if host is None:
        raise ValueError(
            f"`model` ({type(model).__name__}) has no elastic adapter and is not elastic itself. Add an adapter with "
            "`get_peft_model(model, ElasticLoraConfig(...))`, or call `get_elastic_model(model, ElasticConfig(...))`."
        )
    return host
