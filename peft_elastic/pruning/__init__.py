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

"""Pruning of base weights: `prune(model, config, calibration)` with one config dataclass per method sets them to zero. Whole
blocks, channels and heads are removed by `structured`."""

from ..common.lazy import lazy_package
from .config import PruningConfig
from .folder import prune_folder
from .magnitude import MagnitudeConfig
from .methods import PRUNING_METHODS
from .prune import prune
from .report import PruningReport, measure_sparsity
from .sparsegpt import SparseGPTConfig
from .wanda import WandaConfig


__all__ = [
    "PRUNING_METHODS",
    "MagnitudeConfig",
    "PruningConfig",
    "PruningReport",
    "SparseGPTConfig",
    "WandaConfig",
    "measure_sparsity",
    "prune",
    "prune_folder",
]

__getattr__, __dir__ = lazy_package(
    __name__,
    modules=("structured",),
    moved={"layers": "peft_elastic.structure.selection"},
)
