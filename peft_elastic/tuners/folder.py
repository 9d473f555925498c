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
"""Merging of adapters into models that are larger than memory."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from torch import nn

from ..common.checks import check_bool, wrong
from ..common.progress import progress_bar
from ..common.safetensors_files import NAMES_OF_DTYPES
from ..layers.backends import find_linear_backend
from ..layers.backends.float import FLOAT
from ..layers.grid import Grid
from ..layers.quantized_linear import QuantizedLinear
from ..quantization.checkpoint import describe
from ..quantization.folder import packed, packed_tensors
from ..quantization.gptq_settings import QUANTIZE_CONFIG_FILE
from ..structure.folder_run import FolderRun
from ..structure.modules import weight_matrix, zero_fraction
from ..structure.selection import check_changeable, check_finite
from ..structure.sequential import LayerWalker
from ..supernet.space import Subnet
from .sparse_qa_lora.layer import SparseLoraLinear, grids_come_later


_ADAPTER = "default"
_TYPES = ("LORA", "ELASTIC_LORA", "SPARSE_QA_LORA")
_PREFIX = "base_model.model."


def merge_folder(
    source: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    subnet: Subnet | Mapping[str, int] | str | None = None,
    gptq: bool = False,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """
    Merges an adapter into a model that is larger than memory: what `PeftModel.from_pretrained(...).merge_and_unload()` and
    `save_pretrained` (or `save_gptq`) do, block by block, from folder to folder. The weights are bit for bit the same.

    In memory are one block, and the adapter as a whole. Interruptions and files are as in `prune_folder`.

    Args:
        source: the folder of the base model: config.json and safetensors files, in floating point. It is not changed.
        adapter: the folder of a LoRA, elastic LoRA, SparsePEFT or QA-SparsePEFT adapter with elastic ranks on linear layers. One that
            narrows, skips or sorts parts of the base, or saves modules of it, has to be merged in memory.
        output: a new folder, or that of an interrupted run.
        subnet: as in `set_subnet`; by default the active one of the adapter.
        gptq: whether to write the integers of a quantisation-aware adapter as a GPTQ checkpoint, and not the values they stand for.
        dtype: of the base, as in `prune_folder`.
        device: where a block is merged.
        progress: whether to show a progress bar.

    Returns:
        For each layer that was merged its `name`, `shape` ([out, in]), `sparsity_before` and `sparsity_after` (fractions of zero
        weights).

    Raises:
        ValueError: a bad argument, before anything is made, as of `prune_folder`; an adapter of another kind or for another base. During
            the run: a weight that is not finite, before or after the merge.
        OSError: a file cannot be written.

    Example:
        >>> merge_folder("llama-70b", "adapter", "merged")
    """
    check_bool("gptq", gptq)
    config, state, digest = _read_adapter(adapter)
    quantized = bool(getattr(config, "quantization_aware", False))
    if gptq and not quantized:
        raise ValueError("`gptq` must be False for an adapter that is not quantisation-aware, got True.")
    chosen = subnet if subnet is None or isinstance(subnet, str) else dict(subnet)
    settings = {"adapter": digest, "subnet": chosen, "gptq": gptq}
    run = FolderRun(source, output, "merge", settings, dtype=dtype, device=device)
    stored = run.stored
    peft_model = _with_adapter(run, adapter, config, state)
    if subnet is not None:
        if not hasattr(peft_model, "set_subnet"):
            raise wrong("subnet", "None for an adapter that is not elastic", subnet)
        peft_model.set_subnet(subnet)

    wrappers = _wrappers(run)
    layers = {name: wrapper.get_base_layer() for name, wrapper in wrappers.items()}
    check_changeable(run.model, layers, "merge into", "merged into", in_memory=False)
    keys = {name: stored.key_of_weight(name) for name in layers}
    grids: dict[str, Any] = {
        name: wrapper.lora_grid[_ADAPTER]
        for name, wrapper in wrappers.items()
        if isinstance(wrapper, SparseLoraLinear) and _ADAPTER in wrapper.lora_grid
    }
    described = {name: SimpleNamespace(grid=grid) for name, grid in grids.items()}
    checkpoint_format = "gptq" if all(grid.symmetric for grid in grids.values()) else "gptq_v2"
    new: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        outputs, inputs = weight_matrix(layer).shape
        if not gptq:
            if name in grids and grids[name].bits == 8 and weight.dtype == torch.bfloat16:
                raise ValueError(
                    f"`dtype` must be 'float32' or 'float16' for the 8 bits of {name}, whose values bfloat16 does not tell apart, got "
                    f"{dtype!r}; or give gptq=True."
                )
            new[name] = {keys[name]: (NAMES_OF_DTYPES[weight.dtype], tuple(weight.shape))}
            continue
        new[name] = packed_tensors(name, keys[name], outputs, inputs, grids[name].bits, grids[name].scales.shape[1])
    description = describe(run.model, described, checkpoint_format) if gptq else None  # type: ignore[arg-type]

    before: dict[str, float] = {}

    def look_at(name: str) -> None:
        check_finite(name, layers[name].get_parameter("weight"))
        before[name] = zero_fraction(layers[name])

    def written(unit: dict[str, nn.Module]) -> tuple[dict[str, torch.Tensor], list[Any]]:
        tensors: dict[str, torch.Tensor] = {}
        rows = []
        for name in unit:
            merged = _merged(wrappers[name])
            weight = merged.get_parameter("weight").detach()
            row = {"name": name, "shape": list(weight_matrix(merged).shape)}
            rows.append(row | {"sparsity_before": before[name], "sparsity_after": zero_fraction(merged)})
            if gptq:
                tensors |= packed(name, keys[name], merged, checkpoint_format)
            else:
                is_conv1d = isinstance(merged, QuantizedLinear) and merged.conv1d
                tensors[keys[name]] = weight.T if is_conv1d else weight
        return tensors, rows

    with run.working(new, {name: [key] for name, key in keys.items()}, before=look_at, after=written):
        for _ in progress_bar(LayerWalker(run.model, layers), desc="merge", unit="block", disable=not progress):
            pass  # each is merged when it is left
        rows = run.rows_of(layers)
        if description is None:
            run.finish()
        else:
            text = json.dumps(description, indent=2) + "\n"
            run.finish({QUANTIZE_CONFIG_FILE: text}, {"quantization_config": description})
    return rows


def _merged(wrapper: Any) -> Any:
    """The base layer with its adapter in it."""
    if hasattr(wrapper, "unload_and_optionally_merge_module"):
        return wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    wrapper.merge(safe_merge=True)
    return wrapper.get_base_layer()


def _read_adapter(adapter: str | os.PathLike[str]) -> tuple[Any, dict[str, torch.Tensor], str]:
    """The configuration and the tensors of an adapter, and what tells it from others.

    Raises:
        ValueError: it cannot be read, or is of a kind that needs the whole base.
    """
    folder = Path(adapter)
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"`adapter` {os.fspath(adapter)!r} must be a folder with an adapter_config.json.")
    try:
        config: Any = PeftConfig.from_pretrained(os.fspath(adapter))
        state = load_peft_weights(os.fspath(adapter), device="cpu")
    except Exception as error:
        raise ValueError(f"`adapter` {os.fspath(adapter)!r} cannot be read: {error}") from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in _TYPES:
        raise ValueError(
            f"`adapter` {os.fspath(adapter)!r} must be of one of the types {', '.join(_TYPES)}, got {kind}."
        )
    for name in (
        "elastic_width", "elastic_depth", "sorted_base", "use_dora", "modules_to_save", "target_parameters", "lora_bias",
        "trainable_token_indices", "layer_replication", "alora_invocation_tokens",
    ):  # fmt: skip
        if getattr(config, name, None):
            raise ValueError(
                f"`adapter` {os.fspath(adapter)!r} has `{name}`, which is not merged block by block. Merge it in memory: "
                "`PeftModel.from_pretrained(base, adapter).merge_and_unload()`."
            )
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(
            f"`adapter` {os.fspath(adapter)!r} has init_lora_weights={config.init_lora_weights!r}, which changes the base. Merge it in "
            "memory."
        )
    digest = hashlib.sha256((folder / "adapter_config.json").read_bytes())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return config, state, digest.hexdigest()


def _with_adapter(run: FolderRun, adapter: str | os.PathLike[str], config: Any, state: dict[str, torch.Tensor]) -> Any:
    """The model, whose weights are on disk, with the adapter, which is in memory.

    Raises:
        ValueError: they do not fit together.
    """
    try:
        with grids_come_later():
            peft_model = PeftModel.from_pretrained(
                run.model, os.fspath(adapter), _ADAPTER, config=copy.deepcopy(config), low_cpu_mem_usage=True
            )
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`adapter` {os.fspath(adapter)!r} cannot be put on the model: {error}") from error
    peft_model.eval()
    left = dict(state)
    for path, module in _wrappers(run).items():
        for kind in ("lora_A", "lora_B"):
            inner = getattr(module, kind)[_ADAPTER]
            for key, parameter in list(inner._parameters.items()):
                if parameter is not None:
                    value = _take(left, f"{_PREFIX}{path}.{kind}.{key}", adapter)
                    if value.shape != parameter.shape:
                        raise ValueError(
                            f"`adapter` {os.fspath(adapter)!r}: {path}.{kind}.{key} is {tuple(value.shape)}; the base has "
                            f"{tuple(parameter.shape)}."
                        )
                    inner._parameters[key] = nn.Parameter(value.to(run.device, parameter.dtype), requires_grad=False)
        if isinstance(module, SparseLoraLinear) and _ADAPTER in module.lora_grid:
            scales, zeros, g_idx = (
                _take(left, f"{_PREFIX}{path}.lora_grid.{k}", adapter) for k in ("scales", "zeros", "g_idx")
            )
            grid = Grid(scales, zeros, in_features=len(g_idx), bits=config.bits or 4, g_idx=g_idx, persistent=True)
            module.lora_grid[_ADAPTER] = grid.to(run.device)
    if left:
        raise ValueError(f"`adapter` {os.fspath(adapter)!r} has {next(iter(left))}, for which the model has no place.")
    return peft_model


def _wrappers(run: FolderRun) -> dict[str, Any]:
    """The layers with adapters, by name.

    Raises:
        ValueError: one of them is no linear layer.
    """
    found = {name: module for name, module in run.model.named_modules() if isinstance(module, BaseTunerLayer)}
    for name, wrapper in found.items():
        base = wrapper.get_base_layer()
        if (
            not isinstance(wrapper, LoraLayer)
            or find_linear_backend(base) is not FLOAT
            or type(base) not in FLOAT.exact
        ):
            raise ValueError(
                f"`adapter`: {name} is a {type(base).__name__}; only linear layers are merged block by block. Merge it in memory."
            )
    return found


def _take(state: dict[str, torch.Tensor], name: str, adapter: str | os.PathLike[str]) -> torch.Tensor:
    if name not in state:
        raise ValueError(f"`adapter` {os.fspath(adapter)!r} lacks {name}, which the model needs.")
    return state.pop(name)
