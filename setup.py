"""Builds the C++ extension `peft_elastic._C`; everything else about the package is in pyproject.toml.

The extension is optional: without a C++17 compiler the package installs all the same, runs on PyTorch alone, and
`peft-elastic info` says so. Set PEFT_ELASTIC_REQUIRE_EXT=1 to make a failed build an error (wheels are built so).
"""

import os
import platform
import re
import runpy
import tempfile
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError


REQUIRED = os.environ.get("PEFT_ELASTIC_REQUIRE_EXT", "0") not in ("", "0")

SOURCES = Path("csrc")


def _flag(feature):
    """The option of gcc and clang for a feature that cpu_features.h names as Linux does: avx512_bf16 is -mavx512bf16."""
    return "-m" + re.sub("^amx_", "amx-", re.sub(r"^(avx\d*)_", r"\1", feature))


# Each level of the kernels is compiled for its own features, which csrc/levels/levels.h lists, and the extension chooses among
# them when it runs. A compiler that does not know an option builds the file without any: it is then empty, and the level absent.
LEVEL_FLAGS = {
    name: [_flag(feature) for feature in re.sub(r'["\\]', "", features).split()]
    for name, features in re.findall(
        r'^ +LEVEL\((\w+),\s*((?:"[^"\n]*"|[\s\\])*),', (SOURCES / "levels" / "levels.h").read_text(), re.MULTILINE
    )
}
if sorted(LEVEL_FLAGS) != sorted(path.stem for path in (SOURCES / "levels").glob("*.cpp")):
    raise SystemExit(f"csrc/levels/levels.h lists {sorted(LEVEL_FLAGS)}, which are not the files beside it.")


def level_flags(source):
    """The options for a file: none, if it is not that of a level."""
    return LEVEL_FLAGS[Path(source).stem] if Path(source).parent == SOURCES / "levels" else []


# The extension carries what it was built from, and peft_elastic/layers/extension.py refuses one that is not its own.
VERSION = runpy.run_path("peft_elastic/version.py")["__version__"]
FINGERPRINT = runpy.run_path("peft_elastic/layers/fingerprint.py")["fingerprint"](SOURCES)


class BuildExt(build_ext):
    def run(self):
        # `optional=True` below forgives a compiler that fails; on some platforms having none at all is an error raised
        # before the first file, which is forgiven here.
        try:
            super().run()
        except BaseError as error:
            if REQUIRED:
                raise
            self.warn(f"building without the C++ extension: {error}")

    def build_extension(self, ext):
        if self.compiler.compiler_type == "unix":
            self._add_flags_per_file()
        super().build_extension(ext)

    def _add_flags_per_file(self):
        compile_one = self.compiler._compile
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")

        def compile_with_flags(obj, src, ext, cc_args, extra_postargs, pp_opts):
            flags = level_flags(src) if is_x86 else []
            if flags and not self._accepts(flags):
                self.warn(f"this compiler knows not all of {' '.join(flags)}: building without {Path(src).stem}")
                flags = []
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

        self.compiler._compile = compile_with_flags

    def _accepts(self, flags):
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text("#include <immintrin.h>\nint main() { return 0; }\n")
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
            except CompileError:
                return False
        return True


setup(
    ext_modules=[
        Pybind11Extension(
            "peft_elastic._C",
            sources=sorted(str(path) for path in SOURCES.rglob("*.cpp")),
            depends=["setup.py", "peft_elastic/version.py", *sorted(str(path) for path in SOURCES.rglob("*.h"))],
            include_dirs=[str(SOURCES)],
            define_macros=[("PEFT_ELASTIC_VERSION", VERSION), ("PEFT_ELASTIC_FINGERPRINT", FINGERPRINT)],
            # -O3 whatever Python was built with. gcc 12 takes the undefined operands in its own AVX512 header for mistakes.
            extra_compile_args=[]
            if os.name == "nt"
            else ["-O3", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-warning-option"],
            cxx_std=17,
            optional=not REQUIRED,
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
