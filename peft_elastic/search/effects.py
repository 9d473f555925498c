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
"""Which choices of a search space matter, from a few hundred cheap evaluations on single batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..common.checks import check_whole, wrong
from ..supernet import Choice, ElasticHost, SearchSpace, Subnet, get_elastic_host
from ..supernet.context import eval_mode, subnet_restored


@dataclass(frozen=True)
class ChoiceEffects:
    """How much each choice of a search space changes the loss.

    Args:
        space (`SearchSpace`): the space.
        effects (`dict[str, float]`):
            Expected rise of the loss when the choice goes from its largest to its smallest option, by choice key.
            Choices with a single option have the effect 0.
        standard_errors (`dict[str, float]`): the standard error of each effect.
        n_evaluations (`int`): forward passes it took.
    """

    space: SearchSpace
    effects: dict[str, float]
    standard_errors: dict[str, float]
    n_evaluations: int

    def subnet(self, max_parameters: int) -> Subnet:
        """The subnet within a budget that the effects favour: choices that cost the least loss for each parameter they
        save are lowered first.

        Args:
            max_parameters (`int`): the most active adapter parameters it may have.

        Raises:
            ValueError: if not even the smallest subnet has that few.
        """
        least = self.space.count_parameters(self.space.min)
        if max_parameters < least:
            raise ValueError(f"`max_parameters` is {max_parameters}, the smallest subnet has {least}.")
        elastic = [choice for choice in self.space if len(choice.options) > 1]
        elastic.sort(key=lambda c: self.effects[c.key] / max(1, (c.options[0] - c.options[-1]) * c.unit_parameters))
        values = self.space.max.to_dict()
        for choice in elastic:
            for option in choice.options[1:]:
                if self.space.count_parameters(values) <= max_parameters:
                    return Subnet(values)
                values[choice.key] = option
        return Subnet(values)


def estimate_effects(
    model: Any,
    batches: Iterable[Mapping[str, torch.Tensor]],
    per_batch: int = 8,
    seed: int = 0,
    prepare: Callable[[Any], Any] | None = None,
) -> ChoiceEffects:
    """Estimate by regression how much each choice matters.

    On each batch the loss of `per_batch` random subnets is measured. Batches differ in difficulty far more than subnets
    do, so the mean over the subnets of a batch is taken off before the losses are regressed on the choices. Counting
    which rank was drawn most often, or which subnet happened to get the lowest loss in training, measures the luck of
    the draw instead.

    Args:
        model: an elastic model whose output has a `loss`; it is left as it was found.
        batches (`Iterable[Mapping[str, torch.Tensor]]`): inputs with labels; see `ValueError` for how many it takes.
        per_batch (`int`): subnets per batch, at least 2.
        seed (`int`): of the subnets drawn.
        prepare (`Callable`, *optional*): as of `search_subnet`, called as `prepare(model)` with each subnet active.

    Raises:
        ValueError: if there are too few evaluations for the number of choices, or the model returns no loss.
    """
    check_whole("per_batch", per_batch, least=2)
    if prepare is not None and not callable(prepare):
        raise wrong("prepare", "a function of the model, or None", prepare)
    host = get_elastic_host(model)
    space = host.search_space
    elastic = [choice for choice in space if len(choice.options) > 1]
    rng = np.random.default_rng(seed)
    rows: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    with subnet_restored(host), eval_mode(model):
        for batch in batches:
            subnets = [space.sample(rng) for _ in range(per_batch)]
            measured = np.array([_loss(model, host, batch, subnet, prepare) for subnet in subnets])
            design = np.array([[_lowered(choice, subnet) for choice in elastic] for subnet in subnets])
            rows.append(design - design.mean(axis=0))
            losses.append(measured - measured.mean())
    n_batches = len(rows)
    free = n_batches * (per_batch - 1) - len(elastic)
    if free < 1:
        raise ValueError(
            f"`batches` holds {n_batches} batches, which with per_batch={per_batch} are too few for {len(elastic)} "
            f"choices: (per_batch - 1) * batches must exceed {len(elastic)}."
        )
    x, y = np.concatenate(rows), np.concatenate(losses)
    coefficients, *_ = np.linalg.lstsq(x, y, rcond=None)
    variance = float(np.sum((y - x @ coefficients) ** 2)) / free
    errors = np.sqrt(variance * np.diag(np.linalg.pinv(x.T @ x)))
    effects = {choice.key: 0.0 for choice in space}
    standard_errors = dict(effects)
    for choice, coefficient, error in zip(elastic, coefficients, errors):
        effects[choice.key] = float(coefficient)
        standard_errors[choice.key] = float(error)
    return ChoiceEffects(space, effects, standard_errors, n_evaluations=len(y))


def _lowered(choice: Choice, subnet: Subnet) -> float:
    """0 at the largest option, 1 at the smallest."""
    return (choice.options[0] - subnet[choice.key]) / (choice.options[0] - choice.options[-1])


@torch.no_grad()
def _loss(
    model: Any,
    host: ElasticHost,
    batch: Mapping[str, torch.Tensor],
    subnet: Subnet,
    prepare: Callable[[Any], Any] | None,
) -> float:
    host.sample_subnet(subnet)
    if prepare is not None:
        prepare(model)
    device = next(model.parameters()).device
    output = model(**{name: value.to(device) for name, value in batch.items()})
    if getattr(output, "loss", None) is None:
        raise ValueError("`batches` must hold labels, so that the model returns a loss.")
    return float(output.loss)
