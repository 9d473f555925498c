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
import functools
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Optional

import torch
from peft import PeftConfig, PeftModel, PeftModelForQuestionAnswering, PeftModelForTokenClassification
from peft.tuners.lora import LoraModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, AuxiliaryTrainingWrapper, PeftType
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import _validate_lora_adapter_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_module_registration_hook

from ...common.checks import check_choice
from ...common.parameters import check_parameters
from ...deploy.sparsify import find_obstacle, sparsify_linears
from ...layers.backends.bitsandbytes import allow_packing, is_bitsandbytes, keep_unpacked, unpack
from ...layers.backends.gptqmodel import is_gptqmodel
from ...layers.quantized_linear import QuantizedLinear
from ...layers.values import ROUNDED
from ...structure.blocks import Structure
from ...structure.description import extract_described, undescribable
from ...structure.importance import (
    check_sortable,
    is_stored_in,
    move_adapter,
    note_orders,
    noted_orders,
    reorder,
    same_orders,
    sort_by_importance,
)
from ...structure.modules import module_at
from ...structure.narrow import active_ranges, is_narrowed
from ...structure.parts import KINDS, Width
from ...structure.space import activate, check_depth, check_narrowable_layers, layer_shapes, structural_choices
from ...supernet.groups import find_blocks, group_modules, plain_path
from ...supernet.host import HOST_ATTRIBUTE
from ...supernet.space import Choice, SearchSpace, Subnet
from ..tied_weights import check_tied_weights, merged_once
from .config import ElasticLoraConfig
from .export import FILE_PREFIX, ORDER_SUFFIX, export_lora
from .layer import (
    check_ranks,
    full_weights,
    get_rank,
    is_elastic,
    make_elastic,
    rank_multiple,
    read_unpacked,
    set_rank,
    set_width,
    zero_inactive,
)
from .optimizers import watch_optimizers


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SubnetSummary:
    """What is active in an elastic adapter; printing it gives a table.

    Args:
        adapter_name (`str`): the adapter.
        subnet (`Subnet`): the active subnet.
        space (`SearchSpace`): the space it comes from.
    """

    adapter_name: str
    subnet: Subnet
    space: SearchSpace

    @property
    def active_parameters(self) -> int:
        """Adapter parameters the active subnet uses (A and B matrices)."""
        return self.space.count_parameters(self.subnet)

    @property
    def total_parameters(self) -> int:
        """Adapter parameters of the whole super-adapter (A and B matrices)."""
        return self.space.count_parameters(self.space.max)

    @property
    def name(self) -> str:
        """`"max"`, `"min"`, `"heuristic"` or `"custom"`."""
        for name in ("max", "min", "heuristic"):
            if self.subnet == getattr(self.space, name):
                return name
        return "custom"

    def describe(self) -> str:
        """One line: name, active and total parameters of the adapter and, where width or depth change them, of those blocks."""
        share = 100 * self.active_parameters / max(1, self.total_parameters)
        text = (
            f"active subnet of adapter {self.adapter_name!r}: {self.name} "
            f"({self.active_parameters:,d} of {self.total_parameters:,d} adapter parameters, {share:.1f}%"
        )
        if self.space.layers:
            active, total = (self.space.count_base_parameters(s) for s in (self.subnet, self.space.max))
            text += (
                f"; {active:,d} of {total:,d} base parameters in elastic blocks, {100 * active / max(1, total):.1f}%"
            )
        return f"{text})"

    def __str__(self) -> str:
        width = max(len(choice.key) for choice in self.space)
        rows = [
            f"{choice.key:<{width}}  {self.subnet[choice.key]:>6}  of {list(choice.options)}" for choice in self.space
        ]
        return "\n".join([self.describe(), *rows])

    __repr__ = __str__


class _ElasticAdapter(NamedTuple):
    layers: dict[str, LoraLayer]
    space: SearchSpace
    # of the base, if subnets differ in its width or depth
    structure: Optional[Structure]


class _PlanIsComplete(Exception):
    """Ends the dry run of an injection."""


