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

from collections.abc import Mapping

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def check_parameters(layers: Mapping[str, nn.Module]) -> None:
    """
    Whether the weights and biases of linear layers are parameters. Masks of torch.nn.utils.prune, parametrizations and norms of
    weights compute them from others in each forward pass: what is written to such a weight is lost with the next one, and what is
    read from it may be from before the last step of training.

    Raises:
        ValueError: naming the first layer of which that is not so, by its key, and what makes its weight a parameter.
    """
    for name, layer in layers.items():
        for tensor, call in computed_tensors(layer).items():
            place = f"model.get_submodule({name!r})" if name else "layer"
            raise ValueError(
                f"model: the {tensor} of {name or type(layer).__name__} is no parameter of its own, but computed from others in each "
                f"forward pass. Make it one first: {call.format(place)}."
            )


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
