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

import math
import os
import re
import struct
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..common.checks import is_whole
from ..common.documents import parse_json
from ..layers.values import STORED_NAMES


# of safetensors, for the types that a stored layer has
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4}
_ITEM_BYTES |= {"F64": 8, "I64": 8, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
_MAX_HEADER_BYTES = 100 * 2**20  # as in safetensors


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
            places[tensor] = _Place(file, begin + first, last - first, _ITEM_BYTES.get(entry["dtype"], 1))
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


def check_safetensors(file: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """Verify the header of a safetensors file against the length of the file, without reading the tensors.

    Returns:
        what the header says of each tensor, and where in the file their bytes begin.

    Raises:
        ValueError: naming the tensor whose offsets, type, shape and length do not agree, or the file if it is damaged as a
            whole.
    """
    name = os.path.basename(os.fspath(file))
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
        if length is None or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{name} is damaged: {size} bytes, and its header claims {length}.")
        try:
            header = parse_json(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{name} is damaged: its header is {error}.") from None
    if not isinstance(header, dict):
        raise ValueError(f"{name} is damaged: its header is not a JSON object.")
    spans = []
    for tensor, entry in header.items():
        if tensor == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [begin, end, *shape]
            if any(not is_whole(number) or number < 0 for number in numbers):
                raise ValueError("negative or no whole numbers")
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{tensor} in {name} is described wrongly: {entry!r:.200} ({error}).") from None
        if begin > end or length + 8 + end > size:
            raise ValueError(
                f"{tensor} in {name} lies at bytes {begin} to {end}, but the file has {size - 8 - length} bytes of tensors: it "
                "is truncated or damaged."
            )
        if isinstance(dtype, str) and dtype in _ITEM_BYTES and math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
            raise ValueError(f"{tensor} in {name} has {end - begin} bytes, which is not {dtype} {shape}.")
        spans.append((begin, end, tensor))
    spans.sort()
    for (_, end, _), (begin, _, tensor) in zip(spans, spans[1:]):
        if begin < end:
            raise ValueError(f"{tensor} in {name} overlaps the tensor before it.")
    header.pop("__metadata__", None)
    return header, length + 8


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
