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
"""Registering with stock peft: once, again, in another process, under other Pythons, and when peft has changed."""

import enum
import inspect
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from support import fresh

import peft_elastic
from peft_elastic import ElasticLoraConfig, ElasticLoraModel, SparseQALoraConfig, SparseQALoraModel
from peft_elastic.tuners import register


def test_the_type_is_registered():
    member = PeftType.ELASTIC_LORA
    assert PeftType("ELASTIC_LORA") is PeftType["ELASTIC_LORA"] is member
    assert member in PeftType and "ELASTIC_LORA" in PeftType.__members__
    assert list(PeftType)[-2:] == [member, PeftType.SPARSE_QA_LORA] and len(PeftType) == len(PeftType.__members__)
    assert member == "ELASTIC_LORA" and isinstance(member, str) and hash(member) == hash("ELASTIC_LORA")
    assert member.name == member.value == "ELASTIC_LORA"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is ElasticLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is ElasticLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "lora_"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.SPARSE_QA_LORA] is SparseQALoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.SPARSE_QA_LORA] is SparseQALoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.SPARSE_QA_LORA] == "lora_"
    # and LoRA is what it was
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is peft.LoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is peft.LoraModel


def test_registering_again_changes_nothing():
    before = list(PeftType)
    register.add_enum_member(PeftType, "ELASTIC_LORA")
    register.register_tuner("elastic_lora", ElasticLoraConfig, ElasticLoraModel)
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ELASTIC_LORA] is ElasticLoraConfig


FRESH = """
import importlib, pickle, sys
config = pickle.load(sys.stdin.buffer)  # finds the package through the configuration's class
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert config.peft_type is PeftType.ELASTIC_LORA and config.elastic_ranks == [8, 2], config

import torch
import peft_elastic.tuners.elastic_lora as package
member, old = PeftType.ELASTIC_LORA, package.ElasticLoraConfig
jobs = ("base", "optimizers", "subnets", "injection", "merging", "export", "saving")
for name in ("layer", "config", "state", *jobs, "model", "peft_model"):
    importlib.reload(importlib.import_module(f"peft_elastic.tuners.elastic_lora.{name}"))
importlib.reload(package)
new = package.ElasticLoraConfig
assert new is not old and PEFT_TYPE_TO_CONFIG_MAPPING[member] is new and PeftType.ELASTIC_LORA is member
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), new(r=4, target_modules=["0"]))
model.set_subnet("min")
assert model.base_model.model[0].lora_A["default"].weight.shape == (2, 4)
"""


def test_pickling_and_reloading():
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(PeftType.ELASTIC_LORA, protocol)) is PeftType.ELASTIC_LORA
    # in a process that has not imported the package, and where reloading may leave two versions of every class
    fresh.run(
        [sys.executable, "-c", FRESH],
        input=pickle.dumps(ElasticLoraConfig(r=8, elastic_ranks=[8, 2])),
        check=True,
        cwd=Path(peft_elastic.__file__).parents[1],
    )


def test_internals_that_have_moved_are_an_import_error(monkeypatch):
    with pytest.raises(ImportError, match=rf"cannot register its tuner types with peft {peft.__version__}.*no enum"):
        register.add_enum_member(type("no enum", (), {"__members__": {}}), "ELASTIC_LORA")

    class Forgetful(dict):
        def __setitem__(self, key, value):
            pass

    class Sealed(str, enum.Enum):
        A = "A"

    class Evasive(str, enum.Enum):
        A = "A"

        @classmethod
        def _missing_(cls, value):
            return cls.A

    for enum_cls, message in ((Sealed, "Sealed cannot take the member B"), (Evasive, "Evasive did not take")):
        enum_cls._value2member_map_ = Forgetful()
        with pytest.raises(ImportError, match=message):
            register.add_enum_member(enum_cls, "B")

    monkeypatch.delattr("peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING")
    with pytest.raises(ImportError, match="peft.mapping has other tables"):
        register.register_tuner("elastic_lora", ElasticLoraConfig, ElasticLoraModel)


def test_a_name_that_peft_refuses_is_an_import_error():
    with pytest.raises(ImportError, match="registering the tuner type 'lora_' failed"):
        register.register_tuner("lora_", ElasticLoraConfig, dict)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.ELASTIC_LORA] is ElasticLoraConfig


STANDALONE = '''
import copy, enum, pickle, sys

class PeftType(str, enum.Enum):
    """As peft's: a closed enum of strings."""

    LORA = "LORA"
    ADALORA = "ADALORA"

{source}

add_enum_member(PeftType, "ELASTIC_LORA")
add_enum_member(PeftType, "ELASTIC_LORA")
add_enum_member(PeftType, "SPARSE_QA_LORA")
member = PeftType.ELASTIC_LORA
assert [m.name for m in PeftType] == ["LORA", "ADALORA", "ELASTIC_LORA", "SPARSE_QA_LORA"]
assert PeftType("ELASTIC_LORA") is member and PeftType["ELASTIC_LORA"] is member
assert member == "ELASTIC_LORA" and isinstance(member, PeftType) and isinstance(member, str)
assert member in PeftType and len(PeftType) == 4 and {{member: 1}}["ELASTIC_LORA"] == 1
assert member.name == member.value == "ELASTIC_LORA" and repr(member) == "<PeftType.ELASTIC_LORA: 'ELASTIC_LORA'>"
assert pickle.loads(pickle.dumps(member)) is member and copy.deepcopy(member) is member
for bad in ("NOPE", None, 3):
    try:
        PeftType(bad)
    except ValueError:
        continue
    raise AssertionError(bad)
try:
    PeftType.ELASTIC_LORA = "x"
except AttributeError:
    print("ok", sys.version_info[:2])
'''


def interpreters():
    """This Python, and others from 3.10 on that are at hand on the PATH or under pyenv."""
    found = {"this": sys.executable}
    for minor in range(10, 20):
        name = f"python3.{minor}"
        versions = sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob(f"versions/3.{minor}.*/bin"))
        path = str(versions[-1] / name) if versions else shutil.which(name)
        if path and os.access(path, os.X_OK):
            found[name] = path
    return found


@pytest.mark.parametrize(("name", "python"), interpreters().items(), ids=list(interpreters()))
def test_adding_a_member_under_every_python(name, python):
    """Enums are built differently from one Python version to the next; the function needs no peft."""
    source = inspect.getsource(register.add_enum_member) + inspect.getsource(register._moved)
    script = "from __future__ import annotations\n" + STANDALONE.format(source=source)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    result = subprocess.run([python, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("ok")
