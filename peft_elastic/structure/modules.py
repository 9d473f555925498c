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

"""The modules of any transformers model: its linear layers, its stacks of transformer blocks."""

from __future__ import annotations

from collections import Counter

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..common.parameters import check_parameters
from ..common.tensors import zero_share
from ..layers.backends import backend_of, find_linear_backend


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """
    The linear layers of a model by name: `nn.Linear`, `Conv1D` of transformers, and packed quantised layers.

    A layer wrapped by a peft adapter appears as its base layer under the name of the wrapper; the adapter's own matrices
    are left out.
    """
    layers: dict[str, nn.Module] = {}
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if wrapped and name.startswith(wrapped):
            continue
        if isinstance(module, BaseTunerLayer):
            wrapped += (f"{name}.",)
            module = module.get_base_layer()
        if find_linear_backend(module) is not None:
            layers[name] = module
    return layers


def module_at(model: nn.Module, path: str) -> nn.Module:
    """`model.get_submodule(path)` in a fraction of the time.

    Raises:
        AttributeError: there is no module there, or None in place of one.
    """
    for name in path.split(".") if path else ():
        child = model._modules.get(name)
        if child is None:
            child = getattr(model, name)  # some wrappers pass on what they wrap
            if not isinstance(child, nn.Module):
                raise AttributeError(f"`{name}` of {type(model).__name__} must be a module, got {child!r}")
        model = child
    return model


def weight_matrix(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as (out, in), whatever its storage order: a view, so writing to it changes the layer.

    Raises:
        ValueError: the weight is computed from other parameters (`check_parameters`).
    """
    check_parameters({"": layer})
    return backend_of(layer).weight(layer, whole=True)


def replace_layers(model: nn.Module, replacements: list[tuple[nn.Module, nn.Module]]) -> None:
    """Puts the second module of each pair in the place, or the places, of the first; base layers of adapters included."""
    by_id = {id(old): new for old, new in replacements}
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child is not None and id(child) in by_id:
                module._modules[key] = by_id[id(child)]


def zero_fraction(layer: nn.Module) -> float:
    """Fraction of the weights of a linear layer that are zero, of its active part if it is narrowed."""
    return zero_share(layer.weight)  # type: ignore[arg-type]


def output_head(model: nn.Module) -> nn.Module | None:
    """The output embeddings (lm_head) of a transformers model that has some."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def find_stacks(model: nn.Module) -> list[dict[str, nn.Module]]:
    """
    The stacks of transformer blocks of a model, each as {block name: block}, in the order of their definition.

    A stack is an outermost list of modules (`nn.ModuleList` or `nn.Sequential`) of which at least one holds several linear
    layers and none holds exactly one: blocks do, lists of heads or of the layers of one MLP do not.
    """
    linears = linear_layers(model)
    # Number of linear layers below each module name.
    below = Counter(prefix for name in linears for prefix in enclosing_names(name))
    for name, module in model.named_modules():
        if hasattr(module, "stands_for"):  # a part that was removed, which had some
            below.update(2 * enclosing_names(name))
    stacks: list[dict[str, nn.Module]] = []
    found: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if found and name.startswith(found):
            continue
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        blocks = {f"{name}.{key}".lstrip("."): block for key, block in module.named_children()}
        counts = [0 if block in linears else below[block] for block in blocks]
        nested = any(isinstance(block, (nn.ModuleList, nn.ModuleDict)) for block in blocks.values())
        if (
            not nested
            and not any(block in linears for block in blocks)
            and 1 not in counts
            and max(counts, default=0) > 1
        ):
            stacks.append(blocks)
            found += (f"{name}.",) if name else ("",)
    return stacks


def routers(model: nn.Module) -> list[str]:
    """
    The linear layers by which mixtures of experts choose, by name: those with one output for each expert, or a single one (a gate
    of shared experts), in a module of a transformer block that holds experts.

    Experts are a list or dict of modules of one class with linear layers in them, or a module with a three-dimensional parameter.
    They are found by that, not by what they are called.
    """
    found: dict[str, None] = {}
    for stack in find_stacks(model):
        for block_name, block in stack.items():
            linears = linear_layers(block)
            for name, module in block.named_modules():
                experts = {key: count for key, child in module.named_children() if (count := _expert_count(child)) > 1}
                prefix = f"{name}." if name else ""
                for path, layer in linears.items() if experts else ():
                    first = path.removeprefix(prefix).partition(".")[0]
                    if not path.startswith(prefix) or first in experts:
                        continue
                    if backend_of(layer).sizes(layer)[0] in (1, *experts.values()):
                        found[f"{block_name}.{path}"] = None
    return list(found)


def _expert_count(module: nn.Module) -> int:
    """How many experts a module holds itself; 0 if it is something else."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        children = [child for child in module.children() if linear_layers(child)]  # there may be a dropout beside them
        return len(children) if len({type(child) for child in children}) == 1 else 0
    if isinstance(module, nn.modules.conv._ConvNd):
        return 0
    sizes = {parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3}
    return sizes.pop() if len(sizes) == 1 else 0


def enclosing_names(name: str) -> list[str]:
    """The names of the modules that contain the module called `name`, the outermost first, the model itself left out."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
