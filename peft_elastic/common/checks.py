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
"""Checks of arguments, and the one form of their errors: "`name` must be what is allowed, got the value."."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any


def wrong(name: str, allowed: str, value: Any) -> ValueError:
    """Make the error for a value that is not allowed.

    Args:
        name: of the argument or the field, as the user wrote it.
        allowed: what may stand there: "a whole number >= 1".
        value: what was given. Long ones are cut.
    """
    shown = repr(value)
    return ValueError(f"`{name}` must be {allowed}, got {shown if len(shown) <= 200 else shown[:197] + '...'}.")


def is_whole(value: Any) -> bool:
    """Whether a value is an int; a bool is none."""
    return type(value) is int


def is_finite(value: Any) -> bool:
    """Whether a value is a real number other than NaN and infinity; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def check_whole(
    name: str, value: Any, least: int | None = None, most: int | None = None, optional: bool = False
) -> None:
    """ValueError unless `value` is an int from `least` to `most`, or None if it is `optional`."""
    if optional and value is None:
        return
    if not is_whole(value) or (least is not None and value < least) or (most is not None and value > most):
        raise wrong(name, _whole(least, most) + (", or None" if optional else ""), value)


def check_choice(name: str, value: Any, allowed: Iterable[Any], optional: bool = False) -> None:
    """ValueError unless `value` is one of `allowed` (and of its type: True is not 1), or None if it is `optional`."""
    options = list(allowed)
    if optional and value is None:
        return
    if not any(type(value) is type(option) and value == option for option in options):
        listed = " or ".join(
            [", ".join(map(repr, options[:-1])), repr(options[-1])] if options[1:] else map(repr, options)
        )
        raise wrong(name, listed + (", or None" if optional else ""), value)


def check_bool(name: str, value: Any) -> None:
    """ValueError unless `value` is True or False."""
    if type(value) is not bool:
        raise wrong(name, "True or False", value)


def check_max_samples(max_samples: Any) -> None:
    """ValueError unless this is a number of calibration sequences, or None for all."""
    check_whole("max_samples", max_samples, least=1, optional=True)


def _whole(least: int | None, most: int | None) -> str:
    if least is not None and most is not None:
        return f"a whole number from {least} to {most}"
    if least is not None:
        return f"a whole number >= {least}"
    return "a whole number" if most is None else f"a whole number <= {most}"
