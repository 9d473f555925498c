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
"""The build, the C++ extension and the command line as such."""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version
from support.places import REPOSITORY

import peft_elastic
import peft_elastic.cli
from peft_elastic.cli import info, main
from peft_elastic.cli.main import build_parser
from peft_elastic.layers import extension


NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}

needs_extension = pytest.mark.skipif(not extension.is_built(), reason=f"no extension: {extension.IMPORT_ERROR}")


def build_ext(folder: Path, **environment: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "tmp"),
    ]
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True)


def test_without_a_compiler_the_build_goes_on(tmp_path):
    pytest.importorskip("pybind11")
    done = build_ext(tmp_path, **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert re.search("building extension .peft_elastic._C. failed", done.stdout + done.stderr)
    assert not list(tmp_path.rglob("_C.*"))


def test_without_a_compiler_a_required_extension_is_an_error(tmp_path):
    pytest.importorskip("pybind11")
    done = build_ext(tmp_path, PEFT_ELASTIC_REQUIRE_EXT="1", **NO_COMPILER)
    assert done.returncode != 0


def test_the_lower_bounds_are_those_that_are_tested():
    bound = re.compile(r'^ +"([\w-]+)>=([\w.]+)",$', re.MULTILINE)
    pyproject = (REPOSITORY / "pyproject.toml").read_text()
    required = pyproject[
        pyproject.index("\ndependencies = [") : pyproject.index("\n]", pyproject.index("\ndependencies = ["))
    ]
    bounds = dict(bound.findall(required))
    assert len(bounds) == required.count(">=") > 10
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)$", (REPOSITORY / "constraints-oldest.txt").read_text(), re.MULTILINE))
    extra = re.search(r'^gguf = \["gguf>=([\w.]+)"\]$', pyproject, re.MULTILINE)
    assert pins == bounds | {"gguf": extra[1]}
    for name, version in re.findall(
        r"^([\w-]+)==([\w.]+)", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE
    ):
        if name in bounds:
            assert Version(version) >= Version(bounds[name])


@needs_extension
class TestStaleExtension:
    """The extension that is built here, beside Python code and sources that it is not of."""

    @pytest.fixture
    def checkout(self, tmp_path):
        shutil.copytree(REPOSITORY / "csrc", tmp_path / "csrc")
        return tmp_path / "peft_elastic"

    def test_its_own_sources(self, checkout):
        extension._check(extension._C, checkout)
        for file in checkout.parent.joinpath("csrc").rglob("*.*"):  # as git writes them on Windows
            file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
        checkout.parent.joinpath("csrc", "notes.txt").write_text("not compiled")
        extension._check(extension._C, checkout)

    @pytest.mark.parametrize(
        "change", ["one more", "one less", "one changed", "one renamed", "one changed further down", "one moved"]
    )
    def test_other_sources(self, change, checkout):
        sources = checkout.parent / "csrc"
        if change == "one more":
            (sources / "new.cpp").write_text("")
        elif change == "one less":
            (sources / "pack.cpp").unlink()
        elif change == "one changed":
            with (sources / "layout.h").open("a") as file:
                file.write(" ")
        elif change == "one changed further down":
            with (sources / "levels" / "avx2.cpp").open("a") as file:
                file.write(" ")
        elif change == "one moved":
            (sources / "levels" / "avx2.cpp").rename(sources / "values" / "avx2.cpp")
        else:
            (sources / "pack.cpp").rename(sources / "packs.cpp")
        with pytest.raises(ImportError, match="Build it again: `pip install --no-deps -e .` in ") as error:
            extension._check(extension._C, checkout)
        assert str(checkout.parent) in str(error.value) and extension._C.__file__ in str(error.value)

    @pytest.mark.parametrize("version", ["0.0.9", "9.1.0.dev2+local"])
    def test_another_version(self, version, tmp_path, monkeypatch):
        extension._check(extension._C, tmp_path)  # installed: without sources beside it
        monkeypatch.setattr(extension, "__version__", version)
        with pytest.raises(ImportError, match=f"beside it of {re.escape(version)}.*pip install --force-reinstall"):
            extension._check(extension._C, tmp_path)

    def test_from_before_it_had_a_version(self, tmp_path):
        with pytest.raises(ImportError, match="is of peft-elastic unknown"):
            extension._check(argparse.Namespace(__file__="_C.so"), tmp_path)


