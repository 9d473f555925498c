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

from ..common.checks import check_choice
from ..structure.importance import IMPORTANCES
from ..structure.space import checked_depth, checked_width


@dataclass
class ElasticConfig:
    """
    What is elastic in a super-network of a model's own weights, see `get_elastic_model`.

    Args:
        elastic_width (`dict[str, list | dict[str, list]]`, *optional*):
            The widths that each transformer block may take: `{"heads": [1.0, 0.75, 0.5], "mlp": [1.0, 0.75, 0.5, 0.25]}`, one of
            the two or both. Fractions of the heads or MLP channels of the block, or whole numbers of them; the whole must be among
            them. Heads move in whole key-value groups: a fraction is rounded to the nearest one, and to the nearest multiple of 8
            channels. A dict of lists by the path of the block has options of their own for some blocks, as
            `bounds_by_importance` finds them; the others keep their width.
        elastic_depth (`"all"`, `int`, `str` or a list or `range` of them, *optional*):
            The transformer blocks that may be skipped: their numbers, `"4-8"`, paths inside the model, or `"all"` of them but the
            first. `".attention"` or `".mlp"` behind one of them, as in `"all.mlp"`, makes that part of it skippable alone.
        importance (`"activation"`, `"gradient"`, `"magnitude"`, `"movement"` or `"none"`):
            What heads and channels are sorted by before anything is narrowed, see `peft_elastic.sort_by_importance`. "magnitude"
            needs no data, and `get_elastic_model` sorts by it at once; for the others call `model.sort_by_importance(calibration)`
            before the training ("movement" takes the scores that a `MovementCallback` has left on the model). "none": the model is
            sorted already.

    Raises:
        ValueError: for malformed options, or if nothing is elastic.
    """

    elastic_width: Optional[dict[str, Union[list[Union[int, float]], dict[str, list[Union[int, float]]]]]] = None
    elastic_depth: Optional[Union[str, int, list[Union[int, str]]]] = None
    importance: str = "activation"

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise a ValueError if the fields are not right. Done when the object is made, and when a model is made elastic by it, as
        fields can be set in between."""
        self.elastic_width = checked_width(self.elastic_width)
        self.elastic_depth = checked_depth(self.elastic_depth)
        check_choice("importance", self.importance, IMPORTANCES)
        if not self.elastic_width and not self.elastic_depth:
            raise ValueError(
                "`elastic_width` and `elastic_depth` must not both be left out: nothing of the model would be elastic."
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
