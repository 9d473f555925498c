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
"""Structured pruning: `prune_structured(model, config, calibration)` removes blocks, channels and heads, and returns a plan.

`units.py` says what can be removed, `metric.py` what that harms, `cost.py` what it saves; `greedy.py` chooses, and `plan.py` is
the result."""

from .config import (
    STRUCTURED_METHODS,
    BlockPrunerConfig,
    MultiPrunerConfig,
    StructuredPruningConfig,
    TwoStagePrunerConfig,
    WidthPrunerConfig,
)
from .folder import extract_folder, plan_folder
from .intel import from_pruning_config, to_pruning_config
from .plan import PruningPlan
from .prune import prune_structured


__all__ = [
    "STRUCTURED_METHODS",
    "BlockPrunerConfig",
    "MultiPrunerConfig",
    "PruningPlan",
    "StructuredPruningConfig",
    "TwoStagePrunerConfig",
    "WidthPrunerConfig",
    "extract_folder",
    "from_pruning_config",
    "plan_folder",
    "prune_structured",
    "to_pruning_config",
]
