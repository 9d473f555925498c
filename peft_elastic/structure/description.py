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
and it is cut to what its configuration says before its weights are loaded (see `rebuild`).

Whether a configuration describes a model is tried on the meta device before anything is removed: a model that is built from the
configuration as it is, and cut, must have the tensors and the numbers of one that is built from the configuration to be written.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel, initialization

from ..layers.narrowed import active_ranges
from .blocks import Block, Removed, Structure, Width, layer_at, layer_sizes
from .extract import config_of, extract
from .layouts import BlockLayout, layouts
from .modules import linear_layers, module_at
from .narrow import is_skipped, set_skipped, set_width
from .space import PARTS, activate


# By the path of the block: its sizes.
Description = dict[str, dict[str, Any]]

# Where a configuration keeps the description of its blocks.
BLOCKS_ATTRIBUTE = "peft_elastic_blocks"

# Where transformers keeps `per_layer_config`.
_LAYERS = "_heterogeneity_spec"

# What building a model from a configuration that does not fit it may raise.
_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, ArithmeticError, StrictDataclassError)

# Where a model that is being built notes that it is not yet as small as its configuration says.
_WAITING = "_peft_elastic_waiting"

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

_SIMPLE = (bool, int, float, str, type(None))


# -- before anything is removed ----------------------------------------------------------------------------------------


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
    blocks = {f"depth:{block.path}" for block in structure.blocks}
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
            f"{kind}:{name.removeprefix(prefix)}": values[key]
            for key, (kind, _, name) in names.items()
            if name.startswith(prefix)
        }
        if own:
            yield path, module, own


def _with_something_left(model: nn.Module, structure: Structure, values: Mapping[str, int]) -> dict[str, int]:
    """These values, but for what empties a stack."""
    left = dict(values)
    for stack in dict.fromkeys(block.stack for block in structure.blocks):
        blocks = [block for block in structure.blocks if block.stack == stack]
        known = len(blocks) == len(module_at(model, stack)._modules)
        if known and not any(is_left(block, values) for block in blocks):
            left = {k: v for k, v in left.items() if not f"{k}.".startswith(f"depth:{blocks[-1].path}.")}
    return left


def is_left(block: Block, values: Mapping[str, int]) -> bool:
    """Whether these values of structural choices leave an attention or an MLP of a block."""
    if values.get(f"depth:{block.path}", 1) == 0:
        return False
    return any(part not in block.removed and values.get(f"depth:{block.path}.{part}", 1) for part in PARTS)


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


def active_values(model: nn.Module, structure: Structure) -> dict[str, int]:
    """The values of the structural choices that a model computes with, of those that are not whole."""
    values = {}
    for width in structure.widths:
        slot = next(iter(width.slots))
        ranges = active_ranges(layer_at(model, slot.path))[slot.side == "in"]
        if ranges is not None:
            active, whole = (sum(b - a for a, b in runs) for runs in (ranges, [(0, n) for _, n in slot.parts]))
            values[f"{width.kind}:{width.name}"] = width.full * active // whole
    for block in structure.blocks:
        for part, paths in block.skips.items():
            if all(is_skipped(module_at(model, path)) for path in paths):
                values[f"depth:{block.path}" + ("" if part == "block" else f".{part}")] = 0
    return values


def _read_model(model: PreTrainedModel) -> tuple[type[PreTrainedModel], type[PreTrainedConfig], str]:
    """The class of a model, of its configuration, and the text of that.

    Raises:
        ValueError: if they do not make such a model.
    """
    name = type(model).__name__
    try:
        found = type(model), type(model.config), model.config.to_json_string()
        base = _whole(*found)  # type: ignore[arg-type]
    except _ERRORS as error:
        raise ValueError(
            f"A part of a {name} can only be removed if the model can be built from its configuration. That fails here: "
            f"{type(error).__name__}: {error}"
        ) from error
    if difference := _mismatch(model, base, _blueprint(base)):
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
    base = _whole(cls, config_cls, text)  # type: ignore[arg-type]
    structure = _blueprint(base)
    known = {f"{width.kind}:{width.name}" for width in structure.widths}
    known |= {f"depth:{b.path}" + ("" if p == "block" else f".{p}") for b in structure.blocks for p in b.skips}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f"The configuration of this {cls.__name__} builds a model without {unknown[0]!r}.")
    stacks = {block.stack for block in structure.blocks if values.get(f"depth:{block.path}", 1) == 0}
    for path in [
        p for b in structure.blocks for n in PARTS if values.get(f"depth:{b.path}.{n}") == 0 for p in b.skips[n]
    ]:
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
        cut = _blueprint(reference)
        activate(reference, cut, values)
        kept = extract(reference, cut, empty)
        for config in _candidates(base, reference, kept, special):
            try:
                built = _build(cls, _read_again(config))
            except _ERRORS as error:
                reason = f"building it fails ({type(error).__name__}: {error})"
                continue
            difference = _difference(reference, built, structure)
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
    if difference := _mismatch(model, plan.reference, _blueprint(plan.reference)):
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


