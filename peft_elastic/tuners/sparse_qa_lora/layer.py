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
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.other import transpose
from torch import nn

from ...common.parameters import check_parameters, is_spread
from ...layers.backends import BACKENDS, Backend, OldWeight, backend_of, find_linear_backend
from ...layers.grid import Grid, check_group_size, fit_grid
from ...layers.narrowed import Narrowed, active_ranges, stored_tensor
from ...layers.quantized_linear import QuantizedLinear
from .config import SparseQALoraConfig
from .effective_weight import effective_linear, effective_weight


class SparseLoraLinear(lora.Linear):
    """A LoRA layer around a linear layer, `Conv1D` or a quantised linear layer, whose update is masked by the zeros of the
    base weight, or rounded together with it, or neither: each adapter as its `SparseQALoraConfig` says.

    Attributes:
        masked (`dict[str, bool]`): by adapter, whether its update is masked.
        lora_grid (`nn.ModuleDict`): by adapter, the `Grid` of those that are quantisation-aware.
    """

    adapter_layer_names = (*lora.Linear.adapter_layer_names, "lora_grid")
    other_param_names = (*lora.Linear.other_param_names, "masked")

    # Whether `get_delta_weight` leaves out the mask and the rounding, for what puts them on again.
    unmasked_delta = False
    # The base weight as it was before the merge.
    _old: Optional[OldWeight] = None

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: SparseQALoraConfig, **kwargs: Any
    ) -> None:
        if "masked" not in self.__dict__:
            self.masked: dict[str, bool] = {}
            self.lora_grid = nn.ModuleDict()
        grid = _make_grid(self.get_base_layer(), config) if config.quantization_aware else None
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self.masked[adapter_name] = config.sparse_adapter
        if grid is not None:
            self.lora_grid[adapter_name] = grid

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        for key in VARIANT_KWARG_KEYS:
            kwargs.pop(key, None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        if self._is_one_product(names):
            weight, read = self._weight_or_reader()
            bias = self.get_base_layer().bias
            return effective_linear(x, weight, bias, *self._factors(names), *self.kind(names), read=read)
        result = self.base_layer(x, *args, **kwargs)
        return self._add_updates(result, x, names)

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        for name in sorted(set(adapter_names) & set(self.lora_A)):
            rows = [index for index, other in enumerate(adapter_names) if other == name]
            result[rows] = self._add_updates(result[rows], x[rows], [name])
        return result

    def _is_one_product(self, names: list[str]) -> bool:
        """Whether the layer can compute x W'^T at once, as the merged layer does. Dropout acts on the update alone, and so
        the update is then a product of its own."""
        if self.training and any(getattr(self.lora_dropout[name], "p", 0) for name in names):
            return False
        if not computes_plainly(self.base_layer):
            return False
        narrowed = isinstance(self.base_layer, Narrowed)  # whose attribute may be a copy of what is active
        weight = stored_tensor(self.base_layer, "weight") if narrowed else getattr(self.base_layer, "weight", None)
        if weight is not None and weight.requires_grad:
            return False  # its gradient comes from the base layer
        masked, grid = self.kind(names)
        if grid is None and self._backend.on_grid:
            return False  # and the update is not
        return len({self.masked[name] for name in names}) == 1 and (masked or grid is not None)

    def _add_updates(self, result: torch.Tensor, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        dtype = result.dtype
        # rounding does not distribute over several updates
        groups = [names] if self.kind(names)[1] is not None else [[name] for name in names]
        dropouts: Any = self.lora_dropout
        for group in groups:
            masked, grid = self.kind(group)
            dropped = dropouts[group[0]](x)
            if masked or grid is not None:
                weight, read = self._weight_or_reader()
                if weight is not None and weight.is_meta and not x.is_meta:
                    raise ValueError(
                        "accelerate has offloaded the weights of the base, which masked and quantisation-aware adapters need "
                        "to compute. Choose a `device_map` without 'cpu' or 'disk' offloading, or merge the adapter first."
                    )
                rounded = grid is not None and self._backend.on_grid
                minus = self._backend.grid(self.get_base_layer()) if rounded else "weight"
                update = effective_linear(dropped, weight, None, *self._factors(group), masked, grid, minus, read)
            else:
                lora_A, lora_B = self.lora_A[group[0]], self.lora_B[group[0]]
                dropped = self._cast_input_dtype(dropped, lora_A.weight.dtype)
                update = lora_B(lora_A(dropped)) * self.scaling[group[0]]
            result = result + update
        return result.to(dtype)

    def _weight_or_reader(self) -> tuple[Optional[torch.Tensor], Optional[Callable[[], torch.Tensor]]]:
        base_layer, backend = self.get_base_layer(), self._backend
        if not backend.packed:
            return _whole(backend.weight(base_layer)), None
        return None, lambda: backend.weight(base_layer)  # dequantised when needed, and not kept

    def _factors(self, names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """B with the scaling in it, (out, k), and A, (k, in), of the sum of the updates."""
        lora_B = [_whole(self.lora_B[name].weight) * self.scaling[name] for name in names]
        lora_A = [_whole(self.lora_A[name].weight) for name in names]
        if len(names) == 1:
            return lora_B[0], lora_A[0]
        return torch.cat(lora_B, dim=1), torch.cat(lora_A, dim=0)

    def kind(self, names: list[str]) -> tuple[bool, Optional[Grid]]:
        """Whether these adapters together are masked, and the grid they round to, as far as it is active.

        Raises:
            ValueError: if only some round, or they round to different grids.
        """
        grids: list[Any] = [self.lora_grid[name] if name in self.lora_grid else None for name in names]
        first = grids[0]
        for name, grid in zip(names[1:], grids[1:]):
            if (grid is None) != (first is None) or (grid is not None and not grid.equals(first)):
                raise ValueError(
                    f"The adapters {names[0]!r} and {name!r} cannot be active together: they round to different grids, or "
                    "only one of them is quantisation-aware."
                )
        if first is not None and len({self.masked[name] for name in names}) > 1:
            raise ValueError(f"The adapters {names} cannot be active together: only some of them are masked.")
        return self.masked[names[0]], None if first is None else first.take(*active_ranges(self.get_base_layer()))

    # -- merging ---------------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """What the adapter adds to what the base layer computes with: masked, and with the rounding. As stored in the base
        layer: (out, in), or (in, out) for `Conv1D`."""
        if self.unmasked_delta:
            lora_B, lora_A = self._factors([adapter])
            return transpose(lora_B @ lora_A, self.fan_in_fan_out)
        base_layer = self.get_base_layer()
        backend = self._backend
        before, own = self._weight_before(), backend.grid(base_layer)
        if self._old is not None and self._old.grid is not None:
            own = self._old.grid
        if own is not None:
            before = own.round(before)
        delta = self._merged_weight([adapter]) - before
        return delta.T.contiguous() if backend.out_dim(base_layer) else delta

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """As in peft. The zeros of the base stay; the base weight is kept, so that `unmerge` gives it back exactly.

        Raises:
            ValueError: if the merged weight is not finite (`safe_merge`), or the base layer is quantised on a grid and the
                adapter is not quantisation-aware.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not names:
            return
        together = [*self.merged_adapters, *names]
        self.check_merge(together)
        merged = self._merged_weight(together)  # starting from the base weight, whatever is merged
        if safe_merge:
            self._check_finite(merged, names)
        old = self._backend.replace(self.get_base_layer(), merged, self.kind(together)[1])
        if self._old is None:
            self._old = old
        self.merged_adapters.extend(names)

    def check_merge(self, names: list[str], safe_merge: bool = False) -> None:
        """ValueError if the merged layer would not compute what these adapters do, or, with `safe_merge`, nothing finite."""
        grid = self.kind(names)[1]
        if grid is None and self._backend.on_grid:
            raise ValueError(
                f"The base layer is quantised and the adapters {names} are not quantisation-aware, so the merged weight would "
                "be rounded to other values than they were trained with. `peft_elastic.merge_and_requantize(model)` does "
                "that, and reports the error; train with `SparseQALoraConfig(quantization_aware=True)` to avoid it."
            )
        if safe_merge:
            self._check_finite(self._merged_weight(names), names)

    @staticmethod
    def _check_finite(merged: torch.Tensor, names: list[str]) -> None:
        if not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken.")

    def _weight_before(self) -> torch.Tensor:
        """W, (out, in), with or without a merge."""
        base_layer = self.get_base_layer()
        return self._backend.weight(base_layer) if self._old is None else self._old.matrix(base_layer)

    def _merged_weight(self, names: list[str]) -> torch.Tensor:
        with torch.no_grad():
            masked, grid = self.kind(names)
            weight = original = self._weight_before()
            if grid is not None or len({self.masked[name] for name in names}) == 1:
                return effective_weight(weight, *self._factors(names), masked, grid)
            for name in names:  # some masked by the zeros of the base, some not
                delta = effective_weight(original, *self._factors([name]), self.masked[name], None) - original
                weight = weight + delta
            return weight

    def unmerge(self) -> None:
        """As in peft; the base weight is what it was, to the last bit."""
        if self._old is None:
            super().unmerge()  # warns that there is nothing to do
            return
        self._old.put_back(self.get_base_layer())
        self._old = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: Optional[list[str]]
    ) -> nn.Module:
        """The base layer, merged or not; a `QuantizedLinear` where quantisation-aware adapters have been merged."""
        if merge:
            writable = self._backend.writable(self.get_base_layer(), self._adapter_dtype())
            if writable is not self.get_base_layer():
                self.base_layer = writable
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base_layer: Any = self.get_base_layer()
        grid = self.kind(self.merged_adapters)[1] if self.merged_adapters else None
        if grid is not None and not self._backend.on_grid:
            merged = self._merged_weight(self.merged_adapters)  # in a dtype that holds all values of the grid
            base_layer = QuantizedLinear.from_linear(base_layer, Grid.copy_of(grid))
            base_layer.weight.data = merged
        self._old = None  # lets go of the old weight
        return base_layer

    @property
    def _backend(self) -> Backend:
        return backend_of(self.get_base_layer())

    def _adapter_dtype(self) -> torch.dtype:
        return next(iter(self.lora_A.values())).weight.dtype

    def __repr__(self) -> str:
        return super().__repr__().replace("lora.lora.", "lora.", 1)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor. ValueError if it is spread over several processes, as it is where an engine shards a layer within the LoRA layer on
    its own: masks and rounding take base and adapter at once."""
    if is_spread(tensor):
        raise ValueError(
            "Masked and quantisation-aware adapters compute with the weights of base layer, A and B at once, and one of them is sharded "
            "on its own. Call `fully_shard` on the transformer blocks (`transformer_layer_cls_to_wrap` in accelerate's and Trainer's "
            "configuration), and not on the linear layers in them."
        )
    return tensor


def computes_plainly(layer: nn.Module) -> bool:
    """Whether a forward pass is x W^T + b with the weight of the backend, or its rounding, and nobody watches it."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    backend = find_linear_backend(layer)
    return backend is not None and backend.is_exact(layer) and not hooks and "forward" not in layer.__dict__


@contextmanager
def grids_come_later() -> Iterator[None]:
    """Layers whose weights are not in memory get an adapter all the same; the caller puts in the grids of the adapter's file."""
    token = _LATER.set(True)
    try:
        yield
    finally:
        _LATER.reset(token)


_LATER: ContextVar[bool] = ContextVar("grids come later", default=False)


def _make_grid(layer: nn.Module, config: SparseQALoraConfig) -> Grid:
    """The grid of the base layer, or one for its weight. ValueError if `config` asks for another one than the layer has."""
    backend = backend_of(layer)
    if _LATER.get() and layer.get_parameter("weight").is_meta:
        outputs, inputs = backend.sizes(layer)
        return Grid(torch.ones(outputs, 1), torch.zeros(outputs, 1, dtype=torch.int32), in_features=inputs, bits=4)
    own = backend.grid(layer)
    if own is None:
        bits = 4 if config.bits is None else config.bits
        group_size = 128 if config.group_size is None else config.group_size
        return fit_grid(
            backend.weight(layer), bits, group_size, bool(config.symmetric), config.clipping, persistent=True
        )
    check_same_grid(own, config, "the base layer")
    return Grid.copy_of(own, persistent=True)


def check_same_grid(grid: Grid, config: SparseQALoraConfig, name: str) -> None:
    """ValueError if `config` asks for another grid than that of the quantised layer `name`."""
    group_size = grid.in_features if config.group_size == -1 else config.group_size
    for option, asked, found in (
        ("bits", config.bits, grid.bits),
        ("group_size", group_size, grid.group_size),
        ("symmetric", config.symmetric, grid.symmetric),
    ):
        if asked is not None and asked != found:
            raise ValueError(
                f"`{option}` is {asked!r}, but {name} is quantised with {found!r}. Leave it unset to take over the grid of the "
                "base."
            )


def check_base_in_memory(layer: SparseLoraLinear) -> None:
    """Raise a ValueError if accelerate has offloaded the base weight, which the merged one is made of."""
    base = layer.get_base_layer()
    weight = base._parameters.get("weight")
    if weight is not None and weight.is_meta:
        raise ValueError(
            "accelerate has offloaded the weights of the base, which masked and quantisation-aware adapters need to merge. Load the "
            "base without 'cpu' or 'disk' offloading, or merge from folder to folder with `peft_elastic.merge_folder`."
        )


def check_target(layer: nn.Module, name: str, config: SparseQALoraConfig) -> None:
    """Raise a ValueError if an adapter of `config` could not be put on this layer."""
    if not (config.sparse_adapter or config.quantization_aware):
        return
    backend = find_linear_backend(layer)
    if backend is None or backend.obstacle("mask"):
        packed = ", ".join(each.name for each in BACKENDS if each.packed and not each.obstacle("mask"))
        raise ValueError(
            f"{name!r} is of type {type(layer).__name__}; `sparse_adapter` and `quantization_aware` work on linear layers, "
            f"Conv1D and their quantised forms in {packed} and peft_elastic. Leave it out of `target_modules`, or use "
            "`ElasticLoraConfig`."
        )
    check_parameters({name: layer})
    if not config.quantization_aware:
        return
    if obstacle := backend.obstacle("round"):
        raise ValueError(f"`quantization_aware`: {name!r} is quantised by {backend.name}, {obstacle}")
    grid = backend.grid(layer)
    if grid is not None:
        check_same_grid(grid, config, repr(name))
    else:
        if layer.get_parameter("weight").is_meta and not _LATER.get():
            raise ValueError(
                f"`quantization_aware`: the weight of {name!r} is not in memory, as when accelerate has offloaded it (device_map). Load "
                "the model without that."
            )
        group_size = 128 if config.group_size is None else config.group_size
        check_group_size(name, backend.weight(layer).shape[1], group_size)
