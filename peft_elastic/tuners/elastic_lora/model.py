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
"""The tuner of elastic adapters: what peft calls and users call, and where the work of each is done.

| module | job |
|---|---|
| `injection` | adapters into a base model, and back out if that fails |
| `subnets` | ranks and choices, what is active, what a training step activates |
| `base` | width, depth and order of the base |
| `merging` | into the base, and adapters into each other |
| `saving`, `export` | the files: elastic, and plain LoRA |
| `peft_model` | what a `PeftModel` shows |
| `layer`, `optimizers` | matrices that show their leading ranks, and optimizers on them |
| `state` | what a tuner knows |
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ...supernet.host import HOST_ATTRIBUTE
from ...supernet.space import SearchSpace, Subnet
from ...supernet.summary import SubnetSummary
from ..tied_weights import check_tied_weights, merged_once
from . import base, injection, merging, saving, subnets
from .config import ElasticLoraConfig
from .export import export_lora
from .state import ElasticState, Plan, active_adapters


class ElasticLoraModel(base.Sortable, LoraModel):
    """
    LoRA whose rank can be chosen, module by module, after training (peft type `ELASTIC_LORA`).

    The super-adapter is an ordinary LoRA adapter of rank `r`; sub-adapter k of a module consists of the first k rows
    of A and columns of B, with the same scaling: Delta W = s B[:, :k] A[:k, :], s = lora_alpha / r (Shears,
    https://huggingface.co/papers/2404.10934). Everything here is reached through the `PeftModel` that
    `get_peft_model` returns, e.g. `model.set_subnet("heuristic")`.

    Args:
        model (`nn.Module`): the model to adapt.
        config (`ElasticLoraConfig`): the configuration of the adapter.
        adapter_name (`str`): name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`): create empty adapter weights on the meta device.

    **Attributes**:
        - **search_space** (`SearchSpace`): the choices of the active adapter.
        - **active_subnet** (`Subnet`): what the layers compute now.
    """

    # All that is known here and not in peft's `LoraModel`; made with the first adapter.
    _state: ElasticState

    # -- injection -------------------------------------------------------------------------------------------------

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        # `inject_adapter` puts a copy in the place of a configuration, and a dict of them is the caller's as well
        own = dict(peft_config) if isinstance(peft_config, dict) else peft_config
        super().__init__(model, own, *args, **kwargs)

    @property
    def _configs(self) -> dict[str, Any]:
        """The configurations of all adapters, which transformers removes with the last one."""
        return getattr(self, "peft_config", {})

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Optional[dict[str, torch.Tensor]] = None,
    ) -> None:
        """As in peft. Everything that can be refused is refused before the model is changed; if injection fails all the
        same, the model is put back. The adapter gets a copy of the configuration, as it notes in it what it finds and chooses."""
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        if "_state" not in self.__dict__:
            self._state = injection.first_state(model, self._configs)
        state = self._state
        if adapter_name == state.weighted_adapter:
            config.elastic_ranks = [config.r]
        with injection.unchanged_on_error(self, model, adapter_name):
            with base.whole_base(state, model, self._configs):  # whose weights and sizes a new adapter may start from
                self._check_injection(model, adapter_name, state_dict)
                self._convert_targets(config, model)
                base.unpack_weights(model)
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            injection.make_layers_elastic(model, adapter_name)
            state.adapters = subnets.find_adapters(state, model, self._configs, adapter_name)
            base.settle_order(state, model, config)
            subnets.activate_chosen(state, model, self._configs, adapter_name, when_loaded=not state.in_peft_model)
        config.initialized_with = config.init_lora_weights
        model.__dict__[HOST_ATTRIBUTE] = self
        injection.tag_model(state, model)

    def _check_injection(
        self, model: nn.Module, adapter_name: str, state_dict: Optional[dict[str, torch.Tensor]]
    ) -> None:
        """Raise a ValueError if the adapter could not be injected, or not be elastic then."""
        config = self.peft_config[adapter_name]
        config.check()
        injection.check_model(model)
        converted = copy.deepcopy(config)
        self._convert_targets(converted, model)
        trial = copy.deepcopy(converted)
        plan = self._plan_injection(model, adapter_name, trial, state_dict)
        usual = self.target_module_mapping.get(self.get_model_config(model).get("model_type"), ())
        injection.check_names(config, converted, model, plan, usual, by_state_dict=state_dict is not None)
        for path, (module, rank) in plan.items():
            self._check_target(module, path, rank, config)
        subnets.check_choices(self._state, model, self._configs, adapter_name, trial, plan)

    def _check_target(self, module: nn.Module, path: str, rank: int, config: ElasticLoraConfig) -> None:
        injection.check_target(module, path, rank, config)

    def _convert_targets(self, config: ElasticLoraConfig, model: nn.Module) -> None:
        injection.convert_targets(config, model)

    def _plan_injection(self, model: nn.Module, adapter_name: str, config: Any, state_dict: Any) -> Plan:
        inject = functools.partial(super().inject_adapter, model, adapter_name, state_dict=state_dict)
        return injection.plan_injection(self._state, self.peft_config, adapter_name, config, inject)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if self._state.plan is None:
            super()._prepare_model(peft_config, model)

    def _create_and_replace(
        self, lora_config: Any, adapter_name: str, target: nn.Module, *args: Any, current_key: str, **kwargs: Any
    ) -> None:
        if self._state.plan is None:
            super()._create_and_replace(lora_config, adapter_name, target, *args, current_key=current_key, **kwargs)
        else:
            injection.note_target(self._state.plan, lora_config, target, current_key)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        # peft's guards ask for the type LORA
        super()._check_target_module_compatiblity(injection.as_lora(peft_config), model, target_name)

    # -- search space and subnets ----------------------------------------------------------------------------------

    def _resolve_adapter(self, adapter_name: Optional[str]) -> str:
        return subnets.resolve_adapter(self.model, self._configs, adapter_name)

    def get_search_space(self, adapter_name: Optional[str] = None) -> SearchSpace:
        """Get the search space of an adapter.

        Args:
            adapter_name (`str`, *optional*): the adapter; defaults to the active one.

        Raises:
            ValueError: if there is no such adapter, several are active and none is named, or it adapts no layer.
        """
        return self._state.adapter(self._resolve_adapter(adapter_name)).space

    @property
    def search_space(self) -> SearchSpace:
        """The search space of the active adapter."""
        return self.get_search_space()

    @property
    def active_subnet(self) -> Subnet:
        """What the layers of the active adapter compute now."""
        return self.get_active_subnet()

    def get_active_subnet(self, adapter_name: Optional[str] = None) -> Subnet:
        """Read from the layers of an adapter what they compute now.

        Args:
            adapter_name (`str`, *optional*): the adapter; defaults to the active one.
        """
        return subnets.read_subnet(self._state, self._resolve_adapter(adapter_name))

    def set_subnet(self, subnet: Subnet | Mapping[str, int] | str, adapter_name: Optional[str] = None) -> None:
        """Choose the subnet that the model computes from now on. The choice is saved with the adapter.

        Args:
            subnet (`Subnet`, `Mapping[str, int]` or `str`):
                A subnet of `search_space`, a dict from choice key to value, or `"max"`, `"min"`, `"heuristic"`.
            adapter_name (`str`, *optional*): the adapter; defaults to the active one.

        Raises:
            ValueError: if the subnet does not belong to the search space, or the adapter is merged.
        """
        subnets.choose(self._state, self.model, self._configs, self._resolve_adapter(adapter_name), subnet)

    def sample_subnet(self, subnet: Subnet | Mapping[str, int] | str, adapter_name: Optional[str] = None) -> None:
        """Activate a subnet for a training step, without choosing it: saving and `restore_subnet()` go by the chosen one, and
        so does evaluation mode, after which `model.train()` goes on with the step.

        Args:
            subnet: as in `set_subnet`.
            adapter_name (`str`, *optional*): the adapter; defaults to the active one.
        """
        subnets.sample(self._state, self.model, self._configs, self._resolve_adapter(adapter_name), subnet)

    def restore_subnet(self) -> None:
        """Activate the chosen subnet of every adapter again (see `set_subnet`; the maximal one if none was chosen)."""
        subnets.restore(self._state, self.model, self._configs)

    def subnet_summary(self, adapter_name: Optional[str] = None) -> SubnetSummary:
        """Sum up what is active, as a table when printed.

        Args:
            adapter_name (`str`, *optional*): the adapter; defaults to the active one.
        """
        adapter_name = self._resolve_adapter(adapter_name)
        return SubnetSummary(adapter_name, self.get_active_subnet(adapter_name), self.get_search_space(adapter_name))

    def train(self, mode: bool = True) -> ElasticLoraModel:
        super().train(mode)
        if mode:
            base.unpack_weights(self.model)
            subnets.resume(self._state, self.model, self._configs)
            subnets.warn_if_one_is_trained(self._state, self.model, self._configs)
        else:
            subnets.suspend(self._state, self.model, self._configs)
        return self

    # -- width, depth and order of the base ------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if isinstance(names, (list, tuple)):  # peft checks them otherwise
            base.check_batch(self._state, self.model, self._configs, names)
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        injection.end_plan(self._state)  # as this is the first thing that peft does after the last module
        if base.is_enabled(self.model):
            base.check_together(self._state, [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        base.apply_structure(self._state, self.model, self._configs)

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        base.apply_structure(self._state, self.model, self._configs)

    def disable_adapter_layers(self) -> None:
        super().disable_adapter_layers()
        base.apply_structure(self._state, self.model, self._configs)

    def delete_adapter(self, adapter_name: str) -> None:
        self._state.structural_values.pop(adapter_name, None)  # lets go of the base
        super().delete_adapter(adapter_name)
        base.apply_structure(self._state, self.model, self._configs)
        self._state.adapters.pop(adapter_name, None)

    def sort_by_importance(
        self,
        calibration: Any = None,
        importance: Optional[str | Mapping[str, torch.Tensor]] = None,
        *,
        max_samples: Optional[int] = None,
        progress: bool = True,
        optimizer: Any = None,
        averaged: Any = None,
    ) -> dict[str, torch.Tensor]:
        """Sort the heads and MLP channels of the base, and all adapters along, by falling importance, before a training or in the middle
        of one (then with its `optimizer`). What the whole model computes does not change.

        Args:
            importance (*optional*): as in `peft_elastic.sort_by_importance`; defaults to that of the configuration.
            calibration, max_samples, progress, optimizer, averaged (*optional*): as there.

        Returns:
            `dict[str, torch.Tensor]`: the scores in the new order.

        Raises:
            ValueError: as there, and if no adapter is elastic in width.
        """
        settings = {"max_samples": max_samples, "progress": progress, "optimizer": optimizer, "averaged": averaged}
        return base.sort_base(self._state, self.model, self._configs, calibration, importance, **settings)

    # -- out -------------------------------------------------------------------------------------------------------

    def export_lora(
        self, save_directory: str | os.PathLike[str], adapter_name: Optional[str] = None, *, pad: bool = True
    ) -> None:
        """Write the active sub-adapter as a plain LoRA adapter, which peft loads without this package.

        Args:
            save_directory (`str` or `os.PathLike`): the folder; it is created, and gets `adapter_config.json` and
                `adapter_model.safetensors`. Those of an earlier adapter are replaced once the new ones are complete.
            adapter_name (`str`, *optional*): the adapter; defaults to the active one.
            pad (`bool`, defaults to `True`):
                Fill the matrices of smaller ranks up with zeros to the largest rank that is active, and put what modules differ
                in scaling into B: one rank and one scaling for all, which every program reads alike. llama.cpp scales each
                tensor by `lora_alpha` over its own rank, vLLM by `lora_alpha / r`. False writes the active ranks alone, with a
                `rank_pattern` and an `alpha_pattern`, which peft reads.

        Raises:
            ValueError: if the adapter changed the base weights when it was initialised (PiSSA and relatives), or the active
                subnet narrows or skips parts of the base.
            OSError: if the folder cannot be written; nothing is changed then.
        """
        adapter_name = self._resolve_adapter(adapter_name)
        layers = self._state.layers(adapter_name)
        base.check_exportable(self._state, adapter_name)
        merging.check_layers_here(self._state, [adapter_name])
        with base.whole_base(self._state, self.model, self._configs):
            export_lora(self.model, self.peft_config[adapter_name], adapter_name, save_directory, layers, pad)

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        """As in peft; what can be refused is refused before any layer is merged."""
        merging.check_not_narrowed(self.model)
        merging.check_not_tied(self.model, self._check_merge(adapter_names, safe_merge))
        super().merge_adapter(adapter_names, safe_merge)

    def _check_merge(self, adapter_names: Optional[list[str]], safe_merge: bool) -> dict[LoraLayer, LoraLayer]:
        """Raise a ValueError if merging these adapters, or the active ones, would change what the model computes. See
        `check_tied_weights` for what is returned."""
        names = active_adapters(self.model, self._configs) if adapter_names is None else adapter_names
        merging.check_merges(self._state, names, self._check_merge_into)
        return check_tied_weights(self.model, adapter_names)

    def _check_merge_into(self, layer: LoraLayer, adapter_name: str, path: str) -> None:
        merging.check_merge_into(layer, adapter_name, path)

    def _unload_and_optionally_merge(
        self, merge: bool = True, progressbar: bool = False, safe_merge: bool = False, adapter_names: Any = None
    ) -> nn.Module:
        twice = self._check_merge(adapter_names, safe_merge) if merge else {}
        merging.settle_base(self._state, self.model, self._configs, merge, adapter_names)
        with merged_once(twice, adapter_names):
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        merging.clean_up(self._state, model, merged=merge)
        return model

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
        *,
        sparse_kernel: str | bool = "auto",
        sparse_dtype: str = "bf16",
    ) -> nn.Module:
        """Merge the active subnet into the base model and unload the adapter; then swap in sparse layers where they pay.

        Merging a dense LoRA update fills the zeros of the layers that it changes; those that are still sparse are swapped.

        Args:
            progressbar, safe_merge, adapter_names: as in peft.
            sparse_kernel (`str` or `bool`): "auto" calls `peft_elastic.sparsify_linears` if the model is on the CPU and the C++
                extension is there, which swaps the layers that are measured to be faster; True swaps every layer with 30% zeros or more
                and raises where it cannot; False does nothing.
            sparse_dtype (`str`): "bf16" or "int8", of the values of the sparse layers. Weights are rounded to it.

        Returns:
            `nn.Module`: the base model, with the same modules but for the `SparseLinear` layers.

        Raises:
            ValueError: on a wrong argument, before anything is merged.
        """
        from ...deploy.merged import can_be_sparse, make_sparse

        swap = can_be_sparse(self.model, sparse_kernel, sparse_dtype)
        model = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        if swap:
            make_sparse(model, sparse_kernel, sparse_dtype, progressbar)
        return model

    def extract_subnet(
        self,
        subnet: Optional[Subnet | Mapping[str, int] | str] = None,
        *,
        sparse_kernel: str | bool = "auto",
        sparse_dtype: str = "bf16",
    ) -> nn.Module:
        """Copy what belongs to a subnet, and merge the adapter into it: `merge_and_unload`, while the super-network stays as it is.

        Args:
            subnet (`Subnet`, `Mapping[str, int]` or `str`, *optional*): as in `set_subnet`; the chosen one by default.
            sparse_kernel, sparse_dtype: as in `merge_and_unload`.

        Returns:
            `nn.Module`: a smaller ordinary model. Saved with `save_pretrained`, it loads with `from_pretrained`: of a subnet whose
            blocks are all alike without this package, otherwise after `import peft_elastic`.

        Raises:
            ValueError: as `set_subnet` and `merge_and_unload`.
        """
        merging.check_layers_here(self._state, active_adapters(self.model, self._configs))
        copied = copy.deepcopy(self)
        if subnet is None:
            copied.restore_subnet()
        else:
            copied.set_subnet(subnet)
        return copied.merge_and_unload(sparse_kernel=sparse_kernel, sparse_dtype=sparse_dtype)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As in peft; each adapter enters with its active subnet, and the new adapter has a fixed rank."""
        if adapter_name in self.peft_config or not adapters or not set(adapters) <= set(self.peft_config):
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)  # peft's own answer
            return
        with merging.weighted(self._state, self.model, self.peft_config, adapters, adapter_name):
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)

    # -- saving and loading ----------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        state_dict = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        return saving.add_orders(model, config, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: Any, config: Any, adapter_name: str, state_dict: Any) -> Any:
        prepared = saving.prepare_load(model, config, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, prepared)

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: Any,
        peft_config: Any,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, torch.Tensor],
        kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Turn a trained PiSSA, OLoRA or CorDA adapter into one for the original base model, and keep it elastic."""
        initial = path_initial_model_for_weight_conversion
        saving.save_initial_config(peft_model, peft_config, initial)
        converted = super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, initial, output_state_dict, kwargs
        )
        return saving.put_initial_in_front(peft_model, peft_config, output_state_dict, converted)
