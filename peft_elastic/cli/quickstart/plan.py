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
"""How much `peft-elastic quickstart` does of everything."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How much of everything. The numbers are chosen for 10 minutes on two CPU cores."""

    sparsity: float = 0.5
    calibration: tuple[int, int] = (32, 128)  # sequences, tokens
    ranks: tuple[int, ...] = (32, 24, 16)
    learning_rate: float = 5e-4
    batch_size: int = 16
    steps: int = 50
    quantized_steps: int = 20
    evals: int = 24
    validation: int = 100  # examples
    test: int = 300
    serving: tuple[int, int, int, int] = (32, 32, 2, 2)  # tokens of the prompt, new tokens, repeats, rounds


SMOKE = Plan(
    calibration=(8, 32),
    ranks=(8, 6, 4),
    batch_size=8,
    steps=6,
    quantized_steps=3,
    evals=6,
    validation=16,
    test=24,
    serving=(4, 4, 1, 1),
)
