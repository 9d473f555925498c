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
"""The whole quickstart on a tiny random model, and what it says about its own results."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from support import fresh
from transformers import AutoModelForCausalLM

from peft_elastic import SearchResult, SparseLinear, Subnet, load_gptq
from peft_elastic.cli import main
from peft_elastic.cli.quickstart import base, report, serving
from peft_elastic.cli.quickstart.base import movie_examples
from peft_elastic.cli.quickstart.checklist import Checklist
from peft_elastic.cli.quickstart.splits import read_splits
from peft_elastic.common import assets


STAGES = ["data", "dense", "prune", "train", "search", "tuned", "merge", "reload", "deploy", "quantize", "serve"]
ROWS = [
    "dense",
    "pruned",
    "tuned, max subnet",
    "tuned, heuristic subnet",
    "tuned, searched subnet",
    "merged, reloaded",
    "deployed (sparse bf16)",
    "deployed (sparse int4)",
]


def smoke(out, *options):
    return main(["quickstart", "--smoke", "--out", str(out), *options])


def run_child(command, **options):
    """What a run starts to load the merged model with transformers alone is an interpreter of its own, as a user's is."""
    return (subprocess.run if command[1] == "-c" else fresh.run)(command, **options)


@pytest.fixture
def forked(monkeypatch):
    """All processes that a run starts are forked."""
    monkeypatch.setattr(base, "subprocess", SimpleNamespace(run=fresh.run))


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("quickstart") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "subprocess", SimpleNamespace(run=run_child))
        assert smoke(out) == 0
    return out


def test_results(finished):
    found = results(finished)
    assert [row["name"] for row in found["table"]] == ROWS
    rows = {row["name"]: row for row in found["table"]}
    assert all(0 <= row["accuracy"] <= 1 and row["accuracy_standard_error"] > 0 for row in rows.values())
    assert [rows[name]["zeros"] for name in ROWS[:7]] == pytest.approx([0, *[0.5] * 6], abs=1e-3)
    assert rows["deployed (sparse int4)"]["zeros"] >= 0.5 - 1e-3  # rounding makes some more
    adapters = [rows[name]["adapter_parameters"] for name in ROWS]
    assert adapters[0] == adapters[1] == adapters[5] == adapters[6] == adapters[7] == 0 < adapters[3] < adapters[2]
    base = rows["dense"]["parameters"]
    assert all(row["parameters"] == base + row["adapter_parameters"] for row in rows.values())
    weights = (finished / "merged" / "model.safetensors").stat().st_size
    assert (
        rows["merged, reloaded"]["bytes"]
        == rows["pruned"]["bytes"]
        == weights
        > rows["deployed (sparse bf16)"]["bytes"]
        > rows["deployed (sparse int4)"]["bytes"]
    )
    serving = {name: row["serving"] for name, row in rows.items() if row["serving"]}
    assert list(serving) == ["dense", "deployed (sparse bf16)", "deployed (sparse int4)"]
    for each in found["deployment"]["serving"].values():
        assert each["tokens_per_second"] > 0 and each["load_seconds"] > 0 and each["peak_bytes"] > 2**20
    assert serving["deployed (sparse bf16)"]["optimized"] and not serving["dense"]["optimized"]

    assert list(found["run_info"]["seconds_per_stage"]) == STAGES
    assert found["checks"]["reloaded_without_peft_elastic"] and found["checks"]["same_tokens_generated"]
    assert found["checks"]["merged_against_adapter"] < 1e-5 and found["checks"]["reloaded_against_saved"] < 1e-5
    assert found["train_info"]["steps"] == 6 and found["meta_info"]["package_info"]["torch"] == torch.__version__


