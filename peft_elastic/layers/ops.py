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
"""Tensors in, tensors out: the C++ kernels, and the operator that torch.compile and torch.export see."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from . import extension
from .addresses import address, is_plain, is_transformed, is_watched
from .groups import groups_in_order, order_of_groups


_C = extension._C
_VALUE_DTYPES = (torch.bfloat16, torch.int8)
FLOAT_DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
# What C++ calls them; empty without the extension.
_VALUE_TYPES: dict[torch.dtype, Any] = (
    {} if _C is None else {torch.bfloat16: _C.ValueType.bf16, torch.int8: _C.ValueType.int8}
)
_KINDS: dict[Any, tuple[str, bool]] = (  # of a value type: its name here, and whether it has a bitmask
    {}
    if _C is None
    else {kind: (name.removesuffix("_dense"), "_" not in name) for name, kind in _C.ValueType.__members__.items()}
)
FLOAT_TYPES: dict[torch.dtype, Any] = (
    {} if _C is None else {dtype: getattr(_C.FloatType, str(dtype).removeprefix("torch.")) for dtype in FLOAT_DTYPES}
)

# From this many rows on (measured: benchmarks/crossover.py, docs/performance.md) the weight is expanded and torch's dense
# multiplication is used.
DENSE_ROWS = 1024
_PANEL_BYTES = 32 * 2**20  # of the expanded weight


class PackedInfo(NamedTuple):
    """What the header of a packed weight says."""

    out_features: int
    in_features: int
    nnz: int
    dtype: str  # "bf16", "int8" or "int4"
    group_size: int = 0  # int4 only
    has_bitmask: bool = True  # all but dense int4
    has_order: bool = False  # int4 whose groups lie scattered over the inputs


def is_available() -> bool:
    """Whether the extension is built; then every processor can run at least the portable level."""
    return _C is not None


def level() -> str | None:
    """The instruction set that the kernels run on."""
    return extension.selected_level()


def _extension():
    if _C is None:
        raise ValueError(
            "The sparse kernels need the C++ extension, which is not there; `peft-elastic info` says how to get it."
        )
    return _C


def _new(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Memory for C++ to fill, on the CPU whatever the default device. torch aligns to 64 bytes, as the kernels need."""
    if torch._C._get_tracing_state() is not None:
        raise ValueError("torch.jit.trace cannot record how weights are packed and unpacked: do it before tracing.")
    # real memory, and no tracer takes it for empty: what is done here is done once, not recorded
    with _disable_current_modes():
        return torch.empty(shape, dtype=dtype, device="cpu")


def _check_matrix(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], dim: int) -> None:
    if tensor.dtype not in dtypes or tensor.dim() != dim or tensor.device.type != "cpu":
        raise ValueError(
            f"`{name}` must be a {dim}-dimensional CPU tensor of {' or '.join(map(str, dtypes))}, got "
            f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}."
        )


def pack(bitmask: Tensor, values: Tensor, in_features: int, kind: Optional[str] = None) -> Tensor:
    """The in-memory form of a sparse weight, tiled as the kernels read it (csrc/format.h).

    Args:
        bitmask: uint8 [out_features, ceil(in_features / 8)]; bit j of byte b of a row is column 8 b + j.
        values: bfloat16 or int8 [nnz], the nonzeros row by row; int8 in -127 .. 127.
        in_features: columns of the weight.
        kind: the type of the values as C++ calls it, whatever dtype they have; by default bf16 or int8.

    Returns:
        uint8 [bytes], with a header of its own.

    Raises:
        ValueError: if lengths, the population count, stray bits or values do not agree.
    """
    native = _extension()
    _check_matrix("bitmask", bitmask, (torch.uint8,), 2)
    _check_matrix("values", values, _VALUE_DTYPES if kind is None else (values.dtype,), 1)
    bitmask, values = bitmask.contiguous(), values.contiguous()
    source = native.Source(
        type=_VALUE_TYPES[values.dtype] if kind is None else getattr(native.ValueType, kind),
        out_features=bitmask.shape[0],
        in_features=in_features,
        bitmask=address("bitmask", bitmask, torch.uint8),
        bitmask_bytes=bitmask.numel(),
        values=address("values", values, values.dtype),
        value_bytes=values.numel() * values.element_size(),
    )
    packed = _new(native.packed_bytes(source))
    native.pack(source, packed.data_ptr(), packed.numel())
    return packed


