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
"""`peft-elastic quickstart` without `--width`: prune, train with the zeros kept, search, merge, deploy on the sparse kernel."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from peft_elastic import (
    ElasticLoraConfig,
    SparseQALoraConfig,
    WandaConfig,
    load_gptq,
    prune,
    save_gptq,
    sparsify_linears,
)
from peft_elastic.common.names import has_suffix
from peft_elastic.layers import extension

from ..prune import calibration_batches
from .base import Quickstart, save, weights_size
from .plan import Plan


_COST = "adapter parameters"
_DEPLOYED = "deployed (sparse bf16)"
_DEPLOYED_INT4 = "deployed (sparse int4)"
_BITS = 4
_GROUP_SIZES = (128, 64, 32)


class PrunedQuickstart(Quickstart):
    """The stages of a model that is pruned first."""

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
        out = args.out
        self.pruned, self.deployed, self.quantized_adapter = out / "pruned", out / "deployed", out / "adapter-int4"
        self.quantized, self.deployed_int4 = out / "gptq-int4", out / "deployed-int4"
        super().__init__(args, plan)

    def make_stages(self) -> list[tuple[str, str, Callable[[], dict[str, Any]]]]:
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
        return self.pruned

    def files(self) -> list[tuple[Path, str]]:
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

    # -- stages ----------------------------------------------------------------------------------------------------

    def prune(self) -> dict[str, Any]:
        model = self.load(self.done.results["data"]["model"])
        report = prune(model, WandaConfig(sparsity=self.plan.sparsity), self._calibration())
        save(model, self.tokenizer, self.pruned)
        report.save(self.pruned / "pruning_report.json")
        return {"rows": [self.row("pruned", model, weights_size(self.pruned))]}

    def adapter_config(self, base: Any, **settings: Any) -> ElasticLoraConfig:
        """Mask the adapter by the zeros of the pruned weights, so that merging keeps them (SparsePEFT)."""
        return SparseQALoraConfig(**settings)

    def search(self) -> dict[str, Any]:
        def cost(model: Any) -> int:
            return model.search_space.count_parameters(model.active_subnet)

        return self.search_for({_COST: cost})

    def deploy(self) -> dict[str, Any]:
        if not extension.is_built():
            print("      left out: the C++ extension is not there (`peft-elastic info`)")
            return {"report": None}
        report = self._deploy(self.load(self.merged), self.deployed)
        return {"report": report}

    def _deploy(self, model: Any, folder: Path) -> str:
        report = sparsify_linears(model.cpu(), when="always" if self.args.smoke else "faster")
        print("      " + str(report).replace("\n", "\n      "))
        save(model, self.tokenizer, folder)
        return str(report)

    def quantize(self) -> dict[str, Any]:
        base = self.load(self.pruned)
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
        trained = self.fit(model, self.plan.quantized_steps, self.quantized_adapter)
        merged = model.merge_and_unload(sparse_kernel=False)
        shutil.rmtree(self.quantized, ignore_errors=True)
        save_gptq(merged, self.quantized, tokenizer=self.tokenizer)
        report = None
        if extension.is_built():
            report = self._deploy(load_gptq(self.quantized).eval(), self.deployed_int4)
        return {"report": report, "train": trained}

    def deployed_models(self) -> dict[str, Path]:
        return {
            name: folder
            for name, stage, folder in (
                (_DEPLOYED, "deploy", self.deployed),
                (_DEPLOYED_INT4, "quantize", self.deployed_int4),
            )
            if self.done.results[stage]["report"] is not None
        }

    # -- what they share -------------------------------------------------------------------------------------------

    def _calibration(self) -> Any:
        texts = [example.text for example in self.examples("train")]
        return calibration_batches(self.tokenizer, texts, *self.plan.calibration, seed=self.args.seed)

    def base_size(self) -> int:
        return weights_size(self.pruned)


def _is_target(name: str, targets: Any) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(has_suffix(name, target) for target in targets)
