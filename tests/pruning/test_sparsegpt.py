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
"""SparseGPT against its definition: for each input in turn, the inverse Hessian of the inputs that are left, by torch.linalg.inv."""

import copy
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.calibration import Experts, inputs_by_full_passes, linears
from support.models import tiny_gpt2, tiny_llama, tiny_t5, tokens
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.pytorch_utils import Conv1D

import peft_elastic
from peft_elastic import MagnitudeConfig, SparseGPTConfig, WandaConfig, prune
from peft_elastic.pruning.sparsegpt import sparsegpt
from peft_elastic.structure.hessian import inverse_factor
from peft_elastic.structure.modules import weight_matrix


def reference(weight, hessian, damping, sparsity, n_of_m, block_size):
    """Algorithm 1 without its factorisation and its lazy updates."""
    weight, mask = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    there = weight != 0
    rows, inputs = weight.shape
    hessian = hessian + damping * hessian.diagonal().mean() * torch.eye(inputs, dtype=hessian.dtype)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(inputs)]
    for j in range(inputs):
        if n_of_m is None and j % block_size == 0:
            end = min(j + block_size, inputs)
            score = torch.stack([weight[:, c] ** 2 / inverses[c][0, 0] for c in range(j, end)], 1)
            score[~there[:, j:end]] = -1
            lowest = score.flatten().argsort(stable=True)[: int(sparsity * score.numel() + 1e-6)]
            mask[:, j:end] = torch.zeros(score.numel(), dtype=torch.bool).index_fill(0, lowest, True).view_as(score)
        elif n_of_m is not None and j % n_of_m[1] == 0:
            n, m = n_of_m
            for row in range(rows):
                score = torch.stack([weight[row, c] ** 2 / inverses[c][0, 0] for c in range(j, j + m)])
                score[~there[row, j : j + m]] = -1
                mask[row, j + score.argsort(stable=True)[: m - n]] = True
        mask[:, j] |= ~there[:, j]
        weight[:, j:] -= ((weight[:, j] * mask[:, j]) / inverses[j][0, 0])[:, None] * inverses[j][0]
    return weight.masked_fill(mask, 0), mask


def problem(rows, inputs, seed=0, share_of_zeros=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(3 * inputs, inputs, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(rows, inputs, generator=generator, dtype=torch.float64)
    return weight.masked_fill(torch.rand(weight.shape, generator=generator) < share_of_zeros, 0), x


def pruned_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and "head" not in n}


def zeros(model):
    return {name: weight_matrix(layer) == 0 for name, layer in pruned_layers(model).items()}


def lively(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


# -- one matrix --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6), st.integers(2, 25), st.sampled_from([1, 4, 7, 128]), st.floats(0, 1, exclude_max=True),
    st.sampled_from([0.0, 0.4]), st.sampled_from([0.01, 0.5]), st.integers(0, 2**16),
)  # fmt: skip
def test_a_matrix_equals_the_definition(rows, inputs, block_size, sparsity, share, damping, seed):
    weight, x = problem(rows, inputs, seed, share)
    before = weight.clone()
    expected, mask = reference(weight, x.T @ x, damping, sparsity, None, block_size)
    found = sparsegpt(weight, inverse_factor(x.T @ x, damping, "w"), sparsity, None, block_size)
    assert torch.equal(weight, before)
    assert torch.equal(found == 0, mask | (expected == 0))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    # of each block the share, rounded down, or the zeros that were there
    for begin in range(0, inputs, block_size):
        part = slice(begin, begin + block_size)
        there = int((weight[:, part] == 0).sum())
        assert (found[:, part] == 0).sum() == max(there, int(sparsity * weight[:, part].numel() + 1e-6))


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (3, 5)])
@pytest.mark.parametrize("block_size", [1, 8, 128])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_patterns_equal_the_definition(pattern, block_size, share):
    weight, x = problem(5, 8 * pattern[1], seed=3, share_of_zeros=share)
    expected, mask = reference(weight, x.T @ x, 0.01, None, pattern, 0)
    found = sparsegpt(weight, inverse_factor(x.T @ x, 0.01, "w"), None, pattern, block_size)
    assert torch.equal(found == 0, mask)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    left = (found != 0).unflatten(1, (-1, pattern[1])).sum(-1)
    assert (left == pattern[0]).all() if share == 0 else (left <= pattern[0]).all()


def test_the_errors_are_made_up_for():
    """On correlated inputs the outputs change less than when the same share goes by magnitude or by Wanda's score."""
    weight, x = problem(16, 64, seed=1)
    generator = torch.Generator().manual_seed(2)
    x = x[:, :8] @ torch.randn(8, 64, generator=generator, dtype=torch.float64) + 0.1 * x
    factor = inverse_factor(x.T @ x, 0.01, "w")
    for pattern in (None, (2, 4)):
        found = sparsegpt(weight, factor, 0.5, pattern)
        masked = weight.masked_fill(found == 0, 0)
        magnitude = peft_elastic.pruning.masks.pruning_mask(weight, weight.abs(), 0.5, pattern)
        wanda = peft_elastic.pruning.masks.pruning_mask(weight, weight.abs() * x.norm(dim=0), 0.5, pattern)
        error = {
            name: float(((weight - other) @ x.T).norm())
            for name, other in {
                "found": found,
                "without updates": masked,
                "magnitude": weight.masked_fill(magnitude, 0),
                "wanda": weight.masked_fill(wanda, 0),
            }.items()
        }
        assert error["found"] < 0.6 * min(value for name, value in error.items() if name != "found")


