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
"""A search in parallel: whoever evaluates, it is the search of one process."""

import contextlib
import functools
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zlib
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from peft import get_peft_model
from support.elastic_net import ElasticNet, quality, search
from support.places import REPOSITORY, TESTS
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_elastic import ElasticLoraConfig
from peft_elastic.common import ranks
from peft_elastic.search import RayExecutor, SearchResult, worker
from peft_elastic.search.identity import Identity


pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to start many processes quickly")
FORK = multiprocessing.get_context("fork")
N_EVALS = 24


def pool(workers=2):
    return ProcessPoolExecutor(workers, FORK)


def noise(model):
    return random.random() + float(torch.rand(1)) + np.random.rand()


def measure(model):
    """Depends on the subnet and on the global generators. Large subnets take longer, so that the order of arrival is another one."""
    time.sleep(0.004 * quality(model))
    return {"accuracy": quality(model) + 0.01 * noise(model), "ranks": sum(model.active_subnet.values())}


SETTINGS = {
    "n_evals": N_EVALS,
    "seed": 7,
    "objectives": ("accuracy", "macs", ("noise", noise)),
    "held_out": measure,
}


def run(executor=None, evaluate=measure, worker_model=ElasticNet, **kwargs):
    parallel = {} if executor is None else {"executor": executor, "worker_model": worker_model}
    return search(ElasticNet(), evaluate, **SETTINGS | parallel | kwargs)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return run(save_dir=folder), folder


def same_files(folder, other):
    """Rows come in the order of their arrival; all else is the same."""
    for name in ("history.jsonl", "held_out.jsonl"):
        header, *rows = (folder / name).read_bytes().splitlines(keepends=True)
        expected_header, *expected = (other / name).read_bytes().splitlines(keepends=True)
        assert header == expected_header and sorted(rows) == sorted(expected)
    assert (folder / "search_result.json").read_bytes() == (other / "search_result.json").read_bytes()


# -- the same result ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers(tmp_path, unbroken, workers):
    result, folder = unbroken
    model = ElasticNet().train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    found = search(
        model,
        measure,
        save_dir=tmp_path,
        executor=functools.partial(pool, workers),
        worker_model=ElasticNet,
        **SETTINGS,
    )
    assert found == result
    same_files(tmp_path, folder)
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    assert model.training and model.active_subnet == model.search_space.max
    assert not list(Path(worker.lock_folder("")).parent.glob("peft-elastic-*/[0-9]*.lock"))


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "random", "n_evals": 70},
        pytest.param({"algorithm": "exhaustive", "n_evals": 64}, marks=pytest.mark.slow),
        {"algorithm": "exhaustive", "n_evals": 64, "max_macs": "80%"},
        {"algorithm": "r-nsga2"},
        {"max_macs": "85%", "population": 5},
        {"objectives": "accuracy", "mode": "min"},
    ],
    ids=str,
)
def test_any_algorithm(settings):
    small = functools.partial(ElasticNet, n_layers=3)
    settings = {"n_evals": 20, "held_out": quality, **settings}
    with pool() as executor:
        found = search(small(), executor=executor, worker_model=small, **settings)
        assert executor.submit(int).result() == 0  # whose executor it is shuts it down
    assert found == search(small(), **settings)


def test_failed_evaluations():
    found = run(pool, sometimes_nan)
    expected = run(evaluate=sometimes_nan)
    assert [e.index for e in found.failed] == [e.index for e in expected.failed] != []
    assert [e.subnet for e in found.history] == [e.subnet for e in expected.history]


def sometimes_nan(model):
    return float("nan") if zlib.crc32(model.active_subnet.to_json().encode()) % 4 == 0 else quality(model)


def test_one_executor_for_several_searches():
    with pool(1) as executor:
        for seed in range(2):
            assert run(executor, seed=seed) == run(seed=seed)
        wide = functools.partial(ElasticNet, dim=16)
        assert search(wide(), executor=executor, worker_model=wide) == search(wide())


def test_threads_of_a_worker():
    before = torch.get_num_threads()
    for given, expected in ((None, 1), (3, 3)):
        found = run(pool, threads_of, worker_threads=given, objectives="threads", held_out=None, n_evals=4)
        assert {e.metrics["threads"] for e in found.history} == {expected}
    assert torch.get_num_threads() == before


