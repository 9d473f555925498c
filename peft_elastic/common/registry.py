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
"""Methods by name. Each is registered where it is defined, together with the dataclass of its options; whoever offers the choice
(`prune`, the command line, an error) reads it from here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from .checks import wrong


_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Method:
    """A method and its options.

    Args:
        name: by which users ask for it.
        config: the dataclass of its options. Each field has its default there, and a sentence about it in its metadata, `help`.
        run: what carries it out.
        calibrated: whether it needs calibration data.
    """

    name: str
    config: type
    run: Callable[..., Any]
    calibrated: bool


class Registry(Mapping[str, Method]):
    """The methods of one kind by their names, in the order in which they were registered. `register` makes a decorator for
    one, which the registries of the package offer under a name of their own:

        @pruning_method("wanda", WandaConfig, calibrated=True)
        def prune_wanda(model, layers, config, calibration, progress): ...
    """

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}

    def register(self, name: str, config: type, *, calibrated: bool = False) -> Callable[[_F], _F]:
        """Make a decorator that registers a function under `name`, and gives the config its attribute `method`, which is that.

        Raises:
            ValueError: the name or the config is taken.
        """
        for other in self._methods.values():
            if name == other.name or config is other.config:
                raise ValueError(f"the method {other.name!r} is registered already, with {other.config.__name__}.")

        def add(run: _F) -> _F:
            config.method = name  # type: ignore[attr-defined]
            self._methods[name] = Method(name, config, run, calibrated)
            return run

        return add

    def of(self, config: Any) -> Method:
        """The method that a config is for.

        Raises:
            ValueError: it is for none; a subclass of a registered config is not that config.
        """
        for method in self._methods.values():
            if type(config) is method.config:
                return method
        known = ", ".join(sorted(method.config.__name__ for method in self._methods.values()))
        raise wrong("config", f"an instance of one of {known}", config)

    def __getitem__(self, name: str) -> Method:
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)
