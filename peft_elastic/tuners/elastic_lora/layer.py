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
"""Adapter matrices that show their leading ranks only.

All of the elasticity lives here: an elastic A or B module holds its full weight as its parameter, and its attribute
`weight` is the slice that is active. Whoever reads `weight` (its own forward, merging, DoRA's norm, every
quantisation backend of peft) therefore sees the active sub-adapter and needs no code of its own, while whatever goes
through the registered parameters (optimizer, state dict, DDP, dtype casts) sees the full one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Optional

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper, _ConvNd
from torch import nn

from ...common.parameters import is_spread
from ...layers.narrowed import (
    Ranges,
    is_asked_by_name,
    set_in_replica,
    store_in_replica,
    stored_tensor,
    take,
)


def _leading(full: torch.Tensor, dim: int, kept: int, blocks: int = 1) -> torch.Tensor:
    """The first `kept` entries of each of the `blocks` equal parts of dimension `dim`."""
    if blocks == 1:
        return full.narrow(dim, 0, kept)
    return full.unflatten(dim, (blocks, -1)).narrow(dim + 1, 0, kept).flatten(dim, dim + 1)


class _ElasticWeight(nn.Module):
    """Mixin in front of the class of an A or B module. `kept` is how many entries of the rank dimension are active in
    each of its `blocks` parts, None meaning all."""

    rank_dim: int
    blocks: int = 1
    kept: Optional[int] = None
    # The features of the other dimension that are active, as runs (start, stop), where the base layer is narrowed.
    active_width: Optional[Ranges] = None
    # What `kept` becomes as soon as another parameter is registered, see `set_rank`.
    kept_when_loaded: Optional[int] = None

    @property
    def full_weight(self) -> torch.Tensor:
        """All ranks, whatever is active."""
        return stored_tensor(self, "weight")

    @property
    def weight(self) -> torch.Tensor:
        full = self.full_weight
        if (self.kept is None and self.active_width is None) or is_asked_by_name() or is_spread(full):
            return full
        if full.is_meta and "_hf_hook" in self.__dict__:
            raise ValueError(
                "accelerate has offloaded the weights of an elastic adapter, which works with its maximal subnet only. "
                "Choose a `device_map` without 'cpu' or 'disk' offloading, or merge the adapter first."
            )
        if self.kept is not None:
            full = _leading(full, self.rank_dim, self.kept, self.blocks)
        return take(full, 1 - self.rank_dim, self.active_width)

    # Assigning a Parameter goes to nn.Module and never comes here.
    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        if store_in_replica(self, "weight", value):
            return
        raise ValueError(
            "The weight of an elastic adapter must stay a parameter. FSDP1 replaces it by a view into flat memory: use "
            "FSDP2 (`fully_shard`; `fsdp_version: 2` in accelerate) or DDP."
        )

    def register_parameter(self, name: str, param: Optional[nn.Parameter]) -> None:
        super().register_parameter(name, param)
        if name == "weight" and self.kept_when_loaded is not None:
            self.kept, self.kept_when_loaded = self.kept_when_loaded, None

    def extra_repr(self) -> str:
        kept = "" if self.kept is None else f", active={self.kept * self.blocks}"
        return super().extra_repr() + kept


class _ElasticA(_ElasticWeight):
    rank_dim = 0


class _ElasticB(_ElasticWeight):
    rank_dim = 1


class ElasticLinearA(_ElasticA, nn.Linear):
    """`lora_A` of a linear layer: weight (r, in_features), the first k rows active."""


class ElasticLinearB(_ElasticB, nn.Linear):
    """`lora_B` of a linear layer: weight (out_features, r), the first k columns active."""

    @property  # type: ignore[override]
    def bias(self) -> Optional[torch.Tensor]:
        full = stored_tensor(self, "bias")
        return full if full is None or is_asked_by_name() or is_spread(full) else take(full, 0, self.active_width)

    @bias.setter
    def bias(self, value: torch.Tensor) -> None:
        set_in_replica(self, "bias", value)


class ElasticConv1dA(_ElasticA, nn.Conv1d):
    """`lora_A` of a Conv1d: weight (r, in_channels, kernel), the first k output channels active."""


class ElasticConv1dB(_ElasticB, nn.Conv1d):
    """`lora_B` of a Conv1d: weight (out_channels, r / groups, 1), the first k / groups input channels active."""


class ElasticConv2dA(_ElasticA, nn.Conv2d):
    """`lora_A` of a Conv2d: weight (r, in_channels, kernel, kernel), the first k output channels active."""


class ElasticConv2dB(_ElasticB, nn.Conv2d):
    """`lora_B` of a Conv2d: weight (out_channels, r / groups, 1, 1), the first k / groups input channels active."""


class ElasticConv3dA(_ElasticA, nn.Conv3d):
    """`lora_A` of a Conv3d, the first k output channels active."""


class ElasticConv3dB(_ElasticB, nn.Conv3d):
    """`lora_B` of a Conv3d, the first k / groups input channels active."""


_ELASTIC_CLASSES: dict[type, tuple[type, type]] = {
    nn.Linear: (ElasticLinearA, ElasticLinearB),
    nn.Conv1d: (ElasticConv1dA, ElasticConv1dB),
    nn.Conv2d: (ElasticConv2dA, ElasticConv2dB),
    nn.Conv3d: (ElasticConv3dA, ElasticConv3dB),
}


class ElasticParameterDict(nn.ParameterDict):
    """`lora_embedding_A` (r, num_embeddings) and `lora_embedding_B` (embedding_dim, r) of an embedding layer.

    Indexing, which is how peft computes with them, gives the active slice; `items()` and `values()`, which is how it
    freezes and unfreezes them, give the full parameters. peft moves and casts them by reading one and putting back the
    result: putting back a moved or cast slice moves or casts the full parameter.
    """

    rank_dim: int
    kept: dict[str, int]

    def __getitem__(self, key: str) -> Any:
        full = super().__getitem__(key)
        return _leading(full, self.rank_dim, self.kept[key]) if key in self.kept else full

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self.kept and value.shape != (full := super().__getitem__(key)).shape:
            if value.shape != self[key].shape or not torch.equal(self[key].to(value), value):
                raise ValueError(
                    f"Replacing the active part of adapter {key!r} would lose its other ranks. Call `set_subnet('max')` "
                    "first."
                )
            value = full.to(value)
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.kept.pop(key, None)

    def items(self) -> Iterable[tuple[str, Any]]:
        return ((key, super(ElasticParameterDict, self).__getitem__(key)) for key in self)

    def values(self) -> Iterable[Any]:
        return (value for _, value in self.items())


def rank_multiple(layer: nn.Module) -> int:
    """What the ranks of a LoRA layer on, or around, this one have to be divisible by: the groups of a convolution."""
    base_layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    return base_layer.groups if isinstance(base_layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 1


def check_ranks(base_layer: nn.Module, name: str, ranks: tuple[int, ...]) -> None:
    """Raise a ValueError if a LoRA layer around `base_layer` could not show these ranks."""
    groups = rank_multiple(base_layer)
    # whether the maximal rank is right is for peft to say
    if max(ranks) % groups == 0 and any(k % groups for k in ranks):
        raise ValueError(
            f"{name!r} is a convolution with groups={groups}; each of its ranks must be divisible by that, got "
            f"{list(ranks)} from `elastic_ranks`."
        )


def make_elastic(layer: LoraLayer, adapter_name: str, name: str) -> None:
    """Turn the A and B of `adapter_name` in a LoRA layer of stock peft into elastic ones, all ranks active.

    Args:
        layer (`LoraLayer`): the layer, of any backend of peft.
        adapter_name (`str`): the adapter.
        name (`str`): path of the layer, for messages.

    Raises:
        ValueError: if A and B are of an unknown kind; nothing is changed then.
    """
    if adapter_name in layer.lora_embedding_A:
        for parameters, rank_dim in ((layer.lora_embedding_A, 0), (layer.lora_embedding_B, 1)):
            if not isinstance(parameters, ElasticParameterDict):
                parameters.__class__ = ElasticParameterDict
                parameters.rank_dim = rank_dim
                parameters.kept = {}
        return

    lora_A, lora_B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    if isinstance(lora_A, _ElasticWeight):
        return  # in a PeftModel inside
    if type(lora_A) not in _ELASTIC_CLASSES or type(lora_B) is not type(lora_A):
        raise ValueError(
            f"{name!r} cannot be elastic: its adapter consists of {type(lora_A).__name__} and "
            f"{type(lora_B).__name__}, known are nn.Linear and nn.Conv1d/2d/3d. Leave it out of `target_modules`."
        )
    lora_A.__class__, lora_B.__class__ = _ELASTIC_CLASSES[type(lora_A)]
    # A holds one part for each expert or convolution group. B's rank dimension is already per convolution group, and
    # runs over the ranks first and the experts second.
    lora_A.blocks = _num_experts(layer) * _conv_groups(layer)


def read_unpacked(layer: LoraLayer) -> None:
    """Let a LoRA layer of stock peft around 4 bits of bitsandbytes read that weight right, whenever it merges or unmerges."""
    from . import bitsandbytes  # imports the package of that name

    if type(layer) is bitsandbytes.bnb.Linear4bit:
        layer.__class__ = bitsandbytes.Linear4bit


def set_width(layer: LoraLayer, outputs: Optional[Ranges], inputs: Optional[Ranges]) -> None:
    """Let all adapters of a linear layer compute with these of its features, those that the base layer computes with."""
    for factors, ranges in ((layer.lora_B, outputs), (layer.lora_A, inputs)):
        for factor in factors.values():
            factor.__dict__["active_width"] = ranges


def is_elastic(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether the A and B of `adapter_name` are elastic."""
    if adapter_name in layer.lora_embedding_A:
        return isinstance(layer.lora_embedding_A, ElasticParameterDict)
    return isinstance(layer.lora_A[adapter_name], _ElasticWeight)


