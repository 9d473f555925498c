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
import ast
import importlib
import importlib.util
import os
import pkgutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

import peft_elastic.cli
from peft_elastic.common import ranks
from peft_elastic.common.writing import write_error
from peft_elastic.version import __version__

from ._options import summary


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


def build_parser(argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Make the parser with a subparser for every module of `peft_elastic.cli`.

    Args:
        argv: a command line. All commands are then listed, but that one alone is imported whose name is in it: the others import
            torch and more for options that nobody asks for.
    """
    parser = argparse.ArgumentParser(
        prog="peft-elastic",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"peft-elastic {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND [OPTION]", required=True)
    named = None if argv is None else next((word for word in argv if not word.startswith("-")), "")
    for name in _commands():
        if named in (None, name):
            importlib.import_module(f"peft_elastic.cli.{name}").add_parser(subparsers)
            subparsers.choices[name].add_argument(
                "--traceback", action="store_true", help="on an error, show where in the code it came from"
            )
        else:
            subparsers.add_parser(name, help=summary(_docstring(name)))
    return parser


def _commands() -> list[str]:
    names = {module.name for module in pkgutil.iter_modules(peft_elastic.cli.__path__)} - {"main"}
    in_order = sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
    return [name for name in in_order if not name.startswith("_")]


def _docstring(command: str) -> str | None:
    """Read that of the command's module, which is read and not run."""
    spec = importlib.util.find_spec(f"peft_elastic.cli.{command}")
    source = getattr(spec and spec.loader, "get_source", lambda _: None)(f"peft_elastic.cli.{command}")
    return ast.get_docstring(ast.parse(source)) if source else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit status.

    0 for success, 2 for bad input and full disks (argparse's own errors, and a ValueError or OSError from the command, of
    which one line is printed), 130 when interrupted. Any other exception is a bug, and is not caught.

    Of several processes that a launcher has started, the main one prints, and the first one to fail says why.
    """
    args = None
    try:
        argv = sys.argv[1:] if argv is None else argv
        with _silent_unless_main(errors=True):
            args = build_parser(argv).parse_args(argv)
        peft_elastic.register()
        if ranks.world_size() == 1:
            status = args.run(args)
        else:
            status = _run_with_others(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Whoever read our output has gone, as in `peft-elastic info | head -1`. Nothing is left to say, but the
        # interpreter would complain when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if ranks.world_size() > 1 and not (args and args.traceback) and not ranks.is_first_to_fail():
            return 2
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
        if ranks.is_first_to_fail():
            print("peft-elastic: interrupted", file=sys.stderr)
        return 130


def _run_with_others(args: argparse.Namespace) -> int:
    """Run a command in one of several processes.

    Raises:
        ValueError: if the command is one for a single process, `--device` is one GPU for all, or `--workers` asks for more processes.
    """
    number = ranks.world_size()
    if not getattr(args, "several_processes", False):
        raise ValueError(
            f"This command runs in one process, and a launcher such as torchrun has started {number}, which would write over each "
            "other's files: start it without."
        )
    device = getattr(args, "device", None)
    if device is not None and ":" in device:
        raise ValueError(
            f"`--device` {device!r} is one device for all {number} processes: leave it out, and each takes the GPU of its local rank."
        )
    if getattr(args, "workers", None) is not None:
        raise ValueError(
            f"`--workers` is for a run of one process: the {number} that a launcher such as torchrun has started share the work already."
        )
    # the launcher ends the processes that are left when one has failed; they then clean up as after Ctrl-C
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    ranks.join(device)
    with _silent_unless_main():
        status = args.run(args)
    ranks.leave()
    return status


@contextmanager
def _silent_unless_main(errors: bool = False) -> Iterator[None]:
    """Prints nothing inside, in other processes than the main one; of `errors`, nothing either."""
    with ExitStack() as stack:
        if not ranks.is_main():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            if errors:
                stack.enter_context(redirect_stderr(nowhere))
        yield
