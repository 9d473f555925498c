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
"""Merging elastic adapters into their base, or into each other, and taking them off."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from ...common.parameters import check_here, check_parameters
from ...layers.backends import find_backend
from ...layers.backends.bitsandbytes import allow_packing
from ...structure.description import extract_described
from ...structure.importance import reorder
from ...structure.narrow import is_narrowed
from ...supernet.host import HOST_ATTRIBUTE
from .base import apply_structure, check_together, enabled_adapters, whole_base
from .injection import untag_model
from .layer import full_weights, get_rank, set_rank, zero_inactive
from .state import ElasticState


logger = logging.getLogger(__name__)


def check_merge_into(layer: LoraLayer, adapter_name: str, path: str) -> None:
    """Raise a ValueError if merging into this layer would change what the model computes, or be lost."""
    base_layer = layer.get_base_layer()
    check_parameters({path: base_layer})
    check_in_memory(layer, adapter_name, path)
    backend = find_backend(base_layer)
    if backend is not None and backend.obstacle("merge"):
        raise ValueError(
            f"{path!r} is quantised and adapter {adapter_name!r} is not quantisation-aware, so the merged weight would be "
            "rounded to other values than the adapter was trained with. `peft_elastic.merge_and_requantize(model)` does "
            "that, and reports the error; train with `SparseQALoraConfig(quantization_aware=True)` to avoid it."
        )


def check_merges(
    state: ElasticState, adapter_names: Sequence[str], check_into: Callable[[LoraLayer, str, str], None]
) -> None:
    """Raise a ValueError if one of these adapters cannot be merged; `check_into` says so of (layer, adapter, path)."""
    check_layers_here(state, adapter_names)
    for name in adapter_names:
        for path, layer in state.adapters[name].layers.items() if name in state.adapters else ():
            check_into(layer, name, path)


def check_layers_here(state: ElasticState, adapter_names: Sequence[str]) -> None:
    """Raise a ValueError if an engine has spread a layer, or one of these adapters on it, over several processes."""
    for name in adapter_names:
        for path, layer in state.adapters[name].layers.items() if name in state.adapters else ():
            check_here(path, (*layer.get_base_layer()._parameters.values(), *full_weights(layer, name)))


def check_in_memory(layer: LoraLayer, adapter_name: str, path: str) -> None:
    """Raise a ValueError if an adapter was loaded on weights that accelerate has offloaded, which peft moves there and loses."""
    for kind in (layer.lora_A, layer.lora_B):
        inner = kind[adapter_name] if adapter_name in kind else None
        weight = None if inner is None else inner._parameters.get("weight")
        if weight is not None and weight.is_meta and not hasattr(inner, "_hf_hook"):
            raise ValueError(
                f"The weights of adapter {adapter_name!r} of {path!r} are not in memory: accelerate has offloaded the base "
                "(device_map). Load the base without offloading, or merge from folder to folder with `peft_elastic.merge_folder`."
            )


def check_not_narrowed(model: nn.Module) -> None:
    """Raise a ValueError if the active subnet does not compute with the whole base, into which an adapter is to be merged."""
    if is_narrowed(model):
        raise ValueError(
            "The active subnet narrows or skips parts of the base, into which an adapter cannot be merged in place. Use "
            "`merge_and_unload()` or `extract_subnet()`, or `set_subnet('max')` first."
        )


def check_not_tied(model: nn.Module, twice: Mapping[LoraLayer, LoraLayer]) -> None:
    """Raise a ValueError if there are layers whose update another layer brings, as `check_tied_weights` finds them."""
    if twice:
        path = next(path for path, module in model.named_modules() if module in twice)
        raise ValueError(
            f"{path!r} is tied with the embedding, and so is its adapter (`ensure_weight_tying`), which cannot be merged in place: "
            "use `merge_and_unload()` or `extract_subnet()`."
        )


# -- taking adapters off -------------------------------------------------------------------------------------------


def settle_base(
    state: ElasticState,
    model: nn.Module,
    configs: Mapping[str, Any],
    merge: bool,
    adapter_names: Optional[list[str]],
) -> None:
    """Make the base what it will be without adapters: the active subnet's part of it for a merge, and else the whole.

    Args:
        state: of the tuner.
        model: the base model.
        configs: of all adapters.
        merge: whether adapters are to be merged.
        adapter_names: those; None for the active ones.

    Raises:
        ValueError: if these adapters belong to another width or depth than the active one.
    """
    narrowed = is_narrowed(model)
    if not merge:
        if narrowed:
            state.structural_values = {}
            apply_structure(state, model, configs)
        return
    if adapter_names is not None:
        active = enabled_adapters(model, configs)
        if check_together(state, adapter_names) != check_together(state, active):
            raise ValueError(
                f"`adapter_names`: {adapter_names} belong to another width or depth of the base than the active one. Call "
                "`set_adapter` first."
            )
    if narrowed:
        extract_described(model)


def clean_up(state: ElasticState, model: nn.Module, merged: bool) -> None:
    """Take off a base model, without adapters now, what their tuner has left on it."""
    model.__dict__.pop(HOST_ATTRIBUTE, None)
    for module in model.modules():
        allow_packing(module)
    for hook in (state.follower, state.order_guard):
        if hook is not None:
            hook.remove()
    if not merged:
        reorder(model, state.own_orders)
    untag_model(state, model)


# -- adapters into each other --------------------------------------------------------------------------------------


@contextmanager
def weighted(
    state: ElasticState, model: nn.Module, configs: dict[str, Any], adapters: list[str], adapter_name: str
) -> Iterator[None]:
    """Let peft combine adapters inside: each enters with its active subnet, and the new adapter has a fixed rank.

    Args:
        state: of the tuner.
        model: the base model.
        configs: the tuner's own, of all adapters.
        adapters: those that are combined.
        adapter_name: the new one.
    """
    # peft derives the configuration of the new adapter from the first one, but with another rank
    own_config = configs[adapters[0]]
    template = copy.copy(own_config)
    template.elastic_ranks, template.rank_groups, template.active_subnet = None, "module", None
    template.init_lora_weights = True  # the weights get replaced, and PiSSA would change the base once more
    state.weighted_adapter = adapter_name
    configs[adapters[0]] = template
    try:
        with whole_base(state, model, configs), _inactive_ranks_zeroed(state, adapters):
            yield
    finally:
        configs[adapters[0]] = own_config
        state.weighted_adapter = None
    configs[adapter_name].initialized_with = own_config.initialized_with


@contextmanager
def _inactive_ranks_zeroed(state: ElasticState, adapters: list[str]) -> Iterator[None]:
    """Let all ranks of these adapters together compute what their active subnets compute."""
    layers = [(layer, name) for name in adapters for layer in state.layers(name).values()]
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
