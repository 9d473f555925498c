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
"""Subnets of elastic adapters: what can be chosen, what is active, and what a training step activates for itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Optional

from torch import nn
from torch.distributed.tensor import DTensor

from ...structure.blocks import Structure
from ...structure.narrow import check_skippable, check_units
from ...structure.space import check_depth, layer_shapes, structural_choices
from ...supernet.groups import find_blocks, group_modules, plain_path
from ...supernet.space import Choice, SearchSpace, Subnet
from .base import apply_structure, check_sorted, check_together, choices_of_base, follow_from_now_on
from .config import ElasticLoraConfig
from .layer import full_weights, get_rank, rank_multiple, set_rank
from .optimizers import watch_optimizers
from .state import ElasticAdapter, ElasticState, Plan, active_adapters, elastic_configs, find_layers


# -- what can be chosen --------------------------------------------------------------------------------------------


def find_adapters(
    state: ElasticState, model: nn.Module, configs: Mapping[str, Any], injected: str
) -> dict[str, ElasticAdapter]:
    """Find layers and search space of the adapter `injected` just now, and of all others that are not in the state yet: another
    tuner may have injected them."""
    found = dict(state.adapters)
    found.pop(injected, None)
    for adapter_name, config in elastic_configs(configs).items():
        layers = dict(find_layers(model, adapter_name))
        if adapter_name in found or not layers:
            continue
        ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
        sizes = {
            name: sum(weight.numel() // ranks[name] for weight in full_weights(layer, adapter_name))
            for name, layer in layers.items()
        }
        multiples = {name: rank_multiple(layer) for name, layer in layers.items()}
        choices = rank_choices(config, ranks, multiples, model, sizes)
        structure, shapes = None, []
        if config.is_structural:
            # one for all, which knows what is active
            known = (adapter.structure for adapter in found.values() if adapter.structure is not None)
            structure = next(known, None) or Structure(model)
            rank_keys = {name: choice.key for choice in choices for name in choice.modules}
            structural = structural_choices(structure, config.elastic_width, config.depth_entries)
            shapes = layer_shapes(model, structure, structural, rank_keys)
            choices += structural
        found[adapter_name] = ElasticAdapter(layers, SearchSpace(choices, shapes), structure)
    return found


def check_choices(
    state: ElasticState,
    model: nn.Module,
    configs: Mapping[str, Any],
    adapter_name: str,
    config: ElasticLoraConfig,
    plan: Plan,
) -> None:
    """Raise a ValueError if an adapter that is to be injected could not have the choices that its configuration asks for, or the
    chosen subnet is none of them.

    Args:
        state: of the tuner.
        model: the base model.
        configs: of all adapters.
        adapter_name: the adapter.
        config: its configuration, as peft completes it.
        plan: what it is going to adapt.
    """
    ranks = {plain_path(path): rank for path, (_, rank) in plan.items()}
    multiples = {plain_path(path): rank_multiple(module) for path, (module, _) in plan.items()}
    choices = rank_choices(config, ranks, multiples, model)
    choices += choices_of_base(state, model, configs, config, {path: module for path, (module, _) in plan.items()})
    # with `layer_replication`, the layers that are to come are not known yet
    if config.active_subnet is not None and not config.layer_replication:
        check_chosen(config, adapter_name, SearchSpace(choices))


def rank_choices(
    config: ElasticLoraConfig,
    ranks: Mapping[str, int],
    multiples: Mapping[str, int],
    model: nn.Module,
    sizes: Optional[Mapping[str, int]] = None,
) -> list[Choice]:
    """Make one choice for each rank group.

    Args:
        config: the configuration of the adapter.
        ranks: path -> maximal rank, of each module that has the adapter.
        multiples: path -> what its ranks are divisible by.
        model: the base model.
        sizes: path -> adapter parameters per unit of rank.

    Raises:
        ValueError: if a group ties modules of different maximal ranks.
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


def check_chosen(config: ElasticLoraConfig, adapter_name: str, space: SearchSpace) -> Subnet:
    """Get the subnet that a configuration has chosen.

    Raises:
        ValueError: if it is not in the search space.
    """
    try:
        return space.subnet(config.active_subnet)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(
            f"`active_subnet` in the configuration of adapter {adapter_name!r} is wrong: {error}"
        ) from error


# -- what is active ------------------------------------------------------------------------------------------------


def resolve_adapter(model: nn.Module, configs: Mapping[str, Any], adapter_name: Optional[str]) -> str:
    """Get the name of an elastic adapter, None standing for the active one.

    Raises:
        ValueError: if there is no such adapter, or several are active and none is named.
    """
    elastic = elastic_configs(configs)
    if adapter_name is None:
        active = active_adapters(model, configs)
        if len(active) != 1:
            raise ValueError(f"`adapter_name` is needed: {len(active)} elastic adapters are active, {active}.")
        adapter_name = active[0]
    if adapter_name not in elastic:
        raise ValueError(f"`adapter_name` must be one of the elastic adapters {list(elastic)}, got {adapter_name!r}.")
    return adapter_name


def read_subnet(state: ElasticState, adapter_name: str) -> Subnet:
    """Read from the layers of an adapter what they compute now."""
    layers, space = state.layers(adapter_name), state.adapter(adapter_name).space
    ranks = {
        choice.key: get_rank(layers[choice.modules[0]], adapter_name) for choice in space if choice.kind == "rank"
    }
    return Subnet(ranks | state.structural_values.get(adapter_name, {}))


