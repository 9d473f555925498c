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
"""The decoders that the step is written for, and a watch on their modules."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from operator import contains, is_
from typing import Any, NamedTuple

from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3


class Family(NamedTuple):
    """The classes that the step below was written against; a subclass may compute something else."""

    layer: type[nn.Module]
    attention: type[nn.Module]
    norm: type[nn.Module]
    mlp: type[nn.Module]


def _families() -> dict[type[nn.Module], Family]:
    modules = {
        "Llama": modeling_llama,
        "Mistral": modeling_mistral,
        "Qwen2": modeling_qwen2,
        "Qwen3": modeling_qwen3,
    }
    parts = ("DecoderLayer", "Attention", "RMSNorm", "MLP")
    return {
        getattr(module, f"{name}Model"): Family(*(getattr(module, name + part) for part in parts))
        for name, module in modules.items()
    }


FAMILIES = _families()


def parts_of(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the modules are, inside a layer, whose own forward the step does not call: their owner and their name."""
    attention: Any = layer.self_attn
    head_norms = [(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return [(layer, "self_attn"), (layer, "input_layernorm"), (layer, "post_attention_layernorm"), *head_norms]


def kinds_of(layer: nn.Module, family: Family) -> tuple[list[type], list[type]]:
    """The classes that a layer and its parts are of, and those that they should be of."""
    attention = getattr(layer, "self_attn", None)
    if type(layer) is not family.layer or type(attention) is not family.attention:
        return [type(layer), type(attention)], [family.layer, family.attention]
    norms = [type(getattr(owner, name, None)) for owner, name in parts_of(layer)[1:]]
    return [family.layer, family.attention, *norms], [family.layer, family.attention, *[family.norm] * len(norms)]


class Watch:
    """Notices modules that were replaced, given another class or another forward, or hooked. Takes microseconds."""

    def __init__(self, places: Iterable[tuple[nn.Module, str]]) -> None:
        self.places = places = list(places)
        self.owners = [owner._modules for owner, _ in places]
        self.names = [name for _, name in places]
        self.modules: list[Any] = [owner._modules[name] for owner, name in places]
        self.kinds = [type(module) for module in self.modules]
        self.attributes = [module.__dict__ for module in self.modules]
        self.hooks_before = [module._forward_pre_hooks for module in self.modules]
        self.hooks_after = [module._forward_hooks for module in self.modules]

    def is_plain(self) -> bool:
        """Whether the modules are those of the beginning, and a call of each does nothing but run its class's forward."""
        if (
            not all(map(is_, map(dict.get, self.owners, self.names), self.modules))
            or list(map(type, self.modules)) != self.kinds
            or any(map(contains, self.attributes, repeat("forward")))
            or any(self.hooks_before)
        ):
            return False
        # transformers leaves its own hooks in place once hidden states were asked for; they do nothing unless asked again
        return all(
            getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
            for hooks in self.hooks_after
            if hooks
            for hook in hooks.values()
        )

    def what_is_not_plain(self) -> str:
        """The first module for which `is_plain` does not hold, in words."""
        for owner, name in self.places:
            if not Watch([(owner, name)]).is_plain():
                kind = type(owner._modules[name]).__name__
                return f"the {kind} at {name!r} of a {type(owner).__name__} has a hook or a forward of its own"
        return "a module was replaced"
