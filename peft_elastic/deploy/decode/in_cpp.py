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
"""What C++ computes of a step: all layers at once (csrc/decode.h), or the dense output embedding."""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from ...layers import extension, ops
from ...layers.addresses import address, is_plain, is_special_mode
from ...layers.sparse_linear import SparseLinear
from .families import Family, Watch
from .room import Room


FEW_ROWS = 4  # with more torch multiplies dense layers faster than the C++ step does
_SILU = (nn.SiLU, SiLUActivation)
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


def _is_plain_tensor(tensor: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether C++ can read it by its address."""
    return is_plain(tensor) and tensor.shape == shape and tensor.dtype in dtypes and tensor.is_contiguous()


def fits_linear(linear: Any, dtype: torch.dtype) -> bool:
    """Whether the C++ step can compute a linear layer: a sparse one, or a dense one of the model's type."""
    if type(linear) is SparseLinear:
        dtypes = ops.FLOAT_DTYPES
    elif type(linear) is nn.Linear and _is_plain_tensor(
        linear.weight, (linear.out_features, linear.in_features), (dtype,)
    ):
        dtypes = (dtype,)
    else:
        return False
    return linear.bias is None or _is_plain_tensor(linear.bias, (linear.out_features,), dtypes)


class FusedLayers:
    """The layers for the C++ step (csrc/decode.h): addresses, and a watch on everything behind them."""

    def __init__(self, layers: list[Any], dtype: torch.dtype) -> None:
        first = layers[0].self_attn
        self.count, self.dtype, self.head_dim = len(layers), dtype, first.head_dim
        self.hidden_size, self.kv_heads = first.q_proj.in_features, first.k_proj.out_features // first.head_dim
        self.most_rows = ops.DENSE_ROWS - 1
        native: Any = extension._C
        self.model = native.DecodeModel(ops.FLOAT_TYPES[dtype], self.hidden_size, self.head_dim)
        self.entries: list[tuple[dict[str, Any], str, Any]] = []  # what was found where
        places: list[tuple[nn.Module, str]] = []
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            places += [(layer, "mlp"), (mlp, "act_fn")]
            places += [(attention, name) for name in _ATTENTION_LINEARS] + [(mlp, name) for name in _MLP_LINEARS]
            norms = [layer.input_layernorm, layer.post_attention_layernorm]
            norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
            linears = [getattr(attention, name) for name in _ATTENTION_LINEARS]
            linears += [getattr(mlp, name) for name in _MLP_LINEARS]
            for norm in norms:
                if norm is not None:
                    self._enter(norm._parameters, "weight")
                    self._enter(norm.__dict__, "variance_epsilon")
            for linear in linears:
                if type(linear) is SparseLinear:
                    self._enter(linear.__dict__, "packed")
                    self._enter(linear.__dict__, "scales")
                else:
                    self._enter(linear._parameters, "weight")
                    self.most_rows = FEW_ROWS
                self._enter(linear._parameters, "bias")
                self._enter(linear.__dict__, "bias")  # where modules keep one that is None, or no parameter
            self._enter(attention.__dict__, "scaling")
            self.model.add_layer(
                **dict(zip(("q", "k", "v", "o", "gate", "up", "down"), map(self._linear, linears), strict=True)),
                **dict(zip(("input_norm", "mlp_norm", "q_norm", "k_norm"), map(self._norm, norms), strict=True)),
                scaling=attention.scaling,
            )
        self.watch = Watch(places)
        self.owners, self.names, self.found = ([entry[i] for entry in self.entries] for i in range(3))
        self.tensors = [found for found in self.found if isinstance(found, Tensor)]
        self.addresses = list(map(Tensor.data_ptr, self.tensors))
        # Casts put other memory behind the same parameter. As long as this one is held it cannot have the same address.
        self.memory = [tensor.detach() for tensor in self.tensors]

    @staticmethod
    def _linear(linear: Any) -> Any:
        packed, bias = (linear.packed, linear.bias) if type(linear) is SparseLinear else (None, linear.bias)
        scales = None if packed is None else linear.scales
        native: Any = extension._C
        return native.DecodeLinear(
            out_features=linear.out_features,
            in_features=linear.in_features,
            weight=linear.weight.data_ptr() if packed is None else packed.data_ptr(),
            size=0 if packed is None else packed.numel(),
            scales=0 if scales is None else scales.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            bias_type=ops.FLOAT_TYPES[torch.float32 if bias is None else bias.dtype],
        )

    @staticmethod
    def _norm(norm: Any) -> Any:
        native: Any = extension._C
        if norm is None:
            return None
        return native.DecodeNorm(weight=norm.weight.data_ptr(), epsilon=norm.variance_epsilon)

    def _enter(self, owner: dict[str, Any], name: str) -> None:
        self.entries.append((owner, name, owner.get(name)))

    @classmethod
    def make(cls, layers: list[Any], family: Family) -> FusedLayers | str:
        """The reason if the C++ step does not compute what these layers do."""
        dtype = layers[0].input_layernorm.weight.dtype
        if extension._C is None:
            return "the C++ extension is not built (`peft-elastic info` says how to get it)"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"the norms are {dtype}; allowed are torch.float32 and torch.bfloat16"
        heads = set()
        for index, layer in enumerate(layers):
            attention, mlp = layer.self_attn, layer.mlp
            if type(mlp) is not family.mlp or type(mlp.act_fn) not in _SILU:
                return (
                    f"the MLP of layer {index} is a {type(mlp).__name__} with {type(getattr(mlp, 'act_fn', None)).__name__}; "
                    f"allowed is a {family.mlp.__name__} with SiLU"
                )
            linears = [(attention, name) for name in _ATTENTION_LINEARS] + [(mlp, name) for name in _MLP_LINEARS]
            for owner, name in linears:
                if not fits_linear(linear := getattr(owner, name), dtype):
                    return (
                        f"{name} of layer {index} is a {type(linear).__name__}; allowed are SparseLinear, and nn.Linear in "
                        f"{dtype}, with plain contiguous tensors on the CPU"
                    )
            width = attention.q_proj.in_features
            norms = [(layer, "input_layernorm", width), (layer, "post_attention_layernorm", width)]
            norms += [
                (attention, name, attention.head_dim) for name in ("q_norm", "k_norm") if hasattr(attention, name)
            ]
            for owner, name, size in norms:
                if not _is_plain_tensor(getattr(owner, name).weight, (size,), (dtype,)):
                    return f"the weight of {name} of layer {index} is no plain contiguous {dtype} tensor ({size},) on the CPU"
            heads.add((attention.head_dim, width, attention.k_proj.out_features))
        if len(heads) > 1:
            return "the layers differ in their head dimension, hidden size or number of key-value heads"
        try:
            fused = cls(layers, dtype)
        except ValueError as error:  # layers that do not fit together: torch says so in its own words
            return f"the layers do not fit together: {error}"
        return fused if fused.watch.is_plain() else fused.watch.what_is_not_plain()

    def is_current(self) -> bool:
        """Whether the modules and all tensors are still those that the addresses were taken from."""
        return (
            self.watch.is_plain()
            and all(map(is_, map(dict.get, self.owners, self.names), self.found))  # type: ignore[arg-type]
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )

    def refuses(self, hidden: Tensor, cos: Tensor, room: Room) -> str | None:
        """The reason, if the tensors are not as the C++ code expects."""
        batch = hidden.shape[0]
        if batch > self.most_rows:
            return f"more than {self.most_rows} sequences at once, which torch multiplies faster"
        if not (
            hidden.dtype == cos.dtype == self.dtype
            and len(room.buffers) == 2 * self.count
            and cos.shape in ((1, 1, self.head_dim), (batch, 1, self.head_dim))
            and hidden.shape == (batch, 1, self.hidden_size)
            and room.buffers[0].dtype == self.dtype
            and room.is_plain
            and room.buffers[0].shape == (batch, self.kv_heads, room.capacity, self.head_dim)
        ):
            return "the embedding, the rotary embedding or the cache is of another type or shape than the layers"
        return None

    def run(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, room: Room) -> Tensor:
        """What the layers make of `hidden` [batch, 1, hidden_size]; fills the last position of the room."""
        hidden, cos, sin = hidden.contiguous(), cos.contiguous(), sin.contiguous()
        mask = None if mask is None else mask.contiguous()
        output = torch.empty_like(hidden)
        extension._C.decode(  # type: ignore[union-attr]
            self.model,
            batch=hidden.shape[0],
            length=room.length - 1,
            capacity=room.capacity,
            hidden=address("hidden", hidden, self.dtype),
            cos=address("cos", cos, self.dtype),
            sin=address("sin", sin, self.dtype, tuple(cos.shape)),
            rotary_per_row=cos.shape[0] > 1,
            mask=0 if mask is None else address("mask", mask, torch.bool, (hidden.shape[0], room.length)),
            keys_and_values=room.addresses.buffer_info()[0],
            output=output.data_ptr(),
            threads=torch.get_num_threads(),
        )
        return output


class DenseStep:
    """Stands in for the forward of the output embedding, a dense layer: multiplies few rows as fast as memory is."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    def __call__(self, input: Tensor) -> Tensor:
        linear = self.linear
        rows = input.numel() // linear.in_features if linear.in_features else 0
        if not 0 < rows <= FEW_ROWS or not self.takes(input):
            return nn.Linear.forward(linear, input)
        x, weight, bias = input.contiguous(), linear.weight, linear.bias
        y = x.new_empty((*x.shape[:-1], linear.out_features))
        extension._C.dense_linear(  # type: ignore[union-attr]
            x=x.data_ptr(),
            rows=rows,
            out_features=linear.out_features,
            in_features=linear.in_features,
            weight=weight.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            y=y.data_ptr(),
            type=ops.FLOAT_TYPES[x.dtype],
            threads=torch.get_num_threads(),
        )
        return y

    def takes(self, input: Tensor) -> bool:
        """Whether C++ computes what torch would."""
        return (
            extension._C is not None
            and not is_special_mode()
            and is_plain(input)
            and input.dtype in (torch.float32, torch.bfloat16)
            and input.dim() > 0
            and input.shape[-1] == self.linear.in_features
            and fits_linear(self.linear, input.dtype)
        )
