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
"""What the tests of structured pruning share: calibration data of every architecture, states of a model computed in another way,
and their loss by hand."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from support.elastic_models import blocks_of, build, masked
from support.models import ARCHITECTURES, BLOCKS, T5S, tokens
from torch import nn

from peft_elastic.structure.blocks import Structure


CLASSIFIERS = ("bert", "roberta", "distilbert", "vit")
PARTS = ("attention", "mlp")


def calibration_of(name: str) -> list[dict[str, torch.Tensor]]:
    """Batches of different sizes. Of language models: padded on the left, on the right, with labels, and with nothing else."""
    if name == "vit":
        pixels = ARCHITECTURES["vit"].inputs()["pixel_values"]
        return [
            {"pixel_values": pixels, "labels": torch.tensor([0, 2])},
            {"pixel_values": -pixels[:1], "labels": torch.tensor([1])},
        ]
    ids = tokens(3, 7)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[0, :3], left[2, :1] = 0, 0
    right[1, -2:] = 0
    more = tokens(2, 5, seed=1)
    if name in CLASSIFIERS:
        return [
            {"input_ids": ids, "attention_mask": right, "labels": torch.tensor([0, 1, 2])},
            {"input_ids": more, "labels": torch.tensor([2, 2])},
        ]
    if name in T5S:
        labels = tokens(3, 4, seed=2)
        labels[0, 2:] = -100
        return [
            {"input_ids": ids, "attention_mask": right, "labels": labels},
            {"input_ids": more, "labels": tokens(2, 6, seed=3)},
        ]
    labels = ids.clone()
    labels[0, :3], labels[1, 4], labels[2, :6] = -100, -100, -100
    return [
        {"input_ids": ids, "attention_mask": left},
        {"input_ids": ids.flip(0), "attention_mask": right},
        {"input_ids": ids, "attention_mask": left, "labels": labels},
        {"input_ids": more},
    ]


def loss_by_hand(model: nn.Module, name: str, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean negative log-likelihood of everything that is to be predicted, one prediction after the other."""
    losses = []
    for batch in batches:
        with torch.no_grad():
            logits = model(**{key: value for key, value in batch.items() if key != "labels" or name in T5S}).logits
        log_probabilities = logits.double().log_softmax(-1)
        labels = batch.get("labels")
        if name in CLASSIFIERS:
            losses += [-row[label].item() for row, label in zip(log_probabilities, labels)]
            continue
        if name in T5S:
            losses += [
                -log_probabilities[s, t, labels[s, t]].item()
                for s in range(len(labels))
                for t in range(labels.shape[1])
                if labels[s, t] != -100
            ]
            continue
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        for s in range(len(ids)):
            for t in range(1, ids.shape[1]):
                wanted = mask[s, t] and mask[s, t - 1] if labels is None else labels[s, t] != -100 and mask[s, t - 1]
                if wanted:
                    target = ids[s, t] if labels is None else labels[s, t]
                    losses.append(-log_probabilities[s, t - 1, target].item())
    return sum(losses) / len(losses)


@contextmanager
def without(model: Any, name: str, state: Mapping[str, int]) -> Iterator[None]:
    """The model at full size, in which hooks take away what a state does not have."""
    state = dict(state)
    for key, left in list(state.items()):
        if key.startswith("depth:") and not left:  # what is inside is gone anyway
            for part in PARTS:
                state.pop(f"{key}.{part}", None)
    if name not in T5S:
        with masked(model, name, state):
            yield
        return

    def nothing(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (torch.zeros_like(output[0]), *output[1:])
        return torch.zeros_like(output)

    with ExitStack() as hooks:
        hooks.enter_context(masked(model, name, {k: v for k, v in state.items() if not k.startswith("depth:")}))
        for key in (key for key, left in state.items() if key.startswith("depth:") and not left):
            path = key.removeprefix("depth:")
            block, _, part = path.rpartition(".") if path.endswith(PARTS) else (path, "", "")
            layers = list(model.get_submodule(block).layer)
            layers = {"": layers, "mlp": layers[-1:], "attention": layers[:-1]}[part]
            for layer in layers:
                inner = [
                    m for n, m in layer.named_children() if n in ("SelfAttention", "EncDecAttention", "DenseReluDense")
                ]
                hooks.enter_context(inner[0].register_forward_hook(nothing))
        yield


def choices_of(model: nn.Module) -> dict[str, list[int]]:
    """Every entry that a state may have, with its values, the whole first."""
    structure = Structure(model)
    choices = {f"{w.kind}:{w.name}": list(range(w.full, 0, -w.unit)) for w in structure.widths}
    for block in structure.blocks:
        for part in block.skips:
            choices[f"depth:{block.path}" + ("" if part == "block" else f".{part}")] = [1, 0]
    return choices


def random_state(model: nn.Module, seed: int, entries: int = 4) -> dict[str, int]:
    chance = random.Random(seed)
    choices = choices_of(model)
    keys = chance.sample(sorted(choices), min(entries, len(choices)))
    return {key: chance.choice(choices[key][1:]) for key in keys}


def deeper(name: str, blocks: int = 4, **settings: Any) -> Any:
    """A model with more blocks than the tests of other parts need."""
    if name in T5S:
        return build(name, num_layers=max(2, blocks // 2), **settings)
    if name in ("gemma2", "gemma3"):
        return build(name)  # three, of two kinds
    return build(
        name, **{{"gpt2": "n_layer", "distilbert": "n_layers"}.get(name, "num_hidden_layers"): blocks, **settings}
    )


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that pruning must leave alone, or put back."""
    config = copy.deepcopy(model.config.to_dict())
    return {
        "weights": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        "config": config,
        "own": {
            # not what is computed once it is asked for
            name: {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str))}
            for name, module in model.named_modules()
        },
        "classes": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "noted": {k: v.tolist() for k, v in vars(model).get("_peft_elastic_order", {}).items()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "gradients": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """To the bit."""
    assert one["weights"].keys() == other["weights"].keys()
    assert all(torch.equal(tensor, other["weights"][key]) for key, tensor in one["weights"].items())
    for name in one.keys() - {"weights"}:
        assert one[name] == other[name], name


__all__ = [
    "BLOCKS",
    "CLASSIFIERS",
    "blocks_of",
    "calibration_of",
    "choices_of",
    "deeper",
    "loss_by_hand",
    "random_state",
    "same",
    "snapshot",
    "without",
]
