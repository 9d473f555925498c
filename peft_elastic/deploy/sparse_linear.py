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

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from . import ops
from .format import compress, decompress, verify


_KEYS = ("weight_bitmask", "weight_values", "weight_scales")


class SparseLinear(nn.Module):
    """y = x W^T + b with W as a bitmap and packed nonzeros, on the CPU. Made by `from_linear`; the weight is frozen.

    Its state dict holds the tensors of `peft_elastic.deploy.format`; `packed` is their form for the kernels. Casts such as
    `.bfloat16()` change the bias alone: the weight keeps its precision, and the output has the type of the input.

    Attributes:
        in_features, out_features, nnz (`int`), sparsity (`float`, share of zeros), nbytes (`int`, of the packed weight).
        value_dtype (`str`): "bf16" or "int8".
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
        self.packed, self.scales = packed, scales
        self.out_features, self.in_features, self.nnz, self.value_dtype = ops.describe(packed)

    @classmethod
    def from_linear(cls, linear: nn.Module, dtype: str = "bf16") -> SparseLinear:
        """Compresses a layer, which is not changed.

        Args:
            linear (`nn.Linear` or transformers' `Conv1D`): on the CPU, finite weights.
            dtype (`str`): of the values. "bf16" rounds to bfloat16; "int8" is symmetric with one scale for each output.

        Raises:
            ValueError: on any other layer or `dtype`, weights that are not finite, or without the C++ extension.
        """
        if not isinstance(linear, (nn.Linear, Conv1D)) or type(linear) not in (nn.Linear, Conv1D):
            raise ValueError(
                f"`linear` must be an nn.Linear or transformers' Conv1D itself, got {type(linear).__name__}."
            )
        if linear.weight.device.type != "cpu":
            raise ValueError(f"`linear` must be on the CPU, its weight is on {linear.weight.device}.")
        weight = linear.weight.detach()
        weight = weight.T if isinstance(linear, Conv1D) else weight
        tensors = compress(weight, dtype)
        packed = ops.pack(tensors["weight_bitmask"], tensors["weight_values"], weight.shape[1])
        layer = cls(packed, tensors.get("weight_scales"), linear.bias, weight.dtype)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The dense layer with the same weights, of `linear_dtype`."""
        bitmask, values = ops.unpack(self.packed)
        weight = decompress(bitmask, values, self.scales, self.in_features, self.linear_dtype)
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, dtype=self.linear_dtype)
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """The weight in its form on disk, by the names there (`peft_elastic.deploy.format`)."""
        bitmask, values = ops.unpack(self.packed)
        tensors = {"weight_bitmask": bitmask, "weight_values": values}
        return tensors if self.scales is None else {**tensors, "weight_scales": self.scales}

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
        arguments = (x, self.packed, self.scales, self.bias, self.out_features)
        if not torch.compiler.is_compiling():
            if x.shape[-1] != self.in_features or x.dtype not in ops.FLOAT_DTYPES or x.device.type != "cpu":
                raise ValueError(
                    f"`x` must be float32, bfloat16 or float16 [..., {self.in_features}] on the CPU, got {x.dtype} "
                    f"{tuple(x.shape)} on {x.device}."
                )
            # Without gradients straight to the kernel: the way through the operator takes longer than a small layer.
            if not (
                torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad))
            ):
                return ops.forward(*arguments)
        return ops.sparse_linear(*arguments)

    def extra_repr(self) -> str:
        dense = 2 * self.out_features * self.in_features
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.value_dtype}, sparsity={self.sparsity:.1%}, {self.nbytes} bytes ({self.nbytes / dense:.0%} of bf16)"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        device = fn(torch.empty(0)).device
        if device.type != "cpu":
            raise ValueError(
                f"SparseLinear runs on the CPU alone and cannot move to {device}; use `.to_linear()` first."
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + key: tensor for key, tensor in self.stored_tensors().items()})

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, metadata: Any, strict: bool, missing: list, unexpected: list, errors: list
    ) -> None:
        wanted = _KEYS if self.scales is not None else _KEYS[:2]
        tensors = {key: state_dict[prefix + key] for key in wanted if prefix + key in state_dict}
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in _KEYS}}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        if not tensors:
            missing.extend(prefix + key for key in wanted)
            return
        values = tensors.get("weight_values")
        try:
            verify(
                prefix.removesuffix("."),
                tensors,
                out_features=self.out_features,
                in_features=self.in_features,
                nnz=0 if values is None else values.numel(),
                dtype=self.value_dtype,
            )
            packed = ops.pack(tensors["weight_bitmask"], tensors["weight_values"], self.in_features)
        except ValueError as error:
            errors.append(str(error))  # `load_state_dict` raises them together
            return
        self._set_weight(packed, tensors.get("weight_scales"))
