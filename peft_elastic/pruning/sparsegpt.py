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
"""Pruning by what the outputs of a layer lose when the other weights make up for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..common.checks import check_max_samples, check_whole
from ..common.progress import progress_bar
from ..structure.calibration import calibration_batches, calibration_mode
from ..structure.hessian import InputGrams, by_hessian, check_damping, inverse_factor
from ..structure.inputs import is_encoder_decoder
from ..structure.modules import weight_matrix
from ..structure.sequential import BlockWalker
from .config import PruningConfig
from .masks import pruning_mask
from .methods import pruning_method


@dataclass(frozen=True)
class SparseGPTConfig(PruningConfig):
    """
    SparseGPT (Frantar & Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", algorithm 1):
    the inputs of a layer are gone through one after the other, and the error that a removed weight makes in the outputs of the
    layer is made up for by the weights of the inputs that follow. So, unlike with the other methods, the weights that stay change.

    The score of a weight is w^2 / [H^-1]_jj, with H = X^T X over all calibration tokens and H^-1 that of the inputs from j on:
    the error that is left when the weights behind it have made up for it. Of every column block of `block_size` inputs, with all
    output rows together, the lowest scores go, at the moment when it is reached; with `pattern` of each row those of each
    group of m inputs. Zeros that are already there stay zero. Blocks of the model are pruned in order, as by Wanda. Needs
    calibration data.

    Args:
        block_size (`int`):
            Inputs whose weights are compared with each other, and after which the rest of the matrix is brought up to date. With
            `pattern` it changes the speed alone.
        damping (`float`):
            Added to the diagonal of H, as a share of its mean. It grows tenfold, up to the mean, where a matrix is not positive
            definite with less.
        max_samples (`int`, *optional*):
            Number of calibration sequences to use at most; by default all that `calibration` yields. The paper uses 128.
    """

    block_size: int = field(default=128, metadata={"help": "Inputs whose weights are compared with each other."})
    damping: float = field(default=0.01, metadata={"help": "Added to the Hessian's diagonal, as a share of its mean."})
    max_samples: int | None = field(
        default=None, metadata={"help": "Calibration sequences used at most. Default: all."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("block_size", self.block_size, least=1)
        check_damping(self.damping)
        check_max_samples(self.max_samples)


@pruning_method("sparsegpt", SparseGPTConfig, calibrated=True)
def prune_sparsegpt(
    model: nn.Module, layers: dict[str, nn.Module], config: SparseGPTConfig, calibration: Any, progress: bool
) -> int:
    """Prunes `layers` in place (see `SparseGPTConfig`) and returns the number of tokens that entered the first of them."""
    batches = calibration_batches(calibration, config.max_samples)
    with calibration_mode(model):
        collector = InputGrams(batches, is_encoder_decoder(model), fallback="pruned by magnitude")
        for unit in progress_bar(
            BlockWalker(model, batches, layers), desc="SparseGPT", unit="block", disable=not progress
        ):
            weights = {name: weight_matrix(layer) for name, layer in unit.layers.items()}
            wide = {name: w.to(torch.promote_types(w.dtype, torch.float32)) for name, w in weights.items()}
            hessians = collector.collect(unit)
            for name, weight in wide.items():
                if name not in hessians:  # no token reached it: then all inputs count alike
                    hessians[name] = weight.new_zeros(weight.shape[1], weight.shape[1])
            # All layers of a block before any change, so that an interrupted run leaves whole blocks and can be repeated.
            pruned = {}
            for names, hessian in by_hessian(hessians):
                factor = inverse_factor(hessian.to(wide[names[0]]), config.damping, " and ".join(names))
                for name in names:
                    pruned[name] = sparsegpt(wide[name], factor, config.sparsity, config.n_of_m, config.block_size)
            for name, weight in weights.items():
                weight.copy_(pruned[name])
    return collector.tokens


def sparsegpt(
    weight: torch.Tensor,
    factor: torch.Tensor,
    sparsity: float | None,
    n_of_m: tuple[int, int] | None,
    block_size: int = 128,
) -> torch.Tensor:
    """
    Algorithm 1 of SparseGPT (https://huggingface.co/papers/2301.00774).

    With U the upper triangular factor of the inverse Hessian, H^-1 = U^T U, of a weight w_j that goes

        e = w_j / U_jj,    w_k -= e U_jk for all k >= j

    and those with the smallest w_j^2 / U_jj^2 of a block go.

    Args:
        weight: float32 or float64 (out, in), left as it is. Its zeros stay zero, and count as pruned before all others.
        factor: U (in, in), of the same dtype; see `inverse_factor`.
        sparsity: share of each block that goes, rounded down to whole weights. Used without `n_of_m`.
        n_of_m: (n, m) keeps n of every m consecutive inputs of a row; `in` must be divisible by m.
        block_size: inputs of a block, with all rows. With `n_of_m` a multiple of m that is near to it.

    Returns:
        the pruned weight, a new tensor (out, in).
    """
    in_features = weight.shape[1]
    group = 1 if n_of_m is None else n_of_m[1]
    step = max(block_size // group, 1) * group
    diagonal = factor.diagonal()
    # Inputs are rows in here: what belongs together lies together in memory.
    rows = weight.T.clone(memory_format=torch.contiguous_format)
    kept = rows != 0
    goes = torch.empty_like(kept)

    def choose(begin: int, end: int) -> None:
        score = (rows[begin:end].T / diagonal[begin:end]).square()
        mask = pruning_mask(kept[begin:end].T, score, sparsity, n_of_m, "layer")
        goes[begin:end] = mask.T | ~kept[begin:end]

    for begin in range(0, in_features, step):
        end = min(begin + step, in_features)
        errors = torch.empty_like(rows[begin:end])
        local = factor[begin:end, begin:end]
        if n_of_m is None:
            choose(begin, end)
        for j in range(begin, end):
            if n_of_m is not None and j % group == 0:
                choose(j, j + group)
            i = j - begin
            error = torch.mul(rows[j], goes[j], out=errors[i]).div_(local[i, i])
            rows[j:end].addr_(local[i, i:], error, alpha=-1)
        rows[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return rows.masked_fill_(goes, 0).T
