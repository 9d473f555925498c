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
"""The house: a folder of the package imports folders below it only, and modules import each other in no circle. Imports inside of
functions count: they are late, and as much of a dependency."""

import ast
from pathlib import Path

import pytest
from support.places import REPOSITORY


PACKAGE = REPOSITORY / "peft_elastic"
# From the ground up. What stands in a line knows nothing of the other names of that line.
FLOORS = [
    {"version", "_process"},
    {"common"},
    {"layers", "supernet"},
    {"structure"},
    {"cost"},
    {"pruning", "quantization"},
    {"search", "deploy"},
    {"tuners", "elastic_model"},
    {"cli"},
    {"__main__"},
]
ALIASES = {"utils"}  # deprecated names; they import what they name when it is asked for


def modules(package: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, wherever in it; a package that it is in itself is none."""
    found: set[str] = set()
    base = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module for alias in node.names
            }
    return {
        module for module in found if module in known and module != name and not f"{name}.".startswith(f"{module}.")
    }


def upward(package: Path, floors: list[set[str]]) -> list[str]:
    """The arrows that go up, or to a neighbour: "a.b -> c.d"."""
    floor_of = {name: i for i, names in enumerate(floors) for name in names}
    known, wrong = modules(package), []
    for name, path in known.items():
        mine = name.split(".")[1:2]
        if not mine or mine[0] in ALIASES:
            continue
        for other in sorted(imports(name, path, known)):
            theirs = other.split(".")[1]
            if theirs != mine[0] and not (theirs in floor_of and floor_of[theirs] < floor_of[mine[0]]):
                wrong.append(f"{name} -> {other}")
    return wrong


def circles(package: Path) -> list[list[str]]:
    """Groups of modules that import each other, directly or by way of others (Tarjan's strongly connected components)."""
    known = modules(package)
    arrows = {name: imports(name, path, known) for name, path in known.items() if name != package.name}
    reached: dict[str, set[str]] = {}
    for name in arrows:
        seen, todo = set(), [name]
        while todo:
            for other in arrows.get(todo.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    todo.append(other)
        reached[name] = seen
    groups = {frozenset({a} | {b for b in reached[a] if a in reached.get(b, ())}) for a in arrows if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def test_every_folder_has_a_floor():
    there = {name.split(".")[1] for name in modules(PACKAGE) if "." in name} - ALIASES
    assert there == set().union(*FLOORS)


def test_no_arrow_goes_up():
    assert upward(PACKAGE, FLOORS) == []


def test_there_is_no_circle():
    assert circles(PACKAGE) == []


@pytest.mark.parametrize(
    ("files", "arrows", "groups"),
    [
        ({"low/a.py": "from ..high import b", "high/b.py": ""}, ["p.low.a -> p.high.b"], []),
        ({"low/a.py": "def f():\n    from ..high.b import x", "high/b.py": ""}, ["p.low.a -> p.high.b"], []),
        ({"low/a.py": "import p.high.b", "high/b.py": ""}, ["p.low.a -> p.high.b"], []),
        ({"low/a.py": "", "high/b.py": "from ..low import a"}, [], []),
        ({"low/a.py": "from . import b", "low/b.py": "from .a import x"}, [], [["p.low.a", "p.low.b"]]),
        ({"low/a.py": "from . import b", "low/b.py": "from .c import x", "low/c.py": ""}, [], []),
        ({"low/a.py": "from ..other import c", "other/c.py": ""}, ["p.low.a -> p.other.c"], []),
    ],
)
def test_arrows_and_circles_are_found(tmp_path, files, arrows, groups):
    for name, text in {"__init__.py": "", **files}.items():
        path = tmp_path / "p" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").touch()
    assert upward(tmp_path / "p", [{"low", "other"}, {"high"}]) == arrows
    assert circles(tmp_path / "p") == groups


def test_the_tuner_is_a_table_of_contents():
    """The work is done in the modules beside it; whoever makes this class longer has put some into it."""
    tree = ast.parse((PACKAGE / "tuners" / "elastic_lora" / "model.py").read_text(encoding="utf-8"))
    (tuner,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ElasticLoraModel")
    assert tuner.end_lineno - tuner.lineno + 1 <= 400
