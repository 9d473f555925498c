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
"""The blocks of a model: what can be narrowed and what can be skipped."""

from __future__ import annotations

from torch import nn

from .layouts import BlockLayout, layouts
from .parts import Block
from .proof import prove
from .reading import Reading


class Structure(Reading):
    """What can be narrowed and skipped in a model, of which every law was tried (see `proof.py`).

    Args:
        model (`nn.Module`): with or without adapters, in any state; it is only looked at.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        prove(self, model)
        # a layout that is not true of a block gives way to another one of the same layers
        if others := {block.path: other for block in self.blocks for other in _others(block)[:1]}:
            second = Reading(model, {block.path: block.layout for block in self.blocks} | others)
            prove(second, model)
            if not any("heads" in block.problems for block in second.blocks if block.path in others):
                self.__dict__.update(second.__dict__)


def _others(block: Block) -> list[BlockLayout]:
    """Layouts of the same layers, where the one that was taken is wrong about the heads."""
    if "heads" not in block.problems or not block.attentions:
        return []
    return [layout for layout in layouts() if layout is not block.layout and layout.paths() == block.layout.paths()]
