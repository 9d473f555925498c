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
import copy
import json
import os
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_elastic.supernet import Choice, SearchSpace, Subnet


# No deadline: how long an example takes depends on what else the machine does.
quick = settings(max_examples=60, deadline=None)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
options = st.sets(st.integers(0, 4096), min_size=1, max_size=6).map(lambda s: tuple(sorted(s, reverse=True)))


@st.composite
def spaces(draw):
    return SearchSpace(
        Choice(
            kind=draw(st.sampled_from(["rank", "heads", "depth"])),
            name=name,
            options=draw(options),
            modules=tuple(draw(st.lists(names, max_size=3))),
            unit_parameters=draw(st.integers(0, 10**12)),
        )
        for name in draw(st.lists(names, min_size=1, max_size=8, unique=True))
    )


@st.composite
def spaces_with_subnet(draw):
    space = draw(spaces())
    return space, space.decode([draw(st.integers(0, len(choice.options) - 1)) for choice in space])


def small_space():
    return SearchSpace(
        [
            Choice("rank", "a", (8, 4, 2), modules=("x", "y"), unit_parameters=10),
            Choice("rank", "b", (32, 24, 20, 16), modules=("z",), unit_parameters=3),
            Choice("heads", "a", (6,)),
        ]
    )


# -- properties that hold for every space --------------------------------------------------------------------------


@quick
@given(spaces_with_subnet())
def test_encode_and_decode_are_inverse(case):
    space, subnet = case
    indices = space.encode(subnet)
    assert len(indices) == len(space)
    assert space.decode(indices) == subnet
    assert space.decode(np.array(indices)) == subnet
    assert space.encode(space.decode(indices)) == indices
    assert subnet in space


@quick
@given(spaces_with_subnet())
def test_json_round_trips(case):
    space, subnet = case
    same_space, same_subnet = SearchSpace.from_json(space.to_json()), Subnet.from_json(subnet.to_json())
    assert same_space == space and hash(same_space) == hash(space)
    assert same_space.fingerprint == space.fingerprint
    assert same_subnet == subnet and hash(same_subnet) == hash(subnet)
    assert same_space.encode(same_subnet) == space.encode(subnet)
    json.loads(space.to_json()), json.loads(subnet.to_json())


@quick
@given(spaces_with_subnet())
def test_equal_subnets_hash_alike_whatever_the_order_of_their_keys(case):
    _, subnet = case
    turned = Subnet(dict(reversed(list(subnet.items()))))
    assert turned == subnet and hash(turned) == hash(subnet)
    assert list(turned) == list(subnet)
    assert {turned, subnet} == {subnet}
    for copied in (copy.copy(subnet), copy.deepcopy(subnet), pickle.loads(pickle.dumps(subnet))):
        assert copied == subnet and hash(copied) == hash(subnet)


@quick
@given(spaces())
def test_size_and_enumeration_agree(space):
    if space.size > 2000:
        return
    subnets = list(space.subnets())
    assert len(subnets) == len(set(subnets)) == space.size
    assert subnets[0] == space.max and subnets[-1] == space.min
    assert space.heuristic in subnets
    assert all(subnet in space for subnet in subnets)


@quick
@given(spaces(), st.integers(0, 2**64))
def test_samples_belong_to_the_space_and_depend_on_the_seed_alone(space, seed):
    np.random.seed(0)
    sample = space.sample(seed)
    np.random.seed(1)
    assert sample in space
    assert space.sample(seed) == sample
    assert SearchSpace.from_json(space.to_json()).sample(seed) == sample
    assert space.sample([seed, 1]) == space.sample([seed, 1])


@quick
@given(spaces_with_subnet())
def test_min_and_max_bound_the_parameters(case):
    space, subnet = case
    assert space.count_parameters(space.min) <= space.count_parameters(subnet) <= space.count_parameters(space.max)


@quick
@given(spaces_with_subnet(), st.text(max_size=5), st.integers(-5, 5000))
def test_membership_is_exact(case, key, value):
    space, subnet = case
    changed = subnet.to_dict() | {key: value}
    allowed = key in {choice.key for choice in space} and value in space[key].options
    assert (changed in space) == allowed


