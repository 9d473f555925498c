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
"""Faster `generate` on the CPU: the work around the linear layers, in fewer and cheaper calls.

For a small model the many small operators of a decoder layer (norms, rotary embedding, growing the cache) and the
Python around them take as long as the linear layers. `optimize_generation` replaces what a decoder does for one new
token by a step written for it. Nothing is compiled, so it starts at once and needs no compiler; linear layers, dense
or sparse, with or without an adapter, are called as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from itertools import repeat
from operator import contains, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3


__all__ = ["optimize_generation", "restore_generation"]


class _Family(NamedTuple):
    """The classes that the step below was written against; a subclass may compute something else."""

    layer: type[nn.Module]
    attention: type[nn.Module]
    norm: type[nn.Module]


def _families() -> dict[type[nn.Module], _Family]:
    modules = {
        "Llama": modeling_llama,
        "Mistral": modeling_mistral,
        "Qwen2": modeling_qwen2,
        "Qwen3": modeling_qwen3,
    }
    parts = ("DecoderLayer", "Attention", "RMSNorm")
    return {
        getattr(module, f"{name}Model"): _Family(*(getattr(module, name + part) for part in parts))
        for name, module in modules.items()
    }


_FAMILIES = _families()


def optimize_generation(model: nn.Module) -> nn.Module:
    """Make `model.generate` faster on the CPU, in place; `restore_generation` undoes it.

    Only single-token steps of generation take the faster path: one new position per sequence, evaluation mode, no
    gradients, CPU, attention "sdpa", and the `DynamicCache` that `generate` uses by default. Greedy search, sampling,
    beam search, batches and padding all come down to such steps. Everything else (the prompt, training, other caches,
    sliding-window attention, hidden states or attentions asked for, hooks inside the decoder layers, torch.compile,
    autocast) runs the model's own code as before.

    The result is that of the model's own code up to rounding: float32 logits agree to about 1e-5. In bfloat16 the
    norms and the rotary embedding round less often, so logits differ by a few bfloat16 steps, and greedy search can take another
    token where two are nearly tied.

    It may be called before or after layers are swapped, adapters merged or weights moved, and does not change what is
    saved. A copy (`copy.deepcopy`) of the model is optimized too.

    Args:
        model (`nn.Module`): a Llama, Mistral, Qwen2 or Qwen3 of transformers, whatever its head, or a wrapper around
            one, such as a PeftModel.

    Returns:
        `nn.Module`: `model` itself.

    Raises:
        ValueError: if there is no such decoder in `model`, if its attention is not "sdpa", if its layers are not those
            of transformers, or if something else has replaced its `forward`.
    """
    base = _find(model)
    if isinstance(base.__dict__.get("forward"), _DecodeStep):
        return model
    if "forward" in base.__dict__:
        raise ValueError(
            f"`model`: the forward of its {type(base).__name__} was replaced by {base.__dict__['forward']!r}; allowed "
            "is the one of transformers (accelerate's hooks go with accelerate.hooks.remove_hook_from_module)."
        )
    attention = base.config._attn_implementation
    if attention != "sdpa":
        raise ValueError(
            f"`model` has attn_implementation={attention!r}; allowed is 'sdpa' (`model.set_attn_implementation('sdpa')`)."
        )
    for index, layer in enumerate(base.layers):
        found, expected = _kinds(layer, _FAMILIES[type(base)])
        if found != expected:
            raise ValueError(
                f"`model`: layer {index} is made of {[kind.__name__ for kind in found]}; allowed are "
                f"{[kind.__name__ for kind in expected]} of transformers."
            )
    base.forward = _DecodeStep(base)
    return model


def restore_generation(model: nn.Module) -> nn.Module:
    """Undo `optimize_generation`, in place.

    Returns:
        `nn.Module`: `model` itself.

    Raises:
        ValueError: if `model` is not optimized.
    """
    base = _find(model)
    if not isinstance(base.__dict__.get("forward"), _DecodeStep):
        raise ValueError(f"`model` ({type(model).__name__}) is not optimized: call `optimize_generation` first.")
    del base.forward
    return model


def _find(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) in _FAMILIES:
            return module
    raise ValueError(
        f"`model` ({type(model).__name__}) has no decoder that can be optimized; allowed are "
        f"{', '.join(sorted(kind.__name__ for kind in _FAMILIES))} of transformers, alone or inside another module."
    )


def _parts(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where the modules are, inside a layer, whose own forward the step does not call: their owner and their name."""
    attention: Any = layer.self_attn
    head_norms = [(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return [(layer, "self_attn"), (layer, "input_layernorm"), (layer, "post_attention_layernorm"), *head_norms]


def _kinds(layer: nn.Module, family: _Family) -> tuple[list[type], list[type]]:
    """The classes that a layer and its parts are of, and those that they should be of."""
    if type(layer) is not family.layer or type(layer.self_attn) is not family.attention:
        return [type(layer), type(getattr(layer, "self_attn", None))], [family.layer, family.attention]
    norms = [type(getattr(owner, name)) for owner, name in _parts(layer)[1:]]
    return [family.layer, family.attention, *norms], [family.layer, family.attention, *[family.norm] * len(norms)]


class _Watch:
    """Notices modules that were replaced, given another class or another forward, or hooked. Takes microseconds."""

    def __init__(self, places: Iterable[tuple[nn.Module, str]]) -> None:
        places = list(places)
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


def _normalize(hidden: Tensor, norm: Any) -> Tensor:
    """RMSNorm over the last dimension, as the classes of transformers compute it: in float32, the weight last."""
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(hidden.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return norm.weight * torch.mul(hidden, scale, out=torch.empty_like(hidden))


class _DecodeStep:
    """Stands in for the forward of a decoder: takes the steps it knows itself, and leaves the others to the decoder."""

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.layers: list[Any] = []  # those that `watch` watches
        self.watch: _Watch | None = None
        # by cache layer: the buffers with room to grow, and the view of them that the cache layer held last
        self.buffers: weakref.WeakKeyDictionary[DynamicLayer, tuple[Tensor, Tensor, Tensor, Tensor]]
        self.buffers = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:  # for copies and pickles
        return {"base": self.base}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["base"])  # type: ignore[misc]

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.takes(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs):
            hidden = self.base.embed_tokens(input_ids)  # type: ignore[operator]
            hidden = self.step(hidden, attention_mask, position_ids, past_key_values)
            return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)
        return type(self.base).forward(
            self.base,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def takes(
        self,
        input_ids: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        cache: Any,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> bool:
        """Whether a call is a step of generation that `step` computes as the decoder would."""
        base: Any = self.base
        config = base.config
        if (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch.is_grad_enabled()
            or base.training
            or inputs_embeds is not None
        ):
            return False
        if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] != 1 or input_ids.device.type != "cpu":
            return False
        if torch.is_autocast_enabled("cpu") or config._attn_implementation != "sdpa" or use_cache is False:
            return False
        if config.output_hidden_states or config.output_attentions or config.return_dict is False:
            return False
        for name, value in kwargs.items():
            if name == "return_dict":
                if value is False:
                    return False
            # cache_position, which older versions pass, says what the length of the cache says
            elif value is not None and value is not False and name != "cache_position":
                return False
        # a cache made without the configuration holds all positions even where the model looks back through a window
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
            type(base) is modeling_mistral.MistralModel and config.sliding_window is not None
        ):
            return False
        count = min(len(base.layers), config.num_hidden_layers)
        if type(cache) is not DynamicCache or cache.offloading or len(cache.layers) < count or count == 0:
            return False
        if not self.has_plain_layers(count):
            return False
        # dropout is the one thing in a layer that a training mode of its own would change
        if config.attention_dropout and any(layer.self_attn.training for layer in self.layers):
            return False
        batch, dtype = input_ids.shape[0], self.layers[0].input_layernorm.weight.dtype
        first = cache.layers[0]
        if type(first) is not DynamicLayer or not first.is_initialized or first.keys is None:
            return False
        length = first.keys.shape[-2] if first.keys.dim() == 4 else 0
        for cached in cache.layers:
            if type(cached) is not DynamicLayer or cached.keys is None or cached.keys.dim() != 4:
                return False
            if cached.keys.shape[0] != batch or cached.keys.shape[2] != length or length == 0:
                return False
            if cached.keys.dtype != dtype or cached.values.dtype != dtype:
                return False
        if position_ids is not None and (position_ids.dim() != 2 or position_ids.shape[1] != 1):
            return False
        if attention_mask is not None and (
            not isinstance(attention_mask, Tensor) or attention_mask.shape != (batch, length + 1)
        ):
            return False
        return not (module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks)

    def has_plain_layers(self, count: int) -> bool:
        """Whether the first `count` layers are those of transformers, free of hooks."""
        base: Any = self.base
        if self.watch is not None and len(self.layers) == count and self.watch.is_plain():
            return True
        self.watch = None
        self.layers = list(base.layers)[:count]
        places: list[tuple[nn.Module, str]] = [(base, "layers")]
        for index, layer in enumerate(self.layers):
            found, expected = _kinds(layer, _FAMILIES[type(base)])
            if found != expected:
                return False
            places += [(base.layers, str(index)), *_parts(layer)]
        watch = _Watch(places)
        if not watch.is_plain():
            return False
        self.watch = watch
        return True

    def step(
        self, hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: DynamicCache
    ) -> Tensor:
        """The last hidden state [batch, 1, hidden] of one new position, whose keys and values go into the cache."""
        base: Any = self.base
        batch = hidden.shape[0]
        if position_ids is None:
            position_ids = torch.tensor([[cache.get_seq_length()]])
        mask = None
        if attention_mask is not None:
            mask = attention_mask.bool()[:, None, None, :]
            if mask.all():
                mask = None
        cos, sin = base.rotary_emb(hidden, position_ids)  # [batch or 1, 1, head_dim]
        dim = cos.shape[-1]
        # x cos + rotate_half(x) sin, where rotate_half swaps the halves and negates the first: put the sign into sin
        sin = torch.cat((-sin[..., : dim // 2], sin[..., dim // 2 :]), dim=-1)

        for layer in self.layers:
            attention = layer.self_attn
            x = _normalize(hidden, layer.input_layernorm)
            query = attention.q_proj(x).reshape(batch, -1, dim)
            key = attention.k_proj(x).reshape(batch, -1, dim)
            value = attention.v_proj(x).reshape(batch, -1, dim)
            if hasattr(attention, "q_norm"):
                query = _normalize(query, attention.q_norm)
                key = _normalize(key, attention.k_norm)
            heads, kv_heads = query.shape[1], key.shape[1]
            both = torch.cat((query, key), dim=1)
            swapped = both.view(batch, -1, 2, dim // 2).flip(2).view(batch, -1, dim)
            query, key = torch.addcmul(both * cos, swapped, sin).split((heads, kv_heads), dim=1)
            keys, values = self.append(cache.layers[attention.layer_idx], key, value)  # type: ignore[arg-type]
            # one position: query heads that share a key-value head are as good as positions of that head
            query = query.view(batch, kv_heads, heads // kv_heads, dim)
            attended = nn.functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, scale=attention.scaling
            )
            hidden = hidden + attention.o_proj(attended.reshape(batch, 1, heads * dim))
            hidden = hidden + layer.mlp(_normalize(hidden, layer.post_attention_layernorm))
        return base.norm(hidden)

    def append(self, cached: DynamicLayer, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a cache layer with those of the new position, [batch, kv_heads, head_dim], behind.

        They are views of buffers with room for more, where the cache's own update copies everything for each token.
        What others do to the cache layer (reordering, cropping, updates of its own) replaces the view, and with it the
        buffers here.
        """
        length = cached.keys.shape[2]
        entry = self.buffers.get(cached)
        if (
            entry is None
            or entry[2] is not cached.keys
            or entry[3] is not cached.values
            or length == entry[0].shape[2]
            # made in inference mode, it cannot be written to outside
            or (entry[0].is_inference() and not torch.is_inference_mode_enabled())
        ):
            keys, values = (self.with_room(old, length + max(64, length // 4)) for old in (cached.keys, cached.values))
        else:
            keys, values = entry[:2]
        keys.select(2, length).copy_(key)
        values.select(2, length).copy_(value)
        cached.keys, cached.values = keys.narrow(2, 0, length + 1), values.narrow(2, 0, length + 1)
        self.buffers[cached] = (keys, values, cached.keys, cached.values)
        return cached.keys, cached.values

    @staticmethod
    def with_room(old: Tensor, length: int) -> Tensor:
        new = old.new_empty((*old.shape[:2], length, old.shape[3]))
        new.narrow(2, 0, old.shape[2]).copy_(old)
        return new
