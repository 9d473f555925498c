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
"""What the tests of commands work on."""

import json

from peft_elastic.cli.quickstart.smoke import smoke_examples, smoke_model
from peft_elastic.cli.quickstart.splits import split_examples


def fill_folder(folder):
    """Put a tiny model with its tokenizer into `folder`/model, and into train.jsonl and validation.jsonl data with the columns prompt and
    label."""
    examples = smoke_examples()
    model, tokenizer = smoke_model(examples)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, part in split_examples(examples, {"validation": 32}, seed=0).items():
        records = [{"prompt": example.prompt, "label": example.completion.strip()} for example in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
