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
"""Shears on math word problems.

The paper fine-tunes on math_10k of LLM-Adapters (a JSON file with `instruction` and `output`); GSM8K is on the hub:

    python examples/shears_math.py --model yahma/llama-7b-hf --train math_10k.json --test openai/gsm8k:main
    python examples/shears_math.py --smoke --train gsm8k_train.jsonl --test gsm8k_test.jsonl
"""

import shears
import tasks


def accuracy(tokenizer, examples, args):
    return tasks.ExactAnswer(tokenizer, examples, max_new_tokens=16 if args.smoke else 256)


if __name__ == "__main__":
    args = shears.shears_parser(__doc__, train="openai/gsm8k:main", test="openai/gsm8k:main").parse_args()
    shears.run(args, tasks.math_example, accuracy)
