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
"""What the parsers of the commands share: types of options, and defaults that are those of the Python API. Imports nothing that is
slow."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

from peft_elastic.common.checks import wrong


def summary(docstring: str | None) -> str:
    """Find what a command's line in `peft-elastic --help` says: of the first paragraph of its module's docstring what follows
    "`peft-elastic NAME`: "."""
    return " ".join((docstring or "").partition("\n\n")[0].partition(": ")[2].rstrip(".").split())


def default_of(api: Callable[..., Any], name: str) -> Any:
    """Look up the default that a field of a dataclass, or an argument of a function or a class, has in the Python API."""
    if dataclasses.is_dataclass(api):
        field = next(field for field in dataclasses.fields(api) if field.name == name)
        made = field.default_factory
        return field.default if made is dataclasses.MISSING else made()
    return inspect.signature(api).parameters[name].default


class Noted(argparse.Action):
    """Stores the value of an option, and in the namespace's `given`, by its name there, what the option was called."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, self.const if self.nargs == 0 else values)
        namespace.given = {**getattr(namespace, "given", {}), self.dest: option_string}


def positive_int(text: str) -> int:
    """Parse, for argparse, a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """Parse, for argparse, what every random generator takes."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {2**32 - 1}")
    return int(text)


def parse_workload(text: str) -> tuple[int, int]:
    """Parse what `--latency-of` says: sequences and tokens."""
    numbers = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if numbers is None:
        raise wrong("--latency-of", "sequences x tokens such as '1x128'", text)
    return int(numbers[1]), int(numbers[2])
