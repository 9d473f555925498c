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
"""Affine group quantisation of base weights: `quantize(model, config, calibration)`, and the GPTQ format on disk."""

from ..common.lazy import lazy_package
from ..layers.grid import Grid, fit_grid
from ..layers.quantized_linear import QuantizedLinear
from .checkpoint import save_gptq
from .config import QuantizationConfig
from .folder import quantize_folder
from .gptq import GPTQConfig
from .loading import load_gptq
from .methods import QUANTIZATION_METHODS
from .quantize import quantize
from .report import QuantizationReport
from .rtn import RTNConfig


__all__ = [
    "QUANTIZATION_METHODS",
    "GPTQConfig",
    "Grid",
    "QuantizationConfig",
    "QuantizationReport",
    "QuantizedLinear",
    "RTNConfig",
    "fit_grid",
    "load_gptq",
    "quantize",
    "quantize_folder",
    "save_gptq",
]

__getattr__, __dir__ = lazy_package(
    __name__,
    moved={
        "gptq_format": "peft_elastic.layers.gptq_format",
        "grid": "peft_elastic.layers.grid",
        "layer": "peft_elastic.layers.quantized_linear",
    },
)
