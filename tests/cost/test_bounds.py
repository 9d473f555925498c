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
"""Bounds by importance: the nearest subnet that a threshold on the scores gives, by a reference that tries all thresholds, on every
kind of block; and what EFTNAS's own code gets wrong."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from support.elastic_models import build, close, inputs_of
from support.models import outputs, tiny_bert, tiny_llama, tiny_t5
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from peft_elastic import Bounds, ElasticLoraConfig, LatencyModel, bounds_by_importance, sort_by_importance
from peft_elastic.cost import timing
from peft_elastic.cost.counts import CostModel
from peft_elastic.structure import Structure
from peft_elastic.structure.importance import measure_importance, noted_orders
from peft_elastic.structure.space import check_depth, layer_shapes, structural_choices
from peft_elastic.supernet import SearchSpace, Subnet


pytestmark = pytest.mark.filterwarnings("ignore")


def random_scores(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    widths = Structure(model).widths
    return {order.name: torch.rand(width.units, generator=generator) for width in widths for order in width.orders}


def space_of(model, bounds):
    """The search space of a super-network without adapters."""
    structure = Structure(model)
    choices = structural_choices(structure, bounds.elastic_width, bounds.elastic_depth)
    return SearchSpace(choices, layer_shapes(model, structure, choices, {}))


def super_network(model, bounds):
    """With an adapter, of one rank."""
    config = ElasticLoraConfig(
        r=4,
        target_modules="all-linear",
        elastic_width=bounds.elastic_width,
        elastic_depth=bounds.elastic_depth,
        importance="none",
    )
    return get_peft_model(copy.deepcopy(model), config).eval()


# -- every kind of block ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "cost"),
    [
        *((name, "parameters") for name in ("bert", "llama", "vit", "t5", "gated t5", "gpt2", "phi3", "distilbert")),
        *(("llama", "macs"), ("bert", "bytes"), ("t5", "macs")),
    ],
)
def test_each_target_is_a_subnet_of_the_super_network_that_costs_so_much(name, cost):
    model = build(name)
    targets = ("100%", "85%", "75%", "65%")
    bounds = bounds_by_importance(model, random_scores(model), cost, targets, multiple=4)
    space = space_of(model, bounds)
    check_depth(Structure(model), space.min)
    network = super_network(model, bounds)
    assert [target.asked for target in bounds.targets] == list(targets)
    costs = getattr(CostModel(model, space), cost)
    for target in bounds.targets:
        assert target.subnet in space
        assert costs(target.subnet) == target.reached
        network.set_subnet({**network.search_space.max, **target.subnet})
        if cost == "parameters":
            assert sum(p.numel() for p in network.extract_subnet().parameters()) == target.reached
    assert bounds.targets[0].subnet == space.max and bounds.targets[0].reached == bounds.whole
    assert torch.isfinite(outputs(network, inputs_of(name))).all()
    assert Bounds.from_json(bounds.to_json()) == bounds


def test_every_option_is_the_width_of_some_target_or_the_full_one():
    model = tiny_bert(num_hidden_layers=4)
    scores = random_scores(model)
    bounds = bounds_by_importance(model, scores, targets=["90%", "70%", "50%"])
    space = space_of(model, bounds)
    for choice in space:
        reached = {target.subnet[choice.key] for target in bounds.targets}
        assert set(choice.options) == reached | {choice.options[0]} and len(choice.options) > 1
        assert choice.options[0] == {"heads": 4, "mlp": 48, "depth": 1}[choice.kind]
        assert choice.kind != "mlp" or not any(option % 8 for option in choice.options)
    keys = {f"{kind}:bert.encoder.layer.{i}" for kind in ("heads", "mlp") for i in range(4)}
    assert {choice.key for choice in space} <= keys  # and what no target narrows is not elastic
    only = bounds_by_importance(model, scores, targets=["100%"])
    assert (only.elastic_width, only.elastic_depth, only.targets[0].subnet) == (None, None, Subnet({}))


def test_kinds_that_are_not_named_stay_whole():
    model = tiny_llama(num_attention_heads=8, num_key_value_heads=8)
    scores = random_scores(model)
    every = (("heads", "mlp"), ("heads",), ("mlp",))
    both, heads, mlp = (bounds_by_importance(model, scores, targets=["80%"], kinds=kinds) for kinds in every)
    assert [list(bounds.elastic_width) for bounds in (both, heads, mlp)] == [["heads", "mlp"], ["heads"], ["mlp"]]
    channels = {name: score for name, score in scores.items() if not name.endswith("self_attn")}
    assert bounds_by_importance(model, channels, targets=["80%"], kinds=("mlp",)) == mlp


# -- the nearest of all thresholds -------------------------------------------------------------------------------------

LAYERS, GROUPS, CHANNELS = 3, 2, 48


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(num_hidden_layers=LAYERS)


def reference(scores, threshold, multiple, skip_below, kept):
    """Multiply-accumulates of a Llama of which only what scores as much is there, by hand. `kept` does not vanish."""
    macs = 96 * 32  # lm_head
    there = []
    for layer in range(LAYERS):
        for name, units, step, of_unit in (
            (f"model.layers.{layer}.self_attn", GROUPS, 1, 8 * 32 * (2 + 1 + 1 + 2)),
            (f"model.layers.{layer}", CHANNELS, multiple if CHANNELS % multiple == 0 else 1, 3 * 32),
        ):
            count = sum(score >= threshold for score in scores[name].tolist())
            if count == 0 or count < skip_below * units:
                if skip_below and name != kept:
                    continue
                count = max(count, 1)
            elif skip_below:
                there.append(name)
            macs += min(math.ceil(count / step) * step, units) * of_unit
    return macs, there


def all_costs(scores, multiple, skip_below):
    thresholds = sorted({value for score in scores.values() for value in score.tolist()}, reverse=True)
    first = (reference(scores, threshold, multiple, skip_below, "")[1] for threshold in thresholds)
    kept = next((there[0] for there in first if there), "")
    return [reference(scores, threshold, multiple, skip_below, kept)[0] for threshold in (math.inf, *thresholds)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([1, 3, 20, 10**6]),
    spread=st.sampled_from([1e-9, 1.0, 1e6]),
    multiple=st.sampled_from([1, 5, 8, 16]),
    skip_below=st.sampled_from([0, 0.02, 0.1, 0.3]),
    shares=st.lists(st.integers(0, 100), min_size=1, max_size=6, unique=True),
)
def test_what_is_reached_is_the_nearest_of_all_thresholds(llama, seed, levels, spread, multiple, skip_below, shares):
    rng = np.random.default_rng(seed)
    names = {order.name: width.units for width in Structure(llama).widths for order in width.orders}
    scores = {
        name: torch.tensor(rng.integers(-levels, levels, units) * spread, dtype=torch.float32)
        for name, units in names.items()
    }
    costs = all_costs(scores, multiple, skip_below)
    least, whole = min(costs), max(costs)
    wanted = [least + share / 100 * (whole - least) for share in shares if whole > least or share == 100]
    bounds = bounds_by_importance(llama, scores, targets=wanted or [whole], multiple=multiple, skip_below=skip_below)
    assert bounds.whole == whole == costs[-1]
    for value, target in zip(wanted or [whole], bounds.targets, strict=True):
        nearest = min(costs, key=lambda cost: (abs(cost - value), cost))
        assert (target.asked, target.cost, target.reached) == (None, value, nearest)
        assert target.is_close == (abs(nearest - value) <= 0.01 * value)
    for widths in (bounds.elastic_width or {}).values():
        for options in widths.values():
            assert len(options) > 1 and options == sorted(set(options), reverse=True)
    assert bounds == Bounds.from_json(bounds.to_json())
    assert bounds == bounds_by_importance(  # deterministic
        llama, dict(reversed(scores.items())), targets=wanted or [whole], multiple=multiple, skip_below=skip_below
    )


def test_all_targets_are_there_and_both_ends_are_exact():
    """EFTNAS's `range(4400, 11500, step)` of five targets has four."""
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    whole = bounds_by_importance(model, random_scores(model), targets=["100%"], sequence_length=128).whole
    targets = np.linspace(128 * whole, 4400e6, 5) / 128
    bounds = bounds_by_importance(model, random_scores(model), targets=targets, sequence_length=128)
    assert [target.cost for target in bounds.targets] == targets.tolist()
    assert bounds.targets[0].reached == whole
    # where EFTNAS stops
    assert all(abs(target.reached - target.cost) * 128 < 100e6 and target.is_close for target in bounds.targets)
    assert len({target.subnet for target in bounds.targets}) == 5
    assert {1, 2, 3, 4, 5} >= {len(options) for w in bounds.elastic_width.values() for options in w.values()}


