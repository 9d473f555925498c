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
"""Merging adapters that were not trained for it into a quantised base: dequantise, add, round again, and say what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from peft import PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ..common.progress import progress_bar
from ..common.tensors import zero_share
from ..layers.backends import backend_of, find_linear_backend, grid_layers
from ..layers.backends.gptqmodel import leave_gptqmodel
from ..layers.grid import Grid, fit_grid
from ..layers.quantized_linear import QuantizedLinear
from ..quantization.saving import guard_saving
from ..structure.report import layer_table, mean_over_weights
from .sparse_qa_lora.layer import SparseLoraLinear
from .tied_weights import check_tied_weights, merged_once


@dataclass(frozen=True)
class RequantizationReport:
    """What rounding again did to each layer of `merge_and_requantize`; printing it gives a table.

    Args:
        layers (`list[dict]`): one for each merged layer whose base is quantised: `name`, `shape` ([out, in]), `update_error` (|W_merged - (W +
            update)| / |update|, Frobenius norms: 0 kept the update, 1 or more lost it), `weight_error` (the same over |W +
            update|), `zeros_before` and `zeros_after` (fractions of zero weights).
    """

    layers: list[dict[str, Any]] = field(repr=False)

    @property
    def update_error(self) -> float:
        """The mean of `update_error` over the layers; 0 without any."""
        return sum(row["update_error"] for row in self.layers) / max(1, len(self.layers))

    def __str__(self) -> str:
        if not self.layers:
            return "no quantised layer was merged"
        columns = ("error / update", "error / weight", "zeros before", "after")
        return "\n".join(
            [
                *layer_table(self.layers, columns, _summary),
                f"Rounding has changed the updates by {self.update_error:.0%} of their size on average. "
                "`SparseQALoraConfig(quantization_aware=True)` trains adapters that merge without any change.",
            ]
        )


def _summary(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    formats = {"update_error": ".1%", "weight_error": ".2%", "zeros_before": ".1%", "zeros_after": ".1%"}
    return tuple(format(mean_over_weights(rows, key), how) for key, how in formats.items())


@torch.no_grad()
def merge_and_requantize(
    model: PeftModel,
    adapter_names: Optional[list[str]] = None,
    *,
    refit: bool = False,
    progressbar: bool = False,
) -> tuple[nn.Module, RequantizationReport]:
    """Merge LoRA adapters of any LoRA type into their base, which may be quantised: by bitsandbytes, GPTQModel, or
    `peft_elastic.quantize` / `load_gptq`.

    The weight of a quantised layer is dequantised, the update added, and the sum rounded again; so the merged model computes
    something else than the adapter was trained for, by as much as the report says. An update without a mask also fills the
    zeros of a sparse base. Layers of `SparseQALoraConfig(quantization_aware=True)` merge exactly, and the others into a base
    in floating point as `merge_and_unload` does.

    Args:
        model (`PeftModel`): with adapters of peft's `LoraConfig`, `ElasticLoraConfig` or `SparseQALoraConfig`.
        adapter_names (`list[str]`, *optional*): the adapters; by default the active ones.
        refit (`bool`): fit new scales and zero points to the merged weight instead of those of the base.
        progressbar (`bool`): show one.

    Returns:
        The base model, whose layers from `peft_elastic` or GPTQModel are `QuantizedLinear` and those of bitsandbytes are
        quantised by it as before; and the `RequantizationReport`.

    Raises:
        ValueError: if the model has no such adapter, or adapters on quantised layers whose update is no product B A (DoRA
            and other variants, `lora_bias`), or on a weight that is tied with another. Nothing is changed then.
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(model, PeftModel) or not isinstance(tuner, LoraModel):
        raise ValueError(f"`model` must be a PeftModel with LoRA adapters, got {type(model).__name__}.")
    unknown = sorted(set(adapter_names or ()) - set(model.peft_config))
    if unknown:
        raise ValueError(f"`adapter_names` has {unknown}; the model has {sorted(model.peft_config)}.")
    layers = {name: layer for name, layer in tuner.model.named_modules() if isinstance(layer, LoraLayer)}
    todo = {}
    for name, layer in layers.items():
        names = [n for n in adapter_names or layer.active_adapters if n in layer.lora_A]
        if names and _is_rounded_again(layer, names):
            _check(name, layer, names)
            todo[name] = names
    twice = check_tied_weights(tuner.model, adapter_names)

    rows = []
    for name, names in progress_bar(todo.items(), desc="Rounding again", disable=not progressbar):
        merged, row = _merge(layers[name], names, refit)
        rows.append({"name": name, **row})
        parent, _, child = name.rpartition(".")
        setattr(tuner.model.get_submodule(parent), child, merged)
    leave_gptqmodel(tuner.model)  # peft would refuse
    elastic = hasattr(tuner, "sample_subnet")
    options = {"sparse_kernel": False} if elastic else {}
    with merged_once({} if elastic else twice, adapter_names):  # an elastic tuner sees to it itself
        merged_model = model.merge_and_unload(progressbar=progressbar, adapter_names=adapter_names, **options)
    if grid_layers(merged_model):
        guard_saving(merged_model)
    return merged_model, RequantizationReport(rows)


