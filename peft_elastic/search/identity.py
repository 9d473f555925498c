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
"""Whether two copies of an elastic model are the same: their spaces, and every weight."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from typing import Any

import torch

from ..supernet.host import ElasticHost
from ..supernet.space import SearchSpace


_SHOWN = 3  # differences of a kind that a message names


@dataclass(frozen=True)
class Identity:
    """What a model is, as far as evaluations depend on it; small enough to be sent around.

    Args:
        space (`SearchSpace`): its choices.
        tensors (`dict[str, tuple]`): type, shape and checksum of each parameter and saved buffer, by its name inside the tuner.
            Where they are does not count.
    """

    space: SearchSpace
    tensors: dict[str, tuple[str, tuple[int, ...], int]]

    @classmethod
    def of(cls, model: torch.nn.Module, host: ElasticHost) -> Identity:
        """Reads each weight once, about a second for 1 GB.

        Raises:
            ValueError: if a parameter is a part of one that several processes share.
        """
        # the names inside wrappers would differ between a compiled model and one that is not
        named = (host if isinstance(host, torch.nn.Module) else model).state_dict()
        tensors = {name: tensor for name, tensor in named.items() if isinstance(tensor, torch.Tensor)}
        for name, tensor in tensors.items():
            if hasattr(tensor, "full_tensor"):
                raise ValueError(
                    f"a search in parallel needs a whole copy of `model` in each process, but {name!r} is sharded over several. "
                    "Without `executor` all of them evaluate each subnet together."
                )
        return cls(
            host.search_space, {name: (str(t.dtype), tuple(t.shape), _checksum(t)) for name, t in tensors.items()}
        )

    @property
    def digest(self) -> str:
        """Equal for equal models, in any process."""
        text = repr((self.space.choices, self.space.layers, sorted(self.tensors.items())))
        return hashlib.sha256(text.encode()).hexdigest()

    def difference(self, other: Identity) -> str:
        """In words, how `other` differs from this; empty if it does not."""
        mine, theirs = self.space, other.space
        if mine != theirs:
            keys = [choice.key for choice in mine if choice not in theirs.choices]
            keys += [choice.key for choice in theirs if choice not in mine.choices and choice.key not in keys]
            named = f" in {_listed(keys)}" if keys else ""
            return f"its search space is {theirs!r}, that of `model` is {mine!r}, and they differ{named}"
        if self.tensors.keys() != other.tensors.keys():
            missing = [name for name in self.tensors if name not in other.tensors]
            more = [name for name in other.tensors if name not in self.tensors]
            parts = [f"has no {_listed(missing)}"] if missing else []
            parts += [f"has {_listed(more)}, which `model` has not"] if more else []
            return "it " + " and ".join(parts)
        for place, what in enumerate(("type", "shape")):
            differ = [name for name, found in self.tensors.items() if found[place] != other.tensors[name][place]]
            if differ:
                here, there = self.tensors[differ[0]][place], other.tensors[differ[0]][place]
                return f"the {what} of {_listed(differ)} differs: {there} there, {here} in `model`"
        differ = [name for name, found in self.tensors.items() if found != other.tensors[name]]
        return f"the values of {_listed(differ)} differ" if differ else ""


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


def _checksum(tensor: Any) -> int:
    if tensor.device.type == "meta":  # kept elsewhere by what runs the model
        return 0
    if hasattr(tensor, "__tensor_flatten__"):  # quantised by a library: the tensors that it is made of
        names, _ = tensor.__tensor_flatten__()
        return zlib.crc32(repr([_checksum(getattr(tensor, name)) for name in names]).encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy()) if len(flat) else 0