@pytest.mark.parametrize("scale, shift", [(1e6, 0.0), (1e-6, 0.0), (4.0, -100.0), (1.0, 1000.0)])
def test_scores_may_be_of_any_size(llama, scale, shift):
    """EFTNAS looks for its threshold from -1 to 1."""
    scores = {name: (score * 2**10).round() / 2**10 for name, score in random_scores(llama).items()}
    moved = {name: score.double() * scale + shift for name, score in scores.items()}
    assert bounds_by_importance(llama, moved) == bounds_by_importance(llama, scores)


def test_a_target_between_two_jumps_gives_the_nearest_and_says_so(llama):
    equal = {name: torch.ones_like(score) for name, score in random_scores(llama).items()}
    bounds = bounds_by_importance(llama, equal, targets=["100%", "65%", "40%"])
    whole, smallest = bounds.whole, 96 * 32 + 8 * 32 * 6
    assert [target.reached for target in bounds.targets] == [whole, whole, smallest]
    assert [target.is_close for target in bounds.targets] == [True, False, False]
    middle = bounds_by_importance(llama, equal, targets=[(whole + smallest) / 2])
    assert middle.targets[0].reached == smallest  # the cheaper of two
    lines = str(bounds).splitlines()
    assert not lines[1].endswith("the nearest")
    assert lines[2].split()[:3] == ["65%", f"{0.65 * whole:,.0f}", f"{whole:,.0f}"]
    assert lines[2].endswith(f"100.0%  +{1 / 0.65 - 1:.1%}, the nearest") and lines[3].endswith("the nearest")


