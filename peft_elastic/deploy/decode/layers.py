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
"""The layers of a decoder, once they are found to be those that the step knows."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from .families import FAMILIES, Family, Watch, kinds_of, parts_of
from .in_cpp import FusedLayers


class Layers:
    """The layers of a decoder, found to be those that the step knows."""

    def __init__(self, modules: list[Any], watch: Watch, family: Family) -> None:
        self.modules, self.watch, self.family = modules, watch, family
        self.indices = [layer.self_attn.layer_idx for layer in modules]  # in the cache
        self.fused: FusedLayers | None = None

    @classmethod
    def make(cls, base: Any, count: int) -> Layers | str:
        """The reason if one of the first `count` layers is another, or has a hook."""
        family, modules = FAMILIES[type(base)], list(base.layers)[:count]
        places: list[tuple[nn.Module, str]] = [(base, "layers")]
        for index, layer in enumerate(modules):
            found, expected = kinds_of(layer, family)
            if found != expected:
                return (
                    f"layer {index} is made of {[kind.__name__ for kind in found]}; allowed are "
                    f"{[kind.__name__ for kind in expected]} of transformers"
                )
            places += [(base.layers, str(index)), *parts_of(layer)]
        layers = cls(modules, Watch(places), family)
        if not layers.watch.is_plain():
            return layers.watch.what_is_not_plain()
        if not 0 < count == len(set(layers.indices)):
            return "there are no layers, or two share a place in the cache (`layer_idx`)"
        return layers

    def cached(self, cache: DynamicCache) -> list[DynamicLayer]:
        return [cache.layers[index] for index in self.indices]

    def fused_if_possible(self) -> FusedLayers | str:
        """The reason if it is not."""
        fused = self.fused
        if fused is None or not fused.is_current():
            self.fused = None  # frees what it held
            made = FusedLayers.make(self.modules, self.family)
            if isinstance(made, str):
                return made
            fused = self.fused = made
        return fused