def set_rank(layer: LoraLayer, adapter_name: str, rank: int, when_loaded: bool = False) -> None:
    """Activate the first `rank` ranks of an elastic layer, 1 <= rank <= r.

    Args:
        when_loaded (`bool`):
            Wait until the weights have been replaced. Whoever loads them may compare their shapes with those of
            `weight` first, as transformers does.
    """
    kept = None if rank == layer.r[adapter_name] else rank
    if adapter_name in layer.lora_embedding_A:
        for parameters in (layer.lora_embedding_A, layer.lora_embedding_B):
            if kept is None:
                parameters.kept.pop(adapter_name, None)
            else:
                parameters.kept[adapter_name] = kept
    else:
        groups, experts = _conv_groups(layer), _num_experts(layer)
        for module, width in ((layer.lora_A[adapter_name], 1), (layer.lora_B[adapter_name], experts)):
            part = None if kept is None else kept // groups * width
            now, then = (None, part) if when_loaded else (part, None)
            # nn.Module's own attribute setting takes several microseconds, and this runs for every layer in every step
            module.__dict__.update(kept=now, kept_when_loaded=then)
    if adapter_name in layer.lora_magnitude_vector:
        # peft can cache DoRA's norms between forwards
        layer.lora_magnitude_vector[adapter_name]._cache_clear()


