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
"""Stages of a training: what of each kind is open, how long, sorting anew, and what happens before an evaluation."""

import dataclasses
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from support.fresh import run_fresh
from support.models import tiny_llama, tokens
from support.places import TESTS
from support.training import arguments, dataset
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainerCallback

from peft_elastic import (
    Choice,
    ElasticConfig,
    ElasticLoraConfig,
    ElasticModel,
    ElasticTrainer,
    SearchSpace,
    Stage,
    SubnetSamplingCallback,
    get_elastic_model,
)
from peft_elastic.structure.importance import noted_orders
from peft_elastic.supernet.stages import StagePlan


pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH = {"heads": [1.0, 0.5], "mlp": [1.0, 0.5, 1 / 6]}


# -- what is open ------------------------------------------------------------------------------------------------------


def convolutional_space():
    """As of a network of two stacks of blocks, of which some may be skipped, and one block in its two parts."""
    return SearchSpace(
        [
            Choice("channels", "stem", (64, 48, 32)),
            Choice("channels", "stages.0", (256,)),
            *(Choice("kernel", f"stages.0.{i}.conv", (5, 3)) for i in range(2)),
            *(Choice("depth", f"stages.0.{i}", (1, 0), (f"stages.0.{i}",)) for i in (1, 2, 3)),
            *(Choice("depth", f"stages.1.2.{part}", (1, 0), ("stages.1.2",)) for part in ("attention", "mlp")),
            Choice("depth", "stages.1.1", (1, 0), ("stages.1.1",)),
        ]
    )


def plan_of(stages, space=None, max_steps=30, **settings):
    args = SimpleNamespace(**{"max_steps": max_steps, "num_train_epochs": 3, "learning_rate": 0.1} | settings)
    return StagePlan(stages, space or convolutional_space(), args, max_steps, None)


def test_limits_open_the_largest_options_and_the_last_blocks():
    kinds = ["kernel", "depth", "channels"]
    plan = plan_of(
        [
            Stage(["kernel"], steps=5),
            Stage(["kernel", "depth"], steps=5, options={"depth": 1}),
            Stage(kinds, steps=10, options={"channels": 2, "depth": 2}),
            Stage(kinds, steps=10),
        ]
    )
    opened = []
    for step in (4, 9, 19, 29):
        space = plan.space_of_step(step)
        opened.append({choice.key: choice.options for choice in space if len(choice.options) > 1})
    kernels = {f"kernel:stages.0.{i}.conv": (5, 3) for i in range(2)}
    depth = lambda *names: {f"depth:stages.{name}": (1, 0) for name in names}  # noqa: E731
    last = depth("0.3", "1.1")  # in the order of the space
    assert opened[0] == kernels
    assert opened[1] == kernels | last
    assert opened[2] == kernels | depth("0.2", "0.3", "1.1", "1.2.attention", "1.2.mlp") | {"channels:stem": (64, 48)}
    assert opened[3] == kernels | depth("0.1", "0.2", "0.3", "1.1", "1.2.attention", "1.2.mlp") | {
        "channels:stem": (64, 48, 32)
    }
    assert plan.space_of_step(0).max == convolutional_space().max  # a kind that is not named runs at its maximum


def test_any_combination_of_the_last_blocks_is_sampled():
    stages = [Stage(["depth"], steps=29, options={"depth": 2}), Stage(["depth"], steps=1)]
    space = plan_of(stages).space_of_step(0)
    rng = np.random.default_rng(0)
    seen = {tuple(space.sample(rng)[f"depth:stages.0.{i}"] for i in (1, 2, 3)) for _ in range(200)}
    assert seen == {(1, a, b) for a in (0, 1) for b in (0, 1)}


def test_steps_and_epochs_are_lengths_of_the_same_training():
    """30 steps in 3 epochs."""
    stages = [Stage(["kernel"], steps=4), Stage(["channels"], 1.5), Stage(["depth"], steps=11)]
    args = SimpleNamespace(max_steps=-1, num_train_epochs=3, learning_rate=0.1)
    plan = StagePlan(stages, convolutional_space(), args, 30, None)
    kinds = [next(iter({c.kind for c in plan.space_of_step(step) if len(c.options) > 1})) for step in range(30)]
    assert kinds == ["kernel"] * 4 + ["channels"] * 15 + ["depth"] * 11


