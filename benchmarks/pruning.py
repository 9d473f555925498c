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
"""Which weights should go: perplexity of a language model that is pruned by each of the methods, untrained.

    python benchmarks/pruning.py --text wikitext2_valid.txt --out outputs/pruning    # about 20 minutes on two cores
    python benchmarks/pruning.py --smoke --out outputs/pruning-smoke                 # a random model, seconds

The first half of --text is for calibration, the second for the perplexity; by default the text is that of movie reviews. OUT/pruning.json
holds everything, and the table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _support import describe_machine, machine, table
from importance import perplexity, sequences
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_elastic import prune
from peft_elastic.common import assets
from peft_elastic.common.writing import atomic_write_text
from peft_elastic.pruning import PRUNING_METHODS


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help="a folder or a name on the hub; default: SmolLM2-135M-Instruct of common/assets.py"
    )
    parser.add_argument("--text", type=Path, help="a text file; default: movie reviews")
    parser.add_argument("--shares", nargs="+", default=["0.5", "0.6", "2:4"], help="sparsities and n:m patterns")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--calibration", type=int, default=64, help="sequences")
    parser.add_argument("--test", type=int, default=64, help="sequences")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of the sequences")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true", help="a random model, short texts")
    args = parser.parse_args(argv)
    if args.smoke:
        args.length, args.calibration, args.test = 32, 4, 4
    folder = args.model or assets.smollm2_135m()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if args.smoke:
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **shape))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    text = args.text.read_text() if args.text else "\n".join(row["text"] for row in assets.movie_reviews())
    half = len(text) // 2
    rng = random.Random(args.seed)
    calibration, test = (
        rng.sample(sequences(tokenizer, part, args.length), count)
        for part, count in ((text[:half], args.calibration), (text[half:], args.test))
    )
    rows = [{"method": "dense", "share": "", "perplexity": perplexity(model, test), "seconds": 0.0}]
    for share in args.shares:
        for name, method in PRUNING_METHODS.items():
            options = {"pattern": share} if ":" in share else {"sparsity": float(share)}
            pruned = copy.deepcopy(model)
            report = prune(pruned, method.config(**options), [batch[None] for batch in calibration], progress=False)
            rows.append(
                {"method": name, "share": share, "perplexity": perplexity(pruned, test), "seconds": report.seconds}
            )
            print(rows[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "model", "text")}
    settings |= {"model": "random" if args.smoke else args.model or "SmolLM2-135M-Instruct"}
    settings |= {"text": args.text.name if args.text else "movie reviews"}
    results = {"machine": machine(), "settings": settings, "rows": rows}
    atomic_write_text(args.out / "pruning.json", json.dumps(results, indent=1) + "\n")
    cells = [[row["share"], row["method"], f"{row['perplexity']:.2f}", f"{row['seconds']:.0f}"] for row in rows]
    print(table(["share", "method", "perplexity", "s"], cells))
    print(f"\n{describe_machine(results['machine'])}")
    return results


if __name__ == "__main__":
    main()
