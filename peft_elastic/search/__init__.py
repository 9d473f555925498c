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
"""Subnet search: objectives, cost model, ready-made evaluators, pymoo algorithms, results and plots. Knows search
spaces and elastic models (`supernet`), but no tuner."""

from ..common.lazy import lazy_package
from ..cost.counts import CostModel
from ..cost.latency import LatencyModel, LatencyReport
from .algorithms import ALGORITHMS
from .effects import ChoiceEffects, estimate_effects
from .evaluators import (
    Evaluator,
    LMEvalEvaluator,
    LossEvaluator,
    MetricEvaluator,
    MultipleChoiceEvaluator,
    PerplexityEvaluator,
)
from .ray_executor import RayExecutor
from .result import Evaluation, SearchResult, hypervolume_of
from .search import search_subnet


__all__ = [
    "ALGORITHMS",
    "ChoiceEffects",
    "CostModel",
    "Evaluation",
    "Evaluator",
    "LMEvalEvaluator",
    "LatencyModel",
    "LatencyReport",
    "LossEvaluator",
    "MetricEvaluator",
    "MultipleChoiceEvaluator",
    "PerplexityEvaluator",
    "RayExecutor",
    "SearchResult",
    "estimate_effects",
    "hypervolume_of",
    "search_subnet",
]

__getattr__, __dir__ = lazy_package(
    __name__,
    moved={
        "context": "peft_elastic.supernet.context",
        "cost": "peft_elastic.cost.counts",
        "latency": "peft_elastic.cost.latency",
        "merged": "peft_elastic.cost.merged",
    },
)
