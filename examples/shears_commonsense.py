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
"""Shears on commonsense questions with several possible answers.

Data is a JSON or JSON Lines file with `question`, `choices` (list of texts) and `label` (index of the right one):

    python examples/shears_commonsense.py --model yahma/llama-7b-hf --train train.jsonl --test test.jsonl
    python examples/shears_commonsense.py --smoke --train arc_easy_train.jsonl --test arc_easy_test.jsonl

An answer counts as right if its tokens have the highest mean log-likelihood of all choices.
"""

import shears
import tasks

from peft_elastic.search import MultipleChoiceEvaluator


def accuracy(tokenizer, examples, args):
    rows = [{"prompt": e.prompt, "choices": e.choices, "label": e.choices.index(e.answer)} for e in examples]
    return MultipleChoiceEvaluator(rows, tokenizer, normalization="tokens", max_length=args.max_length)


if __name__ == "__main__":
    args = shears.shears_parser(__doc__, train="train.jsonl", test="test.jsonl").parse_args()
    shears.run(args, tasks.commonsense_example, accuracy)
