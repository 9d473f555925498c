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

import re
import warnings
from collections import Counter
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..common.checks import wrong
from ..common.names import has_suffix
from ..common.parameters import check_parameters
from ..layers.backends import backend_of
from .modules import enclosing_names, find_stacks, linear_layers, output_head, routers
from .narrow import is_narrowed


_PRUNABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_patterns(config: Any) -> None:
    """Verifies `target_modules` and `exclude_modules` of a config, ValueError if they are of no use; sets become lists."""
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        if isinstance(value, set):  # what peft makes of its own target_modules
            value = sorted(value)
            object.__setattr__(config, name, value)
        names = isinstance(value, (list, tuple)) and value and all(isinstance(v, str) and v for v in value)
        if value is not None and not names and not (isinstance(value, str) and value):
            raise wrong(name, "a non-empty list of names, a regular expression or None", value)
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"`{name}` must be a regular expression, got {value!r} ({error}).") from error


def _select(names: list[str], patterns: list[str] | str, argument: str) -> set[str]:
    """Names that match a list of suffixes or a regular expression; a pattern without any match is an error."""
    if isinstance(patterns, str):
        per_pattern = {patterns: {name for name in names if re.fullmatch(patterns, name)}}
    else:
        per_pattern = {pattern: {name for name in names if has_suffix(name, pattern)} for pattern in patterns}
    for pattern, matched in per_pattern.items():
        if not matched:
            known = sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(
                f"`{argument}`: {pattern!r} matches no linear layer of the model; the last parts of their names are {known}."
            )
    return set().union(*per_pattern.values())


def select_layers(
    model: nn.Module, target_modules: list[str] | str | None, exclude_modules: list[str] | str | None
) -> dict[str, nn.Module]:
    """
    The layers a pruning config means (see `PruningConfig`), in the order of the model's modules. Without `target_modules` the
    routers of mixtures of experts are none of them.

    Raises:
        ValueError: a pattern matches nothing, or nothing is left.
    """
    layers = linear_layers(model)
    if target_modules is not None:
        chosen = _select(list(layers), target_modules, "target_modules")
    else:
        blocks = {name for stack in find_stacks(model) for name in stack}
        # A model without any list of blocks counts as one block; its output head stays out as elsewhere.
        head = output_head(model)
        chosen = {
            name
            for name, layer in layers.items()
            if (not blocks.isdisjoint(enclosing_names(name)) if blocks else layer is not head)
        }
        chosen -= set(routers(model))
    if exclude_modules is not None:
        chosen -= _select(list(layers), exclude_modules, "exclude_modules")
    if not chosen:
        raise ValueError(
            f"`target_modules` must leave a linear layer (nn.Linear or Conv1D), got {target_modules!r} with "
            f"exclude_modules={exclude_modules!r}."
        )
    return {name: layer for name, layer in layers.items() if name in chosen}


def check_changeable(
    model: nn.Module, layers: dict[str, nn.Module], verb: str, participle: str, in_memory: bool = True
) -> None:
    """
    Whether the weights of `layers` can be changed in place; `verb` ("prune", "pruned") is what is to happen to them. Of a model
    whose weights will come into memory one after the other (not `in_memory`), `check_finite` remains for then.

    Raises:
        ValueError: a weight is quantised, shared with another module, computed from other parameters, not in memory or not
            finite, or an adapter is merged into it; or a part of the model is not active, which no calibration would reach.
    """
    if is_narrowed(model):
        raise ValueError("A part of `model` is not active; choose the widest subnet first, `model.set_subnet('max')`.")
    check_parameters(layers)
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    merged = {
        id(module.get_base_layer())
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and module.merged
    }
    for name, layer in layers.items():
        weight = layer._parameters.get("weight")
        odd = None if weight is None or weight.dtype in _PRUNABLE_DTYPES else weight.dtype
        if backend_of(layer).packed or odd:
            found = odd or "packed integers"
            raise ValueError(f"model: {name} has quantised weights ({found}); {verb} the floating-point model first.")
        if weight is not None and weight.is_meta and hasattr(layer, "_hf_hook"):
            raise ValueError(
                f"model: accelerate keeps the weight of {name} on a disk or another device (device_map), so it cannot be "
                f"{participle} in place. Load the model without that, or go through its folder block by block (`prune_folder`, "
                "`quantize_folder`)."
            )
        if weight is None or type(weight.data) is not torch.Tensor or (weight.is_meta and in_memory):
            raise ValueError(
                f"model: the weight of {name} is not a plain parameter in memory, so it cannot be {participle} in place."
            )
        if owners[id(weight)] > 1:
            raise ValueError(
                f"model: {name} shares its weight with another module (tied embeddings?), which would change with it; "
                "leave it out of target_modules."
            )
        if id(layer) in merged:
            raise ValueError(f"model: an adapter is merged into {name}; call model.unmerge_adapter() first.")
        if in_memory:
            check_finite(name, weight)


def check_finite(name: str, weight: torch.Tensor) -> None:
    """ValueError if the weight of the layer `name` holds NaN or infinite values."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"model: the weight of {name} holds NaN or infinite values.")


def warn_of_fused_experts(model: nn.Module, participle: str) -> None:
    """Mixtures of experts keep the weights of all experts in one three-dimensional parameter, which is no linear layer."""
    fused = [
        f"{block_name}.{name}"
        for stack in find_stacks(model)
        for block_name, block in stack.items()
        for module_name, module in block.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False)
        if parameter.dim() == 3
    ]
    if fused:
        warnings.warn(
            f"{len(fused)} three-dimensional parameters, such as {fused[0]}, hold the weights of several layers each (experts) "
            f"and are not {participle}.",
            stacklevel=3,
        )
