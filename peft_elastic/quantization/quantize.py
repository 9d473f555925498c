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
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..common.progress import progress_bar
from ..layers.backends import backend_of
from ..layers.backends.float import FLOAT
from ..layers.grid import Grid, check_group_size, fit_grid
from ..layers.quantized_linear import QuantizedLinear
from ..structure.calibration import calibration_batches, calibration_mode
from ..structure.inputs import InputCollector, is_encoder_decoder
from ..structure.modules import replace_layers, routers, weight_matrix
from ..structure.selection import check_changeable, select_layers, warn_of_fused_experts
from ..structure.sequential import BlockWalker
from .config import GPTQConfig, QuantizationConfig, RTNConfig
from .gptq import Rounded, gptq, output_error
from .report import QuantizationReport
from .saving import check_unquantized, guard_saving


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
    if type(config) not in _METHODS:
        known = ", ".join(sorted(c.__name__ for c in _METHODS))
        raise ValueError(f"config: got {config!r}; it must be an instance of one of {known}.")
    layers = select_layers(model, config.target_modules, config.exclude_modules)
    layers = _without_done(layers, config)
    check_changeable(model, layers, "quantise", "quantised")
    _check_replaceable(model, layers)
    for name, layer in layers.items():
        check_group_size(name, weight_matrix(layer).shape[1], config.group_size)
    check_unquantized(model)
    if config.target_modules is None:
        warn_of_fused_experts(model, "quantised")

    start = time.perf_counter()
    rows, tokens = _METHODS[type(config)](model, layers, config, calibration, progress)
    ordered = [rows[name] for name in layers]
    left_out = [name for name in routers(model) if name not in layers]
    return QuantizationReport(config.method, asdict(config), ordered, time.perf_counter() - start, tokens, left_out)


_Rows = dict[str, dict[str, Any]]


def _quantize_rtn(
    model: nn.Module, layers: dict[str, nn.Module], config: RTNConfig, calibration: Any, progress: bool
) -> tuple[_Rows, int]:
    rows: _Rows = {}
    for name, layer in progress_bar(layers.items(), desc="RTN", unit="layer", disable=not progress):
        rounded = _round_to_nearest(weight_matrix(layer), config)
        rows[name] = _row(name, weight_matrix(layer), rounded, None)
        _commit(model, {name: layer}, {name: rounded})
    return rows, 0


def _quantize_gptq(
    model: nn.Module, layers: dict[str, nn.Module], config: GPTQConfig, calibration: Any, progress: bool
) -> tuple[_Rows, int]:
    batches = calibration_batches(calibration, config.max_samples)
    rows: _Rows = {}
    with calibration_mode(model):
        collector = InputGrams(batches, is_encoder_decoder(model))
        for unit in progress_bar(BlockWalker(model, batches, layers), desc="GPTQ", unit="block", disable=not progress):
            weights = {name: _wide(weight_matrix(layer)) for name, layer in unit.layers.items()}
            rounded: dict[str, Rounded] = {}
            for names, hessian in _by_hessian(collector.collect(unit)):
                together = torch.cat([weights[name] for name in names])
                hessian = hessian.to(together)
                result = gptq(together, hessian, config, " and ".join(names))
                begin = 0
                for name in names:
                    part = slice(begin, begin + len(weights[name]))
                    grid, dtype = _rows_of(result.grid, part), weight_matrix(unit.layers[name]).dtype
                    # In a narrower dtype a weight might leave its cell.
                    stored = result.weight[part].to(dtype)
                    stored = grid.into_cells(stored, grid.quantize(result.weight[part]))
                    rounded[name] = Rounded(stored, grid)
                    rows[name] = _row(name, weights[name], rounded[name], hessian)
                    begin = part.stop
            for name, layer in unit.layers.items():
                if name not in rounded:  # no token reached it
                    rounded[name] = _round_to_nearest(weight_matrix(layer), config)
                    rows[name] = _row(name, weights[name], rounded[name], None)
            # All layers of a block before any change, so that an interrupted run leaves whole blocks.
            _commit(model, unit.layers, rounded)
    return rows, collector.tokens


# A method replaces the layers and returns the rows of the report, by name, and the number of calibration tokens.
_METHODS: dict[type[QuantizationConfig], Callable[..., tuple[_Rows, int]]] = {
    RTNConfig: _quantize_rtn,
    GPTQConfig: _quantize_gptq,
}


class InputGrams(InputCollector):
    """X^T X (in, in) of the inputs X (tokens, in) of layers over all calibration tokens: half the Hessian of GPTQ's squared
    error with respect to a row of the weight."""

    fallback = "rounded to nearest"

    def _measure(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.T @ tokens


def _by_hessian(hessians: dict[str, torch.Tensor]) -> list[tuple[list[str], torch.Tensor]]:
    """Layers with the same Hessian, because they have the same inputs (q, k and v of an attention), are quantised together."""
    groups: list[tuple[list[str], torch.Tensor]] = []
    for name, hessian in hessians.items():
        for names, other in groups:
            if torch.equal(hessian, other):
                names.append(name)
                break
        else:
            groups.append(([name], hessian))
    return groups


def _rows_of(grid: Grid, part: slice) -> Grid:
    return Grid(grid.scales[part].clone(), grid.zeros[part].int(), in_features=grid.in_features, bits=grid.bits)


def _round_to_nearest(weight: torch.Tensor, config: QuantizationConfig) -> Rounded:
    return Rounded(weight, fit_grid(weight, config.bits, config.group_size, config.symmetric, config.clipping))


def _row(name: str, weight: torch.Tensor, rounded: Rounded, hessian: torch.Tensor | None) -> dict[str, Any]:
    """The row of the report for a layer whose weight was `weight` (out, in)."""
    weight = _wide(weight)
    values = rounded.grid.round(_wide(rounded.weight))
    difference = weight - values
    norm = weight.square().sum().item()
    return {
        "name": name,
        "shape": list(weight.shape),
        "bits": rounded.grid.bits,
        "group_size": rounded.grid.group_size,
        "weight_error": difference.square().sum().item() / norm if norm else 0.0,
        "output_error": None if hessian is None else output_error(difference, weight, hessian),
        "sparsity": 1 - weight.count_nonzero().item() / weight.numel(),
        "zeros": 1 - values.count_nonzero().item() / values.numel(),
    }


def _commit(model: nn.Module, layers: dict[str, nn.Module], rounded: dict[str, Rounded]) -> None:
    """Puts the quantised layers in the place of `layers`."""
    replacements: list[tuple[nn.Module, nn.Module]] = []
    for name, layer in layers.items():
        quantized = QuantizedLinear.from_linear(layer, rounded[name].grid)
        quantized.weight.data.copy_(rounded[name].weight)
        replacements.append((layer, quantized))
    replace_layers(model, replacements)
    guard_saving(model)


def _wide(weight: torch.Tensor) -> torch.Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


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
