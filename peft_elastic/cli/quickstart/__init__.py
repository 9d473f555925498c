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
"""`peft-elastic quickstart`: the whole path on a small model, in minutes.

`base` has the stages that its two paths share, `pruned` and `width` have the others; `checklist` runs them in order, `reload` and
`serving` are what runs in other processes, `report` is the table at the end, `smoke` a tiny model for a trial.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import transformers

from peft_elastic.pruning import WandaConfig

from .. import _common, _data
from .._options import positive_int, summary
from .plan import SMOKE, Plan


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help=summary(__doc__),
        description="Prune a small language model, train an elastic super-adapter on it that keeps the zeros, search that for a\n"
        "subnet, merge the subnet into the model, deploy that on the sparse CPU kernel; train on with the rounding to 4\n"
        "bits, and deploy that as well. Load the results in other processes, and compare everything on held-out data.\n"
        "Without options: SmolLM2-135M-Instruct and the sentiment of movie reviews, both from the Python package\n"
        "index; 10 minutes at most on two cores, 4 GB of memory, 1.3 GB in --out. Interrupted, the same command continues.\n"
        "With --width the model is not pruned but made narrower and shorter: sort its heads and channels by importance,\n"
        "train a super-network of elastic width, depth and rank, search it for a subnet of at most --max-parameters,\n"
        "extract that as an ordinary smaller model, and compare.",
        epilog="examples:\n"
        "  peft-elastic quickstart\n"
        "  peft-elastic quickstart --width --max-parameters 70%%\n"
        "  peft-elastic quickstart --sparsity 0.6 --steps 100 --evals 60 --out quickstart-60\n"
        "  peft-elastic quickstart --model Qwen/Qwen2.5-0.5B --dataset stanfordnlp/sst2 \\\n"
        "      --template 'Review: {}\\nSentiment:' --out quickstart-qwen",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan = Plan()
    _common.add_model_arguments(parser, required=False, more_help=" (default: SmolLM2-135M-Instruct, downloaded once)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for everything (default: quickstart, or quickstart-width)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="delete what an earlier run left in --out, and start again"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="only see that it runs: a tiny random model, made-up data"
    )
    _common.add_seed_argument(parser, "everything random")
    parser.add_argument("--width", action="store_true", help="elastic width and depth instead of pruning")
    parser.add_argument(
        "--max-parameters", metavar="B", help="with --width: a number, or a share of all such as 80%% (default: 80%%)"
    )
    parser.add_argument("--sparsity", type=float, help=f"of the pruned model (default: {plan.sparsity})")
    parser.add_argument("--steps", type=positive_int, help=f"optimizer steps (default: {plan.steps})")
    parser.add_argument("--evals", type=positive_int, help=f"evaluations of the search (default: {plan.evals})")
    _data.add_data_arguments(
        parser,
        "use, split by the quickstart itself; labels of a few kinds (default: the movie reviews)",
        required=False,
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    changes = {name: value for name in ("sparsity", "steps", "evals") if (value := getattr(args, name)) is not None}
    plan = dataclasses.replace(SMOKE if args.smoke else Plan(), **changes)
    if args.width and args.sparsity is not None:
        raise ValueError("`--sparsity` goes without `--width`, which prunes nothing.")
    if args.max_parameters is not None and not args.width:
        raise ValueError("`--max-parameters` goes with `--width`.")
    args.out = args.out or Path("quickstart-width" if args.width else "quickstart")
    WandaConfig(sparsity=plan.sparsity)  # raises if it is out of range
    if args.smoke and (args.model or args.dataset):
        raise ValueError("`--smoke` makes its own model and data; leave `--model` and `--dataset` out.")
    if args.out.exists() and not (args.out / "stages.json").is_file():
        _common.check_new_folder(args.out)
    elif args.fresh and args.out.exists():
        shutil.rmtree(args.out)
    transformers.utils.logging.disable_progress_bar()  # models load in a second
    from . import pruned, width  # not for `--help`, nor in the processes that run `serving`

    (width.WidthQuickstart if args.width else pruned.PrunedQuickstart)(args, plan).run()
    return 0
