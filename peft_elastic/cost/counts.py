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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
# The kinds of choices whose cost is known.
_KINDS = ("rank", "heads", "mlp", "channels", "kernel", "depth")


def cost_in(space: SearchSpace, name: str) -> Cost:
    """A cost of `COSTS` as it is counted in a space: multiply-accumulates are those of a token, or of an image or sample where the
    model was traced."""
    cost = COSTS[name]
    if space.counted_per == "token":
        return cost
    words = {
        field: getattr(cost, field).replace("per token", f"per {space.counted_per}")
        for field in ("title", "unit", "axis")
    }
    return replace(cost, **words)


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
      once (so: per output position), and each adapter its active rank * (active in_features + active out_features). Zeros
      of a pruned weight count like any other. Left out are embedding look-ups, normalisation, and what depends on the routing,
      fused mixture-of-experts weights. With a `sequence_length` n the two products of every attention whose heads a layout
      knows (`peft_elastic.structure`) count as well, Q K^T and P V: 2 * n * heads * head_dim for a token that sees n others, as
      in an encoder. The same is counted for causal and sliding attention, as published figures do, and for attention to an
      encoder of n tokens. The unit stays one token: n times as much is a sequence, 11.2 G for BERT-base and n = 128.

      Of a model whose channels were found by tracing, the unit is one sample, an image (`SearchSpace.counted_per`): every
      convolution and linear layer, and its adapter, counts as often as it is computed for it, out * in / groups * kernel
      area * output positions; products of two activations do not count. The learned matrices of elastic kernels are merged in
      what is deployed, and count in nothing.
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
        space (`SearchSpace`): the choices of the model, with the layers that width and depth change; of a traced model with all
            its layers and, where choices change their owner, its buffers.
        sequence_length (`int`, *optional*): tokens of the sequences whose attention products count in `macs`; None for none.

    Raises:
        ValueError: if the space has a kind of choice whose cost is not known, a width or depth choice without layers, or a
            layer with weights that the model does not have; or the sequence length is no whole number from 1. For a traced model also
            if there is a sequence length, a layer with a weight that the space does not have or has with another size, or an
            adapter of which that holds.
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
        traced = space.counted_per != "token"
        if traced and sequence_length is not None:
            raise ValueError(
                f"`sequence_length` must be None for a model whose MACs are counted per {space.counted_per}, got {sequence_length!r}."
            )
        self.space = space
        self.base_macs = 0
        self.base_parameters = 0
        self.base_bytes = 0
        linears = merged_linears(model)
        modules = dict(base_modules(model))
        paths = [_find(layer.name, modules) for layer in space.layers]
        described = {path: layer for path, layer in zip(paths, space.layers) if path is not None} if traced else {}
        counted: set[int] = set()
        stored: set[int] = set()
        for name, module in modules.items():
            if name.rpartition(".")[0] in linears:
                continue  # the grid of a quantised layer
            linear = linears.get(name)
            macs = linear.out_features * linear.in_features if linear else _macs(module)
            if name in described:
                macs = described[name].whole_macs
            elif traced and macs:
                raise ValueError(
                    f"`space` has no layer {name!r}, a {type(module).__name__} of the model: it is unknown how often it is "
                    f"computed for each {space.counted_per}."
                )
            self.base_macs += macs
            self.base_parameters += _parameters(module, counted)
            if linear is not None:
                weight = module._parameters["weight"]
                if id(weight) not in stored:
                    self.base_bytes += linear.stored_bytes(linear.out_features, linear.in_features)
                stored.add(id(weight))
            self.base_bytes += _saved_bytes(module, stored)
        # what each elastic layer takes away, with the bytes of one parameter where it is not a plain linear layer
        self._layers = []
        # the same of a traced model, where a layer may be one tensor of a module
        tensors = {
            f"{name}.{own}".removeprefix("."): tensor
            for name, module in (modules.items() if traced else ())
            for own, tensor in _own_tensors(module).items()
        }
        self._parts: list[tuple[LayerShape, _Part]] = []
        for layer, path in zip(space.layers, paths):
            linear = linears.get(path or "")
            if traced and linear is None:
                self._parts.append((layer, _part_of(layer, path, modules, tensors)))
                continue
            if path is None and layer.in_features:
                raise ValueError(f"`space` has a layer {layer.name!r}, which the model does not have.")
            if traced and linear is not None:
                _check_size(layer, linear.out_features * (linear.in_features + linear.bias))
            module = modules[path] if path else model
            if linear is None:
                per_parameter = _bytes_per_parameter(module)
            else:  # of the bias, the rest is counted by `stored_bytes`
                bias = module._parameters.get("bias")
                per_parameter = 0.0 if bias is None else float(bias.element_size())
            self._layers.append((layer, linear, per_parameter))
        if traced:
            _check_adapters(space)
            _check_tensors(space, paths, tensors)
        embeddings = {name: m for name, m in modules.items() if isinstance(m, nn.Embedding)}
        self._looked_up = {choice.key: n for choice in space if (n := _looked_up(choice, embeddings))}
        self._products = [] if sequence_length is None else _attention_products(model, space, sequence_length)

    def macs(self, subnet: Mapping[str, int]) -> int:
        """Multiply-accumulates per token; per image or sample of a traced model."""
        total = self.base_macs + self.space.count_parameters(subnet)
        # an adapter on an embedding looks A up, so that only B (rank x dim) computes
        total -= sum(subnet[key] * number for key, number in self._looked_up.items())
        for layer in self.space.layers:
            total -= layer.whole_macs - layer.macs(subnet)
            if layer.rank is not None and layer.positions != 1:  # an adapter is computed where its layer is
                total += (layer.positions - 1) * subnet[layer.rank] * layer.of_rank(subnet)
        return total + sum(math.prod(product.size(subnet)) for product in self._products)

    def parameters(self, subnet: Mapping[str, int]) -> int:
        """Parameters of the active part of the base model and of the adapter."""
        inactive = sum(layer.whole_parameters for layer in self.space.layers) - self.space.count_base_parameters(
            subnet
        )
        return self.base_parameters - inactive + self.space.count_parameters(subnet)

    def bytes(self, subnet: Mapping[str, int]) -> int:
        """Size on disk of the merged model, in bytes; without configuration and tokenizer."""
        total = float(self.base_bytes)
        for layer, linear, per_parameter in self._layers:
            whole, active = (layer.out_features, layer.in_features), layer.size(subnet)
            if whole == active:
                continue
            bias = layer.bias * (whole[0] - active[0])
            if linear is None:
                total -= per_parameter * (whole[0] * whole[1] - active[0] * active[1] + bias)
            else:
                total -= linear.stored_bytes(*whole) - linear.stored_bytes(*active) + per_parameter * bias
        for layer, part in self._parts:
            total -= part.per_parameter * (layer.whole_parameters - layer.parameters(subnet))
            total -= part.per_buffer * layer.buffers * (layer.out_features - layer.size(subnet)[0])
            total -= 0 if layer.is_there(subnet) else part.fixed
        return round(total)

    def costs(self, subnet: Mapping[str, int]) -> dict[str, int]:
        """All of them, under the names of `COST_NAMES`."""
        return {name: getattr(self, name)(subnet) for name in COST_NAMES}


