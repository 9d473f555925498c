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
"""The examples run, in their smoke mode, as a user would start them."""

import json
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from support import fresh
from support.places import EXAMPLES
from transformers import AutoModelForSequenceClassification

from peft_elastic import Bounds, ElasticModel, PruningPlan, SearchResult
from peft_elastic.layers import ops


sys.path.insert(0, str(EXAMPLES))


@pytest.mark.parametrize(
    "script, train, test",
    [
        ("shears_math.py", "gsm8k_train.jsonl", "gsm8k_test.jsonl"),
        ("shears_math.py", "mawps_train.json", "mawps_test.json"),
        ("shears_commonsense.py", "arc_easy_train.jsonl", "arc_easy_test.jsonl"),
    ],
)
def test_smoke_mode(script, train, test, shared_data, tmp_path):
    command = [sys.executable, EXAMPLES / script, "--smoke", "--out", tmp_path / "out"]
    command += ["--train", shared_data / train, "--test", shared_data / test]
    done = fresh.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"dense", "pruned", "tuned, max subnet", "tuned, searched subnet"} <= set(results)
    assert all(0 <= value <= 1 for value in results.values() if isinstance(value, float))
    for written in ("pareto.png", "adapter/adapter_config.json", "lora/adapter_model.safetensors"):
        assert (tmp_path / "out" / written).stat().st_size > 0


@pytest.mark.parametrize(
    "pipeline, more, merged",
    [
        ("qa-sparsepeft", [], "gptq"),
        ("sparsepeft", ["--ranks", "8"], "dense"),
        ("sqft", [], None),
        pytest.param("shears", [], None, marks=pytest.mark.slow),
    ],
)
def test_sqft_smoke_mode(pipeline, more, merged, shared_data, tmp_path):
    command = [sys.executable, EXAMPLES / "sqft_gsm8k.py", "--smoke", "--out", tmp_path / "out", *more]
    command += ["--pipeline", pipeline, "--train", shared_data / "gsm8k_train.jsonl"]
    command += ["--test", shared_data / "gsm8k_test.jsonl"]
    done = fresh.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"dense", "pruned", "tuned" if more else "tuned, searched subnet"} <= set(results)
    assert ("merged" in results) == (merged is not None)
    if merged is not None:
        config = json.loads((tmp_path / "out" / "merged" / "config.json").read_text())
        assert ("quantization_config" in config) == (merged == "gptq")


@pytest.mark.parametrize(
    "script, train, test, options",
    [
        ("lonas_glue.py", "sst2_train.tsv", "sst2_dev.tsv", []),
        (
            "lonas_commonsense.py",
            "arc_easy_train.jsonl",
            "arc_easy_test.jsonl",
            ["--strategy", "sandwich", "--distillation", "--depth", "1", "--progressive", "--order", "gradient"],
        ),
        pytest.param("lonas_glue.py", "sst2_train.tsv", "sst2_dev.tsv", ["--order", "none"], marks=pytest.mark.slow),
    ],
)
def test_lonas_smoke_mode(script, train, test, options, shared_data, tmp_path):
    command = [sys.executable, EXAMPLES / script, "--smoke", "--out", tmp_path / "out", *options]
    command += ["--train", shared_data / train, "--test", shared_data / test]
    done = fresh.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["subnets"]
    assert list(rows) == ["max", "heuristic", "searched", "min"]
    assert all(0 <= row[f"{data} accuracy"] <= 1 for row in rows.values() for data in ("validation", "test"))
    for name in ("macs", "parameters"):
        assert rows["max"][name] > rows["heuristic"][name] > rows["min"][name]
        assert rows["max"][name] >= rows["searched"][name] >= rows["min"][name]
    assert all(row["seconds"] > 0 for row in rows.values())
    assert "largest difference of a logit" in done.stdout
    assert (tmp_path / "out" / "extracted" / "model.safetensors").stat().st_size > 0


