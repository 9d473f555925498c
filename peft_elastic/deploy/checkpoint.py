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
"""A model with sparse layers as an ordinary transformers checkpoint.

`save_pretrained` writes the tensors of `format.py` and a `quantization_config`; transformers hands a checkpoint with that
config to the quantizer below, which is registered when the package is imported. A checkpoint is untrusted: everything
that it says is verified before a kernel sees a byte.

`save_pretrained` writes one file after the other, into a folder that may hold another model, and may be stopped in between. So
`config.json` has a checksum of every tensor, and files that were not saved together are refused.
"""

from __future__ import annotations

import math
import os
import re
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.logging import get_logger
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..common.documents import COUNT, MapOf, parse_json
from ..layers import ops
from ..layers.format import VALUE_DTYPES, decompress, decompress_int4, verify, verify_int4
from ..layers.sparse_linear import SparseLinear
from ..quantization.saving import GridQuantizer, replace_quantized, state_to_save
from ..structure.rebuild import adopt_layer_sizes, rebuild, take_layer_sizes


logger = get_logger(__name__)

METHOD = "peft_elastic"  # transformers prints it where the package was not imported
_VERSION = 1
_LINEAR_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = ("weight_bitmask", "weight_values", "weight_scales", "weight_zeros", "weight_g_idx")
_SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16}  # of int4
_VALUE_DTYPES = VALUE_DTYPES | {"int4": torch.uint8}
# of safetensors, for the types that a stored layer has
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4}
_ITEM_BYTES |= {"F64": 8, "I64": 8, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}
_MAX_HEADER_BYTES = 100 * 2**20  # as in safetensors


class SparseCheckpointConfig(QuantizationConfigMixin):
    """What `config.json` says of the sparse layers.

    Args:
        layers (`dict`): by the path of the layer: `out_features`, `in_features`, `nnz` (int), `value_dtype` ("bf16", "int8" or
            "int4"), `linear_dtype` (of the dense layer that it stands for) and `crc32` (of each tensor, by its name). int4 has also
            `group_size` (int), `sparse` (bool; false: all values are stored) and `scale_dtype` ("float16" or "float32").
        version (`int`): of this description.
        dense_sums (`dict`, *optional*): of the other tensors that were saved with it, by their names.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        version: int = _VERSION,
        dense_sums: dict[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        self.version = version
        self.layers = {} if layers is None else layers
        self.dense_sums = {} if dense_sums is None else dense_sums

    def check(self) -> None:
        """ValueError if anything is not of its type or out of its range."""
        if self.version != _VERSION:
            raise ValueError(
                f"quantization_config: version is {self.version!r}; this release reads version {_VERSION}. Use a newer one."
            )
        if not isinstance(self.layers, dict):
            raise ValueError(f"quantization_config: layers must be an object, got {type(self.layers).__name__}.")
        MapOf(COUNT).check(self.dense_sums, "quantization_config: dense_sums")
        for name, entry in self.layers.items():
            keys = {"out_features", "in_features", "nnz", "value_dtype", "linear_dtype", "crc32"}
            int4 = isinstance(entry, dict) and entry.get("value_dtype") == "int4"
            keys |= {"group_size", "sparse", "scale_dtype"} if int4 else set()
            if not isinstance(entry, dict) or set(entry) != keys:
                raise ValueError(f"quantization_config: layer {name!r} must have {sorted(keys)}, got {entry!r:.200}.")
            if not isinstance(entry["value_dtype"], str) or entry["value_dtype"] not in _VALUE_DTYPES:
                raise ValueError(
                    f"{name}: value_dtype is {entry['value_dtype']!r:.50}; allowed are {sorted(_VALUE_DTYPES)} (quantization_config)."
                )
            if int4 and (not isinstance(entry["scale_dtype"], str) or entry["scale_dtype"] not in _SCALE_DTYPES):
                raise ValueError(
                    f"{name}: scale_dtype is {entry['scale_dtype']!r:.50}; allowed are {sorted(_SCALE_DTYPES)} (quantization_config)."
                )
            if not isinstance(entry["linear_dtype"], str) or entry["linear_dtype"] not in _LINEAR_DTYPES:
                raise ValueError(
                    f"{name}: linear_dtype is {entry['linear_dtype']!r:.50}; allowed are {sorted(_LINEAR_DTYPES)} "
                    "(quantization_config)."
                )
            sums, wanted = entry["crc32"], list(_stored_dtypes(entry))
            if (
                not isinstance(sums, dict)
                or set(sums) != set(wanted)
                or any(type(v) is not int for v in sums.values())
            ):
                raise ValueError(f"{name}: crc32 must have a number for each of {wanted}, got {sums!r:.200}.")


class _StoredLinear(nn.Module):
    """Takes the tensors of a sparse layer while a checkpoint is loaded. They are of any shape until they are verified."""

    def __init__(self, entry: dict[str, Any], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.entry = entry
        self.weight_values: nn.Parameter
        for name, dtype in _stored_dtypes(entry).items():
            # not on the meta device: nothing of it is left to be filled in if the checkpoint lacks the tensor
            setattr(self, name, nn.Parameter(torch.empty(0, dtype=dtype, device="meta"), requires_grad=False))
        self.bias = bias
        # transformers initializes what a checkpoint lacks, and reads `weight` of some layers to do so
        self.weight = torch.empty(0)
        self.weight._is_hf_initialized = True  # type: ignore[attr-defined]

    def verified(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors on the CPU. ValueError that names the one that is missing, damaged or of another layer."""
        tensors = {key: getattr(self, key).detach().cpu() for key in _stored_dtypes(self.entry)}
        shape = {key: self.entry[key] for key in ("out_features", "in_features", "nnz")}
        if self.entry["value_dtype"] == "int4":
            verify_int4(name, tensors, **shape, **{key: self.entry[key] for key in ("group_size", "sparse")})
        else:
            verify(name, tensors, **shape, dtype=self.entry["value_dtype"])
        for key, tensor in tensors.items():
            if _crc32(tensor) != self.entry["crc32"][key]:
                raise ValueError(
                    f"{name}.{key} is damaged: its bytes do not have the checksum that was saved with them."
                )
        if self.bias is not None and not getattr(self.bias, "_is_hf_initialized", False):
            raise ValueError(f"{name}.bias is missing.")
        return tensors

    def clear(self) -> None:
        """Let go of the tensors, whose packed form has been made."""
        for key in _stored_dtypes(self.entry):
            setattr(self, key, None)


