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
"""When the faster step is taken, as a table of conditions, and the step itself."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.mistral import modeling_mistral

from ...layers.addresses import is_special_mode
from .in_torch import run_layers
from .layers import Layers
from .room import Room


# The field of the output that holds the cache has had two names so far; what it is annotated with has not changed.
_OUTPUT_CACHE = next(field.name for field in dataclasses.fields(BaseModelOutputWithPast) if "Cache" in str(field.type))


def held_by(cached: list[DynamicLayer]) -> list[Tensor]:
    return [tensor for each in cached for tensor in (each.keys, each.values)]


class Call:
    """A call of a decoder's forward, and the decoder that it finds.

    Versions of transformers give the same argument different names. The cache is known by its class, wherever it stands; and
    an argument whose name the step does not know keeps it from being taken.
    """

    def __init__(self, step: DecodeStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.step = step
        self.base: Any = step.base
        self.config: Any = self.base.config
        given = dict(zip(step.names, args)) | kwargs
        self.given: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        self.caches: list[Any] = []
        self.unknown: list[str] = []  # names of arguments that ask for something that the step does not do
        for name, value in self.given.items():
            if name not in _KNOWN:
                if isinstance(value, Cache):
                    self.caches.append(value)
                elif value is not False:
                    self.unknown.append(name)
        self.cache: Any = self.caches[0] if self.caches else None
        self.input_ids: Any = self.given.get("input_ids")
        self.attention_mask: Any = self.given.get("attention_mask")
        self.position_ids: Any = self.given.get("position_ids")

    @cached_property
    def layers(self) -> Layers | None:
        return self.step.plain_layers()

    @cached_property
    def cached(self) -> list[DynamicLayer]:
        """The layers of the cache that belong to the decoder's."""
        return self.layers.cached(self.cache)  # type: ignore[union-attr]

    @cached_property
    def held(self) -> list[Tensor]:
        return held_by(self.cached)

    def fits_the_layers(self) -> bool:
        """Whether the tensors of all layers of the cache are of one shape, and of the model's type."""
        room, held, dtype = self.step.rooms.get(self.cached[0]), self.held, self.dtype
        if held[0].dtype != dtype:
            return False
        if room is not None and room.holds(held):
            return True
        return all(each.shape == held[0].shape and each.dtype == dtype for each in held)

    @property
    def dtype(self) -> torch.dtype:
        return self.layers.modules[0].input_layernorm.weight.dtype  # type: ignore[union-attr]

    def decodes(self) -> bool:
        """Whether it looks like a step of generation, whatever it is that the faster step does not know about it."""
        return self.cache is not None and not torch.is_grad_enabled() and int(self.cache.get_seq_length()) > 0


# cache_position, which older versions pass, says what the length of the cache says
_KNOWN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "inputs_embeds",
    "use_cache",
    "return_dict",
    "cache_position",
}


class _Condition(NamedTuple):
    holds: Callable[[Call], bool]
    reason: Callable[[Call], str]  # why a call is left to the model's own code where it does not hold


