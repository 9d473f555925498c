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
"""The distributions that the samplers draw from."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from support.models import tiny_llama
from support.narrow_llama import NarrowLlama

from peft_elastic import BalancedSampler, Choice, SandwichSampler, SearchSpace, Stage, UniformSampler
from peft_elastic.supernet.samplers import _expected_count
from peft_elastic.supernet.stages import StagePlan


# Parameters per rank of q, k, v, o, gate, up and down in SmolLM2-135M.
SMOLLM2_BLOCK = [1152, 768, 768, 1152, 2112, 2112, 2112]
# The same in Llama-7B: its range of counts is too fine for the sampler's table.
LLAMA_BLOCK = [8192, 8192, 8192, 8192, 15104, 15104, 15104]


def space_of(unit_parameters, options=(32, 24, 16)):
    return SearchSpace(
        Choice("rank", f"layers.{i}", options, modules=(f"layers.{i}",), unit_parameters=unit)
        for i, unit in enumerate(unit_parameters)
    )


def draw(sampler, space, number, seed=0):
    return [sampler(space, np.random.default_rng([seed, i])) for i in range(number)]


def positions(space, subnets):
    """Parameter counts, from 0 (the smallest subnet) to 1 (the largest)."""
    low, high = space.count_parameters(space.min), space.count_parameters(space.max)
    return np.array([(space.count_parameters(subnet) - low) / (high - low) for subnet in subnets])


def bin_counts(space, subnets, bins=16):
    return np.histogram(positions(space, subnets), bins, (0, 1))[0]


# -- uniform ----------------------------------------------------------------------------------------------------------


def test_uniform_draws_each_option_of_each_choice_equally_often():
    space = space_of([1, 5, 100], options=(32, 28, 24, 20, 16))
    subnets = draw(UniformSampler(), space, 2000)
    for choice in space:
        frequencies = Counter(subnet[choice.key] for subnet in subnets)
        assert stats.chisquare([frequencies[option] for option in choice.options]).pvalue > 1e-3


def test_uniform_draws_choices_independently():
    space = space_of([1, 1])
    pairs = Counter(space.encode(subnet) for subnet in draw(UniformSampler(), space, 3000))
    assert len(pairs) == 9
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-3


def test_uniform_hardly_leaves_the_middle_of_a_large_space():
    """Why there is a balanced sampler."""
    spread = positions(space := space_of(SMOLLM2_BLOCK * 30), draw(UniformSampler(), space, 200))
    assert 0.35 < spread.min() and spread.max() < 0.65


# -- balanced ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unit_parameters, options",
    [
        pytest.param([7] * 10, (32, 24, 16), id="equal-costs"),
        pytest.param([1, 2, 3, 5, 8], (32, 28, 24, 20, 16), id="unequal-costs"),
        pytest.param(SMOLLM2_BLOCK * 30, (32, 24, 16), id="smollm2"),
        pytest.param(SMOLLM2_BLOCK * 32, (32, 28, 24, 20, 16), id="224-choices-of-5"),
        pytest.param([49728, *SMOLLM2_BLOCK * 4], (32, 24, 16), id="one-choice-dominates"),
    ],
)
def test_balanced_fills_bins_of_the_parameter_count_equally(unit_parameters, options):
    space = space_of(unit_parameters, options)
    counts = bin_counts(space, draw(BalancedSampler(), space, 800))
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-3
    # the check tells apart: uniform sampling fails it
    assert stats.chisquare(bin_counts(space, draw(UniformSampler(), space, 800))[counts > 0]).pvalue < 1e-6


def test_balanced_leaves_no_gap_where_counts_are_dense():
    """Not only bin by bin: within the bins, too, up to both ends."""
    space = space_of(SMOLLM2_BLOCK * 30)
    spread = positions(space, draw(BalancedSampler(), space, 1000))
    assert stats.kstest(spread, "uniform").pvalue > 1e-3
    assert spread.min() < 0.01 and spread.max() > 0.99


def test_balanced_is_close_to_even_where_it_has_to_round():
    space = space_of(LLAMA_BLOCK * 32)
    sampler = BalancedSampler()
    spread = positions(space, draw(sampler, space, 800))
    assert stats.kstest(spread, "uniform").statistic < 0.05
    assert spread.min() < 0.01 and spread.max() > 0.99


@pytest.mark.parametrize(
    "options", [pytest.param((32, 24, 16), id="3-options"), pytest.param((32, 28, 24, 20, 16), id="5-options")]
)
def test_balanced_with_one_choice_is_uniform_over_its_options(options):
    space = space_of([100], options)
    frequencies = Counter(subnet["rank:layers.0"] for subnet in draw(BalancedSampler(), space, 1500))
    assert len(frequencies) == len(options)
    assert stats.chisquare(list(frequencies.values())).pvalue > 1e-3


def test_balanced_reaches_both_sides_of_a_gap():
    """One choice is nearly everything: no single tilt of the odds gives large values of it with small ones elsewhere."""
    space = space_of([1000, *[1] * 40], options=(3, 2, 1))
    spread = positions(space, draw(BalancedSampler(), space, 600))
    for value in (0, 0.481, 0.962):  # where the large choice takes the counts
        above = (spread[(spread >= value) & (spread <= value + 0.039)] - value) / 0.039
        assert len(above) > 100 and above.min() < 0.1 and above.max() > 0.9


def test_balanced_with_two_equal_choices_is_uniform_over_the_sums():
    space = space_of([100, 100])
    subnets = draw(BalancedSampler(), space, 2000)
    sums = Counter(sum(subnet.values()) for subnet in subnets)
    assert sorted(sums) == [32, 40, 48, 56, 64]
    assert stats.chisquare(list(sums.values())).pvalue > 1e-3
    # and over the three subnets with the same sum
    same = Counter(space.encode(subnet) for subnet in subnets if sum(subnet.values()) == 48)
    assert len(same) == 3
    assert stats.chisquare(list(same.values())).pvalue > 1e-3


def test_balanced_where_all_subnets_have_the_same_size():
    fixed = space_of([100, 100], options=(8,))
    assert draw(BalancedSampler(), fixed, 3) == [fixed.max] * 3
    free = space_of([0, 0])  # choices that cost nothing
    pairs = Counter(free.encode(subnet) for subnet in draw(BalancedSampler(), free, 1800))
    assert len(pairs) == 9
    assert stats.chisquare(list(pairs.values())).pvalue > 1e-3


def test_balanced_in_a_space_with_more_subnets_than_floats_can_count():
    space = space_of([1] * 1000, options=(5, 4, 3, 2, 1))
    assert space.size > 1e308
    spread = positions(space, draw(BalancedSampler(), space, 100))
    assert stats.kstest(spread, "uniform").pvalue > 1e-3


def test_balanced_follows_a_change_of_the_space():
    sampler = BalancedSampler()
    for space in (space_of([1]), space_of([1, 2, 3]), space_of([1])):
        assert all(subnet in space for subnet in draw(sampler, space, 5))


# -- balanced, with width and depth ------------------------------------------------------------------------------------


def total(space, subnet):
    return space.count_parameters(subnet) + space.count_base_parameters(subnet)


def elastic_space(blocks, **kwargs):
    return NarrowLlama(tiny_llama(num_hidden_layers=blocks), **kwargs).search_space


@pytest.mark.parametrize("depth", [True, False])
def test_balanced_fills_bins_of_all_active_parameters(depth):
    space = elastic_space(10, depth=depth)
    low, high = total(space, space.min), total(space, space.max)

    def bins(sampler):
        shares = [(total(space, subnet) - low) / (high - low) for subnet in draw(sampler, space, 800)]
        return np.histogram(shares, 16, (0, 1))[0]

    assert stats.chisquare(bins(BalancedSampler())).pvalue > 1e-3
    assert stats.chisquare(bins(UniformSampler())).pvalue < 1e-6


@pytest.mark.parametrize("kinds", [["heads", "mlp"], ["depth"]])
def test_balanced_fills_bins_in_a_stage(kinds):
    """Where only some kinds of choices are sampled, what is balanced is still the size of the model."""
    args = SimpleNamespace(max_steps=-1, num_train_epochs=2)
    plan = StagePlan([Stage(["rank"], 1), Stage(kinds, 1)], elastic_space(10), args, 100, None)
    space = plan.space_of_step(99)
    low, high = total(space, space.min), total(space, space.max)
    assert low < 0.9 * high

    def fifths(sampler):
        shares = [(total(space, subnet) - low) / (high - low) for subnet in draw(sampler, space, 200)]
        return np.histogram(shares, 5, (0, 1))[0]

    assert fifths(BalancedSampler()).min() > 12
    assert fifths(UniformSampler())[[0, -1]].max() < 10


def test_balanced_in_a_stage_of_ranks_is_that_of_a_space_of_ranks():
    args = SimpleNamespace(max_steps=-1, num_train_epochs=1)
    whole = elastic_space(4)
    space = StagePlan([Stage(["rank"], 1)], whole, args, 10, None).space_of_step(0)
    assert space.layers == whole.layers
    drawn = draw(BalancedSampler(), space, 400)
    for subnet in drawn:
        assert space.count_base_parameters(subnet) == whole.count_base_parameters(whole.max)
    # every sum of ranks, here one for each number of blocks that are large, is as likely as any other
    sums = Counter(space.count_parameters(subnet) for subnet in drawn)
    assert len(sums) > 4 and stats.chisquare(list(sums.values())).pvalue > 1e-3


def test_balanced_where_some_bins_are_empty():
    """One block, with or without depth: few sizes, with gaps between them; every draw is a subnet all the same."""
    for space in (elastic_space(1), elastic_space(1, depth=False)):
        subnets = draw(BalancedSampler(), space, 300)
        assert all(subnet in space for subnet in subnets)
        sizes = {total(space, subnet) for subnet in subnets}
        assert {total(space, space.min), total(space, space.max)} <= sizes


def test_expected_count_is_the_mean():
    space = elastic_space(2)
    rng = np.random.default_rng(0)
    odds = [rng.dirichlet(np.ones(len(choice.options))) for choice in space]
    mean = sum(
        np.prod([p[i] for p, i in zip(odds, space.encode(subnet))]) * total(space, subnet)
        for subnet in space.subnets()
    )
    assert _expected_count(space, odds) == pytest.approx(mean)


# -- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler_cls", [UniformSampler, BalancedSampler])
@pytest.mark.parametrize("space", [space_of(SMOLLM2_BLOCK * 3), elastic_space(4)], ids=["ranks", "width-and-depth"])
def test_same_generator_same_subnet(sampler_cls, space):
    subnets = draw(sampler_cls(), space, 20)
    assert subnets == draw(sampler_cls(), space, 20)
    assert len(set(subnets)) == 20
    assert subnets != draw(sampler_cls(), space, 20, seed=1)
    # a used sampler is as good as a new one
    sampler = sampler_cls()
    draw(sampler, space_of([3, 4]), 5)
    assert draw(sampler, space, 20) == subnets


# -- several subnets a step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_random", [0, 1, 2, 5])
def test_sandwich_is_max_then_min_then_random(n_random):
    space = space_of(SMOLLM2_BLOCK)
    subnets = SandwichSampler(n_random).subnets_of_step(space, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    assert subnets == [space.max, space.min, *(space.sample(rng) for _ in range(n_random))]
    assert len(set(subnets)) == n_random + 2


@pytest.mark.parametrize("sampler", ["balanced", BalancedSampler()])
def test_sandwich_with_another_sampler(sampler):
    space = space_of(SMOLLM2_BLOCK * 30)
    subnets = SandwichSampler(100, sampler).subnets_of_step(space, np.random.default_rng(0))[2:]
    spread = positions(space, subnets)
    assert spread.min() < 0.1 and spread.max() > 0.9  # which uniform sampling does not reach


@pytest.mark.parametrize("n_random", [-1, 1.0, True, "2", None])
def test_sandwich_bad_number(n_random):
    with pytest.raises(ValueError, match="`n_random` must be a whole number >= 0, got"):
        SandwichSampler(n_random)


@pytest.mark.parametrize("sampler", ["sandwich", None, UniformSampler, SandwichSampler()])
def test_sandwich_bad_sampler(sampler):
    with pytest.raises(ValueError, match=r"`sampler` must be one of \['balanced', 'uniform'\] or a callable"):
        SandwichSampler(sampler=sampler)
