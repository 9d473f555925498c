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
import json
import math
import random
import sys

import matplotlib
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pymoo.indicators.hv import HV
from support.elastic_net import ElasticNet, quality, search
from support.models import TRANSFORMERS_ADAPTERS
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_elastic import ElasticLoraConfig
from peft_elastic.search import (
    ALGORITHMS,
    CostModel,
    Evaluation,
    LMEvalEvaluator,
    LossEvaluator,
    MetricEvaluator,
    MultipleChoiceEvaluator,
    PerplexityEvaluator,
    SearchResult,
    search_subnet,
)
from peft_elastic.supernet import Choice, ElasticHost, SearchSpace, Subnet, get_elastic_host


@pytest.fixture
def model():
    return ElasticNet()


def test_the_test_model_is_an_elastic_host(model):
    assert isinstance(model, ElasticHost)
    assert get_elastic_host(model) is model


# -- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_begins_with_max_min_and_heuristic(algorithm):
    model = ElasticNet(n_layers=3)
    result = search(model, algorithm=algorithm, n_evals=64)
    assert [e.source for e in result.history[:4]] == ["max", "min", "heuristic", "search"]
    space = model.search_space
    assert [e.subnet for e in result.history[:3]] == [space.max, space.min, space.heuristic]
    assert [e.index for e in result.history] == list(range(64))


@pytest.mark.parametrize("algorithm", ["nsga2", "random"])
@pytest.mark.parametrize("n_evals", [1, 2, 3, 4, 7, 8, 9, 50])
def test_evaluates_exactly_n_different_subnets(model, algorithm, n_evals):
    seen = []
    result = search(model, lambda m: seen.append(m.active_subnet) or quality(m), algorithm=algorithm, n_evals=n_evals)
    assert len(result.history) == len(seen) == len(set(seen)) == n_evals
    assert [e.subnet for e in result.history] == seen


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
@pytest.mark.parametrize(
    ("n_layers", "options"),
    [(1, (8,)), (1, (8, 4)), (1, (8, 6, 4)), (2, (8, 4)), (2, (8, 6, 4)), (4, (8, 4, 2)), (3, (8,))],
)
def test_small_spaces_are_evaluated_completely(algorithm, n_layers, options):
    model = ElasticNet(n_layers, options)
    calls = []
    result = search(model, lambda m: calls.append(1) or quality(m), algorithm=algorithm, n_evals=500)
    assert len(calls) == len(result.history) == model.search_space.size
    assert {e.subnet for e in result.history} == set(model.search_space.subnets())
    assert result.best() in model.search_space
    assert result.best(max_drop=1.0) == model.search_space.min


def test_a_large_space_with_a_large_population():
    model = ElasticNet(n_layers=200, options=(8, 6, 4, 2))
    result = search(model, lambda m: float(np.mean([layer.rank for layer in m.layers])), n_evals=120, population=40)
    assert len({e.subnet for e in result.history}) == 120
    assert model.search_space.size == 4**200


def test_the_rest_of_a_nearly_exhausted_space_is_found(model):
    model = ElasticNet(n_layers=3)  # 64 subnets
    seen = {e.subnet for e in search(model, n_evals=63, algorithm="random").history}
    assert len(seen) == 63
    assert {e.subnet for e in search(model, n_evals=64, algorithm="nsga2", population=4).history} > seen


def record(result):
    return [(e.subnet, e.metrics) for e in result.history]


@pytest.mark.parametrize("algorithm", ["nsga2", "random"])
def test_same_seed_same_search(algorithm):
    def run(seed):
        random.seed(seed + 10), np.random.seed(seed + 20), torch.manual_seed(seed + 30)
        return search(ElasticNet(), algorithm=algorithm, seed=3, n_evals=60)

    assert run(0) == run(1)


@pytest.mark.parametrize("algorithm", ["nsga2", "random"])
def test_other_seed_other_search(model, algorithm):
    histories = [record(search(model, algorithm=algorithm, seed=seed, n_evals=20)) for seed in range(4)]
    assert all(histories[i] != histories[j] for i in range(4) for j in range(i))


@pytest.mark.parametrize("algorithm", ["nsga2", "random"])
@pytest.mark.parametrize("shorter", [1, 2, 5, 10, 16, 29])
def test_a_shorter_search_is_the_beginning_of_a_longer_one(model, algorithm, shorter):
    assert record(search(model, algorithm=algorithm))[:shorter] == record(
        search(model, algorithm=algorithm, n_evals=shorter)
    )


def test_global_random_generators_neither_leak_in_nor_out(model):
    def noisy(m):
        noise = random.random() + np.random.rand() + float(torch.rand(1))
        torch.randn(len(drawn) + 1), np.random.rand(len(drawn))  # consumes more each time
        drawn.append(noise)
        return quality(m)

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    drawn = []
    result = search(model, noisy)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert record(result) == record(search(model))
    assert len(set(drawn)) == 1  # every subnet is measured with the same draws


def test_nsga2_beats_random_and_nears_the_front():
    model = ElasticNet(n_layers=8, options=(8, 6, 4, 2))

    def costs_and_qualities(result):
        return np.array([[-e.metrics["accuracy"], e.metrics["macs"]] for e in result.history], dtype=float)

    def value(layers):
        return sum((i + 1) * (1 - (1 - rank / 8) ** 2) for i, rank in enumerate(layers)) / 36

    def evaluate(m):
        return value([layer.rank for layer in m.layers])

    everything = CostModel(model, model.search_space)
    lowest, highest = everything.macs(model.search_space.min), everything.macs(model.search_space.max)

    def hypervolume(points):
        scaled = np.column_stack([points[:, 0], (points[:, 1] - lowest) / (highest - lowest)])
        return HV(ref_point=[0.0, 1.01])(scaled)

    # the true front: every subnet of the space, 4^8, evaluated on paper
    ranks = np.stack(np.meshgrid(*[[8, 6, 4, 2]] * 8), -1).reshape(-1, 8)
    qualities = ((1 - (1 - ranks / 8) ** 2) * np.arange(1, 9)).sum(1) / 36
    best_by_cost = {total: qualities[ranks.sum(1) == total].max() for total in np.unique(ranks.sum(1))}
    spread = (highest - lowest) / (ranks.sum(1).max() - ranks.sum(1).min())
    front = np.array([[-q, lowest + (total - 16) * spread] for total, q in best_by_cost.items()])
    best = hypervolume(front)

    shares = {"nsga2": [], "random": []}
    for seed in range(3):
        for algorithm, found in shares.items():
            result = search(model, evaluate, algorithm=algorithm, seed=seed, n_evals=200)
            found.append(hypervolume(costs_and_qualities(result)) / best)
    assert all(0 < share <= 1 + 1e-9 for found in shares.values() for share in found)
    assert all(a > b for a, b in zip(shares["nsga2"], shares["random"])), shares
    assert np.mean(shares["nsga2"]) > 0.95, shares


