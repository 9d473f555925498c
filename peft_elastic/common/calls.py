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
"""What a model is called with: images, (images, labels), or a dict of arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from .checks import wrong


def as_arguments(inputs: Any, name: str = "example_inputs") -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Positional and named arguments of a call; `name` is that of the argument, for the message.

    Raises:
        ValueError: unless `inputs` is a tensor, a tuple or list with one, or a dict of arguments with one.
    """
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, (tuple, list)) and any(isinstance(value, torch.Tensor) for value in inputs):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping) and any(isinstance(value, torch.Tensor) for value in inputs.values()):
        return (), inputs
    raise wrong(name, "a tensor, or a tuple or dict of the arguments of a call, with a tensor", inputs)


def split_batch(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """(positional arguments, named ones, labels or None) of a batch: images, (images, labels), or a dict."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    if isinstance(batch, Mapping):
        kwargs = {name: moved(value) for name, value in batch.items() if name != "labels"}
        return (), kwargs, moved(batch.get("labels"))
    if (
        isinstance(batch, (tuple, list))
        and len(batch) == 2
        and all(isinstance(value, torch.Tensor) for value in batch)
    ):
        images, labels = batch
        if not labels.is_floating_point() and labels.dim() <= 1:
            return (moved(images),), {}, moved(labels)
    args, named = as_arguments(batch)
    return tuple(moved(value) for value in args), {name: moved(value) for name, value in named.items()}, None


def batches_of(calibration: Any, max_samples: int | None = None, name: str = "calibration") -> list[Any] | None:
    """A list of batches of images, whose first tensors have `max_samples` samples at most; `name` is that of the argument, for messages.

    Raises:
        ValueError: if there are none, or one is neither a tensor, nor (images, labels), nor a dict.
    """
    if calibration is None:
        return None
    if isinstance(calibration, (torch.Tensor, Mapping)):
        calibration = [calibration]
    if isinstance(calibration, (str, bytes)) or not isinstance(calibration, Iterable):
        raise wrong(name, "an iterable of batches of images", calibration)
    batches: list[Any] = []
    samples = 0
    for batch in calibration:
        args, kwargs = as_arguments(batch, name)
        count = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)).shape[0]
        if max_samples is not None and samples + count > max_samples:
            keep = max_samples - samples
            batch = (
                {
                    k: v[:keep] if isinstance(v, torch.Tensor) and v.shape[:1] == (count,) else v
                    for k, v in batch.items()
                }
                if isinstance(batch, Mapping)
                else batch[:keep]
                if isinstance(batch, torch.Tensor)
                else type(batch)(v[:keep] if isinstance(v, torch.Tensor) else v for v in batch)
            )
            count = keep
        if count:
            batches.append(batch)
            samples += count
        if max_samples is not None and samples >= max_samples:
            break
    if not batches:
        raise ValueError(f"`{name}` must have at least one sample, it yielded none.")
    return batches
