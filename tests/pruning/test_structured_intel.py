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
"""Intel's `pruning_config.json`, against their procedure written down once more: sort by the L1 norm of the layers that make a head
or channel, keep the first."""

import copy
import json
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.elastic_models import build, close
from support.masked_states import same, snapshot
from support.models import outputs, tiny_gpt2, tiny_llama, tiny_phi3, tiny_qwen2, tokens

from peft_elastic import BlockPrunerConfig, MultiPrunerConfig, PruningPlan, prune_structured
from peft_elastic.pruning.structured import from_pruning_config, to_pruning_config


pytestmark = pytest.mark.filterwarnings("ignore")

HEAD = 8
INPUTS = {"input_ids": tokens()}
WHOLE = {
    "pruned_attn_idx": [],
    "pruned_mlp_idx": [],
    "pruned_attn_width": {str(n): 32 for n in range(4)},
    "pruned_mlp_width": {str(n): 48 for n in range(4)},
}


def changed(**changes):
    config = copy.deepcopy(WHOLE)
    for name, change in changes.items():
        config[name] = {**config[name], **change} if isinstance(change, dict) else change
    return config


EXAMPLES = [
    changed(pruned_attn_idx=[1], pruned_mlp_idx=[0, 3]),
    changed(pruned_attn_width={"0": 16, "2": 16}),
    changed(pruned_mlp_width={"0": 40, "1": 8, "3": 1}),
    changed(pruned_attn_idx=[2], pruned_mlp_idx=[2, 0], pruned_attn_width={"3": 16}, pruned_mlp_width={"1": 30}),
]
MODELS = {"llama": tiny_llama, "qwen2": tiny_qwen2, "multi-head": lambda **s: tiny_llama(num_key_value_heads=4, **s)}


def by_hand(model, config):
    """The whole model with zeros in what is removed."""
    model = copy.deepcopy(model)
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        if number in config["pruned_attn_idx"]:
            attention.o_proj.weight.data.zero_()
        if number in config["pruned_mlp_idx"]:
            mlp.down_proj.weight.data.zero_()
        heads = attention.q_proj.weight.shape[0] // HEAD
        groups = attention.k_proj.weight.shape[0] // HEAD
        # keys and values once for each query head, as repeat_kv makes them
        norms = torch.zeros(heads)
        for head in range(heads):
            group = head // (heads // groups)
            for layer_, place in ((attention.q_proj, head), (attention.k_proj, group), (attention.v_proj, group)):
                norms[head] += layer_.weight[place * HEAD : (place + 1) * HEAD].abs().sum()
        group_norms = norms.view(groups, -1).sum(1)
        kept = int(config["pruned_attn_width"][str(number)]) // HEAD // (heads // groups)
        for group in group_norms.argsort(descending=True)[kept:].tolist():
            size = heads // groups * HEAD
            attention.o_proj.weight.data[:, group * size : (group + 1) * size] = 0
        channels = mlp.gate_proj.weight.abs().sum(1) + mlp.up_proj.weight.abs().sum(1)
        lost = channels.argsort(descending=True)[config["pruned_mlp_width"][str(number)] :]
        mlp.down_proj.weight.data[:, lost] = 0
    return model


@pytest.mark.parametrize("config", EXAMPLES, ids=range(len(EXAMPLES)))
@pytest.mark.parametrize("name", MODELS)
def test_the_same_model_as_by_hand(name, config, tmp_path):
    if name == "multi-head":
        config = {
            **config,
            "pruned_attn_width": {n: {16: 24}.get(w, w) for n, w in config["pruned_attn_width"].items()},
        }
    model = MODELS[name](num_hidden_layers=4)
    expected = outputs(by_hand(model, config), INPUTS)
    before = snapshot(model)
    (tmp_path / "pruning_config.json").write_text(json.dumps(config))
    plan = from_pruning_config(config, model)
    assert from_pruning_config(tmp_path / "pruning_config.json", model) == plan
    assert from_pruning_config(str(tmp_path / "pruning_config.json"), model) == plan
    same(before, snapshot(model))
    assert PruningPlan.from_json(plan.to_json()) == plan and str(plan)
    whole = sum(p.numel() for p in model.parameters())
    plan.extract(model)
    close(outputs(model, INPUTS), expected)
    found = sum(p.numel() for p in model.parameters())
    assert (plan.before["parameters"], plan.after["parameters"]) == (whole, found)
    assert plan.config["ratio"] == pytest.approx(1 - found / whole)
    assert len(model.model.layers) == (3 if {2} <= {*config["pruned_attn_idx"]} & {*config["pruned_mlp_idx"]} else 4)


