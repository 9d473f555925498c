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
"""The base under elastic adapters: its width and depth, which follow the active adapter, and the order of its units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Optional

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ...common.names import has_suffix
from ...common.parameters import check_here
from ...layers.backends.bitsandbytes import unpack
from ...layers.narrowed import active_ranges
from ...structure.along import Along
from ...structure.blocks import Structure
from ...structure.description import check_describable
from ...structure.importance import (
    check_order,
    check_sort,
    check_sortable,
    note_orders,
    noted_orders,
    same_orders,
    sort_by_importance,
)
from ...structure.modules import module_at
from ...structure.parts import KINDS
from ...structure.space import activate, check_narrowable_layers, structural_choices
from ...supernet.host import HOST_ATTRIBUTE
from ...supernet.space import Choice, Subnet
from .config import ElasticLoraConfig
from .layer import set_width
from .state import ElasticAdapter, ElasticState, active_adapters, elastic_configs


# -- what may be chosen --------------------------------------------------------------------------------------------


def choices_of_base(
    state: ElasticState,
    model: nn.Module,
    configs: Mapping[str, Any],
    config: ElasticLoraConfig,
    targets: Mapping[str, nn.Module],
) -> list[Choice]:
    """Make the choices of width and depth of an adapter that is to be injected.

    Args:
        state: of the tuner.
        model: the base model.
        configs: those of the adapters that are there.
        config: of the adapter that is to come.
        targets: path -> module, of everything that gets the adapter.

    Raises:
        ValueError: if the base, or what gets an adapter in it, does not allow them.
    """
    if not config.is_structural:
        return []
    check_here("the model", model.parameters())
    structure = Structure(model)
    choices = structural_choices(structure, config.elastic_width, config.depth_entries)
    check_narrowable_layers(model, structure, choices)
    _check_trained_modules(model, structure, config)
    _check_targets(model, choices, config, targets)
    if config.elastic_width and config.importance == "magnitude" and not config.sorted_base:
        if not noted_orders(model):
            others = [
                name for name, c in elastic_configs(configs).items() if name in state.adapters and c.elastic_width
            ]
            if others:
                raise ValueError(
                    f"`importance='magnitude'` would sort the base under adapter {others[0]!r}, which keeps its first heads "
                    "and channels as they are; use 'none'."
                )
        check_sortable(model, [width for width in structure.widths if width.kind in config.elastic_width])
    check_describable(model, choices)
    return choices


def _check_trained_modules(model: nn.Module, structure: Structure, config: ElasticLoraConfig) -> None:
    """Raise a ValueError if a module that is trained whole is narrowed, or skipped, with a block."""
    inside = [f"{block.path}." for block in structure.blocks]
    for path, module in model.named_modules():
        named = any(has_suffix(path, name) for name in config.modules_to_save or ())
        trained = named or isinstance(module, AuxiliaryTrainingWrapper)
        if trained and any(f"{path}.".startswith(block) or block.startswith(f"{path}.") for block in inside):
            raise ValueError(
                f"`modules_to_save`: {path!r} is in, or around, a block whose width or depth is elastic. Leave it out."
            )


def _check_targets(
    model: nn.Module, choices: list[Choice], config: ElasticLoraConfig, targets: Mapping[str, nn.Module]
) -> None:
    """Raise a ValueError if an adapter of a kind that cannot follow sits on what is narrowed."""
    narrowed = {name for choice in choices if choice.kind in KINDS for name in choice.modules}
    parameters = {name.rpartition(".")[0] for name, _ in model.named_parameters()} if config.target_parameters else ()
    for path in narrowed:
        if isinstance(targets.get(path), nn.Embedding):
            raise ValueError(f"`target_modules`: the embedding {path!r} is narrowed with the heads; leave it out.")
        if path in parameters and any(has_suffix(f"{path}.weight", name) for name in config.target_parameters or ()):
            raise ValueError(f"`target_parameters`: the weight of {path!r} is narrowed; use `target_modules`.")


# -- what is active ------------------------------------------------------------------------------------------------


def enabled_adapters(model: nn.Module, configs: Mapping[str, Any]) -> list[str]:
    """Read the active elastic adapters from the layers; there are none while adapters are disabled."""
    return active_adapters(model, configs) if is_enabled(model) else []


def is_enabled(model: nn.Module) -> bool:
    """Whether adapters are not disabled, read from the layers; False without any."""
    return next((not m.disable_adapters for m in model.modules() if isinstance(m, LoraLayer)), False)


def narrowing(
    state: ElasticState, adapter_name: str, values: Optional[Mapping[str, Mapping[str, int]]] = None
) -> dict[str, int]:
    """Tell what the subnet of an adapter, or of `values`, takes away from the base: the choices that are below the whole."""
    adapter = state.adapters.get(adapter_name)
    structure = None if adapter is None else adapter.structure
    if structure is None:
        return {}
    whole = {width.key: width.full for width in structure.widths}
    chosen = (state.structural_values if values is None else values).get(adapter_name, {})
    return {key: value for key, value in chosen.items() if value != whole.get(key, 1)}


def check_together(
    state: ElasticState, active: Sequence[str], values: Optional[Mapping[str, Mapping[str, int]]] = None
) -> dict[str, int]:
    """Tell what these adapters, active together, take away from the base.

    Raises:
        ValueError: if they want different things, or it cannot be taken away now.
    """
    structural = [name for name in active if name in state.adapters and state.adapters[name].structure is not None]
    narrowings = {name: narrowing(state, name, values) for name in structural}
    first = next(iter(narrowings.values()), {})
    if any(other != first for other in narrowings.values()):
        raise ValueError(
            f"The adapters {list(narrowings)} cannot be active together: their subnets differ in the width or depth of the "
            "base."
        )
    layers = (layer for adapter in state.adapters.values() for layer in adapter.layers.values())
    for layer in layers if first else ():
        if layer.merged_adapters:
            raise ValueError(
                f"The adapters {layer.merged_adapters} are merged into the base, which cannot be narrowed then. Call "
                "`unmerge_adapter()` first."
            )
        if len(layer.lora_magnitude_vector) and set(layer.lora_magnitude_vector) & set(active):
            raise ValueError("Adapters with DoRA cannot be active beside one that narrows the base.")
    return first


def check_batch(
    state: ElasticState, model: nn.Module, configs: Mapping[str, Any], adapter_names: Sequence[str]
) -> None:
    """Raise a ValueError if the adapters of the examples of one batch do not go with the base as it is."""
    active = check_together(state, enabled_adapters(model, configs))
    for name in dict.fromkeys(adapter_names):
        if narrowing(state, name) != active:
            raise ValueError(
                f"`adapter_names`: all adapters of a batch compute with one base, and that of {name!r} has another width "
                "or depth than the active one. Activate subnets with the same, or run it in a batch of its own."
            )


def check_exportable(state: ElasticState, adapter_name: str) -> None:
    """Raise a ValueError if the active subnet of an adapter is more than smaller ranks."""
    taken = narrowing(state, adapter_name)
    if taken:
        raise ValueError(
            f"The active subnet of adapter {adapter_name!r} narrows or skips parts of the base ({next(iter(taken))!r}), which "
            "a plain LoRA adapter cannot say. Use `extract_subnet()` or `merge_and_unload()`, or choose a subnet whose ranks "
            "alone are smaller."
        )


def apply_structure(state: ElasticState, model: nn.Module, configs: Mapping[str, Any]) -> None:
    """Narrow the base, and the adapters on it, to what the active adapter has chosen."""
    structure = next((adapter.structure for adapter in state.adapters.values() if adapter.structure is not None), None)
    if structure is None:
        return
    state.followed = followed = enabled_adapters(model, configs)
    for path in activate(model, structure, check_together(state, followed)):
        module = module_at(model, path)
        if isinstance(module, LoraLayer):
            set_width(module, *active_ranges(module.get_base_layer()))


def follow_from_now_on(state: ElasticState, model: nn.Module) -> None:
    """Let the base follow the active adapter, whoever activates it: transformers' own `set_adapter` and `disable_adapters` do
    not tell the tuner."""
    if state.follower is None:
        state.follower = model.register_forward_pre_hook(_follow)


def _follow(module: nn.Module, args: Any) -> None:
    # in the tuner that the model has now, and not the one that registered the hook: another may have taken over, or this may be a copy
    host = module.__dict__.get(HOST_ATTRIBUTE)
    if host is None or torch.compiler.is_compiling():
        return
    if host._state.followed != enabled_adapters(host.model, host._configs):
        apply_structure(host._state, host.model, host._configs)


@contextmanager
def whole_base(state: ElasticState, model: nn.Module, configs: Mapping[str, Any]) -> Iterator[None]:
    """Give the base its full width and depth inside."""
    values, state.structural_values = state.structural_values, {}
    apply_structure(state, model, configs)
    try:
        yield
    finally:
        state.structural_values = values
        apply_structure(state, model, configs)


def unpack_weights(model: nn.Module) -> None:
    """Bring 4 bits of bitsandbytes out of the order that its inference on CPUs has put them into, in which they cannot be read."""
    for module in model.modules():
        unpack(module)


# -- order ---------------------------------------------------------------------------------------------------------


def sort_base(
    state: ElasticState,
    model: nn.Module,
    configs: Mapping[str, Any],
    calibration: Any,
    importance: Optional[str | Mapping[str, torch.Tensor]],
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """Sort the base, and its adapters along. See `ElasticLoraModel.sort_by_importance`, whose other arguments are `settings`."""
    default, kinds = _sorted_by(state, model, configs)
    with whole_base(state, model, configs):
        scores = sort_by_importance(
            model, default if importance is None else importance, calibration, kinds=kinds, **settings
        )
    _note_sorted(model, configs)
    for copy in Along(model, averaged=settings.get("averaged")).averaged:
        if (host := getattr(copy, HOST_ATTRIBUTE, None)) is not None:
            _note_sorted(copy, host._configs)
    return scores


def _sorted_by(state: ElasticState, model: nn.Module, configs: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The importance that the first adapter with a width names, and the kinds that are elastic in any of them."""
    wide = [c for name, c in elastic_configs(configs).items() if c.elastic_width and name in state.adapters]
    if not wide:
        raise ValueError("No adapter has an `elastic_width`, so there is nothing to sort for.")
    check_unmerged(model)
    return wide[0].importance, tuple(dict.fromkeys(kind for config in wide for kind in config.elastic_width or {}))


