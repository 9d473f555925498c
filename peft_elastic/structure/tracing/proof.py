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
"""The proof of a traced structure: what was found is tried on a copy of the model with random weights, in float64.

For every group of channels: permuting it changes nothing; what narrowed layers compute is what the whole ones compute whose readers have zeros in the columns
of the inactive channels; where a norm mixes them, the inactive ones are copies of the active ones for that; and permuting the active channels of a
narrowed model changes nothing. Every smaller kernel is the middle of the whole one. Every block that may be
skipped gives the shapes that the model goes on with. And the smallest subnet, cut out, is the smallest subnet. What fails is
fixed, with the reason, and nothing that is left has failed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ...common.calls import as_arguments
from ...layers.convolutional import CONVOLUTIONS, kernel_problem, set_kernel
from ...supernet.space import Choice
from ..modules import module_at
from .cutting import cut
from .graph import tensors_of, trial_copy
from .groups import Runs, ranges_of
from .structure import Channels, TracedStructure, set_block_skipped


# Relative to the largest output, in float64.
_TOLERANCE = 1e-8


def prove(structure: TracedStructure, model: nn.Module, inputs: Any) -> None:
    """Fix what is not true of a model.

    Args:
        structure (`TracedStructure`): of the model.
        model (`nn.Module`): a plain one; it is copied.
        inputs: of a call.
    """
    _Trial(structure, model, inputs).run()


def prove_choices(structure: TracedStructure, model: nn.Module, inputs: Any, choices: Sequence[Choice]) -> None:
    """Try the smallest subnet of some choices.

    Raises:
        ValueError: if the model fails as it, naming the choice.
    """
    trial = _Trial(structure, model, inputs)
    smallest = {choice.key: choice.options[-1] for choice in choices}
    if trial.narrow_and_cut(smallest) is None:
        return
    for key, value in smallest.items():
        if reason := trial.narrow_and_cut({key: value}):
            raise ValueError(f"`config`: {value} is not possible for {key!r}: {reason}.")
    raise ValueError(f"`config`: the smallest subnet is not possible: {trial.narrow_and_cut(smallest)}.")


class _Trial:
    def __init__(self, structure: TracedStructure, model: nn.Module, inputs: Any) -> None:
        self.structure = structure
        self.model = trial_copy(model)
        args, kwargs = as_arguments(inputs)
        self.args = tuple(_as_double(value) for value in args)
        self.kwargs = {name: _as_double(value) for name, value in kwargs.items()}
        self.whole = self._tried()
        self.weights = {name: tensor.clone() for name, tensor in tensors_of(self.model)}

    def run(self) -> None:
        structure = self.structure
        for law in (self._permuted, self._masked, self._doubled, self._wired, self._smallest):
            self._each(law)
        for path in [block.path for block in structure.blocks]:
            reason = self._skipped(path)
            if reason is not None:
                structure.problems[path] = f"the model fails without it: {reason}"
        structure.blocks = [block for block in structure.blocks if block.path not in structure.problems]
        for path in structure.kernels:
            reason = self._cropped(path)
            if reason is not None:
                structure.problems[path] = reason

    def _each(self, law: Callable[[Sequence[Channels]], str | None]) -> None:
        """Try a law on all groups together, and on each alone where it does not hold for all."""
        groups = self.structure.elastic
        if not groups or law(groups) is None:
            return
        bad: list[int] = []
        for group in groups:
            reason = law([group])
            if reason is not None:
                self.structure.fix([group.number], reason)
                bad.append(group.number)
        left = self.structure.elastic
        if left and (reason := law(left)) is not None:  # true of each, and not of all
            self.structure.fix([group.number for group in left], reason)

    # -- laws --------------------------------------------------------------------------------------------------------

    def _tried(self) -> list[torch.Tensor]:
        """What the model computes as a whole.

        Raises:
            ValueError: if that proves nothing.
        """
        name = type(self.model).__name__
        try:
            first, second = self._outputs(), self._outputs()
        except Exception as error:
            raise ValueError(
                f"`model` of type {name} must compute in float64 on the CPU, in which its channels are tried: {_reason('', error)}."
            ) from error
        reason = None
        if not any(tensor.numel() for tensor in first):
            reason = "it has no outputs in floating point"
        elif not all(bool(tensor.isfinite().all()) for tensor in first):
            reason = "with random weights its outputs are not finite"
        elif any(one.shape != other.shape or not torch.equal(one, other) for one, other in zip(first, second)):
            reason = "it computes something else each time, also in evaluation mode"
        if reason is not None:
            raise ValueError(f"`model` of type {name} cannot be tried, so its channels are not known: {reason}.")
        return first

    def _permuted(self, groups: Sequence[Channels]) -> str | None:
        generator = torch.Generator().manual_seed(1)
        self._move({g.number: _moved(g.units, generator) for g in groups})
        try:
            return self._difference(self.whole, "another order of its channels changes what the model computes")
        finally:
            self._restore()

    def _move(self, orders: dict[int, torch.Tensor], readers: bool = True) -> None:
        """Let unit i of group n be what unit `orders[n][i]` is, in all tensors, or in those alone that do not read the group."""
        done: set[tuple[int, int]] = set()
        for (path, name, dim), runs in self.structure.sides.items():
            index = permutation_of(runs, orders)
            if not name or index is None:
                continue
            module = self.model.get_submodule(path)
            if not readers and (path, name, dim) in self.structure.reading:
                continue
            tensor: Any = module._parameters.get(name, module._buffers.get(name))
            if tensor is not None and (id(tensor), dim) not in done and tensor.shape[dim] > 1:
                done.add((id(tensor), dim))
                tensor.copy_(tensor.index_select(dim, index))

    def _close(self, kept: dict[int, int]) -> None:
        """Let nothing read more than the first `kept[n]` units of group n."""
        done: set[tuple[int, int]] = set()
        for (path, name, dim), runs in self.structure.sides.items():
            if (path, name, dim) not in self.structure.reading:
                continue
            module = self.model.get_submodule(path)
            weight: Any = module._parameters.get(name, module._buffers.get(name))
            if (id(weight), dim) in done:
                continue
            done.add((id(weight), dim))
            active = torch.zeros(weight.shape[dim], dtype=torch.bool)
            for start, stop in ranges_of(runs, kept):
                active[start:stop] = True
            weight.index_fill_(dim, torch.nonzero(~active).flatten(), 0.0)

    def _masked(self, groups: Sequence[Channels]) -> str | None:
        """What does not mix its channels computes as with zeros in the columns that read the inactive ones."""
        groups = [group for group in groups if not group.mixed]
        # of each another part: what holds for halves of everything, as of a chunk, need not hold for a half of something
        parts = ((1, 2), (1, 4), (3, 4))
        values = {
            group.key: min(group.units - 1, max(1, group.units * a // b)) * group.unit
            for group, (a, b) in zip(groups, itertools.cycle(parts))
        }
        kept = self._kept(values)
        self._close(kept)
        try:
            masked = self._outputs()
        finally:
            self._restore()
        return self._narrowed(
            values, masked, "narrowed, the model computes something else than without these channels"
        )

    def _doubled(self, groups: Sequence[Channels]) -> str | None:
        """A norm or mean over channels of which each is there several times is what it is over each once: where the inactive ones are
        copies of the active ones that nobody reads, the narrowed model computes what the whole one does."""
        groups = [group for group in groups if not group.summed]
        first = {group.number: group.units // _smallest_factor(group.units) for group in groups}
        values = {group.key: first[group.number] * group.unit for group in groups}
        self._move({g.number: torch.arange(g.units) % first[g.number] for g in groups}, readers=False)
        self._close(self._kept(values))
        try:
            whole = self._outputs()
            return self._narrowed(
                values,
                whole,
                "narrowed, the model computes something else than with copies of the channels that are left",
            )
        finally:
            self._restore()

    def _wired(self, groups: Sequence[Channels]) -> str | None:
        """Another order of the active channels changes nothing of a narrowed model."""
        generator = torch.Generator().manual_seed(2)
        kept = {g.number: max(min(2, g.units - 1), g.units // 2) for g in groups}
        orders = {
            g.number: torch.cat((_moved(kept[g.number], generator), torch.arange(kept[g.number], g.units)))
            for g in groups
        }
        values = {group.key: kept[group.number] * group.unit for group in groups}
        try:
            self.structure.activate(self.model, values)
            before = self._outputs()
            self._move(orders)
            return self._difference(before, "narrowed, another order of its channels changes what the model computes")
        except Exception as error:
            return _reason("narrowed, the model fails", error)
        finally:
            self._restore()
            self.structure.activate(self.model, {})

    def _kept(self, values: dict[str, int]) -> dict[int, int]:
        return {c.number: values.get(c.key, c.full) // c.unit for c in self.structure.channels}

    def _smallest(self, groups: Sequence[Channels]) -> str | None:
        # not a single channel of each: a standardized weight of one number is none
        return self.narrow_and_cut({group.key: max(1, group.units // 4) * group.unit for group in groups})

    def narrow_and_cut(self, values: dict[str, int]) -> str | None:
        """Why the model does not work as a subnet, or its cut copy is another model; None if all is right."""
        try:
            self.structure.activate(self.model, values)
            narrowed = self._outputs()
            if [t.shape for t in narrowed] != [t.shape for t in self.whole]:
                return "narrowed, the model gives outputs of another shape"
            small = copy.deepcopy(self.model)
            cut(small)
            return self._difference(narrowed, "cut, the model computes something else than narrowed", small)
        except Exception as error:
            return _reason("narrowed, the model fails", error)
        finally:
            self.structure.activate(self.model, {})

    def _skipped(self, path: str) -> str | None:
        set_block_skipped(self.model, path, True)
        try:
            skipped = self._outputs()
            if [tensor.shape for tensor in skipped] != [tensor.shape for tensor in self.whole]:
                return "its outputs have another shape"
        except Exception as error:
            return _reason("", error)
        finally:
            set_block_skipped(self.model, path, False)
        block = self.model.get_submodule(path)
        names = [name for name, module in self.model.named_modules(remove_duplicate=False) if module is block]
        try:  # as a cut model is
            for name in names:
                self.model.set_submodule(name, nn.Identity())
            return self._difference(
                skipped, "with nn.Identity in its place it computes something else than without it"
            )
        finally:
            for name in names:
                self.model.set_submodule(name, block)

    def _cropped(self, path: str) -> str | None:
        layer: Any = module_at(self.model, path)
        if path in self.structure.problems:
            return self.structure.problems[path]
        if not isinstance(layer, CONVOLUTIONS):
            return f"it is a {type(layer).__name__}"
        if "weight" not in layer._parameters:
            return "its weight is computed from other parameters"
        sizes = [size for size in range(max(layer.kernel_size) - 2, 0, -2) if kernel_problem(layer, size) is None]
        if not sizes:
            too_small = max(layer.kernel_size) < 3
            return "its kernel is too small" if too_small else kernel_problem(layer, max(layer.kernel_size) - 2)
        size = sizes[0]
        small = [slice((k - min(k, size)) // 2, (k - min(k, size)) // 2 + min(k, size)) for k in layer.kernel_size]
        middle = torch.zeros_like(layer.weight)
        middle[(slice(None), slice(None), *small)] = 1
        layer.weight.mul_(middle)
        try:
            masked = self._outputs()
            set_kernel(layer, size)
            return self._difference(
                masked, "with a smaller kernel the model computes something else than with zeros around it"
            )
        except Exception as error:
            return _reason("with a smaller kernel the model fails", error)
        finally:
            set_kernel(layer, None)
            self._restore()

    # -- means -------------------------------------------------------------------------------------------------------

    def _narrowed(self, values: dict[str, int], expected: list[torch.Tensor], words: str) -> str | None:
        try:
            self.structure.activate(self.model, values)
            return self._difference(expected, words)
        except Exception as error:
            return _reason("narrowed, the model fails", error)
        finally:
            self.structure.activate(self.model, {})

    def _outputs(self, model: nn.Module | None = None) -> list[torch.Tensor]:
        with torch.no_grad():
            result = (self.model if model is None else model)(*self.args, **self.kwargs)
        return flat(result)

    def _difference(self, expected: list[torch.Tensor], words: str, model: nn.Module | None = None) -> str | None:
        try:
            found = self._outputs(model)
        except Exception as error:
            return _reason("narrowed, the model fails", error)
        if [t.shape for t in found] != [t.shape for t in expected]:
            return words
        for one, other in zip(found, expected):
            scale = float(other.abs().max()) if other.numel() else 0.0
            if not torch.isfinite(one).all() or float(
                (one - other).abs().max() if one.numel() else 0
            ) > _TOLERANCE * max(scale, 1e-3):
                return words
        return None

    def _restore(self) -> None:
        for name, tensor in tensors_of(self.model):
            tensor.copy_(self.weights[name])


def flat(result: Any) -> list[torch.Tensor]:
    """The floating-point tensors of what a model returns."""
    return [
        t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]


def permutation_of(runs: Runs, orders: dict[int, torch.Tensor]) -> torch.Tensor | None:
    """Where each feature of a dimension comes from, when unit i of group n is to be what unit `orders[n][i]` was; None if that
    changes nothing."""
    index = torch.arange(sum(run.length for run in runs))
    start, changed = 0, False
    for run in runs:
        group = run.root
        if group is not None and group.number in orders:
            pieces = torch.arange(start, start + run.length).view(group.units, -1)
            index[start : start + run.length] = pieces[orders[group.number]].flatten()
            changed = True
        start += run.length
    return index if changed else None


def _smallest_factor(number: int) -> int:
    """Above one."""
    return next(factor for factor in range(2, number + 1) if number % factor == 0)


def _moved(length: int, generator: torch.Generator) -> torch.Tensor:
    """A permutation that is none of those that leave all as it is, if there is one."""
    order = torch.randperm(length, generator=generator)
    return order.roll(1) if torch.equal(order, torch.arange(length)) else order


def _reason(words: str, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{words}{' ' if words else ''}({type(error).__name__}: {lines[0] if lines else 'no message'})"


def _as_double(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to("cpu", torch.float64 if value.is_floating_point() else None)
