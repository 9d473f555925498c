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

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from ..common import ranks
from ..common.checks import check_whole, wrong
from .context import eval_mode, seeded
from .generations import Generations
from .host import ElasticHost, get_elastic_host
from .runs import claim_run
from .samplers import StepSampler, SubnetSampler, sampler_of
from .space import SearchSpace, Subnet
from .stages import Stage, StagePlan, check_stages
from .summary import describe_parameters, name_of, trained_parameters


logger = logging.getLogger(__name__)

_COMPARED_STEPS = 4
# Under which the state of a training, in its checkpoints, has the orders of the last sorting, and the step before which it was.
_ORDERS = "peft_elastic.orders"


class SubnetSamplingCallback(TrainerCallback):
    """Trains a super-network with transformers' Trainer (or TRL's): each optimizer step trains one sampled subnet.

    The subnet is a function of (seed, global step) alone. So it is the same in every micro-batch of a gradient
    accumulation, when gradient checkpointing computes a block a second time, on every process of a distributed run, and
    after a restart from a checkpoint. Where TRL's GRPO, RLOO and their relatives train on one generation in several steps
    (`num_iterations`, `steps_per_generation`), it is that of the first of them, as they compare probabilities of tokens
    then and now. Between steps the chosen subnet (`model.set_subnet`, or `eval_subnet` here) is
    active: it is the one that gets evaluated and saved. The log says which one an evaluation ran, and so do
    `eval_subnet` and `eval_subnet_parameters` (active parameters, of the adapter if there is one) in `trainer.state.log_history`.

    Args:
        strategy (`"uniform"`, `"balanced"` or a `SubnetSampler`, defaults to `"uniform"`):
            `"uniform"` draws every choice independently; `"balanced"` spreads the subnets evenly over their number of
            parameters; or any callable `(space, numpy.random.Generator) -> Subnet`.
        seed (`int`, *optional*): seed of the draws; defaults to the `seed` of the training arguments.
        eval_subnet (`Subnet`, `Mapping` or `str`, *optional*):
            The subnet to evaluate and save, as in `model.set_subnet`. Defaults to the one chosen when training starts.
        stages (sequence of `Stage`, *optional*):
            Progressive shrinking: which kinds of choices are sampled for how many epochs or steps, how many of their options, at what
            learning rate, and whether the model is sorted first. By default all kinds are, all the time.
        calibration (*optional*): batches for stages that sort (`Stage(sort=True)`) by an importance that needs data: a list, or
            anything else that can be gone through several times.
        averaged (*optional*): an average of the weights (`torch.optim.swa_utils.AveragedModel`), another copy of the model, or a list
            of some, which stages that sort bring into the same order. A training that is resumed takes them as they were in the
            step of the checkpoint.
        prepare (*optional*):
            A function of the model that is called before each evaluation in the training, with the chosen subnet active, in evaluation
            mode, without gradients; the global generators are those of the training again afterwards. For what a subnet needs
            before it can be judged, such as statistics of its normalisations.

    Raises:
        ValueError: for an unknown strategy, one that trains several subnets in a step (see `ElasticTrainer`), a bad seed
            or bad stages; when training starts, for a model that is not elastic, an `eval_subnet` that does not
            belong to its search space, stages that do not fit the space, the training arguments or the checkpoint, or that cannot
            sort, or PPO; and where the processes of a distributed run would train different subnets.
    """

    # whether the Trainer can train several subnets in a step
    _several = False

    def __init__(
        self,
        strategy: str | SubnetSampler | StepSampler = "uniform",
        seed: int | None = None,
        eval_subnet: Subnet | Mapping[str, int] | str | None = None,
        stages: Sequence[Stage] | None = None,
        *,
        calibration: Any = None,
        averaged: Any = None,
        prepare: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        self.sampler = sampler_of(strategy, several=self._several)
        check_whole("seed", seed, least=0, optional=True)
        self.seed = seed
        self.eval_subnet = eval_subnet
        self.stages = check_stages(stages)
        if isinstance(calibration, Iterator):
            raise wrong(
                "calibration", "a list of batches, or what else can be gone through several times", calibration
            )
        if prepare is not None and not callable(prepare):
            raise wrong("prepare", "a function of the model, or None", prepare)
        self.calibration = calibration
        self.averaged = averaged
        self.prepare = prepare
        # whether training goes on, and `prepare` has been called since its last step
        self._is_training = self._is_prepared = False
        # of the last step before which this run has sorted
        self._sorted_step: int | None = None
        self._plan: StagePlan | None = None
        self._generations = Generations()
        self._is_of_new_trainer = False
        self._host: ElasticHost | None = None
        self._args_seed = 0
        self._reported: str | None = None
        # whether the optimizer moves weights that have no gradient, too
        self._all_move = False

    def subnets_of_step(self, step: int) -> list[Subnet]:
        """List the subnets that optimizer step number `step` (from 0) trains, in their order.

        Raises:
            ValueError: before training has started, as the search space comes from the model; if the strategy gives none.
        """
        if self._plan is None:
            raise ValueError(
                "The subnets of a step are known once training has started: the search space is the model's."
            )
        step = self._generations.first_step(step)
        rng = np.random.default_rng([self._args_seed if self.seed is None else self.seed, step])
        space = self._plan.space_of_step(step)
        if not isinstance(self.sampler, StepSampler):
            return [self.sampler(space, rng)]
        if not (subnets := list(self.sampler.subnets_of_step(space, rng))):
            raise ValueError(f"`strategy` ({type(self.sampler).__name__}) gives no subnet for step {step}.")
        return subnets

    def subnet_of_step(self, step: int) -> Subnet:
        """Draw the subnet that optimizer step number `step` (from 0) trains, the first one if there are several.

        Raises:
            ValueError: before training has started, as the search space comes from the model.
        """
        return self.subnets_of_step(step)[0]

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_of_new_trainer = True

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        lr_scheduler: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        host = get_elastic_host(model)
        claim_run(state, self, "ElasticTrainer" if self._several else "SubnetSamplingCallback")
        if hasattr(args, "num_ppo_epochs"):
            raise ValueError(
                "PPO (`num_ppo_epochs` in the training arguments) takes many optimizer steps in a loop of its own, without telling "
                "its callbacks, so no subnets can be sampled. Train with GRPO or RLOO of TRL, or without the callback."
            )
        if hasattr(args, "max_staleness") and hasattr(args, "epsilon"):
            raise ValueError(
                "Asynchronous GRPO compares probabilities of tokens with those of a server that has all ranks, and of steps long past, "
                "so subnets cannot be sampled. Train with GRPO or RLOO of TRL, or without the callback."
            )
        self._all_move = getattr(args, "deepspeed_plugin", None) is not None
        if self._all_move and not isinstance(self.sampler, StepSampler):
            _check_nothing_skipped(
                host.search_space, [host.search_space.min], "`strategy` trains one subnet a step, which"
            )
        plan = StagePlan(self.stages, host.search_space, args, state.max_steps, lr_scheduler)
        self._resume_orders(host, state, plan)
        if plan.sorting_steps:
            self._check_sorting(args, host, optimizer)
        if state.global_step and (check := getattr(host, "check_checkpoint", None)):
            check(_checkpoint(args, state))
        if self.eval_subnet is None:
            host.restore_subnet()  # an earlier run may have been interrupted in the middle of a step
        else:
            host.set_subnet(self.eval_subnet)
        plan.scale_learning_rate(lr_scheduler)
        self._host, self._plan, self._args_seed = host, plan, args.seed
        if self._is_of_new_trainer:
            self._generations, self._is_of_new_trainer = Generations(), False
        self._generations.begin(args, state.global_step)
        self._check_agreement(host, state.global_step)
        self._is_training, self._is_prepared, self._sorted_step = True, False, None
        if getattr(args, "eval_on_start", False):
            self._prepare(model)
        logger.info(f"Training {host.search_space} with {type(self.sampler).__name__}.")

    def _check_sorting(self, args: Any, host: ElasticHost, optimizer: Any) -> None:
        """ValueError unless the stages can sort in this training."""
        if ranks.world_size() > 1:
            raise ValueError(
                "`stages` with `sort=True` work in one process: sums on several devices differ in their last bits, and so would the "
                "orders. Sort before the training, `model.sort_by_importance(calibration)`."
            )
        if getattr(args, "load_best_model_at_end", False):
            raise ValueError(
                "`load_best_model_at_end` may load the weights of a step before the last sorting, which are in another order: leave it "
                "off with `stages` that sort, and load the checkpoint that you choose."
            )
        if hasattr(args, "num_iterations"):
            raise ValueError(
                "`stages` with `sort=True` do not go with trainers that train several steps on one generation, whose subnets would be "
                "others in the middle of it. Sort before the training."
            )
        if (check := getattr(host, "check_sort", None)) is None:
            raise ValueError(
                f"`stages` with `sort=True` need a model that can be sorted, and {type(host).__name__} cannot."
            )
        try:
            check(self.calibration, optimizer=optimizer, averaged=self.averaged)
        except ValueError as error:
            raise ValueError(f"A stage with `sort=True`: {error}") from error

    def _resume_orders(self, host: Any, state: Any, plan: StagePlan) -> None:
        """After a restart, note the order that the weights of the checkpoint are in. What was sorted is not sorted again.

        Raises:
            ValueError: if the checkpoint is from a training with other stages.
        """
        if not state.global_step:
            state.stateful_callbacks.pop(_ORDERS, None)
            return
        then = max((step for step in plan.sorting_steps if step < state.global_step), default=None)
        noted = state.stateful_callbacks.get(_ORDERS)
        if then != (noted and noted["step"]):
            raise ValueError(
                f"`stages`: by them the model was last sorted before step {then}, and in the training that is gone on with "
                f"{'never' if noted is None else 'before step ' + str(noted['step'])}. Give the same stages as to that."
            )
        if noted is not None:
            orders = {name: torch.tensor(order, dtype=torch.int64) for name, order in noted["orders"].items()}
            host.resume_orders(orders, averaged=self.averaged)

    def _sort(self, state: Any, optimizer: Any) -> None:
        host: Any = self._host
        seed = self._args_seed if self.seed is None else self.seed
        # the training draws as if nothing had been sorted, and a calibration that is shuffled is so in the same way
        with seeded(seed + state.global_step):
            host.sort_by_importance(self.calibration, optimizer=optimizer, averaged=self.averaged, progress=False)
        orders = {name: order.tolist() for name, order in host.noted_orders().items()}
        # in the checkpoint the orders are beside the step, so that one is never read without the other
        state.stateful_callbacks[_ORDERS] = {"step": state.global_step, "orders": orders}
        self._sorted_step = state.global_step
        logger.info(f"Sorted {len(orders)} orders before step {state.global_step}.")

    def _prepare(self, model: Any) -> None:
        """Call `prepare` before an evaluation, once after each step."""
        if self.prepare is None or self._is_prepared:
            return
        seed = self._args_seed if self.seed is None else self.seed
        with eval_mode(model), seeded(seed), torch.no_grad():
            self.prepare(model)
        self._is_prepared = True

    def _check_agreement(self, host: ElasticHost, step: int) -> None:
        """ValueError unless all processes of the run train the same subnets. Gradients of different ones would be averaged, and
        engines that spread the weights would wait for each other for ever."""
        if ranks.world_size() == 1 or not ranks.is_joined():
            return
        mine = {
            "search space": [(choice.key, choice.options) for choice in host.search_space],
            "chosen subnet": dict(host.active_subnet),
            "sampled subnets": [
                [dict(s) for s in self.subnets_of_step(n)] for n in range(step, step + _COMPARED_STEPS)
            ],
        }
        everybody = ranks.gather(mine)
        for what, value in everybody[0].items():
            if odd := [rank for rank, theirs in enumerate(everybody) if theirs[what] != value]:
                raise ValueError(
                    f"`model` or `strategy`: the processes {odd} of this run have another {what} than process 0. Give all of them the "
                    "same configuration and `seed`, and let a strategy of your own take all its randomness from its `rng`."
                )

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        assert self._host is not None and self._plan is not None
        self._is_prepared = False
        # an epoch may end in the middle of a step, which is then begun a second time
        if state.global_step in self._plan.sorting_steps and state.global_step != self._sorted_step:
            self._sort(state, optimizer)
        self._generations.begin_step(state.global_step)
        if self._all_move:
            subnets = self.subnets_of_step(state.global_step)
            _check_nothing_skipped(self._host.search_space, subnets, f"Every subnet of step {state.global_step}")
        self._host.sample_subnet(self.subnet_of_step(state.global_step))

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._generations.end_micro_batch()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self._host is not None
        self._generations.end_micro_batch()
        self._host.restore_subnet()
        if control is not None and control.should_evaluate:
            self._prepare(model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        assert self._host is not None
        self._host.restore_subnet()  # a step that is cut short in the middle of its gradient accumulation has no end
        if control is not None and control.should_evaluate:
            self._prepare(model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._is_training = False

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
        if self._is_training and self.prepare is not None and not self._is_prepared:
            raise ValueError(
                "`prepare` was not called before this evaluation: another callback asked for it later in the step, and has to stand before "
                "this in `callbacks`; or the training was interrupted, after which to evaluate call `prepare` and set it to None here."
            )
        name, parameters = self._report("Evaluated", model, state)
        # `metrics` itself is for numbers: Trainer's hyperparameter search adds up what it finds there
        if state.log_history and state.log_history[-1].keys() >= (metrics or {}).keys():
            state.log_history[-1].update(eval_subnet=name, eval_subnet_parameters=parameters)

    def on_predict(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._report("Predicted with", model, state)

    def _report(self, action: str, model: Any, state: Any) -> tuple[str, int]:
        """Name the active subnet in the log, as a warning (which is what transformers shows by default) where it is news."""
        host = get_elastic_host(model)
        space, subnet = host.search_space, host.active_subnet
        name, parameters = name_of(space, subnet), trained_parameters(space, subnet)
        message = f"{action} the {name} subnet ({describe_parameters(space, subnet)})."
        if state.is_world_process_zero:
            logger.log(logging.INFO if message == self._reported else logging.WARNING, message)
        self._reported = message
        return name, parameters


def _checkpoint(args: Any, state: Any) -> str:
    """Where the Trainer has most likely resumed from; it does not say."""
    given = args.resume_from_checkpoint
    return given if isinstance(given, str) else os.path.join(args.output_dir, f"checkpoint-{state.global_step}")


def _check_nothing_skipped(space: SearchSpace, subnets: Sequence[Subnet], who: str) -> None:
    """ValueError if a part of the model is in none of the subnets of a step. DeepSpeed keeps the weights of all blocks in one flat
    tensor, and gives those that have no gradient one of zeros: AdamW then moves them by their momentum, and counts the step, where it
    leaves them alone in one process and under DDP and FSDP2."""
    for choice in space:
        if choice.kind == "depth" and max(subnet[choice.key] for subnet in subnets) < choice.options[0]:
            raise ValueError(
                f"{who} may skip {choice.name!r}, whose weights DeepSpeed's optimizer would move all the same. With elastic depth train "
                "several subnets a step, the largest among them (`ElasticTrainer(strategy='sandwich')`), or use FSDP2 or DDP."
            )
