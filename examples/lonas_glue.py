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
"""LoNAS on GLUE, with a BERT encoder.

    python examples/lonas_glue.py                                      # SST-2, from the hub
    python examples/lonas_glue.py --task rte --strategy sandwich --distillation
    python examples/lonas_glue.py --model minilm --train sst2_train.tsv --test sst2_dev.tsv --epochs 1 --evals 40
    python examples/lonas_glue.py --smoke --train sst2_train.tsv --test sst2_dev.tsv

Tasks are those that are judged by accuracy; the test data is their validation split. `--model minilm` is the encoder
all-MiniLM-L6-v2 from the Python package index; .tsv files hold a text and a class in each line, without a header.

The defaults are those of the paper (see lonas.py) and its code for BERT-base, but for `--order`: ranks 8, 4 and 2 tied over
{query, value}, lora_alpha 16, dropout 0.1, learning rate 3e-4 after 6% of warmup, weight decay 0.1, and the epochs, batch size
and length of each task; NSGA-II with 40 subnets per generation and 1000 evaluations. The paper gives each block two or three
widths of its own, found beforehand: of SST-2 all 12 heads or one of 3 to 11, and 3072, about 2600 or about 200 channels. Here
every block chooses from the heads of all of them, and from the channels of the first. For other models give `--heads` and `--mlp`
as shares.
"""

from __future__ import annotations

import argparse

import lonas
from pipeline import prepare_classifier

from peft_elastic.common import assets


# (epochs, batch size, tokens, test split)
TASKS = {
    "sst2": (60, 64, 128, "validation"),
    "rte": (80, 32, 128, "validation"),
    "mrpc": (35, 32, 128, "validation"),
    "qnli": (80, 64, 256, "validation"),
    "qqp": (60, 64, 128, "validation"),
    "mnli": (40, 64, 128, "validation_matched"),
}
SHARES = {"heads": [1.0, 0.75, 0.5], "mlp": [1.0, 0.75, 0.5]}


def parse_args() -> argparse.Namespace:
    parser = lonas.lonas_parser(
        __doc__,
        model="google-bert/bert-base-uncased",
        r=8,
        lora_alpha=16,
        ranks=[8, 4, 2],
        heads=[12, 11, 10, 9, 8, 6, 5, 4, 3],
        mlp=[3072, 2634, 216],
        epochs=None,
        batch=None,
        max_length=None,
        warmup=0.06,
        weight_decay=0.1,
        validation_samples=1000,
        evals=1000,
        population=40,
    )
    parser.add_argument("--task", choices=list(TASKS), default="sst2")
    args = parser.parse_args()
    for name, value in zip(("epochs", "batch", "max_length"), TASKS[args.task]):
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("train", "test"):
        if getattr(args, name) is None:
            setattr(args, name, f"nyu-mll/glue:{args.task}")
    if args.model == "minilm":
        args.model = str(assets.minilm_l6())
        for name, shares in SHARES.items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, shares)
    return args


if __name__ == "__main__":
    args = parse_args()
    data = prepare_classifier(args, TASKS[args.task][3])
    if args.smoke:
        args.heads, args.mlp = SHARES["heads"], SHARES["mlp"]
    adapter = {
        "r": args.r,
        "lora_alpha": args.lora_alpha,
        "lora_dropout": args.dropout,
        "elastic_ranks": args.ranks,
        "rank_groups": [["query", "value"]],
        "target_modules": ["query", "value"],
        "task_type": "SEQ_CLS",
    }
    lonas.run(args, data, adapter)
