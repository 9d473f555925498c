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
"""Tokens a second of `generate` with sparse layers, against the same model dense, and against llama.cpp.

    python benchmarks/generate.py --out benchmarks/results
    python benchmarks/generate.py --llama-python LLAMA_ENV/bin/python     # with llama-cpp-python as a peer
    python benchmarks/generate.py --models llama --layers 4               # a smaller Llama
    python benchmarks/generate.py --smoke                                 # a toy model, seconds

Models: SmolLM2-135M, and one of the shape of a 7B Llama (hidden 4096, MLP 11008, 32 heads, vocabulary 32000) with random
weights and as many layers as asked for. Their linear layers, without the output embedding, are pruned by magnitude:
speed does not depend on which weights are zero. All are written to disk first, and loaded from there:

- `dense fp32`, `dense bf16`: the model of transformers, pruned to the lowest sparsity, its zeros stored;
- `sparse bf16`, `sparse int8`: after `sparsify_linears`, the rest in bfloat16, at each sparsity; with int8 the output
  embedding is int8 as well, as in q8_0, though not pruned;
- `llama.cpp f16`, `bf16`, `q8_0`: the weights of the dense model as GGUF, if an interpreter with llama-cpp-python is
  given. It knows no sparse weights.

The models of transformers generate as they are and after `optimize_generation` ("+ step"), in turns. Every configuration
has a process of its own, which gives its load time and peak memory; the processes take turns, one sequence each, as many
of them at once as fit into memory. Greedy search, batch 1; the rate is that of all new tokens but the first, whose time
(that of the prompt) is given apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from _support import RESULTS, Worker, describe_machine, log, machine, summarize, table, usable_cores, write, write_into
from _support.gguf_file import write_gguf
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.generation.streamers import BaseStreamer

from peft_elastic import MagnitudeConfig, prune, sparsify_linears
from peft_elastic.common import assets
from peft_elastic.common.progress import progress_bar
from peft_elastic.deploy.generation import optimize_generation, restore_generation
from peft_elastic.layers import extension


MODELS = {"smollm2": "SmolLM2-135M", "llama": "Llama shape"}
SPARSITIES = (0.5, 0.7)
VALUES = ("bf16", "int8")
GGUF_KINDS = ("bf16", "f16", "q8_0")
SEED = 0


class Configuration(NamedTuple):
    name: str
    file: str  # in the folder of the model
    dtype: str = ""  # that transformers loads it in; empty: a GGUF file


def configurations(sparsities: list[float], with_llama: bool) -> list[Configuration]:
    return [
        Configuration("dense bf16", "dense", "bfloat16"),
        *(
            Configuration(f"sparse {values} {sparsity:.0%}", f"{values}-{sparsity}", "bfloat16")
            for sparsity in sparsities
            for values in VALUES
        ),
        *(Configuration(f"llama.cpp {kind}", f"{kind}.gguf") for kind in GGUF_KINDS if with_llama),
        Configuration("dense fp32", "dense", "float32"),
    ]


# -- the files -------------------------------------------------------------------------------------------------------


def make_model(name: str, layers: int) -> nn.Module:
    """The dense model in bfloat16, not pruned."""
    if name == "smollm2":
        return AutoModelForCausalLM.from_pretrained(assets.smollm2_135m(), dtype=torch.bfloat16)
    if name == "llama":
        shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
    else:
        shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "vocab_size": 256}
    config = LlamaConfig(
        **shape,
        num_key_value_heads=32 if name == "llama" else 2,
        num_hidden_layers=layers,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def prepare(name: str, layers: int, sparsities: list[float], with_llama: bool, folder: Path) -> None:
    """Writes every file that the configurations load. Runs in a process of its own, which gives its memory back."""
    make_model(name, layers).save_pretrained(folder / "unpruned")
    for index, sparsity in enumerate(sorted(sparsities)):
        source = "dense" if index else "unpruned"
        model = AutoModelForCausalLM.from_pretrained(folder / source, dtype=torch.bfloat16)
        prune(model, MagnitudeConfig(sparsity=sparsity))
        if index == 0:
            model.save_pretrained(folder / "dense")
            shutil.rmtree(folder / "unpruned")
            for kind in GGUF_KINDS if with_llama else ():
                write_gguf(model, folder / f"{kind}.gguf", kind)
        dense = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
        for values in VALUES:
            sparse = copy.deepcopy(model, dict(dense))  # the weights are shared
            if values == "int8":  # the output embedding too, as in q8_0: it is not pruned, and tied no more
                head = sparse.get_output_embeddings()
                head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
                sparse.config.tie_word_embeddings = False
            log(str(sparsify_linears(sparse, values, when="always", min_sparsity=0.0, lm_head=values == "int8")))
            sparse.save_pretrained(folder / f"{values}-{sparsity}")


# -- one configuration, in its process -------------------------------------------------------------------------------


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


class Clock(BaseStreamer):
    """Takes the tokens of `generate` as they come, and the time."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.tokens: list[int] = []
        self.seconds: list[float] = []
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:  # comes first
            self.prompt = False
            return
        self.seconds.append(time.perf_counter() - self.start)
        self.tokens.append(int(value))

    def end(self) -> None:
        pass


