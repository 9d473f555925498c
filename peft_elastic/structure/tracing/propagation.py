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
"""Groups of channels, found by following each tensor of a graph from operator to operator.

Every dimension of every tensor carries the runs of channels that it consists of, or nothing. An operator that is not known here, or that
mixes channels in a way that cannot be written as runs, fixes the groups that it meets, with the reason. What is found is
tried by numbers afterwards (`proof.py`), so that a mistake in here makes a group fixed and not a model wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from .graph import Graph, is_tensor, shape_of
from .groups import Dims, Group, Groups, Run, Runs, length_of, scaled


# What computes each feature by itself, or changes nothing of the channels.
_ELEMENTWISE = frozenset(
    """abs alias alpha_dropout asin atan ceil celu clamp clamp_max clamp_min clone contiguous cos detach detach_ dropout elu erf exp
    feature_dropout floor gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu lift_fresh_copy log log1p logical_not mish neg
    reciprocal relu relu6 round rsqrt selu sigmoid sign silu sin softplus softshrink softsign sqrt square tanh to _to_copy
    nan_to_num threshold log_sigmoid rrelu type_as ones_like zeros_like native_dropout requires_grad_""".split()
)
# What computes from several tensors, feature by feature.
_BROADCAST = frozenset(
    "add sub mul div rsub maximum minimum where pow remainder fmod atan2 eq ne lt le gt ge addcmul addcdiv lerp "
    "logical_and logical_or bitwise_and bitwise_or".split()
)
# Of these a dimension of channels, each of them there several times, has what it has with each once.
_MEANS = frozenset("mean amax amin any all".split())
# What gives several tensors, each of them of the channels of its input.
_SEVERAL = frozenset(
    f"{kind}max_pool{n}d{ending}" for kind in ("", "adaptive_") for n in (1, 2, 3) for ending in ("", "_with_indices")
)
_REDUCTIONS = frozenset("mean sum amax amin var std prod norm linalg_vector_norm logsumexp any all".split())
# Of positions: name -> how many dimensions of positions there are at the end.
_SPATIAL = {
    f"{kind}{n}d{ending}": n
    for n in (1, 2, 3)
    for kind in (
        "max_pool",
        "avg_pool",
        "adaptive_avg_pool",
        "adaptive_max_pool",
        "lp_pool",
        "reflection_pad",
        "replication_pad",
        "upsample_nearest",
        "upsample_nearest_exact",
        "_upsample_nearest_exact",
    )
    for ending in ("", "_with_indices")
} | {"upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_linear1d": 1, "upsample_trilinear3d": 3}
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
# Runs that a dimension is made of when channels come last and positions are joined with them.
_MOST_RUNS = 1024


@dataclass(frozen=True)
class Call:
    """A weighted layer at work.

    Args:
        path (`str`): of the module.
        op (`str`): the operator: "conv2d", "linear", "batch_norm", ...
        node (`str`): of the graph.
        positions (`int`): outputs per sample of one channel.
        stride, dilation, padding: of a convolution, as the operator was given them.
        groups (`int`): of a convolution or GroupNorm.
    """

    path: str
    op: str
    node: str
    positions: int = 1
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: Any = ()
    groups: int = 1


@dataclass
class Value:
    """What is known of a tensor: its dimensions, and the parameter or buffer that it is, with the dimension there of each of its own."""

    dims: Dims
    tensor: tuple[str, str] | None = None
    tensor_dims: tuple[int | None, ...] = ()


class Propagation:
    """Groups, sides and calls of a graph.

    **Attributes**:
        - **groups** (`Groups`): of channels.
        - **sides** (`dict`): (path of a module, name of its tensor, dimension) -> runs.
        - **reading** (`set`): the keys of the sides that are columns of a matrix.
        - **calls** (`list[Call]`): of the weighted layers, in order.
        - **values** (`dict`): node -> `Value`.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.groups = Groups()
        self.sides: dict[tuple[str, str, int], Runs] = {}
        self.reading: set[tuple[str, str, int]] = set()
        self.calls: list[Call] = []
        self.values: dict[fx.Node, Value] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                found = graph.tensor_of(node, node)
                shape = shape_of(node)
                self.values[node] = Value((None,) * len(shape), found, tuple(range(len(shape))) if found else ())
            elif node.op == "call_function":
                self._visit(node)
        for node in graph.nodes:
            if node.name in graph.outputs and node in self.values:
                for runs in self.values[node].dims:
                    self.groups.fix(runs, "it is an output of the model")

    # -- the walk ----------------------------------------------------------------------------------------------------

    def _visit(self, node: Any) -> None:
        name = _name(node)
        handler = _HANDLERS.get(name)
        if name in _CONVOLUTIONS:
            handler = Propagation._convolution
        elif name in _TRANSPOSED:
            handler = Propagation._transposed
        elif name in _SPATIAL:
            handler = Propagation._spatial
        elif name in _ELEMENTWISE:
            handler = Propagation._same
        elif name in _BROADCAST:
            handler = Propagation._broadcast
        elif name in _REDUCTIONS:
            handler = Propagation._reduce
        if not is_tensor(node) and not isinstance(node.meta.get("val"), (tuple, list)):
            return  # a number
        dims = None if handler is None else handler(self, node)
        if isinstance(dims, Value):
            self.values[node] = dims
            return
        if dims is None or (is_tensor(node) and len(dims) != len(shape_of(node))):
            for source in node.all_input_nodes:
                for runs in self._dims(source):
                    self.groups.fix(runs, f"{self._where(node)} is not known to keep channels apart")
            dims = (None,) * len(shape_of(node))
        # a dimension whose size is another than its runs' is none of theirs
        self.values[node] = Value(tuple(dims))

    def _dims(self, node: Any) -> Dims:
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        return () if value is None else value.dims

    def _where(self, node: Any) -> str:
        path = self.graph.path_of(node)
        return f"`{_name(node)}`" + (f" in {path!r}" if path else " in the model's own forward")

    def _side(self, tensor: tuple[str, str] | None, dim: int, runs: Runs, where: str) -> Runs:
        """Note what a dimension of a parameter consists of, which one layer that computes twice ties."""
        if tensor is None:
            self.groups.fix(runs, f"{where} computes with a weight that is no parameter of one layer")
            return runs
        key = (*tensor, dim)
        if key in self.sides:
            runs = self.groups.unify(self.sides[key], runs, where)
        self.sides[key] = runs
        return runs

    def _reading(self, tensor: tuple[str, str] | None, dim: int, runs: Runs, where: str) -> None:
        """`_side` of the columns that read channels, over which a layer sums."""
        self._side(tensor, dim, runs, where)
        if tensor is not None:
            self.reading.add((*tensor, dim))

    # -- weighted layers ---------------------------------------------------------------------------------------------

    def _convolution(self, node: Any) -> Dims | None:
        source, weight, bias, stride, padding, dilation, groups = _arguments(
            node,
            ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
            (None, None, None, 1, 0, 1, 1),
        )
        size = len(shape_of(weight)) - 2
        outputs, per_group = shape_of(weight)[:2]
        tensor = self.graph.source_of(weight, node)
        shape = shape_of(node)
        channel = len(shape) - size - 1
        where = self._where(node)
        dims = self._dims(source)
        runs = dims[channel] or (Run(per_group * groups),)
        if any(dims[channel + 1 :]):
            return None
        if self.graph.tensor_of(weight, node) is None:
            # a weight that is computed from the parameter, standardized over its inputs
            self.groups.mix(runs, summed=True)
        if groups == 1:
            self._reading(tensor, 1, runs, where)
            made: Runs = (Run(outputs, self._new(tensor, outputs, node)),)
        else:
            if tensor is not None:
                self.sides.setdefault((tensor[0], "", 1), runs)
            for run in runs:
                if run.length % per_group:
                    self.groups.fix(runs, f"{where} takes channels of several layers into one of its {groups} groups")
                    made = (Run(outputs),)
                    break
                if run.root is not None:
                    self.groups.coarsen(run.root, run.length // per_group)
            else:
                made = scaled(runs, outputs // groups, per_group)
        made = self._side(tensor, 0, made, where)
        if isinstance(bias, fx.Node):
            self._side(self.graph.source_of(bias, node), 0, made, where)
        if tensor is not None:
            spatial = (self._positions(shape, channel), _each(stride, size), _each(dilation, size), padding)
            self.calls.append(Call(tensor[0], _name(node), node.name, *spatial, groups))
        return (*dims[:channel], made, *(None,) * size)

    def _transposed(self, node: Any) -> Dims | None:
        source, weight, bias, groups = _arguments(
            node,
            ("input", "weight", "bias", "stride", "padding", "output_padding", "groups"),
            (None, None, None, 1, 0, 0, 1),
        )[:3] + (_argument(node, 6, "groups", 1),)
        if groups != 1:
            return None
        tensor, size = self.graph.source_of(weight, node), len(shape_of(weight)) - 2
        channel = len(shape_of(node)) - size - 1
        dims, where = self._dims(source), self._where(node)
        inputs, outputs = shape_of(weight)[:2]
        self._reading(tensor, 0, dims[channel] or (Run(inputs),), where)
        made = self._side(tensor, 1, (Run(outputs, self._new(tensor, outputs, node)),), where)
        if isinstance(bias, fx.Node):
            self._side(self.graph.source_of(bias, node), 0, made, where)
        if tensor is not None:
            # every input position is multiplied with the whole kernel
            positions = self._positions(shape_of(source), channel)
            self.calls.append(Call(tensor[0], _name(node), node.name, positions))
        return (*dims[:channel], made, *(None,) * size)

    def _linear(self, node: Any) -> Dims | None:
        source, weight, bias = _arguments(node, ("input", "weight", "bias"), (None, None, None))
        dims, where = self._dims(source), self._where(node)
        outputs, inputs = shape_of(weight)
        tensor = self.graph.source_of(weight, node)
        if self.graph.tensor_of(weight, node) is None:
            self.groups.mix(dims[-1], summed=True)
        self._reading(tensor, 1, dims[-1] or (Run(inputs),), where)
        made = self._side(tensor, 0, (Run(outputs, self._new(tensor, outputs, node)),), where)
        if isinstance(bias, fx.Node):
            self._side(self.graph.source_of(bias, node), 0, made, where)
        if tensor is not None:
            shape = shape_of(node)
            self.calls.append(Call(tensor[0], "linear", node.name, self._positions(shape, len(shape) - 1)))
        return (*dims[:-1], made)

    def _positions(self, shape: Sequence[int], channel: int) -> int:
        """How many vectors of channels a tensor has for each sample. Samples need not be its first dimension: MobileViT takes
        the patches of an image there."""
        inputs = (node for node in self.graph.nodes if node.op == "placeholder" and node.name in self.graph.inputs)
        samples = next((shape_of(node)[0] for node in inputs if shape_of(node)), 1) if channel else 1
        every = math.prod(shape) // max(1, shape[channel])
        return (
            every // samples if every % samples == 0 else math.prod(shape[1:channel]) * math.prod(shape[channel + 1 :])
        )

    def _new(self, tensor: tuple[str, str] | None, outputs: int, node: Any) -> Group:
        return self.groups.new(outputs, tensor[0] if tensor else self.graph.path_of(node))

    def _batch_norm(self, node: Any) -> Dims | None:
        dims = self._dims(node.args[0])
        runs = dims[1] if len(dims) > 1 else None
        self._channelwise(node, node.args[1:5], runs)
        return dims

    def _instance_norm(self, node: Any) -> Dims | None:
        return self._batch_norm(node)

    def _group_norm(self, node: Any) -> Dims | None:
        source, count, weight, bias = _arguments(
            node, ("input", "num_groups", "weight", "bias"), (None, 1, None, None)
        )
        dims = self._dims(source)
        runs = dims[1]
        if runs is not None and count > 1:
            per_group = length_of(runs) // count
            for run in runs:
                if run.length % per_group:
                    self.groups.fix(runs, f"{self._where(node)} normalizes channels of several layers together")
                elif run.root is not None:
                    self.groups.coarsen(run.root, run.length // per_group)
        elif runs is not None:
            self.groups.mix(runs)
        self._channelwise(node, (weight, bias), runs, count)
        return dims

    def _layer_norm(self, node: Any) -> Dims | None:
        source, shape, weight, bias = _arguments(
            node, ("input", "normalized_shape", "weight", "bias"), (None, (), None, None)
        )
        dims = self._dims(source)
        normalized = dims[len(dims) - len(shape) :]
        if len(shape) > 1 and any(normalized):
            return None
        self.groups.mix(normalized[-1])
        self._channelwise(node, (weight, bias), normalized[-1])
        return dims

    def _prelu(self, node: Any) -> Dims | None:
        dims = self._dims(node.args[0])
        if math.prod(shape_of(node.args[1])) > 1:
            self._channelwise(node, node.args[1:2], dims[1] if len(dims) > 1 else dims[-1])
        return dims

    def _channelwise(self, node: Any, tensors: Sequence[Any], runs: Runs | None, groups: int = 1) -> None:
        """Note that tensors have one number for each channel."""
        path = None
        for tensor in tensors:
            if isinstance(tensor, fx.Node):
                source = self.graph.source_of(tensor, node)
                if source is not None:
                    path = source[0]
                if runs is not None:
                    self._side(source, 0, runs, self._where(node))
        path = self.graph.path_of(node) if path is None else path
        self.calls.append(Call(path, _name(node), node.name, groups=groups))
        if runs is not None and path is not None:
            # the layer must know how many channels there are, also where it has no parameters
            self.sides.setdefault((path, "", 0), runs)

    # -- the rest ----------------------------------------------------------------------------------------------------

    def _same(self, node: Any) -> Dims | Value | None:
        source = node.args[0] if node.args else None
        value = self.values.get(source) if isinstance(source, fx.Node) else None
        return None if value is None else Value(value.dims, value.tensor, value.tensor_dims)

    def _getitem(self, node: Any) -> Dims | None:
        """One of the tensors that an operator gives."""
        source, which = node.args
        name = _name(source) if isinstance(source, fx.Node) else ""
        if name in _SEVERAL:  # the values, and where they were
            return self._dims(source)
        if which == 0 and name in ("batch_norm", "native_dropout"):
            return self._dims(source)
        if _HANDLERS.get(name) is Propagation._split:
            return self._dims(source)
        # the operator has been found unknown itself
        return (None,) * len(shape_of(node))

    def _split(self, node: Any) -> Dims | None:
        """Pieces along a dimension, whose channels are fixed; the others go on."""
        dims = self._dims(node.args[0])
        dim = _argument(node, 2, "dim", 0) % len(dims)
        self.groups.fix(dims[dim], f"{self._where(node)} takes a part of it")
        return tuple(None if at == dim else runs for at, runs in enumerate(dims))

    def _spatial(self, node: Any) -> Dims | None:
        size = _SPATIAL[_name(node)]
        dims = self._dims(node.args[0])
        return None if any(dims[len(dims) - size :]) else dims

    def _broadcast(self, node: Any) -> Dims | None:
        shape = shape_of(node)
        operands = [arg for arg in (*node.args, *node.kwargs.values()) if is_tensor(arg)]
        where = self._where(node)
        made: list[Runs | None] = []
        for dim in range(len(shape)):
            found: list[Runs] = []
            others: list[tuple[fx.Node, int]] = []
            for operand in operands:
                size = shape_of(operand)
                at = dim - (len(shape) - len(size))
                if at < 0 or size[at] == 1 and shape[dim] != 1:
                    continue
                runs = self._dims(operand)[at] if self._dims(operand) else None
                if runs is not None:
                    found.append(runs)
                else:
                    others.append((operand, at))
            if not found:
                made.append(None)
                continue
            runs = found[0]
            for other in found[1:]:
                runs = self.groups.unify(runs, other, where)
            for operand, at in others:
                value = self.values[operand]
                dim_there = value.tensor_dims[at] if value.tensor is not None else None
                if value.tensor is not None and dim_there is not None:
                    runs = self._side(value.tensor, dim_there, runs, where)
                elif shape[dim] > 1:
                    self.groups.fix(runs, f"{where} meets a tensor whose channels are not known")
            made.append(runs)
        return tuple(made)

    def _reduce(self, node: Any) -> Dims | None:
        dims = self._dims(node.args[0])
        named = {"dim": 2 if _name(node) in ("norm", "linalg_vector_norm") else 1}
        which = node.kwargs.get("dim", node.args[named["dim"]] if len(node.args) > named["dim"] else None)
        which = range(len(dims)) if which in (None, []) else [which] if isinstance(which, int) else which
        gone = {dim % len(dims) for dim in which}
        for dim in gone:
            self.groups.mix(dims[dim], summed=_name(node) not in _MEANS)
        if len(shape_of(node)) == len(dims):  # keepdim
            return tuple(None if at in gone else runs for at, runs in enumerate(dims))
        return tuple(runs for at, runs in enumerate(dims) if at not in gone)

    def _softmax(self, node: Any) -> Dims | None:
        dims = self._dims(node.args[0])
        self.groups.mix(dims[_argument(node, 1, "dim", -1) % len(dims)], summed=True)
        return dims

    def _cat(self, node: Any) -> Dims | None:
        tensors = node.args[0]
        dim = _argument(node, 1, "dim", 0) % len(shape_of(node))
        where = self._where(node)
        joined: list[Runs | None] = []
        for at in range(len(shape_of(node))):
            sides = [self._dims(tensor)[at] for tensor in tensors]
            if at == dim:
                lengths = [shape_of(tensor)[at] for tensor in tensors]
                runs = tuple(
                    run for side, length in zip(sides, lengths) for run in (side or (Run(length),)) if run.length
                )
                joined.append(runs if any(side is not None for side in sides) else None)
                continue
            found = [side for side in sides if side is not None]
            runs_here: Runs | None = found[0] if found else None
            for side, tensor in zip(sides, tensors):
                if runs_here is None:
                    break
                if side is not None:
                    runs_here = self.groups.unify(runs_here, side, where)
                    continue
                value = self.values[tensor]
                dim_there = value.tensor_dims[at] if value.tensor is not None else None
                if value.tensor is not None and dim_there is not None:
                    runs_here = self._side(value.tensor, dim_there, runs_here, where)
                else:
                    self.groups.fix(runs_here, f"{where} meets a tensor whose channels are not known")
            joined.append(runs_here)
        return tuple(joined)

    def _pad(self, node: Any) -> Dims | None:
        dims = list(self._dims(node.args[0]))
        pads = list(node.args[1])
        for index in range(len(pads) // 2):
            before, after = pads[2 * index], pads[2 * index + 1]
            at = len(dims) - 1 - index
            runs = dims[at]
            if runs is not None and (before or after):
                if min(before, after) < 0:
                    return None
                dims[at] = tuple(run for run in (Run(before), *runs, Run(after)) if run.length)
        return tuple(dims)

    def _permute(self, node: Any) -> Value | None:
        order = node.args[1]
        return self._moved(node, [dim % len(order) for dim in order])

    def _transpose(self, node: Any) -> Value | None:
        order = list(range(len(shape_of(node))))
        first, second = (dim % len(order) for dim in node.args[1:3])
        order[first], order[second] = order[second], order[first]
        return self._moved(node, order)

    def _t(self, node: Any) -> Value | None:
        return self._moved(node, list(range(len(shape_of(node))))[::-1])

    def _moved(self, node: Any, order: Sequence[int]) -> Value | None:
        value = self.values.get(node.args[0])
        if value is None:
            return None
        there = tuple(value.tensor_dims[dim] for dim in order) if value.tensor else ()
        return Value(tuple(value.dims[dim] for dim in order), value.tensor, there)

    def _expand(self, node: Any) -> Value | None:
        value, shape = self.values.get(node.args[0]), shape_of(node)
        if value is None:
            return None
        more = len(shape) - len(value.dims)
        there = ((None,) * more + value.tensor_dims) if value.tensor else ()
        return Value((None,) * more + value.dims, value.tensor, there)

    def _view(self, node: Any) -> Value | Dims | None:
        value, old, new = self.values.get(node.args[0]), shape_of(node.args[0]), shape_of(node)
        if value is None:
            return None
        dims: list[Runs | None] = []
        there: list[int | None] = []
        simple = True
        for sources, targets in _aligned(old, new):
            many = [dim for dim in sources if old[dim] != 1]
            if len(many) <= 1 and sum(new[dim] != 1 for dim in targets) <= 1:
                # dimensions of size one come and go
                keep = many[0] if many else next((dim for dim in sources if value.dims[dim] is not None), None)
                at = next((dim for dim in targets if new[dim] != 1), targets[0] if targets else None)
                for dim in targets:
                    kept = dim == at and keep is not None
                    dims.append(value.dims[keep] if kept else None)  # type: ignore[index]
                    there.append(value.tensor_dims[keep] if kept and value.tensor else None)  # type: ignore[index]
                continue
            simple = False
            dims += self._regrouped(node, [value.dims[dim] for dim in sources], old, sources, new, targets)
        if value.tensor is not None and simple:
            return Value(tuple(dims), value.tensor, tuple(there))
        return tuple(dims)

    def _regrouped(
        self,
        node: Any,
        known: Sequence[Runs | None],
        old: Sequence[int],
        sources: Sequence[int],
        new: Sequence[int],
        targets: Sequence[int],
    ) -> list[Runs | None]:
        """Of dimensions that are joined to one, or of one that is cut into several."""
        nothing: list[Runs | None] = [None] * len(targets)
        if not any(known):
            return nothing
        sizes = [old[dim] for dim in sources]
        big = [at for at, dim in enumerate(targets) if new[dim] != 1]
        at = next(index for index, runs in enumerate(known) if runs is not None)
        runs = known[at]
        assert runs is not None
        if len(big) == 1 and sum(side is not None for side in known) == 1:
            before, behind = math.prod(sizes[:at]), math.prod(sizes[at + 1 :])
            if before * len(runs) <= _MOST_RUNS:
                joined = scaled(runs, behind) * before
                nothing[big[0]] = joined
                return nothing
        elif len([size for size in sizes if size != 1]) == 1 and len(runs) == 1 and runs[0].root is not None:
            # the pieces of the first of the new dimensions are units
            first = new[targets[big[0]]]
            self.groups.coarsen(runs[0].root, first)
            nothing[big[0]] = (Run(first, runs[0].root),)
            return nothing
        for side in known:
            self.groups.fix(side, f"{self._where(node)} puts channels together in another way")
        return nothing

    def _unsqueeze(self, node: Any) -> Value | None:
        value = self.values.get(node.args[0])
        if value is None:
            return None
        dim = node.args[1] % len(shape_of(node))
        there = (*value.tensor_dims[:dim], None, *value.tensor_dims[dim:]) if value.tensor else ()
        return Value((*value.dims[:dim], None, *value.dims[dim:]), value.tensor, there)

    def _slice(self, node: Any) -> Dims | Value | None:
        dims = self._dims(node.args[0])
        dim = _argument(node, 1, "dim", 0) % len(dims)
        if shape_of(node) == shape_of(node.args[0]):
            return self._same(node)
        self.groups.fix(dims[dim], f"{self._where(node)} takes a part of it")
        return tuple(None if at == dim else runs for at, runs in enumerate(dims))

    def _select(self, node: Any) -> Dims | None:
        dims = self._dims(node.args[0])
        dim = _argument(node, 1, "dim", 0) % len(dims)
        self.groups.fix(dims[dim], f"{self._where(node)} takes a part of it")
        return dims[:dim] + dims[dim + 1 :]

    def _matmul(self, node: Any) -> Dims | None:
        first, second = (self._dims(arg) for arg in node.args[:2])
        where = self._where(node)
        if len(first) < 2 or len(second) < 2:
            return None
        self.groups.fix(first[-1], f"{where} sums over it")
        self.groups.fix(second[-2], f"{where} sums over it")
        batch: list[Runs | None] = []
        length = len(shape_of(node)) - 2
        for at in range(length):
            sides = [dims[at - length - 2] for dims in (first, second) if len(dims) >= length + 2 - at]
            found = [side for side in sides if side is not None]
            runs = found[0] if found else None
            if len(found) == 2:
                runs = self.groups.unify(found[0], found[1], where)
            elif found and len(sides) == 2:
                self.groups.fix(runs, f"{where} meets a tensor whose channels are not known")
            batch.append(runs)
        return (*batch, first[-2], second[-1])

    def _pixel_shuffle(self, node: Any) -> Dims | None:
        dims, area = list(self._dims(node.args[0])), node.args[1] ** 2
        runs = dims[-3]
        if runs is not None:
            for run in runs:
                if run.length % area:
                    return None
                if run.root is not None:
                    self.groups.coarsen(run.root, run.length // area)
            dims[-3] = scaled(runs, 1, area)
        return tuple(dims)

    def _pixel_unshuffle(self, node: Any) -> Dims | None:
        dims = list(self._dims(node.args[0]))
        if dims[-3] is not None:
            dims[-3] = scaled(dims[-3], node.args[1] ** 2)
        return tuple(dims)


_HANDLERS: dict[str, Callable[[Propagation, Any], Any]] = {
    "getitem": Propagation._getitem,
    "chunk": Propagation._split,
    "split": Propagation._split,
    "split_with_sizes": Propagation._split,
    "tensor_split": Propagation._split,
    "linear": Propagation._linear,
    "batch_norm": Propagation._batch_norm,
    "instance_norm": Propagation._instance_norm,
    "group_norm": Propagation._group_norm,
    "layer_norm": Propagation._layer_norm,
    "rms_norm": Propagation._layer_norm,
    "prelu": Propagation._prelu,
    "softmax": Propagation._softmax,
    "log_softmax": Propagation._softmax,
    "cat": Propagation._cat,
    "concat": Propagation._cat,
    "pad": Propagation._pad,
    "constant_pad_nd": Propagation._pad,
    "permute": Propagation._permute,
    "transpose": Propagation._transpose,
    "t": Propagation._t,
    "expand": Propagation._expand,
    "expand_as": Propagation._expand,
    "flatten": Propagation._view,
    "unflatten": Propagation._view,
    "view": Propagation._view,
    "reshape": Propagation._view,
    "_unsafe_view": Propagation._view,
    "squeeze": Propagation._view,
    "reshape_as": Propagation._view,
    "view_as": Propagation._view,
    "unsqueeze": Propagation._unsqueeze,
    "slice": Propagation._slice,
    "select": Propagation._select,
    "matmul": Propagation._matmul,
    "bmm": Propagation._matmul,
    "pixel_shuffle": Propagation._pixel_shuffle,
    "pixel_unshuffle": Propagation._pixel_unshuffle,
}


def _name(node: Any) -> str:
    """Of the operator, without its overload, and without the underscore of what writes in place."""
    target: Any = node.target
    name = getattr(getattr(target, "overloadpacket", target), "__name__", str(target)).rpartition(".")[2]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def _argument(node: Any, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _arguments(node: Any, names: Sequence[str], defaults: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_argument(node, at, name, default) for at, (name, default) in enumerate(zip(names, defaults)))


def _each(value: Any, size: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * size if len(values) == 1 else values


def _aligned(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Which dimensions of a shape become which of another one that has as many elements: the smallest parts that correspond."""
    parts: list[tuple[list[int], list[int]]] = []
    first = second = 0
    while first < len(old) or second < len(new):
        sources, targets = [], []
        if first < len(old):
            sources.append(first)
            first += 1
        if second < len(new):
            targets.append(second)
            second += 1
        while math.prod(old[at] for at in sources) != math.prod(new[at] for at in targets):
            if math.prod(old[at] for at in sources) < math.prod(new[at] for at in targets) and first < len(old):
                sources.append(first)
                first += 1
            elif second < len(new):
                targets.append(second)
                second += 1
            else:
                sources += range(first, len(old))
                first = len(old)
                break
        parts.append((sources, targets))
    return parts
