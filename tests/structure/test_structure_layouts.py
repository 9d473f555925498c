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
"""Which heads, channels and blocks are found in each architecture, layouts of a user, and what is said of unknown ones."""

import pytest
import torch
import transformers
from support.elastic_models import CHANNELS, HEADS, SETTINGS, adapted, blocks_of, close, readers
from support.elastic_models import build as build_model
from support.models import BLOCKS, T5S, ConvNet, build, net, tiny_llama, tiny_mixtral
from torch import nn

from peft_elastic import ElasticLoraConfig
from peft_elastic.structure import (
    AttentionLayout,
    BlockLayout,
    MLPLayout,
    Structure,
    register_layout,
    skip_attention,
    skip_to_zeros,
)
from peft_elastic.structure.layouts import _LAYOUTS


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", BLOCKS)
def test_decoders_and_encoders(name):
    structure = Structure(build_model(name))
    assert not structure.unknown and [block.path for block in structure.blocks] == list(blocks_of(name))
    assert all(not block.problems and set(block.skips) == {"block", "attention", "mlp"} for block in structure.blocks)
    found = {f"{width.kind}:{width.name}": (width.full, width.units) for width in structure.widths}
    kv_heads = BLOCKS[name].kv_heads
    assert found == {
        key: (HEADS, kv_heads) if key.startswith("heads") else (CHANNELS, CHANNELS) for key in readers(name)
    }
    for key, layers in readers(name).items():
        inputs = [slot.path for slot in structure.width(key).slots if slot.side == "in"]
        assert inputs == [path for path, _ in layers]


@pytest.mark.parametrize("name", T5S)
def test_t5(name):
    structure = Structure(build_model(name))
    assert [block.path for block in structure.blocks] == list(blocks_of(name))
    assert {f"{width.kind}:{width.name}" for width in structure.widths} == set(readers(name))
    for key, layers in readers(name).items():
        inputs = [slot.path for slot in structure.width(key).slots if slot.side == "in"]
        assert sorted(inputs) == sorted(path for path, _ in layers)
    # the first blocks make the position bias of the others
    for block in structure.blocks:
        assert set(block.skips) == ({"mlp"} if block.index == 0 else {"block", "attention", "mlp"})
    biases = [slot for slot in structure.width("heads:encoder.block").slots if "relative" in slot.path]
    assert [slot.path for slot in biases] == ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias"]


@pytest.mark.parametrize("kind", [transformers.AutoModel, transformers.AutoModelForSequenceClassification])
def test_other_heads_on_the_same_blocks(kind):
    model = kind.from_config(tiny_llama().config)
    paths = [block.path for block in Structure(model).blocks]
    prefix = "" if kind is transformers.AutoModel else "model."
    assert paths == [f"{prefix}layers.{i}" for i in range(2)]


def test_head_size_that_is_not_hidden_size_over_heads():
    structure = Structure(tiny_llama(head_dim=12))
    assert structure.width("heads:model.layers.0").full == 4
    assert structure.blocks[0].attentions[0].head_dim == 12


def test_layers_that_a_block_leaves_out():
    """DeepSeek-V2 with queries of low rank has None for `q_proj`: a block is read by what it has."""
    model = tiny_llama()
    model.model.layers[0].self_attn.q_proj = None
    model.model.layers[1].mlp.gate_proj = None
    assert [block.layout.name for block in Structure(model).blocks] == ["gated MLP", "Llama attention"]


