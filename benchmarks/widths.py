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
"""How fast narrowed models are: training steps, extracted models, and how well `LatencyModel` predicts them.

    OMP_NUM_THREADS=1 python benchmarks/widths.py --out outputs/widths                   # both models, about 40 minutes
    OMP_NUM_THREADS=1 python benchmarks/widths.py --models minilm --out outputs/widths
    python benchmarks/widths.py --smoke --out outputs/widths-smoke                       # random models, a minute

Of SmolLM2-135M (a language model: prompts of 128 tokens, and decode steps behind 128 tokens, these with batch 1 and 8) and of
all-MiniLM-L6-v2 (an encoder: 32 and 128 tokens, batch 1 and 8):

- training: the step of a subnet of half the MLP channels and half the heads (two of SmolLM2's three key-value groups) against the
  step of the whole model, with adapters on all linear layers; steps take turns.
- speed-up: subnets with about 0.84 and 0.76 of the parameters, drawn at random, extracted and merged, against the max subnet
  extracted in the same way; runs take turns, medians. Beside it what `LatencyModel` predicts.
- prediction: relative error over random subnets of all sizes.

`--models sparse` is SmolLM2 with half of its weights zero and masked adapters, deployed with the layers of the sparse kernel that pay
(`sparse_kernel="auto"`): speed-up and prediction of decode steps, no training.

OUT/widths.json holds everything, and the tables are printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _support import describe_machine, machine, table
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

from peft_elastic import (
    ElasticLoraConfig,
    LatencyModel,
    MagnitudeConfig,
    SearchSpace,
    SparseLinear,
    SparseQALoraConfig,
    Subnet,
    prune,
)
from peft_elastic.common import assets
from peft_elastic.common.progress import progress_bar
from peft_elastic.common.writing import atomic_write_text


SHARES = (0.84, 0.76)
WORKLOADS: dict[str, list[tuple[str, tuple[int, int]]]] = {
    "smollm2": [("forward", (1, 128)), ("decode", (1, 128)), ("decode", (8, 128))],
    "minilm": [("forward", (1, 32)), ("forward", (8, 32)), ("forward", (1, 128)), ("forward", (8, 128))],
}
WORKLOADS["sparse"] = [("decode", (1, 128))]
CALLED = {"smollm2": "SmolLM2-135M", "minilm": "all-MiniLM-L6-v2", "sparse": "SmolLM2-135M, half of the weights zero"}


def load(name: str, smoke: bool) -> nn.Module:
    torch.manual_seed(0)
    if name != "minilm":
        if smoke:
            sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 6}
            return AutoModelForCausalLM.from_config(
                LlamaConfig(vocab_size=512, num_key_value_heads=3, head_dim=16, **sizes)
            )
        return AutoModelForCausalLM.from_pretrained(assets.smollm2_135m(), dtype=torch.float32)
    if smoke:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
        return AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=512, **sizes))
    return AutoModelForSequenceClassification.from_pretrained(assets.minilm_l6(), num_labels=2)


def build(name: str, smoke: bool) -> PeftModel:
    """A super-network in rank, heads, MLP channels and whole blocks. Speed does not depend on the order of the channels."""
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    base = load(name, smoke)
    if name == "sparse":
        prune(base, MagnitudeConfig(sparsity=0.5), progress=False)
    config = (SparseQALoraConfig if name == "sparse" else ElasticLoraConfig)(
        r=16,
        elastic_ranks=[16, 8],
        rank_groups="block",
        target_modules=targets if name == "minilm" else "all-linear",
        elastic_width={"heads": [1.0, 0.5], "mlp": [1.0, 0.875, 0.75, 0.625, 0.5]},
        elastic_depth=None if name == "minilm" else ["all"],
        importance="none",
    )
    return get_peft_model(base, config).eval()


# -- training ----------------------------------------------------------------------------------------------------------


def half_width(space: SearchSpace) -> Subnet:
    """The largest subnet but for its width, of which it has the least."""
    return Subnet({choice.key: choice.options[-1 if choice.kind in ("heads", "mlp") else 0] for choice in space})


def training_steps(model: PeftModel, name: str, rounds: int) -> dict[str, Any]:
    """Seconds of training steps of the whole model and of the one of half width, taking turns."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 500, (2, 128) if name == "smollm2" else (16, 32), generator=generator)
    labels = tokens if name == "smollm2" else torch.zeros(len(tokens), dtype=torch.int64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    subnets = {"whole": model.search_space.max, "half": half_width(model.search_space)}
    seconds: dict[str, list[float]] = {key: [] for key in subnets}
    model.train()
    for number in progress_bar(range(rounds + 2), desc=f"{name}: training"):
        for key, subnet in subnets.items():
            start = time.perf_counter()
            model.sample_subnet(subnet)
            model(input_ids=tokens, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number >= 2:
                seconds[key].append(time.perf_counter() - start)
    model.eval()
    total = sum(p.numel() for p in model.get_base_model().parameters() if not p.requires_grad)
    space = model.search_space
    removed = space.count_base_parameters(space.max) - space.count_base_parameters(subnets["half"])
    return {"seconds": seconds, "tokens": list(tokens.shape), "parameters": 1 - removed / total}


# -- inference ---------------------------------------------------------------------------------------------------------


def subnets_near(space: SearchSpace, total: int, share: float, number: int) -> list[Subnet]:
    """Random subnets with about this share of the parameters."""
    whole = space.count_base_parameters(space.max)

    def distance(subnet: Subnet) -> float:
        return abs(1 - (whole - space.count_base_parameters(subnet)) / total - share)

    drawn: list[Subnet] = []
    for seed in range(4000):
        subnet = space.sample(seed)
        # most random subnets are small: put some of their choices back to the largest
        rng = torch.Generator().manual_seed(seed)
        back = torch.rand(len(space), generator=rng) < torch.rand(1, generator=rng)
        drawn.append(
            Subnet({c.key: c.options[0] if put_back else subnet[c.key] for c, put_back in zip(space, back.tolist())})
        )
    return sorted(dict.fromkeys(drawn), key=distance)[:number]


def count(model: nn.Module) -> int:
    """Parameters, zeros of sparse layers included."""
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    return sum(p.numel() for p in model.parameters()) + sum(m.out_features * m.in_features for m in sparse)


def kernel_of(latencies: list[LatencyModel]) -> str | bool:
    """`sparse_kernel` of the models that these predict."""
    return "auto" if latencies[0].workload["kernel"] == "auto" else False


def speed_ups(
    model: PeftModel, latencies: list[LatencyModel], args: argparse.Namespace
) -> list[list[dict[str, float]]]:
    """For each workload, measured and predicted speed-up of extracted subnets against the extracted max subnet."""
    space = model.search_space
    total = sum(p.numel() for n, p in model.get_base_model().named_parameters() if "lora_" not in n)
    whole = model.extract_subnet("max", sparse_kernel=kernel_of(latencies)).eval()
    size = count(whole)
    rows: list[list[dict[str, float]]] = [[] for _ in latencies]
    subnets = [(share, s) for share in SHARES for s in subnets_near(space, total, share, args.subnets_per_share)]
    for share, subnet in progress_bar(subnets, desc="speed-up"):
        small = model.extract_subnet(subnet, sparse_kernel=kernel_of(latencies)).eval()
        for latency, found in zip(latencies, rows):
            steps = [latency.stepper(whole), latency.stepper(small)]
            seconds = [[step() for step in steps] for _ in range(args.repeats)][2:]
            medians = [statistics.median(times) for times in zip(*seconds)]
            found.append(
                {
                    "share": share,
                    "parameters": count(small) / size,
                    "measured": medians[0] / medians[1],
                    "predicted": latency.predict("max") / latency.predict(subnet),
                }
            )
    return rows


def predictions(model: PeftModel, latencies: list[LatencyModel], args: argparse.Namespace) -> list[dict[str, Any]]:
    """For each workload, predicted and measured seconds of random subnets."""
    found: list[dict[str, Any]] = [{"predicted": [], "measured": []} for _ in latencies]
    for seed in progress_bar(range(args.random_subnets), desc="prediction"):
        subnet = model.search_space.sample(1000 + seed)
        small = model.extract_subnet(subnet, sparse_kernel=kernel_of(latencies)).eval()
        for latency, row in zip(latencies, found):
            checked = latency.validate([subnet], lambda _, small=small: small, seconds=args.seconds)
            row["predicted"] += checked.predicted
            row["measured"] += checked.measured
    return found


# -- report ------------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    training, inference, errors = [], [], []
    for name, found in results["models"].items():
        if found["training"] is not None:
            steps = found["training"]["seconds"]
            ratios = sorted(half / whole for half, whole in zip(steps["half"], steps["whole"]))
            training.append(
                [
                    CALLED[name],
                    " x ".join(map(str, found["training"]["tokens"])),
                    f"{found['training']['parameters']:.2f}",
                    f"{statistics.median(steps['whole']):.3f}",
                    f"{statistics.median(ratios):.3f} [{ratios[len(ratios) // 10]:.3f}, {ratios[-1 - len(ratios) // 10]:.3f}]",
                ]
            )
        for workload in found["workloads"]:
            what = f"{workload['mode']}, {workload['inputs'][0]} x {workload['inputs'][1]}"
            for share in SHARES:
                rows = [row for row in workload["speed_up"] if row["share"] == share]
                measured = [row["measured"] for row in rows]
                inference.append(
                    [
                        CALLED[name],
                        what,
                        f"{statistics.mean(row['parameters'] for row in rows):.2f}",
                        f"{statistics.median(measured):.2f}x [{min(measured):.2f}, {max(measured):.2f}]",
                        f"{statistics.median(row['predicted'] for row in rows):.2f}x",
                    ]
                )
            pairs = zip(workload["prediction"]["predicted"], workload["prediction"]["measured"])
            error = sorted(abs(p / m - 1) for p, m in pairs)
            errors.append(
                [
                    CALLED[name],
                    what,
                    f"{1e3 * workload['max_seconds']:.1f}",
                    f"{100 * statistics.median(error):.1f}%",
                    f"{100 * error[len(error) * 9 // 10]:.1f}%",
                    f"{100 * error[-1]:.1f}%",
                ]
            )
    settings = results["settings"]
    return "\n\n".join(
        [
            f"float32, {results['threads']} thread(s). {describe_machine(results['machine'])}",
            table(
                ["training", "batch x tokens", "parameters", "step s", "half width / whole: median [10%, 90%]"],
                training,
            ),
            table(
                [
                    f"extracted, {settings['subnets_per_share']} subnets each",
                    "batch x tokens",
                    "parameters",
                    "measured",
                    "predicted",
                ],
                inference,
            ),
            table(
                [
                    f"error over {settings['random_subnets']} random subnets",
                    "batch x tokens",
                    "max ms",
                    "median",
                    "90%",
                    "worst",
                ],
                errors,
            ),
        ]
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/widths"), help="folder, default %(default)s")
    parser.add_argument("--models", nargs="+", choices=list(WORKLOADS), default=["smollm2", "minilm"])
    parser.add_argument("--rounds", type=int, default=30, help="training steps of each width")
    parser.add_argument("--subnets-per-share", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=10, help="runs of each extracted model")
    parser.add_argument("--random-subnets", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each random subnet")
    parser.add_argument("--smoke", action="store_true", help="random models, a few runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.rounds, args.subnets_per_share, args.repeats, args.random_subnets, args.seconds = 3, 1, 5, 3, 0.0
    models: dict[str, Any] = {}
    file = args.out / "widths.json"
    if file.exists():
        models = json.loads(file.read_text())["models"]
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "models")}
    results: dict[str, Any] = {"settings": settings, "threads": torch.get_num_threads(), "models": models}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        model = build(name, args.smoke)
        trained = None if name == "sparse" else training_steps(model, name, args.rounds)
        found: dict[str, Any] = {"training": trained, "workloads": []}
        latencies = []
        for mode, (batch, tokens) in progress_bar(WORKLOADS[name], desc=f"{name}: measuring"):
            inputs = {"input_ids": (batch, 8 if args.smoke else tokens)}
            kernel = "auto" if name == "sparse" else "dense"
            latencies.append(LatencyModel(model, inputs, mode, kernel, seconds=1 if args.smoke else 20))
        measured = speed_ups(model, latencies, args), predictions(model, latencies, args)
        for (mode, shape), latency, rows, errors in zip(WORKLOADS[name], latencies, *measured):
            found["workloads"].append(
                {
                    "mode": mode,
                    "inputs": shape,
                    "max_seconds": latency.predict("max"),
                    "speed_up": rows,
                    "prediction": errors,
                }
            )
        models[name] = found
        results["machine"] = machine()
        atomic_write_text(file, json.dumps(results))
    print(f"\n{report(results)}")
    return results


if __name__ == "__main__":
    main()
