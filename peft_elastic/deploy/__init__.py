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
"""Deployment: compressed layers for a sparse CPU kernel, and their form on disk. Knows no tuner."""

from ..common.lazy import lazy_package
from ..layers.sparse_linear import SparseLinear
from .generation import GenerationReport, explain_generation, optimize_generation, restore_generation
from .sparsify import SwapDecision, SwapReport, densify_linears, sparsify_linears


__all__ = [
    "GenerationReport",
    "SparseLinear",
    "SwapDecision",
    "SwapReport",
    "densify_linears",
    "explain_generation",
    "optimize_generation",
    "restore_generation",
    "sparsify_linears",
]

__getattr__, __dir__ = lazy_package(
    __name__,
    moved={
        "format": "peft_elastic.layers.values",
        "ops": "peft_elastic.layers.ops",
        "sparse_linear": "peft_elastic.layers.sparse_linear",
        "timing": "peft_elastic.cost.timing",
    },
)
