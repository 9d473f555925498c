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
"""What a merge changes, and the memory it takes: LoRA, SparsePEFT and QA-SparsePEFT on a pruned model.

    python benchmarks/merging.py                        # SmolLM2-135M, and one MLP block of a 7B model (layers of 11008 x 4096)
    python benchmarks/merging.py --model tiny           # a random small Llama, seconds

Each variant runs in a process of its own: half of the weights are pruned by magnitude, the adapter gets random weights, and logits
(outputs) are computed before and after `merge_and_unload`. `zeros lost` counts weights that were zero and are not any more,
`integers changed` those that differ from what the unmerged layers computed with. Memory: the resident set before the merge, and
its high-water mark during it (Linux).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from _support import describe_machine, machine, table
from peft import LoraConfig, get_peft_model
from torch import nn
from training import LINEAR_LAYERS, load_dense, resident

from peft_elastic import MagnitudeConfig, QuantizedLinear, SparseQALoraConfig, prune
from peft_elastic.common.progress import progress_bar
from peft_elastic.common.writing import atomic_write_text


VARIANTS = ("lora", "sparse", "qa")
RANK = 32


class Block(nn.Module):
    """The MLP of one block of a 7B model."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"gate_proj": (4096, 11008), "up_proj": (4096, 11008), "down_proj": (11008, 4096)}
        self.layers = nn.ModuleDict(OrderedDict((name, nn.Linear(*size, bias=False)) for name, size in sizes.items()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.layers["gate_proj"](x), self.layers["up_proj"](x)
        return self.layers["down_proj"](nn.functional.silu(gate) * up)


def measure_here(model_name: str | None, variant: str) -> dict[str, Any]:
    torch.manual_seed(0)
    is_block = model_name == "7b-block"
    base: nn.Module = Block() if is_block else load_dense(model_name)[0]
    prune(base, MagnitudeConfig(sparsity=0.5, target_modules=LINEAR_LAYERS if not is_block else None), progress=False)
    settings: dict[str, Any] = {
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [
            name for name in LINEAR_LAYERS if not is_block or name in ("gate_proj", "up_proj", "down_proj")
        ],
    }
    if variant == "lora":
        config: Any = LoraConfig(**settings)
    else:
        qa = {"quantization_aware": True, "bits": 4, "group_size": 32} if variant == "qa" else {}
        config = SparseQALoraConfig(**settings, elastic_ranks=[RANK], **qa)
    zeros = {name: layer.weight == 0 for name, layer in base.named_modules() if isinstance(layer, nn.Linear)}
    model = get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    inputs = torch.randn(64, 4096) if is_block else torch.randint(base.config.vocab_size, (4, 64))
    compute = (lambda m: m(inputs)) if is_block else (lambda m: m(input_ids=inputs).logits)
    integers = {}
    with torch.no_grad():
        before = compute(model)
        if variant == "qa":
            for name, layer in base.named_modules():
                if hasattr(layer, "lora_grid"):
                    integers[name] = layer.lora_grid["default"].quantize(_multiplied_with(layer))
        resident_before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        merged_model = model.merge_and_unload(**({} if variant == "lora" else {"sparse_kernel": False}))
        peak = resident("VmHWM")
        after = compute(merged_model)
    layers = {name: layer for name, layer in merged_model.named_modules() if name in zeros}
    lost = sum(int((layer.weight[zeros[name]] != 0).sum()) for name, layer in layers.items())
    changed = None
    if variant == "qa":
        quantized = {name: layer for name, layer in layers.items() if isinstance(layer, QuantizedLinear)}
        assert quantized.keys() == integers.keys()
        changed = sum(int((layer.integers() != integers[name]).sum()) for name, layer in quantized.items())
    return {
        "largest_difference": float((before - after).abs().max()),
        "largest_output": float(before.abs().max()),
        "zeros": sum(int(mask.sum()) for mask in zeros.values()),
        "zeros_lost": lost,
        "integers_changed": changed,
        "before_bytes": resident_before,
        "peak_bytes": peak,
    }


def _multiplied_with(layer: Any) -> torch.Tensor:
    """The weight (out, in) that the layer multiplies with, read out with unit vectors."""
    parts = [
        layer(part) - (0 if layer.bias is None else layer.bias) for part in torch.eye(layer.in_features).split(1024)
    ]
    return torch.cat(parts).T


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a causal language model of the Llama family, or 'tiny'; default: SmolLM2-135M"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)  # how the script calls itself
    args = parser.parse_args(argv)
    if args.variant:
        found = measure_here(args.model, args.variant)
        print(json.dumps(found))
        return found

    rows = []
    models = [args.model] if args.model else [None, "7b-block"]
    for model, variant in progress_bar([(model, variant) for model in models for variant in VARIANTS]):
        command = [sys.executable, __file__, "--variant", variant, *([] if model is None else ["--model", model])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({"model": model or "SmolLM2-135M", "variant": variant, **found})
    results = {"machine": machine(), "rows": rows}
    lines = [
        [
            row["model"],
            row["variant"],
            f"{row['largest_difference']:.1e} of {row['largest_output']:.1f}",
            f"{row['zeros_lost']:,} of {row['zeros']:,}",
            "" if row["integers_changed"] is None else f"{row['integers_changed']:,}",
            f"{row['before_bytes'] / 2**20:,.0f}",
            f"{row['peak_bytes'] / 2**20:,.0f}",
        ]
        for row in rows
    ]
    header = ["model", "", "largest difference of an output", "zeros lost", "integers changed"]
    print(describe_machine(results["machine"]), "", table([*header, "MiB before", "MiB peak"], lines), sep="\n")
    if args.json is not None:
        atomic_write_text(args.json, json.dumps(results))
    return results


if __name__ == "__main__":
    main()
