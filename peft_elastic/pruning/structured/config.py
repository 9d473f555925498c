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

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, TypeVar

from ...common.checks import check_choice, check_whole, is_finite, wrong
from ...cost.counts import COSTS
from ...structure.importance import MEASURED
from .units import GRANULARITIES


MEASURES = tuple(COSTS)
MODES = ("forward", "decode")
CHOICES = ("metric", "score", "uniform", "random")
ORDERS = (*MEASURED, "l1")

_C = TypeVar("_C", bound="StructuredPruningConfig")


@dataclass(frozen=True)
class StructuredPruningConfig:
    """
    What every method of structured pruning is described by. Use one of its subclasses, which differ in their defaults alone.

    Args:
        ratio (`float`):
            Share of the model to remove, in [0, 1), of what `measure` counts in the whole model, embeddings included. 0 leaves
            the model as it is.
        stages (`tuple[str, ...]`):
            What is removed, in this order. "blocks": whole transformer blocks; "sub-blocks": attentions and MLPs; "attentions"
            and "mlps": only these; "channels": groups of MLP channels; "heads": groups of attention heads, whole key-value
            groups.
        split (`tuple[float, ...]` or `"auto"`):
            Shares of `ratio` that the stages remove, in any unit: (44, 52, 4) is (0.44, 0.52, 0.04). A stage ends where no
            removal brings the model nearer to its target, and what it leaves or removes too much is up to the next. With
            "auto" all stages are one: each step removes, of anything, what raises the metric least for its size.
        choose (`str` or `tuple[str, ...]`):
            How a stage chooses, one for all or one for each. "metric": what raises the metric least, by evaluating it without
            each of the candidates; "score": the units with the least importance in the whole model, without evaluations (for
            channels and heads); "uniform": as many of every block (for channels and heads); "random".
        order (`str` or `Mapping[str, torch.Tensor]`):
            The order of channels and heads within a block, of which the last ones go first: "activation", "gradient",
            "magnitude", "none" or your own scores, see `peft_elastic.sort_by_importance`; or "l1", the one of Intel's code: the
            absolute weights of the layers that make a channel or head.
        mlp_group (`int` or `float`, *optional*):
            Channels that one step removes, as a number or as a share of the channels of the widest MLP. Default: a 14th (1024
            of 14336, the paper's), in multiples of 64 where that is possible; 8 with the choice "uniform". At least one group is
            kept.
        head_group (`int`):
            Key-value groups that one step removes. At least one is kept.
        measure (`str`):
            What `ratio` counts: "parameters", "macs" (multiply-accumulates per token), "bytes" (on disk) or "latency" (seconds on this machine of
            the deployed model, as `peft_elastic.LatencyModel` predicts them from measurements).
        latency_inputs (`Mapping[str, tuple[int, ...]]`):
            For "latency": the shapes of the inputs that are served.
        latency_mode (`str`):
            For "latency": "forward" or "decode".
        slack (`float`):
            How many candidates a step evaluates again. What a removal costs changes slowly from step to step, so those are taken
            whose cost, when it was measured last, is at most (1 + slack) times that of the best of this step. `math.inf`
            evaluates all in every step, as the paper does.
        block_samples, width_samples (`int`, *optional*):
            Number of calibration sequences for the evaluations of stages that remove blocks or parts of them, and for those of
            channels and heads and their order. None: all.
        cache_gb (`float`):
            Memory in GB for the hidden states between blocks. With less than they need, more blocks are computed.
        seed (`int`):
            Of the choice "random".

    Raises:
        ValueError: an argument is not allowed.
    """

    method: ClassVar[str] = "structured"

    ratio: float = field(default=0.2, metadata={"help": "Share of the model to remove, e.g. 0.1."})
    stages: tuple[str, ...] = field(
        default=("sub-blocks", "channels", "heads"),
        metadata={
            "help": f"What is removed, in this order: {', '.join(GRANULARITIES)}. Sub-blocks are attentions and MLPs.",
            "choices": tuple(GRANULARITIES),
            "metavar": "STAGE",
        },
    )
    split: tuple[float, ...] | str = field(
        default=(44, 52, 4),
        metadata={
            "help": "Shares of the ratio that the stages remove, or 'auto' for the least harmful of all stages in each step.",
            "metavar": "SHARE",
        },
    )
    choose: str | tuple[str, ...] = field(
        default="metric",
        metadata={
            "help": "How a stage chooses, one for all or one for each: metric (by evaluating), score (channels and heads of least "
            "importance), uniform (all blocks alike), random.",
            "choices": CHOICES,
            "metavar": "HOW",
        },
    )
    order: Any = field(
        default="activation",
        metadata={
            "help": "What channels and heads are sorted by within a block, the last go first; l1 is that of Intel's code, and of its "
            "files.",
            "choices": ORDERS,
        },
    )
    mlp_group: int | float | None = field(
        default=None, metadata={"help": "Channels of a step, a number or a share of all; by default a 14th."}
    )
    head_group: int = field(default=1, metadata={"help": "Key-value groups of a step."})
    measure: str = field(default="parameters", metadata={"help": "What the ratio is a share of.", "choices": MEASURES})
    latency_inputs: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"input_ids": (1, 128)}, metadata={"help": "For the measure latency: what is served."}
    )
    latency_mode: str = field(
        default="forward",
        metadata={
            "help": "For the measure latency: that of the whole sequences, or of one more token behind them.",
            "choices": MODES,
        },
    )
    slack: float = field(
        default=0.25,
        metadata={
            "help": "Try again what harmed at most 1 + X times as much as the best, when it was tried last; inf tries everything in "
            "every step, as the paper does."
        },
    )
    block_samples: int | None = field(default=256, metadata={"help": "Sequences to evaluate without blocks."})
    width_samples: int | None = field(
        default=128, metadata={"help": "Sequences for channels and heads, of those that there are."}
    )
    cache_gb: float = field(
        default=4.0, metadata={"help": "Memory for what blocks compute, in GB; less is slower.", "metavar": "GB"}
    )
    seed: int = field(default=0, metadata={"help": "Of random choices."})

    def __post_init__(self) -> None:
        for name in ("stages", "split", "choose"):  # lists, from JSON or the command line
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not is_finite(self.ratio) or not 0 <= self.ratio < 1:
            raise wrong("ratio", "a number in [0, 1)", self.ratio)
        known = isinstance(self.stages, tuple) and self.stages and not set(self.stages) - set(GRANULARITIES)
        if not known or len(set(self.stages)) < len(self.stages):
            raise wrong("stages", f"a tuple of {list(GRANULARITIES)}, each at most once", self.stages)
        self._check_split()
        self._check_choose()
        if self.order == "movement":
            raise ValueError(
                "`order='movement'` is learned in a training, which pruning does not do: give the scores themselves, "
                "`order=callback.scores` of `MovementCallback`."
            )
        if not isinstance(self.order, Mapping) and self.order not in ORDERS:
            raise wrong("order", f"one of {list(ORDERS)}, or scores", self.order)
        group = self.mlp_group
        whole = type(group) is int and group >= 1
        if group is not None and not whole and not (isinstance(group, float) and 0 < group < 1):
            raise wrong("mlp_group", "a whole number >= 1, a share in (0, 1) or None", group)
        check_whole("head_group", self.head_group, least=1)
        check_choice("measure", self.measure, MEASURES)
        check_choice("latency_mode", self.latency_mode, MODES)
        if not isinstance(self.latency_inputs, Mapping) or not self.latency_inputs:
            raise wrong("latency_inputs", "shapes by name such as {'input_ids': (1, 128)}", self.latency_inputs)
        for name in ("slack", "cache_gb"):
            value = getattr(self, name)
            if not _is_number(value) or not value >= 0:
                raise wrong(name, "a number that is not negative", value)
        for name in ("block_samples", "width_samples"):
            check_whole(name, getattr(self, name), least=1, optional=True)
        check_whole("seed", self.seed, least=0)

    def _check_split(self) -> None:
        if self.split == "auto":
            return
        numbers = isinstance(self.split, tuple) and all(_is_number(share) for share in self.split)
        if not numbers or len(self.split) != len(self.stages):
            raise wrong("split", f"'auto' or {len(self.stages)} numbers, one for each of {self.stages}", self.split)
        if not all(0 <= share < math.inf for share in self.split) or not sum(self.split) > 0:  # type: ignore[operator, arg-type]
            raise wrong("split", "shares that are not negative, nor all of them 0", self.split)

    def _check_choose(self) -> None:
        choices = self.choose if isinstance(self.choose, tuple) else (self.choose,) * len(self.stages)
        if len(choices) != len(self.stages) or set(choices) - set(CHOICES):
            raise wrong(
                "choose", f"one of {list(CHOICES)}, or a tuple with one for each of {self.stages}", self.choose
            )
        if self.split == "auto" and set(choices) != {"metric"}:
            raise wrong("choose", "'metric' with split='auto'", self.choose)
        for stage, choice in zip(self.stages, choices):
            if choice in ("score", "uniform") and not GRANULARITIES[stage].narrows:
                raise wrong("choose", f"'metric' or 'random' for the stage {stage!r}", choice)
            if choice == "score" and self.order == "none":
                raise wrong("order", "an order of channels and heads where a stage chooses by 'score'", self.order)
        object.__setattr__(self, "choose", choices)