def threads_of(model):
    return {"threads": torch.get_num_threads()}


class Moved(ElasticNet):
    def to(self, device):
        self.where = torch.device(device).index
        return self


def place_of(model):
    time.sleep(0.05)  # the other worker is to have something to do
    return {"accuracy": quality(model), "place": model.where, "process": os.getpid()}


@pytest.mark.parametrize("workers", [2, 3])
def test_one_device_for_each_worker(workers):
    found = run(
        functools.partial(pool, workers),
        place_of,
        Moved,
        devices=["cpu:4", "cpu:5"],
        objectives="accuracy",
        held_out=None,
    )
    places = {e.metrics["process"]: e.metrics["place"] for e in found.history}
    assert len(places) == workers and sorted(places.values()) == sorted([4, 5, 4][:workers])


def test_nothing_is_started_if_all_is_on_file(tmp_path, unbroken):
    run(save_dir=tmp_path)

    def never():
        raise AssertionError("all evaluations are on file")

    assert run(never, save_dir=tmp_path) == unbroken[0]


# -- executors of others, in processes that start from nothing --------------------------------------------------------


def same_in(executor, unbroken, folder):
    """The result, although a worker dies on the way."""
    assert run(executor, Deadly(folder, 1), save_dir=folder / "search") == unbroken[0]
    same_files(folder / "search", unbroken[1])
    assert (folder / "death-0").exists()


@pytest.mark.slow
def test_processes_of_this_machine(tmp_path, unbroken):
    same_in(2, unbroken, tmp_path)


@pytest.mark.slow
def test_forkserver(tmp_path, unbroken):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft_elastic.search.worker"])
    same_in(lambda: ProcessPoolExecutor(2, context), unbroken, tmp_path)


@pytest.mark.slow
def test_loky(tmp_path, unbroken):
    loky = pytest.importorskip("joblib.externals.loky")
    same_in(lambda: loky.get_reusable_executor(2), unbroken, tmp_path)


@pytest.mark.slow
def test_ray(tmp_path, unbroken):
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'peft-elastic[ray]'")
    # what its processes inherit: the modules of the tests are found there too
    paths = os.pathsep.join(map(str, (REPOSITORY, TESTS, TESTS / "search")))
    # a plane of its own on this machine; the home of who runs the tests stays as it is
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", paths)
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20)
        try:
            with RayExecutor(2) as executor:
                same_in(executor, unbroken, tmp_path)  # an actor is replaced, the executor goes on
                assert run(executor, n_evals=9) == run(n_evals=9)
                with pytest.raises(KeyError, match="no such thing"):
                    run(executor, failing)
                with pytest.raises(ValueError, match=r"the values of 'layers.3.lora_B.weight' differ"):
                    run(executor, worker_model=other_weight)
                future = executor.submit(os.getpid)
                assert future.result() != os.getpid()
            with pytest.raises(RuntimeError, match="after shutdown"):
                executor.submit(os.getpid)
        finally:
            ray.shutdown()


