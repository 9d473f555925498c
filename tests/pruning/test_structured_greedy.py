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
"""The greedy loop against a naive one that evaluates every candidate of every step by a pass of the whole model, and with metrics
for which the right plan is known."""

import copy
import json
import math
import multiprocessing
import os
import random
import signal
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.elastic_models import blocks_of
from support.masked_states import calibration_of, deeper, loss_by_hand, same, snapshot, without
from support.models import tiny_llama, tokens
from tqdm import tqdm

from peft_elastic import (
    BlockPrunerConfig,
    MultiPrunerConfig,
    PruningPlan,
    TwoStagePrunerConfig,
    WidthPrunerConfig,
    prune_structured,
    sort_by_importance,
)
from peft_elastic.common.journal import Journal
from peft_elastic.pruning.structured.units import GRANULARITIES, Granularity
from peft_elastic.structure.narrow import is_skipped


def plan_of(model, config, calibration=None, **kwargs):
    return prune_structured(model, config, calibration, **{"extract": False, "progress": False, **kwargs})


def removals(plan):
    return [(row["removed"], row["left"]) for row in plan.history]


# -- the naive loop ------------------------------------------------------------------------------------------------------

# modules of a block that are its attention and its MLP, and the layers of them that read heads and channels
LLAMA = ("self_attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")
LAYERS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "gemma": LLAMA,
    "gpt2": (("attn", "attn.c_proj"), ("mlp", "mlp.c_proj")),
    "opt": (("self_attn", "self_attn.out_proj"), ("fc1", "fc2")),
    "bert": (("attention", "attention.output.dense"), ("intermediate", "output.dense")),
}