def pack_dense(weight: Tensor) -> Tensor:
    """As `pack`, from a dense weight [out_features, in_features] of bfloat16, or int8 that is quantised already."""
    native = _extension()
    _check_matrix("weight", weight, _VALUE_DTYPES, 2)
    weight = weight.contiguous()
    dense = (_VALUE_TYPES[weight.dtype], address("weight", weight, weight.dtype), *weight.shape, weight.shape[1])
    nnz = native.count_nonzeros(*dense)
    packed = _new(native.packed_dense_bytes(dense[0], *weight.shape, nnz))
    native.pack_dense(*dense, packed.data_ptr(), packed.numel())
    return packed


def unpack(packed: Tensor, dtype: Optional[torch.dtype] = None) -> tuple[Tensor, Tensor]:
    """`(bitmask, values)`: the inverse of `pack`. ValueError if `packed` is damaged.

    Args:
        dtype: of the values; by default bfloat16 or int8.
    """
    info = describe(packed)
    bitmask = _new(info.out_features, (info.in_features + 7) // 8)
    values = _new(info.nnz, dtype=dtype or (torch.bfloat16 if info.dtype == "bf16" else torch.int8))
    _extension().unpack(packed.data_ptr(), packed.numel(), values=values.data_ptr(), bitmask=bitmask.data_ptr())
    return bitmask, values


def pack_int4(tensors: dict[str, Tensor], in_features: int, group_size: int) -> Tensor:
    """The in-memory form of an int4 weight, scales, zeros and the order of its inputs included.

    Args:
        tensors: as on disk (`layers/values/README.md`): `weight_values`, `weight_scales`, `weight_zeros`, `weight_bitmask` unless
            all values are stored, `weight_g_idx` if the inputs are not in the order of their groups.
        in_features, group_size: of the weight.

    Returns:
        uint8 [bytes], with a header of its own.

    Raises:
        ValueError: if lengths, the population count, stray bits, values or groups do not agree.
    """
    native = _extension()
    bitmask, g_idx = tensors.get("weight_bitmask"), tensors.get("weight_g_idx")
    values, zeros = tensors["weight_values"].contiguous(), tensors["weight_zeros"].contiguous()
    scales = tensors["weight_scales"].to(torch.float32).contiguous()
    _check_matrix("weight_values", values, (torch.uint8,), 1)
    _check_matrix("weight_scales", scales, (torch.float32,), 2)
    groups = -(-in_features // group_size) if in_features > 0 and group_size > 0 else 0
    _check_matrix("weight_zeros", zeros, (torch.uint8,), 2)
    if scales.shape[1] != groups or zeros.shape != scales.shape:
        raise ValueError(
            f"`weight_scales` {tuple(scales.shape)} and `weight_zeros` {tuple(zeros.shape)} must both be (out, {groups})."
        )
    if bitmask is not None:
        _check_matrix("weight_bitmask", bitmask, (torch.uint8,), 2)
        bitmask = bitmask.contiguous()
    order = None if g_idx is None else order_of_groups("`weight_g_idx`", g_idx, in_features, group_size)
    source = native.Source(
        type=native.ValueType.int4_dense if bitmask is None else native.ValueType.int4,
        out_features=scales.shape[0],
        in_features=in_features,
        group_size=group_size,
        bitmask=0 if bitmask is None else address("weight_bitmask", bitmask, torch.uint8),
        bitmask_bytes=0 if bitmask is None else bitmask.numel(),
        values=address("weight_values", values, torch.uint8),
        value_bytes=values.numel(),
        scales=address("weight_scales", scales, torch.float32),
        zeros=address("weight_zeros", zeros, torch.uint8),
        order=0 if order is None else address("weight_g_idx", order, torch.int32),
    )
    packed = _new(native.packed_bytes(source))
    native.pack(source, packed.data_ptr(), packed.numel())
    return packed


def unpack_int4(packed: Tensor) -> dict[str, Tensor]:
    """The inverse of `pack_int4`, scales as float32. ValueError if `packed` is damaged."""
    info = describe(packed)
    if info.dtype != "int4":
        raise ValueError(f"`packed` holds {info.dtype} values, not int4.")
    out_features, groups = info.out_features, -(-info.in_features // info.group_size)
    count = info.nnz if info.has_bitmask else out_features * info.in_features
    tensors = {
        "weight_values": _new((count + 1) // 2),
        "weight_scales": _new(out_features, groups, dtype=torch.float32),
        "weight_zeros": _new(out_features, groups),
    }
    if info.has_bitmask:
        tensors["weight_bitmask"] = _new(out_features, (info.in_features + 7) // 8)
    order = _new(info.in_features if info.has_order else 0, dtype=torch.int32)
    _extension().unpack(
        packed.data_ptr(),
        packed.numel(),
        **{name.removeprefix("weight_"): tensor.data_ptr() for name, tensor in tensors.items()},
        order=order.data_ptr() if info.has_order else 0,
    )
    if info.has_order:
        tensors["weight_g_idx"] = torch.empty_like(order)
        tensors["weight_g_idx"][order.long()] = groups_in_order(info.in_features, info.group_size)
    return tensors


def describe(packed: Tensor) -> PackedInfo:
    """What the header says; ValueError if it does not fit the length of the tensor."""
    _check_matrix("packed", packed, (torch.uint8,), 1)
    kind, out_features, in_features, nnz, group_size, has_order = _extension().describe(
        address("packed", packed, torch.uint8), packed.numel()
    )
    dtype, has_bitmask = _KINDS[kind]
    return PackedInfo(out_features, in_features, nnz, dtype, group_size, has_bitmask, has_order)


def to_dense(
    packed: Tensor, scales: Optional[Tensor], dtype: torch.dtype, first_row: int = 0, rows: int = -1
) -> Tensor:
    """Rows of the weight, dense: [rows, in_features] of `dtype` (float32, bfloat16 or float16); -1: all from `first_row`."""
    info = describe(packed)
    rows = info.out_features - first_row if rows < 0 else rows
    dense = _new(rows, info.in_features, dtype=dtype)
    _extension().dense_rows(
        packed.data_ptr(),
        packed.numel(),
        scales=0 if scales is None else address("scales", scales, torch.float32, (info.out_features,)),
        first_row=first_row,
        rows=rows,
        target=dense.data_ptr(),
        type=FLOAT_TYPES[dtype],
        threads=torch.get_num_threads(),
    )
    return dense


def linear(
    x: Tensor, packed: Tensor, scales: Optional[Tensor], bias: Optional[Tensor], out_features: int, in_features: int
) -> Tensor:
    """`sparse_linear` by the shortest way that there is: what layers call.

    Straight to the kernel where nothing but numbers is asked for, as the way through the operator takes longer than a small
    layer. Else the operator, which torch sees and differentiates; under forward-mode differentiation and the transforms of
    torch.func an ordinary product with the expanded weight, which these know everything about.

    Raises:
        ValueError: as `sparse_linear`.
    """
    if not is_watched():
        if not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
            y = _by_address(x, packed, scales, bias, out_features, in_features, "float")
            if y is not None:
                return y
        if x.dtype not in FLOAT_DTYPES or not x.is_cpu or not x.dim() or x.shape[-1] != in_features:
            raise ValueError(
                f"`x` must be float32, bfloat16 or float16 [..., {in_features}] on the CPU, got {x.dtype} {tuple(x.shape)} on "
                f"{x.device}."
            )
    elif is_transformed():
        expand = functools.partial(sparse_linear_weight, in_features=in_features)
        return _forward_dense(x, packed, scales, bias, out_features, in_features, expand)
    return sparse_linear(x, packed, scales, bias, out_features)


def forward(
    x: Tensor,
    packed: Tensor,
    scales: Optional[Tensor],
    bias: Optional[Tensor],
    out_features: int,
    activations: str = "float",
) -> Tensor:
    """The product itself, without gradients: what `sparse_linear` comes down to. ValueError on tensors that are not plain."""
    y = _by_address(x, packed, scales, bias, out_features, x.shape[-1], activations)
    if y is None:
        given = [tensor for tensor in (x, packed, scales, bias) if tensor is not None]
        raise ValueError(
            "`x`, `packed`, `scales` and `bias` must be plain CPU tensors, and all but `x` contiguous, got "
            f"{[(type(each).__name__, each.dtype, tuple(each.shape), str(each.device)) for each in given]}."
        )
    return y


def _by_address(
    x: Tensor,
    packed: Tensor,
    scales: Optional[Tensor],
    bias: Optional[Tensor],
    out_features: int,
    in_features: int,
    activations: str,
) -> Optional[Tensor]:
    """The product, or None if one of the tensors is not as C++ needs it. That sizes fit the packed weight, C++ sees to."""
    kind, shape = FLOAT_TYPES.get(x.dtype), x.shape
    if kind is None or not is_plain(x) or not shape or shape[-1] != in_features:
        return None
    # `packed` and `scales` are of our own making, never a view of something: what can have become of them since takes less to see
    if type(packed) is not Tensor or not packed.is_cpu or not packed.is_contiguous():
        return None
    scales_at, bias_at, bias_kind = 0, 0, kind
    if scales is not None:
        if type(scales) is not Tensor or not scales.is_cpu or not scales.is_contiguous():
            return None
        if scales.dtype != torch.float32 or scales.numel() != out_features:
            return None
        scales_at = scales.data_ptr()
    if bias is not None:
        bias_kind = FLOAT_TYPES.get(bias.dtype)
        if bias_kind is None or not is_plain(bias) or bias.numel() != out_features or not bias.is_contiguous():
            return None
        bias_at = bias.data_ptr()
    rows = x.numel() // in_features if in_features else 0
    if rows >= DENSE_ROWS and activations == "float":
        return _forward_dense(x, packed, scales, bias, out_features, in_features)
    y = x.new_empty((*shape[:-1], out_features))
    if rows == 0:
        return y
    stride = in_features
    if not x.is_contiguous():
        x = x.reshape(rows, in_features)
        if x.stride(1) != 1 and in_features > 1:
            x = x.contiguous()
        stride = x.stride(0) if rows > 1 else in_features
    _C.linear(  # type: ignore[union-attr]
        packed.data_ptr(),
        packed.numel(),
        x.data_ptr(),
        kind,
        rows,
        in_features,
        stride,
        scales_at,
        bias_at,
        bias_kind,
        y.data_ptr(),
        kind,
        out_features,
        torch.get_num_threads(),
        activations == "int8",
    )
    return y


def _forward_dense(
    x: Tensor,
    packed: Tensor,
    scales: Optional[Tensor],
    bias: Optional[Tensor],
    out_features: int,
    in_features: int,
    expand: Callable[..., Tensor] = to_dense,
) -> Tensor:
    panel = max(16, _PANEL_BYTES // (x.element_size() * in_features) // 16 * 16)
    bias = None if bias is None else bias.to(x.dtype)
    parts = []
    for first in range(0, out_features, panel):
        rows = min(panel, out_features - first)
        part_bias = None if bias is None else bias[first : first + rows]
        parts.append(torch.nn.functional.linear(x, expand(packed, scales, x.dtype, first, rows), part_bias))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@torch.library.custom_op("peft_elastic::sparse_linear", mutates_args=(), device_types="cpu")
def sparse_linear(
    x: Tensor,
    packed: Tensor,
    scales: Optional[Tensor],
    bias: Optional[Tensor],
    out_features: int,
    activations: str = "float",
) -> Tensor:
    """y = x W^T + b with a packed sparse W, accumulated in float32.

    Args:
        x: [..., in_features], float32, bfloat16 or float16, any strides.
        packed: what `pack` or `pack_int4` returned for W [out_features, in_features].
        scales: float32 [out_features] for int8 values, else None (those of int4 are packed).
        bias: [out_features] of any of the three types, or None.
        out_features: rows of W.
        activations: "float", or "int8" (int8 weights only): each row of x is rounded to int8, symmetric.

    Returns:
        [..., out_features] of the type of x. Differentiable, twice too, with respect to x and bias; W has no gradient.

    Raises:
        ValueError: if a type, a shape or the packed weight does not fit.
        NotImplementedError: on a dual tensor, whose tangent an operator cannot take along; `linear` can.
    """
    _extension()
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"`x` must be float32, bfloat16 or float16, got {x.dtype}.")
    packed = _ordinary(packed)
    info = describe(packed)
    if x.dim() == 0 or x.shape[-1] != info.in_features or out_features != info.out_features:
        raise ValueError(
            f"`x` of shape {tuple(x.shape)} and `out_features` {out_features} do not fit a packed weight of "
            f"{info.out_features} x {info.in_features}."
        )
    if activations not in ("float", "int8") or (activations == "int8" and info.dtype != "int8"):
        raise ValueError(f'`activations` must be "float", or "int8" with an int8 weight, got {activations!r}.')
    # whether scales go with these values, C++ says
    if scales is not None and (scales.dtype != torch.float32 or scales.shape != (out_features,)):
        raise ValueError(f"`scales` must be float32 [{out_features}], got {scales.dtype} {tuple(scales.shape)}.")
    if bias is not None and (bias.dtype not in FLOAT_DTYPES or bias.shape != (out_features,)):
        raise ValueError(f"`bias` must be a float tensor [{out_features}], got {bias.dtype} {tuple(bias.shape)}.")
    _refuse_tangents(x, bias)
    return forward(
        x.as_subclass(Tensor),
        packed,
        None if scales is None else _ordinary(scales),
        None if bias is None else _ordinary(bias),
        out_features,
        activations,
    )


def _ordinary(tensor: Tensor) -> Tensor:
    """A contiguous tensor without its Python class, which torch has done with where a kernel is called."""
    return tensor.as_subclass(Tensor).contiguous()


def _refuse_tangents(*tensors: Optional[Tensor]) -> None:
    # an operator written in Python is not told of them, and would drop them silently
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "torch.ops.peft_elastic.sparse_linear has no forward-mode derivative: call SparseLinear, which has one."
            )


@sparse_linear.register_fake
def _(x, packed, scales, bias, out_features, activations="float"):
    return x.new_empty((*x.shape[:-1], out_features))


@sparse_linear.register_vmap
def _(info, in_dims, x, packed, scales, bias, out_features, activations="float"):
    if any(dim is not None for dim in in_dims[1:3]):
        raise ValueError("`packed` and `scales` cannot be mapped over by torch.vmap.")
    if in_dims[0] is None:
        x = x.expand(info.batch_size, *x.shape)
    else:
        x = x.movedim(in_dims[0], 0)
    if in_dims[3] is None:
        return sparse_linear(x, packed, scales, bias, out_features, activations), 0
    bias = bias.movedim(in_dims[3], 0).to(x.dtype)
    bias = bias.view(len(bias), *([1] * (x.dim() - 2)), out_features)
    return sparse_linear(x, packed, scales, None, out_features, activations) + bias, 0


def _setup_context(ctx, inputs, output):
    x, packed, scales, bias, _, _ = inputs
    if packed.requires_grad or (scales is not None and scales.requires_grad):
        raise ValueError(
            "A packed sparse weight has no gradient. Train the dense layer (`.to_linear()`) or an adapter beside it."
        )
    ctx.save_for_backward(packed, *(() if scales is None else (scales,)))
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad):
    packed, *rest = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = sparse_linear_backward(grad, packed, rest[0] if rest else None, ctx.in_features)
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None


@torch.library.custom_op("peft_elastic::sparse_linear_backward", mutates_args=(), device_types="cpu")
def sparse_linear_backward(grad: Tensor, packed: Tensor, scales: Optional[Tensor], in_features: int) -> Tensor:
    """The gradient of `sparse_linear` with respect to x: grad W, [..., in_features]; panels of W are expanded in turn."""
    info = describe(packed)
    panel = max(16, _PANEL_BYTES // (grad.element_size() * in_features) // 16 * 16)
    result = torch.zeros((*grad.shape[:-1], in_features), dtype=torch.float32, device="cpu")
    for first in range(0, info.out_features, panel):
        rows = min(panel, info.out_features - first)
        result += grad[..., first : first + rows] @ to_dense(packed, scales, grad.dtype, first, rows)
    return result.to(grad.dtype)


@sparse_linear_backward.register_fake
def _(grad, packed, scales, in_features):
    return grad.new_empty((*grad.shape[:-1], in_features))


def _setup_second_context(ctx, inputs, output):
    grad, packed, scales, _ = inputs
    ctx.save_for_backward(packed, *(() if scales is None else (scales,)))
    ctx.out_features = grad.shape[-1]


def _second_backward(ctx, grad):
    packed, *rest = ctx.saved_tensors
    return sparse_linear(grad, packed, rest[0] if rest else None, None, ctx.out_features), None, None, None


sparse_linear.register_autograd(_backward, setup_context=_setup_context)
sparse_linear_backward.register_autograd(_second_backward, setup_context=_setup_second_context)


@torch.library.custom_op("peft_elastic::sparse_linear_weight", mutates_args=(), device_types="cpu")
def sparse_linear_weight(
    packed: Tensor, scales: Optional[Tensor], dtype: torch.dtype, first_row: int, rows: int, in_features: int
) -> Tensor:
    """`to_dense` as an operator, with the number of columns, which a fake weight does not tell."""
    return to_dense(_ordinary(packed), None if scales is None else _ordinary(scales), dtype, first_row, rows)


@sparse_linear_weight.register_fake
def _(packed, scales, dtype, first_row, rows, in_features):
    return packed.new_empty((rows, in_features), dtype=dtype)


def _share_threads_of_torch() -> None:
    """Lets the kernels run on the threads of the OpenMP runtime that torch has loaded.

    A second pool would fight with them for the processors: they spin for milliseconds after each parallel region.
    """
    maps = Path("/proc/self/maps")
    if _C is None or not maps.exists():
        return
    names = ("libgomp", "libiomp5", "libomp")
    files = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines() if "lib" in line}
    runtimes = sorted(file for file in files if Path(file).name.startswith(names))
    torch_folder = str(Path(torch.__file__).parent)
    mine = [file for file in runtimes if file.startswith(torch_folder)] or runtimes
    if len(mine) != 1:
        return  # not clear which one torch uses: the kernels keep a pool of their own
    try:
        library = ctypes.CDLL(mine[0])
        functions = [library.GOMP_parallel, library.omp_get_thread_num, library.omp_get_num_threads]
    except (OSError, AttributeError) as error:
        warnings.warn(f"peft-elastic cannot use the threads of {mine[0]} and starts its own: {error}")
        return
    _C.use_openmp(*(ctypes.cast(function, ctypes.c_void_p).value for function in functions))


_share_threads_of_torch()
