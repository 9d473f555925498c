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

import torch
from torch import nn

from ...layers.convolutional import CONVOLUTIONS, TRANSPOSED, is_matrix_name
from ...supernet.space import Choice, LayerShape, Run
from .groups import Runs
from .structure import TracedStructure, side_of


def traced_shapes(model: nn.Module, structure: TracedStructure, choices: Sequence[Choice]) -> list[LayerShape]:
    """Every layer of a model with a weight, also those that no choice changes, and what choices change of other parameters and
    buffers."""
    keys = {choice.key for choice in choices}
    channels = {c.number: c for c in structure.channels if c.key in keys}
    depth = {choice.name: choice.key for choice in choices if choice.kind == "depth"}
    positions: dict[str, int] = {}
    for call in structure.calls:
        if call.op != "linear" and not call.op.startswith("conv"):
            continue  # a norm, which a convolution may compute of its weight, as BiT's do
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
        own: dict[str, torch.Tensor] = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        own |= {
            name: buffer
            for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
            if name not in module._non_persistent_buffers_set
        }
        inside = tuple(key for block, key in depth.items() if f"{path}.".startswith(f"{block}."))
        sides = {(name, dim): runs for (p, name, dim), runs in structure.sides.items() if p == path}
        if isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
            # one that was not computed with counts parameters alone
            shapes.append(_of_layer(path, module, sides, runs_of, inside, positions.get(path, 0), keys))
            continue
        own = {name: tensor for name, tensor in own.items() if not is_matrix_name(name)}
        narrowed = {(name, dim): runs_of(runs) for (name, dim), runs in sides.items() if name in own}
        changed = inside or any(narrowed.values())
        for name, tensor in own.items():
            # of a module that changes, all tensors are listed
            if changed:
                each = {dim: runs for (n, dim), runs in narrowed.items() if n == name and runs}
                if len(each) == 2:  # a matrix or kernel of a module that is no layer of torch
                    (first, out_runs), (second, in_runs) = sorted(each.items())
                    rest = [size for dim, size in enumerate(tensor.shape) if dim not in (first, second)]
                    shapes.append(
                        LayerShape(
                            f"{path}.{name}" if path else name,
                            tensor.shape[first],
                            tensor.shape[second],
                            out_runs=out_runs,
                            in_runs=in_runs,
                            depth=inside,
                            positions=0,
                            kernel_size=tuple(rest),
                        )
                    )
                    continue
                runs = next(iter(each.values()), ())
                outputs = sum(run.length for run in runs) if runs else 1
                count = tensor.numel() // outputs
                of_parameters = isinstance(tensor, nn.Parameter)
                shapes.append(
                    LayerShape(
                        f"{path}.{name}" if path else name,
                        outputs,
                        0,
                        out_runs=runs,
                        per_output=count if of_parameters else 0,
                        buffers=0 if of_parameters else count,
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