# -- the same units that sorting puts first ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit"])
def test_what_is_kept_are_the_first_units_of_the_sorted_model(name):
    """EFTNAS keeps the union of what is above the threshold in q, k, v and o, and sorts by a sum over q, k and v."""
    model = build(name)
    structure = Structure(model)
    scores = measure_importance(model, structure.widths, "magnitude")
    bounds = bounds_by_importance(model, scores, targets=["80%", "60%"], multiple=1, skip_below=0)
    ordered = copy.deepcopy(model)
    sort_by_importance(ordered, scores)
    assert noted_orders(ordered)
    for target in bounds.targets:
        first, others = [], []
        for width in structure.widths:
            (order,) = width.orders
            units = target.subnet.get(width.key, width.full) // width.unit
            taken = noted_orders(ordered)[order.name][:units]
            first += scores[order.name][taken].tolist() if units > 1 else []  # one stays, whatever it scores
            others += scores[order.name][[i for i in range(width.units) if i not in taken.tolist()]].tolist()
        assert others and min(first) > max(others)
    # sorted scores of the sorted model are the same ones
    in_order = {name: score.sort(descending=True).values for name, score in scores.items()}
    assert bounds_by_importance(ordered, in_order, targets=["80%", "60%"], multiple=1, skip_below=0) == bounds


