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
"""`peft-elastic quickstart`: the whole path on a small model, from pruning to a deployed sparse model, and a table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_elastic import (
    ElasticLoraConfig,
    SparseQALoraConfig,
    WandaConfig,
    densify_linears,
    load_gptq,
    prune,
    save_gptq,
    search_subnet,
    sparsify_linears,
)
from peft_elastic.common import assets
from peft_elastic.common.writing import atomic_path, atomic_write_text
from peft_elastic.layers import extension
from peft_elastic.pruning import measure_sparsity

from . import _common, _data, _evaluation, _reload, _report, _serving, info
from ._journal import Journal
from .prune import calibration_batches
from .train import fit, sort


# The groups of the Shears paper, for models whose modules have these names.
_GROUPS = [["q_proj", "k_proj", "v_proj"], ["up_proj", "gate_proj"], ["down_proj"]]
_COST = "adapter parameters"
_DEPLOYED = "deployed (sparse bf16)"
_DEPLOYED_INT4 = "deployed (sparse int4)"
_BITS = 4
_GROUP_SIZES = (128, 64, 32)
# Options of the command line that do not change the results.
_NOT_SETTINGS = ("device", "fresh", "out", "run", "traceback", "sparsity", "steps", "evals")


@dataclass(frozen=True)
class Plan:
    """How much of everything. The numbers are chosen for 10 minutes on two CPU cores."""

    sparsity: float = 0.5
    calibration: tuple[int, int] = (32, 128)  # sequences, tokens
    ranks: tuple[int, ...] = (32, 24, 16)
    learning_rate: float = 5e-4
    batch_size: int = 16
    steps: int = 50
    quantized_steps: int = 20
    evals: int = 24
    validation: int = 100  # examples
    test: int = 300
    serving: tuple[int, int, int, int] = (32, 32, 2, 2)  # tokens of the prompt, new tokens, repeats, rounds


_SMOKE = Plan(
    calibration=(8, 32),
    ranks=(8, 6, 4),
    batch_size=8,
    steps=6,
    quantized_steps=3,
    evals=6,
    validation=16,
    test=24,
    serving=(4, 4, 1, 1),
)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="the whole path on a small model, in minutes",
        description="Prune a small language model, train an elastic super-adapter on it that keeps the zeros, search that for a\n"
        "subnet, merge the subnet into the model, deploy that on the sparse CPU kernel; train on with the rounding to 4\n"
        "bits, and deploy that as well. Load the results in other processes, and compare everything on held-out data.\n"
        "Without options: SmolLM2-135M-Instruct and the sentiment of movie reviews, both from the Python package\n"
        "index; 10 minutes at most on two cores, 4 GB of memory, 1.3 GB in --out. Interrupted, the same command continues.\n"
        "With --width the model is not pruned but made narrower and shorter: sort its heads and channels by importance,\n"
        "train a super-network of elastic width, depth and rank, search it for a subnet of at most --max-parameters,\n"
        "extract that as an ordinary smaller model, and compare.",
        epilog="examples:\n"
        "  peft-elastic quickstart\n"
        "  peft-elastic quickstart --width --max-parameters 70%%\n"
        "  peft-elastic quickstart --sparsity 0.6 --steps 100 --evals 60 --out quickstart-60\n"
        "  peft-elastic quickstart --model Qwen/Qwen2.5-0.5B --dataset stanfordnlp/sst2 \\\n"
        "      --template 'Review: {}\\nSentiment:' --out quickstart-qwen",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan = Plan()
    _common.add_model_arguments(parser, required=False, more_help=" (default: SmolLM2-135M-Instruct, downloaded once)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for everything (default: quickstart, or quickstart-width)",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="delete what an earlier run left in --out, and start again"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="only see that it runs: a tiny random model, made-up data"
    )
    _common.add_seed_argument(parser, "everything random")
    parser.add_argument("--width", action="store_true", help="elastic width and depth instead of pruning")
    parser.add_argument(
        "--max-parameters", metavar="B", help="with --width: a number, or a share of all such as 80%% (default: 80%%)"
    )
    parser.add_argument("--sparsity", type=float, help=f"of the pruned model (default: {plan.sparsity})")
    parser.add_argument("--steps", type=_data.positive_int, help=f"optimizer steps (default: {plan.steps})")
    parser.add_argument("--evals", type=_data.positive_int, help=f"evaluations of the search (default: {plan.evals})")
    _data.add_data_arguments(
        parser,
        "use, split by the quickstart itself; labels of a few kinds (default: the movie reviews)",
        required=False,
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    changes = {name: value for name in ("sparsity", "steps", "evals") if (value := getattr(args, name)) is not None}
    plan = dataclasses.replace(_SMOKE if args.smoke else Plan(), **changes)
    if args.width and args.sparsity is not None:
        raise ValueError("`--sparsity` goes without `--width`, which prunes nothing.")
    if args.max_parameters is not None and not args.width:
        raise ValueError("`--max-parameters` goes with `--width`.")
    args.out = args.out or Path("quickstart-width" if args.width else "quickstart")
    WandaConfig(sparsity=plan.sparsity)  # raises if it is out of range
    if args.smoke and (args.model or args.dataset):
        raise ValueError("`--smoke` makes its own model and data; leave `--model` and `--dataset` out.")
    if args.out.exists() and not (args.out / "stages.json").is_file():
        _common.check_new_folder(args.out)
    elif args.fresh and args.out.exists():
        shutil.rmtree(args.out)
    transformers.utils.logging.disable_progress_bar()  # models load in a second
    if args.width:
        from ._quickstart_width import WidthQuickstart  # which builds on this module

        WidthQuickstart(args, plan).run()
    else:
        Quickstart(args, plan).run()
    return 0


class Quickstart:
    """The stages. Each reads what it needs from the folder of the run and leaves what it makes there, so that any of them
    can be the first after an interruption. A stage returns what `Journal` keeps, with `rows` for the table."""

    # what has to be imported to load the merged model
    imports: tuple[str, ...] = ()
    reloaded = "merged, reloaded"
    comparisons: tuple[tuple[str, str], ...] = (
        ("pruned", "dense"),
        ("tuned, searched subnet", "pruned"),
        ("tuned, searched subnet", "dense"),
        ("tuned, searched subnet", "tuned, max subnet"),
        ("tuned, searched subnet", "tuned, heuristic subnet"),
        ("merged, reloaded", "tuned, searched subnet"),
        (_DEPLOYED, "merged, reloaded"),
        (_DEPLOYED, "dense"),
        (_DEPLOYED_INT4, "merged, reloaded"),
        (_DEPLOYED_INT4, "dense"),
    )

    def __init__(self, args: argparse.Namespace, plan: Plan) -> None:
        self.args, self.plan, self.out = args, plan, args.out
        self.pruned, self.adapter, self.merged = self.out / "pruned", self.out / "adapter", self.out / "merged"
        self.deployed, self.quantized_adapter = self.out / "deployed", self.out / "adapter-int4"
        self.quantized, self.deployed_int4 = self.out / "gptq-int4", self.out / "deployed-int4"
        self.expected = self.out / "merged_outputs.npz"
        self.stages = self.make_stages()
        options = {name: value for name, value in vars(args).items() if name not in _NOT_SETTINGS}
        settings = {**options, **json.loads(json.dumps(dataclasses.asdict(plan)))}
        self.journal = Journal(self.out / "stages.json", settings, len(self.stages))

    def make_stages(self) -> list[tuple[str, str, Callable[[], dict[str, Any]]]]:
        """Name, title and work of each stage."""
        return [
            ("data", "Model and data", self.get_data),
            ("dense", "Measure the dense model", self.measure_dense),
            ("prune", f"Prune: Wanda, {self.plan.sparsity:.0%} of the weights", self.prune),
            (
                "train",
                f"Train the elastic super-adapter: {self.plan.steps} steps, ranks {list(self.plan.ranks)}",
                self.train,
            ),
            (
                "search",
                f"Search: {self.plan.evals} subnets on {self.plan.validation} validation examples",
                self.search,
            ),
            ("tuned", "Measure the tuned model", self.measure_tuned),
            ("merge", "Merge the searched subnet", self.merge),
            ("reload", "Load the merged model in a fresh process, with transformers alone", self.reload),
            ("deploy", "Swap in the sparse layers that are faster here", self.deploy),
            (
                "quantize",
                f"Train on with the rounding to {_BITS} bits ({self.plan.quantized_steps} steps), merge, and deploy that",
                self.quantize,
            ),
            ("serve", "Serve the dense and the deployed models, each in a fresh process", self.serve),
        ]

    @property
    def base(self) -> str | Path:
        """The model that the adapter is trained on."""
        return self.pruned

    def files(self) -> list[tuple[Path, str]]:
        """What the run leaves, and what it is."""
        return [
            (self.out / "results.json", "the table and everything behind it"),
            (self.out / "pareto.png", "the search: progress and Pareto front"),
            (self.deployed, "deployed model: import peft_elastic; AutoModelForCausalLM.from_pretrained(...)"),
            (self.deployed_int4, f"the same in {_BITS} bits"),
            (self.quantized, f"the same in {_BITS} bits as a GPTQ checkpoint: load_gptq(...), GPTQModel"),
            (self.merged, "merged model: AutoModelForCausalLM.from_pretrained(...)"),
            (self.adapter, "super-adapter with the searched subnet active"),
            (self.pruned, "pruned model"),
        ]

    def run(self) -> None:
        results = {name: self.journal.run(name, title, work) for name, title, work in self.stages}
        rows = [row for result in results.values() for row in result.get("rows", [])]
        for row in rows:
            row["serving"] = results["serve"]["serving"].get(row["name"])
        names = {row["name"] for row in rows}
        differences = _report.compare(rows, [pair for pair in self.comparisons if names.issuperset(pair)])
        self._write_results(results, rows, differences)
        files = [(path, what) for path, what in self.files() if path.exists()]
        print(f"\n{_report.table(rows)}\n")
        print(_report.legend(results["data"]["examples"]))
        print(_report.serving_legend(results["serve"]["serving"], self.plan.serving))
        if self.args.smoke:
            print("This was a smoke run: the model is random, and the numbers mean nothing.")
        print(f"\n{_report.describe(differences)}")
        _common.say_written(
            files,
            ["peft-elastic", "merge", "--model", self.base, "--adapter", self.adapter]
            + ["--subnet", "heuristic", "--out", "heuristic-merged"],
        )

    # -- stages ----------------------------------------------------------------------------------------------------

    def get_data(self) -> dict[str, Any]:
        if self.args.smoke:
            model, examples = str(self.out / "smoke-model"), _smoke_examples()
            _save(*_smoke_model(examples), Path(model))
        else:
            model = self.args.model or str(assets.smollm2_135m())
            examples = _data.read_examples(self.args, self.args.samples) if self.args.dataset else movie_examples()
        if not all(example.choices for example in examples):
            raise ValueError("`--dataset` needs labels of a few kinds, or a column 'choices', for the quickstart.")
        splits = _data.split_examples(
            examples, {"test": self.plan.test, "validation": self.plan.validation}, self.args.seed
        )
        _data.write_splits(self.out / "data.json", splits)
        sizes = {name: len(part) for name, part in splits.items()}
        print(f"      {model}; " + ", ".join(f"{size} {name}" for name, size in sizes.items()) + " examples")
        return {"model": model, "examples": sizes}

    def measure_dense(self) -> dict[str, Any]:
        name = self.journal.done["data"]["model"]
        model = self._load(name)
        # what comes from the hub lies in a cache; it is as large there as here
        size = _weights_size(Path(name)) or model.get_memory_footprint()
        return {"rows": [self._row("dense", model, size)], "bytes": size}

    def prune(self) -> dict[str, Any]:
        model = self._load(self.journal.done["data"]["model"])
        report = prune(model, WandaConfig(sparsity=self.plan.sparsity), self._calibration())
        _save(model, self.tokenizer, self.pruned)
        report.save(self.pruned / "pruning_report.json")
        return {"rows": [self._row("pruned", model, _weights_size(self.pruned))]}

    def train(self) -> dict[str, Any]:
        base = self._load(self.base)
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
        return self._fit(model, self.plan.steps, self.adapter)

    def adapter_config(self, base: Any, **settings: Any) -> ElasticLoraConfig:
        """Masked by the zeros of the pruned weights, so that merging keeps them (SparsePEFT)."""
        return SparseQALoraConfig(**settings)

    def _fit(self, model: PeftModel, steps: int, adapter: Path, **sampling: Any) -> dict[str, Any]:
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

    def search(self) -> dict[str, Any]:
        def cost(model: Any) -> int:
            return model.search_space.count_parameters(model.active_subnet)

        return self._search({_COST: cost})

    def _search(self, cost: Any, **bounds: Any) -> dict[str, Any]:
        """Search for the least loss and cost, and make the best subnet the active one of the saved adapter."""
        model = self._load_tuned()
        print(
            f"      {model.search_space}; the objective is the loss on the labels, which moves sooner than the accuracy"
        )
        result = search_subnet(
            model,
            _evaluation.ChoiceEvaluator(self._examples("validation"), self.tokenizer),
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
            size = self._base_size(model) - _inactive(model) * model.dtype.itemsize
            size += adapter * torch.float32.itemsize  # as adapters are trained and saved
            rows.append(self._row(f"tuned, {name} subnet", model, size))
        return {"rows": rows}

    def merge(self) -> dict[str, Any]:
        model = self._load_tuned()
        prompts = [example.prompt for example in self._examples("test")[:8]]
        apart = _reload.outputs(model, self.tokenizer, prompts)
        merged = model.merge_and_unload(safe_merge=True, sparse_kernel=False)  # for transformers alone
        together = _reload.outputs(merged, self.tokenizer, prompts)
        with atomic_path(self.expected) as file:
            np.savez(file, prompts=prompts, **together)
        _save(merged, self.tokenizer, self.merged)
        difference = float(np.abs(apart["logits"] - together["logits"]).max())
        print(f"      largest difference of a logit to base and adapter apart: {difference:.1e}")
        return {"largest_logit_difference": difference}

    def reload(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            script = Path(_reload.__file__).read_text(encoding="utf-8")
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
        row = self._row(self.reloaded, self._load(self.merged), _weights_size(self.merged), found.pop("measured"))
        return {"rows": [row], **found}

    def deploy(self) -> dict[str, Any]:
        if not extension.is_built():
            print("      left out: the C++ extension is not there (`peft-elastic info`)")
            return {"report": None}
        report = self._deploy(self._load(self.merged), self.deployed)
        return {"report": report}

    def _deploy(self, model: Any, folder: Path) -> str:
        report = sparsify_linears(model.cpu(), when="always" if self.args.smoke else "faster")
        print("      " + str(report).replace("\n", "\n      "))
        _save(model, self.tokenizer, folder)
        return str(report)

    def quantize(self) -> dict[str, Any]:
        base = self._load(self.pruned)
        tuned = PeftConfig.from_pretrained(str(self.adapter))
        layers = [layer for name, layer in base.named_modules() if _is_target(name, tuned.target_modules)]
        group_size = next((size for size in _GROUP_SIZES if not any(i.in_features % size for i in layers)), None)
        if group_size is None:
            print(f"      left out: none of the group sizes {list(_GROUP_SIZES)} divides the inputs of all layers")
            return {"report": None}
        names = ("r", "lora_alpha", "elastic_ranks", "rank_groups", "target_modules", "active_subnet", "task_type")
        config = SparseQALoraConfig(
            **{name: getattr(tuned, name) for name in names},
            quantization_aware=True,
            bits=_BITS,
            group_size=group_size,
            clipping="mse",
        )
        model = get_peft_model(base, config)
        # from what has been learned without the rounding; scales and zero points are not in that file
        set_peft_model_state_dict(model, load_file(self.adapter / SAFETENSORS_WEIGHTS_NAME))
        trained = self._fit(model, self.plan.quantized_steps, self.quantized_adapter)
        merged = model.merge_and_unload(sparse_kernel=False)
        shutil.rmtree(self.quantized, ignore_errors=True)
        save_gptq(merged, self.quantized, tokenizer=self.tokenizer)
        report = None
        if extension.is_built():
            report = self._deploy(load_gptq(self.quantized).eval(), self.deployed_int4)
        return {"report": report, "train": trained}

    def serve(self) -> dict[str, Any]:
        """Loads, generates and measures in turns, so that a machine that slows down slows down all of them."""
        dense = self.journal.done["data"]["model"]
        runs: dict[str, tuple[Any, str]] = {
            "dense": (dense, "plain"),
            f"dense{_report.OPTIMIZED}": (dense, "optimized"),
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
            rows.append(self._row(name, model, _weights_size(folder), answers[name][0]["measured"]))
        return {"rows": rows, "serving": serving}

    def deployed_models(self) -> dict[str, Path]:
        """Name -> folder of the models with sparse layers."""
        return {
            name: folder
            for name, stage, folder in (
                (_DEPLOYED, "deploy", self.deployed),
                (_DEPLOYED_INT4, "quantize", self.deployed_int4),
            )
            if self.journal.done[stage]["report"] is not None
        }

    def more_to_serve(self) -> dict[str, tuple[Any, str]]:
        """Name -> (folder, mode) of what is served beside them."""
        return {}

    def _serve(self, folder: Any, mode: str, settings: dict[str, int], measure: bool) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as temporary:
            options, answer = Path(temporary) / "settings.json", Path(temporary) / "answer.json"
            options.write_text(json.dumps(settings))
            data = self.out / "data.json" if measure else "-"
            arguments = [folder, mode, options, data, answer]
            subprocess.run([sys.executable, "-m", _serving.__name__, *map(str, arguments)], check=True)
            return json.loads(answer.read_text(encoding="utf-8"))

    # -- what they share -------------------------------------------------------------------------------------------

    def _features(self) -> list[dict[str, list[int]]]:
        return _data.encode(self.tokenizer, self._examples("train"), self.args.max_length)

    @cached_property
    def tokenizer(self) -> Any:
        return _common.load_tokenizer(self.journal.done["data"]["model"])

    def _examples(self, split: str) -> list[_data.Example]:
        return _data.read_splits(self.out / "data.json")[split]

    def _calibration(self) -> Any:
        texts = [example.text for example in self._examples("train")]
        return calibration_batches(self.tokenizer, texts, *self.plan.calibration, seed=self.args.seed)

    def _load(self, name: str | Path) -> Any:
        return _common.load_causal_lm(str(name), self.args.dtype, self.args.device).eval()

    def _load_dense(self, name: str | Path) -> Any:
        """The deployed model with its sparse layers as dense ones, to count in them."""
        return densify_linears(_common.load_causal_lm(str(name), self.args.dtype, "cpu").eval())

    def _base_size(self, model: PeftModel) -> int:
        """Bytes of the weights that the adapter was trained on."""
        return _weights_size(self.pruned)

    def _load_tuned(self) -> PeftModel:
        return _common.load_adapter(self._load(self.base), str(self.adapter))

    def _row(self, name: str, model: Any, size: int, measured: dict[str, Any] | None = None) -> dict[str, Any]:
        """A row of the table; `size` is that of the weights on disk, in bytes."""
        if measured is None:
            measured = _evaluation.measure(model, self.tokenizer, self._examples("test"))
        is_tuned = isinstance(model, PeftModel)
        base = model.get_base_model() if is_tuned else model
        adapter = model.search_space.count_parameters(model.active_subnet) if is_tuned else 0
        head = base.get_output_embeddings()
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
        accuracy, error = _report.mean_and_error(measured["correct"])
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
                "seconds": sum(self.journal.seconds.values()),
                "seconds_per_stage": self.journal.seconds,
                "settings": self.journal.settings,
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
            "table": [_report.summary(row) for row in rows],
            "differences": differences,
        }
        atomic_write_text(self.out / "results.json", json.dumps(data, indent=2))


def _median_serving(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the rounds: medians of the times, the largest memory."""
    peaks = [answer["peak_bytes"] for answer in answers if answer["peak_bytes"]]
    return {
        "tokens_per_second": float(np.median([answer["tokens_per_second"] for answer in answers])),
        "load_seconds": float(np.median([answer["load_seconds"] for answer in answers])),
        "peak_bytes": max(peaks, default=None),
        "optimized": answers[0]["optimized"],
    }


