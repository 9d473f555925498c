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

import copy
import dataclasses
import gc
import json
import logging
import math
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.calibration import Experts, inputs_by_full_passes, linears
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from peft_elastic.pruning import MagnitudeConfig, PruningConfig, WandaConfig, measure_sparsity, prune
from peft_elastic.pruning.masks import lowest_mask, pruning_mask
from peft_elastic.structure.calibration import calibration_batches, calibration_mode
from peft_elastic.structure.modules import find_stacks, linear_layers, weight_matrix
from peft_elastic.structure.sequential import BlockWalker


VOCAB = 60


def llama(layers=3, **kwargs):
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=layers, **shape, **kwargs))


def qwen2():
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1,
    )  # fmt: skip
    assert len(set(config.layer_types)) == 2
    return Qwen2ForCausalLM(config)


def gemma3():
    config = Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=32))


def opt():
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB, hidden_size=32, ffn_dim=40, num_hidden_layers=3, num_attention_heads=4,
            max_position_embeddings=32, word_embed_proj_dim=16,
        )
    )  # fmt: skip


def bert():
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=32, **shape))


def t5():
    shape = {"d_model": 32, "d_ff": 40, "d_kv": 8, "num_layers": 3, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, decoder_start_token_id=0, pad_token_id=0, **shape))


def bart():
    config = BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=48, max_position_embeddings=32,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def vit():
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **shape))


def albert():
    config = AlbertConfig(
        vocab_size=VOCAB, embedding_size=16, hidden_size=32, intermediate_size=40, num_hidden_layers=4,
        num_hidden_groups=2, num_attention_heads=4, max_position_embeddings=32,
    )  # fmt: skip
    return AlbertModel(config)


class Skips(nn.Module):
    """Blocks that receive more than the output of the block before: the first input, and a sum made between the blocks."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 20), nn.GELU(), nn.Linear(20, 16), nn.LayerNorm(16)) for _ in range(3)
        )

    def forward(self, input_ids):
        first = hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden + 0.5 * first) + hidden
        return hidden


class Branches(Skips):
    """The way between the blocks depends on the values in them: with anything else in their place the pass fails."""

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
            if not torch.isfinite(hidden).all():
                raise FloatingPointError
        return hidden


class InPlace(Skips):
    """Blocks that change their input."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 20), nn.Linear(20, 16)

        def forward(self, hidden):
            return hidden.add_(self.down(torch.tanh(self.up(hidden))))

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


def tokens(count=3, size=2, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (size, length + i), generator=generator) for i in range(count)]


def text():
    return [{"input_ids": ids} for ids in tokens()]


def pairs():
    return [{"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :7]} for ids in tokens()]


def images():
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)} for _ in range(3)]


# model, batches, what the names of its blocks look like (in the order of use), whether the stacks can be walked in sequence
ARCHITECTURES = {
    "llama": (llama, text, [r"model\.layers\.\d+"], True),
    "qwen2": (qwen2, text, [r"model\.layers\.\d+"], True),
    "gemma3": (gemma3, text, [r"model\.layers\.\d+"], True),
    "gpt2": (gpt2, text, [r"transformer\.h\.\d+"], True),
    "opt": (opt, text, [r"model\.decoder\.layers\.\d+"], True),
    "bert": (bert, text, [r"bert\.encoder\.layer\.\d+"], True),
    "t5": (t5, pairs, [r"encoder\.block\.\d+", r"decoder\.block\.\d+"], True),
    "bart": (bart, pairs, [r"model\.encoder\.layers\.\d+", r"model\.decoder\.layers\.\d+"], True),
    "vit": (vit, images, [r"vit\.layers\.\d+"], True),
    "albert": (albert, text, [r"encoder\.albert_layer_groups\.\d+"], False),
    "skips": (Skips, text, [r"blocks\.\d+"], False),
    "branches": (Branches, text, [r"blocks\.\d+"], False),
    "in-place": (InPlace, text, [r"blocks\.\d+"], False),
}


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    make, batches, blocks, sequential = ARCHITECTURES[name]
    # The usual initial weights are so small that the residual stream hardly changes: later blocks would not notice pruning.
    model = make().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model, batches(), blocks, sequential


def matrix(layer):
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def naive_wanda(model, batches, block_patterns, prune_row, real=None):
    """The definition: for each block in turn, one full forward pass per batch, the norms, then `prune_row` on each row."""
    names = [name for pattern in block_patterns for name, _ in model.named_modules() if re.fullmatch(pattern, name)]
    training = model.training
    model.eval()
    for block in names:
        inputs = inputs_by_full_passes(model, block, batches)
        for name, layer in linears(model.get_submodule(block)).items():
            norm = inputs[name].double().square().sum(0).sqrt()
            weight = matrix(layer).detach()
            for row in weight:
                row[prune_row(row.double().abs() * norm)] = 0
    model.train(training)


