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
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_elastic import ElasticLoraConfig
from peft_elastic.search import ChoiceEffects, estimate_effects


N_CHANNELS = 6
IMPORTANT = {1, 4}


class Channels(nn.Module):
    """Six independent linear maps; the loss is the squared error of their concatenated outputs."""

    def __init__(self):
        super().__init__()
        self.channels = nn.ModuleDict({f"c{i}": nn.Linear(8, 8, bias=False) for i in range(N_CHANNELS)})

    def forward(self, x, labels=None):
        y = torch.cat([channel(x) for channel in self.channels.values()], dim=-1)
        return SimpleNamespace(y=y, loss=None if labels is None else (y - labels).pow(2).mean())


@pytest.fixture
def model():
    """Only the channels in IMPORTANT have an adapter that does something; its trailing ranks matter."""
    torch.manual_seed(0)
    model = get_peft_model(
        Channels(), ElasticLoraConfig(r=8, lora_alpha=8, elastic_ranks=[8, 4, 2], target_modules=r".*\.c\d")
    )
    for i, channel in enumerate(model.base_model.model.channels.values()):
        nn.init.orthogonal_(channel.lora_A["default"].weight)
        nn.init.normal_(channel.lora_B["default"].weight, std=0.3 if i in IMPORTANT else 0.0)
    return model.eval()


def make_batches(model, n, seed=1):
    """Labels come from the maximal subnet, with noise whose size differs between batches far more than subnets do."""
    generator = torch.Generator().manual_seed(seed)
    model.set_subnet("max")
    batches = []
    for _ in range(n):
        x = torch.randn(32, 8, generator=generator)
        noise = 10 * torch.rand((), generator=generator)
        with torch.no_grad():
            y = model(x).y
        batches.append({"x": x, "labels": y + noise * torch.randn(y.shape, generator=generator)})
    return batches


def important_keys(model):
    return {f"rank:channels.c{i}" for i in IMPORTANT}


def test_regression_finds_the_choices_that_matter(model):
    effects = estimate_effects(model, make_batches(model, 30), per_batch=8)
    assert effects.n_evaluations == 240
    ranking = sorted(effects.effects, key=effects.effects.get, reverse=True)
    assert set(ranking[: len(IMPORTANT)]) == important_keys(model)
    for key, effect in effects.effects.items():
        if key in important_keys(model):
            assert effect > 5 * effects.standard_errors[key]
        else:
            assert abs(effect) < 4 * effects.standard_errors[key]


def test_counting_and_lowest_batch_loss_measure_luck(model):
    """METHODS mistake 7: what earlier implementations read from a training log finds the important choices by luck only
    (1 in 9 here); the regression finds them every time, within the budget of the heuristic subnet."""
    space = model.search_space
    budget = space.count_parameters(space.heuristic)

    def keeps_the_important_large(subnet):
        return all(subnet[key] == 8 for key in important_keys(model))

    hits = Counter()
    for seed in range(8):
        rng, log = np.random.default_rng(seed), []
        for batch in make_batches(model, 80, seed):
            subnet = space.sample(rng)
            model.set_subnet(subnet)
            with torch.no_grad():
                log.append((float(model(**batch).loss), subnet))
        most_frequent = {c.key: Counter(s[c.key] for _, s in log).most_common(1)[0][0] for c in space}
        hits["most frequent"] += keeps_the_important_large(most_frequent)
        hits["lowest loss"] += keeps_the_important_large(min(log, key=lambda row: row[0])[1])
        found = estimate_effects(model, make_batches(model, 30, seed), per_batch=8, seed=seed).subnet(budget)
        assert space.count_parameters(found) <= budget
        hits["regression"] += keeps_the_important_large(found)
    assert hits["regression"] == 8
    assert hits["most frequent"] <= 4 and hits["lowest loss"] <= 4


def test_effects_match_least_squares_with_batch_dummies(model):
    """Centring per batch equals a regression with one intercept per batch."""
    batches = make_batches(model, 6)
    effects = estimate_effects(model, batches, per_batch=4, seed=3)
    space, rng = model.search_space, np.random.default_rng(3)
    rows, losses = [], []
    for index, batch in enumerate(batches):
        for subnet in [space.sample(rng) for _ in range(4)]:
            model.set_subnet(subnet)
            with torch.no_grad():
                losses.append(float(model(**batch).loss))
            rows.append([(8 - subnet[c.key]) / 6 for c in space] + [float(i == index) for i in range(6)])
    expected = np.linalg.lstsq(np.array(rows), np.array(losses), rcond=None)[0][:N_CHANNELS]
    np.testing.assert_allclose([effects.effects[c.key] for c in space], expected, rtol=1e-6, atol=1e-8)


def test_model_is_left_as_it_was(model):
    model.set_subnet("min")
    model.train()
    model.sample_subnet("heuristic")
    batches = make_batches(model, 8)
    model.set_subnet("min")
    model.sample_subnet("heuristic")
    estimate_effects(model, batches)
    assert model.training and model.active_subnet == model.search_space.heuristic
    model.eval()
    assert model.active_subnet == model.search_space.min


def test_budget_subnet_of_known_effects(model):
    space = model.search_space
    effects = ChoiceEffects(space, {c.key: float(i) for i, c in enumerate(space)}, {c.key: 0.0 for c in space}, 1)
    one_step = 4 * space.choices[0].unit_parameters
    assert effects.subnet(space.count_parameters(space.max)) == space.max
    assert effects.subnet(space.count_parameters(space.min)) == space.min
    lowered = effects.subnet(space.count_parameters(space.max) - one_step)
    assert [c.key for c in space if lowered[c.key] < 8] == [space.choices[0].key]


@pytest.mark.parametrize(
    "kwargs, n, message", [({"per_batch": 1}, 10, "per_batch"), ({"per_batch": 2}, 5, "batches"), ({}, 0, "batches")]
)
def test_too_few_evaluations(model, kwargs, n, message):
    with pytest.raises(ValueError, match=message):
        estimate_effects(model, make_batches(model, n), **kwargs)


def test_no_labels(model):
    with pytest.raises(ValueError, match="labels"):
        estimate_effects(model, [{"x": torch.randn(2, 8)}] * 4)


def test_budget_too_small(model):
    effects = estimate_effects(model, make_batches(model, 8))
    with pytest.raises(ValueError, match="max_parameters"):
        effects.subnet(1)


def test_subnets_are_prepared(model):
    seen = []
    batches = make_batches(model, 4)
    effects = estimate_effects(model, batches, per_batch=4, prepare=lambda m: seen.append(dict(m.active_subnet)))
    assert len(seen) == effects.n_evaluations == 16 and len({tuple(subnet.values()) for subnet in seen}) > 8
    assert effects == estimate_effects(model, batches, per_batch=4)
    # what it does to the model is there when the loss is measured

    def silent(m):
        for channel in m.base_model.model.channels.values():
            channel.lora_B["default"].weight.data.zero_()

    assert all(
        abs(effect) < 1e-6 for effect in estimate_effects(model, batches, per_batch=4, prepare=silent).effects.values()
    )
    with pytest.raises(ValueError, match="`prepare` must be a function"):
        estimate_effects(model, batches, prepare="recalibrate")
