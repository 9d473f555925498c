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
"""Evaluations on disk, so that pruning can be killed at any moment and continued, and other runs on the same model and data find
what they have in common."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from ...common.documents import COUNT, NUMBER, TEXT, MapOf, Nullable, Record
from ...common.journal import Journal
from ...cost.timing import clock
from ...structure.calibration import digest_of_batches
from .metric import Measurement, Metric
from .units import State


_FORMAT = "peft-elastic/structured-pruning"
_VERSION = 1
_ROW = Record(data=TEXT, order=Nullable(TEXT), state=MapOf(COUNT), value=NUMBER, block_passes=NUMBER, seconds=NUMBER)
_SAMPLED = 4096  # elements of each parameter that identify a model


def open_journal(folder: Path, model: nn.Module, batches: list[dict[str, Any]] | None, metric: str) -> Journal:
    """The evaluations in a folder.

    Raises:
        ValueError: if they are of another model, other data or another metric, or cannot be read.
    """
    header = {
        "format": _FORMAT,
        "version": _VERSION,
        "model": _digest_of_model(model),
        "calibration": None if batches is None else digest_of_batches(batches),
        "metric": metric,
    }
    return Journal(folder / "evaluations.jsonl", header, "pruning", _ROW)


class Recalled:
    """A metric whose values are remembered, in a journal if there is one, with the seconds they took on a device."""

    def __init__(
        self, metric: Metric, data: str, order: str, journal: Journal | None, device: torch.device | str = "cpu"
    ) -> None:
        self._now = clock(device)
        self._metric, self._data, self._order, self._journal = metric, data, order, journal
        self._known: dict[tuple[Any, ...], Measurement] = {}
        self._used: set[tuple[Any, ...]] = set()
        for row in [] if journal is None else journal.rows:
            measurement = Measurement(row["value"], row["block_passes"], row["seconds"])
            self._known[_key(row["data"], row["order"], row["state"])] = measurement

    def __call__(self, state: State, trunk: State) -> Measurement:
        order = self._order if any(not key.startswith("depth:") for key in state) else None
        key = _key(self._data, order, state)
        if key in self._used:
            return Measurement(self._known[key].value)
        if key not in self._known:
            start = self._now()
            measured = self._metric(state, trunk)
            seconds = self._now() - start
            self._known[key] = Measurement(measured.value, measured.block_passes, seconds)
            if self._journal is not None:
                row = {"data": self._data, "order": order, "state": dict(state), "value": measured.value}
                self._journal.append({**row, "block_passes": measured.block_passes, "seconds": round(seconds, 4)})
        self._used.add(key)
        return self._known[key]


def _key(data: str, order: str | None, state: State) -> tuple[Any, ...]:
    return (data, order, *sorted(state.items()))


def _digest_of_model(model: nn.Module) -> str:
    """Hexadecimal digest of names, shapes and evenly spaced elements of the parameters."""
    digest = hashlib.sha256()
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = {key: id(parameter) for key, parameter in module._parameters.items() if parameter is not None}
        names = [key for key, parameter in own.items() if parameter not in seen]
        seen.update(own.values())
        with align_module_device(module) if names else nullcontext():  # brings what is offloaded
            for key in names:
                parameter: Any = module._parameters[key]
                digest.update(f"{path}.{key}".lstrip(".").encode())
                digest.update(f" {tuple(parameter.shape)} {parameter.dtype}".encode())
                flat = parameter.detach().flatten()
                sample = flat[:: max(1, flat.numel() // _SAMPLED)].to("cpu", torch.float32)
                digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
