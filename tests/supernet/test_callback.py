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
"""Training super-adapters with the real Trainer of transformers and SFTTrainer of TRL: which subnet runs when."""

import contextlib
import logging
import random
import warnings

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from support.models import TRANSFORMERS_ADAPTERS, VOCABULARY, tiny_llama
from support.training import (
    TARGETS,
    ForwardRecord,
    adapter_weights,
    arguments,
    checkpointing,
    dataset,
    elastic_config,
    elastic_llama,
    make_trainer,
)
from torch.utils.checkpoint import CheckpointError
from transformers import Trainer, TrainerCallback

from peft_elastic import BalancedSampler, SubnetSamplingCallback, UniformSampler
from peft_elastic.supernet import get_elastic_host
from peft_elastic.tuners.elastic_lora.layer import set_rank


def base_llama():
    """The base model of `elastic_llama`."""
    return tiny_llama(num_hidden_layers=3)


# -- which subnet a step trains -------------------------------------------------------------------------------------


def test_each_step_trains_the_subnet_of_its_seed_and_number(tmp_path):
    model = elastic_llama()
    record = ForwardRecord(model)
    callback = SubnetSamplingCallback(seed=5)
    make_trainer(model, tmp_path, [callback], max_steps=5).train()
    assert record.training == [model.search_space.sample([5, step]) for step in range(5)]
    assert record.training == [callback.subnet_of_step(step) for step in range(5)]
    assert len(set(record.training)) == 5


def test_the_seed_defaults_to_that_of_the_training_arguments(tmp_path):
    subnets = {}
    for seed, args_seed in ((None, 3), (3, 8), (None, 8)):
        model = elastic_llama()
        record = ForwardRecord(model)
        make_trainer(model, tmp_path, [SubnetSamplingCallback(seed=seed)], seed=args_seed).train()
        subnets[seed, args_seed] = record.training
    assert subnets[None, 3] == subnets[3, 8] != subnets[None, 8]


def test_all_micro_batches_of_a_step_train_one_subnet(tmp_path):
    """With 7 batches an epoch and 3 of them a step, the last step of each epoch is a short one."""
    model = elastic_llama()
    record = ForwardRecord(model)
    callback = SubnetSamplingCallback()
    args = arguments(tmp_path, gradient_accumulation_steps=3, max_steps=-1, num_train_epochs=2)
    Trainer(model, args, train_dataset=dataset(14), callbacks=[callback]).train()
    steps = [0, 0, 0, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 5]
    assert record.training == [callback.subnet_of_step(step) for step in steps]
    assert len(set(record.training)) == 6


@pytest.mark.parametrize(
    "strategy, sampler", [("uniform", UniformSampler()), ("balanced", BalancedSampler()), (BalancedSampler(), None)]
)
def test_strategies(tmp_path, strategy, sampler):
    model = elastic_llama()
    record = ForwardRecord(model)
    make_trainer(model, tmp_path, [SubnetSamplingCallback(strategy)]).train()
    sampler = sampler or strategy
    space = model.search_space
    assert record.training == [sampler(space, np.random.default_rng([42, step])) for step in range(4)]


def test_a_strategy_of_the_user(tmp_path):
    def sandwich(space, rng):
        return (space.max, space.min, space.sample(rng))[rng.integers(3)]

    model = elastic_llama()
    record = ForwardRecord(model)
    make_trainer(model, tmp_path, [SubnetSamplingCallback(sandwich)], max_steps=8).train()
    assert record.training == [sandwich(model.search_space, np.random.default_rng([42, step])) for step in range(8)]
    assert {model.search_space.max, model.search_space.min} < set(record.training)


def test_a_strategy_that_leaves_the_space_is_refused(tmp_path):
    model = elastic_llama()
    callback = SubnetSamplingCallback(lambda space, rng: space.max.to_dict() | {"rank:lm_head": 4})
    with pytest.raises(ValueError, match="unknown choices 'rank:lm_head'"):
        make_trainer(model, tmp_path, [callback]).train()