def movie_examples() -> list[_data.Example]:
    """The movie reviews that have a clear sentiment and fewer than 160 characters."""
    choices = (" negative", " positive")
    return [
        _data.Example(f"Review: {row['text']}\nSentiment:", choices[row["rating"] > 0], choices)
        for row in assets.movie_reviews()
        if abs(row["rating"]) >= 1 and len(row["text"]) < 160
    ]


def _is_target(name: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save in place of what an interrupted run may have left."""
    shutil.rmtree(folder, ignore_errors=True)
    with _common.new_folder(folder) as temporary:
        _common.save_model(model, tokenizer, temporary)


def _inactive(model: PeftModel) -> int:
    """Parameters of the base that the active subnet leaves out."""
    space = model.search_space
    return space.count_base_parameters(space.max) - space.count_base_parameters(model.active_subnet)


def _weights_size(folder: Path) -> int:
    """Bytes of the weights in a folder, 0 if it does not exist."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# -- smoke mode ----------------------------------------------------------------------------------------------------


def _smoke_examples() -> list[_data.Example]:
    """Made-up reviews."""
    words = {" positive": ("great", "lovely", "clever", "moving"), " negative": ("dull", "awful", "clumsy", "boring")}
    things = ("plot", "cast", "score", "ending", "pace", "dialogue", "camera", "humour")
    return [
        _data.Example(f"Review: The {first} is {word} and the {second} too.\nSentiment:", label, tuple(words))
        for label in words
        for word in words[label]
        for first in things
        for second in things
        if first != second
    ]


def _smoke_model(examples: list[_data.Example]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A small random Llama, and a byte-level tokenizer made for the examples."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((example.text for example in examples), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config), tokenizer
