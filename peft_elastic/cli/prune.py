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
"""`peft-elastic prune`: set the least important weights of a model to zero."""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peft_elastic import MagnitudeConfig, WandaConfig, assets, prune

from . import _common, _data


_METHODS = {"magnitude": MagnitudeConfig, "wanda": WandaConfig}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "prune",
        help="set the least important weights of a model to zero",
        description="Set the least important weights of the linear layers in the transformer blocks to zero, and save\n"
        "the model as an ordinary checkpoint, as large as before. Wanda weighs a weight by the activations it\n"
        "meets on calibration data: use text that resembles what the model will see, in any amount.\n"
        "Magnitude looks at the weights alone.",
        epilog="examples:\n"
        "  peft-elastic prune --model HuggingFaceTB/SmolLM2-135M-Instruct --sparsity 0.5 --out pruned\n"
        "  peft-elastic prune --model ./my-model --sparsity 0.5 --dataset train.jsonl --out pruned\n"
        "  peft-elastic prune --model ./my-model --pattern 2:4 --dataset wikitext:wikitext-2-raw-v1 --out pruned\n"
        "  peft-elastic prune --model ./my-model --method magnitude --sparsity 0.3 --out pruned",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _common.add_model_arguments(parser)
    parser.add_argument("--sparsity", type=float, help="share of the weights to set to zero, e.g. 0.5")
    parser.add_argument("--pattern", metavar="N:M", help="instead: keep N of every M consecutive weights, e.g. 2:4")
    parser.add_argument("--method", choices=sorted(_METHODS), default="wanda", help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the pruned model")
    _common.add_seed_argument(parser, "the choice of calibration data")
    _data.add_data_arguments(
        parser,
        "calibrate with (wanda only; default: short movie reviews, downloaded once)",
        required=False,
        samples=128,
        samples_help="calibrate with N sequences of --max-length tokens (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    config = _METHODS[args.method](sparsity=args.sparsity, pattern=args.pattern)
    if args.method == "magnitude" and args.dataset:
        raise ValueError("`--dataset` is of no use with `--method magnitude`, which looks at the weights alone.")
    _common.check_new_folder(args.out)
    tokenizer = _common.load_tokenizer(args.model, required=args.method == "wanda")
    calibration = None
    if args.method == "wanda":
        calibration = calibration_batches(tokenizer, calibration_texts(args), args.samples, args.max_length, args.seed)
    model = _common.load_model(args.model, args.dtype, args.device)
    report = prune(model, config, calibration)
    print(report)
    with _common.new_folder(args.out) as folder:
        _common.save_model(model, tokenizer, folder)
        report.save(folder / "pruning_report.json")
    _common.say_written(
        [(args.out, "the pruned model"), (args.out / "pruning_report.json", "the sparsity of every layer")],
        ["peft-elastic", "train", "--model", args.out, "--dataset", args.dataset or "YOUR_DATA", "--out", "adapter"],
    )
    return 0


def calibration_texts(args: argparse.Namespace) -> list[str]:
    """Those of `--dataset`, or movie reviews."""
    if args.dataset:
        return [example.text for example in _data.read_examples(args)]
    print("No --dataset given: calibrating with movie reviews. Text like your own would do better.")
    return list(assets.movie_reviews()["text"])


def calibration_batches(
    tokenizer: Any, texts: Sequence[str], sequences: int, length: int, seed: int
) -> list[torch.Tensor]:
    """Texts in random order, joined and cut into at most `sequences` pieces of `length` tokens; batches of 8 pieces."""
    shuffled = random.Random(seed).sample(texts, len(texts))
    return list(torch.tensor(_data.pack(tokenizer, shuffled, length, limit=sequences)).split(8))