def test_all_layers_of_a_unit_have_a_part_in_it():
    """EFTNAS sorts channels by the first layer alone."""
    model = tiny_bert(num_hidden_layers=1)
    widths = Structure(model).widths
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.output.dense.weight[:, 40:] *= 100
        layer.attention.output.dense.weight[:, 24:] *= 100
    scores = measure_importance(model, widths, "magnitude")
    assert set(scores["bert.encoder.layer.0"].topk(8).indices.tolist()) == set(range(40, 48))
    assert scores["bert.encoder.layer.0.attention.self"].argmax() == 3


def test_heads_of_32():
    model = tiny_bert(hidden_size=96, num_attention_heads=3, intermediate_size=384, num_hidden_layers=3)
    assert model.bert.encoder.layer[0].attention.self.attention_head_size == 32
    bounds = bounds_by_importance(model, random_scores(model), "parameters", ["80%", "60%", "50%"])
    network = super_network(model, bounds)
    assert any({1, 2} & set(options) for options in bounds.elastic_width["heads"].values())
    for target in bounds.targets:
        small = network.extract_subnet({**network.search_space.max, **target.subnet})
        assert sum(p.numel() for p in small.parameters()) == target.reached


def test_other_widths_are_refused_and_the_largest_subnet_is_the_dense_model(llama):
    bounds = bounds_by_importance(llama, random_scores(llama))
    network = super_network(llama, bounds)
    network.set_subnet("max")
    close(outputs(network, inputs_of("llama")), outputs(llama, inputs_of("llama")))
    key = "mlp:model.layers.1"
    options = network.search_space[key].options
    assert options[0] == CHANNELS
    other = next(width for width in range(8, CHANNELS) if width not in options)
    with pytest.raises(ValueError, match=rf"`subnet\['{key}'\]` must be one of \[48, .*got {other}"):
        network.set_subnet({**network.search_space.max, key: other})


def test_layers_of_4096_by_11008():
    """`torch.quantile` takes no more than 16.7 million elements."""
    with torch.device("meta"):
        settings = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 64}
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **settings))
    bounds = bounds_by_importance(model, random_scores(model), targets=["70%", "50%"])
    assert all(target.is_close for target in bounds.targets)
    assert all(option % 8 == 0 for options in bounds.elastic_width["mlp"].values() for option in options)


def test_channels_that_are_no_multiple_are_cut_at_any_number():
    model = tiny_llama(intermediate_size=50)
    targets = [0.9, 0.7, 0.5, 0.35]
    bounds = bounds_by_importance(model, random_scores(model), targets=[f"{share:.0%}" for share in targets])
    assert any(option % 8 for options in bounds.elastic_width["mlp"].values() for option in options)
    fours = bounds_by_importance(tiny_llama(), random_scores(tiny_llama()), multiple=16)
    assert not any(option % 16 for options in fours.elastic_width["mlp"].values() for option in options)


# -- what vanishes -------------------------------------------------------------------------------------------------------


def graded(model, low):
    """Scores of 1 to 2, and of 0 to 0.1 where `low` says so of the name of an order."""
    return {n: s * 0.1 if low(n) else 1 + s for n, s in random_scores(model).items()}


def test_parts_and_blocks_that_vanish_become_skippable(llama):
    scores = graded(
        llama, lambda name: name in ("model.layers.0.self_attn", "model.layers.2", "model.layers.2.self_attn")
    )
    block = 2 * 1536 + 48 * 96
    whole = 3 * block + 96 * 32
    bounds = bounds_by_importance(llama, scores, targets=[whole, whole - block - 2 * 1536])
    assert bounds.targets[1].reached == bounds.targets[1].cost
    assert bounds.elastic_depth == ["model.layers.0.attention", "model.layers.2"] and bounds.elastic_width is None
    assert bounds.targets[1].subnet == {"depth:model.layers.0.attention": 0, "depth:model.layers.2": 0}
    network = super_network(llama, bounds)
    network.set_subnet({**network.search_space.max, **bounds.targets[1].subnet})
    small = network.extract_subnet()
    assert len(small.model.layers) == 2