def activate(
    state: ElasticState,
    model: nn.Module,
    configs: Mapping[str, Any],
    adapter_name: str,
    subnet: Subnet,
    when_loaded: bool = False,
) -> None:
    """Let an adapter compute as a subnet, a complete one of its search space.

    Args:
        state: of the tuner.
        model: the base model.
        configs: of all adapters.
        adapter_name: the adapter.
        subnet: the subnet.
        when_loaded: see `set_rank`.

    Raises:
        ValueError: if that cannot be now; nothing is changed then.
    """
    layers, adapter = state.layers(adapter_name), state.adapter(adapter_name)
    merged = [name for name, layer in layers.items() if adapter_name in layer.merged_adapters]
    if merged:
        raise ValueError(
            f"Adapter {adapter_name!r} is merged (for example in {merged[0]!r}); call `unmerge_adapter()` before "
            "choosing another subnet."
        )
    check_sorted(adapter, model, configs[adapter_name], subnet)
    values = {choice.key: subnet[choice.key] for choice in adapter.space if choice.kind != "rank"}
    if values:
        taken = check_together(
            state, active_adapters(model, configs), state.structural_values | {adapter_name: values}
        )
        if adapter.structure is not None:
            check_skippable(model, adapter.structure.blocks, values)
            if taken:
                check_units(model, adapter.structure.widths)
    for choice in adapter.space:
        for name in choice.modules if choice.kind == "rank" else ():
            set_rank(layers[name], adapter_name, subnet[choice.key], when_loaded=when_loaded)
    if values:
        state.structural_values[adapter_name] = values
        apply_structure(state, model, configs)
        follow_from_now_on(state, model)


def activate_chosen(
    state: ElasticState,
    model: nn.Module,
    configs: Mapping[str, Any],
    adapter_name: str,
    when_loaded: bool = False,
) -> None:
    """Let an adapter compute as the subnet that its configuration has chosen, the maximal one by default."""
    if adapter_name not in state.adapters:
        return
    config, space = configs[adapter_name], state.adapter(adapter_name).space
    if config.active_subnet is None:
        activate(state, model, configs, adapter_name, space.max)
    else:
        chosen = check_chosen(config, adapter_name, space)
        activate(state, model, configs, adapter_name, chosen, when_loaded=when_loaded)


def choose(state: ElasticState, model: nn.Module, configs: Mapping[str, Any], adapter_name: str, subnet: Any) -> None:
    """Activate a subnet and write it into the configuration. See `ElasticLoraModel.set_subnet`."""
    checked = state.adapter(adapter_name).space.subnet(subnet)
    activate(state, model, configs, adapter_name, checked)
    configs[adapter_name].active_subnet = checked.to_dict()
    state.sampled, state.suspended = False, {}
    state.trained_version = None


def restore(state: ElasticState, model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Activate the chosen subnet of every adapter again."""
    for adapter_name in elastic_configs(configs):
        activate_chosen(state, model, configs, adapter_name)
    state.sampled, state.suspended = False, {}


# -- training steps ------------------------------------------------------------------------------------------------


def sample(state: ElasticState, model: nn.Module, configs: Mapping[str, Any], adapter_name: str, subnet: Any) -> None:
    """Activate a subnet for a training step. See `ElasticLoraModel.sample_subnet`."""
    adapter = state.adapter(adapter_name)
    checked = adapter.space.subnet(subnet)
    if adapter.structure is not None:
        check_depth(adapter.structure, checked)
    activate(state, model, configs, adapter_name, checked)
    state.sampled, state.suspended = True, {}
    watch_optimizers(state)
    state.trained_version = None


def suspend(state: ElasticState, model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Go from what a training step has activated to the chosen subnets, for evaluation mode."""
    if not state.sampled:
        return
    sampled = {name: read_subnet(state, name) for name in state.adapters if name in configs}
    restore(state, model, configs)
    state.suspended = sampled


def resume(state: ElasticState, model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Go on with what a training step had activated, after something in it, such as generation, was in evaluation mode."""
    suspended, state.suspended = state.suspended, {}
    for name, subnet in suspended.items():
        adapter = state.adapters.get(name)
        if adapter is not None and not any(layer.merged for layer in adapter.layers.values()):
            sample(state, model, configs, resolve_adapter(model, configs, name), subnet)


def warn_if_one_is_trained(state: ElasticState, model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Warn, once, when the weights have been updated in place since the last call while one subnet stayed active.
    transformers' Trainer calls `model.train()` in every step."""
    if state.warned_about_sampling or state.sampled:
        return
    adapters = {name: state.adapters[name] for name in active_adapters(model, configs) if name in state.adapters}
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
    version, before = local.flatten()[:16].tolist(), state.trained_version
    state.trained_version = version
    if before is not None and version != before:
        state.warned_about_sampling = True
        warnings.warn(
            "An elastic adapter is being trained with one and the same subnet in every step, which trains a plain "
            "LoRA adapter. Pass `callbacks=[SubnetSamplingCallback()]` to the Trainer, or call "
            "`model.sample_subnet(...)` in each step of your own loop."
        )
