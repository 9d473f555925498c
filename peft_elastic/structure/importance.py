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
"""How important heads and MLP channels are, and sorting them so that the first ones are the most important.

A narrowed layer keeps its first units, so slices are only as good as the order (docs/results.md has the perplexities).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..common.parameters import check_here, check_parameters
from ..common.progress import progress_bar
from ..layers.backends import backend_of, find_backend
from ..layers.backends.bitsandbytes import unpack
from .along import Along
from .blocks import Structure
from .calibration import calibration_batches, calibration_mode
from .features import layer_at, layer_sizes, permute
from .inputs import InputCollector, is_encoder_decoder, is_language_model, own_labels
from .narrow import is_narrowed
from .parts import KINDS, Slot, Width
from .reading import Reading
from .residence import residence_of
from .sequential import BlockWalker, LayerWalker
from .stored_model import is_stored


# What is known of a model as it is, on the spot.
MEASURED = ("activation", "gradient", "magnitude", "none")
IMPORTANCES = ("activation", "gradient", "magnitude", "movement", "none")
# Where a sorted model keeps, by the name of each `Order`, which unit of the original model each unit is.
ORDER_ATTRIBUTE = "_peft_elastic_order"
# Where the configuration of a sorted model says which order that is, so that a checkpoint of it is not sorted once more.
ORDER_SETTING = "peft_elastic_order"
# Where a model keeps, by the name of each `Order`, the scores that were learned in a training, of its units as they are now.
_SCORES_ATTRIBUTE = "_peft_elastic_movement"

# What a user may give as scores: by the name of the block (MLP channels), or attention or stack (heads), one number for each
# unit, or a function of it.
Scores = Mapping[str, torch.Tensor]


class HasWidth(Protocol):
    """Heads or channels that are narrowed together."""

    @property
    def key(self) -> str:
        """Of their choice in a subnet."""

    @property
    def full(self) -> int:
        """How many there are."""


class HasWidths(Protocol):
    """A structure of blocks or of channels."""

    @property
    def widths(self) -> Sequence[HasWidth]:
        """All that can be narrowed."""


# By the path of a layer and its side, what it contributes to the score of each unit, float32 (units,).
Parts = dict[tuple[str, str], torch.Tensor]


def sort_by_importance(
    model: nn.Module,
    importance: str | Scores = "activation",
    calibration: Any = None,
    *,
    kinds: tuple[str, ...] = ("heads", "mlp"),
    max_samples: int | None = None,
    progress: bool = True,
    optimizer: Any = None,
    averaged: Any = None,
) -> dict[str, torch.Tensor]:
    """Sort the attention heads (whole key-value groups) and MLP channels of every block by falling importance, in place.

    The model stays the same function, up to the order of its sums; adapters on it are sorted along. Then `elastic_width` and
    structured pruning, which keep the first heads and channels, keep the most important ones.

    Args:
        model (`nn.Module`): a transformers model, or a `PeftModel`.
        importance (`str` or `Mapping`):
            "activation": ||x_j|| ||W_j||, the norm over all calibration tokens of what channel j (or a column of head j) puts
            into the layer that reads it, times the norm of the column of that layer; of a head, the root of the sum of squares
            over its columns. (The criterion of Wanda, https://huggingface.co/papers/2306.11695, summed over outputs.)
            "gradient": |sum_tokens a_j dL/da_j|, the first-order change of the loss when the channel or head is removed, root
            mean square over sequences (https://huggingface.co/papers/1906.10771, equation 8; needs the loss of the model:
            batches with `labels`, or a causal language model).
            "magnitude": the sum of the absolute weights of the unit in all of its layers, without data.
            "movement": the scores that a training with `MovementCallback` has learned, or that `load_scores` has read.
            "none": nothing is sorted.
            Or your own scores, a tensor (units,) by the name of each of `Structure(model).widths[...].orders`; larger is more
            important, and what is left out stays as it is.
        calibration: an iterable of batches, for "activation" and "gradient"; as in `prune`.
        kinds (`tuple[str, ...]`): "heads", "mlp" or both.
        max_samples (`int`, *optional*): number of calibration sequences to use.
        progress (`bool`): show a progress bar.
        optimizer (*optional*): a `torch.optim.Optimizer` of the model, wrapped by accelerate or not, or a list of some, whose state
            moves along, so that the training goes on as if nothing had been sorted: every tensor of the shape of its parameter
            (momentum, moments of Adam), and factored ones (Adafactor). Gradients always move along.
        averaged (*optional*): an average of the weights (`torch.optim.swa_utils.AveragedModel`), or another copy of the model, in the
            same order, or a list of some, which are sorted in the same way.

    Returns:
        `dict[str, torch.Tensor]`: the scores by the name of each order, float32 (units,), in the new order.

    Raises:
        ValueError: if an argument is not allowed, or a weight cannot be sorted (packed or quantised by another library, not in
            memory), or the state of the optimizer cannot be moved (quantised, spread over processes, of a shape that does not say
            what belongs to which row), before anything is changed.
    """
    check_importance(importance, kinds)
    model, structure, along = _ready_to_sort(model, optimizer, averaged)
    if isinstance(importance, str) and importance == "none":
        return {}
    widths = _sortable_widths(model, structure, kinds, along)
    if isinstance(importance, Mapping):  # scores of both kinds may be given where one of them is sorted
        others = {order.name for width in structure.widths if width.kind not in kinds for order in width.orders}
        importance = {name: score for name, score in importance.items() if name not in others}
    scores = measure_importance(model, widths, importance, calibration, max_samples=max_samples, progress=progress)
    orders = {name: torch.argsort(score, descending=True, stable=True) for name, score in scores.items()}
    apply_orders(model, widths, orders, along)
    return {name: score[orders[name]] for name, score in scores.items()}


def check_sort(
    model: nn.Module,
    importance: str | Scores,
    calibration: Any = None,
    *,
    kinds: tuple[str, ...] = ("heads", "mlp"),
    optimizer: Any = None,
    averaged: Any = None,
) -> None:
    """ValueError if `sort_by_importance` would refuse these arguments before it runs the model, or would do nothing with them."""
    check_importance(importance, kinds)
    model, structure, along = _ready_to_sort(model, optimizer, averaged)
    if isinstance(importance, str) and importance == "none":
        raise ValueError(
            f"`importance` is 'none', by which nothing is sorted: choose one of {list(IMPORTANCES[:-1])}."
        )
    widths = _sortable_widths(model, structure, kinds, along)
    if importance in ("activation", "gradient"):
        check_calibration(str(importance), calibration)
    elif importance == "movement":
        _learned_scores(model, widths)


def _ready_to_sort(model: nn.Module, optimizer: Any, averaged: Any) -> tuple[nn.Module, Structure, Along]:
    model = getattr(model, "get_base_model", lambda: model)()
    if is_narrowed(model):
        raise ValueError("A part of `model` is not active; choose the widest subnet first, `model.set_subnet('max')`.")
    along = Along(model, optimizer, averaged)
    return model, Structure(model), along


def _sortable_widths(model: nn.Module, structure: Structure, kinds: tuple[str, ...], along: Along) -> list[Width]:
    check_here("the model", model.parameters())
    widths = find_widths(model, structure, kinds)
    check_sortable(model, widths)
    paths = [slot.path for width in widths for slot in width.slots]
    along.check(model, paths, order_digest(model), [order_digest(other) for other in along.averaged])
    return widths


def check_importance(importance: Any, kinds: tuple[str, ...]) -> None:
    """ValueError unless these are allowed arguments of `sort_by_importance`."""
    if not isinstance(importance, (str, Mapping)):
        raise ValueError(f"`importance` must be one of {list(IMPORTANCES)} or your own scores, got {importance!r}.")
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"`kinds` must be {list(KINDS)} or one of them, got {kinds!r}.")


def find_widths(model: nn.Module, structure: Structure, kinds: tuple[str, ...]) -> list[Width]:
    """The widths of a model of these kinds.

    Raises:
        ValueError: there are none.
    """
    widths = [width for width in structure.widths if width.kind in kinds]
    if not widths:
        raise ValueError(f"`model` ({type(model).__name__}) has no block whose {' or '.join(kinds)} are known.")
    return widths


def measure_importance(
    model: nn.Module,
    widths: list[Width],
    importance: str | Scores,
    calibration: Any = None,
    *,
    max_samples: int | None = None,
    progress: bool = True,
    parts: Parts | None = None,
) -> dict[str, torch.Tensor]:
    """The scores by the name of each `Order`, float32 (units,). Arguments and errors as in `sort_by_importance`.

    Args:
        parts (*optional*): of "activation" and "magnitude", what each layer contributes, as soon as it is known; layers whose
            contributions are in it already are done by the residence of the model.
    """
    if not isinstance(importance, str):
        return _own_scores(widths, importance)
    if importance not in IMPORTANCES:
        raise ValueError(f"`importance` must be one of {list(IMPORTANCES)} or your own scores, got {importance!r}.")
    if importance == "movement":
        return _learned_scores(model, widths)
    parts = {} if parts is None else parts
    if importance == "magnitude":
        _absolute_weights(model, widths, parts, progress)
        return _for_each_order(widths, parts, all_slots=True)
    check_calibration(importance, calibration)
    batches = calibration_batches(calibration, max_samples)
    if importance == "activation":
        _products(model, widths, batches, parts, progress)
    else:
        parts |= {(path, "in"): part for path, part in _sensitivities(model, batches, widths, progress).items()}
    summed = _for_each_order(widths, parts, all_slots=False)
    return {name: total.sqrt() for name, total in summed.items()}


def check_calibration(importance: str, calibration: Any) -> None:
    """ValueError without data for an importance that needs some."""
    if calibration is None:
        raise ValueError(
            f"`calibration`: importance {importance!r} needs data, an iterable of batches. Without data there are "
            "'magnitude' and 'none'."
        )


def measured_layers(model: nn.Module, widths: list[Width], importance: str) -> dict[str, nn.Module]:
    """The layers that "activation" or "magnitude" look at, by their paths, in the order of the modules of the model."""
    wanted = {slot.path for width in widths for slot in width.slots if importance == "magnitude" or slot.side == "in"}
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return {path: layer_at(model, path) for path in sorted(wanted, key=lambda path: places.get(path, len(places)))}


def check_sortable(model: nn.Module, widths: list[Width]) -> None:
    """ValueError if a layer of these widths cannot be put into another order."""
    for width in widths:
        for slot in width.slots:
            layer = layer_at(model, slot.path)
            check_parameters({slot.path: layer})
            backend = find_backend(layer)
            obstacle = "whose weight is of no known form." if backend is None else backend.obstacle("sort")
            if obstacle:
                raise ValueError(f"`importance`: {slot.path!r} is of type {type(layer).__name__}, {obstacle}")
            if not is_stored(model) and layer.get_parameter("weight").is_meta:
                raise ValueError(
                    f"`importance`: the weight of {slot.path!r} is not in memory. Load the model without `device_map`, or go through "
                    "its folder block by block (`sort_folder`)."
                )


def check_order(model: nn.Module, structure: HasWidths, importance: str | None, subnet: Mapping[str, int]) -> None:
    """ValueError if a subnet keeps the first heads or channels of a model in which those are any.

    Args:
        model: the base model.
        structure: of `model`.
        importance: of the configuration; "none" for a model that somebody has sorted already.
        subnet: the values of its structural choices, and others.
    """
    if importance == "none" or noted_orders(model):
        return
    narrow = [width.key for width in structure.widths if subnet.get(width.key, width.full) != width.full]
    if narrow:
        raise ValueError(
            f"{narrow[0]!r} would keep the first of heads or channels that are not sorted by importance, which destroys the "
            f"model. Call `model.sort_by_importance(calibration)` first (`importance={importance!r}`), or set "
            "`importance='none'` if the base is sorted already."
        )


def apply_orders(
    model: nn.Module, widths: list[Width], orders: Mapping[str, torch.Tensor], along: Along | None = None
) -> None:
    """Put units into another order: unit i becomes what unit `orders[name][i]` was. Adapters are moved along, and `along`, which
    has been checked; and each model notes which unit of the original each one is now."""
    if along is None:
        _apply_to(model, widths, orders)
        return
    with along.following():
        for each in (model, *along.averaged):
            _apply_to(each, widths, orders)


def _apply_to(model: nn.Module, widths: list[Width], orders: Mapping[str, torch.Tensor]) -> None:
    noted = noted_orders(model)
    learned = noted_scores(model)
    for width in widths:
        for order in width.orders:
            if order.name not in orders:
                continue
            permutation = orders[order.name]
            for slot in order.slots:
                permute(model.get_submodule(slot.path), slot.side, slot.index(permutation))
            before = noted.get(order.name, torch.arange(width.units))
            noted[order.name] = before[permutation]
            if order.name in learned:
                learned[order.name] = learned[order.name][permutation]
    note_orders(model, noted)
    note_scores(model, learned)


def note_orders(model: nn.Module, orders: Mapping[str, torch.Tensor]) -> None:
    """Note that the units of a model are in these orders."""
    settings = _settings(model)
    settings.pop(ORDER_SETTING, None)
    model.__dict__.pop(ORDER_ATTRIBUTE, None)
    if orders:
        model.__dict__[ORDER_ATTRIBUTE] = dict(orders)
        settings[ORDER_SETTING] = digest_of(orders)


def is_stored_in(model: nn.Module, orders: Mapping[str, torch.Tensor]) -> bool:
    """Whether a model that has no notes comes from a checkpoint that was saved in these orders.

    Raises:
        ValueError: if it was saved in other ones.
    """
    digest = _settings(model).get(ORDER_SETTING)
    if digest is None or ORDER_ATTRIBUTE in model.__dict__:
        return False
    if orders and digest != digest_of(orders):
        raise ValueError(
            "The heads and channels of the model were sorted when it was saved, in another order than this adapter needs. Load "
            "the adapter on the model that it was trained with."
        )
    return True


def _settings(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    return config.__dict__ if isinstance(config, PreTrainedConfig) else {}


def digest_of(orders: Mapping[str, torch.Tensor]) -> str:
    """What tells these orders from others."""
    lines = [f"{name} {order.tolist()}" for name, order in sorted(orders.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def noted_orders(model: nn.Module) -> dict[str, torch.Tensor]:
    """Which unit of the original model each unit is now, int64 (units,), by the name of the order; empty for an unsorted
    model."""
    return dict(model.__dict__.get(ORDER_ATTRIBUTE, {}))


def order_digest(model: nn.Module) -> str | None:
    """What tells the order that the units of a model are in from others; None for that of the original model."""
    orders = noted_orders(model)
    return digest_of(orders) if orders else _settings(model).get(ORDER_SETTING)


def note_scores(model: nn.Module, scores: Mapping[str, torch.Tensor]) -> None:
    """Note what a training has learned of the importance of the units of a model: float32 (units,) by the name of each order."""
    model.__dict__.pop(_SCORES_ATTRIBUTE, None)
    if scores:
        model.__dict__[_SCORES_ATTRIBUTE] = dict(scores)


def noted_scores(model: nn.Module) -> dict[str, torch.Tensor]:
    """What `note_scores` noted, of the units as they are now; empty if there is nothing."""
    return dict(model.__dict__.get(_SCORES_ATTRIBUTE, {}))


def check_orders(structure: Reading, orders: Mapping[str, torch.Tensor]) -> None:
    """ValueError if these orders name something that a model does not have, or not with that many units."""
    units = {order.name: width.units for width in structure.widths for order in width.orders}
    for name, order in orders.items():
        if sorted(order.tolist()) != list(range(units.get(name, -1))):
            raise ValueError(f"The order of {name!r} does not belong to this model.")


def reorder(model: nn.Module, wanted: Mapping[str, torch.Tensor]) -> None:
    """Bring a model, sorted or not, and the adapters on it into noted orders; those that are not named into the original one.

    Raises:
        ValueError: if `wanted` names something that the model does not have, or not with that many units.
    """
    structure = Structure(model)
    check_orders(structure, wanted)
    widths = structure.widths
    units = {order.name: width.units for width in widths for order in width.orders}
    moves = {}
    noted = noted_orders(model)
    for name, number in units.items():
        identity = torch.arange(number)
        now, then = noted.get(name, identity), wanted.get(name, identity)
        if not torch.equal(now, then):
            moves[name] = torch.argsort(now)[then]
    if moves:
        check_sortable(model, [width for width in widths if any(order.name in moves for order in width.orders)])
        apply_orders(model, widths, moves)
    note_orders(model, wanted)


def same_orders(model: nn.Module, orders: Mapping[str, torch.Tensor]) -> bool:
    """Whether the units of a model are in these noted orders."""
    noted = noted_orders(model)
    return noted.keys() == orders.keys() and all(torch.equal(noted[name], order) for name, order in orders.items())


def _moves(
    model: nn.Module, before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]
) -> dict[str, list[tuple[str, torch.Tensor]]]:
    """What brings weights from noted orders into others: path of a layer -> (side, where each feature comes from)."""
    found: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for width in Structure(model).widths:
        identity = torch.arange(width.units)
        for order in width.orders:
            then, now = before.get(order.name, identity), after.get(order.name, identity)
            if not torch.equal(then, now):
                step = torch.argsort(then)[now]
                for slot in order.slots:
                    found.setdefault(slot.path, []).append((slot.side, slot.index(step)))
    return found


# What an adapter's file holds of a layer for each of its outputs (dimension 0), or inputs: name -> dimension.
_OF_OUTPUTS = {
    "lora_B.weight": 0,
    "lora_B.bias": 0,
    "lora_magnitude_vector": 0,
    "lora_grid.scales": 0,
    "lora_grid.zeros": 0,
    "base_layer.bias": 0,
    "bias": 0,
}
_OF_INPUTS = {"lora_A.weight": 1, "lora_grid.g_idx": 0}


def move_adapter(
    model: nn.Module,
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    state_dict: Mapping[str, torch.Tensor],
    prefix: str,
) -> dict[str, torch.Tensor]:
    """The state dict of an adapter for a base in some noted orders, as it is for the base in others.

    Args:
        model: the base model.
        before, after: noted orders; an empty one is that of the original model.
        state_dict: in peft's format.
        prefix: of its names.
    """
    moved = dict(state_dict)
    for path, steps in _moves(model, before, after).items():
        for side, index in steps:
            for ending, dim in (_OF_OUTPUTS if side == "out" else _OF_INPUTS).items():
                name = f"{prefix}{path}.{ending}"
                if name in moved:
                    moved[name] = moved[name].index_select(dim, index.to(moved[name].device))
    return moved


def _matrix(layer: nn.Module) -> torch.Tensor:
    """The whole weight as (out, in)."""
    return backend_of(layer).weight(layer, whole=True)


def _for_each_order(widths: list[Width], parts: Parts, all_slots: bool) -> dict[str, torch.Tensor]:
    """The sum of what the layers of each order contribute, or those that read its units."""
    scores = {}
    for width in widths:
        for order in width.orders:
            slots = [slot for slot in order.slots if all_slots or slot.side == "in"]
            scores[order.name] = torch.stack([parts[slot.path, slot.side] for slot in slots]).sum(0)
    return scores


def _absolute_weights(model: nn.Module, widths: list[Width], parts: Parts, progress: bool) -> None:
    """The sums of the absolute weights of each unit."""
    slots: dict[str, list[tuple[Slot, int]]] = {}
    for width in widths:
        for slot in width.slots:
            slots.setdefault(slot.path, []).append((slot, width.units))
    walker = LayerWalker(model, measured_layers(model, widths, "magnitude"))
    for unit in progress_bar(walker, desc="importance", unit="block", disable=not progress):
        for path, layer in unit.items():
            for slot, units in slots[path]:
                matrix = _matrix(layer).abs().float()
                features = matrix.sum(1 if slot.side == "out" else 0)
                pieces = [features[start : start + length].view(units, -1).sum(1) for start, length in slot.parts]
                parts[path, slot.side] = torch.stack(pieces).sum(0).cpu()


class _InputSquares(InputCollector):
    """Sums of squares of each input feature over the calibration tokens."""

    def _measure(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.square().sum(0)


def _products(
    model: nn.Module, widths: list[Width], batches: list[dict[str, Any]], parts: Parts, progress: bool
) -> None:
    """The sums of squares of what each unit puts into the layers that read it, times the squared norm of their columns."""
    units = {slot.path: width.units for width in widths for slot in width.slots if slot.side == "in"}
    layers = measured_layers(model, widths, "activation")
    if residence_of(model).is_done(layers):
        return
    with calibration_mode(model):
        collector = _InputSquares(batches, is_encoder_decoder(model), fallback="its units keep their order")
        walker = BlockWalker(model, batches, layers)
        for unit in progress_bar(walker, desc="importance", unit="block", disable=not progress):
            squares = collector.collect(unit)
            for path, layer in unit.layers.items():
                columns = _matrix(layer).float().square().sum(0)
                reached = squares.get(path, torch.zeros(layer_sizes(layer)[1]))
                parts[path, "in"] = (columns * reached.to(columns.device)).view(units[path], -1).sum(1).cpu()


def _sensitivities(
    model: nn.Module, batches: list[dict[str, Any]], widths: list[Width], progress: bool
) -> dict[str, torch.Tensor]:
    """Mean over sequences of the square of sum_tokens a dL/da of each unit, by the path of the layer that reads it."""
    units = {slot.path: width.units for width in widths for slot in width.slots if slot.side == "in"}
    totals: dict[str, torch.Tensor] = {}
    sequences = 0
    device = next(model.parameters()).device
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    for (
        module
    ) in model.modules():  # an evaluation before this may have left weights in an order that no backward pass can read
        unpack(module)
    with calibration_mode(model), torch.enable_grad(), ExitStack() as hooks:
        inputs: dict[str, list[torch.Tensor]] = {}

        def note(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                source = (*args, *kwargs.values())[0]
                inputs.setdefault(path, []).append(source)

            return hook

        # a graph through a model whose parameters may all be frozen
        hooks.enter_context(embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_()))
        for path in units:
            hooks.enter_context(layer_at(model, path).register_forward_pre_hook(note(path), with_kwargs=True))
        for batch in progress_bar(batches, desc="importance", unit="batch", disable=not progress):
            inputs.clear()
            arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            loss = _loss(model, arguments)
            count = next(v for v in arguments.values() if isinstance(v, torch.Tensor)).shape[0]
            tensors = [x for tensors in inputs.values() for x in tensors]
            gradients = torch.autograd.grad(loss * count, tensors, materialize_grads=True)
            remaining = iter(gradients)
            for path, tensors in inputs.items():
                for tensor in tensors:
                    change = (tensor.detach() * next(remaining)).float()
                    change = change.reshape(count, -1, units[path], change.shape[-1] // units[path]).sum((1, 3))
                    total = change.square().sum(0).cpu()
                    totals[path] = totals[path] + total if path in totals else total
            sequences += count
    missing = [path for path in units if path not in totals]
    if missing:
        raise ValueError(f"`calibration`: the model does not use {missing} on this data.")
    return {path: total / sequences for path, total in totals.items()}


def _loss(model: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    if "labels" not in arguments:
        if not is_language_model(model) or "input_ids" not in arguments:
            raise ValueError("`calibration`: importance 'gradient' needs batches with `labels`.")
        labels = own_labels(arguments["input_ids"], arguments.get("attention_mask"))
        arguments = arguments | {"labels": labels}
    loss = model(**arguments).loss
    if loss is None:
        raise ValueError(f"`model` ({type(model).__name__}) computes no loss, which importance 'gradient' needs.")
    return loss


def _learned_scores(model: nn.Module, widths: list[Width]) -> dict[str, torch.Tensor]:
    learned = noted_scores(model)
    if not learned:
        raise ValueError(
            "`importance='movement'` is learned in a training, and this model has had none: train it with "
            "`callbacks=[peft_elastic.MovementCallback()]` first, or read scores with `peft_elastic.structure.load_scores`."
        )
    if missing := [order.name for width in widths for order in width.orders if order.name not in learned]:
        raise ValueError(
            f"`importance='movement'`: nothing was learned of {missing[0]!r}. Learn it (`kinds` of `MovementCallback`), or sort "
            f"those `kinds` alone of which something was, {sorted(learned)}."
        )
    return _own_scores(widths, {order.name: learned[order.name] for width in widths for order in width.orders})


def _own_scores(widths: list[Width], scores: Scores) -> dict[str, torch.Tensor]:
    units = {order.name: width.units for width in widths for order in width.orders}
    own = {name: torch.as_tensor(score).detach().float().cpu() for name, score in scores.items()}
    for name, score in own.items():
        if name not in units:
            raise ValueError(f"`importance` has scores for {name!r}; the names of this model are {sorted(units)}.")
        if score.shape != (units[name],) or not torch.isfinite(score).all():
            raise ValueError(
                f"`importance`: the scores of {name!r} must be {units[name]} finite numbers, got shape {tuple(score.shape)}."
            )
    return own