def test_stages_survive_json():
    stage = Stage(("rank", "mlp"), learning_rate=1e-3, steps=7, options={"mlp": 2}, sort=True)
    again = Stage(**json.loads(json.dumps(dataclasses.asdict(stage))))
    assert again == stage and hash(again) == hash(stage)
    assert stage != dataclasses.replace(stage, options={})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "`epochs` of a stage must be a positive number, got None; or give `steps`"),
        ({"epochs": 1, "steps": 2}, "`epochs` of a stage must be left out where `steps` are given"),
        ({"steps": 0}, "`steps` of a stage must be a whole number >= 1 or None, got 0"),
        ({"steps": 2.0}, "`steps` of a stage must be a whole number"),
        ({"steps": True}, "`steps` of a stage must be a whole number"),
        ({"steps": 2, "options": {"mlp": 0}}, "`options` of a stage must be a dict from kinds to whole numbers >= 1"),
        ({"steps": 2, "options": ["mlp"]}, "`options` of a stage must be a dict"),
        (
            {"steps": 2, "options": {"heads": 1}},
            r"`options` of a stage must name some of its `kinds` .*got \['heads'\]",
        ),
        ({"steps": 2, "sort": 1}, "`sort` must be True or False, got 1"),
        ({"steps": 2, "kinds": {"mlp": 2}}, "`kinds` of a stage must be a sequence .* is said by `options`"),
    ],
)
def test_bad_stages(settings, message):
    with pytest.raises(ValueError, match=message):
        Stage(**{"kinds": ["mlp"]} | settings)


@pytest.mark.parametrize(
    "stages, message",
    [
        ([Stage(["chanels"], steps=30)], r"names the kinds \['chanels'\].* has \['channels', 'depth', 'kernel'\]"),
        ([Stage(["channels"], steps=29)], "sum to 29 optimizer steps, but the training has 30"),
        ([Stage(["channels"], steps=20), Stage(["depth"], 1)], "leave `max_steps` at -1, it is 30, or give all"),
        (
            [Stage(["channels"], steps=30, options={"channels": 2})],
            "never open all of 'channels': the option 32 of 'stem'",
        ),
        (
            [Stage(["depth"], steps=30, options={"depth": 1})],
            "never open all of 'depth': the option 0 of 'stages.0.1'",
        ),
    ],
)
def test_stages_that_do_not_fit(stages, message):
    with pytest.raises(ValueError, match=message):
        plan_of(stages)


# -- training ----------------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """The order, the rate and the subnet of each step; stops after one of them, and an average of the weights."""

    def __init__(self, model, stop, average=None):
        self.orders, self.rates, self.subnets = [], [], []
        self.model, self.stop, self.average = model, stop, average

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        self.orders.append(order_of(self.model))
        self.rates.append(lr_scheduler.get_last_lr()[0])
        control.should_training_stop |= state.global_step >= self.stop
        if self.average is not None:
            self.average.update_parameters(self.model)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.subnets.append(self.model.active_subnet)


def order_of(model):
    base = getattr(model, "get_base_model", lambda: model)()
    return {name: order.tolist() for name, order in noted_orders(base).items()}


def make_model(kind, seed=0):
    model = tiny_llama(num_hidden_layers=3, attention_dropout=0.1)
    if kind == "adapter":
        config = ElasticLoraConfig(
            r=4, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"], elastic_width=WIDTH, elastic_depth="all",
            importance="activation", lora_dropout=0.1,
        )  # fmt: skip
        return get_peft_model(model, config)
    return get_elastic_model(model, ElasticConfig(WIDTH, "all", importance="activation"))


STAGES = [
    Stage(["mlp"], steps=2, learning_rate=2e-2, options={"mlp": 2}, sort=True),
    Stage(["mlp", "depth"], steps=3, options={"depth": 1}, sort=True),
    Stage(["mlp", "heads", "depth"], steps=3, learning_rate=1e-2, sort=True),
]


def shuffled():
    """Calibration that is in another order each time it is gone through, by the global generator."""
    return torch.utils.data.DataLoader(tokens(batch=12, length=7), batch_size=4, shuffle=True)


def train(
    folder, kind="model", trainer="plain", stop=8, resume=None, save_steps=1, stages=STAGES, average=False, **more
):
    torch.manual_seed(random.randrange(2**31))
    model = more.pop("model", None) or make_model(kind)
    copy_ = AveragedModel(model) if average is True else average or None
    watch = Watch(model, stop, copy_)
    args = arguments(
        folder, max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="steps",
        save_steps=save_steps, learning_rate=5e-3, weight_decay=0.01, seed=11, **more.pop("arguments", {}),
    )  # fmt: skip
    settings = {"stages": stages, "calibration": shuffled(), "averaged": copy_, **more}
    if trainer == "elastic":
        made = ElasticTrainer(model, args, train_dataset=dataset(), callbacks=[watch], **settings)
    else:
        callbacks = [watch, SubnetSamplingCallback(**settings)]
        made = Trainer(model, args, train_dataset=dataset(), eval_dataset=dataset(8), callbacks=callbacks)
    made.train(resume_from_checkpoint=resume)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return SimpleNamespace(model=model, watch=watch, weights=weights, average=copy_, trainer=made)


