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
"""What moves along when units are sorted in the middle of a training: gradients, the state of optimizers, averages of the weights."""

import copy

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from peft.optimizers import create_lorafa_optimizer
from support.models import default_dtype, tiny_bert, tiny_gpt2, tiny_llama, tokens
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers.optimization import Adafactor

from peft_elastic import ElasticConfig, ElasticLoraConfig, ElasticModel, get_elastic_model, sort_by_importance
from peft_elastic.layers.backends.float import permute_parameter
from peft_elastic.structure.along import Along
from peft_elastic.structure.importance import noted_orders, reorder


pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH = {"heads": [1.0, 0.5], "mlp": [1.0, 0.5]}
OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, amsgrad=True),
    "foreach": lambda p: torch.optim.Adam(p, 1e-2, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "adafactor-transformers": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9),
    "none": lambda p: torch.optim.AdamW(p, 1e-2),
}


def model_of(kind, adapters=False):
    with default_dtype(torch.float64):
        model = {"llama": tiny_llama, "bert": tiny_bert, "gpt2": tiny_gpt2}[kind]().double()
        if adapters:
            config = ElasticLoraConfig(
                r=4, target_modules="all-linear", elastic_width=WIDTH, importance="magnitude", init_lora_weights=False
            )
            return get_peft_model(model, config).double().eval()
        return get_elastic_model(model, ElasticConfig(WIDTH, importance="magnitude")).eval()


def base_of(model):
    return getattr(model, "get_base_model", lambda: model)()


def loss_of(model, step):
    ids = tokens(batch=3, length=7, seed=step)
    output = model(input_ids=ids)
    if (logits := getattr(output, "logits", None)) is None:
        return output.last_hidden_state.square().mean()
    if logits.dim() == 2:
        return nn.functional.cross_entropy(logits, ids[:, 0] % logits.shape[-1])
    return nn.functional.cross_entropy(logits.flatten(0, -2), ids.flatten() % logits.shape[-1])


def scores_of(model, seed):
    """Scores of every unit, drawn: another order than any importance would give."""
    generator = torch.Generator().manual_seed(seed)
    scores = sort_by_importance(copy.deepcopy(base_of(model)), "magnitude", progress=False)
    return {name: torch.rand(len(each), generator=generator) for name, each in scores.items()}


def train(model, optimizer, average, steps):
    losses = []
    for step in steps:
        loss = loss_of(model, step)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    return losses


def make(kind, optimizer, adapters=False):
    model = model_of(kind, adapters)
    made = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])
    return model, made, AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))


