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
"""Evaluations that come to NaN or infinity: they are results, on file and in the history, and are never chosen."""

import json
import math
import zlib

import numpy as np
import pytest
import torch
from support.elastic_net import ElasticNet, quality, search

from peft_elastic.search import SearchResult, hypervolume_of


BAD = [math.nan, math.inf, -math.inf, torch.tensor(math.nan), np.float32("inf")]


def sometimes(value):
    """An evaluation of which a quarter of the subnets, but not the largest, give `value`, always the same ones."""

    def evaluate(model):
        number = zlib.crc32(model.active_subnet.to_json().encode())
        return value if number % 4 == 0 and model.active_subnet != model.search_space.max else quality(model)

    return evaluate


def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def check(result):
    failed = {e.index for e in result.history if not math.isfinite(e.metrics[result.metric])}
    assert {e.index for e in result.failed} == failed and 0 < len(failed) < len(result.history)
    assert not failed & {e.index for e in result.pareto}
    for arguments in ({}, {"max_drop": 0.5}, {"budget": "90%"}):
        assert result.evaluation(result.best(**arguments)).index not in failed
    volumes = result.hypervolume
    assert volumes == sorted(volumes) and all(map(math.isfinite, volumes)) and volumes[-1] > 0


@pytest.mark.parametrize(
    ("value", "algorithm", "mode"),
    [*((value, "nsga2", "max") for value in BAD), (math.nan, "random", "max"), (-math.inf, "nsga2", "min")],
    ids=str,
)
def test_a_search_goes_on(tmp_path, algorithm, value, mode):
    evaluate = sometimes(value)
    # of a loss, smaller is better, and -inf would be best
    result = search(ElasticNet(), evaluate, save_dir=tmp_path, n_evals=24, algorithm=algorithm, mode=mode)
    assert len(result.history) == 24
    check(result)
    header, *rows = map(strict_json, (tmp_path / "history.jsonl").read_text().splitlines())
    strict_json((tmp_path / "search_result.json").read_text())
    named = [row["index"] for row in rows if isinstance(row["metrics"]["accuracy"], str)]
    assert named == [e.index for e in result.failed]
    assert SearchResult.load(tmp_path) == result
    # continued, and from the beginning at once
    longer = search(ElasticNet(), evaluate, save_dir=tmp_path, n_evals=32, algorithm=algorithm, mode=mode)
    assert longer == search(ElasticNet(), evaluate, n_evals=32, algorithm=algorithm, mode=mode)
    assert longer.history[:24] == result.history
    result.plot(tmp_path / "plot.png")
    assert len(result.to_dataframe()) == 24


def test_what_was_measured_is_recalled_and_not_measured_again(tmp_path):
    evaluate = sometimes(math.nan)
    result = search(ElasticNet(), evaluate, save_dir=tmp_path, n_evals=12)

    def never(model):
        raise AssertionError("all evaluations are on file")

    assert search(ElasticNet(), never, save_dir=tmp_path, n_evals=12) == result


def test_r_nsga2_goes_on():
    result = search(
        ElasticNet(),
        sometimes(math.nan),
        algorithm="r-nsga2",
        n_evals=30,
        reference_points={"accuracy": 0.9, "macs": 500},
    )
    check(result)


def test_with_constraints_and_one_objective():
    check(search(ElasticNet(), sometimes(math.nan), n_evals=24, max_macs="90%"))
    result = search(ElasticNet(), sometimes(math.nan), objectives="accuracy", n_evals=24)
    check(result)


def test_other_objectives_may_fail_too():
    """A function that gives NaN makes the evaluation fail; a further value that `evaluate` returns does not."""
    fails = sometimes(math.nan)
    result = search(ElasticNet(), objectives=("accuracy", ("noise", fails)), n_evals=24)
    assert result.failed == [e for e in result.history if math.isnan(e.metrics["noise"])] != []
    assert not {e.index for e in result.failed} & {e.index for e in result.pareto}
    further = search(ElasticNet(), lambda m: {"accuracy": quality(m), "perplexity": math.inf}, n_evals=6)
    assert not further.failed and further.history[0].metrics["perplexity"] == math.inf


def test_the_max_subnet_has_failed():
    space = ElasticNet().search_space

    def evaluate(model):
        return math.nan if model.active_subnet == space.max else quality(model)

    result = search(ElasticNet(), evaluate, n_evals=12)
    assert [e.source for e in result.failed] == ["max"]
    assert result.best() != space.max
    with pytest.raises(ValueError, match="`max_drop` 0.1 is counted from the max subnet, whose evaluation has failed"):
        result.best(max_drop=0.1)
    assert result.hypervolume[-1] > 0
    result.plot()


def test_all_evaluations_have_failed(tmp_path, recwarn):
    result = search(ElasticNet(), lambda m: math.nan, save_dir=tmp_path, n_evals=12)
    assert len(result.failed) == 12 and result.pareto == [] and result.hypervolume == [0.0] * 12
    with pytest.raises(ValueError, match="none of the 12 evaluations has finite objectives"):
        result.best()
    result.plot(tmp_path / "plot.png")
    assert SearchResult.load(tmp_path) == result


def test_held_out_values_may_be_nan(tmp_path):
    result = search(ElasticNet(), save_dir=tmp_path, n_evals=6, held_out=lambda m: math.nan)
    assert any(e.held_out is not None and math.isnan(e.held_out["accuracy"]) for e in result.history)
    assert not result.failed
    for line in (tmp_path / "held_out.jsonl").read_text().splitlines():
        strict_json(line)
    assert SearchResult.load(tmp_path) == result


def test_failed_evaluations_do_not_draw_the_search_their_way():
    """The subnets of one option of one choice all fail: the search finds the front of the others."""
    space = ElasticNet().search_space
    key, largest = space.choices[0].key, space.choices[0].options[0]

    def evaluate(model):
        return math.inf if model.active_subnet[key] == largest else quality(model)  # the largest number there is

    result = search(ElasticNet(), evaluate, n_evals=60, seed=3)
    late = result.history[30:]
    assert sum(map(result.has_failed, late)) < len(late) / len(space.choices[0].options)
    assert all(e.subnet[key] != largest for e in result.pareto)
    box = result.hypervolume_box
    assert hypervolume_of(result, *box) == result.hypervolume


@pytest.mark.parametrize("value", ["nan", "high", None, [1.0]])
def test_damaged_values_on_file_are_refused(tmp_path, value):
    search(ElasticNet(), save_dir=tmp_path, n_evals=4)
    path = tmp_path / "history.jsonl"
    header, first, *rest = path.read_text().splitlines()
    row = json.loads(first)
    row["metrics"]["accuracy"] = value
    path.write_text("\n".join([header, json.dumps(row), *rest]) + "\n")
    with pytest.raises(ValueError, match="history.jsonl' is damaged: .*accuracy"):
        search(ElasticNet(), save_dir=tmp_path, n_evals=4)
