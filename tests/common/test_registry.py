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
from dataclasses import dataclass

import pytest

from peft_elastic.common.registry import Method, Registry


@dataclass
class First:
    method = "none"


@dataclass
class Second(First):
    pass


def test_registry():
    registry = Registry()

    @registry.register("first", First, calibrated=True)
    def run():
        return 1

    assert run() == 1 and First.method == "first" and Second.method == "first"
    assert dict(registry) == {"first": Method("first", First, run, True)} and registry.of(First()).run is run
    with pytest.raises(ValueError, match="`config` must be an instance of one of First, got"):
        registry.of(Second())
    registry.register("second", Second)(len)
    assert list(registry) == ["first", "second"] and not registry["second"].calibrated and Second.method == "second"
    assert First.method == "first" and registry.of(Second()).name == "second" and len(registry) == 2
    with pytest.raises(ValueError, match="`config` must be an instance of one of First, Second, got <class"):
        registry.of(First)


@pytest.mark.parametrize(("name", "config"), [("first", Second), ("other", First)])
def test_nothing_is_registered_twice(name, config):
    registry = Registry()
    registry.register("first", First)(len)
    with pytest.raises(ValueError, match="the method 'first' is registered already, with First"):
        registry.register(name, config)
    assert list(registry) == ["first"]
