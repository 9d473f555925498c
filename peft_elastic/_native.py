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
"""The C++ extension `peft_elastic._C`, which is absent where the package was installed without a compiler."""

from __future__ import annotations

from types import ModuleType
from typing import Any


_C: ModuleType | None
IMPORT_ERROR: ImportError | None  # why `_C` is None
try:
    import peft_elastic._C as _C  # type: ignore[import-not-found, no-redef]

    IMPORT_ERROR = None
except ImportError as error:
    _C = None
    IMPORT_ERROR = error


def is_built() -> bool:
    """Whether the extension is there and loads."""
    return _C is not None


def cpu_report() -> dict[str, Any] | None:
    """What this processor can do and the operating system allows; None without the extension.

    Keys: `architecture`, `vendor`, `brand`, `compiler` (str, empty where unknown); `features` (dict of bool, named as in
    Linux' /proc/cpuinfo, True only if the system also saves the registers that the instructions use); `amx_permitted`
    (bool, whether this process may use AMX tiles: Linux grants them on request, and asking is part of this call);
    `cache_bytes` (dict of int for `l1d`, `l2`, `l3`, one cache of each level, 0 where unknown).
    """
    return None if _C is None else _C.cpu_report()
