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
"""What is active in an elastic model, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .space import SearchSpace, Subnet


def name_of(space: SearchSpace, subnet: Mapping[str, int]) -> str:
    """`"max"`, `"min"`, `"heuristic"`, or `"custom"` for any other subnet of a space."""
    return next((name for name in ("max", "min", "heuristic") if subnet == getattr(space, name)), "custom")


def trained_parameters(space: SearchSpace, subnet: Mapping[str, int]) -> int:
    """How many parameters of a subnet its training changes: those of the adapters, or where there are none, those of the model in the
    blocks whose width or depth is elastic, of a traced model all of its layers."""
    of_adapters = any(choice.kind == "rank" for choice in space)
    return space.count_parameters(subnet) if of_adapters else space.count_base_parameters(subnet)


def describe_parameters(space: SearchSpace, subnet: Mapping[str, int]) -> str:
    """How many parameters a subnet has of those that the space changes: of adapters, of the base, or of both."""
    of_adapters = any(choice.kind == "rank" for choice in space)
    counts = {"adapter parameters": space.count_parameters} if of_adapters else {}
    if space.layers:
        where = (
            "elastic blocks" if space.counted_per == "token" else "layers"
        )  # of a traced model all are in the space
        counts[f"{'base ' if of_adapters else ''}parameters in {where}"] = space.count_base_parameters
    parts = []
    for what, count in counts.items():
        active, total = count(subnet), count(space.max)
        parts.append(f"{active:,d} of {total:,d} {what}, {100 * active / max(1, total):.1f}%")
    return "; ".join(parts)


@dataclass(frozen=True)
class SubnetSummary:
    """What is active in an elastic model; printing it gives a table.

    Args:
        adapter_name (`str`, *optional*): the adapter; None for a super-network of the model's own weights.
        subnet (`Subnet`): the active subnet.
        space (`SearchSpace`): the space it comes from.
    """

    adapter_name: str | None
    subnet: Subnet
    space: SearchSpace

    @property
    def active_parameters(self) -> int:
        """Parameters that the active subnet uses: of the adapter (A and B matrices), or else of the model in elastic blocks."""
        return trained_parameters(self.space, self.subnet)

    @property
    def total_parameters(self) -> int:
        """The same of the whole super-network."""
        return trained_parameters(self.space, self.space.max)

    @property
    def name(self) -> str:
        """`"max"`, `"min"`, `"heuristic"` or `"custom"`."""
        return name_of(self.space, self.subnet)

    def describe(self) -> str:
        """One line: name and active parameters: those of the adapter, and of the blocks whose width or depth is elastic."""
        of_adapter = "" if self.adapter_name is None else f" of adapter {self.adapter_name!r}"
        return f"active subnet{of_adapter}: {self.name} ({describe_parameters(self.space, self.subnet)})"

    def __str__(self) -> str:
        width = max(len(choice.key) for choice in self.space)
        rows = [
            f"{choice.key:<{width}}  {self.subnet[choice.key]:>6}  of {list(choice.options)}" for choice in self.space
        ]
        return "\n".join([self.describe(), *rows])

    __repr__ = __str__
