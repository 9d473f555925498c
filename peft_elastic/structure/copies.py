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
"""A small copy of a part of a model, for trials of it, and arguments to call it with."""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import types
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedConfig

from ..common.parameters import computed_tensors
from ..layers.backends import find_backend, find_linear_backend
from .parts import ConfigOfPart


BATCH, LENGTH = 2, 8
# Blocks with more weights than this are copied with fewer heads and channels.
LARGE = 4_000_000
FEW = {"heads": 2, "mlp": 16}


def plain_module(module: nn.Module) -> tuple[nn.Module, type[nn.Module]]:
    """A module without what peft put around it, and its class when nothing of it is narrowed or skipped."""
    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            break
    cls = type(module)
    while "plain_class" in cls.__dict__:
        cls = cls.plain_class  # type: ignore[attr-defined]
    return module, cls


def is_packed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight in a form of its own, or computes it from others."""
    backend = find_linear_backend(module)
    if backend is not None and (backend.packed or backend.on_grid):
        return True
    return isinstance(module, nn.Linear) and bool(computed_tensors(module))


# -- a small copy ---------------------------------------------------------------------------------------------------------


class Copier:
    """Copies modules with random weights, float32 on the CPU, without hooks, adapters and whatever was narrowed or skipped.

    Args:
        cut: id of a list of blocks -> how many of them are copied.
        seed: of the weights.
    """

    def __init__(self, cut: Mapping[int, int], seed: int) -> None:
        self._cut = cut
        self._random = torch.Generator().manual_seed(seed)
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []  # an id is that of one object while it is there
        self._fresh = frozenset(nn.Module().__dict__)

    def module(self, original: nn.Module) -> Any:
        if id(original) in self._made:
            return self._made[id(original)]
        self._kept.append(original)
        module, cls = plain_module(original)
        if module is not original:
            self._made[id(original)] = made = self.module(module)
            return made
        if is_packed(module):
            made = self._linear(module)
            self._made[id(original)] = made
            return made
        if cls.__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
            cls = _Passing
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        self._made[id(original)] = made
        shapes = _small_experts(module)
        for name, parameter in module._parameters.items():
            made._parameters[name] = None if parameter is None else self._parameter(module, name, parameter, shapes)
        for name, buffer in module._buffers.items():
            made._buffers[name] = None if buffer is None else _plain_tensor(buffer)
        children = list(module._modules.items())
        for name, child in children[: self._cut.get(id(module))]:
            made._modules[name] = None if child is None else self.module(child)
        left_out: tuple[str, ...] = ("forward", "_compiled_call_impl", "_hf_hook", "_old_forward")
        if cls is not type(module):
            left_out += ("active_in", "active_out", "cache_layers")
        for name, value in module.__dict__.items():
            if name not in self._fresh and name not in left_out:
                made.__dict__[name] = self._value(value)
        made.training = False
        return made

    def _linear(self, module: Any) -> nn.Linear:
        with torch.device("meta"):
            made = nn.Linear(module.in_features, module.out_features, getattr(module, "bias", None) is not None)
        for name, parameter in list(made._parameters.items()):
            made._parameters[name] = None if parameter is None else self._parameter(made, name, parameter)
        return made.eval()

    def _parameter(
        self, module: nn.Module, name: str, parameter: torch.Tensor, shapes: Mapping[str, tuple[int, ...]] = {}
    ) -> nn.Parameter:
        if id(parameter) not in self._made:
            self._kept.append(parameter)
            weight = self._random_weight(module, name, parameter, shapes.get(name, tuple(parameter.shape)))
            self._made[id(parameter)] = nn.Parameter(weight, requires_grad=False)
        return self._made[id(parameter)]

    def _random_weight(self, module: nn.Module, name: str, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if not like.is_floating_point():
            return _plain_tensor(like)
        if len(shape) < 2:
            # scales of norms are somewhere around one
            return torch.randn(shape, generator=self._random) * 0.3 + (1.0 if "weight" in name else 0.0)
        backend = find_backend(module)
        transposed = backend is not None and backend.out_dim(module) == 1
        fan_in = shape[0] if transposed else shape[-1] if len(shape) == 3 else math.prod(shape[1:])
        scale = 1.0 if isinstance(module, nn.Embedding) else max(fan_in, 1) ** -0.5
        if math.prod(shape) <= LARGE * (1 if len(shape) == 2 else 16):
            return torch.randn(shape, generator=self._random) * scale
        # overlapping windows of one row of numbers, which cost no memory
        strides = tuple(range(2 * len(shape) - 1, 0, -2))
        size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides))
        return (torch.randn(size, generator=self._random) * scale).as_strided(shape, strides)

    def _value(self, value: Any) -> Any:
        """A plain attribute, which may hold modules."""
        if isinstance(value, nn.Parameter):
            return self._made.get(id(value), _plain_tensor(value))
        if isinstance(value, torch.Tensor):
            return _plain_tensor(value)
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.module(value.__self__))
        if type(value) in (list, tuple, set):
            return type(value)(self._value(entry) for entry in value)
        if type(value) is dict:
            return {key: self._value(entry) for key, entry in value.items()}
        if isinstance(value, PreTrainedConfig):
            return self._config(value)
        if isinstance(value, ConfigOfPart):
            return self._config(value.whole)
        return value

    def _config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        if id(config) not in self._made:
            self._kept.append(config)
            made = copy.deepcopy(config)
            for part in _configs_in(made):
                if getattr(part, "_attn_implementation", None) not in (None, "eager", "sdpa"):
                    part.__dict__["_attn_implementation_internal"] = "eager"  # the others need a GPU
            self._made[id(config)] = made
        return self._made[id(config)]


def _small_experts(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes with fewer channels for the experts of a mixture, of which there can be billions: nobody narrows them.

    They are parameters (experts, 2 * channels, features) and (experts, features, channels), or with both transposed.
    """
    up, down = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if up is None or down is None or up.dim() != 3 or down.dim() != 3 or up.numel() <= LARGE:
        return {}
    few = FEW["mlp"]
    for features, axis in ((up.shape[2], 1), (up.shape[1], 2)):
        channels = down.numel() // down.shape[0] // features
        if up.shape[axis] == 2 * channels and down.shape[3 - axis] == channels and down.shape[axis] == features:
            shapes = {"gate_up_proj": list(up.shape), "down_proj": list(down.shape)}
            shapes["gate_up_proj"][axis], shapes["down_proj"][3 - axis] = 2 * few, few
            if (bias := module._parameters.get("gate_up_proj_bias")) is not None:
                shapes["gate_up_proj_bias"] = [bias.shape[0], 2 * few]
            return {name: tuple(shape) for name, shape in shapes.items()}
    return {}


