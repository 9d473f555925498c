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
"""What importing the package costs: which libraries come with it, and the seconds that it takes."""

import ast
import json
import os
import pickle
import subprocess
import sys

import pytest
from support.places import REPOSITORY

import peft_elastic


PACKAGE = REPOSITORY / "peft_elastic"
# What a program that only loads a model has no use for.
HEAVY = {"datasets", "matplotlib", "pandas", "pymoo", "scipy"}

# The tuner types of peft, the quantizer of transformers, and whose modules hear of those that torch builds.
KNOWN = ["ELASTIC_LORA", "SPARSE_QA_LORA", "peft_elastic", "peft_elastic.structure", "peft_elastic.tuners"]

MEASURE = """
import json, sys, time
{before}
there, start = set(sys.modules), time.process_time()
try:
    {then}
except SystemExit:
    pass
seconds = time.process_time() - start
new = {{name.partition(".")[0] for name in set(sys.modules) - there}} - {{name.partition(".")[0] for name in there}}
known = []
if "peft" in sys.modules:
    import peft, torch
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    hooks = [hook.__module__ for hook in torch.nn.modules.module._global_module_registration_hooks.values()]
    known += [name for name in ("ELASTIC_LORA", "SPARSE_QA_LORA") if name in peft.PeftType.__members__]
    known += [name for name in AUTO_QUANTIZER_MAPPING if name == "peft_elastic"]
    known += sorted({{".".join(name.split(".")[:2]) for name in hooks if name.startswith("peft_elastic.")}})
print(json.dumps([sorted(new), seconds, known]))
"""


def measure(before, then, script=None, **environment):
    """What a fresh interpreter imports for `then`, the processor seconds, and what the other libraries then know of this package."""
    code = MEASURE.format(before=before, then=then)
    if script is not None:
        script.write_text(code)
    variables = {name: value for name, value in os.environ.items() if not name.startswith("_PEFT_ELASTIC")}
    variables |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *(["-c", code] if script is None else [str(script)])]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_is_lean(record_property):
    """0.3 s on the machine that this was written on; a limit that only another library exceeds is that of the names."""
    new, seconds, known = measure("import peft", "import peft_elastic")
    record_property("processor seconds more than `import peft`", seconds)
    print(f"`import peft_elastic` takes {seconds:.2f} s of processor time more than `import peft`")
    assert not HEAVY & set(new), new
    assert known == KNOWN
    assert seconds < 2


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_the_command_line_imports_no_torch_to_say_what_it_is(option, tmp_path, record_property):
    then = f"from peft_elastic.cli import main; main([{option!r}])"
    new, seconds, known = measure("", then, tmp_path / "peft-elastic")
    record_property("processor seconds", seconds)
    print(f"`peft-elastic {option}` takes {seconds:.2f} s of processor time on top of Python's start")
    assert not {"torch", "transformers", "peft", "numpy", *HEAVY} & set(new), new
    assert known == []
    assert seconds < 1


def test_a_command_that_runs_knows_the_tuner_types(tmp_path):
    then = "from peft_elastic.cli import main; main(['info', '--json'])"
    _, _, known = measure("", then, tmp_path / "peft-elastic")
    assert known == KNOWN


def test_a_program_that_the_command_line_starts_knows_them(tmp_path):
    """It may be the user's, and is no command line itself."""
    _, _, known = measure("", "import peft_elastic", tmp_path / "mine.py", _PEFT_ELASTIC_COMMAND="1")
    assert known == KNOWN


# -- names that are imported when they are asked for ---------------------------------------------------------------


def lists_of(path):
    """(under `if TYPE_CHECKING`, in `__all__`, what `lazy_package` is given) in the `__init__.py` of a lazy package."""
    checked, public, lazy = {}, set(), {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for each in node.body:
                assert isinstance(each, ast.ImportFrom), "no other statements there"
                checked |= {alias.asname or alias.name: "." * each.level + (each.module or "") for alias in each.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            public = set(ast.literal_eval(node.value))
        elif isinstance(node, ast.Assign) and "lazy_package(" in ast.unparse(node.value):
            for given in node.value.args[1:2]:  # none where only old names of modules are given
                for module, names in ast.literal_eval(given).items():
                    lazy |= dict.fromkeys(names, module)
    return checked, public, lazy


LAZY = sorted(path for path in PACKAGE.rglob("__init__.py") if "lazy_package(" in path.read_text())


@pytest.mark.parametrize("path", LAZY, ids=[path.parent.name for path in LAZY])
def test_the_lists_of_names_agree(path):
    checked, public, lazy = lists_of(path)
    assert checked == lazy
    assert set(lazy) <= public
    package = sys.modules[".".join(path.parent.relative_to(PACKAGE.parent).parts)]
    for name in public:
        assert getattr(package, name) is not None
        # importing the module would put it in the place of what has its name
        assert not (name in lazy and lazy[name] == f".{name}")
    assert public <= set(dir(package))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        package.nonsense


def test_all_names_and_folders_are_there():
    names: dict = {}
    exec("from peft_elastic import *", names)
    assert set(peft_elastic.__all__) <= set(names)
    for folder in (path.parent.name for path in PACKAGE.glob("*/__init__.py")):
        if folder != "cli":
            assert getattr(peft_elastic, folder).__name__ == f"peft_elastic.{folder}"
    stage = peft_elastic.Stage(("rank",), epochs=1)
    assert pickle.loads(pickle.dumps(stage)) == stage and pickle.loads(pickle.dumps(peft_elastic.ElasticTrainer))