class ElasticLoraModel(LoraModel):
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

    # Layers and search space by adapter.
    _elastic_adapters: dict[str, _ElasticAdapter]
    # By adapter, the values of the choices of width and depth in its active subnet.
    _structural_values: dict[str, dict[str, int]]
    # Which adapters were active, if any, when the base was narrowed last.
    _followed: Any = None
    # Keeps the base narrowed as the active adapter wants it, whoever activates that; a hook on the base model.
    _follower: Any = None
    # Tells that the weights of an adapter fit a sorted base only; on the base model, until that is sorted.
    _order_guard: Any = None
    # The noted orders of the base when the first adapter came.
    _own_orders: Optional[dict[str, torch.Tensor]] = None
    # During the dry run of an injection: path -> (module to adapt, its maximal rank).
    _plan: Optional[dict[str, tuple[nn.Module, int]]] = None
    # The adapter that `add_weighted_adapter` is about to create.
    _weighted_adapter: Optional[str] = None
    # Whether a PeftModel wraps this tuner; transformers' `model.add_adapter` and `load_adapter` do without one.
    _in_peft_model: bool = False
    # Whether the base model got its tag from here.
    _tagged: bool = False
    # Whether a subnet other than the chosen one is active; only ever between `sample_subnet` and `restore_subnet`.
    _sampled: bool = False
    # By adapter, what was active when evaluation mode interrupted a training step, and is again in training mode.
    _suspended: Mapping[str, Subnet] = MappingProxyType({})
    # The state of the adapter weights when the model was last put into training mode, to notice one-subnet training.
    _trained_version: Optional[list[float]] = None
    _warned_about_sampling: bool = False

    # -- injection -------------------------------------------------------------------------------------------------

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        # `inject_adapter` puts a copy in the place of a configuration, and a dict of them is the caller's as well
        own = dict(peft_config) if isinstance(peft_config, dict) else peft_config
        super().__init__(model, own, *args, **kwargs)

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
        if "_elastic_adapters" not in self.__dict__:
            self._elastic_adapters, self._structural_values = {}, {}
            self._take_over(model)
        if self._own_orders is None:
            self._own_orders = noted_orders(model)
        if adapter_name == self._weighted_adapter:
            config.elastic_ranks = [config.r]
        with self._unchanged_on_error(model, adapter_name):
            with self._whole_base():  # whose weights and sizes a new adapter may start from
                self._check_injection(model, adapter_name, state_dict)
                self._convert_targets(config, model)
                for module in model.modules():
                    unpack(module)
                super().inject_adapter(
                    model,
                    adapter_name,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    state_dict=state_dict,
                )
            for name, layer in self._find_layers(adapter_name):
                make_elastic(layer, adapter_name, name)
                layer.kwargs.pop("tied_adapter", None)  # views that would keep the model from being copied
                if is_bitsandbytes(base_layer := layer.get_base_layer()):
                    read_unpacked(layer)
                    if adapter_name in layer.lora_variant:  # which reads the weight in every forward pass
                        keep_unpacked(base_layer)
            self._elastic_adapters = self._find_elastic_adapters(adapter_name)
            self._settle_order(adapter_name)
            self._activate_chosen(adapter_name, when_loaded=not self._in_peft_model)
        config.initialized_with = config.init_lora_weights
        model.__dict__[HOST_ATTRIBUTE] = self
        # peft tags the model card of adapters of type LORA only
        tags = getattr(model, "model_tags", None) or []
        if "lora" not in tags:
            model.model_tags = [*tags, "lora"]
            self._tagged = True

    def _take_over(self, model: nn.Module) -> None:
        """Go on from the tuner of the adapters that are there: transformers' `add_adapter` makes a new one for each."""
        before = model.__dict__.get(HOST_ATTRIBUTE)
        if before is not None:
            there = self._elastic_configs()
            self._elastic_adapters = {k: v for k, v in before._elastic_adapters.items() if k in there}
            self._structural_values = {k: v for k, v in before._structural_values.items() if k in there}
            for name in ("_followed", "_follower", "_order_guard", "_own_orders", "_tagged"):
                setattr(self, name, getattr(before, name))

    def _check_injection(
        self, model: nn.Module, adapter_name: str, state_dict: Optional[dict[str, torch.Tensor]]
    ) -> None:
        """Raise a ValueError if the adapter could not be injected, or not be elastic then."""
        config = self.peft_config[adapter_name]
        config.check()
        if getattr(model, "_tp_size", None) not in (None, 1):
            raise ValueError("Tensor-parallel models cannot get elastic adapters. Use `LoraConfig`.")
        converted = copy.deepcopy(config)
        self._convert_targets(converted, model)
        trial = copy.deepcopy(converted)
        plan = self._plan_injection(model, adapter_name, trial, state_dict)
        self._check_names(config, converted, model, plan, by_state_dict=state_dict is not None)

        for path, (module, rank) in plan.items():
            self._check_target(module, path, rank, config)
        ranks = {plain_path(path): rank for path, (_, rank) in plan.items()}
        multiples = {plain_path(path): rank_multiple(module) for path, (module, _) in plan.items()}
        choices = self._build_choices(trial, ranks, multiples, model)
        choices += self._check_structure(trial, model, {path: module for path, (module, _) in plan.items()})
        # with `layer_replication`, the layers that are to come are not known yet
        if config.active_subnet is not None and not config.layer_replication:
            _check_active_subnet(config, adapter_name, choices)

    def _check_names(
        self,
        config: ElasticLoraConfig,
        converted: ElasticLoraConfig,
        model: nn.Module,
        plan: Mapping[str, tuple[nn.Module, int]],
        by_state_dict: bool,
    ) -> None:
        """Raise a ValueError if what the user named matches nothing at all, and warn of single names that do not: lists are made
        for many architectures. Names that peft derived, for other checkpoints of the family, are not held against anybody.

        Args:
            converted: `config` after `_convert_targets`.
            plan: as `_plan_injection` returned it.
            by_state_dict: whether peft goes by the keys of a state dict in place of the names.
        """
        usual = self.target_module_mapping.get(self.get_model_config(model).get("model_type"), ())
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        for field, paths in (("target_modules", modules), ("target_parameters", [*parameters, *plan])):
            given, targets = getattr(config, field), getattr(converted, field)
            if not given or isinstance(given, str):
                continue
            named = set(given) & set(targets or ())
            ends = {".".join(parts[i:]) for path in paths for parts in [path.split(".")] for i in range(len(parts))}
            unmatched = sorted(named - ends - set(usual))
            if unmatched and len(unmatched) == len(named) and not by_state_dict:
                raise ValueError(f"`{field}` names {unmatched}, which are not in the base model.")
            if unmatched:
                warnings.warn(f"`{field}` names {unmatched}, which are not in the base model and get no adapter.")
        for field in ("rank_pattern", "alpha_pattern"):
            patterns = set(getattr(converted, field)) & set(getattr(config, field))
            unmatched = sorted(patterns - {get_pattern_key([key], path) for key in patterns for path in plan})
            if unmatched:
                raise ValueError(f"`{field}` has the keys {unmatched}, which match no module that gets an adapter.")

    def _check_structure(
        self, config: ElasticLoraConfig, model: nn.Module, targets: Mapping[str, nn.Module]
    ) -> list[Choice]:
        """The choices of width and depth. Raise a ValueError if the base, or what gets an adapter in it, does not allow them."""
        if not config.is_structural:
            return []
        structure = Structure(model)
        choices = structural_choices(structure, config.elastic_width, config.depth_entries)
        check_narrowable_layers(model, structure, choices)
        inside = [f"{block.path}." for block in structure.blocks]
        for path, module in model.named_modules():
            named = any(path == name or path.endswith(f".{name}") for name in config.modules_to_save or ())
            trained = named or isinstance(module, AuxiliaryTrainingWrapper)
            if trained and any(f"{path}.".startswith(block) or block.startswith(f"{path}.") for block in inside):
                raise ValueError(
                    f"`modules_to_save`: {path!r} is in, or around, a block whose width or depth is elastic. Leave it out."
                )
        narrowed = {name for choice in choices if choice.kind in KINDS for name in choice.modules}
        parameters = (
            {name.rpartition(".")[0] for name, _ in model.named_parameters()} if config.target_parameters else ()
        )
        for path in narrowed:
            if isinstance(targets.get(path), nn.Embedding):
                raise ValueError(f"`target_modules`: the embedding {path!r} is narrowed with the heads; leave it out.")
            if path in parameters and any(f"{path}.weight".endswith(name) for name in config.target_parameters or ()):
                raise ValueError(f"`target_parameters`: the weight of {path!r} is narrowed; use `target_modules`.")
        if config.elastic_width and config.importance == "magnitude" and not config.sorted_base:
            if not noted_orders(model):
                others = [name for name, c in self._elastic_configs().items() if c is not config and c.elastic_width]
                if set(others) & set(self._elastic_adapters):
                    raise ValueError(
                        f"`importance='magnitude'` would sort the base under adapter {others[0]!r}, which keeps its first heads "
                        "and channels as they are; use 'none'."
                    )
            check_sortable(model, _widths(structure, config))
        smallest = {choice.key: min(choice.options) for choice in choices if len(choice.options) > 1}
        for key, why in undescribable(model, smallest).items():
            kind, _, name = key.partition(":")
            field = "elastic_depth" if kind == "depth" else f"elastic_width[{kind!r}]"
            raise ValueError(f"`{field}`: a subnet with less of {name!r} could not be saved and loaded. {why}")
        return choices

    def _check_target(self, module: nn.Module, path: str, rank: int, config: ElasticLoraConfig) -> None:
        """Raise a ValueError if this module could not get an adapter of that maximal rank."""
        check_ranks(module, path, config.rank_options(rank, rank_multiple(module)))
        if config.init_lora_weights == "mica" and isinstance(module, nn.Embedding):
            # MiCA freezes B through the slice that indexing returns, which cannot be frozen
            raise ValueError(f"{path!r} is an embedding, which cannot be elastic with `init_lora_weights='mica'`.")

    def _convert_targets(self, config: ElasticLoraConfig, model: nn.Module) -> None:
        """As peft does for LORA: name what transformers 5 made of the experts' modules, e.g. Mixtral's w1, w2, w3."""
        as_lora = _as_lora(config)
        convert_peft_config_for_transformers(as_lora, model=model, conversions=None)
        config.target_modules, config.target_parameters = as_lora.target_modules, as_lora.target_parameters
        config.rank_pattern, config.alpha_pattern = as_lora.rank_pattern, as_lora.alpha_pattern

    def _plan_injection(
        self,
        model: nn.Module,
        adapter_name: str,
        config: ElasticLoraConfig,
        state_dict: Optional[dict[str, torch.Tensor]],
    ) -> dict[str, tuple[nn.Module, int]]:
        """Let peft go through the whole model to find what `config` targets, without replacing anything."""
        own_config = self.peft_config[adapter_name]
        self.peft_config[adapter_name] = config
        self._plan = {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the injection itself will give them
                super().inject_adapter(model, adapter_name, state_dict=state_dict)
        except _PlanIsComplete:
            pass
        finally:
            plan, self._plan = self._plan, None
            self.peft_config[adapter_name] = own_config
        return plan

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        if self._plan is None:
            super()._prepare_model(peft_config, model)

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: Optional[str] = None,
    ) -> None:
        if self._plan is None:
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
            )
            return
        module = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        pattern = get_pattern_key(lora_config.rank_pattern.keys(), current_key)
        rank = lora_config.rank_pattern.get(pattern, lora_config.r)
        self._plan[current_key] = (module, rank)
        if isinstance(module, nn.MultiheadAttention):
            self._plan[f"{current_key}.out_proj"] = (module.out_proj, rank)

    @contextmanager
    def _unchanged_on_error(self, model: nn.Module, adapter_name: str) -> Iterator[None]:
        """Take an injection back if it fails."""
        requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
        active = {module: module._active_adapter for module in model.modules() if isinstance(module, _WRAPPERS)}
        targeted = list(self.targeted_module_names), list(self.targeted_parameter_names)
        try:
            yield
        except Exception:
            self.targeted_module_names, self.targeted_parameter_names = targeted
            self.peft_config.pop(adapter_name, None)
            _remove_adapter(model, adapter_name, active)
            for parameter, flag in requires_grad.items():
                parameter.requires_grad_(flag)
            if not hasattr(model, "peft_config") and getattr(model, "_hf_peft_config_loaded", False):
                model._hf_peft_config_loaded = False  # set by transformers' `add_adapter` beforehand
            raise

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        # peft's guards ask for the type LORA
        super()._check_target_module_compatiblity(_as_lora(peft_config), model, target_name)

    def _find_layers(self, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
        """(path in the base model, layer) of everything that carries the adapter."""
        for path, module in self.model.named_modules():
            if not isinstance(module, LoraLayer):
                continue
            if adapter_name not in module.lora_A and adapter_name not in module.lora_embedding_A:
                continue
            name = re.sub(r"(^|\.)base_layer(?=\.|$)", "", plain_path(path)).lstrip(".")
            if isinstance(module, ParamWrapper):
                name = f"{name}.{module.parameter_name}"
            yield name, module

    def _find_elastic_adapters(self, injected: str) -> dict[str, _ElasticAdapter]:
        """Layers and search space of the adapter that was injected just now and of all others, which another tuner may
        have injected."""
        found = dict(self._elastic_adapters)
        found.pop(injected, None)
        for adapter_name, config in self._elastic_configs().items():
            layers = dict(self._find_layers(adapter_name))
            if adapter_name in found or not layers:
                continue
            ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
            sizes = {
                name: sum(weight.numel() // ranks[name] for weight in full_weights(layer, adapter_name))
                for name, layer in layers.items()
            }
            multiples = {name: rank_multiple(layer) for name, layer in layers.items()}
            choices = self._build_choices(config, ranks, multiples, self.model, sizes)
            structure, shapes = None, []
            if config.is_structural:
                # one for all, which knows what is active
                known = (adapter.structure for adapter in found.values() if adapter.structure is not None)
                structure = next(known, None) or Structure(self.model)
                rank_keys = {name: choice.key for choice in choices for name in choice.modules}
                structural = structural_choices(structure, config.elastic_width, config.depth_entries)
                shapes = layer_shapes(self.model, structure, structural, rank_keys)
                choices += structural
            found[adapter_name] = _ElasticAdapter(layers, SearchSpace(choices, shapes), structure)
        return found

    @staticmethod
    def _build_choices(
        config: ElasticLoraConfig,
        ranks: Mapping[str, int],
        multiples: Mapping[str, int],
        model: nn.Module,
        sizes: Optional[Mapping[str, int]] = None,
    ) -> list[Choice]:
        """One choice for each rank group.

        Args:
            config: the configuration of the adapter.
            ranks: path -> maximal rank, of each module that has the adapter.
            multiples: path -> what its ranks are divisible by.
            model: the base model.
            sizes: path -> adapter parameters per unit of rank.
        """
        groups = group_modules(ranks, config.rank_groups, find_blocks(model))
        _tie_groups(groups, config, model)
        choices = []
        for group_name, members in groups.items():
            max_ranks = {ranks[name] for name in members}
            if len(max_ranks) > 1:
                raise ValueError(
                    f"`rank_groups` ties {members}, whose maximal ranks in `rank_pattern` differ: {sorted(max_ranks)}."
                )
            choices.append(
                Choice(
                    kind="rank",
                    name=group_name,
                    options=config.rank_options(max_ranks.pop(), math.lcm(*(multiples[name] for name in members))),
                    modules=tuple(members),
                    unit_parameters=sum(sizes[name] for name in members) if sizes else 0,
                )
            )
        return choices

    # -- search space and subnets ----------------------------------------------------------------------------------

    def _elastic(self, adapter_name: str) -> _ElasticAdapter:
        if adapter_name not in self._elastic_adapters:
            raise ValueError(f"Adapter {adapter_name!r} has no elastic layers, so it has no search space.")
        return self._elastic_adapters[adapter_name]

    def _elastic_layers(self, adapter_name: str) -> dict[str, LoraLayer]:
        layers = self._elastic(adapter_name).layers
        replaced = [name for name, layer in layers.items() if not is_elastic(layer, adapter_name)]
        if replaced:
            raise ValueError(
                f"The weights of adapter {adapter_name!r} in {replaced[0]!r} have been replaced by a fixed-rank layer, "
                "for example by `prepare_model_for_compiled_hotswap`, which elastic adapters do not support."
            )
        return layers

    def _resolve_adapter(self, adapter_name: Optional[str]) -> str:
        elastic = self._elastic_configs()
        if adapter_name is None:
            active = self._active_elastic_adapters()
            if len(active) != 1:
                raise ValueError(f"`adapter_name` is needed: {len(active)} elastic adapters are active, {active}.")
            adapter_name = active[0]
        if adapter_name not in elastic:
            raise ValueError(
                f"`adapter_name` must be one of the elastic adapters {list(elastic)}, got {adapter_name!r}."
            )
        return adapter_name

    def _elastic_configs(self) -> dict[str, ElasticLoraConfig]:
        # transformers lets adapters of other types stand beside, and removes `peft_config` with the last adapter
        configs = getattr(self, "peft_config", {})
        return {name: config for name, config in configs.items() if isinstance(config, ElasticLoraConfig)}

    def _active_elastic_adapters(self) -> list[str]:
        """Read from the layers: transformers' `model.set_adapter` does not tell the tuner."""
        configs = self._elastic_configs()
        active = next((m.active_adapters for m in self.model.modules() if isinstance(m, LoraLayer)), [])
        return [name for name in active if name in configs]

    def get_search_space(self, adapter_name: Optional[str] = None) -> SearchSpace:
        """The search space of an adapter.

        Args:
            adapter_name (`str`, *optional*): the adapter; defaults to the active one.

        Raises:
            ValueError: if there is no such adapter, several are active and none is named, or it adapts no layer.
        """
        return self._elastic(self._resolve_adapter(adapter_name)).space

    @property
    def search_space(self) -> SearchSpace:
        """The search space of the active adapter."""
        return self.get_search_space()

    @property
    def active_subnet(self) -> Subnet:
        """What the layers of the active adapter compute now."""
        return self.get_active_subnet()

    def get_active_subnet(self, adapter_name: Optional[str] = None) -> Subnet:
        """What the layers of an adapter compute now, read from the layers themselves.

        Args:
            adapter_name (`str`, *optional*): the adapter; defaults to the active one.
        """
        adapter_name = self._resolve_adapter(adapter_name)
        layers, space = self._elastic_layers(adapter_name), self._elastic(adapter_name).space
        ranks = {
            choice.key: get_rank(layers[choice.modules[0]], adapter_name) for choice in space if choice.kind == "rank"
        }
        return Subnet(ranks | self._structural_values.get(adapter_name, {}))

    def set_subnet(self, subnet: Subnet | Mapping[str, int] | str, adapter_name: Optional[str] = None) -> None:
        """Choose the subnet that the model computes from now on. The choice is saved with the adapter.

        Args:
            subnet (`Subnet`, `Mapping[str, int]` or `str`):
                A subnet of `search_space`, a dict from choice key to value, or `"max"`, `"min"`, `"heuristic"`.
            adapter_name (`str`, *optional*): the adapter; defaults to the active one.

        Raises:
            ValueError: if the subnet does not belong to the search space, or the adapter is merged.
        """
        adapter_name = self._resolve_adapter(adapter_name)
        checked = self.get_search_space(adapter_name).subnet(subnet)
        self._activate(checked, adapter_name)
        self.peft_config[adapter_name].active_subnet = checked.to_dict()
        self._sampled, self._suspended = False, {}
        self._trained_version = None

    def sample_subnet(self, subnet: Subnet | Mapping[str, int] | str, adapter_name: Optional[str] = None) -> None:
        """Activate a subnet for a training step, without choosing it: saving and `restore_subnet()` go by the chosen one, and
        so does evaluation mode, after which `model.train()` goes on with the step.

        Args:
            subnet: as in `set_subnet`.
            adapter_name (`str`, *optional*): the adapter; defaults to the active one.
        """
        adapter_name = self._resolve_adapter(adapter_name)
        checked = self.get_search_space(adapter_name).subnet(subnet)
        if (structure := self._elastic(adapter_name).structure) is not None:
            check_depth(structure, checked)
        self._activate(checked, adapter_name)
        self._sampled, self._suspended = True, {}
        watch_optimizers(self)
        self._trained_version = None

    def restore_subnet(self) -> None:
        """Activate the chosen subnet of every adapter again (see `set_subnet`; the maximal one if none was chosen)."""
        for adapter_name in self._elastic_configs():
            self._activate_chosen(adapter_name)
        self._sampled, self._suspended = False, {}

    def _activate_chosen(self, adapter_name: str, when_loaded: bool = False) -> None:
        if adapter_name not in self._elastic_adapters:
            return
        config, space = self.peft_config[adapter_name], self._elastic(adapter_name).space
        if config.active_subnet is None:
            self._activate(space.max, adapter_name)
        else:
            chosen = _check_active_subnet(config, adapter_name, space)
            self._activate(chosen, adapter_name, when_loaded=when_loaded)

    def _activate(self, subnet: Subnet, adapter_name: str, when_loaded: bool = False) -> None:
        layers, space = self._elastic_layers(adapter_name), self._elastic(adapter_name).space
        merged = [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]
        if merged:
            raise ValueError(
                f"Adapter {adapter_name!r} is merged (for example in {merged[0]!r}); call `unmerge_adapter()` before "
                "choosing another subnet."
            )
        self._check_sorted(subnet, adapter_name)
        values = {choice.key: subnet[choice.key] for choice in space if choice.kind != "rank"}
        if values:
            self._check_together(self._active_elastic_adapters(), self._structural_values | {adapter_name: values})
        for choice in space:
            for name in choice.modules if choice.kind == "rank" else ():
                set_rank(layers[name], adapter_name, subnet[choice.key], when_loaded=when_loaded)
        if values:
            self._structural_values[adapter_name] = values
            self._apply_structure()
            if self._follower is None:
                self._follower = self.model.register_forward_pre_hook(_follow_active_adapters)

    # -- width and depth of the base -------------------------------------------------------------------------------

    def _narrowing(
        self, adapter_name: str, values: Optional[Mapping[str, Mapping[str, int]]] = None
    ) -> dict[str, int]:
        """What the subnet of an adapter, or of `values`, takes away from the base: the choices that are below the whole."""
        adapter = self._elastic_adapters.get(adapter_name)
        structure = None if adapter is None else adapter.structure
        if structure is None:
            return {}
        whole = {f"{width.kind}:{width.name}": width.full for width in structure.widths}
        chosen = (self._structural_values if values is None else values).get(adapter_name, {})
        return {key: value for key, value in chosen.items() if value != whole.get(key, 1)}

    def _check_together(
        self, active: Sequence[str], values: Optional[Mapping[str, Mapping[str, int]]] = None
    ) -> dict[str, int]:
        """What these adapters, active together, take away from the base.

        Raises:
            ValueError: if they want different things, or it cannot be taken away now.
        """
        narrowings = {name: self._narrowing(name, values) for name in active if self._is_structural(name)}
        first = next(iter(narrowings.values()), {})
        if any(other != first for other in narrowings.values()):
            raise ValueError(
                f"The adapters {list(narrowings)} cannot be active together: their subnets differ in the width or depth of the "
                "base."
            )
        layers = (layer for adapter in self._elastic_adapters.values() for layer in adapter.layers.values())
        for layer in layers if first else ():
            if layer.merged_adapters:
                raise ValueError(
                    f"The adapters {layer.merged_adapters} are merged into the base, which cannot be narrowed then. Call "
                    "`unmerge_adapter()` first."
                )
            if len(layer.lora_magnitude_vector) and set(layer.lora_magnitude_vector) & set(active):
                raise ValueError("Adapters with DoRA cannot be active beside one that narrows the base.")
        return first

    def _is_structural(self, adapter_name: str) -> bool:
        return adapter_name in self._elastic_adapters and self._elastic_adapters[adapter_name].structure is not None

    def _apply_structure(self) -> None:
        """Narrow the base, and the adapters on it, to what the active adapter has chosen."""
        adapters = self._elastic_adapters.values()
        structure = next((adapter.structure for adapter in adapters if adapter.structure is not None), None)
        if structure is None:
            return
        self._followed = followed = self._enabled_adapters()
        for path in activate(self.model, structure, self._check_together(followed)):
            module = module_at(self.model, path)
            if isinstance(module, LoraLayer):
                set_width(module, *active_ranges(module.get_base_layer()))

    def _enabled_adapters(self) -> list[str]:
        """The active elastic adapters, none while adapters are disabled."""
        enabled = next((not m.disable_adapters for m in self.model.modules() if isinstance(m, LoraLayer)), False)
        return self._active_elastic_adapters() if enabled else []

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        if isinstance(names, (list, tuple)):  # peft checks them otherwise
            active = self._check_together(self._enabled_adapters())
            for name in dict.fromkeys(names):
                if self._narrowing(name) != active:
                    raise ValueError(
                        f"`adapter_names`: all adapters of a batch compute with one base, and that of {name!r} has another width "
                        "or depth than the active one. Activate subnets with the same, or run it in a batch of its own."
                    )
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def sort_by_importance(
        self,
        calibration: Any = None,
        importance: Optional[str | Mapping[str, torch.Tensor]] = None,
        *,
        max_samples: Optional[int] = None,
        progress: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Sort the heads and MLP channels of the base, and all adapters along, by falling importance. It does not change what
        the model computes; call it once, before the training, as trained adapters see other slices afterwards.

        Args:
            calibration: an iterable of batches, for `"activation"` and `"gradient"`.
            importance (*optional*): as in `peft_elastic.sort_by_importance`; defaults to that of the configuration.
            max_samples (`int`, *optional*): number of calibration sequences to use.
            progress (`bool`): show a progress bar.

        Returns:
            `dict[str, torch.Tensor]`: the scores in the new order.

        Raises:
            ValueError: as `peft_elastic.sort_by_importance`, and if no adapter is elastic in width.
        """
        configs = [
            c for name, c in self._elastic_configs().items() if c.elastic_width and name in self._elastic_adapters
        ]
        if not configs:
            raise ValueError("No adapter has an `elastic_width`, so there is nothing to sort for.")
        self._check_unmerged()
        kinds = tuple(dict.fromkeys(kind for config in configs for kind in config.elastic_width or {}))
        with self._whole_base():
            scores = sort_by_importance(
                self.model,
                configs[0].importance if importance is None else importance,
                calibration,
                kinds=kinds,
                max_samples=max_samples,
                progress=progress,
            )
        for config in self._elastic_configs().values():
            config.sorted_base = bool(noted_orders(self.model))
        return scores

    def _check_unmerged(self) -> None:
        if any(layer.merged for layer in self.model.modules() if isinstance(layer, LoraLayer)):
            raise ValueError("An adapter is merged; call `unmerge_adapter()` before the base is sorted.")

    @contextmanager
    def _whole_base(self) -> Iterator[None]:
        """The base at full width and depth inside."""
        values, self._structural_values = self._structural_values, {}
        self._apply_structure()
        try:
            yield
        finally:
            self._structural_values = values
            self._apply_structure()

    def _settle_order(self, adapter_name: str) -> None:
        """Sort the base of a new adapter if that needs no data; demand the order of an adapter that is to be loaded."""
        config = self.peft_config[adapter_name]
        if noted_orders(self.model):
            config.sorted_base = True
        elif config.sorted_base:
            if self._order_guard is None:
                self._order_guard = self.model.register_forward_pre_hook(_demand_order)
        elif config.elastic_width and config.importance == "magnitude" and not config.inference_mode:
            structure = self._elastic(adapter_name).structure
            assert structure is not None
            kinds = tuple(config.elastic_width)
            sort_by_importance(self.model, "magnitude", kinds=kinds, progress=False)
            config.sorted_base = True

    def _check_sorted(self, subnet: Subnet, adapter_name: str) -> None:
        """Raise a ValueError if the subnet keeps the first heads or channels of a base in which those are any."""
        config, adapter = self.peft_config[adapter_name], self._elastic(adapter_name)
        if not config.elastic_width or config.sorted_base or config.importance == "none" or noted_orders(self.model):
            return
        structure = adapter.structure
        assert structure is not None
        narrow = [
            choice.key
            for choice in adapter.space
            if choice.kind in KINDS and subnet[choice.key] != structure.width(choice.key).full
        ]
        if narrow:
            raise ValueError(
                f"{narrow[0]!r} would keep the first of heads or channels that are not sorted by importance, which destroys the "
                f"model. Call `model.sort_by_importance(calibration)` first (`importance={config.importance!r}`), or set "
                "`importance='none'` if the base is sorted already."
            )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        if self._plan is not None:  # the first thing that peft does after the last module
            raise _PlanIsComplete
        if any(not m.disable_adapters for m in self.model.modules() if isinstance(m, LoraLayer)):
            self._check_together([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._apply_structure()

    def enable_adapter_layers(self) -> None:
        super().enable_adapter_layers()
        self._apply_structure()

    def disable_adapter_layers(self) -> None:
        super().disable_adapter_layers()
        self._apply_structure()

    def subnet_summary(self, adapter_name: Optional[str] = None) -> SubnetSummary:
        """What is active, as a table when printed.

        Args:
            adapter_name (`str`, *optional*): the adapter; defaults to the active one.
        """
        adapter_name = self._resolve_adapter(adapter_name)
        return SubnetSummary(adapter_name, self.get_active_subnet(adapter_name), self.get_search_space(adapter_name))

    # -- training --------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> ElasticLoraModel:
        super().train(mode)
        if mode:
            for module in self.model.modules():
                unpack(module)
            self._resume_step()
            self._warn_if_one_subnet_is_trained()
        elif self._sampled:
            sampled = {name: self.get_active_subnet(name) for name in self._elastic_adapters}
            self.restore_subnet()
            self._suspended = sampled
        return self

    def _resume_step(self) -> None:
        """Go on with what a training step had activated, after something in it, such as generation, was in evaluation mode."""
        suspended, self._suspended = self._suspended, {}
        for name, subnet in suspended.items():
            adapter = self._elastic_adapters.get(name)
            if adapter is not None and not any(layer.merged for layer in adapter.layers.values()):
                self.sample_subnet(subnet, name)

    def _warn_if_one_subnet_is_trained(self) -> None:
        """Warn, once, when the weights have been updated in place since the last call while one subnet stayed active.
        transformers' Trainer calls `model.train()` in every step."""
        if self._warned_about_sampling or self._sampled:
            return
        adapters = {name: self._elastic_adapters[name] for name in self._active_elastic_adapters()}
        weights = (
            weight
            for name, adapter in adapters.items()
            if adapter.space.size > 1
            for layer in adapter.layers.values()
            for weight in full_weights(layer, name)
        )
        trainable = next((weight for weight in weights if weight.requires_grad and not weight.is_meta), None)
        if trainable is None:
            return
        # a sample of the values: fused optimizers, Trainer's default, do not raise the version of what they change
        local = trainable.detach().to_local() if isinstance(trainable, DTensor) else trainable.detach()
        version, before = local.flatten()[:16].tolist(), self._trained_version
        self._trained_version = version
        if before is not None and version != before:
            self._warned_about_sampling = True
            warnings.warn(
                "An elastic adapter is being trained with one and the same subnet in every step, which trains a plain "
                "LoRA adapter. Pass `callbacks=[SubnetSamplingCallback()]` to the Trainer, or call "
                "`model.sample_subnet(...)` in each step of your own loop."
            )

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
        layers = self._elastic_layers(adapter_name)
        narrowing = self._narrowing(adapter_name)
        if narrowing:
            raise ValueError(
                f"The active subnet of adapter {adapter_name!r} narrows or skips parts of the base ({next(iter(narrowing))!r}), which "
                "a plain LoRA adapter cannot say. Use `extract_subnet()` or `merge_and_unload()`, or choose a subnet whose ranks "
                "alone are smaller."
            )
        with self._whole_base():
            export_lora(self.model, self.peft_config[adapter_name], adapter_name, save_directory, layers, pad)

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        """As in peft; what can be refused is refused before any layer is merged."""
        if is_narrowed(self.model):
            raise ValueError(
                "The active subnet narrows or skips parts of the base, into which an adapter cannot be merged in place. Use "
                "`merge_and_unload()` or `extract_subnet()`, or `set_subnet('max')` first."
            )
        if twice := self._check_merge(adapter_names, safe_merge):
            path = next(path for path, module in self.model.named_modules() if module in twice)
            raise ValueError(
                f"{path!r} is tied with the embedding, and so is its adapter (`ensure_weight_tying`), which cannot be merged in place: "
                "use `merge_and_unload()` or `extract_subnet()`."
            )
        super().merge_adapter(adapter_names, safe_merge)

    def _check_merge(self, adapter_names: Optional[list[str]], safe_merge: bool) -> dict[LoraLayer, LoraLayer]:
        """Raise a ValueError if merging these adapters, or the active ones, would change what the model computes. See
        `check_tied_weights` for what is returned."""
        for name in self._active_elastic_adapters() if adapter_names is None else adapter_names:
            if name in self._elastic_adapters:
                for path, layer in self._elastic(name).layers.items():
                    self._check_merge_into(layer, name, path)
        return check_tied_weights(self.model, adapter_names)

    def _check_merge_into(self, layer: LoraLayer, adapter_name: str, path: str) -> None:
        """Raise a ValueError if merging into this layer would change what the model computes, or be lost."""
        base_layer = layer.get_base_layer()
        check_parameters({path: base_layer})
        if isinstance(base_layer, QuantizedLinear) or is_gptqmodel(base_layer):
            raise ValueError(
                f"{path!r} is quantised and adapter {adapter_name!r} is not quantisation-aware, so the merged weight would be "
                "rounded to other values than the adapter was trained with. `peft_elastic.merge_and_requantize(model)` does "
                "that, and reports the error; train with `SparseQALoraConfig(quantization_aware=True)` to avoid it."
            )

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
    ) -> nn.Module:
        twice: dict[LoraLayer, LoraLayer] = {}
        narrowed = is_narrowed(self.model)
        if merge:
            twice = self._check_merge(adapter_names, safe_merge)
            if adapter_names is not None and self._check_together(adapter_names) != self._check_together(
                self._enabled_adapters()
            ):
                raise ValueError(
                    f"`adapter_names`: {adapter_names} belong to another width or depth of the base than the active one. Call "
                    "`set_adapter` first."
                )
            if narrowed:
                extract_described(self.model)
        elif narrowed:
            self._structural_values = {}
            self._apply_structure()
        with merged_once(twice, adapter_names):
            model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        model.__dict__.pop(HOST_ATTRIBUTE, None)
        for module in model.modules():
            allow_packing(module)
        for hook in (self._follower, self._order_guard):
            if hook is not None:
                hook.remove()
        if not merge:
            reorder(model, self._own_orders or {})
        if self._tagged:
            model.model_tags.remove("lora")
            if not model.model_tags and not hasattr(type(model), "model_tags"):
                del model.model_tags
            self._tagged = False
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

        Merging a dense LoRA update fills the zeros of the layers that it changes, and only layers that are still sparse
        are swapped.

        Args:
            progressbar, safe_merge, adapter_names: as in peft.
            sparse_kernel (`str` or `bool`): "auto" calls `peft_elastic.sparsify_linears` if the model is on the CPU and the
                C++ extension is there, which swaps the layers that are measured to be faster; True swaps every layer with
                30% zeros or more and raises where it cannot; False leaves the model dense.
            sparse_dtype (`str`): "bf16" or "int8", of the values of the sparse layers. Weights are rounded to it.

        Returns:
            `nn.Module`: the base model, with the same modules but for the `SparseLinear` layers.

        Raises:
            ValueError: on a wrong argument, before anything is merged.
        """
        if sparse_kernel not in ("auto", True, False):
            raise ValueError(f"`sparse_kernel` is {sparse_kernel!r}; allowed are 'auto', True and False.")
        check_choice("sparse_dtype", sparse_dtype, ROUNDED)
        obstacle = find_obstacle(self.model)
        if sparse_kernel is True and obstacle:
            raise ValueError(f"`sparse_kernel=True` cannot work on this model: {obstacle}.")
        model = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        if sparse_kernel and not obstacle:
            when = "always" if sparse_kernel is True else "faster"
            logger.info("%s", sparsify_linears(model, sparse_dtype, when=when, progressbar=progressbar))
        return model

    def extract_subnet(
        self,
        subnet: Optional[Subnet | Mapping[str, int] | str] = None,
        *,
        sparse_kernel: str | bool = "auto",
        sparse_dtype: str = "bf16",
    ) -> nn.Module:
        """A copy of the base model that consists of a subnet alone, with the adapter merged: what `merge_and_unload` gives, while
        the super-network stays as it is.

        Args:
            subnet (`Subnet`, `Mapping[str, int]` or `str`, *optional*): as in `set_subnet`; the chosen one by default.
            sparse_kernel, sparse_dtype: as in `merge_and_unload`.

        Returns:
            `nn.Module`: a smaller ordinary model. Saved with `save_pretrained`, it loads with `from_pretrained`: of a subnet whose
            blocks are all alike without this package, otherwise after `import peft_elastic`.

        Raises:
            ValueError: as `set_subnet` and `merge_and_unload`.
        """
        copied = copy.deepcopy(self)
        if subnet is None:
            copied.restore_subnet()
        else:
            copied.set_subnet(subnet)
        return copied.merge_and_unload(sparse_kernel=sparse_kernel, sparse_dtype=sparse_dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        self._structural_values.pop(adapter_name, None)  # lets go of the base
        super().delete_adapter(adapter_name)
        self._apply_structure()
        self._elastic_adapters.pop(adapter_name, None)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As in peft; each adapter enters with its active subnet, and the new adapter has a fixed rank."""
        if adapter_name in self.peft_config or not adapters or not set(adapters) <= set(self.peft_config):
            super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)  # peft's own answer
            return
        # peft derives the configuration of the new adapter from the first one, but with another rank
        own_config = self.peft_config[adapters[0]]
        template = copy.copy(own_config)
        template.elastic_ranks, template.rank_groups, template.active_subnet = None, "module", None
        template.init_lora_weights = True  # the weights get replaced, and PiSSA would change the base once more
        self._weighted_adapter = adapter_name
        self.peft_config[adapters[0]] = template
        try:
            with self._whole_base(), self._inactive_ranks_zeroed(adapters):
                super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        finally:
            self.peft_config[adapters[0]] = own_config
            self._weighted_adapter = None
        self.peft_config[adapter_name].initialized_with = own_config.initialized_with

    @contextmanager
    def _inactive_ranks_zeroed(self, adapters: list[str]) -> Iterator[None]:
        """Let all ranks of these adapters together compute what their active subnets compute."""
        layers = [(layer, name) for name in adapters for layer in self._elastic_layers(name).values()]
        ranks = [get_rank(layer, name) for layer, name in layers]
        saved = [(full, full.detach().clone()) for layer, name in layers for full in full_weights(layer, name)]
        try:
            for layer, name in layers:
                zero_inactive(layer, name)
            for layer, name in layers:
                set_rank(layer, name, layer.r[name])
            yield
        finally:
            for (layer, name), rank in zip(layers, ranks):
                set_rank(layer, name, rank)
            for full, values in saved:
                full.data.copy_(values)

    # -- saving and loading ----------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model: Any, config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        state_dict = super()._get_adapter_state_dict(model, config, adapter_name, *args, **kwargs)
        # peft warns of weights that a sharded model left empty for the type LORA only
        _validate_lora_adapter_state_dict(state_dict, adapter_name=adapter_name)
        base_model, prefix = _base_and_prefix(model)
        config.sorted_base = bool(noted_orders(base_model))
        for name, order in noted_orders(base_model).items():
            state_dict[f"{prefix}{name}{ORDER_SUFFIX}"] = order.to(torch.int32)
        return state_dict

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: Any, config: Any, adapter_name: str, state_dict: Any) -> Any:
        for module in model.modules():
            has_adapter = isinstance(module, LoraLayer) and (
                adapter_name in module.lora_A or adapter_name in module.lora_embedding_A
            )
            if has_adapter and not is_elastic(module, adapter_name):
                raise ValueError(
                    f"Adapter {adapter_name!r} is elastic, but is being loaded by a method that knows fixed ranks only, "
                    "for example X-LoRA. Load what `model.export_lora` writes instead."
                )
        state_dict = _follow_order(model, config, adapter_name, state_dict)
        host = getattr(model, HOST_ATTRIBUTE, None)
        if host is not None:
            if host._order_guard is not None:
                host._order_guard.remove()
                host._order_guard = None
            host._activate_chosen(adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: Any,
        peft_config: Any,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, torch.Tensor],
        kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Turn a trained PiSSA, OLoRA or CorDA adapter into one for the original base model, and keep it elastic.

        peft appends the initial A0, B0 behind A and B, so that B A - B0 A0 comes out. Here the initial part goes in
        front: it belongs to every subnet, and rank k of the trained adapter becomes rank r + k.
        """
        if noted_orders(peft_model.get_base_model()):
            raise ValueError(
                "`path_initial_model_for_weight_conversion` does not work with a base that was sorted after the adapter changed it, "
                "as the initial weights are in another order."
            )
        if peft_config.target_parameters:
            raise ValueError("`path_initial_model_for_weight_conversion` does not work with `target_parameters`.")
        # peft sets the field `init_weights` for types other than LORA, so its copy on disk still asks for PiSSA
        del peft_config.init_weights
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path_initial_model_for_weight_conversion)
        converted = super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, path_initial_model_for_weight_conversion, output_state_dict, kwargs
        )
        for name, tensor in converted.items():
            dim = 0 if "lora_A" in name else 1
            trained, initial = tensor.chunk(2, dim=dim)
            converted[name] = torch.cat([initial, trained], dim=dim)

        # peft goes on to double `r`, `lora_alpha` and the patterns of this configuration
        if peft_config.active_subnet is not None:
            ranks = {
                name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensor.shape[0]
                for name, tensor in output_state_dict.items()
                if name.endswith(".lora_A.weight")
            }
            base_model = peft_model.get_base_model()
            multiples = {name: rank_multiple(base_model.get_submodule(name)) for name in ranks}
            choices = cls._build_choices(peft_config, ranks, multiples, base_model)
            ranks_now = {c.key: c.options[0] + peft_config.active_subnet[c.key] for c in choices}
            peft_config.active_subnet |= ranks_now
        peft_config.elastic_ranks = [peft_config.r + k for k in peft_config.rank_options(peft_config.r)]
        # what does not depend on the base weights stays: DoRA's magnitudes, `modules_to_save`, biases
        return output_state_dict | converted


def _base_and_prefix(model: nn.Module) -> tuple[nn.Module, str]:
    """The base model, and the prefix of its names in state dicts of adapters."""
    return (model.get_base_model(), FILE_PREFIX) if isinstance(model, PeftModel) else (model, "")


def _follow_order(
    model: nn.Module, config: ElasticLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Bring the base into the order that the file of an adapter says, or the weights of the adapter into that of the base."""
    base_model, prefix = _base_and_prefix(model)
    orders = {
        key.removeprefix(prefix).removesuffix(ORDER_SUFFIX): order.long().cpu()
        for key, order in state_dict.items()
        if key.endswith(ORDER_SUFFIX)
    }
    state_dict = {key: tensor for key, tensor in state_dict.items() if not key.endswith(ORDER_SUFFIX)}
    host = getattr(base_model, HOST_ATTRIBUTE, None)
    if not orders and not noted_orders(base_model):
        if config.sorted_base:
            raise ValueError(
                f"Adapter {adapter_name!r} belongs to a sorted base, and its file does not hold the order; it is damaged."
            )
        return state_dict
    if is_stored_in(base_model, orders):
        if orders:
            note_orders(base_model, orders)
            if host is not None:
                host._own_orders = orders
        config.sorted_base = bool(orders)
        return state_dict
    others = [c for name, c in getattr(model, "peft_config", {}).items() if name != adapter_name]
    if not any(getattr(other, "elastic_width", None) for other in others):
        if host is None:
            reorder(base_model, orders)
        else:
            host._check_unmerged()
            with host._whole_base():
                reorder(base_model, orders)
        config.sorted_base = bool(orders)
        return state_dict
    if config.elastic_width and not same_orders(base_model, orders):
        raise ValueError(
            f"Adapter {adapter_name!r} sorts the heads or channels of the base in another way than an adapter that is there. Load "
            "each of them on a base of its own."
        )
    config.sorted_base = True
    return move_adapter(base_model, orders, noted_orders(base_model), state_dict, prefix)


