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
"""Optimizers that mix the ranks of an adapter: ranks that took no part in a step are left alone, or it is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from support.models import tiny_llama, tiny_mixtral, tokens
from support.training import arguments, dataset, elastic_llama
from transformers import Trainer

from peft_elastic import ElasticLoraConfig, ElasticTrainer, SubnetSamplingCallback


pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "down_proj"]


def elastic(**settings):
    torch.manual_seed(0)
    config = {
        "r": 8,
        "lora_alpha": 16,
        "elastic_ranks": [8, 6, 4],
        "target_modules": TARGETS,
        "init_lora_weights": False,
    }
    return get_peft_model(tiny_llama(), ElasticLoraConfig(**config | settings))


def factors(model, side):
    return {name: p for name, p in model.named_parameters() if f"lora_{side}" in name}


def step(model, optimizer, seed=0):
    model.train()
    inputs = tokens(seed=seed, batch=4)
    model(input_ids=inputs, labels=inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_lora_fa_takes_the_steps_of_the_active_ranks_alone():
    model = elastic()
    stock = get_peft_model(tiny_llama(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    with torch.no_grad():
        for side, cut in (("A", lambda p: p[:4]), ("B", lambda p: p[:, :4])):
            for p, full in zip(factors(stock, side).values(), factors(model, side).values(), strict=True):
                p.copy_(cut(full))
    before = {side: {n: p.detach().clone() for n, p in factors(model, side).items()} for side in "AB"}
    optimizers = [create_lorafa_optimizer(m, r=8, lora_alpha=16, lr=1e-2) for m in (model, stock)]
    model.sample_subnet("min")
    for number in range(3):
        for m, optimizer in zip((model, stock), optimizers):
            step(m, optimizer, number)
    moved = 0
    for (name, p), expected in zip(factors(model, "B").items(), factors(stock, "B").values(), strict=True):
        torch.testing.assert_close(p[:, :4], expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(p[:, 4:], before["B"][name][:, 4:])
        moved += (p - before["B"][name]).abs().max().item()
    assert moved > 0.05
    assert all(torch.equal(p, before["A"][name]) for name, p in factors(model, "A").items())
    parameters = {id(p) for p in model.parameters()}
    assert all(id(p) in parameters for group in optimizers[0].param_groups for p in group["params"])


def test_lora_fa_is_that_of_peft_in_the_largest_subnet():
    model, other = elastic(), elastic()
    optimizers = [create_lorafa_optimizer(m, r=8, lora_alpha=16, lr=1e-2) for m in (model, other)]
    model.sample_subnet("max")  # `other` has never heard of sampling
    for number in range(2):
        for m, optimizer in zip((model, other), optimizers):
            step(m, optimizer, number)
    for p, expected in zip(factors(model, "B").values(), factors(other, "B").values(), strict=True):
        assert torch.equal(p, expected)


def test_momentum_moves_ranks_that_took_part_before():
    """As with AdamW."""
    model = elastic()
    optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-2)
    model.sample_subnet("max")
    step(model, optimizer)
    before = {name: p.detach().clone() for name, p in factors(model, "B").items()}
    model.sample_subnet("min")
    step(model, optimizer, 1)
    for name, p in factors(model, "B").items():
        assert 0 < (p - before[name])[:, 4:].abs().max() <= 0.011


def test_a_step_that_fails_loses_nothing():
    model = elastic()
    optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.sample_subnet("min")
    factors_of_group = optimizer.param_groups[0].pop("scaling_factors")
    legacy = optimizer.param_groups[0].pop("scaling_factor")
    with pytest.raises(KeyError):
        step(model, optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.param_groups[0] |= {"scaling_factors": factors_of_group, "scaling_factor": legacy}
    step(model, optimizer)
    assert all(torch.equal(p, before[name]) for name, p in factors(model, "A").items())
    parameters = {id(p) for p in model.parameters()}
    assert all(id(p) in parameters for group in optimizer.param_groups for p in group["params"])


def test_lora_fa_passes_blocks_that_were_skipped():
    model = elastic(elastic_depth="all")
    optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-2)
    skipped = next(c.key for c in model.search_space if c.kind == "depth" and c.name.endswith("1"))
    model.sample_subnet(model.search_space.max.to_dict() | {skipped: 0})
    before = {name: p.detach().clone() for name, p in factors(model, "B").items()}
    step(model, optimizer)
    moved = {name: not torch.equal(p, before[name]) for name, p in factors(model, "B").items()}
    assert moved == {name: ".layers.1." not in name for name in moved}


@pytest.mark.parametrize("several", [False, True])
def test_lora_fa_with_a_trainer(tmp_path, several):
    model = elastic_llama()
    optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-2)
    before = {name: p.detach().clone() for name, p in factors(model, "B").items()}
    settings = {"model": model, "args": arguments(tmp_path, max_steps=1), "train_dataset": dataset(8)}
    settings["optimizers"] = (optimizer, None)
    if several:
        trainer = ElasticTrainer(strategy=SmallOnes(), **settings)
    else:
        trainer = Trainer(callbacks=[SubnetSamplingCallback(lambda space, rng: space.min)], **settings)
    trainer.train()
    rank = 4 if several else 2
    for name, p in factors(model, "B").items():
        assert torch.equal(p[:, rank:], before[name][:, rank:])
        assert not torch.equal(p[:, :rank], before[name][:, :rank])


class SmallOnes:
    """Two subnets, of ranks 2 and 4."""

    def subnets_of_step(self, space, rng):
        return [space.min, space.subnet({choice.key: 4 for choice in space})]


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_the_riemannian_optimizer_is_refused_before_it_moves_anything(base):
    model = elastic()
    optimizer = create_riemannian_optimizer(model, base, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.sample_subnet("min")
    with pytest.raises(
        ValueError, match="RiemannianPreconditionedOptimizer would move ranks .*'model.layers.0.self_attn.q_proj'"
    ):
        step(model, optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.zero_grad()
    model.sample_subnet("max")
    step(model, optimizer)
    assert not all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_lora_fa_on_experts_is_refused():
    """Their A holds expert after expert, their B rank after rank."""
    config = ElasticLoraConfig(r=8, lora_alpha=16, target_parameters=["experts.down_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_mixtral(), config)
    optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=16, lr=1e-2)
    model.sample_subnet("min")
    with pytest.raises(ValueError, match="LoraFAOptimizer would move ranks .*experts.* without `target_parameters`"):
        step(model, optimizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0),
        lambda p: torch.optim.RMSprop(p, lr=1e-2),
        lambda p: torch.optim.Adagrad(p, lr=1e-2),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),
        pytest.param(
            lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0),
            marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 is the first to have Muon"),
        ),
    ],
    ids=["SGD", "AdamW", "RMSprop", "Adagrad", "Adafactor", "Muon"],
)
def test_others_leave_ranks_alone_that_never_took_part(make):
    model = elastic()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    before = {name: p.detach().clone() for name, p in factors(model, "B").items()}
    model.sample_subnet("min")
    for number in range(2):
        step(model, optimizer, number)
    for name, p in factors(model, "B").items():
        assert torch.equal(p[:, 4:], before[name][:, 4:])
        assert not torch.equal(p[:, :4], before[name][:, :4])