class Served:
    """A model that is loaded, and generates when it is asked to."""

    def __init__(self, path: str, dtype: str) -> None:
        before = resident("VmRSS")
        start = time.perf_counter()
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        self.about = {"load_seconds": time.perf_counter() - start, "resident_before": before}
        self.model.generation_config.eos_token_id = None  # every run has the same length
        self.model.generation_config.pad_token_id = 0
        self.optimized = False

    def ask(self, prompt: list[int], new_tokens: int, threads: int, step: bool) -> dict[str, Any]:
        torch.set_num_threads(threads)
        if step != self.optimized:
            self.optimized = step
            (optimize_generation if step else restore_generation)(self.model)
        ids = torch.tensor([prompt])
        clock = Clock()
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
        return {"tokens": clock.tokens, "seconds": clock.seconds, "peak_bytes": resident("VmHWM")}


def serve(path: str, dtype: str) -> None:
    """Loads a model and generates on command, as _peers/llama_cpp_generate.py does."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    served = Served(path, dtype)
    answers.write(json.dumps(served.about) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(served.ask(**json.loads(line))) + "\n")


# -- measuring -------------------------------------------------------------------------------------------------------


def start(configuration: Configuration, folder: Path, args: argparse.Namespace) -> tuple[Worker, dict[str, Any]]:
    path = str(folder / configuration.file)
    if configuration.dtype:
        worker = Worker([sys.executable, __file__, "--serve", path, configuration.dtype])
    else:
        worker = Worker.peer(args.llama_python, "llama_cpp_generate.py", path)
    return worker, worker.answer()


def bytes_needed(configuration: Configuration, folder: Path) -> int:
    path = folder / configuration.file
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files) * (2 if configuration.dtype == "float32" else 1)
    return size + 600 * 2**20  # Python, torch and what a prompt needs


def groups_that_fit(all_of_them: list[Configuration], folder: Path) -> list[list[Configuration]]:
    """The configurations in order, split so that each group fits into memory at once."""
    budget = 0.85 * psutil.virtual_memory().available
    groups: list[list[Configuration]] = [[]]
    used = 0
    for configuration in all_of_them:
        needed = bytes_needed(configuration, folder)
        if groups[-1] and used + needed > budget:
            groups.append([])
            used = 0
        groups[-1].append(configuration)
        used += needed
    return groups


def measure_model(name: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each configuration, with and without the step, and number of threads."""
    options = ["--layers", str(args.layers), "--sparsities", *map(str, args.sparsities)]
    if args.llama_python:
        options += ["--llama-python", args.llama_python]
    made = folder / "made_with.json"
    if not made.exists() or json.loads(made.read_text()) != options:
        log(f"{name}: writing the models to {folder}.")
        made.unlink(missing_ok=True)
        subprocess.run([sys.executable, __file__, "--prepare", name, str(folder), *options], check=True)
        made.write_text(json.dumps(options))

    generator = torch.Generator().manual_seed(SEED)
    prompt = torch.randint(3, 256, (args.prompt_tokens,), generator=generator).tolist()
    rows = []
    groups = groups_that_fit(configurations(args.sparsities, bool(args.llama_python)), folder)
    for number, group in enumerate(groups):
        workers, loaded = {}, {}
        for configuration in group:
            workers[configuration], loaded[configuration] = start(configuration, folder, args)
        runs: dict[tuple[Configuration, bool, int], list[dict[str, Any]]] = {
            (configuration, step, threads): []
            for configuration in group
            for step in ((False, True) if configuration.dtype else (False,))
            for threads in args.threads
        }
        progress = progress_bar(
            total=len(runs) * (args.rounds + 1), desc=f"{name}, group {number + 1} of {len(groups)}"
        )
        for current in range(-1, args.rounds):
            for (configuration, step, threads), answers in runs.items():
                asked = {"prompt": prompt, "new_tokens": args.new_tokens, "threads": threads, "step": step}
                answer = workers[configuration].ask(**asked)
                if current >= 0:  # the round before the first warms up
                    answers.append(answer)
                progress.update()
        progress.close()
        for worker in workers.values():
            worker.close()
        for (configuration, step, threads), answers in runs.items():
            about = loaded[configuration]
            rates = [(args.new_tokens - 1) / (a["seconds"][-1] - a["seconds"][0]) for a in answers]
            rows.append(
                {
                    "model": name,
                    "configuration": configuration.name,
                    "step": step,
                    "threads": threads,
                    "group": number,
                    "tokens_per_second": summarize(rates),
                    "first_token_seconds": summarize([a["seconds"][0] for a in answers]),
                    "load_seconds": about["load_seconds"],
                    "peak_bytes": max(a["peak_bytes"] for a in answers),
                    "peak_bytes_above_start": max(a["peak_bytes"] for a in answers) - about["resident_before"],
                    "tokens": answers[-1]["tokens"],
                    "peer": {key: about[key] for key in ("version", "system") if key in about},
                }
            )
    add_agreement(rows)
    return rows