def _configs_in(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in config.__dict__.values():
        if isinstance(value, PreTrainedConfig):
            yield from _configs_in(value)


def _plain_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Its values in float32 on the CPU, in memory of its own; of one that is nowhere, some that could be."""
    tensor = tensor.detach()
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    if tensor.is_meta:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=dtype)
        return torch.linspace(1.0, 0.1, max(tensor.numel(), 1))[: tensor.numel()].view(tensor.shape)
    return tensor.to("cpu", dtype, copy=True)


class _Passing(nn.Module):
    """In place of a module of torch.compile: passes everything on to what is inside."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules["_orig_mod"](*args, **kwargs)  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["_orig_mod"], name)


# -- arguments ------------------------------------------------------------------------------------------------------------


def arguments_for(root: nn.Module, blocks: list[nn.Module], hidden: int, seed: int) -> Iterator[dict[str, Any]]:
    """Arguments with which a module may run its blocks, the most likely ones first."""
    random = torch.Generator().manual_seed(seed)
    try:
        parameters = inspect.signature(root.forward).parameters
    except (TypeError, ValueError):
        return
    config: Any = getattr(root, "config", None)
    others = _other_arguments(root, parameters, blocks, hidden, random)

    def states(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=random)

    embeddings = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        embeddings = root.get_input_embeddings()  # type: ignore[operator]
    tables = [module.num_embeddings for module in root.modules() if isinstance(module, nn.Embedding)]
    rows = (
        getattr(embeddings, "num_embeddings", None) or getattr(config, "vocab_size", None) or min(tables, default=None)
    )
    columns = getattr(embeddings, "embedding_dim", None)
    names = [name for name, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    first = next(iter(names), "")
    mains: list[dict[str, torch.Tensor]] = []
    for size in dict.fromkeys((hidden, columns or hidden)):
        for name in ("inputs_embeds", "hidden_states"):
            if name in names:
                mains.append({name: states(BATCH, LENGTH, size)})
    if "input_ids" in names and rows:
        ids = torch.randint(min(4, rows - 1), rows, (BATCH, LENGTH), generator=random)
        mains.append({"input_ids": ids})
        if "decoder_input_ids" in names:
            mains.insert(0, {"input_ids": ids, "decoder_input_ids": ids.flip(1)})
    if "pixel_values" in names:
        channels = getattr(config, "num_channels", None) or 3
        size = getattr(config, "image_size", None) or 32
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        mains.append({"pixel_values": states(BATCH, channels, height, width)})
    if "input_features" in names:
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or hidden
        longest = getattr(config, "max_source_positions", None)
        for length in ((2 * longest,) if longest else ()) + (32,):
            mains.append({"input_features": states(BATCH, bins, length)})
            mains.append({"input_features": states(BATCH, length, bins)})
    if "input_values" in names:
        mains.append({"input_values": states(BATCH, 1600)})
    if first and not any(first in main for main in mains):
        mains.append({first: states(BATCH, LENGTH, hidden)})
        if rows:
            mains.append({first: torch.randint(0, rows, (BATCH, LENGTH), generator=random)})
    for main in mains:
        for other in others:
            yield {**other, **main}


def shorten(root: nn.Module) -> None:
    """Let an encoder of speech that reads half a minute, no more and no less, read a moment."""
    config: Any = getattr(root, "config", None)
    embeddings = getattr(root, "embed_positions", None)
    longest = getattr(config, "max_source_positions", None)
    if isinstance(embeddings, nn.Embedding) and embeddings.num_embeddings == longest and longest > 2 * LENGTH:
        config.max_source_positions = embeddings.num_embeddings = 2 * LENGTH
        embeddings.weight.data = embeddings.weight.data[: 2 * LENGTH]
        root.__dict__.update({"max_source_positions": 2 * LENGTH} if "max_source_positions" in root.__dict__ else {})


def _other_arguments(
    root: nn.Module,
    parameters: Mapping[str, inspect.Parameter],
    blocks: list[nn.Module],
    hidden: int,
    random: torch.Generator,
) -> list[dict[str, Any]]:
    """What comes beside the main input."""
    needed: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter.default is not parameter.empty:
            continue
        if name in ("attention_mask", "encoder_attention_mask"):
            needed[name] = torch.ones(BATCH, LENGTH, dtype=torch.long)
        elif name == "position_ids":
            needed[name] = torch.arange(LENGTH).expand(BATCH, -1)
        elif name == "token_type_ids":
            needed[name] = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    if "encoder_hidden_states" not in parameters:
        return [needed]
    size = hidden
    for block in blocks:
        for path, module in block.named_modules():
            if any(word in path.lower() for word in ("encoder_attn", "cross", "encdec")):
                if path.rpartition(".")[2] in ("k_proj", "key", "k", "k_lin"):
                    size = getattr(module, "in_features", size)
    encoder = {"encoder_hidden_states": torch.randn(BATCH, LENGTH - 2, size, generator=random)}
    return [needed | encoder, needed]
