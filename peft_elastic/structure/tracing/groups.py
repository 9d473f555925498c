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
"""Channels that must be cut together: runs of features along the dimensions of tensors, and the groups that they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


class Group:
    """Channels that are permuted and narrowed together, in `units` equal pieces, wherever they occur in the model.

    A group that was joined with another one stands for it; `Groups.find` gives the one that is left.
    """

    def __init__(self, number: int, units: int, name: str) -> None:
        self.number, self.units, self.name = number, units, name
        # channels where they are made first; a unit is `full // units` of them
        self.full = units
        # why it cannot be narrowed, or None
        self.fixed: str | None = None
        # whether something computes with all of its channels together, as a LayerNorm does: then narrowing is not masking
        self.mixed = False
        # whether it does so by a sum, which twice as many channels make twice as large, and not by a mean
        self.summed = False
        self._joined: Group | None = None

    def root(self) -> Group:
        group = self
        while group._joined is not None:
            group = group._joined
        return group


@dataclass(frozen=True)
class Run:
    """Features in a row along a dimension.

    Args:
        length (`int`): how many.
        group (`Group`, *optional*): whose units they are, in `units` pieces of equal length; None: they are always there.
    """

    length: int
    group: Group | None = None

    @property
    def root(self) -> Group | None:
        return None if self.group is None else self.group.root()


# Of one dimension. None: a dimension of samples, positions or heads, of which nothing is known.
Runs = tuple[Run, ...]
Dims = tuple[Runs | None, ...]


def length_of(runs: Runs) -> int:
    return sum(run.length for run in runs)


def groups_of(runs: Runs | None) -> list[Group]:
    """The groups of some runs, each once."""
    found = {group.number: group for run in runs or () if (group := run.root) is not None}
    return list(found.values())


@dataclass
class Groups:
    """All groups of a model, while they are being found."""

    made: list[Group] = field(default_factory=list)

    def new(self, units: int, name: str) -> Group:
        """A group of channels that no other layer is known to share yet."""
        group = Group(len(self.made), units, name)
        self.made.append(group)
        return group

    @property
    def roots(self) -> list[Group]:
        """Those that are left, in the order in which they were made."""
        return [group for group in self.made if group._joined is None]

    def coarsen(self, group: Group, units: int) -> None:
        """Let a group move in at most this many pieces, each of whole ones of `units`."""
        group = group.root()
        group.units = math.gcd(group.units, units)

    def fix(self, runs: Runs | None, reason: str) -> None:
        """Note that these channels cannot be narrowed; the first reason is kept."""
        for group in groups_of(runs):
            group.fixed = group.fixed or reason

    def mix(self, runs: Runs | None, summed: bool = False) -> None:
        """Note that something computes with these channels together; `summed`: and that copies of them change it."""
        for group in groups_of(runs):
            group.mixed = True
            group.summed = group.summed or summed

    def join(self, first: Group, second: Group) -> None:
        """Make one group of two, whose pieces correspond."""
        first, second = first.root(), second.root()
        if first is second:
            return
        if second.number < first.number:
            first, second = second, first
        first.units = math.gcd(first.units, second.units)
        first.fixed = first.fixed or second.fixed
        first.mixed = first.mixed or second.mixed
        first.summed = first.summed or second.summed
        second._joined = first

    def unify(self, first: Runs, second: Runs, where: str) -> Runs:
        """Tie the features of two tensors that meet one by one.

        Returns:
            Runs: of the result.
        """
        if [run.length for run in first] == [run.length for run in second]:
            for one, other in zip(first, second):
                if one.root is not None and other.root is not None:
                    self.join(one.root, other.root)
                else:
                    self.fix((one, other), f"{where} meets channels that are always there")
            return tuple(one if one.group is not None else other for one, other in zip(first, second))
        for runs in (first, second):
            self.fix(runs, f"{where} meets channels that are put together of other parts")
        return (Run(length_of(first)),)


def scaled(runs: Runs, factor: int, divisor: int = 1) -> Runs:
    """The same channels, of each of which `factor / divisor` features are there."""
    return tuple(Run(run.length * factor // divisor, run.group) for run in runs)


def ranges_of(runs: Sequence[Run], kept: dict[int, int]) -> tuple[tuple[int, int], ...]:
    """What is active of a dimension, as ranges (start, stop), where of group number n the first `kept[n]` units are."""
    ranges: list[tuple[int, int]] = []
    start = 0
    for run in runs:
        group = run.root
        stop = start + (run.length if group is None else run.length * kept[group.number] // group.units)
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], stop)
        elif stop > start:
            ranges.append((start, stop))
        start += run.length
    return tuple(ranges)