def test_what_a_target_narrows_a_smaller_one_may_skip(llama):
    scores = graded(llama, lambda name: name == "model.layers.2")
    whole = 3 * (2 * 1536 + 48 * 96) + 96 * 32
    bounds = bounds_by_importance(llama, scores, targets=[whole - 24 * 96, whole - 48 * 96])
    assert [target.off for target in bounds.targets] == [0, 0]
    assert bounds.elastic_width == {"mlp": {"model.layers.2": [48, 24]}}
    assert bounds.elastic_depth == ["model.layers.2.mlp"]
    keys = "mlp:model.layers.2", "depth:model.layers.2.mlp"
    assert [target.subnet for target in bounds.targets] == [dict(zip(keys, (24, 1))), dict(zip(keys, (48, 0)))]


def test_nothing_is_skipped_with_zero_and_more_with_more(llama):
    scores = random_scores(llama)
    none = bounds_by_importance(llama, scores, targets=["45%"], skip_below=0)
    assert none.elastic_depth is None
    least = 3 * (1536 + 8 * 96) + 96 * 32
    smallest = bounds_by_importance(llama, scores, targets=[least], skip_below=0)
    assert smallest.targets[0].reached == least
    assert {tuple(o) for o in smallest.elastic_width["mlp"].values()} == {(48, 8)}
    half = bounds_by_importance(llama, scores, targets=["45%"], skip_below=0.5)
    assert half.elastic_depth and all(min(o) >= 24 for o in half.elastic_width.get("mlp", {}).values())


@pytest.mark.parametrize("strongest", ["model.layers.1.self_attn", "model.layers.2"])
def test_a_stack_is_never_emptied(llama, strongest):
    scores = graded(llama, lambda name: name != strongest)
    least = 96 * 32 + (1536 if strongest.endswith("self_attn") else 8 * 96)
    bounds = bounds_by_importance(llama, scores, targets=["100%", least])
    space = space_of(llama, bounds)
    assert bounds.targets[1].reached == least
    check_depth(Structure(llama), space.min)
    assert (
        "model.layers.0" in bounds.elastic_depth and strongest.removesuffix(".self_attn") not in bounds.elastic_depth
    )
    super_network(llama, bounds).set_subnet("min")


def test_all_of_one_kind_may_go_where_the_other_stays(llama):
    scores = random_scores(llama)
    bounds = bounds_by_importance(llama, scores, targets=[3 * 2 * 1536 + 96 * 32], kinds=("mlp",))
    assert bounds.elastic_depth == [f"model.layers.{i}.mlp" for i in range(3)]


def test_a_block_without_attention_vanishes_with_its_mlp(llama):
    config = ElasticLoraConfig(r=2, elastic_depth=["0.attention"], importance="none", target_modules=["up_proj"])
    pruned = get_peft_model(copy.deepcopy(llama), config).extract_subnet("min")
    scores = graded(pruned, lambda name: name == "model.layers.0")
    assert "model.layers.0.self_attn" not in scores
    bounds = bounds_by_importance(pruned, scores, targets=[2 * (2 * 1536 + 48 * 96) + 96 * 32])
    assert bounds.elastic_depth == ["model.layers.0"] and bounds.elastic_width is None


def test_one_group_of_heads_vanishes_or_stays():
    model = tiny_llama(num_key_value_heads=1)
    scores = graded(model, lambda name: name == "model.layers.1.self_attn")
    attention = 32 * (4 + 1 + 1 + 4) * 8
    whole = 2 * (attention + 48 * 96) + 96 * 32
    bounds = bounds_by_importance(model, scores, targets=[whole, whole - attention])
    assert (bounds.elastic_width, bounds.elastic_depth) == (None, ["model.layers.1.attention"])
    assert [target.off for target in bounds.targets] == [0, 0]


