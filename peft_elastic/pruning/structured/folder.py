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
"""Carrying out what structured pruning has decided on models that are larger than memory."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ...common.checks import wrong
from ...structure.blocks import Structure
from ...structure.description import extract_described, plan_extraction
from ...structure.folder import importance_of_folder
from ...structure.folder_run import FolderRun
from ...structure.importance import note_orders
from ...structure.narrow import is_narrowed
from ...structure.rewriting import rewritten, takes_of
from ...structure.space import activate
from ...structure.stored_model import StoredModel
from .config import StructuredPruningConfig
from .execute import execute
from .plan import PruningPlan
from .setup import needs_order_data, plan_run, sorted_kinds, stage_shares


def plan_folder(
    source: str | os.PathLike[str],
    config: StructuredPruningConfig,
    calibration: Any = None,
    *,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    scratch: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> PruningPlan:
    """
    Decides what structured pruning removes from a model that is larger than memory, where that takes no pass through the model as a
    whole: the channels and heads of least importance, as many of every block or in all of them, or anything at random. The plan
    removes what that of `prune_structured` does.

    In memory is what `importance_of_folder` needs, or nothing of the weights without an order by "activation" or "magnitude".

    Args:
        source: the folder of the model, as in `importance_of_folder`.
        config: as in `prune_structured`, with `choose` "score", "uniform" or "random" for all stages, an `order` of "activation",
            "magnitude", "none" or your own scores, and the `measure` "parameters" or "macs".
        calibration: as in `prune_structured`, for the order "activation". The perplexity is not measured.
        dtype, device, scratch: as in `importance_of_folder`.
        progress: whether to show a progress bar.

    Returns:
        the plan, which `extract_folder` carries out.

    Raises:
        ValueError: as of `prune_structured` and `importance_of_folder`; or the config needs the whole model.

    Example:
        >>> config = WidthPrunerConfig(ratio=0.2, choose="uniform")
        >>> extract_folder("llama-70b", "smaller", plan_folder("llama-70b", config, calibration=loader))
    """
    check_choosable(config)
    shares = stage_shares(config)
    kinds = sorted_kinds(config, shares)
    if needs_order_data(config, shares) and calibration is None:
        raise wrong("calibration", "an iterable of batches, e.g. a DataLoader, for this method", None)
    stored = StoredModel(source, dtype)
    own = config
    if kinds and not isinstance(config.order, Mapping):
        # what cannot be is refused before anything is measured
        plan_run(stored.model, replace(config, order="magnitude"))
        scores = importance_of_folder(
            source,
            config.order,
            calibration,
            kinds=kinds,
            max_samples=config.width_samples,
            dtype=dtype,
            device=device,
            scratch=scratch,
            progress=progress,
        )
        own = replace(config, order=scores)
    plan = execute(plan_run(stored.model, own), progress=progress)
    return replace(plan, config={**plan.config, "order": config.order if isinstance(config.order, str) else "scores"})


def extract_folder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    plan: PruningPlan,
    *,
    dtype: str = "auto",
    progress: bool = True,
) -> None:
    """
    Does what `plan.extract` and `save_pretrained` do with a model that is larger than memory: reads it from a folder tensor by
    tensor, and writes what the plan leaves of it to another one. The weights and the configuration are the same, bit for bit.

    In memory is one tensor. Files of weights are written one after the other, each with what is left of one in `source`; where one
    is left empty, the others are numbered anew. An interrupted run, however it ended, goes on with the file where it was.

    Args:
        source: the folder of the whole model that the plan was made for, or of a fine-tuned version of it, in floating point:
            config.json and safetensors files. It is not changed.
        output: a new folder, or that of an interrupted run. What lies beside the weights (tokenizer, generation settings) is copied.
            `from_pretrained` loads it: if all blocks are alike without this package, otherwise after `import peft_elastic`.
        plan: of `plan_folder`, or of `prune_structured(extract=False)` with a model that accelerate has offloaded, or on a machine
            with more memory.
        dtype: to save in: "auto" is that of the checkpoint, as in `from_pretrained`; or "float32", "bfloat16", "float16".
        progress: whether to show a progress bar.

    Raises:
        ValueError: as of `plan.extract`; and before anything is made, if a file is missing or damaged, a tensor is missing or of
            another shape than config.json says, weights are quantised already, `output` holds something else or the unfinished run
            of another model or plan, or its disk is too small.
        OSError: a file cannot be written.

    Example:
        >>> extract_folder("llama-70b", "smaller", PruningPlan.load("plan.json"))
    """
    if not isinstance(plan, PruningPlan):
        raise wrong("plan", "a `PruningPlan`, which `PruningPlan.load` reads from a file", plan)
    settings = {"plan": _digest(plan)}
    run = FolderRun(source, output, "extraction", settings, dtype=dtype)
    whole = run.model
    structure = plan.check(whole)
    orders = plan.orders(structure) if plan.values else {}
    takes = takes_of(whole, structure.widths, _moved(orders), plan.values)

    small = copy.deepcopy(whole)
    tensors = small.state_dict(keep_vars=True)  # which keeps them, so that nothing else gets their ids
    before = {id(tensor): name for name, tensor in reversed(tensors.items())}
    if plan.values:
        extractions = plan_extraction(small, plan.values)
        note_orders(small, orders)
        activate(small, Structure(small), plan.values)
        if is_narrowed(small):
            extract_described(small, extractions)
    left = small.state_dict(keep_vars=True).items()
    names = {name: before[id(tensor)] for name, tensor in left if id(tensor) in before}
    files = rewritten(run.stored, small, names, takes)
    with run.working({}, {}, before=lambda name: None, after=lambda unit: ({}, []), files=files):
        run.finish(model=small, progress=progress)


def check_choosable(config: Any) -> None:
    """ValueError unless what a config removes is chosen without a pass through the model as a whole."""
    if not isinstance(config, StructuredPruningConfig):
        raise wrong("config", "a `WidthPrunerConfig` or another structured config", config)
    shares = stage_shares(config)
    choices = dict(zip(config.stages, config.choose))
    if any(choices[name] == "metric" for name in shares):
        raise wrong(
            "choose",
            "'score', 'uniform' or 'random' for a model in a folder, which is not evaluated as a whole ('metric' does, in "
            "`prune_structured`)",
            config.choose,
        )
    if config.measure not in ("parameters", "macs"):  # bytes are those of the zeros in weights, which nobody has read
        raise wrong("measure", "'parameters' or 'macs' for a model in a folder", config.measure)
    if sorted_kinds(config, shares) and config.order in ("gradient", "l1"):
        raise wrong(
            "order",
            "'activation', 'magnitude', 'none' or scores for a model that is gone through block by block",
            config.order,
        )


def _moved(orders: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those that are not as they are in the model."""
    return {name: order for name, order in orders.items() if not torch.equal(order, torch.arange(len(order)))}


def _digest(plan: PruningPlan) -> str:
    """What tells what a plan leaves from what others do."""
    text = json.dumps([sorted(plan.values.items()), sorted(plan.units.items())])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