# The methods by name: sets of defaults of one procedure.
STRUCTURED_METHODS: dict[str, type[StructuredPruningConfig]] = {}


def structured_method(name: str) -> Callable[[type[_C]], type[_C]]:
    """Make a decorator that registers a config under the name by which users ask for its method, its attribute `method`."""

    def register(config: type[_C]) -> type[_C]:
        config.method = name
        STRUCTURED_METHODS[name] = config
        return config

    return register


@structured_method("multipruner")
@dataclass(frozen=True)
class MultiPrunerConfig(StructuredPruningConfig):
    """
    MultiPruner (Munoz et al. 2025, https://huggingface.co/papers/2501.09949): first attentions and MLPs go, then MLP channels,
    then heads, always what raises the perplexity of the calibration data least. The defaults are the paper's, but for `order`
    (the paper's is "l1"). Arguments as in `StructuredPruningConfig`.
    """


@structured_method("blockpruner")
@dataclass(frozen=True)
class BlockPrunerConfig(StructuredPruningConfig):
    """BlockPruner (Zhong et al. 2024, https://huggingface.co/papers/2406.10594): attentions and MLPs alone. Arguments as in
    `StructuredPruningConfig`."""

    stages: tuple[str, ...] = ("sub-blocks",)
    split: tuple[float, ...] | str = (1,)


@structured_method("width")
@dataclass(frozen=True)
class WidthPrunerConfig(StructuredPruningConfig):
    """Width alone: MLP channels, then heads. With `choose="uniform"` the same share of every block. Arguments as in
    `StructuredPruningConfig`."""

    stages: tuple[str, ...] = ("channels", "heads")
    split: tuple[float, ...] | str = (93, 7)


@structured_method("two-stage")
@dataclass(frozen=True)
class TwoStagePrunerConfig(StructuredPruningConfig):
    """In the manner of 2SSP (Sandri et al. 2025, https://huggingface.co/papers/2501.17771): MLP channels by their score at once,
    evenly in all blocks; then attentions, by perplexity. The split is a number here, where the paper has a formula. Arguments as
    in `StructuredPruningConfig`."""

    stages: tuple[str, ...] = ("channels", "attentions")
    split: tuple[float, ...] | str = (80, 20)
    choose: str | tuple[str, ...] = ("uniform", "metric")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
