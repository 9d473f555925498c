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
"""`peft-elastic prune --structured`: its options, and what it does with them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from peft_elastic import MultiPrunerConfig, PruningPlan, extract_folder, plan_folder, prune_structured
from peft_elastic.common.documents import read_json
from peft_elastic.pruning.structured import (
    STRUCTURED_METHODS,
    StructuredPruningConfig,
    from_pruning_config,
    to_pruning_config,
)
from peft_elastic.pruning.structured.folder import check_choosable
from peft_elastic.pruning.structured.setup import needs_order_data, stage_shares

from . import _common, _methods
from ._options import parse_workload


_DEFAULT = MultiPrunerConfig.method
METHODS_HELP = (
    f"{_DEFAULT} (the default), blockpruner (attentions and MLPs alone), width (channels and heads alone) or two-stage (channels of "
    "all blocks alike, then attentions)"
)
# Fields that are no option of their own: `--ratio` has no default, `--samples`, `--seed` and `--latency-of` say the others.
_WITHOUT = ("ratio", "latency_inputs", "block_samples", "seed")
_NAMES = {"split": "stage_split"}
_DETAIL = tuple(_NAMES.get(name, name) for name in _methods.fields_of(STRUCTURED_METHODS, _WITHOUT))
# How many sequences of data are drawn.
SAMPLES: int = _methods.default_of(MultiPrunerConfig, "block_samples")
_LATENCY = ("latency_of", "latency_mode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("structured pruning: a smaller model")
    group.add_argument(
        "--structured",
        action="store_true",
        help="remove attentions, MLPs, channels and heads, always what raises the perplexity of the calibration data least",
    )
    group.add_argument("--ratio", type=float, metavar="R", help=_methods.help_of(MultiPrunerConfig, "ratio"))
    group.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="instead: carry out a plan.json of before, or a pruning_config.json of Intel's MultiPruner; needs no data",
    )
    group.add_argument("--plan-only", action="store_true", help="write the plan and no model, to look at it first")
    group.add_argument(
        "--evaluations",
        type=Path,
        metavar="DIR",
        help="keep all evaluations there. An interrupted run continues from them, and one with another ratio or method on "
        "the same model and data uses them (default: OUT-evaluations, removed at the end)",
    )

    detail = parser.add_argument_group("structured pruning in detail")
    _methods.add_options(detail, STRUCTURED_METHODS, _WITHOUT, _NAMES)
    detail.add_argument(
        "--latency-of",
        metavar="BxT",
        help="with --measure latency: of B sequences of T tokens on this machine (default: "
        f"{'x'.join(map(str, _methods.default_of(MultiPrunerConfig, 'latency_inputs')['input_ids']))})",
    )


def check_absent(args: argparse.Namespace) -> None:
    """ValueError if an option of this module is given without `--structured`."""
    for name in ("ratio", "plan", "plan_only", "evaluations", "latency_of", *_DETAIL):
        if getattr(args, name) not in (None, False):
            raise ValueError(f"`{_methods.option_of(name)}` goes with `--structured`.")


def run(args: argparse.Namespace, calibration: Callable[[Any], list[torch.Tensor]]) -> int:
    """The command; `calibration` makes the batches with a tokenizer."""
    if args.plan is not None:
        return _carry_out(args)
    config = make_config(args)
    if _common.streams(args, args.model, possible="metric" not in config.choose):
        return _choose(args, config, calibration)
    return _search(args, config, calibration)


# -- making a plan -------------------------------------------------------------------------------------------------


def _search(
    args: argparse.Namespace, config: StructuredPruningConfig, calibration: Callable[[Any], list[torch.Tensor]]
) -> int:
    _common.check_no_activations(args)
    evaluations = args.evaluations or args.out.with_name(f"{args.out.name}-evaluations")
    if args.evaluations is None and (args.out / "plan.json").is_file():  # finished, and killed before this
        shutil.rmtree(evaluations, ignore_errors=True)
    _common.check_new_folder(args.out)
    if args.out.resolve() in (evaluations.resolve(), *evaluations.resolve().parents):
        raise ValueError(
            f"`--evaluations` {os.fspath(evaluations)!r} must not be in `--out`, which is written at the end."
        )
    tokenizer = _common.load_tokenizer(args.model)
    batches = calibration(tokenizer)
    model = _common.load_causal_lm(args.model, args.dtype, args.device)
    sequences = sum(len(batch) for batch in batches)
    plural = "s" if sequences > 1 else ""
    # with little data the perplexity even falls: what is removed is what these very tokens do better without
    print(
        f"Calibrating with {sequences} sequence{plural} of {args.max_length} tokens. Perplexities are of these, by which "
        "everything is chosen: judge the pruned model by other data."
    )
    continued = "is continued from" if (evaluations / "evaluations.jsonl").exists() else "can continue from"
    print(f"An interrupted run {continued} {os.fspath(evaluations)}.", flush=True)
    if config.measure == "latency":
        sizes = "x".join(map(str, config.latency_inputs["input_ids"]))
        print(f"Measuring latencies of {sizes} tokens ({config.latency_mode}) on this machine.", flush=True)
    try:
        plan = prune_structured(model, config, batches, save_dir=evaluations, extract=False)
    except KeyboardInterrupt:
        print(f"\nWhat was evaluated is in {evaluations}; the same command continues from there.")
        raise
    except ValueError as error:
        raise ValueError(str(error).replace("`save_dir`", "`--evaluations`")) from error
    _write(args, plan, model, tokenizer)
    if args.evaluations is None:
        shutil.rmtree(evaluations)
    return 0


def _choose(
    args: argparse.Namespace, config: StructuredPruningConfig, calibration: Callable[[Any], list[torch.Tensor]]
) -> int:
    """By scores alone, from a folder."""
    check_choosable(config)
    if args.evaluations is not None:
        raise ValueError("`--evaluations` is of no use with `--stream`, with which nothing is evaluated.")
    needs_data = needs_order_data(config, stage_shares(config))
    batches = calibration(_common.load_tokenizer(args.model)) if needs_data else None
    plan = plan_folder(
        args.model,
        config,
        batches,
        dtype=args.dtype,
        device=_common.usable_device(args.device),
        scratch=args.out.parent if args.activations_on_disk else None,
    )
    _write_folder(args, plan)
    return 0


def make_config(args: argparse.Namespace) -> StructuredPruningConfig:
    """What the options describe.

    Raises:
        ValueError: if they do not go together, or a value is not allowed.
    """
    if args.ratio is None:
        raise ValueError("`--structured` needs `--ratio`, the share of the model to remove, or `--plan`.")
    method = args.method or _DEFAULT
    options = _methods.given(args, STRUCTURED_METHODS, method, _WITHOUT, _NAMES)
    if "split" in options:
        options["split"] = _parse_split(args.stage_split)
    elif len(args.stages or ()) == 1:
        options["split"] = [1]
    elif args.stages:
        raise ValueError("`--stages` needs `--stage-split`: a share for each of the stages, or auto.")
    if len(args.choose or ()) == 1:
        options["choose"] = args.choose[0]
    for name in _LATENCY:
        if getattr(args, name) is not None and args.measure != "latency":
            raise ValueError(f"`{_methods.option_of(name)}` goes with `--measure latency`.")
    if args.latency_of is not None:
        options["latency_inputs"] = {"input_ids": parse_workload(args.latency_of)}
    if args.samples is not None:
        options["block_samples"] = args.samples
    return STRUCTURED_METHODS[method](ratio=args.ratio, seed=args.seed, **options)


def _parse_split(words: Sequence[str]) -> str | list[float]:
    if list(words) == ["auto"]:
        return "auto"
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ValueError(f"`--stage-split` must be numbers or 'auto', got {' '.join(words)!r}.") from None


# -- carrying out one of before ------------------------------------------------------------------------------------


def _carry_out(args: argparse.Namespace) -> int:
    intels = not _is_plan(args.plan)
    given = ("ratio", "plan_only", "evaluations", "dataset", "latency_of", *_DETAIL)
    for name in given:
        if getattr(args, name) not in (None, False) and not (name == "order" and intels):
            raise ValueError(f"`{_methods.option_of(name)}` is of no use with `--plan`, which says what to remove.")
    if args.order not in (None, "l1", "none"):
        raise ValueError("`--order` must be l1 or none with a `--plan` of Intel's, which was made with one of these.")
    plan = None if intels else PruningPlan.load(args.plan)
    if args.activations_on_disk:
        raise ValueError("`--activations-on-disk` is of no use with `--plan`, which needs no data.")
    if _common.streams(args, args.model, possible=plan is not None):
        if plan is None:
            raise ValueError(
                "`--stream` needs a plan.json as `--plan`; one of Intel's is carried out in memory, which writes one."
            )
        _write_folder(args, plan)
        return 0
    _common.check_new_folder(args.out)
    tokenizer = _common.load_tokenizer(args.model, required=False)
    model = _common.load_model(args.model, args.dtype, args.device)
    if plan is None:
        try:
            plan = from_pruning_config(args.plan, model, order=args.order or "l1")
        except ValueError as error:
            raise ValueError(f"`--plan` {os.fspath(args.plan)!r} cannot be carried out: {error}") from error
    _write(args, plan, model, tokenizer)
    return 0


def _is_plan(path: Path) -> bool:
    """Whether a file is a plan of ours, and not one of Intel's."""
    try:
        data = read_json(path)
    except OSError as error:
        raise ValueError(f"`--plan` {os.fspath(path)!r} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise ValueError(f"`--plan` {error}.") from None
    return isinstance(data, dict) and "format" in data


# -- what comes out ------------------------------------------------------------------------------------------------


def _write(args: argparse.Namespace, plan: PruningPlan, model: Any, tokenizer: Any) -> None:
    print(plan)
    out = args.out
    written = [
        (out / "plan.json", "what was removed: peft_elastic.PruningPlan.load, or --plan with another model like it")
    ]
    pruning_config = _as_pruning_config(plan, model)
    if not args.plan_only:
        plan.extract(model)
    with _common.new_folder(out) as folder:
        if not args.plan_only:
            _common.save_model(model, tokenizer, folder)
            loads_with = "import peft_elastic; " if _common.needs_this_package(folder) else ""
            what = f"the smaller model: {loads_with}AutoModelForCausalLM.from_pretrained(...)"
            written.insert(0, (out, what))
        plan.save(folder / "plan.json")
        if any(row["value"] is not None for row in plan.history):
            plan.plot(folder / "plan.png")
            written.append((out / "plan.png", f"{plan.metric} after every removal"))
        if pruning_config is not None:
            (folder / "pruning_config.json").write_text(json.dumps(pruning_config, indent=1) + "\n", encoding="utf-8")
            written.append((out / "pruning_config.json", "the same for Intel's code"))
    if args.evaluations is not None:
        written.append((args.evaluations, "all evaluations, for other ratios"))
    following = ["peft-elastic", "train", "--model", out, "--dataset", args.dataset or "YOUR_DATA", "--out", "adapter"]
    if args.plan_only:
        following = ["peft-elastic", "prune", "--model", args.model, "--structured"]
        following += ["--plan", out / "plan.json", "--out", "pruned"]
    _common.say_written(written, following)


def _write_folder(args: argparse.Namespace, plan: PruningPlan) -> None:
    """The same from folder to folder."""
    print(plan)
    out = args.out
    written = [
        (out / "plan.json", "what was removed: peft_elastic.PruningPlan.load, or --plan with another model like it")
    ]
    if args.plan_only:
        with _common.new_folder(out) as folder:
            plan.save(folder / "plan.json")
        following = ["peft-elastic", "prune", "--model", args.model, "--structured", "--stream"]
        following += ["--plan", out / "plan.json", "--out", "pruned"]
    else:
        extract_folder(args.model, out, plan, dtype=args.dtype)
        plan.save(out / "plan.json")
        loads_with = "import peft_elastic; " if _common.needs_this_package(out) else ""
        written.insert(0, (out, f"the smaller model: {loads_with}AutoModelForCausalLM.from_pretrained(...)"))
        following = [
            "peft-elastic",
            "train",
            "--model",
            out,
            "--dataset",
            args.dataset or "YOUR_DATA",
            "--out",
            "adapter",
        ]
    _common.say_written(written, following)


def _as_pruning_config(plan: PruningPlan, model: Any) -> dict[str, Any] | None:
    """Intel's form of a plan of the whole `model`, where that says the same."""
    with warnings.catch_warnings():
        # it warns where its readers would keep other channels and heads: such a file is better not there
        warnings.simplefilter("error", UserWarning)
        try:
            return to_pruning_config(plan, model)
        except (UserWarning, ValueError):
            return None
