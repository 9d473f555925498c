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
"""The one place that reaches into peft's closed list of tuner types."""

from __future__ import annotations

import enum
from typing import Any

import peft
from peft.utils import PeftType, register_peft_method


def add_enum_member(enum_cls: type[enum.Enum], name: str) -> None:
    """Add the member `name`, with the value `name`, to a finished string enum; does nothing if it is there already.

    Raises:
        ImportError: if the enum is not built as expected, so that a change inside peft or Python shows as such.
    """
    if name in enum_cls.__members__:
        return
    try:
        member = str.__new__(enum_cls, name)  # type: ignore[type-var]
        member._name_ = name
        member._value_ = name
        member.__objclass__ = enum_cls  # type: ignore[attr-defined]
        member._sort_order_ = len(enum_cls._member_names_)  # type: ignore[attr-defined]
        # the class attribute comes first: once the name is a member, EnumMeta refuses to set it
        setattr(enum_cls, name, member)
        enum_cls._member_names_.append(name)
        enum_cls._member_map_[name] = member
        enum_cls._value2member_map_[name] = member
        took_it = enum_cls(name) is member and getattr(enum_cls, name) is member and member in list(enum_cls)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ImportError(_moved(f"{enum_cls.__name__} cannot take the member {name}")) from error
    if not took_it:
        raise ImportError(_moved(f"{enum_cls.__name__} did not take the member {name}"))


def register_tuner(name: str, config_cls: type, model_cls: type) -> None:
    """Make `name` a tuner type of the installed peft, sharing LoRA's parameter prefix `lora_` as AdaLoRA does.

    Importing the package a second time, for instance after `importlib.reload`, replaces the classes.

    Raises:
        ImportError: if peft's internals do not allow it.
    """
    add_enum_member(PeftType, name.upper())
    mappings = _mappings()
    for mapping in mappings:
        mapping.pop(PeftType(name.upper()), None)
    try:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix="lora_")
    except (KeyError, TypeError, ValueError) as error:
        raise ImportError(_moved(f"registering the tuner type {name!r} failed: {error}")) from error


def _mappings() -> list[dict[Any, Any]]:
    try:
        from peft.mapping import (
            PEFT_TYPE_TO_CONFIG_MAPPING,
            PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
            PEFT_TYPE_TO_PREFIX_MAPPING,
            PEFT_TYPE_TO_TUNER_MAPPING,
        )
    except ImportError as error:
        raise ImportError(_moved("peft.mapping has other tables")) from error
    return [
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    ]


def _moved(what: str) -> str:
    return (
        f"peft-elastic cannot register its tuner types with peft {peft.__version__}: {what}. This release of "
        "peft-elastic does not know that version of peft; upgrade peft-elastic or install peft 0.21.2."
    )
