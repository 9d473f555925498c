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
"""The configurations that may describe a smaller model: where they say how many blocks there are, and how large they are."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .comparing import difference_of
from .layouts import BlockLayout
from .parts import Width
from .reading import Reading
from .rebuild import BLOCKS_ATTRIBUTE, BUILD_ERRORS, LAYERS_ATTRIBUTE, blueprint, build, describe_blocks, text_part
from .removed import Removed


# Words in the names of lists that have nothing to do with blocks, however many entries they have.
_OTHER_LISTS = (
    "token",
    "size",
    "stride",
    "kernel",
    "dim",
    "mean",
    "std",
    "shape",
    "label",
    "language",
    "architectures",
)


@functools.lru_cache(maxsize=4)  # an adapter, its search and its extraction ask for the same one
def build_whole(cls: type[PreTrainedModel], config_cls: type[PreTrainedConfig], text: str) -> PreTrainedModel:
    """What the JSON text of a configuration builds, without weights. It must not be changed."""
    return build(cls, _read(config_cls, text))


def read_again(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration as it is when it has been saved and loaded."""
    return _read(type(config), config.to_json_string())


def _read(cls: Any, text: str) -> PreTrainedConfig:
    values = getattr(cls, "_decode_special_floats", lambda v: v)(json.loads(text))
    values.pop("quantization_config", None)
    own = cls.from_dict(values)
    if callable(validate := getattr(own, "validate", None)):
        validate()  # as saving and loading do
    return own


def candidates(
    base: PreTrainedModel, reference: PreTrainedModel, kept: Mapping[str, list[int]], special: bool
) -> Iterator[PreTrainedConfig]:
    """Configurations that may describe `reference`, which was made from `base`; those that transformers alone builds come first,
    or are left out if `special`."""
    plain = copy.deepcopy(reference.config)
    plain.__dict__.pop(BLOCKS_ATTRIBUTE, None)
    places = _Places(base)
    stacks = {block.stack for block in blueprint(base).blocks}
    for config in places.without_blocks(plain, kept, reference) if kept else [plain]:
        removed = any(isinstance(module, Removed) for module in reference.modules())
        if not removed and not special and (uniform := places.with_uniform_sizes(config, reference)) is not None:
            yield uniform
        setattr(config, BLOCKS_ATTRIBUTE, describe_blocks(reference, stacks))
        yield config