def _follow_active_adapters(module: nn.Module, args: Any) -> None:
    """A hook on the base model: transformers' own `set_adapter` and `disable_adapters` do not tell the tuner."""
    host = module.__dict__.get(HOST_ATTRIBUTE)
    if host is not None and not torch.compiler.is_compiling() and host._followed != host._enabled_adapters():
        host._apply_structure()


def _demand_order(module: nn.Module, args: Any) -> None:
    raise ValueError(
        "The adapter belongs to a base whose heads and channels are sorted, and the order is in its file: load it with "
        "`PeftModel.from_pretrained` or `PeftModel.load_adapter`."
    )


def _widths(structure: Structure, config: ElasticLoraConfig) -> list[Width]:
    return [width for width in structure.widths if width.kind in (config.elastic_width or {})]


_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def _remove_adapter(model: nn.Module, adapter_name: str, active: Mapping[nn.Module, Any]) -> None:
    """Remove every trace of an adapter whose injection failed.

    Args:
        active: each wrapper that was there before -> its active adapter.
    """
    for path, module in list(model.named_modules()):
        parent_path, _, child = path.rpartition(".")
        if not isinstance(module, _WRAPPERS) or getattr(model.get_submodule(parent_path), child, None) is not module:
            continue  # nothing of ours, or inside a wrapper that has been taken off
        if module not in active:
            if isinstance(module, AuxiliaryTrainingWrapper):
                inner = module.original_module
            elif hasattr(module, "unload_and_optionally_merge_module"):
                inner = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
            else:
                inner = module.get_base_layer()
            setattr(model.get_submodule(parent_path), child, inner)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's choice of another active adapter, undone below
            if isinstance(module, BaseTunerLayer):
                module.delete_adapter(adapter_name)
            else:
                module.delete_adapter(adapter_name, None)
        module._active_adapter = active[module]


