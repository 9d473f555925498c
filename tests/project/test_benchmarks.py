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
"""The benchmark scripts run, and compute what their tables say. Their figures are not tested."""

import importlib.util
import json
import math
import sys

import pytest
import torch
from support.places import BENCHMARKS


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nls_vs_lora():
    return load("nls_vs_lora")


@pytest.fixture(scope="module")
def smoke(nls_vs_lora, tmp_path_factory):
    """(results, folder) of a smoke run of two methods."""
    out = tmp_path_factory.mktemp("nls")
    methods = ["--methods", "lora-32", "nls"]
    return nls_vs_lora.main(["--smoke", "--out", str(out), *methods]), out


class TestNlsVsLora:
    def test_writes_all_runs_and_comparisons(self, smoke):
        results, out = smoke
        assert json.loads((out / "results.json").read_text()) == results
        assert [(row["method"], row["seed"]) for row in results["runs"]] == [
            ("lora-32", 0),
            ("nls", 0),
            ("lora-32", 1),
            ("nls", 1),
        ]
        compared = {(row["first"], row["second"]) for row in results["comparisons"]}
        assert ("nls:searched", "lora-32:fixed") in compared
        assert all(row["seeds"] == 2 for row in results["comparisons"])
        assert results["pruning"]["sparsity"] == pytest.approx(0.5, abs=0.01)

    def test_learns_the_toy_task(self, smoke):
        results, _ = smoke
        best = max(subnet["test"] for row in results["runs"] for subnet in row["subnets"].values())
        assert best > 0.8

    def test_reports_subnets_of_different_size(self, smoke):
        results, _ = smoke
        subnets = next(row["subnets"] for row in results["runs"] if row["method"] == "nls")
        sizes = {name: subnet["adapter_parameters"] for name, subnet in subnets.items()}
        assert sizes["min"] * 2 == sizes["max"] and sizes["heuristic"] * 4 == sizes["max"] * 3
        # the search starts from the three references, so that what it selects is at least as good on validation data
        assert subnets["searched"]["validation"] == max(subnet["validation"] for subnet in subnets.values())

    def test_continues_and_refuses_other_settings(self, nls_vs_lora, smoke, monkeypatch):
        results, out = smoke
        rows = (out / "runs.jsonl").read_text().splitlines()
        (out / "runs.jsonl").write_text("\n".join(rows[:-1]) + "\n")
        trained = []
        run = nls_vs_lora.run
        monkeypatch.setattr(nls_vs_lora, "run", lambda *args: trained.append(args[:2]) or run(*args))
        command = ["--smoke", "--out", str(out), "--methods", "lora-32", "nls"]
        again = nls_vs_lora.main(command)
        assert trained == [("nls", 1)]
        assert [row["subnets"] for row in again["runs"]] == [row["subnets"] for row in results["runs"]]
        with pytest.raises(ValueError, match=r"other settings.*max_length"):
            nls_vs_lora.main([*command, "--max-length", "32"])

    def test_same_head_for_every_method(self, nls_vs_lora, smoke):
        _, out = smoke
        heads = [
            nls_vs_lora.build_model(nls_vs_lora.METHODS[name], out / "pruned", seed, 0.1).classifier.weight
            for name, seed in [("lora-32", 3), ("lora-24", 3), ("nls", 3), ("nls", 4)]
        ]
        assert torch.equal(heads[0], heads[1]) and torch.equal(heads[0], heads[2])
        assert not torch.equal(heads[2], heads[3])

    def test_paired_interval(self, nls_vs_lora):
        # by hand: mean 2, standard deviation 1, and 4.3027 is the 97.5% quantile of t with two degrees of freedom
        centre, half_width = nls_vs_lora.t_interval([1.0, 2.0, 3.0])
        assert centre == 2 and half_width == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)
        assert math.isnan(nls_vs_lora.t_interval([1.0])[1])

        def row(method, seed, subnet, value):
            return {"method": method, "seed": seed, "subnets": {subnet: {"test": value}}}

        runs = [row("lora-32", seed, "fixed", 0.80) for seed in (0, 1, 2, 3)]
        runs += [row("nls", seed, "searched", 0.80 + 0.01 * (seed + 1)) for seed in (0, 1, 2)]
        (difference,) = nls_vs_lora.compare(runs)
        assert difference["seeds"] == 3 and difference["mean_difference"] == pytest.approx(2)
        assert difference["interval_95"] == pytest.approx([2 - half_width, 2 + half_width])
        assert difference["better_equal_worse"] == [3, 0, 0]


