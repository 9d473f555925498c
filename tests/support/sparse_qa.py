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
"""What the tests of SparsePEFT and QA-SparsePEFT share: pruned and quantised bases, and adapters of every kind on them."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from support.models import ARCHITECTURES, randomize, tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_elastic import SparseQALoraConfig
from peft_elastic.quantization import QuantizedLinear, fit_grid
from peft_elastic.tuners.sparse_qa_lora.layer import SparseLoraLinear


QUANTIZED = {"quantization_aware": True, "bits": 4, "group_size": 16}
KINDS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "quantised": {"sparse_adapter": False, **QUANTIZED},
    "sparse and quantised": QUANTIZED,
}
ALL_KINDS = {"plain": {"sparse_adapter": False}, **KINDS}
TARGETS = ["q_proj", "v_proj", "down_proj"]


@torch.no_grad()
def pruned(model: Any, sparsity: float = 0.5) -> Any:
    """With random zeros in every linear layer, the same at every call."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            module.weight.mul_(torch.rand(module.weight.shape, generator=generator) >= sparsity)
    return model


def quantized(model: Any, names: list[str] | None = None, bits: int = 4, group_size: int = 16, **options: Any) -> Any:
    """With its linear layers of these names rounded to nearest."""
    for path, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, Conv1D)) and path.rpartition(".")[2] in (names or TARGETS):
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            grid = fit_grid(weight, bits, group_size, **options)
            model.set_submodule(path, QuantizedLinear.from_linear(module, grid))
    return model


def config(**settings: Any) -> SparseQALoraConfig:
    return SparseQALoraConfig(
        **{"r": 4, "lora_alpha": 6, "elastic_ranks": [4, 2], "target_modules": TARGETS, **settings}
    )


def adapted(model: Any = None, std: float = 0.2, **settings: Any) -> Any:
    """A model in evaluation mode with an adapter whose B is not zero."""
    model = get_peft_model(pruned(tiny_llama()) if model is None else model, config(**settings)).eval()
    randomize(model, std=std)
    return model


def adapted_architecture(name: str, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    architecture = ARCHITECTURES[name]
    model = adapted(pruned(architecture.build()), target_modules=list(architecture.modules), **settings)
    return model, architecture.inputs()


def layers(model: Any) -> dict[str, SparseLoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLoraLinear)}


def base_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights of the base layers, a copy, by the path of the layer in the base model."""
    return {
        name.removeprefix("base_model.model."): layer.get_base_layer().weight.detach().clone()
        for name, layer in layers(model).items()
    }


def effective_weights(model: Any) -> dict[str, torch.Tensor]:
    """What each layer multiplies with, (out, in), read off its output for the unit matrix."""
    weights = {}
    with torch.no_grad():
        for name, layer in layers(model).items():
            base_layer = layer.get_base_layer()
            eye = torch.eye(layer.in_features, dtype=base_layer.weight.dtype)
            bias = 0 if base_layer.bias is None else base_layer.bias.detach()
            weights[name.removeprefix("base_model.model.")] = (layer(eye) - bias).T
    return weights
