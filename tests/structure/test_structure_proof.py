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
"""What layouts say is tried: blocks that look alike and are not, skips of every kind of result, and a caller who notices nothing."""

import copy
import time
import warnings

import pytest
import torch
import transformers
from support.elastic_models import adapted, close
from support.models import BLOCKS, build, outputs, tiny_gemma2, tiny_llama, tokens
from torch import nn

from peft_elastic import MultiPrunerConfig, prune_structured, sort_by_importance
from peft_elastic.structure import (
    AttentionLayout,
    BlockLayout,
    MLPLayout,
    Structure,
    proof,
    register_layout,
    skip_to_zeros,
)
from peft_elastic.structure.extract import extract
from peft_elastic.structure.layouts import _LAYOUTS, skip_block
from peft_elastic.structure.space import activate


pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PAIR = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


@pytest.fixture(autouse=True)
def _nothing_known():
    """Verdicts and layouts of one test are not those of another."""
    verdicts, layouts = dict(proof._VERDICTS), dict(_LAYOUTS)
    proof._VERDICTS.clear()
    yield
    proof._VERDICTS.update(verdicts)
    _LAYOUTS.clear()
    _LAYOUTS.update(layouts)


def make(name, suffix="ForCausalLM", **settings):
    """A model with random weights everywhere, norms too."""
    model = build(getattr(transformers, name + suffix), getattr(transformers, f"{name}Config"), **settings)
    random = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        parameter.data.copy_(noise * 0.15 if parameter.dim() > 1 else parameter + noise * 0.1)
    return model.eval()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "kind", "why"),
    [
        ("BitNet", {}, "mlp", "another order of its MLP channels changes what the model computes"),
        ("DiffLlama", {}, "heads", "another order of its heads changes what the model computes"),
        # sinks of as many heads as features, which look like a norm of a head
        (
            "GptOss",
            {"num_attention_heads": 8, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
            "heads",
            "heads",
        ),
        ("StableLm", {"qk_layernorm": True}, "heads", "heads"),
    ],
)
def test_blocks_that_look_like_llamas(name, settings, kind, why):
    model = make(name, **SIZES | settings)
    before = copy.deepcopy(model.state_dict())
    structure = Structure(model)
    assert not [width for width in structure.widths if width.kind == kind]
    with pytest.raises(ValueError, match=rf"elastic_width\['{kind}'\].*model\.layers\.0.*{why}"):
        adapted(model, target_modules=["q_proj"], elastic_width={kind: [1.0, 0.5]})
    with pytest.raises(ValueError, match=kind):
        sort_by_importance(model, "magnitude", kinds=(kind,))
    stage = "heads" if kind == "heads" else "channels"
    settings = {"ratio": 0.02, "stages": (stage,), "split": (1,), "choose": "random", "order": "magnitude"}
    with pytest.raises(ValueError, match=rf"model\.layers\.0.*{why}"):
        prune_structured(model, MultiPrunerConfig(**settings), [tokens()])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("lora" in name for name, _ in model.named_modules())


def test_a_skip_that_is_refused_says_why():
    model = make("PegasusX", "ForConditionalGeneration", **PAIR, block_size=8, num_global_tokens=4)
    path = "model.encoder.layers.0"
    with pytest.raises(ValueError, match=f"'{path}.attention'.*{path}: skipped, the forward fails"):
        adapted(model, target_modules=["fc1"], elastic_width=None, elastic_depth=[f"{path}.attention"])
    assert not any("lora" in name for name, _ in model.named_modules())


# -- what is found to be otherwise, and right ---------------------------------------------------------------------------


@pytest.mark.parametrize("multi_query", [True, False])
def test_one_projection_head_by_head_or_not(multi_query):
    sizes = {"vocab_size": 96, "n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = make("GPTBigCode", **sizes, multi_query=multi_query, bos_token_id=1, eos_token_id=2)
    structure = Structure(model)
    assert {width.kind for width in structure.widths} == {"heads", "mlp"}
    assert structure.blocks[0].attentions[0].layout.interleaved != multi_query
    expected = outputs(model, tokens())
    scores = {order.name: torch.rand(width.units) for width in structure.widths for order in width.orders}
    sort_by_importance(model, scores)
    close(outputs(model, tokens()), expected, 1e-4)


def test_biases_in_every_block():
    sizes = {
        "vocab_size": 96,
        "d_model": 32,
        "d_ff": 48,
        "d_kv": 8,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": 0,
    }
    model = make("UMT5", "ForConditionalGeneration", **sizes, decoder_start_token_id=0)
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(length=5, seed=1)}
    expected = outputs(model, inputs)
    structure = Structure(model)
    scores = {order.name: torch.rand(width.units) for width in structure.widths for order in width.orders}
    assert {"encoder.block", "decoder.block"} < set(scores)
    sort_by_importance(model, scores)
    close(outputs(model, inputs), expected, 1e-4)


