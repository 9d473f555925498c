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
"""Quantisation of models that are larger than memory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..common.checks import check_choice
from ..common.safetensors_files import Stored
from ..layers.gptq_format import FORMATS, check_packable, pack_gptq, packed_shapes, unpack_gptq
from ..layers.grid import Grid
from ..layers.ordinary import ordinary_linear
from ..layers.quantized_linear import QuantizedLinear
from ..structure.calibration import calibration_batches, digest_of_batches
from ..structure.folder_run import FolderRun
from ..structure.modules import replace_layers, routers, weight_matrix
from ..structure.residence import StoredResidence
from ..structure.selection import check_finite, select_layers, warn_of_fused_experts
from .checkpoint import description_of
from .config import QuantizationConfig
from .gptq_settings import QUANTIZE_CONFIG_FILE
from .methods import QUANTIZATION_METHODS
from .quantize import check_quantizable
from .report import QuantizationReport


_DTYPES_ON_DISK = {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}


def quantize_folder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: QuantizationConfig,
    calibration: Any = None,
    *,
    checkpoint_format: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    activations_on_disk: bool = False,
    progress: bool = True,
) -> QuantizationReport:
    """
    Does what `quantize` and `save_gptq` do with a model that is larger than memory: reads it from a folder block by block, and writes
    a GPTQ checkpoint to another one. The tensors are bit for bit those that the two write.

    Memory, interruptions and files are as in `prune_folder`.

    Args:
        source: a folder with the config.json of a model of transformers and its weights in safetensors files, in floating point. It
            is not changed.
        output: a new folder, or that of an interrupted run.
        config: `RTNConfig` or `GPTQConfig`.
        calibration: as in `quantize`. A run that goes on has to be given the same.
        checkpoint_format: as in `save_gptq`; "gptq" needs a symmetric config here. By default "gptq" for one, and else "gptq_v2".
        dtype: to compute in, and of the tensors that are not quantised, as in `prune_folder`.
        device: where a block is computed.
        activations_on_disk: whether the activations between two blocks are kept in files in `output`, which are removed at the end,
            and not in memory. What the model gives each block besides (masks, states of an encoder) stays in memory.
        progress: whether to show a progress bar.

    Returns:
        As `quantize`, also of what was done before an interruption; the time is that of this call.

    Raises:
        ValueError: as of `quantize`, `save_gptq` and `prune_folder`.
        OSError: a file cannot be written.

    Example:
        >>> report = quantize_folder("llama-70b", "int4", GPTQConfig(bits=4, group_size=128), calibration=loader)
    """
    method = QUANTIZATION_METHODS.of(config)
    if checkpoint_format is None:
        checkpoint_format = "gptq" if config.symmetric else "gptq_v2"
    check_choice("checkpoint_format", checkpoint_format, FORMATS)
    if checkpoint_format == "gptq" and not config.symmetric:
        raise ValueError(
            "`checkpoint_format` must be 'gptq_v2' for a config that is not symmetric, got 'gptq', which cannot hold zero points of 0."
        )
    batches = calibration_batches(calibration, getattr(config, "max_samples", None)) if method.calibrated else None
    settings = {
        "method": config.method,
        "config": asdict(config),
        "calibration": batches and digest_of_batches(batches),
        "checkpoint_format": checkpoint_format,
    }
    run = FolderRun(
        source, output, "quantisation", settings, dtype=dtype, device=device, activations_on_disk=activations_on_disk
    )
    model, stored = run.model, run.stored
    layers = select_layers(model, config.target_modules, config.exclude_modules)
    check_quantizable(model, layers, config, in_memory=False)
    keys = {name: stored.key_of_weight(name) for name in layers}
    sizes: dict[str, tuple[int, int]] = {}
    new: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, layer in layers.items():
        outputs, inputs = weight_matrix(layer).shape
        sizes[name] = outputs, inputs
        groups = 1 if config.group_size == -1 else inputs // config.group_size
        new[name] = packed_tensors(name, keys[name], outputs, inputs, config.bits, groups)
    if config.target_modules is None:
        warn_of_fused_experts(model, "quantised")
    left_out = [name for name in routers(model) if name not in layers]
    one_group = all(config.group_size in (-1, inputs) for _, inputs in sizes.values())
    grids = {
        name: (config.bits, -1 if one_group else (inputs if config.group_size == -1 else config.group_size))
        for name, (_, inputs) in sizes.items()
    }
    description = description_of(model, grids, checkpoint_format, symmetric=config.symmetric, in_order=True)

    def look_at(name: str) -> None:
        check_finite(name, layers[name].get_parameter("weight"))

    def written(unit: dict[str, nn.Module]) -> tuple[dict[str, torch.Tensor], list[Any]]:
        tensors: dict[str, torch.Tensor] = {}
        for name, layer in unit.items():
            quantized = model.get_submodule(name)
            assert isinstance(quantized, QuantizedLinear)
            tensors |= packed(name, keys[name], quantized, checkpoint_format)
            rounded = quantized.grid.round(quantized.weight.detach())
            _stand_in(model, residence, quantized, layer, rounded)
        return tensors, []

    def reload(name: str, places: Mapping[str, Stored]) -> torch.Tensor:
        outputs, inputs = sizes[name]
        found = unpack_gptq(
            name,
            {key.rpartition(".")[2]: place.read() for key, place in places.items()},
            out_features=outputs,
            in_features=inputs,
            bits=config.bits,
            group_size=config.group_size,
            checkpoint_format=checkpoint_format,
        )
        grid = Grid(found["scales"], found["zeros"], in_features=inputs, bits=config.bits)
        return grid.dequantize(found["q"], layers[name].get_parameter("weight").dtype)

    start = time.perf_counter()
    with run.working(
        new, {name: [key] for name, key in keys.items()}, before=look_at, after=written, reload=reload
    ) as residence:
        for name in run.done:
            _stand_in(model, residence, layers[name], layers[name], None)
            layers[name] = model.get_submodule(name)
        _, tokens = method.run(model, layers, config, batches, progress)
        rows = run.rows_of(layers)
        report = QuantizationReport(config.method, asdict(config), rows, time.perf_counter() - start, tokens, left_out)
        run.finish(
            {QUANTIZE_CONFIG_FILE: json.dumps(description, indent=2) + "\n"}, {"quantization_config": description}
        )
    return report


def packed_tensors(
    name: str, key: str, outputs: int, inputs: int, bits: int, groups: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What takes the place of a weight (outputs, inputs) in a GPTQ checkpoint: (dtype of safetensors, shape) by the names on disk.

    Args:
        name: of the layer, for messages.
        key: of the weight on disk.
        bits, groups: of the layer.

    Raises:
        ValueError: the layer cannot be packed.
    """
    check_packable(name, outputs, inputs, bits)
    shapes = packed_shapes(outputs, inputs, bits, groups)
    return {f"{key.rpartition('.')[0]}.{kind}": (_DTYPES_ON_DISK[kind], shape) for kind, shape in shapes.items()}


def packed(name: str, key: str, layer: QuantizedLinear, checkpoint_format: str) -> dict[str, torch.Tensor]:
    """The tensors that `packed_tensors` announces, of a layer."""
    found = pack_gptq(name, layer.quantized(), checkpoint_format)
    return {f"{key.rpartition('.')[0]}.{kind}": tensor for kind, tensor in found.items()}


def _stand_in(
    model: nn.Module, residence: StoredResidence, there: nn.Module, layer: nn.Module, rounded: torch.Tensor | None
) -> None:
    """Put an `nn.Linear` with the rounded weight (out, in), None for one that is not in memory, in the place of a layer: it computes
    what `QuantizedLinear` does, bit for bit, which `Conv1D` may not."""
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    if rounded is None:
        rounded = weight_matrix(layer)
    new = ordinary_linear(nn.Parameter(rounded.contiguous(), weight.requires_grad), bias, layer.training)
    residence.swap(layer, new)
    replace_layers(model, [(there, new)])