class SparseQuantizer(HfQuantizer):
    """Loads and saves models with `SparseLinear` layers through transformers' own `from_pretrained` and `save_pretrained`."""

    requires_calibration = True

    def __init__(self, quantization_config: SparseCheckpointConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._stays_dense = ""  # why, if it does
        self._layer_sizes: Any = None

    # -- loading ---------------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if not self.quantization_config.layers:
            return
        devices = _devices(device_map)
        self._stays_dense = ""
        if "disk" in devices:
            raise ValueError('`device_map`: sparse layers cannot be offloaded to "disk"; allowed are "cpu" and GPUs.')
        if not ops.is_available():
            self._stays_dense = (
                "the C++ extension with the sparse kernels is not there (`peft-elastic info` says how to get it)"
            )
        elif devices - {"cpu"}:
            self._stays_dense = f"the sparse kernels run on the CPU alone, and device_map asks for {sorted(devices)}"

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        # The last call before the model is built, at full size.
        self._layer_sizes = take_layer_sizes(config)
        return config

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        # Says to transformers that the shape of the tensor need not be that of the parameter: `verified` looks at it.
        return param_name.rpartition(".")[2] in _STORED

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        self.quantization_config.check()
        if self._layer_sizes:
            adopt_layer_sizes(model, self._layer_sizes)
        rebuild(model)
        check_files(checkpoint_files or (), self.quantization_config)
        modules, seen = dict(model.named_modules()), dict[str, str]()
        for name, entry in self.quantization_config.layers.items():
            path = _find_path(model, modules, name)
            if path is None:
                continue
            if path in seen:
                raise ValueError(f"quantization_config: {seen[path]!r} and {name!r} are the same layer.")
            seen[path] = name
            linear = modules[path]
            if not isinstance(linear, (nn.Linear, Conv1D)):
                raise ValueError(f"quantization_config: layer {name!r} is a {type(linear).__name__}, no linear layer.")
            found = linear.weight.shape[::-1] if isinstance(linear, Conv1D) else linear.weight.shape
            if tuple(found) != (entry["out_features"], entry["in_features"]):
                raise ValueError(
                    f"quantization_config: layer {name!r} is {entry['out_features']} x {entry['in_features']}, in the model "
                    f"it is {found[0]} x {found[1]}."
                )
            model.set_submodule(path, _StoredLinear(entry, linear.bias))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        stored = [(name, module) for name, module in model.named_modules() if isinstance(module, _StoredLinear)]

        def load(item: tuple[str, _StoredLinear]) -> nn.Module:
            name, module = item
            tensors, entry = module.verified(name), module.entry
            dtype, in_features, int4 = (
                _LINEAR_DTYPES[entry["linear_dtype"]],
                entry["in_features"],
                entry["value_dtype"] == "int4",
            )
            scales = None if int4 else tensors.get("weight_scales")
            device = module.weight_values.device
            module.clear()
            try:
                if self._stays_dense:
                    if int4:
                        weight = decompress_int4(tensors, in_features, entry["group_size"], dtype)
                    else:
                        weight = decompress(
                            tensors["weight_bitmask"], tensors["weight_values"], scales, in_features, dtype
                        )
                    return _dense(weight.to(device), module.bias)
                if int4:
                    packed = ops.pack_int4(tensors, in_features, entry["group_size"])
                else:
                    packed = ops.pack(tensors["weight_bitmask"], tensors["weight_values"], in_features)
            except ValueError as error:
                raise ValueError(f"{name}.weight_values: {error}") from None
            layer = SparseLinear(packed, scales, module.bias, dtype)
            if layer.nnz != entry["nnz"]:  # of dense int4 nothing else says it
                raise ValueError(f"{name}: nnz is {entry['nnz']}, but there are {layer.nnz} nonzeros.")
            return layer

        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            for (name, _), layer in zip(stored, pool.map(load, stored), strict=True):
                model.set_submodule(name, layer.eval())
        if self._stays_dense:
            warnings.warn(f"The sparse layers of this checkpoint are loaded as dense ones: {self._stays_dense}.")
        if self._stays_dense or not stored:  # earlier versions marked models in this way whose blocks differ in size
            self.remove_quantization_config(model)
        return model

    # -- saving ----------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        # transformers calls this before it writes config.json, so that it describes the layers as they are now.
        self.quantization_config.layers = {
            name: _describe(module) for name, module in model.named_modules() if isinstance(module, SparseLinear)
        }
        state = state_to_save(model)
        self.quantization_config.dense_sums = _dense_checksums(model, model.state_dict() if state is None else state)
        if not self.quantization_config.layers:  # they have all been replaced
            self.remove_quantization_config(model)
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside the layers, whose own weights have no gradient

    @property
    def is_qat_trainable(self) -> bool:
        # What Trainer asks when it is made, also for evaluation alone: otherwise it takes no such model without adapters.
        logger.warning_once(
            "The sparse layers of this model are constant. Trainer evaluates it as it is; training without adapters would change "
            "the other weights alone."
        )
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, SparseLinear):
                model.set_submodule(name, module.to_linear().to(dtype))
        replace_quantized(model)
        return model

    def remove_quantization_config(self, model: Any) -> None:
        conversions = model.__dict__.get("_weight_conversions")
        super().remove_quantization_config(model)
        if conversions is not None:  # of the names of the weights, which stay
            model._weight_conversions = conversions
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)


