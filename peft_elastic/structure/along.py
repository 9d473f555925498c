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
"""What belongs to the parameters of a model, and moves along when they are put into another order: the state of optimizers, and
averages of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..common.checks import wrong
from ..common.parameters import is_spread
from ..layers.backends.float import followed_by
from ..layers.narrowed import plain_class


# Sides of a parameter that hold features.
_SIDES = (0, 1)
# Optimizers whose state is by the name of a layer, which shows after the first step only.
_BY_NAME = ("LoraFAOptimizer",)
# Of a factored second moment, as transformers' Adafactor calls it: the dimension, from the end, that was averaged away.
_AVERAGED_AWAY = {"_row": 1, "_col": 2}


class Along:
    """What moves along with the parameters of a model.

    Args:
        model (`nn.Module`): the base model that is to be sorted.
        optimizer: a `torch.optim.Optimizer` of its parameters, wrapped by accelerate or not, or a list of some; or None.
        averaged: a `torch.optim.swa_utils.AveragedModel` of the model (or of the `PeftModel` around it), another copy of it, or a
            list of some; or None.

    Raises:
        ValueError: if it is none of these, is spread over several processes, or belongs to another model.
    """

    def __init__(self, model: nn.Module, optimizer: Any = None, averaged: Any = None) -> None:
        self.optimizers = [_plain_optimizer(each) for each in _listed(optimizer)]
        self.averaged = [_base_of(each) for each in _listed(averaged)]
        own = {id(parameter) for parameter in model.parameters()}
        for each in self.optimizers:
            parameters = [parameter for group in each.param_groups for parameter in group["params"]]
            if any(map(is_spread, parameters)):
                raise ValueError(
                    f"`optimizer` ({type(each).__name__}) has parameters that are spread over several processes, whose state cannot "
                    "be moved."
                )
            if not any(id(parameter) in own for parameter in parameters):
                raise ValueError(
                    f"`optimizer` ({type(each).__name__}) must be one of the parameters of the model, and holds none of them. An engine "
                    "that trains a flat copy of them (FSDP, DeepSpeed) cannot be followed."
                )
        if any(id(parameter) in own for copy in self.averaged for parameter in copy.parameters()):
            raise ValueError("`averaged` must be a copy of the model, got one that shares parameters with it.")

    def check(self, model: nn.Module, paths: Iterable[str], digest: str | None, digests: Sequence[str | None]) -> None:
        """ValueError unless everything that belongs to the layers at these paths can be moved.

        Args:
            model: the base model.
            paths: of the layers, with the adapters around them.
            digest: what tells the order of the model from others.
            digests: the same of each averaged model.
        """
        paths = list(dict.fromkeys(paths))
        for path in paths:
            for name, parameter in model.get_submodule(path).named_parameters():
                for optimizer in self.optimizers:
                    # `state` is a dict with a default, which looking must not fill
                    state = optimizer.state[parameter] if parameter in optimizer.state else {}
                    for key, value in state.items():
                        _check_state(optimizer, f"{path}.{name}", key, value, parameter)
        for other, theirs in zip(self.averaged, digests, strict=True):
            for path in paths:
                _check_same(model, other, path)
            if theirs != digest:
                raise ValueError(
                    "`averaged` has its heads and channels in another order than the model: make it a copy of the model as it is "
                    "(`AveragedModel(model)`), and give it to every sorting from then on."
                )

    def following(self) -> AbstractContextManager[None]:
        """Inside, the state of the optimizers moves with the parameters."""
        return followed_by(self._move_state)

    def _move_state(self, parameter: torch.Tensor, dim: int, index: torch.Tensor) -> None:
        for optimizer in self.optimizers:
            state = optimizer.state[parameter] if parameter in optimizer.state else {}
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    place = _place(key, value.shape, parameter.shape, dim)
                    if place is not None:
                        state[key] = value.index_select(place, index.to(value.device))


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    inner = optimizer
    while type(inner).__module__.partition(".")[0] == "accelerate" and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if type(inner).__module__.partition(".")[0] == "deepspeed" or type(inner).__name__ == "ZeroRedundancyOptimizer":
        raise ValueError(
            f"`optimizer` is a {type(inner).__name__}, which spreads its state over several processes or keeps it in a flat copy: it cannot "
            "be moved along. Sort before the engine takes the model."
        )
    if type(inner).__name__ in _BY_NAME or any(
        not isinstance(key, torch.Tensor) for key in getattr(inner, "state", ())
    ):
        raise ValueError(
            f"`optimizer` is a {type(inner).__name__}, whose state is not kept by parameter, so that it is not known what of it moves along. "
            "Use AdamW, or sort before the training."
        )
    if not isinstance(inner, torch.optim.Optimizer):
        raise wrong("optimizer", "a torch.optim.Optimizer, wrapped by accelerate or not, or a list of some", optimizer)
    return inner


def _base_of(averaged: Any) -> nn.Module:
    inner = averaged
    while isinstance(inner, (AveragedModel, nn.parallel.DistributedDataParallel)):
        inner = inner.module
    if not isinstance(inner, nn.Module):
        raise wrong("averaged", "an AveragedModel, another copy of the model, or a list of some", averaged)
    return getattr(inner, "get_base_model", lambda: inner)()


def _check_state(optimizer: Any, name: str, key: Any, value: Any, parameter: torch.Tensor) -> None:
    who = f"`optimizer`: the state {key!r} that {type(optimizer).__name__} has of {name!r}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{who} is a {type(value).__name__}, of which it is not known how it moves along.")
    if value.numel() == 1:
        return
    if type(value) not in (torch.Tensor, nn.Parameter) or not value.is_floating_point():
        raise ValueError(
            f"{who} is a {type(value).__name__} of {value.dtype}: quantised or spread state cannot be moved along. Use an optimizer whose "
            "state is in floating point."
        )
    for dim in _SIDES[: parameter.dim()]:
        try:
            _place(key, value.shape, parameter.shape, dim)
        except ValueError as error:
            raise ValueError(f"{who} {error}") from None


def _place(key: Any, shape: torch.Size, whole: torch.Size, dim: int) -> int | None:
    """Which dimension of a state of this shape holds the entries of dimension `dim` of its parameter; None for none.

    Raises:
        ValueError: if the shape does not say.
    """
    if shape.numel() == 1:
        return None
    if shape == whole:
        return dim
    if len(shape) == len(whole) and all(size in (1, full) for size, full in zip(shape, whole)):
        return dim if shape[dim] == whole[dim] else None
    gone = [i for i in range(len(whole)) if (*whole[:i], *whole[i + 1 :]) == tuple(shape)]
    places = {None if dim == i else dim - (i < dim) for i in gone}
    if len(places) > 1:
        # a square one: its name says what its shape does not
        named = [len(whole) - back for ending, back in _AVERAGED_AWAY.items() if str(key).endswith(ending)]
        places = {None if dim == i else dim - (i < dim) for i in named if i in gone}
    if len(places) != 1:
        raise ValueError(
            f"has the shape {tuple(shape)} for a parameter of {tuple(whole)}, which does not say what of it belongs to which row and "
            "column, so it cannot be moved along."
        )
    return places.pop()


def _check_same(model: nn.Module, averaged: nn.Module, path: str) -> None:
    ours = model.get_submodule(path)
    try:
        theirs = averaged.get_submodule(path)
    except AttributeError:
        raise ValueError(
            f"`averaged` ({type(averaged).__name__}) must have the structure of the model, and has no {path!r}."
        ) from None
    if (mine := _tensors(ours)) != (others := _tensors(theirs)):
        odd = next(name for name in (*mine, *others) if mine.get(name) != others.get(name))
        raise ValueError(
            f"`averaged` ({type(averaged).__name__}) must have the structure of the model, whose {f'{path}.{odd}'!r} is "
            f"{mine.get(odd, 'missing')}, there {others.get(odd, 'missing')}."
        )


def _tensors(module: nn.Module) -> Mapping[str, tuple[int, ...] | str]:
    """The shapes of all tensors of a layer and the adapters around it, and the classes of its modules."""
    found: dict[str, tuple[int, ...] | str] = {}
    for prefix, each in module.named_modules():
        found[f"{prefix} (class)"] = plain_class(each).__name__
        for name, tensor in (*each._parameters.items(), *each._buffers.items()):
            if tensor is not None:
                found[f"{prefix}.{name}".lstrip(".")] = tuple(tensor.shape)
    return found
