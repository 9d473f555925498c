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
"""What it costs on a GPU: training steps of every kind of adapter, and pruning and quantisation, on blocks of the shape of Llama-7B.

    python benchmarks/gpu.py                       # at most eight minutes, on the first GPU
    python benchmarks/gpu.py --device cuda:1 --minutes 4 --seq 512 --blocks 2
    python benchmarks/gpu.py --smoke               # tiny blocks, on the CPU, in seconds: its figures mean nothing

One process, no network, random weights. The blocks are in bfloat16 with half of their weights zero; the adapters (rank 32 on all linear
layers) are in float32 and train under autocast with AdamW, as Trainer does with `bf16=True`. The variants share the base:

- `lora`: LoraConfig of stock peft, what the others are compared with;
- `elastic`: ElasticLoraConfig, another subnet in each step;
- `sparse`: SparseQALoraConfig, the update masked by the zeros of the base (SparsePEFT);
- `qa`: the same with quantization_aware=True, 4 bits, groups of 128 (QA-SparsePEFT);
- `naive`: SparsePEFT as its formula says, x (W + B A * (W != 0))^T, left to autograd (the loss must be that of `sparse`).

Each step, forward, backward and optimizer, is timed by events on the device, after a warm-up; rounds take one step of each variant in an
order that changes, and a ratio is that of two steps of the same round. "queued" is when the host had handed over everything: close to
the whole time, the step waits for the host. Peak memory is that of a variant alone with the base. Kernels are counted by the profiler,
operators (those that are no views) where they are dispatched.

OUT/gpu.json and OUT/gpu.md are written anew after each part, and say which parts there was no time for; at the end of its minutes the
process stops, whatever it is doing.
"""

from __future__ import annotations

import time


_BEGIN = time.monotonic()

import argparse  # noqa: E402
import contextlib  # noqa: E402
import copy  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _support import RESULTS, describe_machine, log, machine, summarize, table  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from training import LINEAR_LAYERS, Layers, _make_naive  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, TrainerControl, TrainerState  # noqa: E402

from peft_elastic import (  # noqa: E402
    ElasticLoraConfig,
    GPTQConfig,
    MagnitudeConfig,
    MultiPrunerConfig,
    RTNConfig,
    SparseGPTConfig,
    SparseQALoraConfig,
    SubnetSamplingCallback,
    WandaConfig,
    prune,
    prune_structured,
    quantize,
)
from peft_elastic.common.writing import atomic_write_text  # noqa: E402


VARIANTS = ("lora", "elastic", "sparse", "qa", "naive")
SEED = 0
RANK = 32
# Shares of the time, of which each part takes at most what it and those before it have not used.
PARTS = {"training": 0.5, "counts": 0.1, "methods": 0.4}
GIB = 2**30


class OutOfTime(Exception):
    """There is none left for what comes next."""


class Budget:
    def __init__(self, minutes: float, begin: float) -> None:
        self.end = begin + 60 * minutes - 3  # seconds to write, and to end

    def left(self) -> float:
        return self.end - time.monotonic()

    def need(self, seconds: float, what: str) -> None:
        if self.left() < seconds:
            raise OutOfTime(f"{what}: {seconds:.0f} s needed, {max(0.0, self.left()):.0f} s left")


# -- the device -----------------------------------------------------------------------------------------------------------


