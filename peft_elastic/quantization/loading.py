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
"""GPTQ checkpoints into models: `load_gptq`. The tensors of a layer are the business of gptq_format.py, what the JSON files say
that of gptq_settings.py, and names that of checkpoint_names.py."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ..common.checks import check_choice
from ..layers.backends import backend_of
from ..layers.backends.float import FLOAT
from ..layers.gptq_format import TENSORS, convention_of, stored_zeros, unpack_gptq
from ..layers.grid import BITS, Grid
from ..layers.quantized_linear import QuantizedLinear
from ..structure.checkpoint_names import names_in_model
from ..structure.modules import linear_layers, output_head, replace_layers, weight_matrix
from .gptq_settings import CONFIG_FILE, LayerSettings, Settings, read_object
from .saving import guard_saving


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Writers that subtract 1 from the zero points as `gptq_format` does.
_BORROWS = re.compile("gptqmodel|peft_elastic", re.IGNORECASE)

# What transformers makes one module, or one entry of a dictionary, of each.
_LAYERS = re.compile(r"(num|n)_.*(layers?|blocks)|(en|de)coder_layers|depth")
_COUNTS = re.compile(rf"{_LAYERS.pattern}|(num|n)_.*experts|num_labels")

_Packed = dict[str, dict[str, torch.Tensor]]


def load_gptq(
    path: str | os.PathLike[str],
    *,
    dense: nn.Module | str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    auto_class: Any = None,
) -> PreTrainedModel:
    """
    Reads a GPTQ checkpoint, whoever wrote it, into an ordinary transformers model with `QuantizedLinear` layers. GPTQModel is
    not needed.

    Both conventions for zero points ("gptq" and "gptq_v2"; a config that names none, as those of AutoGPTQ, means "gptq"),
    act-order, negative scales and `dynamic` rules are understood, and the names that transformers gives tensors on disk. The
    integers, scales and zero points become the grids of the layers. Where the config says `sym`, the zero points are in the
    middle, whichever of the conventions the file has them in.

    The weights of the layers are s (q - z), or with `dense` those of the original where they are rounded to q, and otherwise the
    value closest to them that is: quantisation-aware training starts from what was there before the rounding, and from the
    integers of the checkpoint. Weights with q = z are zero in either case. A checkpoint does not tell the zeros of a sparse model
    from small weights that were rounded to zero, and adapters take the zeros of the weight as their mask: so what the checkpoint
    has as zero stays zero.

    Quantised weights that are not those of a linear layer in the model, such as experts that transformers fuses, are loaded with
    the same values in floating point, with a warning.

    Args:
        path: a folder, or the name of a repository on the Hub, with safetensors.
        dense: the model before it was quantised, or its path.
        dtype: of the weights and everything else.
        auto_class: `AutoModelForSequenceClassification` or another such class, or a model class. By default the class that
            config.json names, or `AutoModelForCausalLM` if it names none that transformers has. With a class for another task
            than the checkpoint's, its head is new, as in `from_pretrained`, and that of the checkpoint is left out.

    Raises:
        ValueError: naming the file, the tensor or the entry of the config that is missing, damaged or does not fit the others or
            the model.
    """
    check_choice("dtype", dtype, _DTYPES)
    folder = _folder(path)
    content, settings, state = _read(folder)
    packed = _take_packed(state)
    if not packed:
        raise ValueError(
            f"{os.fspath(path)!r} has no quantised layers: no tensor of it is called {', '.join(TENSORS)}."
        )
    _check_counts(content, state, packed)
    config, names = _config(folder), _class_names(content)
    skeleton = _skeleton(config, names, auto_class)
    other_task = auto_class is not None and bool(names) and type(skeleton).__name__ not in names
    places, unused = _places(skeleton, settings, state, packed, other_task)
    if _untie_head(skeleton, config, places):
        skeleton = _skeleton(config, names, auto_class)
    _check_dtypes(skeleton, state)
    formats = _conventions(settings, places, packed)
    originals = None if dense is None else _weights_of(dense, auto_class or type(skeleton), dtype)

    grids: dict[str, Grid] = {}
    rounded: list[str] = []
    for name, place in places.items():
        module: Any = None if place.module is None else skeleton.get_submodule(place.module)
        bits = place.settings.bits
        out_features, in_features = (
            _packed_shape(name, packed[name], bits) if module is None else weight_matrix(module).shape
        )
        scales = packed[name].get("scales")
        layer = unpack_gptq(
            name,
            packed.pop(name),
            out_features=out_features,
            in_features=in_features,
            bits=bits,
            group_size=place.settings.group_size,
            checkpoint_format=formats[name],
            desc_act=place.settings.desc_act,
        )
        if scales is not None and not torch.equal(scales.to(torch.float16).to(scales.dtype), scales):
            rounded.append(name)
        grid = Grid(layer["scales"], layer["zeros"].int(), in_features=in_features, bits=bits, g_idx=layer["g_idx"])
        weight = grid.dequantize(layer["q"], dtype)
        state[f"{name}.weight"] = weight
        bias = f"{name}.bias"
        if bias in state and not place.has_bias:  # some writers give every layer one
            if bool(state.pop(bias).any()):
                raise ValueError(f"{bias} is not zero, and the layer has no bias in the model.")
        if place.module is None:
            continue
        if originals is not None:
            weight = torch.where(
                weight == 0, weight, grid.into_cells(_original(originals, place.module, weight), layer["q"])
            )
        if not torch.equal(grid.quantize(weight), layer["q"]):
            raise ValueError(
                f"`dtype` is {dtype}, which cannot hold the {bits}-bit weights of {name}; use torch.float32."
            )
        state[f"{name}.weight"] = weight.T.contiguous() if backend_of(module).out_dim(module) else weight
        grids[place.module] = grid
    if not grids:
        raise ValueError(f"{os.fspath(path)!r} has no quantised weights that are linear layers of the model.")

    fused = [name for name, place in places.items() if place.module is None]
    if fused:
        warnings.warn(
            f"{len(fused)} quantised weights, such as that of {fused[0]}, are not those of linear layers of the model: they are "
            "loaded with the same values in floating point.",
            stacklevel=2,
        )
    if rounded:
        warnings.warn(
            f"The scales of {len(rounded)} layers, such as {rounded[0]}, are rounded to float16, as they are by other readers.",
            stacklevel=2,
        )
    model, unexpected = _fill(path, skeleton, config, state, dtype, other_task)
    for name, place in places.items():
        loaded = None if place.module is None else model.get_submodule(place.module).get_parameter("weight")
        # some models keep some layers in float32
        if loaded is not None and not torch.equal(loaded, state[f"{name}.weight"].to(loaded.dtype)):
            raise ValueError(f"{name} has quantised weights, and the model has others in their place.")
        foreign = [key for key in unexpected if key.startswith((f"{name}.", f"{place.module}."))]
        if foreign:
            raise ValueError(f"{foreign[0]} is no tensor of a GPTQ layer.")
    unused += unexpected
    if unused:
        warnings.warn(
            f"{len(unused)} tensors of {os.fspath(path)!r}, such as {unused[0]}, have no place in {type(model).__name__}.",
            stacklevel=2,
        )
    replace_layers(
        model,
        [(model.get_submodule(n), QuantizedLinear.from_linear(model.get_submodule(n), g)) for n, g in grids.items()],
    )
    guard_saving(model)
    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = _generation_config(folder)
    return model.eval()


# -- files ---------------------------------------------------------------------------------------------------------------


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(path)):
        raise ValueError(
            f"`path` is {os.fspath(path)!r}; it must be a folder or the name of a repository, owner/name."
        )
    return Path(snapshot_download(os.fspath(path), allow_patterns=["*.json", "*.safetensors"]))


def _read(folder: Path) -> tuple[dict[str, Any], Settings, dict[str, torch.Tensor]]:
    """config.json, what it says of the quantised layers, and all tensors.

    Raises:
        ValueError: something is missing, damaged, or was replaced meanwhile.
    """
    file = folder / CONFIG_FILE
    if not file.exists():
        aside = next((old.parent for old in folder.glob(f".*.partial/old/{CONFIG_FILE}")), None)
        raise ValueError(
            f"{os.fspath(folder)!r} has no {CONFIG_FILE}: it is no checkpoint, or one whose writing was interrupted; write it again."
            + (f" What was there before is in {os.fspath(aside)!r}." if aside else "")
        )
    before = file.stat()
    content = read_object(file)
    settings = Settings(folder, content.get("quantization_config"))
    state = _read_tensors(folder)
    after = file.stat() if file.exists() else None
    if after is None or (before.st_ino, before.st_mtime_ns) != (after.st_ino, after.st_mtime_ns):
        raise ValueError(f"{os.fspath(folder)!r} was written to while it was read; load it again.")
    return content, settings, state


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files of a checkpoint."""
    single, found = folder / "model.safetensors", sorted(folder.glob("*.safetensors"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if single.exists():
        indexes = [index for index in indexes if index.name == f"{single.name}.index.json"]
    listed: dict[str, str] = {}
    if len(indexes) == 1:
        listed = _weight_map(indexes[0])
        files = [folder / name for name in sorted(set(listed.values()))]
    elif single.exists() or len(found) == 1:  # AutoGPTQ names it after the bits and the group size
        files = [single] if single.exists() else found
    else:
        raise ValueError(
            f"{os.fspath(folder)!r} must have model.safetensors, with an index if there are several files, or one other "
            f"*.safetensors; found: {', '.join(file.name for file in found) or 'none'}. Pickled weights are not read."
        )
    lost = next((file.name for file in files if not file.exists()), None)
    if lost is not None:
        raise ValueError(f"{lost} is missing.")
    if single.exists() and single not in files:
        raise ValueError(
            f"{os.fspath(folder)!r} has {single.name}, and {indexes[0].name} names other files: one is of another model."
        )
    state: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safetensors.safe_open(file, framework="pt") as tensors:
                keys = list(tensors.keys())
                again = next((key for key in keys if key in state), None)
                if again is not None:
                    raise ValueError(f"{file.name} has {again}, which another file has as well.")
                state.update((key, tensors.get_tensor(key)) for key in keys)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file.name} is damaged: {error}") from None
        lost = next((key for key, name in listed.items() if name == file.name and key not in state), None)
        if lost is not None:
            raise ValueError(f"{file.name} lacks {lost}, which the index says it holds.")
    return state


def _weight_map(index: Path) -> dict[str, str]:
    listed: Any = read_object(index).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    if not names or not all(isinstance(name, str) and name and Path(name).name == name for name in names):
        raise ValueError(f"{index.name} is damaged: weight_map must give a file of this folder for each tensor.")
    weight_map: dict[str, str] = listed
    return weight_map


def _take_packed(state: dict[str, torch.Tensor]) -> _Packed:
    """Takes the tensors of quantised layers out of a state dict, by the name of the layer."""
    packed: _Packed = {}
    for key in sorted(state):
        name, _, kind = key.rpartition(".")
        if name and kind in TENSORS:
            packed.setdefault(name, {})[kind] = state.pop(key)
    return packed


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever the values in it lead to
        raise ValueError(f"generation_config.json is damaged: {error}") from error


# -- the model -----------------------------------------------------------------------------------------------------------


def _config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever the values in it lead to
        raise ValueError(f"{CONFIG_FILE} in {os.fspath(folder)!r} describes no model: {error}") from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _check_counts(content: Any, state: Mapping[str, torch.Tensor], packed: _Packed) -> None:
    """ValueError for more layers, experts or labels than the files can hold, before a module is built for each."""
    shapes = [tensor.shape for layer in [state, *packed.values()] for tensor in layer.values()]
    longest = max(size for shape in shapes for size in shape)
    parts = [content]
    while parts:
        part = parts.pop()
        parts += [value for value in part.values() if isinstance(value, dict)]
        for key, value in part.items():
            most = len(shapes) if _LAYERS.fullmatch(key) else max(len(shapes), longest)
            if type(value) is int and value > most and _COUNTS.fullmatch(key):
                raise ValueError(
                    f"{CONFIG_FILE}: {key} is {value}; the tensors of the checkpoint are of {most} at most."
                )


def _class_names(content: Mapping[str, Any]) -> list[str]:
    """The classes that a config.json names, mostly one."""
    names = content.get("architectures")
    if names is None:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{CONFIG_FILE}: architectures must be a list of names of classes, got {names!r:.100}.")
    return names


def _skeleton(config: Any, names: list[str], auto_class: Any) -> PreTrainedModel:
    """The model on the meta device."""
    if auto_class is None:
        known = (getattr(transformers, name, None) for name in names)
        auto_class = next(
            (cls for cls in known if isinstance(cls, type) and issubclass(cls, PreTrainedModel)), AutoModelForCausalLM
        )
    build = getattr(auto_class, "from_config", None) or getattr(auto_class, "_from_config", None)
    if build is None:
        raise ValueError(f"`auto_class` is {auto_class!r}; it must be a class of models of transformers.")
    try:
        with torch.device("meta"):
            model: PreTrainedModel = build(config)
    except Exception as error:  # whatever the values in the config lead to
        raise ValueError(
            f"{CONFIG_FILE} describes no model that {getattr(auto_class, '__name__', auto_class)} can build: {error}"
        ) from error
    return model


@dataclass(frozen=True)
class _Place:
    """Where a quantised weight of a checkpoint belongs: the path of a linear layer of the model, or None where it is no such layer's
    weight, or not alone."""

    module: str | None
    has_bias: bool
    settings: LayerSettings


def _places(
    skeleton: PreTrainedModel, settings: Settings, state: Mapping[str, torch.Tensor], packed: _Packed, other_task: bool
) -> tuple[dict[str, _Place], list[str]]:
    """The places of the quantised weights, by their names in the checkpoint. Those that the model has no use for, and need not
    have, are taken out of `packed`; returns the names of those of another task as well."""
    found = names_in_model(skeleton, [*state, *(f"{name}.weight" for name in packed)])
    modules, known = dict(skeleton.named_modules()), skeleton.state_dict()
    places: dict[str, _Place] = {}
    taken: dict[str, str] = {}
    unused: list[str] = []
    base = f"{skeleton.base_model_prefix}."
    for name in list(packed):
        if f"{name}.weight" in state:
            raise ValueError(f"{name}.weight is there, and so are the tensors of a quantised layer.")
        target, converted = found[f"{name}.weight"]
        path = target.removesuffix(".weight")
        if target not in known:
            if other_task and base != "." and not target.startswith(base):
                unused.append(f"{name}.qweight")
            elif not _is_ignored(skeleton, target):
                raise ValueError(f"{name} has quantised weights, but the model has no linear layer of this name.")
            del packed[name]
            continue
        alone = not converted and type(modules.get(path)) in FLOAT.exact
        if not converted and taken.setdefault(path, name) != name:
            raise ValueError(f"{name} and {taken[path]} are both {path} in the model.")
        has_bias = found.get(f"{name}.bias", ("", False))[0] in known
        places[name] = _Place(path if alone else None, has_bias, settings.of(name, path))
    return places, unused


def _is_ignored(skeleton: PreTrainedModel, key: str) -> bool:
    """Whether transformers knows that checkpoints of this architecture have a tensor that its model has not."""
    return any(re.search(pattern, key) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ())


def _untie_head(skeleton: PreTrainedModel, config: Any, places: Mapping[str, _Place]) -> bool:
    """Lets the config say that the output head is not tied to the embeddings where the checkpoint has its weights quantised.
    Returns whether that is news.

    Raises:
        ValueError: other weights that the model has only once are quantised.
    """
    owners = {
        name: parameter
        for name, parameter in skeleton.named_parameters(remove_duplicate=False)
        if name.endswith(".weight")
    }
    times = Counter(map(id, owners.values()))
    tied = [
        place.module for place in places.values() if place.module and times[id(owners[f"{place.module}.weight"])] > 1
    ]
    if not tied:
        return False
    head = output_head(skeleton)
    for name in tied:
        if skeleton.get_submodule(name) is not head or not config.get_text_config().tie_word_embeddings:
            raise ValueError(
                f"{name} has quantised weights, but in the model they are those of another module as well."
            )
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    return True


def _check_dtypes(skeleton: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> None:
    known = skeleton.state_dict()
    for key, (target, _) in names_in_model(skeleton, state).items():
        wrong = state[key].dtype not in _DTYPES
        if target in known and known[target].is_floating_point() and wrong:
            raise ValueError(f"{key} must be {' or '.join(map(str, _DTYPES))}, got {state[key].dtype}.")


def _packed_shape(name: str, tensors: Mapping[str, torch.Tensor], bits: Any) -> tuple[int, int]:
    """(out, in) of a weight, where the model does not tell."""
    qweight = tensors.get("qweight")
    if qweight is None or qweight.dim() != 2 or bits not in BITS:
        return 32, 32  # any, for the error is that of `unpack_gptq`
    return qweight.shape[1], qweight.shape[0] * 32 // bits


def _conventions(settings: Settings, places: Mapping[str, _Place], packed: _Packed) -> dict[str, str]:
    """The convention in which each layer has its zero points.

    Raises:
        ValueError: the config names none that they fit.
    """
    fields: dict[str, list[int]] = {}
    for name, place in places.items():
        qzeros, bits = packed[name].get("qzeros"), place.settings.bits
        if qzeros is not None and qzeros.dtype == torch.int32 and type(bits) is int and bits in BITS:
            fields[name] = stored_zeros(qzeros, bits)  # what is left out has an error of its own in `unpack_gptq`
    named = sorted(settings.formats) or ["gptq"]
    middles = {name: 2 ** (places[name].settings.bits - 1) for name in fields}
    unknown = [name for name in fields if places[name].settings.symmetric is None]
    # Where nothing is said of it, writers mean symmetric; and chosen for each group, zero points would not all be the same.
    middle = all(len(fields[n]) == 1 and fields[n][0] in (middles[n] - 1, middles[n]) for n in unknown)
    symmetric = [n for n in fields if places[n].settings.symmetric or (n in unknown and middle)]
    formats = dict.fromkeys(places, named[0])
    formats |= {name: convention_of(name, fields[name], places[name].settings.bits) for name in symmetric}
    others = [name for name in fields if name not in symmetric]
    if others and len(named) > 1:
        raise ValueError(
            f"checkpoint_format is {named[0]!r} in one place of the config files, and {named[1]!r} in another; the zero points of "
            f"{others[0]} do not tell which is right."
        )
    for name in others:
        if named[0] == "gptq" and 2 * middles[name] - 1 in fields[name] and not _BORROWS.search(settings.writer):
            raise ValueError(
                f"{name}.qzeros holds {2 * middles[name] - 1}, in checkpoint_format 'gptq' a zero point of 0 or of "
                f"{2 * middles[name]}, on which the readers of this format do not agree; the config does not name a writer "
                "(meta.quantizer) of which it is known."
            )
    unlike = [name for name in symmetric if len(named) == 1 and formats[name] != named[0]]
    if unlike:
        warnings.warn(
            f"{len(unlike)} layers, such as {unlike[0]}, have the zero points of checkpoint_format {formats[unlike[0]]!r}, and the "
            f"config says {named[0]!r}. They are symmetric, so what is meant is clear, and is what was loaded.",
            stacklevel=3,
        )
    off = [n for n in others if fields[n] == [middles[n] - (named[0] == "gptq_v2")]]
    if off and len(off) == len(others):
        warnings.warn(
            f"All zero points are one beside the middle, as if they were not in the checkpoint_format {named[0]!r} that the config "
            "says. They are read as it says.",
            stacklevel=3,
        )
    return formats


def _fill(
    path: str | os.PathLike[str],
    skeleton: PreTrainedModel,
    config: Any,
    state: dict[str, torch.Tensor],
    dtype: torch.dtype,
    other_task: bool,
) -> tuple[PreTrainedModel, list[str]]:
    """The model with the tensors of a state dict, named as in the checkpoint, and the names of those that it has no place for."""
    try:
        model, info = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # what its conversions meet in tensors that they are not made for
        raise ValueError(f"{os.fspath(path)!r} does not fit its config: {error}") from error
    for key, found, expected in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{os.fspath(path)!r} does not fit its config: {key} is {tuple(found)}, and the model has {tuple(expected)}."
        )
    missing = sorted(info["missing_keys"])
    if other_task and hasattr(model, model.base_model_prefix):
        new = [key for key in missing if not key.startswith(f"{model.base_model_prefix}.")]
        missing = [key for key in missing if key not in new]
        if new:
            warnings.warn(
                f"{os.fspath(path)!r} is for another task: {', '.join(new[:4])} of {type(model).__name__} are new and random.",
                stacklevel=3,
            )
    if missing:
        raise ValueError(f"{os.fspath(path)!r} lacks {len(missing)} tensors, such as {missing[0]}.")
    return model, sorted(info["unexpected_keys"])


# -- the dense original --------------------------------------------------------------------------------------------------


def _weights_of(
    dense: nn.Module | str | os.PathLike[str], auto_class: Any, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The weights (out, in) of the linear layers of the original."""
    if not isinstance(dense, nn.Module):
        dense = auto_class.from_pretrained(os.fspath(dense), dtype=dtype)
    return {
        name: weight_matrix(layer)
        for name, layer in linear_layers(dense).items()  # type: ignore[arg-type]
        if not backend_of(layer).packed
    }


def _original(weights: Mapping[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
    found = weights.get(name)
    if found is None or found.shape != like.shape or not found.is_floating_point():
        what = "it is not there" if found is None else f"it is {found.dtype} {tuple(found.shape)}"
        raise ValueError(f"`dense`: {name} must be a linear layer with a weight {tuple(like.shape)}; {what}.")
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"`dense`: the weight of {name} holds NaN or infinite values.")
    return found.to(like)
