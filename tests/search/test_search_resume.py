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
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from support.elastic_net import ElasticNet, quality, search
from support.places import TESTS
from tqdm.auto import tqdm

from peft_elastic.search import SearchResult
from peft_elastic.search.history import HistoryFile


N_EVALS = 40
SETTINGS = {"n_evals": N_EVALS, "seed": 7, "objectives": ("accuracy", "macs", ("noise", lambda m: np.random.rand()))}


def measure(model):
    """Depends on the subnet and on the global generators, and moves them."""
    noise = random.random() + float(torch.rand(1)) + np.random.rand()
    return {"accuracy": quality(model) + 0.01 * noise, "ranks": sum(model.active_subnet.values())}


def run(save_dir=None, evaluate=measure, **kwargs):
    return search(ElasticNet(), evaluate, save_dir=save_dir, **{"held_out": measure, **SETTINGS, **kwargs})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    result = run(folder)
    assert result == run()
    return result, {path.name: path.read_bytes() for path in folder.iterdir()}


def lines(folder):
    path = folder / "history.jsonl"
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def test_files(unbroken):
    result, files = unbroken
    assert sorted(files) == ["held_out.jsonl", "history.jsonl", "search_result.json"]
    header, *rows = map(json.loads, files["history.jsonl"].splitlines())
    assert header["fingerprint"] == result.space.fingerprint and header["seed"] == 7 and header["algorithm"] == "nsga2"
    assert [(row["index"], row["source"], row["subnet"], row["metrics"]) for row in rows] == [
        (e.index, e.source, e.subnet.to_dict(), e.metrics) for e in result.history
    ]


# -- killed ----------------------------------------------------------------------------------------------------------


def slow_measure(model):
    time.sleep(0.006)
    return measure(model)


def child(folder):
    torch.set_num_threads(1)
    # tqdm's lock is a semaphore that forked processes share: killed while it holds it, a child would block its parent
    tqdm.set_lock(threading.RLock())
    run(folder, slow_measure, held_out=slow_measure)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to start many processes quickly")
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_random_moments_it_comes_to_the_same_result(tmp_path, unbroken, seed):
    rng = random.Random(seed)
    progress = []
    for attempt in range(200):
        process = multiprocessing.get_context("fork").Process(target=child, args=(tmp_path,))
        process.start()
        # longer and longer: a busy machine may need most of the time to come to where the last process was
        process.join(rng.uniform(0.02, 0.12) * (1 + attempt / 10))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0:
            break
        progress.append(len(lines(tmp_path)))
    assert process.exitcode == 0, "the search never came to its end"
    assert progress == sorted(progress)
    assert len({n for n in progress if 1 < n <= N_EVALS}) >= 2, f"killed too early or too late: {progress}"
    result, files = unbroken
    for name, content in files.items():
        assert (tmp_path / name).read_bytes() == content
    assert SearchResult.load(tmp_path) == result == run(tmp_path)


SCRIPT = """
import os, signal, sys
sys.path[:0] = {path!r}
from test_search_resume import measure, run
from support.elastic_net import quality

def evaluate(model):
    if os.path.getsize({history!r}) > {size}:
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(model)

run({folder!r}, evaluate, held_out=None)
"""


def test_a_new_interpreter_continues(tmp_path, unbroken):
    """With other hash seeds, so that no order of a set or dict gets into the search."""
    result, files = unbroken
    script = SCRIPT.format(
        path=[os.path.dirname(__file__), str(TESTS), *sys.path],
        history=str(tmp_path / "history.jsonl"),
        size=len(files["history.jsonl"]) // 2,
        folder=str(tmp_path),
    )
    killed = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        timeout=300,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": "99"},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert 5 < len(lines(tmp_path)) < N_EVALS
    assert files["history.jsonl"].startswith((tmp_path / "history.jsonl").read_bytes())
    assert run(tmp_path) == result


