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
"""How a saved model serves, measured in a process of its own, which `quickstart` starts: the time to load it, its tokens a
second, and the memory that the process took.

Arguments: the folder of the model, or its name; "optimized" or "plain"; the JSON file with the numbers of tokens and
repeats; the JSON file with the examples to measure the accuracy on, or "-"; the JSON file to write the answer to.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(folder: str, mode: str, settings: str, data: str, answer: str) -> None:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import peft_elastic
    from peft_elastic.cli._evaluation import measure, tokens_per_second
    from peft_elastic.cli.quickstart.splits import read_splits

    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - start, "optimized": False}
    if mode == "optimized":
        try:
            peft_elastic.optimize_generation(model)
            result["optimized"] = True
        except ValueError as error:  # another architecture
            result["not_optimized"] = str(error)

    options = json.loads(Path(settings).read_text(encoding="utf-8"))
    result["tokens_per_second"] = tokens_per_second(model, options["prompt"], options["new"], options["repeats"])
    result["peak_bytes"] = peak_bytes()
    if data != "-":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        result["measured"] = measure(model, tokenizer, read_splits(Path(data))["test"])
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


def peak_bytes() -> int | None:
    """Read the largest resident memory that this process has had; None on Windows."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss begins with that of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main(*sys.argv[1:])
