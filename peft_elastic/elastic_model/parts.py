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
"""What an elastic model needs to know of its parts: of the blocks of a transformer, and of the channels of a convolutional model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional, Protocol

import torch
from torch import nn

from ..common.calls import batches_of
from ..common.checks import wrong
from ..layers.convolutional import add_matrices, remove_matrices
from ..structure.along import Along
from ..structure.blocks import Structure
from ..structure.description import check_describable, extract_described
from ..structure.importance import check_order, check_orders, check_sort, check_sortable, sort_by_importance
from ..structure.narrow import check_units
from ..structure.parts import KINDS
from ..structure.space import activate, check_depth, check_narrowable_layers, layer_shapes, structural_choices
from ..structure.tracing.description import extract_channels
from ..structure.tracing.graph import example_of
from ..structure.tracing.order import check_channel_importance, check_channels_along, measure_channels, sort_channels
from ..structure.tracing.proof import prove, prove_choices
from ..structure.tracing.shapes import traced_shapes
from ..structure.tracing.structure import TracedStructure
from ..supernet.space import Choice, SearchSpace, choice_key
from .config import ElasticConfig


class Parts(Protocol):
    """What is elastic in a model, and how that is chosen."""

    space: SearchSpace
    # of what is given to the model to find its parts; None where their names tell
    inputs: Any

    def prepare(self, model: nn.Module) -> None:
        """Give the model what it needs to be elastic."""

    def take_back(self, model: nn.Module) -> None:
        """Take that off again."""

    def check(self, model: nn.Module, values: Mapping[str, int], importance: str | None) -> None:
        """ValueError if these values cannot be chosen now."""

    def check_sampled(self, values: Mapping[str, int]) -> None:
        """ValueError if nothing can be trained as these values."""

    def activate(self, model: nn.Module, values: Mapping[str, int]) -> None:
        """Let the model compute with these values."""

    def check_sortable(self, model: nn.Module) -> None:
        """ValueError if the model cannot be put into another order."""

    def sort(
        self,
        model: nn.Module,
        importance: Any,
        calibration: Any,
        *,
        max_samples: Optional[int],
        progress: bool,
        along: tuple[Any, Any],
    ) -> dict[str, torch.Tensor]:
        """Sort what is elastic in a whole model by importance, and optimizers and averages along with it."""

    def check_sort(self, model: nn.Module, importance: Any, calibration: Any, along: tuple[Any, Any]) -> None:
        """ValueError if `sort` would refuse these arguments before it runs the model, or do nothing."""

    def check_orders(self, orders: Mapping[str, torch.Tensor]) -> None:
        """ValueError if these are no orders of the model."""

    def extract(self, model: nn.Module) -> None:
        """Leave what is active alone, in place, and let the configuration say so."""


class BlockParts:
    """Heads, MLP channels and blocks of a transformer, found by the names of its layers.

    Raises:
        ValueError: if the model does not have what the configuration makes elastic.
    """

    inputs = None

    def __init__(self, model: nn.Module, config: ElasticConfig) -> None:
        self.structure = Structure(model)
        self._kinds = tuple(config.elastic_width or ())
        choices = structural_choices(self.structure, config.elastic_width, config.depth_entries)
        check_narrowable_layers(model, self.structure, choices)
        self._check_whole(choices)
        self.space = SearchSpace(
            choices, layer_shapes(model, self.structure, choices, {}), _fixed_blocks(self.structure)
        )

    def check_describable(self, model: nn.Module) -> None:
        check_describable(model, self.space.choices)

    def prepare(self, model: nn.Module) -> None:
        """Nothing is needed."""

    def take_back(self, model: nn.Module) -> None:
        """Nothing was given."""

    def check(self, model: nn.Module, values: Mapping[str, int], importance: str | None) -> None:
        check_order(model, self.structure, importance, values)
        if values != self.space.max:
            check_units(model, self.structure.widths)

    def check_sampled(self, values: Mapping[str, int]) -> None:
        check_depth(self.structure, values)

    def activate(self, model: nn.Module, values: Mapping[str, int]) -> None:
        activate(model, self.structure, values)

    def check_sortable(self, model: nn.Module) -> None:
        check_sortable(model, [width for width in self.structure.widths if width.kind in self._kinds])

    def sort(
        self,
        model: nn.Module,
        importance: Any,
        calibration: Any,
        *,
        max_samples: Optional[int],
        progress: bool,
        along: tuple[Any, Any],
    ) -> dict[str, torch.Tensor]:
        return sort_by_importance(
            model,
            importance,
            calibration,
            kinds=self._kinds,
            max_samples=max_samples,
            progress=progress,
            optimizer=along[0],
            averaged=along[1],
        )

    def check_sort(self, model: nn.Module, importance: Any, calibration: Any, along: tuple[Any, Any]) -> None:
        check_sort(model, importance, calibration, kinds=self._kinds, optimizer=along[0], averaged=along[1])

    def check_orders(self, orders: Mapping[str, torch.Tensor]) -> None:
        check_orders(self.structure, orders)

    def extract(self, model: nn.Module) -> None:
        extract_described(model)

    def _check_whole(self, choices: list[Choice]) -> None:
        """ValueError if the largest subnet would not be the model itself."""
        for choice in choices:
            if choice.kind in KINDS and choice.options[0] != self.structure.width(choice.key).full:
                raise wrong(
                    f"elastic_width[{choice.kind!r}]",
                    f"options with the whole width, 1.0 or {self.structure.width(choice.key).full} for {choice.name!r}",
                    list(choice.options),
                )


class ChannelParts:
    """Channels, kernels and residual blocks of a convolutional model, found by tracing it.

    Raises:
        ValueError: if the model cannot be traced, or does not have what the configuration makes elastic.
    """

    def __init__(self, model: nn.Module, config: ElasticConfig, inputs: Any) -> None:
        self.inputs = example_of(model, inputs)
        self.structure = TracedStructure.read(model, self.inputs)
        prove(self.structure, model, self.inputs)
        choices = self.structure.choices(
            model, (config.elastic_width or {}).get("channels"), config.elastic_kernel, config.depth_entries
        )
        prove_choices(self.structure, model, self.inputs, choices)
        self.space = SearchSpace(choices, traced_shapes(model, self.structure, choices), self.structure.fixed)

    def check_describable(self, model: nn.Module) -> None:
        """Any part of such a model is described by the sizes of its layers."""

    def prepare(self, model: nn.Module) -> None:
        for choice in self.space:
            if choice.kind == "kernel":
                add_matrices(model.get_submodule(choice.name), choice.options)

    def take_back(self, model: nn.Module) -> None:
        for module in model.modules():
            remove_matrices(module)

    def check(self, model: nn.Module, values: Mapping[str, int], importance: str | None) -> None:
        check_order(model, self.structure, importance, values)

    def check_sampled(self, values: Mapping[str, int]) -> None:
        """Every block is a residual one, so that any of them may be left out."""

    def activate(self, model: nn.Module, values: Mapping[str, int]) -> None:
        self.structure.activate(model, values)

    def check_sortable(self, model: nn.Module) -> None:
        """What was traced can be sorted."""

    def sort(
        self,
        model: nn.Module,
        importance: Any,
        calibration: Any,
        *,
        max_samples: Optional[int],
        progress: bool,
        along: tuple[Any, Any],
    ) -> dict[str, torch.Tensor]:
        moved = Along(model, *along)
        check_channels_along(model, self.structure, moved)
        scores = measure_channels(model, self.structure, importance, batches_of(calibration, max_samples), progress)
        elastic = {choice.name for choice in self.space if choice.kind == "channels"}
        return sort_channels(model, self.structure, {n: s for n, s in scores.items() if n in elastic}, moved)

    def check_sort(self, model: nn.Module, importance: Any, calibration: Any, along: tuple[Any, Any]) -> None:
        check_channels_along(model, self.structure, Along(model, *along))
        check_channel_importance(importance, calibration is not None)
        if isinstance(importance, str) and importance == "none":
            raise ValueError("`importance` is 'none', by which nothing is sorted.")

    def check_orders(self, orders: Mapping[str, torch.Tensor]) -> None:
        units = {channels.name: channels.units for channels in self.structure.elastic}
        for name, order in orders.items():
            if sorted(order.tolist()) != list(range(units.get(name, -1))):
                raise ValueError(f"The order of {name!r} does not belong to this model.")

    def extract(self, model: nn.Module) -> None:
        extract_channels(model)


def _fixed_blocks(structure: Structure) -> dict[str, str]:
    """What of the blocks of a transformer cannot be narrowed or skipped -> why."""
    fixed: dict[str, str] = {}
    for block in structure.blocks:
        fixed |= {choice_key(kind, block.path): reason for kind, reason in block.problems.items()}
        fixed |= {block.depth_key(part): reason for part, reason in block.fixed.items()}
    return fixed


def find_parts(model: nn.Module, config: ElasticConfig, inputs: Any) -> BlockParts | ChannelParts:
    """The parts of a model that a configuration makes elastic.

    Raises:
        ValueError: if that is not possible.
    """
    traced = "channels" in (config.elastic_width or {}) or bool(config.elastic_kernel)
    if not traced and not config.elastic_width:  # depth alone: of a transformer, if it is one
        traced = not Structure(model).blocks
    if traced:
        return ChannelParts(model, config, inputs)
    if inputs is not None:
        raise ValueError(
            "`example_inputs` is for models that are traced, of which 'channels' or kernels are elastic; leave it out."
        )
    return BlockParts(model, config)
