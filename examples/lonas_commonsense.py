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
"""LoNAS on commonsense questions with several possible answers.

Data is as for shears_commonsense.py: a JSON or JSON Lines file with `question`, `choices` and `label`.

    python examples/lonas_commonsense.py --model yahma/llama-7b-hf --train train.jsonl --test test.jsonl
    python examples/lonas_commonsense.py --train train.jsonl --test test.jsonl --strategy sandwich --distillation --depth 4-27
    python examples/lonas_commonsense.py --smoke --train arc_easy_train.jsonl --test arc_easy_test.jsonl

The defaults are those of the paper (see lonas.py) and its code for LLaMA-7B, but for `--order`: MLP channels 11008, 9632,
8256, 6880 and 5504, all heads, ranks 32 and 28 tied over {q, k, v} and {up, gate}, lora_alpha 64, dropout 0.1, learning rate
3e-4 after 100 steps of warmup, 6 epochs, batch 16; NSGA-II with 8 subnets per generation and 200 evaluations. There the rank of
down is always 32; here it is one of the two as well. For other models give `--mlp` as shares: 1.0 0.875 0.75 0.625 0.5 are those
of the paper.
"""

import lonas
import tasks
from pipeline import adapter_settings, prepare
from shears_commonsense import accuracy


if __name__ == "__main__":
    parser = lonas.lonas_parser(
        __doc__,
        train="train.jsonl",
        test="test.jsonl",
        mlp=[11008, 9632, 8256, 6880, 5504],
        ranks=[32, 28],
        epochs=6,
    )
    args = parser.parse_args()
    data = prepare(args, tasks.commonsense_example, accuracy)
    if args.smoke:
        args.heads, args.mlp = [1.0, 0.5], [1.0, 0.875, 0.75, 0.625, 0.5]
    lonas.run(args, data, adapter_settings(args))
