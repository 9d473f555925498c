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
"""The importance of heads and channels, and sorting by it, of models that are larger than memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.writing import writing
from .blocks import Structure
from .calibration import calibration_batches, digest_of_batches
from .folder_run import FolderRun
from .importance import (
    IMPORTANCES,
    Parts,
    Scores,
    check_calibration,
    check_importance,
    check_sortable,
    find_widths,
    measure_importance,
    measured_layers,
    note_orders,
)
from .parts import KINDS, Width
from .residence import StoredResidence, Work
from .rewriting import Takes, rewritten, takes_of
from .stored_model import StoredModel


def importance_of_folder(
    source: str | os.PathLike[str],
    importance: str = "activation",
    calibration: Any = None,
    *,
    kinds: tuple[str, ...] = KINDS,
    max_samples: int | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    scratch: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """
    Measures how important the attention heads and MLP channels of a model are that is larger than memory, block by block from its
    folder. The scores are bit for bit those by which `sort_by_importance` sorts.

    In memory are what is outside of the blocks (the embeddings), at most two blocks, and the activations of the calibration data
    between two blocks; with "magnitude" one block.

    Args:
        source: a folder with the config.json of a model of transformers and its weights in safetensors files, in floating point.
        importance: "activation" or "magnitude", see `sort_by_importance`. ("gradient" needs the whole model in memory.)
        calibration: as in `sort_by_importance`, for "activation".
        kinds: "heads", "mlp" or both.
        max_samples: number of calibration sequences to use.
        dtype: to compute in: "auto" is that of the checkpoint, as in `from_pretrained`; or "float32", "bfloat16", "float16".
        device: where a block is computed.
        scratch: a folder on whose disk the activations between two blocks are kept meanwhile; by default they are in memory.
        progress: whether to show a progress bar.

    Returns:
        the scores by the name of each order, float32 (units,), in the order of the model. `sort_folder`, `sort_by_importance` and
        the `order` of structured pruning take them.

    Raises:
        ValueError: as of `sort_by_importance` and `prune_folder`.
        OSError: the activations cannot be written.

    Example:
        >>> scores = importance_of_folder("llama-70b", "activation", calibration=loader)
    """
    check_importance(importance, kinds)
    if not isinstance(importance, str) or importance == "none":
        raise ValueError(
            f"`importance` must be 'activation' or 'magnitude', which are measured; got {importance!r:.80}."
        )
    batches = _batches(importance, calibration, max_samples)
    stored = StoredModel(source, dtype)
    widths = _sortable_widths(stored.model, kinds)
    residence = StoredResidence(stored, torch.device(device), _Looking())
    with _activations_in(scratch) as residence.scratch, residence.attached():
        return measure_importance(stored.model, widths, importance, batches, progress=progress)


def sort_folder(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    importance: str | Scores = "activation",
    calibration: Any = None,
    *,
    kinds: tuple[str, ...] = KINDS,
    max_samples: int | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    activations_on_disk: bool = False,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """
    Does what `sort_by_importance` and `save_pretrained` do with a model that is larger than memory, from folder to folder. The
    weights and the configuration are the same, bit for bit.

    Memory, interruptions and files are as in `prune_folder`: first the importance is measured block by block, and then the files
    are written one after the other. An interrupted run goes on with the block, or the file, where it was.

    Args:
        source: the folder of the model, in floating point. It is not changed.
        output: a new folder, or that of an interrupted run. What lies beside the weights (tokenizer, generation settings) is copied.
        importance: "activation", "magnitude", or your own scores, as in `sort_by_importance`.
        calibration: as in `sort_by_importance`. A run that goes on has to be given the same.
        kinds: "heads", "mlp" or both.
        max_samples: number of calibration sequences to use.
        dtype: to compute and to save in, as in `prune_folder`.
        device: where a block is computed.
        activations_on_disk: whether the activations between two blocks are kept in files in `output`, which are removed at the end,
            and not in memory.
        progress: whether to show a progress bar.

    Returns:
        as `sort_by_importance`: the scores by the name of each order, float32 (units,), in the new order.

    Raises:
        ValueError: as of `sort_by_importance` and `prune_folder`.
        OSError: a file cannot be written.

    Example:
        >>> sort_folder("llama-70b", "sorted", "activation", calibration=loader)
    """
    check_importance(importance, kinds)
    if isinstance(importance, str) and importance == "none":
        raise ValueError(
            "`importance` must be 'activation', 'magnitude' or your own scores, got 'none', which sorts nothing."
        )
    batches = _batches(importance, calibration, max_samples)
    settings = {
        "importance": importance if isinstance(importance, str) else _digest(importance),
        "kinds": list(kinds),
        "calibration": batches and digest_of_batches(batches),
    }
    run = FolderRun(
        source, output, "sorting", settings, dtype=dtype, device=device, activations_on_disk=activations_on_disk
    )
    model = run.model
    widths = _sortable_widths(model, kinds)
    parts: Parts = {}
    layers: dict[str, nn.Module] = {}
    scores: dict[str, torch.Tensor] = {}
    if isinstance(importance, str):
        layers = measured_layers(model, widths, importance)
    else:
        scores = measure_importance(model, widths, importance)  # refuses what is not of this model
    takes: Takes = {name: {} for name in takes_of(model, widths, _as_they_are(widths))}
    files = rewritten(run.stored, model, {name: name for name in model.state_dict()}, takes)

    def measured(unit: dict[str, nn.Module]) -> tuple[dict[str, torch.Tensor], list[Any]]:
        rows = [
            {
                "name": path,
                "parts": {side: parts[path, side].tolist() for side in ("out", "in") if (path, side) in parts},
            }
            for path in unit
        ]
        return {}, rows

    new: dict[str, dict[str, Any]] = {path: {} for path in layers}
    with run.working(new, {}, before=lambda name: None, after=measured, files=files):
        for row in run.rows_of(run.done):
            parts |= {(row["name"], side): torch.tensor(values) for side, values in row["parts"].items()}
        if isinstance(importance, str):
            scores = measure_importance(model, widths, importance, batches, progress=progress, parts=parts)
        orders = {name: torch.argsort(score, descending=True, stable=True) for name, score in scores.items()}
        for name, take in takes_of(model, widths, orders).items():
            takes[name].update(take)
        note_orders(model, orders)
        run.finish(progress=progress)
    return {name: score[orders[name]] for name, score in scores.items()}


def _batches(importance: str | Scores, calibration: Any, max_samples: int | None) -> list[dict[str, Any]] | None:
    """The data that an importance is measured on, None for one that needs none.

    Raises:
        ValueError: there is no data, or the importance is not allowed.
    """
    if not isinstance(importance, str) or importance == "magnitude":
        return None
    if importance == "gradient":
        raise ValueError(
            "`importance` 'gradient' needs a backward pass through the whole model, which is not there block by block; use 'activation' "
            "or 'magnitude', or the model in memory (`sort_by_importance`)."
        )
    if importance not in IMPORTANCES:
        raise ValueError(f"`importance` must be 'activation', 'magnitude' or your own scores, got {importance!r}.")
    check_calibration(importance, calibration)
    return calibration_batches(calibration, max_samples)


def _sortable_widths(model: nn.Module, kinds: tuple[str, ...]) -> list[Width]:
    widths = find_widths(model, Structure(model), kinds)
    check_sortable(model, widths)
    return widths


def _as_they_are(widths: list[Width]) -> dict[str, torch.Tensor]:
    return {order.name: torch.arange(width.units) for width in widths for order in width.orders}


def _digest(scores: Mapping[str, Any]) -> str:
    """What tells scores from others, whatever they are in."""
    own = {name: torch.as_tensor(score).tolist() for name, score in sorted(scores.items())}
    return f"scores-{hashlib.sha256(json.dumps(own).encode()).hexdigest()[:16]}"


@contextmanager
def _activations_in(folder: str | os.PathLike[str] | None) -> Iterator[Path | None]:
    """A folder for activations in this one, which exists meanwhile."""
    if folder is None:
        yield None
        return
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".activations-", dir=folder))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Looking(Work):
    """Layers are looked at, and not changed."""

    def is_done(self, layers: dict[str, nn.Module]) -> bool:
        return False

    def before(self, layers: dict[str, nn.Module]) -> None:
        pass

    def after(self, layers: dict[str, nn.Module]) -> None:
        pass
