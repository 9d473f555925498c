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

import dataclasses
import inspect
import warnings
import weakref
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property
from itertools import repeat
from operator import contains, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from transformers.activations import SiLUActivation
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from ..layers import extension, ops
from ..layers.addresses import address, is_plain, is_watched
from ..layers.sparse_linear import SparseLinear


__all__ = ["GenerationReport", "explain_generation", "optimize_generation", "restore_generation"]


class _Family(NamedTuple):
    """The classes that the step below was written against; a subclass may compute something else."""

    layer: type[nn.Module]
    attention: type[nn.Module]
    norm: type[nn.Module]
    mlp: type[nn.Module]


def _families() -> dict[type[nn.Module], _Family]:
    modules = {
        "Llama": modeling_llama,
        "Mistral": modeling_mistral,
        "Qwen2": modeling_qwen2,
        "Qwen3": modeling_qwen3,
    }
    parts = ("DecoderLayer", "Attention", "RMSNorm", "MLP")
    return {
        getattr(module, f"{name}Model"): _Family(*(getattr(module, name + part) for part in parts))
        for name, module in modules.items()
    }


_FAMILIES = _families()
_FEW_ROWS = 4  # with more torch multiplies dense layers faster than the C++ step does
_SILU = (nn.SiLU, SiLUActivation)
# The field of the output that holds the cache has had two names so far; what it is annotated with has not changed.
_OUTPUT_CACHE = next(field.name for field in dataclasses.fields(BaseModelOutputWithPast) if "Cache" in str(field.type))
_ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP_LINEARS = ("gate_proj", "up_proj", "down_proj")


def optimize_generation(model: nn.Module) -> nn.Module:
    """Make `model.generate` faster on the CPU, in place; `restore_generation` undoes it.

    Only single-token steps of generation take the faster path, and with it a dense output embedding, which torch multiplies
    with few rows at half the speed of memory: one new position per sequence, evaluation mode, no
    gradients, CPU, attention "sdpa", and the `DynamicCache` that `generate` uses by default. Greedy search, sampling,
    beam search, batches and padding all come down to such steps. Everything else (the prompt, training, other caches,
    sliding-window attention, hidden states or attentions asked for, hooks inside the decoder layers, torch.compile,
    autocast) runs the model's own code as before.

    The result is that of the model's own code up to rounding: float32 logits agree to about 1e-5. In bfloat16 the
    norms and the rotary embedding round less often, so logits differ by a few bfloat16 steps, and greedy search can take another
    token where two are nearly tied.

    It may be called before or after layers are swapped, adapters merged or weights moved, and does not change what is
    saved. A copy (`copy.deepcopy`) of the model is optimized too.

    A model that generates and takes none of the faster steps warns once, with the reason; `explain_generation` has all of them.

    Args:
        model (`nn.Module`): a Llama, Mistral, Qwen2 or Qwen3 of transformers, whatever its head, or a wrapper around
            one, such as a PeftModel.

    Returns:
        `nn.Module`: `model` itself.

    Raises:
        ValueError: if there is no such decoder in `model`, if its attention is not "sdpa", if its layers are not those
            of transformers, or if something else has replaced its `forward`.
    """
    base: Any = _find(model)
    if isinstance(base.__dict__.get("forward"), _DecodeStep):
        return model
    _check(base)
    base.forward = _DecodeStep(base)
    head = _output_embedding(model)
    if type(head) is nn.Linear and "forward" not in head.__dict__:
        head.forward = _DenseStep(head)  # type: ignore[method-assign]
    return model


def _check(base: Any) -> None:
    """ValueError if the step cannot stand in for the forward of this decoder."""
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


