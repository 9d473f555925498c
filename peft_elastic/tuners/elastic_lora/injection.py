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
"""Putting an elastic adapter into a base model: what is refused before, and what is undone if it fails."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, PeftType
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from ...common.names import has_suffix
from ...layers.backends.bitsandbytes import BITSANDBYTES, keep_unpacked, unpack_for_gradients
from ...structure.importance import noted_orders
from ...supernet.host import HOST_ATTRIBUTE
from .config import ElasticLoraConfig
from .layer import check_ranks, make_elastic, rank_multiple, read_unpacked
from .state import ElasticState, Plan, elastic_configs, find_layers


_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)


def as_lora(config: Any) -> Any:
    """Make a shallow copy of a configuration, for code of peft that asks for the type LORA."""
    config = copy.copy(config)
    config.peft_type = PeftType.LORA
    return config


def convert_targets(config: ElasticLoraConfig, model: nn.Module) -> None:
    """As peft does for LORA: name in `config` what transformers 5 made of the experts' modules, e.g. Mixtral's w1, w2, w3."""
    converted = as_lora(config)
    convert_peft_config_for_transformers(converted, model=model, conversions=None)
    config.target_modules, config.target_parameters = converted.target_modules, converted.target_parameters
    config.rank_pattern, config.alpha_pattern = converted.rank_pattern, converted.alpha_pattern


def first_state(model: nn.Module, configs: Mapping[str, Any]) -> ElasticState:
    """Make the state of a new tuner, which goes on from that of the tuner before it: transformers' `add_adapter` makes one for
    each adapter.

    Args:
        model: the base model.
        configs: of the adapters that are there, or about to come.
    """
    before = model.__dict__.get(HOST_ATTRIBUTE)
    if before is None:
        return ElasticState(own_orders=noted_orders(model))
    return before._state.handed_over(elastic_configs(configs))


# -- the dry run ---------------------------------------------------------------------------------------------------


class _PlanIsComplete(Exception):
    """Ends the dry run of an injection."""


def plan_injection(
    state: ElasticState,
    configs: dict[str, Any],
    adapter_name: str,
    config: ElasticLoraConfig,
    inject: Callable[[], None],
) -> Plan:
    """Let peft go through the whole model to find what `config` targets, without replacing anything.

    Args:
        state: of the tuner.
        configs: the tuner's, in which `config` stands for that of `adapter_name` meanwhile.
        adapter_name: the adapter.
        config: what peft may write into.
        inject: peft's `inject_adapter`, which calls `note_target` and `end_plan` instead of doing something.
    """
    own_config, configs[adapter_name] = configs[adapter_name], config
    plan: Plan = {}
    state.plan = plan
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the injection itself will give them
            inject()
    except _PlanIsComplete:
        pass
    finally:
        state.plan = None
        configs[adapter_name] = own_config
    return plan


def note_target(plan: Plan, config: ElasticLoraConfig, target: nn.Module, path: str) -> None:
    """Put what peft would replace into the plan."""
    module = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), path), config.r)
    plan[path] = (module, rank)
    if isinstance(module, nn.MultiheadAttention):
        plan[f"{path}.out_proj"] = (module.out_proj, rank)


def end_plan(state: ElasticState) -> None:
    """End a dry run, if there is one."""
    if state.plan is not None:
        raise _PlanIsComplete


# -- what is refused -----------------------------------------------------------------------------------------------


def check_model(model: nn.Module) -> None:
    """Raise a ValueError if no elastic adapter fits this model."""
    if getattr(model, HOST_ATTRIBUTE, None) is model:
        raise ValueError(
            "The model is elastic itself (`get_elastic_model`), so it cannot get elastic adapters. Extract a subnet first "
            "(`model.extract_subnet()`), or make it an ordinary model again (`model.unload()`)."
        )
    if getattr(model, "_tp_size", None) not in (None, 1):
        raise ValueError("Tensor-parallel models cannot get elastic adapters. Use `LoraConfig`.")


def check_names(
    config: ElasticLoraConfig,
    converted: ElasticLoraConfig,
    model: nn.Module,
    plan: Plan,
    usual: Iterable[str],
    by_state_dict: bool,
) -> None:
    """Raise a ValueError if what the user named matches nothing at all, and warn of single names that do not: lists are made
    for many architectures. Names that peft derived, for other checkpoints of the family, are not held against anybody.

    Args:
        config: as the user wrote it.
        converted: `config` after `convert_targets`.
        model: the base model.
        plan: as `plan_injection` returned it.
        usual: the modules that peft targets in such a model by default.
        by_state_dict: whether peft goes by the keys of a state dict in place of the names.
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for field, paths in (("target_modules", modules), ("target_parameters", [*parameters, *plan])):
        given, targets = getattr(config, field), getattr(converted, field)
        if not given or isinstance(given, str):
            continue
        named = set(given) & set(targets or ())
        unusual = sorted(named - set(usual))
        unmatched = [name for name in unusual if not any(has_suffix(path, name) for path in paths)]
        if unmatched and len(unmatched) == len(named) and not by_state_dict:
            raise ValueError(f"`{field}` names {unmatched}, which are not in the base model.")
        if unmatched:
            warnings.warn(f"`{field}` names {unmatched}, which are not in the base model and get no adapter.")
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = set(getattr(converted, field)) & set(getattr(config, field))
        unmatched = sorted(patterns - {get_pattern_key([key], path) for key in patterns for path in plan})
        if unmatched:
            raise ValueError(f"`{field}` has the keys {unmatched}, which match no module that gets an adapter.")


