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
"""The graph of a model, as torch.export records it, and what its nodes are in the model."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ...common.calls import as_arguments


class Graph:
    """The operators that a model computes with, from inputs to outputs.

    Args:
        model (`nn.Module`): in any state; a plain one, whose layers are not narrowed.
        inputs (`torch.Tensor`, `tuple` or `dict`): what it is called with: (2, channels, height, width), say.

    Raises:
        ValueError: if the model cannot be traced; the message has the reason.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = model
        args, kwargs = as_arguments(inputs)
        modes = {module: module.training for module in model.modules()}
        _evaluate(model)
        try:
            with torch.no_grad():
                program = torch.export.export(model, args, dict(kwargs), strict=False)
        except Exception as error:  # whatever the user's code does with what it is traced with
            raise ValueError(
                f"`model` of type {type(model).__name__} cannot be traced (torch.export: {type(error).__name__}: "
                f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}), so its channels are not known. "
                "A transformer's blocks can be described by name instead: `peft_elastic.structure.register_layout`."
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode
        self.nodes: list[fx.Node] = list(program.graph.nodes)
        signature = program.graph_signature
        # placeholder -> name of the parameter or buffer
        self.tensors: dict[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.outputs: set[str] = set(signature.user_outputs)
        self.inputs: set[str] = set(signature.user_inputs)
        # a module may have several names; it is known by the first, as in `named_modules`
        self._homes: dict[str, str] = {}
        first: dict[int, str] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._homes[path] = first.setdefault(id(module), path)
        self._known: dict[int, list[str]] = {}
        for name, tensor in tensors_of(model):
            self._known.setdefault(id(tensor), []).append(name)

    def path_of(self, node: fx.Node) -> str:
        """The module in whose forward a node was recorded."""
        return self.stack_of(node)[-1]

    def stack_of(self, node: fx.Node) -> list[str]:
        """Paths of the modules around a node, from the model, "", inwards."""
        stack = node.meta.get("nn_module_stack") or {}
        # torch.export numbers the calls of a module: "block@1"
        paths = (re.sub(r"@\d+", "", path) for path, _ in stack.values() if path)
        return ["", *(self._homes.get(path, path) for path in paths)]

    def tensor_of(self, node: Any, site: fx.Node) -> tuple[str, str] | None:
        """Path of a module and name of its parameter or buffer that a node is, as `site` reads it; None if it is none.

        A tensor that several modules share is that of the module that computes with it.
        """
        if not isinstance(node, fx.Node) or node.op != "placeholder" or node.name not in self.tensors:
            return None
        name = self.tensors[node.name]
        owner, _, attribute = name.rpartition(".")
        tensor = _look_up(self.model, name)
        for other in self._known.get(id(tensor), ()):
            if self._homes.get(other.rpartition(".")[0]) == self.path_of(site):
                owner, _, attribute = other.rpartition(".")
        owner = self._homes.get(owner, owner)
        return (owner, attribute) if tensor is not None else None

    def source_of(self, node: Any, site: fx.Node) -> tuple[str, str] | None:
        """As `tensor_of`, also for a weight that is computed from one parameter of its shape, as a standardized one is."""
        direct = self.tensor_of(node, site)
        if direct is not None or not isinstance(node, fx.Node):
            return direct
        found: set[str] = set()
        waiting, seen = [node], set()
        while waiting:
            current = waiting.pop()
            if current in seen:
                continue
            seen.add(current)
            if current.op == "placeholder":
                found.add(current.name)
            waiting += current.all_input_nodes
        if len(found) != 1 or not found <= set(self.tensors):
            return None
        (name,) = found
        source = next(other for other in self.nodes if other.name == name)
        return self.tensor_of(source, site) if shape_of(source) == shape_of(node) else None


def example_of(model: nn.Module, inputs: Any) -> Any:
    """Two samples to trace and to try a model with: the user's, or images of the size that a configuration of transformers names.

    Raises:
        ValueError: if the user gave none, and there is no such configuration.
    """
    if inputs is not None:
        args, kwargs = as_arguments(inputs)
        moved = [_like(model, value) for value in args]
        named = {name: _like(model, value) for name, value in kwargs.items()}
        return named if named else tuple(moved)
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) != "pixel_values" or config is None:
        raise ValueError(
            f"`example_inputs` must be given for a {type(model).__name__}, whose channels are found by tracing: two images, say, "
            "torch.randn(2, 3, 224, 224)."
        )
    size = getattr(config, "image_size", None) or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(config, "num_channels", 3)
    images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": _like(model, images)}


def _like(model: nn.Module, value: Any) -> Any:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    if not isinstance(value, torch.Tensor) or parameter is None:
        return value
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)


def shape_of(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(int(size) for size in value.shape) if isinstance(value, torch.Tensor) else ()


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers under all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _look_up(model: nn.Module, name: str) -> torch.Tensor | None:
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    found = module._parameters.get(attribute, module._buffers.get(attribute))
    return found


def _evaluate(model: nn.Module) -> nn.Module:
    """Set evaluation mode, past a `train` of the model's own, which may do more than that."""
    for module in model.modules():
        module.training = False
    return model


def trial_copy(model: nn.Module, seed: int = 0) -> nn.Module:
    """A copy with random weights, of which none is zero and no two are alike, so that nothing passes a trial because a branch
    of it happens to contribute nothing (a zero gamma at the end of a block, a small layer scale). Buffers of more than one dimension are
    constants, which keep their signs.

    Raises:
        ValueError: if the model cannot be copied.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"`model` of type {type(model).__name__} cannot be copied ({type(error).__name__}: {str(error).strip().splitlines()[0]}), as it "
            "must be to try its channels and to extract subnets. Weights that are computed before each call, by "
            "torch.nn.utils.weight_norm or prune, are such a reason: make them permanent (`remove_weight_norm`, `prune.remove`)."
        ) from error
    _evaluate(copied).requires_grad_(False).to("cpu", torch.float64)
    done: set[int] = set()
    for module in copied.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not tensor.is_floating_point() or id(tensor) in done:
                continue
            done.add(id(tensor))
            if tensor.dim() != 1 and name in module._buffers:
                tensor.mul_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
            elif tensor.dim() > 1:
                fan = max(1, tensor[0].numel())
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * (2 / fan) ** 0.5)
            elif "var" in name or "bias" not in name and "mean" not in name:
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
            else:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.2)
    return copied
