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
"""The checks of arguments, text tables and suffixes of names, which every folder relies on."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_elastic.common.checks import (
    check_bool,
    check_choice,
    check_max_samples,
    check_whole,
    is_finite,
    is_whole,
    wrong,
)
from peft_elastic.common.names import has_suffix
from peft_elastic.common.tables import text_table


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers()), st.complex_numbers()
)
names = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
dotted = st.lists(names, min_size=1, max_size=5).map(".".join)
cells = st.text(alphabet="ab .-", max_size=6)


def refuses(check, *args, **kwargs):
    """The message, None if the value is taken."""
    try:
        check(*args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


# -- one voice ---------------------------------------------------------------------------------------------------------


@given(names, st.text(max_size=30), anything)
def test_every_refusal_names_what_may_stand_there_and_what_stood_there(name, allowed, value):
    message = str(wrong(name, allowed, value))
    assert message.startswith(f"`{name}` must be {allowed}, got ") and message.endswith(".")
    assert repr(value) in message or len(repr(value)) > 200
    assert len(message) <= len(name) + len(allowed) + 200 + 30


def test_long_values_are_cut():
    message = str(wrong("x", "short", "a" * 1000))
    assert message == f"`x` must be short, got '{'a' * 196}...."


@given(anything)
def test_a_bool_is_no_number(value):
    assert is_whole(value) == (isinstance(value, int) and not isinstance(value, bool))
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    assert is_finite(value) == (real and math.isfinite(value))


@pytest.mark.parametrize("value", [np.float32(1.5), np.int64(3), Fraction(1, 3), 0, -2.5])
def test_real_numbers_of_other_libraries_are_finite(value):
    assert is_finite(value)


@pytest.mark.parametrize("value", [np.float32("nan"), math.inf, True, np.bool_(True), 1j, "1", None])
def test_what_is_no_finite_number(value):
    assert not is_finite(value)


@given(anything, st.none() | st.integers(-9, 9), st.none() | st.integers(-9, 9), st.booleans())
def test_whole_numbers_within_bounds(value, least, most, optional):
    taken = (optional and value is None) or (
        is_whole(value) and (least is None or value >= least) and (most is None or value <= most)
    )
    message = refuses(check_whole, "n", value, least=least, most=most, optional=optional)
    assert (message is None) == taken
    if message is not None:
        assert message.startswith("`n` must be a whole number") and ("or None" in message) == optional
        assert all(str(bound) in message for bound in (least, most) if bound is not None)


@given(anything, st.lists(st.one_of(st.integers(0, 2), st.booleans(), st.none(), names), min_size=1, max_size=4))
def test_choices_are_of_their_own_type(value, options):
    taken = any(type(value) is type(option) and value == option for option in options)
    message = refuses(check_choice, "c", value, options)
    assert (message is None) == taken
    if message is not None:
        assert all(repr(option) in message for option in options)
    assert all(refuses(check_choice, "c", option, options) is None for option in options)
    assert refuses(check_choice, "c", None, options, optional=True) is None


@pytest.mark.parametrize(
    ("options", "listed"), [(["a"], "'a'"), (["a", "b"], "'a' or 'b'"), (["a", "b", 3], "'a', 'b' or 3")]
)
def test_choices_are_listed_as_in_a_sentence(options, listed):
    assert refuses(check_choice, "c", 1.5, options) == f"`c` must be {listed}, got 1.5."
    assert refuses(check_choice, "c", 1.5, iter(options), optional=True) == f"`c` must be {listed}, or None, got 1.5."


@given(anything)
def test_bools_are_bools(value):
    assert (refuses(check_bool, "b", value) is None) == (type(value) is bool)


@given(anything)
def test_numbers_of_samples(value):
    assert (refuses(check_max_samples, value) is None) == (value is None or (is_whole(value) and value >= 1))


# -- tables ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1, max_size=5)))
def test_columns_of_a_table_are_as_wide_as_their_widest_cell(rows):
    lines, columns = text_table(rows, left=1, gap="|"), range(len(rows[0]))
    widths = [max(len(row[i]) for row in rows) for i in columns]
    assert len(lines) == len(rows)
    for row, line in zip(rows, lines):
        padded = line.ljust(sum(widths) + len(widths) - 1)
        for i in columns:
            begin = sum(widths[:i]) + i
            cell = padded[begin : begin + widths[i]]
            wanted = row[i].ljust(widths[i]) if i == 0 else row[i].rjust(widths[i])
            assert cell.rstrip() == wanted.rstrip()
        assert line == line.rstrip()


def test_columns_can_be_named():
    assert text_table([("a", "b", "c"), ("xx", "yy", "zz")], left=(0, 2)) == ["a    b  c", "xx  yy  zz"]
    assert text_table([("a", "b"), ("xx", "yy")], left=0) == [" a   b", "xx  yy"]


# -- names -------------------------------------------------------------------------------------------------------------


@given(dotted, dotted)
def test_a_suffix_ends_a_name_at_a_dot(name, suffix):
    parts, ending = name.split("."), suffix.split(".")
    assert has_suffix(name, suffix) == (parts[-len(ending) :] == ending)
    assert has_suffix(f"{name}.{suffix}", suffix) and has_suffix(name, name)
    assert not has_suffix(f"{name}.a{suffix}", suffix)
