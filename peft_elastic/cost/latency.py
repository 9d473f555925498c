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
"""The latency of a deployed subnet on this machine, predicted from measurements of its parts."""

from __future__ import annotations

import json
import os
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache
from transformers.utils import ModelOutput

from ..common.checks import check_choice, is_finite, is_whole, wrong
from ..common.documents import ANYTHING, FINITE, TEXT, Document, ListOf, MapOf, Record
from ..common.names import has_suffix
from ..common.tables import text_table
from ..common.writing import atomic_write_text
from ..layers import ops
from ..layers.values import ROUNDED, grid_format, parse_values
from ..supernet.context import eval_mode, subnet_restored
from ..supernet.host import get_elastic_host
from ..supernet.space import LayerShape, SearchSpace, Subnet
from . import timing
from .merged import MIN_SPARSITY, MergedLinear, base_modules, merged_linears


_DOCUMENT = Document(
    "latency model",
    "peft-elastic/latency",
    1,
    Record(fingerprint=TEXT, workload=MapOf(ANYTHING), fixed=FINITE, layers=MapOf(MapOf(FINITE)), rest=ListOf(FINITE)),
)
MODES = ("forward", "decode")
KERNELS = ("auto", "dense", "sparse")
_MIN_ROUNDS = 3
_N_RANDOM = 3
_VISIT_SECONDS = 0.02