# -- gradient checkpointing -----------------------------------------------------------------------------------------


class GradientRecord(TrainerCallback):
    """The gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})


def trained_gradients(folder, seed, kind, callback):
    """The gradients of three steps with two micro-batches each, dropout included."""
    model = elastic_llama(seed, lora_dropout=0.1)
    record = GradientRecord()
    make_trainer(
        model, folder, [callback, record], seed=seed, max_steps=3, gradient_accumulation_steps=2, max_grad_norm=0.0,
        **checkpointing(kind),
    ).train()  # fmt: skip
    return record.steps


def assert_same_gradients(actual, expected):
    assert len(actual) == len(expected) == 3
    for step, (got, wanted) in enumerate(zip(actual, expected)):
        assert got.keys() == wanted.keys() and len(wanted) == 18
        for name, gradient in wanted.items():
            assert gradient.abs().max() > 1e-4, f"nothing to compare in {name}"
            torch.testing.assert_close(
                got[name], gradient, rtol=0, atol=1e-6, msg=lambda text: f"step {step}, {name}: {text}"
            )


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_gradients_under_checkpointing(tmp_path, kind, seed):
    expected = trained_gradients(tmp_path, seed, "none", SubnetSamplingCallback())
    actual = trained_gradients(tmp_path, seed, kind, SubnetSamplingCallback())
    assert_same_gradients(actual, expected)


class DrawInsideForward(TrainerCallback):
    """The mistaken implementation: every layer draws its rank when it is called."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        rng = random.Random(args.seed)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.register_forward_pre_hook(
                    lambda layer, args: (
                        set_rank(layer, "default", rng.choice([8, 6, 4, 2])) if layer.training else None
                    )
                )


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_gradients_under_checkpointing_are_wrong_if_ranks_are_drawn_inside_forward(tmp_path, kind):
    expected = trained_gradients(tmp_path, 0, "none", DrawInsideForward())
    assert_same_gradients(trained_gradients(tmp_path, 0, "none", DrawInsideForward()), expected)
    with pytest.raises(AssertionError if kind == "reentrant" else CheckpointError):
        assert_same_gradients(trained_gradients(tmp_path, 0, kind, DrawInsideForward()), expected)


# -- resume ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["uniform", "balanced"])
def test_resumed_training_is_the_unbroken_one_bit_for_bit(tmp_path, strategy):
    """With dropout, Adam's moments, shuffling and a stop in the middle of an epoch."""

    def run(folder, stop, resume=None):
        torch.manual_seed(random.randrange(2**31))  # nothing may hang on the state the process happens to be in
        model = elastic_llama(lora_dropout=0.1)
        record = ForwardRecord(model)
        trainer = make_trainer(
            model, folder, [SubnetSamplingCallback(strategy), StopAt(stop)],
            max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return record.training, adapter_weights(model)

    subnets, weights = run(tmp_path / "unbroken", stop=6)
    first, _ = run(tmp_path / "broken", stop=3)
    second, resumed = run(tmp_path / "broken", stop=6, resume=str(tmp_path / "broken" / "checkpoint-3"))
    assert first + second == subnets
    assert len(first) == len(second) == 6  # micro-batches
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


# -- evaluation and saving ------------------------------------------------------------------------------------------


def evaluated(folder, callback, **kwargs):
    """What ran in training and in evaluation, and the trainer, with an evaluation after every step."""
    model = elastic_llama()
    record = ForwardRecord(model)
    trainer = make_trainer(
        model,
        folder,
        [callback],
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        eval_dataset=dataset(8),
        **kwargs,
    )
    trainer.train()
    return record, trainer


def assert_evaluations_run(record, subnet):
    assert len(record.evaluation) == 5  # at the start and after each of 4 steps, one batch each
    assert set(record.evaluation) == {subnet}


def test_evaluation_runs_the_chosen_subnet(tmp_path):
    record, trainer = evaluated(tmp_path, SubnetSamplingCallback(eval_subnet="heuristic"))
    space = trainer.model.search_space
    assert space.heuristic not in (space.max, *record.training)
    assert_evaluations_run(record, space.heuristic)
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["eval_subnet"] for entry in logged] == ["heuristic"] * 5
    assert [entry["eval_subnet_parameters"] for entry in logged] == [space.count_parameters(space.heuristic)] * 5
    assert not any("eval_subnet" in entry for entry in trainer.state.log_history if "eval_loss" not in entry)