# -- heads that are tied in a stack ------------------------------------------------------------------------------------


def test_tied_heads_are_cut_by_the_mean_of_the_largest_scores():
    model = tiny_t5()
    names = [
        order.name for width in Structure(model).widths if width.name == "decoder.block" for order in width.orders
    ]
    assert len(names) == 3  # the self-attentions together, and two cross-attentions
    scores = graded(model, lambda name: False)
    # the second largest have the mean 0.8, whatever their places; what else there is stays
    scores[names[0]] = torch.tensor([0.1, 5.0, 0.3, 0.9])
    scores[names[1]] = torch.tensor([0.7, 0.2, 5.0, 0.1])
    scores[names[2]] = torch.tensor([5.0, 0.1, 0.2, 0.8])
    structure = Structure(model)
    finest = structural_choices(structure, {"heads": {"decoder.block": [4, 3, 2, 1]}}, None)
    costs = CostModel(model, SearchSpace(finest, layer_shapes(model, structure, finest, {})))
    for kept, lower in ((2, 0.79), (1, 0.81)):
        # the encoder's heads between the second and the first of the decoder's
        scores["encoder.block"] = torch.full((4,), lower)
        bounds = bounds_by_importance(model, scores, targets=[costs.macs({"heads:decoder.block": kept})])
        assert bounds.targets[0].is_close
        assert bounds.targets[0].subnet == {"heads:decoder.block": kept}
        assert bounds.elastic_width == {"heads": {"decoder.block": [4, kept]}} and bounds.elastic_depth is None


def test_tied_heads_keep_one_where_the_first_block_cannot_be_skipped():
    model = tiny_t5()
    structure = Structure(model)
    choices = structural_choices(
        structure, {"heads": {f"{part}.block": [4, 1] for part in ("encoder", "decoder")}}, None
    )
    space = SearchSpace(choices, layer_shapes(model, structure, choices, {}))
    least = CostModel(model, space).macs(space.min)
    bounds = bounds_by_importance(model, random_scores(model), targets=["100%", least], kinds=("heads",))
    assert bounds.targets[1].reached == least and space_of(model, bounds) == space


# -- costs ---------------------------------------------------------------------------------------------------------------


def test_attention_products_count_with_a_sequence_length(llama):
    scores = random_scores(llama)
    without = bounds_by_importance(llama, scores, targets=["100%"])
    bounds = bounds_by_importance(llama, scores, targets=["100%", "60%"], sequence_length=100)
    assert bounds.whole == without.whole + 3 * 2 * 100 * 32 and bounds.sequence_length == 100
    space = space_of(llama, bounds)
    subnet = bounds.targets[1].subnet
    assert bounds.targets[1].reached == CostModel(llama, space, sequence_length=100).macs(subnet)


def test_scores_for_each_unit_of_cost(llama):
    of_unit = {n: 1536.0 if n.endswith("self_attn") else 96.0 for n in random_scores(llama)}
    scores = {name: (score * 2**10).round() / 2**10 for name, score in random_scores(llama).items()}
    dear = {name: score.double() * of_unit[name] for name, score in scores.items()}
    settings = {"targets": ["80%", "50%"], "multiple": 1}
    assert bounds_by_importance(llama, dear, per="cost", **settings) == bounds_by_importance(llama, scores, **settings)
    assert bounds_by_importance(llama, scores, per="cost", **settings) != bounds_by_importance(
        llama, scores, **settings
    )