@pytest.mark.parametrize(
    ("name", "suffix", "settings", "part"),
    [
        ("RoFormer", "Model", {"embedding_size": 32}, ""),
        ("MegatronBert", "Model", {}, ""),
        ("Esm", "Model", {"mask_token_id": 3}, ".attention"),
        ("LayoutLM", "Model", {}, ".attention"),
    ],
)
def test_parts_that_return_tuples(name, suffix, settings, part):
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    model = make(name, suffix, **sizes | settings)
    inputs = tokens()
    whole = model(inputs)[0]
    for number in (0, 2):
        structure = Structure(model)
        key = f"depth:encoder.layer.{number}{part}"
        activate(model, structure, {key: 0})
        with torch.no_grad():
            found, alone = model(inputs)[0], model(inputs[1:])[0]
        activate(model, structure, {})
        assert found.shape == whole.shape
        close(alone, found[1:], 1e-4)
        assert (found - whole).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["Olmo2", "Olmoe", "Llama"])
@pytest.mark.parametrize("part", ["", ".attention"])
def test_places_in_a_cache_without_the_first_attention(name, part):
    """Also where the heads cannot be read."""
    extra = {"num_experts": 4, "num_experts_per_tok": 2} if name == "Olmoe" else {}
    model = make(name, **SIZES | extra)
    structure = Structure(model)
    activate(model, structure, {f"depth:model.layers.0{part}": 0})
    ids = tokens(2, 12)
    with torch.no_grad():
        expected = model(ids).logits[:, 8:]
        for smaller in (False, True):
            if smaller:
                extract(model, structure)
            first = model(ids[:, :8], use_cache=True)
            # transformers 5.24 has another name for it, and takes this one
            found = model(ids[:, 8:], past_key_values=first.past_key_values, use_cache=True).logits
            close(found, expected, 1e-4)


