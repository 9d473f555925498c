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
"""Load what `stacked.py` has saved, in a process of its own: python stacked_reload.py TASK ANSWER, both JSON files.

Every checkpoint must compute what it did before it was saved. Then all of them generate in turns, so that a machine that slows
down slows down all of them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import tasks
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_elastic
from peft_elastic import QuantizedLinear, SparseLinear


PROMPT = 32  # tokens


def main(task_file: str, answer_file: str) -> None:
    task = json.loads(Path(task_file).read_text())
    expected = torch.load(task["expected"])
    models, answers = {}, {}
    for name, checkpoint in task["checkpoints"].items():
        start = time.perf_counter()
        models[name] = load(checkpoint)
        answers[name] = {"load_seconds": time.perf_counter() - start, "bytes": size_of(checkpoint)}
        answers[name] |= compare(name, models[name], expected)
        answers[name]["embedding_bytes"] = embedding_bytes(models[name])

    last = task["checkpoints"][task["measure"]]
    tokenizer = AutoTokenizer.from_pretrained(last["folder"])
    held_out = tasks.Sentiment(tokenizer, [tasks.Example(**example) for example in task["examples"]])
    # before anything is optimised
    measured = {"measured": held_out(models[task["measure"]]), **count_weights(models[task["measure"]])}

    dense = next(iter(models))
    answers[dense]["plain_tokens_per_second"] = tokens_per_second({dense: models[dense]}, task)[dense]
    for name, model in models.items():
        try:
            peft_elastic.optimize_generation(model)
            answers[name]["optimized"] = True
        except ValueError:  # another architecture
            answers[name]["optimized"] = False
    for name, speed in tokens_per_second(models, task).items():
        answers[name]["tokens_per_second"] = speed
    Path(answer_file).write_text(json.dumps({"checkpoints": answers, "measured": measured}))


def load(checkpoint: dict[str, str]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(checkpoint["folder"], dtype="auto")
    if "adapter" in checkpoint:
        model = PeftModel.from_pretrained(model, checkpoint["adapter"])
    return model.eval()


def size_of(checkpoint: dict[str, str]) -> int:
    """Bytes of the weights of a model, and of the adapter if it has one."""
    return sum(file.stat().st_size for folder in checkpoint.values() for file in Path(folder).glob("*.safetensors"))


@torch.inference_mode()
def compare(name: str, model: Any, expected: dict[str, Any]) -> dict[str, float]:
    logits, known = model(**expected["inputs"]).logits.float(), expected["logits"][name]
    difference, scale = float((logits - known).abs().max()), float(known.abs().max())
    print(f"reloaded {name}: largest difference of a logit {difference:.1e}, of {scale:.1e}", flush=True)
    # half precision on two devices differs in the last bits
    if difference > 1e-4 * scale and model.dtype == torch.float32:
        sys.exit(f"{name}: the reloaded model computes something else")
    return {"largest_logit_difference": difference}


@torch.inference_mode()
def tokens_per_second(models: dict[str, Any], task: dict[str, Any]) -> dict[str, float]:
    """Of the median round."""
    new = task["new_tokens"]
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + task["rounds"]):
        for name, model in models.items():
            prompt = torch.arange(PROMPT)[None] % (model.config.vocab_size - 4) + 3
            start = time.perf_counter()
            model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=new,
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
            seconds[name].append(time.perf_counter() - start)
    # the first round starts threads
    return {name: new / statistics.median(found[1:]) for name, found in seconds.items()}


def count_weights(model: Any) -> dict[str, int]:
    """`parameters`, what is tied counted once, and how many of them are not zero, rounded where the model rounds them."""
    parameters = nonzero = 0
    seen = set()
    for module in model.modules():
        if isinstance(module, SparseLinear):
            parameters += module.out_features * module.in_features
            nonzero += module.nnz
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                rounds = name == "weight" and isinstance(module, QuantizedLinear)
                values = module.grid.round(parameter.detach()) if rounds else parameter
                parameters += values.numel()
                nonzero += int(values.count_nonzero())
    return {"parameters": parameters, "nonzero": nonzero}


def embedding_bytes(model: Any) -> int:
    """Of the input and the output embedding, which may be one."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return sum(weight.nbytes for weight in {id(layer.weight): layer.weight for layer in layers}.values())


if __name__ == "__main__":
    main(*sys.argv[1:])