def mark_checkpoint(model: PreTrainedModel) -> None:
    """Make `model.save_pretrained` write the sparse layers that `model` has when it is called."""
    if isinstance(getattr(model, "hf_quantizer", None), (type(None), GridQuantizer)):  # this one guards saving as well
        config = SparseCheckpointConfig()
        model.hf_quantizer = SparseQuantizer(config, pre_quantized=True)
        model.config.quantization_config = config
        model.is_quantized, model.quantization_method = True, METHOD


def check_files(files: Iterable[str], config: SparseCheckpointConfig) -> None:
    """Verify that the files of a checkpoint hold the tensors that its config describes, and no others. Those of sparse layers are
    looked at again, and more closely, when they have been read.

    Raises:
        ValueError: naming the tensor, the layer or the file that is one too many, missing or another one.
    """
    where: dict[str, str] = {}
    places: dict[str, _Place] = {}
    for file in files:
        name = os.path.basename(file)
        if not name.endswith(".safetensors"):
            if config.layers:
                raise ValueError(f"{name} is no safetensors file; sparse layers are read from these alone.")
            return
        header, begin = check_safetensors(file)
        for tensor, entry in header.items():
            if tensor in where:
                raise ValueError(f"{tensor} is in {where[tensor]} and in {name}; it must be in one of them.")
            where[tensor] = name
            first, last = entry["data_offsets"]
            places[tensor] = _Place(file, begin + first, last - first, _ITEM_BYTES.get(entry["dtype"], 1))
    stored = {tensor for tensor in where if tensor.rpartition(".")[2] in _STORED}
    for tensor in sorted(stored):
        dense = f"{tensor.rpartition('.')[0]}.weight"
        if dense in where:
            raise ValueError(f"{tensor} in {where[tensor]} is of a sparse layer, but {dense} is there as well.")
    described = {f"{name}.{key}" for name, entry in config.layers.items() for key in _stored_dtypes(entry)}
    # transformers may save a layer under another path than it has in the model: then as many others are missing here
    if len(stored) > len(described):
        tensor = _first_unlike(stored - described, described)
        layer = tensor.rpartition(".")[0]
        raise ValueError(
            f"quantization_config: layer {layer!r} is left out, or described wrongly: {where[tensor]} holds {tensor}."
        )
    _check_dense({name: places[name] for name in places if name not in stored}, config.dense_sums)