class EvaluateMax(SubnetSamplingCallback):
    """A mistaken implementation: the maximal subnet is put back after a step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.set_subnet("max")


class EvaluateSampled(SubnetSamplingCallback):
    """Another: the sampled subnet stays."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.set_subnet(self.subnet_of_step(state.global_step - 1))


@pytest.mark.parametrize("mistaken", [EvaluateMax, EvaluateSampled])
def test_the_check_of_evaluations_fails_on_mistaken_implementations(tmp_path, mistaken):
    record, trainer = evaluated(tmp_path, mistaken(eval_subnet="heuristic"))
    with pytest.raises(AssertionError):
        assert_evaluations_run(record, trainer.model.search_space.heuristic)


def test_evaluation_runs_what_was_chosen_before_training_or_else_max(tmp_path):
    for chosen in (None, "min"):
        model = elastic_llama()
        if chosen:
            model.set_subnet(chosen)
        record = ForwardRecord(model)
        callback = SubnetSamplingCallback()
        trainer = make_trainer(
            model, tmp_path, [callback], eval_strategy="steps", eval_steps=2, eval_dataset=dataset(8)
        )
        trainer.train()
        assert set(record.evaluation) == {getattr(model.search_space, chosen or "max")}
        assert model.active_subnet == getattr(model.search_space, chosen or "max")
        names = {entry["eval_subnet"] for entry in trainer.state.log_history if "eval_loss" in entry}
        assert names == {chosen or "max"}


