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
"""A check in a process of its own, which `quickstart` starts: transformers alone loads the merged model, and that computes
what it computed before it was saved. The file is run as a script, so that nothing of this package is there at that time.

Arguments: the folder of the model; the device; the JSON file with the examples; the .npz file with the expected outputs;
the JSON file to write the answer to; packages to import first, for a model whose blocks differ in size.
"""

import importlib
import json
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar


def outputs(model, tokenizer, prompts, new_tokens=16):
    """Compute logits of the next token, float32 of shape (prompts, vocabulary), and greedy continuations, int64 of shape (prompts,
    new_tokens)."""
    logits, tokens = [], []
    with torch.inference_mode():
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
            logits.append(model(**inputs).logits[0, -1].float().cpu().numpy())
            generated = model.generate(
                **inputs,
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )
            tokens.append(generated[0, -new_tokens:].cpu().numpy())
    return {"logits": np.stack(logits), "tokens": np.stack(tokens)}


def main(folder, device, data, expected, answer, *imports):
    disable_progress_bar()
    for name in imports:
        importlib.import_module(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = np.load(expected)
    found = outputs(model, tokenizer, wanted["prompts"].tolist())
    plain = "peft_elastic" not in sys.modules

    # the measurement alone may use this package
    from peft_elastic.cli._evaluation import measure
    from peft_elastic.cli.quickstart.splits import read_splits

    result = {
        "without_peft_elastic": plain,
        "largest_logit_difference": float(np.abs(found["logits"] - wanted["logits"]).max()),
        "same_tokens": bool((found["tokens"] == wanted["tokens"]).all()),
        "measured": measure(model, tokenizer, read_splits(Path(data))["test"]),
    }
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: the parent says what there is to say
    main(*sys.argv[1:])
