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

from ...structure.importance import IMPORTANCES
from .units import GRANULARITIES


MEASURES = ("parameters", "macs", "latency")
CHOICES = ("metric", "score", "uniform", "random")
ORDERS = (*IMPORTANCES, "l1")

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
            What `ratio` counts: "parameters", "macs" (multiply-accumulates per token) or "latency" (seconds on this machine of
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

    ratio: float = field(default=0.2, metadata={"help": "Share of the model to remove, in [0, 1)."})
    stages: tuple[str, ...] = field(default=("sub-blocks", "channels", "heads"), metadata={"help": "What is removed."})
    split: tuple[float, ...] | str = field(default=(44, 52, 4), metadata={"help": "Shares of the stages, or 'auto'."})
    choose: str | tuple[str, ...] = field(default="metric", metadata={"help": f"How a stage chooses: {CHOICES}."})
    order: Any = field(default="activation", metadata={"help": f"Order of channels and heads: {ORDERS} or scores."})
    mlp_group: int | float | None = field(default=None, metadata={"help": "Channels of a step. Default: a 14th."})
    head_group: int = field(default=1, metadata={"help": "Key-value groups of a step."})
    measure: str = field(default="parameters", metadata={"help": f"What `ratio` counts: {MEASURES}."})
    latency_inputs: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"input_ids": (1, 128)}, metadata={"help": "Shapes of what is served."}
    )
    latency_mode: str = field(default="forward", metadata={"help": "'forward' or 'decode'."})
    slack: float = field(
        default=0.25, metadata={"help": "How much worse a candidate may have been to be tried again."}
    )
    block_samples: int | None = field(default=256, metadata={"help": "Sequences to evaluate without blocks."})
    width_samples: int | None = field(default=128, metadata={"help": "Sequences to evaluate narrower blocks."})
    cache_gb: float = field(default=4.0, metadata={"help": "Memory for hidden states, GB."})
    seed: int = field(default=0, metadata={"help": "Of random choices."})

    def __post_init__(self) -> None:
        for name in ("stages", "split", "choose"):  # lists, from JSON or the command line
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if not _is_number(self.ratio) or not 0 <= self.ratio < 1:
            raise ValueError(f"ratio: got {self.ratio!r}; it must be a number in [0, 1).")
        if not isinstance(self.stages, tuple) or not self.stages or set(self.stages) - set(GRANULARITIES):
            raise ValueError(f"stages: got {self.stages!r}; it must be a tuple of {list(GRANULARITIES)}.")
        if len(set(self.stages)) < len(self.stages):
            raise ValueError(f"stages: got {self.stages!r}; each may be there once.")
        self._check_split()
        self._check_choose()
        if not isinstance(self.order, Mapping) and self.order not in ORDERS:
            raise ValueError(f"order: got {self.order!r}; it must be one of {list(ORDERS)}, or scores.")
        group = self.mlp_group
        whole = type(group) is int and group >= 1
        if group is not None and not whole and not (isinstance(group, float) and 0 < group < 1):
            raise ValueError(f"mlp_group: got {group!r}; it must be a whole number >= 1, a share in (0, 1) or None.")
        if type(self.head_group) is not int or self.head_group < 1:
            raise ValueError(f"head_group: got {self.head_group!r}; it must be a whole number >= 1.")
        if self.measure not in MEASURES:
            raise ValueError(f"measure: got {self.measure!r}; it must be one of {list(MEASURES)}.")
        if self.latency_mode not in ("forward", "decode"):
            raise ValueError(f"latency_mode: got {self.latency_mode!r}; it must be 'forward' or 'decode'.")
        if not isinstance(self.latency_inputs, Mapping) or not self.latency_inputs:
            raise ValueError(
                f"latency_inputs: got {self.latency_inputs!r}; it must be shapes by name, {{'input_ids': (1, 128)}} say."
            )
        for name in ("slack", "cache_gb"):
            value = getattr(self, name)
            if not _is_number(value) or not value >= 0:
                raise ValueError(f"{name}: got {value!r}; it must be a number that is not negative.")
        for name in ("block_samples", "width_samples"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: got {value!r}; it must be a whole number >= 1, or None.")
        if type(self.seed) is not int or self.seed < 0:
            raise ValueError(f"seed: got {self.seed!r}; it must be a whole number that is not negative.")

    def _check_split(self) -> None:
        if self.split == "auto":
            return
        numbers = isinstance(self.split, tuple) and all(_is_number(share) for share in self.split)
        if not numbers or len(self.split) != len(self.stages):
            raise ValueError(
                f"split: got {self.split!r}; it must be 'auto' or {len(self.stages)} numbers, one for each of {self.stages}."
            )
        if not all(0 <= share < math.inf for share in self.split) or not sum(self.split) > 0:  # type: ignore[operator, arg-type]
            raise ValueError(f"split: got {self.split!r}; the shares must not be negative, nor all of them 0.")

    def _check_choose(self) -> None:
        choices = self.choose if isinstance(self.choose, tuple) else (self.choose,) * len(self.stages)
        if len(choices) != len(self.stages) or set(choices) - set(CHOICES):
            raise ValueError(
                f"choose: got {self.choose!r}; it must be one of {list(CHOICES)}, or a tuple with one for each of {self.stages}."
            )
        if self.split == "auto" and set(choices) != {"metric"}:
            raise ValueError(f"choose: got {self.choose!r}; with split='auto' it must be 'metric'.")
        for stage, choice in zip(self.stages, choices):
            if choice in ("score", "uniform") and not GRANULARITIES[stage].narrows:
                raise ValueError(
                    f"choose: got {choice!r} for the stage {stage!r}, which allows 'metric' and 'random'."
                )
            if choice == "score" and self.order == "none":
                raise ValueError("choose: got 'score', which needs an order of channels and heads; `order` is 'none'.")
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
