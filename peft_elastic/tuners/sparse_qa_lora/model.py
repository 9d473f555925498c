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

import copy
import os
import warnings
from typing import Any, Optional

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...layers.backends import backend_of, find_linear_backend, grid_layers
from ...layers.backends.gptqmodel import leave_gptqmodel
from ...layers.grid import Grid
from ...quantization.saving import guard_saving
from ..elastic_lora import ElasticLoraModel, merging
from ..elastic_lora.state import find_layers
from .config import SparseQALoraConfig
from .layer import SparseLoraLinear, check_base_in_memory, check_target


# A base with fewer zeros than that has not been pruned.
_FEW_ZEROS = 0.01


class SparseQALoraModel(ElasticLoraModel):
    """
    Elastic LoRA that merges without losing the sparsity or the precision of its base (peft type `SPARSE_QA_LORA`; SQFT,
    https://huggingface.co/papers/2410.03750). See [`SparseQALoraConfig`] for the choices, and [`ElasticLoraModel`] for what a
    model with elastic adapters can do.

    Args:
        model (`nn.Module`): the model to adapt.
        config (`SparseQALoraConfig`): the configuration of the adapter.
        adapter_name (`str`): name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`): create empty adapter weights on the meta device.
    """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        layers = [layer for _, layer in find_layers(self.model, adapter_name) if isinstance(layer, SparseLoraLinear)]
        if config.quantization_aware:
            _note_grid(config, [layer.lora_grid[adapter_name] for layer in layers])
        if config.sparse_adapter and layers and not config.inference_mode:
            _warn_if_dense(layers)

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        backend = find_linear_backend(layer)
        if backend is None or backend.obstacle("mask"):
            return ElasticLoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)
        return SparseLoraLinear(target, adapter_name, config=lora_config, **kwargs)

    def _convert_targets(self, config: Any, model: nn.Module) -> None:
        """As in `ElasticLoraModel`, but "all-linear" stays what it says: what transformers 5 made of routers and experts are no
        linear layers, and could be neither masked nor rounded."""
        given = copy.deepcopy(config)
        super()._convert_targets(config, model)
        all_linear = isinstance(given.target_modules, str) and given.target_modules.lower() == "all-linear"
        if all_linear and (config.sparse_adapter or config.quantization_aware):
            config.target_parameters = given.target_parameters
            config.rank_pattern, config.alpha_pattern = given.rank_pattern, given.alpha_pattern

    def _check_target(self, module: nn.Module, path: str, rank: int, config: Any) -> None:
        super()._check_target(module, path, rank, config)
        check_target(module, path, config)

    def export_lora(
        self, save_directory: str | os.PathLike[str], adapter_name: Optional[str] = None, *, pad: bool = True
    ) -> None:
        """As in `ElasticLoraModel`, for adapters that are neither masked nor quantisation-aware.

        Raises:
            ValueError: for the others: a plain LoRA adapter would be added without the mask and the rounding.
        """
        adapter_name = self._resolve_adapter(adapter_name)
        config = self.peft_config[adapter_name]
        if config.sparse_adapter or config.quantization_aware:
            raise ValueError(
                f"Adapter {adapter_name!r} is masked by the zeros of its base, or rounded together with it, which a plain LoRA "
                "adapter is not. Merge it: `merge_and_unload()`."
            )
        super().export_lora(save_directory, adapter_name, pad=pad)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As in `ElasticLoraModel`. The combined update is masked, or rounded on the same grid, as those of the adapters.

        Raises:
            ValueError: if these differ in that.
        """
        layers = [module for module in self.model.modules() if isinstance(module, SparseLoraLinear)]
        if adapter_name not in self.peft_config:
            kinds = {(c.sparse_adapter, c.quantization_aware) for n, c in self.peft_config.items() if n in adapters}
            if len(kinds) > 1:
                raise ValueError(
                    f"The adapters {adapters} cannot be combined: `sparse_adapter` or `quantization_aware` differ."
                )
            for layer in layers:
                names = [name for name in adapters if name in layer.lora_A]
                if names:
                    layer.kind(names)
        try:
            for layer in layers:
                layer.unmasked_delta = True
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            for layer in layers:
                layer.unmasked_delta = False
        for layer in layers:
            grids: list[Any] = [layer.lora_grid[name] for name in adapters if name in layer.lora_grid]
            if grids and adapter_name in layer.lora_grid:
                layer.lora_grid[adapter_name] = Grid.copy_of(grids[0], persistent=True)

    def _check_merge(self, adapter_names: Optional[list[str]], safe_merge: bool) -> dict[LoraLayer, LoraLayer]:
        twice = super()._check_merge(adapter_names, safe_merge)
        for module in self.model.modules():
            if isinstance(module, SparseLoraLinear):
                names = module.active_adapters if adapter_names is None else adapter_names
                new = [name for name in names if name in module.lora_A and name not in module.merged_adapters]
                if new:
                    check_base_in_memory(module)
                    module.check_merge([*module.merged_adapters, *new], safe_merge)
        return twice

    def _check_merge_allowed(self) -> None:
        # peft refuses to merge into any model that GPTQModel quantised; `_check_merge_into` knows which layers lose by it
        method = self.model.__dict__.get("quantization_method")
        if getattr(method, "value", method) == "gptq":
            del self.model.quantization_method
        try:
            super()._check_merge_allowed()
        finally:
            if method is not None:
                self.model.quantization_method = method

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if merge:
            leave_gptqmodel(model)
            if grid_layers(model):
                guard_saving(model)
        return model

    def _check_merge_into(self, layer: LoraLayer, adapter_name: str, path: str) -> None:
        if isinstance(layer, SparseLoraLinear) and adapter_name in layer.lora_grid:
            merging.check_in_memory(layer, adapter_name, path)
            return  # merges exactly
        super()._check_merge_into(layer, adapter_name, path)


def _note_grid(config: SparseQALoraConfig, grids: list[Any]) -> None:
    """Write what was taken over from the base into the configuration, so that the adapter loads on any base."""
    if config.group_size is None and all(grid.scales.shape[1] == 1 for grid in grids):
        config.group_size = -1
    for option in ("bits", "group_size", "symmetric"):
        if getattr(config, option) is None:
            values = {getattr(grid, option) for grid in grids}
            if len(values) == 1:
                setattr(config, option, values.pop())


def _warn_if_dense(layers: list[SparseLoraLinear]) -> None:
    weights = zeros = 0
    for layer in layers:
        base_layer = layer.get_base_layer()
        weight = backend_of(base_layer).weight(base_layer)
        if weight.is_meta:
            return
        weights += weight.numel()
        zeros += weight.numel() - int(torch.count_nonzero(weight))
    if zeros < _FEW_ZEROS * weights:
        warnings.warn(
            f"`sparse_adapter=True`, but only {zeros / weights:.2%} of the weights that get an adapter are zero, so there is "
            "hardly a mask. Prune the model first (`peft_elastic.prune(model, WandaConfig(sparsity=0.5), calibration)`), or "
            "set `sparse_adapter=False`."
        )
