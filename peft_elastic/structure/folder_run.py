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
"""Work on a model in a folder that another folder is made of, block by block. It may be interrupted at any point, and goes on there."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..common.checks import check_bool
from ..common.documents import ANYTHING, TEXT, ListOf, Record
from ..common.files import alone
from ..common.journal import Journal
from ..common.progress import progress_bar
from ..common.safetensors_files import (
    INDEX_FILE,
    ITEM_BYTES,
    NAMES_OF_DTYPES,
    WEIGHTS_FILE,
    ShardFile,
    Stored,
)
from ..common.writing import atomic_path, atomic_write_text, writing
from .residence import StoredResidence, Work
from .stored_model import CONFIG_FILE, StoredModel


JOURNAL_FILE = ".peft_elastic_run.jsonl"
_SCRATCH = ".activations.partial"
_FORMAT = "peft-elastic/folder-run"
_VERSION = 1
_ROW = Record(layers=ListOf(TEXT), rows=ListOf(ANYTHING))
# What does not: this says which super-network the weights are that were, and not those that come.
_NOT_BESIDE = "elastic_model.json"
# What goes along with a model: tokenizers, generation settings, templates of chats, code of the model.
_BESIDE = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # (dtype of safetensors, shape) by the name on disk


@dataclass(frozen=True)
class Making:
    """A tensor to write.

    Args:
        dtype: of safetensors.
        shape: its sizes.
        source: where it is, in the source; what makes it; or None if it comes when its layer has been visited.
    """

    dtype: str
    shape: tuple[int, ...]
    source: Stored | Callable[[], torch.Tensor] | None


# What to write: by the name of each file the tensors in it, by their names on disk.
Files = Mapping[str, Mapping[str, Making]]


class FolderRun(Work):
    """
    Reads a model from one folder and writes it, changed, to another one.

    The files of weights in the new folder are those of the old one: the same names, with other tensors in the place of those that
    change. A file is written under a name of its own (`.NAME.partial`), tensor by tensor, and gets its name when it is whole;
    config.json comes last. What is done is noted in a journal, `.peft_elastic_run.jsonl`, after it is on disk. The journal goes
    when all is done; a folder that has one is unfinished, and the same call goes on with it.

    Args:
        source: the folder of the model.
        output: the folder to make: a new one, an empty one, or that of an unfinished run.
        work: what it is, for messages: "pruning".
        settings: JSON values which, with the source, say what comes out. A run with others does not go on with this one.
        dtype: as in `StoredModel`.
        device: where blocks are computed.
        activations_on_disk: whether the activations between two blocks are kept in files, in `output`.

    Raises:
        ValueError: as of `StoredModel`; `output` is the source, holds something else or another run, or has too little space.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        output: str | os.PathLike[str],
        work: str,
        settings: Mapping[str, Any],
        *,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
        activations_on_disk: bool = False,
    ) -> None:
        check_bool("activations_on_disk", activations_on_disk)
        self._on_disk = activations_on_disk
        self.output = Path(output)
        check_output(source, self.output)
        self.stored = StoredModel(source, dtype)
        self.model = self.stored.model
        self._work = work
        self.device = torch.device(device)
        header = {
            "format": _FORMAT,
            "version": _VERSION,
            "work": work,
            "source": self.stored.fingerprint(),
            "dtype": dtype,
            "device": self.device.type,
            **settings,
        }
        self._header = json.loads(json.dumps(header, default=str))

    # -- what is to be done ------------------------------------------------------------------------------------------

    @contextmanager
    def working(
        self,
        new: Mapping[str, Tensors],
        old: Mapping[str, list[str]],
        *,
        before: Callable[[str], None],
        reload: Callable[[str, Mapping[str, Stored]], torch.Tensor] | None = None,
        after: Callable[[dict[str, nn.Module]], tuple[dict[str, torch.Tensor], list[Any]]],
        files: Files | None = None,
    ) -> Iterator[StoredResidence]:
        """
        Walkers go through the model meanwhile, and what they do with a unit is kept.

        Args:
            new: the tensors that will be written for each layer, by its name.
            old: the names on disk of those of the source in whose place they come.
            before: is called with the name of each layer of a unit, when it is in memory.
            reload: makes the weight of a layer that is done, as the model computes with it, of what was written; gets the name of the
                layer, and where its tensors are by their names on disk. Without it, the weight is read from where it was written.
            after: is called with the layers of a unit that were changed, by name; returns the tensors that were announced in
                `new`, by their names on disk, and rows for the report.
            files: what to write, by the names of the files, of a run whose visits write nothing (`new` has no tensors): `finish`
                writes all of it. By default the files of the source, with what is in `new` in the place of what is in `old`.
        """
        self._before, self._after, self._reload = before, after, reload
        self._notes: dict[str, Any] = {}
        self._new, self._old = new, old
        self._at_end = files is not None
        self._files = self._shards_of(self._plan() if files is None else files)
        file_of = {key: file for file, (_, keys) in self._files.items() for key in keys}
        self._file_of = file_of
        self._waiting = {
            file: {layer for layer, tensors in new.items() if any(file_of[key] == file for key in tensors)}
            for file in self._files
        }
        self._check_space()
        with writing(self.output):
            self.output.mkdir(parents=True, exist_ok=True)
        with _only_one(self.output):
            self._journal = Journal(self.output / JOURNAL_FILE, self._header, self._work, _ROW, argument="output")
            self._done = {layer for row in self._journal.rows for layer in row["layers"]}
            for file, (shard, keys) in self._files.items():
                if not (self.output / file).exists():
                    done = any(key in keys for layer in self._done for key in new[layer])
                    if shard.create() and done:
                        raise ValueError(
                            f"`output`: {shard.path.name} in {os.fspath(self.output)!r} is gone, or another one; {JOURNAL_FILE} says that "
                            "some of it was written. Remove the folder and begin anew."
                        )
            for layer in self._done:
                self._note_done(layer)
            residence = StoredResidence(self.stored, self.device, self)
            scratch = self.output / _SCRATCH
            shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
            if self._on_disk:
                with writing(scratch):
                    scratch.mkdir()
                residence.scratch = scratch
            try:
                with residence.attached():
                    yield residence
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    @property
    def done(self) -> set[str]:
        """The layers that are done, by earlier runs too."""
        return self._done

    def rows_of(self, layers: Iterable[str]) -> list[Any]:
        """Those of layers that are done, by earlier runs too, in this order."""
        by_name = {row["name"]: row for unit in self._journal.rows for row in unit["rows"]}
        return [by_name[name] for name in layers]

    def _shards_of(self, files: Files) -> dict[str, tuple[ShardFile, Mapping[str, Making]]]:
        """The files to write, by their names."""
        known = self.stored.shards.metadata
        return {
            file: (
                ShardFile(
                    self.output / f".{file}.partial",
                    {key: (making.dtype, making.shape) for key, making in tensors.items()},
                    known.get(file, next(iter(known.values()))),
                ),
                tensors,
            )
            for file, tensors in files.items()
        }

    def _plan(self) -> Files:
        """The files of the source, with the tensors that change in them, and those that stay as they are."""
        replaced: dict[str, list[str]] = {}
        for layer, keys in self._old.items():
            replaced.setdefault(keys[0], []).append(layer)
        gone = {key for keys in self._old.values() for key in keys}
        targets = self.stored.targets()
        files: dict[str, dict[str, Making]] = {}
        shards = self.stored.shards
        for file in shards.files:
            tensors: dict[str, Making] = {}
            for key, stored in shards.tensors.items():
                if stored.file.name != file:
                    continue
                for layer in replaced.get(key, ()):
                    tensors |= {name: Making(dtype, shape, None) for name, (dtype, shape) in self._new[layer].items()}
                if key not in gone and key in targets:
                    dtype = NAMES_OF_DTYPES[self.stored.dtype_on_disk(key, targets)]
                    tensors[key] = Making(dtype, stored.shape, stored)
            files[file] = tensors
        return files

    def _check_space(self) -> None:
        there = [self.output / name for file in self._files for name in (file, f".{file}.partial")]
        needed = sum(shard.size for shard, _ in self._files.values())
        needed -= sum(
            path.stat().st_blocks * 512 for path in there if path.exists() and hasattr(os.stat_result, "st_blocks")
        )
        existing = next(path for path in (self.output, *self.output.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise ValueError(
                f"`output` {os.fspath(self.output)!r} is on a disk with {free / 1e9:.2f} GB of free space, and "
                f"{needed / 1e9:.2f} GB more are needed."
            )

    # -- as it is done -----------------------------------------------------------------------------------------------

    def note(self, layer: str, row: Any) -> None:
        self._notes[layer] = row

    def is_done(self, layers: dict[str, nn.Module]) -> bool:
        return self._done.issuperset(layers)

    def before(self, layers: dict[str, nn.Module]) -> None:
        for name in layers:
            self._before(name)

    def after(self, layers: dict[str, nn.Module]) -> None:
        tensors, rows = self._after(layers)
        rows = [*rows, *(self._notes.pop(name) for name in layers if name in self._notes)]
        for key, tensor in tensors.items():
            self._files[self._file_of[key]][0].write(key, tensor)
        for file in {self._file_of[key] for key in tensors}:
            self._files[file][0].sync()
        self._journal.append({"layers": list(layers), "rows": rows})
        self._done |= layers.keys()
        for layer in layers:
            self._note_done(layer)
        if not self._at_end:
            self._complete()

    def _note_done(self, layer: str) -> None:
        """From now on the layer is read from where it was written, if that has the same tensors."""
        reload = self._reload
        if reload is not None:
            self.stored.computed[f"{layer}.weight"] = lambda: reload(
                layer, {key: self.at(key) for key in self._new[layer]}
            )
        for key in self._new[layer]:
            if key in self.stored.shards.tensors:
                self.stored.moved[key] = self.at(key)
        for waiting in self._waiting.values():
            waiting.discard(layer)

    def at(self, key: str) -> Stored:
        """Where a tensor is in the new folder."""
        file = self._file_of[key]
        whole = self.output / file
        return self._files[file][0].at(key, whole if whole.exists() else None)

    def _complete(self, progress: bool = False) -> None:
        """Files of which all layers are done get the rest of their tensors, and their names."""
        files = progress_bar(self._files.items(), desc=self._work, unit="file", disable=not progress)
        for file, (shard, tensors) in files:
            if self._waiting[file] or (self.output / file).exists():
                continue
            for key, making in tensors.items():
                if isinstance(making.source, Stored):
                    shard.copy(key, making.source)
                elif making.source is not None:
                    shard.write(key, making.source())
            shard.sync()
            with writing(self.output):
                os.replace(shard.path, self.output / file)
            self.stored.moved |= {key: self.at(key) for key in self.stored.moved if self._file_of[key] == file}

    def finish(
        self,
        texts: Mapping[str, str] | None = None,
        config: Mapping[str, Any] | None = None,
        model: PreTrainedModel | None = None,
        progress: bool = False,
    ) -> None:
        """Write what belongs to the model besides its weights, config.json last, and end the run.

        Args:
            texts: more files, by name.
            config: entries to add to config.json.
            model: whose configuration it is, if that is not the one that was read.
            progress: whether to show a progress bar of the files that are left to write.
        """
        model = self.model if model is None else model
        self._complete(progress)
        if self.stored.shards.index is not None:
            size = sum(
                math.prod(shape) * ITEM_BYTES[dtype]
                for shard, _ in self._files.values()
                for dtype, shape in (shard.described(key) for key in shard.names)
            )
            known = self.stored.shards.index.get("metadata")
            metadata = {**(known if isinstance(known, dict) else {}), "total_size": size}
            if model is not self.model and "total_parameters" in metadata:
                metadata["total_parameters"] = model.num_parameters()
            data = {
                **self.stored.shards.index,
                "metadata": metadata,
                "weight_map": {key: self._file_of[key] for key in sorted(self._file_of)},
            }
            atomic_write_text(self.output / INDEX_FILE, json.dumps(data, indent=2) + "\n")
        left_out = {CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE, _NOT_BESIDE, *(texts or {})}
        for path in sorted(self.stored.folder.iterdir()):
            name = path.name
            if path.is_file() and name.endswith(_BESIDE) and not name.startswith(".") and name not in left_out:
                if not name.endswith(".index.json"):
                    with atomic_path(self.output / name) as temporary:
                        shutil.copyfile(path, temporary)
        for name, text in (texts or {}).items():
            atomic_write_text(self.output / name, text)
        own = copy.deepcopy(model.config)
        own.architectures = [type(model).__name__]
        data = {**json.loads(own.to_json_string()), **(config or {})}
        atomic_write_text(self.output / CONFIG_FILE, json.dumps(data, indent=2, sort_keys=True) + "\n")
        (self.output / JOURNAL_FILE).unlink()


def check_output(source: str | os.PathLike[str], output: Path) -> None:
    """
    Raises:
        ValueError: `output` is no folder to be made: it is `source`, a file, or holds something other than an unfinished run.
    """
    if output.exists():
        if not output.is_dir():
            raise ValueError(f"`output` {os.fspath(output)!r} is a file; it must be a new folder.")
        if Path(source).exists() and output.samefile(source):
            raise ValueError(
                f"`output` {os.fspath(output)!r} is the folder of the model itself; it must be a new one."
            )
        begun = re.compile(
            re.escape(f".{JOURNAL_FILE}.") + r"[0-9a-f]+\.partial"
        )  # of a process that was killed at once
        others = [path for path in output.iterdir() if not begun.fullmatch(path.name)]
        if others and not (output / JOURNAL_FILE).exists():
            raise ValueError(
                f"`output` {os.fspath(output)!r} exists already, and is no unfinished run of this kind; choose another folder or "
                "remove it."
            )


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """ValueError if another process works on the folder, where the system can tell."""
    with ExitStack() as lock:
        try:
            lock.enter_context(alone(folder, wait=False))
        except BlockingIOError:
            raise ValueError(f"`output` {os.fspath(folder)!r}: another process works on it.") from None
        yield
