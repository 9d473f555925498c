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
"""Cutting a narrowed convolutional model: ordinary layers of the active size, and a description with which another model of the
same constructor is cut to these sizes before it takes the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...layers.convolutional import remove_matrices
from ...layers.narrowed import Narrowed, change_class, plain_class
from ..narrow import is_skipped


# Numbers that torch's layers keep of themselves.
_NUMBERS = (
    "in_channels",
    "out_channels",
    "in_features",
    "out_features",
    "groups",
    "kernel_size",
    "padding",
    "_reversed_padding_repeated_twice",
    "num_features",
    "num_channels",
    "num_groups",
    "num_parameters",
    "normalized_shape",
)
_RANGES = ("active_out", "active_in", "active_kernel", "active_tensors", "statistics")

# What is left of a model: {"layers": {path: {"tensors": {name: shape}, "numbers": {name: value}}}, "skipped": [paths]}.
Description = dict[str, Any]


def cut(model: nn.Module) -> Description:
    """Leave of a narrowed model what is active, in place: its layers are of their own classes and small, blocks that are skipped are
    `nn.Identity`, statistics of BatchNorm are those of the active subnet where they were averaged anew, and kernels are merged with their
    matrices.

    Returns:
        `dict`: what `resize` cuts a whole model with.
    """
    skipped = [path for path, module in model.named_modules() if is_skipped(module)]
    _take_out(model, skipped)
    layers: dict[str, Any] = {}
    for path, module in model.named_modules():
        if isinstance(module, Narrowed):
            layers[path] = _cut(module)
        remove_matrices(module)
    return {"layers": {path: sizes for path, sizes in layers.items() if sizes}, "skipped": skipped}


def _cut(layer: nn.Module) -> dict[str, Any]:
    plain = plain_class(layer)
    names = [name for name in (*layer._parameters, *layer._buffers) if not name.startswith("kernel_matrix_")]
    tensors = {name: tensor for name in names if (tensor := getattr(layer, name)) is not None}
    if (statistics := layer.__dict__.get("statistics")) is not None:
        tensors |= {"running_mean": statistics[0], "running_var": statistics[1]}
    numbers = {name: getattr(layer, name) for name in _NUMBERS if name in layer.__dict__}
    sizes: dict[str, Any] = {"tensors": {}, "numbers": {}}
    before = {name: layer.__dict__[name] for name in numbers}
    change_class(layer, plain)
    for name in _RANGES:
        layer.__dict__.pop(name, None)
    for name, tensor in tensors.items():
        register = layer._parameters if name in layer._parameters else layer._buffers
        old: Any = register[name]
        if tensor.shape != old.shape:
            sizes["tensors"][name] = list(tensor.shape)
        new = tensor.detach().to(old.dtype).clone()
        register[name] = nn.Parameter(new, requires_grad=old.requires_grad) if name in layer._parameters else new
    for name, value in numbers.items():
        if value != before[name]:
            layer.__dict__[name] = value
            sizes["numbers"][name] = list(value) if isinstance(value, tuple) else value
    return sizes if sizes["tensors"] or sizes["numbers"] else {}


def _take_out(model: nn.Module, paths: Sequence[str]) -> None:
    """Put `nn.Identity` in the place of modules, under all of their names."""
    names = list(model.named_modules(remove_duplicate=False))
    gone = {id(model.get_submodule(path)): nn.Identity().train(model.get_submodule(path).training) for path in paths}
    for path, module in names:
        if id(module) in gone:
            model.set_submodule(path, gone[id(module)])


def resize(model: nn.Module, description: Mapping[str, Any]) -> None:
    """Bring a whole model to the sizes that a description says; of the values nothing is kept.

    Raises:
        ValueError: if the description does not fit the model, before anything is changed.
    """
    layers, skipped = description.get("layers"), description.get("skipped")
    if not isinstance(layers, Mapping) or not isinstance(skipped, (list, tuple)):
        raise ValueError(f"The description of the layers must have 'layers' and 'skipped', got {description!r:.200}.")
    modules = dict(model.named_modules())
    for path in skipped:
        if path not in modules or path == "":
            raise ValueError(f"The description says that {path!r} is skipped, which the model does not have.")
    for path, sizes in layers.items():
        _check(path, modules.get(path), sizes)
    for path, sizes in layers.items():
        layer = modules[path]
        for name, shape in sizes["tensors"].items():
            register = layer._parameters if name in layer._parameters else layer._buffers
            old: Any = register[name]
            new = torch.empty(shape, dtype=old.dtype, device=old.device)
            register[name] = nn.Parameter(new, requires_grad=old.requires_grad) if name in layer._parameters else new
        for name, value in sizes["numbers"].items():
            was_tuple = isinstance(layer.__dict__[name], tuple)
            layer.__dict__[name] = tuple(value) if was_tuple else value
    _take_out(model, skipped)


def _check(path: str, layer: nn.Module | None, sizes: Any) -> None:
    if layer is None:
        raise ValueError(f"The description has {path!r}, which the model does not have.")
    tensors = sizes.get("tensors") if isinstance(sizes, Mapping) else None
    numbers = sizes.get("numbers") if isinstance(sizes, Mapping) else None
    if not isinstance(tensors, Mapping) or not isinstance(numbers, Mapping):
        raise ValueError(f"The description of {path!r} must have 'tensors' and 'numbers', got {sizes!r:.200}.")
    for name, shape in tensors.items():
        old = layer._parameters.get(name, layer._buffers.get(name))
        good = (
            old is not None
            and isinstance(shape, (list, tuple))
            and len(shape) == old.dim()
            and all(type(n) is int and 0 < n <= whole for n, whole in zip(shape, old.shape))
        )
        if not good:
            whole = "no such tensor" if old is None else f"{list(old.shape)}"
            raise ValueError(
                f"The description of {path!r} gives {name!r} the shape {shape!r}; the whole model has {whole}."
            )
    for name, value in numbers.items():
        if name not in _NUMBERS or name not in layer.__dict__:
            raise ValueError(
                f"The description of {path!r} sets {name!r}, which is no number of a {type(layer).__name__}."
            )
        entries = value if isinstance(value, (list, tuple)) else [value]
        if not all(type(entry) is int and entry >= 0 for entry in entries):
            raise ValueError(f"The description of {path!r} sets {name!r} to {value!r}, which must be whole numbers.")
