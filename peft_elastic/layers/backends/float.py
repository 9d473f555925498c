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
"""Weights in floating point: `nn.Linear`, transformers' `Conv1D`, and embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..grid import Grid
from ..narrowed import Narrowed, NarrowedParameter, Ranges, other_ranges, take
from .base import Backend, OldWeight


# Who wants to know of every permutation of a parameter, see `followed_by`.
_FOLLOWERS: ContextVar[tuple[Callable[[torch.Tensor, int, torch.Tensor], None], ...]] = ContextVar(
    "_FOLLOWERS", default=()
)


class OldFloat(OldWeight):
    """The values of a parameter in floating point, and the dtype of what has replaced them."""

    def __init__(self, values: torch.Tensor, transposed: bool) -> None:
        self.values, self.transposed = values, transposed
        self.written: Optional[torch.dtype] = None

    def matrix(self, layer: nn.Module) -> torch.Tensor:
        return self._data(layer).T if self.transposed else self._data(layer)

    def put_back(self, layer: nn.Module) -> None:
        layer.get_parameter("weight").data = self._data(layer)

    def _data(self, layer: nn.Module) -> torch.Tensor:
        weight = layer.get_parameter("weight")
        if weight.dtype == self.written:
            return self.values.to(weight.device)
        return self.values.to(weight)  # the model has been cast in the meantime


class FloatBackend(Backend):
    """`nn.Linear`, and `Conv1D`, whose weight is stored as (in, out)."""

    name = "PyTorch"
    layers = "`nn.Linear`, transformers' `Conv1D`"
    exact: tuple[type[nn.Module], ...] = (nn.Linear, Conv1D)

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, (nn.Linear, Conv1D))

    def out_dim(self, layer: nn.Module) -> int:
        return int(isinstance(layer, Conv1D))

    def sizes(self, layer: nn.Module) -> tuple[int, int]:
        if isinstance(layer, Conv1D):
            inputs, outputs = layer._parameters["weight"].shape
            return outputs, inputs
        return super().sizes(layer)

    def weight(self, layer: nn.Module, whole: bool = False) -> torch.Tensor:
        # a plain tensor in `torch.func.functional_call`
        parameter: Any = layer.get_parameter("weight") if whole else layer.weight
        weight: torch.Tensor = parameter.detach()
        return weight.T if self.out_dim(layer) else weight

    def stored_bytes(self, layer: nn.Module) -> int:
        weight: Any = layer.weight
        return int(weight.numel() * weight.element_size())

    def replace(self, layer: nn.Module, weight: torch.Tensor, grid: Optional[Grid] = None) -> OldWeight:
        parameter = layer.get_parameter("weight")
        old = OldFloat(parameter.data, bool(self.out_dim(layer)))
        self._write(layer, parameter, weight.to(parameter.dtype))
        old.written = parameter.dtype
        return old

    def _write(self, layer: nn.Module, parameter: nn.Parameter, weight: torch.Tensor) -> None:
        parameter.data = weight.T.contiguous() if self.out_dim(layer) else weight

    def mixin(self, layer: nn.Module) -> Optional[type[Narrowed]]:
        if not self.is_exact(layer):
            return None
        return NarrowedConv1D if isinstance(layer, Conv1D) else NarrowedParameter

    def cut(
        self, layer: nn.Module, outputs: Optional[Ranges], inputs: Optional[Ranges], undo: list[Callable[[], None]]
    ) -> None:
        dim = self.out_dim(layer)
        for each, ranges in ((dim, outputs), (1 - dim, inputs)):
            cut_parameter(layer._parameters["weight"], each, ranges, undo)
        cut_parameter(layer._parameters.get("bias"), 0, outputs, undo)
        self.set_sizes(layer)

    def set_sizes(self, layer: Any) -> None:
        """Let the attributes of a layer follow the shape of its weight."""
        sizes = layer.get_parameter("weight").shape
        if isinstance(layer, Conv1D):
            layer.nx, layer.nf = sizes
        else:
            layer.__dict__["out_features"], layer.__dict__["in_features"] = sizes

    def permute(self, layer: nn.Module, side: str, index: torch.Tensor) -> None:
        dim = self.out_dim(layer)
        permute_parameter(layer._parameters["weight"], dim if side == "out" else 1 - dim, index)
        if side == "out":
            permute_parameter(layer._parameters.get("bias"), 0, index)


class EmbeddingBackend(FloatBackend):
    """`nn.Embedding`, no linear layer, but narrowed, cut and sorted with those beside it: its columns are the outputs."""

    layers = "`nn.Embedding`"
    listed = False
    exact = (nn.Embedding,)
    obstacles = {
        **dict.fromkeys(
            ("mask", "round", "write", "requantize"), "which is no linear layer. Use `ElasticLoraConfig`."
        ),
        **dict.fromkeys(("prune", "quantize", "sparsify"), "which is no linear layer."),
    }

    def matches(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding)

    def out_dim(self, layer: nn.Module) -> int:
        return 1

    def sizes(self, layer: nn.Module) -> tuple[int, int]:
        return layer.embedding_dim, layer.num_embeddings  # type: ignore[return-value]

    def mixin(self, layer: nn.Module) -> Optional[type[Narrowed]]:
        return NarrowedEmbedding if self.is_exact(layer) else None

    def set_sizes(self, layer: Any) -> None:
        layer.embedding_dim = layer.get_parameter("weight").shape[1]


class NarrowedConv1D(NarrowedParameter):
    """Mixin in front of `Conv1D`."""

    out_dim = 1

    @property
    def nf(self) -> int:
        return self.weight.shape[1]


class NarrowedEmbedding(NarrowedParameter):
    """Mixin in front of `nn.Embedding`, of whose columns, here called outputs, a part is active."""

    out_dim = 1


@torch.no_grad()
def cut_parameter(
    parameter: Optional[torch.Tensor], dim: int, ranges: Optional[Ranges], undo: list[Callable[[], None]]
) -> int:
    """Keep a part of one dimension, in memory of its own; returns its size."""
    if parameter is None:
        return 0
    if ranges is not None:
        shape = parameter.shape
        others = other_ranges(ranges, shape[dim])
        # what goes is kept until the whole model has been cut, and what stays is not held twice
        lost = take(parameter.data, dim, others).clone() if others else None

        @torch.no_grad()
        def put_back() -> None:
            if parameter.shape == shape:  # it had not been cut yet
                return
            whole = parameter.data.new_empty(shape)
            for part, runs in ((parameter.data, ranges), (lost, others)):
                sizes = [stop - start for start, stop in runs]
                for (start, _), piece in zip(runs, () if part is None else part.split(sizes, dim)):
                    whole.narrow(dim, start, piece.shape[dim]).copy_(piece)
            parameter.data = whole

        undo.append(put_back)
        parameter.data = take(parameter.data, dim, ranges).clone(memory_format=torch.contiguous_format)
    return parameter.shape[dim]


@torch.no_grad()
def permute_parameter(parameter: Optional[torch.Tensor], dim: int, index: torch.Tensor) -> None:
    """Put the entries of one dimension into another order: number i becomes what `index[i]` was. The gradient moves along, and
    whatever `followed_by` has been told of."""
    if parameter is None:
        return
    index = index.to(parameter.device)
    parameter.data = parameter.data.index_select(dim, index)
    if isinstance(parameter, nn.Parameter) and parameter.grad is not None:
        parameter.grad = parameter.grad.index_select(dim, index)
    for follow in _FOLLOWERS.get():
        follow(parameter, dim, index)


@contextmanager
def followed_by(follow: Callable[[torch.Tensor, int, torch.Tensor], None]) -> Iterator[None]:
    """Tell somebody of every `permute_parameter` inside: which tensor, which dimension, and where each entry came from."""
    token = _FOLLOWERS.set((*_FOLLOWERS.get(), follow))
    try:
        yield
    finally:
        _FOLLOWERS.reset(token)


FLOAT = FloatBackend()
EMBEDDING = EmbeddingBackend()
