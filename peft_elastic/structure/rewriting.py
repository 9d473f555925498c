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
"""The files of a model whose heads and channels are in another order than in its folder, or of which only a part is left."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..common.safetensors_files import NAMES_OF_DTYPES
from ..layers.backends import backend_of
from .checkpoint_names import on_disk
from .features import layer_at
from .folder_run import Files, Making
from .parts import Width
from .removed import Removed
from .stored_model import StoredModel


# By the name of a tensor in the state dict of the whole model: by its dimensions, which entries are taken, int64.
Takes = dict[str, dict[int, torch.Tensor]]


def takes_of(
    model: nn.Module, widths: list[Width], orders: Mapping[str, torch.Tensor], values: Mapping[str, int] | None = None
) -> Takes:
    """What `apply_orders`, and then cutting to these values of structural choices, leaves of the tensors of a model.

    Args:
        model: the whole model, whose weights are not looked at.
        widths: what of it is moved or cut.
        orders: by the name of an `Order`, which unit each unit is to be, int64 (units,); those that are left out stay as they are.
        values: heads or channels that are left, by the key of a width; of those that are left out, all.
    """
    takes: Takes = {}
    for width in widths:
        kept = (values or {}).get(width.key, width.full) // width.unit
        for order in width.orders:
            if kept == width.units and order.name not in orders:
                continue
            for slot in order.slots:
                index = slot.index(orders.get(order.name, torch.arange(width.units)))
                if kept < width.units:
                    index = torch.cat([index[start:stop] for start, stop in slot.ranges(kept, width.units)])
                layer = layer_at(model, slot.path)
                dim = backend_of(layer).out_dim(layer)
                takes.setdefault(f"{slot.path}.weight", {})[dim if slot.side == "out" else 1 - dim] = index
                if slot.side == "out" and layer._parameters.get("bias") is not None:
                    takes.setdefault(f"{slot.path}.bias", {})[0] = index
    return takes


def rewritten(stored: StoredModel, model: PreTrainedModel, names: Mapping[str, str], takes: Takes) -> Files:
    """
    What `save_pretrained` of the model would write, in files like those that it comes from: each tensor is in the file where it
    was. Files of which nothing is left are left out, and the others numbered anew.

    Args:
        stored: the folder that the model comes from.
        model: on the meta device, as it is to be saved.
        names: for each name in its state dict that in the one of `stored.model`.
        takes: what of each tensor is taken. Entries of tensors that are in it already may be filled in until the files are written.

    Raises:
        ValueError: a tensor is in no file, or transformers cannot turn back what it did to tensors when it loaded them.
    """
    # a tensor may have several names, in the model and on disk
    known = stored.model.state_dict(keep_vars=True)
    there = {id(known[name]): name for name in stored.origin if name in known}
    takes_by_tensor = {id(known[name]): take for name, take in takes.items()}
    groups: dict[int, dict[str, str]] = {}  # names here and there of what is made of the same tensors on disk
    for name in _saved(model):
        old = names.get(name)
        if old is not None and old not in stored.origin:
            old = there.get(id(known[old]))
        if old is None:
            raise ValueError(f"{name} is in no file of {stored.folder}.")
        groups.setdefault(id(stored.origin[old]), {})[name] = old
    files: dict[str, dict[str, Making]] = {file: {} for file in stored.shards.files}
    empty = dict(model.state_dict(keep_vars=True))
    for group in groups.values():
        origin = stored.origin[next(iter(group.values()))]
        tensors = on_disk(model, {name: empty[name] for name in group})
        own = {old: takes_by_tensor.get(id(known[old])) for old in group.values()}
        if len(tensors) == 1 and origin.converter is None and not any(take is not None for take in own.values()):
            key, tensor = next(iter(tensors.items()))
            source = stored.shards.tensors[origin.keys[0]]
            files[source.file.name][key] = Making(NAMES_OF_DTYPES[tensor.dtype], tuple(tensor.shape), source)
            continue
        make = _Maker(stored, model, group, own)
        homes = [stored.shards.tensors[key].file.name for key in sorted(origin.keys, key=_natural)]
        found = sorted(tensors.items(), key=lambda item: _natural(item[0]))
        if len(homes) != len(found):
            homes = homes[:1] * len(found)
        for file, (key, tensor) in zip(homes, found):
            files[file][key] = Making(NAMES_OF_DTYPES[tensor.dtype], tuple(tensor.shape), make.of(key))
    # in the place of what was removed there is an empty tensor
    absent = [
        f"{path}.{part.absent}" for path, part in model.named_modules() if isinstance(part, Removed) and part.absent
    ]
    if absent:
        for key, tensor in on_disk(model, {name: torch.empty(0) for name in absent}).items():
            files[stored.shards.files[0]][key] = Making(NAMES_OF_DTYPES[tensor.dtype], (0,), lambda: torch.empty(0))
    left = {file: tensors for file, tensors in files.items() if tensors}
    if len(left) == len(files):
        return left
    return {f"model-{i:05d}-of-{len(left):05d}.safetensors": found for i, found in enumerate(left.values(), start=1)}


class _Maker:
    """Tensors on disk that are made of the same ones. Those of the last call are kept until all of them have been asked for."""

    def __init__(
        self,
        stored: StoredModel,
        model: PreTrainedModel,
        names: Mapping[str, str],
        takes: Mapping[str, dict[int, torch.Tensor] | None],
    ) -> None:
        self._stored, self._model, self._names, self._takes = stored, model, names, takes
        self._made: dict[str, torch.Tensor] = {}

    def of(self, key: str) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            if key not in self._made:
                self._made = self._make()
            return self._made.pop(key)

        return make

    def _make(self) -> dict[str, torch.Tensor]:
        tensors = self._stored.read(self._names.values())
        taken: dict[str, torch.Tensor] = {}
        for name, old in self._names.items():
            tensor = tensors.pop(old)
            for dim, index in (self._takes[old] or {}).items():
                tensor = tensor.index_select(dim, index)
            taken[name] = tensor
        return on_disk(self._model, taken)


def _saved(model: PreTrainedModel) -> list[str]:
    """The names in the state dict that `save_pretrained` writes: of tied tensors one, the one that is not made of another."""
    ignored = set(model._keys_to_ignore_on_save or ())
    tied = getattr(model, "all_tied_weights_keys", {})
    same: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in ignored and tensor.is_meta:  # what stands for what was removed is not
            same.setdefault(id(tensor), []).append(name)
    return [next((name for name in group if name not in tied), group[0]) for group in same.values()]


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]
