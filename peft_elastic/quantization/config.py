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

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ..common.checks import check_choice
from ..layers.grid import BITS, CLIPPING, check_grid_options
from ..structure.selection import check_patterns


@dataclass(frozen=True)
class QuantizationConfig:
    """
    What every quantisation method shares: the grid, and which layers. Use one of its subclasses.

    Args:
        bits (`int`):
            2, 4 or 8.
        group_size (`int`):
            Inputs of a group, which share a scale and a zero point; it has to divide the inputs of each layer. -1: all.
        symmetric (`bool`):
            Zero points in the middle, 2^(bits - 1). Otherwise they are chosen for each group: smaller errors, above all at 2
            and 4 bits.
        clipping (`str`):
            `"minmax"`, where the range of a group holds all its weights, or `"mse"`, where the range is shrunk as far as that
            makes the squared error of the group smaller. See `fit_grid`.
        target_modules (`list[str]` or `str`, *optional*):
            Which linear layers (`nn.Linear`, or `Conv1D` of transformers) to quantise: a list of names or name suffixes, or a
            regular expression that the full name must match, as in peft. By default every linear layer inside the
            transformer blocks, so neither the embeddings nor the output head, but for the routers of mixtures of experts.
        exclude_modules (`list[str]` or `str`, *optional*):
            Layers not to quantise, in the same notation.

    Raises:
        ValueError: an argument is out of range.
    """

    method: ClassVar[str] = "none"

    bits: int = field(default=4, metadata={"help": "Bits of a weight.", "choices": BITS})
    group_size: int = field(
        default=128,
        metadata={"help": "Inputs that share a scale and a zero point; has to divide those of every layer; -1: all."},
    )
    symmetric: bool = field(default=False, metadata={"help": "Zero points in the middle of the range."})
    clipping: Literal["minmax", "mse"] = field(
        default="minmax",
        metadata={"help": "Range of a group: that of its weights, or one with the smallest squared error."},
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Name suffixes or a regular expression. Default: the linear layers of the transformer blocks."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Name suffixes or a regular expression of layers that are not quantised."}
    )

    def __post_init__(self) -> None:
        check_grid_options(self.bits, self.group_size, self.symmetric)
        check_choice("clipping", self.clipping, CLIPPING)
        check_patterns(self)
