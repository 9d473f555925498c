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
"""`peft-elastic prune`: set the least important weights of a model to zero, or make it smaller."""

from __future__ import annotations

import argparse
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from peft_elastic import prune, prune_folder
from peft_elastic.common import assets
from peft_elastic.pruning import PRUNING_METHODS
from peft_elastic.pruning.structured import STRUCTURED_METHODS

from . import _common, _data, _methods, _structured
from ._examples import pack


_DEFAULT = "wanda"
_CONFIGS = {name: PRUNING_METHODS[name].config for name in sorted(PRUNING_METHODS, key=lambda name: name != _DEFAULT)}
# `--samples` says how many there are
_WITHOUT = ("target_modules", "exclude_modules", "max_samples")
_SAMPLES = 128


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "prune",
        help="set the least important weights of a model to zero, or make it smaller",
        description="Set the least important weights of the linear layers in the transformer blocks to zero, and save\n"
        "the model as an ordinary checkpoint, as large as before. Wanda weighs a weight by the activations it\n"
        "meets on calibration data: use text that resembles what the model will see, in any amount.\n"
        "SparseGPT, slower, lets the weights that stay make up for those that go. Magnitude looks at the weights alone.\n"
        "With --structured, remove whole attentions, MLPs, channels and heads instead (MultiPruner), and save what is\n"
        "left as a smaller model. It evaluates the model many times: fewer --samples of a smaller --max-length are\n"
        "faster. Interrupted, the same command continues where it stopped. With --stream as well, it carries out a --plan, or\n"
        "chooses by scores alone (--method width --choose uniform), which needs no model in memory.",
        epilog="examples:\n"
        "  peft-elastic prune --model HuggingFaceTB/SmolLM2-135M-Instruct --sparsity 0.5 --out pruned\n"
        "  peft-elastic prune --model ./my-model --sparsity 0.5 --dataset train.jsonl --out pruned\n"
        "  peft-elastic prune --model ./my-model --pattern 2:4 --dataset wikitext:wikitext-2-raw-v1 --out pruned\n"
        "  peft-elastic prune --model ./my-model --method sparsegpt --sparsity 0.5 --dataset train.jsonl --out pruned\n"
        "  peft-elastic prune --model ./my-model --method magnitude --sparsity 0.3 --out pruned\n"
        "  peft-elastic prune --model ./larger-than-memory --sparsity 0.5 --dataset train.jsonl --out pruned --stream\n"
        "  peft-elastic prune --model ./my-model --structured --ratio 0.1 --dataset train.jsonl --out pruned\n"
        "  peft-elastic prune --model ./my-model --structured --method width --choose uniform --ratio 0.2 --out pruned\n"
        "  peft-elastic prune --model ./my-model --structured --plan pruned/plan.json --out again\n"
        "  peft-elastic prune --model ./larger-than-memory --structured --plan pruned/plan.json --out smaller --stream",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _common.add_model_arguments(parser)
    _common.add_stream_argument(parser)
    _common.add_activations_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the pruned model")
    parser.add_argument(
        "--method",
        choices=(*sorted(PRUNING_METHODS), *STRUCTURED_METHODS),
        help=f"{', '.join(_CONFIGS)} (default: {_DEFAULT}); with --structured {_structured.METHODS_HELP}",
    )
    _common.add_seed_argument(parser, "the choice of calibration data, and of --choose random")
    zeros = parser.add_argument_group("zeros")
    _methods.add_options(zeros, _CONFIGS, _WITHOUT)
    _structured.add_arguments(parser)
    _data.add_data_arguments(
        parser,
        "calibrate with (not for magnitude and --plan; default: short movie reviews, downloaded once)",
        required=False,
        samples_help=f"calibrate with N sequences of --max-length tokens (default: {_SAMPLES}; with --structured "
        f"{_structured.SAMPLES})",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    methods: Collection[str] = STRUCTURED_METHODS if args.structured else PRUNING_METHODS
    needed = "with" if args.structured else "without"
    if args.method is not None and args.method not in methods:
        other = "without" if args.structured else "with"
        raise ValueError(
            f"`--method {args.method}` goes {other} `--structured`; {needed} it are {', '.join(methods)}."
        )
    if args.structured:
        if args.plan is not None and args.method is not None:
            raise ValueError("`--method` is of no use with `--plan`, which says what to remove.")
        for name, value in ((name, getattr(args, name)) for name in _methods.fields_of(_CONFIGS, _WITHOUT)):
            if value is not None:
                why = ", whose share of the model is `--ratio`" if name in ("sparsity", "pattern") else ""
                raise ValueError(f"`{_methods.option_of(name)}` goes without `--structured`{why}.")
        return _structured.run(args, lambda tokenizer: _calibration(args, tokenizer, _structured.SAMPLES))
    _structured.check_absent(args)
    method = PRUNING_METHODS[args.method or _DEFAULT]
    if args.dataset and not method.calibrated:
        raise ValueError(f"`--dataset` is of no use with `--method {method.name}`, which looks at the weights alone.")
    config = method.config(**_methods.given(args, _CONFIGS, method.name, _WITHOUT))
    stream = _common.streams(args, args.model)
    if not stream:
        _common.check_no_activations(args)
        _common.check_new_folder(args.out)
    tokenizer = _common.load_tokenizer(args.model, required=method.calibrated)
    calibration = _calibration(args, tokenizer, _SAMPLES) if method.calibrated else None
    if stream:
        device = _common.usable_device(args.device)
        report = prune_folder(
            args.model,
            args.out,
            config,
            calibration,
            dtype=args.dtype,
            device=device,
            activations_on_disk=args.activations_on_disk,
        )
        print(report)
        report.save(args.out / "pruning_report.json")
    else:
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


def _calibration(args: argparse.Namespace, tokenizer: Any, samples: int) -> list[torch.Tensor]:
    texts = calibration_texts(args)
    return calibration_batches(tokenizer, texts, args.samples or samples, args.max_length, args.seed)


def calibration_texts(args: argparse.Namespace) -> list[str]:
    """Those of `--dataset`, or movie reviews."""
    if args.dataset:
        return [example.text for example in _data.read_examples(args)]
    print("No --dataset given: calibrating with movie reviews. Text like your own would do better.")
    return list(assets.movie_reviews()["text"])


def calibration_batches(
    tokenizer: Any, texts: Sequence[str], sequences: int, length: int, seed: int
) -> list[torch.Tensor]:
    """Texts in random order, joined and cut into at most `sequences` pieces of `length` tokens; batches of 8 pieces.

    Raises:
        ValueError: if they are less than one piece.
    """
    shuffled = random.Random(seed).sample(texts, len(texts))
    pieces = pack(tokenizer, shuffled, length, limit=sequences)
    if len(pieces[0]) < length:
        raise ValueError(
            f"the calibration text has {len(pieces[0])} tokens, less than one sequence of `--max-length` {length}: give a "
            "`--dataset` with more text, or a smaller `--max-length`."
        )
    return list(torch.tensor(pieces).split(8))