def _is_rounded_again(layer: LoraLayer, names: list[str]) -> bool:
    backend = find_linear_backend(layer.get_base_layer())
    if backend is None or backend.obstacle("requantize") or not (backend.packed or backend.on_grid):
        return False
    return not (isinstance(layer, SparseLoraLinear) and all(name in layer.lora_grid for name in names))


def _check(name: str, layer: LoraLayer, names: list[str]) -> None:
    if layer.merged:
        raise ValueError(f"An adapter is merged into {name!r}; call `unmerge_adapter()` first.")
    for adapter in names:
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            raise ValueError(
                f"The update of adapter {adapter!r} in {name!r} is no product B A (DoRA or another variant, or `lora_bias`), "
                "which cannot be merged into a quantised layer."
            )


def _merge(layer: LoraLayer, names: list[str], refit: bool) -> tuple[nn.Module, dict[str, Any]]:
    base_layer = layer.get_base_layer()
    backend = backend_of(base_layer)
    grid = backend.grid(base_layer)
    before = backend.weight(base_layer).float()
    if grid is not None:
        before = grid.round(before)
    update = torch.zeros_like(before)
    for name in names:
        part = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float() * layer.scaling[name]
        if isinstance(layer, SparseLoraLinear) and layer.masked[name]:
            part *= before != 0
        update += part
    wanted = before + update
    merged: Any = base_layer
    if grid is None:
        backend.replace(base_layer, wanted)
        after = backend.weight(base_layer).float()
    else:
        if refit:
            grid = _refit(wanted, grid)
        else:
            grid = Grid.copy_of(grid)
        after = grid.round(wanted)
        bias = getattr(base_layer, "bias", None)
        if bias is not None and not isinstance(bias, nn.Parameter):  # a buffer, in a layer of GPTQModel
            bias = nn.Parameter(bias, requires_grad=False)
        merged = QuantizedLinear(nn.Parameter(after, requires_grad=False), bias, grid).train(base_layer.training)
    error = (after - wanted).norm()
    return merged, {
        "shape": list(wanted.shape),
        "update_error": float(error / update.norm().clamp(min=1e-30)),
        "weight_error": float(error / wanted.norm().clamp(min=1e-30)),
        "zeros_before": zero_share(before),
        "zeros_after": zero_share(after),
    }


def _refit(weight: torch.Tensor, grid: Grid) -> Grid:
    """A grid for another weight, with the same groups if these are of one size."""
    if bool((torch.bincount(grid.g_idx, minlength=grid.scales.shape[1]) != grid.group_size).any()):
        return fit_grid(weight, grid.bits, -1, grid.symmetric, "mse")
    by_group = weight[:, grid.g_idx.argsort(stable=True)]
    new = fit_grid(by_group, grid.bits, grid.group_size, grid.symmetric, "mse")
    g_idx = None if grid.in_order else grid.g_idx.clone()
    return Grid(new.scales, new.zeros, in_features=grid.in_features, bits=grid.bits, g_idx=g_idx)
