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
"""Importance by movement: scores of heads and channels that a short training learns beside the weights.

After Sanh et al. 2020 (https://arxiv.org/abs/2005.07683) in the structured form of Lagunas et al. 2021 (https://arxiv.org/abs/2109.04838),
with the warm-up by which EFTNAS (LREC-COLING 2024) bounds and orders its search space. A score falls where the loss pushes the weights of
a unit towards zero, whatever their size.
"""

from __future__ import annotations

import base64
import sys
import warnings
import weakref
from collections.abc import Sequence
from types import FrameType
from typing import Any, Optional

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..common import ranks
from ..common.checks import is_finite, wrong
from ..common.documents import COUNT, FINITE, TEXT, MapOf, Nullable, Record
from ..common.parameters import check_here
from ..layers.backends import find_linear_backend
from ..supernet.runs import claim_run
from .blocks import Structure
from .features import layer_at, layer_sizes
from .gates import UnitGates
from .importance import note_scores, noted_scores
from .narrow import is_narrowed
from .parts import KINDS, Slot, Width
from .scores import base_of, fingerprint


_QUANTILE = 0.001
# Lagunas' blocks of attention matrices, whose elements weigh the penalty
_BLOCK = 32 * 32
# The distributed types of accelerate that this was tried with.
_ENGINES = ("NO", "MULTI_CPU", "MULTI_GPU")

_LEARNED = Record(
    structure=TEXT,
    steps=COUNT,
    threshold=Nullable(FINITE),
    tensors=MapOf(Record(score=TEXT, exp_avg=TEXT, exp_avg_sq=TEXT)),
)


