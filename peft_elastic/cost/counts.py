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

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..common.checks import check_whole
from ..common.names import has_suffix
from ..layers.convolutional import is_matrix_name
from ..structure.reading import Reading
from ..structure.removed import Removed
from ..supernet.space import Choice, LayerShape, SearchSpace
from .merged import base_modules, is_mergeable, merged_linears


@dataclass(frozen=True)
class Cost:
    """A cost that searches, bounds and structured pruning know by name; it is always minimised.

    Args:
        title: of a column of values times `factor`, formatted by `form`.
        unit: of the values themselves, for help texts.
        axis: what stands at the axis of a plot of the values.
        counted: whether `CostModel` has a method of that name; otherwise it is measured, by a `LatencyModel`.
        always_recorded: in the history of every search, and not only where it is asked for.
    """

    title: str
    unit: str
    axis: str
    factor: float = 1.0
    form: str = ",.0f"
    counted: bool = True
    always_recorded: bool = False


# All costs, by name. One that is counted is a method of `CostModel` as well.
COSTS = {
    "macs": Cost("MACs per token", "MACs per token", "MACs per token", always_recorded=True),
    "parameters": Cost("parameters", "parameters", "parameters", always_recorded=True),
    "bytes": Cost("MB", "bytes on disk", "bytes", factor=1e-6, form=",.2f"),
    "latency": Cost("ms", "seconds", "latency (s)", factor=1e3, form=",.3f", counted=False),
}
COST_NAMES = tuple(name for name, cost in COSTS.items() if cost.counted)
ALWAYS_RECORDED = tuple(name for name, cost in COSTS.items() if cost.always_recorded)


_KINDS = ("rank", "heads", "mlp", "channels", "kernel", "depth")


def parse_bound(bound: Any, whole: float) -> Any:
    """A number as it is, a percentage as a share of `whole`, NaN for any other text."""
    if not isinstance(bound, str):
        return bound
    try:
        return float(bound.strip().removesuffix("%")) / 100 * whole if "%" in bound else math.nan
    except ValueError:
        return math.nan


