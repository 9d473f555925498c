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
"""The swap: linear layers of a model against sparse ones, where these are faster on this machine."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..common.checks import check_choice, is_finite, wrong
from ..common.names import has_suffix
from ..common.parameters import check_parameters
from ..common.progress import progress_bar
from ..common.tables import text_table
from ..common.tensors import zero_share
from ..cost import timing
from ..layers import ops
from ..layers.backends import backend_of, grid_layers
from ..layers.backends.float import FLOAT
from ..layers.backends.sparse import SPARSE
from ..layers.groups import groups_in_order
from ..layers.sparse_linear import SparseLinear
from ..layers.values import ROUNDED, grid_format, most_bits, parse_values
from ..quantization.saving import GridQuantizer, unguard_saving
from ..structure.modules import linear_layers, output_head, routers
from . import checkpoint


@dataclass(frozen=True)
class SwapDecision:
    """What became of one linear layer.

    Args:
        name (`str`): its path in the model.
        out_features, in_features (`int`): its shape.
        sparsity (`float`): its share of zeros; NaN where it was not counted.
        swapped (`bool`): whether it is a `SparseLinear` now.
        reason (`str`): why, or why not.
        dense_seconds, sparse_seconds (`float`, *optional*): of one row of activations, where they were measured.
        dense_bytes, bytes (`int`): of its weight, before and now.
        values (`str`): of the sparse layer: "bf16", "int8", "int4", "int4 dense" (all values stored); empty if it was not swapped.
    """

    name: str
    out_features: int
    in_features: int
    sparsity: float
    swapped: bool
    reason: str
    dense_seconds: float | None
    sparse_seconds: float | None
    dense_bytes: int
    bytes: int
    values: str = ""


@dataclass(frozen=True)
class SwapReport:
    """What `sparsify_linears` did; printing it gives a table.

    Args:
        decisions (`tuple[SwapDecision, ...]`): one for each linear layer, in the order of the model.
        dtype (`str`): of the values of the sparse layers, but for those that were quantized already, which are int4.
        level (`str` or None): instruction set that the kernels run on.
        threads (`int`): that the measurements hold for.
    """

    decisions: tuple[SwapDecision, ...]
    dtype: str
    level: str | None
    threads: int

    @property
    def swapped(self) -> tuple[str, ...]:
        """The paths of the layers that were swapped."""
        return tuple(decision.name for decision in self.decisions if decision.swapped)

    def __str__(self) -> str:
        # The same layer of all blocks makes one line.
        groups: dict[tuple[Any, ...], list[SwapDecision]] = {}
        for decision in self.decisions:
            kind = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", decision.name)
            shape = f"{decision.out_features}x{decision.in_features}"
            groups.setdefault((kind, shape, decision.values, decision.swapped, decision.reason), []).append(decision)
        table = [("layer", "out x in", "layers", "zeros", "dense us", "sparse us", "MB", "now", "values", "swapped")]
        for (kind, shape, values, swapped, reason), group in groups.items():
            answer = f"{'yes' if swapped else 'no'}: {reason}"
            table.append((kind, shape, str(len(group)), *_figures(group), values or "-", answer))
        before, now = (sum(getattr(d, name) for d in self.decisions) / 1e6 for name in ("dense_bytes", "bytes"))
        found = ", ".join(dict.fromkeys(decision.values for decision in self.decisions if decision.swapped))
        head = (
            f"{len(self.swapped)} of {len(self.decisions)} linear layers are sparse ({found or self.dtype}); their weights take "
            f"{now:,.1f} MB instead of {before:,.1f} MB. Kernel level {self.level}, {self.threads} thread(s)."
        )
        return "\n".join([head, *text_table(table, left=(0, 1, 8, 9))])


def _figures(group: list[SwapDecision]) -> tuple[str, str, str, str, str]:
    weights = sum(d.out_features * d.in_features for d in group)
    zeros = sum(d.sparsity * d.out_features * d.in_features for d in group) / weights
    timed = group[0].dense_seconds is not None

    def mean(name: str) -> str:
        return f"{1e6 * sum(getattr(d, name) for d in group) / len(group):,.0f}" if timed else "-"

    return (
        f"{zeros:.1%}" if zeros == zeros else "-",
        mean("dense_seconds"),
        mean("sparse_seconds"),
        f"{sum(d.dense_bytes for d in group) / 1e6:,.1f}",
        f"{sum(d.bytes for d in group) / 1e6:,.1f}",
    )


def sparsify_linears(
    model: nn.Module,
    dtype: str = "bf16",
    *,
    when: str = "faster",
    min_sparsity: float = 0.3,
    skip: Collection[str] = (),
    lm_head: bool = False,
    progressbar: bool = False,
) -> SwapReport:
    """Swap the linear layers of `model` against `SparseLinear` where that is faster on this machine, in place.

    A layer is timed with one row of activations, as in the generation of one sequence, against the dense layer of its
    own dtype, both with weights that come from memory; each shape and sparsity once a machine (`timing.measure`).
    Weights are rounded to `dtype`. transformers models save and load the result: `model.save_pretrained(dir)`, then
    `import peft_elastic; AutoModelForCausalLM.from_pretrained(dir)`.

    A layer that is quantized already, an `nn.Linear` with a method `quantized() -> dict` (`q`, `scales`, `zeros`, `g_idx`,
    `group_size`, `bits`, as `SparseLinear.from_quantized` takes them), becomes int4 without further rounding if it has at most
    4 bits, whatever `dtype` is: sparse, or dense int4, which keeps the zeros, whichever is faster; with `when="always"` sparse
    from `min_sparsity` on.

    Left dense: weights that several modules share (such as an lm_head that is tied to the embedding), the output
    embedding unless `lm_head`, the routers of mixtures of experts, and what the model keeps in float32.

    Args:
        model (`nn.Module`): any model on the CPU, without adapters (merge or unload them first). Layers that are
            `nn.Linear` or transformers' `Conv1D` themselves are looked at, and subclasses that are quantized as above, but no others.
        dtype (`str`): of the values: "bf16", or "int8" (symmetric, one scale for each output).
        when (`str`): "faster" swaps where the sparse layer is measured to be faster; "always" swaps without measuring.
        min_sparsity (`float`): layers with a smaller share of zeros stay dense. Below about a third there is little to
            gain that rounding to bfloat16 alone would not give.
        skip (`Collection[str]`): layers to leave alone: paths, or the ends of paths, such as "down_proj".
        lm_head (`bool`): whether to look at the output embedding too; tied to the input embedding it stays dense.
        progressbar (`bool`): show one.

    Returns:
        `SwapReport`: what was swapped, and why or why not; `print(report)`.

    Raises:
        ValueError: on a wrong argument, an entry of `skip` that matches nothing, a model with adapters, one that another
            method has quantized, one with a weight that torch.nn.utils (prune, parametrize, weight_norm) computes anew in each forward
            pass, or without the C++ extension. Nothing is changed then.
    """
    check_choice("dtype", dtype, ROUNDED)
    check_choice("when", when, ("faster", "always"))
    if not is_finite(min_sparsity) or not 0 <= min_sparsity <= 1:
        raise wrong("min_sparsity", "a number from 0 to 1", min_sparsity)
    if isinstance(skip, str):
        raise wrong("skip", "a list of strings", skip)
    obstacle = find_obstacle(model, skip)
    if obstacle:
        raise ValueError(f"`sparsify_linears` cannot work on this model: {obstacle}.")
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "`model` has adapters: merge them (`merge_and_unload()`) or take them out (`unload()`) first."
        )
    linears = list(_find_linears(model))
    for entry in skip:
        if not any(has_suffix(name, entry) for name, _ in linears):
            raise ValueError(f"`skip`: {entry!r} is the path, or the end of the path, of no linear layer.")

    not_asked = _not_asked(model, linears, skip, lm_head)
    decisions = []
    for name, linear in progress_bar(linears, desc="Sparse layers", disable=not progressbar):
        decision = _decide(name, linear, dtype, when, min_sparsity, not_asked.get(name))
        if decision.swapped:
            sparse = _swap(linear, decision.values)
            model.set_submodule(name, sparse)
            decision = replace(decision, bytes=SPARSE.stored_bytes(sparse))
        decisions.append(decision)
    if isinstance(model, PreTrainedModel) and any(decision.swapped for decision in decisions):
        # what stays of the quantized layers is saved as ordinary ones, with the values that they compute with
        for name, linear in grid_layers(model).items():
            model.set_submodule(name, linear.to_linear())
        unguard_saving(model)
        checkpoint.mark_checkpoint(model)
    return SwapReport(tuple(decisions), dtype, ops.level(), torch.get_num_threads())


def find_obstacle(model: nn.Module, skip: Collection[str] = ()) -> str:
    """Why no layer of `model` can be swapped, whatever its weights; empty if nothing stands against it."""
    if not ops.is_available():
        return "the C++ extension is not there (`peft-elastic info` says how to get it)"
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, (checkpoint.SparseQuantizer, GridQuantizer)):
        method = quantizer.quantization_config.quant_method
        return (
            f"it is quantized by {getattr(method, 'value', method)}, and sparse layers are saved beside no other method "
            "(load it in floating point, or use `model.dequantize()`)"
        )
    if not any(parameter.device.type == "cpu" for parameter in model.parameters()):
        return "it is not on the CPU"
    layers = {name: each for name, each in linear_layers(model).items() if not backend_of(each).packed}
    try:
        check_parameters(
            {name: each for name, each in layers.items() if not any(has_suffix(name, entry) for entry in skip)}
        )
    except ValueError as error:
        return str(error).removeprefix("model: ").removesuffix(".")
    return ""


def densify_linears(model: nn.Module) -> nn.Module:
    """Undo `sparsify_linears`, in place: every `SparseLinear` becomes the dense layer with the same (rounded) weights.

    Returns:
        `nn.Module`: `model` itself.
    """
    for name, module in list(model.named_modules()):
        if SPARSE.matches(module):
            model.set_submodule(name, module.to_linear())
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, checkpoint.SparseQuantizer):
        quantizer.remove_quantization_config(model)
    return model


def _find_linears(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if name and (type(module) in FLOAT.exact or _is_quantized(module)):
            yield name, module


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and callable(getattr(module, "quantized", None))


def _swap(linear: Any, values: str) -> SparseLinear:
    value_format, sparse = parse_values(values)
    if not value_format.is_grid:
        return SparseLinear.from_linear(linear, values)
    grid = linear.quantized()
    layer = SparseLinear.from_quantized(
        **{key: grid[key] for key in ("q", "scales", "zeros", "g_idx", "group_size")},
        bias=linear.bias,
        linear_dtype=linear.weight.dtype,
        sparse=sparse,
    )
    return layer.train(linear.training)


def _not_asked(
    model: nn.Module, linears: list[tuple[str, Any]], skip: Collection[str], lm_head: bool
) -> dict[str, str]:
    """The layers that stay dense whatever a measurement says, with the reason."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{key}" if path else key)
    output = output_head(model)
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    choosing = set(routers(model))
    reasons = {}
    for name, linear in linears:
        shared = [owner for owner in owners.get(id(linear.weight), ()) if owner != f"{name}.weight"]
        if shared:
            reasons[name] = f"its weight is also {shared[0]}"
        elif linear is output and not lm_head:
            reasons[name] = "the output embedding, left out without `lm_head=True`"
        elif any(has_suffix(name, entry) for entry in skip):
            reasons[name] = "in `skip`"
        elif name in choosing:
            reasons[name] = "the router of a mixture of experts"
        elif kept.intersection(name.split(".")):
            reasons[name] = "the model keeps it in float32"
        elif linear.weight.device.type != "cpu":
            reasons[name] = f"on {linear.weight.device}, not on the CPU"
        elif 0 in linear.weight.shape:
            reasons[name] = "without weights"
        elif not torch.isfinite(linear.weight).all():
            reasons[name] = "with infinite or NaN weights"
    return reasons


