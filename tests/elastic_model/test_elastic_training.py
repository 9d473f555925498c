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
"""Training of super-networks of the weights themselves, by the trainers of transformers, in one process and in two."""

import math

import numpy as np
import pytest
import torch
from support.fresh import run_fresh
from support.models import VOCABULARY, tiny_bert, tiny_llama, tiny_t5, tiny_vit
from support.places import TESTS
from support.training import arguments, dataset
from torch import nn
from transformers import Trainer, TrainerCallback

from peft_elastic import (
    ElasticConfig,
    ElasticModel,
    ElasticTrainer,
    SandwichSampler,
    Stage,
    SubnetSamplingCallback,
    get_elastic_model,
)


pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH = {"heads": [1.0, 0.5], "mlp": [1.0, 0.5, 1 / 6]}


def elastic_llama(**settings):
    model = tiny_llama(num_hidden_layers=3, **settings)
    return get_elastic_model(model, ElasticConfig(WIDTH, "all", importance="magnitude"))


class Record(TrainerCallback):
    """The subnet of every forward pass, and the losses."""

    def __init__(self, model):
        self.training, self.evaluation, self.losses = [], [], []
        model.register_forward_hook(self._note)

    def _note(self, model, args, output):
        (self.training if model.training else self.evaluation).append(model.active_subnet)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs[name] for name in ("loss", "eval_loss") if name in logs]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


def train(folder, stop=6, resume=None, world=1, trainer="elastic", dropout=0.1, **settings):
    """Six steps of global batch 4; the record and the weights."""
    model = elastic_llama(attention_dropout=dropout)
    record = Record(model)
    args = arguments(
        folder, max_steps=6, per_device_train_batch_size=2 // world, gradient_accumulation_steps=2, save_strategy="steps",
        save_steps=3, learning_rate=1e-3, weight_decay=0.01, **settings,
    )  # fmt: skip
    callbacks = [record, StopAt(stop)]
    if trainer == "elastic":
        made = ElasticTrainer(
            model, args, train_dataset=dataset(), callbacks=callbacks, distillation="max", distillation_weight=0.9,
            distillation_temperature=2.0, eval_subnet="heuristic",
        )  # fmt: skip
    else:
        callbacks.append(SubnetSamplingCallback(eval_subnet="heuristic"))
        made = Trainer(model, args, train_dataset=dataset(), callbacks=callbacks)
    made.train(resume_from_checkpoint=resume)
    return record, {name: weight.detach().clone() for name, weight in model.named_parameters()}


def test_the_callback_samples_by_seed_and_step(tmp_path):
    record, weights = train(tmp_path, trainer="plain")
    space = elastic_llama().search_space
    assert record.training == [space.sample([42, step]) for step in range(6) for _ in range(2)]
    start = dict(elastic_llama().named_parameters())
    moved = [name for name, weight in weights.items() if not torch.equal(weight, start[name])]
    assert moved == list(weights)  # all of them are trained
    model = ElasticModel.from_pretrained(tmp_path / "checkpoint-6")
    assert model.active_subnet == space.heuristic
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())