class _Place(NamedTuple):
    """Where a tensor is, in bytes."""

    file: str
    offset: int
    size: int
    item: int


def _check_dense(places: Mapping[str, _Place], expected: Mapping[str, int]) -> None:
    """Verify tensors against checksums. What transformers saves under other names, or several as one, is left out."""
    known = [name for name, place in places.items() if name in expected and place.size]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        found = dict(zip(known, pool.map(lambda name: _sum_of_file(places[name]), known), strict=True))
    for name, value in found.items():
        if value != expected[name]:
            raise _not_together(name, places[name].file)
    if len(found) == sum(place.size > 0 for place in places.values()):
        count = Counter(expected.values())  # tied tensors have one checksum, and are saved once
        missing = sorted(name for name in expected if name not in places and count[expected[name]] == 1)
        if missing and places:
            raise ValueError(f"{missing[0]} is missing.")


def _first_unlike(names: Iterable[str], others: Iterable[str]) -> str:
    """The first of `names` that is not, under another path, among `others`: from the number of the block on, which does not
    change when a model becomes a part of another."""

    def tail(name: str) -> str:
        match = re.search(r"\.\d+\..*", name)
        return match[0] if match else name

    tails = set(map(tail, others))
    return min(names, key=lambda name: (tail(name) in tails, name))


def _not_together(tensor: str, file: str) -> ValueError:
    folder, name = os.path.split(file)
    why = "it is damaged, or a `save_pretrained` over an older model was interrupted. Save the model again."
    if name == SAFE_WEIGHTS_NAME and os.path.exists(os.path.join(folder, SAFE_WEIGHTS_INDEX_NAME)):
        why = "the file is of an older model beside the shards of this one. Remove it, or save to another folder."
    return ValueError(
        f"{tensor} in {name} was not saved with this config.json, which has another checksum of it: {why}"
    )


def check_safetensors(file: str | os.PathLike[str]) -> tuple[dict[str, Any], int]:
    """Verify the header of a safetensors file against the length of the file, without reading the tensors.

    Returns:
        what the header says of each tensor, and where in the file their bytes begin.

    Raises:
        ValueError: naming the tensor whose offsets, type, shape and length do not agree, or the file if it is damaged as a
            whole.
    """
    name = os.path.basename(os.fspath(file))
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
        if length is None or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{name} is damaged: {size} bytes, and its header claims {length}.")
        try:
            header = parse_json(stream.read(length))
        except ValueError as error:
            raise ValueError(f"{name} is damaged: its header is {error}.") from None
    if not isinstance(header, dict):
        raise ValueError(f"{name} is damaged: its header is not a JSON object.")
    spans = []
    for tensor, entry in header.items():
        if tensor == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            numbers = [begin, end, *shape]
            if any(type(number) is not int or number < 0 for number in numbers):
                raise ValueError("negative or no whole numbers")
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{tensor} in {name} is described wrongly: {entry!r:.200} ({error}).") from None
        if begin > end or length + 8 + end > size:
            raise ValueError(
                f"{tensor} in {name} lies at bytes {begin} to {end}, but the file has {size - 8 - length} bytes of tensors: it "
                "is truncated or damaged."
            )
        if isinstance(dtype, str) and dtype in _ITEM_BYTES and math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
            raise ValueError(f"{tensor} in {name} has {end - begin} bytes, which is not {dtype} {shape}.")
        spans.append((begin, end, tensor))
    spans.sort()
    for (_, end, _), (begin, _, tensor) in zip(spans, spans[1:]):
        if begin < end:
            raise ValueError(f"{tensor} in {name} overlaps the tensor before it.")
    header.pop("__metadata__", None)
    return header, length + 8