class Naive:
    """Pruning as the papers describe it, in lists."""

    def __init__(self, name, model, batches, mlp_group=8, per_group=None):
        self.name, self.model, self.batches, self.mlp_group = name, model, batches, mlp_group
        self.blocks = list(blocks_of(name, model))
        self.per_group = per_group or (2 if name in ("llama", "qwen2", "gemma") else 1)
        self.state, self.history, self.evaluations = {}, [], 0

    def there(self, state, block, part):
        return state.get(f"depth:{block}", 1) and state.get(f"depth:{block}.{part}", 1)

    def cost(self, state):
        """Parameters, counted in the whole ones: every head and channel has the same share of its layers."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        for block in self.blocks:
            module = self.model.get_submodule(block)
            everything = sum(p.numel() for p in module.parameters())
            if not self.there(state, block, "attention") and not self.there(state, block, "mlp"):
                total -= everything
                continue
            for kind, part, full, (path, reader) in zip(
                ("heads", "mlp"), ("attention", "mlp"), (4, 48), LAYERS[self.name]
            ):
                own = {id(p): p.numel() for p in module.get_submodule(path).parameters()}
                own |= {id(p): p.numel() for p in module.get_submodule(reader).parameters()}
                bias = getattr(module.get_submodule(reader), "bias", None)
                if self.name == "bert":  # with their norms, which are skipped too but do not get narrower
                    norm = module.get_submodule(
                        "attention.output.LayerNorm" if part == "attention" else "output.LayerNorm"
                    )
                    norms = {id(p): p.numel() for p in norm.parameters()}
                    own |= norms
                else:
                    norms = {}
                share = sum(own.values()) - sum(norms.values()) - (0 if bias is None else bias.numel())
                if not self.there(state, block, part):
                    total -= sum(own.values())
                else:
                    total -= share * (full - state.get(f"{kind}:{block}", full)) // full
        return total

    def value(self, state):
        self.evaluations += 1
        with without(self.model, self.name, state):
            return loss_by_hand(self.model, self.name, self.batches)

    def moves(self, stage):
        found = []
        for block in self.blocks:
            parts = [part for part in ("attention", "mlp") if self.there(self.state, block, part)]
            if stage == "blocks" and parts:
                found.append((f"depth:{block}", 0))
            for part in parts:
                if stage in ("sub-blocks", f"{part}s"):
                    found.append((f"depth:{block}.{part}", 0))
            heads, channels = self.state.get(f"heads:{block}", 4), self.state.get(f"mlp:{block}", 48)
            if stage == "heads" and "attention" in parts and heads > self.per_group:
                found.append((f"heads:{block}", heads - self.per_group))
            if stage == "channels" and "mlp" in parts and channels > self.mlp_group:
                found.append((f"mlp:{block}", channels - self.mlp_group))
        # something must stay
        return [
            move
            for move in found
            if any(
                self.there({**self.state, move[0]: move[1]}, b, part)
                for b in self.blocks
                for part in ("attention", "mlp")
            )
        ]

    def run(self, stages, target, auto=False):
        value = self.value(self.state)
        while True:
            now = self.cost(self.state)
            best = None
            for stage in stages:
                for move in self.moves(stage):
                    state = {**self.state, move[0]: move[1]}
                    cost = self.cost(state)
                    if abs(cost - target) < now - target and cost < now:
                        found = self.value(state)
                        harm = (found - value) / ((now - cost) if auto else 1)
                        if best is None or harm < best[0]:
                            best = harm, found, move, state
            if best is None:
                return
            _, value, move, self.state = best
            self.history.append((*move, value))

    def prune(self, ratio, stages, split):
        whole = self.cost({})
        target = whole * (1 - ratio)
        if split == "auto":
            self.run(stages, target, auto=True)
            return
        shares = [share / sum(split) for share in split]
        for number, stage in enumerate(stages):
            last = number == len(stages) - 1
            self.run([stage], target if last else whole - sum(shares[: number + 1]) * (whole - target))
        for stage in reversed(stages):
            self.run([stage], target)


METHODS = {
    "multipruner": (MultiPrunerConfig, {}),
    "blockpruner": (BlockPrunerConfig, {}),
    "width": (WidthPrunerConfig, {}),
    "blocks": (BlockPrunerConfig, {"stages": ("blocks", "channels"), "split": (2, 1), "ratio": 0.4}),
    "parts": (BlockPrunerConfig, {"stages": ("mlps", "attentions"), "split": (1, 1)}),
    "auto": (MultiPrunerConfig, {"split": "auto"}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_the_same_as_the_naive_loop(name, method):
    compare(name, method, seed=1, order="none")


@pytest.mark.parametrize(("name", "seed"), [("llama", 2), ("qwen2", 3), ("gemma", 4), ("bert", 5)])
def test_the_same_as_the_naive_loop_with_sorted_units(name, seed):
    compare(name, "multipruner", seed, order="magnitude")


def compare(name, method, seed, order):
    model = deeper(name, 3, seed=seed)
    batches = calibration_of(name)[:1]
    cls, own = METHODS[method]
    config = cls(**{"ratio": 0.25, "slack": math.inf, "order": order, "mlp_group": 8, **own})
    reference = copy.deepcopy(model)
    if order != "none":
        sort_by_importance(reference, order)
    naive = Naive(name, reference, batches)
    naive.prune(config.ratio, config.stages, config.split)
    plan = plan_of(model, config, batches)
    assert removals(plan) == [entry[:2] for entry in naive.history] and len(plan.history) >= 2
    shown = math.log if plan.metric == "perplexity" else float
    assert [shown(row["value"]) for row in plan.history] == pytest.approx([v for *_, v in naive.history], rel=1e-5)
    assert plan.after["parameters"] == naive.cost(naive.state)
    assert [row["parameters"] for row in plan.history][-1] == plan.after["parameters"]
    assert shown(plan.after[plan.metric]) == pytest.approx(naive.history[-1][2], rel=1e-5)
    # what was recalled is cheap, and nothing was left out
    assert plan.evaluations >= naive.evaluations - len(config.stages) * 2
    # left over from one setting to the next, this would be another plan
    assert plan_of(model, config, batches).values == plan.values


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_fewer_evaluations_for_nearly_the_same(name):
    model, batches = deeper(name, 6), calibration_of(name)
    settings_ = {"ratio": 0.35, "mlp_group": 8, "stages": ("sub-blocks", "channels", "heads")}
    lazy = plan_of(model, MultiPrunerConfig(**settings_), batches)
    eager = plan_of(model, MultiPrunerConfig(**settings_, slack=math.inf), batches)
    none = plan_of(model, MultiPrunerConfig(**settings_, slack=0), batches)
    assert none.evaluations <= lazy.evaluations < eager.evaluations
    assert lazy.block_passes < eager.block_passes < eager.plain_block_passes
    for plan in (lazy, none):
        loss, best = plan.after[plan.metric], eager.after[eager.metric]
        if plan.metric == "perplexity":
            loss, best = math.log(loss), math.log(best)
        # 2% of the loss; the models are random, so that no candidate is much worse than another
        assert loss < best * 1.02
        assert abs(plan.after["parameters"] - eager.after["parameters"]) < 0.02 * plan.before["parameters"]


# -- metrics whose best plan is known --------------------------------------------------------------------------------------


def harm_of(model, harm):
    """The sum over everything that is not there. Channels and heads cost more and more, a quarter after the other."""
    total = 0.0
    for number, layer in enumerate(model.model.layers):
        for part, module in (("attention", layer.self_attn), ("mlp", layer.mlp)):
            if is_skipped(layer) or is_skipped(module):
                total += harm[number, part]
        if not (is_skipped(layer) or is_skipped(layer.mlp)):
            lost = (48 - layer.mlp.down_proj.weight.shape[1]) // 12
            total += sum(harm[number, "channels"] * (1 + quarter) for quarter in range(lost))
    return total


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    harms=st.permutations([float(2**power) for power in range(12)]),
    slack=st.sampled_from([0, 0.5, math.inf]),
    mode=st.sampled_from(["min", "max"]),
)
def test_known_harms(harms, slack, mode):
    """What is removed is known in advance, by the harm of each unit alone: sub-blocks one by one, cheapest first."""
    model = tiny_llama(num_hidden_layers=4)
    keys = [(number, part) for number in range(4) for part in ("attention", "mlp", "channels")]
    harm = dict(zip(keys, harms))
    sign = 1 if mode == "min" else -1
    called = []

    def quality(model):
        assert not model.training and not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        called.append(1)
        return sign * harm_of(model, harm)

    config = BlockPrunerConfig(ratio=0.3, order="none", slack=slack)
    plan = plan_of(model, config, metric=quality, mode=mode)
    assert plan.metric == "quality" and plan.evaluations >= len(called)
    cheapest = sorted((h, n, part) for (n, part), h in harm.items() if part != "channels")
    order = [f"depth:model.layers.{n}.{part}" for _, n, part in cheapest]
    gone = [row["removed"] for row in plan.history]
    # in that order, until one is too large for the rest; then only smaller ones are left
    first = next((i for i, (a, b) in enumerate(zip(gone, order)) if a != b), len(gone))
    assert first >= 1 and gone == sorted(gone, key=order.index)
    cost = 0.0
    for row, key in zip(plan.history, gone):
        number, part = int(key.split(".")[2]), key.split(".")[3]
        cost += harm[number, part]
        assert row["value"] == sign * cost
    assert plan.before["quality"] == 0 and plan.after["quality"] == sign * cost
    # channels, whose harm grows
    plan = plan_of(
        model,
        WidthPrunerConfig(ratio=0.15, stages=("channels",), split=(1,), mlp_group=12, order="none", slack=slack),
        metric=quality,
        mode=mode,
    )
    left = {n: plan.values.get(f"mlp:model.layers.{n}", 48) for n in range(4)}
    steps = len(plan.history)
    known = sorted((harm[n, "channels"] * (1 + quarter), n) for n in range(4) for quarter in range(3))[:steps]
    assert left == {n: 48 - 12 * sum(block == n for _, block in known) for n in range(4)}


def test_the_best_is_the_worst_with_the_other_mode():
    model = tiny_llama(num_hidden_layers=4)
    harm = {(n, part): 10.0 * n + (part == "mlp") for n in range(4) for part in ("attention", "mlp", "channels")}
    for mode, first in (("min", "depth:model.layers.0.attention"), ("max", "depth:model.layers.3.mlp")):
        plan = plan_of(model, BlockPrunerConfig(ratio=0.2), metric=lambda m: harm_of(m, harm), mode=mode)
        assert plan.history[0]["removed"] == first and plan.metric == "<lambda>"


def test_states_that_are_worthless():
    """Infinite harm is as bad as it gets, and what is not infinite is found among it."""
    model = tiny_llama(num_hidden_layers=4)

    def metric(model):
        gone = [is_skipped(layer) or is_skipped(layer.mlp) for layer in model.model.layers]
        return math.inf if gone[0] or gone[1] or gone[3] else 1.0 + 0.5 * gone[2]

    for slack in (0, 0.5, math.inf):
        config = BlockPrunerConfig(ratio=0.4, stages=("mlps", "attentions"), split=(1, 5), slack=slack)
        plan = plan_of(model, config, metric=metric)
        assert [row["removed"] for row in plan.history if "mlp" in row["removed"]] == ["depth:model.layers.2.mlp"]
        assert PruningPlan.from_json(plan.to_json()) == plan


# -- stages and targets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.23, 0.4])
def test_targets_of_stages(ratio):
    """Each stage ends where no removal brings the model nearer to the sum of the shares until then."""
    model = tiny_llama(num_hidden_layers=8)
    config = MultiPrunerConfig(ratio=ratio, mlp_group=2, order="none", split=(44, 52, 4))
    plan = plan_of(model, config, calibration_of("llama")[:1])
    whole = plan.before["parameters"]
    assert whole == sum(parameter.numel() for parameter in model.parameters())
    attention, mlp, channels, heads = 32 * 32 * 3, 48 * 32 * 3, 2 * 32 * 3, 32 * 8 * 6
    units = {"sub-blocks": max(attention, mlp), "channels": channels, "heads": heads}
    share = 0.0
    for stage, part in zip(config.stages, (0.44, 0.52, 0.04)):
        share += part
        aim = whole * (1 - share * ratio)
        reached = [
            whole,
            *(
                row["parameters"]
                for row in plan.history
                if row["stage"] in config.stages[: config.stages.index(stage) + 1]
            ),
        ]
        assert min(abs(value - aim) for value in reached) <= units[stage] / 2 + 1 or min(reached) > aim
    # the last stage comes as near as its own units allow
    assert abs(plan.after["parameters"] - whole * (1 - ratio)) <= heads / 2
    cumulated = [row["parameters"] for row in plan.history]
    assert cumulated == sorted(cumulated, reverse=True)


stages_and_shares = st.lists(
    st.tuples(st.sampled_from(["blocks", "sub-blocks", "attentions", "mlps", "channels", "heads"]), st.integers(0, 5)),
    unique_by=lambda pair: pair[0],
    min_size=1,
    max_size=4,
).filter(lambda pairs: any(share for _, share in pairs))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    stages=stages_and_shares,
    ratio=st.floats(0.01, 0.8),
    mlp_group=st.sampled_from([4, 8, 12, 16, 0.25]),
    auto=st.booleans(),
    salt=st.integers(0, 99),
)
def test_it_ends_where_nothing_brings_it_nearer(stages, ratio, mlp_group, auto, salt):
    """Whatever the stages and the harm: by the parameters counted in another way, and in the smaller model itself."""
    model = tiny_llama(num_hidden_layers=4)

    def metric(model):
        """Any number, the same for the same model."""
        shapes = [[is_skipped(m), *(getattr(m, "weight", torch.empty(0)).shape)] for m in model.modules()]
        return random.Random(f"{salt} {shapes}").random()

    names = tuple(name for name, _ in stages)
    split = "auto" if auto else tuple(share for _, share in stages)
    used = [name for name, share in stages if share or auto]
    config = MultiPrunerConfig(ratio=ratio, stages=names, split=split, mlp_group=mlp_group, order="none")
    naive = Naive("llama", model, [], mlp_group=16 if mlp_group == 0.25 else mlp_group)  # in eights
    whole = naive.cost({})
    try:
        plan = plan_of(model, config, metric=metric)
    except ValueError as error:
        assert str(error).startswith("`ratio` must be ")  # everything that these stages can remove is not enough
        most = float(str(error).split("only ")[1].split("%")[0]) / 100
        assert most < ratio
        return
    naive.state = plan.values
    cost, target = naive.cost(plan.values), whole * (1 - ratio)
    assert cost == plan.after["parameters"]
    for stage in used:
        for key, left in naive.moves(stage):
            after = naive.cost({**plan.values, key: left})
            assert abs(after - target) >= abs(cost - target)
    assert {row["stage"] for row in plan.history} <= ({"+".join(names)} if auto else set(used))
    plan.extract(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == cost
    assert torch.isfinite(model(tokens()).logits).all()


def test_the_split_is_in_any_unit():
    model, batches = tiny_llama(num_hidden_layers=5), calibration_of("llama")[:1]
    plans = [
        plan_of(model, MultiPrunerConfig(ratio=0.3, split=split), batches)
        for split in [(44, 52, 4), (0.44, 0.52, 0.04), [11, 13, 1], (4400.0, 5200.0, 400.0)]
    ]
    assert all(removals(plan) == removals(plans[0]) for plan in plans)
    nothing = plan_of(model, MultiPrunerConfig(ratio=0.3, split=(0, 1, 0)), batches)
    assert {row["stage"] for row in nothing.history} == {"channels"}


@pytest.mark.parametrize("measure", ["parameters", "macs", "bytes"])
def test_measures(measure):
    model, batches = tiny_llama(num_hidden_layers=5), calibration_of("llama")[:1]
    plan = plan_of(model, MultiPrunerConfig(ratio=0.3, measure=measure, mlp_group=1), batches)
    group = 32 * 3 * (4 if measure == "bytes" else 1)
    assert abs(plan.after[measure] - 0.7 * plan.before[measure]) <= group / 2 + 1
    assert plan.history[-1]["cost"] == plan.after[measure]
    # multiply-accumulates leave the embeddings out, half a parameter each
    assert plan.before["macs"] == plan.before["parameters"] - 96 * 32 - 11 * 32


@pytest.mark.slow
def test_latency():
    model, batches = tiny_llama(num_hidden_layers=5), calibration_of("llama")[:1]
    before = snapshot(model)
    config = MultiPrunerConfig(ratio=0.3, measure="latency", mlp_group=16, latency_inputs={"input_ids": (1, 16)})
    plan = plan_of(model, config, batches)
    same(before, snapshot(model))
    assert 0 < plan.after["latency"] < plan.before["latency"]
    seconds = [row["cost"] for row in plan.history]
    assert seconds == sorted(seconds, reverse=True) and seconds[-1] == plan.after["latency"]
    assert "latency" in str(plan)


@pytest.mark.parametrize("kind", ["channels", "heads"])
def test_uniform(kind):
    """All blocks stay alike."""
    model = tiny_llama(num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    key, full = {"channels": ("mlp", 48), "heads": ("heads", 8)}[kind]
    for ratio in (0.1, 0.15, 0.2):
        config = WidthPrunerConfig(
            ratio=ratio, stages=(kind,), split=(1,), choose="uniform", order="none", mlp_group=4
        )
        plan = plan_of(model, config)  # without data
        left = [plan.values.get(f"{key}:model.layers.{n}", full) for n in range(5)]
        assert len(set(left)) == 1 and left[0] < full
        assert plan.evaluations == 0 and plan.history[0]["value"] is None and "perplexity" not in plan.before


def test_random():
    model = tiny_llama(num_hidden_layers=5)
    config = {"ratio": 0.3, "choose": "random", "order": "none"}
    plans = [removals(plan_of(model, MultiPrunerConfig(**config, seed=seed))) for seed in (0, 1, 2, 0, 1, 2)]
    assert plans[:3] == plans[3:] and len({str(plan) for plan in plans}) == 3


def test_score():
    """The groups with the smallest sums of squares, wherever they are; own scores."""
    model = tiny_llama(num_hidden_layers=3)
    generator = torch.Generator().manual_seed(0)
    scores = {f"model.layers.{n}": torch.rand(48, generator=generator) for n in range(3)}
    config = WidthPrunerConfig(ratio=0.15, stages=("channels",), split=(1,), choose="score", order=scores, mlp_group=4)
    plan = plan_of(model, config)
    groups = sorted(
        (ordered[start : start + 4].double().square().sum().item(), name)
        for name, score in scores.items()
        for ordered in [score.sort().values]
        for start in range(0, 44, 4)
    )[: len(plan.history)]
    assert len(groups) > 4
    for name, score in scores.items():
        lost = 4 * sum(block == name for _, block in groups)
        assert plan.values.get(f"mlp:{name}", 48) == 48 - lost
        assert plan.units.get(name, list(range(48))) == (
            score.argsort(descending=True).tolist()[: 48 - lost] if lost else list(range(48))
        )
    assert plan.config["order"] == "scores" and plan.evaluations == 0


def test_scores_of_some_blocks():
    """What has no score keeps its order; by score alone it cannot be chosen."""
    model = tiny_llama(num_hidden_layers=3)
    scores = {"model.layers.1": torch.arange(48.0)}
    settings_ = {"ratio": 0.1, "stages": ("channels",), "split": (1,), "order": scores, "mlp_group": 4}
    plan = plan_of(model, WidthPrunerConfig(**settings_, choose="uniform"))
    assert plan.units["model.layers.1"][:3] == [47, 46, 45] and plan.units["model.layers.0"][:3] == [0, 1, 2]
    with pytest.raises(ValueError, match="^order: "):
        plan_of(model, WidthPrunerConfig(**settings_, choose="score"))


def test_scores_of_what_is_not_there():
    model = tiny_llama(num_hidden_layers=3)
    settings_ = {"ratio": 0.1, "stages": ("channels",), "split": (1,), "choose": "uniform"}
    for scores in ({"model.layers.7": torch.ones(48)}, {"model.layers.1": torch.ones(4)}):
        with pytest.raises(ValueError, match="model.layers"):
            plan_of(model, WidthPrunerConfig(**settings_, order=scores))


def test_two_stages():
    model, batches = tiny_llama(num_hidden_layers=6), calibration_of("llama")[:1]
    plan = plan_of(model, TwoStagePrunerConfig(ratio=0.3, mlp_group=4), batches)
    assert plan.method == "two-stage"
    left = [plan.values.get(f"mlp:model.layers.{n}", 48) for n in range(6)]
    assert max(left) - min(left) <= 4 and max(left) < 48
    gone = [row["removed"] for row in plan.history if row["stage"] == "attentions"]
    assert gone and all(key.endswith(".attention") for key in gone)
    assert all(row["evaluations"] == 0 for row in plan.history if row["stage"] == "channels")


@pytest.mark.parametrize("stage", ["blocks", "attentions", "mlps", "sub-blocks"])
def test_granularities_of_depth(stage):
    model, batches = tiny_llama(num_hidden_layers=6), calibration_of("llama")[:1]
    plan = plan_of(model, BlockPrunerConfig(ratio=0.3, stages=(stage,)), batches)
    endings = {"blocks": tuple("012345"), "attentions": "attention", "mlps": "mlp", "sub-blocks": ("attention", "mlp")}
    assert all(row["removed"].endswith(endings[stage]) and row["left"] == 0 for row in plan.history)
    # something is left of the last block, whatever is asked for
    with pytest.raises(ValueError, match="^`ratio` must be .*, got 0.99"):
        plan_of(model, BlockPrunerConfig(ratio=0.99, stages=(stage,)), batches)


def test_something_of_every_stack_stays():
    """As much as can be removed, of an encoder-decoder model."""
    model, batches = deeper("t5", 6), calibration_of("t5")
    with pytest.raises(
        ValueError, match="^`ratio` must be .*, got 0.999.* are only [0-9.]+% of the parameters"
    ) as error:
        plan_of(model, BlockPrunerConfig(ratio=0.999), batches)
    most = float(str(error.value).split("only ")[1].split("%")[0]) / 100
    plan = prune_structured(model, BlockPrunerConfig(ratio=most - 1e-3), batches, progress=False)
    for stack in ("encoder", "decoder"):
        assert len(model.get_submodule(stack).block) >= 1
        assert any(f"{stack}.block.0" in row["removed"] for row in plan.history)
    assert math.isfinite(float(model(**batches[0]).loss))


def test_a_granularity_of_ones_own():
    """MLPs of even blocks alone."""
    GRANULARITIES["even MLPs"] = Granularity(
        lambda units, state: (
            move for move in GRANULARITIES["mlps"].moves(units, state) if int(move[0].split(".")[2]) % 2 == 0
        )
    )
    try:
        config = BlockPrunerConfig(ratio=0.2, stages=("even MLPs", "heads"), split=(2, 1))
        plan = plan_of(tiny_llama(num_hidden_layers=6), config, calibration_of("llama")[:1])
    finally:
        del GRANULARITIES["even MLPs"]
    gone = [row["removed"] for row in plan.history if row["stage"] == "even MLPs"]
    assert gone and {key.split(".")[2] for key in gone} <= {"0", "2", "4"}
    with pytest.raises(ValueError, match="^`stages` must be "):
        BlockPrunerConfig(stages=("even MLPs",))


# -- the same again --------------------------------------------------------------------------------------------------------


def essence(plan):
    """Without what depends on the clock."""
    data = json.loads(plan.to_json())
    data.pop("seconds")
    for row in data["history"]:
        row.pop("seconds")
    return data


@pytest.mark.parametrize("order", ["activation", "gradient", "magnitude", "l1"])
def test_deterministic(order):
    config = MultiPrunerConfig(ratio=0.3, order=order)
    plans = [plan_of(tiny_llama(num_hidden_layers=4), config, calibration_of("llama")) for _ in range(2)]
    assert essence(plans[0]) == essence(plans[1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit"])
def test_batches_of_another_size_give_the_same_plan(name):
    batches = calibration_of(name)
    single = [
        {key: value[i : i + 1] for key, value in b.items()}
        for b in batches
        for i in range(len(b["labels"]) if "labels" in b else len(b["input_ids"]))
    ]
    one, other = (
        plan_of(deeper(name), MultiPrunerConfig(ratio=0.25, mlp_group=12, order="magnitude"), data)
        for data in (batches, single)
    )
    assert removals(one) == removals(other)
    assert one.after[one.metric] == pytest.approx(other.after[other.metric], rel=1e-5)


def test_generators_are_read_once_and_no_further_than_needed():
    drawn = []

    def batches():
        for seed in range(100):
            drawn.append(seed)
            yield tokens(4, 6, seed=seed)

    config = MultiPrunerConfig(ratio=0.3, block_samples=10, width_samples=5)
    plan = plan_of(tiny_llama(num_hidden_layers=4), config, batches())
    assert len(drawn) == 3
    again = plan_of(tiny_llama(num_hidden_layers=4), config, [tokens(4, 6, seed=seed) for seed in range(3)])
    assert essence(plan) == essence(again)


# -- interrupted and continued ---------------------------------------------------------------------------------------------

RESUME = MultiPrunerConfig(ratio=0.3, mlp_group=6)


def resumable(folder, config=RESUME, **kwargs):
    kwargs = {"calibration": calibration_of("llama"), "model": tiny_llama(num_hidden_layers=4), **kwargs}
    return plan_of(config=config, save_dir=folder, **kwargs)


def rows_in(folder):
    path = folder / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return resumable(folder), rows_in(folder)


def nothing_twice(folder, rows):
    found = rows_in(folder)
    keys = [json.dumps([row["data"], row["order"], sorted(row["state"].items())]) for row in found]
    assert len(set(keys)) == len(keys) == len(rows)
    strip = [{k: v for k, v in row.items() if k not in ("seconds", "block_passes")} for row in found]
    assert strip == [{k: v for k, v in row.items() if k not in ("seconds", "block_passes")} for row in rows]


def same_plan(plan, other):
    """But for the cost of finding it: what was kept of a trunk is lost with the process."""
    one, two = essence(plan), essence(other)
    for data in (one, two):
        data.pop("block_passes")
        for row in data["history"]:
            row.pop("block_passes")
    assert one == two


def killed_after(folder, count, torn):
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    append = Journal.append

    def counted(self, row):
        if len(self.rows) >= count:
            if torn:
                with open(self.path, "ab") as file:
                    file.write(json.dumps(row).encode()[:20])
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, row)

    Journal.append = counted
    resumable(folder)
    os._exit(0)


def in_child(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to start many processes quickly")


@needs_fork
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("moments", [[0], [1], [3], [0, 2, 9, 17], [5, 6, 7, 8]], ids=str)
def test_killed_and_continued(tmp_path, unbroken, moments, torn):
    """At the first evaluation, in the first step, later, and again and again."""
    plan, rows = unbroken
    for moment in moments:
        assert in_child(killed_after, tmp_path, moment, torn) == -signal.SIGKILL
        assert len(rows_in_whole_lines(tmp_path)) == moment
    same_plan(resumable(tmp_path), plan)
    nothing_twice(tmp_path, rows)


def rows_in_whole_lines(folder):
    return (
        (folder / "evaluations.jsonl")
        .read_bytes()
        .splitlines(keepends=True)[1:][: None if (folder / "evaluations.jsonl").read_bytes().endswith(b"\n") else -1]
    )


def child(folder):
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    resumable(folder)
    os._exit(0)


@needs_fork
def test_killed_at_random_moments(tmp_path, unbroken):
    plan, rows = unbroken
    chance = random.Random(0)
    for attempt in range(100):
        process = multiprocessing.get_context("fork").Process(target=child, args=(tmp_path,))
        process.start()
        process.join(chance.uniform(0.05, 0.3) * (1 + attempt / 10))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
    assert process.exitcode == 0
    same_plan(resumable(tmp_path), plan)
    nothing_twice(tmp_path, rows)


def test_interrupted_by_ctrl_c(tmp_path, unbroken, ctrl_c):
    """A real signal, while a block is being computed. The model is as before, and the same call continues."""
    plan, rows = unbroken
    model = tiny_llama(num_hidden_layers=4)
    model.train()
    calls = []

    def strike(*_):
        calls.append(1)
        if len(calls) in (60, 120):
            os.kill(os.getpid(), signal.SIGINT)

    before = snapshot(model)
    for _ in range(2):
        handle = model.model.layers[2].mlp.register_forward_pre_hook(strike)
        with pytest.raises(KeyboardInterrupt):
            resumable(tmp_path, model=model)
        handle.remove()
        same(before, snapshot(model))
        assert 0 < len(rows_in(tmp_path)) < len(rows)
    same_plan(resumable(tmp_path, model=model), plan)
    nothing_twice(tmp_path, rows)


def test_a_finished_run_is_read_from_the_file(tmp_path, unbroken):
    plan, rows = unbroken
    resumable(tmp_path)
    model = tiny_llama(num_hidden_layers=4)
    calls = []
    model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    same_plan(resumable(tmp_path, model=model), plan)
    # one batch, to see in which order the blocks run and whether outputs can be kept
    assert len(calls) <= 10
    nothing_twice(tmp_path, rows)


def test_other_settings_reuse_what_is_there(tmp_path, unbroken):
    plan, rows = unbroken
    resumable(tmp_path)
    for config in (
        MultiPrunerConfig(ratio=0.4, mlp_group=6),
        BlockPrunerConfig(ratio=0.2),
        MultiPrunerConfig(ratio=0.3, mlp_group=6, slack=math.inf),
        MultiPrunerConfig(ratio=0.2, order="l1"),
    ):
        known = len(rows_in(tmp_path))
        found = resumable(tmp_path, config)
        expected = plan_of(tiny_llama(num_hidden_layers=4), config, calibration_of("llama"))
        # a state without widths has the same value whatever order its channels are in, up to the order of sums
        assert found.values == expected.values and found.units == expected.units
        assert removals(found) == removals(expected)
        assert found.after == pytest.approx(expected.after, rel=1e-6)
        new = len(rows_in(tmp_path)) - known
        assert new < expected.evaluations - 8  # the first step at least is there
    keys = [json.dumps([row["data"], row["order"], sorted(row["state"].items())]) for row in rows_in(tmp_path)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": lambda: tiny_llama(num_hidden_layers=4, seed=1)}, "model is"),
        ({"calibration": lambda: calibration_of("llama")[:3]}, "calibration is"),
        ({"metric": lambda: lambda model: 1.0}, "metric is"),
    ],
    ids=["model", "calibration", "metric"],
)
def test_other_work_in_the_same_folder(tmp_path, change, named):
    resumable(tmp_path)
    content = (tmp_path / "evaluations.jsonl").read_bytes()
    arguments = {key: make() for key, make in change.items()}
    model = arguments.setdefault("model", tiny_llama(num_hidden_layers=4))
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"^`save_dir` holds another pruning .*{named}") as error:
        resumable(tmp_path, **arguments)
    assert sum(f"{word} is" in str(error.value) for word in ("model", "calibration", "metric")) == 1
    same(before, snapshot(model))
    assert (tmp_path / "evaluations.jsonl").read_bytes() == content


def test_damaged_files(tmp_path, unbroken):
    plan, rows = unbroken
    resumable(tmp_path)
    path = tmp_path / "evaluations.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:5]) + whole[5][:-10])
    same_plan(resumable(tmp_path), plan)
    nothing_twice(tmp_path, rows)
    path.write_bytes(b"".join(whole[:5]) + b"{nonsense}\n" + b"".join(whole[5:]))
    with pytest.raises(ValueError, match="line 6 of .* is damaged"):
        resumable(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is not the history of a pruning"):
        resumable(tmp_path)
    same_plan(resumable(tmp_path / "new" / "folder"), plan)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^`save_dir`"):
        resumable(tmp_path / "file")


def test_a_metric_of_ones_own_is_recalled_too(tmp_path):
    harm = {(n, part): 10.0 * n + (part == "mlp") for n in range(4) for part in ("attention", "mlp", "channels")}
    calls = []

    def metric(model):
        calls.append(1)
        if len(calls) == 7:
            raise RuntimeError("out of memory")
        return harm_of(model, harm)

    config = BlockPrunerConfig(ratio=0.3)
    with pytest.raises(RuntimeError, match="out of memory"):
        resumable(tmp_path, config, calibration=None, metric=metric)
    assert len(rows_in(tmp_path)) == 6
    plan = resumable(tmp_path, config, calibration=None, metric=metric)
    assert len(calls) == 7 + len(rows_in(tmp_path)) - 6
    known = len(calls)
    assert removals(resumable(tmp_path, config, calibration=None, metric=metric)) == removals(plan)
    assert len(calls) == known
