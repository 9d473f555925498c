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
"""Trainers that train on their own generations for several steps: all of these train one subnet, as TRL compares the
probabilities of tokens in each of them with those at the time of the generation."""

from types import SimpleNamespace

import pytest
import torch
from support.models import tiny_llama
from support.training import arguments, dataset, elastic_config, elastic_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Trainer

from peft_elastic import ElasticTrainer, ElasticTrainerMixin, SubnetSamplingCallback
from peft_elastic.supernet.generations import Generations


pytestmark = pytest.mark.filterwarnings("ignore")


def settings(length=None, iterations=None, accumulation=1):
    args = SimpleNamespace(gradient_accumulation_steps=accumulation)
    if iterations is not None:
        args.num_iterations, args.steps_per_generation = iterations, length
    return args


def run(generations, args, start, sizes, made=0):
    """Steps of so many micro-batches each, as Trainer takes them and as TRL's trainers count them. Returns, by step, the first
    step of its group and the generations that it trains on."""
    every = (args.num_iterations * args.steps_per_generation) if hasattr(args, "num_iterations") else None
    generations.begin(args, start)
    rows = {}
    for step, size in enumerate(sizes, start):
        generations.begin_step(step)
        rows[step] = (generations.first_step(step), {(made + i) // every for i in range(size)} if every else {step})
        for _ in range(size):
            generations.end_micro_batch()
        made += size
    return rows


def check_groups(rows):
    """Steps that share a generation have the same first step, which belongs to them; and no more steps than that have it."""
    for step, (first, used) in rows.items():
        for other, (other_first, other_used) in rows.items():
            if used & other_used:
                assert first == other_first, (step, other)
        assert first <= step
        assert first == step or used & rows[step - 1][1]


@pytest.mark.parametrize(
    ("length", "iterations", "accumulation"),
    [
        (1, 2, 1),
        (1, 4, 1),
        (2, 2, 2),
        (4, 1, 1),
        (4, 1, 2),
        (3, 1, 2),
        (2, 3, 4),
        (1, 1, 4),
        (4, 2, 8),
        (2, 1, 4),
        (5, 2, 3),
    ],
)
def test_steps_of_one_generation_belong_together(length, iterations, accumulation):
    args = settings(length, iterations, accumulation)
    rows = run(Generations(), args, 0, [accumulation] * 24)
    check_groups(rows)
    if accumulation % (length * iterations) == 0:
        assert all(first == step for step, (first, _) in rows.items())
    # an epoch ends with fewer micro-batches, whose number is that of whole generations
    every = length * iterations
    epoch = [accumulation] * (3 * every // accumulation) + (
        [3 * every % accumulation] if 3 * every % accumulation else []
    )
    check_groups(run(Generations(), args, 0, epoch * 3))


def test_what_is_to_come_is_foreseen_and_what_was_is_known():
    for length, iterations, accumulation in ((1, 2, 1), (3, 1, 2), (2, 3, 4), (5, 2, 3)):
        args = settings(length, iterations, accumulation)
        rows = run(Generations(), args, 0, [accumulation] * 20)
        generations = Generations()
        run(generations, args, 0, [accumulation] * 5)
        assert [generations.first_step(step) for step in range(20)] == [rows[step][0] for step in range(20)]


def test_a_resumed_run_counts_from_where_it_resumes():
    """The trainer that resumes generates at once, wherever the other one stopped."""
    args = settings(1, 3)
    rows = run(Generations(), args, 4, [1] * 7)
    assert [first for first, _ in rows.values()] == [4, 4, 4, 7, 7, 7, 10]
    assert [first for first, _ in run(Generations(), args, 6, [1] * 4).values()] == [6, 6, 6, 9]


def test_a_second_run_of_a_trainer_goes_on_with_its_generation():
    args = settings(1, 3)
    generations = Generations()
    run(generations, args, 0, [1] * 4)
    rows = run(generations, args, 0, [1] * 5, made=4)
    assert [first for first, _ in rows.values()] == [3, 3, 2, 2, 2]


def test_other_trainers_have_a_subnet_for_each_step():
    for args in (settings(accumulation=3), settings(1, 1, 3), settings(3, 1, 3)):
        assert [first for first, _ in run(Generations(), args, 5, [3] * 4).values()] == [5, 6, 7, 8]
        generations = Generations()
        generations.begin(args, 5)
        assert [generations.first_step(step) for step in range(9)] == list(range(9))


# -- TRL -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>")


def rewards(completions, **kwargs):
    """Different for every completion, so that there are advantages."""
    return [float(sum(map(ord, completion)) % 17) for completion in completions]


def online_trainer(kind, folder, tokenizer, model, callbacks=(), cls=None, **options):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    args = getattr(trl, f"{kind}Config")(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "num_generations": 2,
            "max_completion_length": 5,
            "learning_rate": 1e-12,
            "max_steps": 4,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
        }
        | options
    )
    prompts = Dataset.from_dict({"prompt": [f"w{3 + i} w{10 + i} w{20 + i}" for i in range(16)]})
    cls = cls or getattr(trl, f"{kind}Trainer")
    return cls(
        model=model,
        reward_funcs=rewards,
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


class Record(SubnetSamplingCallback):
    """What was active in each optimizer step."""

    def on_train_begin(self, *args, model=None, **kwargs):
        self.seen, self.model = [], model
        super().on_train_begin(*args, model=model, **kwargs)

    def on_step_end(self, *args, **kwargs):
        self.seen.append(self.model.active_subnet)
        super().on_step_end(*args, **kwargs)


def clipped(trainer):
    rows = [entry for entry in trainer.state.log_history if "clip_ratio/region_mean" in entry]
    assert rows
    return [entry["clip_ratio/region_mean"] for entry in rows]


ONLINE = [
    ("GRPO", {"num_iterations": 2}),
    ("RLOO", {"num_iterations": 2}),
    pytest.param("GRPO", {"num_iterations": 3, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
    pytest.param("GRPO", {"steps_per_generation": 4, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
    pytest.param("GRPO", {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
    pytest.param("GRPO", {"num_iterations": 2, "loss_type": "dr_grpo", "beta": 0.1}, marks=pytest.mark.slow),
    pytest.param("GRPO", {"num_iterations": 2, "importance_sampling_level": "sequence"}, marks=pytest.mark.slow),
    pytest.param("RLOO", {"steps_per_generation": 4, "gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "options"), ONLINE)
def test_no_token_is_clipped_where_nothing_moves(tmp_path, tokenizer, kind, options):
    """A learning rate of 1e-12: the only difference between two steps could be that of two subnets."""
    torch.manual_seed(0)
    callback = Record()
    options = {"max_steps": 6} | options
    trainer = online_trainer(kind, tmp_path, tokenizer, elastic_llama(task_type="CAUSAL_LM"), [callback], **options)
    trainer.train()
    assert max(clipped(trainer)) == 0
    assert callback.seen == [callback.subnet_of_step(step) for step in range(6)]
    assert 1 < len(set(callback.seen)) < 6


@pytest.mark.slow
def test_tokens_were_clipped_with_a_subnet_for_each_step(tmp_path, tokenizer, monkeypatch):
    """That the test above can fail."""
    monkeypatch.setattr(Generations, "first_step", lambda self, step: step)
    trainer = online_trainer(
        "GRPO", tmp_path, tokenizer, elastic_llama(task_type="CAUSAL_LM"), [Record()], num_iterations=2, max_steps=6
    )
    trainer.train()
    assert max(clipped(trainer)) > 0.05


@pytest.mark.slow
def test_a_resumed_run_is_not_clipped_either(tmp_path, tokenizer):
    options = {"num_iterations": 2, "max_steps": 7, "save_strategy": "steps", "save_steps": 3}
    online_trainer("GRPO", tmp_path, tokenizer, elastic_llama(task_type="CAUSAL_LM"), [Record()], **options).train()
    callback = Record()
    trainer = online_trainer("GRPO", tmp_path, tokenizer, elastic_llama(task_type="CAUSAL_LM"), [callback], **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert max(clipped(trainer)[3:]) == 0
    assert [callback.subnet_of_step(step) for step in range(3, 7)] == callback.seen
    assert callback.seen[0] == callback.seen[1] and callback.seen[2] == callback.seen[3]


def test_several_subnets_a_step_are_refused_on_own_generations(tmp_path, tokenizer):
    trl = pytest.importorskip("trl")

    class Several(ElasticTrainerMixin, trl.GRPOTrainer):
        pass

    with pytest.raises(
        ValueError, match="'sandwich' trains several subnets in each step, and Several counts every pass"
    ):
        online_trainer("GRPO", tmp_path, tokenizer, elastic_llama(task_type="CAUSAL_LM"), cls=Several)


def test_trainers_that_compute_their_loss_elsewhere_are_refused(tmp_path):
    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**inputs).loss
            self.accelerator.backward(loss)
            return loss.detach()

    class Several(ElasticTrainerMixin, Own):
        pass

    model = elastic_llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="Several does not compute its loss in `compute_loss`"):
        Several(model=model, args=arguments(tmp_path), train_dataset=dataset(8)).train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    Several(model=model, args=arguments(tmp_path), train_dataset=dataset(8), strategy="uniform").train()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_ppo_epochs": 4}, "PPO .* takes many optimizer steps in a loop of its own"),
        ({"max_staleness": 4, "epsilon": 0.2}, "Asynchronous GRPO compares"),
    ],
)
@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_cannot_be_done_is_refused_before_the_first_step(tmp_path, fields, message, several):
    model, args = elastic_llama(), arguments(tmp_path)
    for name, value in fields.items():
        setattr(args, name, value)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if several:
        trainer = ElasticTrainer(model=model, args=args, train_dataset=dataset(8))
    else:
        trainer = Trainer(model=model, args=args, train_dataset=dataset(8), callbacks=[SubnetSamplingCallback()])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_probabilities_of_the_reference_do_not_depend_on_the_subnet(tmp_path, tokenizer, kind):
    """Computed beforehand or in each step, they are those of the base."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    losses = {}
    for beforehand in (True, False):
        rows = range(8)
        data = {"prompt": [f"w{3 + i} w{10 + i}" for i in rows]}
        if kind == "DPO":
            data |= {"chosen": [f" w{20 + i} w5" for i in rows], "rejected": [f" w{30 + i} w6" for i in rows]}
        else:
            data |= {"completion": [f" w{20 + i} w5" for i in rows], "label": [i % 2 == 0 for i in rows]}
        args = getattr(trl, f"{kind}Config")(
            output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=3, use_cpu=True, report_to=[],
            disable_tqdm=True, save_strategy="no", logging_steps=1, bf16=False, gradient_checkpointing=False,
            precompute_ref_log_probs=beforehand, learning_rate=1e-3, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = getattr(trl, f"{kind}Trainer")(
            model=tiny_llama(), args=args, train_dataset=Dataset.from_dict(data), processing_class=tokenizer,
            peft_config=elastic_config(task_type="CAUSAL_LM"), callbacks=[SubnetSamplingCallback()],
        )  # fmt: skip
        trainer.train()
        losses[beforehand] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)


# -- evaluation mode in the middle of a step --------------------------------------------------------------------------


def test_a_step_goes_on_after_evaluation_mode():
    """Generation in evaluation mode, as some trainers do it within a step, must not make the rest train another subnet."""
    model = elastic_llama()
    model.set_subnet("heuristic")
    space = model.search_space
    model.train()
    model.sample_subnet("min")
    for _ in range(2):
        model.eval()
        assert model.active_subnet == space.heuristic
        model.train()
        assert model.active_subnet == space.min
    model.eval()
    model.restore_subnet()  # the step is over
    assert model.train().active_subnet == space.heuristic
    model.sample_subnet("min")
    model.eval()
    model.set_subnet("max")
    assert model.train().active_subnet == space.max
    model.sample_subnet("min")
    model.eval()
    model.sample_subnet("heuristic")
    assert model.train().active_subnet == space.heuristic
    model.sample_subnet("min")
    model.eval()
    model.merge_adapter()
    model.train()
    model.unmerge_adapter()
    assert model.active_subnet == space.max
