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
"""Trying what a layout says of a block, before anyone relies on it.

A layout fits a block by the names of its layers, which do not tell what the block computes with them. So every class of block is
tried once on a small copy with random weights: the module that runs the blocks, with the first few of them, in float32 on the
CPU. The caller's model is only looked at. Must hold:

- heads and MLP channels in another order leave the outputs as they were;
- with fewer of them the outputs are those of the whole model in which the layers that read them ignore the others;
- a skipped part gives what the model goes on with: the outputs are those of a model in which the first tensor of what the part
  returned was exchanged. A part that returns a tuple or a list where the layout says a tensor, or the other way round, is adapted;
- with a key-value cache a skipped part gives what it gives without one.

What fails is not offered; the reason is kept with the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .copies import is_packed, plain_module
from .layouts import Skip
from .modules import module_at
from .parts import Block
from .reading import Reading
from .trial import Failure, Trial, laboratory


@dataclass
class Verdict:
    """What was found out about a class of block.

    Args:
        layout: it was read with; kept, so that its id is not given away.
        problems: "heads" or "mlp" -> why that cannot be narrowed.
        skips: part -> why it cannot be skipped, or, by the path of a module in the block, what it returns then.
    """

    layout: Any
    problems: dict[str, str] = field(default_factory=dict)
    skips: dict[str, str | dict[str, Skip]] = field(default_factory=dict)


# By the class of the module that runs the blocks, and that of the block.
_VERDICTS: dict[Any, Verdict] = {}


def prove(structure: Reading, model: nn.Module) -> None:
    """Leave in a structure that was read by names what is true of the model.

    Args:
        structure: of `model`; what fails goes from its widths and skips to its problems.
        model: is not changed, and may be anywhere, in any state.
    """
    stacks: dict[str, list[Block]] = {}
    for block in structure.blocks:
        stacks.setdefault(block.stack, []).append(block)
    for stack, blocks in stacks.items():
        whole = _whole_key(module_at(model, stack.rpartition(".")[0]))
        # of a first block others read more than its outputs, the length of a cache for instance
        keys = {block.path: (whole, _block_key(model, structure, block), block.index == 0) for block in blocks}
        verdicts = {key: _VERDICTS[key] for key in keys.values() if key in _VERDICTS}
        if not all(key in verdicts for key in keys.values()):
            found, tried = _try_stack(model, structure, blocks, keys)
            verdicts = found | verdicts  # one that is known was found in more natural company
            if tried:  # else it may be another block that fails, or a size, which the keys do not tell
                _VERDICTS.update(verdicts)
        for block in blocks:
            _apply(verdicts[keys[block.path]], structure, block)


def _apply(verdict: Verdict, structure: Reading, block: Block) -> None:
    for kind, why in verdict.problems.items():
        widths = [
            width for width in structure.widths if width.kind == kind and width.name in (block.path, block.stack)
        ]
        if widths:
            structure.widths = [width for width in structure.widths if width not in widths]
            block.problems[kind] = f"{block.path}: {why}"
    for part, found in verdict.skips.items():
        if part not in block.skips:
            continue
        if isinstance(found, str):
            del block.skips[part]
            block.fixed[part] = f"{block.path}: {found}"
        else:
            block.skips[part] = {f"{block.path}.{path}" if path else block.path: skip for path, skip in found.items()}


# -- what makes a class of block -----------------------------------------------------------------------------------------


def _flags(module: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (name, value)
        for name, value in sorted(module.__dict__.items())
        if isinstance(value, (bool, str))
        and not name.startswith(("_", "training"))
        and not name.endswith("checkpointing")
    )


def _print(module: nn.Module) -> tuple[Any, ...]:
    """What a module is but for its sizes."""
    module, cls = plain_module(module)
    if is_packed(module):
        return (nn.Linear, (), ("bias",) if module._parameters.get("bias") is not None else ())
    children = tuple((name, _print(child)) for name, child in module._modules.items() if child is not None)
    parameters = tuple((name, p.dim()) for name, p in module._parameters.items() if p is not None and name != "weight")
    absent = (module.stands_for,) if hasattr(module, "stands_for") else ()
    return (cls, _flags(module), parameters, children, absent)


def _whole_key(holder: nn.Module) -> tuple[Any, ...]:
    holder, cls = plain_module(holder)
    config = getattr(holder, "config", None)
    settings = config.__dict__.items() if isinstance(config, PreTrainedConfig) else ()
    flags = (
        (name, value)
        for name, value in sorted(settings)
        if isinstance(value, bool) and not name.startswith(("_", "use_cache", "output_", "return_", "tie_"))
    )
    return (cls, _flags(holder), tuple(flags))


def _block_key(model: nn.Module, structure: Reading, block: Block) -> tuple[Any, ...]:
    widths = [width for width in structure.widths if width.name in (block.path, block.stack)]
    groups = tuple((width.kind, width.units == 1, width.units == width.full) for width in widths)
    parts = (tuple(block.skips), tuple(sorted(block.problems)), tuple(sorted(block.removed)))
    return (_print(module_at(model, block.path)), id(block.layout), groups, parts)


def _try_stack(
    model: nn.Module, structure: Reading, blocks: list[Block], keys: Mapping[str, Any]
) -> tuple[dict[Any, Verdict], bool]:
    """Verdicts for every class of block of a stack, and whether it could be tried."""
    verdicts = {keys[block.path]: Verdict(block.layout) for block in blocks}
    with laboratory():
        try:
            trial = Trial(model, structure, blocks, keys)
        except Exception as error:  # noqa: BLE001 - of a model that is not made of what we know how to copy
            failure = (
                error if isinstance(error, Failure) else f"it could not be tried ({type(error).__name__}: {error})"
            )
            misread = dict.fromkeys(why for block in blocks for why in block.problems.values())
            text = "; ".join([str(failure), *list(misread)[:1]])
            for block in blocks:
                verdict = verdicts[keys[block.path]]
                verdict.problems = dict.fromkeys(("heads", "mlp"), text)
                verdict.skips = dict.fromkeys(block.skips, text)
            return verdicts, False
        for kind in ("heads", "mlp"):
            reasons = {key[:-1]: trial.why_not_narrowed(key[:-1], kind) for key in verdicts}
            for key, verdict in verdicts.items():
                if (why := reasons[key[:-1]]) is not None:
                    verdict.problems[kind] = why
        for key, found in trial.skips().items():
            verdicts[key].skips = found
    return verdicts, True
