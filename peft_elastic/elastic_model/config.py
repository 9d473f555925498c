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

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Optional, Union

from ..common.checks import check_choice, is_whole, wrong
from ..structure import importance as blocks
from ..structure.parts import KINDS
from ..structure.space import checked_depth, checked_width
from ..structure.tracing import order as channels


# Importances by which `get_elastic_model` sorts at once.
WITHOUT_DATA = ("magnitude", "gamma")


@dataclass
class ElasticConfig:
    """
    What is elastic in a super-network of a model's own weights, see `get_elastic_model`.

    Heads, MLP channels and blocks of transformers are found by their names; "channels", kernels and residual blocks of convolutional
    models by tracing (BootstrapNAS, AutoML-Conf 2022).

    Args:
        elastic_width (`dict[str, list | dict[str, list]]`, *optional*):
            The widths that each transformer block may take: `{"heads": [1.0, 0.75, 0.5], "mlp": [1.0, 0.75, 0.5, 0.25]}`, one of
            the two or both. Fractions of the heads or MLP channels of the block, or whole numbers of them; the whole must be among
            them. Heads move in whole key-value groups: a fraction is rounded to the nearest one, and to the nearest multiple of 8
            channels. A dict of lists by the path of the block has options of their own for some blocks, as
            `bounds_by_importance` finds them; the others keep their width.
            Or `{"channels": [1.0, 0.75, 0.5]}`, alone: of the channels of every convolution and linear layer of a traced model that are
            narrowed together, or by the name of the layer that makes them first (`TracedStructure.report` has a table). The whole
            width is always among them; fractions are rounded to multiples of 8 and of whole groups.
        elastic_kernel (`list[int] | dict[str, list[int]]`, *optional*):
            Kernel sizes of the convolutions of a traced model, `[7, 5, 3]`: each takes those below its own that leave its outputs where they are.
            The middle of the kernel is multiplied with a matrix that is learned (Once-for-All). Or by the path of the convolution.
        elastic_depth (`"all"`, `int`, `str` or a list or `range` of them, *optional*):
            The transformer blocks that may be skipped: their numbers, `"4-8"`, paths inside the model, or `"all"` of them but the
            first. `".attention"` or `".mlp"` behind one of them, as in `"all.mlp"`, makes that part of it skippable alone.
        importance (`"activation"`, `"gamma"`, `"gradient"`, `"magnitude"`, `"movement"` or `"none"`, *optional*):
            What heads and channels are sorted by before anything is narrowed, see `peft_elastic.sort_by_importance`. "magnitude"
            needs no data, and `get_elastic_model` sorts by it at once; for the others call `model.sort_by_importance(calibration)`
            before the training ("movement" takes the scores that a `MovementCallback` has left on the model). "none": the model is
            sorted already. "gamma", for channels alone: the scales of BatchNorm times the norms of the columns that read a channel,
            without data. Default: "gamma" for channels, "activation" for heads and MLP channels.

    Raises:
        ValueError: for malformed options, or if nothing is elastic.
    """

    elastic_width: Optional[dict[str, Union[list[Union[int, float]], dict[str, list[Union[int, float]]]]]] = None
    elastic_depth: Optional[Union[str, int, list[Union[int, str]]]] = None
    importance: Optional[str] = None
    elastic_kernel: Optional[Union[list[int], dict[str, list[int]]]] = None

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise a ValueError if the fields are not right. Done when the object is made, and when a model is made elastic by it, as
        fields can be set in between."""
        self.elastic_width = checked_width(self.elastic_width, (*KINDS, "channels"))
        self.elastic_depth = checked_depth(self.elastic_depth)
        self.elastic_kernel = _checked_kernel(self.elastic_kernel)
        traced = "channels" in (self.elastic_width or {}) or self.elastic_kernel is not None
        if traced and set(self.elastic_width or {}) - {"channels"}:
            raise ValueError(
                "`elastic_width` has 'channels' or `elastic_kernel` is set, which are for convolutional models, beside 'heads' or 'mlp', which are "
                "for transformers: make one of the two elastic."
            )
        if self.importance is None:
            self.importance = "gamma" if traced else "activation"
        check_choice("importance", self.importance, channels.IMPORTANCES if traced else blocks.IMPORTANCES)
        if not self.elastic_width and not self.elastic_depth and not self.elastic_kernel:
            raise ValueError(
                "`elastic_width`, `elastic_kernel` and `elastic_depth` must not all be left out: nothing of the model would be elastic."
            )

    @property
    def depth_entries(self) -> list[Union[int, str]]:
        """`elastic_depth` as a list."""
        return self.elastic_depth if isinstance(self.elastic_depth, list) else []

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ElasticConfig:
        """The inverse of `to_dict`.

        Raises:
            ValueError: naming it, for a field that there is not; and as the class.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(data) - set(known)):
            raise ValueError(f"`{unknown[0]}` is no field of {cls.__name__}, which has {known}.")
        return cls(**data)


def _checked_kernel(elastic_kernel: Any) -> Any:
    """`elastic_kernel` as it is kept: sizes from large to small, each once.

    Raises:
        ValueError: unless it is None, a list of kernel sizes, or a dict of such lists by the path of a convolution.
    """
    if elastic_kernel is None:
        return None
    if isinstance(elastic_kernel, Mapping):
        if not elastic_kernel or not all(isinstance(path, str) and path for path in elastic_kernel):
            raise wrong(
                "elastic_kernel",
                "a list of kernel sizes, or a dict from the path of a convolution to one",
                elastic_kernel,
            )
        return {path: _checked_sizes(f"elastic_kernel[{path!r}]", sizes) for path, sizes in elastic_kernel.items()}
    return _checked_sizes("elastic_kernel", elastic_kernel)


def _checked_sizes(name: str, sizes: Any) -> list[int]:
    if not isinstance(sizes, (list, tuple)) or not sizes or not all(is_whole(size) and size > 0 for size in sizes):
        raise wrong(name, "a list of kernel sizes, whole numbers from 1", sizes)
    return sorted(set(sizes), reverse=True)