def _note_sorted(model: nn.Module, configs: Mapping[str, Any]) -> None:
    for config in elastic_configs(configs).values():
        config.sorted_base = bool(noted_orders(model))


class Sortable:
    """What a training whose stages sort asks of the tuner, beside `sort_by_importance`."""

    model: nn.Module
    if TYPE_CHECKING:  # properties of the tuner

        @property
        def _state(self) -> ElasticState: ...
        @property
        def _configs(self) -> dict[str, Any]: ...

    def check_sort(self, calibration: Any = None, *, optimizer: Any = None, averaged: Any = None) -> None:
        """ValueError if `sort_by_importance` would refuse these arguments, or the importance of the configuration sorts nothing."""
        importance, kinds = _sorted_by(self._state, self.model, self._configs)
        with whole_base(self._state, self.model, self._configs):
            check_sort(self.model, importance, calibration, kinds=kinds, optimizer=optimizer, averaged=averaged)

    def noted_orders(self) -> dict[str, torch.Tensor]:
        """Which unit of the original base each unit is now, int64 (units,), by the name of the order."""
        return noted_orders(self.model)

    def resume_orders(self, orders: Mapping[str, torch.Tensor], averaged: Any = None) -> None:
        """ValueError unless the base is in these orders of a checkpoint, into which loading the adapter brings it; copies of it, as in
        `sort_by_importance`, are noted to be."""
        if not same_orders(self.model, orders):
            raise ValueError(
                "The heads and channels of the base are in another order than in the checkpoint of the adapter: load the adapter from "
                "the checkpoint (`trainer.train(resume_from_checkpoint=...)` does)."
            )
        for copy in Along(self.model, averaged=averaged).averaged:
            note_orders(copy, orders)


