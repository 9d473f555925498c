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
"""Two builds of the extension against each other: the same bits, and as fast.

    python benchmarks/levels_before_after.py --before OLD/peft_elastic/_C.*.so --after peft_elastic/_C.*.so --out FOLDER

Both are loaded into one process and get the same memory. Every level that this CPU runs, every value type, one row of
activations and many, the attention of a decoding step, dense products, the effective weight, packing and unpacking. The two
take turns call by call, in an order that alternates, so that whatever else the machine does falls on both; times are those of the
processor, on one thread; a ratio is the median of the pairs' ratios with a bootstrap interval of 95%. Every result is compared
bit by bit on the way.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import ctypes
import importlib.machinery
import importlib.util
import json
import math
import os
import platform
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


FLOATS = {"float32": 0, "bfloat16": 1}
ROWS = (1, 32, 256)
SHAPES = ((2048, 2048), (4096, 4096))
SPARSITIES = (0.5, 0.7)
GROUP_SIZE = 64


def aligned(count: int, dtype: Any = np.uint8) -> np.ndarray:
    """Zeros at an address that is a multiple of 64."""
    dtype = np.dtype(dtype)
    memory = np.zeros(count * dtype.itemsize + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + count * dtype.itemsize].view(dtype)


def copy_of(values: np.ndarray) -> np.ndarray:
    target = aligned(values.size, values.dtype).reshape(values.shape)
    target[...] = values
    return target


def at(values: np.ndarray | None) -> int:
    return 0 if values is None else values.ctypes.data


def to_bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


class Build:
    """One build of the extension, called by what there is to do. `Positional` are those up to commit dec2a92."""

    def __init__(self, path: Path, name: str):
        # of a file of its own, as the one given may be loaded already
        with tempfile.TemporaryDirectory() as folder, own_pybind11():
            loader = importlib.machinery.ExtensionFileLoader(f"{name}._C", shutil.copy(path, folder))
            spec = importlib.util.spec_from_loader(loader.name, loader)
            self.c: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            loader.exec_module(self.c)

    def float_type(self, name: str) -> Any:
        return getattr(self.c.FloatType, name)

    def pack(self, type_: str, dense: np.ndarray) -> np.ndarray:
        out, columns = dense.shape
        kind = getattr(self.c.ValueType, type_)
        nonzeros = self.c.count_nonzeros(kind, at(dense), out, columns, columns)
        packed = aligned(self.c.packed_dense_bytes(kind, out, columns, nonzeros))
        self.c.pack_dense(kind, at(dense), out, columns, columns, at(packed), packed.size)
        return packed

    def pack_int4(self, source: dict[str, Any]) -> np.ndarray:
        mask = source["bitmask"]
        given = self.c.Source(
            type=self.c.ValueType.int4_dense if mask is None else self.c.ValueType.int4,
            out_features=source["out"],
            in_features=source["in"],
            group_size=GROUP_SIZE,
            bitmask=at(mask),
            bitmask_bytes=0 if mask is None else mask.size,
            values=at(source["values"]),
            value_bytes=source["values"].size,
            scales=at(source["scales"]),
            zeros=at(source["zeros"]),
        )
        packed = aligned(self.c.packed_bytes(given))
        self.c.pack(given, at(packed), packed.size)
        return packed

    def unpack(self, packed: np.ndarray, bitmask: np.ndarray, values: np.ndarray) -> None:
        self.c.unpack(at(packed), packed.size, values=at(values), bitmask=at(bitmask))

    def unpack_int4(self, packed: np.ndarray, into: dict[str, Any]) -> None:
        self.c.unpack(
            at(packed), packed.size, **{name: at(into[name]) for name in ("values", "bitmask", "scales", "zeros")}
        )

    def linear(self, w: dict[str, Any], x: np.ndarray, x_type: str, y: np.ndarray, int8: bool) -> None:
        kind = self.float_type(x_type)
        self.c.linear(
            at(w["packed"]), w["packed"].size, at(x), kind, x.shape[0], w["in"], w["in"], at(w["row_scales"]), 0, kind,
            at(y), kind, w["out"], 1, int8,
        )  # fmt: skip

    def dense_rows(self, w: dict[str, Any], target: np.ndarray, type_: str) -> None:
        packed = w["packed"]
        self.c.dense_rows(
            at(packed), packed.size, at(w["row_scales"]), 0, w["out"], at(target), self.float_type(type_), 1
        )

    def decoder(self, type_: str, hidden: int, dim: int, linears: list[dict[str, Any]], norm: np.ndarray) -> Any:
        model = self.c.DecodeModel(self.float_type(type_), hidden, dim)
        layers = [
            self.c.DecodeLinear(
                out_features=w["out"],
                in_features=w["in"],
                weight=at(w["packed"]),
                size=w["packed"].size,
                scales=0,
                bias=0,
                bias_type=self.c.FloatType.float32,
            )
            for w in linears
        ]
        norms = self.c.DecodeNorm(weight=at(norm), epsilon=1e-6)
        model.add_layer(
            **dict(zip(("q", "k", "v", "o", "gate", "up", "down"), layers, strict=True)),
            input_norm=norms,
            mlp_norm=norms,
            q_norm=None,
            k_norm=None,
            scaling=0.125,
        )
        return model

    def decode(self, model: Any, batch: int, length: int, of: dict[str, Any], output: np.ndarray) -> None:
        self.c.decode(
            model,
            batch=batch,
            length=length,
            capacity=length + 1,
            hidden=at(of["hidden"]),
            cos=at(of["cos"]),
            sin=at(of["sin"]),
            rotary_per_row=False,
            mask=0,
            keys_and_values=of["cache"].buffer_info()[0],
            output=at(output),
            threads=1,
        )

    def dense_linear(self, x: np.ndarray, weight: np.ndarray, y: np.ndarray, type_: str) -> None:
        self.c.dense_linear(
            x=at(x),
            rows=x.shape[0],
            out_features=weight.shape[0],
            in_features=weight.shape[1],
            weight=at(weight),
            bias=0,
            y=at(y),
            type=self.float_type(type_),
            threads=1,
        )

    def fill(self, job: dict[str, Any], panel: np.ndarray, slopes: np.ndarray | None) -> None:
        rows, columns = panel.shape
        self.c.effective_panel(
            weight=at(job["weight"]),
            weight_type=self.float_type(job["type"]),
            rows=rows,
            columns=columns,
            weight_stride=columns,
            panel=at(panel),
            slopes=at(slopes),
            masked=job["masked"],
            add=True,
            scales=at(job["scales"]),
            zeros=at(job["zeros"]),
            group_size=GROUP_SIZE if job["scales"] is not None else 0,
            top=15.0,
            threads=1,
        )


class Positional(Build):
    """Addresses and numbers by their places, types of values and floats as whole numbers."""

    def float_type(self, name: str) -> Any:
        return FLOATS[name]

    def pack(self, type_: str, dense: np.ndarray) -> np.ndarray:
        out, columns = dense.shape
        kind = ("bf16", "int8").index(type_)
        nonzeros = self.c.count_nonzeros(kind, at(dense), out, columns, columns)
        packed = aligned(self.c.packed_bytes(kind, out, columns, nonzeros))
        self.c.pack_dense(kind, at(dense), out, columns, columns, at(packed), packed.size)
        return packed

    def int4_source(self, source: dict[str, Any]) -> Any:
        mask = source["bitmask"]
        return (
            source["out"],
            source["in"],
            GROUP_SIZE,
            at(mask),
            0 if mask is None else mask.size,
            at(source["values"]),
            source["values"].size,
            at(source["scales"]),
            at(source["zeros"]),
            0,
        )

    def pack_int4(self, source: dict[str, Any]) -> np.ndarray:
        given = self.int4_source(source)
        packed = aligned(self.c.packed_int4_bytes(given))
        self.c.pack_int4(given, at(packed), packed.size)
        return packed

    def unpack(self, packed: np.ndarray, bitmask: np.ndarray, values: np.ndarray) -> None:
        self.c.unpack(at(packed), packed.size, at(bitmask), at(values))

    def unpack_int4(self, packed: np.ndarray, into: dict[str, Any]) -> None:
        addresses = (at(into[name]) for name in ("bitmask", "values", "scales", "zeros"))
        self.c.unpack_int4(at(packed), packed.size, *addresses, 0)

    def decoder(self, type_: str, hidden: int, dim: int, linears: list[dict[str, Any]], norm: np.ndarray) -> Any:
        model = self.c.DecodeModel(self.float_type(type_), hidden, dim)
        model.add_layer(
            [
                (w["out"], w["in"], at(w["packed"]), w["packed"].size, 0, 0, self.float_type("float32"))
                for w in linears
            ],
            [(at(norm), 1e-6), (at(norm), 1e-6), (0, 0.0), (0, 0.0)],
            0.125,
        )
        return model

    def decode(self, model: Any, batch: int, length: int, of: dict[str, Any], output: np.ndarray) -> None:
        self.c.decode(
            model, batch, length, length + 1, at(of["hidden"]), at(of["cos"]), at(of["sin"]), False, 0,
            of["cache"].buffer_info()[0], at(output), 1,
        )  # fmt: skip

    def dense_linear(self, x: np.ndarray, weight: np.ndarray, y: np.ndarray, type_: str) -> None:
        self.c.dense_linear(
            at(x), x.shape[0], *weight.shape, at(weight), 0, at(y), self.float_type(type_), 1
        )  # fmt: skip

    def fill(self, job: dict[str, Any], panel: np.ndarray, slopes: np.ndarray | None) -> None:
        rows, columns = panel.shape
        self.c.effective_panel(
            at(job["weight"]), self.float_type(job["type"]), rows, columns, columns, at(panel), at(slopes), job["masked"],
            True, at(job["scales"]), at(job["zeros"]), GROUP_SIZE if job["scales"] is not None else 0, 15.0, 1,
        )  # fmt: skip


def load(path: Path, name: str) -> Build:
    build = Build(path, name)
    if not hasattr(build.c, "Source"):
        build.__class__ = Positional
    return build


@contextlib.contextmanager
def own_pybind11() -> Iterator[None]:
    """Modules register their classes for all others of the process, where those of another build would be in the way."""
    python = ctypes.pythonapi
    python.PyInterpreterState_Get.restype = ctypes.c_void_p
    python.PyInterpreterState_GetDict.restype = ctypes.c_void_p  # a reference that is only lent
    python.PyInterpreterState_GetDict.argtypes = [ctypes.c_void_p]
    state = ctypes.cast(python.PyInterpreterState_GetDict(python.PyInterpreterState_Get()), ctypes.py_object).value
    others = [
        (place, key, place.pop(key))
        for place in (state, vars(builtins))
        for key in [key for key in place if "pybind11_internals" in str(key)]
    ]
    yield
    for place in (state, vars(builtins)):
        for key in [key for key in place if "pybind11_internals" in str(key)]:
            _KEPT.append(place.pop(key))  # the module goes on using it
    for place, key, internals in others:
        place[key] = internals


_KEPT: list[Any] = []


# -- what there is to do -------------------------------------------------------------------------------------------------

Case = tuple[str, Callable[[Build], list[np.ndarray]], Callable[[Build], Any]]  # name, prepare -> outputs, call


def plain_weight(
    old: Build, new: Build, type_: str, out: int, columns: int, sparsity: float, chance: Any
) -> dict[str, Any]:
    kept = chance.random((out, columns)) >= sparsity
    if type_ == "bf16":
        dense = copy_of(to_bf16(chance.standard_normal((out, columns))) * kept.astype(np.uint16))
    else:
        dense = copy_of(
            (chance.integers(1, 128, (out, columns)) * chance.choice([-1, 1], (out, columns)) * kept).astype(np.int8)
        )
    packed, again = old.pack(type_, dense), new.pack(type_, dense)
    same("packed bytes", packed, again)
    scales = copy_of(chance.random(out).astype(np.float32)) if type_ == "int8" else None
    return {"out": out, "in": columns, "packed": packed, "row_scales": scales, "dense": dense}


def int4_weight(
    old: Build, new: Build, is_dense: bool, out: int, columns: int, sparsity: float, chance: Any
) -> dict[str, Any]:
    groups = columns // GROUP_SIZE
    zeros = chance.integers(0, 16, (out, groups)).astype(np.uint8)
    codes = chance.integers(0, 16, (out, columns)).astype(np.uint8)
    kept = (chance.random((out, columns)) >= sparsity) & (codes != zeros.repeat(GROUP_SIZE, axis=1))
    stored = np.where(kept, codes, zeros.repeat(GROUP_SIZE, axis=1)).ravel() if is_dense else codes[kept]
    stored = np.append(stored, np.uint8(0)) if stored.size % 2 else stored
    source = {
        "out": out, "in": columns, "zeros": copy_of(zeros), "values": copy_of(stored[::2] | stored[1::2] << 4),
        "scales": copy_of(chance.standard_normal((out, groups)).astype(np.float32)),
        "bitmask": None if is_dense else copy_of(np.packbits(kept, axis=1, bitorder="little")),
    }  # fmt: skip
    packed, again = old.pack_int4(source), new.pack_int4(source)
    same("packed bytes", packed, again)
    return {"out": out, "in": columns, "packed": packed, "row_scales": None, "source": source}


def products(w: dict[str, Any], type_: str, rows: int, chance: Any) -> list[tuple[str, Callable]]:
    """What is called, and the result, for each type of activations."""
    kinds = {"bf16": ("float32", "bfloat16"), "int8": ("float32", "int8")}.get(type_, ("float32",))
    found = []
    for kind in kinds:
        x_type = "bfloat16" if kind == "bfloat16" else "float32"
        x = chance.standard_normal((rows, w["in"])).astype(np.float32)
        x = copy_of(to_bf16(x) if x_type == "bfloat16" else x)
        y = aligned(rows * w["out"], x.dtype)

        def call(build: Build, x=x, y=y, x_type=x_type, kind=kind) -> np.ndarray:
            build.linear(w, x, x_type, y, kind == "int8")
            return y

        found.append((f"{type_} x {kind}", call))
    return found


def others(chance: Any, old: Build, new: Build, small: bool) -> list[tuple[str, Callable]]:
    """What of the table of a level is no product with a sparse weight."""
    found = []
    length, heads, dim, hidden = (64, 4, 16, 32) if small else (2048, 32, 64, 64)
    for type_ in FLOATS:
        dtype = np.float32 if type_ == "float32" else np.uint16

        def numbers(*shape: int, type_=type_) -> np.ndarray:
            values = chance.standard_normal(shape).astype(np.float32)
            return copy_of(values if type_ == "float32" else to_bf16(values))

        sizes = [(heads * dim, hidden)] * 3 + [
            (hidden, heads * dim),
            (hidden, hidden),
            (hidden, hidden),
            (hidden, hidden),
        ]
        linears = [plain_weight(old, new, "bf16", *size, 0.5, chance) for size in sizes]
        keys, values = numbers(heads, length + 1, dim), numbers(heads, length + 1, dim)
        of = {"hidden": numbers(1, hidden), "cos": numbers(1, dim), "sin": numbers(1, dim)}
        of |= {"cache": array("Q", [at(keys), at(values)]), "keep": (keys, values, linears)}
        norm, output = numbers(hidden), aligned(hidden, dtype)
        models = {build: build.decoder(type_, hidden, dim, linears, norm) for build in (old, new)}

        def attend(build: Build, models=models, of=of, output=output, norm=norm) -> np.ndarray:
            build.decode(models[build], 1, length, of, output)
            return output

        found.append((f"attention, {heads} heads over {length}, {type_}", attend))
        for rows in (1, 4):
            size = 256 if small else 2048
            x, weight, y = numbers(rows, size), numbers(size, size), aligned(rows * size, dtype)

            def dense(build: Build, x=x, weight=weight, y=y, type_=type_) -> np.ndarray:
                build.dense_linear(x, weight, y, type_)
                return y

            found.append((f"dense product {size} x {size}, {rows} rows, {type_}", dense))
        rows, columns = (16, 128) if small else (512, 2048)
        for masked, grid, sloped in ((True, False, False), (True, True, True), (False, True, False)):
            weight = numbers(rows, columns)
            weight[chance.random((rows, columns)) < 0.5] = 0
            shape = rows, columns // GROUP_SIZE
            job = {"weight": weight, "type": type_, "masked": masked, "scales": None, "zeros": None}
            if grid:
                job["scales"] = copy_of((chance.random(shape) / 4 + 0.01).astype(np.float32))
                job["zeros"] = copy_of(chance.integers(0, 16, shape).astype(np.float32))
            update = chance.standard_normal((rows, columns)).astype(np.float32)
            panel, slopes = copy_of(update), aligned(rows * columns, np.float32) if sloped else None

            def fill(build: Build, job=job, update=update, panel=panel, slopes=slopes) -> np.ndarray:
                np.copyto(panel, update)  # which is timed as well, and the same for both
                build.fill(job, panel, slopes)
                return panel if slopes is None else np.concatenate([panel.ravel(), slopes])

            what = " ".join(word for word, on in (("masked", masked), ("grid", grid), ("slopes", sloped)) if on)
            found.append((f"fill {rows} x {columns}, {what}, {type_}", fill))
    return found


def conversions(w: dict[str, Any], type_: str, old: Build, new: Build) -> list[tuple[str, Callable]]:
    """Packing and back, which no level changes."""
    found = []
    out, columns = w["out"], w["in"]
    bitmask = aligned(out * (columns // 8))
    if "dense" in w:
        values = aligned(int(np.count_nonzero(w["dense"])), w["dense"].dtype)
        found.append(("pack", lambda build: build.pack(type_, w["dense"])))

        def unpack(build: Build) -> np.ndarray:
            build.unpack(w["packed"], bitmask, values)
            return np.concatenate([bitmask, values.view(np.uint8)])
    else:
        source = w["source"]
        into = {
            name: None if given is None else copy_of(given)
            for name, given in source.items()
            if name not in ("out", "in")
        }
        found.append(("pack", lambda build: build.pack_int4(source)))

        def unpack(build: Build) -> np.ndarray:
            build.unpack_int4(w["packed"], into)
            return np.concatenate([each.view(np.uint8).ravel() for each in into.values() if each is not None])

    found.append(("unpack", unpack))
    for kind in FLOATS:
        target = aligned(out * columns, np.float32 if kind == "float32" else np.uint16)

        def expand(build: Build, target=target, kind=kind) -> np.ndarray:
            build.dense_rows(w, target, kind)
            return target

        found.append((f"dense rows as {kind}", expand))
    return [(f"{type_}: {name}", call) for name, call in found]


# -- how it is measured --------------------------------------------------------------------------------------------------


def same(name: str, one: np.ndarray, other: np.ndarray) -> None:
    if one.tobytes() != other.tobytes():
        raise SystemExit(f"{name}: the two builds give different bits.")


def compare(
    name: str, call: Callable[[Build], np.ndarray], builds: tuple[Build, Build], seconds: float
) -> dict[str, Any]:
    """Seconds of both by turns. The results are compared first, which also warms up."""
    first = np.array(call(builds[0]))
    same(name, first, np.array(call(builds[1])))
    times: tuple[list[float], list[float]] = ([], [])
    end = time.thread_time() + seconds
    while len(times[0]) < (8 if seconds else 2) or time.thread_time() < end:
        for which in (0, 1) if len(times[0]) % 2 else (1, 0):
            begin = time.thread_time()
            call(builds[which])
            times[which].append(time.thread_time() - begin)
    before, after = map(np.array, times)
    ratios = after / before
    draws = np.random.default_rng(0).integers(0, len(ratios), (1000, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return {
        "name": name,
        "pairs": len(ratios),
        "before_ms": 1e3 * float(np.median(before)),
        "after_ms": 1e3 * float(np.median(after)),
        "ratio": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "ratio_of_minima": float(after.min() / before.min()),
    }


def measure(
    builds: tuple[Build, Build], shapes: Any, all_rows: Any, sparsities: Any, seconds: float, small: bool
) -> list:
    old, new = builds
    levels = [level["name"] for level in old.c.levels() if level["usable"]]
    chance = np.random.default_rng(0)
    results = []

    def add(level: str, what: str, rows: int | None, shape: str, name: str, call: Callable) -> None:
        found = compare(f"{level}: {name}, {shape}, {rows} rows", call, builds, seconds)
        results.append(found | {"level": level, "what": what, "rows": rows, "shape": shape, "name": name})
        print(
            f"{level} {name} {shape} {rows}: {found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f})",
            flush=True,
        )

    for shape in shapes:
        for sparsity in sparsities:
            text = f"{shape[0]} x {shape[1]}, {sparsity:.0%}"
            weights = {each: plain_weight(old, new, each, *shape, sparsity, chance) for each in ("bf16", "int8")}
            weights["int4"] = int4_weight(old, new, False, *shape, sparsity, chance)
            if sparsity == sparsities[0]:
                weights["dense int4"] = int4_weight(old, new, True, *shape, sparsity, chance)
            for type_, w in weights.items():
                if shape == shapes[0]:
                    for name, call in conversions(w, type_, old, new):
                        add("any", "conversion", None, text, name, call)
                for rows in all_rows:
                    for name, call in products(w, type_, rows, chance):
                        for level in levels:
                            # what takes long, once: plain C++ takes seconds for what the others do in milliseconds
                            once = shape == shapes[0] and sparsity == sparsities[0]
                            if not once and (rows > 32 or level == "portable") or level == "portable" and rows > 32:
                                continue
                            for build in builds:
                                build.c.select_level(level)
                            add(level, "product", rows, text, name, call)
    for name, call in others(chance, old, new, small):
        for level in levels:
            for build in builds:
                build.c.select_level(level)
            add(level, "other", None, "", name, call)
    return results


def geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def table(results: list[dict[str, Any]], about: str) -> str:
    lines = [about, "", "| level | what | rows | cases | after / before, geometric mean | least | most | beyond 3% |"]
    lines.append("|" + " --- |" * 8)
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for each in results:
        what = each["name"].split(",")[0] if each["what"] == "other" else each["name"]
        groups.setdefault((each["level"], what, each["rows"]), []).append(each)
    for (level, what, rows), found in groups.items():
        ratios = [each["ratio"] for each in found]
        beyond = sum(each["low"] > 1.03 or each["high"] < 0.97 for each in found)
        cells = [level, what, "" if rows is None else str(rows), str(len(found)), f"{geometric(ratios):.3f}"]
        lines.append("| " + " | ".join([*cells, f"{min(ratios):.3f}", f"{max(ratios):.3f}", str(beyond)]) + " |")
    slow = [each for each in results if each["low"] > 1.03]
    lines += ["", f"Slower with the whole interval above 1.03: {len(slow)} of {len(results)} cases."]
    lines += [
        f"- {e['level']}: {e['name']}, {e['shape']}, {e['rows']} rows: {e['ratio']:.3f} ({e['low']:.3f} to {e['high']:.3f}), "
        f"{e['before_ms']:.3f} to {e['after_ms']:.3f} ms, of the minima {e['ratio_of_minima']:.3f}"
        for e in slow
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="an extension, peft_elastic/_C.*")
    parser.add_argument("--after", type=Path, required=True, help="another")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each case, default %(default)s")
    parser.add_argument("--small", action="store_true", help="many small layers: whether the bits agree")
    parser.add_argument("--smoke", action="store_true", help="a few: whether this script runs")
    parser.add_argument("--out", type=Path, help="folder of levels_before_after.json and .md")
    args = parser.parse_args(argv)
    builds = load(args.before, "before"), load(args.after, "after")
    if args.smoke:
        results = measure(builds, ((83, 192),), (1, 3), (0.5,), 0.0, True)
    elif args.small:
        results = measure(builds, ((128, 256), (83, 192)), (1, 2, 3, 5, 9, 40), (0.0, 0.5, 0.9), args.seconds, True)
    else:
        results = measure(builds, SHAPES, ROWS, SPARSITIES, args.seconds, False)
    report = builds[0].c.cpu_report()
    about = (
        f"{report['brand']}, load average at the end {os.getloadavg()[0]:.2f}; Python {platform.python_version()}, numpy "
        f"{np.__version__}, {report['compiler']}. Before: sources {builds[0].c.fingerprint}; after: {builds[1].c.fingerprint}. "
        f"One thread, its processor time; medians of pairs by turns, {args.seconds} s a case. All results are bit by bit the same."
    )
    text = table(results, about)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "levels_before_after.json").write_text(json.dumps({"about": about, "results": results}))
        (args.out / "levels_before_after.md").write_text(text)


if __name__ == "__main__":
    main()
