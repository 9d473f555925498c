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
"""The one rule about what may be given to the C++ extension.

It takes addresses, and torch knows nothing of such a call. So it is only for tensors that are nothing but memory (`is_plain`), and
only while torch need not see each operator (`is_watched`). Everything else goes through the operators of `layers.ops`, or is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes


# The dispatch keys of a tensor say all that is special about it: its device and layout, subclasses that dispatch, wrappers of
# transforms and functionalization, memory to be read as negated, conjugated or zero without being so. These are the plain ones,
# of ordinary tensors and of those of inference mode.
_dispatch_keys = torch._C._dispatch_keys
with _disable_current_modes(), torch.inference_mode(False):
    _PLAIN_KEYS = {_dispatch_keys(torch.empty(0, device="cpu")).raw_repr()}
    with torch.inference_mode():
        _PLAIN_KEYS.add(_dispatch_keys(torch.empty(0, device="cpu")).raw_repr())


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is ordinary strided memory of the CPU, no subclass. Says nothing of its type, shape and strides."""
    kind = type(tensor)
    return (kind is Tensor or kind is Parameter) and _dispatch_keys(tensor).raw_repr() in _PLAIN_KEYS


def is_watched() -> bool:
    """Whether torch records or changes what is computed, so that it must see each operator: it compiles, exports or traces, or a
    mode (fake tensors, counters), a transform of torch.func or forward-mode differentiation is active."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and not _only_default_devices())
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_special_mode() -> bool:
    """Whether torch watches or changes what is computed, gradients and autocast included."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or is_watched()


def _only_default_devices() -> bool:
    """Whether the modes for functions are but devices (`torch.set_default_device`, `with torch.device(...)`), on which nothing here
    depends: what C++ is to fill is made on the CPU by name."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def is_transformed() -> bool:
    """Whether derivatives other than those of `backward` are taken, or vmap is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def address(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> int:
    """Where the numbers of a tensor are, for C++.

    Raises:
        ValueError: naming `name`, unless it is plain, contiguous, and of this type and shape (None: any).
    """
    if (
        not is_plain(tensor)
        or tensor.dtype != dtype
        or (shape is not None and tensor.shape != shape)
        or not tensor.is_contiguous()
    ):
        wanted = "any shape" if shape is None else f"shape {shape}"
        raise ValueError(
            f"`{name}` must be a plain, contiguous CPU tensor of {dtype} and {wanted}, got a {type(tensor).__name__} of "
            f"{getattr(tensor, 'dtype', None)} {tuple(getattr(tensor, 'shape', ()))} on {getattr(tensor, 'device', None)} with "
            f"strides {tensor.stride() if isinstance(tensor, Tensor) and tensor.layout == torch.strided else None}."
        )
    return tensor.data_ptr()
