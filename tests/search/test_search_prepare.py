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
"""What a search does to each subnet before it is evaluated: `prepare=`."""

import functools
import json
import multiprocessing
import os
import pickle
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from support.elastic_net import ElasticNet, quality, search
from support.normed_net import NormedNet, images

from peft_elastic.search import SearchResult
from peft_elastic.structure.recalibration import BatchNormRecalibration


SETTINGS = {"algorithm": "random", "seed": 3, "n_evals": 9}
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
needs_fork = pytest.mark.skipif(FORK is None, reason="needs fork, to start processes quickly")


def accuracy(model):
    """Depends on every bit of the statistics."""
    assert not model.training
    return float(model(images((9,), 5)[0]).double().abs().sum())


def run(save_dir=None, model=None, prepare=None, **kwargs):
    prepare = BatchNormRecalibration(images()) if prepare is None else prepare
    return search(model or NormedNet(), accuracy, prepare=prepare, save_dir=save_dir, **{**SETTINGS, **kwargs})


def by_subnet(result):
    return {evaluation.subnet: evaluation.metrics["accuracy"] for evaluation in result.history}


@functools.cache
def expected():
    return run()


def test_metrics_are_those_of_recalibrated_subnets_in_any_order():
    values = by_subnet(expected())
    assert len(values) == 9 == NormedNet().search_space.size
    others = by_subnet(run(algorithm="exhaustive"))
    assert values == others and list(values) != list(others)
    for subnet in reversed(values):
        model = NormedNet()
        model.set_subnet(subnet)
        BatchNormRecalibration(images())(model)
        with torch.no_grad():
            assert accuracy(model) == values[subnet]
    plain = by_subnet(search(NormedNet(), accuracy, **SETTINGS))
    largest = NormedNet().search_space.max
    assert plain[largest] == values[largest]
    assert all(plain[subnet] != values[subnet] for subnet in values if subnet != largest)


def test_model_is_left_as_it_was():
    model = NormedNet()
    model.set_subnet(model.subnet(4, 6))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run(model=model)
    assert model.active_subnet == model.subnet(4, 6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Noting:
    """Notes what it is called with; `evaluate`, `held_out` and objectives note it too."""

    def __init__(self):
        self.seen = []

    def prepare(self, model):
        assert not model.training and not torch.is_grad_enabled()
        self.seen.append(("prepare", model.active_subnet))
        torch.rand(1)

    def noted(self, what):
        def function(model):
            self.seen.append((what, model.active_subnet, float(torch.rand(1))))
            return quality(model)

        return function


def test_called_after_a_subnet_is_activated_and_before_each_evaluation():
    noting, plain = Noting(), Noting()
    with_it, without = (
        search(
            ElasticNet(),
            n.noted("evaluate"),
            objectives=["accuracy", ("cost", n.noted("cost"))],
            held_out=n.noted("held_out"),
            n_evals=5,
            **({"prepare": n.prepare} if n is noting else {}),
        )
        for n in (noting, plain)
    )
    pairs = list(zip(noting.seen[::2], noting.seen[1::2], strict=True))
    assert all(first[0] == "prepare" and first[1] == second[1] for first, second in pairs)
    assert {second[0] for _, second in pairs} == {"evaluate", "cost", "held_out"}
    # the random numbers of an evaluation are not those that are left over
    assert [second for _, second in pairs] == plain.seen
    assert with_it == without


def test_continued_bit_equal(tmp_path):
    run(tmp_path, n_evals=4)
    # new objects, whose caches are empty
    assert run(tmp_path) == expected() == SearchResult.load(tmp_path)
    rows = (tmp_path / "history.jsonl").read_text().splitlines()
    assert BatchNormRecalibration(images()).fingerprint in json.loads(rows[0])["prepare"]


def other(model):
    return None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"prepare": BatchNormRecalibration(images(seed=2))}),
        ({}, {"prepare": BatchNormRecalibration(images(), max_samples=8)}),
        ({}, {"prepare": other}),
        ({"prepare": other}, {}),
        ({}, None),
        (None, {}),
    ],
)
def test_history_of_another_preparation_is_not_continued(tmp_path, first, second):
    def begin(arguments, **kwargs):
        if arguments is None:
            return search(NormedNet(), accuracy, save_dir=tmp_path, **{**SETTINGS, **kwargs})
        return run(tmp_path, **arguments, **kwargs)

    begin(first, n_evals=4)
    before = (tmp_path / "history.jsonl").read_bytes()
    with pytest.raises(ValueError, match="prepare"):
        begin(second)
    assert (tmp_path / "history.jsonl").read_bytes() == before


