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

`save_pretrained` writes the tensors of `layers/values/README.md` and a `quantization_config`; transformers hands a checkpoint with that
config to the quantizer below, which is registered when the package is imported. A checkpoint is untrusted: everything
that it says is verified before a kernel sees a byte; of the files as a whole `stored_files.py` sees to that.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.logging import get_logger
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..common.checks import is_whole
from ..common.documents import COUNT, MapOf
from ..layers import ops
from ..layers.backends.float import FLOAT
from ..layers.sparse_linear import SparseLinear
from ..layers.values import FORMATS, STORED_NAMES, Sizes
from ..quantization.saving import GridQuantizer, replace_quantized, state_to_save
from ..structure.rebuild import adopt_layer_sizes, rebuild, take_layer_sizes
from .stored_files import check_files, checksum, dense_checksums


logger = get_logger(__name__)

METHOD = "peft_elastic"  # transformers prints it where the package was not imported
_VERSION = 1
_LINEAR_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OF_GRIDS = {"group_size", "sparse", "scale_dtype"}  # what an entry has besides, for values on a grid


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
            kind = entry.get("value_dtype") if isinstance(entry, dict) else None
            value_format = FORMATS.get(kind) if isinstance(kind, str) else None
            keys |= _OF_GRIDS if value_format is not None and value_format.is_grid else set()
            if not isinstance(entry, dict) or set(entry) != keys:
                raise ValueError(f"quantization_config: layer {name!r} must have {sorted(keys)}, got {entry!r:.200}.")
            if value_format is None:
                raise _not_one_of(name, "value_dtype", entry, FORMATS)
            if value_format.is_grid:
                scale_dtypes = [_name_of(dtype) for dtype in value_format.tensors["weight_scales"]]
                if not isinstance(entry["scale_dtype"], str) or entry["scale_dtype"] not in scale_dtypes:
                    raise _not_one_of(name, "scale_dtype", entry, scale_dtypes)
            if not isinstance(entry["linear_dtype"], str) or entry["linear_dtype"] not in _LINEAR_DTYPES:
                raise _not_one_of(name, "linear_dtype", entry, _LINEAR_DTYPES)
            sums, wanted = entry["crc32"], list(_stored_dtypes(entry))
            if not isinstance(sums, dict) or set(sums) != set(wanted) or any(not is_whole(v) for v in sums.values()):
                raise ValueError(f"{name}: crc32 must have a number for each of {wanted}, got {sums!r:.200}.")

    def tensor_names(self) -> set[str]:
        """The tensors of sparse layers, as they are called on disk. Only after `check`."""
        return {f"{name}.{key}" for name, entry in self.layers.items() for key in _stored_dtypes(entry)}


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
        FORMATS[self.entry["value_dtype"]].verify(name, tensors, self.sizes)
        for key, tensor in tensors.items():
            if checksum(tensor) != self.entry["crc32"][key]:
                raise ValueError(
                    f"{name}.{key} is damaged: its bytes do not have the checksum that was saved with them."
                )
        if self.bias is not None and not getattr(self.bias, "_is_hf_initialized", False):
            raise ValueError(f"{name}.bias is missing.")
        return tensors

    @property
    def sizes(self) -> Sizes:
        """What the entry says of the weight; nothing of it is verified."""
        return Sizes(**{key: self.entry[key] for key in Sizes._fields if key in self.entry})

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
            raise ValueError('`device_map` must place sparse layers on "cpu" or GPUs, got "disk".')
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
        return param_name.rpartition(".")[2] in STORED_NAMES

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        self.quantization_config.check()
        if self._layer_sizes:
            adopt_layer_sizes(model, self._layer_sizes)
        rebuild(model)
        check_files(
            checkpoint_files or (), self.quantization_config.tensor_names(), self.quantization_config.dense_sums
        )
        modules, seen = dict(model.named_modules()), dict[str, str]()
        for name, entry in self.quantization_config.layers.items():
            path = _find_path(model, modules, name)
            if path is None:
                continue
            if path in seen:
                raise ValueError(f"quantization_config: {seen[path]!r} and {name!r} are the same layer.")
            seen[path] = name
            linear = modules[path]
            if not FLOAT.matches(linear):
                raise ValueError(f"quantization_config: layer {name!r} is a {type(linear).__name__}, no linear layer.")
            found = FLOAT.sizes(linear)
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
            tensors, entry, sizes = module.verified(name), module.entry, module.sizes
            value_format, dtype = FORMATS[entry["value_dtype"]], _LINEAR_DTYPES[entry["linear_dtype"]]
            device = module.weight_values.device
            module.clear()
            try:
                if self._stays_dense:
                    return _dense(value_format.decompress(tensors, sizes, dtype).to(device), module.bias)
                packed, scales = value_format.pack(tensors, sizes)
            except ValueError as error:
                raise ValueError(f"{name}.weight_values: {error}") from None
            layer = SparseLinear(packed, scales, module.bias, dtype)
            if layer.nnz != entry["nnz"]:  # where zeros are stored nothing else says it
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
        self.quantization_config.dense_sums = dense_checksums(model, model.state_dict() if state is None else state)
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


def _stored_dtypes(entry: dict[str, Any]) -> dict[str, torch.dtype]:
    """The tensors of a layer that an entry describes, by their names on disk."""
    value_format, found = FORMATS[entry["value_dtype"]], {}
    for key, dtypes in value_format.tensors.items():
        if key == "weight_bitmask" and not entry.get("sparse", True):
            continue
        if key in value_format.optional and not (isinstance(entry["crc32"], dict) and key in entry["crc32"]):
            continue
        chosen = [dtype for dtype in dtypes if len(dtypes) == 1 or _name_of(dtype) == entry["scale_dtype"]]
        found[key] = chosen[0]
    return found


def _describe(layer: SparseLinear) -> dict[str, Any]:
    tensors = layer.stored_tensors()
    entry = {
        "out_features": layer.out_features,
        "in_features": layer.in_features,
        "nnz": layer.nnz,
        "value_dtype": layer.value_dtype,
        "linear_dtype": _name_of(layer.linear_dtype),
        "crc32": {key: checksum(tensor) for key, tensor in tensors.items()},
    }
    if layer.value_format.is_grid:
        entry |= {"group_size": layer.group_size, "sparse": layer.has_bitmask}
        entry["scale_dtype"] = _name_of(tensors["weight_scales"].dtype)
    return entry


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _not_one_of(name: str, key: str, entry: dict[str, Any], allowed: Iterable[str]) -> ValueError:
    return ValueError(f"{name}: {key} must be one of {sorted(allowed)}, got {entry[key]!r:.50} (quantization_config).")


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