def _as_lora(config: Any) -> Any:
    """A shallow copy of the configuration for code of peft that asks for the type LORA."""
    config = copy.copy(config)
    config.peft_type = PeftType.LORA
    return config


def _check_active_subnet(config: ElasticLoraConfig, adapter_name: str, choices: SearchSpace | list[Choice]) -> Subnet:
    space = choices if isinstance(choices, SearchSpace) else SearchSpace(choices)
    try:
        return space.subnet(config.active_subnet)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(
            f"`active_subnet` in the configuration of adapter {adapter_name!r} is wrong: {error}"
        ) from error


def _tie_groups(groups: dict[str, list[str]], config: ElasticLoraConfig, model: Any) -> None:
    """Give the adapter of a tied output layer the rank of the embedding's adapter, whose weights it shares."""
    tied = {plain_path(name) for name in getattr(config, "target_modules_to_tie", None) or ()}
    if not tied:
        return
    embedding = next(path for path, module in model.named_modules() if module is model.get_input_embeddings())
    embedding = plain_path(embedding)
    source = next(name for name, members in groups.items() if embedding in members)
    for group_name in [name for name in groups if name != source]:
        moved = [name for name in groups[group_name] if name in tied]
        groups[source] += moved
        groups[group_name] = [name for name in groups[group_name] if name not in moved]
        if not groups[group_name]:
            del groups[group_name]


