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
"""The old name of `peft_elastic.common.writing` and `peft_elastic.common.progress`."""

from __future__ import annotations

import importlib
import warnings
from typing import Any


_HOMES = {
    name: f"peft_elastic.common.{module}"
    for module, names in {
        "writing": ("NotPermittedError", "WriteError", "atomic_path", "atomic_write_text", "write_error", "writing"),
        "progress": ("progress_bar",),
    }.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"`{__name__}.{name}` is now in `{_HOMES[name]}`.", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(_HOMES[name]), name)
