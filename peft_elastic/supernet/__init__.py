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
"""Search spaces, subnets, samplers, Trainer callbacks and trainers: everything about a super-network that does not depend on how
its layers are built."""

from typing import TYPE_CHECKING

from ..common.lazy import lazy_package
from .callback import SubnetSamplingCallback
from .host import ElasticHost, get_elastic_host
from .samplers import BalancedSampler, SandwichSampler, StepSampler, SubnetSampler, UniformSampler
from .space import Choice, LayerShape, Run, SearchSpace, Subnet
from .stages import Stage


if TYPE_CHECKING:
    from .trainer import ElasticTrainer, ElasticTrainerMixin


__all__ = [
    "BalancedSampler",
    "Choice",
    "ElasticHost",
    "ElasticTrainer",
    "ElasticTrainerMixin",
    "LayerShape",
    "Run",
    "SandwichSampler",
    "SearchSpace",
    "Stage",
    "StepSampler",
    "Subnet",
    "SubnetSampler",
    "SubnetSamplingCallback",
    "UniformSampler",
    "get_elastic_host",
]

# transformers' Trainer imports datasets, and that pandas
__getattr__, __dir__ = lazy_package(__name__, {".trainer": ("ElasticTrainer", "ElasticTrainerMixin")}, ("trainer",))
