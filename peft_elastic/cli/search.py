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
"""`peft-elastic search`: search the subnets of a super-adapter or super-network."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peft_elastic import LatencyModel, SearchResult, search_subnet
from peft_elastic.common import ranks
from peft_elastic.common.checks import wrong
from peft_elastic.cost.counts import COSTS
from peft_elastic.cost.latency import KERNELS, MODES
from peft_elastic.search import ALGORITHMS

from . import _common, _data, _evaluation
from ._options import default_of, parse_workload, positive_int, summary


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "search",
        help=summary(__doc__),
        description="Evaluate subnets of a trained super-adapter, or of a super-network of train --full, on validation data,\n"
        "guided by NSGA-II towards those that are good and small, and choose one. Use data that was neither trained on nor\n"
        "will be reported on.\n"
        "Interrupted, or asked for more evaluations, the same command continues where it stopped.\n"
        "Under torchrun or `accelerate launch` each process evaluates a share, with a copy of the model of its own.",
        epilog="examples:\n"
        "  peft-elastic search --adapter adapter --dataset validation.jsonl --evals 40 --out search\n"
        "  peft-elastic search --adapter adapter --dataset validation.jsonl --metric accuracy --max-drop 0.01 \\\n"
        "      --out search --select     the smallest subnet within a point of the largest; active from now on\n"
        "  peft-elastic search --adapter adapter --dataset validation.jsonl --cost parameters --budget 97% --out search\n"
        "  peft-elastic search --adapter adapter --dataset validation.jsonl --cost latency --max-latency 60% --out search\n"
        "  peft-elastic search --model supernet --dataset validation.jsonl --out search     one that train --full has written\n"
        "  peft-elastic search --adapter adapter --dataset validation.jsonl --workers 4 --out search     in four processes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _common.add_tuned_arguments(parser)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the history and the results"
    )
    _common.add_seed_argument(parser, "the search and of --samples")

    search = parser.add_argument_group("search")
    search.add_argument("--evals", type=int, default=40, metavar="N", help="evaluations (default: %(default)s)")
    search.add_argument(
        "--population",
        type=int,
        default=default_of(search_subnet, "population"),
        help="subnets per generation (default: %(default)s)",
    )
    search.add_argument(
        "--algorithm",
        choices=tuple(ALGORITHMS),
        default=default_of(search_subnet, "algorithm"),
        help="how subnets are proposed (default: %(default)s)",
    )
    search.add_argument(
        "--metric",
        choices=("loss", "accuracy"),
        default="loss",
        help="loss: of the labels, or of all tokens of plain text; accuracy: share of examples whose right choice is the "
        "most likely, for labels of a few kinds (default: %(default)s)",
    )
    search.add_argument(
        "--cost",
        choices=tuple(COSTS),
        default="macs",
        help="what to save (default: macs)",
    )
    search.add_argument(
        "--reference-point",
        action="append",
        nargs="+",
        metavar="NAME=X",
        help="for --algorithm r-nsga2, which prefers subnets near it: a value of the metric and one of the cost, such as loss=0.4 "
        "macs=1e8; may be given several times",
    )
    for name, cost in COSTS.items():
        search.add_argument(
            f"--max-{name}",
            metavar="B",
            help=f"evaluate only subnets of at most these {cost.unit}: a number, or a share of the max subnet's such as 75%%",
        )
    search.add_argument(
        "--latency-of",
        default="1x128",
        metavar="BxT",
        help="latency is that of B sequences of T tokens on this machine, once deployed (default: %(default)s)",
    )
    search.add_argument(
        "--latency-mode",
        choices=MODES,
        default="decode",
        help="of the whole sequences, or of one more token behind them (default: %(default)s)",
    )
    search.add_argument(
        "--latency-kernel",
        choices=KERNELS,
        default=default_of(LatencyModel, "kernel"),
        help="with the layers that `merge --sparse` would swap, all that can be or those that pay (default: %(default)s)",
    )
    search.add_argument("--batch-size", type=positive_int, default=16, help="default: %(default)s")
    search.add_argument(
        "--workers",
        type=positive_int,
        metavar="N",
        help="evaluate in so many processes of this machine, each with a copy of the model, on a GPU of its own if there are several; "
        "the result is the same (default: in this one)",
    )
    search.add_argument(
        "--worker-threads",
        type=positive_int,
        metavar="N",
        help="threads of each of them on a CPU, on which the last bits of a loss may depend (default: 1)",
    )

    choice = parser.add_argument_group("choice of the subnet")
    choice.add_argument(
        "--max-drop",
        type=float,
        metavar="X",
        help="the cheapest whose metric is at most X worse than that of the max subnet (default: the best)",
    )
    choice.add_argument(
        "--budget",
        metavar="B",
        help="only subnets of at most this cost: a number, or a share of the max subnet's such as 97%%",
    )
    choice.add_argument(
        "--select",
        action="store_true",
        help="make it the active subnet of the adapter or the super-network, a local folder",
    )
    _data.add_data_arguments(parser, "evaluate on")
    parser.set_defaults(run=run, several_processes=True)


def run(args: argparse.Namespace) -> int:
    budget = _parse_bound("budget", args.budget)
    bounds = {name: _parse_bound(f"max-{name}", getattr(args, f"max_{name}")) for name in COSTS}
    constraints = {name: bound for name, bound in bounds.items() if bound is not None}
    points = _parse_points(args)
    workload = parse_workload(args.latency_of)
    if args.worker_threads is not None and args.workers is None:
        raise ValueError("`--worker-threads` goes with `--workers`.")
    tuned = args.adapter or _common.check_supernet(args.model)
    if args.select and not Path(tuned).is_dir():
        kind = "adapter" if args.adapter else "super-network"
        raise ValueError(f"`--select` needs a local {kind}; {tuned!r} is no folder.")
    base = _common.base_model_name(args.model, args.adapter) if args.adapter else tuned
    examples = _data.read_examples(args, args.samples)
    tokenizer = _common.load_tokenizer(base)
    load = _Load(base, args.adapter, args.dtype, args.device)
    model = load()
    evaluate: Any
    if examples[0].choices:
        evaluate = _evaluation.ChoiceEvaluator(examples, tokenizer, args.batch_size)
    elif args.metric == "loss":
        evaluate = _evaluation.loss_evaluator(model, tokenizer, examples, args.max_length, args.batch_size)
    else:
        raise ValueError(
            "`--metric accuracy` needs labels of a few kinds, or a column 'choices'; this data has neither."
        )
    print(f"{len(examples)} validation examples; {model.search_space}")
    latency = None
    if args.cost == "latency" or "latency" in constraints:
        if ranks.is_main():  # the others would disturb it
            print(f"Measuring latencies of {args.latency_of} tokens ({args.latency_mode}) on this machine.")
            inputs = {"input_ids": workload}
            latency = LatencyModel(model, inputs, mode=args.latency_mode, kernel=args.latency_kernel)
        latency = ranks.share(latency)
    result = search_subnet(
        model,
        evaluate,
        objectives=(args.metric, args.cost),
        mode={"loss": "min", "accuracy": "max"}[args.metric],
        algorithm=args.algorithm,
        n_evals=args.evals,
        population=args.population,
        seed=args.seed,
        save_dir=args.out,
        latency=latency,
        constraints=constraints or None,
        reference_points=points,
        **_parallel(args, load),
    )
    if ranks.is_main():
        _write(args, model, base, result, budget)
    return 0


@dataclass(frozen=True)
class _Load:
    """Loads the model, in a worker as here."""

    base: str
    adapter: str | None  # None: the base is a super-network
    dtype: str
    device: str | None

    def __call__(self) -> Any:
        if self.adapter is None:
            return _common.check_causal_lm(_common.load_supernet(self.base, self.dtype, self.device), self.base)
        return _common.load_adapter(_common.load_causal_lm(self.base, self.dtype, self.device), self.adapter)


def _parallel(args: argparse.Namespace, load: _Load) -> dict[str, Any]:
    """Say who evaluates, in the words of `search_subnet`."""
    if ranks.world_size() > 1:
        return {"executor": "ranks"}
    if args.workers is None:
        return {}
    devices = None
    if args.device is None and torch.cuda.device_count() > 1:
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return {
        "executor": args.workers,
        "worker_model": load,
        "devices": devices,
        "worker_threads": args.worker_threads,
    }


def _write(args: argparse.Namespace, model: Any, base: str, result: SearchResult, budget: float | str | None) -> None:
    result.plot(args.out / "pareto.png")
    print(describe(result))
    chosen = result.best(max_drop=args.max_drop, budget=budget)
    chosen.save(args.out / "subnet.json")
    written = [
        (args.out / "search_result.json", "all evaluations; peft_elastic.SearchResult.load reads the folder"),
        (args.out / "pareto.png", "their plot"),
        (args.out / "subnet.json", f"the chosen subnet: evaluation {result.evaluation(chosen).index}"),
    ]
    if args.select:
        tuned, kind = (args.adapter, "adapter") if args.adapter else (base, "super-network")
        _common.set_active_subnet(model, chosen, Path(tuned))
        written.append((tuned, f"the {kind}, in which it is now active"))
    merge = ["peft-elastic", "merge", "--model", base]
    merge += ["--adapter", args.adapter, "--out", "merged"] if args.adapter else ["--out", "small"]
    _common.say_written(written, merge if args.select else [*merge, "--subnet", args.out / "subnet.json"])


def _parse_bound(option: str, text: str | None) -> float | str | None:
    if text is None or text.endswith("%"):
        return text
    try:
        return float(text)
    except ValueError:
        raise wrong(f"--{option}", "a number or a share such as '97%'", text) from None


def _parse_points(args: argparse.Namespace) -> list[dict[str, float]] | None:
    if args.reference_point is None:
        if args.algorithm == "r-nsga2":
            raise ValueError("`--algorithm r-nsga2` needs `--reference-point`.")
        return None
    if args.algorithm != "r-nsga2":
        raise ValueError("`--reference-point` goes with `--algorithm r-nsga2`.")
    points = []
    for words in args.reference_point:
        point: dict[str, float] = {}
        for word in words:
            name, _, value = word.partition("=")
            try:
                point[name] = float(value)
            except ValueError:
                point = {}
        if len(words) != 2 or set(point) != {args.metric, args.cost}:
            raise wrong("--reference-point", f"{args.metric}=NUMBER {args.cost}=NUMBER", " ".join(words))
        points.append(point)
    return points


def describe(result: SearchResult) -> str:
    """Lay out the Pareto front and the reference subnets as a table."""
    names = [name for name in result.history[0].metrics if name in ("loss", "accuracy", result.cost)]
    front = {evaluation.index for evaluation in result.pareto}
    shown = [e for e in result.history if e.index in front or e.source != "search"]
    shown.sort(key=lambda e: e.metrics[result.cost])
    lines = [f"{'evaluation':<22}" + "".join(f"{name:>14}" for name in names)]
    for e in shown:
        mark = "  *" if e.index in front else ""
        lines.append(
            f"{e.index:>4} {e.source + mark:<17}"
            + "".join(
                f"{e.metrics[name]:>14,d}" if isinstance(e.metrics[name], int) else f"{e.metrics[name]:>14.4f}"
                for name in names
            )
        )
    return "\n".join([*lines, "* on the Pareto front"])
