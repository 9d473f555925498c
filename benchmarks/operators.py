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
"""How many operators one adapted linear layer launches in a forward and a backward pass, which is what small steps cost on a
GPU.

    python benchmarks/operators.py                  # 4096 x 4096, as on a GPU without Triton: half a minute
    python benchmarks/operators.py --size 64        # a second, the same figures
    PYTHONPATH=OLD_CHECKOUT python benchmarks/operators.py    # what an earlier version launched

Counted on the CPU by a dispatch mode, which switches the C++ kernel and Triton off: operators that are not views, those of
autograd among them, allocations too. The memory that a GPU is allowed by default is allowed here (`set_panel_memory`), so
that what is counted is what a GPU is told to do. The layer has no bias; the inputs need a gradient, as inside of a model.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import peft_elastic
from peft_elastic import ElasticLoraConfig, SparseQALoraConfig


# No alias of their argument for the schema, and no work either.
_UNMARKED_VIEWS = ("aten._unsafe_view", "aten.lift_fresh")

LAYERS = {
    "LoRA of peft": "lora",
    "elastic, all ranks": "elastic",
    "elastic, half of the ranks": "elastic-half",
    "SparsePEFT": "sparse",
    "SparsePEFT, half of the ranks": "sparse-half",
    "QA-SparsePEFT, 4 bits": "qa",
    "QA-SparsePEFT, half of the ranks": "qa-half",
    "QA-SparsePEFT, act-order": "qa-act-order",
}
# dtypes of weight and inputs, and whether autocast to bfloat16 is on
PRECISIONS = {
    "float32": (torch.float32, False),
    "float32, autocast": (torch.float32, True),
    "bfloat16, autocast": (torch.bfloat16, True),
    "bfloat16": (torch.bfloat16, False),
}


def is_view(function: Any) -> bool:
    """Whether an operator only looks at its argument in another way, and so launches nothing."""
    returns = function._schema.returns
    aliases = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return bool(aliases) or str(function).startswith(_UNMARKED_VIEWS)


class Operators(TorchDispatchMode):
    """Counts, while it is active, the operators that are not views, by name; what allocates without filling is among them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not is_view(function):
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counts.total()


def adapted(kind: str, base: nn.Module, rank: int) -> nn.Module:
    """The layer, `base` copied, with an adapter."""
    model: Any = nn.Sequential(OrderedDict(linear=copy.deepcopy(base)))
    kind, _, variation = kind.partition("-")
    settings: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["linear"]}
    if kind != "lora":
        settings["elastic_ranks"] = [rank, rank // 2]
    if kind == "qa":
        settings |= {"quantization_aware": True, "bits": 4, "group_size": 32}
    config = {"lora": LoraConfig, "elastic": ElasticLoraConfig}.get(kind, SparseQALoraConfig)(**settings)
    model = get_peft_model(model, config)
    if variation == "half":
        model.set_subnet("min")
    if variation == "act-order":
        size = base.weight.shape[1]  # type: ignore[union-attr, index]
        for grid in model.base_model.model.linear.lora_grid.values():
            grid.permute("in", torch.randperm(size, generator=torch.Generator().manual_seed(0)))
    return model


def count(model: nn.Module, x: torch.Tensor, autocast: bool) -> tuple[Operators, Operators]:
    """The operators of the forward and of the backward pass."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast), Operators() as forward:
        output = model(x)
    grad = torch.ones_like(output)
    with Operators() as backward:
        output.backward(grad)
    return forward, backward


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Panels as large as a GPU may have them; versions that did not know how have theirs."""
    try:
        from peft_elastic.tuners.sparse_qa_lora import devices
    except ImportError:
        yield
        return
    before = devices.set_panel_memory(devices.DEFAULT_MEGABYTES)
    try:
        yield
    finally:
        devices.set_panel_memory(before)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the layer, default 4096")
    parser.add_argument("--rank", type=int, default=32, help="maximal rank, default 32")
    parser.add_argument("--json", type=Path, help="also write what was counted, by name, to this file")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message=".*SubnetSamplingCallback.*")
    torch.manual_seed(0)
    results: dict[str, dict[str, Any]] = {}
    with as_on_a_gpu():
        for precision, (dtype, autocast) in PRECISIONS.items():
            base = nn.Linear(args.size, args.size, bias=False, dtype=dtype)
            base.weight.data.mul_(torch.rand(args.size, args.size) > 0.5)
            x = torch.randn(16, args.size, dtype=dtype)
            for layer, kind in LAYERS.items():
                forward, backward = count(adapted(kind, base, args.rank), x, autocast)
                results.setdefault(layer, {})[precision] = {
                    "forward": dict(forward.counts),
                    "backward": dict(backward.counts),
                    "total": forward.total + backward.total,
                }
    versions = f"torch {torch.__version__}, peft {peft.__version__}, peft_elastic {peft_elastic.__version__}"
    print(f"{args.size} x {args.size}, rank {args.rank}; {versions}, Python {platform.python_version()}.\n")
    print(f"| | {' | '.join(PRECISIONS)} |\n|{'---|' * (len(PRECISIONS) + 1)}")
    for layer, row in results.items():
        print(f"| {layer} | {' | '.join(str(row[precision]['total']) for precision in PRECISIONS)} |")
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