def test_what_is_left_behind(finished):
    model = AutoPeftModelForCausalLM.from_pretrained(finished / "adapter").eval()
    searched = Subnet.load(finished / "search" / "subnet.json")
    result = SearchResult.load(finished / "search")
    assert result.objectives == {"loss": "min", "adapter parameters": "min"}
    assert model.active_subnet == searched == result.best()
    ids = torch.arange(7)[None]
    with torch.no_grad():
        expected = model(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(finished / "merged").eval()
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=0)
        deployed = AutoModelForCausalLM.from_pretrained(finished / "deployed").eval()
        assert sum(isinstance(module, SparseLinear) for module in deployed.modules()) == 14
        torch.testing.assert_close(deployed(ids).logits, expected, atol=0.1, rtol=0)
        quantized = AutoPeftModelForCausalLM.from_pretrained(finished / "adapter-int4").eval()
        assert quantized.active_subnet == searched
        expected = quantized(ids).logits
        stored = load_gptq(finished / "gptq-int4").eval()
        torch.testing.assert_close(stored(ids).logits, expected, atol=1e-5, rtol=0)
        deployed = AutoModelForCausalLM.from_pretrained(finished / "deployed-int4").eval()
        kinds = {m.value_dtype for m in deployed.modules() if isinstance(m, SparseLinear)}
        assert kinds == {"int4", "bf16"}  # o_proj gets no adapter, and is rounded to bf16 here
        torch.testing.assert_close(deployed(ids).logits, expected, atol=0.01, rtol=0)
    assert (finished / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert not list(finished.glob(".*")) and not (finished / "checkpoints").exists()


def test_width(forked, tmp_path, capsys):
    """The other path: the extracted model is a smaller one, and computes what the searched subnet computes."""
    out = tmp_path / "out"
    assert smoke(out, "--width", "--max-parameters", "90%") == 0
    found = results(out)
    rows = {row["name"]: row for row in found["table"]}
    names = ["dense", "tuned, max subnet", "tuned, heuristic subnet", "tuned, searched subnet", "extracted, reloaded"]
    assert list(rows) == names
    dense, searched, extracted = rows["dense"], rows["tuned, searched subnet"], rows["extracted, reloaded"]
    assert searched["parameters"] <= 0.9 * rows["tuned, max subnet"]["parameters"]
    assert extracted["parameters"] == searched["parameters"] - searched["adapter_parameters"] < dense["parameters"]
    assert extracted["bytes"] < dense["bytes"] and extracted["accuracy"] == searched["accuracy"]
    assert found["checks"]["same_tokens_generated"] and found["checks"]["reloaded_against_saved"] < 1e-4
    speeds = {name: entry["tokens_per_second"] for name, entry in found["deployment"]["serving"].items()}
    assert set(speeds) == {f"{name}{mode}" for name in ("dense", names[-1]) for mode in ("", report.OPTIMIZED)}
    model = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert sum(parameter.numel() for parameter in model.parameters()) == extracted["parameters"]
    result = SearchResult.load(out / "search")
    assert AutoPeftModelForCausalLM.from_pretrained(out / "adapter").active_subnet == result.best()
    capsys.readouterr()
    assert smoke(out, "--width", "--max-parameters", "90%") == 0
    assert capsys.readouterr().out.count("done before") == 8
    assert smoke(out, "--width", "--sparsity", "0.5") == 2 and smoke(out, "--max-parameters", "1") == 2


def test_the_test_data_is_used_for_nothing_else(finished):
    splits = {name: set(part) for name, part in read_splits(finished / "data.json").items()}
    assert {name: len(part) for name, part in splits.items()} == {"test": 24, "validation": 16, "train": 408}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values()))
    # what the search measured differs from what the table says of the very same subnets
    chosen = SearchResult.load(finished / "search").evaluation("max").metrics
    assert chosen["loss"] != results(finished)["table"][2]["label_loss"]


def test_a_second_run_does_nothing_again(finished, capsys):
    def times():
        names = ("pruned/model.safetensors", "adapter/adapter_model.safetensors", "search/history.jsonl", "merged")
        return [(finished / name).stat().st_mtime_ns for name in names]

    before, table = times(), results(finished)["table"]
    assert smoke(finished) == 0
    assert times() == before and results(finished)["table"] == table
    assert capsys.readouterr().out.count("done before") == len(STAGES)


def test_an_interrupted_run_continues_to_the_same_results(finished, forked, tmp_path):
    """As if killed after the pruned model was saved and before that was noted; the rest is there in part."""
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "merged")
    journal = json.loads((out / "stages.json").read_text())
    journal["done"] = {name: journal["done"][name] for name in STAGES[:2]}
    # the copy of the model is the one to use
    journal["done"]["data"]["model"] = str(out / "smoke-model")
    (out / "stages.json").write_text(json.dumps(journal))

    assert smoke(out) == 0
    tables = [results(folder)["table"] for folder in (out, finished)]
    for row in [*tables[0], *tables[1]]:
        if row["serving"]:
            row["serving"] = "times differ"
    assert tables[0] == tables[1]


def test_other_settings_are_not_mixed_in(finished, capsys):
    before = (finished / "stages.json").read_bytes()
    assert smoke(finished, "--steps", "9") == 2
    error = capsys.readouterr().err
    assert "steps is 6 there, 9 here" in error and "--fresh" in error
    assert (finished / "stages.json").read_bytes() == before


@pytest.mark.slow
def test_fresh(finished, forked, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "stages.json").write_text("{")
    assert smoke(out) == 2
    assert smoke(out, "--fresh", "--steps", "2", "--evals", "3") == 0
    assert results(out)["train_info"]["steps"] == 2 and results(out)["train_info"]["search"]["evaluations"] == 3


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    assert smoke(tmp_path) == 2 and smoke(tmp_path, "--fresh") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


# -- parts ---------------------------------------------------------------------------------------------------------


