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

A model whose blocks are alike is an ordinary one with other numbers in its configuration. Otherwise the blocks that differ are
described in the words of transformers' `per_layer_config` (https://huggingface.co/docs/transformers: `intermediate_size`,
`num_attention_heads`, `num_key_value_heads`, `skip`), which transformers keeps but does not yet build by: `apply_description`
does that to a model that was made from such a configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .blocks import Block, Removed, Structure, layer_sizes
from .extract import extract
from .modules import linear_layers
from .narrow import set_skipped, set_width


# By the path of the block: its sizes.
Description = dict[str, dict[str, Any]]

# Where a configuration keeps the description of blocks that `per_layer_config` cannot hold: those of encoder-decoder models, and
# sizes that transformers' own validation of a layer rejects.
BLOCKS_ATTRIBUTE = "peft_elastic_blocks"

# Where transformers keeps `per_layer_config`.
_LAYERS = "_heterogeneity_spec"

# What a configuration may call the number of blocks of a stack whose path has this word, the first that fits.
_COUNTS = {
    "decoder": ("num_decoder_layers", "decoder_layers"),
    "encoder": ("num_encoder_layers", "encoder_layers", "num_layers"),
    "": ("num_hidden_layers",),
}


def describe(model: PreTrainedModel, kept: Mapping[str, list[int]]) -> bool:
    """Make the configuration of an extracted model fit it.

    Args:
        model (`PreTrainedModel`): an extracted model.
        kept (`Mapping[str, list[int]]`): what `extract` returned, the old numbers of the blocks that are left in each stack.

    Returns:
        `bool`: whether transformers alone builds the model from its configuration. Otherwise `apply_description` has to follow.

    Raises:
        ValueError: if no configuration describes the model; its configuration is unchanged then.
    """
    structure = Structure(model)
    config = copy.deepcopy(model.config)
    for part in (config, config.get_text_config()):
        part.__dict__.pop(_LAYERS, None)
        part.__dict__.pop(BLOCKS_ATTRIBUTE, None)
    for stack, numbers in kept.items():
        _drop_layers(config, stack, numbers)
    uniform = _with_uniform_sizes(config, structure)
    is_ordinary = _difference(model, uniform) is None
    if is_ordinary:
        config = uniform
    else:
        described = _describe_blocks(structure, config)
        plain = copy.deepcopy(config)
        difference: str | None = ""
        if _as_per_layer_config(config, structure, described):
            difference = _difference(model, config)
        if difference is not None:  # or transformers does not accept the numbers of some layer
            config = plain
            setattr(config, BLOCKS_ATTRIBUTE, described)
            difference = _difference(model, config)
        if difference is not None:
            raise ValueError(
                f"No configuration describes the model that was extracted, so it could not be loaded: {difference}."
            )
    for module in model.modules():
        own = getattr(module, "config", None)
        if isinstance(own, PreTrainedConfig) and own is not model.config:
            for stack, numbers in kept.items():
                _drop_layers(own, stack, numbers)
    # the modules of the model share this object
    model.config.__dict__.clear()
    model.config.__dict__.update(config.__dict__)
    return is_ordinary


def is_described(config: PreTrainedConfig) -> bool:
    """Whether a model has to be brought to the sizes of its configuration by `apply_description`."""
    return bool(getattr(config, BLOCKS_ATTRIBUTE, None)) or bool(_per_layer_config(config))


