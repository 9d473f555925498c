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
"""Old names of modules that have another home now: they still work, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def moved_modules(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package for modules that left it, so that `from package import name` goes on working.

    Args:
        package: `__name__` of the package.
        homes: name in that package -> where the module is now, in full.
    """

    def __getattr__(name: str) -> Any:
        return import_moved(package, homes, name)

    return __getattr__


def import_moved(package: str, homes: Mapping[str, str], name: str) -> Any:
    """Do what the `__getattr__` that calls this has to do for a name.

    Raises:
        AttributeError: for one that is not in `homes`.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    warnings.warn(f"`{package}.{name}` is now `{homes[name]}`.", DeprecationWarning, stacklevel=3)
    return importlib.import_module(homes[name])