def check_target(module: nn.Module, path: str, rank: int, config: ElasticLoraConfig) -> None:
    """Raise a ValueError if this module could not get an adapter of that maximal rank."""
    check_ranks(module, path, config.rank_options(rank, rank_multiple(module)))
    if config.init_lora_weights == "mica" and isinstance(module, nn.Embedding):
        # MiCA freezes B through the slice that indexing returns, which cannot be frozen
        raise ValueError(f"{path!r} is an embedding, which cannot be elastic with `init_lora_weights='mica'`.")


# -- after peft's own part -----------------------------------------------------------------------------------------


def make_layers_elastic(model: nn.Module, adapter_name: str) -> None:
    """Make what peft has injected elastic, all ranks active."""
    for module in model.modules():
        unpack_for_gradients(module)
    for name, layer in find_layers(model, adapter_name):
        make_elastic(layer, adapter_name, name)
        layer.kwargs.pop("tied_adapter", None)  # views that would keep the model from being copied
        if BITSANDBYTES.matches(base_layer := layer.get_base_layer()):
            read_unpacked(layer)
            if adapter_name in layer.lora_variant:  # which reads the weight in every forward pass
                keep_unpacked(base_layer)


def tag_model(state: ElasticState, model: nn.Module) -> None:
    """Tag the model card, which peft does for the type LORA only."""
    tags = getattr(model, "model_tags", None) or []
    if "lora" not in tags:
        model.model_tags = [*tags, "lora"]
        state.tagged = True


def untag_model(state: ElasticState, model: nn.Module) -> None:
    """Take the tag off again that `tag_model` has put there."""
    if state.tagged:
        model.model_tags.remove("lora")
        if not model.model_tags and not hasattr(type(model), "model_tags"):
            del model.model_tags
        state.tagged = False


@contextmanager
def unchanged_on_error(tuner: LoraModel, model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Take an injection back if it fails inside."""
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    active = {module: module._active_adapter for module in model.modules() if isinstance(module, _WRAPPERS)}
    targeted = list(tuner.targeted_module_names), list(tuner.targeted_parameter_names)
    try:
        yield
    except Exception:
        tuner.targeted_module_names, tuner.targeted_parameter_names = targeted
        tuner.peft_config.pop(adapter_name, None)
        _remove_adapter(model, adapter_name, active)
        for parameter, flag in requires_grad.items():
            parameter.requires_grad_(flag)
        if not hasattr(model, "peft_config") and getattr(model, "_hf_peft_config_loaded", False):
            model._hf_peft_config_loaded = False  # set by transformers' `add_adapter` beforehand
        raise


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
