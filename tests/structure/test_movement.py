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
"""Importance by movement: gradients of scores against dense references, the schedule, and trainings with stock Trainer."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.fresh import run_fresh
from support.models import (
    outputs,
    randomize,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_vit,
    tokens,
)
from support.movement import MODELS, arguments, batch_of, build, classified, dense_gradients, owners, train
from torch import nn
from transformers import Trainer, TrainerCallback

from peft_elastic import (
    ElasticLoraConfig,
    ElasticTrainer,
    MovementCallback,
    SubnetSamplingCallback,
    WidthPrunerConfig,
    sort_by_importance,
)
from peft_elastic.structure import Structure, load_scores, save_scores
from peft_elastic.structure.gates import UnitGates, _sum_of_products
from peft_elastic.structure.importance import note_scores, noted_orders, noted_scores
from peft_elastic.structure.movement import _Run, lowest


pytestmark = pytest.mark.filterwarnings("ignore")

OPEN = -float("inf")


def gates_of(model, dtype=torch.float64, seed=None):
    """With random scores, about half of them below zero, if there is a seed."""
    gates = UnitGates(model, Structure(model).widths, dtype)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for score in gates.scores.values():
            score.detach().copy_(torch.randn(len(score), generator=generator))
    return gates


def gradients_of(gates, model, batch, threshold=OPEN):
    gates.shut(threshold)
    gates.attach(sys._getframe())
    loss = model(**batch).loss
    loss.backward()
    gates.detach()
    found = {name: score.grad.clone() for name, score in gates.scores.items()}
    for score in gates.scores.values():
        score.grad = None
    model.zero_grad()
    return loss.detach(), found


def assert_same(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=lambda t: f"{name}: {t}")


# -- gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [OPEN, 0.0], ids=["open", "half closed"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_all_weights_of_a_unit(name, threshold):
    model, batch = build(name).double(), batch_of(name)
    gates = gates_of(model, seed=1)
    expected = dense_gradients(name, model, batch, gates.scores, threshold)
    plain = model(**batch).loss.detach()
    loss, found = gradients_of(gates, model, batch, threshold)
    assert_same(found, expected)
    assert all((value != 0).any() for value in found.values())
    assert torch.equal(loss, plain) == (threshold == OPEN)
    assert gates.reached == {slot.path for slot in gates.slots}


# the norms of the last two compute in float32
@pytest.mark.parametrize(
    ("name", "step", "tolerance"),
    [("bert", 1e-5, 1e-6), ("vit", 1e-5, 1e-6), ("gpt2", 1e-5, 1e-6), ("llama", 2e-3, 1e-3), ("t5", 2e-3, 1e-3)],
)
def test_gradients_by_differences(name, step, tolerance):
    """The gradient of an open unit is that of the loss by a factor before all of its weights."""
    model, batch = build(name).double(), batch_of(name)

    def loss_of(a_model):
        return a_model(**batch).logits.double().square().logsumexp(-1).mean()

    gates = gates_of(model)
    gates.attach(sys._getframe())
    loss_of(model).backward()
    gates.detach()
    order, score = list(gates.scores.items())[-2]
    losses = []
    for factor in (1 + step, 1 - step):
        scaled = copy.deepcopy(model)
        weights = dict(scaled.named_parameters())
        with torch.no_grad():
            for key, its_order, dim, units, _ in owners(name, model):
                if its_order == order:
                    factors = torch.ones(len(units), dtype=torch.float64).masked_fill(units == 1, factor)
                    weights[key].mul_(factors.view([-1 if d == dim else 1 for d in range(weights[key].dim())]))
            losses.append(loss_of(scaled))
    difference = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(difference, score.grad[1], rtol=tolerance, atol=tolerance * abs(score.grad[1].item()))


def test_weights_have_the_gradients_of_the_gated_model():
    model, batch = build("bert").double(), batch_of("bert")
    gates = gates_of(model, seed=1)
    gates.shut(0.0)
    gates.attach(sys._getframe())
    model(**batch).loss.backward()
    gates.detach()
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        for key, order, dim, units, reads in owners("bert", model):
            if reads:
                model.get_parameter(key).mul_((gates.scores[order] > 0).double()[units].unsqueeze(1 - dim))
    model(**batch).loss.backward()
    for key, parameter in model.named_parameters():
        closed = 1.0
        for other, order, dim, units, reads in owners("bert", model):
            if reads and other == key:  # the columns of closed units have no gradient through the gate
                closed = (gates.scores[order] > 0).double()[units].unsqueeze(1 - dim)
        if parameter.grad is not None:
            torch.testing.assert_close(found[key], parameter.grad * closed, rtol=1e-9, atol=1e-12)


def test_frozen_base_under_adapters():
    """Some layers have an adapter and some do not; scores are of both together."""
    model = tiny_llama().double()
    merged = copy.deepcopy(model)
    config = {"r": 4, "target_modules": ["q_proj", "o_proj", "up_proj"]}
    adapted = get_peft_model(model, LoraConfig(**config)).double().eval()
    randomize(adapted)
    plain = get_peft_model(merged, LoraConfig(**config)).double().eval()
    randomize(plain)
    plain = plain.merge_and_unload()
    for parameter in plain.parameters():
        parameter.requires_grad_()
    gates = gates_of(adapted.get_base_model(), seed=1)
    batch = batch_of("llama")
    for threshold in (OPEN, 0.0):
        expected = dense_gradients("llama", plain, batch, gates.scores, threshold)
        assert_same(gradients_of(gates, adapted, batch, threshold)[1], expected)
    assert all(p.grad is None for key, p in adapted.named_parameters() if "lora" not in key)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, batch = build("llama").double().train(), batch_of("llama")
    gates = gates_of(model, seed=1)
    _, expected = gradients_of(gates, model, batch, 0.0)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients_of(gates, model, batch, 0.0)[1], expected, 1e-12)


def test_micro_batches_add_up():
    model = build("bert").double()
    gates = gates_of(model, seed=1)
    single = [gradients_of(gates, model, batch_of("bert", seed))[1] for seed in (0, 1)]
    gates.attach(sys._getframe())
    for seed in (0, 1):
        model(**batch_of("bert", seed)).loss.backward()
    assert_same({n: s.grad for n, s in gates.scores.items()}, {n: single[0][n] + single[1][n] for n in single[0]})


def test_autocast_adds_up_in_float32():
    ones = torch.ones(4096, 3, dtype=torch.bfloat16)
    assert _sum_of_products(ones, ones).tolist() == [4096.0] * 3  # in bf16 a sum of ones stops at 256
    model, batch = build("bert"), batch_of("bert")
    gates = gates_of(model, torch.float32, seed=1)
    _, expected = gradients_of(gates, model, batch, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = gradients_of(gates, model, batch, 0.0)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).norm() < 0.05 * value.norm()


def test_long_inputs_are_summed_in_pieces():
    a, b = torch.randn(2, 3000, 150, dtype=torch.float64).unbind()
    torch.testing.assert_close(_sum_of_products(a, b), (a * b).sum(0))


def test_hooks_end_with_the_call_that_added_them():
    model, batch = build("bert").double().train(), batch_of("bert")
    gates = gates_of(model, seed=1)
    model.eval()
    plain = model(**batch).loss

    def interrupted():
        gates.shut(0.0)
        gates.attach(sys._getframe())
        assert model(**batch).loss != plain
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    copied = copy.deepcopy(model)
    assert model(**batch).loss == plain and copied(**batch).loss == plain
    assert hooks_of(model) == 0 and all(score.grad is None for score in gates.scores.values())


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


# -- schedule --------------------------------------------------------------------------------------------------------------


def run_of(model, first=4, last=8, penalty=0.02):
    return _Run(model, Structure(model).widths, first, last, penalty)


def test_schedule():
    run = run_of(tiny_bert())
    generator = torch.Generator().manual_seed(0)
    for score in run.gates.scores.values():
        score.detach().copy_(torch.randn(len(score), generator=generator))
    lowest_score = np.quantile(np.concatenate([s.numpy() for s in run.scores().values()]).astype(float), 0.001)
    assert lowest_score < -1
    assert [run.progress(step) for step in (0, 3, 4, 8, 9)] == [0, 0, 0, 1, 1]
    assert [run.progress(step) for step in (5, 6, 7)] == [1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3]
    assert run.threshold(0) == run.threshold(3) == OPEN
    assert run.threshold(4) == pytest.approx(lowest_score, rel=1e-6)
    for score in run.gates.scores.values():
        score.detach().add_(1)  # the quantile is that of the start
    assert run.threshold(6) == pytest.approx(lowest_score * 0.5**3, rel=1e-6)
    assert run.threshold(8) == run.threshold(11) == 0


@pytest.mark.parametrize("size", [1, 2, 999, 1001, 5000])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 1])
def test_quantile(size, share):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    assert lowest(values, share) == pytest.approx(np.quantile(values.double().numpy(), share), rel=1e-12)


@pytest.mark.slow
def test_quantile_of_more_than_torch_can():
    values = torch.arange(4096 * 4200, dtype=torch.float32).flip(0)
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(values, 0.001)
    assert lowest(values, 0.001) == pytest.approx(0.001 * (len(values) - 1))


@pytest.mark.parametrize("build_model", [tiny_bert, tiny_gpt2, tiny_vit, tiny_llama])
def test_penalty_is_the_documented_one(build_model):
    """0.5 E sigmoid(S) in the mean over units and linear layers, by autograd."""
    model = build_model(**({"hidden_size": 64, "num_attention_heads": 2} if build_model is tiny_bert else {}))
    run = run_of(model)
    generator = torch.Generator().manual_seed(0)
    means = []
    for width in Structure(model).widths:
        for order in width.orders:
            score = run.gates.scores[order.name]
            score.detach().copy_(torch.randn(len(score), generator=generator))
            for slot in order.slots:
                weight = model.get_submodule(slot.path).weight
                rows, columns = (
                    weight.shape if isinstance(model.get_submodule(slot.path), nn.Linear) else weight.T.shape
                )
                of_unit = (columns if slot.side == "out" else rows) * sum(n for _, n in slot.parts) // width.units
                elements = min(1024, of_unit) if width.kind == "heads" else (columns if slot.side == "out" else rows)
                means.append(0.5 * elements * score.sigmoid().mean())
    strength = 0.02 * (1 - 0.5**3)
    (strength * torch.stack(means).mean()).backward()
    expected = {name: score.grad.clone() for name, score in run.gates.scores.items()}
    run._optimizer.zero_grad()
    run.begin_step(6, sys._getframe())
    run.learn(0.0)
    assert_same({name: score.grad for name, score in run.gates.scores.items()}, expected, 1e-6)
    if build_model is tiny_bert:  # 64 x 32 in a layer of attention, of which a block is 32 x 32
        assert run._weights["bert.encoder.layer.0.attention.self"] == 4 * 0.5 * 1024 / (2 * 12)


# -- trainings -------------------------------------------------------------------------------------------------------------


def trainer_of(model, folder, *callbacks, data=None, **settings):
    data = classified() if data is None else data
    return Trainer(model, arguments(folder, **settings), train_dataset=data, callbacks=list(callbacks))


def plain_bert(**settings):
    return tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings)


class Watch(TrainerCallback):
    """What gates do in each step, and what there is of them between steps."""

    def __init__(self, movement):
        self.movement, self.closed, self.between = movement, [], set()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.closed.append(sum(int((~is_open).sum()) for is_open in self.movement._run.gates._open.values()))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.between.add(hooks_of(model))

    on_epoch_end = on_step_end


def test_training_leaves_scores_and_nothing_else(tmp_path):
    model, callback = plain_bert(), MovementCallback(start=0.5)
    keys, hooks = list(model.state_dict()), hooks_of(model)
    assert callback.scores == {}
    watch = Watch(callback)
    trainer = trainer_of(model, tmp_path, callback, watch)
    trainer.train()
    assert watch.closed[:3] == [0, 0, 0] and max(watch.closed) > 0  # of 12 steps the first 3 are before `start`
    assert watch.between == {0}
    assert list(model.state_dict()) == keys and hooks_of(model) == hooks
    orders = {o.name: w.units for w in Structure(model).widths for o in w.orders}
    assert {name: (len(s), s.dtype) for name, s in callback.scores.items()} == {
        name: (units, torch.float32) for name, units in orders.items()
    }
    assert all((score != 0).any() and score.isfinite().all() for score in callback.scores.values())
    assert_same(noted_scores(model), callback.scores, 0)
    fresh = plain_bert()
    fresh.load_state_dict(model.state_dict())
    inputs = {"input_ids": tokens()}
    assert torch.equal(outputs(model.eval(), inputs), outputs(fresh, inputs))


def test_before_the_gates_training_is_as_without_the_callback(tmp_path):
    losses = []
    for callbacks in ((), (MovementCallback(start=1.0),)):
        trainer = trainer_of(plain_bert(), tmp_path, *callbacks)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][:6] == losses[1][:6] and losses[0][7:] != losses[1][7:]


@pytest.mark.parametrize("name", ["vit", "t5", "gpt2"])
def test_other_architectures(tmp_path, name):
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch_of(name).items()}
    data = [{key: value[i] for key, value in batch.items()} for i in range(3)] * 2
    model, callback = build(name), MovementCallback()
    trainer_of(model, tmp_path, callback, data=data, per_device_train_batch_size=2).train()
    scores = sort_by_importance(model, "movement")
    assert all((score.diff() <= 0).all() and (score != 0).any() for score in scores.values())


def test_useless_channels_come_last(tmp_path):
    """The class is in one half of the embedding, and noise in the other. Half of the channels see the noise alone; in the beginning
    their weights are the larger ones."""
    model = plain_bert(num_hidden_layers=1)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 96, (512, 4), generator=generator)
    useless = torch.zeros(48, dtype=torch.bool)
    useless[torch.randperm(48, generator=generator)[:24]] = True
    made, read = (
        model.bert.encoder.layer[0].get_submodule(f"{name}.dense").weight for name in ("intermediate", "output")
    )
    with torch.no_grad():
        embedding = model.bert.embeddings.word_embeddings.weight
        embedding[:, :16] = torch.randn(3, 16, generator=generator)[torch.arange(96) % 3]
        embedding[:, 16:] = torch.randn(32, 16, generator=generator)[torch.arange(96) // 3]
        made[useless, :16] = 0
        made[~useless, 16:] = 0
        made *= 4
        read[:, useless] *= 2
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is read)
    twin = copy.deepcopy(model)
    data = [{"input_ids": row, "labels": row[0] % 3} for row in ids]
    callback = MovementCallback(kinds=("mlp",))
    trainer_of(model, tmp_path, callback, data=data, per_device_train_batch_size=16).train()
    (score,) = callback.scores.values()
    assert useless[score.argsort()[:24]].sum() >= 20
    sort_by_importance(twin, "magnitude", kinds=("mlp",))
    assert useless[noted_orders(twin)["bert.encoder.layer.0"][24:]].sum() <= 4


def test_adapters(tmp_path):
    model = get_peft_model(
        tiny_llama(),
        ElasticLoraConfig(
            target_modules=["q_proj", "down_proj"],
            elastic_width={"heads": [1.0, 0.5], "mlp": [1.0, 0.5]},
            importance="movement",
        ),
    )
    with pytest.raises(ValueError, match="`importance='movement'` is learned in a training.*MovementCallback"):
        model.sort_by_importance()
    with pytest.raises(ValueError, match="not sorted by importance"):
        model.set_subnet("min")
    data = [{"input_ids": row, "labels": row} for row in tokens(24)]
    trainer_of(model, tmp_path, MovementCallback(), data=data).train()
    model.eval()
    before = outputs(model, {"input_ids": tokens()})
    scores = model.sort_by_importance(progress=False)
    assert len(scores) == 4 and all((score.diff() <= 0).all() for score in scores.values())
    torch.testing.assert_close(outputs(model, {"input_ids": tokens()}), before, rtol=1e-4, atol=1e-4)
    model.set_subnet("min")
    model.extract_subnet("min")


def test_layers_that_the_model_does_not_call(tmp_path):
    model = plain_bert()
    layer = model.bert.encoder.layer[0].intermediate
    layer.forward = lambda x: layer.intermediate_act_fn(nn.functional.linear(x, layer.dense.weight, layer.dense.bias))
    with pytest.warns(
        UserWarning, match="Nothing was learned from bert.encoder.layer.0.intermediate.dense: the model has not"
    ):
        trainer_of(model, tmp_path, MovementCallback()).train()


@pytest.mark.parametrize("where", ["forward", "between"])
def test_training_that_raises(tmp_path, where):
    model, callback = plain_bert(), MovementCallback(start=0.5)
    inputs = {"input_ids": tokens()}

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 8:
                if where == "between":
                    raise KeyboardInterrupt
                layer = model.bert.encoder.layer[1]
                layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))

    with pytest.raises(KeyboardInterrupt):
        trainer_of(model, tmp_path, callback, Interrupt()).train()
    model.bert.encoder.layer[1]._forward_pre_hooks.clear() if where == "forward" else None
    fresh = plain_bert()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(outputs(model.train(), inputs), outputs(fresh.train(), inputs))
    assert hooks_of(model) == 0
    again = trainer_of(plain_bert(), tmp_path, callback)
    again.train()
    assert all(score.isfinite().all() for score in callback.scores.values())


# -- checkpoints and processes ---------------------------------------------------------------------------------------------

_TRAIN = "import sys, json\nfrom support.movement import train\ntrain(sys.argv[1], **json.loads(sys.argv[2]))"
_TWO = """
import sys, json
import torch
from support.movement import train
from support.processes import in_processes
torch.set_num_threads(1)
settings = json.loads(sys.argv[2])
sys.exit(in_processes(2, lambda: train(sys.argv[1], ddp_backend="gloo", **settings)))
"""


def assert_same_result(found, expected, tolerance=0.0):
    for what in ("scores", "weights"):
        assert_same(found[what], expected[what], tolerance)


@pytest.mark.parametrize(
    "restore", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "restored callbacks"]
)
def test_killed_and_resumed_in_another_process(tmp_path, restore):
    settings = {"gradient_accumulation_steps": 2}
    whole = train(tmp_path / "whole", **settings)
    killed = run_fresh(_TRAIN, str(tmp_path / "killed"), json.dumps({"die_at": 5, **settings}))
    assert killed.returncode == -9, killed.stderr
    checkpoint = tmp_path / "killed" / "checkpoint-5"  # in the middle of an epoch, and after `start`
    settings |= {"resume": str(checkpoint), "restore_callback_states_from_checkpoint": restore}
    resumed = run_fresh(_TRAIN, str(tmp_path / "killed"), json.dumps(settings))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_result(torch.load(tmp_path / "killed" / "rank-0.pt"), whole)


def test_two_processes(tmp_path):
    # without the last, Trainer multiplies the loss of a model that does not count items by the number of processes
    settings = {"gradient_accumulation_steps": 2, "dropout": 0.0, "average_tokens_across_devices": False}
    alone = train(tmp_path / "alone", **settings)
    done = run_fresh(_TWO, str(tmp_path / "two"), json.dumps(settings))
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / "two" / f"rank-{rank}.pt") for rank in (0, 1))
    assert_same_result(second, first)
    resume = {"resume": str(tmp_path / "two" / "checkpoint-5"), **settings}
    done = run_fresh(_TWO, str(tmp_path / "two"), json.dumps(resume))
    assert done.returncode == 0, done.stderr
    assert_same_result(torch.load(tmp_path / "two" / "rank-1.pt"), first)
    for result in (first, alone):  # those of keys have a gradient of rounding errors alone, which Adam makes large
        result["weights"] = {key: weight for key, weight in result["weights"].items() if "key.bias" not in key}
    assert_same_result(first, alone, 1e-5)


def test_checkpoints_of_other_trainings(tmp_path):
    trainer_of(plain_bert(), tmp_path / "plain", save_strategy="steps", save_steps=5).train()
    with pytest.raises(ValueError, match="checkpoint of a training without `MovementCallback`"):
        trainer_of(plain_bert(), tmp_path / "a", MovementCallback()).train(str(tmp_path / "plain" / "checkpoint-5"))
    trainer_of(plain_bert(), tmp_path / "b", MovementCallback(), save_strategy="steps", save_steps=5).train()
    checkpoint = tmp_path / "b" / "checkpoint-5"
    with pytest.raises(ValueError, match="`resume_from_checkpoint`: its scores are of other units"):
        trainer_of(plain_bert(), tmp_path / "a", MovementCallback(kinds=("mlp",))).train(str(checkpoint))
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_text())
    tensors = state["stateful_callbacks"]["MovementCallback"]["attributes"]["learned"]["tensors"]
    name = next(iter(tensors))
    for text, message in (("AAAA", "units in the place of|damaged"), ("%", "damaged"), (3, "must be text")):
        tensors[name]["score"] = text
        file.write_text(json.dumps(state))
        with pytest.raises(ValueError, match=f"`resume_from_checkpoint`: .*({message})"):
            trainer_of(plain_bert(), tmp_path / "a", MovementCallback()).train(str(checkpoint))


# -- use of the scores -----------------------------------------------------------------------------------------------------


def learned(seed=0, **settings):
    """A model with scores noted on it as a training does."""
    model = tiny_bert(**settings)
    generator = torch.Generator().manual_seed(seed)
    scores = {o.name: torch.randn(w.units, generator=generator) for w in Structure(model).widths for o in w.orders}
    note_scores(model, scores)
    return model, scores


def test_sorted_by_what_was_learned():
    model, scores = learned()
    inputs = {"input_ids": tokens()}
    before = outputs(model, inputs)
    result = sort_by_importance(model, "movement")
    torch.testing.assert_close(outputs(model, inputs), before, rtol=1e-5, atol=1e-5)
    for name, score in scores.items():
        assert torch.equal(result[name], score.sort(descending=True)[0])
        assert torch.equal(noted_orders(model)[name], score.argsort(descending=True))
    # the scores have moved along, so that sorting once more changes nothing
    orders = noted_orders(model)
    assert_same(sort_by_importance(model, "movement"), result, 0)
    assert_same(noted_orders(model), orders, 0)
    twin, _ = learned()
    sort_by_importance(twin, {name: score for name, score in scores.items() if not name.endswith("self")})
    assert_same(sort_by_importance(twin, "movement"), result, 0)
    assert_same(noted_orders(twin), orders, 0)


def test_kinds_without_scores():
    model, scores = learned()
    note_scores(model, {name: score for name, score in scores.items() if not name.endswith("self")})
    assert len(sort_by_importance(model, "movement", kinds=("mlp",))) == 2
    with pytest.raises(ValueError, match="nothing was learned of 'bert.encoder.layer.0.attention.self'"):
        sort_by_importance(model, "movement")


def test_files(tmp_path):
    model, scores = learned()
    file = tmp_path / "new" / "scores.json"
    save_scores(model, file)
    fresh = tiny_bert()
    assert_same(load_scores(fresh, file), scores, 0)
    assert_same(noted_scores(fresh), scores, 0)
    with pytest.raises(ValueError, match="are of another model"):
        load_scores(tiny_bert(num_hidden_layers=3), file)
    with pytest.raises(ValueError, match="are of another model"):
        load_scores(tiny_llama(), file)
    with pytest.raises(ValueError, match="are of another model"):
        load_scores(tiny_bert(intermediate_size=32), file)
    sort_by_importance(fresh, "magnitude")
    with pytest.raises(ValueError, match="units in another order"):
        load_scores(fresh, file)
    save_scores(fresh, file)
    fresh.save_pretrained(tmp_path / "sorted")
    loaded = type(fresh).from_pretrained(tmp_path / "sorted")
    assert_same(load_scores(loaded, file), noted_scores(fresh), 0)
    with pytest.raises(ValueError, match="units in another order"):
        load_scores(tiny_bert(), file)
    file.write_text(file.read_text().replace("scores", "score"))
    with pytest.raises(ValueError, match="scores.json"):
        load_scores(tiny_bert(), file)
    with pytest.raises(FileNotFoundError):
        load_scores(tiny_bert(), tmp_path / "nothing")
    with pytest.raises(ValueError, match="has learned no scores"):
        save_scores(tiny_bert(), file)


def test_what_is_extracted_has_no_scores():
    model, scores = learned()
    adapted = get_peft_model(
        model, ElasticLoraConfig(elastic_width={"mlp": [1.0, 0.5]}, target_modules=["query"], importance="movement")
    )
    adapted.sort_by_importance()
    small = adapted.extract_subnet("min")
    assert noted_scores(adapted.get_base_model()) and not noted_scores(small)


# -- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0}, "`start` must be a number above 0, or None, got 0"),
        ({"end": float("nan")}, "`end` must be"),
        ({"start": 2.0, "end": 1.0}, "`start` must be below `end`, 1.0, got 2.0"),
        ({"penalty": -0.1}, "`penalty` must be a number from 0 up"),
        ({"penalty": True}, "`penalty` must be"),
        ({"learning_rate": 0.0}, "`learning_rate` must be"),
        ({"kinds": "mlp"}, "`kinds` must be"),
        ({"kinds": ()}, "`kinds` must be"),
        ({"kinds": ("mlp", "rank")}, "`kinds` must be"),
    ],
)
def test_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        MovementCallback(**settings)


@pytest.mark.parametrize(
    ("settings", "of_training", "message"),
    [
        ({"end": 3.0}, {}, "within the training, got start=None and end=3.0, the steps 6 and 18 of 12"),
        ({"start": 2.0}, {}, "`start` and `end` must be at least one optimizer step"),
        ({"start": 0.01}, {}, "the steps 0 and 12"),
        ({"start": 1.0}, {"max_steps": 12}, "counted in epochs: leave `max_steps` at -1, it is 12"),
        (
            {"start": 0.2},
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1},
            "`start` must leave the scores time",
        ),
    ],
)
def test_times(tmp_path, settings, of_training, message):
    model = plain_bert()
    with pytest.raises(ValueError, match=message):
        trainer_of(model, tmp_path, MovementCallback(**settings), **of_training).train()
    assert hooks_of(model) == 0 and not noted_scores(model)


def elastic(**settings):
    return get_peft_model(tiny_llama(), ElasticLoraConfig(target_modules=["q_proj"], importance="none", **settings))


@pytest.mark.parametrize("first", [0, 1])
def test_not_beside_sampled_subnets(tmp_path, first):
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    callbacks = [MovementCallback(), SubnetSamplingCallback()]
    with pytest.raises(
        ValueError, match="MovementCallback and SubnetSamplingCallback|SubnetSamplingCallback and Movement"
    ):
        trainer_of(elastic(), tmp_path, callbacks[first], callbacks[1 - first], data=data).train()
    trainer = ElasticTrainer(elastic(), arguments(tmp_path), train_dataset=data, callbacks=[MovementCallback()])
    with pytest.raises(ValueError, match="`callbacks`: MovementCallback and ElasticTrainer cannot be in one training"):
        trainer.train()
    with pytest.raises(ValueError, match="MovementCallback and MovementCallback"):
        trainer_of(plain_bert(), tmp_path, MovementCallback(), MovementCallback()).train()


def test_models(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in tokens(8)]
    narrow = elastic(elastic_width={"mlp": [1.0, 0.5]})
    narrow.set_subnet("min")
    with pytest.raises(ValueError, match="A part of `model` is not active"):
        trainer_of(narrow, tmp_path, MovementCallback(), data=data).train()
    model = nn.Linear(3, 3)
    model.forward = lambda x, labels=None: {"loss": nn.functional.linear(x, model.weight).sum()}
    with pytest.raises(ValueError, match=r"`model` \(Linear\) has no block whose heads or mlp are known"):
        trainer_of(
            model, tmp_path, MovementCallback(), data=[{"x": torch.ones(3)}] * 8, remove_unused_columns=False
        ).train()


class _State:
    global_step, max_steps = 0, 12


class _Engine:
    def __init__(self, kind):
        self.accelerator_state = type("S", (), {"distributed_type": type("T", (), {"value": kind})})
        self.scaler = None


@pytest.mark.parametrize(
    ("settings", "engine", "message"),
    [
        ({"fp16": True}, "NO", "fp16"),
        ({"torch_compile": True}, "NO", "torch_compile"),
        ({"n_gpu": 2}, "NO", "nn.DataParallel"),
        ({}, "DEEPSPEED", "DEEPSPEED"),
        ({}, "FSDP", "FSDP"),
    ],
)
def test_engines_that_were_not_tried(settings, engine, message):
    args = type("Args", (), {"fp16": False, "torch_compile": False, "n_gpu": 1, **settings})
    with pytest.raises(ValueError, match=f"`args`: importance by movement is not learned with {message}"):
        MovementCallback().on_train_begin(args, _State(), None, model=tiny_bert(), optimizer=_Engine(engine))


def test_where_there_is_no_training():
    with pytest.raises(ValueError, match="`order='movement'` is learned in a training.*callback.scores"):
        WidthPrunerConfig(order="movement")
    with pytest.raises(ValueError, match="`importance='movement'` is learned in a training"):
        sort_by_importance(tiny_bert(), "movement")
