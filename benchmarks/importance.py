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
"""Which order heads and MLP channels should be sorted in: perplexity of a language model whose blocks are narrowed, untrained.

A share of all parameters of SmolLM2-135M is removed by narrowing the MLPs of all blocks alike (and, with --heads, one key-value
group of every attention), after sorting by each of the orders. The perplexity is that of text that the calibration has not seen.

    python benchmarks/importance.py --text wikitext2_valid.txt --out outputs/importance    # about 20 minutes on two cores
    python benchmarks/importance.py --smoke --out outputs/importance-smoke                 # a random model, seconds

The first half of --text is for calibration, the second for the perplexity; by default the text is that of movie reviews. Orders
that need data, and the random one, are repeated for --seeds draws. OUT/importance.json holds everything, and the table is printed
as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _support import describe_machine, machine, table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_elastic import sort_by_importance
from peft_elastic.common import assets
from peft_elastic.common.progress import progress_bar
from peft_elastic.common.writing import atomic_write_text
from peft_elastic.structure import Structure
from peft_elastic.structure.space import activate


ORDERS = ("activation", "gradient", "magnitude", "none", "random")
REPEATED = ("activation", "gradient", "random")


def sequences(tokenizer: Any, text: str, length: int) -> list[torch.Tensor]:
    """The text cut into sequences of so many tokens."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return list(ids[: len(ids) // length * length].view(-1, length))


@torch.no_grad()
def perplexity(model: nn.Module, batches: list[torch.Tensor]) -> float:
    """exp of the mean negative log-likelihood of all tokens but the first of each sequence."""
    losses = [model(input_ids=batch[None], labels=batch[None]).loss.double() for batch in batches]
    return math.exp(torch.stack(losses).mean().item())


def sort(model: nn.Module, order: str, calibration: list[torch.Tensor], seed: int) -> None:
    if order == "random":
        generator = torch.Generator().manual_seed(seed)
        units = {o.name: width.units for width in Structure(model).widths for o in width.orders}
        scores = {name: torch.rand(number, generator=generator) for name, number in units.items()}
        sort_by_importance(model, scores, progress=False)
    else:
        sort_by_importance(model, order, [batch[None] for batch in calibration], progress=False)


def narrow(model: nn.Module, share: float, heads: bool) -> tuple[dict[str, int], float]:
    """Remove this share of the parameters (to the nearest 8 channels); returns the widths and the share that was removed."""
    structure = Structure(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    widths = {}
    removed = 0
    channels = [width for width in structure.widths if width.kind == "mlp"]
    for width in structure.widths if heads else ():
        if width.kind == "heads":
            widths[f"heads:{width.name}"] = width.full - width.unit
            removed += sum(model.get_submodule(slot.path).weight.numel() for slot in width.slots) // width.units
    per_channel = sum(
        model.get_submodule(slot.path).weight.numel() // width.full for width in channels for slot in width.slots
    )
    cut = max(0, round((share * total - removed) / per_channel / 8) * 8)
    widths |= {f"mlp:{width.name}": width.full - cut for width in channels}
    activate(model, structure, widths)
    return widths, (removed + cut * per_channel) / total


def report(results: dict[str, Any]) -> str:
    settings, rows = results["settings"], results["rows"]
    shares = sorted({row["share"] for row in rows})
    lines = []
    for order in [o for o in ORDERS if any(row["order"] == o for row in rows)]:
        cells = [order]
        for share in shares:
            values = [row["perplexity"] for row in rows if (row["order"], row["share"]) == (order, share)]
            spread = f" [{min(values):,.1f}, {max(values):,.1f}]" if len(values) > 1 else ""
            cells.append(f"{median(values):,.1f}{spread}")
        lines.append(cells)
    header = ["order", *(f"{100 * share:g}% fewer" for share in shares)]
    what = "MLP channels and one key-value group" if settings["heads"] else "MLP channels"
    return "\n\n".join(
        [
            f"{settings['model']}, {what} of every block; perplexity of {settings['test']} x {settings['length']} held-out tokens, "
            f"{results['dense']:.1f} before. {settings['calibration']} x {settings['length']} calibration tokens; median [least, "
            f"largest] of {settings['seeds']} draws. {describe_machine(results['machine'])}",
            table(header, lines),
        ]
    )


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/importance"), help="folder, default %(default)s")
    parser.add_argument("--model", help="path or hub name of a causal language model; default: SmolLM2-135M")
    parser.add_argument("--text", type=Path, help="a text file; default: movie reviews")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.05, 0.1, 0.2], help="of all parameters")
    parser.add_argument("--heads", action="store_true", help="remove a key-value group of every attention, too")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--test", type=int, default=32, help="sequences")
    parser.add_argument("--calibration", type=int, default=32, help="sequences")
    parser.add_argument("--smoke", action="store_true", help="a random model, short texts")
    args = parser.parse_args(argv)
    if args.smoke:
        args.seeds, args.length, args.test, args.calibration, args.shares = 2, 16, 4, 4, [0.001, 0.004]
    folder = args.model or str(assets.smollm2_135m())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if args.text is not None:
        text = args.text.read_text()
    else:
        text = "\n".join(row["text"] for row in assets.movie_reviews())
    half = len(text) // 2
    pool, test = (sequences(tokenizer, part, args.length) for part in (text[:half], text[half:]))
    test = test[:: max(1, len(test) // args.test)][: args.test]
    if args.smoke:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)
        model: Any = LlamaForCausalLM(config).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    rows = []
    dense = perplexity(model, test)
    runs = [(order, seed) for order in args.orders for seed in range(args.seeds if order in REPEATED else 1)]
    for order, seed in progress_bar(runs, desc="orders"):
        draw = random.Random(seed).sample(pool, min(args.calibration, len(pool)))
        sorted_model = copy.deepcopy(model)
        sort(sorted_model, order, draw, seed)
        after = perplexity(sorted_model, test)
        if abs(after - dense) > 1e-3 * dense:
            raise RuntimeError(f"Sorting by {order} has changed the model: perplexity {after}, {dense} before.")
        for share in args.shares:
            _, removed = narrow(sorted_model, share, args.heads)
            value = perplexity(sorted_model, test)
            rows.append({"order": order, "seed": seed, "share": share, "removed": removed, "perplexity": value})
            print(json.dumps(rows[-1]), flush=True)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "model", "text")}
    settings |= {"model": "random" if args.smoke else args.model or "SmolLM2-135M"}
    settings |= {"text": args.text.name if args.text else "movie reviews"}
    results = {"settings": settings, "machine": machine(), "dense": dense, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(args.out / "importance.json", json.dumps(results))
    print(f"\n{report(results)}")
    return results


if __name__ == "__main__":
    main()