def lowest_half(score):
    return score.argsort(stable=True)[: len(score) // 2]


def two_of_four(score):
    return torch.cat([score[i : i + 4].argsort(stable=True)[:2] + i for i in range(0, len(score), 4)])


def zeros(model, pattern=".*"):
    return {name: matrix(layer) == 0 for name, layer in linears(model).items() if re.fullmatch(pattern, name)}


def assert_clean(model):
    """No hook, replaced forward or changed flag is left."""
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in module.__dict__


# --- masks -------------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 23), st.floats(0, 1, exclude_max=True), st.integers(1, 4), st.sampled_from(["row", "layer"]),
    st.integers(0, 2**16),
)  # fmt: skip
def test_unstructured_mask_takes_exactly_the_lowest(rows, columns, sparsity, levels, scope, seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, levels, (rows, columns), generator=generator).float()  # many ties
    weight = torch.randint(0, 3, (rows, columns), generator=generator).float()  # some zeros
    mask = pruning_mask(weight, score, sparsity, None, scope)
    groups = [(0, slice(None))] if scope == "layer" else [(row, row) for row in range(rows)]
    for _, group in groups:
        m, w, s = mask[group].flatten(), weight[group].flatten(), score[group].flatten()
        assert m.sum() == int(sparsity * m.numel() + 1e-6)
        key = torch.where(w == 0, -1.0, s)
        assert not m.any() or m.all() or key[m].max() <= key[~m].min()
        # zeros first
        assert m[w == 0].all() or not m[w != 0].any()
        # among equals the first
        if m.any() and not m.all():
            tied = m[key == key[m].max()]
            assert (tied.int().diff() <= 0).all()
    assert torch.equal(mask, pruning_mask(weight, score, sparsity, None, scope))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(2, 16), st.data())
