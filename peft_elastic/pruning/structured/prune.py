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

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import nn

from .config import StructuredPruningConfig
from .execute import execute, hand_out
from .plan import PruningPlan, check_extractable
from .setup import plan_run


def prune_structured(
    model: nn.Module,
    config: StructuredPruningConfig,
    calibration: Any = None,
    *,
    metric: Callable[[nn.Module], float] | None = None,
    mode: str = "min",
    save_dir: str | os.PathLike[str] | None = None,
    extract: bool = True,
    progress: bool = True,
) -> PruningPlan:
    """
    Removes whole blocks, attentions, MLPs, MLP channels and attention heads of a model, without training.

    The same arguments give the same plan. The model is put back if the call fails or is interrupted; the error then has the
    attribute `plan` with what had been decided, which `plan.save(path)` keeps.

    Args:
        model: a transformers model whose blocks have a known layout (see `peft_elastic.structure.register_layout`), without
            adapters, in any floating-point type. One that accelerate has offloaded (`device_map`) can lose blocks, attentions and
            MLPs, with `extract=False`; `extract_folder` carries the plan out.
        config: `MultiPrunerConfig`, or that of another method: `BlockPrunerConfig`, `WidthPrunerConfig`, `TwoStagePrunerConfig`.
        calibration: an iterable of batches, as in `prune`. Of a language model every token but the first of a sequence is
            predicted, or `labels` if there are any; any other model needs `labels`. Use text like that the model will see.
        metric (`Callable`, *optional*): `metric(model) -> float`, in place of the perplexity (of models that are no language
            models: the loss) of the calibration data. It is called with the model in evaluation mode.
        mode (`str`): "min" or "max", whether a small or a large `metric` is good.
        save_dir (*optional*): a folder that every evaluation is written to. A second call finds there what an interrupted one
            has evaluated; so does one with another ratio, split or method on the same model and data.
        extract (`bool`): whether to make the model smaller, in place. Otherwise it is left as it was, and the plan can be carried
            out later: `plan.extract(model)`.
        progress (`bool`): show a progress bar with the perplexity and the number of parameters.

    Returns:
        the plan: what was removed, step by step. Save it with `plan.save(path)`.

    Raises:
        ValueError: before anything is changed: an argument that is not allowed, a model whose blocks are not known, with
            adapters or packed weights, or which no configuration describes without what a stage removes, a ratio that cannot be reached, or calibration data that is missing, empty or without
            anything to predict; or `save_dir` holds the evaluations of another model or other data.

    Example:
        >>> plan = prune_structured(model, MultiPrunerConfig(ratio=0.1), calibration=loader)
        >>> print(plan)
        >>> model.save_pretrained("pruned")
    """
    if extract:
        check_extractable(model)
    setup = plan_run(model, config, calibration, metric, mode)
    plan = execute(setup, save_dir, progress)
    if extract:
        try:
            plan.extract(model)
        except BaseException as error:
            hand_out(error, plan)
            raise
    return plan