@pytest.mark.parametrize("kind, adapters", [("llama", False), ("bert", False), ("gpt2", False), ("llama", True)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_trajectory_is_that_without_sorting(kind, adapters, optimizer):
    """Sorted twice, as orders compose; the first time with a gradient that has not been used yet. "none": moments that stay behind
    are another training."""
    if optimizer not in ("adamw", "adafactor-transformers", "none") and (adapters or kind != "llama"):
        pytest.skip("one model says what there is to say")
    plain, sorted_ = make(kind, optimizer, adapters), make(kind, optimizer, adapters)
    moved = {"optimizer": sorted_[1]} if optimizer != "none" else {}
    reference, losses = train(*plain, range(3)), train(*sorted_, range(3))
    assert losses == reference
    for model, *_ in (plain, sorted_):
        loss_of(model, 100).backward()  # accumulated: half of the next step
    for seed in (1, 2):
        model = sorted_[0]
        own = scores_of(model, seed)
        got = model.sort_by_importance(importance=own, averaged=sorted_[2], progress=False, **moved)
        assert all(torch.equal(each, own[name].sort(descending=True)[0]) for name, each in got.items())
        reference += train(*plain, range(10 * seed, 10 * seed + 4))
        losses += train(*sorted_, range(10 * seed, 10 * seed + 4))
    difference = (torch.tensor(losses) - torch.tensor(reference)).abs().max().item()
    if optimizer == "none":
        assert difference > 1e-6
        return
    assert difference < 1e-9
    # the averages are the same functions
    with torch.no_grad():
        for step in (50, 51):
            torch.testing.assert_close(loss_of(sorted_[2], step), loss_of(plain[2], step), rtol=0, atol=1e-9)
    # and weights and averages themselves are permuted ones
    bases = [base_of(model) for model in (sorted_[0], sorted_[2].module)]
    others = [base_of(model) for model in (plain[0], plain[2].module)]
    after, before = noted_orders(bases[0]), noted_orders(others[0])
    assert after.keys() == before.keys() and not all(torch.equal(after[name], before[name]) for name in after)
    for mine, theirs in zip(bases, others):
        assert all(torch.equal(order, after[name]) for name, order in noted_orders(mine).items())
        reorder(mine, before)
        for (name, weight), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            if not name.endswith(
                ("key.bias", "c_attn.bias")
            ):  # a bias of keys has no gradient but noise, which Adam scales up
                torch.testing.assert_close(weight, other, rtol=0, atol=1e-8)


def test_the_optimizer_of_accelerate_and_lists():
    model, inner, _ = make("llama", "adamw")
    embeddings = torch.optim.SGD(model.get_input_embeddings().parameters(), 0.1, momentum=0.9)
    loss_of(model, 0).backward()
    inner.step()
    embeddings.step()
    prepared = Accelerator(cpu=True).prepare_optimizer(inner)
    layer = model.model.layers[0].mlp
    before = {name: inner.state[getattr(layer, name).weight]["exp_avg"].clone() for name in ("gate_proj", "down_proj")}
    orders = noted_orders(model)
    model.sort_by_importance(importance=scores_of(model, 3), optimizer=[prepared, embeddings], progress=False)
    moved = {name: inner.state[getattr(layer, name).weight]["exp_avg"] for name in before}
    then, now = orders["model.layers.0"], noted_orders(model)["model.layers.0"]
    step = torch.argsort(then)[now]
    assert not torch.equal(then, now)
    assert torch.equal(moved["gate_proj"], before["gate_proj"][step])
    assert torch.equal(moved["down_proj"], before["down_proj"][:, step])


class Odd(torch.optim.AdamW):
    """AdamW that keeps something more of each parameter."""

    def __init__(self, parameters, more):
        super().__init__(parameters, 1e-2)
        self.more = more

    def step(self, closure=None):
        super().step(closure)
        for parameter, state in self.state.items():
            if (more := self.more(parameter)) is not None:
                state["more"] = more


@pytest.mark.parametrize(
    "more, message",
    [
        (lambda p: torch.zeros(p.shape, dtype=torch.uint8), "quantised or spread"),
        (lambda p: torch.zeros(p.numel() // 4 + 2), "does not say what of it"),
        (lambda p: torch.zeros(p.shape[0]) if p.dim() == 2 and p.shape[0] == p.shape[1] else None, "does not say"),
        (lambda p: {"basis": torch.zeros_like(p)}, "is a dict, of which it is not known"),
    ],
)
def test_state_that_cannot_be_moved_is_refused_before_anything_is(more, message):
    model = model_of("bert")
    optimizer = Odd(model.parameters(), more)
    loss_of(model, 0).backward()
    optimizer.step()
    average = AveragedModel(model)
    held = [copy.deepcopy(each.state_dict()) for each in (model, average)]
    state, orders = copy.deepcopy(optimizer.state_dict()["state"]), noted_orders(model)
    with pytest.raises(ValueError, match=f"`optimizer`: the state 'more' that Odd has of .*{message}"):
        model.sort_by_importance(importance=scores_of(model, 1), optimizer=optimizer, averaged=average, progress=False)
    for each, before in zip((model, average), held):
        assert all(torch.equal(tensor, before[name]) for name, tensor in each.state_dict().items())
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i]["exp_avg"], state[i]["exp_avg"]) for i in state)
    assert all(torch.equal(order, orders[name]) for name, order in noted_orders(model).items())


def named(model, name, module=__name__):
    """An optimizer of a class with the name of another one, which itself needs a process group."""
    return type(name, (torch.optim.SGD,), {"__module__": module})(model.parameters(), 0.1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda m: {"optimizer": "adamw"}, "`optimizer` must be a torch.optim.Optimizer"),
        (lambda m: {"optimizer": [torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)]}, "holds none of them"),
        (lambda m: {"optimizer": named(m, "ZeroRedundancyOptimizer")}, "spreads its state over several processes"),
        (lambda m: {"optimizer": named(m, "FP16_Optimizer", "deepspeed.runtime")}, "keeps it in a flat copy"),
        (lambda m: {"averaged": {"weight": 1}}, "`averaged` must be an AveragedModel"),
        (lambda m: {"averaged": m}, "shares parameters"),
        (lambda m: {"averaged": model_of("bert")}, "must have the structure of the model, and has no"),
        (lambda m: {"averaged": get_elastic_model(tiny_llama(intermediate_size=16), m.elastic_config)}, "structure"),
        (lambda m: {"averaged": tiny_llama().double()}, "in another order than the model"),
    ],
)
def test_what_does_not_belong_to_the_model_is_refused(arguments, message):
    model = model_of("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.sort_by_importance(importance=scores_of(model, 1), progress=False, **arguments(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class ByName(torch.optim.SGD):
    """Its momentum is found by a number, as that of LoRA-FA is by a name."""

    def step(self, closure=None):
        self.state["0"] = {"momentum": self.param_groups[0]["params"][0].grad.clone()}


def test_state_by_the_names_of_layers_is_refused():
    model = model_of("llama", adapters=True)
    before = copy.deepcopy(model.state_dict())
    fa = create_lorafa_optimizer(model=model, r=4, lora_alpha=8, lr=1e-3)
    other = ByName([p for p in model.parameters() if p.requires_grad], 0.1)
    loss_of(model, 0).backward()
    other.step()
    for optimizer in (fa, other):
        with pytest.raises(ValueError, match="whose state is not kept by parameter"):
            model.sort_by_importance(importance=scores_of(model, 1), optimizer=optimizer, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_average_that_was_not_sorted_along_is_refused():
    model, optimizer, average = make("llama", "adamw")
    model.sort_by_importance(importance=scores_of(model, 1), optimizer=optimizer, progress=False)
    with pytest.raises(ValueError, match="`averaged` has its heads and channels in another order"):
        model.sort_by_importance(importance=scores_of(model, 2), averaged=average, progress=False)


def test_the_average_of_adapters_knows_that_its_base_is_sorted():
    with default_dtype(torch.float64):
        config = ElasticLoraConfig(r=2, target_modules=["q_proj"], elastic_width=WIDTH, importance="activation")
        model = get_peft_model(tiny_llama().double(), config)
    average = AveragedModel(model)
    with pytest.raises(ValueError, match="not sorted"):
        average.module.set_subnet("min")
    model.sort_by_importance(tokens(), averaged=average, progress=False)
    average.module.set_subnet("min")
    model.set_subnet("min")
    with torch.no_grad():
        torch.testing.assert_close(average(tokens()).logits, model(tokens()).logits)


def test_saved_after_two_sortings_it_is_the_same_model(tmp_path):
    model, optimizer, _ = make("llama", "adamw")
    for seed in (1, 2):
        train(model, optimizer, AveragedModel(model), [seed])
        model.sort_by_importance(importance=scores_of(model, seed), optimizer=optimizer, progress=False)
    model.save_pretrained(tmp_path)
    loaded = ElasticModel.from_pretrained(tmp_path)
    assert all(torch.equal(order, noted_orders(model)[name]) for name, order in noted_orders(loaded).items())
    for each in (model, loaded):
        each.set_subnet("min")
    with torch.no_grad():
        torch.testing.assert_close(loaded.double()(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-6)


class Convolutions(nn.Module):
    """3 x 3 with a bias, a normalisation, a 1 x 3 that reads it, and a depthwise one between them."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.depthwise, self.last = nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.Conv2d(6, 4, (1, 3))

    def forward(self, x):
        return self.last(self.depthwise(self.norm(self.first(x)).relu()))


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "adafactor", "adafactor-transformers"])
def test_parameters_of_convolutions_take_their_state_along(optimizer):
    """By what all sorting goes through, `permute_parameter`; also square kernels, whose factored moments look like one another."""
    torch.manual_seed(3)
    with default_dtype(torch.float64):
        models = [Convolutions()]
        models.append(copy.deepcopy(models[0]))
        images = [torch.randn(5, 3, 8, 8) for _ in range(8)]
    optimizers = [OPTIMIZERS[optimizer](model.parameters()) for model in models]
    losses = [[], []]
    for step, image in enumerate(images):
        if step == 4:
            model, index = models[1], torch.tensor([4, 2, 0, 5, 1, 3])
            along = Along(model, optimizers[1])
            along.check(model, ["first", "norm", "depthwise", "last"], None, [])
            with along.following():
                for module in (model.first, model.norm, model.depthwise):
                    for tensor in (module.weight, module.bias):
                        permute_parameter(tensor, 0, index)
                permute_parameter(model.last.weight, 1, index)
                for buffer in (model.norm.running_mean, model.norm.running_var):
                    permute_parameter(buffer, 0, index)
        for model, made, found in zip(models, optimizers, losses):
            loss = model(image).square().mean()
            found.append(loss.item())
            made.zero_grad()
            loss.backward()
            made.step()
    assert losses[0][:4] == losses[1][:4] and losses[0][4:] != losses[1][3:-1]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0, atol=1e-9)
    # (the mean has in it a bias without gradient, of which some optimizers scale up the noise)
    theirs = models[0].norm.running_var[index]
    torch.testing.assert_close(models[1].norm.running_var, theirs, rtol=0, atol=1e-9)