def test_n_of_m_mask_on_every_group(rows, groups, m, data):
    n = data.draw(st.integers(1, m - 1))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    score = torch.randint(0, 5, (rows, groups * m), generator=generator).double()
    mask = pruning_mask(torch.ones_like(score), score, None, (n, m))
    for row in range(rows):
        for group in range(groups):
            part = slice(group * m, (group + 1) * m)
            assert mask[row, part].sum() == m - n
            assert score[row, part][mask[row, part]].max() <= score[row, part][~mask[row, part]].min()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lowest_mask_equals_a_stable_sort(dtype):
    score = torch.rand(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    score[:, 5:20] = score[:, 4:5]
    for count in range(34):
        expected = torch.zeros_like(score, dtype=torch.bool).scatter_(
            1, score.argsort(dim=1, stable=True)[:, :count], True
        )
        assert torch.equal(lowest_mask(score, count), expected)


def test_fraction_is_not_lost_to_float_rounding():
    weight = torch.rand(2, 100)
    for percent in range(100):
        assert pruning_mask(weight, weight, percent / 100, None).sum(1).tolist() == [percent, percent]


# --- Wanda against its definition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wanda_equals_full_forward_passes(architecture, caplog):
    model, batches, blocks, sequential = build(architecture)
    expected = copy.deepcopy(model)
    naive_wanda(expected, batches, blocks, lowest_half)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    training = [module.training for module in model.modules()]
    with caplog.at_level(logging.WARNING, "peft_elastic"):
        report = prune(model, WandaConfig(sparsity=0.5), iter(batches), progress=False)
    assert ("full forward passes" not in caplog.text) == sequential

    in_blocks = {n for n in zeros(model) if any(re.match(pattern + r"\.", n) for pattern in blocks)}
    assert [row["name"] for row in report.layers] == [n for n in zeros(model) if n in in_blocks]
    for name, mask in zeros(model).items():
        assert torch.equal(mask, zeros(expected)[name]), name
        if name in in_blocks:
            assert (mask.sum(1) == mask.shape[1] // 2).all()
    # what is not pruned keeps its bits, and the shared embedding is not touched
    for name, parameter in model.named_parameters():
        kept = (
            parameter != 0
            if name.removesuffix(".weight") in in_blocks
            else torch.ones_like(parameter, dtype=torch.bool)
        )
        assert torch.equal(parameter[kept], before[name][kept]), name
    assert [module.training for module in model.modules()] == training
    assert_clean(model)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
def test_two_of_four_equals_full_forward_passes(architecture):
    model, batches, blocks, _ = build(architecture)
    expected = copy.deepcopy(model)
    naive_wanda(expected, batches, blocks, two_of_four)
    report = prune(model, WandaConfig(pattern="2:4"), batches, progress=False)
    for name, mask in zeros(model).items():
        assert torch.equal(mask, zeros(expected)[name]), name
    for row in report.layers:
        assert (zeros(model)[row["name"]].unflatten(1, (-1, 4)).sum(-1) == 2).all()
        assert row["sparsity_after"] == 0.5


def test_pruned_blocks_feed_later_ones():
    """The order matters: norms of the dense model give other masks from the second block on."""
    model, batches, _, _ = build("llama")
    dense = copy.deepcopy(model)
    prune(model, WandaConfig(sparsity=0.5), batches, progress=False)
    differs = []
    for block in range(3):
        one = copy.deepcopy(dense)
        prune(one, WandaConfig(sparsity=0.5, target_modules=rf".*layers\.{block}\..*"), batches, progress=False)
        masks, together = zeros(one, rf".*layers\.{block}\..*"), zeros(model)
        differs.append(any(not torch.equal(mask, together[name]) for name, mask in masks.items()))
    assert differs == [False, True, True]


def test_partial_targets_are_propagated():
    model, batches, _, _ = build("llama")
    expected = copy.deepcopy(model)
    prune(model, WandaConfig(sparsity=0.5, target_modules=["down_proj"]), batches, progress=False)
    for block in range(3):  # one at a time: each sees the pruned ones before it
        config = WandaConfig(sparsity=0.5, target_modules=[f"layers.{block}.mlp.down_proj"])
        prune(expected, config, batches, progress=False)
    for name, mask in zeros(model).items():
        assert torch.equal(mask, zeros(expected)[name])
        assert mask.any() == name.endswith("down_proj")


def test_masks_change_from_batch_to_batch():
    """A first batch without padding needs no masks at all; those of later batches, one per layer type, must not be lost."""
    model, _, blocks, _ = build("gemma3")
    short, long = tokens(1, 2, 3)[0], tokens(1, 2, 14, seed=2)[0]
    batches = [{"input_ids": short}, {"input_ids": long, "attention_mask": torch.ones_like(long)}]
    expected = copy.deepcopy(model)
    naive_wanda(expected, batches, blocks, lowest_half)
    prune(model, WandaConfig(sparsity=0.5), batches, progress=False)
    for name, mask in zeros(model).items():
        assert torch.equal(mask, zeros(expected)[name]), name


def test_a_layer_outside_the_blocks():
    """Layers around the stack are pruned in the order of use: before the blocks what comes before them."""
    model, batches, blocks, _ = build("opt")
    model.lm_head = nn.Linear(16, VOCAB, bias=False, dtype=torch.float64)  # not tied
    expected = copy.deepcopy(model)
    outer = [r"model\.decoder\.project_in", *blocks, r"model\.decoder\.project_out|lm_head"]
    for pattern in outer:
        naive = [name for name, _ in expected.named_modules() if re.fullmatch(pattern, name)]
        if pattern in blocks:
            naive_wanda(expected, batches, [pattern], lowest_half)
            continue
        norms = {name: [] for name in naive}
        hooks = [
            expected.get_submodule(name).register_forward_hook(
                lambda m, args, out, kept=norms[name]: kept.append(args[0].flatten(0, -2))
            )
            for name in naive
        ]
        expected.eval()
        with torch.no_grad():
            for batch in batches:
                expected(**batch)
            for name in naive:
                norm = torch.cat(norms[name]).norm(dim=0)
                for row in expected.get_submodule(name).weight:
                    row[lowest_half(row.abs() * norm)] = 0
        for hook in hooks:
            hook.remove()
    prune(model, WandaConfig(sparsity=0.5, target_modules=".*"), batches, progress=False)
    for name, mask in zeros(model).items():
        assert torch.equal(mask, zeros(expected)[name]), name
        assert mask.any()


def test_no_block_list_is_one_block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
    inputs = torch.randn(30, 12)
    with torch.no_grad():
        hidden = model[:2](inputs)
    expected = [
        lowest_mask(layer.weight.abs().double() * x.double().norm(dim=0), layer.in_features // 2)
        for layer, x in ((model[0], inputs), (model[2], hidden))
    ]
    report = prune(model, WandaConfig(sparsity=0.5), [{"input": inputs}], progress=False)
    assert [row["name"] for row in report.layers] == ["0", "2"] and report.calibration_tokens == 30
    assert torch.equal(model[0].weight == 0, expected[0]) and torch.equal(model[2].weight == 0, expected[1])


def test_conv1d_groups_along_the_inputs():
    """GPT-2 stores (in, out): rows and groups must follow the inputs all the same."""
    model, batches, _, _ = build("gpt2")
    prune(model, WandaConfig(pattern="1:4"), batches, progress=False)
    stored = model.transformer.h[0].mlp.c_fc.weight  # (32, 128)
    assert stored.shape == (32, 128)
    assert ((stored == 0).view(8, 4, 128).sum(1) == 3).all()
    assert not ((stored == 0).view(32, 32, 4).sum(2) == 3).all()


# --- padding -----------------------------------------------------------------------------------------------------------


def padded(sequences, side):
    """One batch of sequences of different lengths, with random tokens in place of the padding."""
    length = max(map(len, sequences))
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, VOCAB, (len(sequences), length), generator=generator)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        part = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
        ids[row, part], mask[row, part] = sequence, 1
    return ids, mask


@pytest.mark.parametrize(
    "architecture, side",
    [("llama", "right"), ("llama", "left"), ("bert", "right"), ("gemma3", "left"), ("albert", "right")],
)
def test_padding_does_not_count(architecture, side):
    model, _, _, _ = build(architecture)
    if side == "left" and architecture == "gemma3":
        side = "right"  # its window counts positions
    sequences = [ids[0, : 5 + 3 * i] for i, ids in enumerate(tokens(4, 1, 16))]
    ids, mask = padded(sequences, side)
    alone, without = copy.deepcopy(model), copy.deepcopy(model)
    prune(alone, WandaConfig(sparsity=0.5), [s[None] for s in sequences], progress=False)
    batch = {"input_ids": ids, "attention_mask": mask}
    if side == "left":
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    report = prune(model, WandaConfig(sparsity=0.5), [batch], progress=False)
    assert report.calibration_tokens == sum(map(len, sequences))
    for name, mask in zeros(model).items():
        assert torch.equal(mask, zeros(alone)[name]), name
    prune(without, WandaConfig(sparsity=0.5), [ids], progress=False)  # the mask does make a difference
    assert any(not torch.equal(mask, zeros(alone)[name]) for name, mask in zeros(without).items())


@pytest.mark.parametrize("architecture", ["t5", "bart"])
@pytest.mark.parametrize("decoder_mask", ["decoder_attention_mask", "labels"])
def test_padding_of_encoder_and_decoder(architecture, decoder_mask):
    """Both sides have the same padded length, so only the origin of an input tells which mask it needs."""
    model, _, _, _ = build(architecture)
    sources = [ids[0, : 5 + 3 * i] for i, ids in enumerate(tokens(4, 1, 16))]
    targets = [ids[0, : 14 - 3 * i] for i, ids in enumerate(tokens(4, 1, 16, seed=7))]
    alone = copy.deepcopy(model)
    separate = [{"input_ids": s[None], "decoder_input_ids": t[None]} for s, t in zip(sources, targets)]
    prune(alone, WandaConfig(sparsity=0.5), separate, progress=False)
    ids, mask = padded(sources, "right")
    decoder_ids, own_mask = padded(targets, "right")
    assert ids.shape == decoder_ids.shape
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder_ids}
    if decoder_mask == "labels":
        batch["labels"] = decoder_ids.masked_fill(own_mask == 0, -100)
    else:
        batch[decoder_mask] = own_mask
    report = prune(model, WandaConfig(sparsity=0.5), [batch], progress=False)
    assert report.calibration_tokens == sum(map(len, sources))
    for name, zero in zeros(model).items():
        assert torch.equal(zero, zeros(alone)[name]), name


def test_mask_that_does_not_fit_is_reported():
    class Doubles(Skips):
        def forward(self, input_ids, attention_mask):
            return super().forward(torch.cat([input_ids, input_ids], 1))

    ids = tokens(1)[0]
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    with pytest.warns(UserWarning, match=r"do not line up with the attention mask"):
        prune(Doubles(), WandaConfig(sparsity=0.5), [{"input_ids": ids, "attention_mask": mask}], progress=False)


# --- magnitude ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "row"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_magnitude_equals_a_plain_sort(architecture, scope):
    model, _, _, _ = build(architecture, torch.float32)
    dense = copy.deepcopy(model)
    report = prune(model, MagnitudeConfig(sparsity=0.3, scope=scope), progress=False)
    assert report.method == "magnitude" and report.calibration_tokens == 0 and report.layers
    for row in report.layers:
        weight = matrix(linears(dense)[row["name"]]).detach().double().contiguous()
        groups = weight if scope == "row" else weight.reshape(1, -1)
        count = math.floor(0.3 * groups.shape[1] + 1e-6)
        for group in groups:
            group[group.abs().argsort(stable=True)[:count]] = 0
        assert torch.equal(zeros(model)[row["name"]], weight == 0)
        assert row["sparsity_after"] == pytest.approx(count * len(groups) / weight.numel())


@pytest.mark.parametrize("pattern, left", [("2:4", 2), ("4:8", 4), ("1:4", 1), ("3:5", 3)])
def test_magnitude_patterns(pattern, left):
    m = int(pattern[2:])
    model = nn.Sequential(nn.Linear(2 * m, 3), nn.Linear(4 * m, 7))
    prune(model, MagnitudeConfig(pattern=pattern), progress=False)
    for layer in model:
        assert ((layer.weight != 0).unflatten(1, (-1, m)).sum(-1) == left).all()


def test_existing_zeros_count_as_pruned():
    model, batches, _, _ = build("llama")
    with torch.no_grad():
        for name, layer in linears(model).items():
            if "layers" in name:
                layer.weight[:, ::4] = 0.0
                layer.weight[:, 1] = -0.0
    already = zeros(model)
    prune(model, WandaConfig(sparsity=0.5), batches, progress=False)
    for name, mask in zeros(model, ".*layers.*").items():
        assert mask[already[name]].all() and (mask.sum(1) == mask.shape[1] // 2).all()
    once = zeros(model)
    prune(model, WandaConfig(sparsity=0.25), batches, progress=False)  # less than there is: nothing to do
    assert all(torch.equal(mask, once[name]) for name, mask in zeros(model).items())


def test_sparsity_zero_changes_nothing():
    model, batches, _, _ = build("llama")
    before = copy.deepcopy(model.state_dict())
    for config in (WandaConfig(sparsity=0.0), MagnitudeConfig(sparsity=0)):
        assert prune(model, config, batches, progress=False).sparsity == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, batches, _, _ = build("llama", dtype)
    report = prune(model, WandaConfig(sparsity=0.5), batches, progress=False)
    assert report.sparsity == 0.5
    for row in report.layers:  # equal weights are common here, the count is exact all the same
        mask = zeros(model)[row["name"]]
        assert (mask.sum(1) == mask.shape[1] // 2).all()


# --- the walk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "vit", "t5"])
def test_one_block_of_activations_in_memory(architecture):
    """The number of hidden states alive does not grow with the depth: one per batch between the blocks."""
    model, batches, _, _ = build(architecture)
    size = (2, 5, 32) if architecture == "vit" else (2, 9, 32)
    batches = [{key: value[:, :9] if value.dim() == 2 else value for key, value in batch.items()} for batch in batches]
    if architecture == "t5":
        batches = [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
    alive = []
    with calibration_mode(model):
        for unit in BlockWalker(model, batches, linear_layers(model) if not find_stacks(model) else in_blocks(model)):
            unit.feed(0)
            storages = {
                tensor.untyped_storage().data_ptr()
                for tensor in gc.get_objects()
                # by type(): `isinstance` would ask dead weak proxies, which other tests may have left, for their class
                if issubclass(type(tensor), torch.Tensor)
                and not issubclass(type(tensor), UninitializedTensorMixin)
                and tensor.shape == size
                and tensor.stride(-1) == 1
            }
            alive.append(len(storages))
    encoder = len(alive) // 2 if architecture == "t5" else 0
    assert max(alive[: encoder or None]) <= len(batches)
    assert max(alive[encoder:]) <= (2 if encoder else 1) * len(batches)  # and the encoder's states, for a decoder


def in_blocks(model):
    return {
        f"{name}.{inner}": layer
        for stack in find_stacks(model)
        for name, block in stack.items()
        for inner, layer in linears(block).items()
    }


def test_each_block_is_computed_twice_per_batch():
    """Once to observe and once to go on, besides the trial on the first batch: not once per block that follows."""
    model, batches, _, _ = build("llama")
    calls = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda *_: calls.append(0))
    prune(model, WandaConfig(sparsity=0.5), batches, progress=False)
    blocks, count = len(model.model.layers), len(batches)
    assert len(calls) == blocks + 2 * blocks * count - count  # the last block's outputs are not needed


def test_hooks_of_others_run_as_in_the_model(caplog):
    model, batches, blocks, _ = build("llama")

    def scale(module, args, kwargs):
        return (args[0] * 1.5, *args[1:]), kwargs

    model.model.layers[1].register_forward_pre_hook(scale, with_kwargs=True)
    expected = copy.deepcopy(model)
    naive_wanda(expected, batches, blocks, lowest_half)
    prune(model, WandaConfig(sparsity=0.5), batches, progress=False)
    assert "full forward passes" not in caplog.text
    for name, mask in zeros(model).items():
        assert torch.equal(mask, zeros(expected)[name])
    assert len(model.model.layers[1]._forward_pre_hooks) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("moment", [0, 2, 5, 6])
def test_everything_is_restored_after_an_exception(error, moment):
    model, batches, _, _ = build("llama")
    model.train()
    model.model.norm.eval()
    model.model.embed_tokens.requires_grad_(False)
    unbroken = copy.deepcopy(model)
    prune(unbroken, WandaConfig(sparsity=0.5), batches, progress=False)
    training = [module.training for module in model.modules()]
    calls = iter(range(moment + 1))

    def fail(module, args):
        if next(calls) == moment:
            raise error("stop here")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(error, match=r"stop here"):
        prune(model, WandaConfig(sparsity=0.5), batches, progress=False)
    handle.remove()
    assert_clean(model)
    assert [module.training for module in model.modules()] == training
    assert model.config.use_cache is True
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    assert torch.is_grad_enabled()
    # whole blocks are done, or nothing; a second run completes the first
    prune(model, WandaConfig(sparsity=0.5), batches, progress=False)
    assert all(torch.equal(mask, zeros(unbroken)[name]) for name, mask in zeros(model).items())


def test_use_cache_and_inference_mode():
    model, batches, _, _ = build("t5")
    assert model.config.use_cache and model.decoder.config.use_cache
    expected = copy.deepcopy(model)
    prune(expected, WandaConfig(sparsity=0.5), batches, progress=False)
    with torch.inference_mode():
        prune(model, WandaConfig(sparsity=0.5), batches, progress=False)
    assert model.config.use_cache and model.decoder.config.use_cache
    assert all(torch.equal(mask, zeros(expected)[name]) for name, mask in zeros(model).items())


def test_trainable_after_pruning():
    model, batches, _, _ = build("llama", torch.float32)
    prune(model, WandaConfig(sparsity=0.5), batches, progress=False)
    model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# --- calibration data --------------------------------------------------------------------------------------------------


def test_forms_of_calibration_data():
    model, _, _, _ = build("llama")
    ids = torch.cat([ids[:, :9] for ids in tokens()])
    results = []
    for data in (
        ids,
        {"input_ids": ids},
        [ids[:2], ids[2:]],
        ({"input_ids": row} for row in ids),
        torch.utils.data.DataLoader(torch.utils.data.TensorDataset(ids), batch_size=4),
        torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=3),
    ):
        one = copy.deepcopy(model)
        assert prune(one, WandaConfig(sparsity=0.5), data, progress=False).calibration_tokens == ids.numel()
        results.append(zeros(one))
    for other in results[1:]:
        assert all(torch.equal(mask, other[name]) for name, mask in results[0].items())


def test_max_samples_and_one_reading():
    drawn = []

    def stream():
        for ids in tokens(5, 2, 9):
            drawn.append(0)
            yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "flag": True}

    batches = calibration_batches(stream(), max_samples=3)
    assert [batch["input_ids"].shape[0] for batch in batches] == [2, 1]
    assert batches[1]["attention_mask"].shape == (1, 10) and batches[1]["flag"] is True
    assert len(drawn) == 2
    assert len(calibration_batches(stream())) == 5


@pytest.mark.parametrize(
    "data",
    [None, [], iter(()), "text", 3, ["some text"], [{"input_ids": [1, 2]}], [{}], [(torch.ones(1, 2), torch.ones(1, 2))],
     [torch.empty(0, 4, dtype=torch.long)]],
)  # fmt: skip
def test_bad_calibration(data):
    model, _, _, _ = build("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^`?calibration"):
        prune(model, WandaConfig(sparsity=0.5), data, progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_clean(model)


def test_calibration_that_reaches_nothing():
    model, _, _, _ = build("llama")
    ids = tokens(1)[0]
    batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    with pytest.raises(ValueError, match=r"calibration: no token reaches model.layers.0"):
        prune(model, WandaConfig(sparsity=0.5), [batch], progress=False)
    model.spare = nn.ModuleList([copy.deepcopy(model.model.layers[0])])
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"does not use spare\.0 on this data"):
        prune(model, WandaConfig(sparsity=0.5), [ids], progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    prune(model, WandaConfig(sparsity=0.5, exclude_modules=r"spare\..*"), [ids], progress=False)
    assert not any(mask.any() for mask in zeros(model, "spare.*").values())


def test_activations_that_are_not_finite():
    model, batches, _, _ = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[batches[0]["input_ids"][0, 0], 0] = float("nan")
    with pytest.raises(ValueError, match=r"calibration: the inputs of model.layers.0.*not finite"):
        prune(model, WandaConfig(sparsity=0.5), batches, progress=False)


def test_expert_without_tokens():
    model = Skips()
    model.blocks = nn.ModuleList([Experts(), Experts()])
    with pytest.warns(UserWarning, match=r"No calibration token reaches blocks\.\d\.experts\.2: pruned by magnitude"):
        prune(model, WandaConfig(sparsity=0.5), text(), progress=False)
    weight = model.blocks[0].experts[2].weight.abs()
    assert ((weight == 0).sum(1) == 8).all()


def test_fused_experts_are_named():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=VOCAB, num_key_value_heads=1, num_local_experts=2, **shape)
    with pytest.warns(UserWarning, match=r"experts.* are not pruned"):
        prune(MixtralForCausalLM(config), WandaConfig(sparsity=0.5), text(), progress=False)


# --- which layers ------------------------------------------------------------------------------------------------------


def test_targets_and_exclusions():
    model, _, _, _ = build("llama")

    def pruned(**kwargs):
        one = copy.deepcopy(model)
        prune(one, MagnitudeConfig(sparsity=0.5, **kwargs), progress=False)
        return {name for name, mask in zeros(one).items() if mask.any()}

    assert pruned() == set(zeros(model)) - {"lm_head"}
    assert pruned(target_modules=["q_proj"]) == {f"model.layers.{i}.self_attn.q_proj" for i in range(3)}
    assert pruned(target_modules={"q_proj"}) == pruned(target_modules=("q_proj",)) == pruned(target_modules=["q_proj"])
    assert pruned(target_modules=["1.mlp.up_proj", "lm_head"]) == {"model.layers.1.mlp.up_proj", "lm_head"}
    assert pruned(target_modules=r".*\.0\.mlp\.(up|down)_proj") == {
        "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj",
    }  # fmt: skip
    assert len(pruned(exclude_modules=["q_proj", "2.mlp.up_proj"])) == 21 - 3 - 1
    assert len(pruned(exclude_modules=r".*layers\.[01]\..*")) == 7


@pytest.mark.parametrize(
    "field, value",
    [("target_modules", ["q_proj", "quark_proj"]), ("target_modules", "q_proj"), ("target_modules", ["mlp"]),
     ("target_modules", ["embed_tokens"]), ("exclude_modules", ["quark_proj"]), ("exclude_modules", ".*quark")],
)  # fmt: skip
def test_patterns_without_a_match(field, value):
    model, batches, _, _ = build("llama")
    with pytest.raises(ValueError, match=f"`{field}`: .*matches no linear layer"):
        prune(model, WandaConfig(sparsity=0.5, **{field: value}), batches, progress=False)
    assert not any(mask.any() for mask in zeros(model).values())


def test_nothing_left():
    with pytest.raises(ValueError, match=r"`target_modules` must leave a linear layer"):
        prune(llama(), MagnitudeConfig(sparsity=0.5, target_modules=["q_proj"], exclude_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"`target_modules` must leave a linear layer"):
        prune(nn.Sequential(nn.Conv2d(3, 3, 1)), MagnitudeConfig(sparsity=0.5))


def test_tied_weights_are_refused():
    model = llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head shares its weight"):
        prune(model, MagnitudeConfig(sparsity=0.5, target_modules=["q_proj", "lm_head"]))
    assert not any(mask.any() for mask in zeros(model).values())
    prune(model, MagnitudeConfig(sparsity=0.5), progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight and (model.lm_head.weight != 0).all()


def test_weights_that_cannot_be_pruned():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(40, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj has quantised weights \(torch.int8\)"):
        prune(model, MagnitudeConfig(sparsity=0.5))

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))

    model = llama()
    model.model.layers[1].mlp.up_proj = Packed()
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj has quantised weights"):
        prune(model, MagnitudeConfig(sparsity=0.5))
    assert "model.layers.1.mlp.up_proj" not in measure_sparsity(model)

    model = llama()
    nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=r"the weight of model.layers.1.mlp.up_proj is no parameter of its own"):
        prune(model, MagnitudeConfig(sparsity=0.5))

    with torch.device("meta"):
        model = llama()
    with pytest.raises(ValueError, match=r"is not a plain parameter in memory"):
        prune(model, MagnitudeConfig(sparsity=0.5))

    model = llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"model.layers.2.mlp.up_proj holds NaN or infinite"):
        prune(model, MagnitudeConfig(sparsity=0.5))
    assert not any(mask.any() for mask in zeros(model).values())