# -- layouts of users ----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Query, key and value of a head next to each other."""

    def __init__(self):
        super().__init__()
        self.n_heads, self.head_dim = 4, 4
        self.w, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.w(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Own(nn.Module):
    def __init__(self, returns_a_list=False):
        super().__init__()
        self.attn, self.up, self.down, self.returns_a_list = (
            Attention(),
            nn.Linear(16, 24),
            nn.Linear(24, 16),
            returns_a_list,
        )

    def forward(self, x):
        x = x + self.attn(x)
        x = x + self.down(torch.tanh(self.up(x)))
        return [x, None] if self.returns_a_list else x


class Net(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.blocks = nn.ModuleList(Own(**settings) for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x = x[0] if block.returns_a_list else x
        return x


def register(interleaved, **settings):
    attention = AttentionLayout("attn", qkv=("w",), out="out", interleaved=interleaved, skip={"attn": skip_to_zeros})
    register_layout(BlockLayout("own", (attention,), MLPLayout(("up",), "down"), **settings))


def test_a_layout_that_is_not_true():
    register(interleaved=False)
    model = Net()
    with pytest.raises(
        ValueError, match=r"'heads'.*blocks\.0: another order of its heads changes what the model computes"
    ):
        adapted(model, target_modules=["up"], elastic_width={"heads": [1.0, 0.5]})
    register(interleaved=True)
    adapted(model, target_modules=["up"], elastic_width={"heads": [1.0, 0.5], "mlp": [1.0, 0.5]}, elastic_depth="all")


@pytest.mark.parametrize("returns_a_list", [True, False])
def test_a_block_of_ones_own_that_returns_a_list(returns_a_list):
    register(interleaved=True, skip=skip_block)
    model, x = Net(returns_a_list=returns_a_list), torch.randn(2, 5, 16)
    structure = Structure(model)
    activate(model, structure, {"depth:blocks.0": 0, "depth:blocks.2": 0})
    found = model(x)
    activate(model, structure, {})
    expected = model.blocks[1](x)
    close(found, expected[0] if returns_a_list else expected)


def test_a_model_of_ones_own_that_reads_tokens():
    class Reader(Net):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(50, 16), nn.Embedding(20, 16)

        def forward(self, text, mask=None):
            return super().forward(self.tokens(text) + self.places(torch.arange(text.shape[1])))

    register(interleaved=True)
    structure = Structure(Reader())
    assert len(structure.widths) == 6 and not any(block.problems or block.fixed for block in structure.blocks)


def test_a_block_that_nobody_can_call():
    class Odd(Net):
        def forward(self, x, *, recipe):
            return super().forward(recipe(x))

    register(interleaved=True)
    with pytest.raises(ValueError, match=r"blocks\.0: it could not be tried \(the forward fails \(TypeError"):
        adapted(Odd(), target_modules=["up"], elastic_width={"mlp": [1.0, 0.5]})


# -- the caller ----------------------------------------------------------------------------------------------------------


def test_the_model_and_the_state_of_torch_are_left_alone():
    model = tiny_gemma2().train()
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {key: value.clone() for key, value in [*model.state_dict().items(), *model.named_buffers()]}
    versions = [tensor._version for tensor in (*model.parameters(), *model.buffers())]
    attributes = {path: dict(module.__dict__) for path, module in model.named_modules()}
    config, random = model.config.to_dict(), torch.get_rng_state()
    filters = list(warnings.filters)
    Structure(model)
    assert torch.equal(random, torch.get_rng_state()) and torch.get_default_dtype() == torch.float32
    assert not calls and model.config.to_dict() == config and warnings.filters == filters and torch.is_grad_enabled()
    assert versions == [tensor._version for tensor in (*model.parameters(), *model.buffers())]
    assert all(torch.equal(value, state[key]) for key, value in [*model.state_dict().items(), *model.named_buffers()])
    assert all(module.__dict__.keys() == attributes[path].keys() for path, module in model.named_modules())
    assert all(module.training for module in model.modules())
    assert all((parameter.grad == 1).all() for parameter in model.parameters())


@pytest.mark.parametrize("how", ["bfloat16", "meta", "zeros", "narrowed", "adapters", "default dtype", "no grad"])
def test_whatever_state_the_model_is_in(how):
    """The weights are not looked at, so it does not matter what or where they are."""
    model = tiny_llama()
    before = None
    if how == "bfloat16":
        model = model.to(torch.bfloat16)
    elif how == "meta":
        model = model.to("meta")
    elif how == "zeros":
        for parameter in model.parameters():
            parameter.data.zero_()
    elif how == "narrowed":
        activate(
            model,
            Structure(model),
            {"heads:model.layers.0": 2, "mlp:model.layers.1": 8, "depth:model.layers.0.mlp": 0},
        )
        proof._VERDICTS.clear()
    elif how == "adapters":
        model = adapted(model, elastic_depth="all").get_base_model()
        proof._VERDICTS.clear()
    elif how == "default dtype":
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
    with torch.set_grad_enabled(how != "no grad"):
        structure = Structure(model)
    if before is not None:
        assert torch.get_default_dtype() == torch.float64
        torch.set_default_dtype(before)
    assert len(structure.widths) == 4
    assert all(not block.problems and set(block.skips) == {"block", "attention", "mlp"} for block in structure.blocks)


def test_once_for_a_class_of_block():
    known = len(proof._VERDICTS)
    start = time.process_time()
    Structure(tiny_llama())
    first = time.process_time() - start
    assert len(proof._VERDICTS) == known + 2  # the first block, and the others
    start = time.process_time()
    Structure(tiny_llama(num_hidden_layers=6, intermediate_size=40))
    assert time.process_time() - start < first / 5
    assert len(proof._VERDICTS) == known + 2


def test_large_blocks_are_tried_with_few_of_their_units():
    """Without their weights in memory, and in a moment."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, vocab_size=100_000, num_hidden_layers=4)
        )
    structure = Structure(model)
    assert {(width.full, width.units) for width in structure.widths} == {(16, 8), (4096, 4096)}
    assert all(not block.problems and not block.fixed for block in structure.blocks)


def test_what_is_left_of_a_model_is_known_as_well():
    model = BLOCKS["llama"].build(num_hidden_layers=3)
    structure = Structure(model)
    activate(
        model, structure, {"depth:model.layers.0.attention": 0, "depth:model.layers.1.mlp": 0, "mlp:model.layers.2": 8}
    )
    extract(model, structure)
    proof._VERDICTS.clear()
    blocks = Structure(model).blocks
    assert [set(block.skips) for block in blocks] == [
        {"block", "mlp"},
        {"block", "attention"},
        {"block", "attention", "mlp"},
    ]
    assert not any(block.problems or block.fixed for block in blocks)
