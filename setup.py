"""Builds the C++ extension `peft_elastic._C`; everything else about the package is in pyproject.toml.

The extension is optional: without a C++17 compiler the package installs all the same, runs on PyTorch alone, and
`peft-elastic info` says so. Set PEFT_ELASTIC_REQUIRE_EXT=1 to make a failed build an error (wheels are built so).
"""

import os

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError


REQUIRED = os.environ.get("PEFT_ELASTIC_REQUIRE_EXT", "0") not in ("", "0")


class OptionalBuildExt(build_ext):
    """`optional=True` below forgives a compiler that fails; on some platforms having none at all is an error raised
    before the first file, which is forgiven here."""

    def run(self):
        try:
            super().run()
        except BaseError as error:
            if REQUIRED:
                raise
            self.warn(f"building without the C++ extension: {error}")


setup(
    ext_modules=[
        Pybind11Extension(
            "peft_elastic._C",
            sources=["csrc/cpu_features.cpp", "csrc/module.cpp"],
            depends=["csrc/cpu_features.h"],
            cxx_std=17,
            optional=not REQUIRED,
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
)