@dataclass(frozen=True)
class _Part:
    """What a layer of a traced model, which is a module or a tensor of one, saves.

    Args:
        per_parameter, per_buffer: bytes of each of its parameters, and of its numbers that are none.
        fixed: bytes of what is there as long as the layer is, such as the count of batches of a BatchNorm.
    """

    per_parameter: float = 0.0
    per_buffer: float = 0.0
    fixed: int = 0


def _find(name: str, there: Mapping[str, Any]) -> str | None:
    """Path in the whole model of a layer of the space, whose name is that inside of the base model."""
    if name in there:
        return name
    # names of layers deeper in the model may end with it too
    return min((path for path in there if has_suffix(path, name)), key=len, default=None)


def _part_of(
    layer: LayerShape, path: str | None, modules: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor]
) -> _Part:
    """What a layer of a traced model is in the model.

    Raises:
        ValueError: if it is not there, or has another size there.
    """
    if path is not None:
        own = list(_own_tensors(modules[path]).values())
    else:
        place = _find(layer.name, tensors)
        if place is None:
            raise ValueError(f"`space` has a layer {layer.name!r}, which the model does not have.")
        own = [tensors[place]]
    parameters = [tensor for tensor in own if isinstance(tensor, nn.Parameter)]
    # those of a module are its own layers where this one has none
    buffers = [t for t in own if not isinstance(t, nn.Parameter)] if layer.buffers else []
    counts = [tensor for tensor in buffers if not tensor.dim()] if path is not None else []
    vectors = [tensor for tensor in buffers if tensor.dim() or path is None]
    _check_size(layer, sum(t.numel() for t in parameters), sum(t.numel() for t in vectors))
    return _Part(_bytes_per_number(parameters), _bytes_per_number(vectors), sum(t.element_size() for t in counts))


