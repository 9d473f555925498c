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
"""Second moments of the inputs of layers: what methods stand on that make up for a change of one weight with the others."""

from __future__ import annotations

from typing import Any

import torch

from ..common.checks import is_finite, wrong
from .inputs import InputCollector


class InputGrams(InputCollector):
    """X^T X (in, in) of the inputs X (tokens, in) of layers over all calibration tokens: half the Hessian of the squared error
    of the outputs with respect to a row of the weight."""

    def _measure(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.T @ tokens


def by_hessian(hessians: dict[str, torch.Tensor]) -> list[tuple[list[str], torch.Tensor]]:
    """Layers with the same Hessian, because they have the same inputs (q, k and v of an attention), are treated together."""
    groups: list[tuple[list[str], torch.Tensor]] = []
    for name, hessian in hessians.items():
        for names, other in groups:
            if torch.equal(hessian, other):
                names.append(name)
                break
        else:
            groups.append(([name], hessian))
    return groups


def inverse_factor(hessian: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """
    The upper triangular U with U^T U = (H + d I)^-1, d = damping * mean(diag H).

    Inputs that are always zero have zero rows and columns in H; with the damping they are independent of all others.

    Raises:
        ValueError: no damping up to the mean of the diagonal makes H positive definite.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if not mean > 0:
        mean = torch.ones_like(mean)  # no input was ever anything but zero
    share = damping
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(mean * share)
        # H = R R^T with R upper triangular is Cholesky's H = L L^T with the order of the inputs turned round, and U = R^-1.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            factor = torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)
            if bool(torch.isfinite(factor).all()):
                return factor
        if share >= 1:
            raise ValueError(
                f"`damping` is {damping}, and the Hessian of {name} is not positive definite with any up to 1; give more, or "
                "more varied, calibration data, or a model in float32."
            )
        share = min(share * 10, 1.0)


def check_damping(damping: Any) -> None:
    """ValueError unless this is a share of the mean of a Hessian's diagonal, as `inverse_factor` takes it."""
    if not is_finite(damping) or not 0 < damping <= 1:
        raise wrong("damping", "a number above 0 and at most 1", damping)


def output_error(difference: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor) -> float | None:
    """||X D^T|| / ||X W^T|| (Frobenius norms) for D (out, in), from H = X^T X; None if X W^T is zero."""
    total = ((weight @ hessian) * weight).sum()
    wrong = ((difference @ hessian) * difference).sum()
    return (wrong.clamp(min=0) / total).sqrt().item() if total > 0 else None