_SEVERAL = "several new positions for each sequence, or none, as in a prompt"
MODEL_CONDITIONS = (
    _Condition(
        lambda call: not call.base.training,
        lambda call: "the decoder is in training mode (`model.eval()`)",
    ),
    _Condition(
        lambda call: call.config._attn_implementation == "sdpa",
        lambda call: f"attn_implementation is {call.config._attn_implementation!r}; allowed is 'sdpa'",
    ),
    _Condition(
        lambda call: (
            not call.config.output_hidden_states
            and not call.config.output_attentions
            and call.config.return_dict is not False
        ),
        lambda call: "the model's config asks for hidden states, attentions or tuples",
    ),
    # a cache made without the configuration holds all positions even where the model looks back through a window
    _Condition(
        lambda call: (
            "sliding_attention" not in (getattr(call.config, "layer_types", None) or ())
            and not (type(call.base) is modeling_mistral.MistralModel and call.config.sliding_window is not None)
        ),
        lambda call: "the model looks back through a sliding window",
    ),
    _Condition(
        lambda call: not module_hooks._global_forward_hooks and not module_hooks._global_forward_pre_hooks,
        lambda call: "torch has global forward hooks",
    ),
    _Condition(
        lambda call: call.layers is not None,
        lambda call: call.step.no_layers,
    ),
    # dropout is the one thing in a layer that a training mode of its own would change
    _Condition(
        lambda call: (
            not (
                call.layers is not None
                and call.config.attention_dropout
                and any(layer.self_attn.training for layer in call.layers.modules)
            )
        ),
        lambda call: "an attention with dropout is in training mode",
    ),
)
_CALL_CONDITIONS = (
    _Condition(
        lambda call: not torch.is_grad_enabled(),
        lambda call: "gradients are enabled (allowed is under `torch.no_grad()` or `torch.inference_mode()`)",
    ),
    _Condition(
        lambda call: not is_special_mode(),
        lambda call: "torch.compile, a tracer, autocast or a transform of torch.func is active",
    ),
    _Condition(
        lambda call: isinstance(call.input_ids, Tensor) and "inputs_embeds" not in call.given,
        lambda call: f"no `input_ids` among the arguments, or others in their place: {sorted(call.given)}",
    ),
    _Condition(
        lambda call: "use_cache" in call.given or getattr(call.config, "use_cache", True),
        lambda call: "use_cache is False, in the model's config",
    ),
    _Condition(
        lambda call: call.given.get("use_cache") is not False,
        lambda call: "use_cache is False",
    ),
    _Condition(
        lambda call: call.input_ids.dim() == 2 and call.input_ids.shape[1] == 1,
        lambda call: _SEVERAL,
    ),
    _Condition(
        lambda call: call.input_ids.device.type == "cpu",
        lambda call: f"`input_ids` are on {call.input_ids.device}; allowed is the CPU",
    ),
    _Condition(
        lambda call: not call.unknown and call.given.get("return_dict") is not False,
        lambda call: f"arguments that the step does not know: {call.unknown or ['return_dict=False']}",
    ),
    _Condition(
        lambda call: call.position_ids is None or (call.position_ids.dim() == 2 and call.position_ids.shape[1] == 1),
        lambda call: "`position_ids` are not one position for each sequence, or for all",
    ),
    _Condition(
        lambda call: len(call.caches) == 1 and type(call.cache) is DynamicCache and not call.cache.offloading,
        lambda call: (
            f"the cache is {' and '.join(type(cache).__name__ for cache in call.caches) or 'absent'}; allowed is the "
            "DynamicCache that `generate` uses by default, not offloaded"
        ),
    ),
    _Condition(
        lambda call: (
            len(call.cache.layers) > max(call.layers.indices)  # type: ignore[union-attr]
            and all(type(each) is DynamicLayer and each.is_initialized for each in call.cached)
        ),
        lambda call: "the cache is empty, or has layers of another class than DynamicLayer",
    ),
    _Condition(
        lambda call: (
            len(call.held[0].shape) == 4
            and call.held[0].shape[0] == call.input_ids.shape[0]
            and call.held[0].shape[2] > 0
        ),
        lambda call: "the cache is empty, or of another batch size than `input_ids`",
    ),
    _Condition(
        lambda call: (
            call.attention_mask is None
            or (
                isinstance(call.attention_mask, Tensor)
                and call.attention_mask.shape == (call.held[0].shape[0], call.held[0].shape[2] + 1)
            )
        ),
        lambda call: "`attention_mask` is not a tensor [batch, positions in the cache + 1]",
    ),
    _Condition(
        lambda call: call.fits_the_layers(),
        lambda call: f"the keys and values in the cache are not all of one shape and {call.dtype} like the model",
    ),
)
_CONDITIONS = MODEL_CONDITIONS + _CALL_CONDITIONS


