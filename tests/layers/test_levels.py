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
"""The C++ of the kernels without Python: every level through a software model, fuzzing, and what the compiler made of it.

Few machines have AMX or AVX512, so the sources of these levels are also compiled against SIMDe and a model of the AMX tiles
(tests/csrc/software_model.h). That proves layout and arithmetic; the disassembly shows that the extension itself holds the
instructions.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest
from support.compiling import COMPILER, CSRC, compile_file
from support.places import REPOSITORY

from peft_elastic.layers import extension


LEVELS = sorted((CSRC / "levels").glob("*.cpp"))
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def simde_headers():
    try:
        files = metadata.files("cmeel-simde") or []
    except metadata.PackageNotFoundError:
        pytest.skip("cmeel-simde is not installed")
    header = next(file for file in files if file.as_posix().endswith("include/simde/x86/avx512.h"))
    return Path(header.locate()).parents[2]


def build(folder, sources, *options, link=(), optimize="-O1"):
    flags = [
        "-std=c++17",
        optimize,
        "-g1",  # lines for reports of the sanitizers; the rest of `-g` doubles the time of compiling the software model
        "-w",
        *SANITIZE,
        f"-I{CSRC}",
        f"-I{REPOSITORY / 'tests' / 'csrc'}",
        *options,
    ]
    objects = []
    for source in sources:
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([COMPILER, *flags, "-c", source, "-o", objects[-1]], check=True)
    program = folder / "program"
    subprocess.run([COMPILER, *SANITIZE, *link, *objects, "-o", program], check=True)
    return program


def run(program, *arguments):
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=3600)


@needs_compiler
def test_every_level_in_the_software_model(tmp_path):
    sources = [*LEVELS, CSRC / "pack.cpp", REPOSITORY / "tests/csrc/test_levels.cpp"]
    # compiling takes longer than running, by far with -O1
    program = build(tmp_path, sources, "-DPEFT_ELASTIC_SOFTWARE_MODEL", f"-I{simde_headers()}", optimize="-O0")
    for seed in range(2):
        result = run(program, seed)
        assert result.returncode == 0 and ", 0 failures" in result.stdout, result.stdout + result.stderr


@needs_compiler
def test_a_new_level_runs_nothing_but_its_own(tmp_path):
    """A level of another name than those that there are, whose table holds the plain C++; the tables of all others note whoever
    calls them. So it would be for a level of another architecture, to which every other one is illegal instructions."""
    new = '-DPEFT_ELASTIC_MORE_LEVELS(LEVEL)=LEVEL(novel, "", false)'
    sources = [*(path for path in CSRC.glob("*.cpp") if path.name != "module.cpp"), CSRC / "levels" / "portable.cpp"]
    objects = []
    for source in sources:
        # the file of the portable level, under the name of the new one
        renamed = ["-Dportable_kernels=novel_kernels"] if source.stem == "portable" else []
        objects.append(compile_file(source, tmp_path / f"{source.stem}.o", "-O1", new, *renamed))
    objects.append(compile_file(REPOSITORY / "tests/csrc/test_new_level.cpp", tmp_path / "test.o", "-O1"))
    subprocess.run([COMPILER, "-pthread", *objects, "-o", tmp_path / "program"], check=True)
    result = run(tmp_path / "program")
    assert result.returncode == 0 and "novel: 0 calls of other levels" in result.stdout, result.stdout + result.stderr


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("source", LEVELS, ids=lambda path: path.stem)
def test_a_level_shares_no_function_with_other_files(source, tmp_path):
    """Of a function that several files define the linker keeps one, which may be of instructions that others must not run.
    Without optimization nothing is inlined that need not be."""
    names = subprocess.run(
        ["nm", "--demangle", compile_file(source, tmp_path / "level.o", "-O0")],
        capture_output=True,
        text=True,
        check=True,
    )
    defined = [line.split(maxsplit=2)[1:] for line in names.stdout.splitlines() if not line.startswith(" ")]
    shared = {name for kind, name in defined if kind in "TWVuvw"} - {"DW.ref.__gxx_personality_v0"}
    assert shared == {f"peft_elastic::{source.stem}_kernels()"}


def test_instructions_are_asked_for_in_levels_alone():
    files = [*CSRC.glob("*.cpp"), *CSRC.glob("*.h"), *CSRC.glob("values/*"), CSRC / "levels" / "portable.cpp"]
    for file in files:
        assert not re.search(r'mmintrin\.h|/simd\.h"|__attribute__\(\(target|GCC target', file.read_text()), file


@needs_compiler
def test_fuzzing(tmp_path):
    """PEFT_ELASTIC_FUZZ sets how many mutated weights; `make fuzz` runs 200,000, and half as many inputs from Python."""
    count = int(os.environ.get("PEFT_ELASTIC_FUZZ", "5000"))
    sources = [CSRC / "pack.cpp", CSRC / "levels" / "portable.cpp", REPOSITORY / "tests/csrc/fuzz_pack.cpp"]
    program = build(tmp_path, sources)
    result = run(program, count, count)
    assert result.returncode == 0, result.stderr
    refused, accepted = map(int, re.findall(r"\d+", result.stdout))
    assert refused + accepted == count and refused > count / 4 and accepted > count / 50


@needs_compiler
@pytest.mark.slow
def test_fuzzing_from_python(tmp_path):
    """State dicts with strides, groups of int4, the decoding step and every kind of JSON, through an extension with sanitizers."""
    count = int(os.environ.get("PEFT_ELASTIC_FUZZ", "4000")) // 2
    pybind11 = pytest.importorskip("pybind11")
    runtimes = [
        subprocess.run([COMPILER, f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip("the compiler has no shared libraries of the sanitizers, which Python would need to load")
    include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    # what the package may look at, so that it takes this build for its own
    include += [f"-DPEFT_ELASTIC_VERSION={getattr(extension._C, '__version__', '')}"]
    include += [f"-DPEFT_ELASTIC_FINGERPRINT={getattr(extension._C, 'fingerprint', '')}"]
    # without the options of the levels all but the portable one are empty
    built = build(tmp_path, sorted(CSRC.rglob("*.cpp")), "-fPIC", "-fno-sanitize=vptr", *include, link=["-shared"])
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch leave much to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "TMPDIR": str(tmp_path),
    }
    program = [sys.executable, REPOSITORY / "tests" / "layers" / "fuzz_python.py", built, str(count), str(count)]
    result = subprocess.run(program, capture_output=True, text=True, env=environment, timeout=3600)
    assert result.returncode == 0, result.stderr[-5000:]
    found = re.findall(r"(\w+): (\d+) refused, (\d+) accepted", result.stdout)
    assert [name for name, _, _ in found] == ["state_dicts", "groups", "decode", "json_texts"]
    for _, refused, accepted in found:
        assert int(refused) > count / 50 and int(accepted) > count / 50


@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump")
def test_instructions_of_the_extension():
    levels = {level["name"]: level["built"] for level in extension.levels()}
    if not levels.get("amx"):
        pytest.skip("the extension was built without the AMX level")
    text = subprocess.run(["objdump", "-d", extension._C.__file__], capture_output=True, text=True, check=True).stdout
    for instruction in ["ldtilecfg", "tileloadd", "tdpbf16ps", "tdpbssd", "tilerelease", "vpexpandw", "vpexpandb",
                        "vdpbf16ps", "vpdpbusd", "vpshufb"]:  # fmt: skip
        assert re.search(rf"\b{instruction}\b", text), instruction