@pytest.mark.parametrize(
    "metric, options",
    [
        ("accuracy", []),
        pytest.param("mcc", ["--task", "cola", "--order", "gradient", "--start", "teacher"], marks=pytest.mark.slow),
    ],
)
def test_eftnas_smoke_mode(metric, options, shared_data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, EXAMPLES / "eftnas_glue.py", "--smoke", "--out", out, *options]
    command += ["--train", shared_data / "sst2_train.tsv", "--test", shared_data / "sst2_dev.tsv"]
    done = fresh.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    rows = results["models"]
    assert results["metric"] == metric and list(rows) == ["teacher", "max", "heuristic", "searched"]
    for row in rows.values():
        assert list(row["held-out"]) == [metric] and row["seconds"] > 0
        assert all(-1 <= value <= 1 for value in (row["selected"], row["held-out"][metric]))
    for name in ("macs", "parameters"):
        assert rows["teacher"][name] == rows["max"][name] > rows["heuristic"][name]
    # the cheapest within a point of the largest, by what was selected on
    result = SearchResult.load(out / "search")
    good = [e.metrics for e in result.history if e.metrics[metric] >= rows["max"]["selected"] - 0.01]
    assert rows["searched"]["macs"] == min(metrics["macs"] for metrics in good)
    model = ElasticModel.from_pretrained(out / "supernet")
    assert model.active_subnet == result.best(max_drop=0.01)
    bounds = Bounds.load(out / "bounds.json")
    config = model.elastic_config
    assert (config.elastic_width, config.elastic_depth) == (bounds.elastic_width, bounds.elastic_depth)
    assert all(model.search_space.subnet(target.subnet) for target in bounds.targets)  # each of them is in it
    assert "largest difference of a logit" in done.stdout and f"held-out {metric}" in done.stdout
    small = AutoModelForSequenceClassification.from_pretrained(out / "extracted")
    assert small.num_parameters() == rows["searched"]["parameters"]


def test_bootstrapnas_smoke_mode(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, EXAMPLES / "bootstrapnas_resnet.py", "--smoke", "--out", out]
    done = fresh.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    rows = results["models"]
    assert list(rows) == ["pretrained", "max", "searched"]
    assert rows["max"]["macs"] >= rows["searched"]["macs"] and all(row["held-out"] > 0.5 for row in rows.values())
    result = SearchResult.load(out / "search")
    assert result.best(max_drop=0.01).to_dict() == results["subnet"] and (out / "pareto.png").stat().st_size > 0
    model = ElasticModel.from_pretrained(out / "supernet")
    assert model.search_space.subnet(results["subnet"])
    difference = float(done.stdout.rpartition("in a fresh process")[2])
    assert difference < 1e-5


def test_eftnas_holds_out_both_splits_of_mnli(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lonas", None)  # there is one among the benchmarks, too; put back at the end
    del sys.modules["lonas"]
    monkeypatch.syspath_prepend(EXAMPLES)
    import eftnas_glue
    import tasks

    def read(source, split):
        assert source == "nyu-mll/glue:mnli"
        rows = [{"premise": f"{split} {i}", "hypothesis": f"no {i}", "label": i % 3} for i in range(24)]
        return Dataset.from_list(rows if split != "validation_mismatched" else rows[:9:3])

    monkeypatch.setattr(tasks, "read", read)
    monkeypatch.setattr(sys, "argv", ["eftnas_glue.py", "--smoke", "--task", "mnli"])
    args = eftnas_glue.parse_args()
    data = eftnas_glue.prepare_classifier(args, "validation_matched", score=tasks.hits)
    judged = eftnas_glue.held_out_of(args, data, score=tasks.hits)(data.model.eval())
    assert list(judged) == ["accuracy", "accuracy, validation_mismatched"]
    assert judged["accuracy"] == data.test_accuracy(data.model)
    texts = [(f"validation_mismatched {i}", f"no {i}") for i in (0, 3, 6)]  # their label is 0
    logits = [data.model(**data.tokenizer(*pair, return_tensors="pt")).logits for pair in texts]
    hits = sum(int(row.argmax()) == 0 for row in logits)
    assert judged["accuracy, validation_mismatched"] == pytest.approx(hits / 3)


def test_matthews_correlation():
    """It is Pearson's of two columns of zeros and ones."""
    import tasks

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        found, right = torch.randint(0, 2, (2, 13), generator=generator)
        expected = np.corrcoef(found.double().numpy(), right.double().numpy())[0, 1]
        assert tasks.matthews(found, right) == pytest.approx(expected)
    assert tasks.matthews(torch.ones(4).long(), torch.tensor([0, 1, 0, 1])) == 0
    assert tasks.hits(torch.tensor([2, 0, 1]), torch.tensor([2, 1, 1])) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--elastic-width", "1.0", "0.5", "--ratio", "0.3"],
        pytest.param(["--elastic", "--split", "auto", "--order", "l1"], marks=pytest.mark.slow),
    ],
)
def test_multipruner_smoke_mode(options, shared_data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, EXAMPLES / "multipruner_recovery.py", "--smoke", "--out", out, *options]
    command += ["--train", shared_data / "gsm8k_train.jsonl", "--text", shared_data / "wikitext2_valid.txt"]
    command += ["--test", shared_data / "arc_easy_test.jsonl"]
    done = fresh.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((out / "results.json").read_text())["models"]
    assert list(rows) == ["dense", "pruned", "recovered"]
    assert all(row["perplexity"] > 1 and 0 <= row["accuracy"] <= 1 for row in rows.values())
    assert rows["recovered"]["parameters"] == rows["pruned"]["parameters"] < rows["dense"]["parameters"]
    plan = PruningPlan.load(out / "plan.json")
    assert plan.before["parameters"] == rows["dense"]["parameters"]
    assert plan.after["parameters"] == rows["pruned"]["parameters"]
    assert "largest difference of a logit" in done.stdout
    for written in ("plan.png", "merged/model.safetensors", "merged/tokenizer.json", "adapter/adapter_config.json"):
        assert (out / written).stat().st_size > 0


