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
"""Progressive shrinking: which dimensions of the super-network are elastic in which part of the training."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ..common.checks import is_finite, wrong
from .space import SearchSpace


@dataclass(frozen=True)
class Stage:
    """A part of the training in which only some kinds of choices are elastic; all others stay at their maximum
    (progressive shrinking, Cai et al. 2020, https://arxiv.org/abs/1908.09791).

    Args:
        kinds (sequence of `str`): the kinds (`Choice.kind`) that are sampled, e.g. `("rank",)`.
        epochs (`float`): how long the stage lasts; fractions are allowed.
        learning_rate (`float`, *optional*):
            The learning rate that takes the place of `args.learning_rate` in this stage: whatever the scheduler says is
            multiplied by `learning_rate / args.learning_rate`. Defaults to `args.learning_rate`.

    Raises:
        ValueError: if `kinds` is no sequence of names, or `epochs` or `learning_rate` is not a positive number.
    """

    kinds: Sequence[str]
    epochs: float
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str) or not self.kinds or not all(isinstance(kind, str) for kind in self.kinds):
            raise ValueError(f"`kinds` of a stage must be a sequence of names such as ('rank',), got {self.kinds!r}.")
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if not _is_positive(self.epochs):
            raise ValueError(f"`epochs` of a stage must be a positive number, got {self.epochs!r}.")
        if self.learning_rate is not None and not _is_positive(self.learning_rate):
            raise ValueError(
                f"`learning_rate` of a stage must be a positive number or None, got {self.learning_rate!r}."
            )


class StagePlan:
    """The stages of one training run: which space is sampled in which step, at what learning rate.

    Args:
        stages (sequence of `Stage`, *optional*): None or empty for a single stage in which everything is elastic.
        space (`SearchSpace`): the model's.
        args (`TrainingArguments`): the Trainer's.
        max_steps (`int`): optimizer steps of the whole run.
        lr_scheduler: the Trainer's.

    Raises:
        ValueError: if a kind is not in the space, the epochs do not sum to `args.num_train_epochs`, a stage is shorter
            than a step, or the learning rate of a stage cannot be set.
    """

    def __init__(
        self, stages: Sequence[Stage] | None, space: SearchSpace, args: Any, max_steps: int, lr_scheduler: Any
    ) -> None:
        self._ends, self._spaces, self._factors = [max_steps], [space], [1.0]
        if not stages:
            return
        kinds = sorted({choice.kind for choice in space})
        for stage in stages:
            if unknown := [kind for kind in stage.kinds if kind not in kinds]:
                raise ValueError(f"`stages` names the kinds {unknown}, the search space of the model has {kinds}.")
        if args.max_steps > 0:
            raise ValueError(f"`stages` are counted in epochs: leave `max_steps` at -1, it is {args.max_steps}.")
        epochs = list(accumulate(stage.epochs for stage in stages))
        if not math.isclose(epochs[-1], args.num_train_epochs, rel_tol=1e-6):
            raise ValueError(
                f"The epochs of `stages` sum to {epochs[-1]:g}, but `num_train_epochs` is {args.num_train_epochs:g}."
            )
        ends = [round(max_steps * end / epochs[-1]) for end in epochs]
        for stage, start, end in zip(stages, [0, *ends], ends):
            if start == end:
                raise ValueError(f"`stages` holds {stage}, which is shorter than half an optimizer step.")
        rated = any(stage.learning_rate is not None for stage in stages)
        if rated and not isinstance(lr_scheduler, LambdaLR):
            raise ValueError(
                "`learning_rate` of a stage needs a scheduler whose rate is a function of the step (`LambdaLR`, as all "
                f"`lr_scheduler_type` but 'reduce_lr_on_plateau' and 'greedy'), got {type(lr_scheduler).__name__}."
            )
        if rated and args.learning_rate <= 0:
            raise ValueError(
                f"`learning_rate` of a stage needs a positive `args.learning_rate`, got {args.learning_rate}."
            )
        self._ends = ends
        self._spaces = [_with_elastic(space, stage.kinds) for stage in stages]
        self._factors = [
            1.0 if stage.learning_rate is None else stage.learning_rate / args.learning_rate for stage in stages
        ]

    def space_of_step(self, step: int) -> SearchSpace:
        """Return the space that optimizer step number `step` (from 0) samples."""
        return self._spaces[self._stage_of(step)]

    def scale_learning_rate(self, lr_scheduler: Any) -> None:
        """Let the scheduler multiply its rates by those of the stages, from its current step on."""
        if not isinstance(lr_scheduler, LambdaLR):
            return
        # A scheduler of the user's serves several runs: a scaling that is there already is taken off.
        plain = [getattr(rate, "_of_all_stages", rate) for rate in lr_scheduler.lr_lambdas]
        if plain == lr_scheduler.lr_lambdas and set(self._factors) == {1.0}:
            return
        lr_scheduler.lr_lambdas = [self._scaled(rate) for rate in plain]
        step = lr_scheduler.last_epoch
        lr_scheduler._last_lr = [
            base * rate(step) for base, rate in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas)
        ]
        for group, rate in zip(lr_scheduler.optimizer.param_groups, lr_scheduler._last_lr):
            group["lr"] = rate

    def _stage_of(self, step: int) -> int:
        return min(bisect(self._ends, step), len(self._ends) - 1)

    def _scaled(self, rate: Callable[[int], float]) -> Callable[[int], float]:
        # a plain function, as LambdaLR would write an object into the checkpoint
        def scaled(step: int) -> float:
            return rate(step) * self._factors[self._stage_of(step)]

        scaled._of_all_stages = rate  # type: ignore[attr-defined]
        return scaled


def check_stages(stages: Any) -> tuple[Stage, ...]:
    """Return the argument `stages` as a tuple.

    Raises:
        ValueError: if it is not None or a sequence of `Stage`.
    """
    if stages is None:
        return ()
    if not isinstance(stages, Sequence) or not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise wrong("stages", "a sequence of Stage, at least one, or None", stages)
    return tuple(stages)


def _with_elastic(space: SearchSpace, kinds: Sequence[str]) -> SearchSpace:
    choices = (choice if choice.kind in kinds else replace(choice, options=choice.options[:1]) for choice in space)
    return SearchSpace(choices, space.layers)


def _is_positive(value: Any) -> bool:
    return is_finite(value) and value > 0