# -- building a smaller model ------------------------------------------------------------------------------------------


def is_described(config: PreTrainedConfig) -> bool:
    """Whether a model has to be brought to the sizes that its configuration says of its blocks."""
    return bool(config.__dict__.get(BLOCKS_ATTRIBUTE))


def rebuild(model: PreTrainedModel) -> None:
    """Bring a model that was built at full size, on the meta device, to the sizes that its configuration says of its blocks, and
    let it expect a checkpoint of that size.

    Raises:
        ValueError: if they do not fit the model.
    """
    for module in model.modules():
        if module.__dict__.pop(_WAITING, None) is not None:
            hooks = module._state_dict_pre_hooks.items()
            module._state_dict_pre_hooks = OrderedDict((key, hook) for key, hook in hooks if hook is not _before_state)
    if is_described(model.config):
        apply_description(model, model.config)
        absent = {
            f"{path}.{part.absent}"
            for path, part in model.named_modules()
            if isinstance(part, Removed) and part.absent
        }
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*ignored, *map(_as_pattern, absent)}


def apply_description(model: nn.Module, config: PreTrainedConfig) -> None:
    """Give the blocks of a model that was built at full size the sizes that its configuration says.

    Raises:
        ValueError: if they do not fit the model.
    """
    structure = _blueprint(model)
    by_path = {block.path: block for block in structure.blocks}
    widths = {(width.kind, width.name): width for width in structure.widths}
    _adopt_tried_skips(structure, model)
    empty = set()
    for path, sizes in _at_home(model, structure, config.__dict__.get(BLOCKS_ATTRIBUTE)).items():
        block = by_path.get(path)
        parts = sizes.get("skip", []) if isinstance(sizes, dict) else None
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise ValueError(f"The configuration describes {path!r} wrongly: {sizes!r:.200}.")
        if block is None:
            if parts == ["block"] and any(isinstance(m, Removed) and p == path for p, m in model.named_modules()):
                continue  # done before
            raise ValueError(f"The configuration describes {path!r}, which is no block of the model.")
        for part in parts:
            if part not in block.skips and part not in block.removed:
                raise ValueError(f"The configuration says to skip {part!r} of {path!r}, which cannot be skipped.")
            if part in block.skips:
                set_skipped(model, block, part, True)
            if part == "block":
                empty.add(block.stack)
        for kind, value in _sizes_of(sizes, block).items():
            width = widths.get((kind, path)) or widths.get((kind, block.stack))
            if width is None or type(value) is not int or not 0 < value <= width.full or value % width.unit:
                allowed = "nothing" if width is None else f"multiples of {width.unit} up to {width.full}"
                raise ValueError(f"The configuration gives {path!r} {value!r} {kind}; allowed are {allowed}.")
            set_width(model, width, value)
    extract(model, structure, empty)


def _adopt_tried_skips(structure: Structure, model: nn.Module) -> None:
    """Let what is skipped return what was found out that the model goes on with."""
    tried = {block.path: block.skips for block in Structure(model).blocks}
    for block in structure.blocks:
        block.skips |= tried.get(block.path, {})


