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
"""A model whose weights stay on disk: built without them, and read tensor by tensor."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from ..common.checks import check_choice
from ..common.safetensors_files import DTYPES, Shards, Stored, read_shards
from .checkpoint_names import Origin, origins


CONFIG_FILE = "config.json"
_DTYPE_NAMES = ("auto", "float32", "bfloat16", "float16")
_ATTRIBUTE = "_peft_elastic_stored"
_SAMPLE = 4096  # bytes of each tensor that tell one model from another


class StoredModel:
    """A model of transformers in a folder of safetensors files.

    Its parameters and persistent buffers are on the meta device, with the shapes and dtypes that `from_pretrained` gives them; what
    is computed from the configuration (frequencies of rotary embeddings) is in memory.

    Args:
        folder: with config.json, and model.safetensors or several files and their index.
        dtype: as in `from_pretrained`: "auto" is the one of the configuration.

    Attributes:
        model (`PreTrainedModel`): in evaluation mode.
        shards (`Shards`): the files.
        origin (`dict[str, Origin]`): what each tensor is made of, by its name in the model.

    Raises:
        ValueError: naming what is missing, damaged, of another shape or quantised. No tensor has been read then.
    """

    def __init__(self, folder: str | os.PathLike[str], dtype: str = "auto") -> None:
        check_choice("dtype", dtype, _DTYPE_NAMES)
        self.folder = Path(folder)
        self.shards: Shards = read_shards(folder)
        if not (self.folder / CONFIG_FILE).is_file():
            raise ValueError(f"{os.fspath(folder)!r} holds no {CONFIG_FILE}.")
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{CONFIG_FILE} in {os.fspath(folder)!r} cannot be read: {error}") from error
        method = getattr(config, "quantization_config", None)
        if method is not None:
            name = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", method)
            raise ValueError(
                f"the model in {os.fspath(folder)!r} is quantised or packed already ({getattr(name, 'value', name)}); a folder is "
                "gone through in floating point alone."
            )
        self.model = self._build(config, dtype)
        self.model.__dict__[_ATTRIBUTE] = True
        self._empty_tensors = self.model.state_dict(
            keep_vars=True
        )  # by their names, whatever is put around the layers
        # A tensor may have changed its place: `moved` is where it is read instead.
        self.moved: dict[str, Stored] = {}
        # What makes a tensor of the model that is on disk no more as it is in memory, by its name in the model.
        self.computed: dict[str, Callable[[], torch.Tensor]] = {}
        self.origin: dict[str, Origin] = {}
        empty = {name: self._empty(name) for name in self.shards.tensors}
        for origin in origins(self.model, self.shards.tensors):
            for name in origin.convert(self.model, {key: empty[key] for key in origin.keys}):
                self.origin[name] = origin
        self._tie_equal()

    def _empty(self, key: str) -> torch.Tensor:
        stored = self.shards.tensors[key]
        return torch.empty(stored.shape, dtype=DTYPES[stored.dtype], device="meta")

    def _build(self, config: Any, dtype: str) -> PreTrainedModel:
        where = os.fspath(self.folder)
        architecture = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
        state = {name: self._empty(name) for name in self.shards.tensors}
        try:
            with _quiet():
                model, found = architecture.from_pretrained(
                    None,
                    config=config,
                    state_dict=state,
                    device_map={"": "meta"},
                    dtype=dtype,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"the model in {where!r} cannot be built: {error}") from error
        for name, stored, wanted in sorted(found["mismatched_keys"]):
            raise ValueError(f"{name} in {where!r} is {tuple(stored)}; by {CONFIG_FILE} it is {tuple(wanted)}.")
        for name in sorted(found["missing_keys"]):
            raise ValueError(f"{name} is missing in the files of {where!r}.")
        for message in found.get("error_msgs") or ():
            raise ValueError(f"the model in {where!r} cannot be read: {message}")
        _make_buffers(model)
        return model.eval()

    def _tie_equal(self) -> None:
        """As `from_pretrained` does where a file holds both of two tied weights, which cannot tell on the meta device."""
        for target, source in dict(getattr(self.model, "all_tied_weights_keys", {})).items():
            one, other = self.model.get_parameter(target), self.model.get_parameter(source)
            if one is other or target not in self.origin or source not in self.origin:
                continue
            if one.shape == other.shape and torch.equal(*self.read([target, source]).values()):
                module, _, key = target.rpartition(".")
                self.model.get_submodule(module)._parameters[key] = other

    def key_of(self, name: str) -> str | None:
        """The one tensor on disk that a tensor of the model is, None if transformers makes it of others."""
        origin = self.origin.get(name)
        return None if origin is None or origin.converter is not None else origin.keys[0]

    def key_of_weight(self, layer: str) -> str:
        """The tensor on disk that the weight of a layer is.

        Raises:
            ValueError: there is none, as transformers makes the weight of others.
        """
        key = self.key_of(f"{layer}.weight")
        if key is None:
            raise ValueError(
                f"transformers fuses, splits or changes tensors of the files to make the weight of {layer}, so it cannot be written "
                "back by itself. Name it in exclude_modules, or work on the model in memory."
            )
        return key

    def dtype_on_disk(self, key: str, names: dict[str, list[str]]) -> torch.dtype:
        """The dtype in which a tensor is written: that of the model.

        Args:
            key: its name on disk.
            names: of the model's tensors that it is a part of, by such names; see `targets`.
        """
        return self.model_tensor(names[key][0]).dtype

    def targets(self) -> dict[str, list[str]]:
        """The tensors of the model that each tensor on disk is a part of. Those that the model has no place for are left out."""
        found: dict[str, list[str]] = {}
        for name, origin in self.origin.items():
            for key in origin.keys:
                found.setdefault(key, []).append(name)
        return found

    def model_tensor(self, name: str) -> torch.Tensor:
        """A parameter or buffer of the model, on the meta device, by its name in the state dict."""
        return self._empty_tensors[name]

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Tensors of the model, by their names in the state dict, in memory of their own and in the dtype of the model."""
        wanted = list(names)
        found: dict[str, torch.Tensor] = {}
        for name in wanted:
            if name in found:
                continue
            if name in self.computed:
                found[name] = self.computed[name]()
                continue
            origin = self.origin[name]
            dtype = self.model_tensor(origin.target).dtype
            parts = {key: self.moved.get(key, self.shards.tensors[key]).read().to(dtype) for key in origin.keys}
            found |= origin.convert(self.model, parts)
        return {name: found[name] for name in wanted}

    def fingerprint(self) -> str:
        """What tells this model from others: its configuration, its tensors, and the beginning of each of them."""
        digest = hashlib.sha256((self.folder / CONFIG_FILE).read_bytes())
        for name, stored in sorted(self.shards.tensors.items()):
            digest.update(json.dumps([name, stored.file.name, stored.dtype, stored.shape, stored.offset]).encode())
            with open(stored.file, "rb") as stream:
                stream.seek(stored.offset)
                digest.update(stream.read(min(stored.size, _SAMPLE)))
        return digest.hexdigest()