# -- what `evaluate` sees --------------------------------------------------------------------------------------------


def test_evaluate_sees_the_reported_subnet(model):
    """A search that measures the max subnet under other names would notice nothing itself."""
    x = torch.randn(4, 8)
    outputs = []

    def evaluate(m):
        assert m is model
        assert not any(module.training for module in m.modules())
        assert not torch.is_grad_enabled()
        outputs.append((m.active_subnet, m(x)))
        return quality(m)

    result = search(model, evaluate)
    for evaluation, (active, output) in zip(result.history, outputs, strict=True):
        assert evaluation.subnet == active
        assert evaluation.metrics["accuracy"] == pytest.approx(quality_of(evaluation.subnet))
        torch.testing.assert_close(output, forward_with_sliced_weights(model, evaluation.subnet, x))
    assert len({round(float(output.sum()), 6) for _, output in outputs}) == len(outputs)


def quality_of(subnet):
    return sum((i + 1) * (1 - (1 - subnet[f"rank:layers.{i}"] / 8) ** 2) for i in range(6)) / 21


@torch.no_grad()
def forward_with_sliced_weights(model, subnet, x):
    for i, layer in enumerate(model.layers):
        k = subnet[f"rank:layers.{i}"]
        weight = layer.base_layer.weight + layer.lora_B.weight[:, :k].clone() @ layer.lora_A.weight[:k].clone()
        x = x + torch.tanh(x @ weight.T)
    return x


def test_evaluate_may_call_eval_and_train(model):
    def careless(m):
        m.eval()
        value = quality(m)
        m.train()
        return value

    modes = []
    result = search(model, lambda m: modes.append(m.training) or careless(m))
    assert record(result) == record(search(model)) and not any(modes)


def test_evaluate_that_changes_the_subnet_is_refused(model):
    with pytest.raises(ValueError, match="`evaluate` changed the active subnet"):
        search(model, lambda m: m.set_subnet("max") or quality(m))


def test_functions_as_objectives_see_the_subnet_in_eval_mode(model):
    seen = []

    def latency(m):
        assert m is model and not m.training and not torch.is_grad_enabled()
        seen.append(m.active_subnet)
        return sum(layer.rank for layer in m.layers)

    result = search(model, objectives=("accuracy", ("latency", latency)))
    assert seen == [e.subnet for e in result.history]
    assert all(e.metrics["latency"] == sum(e.subnet.values()) for e in result.history)
    assert result.objectives == {"accuracy": "max", "latency": "min"} and result.cost == "latency"
    assert record(search(model, objectives=["accuracy", {"latency": latency}])) == record(result)


# -- the model afterwards --------------------------------------------------------------------------------------------


def snapshot(model):
    return (
        model.chosen,
        model.active_subnet,
        [module.training for module in model.modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
    )


def assert_as_found(model, before):
    chosen, active, modes, state = before
    assert model.chosen == chosen
    assert model.active_subnet == active
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.restore_subnet()
    assert model.active_subnet == chosen


def a_state_to_find(model):
    """Training mode with one frozen part, the heuristic subnet chosen and another one sampled."""
    model.set_subnet("heuristic")
    model.train()
    model.layers[2].eval()
    model.layers[4].lora_dropout.eval()
    model.sample_subnet(model.search_space.sample(5))
    return snapshot(model)


def test_the_model_is_left_as_it_was_found(model):
    before = a_state_to_find(model)
    search(model, held_out=quality)
    assert_as_found(model, before)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("error", [Interrupted("stop"), KeyboardInterrupt(), ValueError("mine"), SystemExit(3)])
@pytest.mark.parametrize("where", ["evaluate", "objective", "held_out"])
def test_the_model_is_left_as_it_was_found_after_an_exception(model, error, where):
    before = a_state_to_find(model)
    calls = []

    def failing(m):
        calls.append(1)
        if len(calls) == 3:
            m.train()
            raise error
        return quality(m)

    kwargs = {
        "evaluate": {"evaluate": failing},
        "objective": {"objectives": ("accuracy", ("time", failing))},
        "held_out": {"held_out": failing},
    }[where]
    with pytest.raises(type(error)) as raised:
        search(model, **kwargs)
    assert raised.value is error
    assert_as_found(model, before)


NO_NUMBERS = [None, "0.5", "nan", True, np.bool_(True), [0.5], torch.ones(2), np.ones(1), 1j, object]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(value, f"returned {value!r} as 'accuracy'") for value in NO_NUMBERS]
    + [
        ({"accuracy": None}, "returned None as 'accuracy'"),
        ({"accuracy": 1.0, "f1": "high"}, "returned 'high' as 'f1'"),
        ({1: 0.5}, "the key 1"),
    ],
    ids=str,
)
def test_values_that_are_no_numbers(model, tmp_path, value, shown):
    before = a_state_to_find(model)
    subnet = model.search_space.heuristic

    def evaluate(m):
        return value if m.active_subnet == subnet else quality(m)

    with pytest.raises(ValueError, match="`evaluate` returned") as error:
        search(model, evaluate, save_dir=tmp_path, n_evals=6)
    message = str(error.value)
    assert "evaluation 2, heuristic" in message and "rank:layers.0" in message and shown in message
    assert_as_found(model, before)
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 3  # header, max, min
    # with `evaluate` repaired the search goes on
    assert record(search(model, save_dir=tmp_path, n_evals=6)) == record(search(model, n_evals=6))


@pytest.mark.parametrize(
    "value", [{}, {"f1": 0.5}, {"macs": 1.0, "accuracy": 0.5}, {"parameters": 1, "accuracy": 0.5}]
)
def test_dicts_with_wrong_names(model, value):
    with pytest.raises(ValueError, match=r"accuracy|computed otherwise") as error:
        search(model, lambda m: value)
    assert "evaluation 0, max" in str(error.value)


def test_objective_functions_must_return_a_number(model):
    for value in ("nan", None, {"a": 1.0}):
        with pytest.raises(ValueError, match="objective 'time'"):
            search(model, objectives=("accuracy", ("time", lambda m, value=value: value)))
    with pytest.raises(ValueError, match="computed otherwise"):
        search(model, lambda m: {"accuracy": 1.0, "time": 2.0}, objectives=("accuracy", ("time", quality)))
    with pytest.raises(ValueError, match="`held_out` returned None"):
        search(model, held_out=lambda m: None)