@pytest.mark.slow
def test_dask(tmp_path, unbroken):
    distributed = pytest.importorskip("distributed", reason="needs Dask: pip install distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (REPOSITORY, TESTS, TESTS / "search"))))
        cluster = distributed.LocalCluster(
            n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None, local_directory=str(tmp_path)
        )
        with cluster, distributed.Client(cluster) as client:
            same_in(client.get_executor(), unbroken, tmp_path)


class Threads(Executor):
    """Runs tasks in threads, and does not look like it."""

    def __init__(self):
        self.threads = ThreadPoolExecutor(2)

    def submit(self, fn, /, *args):
        return self.threads.submit(fn, *args)


@pytest.mark.slow
def test_threads_have_processes_of_their_own(tmp_path, unbroken):
    """Dask's threads, for one, draw from the generator of `random` beside an evaluation."""
    ends = threading.Event()

    def draw():
        while not ends.wait(0.001):
            random.random()

    drawing = threading.Thread(target=draw)
    drawing.start()
    executor = Threads()
    try:
        same_in(executor, unbroken, tmp_path)
    finally:
        ends.set()
        drawing.join()
        executor.threads.shutdown()


MPI = """
import sys
from mpi4py.futures import MPIPoolExecutor
from support.elastic_net import ElasticNet
from test_search_parallel import run

if __name__ == "__main__":
    with MPIPoolExecutor(2) as executor:
        assert run(executor) == run()
    print("the same")
"""


@pytest.mark.slow
def test_mpi(tmp_path):
    pytest.importorskip("mpi4py", reason="needs mpi4py and an MPI: pip install mpi4py mpich")
    program = shutil.which("mpiexec", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
    if program is None:
        pytest.skip("needs mpiexec: pip install mpich")
    (tmp_path / "script.py").write_text(MPI)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, TESTS, TESTS / "search")))}
    command = [program, "-n", "3", sys.executable, "-m", "mpi4py.futures", str(tmp_path / "script.py")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and "the same" in done.stdout, done.stderr


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-elastic\[ray\]'"):
        RayExecutor(2)
    with pytest.raises(ValueError, match="`max_workers` must be a whole number >= 1"):
        RayExecutor(0)


# -- a model of peft ---------------------------------------------------------------------------------------------------


def loss_of(model):
    return {"loss": float(model(**BATCH).loss), "drift": float(torch.rand(1))}


BATCH = {"input_ids": torch.arange(24).reshape(2, 12) % 16, "labels": torch.arange(24).reshape(2, 12) % 16}


def test_a_saved_adapter(tmp_path):
    """Of a model with width and depth; the adapter is trained, or it would compute what the base does."""
    torch.manual_seed(3)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    base.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = ElasticLoraConfig(
        r=8,
        target_modules="all-linear",
        elastic_width={"mlp": [1.0, 0.5]},
        elastic_depth="1",
        importance="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    settings = {"objectives": ("loss", "macs", "bytes"), "mode": "min", "n_evals": 12, "progress": False}
    serial = model.search_subnet(loss_of, max_parameters="95%", **settings)
    found = model.search_subnet(
        loss_of, max_parameters="95%", executor=pool, worker_model=tmp_path / "adapter", **settings
    )
    assert found == serial and len({e.metrics["loss"] for e in found.history}) > 6
    torch.nn.init.normal_(model.get_parameter(name), std=0.1)
    with pytest.raises(
        ValueError, match="another model in a worker than `model`: the values of 'model.lm_head.weight' differ"
    ):
        model.search_subnet(loss_of, executor=pool, worker_model=str(tmp_path / "adapter"), **settings)
    with pytest.raises(ValueError, match="`worker_model` failed in a worker"):
        model.search_subnet(loss_of, executor=pool, worker_model=str(tmp_path), **settings)


def snippets():
    text = (REPOSITORY / "docs" / "search.md").read_text().partition("## In parallel")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_snippet_of_the_docs(monkeypatch):
    module = type(os)("snippet")
    monkeypatch.setitem(sys.modules, "snippet", module)
    names = {"make_model": ElasticNet, "model": ElasticNet(), "evaluate": quality}
    code = snippets()[1]
    assert '"spawn"' in code
    module.__dict__.update(names)
    exec(
        code.replace('"spawn"', '"fork"').replace("evaluate, ", "evaluate, n_evals=9, progress=False, "),
        module.__dict__,
    )
    assert module.result == search(ElasticNet(), n_evals=9)


# -- interrupted -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["serial first", "parallel first"])
def test_continued_the_other_way(tmp_path, unbroken, order):
    executors = [None, pool] if order == "serial first" else [pool, None]
    run(executors[0], save_dir=tmp_path, n_evals=11)
    assert run(executors[1], save_dir=tmp_path) == unbroken[0]


def failing(model):
    if sum(model.active_subnet.values()) % 5 == 0 and model.active_subnet != model.search_space.min:
        raise KeyError("no such thing", 5)
    return measure(model)


def test_an_exception_in_a_worker_is_raised_here_and_nothing_is_lost(tmp_path, unbroken):
    with pytest.raises(KeyError) as error:
        run(pool, failing, save_dir=tmp_path)
    assert error.value.args == ("no such thing", 5)
    shown = "".join(traceback.format_exception(error.value))
    assert "in failing" in shown and "RemoteTraceback" in shown
    serial = pytest.raises(KeyError, run, evaluate=failing).value
    assert serial.args == error.value.args
    rows = (tmp_path / "history.jsonl").read_text().splitlines()[1:]
    assert rows and {json.loads(row)["index"] for row in rows} <= set(range(N_EVALS))
    assert run(pool, save_dir=tmp_path) == unbroken[0]


class Unsendable(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def unsendable(model):
    raise Unsendable(1, 2)


def test_an_exception_that_cannot_be_sent():
    with pytest.raises(RuntimeError, match="Unsendable: 1 and 2") as error:
        run(pool, unsendable)
    assert "in unsendable" in str(error.value.__cause__)


def returns_text(model):
    return "text"


@pytest.mark.parametrize("executor", [None, pool], ids=["serial", "parallel"])
def test_a_value_that_is_no_number(executor):
    with pytest.raises(ValueError, match="`evaluate` returned 'text' as 'accuracy' for evaluation 0, max"):
        run(executor, returns_text)


def test_rows_that_arrived_out_of_order_are_not_lost(tmp_path, unbroken):
    """As after the death of the search between two results: any subset of a generation may be on file."""
    result, folder = unbroken
    header, *rows = (folder / "history.jsonl").read_bytes().splitlines(keepends=True)
    for seed in range(3):
        kept = [*rows[:8], *random.Random(seed).sample(rows[8:16], 4)]
        (tmp_path / "history.jsonl").write_bytes(b"".join([header, *kept]))
        found = run(pool, save_dir=tmp_path)
        assert found == result
        lines = (tmp_path / "history.jsonl").read_bytes().splitlines(keepends=True)
        assert lines[1:13] == kept and sorted(lines[1:]) == sorted(rows)


def test_ctrl_c_in_a_worker(tmp_path, unbroken):
    with pytest.raises(KeyboardInterrupt):
        run(pool, interrupted, save_dir=tmp_path)
    assert run(pool, save_dir=tmp_path) == unbroken[0]


def interrupted(model):
    if model.active_subnet == model.search_space.heuristic:
        raise KeyboardInterrupt
    return measure(model)


# -- killed ------------------------------------------------------------------------------------------------------------


class Deadly:
    """Ends its process the first `times` times that it meets a subnet. Of more than two, the first two are in the company of the smallest
    subnet, which waits for them: three with nothing else to do would end the search."""

    def __init__(self, folder, times, subnet="heuristic"):
        self.folder, self.times, self.subnet = folder, times, subnet

    def __call__(self, model):
        if model.active_subnet == model.search_space.subnet(self.subnet):
            for number in range(self.times):
                with contextlib.suppress(FileExistsError):
                    (self.folder / f"death-{number}").touch(exist_ok=False)
                    os.kill(os.getpid(), signal.SIGKILL)
        elif model.active_subnet == model.search_space.min and 2 < self.times < 100:
            patience = time.monotonic() + 20
            while len(list(self.folder.glob("death-*"))) < 2 and time.monotonic() < patience:
                time.sleep(0.01)
        return measure(model)


def test_a_worker_that_dies_costs_its_evaluation_alone(tmp_path, unbroken):
    for times in (1, 4):
        folder = tmp_path / str(times)
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            found = run(pool, Deadly(folder, times), save_dir=folder / "search")
        assert found == unbroken[0] and len(list(folder.glob("death-*"))) == times


def test_an_executor_that_cannot_be_made_anew(tmp_path, unbroken):
    with pool() as executor, pytest.warns(RuntimeWarning, match="This process evaluates the rest"):
        found = run(executor, Deadly(tmp_path, 1), save_dir=tmp_path / "search")
    assert found == unbroken[0]


def test_an_evaluation_that_always_ends_its_worker(tmp_path, unbroken):
    with pytest.raises(
        ChildProcessError, match=r"ended \d times in the middle of evaluation 2, 3 of them with nothing else"
    ):
        run(pool, Deadly(tmp_path, 100), save_dir=tmp_path / "search")
    rows = (tmp_path / "search" / "history.jsonl").read_text().splitlines()[1:]
    assert sorted(json.loads(row)["index"] for row in rows) == [0, 1, 3, 4, 5, 6, 7]
    assert run(pool, save_dir=tmp_path / "search") == unbroken[0]


def dead_model():
    os._exit(3)


def test_a_model_that_always_ends_its_worker(tmp_path):
    with pytest.raises(ChildProcessError, match="3 times in the middle of making the model"):
        run(pool, worker_model=dead_model, save_dir=tmp_path)
    assert len((tmp_path / "history.jsonl").read_bytes().splitlines()) == 1


def test_a_function_that_makes_what_takes_no_work():
    executor = pool()
    executor.shutdown()
    with pytest.raises(ChildProcessError, match="`executor` makes executors that take no work"):
        run(lambda: executor)


class Noted:
    """Notes its process. Slow enough to be killed in the middle."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, model):
        (self.folder / f"worker-{os.getpid()}").touch()
        time.sleep(0.02)
        return measure(model)


def workers_in(folder):
    found = [int(path.name.partition("-")[2]) for path in folder.glob("worker-*")]
    return [pid for pid in found if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def kill_a_worker(folder, after, rng):
    """Once there are some and `after` seconds are over."""
    until = time.monotonic() + 60
    while time.monotonic() < until and not workers_in(folder):
        time.sleep(0.005)
    time.sleep(after)
    alive = workers_in(folder)
    if alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(alive), signal.SIGKILL)


@pytest.mark.parametrize("points", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_workers_killed_at_any_time(tmp_path, unbroken, points):
    rng = random.Random(points)
    for point in range(points):
        folder = tmp_path / str(point)
        folder.mkdir()
        killer = threading.Thread(target=kill_a_worker, args=(folder, rng.uniform(0, 0.4), rng))
        killer.start()
        found = run(pool, Noted(folder), held_out=Noted(folder), save_dir=folder / "search")
        killer.join()
        assert found == unbroken[0]
        same_files(folder / "search", unbroken[1])


def searching(folder):
    os.setsid()
    run(pool, Noted(folder), held_out=Noted(folder), save_dir=folder / "search")
    os._exit(0)


@pytest.mark.parametrize("points", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_the_search_killed_at_any_time(tmp_path, unbroken, points):
    rng, lines = random.Random(points), []
    for point in range(points):
        folder = tmp_path / str(point)
        folder.mkdir()
        process = FORK.Process(target=searching, args=(folder,))
        process.start()
        history = folder / "search" / "history.jsonl"
        enough, until = rng.randint(2, N_EVALS), time.monotonic() + 60
        while time.monotonic() < until and not (history.exists() and len(history.read_bytes().splitlines()) >= enough):
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.03))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        lines.append(len(history.read_bytes().splitlines()))
        until = time.monotonic() + 30
        while workers_in(folder) and time.monotonic() < until:
            time.sleep(0.01)
        assert not workers_in(folder), "workers outlive the search"
        assert run(pool, save_dir=folder / "search") == unbroken[0]
        same_files(folder / "search", unbroken[1])
    assert any(1 < number <= N_EVALS for number in lines), f"killed too early or too late: {lines}"


# -- other models ------------------------------------------------------------------------------------------------------


def other_weight():
    model = ElasticNet()
    with torch.no_grad():
        model.layers[3].lora_B.weight[5, 1] += 1e-7
    return model


def other_type():
    model = ElasticNet()
    model.layers[3].lora_B.bfloat16()
    return model


def one_more():
    model = ElasticNet()
    model.register_buffer("mask", torch.ones(2))
    return model


def other_shape():
    model = ElasticNet()
    model.layers[2].base_layer = torch.nn.Linear(8, 9, bias=False)
    return model


def not_elastic():
    return torch.nn.Linear(2, 2)


def no_model():
    raise FileNotFoundError("weights.bin")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            functools.partial(ElasticNet, options=(8, 4, 2)),
            r"its search space is .*729 subnets.*they differ in 'rank:layers.0'",
        ),
        (other_weight, r"the values of 'layers.3.lora_B.weight' differ"),
        (other_type, r"the type of 'layers.3.lora_B.weight' differs: torch.bfloat16 there, torch.float32 in `model`"),
        (one_more, r"it has 'mask', which `model` has not"),
        (other_shape, r"the shape of 'layers.2.base_layer.weight' differs: \(9, 8\) there, \(8, 8\) in"),
        (
            not_elastic,
            r"`worker_model` made no elastic model in a worker: ValueError: `model` \(Linear\) has no elastic",
        ),
        (no_model, r"`worker_model` failed in a worker: FileNotFoundError: weights.bin"),
    ],
)
def test_another_model_is_refused_before_anything_is_evaluated(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        run(pool, worker_model=make, save_dir=tmp_path)
    assert len((tmp_path / "history.jsonl").read_bytes().splitlines()) == 1
    assert run(pool, n_evals=5, save_dir=tmp_path) == run(n_evals=5)


def test_a_single_worker_with_another_model(tmp_path, unbroken):
    """The first one is right, and the check of one worker says nothing of the others."""
    with pytest.raises(ValueError, match="another model in a worker"):
        run(pool, Noted(tmp_path), Second(tmp_path), save_dir=tmp_path / "search")
    assert run(pool, save_dir=tmp_path / "search") == unbroken[0]


class Second:
    """Makes another model in the second process that asks."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self):
        with contextlib.suppress(FileExistsError):
            (self.folder / "first").touch(exist_ok=False)
            return ElasticNet()
        return other_weight()


def test_identity_reads_every_kind_of_tensor():
    model = ElasticNet()
    kinds = [torch.ones(3, dtype=torch.bool), torch.tensor(4), torch.ones(2, 2, dtype=torch.int8), torch.zeros(0)]
    kinds += [
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(4, 4).bfloat16().T,
    ]
    for number, tensor in enumerate(kinds):
        model.register_buffer(f"kind{number}", tensor)
    before = Identity.of(model, model)
    assert before.digest == pickle.loads(pickle.dumps(before)).digest and before.difference(before) == ""
    model.kind6[0, 1] = 3
    after = Identity.of(model, model)
    assert before.digest != after.digest and before.difference(after) == "the values of 'kind6' differ"
    compiled = torch.compile(model)
    assert Identity.of(compiled, model).digest == after.digest


# -- what cannot run in parallel ---------------------------------------------------------------------------------------


class Here(Executor):
    """Runs tasks where they are submitted."""

    def submit(self, fn, /, *args):
        future = Future()
        future.set_result(fn(*args))
        return future


class Locked:
    def __init__(self):
        self.lock = threading.Lock()

    def __call__(self, model):
        return quality(model)


def test_arguments():
    threads = ThreadPoolExecutor(1)
    for change, message in (
        (
            {"executor": "processes"},
            "`executor` must be a concurrent.futures.Executor, a function that makes one, a number",
        ),
        ({"executor": 0}, "`executor` must be a whole number >= 1, got 0"),
        ({"executor": True}, "`executor` must be a concurrent.futures.Executor"),
        ({"executor": threads}, "`executor` is a ThreadPoolExecutor: threads share one model"),
        ({"executor": lambda: threads}, "`executor` is a ThreadPoolExecutor"),
        ({"executor": lambda: 3}, "`executor` must be a function that makes a concurrent.futures.Executor, got 3"),
        ({"executor": Here()}, "runs its tasks in the process of the search"),
        ({"worker_model": None}, "`worker_model` must be a function without arguments .* each worker has a copy"),
        ({"worker_model": ElasticNet()}, "`worker_model` must be a function without arguments"),
        ({"devices": "cuda:0"}, "`devices` must be a list of devices such as"),
        ({"devices": []}, "`devices` must be a list of devices"),
        ({"devices": ["gpu7"]}, "`devices` must be a list of devices"),
        ({"worker_threads": 0}, "`worker_threads` must be a whole number >= 1"),
        (
            {"executor": None, "worker_model": None, "worker_threads": 2},
            "`worker_threads` is for the workers of an `executor`, got executor=None",
        ),
        ({"executor": "ranks"}, "`worker_model` is for the workers of an `executor`, got executor='ranks'"),
        (
            {"evaluate": Locked()},
            "`evaluate` cannot be sent to the workers of `executor`: TypeError: cannot pickle '_thread.lock'",
        ),
        ({"held_out": Locked()}, "`held_out` cannot be sent"),
        ({"objectives": ("accuracy", ("own", Locked()))}, "objective 'own' cannot be sent"),
    ):
        arguments = {"executor": pool, "worker_model": ElasticNet, "n_evals": 4, **change}
        with pytest.raises(ValueError, match=message):
            search(ElasticNet(), **arguments)


def test_a_function_without_a_module():
    pytest.importorskip("cloudpickle")
    power = 2
    evaluate = lambda model: quality(model) ** power  # noqa: E731
    found = search(ElasticNet(), evaluate, n_evals=6, executor=pool, worker_model=lambda: ElasticNet())
    assert found == search(ElasticNet(), evaluate, n_evals=6)


def test_a_function_that_workers_do_not_find(monkeypatch):
    module = type(os)("only_here")
    exec("def evaluate(model):\n    return 1.0", module.__dict__)
    executor = pool(1)
    executor.submit(int).result()  # its process does not know what this one learns from now on
    monkeypatch.setitem(__import__("sys").modules, "only_here", module)
    with executor, pytest.raises(ValueError, match="`evaluate` cannot be loaded in a worker .*only_here"):
        search(ElasticNet(), module.evaluate, n_evals=4, executor=executor, worker_model=ElasticNet)


# -- ranks -------------------------------------------------------------------------------------------------------------


def in_rank(rank, world, folder, action):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        outcome = action(rank, folder)
    except BaseException as error:
        outcome = error
    (folder / f"outcome-{rank}").write_bytes(pickle.dumps(outcome))
    torch.distributed.barrier()
    os._exit(0)


def on_ranks(folder, action, world=2):
    folder.mkdir(exist_ok=True)
    processes = [FORK.Process(target=in_rank, args=(rank, world, folder, action)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    (folder / "store").unlink(missing_ok=True)
    return [pickle.loads((folder / f"outcome-{rank}").read_bytes()) for rank in range(world)]


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, model):
        self.calls += 1
        return measure(model)


def plain(rank, folder):
    evaluate = Counting()
    # what a rank other than 0 is told to write to does not exist for it
    result = search(ElasticNet(), evaluate, executor="ranks", save_dir=folder / f"search-{rank}", **SETTINGS)
    return result, evaluate.calls


def half(rank, folder):
    return search(
        ElasticNet(),
        measure,
        executor="ranks",
        save_dir=folder / "search-0",
        **SETTINGS | {"n_evals": 11, "held_out": None},
    )


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks(tmp_path, unbroken, world):
    outcomes = on_ranks(tmp_path, half, world)
    assert all(outcome == run(n_evals=11, held_out=None) for outcome in outcomes)
    outcomes = on_ranks(tmp_path, plain, world)
    assert all(result == unbroken[0] for result, _ in outcomes)
    assert sum(calls for _, calls in outcomes) == N_EVALS - 11 and all(calls for _, calls in outcomes)
    assert [path.name for path in tmp_path.glob("search-*")] == ["search-0"]
    same_files(tmp_path / "search-0", unbroken[1])


def one_fails(rank, folder):
    def evaluate(model):
        if rank == 1 and len(history.read_bytes().splitlines()) > 6:
            raise KeyError("no such thing", 5)
        return measure(model)

    history = folder / "search-0" / "history.jsonl"
    return search(ElasticNet(), evaluate, executor="ranks", save_dir=folder / "search-0", **SETTINGS)


def one_has_another_model(rank, folder):
    return search(other_weight() if rank else ElasticNet(), executor="ranks", n_evals=4)


def one_has_another_argument(rank, folder):
    return search(ElasticNet(), executor="ranks", n_evals=4 if rank else -4)


def a_full_disk(rank, folder):
    (folder / "blocked").touch()
    return search(ElasticNet(), executor="ranks", n_evals=4, save_dir=folder / "blocked")


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (one_fails, KeyError, "no such thing"),
        (one_has_another_model, ValueError, "rank 1 has another model .*'layers.3.lora_B.weight' differ"),
        (one_has_another_argument, ValueError, "`n_evals` must be"),
        (a_full_disk, ValueError, "`save_dir`: cannot use"),
    ],
)
def test_all_ranks_raise_the_same_error(tmp_path, unbroken, action, error, message):
    outcomes = on_ranks(tmp_path, action)
    for outcome in outcomes:
        assert type(outcome) is error
        with pytest.raises(error, match=message):
            raise outcome
    if action is one_fails:
        assert all(result == unbroken[0] for result, _ in on_ranks(tmp_path, plain))


def test_ranks_of_one(unbroken):
    assert search(ElasticNet(), measure, executor="ranks", **SETTINGS) == unbroken[0]


def test_ranks_that_have_not_joined(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.world_size() == 2
    with pytest.raises(RuntimeError, match="have not joined"):
        search(ElasticNet(), executor="ranks")


def test_results_go_from_process_to_process(unbroken):
    assert isinstance(unbroken[0], SearchResult) and pickle.loads(pickle.dumps(unbroken[0])) == unbroken[0]
