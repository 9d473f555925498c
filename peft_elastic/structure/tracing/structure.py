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
"""What can be narrowed, cropped and skipped in a convolutional model: found by tracing, proved by numbers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import fx, nn

from ...common.names import has_suffix
from ...common.tables import text_table
from ...layers.batch_norm import BATCH_NORMS, check_narrowable_norm, set_norm_narrowed
from ...layers.convolutional import (
    CONVOLUTIONS,
    TRANSPOSED,
    kernel_problem,
    layer_mixin,
    set_active_channels,
    set_active_tensor,
    set_kernel,
)
from ...layers.narrowed import Ranges, change_class
from ...supernet.space import Choice, choice_key
from ..modules import module_at
from ..narrow import _skipped_class, is_skipped
from .graph import Graph, shape_of
from .groups import Runs, groups_of, length_of, ranges_of
from .propagation import _ELEMENTWISE, Call, Propagation, _name


# Fractions of channels are rounded to this many, of layers that have more.
_MULTIPLE = 8
_ADDITIONS = frozenset(("add", "sub"))


@dataclass(frozen=True)
class Channels:
    """Channels that are narrowed together.

    Args:
        name (`str`): path of the layer that makes them first.
        full (`int`): how many that layer makes.
        units (`int`): in how many pieces of equal length they move.
        number (`int`): of the group.
        mixed (`bool`): whether a norm or another operator computes with all of them together.
        layers (`tuple[str, ...]`): paths of all modules that are narrowed along.
        fixed (`str`, *optional*): why they cannot be narrowed; None if they can.
        summed (`bool`): whether it does so by a sum or a softmax, whose result copies of the channels change.
    """

    name: str
    full: int
    units: int
    number: int
    mixed: bool
    layers: tuple[str, ...]
    fixed: Optional[str] = None
    summed: bool = False

    @property
    def key(self) -> str:
        """Of its choice in a subnet."""
        return choice_key("channels", self.name)

    @property
    def unit(self) -> int:
        """Channels of a unit."""
        return self.full // self.units


@dataclass(frozen=True)
class ResidualBlock:
    """A module that adds something to its input, and may be skipped.

    Args:
        path (`str`): of the module.
        stack (`str`): of the module around it.
    """

    path: str
    stack: str


@dataclass(eq=False)
class TracedStructure:
    """What can be narrowed, cropped and skipped in a model; it knows paths alone, and no tensors.

    Args:
        channels (`list[Channels]`): all groups of channels, also those that are fixed, in the order of the model.
        sides (`dict`): (path of a module, name of its tensor or "", dimension) -> runs.
        kernels (`dict[str, tuple[int, ...]]`): path of each convolution with a kernel larger than one -> its kernel size.
        blocks (`list[ResidualBlock]`): what may be skipped.
        calls (`list[Call]`): the weighted layers at work, in order.
        norms (`list[str]`): paths of the BatchNorms, all of which know when the model is narrowed.
        reading (`frozenset`): the keys of the sides that are columns of a matrix, also of one that is no layer of torch.
        problems (`dict[str, str]`): path of a kernel or block -> why it is fixed.
        active (`dict[str, int]`): values of the choices that the model computes with, as far as they are not whole.
    """

    channels: list[Channels]
    sides: dict[tuple[str, str, int], Runs]
    kernels: dict[str, tuple[int, ...]]
    blocks: list[ResidualBlock]
    calls: list[Call]
    norms: list[str]
    reading: frozenset[tuple[str, str, int]] = frozenset()
    problems: dict[str, str] = field(default_factory=dict)
    active: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, model: nn.Module, inputs: Any) -> TracedStructure:
        """Find the structure of a model, untried.

        Args:
            model (`nn.Module`): a plain one.
            inputs: of a call.

        Raises:
            ValueError: if the model cannot be traced, or has a BatchNorm that cannot be narrowed.
        """
        graph = Graph(model, inputs)
        found = Propagation(graph)
        _check_layers(model, found)
        by_group: dict[int, list[str]] = {}
        for (path, _, _), runs in found.sides.items():
            for group in groups_of(runs):
                by_group.setdefault(group.number, []).append(path)
        channels = [
            Channels(
                group.name,
                group.full,
                group.units,
                group.number,
                group.mixed,
                tuple(dict.fromkeys(by_group.get(group.number, ()))),
                group.fixed or ("it is a single piece" if group.units < 2 else None),
                group.summed,
            )
            for group in found.groups.roots
        ]
        kernels: dict[str, tuple[int, ...]] = {}
        for call in found.calls:
            size = getattr(model.get_submodule(call.path), "kernel_size", ())
            if (
                call.op.startswith("conv")
                and "transpose" not in call.op
                and isinstance(size, tuple)
                and max(size, default=1) > 1
            ):
                kernels[call.path] = size
        norms = [path for path, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        for path in norms:  # one that is narrowed nowhere has the statistics of the whole model all the same
            check_narrowable_norm(path, model.get_submodule(path))
        structure = cls(
            channels, dict(found.sides), kernels, _blocks(graph, found), found.calls, norms, frozenset(found.reading)
        )
        structure._fix_tied(model)
        return structure

    def _fix_tied(self, model: nn.Module) -> None:
        """Fix what has a parameter that is another module's too: cut at one place, it would be two."""
        owners: dict[int, list[str]] = {}
        for path, module in model.named_modules():
            for parameter in dict.fromkeys(p for p in module._parameters.values() if p is not None):
                owners.setdefault(id(parameter), []).append(path)
        tied = {path: paths for paths in owners.values() if len(paths) > 1 for path in paths}

        def reason(path: str) -> str:
            other = next(other for other in tied[path] if other != path)
            return f"a parameter of {path!r} is one of {other!r} too"

        for path in tied:
            self.fix({c.number for c in self.channels if path in c.layers}, reason(path))
            if path in self.kernels:
                self.problems[path] = reason(path)
        for block in self.blocks:
            inside = [path for path in tied if f"{path}.".startswith(f"{block.path}.")]
            if inside:
                self.problems[block.path] = reason(inside[0])
        self.blocks = [block for block in self.blocks if block.path not in self.problems]

    # -- what may be chosen ------------------------------------------------------------------------------------------

    @property
    def elastic(self) -> list[Channels]:
        """The channels that can be narrowed."""
        return [channels for channels in self.channels if channels.fixed is None]

    @property
    def widths(self) -> list[Channels]:
        """The channels that can be narrowed, by the name that structures of blocks have for them."""
        return self.elastic

    @property
    def fixed(self) -> dict[str, str]:
        """What cannot be narrowed, cropped or skipped, by the key that its choice would have -> why."""
        fixed = {channels.key: channels.fixed for channels in self.channels if channels.fixed is not None}
        for path, reason in self.problems.items():
            fixed[choice_key("kernel" if path in self.kernels else "depth", path)] = reason
        return fixed

    def fix(self, numbers: Iterable[int], reason: str) -> None:
        """Note that these groups cannot be narrowed."""
        gone = set(numbers)
        self.channels = [
            dataclasses.replace(c, fixed=c.fixed or reason) if c.number in gone else c for c in self.channels
        ]

    def choices(
        self,
        model: nn.Module,
        channels: Sequence[int | float] | Mapping[str, Sequence[int | float]] | None,
        kernel: Sequence[int] | Mapping[str, Sequence[int]] | None,
        depth: Sequence[int | str],
    ) -> list[Choice]:
        """The choices that a configuration asks for: kinds "channels", "kernel" and "depth".

        Raises:
            ValueError: if the model has no such channels, kernels or blocks, or does not allow such options.
        """
        made: list[Choice] = []
        for group, options in self._of_channels(channels):
            made.append(Choice("channels", group.name, _channel_options(group, options), group.layers))
        for path, sizes in self._of_kernels(model, kernel):
            made.append(Choice("kernel", path, sizes, (path,)))
        for block in self._of_blocks(depth):
            made.append(Choice("depth", block.path, (1, 0), (block.path,)))
        made = [choice for choice in made if len(choice.options) > 1]
        if not made:
            raise ValueError(
                "`config` leaves nothing elastic: no channels, kernels or blocks of the model can take more than one of the options.\n"
                + self.report()
            )
        return made

    def _of_channels(self, options: Any) -> list[tuple[Channels, Sequence[int | float]]]:
        if options is None:
            return []
        names = [group.name for group in self.elastic]
        if not isinstance(options, Mapping):
            if not names:
                raise ValueError(
                    f"`elastic_width['channels']`: no channels of the model can be narrowed.\n{self.report()}"
                )
            return [(group, options) for group in self.elastic]
        found: dict[str, Sequence[int | float]] = {}
        for name, values in options.items():
            meant = _named(name, names)
            fixed = [c for c in self.channels if c.fixed is not None and has_suffix(c.name, name)]
            if len(meant) != 1:
                why = f", which cannot be narrowed: {fixed[0].fixed}" if fixed and not meant else ""
                raise ValueError(
                    f"`elastic_width['channels']` has {name!r}{why or f', which names {len(meant)} groups of channels'}; there are {_shown(names)}."
                )
            found[meant[0]] = values
        return [(group, found[group.name]) for group in self.elastic if group.name in found]

    def _of_kernels(self, model: nn.Module, options: Any) -> list[tuple[str, tuple[int, ...]]]:
        if options is None:
            return []
        paths = list(self.kernels)
        asked: dict[str, Sequence[int]] = {}
        if isinstance(options, Mapping):
            for name, values in options.items():
                meant = _named(name, paths)
                if len(meant) != 1:
                    raise ValueError(
                        f"`elastic_kernel` has {name!r}, which names {len(meant)} convolutions with a kernel; there are {_shown(paths)}."
                    )
                asked[meant[0]] = values
        else:
            asked = dict.fromkeys(paths, options)
        made = []
        for path, values in asked.items():
            whole = max(self.kernels[path])
            sizes = [whole]
            for size in sorted({*values}, reverse=True):
                if size > whole and isinstance(options, Mapping):
                    raise ValueError(
                        f"`elastic_kernel` has {size} for {path!r}, whose kernel is {self.kernels[path]}."
                    )
                if size >= whole:
                    continue
                problem = self.problems.get(path) or kernel_problem(module_at(model, path), size)
                if problem is None:
                    sizes.append(size)
                elif isinstance(options, Mapping):
                    raise ValueError(f"`elastic_kernel` has {size} for {path!r}, which is not possible: {problem}.")
                elif len(sizes) == 1:  # of one that is elastic to a certain size nothing is wrong
                    self.problems.setdefault(path, problem)
            made.append((path, tuple(sizes)))
        if all(len(sizes) == 1 for _, sizes in made):
            raise ValueError(
                f"`elastic_kernel` has {list(options)}, and no convolution of the model can take a size below its own.\n{self.report()}"
            )
        return made

    def _of_blocks(self, entries: Sequence[int | str]) -> list[ResidualBlock]:
        found: dict[str, ResidualBlock] = {}
        paths = [block.path for block in self.blocks]
        for entry in entries:
            number = re.fullmatch(r"(\d+)(?:-(\d+))?", str(entry))
            if entry == "all":
                meant = list(paths)
            elif number:
                first, last = int(number[1]), int(number[2] or number[1])
                if not first <= last < len(paths):
                    raise ValueError(
                        f"`elastic_depth` has {entry!r}; the blocks that can be skipped are 0 to {len(paths) - 1}."
                    )
                meant = paths[first : last + 1]
            else:
                meant = _named(str(entry), paths)
                if len(meant) != 1:
                    why = next((f": {r}" for p, r in self.problems.items() if has_suffix(p, str(entry))), "")
                    raise ValueError(
                        f"`elastic_depth` has {entry!r}, which is no block that can be skipped{why}; those are {_shown(paths)}."
                    )
            if not meant:
                raise ValueError(f"`elastic_depth` has {entry!r}, and the model has no block that can be skipped.")
            found.update((block.path, block) for block in self.blocks if block.path in meant)
        return [block for block in self.blocks if block.path in found]

    def report(self) -> str:
        """A table of all channels, kernels and blocks: what is elastic, and why the others are not."""
        rows = [("channels", c.name, str(c.full), str(c.units), c.fixed or "elastic") for c in self.channels]
        rows += [
            ("kernel", path, " x ".join(map(str, size)), "", self.problems.get(path, "elastic"))
            for path, size in self.kernels.items()
        ]
        rows += [("block", block.path, "", "", "can be skipped") for block in self.blocks]
        rows += [("block", p, "", "", r) for p, r in self.problems.items() if p not in self.kernels]
        return "\n".join(text_table([("what", "where", "size", "pieces", ""), *rows], left={0, 1, 4}))

    # -- activation --------------------------------------------------------------------------------------------------

    def activate(self, model: nn.Module, values: Mapping[str, int]) -> None:
        """Let a model compute with these values of its choices, and with everything of what they do not name."""
        before = self.active
        changed = {key for key in before.keys() | values.keys() if before.get(key) != values.get(key)}
        if not changed:
            return
        self.active = dict.fromkeys([*before, *values], -1)  # nobody knows, if it is interrupted
        kept = {c.number: values.get(c.key, c.full) // c.unit for c in self.channels}
        moved = {c.number for c in self.channels if c.key in changed}
        narrowed = {key: value for key, value in values.items() if value != self._whole(key)}
        # a block may own tensors that are narrowed: its class is that of a narrowed one first, and of a skipped one then
        for block in self.blocks:
            set_block_skipped(model, block.path, False)
        touched = [key for key, runs in self.sides.items() if any(g.number in moved for g in groups_of(runs))]
        for path, name, dim in touched:
            module = module_at(model, path)
            if isinstance(module, BATCH_NORMS):
                continue  # `_tell_norms`
            if layer_mixin(module) is not None:
                runs = self.sides[path, name, dim]
                set_active_channels(module, side_of(module, name, dim), active_ranges_of(runs, kept))
            elif name:
                dims = {
                    d: active_ranges_of(runs, kept) for (p, n, d), runs in self.sides.items() if (p, n) == (path, name)
                }
                set_active_tensor(module, name, {d: ranges for d, ranges in dims.items() if ranges is not None})
        for path, size in self.kernels.items():
            if (key := choice_key("kernel", path)) in changed:
                value = values.get(key, max(size))
                set_kernel(module_at(model, path), None if value == max(size) else value)
        for block in self.blocks:
            set_block_skipped(model, block.path, not values.get(choice_key("depth", block.path), 1))
        self._tell_norms(model, kept, bool(narrowed))
        self.active = dict(values)

    def _tell_norms(self, model: nn.Module, kept: Mapping[int, int], narrowed: bool) -> None:
        """Every BatchNorm must know: the statistics that it keeps are those of the whole model."""
        norms = set(self.norms)
        runs_of = {path: runs for (path, _, dim), runs in self.sides.items() if dim == 0 and path in norms}
        for path in self.norms:
            ranges = None if path not in runs_of else active_ranges_of(runs_of[path], kept)
            set_norm_narrowed(module_at(model, path), ranges, not narrowed, path)

    def _whole(self, key: str) -> int:
        kind, _, name = key.partition(":")
        if kind == "depth":
            return 1
        if kind == "kernel":
            return max(self.kernels[name])
        return next(c.full for c in self.channels if c.name == name)


def active_ranges_of(runs: Runs, kept: Mapping[int, int]) -> Optional[Ranges]:
    """`ranges_of`, and None if that is everything."""
    ranges = ranges_of(runs, dict(kept))
    return None if ranges == ((0, length_of(runs)),) else ranges


def side_of(layer: nn.Module, name: str, dim: int) -> str:
    """Which side of a layer of torch a dimension of one of its tensors is, "out" or "in"."""
    if isinstance(layer, TRANSPOSED) and name == "weight":
        return "in" if dim == 0 else "out"
    return "out" if dim == 0 else "in"


def reads(layer: nn.Module, name: str, dim: int) -> bool:
    """Whether a dimension of a tensor is that of the columns that read channels."""
    if name != "weight" or not isinstance(layer, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
        return False
    return side_of(layer, name, dim) == "in"


def _pass_on(module: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def set_block_skipped(model: nn.Module, path: str, skipped: bool) -> None:
    """Let a residual block return its input, or compute it again."""
    module = module_at(model, path)
    if is_skipped(module) == skipped:
        return
    if skipped:
        module.__dict__["cache_layers"] = ()
        change_class(module, _skipped_class(type(module), _pass_on))  # type: ignore[arg-type]
    else:
        change_class(module, module.plain_class)  # type: ignore[arg-type]
        del module.__dict__["cache_layers"]


def _check_layers(model: nn.Module, found: Propagation) -> None:
    """Fix the channels of layers that cannot be narrowed."""
    for path, module in model.named_modules():
        weighted = isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))
        if weighted and module._parameters.get("weight") is None:
            raise ValueError(
                f"`model` has the layer {path!r} ({type(module).__name__}), whose weight is computed from other parameters, so that it can "
                "neither be narrowed nor counted: make it permanent (`torch.nn.utils.parametrize.remove_parametrizations`, `prune.remove`)."
            )
    for (path, name, dim), runs in found.sides.items():
        module = model.get_submodule(path)
        reason = None
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            reason = (
                None
                if type(module) in BATCH_NORMS
                else f"{path!r} is a {type(module).__name__}, which cannot be narrowed"
            )
        elif layer_mixin(module) is None and isinstance(module, nn.modules.batchnorm._NormBase):
            reason = f"{path!r} is a {type(module).__name__}, which cannot be narrowed"
        elif name and hasattr(module, "parametrizations"):
            reason = f"the {name} of {path!r} is computed from other parameters"
        elif ".parametrizations." in f".{path}.":
            reason = f"{path!r} is what another parameter is computed from"
        if reason is not None:
            found.groups.fix(runs, reason)


def _channel_options(group: Channels, options: Sequence[int | float]) -> tuple[int, ...]:
    """Numbers of channels, from the whole one down."""
    found = {group.full}
    whole = all(isinstance(option, int) for option in options)
    for option in options:
        if whole:
            if option > group.full or option % group.unit:
                raise ValueError(
                    f"`elastic_width['channels']` has {option}, but {group.name!r} has {group.full} channels"
                    + (f", which move in groups of {group.unit}." if group.unit > 1 else ".")
                )
            found.add(int(option))
            continue
        step = group.unit
        while group.full > _MULTIPLE and step % _MULTIPLE and step < group.full:
            step += group.unit
        step = step if step < group.full else group.unit
        value = group.full if option == 1 else max(step, round(option * group.full / step) * step)
        found.add(min(value, group.full))
    return tuple(sorted(found, reverse=True))


def _named(path: str, names: Sequence[str]) -> list[str]:
    return [path] if path in names else [name for name in names if has_suffix(name, path)]


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f", ... {names[-1]!r}" if len(names) > 3 else "")