def test_latencies(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "timings_file", lambda: tmp_path / "timings.json")
    monkeypatch.setattr(timing, "_known", None)
    monkeypatch.setattr(timing, "_SECONDS", 0.01)
    monkeypatch.setattr(LatencyModel.of_space.__func__, "__defaults__", ("forward", "dense", "bf16", 0.0))
    monkeypatch.setattr(timing, "_MAX_COPIES_BYTES", 2**22)
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    module_state = outputs(llama, inputs_of("llama"))
    bounds = bounds_by_importance(
        llama,
        random_scores(llama),
        "latency",
        ["100%", "70%"],
        latency_inputs={"input_ids": (2, 24)},
        multiple=16,
    )
    assert bounds.cost == "latency" and 0 < bounds.targets[1].reached < bounds.whole < 1
    assert str(bounds).splitlines()[0].split()[1] == "ms"
    assert bounds.targets[1].subnet in space_of(llama, bounds)
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())
    assert torch.equal(outputs(llama, inputs_of("llama")), module_state)


# -- the model, and files --------------------------------------------------------------------------------------------------


def test_adapters_do_not_count_and_the_model_stays_as_it_is(llama):
    scores = random_scores(llama)
    config = ElasticLoraConfig(r=4, elastic_width={"mlp": [1.0, 0.5]}, target_modules="all-linear", importance="none")
    adapted = get_peft_model(copy.deepcopy(llama), config)
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    given = {name: score.clone() for name, score in scores.items()}
    assert bounds_by_importance(adapted, scores) == bounds_by_importance(llama, scores)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapted.state_dict().items())
    assert all(torch.equal(given[name], score) for name, score in scores.items())
    adapted.set_subnet("min")
    with pytest.raises(ValueError, match="A part of `model` is not active"):
        bounds_by_importance(adapted, scores)


def test_files(llama, tmp_path):
    bounds = bounds_by_importance(llama, random_scores(llama), targets=["100%", 20000, "30%"], sequence_length=8)
    bounds.save(tmp_path / "bounds.json")
    assert Bounds.load(tmp_path / "bounds.json") == bounds
    bounds.check(llama)
    for other in (tiny_llama(), tiny_llama(num_hidden_layers=LAYERS, intermediate_size=56), tiny_bert()):
        with pytest.raises(ValueError, match=r"`model` \(.*\) has other blocks"):
            bounds.check(other)
    data = json.loads(bounds.to_json())
    name = next(iter(data["elastic_width"]["mlp"]))
    for change, message in (
        (lambda d: d["elastic_width"]["mlp"].update({name: [8, 48]}), "options that fall strictly"),
        (lambda d: d.update(elastic_width={"channels": {name: [8]}}), "`elastic_width` must be a dict"),
        (lambda d: d.update(elastic_depth=[]), "`elastic_depth` must be"),
        (lambda d: d.update(cost="flops"), "'cost' must be one of"),
        (lambda d: d.update(whole=0), "must be positive"),
        (lambda d: d["targets"][0].pop("reached"), "lacks the field 'reached'"),
        (lambda d: d.update(more=1), "unknown field 'more'"),
        (lambda d: d.update(version=2), "of version 2"),
    ):
        damaged = copy.deepcopy(data)
        change(damaged)
        (tmp_path / "damaged.json").write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=rf"damaged\.json' is not a bounds file: .*{message}"):
            Bounds.load(tmp_path / "damaged.json")
        with pytest.raises(ValueError, match=message):
            Bounds.from_json(json.dumps(damaged))


