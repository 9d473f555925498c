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
"""Times one linear layer in DeepSparse, for kernels.py: run by an interpreter that has deepsparse, onnx and numpy.

Each line of standard input is a command, answered by a line of JSON:

    {"load": KEY, "shape": [4096, 4096], "sparsity": 0.5, "batch": 1, "threads": 1, "copies": 2}  ->  {"version": "1.8.0"}
    {"run": KEY}  ->  {"seconds": 0.001}, of a call, on average over the copies in turn
    {"forget": true}  ->  {}
"""

import json
import os
import sys
import tempfile
import time


os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")  # it would call home
answers = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # what the engine prints is no answer

import deepsparse  # noqa: E402
import numpy as np  # noqa: E402
import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


FLUSH = np.ones(128 * 2**20, dtype=np.uint8)  # read before the timed calls, so that the weights are out of the caches


def load(command):
    (outs, ins), batch = command["shape"], command["batch"]
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((ins, outs), dtype=np.float32) / np.float32(np.sqrt(ins))
    weight *= rng.random((ins, outs), dtype=np.float32) >= command["sparsity"]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, ins])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, outs])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 7
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "linear.onnx")
        onnx.save(model, path)
        engines = [
            deepsparse.Engine(path, batch_size=batch, num_cores=command["threads"]) for _ in range(command["copies"])
        ]
    x = rng.standard_normal((batch, ins), dtype=np.float32)
    error = np.abs(engines[0].run([x])[0] - x @ weight).max()
    if error > 1e-3:
        raise RuntimeError(f"DeepSparse is off by {error} on {command}.")
    return engines, x


def main():
    loaded = {}
    for line in sys.stdin:
        command = json.loads(line)
        answer = {}
        if "load" in command:
            loaded[command["load"]] = load(command)
            answer["version"] = deepsparse.__version__
        elif "run" in command:
            engines, x = loaded[command["run"]]
            FLUSH.max()
            start = time.perf_counter()
            for engine in engines:
                engine.run([x])
            answer["seconds"] = (time.perf_counter() - start) / len(engines)
        else:
            loaded.clear()
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
