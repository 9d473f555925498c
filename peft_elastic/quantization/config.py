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

from ..common.checks import check_max_samples
from ..layers.grid import CLIPPING, check_grid_options
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

    bits: int = field(default=4, metadata={"help": "Bits of a weight: 2, 4 or 8."})
    group_size: int = field(default=128, metadata={"help": "Inputs that share a scale and a zero point; -1: all."})
    symmetric: bool = field(default=False, metadata={"help": "Zero points in the middle of the range."})
    clipping: Literal["minmax", "mse"] = field(
        default="minmax", metadata={"help": "'minmax', or 'mse': ranges with the smallest squared error."}
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
        if self.clipping not in CLIPPING:
            raise ValueError(f"`clipping` is {self.clipping!r}; allowed are {list(CLIPPING)}.")
        check_patterns(self)


@dataclass(frozen=True)
class RTNConfig(QuantizationConfig):
    """Rounding to nearest: each weight by itself, on the grid of its group. Needs no data."""

    method: ClassVar[str] = "rtn"


@dataclass(frozen=True)
class GPTQConfig(QuantizationConfig):
    """
    GPTQ (Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm
    1): the inputs of a layer are rounded one after the other, and the error that each makes in the outputs of the layer is made
    up for by the weights that follow. Blocks are quantised in order, so that later ones see the activations of the quantised
    earlier ones. Needs calibration data.

    Weights that are zero stay exactly zero, with the others making up for it where they had to be changed, as in SparseGPT
    (Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", section 3.5).

    The weights that make up for errors are stored in the dtype of the model, on the side of the rounding where they were. With 8
    bits bfloat16 is too coarse for that: some integers differ by one from those of GPTQ.

    Args:
        act_order (`bool`):
            Inputs are rounded by falling strength (the diagonal of the Hessian) and not in the order in which they are stored.
            The groups stay what they are and are fitted before the first rounding ("static groups"), so checkpoints have
            groups that follow each other, as without `act_order`, and are as fast.
        damping (`float`):
            Added to the diagonal of the Hessian, as a share of its mean. It grows tenfold, up to the mean, where a matrix is
            not positive definite with less.
        block_size (`int`):
            Inputs after which the rest of the matrix is brought up to date. It changes the speed alone.
        max_samples (`int`, *optional*):
            Number of calibration sequences to use at most; by default all that `calibration` yields. The paper uses 128.
    """

    method: ClassVar[str] = "gptq"

    act_order: bool = field(default=False, metadata={"help": "Round inputs by falling strength."})
    damping: float = field(default=0.01, metadata={"help": "Added to the Hessian's diagonal, as a share of its mean."})
    block_size: int = field(default=128, metadata={"help": "Inputs between two updates of the rest of the matrix."})
    max_samples: int | None = field(
        default=None, metadata={"help": "Calibration sequences used at most. Default: all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.act_order, bool):
            raise ValueError(f"`act_order` is {self.act_order!r}; allowed are True and False.")
        if isinstance(self.damping, bool) or not isinstance(self.damping, (int, float)) or not 0 < self.damping <= 1:
            raise ValueError(f"`damping` is {self.damping!r}; it must be a number above 0 and at most 1.")
        if type(self.block_size) is not int or self.block_size < 1:
            raise ValueError(f"`block_size` is {self.block_size!r}; it must be a whole number >= 1.")
        check_max_samples(self.max_samples)
