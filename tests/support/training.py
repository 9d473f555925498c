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
"""What the tests of training share: a small elastic model, data, arguments of the Trainer, and a record of what ran.
As a script it is one process of a distributed run: `torchrun --nproc-per-node 2 tests/support/training.py OUTPUT_FOLDER`."""

import functools
import os
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from support.models import VOCABULARY, tiny_llama
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_elastic import ElasticLoraConfig, ElasticTrainer, Subnet, SubnetSamplingCallback


TARGETS = ["q_proj", "v_proj", "down_proj"]


def elastic_config(**settings):
    """B starts at random, so that the active rank matters from the first step on."""
    return ElasticLoraConfig(
        **{
            "r": 8,
            "lora_alpha": 16,
            "elastic_ranks": [8, 6, 4, 2],
            "target_modules": TARGETS,
            "init_lora_weights": False,
        }
        | settings
    )


def elastic_llama(seed=0, **settings):
    model = tiny_llama(seed=seed, num_hidden_layers=3)
    torch.manual_seed(seed + 100)
    return get_peft_model(model, elastic_config(**settings))


def dataset(size=64, seed=0, length=10):
    ids = torch.randint(3, VOCABULARY, (size, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, **settings):
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        | settings
    )


def make_trainer(model, folder, callbacks=(), eval_dataset=None, **settings):
    args = arguments(folder, **settings)
    return Trainer(model, args, train_dataset=dataset(), eval_dataset=eval_dataset, callbacks=list(callbacks))


def checkpointing(kind):
    """The Trainer's arguments for a kind of gradient checkpointing: "none", "reentrant" or "non-reentrant"."""
    if kind == "none":
        return {}
    return {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": kind == "reentrant"},
    }


def adapter_weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class ForwardRecord:
    """The subnet of each forward pass of the model, read off the outputs of the A matrices."""

    def __init__(self, model):
        self.training, self.evaluation = [], []
        self._ranks = {}
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                key = f"rank:{name[name.index('model.layers') :]}"
                layer.lora_A["default"].register_forward_hook(
                    lambda module, args, output, key=key: self._ranks.update({key: output.shape[-1]})
                )
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        base.register_forward_hook(self._record)

    def _record(self, model, args, output):
        (self.training if model.training else self.evaluation).append(Subnet(self._ranks))
        self._ranks = {}


class WrapperRecord(TrainerCallback):
    """How the Trainer wrapped the model, and how often the processes exchanged gradients."""

    find_unused_parameters = None
    exchanges = 0

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        wrapped = self.trainer.model_wrapped
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            wrapped.register_comm_hook(None, self._exchange)

    def _exchange(self, process_group, bucket):
        self.exchanges += 1
        return allreduce_hook(process_group, bucket)

    def on_step_end(self, args, state, control, **kwargs):
        wrapped = self.trainer.model_wrapped
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            self.find_unused_parameters = wrapped.find_unused_parameters


def train_and_record(folder, resume=None, elastic=None, **settings):
    """Train four steps of global batch 4, without dropout, with the callback or, given its arguments, an ElasticTrainer;
    what ran and what came out."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model = elastic_llama()
    record = ForwardRecord(model)
    trainer_cls, callbacks = (Trainer, [SubnetSamplingCallback(eval_subnet="heuristic")])
    if elastic is not None:
        trainer_cls, callbacks = functools.partial(ElasticTrainer, eval_subnet="heuristic", **elastic), []
    trainer = trainer_cls(
        model,
        arguments(
            folder,
            per_device_train_batch_size=4 // world // settings.get("gradient_accumulation_steps", 1),
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            **settings,
        ),
        train_dataset=dataset(),
        eval_dataset=dataset(8, seed=1),
        callbacks=callbacks,
    )
    wrapper = WrapperRecord(trainer)
    trainer.add_callback(wrapper)
    trainer.train(resume_from_checkpoint=resume)
    return {
        "training": [dict(subnet) for subnet in record.training],
        "evaluation": [dict(subnet) for subnet in record.evaluation],
        "weights": adapter_weights(model),
        "eval_loss": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "exchanges": wrapper.exchanges,
        "find_unused_parameters": wrapper.find_unused_parameters,
        "world_size": trainer.args.world_size,
    }


def main(output):
    settings = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    runs = {kind: train_and_record(output / kind, **checkpointing(kind), **settings) for kind in CHECKPOINTING}
    runs["resumed"] = train_and_record(output / "resumed", resume=str(output / "none" / "checkpoint-2"), **settings)
    runs["find-unused"] = train_and_record(output / "find-unused", **{**settings, "ddp_find_unused_parameters": None})
    runs["sandwich"] = train_and_record(output / "sandwich", **SANDWICH, **settings)
    torch.save(runs, output / f"rank-{os.environ['RANK']}.pt")


SANDWICH = {"elastic": {"distillation": "max"}, "gradient_accumulation_steps": 2}
CHECKPOINTING = ["none", "reentrant", "non-reentrant"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