class MovementCallback(TrainerCallback, ExportableState):
    """Learns the importance of heads and MLP channels while transformers' Trainer (or TRL's) trains the whole model.

    Each unit (key-value group of heads, MLP channel) has one score S for all layers that make or read it; it starts at 0. The
    layer that reads the unit gets it times 1[S > tau], and S is trained straight through that step, with AdamW: the gradient of S
    is the sum of dL/dW W over all weights (and biases) of the unit. With e epochs done and p = (e - start) / (end - start),
    c = 1 - (1 - p)^3, between 0 and 1: before `start` tau is -inf and there is no penalty; then tau = tau0 (1 - c), where tau0 is
    the 0.1% quantile of all scores at `start`, and the penalty's weight is `penalty` c.

    The penalty is the paper's, weight * mean over the layers of 0.5 E mean sigmoid(S), when all blocks of its masks that belong to
    one unit have one score. So E is the number of elements of such a block and not of the whole unit: 32 x 32 of an attention
    (at most what one unit has in the layer), a row of the layers that make channels, and a column of the one that reads them. Both
    gradients of S are sums over those blocks then, in the ratio that they have in the paper. Biases add nothing to it.

    Gates act in the steps alone: evaluations and checkpoints are of the whole model, and after the training nothing is left of them
    but the scores. They are noted on the model, for `sort_by_importance(model, "movement")`, and in `scores`. Weights that were
    trained meanwhile have got used to the gates; EFTNAS sorts the model as it was before, `sort_by_importance(fresh, callback.scores)`.

    With adapters the scores are of base and adapter together, also where all weights of the base are frozen. Checkpoints of the
    Trainer hold all there is (`trainer_state.json`), and a training that is resumed from one is the same to the bit. In runs of
    several processes (DDP) gradients of the scores are averaged as those of the weights are.

    Args:
        start (`float`, *optional*): epochs before units are gated; by default a third of `end`. At least one step.
        end (`float`, *optional*): epochs when tau has come to 0; by default all of the training.
        penalty (`float`): what its weight comes to.
        learning_rate (`float`, *optional*): of the scores; by default the Trainer's present one (of its first group of parameters).
        kinds (sequence of `"heads"` and `"mlp"`): of what the importance is learned.

    Raises:
        ValueError: for a bad argument; when training starts, for a model of which these kinds are not known, that is narrowed or
            spread over processes, for times that do not fit the training, beside a `SubnetSamplingCallback` or in an `ElasticTrainer`,
            with fp16, DeepSpeed, FSDP, `nn.DataParallel` or `torch_compile`, and for a checkpoint of another training; at `start`,
            if the scores have not moved.
    """

    def __init__(
        self,
        start: Optional[float] = None,
        end: Optional[float] = None,
        penalty: float = 0.02,
        learning_rate: Optional[float] = None,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        for name, value in (("start", start), ("end", end), ("learning_rate", learning_rate)):
            if value is not None and (not is_finite(value) or value <= 0):
                raise wrong(name, "a number above 0, or None", value)
        if start is not None and end is not None and start >= end:
            raise wrong("start", f"below `end`, {end!r}", start)
        if not is_finite(penalty) or penalty < 0:
            raise wrong("penalty", "a number from 0 up", penalty)
        if (
            isinstance(kinds, str)
            or not isinstance(kinds, Sequence)
            or not kinds
            or any(kind not in KINDS for kind in kinds)
        ):
            raise wrong("kinds", f"{list(KINDS)} or one of them", kinds)
        self.start, self.end, self.penalty, self.learning_rate = start, end, penalty, learning_rate
        self.kinds = tuple(kinds)
        self._model: Optional[weakref.ref[nn.Module]] = None
        self._run: Optional[_Run] = None
        self._scores: dict[str, torch.Tensor] = {}

    @property
    def scores(self) -> dict[str, torch.Tensor]:
        """What was learned, float32 (units,) by the name of each order of `Structure(model).widths`; larger is more important.
        Empty before a training."""
        if self._run is not None:
            return self._run.scores()
        # a Trainer with `restore_callback_states_from_checkpoint` has trained with a copy of the callback
        model = None if self._scores or self._model is None else self._model()
        return dict(self._scores) if model is None else noted_scores(model)

    def state(self) -> dict[str, Any]:
        """What a checkpoint of the Trainer holds of this."""
        arguments = {name: getattr(self, name) for name in ("start", "end", "penalty", "learning_rate")}
        learned = None if self._run is None else self._run.state()
        return {"args": {**arguments, "kinds": list(self.kinds)}, "attributes": {"learned": learned}}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._model = None if model is None else weakref.ref(base_of(model))

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self._stop()
        claim_run(state, self, type(self).__name__)
        _check_engine(args, optimizer)
        base = base_of(model)
        check_here("the model", base.parameters())
        if is_narrowed(base):
            raise ValueError(
                "A part of `model` is not active; choose the widest subnet first, `model.set_subnet('max')`."
            )
        widths = [width for width in Structure(base).widths if width.kind in self.kinds]
        if not widths:
            raise ValueError(
                f"`model` ({type(base).__name__}) has no block whose {' or '.join(self.kinds)} are known."
            )
        first, last = self._steps(args, state.max_steps)
        run = _Run(base, widths, first, last, self.penalty)
        if state.global_step > 0:
            run.resume(state.stateful_callbacks.get(type(self).__name__), state.global_step)
        self._model, self._run, self._scores = weakref.ref(base), run, {}

    def _steps(self, args: Any, max_steps: int) -> tuple[int, int]:
        """The optimizer steps (from 0) at which gating starts and ends."""
        if args.max_steps > 0 and (self.start is not None or self.end is not None):
            raise ValueError(
                f"`start` and `end` are counted in epochs: leave `max_steps` at -1, it is {args.max_steps}, or them at None."
            )
        epochs = args.num_train_epochs
        last = max_steps if self.end is None else round(max_steps * self.end / epochs)
        first = round(last / 3) if self.start is None else round(max_steps * self.start / epochs)
        if not 1 <= first < last <= max_steps:
            raise ValueError(
                f"`start` and `end` must be at least one optimizer step each, and within the training, got start={self.start!r} "
                f"and end={self.end!r}, the steps {first} and {last} of {max_steps}."
            )
        return first, last

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run is not None:
            self._run.begin_step(state.global_step, _loop())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self._run is not None:
            rate = optimizer.param_groups[0]["lr"] if self.learning_rate is None else self.learning_rate
            self._run.learn(float(rate))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run is not None:
            self._run.gates.detach()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run is not None:
            self._run.gates.detach()  # a step that is cut short in the middle of its gradient accumulation has no end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run is not None:
            self._scores = self._run.scores()
            note_scores(self._run.model, self._scores)
            self._run.warn_of_unreached()
            self._stop()

    def _stop(self) -> None:
        if self._run is not None:
            self._run.gates.detach()
            self._run = None


class _Run:
    """Of one training: the gates, the scores' optimizer, and the schedule.

    Args:
        model (`nn.Module`): the base model.
        widths (`list[Width]`): what has scores.
        first, last (`int`): optimizer steps at which gating starts and ends.
        penalty (`float`): its weight at the end.
    """

    def __init__(self, model: nn.Module, widths: list[Width], first: int, last: int, penalty: float) -> None:
        self.model = model
        self.gates = UnitGates(model, widths)
        self._first, self._last, self._penalty = first, last, penalty
        self._weights = _penalty_weights(model, widths)
        self._optimizer = torch.optim.AdamW(self.gates.scores.values(), weight_decay=0.0)
        self._structure = fingerprint(widths)
        self._threshold: Optional[float] = None  # at the first step that gates
        self._done = 0

    def scores(self) -> dict[str, torch.Tensor]:
        return {name: score.detach().float().cpu().clone() for name, score in self.gates.scores.items()}

    def progress(self, step: int) -> float:
        """c of optimizer step number `step` (from 0): from 0, before the gating, to 1, after it."""
        p = min(1.0, max(0.0, (step - self._first) / (self._last - self._first)))
        return 1 - (1 - p) ** 3

    def threshold(self, step: int) -> float:
        """tau of an optimizer step."""
        if step < self._first:
            return -float("inf")
        if self._threshold is None:
            scores = torch.cat([score.detach().flatten().cpu() for score in self.gates.scores.values()])
            if scores.min() == scores.max():
                raise ValueError(
                    f"`start` must leave the scores time to move: all of them are {scores[0].item():g} at step {step}. Is the "
                    "learning rate 0 until then?"
                )
            self._threshold = lowest(scores, _QUANTILE)
        return self._threshold * (1 - self.progress(step))

    def begin_step(self, step: int, loop: FrameType) -> None:
        self._optimizer.zero_grad()
        self.gates.shut(self.threshold(step))
        self.gates.attach(loop)
        self._done = step

    def learn(self, rate: float) -> None:
        """Take the optimizer step of the scores."""
        scores = self.gates.scores
        for score in scores.values():
            score.grad = torch.zeros_like(score) if score.grad is None else score.grad
        _average([score.grad for score in scores.values() if score.grad is not None])
        strength = self._penalty * self.progress(self._done)
        for name, score in scores.items():
            if strength and score.grad is not None:
                likely = score.detach().sigmoid()
                score.grad += strength * self._weights[name] * likely * (1 - likely)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._done += 1

    def warn_of_unreached(self) -> None:
        if unreached := sorted({slot.path for slot in self.gates.slots} - self.gates.reached) if self._done else []:
            warnings.warn(
                f"Nothing was learned from {', '.join(unreached)}: the model has not called these layers in training.",
                stacklevel=2,
            )

    def state(self) -> dict[str, Any]:
        """For JSON; float32 in base64, so that reading it gives the same to the bit."""
        tensors = {}
        for name, score in self.gates.scores.items():
            moments = self._optimizer.state[score]
            zero = torch.zeros_like(score)
            values = {"score": score} | {key: moments.get(key, zero) for key in ("exp_avg", "exp_avg_sq")}
            tensors[name] = {key: _to_text(value) for key, value in values.items()}
        return {"structure": self._structure, "steps": self._done, "threshold": self._threshold, "tensors": tensors}

    def resume(self, saved: Any, step: int) -> None:
        """Go on from what `MovementCallback.state` gave.

        Raises:
            ValueError: if it is not that of this model at this step.
        """
        learned = saved.get("attributes", {}).get("learned") if isinstance(saved, dict) else None
        if learned is None:
            raise ValueError(
                "`resume_from_checkpoint` is a checkpoint of a training without `MovementCallback`. Go on without it, or start "
                "from the beginning."
            )
        try:
            _LEARNED.check(learned, "")
            if learned["structure"] != self._structure or learned["tensors"].keys() != self.gates.scores.keys():
                raise ValueError("its scores are of other units than this model and `kinds` have")
            if learned["steps"] != step:
                raise ValueError(f"its scores are of step {learned['steps']}, and the training is at {step}")
            read = {
                name: {key: _from_text(text, self.gates.scores[name]) for key, text in texts.items()}
                for name, texts in learned["tensors"].items()
            }
        except ValueError as error:
            raise ValueError(f"`resume_from_checkpoint`: {error}.") from None
        for name, score in self.gates.scores.items():
            score.detach().copy_(read[name].pop("score"))
            self._optimizer.state[score] = {"step": torch.tensor(float(step)), **read[name]}
        self._threshold, self._done = learned["threshold"], step


def lowest(values: torch.Tensor, share: float) -> float:
    """The quantile of numbers (n,), between two of them in proportion, as `torch.quantile` has it for less than 2^24."""
    ordered = values.double().sort().values
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (place - below) * (ordered[above] - ordered[below]))


