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
"""Training several subnets in each optimizer step, on transformers' Trainer or a trainer made of it, with distillation."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer

from ..common.checks import is_finite, wrong
from .callback import SubnetSamplingCallback
from .host import get_elastic_host
from .samplers import StepSampler, SubnetSampler
from .space import Subnet
from .stages import Stage


# What the mixin calls is in the trainer behind it; only the type checker has to know.
if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class _StepSampling(SubnetSamplingCallback):
    _several = True


@dataclass
class _MicroBatch:
    """What the passes over one micro-batch share."""

    passes: int
    # of the losses of the passes, how many went through `compute_loss`
    losses: int = 0
    # logits of the teacher, one row per label: (labels, classes)
    teacher_logits: torch.Tensor | None = None


class ElasticTrainerMixin(_Trainer):
    """Lets a trainer train several subnets in each optimizer step. Put it in front of the trainer's class:

    ```python
    class ElasticSFTTrainer(ElasticTrainerMixin, SFTTrainer):
        pass
    ```

    Each micro-batch is passed forward and backward once per subnet, and their gradients accumulate. The loss of a step is
    the mean over its subnets, so that a learning rate means the same for any number of them. In all else the step is the
    trainer's own: gradient accumulation, mixed precision, gradient checkpointing, DDP, which exchanges gradients once a
    step. Which subnets a step trains depends on (seed, global step) alone, and the chosen subnet is evaluated and saved, as
    described in [`SubnetSamplingCallback`], which the trainer adds by itself.

    Args:
        *args, **kwargs: those of the trainer.
        strategy (`"sandwich"`, `"uniform"`, `"balanced"`, a `StepSampler` or a `SubnetSampler`, defaults to `"sandwich"`):
            `"sandwich"` is `SandwichSampler()`: the largest, the smallest and two random subnets.
        distillation (`"max"` or `nn.Module`, *optional*):
            What the subnets imitate. `"max"`: the largest subnet, which must be the first of the step, learns from the
            labels; the others learn from the logits that it had in the same micro-batch, with the same weights (in-place
            distillation, Yu & Huang 2019, https://arxiv.org/abs/1903.05134). No pass is added. A model: all subnets learn
            from its logits; it is put into evaluation mode and runs once per micro-batch, without gradients.
        distillation_weight (`float`, defaults to 0.5): w in (1 - w) * loss + w * T^2 * KL(teacher || subnet), 0 < w <= 1.
        distillation_temperature (`float`, defaults to 1.0):
            T, by which the logits of both are divided (Hinton et al. 2015, https://arxiv.org/abs/1503.02531). The KL
            divergence is the mean over the labels that are not -100, counted as the loss counts them.
        seed, eval_subnet, stages, calibration, averaged, prepare: as in [`SubnetSamplingCallback`].

    Raises:
        ValueError: for a bad argument, a model that is not elastic, or a `SubnetSamplingCallback` among the
            callbacks; when training starts, as in `SubnetSamplingCallback`; in the first step, if `distillation` does not
            fit the strategy, the model's outputs or the teacher's, before any weight has changed.
    """

    def __init__(
        self,
        *args: Any,
        strategy: str | StepSampler | SubnetSampler = "sandwich",
        distillation: str | nn.Module | None = None,
        distillation_weight: float = 0.5,
        distillation_temperature: float = 1.0,
        seed: int | None = None,
        eval_subnet: Subnet | Mapping[str, int] | str | None = None,
        stages: Sequence[Stage] | None = None,
        calibration: Any = None,
        averaged: Any = None,
        prepare: Callable[[nn.Module], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._sampling = _StepSampling(
            strategy, seed, eval_subnet, stages, calibration=calibration, averaged=averaged, prepare=prepare
        )
        if distillation is not None and distillation != "max" and not isinstance(distillation, nn.Module):
            raise wrong("distillation", "None, 'max' or a model", distillation)
        if distillation == "max" and not isinstance(self._sampling.sampler, StepSampler):
            raise ValueError(
                "`distillation='max'` needs a strategy whose steps begin with the largest subnet, such as 'sandwich'; "
                f"`strategy` {strategy!r} trains one subnet in each step."
            )
        for name, value, limit in (
            ("distillation_weight", distillation_weight, 1.0),
            ("distillation_temperature", distillation_temperature, math.inf),
        ):
            if not is_finite(value) or not 0 < value <= limit:
                raise wrong(name, "a number above 0" + (" and at most 1" if limit == 1 else ""), value)
        self.distillation = distillation
        self.distillation_weight = distillation_weight
        self.distillation_temperature = distillation_temperature
        self._micro_batch: _MicroBatch | None = None
        super().__init__(*args, **kwargs)
        get_elastic_host(self.model)
        if any(isinstance(callback, SubnetSamplingCallback) for callback in self.callback_handler.callbacks):
            raise ValueError(
                f"`callbacks` holds a SubnetSamplingCallback, but {type(self).__name__} samples by itself: pass its "
                "`strategy`, `seed`, `eval_subnet`, `stages` and others to the trainer."
            )
        if isinstance(self._sampling.sampler, StepSampler) and hasattr(self, "_buffered_inputs"):
            raise ValueError(
                f"`strategy` {strategy!r} trains several subnets in each step, and {type(self).__name__} counts every pass as "
                "progress through what the model has generated: choose 'uniform', 'balanced' or another of one subnet a step."
            )
        self.add_callback(self._sampling)
        # TRL's SFTTrainer computes its loss without ever building the logits. Its "nll" loss is the one that Trainer
        # takes from the model, with them.
        self._is_trl = any(cls.__module__.startswith("trl.") for cls in type(self).__mro__)
        if distillation is not None and self._is_trl and getattr(self.args, "loss_type", "nll") != "nll":
            raise ValueError(f"`distillation` works with `loss_type='nll'` only, got {self.args.loss_type!r}.")
        if isinstance(distillation, nn.Module):
            self._prepare_teacher(distillation)

    def _prepare_teacher(self, teacher: nn.Module) -> None:
        weights = {id(weight) for weight in self.model.parameters()}
        if any(id(weight) in weights for weight in teacher.parameters()):
            raise ValueError(
                "`distillation` is a model that shares weights with the trained one, so it would change with it. Use 'max' "
                "to distill from the largest subnet, or a copy (`copy.deepcopy`) made before it became elastic."
            )
        _check_labels(teacher, self.model)
        if getattr(teacher, "hf_device_map", None) is None:
            teacher.to(self.args.device)
        teacher.eval()

    def subnets_of_step(self, step: int) -> list[Subnet]:
        """List the subnets that optimizer step number `step` (from 0) trains, in their order.

        Raises:
            ValueError: before training has started, as the stages depend on its length.
        """
        return self._sampling.subnets_of_step(step)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Take one forward and backward pass per subnet of the step; the mean of their losses."""
        host, subnets = get_elastic_host(model), self.subnets_of_step(self.state.global_step)
        if self.distillation == "max" and subnets[0] != host.search_space.max:
            raise ValueError(
                "`distillation='max'` needs a strategy whose steps begin with the largest subnet, such as 'sandwich'; "
                f"`strategy` gives {subnets[0]} for step {self.state.global_step}."
            )
        parallel = getattr(self.accelerator, "parallelism_config", None)
        if (
            len(subnets) > 1
            and parallel is not None
            and (parallel.cp_enabled or getattr(parallel, "sp_enabled", False))
        ):
            # It cuts the inputs in place, in every pass anew.
            raise ValueError(
                "`parallelism_config` asks for context or sequence parallelism: train one subnet a step with it."
            )
        gradients = self.accelerator.gradient_state
        last_micro_batch = gradients.sync_gradients
        self._micro_batch = _MicroBatch(len(subnets))
        losses = []
        try:
            for number, subnet in enumerate(subnets, 1):
                host.sample_subnet(subnet)
                # Before the last micro-batch, the Trainer itself holds back the exchange of gradients.
                hold_back = last_micro_batch and number < len(subnets)
                gradients._set_sync_gradients(last_micro_batch and not hold_back)
                with self.accelerator.no_sync(model) if hold_back else contextlib.nullcontext():
                    losses.append(super().training_step(model, inputs, num_items_in_batch))
                if len(subnets) > 1 and not self._micro_batch.losses:
                    raise ValueError(
                        f"{type(self).__name__} does not compute its loss in `compute_loss`, so the mean over several subnets cannot "
                        "be taken. Choose a `strategy` of one subnet a step, such as 'uniform'."
                    )
        finally:
            self._micro_batch = None
            gradients._set_sync_gradients(last_micro_batch)
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Compute the trainer's loss, in training with the share of the step's mean that the active subnet has, and distilled."""
        micro_batch = self._micro_batch
        if micro_batch is None or self.distillation is None:
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
            if micro_batch is None:
                return result
            loss, outputs = result if return_outputs else (result, None)
        else:
            # the trainer may take the labels out of what it is given
            given = dict(inputs)
            if isinstance(self.distillation, nn.Module) and micro_batch.teacher_logits is None:
                micro_batch.teacher_logits = self._run_teacher(self.distillation, given)
            compute = Trainer.compute_loss.__get__(self) if self._is_trl else super().compute_loss
            loss, outputs = compute(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
            logits = self._logits_of_labels(outputs, given)
            if micro_batch.teacher_logits is None:
                micro_batch.teacher_logits = logits.detach()
            else:
                divergence = self._divergence(logits, micro_batch.teacher_logits, num_items_in_batch)
                weight, temperature = self.distillation_weight, self.distillation_temperature
                loss = (1 - weight) * loss + weight * temperature**2 * divergence
        micro_batch.losses += 1
        loss = loss / micro_batch.passes
        return (loss, outputs) if return_outputs else loss

    def _run_teacher(self, teacher: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        # Encoder-decoder models make the inputs of the decoder of the labels. To others they are of no use, and may be
        # out of range if the teacher is of another kind, which is for the comparison of logits to say.
        keep = getattr(getattr(teacher, "config", None), "is_encoder_decoder", False)
        teacher_inputs = inputs if keep else {k: v for k, v in inputs.items() if k not in ("labels", "shift_labels")}
        with torch.no_grad(), self.accelerator.autocast():
            return self._logits_of_labels(teacher(**teacher_inputs), inputs)

    def _logits_of_labels(self, outputs: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """The logits that predict the labels which are not -100: (labels, classes)."""
        logits, labels = getattr(outputs, "logits", None), inputs.get("shift_labels", inputs.get("labels"))
        if logits is not None and labels is not None:
            if self._loss_shifts_labels and "shift_labels" not in inputs:
                logits, labels = logits[..., :-1, :], labels[..., 1:]
            if logits.shape[:-1] == labels.shape and logits.shape[-1] > 1:
                return logits[labels != -100]
        raise ValueError(
            "`distillation` needs a model with `labels` and, for each of them, `logits` of two or more classes (language "
            f"models, classifiers); labels are {_shape(labels)} and logits {_shape(logits)}."
        )

    def _divergence(self, logits: torch.Tensor, teacher_logits: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        """KL(teacher || subnet) at temperature T, averaged over labels in the way the Trainer averages the loss."""
        if logits.shape != teacher_logits.shape:
            raise ValueError(
                f"`distillation` is a model with {teacher_logits.shape[-1]} classes (vocabulary or labels), the trained "
                f"model has {logits.shape[-1]}: they must be the same."
            )
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_student, log_teacher = (
            F.log_softmax(values.to(dtype) / self.distillation_temperature, dim=-1)
            for values in (logits, teacher_logits)
        )
        divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        # What follows mirrors `Trainer.compute_loss` and `Trainer.training_step`.
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = self.compute_loss_func is not None or (
                self.model_accepts_loss_kwargs and num_items_in_batch is not None
            )
        if not scaled or num_items_in_batch is None:
            mean = divergence / max(1, len(logits))
            return mean / self.current_gradient_accumulation_steps if scaled else mean
        if self.args.n_gpu > 1:
            # nn.DataParallel: the logits are those of all devices, whose losses are averaged afterwards. Each has been given the same
            # number, which is that of all of them, or else its share.
            devices = 1 if self.args.average_tokens_across_devices else self.args.n_gpu
            return divergence / (num_items_in_batch.flatten()[0] * devices)
        if self.args.average_tokens_across_devices:
            divergence = divergence * (self.accelerator.num_processes // self.get_tp_size())
        return divergence / num_items_in_batch


class ElasticTrainer(ElasticTrainerMixin, Trainer):
    """transformers' Trainer, training several subnets in each optimizer step. See [`ElasticTrainerMixin`]."""


def _check_labels(teacher: nn.Module, model: nn.Module) -> None:
    """ValueError if a teacher and the trained model are classifiers that mean different things by their classes."""
    ours, theirs = (_labels_of(each) for each in (model, teacher))
    if ours is None or theirs is None:
        return
    named = [labels for labels in (ours, theirs) if any(name != f"LABEL_{i}" for i, name in labels.items())]
    if len(ours) != len(theirs) or (len(named) == 2 and named[0] != named[1]):
        raise wrong("distillation", f"a model with the labels of the trained one, {ours}", theirs)


def _labels_of(model: nn.Module) -> dict[int, str] | None:
    """Number -> name of the classes of a classifier, which are not the names of the configuration alone: language models have them too."""
    config = getattr(model, "config", None)
    if not re.search("For(Sequence|Token|Image|Audio|Video)\\w*Classification$", _class_name(model)):
        return None
    return dict(getattr(config, "id2label", None) or {}) or None


def _class_name(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__


def _shape(tensor: Any) -> str:
    return "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
