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

import os
from pathlib import Path
from types import ModuleType
from typing import Any

from ..version import __version__
from .fingerprint import fingerprint


def _check(extension: ModuleType, package: Path) -> None:
    """Refuse an extension of another version, and, in a checkout, one of other sources. It gets memory as addresses, so
    that a changed argument would not be an error but anything at all.

    Raises:
        ImportError: that says how to build it again. That is not `IMPORT_ERROR`: whoever built an extension wants to use it.
    """
    sources = package.parent / "csrc"
    is_checkout = (sources / "module.cpp").is_file()
    found = [getattr(extension, name, "unknown") for name in ("__version__", "fingerprint")]
    expected = [__version__, fingerprint(sources) if is_checkout else found[1]]
    if found != expected:
        raise ImportError(
            f"The C++ extension {extension.__file__} is of peft-elastic {found[0]}, sources {found[1]}, and the Python code "
            f"beside it of {expected[0]}, sources {expected[1]}. Build it again: "
            + (
                f"`pip install --no-deps -e .` in {package.parent}"
                if is_checkout
                else "`pip install --force-reinstall --no-deps --no-cache-dir --no-binary peft-elastic peft-elastic`"
            )
            + ", or delete that file to do without it."
        )


_C: ModuleType | None
IMPORT_ERROR: ImportError | None  # why `_C` is None
try:
    import peft_elastic._C as _C  # type: ignore[import-not-found, no-redef]

    IMPORT_ERROR = None
except ImportError as error:
    _C = None
    IMPORT_ERROR = error
if _C is not None:
    _check(_C, Path(__file__).parents[1])


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


def levels() -> list[dict[str, Any]]:
    """The levels (instruction sets) of the sparse kernels, best first; empty without the extension.

    Keys: `name`; `built` (bool, this build has it); `usable` (bool, built, and this processor and system can run it);
    `missing` (list of str, features that the processor lacks).
    """
    return [] if _C is None else _C.levels()


def selected_level() -> str | None:
    """The level that the kernels run on; None without the extension."""
    return None if _C is None else _C.selected_level()


def select_level(name: str) -> None:
    """Runs the kernels on the level of this name from now on; "" is the best usable one. ValueError if it is not usable."""
    if _C is None:
        raise ValueError(
            "There are no kernel levels without the C++ extension; `peft-elastic info` says how to get it."
        )
    _C.select_level(name)


if _C is not None and os.environ.get("PEFT_ELASTIC_ISA"):
    try:
        select_level(os.environ["PEFT_ELASTIC_ISA"])
    except ValueError as error:
        raise ValueError(f"Environment variable PEFT_ELASTIC_ISA: {error}.") from None
