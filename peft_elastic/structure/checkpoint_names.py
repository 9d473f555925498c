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
"""Names of tensors in checkpoints, where they are not those of the model: transformers keeps the names of a model's first release on
disk, or fuses and splits tensors, and translates when it loads and saves."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


@dataclass(frozen=True)
class Origin:
    """What tensors of a model are made of when it is loaded.

    Args:
        target: the name in the model of the tensor; of the first one, if there are several.
        keys: the names on disk, in the order in which transformers takes them.
        patterns: of the converter, that each of these matches.
        converter: what makes one of several tensors, several of one, or another one; None if the tensor stays as it is.
    """

    target: str
    keys: tuple[str, ...]
    patterns: tuple[str, ...] = ()
    converter: WeightConverter | None = None

    def convert(self, model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors of the model, by their names in it, from those on disk by their names there. The latter have the dtype of
        the former already, as in `from_pretrained`."""
        if self.converter is None:
            return {self.target: tensors[self.keys[0]]}
        converter = copy.deepcopy(self.converter)  # which collects what it is given
        for key, pattern in zip(self.keys, self.patterns):
            converter.add_tensor(self.target, key, pattern, tensors[key])
        made = converter.convert(self.target, model=model, config=model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


def origins(model: PreTrainedModel, keys: Iterable[str]) -> list[Origin]:
    """What `from_pretrained` makes the tensors of the model of.

    Args:
        model: the model, or one on the meta device.
        keys: the names of all tensors of the checkpoint. Those that lead to no tensor of the model are left out.
    """
    known = model.state_dict()
    found: dict[str, list[tuple[str, str | None, WeightConverter | None]]] = {}
    for key, (name, pattern, converter) in _renamed(model, keys).items():
        if name in known:
            found.setdefault(name, []).append((key, pattern, converter))
    return [
        Origin(name, tuple(key for key, _, _ in parts), tuple(pattern or "" for _, pattern, _ in parts), parts[0][2])
        for name, parts in found.items()
    ]


def names_in_model(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Where `from_pretrained` puts the tensors of a checkpoint.

    Args:
        model: the model, or one on the meta device.
        keys: the names of all tensors of the checkpoint.

    Returns:
        For each of them the name in the state dict of the model, whether or not there is one, and whether the tensor is
        changed on its way: made one of several, or several of one.
    """
    return {key: (name, converter is not None) for key, (name, _, converter) in _renamed(model, keys).items()}


def _renamed(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str, str | None, WeightConverter | None]]:
    """The name in the model, the pattern of a converter that the key matches, and that converter, by the names on disk."""
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[str, str | None, WeightConverter | None]] = {}
    # in the order of `from_pretrained`, for some renamings have a memory
    for key in sorted(keys, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = key, None
        found[key] = name, pattern, None if pattern is None else by_pattern[pattern]
    return found


def names_on_disk(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, str] | None:
    """What `save_pretrained` calls these tensors of the model, by their names in it; None if it would change one of them."""
    try:
        written = revert_weight_conversion(model, dict(tensors))
    except Exception:  # what its operations meet in tensors that they are not made for
        return None
    names = {id(tensor): name for name, tensor in written.items()}
    if len(written) != len(tensors) or any(id(tensor) not in names for tensor in tensors.values()):
        return None
    return {key: names[id(tensor)] for key, tensor in tensors.items()}


def on_disk(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `save_pretrained` writes of these tensors of the model, by their names in it: those on disk, by their names there. What
    belongs together, as the parts of one `Origin`, is to be given together.

    Raises:
        ValueError: transformers cannot turn back what it did to them when they were loaded.
    """
    try:
        return revert_weight_conversion(model, dict(tensors))
    except Exception as error:  # what its operations meet in tensors that they are not made for
        raise ValueError(
            f"transformers cannot write {next(iter(tensors))} of this {type(model).__name__}, which it makes of other tensors of the "
            f"files ({type(error).__name__}: {error}). Work on the model in memory."
        ) from error
