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
"""What structured pruning has decided, so that it can be looked at, kept, and carried out."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ...common.checks import wrong
from ...common.documents import ANYTHING, COUNT, INTEGER, NUMBER, TEXT, Document, ListOf, MapOf, Nullable, Record
from ...common.writing import atomic_write_text
from ...cost.counts import COST_NAMES
from ...structure.blocks import Structure
from ...structure.description import active_values, extract_described, is_left, plan_extraction
from ...structure.features import layer_at
from ...structure.importance import ORDER_SETTING, check_sortable, noted_orders, reorder
from ...structure.narrow import check_narrowable, is_narrowed
from ...structure.parts import Width
from ...structure.space import PARTS, activate
from ...supernet.space import choice_key


if TYPE_CHECKING:
    from matplotlib.figure import Figure


_ROW = Record(
    {
        "removed": TEXT,
        "cost": NUMBER,
        "parameters": NUMBER,
        "candidates": COUNT,
        "evaluations": COUNT,
        "block_passes": NUMBER,
        "seconds": NUMBER,
    },
    ANYTHING,
    stage=TEXT,
    left=COUNT,
    value=Nullable(NUMBER),
)
_DOCUMENT = Document(
    "pruning plan",
    "peft-elastic/pruning-plan",
    1,
    Record(
        {
            "metric": TEXT,
            "history": ListOf(_ROW),
            "evaluations": COUNT,
            "block_passes": NUMBER,
            "seconds": NUMBER,
        },
        method=TEXT,
        config=MapOf(ANYTHING),
        model=Record(**{"class": TEXT, "blocks": MapOf(MapOf(ANYTHING))}),
        values=MapOf(INTEGER),  # `check` says more of these two
        units=MapOf(ListOf(INTEGER)),
        before=MapOf(NUMBER),
        after=MapOf(NUMBER),
    ),
)


@dataclass
class PruningPlan:
    """
    What is removed from a model. `str(plan)` is a summary of it.

    Args:
        method (`str`): "multipruner", ...
        config (`dict[str, Any]`): the fields of the config.
        model (`dict[str, Any]`): `class`, and `blocks`: by its path the attention heads, key-value heads and MLP channels of each
            block of the whole model.
        values (`dict[str, int]`): what is left of it, in the words of a `Subnet`: `"mlp:<block>"` -> channels, `"heads:<block>"` ->
            query heads, `"depth:<block>"`, `"depth:<block>.attention"` and `"depth:<block>.mlp"` -> 0. What is not named is whole.
        units (`dict[str, list[int]]`): of what is narrowed, by the path of the attention (heads) or block (channels): the numbers
            that the units which are kept had in the model, key-value groups or channels, the most important first.
        before, after (`dict[str, float]`): `parameters`, `macs` (per token), and, where they were measured, the metric and what
            the ratio counts.
        metric (`str`): "perplexity", or the name of another metric.
        history (`list[dict]`): a row per removal: `stage`, `removed` (a key of `values`), `left`, `value` (of the metric, if it was
            evaluated), `cost` (what the ratio counts), `parameters`, `candidates`, `evaluations`, `block_passes` (of a single
            block over all calibration data), `seconds`.
        evaluations (`int`): of the metric.
        block_passes (`float`): of a single block over all calibration data.
        seconds (`float`): of all evaluations and of the measurement of importance, also those of an interrupted run before; with one
            thread in processor time, so that other processes on the machine count little.
    """

    method: str
    config: dict[str, Any]
    model: dict[str, Any] = field(repr=False)
    values: dict[str, int] = field(repr=False)
    units: dict[str, list[int]] = field(repr=False)
    before: dict[str, float]
    after: dict[str, float]
    metric: str = "perplexity"
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    evaluations: int = 0
    block_passes: float = 0.0
    seconds: float = 0.0

    # -- carrying it out ------------------------------------------------------------------------------------------------

    def narrow(self, model: nn.Module) -> None:
        """Let a model compute as if what the plan removes were not there, in place. Nothing of it is lost: `restore` undoes it.

        Args:
            model: the model the plan was made for, or a fine-tuned version of it; it must be whole, and without adapters.

        Raises:
            ValueError: if the plan does not fit the model. This, or an interrupt, leaves it as it was.
        """
        structure = self.check(model)
        if not self.values:
            return  # nor is a model that was sorted before brought into its original order
        with whole_on_error(model):
            reorder(model, self.orders(structure))
            activate(model, structure, self.values)

    def restore(self, model: nn.Module) -> None:
        """Undo `narrow`: the model is whole again, its heads and channels in their original order."""
        if not self.values:
            return
        structure = Structure(model)
        structure.active = active_values(model, structure)
        activate(model, structure, {})
        reorder(model, {})

    def extract(self, model: nn.Module) -> nn.Module:
        """Remove it for good, in place: what is left is a smaller ordinary model.

        Saved with `save_pretrained` it loads with `from_pretrained`: if all blocks are alike without this package, otherwise after
        `import peft_elastic`.

        Args:
            model: as in `narrow`.

        Returns:
            the same model.

        Raises:
            ValueError: if the plan does not fit the model, its weights are not in memory, or what is left could be saved and not
                loaded. This, or an interrupt, leaves the model as it was.
        """
        check_extractable(model)
        self.check(model)
        extractions = plan_extraction(model, self.values)
        with whole_on_error(model):
            self.narrow(model)
            if is_narrowed(model):
                extract_described(model, extractions)
        return model

    def orders(self, structure: Structure) -> dict[str, torch.Tensor]:
        """Which unit each unit is to be, so that those that are kept are the first: int64 (units,), by the name of an order."""
        orders = {}
        for width in structure.widths:
            for order in width.orders:
                if order.name in self.units:
                    kept = self.units[order.name]
                    orders[order.name] = torch.tensor(kept + sorted(set(range(width.units)) - set(kept)))
        return orders

    def check(self, model: nn.Module) -> Structure:
        """The structure of a model that the plan fits.

        Raises:
            ValueError: if it does not; the message says what differs.
        """
        check_whole(model)
        structure = Structure(model)
        described = describe_model(model, structure)["blocks"]
        if described != self.model["blocks"]:
            paths = [*described, *self.model["blocks"]]
            path = next(path for path in paths if described.get(path) != self.model["blocks"].get(path))
            raise ValueError(
                f"model: the plan is for a {self.model['class']} in which {path!r} is {self.model['blocks'].get(path)}; in this "
                f"{type(model).__name__} it is {described.get(path)}."
            )
        keys = {width.key: width for width in structure.widths}
        _check_values(self.values, structure)
        _check_units(self.units, {key: width for key, width in keys.items() if key in self.values}, self.values)
        narrowed = [width for key, width in keys.items() if key in self.values]
        moved = [width for width in narrowed if any(order.name in self.units for order in width.orders)]
        check_sortable(model, [width for width in moved if _is_out_of_order(model, width, self.units)])
        for width in narrowed:
            for slot in width.slots:
                check_here_to_narrow(layer_at(model, slot.path), slot.path)
        return structure

    # -- looking at it ------------------------------------------------------------------------------------------------

    @property
    def plain_block_passes(self) -> float:
        """Passes of a single block over all calibration data that the same removals take when every candidate of every step is
        evaluated by a pass of the whole model."""
        gone: set[str] = set()
        total = 0.0
        for row in self.history:
            whole = [
                path
                for path in self.model["blocks"]
                if choice_key("depth", path) not in gone
                and not {choice_key("depth", f"{path}.{part}") for part in PARTS} <= gone
            ]
            if row.get("evaluations"):
                total += row.get("candidates", 0) * len(whole)
            if row["left"] == 0 and "removed" in row:
                gone.add(row["removed"])
        return total

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.seconds:.0f} s, {self.evaluations:,} evaluations"]
        for name in dict.fromkeys([*self.before, *self.after]):
            before, after = self.before.get(name), self.after.get(name)
            if before is None or after is None:
                continue
            form = ",.0f" if name in COST_NAMES else ".4g"
            change = f" ({after / before - 1:+.1%})" if before > 0 else ""
            lines.append(f"  {name}: {before:{form}} -> {after:{form}}{change}")
        blocks = list(self.model["blocks"])
        for part, title in (("", "blocks"), (".attention", "attentions"), (".mlp", "MLPs")):
            gone = [
                number
                for number, path in enumerate(blocks)
                if self.values.get(choice_key("depth", f"{path}{part}")) == 0
                and (not part or self.values.get(choice_key("depth", path)) != 0)
            ]
            if gone:
                lines.append(f"  {title} removed: {', '.join(map(str, gone))}")
        for kind, title in (("mlp", "channels"), ("heads", "heads")):
            cut = [
                f"{number}: {self.values[choice_key(kind, path)]} of {sizes.get(kind, '?')}"
                for number, (path, sizes) in enumerate(self.model["blocks"].items())
                if choice_key(kind, path) in self.values
            ]
            if cut:
                lines.append(f"  {title} left: {'; '.join(cut)}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """The metric against the parameters, removal by removal; written to `path` if it is given.

        Raises:
            ValueError: if no removal was evaluated, or `path` has an unknown ending.
        """
        from .plot import draw  # with matplotlib, which few who prune need

        title = f"{self.method}, {self.config.get('ratio', 0):.0%} of {self.config.get('measure', 'parameters')}"
        return draw(title, self.history, self.before, self.metric, path)

    # -- on disk --------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """JSON text; the inverse of `from_json`."""
        return json.dumps(_DOCUMENT.wrap(asdict(self)), indent=1)

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Parse what `to_json` wrote.

        Raises:
            ValueError: if it is not a plan, or of a newer version.
        """
        return cls(**_DOCUMENT.parse(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_json()` to `path`, atomically."""
        atomic_write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a plan; the message names the file.
        """
        return cls(**_DOCUMENT.read(path))


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_list(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(check, value))


def _check_values(values: Mapping[str, int], structure: Structure) -> None:
    """ValueError unless these are values of structural choices of a model, which do not contradict each other."""
    widths = {width.key: width for width in structure.widths}
    parts = {block.depth_key(part): (block, part) for block in structure.blocks for part in block.skips}
    for key, value in values.items():
        if key in widths:
            width = widths[key]
            if type(value) is not int or not 0 < value <= width.full or value % width.unit:
                unit = f"multiples of {width.unit} from {width.unit}" if width.unit > 1 else "whole numbers from 1"
                raise wrong(f"values[{key!r}]", f"one of the {unit} to {width.full}", value)
        elif key not in parts:
            known = [*widths, *parts]
            near = [name for name in known if name.partition(":")[2] == str(key).partition(":")[2]] or known
            raise ValueError(f"values: {key!r} is no part of the model that can be removed; {near[0]!r}, say, is one.")
        elif type(value) is not int or value not in (0, 1):
            raise wrong(f"values[{key!r}]", "0 (removed) or 1", value)
    for block in structure.blocks:
        for kind, part in (("heads", "attention"), ("mlp", "mlp")):
            key = choice_key(kind, block.path)
            gone = [k for k in (block.depth_key(), block.depth_key(part)) if values.get(k) == 0]
            if gone and key in values and values[key] != widths[key].full:
                raise ValueError(f"values: {key!r} is {values[key]!r}, and {gone[0]!r} is 0, which removes all of it.")
    for stack in dict.fromkeys(block.stack for block in structure.blocks):
        others = any(path.rpartition(".")[0] == stack for path in structure.unknown)
        if not others and not any(is_left(block, values) for block in structure.blocks if block.stack == stack):
            raise ValueError(f"values: every block of {stack!r} is removed; at least one attention or MLP must stay.")


def _check_units(units: Mapping[str, list[int]], narrowed: Mapping[str, Width], values: Mapping[str, int]) -> None:
    """ValueError unless these are the numbers of the units that the values leave."""
    orders = {order.name: (key, width) for key, width in narrowed.items() for order in width.orders}
    for name, kept in units.items():
        if name not in orders:
            raise ValueError(f"units: {name!r} belongs to nothing that `values` narrows.")
        key, width = orders[name]
        count = values[key] // width.unit
        if not _is_list(kept, _is_whole) or len(set(kept)) != len(kept) or len(kept) > count:
            raise ValueError(
                f"units: {name!r} must have {count} different numbers, as {key!r} is {values[key]}; got {kept!r:.200}."
            )
        if len(kept) < count:
            warnings.warn(
                f"units: {name!r} has {len(kept)} numbers, and {key!r} is {values[key]}: the first of the others are kept as well."
            )
        if not all(0 <= number < width.units for number in kept):
            raise ValueError(f"units: {name!r} must have numbers from 0 to {width.units - 1}, got {kept!r:.200}.")


def keep_whole(model: nn.Module) -> Callable[[], None]:
    """What makes all of a whole model active again, with its units in the order that they have now."""
    orders = noted_orders(model)
    settings = getattr(getattr(model, "config", None), "__dict__", {})
    stored = settings.get(ORDER_SETTING)  # of a checkpoint that was saved in some order

    def put_back() -> None:
        structure = Structure(model)
        structure.active = active_values(model, structure)
        activate(model, structure, {})
        reorder(model, orders)
        if stored is not None:
            settings[ORDER_SETTING] = stored

    return put_back


@contextmanager
def whole_on_error(model: nn.Module) -> Iterator[None]:
    put_back = keep_whole(model)
    try:
        yield
    except BaseException:
        put_back()
        raise


def check_whole(model: nn.Module) -> None:
    """ValueError if a model has adapters, or a part of it is not active."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError("model: it has adapters; merge them (`merge_and_unload`), or prune the base model before.")
    if is_narrowed(model):
        raise ValueError("model: a part of it is not active; restore it, or extract what is.")


def check_extractable(model: nn.Module) -> None:
    """ValueError if accelerate has offloaded weights of a model, of which nothing can be cut away then."""
    for name, module in model.named_modules():
        if _is_offloaded(module):
            raise ValueError(
                f"model: accelerate keeps the weight of {name} on a disk or another device (device_map), so that nothing can be removed "
                "from it in place. Take `extract=False`, and carry the plan out from folder to folder: `extract_folder`."
            )


def check_here_to_narrow(layer: nn.Module, name: str) -> None:
    """ValueError if a layer cannot compute with a part of its features, as `check_narrowable`; or accelerate brings its weight in each
    pass, which is all of it."""
    check_narrowable(layer, name)
    if _is_offloaded(layer):
        raise ValueError(
            f"model: accelerate keeps the weight of {name} on a disk or another device (device_map), so that it cannot be narrowed. Load "
            "the model without that; or remove channels and heads by their scores from its folder: `plan_folder`, `extract_folder`."
        )


def _is_offloaded(module: nn.Module) -> bool:
    own = module._parameters.values()
    return hasattr(module, "_hf_hook") and any(parameter is not None and parameter.is_meta for parameter in own)


def describe_model(model: nn.Module, structure: Structure) -> dict[str, Any]:
    """What a plan says about the whole model."""
    blocks: dict[str, dict[str, Any]] = {block.path: {} for block in structure.blocks}
    for width in structure.widths:
        for block in structure.blocks:
            if width.name in (block.path, block.stack):
                blocks[block.path][width.kind] = width.full
                if width.kind == "heads":
                    blocks[block.path]["kv_heads"] = width.units
    for block in structure.blocks:
        if block.removed:
            blocks[block.path]["removed"] = sorted(block.removed)
    return {"class": type(model).__name__, "blocks": blocks}


def kept_units(model: nn.Module, structure: Structure, values: Mapping[str, int]) -> dict[str, list[int]]:
    """Which units of the original model are left, in the order that `model` is in now."""
    noted = noted_orders(model)
    kept = {}
    for width in structure.widths:
        value = values.get(width.key)
        if value is not None:
            for order in width.orders:
                now = noted.get(order.name, torch.arange(width.units))
                kept[order.name] = now[: value // width.unit].tolist()
    return kept


def _is_out_of_order(model: nn.Module, width: Width, units: Mapping[str, list[int]]) -> bool:
    noted = noted_orders(model)
    return any(
        noted[order.name].tolist()[: len(units[order.name])] != units[order.name]
        if order.name in noted
        else units[order.name] != list(range(len(units[order.name])))
        for order in width.orders
        if order.name in units
    )