@pytest.mark.parametrize(
    "value",
    [1, 0.5, np.float32(0.5), np.int64(3), torch.tensor(0.25), np.array(2.0), torch.tensor(2), 10**400 // 10**399],
)
def test_values_that_are_numbers(model, value):
    result = search(model, lambda m: value, n_evals=3)
    stored = result.history[0].metrics["accuracy"]
    assert type(stored) in (int, float) and stored == float(value)
    json.dumps(result.history[0].metrics)


# -- objectives and arguments ----------------------------------------------------------------------------------------


def test_named_objectives(model):
    def evaluate(m):
        ranks = list(m.active_subnet.values())
        return {"accuracy": quality(m), "loss": float(sum(ranks)), "unused": 3}

    result = search(model, evaluate, objectives=("accuracy", "loss", "parameters"), mode={"loss": "min"})
    assert result.objectives == {"accuracy": "max", "loss": "min", "parameters": "min"}
    assert list(result.history[0].metrics) == ["accuracy", "loss", "unused", "macs", "parameters"]
    assert result.cost == "loss"


def test_single_objective(model):
    result = search(model, objectives="accuracy", n_evals=100)
    assert result.objectives == {"accuracy": "max"} and result.cost == "macs"
    assert [e.subnet for e in result.pareto] == [model.search_space.max] and result.best() == model.search_space.max
    # the smallest layers matter least, so a search for the worst must end at the min subnet
    result = search(model, objectives=["accuracy"], mode="min", n_evals=100)
    assert result.best() == model.search_space.min


@pytest.mark.parametrize("objectives", [("accuracy",), ("accuracy", "macs"), ("accuracy", "macs", "parameters")])
def test_the_search_follows_the_direction(objectives):
    model = ElasticNet(n_layers=10)

    def distance(m):  # best in the interior of the space
        return sum(abs(layer.rank - 4) for layer in m.layers)

    downwards = search(model, distance, objectives=objectives, mode="min", n_evals=150)
    upwards = search(model, lambda m: -distance(m), objectives=objectives, n_evals=150)
    assert [e.subnet for e in downwards.history] == [e.subnet for e in upwards.history]
    assert downwards.best() == upwards.best()
    best = downwards.evaluation(downwards.best()).metrics["accuracy"]
    assert best == min(e.metrics["accuracy"] for e in downwards.history)
    if len(objectives) == 1:
        sampled = search(model, distance, objectives=objectives, mode="min", n_evals=150, algorithm="random")
        assert best < sampled.evaluation(sampled.best()).metrics["accuracy"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"objectives": ()}, "`objectives` is empty"),
        ({"objectives": 3}, "sequence of names and functions, got 3"),
        ({"objectives": ("macs", "accuracy")}, "first of `objectives`.*'macs'"),
        ({"objectives": (("accuracy", quality), "macs")}, "first of `objectives`.*'accuracy'"),
        ({"objectives": ("accuracy", "accuracy")}, "twice"),
        ({"objectives": ("accuracy", ("macs", quality))}, "'macs', which is built in"),
        ({"objectives": ("accuracy", 3)}, "name or a pair.*3"),
        ({"objectives": ("accuracy", ("time", 3))}, "'time' must be a function"),
        ({"objectives": ("accuracy", (3, quality))}, "strings, got 3"),
        ({"objectives": ("accuracy", "")}, "non-empty"),
        ({"objectives": ("accuracy", "flops")}, r"without \['flops'\]"),
        ({"mode": "maximum"}, "`mode` must be 'max' or 'min', got 'maximum'"),
        ({"mode": {"acc": "max"}}, "`mode` names 'acc'"),
        ({"mode": {"macs": "max"}}, "always minimised"),
        ({"mode": {"accuracy": None}}, "'max' or 'min', got None"),
        (
            {"algorithm": "nsga3"},
            "`algorithm` must be 'exhaustive', 'nsga2', 'r-nsga2' or 'random', got 'nsga3'",
        ),
        ({"algorithm": "exhaustive"}, "all 4096 subnets.*`n_evals` is 30"),
        ({"n_evals": 0}, "`n_evals` must be a whole number >= 1, got 0"),
        ({"n_evals": 2.5}, "`n_evals`.*2.5"),
        ({"n_evals": True}, "`n_evals`.*True"),
        ({"population": 3}, "`population` must be a whole number >= 4, got 3"),
        ({"population": None}, "`population`.*None"),
        ({"seed": -1}, "`seed`.*-1"),
        ({"seed": 2**32}, "`seed`.*from 0 to 4294967295"),
        ({"seed": None}, "`seed`.*None"),
        ({"held_out": 0.5}, "`held_out`.*0.5"),
        ({"evaluate": None}, "`evaluate`.*None"),
        ({"model": nn.Linear(2, 2)}, "no elastic adapter"),
    ],
)
def test_arguments_are_checked_before_anything_is_changed(model, tmp_path, kwargs, message):
    before = a_state_to_find(model)
    with pytest.raises(ValueError, match=message):
        search_subnet(**{"model": model, "evaluate": quality, "n_evals": 30, "progress": False, **kwargs})
    assert_as_found(model, before)


def test_progress_bar_and_profile(model, capfd):
    search(model, progress=True)
    shown = capfd.readouterr().err
    assert "best accuracy=1" in shown and "pareto=" in shown and "30/30" in shown
    costs = CostModel(model, model.search_space)
    table = [line.split() for line in shown.splitlines()]
    most = costs.costs(model.search_space.max)
    for name in ("max", "min", "heuristic"):
        subnet = getattr(model.search_space, name)
        assert f"{name} {quality_of(subnet):.4g}" in shown
        assert [
            name,
            f"{costs.parameters(subnet):,}",
            f"{costs.parameters(subnet) / most['parameters']:.1%}",
            f"{costs.macs(subnet):,}",
            f"{costs.macs(subnet) / most['macs']:.1%}",
            f"{costs.bytes(subnet) / 1e6:.2f}",
            "100.0%",
        ] in table
    search(model, progress=False)
    assert capfd.readouterr() == ("", "")


# -- the result ------------------------------------------------------------------------------------------------------


def make_result(points, objectives=None, sources=("max", "min", "heuristic")):
    """A result with these (accuracy, macs) pairs."""
    space = SearchSpace([Choice("rank", "a", tuple(range(len(points), 0, -1)), unit_parameters=1)])
    history = [
        Evaluation(
            i,
            sources[i] if i < len(sources) else "search",
            space.decode([i]),
            {"accuracy": accuracy, "macs": macs, "parameters": 10 * macs},
        )
        for i, (accuracy, macs) in enumerate(points)
    ]
    return SearchResult(space, objectives or {"accuracy": "max", "macs": "min"}, history)


def indices(result, *subnets):
    return [result.evaluation(subnet).index for subnet in subnets]


