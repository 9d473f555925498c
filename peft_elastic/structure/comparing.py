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
"""How two models differ in their sizes: one that is there, and one that its configuration builds."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .features import layer_sizes
from .modules import linear_layers
from .reading import Reading
from .removed import Removed


_SIMPLE = (bool, int, float, str, type(None))


def mismatch(model: nn.Module, base: nn.Module, structure: Reading) -> str | None:
    """How the blocks of a model, with all their features, differ from those of one that its configuration builds. There may be
    adapters on it, and layers that are quantised."""
    for stack in dict.fromkeys(block.stack for block in structure.blocks):
        there, wanted = (len(owner.get_submodule(stack)._modules) for owner in (model, base))
        if there != wanted:
            return f"{stack} would have {wanted} blocks, and has {there}"
    inside = tuple(f"{block.path}." for block in structure.blocks)
    found = {name: layer_sizes(layer) for name, layer in linear_layers(model).items()}
    for name, layer in linear_layers(base).items():
        if name.startswith(inside) and found.get(name, layer_sizes(layer)) != layer_sizes(layer):
            return f"{name} would be {layer_sizes(layer)}, and is {found[name]}"
    shapes = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
    }
    linears = linear_layers(base)
    for name, parameter in base.named_parameters():
        of_linear = name.rpartition(".")[0] in linears
        if name.startswith(inside) and not of_linear and shapes.get(name, parameter.shape) != parameter.shape:
            return f"{name} would be {tuple(parameter.shape)}, and is {shapes[name]}"
    return None


def difference_of(reference: nn.Module, built: nn.Module, structure: Reading) -> str | None:
    """How a model built from a new configuration differs from what was made of one of full size: in its tensors, or in the numbers
    that its modules keep about themselves. Neither has been used, and a number of theirs is not that of some input."""
    wanted, found = ({k: tuple(t.shape) for k, t in m.state_dict().items()} for m in (reference, built))
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            return f"{name} would be {found.get(name)}, and is {wanted.get(name)}"
    inside = tuple(f"{stack}." for stack in {block.stack for block in structure.blocks})
    expected, numbers = _numbers(reference), _numbers(built)
    for path in [*expected, *(path for path in numbers if path not in expected)]:
        ours, theirs = expected.get(path), numbers.get(path)
        in_block = path.startswith(inside)
        if ours is None or theirs is None:
            if in_block:
                return f"there {'would be' if ours is None else 'is'} a module {path}"
            continue
        # what only one of them has outside of the blocks is of a kind of position embeddings, say, that no block uses any more
        for name in ours.keys() | theirs.keys() if in_block else ours.keys() & theirs.keys():
            if ours.get(name) != theirs.get(name):
                return f"{path}.{name} would be {theirs.get(name)!r}, and is {ours.get(name)!r}"
    return None


def _numbers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By the path of each module: its numbers, and shapes of the tensors that are not saved."""
    prints: dict[str, dict[str, Any]] = {}
    linears = linear_layers(model)
    for path, module in model.named_modules():
        if isinstance(module, Removed):
            prints[path] = {"removed": module.stands_for}
            continue
        numbers: dict[str, Any] = {}
        lists = isinstance(module, PreTrainedModel)
        # those of a layer are its shape; those of a Dropout, a depth of 0.1 say, are of training alone
        for name, value in {} if path in linears else module.__dict__.items():
            if name.startswith("_") or name == "training" or "drop" in name or isinstance(module, nn.Dropout):
                continue
            if isinstance(value, _SIMPLE) or (lists and _is_plain(value)):
                numbers[name] = value
        for name, buffer in module._buffers.items():
            numbers[f"{name}, shape"] = None if buffer is None else tuple(buffer.shape)
        prints[path] = numbers
    return prints


def _is_plain(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(entry, _SIMPLE) for entry in value)
