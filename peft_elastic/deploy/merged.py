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
"""Sparse layers in a model that has just been merged or extracted, where they are wanted."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ..common.checks import check_choice
from ..layers.values import ROUNDED
from .sparsify import find_obstacle, sparsify_linears


logger = logging.getLogger(__name__)


def can_be_sparse(model: nn.Module, sparse_kernel: Any, sparse_dtype: str) -> bool:
    """Whether sparse layers are wanted in this model after a merge, and possible. See `ElasticLoraModel.merge_and_unload`.

    Raises:
        ValueError: on a wrong argument, or if they are demanded and not possible.
    """
    check_choice("sparse_kernel", sparse_kernel, ("auto", True, False))
    check_choice("sparse_dtype", sparse_dtype, ROUNDED)
    obstacle = find_obstacle(model)
    if sparse_kernel is True and obstacle:
        raise ValueError(f"`sparse_kernel=True` cannot work on this model: {obstacle}.")
    return bool(sparse_kernel) and not obstacle


def make_sparse(model: nn.Module, sparse_kernel: Any, sparse_dtype: str, progressbar: bool) -> None:
    """Swap in sparse layers: everywhere where they were demanded, and else where they are faster."""
    when = "always" if sparse_kernel is True else "faster"
    logger.info("%s", sparsify_linears(model, sparse_dtype, when=when, progressbar=progressbar))