def test_pareto_equals_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        points = [(float(a), int(m)) for a, m in zip(rng.integers(0, 12, 40) / 10, rng.integers(1, 12, 40))]
        result = make_result(points)
        expected = [
            i for i, (a, m) in enumerate(points) if not any(b >= a and n <= m and (b > a or n < m) for b, n in points)
        ]
        assert sorted(e.index for e in result.pareto) == expected
        costs = [e.metrics["macs"] for e in result.pareto]
        assert costs == sorted(costs)
        flipped = make_result([(-a, m) for a, m in points], {"accuracy": "min", "macs": "min"})
        assert [e.index for e in flipped.pareto] == [e.index for e in result.pareto]


def test_best():
    #                       max        min        heuristic  searched
    result = make_result([(0.81, 100), (0.50, 40), (0.70, 70), (0.80, 80), (0.82, 95), (0.82, 90), (0.79, 60)])
    assert indices(result, result.best()) == [5]  # the cheaper of two equally good ones
    assert indices(result, result.best(max_drop=0.01)) == [3]  # exactly 0.01 below the max subnet counts
    assert indices(result, result.best(max_drop=0.0099)) == [5]
    assert indices(result, result.best(max_drop=0)) == [5]
    assert indices(result, result.best(max_drop=0.02)) == [6]
    assert indices(result, result.best(max_drop=1)) == [1]
    assert indices(result, result.best(budget=90)) == [5]
    assert indices(result, result.best(budget=89.9)) == [3]
    assert indices(result, result.best(budget="60%")) == [6]
    assert indices(result, result.best(budget={"macs": "95 %", "parameters": 800})) == [3]
    assert indices(result, result.best(budget={"parameters": "40%"})) == [1]
    assert indices(result, result.best(max_drop=0.02, budget="100%")) == [6]
    assert isinstance(result.best(), Subnet) and result.best() in result.space


def test_best_of_a_minimised_metric():
    result = make_result([(2.0, 100), (5.0, 40), (3.0, 70), (1.9, 90), (2.1, 60)], {"accuracy": "min", "macs": "min"})
    assert indices(result, result.best()) == [3]
    assert indices(result, result.best(max_drop=0.1)) == [4]
    assert indices(result, result.best(max_drop=1.0, budget=80)) == [4]


@pytest.mark.parametrize("percent", range(1, 101))
def test_percentages_are_exact(percent):
    result = make_result([(1.0, 100), *((0.5, m) for m in range(1, 100))])
    best = result.evaluation(result.best(budget=f"{percent}%", max_drop=1.0))
    assert best.metrics["macs"] == 1
    dearest = max(e.metrics["macs"] for e in result.history if e.metrics["macs"] <= percent)
    exact = make_result([(0.1, 100), *((m / 100, m) for m in range(1, 100))])
    assert exact.evaluation(exact.best(budget=f"{percent}%")).metrics["macs"] == min(dearest, 99)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_drop": -0.1}, "`max_drop`.*-0.1"),
        ({"max_drop": math.nan}, "`max_drop`.*nan"),
        ({"max_drop": "1%"}, "`max_drop`.*'1%'"),
        ({"max_drop": True}, "`max_drop`.*True"),
        ({"budget": 0}, "`budget`.*got 0"),
        ({"budget": -5}, "`budget`.*got -5"),
        ({"budget": math.inf}, "`budget`.*inf"),
        ({"budget": "60"}, "`budget`.*'60'"),
        ({"budget": "sixty%"}, "`budget`.*'sixty%'"),
        ({"budget": "-5%"}, "`budget`.*'-5%'"),
        ({"budget": [60]}, "`budget`"),
        ({"budget": {"latency": 5}}, r"`budget` must be bounds on some of \['macs', 'parameters'\], got 'latency'"),
        ({"budget": {"accuracy": 5}}, "`budget` must be .*, got 'accuracy'"),
        ({"budget": 39}, r"keeps `budget` 39. The closest is evaluation 1 \(min\).*macs 40"),
        ({"budget": "39%"}, "keeps `budget` '39%'.*macs 40"),
        ({"budget": {"macs": 50, "parameters": 390}}, "closest is evaluation 1"),
        ({"budget": 45, "max_drop": 0.05}, r"within the budget.*`max_drop` 0.05 worse.*0.81.*evaluation 1 \(min\)"),
    ],
)
def test_best_that_does_not_exist(kwargs, message):
    result = make_result([(0.81, 100), (0.50, 40), (0.70, 70)])
    with pytest.raises(ValueError, match=message):
        result.best(**kwargs)


def test_evaluation_by_subnet():
    result = make_result([(0.81, 100), (0.50, 40), (0.70, 70)])
    assert result.evaluation("max") is result.history[0] is result.reference
    assert result.evaluation({"rank:a": 2}) is result.history[1]
    with pytest.raises(ValueError, match="must be one of"):
        result.evaluation({"rank:a": 9})
    result.history.pop(1)
    with pytest.raises(ValueError, match="was not evaluated"):
        result.evaluation({"rank:a": 2})


def test_held_out_values_steer_nothing(model):
    evaluated = []

    def held_out(m):
        evaluated.append(m.active_subnet)
        return {"accuracy": values[len(evaluated) - 1], "f1": 0.5}

    plain = search(model, n_evals=40)
    values = np.random.default_rng(0).random(40).tolist()
    for _ in range(4):
        evaluated.clear()
        result = search(model, n_evals=40, held_out=held_out)
        assert record(result) == record(plain)
        assert [e.index for e in result.pareto] == [e.index for e in plain.pareto]
        for kwargs in ({}, {"max_drop": 0.05}, {"budget": "97%"}):
            assert result.best(**kwargs) == plain.best(**kwargs)
        values = values[::-1] if _ % 2 else [1 - v for v in values]
    # measured for the front, max and heuristic, and for nothing else
    expected = {e.index for e in plain.pareto} | {0, 2}
    assert {e.index for e in result.history if e.held_out is not None} == expected
    assert evaluated == [e.subnet for e in result.history if e.held_out is not None]
    assert set(result.history[0].held_out) == {"accuracy", "f1"}
    # what was reported may be rewritten at will, the choice stays
    for e in result.pareto:
        e.held_out["accuracy"] = -e.held_out["accuracy"]
    assert result.best(max_drop=0.05) == plain.best(max_drop=0.05)


def test_held_out_is_called_after_the_search(model):
    order = []
    search(model, lambda m: order.append("search") or quality(m), held_out=lambda m: order.append("held-out") or 1.0)
    assert order == sorted(order, reverse=True)


