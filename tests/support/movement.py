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
"""What the tests of importance by movement share: which weights belong to which unit, said by hand for each architecture, and a
training that can be killed, resumed and spread over processes."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from support import training
from support.models import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit, tokens
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_elastic import MovementCallback


# name -> (how to build it, size of a query head times heads of a unit, size of a key head)
MODELS = {
    "bert": (tiny_bert, 8, 8),
    "bert with heads of 32": (lambda **s: tiny_bert(hidden_size=64, num_attention_heads=2, **s), 32, 32),
    "llama": (tiny_llama, 16, 8),
    "gpt2": (tiny_gpt2, 8, 8),
    "vit": (tiny_vit, 8, 8),
    "t5": (tiny_t5, 8, 8),
}


def build(name: str) -> Any:
    """In evaluation mode, without dropout."""
    return MODELS[name][0]()


def batch_of(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs with labels, in float64 if they are pixels."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        pixels = torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2])}
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    if name == "t5":
        return {"input_ids": ids, "labels": tokens(length=5, seed=2)[:1].repeat(3, 1)}
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = torch.tensor([0, 1, 2]) if name.startswith("bert") else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# pattern of a parameter's name -> (order, which dimension the units are in, "query", "key", "fused", "channel" or "head"); what
# reads the units is marked
_OWNERS = {
    "bert": [
        (r"(bert\.encoder\.layer\.\d+\.attention\.self)\.(query|key|value)\.(weight|bias)", 0, "query"),
        (r"(bert\.encoder\.layer\.\d+\.attention)\.output\.dense\.weight", 1, "query reads self"),
        (r"(bert\.encoder\.layer\.\d+)\.intermediate\.dense\.(weight|bias)", 0, "channel"),
        (r"(bert\.encoder\.layer\.\d+)\.output\.dense\.weight", 1, "channel reads"),
    ],
    "llama": [
        (r"(model\.layers\.\d+\.self_attn)\.q_proj\.weight", 0, "query"),
        (r"(model\.layers\.\d+\.self_attn)\.[kv]_proj\.weight", 0, "key"),
        (r"(model\.layers\.\d+\.self_attn)\.o_proj\.weight", 1, "query reads"),
        (r"(model\.layers\.\d+)\.mlp\.(gate|up)_proj\.weight", 0, "channel"),
        (r"(model\.layers\.\d+)\.mlp\.down_proj\.weight", 1, "channel reads"),
    ],
    "gpt2": [
        (r"(transformer\.h\.\d+\.attn)\.c_attn\.(weight|bias)", -1, "fused"),
        (r"(transformer\.h\.\d+\.attn)\.c_proj\.weight", 0, "query reads"),
        (r"(transformer\.h\.\d+)\.mlp\.c_fc\.(weight|bias)", -1, "channel"),
        (r"(transformer\.h\.\d+)\.mlp\.c_proj\.weight", 0, "channel reads"),
    ],
    "vit": [
        (r"(vit\.layers\.\d+\.attention)\.[qkv]_proj\.(weight|bias)", 0, "query"),
        (r"(vit\.layers\.\d+\.attention)\.o_proj\.weight", 1, "query reads"),
        (r"(vit\.layers\.\d+)\.mlp\.fc1\.(weight|bias)", 0, "channel"),
        (r"(vit\.layers\.\d+)\.mlp\.fc2\.weight", 1, "channel reads"),
    ],
    "t5": [
        (r"((?:en|de)coder\.block)\.\d+\.layer\.0\.SelfAttention\.[qkv]\.weight", 0, "query"),
        (r"((?:en|de)coder\.block)\.\d+\.layer\.0\.SelfAttention\.o\.weight", 1, "query reads"),
        (r"((?:en|de)coder\.block)\.\d+\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", 1, "head"),
        (r"(decoder\.block\.\d+\.layer\.1\.EncDecAttention)\.[qkv]\.weight", 0, "query"),
        (r"(decoder\.block\.\d+\.layer\.1\.EncDecAttention)\.o\.weight", 1, "query reads"),
        (r"((?:en|de)coder\.block\.\d+)\.layer\.\d\.DenseReluDense\.wi\.weight", 0, "channel"),
        (r"((?:en|de)coder\.block\.\d+)\.layer\.\d\.DenseReluDense\.wo\.weight", 1, "channel reads"),
    ],
}


def owners(name: str, model: Any) -> Iterator[tuple[str, str, int, torch.Tensor, bool]]:
    """Of each parameter that has to do with units: its name, the name of the order, the dimension, the unit of each index of that
    dimension, and whether it reads the units."""
    _, query, key = MODELS[name]
    for parameter_name, parameter in model.named_parameters():
        for pattern, dim, kind in _OWNERS[name.split()[0]]:
            if not (found := re.fullmatch(pattern, parameter_name)):
                continue
            index = torch.arange(parameter.shape[dim])
            kind, *rest = kind.split()
            sizes = {"query": query, "key": key, "channel": 1, "head": 1}
            units = index % (len(index) // 3) // query if kind == "fused" else index // sizes[kind]
            yield parameter_name, ".".join([found[1], *rest[1:]]), dim % parameter.dim(), units, rest[:1] == ["reads"]


def dense_gradients(
    name: str, model: Any, batch: dict[str, torch.Tensor], scores: dict[str, torch.Tensor], threshold: float
) -> dict[str, torch.Tensor]:
    """The reference: sum over the weights of a unit of dL/dW' W, where W' is W with the columns of closed units at zero."""
    whole = {key: p.detach().clone() for key, p in model.named_parameters()}
    masked = {key: p.clone() for key, p in whole.items()}
    found = list(owners(name, model))
    for key, order, dim, units, reads in found:
        if reads:
            is_open = (scores[order] > threshold).to(masked[key])[units]
            masked[key] *= is_open.unsqueeze(1 - dim)
    leaves = {key: p.requires_grad_() for key, p in masked.items()}
    loss = torch.func.functional_call(model, leaves, kwargs=batch).loss
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)))
    totals = {order: torch.zeros_like(score) for order, score in scores.items()}
    for key, order, dim, units, _ in found:
        products = (gradients[key] * whole[key]).movedim(dim, 0).reshape(len(units), -1).sum(1)
        totals[order].index_add_(0, units, products)
    return totals


# -- trainings -----------------------------------------------------------------------------------------------------------


def classified(size: int = 48) -> list[dict[str, torch.Tensor]]:
    """Sequences whose class their first token says."""
    ids = torch.randint(3, VOCABULARY, (size, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def arguments(folder: Any, **settings: Any) -> TrainingArguments:
    """Two epochs, which the times of the callback are counted in."""
    return training.arguments(
        folder, **{"per_device_train_batch_size": 8, "num_train_epochs": 2, "max_steps": -1} | settings
    )


class Death(TrainerCallback):
    """Kills the process right after a step's checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Any, resume: Any = None, die_at: int | None = None, **settings: Any) -> dict[str, Any]:
    """Twelve steps, with dropout and weight decay; the weights and scores that come out, also in a file of each process."""
    world, folder = int(os.environ.get("WORLD_SIZE", "1")), Path(folder)
    callback = MovementCallback(start=0.5)
    dropout = settings.pop("dropout", 0.1)
    model = tiny_bert(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    accumulation = settings.get("gradient_accumulation_steps", 1)
    args = arguments(
        folder,
        per_device_train_batch_size=8 // world // accumulation,
        save_strategy="steps",
        save_steps=5,
        weight_decay=0.1,
        **settings,
    )
    callbacks = [callback] if die_at is None else [callback, Death(die_at)]
    trainer = Trainer(model, args, train_dataset=classified(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == 12 and args.world_size == world
    result = {"scores": callback.scores, "weights": {key: p.detach() for key, p in model.named_parameters()}}
    torch.save(result, folder / f"rank-{os.environ.get('RANK', '0')}.pt")
    return result
