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
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import TrainerCallback

from .host import ElasticHost, get_elastic_host
from .samplers import BalancedSampler, SubnetSampler, UniformSampler
from .space import Subnet


logger = logging.getLogger(__name__)

_STRATEGIES: dict[str, type[SubnetSampler]] = {"balanced": BalancedSampler, "uniform": UniformSampler}


class SubnetSamplingCallback(TrainerCallback):
    """Trains a super-network with transformers' Trainer (or TRL's): each optimizer step trains one sampled subnet.

    The subnet is a function of (seed, global step) alone. So it is the same in every micro-batch of a gradient
    accumulation, when gradient checkpointing computes a block a second time, on every process of a distributed run, and
    after a restart from a checkpoint. Between steps the chosen subnet (`model.set_subnet`, or `eval_subnet` here) is
    active: it is the one that gets evaluated and saved. The log says which one an evaluation ran, and so do
    `eval_subnet` and `eval_subnet_parameters` (active adapter parameters) in `trainer.state.log_history`.

    Args:
        strategy (`"uniform"`, `"balanced"` or a `SubnetSampler`, defaults to `"uniform"`):
            `"uniform"` draws every choice independently; `"balanced"` spreads the subnets evenly over their number of
            parameters; or any callable `(space, numpy.random.Generator) -> Subnet`.
        seed (`int`, *optional*): seed of the draws; defaults to the `seed` of the training arguments.
        eval_subnet (`Subnet`, `Mapping` or `str`, *optional*):
            The subnet to evaluate and save, as in `model.set_subnet`. Defaults to the one chosen when training starts.

    Raises:
        ValueError: for an unknown strategy or a bad seed; when training starts, for a model without an elastic adapter
            or an `eval_subnet` that does not belong to its search space.
    """

    def __init__(
        self,
        strategy: str | SubnetSampler = "uniform",
        seed: int | None = None,
        eval_subnet: Subnet | Mapping[str, int] | str | None = None,
    ) -> None:
        if isinstance(strategy, str) and strategy in _STRATEGIES:
            self.sampler: SubnetSampler = _STRATEGIES[strategy]()
        elif callable(strategy) and not isinstance(strategy, type):
            self.sampler = strategy
        else:
            raise ValueError(
                f"`strategy` must be one of {sorted(_STRATEGIES)} or a callable (space, rng) -> Subnet, got {strategy!r}."
            )
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise ValueError(f"`seed` must be a non-negative integer or None, got {seed!r}.")
        self.seed = seed
        self.eval_subnet = eval_subnet
        self._host: ElasticHost | None = None
        self._args_seed = 0
        self._reported: str | None = None

    def subnet_of_step(self, step: int) -> Subnet:
        """The subnet that optimizer step number `step` (from 0) trains.

        Raises:
            ValueError: before training has started, as the search space comes from the model.
        """
        if self._host is None:
            raise ValueError("`subnet_of_step` is known once training has started: the search space is the model's.")
        seed = self._args_seed if self.seed is None else self.seed
        return self.sampler(self._host.search_space, np.random.default_rng([seed, step]))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._host, self._args_seed = get_elastic_host(model), args.seed
        if self.eval_subnet is None:
            self._host.restore_subnet()  # an earlier run may have been interrupted in the middle of a step
        else:
            self._host.set_subnet(self.eval_subnet)
        logger.info(f"Training {self._host.search_space} with {type(self.sampler).__name__}.")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._host is not None
        self._host.sample_subnet(self.subnet_of_step(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._host is not None
        self._host.restore_subnet()

    # a step that is cut short in the middle of its gradient accumulation has no end
    on_epoch_end = on_step_end

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, metrics: Any = None, **kwargs: Any
    ) -> None:
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
        name = next((name for name in ("max", "min", "heuristic") if subnet == getattr(space, name)), "custom")
        parameters = space.count_parameters(subnet)
        message = f"{action} the {name} subnet ({parameters:,d} of {space.count_parameters(space.max):,d} adapter parameters)."
        if state.is_world_process_zero:
            logger.log(logging.INFO if message == self._reported else logging.WARNING, message)
        self._reported = message
        return name, parameters
