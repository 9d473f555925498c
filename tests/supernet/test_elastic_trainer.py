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
"""ElasticTrainer: several subnets a step, distillation and stages, with the real trainers of transformers and TRL."""

import copy
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, ParallelismConfig
from peft import LoraConfig, get_peft_model
from support.models import VOCABULARY, default_dtype, tiny_llama, tiny_llama_classifier, tiny_t5
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
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from transformers import Trainer, TrainerCallback

from peft_elastic import (
    Choice,
    ElasticTrainer,
    ElasticTrainerMixin,
    SandwichSampler,
    SearchSpace,
    Stage,
    Subnet,
    SubnetSamplingCallback,
    UniformSampler,
)
from peft_elastic.supernet import get_elastic_host
from peft_elastic.supernet.host import HOST_ATTRIBUTE
from peft_elastic.supernet.stages import StagePlan


def make_elastic(model, folder, callbacks=(), train_dataset=None, eval_dataset=None, elastic=None, **settings):
    return ElasticTrainer(
        model,
        arguments(folder, **settings),
        train_dataset=train_dataset or dataset(),
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
        **(elastic or {}),
    )


class StepRecord(TrainerCallback):
    """Gradients and learning rate of every optimizer step."""

    def __init__(self):
        self.gradients, self.rates = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        self.rates.append(optimizer.param_groups[0]["lr"])


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


# -- gradients against a loop by hand -------------------------------------------------------------------------------

WEIGHT, TEMPERATURE = 0.3, 2.5


def language_data(size=6, length=10):
    """Rows of the same length with different numbers of labels."""
    rows = []
    for i, row in enumerate(dataset(size, length=length)):
        labels = row["input_ids"].clone()
        labels[: i % 5] = -100
        rows.append({"input_ids": row["input_ids"], "labels": labels})
    return rows


def divergence(teacher, student):
    """KL by its definition, summed over rows."""
    p, q = ((logits / TEMPERATURE).softmax(-1) for logits in (teacher, student))
    return (p * (p.log() - q.log())).sum()