def test_a_subnet_chosen_during_training_is_used_from_then_on(tmp_path):
    class Choose(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.set_subnet("min")

    model = elastic_llama()
    record = ForwardRecord(model)
    make_trainer(
        model,
        tmp_path,
        [SubnetSamplingCallback(), Choose()],
        eval_strategy="steps",
        eval_steps=1,
        eval_dataset=dataset(8),
    ).train()
    space = model.search_space
    assert record.evaluation == [space.max, space.min, space.min, space.min]


def test_the_log_names_the_evaluated_subnet_once_until_it_changes(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="peft_elastic"):
        _, trainer = evaluated(tmp_path, SubnetSamplingCallback(eval_subnet="heuristic"))
        space = trainer.model.search_space
        trainer.model.set_subnet(space.sample(1))
        trainer.evaluate()
        trainer.predict(dataset(4))
    total = space.count_parameters(space.max)

    def counted(subnet):
        active = space.count_parameters(subnet)
        return f"({active:,d} of {total:,d} adapter parameters, {100 * active / total:.1f}%)."

    assert [record.getMessage() for record in caplog.records] == [
        f"Evaluated the heuristic subnet {counted(space.heuristic)}",
        f"Evaluated the custom subnet {counted(space.sample(1))}",
        f"Predicted with the custom subnet {counted(space.sample(1))}",
    ]


def test_metrics_stay_numbers_and_the_model_card_is_written(tmp_path):
    _, trainer = evaluated(tmp_path, SubnetSamplingCallback())
    assert all(isinstance(value, (int, float)) for value in trainer.evaluate().values())
    trainer.create_model_card()
    assert "eval_subnet" in trainer.state.log_history[-1]


def test_several_evaluation_sets(tmp_path):
    model = elastic_llama()
    sets = {"a": dataset(4), "b": dataset(4, seed=1)}
    trainer = make_trainer(model, tmp_path, [SubnetSamplingCallback(eval_subnet="min")], eval_dataset=sets)
    trainer.evaluate()
    assert [entry["eval_subnet"] for entry in trainer.state.log_history] == ["max", "max"]  # nothing trained yet
    trainer.train()
    trainer.evaluate()
    assert [entry["eval_subnet"] for entry in trainer.state.log_history[-2:]] == ["min", "min"]


def test_checkpoints_carry_all_ranks_and_the_chosen_subnet(tmp_path):
    model = elastic_llama()
    make_trainer(
        model, tmp_path, [SubnetSamplingCallback(eval_subnet="heuristic")], save_strategy="steps", save_steps=2
    ).train()
    loaded = PeftModel.from_pretrained(base_llama(), tmp_path / "checkpoint-4")
    assert loaded.active_subnet == model.search_space.heuristic
    assert all(
        layer.lora_A["default"].kept == 6 and layer.lora_A["default"]._parameters["weight"].shape[0] == 8
        for layer in loaded.modules()
        if isinstance(layer, LoraLayer)
    )
    inputs = torch.arange(8)[None]
    model.eval()
    torch.testing.assert_close(loaded(inputs).logits, model(inputs).logits, rtol=0, atol=0)
    for subnet in ("max", "min"):
        loaded.set_subnet(subnet)
        model.set_subnet(subnet)
        torch.testing.assert_close(loaded(inputs).logits, model(inputs).logits, rtol=0, atol=0)


def test_load_best_model_at_end(tmp_path):
    """The learning rate is absurd, so the last checkpoint is not the best one."""
    model = elastic_llama()
    trainer = make_trainer(
        model, tmp_path, [SubnetSamplingCallback(eval_subnet="min")], learning_rate=1.0, max_steps=3,
        eval_strategy="steps", eval_steps=1, eval_dataset=dataset(8), save_strategy="steps", save_steps=1,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert not trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    best = PeftModel.from_pretrained(base_llama(), trainer.state.best_model_checkpoint, is_trainable=True)
    assert all(torch.equal(weight, adapter_weights(best)[name]) for name, weight in adapter_weights(model).items())
    assert model.active_subnet == model.search_space.min
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


# -- leaving a step in the middle -----------------------------------------------------------------------------------


def test_eval_in_the_middle_of_a_step_restores_the_chosen_subnet(tmp_path):
    class Peek(TrainerCallback):
        """Looks at the model between the micro-batches of a step."""

        def on_substep_end(self, args, state, control, model=None, **kwargs):
            seen.append((model.active_subnet, model.eval().active_subnet))

    seen = []
    model = elastic_llama()
    callback = SubnetSamplingCallback(eval_subnet="heuristic")
    make_trainer(model, tmp_path, [callback, Peek()], gradient_accumulation_steps=2).train()
    heuristic = model.search_space.heuristic
    assert seen == [(callback.subnet_of_step(step), heuristic) for step in range(4)]


class Interrupt(TrainerCallback):
    """Presses Ctrl-C while step `step` computes."""

    def __init__(self, model, step):
        self.step, self.now = step, None
        model.register_forward_hook(self._raise)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step

    def _raise(self, module, args, output):
        if self.now == self.step:
            self.step = None
            raise KeyboardInterrupt


def test_an_interrupt_leaves_a_model_that_evaluates_the_chosen_subnet(tmp_path):
    model = elastic_llama()
    record = ForwardRecord(model)
    callback = SubnetSamplingCallback(eval_subnet="heuristic")
    trainer = make_trainer(model, tmp_path, [callback, Interrupt(model, 2)], eval_dataset=dataset(8))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    heuristic = model.search_space.heuristic
    assert model.active_subnet == callback.subnet_of_step(2) != heuristic
    model.save_pretrained(tmp_path / "saved")
    assert PeftModel.from_pretrained(base_llama(), tmp_path / "saved").active_subnet == heuristic
    trainer.evaluate()
    assert set(record.evaluation) == {heuristic} and model.active_subnet == heuristic
    # and one that can be trained again
    record.training.clear()
    trainer.train()
    assert record.training == [callback.subnet_of_step(step) for step in range(4)]


def test_training_that_stops_in_the_middle_of_an_accumulation(tmp_path):
    class Stop(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    model = elastic_llama()
    make_trainer(model, tmp_path, [SubnetSamplingCallback(), Stop()], gradient_accumulation_steps=2).train()
    assert model.active_subnet == model.search_space.max


# -- the warning ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sampling_warnings(number):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert sum("SubnetSamplingCallback" in str(warning.message) for warning in caught) == number


def test_training_without_the_callback_warns_once(tmp_path):
    model = elastic_llama()
    trainer = make_trainer(model, tmp_path, eval_strategy="steps", eval_steps=1, eval_dataset=dataset(4))
    with sampling_warnings(1):
        trainer.train()
        trainer.train()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_with_the_callback_does_not_warn(tmp_path, accumulation):
    model = elastic_llama()
    trainer = make_trainer(
        model, tmp_path, [SubnetSamplingCallback()], gradient_accumulation_steps=accumulation,
        eval_strategy="steps", eval_steps=1, eval_dataset=dataset(4),
    )  # fmt: skip
    with sampling_warnings(0):
        trainer.train()
        trainer.train()


def test_training_a_fixed_rank_does_not_warn(tmp_path):
    with sampling_warnings(0):
        make_trainer(elastic_llama(elastic_ranks=[8]), tmp_path).train()


def own_loop(model, sample):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = torch.stack([row["input_ids"] for row in dataset(4)])
    for step in range(4):
        model.train()
        if sample:
            model.sample_subnet(model.search_space.sample([0, step]))
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(input_ids=batch)


def test_own_loops_warn_if_they_do_not_sample():
    with sampling_warnings(0):
        own_loop(elastic_llama(), sample=True)
    with sampling_warnings(1):
        own_loop(elastic_llama(), sample=False)


def test_inference_does_not_warn(tmp_path):
    model = elastic_llama()
    with sampling_warnings(0):
        trainer = make_trainer(model, tmp_path, eval_dataset=dataset(4))
        for _ in range(3):
            trainer.evaluate()
            model.train().eval()
            model.set_subnet("min")


# -- other ways to an elastic model ---------------------------------------------------------------------------------


@TRANSFORMERS_ADAPTERS
def test_transformers_add_adapter(tmp_path):
    model = base_llama()
    model.add_adapter(elastic_config())
    host = get_elastic_host(model)
    record = ForwardRecord(model)
    callback = SubnetSamplingCallback(eval_subnet="heuristic")
    trainer = make_trainer(
        model, tmp_path, [callback], eval_strategy="steps", eval_steps=1, eval_dataset=dataset(8),
        gradient_accumulation_steps=2, save_strategy="steps", save_steps=4,
    )  # fmt: skip
    before = adapter_weights(model)
    trainer.train()
    assert record.training == [callback.subnet_of_step(step) for step in range(4) for _ in range(2)]
    assert record.evaluation == [host.search_space.heuristic] * 4
    assert {entry["eval_subnet"] for entry in trainer.state.log_history if "eval_loss" in entry} == {"heuristic"}
    assert all(not torch.equal(weight, before[name]) for name, weight in adapter_weights(model).items())
    loaded = base_llama()
    loaded.load_adapter(str(tmp_path / "checkpoint-4"))
    assert get_elastic_host(loaded).active_subnet == host.search_space.heuristic
    inputs = torch.arange(8)[None]
    torch.testing.assert_close(loaded.eval()(inputs).logits, model.eval()(inputs).logits, rtol=0, atol=0)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


@pytest.mark.parametrize("wrapped_by", ["user", "trl"])
def test_trl_sft_trainer(tmp_path, tokenizer, wrapped_by):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    texts = Dataset.from_dict({"text": [f"w{3 + i % 50} w{4 + i % 50} w{5 + i % 50} w7" for i in range(32)]})
    args = SFTConfig(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=2,
        logging_steps=1, bf16=False, dataloader_pin_memory=False, learning_rate=1e-2, packing=False, max_length=16,
    )  # fmt: skip
    callback = SubnetSamplingCallback("balanced", eval_subnet="min")
    trainer = SFTTrainer(
        elastic_llama() if wrapped_by == "user" else base_llama(),
        args,
        train_dataset=texts,
        eval_dataset=texts.select(range(4)),
        processing_class=tokenizer,
        callbacks=[callback],
        peft_config=None if wrapped_by == "user" else elastic_config(task_type="CAUSAL_LM"),
    )
    assert args.gradient_checkpointing  # TRL's default
    record = ForwardRecord(trainer.model)
    with sampling_warnings(0):
        trainer.train()
    assert record.training == [callback.subnet_of_step(step) for step in range(4) for _ in range(2)]
    assert set(record.evaluation) == {trainer.model.search_space.min}
    logged = [entry["eval_subnet"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert logged == ["min", "min"]
    loaded = PeftModel.from_pretrained(base_llama(), tmp_path / "checkpoint-4")
    assert loaded.active_subnet == trainer.model.search_space.min


# -- facts that the documentation states ----------------------------------------------------------------------------


def test_adamw_moves_slices_that_were_not_sampled():
    """Momentum and decay act on whole matrices; a plain SGD step leaves what was not sampled alone."""
    moved = {}
    for optimizer_cls, kwargs in ((torch.optim.AdamW, {"weight_decay": 0.1}), (torch.optim.SGD, {})):
        model = elastic_llama()
        optimizer = optimizer_cls([p for p in model.parameters() if p.requires_grad], lr=1e-2, **kwargs)
        batch = torch.stack([row["input_ids"] for row in dataset(4)])
        layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
        for subnet in ("max", "min"):
            before = layer.lora_A["default"]._parameters["weight"].detach().clone()
            model.sample_subnet(subnet)
            model(input_ids=batch, labels=batch).loss.backward()
            assert layer.lora_A["default"]._parameters["weight"].grad[2:].any() == (subnet == "max")
            optimizer.step()
            optimizer.zero_grad()
        after = layer.lora_A["default"]._parameters["weight"].detach()
        moved[optimizer_cls] = not torch.equal(after[2:], before[2:])
        assert not torch.equal(after[:2], before[:2])
    assert moved == {torch.optim.AdamW: True, torch.optim.SGD: False}


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["unifrom", "", None, 3, UniformSampler])
def test_bad_strategy(strategy):
    with pytest.raises(ValueError, match=r"`strategy` must be one of \['balanced', 'uniform'\] or a callable"):
        SubnetSamplingCallback(strategy)


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match="`seed` must be a whole number >= 0, or None, got"):
        SubnetSamplingCallback(seed=seed)


@pytest.mark.parametrize(
    "subnet, message",
    [("largest", "'largest'"), ({"rank:x": 4}, "unknown choices 'rank:x'"), (7, "got int")],
)
def test_bad_eval_subnet(tmp_path, subnet, message):
    model = elastic_llama()
    before = adapter_weights(model)
    with pytest.raises(ValueError, match=message):
        make_trainer(model, tmp_path, [SubnetSamplingCallback(eval_subnet=subnet)]).train()
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(model).items())


def test_a_model_without_an_elastic_adapter_is_refused(tmp_path):
    model = get_peft_model(base_llama(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="`model` .PeftModel. has no elastic adapter"):
        make_trainer(model, tmp_path, [SubnetSamplingCallback()]).train()


def test_subnets_of_steps_are_unknown_before_training():
    with pytest.raises(ValueError, match="once training has started"):
        SubnetSamplingCallback().subnet_of_step(0)


def test_host_behind_wrappers():
    model = elastic_llama()
    host = get_elastic_host(model)
    assert get_elastic_host(model.base_model) is host
    assert get_elastic_host(model.get_base_model()) is host
    assert get_elastic_host(torch.nn.DataParallel(model)) is host
    assert get_elastic_host(torch.compile(model)) is host
    assert get_elastic_host(torch.compile(torch.nn.DataParallel(model))) is host
    for other in (base_llama(), torch.nn.DataParallel(torch.nn.Linear(2, 2)), None):
        with pytest.raises(ValueError, match="has no elastic adapter"):
            get_elastic_host(other)