def test_again_it_changes_nothing():
    weight, x = problem(6, 30, seed=4, share_of_zeros=0.2)
    factor = inverse_factor(x.T @ x, 0.01, "w")
    for pattern in (None, (2, 5)):
        once = sparsegpt(weight, factor, 0.6, pattern, 10)
        assert torch.equal(sparsegpt(once, factor, 0.6, pattern, 10), once)


def test_inputs_that_are_always_zero_go_first():
    weight, x = problem(4, 16, seed=5)
    x[:, 5:9] = 0
    found = sparsegpt(weight.sign(), inverse_factor(x.T @ x, 0.01, "w"), 0.25, None)
    assert (found[:, 5:9] == 0).all() and (found == 0).sum() == 16


# -- models ------------------------------------------------------------------------------------------------------------


def naive(model, batches, stacks, **options):
    """For each block in turn one full forward pass for each batch, and the definition for each of its layers."""
    for pattern in stacks:
        for block in [name for name, _ in model.named_modules() if re.fullmatch(pattern, name)]:
            inputs = inputs_by_full_passes(model, block, batches)
            for name, layer in linears(model.get_submodule(block)).items():
                weight = weight_matrix(layer)
                with torch.no_grad():
                    weight.copy_(reference(weight, inputs[name].T @ inputs[name], 0.01, **options)[0])


MODELS = {
    "llama": (tiny_llama, [r"model\.layers\.\d+"]),
    "gpt2": (tiny_gpt2, [r"transformer\.h\.\d+"]),
    "t5": (tiny_t5, [r"encoder\.block\.\d+", r"decoder\.block\.\d+"]),
}


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_equals_full_forward_passes(name, pattern):
    make, stacks = MODELS[name]
    model = lively(make().double())
    batches = [{"input_ids": tokens(batch=2, length=40, seed=seed)} for seed in (1, 2)]
    if name == "t5":
        batches = [{**batch, "decoder_input_ids": batch["input_ids"].flip(1)} for batch in batches]
    expected, before = copy.deepcopy(model), copy.deepcopy(model)
    n_of_m = None if pattern is None else (2, 4)
    naive(expected, batches, stacks, sparsity=0.5, n_of_m=n_of_m, block_size=16)
    share = {"sparsity": 0.5} if pattern is None else {"pattern": pattern}
    report = prune(model, SparseGPTConfig(**share, block_size=16), iter(batches), progress=False)
    assert report.method == "sparsegpt" and report.sparsity == 0.5 and report.calibration_tokens == 2 * 2 * 40
    pruned = {row["name"] for row in report.layers}
    for layer, mask in zeros(expected).items():
        assert torch.equal(zeros(model)[layer], mask), layer
    for (key, value), other, old in zip(model.named_parameters(), expected.parameters(), before.parameters()):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7)
        assert key.removesuffix(".weight") in pruned or torch.equal(value, old)


