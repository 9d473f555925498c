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
"""Checkpoints of GPTQModel: what is in them, and elastic adapters on top of them, on a CPU."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from checkpoints import KINDS, SHAPE, load, name_of
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from support.models import outputs, randomize, tiny_llama, tokens

from peft_elastic import ElasticLoraConfig
from peft_elastic.cost.counts import CostModel


pytestmark = pytest.mark.filterwarnings("ignore")

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
# The plain one, and what GPTQModel chooses on a CPU if it is asked for one that can train: for 4 bits only.
BACKENDS = ["gptq_torch", "gptq_torch_aten"]


def elastic(model, **settings):
    model = get_peft_model(model, ElasticLoraConfig(**(LORA | settings))).eval()
    randomize(model)
    return model


def unpacked(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The integers in int32 words, of which each holds `32 / bits` along `dim`, the first in the lowest bits."""
    values = words.long().movedim(dim, -1).unsqueeze(-1) >> torch.arange(0, 32, bits)
    return (values & (1 << bits) - 1).flatten(-2).movedim(-1, dim)


def dense_equivalent(folder: Path):
    """The model whose linear layers hold what the checkpoint stands for, in float32, by the definition of the format."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits = config["bits"]
    tensors = load_file(folder / "model.safetensors")
    state = {name: tensor.float() for name, tensor in tensors.items() if tensor.is_floating_point()}
    for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
        zeros = tensors[f"{name}.qzeros"].long()
        if config["checkpoint_format"] == "gptq":  # stored less one, by a subtraction from the words as a whole
            zeros = zeros + sum(1 << shift for shift in range(0, 32, bits))
        scales, groups = state.pop(f"{name}.scales"), tensors[f"{name}.g_idx"].long()
        codes = unpacked(tensors[f"{name}.qweight"], bits, 0) - unpacked(zeros, bits, 1)[groups]
        state[f"{name}.weight"] = (scales[groups] * codes).half().float().T
    model = tiny_llama(**SHAPE)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_layout(quantized_folder, kind):
    """That the loaded model is what our reading of its files says, to the last bit."""
    folder = quantized_folder(**kind)
    model, dense = load(folder), dense_equivalent(folder)
    weights = dict(dense.named_parameters())
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "dequantize_weight")}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.dequantize_weight().T.float(), weights[f"{name}.weight"])
    torch.testing.assert_close(outputs(model, tokens()), outputs(dense, tokens()), rtol=1e-5, atol=1e-5)
    if kind.get("bits", 4) > 2:  # that there is something to lose
        assert (outputs(model, tokens()) - outputs(tiny_llama(**SHAPE), tokens())).abs().mean() < 0.5


@pytest.mark.parametrize("kind", [{}, {"sym": False, "desc_act": True, "form": "gptq_v2"}, {"bits": 8}], ids=name_of)
def test_elastic_lora(quantized_folder, kind):
    """Outputs and gradients of every subnet are those on the dense equivalent."""
    folder = quantized_folder(**kind)
    model, dense = elastic(load(folder)), elastic(dense_equivalent(folder))
    assert {type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")} == {"GPTQLoraLinear"}
    expected = dict(dense.named_parameters())
    seen = []
    for subnet in ("max", "min", "heuristic", model.search_space.sample(1)):
        for m in (model, dense):
            m.set_subnet(subnet)
            m.zero_grad()
            m.train()
            m(input_ids=tokens(), labels=tokens()).loss.backward()
            m.eval()
        seen.append(outputs(model, tokens()))
        torch.testing.assert_close(seen[-1], outputs(dense, tokens()), rtol=1e-4, atol=1e-4)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4)
    assert (seen[0] - seen[1]).abs().max() > 1e-2
    assert CostModel(model, model.search_space).base_macs == CostModel(dense, dense.search_space).base_macs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_training(quantized_folder, dtype, backend):
    model = get_peft_model(load(quantized_folder(), dtype, backend), ElasticLoraConfig(**LORA)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(20):
        model.sample_subnet(model.search_space.sample(step))
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


NO_BACKWARD = pytest.mark.xfail(reason="TorchAtenLinear stays with its inference kernel, which has no backward")


@pytest.mark.parametrize(
    ("dtype", "backend"),
    [
        (torch.float32, "gptq_torch"),
        (torch.float16, "gptq_torch"),
        (torch.float32, "gptq_torch_aten"),
        pytest.param(torch.float16, "gptq_torch_aten", marks=NO_BACKWARD),
    ],
    ids=str,
)
def test_evaluation_before_training(quantized_folder, dtype, backend):
    """Of stock LoRA too, the gradients are cut where this fails, and nothing says so."""
    model = elastic(load(quantized_folder(), dtype, backend))
    outputs(model, tokens())
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_saving(quantized_folder, tmp_path):
    """The adapter with its subnet, and the subnet as plain LoRA, load on a fresh base and compute the same."""
    folder = quantized_folder()
    model = elastic(load(folder))
    model.set_subnet("min")
    expected = outputs(model, tokens())
    model.save_pretrained(tmp_path / "elastic")
    model.export_lora(tmp_path / "lora")
    loaded = PeftModel.from_pretrained(load(folder), tmp_path / "elastic").eval()
    assert loaded.active_subnet == model.active_subnet
    assert torch.equal(outputs(loaded, tokens()), expected)
    stock = PeftModel.from_pretrained(load(folder), tmp_path / "lora").eval()
    assert type(stock.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(outputs(stock, tokens()), expected, rtol=1e-5, atol=1e-5)


def test_as_stock_lora(quantized_folder):
    folder = quantized_folder()
    model, stock = elastic(load(folder)), get_peft_model(load(folder), LoraConfig(**LORA)).eval()
    set_peft_model_state_dict(stock, get_peft_model_state_dict(model))
    assert torch.equal(outputs(model, tokens()), outputs(stock, tokens()))


def test_merging_is_refused(quantized_folder):
    """The model is left as it was."""
    model = elastic(load(quantized_folder()))
    before = outputs(model, tokens())
    for sparse_kernel in ("auto", False):
        with pytest.raises(ValueError, match="is quantised and adapter .*merge_and_requantize"):
            model.merge_and_unload(sparse_kernel=sparse_kernel)
    assert torch.equal(outputs(model, tokens()), before)


def test_qalora_is_refused():
    with warnings.catch_warnings(), pytest.raises(ValueError, match="qalora"):
        warnings.simplefilter("ignore")
        ElasticLoraConfig(**LORA, use_qalora=True, qalora_group_size=32)
