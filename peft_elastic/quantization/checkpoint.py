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
"""GPTQ checkpoints: `save_gptq` and `load_gptq`. The tensors of a layer are the business of gptq_format.py."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer

from ..files import replaced_files
from ..structure.description import is_described
from ..structure.modules import enclosing_names, find_stacks, linear_layers, output_head, replace_layers, weight_matrix
from ..version import __version__
from .gptq_format import FORMATS, TENSORS, check_packable, pack_gptq, unpack_gptq
from .grid import Grid
from .layer import QuantizedLinear
from .saving import InMemoryConfig, guard_saving


_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_CONFIG_FILE = "quantize_config.json"  # where AutoGPTQ and GPTQModel keep a copy of the config


# -- saving --------------------------------------------------------------------------------------------------------------


def save_gptq(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    checkpoint_format: str | None = None,
    tokenizer: Any = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """
    Saves a transformers model with `QuantizedLinear` layers as a GPTQ checkpoint, which GPTQModel, transformers (through
    GPTQModel) and `load_gptq` read. All other weights are stored as they are.

    The files take the place of older ones together: a process that is killed meanwhile leaves the old model, the new one, or a
    folder without config.json, which is an error for every reader. What else is in `save_directory` stays.

    Args:
        model: from `quantize` or `load_gptq`, or a merged model, without adapters. Layers may differ in bits and group size;
            what differs from most is written as GPTQModel's `dynamic` rules. transformers does not read these: it fails on
            layers that differ. Layers in floating point may be among them.
        save_directory: a new folder, or an old one whose model is replaced.
        checkpoint_format: "gptq" stores zero points minus one, "gptq_v2" as they are. By default "gptq" where all zero points
            are in the middle, as any reader knows it, and "gptq_v2" otherwise: GPTQModel takes "gptq" with other zero points
            from itself alone.
        tokenizer: saved in the same folder.
        max_shard_size: of a safetensors file, as in `save_pretrained`.

    Raises:
        ValueError: a bad argument, a model without quantised layers or with adapters, a layer whose shape does not fill whole
            words of 32 bits, or, with "gptq", one with a zero point of 0.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("`model` has adapters; save_gptq(model.merge_and_unload(), ...) saves the two as one model.")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"`model` is a {type(model).__name__}; it must be a model of transformers.")
    if is_described(model.config):
        raise ValueError(
            "`model` has blocks of different sizes, which no reader of GPTQ checkpoints builds. `sparsify_linears(model, "
            "when='always')` and `model.save_pretrained(...)` store the integers as well, for `from_pretrained` after `import "
            "peft_elastic`."
        )
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    if not layers:
        raise ValueError("`model` has no quantised layers; quantize(model, ...) makes some.")
    symmetric = all(layer.grid.symmetric for layer in layers.values())
    if checkpoint_format is None:
        checkpoint_format = "gptq" if symmetric else "gptq_v2"
    if checkpoint_format not in FORMATS:
        raise ValueError(f"`checkpoint_format` is {checkpoint_format!r}; allowed are {list(FORMATS)}.")
    for name, layer in layers.items():
        check_packable(name, layer.out_features, layer.in_features, layer.grid.bits)
        if checkpoint_format == "gptq" and not bool(layer.grid.zeros.all()):
            raise ValueError(
                f"`checkpoint_format` is 'gptq', which cannot hold the zero points of 0 in {name!r}; use 'gptq_v2'."
            )

    state = model.state_dict()
    for name, layer in layers.items():
        del state[f"{name}.weight"]
        for key, tensor in pack_gptq(name, layer.quantized(), checkpoint_format).items():
            state[f"{name}.{key}"] = tensor
    description = describe(model, layers, checkpoint_format)

    if Path(save_directory).is_file():
        raise ValueError(f"`save_directory` is {os.fspath(save_directory)!r}, which is a file.")
    quantizer, known = getattr(model, "hf_quantizer", None), getattr(model.config, "quantization_config", None)
    try:
        # `save_pretrained` asks a quantizer for the tensors, and writes this part of the config.
        model.hf_quantizer = _Writer(state)
        model.config.quantization_config = description
        with replaced_files(save_directory, last="config.json", stale=_is_weights) as folder:
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            (folder / _CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    finally:
        for owner, key, value in ((model, "hf_quantizer", quantizer), (model.config, "quantization_config", known)):
            if value is None:
                delattr(owner, key)
            else:
                setattr(owner, key, value)


class _Writer(HfQuantizer):
    """Hands a state dict to `save_pretrained`."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__(InMemoryConfig(), pre_quantized=True)
        self._state = state

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        return self._state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def describe(model: nn.Module, layers: Mapping[str, QuantizedLinear], checkpoint_format: str) -> dict[str, Any]:
    """The `quantization_config` of a GPTQ checkpoint."""
    # (bits, group size) of each layer. Where all layers have one group each, -1 stands for sizes that differ.
    one_group = all(layer.grid.scales.shape[1] == 1 for layer in layers.values())
    grids: dict[str, tuple[int, int] | None] = {
        name: (layer.grid.bits, -1 if one_group else layer.grid.group_size) for name, layer in layers.items()
    }
    most = Counter(grids.values()).most_common(1)[0][0]
    assert most is not None
    # Readers expect every linear layer of the blocks to be quantised, unless they are told otherwise.
    stacks = find_stacks(model)
    blocks = {block for stack in stacks for block in stack}
    inside = [name for name in linear_layers(model) if not blocks.isdisjoint(enclosing_names(name))]
    left_out = {name for name in inside if name not in grids}
    grids |= dict.fromkeys(left_out)
    description = {
        "quant_method": "gptq",
        "bits": most[0],
        "group_size": most[1],
        "desc_act": not all(layer.grid.in_order for layer in layers.values()),
        "sym": all(layer.grid.symmetric for layer in layers.values()),
        "lm_head": output_head(model) in layers.values(),
        "checkpoint_format": checkpoint_format,
        "format": checkpoint_format,
        "pack_dtype": "int32",
        "true_sequential": False,
        "meta": {"quantizer": [f"peft_elastic:{__version__}"]},
    }
    rules = _rules(grids, most)
    if rules:
        description["dynamic"] = rules
    if left_out and len(stacks) == 1:
        # The same for readers that know no `dynamic`, transformers among them: ends of the names of what is quantised.
        relative = {
            block: [n.removeprefix(f"{block}.") for n in layers if n.startswith(f"{block}.")] for block in blocks
        }
        kinds = list(relative.values())
        alike = kinds[0] and all(kind == kinds[0] for kind in kinds)
        description["modules_in_block_to_quantize"] = [kinds[0] if alike else [n for n in inside if n not in left_out]]
    return description


def _rules(grids: Mapping[str, tuple[int, int] | None], most: tuple[int, int]) -> dict[str, dict[str, int]]:
    """GPTQModel's `dynamic` for layers that are not like `most`: None is not quantised. One rule for all blocks if possible."""
    kinds: dict[str, list[str]] = {}
    for name in grids:
        kinds.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1#", name), []).append(name)
    patterns: list[tuple[str, tuple[int, int] | None]] = []
    for kind, names in kinds.items():
        if len({grids[name] for name in names}) == 1:
            patterns.append((re.escape(kind).replace(r"\#", r"\d+"), grids[names[0]]))
        else:
            patterns += [(re.escape(name), grids[name]) for name in names]
    return {
        f"{'-' if grid is None else '+'}:^{pattern}$": {} if grid is None else {"bits": grid[0], "group_size": grid[1]}
        for pattern, grid in patterns
        if grid != most
    }


def _is_weights(name: str) -> bool:
    """Whether a file holds weights of a model, which those of another one must not stay beside."""
    return re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json", name) is not None


# -- loading -------------------------------------------------------------------------------------------------------------


def load_gptq(
    path: str | os.PathLike[str],
    *,
    dense: nn.Module | str | os.PathLike[str] | None = None,
    dtype: torch.dtype = torch.float32,
    auto_class: Any = AutoModelForCausalLM,
) -> PreTrainedModel:
    """
    Reads a GPTQ checkpoint, whoever wrote it, into an ordinary transformers model with `QuantizedLinear` layers. GPTQModel is
    not needed.

    Both conventions for zero points ("gptq" and "gptq_v2"; a config that names none, as those of AutoGPTQ, means "gptq"),
    act-order, and `dynamic` rules are understood. The integers, scales and zero points become the grids of the layers.

    The weights of the layers are s (q - z), or with `dense` those of the original where they are rounded to q, and otherwise the
    value closest to them that is: quantisation-aware training starts from what was there before the rounding, and from the
    integers of the checkpoint. Weights with q = z are zero in either case. A checkpoint does not tell the zeros of a sparse model
    from small weights that were rounded to zero, and adapters take the zeros of the weight as their mask: so what the checkpoint
    has as zero stays zero.

    Args:
        path: a folder, or the name of a repository on the Hub, with safetensors.
        dense: the model before it was quantised, or its path.
        dtype: of the weights and everything else.
        auto_class: `AutoModelForCausalLM` or another one, or a model class.

    Raises:
        ValueError: naming the file, the tensor or the entry of the config that is missing, damaged or does not fit the others or
            the model.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"`dtype` is {dtype!r}; allowed are {', '.join(map(str, _DTYPES))}.")
    folder = _folder(path)
    config = AutoConfig.from_pretrained(folder)
    settings = _Settings(folder, getattr(config, "quantization_config", None))
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    state = _read_tensors(folder)
    with torch.device("meta"):
        build = getattr(auto_class, "from_config", None) or auto_class._from_config
        skeleton = build(config)
    originals = None if dense is None else _weights_of(dense, auto_class, dtype)

    grids: dict[str, Grid] = {}
    for name in sorted({key.rpartition(".")[0] for key in state if key.rpartition(".")[2] in TENSORS}):
        module_path, module = _find_linear(skeleton, name)
        out_features, in_features = weight_matrix(module).shape
        tensors = {key: state.pop(f"{name}.{key}") for key in TENSORS if f"{name}.{key}" in state}
        bits, group_size = settings.of(name)
        layer = unpack_gptq(
            name,
            tensors,
            out_features=out_features,
            in_features=in_features,
            bits=bits,
            group_size=group_size,
            checkpoint_format=settings.checkpoint_format,
        )
        grid = Grid(layer["scales"], layer["zeros"].int(), in_features=in_features, bits=bits, g_idx=layer["g_idx"])
        weight = grid.dequantize(layer["q"], dtype)
        if originals is not None:
            weight = torch.where(
                weight == 0, weight, grid.into_cells(_original(originals, module_path, weight), layer["q"])
            )
        if not torch.equal(grid.quantize(weight), layer["q"]):
            raise ValueError(
                f"`dtype` is {dtype}, which cannot hold the {bits}-bit weights of {name}; use torch.float32."
            )
        state[f"{name}.weight"] = weight.T.contiguous() if isinstance(module, Conv1D) else weight
        bias = f"{name}.bias"
        if module.bias is None and bias in state:  # some writers give every layer one
            if bool(state.pop(bias).any()):
                raise ValueError(f"{bias} is not zero, and the layer has no bias in the model.")
        grids[module_path] = grid
    if not grids:
        raise ValueError(
            f"{os.fspath(path)!r} has no quantised layers: no tensor of it is called {', '.join(TENSORS)}."
        )

    try:
        model, info = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except RuntimeError as error:  # shapes that differ
        raise ValueError(f"{os.fspath(path)!r} does not fit its config: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{os.fspath(path)!r} lacks {len(missing)} tensors, such as {missing[0]}.")
    replace_layers(
        model,
        [(model.get_submodule(n), QuantizedLinear.from_linear(model.get_submodule(n), g)) for n, g in grids.items()],
    )
    guard_saving(model)
    if (folder / "generation_config.json").exists() and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


class _Settings:
    """What the config of a checkpoint says of its layers.

    Raises:
        ValueError: it is missing, of another method, or says what no GPTQ checkpoint has.
    """

    def __init__(self, folder: Path, entry: Any) -> None:
        source = "quantization_config in config.json"
        if entry is None:
            source = _CONFIG_FILE
            entry = _read_json(folder / _CONFIG_FILE) if (folder / _CONFIG_FILE).exists() else None
        if entry is not None and not isinstance(entry, Mapping):
            entry = entry.to_dict() if hasattr(entry, "to_dict") else None
        if entry is None:
            raise ValueError(
                f"{os.fspath(folder)!r} is no GPTQ checkpoint: config.json has no quantization_config, and there is no "
                f"{_CONFIG_FILE}."
            )
        method = entry.get("quant_method", entry.get("method", "gptq"))
        if str(getattr(method, "value", method)).lower() != "gptq":
            raise ValueError(f"{source}: quant_method is {method!r}; allowed is 'gptq'.")
        self.checkpoint_format = entry.get("checkpoint_format") or entry.get("format") or "gptq"
        if self.checkpoint_format not in FORMATS:
            raise ValueError(
                f"{source}: checkpoint_format is {self.checkpoint_format!r}; allowed are {list(FORMATS)}."
            )
        if entry.get("pack_dtype", "int32") not in ("int32", None):
            raise ValueError(f"{source}: pack_dtype is {entry['pack_dtype']!r}; allowed is 'int32'.")
        if "bits" not in entry or "group_size" not in entry:
            raise ValueError(f"{source}: bits and group_size must be there; it has {sorted(entry)}.")
        self._default = entry["bits"], entry["group_size"]
        self._rules: list[tuple[re.Pattern[str], Mapping[str, Any]]] = []
        dynamic = entry.get("dynamic") or {}
        if not isinstance(dynamic, Mapping) or not all(isinstance(rule, Mapping) for rule in dynamic.values()):
            raise ValueError(f"{source}: dynamic must be an object of objects, got {dynamic!r:.200}.")
        for pattern, rule in dynamic.items():
            if pattern.startswith("-:"):
                continue  # not quantised, which the tensors tell
            try:
                self._rules.append((re.compile(pattern.removeprefix("+:")), rule))
            except re.error as error:
                raise ValueError(f"{source}: dynamic has {pattern!r}, no regular expression ({error}).") from error

    def of(self, name: str) -> tuple[Any, Any]:
        """bits and group size of a layer."""
        rule = next((rule for pattern, rule in self._rules if pattern.match(name)), {})
        return rule.get("bits", self._default[0]), rule.get("group_size", self._default[1])


def _folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(path)):
        raise ValueError(
            f"`path` is {os.fspath(path)!r}; it must be a folder or the name of a repository, owner/name."
        )
    return Path(snapshot_download(os.fspath(path), allow_patterns=["*.json", "*.safetensors"]))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file.name} is damaged: it is not JSON ({error}).") from None


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files of a checkpoint."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weights = _read_json(index)
        listed = weights.get("weight_map") if isinstance(weights, dict) else None
        names = set(listed.values()) if isinstance(listed, dict) else set()
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{index.name} is damaged: weight_map must give a file of this folder for each tensor.")
        files = [folder / name for name in sorted(names)]
    elif (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    else:
        files = sorted(folder.glob("*.safetensors"))  # AutoGPTQ names them after the bits and the group size
        if len(files) != 1:
            found = ", ".join(file.name for file in files) or "none"
            raise ValueError(
                f"{os.fspath(folder)!r} must have model.safetensors, with an index if there are several files, or one other "
                f"*.safetensors; found: {found}. Pickled weights are not read."
            )
    state: dict[str, torch.Tensor] = {}
    for file in files:
        if not file.exists():
            raise ValueError(f"{file.name} is missing.")
        try:
            with safetensors.safe_open(file, framework="pt") as tensors:
                state.update((key, tensors.get_tensor(key)) for key in tensors.keys())
        except safetensors.SafetensorError as error:
            raise ValueError(f"{file.name} is damaged: {error}") from None
    return state


def _find_linear(model: PreTrainedModel, name: str) -> tuple[str, Any]:
    """The path and the layer that a name in a checkpoint means, which may have been saved from the base of this model, or with
    it inside."""
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    for path in (name, name.removeprefix(prefix), prefix + name):
        if isinstance(modules.get(path), (nn.Linear, Conv1D)):
            return path, modules[path]
    raise ValueError(f"{name} has quantised weights, but the model has no linear layer of this name.")


def _weights_of(
    dense: nn.Module | str | os.PathLike[str], auto_class: Any, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The weights (out, in) of the linear layers of the original."""
    if not isinstance(dense, nn.Module):
        dense = auto_class.from_pretrained(os.fspath(dense), dtype=dtype)
    return {
        name: weight_matrix(layer)
        for name, layer in linear_layers(dense).items()  # type: ignore[arg-type]
        if isinstance(layer, (nn.Linear, Conv1D))
    }


def _original(weights: Mapping[str, torch.Tensor], name: str, like: torch.Tensor) -> torch.Tensor:
    found = weights.get(name)
    if found is None or found.shape != like.shape or not found.is_floating_point():
        what = "it is not there" if found is None else f"it is {found.dtype} {tuple(found.shape)}"
        raise ValueError(f"`dense`: {name} must be a linear layer with a weight {tuple(like.shape)}; {what}.")
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"`dense`: the weight of {name} holds NaN or infinite values.")
    return found.to(like)
