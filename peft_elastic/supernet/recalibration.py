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
"""Statistics of BatchNorm for each subnet of its own.

A subnet that computes with the statistics of the whole model is far worse than it is (METHODS: 27.8% instead of 96.5% of MNIST at half of the
channels), and statistics that are moved on by momentum depend on what was evaluated before. Here they are averaged anew, exactly,
over a fixed list of batches (Once-for-All does so over 2,000 images; BootstrapNAS, AutoML-Conf 2022, adapts them).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import nn

from ..common.calls import batches_of, split_batch
from ..common.checks import check_whole
from ..layers.batch_norm import NarrowedBatchNorm, Statistics, StatisticsSums
from .host import get_elastic_host
from .space import Subnet


# Where a model keeps the statistics of the subnets that were evaluated last.
_CACHE = "_peft_elastic_statistics"
_KEPT = 64


class BatchNormRecalibration:
    """The `prepare=` of a search over a model with BatchNorm: averages the statistics of the active subnet anew, before it is evaluated.

    Called with a model, it runs the batches through it, BatchNorm alone in training mode (dropout stays off), without gradients, and leaves the
    averages in the layers, where evaluation mode takes them from until another subnet is chosen. The model's own statistics, those of the
    largest subnet, stay; for the largest subnet, and a model without BatchNorm, nothing is done. Means are those of the batches' means, and
    variances those of their unbiased variances, both weighted by the number of samples, in float64. They are kept for the last 64 subnets, as long as no weight changes.

    In several processes (torch.distributed) each may have its own share of the batches; there is one reduction for all layers together.

    Args:
        batches: an iterable of batches, read once: images, (images, labels), or dicts of arguments as transformers' models take them. Labels
            are not used.
        max_samples (`int`, *optional*): number of samples to use; BootstrapNAS takes 1,500 in training and 6,000 in its search, Once-for-All 2,000.

    Raises:
        ValueError: if there are no batches; when called, if the model does not take them, or a statistic is not finite.

    Attributes:
        fingerprint (`str`): of the data, by which a search that is continued knows that it is the same.
    """

    def __init__(self, batches: Any, max_samples: Optional[int] = None) -> None:
        check_whole("max_samples", max_samples, least=1, optional=True)
        if batches is None:
            raise ValueError("`batches` must be an iterable of batches of images, got None.")
        self.batches = [_without_labels(batch) for batch in batches_of(batches, max_samples) or ()]
        digest = hashlib.sha256()
        for value in _leaves(self.batches):
            if isinstance(value, torch.Tensor):
                digest.update(f"{tuple(value.shape)} {value.dtype} ".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                digest.update(repr(value).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __call__(self, model: nn.Module) -> None:
        norms = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, NarrowedBatchNorm) and module.running_mean is not None
        }
        if not norms:
            return
        kept = _kept(model)
        key = (get_elastic_host(model).active_subnet, self.fingerprint)
        statistics = kept.get(key)
        if statistics is None:
            statistics = self._averages(model, norms)
            kept[key] = statistics
            while len(kept) > _KEPT:
                kept.popitem(last=False)
        kept.move_to_end(key)
        for name, module in norms.items():
            module.__dict__["statistics"] = statistics[name]

    def _averages(self, model: nn.Module, norms: dict[str, NarrowedBatchNorm]) -> dict[str, Statistics]:
        device = next(model.parameters()).device
        sums = {name: StatisticsSums() for name in norms}
        with _norms_in_training(model, norms), torch.no_grad():
            for name, module in norms.items():
                module.__dict__["sums"] = sums[name]
            try:
                for batch in self.batches:
                    args, kwargs, _ = split_batch(batch, device)
                    try:
                        model(*args, **kwargs)
                    except (RuntimeError, ValueError, TypeError) as error:
                        shapes = [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
                        raise ValueError(f"`batches`: the model does not take a batch with the shapes {shapes}: {error}") from error
            finally:
                for module in norms.values():
                    module.__dict__.pop("sums", None)
        _reduce(sums, norms)
        averages = {}
        for name, total in sums.items():
            if total.mean is None or total.variance is None:
                continue
            mean, variance = total.mean / total.samples, total.variance / total.samples
            if not (torch.isfinite(mean).all() and torch.isfinite(variance).all()):
                raise ValueError(f"`batches`: the statistics of {name!r} are not finite on this data.")
            dtype = norms[name].running_mean.dtype  # type: ignore[union-attr]
            averages[name] = (mean.to(dtype), variance.to(dtype))
        for name in norms.keys() - averages.keys():  # in a block that is skipped
            mean, variance = norms[name].running_mean, norms[name].running_var
            averages[name] = (mean.clone(), variance.clone())  # type: ignore[union-attr]
        return averages


def _without_labels(batch: Any) -> Any:
    args, kwargs, _ = split_batch(batch, torch.device("cpu"))
    return dict(kwargs) if kwargs else args if len(args) > 1 else args[0]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for name in sorted(value):
            yield name
            yield from _leaves(value[name])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _kept(model: nn.Module) -> OrderedDict[tuple[Subnet, str], dict[str, Statistics]]:
    """The statistics that were averaged with the weights that the model has now."""
    version = tuple((id(p), p._version, p.device, p.dtype) for p in model.parameters())
    found = model.__dict__.get(_CACHE)
    if found is None or found[0] != version:
        found = model.__dict__[_CACHE] = (version, OrderedDict())
    return found[1]


@contextmanager
def _norms_in_training(model: nn.Module, norms: dict[str, NarrowedBatchNorm]) -> Iterator[None]:
    """BatchNorm in training mode, all the rest in evaluation mode; afterwards as before."""
    modes = {module: module.training for module in model.modules()}
    # not by `model.eval()`, upon which an elastic model activates its chosen subnet
    for module in modes:
        module.training = False
    for module in norms.values():
        module.training = True
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _reduce(sums: dict[str, StatisticsSums], norms: dict[str, NarrowedBatchNorm]) -> None:
    """Add up the sums of all processes, in one reduction."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    parts = []
    for name, total in sums.items():
        like: Any = norms[name].running_mean
        zeros = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
        parts += [
            torch.tensor([total.samples], dtype=torch.float64, device=like.device),
            zeros if total.mean is None else total.mean,
            zeros if total.variance is None else total.variance,
        ]
    flat = torch.cat(parts)
    torch.distributed.all_reduce(flat)
    split = iter(flat.split([len(part) for part in parts]))
    for total in sums.values():
        samples, mean, variance = next(split), next(split), next(split)
        total.samples = float(samples)
        total.mean, total.variance = (mean, variance) if total.samples else (None, None)
