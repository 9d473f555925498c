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

from __future__ import annotations

import time
import warnings
from dataclasses import asdict
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..layers.backends import backend_of
from ..layers.backends.float import FLOAT
from ..layers.grid import check_group_size
from ..layers.quantized_linear import QuantizedLinear
from ..structure.modules import routers, weight_matrix
from ..structure.selection import check_changeable, select_layers, warn_of_fused_experts
from .config import QuantizationConfig
from .methods import QUANTIZATION_METHODS
from .report import QuantizationReport
from .saving import check_unquantized


def quantize(
    model: nn.Module, config: QuantizationConfig, calibration: Any = None, *, progress: bool = True
) -> QuantizationReport:
    """
    Quantises base weights of a model, in place: the layers become `QuantizedLinear`, which computes with the rounded weights.

    Zeros of a pruned model stay zero. `layer.weight` keeps the values before the rounding, for quantisation-aware training; for
    GPTQ these are the weights at the moment they were rounded, after they made up for the errors before them. `save_gptq` writes
    the integers; `save_pretrained` of transformers refuses while the weights are not rounded.

    An interrupted run leaves the blocks done so far quantised. A second call goes on with the others, and says so in a warning.

    Args:
        model: any transformers decoder, encoder or encoder-decoder; any other module with linear layers is one block. Layers
            with a peft adapter are quantised below it.
        config: `RTNConfig` or `GPTQConfig`; it chooses the method, the grid and the layers.
        calibration: iterable of batches, as in `prune`, for `GPTQConfig`. `RTNConfig` ignores it.
        progress: whether to show a progress bar.

    Returns:
        The errors and the sparsity of each layer, and the time taken.

    Raises:
        ValueError: a bad argument, before anything is changed: an unknown config, patterns that match no layer, a group size
            that does not divide the inputs of a layer, weights that are quantised, tied to another module or not finite,
            subclasses of `nn.Linear`, missing or empty calibration data, or data that never reaches some of the layers.
            During the run: activations that are not finite, or a Hessian that no damping makes positive definite.

    Example:
        >>> report = quantize(model, GPTQConfig(bits=4, group_size=64), calibration=loader)
        >>> print(report)
        >>> save_gptq(model, "out")
    """
    method = QUANTIZATION_METHODS.of(config)
    layers = select_layers(model, config.target_modules, config.exclude_modules)
    layers = _without_done(layers, config)
    check_quantizable(model, layers, config)
    if config.target_modules is None:
        warn_of_fused_experts(model, "quantised")

    start = time.perf_counter()
    rows, tokens = method.run(model, layers, config, calibration, progress)
    ordered = [rows[name] for name in layers]
    left_out = [name for name in routers(model) if name not in layers]
    return QuantizationReport(config.method, asdict(config), ordered, time.perf_counter() - start, tokens, left_out)


def check_quantizable(
    model: nn.Module, layers: dict[str, nn.Module], config: QuantizationConfig, in_memory: bool = True
) -> None:
    """
    Raises:
        ValueError: as `check_changeable`, or a layer cannot be replaced or cut into groups of this size.
    """
    check_changeable(model, layers, "quantise", "quantised", in_memory)
    _check_replaceable(model, layers)
    for name, layer in layers.items():
        check_group_size(name, weight_matrix(layer).shape[1], config.group_size)
    check_unquantized(model)


def _without_done(layers: dict[str, nn.Module], config: QuantizationConfig) -> dict[str, nn.Module]:
    """Without the layers that an interrupted run has quantised on such a grid.

    Raises:
        ValueError: they have another grid, or all are quantised.
    """
    done = {name: layer for name, layer in layers.items() if isinstance(layer, QuantizedLinear)}
    for name, layer in done.items():
        size = layer.in_features if config.group_size == -1 else config.group_size
        if len(done) == len(layers) or (layer.grid.bits, layer.grid.group_size) != (config.bits, size):
            raise ValueError(
                f"model: {name} is quantised already, with {layer.grid.bits} bits and groups of {layer.grid.group_size}; "
                "quantise the floating-point model, or name the layer in exclude_modules."
            )
    if done:
        warnings.warn(
            f"{len(done)} layers, such as {next(iter(done))}, are quantised already and stay as they are.",
            stacklevel=3,
        )
    return {name: layer for name, layer in layers.items() if name not in done}


def _check_replaceable(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """
    Raises:
        ValueError: a layer is of a type that `QuantizedLinear` cannot stand for.
    """
    for name, layer in layers.items():
        if type(layer) not in FLOAT.exact:
            raise ValueError(
                f"model: {name} is a {type(layer).__name__}; only nn.Linear and Conv1D can be quantised, as what a subclass does "
                "besides would be lost. Name it in exclude_modules."
            )
    chosen = {id(layer) for layer in layers.values()}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            if id(base) in chosen and backend_of(base).out_dim(base):
                raise ValueError(
                    f"model: {name} is a Conv1D with an adapter, which counts on its layout; quantise before adding adapters."
                )
