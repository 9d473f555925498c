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
"""The choices of width and depth of a model, and the layers that they change."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..common.checks import is_whole, wrong
from ..common.names import has_suffix
from ..supernet.space import Choice, LayerShape, choice_key
from .features import layer_at, layer_sizes
from .modules import linear_layers
from .narrow import check_narrowable, check_skippable, set_skipped, set_width
from .parts import KINDS, Block, Width
from .reading import Reading


PARTS = ("attention", "mlp")
# Fractions of MLP channels are rounded to this many, where the whole number is a multiple of it.
_CHANNELS = 8

Options = Sequence[int | float]


def checked_width(elastic_width: Any, kinds: Sequence[str] = KINDS) -> dict[str, Any] | None:
    """`elastic_width` of a configuration as it is kept: options from large to small, each once.

    Args:
        elastic_width: what a user gave.
        kinds: of widths that there are.

    Raises:
        ValueError: unless it is None or a dict from "heads", "mlp" to a list of fractions in (0, 1] or whole numbers, or to a dict
            of such lists by the path of a block.
    """
    if elastic_width is None:
        return None
    if not isinstance(elastic_width, Mapping) or not elastic_width or set(elastic_width) - set(kinds):
        raise wrong("elastic_width", f"a dict with the keys {list(kinds)} or one of them", elastic_width)
    checked: dict[str, Any] = {}
    for kind, options in elastic_width.items():
        if not isinstance(options, Mapping):
            checked[kind] = _checked_options(f"elastic_width[{kind!r}]", options)
            continue
        if not options or not all(isinstance(path, str) and path for path in options):
            raise wrong(f"elastic_width[{kind!r}]", "a list, or a dict from the path of a block to one", options)
        checked[kind] = {
            path: _checked_options(f"elastic_width[{kind!r}][{path!r}]", values) for path, values in options.items()
        }
    return checked


def checked_depth(elastic_depth: Any) -> list[int | str] | None:
    """`elastic_depth` of a configuration as it is kept, a list.

    Raises:
        ValueError: unless it is None, a number or a name of blocks, or some of them.
    """
    if elastic_depth is None:
        return None
    entries = list(elastic_depth) if isinstance(elastic_depth, (list, tuple, range)) else [elastic_depth]
    if not entries:
        raise wrong("elastic_depth", "at least one block, or None for a fixed depth", elastic_depth)
    if any(not is_whole(entry) and (not isinstance(entry, str) or not entry) for entry in entries):
        raise wrong(
            "elastic_depth",
            "'all', numbers of blocks, '4-8' or paths of blocks, each with '.attention' or '.mlp' behind it or not",
            elastic_depth,
        )
    return entries


def _checked_options(name: str, options: Any) -> list[int | float]:
    numbers = isinstance(options, (list, tuple)) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) for value in options
    )
    if not numbers or not options:
        raise wrong(name, "a list of fractions or whole numbers", options)
    whole = all(isinstance(value, int) for value in options)
    if not all(value > 0 and (whole or value <= 1) for value in options):  # NaN is neither
        raise wrong(name, "whole numbers from 1" if whole else "fractions above 0, at most 1", list(options))
    return sorted(set(options), reverse=True)


def structural_choices(
    structure: Reading,
    elastic_width: Mapping[str, Options | Mapping[str, Options]] | None,
    elastic_depth: Sequence[int | str] | None,
) -> list[Choice]:
    """The choices that a configuration asks for: kinds "heads", "mlp" and "depth", named after blocks and their parts.

    Raises:
        ValueError: if the model has no such blocks, or does not allow such a width.
    """
    choices = []
    for kind, options in (elastic_width or {}).items():
        widths = [width for width in structure.widths if width.kind == kind]
        # blocks of another kind may stand between those with a width, but not one that could not be read
        if not widths or any(kind in block.problems for block in structure.blocks):
            raise ValueError(f"`elastic_width[{kind!r}]`: {_why_not(structure, kind)}")
        for width, values in _options_of_widths(kind, widths, options):
            numbers = sorted({_value_of(width, option, values) for option in values}, reverse=True)
            modules = tuple(dict.fromkeys(slot.path for slot in width.slots))
            choices.append(Choice(kind, width.name, tuple(numbers), modules))
    skippable = {key: part for entry in elastic_depth or () for key, part in _read_depth(structure, entry).items()}
    for block in structure.blocks:
        for name in (block.path, *(f"{block.path}.{part}" for part in PARTS)):
            if name in skippable:
                choices.append(Choice("depth", name, (1, 0), (block.path,)))
    return choices


def check_narrowable_layers(model: nn.Module, structure: Reading, choices: Sequence[Choice]) -> None:
    """ValueError if a layer that a choice narrows cannot be."""

    for choice in choices:
        if choice.kind in ("heads", "mlp"):
            for slot in structure.width(choice.key).slots:
                check_narrowable(layer_at(model, slot.path), slot.path)


def layer_shapes(
    model: nn.Module, structure: Reading, choices: Sequence[Choice], rank_keys: Mapping[str, str]
) -> list[LayerShape]:
    """The layers that these choices change.

    Args:
        model: the base model, with or without adapters.
        structure: of `model`.
        choices: what `structural_choices` returned.
        rank_keys: path of a layer with an adapter -> key of the choice of its rank.
    """
    narrowed: dict[str, tuple[Choice, Width, str]] = {}
    for choice in choices:
        if choice.kind != "depth":
            width = structure.width(choice.key)
            narrowed.update({slot.path: (choice, width, slot.side) for slot in width.slots})
    depth = {choice.name for choice in choices if choice.kind == "depth"}
    shapes = []
    for block in structure.blocks:
        shapes += _shapes_of_block(model, block, narrowed, depth, rank_keys)
    return [shape for shape in shapes if shape.choices != (shape.rank,) and shape.choices]


def check_depth(structure: Reading, values: Mapping[str, int]) -> None:
    """ValueError if a stack would be left without blocks."""
    for stack in {block.stack for block in structure.blocks}:
        names = [block.path for block in structure.blocks if block.stack == stack]
        others = any(path.rpartition(".")[0] == stack for path in structure.unknown)
        if not others and not any(values.get(choice_key("depth", name), 1) for name in names):
            raise ValueError(
                f"The subnet skips every block of {stack!r}; one has to stay. Leave one out of `elastic_depth`, as 'all' does."
            )


def activate(model: nn.Module, structure: Reading, values: Mapping[str, int]) -> list[str]:
    """Let a model compute with these values of its structural choices, and with everything of what they do not name.

    Returns:
        `list[str]`: paths of the layers that have another width than before.

    Raises:
        ValueError: `check_skippable`; nothing is changed then.
    """
    # this runs in every training step, and steps differ in a part of the choices
    before = structure.active
    changed = {key for key in before.keys() | values.keys() if before.get(key) != values.get(key)}
    check_skippable(model, structure.blocks, {key: values.get(key, 1) for key in changed})
    structure.active = dict.fromkeys([*before, *values], -1)  # nobody knows, if it is interrupted
    paths = []
    for width in structure.widths:
        if (key := width.key) in changed:
            set_width(model, width, values.get(key, width.full))
            paths += [slot.path for slot in width.slots]
    for block in structure.blocks:
        for part in block.skips:
            if (key := block.depth_key(part)) in changed:
                set_skipped(model, block, part, not values.get(key, 1))
    structure.active = dict(values)
    return paths


def _shapes_of_block(
    model: nn.Module,
    block: Block,
    narrowed: Mapping[str, tuple[Choice, Width, str]],
    depth: set[str],
    rank_keys: Mapping[str, str],
) -> list[LayerShape]:
    module = model.get_submodule(block.path)
    linears = linear_layers(module)
    shapes = []
    counted: set[int] = set()

    def depth_keys(path: str) -> tuple[str, ...]:
        names = [block.path] if block.path in depth else []
        for part in PARTS:
            inside = any(f"{path}.".startswith(f"{skipped}.") for skipped in block.skips.get(part, {}))
            if f"{block.path}.{part}" in depth and inside:
                names.append(f"{block.path}.{part}")
        return tuple(choice_key("depth", name) for name in names)

    for name, layer in linears.items():
        path = f"{block.path}.{name}"
        out_features, in_features = layer_sizes(layer)
        choice, width, side = narrowed.get(path, (None, None, "out"))
        shapes.append(
            LayerShape(
                path,
                out_features,
                in_features,
                bias=layer._parameters.get("bias") is not None,
                width=None if choice is None else choice.key,
                full_width=1 if width is None else width.full,
                narrows=side,
                rank=rank_keys.get(path),
                depth=depth_keys(path),
            )
        )
        counted.update(id(parameter) for parameter in layer.parameters())
    for name, parameter in module.named_parameters():
        owner = f"{block.path}.{name}".rpartition(".")[0]
        if id(parameter) in counted or ".lora_" in name:
            continue
        choice, width, _ = narrowed.get(owner, (None, None, "out"))
        shapes.append(
            LayerShape(
                f"{block.path}.{name}",
                parameter.numel(),
                0,
                bias=True,
                width=None if choice is None else choice.key,
                full_width=1 if width is None else width.full,
                depth=depth_keys(owner),
            )
        )
    return shapes


def _options_of_widths(
    kind: str, widths: Sequence[Width], options: Options | Mapping[str, Options]
) -> list[tuple[Width, Options]]:
    """What is open to each width: the same to all of them, or what is said of their blocks; the others are fixed."""
    if not isinstance(options, Mapping):
        return [(width, options) for width in widths]
    found: dict[str, Options] = {}
    for path, values in options.items():
        named = _named(path, [width.name for width in widths])
        if len(named) != 1:
            what = "is no block" if not named else f"is any of {named[:3]}"
            raise ValueError(
                f"`elastic_width[{kind!r}]` has {path!r}, which {what} of the model with elastic {kind}; there are "
                f"{_shown([width.name for width in widths])}."
            )
        if named[0] in found:
            raise ValueError(f"`elastic_width[{kind!r}]` has {named[0]!r} twice, also as {path!r}.")
        found[named[0]] = values
    return [(width, found[width.name]) for width in widths if width.name in found]


def _named(path: str, names: Sequence[str]) -> list[str]:
    """Those of the names that a path means: the one that it is, or else all that end in it."""
    return [path] if path in names else [name for name in names if has_suffix(name, path)]


def _value_of(width: Width, option: int | float, options: Sequence[int | float]) -> int:
    if all(isinstance(value, int) for value in options):
        if option > width.full or option % width.unit:
            raise ValueError(
                f"`elastic_width[{width.kind!r}]` has {option}, but {width.name!r} has {width.full} "
                f"{'heads' if width.kind == 'heads' else 'channels'}"
                + (f", which move in groups of {width.unit}." if width.unit > 1 else ".")
            )
        return int(option)
    if width.kind == "mlp" and width.full % _CHANNELS == 0:
        return max(_CHANNELS, round(option * width.full / _CHANNELS) * _CHANNELS)
    return max(1, round(option * width.units)) * width.unit


def _read_depth(structure: Reading, entry: int | str) -> dict[str, str]:
    """Name of what may be skipped -> its part, for an entry of `elastic_depth`."""
    text, part = str(entry), "block"
    for ending in PARTS:
        if text.endswith(f".{ending}"):
            text, part = text.removesuffix(f".{ending}"), ending
    stacks = {block.stack for block in structure.blocks}
    number = re.fullmatch(r"(-?\d+)(?:-(\d+))?", text)
    if text == "all":
        # one block of a stack has to stay
        blocks = [block for block in structure.blocks if part in block.skips and (block.index > 0 or part != "block")]
    elif number:
        if len(stacks) != 1:
            raise ValueError(
                f"`elastic_depth` has {entry!r}, and the model has several stacks of blocks: give paths, {_paths(structure)}."
            )
        count = max(block.index for block in structure.blocks) + 1
        first, last = int(number[1]), int(number[2] or number[1])
        if not 0 <= first <= last < count:
            raise ValueError(f"`elastic_depth` has {entry!r}; the blocks are 0 to {count - 1}.")
        blocks = [block for block in structure.blocks if first <= block.index <= last]
    else:
        meant = _named(text, [block.path for block in structure.blocks])
        blocks = [block for block in structure.blocks if block.path in meant]
        if len(blocks) != 1:
            raise ValueError(
                f"`elastic_depth` has {entry!r}, which is no block of the model; the blocks are {_paths(structure)}."
            )
    if not blocks:
        reasons = [block.fixed[part] for block in structure.blocks if part in block.fixed]
        raise ValueError(
            f"`elastic_depth` has {entry!r}: {f'{reasons[0]}.' if reasons else _why_not(structure, part)}"
        )
    for block in blocks:
        if part not in block.skips:
            why = block.fixed.get(part)
            if why is None and block.layout.first_is_fixed:
                why = "it makes something for the blocks behind it"
            raise ValueError(
                f"`elastic_depth` has {entry!r}, but {block.path!r} cannot be skipped in that way"
                + ("." if why is None else f": {why}.")
            )
    return {block.path if part == "block" else f"{block.path}.{part}": part for block in blocks}


def _paths(structure: Reading) -> str:
    return _shown([block.path for block in structure.blocks])


def _shown(paths: Sequence[str]) -> str:
    return ", ".join(map(repr, paths[:3])) + (f", ... {paths[-1]!r}" if len(paths) > 3 else "")


def _why_not(structure: Reading, what: str) -> str:
    problem = next((block.problems[what] for block in structure.blocks if what in block.problems), None)
    if problem is not None:
        return f"{problem}."
    where = f" (for example {structure.unknown[0]!r})" if structure.unknown else ""
    return (
        f"no block of the model{where} has a known layout with that. Describe its architecture with "
        "`peft_elastic.structure.register_layout`."
    )
