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
"""Counting the operators that a computation launches."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


# No alias of their argument for the schema, and no work either.
_UNMARKED_VIEWS = ("aten._unsafe_view", "aten.lift_fresh")


def is_view(function: Any) -> bool:
    """Whether an operator only looks at its argument in another way, and so launches nothing."""
    returns = function._schema.returns
    aliases = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return bool(aliases) or str(function).startswith(_UNMARKED_VIEWS)


class Operators(TorchDispatchMode):
    """Counts, while it is active, the operators that are not views, by name; what allocates without filling is among them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_view(function):
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counts.total()
