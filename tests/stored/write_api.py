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
"""What a user of the package can name: the public names of its public modules, and how each is called.

    PYTHONPATH=FOLDER python tests/stored/write_api.py > tests/stored/public_api.json

with FOLDER the checkout of a commit. `tests/test_public_api.py` compares the file with the package of today.

Of a signature it has the names, kinds and defaults of parameters. Annotations are left out: they are text in some modules and
objects in others, whose form depends on the version of Python. Of a class it has what this package defines: what it inherits from
torch, transformers or peft depends on their versions.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
from collections.abc import Mapping
from typing import Any


MODULES = (
    "",
    "deploy",
    "pruning",
    "pruning.structured",
    "quantization",
    "search",
    "structure",
    "supernet",
    "tuners",
)
# Beside the names without an underscore.
_SPECIAL = {"__call__", "__contains__", "__getitem__", "__iter__", "__len__", "__str__"}


def describe() -> dict[str, Any]:
    """The dotted name of each public object -> what is known of it: a text, or a dict of its members. What is public in a second
    module is described once, and there by its first name."""
    found: dict[str, Any] = {}
    names: dict[int, str] = {}
    for module_name in MODULES:
        path = f"peft_elastic.{module_name}".removesuffix(".")
        module = importlib.import_module(path)
        for name in sorted(module.__all__):
            value, dotted = getattr(module, name), f"{path}.{name}"
            first = names.setdefault(id(value), dotted)
            found[dotted] = _describe(value) if first == dotted else f"is {first}"
    return found


def _describe(value: Any) -> Any:
    if inspect.isclass(value):
        return _class(value)
    if inspect.isfunction(value):
        return _signature(value)
    if isinstance(value, Mapping):
        return f"mapping of {sorted(value)}"
    return "value"


def _class(cls: type) -> dict[str, str]:
    members: dict[str, str] = {}
    own = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "peft_elastic"]
    for base in reversed(own):
        for name, member in vars(base).items():
            if name.startswith("_") and name not in _SPECIAL:
                continue
            if isinstance(member, (staticmethod, classmethod)):
                members[name] = f"{type(member).__name__} {_signature(member.__func__)}"
            elif isinstance(member, property) or type(member).__name__ == "cached_property":
                members[name] = "property"
            elif inspect.isfunction(member):
                members[name] = _signature(member)
            elif not name.startswith("__"):
                members[name] = f"attribute {_default(member)}"
    if dataclasses.is_dataclass(cls):
        inherited = {
            field.name
            for base in cls.__mro__
            if base not in own and dataclasses.is_dataclass(base)
            for field in dataclasses.fields(base)
        }
        own_fields = [field for field in dataclasses.fields(cls) if field.name not in inherited]
        for field in own_fields:
            members[field.name] = f"field {_field(field)}{'' if field.init else ', not an argument'}"
        members["fields in order"] = ", ".join(field.name for field in own_fields)
        params = cls.__dataclass_params__  # type: ignore[attr-defined]
        members["frozen"] = str(params.frozen)
    else:
        init = next((vars(base)["__init__"] for base in own if "__init__" in vars(base)), None)
        members["__init__"] = "inherited" if init is None else _signature(init)
    return dict(sorted(members.items()))


def _field(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"= {_default(field.default)}"
    if field.default_factory is not dataclasses.MISSING:
        return f"= {_default(field.default_factory())}"
    return "without a default"


def _signature(function: Any) -> str:
    parameters = [
        parameter.replace(
            annotation=parameter.empty,
            default=parameter.empty if parameter.default is parameter.empty else _Default(parameter.default),
        )
        for parameter in inspect.signature(function).parameters.values()
    ]
    return str(inspect.Signature(parameters))


def _default(value: Any) -> str:
    """The same text in every process."""
    return value.__qualname__ if inspect.isroutine(value) or inspect.isclass(value) else repr(value)


class _Default:
    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return _default(self.value)


if __name__ == "__main__":
    print(json.dumps(describe(), indent=1))
