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
"""`peft-elastic bench`: what the sparse kernels gain on this machine."""

from __future__ import annotations

import argparse
import re
from typing import Any

import torch

from peft_elastic import MagnitudeConfig, optimize_generation, prune, restore_generation, sparsify_linears
from peft_elastic.common.checks import wrong
from peft_elastic.cost.timing import measure
from peft_elastic.layers import extension
from peft_elastic.layers.values import ROUNDED

from . import _common
from ._evaluation import tokens_per_second
from ._options import default_of, positive_int, summary


_SHAPES = ["4096x4096", "11008x4096", "4096x11008", "576x1536"]


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "bench",
        help=summary(__doc__),
        description="Without a model: time dense against sparse layers, one token, weights that are not in the caches.\n"
        "With one: say which of its layers the sparse kernel makes faster here, and time its generation before\n"
        "and after the swap. Nothing is written but the cache of measurements.",
        epilog="examples:\n"
        "  peft-elastic bench\n"
        "  peft-elastic bench --shapes 2048x8192 --sparsity 0.6 --values int8\n"
        "  peft-elastic bench --model pruned\n"
        "  peft-elastic bench --model Qwen/Qwen2.5-0.5B --sparsity 0.5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="NAME", help="a causal language model: a name on the hub, or a folder")
    parser.add_argument(
        "--dtype", choices=_common.DTYPES[1:], help="of the dense layers (default: float32; of a model: its own)"
    )
    parser.add_argument(
        "--values",
        choices=ROUNDED,
        default=default_of(sparsify_linears, "dtype"),
        help="of the sparse layers (default: %(default)s)",
    )
    parser.add_argument(
        "--sparsity",
        type=float,
        nargs="+",
        help="shares of zeros to time (default: 0.5 0.7); with --model one, to prune it to by magnitude first, which does "
        "not keep its quality (default: as it is)",
    )
    parser.add_argument(
        "--shapes", nargs="+", default=_SHAPES, metavar="OUTxIN", help=f"layers to time (default: {' '.join(_SHAPES)})"
    )
    parser.add_argument("--threads", type=positive_int, help="to use (default: all)")
    parser.add_argument(
        "--tokens", type=positive_int, default=64, help="to generate with --model (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    shapes = [_shape(text) for text in args.shapes]
    for sparsity in args.sparsity or ():
        if not 0 <= sparsity <= 1:
            raise wrong("--sparsity", "a share from 0 to 1", sparsity)
    if args.model and len(args.sparsity or ()) > 1:
        raise ValueError("`--sparsity` takes one number with `--model`.")
    if not extension.is_built():
        raise ValueError(
            "the C++ extension with the sparse kernels is not there; `peft-elastic info` says how to get it."
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.model:
        _bench_model(args)
    else:
        _bench_layers(args, shapes)
    return 0


def _shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,6})x([1-9]\d{0,6})", text)
    if match is None:
        raise wrong("--shapes", "OUTxIN, such as 4096x11008", text)
    return int(match[1]), int(match[2])


def _bench_layers(args: argparse.Namespace, shapes: list[tuple[int, int]]) -> None:
    dtype = args.dtype or "float32"
    print(
        f"Kernel level {extension.selected_level()}, {torch.get_num_threads()} thread(s). One row of {dtype} activations, "
        "medians, weights read from memory."
    )
    print(f"{'out x in':<14}{'zeros':>7}{'dense ' + dtype:>17}{'sparse ' + args.values:>15}{'speed-up':>10}")
    for out_features, in_features in shapes:
        for sparsity in args.sparsity or (0.5, 0.7):
            found = measure(out_features, in_features, sparsity, args.values, getattr(torch, dtype))
            print(
                f"{f'{out_features}x{in_features}':<14}{sparsity:>7.0%}{1e3 * found.dense:>14.3f} ms"
                f"{1e3 * found.sparse:>12.3f} ms{found.dense / found.sparse:>9.2f}x",
                flush=True,
            )


def _bench_model(args: argparse.Namespace) -> None:
    model = _common.load_causal_lm(args.model, args.dtype or "auto", "cpu").eval()
    if args.sparsity:
        prune(model, MagnitudeConfig(sparsity=args.sparsity[0]))
    dense = _speeds(model, args.tokens)
    print(sparsify_linears(model, args.values))
    sparse = _speeds(model, args.tokens)
    print(f"\nTokens a second ({args.tokens} new tokens after 32, one sequence, median of 3):")
    print(f"{'':<22}{'dense':>8}{'sparse':>8}")
    for name, before in dense.items():
        print(f"{name:<22}{before:>8.1f}{sparse[name]:>8.1f}")


def _speeds(model: Any, new_tokens: int) -> dict[str, float]:
    speeds = {"generate": tokens_per_second(model, 32, new_tokens, repeats=3)}
    try:
        optimize_generation(model)
    except ValueError as error:
        print(f"Without optimize_generation: {error}")
        return speeds
    speeds["optimize_generation"] = tokens_per_second(model, 32, new_tokens, repeats=3)
    restore_generation(model)
    return speeds