@pytest.mark.parametrize("trainer", ["elastic", "plain"])
def test_resumed_in_a_fresh_process_bit_for_bit(tmp_path, trainer):
    """With dropout, Adam's moments, several subnets a step and distillation; the first process ends in the middle."""
    record, weights = train(tmp_path / "unbroken", trainer=trainer)
    script = f"""
import sys, torch
sys.path.insert(0, {str(TESTS / "elastic_model")!r})
from test_elastic_training import train
stop, folder, resume = int(sys.argv[1]), sys.argv[2], sys.argv[3] or None
record, weights = train(folder, stop=stop, resume=resume, trainer={trainer!r})
torch.save((record.training, weights), f"{{folder}}/{{stop}}.pt")
"""
    folder = tmp_path / "broken"
    for stop, resume in ((3, ""), (6, folder / "checkpoint-3")):
        done = run_fresh(script, stop, folder, resume)
        assert done.returncode == 0, done.stderr
    first, second = (torch.load(folder / f"{stop}.pt", weights_only=False) for stop in (3, 6))
    assert first[0] + second[0] == record.training
    assert all(torch.equal(second[1][name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("config", [{"elastic_depth": None}, {"importance": "none"}])
def test_a_checkpoint_of_another_super_network_is_not_gone_on_from(config, tmp_path):
    """Its weights fit any of the same model, so that nobody else would notice."""
    train(tmp_path, stop=3)
    other = get_elastic_model(
        tiny_llama(num_hidden_layers=3),
        ElasticConfig(**{"elastic_width": WIDTH, "elastic_depth": "all", "importance": "magnitude"} | config),
    )
    args = arguments(tmp_path, max_steps=6)
    trainer = Trainer(other, args, train_dataset=dataset(), callbacks=[SubnetSamplingCallback()])
    with pytest.raises(ValueError, match="checkpoint of a super-network with other options, or with heads"):
        trainer.train(resume_from_checkpoint=True)


def test_two_processes_train_as_one_does(tmp_path):
    """DDP over gloo, with width and depth, several subnets a step and gradient accumulation: the same losses to 1e-5."""
    _, alone = train(tmp_path / "alone", dropout=0.0)
    script = f"""
import os, sys, torch
sys.path.insert(0, {str(TESTS / "elastic_model")!r})
from support.processes import in_processes
from test_elastic_training import train
def one():
    torch.set_num_threads(1)
    record, weights = train(sys.argv[1], world=2, dropout=0.0, ddp_backend="gloo")
    torch.save((record.training, weights), sys.argv[1] + f"/rank-{{os.environ['RANK']}}.pt")
sys.exit(in_processes(2, one))
"""
    done = run_fresh(script, tmp_path)
    assert done.returncode == 0, done.stderr
    (subnets, weights), (others, same) = (torch.load(tmp_path / f"rank-{r}.pt", weights_only=False) for r in (0, 1))
    assert subnets == others
    for name, weight in alone.items():
        assert torch.equal(weights[name], same[name])
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-5)


def test_stages(tmp_path):
    model = elastic_llama()
    record = Record(model)
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=4)
    stages = [Stage(["mlp"], 1), Stage(["mlp", "heads", "depth"], 1, learning_rate=1e-3)]
    Trainer(model, args, train_dataset=dataset(16), callbacks=[record, SubnetSamplingCallback(stages=stages)]).train()
    whole = model.search_space.max
    kinds = [
        {key.partition(":")[0] for key, value in subnet.items() if value != whole[key]} for subnet in record.training
    ]
    assert (
        len(kinds) == 8 and set().union(*kinds[:4]) == {"mlp"} and set().union(*kinds[4:]) == {"mlp", "heads", "depth"}
    )


# -- distillation as in the paper ----------------------------------------------------------------------------------------


def classification(size=32):
    ids = torch.randint(3, VOCABULARY, (size, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def test_a_step_of_eftnas(tmp_path):
    """0.1 CE + 0.9 T^2 KL(teacher || subnet), of the largest, the smallest and a random subnet, by hand."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, teacher = tiny_bert(**still), tiny_bert(seed=5)
    get_elastic_model(model, ElasticConfig(WIDTH, importance="none"))
    space, rows = model.search_space, classification(4)
    ids, labels = torch.stack([row["input_ids"] for row in rows]), torch.stack([row["labels"] for row in rows])
    subnets = list(SandwichSampler(n_random=1).subnets_of_step(space, np.random.default_rng([42, 0])))
    assert len(subnets) == 3 and {space.max, space.min} <= set(subnets)
    for subnet in subnets:
        model.set_subnet(subnet)
        logits = model(ids).logits
        p, q = ((each / 2).softmax(-1) for each in (teacher(ids).logits.detach(), logits))
        loss = 0.1 * nn.functional.cross_entropy(logits, labels) + 0.9 * 4 * (p * (p.log() - q.log())).sum(-1).mean()
        (loss / 3).backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.set_subnet("max")
    seen = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.update({name: weight.grad.clone() for name, weight in model.named_parameters()})

    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=4, max_grad_norm=0)
    ElasticTrainer(
        model.eval(), args, train_dataset=rows, callbacks=[Gradients()], strategy=SandwichSampler(n_random=1),
        distillation=teacher, distillation_weight=0.9, distillation_temperature=2.0,
    ).train()  # fmt: skip
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", [{"num_labels": 2}, {"id2label": {0: "good", 1: "bad", 2: "so"}}])
def test_a_teacher_with_other_labels(labels, tmp_path):
    model = tiny_bert(id2label={0: "bad", 1: "good", 2: "so"})
    get_elastic_model(model, ElasticConfig(WIDTH, importance="none"))
    teacher = tiny_bert(**labels) if "id2label" in labels else _with_two_labels()
    with pytest.raises(ValueError, match="`distillation` must be a model with the labels of the trained one"):
        ElasticTrainer(model, arguments(tmp_path), train_dataset=classification(), distillation=teacher)
    plain = tiny_bert(seed=3)  # whose labels have no names
    ElasticTrainer(model, arguments(tmp_path), train_dataset=classification(), distillation=plain)


def _with_two_labels():
    model = tiny_bert()
    config = type(model.config)(**(model.config.to_dict() | {"id2label": {0: "bad", 1: "good"}}))
    return type(model)(config)


# -- weight decay --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama, tiny_vit, tiny_t5])
def test_norms_and_biases_do_not_decay(make, tmp_path):
    """In our groups, and in those that Trainer makes by itself: the same."""
    model = get_elastic_model(make(), ElasticConfig(WIDTH, importance="none"))
    ours = model.optimizer_groups(0.01)
    assert [group["weight_decay"] for group in ours] == [0.01, 0.0]
    grouped = [parameter for group in ours for parameter in group["params"]]
    assert len({*map(id, grouped)}) == len(grouped) and {*map(id, grouped)} == {*map(id, model.parameters())}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    without = {names[id(parameter)] for parameter in ours[1]["params"]}
    assert without == {n for n, p in model.named_parameters() if "bias" in n or (p.dim() == 1 and "norm" in n.lower())}
    trainer = Trainer(model, arguments(tmp_path, weight_decay=0.01), train_dataset=dataset())
    trainer.create_optimizer()
    theirs = {
        names[id(p)] for group in trainer.optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]
    }
    assert theirs == without


def test_loss_falls_for_all_subnets(tmp_path):
    torch.manual_seed(0)
    model = tiny_bert()
    get_elastic_model(model, ElasticConfig(WIDTH, importance="magnitude"))
    rows = classification(48)
    ids, labels = torch.stack([row["input_ids"] for row in rows]), torch.stack([row["labels"] for row in rows])

    def losses():
        found = []
        for name in ("max", "heuristic", "min"):
            model.set_subnet(name)
            with torch.no_grad():
                found.append(model.eval()(ids, labels=labels).loss.item())
        model.set_subnet("max")
        return found

    before = losses()
    args = arguments(tmp_path, max_steps=60, per_device_train_batch_size=16, learning_rate=3e-3)
    ElasticTrainer(model, args, train_dataset=rows, strategy=SandwichSampler(n_random=1), distillation="max").train()
    after = losses()
    assert all(a < 0.6 * b for a, b in zip(after, before)) and all(map(math.isfinite, after)), (before, after)
