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
"""Every architecture of transformers that small numbers build: what is offered of it is right, the rest is refused by name.

Run as a program it writes one line for each: `python tests/structure/test_architectures.py [type ...]`.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import transformers
from support.architectures import filled, model_classes, run, tiny
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_elastic.structure import Structure, sort_by_importance
from peft_elastic.structure.extract import extract
from peft_elastic.structure.space import activate


pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 2e-3


class Fault(Exception):
    pass


def same(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    if found.shape != expected.shape:
        raise Fault(f"{what}: {tuple(found.shape)} in place of {tuple(expected.shape)}")
    off = (found - expected).abs().max().item()
    if not off <= TOLERANCE * max(1e-2, expected.abs().max().item()):
        raise Fault(f"{what}: differs by {off:.3g}")


@contextmanager
def without(model: nn.Module, structure: Structure, values: Mapping[str, int]) -> Iterator[None]:
    """The reference: the whole model, in which what reads removed units has zeros there, and blocks hand on what they get."""
    saved = []
    with ExitStack() as hooks:
        for width in structure.widths:
            kept = values.get(f"{width.kind}:{width.name}", width.full)
            for slot in width.slots:
                if slot.side == "in" and kept < width.full:
                    layer = model.get_submodule(slot.path)
                    weight = layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
                    saved.append((weight, weight.clone()))
                    weight[:, weight.shape[1] * kept // width.full :] = 0
        for block in structure.blocks:
            if not values.get(f"depth:{block.path}", 1):
                hooks.enter_context(
                    model.get_submodule(block.path).register_forward_hook(_handed_on, with_kwargs=True)
                )
        try:
            yield
        finally:
            for weight, before in saved:
                weight.copy_(before)


def _handed_on(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    states = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
    return states if isinstance(output, torch.Tensor) else type(output)([states, *output[1:]])


def subnets(structure: Structure) -> Iterator[tuple[str, dict[str, int]]]:
    """What is tried of a structure: each kind of width, and of each stack each part, in one block and in several."""
    for kind in ("heads", "mlp"):
        widths = [width for width in structure.widths if width.kind == kind and width.units > 1]
        if widths:
            yield kind, {f"{kind}:{width.name}": max(1, width.units // 2) * width.unit for width in widths}
    for stack in dict.fromkeys(block.stack for block in structure.blocks):
        for part in ("block", "attention", "mlp"):
            ending = "" if part == "block" else f".{part}"
            blocks = [block for block in structure.blocks if block.stack == stack and part in block.skips]
            keys = [f"depth:{block.path}{ending}" for block in blocks]
            for group in dict.fromkeys((tuple(keys[:1]), tuple(keys[-1:]), tuple(keys[: len(structure.blocks) - 1]))):
                if not group:
                    continue
                yield f"skip {part}", dict.fromkeys(group, 0)


def check(model: Any, inputs: dict[str, torch.Tensor]) -> Counter[str]:
    """What of a model is offered; a `Fault` if something of that is wrong."""
    structure = Structure(model)
    base = run(model, inputs)
    found: Counter[str] = Counter()
    orders = {order.name: width.units for width in structure.widths for order in width.orders}
    if orders:
        random = torch.Generator().manual_seed(5)
        scores = {name: torch.rand(units, generator=random) for name, units in orders.items()}
        moved = copy.deepcopy(model)
        sort_by_importance(moved, scores, progress=False)
        same(run(moved, inputs), base, "sorted")
        found["sorted"] += 1
    alone = {name: value[:1] for name, value in inputs.items()}
    cached = _is_decoder(model, inputs)
    is_free = run(model, alone).shape == base[:1].shape  # of the other sequences, unlike the similarities of CLIP
    for name, values in subnets(structure):
        with without(model, structure, values):
            expected = run(model, inputs)
        activate(model, structure, values)
        try:
            output = run(model, inputs)
            if name in ("heads", "mlp", "skip block"):
                same(output, expected, f"{name} {values}")
            if output.shape != base.shape:
                raise Fault(f"{name} {values}: {tuple(output.shape)} in place of {tuple(base.shape)}")
            if is_free:
                same(run(model, alone), output[:1], f"{name} {values}, one sequence alone")
            if cached:
                same(_in_two_parts(model, inputs), output, f"{name} {values}, with a cache")
        finally:
            activate(model, structure, {})
        found[name] += 1
    same(run(model, inputs), base, "whole again")
    if found:
        everything: dict[str, int] = {}
        lonely = {b.stack for b in structure.blocks} - {b.stack for b in structure.blocks if b.index > 0}
        # parts, and last blocks: what a configuration says of the others by their numbers is no matter of `extract`
        removable = {f"depth:{b.path}.{part}" for b in structure.blocks for part in b.skips}
        for b in structure.blocks:
            if b.index and b.index == len(model.get_submodule(b.stack)) - 1:
                removable.add(f"depth:{b.path}")
        for name, values in subnets(structure):
            first = next(iter(values))
            if name in ("heads", "mlp"):
                everything |= values
            elif first in removable and not any(f"{stack}." in first for stack in lonely):
                everything[first] = 0
        activate(model, structure, everything)
        output = run(model, inputs)
        activate(model, structure, {})
        smaller = copy.deepcopy(model)
        activate(smaller, own := Structure(smaller), everything)
        extract(smaller, own)
        same(run(smaller, inputs), output, f"extracted {everything}")
        found["extracted"] += 1
    return found


def _is_decoder(model: Any, inputs: dict[str, torch.Tensor]) -> bool:
    if list(inputs) != ["input_ids"] or not model.can_generate():
        return False
    try:
        same(_in_two_parts(model, inputs), run(model, inputs), "cache")
    except Exception:  # noqa: BLE001 - then it has none of the ordinary kind
        return False
    return True


def _in_two_parts(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = inputs["input_ids"]
    with torch.no_grad():
        first = model(input_ids=ids[:, :5], use_cache=True)
        cache = first.get("cache", first.get("past_key_values"))
        name = "cache" if "cache" in first else "past_key_values"
        second = model(input_ids=ids[:, 5:], use_cache=True, **{name: cache})
    return torch.cat([first.logits, second.logits], 1)


def outcome(model_type: str, classes: list[type]) -> dict[str, Any]:
    """What happened with one architecture."""
    made = tiny(model_type, classes)
    if isinstance(made, str):
        return {"type": model_type, "not built": made}
    model, inputs = made
    row: dict[str, Any] = {"type": model_type, "class": type(model).__name__}
    for seed in range(2):
        # a choice between experts may hang on the last digit; then it does not with other weights
        if seed:
            filled(model, seed)
        try:
            row["offered"] = dict(check(model, inputs))
            row.pop("wrong", None)
            break
        except Exception as error:  # noqa: BLE001 - a crash is as wrong as a wrong number
            row["wrong"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    try:
        structure = Structure(model)
    except Exception:  # noqa: BLE001 - `check` has met it too, and `wrong` says what it is
        return row
    row["blocks"] = len(structure.blocks)
    row["unknown"] = len(structure.unknown)
    row["refused"] = sorted(
        {
            f"{kind}: {why}"
            for block in structure.blocks[:1] + structure.blocks[-1:]
            for kind, why in block.problems.items()
        }
        | {f"skip {part}: {why}" for block in structure.blocks for part, why in block.fixed.items()}
    )[:6]
    return row


def test_all_architectures():
    transformers.logging.set_verbosity_error()
    rows = [outcome(*entry) for entry in model_classes().items()]
    built = [row for row in rows if "not built" not in row]
    assert len(built) >= 300
    assert [row for row in built if "wrong" in row] == []
    # and it is much that is offered
    offered = Counter(name for row in built for name in row["offered"])
    assert (
        min(offered[name] for name in ("heads", "mlp", "skip block", "skip attention", "skip mlp", "extracted")) >= 100
    )


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for model_type, classes in model_classes().items():
        if sys.argv[1:] and model_type not in sys.argv[1:]:
            continue
        start = time.process_time()
        print(
            json.dumps(outcome(model_type, classes) | {"seconds": round(time.process_time() - start, 1)}), flush=True
        )