# -- blocks ------------------------------------------------------------------------------------------------------------


def _blocks(graph: Graph, found: Propagation) -> list[ResidualBlock]:
    """Modules with one tensor in and one out, of the same shape and the same channels, that add something to their input."""
    inside: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for path in dict.fromkeys(graph.stack_of(node)[1:]):
                inside.setdefault(path, []).append(node)
    made = {call.path for call in found.calls if call.positions}
    good = []
    for path, nodes in inside.items():
        own = set(nodes)
        sources = {a for node in nodes for a in node.all_input_nodes if a not in own and a.name not in graph.tensors}
        results = {n for n in nodes if n.name in graph.outputs or any(user not in own for user in n.users)}
        if len(sources) != 1 or len(results) != 1 or not any(p.startswith(f"{path}.") for p in made):
            continue
        (source,), (result,) = sources, results
        if shape_of(source) != shape_of(result) or source not in found.values:
            continue
        if _same_runs(found.values[source].dims, found.values[result].dims) and _adds(source, result, own):
            good.append(path)
    return [
        ResidualBlock(path, path.rpartition(".")[0])
        for path in good
        if not any(other.startswith(f"{path}.") for other in good)
    ]


def _same_runs(first: Sequence[Optional[Runs]], second: Sequence[Optional[Runs]]) -> bool:
    def signature(runs: Optional[Runs]) -> Any:
        return None if runs is None else [(run.length, None if run.root is None else run.root.number) for run in runs]

    return [signature(runs) for runs in first] == [signature(runs) for runs in second]


def _adds(source: fx.Node, result: fx.Node, own: set[fx.Node]) -> bool:
    """Whether the input of a block reaches its output on a way of additions alone, and what does nothing to channels."""
    waiting: list[tuple[fx.Node, bool]] = [(result, False)]
    seen = set()
    while waiting:
        node, added = waiting.pop()
        if node is source:
            if added:
                return True
            continue
        if node not in own or (node, added) in seen:
            continue
        seen.add((node, added))
        name = _name(node)
        if name in _ADDITIONS:
            waiting += [(arg, True) for arg in node.args if isinstance(arg, fx.Node)]
        elif name in _ELEMENTWISE and node.args and isinstance(node.args[0], fx.Node):
            waiting.append((node.args[0], added))
    return False