def test_pattern_that_does_not_divide():
    model, batches, _, _ = build("llama")
    with pytest.raises(
        ValueError, match=r"`pattern` must be .*, got '2:16': model.layers.0.mlp.down_proj has 40 inputs"
    ):
        prune(model, WandaConfig(pattern="2:16"), batches, progress=False)
    assert not any(mask.any() for mask in zeros(model).values())
    prune(model, WandaConfig(pattern="2:16", exclude_modules=["down_proj"]), batches, progress=False)


def test_peft_model():
    """The base weights are pruned, with active adapters in the activations; the adapters keep their bits."""
    model, batches, _, _ = build("llama")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(model, config)
    adapters = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    expected = copy.deepcopy(model)
    report = prune(model, WandaConfig(sparsity=0.5, target_modules=["q_proj", "up_proj"]), batches, progress=False)
    prefix = "base_model.model.model.layers"
    assert [row["name"] for row in report.layers][:2] == [f"{prefix}.0.self_attn.q_proj", f"{prefix}.0.mlp.up_proj"]
    assert report.sparsity == 0.5
    assert all(torch.equal(p, adapters[n]) for n, p in model.named_parameters() if n in adapters)
    assert measure_sparsity(model)[f"{prefix}.1.self_attn.q_proj"] == 0.5
    assert len(measure_sparsity(model)) == 22
    # the activations are those with the adapters, whose base is pruned by the same masks
    seen = []
    merged = expected.merge_and_unload().model.layers[0]
    merged.mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches:
            expected(**batch)
    score = merged.mlp.up_proj.weight.abs() * torch.cat(seen).norm(dim=0)
    assert torch.equal(zeros(model)[f"{prefix}.0.mlp.up_proj"], lowest_mask(score, 16))


