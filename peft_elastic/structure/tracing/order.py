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
"""How important the channels of a traced model are, and sorting them so that the first ones are the most important."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ...common.calls import split_batch
from ...common.checks import wrong
from ...common.progress import progress_bar
from ...layers.backends.float import permute_parameter
from ..along import Along
from ..importance import Scores, note_orders, noted_orders, order_digest
from ..modules import module_at
from .groups import Runs
from .proof import permutation_of
from .structure import TracedStructure, reads


IMPORTANCES = ("gamma", "activation", "gradient", "magnitude", "none")


def measure_channels(
    model: nn.Module,
    structure: TracedStructure,
    importance: str | Scores,
    batches: Sequence[Any] | None = None,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """The scores of the channels of a model, larger is more important.

    Args:
        model (`nn.Module`): a whole one.
        structure (`TracedStructure`): of `model`.
        importance (`str` or `Mapping`):
            "gamma": |gamma| of the norms of a channel, summed, times the norm of the columns that read it (without data; the
            norm of the filters that make it where there is no BatchNorm or GroupNorm).
            "magnitude": the sum of the absolute weights of the channel in all of its layers (BootstrapNAS' L1, with the readers).
            "activation": the norm of what the channel puts into the layers that read it, over all samples and positions, times the norm of their
            columns.
            "gradient": |sum a dL/da| over positions, root mean square over samples.
            Or your own scores by the name of the channels.
        batches (`list`, *optional*): for "activation" and "gradient": tensors, (images, labels), or dicts of arguments.
        progress (`bool`): show a progress bar.

    Returns:
        `dict[str, torch.Tensor]`: float32 (units,) by the name of the channels.

    Raises:
        ValueError: for an importance that there is not, scores of other channels, or data that is missing or does not fit.
    """
    check_channel_importance(importance, bool(batches))
    if not isinstance(importance, str):
        return _own(structure, importance)
    if importance == "none" or not structure.elastic:
        return {}
    if importance == "magnitude":
        return _magnitudes(model, structure)
    if importance == "gamma":
        return _gammas(model, structure)
    return _measured(model, structure, importance, batches or (), progress)


def check_channel_importance(importance: Any, has_data: bool) -> None:
    """ValueError unless channels can be sorted by this."""
    if isinstance(importance, Mapping):
        return
    if importance not in IMPORTANCES:
        raise wrong("importance", f"one of {list(IMPORTANCES)} for channels, or your own scores", importance)
    if importance in ("activation", "gradient") and not has_data:
        raise ValueError(
            f"`calibration`: importance {importance!r} needs data, an iterable of batches. Without data there are 'gamma', "
            "'magnitude' and 'none'."
        )


def check_channels_along(model: nn.Module, structure: TracedStructure, along: Along) -> None:
    """ValueError unless what belongs to the channels of a model can be moved along."""
    paths = [path for channels in structure.elastic for path in channels.layers]
    along.check(model, paths, order_digest(model), [order_digest(other) for other in along.averaged])


def sort_channels(
    model: nn.Module, structure: TracedStructure, scores: Mapping[str, torch.Tensor], along: Along | None = None
) -> dict[str, torch.Tensor]:
    """Put the channels of a model, and of what goes along with it, into the order of falling scores, in place; it computes what it
    did.

    Returns:
        `dict[str, torch.Tensor]`: the scores in the new order.
    """
    orders = {name: torch.argsort(score, descending=True, stable=True) for name, score in scores.items()}
    along = Along(model) if along is None else along
    with along.following():
        for each in (model, *along.averaged):
            apply_channel_orders(each, structure, orders)
    return {name: score[orders[name]] for name, score in scores.items()}


def moves_of(
    model: nn.Module, structure: TracedStructure, orders: Mapping[str, torch.Tensor]
) -> Iterator[tuple[nn.Module, str, int, torch.Tensor]]:
    """What an order of channels moves: module, name of its tensor, dimension, and where each feature comes from; each tensor once."""
    numbers = {c.name: c.number for c in structure.channels}
    by_number = {numbers[name]: order for name, order in orders.items()}
    done: set[tuple[int, int]] = set()
    for (path, name, dim), runs in structure.sides.items():
        index = permutation_of(runs, by_number)
        if not name or index is None:
            continue
        module = module_at(model, path)
        tensor = module._parameters.get(name, module._buffers.get(name))
        if tensor is None or tensor.shape[dim] == 1 or (id(tensor), dim) in done:
            continue
        done.add((id(tensor), dim))
        yield module, name, dim, index


def apply_channel_orders(model: nn.Module, structure: TracedStructure, orders: Mapping[str, torch.Tensor]) -> None:
    """Put channels into another order: unit i becomes what unit `orders[name][i]` was; noted on the model."""
    moves = list(moves_of(model, structure, orders))
    for module, name, dim, index in moves:
        permute_parameter(module._parameters.get(name, module._buffers.get(name)), dim, index)
    noted = noted_orders(model)
    for name, order in orders.items():
        noted[name] = noted.get(name, torch.arange(len(order)))[order]
    note_orders(model, noted)


# -- scores ------------------------------------------------------------------------------------------------------------


def _own(structure: TracedStructure, scores: Scores) -> dict[str, torch.Tensor]:
    units = {channels.name: channels.units for channels in structure.elastic}
    own = {name: torch.as_tensor(score).detach().float().cpu() for name, score in scores.items()}
    for name, score in own.items():
        if name not in units:
            raise ValueError(f"`importance` has scores for {name!r}; the names of this model are {sorted(units)}.")
        if score.shape != (units[name],) or not torch.isfinite(score).all():
            raise ValueError(
                f"`importance`: the scores of {name!r} must be {units[name]} finite numbers, got shape {tuple(score.shape)}."
            )
    return own


def _add(totals: dict[int, torch.Tensor], runs: Runs, features: torch.Tensor) -> None:
    """Add one number for each feature of a dimension to those of the units they are of."""
    start = 0
    for run in runs:
        group = run.root
        if group is not None:
            part = features[start : start + run.length].double().view(group.units, -1).sum(1).cpu()
            totals[group.number] = totals[group.number] + part if group.number in totals else part
        start += run.length


def _other_dims(tensor: torch.Tensor, dim: int) -> list[int]:
    return [d for d in range(tensor.dim()) if d != dim]


def _magnitudes(model: nn.Module, structure: TracedStructure) -> dict[str, torch.Tensor]:
    totals: dict[int, torch.Tensor] = {}
    for (path, name, dim), runs in structure.sides.items():
        tensor = module_at(model, path)._parameters.get(name)
        if tensor is not None and tensor.shape[dim] > 1:
            others = _other_dims(tensor, dim)
            absolute = tensor.detach().abs().double()
            _add(totals, runs, absolute.sum(others) if others else absolute)
    return _named(structure, totals)


def _column_squares(layer: Any, name: str, dim: int) -> torch.Tensor:
    """The squared norms of the columns that read each channel, float64."""
    weight = layer._parameters[name].detach().double()
    squares: torch.Tensor = weight.square().sum(_other_dims(weight, dim))
    return squares


def _gammas(model: nn.Module, structure: TracedStructure) -> dict[str, torch.Tensor]:
    scales: dict[int, torch.Tensor] = {}
    filters: dict[int, torch.Tensor] = {}
    readers: dict[int, torch.Tensor] = {}
    for (path, name, dim), runs in structure.sides.items():
        layer: Any = module_at(model, path)
        tensor = layer._parameters.get(name)
        if tensor is None:
            continue
        if reads(layer, name, dim):
            _add(readers, runs, _column_squares(layer, name, dim))
        elif (
            name == "weight"
            and tensor.dim() == 1
            and isinstance(layer, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm))
        ):
            _add(scales, runs, tensor.detach().abs())
        elif name == "weight" and tensor.dim() > 1:
            _add(filters, runs, _column_squares(layer, name, dim))
    totals = {}
    for channels in structure.elastic:
        number = channels.number
        made = scales.get(number)
        made = filters[number].sqrt() if made is None and number in filters else made
        read = readers[number].sqrt() if number in readers else None
        factors = [factor for factor in (made, read) if factor is not None]
        totals[number] = torch.stack(factors).prod(0) if factors else torch.zeros(channels.units)
    return _named(structure, totals)


def _named(structure: TracedStructure, totals: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {c.name: totals[c.number].float() for c in structure.elastic if c.number in totals}


def _measured(
    model: nn.Module, structure: TracedStructure, importance: str, batches: Sequence[Any], progress: bool
) -> dict[str, torch.Tensor]:
    readers = {
        (path, name, dim): runs
        for (path, name, dim), runs in structure.sides.items()
        if reads(module_at(model, path), name, dim)
    }
    totals: dict[int, torch.Tensor] = {}
    samples = 0
    device = next(model.parameters()).device
    with _evaluating(model), ExitStack() as hooks:
        inputs: dict[str, list[torch.Tensor]] = {}

        def note(path: str) -> Any:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> Any:
                source = (*args, *kwargs.values())[0]
                if importance == "gradient" and not source.requires_grad:
                    source = source.detach().requires_grad_()
                    inputs.setdefault(path, []).append(source)
                    return (source, *args[1:]), kwargs if args else {next(iter(kwargs)): source}
                inputs.setdefault(path, []).append(source)
                return None

            return hook

        for path in {path for path, _, _ in readers}:
            hooks.enter_context(module_at(model, path).register_forward_pre_hook(note(path), with_kwargs=True))
        for batch in progress_bar(batches, desc="importance", unit="batch", disable=not progress):
            inputs.clear()
            args, kwargs, labels = split_batch(batch, device)
            count = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)).shape[0]
            samples += count
            if importance == "activation":
                with torch.no_grad():
                    model(*args, **kwargs)
                for (path, name, dim), runs in readers.items():
                    layer = module_at(model, path)
                    for source in inputs.get(path, ()):
                        _add(
                            totals,
                            runs,
                            _features(layer, source.square()).sum((0, 1)) * _column_squares(layer, name, dim),
                        )
                continue
            with torch.enable_grad():
                loss = _loss(model, args, kwargs, labels)
                tensors = [tensor for found in inputs.values() for tensor in found]
                gradients = iter(torch.autograd.grad(loss * count, tensors, materialize_grads=True))
            for path, found in inputs.items():
                changes = [_features(module_at(model, path), (t.detach() * next(gradients))).sum(1) for t in found]
                for (other, _, _), runs in readers.items():
                    if other == path:
                        for change in changes:
                            _add_squares(totals, runs, change)
    if not totals:
        raise ValueError("`calibration`: the model does not use its channels on this data.")
    return _named(
        structure, {n: (total / (samples if importance == "gradient" else 1)).sqrt() for n, total in totals.items()}
    )


def _add_squares(totals: dict[int, torch.Tensor], runs: Runs, change: torch.Tensor) -> None:
    """Add the squares of the first-order changes (samples, features) of whole units."""
    start = 0
    for run in runs:
        group = run.root
        if group is not None:
            part = change[:, start : start + run.length].double().view(len(change), group.units, -1).sum(2)
            squares = part.square().sum(0).cpu()
            totals[group.number] = totals[group.number] + squares if group.number in totals else squares
        start += run.length


def _features(layer: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """What a layer reads, as (samples, positions, features)."""
    if isinstance(layer, nn.Linear):
        return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])
    return tensor.flatten(2).transpose(1, 2)


def _loss(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Any) -> torch.Tensor:
    if labels is None:
        raise ValueError(
            "`calibration`: importance 'gradient' needs batches with labels: (images, labels), or dicts with `labels`."
        )
    result = model(*args, **kwargs)
    logits = getattr(result, "logits", result)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise ValueError(
            f"`model` ({type(model).__name__}) gives no logits (samples, classes), which importance 'gradient' needs."
        )
    return F.cross_entropy(logits, labels)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    # `nn.Module.eval`: an elastic model would choose a subnet
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