class CostModel:
    """Multiply-accumulates per token, number of parameters and size on disk of the subnets of a model.

    - `macs`: each linear layer, `lm_head` included, counts in_features * out_features, each convolution its kernel
      once (so: per output position; of a model whose channels were traced, all output positions, so that MACs are those of an image), and each adapter its active rank * (active in_features + active out_features). Zeros
      of a pruned weight count like any other. Left out are embedding look-ups, normalisation, and what depends on the routing,
      fused mixture-of-experts weights. With a `sequence_length` n the two products of every attention whose heads a layout
      knows (`peft_elastic.structure`) count as well, Q K^T and P V: 2 * n * heads * head_dim for a token that sees n others, as
      in an encoder. The same is counted for causal and sliding attention, as published figures do, and for attention to an
      encoder of n tokens. The unit stays one token: n times as much is a sequence, 11.2 G for BERT-base and n = 128.
    - `parameters`: every parameter of the base model once (tied ones once, embeddings included, packed quantised
      weights by their logical shape), without those that width and depth switch off, plus the adapter parameters that
      are active.
    - `bytes`: of the files of the merged model. Every parameter and buffer that is saved counts once, in its dtype. Layers
      that are on a grid after the merge take their bits, a float16 scale and a zero point for each row and group. Layers
      with at least 30% zeros that survive the merge (no adapter, or one that is masked by them) are stored sparse, as
      `merge_and_unload(sparse_kernel=True)` leaves them: a bitmap and bfloat16 or 4-bit values
      (`layers/values/README.md`). A narrowed layer is taken to have as large a share of zeros as the whole one.

    Args:
        model (`nn.Module`): the model with its adapters, whatever subnet is active. A module below an attribute that starts
            with `lora_` belongs to an adapter, and `base_layer` is the layer an adapter wraps.
        space (`SearchSpace`): the choices of the model, with the layers that width and depth change.
        sequence_length (`int`, *optional*): tokens of the sequences whose attention products count in `macs`; None for none.

    Raises:
        ValueError: if the space has a kind of choice whose cost is not known, a width or depth choice without layers, or a
            layer with weights that the model does not have; or the sequence length is no whole number from 1.
    """

    def __init__(self, model: nn.Module, space: SearchSpace, sequence_length: int | None = None) -> None:
        check_whole("sequence_length", sequence_length, least=1, optional=True)
        unknown = sorted({choice.kind for choice in space} - set(_KINDS))
        if unknown:
            raise ValueError(f"`space` has choices of kind {unknown}, the cost model knows {', '.join(_KINDS)}.")
        used = {key for layer in space.layers for key in layer.choices if key != layer.rank}
        idle = [choice.key for choice in space if choice.kind != "rank" and choice.key not in used]
        if idle:
            raise ValueError(
                f"`space` has the choices {idle}, on which none of its `layers` depends: their cost is unknown."
            )
        self.space = space
        # of traced models: how often each layer is computed
        described = {layer.name: layer for layer in space.layers if layer.positions != 1 or layer.kernel_size}
        self.base_macs = 0
        self.base_parameters = 0
        self.base_bytes = 0
        linears = merged_linears(model)
        modules = dict(base_modules(model))
        counted: set[int] = set()
        stored: set[int] = set()
        for name, module in modules.items():
            if name.rpartition(".")[0] in linears:
                continue  # the grid of a quantised layer
            linear = linears.get(name)
            if name in described:
                self.base_macs += described[name].whole_macs
            else:
                self.base_macs += linear.out_features * linear.in_features if linear else _macs(module)
            self.base_parameters += _parameters(module, counted)
            if linear is not None:
                weight = module._parameters["weight"]
                if id(weight) not in stored:
                    self.base_bytes += linear.stored_bytes(linear.out_features, linear.in_features)
                stored.add(id(weight))
            self.base_bytes += _saved_bytes(module, stored)
        # what each elastic layer takes away, with the bytes of one parameter where it is not a plain linear layer
        self._layers = []
        for layer in space.layers:
            path = _find(layer, modules)
            if path is None and layer.in_features:
                raise ValueError(f"`space` has a layer {layer.name!r}, which the model does not have.")
            module = modules[path] if path else model
            linear = linears.get(path or "")
            if linear is None:
                per_parameter = _bytes_per_parameter(module)
            else:  # of the bias, the rest is counted by `stored_bytes`
                bias = module._parameters.get("bias")
                per_parameter = 0.0 if bias is None else float(bias.element_size())
            self._layers.append((layer, linear, per_parameter))
        embeddings = {name: m for name, m in modules.items() if isinstance(m, nn.Embedding)}
        self._looked_up = {choice.key: n for choice in space if (n := _looked_up(choice, embeddings))}
        self._products = [] if sequence_length is None else _attention_products(model, space, sequence_length)

    def macs(self, subnet: Mapping[str, int]) -> int:
        """Multiply-accumulates per token."""
        total = self.base_macs + self.space.count_parameters(subnet)
        # an adapter on an embedding looks A up, so that only B (rank x dim) computes
        total -= sum(subnet[key] * number for key, number in self._looked_up.items())
        total -= sum(layer.whole_macs - layer.macs(subnet) for layer in self.space.layers)
        return total + sum(math.prod(product.size(subnet)) for product in self._products)

    def parameters(self, subnet: Mapping[str, int]) -> int:
        """Parameters of the active part of the base model and of the adapter."""
        inactive = sum(layer.whole_parameters for layer in self.space.layers) - self.space.count_base_parameters(subnet)
        return self.base_parameters - inactive + self.space.count_parameters(subnet)

    def bytes(self, subnet: Mapping[str, int]) -> int:
        """Size on disk of the merged model, in bytes; without configuration and tokenizer."""
        total = float(self.base_bytes)
        for layer, linear, per_parameter in self._layers:
            whole, active = (layer.out_features, layer.in_features), layer.size(subnet)
            if whole == active and (layer.kernel is None or layer.area(subnet) == math.prod(layer.kernel_size)):
                continue
            bias = layer.bias * (whole[0] - active[0])
            if linear is None:
                total -= per_parameter * (layer.whole_parameters - layer.parameters(subnet))
            else:
                total -= linear.stored_bytes(*whole) - linear.stored_bytes(*active) + per_parameter * bias
        return round(total)

    def costs(self, subnet: Mapping[str, int]) -> dict[str, int]:
        """All of them, under the names of `COST_NAMES`."""
        return {name: getattr(self, name)(subnet) for name in COST_NAMES}


