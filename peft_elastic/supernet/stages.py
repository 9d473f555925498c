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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ..common.checks import check_bool, is_finite, is_whole, wrong
from .space import Choice, SearchSpace


@dataclass(frozen=True)
class Stage:
    """A part of the training in which only some kinds of choices are elastic; all others stay at their maximum
    (progressive shrinking, Cai et al. 2020, https://arxiv.org/abs/1908.09791).

    It survives JSON: `Stage(**json.loads(json.dumps(dataclasses.asdict(stage)))) == stage`.

    Args:
        kinds (sequence of `str`): the kinds (`Choice.kind`) that are sampled, e.g. `("rank",)`.
        epochs (`float`, *optional*): how long the stage lasts; fractions are allowed.
        learning_rate (`float`, *optional*):
            The learning rate that takes the place of `args.learning_rate` in this stage: whatever the scheduler says is
            multiplied by `learning_rate / args.learning_rate`. Defaults to `args.learning_rate`.
        steps (`int`, *optional*): how many optimizer steps the stage lasts, in place of `epochs`.
        options (`Mapping[str, int]`, *optional*):
            How much of some of the `kinds` is open, by default all. Of "depth": how many blocks of each stack (blocks whose paths
            differ in the last part) may be skipped, the last ones of those that are elastic, in any combination (`depth_indicator`
            of BootstrapNAS). Of any other kind: how many options of each choice, the largest first (`width_indicator`).
        sort (`bool`, defaults to `False`):
            Sort the model anew when the stage begins, by its importance (`importance` of its configuration), with the state of the
            optimizer. It does not change what the largest subnet computes.

    Raises:
        ValueError: if `kinds` is no sequence of names, not one of `epochs` and `steps` is given, or a number is not positive or whole.
    """

    kinds: Sequence[str]
    epochs: float | None = None
    learning_rate: float | None = None
    steps: int | None = None
    options: Mapping[str, int] = field(default_factory=dict, hash=False)
    sort: bool = False

    def __post_init__(self) -> None:
        if (
            isinstance(self.kinds, str)
            or not isinstance(self.kinds, Sequence)
            or not self.kinds
            or not all(isinstance(kind, str) for kind in self.kinds)
        ):
            raise ValueError(
                f"`kinds` of a stage must be a sequence of names such as ('rank',), got {self.kinds!r}."
                + (" How much of each kind is open is said by `options`." if isinstance(self.kinds, Mapping) else "")
            )
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if self.steps is None and not _is_positive(self.epochs):
            raise ValueError(f"`epochs` of a stage must be a positive number, got {self.epochs!r}; or give `steps`.")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"`epochs` of a stage must be left out where `steps` are given, got epochs={self.epochs!r}, steps={self.steps!r}."
            )
        if self.steps is not None and (not is_whole(self.steps) or self.steps < 1):
            raise ValueError(f"`steps` of a stage must be a whole number >= 1 or None, got {self.steps!r}.")
        if self.learning_rate is not None and not _is_positive(self.learning_rate):
            raise ValueError(
                f"`learning_rate` of a stage must be a positive number or None, got {self.learning_rate!r}."
            )
        if not isinstance(self.options, Mapping) or not all(is_whole(n) and n >= 1 for n in self.options.values()):
            raise ValueError(
                f"`options` of a stage must be a dict from kinds to whole numbers >= 1, got {self.options!r}."
            )
        if unknown := [kind for kind in self.options if kind not in self.kinds]:
            raise ValueError(f"`options` of a stage must name some of its `kinds` {self.kinds}, got {unknown}.")
        object.__setattr__(self, "options", dict(self.options))
        check_bool("sort", self.sort)


