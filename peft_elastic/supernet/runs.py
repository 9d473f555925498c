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
"""Which callback decides what the steps of a training compute."""

from __future__ import annotations

from typing import Any


_ATTRIBUTE = "_peft_elastic_callback"


def claim_run(state: Any, callback: Any, name: str) -> None:
    """Let one callback alone decide what the steps of a run compute.

    Args:
        state (`TrainerState`): the Trainer's, which makes one for each run.
        callback: the callback.
        name (`str`): what users know it by.

    Raises:
        ValueError: if another one does.
    """
    other, known = vars(state).setdefault(_ATTRIBUTE, (callback, name))
    if other is not callback:
        raise ValueError(
            f"`callbacks`: {known} and {name} cannot be in one training, as each decides what its steps compute. Train twice: "
            "importance is learned on the whole model, before its subnets are trained."
        )
