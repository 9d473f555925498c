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
"""A smaller model in its configuration, so that it can be loaded again.

A model whose blocks are alike is an ordinary one with other numbers in its configuration. Otherwise `peft_elastic_blocks` of the
configuration says what each block has of the parts that the other numbers give it: transformers builds the model at full size,
and it is cut to what its configuration says before its weights are loaded (see `rebuild.py`).

Whether a configuration describes a model is tried on the meta device before anything is removed: a model that is built from the
configuration as it is, and cut, must have the tensors and the numbers of one that is built from the configuration to be written.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..layers.narrowed import active_ranges
from ..supernet.space import Choice, choice_key
from .blocks import Structure
from .comparing import difference_of, mismatch
from .configurations import build_whole, candidates, read_again
from .extract import config_of, extract
from .features import layer_at
from .layouts import layouts
from .modules import module_at
from .narrow import is_skipped
from .parts import Block
from .reading import Reading
from .rebuild import BUILD_ERRORS, blueprint, build
from .space import PARTS, activate


@dataclass(frozen=True)
class Extraction:
    """How a transformers model is extracted so that a configuration describes what is left.

    Args:
        path (`str`): of the model in the one that it was asked for.
        reference (`PreTrainedModel`): what is left, without its weights and with the configuration as it was.
        built (`PreTrainedModel`): the same, built from the configuration to be written.
        empty (`tuple[str, ...]`): paths in the model of the stacks whose skipped blocks stay as empty ones.
    """

    path: str
    reference: PreTrainedModel
    built: PreTrainedModel
    empty: tuple[str, ...]


def plan_extraction(model: nn.Module, values: Mapping[str, int] | None = None) -> list[Extraction]:
    """Find a configuration for what would be left of a model. Nothing is changed.

    Args:
        model (`nn.Module`): a whole or narrowed model, with or without adapters.
        values (`Mapping[str, int]`, *optional*): of its structural choices; by default what is active now.

    Returns:
        `list[Extraction]`: one for each transformers model in `model`, or of which it consists, that would change. Other models
            have no configuration, and nobody saves them with one.

    Raises:
        ValueError: if no configuration describes it, so that it could be saved but not loaded.
    """
    values = active_values(model, Structure(model)) if values is None else values
    return [Extraction(path, *_plan(*_read_model(part), own)) for path, part, own in _shares(model, values)]


def undescribable(model: nn.Module, values: Mapping[str, int]) -> dict[str, str]:
    """Which of these removals no configuration describes, so that they could be saved but not loaded.

    Args:
        model (`nn.Module`): as in `plan_extraction`.
        values (`Mapping[str, int]`): of structural choices, each as small as it may become. A model is described block by block,
            so that what holds for all of them together holds for any.

    Returns:
        `dict[str, str]`: the key of the choice -> why.
    """
    structure = Structure(model)
    blocks = {block.depth_key() for block in structure.blocks}
    reasons: dict[str, str] = {}
    # what is skipped has no width, and a block that is skipped no parts
    kinds = [[key for key in values if not key.startswith("depth:")], [key for key in values if key in blocks]]
    kinds.append([key for key in values if key.startswith("depth:") and key not in blocks])
    for keys in kinds:
        asked = {key: values[key] for key in keys}
        together = _with_something_left(model, structure, asked)
        for some in (together, {key: value for key, value in asked.items() if key not in together}):
            some = _with_something_left(model, structure, some)
            if not some or not (of_all := _why_not(model, some)):
                continue
            alone = {key: _why_not(model, {key: value}) for key, value in some.items()}
            reasons |= {key: why for key, why in alone.items() if why} or dict.fromkeys(some, of_all)
    return reasons


def check_describable(model: nn.Module, choices: Sequence[Choice]) -> None:
    """ValueError if a subnet of these choices of width and depth could be saved, but not loaded, as no configuration describes it."""
    smallest = {choice.key: min(choice.options) for choice in choices if len(choice.options) > 1}
    for key, why in undescribable(model, smallest).items():
        kind, _, name = key.partition(":")
        field = "elastic_depth" if kind == "depth" else f"elastic_width[{kind!r}]"
        raise ValueError(f"`{field}`: a subnet with less of {name!r} could not be saved and loaded. {why}")


def _why_not(model: nn.Module, values: Mapping[str, int]) -> str:
    known = tuple(map(id, layouts()))  # what they allow may have changed
    try:
        for _, part, own in _shares(model, values):
            cls, config_cls, text = _read_model(part)
            if reason := _try(cls, config_cls, text, tuple(own.items()), known):  # type: ignore[arg-type]
                return reason
    except ValueError as error:
        return str(error)
    return ""


@functools.lru_cache(maxsize=64)
def _try(cls: type[PreTrainedModel], config_cls: Any, text: str, values: tuple, layouts: tuple[int, ...]) -> str:
    try:
        _plan(cls, config_cls, text, dict(values), any_way=True)
        return ""
    except ValueError as error:
        return str(error)


def _shares(model: nn.Module, values: Mapping[str, int]) -> Iterator[tuple[str, PreTrainedModel, dict[str, int]]]:
    """The transformers models in a model, by their paths, and what is asked for of each, in words of its own."""
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or (inside and path.startswith(inside)):
            continue
        prefix = f"{path}." if path else ""
        inside += (prefix,)
        names = {key: key.partition(":") for key in values}
        own = {
            choice_key(kind, name.removeprefix(prefix)): values[key]
            for key, (kind, _, name) in names.items()
            if name.startswith(prefix)
        }
        if own:
            yield path, module, own


def _with_something_left(model: nn.Module, structure: Reading, values: Mapping[str, int]) -> dict[str, int]:
    """These values, but for what empties a stack."""
    left = dict(values)
    for stack in dict.fromkeys(block.stack for block in structure.blocks):
        blocks = [block for block in structure.blocks if block.stack == stack]
        known = len(blocks) == len(module_at(model, stack)._modules)
        if known and not any(is_left(block, values) for block in blocks):
            left = {k: v for k, v in left.items() if not f"{k}.".startswith(f"{blocks[-1].depth_key()}.")}
    return left


def is_left(block: Block, values: Mapping[str, int]) -> bool:
    """Whether these values of structural choices leave an attention or an MLP of a block."""
    if values.get(block.depth_key(), 1) == 0:
        return False
    return any(part not in block.removed and values.get(block.depth_key(part), 1) for part in PARTS)


def extract_described(model: nn.Module, plans: Sequence[Extraction] | None = None) -> None:
    """Make what is active in a model all there is of it, in place, and let its configuration say so.

    Args:
        model (`nn.Module`): as in `extract`; any transformers models in it get the configuration of what is left.
        plans (`Sequence[Extraction]`, *optional*): what `plan_extraction` gave.

    Raises:
        ValueError: as `extract` and `plan_extraction`. The model is as it was then.
    """
    plans = plan_extraction(model) if plans is None else plans
    empty = [f"{plan.path}.{stack}".lstrip(".") for plan in plans for stack in plan.empty]

    def settle() -> None:
        for plan in plans:
            _settle(model.get_submodule(plan.path), plan)

    extract(model, Structure(model), empty, settle)


def active_values(model: nn.Module, structure: Reading) -> dict[str, int]:
    """The values of the structural choices that a model computes with, of those that are not whole."""
    values = {}
    for width in structure.widths:
        slot = next(iter(width.slots))
        ranges = active_ranges(layer_at(model, slot.path))[slot.side == "in"]
        if ranges is not None:
            active, whole = (sum(b - a for a, b in runs) for runs in (ranges, [(0, n) for _, n in slot.parts]))
            values[width.key] = width.full * active // whole
    for block in structure.blocks:
        for part, paths in block.skips.items():
            if all(is_skipped(module_at(model, path)) for path in paths):
                values[block.depth_key(part)] = 0
    return values


def _read_model(model: PreTrainedModel) -> tuple[type[PreTrainedModel], type[PreTrainedConfig], str]:
    """The class of a model, of its configuration, and the text of that.

    Raises:
        ValueError: if they do not make such a model.
    """
    name = type(model).__name__
    try:
        found = type(model), type(model.config), model.config.to_json_string()
        base = build_whole(*found)  # type: ignore[arg-type]
    except BUILD_ERRORS as error:
        raise ValueError(
            f"A part of a {name} can only be removed if the model can be built from its configuration. That fails here: "
            f"{type(error).__name__}: {error}"
        ) from error
    if difference := mismatch(model, base, blueprint(base)):
        raise ValueError(
            f"The configuration of this {name} does not describe it, so that it could not be loaded: {difference}."
        )
    return found


def _plan(
    cls: type[PreTrainedModel], config_cls: Any, text: str, values: Mapping[str, int], any_way: bool = False
) -> tuple[PreTrainedModel, PreTrainedModel, tuple[str, ...]]:
    """What the configuration of a model builds, cut to these values of its structural choices; what a new configuration builds
    that describes this; and the stacks that have empty blocks in them.

    Args:
        any_way (`bool`): whether any configuration will do. By default it is the most ordinary one.
    """
    base = build_whole(cls, config_cls, text)  # type: ignore[arg-type]
    structure = blueprint(base)
    known = {width.key for width in structure.widths}
    known |= {b.depth_key(p) for b in structure.blocks for p in b.skips}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"The configuration of this {cls.__name__} builds a model without {unknown[0]!r}.")
    stacks = {block.stack for block in structure.blocks if values.get(block.depth_key(), 1) == 0}
    for path in [p for b in structure.blocks for n in PARTS if values.get(b.depth_key(n)) == 0 for p in b.skips[n]]:
        if told := _setters(base.get_submodule(path)):
            raise ValueError(
                f"{path!r} must stay: the model calls `{told[0]}` of it, which nothing else could answer."
            )
    ways = [(empty, False) for empty in ((), tuple(sorted(stacks)))[: 2 if stacks else 1]]
    reason = "the model calls methods of its blocks that empty ones do not have"
    # the last way is the one that goes most often
    for empty, special in [(ways[-1][0], True), *ways] if any_way else ways:
        if empty and any(_setters(base.get_submodule(b.path)) for b in structure.blocks if b.stack in empty):
            continue
        reference = copy.deepcopy(base)
        cut = blueprint(reference)
        activate(reference, cut, values)
        kept = extract(reference, cut, empty)
        for config in candidates(base, reference, kept, special):
            try:
                built = build(cls, read_again(config))
            except BUILD_ERRORS as error:
                reason = f"building it fails ({type(error).__name__}: {error})"
                continue
            difference = difference_of(reference, built, structure)
            if difference is None:
                return reference, built, empty
            reason = difference
    raise ValueError(
        f"No configuration describes what would be left of this {cls.__name__}, so that it could not be loaded: {reason}."
    )


def _setters(module: nn.Module) -> list[str]:
    """Methods by which a model tells a part of it how to compute, as BigBird its attentions for short inputs."""
    return [name for name in dir(type(module)) if name.startswith("set_") and not hasattr(nn.Module, name)]


def _settle(model: nn.Module, plan: Extraction) -> None:
    """Give the configurations in an extracted model what is new in those of the plan.

    Raises:
        ValueError: if the model is another one than was planned.
    """
    if difference := mismatch(model, plan.reference, blueprint(plan.reference)):
        raise ValueError(f"What was extracted is not what was planned: {difference}.")
    before, after = dict(plan.reference.named_modules()), dict(plan.built.named_modules())
    done: set[int] = set()
    for path, module in model.named_modules():
        own = config_of(module)
        if own is None or id(own) in done or path not in before or path not in after:
            continue
        done.add(id(own))
        _update(own, config_of(before[path]), config_of(after[path]))


def _update(own: PreTrainedConfig, before: PreTrainedConfig | None, after: PreTrainedConfig | None) -> None:
    """Let a configuration change as another one did."""
    old, new = ({} if config is None else config.__dict__ for config in (before, after))
    for key in old.keys() | new.keys():
        if isinstance(new.get(key), PreTrainedConfig) and isinstance(own.__dict__.get(key), PreTrainedConfig):
            _update(own.__dict__[key], old.get(key), new[key])
        elif key not in new:
            own.__dict__.pop(key, None)
        elif key not in old or old[key] != new[key]:
            own.__dict__[key] = copy.deepcopy(new[key])
