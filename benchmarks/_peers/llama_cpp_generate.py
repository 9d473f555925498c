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
"""Generates with llama.cpp, for generate.py: run by an interpreter that has llama-cpp-python and numpy.

    python llama_cpp_generate.py MODEL.gguf

Each line of standard input is a command, answered by a line of JSON; the first line of output says how it was loaded.

    {"prompt": [1, 2, ...], "new_tokens": 64, "threads": 1}  ->  {"tokens": [...], "seconds": [...], "peak_bytes": ...}

`seconds` are those from the start until each new token is there.
"""

import ctypes
import json
import os
import sys
import time


answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what the library prints is no answer

import llama_cpp  # noqa: E402
import numpy as np  # noqa: E402


@llama_cpp.llama_log_callback
def ignore(level, text, data):
    pass


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def main():
    before = resident("VmRSS")
    start = time.perf_counter()
    llama_cpp.llama_log_set(ignore, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot load {sys.argv[1]}.")
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch = 256, 256
    context = llama_cpp.llama_init_from_model(model, options)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    loaded = {"load_seconds": time.perf_counter() - start, "resident_before": before}
    about = {
        "version": llama_cpp.__version__,
        "system": llama_cpp.llama_print_system_info().decode(),
    }
    answers.write(json.dumps(loaded | about) + "\n")

    def decode(tokens):
        """The likeliest token behind these."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}.")
        logits = llama_cpp.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, shape=(vocabulary,)).argmax())

    for line in sys.stdin:
        command = json.loads(line)
        llama_cpp.llama_set_n_threads(context, command["threads"], command["threads"])
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        start = time.perf_counter()
        tokens, seconds = [decode(command["prompt"])], [time.perf_counter() - start]
        while len(tokens) < command["new_tokens"]:
            tokens.append(decode(tokens[-1:]))
            seconds.append(time.perf_counter() - start)
        answer = {"tokens": tokens, "seconds": seconds, "peak_bytes": resident("VmHWM")}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
