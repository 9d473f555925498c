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

A subnet that computes with the statistics of the whole model is far worse than it is (METHODS-2: 25.0% instead of 96.5% of MNIST at half of the
channels), and statistics that are moved on by momentum depend on what was evaluated before. Here they are averaged anew, exactly,
over a fixed list of batches (Once-for-All does so over 2,000 images; BootstrapNAS, AutoML-Conf 2022, adapts them).
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import nn

from ..common import ranks
from ..common.calls import batches_of, split_batch
from ..common.checks import check_whole
from ..layers.batch_norm import NarrowedBatchNorm, Statistics, StatisticsSums, is_batch_norm
from ..layers.narrowed import Narrowed
from ..supernet.host import get_elastic_host
from ..supernet.space import Subnet


_KEPT = 64  # subnets whose statistics are kept
_OutOfMemory = torch.OutOfMemoryError  # a RuntimeError, and not the fault of a batch


def recalibrate_batch_norm(model: nn.Module, batches: Any, max_samples: Optional[int] = None) -> None:
    """Average the statistics of BatchNorm anew for what is active in a model.

    Args and errors as of `BatchNormRecalibration`, which also remembers the statistics of subnets.
    """
    BatchNormRecalibration(batches, max_samples).average(model)


class BatchNormRecalibration:
    """The `prepare=` of a search over a model with BatchNorm: averages the statistics of the active subnet anew, before it is evaluated.

    Called with a model, it runs the batches through it, BatchNorm alone in training mode (dropout and drop path stay off), without
    gradients and not compiled, and leaves the averages in the layers, where evaluation mode takes them from until another subnet is
    activated. The modes of all modules are as before then, and so are the model's own statistics, those of the largest subnet. For the
    largest subnet, and in a model without BatchNorm, nothing is done. Means are those of the batches' means, and variances those of their
    unbiased variances, both weighted by the number of samples, in float64: a function of weights, subnet and batches alone.

    The statistics of the last 64 subnets of a model are kept as long as no weight of it changes. Changes are seen by the counter that
    PyTorch has for each tensor, which `parameter.data.add_(...)` goes past.

    In several processes (torch.distributed) that call it together, each may have its own share of the batches; there is one reduction for
    all layers together. In a search with `executor="ranks"`, where each process evaluates another subnet, there is none, and all need the
    same batches.

    Args:
        batches: an iterable of batches, read once: images, (images, labels), or dicts of arguments as transformers' models take them. Labels
            are not used.
        max_samples (`int`, *optional*): number of samples to use; BootstrapNAS takes 1,500 in training and 6,000 in its search, Once-for-All 2,000.

    Raises:
        ValueError: if there are no batches, or none but labels in one; when called, if the model does not take them, a BatchNorm is of a
            kind whose statistics cannot be replaced, or a statistic is not finite. The layers keep what they had then.

    Attributes:
        fingerprint (`str`): of the data, by which a search that is continued knows that it is the same.
    """

    def __init__(self, batches: Any, max_samples: Optional[int] = None) -> None:
        check_whole("max_samples", max_samples, least=1, optional=True)
        if batches is None:
            raise ValueError("`batches` must be an iterable of batches of images, got None.")
        read = batches_of(batches, max_samples, name="batches") or ()
        self.batches = [_without_labels(batch, number) for number, batch in enumerate(read)]
        digest = hashlib.sha256()
        for value in _leaves(self.batches):
            if isinstance(value, torch.Tensor):
                digest.update(f"{tuple(value.shape)} {value.dtype} ".encode())
                digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                digest.update(f"{value!r} ".encode())
        self.fingerprint = digest.hexdigest()[:16]
        self._kept: weakref.WeakKeyDictionary[nn.Module, _Kept] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_kept": weakref.WeakKeyDictionary()}

    def __call__(self, model: nn.Module) -> None:
        norms = _narrowed_norms(model)
        if not norms:
            return
        weights = _weights(model)
        kept = self._kept.get(model)
        if kept is None or not kept.is_of(weights):
            kept = self._kept[model] = _Kept(weights)
        subnet = get_elastic_host(model).active_subnet
        statistics = kept.statistics.get(subnet)
        if statistics is None:
            statistics = kept.statistics[subnet] = self._averages(model, norms)
            if len(kept.statistics) > _KEPT:
                kept.statistics.popitem(last=False)
        kept.statistics.move_to_end(subnet)
        _put(norms, statistics)

    def average(self, model: nn.Module) -> None:
        """As a call, but whatever was averaged before, and also in a model that is narrowed without an `ElasticHost`."""
        norms = _narrowed_norms(model)
        if norms:
            _put(norms, self._averages(model, norms))

    def _averages(self, model: nn.Module, norms: dict[str, NarrowedBatchNorm]) -> dict[str, Statistics]:
        sums = {name: StatisticsSums() for name in norms}
        error: Exception | None = None
        try:
            self._run(model, norms, sums)
        except Exception as caught:  # the others wait in the reduction
            error = caught
        failed = _reduce(sums, norms, error is not None)
        if error is not None:
            raise error
        if failed:
            raise ValueError("`batches`: the recalibration of BatchNorm has failed in another process.")
        averages = {}
        for name, total in sums.items():
            if total.mean is None or total.variance is None:  # in a block that is skipped
                mean, variance = norms[name].running_mean, norms[name].running_var
                averages[name] = (mean.clone(), variance.clone())  # type: ignore[union-attr]
                continue
            dtype = norms[name].running_mean.dtype  # type: ignore[union-attr]
            found = (total.mean / total.samples).to(dtype), (total.variance / total.samples).to(dtype)
            if not all(torch.isfinite(tensor).all() for tensor in found):
                raise ValueError(f"`batches`: the statistics of {name!r} are not finite on this data.")
            averages[name] = found
        return averages

    def _run(self, model: nn.Module, norms: dict[str, NarrowedBatchNorm], sums: dict[str, StatisticsSums]) -> None:
        device = next(model.parameters()).device
        while isinstance(model, nn.parallel.DistributedDataParallel):  # it broadcasts buffers at each call
            model = model.module
        # what is compiled cannot add up
        with _norms_in_training(model, norms), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for name, module in norms.items():
                module.__dict__["sums"] = sums[name]
            try:
                for batch in self.batches:
                    args, kwargs, _ = split_batch(batch, device)
                    try:
                        model(*args, **kwargs)
                    except (RuntimeError, ValueError, TypeError) as error:
                        if isinstance(error, _OutOfMemory):
                            raise
                        shapes = [tuple(v.shape) for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
                        raise ValueError(
                            f"`batches`: the model does not take a batch with the shapes {shapes}: {error}"
                        ) from error
            finally:
                for module in norms.values():
                    module.__dict__.pop("sums", None)


class _Kept:
    """Statistics by subnet, of a model with these weights."""

    def __init__(self, weights: Sequence[torch.Tensor]) -> None:
        self.statistics: OrderedDict[Subnet, dict[str, Statistics]] = OrderedDict()
        self._weights = [(weakref.ref(tensor), _state(tensor)) for tensor in weights]

    def is_of(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether the model still has them, unchanged."""
        return len(weights) == len(self._weights) and all(
            found() is tensor and state is not None and state == _state(tensor)
            for tensor, (found, state) in zip(weights, self._weights)
        )


def _state(tensor: torch.Tensor) -> Any:
    """Equal as long as a tensor has not changed; None if that cannot be told."""
    if tensor.is_inference():  # has no counter
        return None
    return tensor._version, tensor.data_ptr(), tensor.device, tensor.dtype


def _weights(model: nn.Module) -> list[torch.Tensor]:
    """All that the inputs of a BatchNorm depend on: parameters and buffers, but for the running statistics."""
    buffers = [b for module in model.modules() if not is_batch_norm(module) for b in module._buffers.values()]
    return [*model.parameters(), *(buffer for buffer in buffers if buffer is not None)]


def _narrowed_norms(model: nn.Module) -> dict[str, NarrowedBatchNorm]:
    """By name, those that have statistics and are told that the model is narrowed.

    Raises:
        ValueError: if the model is narrowed and another BatchNorm does not know it.
    """
    named = {name: module for name, module in model.named_modules() if is_batch_norm(module)}
    unaware = [name for name, module in named.items() if not isinstance(module, NarrowedBatchNorm)]
    if unaware and any(isinstance(module, Narrowed) for module in model.modules()):
        raise ValueError(
            f"`model` is narrowed, but layer {unaware[0]!r} ({type(named[unaware[0]]).__name__}) has the statistics of the whole model, "
            "which cannot be replaced for a subnet."
        )
    return {
        name: module
        for name, module in named.items()
        if isinstance(module, NarrowedBatchNorm) and module.running_mean is not None
    }


def _put(norms: dict[str, NarrowedBatchNorm], statistics: dict[str, Statistics]) -> None:
    for name, module in norms.items():
        module.__dict__["statistics"] = statistics[name]


def _without_labels(batch: Any, number: int) -> Any:
    args, kwargs, _ = split_batch(batch, torch.device("cpu"))
    if not any(isinstance(value, torch.Tensor) for value in (*args, *kwargs.values())):
        raise ValueError(f"`batches`: batch {number} holds labels alone, no images.")
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


def _reduce(sums: dict[str, StatisticsSums], norms: dict[str, NarrowedBatchNorm], failed: bool) -> bool:
    """Add up the sums of all processes, in one reduction; True if one of them has failed."""
    if not ranks.are_together():
        return failed
    device = next(iter(norms.values())).running_mean.device  # type: ignore[union-attr]
    parts = [torch.tensor([float(failed)], dtype=torch.float64, device=device)]
    for name, total in sums.items():
        like: Any = norms[name].running_mean
        zeros = torch.zeros(like.shape, dtype=torch.float64, device=device)
        parts += [
            torch.tensor([total.samples], dtype=torch.float64, device=device),
            zeros if total.mean is None else total.mean.to(device),
            zeros if total.variance is None else total.variance.to(device),
        ]
    flat = torch.cat(parts)
    torch.distributed.all_reduce(flat)
    any_failed, *rest = flat.split([len(part) for part in parts])
    split = iter(rest)
    for name, total in sums.items():
        home: Any = norms[name].running_mean.device  # type: ignore[union-attr]
        samples, mean, variance = next(split), next(split), next(split)
        total.samples = float(samples)
        total.mean, total.variance = (mean.to(home), variance.to(home)) if total.samples else (None, None)
    return bool(any_failed)
