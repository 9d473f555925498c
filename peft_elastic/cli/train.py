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
"""`peft-elastic train`: train an elastic LoRA super-adapter on a (pruned) model, or all of its weights as a super-network."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import TrainingArguments, set_seed

from peft_elastic import (
    Bounds,
    ElasticConfig,
    ElasticLoraConfig,
    ElasticModel,
    SparseQALoraConfig,
    SubnetSamplingCallback,
    get_elastic_model,
)
from peft_elastic.common import ranks
from peft_elastic.common.checks import wrong
from peft_elastic.layers.grid import BITS
from peft_elastic.structure.importance import MEASURED
from peft_elastic.supernet.samplers import STRATEGIES

from . import _common, _data
from ._examples import encode
from ._options import Noted, default_of, positive_int, summary
from ._training import fit, last_checkpoint, sort


# Of BERT's authors, and of EFTNAS: all weights take smaller steps than an adapter's.
_FULL_LR = 2e-5


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "train",
        help=summary(__doc__),
        description="Train one LoRA adapter whose ranks can be chosen afterwards, module group by module group: every\n"
        "optimizer step trains another random choice. The base model stays as it is. The defaults are those of\n"
        "the Shears paper, for 3 epochs; see the documentation of transformers' Trainer for what it does.\n"
        "With --elastic-width and --elastic-depth the base itself can become smaller: merging such an adapter writes a\n"
        "model with fewer heads, channels and blocks (LoNAS).\n"
        "With --full there is no adapter: all weights of the model are trained, as a super-network whose subnets have\n"
        "those widths and blocks. What is written is an ordinary checkpoint, which search and merge make smaller.",
        epilog="examples:\n"
        "  peft-elastic train --model pruned --dataset train.jsonl --out adapter\n"
        "  peft-elastic train --model pruned --dataset stanfordnlp/sst2 --template 'Review: {}\\nSentiment:' \\\n"
        "      --r 32 --ranks 32 24 16 --groups q_proj,k_proj,v_proj up_proj,gate_proj down_proj --out adapter\n"
        "  peft-elastic train --model pruned --dataset train.jsonl --sparse-adapter --bits 4 --out adapter\n"
        "  peft-elastic train --model dense --dataset train.jsonl --elastic-width heads=1.0,0.75 mlp=1.0,0.75,0.5 \\\n"
        "      --elastic-depth 4-20 --strategy sandwich --distillation max --out adapter\n"
        "  peft-elastic train --full --model dense --dataset train.jsonl --elastic-width heads=1.0,0.75 mlp=1.0,0.5 \\\n"
        "      --strategy sandwich --distillation max --out supernet\n"
        "  peft-elastic train --model pruned --dataset train.jsonl --out adapter --resume     after an interruption\n"
        "  torchrun --nproc-per-node 4 -m peft_elastic train --model pruned --dataset train.jsonl --out adapter",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _common.add_model_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="new folder for the adapter or, with --full, the super-network",
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="train all weights of the model and no adapter; needs --elastic-width, --elastic-depth or both, and memory for four copies "
        "of the weights. They are trained in float32 unless --dtype says otherwise",
    )
    _common.add_seed_argument(parser, "everything random")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue an interrupted training from its last checkpoint in DIR-checkpoints",
    )

    adapter = parser.add_argument_group("adapter", "None of these goes with --full.")
    # torchrun and `accelerate launch` take `--r` for an abbreviation of options of their own
    adapter.add_argument(
        "--r",
        "--max-rank",
        action=Noted,
        type=int,
        default=32,
        help="largest rank; --max-rank under torchrun (default: %(default)s)",
    )
    adapter.add_argument(
        "--ranks",
        action=Noted,
        type=int,
        nargs="+",
        metavar="K",
        help="ranks to choose from (default: r, 3/4 r and 1/2 r)",
    )
    adapter.add_argument("--alpha", action=Noted, type=int, metavar="ALPHA", help="lora_alpha (default: 2 r)")
    adapter.add_argument(
        "--dropout", action=Noted, type=float, default=0.1, help="of the adapter's inputs (default: %(default)s)"
    )
    adapter.add_argument(
        "--targets",
        action=Noted,
        nargs="+",
        default=["all-linear"],
        metavar="MODULE",
        help="module names (default: all-linear)",
    )
    adapter.add_argument(
        "--groups",
        action=Noted,
        nargs="+",
        default=[default_of(ElasticLoraConfig, "rank_groups")],
        metavar="GROUP",
        help="which modules share one rank: 'module' (none), 'block' (all of a transformer block), or groups of names "
        "tied in each block, such as: q_proj,k_proj,v_proj up_proj,gate_proj down_proj (default: module)",
    )

    adapter.add_argument(
        "--sparse-adapter",
        action=Noted,
        nargs=0,
        const=True,
        default=False,
        help="mask the update by the zeros of the pruned model, which merging then keeps (SparsePEFT)",
    )
    adapter.add_argument(
        "--bits",
        action=Noted,
        type=int,
        choices=BITS,
        help="train with the rounding to so many bits, which merging then keeps exactly (QA-SparsePEFT)",
    )
    adapter.add_argument(
        "--group-size",
        action=Noted,
        type=int,
        metavar="N",
        help="inputs that share a scale, with --bits (default: 128)",
    )

    structure = parser.add_argument_group("width and depth of the base")
    structure.add_argument(
        "--elastic-width",
        nargs="+",
        metavar="KIND=W,W",
        help="widths that every transformer block may take, as shares or whole numbers: heads=1.0,0.75 mlp=1.0,0.75,0.5",
    )
    structure.add_argument(
        "--elastic-depth",
        nargs="+",
        metavar="BLOCK",
        help="blocks that may be skipped: numbers, ranges such as 4-8, or all; with .attention or .mlp behind it a part, "
        "such as all.mlp",
    )
    structure.add_argument(
        "--bounds",
        metavar="FILE",
        help="instead of these two, what bounds_by_importance of the Python API has found for each block; --importance has to be what gave "
        "its scores",
    )
    structure.add_argument(
        "--importance",
        choices=MEASURED,
        default=default_of(ElasticLoraConfig, "importance"),
        help="what heads and channels are sorted by before the training, so that narrow subnets keep the best (default: "
        "%(default)s)",
    )
    structure.add_argument(
        "--calibration",
        type=positive_int,
        default=128,
        metavar="N",
        help="training examples that activation and gradient are measured on (default: %(default)s)",
    )

    training = parser.add_argument_group("training")
    training.add_argument(
        "--strategy",
        choices=tuple(STRATEGIES),
        default=default_of(SubnetSamplingCallback, "strategy"),
        help="which subnets a step trains: one, with every choice drawn on its own, or sizes evenly; or the largest, the "
        "smallest and two random ones (default: %(default)s)",
    )
    training.add_argument(
        "--distillation",
        choices=("max",),
        help="with --strategy sandwich: the other subnets of a step learn from the largest (default: from the labels alone)",
    )
    training.add_argument(
        "--lr",
        action=Noted,
        type=float,
        default=3e-4,
        help=f"peak learning rate (default: %(default)s, with --full {_FULL_LR})",
    )
    training.add_argument(
        "--batch-size", type=positive_int, default=16, help="examples per step and device (default: %(default)s)"
    )
    training.add_argument(
        "--epochs",
        type=float,
        default=default_of(TrainingArguments, "num_train_epochs"),
        help="passes over the data (default: %(default)s)",
    )
    training.add_argument("--steps", type=positive_int, help="optimizer steps, instead of --epochs")
    training.add_argument(
        "--save-steps", type=positive_int, default=100, help="steps between checkpoints (default: %(default)s)"
    )
    _data.add_data_arguments(parser, "train on")
    parser.set_defaults(run=run, several_processes=True, given={})


def run(args: argparse.Namespace) -> int:
    config: Any = _full_config(args) if args.full else _adapter_config(args)
    if args.distillation and args.strategy != "sandwich":
        raise ValueError(
            "`--distillation max` goes with `--strategy sandwich`, whose steps begin with the max subnet."
        )
    checkpoints = args.out.with_name(f"{args.out.name}-checkpoints")
    if ranks.is_main():
        _check_folders(args.out, checkpoints, args.resume)
    # the others wait: for folders that are checked before anybody writes into them, and for data that is prepared once
    with ranks.main_first():
        examples = _data.read_examples(args, args.samples)
    tokenizer = _common.load_tokenizer(args.model)
    features = encode(tokenizer, examples, args.max_length)
    print(f"{len(features)} training examples, of {len(examples)} read")
    calibration = features[: args.calibration]
    model = (
        _make_full(args, config, calibration, checkpoints) if args.full else _make_adapter(args, config, calibration)
    )
    length = {"num_train_epochs": args.epochs} if args.steps is None else {"max_steps": args.steps}
    try:
        fit(
            model,
            features,
            checkpoints,
            strategy=args.strategy,
            seed=args.seed,
            distillation=args.distillation,
            learning_rate=_FULL_LR if args.full and "lr" not in args.given else args.lr,
            per_device_train_batch_size=args.batch_size,
            save_steps=args.save_steps,
            out=args.out,
            tokenizer=tokenizer if args.full else None,
            **length,
        )
    except KeyboardInterrupt:
        if last_checkpoint(checkpoints):
            print(f"\nThe last checkpoint is in {checkpoints}; the same command with --resume continues from there.")
        raise
    finally:
        # nor half of one is left to be in the way of the next attempt
        if ranks.is_main() and not last_checkpoint(checkpoints):
            shutil.rmtree(checkpoints, ignore_errors=True)
    if ranks.is_main():
        shutil.rmtree(checkpoints, ignore_errors=True)
    written = "the super-adapter, with the max subnet active"
    model_words = ["--model", args.model, "--adapter", args.out]
    if args.full:
        written = "the super-network: a checkpoint of the largest subnet, which is active, and what is elastic in it"
        model_words = ["--model", args.out]
    _common.say_written(
        [(args.out, written)],
        ["peft-elastic", "search", *model_words, "--dataset", "VALIDATION_DATA", "--out", "search"],
    )
    return 0


def _adapter_config(args: argparse.Namespace) -> ElasticLoraConfig:
    if args.group_size is not None and args.bits is None:
        raise ValueError("`--group-size` goes with `--bits`.")
    config_class, options = ElasticLoraConfig, {}
    if args.sparse_adapter or args.bits is not None:
        config_class, options = SparseQALoraConfig, {"sparse_adapter": args.sparse_adapter}
        if args.bits is not None:
            options |= {"quantization_aware": True, "bits": args.bits, "group_size": args.group_size}
    return config_class(
        r=args.r,
        elastic_ranks=args.ranks,
        lora_alpha=2 * args.r if args.alpha is None else args.alpha,
        lora_dropout=args.dropout,
        target_modules=args.targets[0] if args.targets == ["all-linear"] else args.targets,
        rank_groups=parse_groups(args.groups),
        importance=args.importance,
        task_type="CAUSAL_LM",
        **_width_and_depth(args),
        **options,
    )


def _full_config(args: argparse.Namespace) -> ElasticConfig:
    of_adapters = [option for name, option in args.given.items() if name != "lr"]
    if of_adapters:
        raise ValueError(f"`{of_adapters[0]}` is of an adapter, and `--full` trains the model without one.")
    elastic = _width_and_depth(args)
    if not any(elastic.values()):
        raise ValueError(
            "`--full` needs `--elastic-width`, `--elastic-depth` or both: nothing of the model would be elastic."
        )
    return ElasticConfig(**elastic, importance=args.importance)


def _width_and_depth(args: argparse.Namespace) -> dict[str, Any]:
    if args.bounds is None:
        return {"elastic_width": parse_width(args.elastic_width), "elastic_depth": args.elastic_depth}
    if args.elastic_width or args.elastic_depth:
        raise ValueError("`--bounds` goes without `--elastic-width` and `--elastic-depth`, which it gives.")
    bounds = Bounds.load(args.bounds)
    return {"elastic_width": bounds.elastic_width, "elastic_depth": bounds.elastic_depth}


def _load_base(args: argparse.Namespace, dtype: str) -> Any:
    base = _common.load_causal_lm(args.model, dtype, args.device)
    if args.bounds is not None:
        Bounds.load(args.bounds).check(base)
    return base


def _make_adapter(args: argparse.Namespace, config: ElasticLoraConfig, calibration: Any) -> Any:
    base = _load_base(args, args.dtype)
    set_seed(args.seed)  # of the initial weights
    model = get_peft_model(base, config)
    sort(model, calibration)
    model.print_trainable_parameters()
    return model


def _make_full(args: argparse.Namespace, config: ElasticConfig, calibration: Any, checkpoints: Path) -> ElasticModel:
    # what the optimizer adds to a weight at a time is less than the last bit of one in half precision
    dtype = "float32" if args.dtype == "auto" else args.dtype
    checkpoint = ranks.share(last_checkpoint(checkpoints) if args.resume else None)
    if checkpoint is not None:
        # in its order: another run of the calibration may find another one, in which its weights are not
        model = _common.load_supernet(checkpoint, dtype, args.device)
        if model.elastic_config != config:
            raise ValueError(
                f"`--resume`: {checkpoint!r} was made with other `--elastic-width`, `--elastic-depth` or `--importance`."
            )
    else:
        base = _load_base(args, dtype)
        if getattr(base.config, "quantization_config", None) is not None:
            raise ValueError(f"`--full` trains all weights, and those of `--model` {args.model!r} are packed.")
        model = get_elastic_model(base, config)
        sort(model, calibration)
    print(
        f"training all {sum(parameter.numel() for parameter in model.parameters()):,d} parameters; {model.search_space}"
    )
    return model


def _check_folders(out: Path, checkpoints: Path, resume: bool) -> None:
    if (out / "adapter_config.json").is_file() or _common.is_supernet(out):  # finished, and killed before this
        shutil.rmtree(checkpoints, ignore_errors=True)
    _common.check_new_folder(out)
    if resume and not last_checkpoint(checkpoints):
        raise ValueError(f"`--resume`: there is no checkpoint in {os.fspath(checkpoints)!r}.")
    if not resume:
        _common.check_new_folder(checkpoints)


def parse_groups(words: Sequence[str]) -> str | list[list[str]]:
    """Make `rank_groups` of an `ElasticLoraConfig` from the words of the command line."""
    if len(words) == 1 and words[0] in ("module", "block"):
        return words[0]
    return [[name for name in word.split(",") if name] for word in words]


def parse_width(words: Sequence[str] | None) -> dict[str, Any] | None:
    """Make `elastic_width` of an `ElasticLoraConfig` from the words of the command line, `heads=1.0,0.5`.

    Raises:
        ValueError: if a word is of another form.
    """
    widths: dict[str, list[int | float]] = {}
    for word in words or ():
        kind, _, values = word.partition("=")
        try:
            widths[kind] = [int(value) if value.isdecimal() else float(value) for value in values.split(",")]
        except ValueError:
            raise wrong(
                "--elastic-width", "heads=... or mlp=... with shares or whole numbers, such as mlp=1.0,0.75", word
            ) from None
    return widths or None