# -- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"targets": ["100%", "3%"]},
            r"`targets` has '3%', .* MACs per token, .* out of reach: the subnets cost .* to 26,112",
        ),
        ({"targets": ["101%"]}, "`targets` has '101%', 26,373.1 MACs per token, which is out of reach"),
        ({"targets": [0.5]}, "`targets` has 0.5, 0.5 MACs .* to 26,112. A share is a string: '50%'."),
        ({"targets": ["50%", 13056]}, "`targets` must differ, and 13056 is there twice"),
        ({"targets": []}, r"`targets` must be a list such as \['100%', '50%'\], got \[\]"),
        ({"targets": "50%"}, "`targets` must be a list .*, got '50%'"),
        ({"targets": 5}, "`targets` must be a list .*, got 5"),
        ({"targets": ["half"]}, "`targets` must be shares of the whole model .*, got 'half'"),
        ({"targets": ["0.5"]}, "`targets` must be shares .*, got '0.5'"),
        ({"targets": [math.nan]}, "`targets` must be shares .*, got nan"),
        ({"targets": [-1]}, "`targets` must be shares .*, got -1"),
        ({"targets": [True]}, "`targets` must be shares .*, got True"),
        ({"targets": [None]}, "`targets` must be shares .*, got None"),
        ({"cost": "flops"}, "`cost` must be 'macs', 'parameters', 'bytes' or 'latency', got 'flops'"),
        ({"kinds": ("rank",)}, r"`kinds` must be \('heads', 'mlp'\) or one of them, got \('rank',\)"),
        ({"kinds": ()}, r"`kinds` must be .*, got \(\)"),
        ({"kinds": "heads"}, "`kinds` must be .*, got 'heads'"),
        ({"per": "head"}, "`per` must be 'unit' or 'cost', got 'head'"),
        ({"multiple": 0}, "`multiple` must be a whole number >= 1, got 0"),
        ({"skip_below": 1}, "`skip_below` must be a share from 0 to below 1, got 1"),
        ({"skip_below": -0.1}, "`skip_below` must be a share"),
        ({"sequence_length": 0}, "`sequence_length` must be a whole number >= 1, or None, got 0"),
        ({"sequence_length": 8, "cost": "bytes"}, "`sequence_length` is for `cost='macs'`, not for 'bytes'"),
        ({"cost": "latency"}, "`latency_inputs` must be given with `cost='latency'`"),
        (
            {"latency_inputs": {"input_ids": (1, 8)}},
            "`latency_inputs` must be given with .* and with no other, got 'macs'",
        ),
        ({"scores": None}, "`scores` must be a dict"),
        (
            {"scores": {}},
            "`scores` must be of all heads and channels .*; 'model.layers.0.self_attn', .* and 3 more are missing",
        ),
    ],
)
def test_bad_arguments(llama, change, message):
    arguments = {"model": llama, "scores": random_scores(llama), **change}
    with pytest.raises(ValueError, match=message):
        bounds_by_importance(**arguments)


def test_scores_of_another_model(llama):
    scores = random_scores(llama)
    with pytest.raises(ValueError, match="`scores` are those of another model: it has no 'model.layers.3.self_attn'"):
        bounds_by_importance(llama, random_scores(tiny_llama(num_hidden_layers=4)))
    with pytest.raises(ValueError, match="another model: it has no 'bert.encoder.layer.0"):
        bounds_by_importance(llama, random_scores(tiny_bert()))
    with pytest.raises(ValueError, match=r"another model: 'model.layers.0' has 48 units, .* shape \(56,\)"):
        bounds_by_importance(llama, random_scores(tiny_llama(num_hidden_layers=LAYERS, intermediate_size=56)))
    with pytest.raises(ValueError, match=r"another model: 'model.layers.1' has 48 units, .* shape \(48, 1\)"):
        bounds_by_importance(llama, scores | {"model.layers.1": torch.ones(48, 1)})
    with pytest.raises(ValueError, match=r"`scores\['model.layers.1'\]` must be 48 numbers, got 'high'"):
        bounds_by_importance(llama, scores | {"model.layers.1": "high"})
    for value in (math.nan, math.inf):
        bad = scores["model.layers.1"].clone()
        bad[5] = value
        with pytest.raises(ValueError, match="`scores` must be finite numbers, those of 'model.layers.1' are not"):
            bounds_by_importance(llama, scores | {"model.layers.1": bad})


def test_models_without_heads_or_channels(llama):
    with pytest.raises(ValueError, match="no block of the model has a known layout with that"):
        bounds_by_importance(torch.nn.Linear(4, 4), {})