def _stored_dtypes(entry: dict[str, Any]) -> dict[str, torch.dtype]:
    """The tensors of a layer that an entry describes, by their names on disk."""
    kind = entry["value_dtype"]
    dtypes = {"weight_bitmask": torch.uint8, "weight_values": _VALUE_DTYPES[kind]}
    if kind == "int8":
        dtypes["weight_scales"] = torch.float32
    if kind == "int4":
        dtypes |= {"weight_scales": _SCALE_DTYPES[entry["scale_dtype"]], "weight_zeros": torch.uint8}
        if isinstance(entry["crc32"], dict) and "weight_g_idx" in entry["crc32"]:
            dtypes["weight_g_idx"] = torch.int32
        if not entry["sparse"]:
            del dtypes["weight_bitmask"]
    return dtypes


def _describe(layer: SparseLinear) -> dict[str, Any]:
    tensors = layer.stored_tensors()
    entry = {
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "nnz": layer.nnz,
        "value_dtype": layer.value_dtype,
        "linear_dtype": str(layer.linear_dtype).removeprefix("torch."),
        "crc32": {key: _crc32(tensor) for key, tensor in tensors.items()},
    }
    if layer.value_dtype == "int4":
        entry |= {"group_size": layer.group_size, "sparse": layer.has_bitmask}
        entry["scale_dtype"] = str(tensors["weight_scales"].dtype).removeprefix("torch.")
    return entry


def _crc32(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().view(torch.uint8).numpy().data)


def _sum(words: np.ndarray[Any, Any]) -> int:
    """A checksum that does not depend on the order of the elements: transformers stores some tensors transposed."""
    total = 0
    for start in range(0, len(words), 1 << 20):
        part = words[start : start + (1 << 20)].astype(np.uint64)
        total += int((part * part + part).sum(dtype=np.uint64))
    return total % 2**63


def _words(item: int) -> Any:
    """What elements of so many bytes are summed as."""
    return {1: np.uint8, 2: np.uint16}.get(item, np.uint32)


def _sum_of_file(place: _Place) -> int:
    words = np.memmap(place.file, np.uint8, "r", place.offset, (place.size,))
    return _sum(words[: place.size // place.item * place.item].view(_words(place.item)))


def _dense_checksums(model: nn.Module, state: Mapping[str, Any]) -> dict[str, int]:
    """Of all tensors that are not those of sparse layers, and that are here."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    dense = {
        name: tensor
        for name, tensor in sorted(state.items())
        if type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type != "meta" and tensor.numel()
        if name.rpartition(".")[2] not in _STORED and name not in ignored
    }
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:

        def sum_of(tensor: torch.Tensor) -> int:
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            return _sum(flat.view(_words(tensor.element_size())))

        return dict(zip(dense, pool.map(sum_of, dense.values()), strict=True))


def _find_path(model: PreTrainedModel, modules: dict[str, nn.Module], name: str) -> str | None:
    """Where the layer is in `model`, which may be the base of the model that was saved, or have it inside."""
    prefix = f"{model.base_model_prefix}."
    for path in (name, name.removeprefix(prefix), prefix + name):
        if path in modules:
            return path
    if type(model).__name__ in (model.config.architectures or [type(model).__name__]):
        raise ValueError(f"quantization_config: the model has no layer {name!r}.")
    return None  # a head that this class does not have; transformers says so of its tensors


def _devices(device_map: Any) -> set[str]:
    """The kinds of devices that a `device_map` names. None while transformers has yet to work out what "auto" and its like come down
    to; it asks again with the result."""
    if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return set()
    kinds = set()
    for device in device_map.values() if isinstance(device_map, dict) else [device_map]:
        name = f"accelerator {device}" if isinstance(device, int) else str(device)
        kinds.add("cpu" if name.partition(":")[0] == "cpu" else name)
    return kinds


def _dense(weight: torch.Tensor, bias: nn.Parameter | None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = bias
    return linear


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(SparseQuantizer)
if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(SparseCheckpointConfig)