class LatencyModel:
    """Seconds that a subnet takes on this machine for one forward pass, or one decode step, once it is deployed: merged, and
    extracted as a physically smaller model.

    Two parts are measured when the object is made, with as many threads as torch has then; with one thread in processor time, so
    that other processes on the machine count little (`peft_elastic.cost.timing.clock`):

    - each distinct shape of a linear layer, with weights that are not in the caches; the shapes take turns, medians are
      kept in a file of this machine (`peft_elastic.cost.timing`) and not measured again;
    - everything else (attention, norms, activations, embeddings, Python), in the running model: the time outside of its linear
      layers and their adapters, for the max and min subnet, one subnet for each kind of choice, and a few random ones, which
      take turns. Non-negative least squares attribute the medians to a constant, the heads, the MLP channels and the
      computed blocks or sub-blocks of each kind.

    A prediction is a sum over these numbers; nothing is run. Adapter ranks do not change it, as adapters are merged.

    Args:
        model (`nn.Module`):
            The elastic model, on the CPU; anything `get_elastic_host` accepts. Its active subnet is put back afterwards.
        inputs (`Mapping[str, torch.Tensor | tuple[int, ...]]`):
            The batch that is served, e.g. `tokenizer(texts, return_tensors="pt")`. A tuple stands for token ids or a mask of
            this shape: `{"input_ids": (1, 128)}`.
        mode (`str`, defaults to `"forward"`):
            `"forward"`, or `"decode"`: one token for each row of `input_ids`, with a cache that holds `inputs`.
        kernel (`str`, defaults to `"dense"`):
            The layers that are deployed: `"dense"`; `"sparse"`, where at least 30% of the weights are zeros that survive the
            merge, and for weights on a 4-bit grid; or `"auto"`, sparse where that is faster for one row of activations, as
            `merge_and_unload(sparse_kernel="auto")` decides.
        sparse_dtype (`str`, defaults to `"bf16"`):
            Values of the sparse layers, `"bf16"` or `"int8"`; those on a grid are int4.
        seconds (`float`, defaults to 20):
            About how long to run the model for the second part; three rounds are made in any case.

    Raises:
        ValueError: if an argument is not allowed, the model is not on the CPU, has packed layers of another library, was traced, or
            cannot run `inputs`; or without the C++ extension for another kernel than `"dense"`.
    """

    space: SearchSpace

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        mode: str = "forward",
        kernel: str = "dense",
        sparse_dtype: str = "bf16",
        seconds: float = 20.0,
    ) -> None:
        host = get_elastic_host(model)
        with subnet_restored(host):
            self._measure(model, host.search_space, host.set_subnet, inputs, mode, kernel, sparse_dtype, seconds)

    @classmethod
    def of_space(
        cls,
        model: nn.Module,
        space: SearchSpace,
        activate: Callable[[Subnet], object],
        inputs: Mapping[str, Any],
        mode: str = "forward",
        kernel: str = "dense",
        sparse_dtype: str = "bf16",
        seconds: float = 20.0,
    ) -> LatencyModel:
        """The latency model of a module that is no elastic model.

        Args:
            model (`nn.Module`): what computes the subnets. It is left in one of them.
            space (`SearchSpace`): the subnets.
            activate (`Callable`): `activate(subnet)` lets `model` compute that subnet from now on.
            inputs, mode, kernel, sparse_dtype, seconds: as of the class.

        Raises:
            ValueError: as the class.
        """
        made = object.__new__(cls)
        made._measure(model, space, activate, inputs, mode, kernel, sparse_dtype, seconds)
        return made

    def _measure(
        self,
        model: nn.Module,
        space: SearchSpace,
        activate: Callable[[Subnet], object],
        inputs: Mapping[str, Any],
        mode: str,
        kernel: str,
        sparse_dtype: str,
        seconds: float,
    ) -> None:
        _check_space(space)
        linears = merged_linears(model)
        _check_arguments(model, linears, mode, kernel, seconds)
        check_choice("sparse_dtype", sparse_dtype, ROUNDED)
        self.space = space
        self._run = _Workload(inputs, mode)
        self.workload: dict[str, Any] = {
            "mode": mode,
            "kernel": kernel,
            "sparse_dtype": sparse_dtype,
            "inputs": self._run.shapes,
            "threads": torch.get_num_threads(),
        }
        with torch.no_grad(), eval_mode(model):
            activate(space.max)
            calls = _record_calls(model, linears, self._run)
            self._fixed, self._layers = self._time_linears(linears, calls)
            self._rest = self._measure_rest(model, activate, [linears[name].module for name in calls], seconds)

    # -- prediction --------------------------------------------------------------------------------------------------

    def predict(self, subnet: Mapping[str, int] | str) -> float:
        """Seconds of one forward pass, or decode step, of a subnet.

        Raises:
            ValueError: if the subnet does not belong to the space.
        """
        checked = self.space.subnet(subnet)
        linear = self._fixed
        for layer in self.space.layers:
            times = self._layers.get(layer.name)
            if times is not None:
                linear += times.get(_size_key(*layer.size(checked)), 0.0)
        return float(linear + np.dot(self._rest, _features(self.space, checked)))

    def validate(
        self,
        subnets: Iterable[Mapping[str, int] | str],
        build: Callable[[Subnet], nn.Module],
        seconds: float = 1.0,
    ) -> LatencyReport:
        """Compare predictions with the time that deployed subnets take end to end.

        Args:
            subnets (`Iterable`): the subnets to build, one after the other.
            build (`Callable`): gives the module of a subnet as it would be deployed.
            seconds (`float`, defaults to 1): about how long to run each; five runs are made in any case.

        Raises:
            ValueError: if there are no subnets, or torch has another number of threads than in the measurements.
        """
        chosen = [self.space.subnet(subnet) for subnet in subnets]
        if not chosen:
            raise ValueError("`subnets` is empty, it needs at least one.")
        if torch.get_num_threads() != self.workload["threads"]:
            raise ValueError(
                f"torch has {torch.get_num_threads()} threads now, and had {self.workload['threads']} in the measurements."
            )
        measured = []
        for subnet in chosen:
            module = build(subnet)
            with torch.no_grad(), eval_mode(module):
                step = self._run.begin(module)
                step(), step()
                times: list[float] = []
                start = time.perf_counter()
                while len(times) < 5 or time.perf_counter() - start < seconds:
                    times.append(step())
            measured.append(statistics.median(times))
        return LatencyReport(tuple(chosen), tuple(self.predict(subnet) for subnet in chosen), tuple(measured))

    def stepper(self, module: nn.Module) -> Callable[[], float]:
        """A function that makes one forward pass, or decode step, of a module with the inputs of this model, and returns the
        seconds that it took: to compare modules that take turns.

        Args:
            module (`nn.Module`): what is deployed, in evaluation mode.
        """
        step = self._run.begin(module)
        return torch.no_grad()(step)

    # -- on disk -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the measurements to a JSON file, atomically."""
        data = {
            "fingerprint": self.space.fingerprint,
            "workload": self.workload,
            "fixed": self._fixed,
            "layers": self._layers,
            "rest": self._rest,
        }
        atomic_write_text(path, json.dumps(_DOCUMENT.wrap(data), indent=1))

    def as_begun(self, path: str | os.PathLike[str]) -> LatencyModel:
        """This model with the measurements in `path`, if there is such a file of the same space and workload; else itself.

        A search that is continued must predict what it predicted before, or it would ask for other subnets.

        Raises:
            ValueError: if the file is not one that `save` wrote.
        """
        if not Path(path).exists():
            return self
        try:
            data = _DOCUMENT.read(path)
            if data["fingerprint"] != self.space.fingerprint or data["workload"] != self.workload:
                return self
            sizes = {name: set(times) for name, times in self._layers.items()}
            if len(data["rest"]) != len(self._rest) or sizes != {n: set(times) for n, times in data["layers"].items()}:
                raise ValueError("it belongs to another model")
        except ValueError as error:
            raise ValueError(
                f"{os.fspath(path)!r} does not hold the measurements of this latency model: {error}. Delete it to have them "
                "made again, with another folder for the search."
            ) from None
        begun = object.__new__(LatencyModel)
        begun.space, begun.workload, begun._run = self.space, self.workload, self._run
        begun._fixed, begun._layers, begun._rest = data["fixed"], data["layers"], data["rest"]
        return begun

    # -- measurement -------------------------------------------------------------------------------------------------

    def _time_linears(
        self, linears: Mapping[str, MergedLinear], calls: Mapping[str, Counter[int]]
    ) -> tuple[float, dict[str, dict[str, float]]]:
        """Seconds of the linear layers that no choice changes, and of the others by name and size."""
        elastic: dict[str, LayerShape] = {}
        for layer in self.space.layers:
            path = next((name for name in calls if has_suffix(name, layer.name)), None)
            if path is not None:
                elastic[path] = layer
        wanted: dict[str, list[tuple[int, int]]] = {}
        for name in calls:
            linear = linears[name]
            sizes = {(linear.out_features, linear.in_features)}
            if name in elastic:
                sizes = _possible_sizes(elastic[name], self.space)
            wanted[name] = sorted(size for size in sizes if 0 not in size)
        dense = timing.measure_dense(
            list(
                dict.fromkeys(
                    _dense(linears[name], size, rows)
                    for name, sizes in wanted.items()
                    for size in sizes
                    for rows in {*calls[name], 1}
                )
            )
        )
        fixed, layers = 0.0, {}
        for name, possible in wanted.items():
            times = {
                size: sum(n * self._seconds(linears[name], size, rows, dense) for rows, n in calls[name].items())
                for size in possible
            }
            if name in elastic:
                layers[elastic[name].name] = {_size_key(*size): seconds for size, seconds in times.items()}
            else:
                fixed += sum(times.values())
        return fixed, layers

    def _seconds(
        self,
        linear: MergedLinear,
        size: tuple[int, int],
        rows: int,
        dense: Mapping[timing.DenseLayer, float],
    ) -> float:
        """One call of a layer of this size, with the kernel that it would be deployed with."""
        candidates = _sparse_candidates(linear, self.workload["sparse_dtype"])
        kernel = self.workload["kernel"]
        if kernel == "dense" or not candidates:
            return dense[_dense(linear, size, rows)]

        def measured(values: str, rows: int) -> timing.Timing:
            group = linear.group_size if parse_values(values)[0].is_grid else None
            return timing.measure(*size, linear.sparsity, values, linear.dtype, group, rows)

        if kernel == "sparse":
            return measured(candidates[0], rows).sparse
        one_row = {values: measured(values, 1) for values in candidates}
        best = max(one_row, key=lambda values: one_row[values].dense / one_row[values].sparse)
        if one_row[best].dense <= timing.CLEARLY_FASTER * one_row[best].sparse:
            return dense[_dense(linear, size, rows)]
        return measured(best, rows).sparse

    def _measure_rest(
        self,
        model: nn.Module,
        activate: Callable[[Subnet], object],
        modules: Sequence[nn.Module],
        seconds: float,
    ) -> list[float]:
        """Seconds outside of the linear layers for one unit of each feature."""
        subnets = _calibration_subnets(self.space)
        steps = []
        for subnet in subnets:
            activate(subnet)
            steps.append(self._run.begin(model))
        outside: list[list[float]] = [[] for _ in subnets]
        with _stopwatch(modules) as watch:
            start = time.perf_counter()
            rounds = 0
            while rounds < _MIN_ROUNDS or time.perf_counter() - start < seconds:
                for subnet, step, times in zip(subnets, steps, outside, strict=True):
                    activate(subnet)
                    # what the switch has left in the caches is not what a deployed model finds, and a small one needs
                    # several runs until it runs as when it is served
                    visit = step()
                    while True:
                        watch.reset()
                        visit += (last := step())
                        if visit >= _VISIT_SECONDS or last > _VISIT_SECONDS / 4:
                            break
                    times.append(last - watch.inside - watch.calls * watch.overhead)
                rounds += 1
        features = np.array([_features(self.space, subnet) for subnet in subnets], dtype=float)
        medians = np.array([statistics.median(times) for times in outside])
        # relative errors count: small subnets, which absolute ones would neglect, are what a search looks for
        weights = 1 / np.maximum(medians, 0.01 * medians.max())
        return _non_negative_least_squares(features * weights[:, None], medians * weights)