@quick
@given(st.text())
def test_foreign_text_is_a_value_error(text):
    for parse in (Subnet.from_json, SearchSpace.from_json):
        with pytest.raises(ValueError):
            parse(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@quick
@given(json_values)
def test_foreign_json_is_a_value_error(data):
    for parse in (Subnet.from_json, SearchSpace.from_json):
        with pytest.raises(ValueError):
            parse(json.dumps(data))


@quick
@given(st.dictionaries(st.text(max_size=5), json_values, max_size=3))
def test_a_subnet_with_bad_values_is_a_value_error_or_a_subnet(values):
    text = json.dumps({"format": "peft-elastic/subnet", "version": 1, "values": values})
    if all(type(value) is int and value >= 0 for value in values.values()):
        assert Subnet.from_json(text) == values
    else:
        with pytest.raises(ValueError):
            Subnet.from_json(text)


@quick
@given(st.lists(json_values, max_size=3))
def test_a_search_space_with_bad_choices_is_a_value_error(choices):
    with pytest.raises(ValueError):
        SearchSpace.from_json(json.dumps({"format": "peft-elastic/search-space", "version": 1, "choices": choices}))


@quick
@given(spaces_with_subnet(), st.data())
def test_damaged_json_of_a_space_never_gives_another_error(case, data):
    """One field of a real file replaced by anything: refused as a ValueError, or still a working space."""
    space, _ = case
    content = json.loads(space.to_json())
    row = content["choices"][data.draw(st.integers(0, len(space) - 1))]
    row[data.draw(st.sampled_from(sorted(row)))] = data.draw(json_values)
    try:
        damaged = SearchSpace.from_json(json.dumps(content))
    except ValueError:
        return
    assert damaged.max in damaged and damaged.size >= 1
    assert isinstance(damaged.count_parameters(damaged.max), int)
    assert SearchSpace.from_json(damaged.to_json()) == damaged
    assert isinstance(hash(damaged), int) and damaged.fingerprint


# -- single cases --------------------------------------------------------------------------------------------------


def test_named_subnets():
    space = small_space()
    assert space.max == {"rank:a": 8, "rank:b": 32, "heads:a": 6}
    assert space.min == {"rank:a": 2, "rank:b": 16, "heads:a": 6}
    # element (n - 1) // 2 of the options from large to small
    assert space.heuristic == {"rank:a": 4, "rank:b": 24, "heads:a": 6}
    assert space.subnet("heuristic") == space.heuristic
    assert space.size == 12 and len(space) == 3
    assert space.count_parameters(space.max) == 8 * 10 + 32 * 3


def test_a_subnet_is_immutable():
    subnet = small_space().max
    with pytest.raises(TypeError):
        subnet["rank:a"] = 4
    with pytest.raises(AttributeError):
        subnet.other = 1
    subnet.to_dict()["rank:a"] = 1
    assert subnet["rank:a"] == 8


def test_a_subnet_keeps_its_values_when_the_mapping_it_came_from_changes():
    values = {"rank:a": 8}
    subnet = Subnet(values)
    values["rank:a"] = 2
    assert subnet["rank:a"] == 8


def test_numpy_values_become_plain_integers():
    subnet = Subnet({"rank:a": np.int64(8)})
    assert type(subnet["rank:a"]) is int
    assert Subnet.from_json(subnet.to_json()) == subnet


def test_numpy_options_survive_json():
    try:
        choice = Choice("rank", "a", tuple(np.array([8, 4])))
    except ValueError as error:
        assert "non-negative integers" in str(error)  # refused is fine as well
        return
    assert SearchSpace.from_json(SearchSpace([choice]).to_json()) == SearchSpace([choice])


@pytest.mark.parametrize("value", [True, -1, 1.0, 1.5, "8", None, [8], float("nan")])
def test_subnet_values_are_checked(value):
    with pytest.raises(ValueError, match="rank:a"):
        Subnet({"rank:a": value})


def test_subnet_keys_are_checked():
    with pytest.raises(ValueError, match="keys must be strings"):
        Subnet({1: 8})


def test_comparison_with_other_mappings():
    subnet = small_space().max
    assert subnet == subnet.to_dict() and subnet.to_dict() == subnet
    assert subnet != small_space().min
    assert subnet != "max" and subnet != 3
    assert subnet != list(subnet.items())


def test_huge_spaces():
    space = SearchSpace(Choice("rank", f"layer.{i}", (32, 28, 24, 20, 16), unit_parameters=8192) for i in range(1000))
    assert space.size == 5**1000
    assert "10^" in repr(space) and "1000 choices" in repr(space)
    assert space.sample(0) in space
    assert next(space.subnets()) == space.max  # lazily
    assert space.count_parameters(space.max) == 32 * 8192 * 1000
    assert space.decode(space.encode(space.sample(1))) == space.sample(1)
    assert len(space.fingerprint) == 16


def test_samples_are_uniform():
    space = small_space()
    rng = np.random.default_rng(0)
    counts = {}
    for _ in range(12_000):
        subnet = space.sample(rng)
        counts[subnet] = counts.get(subnet, 0) + 1
    assert len(counts) == 12
    expected = 1000
    chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi_square < 31.3  # 99.9% quantile at 11 degrees of freedom


def test_different_seeds_give_different_samples():
    space = SearchSpace(Choice("rank", str(i), (8, 4, 2)) for i in range(30))
    assert len({space.sample(seed) for seed in range(100)}) == 100


@pytest.mark.parametrize("seed", [-1, 1.5, "a"])
def test_bad_seeds_are_errors(seed):
    with pytest.raises((ValueError, TypeError)):
        small_space().sample(seed)


def test_fingerprint_tells_spaces_apart():
    space = small_space()
    others = [
        SearchSpace(list(space)[:2]),
        SearchSpace(list(space)[::-1]),
        SearchSpace([Choice("rank", "a", (8, 4)), *list(space)[1:]]),
        SearchSpace([Choice("rank", "c", (8, 4, 2)), *list(space)[1:]]),
    ]
    assert len({s.fingerprint for s in [space, *others]}) == 5
    assert space.fingerprint == small_space().fingerprint


@pytest.mark.slow  # a second interpreter
def test_fingerprint_and_samples_are_the_same_in_another_process():
    space = small_space()
    code = (
        "import sys; from peft_elastic.supernet import SearchSpace\n"
        "space = SearchSpace.from_json(sys.stdin.read())\n"
        "print(space.fingerprint, *space.encode(space.sample(7)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        input=space.to_json(),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [space.fingerprint, *map(str, space.encode(space.sample(7)))]


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "empty"),
        ((4, 8), "fall strictly"),
        ((8, 8), "fall strictly"),
        ((8, -1), "non-negative"),
        ((8, 4.0), "non-negative"),
        ((True,), "non-negative"),
        (("8",), "non-negative"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Choice("rank", "layer", options)
    assert "rank:layer" in str(error.value)


def test_bad_spaces():
    with pytest.raises(ValueError, match="empty"):
        SearchSpace([])
    with pytest.raises(ValueError, match=re.escape("['rank:a']")):
        SearchSpace([Choice("rank", "a", (2,)), Choice("rank", "a", (4,)), Choice("rank", "b", (4,))])


@pytest.mark.parametrize(
    ("subnet", "message"),
    [
        ("maximum", "'max', 'min' or 'heuristic'.*'maximum'"),
        (3, "int"),
        (None, "NoneType"),
        ([8, 4], "list"),
        ({"rank:a": 8}, "no value for 'rank:b'"),
        ({"rank:a": 8, "rank:b": 32, "heads:a": 6, "rank:c": 1}, "unknown choices 'rank:c'"),
        ({"rank:a": 7, "rank:b": 32, "heads:a": 6}, r"`subnet\['rank:a'\]` must be one of \[8, 4, 2\], got 7"),
        ({"rank:a": 8.0, "rank:b": 32, "heads:a": 6}, "rank:a"),
        ({}, "no value for"),
    ],
)
def test_foreign_subnets(subnet, message):
    space = small_space()
    with pytest.raises(ValueError, match=message):
        space.subnet(subnet)
    assert isinstance(subnet, str) or subnet not in space


def test_many_missing_choices_make_a_short_message():
    space = SearchSpace(Choice("rank", f"layer.{i}", (8, 4)) for i in range(500))
    with pytest.raises(ValueError, match="and 496 more") as error:
        space.subnet({})
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "indices", [[], [0, 0], [0, 0, 0, 0], [3, 0, 0], [-1, 0, 0], [0, 4, 0], [0.5, 0, 0], ["0", 0, 0]]
)
def test_bad_indices(indices):
    with pytest.raises((ValueError, TypeError)):
        small_space().decode(indices)


def test_encode_refuses_a_subnet_of_another_space():
    with pytest.raises(ValueError, match="does not belong"):
        small_space().encode(Subnet({"rank:a": 8}))


# -- files ---------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    subnet = small_space().heuristic
    path = tmp_path / "deep" / "er" / "subnet.json"
    subnet.save(path)
    assert Subnet.load(path) == subnet == Subnet.load(str(path))
    small_space().min.save(path)
    assert Subnet.load(path) == small_space().min
    assert os.listdir(path.parent) == ["subnet.json"]


def test_load_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Subnet.load(tmp_path / "subnet.json")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00binary\x80",
        b"{",
        b"null",
        b"[]",
        b'{"rank:a": 8}',
        b'{"format": "peft-elastic/search-space", "version": 1, "choices": []}',
        b'{"format": "peft-elastic/subnet", "version": 2, "values": {}}',
        b'{"format": "peft-elastic/subnet", "values": {}}',
        b'{"format": "peft-elastic/subnet", "version": 1}',
        b'{"format": "peft-elastic/subnet", "version": 1, "values": []}',
        b'{"format": "peft-elastic/subnet", "version": 1, "values": {"rank:a": -8}}',
        b'{"format": "peft-elastic/subnet", "version": 1, "values": {"rank:a": 8.0}}',
        b'{"format": "peft-elastic/subnet", "version": 1, "values": {"rank:a": NaN}}',
        b"[" * 100_000,
    ],
)
def test_foreign_files_are_value_errors_that_name_the_file(tmp_path, content):
    path = tmp_path / "subnet.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"subnet\.json"):
        Subnet.load(path)


def test_every_truncation_of_a_file_is_refused(tmp_path):
    path = tmp_path / "subnet.json"
    whole = small_space().max.to_json()
    for length in range(len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(ValueError, match=r"subnet\.json"):
            Subnet.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "subnet.json"
    small_space().max.save(path)

    def no_space_left(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", no_space_left)
    with pytest.raises(OSError, match="No space left"):
        small_space().min.save(path)
    monkeypatch.undo()
    assert Subnet.load(path) == small_space().max
    assert os.listdir(tmp_path) == ["subnet.json"]