def test_merged_adapter_is_refused():
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"an adapter is merged into .*q_proj; call model.unmerge_adapter"):
        prune(model, MagnitudeConfig(sparsity=0.5))
    model.unmerge_adapter()
    assert prune(model, MagnitudeConfig(sparsity=0.5), progress=False).sparsity == pytest.approx(0.5)


def test_find_stacks():
    assert [next(iter(stack)) for stack in find_stacks(t5())] == ["encoder.block.0", "decoder.block.0"]
    assert len(find_stacks(llama(layers=1))) == 1
    heads = nn.ModuleDict(
        {"heads": nn.ModuleList([nn.Linear(2, 2)]), "mlp": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))}
    )
    assert find_stacks(heads) == []


# --- configuration and report ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [WandaConfig, MagnitudeConfig])
@pytest.mark.parametrize("sparsity", [float("nan"), -0.1, 1.0, 1.5, 1, True, "0.5", float("inf"), None, [0.5]])
def test_bad_sparsity(config, sparsity):
    with pytest.raises(ValueError, match=r"^`sparsity` must be "):
        config(sparsity=sparsity)


@pytest.mark.parametrize("pattern", ["", "2", "2:", "4:4", "4:2", "0:4", "2 : 4", "-2:4", "a:b", "2:4:8", (2, 4), 0.5])
def test_bad_pattern(pattern):
    with pytest.raises(ValueError, match=r"^`pattern` must be "):
        WandaConfig(pattern=pattern)


