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
"""The interface of a backend: what has to be known of a linear layer to read, write, cut and sort its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Optional

import torch
from torch import nn

from ..grid import Grid
from ..narrowed import Narrowed, Ranges, active_ranges, narrowed_class, plain_class, take
from ..ordinary import ordinary_linear


# What may be done to a layer, with the words of the table in docs/compatibility.md.
ABILITIES = {
    "mask": "masked adapters",
    "round": "quantisation-aware adapters",
    "write": "merging these in place",
    "merge": "merging other adapters",
    "requantize": "`merge_and_requantize`",
    "narrow": "elastic width",
    "sort": "sorting by importance",
    "prune": "`prune`",
    "quantize": "`quantize`",
    "sparsify": "`sparsify_linears`",
}


class OldWeight:
    """What a layer computed with before `Backend.replace`. It holds no function, so that copies and pickles of a merged model take
    it along.

    Attributes:
        grid (`Grid`, *optional*): the grid of before, if that has been replaced as well.
    """

    grid: Optional[Grid] = None

    def matrix(self, layer: nn.Module) -> torch.Tensor:
        """The old weight as `Backend.weight` gave it."""
        raise NotImplementedError

    def put_back(self, layer: nn.Module) -> None:
        """Undo the replacement, to the last bit."""
        raise NotImplementedError


class Backend:
    """One way in which a linear layer stores its weight. It has no state; a layer finds its backend with `backend_of`.

    A matrix is always (out, in), however it is stored. What is said of a weight is said of its active part where the layer is
    narrowed, unless `whole` is asked for.

    Attributes:
        name (`str`): of whoever packs the weight, as messages and the docs say it.
        layers (`str`): its layers, as messages and the docs say it.
        packed (`bool`): whether there is no parameter in floating point that holds the weight.
        listed (`bool`): whether `linear_layers` counts these layers among those of a model.
        on_grid (`bool`): whether the layer computes with the values of a `Grid`.
        exact (`tuple[type, ...]`): the classes that compute x W^T + b, or with W rounded to the grid, and do nothing besides.
        obstacles (`Mapping[str, str]`): why something in `ABILITIES` cannot be done, as a clause and sentences that follow "... is
            of type X, ".
    """

    name: str
    layers: str
    packed: bool = False
    listed: bool = True
    on_grid: bool = False
    exact: tuple[type[nn.Module], ...] = ()
    obstacles: Mapping[str, str] = {}

    def matches(self, layer: nn.Module) -> bool:
        """Whether the weight of this module is stored in this way. Asked of every module of a model, so it imports nothing."""
        raise NotImplementedError

    def obstacle(self, ability: str) -> Optional[str]:
        """Why this cannot be done to the layers, or None if it can. `ability` is a key of `ABILITIES`."""
        if ability not in ABILITIES:
            raise KeyError(ability)
        return self.obstacles.get(ability)

    def is_exact(self, layer: nn.Module) -> bool:
        """Whether the layer, narrowed or not, is of one of the classes in `exact` itself."""
        return plain_class(layer) in self.exact

    # -- reading -------------------------------------------------------------------------------------------------------

    def out_dim(self, layer: nn.Module) -> int:
        """The dimension of the stored weight that holds the outputs."""
        return 0

    def sizes(self, layer: nn.Module) -> tuple[int, int]:
        """(out, in), with all features."""
        return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]

    def weight(self, layer: nn.Module, whole: bool = False) -> torch.Tensor:
        """The weight in floating point: a view of the parameter if there is one, before the rounding if there is a grid,
        dequantised anew otherwise.

        Raises:
            ValueError: if it cannot be read.
        """
        raise NotImplementedError

    def grid(self, layer: nn.Module) -> Optional[Grid]:
        """The grid that the layer computes with, if it has one."""
        return None

    def stored_bytes(self, layer: nn.Module) -> int:
        """What the weight takes in memory as it is stored, with the scales that it means nothing without."""
        raise NotImplementedError

    # -- writing -------------------------------------------------------------------------------------------------------

    def replace(self, layer: nn.Module, weight: torch.Tensor, grid: Optional[Grid] = None) -> OldWeight:
        """Write another weight, packed again as the old one was.

        Args:
            grid: of the weight, which a layer on a grid takes over. Another layer gets the values in its own dtype.

        Returns:
            What puts the old weight back.

        Raises:
            ValueError: `obstacle("write")`.
        """
        raise ValueError(f"The base layer is of type {type(layer).__name__}, {self.obstacle('write')}")

    def writable(self, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The layer, or one with the same weight, and tensors of `dtype`, to stand in its place if it cannot be written to."""
        return layer

    # -- parts ---------------------------------------------------------------------------------------------------------

    def mixin(self, layer: nn.Module) -> Optional[type[Narrowed]]:
        """The mixin that makes the class of this layer that of a narrowed one; None if it cannot be narrowed."""
        return None

    def narrowed_class(self, layer: nn.Module) -> type[nn.Module]:
        """The class of this layer when it is narrowed."""
        mixin = self.mixin(layer)
        if mixin is None:
            raise ValueError(f"A {type(layer).__name__} cannot be narrowed.")
        return narrowed_class(plain_class(layer), mixin)  # type: ignore[arg-type]

    def ordinary(self, layer: nn.Module, dtype: torch.dtype) -> Optional[nn.Module]:
        """The active part as a layer in floating point, of `dtype`, where the layer itself can only be narrowed and not be `cut`;
        None for all others."""
        return None

    def cut(
        self, layer: nn.Module, outputs: Optional[Ranges], inputs: Optional[Ranges], undo: list[Callable[[], None]]
    ) -> None:
        """Keep these features of a layer that is not narrowed, in place and in memory of its own.

        Args:
            undo: gets what puts back the values of the tensors that change. The attributes of the layer, its sizes among them, are
                for the caller to put back.

        Raises:
            ValueError: if no part of the packed weight can be kept.
        """
        raise ValueError(f"The weight of a {type(layer).__name__} cannot be cut.")

    def permute(self, layer: nn.Module, side: str, index: torch.Tensor) -> None:
        """Put the outputs (`side` "out") or inputs ("in") into another order, in place: number i becomes what `index[i]` was.

        Raises:
            ValueError: `obstacle("sort")`.
        """
        raise ValueError(f"A {type(layer).__name__} cannot be sorted, {self.obstacle('sort')}")