def _decide(name: str, linear: Any, dtype: str, when: str, min_sparsity: float, not_asked: str | None) -> SwapDecision:
    weight = linear.weight
    backend = backend_of(linear)
    out_features, in_features = backend.sizes(linear)
    size = backend.stored_bytes(linear)
    sparsity, dense, sparse, values = float("nan"), None, None, dtype
    swapped, reason, group_size = False, not_asked, None
    candidates = [dtype]
    if reason is None and _is_quantized(linear):
        grid = linear.quantized()
        reason, group_size = _no_grid(grid), grid["group_size"]
        sparsity = sparsity if reason else _share_of_zeros(grid)
        value_format = grid_format(grid["bits"])
        candidates = [] if value_format is None else value_format.variants(sparsity >= min_sparsity)
    elif reason is None:
        sparsity = zero_share(weight)
        if sparsity < min_sparsity:
            reason = f"fewer than {min_sparsity:.0%} zeros"
    if reason is None and when == "always":
        swapped, reason, values = True, "asked for", candidates[0]
    elif reason is None:
        groups = [] if group_size is None else [group_size]
        timed = {
            each: timing.measure(out_features, in_features, sparsity, each, weight.dtype, *groups)
            for each in candidates
        }
        values = max(timed, key=lambda each: timed[each].dense / timed[each].sparse)
        dense, sparse = timed[values]
        swapped = dense > timing.CLEARLY_FASTER * sparse
        reason = f"{dense / sparse:.2f} times as fast as dense"
    return SwapDecision(
        name,
        out_features,
        in_features,
        sparsity,
        swapped,
        reason,
        dense,
        sparse,
        size,
        size,
        values if swapped else "",
    )


def _share_of_zeros(grid: dict[str, Any]) -> float:
    """Of the weights of a quantized layer."""
    q, zeros, g_idx = grid["q"], grid["zeros"], grid["g_idx"]
    if g_idx is None:
        g_idx = groups_in_order(q.shape[1], grid["group_size"])
    return int((q == zeros[:, g_idx.long()]).sum()) / q.numel()


def _no_grid(grid: dict[str, Any]) -> str | None:
    """Why no type of values holds a quantized layer."""
    value_format = grid_format(grid["bits"])
    if value_format is None or value_format.check is None:
        return f"quantized to {grid['bits']} bits; the kernels take {most_bits()} and fewer"
    try:
        value_format.check(*(grid[key] for key in ("q", "scales", "zeros", "g_idx", "group_size")))
    except ValueError as error:
        return f"no {value_format.name}: {error}"
    return None
