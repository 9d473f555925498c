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
"""The file beside an ordinary checkpoint that makes a super-network of it again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from ..common.documents import ANYTHING, COUNT, TEXT, Document, ListOf, MapOf, Nullable, Record
from ..common.writing import atomic_path, atomic_write_text
from ..layers.convolutional import is_matrix_name
from ..structure.importance import digest_of, note_orders, noted_orders, order_digest
from ..supernet.space import SearchSpace, Subnet
from .config import ElasticConfig


FILE = "elastic_model.json"
# The matrices of elastic kernels, which an ordinary model does not have.
KERNELS_FILE = "elastic_kernels.safetensors"
_DOCUMENT = Document(
    "super-network",
    "peft-elastic/elastic-model",
    1,
    Record(
        # what a traced model is called with: {"pixel_values": {"shape": [2, 3, 224, 224], "dtype": "float32"}}
        {"inputs": ANYTHING},
        model_class=TEXT,
        config=MapOf(ANYTHING),
        search_space=MapOf(ANYTHING),
        # of the checkpoint: also where it was sorted before it became elastic, and `orders` are not known
        order=Nullable(TEXT),
        orders=MapOf(ListOf(COUNT)),
        active_subnet=Nullable(MapOf(COUNT)),
    ),
)


def write(
    folder: str | os.PathLike[str],
    model: Any,
    config: ElasticConfig,
    space: SearchSpace,
    chosen: Subnet | None,
    inputs: Any = None,
) -> None:
    """Write the file, after the checkpoint.

    Args:
        folder: of the checkpoint.
        model: an `ElasticModel`, whose orders are noted.
        config: what is elastic.
        space: the choices.
        chosen: the chosen subnet; None is the largest.
        inputs: what a traced model is called with; None for others.
    """
    fields = {
        "model_class": model.plain_class.__name__,  # FSDP2 gives a model another one
        "config": config.to_dict(),
        "search_space": json.loads(space.to_json()),
        "order": order_digest(model),
        "orders": {name: order.tolist() for name, order in noted_orders(model).items()},
        "active_subnet": None if chosen is None else chosen.to_dict(),
    }
    if inputs is not None:
        fields["inputs"] = _shapes_of(inputs)
        matrices = {name: p.detach().clone() for name, p in model.named_parameters() if is_matrix_name(name)}
        if matrices:
            with atomic_path(Path(folder) / KERNELS_FILE) as path:
                save_file(matrices, path)
    atomic_write_text(Path(folder) / FILE, json.dumps(_DOCUMENT.wrap(fields), indent=1))


def remove(folder: str | os.PathLike[str]) -> None:
    """Remove the file before another checkpoint takes the place of the one beside it: interrupted, that would be of neither."""
    for name in (FILE, KERNELS_FILE):
        (Path(folder) / name).unlink(missing_ok=True)


def read(name_or_path: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
    """Read the file of a folder, or of a repository of the hub.

    Args:
        name_or_path: the folder, or the name of the repository.
        **kwargs: of `transformers.utils.cached_file`.

    Raises:
        ValueError: if there is no such file, or it is damaged.
    """
    if os.path.isdir(name_or_path):
        path = os.path.join(name_or_path, kwargs.get("subfolder") or "", FILE)
        found = path if os.path.isfile(path) else None
    else:
        found = cached_file(name_or_path, FILE, _raise_exceptions_for_missing_entries=False, **kwargs)
    if found is None:
        raise ValueError(
            f"{os.fspath(name_or_path)!r} has no {FILE}: it is not a super-network that `save_pretrained` has written, or that was "
            "interrupted. An ordinary model becomes one with `get_elastic_model(model, ElasticConfig(...))`."
        )
    return _DOCUMENT.read(found)


def class_of(saved: dict[str, Any]) -> Any:
    """The class of transformers that the checkpoint is of.

    Raises:
        ValueError: if transformers has no such class.
    """
    cls = getattr(transformers, saved["model_class"], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(
            f"`model_class` is needed: transformers {transformers.__version__} has no model {saved['model_class']!r}. Pass the class, or "
            "an Auto class with `trust_remote_code=True`."
        )
    return cls


def space_of(saved: dict[str, Any]) -> SearchSpace:
    """The search space that the super-network had."""
    return SearchSpace.from_json(json.dumps(saved["search_space"]))


def take_orders(model: torch.nn.Module, saved: dict[str, Any]) -> None:
    """Note the orders that the checkpoint of a model is in.

    Raises:
        ValueError: if they are none of its, or of another checkpoint.
    """
    orders = {name: torch.tensor(order, dtype=torch.int64) for name, order in saved["orders"].items()}
    for name, order in orders.items():
        if sorted(order.tolist()) != list(range(len(order))):
            raise ValueError(f"{FILE}: the order of {name!r} is no permutation; the file is damaged.")
    if orders and digest_of(orders) != saved["order"]:
        raise ValueError(f"{FILE}: `orders` are others than when it was written; the file is damaged.")
    stored = order_digest(model)
    if stored != saved["order"]:
        raise ValueError(
            f"{FILE} and config.json were not saved together: by the one, heads and channels are in another order than by the "
            "other."
        )
    if orders:
        note_orders(model, orders)


def without_matrices(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict as an ordinary model has it."""
    return {name: tensor for name, tensor in state.items() if not is_matrix_name(name)}


def take_matrices(name_or_path: str | os.PathLike[str], model: torch.nn.Module, **kwargs: Any) -> None:
    """Give the elastic kernels of a model the matrices that were saved.

    Raises:
        ValueError: if the file is missing, damaged, or of another model.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if is_matrix_name(name)}
    if not own:
        return
    if os.path.isdir(name_or_path):
        path = os.path.join(name_or_path, kwargs.get("subfolder") or "", KERNELS_FILE)
        found = path if os.path.isfile(path) else None
    else:
        found = cached_file(name_or_path, KERNELS_FILE, _raise_exceptions_for_missing_entries=False, **kwargs)
    if found is None:
        raise ValueError(
            f"{os.fspath(name_or_path)!r} has no {KERNELS_FILE}, with the matrices of its elastic kernels."
        )
    try:
        saved = load_file(found)
    except Exception as error:
        raise ValueError(f"{found!r} cannot be read: {error}") from error
    if {name: t.shape for name, t in saved.items()} != {name: p.shape for name, p in own.items()}:
        raise ValueError(f"{found!r} has the matrices of another super-network.")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(saved[name])


def example_of(saved: dict[str, Any]) -> Any:
    """Inputs of the shapes that were saved, random; None for a model that is not traced.

    Raises:
        ValueError: if they are damaged.
    """
    if saved.get("inputs") is None:
        return None
    try:
        return _example(saved["inputs"])
    except (TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{FILE}: `inputs` are damaged: {error}") from error


def _shapes_of(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _shapes_of(value) for name, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return [_shapes_of(value) for value in inputs]
    if isinstance(inputs, torch.Tensor):
        return {"shape": list(inputs.shape), "dtype": str(inputs.dtype).removeprefix("torch.")}
    return {"value": inputs}


def _example(shapes: Any) -> Any:
    if isinstance(shapes, list):
        return tuple(_example(value) for value in shapes)
    if "value" in shapes:
        return shapes["value"]
    if "shape" not in shapes:
        return {name: _example(value) for name, value in shapes.items()}
    dtype = getattr(torch, shapes["dtype"])
    generator = torch.Generator().manual_seed(0)
    if not dtype.is_floating_point:
        return torch.zeros(shapes["shape"], dtype=dtype)
    return torch.randn(shapes["shape"], generator=generator).to(dtype)
