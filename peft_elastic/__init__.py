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
"""peft-elastic: elastic LoRA adapters for Hugging Face peft. Importing this package registers its tuner types."""

from typing import TYPE_CHECKING

from . import _process  # before all that imports torch
from .common.lazy import lazy_package
from .version import __version__


# Three lists of the same names: for type checkers and editors, for the reader, and for `__getattr__`; a test compares them.
if TYPE_CHECKING:
    from .cost.bounds import Bounds, bounds_by_importance
    from .cost.latency import LatencyModel
    from .deploy import (
        GenerationReport,
        SwapReport,
        densify_linears,
        explain_generation,
        optimize_generation,
        restore_generation,
        sparsify_linears,
    )
    from .elastic_model import ElasticConfig, ElasticModel, get_elastic_model
    from .layers.quantized_linear import QuantizedLinear
    from .layers.sparse_linear import SparseLinear
    from .pruning import MagnitudeConfig, PruningReport, SparseGPTConfig, WandaConfig
    from .pruning.folder import prune_folder
    from .pruning.prune import prune
    from .pruning.structured import (
        BlockPrunerConfig,
        MultiPrunerConfig,
        PruningPlan,
        TwoStagePrunerConfig,
        WidthPrunerConfig,
        extract_folder,
        plan_folder,
        prune_structured,
    )
    from .quantization import GPTQConfig, QuantizationReport, RTNConfig, load_gptq, save_gptq
    from .quantization.folder import quantize_folder
    from .quantization.quantize import quantize
    from .search import SearchResult, search_subnet
    from .structure import importance_of_folder, sort_by_importance, sort_folder
    from .structure.movement import MovementCallback
    from .structure.recalibration import BatchNormRecalibration, recalibrate_batch_norm
    from .structure.tracing.description import load_extracted, save_extracted
    from .supernet import (
        BalancedSampler,
        Choice,
        ElasticTrainer,
        ElasticTrainerMixin,
        SandwichSampler,
        SearchSpace,
        Stage,
        Subnet,
        SubnetSamplingCallback,
        UniformSampler,
    )
    from .tuners import (
        ElasticLoraConfig,
        ElasticLoraModel,
        RequantizationReport,
        SparseQALoraConfig,
        SparseQALoraModel,
        merge_and_requantize,
    )
    from .tuners.folder import merge_folder


__all__ = [
    "BalancedSampler",
    "BatchNormRecalibration",
    "BlockPrunerConfig",
    "Bounds",
    "Choice",
    "ElasticConfig",
    "ElasticLoraConfig",
    "ElasticLoraModel",
    "ElasticModel",
    "ElasticTrainer",
    "ElasticTrainerMixin",
    "GPTQConfig",
    "GenerationReport",
    "LatencyModel",
    "MagnitudeConfig",
    "MovementCallback",
    "MultiPrunerConfig",
    "PruningPlan",
    "PruningReport",
    "QuantizationReport",
    "QuantizedLinear",
    "RTNConfig",
    "RequantizationReport",
    "SandwichSampler",
    "SearchResult",
    "SearchSpace",
    "SparseGPTConfig",
    "SparseLinear",
    "SparseQALoraConfig",
    "SparseQALoraModel",
    "Stage",
    "Subnet",
    "SubnetSamplingCallback",
    "SwapReport",
    "TwoStagePrunerConfig",
    "UniformSampler",
    "WandaConfig",
    "WidthPrunerConfig",
    "__version__",
    "bounds_by_importance",
    "densify_linears",
    "explain_generation",
    "extract_folder",
    "get_elastic_model",
    "importance_of_folder",
    "load_extracted",
    "load_gptq",
    "merge_and_requantize",
    "merge_folder",
    "optimize_generation",
    "plan_folder",
    "prune",
    "prune_folder",
    "prune_structured",
    "quantize",
    "quantize_folder",
    "recalibrate_batch_norm",
    "restore_generation",
    "save_extracted",
    "save_gptq",
    "search_subnet",
    "sort_by_importance",
    "sort_folder",
    "sparsify_linears",
]

__getattr__, __dir__ = lazy_package(
    __name__,
    {
        ".cost.bounds": ("Bounds", "bounds_by_importance"),
        ".cost.latency": ("LatencyModel",),
        ".deploy": (
            "GenerationReport",
            "SwapReport",
            "densify_linears",
            "explain_generation",
            "optimize_generation",
            "restore_generation",
            "sparsify_linears",
        ),
        ".elastic_model": ("ElasticConfig", "ElasticModel", "get_elastic_model"),
        ".layers.quantized_linear": ("QuantizedLinear",),
        ".layers.sparse_linear": ("SparseLinear",),
        ".pruning": ("MagnitudeConfig", "PruningReport", "SparseGPTConfig", "WandaConfig"),
        ".pruning.folder": ("prune_folder",),
        ".pruning.prune": ("prune",),
        ".pruning.structured": (
            "BlockPrunerConfig",
            "MultiPrunerConfig",
            "PruningPlan",
            "TwoStagePrunerConfig",
            "WidthPrunerConfig",
            "extract_folder",
            "plan_folder",
            "prune_structured",
        ),
        ".quantization": ("GPTQConfig", "QuantizationReport", "RTNConfig", "load_gptq", "save_gptq"),
        ".quantization.folder": ("quantize_folder",),
        ".quantization.quantize": ("quantize",),
        ".search": ("SearchResult", "search_subnet"),
        ".structure": ("importance_of_folder", "sort_by_importance", "sort_folder"),
        ".structure.movement": ("MovementCallback",),
        ".structure.recalibration": ("BatchNormRecalibration", "recalibrate_batch_norm"),
        ".structure.tracing.description": ("load_extracted", "save_extracted"),
        ".supernet": (
            "BalancedSampler",
            "Choice",
            "ElasticTrainer",
            "ElasticTrainerMixin",
            "SandwichSampler",
            "SearchSpace",
            "Stage",
            "Subnet",
            "SubnetSamplingCallback",
            "UniformSampler",
        ),
        ".tuners": (
            "ElasticLoraConfig",
            "ElasticLoraModel",
            "RequantizationReport",
            "SparseQALoraConfig",
            "SparseQALoraModel",
            "merge_and_requantize",
        ),
        ".tuners.folder": ("merge_folder",),
    },
    modules=(
        "common",
        "cost",
        "deploy",
        "layers",
        "pruning",
        "quantization",
        "search",
        "structure",
        "supernet",
        "tuners",
        "utils",
    ),
    moved={
        "_native": "peft_elastic.layers.extension",
        "addresses": "peft_elastic.layers.addresses",
        "assets": "peft_elastic.common.assets",
        "documents": "peft_elastic.common.documents",
        "files": "peft_elastic.common.files",
        "journal": "peft_elastic.common.journal",
        "parameters": "peft_elastic.common.parameters",
    },
)


def register() -> None:
    """Make peft know the tuner types, and transformers the checkpoints that this package writes. Importing this package does so,
    but in the process of the command line, where `peft-elastic --version` should not have to import torch for it."""
    from . import tuners  # noqa: F401
    from .deploy import checkpoint  # noqa: F401
    from .structure import rebuild  # noqa: F401


if not _process.is_program():
    register()
