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

import errno
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ...common.checks import check_bool
from ...common.files import replaced_files
from ...common.names import has_suffix
from ...common.writing import writing
from ...structure.importance import move_adapter, noted_orders
from ...supernet.groups import plain_path
from .config import ElasticLoraConfig
from .layer import active_weights, full_weights, get_rank, padded_weights, rank_multiple


# Of what is in the file of an adapter, and of what there says the order of the units of a sorted base.
FILE_PREFIX = "base_model.model."
ORDER_SUFFIX = ".elastic_order"
# Initialisations that also change the base weights, by an amount that depends on the full rank.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def export_lora(
    model: nn.Module,
    config: ElasticLoraConfig,
    adapter_name: str,
    save_directory: str | os.PathLike[str],
    layers: Mapping[str, LoraLayer],
    pad: bool,
) -> None:
    """Write the active sub-adapter as a plain LoRA adapter. See `ElasticLoraModel.export_lora`."""
    init = str(config.initialized_with).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        raise ValueError(
            f"An adapter with `init_lora_weights={config.initialized_with!r}` fits only the base weights it has "
            "changed. First convert it: `model.save_pretrained(dir, path_initial_model_for_weight_conversion=...)`, "
            "load `dir` on the original base model, then export."
        )
    check_bool("pad", pad)
    directory = Path(save_directory)
    if directory.is_file():
        raise ValueError(f"`save_directory` must be a folder, {os.fspath(save_directory)!r} is a file.")
    ranks = {name: get_rank(layer, adapter_name) for name, layer in layers.items()}
    scalings = {name: _initial_scaling(layer, adapter_name) for name, layer in layers.items()}
    rank = max(ranks.values())
    used = Counter(filter(None, scalings.values()))
    scaling = used.most_common(1)[0][0] if used else 0.0
    if pad:
        step = math.lcm(*map(rank_multiple, layers.values()))
        rank = -(-rank // step) * step
        factors = {name: 1.0 if s == scaling else s / scaling for name, s in scalings.items()}
        active = _padded_weights(layers, adapter_name, rank, factors)
        ranks, scalings = dict.fromkeys(layers, rank), dict.fromkeys(layers, scaling)
    else:
        active = {
            id(full): weight
            for layer in layers.values()
            for full, weight in zip(full_weights(layer, adapter_name), active_weights(layer, adapter_name))
        }
    lora_config = _plain_config(model, config, rank, scaling, ranks, scalings)
    state_dict = _plain_state_dict(model, adapter_name, active)

    for path in (directory / SAFETENSORS_WEIGHTS_NAME, directory / CONFIG_NAME):
        if path.is_dir():  # it would be replaced like a file
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    with writing(directory), replaced_files(directory, last=CONFIG_NAME) as folder:
        save_file(state_dict, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        lora_config.save_pretrained(str(folder), auto_mapping_dict=_auto_mapping(model, config))


def _plain_config(
    model: nn.Module,
    config: ElasticLoraConfig,
    r: int,
    scaling: float,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
) -> LoraConfig:
    """Make the configuration of the sub-adapter.

    The scaling of every module is kept: a module with active rank k gets `rank_pattern[m] = k` and
    `alpha_pattern[m] = scaling * k` where these are not `r` and `lora_alpha`. `r` is the largest rank, by which other
    programs size their buffers, and `lora_alpha / r` the scaling.
    """
    plain = {f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.init}
    plain.update(
        r=r,
        lora_alpha=_whole(scaling * r),
        use_rslora=False,  # its scaling is in the alphas
        inference_mode=True,
        peft_type=None,
        init_lora_weights=True,
        base_model_name_or_path=config.base_model_name_or_path or getattr(model, "name_or_path", None) or None,
        rank_pattern={_pattern_key(name, ranks): k for name, k in ranks.items() if k != r},
        alpha_pattern={
            _pattern_key(name, ranks): _whole(scalings[name] * k)
            for name, k in ranks.items()
            if not math.isclose(scalings[name] * k, scaling * r)
        },
    )
    return LoraConfig(**plain)


def _padded_weights(
    layers: Mapping[str, LoraLayer], adapter_name: str, rank: int, factors: Mapping[str, float]
) -> dict[int, torch.Tensor]:
    """Make what stands for each full parameter of A and B, by its identity, at `rank`, with `factors` put into B."""
    padded: dict[int, torch.Tensor] = {}
    for name, layer in layers.items():
        parameters = list(full_weights(layer, adapter_name))
        weights = list(padded_weights(layer, adapter_name, rank))
        bias = layer.lora_B[adapter_name].bias if layer.lora_bias.get(adapter_name) else None
        if bias is not None:
            parameters.append(layer.lora_B[adapter_name]._parameters["bias"])
            weights.append(bias)
        if factors[name] != 1:
            weights[1:] = [(weight.cpu().double() * factors[name]).to(weight) for weight in weights[1:]]
        padded.update(zip(map(id, parameters), weights))
    return padded


def _plain_state_dict(
    model: nn.Module, adapter_name: str, active: Mapping[int, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Make the adapter's state dict in peft's format, with `active` by the identity of the parameters."""
    state_dict = model.state_dict()
    # by the paths of the modules, which are what peft goes by; some wrappers leave their own names out of the state dict
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                state_dict[f"{path}.{name}" if path else name] = active.get(id(parameter), parameter).detach()
    plain = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=adapter_name)
    # peft's files carry the prefix of a PeftModel; tied adapters share memory, which safetensors refuses
    named = {f"{FILE_PREFIX}{name}": tensor for name, tensor in plain.items() if not name.endswith(ORDER_SUFFIX)}
    # which the base has in its original order for whoever loads the file
    named = move_adapter(model, noted_orders(model), {}, named, FILE_PREFIX)
    # the base may be compiled or wrapped here, and is not there
    prefix = f"{FILE_PREFIX}module." if isinstance(model, _PARALLEL) else FILE_PREFIX
    return {
        FILE_PREFIX + plain_path(name.removeprefix(prefix)): tensor.contiguous().clone()
        for name, tensor in named.items()
    }


def _auto_mapping(model: nn.Module, config: ElasticLoraConfig) -> dict[str, Any] | None:
    """Name the class of the base model, as `AutoPeftModel` needs it where the task type does not say it."""
    if config.task_type is not None:
        return None
    model = getattr(model, "_orig_mod", model.module if isinstance(model, _PARALLEL) else model)
    return {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def _initial_scaling(layer: LoraLayer, adapter_name: str) -> float:
    r = layer.r[adapter_name]
    return layer.lora_alpha[adapter_name] / (math.sqrt(r) if layer.use_rslora[adapter_name] else r)


def _pattern_key(name: str, names: Iterable[str]) -> str:
    """Make the key for one module in `rank_pattern`, a regular expression that peft matches with any end of a path: the
    module's path, anchored if another path ends in it."""
    key = name if re.fullmatch(r"[\w.]+", name) else re.escape(name)
    return f"^{key}" if any(other != name and has_suffix(other, name) for other in names) else key


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
