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
"""GPTQ: the options, the walk through the model, and the algorithm for one matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..common.checks import check_bool, check_max_samples, check_whole
from ..common.progress import progress_bar
from ..layers.grid import Grid, fit_grid
from ..structure.calibration import calibration_batches, calibration_mode
from ..structure.hessian import InputGrams, by_hessian, check_damping, inverse_factor
from ..structure.inputs import is_encoder_decoder
from ..structure.modules import weight_matrix
from ..structure.sequential import BlockWalker
from .config import QuantizationConfig
from .methods import quantization_method
from .rounding import Rounded, Rows, commit, report_row, round_to_nearest, wide


@dataclass(frozen=True)
class GPTQConfig(QuantizationConfig):
    """
    GPTQ (Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", algorithm
    1): the inputs of a layer are rounded one after the other, and the error that each makes in the outputs of the layer is made
    up for by the weights that follow. Blocks are quantised in order, so that later ones see the activations of the quantised
    earlier ones. Needs calibration data.

    Weights that are zero stay exactly zero, with the others making up for it where they had to be changed, as in SparseGPT
    (Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", section 3.5).

    The weights that make up for errors are stored in the dtype of the model, on the side of the rounding where they were. With 8
    bits bfloat16 is too coarse for that: some integers differ by one from those of GPTQ.

    Args:
        act_order (`bool`):
            Inputs are rounded by falling strength (the diagonal of the Hessian) and not in the order in which they are stored.
            The groups stay what they are and are fitted before the first rounding ("static groups"), so checkpoints have
            groups that follow each other, as without `act_order`, and are as fast.
        damping (`float`):
            Added to the diagonal of the Hessian, as a share of its mean. It grows tenfold, up to the mean, where a matrix is
            not positive definite with less.
        block_size (`int`):
            Inputs after which the rest of the matrix is brought up to date. It changes the speed alone.
        max_samples (`int`, *optional*):
            Number of calibration sequences to use at most; by default all that `calibration` yields. The paper uses 128.
    """

    act_order: bool = field(default=False, metadata={"help": "Round inputs by falling strength."})
    damping: float = field(default=0.01, metadata={"help": "Added to the Hessian's diagonal, as a share of its mean."})
    block_size: int = field(default=128, metadata={"help": "Inputs between two updates of the rest of the matrix."})
    max_samples: int | None = field(
        default=None, metadata={"help": "Calibration sequences used at most. Default: all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("act_order", self.act_order)
        check_damping(self.damping)
        check_whole("block_size", self.block_size, least=1)
        check_max_samples(self.max_samples)


@quantization_method("gptq", GPTQConfig, calibrated=True)
def quantize_gptq(
    model: nn.Module, layers: dict[str, nn.Module], config: GPTQConfig, calibration: Any, progress: bool
) -> tuple[Rows, int]:
    batches = calibration_batches(calibration, config.max_samples)
    rows: Rows = {}
    with calibration_mode(model):
        collector = InputGrams(batches, is_encoder_decoder(model), fallback="rounded to nearest")
        for unit in progress_bar(BlockWalker(model, batches, layers), desc="GPTQ", unit="block", disable=not progress):
            weights = {name: wide(weight_matrix(layer)) for name, layer in unit.layers.items()}
            rounded: dict[str, Rounded] = {}
            for names, hessian in by_hessian(collector.collect(unit)):
                together = torch.cat([weights[name] for name in names])
                hessian = hessian.to(together)
                result = gptq(together, hessian, config, " and ".join(names))
                begin = 0
                for name in names:
                    part = slice(begin, begin + len(weights[name]))
                    grid, dtype = _rows_of(result.grid, part), weight_matrix(unit.layers[name]).dtype
                    # In a narrower dtype a weight might leave its cell.
                    stored = result.weight[part].to(dtype)
                    stored = grid.into_cells(stored, grid.quantize(result.weight[part]))
                    rounded[name] = Rounded(stored, grid)
                    rows[name] = report_row(name, weights[name], rounded[name], hessian)
                    begin = part.stop
            for name, layer in unit.layers.items():
                if name not in rounded:  # no token reached it
                    rounded[name] = round_to_nearest(weight_matrix(layer), config)
                    rows[name] = report_row(name, weights[name], rounded[name], None)
            # All layers of a block before any change, so that an interrupted run leaves whole blocks.
            commit(model, unit.layers, rounded, rows)
    return rows, collector.tokens


def gptq(weight: torch.Tensor, hessian: torch.Tensor, config: GPTQConfig, name: str = "the weight") -> Rounded:
    """
    Algorithm 1 of GPTQ (https://huggingface.co/papers/2210.17323), rows independent of each other.

    With U the upper triangular factor of the inverse Hessian, H^-1 = U^T U, input j is rounded as

        e = (w_j - s (q_j - z)) / U_jj,    w_k -= e U_jk for all k > j

    Args:
        weight: float32 or float64 (out, in). Its zeros are kept: they are "rounded" to zero, whatever they would have become.
        hessian: X^T X (in, in), of the same dtype, over the tokens X (tokens, in); any positive multiple of it will do.
        config: the options of the method.
        name: of the layer, for messages.

    Raises:
        ValueError: the Hessian is not positive definite, however much it is damped.
    """
    out_features, in_features = weight.shape
    group_size = in_features if config.group_size == -1 else config.group_size
    order = hessian.diagonal().argsort(descending=True, stable=True) if config.act_order else None
    if order is not None:
        hessian = hessian[order][:, order]
    factor = inverse_factor(hessian, config.damping, name)
    scales = weight.new_empty(in_features // group_size, out_features)
    zeros = torch.empty_like(scales)

    def fit(columns: torch.Tensor, group: int) -> None:
        """The grid of group number `group`, and all after it, from their columns (out, n)."""
        grid = fit_grid(columns, config.bits, group_size, config.symmetric, config.clipping)
        scales[group : group + grid.scales.shape[1]] = grid.scales.T.to(scales.dtype)
        zeros[group : group + grid.zeros.shape[1]] = grid.zeros.T.to(zeros.dtype)

    if order is not None:
        fit(weight, 0)
    # Inputs are rows in here: what belongs together lies together in memory.
    rows = (weight.T if order is None else weight.T[order]).clone(memory_format=torch.contiguous_format)
    kept = rows != 0
    before = torch.empty_like(rows)
    top = 2**config.bits - 1
    begin = 0
    while begin < in_features:
        end = min(begin + config.block_size, in_features)
        if order is None and begin < end // group_size * group_size:
            # Where a group starts inside, it must be inside as a whole: the rest of the matrix is not up to date.
            end = end // group_size * group_size
        errors = torch.empty_like(rows[begin:end])
        local = factor[begin:end, begin:end]
        for j in range(begin, end):
            group = j // group_size if order is None else int(order[j]) // group_size
            if order is None and j % group_size == 0:
                fit((rows[j : j + group_size] * kept[j : j + group_size]).T, group)
            row = torch.mul(rows[j], kept[j], out=before[j])
            steps = (row / scales[group]).round_()
            steps = torch.minimum(torch.maximum(steps, -zeros[group]), top - zeros[group])
            i = j - begin
            error = torch.sub(rows[j], steps.mul_(scales[group]), out=errors[i]).div_(local[i, i])
            rows[j + 1 : end].addr_(local[i, i + 1 :], error, alpha=-1)
        rows[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
        begin = end
    if order is not None:
        before = torch.empty_like(before).index_copy_(0, order, before)
    grid = Grid(scales.T.contiguous(), zeros.T.contiguous().to(torch.int32), in_features=in_features, bits=config.bits)
    return Rounded(before.T.contiguous(), grid)


def _rows_of(grid: Grid, part: slice) -> Grid:
    return Grid(grid.scales[part].clone(), grid.zeros[part].int(), in_features=grid.in_features, bits=grid.bits)