class Device:
    """Time and memory of a device of torch; on the CPU the clock of the host, and no memory."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.module: Any = None if self.device.type == "cpu" else getattr(torch, self.device.type)
        if self.module is not None and self.device.index is not None and hasattr(self.module, "set_device"):
            self.module.set_device(self.device)

    def synchronize(self) -> None:
        if self.module is not None:
            self.module.synchronize()

    def time(self, step: Callable[[], Any]) -> tuple[float, float]:
        """Seconds until `step` was done, and until the host had queued it."""
        self.synchronize()
        begin = time.perf_counter()
        if self.module is None or not hasattr(self.module, "Event"):
            step()
            queued = time.perf_counter() - begin
            self.synchronize()
            return time.perf_counter() - begin, queued
        first, last = (self.module.Event(enable_timing=True) for _ in range(2))
        first.record()
        step()
        last.record()
        queued = time.perf_counter() - begin
        self.synchronize()
        return first.elapsed_time(last) / 1e3, queued

    def free(self) -> int | None:
        return self.module.mem_get_info(self.device)[0] if hasattr(self.module, "mem_get_info") else None

    def forget(self) -> None:
        gc.collect()
        if self.module is not None and hasattr(self.module, "empty_cache"):
            self.module.empty_cache()

    @contextlib.contextmanager
    def memory(self, into: dict[str, Any]) -> Iterator[None]:
        """Notes what was allocated `before`, and the `peak` inside, in bytes."""
        if not hasattr(self.module, "max_memory_allocated"):
            yield
            return
        self.synchronize()
        into["before"] = self.module.memory_allocated(self.device)
        self.module.reset_peak_memory_stats(self.device)
        yield
        self.synchronize()
        into["peak"] = self.module.max_memory_allocated(self.device)

    def about(self) -> dict[str, Any]:
        about: dict[str, Any] = {"device": str(self.device)}
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            about |= {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
                "capability": f"{properties.major}.{properties.minor}",
                "cuda": torch.version.cuda or torch.version.hip,
                "tf32": torch.backends.cuda.matmul.allow_tf32,
                "nvidia-smi": _nvidia_smi(),
            }
        elif self.module is not None and hasattr(self.module, "get_device_name"):
            about["name"] = self.module.get_device_name(self.device)
        try:
            import triton

            about["triton"] = triton.__version__
        except ImportError:
            about["triton"] = None
        return about


def _nvidia_smi() -> list[str]:
    """A line for each GPU: name, driver, memory, limits."""
    asked = "index,name,driver_version,memory.total,power.limit,clocks.max.sm,temperature.gpu,utilization.gpu"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


# -- models ---------------------------------------------------------------------------------------------------------------


def make_base(args: argparse.Namespace, device: Device) -> LlamaForCausalLM:
    """Blocks of random weights, half of them zero, in bfloat16 on the device."""
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=max(4096, *args.seq),
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device.device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model = model.to(device.device).eval().requires_grad_(False)
    prune(model, MagnitudeConfig(sparsity=0.5), progress=False)
    return model


def build(variant: str, base: LlamaForCausalLM, args: argparse.Namespace) -> nn.Module:
    """The blocks of `base`, whose weights are shared, with the adapter of `variant`."""
    body = copy.deepcopy(base.model, {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]})
    settings: dict[str, Any] = {"r": args.rank, "lora_alpha": 2 * args.rank, "target_modules": LINEAR_LAYERS}
    if variant in ("sparse", "qa"):
        rounding = {"quantization_aware": True, "bits": 4, "group_size": args.group_size} if variant == "qa" else {}
        config: Any = SparseQALoraConfig(**settings, elastic_ranks=[args.rank], **rounding)
    else:
        config = ElasticLoraConfig(**settings) if variant == "elastic" else LoraConfig(**settings)
    torch.manual_seed(SEED)
    model = get_peft_model(Layers(body, args.hidden), config)
    if variant == "naive":
        _make_naive(model)
    return model.train()


def make_step(
    variant: str, model: nn.Module, batch: dict[str, torch.Tensor], device: Device
) -> Callable[[], torch.Tensor]:
    """A function that trains one step as Trainer does, and returns the loss, which is still on the device."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    callback = SubnetSamplingCallback() if variant == "elastic" else None
    settings, state = SimpleNamespace(seed=SEED), SimpleNamespace(global_step=0)
    if callback is not None:
        callback.on_train_begin(settings, TrainerState(max_steps=sys.maxsize), TrainerControl(), model=model)

    def step() -> torch.Tensor:
        if callback is not None:
            callback.on_step_begin(settings, state, TrainerControl())
        with torch.autocast(device.device.type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        batch["inputs"].grad = None
        if callback is not None:
            callback.on_step_end(settings, state, None)
        state.global_step += 1
        return loss.detach()

    return step


def make_batch(args: argparse.Namespace, sequences: int, length: int, device: Device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    shape = (sequences, length, args.hidden)
    inputs, slopes = (torch.randn(shape, generator=generator).to(device.device, torch.bfloat16) for _ in range(2))
    return {"inputs": inputs.requires_grad_(), "slopes": slopes}  # a gradient for the inputs, as inside of a model


# -- training -------------------------------------------------------------------------------------------------------------


def measure_training(
    base: Any, args: argparse.Namespace, device: Device, budget: Budget, results: dict[str, Any]
) -> None:
    for position, length in enumerate(args.seq):
        now = time.monotonic()
        end = now + max(0.0, results["training_until"] - now) / (len(args.seq) - position)
        rows: dict[str, dict[str, Any]] = {variant: {"variant": variant, "seq": length} for variant in VARIANTS}
        sequences = max(1, args.tokens // length)
        while True:
            try:
                batch = make_batch(args, sequences, length, device)
                for variant in VARIANTS:
                    _measure_memory(variant, rows[variant], base, batch, args, device, budget)
                break
            except torch.OutOfMemoryError:
                if sequences == 1:
                    raise
                sequences //= 2
                log(f"out of memory: {sequences} sequences of {length} tokens instead")
                batch = {}
                device.forget()
        for row in rows.values():
            row["batch"] = sequences
        results["training"] += rows.values()  # with what is known so far
        results["save"]()
        _measure_time(rows, base, batch, args, device, budget, end)
        results["save"]()
        del batch
        device.forget()


def _measure_memory(
    variant: str, row: dict[str, Any], base: Any, batch: Any, args: argparse.Namespace, device: Device, budget: Budget
) -> None:
    """Peak memory of a variant alone, in its second step, when the optimizer has its state; and the seconds of that step."""
    budget.need(5 if args.smoke else 10, f"{variant}, {row['seq']} tokens")
    model = build(variant, base, args)
    with torch.autocast(device.device.type, dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    row["loss"], row["gradient"] = (
        float(loss.detach()),
        float(torch.stack([each.float().norm() for each in gradients]).norm()),
    )
    del loss, gradients
    model.zero_grad()
    step = make_step(variant, model, batch, device)
    step()
    with device.memory(row):
        row["second_step"], _ = device.time(step)
    del step, model
    device.forget()


def _measure_time(
    rows: dict[str, dict[str, Any]],
    base: Any,
    batch: Any,
    args: argparse.Namespace,
    device: Device,
    budget: Budget,
    end: float,
) -> None:
    expected = sum(row["second_step"] for row in rows.values())
    budget.need((args.warm_up + args.fewest) * expected, "rounds of training steps")
    steps = {variant: make_step(variant, build(variant, base, args), batch, device) for variant in VARIANTS}
    for row in rows.values():
        row["seconds"], row["queued"] = [], []
    rng = np.random.default_rng(SEED)
    begin = time.monotonic()
    for number in range(args.warm_up + args.rounds):
        took = (time.monotonic() - begin) / max(1, number) if number else expected
        enough = number >= args.warm_up + args.fewest
        if budget.left() < 2 * took or (enough and time.monotonic() + took > end):
            break
        for variant in rng.permutation(VARIANTS):
            seconds, queued = device.time(steps[variant])
            if number >= args.warm_up:
                rows[variant]["seconds"].append(seconds)
                rows[variant]["queued"].append(queued)
    for row in rows.values():
        row["rounds"] = len(row["seconds"])


# -- counts ---------------------------------------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Counts the operators that are no views, in both passes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func._schema.returns
        if not any(each.alias_info is not None and not each.alias_info.is_write for each in results):
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_kernels(step: Callable[[], Any], device: Device) -> int | None:
    """Kernels of one step; None where the profiler sees none."""
    if device.device.type != "cuda":
        return None
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step()
            device.synchronize()
        events = profiler.profiler.kineto_results.events()
        found = [event.name() for event in events if event.device_type() == DeviceType.CUDA]
    except (AssertionError, AttributeError, RuntimeError) as error:
        log(f"the profiler counts nothing here: {error}")
        return None
    # beside kernels there are copies, fills, and the ranges of optimizers and of the profiler
    return (
        sum(not name.startswith(("Memcpy", "Memset", "Optimizer.", "ProfilerStep", "gpu_")) for name in found) or None
    )


def measure_counts(
    base: Any, args: argparse.Namespace, device: Device, budget: Budget, results: dict[str, Any]
) -> None:
    length = args.seq[0]
    sequences = min([row["batch"] for row in results["training"] if row["seq"] == length] or [1])
    batch = make_batch(args, sequences, length, device)
    for variant in VARIANTS:
        budget.need(1 if args.smoke else 10, f"counts of {variant}")
        step = make_step(variant, build(variant, base, args), batch, device)
        step()
        operators = Operators()
        with operators:
            step()
        row = {
            "variant": variant,
            "seq": length,
            "operators": operators.names.total(),
            "kernels": count_kernels(step, device),
        }
        row["most_frequent"] = operators.names.most_common(8)
        results["counts"].append(row)
        results["save"]()
        del step
        device.forget()


# -- pruning and quantisation ---------------------------------------------------------------------------------------------


def measure_methods(
    base: Any, args: argparse.Namespace, device: Device, budget: Budget, results: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(SEED + 1)
    length = args.seq[0]
    ids = torch.randint(args.vocabulary, (args.calibration, length), generator=generator)
    calibration = [{"input_ids": piece} for piece in ids.split(4)]
    shorter = [{"input_ids": piece} for piece in ids[: max(4, args.calibration // 4)].split(4)]
    rounding = {"bits": 4, "group_size": args.group_size}
    structured = MultiPrunerConfig(ratio=0.1, stages=("sub-blocks", "channels"), split=(50, 50))
    methods: dict[str, tuple[Callable[[Any], Any], int]] = {
        "magnitude": (lambda model: prune(model, MagnitudeConfig(sparsity=0.6), progress=False), 0),
        "Wanda": (lambda model: prune(model, WandaConfig(sparsity=0.6), calibration, progress=False), len(ids)),
        "rounding to nearest": (lambda model: quantize(model, RTNConfig(**rounding), progress=False), 0),
        "structured": (
            lambda model: prune_structured(model, structured, shorter, progress=False),
            sum(len(s["input_ids"]) for s in shorter),
        ),
        "GPTQ": (lambda model: quantize(model, GPTQConfig(**rounding), calibration, progress=False), len(ids)),
        "SparseGPT": (
            lambda model: prune(model, SparseGPTConfig(sparsity=0.6), calibration, progress=False),
            len(ids),
        ),
    }
    for name, (run, sequences) in methods.items():
        budget.need(2 if args.smoke else 15, name)
        results["running"] = name
        model = copy.deepcopy(base)
        row: dict[str, Any] = {"method": name, "blocks": args.blocks, "sequences": sequences, "seq": length}
        with device.memory(row):
            device.synchronize()
            begin = time.perf_counter()
            report = run(model)
            device.synchronize()
            row["seconds"] = time.perf_counter() - begin
        row["report"] = _summary(report)
        results["methods"].append(row)
        results["save"]()
        del model
        device.forget()
    results["running"] = None


def _summary(report: Any) -> dict[str, float]:
    names = ("sparsity", "weight_error", "output_error", "evaluations", "block_passes")
    found = {name: getattr(report, name, None) for name in names}
    return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}


# -- report ---------------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    settings, about = results["settings"], results["device"]
    parts = []
    if settings["smoke"]:
        parts.append("**A smoke run with tiny sizes: its figures mean nothing.**")
    smi = f" nvidia-smi: {'; '.join(about['nvidia-smi'])}." if about.get("nvidia-smi") else ""
    memory = f", {about['memory_bytes'] / GIB:.0f} GiB" if "memory_bytes" in about else ""
    parts.append(
        f"{about.get('name', about['device'])}{memory}, CUDA {about.get('cuda')}, triton {about['triton']}.{smi} "
        f"Host: {describe_machine(results['machine'])}"
    )
    parts.append(
        f"{settings['blocks']} block(s) of {settings['hidden']} and {settings['intermediate']} with {settings['heads']} heads, bfloat16, half "
        f"of the weights zero; r={settings['rank']} on all linear layers, 4 bits in groups of {settings['group_size']}; seed {SEED}."
    )
    if results["unfinished"]:
        parts.append("Not measured: " + "; ".join(results["unfinished"]) + ".")
    counts = {row["variant"]: row for row in results["counts"]}
    first = settings["seq"][0]
    lines = []
    for row in results["training"]:
        lora = next((r for r in results["training"] if (r["variant"], r["seq"]) == ("lora", row["seq"])), {})
        count = counts.get(row["variant"], {}) if row["seq"] == first else {}
        lines.append(
            [
                row["variant"],
                _batch(row),
                *_times(row, lora),
                *_memory(row),
                _or(count.get("kernels")),
                _or(count.get("operators")),
            ]
        )
    header = [
        "variant",
        "batch",
        "step ms: median (10% to 90%)",
        "/ lora",
        "queued ms",
        "peak GiB",
        "GiB above the model",
        "kernels",
    ]
    parts.append(table([*header, "operators"], lines))
    parts += _disagreements(results["training"])
    lines = []
    for row in results["methods"]:
        said = ", ".join(f"{name} {value:.3g}" for name, value in row["report"].items())
        data = f"{row['sequences']} x {row['seq']} tokens" if row["sequences"] else ""
        lines.append(
            [
                row["method"],
                f"{row['seconds']:.2f}",
                f"{row['seconds'] / row['blocks']:.2f}",
                data,
                _memory(row)[0],
                said,
            ]
        )
    parts.append(table(["method", "seconds", "a block", "calibration", "peak GiB", "report"], lines))
    parts.append(f"{results['seconds']:.0f} s in all, of {60 * settings['minutes']:.0f}.")
    return "\n\n".join(parts)


def _or(value: Any) -> str:
    return "" if value is None else f"{value:,}"


def _batch(row: dict[str, Any]) -> str:
    return f"{row.get('batch', '?')} x {row['seq']}"


def _times(row: dict[str, Any], lora: dict[str, Any]) -> list[str]:
    seconds = row.get("seconds")
    if not seconds:
        return [f"{row['second_step'] * 1e3:.1f} (one step)" if "second_step" in row else "", "", ""]
    at = {name: value * 1e3 for name, value in summarize(seconds).items()}
    ratio = (
        np.median(np.divide(seconds, lora["seconds"])) if len(lora.get("seconds") or ()) == len(seconds) else math.nan
    )
    return [
        f"{at['median']:.1f} ({at['p10']:.1f} to {at['p90']:.1f})",
        f"{ratio:.2f}",
        f"{np.median(row['queued']) * 1e3:.1f}",
    ]


def _memory(row: dict[str, Any]) -> list[str]:
    return [f"{row['peak'] / GIB:.2f}", f"{(row['peak'] - row['before']) / GIB:.2f}"] if "peak" in row else ["", ""]


def _disagreements(rows: list[dict[str, Any]]) -> list[str]:
    """B is zero at first, so that all but `qa` compute the same; and what is masked has the gradient of the formula."""
    said = []
    for row in rows:
        for other in rows:
            same = {"loss": ("sparse", "elastic", "naive"), "gradient": ("naive",)}
            pairs = {"loss": "lora", "gradient": "sparse"}
            for key, variants in same.items():
                if (other["variant"], other["seq"]) != (pairs[key], row["seq"]) or row["variant"] not in variants:
                    continue
                if key in row and key in other and not abs(row[key] - other[key]) <= 0.05 * max(1e-4, abs(other[key])):
                    said.append(
                        f"{key} of {row['variant']}, {_batch(row)}: {row[key]:.6f}, {other['variant']} {other[key]:.6f}"
                    )
    return [f"**The variants do not compute the same:** {'; '.join(said)}."] if said else []


class Results(dict):
    """What is known so far; `save` writes it."""

    def __init__(self, args: argparse.Namespace, device: Device, begin: float) -> None:
        settings = {key: value for key, value in vars(args).items() if key not in ("out", "device")}
        super().__init__(
            smoke=args.smoke, settings=settings, machine=machine(), device=device.about(), training=[], counts=[], methods=[],
            unfinished=list(PARTS), running=None, seconds=0.0,
        )  # fmt: skip
        self.out, self.begin, self.lock = args.out, begin, threading.RLock()
        self["save"] = self.save

    def save(self) -> str:
        with self.lock:
            self["seconds"] = time.monotonic() - self.begin
            kept = {key: value for key, value in self.items() if key not in ("save", "training_until")}
            name = "gpu-smoke" if self["smoke"] else "gpu"
            text = report(self)
            self.out.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.out / f"{name}.json", json.dumps(kept, indent=1, default=str))
            atomic_write_text(self.out / f"{name}.md", text + "\n")
            return text


def stop_at_the_end(results: Results, budget: Budget) -> None:
    """Ends the process when the time is over, in the middle of whatever it is doing."""

    def stop() -> None:
        doing = results["running"]
        waiting = [part for part in results["unfinished"] if part != doing]
        results["unfinished"] = [*waiting, *([f"{doing} (cut off)"] if doing else [])]
        with contextlib.suppress(Exception):  # a row that is just being written; what was saved before is on disk
            print(results.save(), flush=True)
        log("The time is over.")
        os._exit(3)

    timer = threading.Timer(max(0.1, budget.left()), stop)
    timer.daemon = True
    timer.start()


def choose_blocks(args: argparse.Namespace, device: Device) -> int:
    """Four, or as many as fit: of a block the weights twice, activations, and what the naive formula keeps of each weight."""
    free = device.free()
    if free is None or args.smoke:
        return 2 if args.smoke else 1
    weights = 4 * args.hidden**2 + 3 * args.hidden * args.intermediate
    a_block = 16 * weights + 2 * args.tokens * (16 * args.hidden + 6 * args.intermediate)
    rest = 4 * args.vocabulary * args.hidden * 2 + 2 * GIB
    return int(min(4, max(1, (free - rest) // a_block)))


def main(argv: list[str] | None = None, begin: float | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="of the whole process, at most; default 8")
    parser.add_argument(
        "--device", help="cuda, cuda:1, xpu, mps; default: the first CUDA device, and with --smoke the CPU"
    )
    parser.add_argument(
        "--seq", nargs="+", type=int, default=[512, 1024], help="lengths of sequences, default 512 and 1024"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="in a batch; fewer if they do not fit; default 4096")
    parser.add_argument("--blocks", type=int, help="default: 4, or as many as fit")
    parser.add_argument("--rounds", type=int, default=40, help="of training steps that are timed, at most; default 40")
    parser.add_argument(
        "--calibration", type=int, default=64, help="sequences for pruning and quantisation, default 64"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of gpu.json and gpu.md; default: benchmarks/results, and with --smoke a temporary one",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny blocks, few rounds: the figures mean nothing")
    args = parser.parse_args(argv)
    if not args.minutes > 0 or args.tokens < 1 or min(args.seq) < 2 or args.rounds < 1 or args.calibration < 1:
        parser.error("--minutes, --tokens, --seq, --rounds and --calibration must be positive, --seq at least 2")
    if args.blocks is not None and args.blocks < 1:
        parser.error("--blocks must be at least 1")
    args.vocabulary, args.hidden, args.intermediate, args.heads, args.rank, args.group_size = (
        32000,
        4096,
        11008,
        32,
        RANK,
        128,
    )
    args.warm_up, args.fewest = 3, 3
    if args.smoke:
        args.vocabulary, args.hidden, args.intermediate, args.heads, args.rank, args.group_size = 64, 32, 64, 4, 4, 16
        args.seq, args.tokens, args.calibration = [8], 32, 8
        args.rounds, args.warm_up, args.fewest = 2, 1, 1
    if args.device is None:
        args.device = "cuda:0" if torch.cuda.is_available() and not args.smoke else "cpu"
    if torch.device(args.device).type == "cpu" and not args.smoke:
        parser.error(
            "there is no CUDA device: --device names another accelerator, and --smoke tries the script on the CPU"
        )
    if args.out is None:
        args.out = Path(tempfile.mkdtemp(prefix="peft-elastic-gpu-smoke-")) if args.smoke else RESULTS

    budget = Budget(args.minutes, time.monotonic() if begin is None else begin)
    device = Device(args.device)
    args.blocks = args.blocks or choose_blocks(args, device)
    results = Results(args, device, time.monotonic() if begin is None else begin)
    if begin is not None:
        stop_at_the_end(results, budget)
    log(f"{results['device'].get('name', args.device)}: {args.blocks} block(s), {budget.left():.0f} s left")
    base = make_base(args, device)
    missing = [f"{part} (not asked for)" for part in PARTS if part not in args.parts]
    share = sum(PARTS[part] for part in args.parts)
    until = time.monotonic()
    for part, measure in (("training", measure_training), ("counts", measure_counts), ("methods", measure_methods)):
        if part not in args.parts:
            continue
        until += (budget.end - until) * PARTS[part] / share if share else 0.0
        share -= PARTS[part]
        results["training_until"] = until
        results["running"] = part
        try:
            measure(base, args, device, budget, results)
        except OutOfTime as error:
            missing.append(f"{part} ({error})")
        except Exception as error:  # the other parts are worth having all the same
            log(f"{part} failed: {error!r}")
            missing.append(f"{part} (failed: {type(error).__name__}: {error})")
            if args.smoke:
                raise
        finally:
            device.forget()
        results["running"] = None
        left = [p for p in args.parts if p not in args.parts[: args.parts.index(part) + 1]]
        results["unfinished"] = [*missing, *left]
        results.save()
    print(results.save())
    log(f"Written to {args.out}.")
    return results


if __name__ == "__main__":
    main(begin=_BEGIN)
