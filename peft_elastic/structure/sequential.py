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

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..common.safetensors_files import Stored, write_alone
from .modules import enclosing_names, find_stacks, output_head
from .residence import residence_of


logger = logging.getLogger(__name__)

# What a block may receive to be called again: anything else, a cache for instance, may carry state from call to call.
_PLAIN = (torch.Tensor, bool, int, float, str, torch.dtype, torch.device, type(None))


@dataclass(frozen=True)
class Unit:
    """
    One step of a walk: a transformer block, or the whole model for layers outside any block.

    Args:
        name: name of the block; "" for the whole model.
        module: that module.
        layers: the layers asked for that belong to this step, by name.
        feed: `feed(i)` passes calibration batch i through the module, for the sake of the hooks the caller has put on it.
    """

    name: str
    module: nn.Module
    layers: dict[str, nn.Module]
    feed: Callable[[int], None]


class BlockWalker:
    """
    Walks through a model block by block over calibration data.

    Iterating yields a `Unit` per transformer block, in the order in which the model runs them. The caller may observe the
    block with hooks and `feed`, then change its weights: the blocks after it are fed with what the changed block gives.

    The inputs of the first block of a stack are captured once for each batch, afterwards each block gets the outputs of the
    one before it. So the activations between two blocks are in memory for all batches, those inside a block for one batch.
    What else a block receives (masks, position embeddings, encoder states) is captured for each block and batch in a pass
    that skips the computation of the blocks. A trial on the first batch finds out whether the stack fits this scheme: its
    blocks run once each and receive, besides each other's outputs, nothing that depends on them. If not, every block of the
    stack is fed by a forward pass of the whole model: slower, and right for any model.

    Use it inside `calibration_mode`. Between two steps no hook of it is on the model.

    Args:
        model: any module.
        batches: keyword arguments for the model, see `calibration_batches`. Each is moved to the model's device when needed.
        layers: the layers of interest, by their names in the model. Blocks without any are not visited.

    Raises:
        ValueError: some of the layers are never reached by the calibration data.
    """

    def __init__(self, model: nn.Module, batches: list[dict[str, Any]], layers: dict[str, nn.Module]):
        self._model = model
        self._batches = batches
        self._residence = residence_of(model)
        self._device = self._residence.device(model)
        self._output_head: nn.Module | None = None
        self._stages = self._plan(layers)

    def __len__(self) -> int:
        return sum(bool(block.layers) for stage in self._stages for block in stage.blocks)

    def __iter__(self) -> Iterator[Unit]:
        for stage in self._stages:
            captured: list[list[_Call]] = []
            for index in range(len(self._batches)) if stage.sequential else ():
                captured.append(self._capture(stage.blocks, index))
                if captured[index]:
                    captured[index][0].leaves[:] = self._parked(index, captured[index][0].leaves)
            # A batch that takes another way through the stack than the first one did cannot be replayed.
            if captured and all(len(calls) == len(stage.blocks) for calls in captured):
                yield from self._replay(stage.blocks, captured)
            else:
                for block in stage.blocks:
                    yield from self._visit(block, self._feed_model)

    def _visit(self, block: _Block, feed: Callable[[int], None]) -> Iterator[Unit]:
        if block.layers and not self._residence.is_done(block.layers):
            with self._residence.visit(block.layers):
                yield Unit(block.name, block.module, block.layers, feed)

    def _replay(self, blocks: list[_Block], captured: list[list[_Call]]) -> Iterator[Unit]:
        outputs: list[list[Any]] = [[] for _ in captured]  # of the block before, one list of leaves per batch

        def run(step: int, index: int) -> Any:
            args, kwargs = captured[index][step].arguments(outputs[index])
            return blocks[step].module(*args, **kwargs)

        for step, block in enumerate(blocks):

            def feed(index: int, step: int = step) -> None:
                run(step, index)

            yield from self._visit(block, feed)
            for index, calls in enumerate(captured):
                is_last = block is blocks[-1]
                outputs[index] = [] if is_last else self._parked(index, pytree.tree_leaves(run(step, index)))
                calls[step].leaves.clear()  # frees the inputs

    def _parked(self, index: int, leaves: list[Any]) -> list[Any]:
        """The leaves that go from a block to the next one for a batch, in files if there is a folder for them."""
        folder = self._residence.scratch
        if folder is None:
            return leaves
        return [
            _Parked(write_alone(folder / f"{index}-{number}", leaf), leaf.device)
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            else leaf
            for number, leaf in enumerate(leaves)
        ]

    def _feed_model(self, index: int) -> None:
        with ExitStack() as hooks:
            if self._output_head is not None:
                hooks.enter_context(self._output_head.register_forward_pre_hook(_stop))
            self._forward(index)

    def _forward(self, index: int) -> None:
        inputs = {
            key: value.to(self._device) if isinstance(value, torch.Tensor) else value
            for key, value in self._batches[index].items()
        }
        try:
            self._model(**inputs)
        except StopForward:
            return  # the rest of the pass is of no interest

    def _plan(self, layers: dict[str, nn.Module]) -> list[_Stage]:
        """Runs the first batch to see what is used when, and groups the layers into the stages of the walk."""
        stacks = []
        for modules in find_stacks(self._model):
            latest: list[Any] = []
            stacks.append([_Block(name, module, latest) for name, module in modules.items()])
        by_name = {block.name: block for stack in stacks for block in stack}
        loose: dict[str, nn.Module] = {}
        for name, layer in layers.items():
            owner = next((by_name[outer] for outer in enclosing_names(name) if outer in by_name), None)
            (loose if owner is None else owner.layers)[name] = layer
        stacks = [stack for stack in stacks if any(block.layers for block in stack)]
        if not loose:
            self._output_head = output_head(self._model)  # nothing of interest comes after it

        moments = self._probe(stacks, layers)
        unused = [name for name in loose if name not in moments]
        unused += [b.name for stack in stacks for b in stack if b.layers and moments.keys().isdisjoint(b.layers)]
        if unused:
            raise ValueError(
                f"calibration: the model does not use {', '.join(unused)} on this data; give it inputs that reach them, or "
                "name them in exclude_modules."
            )

        # Whole stacks, and the layers outside any stack between them, in the order of their first use.
        parts: list[tuple[int, list[_Block] | str]] = [(moments[name], name) for name in loose]
        for stack in stacks:
            for block in stack:
                if block.layers:  # a block may not be called itself, only what is in it
                    moments.setdefault(block.name, min(moments[name] for name in block.layers if name in moments))
            used = sorted((block for block in stack if block.name in moments), key=lambda block: moments[block.name])
            positions = [position for position, block in enumerate(used) if block.layers]
            used = used[positions[0] : positions[-1] + 1]
            parts.append((moments[used[0].name], used))
        stages: list[_Stage] = []
        outside = None
        for _, part in sorted(parts, key=lambda part: part[0]):
            if not isinstance(part, str):
                stages.append(_Stage(part, sequential=self._fits(part)))
                outside = None
            elif outside is None:
                outside = _Block("", self._model, [], {part: loose[part]})
                stages.append(_Stage([outside], sequential=False))
            else:
                outside.layers[part] = loose[part]
        for block in by_name.values():
            block.forget()
        return stages

    def _probe(self, stacks: list[list[_Block]], layers: dict[str, nn.Module]) -> dict[str, int]:
        """Runs the first batch, notes in each block how it is called, and returns when each block and layer is first used."""
        clock = itertools.count()
        moments: dict[str, int] = {}
        blocks = [block for stack in stacks for block in stack]
        with ExitStack() as hooks:
            for name, module in [*layers.items(), *((block.name, block.module) for block in blocks)]:

                def note(module: nn.Module, args: tuple, name: str = name) -> None:
                    moments.setdefault(name, next(clock))

                hooks.enter_context(module.register_forward_pre_hook(note))
            for block in blocks:
                # Before the hooks of others on the way in and after them on the way out: a replay runs them too.
                hooks.enter_context(
                    block.module.register_forward_pre_hook(block.note_call, prepend=True, with_kwargs=True)
                )
                hooks.enter_context(block.module.register_forward_hook(block.note_output, with_kwargs=True))
            self._feed_model(0)
        return moments

    def _fits(self, blocks: list[_Block]) -> bool:
        """Whether the first batch reaches each block with the same arguments when the blocks before it are not computed."""
        reason = None
        if any(block.calls != 1 for block in blocks):
            reason = "a block does not run exactly once"
        elif not all(block.plain for block in blocks):
            reason = "a block changes its inputs, or exchanges more than tensors"
        else:
            try:
                captured = self._capture(blocks, 0)
            except Exception as error:  # noqa: BLE001 - the same pass has just worked, so it is the stand-ins that do not
                reason = f"without the blocks the forward pass fails ({error!r})"
            else:
                # The first block's arguments do not depend on any stand-in.
                same = (
                    block.call is not None and call.equals(block.call) for call, block in zip(captured[1:], blocks[1:])
                )
                if len(captured) != len(blocks) or not all(same):
                    reason = "more than their outputs passes from block to block"
        if reason is not None:
            logger.warning("%s ...: %s, so each block takes full forward passes.", blocks[0].name, reason)
        return reason is None

    def _capture(self, blocks: list[_Block], index: int) -> list[_Call]:
        """The arguments of each of the consecutive `blocks` on one batch, from a pass that does not compute these blocks."""
        captured: list[_Call] = []
        latest: list[Any] = []

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            captured.append(_Call.record(args, kwargs, latest))

        def stand_in_for(block: _Block) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                if block is blocks[-1]:
                    raise StopForward
                latest[:] = block.stand_ins
                return pytree.tree_unflatten(latest, block.output_spec)

            return forward

        with ExitStack() as context:
            for block in blocks:
                context.enter_context(block.module.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
                context.enter_context(replaced_forward(block.module, stand_in_for(block)))
            self._forward(index)
        return captured


class LayerWalker:
    """
    Goes through layers block by block, in the order in which they are given, for work that needs no data.

    Args:
        model: any module.
        layers: the layers of interest, by their names in the model.

    Yields:
        the layers of one block, or those next to each other that are in none, by name. They may be changed.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module]) -> None:
        self._residence = residence_of(model)
        blocks = {name for stack in find_stacks(model) for name in stack}
        self._units = [
            dict(unit)
            for _, unit in itertools.groupby(
                layers.items(), key=lambda item: next((o for o in enclosing_names(item[0]) if o in blocks), "")
            )
        ]

    def __len__(self) -> int:
        return len(self._units)

    def __iter__(self) -> Iterator[dict[str, nn.Module]]:
        for unit in self._units:
            if not self._residence.is_done(unit):
                with self._residence.visit(unit):
                    yield unit


@dataclass(frozen=True)
class _Link:
    """In place of an argument of a block: output number `output` of the block before."""

    output: int


@dataclass(frozen=True)
class _Parked:
    """A tensor in a file."""

    stored: Stored
    device: torch.device

    def read(self) -> torch.Tensor:
        return self.stored.read().to(self.device)


@dataclass
class _Call:
    """The arguments of one call of a block, as the leaves and the structure of (args, kwargs)."""

    leaves: list[Any]
    spec: pytree.TreeSpec

    @classmethod
    def record(cls, args: tuple, kwargs: dict, latest: list[Any]) -> _Call:
        """`latest`: the leaves of the outputs of the block before, which are stored as links."""
        links = {id(leaf): _Link(output) for output, leaf in enumerate(latest) if isinstance(leaf, torch.Tensor)}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        return cls([links.get(id(leaf), leaf) for leaf in leaves], spec)

    def arguments(self, latest: list[Any]) -> tuple[tuple, dict]:
        leaves = [latest[leaf.output] if isinstance(leaf, _Link) else leaf for leaf in self.leaves]
        leaves = [leaf.read() if isinstance(leaf, _Parked) else leaf for leaf in leaves]
        return pytree.tree_unflatten(leaves, self.spec)

    def equals(self, other: _Call) -> bool:
        return self.spec == other.spec and all(
            torch.equal(a, b)
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
            else type(a) is type(b) and a == b
            for a, b in zip(self.leaves, other.leaves)
        )


@dataclass(eq=False)
class _Block:
    name: str
    module: nn.Module
    latest: list[Any]  # output leaves of the block of the same stack that ran last; shared by the blocks of a stack
    layers: dict[str, nn.Module] = field(default_factory=dict)
    # What the trial on the first batch finds out:
    calls: int = 0
    call: _Call | None = None
    versions: list[int] = field(default_factory=list)
    plain: bool = False  # can be called again
    stand_ins: list[Any] = field(default_factory=list)  # for the leaves of its output, when it is not computed
    output_spec: Any = None  # and the structure of it

    def note_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.calls += 1
        self.call = _Call.record(args, kwargs, self.latest)
        self.plain = all(isinstance(leaf, (_Link, *_PLAIN)) for leaf in self.call.leaves)
        self.versions = _versions((args, kwargs))

    def note_output(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        self.latest[:], self.output_spec = pytree.tree_flatten(output)
        self.stand_ins = [_stand_in(leaf) for leaf in self.latest]
        self.plain &= all(isinstance(leaf, (torch.Tensor, bool, type(None))) for leaf in self.latest)
        self.plain &= self.versions == _versions((args, kwargs))  # else it changes its inputs in place

    def forget(self) -> None:
        """Frees the tensors of the trial."""
        self.call = None
        self.latest.clear()


@dataclass
class _Stage:
    blocks: list[_Block]
    sequential: bool


class StopForward(Exception):
    """Ends a forward pass whose remainder is of no interest."""


def _stop(module: nn.Module, args: tuple) -> None:
    raise StopForward


def _versions(arguments: Any) -> list[int]:
    return [leaf._version for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]


def _stand_in(leaf: Any) -> Any:
    """A tensor like `leaf` of a single stored element: NaN, so that whatever depends on it shows."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    value = torch.full((), float("nan") if leaf.is_floating_point() else 0, dtype=leaf.dtype, device=leaf.device)
    return value.expand(leaf.shape)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")  # set on the instance by accelerate, for one
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
