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
"""What the tests of this folder share: kinds of checkpoints, and how to load them with GPTQModel."""

from pathlib import Path

import torch
from support.models import outputs, tiny_llama, tokens
from transformers import AutoModelForCausalLM

from peft_elastic import MagnitudeConfig, prune
from peft_elastic.quantization import QuantizedLinear


# Its kernels want multiples of 32: the number of outputs too, of which the keys and values have 2 / 4.
SHAPE = {"hidden_size": 64, "intermediate_size": 128}
GROUP_SIZE = 32
KINDS = [
    {},
    {"form": "gptq_v2"},
    {"desc_act": True},
    {"sym": False},
    {"sym": False, "desc_act": True, "form": "gptq_v2"},
    {"bits": 8},
    {"bits": 2, "sym": False, "form": "gptq_v2"},
]


def name_of(kind):
    return "-".join(f"{key}={value}" for key, value in kind.items()) or "plain"


def load(folder: Path, dtype=torch.float32, backend="gptq_torch"):
    """As a user would, but for the kernel: of those that GPTQModel chooses by itself some refuse training, and where the
    processor has AVX512-BF16 it compiles one for minutes before it chooses. This one takes every kind of checkpoint."""
    from transformers import GPTQConfig

    config = GPTQConfig(bits=4, backend=backend)  # the backend is all that is taken from it, even for 8 bits
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config).eval()


def gptqmodel_layers(model) -> dict:
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "dequantize_weight")}


def own_layers(model) -> dict[str, QuantizedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def pruned(build=tiny_llama, sparsity=0.5):
    model = build(**SHAPE)
    prune(model, MagnitudeConfig(sparsity=sparsity), progress=False)
    return model


@torch.no_grad()
def as_gptqmodel_computes(model):
    """The model, whose layers are ours, with their weights and biases rounded to float16 once more, as in GPTQModel's layers."""
    names = list(own_layers(model))
    model.dequantize()
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            parameter.data = parameter.half().float()
    return model


def assert_same_weights(ours, theirs) -> None:
    """To the last bit of float16, which is what GPTQModel's layers multiply with; so with the same zeros."""
    ours, theirs = own_layers(ours), gptqmodel_layers(theirs)
    assert ours.keys() == theirs.keys() and ours
    for name, layer in ours.items():
        weight = layer.grid.dequantize(layer.integers())
        other = theirs[name].dequantize_weight().T
        assert other.dtype == torch.float16 and torch.equal(weight.half(), other), name
        assert torch.equal(weight == 0, other == 0), name


def assert_close(actual, expected, rtol=2e-3) -> None:
    """But for the rounding of weights to float16: within a share of the largest logit."""
    if not isinstance(actual, torch.Tensor):
        actual = outputs(actual, tokens())
    if not isinstance(expected, torch.Tensor):
        expected = outputs(expected, tokens())
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < rtol, f"they differ by {error:.1e} of the largest"