def _find(layer: LayerShape, modules: Mapping[str, nn.Module]) -> str | None:
    """Path of a layer of the space, which is inside the base model, in the whole model."""
    if layer.name in modules:
        return layer.name
    return next((path for path in modules if has_suffix(path, layer.name)), None)


def _attention_products(model: nn.Module, space: SearchSpace, sequence_length: int) -> list[LayerShape]:
    """What a token multiplies in Q K^T and P V, as layers that take each feature of the query heads to both of them."""
    reading = Reading(model)
    widths = {attention.path: width for width in reading.widths for attention in width.attentions}

    def keys(kind: str, path: str) -> tuple[str, ...]:
        # paths in the model are longer than those of the space where something is around the base model
        found = (choice.key for choice in space if choice.kind == kind and has_suffix(path, choice.name))
        return tuple(found)[:1]

    products = []
    for block in reading.blocks:
        depth = keys("depth", block.path) + keys("depth", f"{block.path}.attention")
        for attention in block.attentions:
            width = widths.get(attention.path)
            elastic = () if width is None else keys("heads", width.name)
            products.append(
                LayerShape(
                    attention.path,
                    attention.heads * attention.head_dim,
                    2 * sequence_length,
                    width=elastic[0] if elastic else None,
                    full_width=1 if width is None else width.full,
                    depth=depth,
                )
            )
    return products


def _linear_size(module: nn.Module) -> int:
    """in_features * out_features of a linear layer, whatever class it is and however it is packed; else 0."""
    if isinstance(module, Removed):  # which keeps the numbers of what it stands for
        return 0
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
    # matrices of elastic kernels are merged in what is deployed
    own = {name: p for name, p in module.named_parameters(recurse=False) if not is_matrix_name(name)}
    for name, parameter in own.items():
        if id(parameter) not in counted:
            counted.add(id(parameter))
            total += linear_size if name == "weight" and linear_size else parameter.numel()
    if linear_size and "weight" not in own:  # packed in buffers, as GPTQ does
        total += linear_size
    return total


def _saved_bytes(module: nn.Module, stored: set[int]) -> int:
    """Bytes of what `module` itself adds to a state dict and is not yet in `stored`, which is extended."""
    tensors: dict[str, torch.Tensor] = {
        name: parameter for name, parameter in module.named_parameters(recurse=False) if not is_matrix_name(name)
    }
    tensors |= {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    total = 0
    for tensor in tensors.values():
        if id(tensor) not in stored:
            stored.add(id(tensor))
            total += tensor.numel() * tensor.element_size()
    return total


def _bytes_per_parameter(module: nn.Module) -> float:
    """Mean over what `module` and the base modules below it save, apart from linear layers, which are counted one by one;
    packed weights count by their logical shape."""
    linears = {name for name, m in base_modules(module) if is_mergeable(m)}
    others = [m for name, m in base_modules(module) if name not in linears and name.rpartition(".")[0] not in linears]
    size = sum(_saved_bytes(m, set()) for m in others)
    return size / max(1, sum(_parameters(m, set()) for m in others))


def _looked_up(choice: Choice, embeddings: Mapping[str, nn.Embedding]) -> int:
    """Columns of A, summed over the adapters of a rank choice, that are looked up instead of multiplied."""
    return sum(
        embedding.num_embeddings
        for path in choice.modules
        for name, embedding in embeddings.items()
        if has_suffix(name, path)
    )
