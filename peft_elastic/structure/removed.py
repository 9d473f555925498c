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
"""What stands where a part of a model has been removed for good, and what a part that is not computed owes to the others."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache

from ..layers.narrowed import change_class
from .layouts import Skip


class Removed(nn.Module):
    """Stands where a part of a block, or a block, has been removed for good.

    Args:
        module (`nn.Module`): what it stands for; plain attributes are taken over, as other modules may read them.
        skip (`Skip`): what it returns.
        cache_layers (`tuple[int, ...]`): numbers of the layers of the key-value cache that belong to it.
    """

    skip: Skip
    cache_layers: tuple[int, ...]
    stands_for: str
    absent: str

    def __init__(self, module: nn.Module, skip: Skip, cache_layers: tuple[int, ...]) -> None:
        super().__init__()
        plain = {k: v for k, v in module.__dict__.items() if isinstance(v, (bool, int, float, str))}
        self.__dict__.update(plain | {"training": module.training})
        self.__dict__.update(_traces_of(module, skip, cache_layers))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = main_first(args, kwargs)
        keep_places((*args[1:], *kwargs.values()), self.cache_layers, args[0])
        return self.skip(self, *args, **kwargs)

    def extra_repr(self) -> str:
        return self.stands_for

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        # Where this package is not imported, transformers would make up the weights of what was removed. An empty tensor in
        # the place of one lets it fail. A model on the meta device, though, is being loaded, and expects nothing here.
        if self.absent and not any(isinstance(t, torch.Tensor) and t.is_meta for t in destination.values()):
            destination[f"{prefix}{self.absent}"] = torch.empty(0, device="cpu")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is loaded, and the empty tensor is expected."""


def _traces_of(module: nn.Module, skip: Skip, cache_layers: tuple[int, ...]) -> dict[str, Any]:
    """What `Removed` keeps of a module."""
    parameters = [(name, p) for name, p in module.named_parameters() if "lora_" not in name]
    # one of the parameters that are not there, by which checkpoints name it. transformers renames and splits those of experts
    absent = next((name for name, parameter in parameters if parameter.dim() < 3), "").replace("base_layer.", "")
    traces = {"skip": skip, "cache_layers": cache_layers, "stands_for": _own_class(module).__name__, "absent": absent}
    return traces | {"_is_hf_initialized": True}  # there is nothing to, whatever the class of a block has


def empty_block(module: nn.Module, skip: Skip, cache_layers: tuple[int, ...]) -> None:
    """Leave nothing of a block, which stays where it is. It is of its class and keeps its hooks: transformers collects hidden
    states by these."""
    module.__dict__.update(_traces_of(module, skip, cache_layers))
    change_class(module, _empty_class(_own_class(module)))  # type: ignore[arg-type]
    for name in ("_modules", "_parameters", "_buffers"):
        module.__dict__[name].clear()


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before any part of it was made inactive."""
    cls = type(module)
    while hasattr(cls, "plain_class"):
        cls = cls.plain_class
    return cls


class _Empty(Removed):
    plain_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_empty, (self.plain_class,), self.__dict__


def _new_empty(plain_class: type[nn.Module]) -> nn.Module:
    cls = _empty_class(plain_class)  # type: ignore[arg-type]
    return cls.__new__(cls)


@functools.cache
def _empty_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_Empty, cls), {"plain_class": cls, "__module__": cls.__module__})


def main_first(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a forward with the main one by position, as skips take it. Models that name it give it first."""
    if args:
        return args, kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}


def keep_places(arguments: Iterable[Any], layers: tuple[int, ...], hidden_states: torch.Tensor) -> None:
    """Note the new tokens in the layers of a key-value cache that nobody fills: positions are counted in one of them.

    Args:
        arguments: of the forward, one of which may be the cache. Models give it different names, or none.
        layers: numbers of these layers.
        hidden_states: the new tokens, (sequences, length, features).
    """
    caches: list[Any] = [argument for argument in arguments if isinstance(argument, Cache)]
    cache = caches[0] if caches else None  # torch.compile of torch 2.7 does not follow `next` of a generator
    if cache is None or not layers:
        return
    cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for layer in layers:
        made = None
        if layer < len(cache.layers):
            if not hasattr(cache.layers[layer], "keys"):  # a state, which has no places
                continue
            made = cache.layers[layer].keys  # by whoever made the cache
        heads, size = (1, 1) if made is None else (made.shape[1], made.shape[3])
        place = hidden_states.new_zeros(hidden_states.shape[0], heads, hidden_states.shape[1], size)
        cache.update(place, place, layer)
