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
"""Packages that import a module when one of its names is asked for, and not before."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def lazy_package(
    package: str,
    names: Mapping[str, Iterable[str]] | None = None,
    modules: Iterable[str] = (),
    moved: Mapping[str, str] | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make the `__getattr__` and the `__dir__` of a package whose names come from modules that are imported late.

    For type checkers and editors the package imports the same names under `if TYPE_CHECKING`. A name must not be that of the module
    of the package which it comes from: importing that would put the module in its place.

    Args:
        package: `__name__` of the package.
        names: module, relative to the package (".trainer") -> the names that come from it.
        modules: modules of the package that are attributes of it as well.
        moved: modules that left the package -> where they are now, in full. Their old names work, with a DeprecationWarning.
    """
    homes = {name: module for module, of_module in (names or {}).items() for name in of_module}
    known = {*homes, *modules}

    def __getattr__(name: str) -> Any:
        if name in homes:
            value = getattr(importlib.import_module(homes[name], package), name)
        elif name in known:
            value = importlib.import_module(f".{name}", package)
        else:
            if not moved or name not in moved:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            warnings.warn(f"`{package}.{name}` is now `{moved[name]}`.", DeprecationWarning, stacklevel=2)
            return importlib.import_module(moved[name])
        setattr(sys.modules[package], name, value)  # next time without this function
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *known})

    return __getattr__, __dir__