def test_sparsity_beside_a_pattern():
    assert WandaConfig(pattern="2:4", sparsity=0.5).n_of_m == (2, 4)
    assert WandaConfig(pattern="1:4", sparsity=0.75).n_of_m == (1, 4)
    with pytest.raises(
        ValueError, match=r"`sparsity` must be unset or 0.75 with .*, which keeps 1 of every 4 weights, got 0.25"
    ):
        WandaConfig(pattern="1:4", sparsity=0.25)


@pytest.mark.parametrize(
    "make, match",
    [(lambda: WandaConfig(sparsity=0.5, max_samples=0), "max_samples"),
     (lambda: WandaConfig(sparsity=0.5, max_samples=1.5), "max_samples"),
     (lambda: MagnitudeConfig(sparsity=0.5, scope="model"), "scope"),
     (lambda: WandaConfig(sparsity=0.5, target_modules=[]), "target_modules"),
     (lambda: WandaConfig(sparsity=0.5, target_modules=3), "target_modules"),
     (lambda: WandaConfig(sparsity=0.5, exclude_modules="("), "exclude_modules")],
)  # fmt: skip
def test_bad_options(make, match):
    with pytest.raises(ValueError, match=f"^`{match}` must be "):
        make()


@pytest.mark.parametrize("config", [None, 0.5, "wanda", PruningConfig(sparsity=0.5), WandaConfig])
def test_unknown_config(config):
    with pytest.raises(
        ValueError, match=r"^`config` must be an instance of one of MagnitudeConfig, .*WandaConfig, got "
    ):
        prune(llama(layers=1), config)


