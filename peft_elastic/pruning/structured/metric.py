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
"""What a step of pruning tries to keep low: the loss of a model on calibration data, or a metric of the user's.

Most of the time of structured pruning goes into evaluating models that differ from each other in one block. All blocks in front
of it compute the same for each of them, so `CalibrationLoss` keeps their outputs.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...structure.blocks import Structure
from ...structure.inputs import is_language_model, own_labels
from ...structure.modules import find_stacks
from ...structure.narrow import is_skipped
from ...structure.sequential import StopForward, replaced_forward
from ...structure.space import activate
from .units import State


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """
    Args:
        value: of the metric; smaller is better. That of a loss is in nats.
        block_passes: forward passes of a single block over all calibration data that it took; the cost of one that was
            recalled from a journal is the one it had.
        seconds: likewise.
    """

    value: float
    block_passes: float = 0.0
    seconds: float = 0.0


class Metric(Protocol):
    """A measurement of states of a model, which is left in any of them."""

    def __call__(self, state: State, trunk: State) -> Measurement:
        """Of `state`, when many states are measured that differ from `trunk` in one block each."""


class UserMetric:
    """`metric(model)`, larger is better with `mode="max"`; every call is one of the whole model."""

    def __init__(
        self, model: nn.Module, structure: Structure, metric: Callable[[nn.Module], float], mode: str
    ) -> None:
        self._model, self._structure, self._metric = model, structure, metric
        self._sign = -1.0 if mode == "max" else 1.0
        self._blocks = sum(len(stack) for stack in find_stacks(model))

    def __call__(self, state: State, trunk: State) -> Measurement:
        activate(self._model, self._structure, state)
        returned = self._metric(self._model)
        try:
            value = float(returned)
        except (TypeError, ValueError):
            value = math.nan
        if math.isnan(value):
            raise ValueError(f"`metric` returned {returned!r} for a model with {dict(state)}; it must be a number.")
        return Measurement(self._sign * value, self._blocks - _skipped_blocks(self._structure, state))


class CalibrationLoss:
    """
    Mean loss of a model on calibration data, in nats; the exponential of the one of a language model is its perplexity.

    Of a language model it is the mean over all predicted tokens; padding (`attention_mask`) and labels of -100 do not count. Of
    any other model it is its own loss, which needs `labels`.

    The outputs of the blocks of the trunk are kept for all batches, as many as `cache_bytes` hold: every k-th block's if it
    cannot be all. A pass then starts behind the last of them in front of the first block in which the state differs from the
    trunk; the model's own forward runs, in which the blocks before that return what was kept. A trial on the first batch finds
    out whether the model allows that (each block runs once, stack after stack, and changes nothing in place). If not, every
    pass is a full one.

    Use it inside `calibration_mode`.

    Raises:
        ValueError: the data has nothing to predict, the model computes no loss on it or one that is not finite.
    """

    def __init__(
        self, model: nn.Module, structure: Structure, batches: list[dict[str, Any]], cache_bytes: float
    ) -> None:
        self._model, self._structure = model, structure
        # of a model that accelerate has offloaded nothing is anywhere, and its hooks move the inputs
        device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        self._predicts_tokens = is_language_model(model)
        moved = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in batches]
        self._batches = [batch for batch in moved if self._count(batch)]
        self._counts = [self._count(batch) for batch in self._batches]
        if not self._batches:
            raise ValueError(
                "calibration: its sequences have nothing to predict; they need two tokens or more, or labels."
            )
        self._trunk: State | None = None
        self._kept: dict[int, list[Any]] = {}  # outputs by the place of the block, one for each batch
        self._versions: list[int] = []  # of the outputs that the last pass kept, when it did
        self._passes = 0
        self._current = 0  # number of the batch that runs
        self._plan(cache_bytes)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def __call__(self, state: State, trunk: State) -> Measurement:
        before = self._passes
        if self._stored:
            self._move_trunk(trunk)
        activate(self._model, self._structure, state)
        value = self._loss(self._start(state, trunk))
        return Measurement(value, (self._passes - before) / len(self._batches))

    def _move_trunk(self, trunk: State) -> None:
        """Bring what is kept to another trunk; the outputs in front of the first difference stay."""
        if self._trunk == trunk:
            return
        first = 0 if self._trunk is None else self._first_difference(self._trunk, trunk)
        start = self._start(self._trunk, trunk) if self._trunk is not None else 0
        for place in self._stored:
            if place >= first:
                self._kept[place] = []
        self._trunk = None
        activate(self._model, self._structure, trunk)
        self._keep(start)
        self._trunk = dict(trunk)

    def _loss(self, start: int) -> float:
        """Mean over all batches of passes that begin with the block in place `start`."""
        with self._started_at(start):
            total = sum(map(self._batch_loss, self._each_batch()))
        value = total / sum(self._counts)
        return math.inf if math.isnan(value) else value  # the worst of all candidates

    def _keep(self, start: int) -> None:
        """Passes that begin with the block in place `start`, and end behind the last output that is to be kept."""

        def keep(place: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self._kept[place].append(output)
                self._versions += _versions(output)
                if place == self._stored[-1]:
                    raise StopForward

            return hook

        self._versions = []
        with self._started_at(start) as hooks:
            for place in self._stored:
                if place >= start:
                    hooks.enter_context(self._blocks[place].register_forward_hook(keep(place)))
            for batch in self._each_batch():
                with suppress(StopForward):
                    self._batch_loss(batch)

    def _each_batch(self) -> Iterator[dict[str, Any]]:
        for self._current, batch in enumerate(self._batches):
            yield batch

    @contextmanager
    def _started_at(self, start: int) -> Iterator[ExitStack]:
        """The blocks in front of place `start` return what is kept instead of computing."""

        def kept_output(place: int) -> Callable[..., Any]:
            # the last one that is kept in front of `start`, or of an earlier stack: the model passes it on to the next block
            source = max(p for p in self._stored if p < start and self._stack_of[p] == self._stack_of[place])
            return lambda *args, **kwargs: self._kept[source][self._current]

        def count(module: nn.Module, args: Any, output: Any) -> None:
            self._passes += not is_skipped(module)

        with ExitStack() as context:
            for place, block in enumerate(self._blocks):
                if place < start:
                    context.enter_context(replaced_forward(block, kept_output(place)))
                else:
                    context.enter_context(block.register_forward_hook(count))
            yield context

    def _batch_loss(self, batch: dict[str, Any]) -> float:
        """Sum over what is predicted."""
        if not self._predicts_tokens:
            loss = getattr(self._model(**batch), "loss", None)
            if loss is None:
                raise ValueError(
                    f"calibration: {type(self._model).__name__} computes no loss; its batches need `labels`, or give `metric`."
                )
            return float(loss) * self._count(batch)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        logits = self._model(**inputs).logits
        targets = _targets(batch).to(logits.device)
        losses = nn.functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
        return float(losses.cpu().double().sum())  # some devices have no float64

    def _count(self, batch: dict[str, Any]) -> int:
        if self._predicts_tokens:
            return int((_targets(batch) != -100).sum())
        labels = batch.get("labels")
        if not isinstance(labels, torch.Tensor):
            raise ValueError(
                f"calibration: {type(self._model).__name__} is no language model, so its batches need `labels`; or give `metric`."
            )
        return int((labels != -100).sum()) if labels.dim() > 1 and not labels.is_floating_point() else labels.shape[0]

    # -- what can be kept ---------------------------------------------------------------------------------------------

    def _plan(self, cache_bytes: float) -> None:
        """Runs the first batch to see in which order the blocks run, and decides which outputs are kept."""
        activate(self._model, self._structure, {})
        stacks = find_stacks(self._model)
        names = {id(block): (number, name) for number, stack in enumerate(stacks) for name, block in stack.items()}
        order: list[nn.Module] = []
        sizes: list[int] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            order.append(module)
            tensors = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor))
            sizes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

        with ExitStack() as hooks:
            for stack in stacks:
                for block in stack.values():
                    hooks.enter_context(block.register_forward_hook(note))
            whole = self._batch_loss(self._batches[0])
        if not math.isfinite(whole):
            raise ValueError(f"calibration: the loss of the whole model is {whole} on the first batch.")
        self._blocks = order
        self._stack_of = [names[id(block)][0] for block in order]
        self._place = {names[id(block)][1]: place for place, block in enumerate(order)}
        self._stored: list[int] = []
        once = len(self._place) == len(order) == sum(len(stack) for stack in stacks)
        stack_after_stack = self._stack_of == sorted(self._stack_of, key=self._stack_of.index)
        if not once or not stack_after_stack:
            logger.warning("The blocks do not run once each, stack after stack, so that every pass is a full one.")
            self._blocks = list(dict.fromkeys(order))
            return
        ends = [p for p in range(len(order) - 1) if self._stack_of[p] != self._stack_of[p + 1]]
        room = cache_bytes - sum(sizes[p] for p in ends) * len(self._batches)
        needed = max(sizes) * len(self._batches) * len(order)
        stride = max(1, math.ceil(needed / room)) if room > 0 else len(order)
        if stride < len(order):
            self._stored = sorted({*ends, *range(stride - 1, len(order) - 1, stride)})
        self._check(whole)

    def _check(self, whole: float) -> None:
        """Whether a pass that starts behind the last output that is kept gives the same loss."""
        if not self._stored:
            return
        batches, counts = self._batches, self._counts
        self._batches, self._counts = batches[:1], [1]
        reason = None
        self._kept = {place: [] for place in self._stored}
        try:
            self._keep(0)
            versions = self._versions
            again = [self._loss(self._stored[0] + 1), self._loss(self._stored[-1] + 1)]
            if again != [whole, whole] and not all(math.isclose(value, whole, rel_tol=1e-6) for value in again):
                reason = f"the loss would be {again} instead of {whole}"
            elif versions != _versions(self._kept):
                reason = "a block changes its inputs in place"
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            reason = f"a pass without the first blocks fails ({error!r})"
        finally:
            self._batches, self._counts = batches, counts
        self._kept = {place: [] for place in self._stored}
        self._passes = 0
        if reason is not None:
            logger.warning("The outputs of blocks cannot be kept, so that every pass is a full one: %s.", reason)
            self._stored, self._kept = [], {}

    def _first_difference(self, one: State, other: State) -> int:
        """Place of the first block that two states compute differently; that after the last if none."""
        keys = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
        return min((self._place_of(key) for key in keys), default=len(self._blocks))

    def _place_of(self, key: str) -> int:
        name = key.partition(":")[2]
        if name not in self._place and name.rpartition(".")[0] in self._place:
            name = name.rpartition(".")[0]  # a part of a block
        inside = [place for path, place in self._place.items() if path == name or path.rpartition(".")[0] == name]
        return min(inside, default=0)

    def _start(self, state: State | None, trunk: State) -> int:
        """Where a pass of a state can begin, from what is kept of the trunk, or the other way round."""
        if state is None or not self._stored:
            return 0
        first = self._first_difference(state, trunk)
        if first == len(self._blocks):
            first -= 1  # a pass computes something
        return max((place + 1 for place in self._stored if place < first), default=0)


def _skipped_blocks(structure: Structure, state: State) -> int:
    return sum(state.get(block.depth_key()) == 0 for block in structure.blocks)


def _targets(batch: dict[str, Any]) -> torch.Tensor:
    """What position t of a causal language model has to predict, int64 (sequences, length); -100 for nothing."""
    labels = batch.get("labels")
    mask = batch.get("attention_mask")
    if labels is None:
        if "input_ids" not in batch:
            raise ValueError("calibration: a batch without `input_ids` needs `labels`.")
        labels = own_labels(batch["input_ids"], mask)
    targets = torch.full_like(labels, -100)
    targets[:, :-1] = labels[:, 1:]
    if mask is not None and mask.dim() == 2:
        targets[mask == 0] = -100  # nor is the first token predicted from padding
    return targets


def _versions(outputs: Any) -> list[int]:
    return [leaf._version for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