class TestRegistering:
    @pytest.fixture(autouse=True)
    def _put_back(self):
        before = dict(_LAYOUTS)
        yield
        _LAYOUTS.clear()
        _LAYOUTS.update(before)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.n_heads, self.head_dim = 4, 4
            self.wq, self.wk, self.wv = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
            self.wo = nn.Linear(16, 16)

        def forward(self, x):
            q = self.wq(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            k, v = (layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for layer in (self.wk, self.wv))
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return self.wo(y.transpose(1, 2).flatten(2)), None

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = TestRegistering.Attention()
            self.w1, self.w3, self.w2 = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x):
            x = x + self.attn(x)[0]
            return x + self.w2(torch.tanh(self.w1(x)) * self.w3(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(TestRegistering.Block() for _ in range(2))
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    LAYOUT = BlockLayout(
        name="net",
        attentions=(AttentionLayout("attn", qkv=("wq", "wk", "wv"), out="wo", skip={"attn": skip_attention}),),
        mlp=MLPLayout(inputs=("w1", "w3"), out="w2"),
    )

    def test_a_model_of_the_user(self):
        torch.manual_seed(0)
        model, x = self.Net().eval(), torch.randn(2, 5, 16)
        with pytest.raises(ValueError, match=r"no block of the model \(for example 'blocks.0'\).*register_layout"):
            adapted(model)
        register_layout(self.LAYOUT)
        model = adapted(model, elastic_depth=["0-1", "0.attention"], target_modules=["wq", "wo", "w1", "w2"])
        assert {c.key for c in model.search_space if c.kind != "rank"} == {
            *(f"{kind}:blocks.{i}" for kind in ("heads", "mlp", "depth") for i in range(2)),
            "depth:blocks.0.attention",
        }
        subnet = model.search_space.max.to_dict() | {"heads:blocks.0": 2, "mlp:blocks.0": 8, "depth:blocks.1": 0}
        model.set_subnet(subnet)
        found = model(x)
        # by hand
        model.set_subnet("max")
        block = model.get_base_model().blocks[0]
        with torch.no_grad():

            def cut(size):
                return lambda module, args: (args[0] * (torch.arange(args[0].shape[-1]) < size),)

            hooks = [block.attn.wo.register_forward_pre_hook(cut(8)), block.w2.register_forward_pre_hook(cut(8))]
            expected = model.get_base_model().head(block(x))
        for hook in hooks:
            hook.remove()
        close(found, expected)
        # a plain module has no configuration that could be written
        model.set_subnet(subnet)
        extracted = model.merge_and_unload()
        close(extracted(x), expected)
        assert len(extracted.blocks) == 1 and extracted.blocks[0].attn.wk.weight.shape == (4, 16)
        with pytest.raises(ValueError, match="cannot be skipped in that way"):
            adapted(
                self.Net(), elastic_depth=["all.attention", "0.mlp"]
            )  # the layout does not say what an MLP leaves out

    def test_again_replaces_and_the_last_is_tried_first(self):
        register_layout(self.LAYOUT)
        register_layout(BlockLayout("net", mlp=MLPLayout(inputs=("w1", "w3"), out="w2", skip={"w2": skip_to_zeros})))
        structure = Structure(self.Net())
        assert {width.kind for width in structure.widths} == {"mlp"}
        assert list(_LAYOUTS)[-1] == "net" and list(_LAYOUTS).count("net") == 1

    def test_a_layout_without_parts(self):
        with pytest.raises(ValueError, match="`layout` 'empty' has neither `attentions` nor an `mlp`"):
            register_layout(BlockLayout("empty"))

    def test_a_block_that_fails_condemns_no_other_model(self, monkeypatch):
        monkeypatch.setattr("peft_elastic.structure.proof._VERDICTS", {})
        register_layout(self.LAYOUT)
        model = self.Net()
        model.blocks[1].attn.head_dim = 3
        with pytest.raises(ValueError, match="could not be tried.*blocks.1.attn has no attribute head_dim"):
            adapted(model, elastic_width={"heads": [1.0]})
        space = adapted(self.Net(), elastic_width={"heads": [1.0, 0.5]}, target_modules=["wq"]).search_space
        assert [choice.key for choice in space if choice.kind == "heads"] == ["heads:blocks.0", "heads:blocks.1"]

    def test_sizes_that_do_not_fit(self):
        register_layout(self.LAYOUT)
        model = self.Net()
        model.blocks[1].attn.head_dim = 3
        with pytest.raises(
            ValueError, match="blocks.1.attn has no attribute head_dim .* that divides its 16 features"
        ):
            adapted(model, elastic_width={"heads": [1.0]})
        model.blocks[1].attn.head_dim = 4
        model.blocks[1].w3 = nn.Linear(16, 20)
        with pytest.raises(ValueError, match="blocks.1.w3 has 20 rows for 24 channels"):
            adapted(model, elastic_width={"mlp": [1.0]})
        model.blocks[1].attn.wk = nn.Linear(16, 12)
        with pytest.raises(
            ValueError, match=r"projections of blocks.1.attn have \[16, 12, 8\] rows, which are no 4 heads of 4"
        ):
            adapted(model, elastic_width={"heads": [1.0]})


def test_unknown_architectures():
    for model, targets in (
        (net(ConvNet), ["head"]),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), ["0"]),
    ):
        for settings in ({"elastic_width": {"heads": [1.0, 0.5]}}, {"elastic_width": None, "elastic_depth": "all"}):
            with pytest.raises(ValueError, match="no block of the model.*register_layout"):
                adapted(model, target_modules=targets, **settings)
            assert not any("lora" in name for name, _ in model.named_modules())


