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

from collections.abc import Iterable, Mapping

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


def names_in_model(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Where `from_pretrained` puts the tensors of a checkpoint.

    Args:
        model: the model, or one on the meta device.
        keys: the names of all tensors of the checkpoint.

    Returns:
        For each of them the name in the state dict of the model, whether or not there is one, and whether the tensor is
        changed on its way: made one of several, or several of one.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[str, bool]] = {}
    for key in sorted(
        keys, key=dot_natural_key
    ):  # in the order of `from_pretrained`, for some renamings have a memory
        name, converter = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, converter = key, None
        found[key] = name, converter is not None
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
