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
"""Optimizers that mix the ranks of an adapter, and ranks that took no part in a step.

Most optimizers change an entry of a matrix by its own gradient and momentum. Those of peft for LoRA multiply the gradient of B by
the inverse of A A^T, with all ranks of A, and so move ranks whose gradient is zero.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .layer import full_weights
from .state import ElasticState


_LORA_FA, _RIEMANNIAN = "LoraFAOptimizer", "RiemannianPreconditionedOptimizer"
# The states of the models of which a subnet has been sampled; each lives as long as its model.
_sampled: weakref.WeakSet[ElasticState] = weakref.WeakSet()
_hooks: list[Any] = []
# Attribute of an optimizer: the matrices A in whose place something else stands during a step, as (list, index, A).
_PUT_ASIDE = "_peft_elastic_put_aside"


def watch_optimizers(state: ElasticState) -> None:
    """From now on, let steps of any optimizer that mix the ranks of this model's adapters be right, or be refused."""
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))
    _sampled.add(state)


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    name = type(optimizer).__name__
    if name not in (_LORA_FA, _RIEMANNIAN):
        return
    _after_step(optimizer, args, kwargs)  # of a step that an exception has ended
    entries = {
        id(parameter): (group["params"], index)
        for group in optimizer.param_groups
        for index, parameter in enumerate(group["params"])
    }
    factors = [found for found in _factors() if id(found[2]) in entries]
    for _, _, b, _ in factors:
        if name == _LORA_FA and b.grad is None:
            b.grad = torch.zeros_like(b)  # in a block that was skipped, which that optimizer does not know
    untouched = [_untouched(a, b) for _, a, b, _ in factors]
    # read all at once: each time a GPU would be waited for
    some = torch.stack([each.any().to(untouched[0].device) for each in untouched]).tolist() if untouched else []
    for (path, a, b, mixed), inactive, is_some in zip(factors, untouched, some):
        if not is_some:
            continue
        if mixed or name == _RIEMANNIAN:
            raise ValueError(
                f"{name} would move ranks of the adapter in {path!r} that took no part in the step, by what it computes from all of "
                "them. Take AdamW, or LoRA-FA (`peft.optimizers.create_lorafa_optimizer`) without `target_parameters`."
            )
        if id(a) in entries:
            # With rows of zeros, A A^T falls apart into what is active and what is not. The optimizer reads A and never writes it.
            params, index = entries[id(a)]
            optimizer.__dict__.setdefault(_PUT_ASIDE, []).append((params, index, a))
            params[index] = a.detach().masked_fill(inactive[:, None], 0)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for params, index, a in optimizer.__dict__.pop(_PUT_ASIDE, ()):
        params[index] = a


def _factors() -> Iterator[tuple[str, torch.Tensor, torch.Tensor, bool]]:
    """Go through all adapters of the models watched: (path, full A, full B, whether their ranks are in different orders)."""
    for state in list(_sampled):
        for name, adapter in state.adapters.items():
            for path, layer in adapter.layers.items():
                a, b = full_weights(layer, name)
                if a.dim() == 2:  # neither of the optimizers knows convolutions
                    yield path, a, b, isinstance(layer, ParamWrapper)


def _untouched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Find the ranks without any gradient, of a pair (r, in), (out, r)."""
    touched = torch.zeros(b.shape[1], dtype=torch.bool, device=b.device)
    if b.grad is not None:
        touched |= b.grad.ne(0).any(dim=0)
    if a.grad is not None and a.shape[0] == b.shape[1]:
        touched |= a.grad.ne(0).any(dim=1)
    return ~touched