def test_a_line_torn_anywhere_is_dropped(tmp_path, unbroken):
    """Whatever part of a row had reached the disk."""
    result, files = unbroken
    path = tmp_path / "history.jsonl"
    whole = files["history.jsonl"].splitlines(keepends=True)
    row = whole[11]
    for length in [*range(0, len(row), 37), len(row) - 1]:
        path.write_bytes(b"".join(whole[:11]) + row[:length])
        calls = []
        run(tmp_path, lambda m: calls.append(1) or measure(m), n_evals=12, held_out=None)
        assert path.read_bytes() == b"".join(whole[:13]) and len(calls) == 2
    path.write_bytes(b"".join(whole[:11]) + b"\0" * 100)  # as some file systems leave it after a loss of power
    assert run(tmp_path) == result


def test_a_torn_held_out_file(tmp_path, unbroken):
    result, files = unbroken
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "held_out.jsonl").write_bytes(files["held_out.jsonl"][:-30])
    calls = []
    again = run(tmp_path, lambda m: 1 / 0, held_out=lambda m: calls.append(1) or measure(m))
    assert again == result and len(calls) == 1


# -- continued -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "stop"),
    [
        *(("nsga2", stop) for stop in (1, 2, 3, 8, 13, 26)),
        *(("random", stop) for stop in (2, 3, 13)),
        ("exhaustive", 13),
    ],
)
def test_interrupted_it_evaluates_only_what_is_missing(tmp_path, algorithm, stop):
    def run_small(evaluate, save_dir=None):
        return search(ElasticNet(3, (8, 4, 2)), evaluate, save_dir=save_dir, algorithm=algorithm, n_evals=27)

    calls = []

    def interrupted(model):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(model.active_subnet)
        return measure(model)

    with pytest.raises(KeyboardInterrupt):
        run_small(interrupted, tmp_path)
    result = run_small(lambda m: calls.append(m.active_subnet) or measure(m), tmp_path)
    assert calls == [e.subnet for e in result.history] and len(calls) == 27
    assert result == run_small(measure)
    assert run_small(lambda m: 1 / 0, tmp_path) == result  # nothing is left to evaluate


def test_more_evaluations_than_before(tmp_path, unbroken):
    result, _ = unbroken
    calls = []
    for n_evals in (1, 3, 10, 11, N_EVALS):
        partial = run(tmp_path, lambda m: calls.append(1) or measure(m), n_evals=n_evals)
        assert len(calls) == n_evals
        assert partial == run(n_evals=n_evals)
    assert partial == result


def test_fewer_evaluations_than_before(tmp_path, unbroken):
    result, files = unbroken
    run(tmp_path)
    fewer = run(tmp_path, lambda m: 1 / 0, n_evals=10)
    assert [(e.subnet, e.metrics) for e in fewer.history] == [(e.subnet, e.metrics) for e in result.history[:10]]
    assert (tmp_path / "history.jsonl").read_bytes() == files["history.jsonl"]
    assert run(tmp_path) == result


def test_held_out_later(tmp_path, unbroken):
    without = run(tmp_path, held_out=None)
    assert all(e.held_out is None for e in without.history)
    assert run(tmp_path, lambda m: 1 / 0) == unbroken[0]


def test_a_failing_evaluate_keeps_the_history(tmp_path, unbroken):
    calls = []

    def failing(model):
        calls.append(1)
        return None if len(calls) % 7 == 0 else measure(model)

    for _ in range(N_EVALS):
        try:
            result = run(tmp_path, failing)
            break
        except ValueError as error:
            assert "None" in str(error)
    assert len(calls) == N_EVALS + N_EVALS // 6
    assert result == unbroken[0]


def test_a_failing_held_out_keeps_the_history(tmp_path, unbroken):
    calls = []

    def failing(model):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("no data")
        return measure(model)

    with pytest.raises(OSError, match="no data"):
        run(tmp_path, held_out=failing)
    assert run(tmp_path, lambda m: 1 / 0, held_out=failing) == unbroken[0]
    assert len(calls) == 1 + sum(e.held_out is not None for e in unbroken[0].history)


def test_it_says_what_it_found(tmp_path, capfd):
    run(tmp_path, n_evals=5, progress=True)
    assert "found in" not in capfd.readouterr().err
    run(tmp_path, progress=True)
    assert f"5 of {N_EVALS} evaluations found in {str(tmp_path / 'history.jsonl')!r}" in capfd.readouterr().err