@dataclasses.dataclass(frozen=True)
class GenerationReport:
    """What became of the calls of an optimized decoder; printing it gives the reasons as text.

    Args:
        optimized (`bool`): whether `optimize_generation` was called.
        steps (`int`): calls that took the faster step, since then.
        steps_in_cpp (`int`): those of them whose layers ran in C++.
        own (`dict[str, int]`): calls that ran the model's own code, by the reason, the most frequent first. A prompt is one.
        own_in_torch (`dict[str, int]`): steps whose layers ran in torch and not in C++, by the reason.
        obstacles (`tuple[str, ...]`): what would keep the next call from the faster step, as the model is now.
        obstacles_in_cpp (`tuple[str, ...]`): what would keep the layers of the next step from C++.
    """

    optimized: bool
    steps: int
    steps_in_cpp: int
    own: dict[str, int]
    own_in_torch: dict[str, int]
    obstacles: tuple[str, ...]
    obstacles_in_cpp: tuple[str, ...]

    def __str__(self) -> str:
        if not self.optimized:
            head = "The model is not optimized" + ("." if self.obstacles else ": call `optimize_generation`.")
        else:
            head = f"{self.steps} steps of the faster kind, {self.steps_in_cpp} of them in C++."
        lines = [head]
        for title, reasons in (
            ("Calls that ran the model's own code:", self.own),
            ("Steps whose layers ran in torch:", self.own_in_torch),
        ):
            lines += [title, *(f"  {count:>6}  {reason}" for reason, count in reasons.items())] if reasons else []
        for title, found in (
            ("As the model is now, no faster step is taken:", self.obstacles),
            ("As the model is now, the layers do not run in C++:", self.obstacles_in_cpp),
        ):
            lines += [title, *(f"  {reason}" for reason in found)] if found else []
        return "\n".join(lines)


def explain_generation(model: nn.Module) -> GenerationReport:
    """Why the faster step of `optimize_generation` is taken or not; print it.

    Before `optimize_generation` it says whether the model can be optimized. After it, it counts the calls of the decoder by
    what became of them, and looks at the model as it is now.

    Args:
        model (`nn.Module`): any model; nothing about it is changed, and nothing is run.

    Returns:
        `GenerationReport`: counts and reasons.
    """
    try:
        base: Any = _find(model)
    except ValueError as error:
        return GenerationReport(False, 0, 0, {}, {}, (str(error),), ())
    step = base.__dict__.get("forward")
    optimized = isinstance(step, _DecodeStep)
    if not optimized:
        try:
            _check(base)
        except ValueError as error:
            return GenerationReport(False, 0, 0, {}, {}, (str(error),), ())
        step = _DecodeStep(base)
    call = _Call(step, (), {})
    obstacles = tuple(condition.reason(call) for condition in _MODEL_CONDITIONS if not condition.holds(call))
    in_cpp = None if call.layers is None else _FusedLayers.make(call.layers.modules, call.layers.family)
    return GenerationReport(
        optimized,
        step.steps,
        step.steps_in_cpp,
        dict(step.own.most_common()),
        dict(step.own_in_torch.most_common()),
        obstacles,
        (in_cpp,) if isinstance(in_cpp, str) else (),
    )


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
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _DenseStep):
            del module.forward
    return model


