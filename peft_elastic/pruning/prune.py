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
from dataclasses import asdict
from typing import Any

from torch import nn

from ..structure.modules import routers, weight_matrix, zero_fraction
from ..structure.selection import check_changeable, select_layers, warn_of_fused_experts
from .config import PruningConfig
from .methods import PRUNING_METHODS
from .report import PruningReport


def prune(model: nn.Module, config: PruningConfig, calibration: Any = None, *, progress: bool = True) -> PruningReport:
    """
    Sets the least important base weights of a model to zero, in place. Every other parameter keeps its bits, but for the other
    weights of the same layers with `SparseGPTConfig`, which make up for those that go.

    A model with peft adapters is pruned in its base weights, with the adapters active where activations are measured; a
    merged adapter has to be unmerged first. An interrupted run leaves the blocks done so far pruned, and a second call with
    the same arguments then gives the result of an unbroken one.

    Args:
        model: any transformers decoder, encoder or encoder-decoder; any other module with linear layers is one block.
        config: `WandaConfig`, `SparseGPTConfig` or `MagnitudeConfig`; it chooses the method, the sparsity and the layers.
        calibration: iterable of batches (a DataLoader, a list) for methods that measure activations. A batch is a mapping of
            model inputs such as `input_ids` and `attention_mask`, each (sequences, length), or `pixel_values`; or a tensor
            of token ids. It is read once. Padding marked by `attention_mask` does not count. Magnitude pruning ignores it.
        progress: whether to show a progress bar.

    Returns:
        The sparsity of each layer before and after, and the time taken.

    Raises:
        ValueError: a bad argument, before anything is changed: an unknown config, patterns that match no layer, weights that
            are quantised, tied to another module or not finite, an n:m pattern that does not divide the inputs, missing or
            empty calibration data, or data that never reaches some of the layers. During the run: activations that are not
            finite, or a Hessian that no damping makes positive definite.

    Example:
        >>> report = prune(model, WandaConfig(sparsity=0.5), calibration=loader)
        >>> print(report)
    """
    method = PRUNING_METHODS.of(config)
    layers = select_layers(model, config.target_modules, config.exclude_modules)
    check_prunable(model, layers, config.n_of_m)
    if config.target_modules is None:
        warn_of_fused_experts(model, "pruned")

    start = time.perf_counter()
    before = {name: zero_fraction(layer) for name, layer in layers.items()}
    tokens = method.run(model, layers, config, calibration, progress)
    rows = [
        {
            "name": name,
            "shape": list(weight_matrix(layer).shape),
            "sparsity_before": before[name],
            "sparsity_after": zero_fraction(layer),
        }
        for name, layer in layers.items()
    ]
    left_out = [name for name in routers(model) if name not in layers]
    return PruningReport(config.method, asdict(config), rows, time.perf_counter() - start, tokens, left_out)


def check_prunable(
    model: nn.Module, layers: dict[str, nn.Module], n_of_m: tuple[int, int] | None, in_memory: bool = True
) -> None:
    """
    Raises:
        ValueError: as `check_changeable`, or the number of inputs of a layer does not fit the n:m pattern.
    """
    check_changeable(model, layers, "prune", "pruned", in_memory)
    for name, layer in layers.items():
        inputs = weight_matrix(layer).shape[1]
        if n_of_m is not None and inputs % n_of_m[1]:
            raise ValueError(
                f"`pattern` must be 'n:m' with an m that divides the inputs of every layer, got '{n_of_m[0]}:{n_of_m[1]}': {name} has "
                f"{inputs} inputs, which is not divisible by {n_of_m[1]}."
            )
