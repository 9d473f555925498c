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
"""Options that are the fields of the methods' configs: names, types, choices, help texts and defaults are read from these, so that a
method that registers itself has its options here."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any


def add_options(
    group: Any, configs: Mapping[str, type], without: Collection[str] = (), names: Mapping[str, str] | None = None
) -> None:
    """Add an option for every field of the configs. It is None, or an empty choice, unless it is given.

    Args:
        group: of a parser.
        configs: the config dataclasses, by the name of their method; that of the default method first.
        without: fields that are no option.
        names: of options that are not called as their field, by field; with underscores.
    """
    for name, methods in fields_of(configs, without).items():
        config = configs[methods[0]]
        field = _field(config, name)
        option = option_of((names or {}).get(name, name))
        said = [f"{' and '.join(methods)} only"] if len(methods) < len(configs) else []
        said += _defaults({method: _field(configs[method], name) for method in methods})
        text = help_of(config, name) + (f" ({'; '.join(said)})" if said else "")
        group.add_argument(option, help=text, default=None, **_reading(typing.get_type_hints(config)[name], field))


def given(
    args: argparse.Namespace,
    configs: Mapping[str, type],
    method: str,
    without: Collection[str] = (),
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The fields of the config of a method that were given as options.

    Raises:
        ValueError: an option was given that is of other methods.
    """
    found = {}
    for name, methods in fields_of(configs, without).items():
        attribute = (names or {}).get(name, name)
        value = getattr(args, attribute)
        if value is None:
            continue
        if method not in methods:
            raise ValueError(
                f"`{option_of(attribute)}` is of no use with `--method {method}`; it goes with {' and '.join(methods)}."
            )
        found[name] = value
    return found


def option_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def help_of(config: type, name: str) -> str:
    """What the config says of a field, as the beginning of a line of help."""
    text: str = _field(config, name).metadata["help"].removesuffix(".")
    return (text if text[1:2].isupper() else text[:1].lower() + text[1:]).replace("%", "%%")


def default_of(config: type, name: str) -> Any:
    """The default of a field, None if it has none."""
    field = _field(config, name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def whole_or_share(text: str) -> int | float:
    """For argparse: a whole number, or a share."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def fields_of(configs: Mapping[str, type], without: Collection[str]) -> dict[str, list[str]]:
    """The fields of some of the configs, with the names of the methods that have them."""
    fields: dict[str, list[str]] = {}
    for method, config in configs.items():
        for field in dataclasses.fields(config):
            if field.name not in without:
                fields.setdefault(field.name, []).append(method)
    return fields


def _field(config: type, name: str) -> dataclasses.Field[Any]:
    return next(field for field in dataclasses.fields(config) if field.name == name)


def _defaults(fields: Mapping[str, dataclasses.Field[Any]]) -> list[str]:
    """The default of the first method, and those of the others that differ from it."""
    texts = {method: _as_words(field.default) for method, field in fields.items()}
    first = next(iter(texts.values()))
    if not first:
        return []
    return [f"default: {first}", *(f"of {method}: {text}" for method, text in texts.items() if text != first)]


def _as_words(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return ""
    if isinstance(value, tuple):
        return " ".join(map(_as_words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _reading(hint: Any, field: dataclasses.Field[Any]) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [kind for kind in (typing.get_args(hint) if union else (hint,)) if kind is not type(None)]
    if bool in kinds:
        return {"action": "store_true"}
    reading: dict[str, Any] = {}
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        reading["nargs"] = "+"
    elif int in kinds and float in kinds:
        reading |= {"type": whole_or_share, "metavar": "N"}
    elif int in kinds or float in kinds:
        reading |= {"type": int, "metavar": "N"} if int in kinds else {"type": float, "metavar": "X"}
    choices = field.metadata.get("choices") or next(
        (typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is typing.Literal), None
    )
    if choices:
        reading["choices"] = tuple(choices)
        reading.pop("metavar", None)
    if "metavar" in field.metadata:
        reading["metavar"] = field.metadata["metavar"]
    return reading