@dataclass(frozen=True)
class LatencyReport:
    """Predicted against measured latencies; printing it gives a table.

    Args:
        subnets (`tuple[Subnet, ...]`): what was built.
        predicted, measured (`tuple[float, ...]`): seconds, measured ones medians.
    """

    subnets: tuple[Subnet, ...]
    predicted: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """(predicted - measured) / measured of each subnet."""
        return tuple(p / m - 1 for p, m in zip(self.predicted, self.measured, strict=True))

    @property
    def median_error(self) -> float:
        """Median of the absolute relative errors."""
        return statistics.median(abs(error) for error in self.errors)

    @property
    def worst_error(self) -> float:
        """Largest absolute relative error."""
        return max(abs(error) for error in self.errors)

    def __str__(self) -> str:
        rows = [("subnet", "predicted ms", "measured ms", "error")]
        for i, (p, m, error) in enumerate(zip(self.predicted, self.measured, self.errors, strict=True)):
            rows.append((str(i), f"{1e3 * p:.3f}", f"{1e3 * m:.3f}", f"{error:+.1%}"))
        lines = text_table(rows, left=0)
        lines.append(
            f"relative error over {len(self.errors)}: median {self.median_error:.1%}, worst {self.worst_error:.1%}"
        )
        return "\n".join(lines)