def test_report(tmp_path):
    model, batches, _, _ = build("llama")
    report = prune(model, WandaConfig(sparsity=0.5, exclude_modules=["o_proj"]), batches, progress=False)
    assert report.calibration_tokens == sum(batch["input_ids"].numel() for batch in batches)
    assert report.seconds > 0 and report.sparsity == 0.5 and report.method == "wanda"
    assert report.config["exclude_modules"] == ["o_proj"]
    first = report.layers[0]
    assert first == {
        "name": "model.layers.0.self_attn.q_proj", "shape": [32, 32], "sparsity_before": 0.0, "sparsity_after": 0.5,
    }  # fmt: skip
    lines = str(report).splitlines()
    assert len(lines) == 2 + 6 + 1  # title and header, one line per kind of layer, total
    assert "60 calibration tokens" in lines[0] and lines[-1].split() == ["total", "18", "17,664", "0.00%", "50.00%"]
    path = tmp_path / "new" / "report.json"
    report.save(path)
    assert json.loads(path.read_text()) == report.to_dict()
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    assert dataclasses.asdict(report)["layers"] == report.layers


def test_measure_sparsity():
    model = gpt2()
    assert set(measure_sparsity(model).values()) == {0.0}
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:8] = 0
    assert measure_sparsity(model)["transformer.h.0.mlp.c_fc"] == 0.25
    assert weight_matrix(model.transformer.h[0].mlp.c_fc).shape == (128, 32)


def test_no_warnings_on_plain_models():
    model, batches, _, _ = build("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(model, WandaConfig(sparsity=0.5), batches, progress=False)
