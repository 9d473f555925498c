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
"""What `save_pretrained` and `dequantize` of transformers do to a model with quantised layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..layers.backends import grid_layers
from ..structure.modules import replace_layers


class InMemoryConfig(QuantizationConfigMixin):
    """Of a quantisation that is nowhere on disk, so it never becomes part of a model's config."""

    def __init__(self) -> None:
        self.quant_method = "peft_elastic_grid"


class GridQuantizer(HfQuantizer):
    """Keeps `save_pretrained` from writing weights that the model does not compute with."""

    def __init__(self) -> None:
        super().__init__(InMemoryConfig(), pre_quantized=True)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        return state_to_save(model), {}  # transformers calls this before it writes anything

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside the layers, whose own weights have no gradient

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        replace_quantized(model)
        return model

    def remove_quantization_config(self, model: Any) -> None:
        unguard_saving(model)


def state_to_save(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """The state dict as it belongs on disk, None if it is the model's own.

    Raises:
        ValueError: if quantised layers would be written as they were before the rounding.
    """
    layers = grid_layers(model)
    inexact = [name for name, layer in layers.items() if not layer.exact]
    if inexact:
        raise ValueError(
            f"`save_pretrained` would write the weights of {len(inexact)} quantised layers, such as {inexact[0]}, as they "
            "were before the rounding, which is another model. Use peft_elastic.save_gptq(model, folder) for the integers, "
            "or model.dequantize() first for an ordinary checkpoint of the rounded weights."
        )
    transposed = {f"{name}.weight" for name, layer in layers.items() if layer.conv1d}
    if not transposed:
        return None
    return {key: value.T if key in transposed else value for key, value in model.state_dict().items()}


def replace_quantized(model: nn.Module) -> None:
    """Put ordinary layers with the rounded weights in the place of the quantised ones."""
    replace_layers(model, [(layer, layer.to_linear()) for layer in grid_layers(model).values()])


def guard_saving(model: nn.Module) -> None:
    """Make `save_pretrained` of every transformers model in `model` an error while layers of it would be saved wrongly."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module, "hf_quantizer", None) is None:
            module.hf_quantizer = GridQuantizer()


def unguard_saving(model: nn.Module) -> None:
    """Undo `guard_saving`: for a model whose quantised layers have all been replaced."""
    for module in model.modules():
        if isinstance(getattr(module, "hf_quantizer", None), GridQuantizer):
            del module.hf_quantizer


def check_unquantized(model: nn.Module) -> None:
    """ValueError if the model belongs to another quantisation method of transformers, or has layers packed by this package."""
    for module in model.modules():
        quantizer = getattr(module, "hf_quantizer", None) if isinstance(module, PreTrainedModel) else None
        if quantizer is not None and not isinstance(quantizer, GridQuantizer):
            method = quantizer.quantization_config.quant_method
            raise ValueError(
                f"model: it is quantised with {getattr(method, 'value', method)} already; quantise the floating-point model."
            )
