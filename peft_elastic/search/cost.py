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
"""What a subnet costs, computed from the shapes of the layers; nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..supernet.space import Choice, SearchSpace


# The objectives that `CostModel` can compute, always minimised.
COST_NAMES = ("macs", "parameters")


class CostModel:
    """Multiply-accumulates per token and number of parameters of the subnets of a model.

    - `macs`: each linear layer, `lm_head` included, counts in_features * out_features, each convolution its kernel
      once (so: per output position), and each adapter its active rank * (in_features + out_features). Zeros of a
      pruned weight count like any other. What no elastic choice changes and what depends on the sequence length or the
      routing is left out: embedding look-ups, normalisation, attention scores, fused mixture-of-experts weights.
    - `parameters`: every parameter of the base model once (tied ones once, embeddings included, packed quantised
      weights by their logical shape) plus the adapter parameters that are active.

    Args:
        model (`nn.Module`): the model with its adapters. A module below an attribute that starts with `lora_` belongs
            to an adapter, and `base_layer` is the layer an adapter wraps.
        space (`SearchSpace`): the choices of the model.

    Raises:
        ValueError: if the space has a kind of choice whose cost is not known.
    """

    def __init__(self, model: nn.Module, space: SearchSpace) -> None:
        unknown = sorted({choice.kind for choice in space} - {"rank"})
        if unknown:
            raise ValueError(f"`space` has choices of kind {unknown}, the cost model knows 'rank'.")
        self.space = space
        self.base_macs = 0
        self.base_parameters = 0
        counted: set[int] = set()
        for _, module in _base_modules(model):
            self.base_macs += _macs(module)
            self.base_parameters += _parameters(module, counted)
        embeddings = {name: m for name, m in _base_modules(model) if isinstance(m, nn.Embedding)}
        self._macs_per_unit = {choice.key: _macs_per_rank(choice, embeddings) for choice in space}

    def macs(self, subnet: Mapping[str, int]) -> int:
        """Multiply-accumulates per token."""
        return self.base_macs + sum(subnet[key] * macs for key, macs in self._macs_per_unit.items())

    def parameters(self, subnet: Mapping[str, int]) -> int:
        """Parameters of the base model and of the active part of the adapter."""
        return self.base_parameters + self.space.count_parameters(subnet)

    def costs(self, subnet: Mapping[str, int]) -> dict[str, int]:
        """Both, under the names of `COST_NAMES`."""
        return {"macs": self.macs(subnet), "parameters": self.parameters(subnet)}


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model, without the wrappers and internals of adapters.

    `modules_to_save` holds trained copies of `original_module`, of the same shape: the original stands for them.
    """
    for name, module in model.named_modules():
        path = name.split(".")
        if any(part.startswith("lora_") or part == "modules_to_save" for part in path):
            continue
        if "base_layer" not in dict(module.named_children()):
            yield name.removesuffix(".base_layer"), module


def _linear_size(module: nn.Module) -> int:
    """in_features * out_features of a linear layer, whatever class it is and however it is packed; else 0."""
    in_features, out_features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return in_features * out_features if isinstance(in_features, int) and isinstance(out_features, int) else 0


def _macs(module: nn.Module) -> int:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)):
        return module.weight.numel()
    if isinstance(module, nn.MultiheadAttention):  # its out_proj is a linear layer of its own
        return sum(p.numel() for name, p in module.named_parameters(recurse=False) if name.endswith("proj_weight"))
    return _linear_size(module)


def _parameters(module: nn.Module, counted: set[int]) -> int:
    """Parameters that `module` itself holds and that are not yet in `counted`, which is extended."""
    total = 0
    linear_size = _linear_size(module)
    own = dict(module.named_parameters(recurse=False))
    for name, parameter in own.items():
        if id(parameter) not in counted:
            counted.add(id(parameter))
            total += linear_size if name == "weight" and linear_size else parameter.numel()
    if linear_size and "weight" not in own:  # packed in buffers, as GPTQ does
        total += linear_size
    return total


def _macs_per_rank(choice: Choice, embeddings: Mapping[str, nn.Embedding]) -> int:
    """MACs of one unit of rank. An adapter on an embedding looks A up, so that only B (rank x dim) computes."""
    looked_up = sum(
        embedding.num_embeddings
        for path in choice.modules
        for name, embedding in embeddings.items()
        if name == path or name.endswith(f".{path}")
    )
    return choice.unit_parameters - looked_up
