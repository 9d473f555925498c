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
"""The deployed layer: a linear layer whose weight stays compressed in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..common.checks import check_choice, wrong
from ..common.parameters import check_parameters
from . import ops
from .addresses import is_plain
from .ordinary import ordinary_linear
from .values import FORMATS, ROUNDED, STORED_NAMES, Sizes, ValueFormat
from .values.int4 import INT4


class SparseLinear(nn.Module):
    """y = x W^T + b with W as a bitmap and packed nonzeros, on the CPU. Made by `from_linear` or `from_quantized`; the weight is
    frozen.

    Its state dict holds the tensors of its `ValueFormat` (`layers/values/README.md`); `packed` is their form for the kernels. Casts such as
    `.bfloat16()` change the bias alone: the weight keeps its precision, and the output has the type of the input, or of autocast.

    Attributes:
        in_features, out_features, nnz (`int`), sparsity (`float`, share of zeros), nbytes (`int`, of the packed weight).
        value_dtype (`str`): "bf16", "int8" or "int4".
        has_bitmask (`bool`): False for int4 that stores its zeros too, and has no bitmap.
        group_size (`int`): inputs that share a scale and a zero, int4 only, else 0.
        linear_dtype (`torch.dtype`): of the layer it was made from, and of what `to_linear` gives back.
        bias (`nn.Parameter` or None): `(out_features,)`.
    """

    def __init__(
        self, packed: torch.Tensor, scales: torch.Tensor | None, bias: torch.Tensor | None, linear_dtype: torch.dtype
    ):
        super().__init__()
        # Plain attributes: a buffer of floats would follow `.bfloat16()`, and none of this belongs to the state dict.
        self._set_weight(packed, scales)
        self.linear_dtype = linear_dtype
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def _set_weight(self, packed: torch.Tensor, scales: torch.Tensor | None) -> None:
        # a copy, in one piece: scales come from state dicts, whose tensors others hold, or are views of larger ones
        self.packed = packed
        self.scales = None if scales is None else scales.detach().clone(memory_format=torch.contiguous_format)
        info = ops.describe(packed)
        self.out_features, self.in_features, self.nnz, self.value_dtype = info[:4]
        self.group_size, self.has_bitmask = info.group_size, info.has_bitmask

    @classmethod
    def from_linear(cls, linear: nn.Module, dtype: str = "bf16") -> SparseLinear:
        """Compresses a layer, which is not changed.

        Args:
            linear (`nn.Linear` or transformers' `Conv1D`): on the CPU, finite weights.
            dtype (`str`): of the values. "bf16" rounds to bfloat16; "int8" is symmetric with one scale for each output.

        Raises:
            ValueError: on any other layer or `dtype`, weights that are not finite, or without the C++ extension.
        """
        check_parameters({"": linear})
        if not isinstance(linear, (nn.Linear, Conv1D)) or type(linear) not in (nn.Linear, Conv1D):
            raise ValueError(
                f"`linear` must be an nn.Linear or transformers' Conv1D itself, got {type(linear).__name__}."
            )
        if linear.weight.device.type != "cpu":
            raise ValueError(f"`linear` must be on the CPU, its weight is on {linear.weight.device}.")
        weight = linear.weight.detach()
        weight = weight.T if isinstance(linear, Conv1D) else weight
        check_choice("dtype", dtype, ROUNDED)
        tensors = FORMATS[dtype].compress(weight)
        sizes = Sizes(weight.shape[0], weight.shape[1], tensors["weight_values"].numel())
        layer = cls(*FORMATS[dtype].pack(tensors, sizes), linear.bias, weight.dtype)
        return layer.train(linear.training)

    @classmethod
    def from_quantized(
        cls,
        q: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        g_idx: torch.Tensor | None = None,
        *,
        group_size: int,
        bias: torch.Tensor | None = None,
        linear_dtype: torch.dtype = torch.float32,
        sparse: bool = True,
    ) -> SparseLinear:
        """An int4 layer from a weight that GPTQ or a relative has quantized, without further rounding.

        weight[o, i] = scales[o, g] * (q[o, i] - zeros[o, g]), where g is the group of column i. What has q = zero is zero, and is
        not stored unless `sparse` is False. Weights of 2 and 3 bits are int4 as well.

        Args:
            q (`torch.Tensor`): whole numbers `(out, in)`, 0 to 15.
            scales (`torch.Tensor`): floating point `(out, groups)`, finite.
            zeros (`torch.Tensor`): whole numbers `(out, groups)`, 0 to 15.
            g_idx (`torch.Tensor`, *optional*): the group of each column, `(in,)`, of checkpoints with "act order"; by default
                `i // group_size`. Each group has `group_size` columns, the last one what is left.
            group_size (`int`): a multiple of 4, or at least `in` for a single group.
            bias (`torch.Tensor`, *optional*): `(out,)`.
            linear_dtype (`torch.dtype`): of what `to_linear` gives back.
            sparse (`bool`): whether to leave the zeros out. That takes fewer bytes from about 25% zeros on.

        Raises:
            ValueError: naming the argument that does not fit, or without the C++ extension.
        """
        if linear_dtype not in ops.FLOAT_DTYPES:
            raise wrong("linear_dtype", f"one of {', '.join(map(str, ops.FLOAT_DTYPES))}", linear_dtype)
        tensors = INT4.compress(q, scales, zeros, g_idx, group_size, sparse)
        if bias is not None and (tuple(bias.shape) != (q.shape[0],) or bias.dtype not in ops.FLOAT_DTYPES):
            raise ValueError(f"`bias` must be floating point ({q.shape[0]},), got {bias.dtype} {tuple(bias.shape)}.")
        packed, row_scales = INT4.pack(tensors, Sizes(q.shape[0], q.shape[1], q.numel(), group_size, sparse))
        return cls(packed, row_scales, bias, linear_dtype)

    def to_quantized(self) -> dict[str, Any]:
        """The whole numbers of an int4 layer, as `from_quantized` takes them.

        Returns:
            `dict` with `q` (uint8 `(out, in)`), `scales` (float32 `(out, groups)`), `zeros` (uint8 `(out, groups)`), `g_idx` (int32
            `(in,)`, or None if it is `i // group_size`) and `group_size`.

        Raises:
            ValueError: if the values are not int4.
        """
        if self.value_format.codes is None:
            raise ValueError(f"this layer holds {self.value_dtype} values, which no whole numbers were kept of.")
        tensors = self.stored_tensors()
        return {
            "q": self.value_format.codes(tensors, self.sizes)[0],
            "scales": tensors["weight_scales"].float(),
            "zeros": tensors["weight_zeros"],
            "g_idx": tensors.get("weight_g_idx"),
            "group_size": self.group_size,
        }

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same weights, of `linear_dtype`."""
        if self.value_format.is_grid:
            weight = ops.to_dense(self.packed, self.scales, self.linear_dtype)
        else:  # in a type that C++ may not know, such as float64
            weight = self.value_format.decompress(self.stored_tensors(), self.sizes, self.linear_dtype)
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        return ordinary_linear(nn.Parameter(weight), bias, self.training)  # type: ignore[return-value]

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """The weight in its form on disk, by the names there (`layers/values/README.md`)."""
        return self.value_format.unpack(self.packed, self.scales)

    @property
    def value_format(self) -> ValueFormat:
        """The type of its values."""
        return FORMATS[self.value_dtype]

    @property
    def sizes(self) -> Sizes:
        """What `value_format` asks for besides the tensors."""
        return Sizes(self.out_features, self.in_features, self.nnz, self.group_size, self.has_bitmask)

    @property
    def sparsity(self) -> float:
        return 1 - self.nnz / (self.out_features * self.in_features)

    @property
    def nbytes(self) -> int:
        return self.packed.numel() + (0 if self.scales is None else 4 * self.out_features)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "a SparseLinear has no dense `weight`. `.to_linear()` gives the dense layer; code that needs it for its "
                "computation wants the layer left out (`sparsify_linears(..., skip=[...])`)."
            )
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu") and x.dtype in ops.FLOAT_DTYPES:
            x = x.to(torch.get_autocast_dtype("cpu"))  # as it does for nn.Linear
        # past the slow lookup of modules; a bias that is pruned or parametrized is no parameter
        bias = self._parameters["bias"] if "bias" in self._parameters else self.bias
        return ops.linear(x, self.packed, self.scales, bias, self.out_features, self.in_features)

    def __prepare_scriptable__(self) -> nn.Module:
        return _Scriptable(self)  # what torch.jit.script compiles in place of this

    def extra_repr(self) -> str:
        dense = 2 * self.out_features * self.in_features
        groups = f", group_size={self.group_size}" if self.group_size else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.value_dtype}{'' if self.has_bitmask else ' dense'}{groups}, sparsity={self.sparsity:.1%}, {self.nbytes} bytes ({self.nbytes / dense:.0%} of bf16)"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        device = fn(torch.empty(0, device="cpu")).device
        if device.type != "cpu":
            raise ValueError(
                f"SparseLinear runs on the CPU alone and cannot move to {device}; use `.to_linear()` or `densify_linears` first. "
                "`model.to('cpu')` brings back what of a model has moved before it."
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + key: tensor for key, tensor in self.stored_tensors().items()})

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, metadata: Any, strict: bool, missing: list, unexpected: list, errors: list
    ) -> None:
        # without `weight_g_idx` the inputs are in the order of their groups, whatever they are here
        possible = [key for key in self.value_format.tensors if key != "weight_bitmask" or self.has_bitmask]
        tensors = {key: state_dict[prefix + key] for key in possible if prefix + key in state_dict}
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in STORED_NAMES}}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        if not tensors:
            missing.extend(prefix + key for key in possible if key not in self.value_format.optional)
            return
        try:
            self._set_weight(*self._pack_verified(prefix.removesuffix("."), tensors))
        except ValueError as error:
            errors.append(str(error))  # `load_state_dict` raises them together

    def _pack_verified(self, name: str, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The packed form of stored tensors for this layer, which come from anywhere."""
        nnz = 0  # if it cannot be told, `verify` says what is wrong
        values, bitmask = tensors.get("weight_values"), tensors.get("weight_bitmask")
        if not self.value_format.is_grid:
            nnz = 0 if values is None else values.numel()
        elif bitmask is not None and is_plain(bitmask) and bitmask.dtype == torch.uint8:
            nnz = int(np.bitwise_count(bitmask.numpy()).sum(dtype=np.int64))  # values are packed, several to a byte
            nnz = min(nnz, self.out_features * self.in_features)
        sizes = self.sizes._replace(nnz=nnz)
        self.value_format.verify(name, tensors, sizes)
        try:
            return self.value_format.pack(tensors, sizes)
        except ValueError as error:
            raise ValueError(f"{name}.weight_values: {error}") from None


class _Scriptable(nn.Module):
    """A `SparseLinear` in the part of Python that torch.jit.script understands."""

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        self.register_buffer("packed", layer.packed)
        self.register_buffer("scales", layer.scales)
        self.bias = layer.bias
        self.out_features: int = layer.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.peft_elastic.sparse_linear(x, self.packed, self.scales, self.bias, self.out_features, "float")