def gradients_by_hand(model, subnets, rows, distillation, shift):
    """Row by row, one loss per subnet, divided by the number of labels and of subnets."""
    model.train()
    if shift:
        number = sum((row["labels"][1:] != -100).sum() for row in rows)
    else:
        number = len(rows)
    for row in rows:
        ids, labels = row["input_ids"][None], row["labels"].reshape(1, -1) if shift else row["labels"].reshape(1)
        extra = {"attention_mask": row["attention_mask"][None]} if "attention_mask" in row else {}
        teacher = None
        if isinstance(distillation, torch.nn.Module):
            with torch.no_grad():
                teacher = distillation(input_ids=ids, **extra).logits
        for subnet in subnets:
            get_elastic_host(model).sample_subnet(subnet)
            logits = model(input_ids=ids, **extra).logits
            keep = labels[:, 1:] != -100 if shift else torch.ones(1, dtype=torch.bool)
            picked = lambda x: (x[:, :-1] if shift else x)[keep]  # noqa: B023, E731
            targets = (labels[:, 1:] if shift else labels)[keep]
            # transformers computes the loss of language models in float32
            scores = picked(logits).float() if shift else picked(logits)
            loss = -scores.log_softmax(-1).gather(-1, targets[:, None]).sum()
            if teacher is not None:
                kl = divergence(picked(teacher), picked(logits))
                loss = (1 - WEIGHT) * loss + WEIGHT * TEMPERATURE**2 * kl
            elif distillation == "max":
                teacher = logits.detach()
            (loss / number / len(subnets)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(actual, expected, **tolerance):
    assert actual.keys() == expected.keys() and expected
    for name, value in expected.items():
        assert value.abs().max() > 1e-6, f"nothing to compare in {name}"
        torch.testing.assert_close(actual[name], value, **tolerance, msg=lambda text: f"{name}: {text}")


def classifier(seed=0, **settings):
    model = tiny_llama_classifier(seed=seed, **settings)
    torch.manual_seed(seed + 100)
    return get_peft_model(model, elastic_config(task_type="SEQ_CLS"))


def regressor():
    model = tiny_llama_classifier()
    model.num_labels = model.config.num_labels = 1
    model.score = torch.nn.Linear(32, 1, bias=False)
    return get_peft_model(model, elastic_config(task_type="SEQ_CLS"))


def classifier_data(size=6):
    generator = torch.Generator().manual_seed(1)
    return [
        {"input_ids": row["input_ids"], "labels": torch.randint(3, (), generator=generator)} for row in dataset(size)
    ]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("task", ["language", "classification"])
@pytest.mark.parametrize("distillation", [None, "max", "teacher"])
def test_gradients_are_those_of_a_loop_by_hand(tmp_path, distillation, task, accumulation):
    """In float64, over micro-batches with different numbers of labels."""
    with default_dtype(torch.float64):
        build, rows = (elastic_llama, language_data()) if task == "language" else (classifier, classifier_data())
        model = build()
        if distillation == "teacher":
            tiny = tiny_llama if task == "language" else tiny_llama_classifier
            distillation = tiny(seed=7, num_hidden_layers=1)
        record = StepRecord()
        elastic = {
            "distillation": distillation, "distillation_weight": WEIGHT, "distillation_temperature": TEMPERATURE, "seed": 4,
        }  # fmt: skip
        trainer = make_elastic(
            model, tmp_path, [record], rows, elastic=elastic, max_steps=1, max_grad_norm=0.0,
            per_device_train_batch_size=6 // accumulation, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        if task == "classification":
            # transformers' classifiers do not use the number of labels of a step, as their signature has Trainer believe
            trainer.loss_is_scaled_for_ga = False
        logged = trainer.train().training_loss
        reference = build()
        subnets = SandwichSampler().subnets_of_step(model.search_space, np.random.default_rng([4, 0]))
        assert trainer.subnets_of_step(0) == subnets and len(set(subnets)) == 4
        expected = gradients_by_hand(reference, subnets, rows, distillation, shift=task == "language")
    assert_close(record.gradients[0], expected, rtol=1e-6, atol=1e-8 if task == "language" else 1e-12)
    assert 0 < logged < 100


def test_the_logged_loss_is_the_mean_over_subnets(tmp_path):
    model = elastic_llama()
    trainer = make_elastic(model, tmp_path, train_dataset=dataset(4), max_steps=1, gradient_accumulation_steps=2)
    batch = torch.stack([row["input_ids"] for row in dataset(4)])
    losses = []
    for subnet in SandwichSampler().subnets_of_step(model.search_space, np.random.default_rng([42, 0])):
        model.sample_subnet(subnet)
        losses.append(model(input_ids=batch, labels=batch).loss.item())
    assert np.ptp(losses) > 1e-2
    assert trainer.train().training_loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_distillation_of_an_encoder_decoder(tmp_path):
    """Its labels are not shifted, and make the inputs of the decoder, the teacher's too. With weight 1 the loss is the
    divergence alone."""
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_t5(dropout_rate=0.0), elastic_config(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    )
    teacher = tiny_t5(seed=7)
    rows = [row | {"labels": row["input_ids"][:6].clone()} for row in dataset(2)]
    rows[0]["labels"][4:] = -100
    batch = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
    keep = batch["labels"] != -100
    subnets = SandwichSampler().subnets_of_step(model.search_space, np.random.default_rng([42, 0]))
    expected = []
    with torch.no_grad():
        for subnet in subnets:
            model.sample_subnet(subnet)
            expected.append(divergence(teacher(**batch).logits[keep], model(**batch).logits[keep]) / keep.sum())
    elastic = {
        "distillation": teacher, "distillation_weight": 1, "distillation_temperature": TEMPERATURE,
    }  # fmt: skip
    trainer = make_elastic(model, tmp_path, train_dataset=rows, elastic=elastic, max_steps=1)
    loss = trainer.train().training_loss
    assert loss == pytest.approx(TEMPERATURE**2 * float(torch.stack(expected).mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("distillation", [None, "max"])
def test_gradients_under_checkpointing(tmp_path, kind, distillation):
    """With dropout, which the recomputation repeats."""
    gradients = {}
    for each in ("none", kind):
        record = StepRecord()
        make_elastic(
            elastic_llama(lora_dropout=0.1), tmp_path, [record], elastic={"distillation": distillation}, max_steps=2,
            gradient_accumulation_steps=2, max_grad_norm=0.0, **checkpointing(each),
        ).train()  # fmt: skip
        gradients[each] = record.gradients
    for actual, expected in zip(gradients[kind], gradients["none"]):
        assert_close(actual, expected, rtol=0, atol=1e-6)


def test_mixed_precision(tmp_path):
    """Under bfloat16 autocast, teacher included, gradients stay near those of float32."""
    teacher, gradients = tiny_llama(seed=7), {}
    for bf16 in (False, True):
        record = StepRecord()
        make_elastic(
            elastic_llama(), tmp_path, [record], elastic={"distillation": teacher}, bf16=bf16, max_steps=1,
            max_grad_norm=0.0,
        ).train()  # fmt: skip
        gradients[bf16] = torch.cat([gradient.flatten() for gradient in record.gradients[0].values()])
    difference = (gradients[True] - gradients[False]).norm() / gradients[False].norm()
    assert 1e-4 < difference < 0.05


# -- what a step costs and which subnets it trains ------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy, passes, distillation",
    [
        ("sandwich", 4, None), ("sandwich", 4, "max"), ("sandwich", 4, "teacher"), (SandwichSampler(0), 2, "max"),
        ("uniform", 1, None), ("uniform", 1, "teacher"), ("balanced", 1, None), (UniformSampler(), 1, "teacher"),
    ],
)  # fmt: skip
def test_a_step_costs_what_its_number_of_subnets_says(tmp_path, monkeypatch, strategy, passes, distillation):
    counts = Counter()
    backward = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda *args, **kwargs: (counts.update(backward=1), backward(*args, **kwargs))[1]
    )
    model = elastic_llama()
    record = ForwardRecord(model)
    if distillation == "teacher":
        distillation = tiny_llama(seed=7)
        distillation.register_forward_hook(lambda *args: counts.update(teacher=1))
    trainer = make_elastic(
        model, tmp_path, elastic={"strategy": strategy, "distillation": distillation}, gradient_accumulation_steps=2
    )
    trainer.train()
    expected = [subnet for step in range(4) for _ in range(2) for subnet in trainer.subnets_of_step(step)]
    assert record.training == expected
    assert len(expected) == counts["backward"] == 4 * 2 * passes
    assert not record.evaluation
    assert counts["teacher"] == (8 if isinstance(distillation, torch.nn.Module) else 0)
    assert model.active_subnet == model.search_space.max


def test_one_subnet_a_step_is_the_callback(tmp_path):
    weights = []
    for build in (
        lambda model: make_trainer(model, tmp_path, [SubnetSamplingCallback("balanced", seed=3)]),
        lambda model: make_elastic(model, tmp_path, elastic={"strategy": "balanced", "seed": 3}),
    ):
        model = elastic_llama(lora_dropout=0.1)
        build(model).train()
        weights.append(adapter_weights(model))
    assert_close(weights[1], weights[0], rtol=0, atol=0)


def test_a_strategy_of_the_user(tmp_path):
    class Ladder:
        def subnets_of_step(self, space, rng):
            return [space.max, space.heuristic, space.min][: int(rng.integers(1, 4))]

    model = elastic_llama()
    record = ForwardRecord(model)
    trainer = make_elastic(model, tmp_path, elastic={"strategy": Ladder(), "distillation": "max"}, max_steps=8)
    trainer.train()
    steps = [trainer.subnets_of_step(step) for step in range(8)]
    assert record.training == sum(steps, [])
    assert {len(subnets) for subnets in steps} == {1, 2, 3}


def test_resumed_training_is_the_unbroken_one_bit_for_bit(tmp_path):
    """With dropout, Adam's moments, a stop in the middle of an epoch and of a stage, and rates of the stages."""
    stages = [Stage(["rank"], 0.5, 3e-3), Stage(["rank"], 1.5, 2e-2)]

    def run(folder, stop, resume=None):
        torch.manual_seed(random.randrange(2**31))
        model = elastic_llama(lora_dropout=0.1)
        record, forwards = StepRecord(), ForwardRecord(model)
        trainer = make_elastic(
            model, folder, [StopAt(stop), record], dataset(16), elastic={"distillation": "max", "stages": stages},
            max_steps=-1, num_train_epochs=2, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        return forwards.training, record.rates, adapter_weights(model)

    subnets, rates, weights = run(tmp_path / "unbroken", stop=8)
    first = run(tmp_path / "broken", stop=3)
    second = run(tmp_path / "broken", stop=8, resume=str(tmp_path / "broken" / "checkpoint-3"))
    assert first[0] + second[0] == subnets and len(subnets) == 8 * 2 * 4
    assert first[1] + second[1] == rates and len(rates) == 8
    assert all(torch.equal(second[2][name], weight) for name, weight in weights.items())


# -- evaluation -----------------------------------------------------------------------------------------------------


def test_evaluation_and_checkpoints_have_the_chosen_subnet(tmp_path):
    model = elastic_llama()
    record = ForwardRecord(model)
    trainer = make_elastic(
        model, tmp_path, eval_dataset=dataset(8), elastic={"eval_subnet": "heuristic", "distillation": "max"},
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=4,
    )  # fmt: skip
    trainer.train()
    heuristic = model.search_space.heuristic
    assert len(record.evaluation) == 4 and set(record.evaluation) == {heuristic} and model.active_subnet == heuristic
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["eval_subnet"] for entry in logged] == ["heuristic"] * 4
    # the loss of an evaluation is neither distilled nor divided by the number of subnets
    batch = torch.stack([row["input_ids"] for row in dataset(8)])
    with torch.no_grad():
        expected = model.eval()(input_ids=batch, labels=batch).loss.item()
    assert logged[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert get_elastic_host(model).active_subnet == heuristic


def test_an_interrupt_leaves_a_trainer_that_evaluates_and_trains_again(tmp_path):
    model = elastic_llama()
    trainer = make_elastic(model, tmp_path, eval_dataset=dataset(8), elastic={"eval_subnet": "min"})
    calls = []

    def press(*args):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt

    handle = model.register_forward_hook(press)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    loss = trainer.evaluate()["eval_loss"]
    assert model.active_subnet == model.search_space.min
    batch = torch.stack([row["input_ids"] for row in dataset(8)])
    with torch.no_grad():
        assert loss == pytest.approx(model(input_ids=batch, labels=batch).loss.item(), rel=1e-5)
    assert trainer.train().global_step == 4


# -- TRL ------------------------------------------------------------------------------------------------------------


def sft_trainer(folder, elastic, wrapped_by="user", callbacks=(), **settings):
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    class ElasticSFTTrainer(ElasticTrainerMixin, SFTTrainer):
        pass

    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )
    texts = Dataset.from_dict({"text": [" ".join(f"w{3 + i + j}" for j in range(3 + i % 3)) for i in range(8)]})
    args = SFTConfig(
        **{
            "output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2,
            "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1,
            "bf16": False, "dataloader_pin_memory": False, "learning_rate": 1e-2, "max_length": 16, "max_grad_norm": 0.0,
        }
        | settings
    )  # fmt: skip
    return ElasticSFTTrainer(
        elastic_llama() if wrapped_by == "user" else tiny_llama(num_hidden_layers=3),
        args,
        train_dataset=texts,
        eval_dataset=texts,
        processing_class=tokenizer,
        callbacks=list(callbacks),
        peft_config=None if wrapped_by == "user" else elastic_config(task_type="CAUSAL_LM"),
        **elastic,
    )


@pytest.mark.parametrize("distillation", [None, "max", "teacher"])
def test_trl_sft_trainer_has_the_gradients_of_transformers_trainer(tmp_path, distillation):
    """A step over all of the data, padding included, so that its order does not matter."""
    if distillation == "teacher":
        distillation = tiny_llama(seed=7)
    elastic = {"distillation": distillation, "distillation_weight": WEIGHT, "distillation_temperature": TEMPERATURE}
    record, expected = StepRecord(), StepRecord()
    trainer = sft_trainer(tmp_path, elastic, callbacks=[record], max_steps=1)
    forwards = ForwardRecord(trainer.model)
    assert trainer.args.gradient_checkpointing  # TRL's default
    trainer.train()
    assert forwards.training == trainer.subnets_of_step(0) * 4
    rows = [{"input_ids": torch.tensor(row["input_ids"])} for row in trainer.train_dataset]
    assert len({len(row["input_ids"]) for row in rows}) > 1
    rows = [row | {"labels": row["input_ids"], "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    reference = elastic_llama()
    expected = gradients_by_hand(reference, trainer.subnets_of_step(0), rows, distillation, shift=True)
    assert_close(record.gradients[0], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("distillation", [None, "max"])
def test_trl_sft_trainer_makes_the_adapter_and_evaluates(tmp_path, distillation):
    elastic = {"distillation": distillation, "eval_subnet": "min", "strategy": SandwichSampler(1, "balanced")}
    trainer = sft_trainer(tmp_path, elastic, wrapped_by="trl", eval_strategy="steps", eval_steps=1)
    before, record = adapter_weights(trainer.model), ForwardRecord(trainer.model)
    trainer.train()
    space = trainer.model.search_space
    assert len(record.training) == 2 * 4 * 3
    assert record.training[:2] == [space.max, space.min]
    assert set(record.evaluation) == {space.min}
    assert [entry["eval_subnet"] for entry in trainer.state.log_history if "eval_loss" in entry] == ["min", "min"]
    assert all(not torch.equal(weight, before[name]) for name, weight in adapter_weights(trainer.model).items())


def test_trl_losses_that_cannot_be_distilled_are_refused(tmp_path):
    pytest.importorskip("trl")
    with pytest.raises(ValueError, match="`distillation` works with `loss_type='nll'` only, got 'dft'"):
        sft_trainer(tmp_path, {"distillation": "max"}, loss_type="dft")
    trainer = sft_trainer(tmp_path, {}, loss_type="dft", max_steps=1)
    assert trainer.train().global_step == 1


# -- stages ---------------------------------------------------------------------------------------------------------


class KindsHost:
    """A host whose space has several kinds of choices: it calls the ranks of some modules by other names."""

    KINDS = {"v_proj": "heads", "down_proj": "mlp"}

    def __init__(self, host):
        self.host = host
        self.search_space = SearchSpace(replace(choice, kind=self._kind(choice.name)) for choice in host.search_space)

    def _kind(self, name):
        return self.KINDS.get(name.rpartition(".")[2], "rank")

    def _plain(self, subnet):
        values = self.search_space.subnet(subnet)
        return Subnet({f"rank:{choice.name}": values[choice.key] for choice in self.search_space})

    def sample_subnet(self, subnet):
        self.host.sample_subnet(self._plain(subnet))

    def set_subnet(self, subnet):
        self.host.set_subnet(self._plain(subnet))

    def restore_subnet(self):
        self.host.restore_subnet()

    @property
    def active_subnet(self):
        active = self.host.active_subnet
        return Subnet({choice.key: active[f"rank:{choice.name}"] for choice in self.search_space})


def llama_of_kinds():
    model = elastic_llama()
    base = model.get_base_model()
    setattr(base, HOST_ATTRIBUTE, KindsHost(getattr(base, HOST_ATTRIBUTE)))
    return model


STAGES = [Stage(("rank",), 1, 1e-3), Stage(("rank", "heads"), 0.5), Stage(["rank", "heads", "mlp"], 1.5, 2e-2)]


@pytest.mark.parametrize("with_callback", [True, False])
def test_stages_say_what_is_sampled_and_at_which_rate(tmp_path, with_callback):
    """Three epochs of 8 steps, linear decay of 1e-2."""
    model = llama_of_kinds()
    host, record, steps = get_elastic_host(model), ForwardRecord(model), StepRecord()
    assert isinstance(host, KindsHost)
    settings = {"max_steps": -1, "num_train_epochs": 3, "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    if with_callback:
        sampling = SubnetSamplingCallback(stages=STAGES)
        args = arguments(tmp_path, **settings)
        trainer = Trainer(model, args, train_dataset=dataset(16), callbacks=[sampling, steps])
    else:
        trainer = make_elastic(model, tmp_path, [steps], dataset(16), elastic={"stages": STAGES}, **settings)
    trainer.train()
    passes = 1 if with_callback else 4
    assert len(record.training) == 24 * passes
    elastic = {kind: [] for kind in ("rank", "heads", "mlp")}
    for start, end in ((0, 8), (8, 12), (12, 24)):
        subnets = record.training[start * passes : end * passes]
        for kind, stages in elastic.items():
            values = {
                subnet[f"rank:{choice.name}"]
                for subnet in subnets
                for choice in host.search_space
                if choice.kind == kind
            }
            stages.append(values)
    everything = {8, 6, 4, 2}
    assert elastic == {"rank": [everything] * 3, "heads": [{8}, everything, everything], "mlp": [{8}, {8}, everything]}
    decay = 1 - np.arange(24) / 24
    factors = np.repeat([0.1, 1, 2], [8, 4, 12])
    np.testing.assert_allclose(steps.rates, 1e-2 * decay * factors, rtol=1e-9)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    np.testing.assert_allclose(logged, steps.rates, rtol=1e-9)


def test_sandwich_and_balanced_stay_within_the_stage(tmp_path):
    """The smallest subnet of a stage has the other choices at their maximum."""
    model = llama_of_kinds()
    elastic = {"stages": [Stage(["mlp"], 1)], "strategy": SandwichSampler(2, "balanced"), "distillation": "max"}
    trainer = make_elastic(model, tmp_path, elastic=elastic, max_steps=-1, num_train_epochs=1)
    trainer.train()
    space = get_elastic_host(model).search_space
    for step in range(32):
        first, second, *others = trainer.subnets_of_step(step)
        assert first == space.max
        assert second == {c.key: c.options[-1] if c.kind == "mlp" else c.options[0] for c in space}
        assert all(subnet[c.key] == c.options[0] for subnet in others for c in space if c.kind != "mlp")


def test_a_scheduler_of_the_user_serves_several_runs(tmp_path):
    """The rates of the stages do not pile up, and go when there are no stages."""
    model = elastic_llama()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    settings = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 1e-2}
    rates = []
    for stages in ([Stage(["rank"], 1, 3e-2)], [Stage(["rank"], 1, 3e-2)], None):
        steps = StepRecord()
        Trainer(
            model,
            arguments(tmp_path, **settings),
            train_dataset=dataset(4),
            callbacks=[SubnetSamplingCallback(stages=stages), steps],
            optimizers=(optimizer, scheduler),
        ).train()
        rates.append(steps.rates)
    np.testing.assert_allclose(rates, [[3e-2] * 2, [3e-2] * 2, [1e-2] * 2])


@pytest.mark.parametrize(
    "stages, settings, message",
    [
        ([Stage(["rank"], 1)], {}, "sum to 1, but `num_train_epochs` is 2"),
        ([Stage(["rank"], 1), Stage(["rank"], 1.5)], {}, "sum to 2.5, but `num_train_epochs` is 2"),
        ([Stage(["rank"], 2)], {"max_steps": 3}, "leave `max_steps` at -1, it is 3"),
        ([Stage(["rank", "depht"], 2)], {}, r"kinds \['depht'\], the search space of the model has \['rank'\]"),
        ([Stage(["rank"], 0.001), Stage(["rank"], 1.999)], {}, "shorter than half an optimizer step"),
        (
            [Stage(["rank"], 2, 1e-3)],
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "LambdaLR",
        ),
        ([Stage(["rank"], 2, 1e-3)], {"learning_rate": 0.0}, "positive `args.learning_rate`"),
    ],
)
@pytest.mark.parametrize("with_callback", [True, False])
def test_stages_that_do_not_fit_are_refused_before_training(tmp_path, stages, settings, message, with_callback):
    model = elastic_llama()
    model.set_subnet("heuristic")
    before, record = adapter_weights(model), ForwardRecord(model)
    settings = {"max_steps": -1, "num_train_epochs": 2} | settings
    if with_callback:
        callbacks = [SubnetSamplingCallback(stages=stages, eval_subnet="min")]
        trainer = make_trainer(model, tmp_path, callbacks, eval_dataset=dataset(4), **settings)
    else:
        elastic = {"stages": stages, "eval_subnet": "min"}
        trainer = make_elastic(model, tmp_path, eval_dataset=dataset(4), elastic=elastic, **settings)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert not record.training and model.active_subnet == model.search_space.heuristic
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(model).items())


def test_without_rates_any_scheduler_will_do():
    space = SearchSpace([Choice("rank", "a", (4, 2)), Choice("mlp", "b", (40, 20))])
    args = arguments("unused", max_steps=-1, num_train_epochs=2)
    scheduler = ReduceLROnPlateau(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    plan = StagePlan([Stage(["mlp"], 0.5), Stage(["rank"], 1.5)], space, args, 10, scheduler)
    plan.scale_learning_rate(scheduler)
    elastic = [[c.kind for c in plan.space_of_step(step) if len(c.options) > 1] for step in range(12)]
    assert elastic == [["mlp"]] * 2 + [["rank"]] * 10  # 2.5 steps are 2; past the end is the last stage
    assert all(plan.space_of_step(step).max == space.max for step in range(10))


@pytest.mark.parametrize(
    "arguments_, message",
    [
        (("rank", 1), "`kinds`"), (([], 1), "`kinds`"), (([1], 1), "`kinds`"), ((["rank"], 0), "`epochs`"),
        ((["rank"], float("inf")), "`epochs`"), ((["rank"], "1"), "`epochs`"), ((["rank"], 1, -1e-3), "`learning_rate`"),
    ],
)  # fmt: skip
def test_bad_stage(arguments_, message):
    with pytest.raises(ValueError, match=f"{message} of a stage must be"):
        Stage(*arguments_)


@pytest.mark.parametrize("stages", [[], "rank", [("rank", 1)], Stage(["rank"], 1)])
def test_bad_stages(stages):
    with pytest.raises(ValueError, match="`stages` must be a sequence of Stage"):
        SubnetSamplingCallback(stages=stages)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["sandwich", SandwichSampler()])
def test_the_callback_refuses_several_subnets_a_step(strategy):
    with pytest.raises(ValueError, match="`strategy` '(sandwich|SandwichSampler)' trains several.*ElasticTrainer"):
        SubnetSamplingCallback(strategy)


@pytest.mark.parametrize(
    "elastic, message",
    [
        ({"strategy": "sandwhich"}, r"`strategy` must be one of \['balanced', 'sandwich', 'uniform'\]"),
        ({"strategy": SandwichSampler}, "`strategy` must be one of"),
        ({"seed": -1}, "`seed`"),
        ({"stages": [1]}, "`stages`"),
        ({"distillation": "min"}, "`distillation` must be None, 'max' or a model, got 'min'"),
        (
            {"distillation": "max", "strategy": "uniform"},
            "`distillation='max'` needs a strategy .*'uniform' trains one",
        ),
        ({"distillation_weight": 0}, "`distillation_weight` must be a number above 0 and at most 1, got 0"),
        ({"distillation_weight": 1.1}, "`distillation_weight`"),
        ({"distillation_weight": "1"}, "`distillation_weight`"),
        ({"distillation_temperature": 0.0}, "`distillation_temperature` must be a number above 0, got 0.0"),
        ({"distillation_temperature": float("inf")}, "`distillation_temperature`"),
        ({"distillation_temperature": float("nan")}, "`distillation_temperature`"),
    ],
)
def test_bad_arguments(tmp_path, elastic, message):
    with pytest.raises(ValueError, match=message):
        make_elastic(elastic_llama(), tmp_path, elastic=elastic)


def test_a_model_without_an_elastic_adapter_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="has no elastic adapter"):
        make_elastic(model, tmp_path)


def test_a_second_sampler_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`callbacks` holds a SubnetSamplingCallback, but ElasticTrainer samples"):
        make_elastic(elastic_llama(), tmp_path, [SubnetSamplingCallback()])


def test_a_teacher_that_shares_weights_is_refused(tmp_path):
    model = elastic_llama()
    teacher = copy.deepcopy(model.get_base_model())
    for distillation in (model, model.get_base_model()):
        with pytest.raises(ValueError, match="shares weights with the trained one"):
            make_elastic(model, tmp_path, elastic={"distillation": distillation})
    make_elastic(model, tmp_path, elastic={"distillation": teacher.train()}, max_steps=1).train()
    assert not teacher.training


def test_context_parallelism_is_refused(tmp_path, monkeypatch):
    class Parallel(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            monkeypatch.setattr(Accelerator, "parallelism_config", ParallelismConfig(cp_size=2))

    with pytest.raises(ValueError, match="`parallelism_config` asks for context or sequence parallelism"):
        make_elastic(elastic_llama(), tmp_path, [Parallel()]).train()


class MinFirst:
    def subnets_of_step(self, space, rng):
        return [space.min, space.max]


class Nothing:
    def subnets_of_step(self, space, rng):
        return []


@pytest.mark.parametrize(
    "build, rows, elastic, message",
    [
        (elastic_llama, dataset(4), {"distillation": "max", "strategy": MinFirst()}, "begin with the largest subnet"),
        (elastic_llama, dataset(4), {"strategy": Nothing()}, "gives no subnet for step 0"),
        (
            elastic_llama, dataset(4), {"distillation": lambda: tiny_llama(vocab_size=VOCABULARY + 8)},
            f"a model with {VOCABULARY + 8} classes .* model has {VOCABULARY}",
        ),
        (
            regressor, [row | {"labels": torch.tensor(0.5)} for row in dataset(4)],
            {"distillation": "max"}, "two or more classes",
        ),
        (
            lambda: classifier(problem_type="multi_label_classification"),
            [row | {"labels": torch.tensor([1.0, 0.0, 1.0])} for row in dataset(4)],
            {"distillation": "max"}, r"labels are of shape \(2, 3\) and logits of shape \(2, 3\)",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_the_first_step(tmp_path, build, rows, elastic, message):
    model = build()
    before = adapter_weights(model)
    if callable(elastic.get("distillation")):
        elastic = elastic | {"distillation": elastic["distillation"]()}
    with pytest.raises(ValueError, match=message):
        make_elastic(model, tmp_path, train_dataset=rows, elastic=elastic).train()
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(model).items())


def test_stages_of_width_and_depth(tmp_path):
    """Progressive shrinking of a real super-network."""
    settings = {"elastic_width": {"heads": [1.0, 0.5], "mlp": [1.0, 0.5]}, "elastic_depth": [1, "2.mlp"]}
    stages = [Stage(["rank"], 1), Stage(["rank", "heads", "mlp"], 1), Stage(["rank", "heads", "mlp", "depth"], 1)]
    model = elastic_llama(importance="none", **settings)
    trainer = make_elastic(
        model,
        tmp_path,
        train_dataset=language_data(12),
        elastic={"stages": stages, "distillation": "max"},
        num_train_epochs=3,
        max_steps=-1,
        per_device_train_batch_size=4,
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    space = model.search_space
    for stage, kinds in enumerate(({"rank"}, {"rank", "heads", "mlp"}, {"rank", "heads", "mlp", "depth"})):
        sampled = [subnet for step in range(3 * stage, 3 * stage + 3) for subnet in trainer.subnets_of_step(step)]
        narrowed = {key.partition(":")[0] for s in sampled for key in s if s[key] != space.max[key]}
        assert narrowed == kinds
        assert len(sampled) == 12
    assert model.active_subnet == space.max
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)