def _output_embedding(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


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
    attention = getattr(layer, "self_attn", None)
    if type(layer) is not family.layer or type(attention) is not family.attention:
        return [type(layer), type(attention)], [family.layer, family.attention]
    norms = [type(getattr(owner, name, None)) for owner, name in _parts(layer)[1:]]
    return [family.layer, family.attention, *norms], [family.layer, family.attention, *[family.norm] * len(norms)]


class _Watch:
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
            if not _Watch([(owner, name)]).is_plain():
                kind = type(owner._modules[name]).__name__
                return f"the {kind} at {name!r} of a {type(owner).__name__} has a hook or a forward of its own"
        return "a module was replaced"


def _normalize(hidden: Tensor, norm: Any) -> Tensor:
    """RMSNorm over the last dimension, as the classes of transformers compute it: in float32, the weight last."""
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    scale = length.square_().div_(hidden.shape[-1]).add_(norm.variance_epsilon).rsqrt_()
    return norm.weight * torch.mul(hidden, scale, out=torch.empty_like(hidden))


class _Room:
    """The keys and values of a cache in buffers with room to grow, where the cache itself copies all for each token.

    The layers of the cache hold views of the buffers. What others do to such a layer (reordering, cropping, updates of its
    own) replaces the view, which is how the room notices that it holds no longer.
    """

    def __init__(self, cached: list[DynamicLayer]) -> None:
        self.length = cached[0].keys.shape[2]
        self.capacity = self.length + max(64, self.length // 4)
        self.buffers: list[Tensor] = []  # keys and values of each layer in turn, [batch, kv_heads, capacity, head_dim]
        for each in cached:  # one after the other, so that no more than one layer is held twice
            self.buffers += [self._with_room(each.keys), self._with_room(each.values)]
            each.keys, each.values = (buffer.narrow(2, 0, self.length) for buffer in self.buffers[-2:])
        self.views = [view for each in cached for view in (each.keys, each.values)]
        self.is_plain = all(map(is_plain, self.buffers))
        self.addresses = array("Q", [buffer.data_ptr() for buffer in self.buffers] if self.is_plain else [])

    def _with_room(self, old: Tensor) -> Tensor:
        new = old.new_empty((*old.shape[:2], self.capacity, old.shape[3]))
        new.narrow(2, 0, self.length).copy_(old)
        return new

    def holds(self, held: list[Tensor]) -> bool:
        """Whether `held`, what the cache holds now, is what the room gave to it, and one more position finds room."""
        return (
            self.length < self.capacity
            and len(self.views) == len(held)
            and all(map(is_, self.views, held))
            # made in inference mode, it cannot be written to outside
            and (torch.is_inference_mode_enabled() or not self.buffers[0].is_inference())
        )

    def advance(self) -> None:
        """Makes the views one position longer."""
        self.length += 1
        self.views = [buffer.narrow(2, 0, self.length) for buffer in self.buffers]

    def hand_over(self, cached: list[DynamicLayer]) -> None:
        """Gives the views to the cache."""
        for each, keys, values in zip(cached, self.views[::2], self.views[1::2], strict=True):
            each.keys, each.values = keys, values


def _is_plain_tensor(tensor: Any, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether C++ can read it by its address."""
    return is_plain(tensor) and tensor.shape == shape and tensor.dtype in dtypes and tensor.is_contiguous()


def _fits_linear(linear: Any, dtype: torch.dtype) -> bool:
    """Whether the C++ step can compute a linear layer: a sparse one, or a dense one of the model's type."""
    if type(linear) is SparseLinear:
        dtypes = ops.FLOAT_DTYPES
    elif type(linear) is nn.Linear and _is_plain_tensor(
        linear.weight, (linear.out_features, linear.in_features), (dtype,)
    ):
        dtypes = (dtype,)
    else:
        return False
    return linear.bias is None or _is_plain_tensor(linear.bias, (linear.out_features,), dtypes)


class _FusedLayers:
    """The layers for the C++ step (csrc/decode.h): addresses, and a watch on everything behind them."""

    def __init__(self, layers: list[Any], dtype: torch.dtype) -> None:
        first = layers[0].self_attn
        self.count, self.dtype, self.head_dim = len(layers), dtype, first.head_dim
        self.hidden_size, self.kv_heads = first.q_proj.in_features, first.k_proj.out_features // first.head_dim
        self.most_rows = ops.DENSE_ROWS - 1
        native: Any = extension._C
        self.model = native.DecodeModel(ops.FLOAT_TYPES[dtype], self.hidden_size, self.head_dim)
        self.entries: list[tuple[dict[str, Any], str, Any]] = []  # what was found where
        places: list[tuple[nn.Module, str]] = []
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            places += [(layer, "mlp"), (mlp, "act_fn")]
            places += [(attention, name) for name in _ATTENTION_LINEARS] + [(mlp, name) for name in _MLP_LINEARS]
            norms = [layer.input_layernorm, layer.post_attention_layernorm]
            norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
            linears = [getattr(attention, name) for name in _ATTENTION_LINEARS]
            linears += [getattr(mlp, name) for name in _MLP_LINEARS]
            for norm in norms:
                if norm is not None:
                    self._enter(norm._parameters, "weight")
                    self._enter(norm.__dict__, "variance_epsilon")
            for linear in linears:
                if type(linear) is SparseLinear:
                    self._enter(linear.__dict__, "packed")
                    self._enter(linear.__dict__, "scales")
                else:
                    self._enter(linear._parameters, "weight")
                    self.most_rows = _FEW_ROWS
                self._enter(linear._parameters, "bias")
                self._enter(linear.__dict__, "bias")  # where modules keep one that is None, or no parameter
            self._enter(attention.__dict__, "scaling")
            self.model.add_layer(
                **dict(zip(("q", "k", "v", "o", "gate", "up", "down"), map(self._linear, linears), strict=True)),
                **dict(zip(("input_norm", "mlp_norm", "q_norm", "k_norm"), map(self._norm, norms), strict=True)),
                scaling=attention.scaling,
            )
        self.watch = _Watch(places)
        self.owners, self.names, self.found = ([entry[i] for entry in self.entries] for i in range(3))
        self.tensors = [found for found in self.found if isinstance(found, Tensor)]
        self.addresses = list(map(Tensor.data_ptr, self.tensors))
        # Casts put other memory behind the same parameter. As long as this one is held it cannot have the same address.
        self.memory = [tensor.detach() for tensor in self.tensors]

    @staticmethod
    def _linear(linear: Any) -> Any:
        packed, bias = (linear.packed, linear.bias) if type(linear) is SparseLinear else (None, linear.bias)
        scales = None if packed is None else linear.scales
        native: Any = extension._C
        return native.DecodeLinear(
            out_features=linear.out_features,
            in_features=linear.in_features,
            weight=linear.weight.data_ptr() if packed is None else packed.data_ptr(),
            size=0 if packed is None else packed.numel(),
            scales=0 if scales is None else scales.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            bias_type=ops.FLOAT_TYPES[torch.float32 if bias is None else bias.dtype],
        )

    @staticmethod
    def _norm(norm: Any) -> Any:
        native: Any = extension._C
        if norm is None:
            return None
        return native.DecodeNorm(weight=norm.weight.data_ptr(), epsilon=norm.variance_epsilon)

    def _enter(self, owner: dict[str, Any], name: str) -> None:
        self.entries.append((owner, name, owner.get(name)))

    @classmethod
    def make(cls, layers: list[Any], family: _Family) -> _FusedLayers | str:
        """The reason if the C++ step does not compute what these layers do."""
        dtype = layers[0].input_layernorm.weight.dtype
        if extension._C is None:
            return "the C++ extension is not built (`peft-elastic info` says how to get it)"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"the norms are {dtype}; allowed are torch.float32 and torch.bfloat16"
        heads = set()
        for index, layer in enumerate(layers):
            attention, mlp = layer.self_attn, layer.mlp
            if type(mlp) is not family.mlp or type(mlp.act_fn) not in _SILU:
                return (
                    f"the MLP of layer {index} is a {type(mlp).__name__} with {type(getattr(mlp, 'act_fn', None)).__name__}; "
                    f"allowed is a {family.mlp.__name__} with SiLU"
                )
            linears = [(attention, name) for name in _ATTENTION_LINEARS] + [(mlp, name) for name in _MLP_LINEARS]
            for owner, name in linears:
                if not _fits_linear(linear := getattr(owner, name), dtype):
                    return (
                        f"{name} of layer {index} is a {type(linear).__name__}; allowed are SparseLinear, and nn.Linear in "
                        f"{dtype}, with plain contiguous tensors on the CPU"
                    )
            width = attention.q_proj.in_features
            norms = [(layer, "input_layernorm", width), (layer, "post_attention_layernorm", width)]
            norms += [
                (attention, name, attention.head_dim) for name in ("q_norm", "k_norm") if hasattr(attention, name)
            ]
            for owner, name, size in norms:
                if not _is_plain_tensor(getattr(owner, name).weight, (size,), (dtype,)):
                    return f"the weight of {name} of layer {index} is no plain contiguous {dtype} tensor ({size},) on the CPU"
            heads.add((attention.head_dim, width, attention.k_proj.out_features))
        if len(heads) > 1:
            return "the layers differ in their head dimension, hidden size or number of key-value heads"
        try:
            fused = cls(layers, dtype)
        except ValueError as error:  # layers that do not fit together: torch says so in its own words
            return f"the layers do not fit together: {error}"
        return fused if fused.watch.is_plain() else fused.watch.what_is_not_plain()

    def is_current(self) -> bool:
        """Whether the modules and all tensors are still those that the addresses were taken from."""
        return (
            self.watch.is_plain()
            and all(map(is_, map(dict.get, self.owners, self.names), self.found))  # type: ignore[arg-type]
            and list(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )

    def refuses(self, hidden: Tensor, cos: Tensor, room: _Room) -> str | None:
        """The reason, if the tensors are not as the C++ code expects."""
        batch = hidden.shape[0]
        if batch > self.most_rows:
            return f"more than {self.most_rows} sequences at once, which torch multiplies faster"
        if not (
            hidden.dtype == cos.dtype == self.dtype
            and len(room.buffers) == 2 * self.count
            and cos.shape in ((1, 1, self.head_dim), (batch, 1, self.head_dim))
            and hidden.shape == (batch, 1, self.hidden_size)
            and room.buffers[0].dtype == self.dtype
            and room.is_plain
            and room.buffers[0].shape == (batch, self.kv_heads, room.capacity, self.head_dim)
        ):
            return "the embedding, the rotary embedding or the cache is of another type or shape than the layers"
        return None

    def run(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, room: _Room) -> Tensor:
        """What the layers make of `hidden` [batch, 1, hidden_size]; fills the last position of the room."""
        hidden, cos, sin = hidden.contiguous(), cos.contiguous(), sin.contiguous()
        mask = None if mask is None else mask.contiguous()
        output = torch.empty_like(hidden)
        extension._C.decode(  # type: ignore[union-attr]
            self.model,
            batch=hidden.shape[0],
            length=room.length - 1,
            capacity=room.capacity,
            hidden=address("hidden", hidden, self.dtype),
            cos=address("cos", cos, self.dtype),
            sin=address("sin", sin, self.dtype, tuple(cos.shape)),
            rotary_per_row=cos.shape[0] > 1,
            mask=0 if mask is None else address("mask", mask, torch.bool, (hidden.shape[0], room.length)),
            keys_and_values=room.addresses.buffer_info()[0],
            output=output.data_ptr(),
            threads=torch.get_num_threads(),
        )
        return output


def _run_layers(
    layers: list[Any], hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, room: _Room
) -> Tensor:
    """The layers one by one, in torch, with whatever linear layers they have."""
    batch, dim = hidden.shape[0], cos.shape[-1]
    # x cos + rotate_half(x) sin, where rotate_half swaps the halves and negates the first: put the sign into sin
    sin = torch.cat((-sin[..., : dim // 2], sin[..., dim // 2 :]), dim=-1)
    if mask is not None:
        mask = mask[:, None, None, :]
    for layer, keys, values in zip(layers, room.views[::2], room.views[1::2], strict=True):
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
        keys.select(2, -1).copy_(key)
        values.select(2, -1).copy_(value)
        # one position: query heads that share a key-value head are as good as positions of that head
        query = query.view(batch, kv_heads, heads // kv_heads, dim)
        attended = nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=attention.scaling
        )
        hidden = hidden + attention.o_proj(attended.reshape(batch, 1, heads * dim))
        hidden = hidden + layer.mlp(_normalize(hidden, layer.post_attention_layernorm))
    return hidden


class _Layers:
    """The layers of a decoder, found to be those that the step knows."""

    def __init__(self, modules: list[Any], watch: _Watch, family: _Family) -> None:
        self.modules, self.watch, self.family = modules, watch, family
        self.indices = [layer.self_attn.layer_idx for layer in modules]  # in the cache
        self.fused: _FusedLayers | None = None

    @classmethod
    def make(cls, base: Any, count: int) -> _Layers | str:
        """The reason if one of the first `count` layers is another, or has a hook."""
        family, modules = _FAMILIES[type(base)], list(base.layers)[:count]
        places: list[tuple[nn.Module, str]] = [(base, "layers")]
        for index, layer in enumerate(modules):
            found, expected = _kinds(layer, family)
            if found != expected:
                return (
                    f"layer {index} is made of {[kind.__name__ for kind in found]}; allowed are "
                    f"{[kind.__name__ for kind in expected]} of transformers"
                )
            places += [(base.layers, str(index)), *_parts(layer)]
        layers = cls(modules, _Watch(places), family)
        if not layers.watch.is_plain():
            return layers.watch.what_is_not_plain()
        if not 0 < count == len(set(layers.indices)):
            return "there are no layers, or two share a place in the cache (`layer_idx`)"
        return layers

    def cached(self, cache: DynamicCache) -> list[DynamicLayer]:
        return [cache.layers[index] for index in self.indices]

    def fused_if_possible(self) -> _FusedLayers | str:
        """The reason if it is not."""
        fused = self.fused
        if fused is None or not fused.is_current():
            self.fused = None  # frees what it held
            made = _FusedLayers.make(self.modules, self.family)
            if isinstance(made, str):
                return made
            fused = self.fused = made
        return fused


def _held(cached: list[DynamicLayer]) -> list[Tensor]:
    return [tensor for each in cached for tensor in (each.keys, each.values)]


class _DenseStep:
    """Stands in for the forward of the output embedding, a dense layer: multiplies few rows as fast as memory is."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear

    def __call__(self, input: Tensor) -> Tensor:
        linear = self.linear
        rows = input.numel() // linear.in_features if linear.in_features else 0
        if not 0 < rows <= _FEW_ROWS or not self.takes(input):
            return nn.Linear.forward(linear, input)
        x, weight, bias = input.contiguous(), linear.weight, linear.bias
        y = x.new_empty((*x.shape[:-1], linear.out_features))
        extension._C.dense_linear(  # type: ignore[union-attr]
            x=x.data_ptr(),
            rows=rows,
            out_features=linear.out_features,
            in_features=linear.in_features,
            weight=weight.data_ptr(),
            bias=0 if bias is None else bias.data_ptr(),
            y=y.data_ptr(),
            type=ops.FLOAT_TYPES[x.dtype],
            threads=torch.get_num_threads(),
        )
        return y

    def takes(self, input: Tensor) -> bool:
        """Whether C++ computes what torch would."""
        return (
            extension._C is not None
            and not _is_special_mode()
            and is_plain(input)
            and input.dtype in (torch.float32, torch.bfloat16)
            and input.dim() > 0
            and input.shape[-1] == self.linear.in_features
            and _fits_linear(self.linear, input.dtype)
        )


def _is_special_mode() -> bool:
    """Whether torch watches or changes what is computed, so that it must see every operator."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_watched()


class _Call:
    """A call of a decoder's forward, and the decoder that it finds.

    Versions of transformers give the same argument different names. The cache is known by its class, wherever it stands; and
    an argument whose name the step does not know keeps it from being taken.
    """

    def __init__(self, step: _DecodeStep, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
    def layers(self) -> _Layers | None:
        return self.step.plain_layers()

    @cached_property
    def cached(self) -> list[DynamicLayer]:
        """The layers of the cache that belong to the decoder's."""
        return self.layers.cached(self.cache)  # type: ignore[union-attr]

    @cached_property
    def held(self) -> list[Tensor]:
        return _held(self.cached)

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
    holds: Callable[[_Call], bool]
    reason: Callable[[_Call], str]  # why a call is left to the model's own code where it does not hold


_SEVERAL = "several new positions for each sequence, or none, as in a prompt"
_MODEL_CONDITIONS = (
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
        lambda call: not _is_special_mode(),
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
_CONDITIONS = _MODEL_CONDITIONS + _CALL_CONDITIONS


class _DecodeStep:
    """Stands in for the forward of a decoder: takes the steps it knows itself, and leaves the others to the decoder."""

    def __init__(self, base: nn.Module) -> None:
        self.base: Any = base
        self.__signature__ = inspect.signature(type(base).forward.__get__(base))
        self.names = list(self.__signature__.parameters)
        self.layers: _Layers | None = None
        self.no_layers: str = ""  # why there are none
        self.rooms: weakref.WeakKeyDictionary[DynamicLayer, _Room] = weakref.WeakKeyDictionary()  # by the first layer
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
            call = _Call(self, args, kwargs)
            reason = self.refuses(call)
            if reason is None:
                layers: Any = call.layers
                hidden = self.step(layers, call.input_ids, call.attention_mask, call.position_ids, call.cache)
                return BaseModelOutputWithPast(**{"last_hidden_state": hidden, _OUTPUT_CACHE: call.cache})
            self._note(call, reason)
        return type(self.base).forward(self.base, *args, **kwargs)

    def refuses(self, call: _Call) -> str | None:
        """The reason, if a call is not a step of generation that `step` computes as the decoder would."""
        for condition in _CONDITIONS:
            if not condition.holds(call):
                return condition.reason(call)
        return None

    def _note(self, call: _Call, reason: str) -> None:
        self.own[reason] += 1
        if self.steps == 0 and not self.has_warned and reason is not _SEVERAL and call.decodes():
            self.has_warned = True
            warnings.warn(
                f"The model is optimized for generation, but its own code generates: {reason}. "
                "`print(peft_elastic.explain_generation(model))` says more."
            )

    def plain_layers(self) -> _Layers | None:
        """The layers, if they are those of transformers and free of hooks."""
        base: Any = self.base
        count = min(len(base.layers), base.config.num_hidden_layers)
        layers = self.layers
        if layers is None or len(layers.modules) != count or not layers.watch.is_plain():
            made = _Layers.make(base, count)
            layers = self.layers = None if isinstance(made, str) else made
            self.no_layers = made if isinstance(made, str) else ""
        return layers

    def step(
        self,
        layers: _Layers,
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
        if room is None or not room.holds(_held(cached)):
            self.rooms.pop(cached[0], None)  # its memory is not needed while the new one is filled
            room = self.rooms[cached[0]] = _Room(cached)
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
            hidden = _run_layers(layers.modules, hidden, cos, sin, mask, room)
            self.own_in_torch[str(reason)] += 1
        self.steps += 1
        room.hand_over(cached)
        return base.norm(hidden)
