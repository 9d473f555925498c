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
"""From a configuration to a smaller model: what it says of the blocks, and how a model that was built at full size is cut to it."""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel, initialization

from .blocks import Structure
from .extract import extract
from .narrow import set_skipped, set_width
from .parts import Block
from .reading import Reading
from .removed import Removed
from .tracing.description import CHANNELS_ATTRIBUTE, apply_channels


# By the path of the block: its sizes.
Description = dict[str, dict[str, Any]]

# Where a configuration keeps the description of its blocks.
BLOCKS_ATTRIBUTE = "peft_elastic_blocks"

# Where transformers keeps `per_layer_config`.
LAYERS_ATTRIBUTE = "_heterogeneity_spec"

# What building a model from a configuration that does not fit it may raise.
BUILD_ERRORS = (
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    StrictDataclassError,
)

# Where a model that is being built notes that it is not yet as small as its configuration says.
_WAITING = "_peft_elastic_waiting"


# -- building a smaller model ------------------------------------------------------------------------------------------


def build(cls: type[PreTrainedModel], config: PreTrainedConfig, full: bool = False) -> PreTrainedModel:
    """A model without weights; `full`: without regard to what the configuration says of its blocks."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), _creation():
        model = cls(config)
    if is_described(config) and not full:
        rebuild(model)
    return model


def _creation() -> Any:
    # for models of other packages, which read the values of small tensors while they are built
    return getattr(initialization, "meta_device_safe_creation_ops", contextlib.nullcontext)()


def blueprint(model: nn.Module) -> Reading:
    """What the names of the layers say of a model without weights: its sizes. What is true of it was tried on the model itself."""
    return Reading(model)


def is_described(config: PreTrainedConfig) -> bool:
    """Whether a model has to be brought to the sizes that its configuration says of its blocks."""
    return bool(config.__dict__.get(BLOCKS_ATTRIBUTE)) or bool(config.__dict__.get(CHANNELS_ATTRIBUTE))


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
    if (sizes := model.config.__dict__.get(CHANNELS_ATTRIBUTE)) is not None:
        apply_channels(model, sizes)
    if model.config.__dict__.get(BLOCKS_ATTRIBUTE):
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
    structure = blueprint(model)
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
                allowed = "left out" if width is None else f"a multiple of {width.unit} up to {width.full}"
                raise ValueError(f"The configuration's {kind} of {path!r} must be {allowed}, got {value!r}.")
            set_width(model, width, value)
    extract(model, structure, empty)


def _adopt_tried_skips(structure: Reading, model: nn.Module) -> None:
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


def _as_pattern(name: str) -> str:
    return rf"(^|\.){re.escape(name)}$"


# -- earlier checkpoints ----------------------------------------------------------------------------------------------


def take_layer_sizes(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Take what versions before wrote into `per_layer_config` out of a configuration, as a model cannot be built from it. None if
    there is nothing of that: some architectures are described by a `per_layer_config` of their own."""
    text = text_part(config)
    if text is None or LAYERS_ATTRIBUTE not in text.__dict__ or is_described(config):
        return None
    layers = text.to_dict().get("per_layer_config")
    with contextlib.suppress(*BUILD_ERRORS):
        if layers and LAYERS_ATTRIBUTE in type(text)().__dict__:
            return None
    if layers:
        del text.__dict__[LAYERS_ATTRIBUTE]
        text.__dict__.pop("allow_global_per_layer_attribute_access", None)
    return layers or None


def adopt_layer_sizes(model: PreTrainedModel, layers: Mapping[str, Any]) -> None:
    """Let the configuration of a model say of its blocks what was taken out of `per_layer_config`.

    Raises:
        ValueError: if it describes a layer that is no block of the model.
    """
    blocks: Description = {}
    structure = blueprint(model)
    for number, sizes in layers.items():
        block = next((block for block in structure.blocks if block.index == int(number)), None)
        if block is None:
            raise ValueError(
                f"The configuration describes layer {number}, which is no block of the model that is known."
            )
        blocks[block.path] = dict(sizes)
    setattr(model.config, BLOCKS_ATTRIBUTE, blocks)


def text_part(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The part of a configuration that is about text, the whole one where it has no parts; None if there are several."""
    try:
        return config.get_text_config()
    except ValueError:
        return None


# -- sizes of blocks ---------------------------------------------------------------------------------------------------


def describe_blocks(model: nn.Module, stacks: Collection[str]) -> Description:
    """All sizes of all blocks."""
    described: Description = {}
    structure = blueprint(model)
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


def _at_home(model: nn.Module, structure: Reading, description: Any) -> Description:
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
