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
"""`peft-elastic quickstart --width`: from a small model to a smaller one, through a super-network of elastic width and depth."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel

from peft_elastic import ElasticLoraConfig

from . import report
from .base import Quickstart


# Shares of heads and channels. Of nine heads in groups of three, two thirds.
_WIDTH: dict[str, Any] = {"heads": [1.0, 2 / 3], "mlp": [1.0, 0.875, 0.75, 0.625]}


class WidthQuickstart(Quickstart):
    """The stages that differ from those of the pruned model."""

    imports = ("peft_elastic",)  # its blocks may differ in size
    reloaded = "extracted, reloaded"
    comparisons = (
        ("tuned, searched subnet", "dense"),
        ("tuned, searched subnet", "tuned, max subnet"),
        ("extracted, reloaded", "tuned, searched subnet"),
        ("extracted, reloaded", "dense"),
    )

    def make_stages(self) -> list[tuple[str, str, Callable[[], dict[str, Any]]]]:
        plan = self.plan
        return [
            ("data", "Model and data", self.get_data),
            ("dense", "Measure the dense model", self.measure_dense),
            ("train", f"Sort by importance, and train the super-network: {plan.steps} steps of 4 subnets", self.train),
            ("search", f"Search: {plan.evals} subnets on {plan.validation} validation examples", self.search),
            ("tuned", "Measure the tuned model", self.measure_tuned),
            ("merge", "Extract the searched subnet", self.merge),
            ("reload", "Load the extracted model in a fresh process", self.reload),
            ("serve", "Serve the dense and the extracted model, each in a fresh process", self.serve),
        ]

    @property
    def base(self) -> str | Path:
        return self.done.results["data"]["model"]

    def files(self) -> list[tuple[Path, str]]:
        return [
            (self.out / "results.json", "the table and everything behind it"),
            (self.out / "pareto.png", "the search: progress and Pareto front"),
            (self.merged, "extracted model: import peft_elastic; AutoModelForCausalLM.from_pretrained(...)"),
            (self.adapter, "super-network with the searched subnet active"),
        ]

    def adapter_config(self, base: Any, **settings: Any) -> ElasticLoraConfig:
        """Choose two widths of attention, four of the MLP, and half of the blocks to skip, but for the last one."""
        blocks = base.config.num_hidden_layers
        skippable: list[int | str] = [*range(blocks // 2, blocks - 1)] or [blocks - 1]
        return ElasticLoraConfig(**settings, elastic_width=_WIDTH, elastic_depth=skippable)

    def fit(self, model: PeftModel, steps: int, adapter: Path, **sampling: Any) -> dict[str, Any]:
        return super().fit(model, steps, adapter, strategy="sandwich", distillation="max")

    def search(self) -> dict[str, Any]:
        return self.search_for("parameters", max_parameters=self.args.max_parameters or "80%")

    def more_to_serve(self) -> dict[str, tuple[Any, str]]:
        return {
            self.reloaded: (self.merged, "plain"),
            f"{self.reloaded}{report.OPTIMIZED}": (self.merged, "optimized"),
        }

    def base_size(self) -> int:
        return self.done.results["dense"]["bytes"]
