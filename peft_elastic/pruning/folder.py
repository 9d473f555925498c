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
"""Pruning of models that are larger than memory."""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..common.safetensors_files import NAMES_OF_DTYPES
from ..structure.calibration import calibration_batches, digest_of_batches
from ..structure.folder_run import FolderRun
from ..structure.modules import routers, weight_matrix, zero_fraction
from ..structure.selection import check_finite, select_layers, warn_of_fused_experts
from .config import PruningConfig
from .methods import PRUNING_METHODS
from .prune import check_prunable
from .report import PruningReport


def prune_folder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: PruningConfig,
    calibration: Any = None,
    *,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    activations_on_disk: bool = False,
    progress: bool = True,
) -> PruningReport:
    """
    Does what `prune` does with a model that is larger than memory: reads it from a folder block by block, and writes the pruned
    model to another folder, which `from_pretrained` loads. The weights are bit for bit those of `prune`.

    In memory are what is outside of the blocks (the embeddings), at most two blocks, and the activations of the calibration data
    between two blocks. Files of weights are written one after the other, with the names of those in `source`; an interrupted run,
    however it ended, goes on where it was with the same call.

    Args:
        source: a folder with the config.json of a model of transformers and its weights in safetensors files. It is not changed.
        output: a new folder, or that of an interrupted run. What lies beside the weights (tokenizer, generation settings) is copied.
        config: `WandaConfig`, `SparseGPTConfig` or `MagnitudeConfig`.
        calibration: as in `prune`. A run that goes on has to be given the same.
        dtype: to compute and to save in: "auto" is that of the checkpoint, as in `from_pretrained`; or "float32", "bfloat16",
            "float16".
        device: where a block is computed.
        activations_on_disk: whether the activations between two blocks are kept in files in `output`, which are removed at the end,
            and not in memory. What the model gives each block besides (masks, states of an encoder) stays in memory.
        progress: whether to show a progress bar.

    Returns:
        As `prune`, also of what was done before an interruption; the time is that of this call.

    Raises:
        ValueError: as of `prune`; and before anything is computed, if a file is missing or damaged, a tensor is missing or of another
            shape than config.json says, weights are quantised already, `output` holds something else or the unfinished run of
            another model, config or data, or its disk is too small. During the run: a weight that is not finite.
        OSError: a file cannot be written (`peft_elastic.common.writing.WriteError`).

    Example:
        >>> report = prune_folder("llama-70b", "pruned", WandaConfig(sparsity=0.5), calibration=loader)
    """
    method = PRUNING_METHODS.of(config)
    batches = calibration_batches(calibration, getattr(config, "max_samples", None)) if method.calibrated else None
    settings = {
        "method": config.method,
        "config": asdict(config),
        "calibration": batches and digest_of_batches(batches),
    }
    run = FolderRun(
        source, output, "pruning", settings, dtype=dtype, device=device, activations_on_disk=activations_on_disk
    )
    model, stored = run.model, run.stored
    layers = select_layers(model, config.target_modules, config.exclude_modules)
    check_prunable(model, layers, config.n_of_m, in_memory=False)
    if config.target_modules is None:
        warn_of_fused_experts(model, "pruned")
    left_out = [name for name in routers(model) if name not in layers]
    keys = {name: stored.key_of_weight(name) for name in layers}
    new = {
        name: {
            keys[name]: (
                NAMES_OF_DTYPES[layer.get_parameter("weight").dtype],
                tuple(layer.get_parameter("weight").shape),
            )
        }
        for name, layer in layers.items()
    }
    before: dict[str, float] = {}

    def look_at(name: str) -> None:
        check_finite(name, layers[name].get_parameter("weight"))
        before[name] = zero_fraction(layers[name])

    def written(unit: dict[str, nn.Module]) -> tuple[dict[str, torch.Tensor], list[Any]]:
        rows = [
            {
                "name": name,
                "shape": list(weight_matrix(layer).shape),
                "sparsity_before": before[name],
                "sparsity_after": zero_fraction(layer),
            }
            for name, layer in unit.items()
        ]
        return {keys[name]: layer.get_parameter("weight") for name, layer in unit.items()}, rows

    start = time.perf_counter()
    with run.working(new, {name: [key] for name, key in keys.items()}, before=look_at, after=written):
        tokens = method.run(model, layers, config, batches, progress)
        rows = run.rows_of(layers)
        report = PruningReport(config.method, asdict(config), rows, time.perf_counter() - start, tokens, left_out)
        run.finish()
    return report