@pytest.mark.parametrize("kind, trainer", [("model", "plain"), ("model", "elastic"), ("adapter", "plain")])
def test_resumed_in_the_middle_of_any_stage_bit_for_bit(tmp_path, kind, trainer):
    """From the step before a sorting, from that after it, and from the middle of the last stage, with dropout and AdamW."""
    whole = train(tmp_path / "whole", kind, trainer)
    orders = whole.watch.orders
    changes = [step for step in range(1, 8) if orders[step] != orders[step - 1]]
    assert changes == [2, 5]  # and before step 0
    rates = [(8 - step) / 8 * {0: 2e-2, 1: 2e-2}.get(step, 5e-3 if step < 5 else 1e-2) for step in range(1, 8)]
    assert whole.watch.rates[:-1] == pytest.approx(rates)  # after step n the rate is that of step n + 1
    for at in (2, 3, 5, 7):
        part = tmp_path / f"part-{at}"
        first = train(part, kind, trainer, stop=at)
        second = train(part, kind, trainer, resume=str(part / f"checkpoint-{at}"))
        assert first.watch.orders + second.watch.orders == orders
        assert first.watch.rates + second.watch.rates == whole.watch.rates
        assert first.watch.subnets + second.watch.subnets == whole.watch.subnets
        assert second.weights.keys() == whole.weights.keys()
        assert all(torch.equal(second.weights[name], weight) for name, weight in whole.weights.items())


def test_resumed_in_a_fresh_process_from_the_checkpoint_itself(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "part", stop=3)
    script = f"""
import sys, torch
sys.path.insert(0, {str(TESTS / "supernet")!r})
from test_stages import ElasticModel, order_of, train
folder = sys.argv[1]
run = train(folder, model=ElasticModel.from_pretrained(folder + "/checkpoint-3").train(), resume=folder + "/checkpoint-3")
torch.save((run.watch.orders, run.weights), folder + "/run.pt")
"""
    done = run_fresh(script, tmp_path / "part")
    assert done.returncode == 0, done.stderr
    orders, weights = torch.load(tmp_path / "part" / "run.pt", weights_only=False)
    assert orders == whole.watch.orders[3:]
    assert all(torch.equal(weights[name], weight) for name, weight in whole.weights.items())
    saved = ElasticModel.from_pretrained(tmp_path / "part" / "checkpoint-8")
    assert order_of(saved) == orders[-1]


def test_averages_are_sorted_along_and_resumed(tmp_path):
    whole = train(tmp_path / "whole", average=True)
    assert order_of(whole.average.module) == whole.watch.orders[-1]
    first = train(tmp_path / "part", stop=4, average=True)
    average = AveragedModel(make_model("model"))
    average.load_state_dict(first.average.state_dict())
    second = train(tmp_path / "part", resume=str(tmp_path / "part" / "checkpoint-4"), average=average)
    assert order_of(average.module) == whole.watch.orders[-1]
    expected = whole.average.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in second.average.state_dict().items())


def test_sorting_at_the_start_of_a_stage_changes_the_largest_subnet_by_rounding_only(tmp_path):
    """Stages of which all train the largest subnet: the losses are those of a training that never sorts."""
    losses = []
    for sort in (False, True):
        stages = [Stage(["mlp"], steps=n, sort=sort) for n in (2, 3, 3)]
        settings = {"strategy": lambda space, rng: space.max, "arguments": {"logging_steps": 1}}
        model = get_elastic_model(
            tiny_llama(num_hidden_layers=3), ElasticConfig(WIDTH, "all", importance="activation")
        )
        run = train(tmp_path / str(sort), model=model, stages=stages, save_steps=100, **settings)
        losses.append([entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry])
        assert (len({json.dumps(order) for order in run.watch.orders}) > 1) is sort
    assert len(losses[0]) == 8
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"calibration": None}, "`sort=True`: `calibration`: importance 'activation' needs data"),
        ({"calibration": iter([tokens()])}, "`calibration` must be a list of batches"),
        ({"averaged": make_model("model")}, None),
        ({"averaged": tiny_llama()}, "`averaged`"),
        ({"prepare": 3}, "`prepare` must be a function of the model"),
        (
            {"arguments": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}},
            "`load_best_model_at_end` may load the weights of a step before",
        ),
    ],
)
def test_what_cannot_sort_is_refused_when_training_starts(tmp_path, settings, message):
    model = make_model("model")
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    if message is None:  # a model of one's own that is a copy
        train(tmp_path, model=model, stop=1, **settings)
        return
    with pytest.raises(ValueError, match=message):
        train(tmp_path, model=model, **settings)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not order_of(model)