def apply_description(model: nn.Module, config: PreTrainedConfig) -> None:
    """Give the blocks of a model that was built at full size the sizes that its configuration says.

    Raises:
        ValueError: if they do not fit the model.
    """
    structure = Structure(model)
    described = _read_per_layer_config(config, structure)
    described |= _at_home(model, structure, getattr(config, BLOCKS_ATTRIBUTE, None) or {})
    by_path = {block.path: block for block in structure.blocks}
    widths = {(width.kind, width.name): width for width in structure.widths}
    for path, sizes in described.items():
        block = by_path.get(path)
        if block is None:
            raise ValueError(f"The configuration describes {path!r}, which is no block of the model.")
        for part in sizes.get("skip", ()):
            if part not in block.skips and part not in block.removed:
                raise ValueError(f"The configuration says to skip {part!r} of {path!r}, which cannot be skipped.")
            if part in block.skips:
                set_skipped(model, block, part, True)
        for kind, value in _sizes_of(sizes, block).items():
            width = widths.get((kind, path)) or widths.get((kind, block.stack))
            if width is None or type(value) is not int or not 0 < value <= width.full or value % width.unit:
                allowed = "nothing" if width is None else f"multiples of {width.unit} up to {width.full}"
                raise ValueError(f"The configuration gives {path!r} {value!r} {kind}; allowed are {allowed}.")
            set_width(model, width, value)
    extract(model, structure)


def take_layer_sizes(config: PreTrainedConfig) -> Any:
    """Take what `per_layer_config` says out of a configuration, as code that builds a model cannot read it yet; None if it says
    nothing. `put_layer_sizes_back` undoes it."""
    return config.get_text_config().__dict__.pop(_LAYERS, None)


def put_layer_sizes_back(config: PreTrainedConfig, sizes: Any) -> None:
    """Undo `take_layer_sizes`, and let other code read from the whole configuration what differs between layers."""
    if sizes is not None:
        text = config.get_text_config()
        text.__dict__[_LAYERS] = sizes
        text.allow_global_per_layer_attribute_access = True


# -- sizes of blocks -------------------------------------------------------------------------------------------------


def _describe_blocks(structure: Structure, config: Any) -> Description:
    """All sizes of all blocks."""
    described: Description = {}
    heads = {width.name: width for width in structure.widths if width.kind == "heads"}
    channels = {width.name: width for width in structure.widths if width.kind == "mlp"}
    has_kv_heads = _has(config.get_text_config(), "num_key_value_heads")
    for block in structure.blocks:
        sizes: dict[str, Any] = {}
        width = heads.get(block.path) or heads.get(block.stack)
        if width is not None and "attention" not in block.removed:
            sizes["num_attention_heads"] = width.full
            if has_kv_heads:
                sizes["num_key_value_heads"] = width.units
        if block.path in channels:
            assert block.layout.mlp is not None
            sizes[block.layout.mlp.size] = channels[block.path].full
        if block.removed:
            sizes["skip"] = sorted(block.removed)
        described[block.path] = sizes
    return described


def _sizes_of(sizes: Mapping[str, Any], block: Block) -> dict[str, Any]:
    """By the kind of width, of the parts that are there."""
    names = {"heads": ("attention", "num_attention_heads")}
    if block.layout.mlp is not None:
        names["mlp"] = ("mlp", block.layout.mlp.size)
    skip = {*sizes.get("skip", ()), *block.removed}
    return {kind: sizes[name] for kind, (part, name) in names.items() if name in sizes and part not in skip}


# -- configurations --------------------------------------------------------------------------------------------------


def _has(config: Any, name: str) -> bool:
    check = getattr(config, "_hasattr_without_heterogeneous_validation", None)
    return check(name) if check is not None else hasattr(config, name)


def _drop_layers(config: PreTrainedConfig, stack: str, numbers: list[int]) -> None:
    """Fewer blocks, and lists of one entry for each of them cut along."""
    names = [name for word, names in _COUNTS.items() if word in stack.split(".") or not word for name in names]
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        name = next((name for name in names if _has(part, name)), None)
        if name is None:
            continue
        old = getattr(part, name)
        for key, value in list(part.__dict__.items()):
            if isinstance(value, list) and len(value) == old:
                part.__dict__[key] = [value[number] for number in numbers]
        setattr(part, name, len(numbers))


