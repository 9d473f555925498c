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
"""Files of safetensors, tensor by tensor: what their headers say, and reading and writing of single tensors at their places.

safetensors' own reader maps a file into memory, whose pages then count as memory of the process, and its writer takes all tensors of
a file at once. Here a tensor is read into memory of its own, and written to a file whose header was written before.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checks import is_whole
from .documents import parse_json, read_json
from .writing import writing


# what a number of each type of safetensors takes
ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4}
ITEM_BYTES |= {"F64": 8, "I64": 8, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
_MAX_HEADER_BYTES = 100 * 2**20  # as in safetensors

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES_OF_DTYPES = {dtype: name for name, dtype in DTYPES.items()}

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"

_CHUNK = 2**24  # bytes that are read or copied at once


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
        if isinstance(dtype, str) and dtype in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
            raise ValueError(f"{tensor} in {name} has {end - begin} bytes, which is not {dtype} {shape}.")
        spans.append((begin, end, tensor))
    spans.sort()
    for (_, end, _), (begin, _, tensor) in zip(spans, spans[1:]):
        if begin < end:
            raise ValueError(f"{tensor} in {name} overlaps the tensor before it.")
    header.pop("__metadata__", None)
    return header, length + 8


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Args:
        file: path of the file.
        offset, size: of its bytes.
        dtype: of safetensors: "BF16".
        shape: its sizes.
    """

    file: Path
    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own.

        Raises:
            ValueError: the file is shorter than it was.
        """
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        view = _bytes_of(tensor)
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.offset)
            while len(view):
                count = stream.readinto(view[:_CHUNK])
                if not count:
                    raise ValueError(
                        f"{os.fspath(self.file)!r} ends within a tensor: it was changed while it was read."
                    )
                view = view[count:]
        return tensor

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the tensor, piece by piece."""
        left = self.size
        with open(self.file, "rb", buffering=0) as stream:
            stream.seek(self.offset)
            while left:
                chunk = stream.read(min(left, _CHUNK))
                if not chunk:
                    raise ValueError(
                        f"{os.fspath(self.file)!r} ends within a tensor: it was changed while it was read."
                    )
                left -= len(chunk)
                yield chunk


def write_alone(path: Path, tensor: torch.Tensor) -> Stored:
    """Write the bytes of a tensor, and nothing else, to a file that it may take the place of."""
    with writing(path), open(path, "wb", buffering=0) as stream:
        view = _bytes_of(tensor.detach().cpu().contiguous())
        while len(view):
            view = view[stream.write(view[:_CHUNK]) :]
    return Stored(path, 0, tensor.nbytes, NAMES_OF_DTYPES[tensor.dtype], tuple(tensor.shape))


@dataclass(frozen=True)
class Shards:
    """The weights of a model in a folder: one safetensors file, or several with an index.

    Args:
        files: names of the files.
        tensors: by their names, in the order of the files and of the bytes in them.
        metadata: of the headers of the files, by the names of these.
        index: what the index says besides of where the tensors are; None for a single file.
    """

    files: tuple[str, ...]
    tensors: Mapping[str, Stored]
    metadata: Mapping[str, Mapping[str, str]]
    index: Mapping[str, Any] | None

    @property
    def bytes(self) -> int:
        return sum(tensor.size for tensor in self.tensors.values())


