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
"""Making a narrowed model physically smaller: plain layers of the active size, and nothing of what is skipped."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora.layer import Linear, LoraLayer
from torch import nn
from transformers import PreTrainedConfig

from ..layers.backends import backend_of, find_backend
from ..layers.backends.float import cut_parameter
from ..layers.grid import Grid
from ..layers.narrowed import active_ranges
from .importance import note_orders, note_scores
from .inputs import is_encoder_decoder
from .modules import linear_layers, replace_layers
from .narrow import is_skipped, set_active
from .parts import Block
from .reading import Reading
from .removed import Removed, empty_block


# What the module that holds a stack may call the number of its blocks.
_COUNTS = ("n_layers", "num_layers", "num_hidden_layers")

# Where a module keeps what is registered in it.
_REGISTERS = ("_modules", "_parameters", "_buffers")


def extract(
    model: nn.Module,
    structure: Reading,
    empty: Collection[str] = (),
    finish: Callable[[], object] = lambda: None,
) -> dict[str, list[int]]:
    """Make what is active in a model all there is of it, in place. Adapters around the layers are cut along.

    Skipped blocks leave their list (some of an encoder may stay without any parameters), and the layers of the key-value cache
    are numbered again. A skipped attention or MLP becomes a module without parameters. Packed layers, those of bitsandbytes,
    become ordinary ones, as their blocks of numbers cannot be cut, and no checkpoint holds both. The configuration is left alone but for that.

    Args:
        model (`nn.Module`): the base model, in which `set_width` and `set_skipped` chose the active part.
        structure (`Reading`): of `model`; it does not fit it any more afterwards.
        empty (`Collection[str]`): paths of the stacks in which skipped blocks stay, without any parameters, so that the others
            keep their numbers.
        finish (`Callable`): called at the end. What it raises leaves the model as it was, too.

    Returns:
        `dict[str, list[int]]`: path of each stack that lost blocks -> the old numbers of those that are left.

    Raises:
        ValueError: if nothing would be left of a stack. This, or anything else that goes wrong, leaves the model as it was.
    """
    stacks: dict[str, list[Block]] = {}
    for block in structure.blocks:
        stacks.setdefault(block.stack, []).append(block)
    for stack in stacks:
        within = [f"{path}." for path, module in model.named_modules() if is_skipped(module)]
        layers = [f"{stack}.{name}." for name in linear_layers(model.get_submodule(stack))]
        if all(layer.startswith(tuple(within)) for layer in layers):
            raise ValueError(f"Every block of {stack!r} is skipped; at least one attention or MLP must stay.")
    with unchanged_on_error(model) as undo:
        room = _keep_room_for_cache(model, stacks)
        for block in structure.blocks:
            for part in ("attention", "mlp"):
                for path, skip in block.skips.get(part, {}).items():
                    module = model.get_submodule(path)
                    if is_skipped(module):
                        model.set_submodule(path, Removed(module, skip, module.__dict__["cache_layers"]))
            module = model.get_submodule(block.path)
            if is_skipped(module) and (block.stack in empty or block.path in room):
                empty_block(module, block.skips["block"][block.path], module.__dict__["cache_layers"])
        for module in list(model.modules()):
            if isinstance(module, LoraLayer):
                _cut_adapters(module, undo)
        replacements = []
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        for layer in list(model.modules()):
            backend = find_backend(layer)
            ordinary = None if backend is None else backend.ordinary(layer, dtype)
            if ordinary is not None:
                replacements.append((layer, ordinary))
            elif active_ranges(layer) != (None, None):
                _cut(layer, undo)
        if replacements:
            replace_layers(model, replacements)
            _leave_quantizer(model, [new for _, new in replacements])
        kept = {stack: _remove_blocks(model, stack, blocks) for stack, blocks in stacks.items()}
        note_orders(model, {})  # what is left of the units has no order of the whole
        note_scores(model, {})  # and other names
        finish()
    return {stack: numbers for stack, numbers in kept.items() if numbers}


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[list[Callable[[], None]]]:
    """Put back the modules, plain attributes and configurations of a model if something goes wrong inside. What puts back the
    values of tensors that change, in their place, is to be added to the list that this gives."""
    modules = [
        (module, module.__class__, dict(module.__dict__), [dict(module.__dict__[name]) for name in _REGISTERS])
        for module in model.modules()
    ]
    configs = {id(own): own for module in model.modules() if (own := config_of(module)) is not None}
    settings = [(config, dict(config.__dict__)) for config in configs.values()]
    undo: list[Callable[[], None]] = []
    try:
        yield undo
    except BaseException:
        for module, cls, attributes, registers in modules:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, entries in zip(_REGISTERS, registers):
                module.__dict__[name].clear()
                module.__dict__[name].update(entries)
        for config, values in settings:
            config.__dict__.clear()
            config.__dict__.update(values)
        for put_back in reversed(undo):
            put_back()
        raise


def config_of(module: nn.Module) -> PreTrainedConfig | None:
    """The configuration that a module holds, if any."""
    own = module.__dict__.get("config")
    return own if isinstance(own, PreTrainedConfig) else None


def _keep_room_for_cache(model: nn.Module, stacks: dict[str, list[Block]]) -> list[str]:
    """Which skipped blocks of an encoder stay, as empty ones, while it would have fewer than the decoder: transformers makes the
    key-value cache of T5 with as many layers as the encoder has blocks."""
    if not is_encoder_decoder(model):
        return []
    skipped = {
        stack: [block for block in blocks if is_skipped(model.get_submodule(block.path))]
        for stack, blocks in stacks.items()
    }
    left = {stack: len(blocks) - len(skipped[stack]) for stack, blocks in stacks.items()}
    most = max(left.values(), default=0)
    encoders = [stack for stack in stacks if "encoder" in stack.split(".")]
    return [block.path for stack in encoders for block in skipped[stack][: max(0, most - left[stack])]]


def _remove_blocks(model: nn.Module, stack: str, blocks: list[Block]) -> list[int]:
    """The old numbers of what stays, or nothing if all does."""
    entries = model.get_submodule(stack)
    skipped = {id(module) for block in blocks if is_skipped(module := model.get_submodule(block.path))}
    if not skipped:
        return []
    old: list[nn.Module] = list(entries.children())
    kept = [number for number, module in enumerate(old) if id(module) not in skipped]
    numbers = {before: number for number, before in enumerate(kept)}
    entries._modules.clear()
    holder = model.get_submodule(stack.rpartition(".")[0]).__dict__
    holder.update({name: len(kept) for name in _COUNTS if holder.get(name) == len(old)})
    for before, number in numbers.items():
        module = old[before]
        entries._modules[str(number)] = module
        for part in module.modules():
            if part.__dict__.get("layer_idx") in numbers:
                part.__dict__["layer_idx"] = numbers[part.__dict__["layer_idx"]]
            if "cache_layers" in part.__dict__:
                part.__dict__["cache_layers"] = tuple(numbers[layer] for layer in part.__dict__["cache_layers"])
    return kept


def _cut_adapters(module: LoraLayer, undo: list[Callable[[], None]]) -> None:
    outputs, inputs = active_ranges(module.get_base_layer())
    for factors, dim, ranges in ((module.lora_B, 0, outputs), (module.lora_A, 1, inputs)):
        if ranges is None:
            continue
        for factor in factors.values():
            size = cut_parameter(factor._parameters["weight"], dim, ranges, undo)
            if dim == 0:
                cut_parameter(factor._parameters.get("bias"), 0, ranges, undo)
            factor.__dict__.pop("active_width", None)
            factor.__dict__["out_features" if dim == 0 else "in_features"] = size
            module.__dict__["out_features" if dim == 0 else "in_features"] = size
    grids: Any = getattr(module, "lora_grid", {})
    for name, grid in list(grids.items()):
        grids[name] = Grid.copy_of(grid.take(outputs, inputs), persistent=True)


def _cut(layer: nn.Module, undo: list[Callable[[], None]]) -> None:
    """Leave the active part of a layer alone."""
    outputs, inputs = active_ranges(layer)
    set_active(layer, "out", None)
    set_active(layer, "in", None)
    backend_of(layer).cut(layer, outputs, inputs, undo)


def _leave_quantizer(model: Any, ordinary: list[nn.Module]) -> None:
    """Let a model, and the adapters in it, forget that these layers were packed by the quantizer that loaded it."""
    replaced = {id(layer) for layer in ordinary}
    for module in model.modules():
        if (
            isinstance(module, LoraLayer)
            and id(module.get_base_layer()) in replaced
            and not isinstance(module, Linear)
        ):
            module.__class__ = Linear
            module.__dict__.update(fan_in_fan_out=False, is_target_conv_1d_layer=False)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