def _with_uniform_sizes(config: PreTrainedConfig, structure: Structure) -> PreTrainedConfig:
    """The configuration of an ordinary model with the sizes of the first block of each kind."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for width in reversed(structure.widths):
        if width.kind == "mlp":
            layout = next(block.layout for block in structure.blocks if block.path == width.name)
            assert layout.mlp is not None
            setattr(text, layout.mlp.size, width.full)
            continue
        if text.num_attention_heads != width.full:
            if getattr(text, "head_dim", None) is None:
                text.head_dim = width.attentions[0].head_dim
            text.num_attention_heads = width.full
        if _has(text, "num_key_value_heads"):
            text.num_key_value_heads = width.units
    return config


def _as_per_layer_config(config: PreTrainedConfig, structure: Structure, described: Description) -> bool:
    """Write the sizes of the blocks into `per_layer_config`, if its numbers of layers mean the blocks of this model."""
    text = config.get_text_config()
    stacks = {block.stack for block in structure.blocks}
    if len(stacks) != 1 or structure.unknown or len(structure.blocks) != text.num_hidden_layers:
        return False
    if not all(_has(text, name) for sizes in described.values() for name in sizes if name != "skip"):
        return False
    text.per_layer_config = {block.index: dict(described[block.path]) for block in structure.blocks}
    put_layer_sizes_back(config, take_layer_sizes(config))
    return True


def _per_layer_config(config: PreTrainedConfig) -> dict[str, Any]:
    return config.get_text_config().to_dict().get("per_layer_config") or {}


def _read_per_layer_config(config: PreTrainedConfig, structure: Structure) -> Description:
    layers = _per_layer_config(config)
    described: Description = {}
    for number, sizes in layers.items():
        block = next((block for block in structure.blocks if block.index == int(number)), None)
        if block is None:
            raise ValueError(
                f"The configuration describes layer {number}, which is no block of the model that is known."
            )
        described[block.path] = dict(sizes)
    return described


def _at_home(model: nn.Module, structure: Structure, description: Description) -> Description:
    """The description with the paths of a model that is the base of the one that was saved, or has it inside."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    paths = {block.path for block in structure.blocks}
    moved = {}
    for path, sizes in description.items():
        candidates = (path, path.removeprefix(prefix), prefix + path)
        moved[next((candidate for candidate in candidates if candidate in paths), path)] = sizes
    return moved


def _difference(model: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    """How a model built from this configuration differs from `model`, None if it does not."""
    try:
        own = copy.deepcopy(config)
        if callable(validate := getattr(own, "validate", None)):
            validate()  # as saving and loading do
        sizes = take_layer_sizes(own)
        with torch.device("meta"):
            built = type(model)(own)
        put_layer_sizes_back(own, sizes)
        if is_described(config):
            apply_description(built, own)
    except (ValueError, TypeError, RuntimeError, AttributeError, StrictDataclassError) as error:
        return f"building it fails ({error})"
    (expected, numbers), (found, own_numbers) = _fingerprint(built), _fingerprint(model)
    # not what only one of them has: a kind of position embeddings, say, that none of the blocks uses any more
    both = numbers.keys() & own_numbers.keys()
    expected |= {name: numbers[name] for name in numbers if name in both}
    found |= {name: own_numbers[name] for name in own_numbers if name in both}
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            return f"{name} would be {expected.get(name)}, and is {found.get(name)}"
    return None


def _fingerprint(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of the parameters, and the numbers that the modules keep about themselves. Of linear layers their sizes alone, as
    these may be quantised."""
    prints: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    linears = linear_layers(model)
    for path, module in model.named_modules():
        if path in linears:
            prints[path] = (*layer_sizes(module), module._parameters.get("bias") is not None)
        in_linear = path in linears or path.rpartition(".")[0] in linears
        if (
            in_linear or isinstance(module, Removed) or not path
        ):  # whose numbers are those of what was there, or of its use
            continue
        for name, value in module.__dict__.items():
            if not name.startswith("_") and name != "training" and isinstance(value, (bool, int, float, str)):
                numbers[f"{path}.{name}"] = value
        for name, tensor in module.named_parameters(path, recurse=False):
            prints[name] = tuple(tensor.shape)
    return prints, numbers