@pytest.mark.parametrize("moment", [1, 2, 3])
def test_interrupted_and_called_again(moment):
    model = lively(tiny_llama(num_hidden_layers=3).double())
    batches = [tokens(batch=2, length=30)]
    unbroken, before = copy.deepcopy(model), copy.deepcopy(model)
    config = SparseGPTConfig(sparsity=0.5, block_size=16)
    prune(unbroken, config, batches, progress=False)
    calls = []

    def fail(module, args):
        calls.append(0)
        if len(calls) == moment:  # in the trial, when its inputs are measured, when its outputs go on
            raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        prune(model, config, batches, progress=False)
    handle.remove()
    for number, block in enumerate(model.model.layers):
        done = all(torch.equal(p, q) for p, q in zip(block.parameters(), unbroken.model.layers[number].parameters()))
        untouched = all(
            torch.equal(p, q) for p, q in zip(block.parameters(), before.model.layers[number].parameters())
        )
        assert done or untouched
    prune(model, config, batches, progress=False)
    assert all(torch.equal(mask, zeros(unbroken)[name]) for name, mask in zeros(model).items())
    for found, expected in zip(model.parameters(), unbroken.parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_precision(dtype):
    model = lively(tiny_llama()).to(dtype)
    dense = copy.deepcopy(model)
    report = prune(model, SparseGPTConfig(sparsity=0.5), [tokens(batch=4, length=40)], progress=False)
    assert report.sparsity == pytest.approx(0.5, abs=0.001) and report.sparsity >= 0.5
    for name, layer in pruned_layers(model).items():
        assert layer.weight.dtype == dtype and torch.isfinite(layer.weight).all()
        assert not torch.equal(layer.weight[layer.weight != 0], pruned_layers(dense)[name].weight[layer.weight != 0])


def test_zeros_stay_and_sparsity_zero_changes_nothing():
    model = lively(tiny_llama().double())
    prune(model, MagnitudeConfig(sparsity=0.3, scope="row"), progress=False)
    already, before = zeros(model), copy.deepcopy(model.state_dict())
    prune(model, SparseGPTConfig(sparsity=0.0), [tokens()], progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    prune(model, SparseGPTConfig(sparsity=0.5), [tokens(length=40)], progress=False)
    for name, mask in zeros(model).items():
        assert mask[already[name]].all() and mask.double().mean() == 0.5


def test_an_adapter_stays():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    report = prune(model, SparseGPTConfig(pattern="2:4"), [tokens(length=30)], progress=False)
    assert report.sparsity == 0.5 and before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_padding_does_not_count():
    model = lively(tiny_llama().double())
    sequences = [tokens(batch=1, length=length) for length in (13, 17, 30)]
    ids, mask = torch.full((3, 30), 7), torch.zeros(3, 30, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, : sequence.shape[1]], mask[row, : sequence.shape[1]] = sequence[0], 1
    alone, config = copy.deepcopy(model), SparseGPTConfig(sparsity=0.5)
    prune(alone, config, sequences, progress=False)
    report = prune(model, config, {"input_ids": ids, "attention_mask": mask}, progress=False)
    assert report.calibration_tokens == 60
    assert all(torch.equal(found, zeros(alone)[name]) for name, found in zeros(model).items())


def test_max_samples():
    one, other = (lively(tiny_llama().double()) for _ in range(2))
    report = prune(one, SparseGPTConfig(sparsity=0.5, max_samples=2), [tokens(batch=5)], progress=False)
    prune(other, SparseGPTConfig(sparsity=0.5), [tokens(batch=5)[:2]], progress=False)
    assert report.config["max_samples"] == 2
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_routers_are_left_alone():
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "head_dim": 8,
    }
    config = Qwen3MoeConfig(
        vocab_size=96, num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, **shape
    )
    model = Qwen3MoeForCausalLM(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = prune(model, SparseGPTConfig(sparsity=0.5), [tokens(batch=4, length=40)], progress=False)
    assert not any(".gate" in row["name"] and "gate_proj" not in row["name"] for row in report.layers)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            assert (parameter != 0).all()


def test_a_layer_without_tokens_is_pruned_by_magnitude():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(96, 16)
            self.blocks = nn.ModuleList([Experts(), Experts()])

        def forward(self, input_ids):
            hidden = self.embed(input_ids)
            for block in self.blocks:
                hidden = block(hidden)
            return hidden

    model = Model()
    before = model.blocks[0].experts[2].weight.detach().clone()
    with pytest.warns(UserWarning, match=r"No calibration token reaches blocks\.\d\.experts\.2: pruned by magnitude"):
        prune(model, SparseGPTConfig(sparsity=0.5), [tokens(length=40)], progress=False)
    after = model.blocks[0].experts[2].weight
    lowest = before.abs().flatten().argsort(stable=True)[:128]
    expected = before.flatten().index_fill(0, lowest, 0).view_as(before)
    torch.testing.assert_close(after, expected, rtol=0, atol=0)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "sparsity"),
        ({"sparsity": 0.5, "block_size": 0}, "`block_size` must be a whole number >= 1, got 0."),
        ({"sparsity": 0.5, "block_size": True}, "`block_size` must be a whole number >= 1, got True."),
        ({"sparsity": 0.5, "block_size": 12.5}, "`block_size` must be a whole number >= 1, got 12.5."),
        ({"sparsity": 0.5, "damping": 0}, "`damping` must be a number above 0 and at most 1, got 0."),
        ({"sparsity": 0.5, "damping": float("nan")}, "`damping` must be a number above 0 and at most 1, got nan."),
        ({"sparsity": 0.5, "damping": True}, "`damping` must be a number above 0 and at most 1, got True."),
        ({"sparsity": 0.5, "max_samples": 0}, "`max_samples` must be a whole number >= 1, or None, got 0."),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SparseGPTConfig(**options)


def test_bad_data_changes_nothing():
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    for data, message in (
        (None, "calibration"),
        ([], "calibration"),
        ([torch.empty(0, 4, dtype=torch.long)], "calibration"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(model, SparseGPTConfig(sparsity=0.5), data, progress=False)
    with pytest.raises(ValueError, match="not divisible by 5"):
        prune(model, SparseGPTConfig(pattern="3:5"), [tokens()], progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_wrong_config_names_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"`config` must be an instance of one of MagnitudeConfig, SparseGPTConfig, WandaConfig, got 3",
    ):
        prune(tiny_llama(), 3)


def test_registered():
    methods = peft_elastic.pruning.PRUNING_METHODS
    assert set(methods) == {"magnitude", "sparsegpt", "wanda"}
    assert {name for name, method in methods.items() if method.calibrated} == {"sparsegpt", "wanda"}
    for config in (MagnitudeConfig(sparsity=0.5), WandaConfig(sparsity=0.5), SparseGPTConfig(sparsity=0.5)):
        assert methods.of(config).config is type(config) and methods[config.method] is methods.of(config)