class _Places:
    """Where the configuration of a model says how many blocks its stacks have. A composite model has several configurations, one
    in the other, and what they call it differs: it is found by building the model with a block less.

    Args:
        base: the model on the meta device, which has all of its blocks.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._structure = blueprint(base)
        self._found: dict[str, tuple[tuple[str, ...], str] | None] = {}

    def without_blocks(
        self, config: PreTrainedConfig, kept: Mapping[str, list[int]], reference: PreTrainedModel
    ) -> list[PreTrainedConfig]:
        """With fewer blocks, and lists of one entry for each of them cut along; nothing if nobody knows how. Blocks of other parts
        than the text model stay: their hidden states are chosen by numbers."""
        found = {stack: self._find(stack) for stack in kept}
        texts = [path for path, part in _parts(config) if part is text_part(config)]
        if any(place is None or place[0] not in texts for place in found.values()):
            return []
        configs: list[PreTrainedConfig] = []
        for renumber in (False, True):
            fewer, different = copy.deepcopy(config), not renumber
            try:
                for stack, (path, name) in found.items():  # type: ignore[misc]
                    different |= _drop_blocks(_part_at(fewer, path), name, kept[stack], renumber)
            except BUILD_ERRORS:  # the configuration checks what is written to it
                continue
            configs += [fewer] if different and fewer not in configs else []
        if len(configs) > 1:
            # numbers of blocks that building a model does not ask for are of its forward pass, or of something else
            configs = [fewer for fewer in configs if self._fits(fewer, reference)]
        return configs if len(configs) == 1 else []

    def _fits(self, config: PreTrainedConfig, reference: PreTrainedModel) -> bool:
        described = copy.deepcopy(config)
        setattr(described, BLOCKS_ATTRIBUTE, describe_blocks(reference, self._lengths(self._base)))
        try:
            return difference_of(reference, build(type(self._base), read_again(described)), self._structure) is None
        except BUILD_ERRORS:
            return False

    def with_uniform_sizes(self, config: PreTrainedConfig, reference: PreTrainedModel) -> PreTrainedConfig | None:
        """With the sizes of the blocks of each stack that are not what they were; None if the blocks of a stack differ."""
        config = copy.deepcopy(config)
        before, structure = _widths_by_stack(self._structure), blueprint(reference)
        layouts_of = {block.path: block.layout for block in structure.blocks}
        for (kind, stack), widths in _widths_by_stack(structure).items():
            sizes = {(width.full, width.units) for width in widths}
            if sizes == {(width.full, width.units) for width in before[kind, stack]}:
                continue
            if len(sizes) > 1:
                return None
            found = self._find(stack) if len(list(_parts(config))) > 1 else ((), "")
            if found is None:
                return None
            try:
                self._set_size(_part_at(config, found[0]), widths[0], layouts_of)
            except BUILD_ERRORS:  # the configuration checks what is written to it
                return None
        return config

    def _set_size(self, part: Any, width: Width, layouts_of: Mapping[str, BlockLayout]) -> None:
        if width.kind == "mlp":
            layout = layouts_of[width.name].mlp
            assert layout is not None
            setattr(part, layout.size, width.full)
            return
        if _get(part, "num_attention_heads") != width.full:
            if _get(part, "head_dim") is None:
                part.head_dim = width.attentions[0].head_dim
            part.num_attention_heads = width.full
        if _get(part, "num_key_value_heads") is not None:
            part.num_key_value_heads = width.units

    def _find(self, stack: str) -> tuple[tuple[str, ...], str] | None:
        """Path of the configuration with the number of blocks of a stack, and its name there."""
        if stack not in self._found:
            self._found[stack] = self._search(stack)
        return self._found[stack]

    def _search(self, stack: str) -> tuple[tuple[str, ...], str] | None:
        plain = copy.deepcopy(self._base.config)
        plain.__dict__.pop(BLOCKS_ATTRIBUTE, None)
        lengths = self._lengths(self._base)
        count = lengths[stack]
        for path, part in _parts(plain):
            names = [name for name, value in part.__dict__.items() if type(value) is int and value == count]
            for name in sorted(names, key=lambda name: not any(word in name for word in ("layer", "block", "depth"))):
                fewer = copy.deepcopy(plain)
                try:
                    _drop_blocks(_part_at(fewer, path), name, list(range(count - 1)), False)
                    built = build(type(self._base), read_again(fewer), full=True)
                    if self._lengths(built) == lengths | {stack: count - 1}:
                        return path, name
                except BUILD_ERRORS:  # it means something else, and does not fit the rest
                    continue
        return None

    def _lengths(self, model: nn.Module) -> dict[str, int]:
        stacks = {block.stack for block in self._structure.blocks}
        return {stack: len(model.get_submodule(stack)) for stack in stacks}  # type: ignore[arg-type]


def _widths_by_stack(structure: Reading) -> dict[tuple[str, str], list[Width]]:
    stacks = {block.path: block.stack for block in structure.blocks}
    found: dict[tuple[str, str], list[Width]] = {}
    for width in structure.widths:
        found.setdefault((width.kind, stacks.get(width.name, width.name)), []).append(width)
    return found


def _parts(config: PreTrainedConfig) -> Iterator[tuple[tuple[str, ...], PreTrainedConfig]]:
    """A configuration and those in it, by their paths."""
    yield (), config
    for name, value in config.__dict__.items():
        if isinstance(value, PreTrainedConfig):
            for path, part in _parts(value):
                yield (name, *path), part


def _part_at(config: PreTrainedConfig, path: Sequence[str]) -> PreTrainedConfig:
    for name in path:
        config = config.__dict__[name]
    return config


def _get(config: Any, name: str) -> Any:
    """An attribute, whether or not it differs between layers; None if there is none."""
    get = getattr(config, "_getattr_without_heterogeneous_validation", None)
    return getattr(config, name, None) if get is None else get(name, None)


def _drop_blocks(part: Any, name: str, numbers: list[int], renumber: bool) -> bool:
    """Leave these of the blocks that the attribute `name` of a configuration counts, and cut along lists of one entry for each.

    Args:
        renumber: whether lists of numbers of blocks are changed as well.

    Returns:
        whether there are any of these.
    """
    old, places = part.__dict__[name], {before: now for now, before in enumerate(numbers)}
    layers = part.to_dict().get("per_layer_config") if part.__dict__.pop(LAYERS_ATTRIBUTE, None) is not None else None
    _drop_stages(part, old, numbers)
    found = False
    for key, value in list(part.__dict__.items()):
        if not isinstance(value, (list, tuple)) or any(
            word in key for word in (*_OTHER_LISTS, "stage_names", "_out_")
        ):
            continue
        whole = [type(entry) is int and 0 <= entry < old for entry in value]
        if value and all(whole) and (len(value) != old or sorted(set(value)) == list(value)):
            found = True
            if renumber:
                part.__dict__[key] = type(value)(places[entry] for entry in value if entry in places)
        elif len(value) == old:
            part.__dict__[key] = type(value)(value[number] for number in numbers)
    setattr(part, name, len(numbers))
    if layers:
        left = {places[int(number)]: sizes for number, sizes in layers.items() if int(number) in places}
        part.per_layer_config = left
    return found


def _drop_stages(part: PreTrainedConfig, old: int, numbers: list[int]) -> None:
    """Of a backbone, whose features are what comes out of its blocks, by names."""
    names, chosen = part.__dict__.get("stage_names"), part.__dict__.get("_out_indices")
    if not names or len(names) != old + 1:
        return
    part.__dict__["stage_names"] = names = list(names[: len(numbers) + 1])
    if chosen is not None:
        # a block that is not there any more gives what the one before it does
        left = [sum(number < place % (old + 1) for number in numbers) for place in chosen]
        part.__dict__["_out_indices"], part.__dict__["_out_features"] = left, [names[place] for place in left]
