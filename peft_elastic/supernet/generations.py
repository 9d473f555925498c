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
"""Trainers that train on what the model itself has generated, such as TRL's GRPO and RLOO, and use it for several steps."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any


class Generations:
    """Which optimizer steps of a run belong together because they train on one generation.

    Such a trainer compares the probabilities of tokens in a step with those at the time of the generation. The ratio tells how
    far the optimizer has moved the weights, so all these steps must train the subnet that was active then. The trainer counts
    the calls of its `training_step` since it was made, and generates at every multiple of `steps_per_generation *
    num_iterations` (of its arguments); this counts along.
    """

    def __init__(self) -> None:
        self._done = 0  # calls of `training_step`
        self._every = self._accumulation = 1
        self._done_at = 0  # when the last step began
        # steps that began in this run, and for each of them the step whose subnet it trains
        self._steps: list[int] = []
        self._firsts: list[int] = []

    def begin(self, args: Any, step: int) -> None:
        """A run begins, with optimizer step number `step`."""
        self._accumulation = getattr(
            args, "gradient_accumulation_steps", 1
        )  # loops of one's own may have other arguments
        length = getattr(args, "steps_per_generation", None) or self._accumulation
        iterations = getattr(args, "num_iterations", None)
        self._every = 1 if iterations is None else iterations * length
        # a run may end in the middle of a generation, and the next one of the same trainer goes on with that
        unfinished = self._firsts[-1:] if self._done % self._every else []
        self._firsts = unfinished or [step]
        self._steps = [step]
        self._done_at = self._done

    def begin_step(self, step: int) -> None:
        if step != self._steps[-1]:
            self._firsts.append(self._firsts[-1] if self._done % self._every else step)
            self._steps.append(step)
            self._done_at = self._done

    def end_micro_batch(self) -> None:
        self._done += 1

    def first_step(self, step: int) -> int:
        """The step, of those that train on the same generation as `step`, that came first. It is known of those that were, and
        foreseen of those to come."""
        last = self._steps[-1]
        if step > last:
            for later in range(step, last, -1):
                if (self._done_at + (later - last) * self._accumulation) % self._every == 0:
                    return later
        if step < self._steps[0]:  # of an earlier run
            return step
        return self._firsts[bisect_right(self._steps, step) - 1]
