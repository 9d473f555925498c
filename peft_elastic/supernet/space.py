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
"""The vocabulary of a super-network: a `Choice` is one elastic dimension, a `SearchSpace` is a list of choices, and a
`Subnet` gives each choice one value."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from ..common.checks import check_whole
from ..common.documents import ANYTHING, COUNT, FLAG, POSITIVE, TEXT, Document, ListOf, MapOf, Nullable, OneOf, Record
from ..common.tables import text_table
from ..common.writing import atomic_write_text


_SUBNET = Document("subnet", "peft-elastic/subnet", 1, Record(None, ANYTHING, values=MapOf(COUNT)))
_CHOICE = Record(
    None, ANYTHING, kind=TEXT, name=TEXT, options=ListOf(COUNT), modules=ListOf(TEXT), unit_parameters=COUNT
)
_RUN = Record(length=COUNT, choice=Nullable(TEXT), full=POSITIVE)
_LAYER = Record(
    # of layers of traced models
    {
        "out_runs": ListOf(_RUN),
        "in_runs": ListOf(_RUN),
        "positions": COUNT,
        "kernel": Nullable(TEXT),
        "kernel_size": ListOf(POSITIVE),
        "per_output": COUNT,
        "buffers": COUNT,
    },
    name=TEXT,
    out_features=COUNT,
    in_features=COUNT,
    bias=FLAG,
    width=Nullable(TEXT),
    full_width=POSITIVE,
    narrows=OneOf("out", "in"),
    rank=Nullable(TEXT),
    depth=ListOf(TEXT),
)
_SPACE = Document(
    "search space",
    "peft-elastic/search-space",
    1,
    Record({"layers": ListOf(_LAYER), "fixed": MapOf(TEXT)}, ANYTHING, choices=ListOf(_CHOICE)),
)


def choice_key(kind: str, name: str) -> str:
    """The key under which a `Subnet` holds the value of a choice: "rank:model.layers.0.self_attn.q_proj"."""
    return f"{kind}:{name}"


@dataclass(frozen=True)
class Choice:
    """One elastic dimension of a super-network.

    Args:
        kind (`str`):
            What the value means: `"rank"` (of the adapters of `modules`), `"heads"` (attention heads), `"mlp"` (MLP channels),
            `"channels"` (of a convolutional model), `"kernel"` (size of a convolution's) or `"depth"` (1: computed, 0: skipped).
        name (`str`):
            Where it applies, e.g. a module path or a transformer block with the module names it ties.
        options (`tuple[int, ...]`):
            The values it may take, sorted from large to small.
        modules (`tuple[str, ...]`):
            Paths, inside the base model, of the modules that take the value together.
        unit_parameters (`int`):
            Of a rank: adapter parameters that one unit of it stands for at full width, summed over `modules`.
    """

    kind: str
    name: str
    options: tuple[int, ...]
    modules: tuple[str, ...] = ()
    unit_parameters: int = 0

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError(f"`options` of choice {self.key!r} is empty, it needs at least one value.")
        if not all(_is_count(v) for v in self.options):
            raise ValueError(f"`options` of choice {self.key!r} must be non-negative integers, got {self.options}.")
        if list(self.options) != sorted(set(self.options), reverse=True):
            raise ValueError(f"`options` of choice {self.key!r} must fall strictly, got {self.options}.")
        for field, value in (("kind", self.kind), ("name", self.name), *(("modules", m) for m in self.modules)):
            if not isinstance(value, str):
                raise ValueError(f"`{field}` of choice {self.key!r} must be text, got {value!r}.")
        if not _is_count(self.unit_parameters):
            raise ValueError(
                f"`unit_parameters` of choice {self.key!r} must be a non-negative integer, got {self.unit_parameters}."
            )

    @property
    def key(self) -> str:
        """`"kind:name"`, the key under which a `Subnet` holds the value of this choice."""
        return choice_key(self.kind, self.name)


@dataclass(frozen=True)
class Run:
    """Features in a row on one side of a layer, of which a choice decides how many are active.

    Args:
        length (`int`): how many there are.
        choice (`str`, *optional*): key of the choice; None: they always are.
        full (`int`): the value of that choice at which all are active; `length * value // full` are.

    Raises:
        ValueError: if a number is no whole number, or `full` is below 1.
    """

    length: int
    choice: str | None = None
    full: int = 1

    def __post_init__(self) -> None:
        check_whole("length", self.length, least=0)
        check_whole("full", self.full, least=1)

    def active(self, subnet: Mapping[str, int]) -> int:
        """How many are active in a subnet."""
        return self.length if self.choice is None else self.length * subnet[self.choice] // self.full


@dataclass(frozen=True)
class LayerShape:
    """A linear layer or convolution whose size, or whose presence, depends on the subnet.

    Args:
        name (`str`): path inside the base model.
        out_features, in_features (`int`): of the whole layer.
        bias (`bool`): whether it has one. Other parameters that vanish with a block, its norms say, are the bias of a layer
            without inputs.
        width (`str`, *optional*): key of the choice that narrows the layer; `value / full_width` of it is active.
        full_width (`int`): the value of that choice at which the layer is whole.
        narrows (`"out"` or `"in"`): which of its two sides that is.
        rank (`str`, *optional*): key of the choice of the rank of its adapter.
        depth (`tuple[str, ...]`): keys of the choices that must all be 1 for the layer to be there.
        out_runs, in_runs (`tuple[Run, ...]`): what the sides of a layer of a traced model consist of, each of which other choices
            may narrow; empty for one that is fixed, or narrowed by `width`. The inputs of a convolution with groups are those of
            one group, a single one where it is depthwise.
        positions (`int`): how often the weight is applied in a sample: height * width of the output of a convolution, tokens of a
            linear layer, summed over calls; 0 for a layer that is not computed with. The layers of a traced model are all listed,
            those that nothing narrows too, for the sake of this number.
        kernel (`str`, *optional*): key of the choice of the kernel size; with value k each side of it is at most k.
        kernel_size (`tuple[int, ...]`): of the whole convolution; empty for a linear layer.
        per_output (`int`): parameters for each output beside the matrix and the bias: 1 for a norm with weight and bias.
        buffers (`int`): saved numbers for each output that are no parameters: 2 for a BatchNorm, its running mean and variance.

    Raises:
        ValueError: if the runs of a side do not add up to it or `width` narrows it too, there is a choice of the kernel without a
            kernel, or a number is no whole number from 0 (of a kernel: from 1) up.
    """

    name: str
    out_features: int
    in_features: int
    bias: bool = False
    width: str | None = None
    full_width: int = 1
    narrows: str = "out"
    rank: str | None = None
    depth: tuple[str, ...] = ()
    out_runs: tuple[Run, ...] = ()
    in_runs: tuple[Run, ...] = ()
    positions: int = 1
    kernel: str | None = None
    kernel_size: tuple[int, ...] = ()
    per_output: int = 0
    buffers: int = 0

    def __post_init__(self) -> None:
        for field in ("positions", "per_output", "buffers"):
            check_whole(f"{field} of layer {self.name!r}", getattr(self, field), least=0)
        for size in self.kernel_size:
            check_whole(f"kernel_size of layer {self.name!r}", size, least=1)
        if self.kernel is not None and not self.kernel_size:
            raise ValueError(
                f"`kernel` of layer {self.name!r} is {self.kernel!r}, but `kernel_size` is empty; it must be that of the whole."
            )
        for side, runs, features in (
            ("out", self.out_runs, self.out_features),
            ("in", self.in_runs, self.in_features),
        ):
            if runs and sum(run.length for run in runs) != features:
                raise ValueError(
                    f"`{side}_runs` of layer {self.name!r} must add up to its {features} features, got {runs}."
                )
            if runs and self.width is not None and self.narrows == side:
                raise ValueError(
                    f"`{side}_runs` of layer {self.name!r} must be empty where `width` narrows that side, got {runs}."
                )

    @cached_property
    def sides(self) -> tuple[tuple[Run, ...], tuple[Run, ...]]:
        """The outputs and the inputs, as runs whatever they are narrowed by."""
        sides = {"out": self.out_runs or (Run(self.out_features),), "in": self.in_runs or (Run(self.in_features),)}
        if self.width is not None:
            sides[self.narrows] = (Run(sides[self.narrows][0].length, self.width, self.full_width),)
        return sides["out"], sides["in"]

    def is_there(self, subnet: Mapping[str, int]) -> bool:
        """Whether the layer is computed in a subnet."""
        return all(subnet[key] for key in self.depth)

    def size(self, subnet: Mapping[str, int]) -> tuple[int, int]:
        """(out, in) features that are active in a subnet; (0, 0) where the layer is skipped."""
        if not self.is_there(subnet):
            return 0, 0
        outputs, inputs = self.sides
        return sum(run.active(subnet) for run in outputs), sum(run.active(subnet) for run in inputs)

    def area(self, subnet: Mapping[str, int]) -> int:
        """Elements of the kernel that are active, for each output and input; 1 of a linear layer."""
        if self.kernel is None:
            return math.prod(self.kernel_size)
        return math.prod(min(size, subnet[self.kernel]) for size in self.kernel_size)

    def parameters(self, subnet: Mapping[str, int]) -> int:
        """Active parameters of the layer itself."""
        out_features, in_features = self.size(subnet)
        return out_features * (in_features * self.area(subnet) + self.bias + self.per_output)

    @cached_property
    def whole_parameters(self) -> int:
        """Parameters of the whole layer."""
        return self.out_features * (self.in_features * math.prod(self.kernel_size) + self.bias + self.per_output)

    def macs(self, subnet: Mapping[str, int]) -> int:
        """Multiply-accumulates that are active, at all positions."""
        return math.prod(self.size(subnet)) * self.area(subnet) * self.positions

    @cached_property
    def whole_macs(self) -> int:
        """Multiply-accumulates of the whole layer, at all positions."""
        return self.out_features * self.in_features * math.prod(self.kernel_size) * self.positions

    def of_rank(self, subnet: Mapping[str, int]) -> int:
        """Active parameters of its adapter for one unit of the rank: a column of B and a row of A, whose kernel is the layer's."""
        out_features, in_features = self.size(subnet)
        return out_features + in_features * self.area(subnet)

    @cached_property
    def whole_of_rank(self) -> int:
        """`of_rank` of the whole layer."""
        return self.out_features + self.in_features * math.prod(self.kernel_size)

    @cached_property
    def whole_values(self) -> dict[str, int]:
        """Of each choice that narrows or skips the layer, the value with which it does not."""
        runs = {run.choice: run.full for side in self.sides for run in side if run.choice is not None}
        kernel = {} if self.kernel is None else {self.kernel: max(self.kernel_size)}
        return {**runs, **kernel, **dict.fromkeys(self.depth, 1)}

    @property
    def choices(self) -> tuple[str, ...]:
        """Keys of all choices it depends on."""
        runs = (run.choice for run in (*self.out_runs, *self.in_runs))
        keys = (self.width, self.rank, *self.depth, self.kernel, *runs)
        return tuple(dict.fromkeys(key for key in keys if key is not None))


class Subnet(Mapping[str, int]):
    """An immutable, hashable assignment of one value to each choice of a search space.

    It is a mapping from choice key (`"rank:model.layers.0.self_attn.q_proj"`) to value, and survives JSON:
    `Subnet.from_json(subnet.to_json()) == subnet`.

    Args:
        values (`Mapping[str, int]`): value per choice key.

    Raises:
        ValueError: if a key is not a string or a value is not a non-negative integer.
    """

    __slots__ = ("_hash", "_values")

    def __init__(self, values: Mapping[str, int]) -> None:
        checked: dict[str, int] = {}
        for key, value in values.items():
            if not isinstance(key, str):
                raise ValueError(f"A subnet's keys must be strings such as 'rank:<module>', got {key!r}.")
            if isinstance(value, np.integer):
                value = int(value)
            if not _is_count(value):
                raise ValueError(f"A subnet's values must be non-negative integers, got {value!r} for {key!r}.")
            checked[key] = value
        self._values = dict(sorted(checked.items()))
        self._hash = hash(tuple(self._values.items()))

    def __getitem__(self, key: str) -> int:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Subnet):
            return self._values == other._values
        if isinstance(other, Mapping):
            return self._values == dict(other)
        return NotImplemented

    def __reduce__(self) -> tuple[type[Subnet], tuple[dict[str, int]]]:
        return Subnet, (self._values,)

    def __repr__(self) -> str:
        shown = ", ".join(f"{k!r}: {v}" for k, v in itertools.islice(self._values.items(), 4))
        more = f", ... {len(self) - 4} more" if len(self) > 4 else ""
        return f"Subnet({{{shown}{more}}})"

    def to_dict(self) -> dict[str, int]:
        """A new plain dict, choice key -> value."""
        return dict(self._values)

    def to_json(self) -> str:
        """JSON text; the inverse of `from_json`."""
        return json.dumps(_SUBNET.wrap({"values": self._values}), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Subnet:
        """Parse what `to_json` wrote.

        Raises:
            ValueError: if the text is not JSON, not a subnet, or of a newer version.
        """
        return cls(_SUBNET.parse(text)["values"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json()` to `path`, atomically."""
        atomic_write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Subnet:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a subnet; the message names the file.
        """
        return cls(_SUBNET.read(path)["values"])


class SearchSpace:
    """The choices of a super-network, in a fixed order.

    `len(space)` is the number of choices and `space.size` the number of subnets.

    Args:
        choices (`Iterable[Choice]`): the elastic dimensions; their keys must differ.
        layers (`Iterable[LayerShape]`): the layers of the base model that width and depth change; of a traced model all layers.

    Raises:
        ValueError: if there are no choices, two share a key, or a layer depends on a choice that is not there.
    """

    def __init__(
        self, choices: Iterable[Choice], layers: Iterable[LayerShape] = (), fixed: Mapping[str, str] | None = None
    ) -> None:
        self.choices: tuple[Choice, ...] = tuple(choices)
        self.fixed: dict[str, str] = dict(fixed or {})
        self.layers: tuple[LayerShape, ...] = tuple(layers)
        if not self.choices:
            raise ValueError("`choices` is empty: a search space needs at least one choice.")
        self._by_key = {choice.key: choice for choice in self.choices}
        if len(self._by_key) != len(self.choices):
            keys = [choice.key for choice in self.choices]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise ValueError(f"`choices` holds several choices with the same key: {twice}.")
        unknown = sorted({key for layer in self.layers for key in layer.choices} - set(self._by_key))
        if unknown:
            raise ValueError(f"`layers` depend on {unknown}, which are not among the choices.")

    # -- the space as a collection ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.choices)

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices)

    def __getitem__(self, key: str) -> Choice:
        return self._by_key[key]

    def __contains__(self, subnet: object) -> bool:
        try:
            self.check(subnet)  # type: ignore[arg-type]
        except (ValueError, TypeError):
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SearchSpace) and (self.choices, self.layers) == (other.choices, other.layers)

    def __hash__(self) -> int:
        return hash(self.choices)

    def __repr__(self) -> str:
        size = f"{self.size:,}" if self.size < 10**9 else f"about 10^{int(math.log10(self.size))}"
        return f"SearchSpace({len(self)} choices, {size} subnets)"

    @property
    def size(self) -> int:
        """Number of different subnets (exact, an arbitrarily large `int`)."""
        return math.prod(len(choice.options) for choice in self.choices)

    def report(self) -> str:
        """A table of what is elastic, with its options, and of what was looked at and is not, with the reason."""
        rows = [(choice.kind, choice.name, ", ".join(map(str, choice.options))) for choice in self.choices]
        rows += [(*key.split(":", 1), f"fixed: {reason}") for key, reason in self.fixed.items()]  # type: ignore[misc]
        return "\n".join(text_table([("kind", "where", "options"), *rows], left=3))

    @property
    def fingerprint(self) -> str:
        """A short hexadecimal digest of keys and options; equal for equal spaces, in any process."""
        text = json.dumps([[choice.key, list(choice.options)] for choice in self.choices])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @cached_property
    def counted_per(self) -> str:
        """What multiply-accumulates are those of: "token"; or of a traced model, whose layers tell how often they are computed,
        "image", or "sample" where it has no convolution in two dimensions."""
        if any(len(layer.kernel_size) == 2 for layer in self.layers):
            return "image"
        traced = any(layer.out_runs or layer.in_runs or layer.kernel_size for layer in self.layers)
        traced |= any(layer.positions != 1 for layer in self.layers)
        return "sample" if traced or any(choice.kind in ("channels", "kernel") for choice in self.choices) else "token"

    # -- subnets ---------------------------------------------------------------------------------------------------

    @property
    def max(self) -> Subnet:
        """The largest option everywhere: the super-network itself."""
        return self.decode([0] * len(self))

    @property
    def min(self) -> Subnet:
        """The smallest option everywhere."""
        return self.decode([len(choice.options) - 1 for choice in self.choices])

    @property
    def heuristic(self) -> Subnet:
        """The middle option everywhere: element (n - 1) // 2 of the n options sorted from large to small (Shears,
        https://huggingface.co/papers/2404.10934)."""
        return self.decode([(len(choice.options) - 1) // 2 for choice in self.choices])

    def sample(self, seed: int | Sequence[int] | np.random.Generator) -> Subnet:
        """A subnet drawn uniformly, each choice independently.

        Args:
            seed (`int`, sequence of `int` or `numpy.random.Generator`):
                The same seed gives the same subnet in every process; a generator is advanced.
        """
        rng = np.random.default_rng(seed)
        return self.decode([int(rng.integers(len(choice.options))) for choice in self.choices])

    def subnet(self, subnet: Subnet | Mapping[str, int] | str) -> Subnet:
        """Turn what a user may write into a checked `Subnet` of this space.

        Args:
            subnet: a `Subnet`, a mapping with a value for every choice key, or `"max"`, `"min"`, `"heuristic"`.

        Raises:
            ValueError: if it does not belong to this space; the message names the choices and what they allow.
        """
        if isinstance(subnet, str):
            if subnet not in ("max", "min", "heuristic"):
                raise ValueError(f"`subnet` must be a Subnet, a dict, 'max', 'min' or 'heuristic', got {subnet!r}.")
            return getattr(self, subnet)
        if not isinstance(subnet, Mapping):
            raise ValueError(
                f"`subnet` must be a Subnet, a dict, 'max', 'min' or 'heuristic', got {type(subnet).__name__}."
            )
        checked = subnet if isinstance(subnet, Subnet) else Subnet(subnet)
        self.check(checked)
        return checked

    def check(self, subnet: Mapping[str, int]) -> None:
        """Raise a ValueError unless `subnet` gives every choice of this space, and nothing else, an allowed value."""
        missing = [key for key in self._by_key if key not in subnet]
        unknown = [key for key in subnet if key not in self._by_key]
        if missing or unknown:
            parts = []
            if missing:
                parts.append(f"no value for {_few(missing)}")
            if unknown:
                parts.append(f"unknown choices {_few(unknown)}")
            raise ValueError(f"`subnet` does not belong to this search space: {'; '.join(parts)}.")
        for choice in self.choices:
            value = subnet[choice.key]
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value not in choice.options:
                raise ValueError(f"`subnet[{choice.key!r}]` must be one of {list(choice.options)}, got {value!r}.")

    def encode(self, subnet: Mapping[str, int]) -> tuple[int, ...]:
        """Index of each choice's value among its options (0 is the largest), in the order of `choices`.

        Raises:
            ValueError: if the subnet does not belong to this space.
        """
        self.check(subnet)
        return tuple(choice.options.index(subnet[choice.key]) for choice in self.choices)

    def decode(self, indices: Sequence[int]) -> Subnet:
        """The inverse of `encode`.

        Raises:
            ValueError: if the number of indices or an index is out of range.
        """
        if len(indices) != len(self):
            raise ValueError(f"`indices` must hold {len(self)} numbers, one per choice, got {len(indices)}.")
        values = {}
        for choice, index in zip(self.choices, indices):
            if not isinstance(index, (int, np.integer)) or not 0 <= index < len(choice.options):
                raise ValueError(
                    f"`indices` must hold 0 to {len(choice.options) - 1} for {choice.key!r}, got {index!r}."
                )
            values[choice.key] = choice.options[int(index)]
        return Subnet(values)

    def subnets(self) -> Iterator[Subnet]:
        """All `size` subnets, the largest first."""
        for indices in itertools.product(*(range(len(choice.options)) for choice in self.choices)):
            yield self.decode(indices)

    def count_parameters(self, subnet: Mapping[str, int]) -> int:
        """Number of adapter parameters that are active in `subnet`."""
        total = sum(subnet[choice.key] * choice.unit_parameters for choice in self.choices)
        for layer in self.layers:
            if layer.rank is not None:  # what narrowing has taken from A and B
                total -= subnet[layer.rank] * (layer.whole_of_rank - layer.of_rank(subnet))
        return total

    def count_base_parameters(self, subnet: Mapping[str, int]) -> int:
        """Number of parameters of the base model that are active in `subnet`, of those in `layers`."""
        return sum(layer.parameters(subnet) for layer in self.layers)

    # -- JSON ------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """JSON text; the inverse of `from_json`."""
        choices = [
            {
                "kind": choice.kind,
                "name": choice.name,
                "options": list(choice.options),
                "modules": list(choice.modules),
                "unit_parameters": choice.unit_parameters,
            }
            for choice in self.choices
        ]
        layers = {"layers": [_row_of(layer) for layer in self.layers]} if self.layers else {}
        fixed = {"fixed": self.fixed} if self.fixed else {}
        return json.dumps(_SPACE.wrap({"choices": choices, **layers, **fixed}), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SearchSpace:
        """Parse what `to_json` wrote.

        Raises:
            ValueError: if the text is not JSON, not a search space, or of a newer version.
        """
        data = _SPACE.parse(text)
        choices = [
            Choice(
                kind=row["kind"],
                name=row["name"],
                options=tuple(row["options"]),
                modules=tuple(row["modules"]),
                unit_parameters=row["unit_parameters"],
            )
            for row in data["choices"]
        ]
        return cls(choices, [_layer_of(row) for row in data.get("layers", [])], data.get("fixed"))


_TRACED = ("out_runs", "in_runs", "positions", "kernel", "kernel_size", "per_output", "buffers")
_DEFAULTS = {field.name: field.default for field in fields(LayerShape)}


def _row_of(layer: LayerShape) -> dict[str, Any]:
    """For JSON, where what only layers of traced models have is left out of the others, as in files of before."""
    row = asdict(layer)
    return {
        name: value for name, value in row.items() if name not in _TRACED or getattr(layer, name) != _DEFAULTS[name]
    }


def _layer_of(row: Mapping[str, Any]) -> LayerShape:
    tuples = {name: tuple(row[name]) for name in ("depth", "kernel_size") if name in row}
    runs = {name: tuple(Run(**run) for run in row[name]) for name in ("out_runs", "in_runs") if name in row}
    return LayerShape(**{**row, **tuples, **runs})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _few(names: Sequence[str], limit: int = 4) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