def test_units_in_their_order():
    """Of configurations of models that were not sorted."""
    model = tiny_llama(num_hidden_layers=4)
    plan = from_pruning_config(EXAMPLES[1], model, order="none")
    assert plan.units == {"model.layers.0.self_attn": [0], "model.layers.2.self_attn": [0]}
    with pytest.raises(ValueError, match="^`order` must be "):
        from_pruning_config(EXAMPLES[1], model, order="activation")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_there_and_back(data):
    """What is in a removed part has no width that counts: it comes back as the whole one."""
    model = tiny_llama(num_hidden_layers=4)
    blocks = st.lists(st.integers(0, 3), unique=True, max_size=3).map(sorted)
    config = {"pruned_attn_idx": data.draw(blocks), "pruned_mlp_idx": data.draw(blocks)}
    for name, part, options in (
        ("pruned_attn_width", "pruned_attn_idx", [16, 32]),
        ("pruned_mlp_width", "pruned_mlp_idx", list(range(1, 49))),
    ):
        config[name] = {
            str(n): options[-1] if n in config[part] else data.draw(st.sampled_from(options)) for n in range(4)
        }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = from_pruning_config(config, model)
        again = to_pruning_config(plan, model)
    assert again == config and json.loads(json.dumps(again)) == config
    assert from_pruning_config(again, model) == plan


