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
"""A cut convolutional model in its configuration, so that transformers loads it again; and folders of any other module."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ...common.documents import ANYTHING, TEXT, Document, ListOf, MapOf, Record
from ...common.writing import atomic_path, atomic_write_text
from ..extract import config_of, unchanged_on_error
from ..importance import note_orders, note_scores
from .cutting import Description, cut, resize


# Where a configuration keeps the sizes of the layers.
CHANNELS_ATTRIBUTE = "peft_elastic_channels"
# Where a cut module keeps them that has no configuration.
_SIZES = "_peft_elastic_channels"
DESCRIPTION_FILE = "extracted.json"
WEIGHTS_FILE = "extracted.safetensors"
_DOCUMENT = Document(
    "extracted model",
    "peft-elastic/extracted-model",
    1,
    Record(model_class=TEXT, layers=MapOf(ANYTHING), skipped=ListOf(TEXT)),
)


def extract_channels(model: nn.Module) -> None:
    """Make what is active in a narrowed model all there is of it, in place, and let it say so: its configuration, if it is a model of
    transformers."""
    with unchanged_on_error(model):
        description = merged(earlier(model), cut(model))
        note_orders(model, {})
        note_scores(model, {})
        note(model, description)


def earlier(model: nn.Module) -> Description:
    """What a model that has been cut before says of its layers."""
    config = config_of(model)
    kept = model.__dict__.get(_SIZES) if config is None else config.__dict__.get(CHANNELS_ATTRIBUTE)
    return {"layers": {}, "skipped": []} if kept is None else kept


def note(model: nn.Module, description: Description) -> None:
    """Let a model say that it has these sizes."""
    config = config_of(model)
    if config is None:
        model.__dict__[_SIZES] = description
    elif description["layers"] or description["skipped"]:
        setattr(config, CHANNELS_ATTRIBUTE, description)


def merged(first: Description, second: Description) -> Description:
    """The description of what was cut twice."""
    layers = {
        path: {kind: dict(sizes[kind]) for kind in ("tensors", "numbers")} for path, sizes in first["layers"].items()
    }
    for path, sizes in second["layers"].items():
        own = layers.setdefault(path, {"tensors": {}, "numbers": {}})
        for kind in ("tensors", "numbers"):
            own[kind].update(sizes[kind])
    skipped = [*first["skipped"], *second["skipped"]]
    inside = tuple(f"{path}." for path in skipped)
    return {
        "layers": {path: sizes for path, sizes in layers.items() if not f"{path}.".startswith(inside)},
        "skipped": skipped,
    }


def apply_channels(model: nn.Module, description: Any) -> None:
    """Bring a model that was built at full size to the sizes that its configuration says.

    Raises:
        ValueError: if they do not fit the model.
    """
    if not isinstance(description, Mapping):
        raise ValueError(f"The configuration must describe layers by their paths, got {description!r:.200}.")
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    paths = {path for path, _ in model.named_modules()}

    def at_home(path: str) -> str:
        candidates = (path, path.removeprefix(prefix), prefix + path)
        return next((candidate for candidate in candidates if candidate in paths), path)

    layers, skipped = description.get("layers"), description.get("skipped")
    if not isinstance(layers, Mapping) or not isinstance(skipped, list):
        raise ValueError(f"The configuration must have 'layers' and 'skipped', got {description!r:.200}.")
    # a base model alone has no head
    own = {at_home(path): sizes for path, sizes in layers.items()}
    lacking = [path for path in own if path not in paths]
    resize(
        model, {"layers": {p: s for p, s in own.items() if p not in lacking}, "skipped": [at_home(p) for p in skipped]}
    )


# -- any other module --------------------------------------------------------------------------------------------------


def save_extracted(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a model that `extract_subnet` returned into a folder: its tensors (extracted.safetensors) and the sizes of its layers (extracted.json). For
    modules that are no models of transformers, whose `save_pretrained` does so.

    Args:
        model (`nn.Module`): what was extracted.
        folder (`str` or `os.PathLike`): is made if it does not exist.

    Raises:
        ValueError: if the model was not extracted from a super-network of channels, or is one of transformers.
    """
    if isinstance(model, PreTrainedModel):
        raise ValueError(f"`model` is a {type(model).__name__} of transformers: call its `save_pretrained`.")
    if _SIZES not in model.__dict__:
        raise ValueError(
            f"`model` ({type(model).__name__}) was not extracted from a super-network (`extract_subnet` of `get_elastic_model`): "
            "save its `state_dict()`."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION_FILE).unlink(missing_ok=True)  # interrupted, the folder is no model
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    with atomic_path(folder / WEIGHTS_FILE) as path:
        save_file(tensors, path)
    fields = {"model_class": type(model).__name__, **earlier(model)}
    atomic_write_text(folder / DESCRIPTION_FILE, json.dumps(_DOCUMENT.wrap(fields), indent=1))


def load_extracted(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Cut a model of the whole size to what `save_extracted` has written, and load its weights.

    Args:
        model (`nn.Module`): made by the constructor that made the super-network, with the same arguments; its weights do not matter. Changed in
            place.
        folder (`str` or `os.PathLike`): that `save_extracted` wrote.

    Returns:
        `nn.Module`: the same object.

    Raises:
        ValueError: if the folder is none, is damaged, or is of another model, before the model is changed.
    """
    folder = Path(folder)
    for name in (DESCRIPTION_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(
                f"`folder` {os.fspath(folder)!r} has no {name}: `save_extracted` did not write it, or was interrupted."
            )
    saved = _DOCUMENT.read(folder / DESCRIPTION_FILE)
    if saved["model_class"] != type(model).__name__:
        raise ValueError(
            f"`model` is a {type(model).__name__}, and {os.fspath(folder)!r} holds a {saved['model_class']}."
        )
    description = {"layers": saved["layers"], "skipped": saved["skipped"]}
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except Exception as error:
        raise ValueError(f"{os.fspath(folder / WEIGHTS_FILE)!r} cannot be read: {error}") from error
    with unchanged_on_error(model):
        resize(model, description)
        own = model.state_dict()
        for name in own.keys() ^ tensors.keys():
            raise ValueError(f"{os.fspath(folder)!r} does not fit the model: {name!r} is in one of the two alone.")
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"{os.fspath(folder)!r} does not fit the model: {name!r} has the shape {list(tensor.shape)}, the model {list(own[name].shape)}."
                )
        model.load_state_dict(tensors)
        note(model, description)
    return model