class PackedBackend(Backend):
    """A backend that can at least dequantise: narrowed, its layers compute with a part of that. Subclasses need `matches`,
    `dequantize` and `stored_bytes`, and `replace` unless there is an obstacle to "write"."""

    packed = True
    obstacles: Mapping[str, str] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.obstacles = {**_PACKED_OBSTACLES, **({} if cls.on_grid else {"round": _NO_GRID}), **cls.obstacles}

    def dequantize(self, layer: nn.Module) -> torch.Tensor:
        """The whole weight in floating point, (out, in)."""
        raise NotImplementedError

    def weight(self, layer: nn.Module, whole: bool = False) -> torch.Tensor:
        weight = self.dequantize(layer)
        outputs, inputs = (None, None) if whole else active_ranges(layer)
        return take(take(weight, 0, outputs), 1, inputs)

    def mixin(self, layer: nn.Module) -> Optional[type[Narrowed]]:
        return None if self.obstacle("narrow") else NarrowedPacked

    def ordinary(self, layer: nn.Module, dtype: torch.dtype) -> Optional[nn.Module]:
        if self.obstacle("narrow"):
            return None
        weight = self.weight(layer).to(dtype, memory_format=torch.contiguous_format, copy=True)
        bias: Any = layer.bias
        bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        return ordinary_linear(nn.Parameter(weight, requires_grad=False), bias, layer.training)


class NarrowedPacked(Narrowed):
    """Mixin in front of a layer with a packed weight, which is dequantised as a whole, as its blocks of numbers do not follow the
    features. Its attribute `weight` is not to be assigned: Trainer does not use `nn.DataParallel` with such layers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from . import backend_of

        bias = self.bias
        weight = backend_of(self).weight(self).to(x.dtype)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))

    def extra_repr(self) -> str:
        return "narrowed"


_NO_GRID = (
    "whose values are no grid of scales and zero points. Load the model in floating point, or a GPTQ checkpoint."
)
_PACKED_OBSTACLES = {
    "sort": "whose packed weight cannot be sorted. Sort the model in floating point (`sort_by_importance`), save it, and quantise "
    "that; then use `importance='none'`.",
    "prune": "which has quantised weights; prune the floating-point model first.",
    "quantize": "which has quantised weights; quantise the floating-point model.",
    "sparsify": "which another method has quantized, and sparse layers are saved beside no other method. Load the model in "
    "floating point, or use `model.dequantize()`.",
}
