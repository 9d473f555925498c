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
"""The files of a checkpoint: what their headers say, and whether they are those that were saved together.

`save_pretrained` writes one file after the other, into a folder that may hold another model, and may be stopped in between. So
`config.json` has a checksum of every tensor, and files that were not saved together are refused. safetensors' own reader finds the
same damage, but does not say which tensor it is in, nor where the bytes are that the checksums are made of.
"""

from __future__ import annotations

import os
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..common.safetensors_files import ITEM_BYTES, check_safetensors
from ..layers.values import STORED_NAMES


def check_files(files: Iterable[str], described: Collection[str], dense_sums: Mapping[str, int]) -> None:
    """Verify that the files of a checkpoint hold the tensors that its config describes, and no others. Those of sparse layers are
    looked at again, and more closely, when they have been read.

    Args:
        files (`Iterable[str]`): of the weights.
        described (`Collection[str]`): the tensors of sparse layers that should be there.
        dense_sums (`Mapping[str, int]`): checksums of the other tensors.

    Raises:
        ValueError: naming the tensor, the layer or the file that is one too many, missing or another one.
    """
    where: dict[str, str] = {}
    places: dict[str, _Place] = {}
    for file in files:
        name = os.path.basename(file)
        if not name.endswith(".safetensors"):
            if described:
                raise ValueError(f"{name} is no safetensors file; sparse layers are read from these alone.")
            return
        header, begin = check_safetensors(file)
        for tensor, entry in header.items():
            if tensor in where:
                raise ValueError(f"{tensor} is in {where[tensor]} and in {name}; it must be in one of them.")
            where[tensor] = name
            first, last = entry["data_offsets"]
            places[tensor] = _Place(file, begin + first, last - first, ITEM_BYTES.get(entry["dtype"], 1))
    stored = {tensor for tensor in where if tensor.rpartition(".")[2] in STORED_NAMES}
    for tensor in sorted(stored):
        dense = f"{tensor.rpartition('.')[0]}.weight"
        if dense in where:
            raise ValueError(f"{tensor} in {where[tensor]} is of a sparse layer, but {dense} is there as well.")
    # transformers may save a layer under another path than it has in the model: then as many others are missing here
    if len(stored) > len(described):
        tensor = _first_unlike(stored.difference(described), described)
        layer = tensor.rpartition(".")[0]
        raise ValueError(
            f"quantization_config: layer {layer!r} is left out, or described wrongly: {where[tensor]} holds {tensor}."
        )
    _check_dense({name: places[name] for name in places if name not in stored}, dense_sums)


class _Place(NamedTuple):
    """Where a tensor is, in bytes."""

    file: str
    offset: int
    size: int
    item: int


def _check_dense(places: Mapping[str, _Place], expected: Mapping[str, int]) -> None:
    """Verify tensors against checksums. What transformers saves under other names, or several as one, is left out."""
    known = [name for name, place in places.items() if name in expected and place.size]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        found = dict(zip(known, pool.map(lambda name: _sum_of_file(places[name]), known), strict=True))
    for name, value in found.items():
        if value != expected[name]:
            raise _not_together(name, places[name].file)
    if len(found) == sum(place.size > 0 for place in places.values()):
        count = Counter(expected.values())  # tied tensors have one checksum, and are saved once
        missing = sorted(name for name in expected if name not in places and count[expected[name]] == 1)
        if missing and places:
            raise ValueError(f"{missing[0]} is missing.")


def _first_unlike(names: Iterable[str], others: Iterable[str]) -> str:
    """The first of `names` that is not, under another path, among `others`: from the number of the block on, which does not
    change when a model becomes a part of another."""

    def tail(name: str) -> str:
        match = re.search(r"\.\d+\..*", name)
        return match[0] if match else name

    tails = set(map(tail, others))
    return min(names, key=lambda name: (tail(name) in tails, name))


def _not_together(tensor: str, file: str) -> ValueError:
    folder, name = os.path.split(file)
    why = "it is damaged, or a `save_pretrained` over an older model was interrupted. Save the model again."
    if name == SAFE_WEIGHTS_NAME and os.path.exists(os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)):
        why = "the file is of an older model beside the shards of this one. Remove it, or save to another folder."
    return ValueError(
        f"{tensor} in {name} was not saved with this config.json, which has another checksum of it: {why}"
    )


def checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().view(torch.uint8).numpy().data)


def _sum(words: np.ndarray[Any, Any]) -> int:
    """A checksum that does not depend on the order of the elements: transformers stores some tensors transposed."""
    total = 0
    for start in range(0, len(words), 1 << 20):
        part = words[start : start + (1 << 20)].astype(np.uint64)
        total += int((part * part + part).sum(dtype=np.uint64))
    return total % 2**63


def _words(item: int) -> Any:
    """What elements of so many bytes are summed as."""
    return {1: np.uint8, 2: np.uint16}.get(item, np.uint32)


def _sum_of_file(place: _Place) -> int:
    words = np.memmap(place.file, np.uint8, "r", place.offset, (place.size,))
    return _sum(words[: place.size // place.item * place.item].view(_words(place.item)))


def dense_checksums(model: nn.Module, state: Mapping[str, Any]) -> dict[str, int]:
    """Of all tensors that are not those of sparse layers, and that are here."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    dense = {
        name: tensor
        for name, tensor in sorted(state.items())
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type != "meta" and tensor.numel()
        if name.rpartition(".")[2] not in STORED_NAMES and name not in ignored
    }
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:

        def sum_of(tensor: torch.Tensor) -> int:
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            return _sum(flat.view(_words(tensor.element_size())))

        return dict(zip(dense, pool.map(sum_of, dense.values()), strict=True))
