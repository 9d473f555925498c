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
"""Weights that several modules share, such as a tied output layer, and adapters on them.

A merge writes into the weight, so that the other modules get the update too, for which the adapter was not trained.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import nn


def check_tied_weights(model: nn.Module, adapter_names: Optional[Sequence[str]]) -> dict[LoraLayer, LoraLayer]:
    """Raise a ValueError if merging adapters would change the outputs because the weight of a layer is shared.

    Args:
        model: the base model, with LoRA layers in it.
        adapter_names: those to be merged; None for the active ones.

    Returns:
        Each layer whose weight gets its whole update from another layer -> that layer. The two have one weight and the same
        update, as with `ensure_weight_tying`, so that it must be added once.
    """
    # where each weight stands: an address -> the paths of the modules that have it
    paths: dict[Any, list[str]] = {}
    layers: dict[LoraLayer, list[str]] = {}
    saved: tuple[str, ...] = ()  # originals of `modules_to_save`, in whose place a copy computes
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, LoraLayer):
            layers.setdefault(module, []).append(path)
        elif isinstance(module, ModulesToSaveWrapper):
            saved += (f"{path}.original_module",)
        if path.startswith(saved):
            continue
        for weight in module._parameters.values():
            if weight is not None and weight.numel():
                paths.setdefault(_address(weight), []).append(path)
    changed = {layer: names for layer in layers if (names := _names(layer, adapter_names))}
    first: dict[Any, LoraLayer] = {}
    twice: dict[LoraLayer, LoraLayer] = {}
    for layer in changed:
        for weight in _written_weights(layer):
            source = first.setdefault(_address(weight), layer)
            if source is not layer and _same_update(source, layer, adapter_names):
                twice[layer] = source
    for layer, names in changed.items():
        own = layers[layer]
        source = twice.get(layer, layer)
        inside = tuple(f"{path}." for other in changed if twice.get(other, other) is source for path in layers[other])
        for weight in _written_weights(layer):
            if others := [path for path in paths.get(_address(weight), ()) if not f"{path}.".startswith(inside)]:
                raise ValueError(
                    f"The weight of {own[0]!r}, which carries adapter {names[0]!r}, is tied with that of {_plain(others[0])!r}: a "
                    "merge would change both, and the outputs with them. Untie them first: `layer = model.get_base_model()"
                    f".get_submodule({own[0]!r}).get_base_layer()`, `layer.weight = torch.nn.Parameter(layer.weight.detach()"
                    ".clone())` and `model.config.tie_word_embeddings = False`; or adapt the embedding and the output layer "
                    "together with `ensure_weight_tying=True`, or leave them out of `target_modules`."
                )
    return twice


@contextmanager
def merged_once(twice: dict[LoraLayer, LoraLayer], adapter_names: Optional[Sequence[str]]) -> Iterator[None]:
    """Let a merge inside pass over the layers that have their update from another one; as before if it fails."""
    for layer in twice:
        layer.merged_adapters.extend(_names(layer, adapter_names))
    try:
        with warnings.catch_warnings():
            if twice:
                warnings.filterwarnings("ignore", message="All adapters are already merged")
            yield
    except BaseException:
        for layer in twice:
            layer.merged_adapters.clear()
        raise


def _names(layer: LoraLayer, adapter_names: Optional[Sequence[str]]) -> list[str]:
    names = layer.active_adapters if adapter_names is None else adapter_names
    there = [name for name in names if name in layer.lora_A or name in layer.lora_embedding_A]
    return [name for name in there if name not in layer.merged_adapters]


def _written_weights(layer: LoraLayer) -> list[torch.Tensor]:
    """The parameters of the base layer that a merge writes."""
    base_layer = layer.get_base_layer()
    if isinstance(layer, ParamWrapper):
        return [base_layer._parameters[layer.parameter_name]]
    biased = any(layer.lora_bias.values())
    return [w for name, w in base_layer._parameters.items() if w is not None and (name != "bias" or biased)]


def _same_update(embedding: LoraLayer, output: LoraLayer, adapter_names: Optional[Sequence[str]]) -> bool:
    """Whether the adapter of an output layer is that of the embedding turned round."""
    names = _names(embedding, adapter_names)
    if names != _names(output, adapter_names):
        return False
    masked, grids = getattr(output, "masked", {}), getattr(output, "lora_grid", {})
    for name in names:
        if masked.get(name) or name in grids:
            return False
        if name not in embedding.lora_embedding_A or name not in output.lora_A:
            return False
        if name in embedding.lora_variant or name in output.lora_variant or output.lora_bias.get(name):
            return False
        pairs = (
            (embedding.lora_embedding_A[name], output.lora_B[name].weight),
            (embedding.lora_embedding_B[name], output.lora_A[name].weight),
        )
        if embedding.scaling[name] != output.scaling[name] or not all(torch.equal(a, b.T) for a, b in pairs):
            return False
    return True


def _address(weight: torch.Tensor) -> Any:
    """What is equal for weights that share memory."""
    if weight.is_meta or type(weight.data) is not torch.Tensor:
        return id(weight)
    return weight.device, weight.data_ptr()


def _plain(path: str) -> str:
    return path.removesuffix(".base_layer")