def test_a_mixture_of_experts_has_heads_alone():
    with pytest.raises(ValueError, match=r"elastic_width\['mlp'\].*register_layout"):
        adapted(tiny_mixtral(), target_modules=["q_proj"])
    model = adapted(
        tiny_mixtral(), target_modules=["q_proj"], elastic_width={"heads": [1.0, 0.5]}, elastic_depth="all"
    )
    assert {choice.kind for choice in model.search_space} == {"rank", "heads", "depth"}


def test_parameters_of_heads_that_the_layout_does_not_know():
    model = build(
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        **{
            "vocab_size": 96,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    )
    with pytest.raises(
        ValueError, match=r"self_attn.sinks \(4,\) seems to belong to heads, and the layout does not know"
    ):
        adapted(model, target_modules=["q_proj"], elastic_width={"heads": [1.0, 0.5]})
    assert not any("lora" in name for name, _ in model.named_modules())
    # depth needs no heads
    model = adapted(model, target_modules=["q_proj"], elastic_width=None, elastic_depth="0-1")
    assert model.search_space.min["depth:model.layers.0"] == 0


def test_layers_that_cannot_be_narrowed():
    class Odd(nn.Linear):
        pass

    model = tiny_llama()
    model.model.layers[1].mlp.up_proj = Odd(32, 48, bias=False)
    with pytest.raises(
        ValueError, match="'model.layers.1.mlp.up_proj' is of type Odd, which cannot be narrowed; known are"
    ):
        adapted(model)
    assert not any("lora" in name for name, _ in model.named_modules())


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"elastic_width": {}}, "`elastic_width` must be a dict with the keys"),
        ({"elastic_width": [1.0, 0.5]}, "`elastic_width` must be a dict with the keys"),
        ({"elastic_width": {"head": [1.0]}}, "`elastic_width` must be a dict with the keys"),
        ({"elastic_width": {"heads": []}}, r"elastic_width\['heads'\]` must be a list"),
        ({"elastic_width": {"heads": 0.5}}, r"elastic_width\['heads'\]` must be a list"),
        ({"elastic_width": {"mlp": ["half"]}}, r"elastic_width\['mlp'\]` must be a list"),
        ({"elastic_width": {"mlp": [True]}}, r"elastic_width\['mlp'\]` must be a list"),
        ({"elastic_width": {"mlp": [1.0, 0.0]}}, "fractions above 0, at most 1"),
        ({"elastic_width": {"mlp": [1.5, 1.0]}}, "fractions above 0, at most 1"),
        ({"elastic_width": {"mlp": [48, 0.5]}}, "fractions above 0, at most 1"),
        ({"elastic_width": {"mlp": [1.0, float("nan")]}}, "fractions above 0, at most 1"),
        ({"elastic_width": {"mlp": [1.0, float("inf")]}}, "fractions above 0, at most 1"),
        ({"elastic_width": {"heads": [4, 0]}}, "whole numbers from 1"),
        ({"elastic_width": {"heads": [4, -2]}}, "whole numbers from 1"),
        ({"elastic_depth": 1.5}, "`elastic_depth` must be"),
        ({"elastic_depth": True}, "`elastic_depth` must be"),
        ({"elastic_depth": [""]}, "`elastic_depth` must be"),
        ({"elastic_depth": {"0": 1}}, "`elastic_depth` must be"),
        ({"elastic_depth": []}, "`elastic_depth` must be at least one block"),
        ({"elastic_depth": range(0)}, "`elastic_depth` must be at least one block"),
        ({"importance": "l1"}, "`importance` must be 'activation', 'gradient'"),
        ({"importance": None}, "`importance` must be 'activation', 'gradient'"),
        ({"sorted_base": 1}, "`sorted_base` must be True or False"),
        ({"elastic_depth": "all", "layer_replication": [(0, 1)]}, "`layer_replication` cannot be combined"),
        ({"elastic_depth": "all", "elastic_width": None, "use_dora": True}, "`use_dora` cannot be combined"),
        ({"use_dora": True}, "`use_dora` cannot be combined"),
    ],
    ids=str,
)
def test_bad_configurations(settings, message):
    with pytest.raises(ValueError, match=message):
        ElasticLoraConfig(**{**SETTINGS, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"elastic_width": {"heads": [5]}}, r"has 5, but 'model.layers.0' has 4 heads, which move in groups of 2"),
        ({"elastic_width": {"heads": [4, 3]}}, r"has 3, but 'model.layers.0' has 4 heads, which move in groups of 2"),
        ({"elastic_width": {"mlp": [49]}}, r"has 49, but 'model.layers.0' has 48 channels"),
        ({"elastic_depth": 2}, "`elastic_depth` has 2; the blocks are 0 to 1"),
        ({"elastic_depth": -1}, "`elastic_depth` has -1; the blocks are 0 to 1"),
        ({"elastic_depth": "1-0"}, "`elastic_depth` has '1-0'; the blocks are 0 to 1"),
        ({"elastic_depth": "0-2"}, "`elastic_depth` has '0-2'; the blocks are 0 to 1"),
        (
            {"elastic_depth": "last"},
            "`elastic_depth` has 'last', which is no block of the model; the blocks are 'model.l",
        ),
        ({"elastic_depth": "0.norm"}, "`elastic_depth` has '0.norm', which is no block"),
        ({"modules_to_save": ["mlp"]}, "`modules_to_save`: 'model.layers.0.mlp' is in, or around, a block"),
        ({"modules_to_save": ["input_layernorm"]}, "is in, or around, a block"),
        ({"modules_to_save": ["model"], "target_modules": ["lm_head"]}, "is in, or around, a block"),
        ({"target_modules": None, "target_parameters": ["q_proj.weight"]}, "`target_parameters`: the weight of"),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit_the_model(settings, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        adapted(model, **settings)
    assert not any("lora" in name or "modules_to_save" in name for name, _ in model.named_modules())
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear


def test_numbers_of_blocks_need_one_stack():
    with pytest.raises(ValueError, match="several stacks of blocks: give paths, 'encoder.block.0'"):
        adapted(build_model("t5"), elastic_depth=1)
    with pytest.raises(ValueError, match="'encoder.block.0' cannot be skipped in that way: it makes something for"):
        adapted(build_model("t5"), elastic_depth="encoder.block.0")


def test_an_embedding_of_heads_gets_no_adapter():
    with pytest.raises(ValueError, match="the embedding .*relative_attention_bias' is narrowed with the heads"):
        adapted(build_model("t5"), target_modules=["q", "relative_attention_bias"])


def test_options():
    space = adapted(tiny_llama(), elastic_width={"heads": [0.1, 1, 0.6], "mlp": [1.0, 0.7, 0.01]}).search_space
    assert space["heads:model.layers.0"].options == (4, 2)  # whole groups, at least one
    assert space["mlp:model.layers.1"].options == (48, 32, 8)  # multiples of 8, at least 8
    space = adapted(tiny_llama(), elastic_width={"heads": [2, 4], "mlp": [48, 37, 1]}).search_space
    assert space["heads:model.layers.0"].options == (4, 2)
    assert space["mlp:model.layers.1"].options == (48, 37, 1)
    for depth, names in (
        ("all", ["1"]),  # one has to stay
        (1, ["1"]),
        ("0-1.mlp", ["0.mlp", "1.mlp"]),
        (range(2), ["0", "1"]),
        (["1", 1, "model.layers.0.attention"], ["0.attention", "1"]),
        ("all.attention", ["0.attention", "1.attention"]),
    ):
        space = adapted(tiny_llama(), elastic_width=None, elastic_depth=depth).search_space
        assert [c.name for c in space if c.kind == "depth"] == [f"model.layers.{name}" for name in names]
        assert all(c.options == (1, 0) for c in space if c.kind == "depth")