def test_dataframe(model):
    result = search(model, held_out=lambda m: {"accuracy": 0.5})
    frame = result.to_dataframe()
    assert len(frame) == 30 and list(frame.index) == list(range(30))
    assert list(frame.columns[:6]) == ["source", "pareto", "accuracy", "macs", "parameters", "held_out_accuracy"]
    assert list(frame.columns[6:]) == [choice.key for choice in model.search_space]
    assert frame.loc[frame.pareto].index.tolist() == sorted(e.index for e in result.pareto)
    assert frame.accuracy.max() == max(e.metrics["accuracy"] for e in result.history)
    assert frame["rank:layers.0"].tolist() == [e.subnet["rank:layers.0"] for e in result.history]
    assert frame.held_out_accuracy.notna().sum() == sum(e.held_out is not None for e in result.history)
    assert frame.accuracy.dtype == float and frame.macs.dtype == int


def test_save_and_load(model, tmp_path):
    for kwargs in ({}, {"held_out": quality}, {"objectives": "accuracy"}, {"algorithm": "random", "seed": 4}):
        result = search(model, **kwargs)
        result.save(tmp_path / "deep" / "folder")
        loaded = SearchResult.load(tmp_path / "deep" / "folder")
        assert loaded == result and loaded.settings == result.settings
        assert loaded.best(max_drop=0.1) == result.best(max_drop=0.1)
        assert loaded.history[3].subnet == result.history[3].subnet
        assert isinstance(loaded.history[3].subnet, Subnet)
    assert [p.name for p in (tmp_path / "deep" / "folder").iterdir()] == ["search_result.json"]


