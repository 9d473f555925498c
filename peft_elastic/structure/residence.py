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
"""Where the weights of a model are while it is gone through block by block: in memory, or, block by block, on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .modules import enclosing_names, find_stacks, output_head
from .stored_model import StoredModel, stored_tensors


_ATTRIBUTE = "_peft_elastic_residence"


class Residence:
    """Of a model that is in memory as a whole. Walkers ask it for what they need.

    Attributes:
        scratch (`Path`, *optional*): a folder for activations, which are kept in memory without.
    """

    scratch: Path | None = None

    def device(self, model: nn.Module) -> torch.device:
        """Where inputs have to be."""
        return next(model.parameters()).device

    def is_done(self, layers: dict[str, nn.Module]) -> bool:
        """Whether an earlier run has done these layers, of one unit, so that they are not visited."""
        return False

    @contextmanager
    def visit(self, layers: dict[str, nn.Module]) -> Iterator[None]:
        """The layers of one unit are in memory meanwhile, and what was changed in them is kept afterwards."""
        yield

    def note(self, layer: str, row: Any) -> None:
        """Keep what the report is to say of a layer, of the unit that is visited, for an interrupted run that goes on."""


IN_MEMORY = Residence()


def residence_of(model: nn.Module) -> Residence:
    return model.__dict__.get(_ATTRIBUTE, IN_MEMORY)


@dataclass
class _Tensor:
    empty: torch.Tensor
    places: list[tuple[nn.Module, str, str]]
    name: str  # that can be read


@dataclass(eq=False)
class _Part:
    """What is in memory together: a block, the output head, or all the rest."""

    tensors: list[_Tensor] = field(default_factory=list)
    resident: bool = False
    running: int = 0  # forward passes that are in it
    pinned: bool = False
    stays: bool = False


class StoredResidence(Residence):
    """Of a model in a folder: what is outside of the blocks comes into memory when it is first used, and stays; of the blocks the
    one that was used last, and the one that is visited.

    Args:
        stored: the model, whose parameters are on the meta device.
        device: where it computes.
        work: what happens to the layers that are visited.

    Raises:
        ValueError: a tensor of the model is in no file.
    """

    def __init__(self, stored: StoredModel, device: torch.device, work: Work) -> None:
        self._stored, self._device, self._work = stored, device, work
        model = stored.model
        self._rest, self._head = _Part(stays=True), _Part(stays=True)
        blocks = {name: block for stack in find_stacks(model) for name, block in stack.items()}
        parts = {name: _Part() for name in blocks}
        head = output_head(model)
        self._part_of_module: dict[int, _Part] = {}
        for name, (empty, places) in stored_tensors(model).items():
            names = [place[2] for place in places if place[2] in stored.origin]
            if not names:
                raise ValueError(f"{name} is in no file of {stored.folder}.")
            owners = {
                next((outer for outer in enclosing_names(name) if outer in blocks), None) for _, _, name in places
            }
            owner = owners.pop() if len(owners) == 1 else None
            if owner is not None:
                part = parts[owner]
            elif head is not None and all(module is head for module, _, _ in places):
                part = self._head
            else:
                part = self._rest
            part.tensors.append(_Tensor(empty, places, names[0]))
            for module, _, _ in places:
                self._part_of_module.setdefault(id(module), part)
        self._blocks = list(parts.values())
        self._wrapped: list[tuple[nn.Module, Any]] = []
        # The forward itself brings the weights, and not a hook before it: whoever takes its place needs none.
        for name, block in blocks.items():
            for module in block.modules():
                if module is block or id(module) in self._part_of_module:
                    self._wrap(module, parts[name])
        self._wrap(model, self._rest)
        if head is not None and self._head.tensors:
            self._wrap(head, self._head)

    def device(self, model: nn.Module) -> torch.device:
        return self._device

    def is_done(self, layers: dict[str, nn.Module]) -> bool:
        return self._work.is_done(layers)

    @contextmanager
    def visit(self, layers: dict[str, nn.Module]) -> Iterator[None]:
        parts = list({id(part): part for part in map(self._part_of, layers.values())}.values())
        try:
            for part in parts:
                self._bring(part)
                part.pinned = True
            self._work.before(layers)
            yield
            self._work.after(layers)
        finally:
            for part in parts:
                part.pinned = False

    def note(self, layer: str, row: Any) -> None:
        self._work.note(layer, row)

    def swap(self, old: nn.Module, new: nn.Module) -> None:
        """A layer takes the place of another one, with parameters of the same names. What replaces it in the model is the business
        of the caller."""
        part = self._part_of(old)
        for tensor in part.tensors:
            for number, (module, key, name) in enumerate(tensor.places):
                if module is old:
                    tensor.places[number] = new, key, name
                    value = new._parameters[key]
                    assert value is not None
                    if value.is_meta:
                        tensor.empty = value
                    elif value.shape != tensor.empty.shape:
                        tensor.empty = nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
        self._part_of_module[id(new)] = part

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Walkers of the model find it meanwhile."""
        self._stored.model.__dict__[_ATTRIBUTE] = self
        try:
            yield
        finally:
            del self._stored.model.__dict__[_ATTRIBUTE]
            for part in (*self._blocks, self._rest, self._head):
                self._drop(part)
            for module, own in reversed(self._wrapped):
                if own is None:
                    del module.forward
                else:
                    module.forward = own

    def _part_of(self, layer: nn.Module) -> _Part:
        return self._part_of_module[id(layer)]

    def _wrap(self, module: nn.Module, part: _Part) -> None:
        self._wrapped.append((module, module.__dict__.get("forward")))
        module.forward = self._bringing(module.forward, part)

    def _bringing(self, forward: Callable[..., Any], part: _Part) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            self._bring(part)
            part.running += 1
            try:
                return forward(*args, **kwargs)
            finally:
                part.running -= 1

        return run

    def _bring(self, part: _Part) -> None:
        if part.resident:
            return
        if not part.stays:
            for other in self._blocks:
                if other.resident and not other.pinned and not other.running:
                    self._drop(other)
        read = self._stored.read([tensor.name for tensor in part.tensors])
        for tensor in part.tensors:
            value = read.pop(tensor.name).to(self._device)
            if isinstance(tensor.empty, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.empty.requires_grad and value.is_floating_point())
            self._put(tensor, value)
        part.resident = True

    def _drop(self, part: _Part) -> None:
        if part.resident:
            for tensor in part.tensors:
                self._put(tensor, tensor.empty)
            part.resident = False

    def _put(self, tensor: _Tensor, value: torch.Tensor) -> None:
        for module, key, _ in tensor.places:
            (module._parameters if key in module._parameters else module._buffers)[key] = value  # type: ignore[assignment]


class Work:
    """What is done with the layers of a model in a folder."""

    def is_done(self, layers: dict[str, nn.Module]) -> bool:
        raise NotImplementedError

    def before(self, layers: dict[str, nn.Module]) -> None:
        """They have come into memory.

        Raises:
            ValueError: naming the one of which a weight cannot be worked with.
        """
        raise NotImplementedError

    def after(self, layers: dict[str, nn.Module]) -> None:
        """They have been changed."""
        raise NotImplementedError

    def note(self, layer: str, row: Any) -> None:
        """What is to be said of one of them."""
        raise NotImplementedError