def _bytes_per_number(tensors: Sequence[torch.Tensor]) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / max(1, sum(t.numel() for t in tensors))


def _check_size(layer: LayerShape, parameters: int, buffers: int = 0) -> None:
    for what, here, there in (
        ("parameters", layer.whole_parameters, parameters),
        ("numbers in buffers", layer.out_features * layer.buffers, buffers),
    ):
        if here != there:
            raise ValueError(f"`space` has a layer {layer.name!r} with {here} {what}, in the model it has {there}.")


def _check_adapters(space: SearchSpace) -> None:
    """ValueError unless the layers of a traced model say where each adapter with an elastic rank is computed."""
    for choice in space:
        if choice.kind == "rank":
            described = sum(layer.whole_of_rank for layer in space.layers if layer.rank == choice.key)
            if described != choice.unit_parameters:
                raise ValueError(
                    f"`space` has the choice {choice.key!r} of adapters with {choice.unit_parameters} parameters for each unit of the "
                    f"rank, its layers have {described}: what they cost is unknown (adapters of convolutions with groups are not "
                    "counted)."
                )


def _check_tensors(space: SearchSpace, paths: Sequence[str | None], tensors: Mapping[str, torch.Tensor]) -> None:
    """ValueError if layers that choices change share a tensor, or a module has a buffer beside them whose size is not known."""
    whole = {path for path, layer in zip(paths, space.layers) if path is not None and layer.buffers}
    alone = {_find(layer.name, tensors) for path, layer in zip(paths, space.layers) if path is None}
    owners: dict[str, list[str]] = {}
    places: dict[int, list[str]] = {}
    for place, tensor in tensors.items():
        owners.setdefault(place.rpartition(".")[0], []).append(place)
        places.setdefault(id(tensor), []).append(place)
    for path, layer in zip(paths, space.layers):
        if not layer.whole_values:
            continue
        place = "" if path is not None else _find(layer.name, tensors) or ""
        owner = path if path is not None else place.rpartition(".")[0]
        for name in owners.get(owner, []):
            tensor = tensors[name]
            if isinstance(tensor, nn.Parameter):
                shared = [other for other in places[id(tensor)] if other != name]
                if shared and (path is not None or name == place):
                    raise ValueError(
                        f"`space` has the layer {layer.name!r}, whose parameter {name!r} is {shared[0]!r} too: what "
                        "narrowing or skipping it takes away is unknown."
                    )
            elif owner not in whole and name not in alone and (tensor.dim() or layer.depth):
                raise ValueError(
                    f"`space` has the layer {layer.name!r}, but not the buffer {name!r} of the same module: its bytes are "
                    "unknown."
                )


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
    # a narrowed layer shows the numbers of its active part, and holds those of the whole
    in_features, out_features = (
        module.__dict__.get(name, getattr(module, name, None)) for name in ("in_features", "out_features")
    )
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


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers that `module` itself adds to a state dict once it is deployed, by name."""
    tensors: dict[str, torch.Tensor] = {
        name: parameter for name, parameter in module.named_parameters(recurse=False) if not is_matrix_name(name)
    }
    tensors |= {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }
    return tensors


def _saved_bytes(module: nn.Module, stored: set[int]) -> int:
    """Bytes of what `module` itself adds to a state dict and is not yet in `stored`, which is extended."""
    total = 0
    for tensor in _own_tensors(module).values():
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
