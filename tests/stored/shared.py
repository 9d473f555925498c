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
"""What the script that writes the stored files shares with the tests that read them. It runs with the package of then and of now, so
it uses the public interface alone."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import re
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments

from peft_elastic import (
    BlockPrunerConfig,
    ElasticTrainer,
    LatencyModel,
    MagnitudeConfig,
    MultiPrunerConfig,
    QuantizedLinear,
    SandwichSampler,
    SparseLinear,
    Stage,
    SubnetSamplingCallback,
    TwoStagePrunerConfig,
    WidthPrunerConfig,
    densify_linears,
    prune,
    sparsify_linears,
)


STORED = Path(__file__).resolve().parent
VERSIONS = ("torch", "transformers", "peft", "safetensors", "numpy", "pymoo")
VOCABULARY = 48

# Of float32 computations and of bfloat16 ones, as a share of the largest output.
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 6e-2}


def level() -> str | None:
    """Instruction set of the kernels; None without the C++ extension, which packed weights need."""
    try:
        return sparsify_linears(nn.Sequential(nn.Linear(8, 8)), when="always", min_sparsity=0).level
    except ValueError:
        return None


def machine() -> dict[str, str]:
    """What the last bits of a floating-point computation depend on. Equal machines give equal bits, with one thread."""
    try:
        entries = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        found = {name.strip(): value.strip() for name, _, value in entries}
    except OSError:
        found = {"model name": platform.processor()}
    # many virtual machines have one name for processors that differ
    names = ("vendor_id", "model name", "cpu family", "model", "stepping", "flags")
    cpu = hashlib.sha256(" ".join(found.get(name, "") for name in names).encode()).hexdigest()[:16]
    capability = torch.backends.cpu.get_cpu_capability()
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {
        "level": str(level()),
        "cpu": f"{found.get('model name')} {cpu}",
        "torch capability": capability,
        **versions,
    }


def input_ids() -> torch.Tensor:
    """Two sequences, int64 (2, 6)."""
    return (torch.arange(12).reshape(2, 6) * 17 + 5) % (VOCABULARY - 3) + 3


def logits(model: Any) -> torch.Tensor:
    """Of the last position, which every other one has a part in, (2, vocabulary)."""
    with torch.no_grad():
        return model(input_ids=input_ids()).logits[:, -1].clone()


def layer_inputs(in_features: int) -> torch.Tensor:
    """Float32 (3, in_features)."""
    return torch.sin(torch.arange(3 * in_features, dtype=torch.float64) * 0.7).reshape(3, in_features).float()


def densified(model: Any) -> Any:
    """A copy in which every packed layer is an ordinary one, with the weights that it computes with."""
    model = densify_linears(copy.deepcopy(model))
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            model.set_submodule(name, module.to_linear())
    return model


def digests(model: Any) -> dict[str, str]:
    """What identifies the bits of the weights that a model computes with, block by block."""
    sums: dict[str, Any] = {}
    for name, tensor in sorted(densified(model).state_dict().items()):
        if not tensor.numel():  # marks what was removed
            continue
        block = re.sub(r"(\.\d+)\..*", r"\1", name)
        tensor = tensor + 0  # one zero, as the sign of a weight that was rounded to it is chance
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        sums.setdefault(block, hashlib.sha256()).update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode() + raw)
    return {block: digest.hexdigest()[:16] for block, digest in sums.items()}


# -- models ----------------------------------------------------------------------------------------------------------


def load(folder: Path, dtype: Any = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def base() -> Any:
    """A Llama of three blocks, stored in bfloat16 and computing in float32."""
    return load(STORED / "base")


def first(blocks: int) -> Any:
    """The base with its first blocks alone."""
    model = base()
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    return model


def pruned(blocks: int = 3) -> Any:
    model = first(blocks)
    prune(model, MagnitudeConfig(sparsity=0.5), progress=False)
    return model


# The value type -> how a layer of it is made, with an odd shape and a bias.
OUT, IN, GROUP = 23, 37, 8


def _linear() -> nn.Linear:
    linear = nn.Linear(IN, OUT)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.cos(torch.arange(parameter.numel()) * 1.3).reshape(parameter.shape))
        linear.weight[linear.weight.abs() < 0.6] = 0
    return linear


def _quantized(sparse: bool, in_order: bool = True) -> SparseLinear:
    groups = -(-IN // GROUP)
    rows, columns = torch.arange(OUT)[:, None], torch.arange(IN)
    # scales that float16 cannot hold in one case, and can in the other
    scales = torch.full((OUT, groups), 0.0625) if in_order else 0.01 + (rows * groups + torch.arange(groups)) / 3000
    return SparseLinear.from_quantized(
        q=torch.where((rows + columns) % 3 == 0, 7, (rows * 5 + columns * 3) % 16),
        scales=scales,
        zeros=torch.full((OUT, groups), 7),
        g_idx=None if in_order else (columns // GROUP)[torch.arange(IN) * 5 % IN].int(),
        group_size=GROUP,
        bias=_linear().bias,
        sparse=sparse,
    )


LAYERS: dict[str, Callable[[], SparseLinear]] = {
    "bf16": lambda: SparseLinear.from_linear(_linear(), "bf16"),
    "int8": lambda: SparseLinear.from_linear(_linear(), "int8"),
    "int4": lambda: _quantized(sparse=True, in_order=False),
    "int4-dense": lambda: _quantized(sparse=False),
}


# -- structured pruning ------------------------------------------------------------------------------------------------

PRUNERS = {
    "block": BlockPrunerConfig(ratio=0.4),
    "width": WidthPrunerConfig(ratio=0.25, mlp_group=8, split=(60, 40)),
    "multi": MultiPrunerConfig(ratio=0.35, mlp_group=8, split=(40, 40, 20)),
    "two-stage": TwoStagePrunerConfig(ratio=0.25, mlp_group=8),
    "l1": WidthPrunerConfig(ratio=0.25, mlp_group=8, split=(60, 40), order="l1"),  # which Intel's file can hold
}
PRUNING_JOURNAL = PRUNERS["multi"]


def calibration() -> list[dict[str, torch.Tensor]]:
    ids = (torch.arange(2 * 3 * 10).reshape(2, 3, 10) * 23 + 11) % (VOCABULARY - 3) + 3
    return [{"input_ids": batch} for batch in ids]


# -- adapters, search and training -------------------------------------------------------------------------------------

TARGETS = ["q_proj", "v_proj", "down_proj"]
INPUTS = {"input_ids": (1, 8)}  # of the latency model
SEARCH: dict[str, Any] = {
    "objectives": ("accuracy", "latency"),
    "n_evals": 18,
    "population": 6,
    "seed": 5,
    "max_latency": "97%",
    "progress": False,
}


def evaluate(model: Any) -> dict[str, float]:
    """A function of the subnet alone, equal on every machine."""
    space, subnet = model.search_space, model.active_subnet
    choices = sorted(space, key=lambda choice: choice.key)
    shares = [subnet[choice.key] / max(choice.options) for choice in choices]
    return {"accuracy": sum(share**0.5 / (i % 5 + 1) for i, share in enumerate(shares)), "sum": sum(subnet.values())}


def held_out(model: Any) -> float:
    return evaluate(model)["accuracy"] / 2


def outcome(result: Any) -> dict[str, Any]:
    """What is read off the result of a search."""
    budget = 0.5 * (result.reference.metrics["latency"] + min(e.metrics["latency"] for e in result.history))
    return {
        "pareto": [evaluation.index for evaluation in result.pareto],
        "best": result.best().to_dict(),
        "best within a budget": result.best(budget=budget).to_dict(),
        "cheapest": result.best(max_drop=3.0).to_dict(),
        "hypervolume": result.hypervolume,
        "sums": {name: sum(e.metrics[name] for e in result.history) for name in result.reference.metrics},
    }


def latency_model(model: Any) -> LatencyModel:
    return LatencyModel(model, INPUTS, seconds=0)


CALLBACKS: dict[str, Callable[[], SubnetSamplingCallback]] = {
    "uniform": lambda: SubnetSamplingCallback("uniform", seed=1),
    "balanced": lambda: SubnetSamplingCallback("balanced", seed=2),
    "stages": lambda: SubnetSamplingCallback(stages=[Stage(("rank",), 1), Stage(("rank", "mlp"), 2)]),
}
STEPS = 6


def drawn(model: Any, folder: Path) -> dict[str, list[dict[str, int]]]:
    """The subnets of the first steps by each way of drawing them."""
    arguments = TrainingArguments(output_dir=str(folder), num_train_epochs=3, seed=4, report_to="none", use_cpu=True)
    found: dict[str, Any] = {}
    for name, make in CALLBACKS.items():
        callback = make()
        callback.on_train_begin(arguments, TrainerState(max_steps=STEPS), None, model=model)
        found[name] = [callback.subnet_of_step(step).to_dict() for step in range(STEPS)]
    sampler = SandwichSampler()
    space = model.search_space
    steps = [sampler.subnets_of_step(space, np.random.default_rng([3, step])) for step in range(3)]
    found["sandwich"] = [subnet.to_dict() for subnets in steps for subnet in subnets]
    return found


def trainer(model: Any, folder: Path) -> ElasticTrainer:
    """Four steps of gradient descent without memory, so that a checkpoint needs no state of the optimizer."""
    ids = (torch.arange(4 * 8).reshape(4, 8) * 29 + 7) % (VOCABULARY - 3) + 3
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,  # all, so that their order does not matter
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0,
        seed=6,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    return ElasticTrainer(
        model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]
    )


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def plan_outcome(plan: Any) -> Mapping[str, Any]:
    """What a plan says but for the time it took."""
    data = json.loads(plan.to_json())
    del data["seconds"]
    for row in data["history"]:
        del row["seconds"]
    return data