@needs_extension
@pytest.mark.slow
def test_a_stale_extension_is_refused_by_the_import(tmp_path):
    shutil.copytree(REPOSITORY / "peft_elastic", tmp_path / "peft_elastic")
    version = tmp_path / "peft_elastic" / "version.py"
    version.write_text(re.sub(r"__version__ = .*", '__version__ = "9.9"', version.read_text()))

    def imported():
        # without the finder of an editable install, which would supply the extension of the checkout
        script = "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]; "
        command = [
            sys.executable,
            "-c",
            script + "import peft_elastic; print(peft_elastic.layers.extension.is_built())",
        ]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = imported()
    assert done.returncode != 0 and "ImportError: The C++ extension" in done.stderr and "Build it again" in done.stderr
    for file in tmp_path.glob("peft_elastic/_C.*"):
        file.unlink()
    assert imported().stdout.split() == ["False"]


@pytest.mark.slow
def test_wheel(tmp_path):
    wheel = build_wheel(tmp_path, PEFT_ELASTIC_REQUIRE_EXT="1")
    with zipfile.ZipFile(wheel) as file:
        files = set(file.namelist())
        points = file.read(next(name for name in files if name.endswith("entry_points.txt"))).decode()
        about = file.read(next(name for name in files if name.endswith("METADATA"))).decode()
    assert any(re.fullmatch(r"peft_elastic/_C\..*(so|pyd)", name) for name in files)
    assert {"peft_elastic/py.typed", "peft_elastic/cli/info.py"} <= files
    assert {name.split("/")[0].split("-")[0] for name in files} == {"peft_elastic"}
    assert "peft-elastic = peft_elastic.cli:main" in points
    assert f"\nVersion: {peft_elastic.__version__}\n" in about
    assert "\nLicense-Expression: Apache-2.0\n" in about


@pytest.mark.slow
def test_installed_without_a_compiler_it_works(tmp_path):
    wheel = build_wheel(tmp_path, **NO_COMPILER)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    assert not list((tmp_path / "site").rglob("_C.*"))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            # without the finder of an editable install, which would supply the extension of the checkout
            "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]; "
            "from peft_elastic.cli import main; raise SystemExit(main(['info']))",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "NOT built" in done.stdout
    assert "install a C++17 compiler" in done.stdout