def test_our_own_plans():
    model = tiny_llama(num_hidden_layers=4)
    batches = [tokens(4, 8)]
    settings_ = {"ratio": 0.35, "mlp_group": 6, "split": (40, 40, 20)}
    plan = prune_structured(model, MultiPrunerConfig(**settings_, order="l1"), batches, extract=False, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = to_pruning_config(plan, model)
    assert config.keys() == WHOLE.keys() and config["pruned_mlp_width"].keys() == {"0", "1", "2", "3"}
    back = from_pruning_config(config, model)
    assert (back.values, back.units) == (plan.values, plan.units)
    assert back.after["parameters"] == plan.after["parameters"]
    other = prune_structured(
        model, MultiPrunerConfig(**settings_, order="magnitude"), batches, extract=False, progress=False
    )
    with pytest.warns(UserWarning, match="largest L1 norm, and this plan was made with the order 'magnitude'"):
        to_pruning_config(other, model)
    depth = prune_structured(model, BlockPrunerConfig(ratio=0.3), batches, extract=False, progress=False)
    with warnings.catch_warnings():  # no units, so that no order matters
        warnings.simplefilter("error")
        back = from_pruning_config(to_pruning_config(depth, model), model)
    assert back.values == depth.values
    with pytest.raises(ValueError, match="^model: the plan is for"):
        to_pruning_config(plan, tiny_llama(num_hidden_layers=3))


def test_entries_that_are_not_there():
    model = tiny_llama(num_hidden_layers=4)
    plan = from_pruning_config({"pruned_mlp_idx": [1]}, model)
    assert plan.values == {"depth:model.layers.1.mlp": 0}
    assert to_pruning_config(plan, model) == changed(pruned_mlp_idx=[1])
    assert from_pruning_config({"pruned_mlp_width": {"2": 24}}, model).values == {"mlp:model.layers.2": 24}
    # a width of what is removed says nothing
    config = {"pruned_mlp_idx": [1], "pruned_mlp_width": {"1": 24}}
    assert from_pruning_config(config, model).values == plan.values


def test_fused_layers():
    """Of queries, keys and values, and of gate and up: the same scores as of separate ones."""
    for name, model in (("phi3", tiny_phi3(num_hidden_layers=3)), ("gpt2", tiny_gpt2(n_layer=3, n_inner=48))):
        config = {"pruned_attn_width": {"1": 16}, "pruned_mlp_width": {"0": 20}}
        plan = from_pruning_config(config, model)
        with torch.no_grad():
            if name == "phi3":
                layers = model.model.layers
                weight = layers[0].mlp.gate_up_proj.weight.abs().sum(1)
                channels = weight[:48] + weight[48:]
                qkv = layers[1].self_attn.qkv_proj.weight.abs().sum(1)
                heads = qkv[:32].view(2, 16).sum(1) + 2 * (qkv[32:48] + qkv[48:]).view(2, 8).sum(1)
            else:
                layers = model.transformer.h
                channels = layers[0].mlp.c_fc.weight.abs().sum(0)
                heads = layers[1].attn.c_attn.weight.abs().sum(0).view(3, 4, 8).sum((0, 2))
        assert (
            plan.units[next(key for key in plan.units if ".0" in key)]
            == channels.argsort(descending=True)[:20].tolist()
        )
        kept = plan.units[next(key for key in plan.units if ".1" in key)]
        assert kept == heads.argsort(descending=True)[: len(kept)].tolist()
        plan.extract(model)
        assert sum(p.numel() for p in model.parameters()) == plan.after["parameters"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "^config: .*entries"),
        ({"pruned_layers": [1]}, "^config: .*entries"),
        ([1, 2], "^config: "),
        ({"pruned_attn_idx": {"0": 1}}, "^config: 'pruned_attn_idx' must be a list, got dict"),
        ({"pruned_mlp_width": [3]}, "^config: 'pruned_mlp_width' must be a dict, got list"),
        ({"pruned_attn_idx": [4]}, "^config: 'pruned_attn_idx' has 4; the model has 4 blocks"),
        ({"pruned_attn_idx": [-1]}, "^config: 'pruned_attn_idx' has -1"),
        ({"pruned_mlp_idx": ["1"]}, "^config: 'pruned_mlp_idx' has '1'"),
        ({"pruned_mlp_idx": [True]}, "^config: 'pruned_mlp_idx' has True"),
        ({"pruned_attn_width": {"0": 8}}, "^config: 'pruned_attn_width' gives block 0 8 .*multiples of 16 up to 32"),
        ({"pruned_attn_width": {"0": 0}}, "^config: 'pruned_attn_width' gives block 0 0"),
        ({"pruned_attn_width": {"0": 48}}, "^config: 'pruned_attn_width' gives block 0 48"),
        ({"pruned_attn_width": {"4": 16}}, "^config: 'pruned_attn_width' has a block '4'"),
        ({"pruned_attn_width": {"x": 16}}, "^config: 'pruned_attn_width' has a block 'x'"),
        ({"pruned_attn_width": {"²": 16}}, "^config: 'pruned_attn_width' has a block '²'"),
        ({"pruned_mlp_width": {"0": 0}}, "^config: 'pruned_mlp_width' gives block 0 0"),
        ({"pruned_mlp_width": {"0": 49}}, "^config: 'pruned_mlp_width' gives block 0 49 .*up to 48"),
        ({"pruned_mlp_width": {"0": -8}}, "^config: 'pruned_mlp_width' gives block 0 -8"),
        ({"pruned_mlp_width": {"0": 8.0}}, "^config: 'pruned_mlp_width' gives block 0 8.0"),
        ({"pruned_mlp_width": {"0": "8"}}, "^config: 'pruned_mlp_width' gives block 0 '8'"),
        ({"pruned_attn_idx": [0, 1, 2, 3], "pruned_mlp_idx": [0, 1, 2, 3]}, "^config: it removes every"),
    ],
    ids=str,
)
def test_bad_configurations(config, message, tmp_path):
    model = tiny_llama(num_hidden_layers=4)
    before = snapshot(model)
    path = tmp_path / "pruning_config.json"
    path.write_text(json.dumps(config))
    for given_ in (path, config) if isinstance(config, dict) else (path,):
        with pytest.raises(ValueError, match=message):
            from_pruning_config(given_, model)
    same(before, snapshot(model))


def test_bad_files_and_models(tmp_path):
    model = tiny_llama(num_hidden_layers=4)
    with pytest.raises(FileNotFoundError):
        from_pruning_config(tmp_path / "none.json", model)
    (tmp_path / "text.json").write_text("hello")
    with pytest.raises(ValueError, match="^config: .*text.json' is not JSON"):
        from_pruning_config(tmp_path / "text.json", model)
    with pytest.raises(ValueError, match="^model: it has 2 stacks"):
        from_pruning_config({"pruned_mlp_idx": [0]}, build("t5"))
    with pytest.raises(ValueError, match="^model: it has adapters"):
        from_pruning_config({"pruned_mlp_idx": [0]}, get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
