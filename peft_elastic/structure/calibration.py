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

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..common.checks import wrong


# What a model may call the tensor whose first dimension counts the sequences, in order of preference.
_MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


def calibration_batches(calibration: Any, max_samples: int | None = None) -> list[dict[str, Any]]:
    """
    Reads calibration data, once, into a list of keyword arguments for the model.

    Args:
        calibration: an iterable of batches (a DataLoader, a list, ...) or a single batch. A batch is a mapping of model
            inputs (dict, BatchEncoding) or a tensor of token ids (sequences, length), int64. A single sequence (length,) is
            a batch of one.
        max_samples: number of sequences to keep; no more batches are drawn than that takes.

    Raises:
        ValueError: there is no data, or a batch is not of that form.
    """
    if calibration is None:
        raise wrong("calibration", "an iterable of batches, e.g. a DataLoader, for this method", None)
    if isinstance(calibration, (torch.Tensor, Mapping)):
        calibration = [calibration]
    if not isinstance(calibration, Iterable) or isinstance(calibration, (str, bytes)):
        raise wrong("calibration", "an iterable of batches", calibration)
    batches: list[dict[str, Any]] = []
    samples = 0
    for item in calibration:
        batch = _as_inputs(item)
        main = _main_input(batch)
        count = batch[main].shape[0]
        if max_samples is not None and samples + count > max_samples:
            keep = max_samples - samples
            batch = {
                key: value[:keep]
                if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == count
                else value
                for key, value in batch.items()
            }
            count = keep
        if batch[main].numel():
            batches.append(batch)
            samples += count
        if max_samples is not None and samples >= max_samples:
            break
    if not batches:
        raise ValueError("calibration: it yielded no data.")
    return batches


def _as_inputs(batch: Any) -> dict[str, Any]:
    if isinstance(batch, (list, tuple)) and len(batch) == 1:  # what a DataLoader over a TensorDataset yields
        batch = batch[0]
    if isinstance(batch, torch.Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise wrong("calibration", "batches that are mappings of model inputs or tensors of token ids", batch)
    batch = dict(batch)
    for key, value in batch.items():
        if not isinstance(value, (torch.Tensor, bool, int, float, type(None))):
            raise ValueError(
                f"calibration: {key!r} of a batch is of type {type(value).__name__}; it must be a tensor (with a tokenizer, "
                "return_tensors='pt'), and entries that are not inputs of the model must be removed."
            )
    if batch[_main_input(batch)].dim() == 1:
        batch = {key: value[None] if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    return batch


def _main_input(batch: dict[str, Any]) -> str:
    tensors = [key for key, value in batch.items() if isinstance(value, torch.Tensor) and value.dim()]
    if not tensors:
        raise ValueError(f"calibration: a batch with the keys {sorted(batch)} holds no tensor.")
    return next((key for key in _MAIN_INPUTS if key in tensors), tensors[0])


def digest_of_batches(batches: list[dict[str, Any]]) -> str:
    """What tells calibration data from other data, wherever it is and of whatever dtype. It is in journals on disk."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            digest.update(name.encode())
            if isinstance(value, torch.Tensor):
                digest.update(f"{tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().double().numpy().tobytes())
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


@contextmanager
def calibration_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients and without key-value caches; every flag is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    caching = [config for config in configs if getattr(config, "use_cache", None) is True]
    try:
        model.eval()
        for config in caching:
            config.use_cache = False
        # Tensors made in inference mode carry no version counter, which the walker reads.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for config in caching:
            config.use_cache = True