def test_load_refuses_other_files(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        SearchResult.load(tmp_path)
    search(model, n_evals=4).save(tmp_path)
    path = tmp_path / "search_result.json"
    good = path.read_text()
    data = json.loads(good)
    damaged = [
        "",
        "[]",
        good[: len(good) // 2],
        '{"format": "peft-elastic/subnet", "version": 1, "values": {}}',
        json.dumps(data | {"version": 2}),
        json.dumps(data | {"space": {}}),
        json.dumps(data | {"history": [{"index": 0}]}),
        json.dumps(data | {"history": [data["history"][0] | {"subnet": {"rank:layers.0": 8}}]}),
        json.dumps({k: v for k, v in data.items() if k != "objectives"}),
    ]
    for content in damaged:
        path.write_text(content)
        with pytest.raises(ValueError, match=r"search_result\.json"):
            SearchResult.load(tmp_path)


@pytest.mark.parametrize(
    ("objectives", "n_layers", "options"),
    [
        ("accuracy", 6, (8, 6, 4, 2)),
        (("accuracy", "macs"), 6, (8, 6, 4, 2)),
        (("accuracy", "macs", "parameters"), 6, (8, 6, 4, 2)),
        ("accuracy", 1, (8,)),
        (("accuracy", "macs"), 1, (8,)),
        (("accuracy", "macs"), 2, (8, 4)),
    ],
)
def test_plot(tmp_path, objectives, n_layers, options):
    result = search(ElasticNet(n_layers, options), objectives=objectives)
    path = tmp_path / "new" / "pareto.png"
    backend = matplotlib.get_backend()
    figure = result.plot(path)
    assert matplotlib.get_backend() == backend
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    labels = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    assert {"evaluated", "best so far"} <= labels
    assert any("heuristic" in label for label in labels) and any("max" in label for label in labels)
    assert len(figure.axes) == (1 if objectives == "accuracy" else 3)
    assert figure.axes[0].get_ylabel() == "accuracy" and figure.axes[0].get_xlabel() == "evaluations"
    if len(figure.axes) == 3:
        assert "hypervolume" in labels and figure.axes[2].get_ylabel() == "hypervolume"
        assert figure.axes[1].get_xlabel() == "MACs per token"
        assert any(label.startswith(f"Pareto front ({len(result.pareto)})") for label in labels)


def test_plot_formats(model, tmp_path):
    result = search(model)
    result.plot(tmp_path / "pareto.pdf")
    result.plot(str(tmp_path / "pareto.svg"))
    assert result.plot() is not None
    for name in ("pareto", "pareto.docx"):
        with pytest.raises(ValueError, match="`path` must end in"):
            result.plot(tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pareto.pdf", "pareto.svg"]


def test_plot_draws_the_best_so_far(model):
    for mode in ("max", "min"):
        result = search(model, mode=mode)
        (line,) = result.plot().axes[0].get_lines()
        values = [e.metrics["accuracy"] for e in result.history]
        best = max if mode == "max" else min
        assert list(line.get_ydata()) == [best(values[: i + 1]) for i in range(len(values))]


# -- the cost model --------------------------------------------------------------------------------------------------


def test_cost_of_the_small_network(model):
    costs = CostModel(model, model.search_space)
    subnet = model.search_space.heuristic  # rank 6 in 6 layers of 8 x 8
    assert costs.macs(subnet) == 6 * (8 * 8 + 6 * (8 + 8))
    assert costs.parameters(subnet) == costs.macs(subnet)
    assert costs.bytes(subnet) == 6 * 8 * 8 * 4  # merged: the adapter is gone
    assert costs.costs(subnet) == {name: getattr(costs, name)(subnet) for name in ("bytes", "macs", "parameters")}


def tiny_llama(**kwargs):
    torch.manual_seed(0)
    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 128,
    }
    return LlamaForCausalLM(LlamaConfig(**config | kwargs))


def elastic(base, **kwargs):
    torch.manual_seed(1)
    config = {"r": 8, "elastic_ranks": [8, 4, 2], "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
    return get_peft_model(base, ElasticLoraConfig(**config | kwargs))


def counted_macs(model, **inputs):
    """Multiply-accumulates of the matrix products and convolutions that a forward pass really runs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**inputs)
    kinds = ("mm", "addmm", "convolution")  # attention scores are bmm or sdpa
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in counts.items() if str(op).removeprefix("aten.") in kinds) // 2


@pytest.mark.parametrize("kwargs", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_costs_of_a_llama_are_what_it_runs(kwargs, targets):
    model = elastic(tiny_llama(**kwargs), target_modules=targets).eval()
    costs = CostModel(model, model.search_space)
    ids = torch.arange(11)[None]
    for subnet in [model.search_space.max, model.search_space.min, *(model.search_space.sample(i) for i in range(3))]:
        model.set_subnet(subnet)
        assert costs.macs(subnet) * 11 == counted_macs(model, input_ids=ids)
    assert costs.parameters(model.search_space.max) == sum(p.numel() for p in model.parameters())
    assert costs.parameters(model.search_space.max) - costs.parameters(model.search_space.min) == sum(
        6 * choice.unit_parameters for choice in model.search_space
    )


def test_costs_with_conv1d_tied_head_and_modules_to_save():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64))
    alone = sum(p.numel() for p in base.parameters())
    model = elastic(base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, modules_to_save=["ln_f"]).eval()
    costs = CostModel(model, model.search_space)
    subnet = model.search_space.heuristic
    model.set_subnet(subnet)
    assert costs.macs(subnet) * 9 == counted_macs(model, input_ids=torch.arange(9)[None])
    assert costs.parameters(subnet) == alone + model.search_space.count_parameters(subnet)


def test_costs_with_an_adapted_embedding():
    base = tiny_llama()
    alone = sum(p.numel() for p in base.parameters())
    model = elastic(base, target_modules=["embed_tokens", "q_proj"]).eval()
    costs = CostModel(model, model.search_space)
    assert costs.parameters(model.search_space.max) == alone + model.search_space.count_parameters(
        model.search_space.max
    )
    for subnet in (model.search_space.max, model.search_space.min):
        model.set_subnet(subnet)
        assert costs.macs(subnet) * 5 == counted_macs(model, input_ids=torch.arange(5)[None])


def test_costs_with_convolutions():
    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)
            self.norm = nn.LayerNorm([8, 4, 4])
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            x = self.norm(self.conv(x)).flatten(2).transpose(1, 2)
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    base = Vision()
    model = elastic(base, target_modules=["head"]).eval()
    costs = CostModel(model, model.search_space)
    subnet = model.search_space.min
    assert costs.base_macs == 3 * 8 * 9 + 4 * 8 * 8 + 8 * 5
    assert costs.macs(subnet) - costs.base_macs == 2 * (8 + 5)
    assert costs.parameters(model.search_space.max) == sum(p.numel() for p in model.parameters())


def test_costs_count_packed_weights_by_their_shape():
    class Packed(nn.Module):  # as GPTQ does it: eight 4-bit values in an int32 buffer
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 64, 32
            self.register_buffer("qweight", torch.zeros(8, 32, dtype=torch.int32))

    class HalfSize(nn.Linear):  # as bitsandbytes does it: two values in a byte
        def __init__(self):
            super().__init__(64, 32, bias=True)
            self.weight = nn.Parameter(torch.zeros(1024, 1, dtype=torch.uint8), requires_grad=False)

    space = SearchSpace([Choice("rank", "a", (2, 1), unit_parameters=7)])
    costs = CostModel(nn.ModuleDict({"gptq": Packed(), "bnb": HalfSize(), "dense": nn.Linear(64, 32)}), space)
    assert costs.base_macs == 3 * 64 * 32
    assert costs.base_parameters == 3 * 64 * 32 + 2 * 32
    assert costs.macs(space.max) == costs.base_macs + 14


def test_costs_of_unknown_kinds_of_choices_are_refused():
    space = SearchSpace([Choice("rank", "a", (2, 1)), Choice("heads", "a", (2, 1))])
    with pytest.raises(ValueError, match="heads"):
        CostModel(nn.Linear(2, 2), space)


# -- evaluators ------------------------------------------------------------------------------------------------------


def batches(*lengths, vocabulary=96):
    """One batch per length, of two sequences, the second padded and with a prompt that does not count."""
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        ids = torch.randint(3, vocabulary, (2, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, length // 2 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[0, : length // 4] = -100
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def token_losses(model, batch, shift):
    with torch.no_grad():
        logits = model(**batch).logits.log_softmax(-1)
    labels = batch["labels"]
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows = [-logits[i, j, labels[i, j]] for i, j in (labels != -100).nonzero().tolist()]
    return [float(row) for row in rows]


def test_loss_and_perplexity_are_means_over_tokens():
    model = elastic(tiny_llama())
    data = list(batches(16, 5, 9))
    data.append({key: value[:1] for key, value in data[0].items()} | {"labels": torch.full((1, 16), -100)})
    model.set_subnet("min")
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    loss, perplexity = LossEvaluator(data)(model), PerplexityEvaluator(data)(model)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    losses = [value for batch in data[:3] for value in token_losses(model, batch, shift=True)]
    assert loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert loss != pytest.approx(np.mean([np.mean(token_losses(model, b, shift=True)) for b in data[:3]]), rel=1e-4)


def test_loss_of_a_dataset_does_not_depend_on_the_batch_size():
    model = elastic(tiny_llama()).eval()
    rng = np.random.default_rng(0)
    data = [{"input_ids": rng.integers(3, 96, size=n).tolist()} for n in (5, 17, 9, 3, 12, 8, 30)]
    collator = DataCollatorForLanguageModeling(word_tokenizer(), mlm=False)
    values = [LossEvaluator(data, collator, batch_size=size)(model) for size in (1, 2, 3, 7, 50)]
    assert values == pytest.approx([values[0]] * 5, rel=1e-5)


def test_loss_of_models_that_do_not_shift():
    torch.manual_seed(0)
    small = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    masked = BertForMaskedLM(BertConfig(**small, intermediate_size=32)).eval()
    data = list(batches(12, 7))
    expected = np.mean([value for batch in data for value in token_losses(masked, batch, shift=False)])
    assert LossEvaluator(data)(masked) == pytest.approx(expected, rel=1e-5)

    seq2seq = T5ForConditionalGeneration(
        T5Config(vocab_size=96, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).eval()
    expected = np.mean([value for batch in data for value in token_losses(seq2seq, batch, shift=False)])
    assert LossEvaluator(data)(seq2seq) == pytest.approx(expected, rel=1e-5)

    classifier = BertForSequenceClassification(BertConfig(**small, intermediate_size=32, num_labels=3)).eval()
    data = [
        {key: value for key, value in batch.items() if key != "labels"} | {"labels": labels}
        for batch, labels in zip(data, (torch.tensor([0, 2]), torch.tensor([1, 1])))
    ]
    data[1] = {key: value[:1] for key, value in data[1].items()}
    with torch.no_grad():
        rows = torch.cat([classifier(**batch).logits.log_softmax(-1) for batch in data])
    expected = -rows[range(3), [0, 2, 1]].mean()
    assert LossEvaluator(data)(classifier) == pytest.approx(float(expected), rel=1e-5)


def test_loss_evaluator_errors():
    model = tiny_llama()
    data = list(batches(8))
    with pytest.raises(ValueError, match="read only once"):
        LossEvaluator(batches(8))
    with pytest.raises(ValueError, match="without 'labels'"):
        LossEvaluator([{"input_ids": data[0]["input_ids"]}])(model)
    with pytest.raises(ValueError, match="no labels other than -100"):
        LossEvaluator([data[0] | {"labels": torch.full((2, 8), -100)}])(model)
    with pytest.raises(ValueError, match="no labels"):
        LossEvaluator([])(model)

    class Plain(nn.Linear):
        def forward(self, x, labels=None):
            return super().forward(x)

    batch = {"x": torch.ones(2, 2), "labels": torch.ones(2, dtype=torch.long)}
    with pytest.raises(ValueError, match="pass `shift`"):
        LossEvaluator([batch])(Plain(2, 2))
    with pytest.raises(ValueError, match="returned no loss"):
        LossEvaluator([batch], shift=False)(Plain(2, 2))


def test_perplexity_that_overflows_is_infinite():
    model = tiny_llama()
    model.lm_head.weight.data *= 1e6
    assert PerplexityEvaluator(list(batches(8)))(model) == math.inf


WORDS = "the cat dog sat on mat sky is blue green red good bad day night a b c d e f g h yes no".split()


def word_tokenizer(add_bos=False):
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if add_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def byte_pair_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the cat sat on the mat", "the sky is blue", "good day bad night"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="the")


EXAMPLES = [
    {"prompt": "the cat sat on", "choices": [" the mat", " the blue sky", " a"], "label": 0},
    {"prompt": "the sky is", "choices": [" blue", " green"], "label": 1},
    {"prompt": "a b c d e f g h", "choices": [" yes", " no"], "label": 0},
    {"prompt": "the", "choices": [" day is good good good", " night"], "label": 1},
    {"prompt": "good day bad", "choices": [" night", " no", " a", " b", " c d"], "label": 4},
]


def one_by_one(model, tokenizer, prompt, choice):
    """log p(choice | prompt), token by token, without batches or padding."""
    context = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + choice)["input_ids"]
    if whole[-1] == tokenizer.eos_token_id and tokenizer.bos_token_id is not None:
        context, whole = context[:-1], whole[:-1]
    total = 0.0
    with torch.no_grad():
        for i in range(len(context), len(whole)):
            logits = model(torch.tensor([whole[:i]])).logits[0, -1]
            total += float(logits.log_softmax(-1)[whole[i]])
    return total, len(whole) - len(context)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("add_bos", [False, True])
def test_multiple_choice_scores_are_log_likelihoods(batch_size, add_bos):
    model, tokenizer = elastic(tiny_llama()).eval(), word_tokenizer(add_bos)
    model.set_subnet("min")
    evaluator = MultipleChoiceEvaluator(EXAMPLES, tokenizer, batch_size=batch_size)
    expected = [[one_by_one(model, tokenizer, e["prompt"], c)[0] for c in e["choices"]] for e in EXAMPLES]
    for found, wanted in zip(evaluator.scores(model), expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    accuracy = np.mean([int(np.argmax(row)) == e["label"] for row, e in zip(expected, EXAMPLES)])
    assert evaluator(model) == accuracy
    # choices of one token share one forward pass
    assert len(evaluator.rows) == 3 + 1 + 1 + 2 + 2


def test_multiple_choice_on_other_architectures():
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64)).eval()

    class NoSelection(nn.Module):  # a model without `logits_to_keep`
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids, attention_mask=attention_mask)

    expected = [one_by_one(gpt2, tokenizer, e["prompt"], c)[0] for e in EXAMPLES for c in e["choices"]]
    for model in (gpt2, NoSelection(gpt2)):
        scores = MultipleChoiceEvaluator(EXAMPLES, tokenizer).scores(model)
        assert [score for row in scores for score in row] == pytest.approx(expected, rel=1e-4)


def test_multiple_choice_normalization():
    model, tokenizer = tiny_llama().eval(), word_tokenizer()
    for normalization, divisor in (
        ("tokens", lambda choice: len(choice.split())),
        ("bytes", lambda choice: len(choice.encode())),
    ):
        scores = MultipleChoiceEvaluator(EXAMPLES, tokenizer, normalization=normalization).scores(model)
        for row, example in zip(scores, EXAMPLES):
            for score, choice in zip(row, example["choices"]):
                wanted = one_by_one(model, tokenizer, example["prompt"], choice)[0] / divisor(choice)
                assert score == pytest.approx(wanted, rel=1e-4)


def test_multiple_choice_with_tokens_across_the_border():
    """Where prompt and choice merge into one token, that token is scored with the choice."""
    model, tokenizer = tiny_llama(vocab_size=300).eval(), byte_pair_tokenizer()
    assert len(tokenizer("the cat")["input_ids"]) < len(tokenizer("the ca")["input_ids"]) + 1
    evaluator = MultipleChoiceEvaluator([{"prompt": "the ca", "choices": ["t", "r"], "label": 0}], tokenizer)
    whole = tokenizer("the cat")["input_ids"]
    with torch.no_grad():
        log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    first = next(i for i, (a, b) in enumerate(zip(whole, tokenizer("the ca")["input_ids"])) if a != b)
    expected = sum(float(log_probs[i - 1, whole[i]]) for i in range(first, len(whole)))
    assert evaluator.scores(model)[0][0] == pytest.approx(expected, rel=1e-4)


def test_multiple_choice_truncates_the_prompt_from_the_left():
    model, tokenizer = tiny_llama().eval(), word_tokenizer()
    examples = [{"prompt": "good bad day the cat sat", "choices": [" on", " mat mat"], "label": 0}]
    scores = MultipleChoiceEvaluator(examples, tokenizer, max_length=3).scores(model)
    assert scores[0][0] == pytest.approx(one_by_one(model, tokenizer, "the cat sat", " on")[0], rel=1e-4)
    assert scores[0][1] == pytest.approx(one_by_one(model, tokenizer, "cat sat", " mat mat")[0], rel=1e-4)
    with pytest.raises(ValueError, match=r"`max_length` 1.*example 0"):
        MultipleChoiceEvaluator(examples, tokenizer, max_length=1)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"prompt": "the", "choices": ["a"]}, "example 1.*'label'"),
        ({"choices": ["a"], "label": 0}, "example 1.*'prompt'"),
        ({"prompt": "the", "choices": [], "label": 0}, "`choices` of example 1"),
        ({"prompt": "the", "choices": ["a", ""], "label": 0}, "`choices` of example 1"),
        ({"prompt": "the", "choices": ["a", 3], "label": 0}, "`choices` of example 1"),
        ({"prompt": "the", "choices": ["a", "b"], "label": 2}, "`label` of example 1.*0 to 1, got 2"),
        ({"prompt": "the", "choices": ["a", "b"], "label": -1}, "`label` of example 1"),
        ({"prompt": "the", "choices": ["a", "b"], "label": "a"}, "`label` of example 1"),
    ],
)
def test_multiple_choice_errors(example, message):
    with pytest.raises(ValueError, match=message):
        MultipleChoiceEvaluator([EXAMPLES[0], example], word_tokenizer())


def test_multiple_choice_without_examples_or_context():
    with pytest.raises(ValueError, match="empty"):
        MultipleChoiceEvaluator([], word_tokenizer())
    with pytest.raises(ValueError, match=r"`normalization`.*'length'"):
        MultipleChoiceEvaluator(EXAMPLES, word_tokenizer(), normalization="length")
    # an empty prompt is continued after the token that begins a text
    model, tokenizer = tiny_llama().eval(), word_tokenizer()
    scores = MultipleChoiceEvaluator([{"prompt": "", "choices": ["cat", "dog"], "label": 0}], tokenizer).scores(model)
    with torch.no_grad():
        log_probs = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, -1].log_softmax(-1)
    assert scores[0] == pytest.approx(log_probs[tokenizer.convert_tokens_to_ids(["cat", "dog"])].tolist(), rel=1e-4)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no token to begin with"):
        MultipleChoiceEvaluator([{"prompt": "", "choices": ["cat"], "label": 0}], tokenizer)


def match_metric():
    """A metric module of the `evaluate` library that needs no hub."""
    import datasets
    import evaluate

    class Match(evaluate.Metric):
        def _info(self):
            features = datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            )
            return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

        def _compute(self, predictions, references, scale=1.0):
            right = sum(p == r for p, r in zip(predictions, references))
            return {"accuracy": scale * right / len(references), "right": right}

    return Match()


def test_metric_of_the_evaluate_library(model):
    pytest.importorskip("evaluate")
    metric = match_metric()
    evaluator = MetricEvaluator(metric, lambda m: [layer.rank for layer in m.layers], [8] * 6, key="accuracy")
    assert evaluator(model) == 1.0 and evaluator.name == "accuracy" and evaluator.mode == "max"
    model.layers[0].rank = 2
    model.chosen = model.active_subnet
    assert evaluator(model) == pytest.approx(5 / 6)
    scaled = MetricEvaluator(metric, lambda m: [8] * 6, [8] * 6, key="accuracy", scale=100.0)
    assert scaled(model) == 100.0
    result = search(model, evaluator, n_evals=10)
    assert result.objectives == {"accuracy": "max", "macs": "min"} and result.best() == model.search_space.max
    for key in (None, "f1"):
        with pytest.raises(ValueError, match=r"`key`.*\['accuracy', 'right'\]"):
            MetricEvaluator(metric, lambda m: [8], [8], key=key)(model)
    with pytest.raises(ValueError, match="`compute`"):
        MetricEvaluator(len, lambda m: [8], [8])


def test_metric_with_a_single_value_needs_no_key(model):
    class Error:
        name = "error"

        def compute(self, predictions, references):
            return {"error": float(np.mean(np.abs(np.subtract(predictions, references))))}

    evaluator = MetricEvaluator(Error(), lambda m: [layer.rank for layer in m.layers], [2] * 6, mode="min")
    result = search(model, evaluator, n_evals=10)
    assert result.objectives == {"error": "min", "macs": "min"}
    assert result.best() == model.search_space.min


def test_evaluators_tell_the_search_their_name_and_direction():
    model = elastic(tiny_llama())
    result = search(model, PerplexityEvaluator(list(batches(8))), n_evals=8)
    assert result.objectives == {"perplexity": "min", "macs": "min"}
    values = [e.metrics["perplexity"] for e in result.history]
    assert result.evaluation(result.best()).metrics["perplexity"] == min(values)
    result = search(model, LossEvaluator(list(batches(8))), objectives=("nll",), mode="max", n_evals=3)
    assert result.objectives == {"nll": "max"}


@pytest.fixture
def lm_eval_task(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES if len(example["choices"]) == 2))
    task = tmp_path / "two_choices.yaml"
    task.write_text(
        "task: two_choices\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        "doc_to_text: '{{prompt}}'\n"
        "doc_to_target: label\n"
        "doc_to_choice: '{{choices}}'\n"
        "target_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
        "metadata:\n  version: 1\n"
    )
    return str(task)


@pytest.mark.slow
def test_lm_eval_task(lm_eval_task):
    model, tokenizer = elastic(tiny_llama()), word_tokenizer()
    evaluator = LMEvalEvaluator(lm_eval_task, tokenizer)
    ours = MultipleChoiceEvaluator([e for e in EXAMPLES if len(e["choices"]) == 2], tokenizer)
    model.train()
    for name in ("max", "min", "heuristic"):
        model.set_subnet(name)
        assert evaluator(model) == pytest.approx(ours(model))
    assert model.training
    result = search(model, evaluator, n_evals=4)
    assert result.objectives == {"acc": "max", "macs": "min"}
    assert [e.metrics["acc"] for e in result.history] == pytest.approx(
        [e.metrics["accuracy"] for e in search(model, ours, n_evals=4).history]
    )
    with pytest.raises(ValueError, match=r"`metric` 'f1'.*acc,none"):
        LMEvalEvaluator([lm_eval_task], tokenizer, metric="f1")(model)


def test_lm_eval_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"peft-elastic\[eval\]"):
        LMEvalEvaluator("arc_easy", word_tokenizer())


# -- with the real tuner ---------------------------------------------------------------------------------------------


def test_search_of_a_peft_model(tmp_path):
    model = elastic(tiny_llama(), lora_dropout=0.5)
    ids = torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    model.set_subnet("heuristic")
    model.train()
    sampled = model.search_space.sample(1)
    model.sample_subnet(sampled)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    seen = []

    def evaluate(m):
        assert m is model and not m.training
        m.eval()  # drops a subnet that was only sampled, as every evaluation loop does
        layers = m.base_model.model.model.layers
        ranks = {
            f"rank:model.layers.{i}.self_attn.{name}": getattr(layer.self_attn, name).lora_A["default"].weight.shape[0]
            for i, layer in enumerate(layers)
            for name in ("q_proj", "v_proj")
        }
        seen.append((Subnet(ranks), m(ids).logits))
        return -float(m(ids, labels=ids).loss)

    result = model.search_subnet(evaluate, n_evals=20, save_dir=tmp_path, held_out=evaluate, progress=False)
    assert model.active_subnet == sampled
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.restore_subnet()
    assert model.active_subnet == model.search_space.heuristic

    assert [e.subnet for e in result.history] == [ranks for ranks, _ in seen[:20]]
    model.eval()
    for evaluation, (_, logits) in zip(result.history, seen):
        model.set_subnet(evaluation.subnet)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, logits)
    model.set_subnet(result.best(max_drop=0.01))
    assert SearchResult.load(tmp_path) == result
    # the free function is the same
    assert search_subnet(model, evaluate, n_evals=20, held_out=evaluate, progress=False) == result


@TRANSFORMERS_ADAPTERS
def test_search_of_a_model_with_an_adapter_from_transformers():
    model = tiny_llama()
    model.add_adapter(
        ElasticLoraConfig(r=8, elastic_ranks=[8, 4, 2], target_modules=["q_proj"], init_lora_weights=False)
    )
    data = list(batches(8))
    result = search(model, LossEvaluator(data), n_evals=9)
    assert len(result.history) == 9 == get_elastic_host(model).search_space.size
    assert len({e.metrics["loss"] for e in result.history}) == 9


def test_search_of_a_plain_lora_model_is_refused():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no elastic adapter"):
        search_subnet(model, quality)