def _before_state(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """transformers asks a model for its tensors before it loads them. One that has weights is left as it is."""
    # some make a few parameters in ways that ignore the device
    if isinstance(model, PreTrainedModel) and any(parameter.is_meta for parameter in model.parameters()):
        rebuild(model)


def _watch(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    """Notice models that are built from a configuration that describes their blocks."""
    config = module.__dict__.get("config")
    if config is None or _WAITING in module.__dict__ or not isinstance(module, PreTrainedModel):
        return
    if isinstance(config, PreTrainedConfig) and is_described(config):
        module.__dict__[_WAITING] = module.register_state_dict_pre_hook(_before_state)


register_module_module_registration_hook(_watch)


# -- earlier checkpoints ----------------------------------------------------------------------------------------------


def take_layer_sizes(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Take what versions before wrote into `per_layer_config` out of a configuration, as a model cannot be built from it. None if
    there is nothing of that: some architectures are described by a `per_layer_config` of their own."""
    text = _text(config)
    if text is None or _LAYERS not in text.__dict__ or is_described(config):
        return None
    layers = text.to_dict().get("per_layer_config")
    with contextlib.suppress(*_ERRORS):
        if layers and _LAYERS in type(text)().__dict__:
            return None
    if layers:
        del text.__dict__[_LAYERS]
        text.__dict__.pop("allow_global_per_layer_attribute_access", None)
    return layers or None


def adopt_layer_sizes(model: PreTrainedModel, layers: Mapping[str, Any]) -> None:
    """Let the configuration of a model say of its blocks what was taken out of `per_layer_config`.

    Raises:
        ValueError: if it describes a layer that is no block of the model.
    """
    blocks: Description = {}
    structure = _blueprint(model)
    for number, sizes in layers.items():
        block = next((block for block in structure.blocks if block.index == int(number)), None)
        if block is None:
            raise ValueError(
                f"The configuration describes layer {number}, which is no block of the model that is known."
            )
        blocks[block.path] = dict(sizes)
    setattr(model.config, BLOCKS_ATTRIBUTE, blocks)


# -- sizes of blocks ---------------------------------------------------------------------------------------------------


def _describe_blocks(model: nn.Module, stacks: Collection[str]) -> Description:
    """All sizes of all blocks."""
    described: Description = {}
    structure = _blueprint(model)
    heads = {width.name: width for width in structure.widths if width.kind == "heads"}
    channels = {width.name: width for width in structure.widths if width.kind == "mlp"}
    for block in structure.blocks:
        sizes: dict[str, Any] = {}
        width = heads.get(block.path) or heads.get(block.stack)
        if width is not None and "attention" not in block.removed:
            sizes["num_attention_heads"] = width.full
            if width.units != width.full:
                sizes["num_key_value_heads"] = width.units
        if block.path in channels:
            assert block.layout.mlp is not None
            sizes[block.layout.mlp.size] = channels[block.path].full
        if block.removed:
            sizes["skip"] = sorted(block.removed)
        described[block.path] = sizes
    for path, module in model.named_modules():
        if isinstance(module, Removed) and path.rpartition(".")[0] in stacks:
            described[path] = {"skip": ["block"]}
    return described


def _sizes_of(sizes: Mapping[str, Any], block: Block) -> dict[str, Any]:
    """By the kind of width, of the parts that are there."""
    names = {"heads": ("attention", "num_attention_heads")}
    if block.layout.mlp is not None:
        names["mlp"] = ("mlp", block.layout.mlp.size)
    skip = {*sizes.get("skip", ()), *block.removed}
    return {
        kind: sizes[name]
        for kind, (part, name) in names.items()
        if name in sizes and part not in skip and "block" not in skip
    }


def _at_home(model: nn.Module, structure: Structure, description: Any) -> Description:
    """The description with the paths of a model that is the base of the one that was saved, or has it inside."""
    if not isinstance(description, dict):
        raise ValueError(f"The configuration must describe blocks by their paths, got {description!r:.200}.")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    paths = {block.path for block in structure.blocks}
    moved = {}
    for path, sizes in description.items():
        candidates = (path, path.removeprefix(prefix), prefix + path)
        moved[next((candidate for candidate in candidates if candidate in paths), path)] = sizes
    return moved


# -- configurations ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)  # an adapter, its search and its extraction ask for the same one
def _whole(cls: type[PreTrainedModel], config_cls: type[PreTrainedConfig], text: str) -> PreTrainedModel:
    """What the JSON text of a configuration builds, without weights. It must not be changed."""
    return _build(cls, _read(config_cls, text))


def _read_again(config: PreTrainedConfig) -> PreTrainedConfig:
    """A configuration as it is when it has been saved and loaded."""
    return _read(type(config), config.to_json_string())


def _read(cls: Any, text: str) -> PreTrainedConfig:
    values = getattr(cls, "_decode_special_floats", lambda v: v)(json.loads(text))
    values.pop("quantization_config", None)
    own = cls.from_dict(values)
    if callable(validate := getattr(own, "validate", None)):
        validate()  # as saving and loading do
    return own


def _build(cls: type[PreTrainedModel], config: PreTrainedConfig, full: bool = False) -> PreTrainedModel:
    """A model without weights; `full`: without regard to what the configuration says of its blocks."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), _creation():
        model = cls(config)
    if is_described(config) and not full:
        rebuild(model)
    return model


def _blueprint(model: nn.Module) -> Structure:
    """What the names of the layers say of a model without weights: its sizes. What is true of it was tried on the model itself."""
    return Structure.by_names(model, {})


def _creation() -> Any:
    # for models of other packages, which read the values of small tensors while they are built
    return getattr(initialization, "meta_device_safe_creation_ops", contextlib.nullcontext)()


def _candidates(
    base: PreTrainedModel, reference: PreTrainedModel, kept: Mapping[str, list[int]], special: bool
) -> Iterator[PreTrainedConfig]:
    """Configurations that may describe `reference`, which was made from `base`; those that transformers alone builds come first,
    or are left out if `special`."""
    plain = copy.deepcopy(reference.config)
    plain.__dict__.pop(BLOCKS_ATTRIBUTE, None)
    places = _Places(base)
    stacks = {block.stack for block in _blueprint(base).blocks}
    for config in places.without_blocks(plain, kept, reference) if kept else [plain]:
        removed = any(isinstance(module, Removed) for module in reference.modules())
        if not removed and not special and (uniform := places.with_uniform_sizes(config, reference)) is not None:
            yield uniform
        setattr(config, BLOCKS_ATTRIBUTE, _describe_blocks(reference, stacks))
        yield config


class _Places:
    """Where the configuration of a model says how many blocks its stacks have. A composite model has several configurations, one
    in the other, and what they call it differs: it is found by building the model with a block less.

    Args:
        base: the model on the meta device, which has all of its blocks.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self._structure = _blueprint(base)
        self._found: dict[str, tuple[tuple[str, ...], str] | None] = {}

    def without_blocks(
        self, config: PreTrainedConfig, kept: Mapping[str, list[int]], reference: PreTrainedModel
    ) -> list[PreTrainedConfig]:
        """With fewer blocks, and lists of one entry for each of them cut along; nothing if nobody knows how. Blocks of other parts
        than the text model stay: their hidden states are chosen by numbers."""
        found = {stack: self._find(stack) for stack in kept}
        texts = [path for path, part in _parts(config) if part is _text(config)]
        if any(place is None or place[0] not in texts for place in found.values()):
            return []
        configs: list[PreTrainedConfig] = []
        for renumber in (False, True):
            fewer, different = copy.deepcopy(config), not renumber
            try:
                for stack, (path, name) in found.items():  # type: ignore[misc]
                    different |= _drop_blocks(_part_at(fewer, path), name, kept[stack], renumber)
            except _ERRORS:  # the configuration checks what is written to it
                continue
            configs += [fewer] if different and fewer not in configs else []
        if len(configs) > 1:
            # numbers of blocks that building a model does not ask for are of its forward pass, or of something else
            configs = [fewer for fewer in configs if self._fits(fewer, reference)]
        return configs if len(configs) == 1 else []

    def _fits(self, config: PreTrainedConfig, reference: PreTrainedModel) -> bool:
        described = copy.deepcopy(config)
        setattr(described, BLOCKS_ATTRIBUTE, _describe_blocks(reference, self._lengths(self._base)))
        try:
            return _difference(reference, _build(type(self._base), _read_again(described)), self._structure) is None
        except _ERRORS:
            return False

    def with_uniform_sizes(self, config: PreTrainedConfig, reference: PreTrainedModel) -> PreTrainedConfig | None:
        """With the sizes of the blocks of each stack that are not what they were; None if the blocks of a stack differ."""
        config = copy.deepcopy(config)
        before, structure = _widths_by_stack(self._structure), _blueprint(reference)
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
            except _ERRORS:  # the configuration checks what is written to it
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
                    built = _build(type(self._base), _read_again(fewer), full=True)
                    if self._lengths(built) == lengths | {stack: count - 1}:
                        return path, name
                except _ERRORS:  # it means something else, and does not fit the rest
                    continue
        return None

    def _lengths(self, model: nn.Module) -> dict[str, int]:
        stacks = {block.stack for block in self._structure.blocks}
        return {stack: len(model.get_submodule(stack)) for stack in stacks}  # type: ignore[arg-type]


def _widths_by_stack(structure: Structure) -> dict[tuple[str, str], list[Width]]:
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


def _text(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The part of a configuration that is about text, the whole one where it has no parts; None if there are several."""
    try:
        return config.get_text_config()
    except ValueError:
        return None


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
    layers = part.to_dict().get("per_layer_config") if part.__dict__.pop(_LAYERS, None) is not None else None
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


# -- comparing models --------------------------------------------------------------------------------------------------


def _mismatch(model: nn.Module, base: nn.Module, structure: Structure) -> str | None:
    """How the blocks of a model, with all their features, differ from those of one that its configuration builds. There may be
    adapters on it, and layers that are quantised."""
    for stack in dict.fromkeys(block.stack for block in structure.blocks):
        there, wanted = (len(owner.get_submodule(stack)._modules) for owner in (model, base))
        if there != wanted:
            return f"{stack} would have {wanted} blocks, and has {there}"
    inside = tuple(f"{block.path}." for block in structure.blocks)
    found = {name: layer_sizes(layer) for name, layer in linear_layers(model).items()}
    for name, layer in linear_layers(base).items():
        if name.startswith(inside) and found.get(name, layer_sizes(layer)) != layer_sizes(layer):
            return f"{name} would be {layer_sizes(layer)}, and is {found[name]}"
    shapes = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
    }
    linears = linear_layers(base)
    for name, parameter in base.named_parameters():
        of_linear = name.rpartition(".")[0] in linears
        if name.startswith(inside) and not of_linear and shapes.get(name, parameter.shape) != parameter.shape:
            return f"{name} would be {tuple(parameter.shape)}, and is {shapes[name]}"
    return None


def _difference(reference: nn.Module, built: nn.Module, structure: Structure) -> str | None:
    """How a model built from a new configuration differs from what was made of one of full size: in its tensors, or in the numbers
    that its modules keep about themselves. Neither has been used, and a number of theirs is not that of some input."""
    wanted, found = ({k: tuple(t.shape) for k, t in m.state_dict().items()} for m in (reference, built))
    for name in [*wanted, *found]:
        if wanted.get(name) != found.get(name):
            return f"{name} would be {found.get(name)}, and is {wanted.get(name)}"
    inside = tuple(f"{stack}." for stack in {block.stack for block in structure.blocks})
    expected, numbers = _numbers(reference), _numbers(built)
    for path in [*expected, *(path for path in numbers if path not in expected)]:
        ours, theirs = expected.get(path), numbers.get(path)
        in_block = path.startswith(inside)
        if ours is None or theirs is None:
            if in_block:
                return f"there {'would be' if ours is None else 'is'} a module {path}"
            continue
        # what only one of them has outside of the blocks is of a kind of position embeddings, say, that no block uses any more
        for name in ours.keys() | theirs.keys() if in_block else ours.keys() & theirs.keys():
            if ours.get(name) != theirs.get(name):
                return f"{path}.{name} would be {theirs.get(name)!r}, and is {ours.get(name)!r}"
    return None


def _numbers(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By the path of each module: its numbers, and shapes of the tensors that are not saved."""
    prints: dict[str, dict[str, Any]] = {}
    linears = linear_layers(model)
    for path, module in model.named_modules():
        if isinstance(module, Removed):
            prints[path] = {"removed": module.stands_for}
            continue
        numbers: dict[str, Any] = {}
        lists = isinstance(module, PreTrainedModel)
        # those of a layer are its shape; those of a Dropout, a depth of 0.1 say, are of training alone
        for name, value in {} if path in linears else module.__dict__.items():
            if name.startswith("_") or name == "training" or "drop" in name or isinstance(module, nn.Dropout):
                continue
            if isinstance(value, _SIMPLE) or (lists and _is_plain(value)):
                numbers[name] = value
        for name, buffer in module._buffers.items():
            numbers[f"{name}, shape"] = None if buffer is None else tuple(buffer.shape)
        prints[path] = numbers
    return prints


def _is_plain(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(entry, _SIMPLE) for entry in value)


def _as_pattern(name: str) -> str:
    return rf"(^|\.){re.escape(name)}$"