def build_wheel(folder: Path, **environment: str) -> Path:
    """From a copy of the sources, as building leaves its traces in them."""
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("peft_elastic", "csrc"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
        source,
    ]
    subprocess.run(command, env=os.environ | environment, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_version():
    try:
        installed = metadata.version("peft-elastic")
    except metadata.PackageNotFoundError:
        pytest.skip("run from the sources, not installed")
    assert installed == peft_elastic.__version__


@needs_extension
def test_cpu_report():
    report = extension.cpu_report()
    assert set(report) == {"architecture", "vendor", "brand", "compiler", "features", "amx_permitted", "cache_bytes"}
    assert report["compiler"].startswith(("gcc", "clang", "msvc"))
    assert all(size >= 0 for size in report["cache_bytes"].values())
    machine = platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
    if machine in ("x86_64", "aarch64"):
        assert report["architecture"] == machine
    if machine == "x86_64":
        assert report["features"]["sse4_2"]
        assert report["vendor"]
    else:
        assert not any(report["features"].values())
    if report["amx_permitted"]:
        assert report["features"]["amx_tile"]
    assert report == extension.cpu_report()


@needs_extension
def test_cpu_features_are_those_of_the_kernel():
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        pytest.skip("no /proc/cpuinfo")
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    if flags is None:
        pytest.skip("/proc/cpuinfo has no x86 flags")
    known = set(flags[1].split())
    # A kernel older than the processor does not know the names of its newest features.
    recent = {"avx_vnni", "avx512_fp16", "amx_fp16"}
    for name, usable in extension.cpu_report()["features"].items():
        if name not in recent or name in known:
            assert usable == (name in known), name


@needs_extension
def test_cpu_features_imply_those_that_they_build_on():
    features = extension.cpu_report()["features"]
    for name, usable in features.items():
        if usable and name.startswith("avx512"):
            assert features["avx512f"]
            assert features["avx2"]
        if usable and name in ("avx2", "fma", "f16c", "avx_vnni"):
            assert features["avx"]
        if usable and name.startswith("amx_"):
            assert features["amx_tile"]


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for name in ("peft-elastic", "python", "torch", "transformers", "peft"):
        assert re.search(rf"^  {name}\s+\d+\.\d+", text, re.MULTILINE), name
    assert re.search(r"^  threads\s+\d+ of \d+ usable cores", text, re.MULTILINE)
    assert re.search(r"^  memory\s+[\d.]+ GiB of [\d.]+ GiB available", text, re.MULTILINE)
    assert re.search(
        r"^  extension\s+built \(" if extension.is_built() else r"^  extension\s+NOT built", text, re.MULTILINE
    )


def test_info_as_json(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["peft-elastic"] == peft_elastic.__version__
    assert report["extension"]["built"] == extension.is_built() == (report["cpu"] is not None)
    assert 0 < report["memory"]["available"] < report["memory"]["total"]


def test_info_says_how_to_get_the_extension():
    report = info.collect()
    report["cpu"] = None
    report["extension"] = {"built": False, "file": None, "error": "No module named 'peft_elastic._C'"}
    text = info._format(report)
    assert "NOT built: No module named 'peft_elastic._C'" in text
    assert "install a C++17 compiler" in text


def commands() -> dict[str, argparse.ArgumentParser]:
    parser = build_parser()
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return action.choices


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--help"])
    text = capsys.readouterr().out
    for name in commands():
        assert re.search(rf"^ +{name} +\w", text, re.MULTILINE), name


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_of_a_command_teaches(name, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main([name, "--help"])
    text = capsys.readouterr().out
    assert f"  peft-elastic {name}" in text  # an example to copy
    parser = commands()[name]
    assert len(parser.description) > 80
    for action in parser._actions:
        assert action.help, action.option_strings


@pytest.mark.parametrize("name", sorted(commands()))
def test_the_list_of_commands_says_what_each_says_of_itself(name):
    """It is read from the docstrings of the modules, so that none has to be imported."""

    def lines(parser):
        (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        return {choice.dest: choice.help for choice in action._choices_actions}

    listed = lines(build_parser(["--help"]))
    assert listed == lines(build_parser()) and list(listed) == list(commands())
    only = build_parser([name, "--help"])
    assert lines(only) == listed
    (action,) = (action for action in only._actions if isinstance(action, argparse._SubParsersAction))
    assert {other for other, parser in action.choices.items() if len(parser._actions) > 1} == {name}


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["info", "--nonsense"]])
def test_a_wrong_command_line(arguments, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    assert "usage: peft-elastic" in capsys.readouterr().err


@pytest.fixture
def failing_command(tmp_path, monkeypatch):
    """A command `fail` of our own, in a folder that is searched for commands: it raises the error that it is told."""
    (tmp_path / "fail.py").write_text(
        "def add_parser(subparsers):\n"
        "    parser = subparsers.add_parser('fail')\n"
        "    parser.add_argument('error')\n"
        "    parser.set_defaults(run=run)\n"
        "\n"
        "def run(args):\n"
        "    raise eval(args.error)\n"
    )
    monkeypatch.setattr(peft_elastic.cli, "__path__", [*peft_elastic.cli.__path__, str(tmp_path)])
    yield
    sys.modules.pop("peft_elastic.cli.fail", None)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("ValueError('`sparsity` is 2,\\n  allowed: [0, 1)')", "`sparsity` is 2, allowed: [0, 1)"),
        (
            "FileNotFoundError(2, 'No such file or directory', 'x.json')",
            "[Errno 2] No such file or directory: 'x.json'",
        ),
        ("PermissionError('read-only')", "read-only"),
    ],
)
def test_bad_input_is_one_line(failing_command, capsys, error, line):
    assert main(["fail", error]) == 2
    captured = capsys.readouterr()
    assert captured.err == f"peft-elastic: error: {line}\n"
    assert captured.out == ""


def test_traceback_on_request(failing_command):
    with pytest.raises(ValueError, match="deep inside"):
        main(["fail", "--traceback", "ValueError('deep inside')"])


def test_a_bug_is_not_hidden(failing_command):
    with pytest.raises(ZeroDivisionError):
        main(["fail", "ZeroDivisionError()"])


def test_interrupted(failing_command, capsys):
    assert main(["fail", "KeyboardInterrupt()"]) == 130
    assert capsys.readouterr().err == "peft-elastic: interrupted\n"


def test_a_reader_that_has_gone(monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["info"]) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("script", "page"), [("tables", "compatibility.md"), ("on_paper", "scaling.md")])
def test_tables_in_the_docs_are_up_to_date(script, page, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "docs")
    spec = importlib.util.spec_from_file_location(script, REPOSITORY / "docs" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, script, module)  # dataclasses look for it
    spec.loader.exec_module(module)
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.PAGE.name == page and module.page(text) == text, f"run `python docs/{script}.py`"
    with pytest.raises(ValueError, match=f"{page} lacks"):
        module.page("")