def test_bad_arguments():
    with pytest.raises(ValueError, match="`prepare` must be a function of the model, or None, got 3"):
        run(prepare=3)

    def moves(model):
        model.set_subnet("min")

    with pytest.raises(ValueError, match=r"`prepare` changed the active subnet of the model \(evaluation 0, max"):
        run(prepare=moves)


class FailsFrom:
    """Fails at the third subnet."""

    fingerprint = "the same"

    def __init__(self, number):
        self.number, self.calls = number, 0

    def __call__(self, model):
        self.calls += 1
        if self.calls >= self.number:
            raise KeyError("no data", self.calls)
        BatchNormRecalibration(images())(model)


def test_errors_are_raised_and_what_was_measured_is_on_file(tmp_path):
    with pytest.raises(KeyError, match="no data"):
        run(tmp_path, prepare=FailsFrom(4))
    assert len((tmp_path / "history.jsonl").read_text().splitlines()) == 1 + 3
    result = run(tmp_path, prepare=FailsFrom(100))
    assert by_subnet(result) == by_subnet(expected())


# -- in parallel -------------------------------------------------------------------------------------------------------


@needs_fork
def test_workers_prepare_too(tmp_path):
    with ProcessPoolExecutor(2, FORK) as executor:
        result = run(tmp_path, executor=executor, worker_model=NormedNet)
        assert result == expected()
        with pytest.raises(KeyError, match="no data"):
            run(prepare=FailsFrom(1), executor=executor, worker_model=NormedNet)


def in_rank(rank, folder, action):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        outcome = action(rank)
    except Exception as error:
        outcome = error
    (folder / f"outcome-{rank}").write_bytes(pickle.dumps(outcome))
    torch.distributed.barrier()
    os._exit(0)


def on_ranks(folder, action):
    processes = [FORK.Process(target=in_rank, args=(rank, folder, action)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [pickle.loads((folder / f"outcome-{rank}").read_bytes()) for rank in (0, 1)]


def each_its_own_subnets(rank):
    return run(executor="ranks")


def each_other_data(rank):
    return run(executor="ranks", prepare=BatchNormRecalibration(images(seed=rank)))


def together_with_a_share_each(rank):
    """Without an executor all processes evaluate each subnet together."""
    return run(prepare=BatchNormRecalibration(images()[:2] if rank == 0 else images()[2:]))


@needs_fork
def test_ranks_that_evaluate_other_subnets_at_the_same_time_do_not_mix_them(tmp_path):
    assert on_ranks(tmp_path, each_its_own_subnets) == [expected()] * 2


@needs_fork
def test_ranks_with_other_data_are_refused(tmp_path):
    for outcome in on_ranks(tmp_path, each_other_data):
        assert isinstance(outcome, ValueError) and "`prepare` of rank 1 is 'BatchNormRecalibration " in str(outcome)


@needs_fork
def test_processes_that_search_together_share_the_data(tmp_path):
    first, second = on_ranks(tmp_path, together_with_a_share_each)
    assert first == second
    for subnet, value in by_subnet(expected()).items():
        assert by_subnet(first)[subnet] == pytest.approx(value, rel=1e-5)
