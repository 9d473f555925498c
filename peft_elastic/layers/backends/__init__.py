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
"""One file a backend: how a linear layer stores its weight, and what may be done to it. README.md says how to add one."""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn

from ..narrowed import plain_class
from .base import ABILITIES, Backend, OldWeight, PackedBackend
from .bitsandbytes import BITSANDBYTES
from .float import EMBEDDING, FLOAT
from .foreign import FOREIGN
from .gptqmodel import GPTQMODEL
from .grid import GRID, grid_layers
from .sparse import SPARSE
from .torchao import TORCHAO


# The first that matches has the layer: `nn.Linear` is what many of them derive from.
BACKENDS: tuple[Backend, ...] = (GRID, BITSANDBYTES, GPTQMODEL, SPARSE, TORCHAO, FOREIGN, FLOAT, EMBEDDING)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def find_backend(module: nn.Module) -> Optional[Backend]:
    """The backend of a linear layer or an embedding; None for any other module."""
    # most layers, at once: adapters ask in every forward pass, and torch.compile has to follow
    weight = module._parameters.get("weight")
    if plain_class(module) in FLOAT.exact and type(weight) is nn.Parameter and weight.dtype in _FLOATS:
        return FLOAT
    for backend in BACKENDS:
        if backend.matches(module):
            return backend
    return None


def find_linear_backend(module: nn.Module) -> Optional[Backend]:
    """The backend of a linear layer that adapters and algorithms work on; None for any other module, an embedding or a
    `SparseLinear` too."""
    backend = find_backend(module)
    return backend if backend is not None and backend.listed else None


def backend_of(layer: nn.Module) -> Backend:
    """The backend of a linear layer or an embedding.

    Raises:
        TypeError: `layer` is something else.
    """
    backend = find_backend(layer)
    if backend is None:
        raise TypeError(f"A {type(layer).__name__} is neither a linear layer nor an embedding.")
    return backend


__all__ = [
    "ABILITIES",
    "BACKENDS",
    "Backend",
    "OldWeight",
    "PackedBackend",
    "backend_of",
    "find_backend",
    "find_linear_backend",
    "grid_layers",
]