def add_agreement(rows: list[dict[str, Any]]) -> None:
    """How many of the new tokens are, from the first on, those of the dense model in float32."""
    (reference,) = [
        row
        for row in rows
        if (row["configuration"], row["step"], row["threads"]) == ("dense fp32", False, rows[0]["threads"])
    ]
    for row in rows:
        pairs = zip(row["tokens"], reference["tokens"], strict=True)
        row["same_tokens"] = next((i for i, (a, b) in enumerate(pairs) if a != b), len(row["tokens"]))


# -- report ----------------------------------------------------------------------------------------------------------


def label(row: dict[str, Any]) -> str:
    return row["configuration"] + " + step" * row["step"]


def report(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    settings, rows = results["settings"], results["rows"]
    peers = {json.dumps(row["peer"]): row["peer"] for row in rows if row["peer"]}
    llama = "; ".join(f"llama-cpp-python {peer['version']} ({peer['system'].strip()})" for peer in peers.values())
    parts = [
        f"{describe_machine(results['machine'])} Kernel level {results['level']}. {llama or 'llama.cpp: not in this run'}.",
        f"Greedy, prompt of {settings['prompt_tokens']} tokens, {settings['new_tokens']} new ones, batch 1; median of "
        f"{settings['rounds']} runs (10th to 90th percentile). Memory: high-water mark of the process, and above what it "
        "had before it loaded the model.",
    ]
    for name in settings["models"]:
        layers = f", {settings['layers']} layers" if name != "smollm2" else ""
        parts += [f"### {MODELS.get(name, name)}{layers}", model_table([row for row in rows if row["model"] == name])]
    return "\n\n".join(parts)


def model_table(rows: list[dict[str, Any]]) -> str:
    threads = sorted({row["threads"] for row in rows})
    header = [
        "",
        *(f"tokens/s, {n} thread{'s' * (n > 1)}" for n in threads),
        *(f"/ dense bf16, {n}" for n in threads),
        "first token (ms)",
        "load (s)",
        "peak memory (MiB)",
        "above start (MiB)",
        "first tokens as dense fp32",
    ]

    def rate(row: dict[str, Any]) -> float:
        return row["tokens_per_second"]["median"]

    dense = {row["threads"]: rate(row) for row in rows if label(row) == "dense bf16"}
    lines = []
    for name in dict.fromkeys(label(row) for row in rows):
        same = {row["threads"]: row for row in rows if label(row) == name}
        first = same[threads[0]]
        spreads = [same[n]["tokens_per_second"] for n in threads]
        lines.append(
            [
                name,
                *(f"{spread['median']:.1f} ({spread['p10']:.1f} to {spread['p90']:.1f})" for spread in spreads),
                *(f"{rate(same[n]) / dense[n]:.2f}x" for n in threads),
                f"{first['first_token_seconds']['median'] * 1e3:.0f}",
                f"{first['load_seconds']:.1f}",
                f"{max(row['peak_bytes'] for row in same.values()) / 2**20:.0f}",
                f"{max(row['peak_bytes_above_start'] for row in same.values()) / 2**20:.0f}",
                f"{first['same_tokens']} of {len(first['tokens'])}",
            ]
        )
    return table(header, lines)


def plot(results: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    settings = results["settings"]
    figure = Figure(figsize=(8 * len(settings["models"]), 6))
    axes = figure.subplots(1, len(settings["models"]), squeeze=False)[0]
    for name, axis in zip(settings["models"], axes, strict=True):
        rows = [row for row in results["rows"] if row["model"] == name]
        names = list(dict.fromkeys(label(row) for row in rows))[::-1]
        height = 0.8 / len(settings["threads"])
        for index, threads in enumerate(settings["threads"]):
            of_thread = {label(row): row["tokens_per_second"] for row in rows if row["threads"] == threads}
            spreads = [of_thread[label_] for label_ in names]
            axis.barh(
                [place + height * index for place in range(len(names))],
                [spread["median"] for spread in spreads],
                height,
                xerr=[[s["median"] - s["p10"] for s in spreads], [s["p90"] - s["median"] for s in spreads]],
                label=f"{threads} thread{'s' * (threads > 1)}",
            )
        axis.set_yticks(range(len(names)), names)
        axis.set(title=MODELS.get(name, name), xlabel="tokens a second (median, 10th to 90th percentile)")
        axis.legend()
    figure.suptitle(results["machine"]["cpu"])
    figure.tight_layout()
    return figure


def main(argv: list[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--layers", type=int, default=8, help="of the Llama shape, default 8")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES), metavar="SHARE")
    parser.add_argument(
        "--threads", nargs="+", type=int, default=sorted({1, usable_cores()}), help="default: 1 and all usable cores"
    )
    parser.add_argument("--rounds", type=int, default=5, help="runs of each configuration, default 5")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--llama-python",
        default=os.environ.get("PEFT_ELASTIC_BENCH_LLAMA"),
        help="a Python with llama-cpp-python; default: $PEFT_ELASTIC_BENCH_LLAMA, else llama.cpp is left out",
    )
    parser.add_argument(
        "--work", type=Path, help="folder for the models (20 GB with 8 layers); default: a temporary one"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of generate.json, .md, .png, default %(default)s"
    )
    parser.add_argument("--document", type=Path, help="also put the tables into this file (docs/performance.md)")
    parser.add_argument("--smoke", action="store_true", help="a toy model, few tokens: the figures mean nothing")
    # how the script calls itself
    parser.add_argument("--prepare", nargs=2, metavar=("MODEL", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.prepare:
        name, folder = args.prepare
        prepare(name, args.layers, args.sparsities, bool(args.llama_python), Path(folder))
        return None
    if args.serve:
        serve(*args.serve)
        return None
    if args.smoke:
        args.models, args.layers, args.rounds, args.new_tokens = ["toy"], 2, 2, 6

    rows = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = (args.work or Path(scratch)) / name
            folder.mkdir(parents=True, exist_ok=True)
            rows += measure_model(name, args, folder)
    kept = ("models", "layers", "sparsities", "threads", "rounds", "prompt_tokens", "new_tokens")
    results = {
        "machine": machine(),
        "level": extension.selected_level(),
        "settings": {key: getattr(args, key) for key in kept},
        "rows": rows,
    }
    markdown = report(results)
    print(markdown)
    write(args.out, "generate", results, markdown, plot(results))
    if args.document is not None:
        write_into(args.document, "generate", markdown)
    return results


if __name__ == "__main__":
    main()
