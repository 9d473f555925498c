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
"""The layers of a traced model, as a search space describes them for costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ...layers.convolutional import CONVOLUTIONS, TRANSPOSED, is_matrix_name
from ...supernet.space import Choice, LayerShape, Run
from .groups import Runs
from .structure import TracedStructure, side_of


def traced_shapes(model: nn.Module, structure: TracedStructure, choices: Sequence[Choice]) -> list[LayerShape]:
    """Every layer of a model with weights or parameters of its own that is computed with, also those that no choice changes."""
    keys = {choice.key for choice in choices}
    channels = {c.number: c for c in structure.channels if c.key in keys}
    depth = {choice.name: choice.key for choice in choices if choice.kind == "depth"}
    positions: dict[str, int] = {}
    for call in structure.calls:
        positions[call.path] = positions.get(call.path, 0) + call.positions

    def runs_of(runs: Runs | None) -> tuple[Run, ...]:
        made = []
        for run in runs or ():
            group = run.root
            of = None if group is None else channels.get(group.number)
            made.append(Run(run.length) if of is None else Run(run.length, of.key, of.full))
        return tuple(made) if any(run.choice is not None for run in made) else ()

    shapes = []
    for path, module in model.named_modules():
        own = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
            if not is_matrix_name(name)
        }
        inside = tuple(key for block, key in depth.items() if f"{path}.".startswith(f"{block}."))
        if not own:
            continue
        sides = {(name, dim): runs for (p, name, dim), runs in structure.sides.items() if p == path}
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
            shapes.append(_of_layer(path, module, sides, runs_of, inside, positions.get(path, 1), keys))
            continue
        for name, parameter in own.items():
            narrowed = [(dim, runs) for (n, dim), runs in sides.items() if n == name]
            runs = runs_of(narrowed[0][1]) if len(narrowed) == 1 else ()
            if runs or inside:
                outputs = sum(run.length for run in runs) if runs else 1
                shapes.append(
                    LayerShape(
                        f"{path}.{name}" if path else name,
                        outputs,
                        0,
                        out_runs=runs,
                        per_output=parameter.numel() // outputs,
                        depth=inside,
                    )
                )
    return shapes


def _of_layer(
    path: str,
    layer: Any,
    sides: Mapping[tuple[str, int], Runs],
    runs_of: Any,
    depth: tuple[str, ...],
    positions: int,
    keys: set[str],
) -> LayerShape:
    found = {side_of(layer, name, dim): runs for (name, dim), runs in sides.items() if name == "weight"}
    weight = layer._parameters["weight"]
    transposed = isinstance(layer, TRANSPOSED)
    groups = getattr(layer, "groups", 1)
    outputs, inputs = (weight.shape[1], weight.shape[0]) if transposed else tuple(weight.shape[:2])
    key = f"kernel:{path}"
    return LayerShape(
        path,
        int(outputs),
        int(inputs),
        bias=layer._parameters.get("bias") is not None,
        depth=depth,
        out_runs=runs_of(found.get("out")),
        in_runs=runs_of(found.get("in")) if groups == 1 else (),
        positions=positions,
        kernel=key if key in keys else None,
        kernel_size=tuple(weight.shape[2:]),
    )