class StagePlan:
    """The stages of one training run: which space is sampled in which step, at what learning rate.

    Args:
        stages (sequence of `Stage`, *optional*): None or empty for a single stage in which everything is elastic.
        space (`SearchSpace`): the model's.
        args (`TrainingArguments`): the Trainer's.
        max_steps (`int`): optimizer steps of the whole run.
        lr_scheduler: the Trainer's.

    Raises:
        ValueError: if a kind is not in the space, an option of a limited kind is open in no stage, the lengths do not sum to that of
            the training, a stage is shorter than a step, or the learning rate of a stage cannot be set.
    """

    def __init__(
        self, stages: Sequence[Stage] | None, space: SearchSpace, args: Any, max_steps: int, lr_scheduler: Any
    ) -> None:
        self._ends, self._spaces, self._factors = [max_steps], [space], [1.0]
        self.sorting_steps: tuple[int, ...] = ()
        if not stages:
            return
        kinds = sorted({choice.kind for choice in space})
        for stage in stages:
            if unknown := [kind for kind in stage.kinds if kind not in kinds]:
                raise ValueError(f"`stages` names the kinds {unknown}, the search space of the model has {kinds}.")
        spaces = [_with_elastic(space, stage) for stage in stages]
        _check_all_open(stages, space, spaces)
        ends = _ends_of(stages, args, max_steps)
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
        self._ends, self._spaces = ends, spaces
        self._factors = [
            1.0 if stage.learning_rate is None else stage.learning_rate / args.learning_rate for stage in stages
        ]
        #: numbers of the optimizer steps before which the model is sorted
        self.sorting_steps = tuple(start for stage, start in zip(stages, [0, *ends]) if stage.sort)

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


def _ends_of(stages: Sequence[Stage], args: Any, max_steps: int) -> list[int]:
    """The optimizer step that is the first after each stage.

    Raises:
        ValueError: if the stages are not as long as the training, or one is shorter than half a step.
    """
    if any(stage.steps is None for stage in stages) and args.max_steps > 0:
        raise ValueError(
            f"`stages` are counted in epochs: leave `max_steps` at -1, it is {args.max_steps}, or give all of them `steps`."
        )
    if all(stage.steps is None for stage in stages):
        epochs = list(accumulate(stage.epochs or 0.0 for stage in stages))
        if not math.isclose(epochs[-1], args.num_train_epochs, rel_tol=1e-6):
            raise ValueError(
                f"The epochs of `stages` sum to {epochs[-1]:g}, but `num_train_epochs` is {args.num_train_epochs:g}."
            )
        ends = [round(max_steps * end / epochs[-1]) for end in epochs]
    else:
        epoch = max_steps / args.num_train_epochs
        lengths = accumulate((stage.epochs or 0.0) * epoch if stage.steps is None else stage.steps for stage in stages)
        ends = [round(end) for end in lengths]
        if ends[-1] != max_steps:
            raise ValueError(
                f"The lengths of `stages` sum to {ends[-1]} optimizer steps, but the training has {max_steps} (`max_steps` is "
                f"{args.max_steps}, `num_train_epochs` {args.num_train_epochs:g})."
            )
    for stage, start, end in zip(stages, [0, *ends], ends):
        if start == end:
            raise ValueError(f"`stages` holds {stage}, which is shorter than half an optimizer step.")
    return ends


def _with_elastic(space: SearchSpace, stage: Stage) -> SearchSpace:
    skippable = _last_blocks(space, stage.options.get("depth"))

    def opened(choice: Choice) -> int:
        if choice.kind not in stage.kinds or (choice.kind == "depth" and choice.key not in skippable):
            return 1
        return len(choice.options) if choice.kind == "depth" else stage.options.get(choice.kind, len(choice.options))

    return SearchSpace([replace(each, options=each.options[: opened(each)]) for each in space], space.layers)


def _last_blocks(space: SearchSpace, number: int | None) -> set[str]:
    """Keys of the choices of depth of the last `number` blocks of each stack, of all if it is None."""
    stacks: dict[str, dict[str, list[str]]] = {}
    for choice in space:
        if choice.kind == "depth":
            block = choice.modules[0] if choice.modules else choice.name
            stacks.setdefault(block.rpartition(".")[0], {}).setdefault(block, []).append(choice.key)
    kept = [list(blocks.values())[0 if number is None else -number :] for blocks in stacks.values()]
    return {key for blocks in kept for keys in blocks for key in keys}


def _check_all_open(stages: Sequence[Stage], space: SearchSpace, spaces: Sequence[SearchSpace]) -> None:
    """ValueError if an option of a kind that is limited is open in no stage: it would be searched, and was never trained."""
    for kind in dict.fromkeys(kind for stage in stages for kind in stage.options):
        for choice in space:
            if choice.kind == kind and max(len(each[choice.key].options) for each in spaces) < len(choice.options):
                raise ValueError(
                    f"`options` of the `stages` never open all of {kind!r}: the option {choice.options[-1]} of {choice.name!r} would be in "
                    "the search space and never be trained. Leave it out of the configuration of the model, or open it in the last stage "
                    f"(leave {kind!r} out of its `options`)."
                )


def _is_positive(value: Any) -> bool:
    return is_finite(value) and value > 0