def _penalty_weights(model: nn.Module, widths: Sequence[Width]) -> dict[str, float]:
    """What the penalty's gradient is for each unit of an order, over weight * sigmoid'(S): 0.5 E / (units * layers of the model),
    summed over the layers of the order."""

    def elements(slot: Slot, width: Width) -> int:
        rows, columns = layer_sizes(layer_at(model, slot.path))
        row = columns if slot.side == "out" else rows
        if width.kind == "mlp":
            return row
        return min(_BLOCK, row * sum(length for _, length in slot.parts) // width.units)

    linear = {slot.path for width in widths for slot in width.slots if _is_linear(model, slot)}
    return {
        order.name: sum(0.5 * elements(slot, width) for slot in order.slots if slot.path in linear)
        / (width.units * len(linear))
        for width in widths
        for order in width.orders
    }


def _is_linear(model: nn.Module, slot: Slot) -> bool:
    return find_linear_backend(layer_at(model, slot.path)) is not None


def _average(gradients: list[torch.Tensor]) -> None:
    """Put the mean over the processes of the run in the place of gradients."""
    if ranks.world_size() == 1 or not ranks.is_joined():
        return
    device = gradients[0].device
    flat = torch.cat([gradient.to(device) for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= ranks.world_size()
    for gradient, mean in zip(gradients, flat.split([len(gradient) for gradient in gradients])):
        gradient.copy_(mean)


def _check_engine(args: Any, optimizer: Any) -> None:
    """ValueError for what this was not tried with."""
    engine = getattr(optimizer, "accelerator_state", None)
    kind = "NO" if engine is None else engine.distributed_type.value
    refused = {
        kind: kind not in _ENGINES,
        "fp16": bool(args.fp16) or getattr(optimizer, "scaler", None) is not None,
        "torch_compile": bool(args.torch_compile),
        "nn.DataParallel": args.n_gpu > 1,
    }
    for name, is_so in refused.items():
        if is_so:
            raise ValueError(
                f"`args`: importance by movement is not learned with {name}. Use float32 or bf16, in one process for each GPU (DDP, "
                "`torchrun`)."
            )


def _loop() -> FrameType:
    """The call, of the Trainer or of the user's own loop, that tells the callbacks of its events."""
    frame = sys._getframe()
    while frame.f_globals.get("__name__") in (__name__, TrainerCallback.__module__) and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _to_text(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.detach().cpu().numpy().astype("<f4").tobytes()).decode("ascii")


def _from_text(text: str, like: torch.Tensor) -> torch.Tensor:
    try:
        values = np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")
    except ValueError as error:
        raise ValueError(f"its scores are damaged ({error})") from None
    if len(values) != len(like):
        raise ValueError(f"its scores are of {len(values)} units in the place of {len(like)}")
    return torch.from_numpy(values.astype(np.float32)).to(like.device)
