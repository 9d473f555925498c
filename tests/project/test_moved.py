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
"""Old names of modules: they still work, and say where the module is now."""

import importlib

import pytest

import peft_elastic.utils


MOVED = {
    "peft_elastic": {
        "_native": "layers.extension",
        "addresses": "layers.addresses",
        "assets": "common.assets",
        "documents": "common.documents",
        "files": "common.files",
        "journal": "common.journal",
        "parameters": "common.parameters",
    },
    "peft_elastic.deploy": {
        "format": "layers.values",
        "ops": "layers.ops",
        "sparse_linear": "layers.sparse_linear",
        "timing": "cost.timing",
    },
    "peft_elastic.pruning": {"layers": "structure.selection"},
    "peft_elastic.quantization": {
        "gptq_format": "layers.gptq_format",
        "grid": "layers.grid",
        "layer": "layers.quantized_linear",
    },
    "peft_elastic.search": {
        "context": "supernet.context",
        "cost": "cost.counts",
        "latency": "cost.latency",
        "merged": "cost.merged",
    },
}


@pytest.mark.parametrize(
    ("package", "name", "home"),
    [(package, name, home) for package, moved in MOVED.items() for name, home in moved.items()],
)
def test_old_names_of_modules(package, name, home):
    home = f"peft_elastic.{home}"
    with pytest.warns(DeprecationWarning, match=rf"`{package}\.{name}` is now `{home}`"):
        found = getattr(importlib.import_module(package), name)
    assert found is importlib.import_module(home)


@pytest.mark.parametrize("package", MOVED)
def test_other_names_are_as_wrong_as_ever(package):
    with pytest.raises(AttributeError, match="no_such_module"):
        importlib.import_module(package).no_such_module  # noqa: B018


@pytest.mark.parametrize(
    ("name", "home"), [("WriteError", "writing"), ("atomic_write_text", "writing"), ("progress_bar", "progress")]
)
def test_utils(name, home):
    with pytest.warns(DeprecationWarning, match=f"is now in `peft_elastic.common.{home}`"):
        found = getattr(peft_elastic.utils, name)
    assert found is getattr(importlib.import_module(f"peft_elastic.common.{home}"), name)
    with pytest.raises(AttributeError, match="no_such_name"):
        peft_elastic.utils.no_such_name  # noqa: B018
