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
"""What the two paths of `peft-elastic quickstart` share: data, training, search, merging, serving and measuring."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel, get_peft_model

from peft_elastic import ElasticLoraConfig, densify_linears, search_subnet
from peft_elastic.common import assets
from peft_elastic.common.writing import atomic_path, atomic_write_text
from peft_elastic.pruning import measure_sparsity
from peft_elastic.structure.modules import output_head

from .. import _common, _data, _evaluation, info
from .._examples import Example, encode
from .._training import fit, sort
from . import reload, report, serving, smoke, splits
from .checklist import Checklist
from .plan import Plan


# The groups of the Shears paper, for models whose modules have these names.
_GROUPS = [["q_proj", "k_proj", "v_proj"], ["up_proj", "gate_proj"], ["down_proj"]]
# Options of the command line that do not change the results.
_NOT_SETTINGS = ("device", "fresh", "out", "run", "traceback", "sparsity", "steps", "evals")


class Quickstart(ABC):
    """The stages. Each reads what it needs from the folder of the run and leaves what it makes there, so that any of them
    can be the first after an interruption. A stage returns what `Checklist` keeps, with `rows` for the table."""

    # what has to be imported to load the merged model
    imports: tuple[str, ...] = ()
    reloaded = "merged, reloaded"
    # rows of the table, (minuend, subtrahend)
    comparisons: tuple[tuple[str, str], ...]

    def __init__(self, args: argparse.Namespace, plan: Plan) -> None:
        self.args, self.plan, self.out = args, plan, args.out
        self.adapter, self.merged = self.out / "adapter", self.out / "merged"
        self.expected = self.out / "merged_outputs.npz"
        self.stages = self.make_stages()
        options = {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS}
        settings = {**options, **json.loads(json.dumps(dataclasses.asdict(plan)))}
        self.done = Checklist(self.out / "stages.json", settings, len(self.stages))

    @abstractmethod
    def make_stages(self) -> list[tuple[str, str, Callable[[], dict[str, Any]]]]:
        """Make name, title and work of each stage."""

    @property
    @abstractmethod
    def base(self) -> str | Path:
        """The model that the adapter is trained on."""

    @abstractmethod
    def base_size(self) -> int:
        """Bytes of the weights of that model."""

    @abstractmethod
    def adapter_config(self, base: Any, **settings: Any) -> ElasticLoraConfig:
        """Make the adapter, with what both paths set."""

    @abstractmethod
    def search(self) -> dict[str, Any]:
        """Run the stage that chooses a subnet, which `search_for` does."""

    @abstractmethod
    def files(self) -> list[tuple[Path, str]]:
        """List what the run leaves, and what it is."""

    def deployed_models(self) -> dict[str, Path]:
        """Find the models with sparse layers: name -> folder."""
        return {}

    def more_to_serve(self) -> dict[str, tuple[Any, str]]:
        """List what is served beside them: name -> (folder, mode)."""
        return {}

    def run(self) -> None:
        results = {name: self.done.run(name, title, work) for name, title, work in self.stages}
        rows = [row for result in results.values() for row in result.get("rows", [])]
        for row in rows:
            row["serving"] = results["serve"]["serving"].get(row["name"])
        names = {row["name"] for row in rows}
        differences = report.compare(rows, [pair for pair in self.comparisons if names.issuperset(pair)])
        self._write_results(results, rows, differences)
        files = [(path, what) for path, what in self.files() if path.exists()]
        print(f"\n{report.table(rows)}\n")
        print(report.legend(results["data"]["examples"]))
        print(report.serving_legend(results["serve"]["serving"], self.plan.serving))
        if self.args.smoke:
            print("This was a smoke run: the model is random, and the numbers mean nothing.")
        print(f"\n{report.describe(differences)}")
        _common.say_written(
            files,
            ["peft-elastic", "merge", "--model", self.base, "--adapter", self.adapter]
            + ["--subnet", "heuristic", "--out", "heuristic-merged"],
        )

    # -- stages ----------------------------------------------------------------------------------------------------

    def get_data(self) -> dict[str, Any]:
        if self.args.smoke:
            model, examples = str(self.out / "smoke-model"), smoke.smoke_examples()
            save(*smoke.smoke_model(examples), Path(model))
        else:
            model = self.args.model or str(assets.smollm2_135m())
            examples = _data.read_examples(self.args, self.args.samples) if self.args.dataset else movie_examples()
        if not all(example.choices for example in examples):
            raise ValueError("`--dataset` needs labels of a few kinds, or a column 'choices', for the quickstart.")
        parts = splits.split_examples(
            examples, {"test": self.plan.test, "validation": self.plan.validation}, self.args.seed
        )
        splits.write_splits(self.out / "data.json", parts)
        sizes = {name: len(part) for name, part in parts.items()}
        print(f"      {model}; " + ", ".join(f"{size} {name}" for name, size in sizes.items()) + " examples")
        return {"model": model, "examples": sizes}

    def measure_dense(self) -> dict[str, Any]:
        name = self.done.results["data"]["model"]
        model = self.load(name)
        # what comes from the hub lies in a cache; it is as large there as here
        size = weights_size(Path(name)) or model.get_memory_footprint()
        return {"rows": [self.row("dense", model, size)], "bytes": size}

    def train(self) -> dict[str, Any]:
        base = self.load(self.base)
        names = {name.rpartition(".")[2] for name, _ in base.named_modules()}
        paper = [name for group in _GROUPS for name in group]
        known = names.issuperset(paper)
        config = self.adapter_config(
            base,
            r=max(self.plan.ranks),
            elastic_ranks=list(self.plan.ranks),
            lora_alpha=2 * max(self.plan.ranks),
            target_modules=paper if known else "all-linear",
            rank_groups=_GROUPS if known else "block",
            task_type="CAUSAL_LM",
        )
        transformers.set_seed(self.args.seed)  # of the initial weights
        model = get_peft_model(base, config)
        sort(model, self._features()[: self.plan.calibration[0]])
        model.print_trainable_parameters()
        return self.fit(model, self.plan.steps, self.adapter)

    def fit(self, model: PeftModel, steps: int, adapter: Path, **sampling: Any) -> dict[str, Any]:
        """Train for so many steps, and save the adapter."""
        checkpoints = self.out / "checkpoints"
        trained = fit(
            model,
            self._features(),
            checkpoints,
            **{"strategy": "uniform", **sampling},
            seed=self.args.seed,
            max_steps=steps,
            per_device_train_batch_size=self.plan.batch_size,
            learning_rate=self.plan.learning_rate,
            warmup_steps=steps // 10,
            save_steps=20,
        )
        shutil.rmtree(adapter, ignore_errors=True)
        with _common.new_folder(adapter) as folder:
            model.save_pretrained(folder)
        shutil.rmtree(checkpoints, ignore_errors=True)
        return trained

    def search_for(self, cost: Any, **bounds: Any) -> dict[str, Any]:
        """Search for the least loss and cost, and make the best subnet the active one of the saved adapter."""
        model = self._load_tuned()
        print(
            f"      {model.search_space}; the objective is the loss on the labels, which moves sooner than the accuracy"
        )
        result = search_subnet(
            model,
            _evaluation.ChoiceEvaluator(self.examples("validation"), self.tokenizer),
            objectives=["loss", cost],
            mode="min",
            n_evals=self.plan.evals,
            seed=self.args.seed,
            save_dir=self.out / "search",
            **bounds,
        )
        result.plot(self.out / "pareto.png")
        chosen = result.best()
        chosen.save(self.out / "search" / "subnet.json")
        _common.set_active_subnet(model, chosen, self.adapter)
        evaluation = result.evaluation(chosen)
        return {
            "evaluations": len(result.history),
            "pareto": [{"index": e.index, "source": e.source, **e.metrics} for e in result.pareto],
            "chosen": {"index": evaluation.index, "source": evaluation.source, **evaluation.metrics},
        }

    def measure_tuned(self) -> dict[str, Any]:
        model = self._load_tuned()
        searched = model.active_subnet
        rows = []
        for name, subnet in (("max", "max"), ("heuristic", "heuristic"), ("searched", searched)):
            model.set_subnet(subnet)
            adapter = model.search_space.count_parameters(model.active_subnet)
            size = self.base_size() - _inactive(model) * model.dtype.itemsize
            size += adapter * torch.float32.itemsize  # as adapters are trained and saved
            rows.append(self.row(f"tuned, {name} subnet", model, size))
        return {"rows": rows}

    def merge(self) -> dict[str, Any]:
        model = self._load_tuned()
        prompts = [example.prompt for example in self.examples("test")[:8]]
        apart = reload.outputs(model, self.tokenizer, prompts)
        merged = model.merge_and_unload(safe_merge=True, sparse_kernel=False)  # for transformers alone
        together = reload.outputs(merged, self.tokenizer, prompts)
        with atomic_path(self.expected) as file:
            np.savez(file, prompts=prompts, **together)
        save(merged, self.tokenizer, self.merged)
        difference = float(np.abs(apart["logits"] - together["logits"]).max())
        print(f"      largest difference of a logit to base and adapter apart: {difference:.1e}")
        return {"largest_logit_difference": difference}

    def reload(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            script = Path(reload.__file__).read_text(encoding="utf-8")
            device = self.args.device or ("cuda" if torch.cuda.is_available() else "cpu")
            arguments = [self.merged, device, self.out / "data.json", self.expected, answer, *self.imports]
            subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True)
            found = json.loads(answer.read_text(encoding="utf-8"))
        alone = found["without_peft_elastic"] or self.imports
        if not alone or not found["same_tokens"] or found["largest_logit_difference"] > 1e-4:
            raise RuntimeError(f"the merged model computes something else after it was loaded: {found}")
        print(
            f"      largest difference of a logit to the model that was saved: {found['largest_logit_difference']:.1e}; "
            "the generated tokens are the same"
        )
        row = self.row(self.reloaded, self.load(self.merged), weights_size(self.merged), found.pop("measured"))
        return {"rows": [row], **found}

    def serve(self) -> dict[str, Any]:
        """Load, generate and measure in turns, so that a machine that slows down slows down all of them."""
        dense = self.done.results["data"]["model"]
        runs: dict[str, tuple[Any, str]] = {
            "dense": (dense, "plain"),
            f"dense{report.OPTIMIZED}": (dense, "optimized"),
        }
        deployed = self.deployed_models()
        runs |= self.more_to_serve() | {name: (folder, "optimized") for name, folder in deployed.items()}
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
        prompt, new, repeats, rounds = self.plan.serving
        for round_ in range(rounds):
            for name, (folder, mode) in runs.items():
                measured = name in deployed and round_ == 0
                answers[name].append(
                    self._serve(folder, mode, {"prompt": prompt, "new": new, "repeats": repeats}, measured)
                )
        serving = {name: _median_serving(found) for name, found in answers.items()}
        for name, found in serving.items():
            print(f"      {name}: {found['tokens_per_second']:.1f} tokens/s, loaded in {found['load_seconds']:.1f} s")
        rows = []
        for name, folder in deployed.items():
            model = self._load_dense(folder)
            rows.append(self.row(name, model, weights_size(folder), answers[name][0]["measured"]))
        return {"rows": rows, "serving": serving}

    def _serve(self, folder: Any, mode: str, settings: dict[str, int], measure: bool) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as temporary:
            options, answer = Path(temporary) / "settings.json", Path(temporary) / "answer.json"
            options.write_text(json.dumps(settings))
            data = self.out / "data.json" if measure else "-"
            arguments = [folder, mode, options, data, answer]
            subprocess.run([sys.executable, "-m", serving.__name__, *map(str, arguments)], check=True)
            return json.loads(answer.read_text(encoding="utf-8"))

    # -- what they share -------------------------------------------------------------------------------------------

    def _features(self) -> list[dict[str, list[int]]]:
        return encode(self.tokenizer, self.examples("train"), self.args.max_length)

    @cached_property
    def tokenizer(self) -> Any:
        return _common.load_tokenizer(self.done.results["data"]["model"])

    def examples(self, split: str) -> list[Example]:
        return splits.read_splits(self.out / "data.json")[split]

    def load(self, name: str | Path) -> Any:
        return _common.load_causal_lm(str(name), self.args.dtype, self.args.device).eval()

    def _load_dense(self, name: str | Path) -> Any:
        """Load the deployed model with its sparse layers as dense ones, to count in them."""
        return densify_linears(_common.load_causal_lm(str(name), self.args.dtype, "cpu").eval())

    def _load_tuned(self) -> PeftModel:
        return _common.load_adapter(self.load(self.base), str(self.adapter))

    def row(self, name: str, model: Any, size: int, measured: dict[str, Any] | None = None) -> dict[str, Any]:
        """Make a row of the table; `size` is that of the weights on disk, in bytes."""
        if measured is None:
            measured = _evaluation.measure(model, self.tokenizer, self.examples("test"))
        is_tuned = isinstance(model, PeftModel)
        base = model.get_base_model() if is_tuned else model
        adapter = model.search_space.count_parameters(model.active_subnet) if is_tuned else 0
        head = output_head(base)
        layers = [name for name in measure_sparsity(base) if base.get_submodule(name) is not head]
        own = sum(parameter.numel() for key, parameter in base.named_parameters() if ".lora_" not in key)
        row = {
            "name": name,
            "measured": measured,
            "parameters": own - (_inactive(model) if is_tuned else 0) + adapter,
            "adapter_parameters": adapter,
            "zeros": _common.zero_share(base, layers),
            "bytes": size,
        }
        accuracy, error = report.mean_and_error(measured["correct"])
        print(f"      {name}: accuracy {100 * accuracy:.1f} ± {100 * error:.1f} %", flush=True)
        return row

    def _write_results(
        self, results: dict[str, Any], rows: list[dict[str, Any]], differences: list[dict[str, Any]]
    ) -> None:
        machine = info.collect()
        data = {
            "run_info": {
                "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "command": sys.argv,
                "seconds": sum(self.done.seconds.values()),
                "seconds_per_stage": self.done.seconds,
                "settings": self.done.settings,
            },
            "train_info": {**results["train"], "search": results["search"]},
            "meta_info": {
                "model": results["data"]["model"],
                "examples": results["data"]["examples"],
                "package_info": machine.pop("versions"),
                "system_info": machine,
            },
            "checks": {
                "merged_against_adapter": results["merge"]["largest_logit_difference"],
                "reloaded_against_saved": results["reload"]["largest_logit_difference"],
                "reloaded_without_peft_elastic": results["reload"]["without_peft_elastic"],
                "same_tokens_generated": results["reload"]["same_tokens"],
            },
            "deployment": {
                "reports": [results[stage]["report"] for stage in ("deploy", "quantize") if stage in results],
                "serving": results["serve"]["serving"],
            },
            "table": [report.summary(row) for row in rows],
            "differences": differences,
        }
        atomic_write_text(self.out / "results.json", json.dumps(data, indent=2))


def _median_serving(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Take, of the rounds, medians of the times, the largest memory."""
    peaks = [answer["peak_bytes"] for answer in answers if answer["peak_bytes"]]
    return {
        "tokens_per_second": float(np.median([answer["tokens_per_second"] for answer in answers])),
        "load_seconds": float(np.median([answer["load_seconds"] for answer in answers])),
        "peak_bytes": max(peaks, default=None),
        "optimized": answers[0]["optimized"],
    }


def movie_examples() -> list[Example]:
    """Choose the movie reviews that have a clear sentiment and fewer than 160 characters."""
    choices = (" negative", " positive")
    return [
        Example(f"Review: {row['text']}\nSentiment:", choices[row["rating"] > 0], choices)
        for row in assets.movie_reviews()
        if abs(row["rating"]) >= 1 and len(row["text"]) < 160
    ]


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save in place of what an interrupted run may have left."""
    shutil.rmtree(folder, ignore_errors=True)
    with _common.new_folder(folder) as temporary:
        _common.save_model(model, tokenizer, temporary)


def _inactive(model: PeftModel) -> int:
    """Count the parameters of the base that the active subnet leaves out."""
    space = model.search_space
    return space.count_base_parameters(space.max) - space.count_base_parameters(model.active_subnet)


def weights_size(folder: Path) -> int:
    """Count the bytes of the weights in a folder, 0 if it does not exist."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
