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
"""The argument parser of `peft-elastic`, and what happens to a command's errors."""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

import peft_elastic.cli
from peft_elastic.common.writing import write_error
from peft_elastic.version import __version__


# The order in which `--help` lists the commands: that in which a user meets them.
_ORDER = ("quickstart", "prune", "quantize", "train", "search", "merge", "bench", "info")

_DESCRIPTION = """\
Make a pretrained transformer small, fine-tuned and fast on CPUs: prune it, train an elastic LoRA
super-adapter on it, search that for the best sub-adapter, and merge the two."""

_EPILOG = """\
examples:
  peft-elastic quickstart                 the whole path on a small model, in minutes
  peft-elastic info                       versions, processor, what is used; put it into bug reports
  peft-elastic COMMAND --help             what a command does, its options, and examples
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with a subparser for every module of `peft_elastic.cli`."""
    parser = argparse.ArgumentParser(
        prog="peft-elastic",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"peft-elastic {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND [OPTION]", required=True)
    names = {module.name for module in pkgutil.iter_modules(peft_elastic.cli.__path__)} - {"main"}
    for name in sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)):
        if not name.startswith("_"):
            importlib.import_module(f"peft_elastic.cli.{name}").add_parser(subparsers)
    for subparser in subparsers.choices.values():
        subparser.add_argument(
            "--traceback", action="store_true", help="on an error, show where in the code it came from"
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: that of the process) and returns its exit status.

    0 for success, 2 for bad input and full disks (argparse's own errors, and a ValueError or OSError from the command, of
    which one line is printed), 130 when interrupted. Any other exception is a bug, and is not caught.
    """
    args = None
    try:
        args = build_parser().parse_args(argv)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read our output has gone, as in `peft-elastic info | head -1`. Nothing is left to say, but the
        # interpreter would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        known = write_error(error) or (error if isinstance(error, (ValueError, OSError)) else None)
        if known is None or (args and args.traceback):
            raise
        print(f"peft-elastic: error: {' '.join(str(known).split())}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:  # what is full is where our output goes; the interpreter would try again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except KeyboardInterrupt:
        if args and args.traceback:
            raise
        print("peft-elastic: interrupted", file=sys.stderr)
        return 130