def get_rank(layer: LoraLayer, adapter_name: str) -> int:
    """The number of active ranks of an elastic layer."""
    if adapter_name in layer.lora_embedding_A:
        kept = layer.lora_embedding_A.kept.get(adapter_name)
    else:
        kept = layer.lora_A[adapter_name].kept
        kept = None if kept is None else kept * _conv_groups(layer)
    return layer.r[adapter_name] if kept is None else kept


def full_weights(layer: LoraLayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of A and B with all their ranks, whatever is active."""
    if adapter_name in layer.lora_embedding_A:
        return dict(layer.lora_embedding_A.items())[adapter_name], dict(layer.lora_embedding_B.items())[adapter_name]
    return layer.lora_A[adapter_name].full_weight, layer.lora_B[adapter_name].full_weight


def active_weights(layer: LoraLayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of A and B as they are active now."""
    if adapter_name in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight


def padded_weights(layer: LoraLayer, adapter_name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of A and B as they are active now, with zeros for the ranks from there to `rank`: the same update."""
    blocks = 1 if adapter_name in layer.lora_embedding_A else layer.lora_A[adapter_name].blocks
    groups, experts = _conv_groups(layer), _num_experts(layer)
    a, b = active_weights(layer, adapter_name)
    return _padded(a, 0, rank // groups, blocks), _padded(b, 1, rank // groups * experts, 1)


def _padded(weight: torch.Tensor, dim: int, size: int, blocks: int) -> torch.Tensor:
    """Each of the `blocks` equal parts of dimension `dim` filled up with zeros to `size`: the inverse of `_leading`."""
    parts = weight.unflatten(dim, (blocks, -1))
    shape = list(parts.shape)
    shape[dim + 1] = size - shape[dim + 1]
    return torch.cat([parts, parts.new_zeros(shape)], dim + 1).flatten(dim, dim + 1)


def zero_inactive(layer: LoraLayer, adapter_name: str) -> None:
    """Set the inactive part of A and B to zero, in place."""
    if adapter_name in layer.lora_embedding_A:
        parts = [(p.rank_dim, p.kept.get(adapter_name), 1) for p in (layer.lora_embedding_A, layer.lora_embedding_B)]
    else:
        parts = [(m.rank_dim, m.kept, m.blocks) for m in (layer.lora_A[adapter_name], layer.lora_B[adapter_name])]
    for full, (rank_dim, kept, blocks) in zip(full_weights(layer, adapter_name), parts):
        if kept is not None:
            inactive = torch.ones(full.shape[rank_dim], dtype=torch.bool)
            inactive[_leading(torch.arange(full.shape[rank_dim]), 0, kept, blocks)] = False
            full.data.index_fill_(rank_dim, inactive.nonzero().flatten().to(full.device), 0)


def _conv_groups(layer: LoraLayer) -> int:
    return layer.get_base_layer().groups if isinstance(layer, _ConvNd) else 1


def _num_experts(layer: LoraLayer) -> int:
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1
