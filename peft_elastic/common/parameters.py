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
"""Whether the tensors of a layer are parameters: what every reader and writer of a weight counts on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Optional

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def check_parameters(layers: Mapping[str, nn.Module]) -> None:
    """
    Whether the weights and biases of linear layers are parameters. Masks of torch.nn.utils.prune, parametrizations and norms of
    weights compute them from others in each forward pass: what is written to such a weight is lost with the next one, and what is
    read from it may be from before the last step of training. And whether they are here, and not spread over several processes.

    Raises:
        ValueError: naming the first layer of which that is not so, by its key, and what makes its weight a parameter.
    """
    for name, layer in layers.items():
        check_here(name or type(layer).__name__, layer._parameters.values())
        for tensor, call in computed_tensors(layer).items():
            place = f"model.get_submodule({name!r})" if name else "layer"
            raise ValueError(
                f"model: the {tensor} of {name or type(layer).__name__} is no parameter of its own, but computed from others in each "
                f"forward pass. Make it one first: {call.format(place)}."
            )


def check_here(name: str, tensors: Iterable[Optional[torch.Tensor]]) -> None:
    """ValueError if one of these parameters of `name` is spread over several processes (`is_spread`)."""
    if any(map(is_spread, tensors)):
        raise ValueError(
            f"model: the weight of {name} is spread over several processes by FSDP2 or DeepSpeed, and none of them has all of it. Save "
            "the model or the adapter (`trainer.save_model()`), load it anew in one process, and do this there; what comes before a "
            "training, do before the engine takes the model."
        )


def is_spread(tensor: Optional[torch.Tensor]) -> bool:
    """Whether a parameter is spread over several processes now: by FSDP2, of which it is a DTensor then, or by ZeRO-3, which leaves
    nothing of it in its place. In the forward and backward pass of the module that an engine shards as one they are whole."""
    if tensor is None:
        return False
    module = sys.modules.get("torch.distributed.tensor")  # without it there are none
    if module is not None and isinstance(tensor, module.DTensor):
        return True
    return hasattr(tensor, "ds_status") and tensor.numel() == 0


def computed_tensors(layer: nn.Module) -> dict[str, str]:
    """The tensors of a layer that are computed from others, with the call that makes each of them a parameter."""
    found = {}
    if is_parametrized(layer):
        for tensor in layer.parametrizations:  # type: ignore[union-attr]
            found[tensor] = f"torch.nn.utils.parametrize.remove_parametrizations({{}}, {tensor!r})"
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            found[hook._tensor_name] = f"torch.nn.utils.prune.remove({{}}, {hook._tensor_name!r})"
        elif isinstance(hook, (WeightNorm, SpectralNorm)):
            kind = "weight" if isinstance(hook, WeightNorm) else "spectral"
            found[hook.name] = f"torch.nn.utils.remove_{kind}_norm({{}}, {hook.name!r})"
    return found