def test_a_model_that_nothing_sorts_has_no_sorting_stage(tmp_path):
    model = get_elastic_model(tiny_llama(num_hidden_layers=3), ElasticConfig(WIDTH, "all", importance="none"))
    with pytest.raises(ValueError, match="`sort=True`: `importance` is 'none'"):
        train(tmp_path, model=model)
    model = get_elastic_model(tiny_llama(num_hidden_layers=3), ElasticConfig(elastic_depth="all"))
    with pytest.raises(ValueError, match="`sort=True`: `elastic_width` is not set"):
        train(tmp_path, model=model, stages=[Stage(["depth"], steps=8, sort=True)])


def test_several_processes_and_generations_are_refused(tmp_path, monkeypatch):
    model = make_model("model")
    args = arguments(tmp_path, max_steps=8)
    args.num_iterations = 2  # as of TRL's GRPO
    callback = SubnetSamplingCallback(stages=STAGES, calibration=tokens())
    with pytest.raises(
        ValueError, match="`sort=True` do not go with trainers that train several steps on one generation"
    ):
        Trainer(model, args, train_dataset=dataset(), callbacks=[callback]).train()
    monkeypatch.setattr("peft_elastic.supernet.callback.ranks.world_size", lambda: 2)
    with pytest.raises(ValueError, match="`sort=True` work in one process"):
        train(tmp_path, model=model)
    assert not order_of(model)


def test_a_checkpoint_of_other_stages_is_not_gone_on_from(tmp_path):
    train(tmp_path, stop=3)
    for stages, message in (
        ([Stage(["mlp"], steps=8)], "last sorted before step None, .* before step 2"),
        ([Stage(["mlp"], steps=8, sort=True)], "last sorted before step 0, .* before step 2"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, stages=stages, resume=str(tmp_path / "checkpoint-3"))


# -- before an evaluation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_prepare_sees_the_chosen_subnet_before_each_evaluation(tmp_path, strategy):
    """And leaves the training as it is without, though it draws from the global generators."""
    seen = []

    def prepare(model):
        seen.append((model.active_subnet, model.training, torch.is_grad_enabled(), torch.rand(3).tolist()))

    settings = {"eval_strategy": strategy, "eval_steps": 3, "eval_on_start": True, "per_device_eval_batch_size": 4}
    weights = []
    for each in (None, prepare):
        model = make_model("model")
        model.sort_by_importance(tokens(), progress=False)
        model.set_subnet("min")
        if strategy == "epoch":
            settings |= {"num_train_epochs": 1}
        run = train(
            tmp_path / str(bool(each)), model=model, prepare=each, stages=[Stage(["mlp"], steps=8)], save_steps=100,
            arguments=settings,
        )  # fmt: skip
        weights.append(run.weights)
    evaluations = [entry for entry in run.trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == len(seen) >= 2
    space = run.model.search_space
    assert all(entry[:3] == (space.min, False, False) for entry in seen)
    assert all(torch.equal(weight, weights[0][name]) for name, weight in weights[1].items())


def test_an_evaluation_that_nobody_prepared_is_an_error(tmp_path):
    class Late(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = True

    model = make_model("model")
    args = arguments(tmp_path, max_steps=2)
    callbacks = [SubnetSamplingCallback(prepare=lambda model: None), Late()]
    model.sort_by_importance(tokens(), progress=False)
    trainer = Trainer(model, args, train_dataset=dataset(), eval_dataset=dataset(8), callbacks=callbacks)
    with pytest.raises(ValueError, match="`prepare` was not called before this evaluation"):
        trainer.train()
    trainer = Trainer(model, args, train_dataset=dataset(), eval_dataset=dataset(8), callbacks=callbacks[::-1])
    trainer.train()
    assert sum("eval_loss" in entry for entry in trainer.state.log_history) == 2
    trainer.evaluate()  # after the training it is the caller's business