@pytest.mark.parametrize(
    "options",
    [[], pytest.param(["--ratio", "0", "--no-reference"], marks=pytest.mark.slow)],
)
def test_stacked_smoke_mode(options, shared_data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, EXAMPLES / "stacked.py", "--smoke", "--ratio", "0.2", "--out", out, *options]
    command += ["--train", shared_data / "sst2_train.tsv", "--test", shared_data / "sst2_dev.tsv"]
    done = fresh.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())
    rows = {row["name"].partition(",")[0]: row for row in results["rows"] if not row["name"].startswith("(")}
    deployed = ["deployed"] if ops.is_available() else []
    steps = ["dense", "structured", "sparse", "tuned with int4", "merged", *deployed]
    assert list(rows) == [*steps, "reloaded in a fresh process"]
    assert len(results["rows"]) == len(rows) + (0 if "--no-reference" in options else 2)
    for row in results["rows"]:
        assert 0 <= row["accuracy"] <= 1 and row["loss"] > 0 and row["perplexity"] > 1
    assert all(rows[name]["tokens_per_second"] > 0 and rows[name]["bytes"] > 0 for name in steps)
    assert all(rows[name]["largest_logit_difference"] < 1e-4 for name in steps)

    removed = rows["dense"]["parameters"] - rows["structured"]["parameters"]
    assert (removed > 0) == ("--no-reference" not in options)  # with which nothing is removed
    assert rows["sparse"]["nonzero"] < 0.85 * rows["structured"]["nonzero"]
    # what is merged is as small and as sparse as what was trained, and on disk nothing changes
    for name in ("merged", *deployed, "reloaded in a fresh process"):
        assert rows[name]["parameters"] == rows["structured"]["parameters"]
        assert rows[name]["nonzero"] <= rows["sparse"]["nonzero"]
        assert rows[name]["loss"] == pytest.approx(rows["tuned with int4"]["loss"], rel=1e-4)
    if deployed:
        assert rows["deployed"]["bytes"] < 0.8 * rows["merged"]["bytes"]
    assert (out / "results.md").read_text().count("\n|") == len(results["rows"]) + 1
    assert {"versions", "cpu", "cores"} <= set(results["machine"])


def test_reviews_and_instructions_become_examples():
    import tasks

    review = tasks.review_example({"text": "good fun", "label": 1})
    assert review == tasks.Example(
        "Review: good fun\nSentiment:", " positive", " positive", [" negative", " positive"]
    )
    with pytest.raises(ValueError, match="must be 0 or 1, got 2"):
        tasks.review_example({"text": "so so", "label": 2})
    alpaca = tasks.instruction_example({"instruction": "Add.", "input": "1 and 2", "output": "3"})
    assert "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n" in alpaca.prompt
    assert alpaca.target == "3"
    assert "### Input" not in tasks.instruction_example({"question": "1 + 2?", "answer": "3"}).prompt


def test_pieces_of_text_fill_sequences():
    import tasks

    assert tasks.pack([[1, 2, 3], [4, 5]], 2).tolist() == [[1, 2], [3, 4]]
    assert tasks.pack([[1, 2, 3], [4, 5]], 2, limit=1).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="less than one sequence of 9"):
        tasks.pack([[1, 2, 3]], 9)


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 72", 72.0),
        ("She has $1,234.50 left.", 1234.5),
        ("so -3 degrees", -3.0),
        ("first 1, then 2", 2.0),
        ("no number", None),
    ],
)
def test_last_number(text, number):
    import tasks

    assert tasks.last_number(text) == number


def test_target_tokens_alone_are_trained():
    import pipeline
    import tasks

    tokenizer, _ = pipeline.tiny_model(["Question: why? Answer: because"] * 3)
    example = tasks.Example("Question: why?", " because", " because", [])
    features = pipeline.encode(tokenizer, example, max_length=100)
    trained = [token for token, label in zip(features["input_ids"], features["labels"]) if label != -100]
    assert tokenizer.decode(trained) == " because<eos>"
    assert pipeline.encode(tokenizer, example, max_length=3) is None