def test_checklist(tmp_path, capsys):
    calls = []

    def work():
        calls.append(1)
        return {"value": len(calls)}

    checklist = Checklist(tmp_path / "stages.json", {"seed": 0}, 2)
    assert checklist.run("a", "first", work)["value"] == 1
    again = Checklist(tmp_path / "stages.json", {"seed": 0}, 2)
    assert again.run("a", "first", work)["value"] == 1 and again.run("b", "second", work)["value"] == 2
    assert list(again.seconds) == ["a", "b"]
    assert "[2/2] second" in capsys.readouterr().out
    with pytest.raises(ValueError, match="seed is 0 there, 1 here"):
        Checklist(tmp_path / "stages.json", {"seed": 1}, 2)
    (tmp_path / "stages.json").write_text("[]")
    with pytest.raises(ValueError, match="damaged"):
        Checklist(tmp_path / "stages.json", {"seed": 0}, 2)


def row(name, correct):
    measured = {"correct": correct, "loss": [0.5] * (len(correct) - 1) + [0.7], "perplexity": 12.0}
    return {
        "name": name,
        "measured": measured,
        "parameters": 1234567,
        "adapter_parameters": 0,
        "zeros": 0.5,
        "bytes": 2e6,
        "serving": None,
    }


def test_differences_are_paired():
    """The standard error is that of the differences: ten examples that all models get right add none."""
    rows = [row("a", [1] * 12 + [0, 0]), row("b", [1] * 10 + [0, 0, 0, 1]), row("c", [1] * 12 + [0, 0])]
    rows[1]["measured"]["loss"] = [0.6] * 13 + [0.9]
    difference, none = report.compare(rows, [("a", "b"), ("a", "c")])
    per_example = torch.tensor([0.0] * 10 + [1, 1, 0, -1])
    assert difference["accuracy"]["difference"] == pytest.approx(1 / 14)
    assert difference["accuracy"]["standard_error"] == pytest.approx((per_example.std() / 14**0.5).item())
    assert difference["accuracy"]["within_noise"] and not difference["label_loss"]["within_noise"]
    assert difference["label_loss"]["difference"] == pytest.approx(-(13 * 0.1 + 0.2) / 14)
    assert none["accuracy"] == {"difference": 0, "standard_error": 0, "within_noise": True} == none["label_loss"]
    (clear,) = report.compare([row("a", [1] * 40), row("b", [0] * 20 + [1] * 20)], [("a", "b")])
    assert not clear["accuracy"]["within_noise"]
    first, second = report.describe([difference, clear]).splitlines()[2:]
    assert "+7.1 ± 12.7  within noise" in first and first.endswith("clear")
    assert "+50.0 ± 8.0  clear" in second


def test_table():
    lines = report.table([row("dense", [1, 1, 0, 1]), row("a longer name", [1, 0, 0, 1])]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "75.0 ± 25.0" in lines[2] and "0.550 ± 0.050" in lines[2] and "1,234,567" in lines[2]


def test_serving_columns():
    slow = {"tokens_per_second": 20.04, "load_seconds": 1.26, "peak_bytes": 1.5e9, "optimized": False}
    served = {**row("dense", [1, 0]), "serving": slow}
    lines = report.table([served, {**row("other", [1, 0]), "serving": {**slow, "peak_bytes": None}}]).splitlines()
    assert lines[2].split()[-3:] == ["20.0", "1.3", "1,500"] and lines[3].split()[-3:] == ["20.0", "1.3", "-"]
    legend = report.serving_legend(
        {"dense": slow, "dense, optimize_generation": {**slow, "optimized": True}}, (32, 64)
    )
    assert "64 new tokens after a prompt of 32" in legend and "reaches 20.0 tokens/s" in legend
    assert "optimize_generation" not in report.serving_legend({"dense": slow}, (32, 64))


def test_without_the_extension_nothing_is_deployed(forked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("peft_elastic.layers.extension._C", None)
    assert smoke(tmp_path / "out", "--steps", "2", "--evals", "3") == 0
    out = capsys.readouterr().out
    assert "left out: the C++ extension is not there" in out and not (tmp_path / "out" / "deployed").exists()
    found = results(tmp_path / "out")
    assert [entry["name"] for entry in found["table"]] == ROWS[:-2] and found["table"][0]["serving"]


def test_movie_examples():
    if not any(name.startswith("vader") for name in assets.cached()):
        pytest.skip(f"the movie reviews are not in {assets.home()}; `peft-elastic quickstart` fetches them")
    examples = movie_examples()
    assert len(examples) == 7523
    assert sum(example.completion == " positive" for example in examples) == 3729
    assert all(
        example.prompt.startswith("Review: ") and example.prompt.endswith("\nSentiment:") for example in examples
    )


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="there the kernel hands a process the peak of its parent"
)
def test_peak_memory_is_that_of_the_process_alone():
    large = bytearray(b"1") * 1_500_000_000
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['peak_bytes']())"
    answer = subprocess.run([sys.executable, "-c", code, serving.__file__], capture_output=True, text=True, check=True)
    assert 2**20 < int(answer.stdout) < len(large) - 2e8
