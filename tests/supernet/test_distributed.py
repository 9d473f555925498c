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
"""Trainer in two processes with DDP over gloo, on the CPU, against one process with the same global batch."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.places import TESTS
from support.training import CHECKPOINTING, SANDWICH, elastic_llama, train_and_record


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The records of both processes."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(str(TESTS / "support" / "training.py"), str(folder)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return [torch.load(folder / f"rank-{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train_and_record(tmp_path_factory.mktemp("alone"))


def assert_close(actual, expected, **tolerance):
    assert actual.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, **tolerance, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_both_processes_train_the_same_subnets_to_the_same_weights(ranks, alone, kind):
    first, second = (rank[kind] for rank in ranks)
    assert first["world_size"] == 2 and first["find_unused_parameters"] is False
    space = elastic_llama().search_space
    assert first["training"] == second["training"] == alone["training"]
    assert first["training"] == [space.sample([42, step]) for step in range(4)]
    assert_close(second["weights"], first["weights"], rtol=0, atol=0)
    assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-5)
    start = dict(elastic_llama().named_parameters())
    assert all((weight - start[name]).abs().max() > 1e-3 for name, weight in first["weights"].items())


def test_both_processes_evaluate_the_chosen_subnet(ranks, alone):
    heuristic = elastic_llama().search_space.heuristic
    for rank in ranks:
        assert rank["none"]["evaluation"] and all(subnet == heuristic for subnet in rank["none"]["evaluation"])
        np.testing.assert_allclose(rank["none"]["eval_loss"], alone["eval_loss"], atol=1e-5)


def test_resumed_in_two_processes(ranks):
    for rank in ranks:
        assert rank["resumed"]["training"] == rank["none"]["training"][2:]
        assert_close(rank["resumed"]["weights"], rank["none"]["weights"], rtol=0, atol=0)


def test_trainer_looks_for_unused_parameters_if_it_is_not_told_to(ranks):
    """What the documentation says of the default; the result is the same."""
    for rank in ranks:
        assert rank["find-unused"]["find_unused_parameters"] is True
        assert_close(rank["find-unused"]["weights"], rank["none"]["weights"], rtol=0, atol=0)


def test_several_subnets_a_step_in_two_processes(ranks, tmp_path):
    """With gradient accumulation and distillation; gradients are exchanged once a step, as with one subnet."""
    alone = train_and_record(tmp_path, **SANDWICH)
    first, second = (rank["sandwich"] for rank in ranks)
    assert len(alone["training"]) == 4 * 2 * 4  # steps, micro-batches, subnets
    assert first["training"] == second["training"] == alone["training"]
    assert_close(second["weights"], first["weights"], rtol=0, atol=0)
    assert_close(first["weights"], alone["weights"], rtol=0, atol=1e-5)
    assert first["exchanges"] == ranks[0]["none"]["exchanges"] > 0
    np.testing.assert_allclose(first["eval_loss"], alone["eval_loss"], atol=1e-5)
