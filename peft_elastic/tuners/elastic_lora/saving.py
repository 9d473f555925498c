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
"""What stands in the file of an elastic adapter besides what peft writes: the order of a sorted base; and the conversion of
adapters that changed their base (PiSSA and relatives)."""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils.save_and_load import _validate_lora_adapter_state_dict
from torch import nn

from ...structure.importance import is_stored_in, move_adapter, note_orders, noted_orders, reorder, same_orders
from ...supernet.host import HOST_ATTRIBUTE
from .base import check_unmerged, order_is_there, whole_base
from .config import ElasticLoraConfig
from .export import FILE_PREFIX, ORDER_SUFFIX
from .layer import is_elastic, rank_multiple
from .subnets import activate_chosen, rank_choices


def add_orders(
    model: nn.Module, config: ElasticLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Add to the state dict of an adapter, as peft has made it, the order of its base.

    Args:
        model: a `PeftModel`, or a base model.
        config: of the adapter, in which is written whether the base is sorted.
        adapter_name: the adapter.
        state_dict: what peft has made.
    """
    # peft warns of weights that a sharded model left empty for the type LORA only
    _validate_lora_adapter_state_dict(state_dict, adapter_name=adapter_name)
    base_model, prefix = _base_and_prefix(model)
    orders = noted_orders(base_model)
    config.sorted_base = bool(orders)
    return state_dict | {f"{prefix}{name}{ORDER_SUFFIX}": order.to(torch.int32) for name, order in orders.items()}


def prepare_load(
    model: nn.Module, config: ElasticLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Make model and adapter ready for weights from a file, and these weights ready for peft.

    Args:
        model: a `PeftModel`, or a base model, in which the adapter is.
        config: of the adapter.
        adapter_name: the adapter.
        state_dict: what is in the file.

    Raises:
        ValueError: if the adapter was put in by somebody who does not know elastic ones, or its order cannot be followed.
    """
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
        order_is_there(host._state)
        activate_chosen(host._state, host.model, host._configs, adapter_name)
    return state_dict


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
                host._state.own_orders = orders
        config.sorted_base = bool(orders)
        return state_dict
    others = [c for name, c in getattr(model, "peft_config", {}).items() if name != adapter_name]
    if not any(getattr(other, "elastic_width", None) for other in others):
        if host is None:
            reorder(base_model, orders)
        else:
            check_unmerged(host.model)
            with whole_base(host._state, host.model, host._configs):
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


def _base_and_prefix(model: nn.Module) -> tuple[nn.Module, str]:
    """Get the base model, and the prefix of its names in state dicts of adapters."""
    return (model.get_base_model(), FILE_PREFIX) if isinstance(model, PeftModel) else (model, "")


# -- adapters that changed their base ------------------------------------------------------------------------------


def save_initial_config(model: PeftModel, config: ElasticLoraConfig, initial: str) -> None:
    """Before peft converts a trained PiSSA, OLoRA or CorDA adapter: write the configuration of the initial adapter as peft needs it.

    Args:
        model: the `PeftModel`.
        config: a copy of that of the adapter, which is saved later.
        initial: the folder of the adapter as it was before the training.

    Raises:
        ValueError: for adapters that cannot be converted.
    """
    if noted_orders(model.get_base_model()):
        raise ValueError(
            "`path_initial_model_for_weight_conversion` does not work with a base that was sorted after the adapter changed it, "
            "as the initial weights are in another order."
        )
    if config.target_parameters:
        raise ValueError("`path_initial_model_for_weight_conversion` does not work with `target_parameters`.")
    # peft sets the field `init_weights` for types other than LORA, so its copy on disk still asks for PiSSA
    del config.init_weights
    config.init_lora_weights = True
    config.save_pretrained(initial)


def put_initial_in_front(
    model: PeftModel,
    config: ElasticLoraConfig,
    trained: dict[str, torch.Tensor],
    converted: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Keep an adapter elastic that peft has converted into one for the original base model.

    peft appends the initial A0, B0 behind A and B, so that B A - B0 A0 comes out. Here the initial part goes in
    front: it belongs to every subnet, and rank k of the trained adapter becomes rank r + k.

    Args:
        model: the `PeftModel`.
        config: a copy of that of the adapter, which is saved later; its ranks and its subnet are written here.
        trained: the state dict of the adapter.
        converted: what peft made of it.
    """
    for name, tensor in converted.items():
        dim = 0 if "lora_A" in name else 1
        trained_part, initial_part = tensor.chunk(2, dim=dim)
        converted[name] = torch.cat([initial_part, trained_part], dim=dim)

    # peft goes on to double `r`, `lora_alpha` and the patterns of this configuration
    if config.active_subnet is not None:
        ranks = {
            name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensor.shape[0]
            for name, tensor in trained.items()
            if name.endswith(".lora_A.weight")
        }
        base_model = model.get_base_model()
        multiples = {name: rank_multiple(base_model.get_submodule(name)) for name in ranks}
        choices = rank_choices(config, ranks, multiples, base_model)
        config.active_subnet |= {c.key: c.options[0] + config.active_subnet[c.key] for c in choices}
    config.elastic_ranks = [config.r + k for k in config.rank_options(config.r)]
    # what does not depend on the base weights stays: DoRA's magnitudes, `modules_to_save`, biases
    return trained | converted
