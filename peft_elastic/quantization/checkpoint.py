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
"""Models into GPTQ checkpoints: `save_gptq`. The tensors of a layer are the business of gptq_format.py, loading that of loading.py."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer

from ..common.checks import check_choice
from ..common.files import replaced_files
from ..layers.backends import grid_layers
from ..layers.gptq_format import FORMATS, check_packable, pack_gptq
from ..layers.grid import Grid
from ..layers.quantized_linear import QuantizedLinear
from ..structure.checkpoint_names import names_in_model, names_on_disk
from ..structure.modules import enclosing_names, find_stacks, linear_layers, output_head
from ..structure.rebuild import is_described
from ..version import __version__
from .gptq_settings import CONFIG_FILE, QUANTIZE_CONFIG_FILE
from .saving import InMemoryConfig


def save_gptq(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    checkpoint_format: str | None = None,
    tokenizer: Any = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """
    Saves a transformers model with `QuantizedLinear` layers as a GPTQ checkpoint, which GPTQModel, transformers (through
    GPTQModel) and `load_gptq` read. All other weights are stored as they are.

    The files take the place of older ones together: a process that is killed meanwhile leaves the old model, the new one, or a
    folder without config.json, which is an error for every reader. What else is in `save_directory` stays.

    Args:
        model: from `quantize` or `load_gptq`, or a merged model, without adapters. Layers may differ in bits and group size;
            what differs from most is written as GPTQModel's `dynamic` rules. transformers does not read these: it fails on
            layers that differ. Layers in floating point may be among them.
        save_directory: a new folder, or an old one whose model is replaced.
        checkpoint_format: "gptq" stores zero points minus one, "gptq_v2" as they are. By default "gptq" where all zero points
            are in the middle, as any reader knows it, and "gptq_v2" otherwise: GPTQModel takes "gptq" with other zero points
            from itself alone.
        tokenizer: saved in the same folder.
        max_shard_size: of a safetensors file, as in `save_pretrained`.

    Raises:
        ValueError: a bad argument, a model without quantised layers or with adapters, a layer whose shape does not fill whole
            words of 32 bits, or, with "gptq", one with a zero point of 0.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("`model` has adapters; save_gptq(model.merge_and_unload(), ...) saves the two as one model.")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`model` is a {type(model).__name__}; it must be a model of transformers.")
    if is_described(model.config):
        raise ValueError(
            "`model` has blocks of different sizes, which no reader of GPTQ checkpoints builds. `sparsify_linears(model, "
            "when='always')` and `model.save_pretrained(...)` store the integers as well, for `from_pretrained` after `import "
            "peft_elastic`."
        )
    layers = grid_layers(model)
    if not layers:
        raise ValueError("`model` has no quantised layers; quantize(model, ...) makes some.")
    symmetric = all(layer.grid.symmetric for layer in layers.values())
    if checkpoint_format is None:
        checkpoint_format = "gptq" if symmetric else "gptq_v2"
    check_choice("checkpoint_format", checkpoint_format, FORMATS)
    for name, layer in layers.items():
        check_packable(name, layer.out_features, layer.in_features, layer.grid.bits)
        if checkpoint_format == "gptq" and not bool(layer.grid.zeros.all()):
            raise ValueError(
                f"`checkpoint_format` is 'gptq', which cannot hold the zero points of 0 in {name!r}; use 'gptq_v2'."
            )

    state = model.state_dict()
    packed: dict[str, dict[str, torch.Tensor]] = {}
    for name, layer in layers.items():
        del state[f"{name}.weight"]
        packed[name] = pack_gptq(name, layer.quantized(), checkpoint_format)
        state |= {f"{name}.{key}": tensor for key, tensor in packed[name].items()}
    original_names = _names_to_write(model, packed)
    description = describe(model, layers, checkpoint_format)

    if Path(save_directory).is_file():
        raise ValueError(f"`save_directory` is {os.fspath(save_directory)!r}, which is a file.")
    quantizer, known = getattr(model, "hf_quantizer", None), getattr(model.config, "quantization_config", None)
    try:
        # `save_pretrained` asks a quantizer for the tensors, and writes this part of the config.
        model.hf_quantizer = _Writer(state)
        model.config.quantization_config = description
        with replaced_files(save_directory, last=CONFIG_FILE, stale=_is_weights) as folder:
            model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=original_names)
            (folder / QUANTIZE_CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    finally:
        for owner, key, value in ((model, "hf_quantizer", quantizer), (model.config, "quantization_config", known)):
            if value is None:
                delattr(owner, key)
            else:
                setattr(owner, key, value)


class _Writer(HfQuantizer):
    """Hands a state dict to `save_pretrained`."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__(InMemoryConfig(), pre_quantized=True)
        self._state = state

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return self._state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def describe(model: nn.Module, layers: Mapping[str, QuantizedLinear], checkpoint_format: str) -> dict[str, Any]:
    """The `quantization_config` of a GPTQ checkpoint."""
    # (bits, group size) of each layer. Where all layers have one group each, -1 stands for sizes that differ.
    one_group = all(layer.grid.scales.shape[1] == 1 for layer in layers.values())
    grids = {
        name: (layer.grid.bits, -1 if one_group else _group_size(name, layer.grid)) for name, layer in layers.items()
    }
    return description_of(
        model,
        grids,
        checkpoint_format,
        symmetric=all(layer.grid.symmetric for layer in layers.values()),
        in_order=all(_is_in_order(name, layer.grid) for name, layer in layers.items()),
    )


def description_of(
    model: nn.Module,
    layers: Mapping[str, tuple[int, int]],
    checkpoint_format: str,
    *,
    symmetric: bool,
    in_order: bool,
) -> dict[str, Any]:
    """The `quantization_config` of a GPTQ checkpoint whose layers have these bits and group sizes, by their names.

    Args:
        symmetric: whether all zero points are in the middle.
        in_order: whether the groups follow each other.
    """
    head = output_head(model)
    if isinstance(head, BaseTunerLayer):
        head = head.get_base_layer()
    most = Counter(layers.values()).most_common(1)[0][0]
    grids: dict[str, tuple[int, int] | None] = {**layers}
    # Readers expect every linear layer of the blocks to be quantised, unless they are told otherwise.
    stacks = find_stacks(model)
    blocks = {block for stack in stacks for block in stack}
    inside = [name for name in linear_layers(model) if not blocks.isdisjoint(enclosing_names(name))]
    left_out = {name for name in inside if name not in grids}
    grids |= dict.fromkeys(left_out)
    description = {
        "quant_method": "gptq",
        "bits": most[0],
        "group_size": most[1],
        "desc_act": not in_order,
        "sym": symmetric,
        "lm_head": any(linear is head for name, linear in linear_layers(model).items() if name in layers),
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "pack_dtype": "int32",
        "true_sequential": False,
        "meta": {"quantizer": [f"peft_elastic:{__version__}"]},
    }
    rules = _rules(grids, most)
    if rules:
        description["dynamic"] = rules
    if left_out and len(stacks) == 1:
        # The same for readers that know no `dynamic`, transformers among them: ends of the names of what is quantised.
        relative = {
            block: [n.removeprefix(f"{block}.") for n in layers if n.startswith(f"{block}.")] for block in blocks
        }
        kinds = list(relative.values())
        alike = kinds[0] and all(kind == kinds[0] for kind in kinds)
        description["modules_in_block_to_quantize"] = [kinds[0] if alike else [n for n in inside if n not in left_out]]
    return description


def _group_size(name: str, grid: Grid) -> int:
    """The number that readers are told, who count on in / size groups, rounded up.

    Raises:
        ValueError: there is none, for groups that differ in more than the last one being smaller.
    """
    if grid.in_order:
        return grid.group_size
    largest = int(torch.bincount(grid.g_idx).max())
    groups = grid.scales.shape[1]
    for size in (max(grid.group_size, largest), largest):
        if -(-grid.in_features // size) == groups:
            return size
    raise ValueError(
        f"{name} has {groups} groups for {grid.in_features} inputs, the largest of {largest}; no group size of a GPTQ checkpoint "
        "means that."
    )


def _is_in_order(name: str, grid: Grid) -> bool:
    expected = torch.arange(grid.in_features, device=grid.g_idx.device) // _group_size(name, grid)
    return grid.in_order or torch.equal(grid.g_idx.long(), expected)


def _names_to_write(model: PreTrainedModel, packed: Mapping[str, Mapping[str, torch.Tensor]]) -> bool:
    """Whether the tensors get the names that transformers gives them on disk (True), or those that they have in the model.

    Raises:
        ValueError: neither leads back to the layers that they belong to.
    """
    tensors = {f"{name}.{key}": tensor for name, layer in packed.items() for key, tensor in layer.items()}
    lost = ""
    for original, names in ((True, names_on_disk(model, tensors)), (False, {key: key for key in tensors})):
        if names is None:  # transformers would make other tensors of them
            continue
        layers = {key.rpartition(".")[0]: on_disk.rpartition(".")[0] for key, on_disk in names.items()}
        whole = all(names[f"{name}.{key}"] == f"{layers[name]}.{key}" for name in packed for key in packed[name])
        back = names_in_model(model, [f"{on_disk}.weight" for on_disk in layers.values()])
        lost = next((n for n, on_disk in layers.items() if back[f"{on_disk}.weight"] != (f"{n}.weight", False)), "")
        if whole and not lost:
            return original
    raise ValueError(
        f"`model`: transformers fuses, splits or renames the weight of {lost!r} when it loads a {type(model).__name__}, so a "
        "checkpoint with it quantised cannot be loaded. Leave the layer out of the quantisation (exclude_modules)."
    )


def _rules(grids: Mapping[str, tuple[int, int] | None], most: tuple[int, int]) -> dict[str, dict[str, int]]:
    """GPTQModel's `dynamic` for layers that are not like `most`: None is not quantised. One rule for all blocks if possible."""
    kinds: dict[str, list[str]] = {}
    for name in grids:
        kinds.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1#", name), []).append(name)
    patterns: list[tuple[str, tuple[int, int] | None]] = []
    for kind, names in kinds.items():
        if len({grids[name] for name in names}) == 1:
            patterns.append((re.escape(kind).replace(r"\#", r"\d+"), grids[names[0]]))
        else:
            patterns += [(re.escape(name), grids[name]) for name in names]
    return {
        f"{'-' if grid is None else '+'}:^{pattern}$": {} if grid is None else {"bits": grid[0], "group_size": grid[1]}
        for pattern, grid in patterns
        if grid != most
    }


def _is_weights(name: str) -> bool:
    """Whether a file holds weights of a model, which those of another one must not stay beside."""
    return re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json", name) is not None
