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

import re
from dataclasses import dataclass, field
from typing import ClassVar

from ..common.checks import is_finite, wrong
from ..structure.selection import check_patterns


@dataclass(frozen=True)
class PruningConfig:
    """
    What every pruning method shares: how many weights go, and in which layers. Use one of its subclasses.

    Give either `sparsity` or `pattern`.

    Args:
        sparsity (`float`, *optional*):
            Fraction of weights set to zero, in [0, 1). In each comparison group of `n` weights (a row, a layer, or what the method says) exactly
            `floor(sparsity * n)` are pruned. Zeros that are already there count as pruned first.
        pattern (`str`, *optional*):
            Semi-structured sparsity "n:m": of every m consecutive weights along the inputs, n stay and m - n are set to
            zero. This is NVIDIA's reading of 2:4; "1:4" is 75% sparse, and "4:8" is 50% sparse under either reading. The
            number of inputs of every pruned layer must be divisible by m. `sparsity` is then left unset or equals 1 - n/m.
        target_modules (`list[str]` or `str`, *optional*):
            Which linear layers (`nn.Linear`, or `Conv1D` of transformers) to prune: a list of names or name suffixes, or a
            regular expression that the full name must match, as in peft. By default every linear layer inside the
            transformer blocks, so neither the embeddings nor the output head, but for the routers of mixtures of experts.
        exclude_modules (`list[str]` or `str`, *optional*):
            Layers not to prune, in the same notation.

    Raises:
        ValueError: an argument is out of range, or `sparsity` contradicts `pattern`.
    """

    method: ClassVar[str] = "none"

    sparsity: float | None = field(default=None, metadata={"help": "Share of the weights to set to zero, in [0, 1)."})
    pattern: str | None = field(
        default=None,
        metadata={
            "help": "Instead: keep N of every M consecutive weights along the inputs, e.g. 2:4.",
            "metavar": "N:M",
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Name suffixes or a regular expression. Default: the linear layers of the transformer blocks."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Name suffixes or a regular expression of layers that are not pruned."}
    )

    def __post_init__(self) -> None:
        if self.sparsity is None and self.pattern is None:
            raise wrong("sparsity", "a number in [0, 1) where there is no `pattern`", None)
        if self.sparsity is not None:
            if not is_finite(self.sparsity) or not 0 <= self.sparsity < 1:
                raise wrong("sparsity", "a number in [0, 1)", self.sparsity)
        if self.pattern is not None:
            match = re.fullmatch(r"([0-9]+):([0-9]+)", self.pattern) if isinstance(self.pattern, str) else None
            if match is None or not 0 < int(match[1]) < int(match[2]):
                raise wrong("pattern", "'n:m' with whole numbers 0 < n < m, e.g. '2:4'", self.pattern)
            n, m = int(match[1]), int(match[2])
            if self.sparsity is not None and abs(self.sparsity - (1 - n / m)) > 1e-9:
                kept = f"which keeps {n} of every {m} weights"
                raise wrong("sparsity", f"unset or {1 - n / m} with pattern={self.pattern!r}, {kept}", self.sparsity)
        check_patterns(self)

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(n, m) of `pattern`, None for unstructured pruning."""
        if self.pattern is None:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)