class DecodeStep:
    """Stands in for the forward of a decoder: takes the steps it knows itself, and leaves the others to the decoder."""

    def __init__(self, base: nn.Module) -> None:
        self.base: Any = base
        self.__signature__ = inspect.signature(type(base).forward.__get__(base))
        self.names = list(self.__signature__.parameters)
        self.layers: Layers | None = None
        self.no_layers: str = ""  # why there are none
        self.rooms: weakref.WeakKeyDictionary[DynamicLayer, Room] = weakref.WeakKeyDictionary()  # by the first layer
        self.steps = self.steps_in_cpp = 0
        self.own: Counter[str] = Counter()  # calls that the decoder ran, by the reason
        self.own_in_torch: Counter[str] = Counter()
        self.has_warned = False

    def __getstate__(self) -> dict[str, Any]:  # for copies and pickles
        return {"base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["base"])  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            call = Call(self, args, kwargs)
            reason = self.refuses(call)
            if reason is None:
                layers: Any = call.layers
                hidden = self.step(layers, call.input_ids, call.attention_mask, call.position_ids, call.cache)
                return BaseModelOutputWithPast(**{"last_hidden_state": hidden, _OUTPUT_CACHE: call.cache})
            self._note(call, reason)
        return type(self.base).forward(self.base, *args, **kwargs)

    def refuses(self, call: Call) -> str | None:
        """The reason, if a call is not a step of generation that `step` computes as the decoder would."""
        for condition in _CONDITIONS:
            if not condition.holds(call):
                return condition.reason(call)
        return None

    def _note(self, call: Call, reason: str) -> None:
        self.own[reason] += 1
        if self.steps == 0 and not self.has_warned and reason is not _SEVERAL and call.decodes():
            self.has_warned = True
            warnings.warn(
                f"The model is optimized for generation, but its own code generates: {reason}. "
                "`print(peft_elastic.explain_generation(model))` says more."
            )

    def plain_layers(self) -> Layers | None:
        """The layers, if they are those of transformers and free of hooks."""
        base: Any = self.base
        count = min(len(base.layers), base.config.num_hidden_layers)
        layers = self.layers
        if layers is None or len(layers.modules) != count or not layers.watch.is_plain():
            made = Layers.make(base, count)
            layers = self.layers = None if isinstance(made, str) else made
            self.no_layers = made if isinstance(made, str) else ""
        return layers

    def step(
        self,
        layers: Layers,
        input_ids: Any,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: DynamicCache,
    ) -> Tensor:
        """The last hidden state [batch, 1, hidden] of one new position, whose keys and values go into the cache."""
        base: Any = self.base
        hidden = base.embed_tokens(input_ids)
        cached = layers.cached(cache)
        room = self.rooms.get(cached[0])
        if room is None or not room.holds(held_by(cached)):
            self.rooms.pop(cached[0], None)  # its memory is not needed while the new one is filled
            room = self.rooms[cached[0]] = Room(cached)
        if position_ids is None:
            position_ids = torch.tensor([[room.length]])
        mask = None
        if attention_mask is not None:
            mask = attention_mask.bool()
            if mask.all():
                mask = None
        cos, sin = base.rotary_emb(hidden, position_ids)  # [batch or 1, 1, head_dim]
        room.advance()
        fused = layers.fused_if_possible()
        reason = fused if isinstance(fused, str) else fused.refuses(hidden, cos, room)
        if not isinstance(fused, str) and reason is None:
            hidden = fused.run(hidden, cos, sin, mask, room)
            self.steps_in_cpp += 1
        else:
            hidden = run_layers(layers.modules, hidden, cos, sin, mask, room)
            self.own_in_torch[str(reason)] += 1
        self.steps += 1
        room.hand_over(cached)
        return base.norm(hidden)