class _Workload:
    """What is timed, for any model that takes the inputs."""

    def __init__(self, inputs: Mapping[str, Any], mode: str) -> None:
        if not isinstance(inputs, Mapping) or not inputs:
            raise ValueError(
                f"`inputs` must be a dict of tensors or shapes such as {{'input_ids': (1, 128)}}, got {inputs!r}."
            )
        self._inputs: dict[str, Any] = {}
        for name, value in inputs.items():
            if isinstance(value, (tuple, list)) and value and all(is_whole(n) and n > 0 for n in value):
                value = torch.ones(*value, dtype=torch.int64)
            if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
                raise ValueError(f"`inputs[{name!r}]` must be a tensor on the CPU or a shape, got {value!r}.")
            self._inputs[name] = value
        self._mode = mode
        if mode == "decode" and "input_ids" not in self._inputs:
            raise ValueError(f"`mode='decode'` needs 'input_ids' in `inputs`, got {sorted(self._inputs)}.")

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of each input."""
        return {name: list(tensor.shape) for name, tensor in sorted(self._inputs.items())}

    def begin(self, model: nn.Module) -> Callable[[], float]:
        """A function that runs the model once and returns the seconds it took."""
        inputs = dict(self._inputs)
        cache: Any = None
        if self._mode == "decode":
            output = model(**inputs, use_cache=True)
            # under a name that depends on the version of transformers, by which the model takes it again
            fields = output.items() if isinstance(output, ModelOutput) else ()
            name, cache = next(((field, value) for field, value in fields if isinstance(value, Cache)), ("", None))
            if cache is None or not hasattr(cache, "crop"):
                raise ValueError(
                    f"`mode='decode'` needs a model with a cache, {type(model).__name__} returned {cache!r}."
                )
            inputs = {"input_ids": inputs["input_ids"][:, -1:], name: cache, "use_cache": True}
            if (mask := self._inputs.get("attention_mask")) is not None:
                inputs["attention_mask"] = torch.cat([mask, mask[:, -1:]], dim=1)

        now = timing.clock()

        def step() -> float:
            before = now()
            model(**inputs)
            seconds = now() - before
            if cache is not None:
                cache.crop(-1)  # removes the token
            return seconds

        return step


class _Stopwatch:
    """Time inside of some modules since `reset`, and how often they were called."""

    overhead = 0.0  # seconds of a call outside of what is counted, less those of a deployed layer

    def __init__(self) -> None:
        self.now = timing.clock()
        self.reset()
        self._started = 0.0
        self._depth = 0

    def reset(self) -> None:
        self.inside, self.calls = 0.0, 0

    def before(self, *_: Any) -> None:
        self._depth += 1
        if self._depth == 1:  # one layer may be inside of another
            self._started = self.now()

    def after(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.inside += self.now() - self._started
            self.calls += 1


@contextmanager
def _stopwatch(modules: Iterable[nn.Module]) -> Iterator[_Stopwatch]:
    watch = _Stopwatch()
    example, x = nn.Linear(8, 8), torch.zeros(1, 8)
    n = 2000

    def seconds(call: Callable[[], Any]) -> float:
        start = watch.now()
        for _ in range(n):
            call()
        return (watch.now() - start) / n

    deployed = seconds(lambda: example(x)) - seconds(lambda: nn.functional.linear(x, example.weight, example.bias))
    handles = []
    for module in (example, *modules):
        # first before all others and last after them: what other hooks do belongs to the layer
        handles.append(module.register_forward_pre_hook(watch.before, prepend=True))
        handles.append(module.register_forward_hook(watch.after))
    try:
        hooked = seconds(lambda: example(x)) - watch.inside / n
        watch.overhead = hooked - max(0.0, deployed)
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _check_space(space: SearchSpace) -> None:
    """ValueError for the subnets of a traced model: the rest of such a model is its convolutions, which no sum over heads, channels and
    blocks predicts."""
    kind = next((choice.kind for choice in space if choice.kind in ("channels", "kernel")), None)
    if kind is not None or space.counted_per != "token":
        what = f"has choices of kind {kind!r}" if kind is not None else "is one of convolutions that was traced"
        raise ValueError(
            f"`model` {what}, whose latency is not predicted. Measure what is deployed: give a search an objective of your own that "
            "times a subnet, or bound `macs`."
        )


def _check_arguments(
    model: nn.Module, linears: Mapping[str, MergedLinear], mode: Any, kernel: Any, seconds: Any
) -> None:
    check_choice("mode", mode, MODES)
    check_choice("kernel", kernel, KERNELS)
    if kernel != "dense" and not ops.is_available():
        raise ValueError(f"`kernel={kernel!r}` needs the C++ extension (`peft-elastic info` says how to get it).")
    if not is_finite(seconds) or seconds < 0:
        raise wrong("seconds", "a number >= 0", seconds)
    elsewhere = sorted({str(p.device) for p in model.parameters() if p.device.type != "cpu"})
    if elsewhere:
        raise ValueError(f"`model` must be on the CPU, it has parameters on {elsewhere}.")
    for name, module in base_modules(model):
        size = getattr(module, "in_features", None), getattr(module, "out_features", None)
        below_linear = name.rpartition(".")[0] in linears
        if name not in linears and not below_linear and all(map(is_whole, size)):
            raise ValueError(
                f"`model` has packed weights ({name!r} is a {type(module).__name__}), whose latency after the merge is unknown; "
                "load it in floating point."
            )


def _record_calls(model: nn.Module, linears: Mapping[str, MergedLinear], run: _Workload) -> dict[str, Counter[int]]:
    """Rows of activations of every call of every linear layer in one step."""
    calls: dict[str, Counter[int]] = {}
    step = run.begin(model)

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            calls.setdefault(name, Counter())[x.numel() // x.shape[-1]] += 1

        return record

    handles = [
        linear.module.register_forward_pre_hook(recorder(name), with_kwargs=True) for name, linear in linears.items()
    ]
    try:
        step()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _possible_sizes(layer: LayerShape, space: SearchSpace) -> set[tuple[int, int]]:
    there = dict.fromkeys(layer.depth, 1)
    if layer.width is None:
        return {layer.size(there)}
    return {layer.size({**there, layer.width: option}) for option in space[layer.width].options}


def _dense(linear: MergedLinear, size: tuple[int, int], rows: int) -> timing.DenseLayer:
    return timing.DenseLayer(*size, linear.bias, rows, linear.dtype)


def _sparse_candidates(linear: MergedLinear, sparse_dtype: str) -> list[str]:
    """Values of the sparse layers that it can become, as `sparsify_linears` sees it."""
    sparse = linear.sparsity >= MIN_SPARSITY
    if linear.bits is not None:
        value_format = grid_format(linear.bits)
        return [] if value_format is None else value_format.variants(sparse)
    return [sparse_dtype] if sparse else []


def _size_key(out_features: int, in_features: int) -> str:
    return f"{out_features}x{in_features}"


# -- what is not a linear layer ----------------------------------------------------------------------------------------


def _features(space: SearchSpace, subnet: Mapping[str, int]) -> list[float]:
    """What the time outside of the linear layers is proportional to: 1, and for each kind of width choice the active heads or
    channels, and for each kind of block or sub-block how many of them are computed."""
    widths: dict[str, dict[str, int]] = {}
    depths: dict[str, dict[tuple[str, ...], int]] = {}
    for layer in space.layers:
        there = all(subnet[key] for key in layer.depth)
        if layer.width is not None:
            widths.setdefault(_kind(layer.width), {})[layer.width] = subnet[layer.width] if there else 0
        if layer.depth:
            depths.setdefault(" ".join(map(_kind, layer.depth)), {})[layer.depth] = int(there)
    groups = [*sorted(widths.items()), *sorted(depths.items())]
    return [1.0, *(float(sum(values.values())) for _, values in groups)]  # type: ignore[attr-defined]


def _kind(key: str) -> str:
    """The same for the choices of all blocks."""
    return re.sub(r"(?<=[.:])\d+(?=\.|$)", "*", key)


def _calibration_subnets(space: SearchSpace) -> list[Subnet]:
    """The max and min subnet, the max one with the choices of one kind at their smallest, and some random ones."""
    changed = {key for layer in space.layers for key in (layer.width, *layer.depth) if key is not None}
    subnets = [space.max, space.min]
    for kind in dict.fromkeys(_kind(choice.key) for choice in space if choice.key in changed):
        smallest = {c.key: c.options[-1] for c in space if c.key in changed and _kind(c.key) == kind}
        subnets.append(Subnet({**space.max, **smallest}))
    subnets += [space.sample(i) for i in range(_N_RANDOM)] if changed else []
    return list(dict.fromkeys(subnets))


def _non_negative_least_squares(features: np.ndarray, values: np.ndarray) -> list[float]:
    """Coefficients of the columns, none of them negative."""
    from scipy.optimize import nnls  # only now: scipy takes long to import

    scale = np.where(features.max(axis=0) > 0, features.max(axis=0), 1.0)
    return (nnls(features / scale, values, maxiter=1000)[0] / scale).tolist()