# -- another search --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"seed": 8}, ["seed is 7 there, 8 here"]),
        ({"population": 16}, ["population is 8 there, 16 here"]),
        ({"algorithm": "random"}, ["algorithm is 'nsga2' there, 'random' here", "population is 8 there, None here"]),
        (
            {"objectives": ("accuracy", "macs")},
            ["objectives is {'accuracy': 'max', 'macs': 'min', 'noise': 'min'} there"],
        ),
        ({"mode": "min"}, ["objectives is {'accuracy': 'max'", "{'accuracy': 'min'"]),
        ({"seed": 8, "population": 4}, ["seed is 7", "population is 8"]),
    ],
)
def test_other_settings_are_refused(tmp_path, unbroken, change, names):
    _, files = unbroken
    (tmp_path / "history.jsonl").write_bytes(files["history.jsonl"])
    with pytest.raises(ValueError, match="`save_dir` holds another search") as error:
        run(tmp_path, lambda m: 1 / 0, **change)
    assert all(name in str(error.value) for name in names)
    assert "history.jsonl" in str(error.value)
    assert (tmp_path / "history.jsonl").read_bytes() == files["history.jsonl"]


def test_another_space_or_base_model_is_refused(tmp_path):
    search(ElasticNet(), save_dir=tmp_path)
    for model, names in (
        (ElasticNet(options=(8, 4, 2)), ["fingerprint is", "space is 'SearchSpace(6 choices, 4,096 subnets)' there"]),
        (ElasticNet(dim=16), ["macs of the max subnet is 1152 there, 3072 here", "parameters of the max subnet"]),
    ):
        with pytest.raises(ValueError, match="another search") as error:
            search(model, save_dir=tmp_path)
        assert all(name in str(error.value) for name in names)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"hello\n",
        b"[1, 2]\n",
        b'{"format": "peft-elastic/subnet", "version": 1, "values": {}}\n',
        b"\xff\n",
    ],
)
def test_foreign_files_are_refused_and_kept(tmp_path, content):
    path = tmp_path / "history.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"history\.jsonl' is not the history of a search"):
        run(tmp_path)
    assert path.read_bytes() == content


def test_damage_in_the_middle_is_an_error(tmp_path, unbroken):
    _, files = unbroken
    whole = files["history.jsonl"].splitlines(keepends=True)
    path = tmp_path / "history.jsonl"
    for damage in (b"\n", b"{}\n", whole[5][:20] + b"\n"):
        content = b"".join([*whole[:5], damage, *whole[6:]])
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"line 6 of .*history\.jsonl' is damaged"):
            run(tmp_path)
        assert path.read_bytes() == content


def test_another_subnet_on_file_is_an_error(tmp_path, unbroken):
    _, files = unbroken
    header, *rows = map(json.loads, files["history.jsonl"].splitlines())
    rows[20]["subnet"] = rows[3]["subnet"]
    path = tmp_path / "history.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
    with pytest.raises(ValueError, match="evaluation 20 in .* is another subnet"):
        run(tmp_path)


def test_two_searches_in_one_folder_are_noticed(tmp_path):
    model = ElasticNet()

    def evaluate(m):
        if os.path.getsize(tmp_path / "history.jsonl") > 1000:
            run(tmp_path, n_evals=30)
        return measure(m)

    with pytest.raises(ValueError, match=r"another process writes to .*history\.jsonl"):
        search(model, evaluate, save_dir=tmp_path, **SETTINGS)
    assert model.active_subnet == model.search_space.max
    run(tmp_path)  # and nothing is damaged


@pytest.mark.parametrize("place", ["", "inside"])
def test_a_folder_that_cannot_be_written(tmp_path, place):
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    with pytest.raises(ValueError, match="`save_dir`: cannot use"):
        run(blocked / place, lambda m: 1 / 0)
    assert blocked.read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="`save_dir`: cannot use"):
        run(tmp_path, lambda m: 1 / 0)


def test_a_full_disk_leaves_what_was_written(tmp_path, unbroken, monkeypatch):
    record = HistoryFile.record

    def full(self, evaluation, metrics):
        if evaluation.index == 9:
            raise OSError("No space left on device")
        record(self, evaluation, metrics)

    monkeypatch.setattr(HistoryFile, "record", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path)
    assert len(lines(tmp_path)) == 10
    monkeypatch.undo()
    assert run(tmp_path) == unbroken[0]