def check_unmerged(model: nn.Module) -> None:
    """Raise a ValueError if an adapter is merged into the base, whose order is to be changed."""
    if any(layer.merged for layer in model.modules() if isinstance(layer, LoraLayer)):
        raise ValueError("An adapter is merged; call `unmerge_adapter()` before the base is sorted.")


def settle_order(state: ElasticState, model: nn.Module, config: ElasticLoraConfig) -> None:
    """Sort the base of a new adapter if that needs no data; demand the order of an adapter that is to be loaded."""
    if noted_orders(model):
        config.sorted_base = True
    elif config.sorted_base:
        if state.order_guard is None:
            state.order_guard = model.register_forward_pre_hook(_demand_order)
    elif config.elastic_width and config.importance == "magnitude" and not config.inference_mode:
        sort_by_importance(model, "magnitude", kinds=tuple(config.elastic_width), progress=False)
        config.sorted_base = True


def order_is_there(state: ElasticState) -> None:
    """Demand the order of the base no more: the weights of an adapter are being loaded, and it with them."""
    if state.order_guard is not None:
        state.order_guard.remove()
        state.order_guard = None


def _demand_order(module: nn.Module, args: Any) -> None:
    raise ValueError(
        "The adapter belongs to a base whose heads and channels are sorted, and the order is in its file: load it with "
        "`PeftModel.from_pretrained` or `PeftModel.load_adapter`."
    )


def check_sorted(adapter: ElasticAdapter, model: nn.Module, config: ElasticLoraConfig, subnet: Subnet) -> None:
    """Raise a ValueError if the subnet keeps the first heads or channels of a base in which those are any."""
    if config.elastic_width and not config.sorted_base:
        assert adapter.structure is not None
        check_order(model, adapter.structure, config.importance, subnet)