def is_stored(model: nn.Module) -> bool:
    """Whether a model is that of a `StoredModel`, or a copy of it: what its weights are to be is done to them when they are read."""
    return _ATTRIBUTE in model.__dict__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bar that transformers draws of loading nothing, and the list of what it found, which is an error here."""
    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()


def _make_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no file holds: they come from a second model, of which nothing but its buffers is made."""
    computed = [
        (name, module, key)
        for name, module in model.named_modules()
        for key in module._non_persistent_buffers_set
        if module._buffers.get(key) is not None
    ]
    if not computed:
        return
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with init_empty_weights(include_buffers=False):
            twin = type(model)(copy.deepcopy(model.config))
    finally:
        torch.set_default_dtype(dtype)
    for name, module, key in computed:
        module._buffers[key] = twin.get_submodule(name)._buffers[key]


def stored_tensors(model: nn.Module) -> dict[str, tuple[torch.Tensor, list[tuple[nn.Module, str, str]]]]:
    """The parameters and persistent buffers of a model on the meta device, each once: by its first name, with all modules that
    have it, its key in each and its name there. A layer in an adapter has the name that it had without."""
    found: dict[int, tuple[torch.Tensor, list[tuple[nn.Module, str, str]]]] = {}
    for path, module in model.named_modules():
        own = [*module._parameters.items()]
        own += [
            (key, buffer) for key, buffer in module._buffers.items() if key not in module._non_persistent_buffers_set
        ]
        for key, tensor in own:
            if tensor is not None and tensor.is_meta:
                name = f"{path}.{key}".lstrip(".").replace(".base_layer.", ".")
                found.setdefault(id(tensor), (tensor, []))[1].append((module, key, name))
    return {places[0][2]: (tensor, places) for tensor, places in found.values()}
