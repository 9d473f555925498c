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
"""JSON that may be damaged or made up: the one place that reads it. Whatever is wrong with it is a ValueError that says where.

A reader declares what it reads as a `Kind`, and may then rely on it:

    ROW = Record(index=COUNT, subnet=MapOf(COUNT), held_out=Nullable(MapOf(NUMBER)))
    rows = ListOf(ROW).check(read_json(path), "rows")

`Document` adds the envelope that the files of this package have: `format` and `version`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any


_MAX_DEPTH = 64  # of what is nested; ours has 6. Others' code that walks through it goes by recursion
_MAX_COUNT = 2**63


# -- text ------------------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; NaN and Infinity are numbers, as Python writes them.

    Raises:
        ValueError: if it is none, is not UTF-8, gives a key twice, or is nested too deeply.
    """
    try:
        return _parse(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from None


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: naming the path, if it cannot be read.
    """
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise IsADirectoryError(0, "it is a folder")
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:  # nor is it there if what should be its folder is a file
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path)) from error
    except OSError as error:
        raise ValueError(f"{os.fspath(path)!r} cannot be read: {error.strerror or error}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of a JSON file.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: naming the path, if it cannot be read or is not what `parse_json` takes.
    """
    raw = read_bytes(path)
    try:
        return _parse(raw)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is not JSON ({error})") from None


def _parse(text: str | bytes) -> Any:
    try:
        data = json.loads(text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    _check_depth(data)
    return data


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.80} is there twice")
    return found


def _check_depth(data: Any) -> None:
    level = [data]
    for _ in range(_MAX_DEPTH):
        level = [v for x in level if isinstance(x, (dict, list)) for v in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return
    raise ValueError("nested too deeply")


# -- kinds of values -------------------------------------------------------------------------------------------------


class Kind:
    """What a value has to be.

    Args:
        what (`str`): in words, for messages: "a whole number".
        allows: whether a value is of this kind.
    """

    def __init__(self, what: str, allows: Any) -> None:
        self.what = what
        self._allows = allows

    def check(self, value: Any, where: str) -> Any:
        """`value` as it is.

        Raises:
            ValueError: naming `where` and the part of it that is of another kind.
        """
        if not self._allows(value):
            raise ValueError(f"{where} must be {self.what}, got {value!r:.80}")
        return value


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_COUNT


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < _MAX_COUNT)


ANYTHING = Kind("anything", lambda value: True)
TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
INTEGER = Kind("a whole number", lambda value: type(value) is int and abs(value) < _MAX_COUNT)
COUNT = Kind("a whole number from 0 up", _is_count)
POSITIVE = Kind("a whole number from 1 up", lambda value: _is_count(value) and value > 0)
NUMBER = Kind("a number", _is_number)
MEASURED = Kind(  # what JSON has no number for is written by name
    "a number, NaN, Infinity or -Infinity",
    lambda value: _is_number(value) or (isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity")),
)
FINITE = Kind("a finite number", lambda value: _is_number(value) and math.isfinite(value))


class OneOf(Kind):
    """One of these values."""

    def __init__(self, *values: Any) -> None:
        super().__init__(f"one of {list(values)}", lambda value: isinstance(value, str) and value in values)


class Nullable(Kind):
    """Null, or a value of `kind`."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(f"null or {kind.what}", None)
        self._kind = kind

    def check(self, value: Any, where: str) -> Any:
        return value if value is None else self._kind.check(value, where)


class ListOf(Kind):
    """A list of values of `kind`."""

    def __init__(self, kind: Kind) -> None:
        super().__init__("a list", lambda value: isinstance(value, list))
        self._kind = kind

    def check(self, value: Any, where: str) -> Any:
        for number, item in enumerate(super().check(value, where)):
            self._kind.check(item, f"{where}[{number}]")
        return value


class MapOf(Kind):
    """An object whose values, whatever their names, are of `kind`."""

    def __init__(self, kind: Kind) -> None:
        super().__init__("an object", lambda value: isinstance(value, dict))
        self._kind = kind

    def check(self, value: Any, where: str) -> Any:
        for name, item in super().check(value, where).items():
            self._kind.check(item, f"{where}[{name!r:.80}]")
        return value


class Record(MapOf):
    """An object with these fields: all of `needed`, and none but those of `optional` besides.

    Args:
        optional (`Mapping[str, Kind]`): fields that may be missing.
        others (`Kind`, *optional*): of fields of any other name; without it there must be none.
        needed (`Kind`): by name of the field.
    """

    def __init__(
        self, optional: Mapping[str, Kind] | None = None, others: Kind | None = None, /, **needed: Kind
    ) -> None:
        super().__init__(ANYTHING)
        self.needed, self.optional, self._others = needed, dict(optional or {}), others

    def check(self, value: Any, where: str) -> Any:
        Kind.check(self, value, where)
        missing = [name for name in self.needed if name not in value]
        if missing:
            raise ValueError(f"{where or 'it'} lacks the field {missing[0]!r}")
        kinds = self.optional | self.needed
        for name, item in value.items():
            kind = kinds.get(name, self._others)
            if kind is None:
                raise ValueError(f"{where or 'it'} has the unknown field {name!r:.80}")
            kind.check(item, f"{where}.{name:.80}" if where else f"{name!r:.80}")
        return value


# -- the envelope ----------------------------------------------------------------------------------------------------


class Document:
    """A JSON object of this package, which says what it is.

    Args:
        what (`str`): "search result".
        name (`str`): its `format`, "peft-elastic/search-result".
        version (`int`): of its fields; another one is refused.
        fields (`Record`): what it has besides.
    """

    def __init__(self, what: str, name: str, version: int, fields: Record) -> None:
        self.what, self.name, self.version, self._fields = what, name, version, fields

    def wrap(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The object with these fields, to be written."""
        return {"format": self.name, "version": self.version, **fields}

    def unwrap(self, data: Any) -> dict[str, Any]:
        """The fields of such an object.

        Raises:
            ValueError: if it is another one, of another version, or damaged; the message names the field.
        """
        if not isinstance(data, dict) or data.get("format") != self.name:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"not a {self.what}: expected the field 'format' to be {self.name!r}, found {found!r:.80}"
            )
        if type(data.get("version")) is not int or data["version"] != self.version:
            raise ValueError(
                f"a {self.what} of version {data.get('version')!r:.80}; this release reads version {self.version}"
            )
        fields = {key: value for key, value in data.items() if key not in ("format", "version")}
        try:
            return self._fields.check(fields, "")
        except ValueError as error:
            raise ValueError(f"not a {self.what}: {error}") from None

    def parse(self, text: str | bytes) -> dict[str, Any]:
        """`unwrap` of a JSON text."""
        return self.unwrap(parse_json(text))

    def read(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """`unwrap` of a JSON file.

        Raises:
            FileNotFoundError: if it is not there.
            ValueError: naming the path.
        """
        raw = read_bytes(path)
        try:
            return self.parse(raw)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)!r} is not a {self.what} file: {error}") from None


__all__ = [
    "ANYTHING",
    "COUNT",
    "FINITE",
    "FLAG",
    "INTEGER",
    "MEASURED",
    "NUMBER",
    "POSITIVE",
    "TEXT",
    "Document",
    "Kind",
    "ListOf",
    "MapOf",
    "Nullable",
    "OneOf",
    "Record",
    "parse_json",
    "read_bytes",
    "read_json",
]
