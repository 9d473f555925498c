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
"""peft's own tests with `ElasticLoraConfig` in the place of `LoraConfig`, beside the same tests with stock LoRA.

    pip download --no-deps --no-binary :all: peft==0.21.2 && tar xzf peft-0.21.2.tar.gz
    python tests/conformance/compare.py peft-0.21.2/tests [--config SparseQALoraConfig] [--out rows.json] [-- -k "..."]

Nothing of peft's tests is in this repository. Models of the hub are replaced by tiny ones with random weights (hub.py).
A row that passes with stock LoRA and not with ours is explained by one of `REASONS`, or it is a fault, and the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path


HERE = Path(__file__).resolve().parent

# Why a row may differ, as docs/compatibility.md says it: title -> a regular expression for what is in its traceback.
REASONS = {
    "variants and initialisations that are refused": (
        r"cannot be combined with elastic ranks|cannot be elastic with `init_lora_weights='mica'`"
    ),
    "FSDP1 is refused": r"FSDP1 replaces it by a view into flat memory",
    "the adapter has a copy of its configuration": (
        r'assert model_from_pretrained.peft_config\["default"\] is config|\("fc1" in config.target_modules\)'
    ),
    "PeftMixedModel is refused": r"is not compatible with the `PeftMixedModel`|is not supported for mixed models",
    "hotswapping is refused": r"Hotswapping only supports LORA|Incompatible PEFT types found: ELASTIC_LORA",
    "reduce_intruder_dimension is refused": r"The provided model is not using LoRA and is therefore not supported",
    "X-LoRA is refused": r"is elastic, but is being loaded by a method that knows fixed ranks only",
    "names that match nothing are an error": r"which match no module that gets an adapter|which are not in the base model\.",
    "the test asks for the name LORA, LoraModel or LoraConfig": (
        r"(?m)^\s*\+ (ElasticLoraModel|ELASTIC_LORA)$|\{'default': 'ELASTIC_LORA'[^}]*\} (!=|==)"
        r"|assert isinstance\(lora_config, LoraConfig\)|in test_converted_lora_to_lora_works_and_warns"
    ),
}


def run_tests(
    tests: Path, config: str, scratch: Path, arguments: list[str], rows: list[str] | None = None
) -> dict[str, dict]:
    """row -> how it ended, with this configuration.

    Args:
        rows: those to run; all by default.
    """
    log = scratch / f"{config or 'stock'}.jsonl"
    log.touch()
    environment = os.environ | {
        "CONFORMANCE_CONFIG": config,
        "CONFORMANCE_LOG": str(log),
        "HF_HOME": str(scratch / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    if rows is not None:
        (scratch / "rows.json").write_text(json.dumps(rows))
        environment["CONFORMANCE_ROWS"] = str(scratch / "rows.json")
    command = [sys.executable, "-m", "pytest", "-p", "substitute", "-p", "no:cacheprovider", "-c", os.devnull, "-q"]
    command += ["--rootdir", str(tests.parent), "--tb=native", "--continue-on-collection-errors", *arguments]
    files = sorted(path for path in tests.glob("test_*.py") if "LoraConfig" in path.read_text())
    with open(scratch / f"{config or 'stock'}.txt", "w") as output:
        named = any((tests.parent / a.partition("::")[0]).exists() for a in arguments if not a.startswith("-"))
        command += [] if named else [str(path.relative_to(tests.parent)) for path in files]
        subprocess.run(
            command, cwd=tests.parent, env=environment, stdout=output, stderr=subprocess.STDOUT, check=False
        )
    return read_log(log)


def read_log(log: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return {line["row"]: line for line in lines}


def explain(message: str) -> str:
    """The reason that a traceback shows, or its last line."""
    for title, pattern in REASONS.items():
        if re.search(pattern, message):
            return title
    return "UNEXPLAINED: " + re.sub(r"'[^']*'|\d+", "*", message.strip().rpartition("\n")[2])[:160]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the folder tests/ of peft's source archive")
    parser.add_argument("--config", default="ElasticLoraConfig")
    parser.add_argument("--stock", type=Path, help="the stock.jsonl of an earlier run, instead of running stock again")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows that differ")
    parser.epilog = "What stands behind -- goes to pytest."
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, further = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]

    scratch = Path(tempfile.mkdtemp(prefix="peft-conformance-"))
    # the source archive leaves out the __init__.py that the imports between the tests need
    tests = scratch / "tests"
    shutil.copytree(options.tests, tests)
    (tests / "__init__.py").touch()
    home = os.environ | {"HF_HOME": str(scratch / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, str(HERE / "hub.py")], env=home, check=True)
    stock = read_log(options.stock) if options.stock else run_tests(tests, "", scratch, further)
    rows = [row for row, line in stock.items() if line["lora_configs"] and line["outcome"] == "passed"]
    ours = run_tests(tests, options.config, scratch, further, rows)
    differ = {row: ours[row]["message"] if row in ours else "not run" for row in rows}
    differ = {row: message for row, message in differ.items() if row not in ours or ours[row]["outcome"] != "passed"}
    groups: dict[str, list[str]] = defaultdict(list)
    for row, message in differ.items():
        groups[explain(message)].append(row)
    print(f"{len(rows)} rows use LoRA and pass with stock, {len(rows) - len(differ)} of them with {options.config}.")
    for title, members in sorted(groups.items(), key=lambda group: -len(group[1])):
        print(f"\n{len(members):5d}  {title}")
        for row in members[:3]:
            print(f"         {row}")
    if options.out:
        options.out.write_text(json.dumps({"rows": len(rows), "differ": differ, "groups": groups}, indent=1))
    print(f"\nThe output of pytest is in {scratch}.")
    return int(any(title.startswith("UNEXPLAINED") for title in groups) or not rows)


if __name__ == "__main__":
    sys.exit(main())