# -- what a PeftModel shows ----------------------------------------------------------------------------------------


# What these classes write into the configuration that they were given once the adapter is there, which has a copy then.
_HEADS_NAMED_LATE = {
    PeftModelForTokenClassification: ["classifier", "score"],
    PeftModelForQuestionAnswering: ["qa_outputs"],
}


def _print_trainable_parameters(model: PeftModel) -> None:
    """Stands in for `PeftModel.print_trainable_parameters`, which knows nothing of subnets."""
    type(model).print_trainable_parameters(model)
    for adapter_name in model.base_model._active_elastic_adapters():
        print(model.base_model.subnet_summary(adapter_name).describe())


def _search_subnet(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    from ...search import search_subnet

    return search_subnet(model, *args, **kwargs)


def _load_adapter(model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """Stands in for `PeftModel.load_adapter`, which reads no configuration if there is an adapter of that name, as when Trainer
    resumes or goes back to the best model: the chosen subnet is part of what was saved."""
    load = functools.partial(type(model).load_adapter, model, model_id, adapter_name, *args, **kwargs)
    config = model.peft_config.get(adapter_name)
    # has just made the adapter, from a configuration that may have been given by the user
    by_from_pretrained = sys._getframe(1).f_code is PeftModel.from_pretrained.__func__.__code__
    file = os.path.join(model_id, kwargs.get("subfolder") or "", CONFIG_NAME)
    if not isinstance(config, ElasticLoraConfig) or by_from_pretrained:
        return load()
    if os.path.isdir(model_id) and not os.path.isfile(file):
        return load()  # weights alone
    saved = PeftConfig.from_pretrained(model_id, **model._split_kwargs(kwargs)[0])
    before, config.active_subnet = config.active_subnet, getattr(saved, "active_subnet", None)
    try:
        if config.active_subnet is not None:
            _check_active_subnet(config, adapter_name, model.base_model.get_search_space(adapter_name))
        return load()
    except Exception:
        config.active_subnet = before
        model.base_model._activate_chosen(adapter_name)
        raise


def _welcome_peft_model(module: nn.Module, name: str, submodule: Optional[nn.Module]) -> None:
    """Give a PeftModel that gets an elastic tuner what it must do itself. peft does not tell the tuner which PeftModel
    it belongs to, and looks for methods in the PeftModel first."""
    if module.__dict__.get("_is_replica"):
        return  # a copy that `nn.DataParallel` makes for one forward pass
    if isinstance(submodule, ElasticLoraModel) and isinstance(module, PeftModel) and name == "base_model":
        module.__dict__["print_trainable_parameters"] = functools.partial(_print_trainable_parameters, module)
        module.__dict__["load_adapter"] = functools.partial(_load_adapter, module)
        module.__dict__["search_subnet"] = functools.partial(_search_subnet, module)
        submodule._in_peft_model = True
        for head, names in _HEADS_NAMED_LATE.items():
            if isinstance(module, head):
                for config in submodule._elastic_configs().values():
                    named = config.modules_to_save or []
                    config.modules_to_save = [*named, *(name for name in names if name not in named)]
        submodule.restore_subnet()


register_module_module_registration_hook(_welcome_peft_model)