def read_shards(folder: str | os.PathLike[str]) -> Shards:
    """Look at the headers of the safetensors files of a model, and verify them against the files and the index.

    Raises:
        ValueError: naming what is missing or damaged: a file of the index, a tensor that the index has in it, bytes of a file; or
            there are no safetensors files, or those of two models.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{os.fspath(folder)!r} is no folder; a folder with a model in safetensors files is needed.")
    single, index_file = (folder / WEIGHTS_FILE).is_file(), (folder / INDEX_FILE).is_file()
    if single and index_file:
        raise ValueError(
            f"{os.fspath(folder)!r} holds {WEIGHTS_FILE} and {INDEX_FILE}: remove the one that is of an older model."
        )
    index: dict[str, Any] | None = None
    claimed: dict[str, Any] = {}
    if index_file:
        data = read_json(folder / INDEX_FILE)
        claimed = data.get("weight_map") if isinstance(data, dict) else None  # type: ignore[assignment]
        if not isinstance(claimed, dict) or not claimed or not all(_is_file_name(file) for file in claimed.values()):
            raise ValueError(f"{INDEX_FILE} must have an object `weight_map` of tensors and names of files.")
        index = {key: value for key, value in data.items() if key != "weight_map"}
        files = tuple(sorted(set(claimed.values())))
    elif single:
        files = (WEIGHTS_FILE,)
    else:
        raise ValueError(
            f"{os.fspath(folder)!r} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; other formats have to be saved as safetensors first."
        )
    tensors: dict[str, Stored] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{file} is missing in {os.fspath(folder)!r}; {INDEX_FILE} names it.")
        header, begin = check_safetensors(folder / file)
        metadata[file] = _metadata(folder / file)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if name in tensors:
                raise ValueError(f"{name} is in {tensors[name].file.name} and in {file}; it must be in one of them.")
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} in {file} must be one of {', '.join(DTYPES)}, got {entry['dtype']}.")
            first, last = entry["data_offsets"]
            tensors[name] = Stored(folder / file, begin + first, last - first, entry["dtype"], tuple(entry["shape"]))
    for name, file in claimed.items():
        if name not in tensors or tensors[name].file.name != file:
            raise ValueError(f"{name} is not in {file}, where {INDEX_FILE} has it.")
    return Shards(files, tensors, metadata, index)


def _is_file_name(name: Any) -> bool:
    return isinstance(name, str) and os.path.basename(name) == name and name.endswith(".safetensors")


def _metadata(file: Path) -> dict[str, str]:
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        found = parse_json(stream.read(length)).get("__metadata__")
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


class ShardFile:
    """A file of safetensors that is filled tensor by tensor, in any order and by one process after another.

    Args:
        path: of the file, which `create` makes.
        tensors: (dtype of safetensors, shape) by the names of the tensors that it is for.
        metadata: of its header.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        spans = {}
        end = 0
        # the widest numbers first, so that all are aligned
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -ITEM_BYTES[item[1][0]]):
            begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
            spans[name] = begin
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._head = struct.pack("<Q", len(text)) + text
        self.size = len(self._head) + end
        self._places = {
            name: (len(self._head) + begin, math.prod(tensors[name][1]) * ITEM_BYTES[tensors[name][0]], *tensors[name])
            for name, begin in spans.items()
        }

    def create(self) -> bool:
        """Make the file, with its header and all numbers zero, unless it is there. Returns whether it was not."""
        with writing(self.path):
            if self.path.is_file() and self.path.stat().st_size == self.size:
                with open(self.path, "rb") as stream:
                    if stream.read(len(self._head)) == self._head:
                        return False
            with open(self.path, "wb") as stream:
                stream.write(self._head)
                stream.truncate(self.size)
        return True

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def described(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The dtype and the shape of a tensor."""
        _, _, dtype, shape = self._places[name]
        return dtype, shape

    def at(self, name: str, path: Path | None = None) -> Stored:
        """Where a tensor is, in the file or in `path` that it became."""
        offset, size, dtype, shape = self._places[name]
        return Stored(path or self.path, offset, size, dtype, shape)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, of the type and shape that were said."""
        _, _, dtype, shape = self._places[name]
        if tuple(tensor.shape) != shape or tensor.dtype != DTYPES[dtype]:
            raise AssertionError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}")
        view = _bytes_of(tensor.detach().cpu().contiguous())
        self._put(name, (view[start : start + _CHUNK] for start in range(0, len(view), _CHUNK)))

    def copy(self, name: str, source: Stored) -> None:
        """Write one tensor as it is in another file, in the type that was said of it."""
        if source.dtype == self._places[name][2]:
            self._put(name, source.chunks())
        else:
            self.write(name, source.read().to(DTYPES[self._places[name][2]]))

    def _put(self, name: str, chunks: Iterator[Any]) -> None:
        with writing(self.path), open(self.path, "r+b", buffering=0) as stream:
            stream.seek(self._places[name][0])
            for chunk in chunks:
                rest = memoryview(chunk)
                while len(rest):
                    rest = rest[stream.write(rest) :]

    def sync(self) -> None:
        """Wait until what was written is on disk."""
        with writing(self.path), open(self.path, "r+b") as stream:
            os.fsync(stream.fileno())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