@pytest.mark.slow  # the tokenizer and the encoder come from the package index
class TestWidth:
    @pytest.fixture(autouse=True)
    def _support(self, monkeypatch):
        monkeypatch.syspath_prepend(BENCHMARKS)

    def test_importance(self, tmp_path):
        module = load("importance")
        results = module.main(["--smoke", "--out", str(tmp_path)])
        assert {row["order"] for row in results["rows"]} == set(module.ORDERS)
        assert all(row["removed"] == pytest.approx(row["share"], abs=2e-3) for row in results["rows"])
        assert json.loads((tmp_path / "importance.json").read_text()) == results

    def test_lonas(self, tmp_path):
        module = load("lonas")
        results = module.main(["--smoke", "--out", str(tmp_path)])
        assert [row["method"] for row in results["rows"]] == list(module.METHODS)
        for row in results["rows"]:
            assert row["searched"]["macs"] <= row["heuristic"]["macs"] < row["max"]["macs"]
        assert len(results["hypervolume"]) == 4

    def test_widths(self, tmp_path):
        results = load("widths").main(["--smoke", "--out", str(tmp_path)])
        for found in results["models"].values():
            assert 0 < found["training"]["parameters"] < 1
            for workload in found["workloads"]:
                assert all(0 < seconds for seconds in workload["prediction"]["predicted"])
                assert len(workload["prediction"]["measured"]) == results["settings"]["random_subnets"]
                assert all(row["parameters"] < 1 for row in workload["speed_up"])


@pytest.mark.slow  # the tokenizer comes from the package index
class TestStructured:
    @pytest.fixture(scope="class")
    def structured(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(BENCHMARKS)
            return load("structured")

    @pytest.fixture(scope="class")
    def smoke(self, structured, tmp_path_factory):
        out = tmp_path_factory.mktemp("structured")
        return structured.main(["--smoke", "--out", str(out)]), out

    def test_compares_at_equal_parameters(self, structured, smoke):
        results, out = smoke
        rows = {row["method"]: row for row in results["rows"] if row["part"] == "methods"}
        assert set(rows) == {"dense", *structured.METHODS}
        base = rows.pop("block-only")
        for method, row in rows.items():
            if method != "dense":
                assert row["removed"] == pytest.approx(base["removed"], abs=0.0025)
                plan = json.loads((out / row["plan"]).read_text())
                assert 1 - plan["after"]["parameters"] / plan["before"]["parameters"] == pytest.approx(row["removed"])
        assert rows["MultiPruner"]["block_passes"] < rows["MultiPruner"]["plain_block_passes"]
        assert rows["random"]["evaluations"] == rows["uniform width"]["evaluations"] == 2

    def test_runs_the_plain_loop_in_full(self, smoke):
        (row,) = (row for row in smoke[0]["rows"] if row["part"] == "cost")
        assert row["plain"]["block_passes"] > row["ours"]["block_passes"]
        assert row["plain"]["evaluations"] > row["ours"]["evaluations"]
        assert row["same"] == (row["ours_values"] == row["plain_values"])

    def test_times_and_recovers_all_models(self, smoke):
        rows = smoke[0]["rows"]
        fast = [row for row in rows if row["part"] == "speed"]
        assert len(fast) == 7 and all(row["tokens_per_second"] > 0 for row in fast)
        recovered = {row["method"]: row for row in rows if row["part"] == "recovery"}
        assert set(recovered) == {"dense", "MultiPruner"}
        assert all(row["before"] != row["after"] for row in recovered.values())
