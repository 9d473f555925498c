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
"""What all tests share: an environment without hubs and with one thread, fixed seeds, and the real data if it is there."""

import os


# Before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random  # noqa: E402
import signal  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from support import fresh  # noqa: E402
from support.places import REPOSITORY  # noqa: E402


torch.set_num_threads(1)

# Files with a fixture that takes long: their tests run in the same process of xdist, which sets it up once.
_TOGETHER = (
    "test_benchmarks.py",
    "test_cli_ranks.py",
    "test_distributed.py",
    "test_engines.py",
    "test_quickstart.py",
    "test_spread.py",
    "test_tuner_export.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    # its own `--dist loadgroup` does nothing under pytest 9.2, whose tests have no `_nodeid` to write into
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file.endswith(_TOGETHER) else nodeid

    return ByFixture(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    fresh.note_environment()


def _restoring_the_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    for name in {**os.environ, **before}:
        if name == "PYTEST_CURRENT_TEST" or os.environ.get(name) == before.get(name):
            continue
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


# Variables that a test, or a library in it, has set are gone after it: scripts of later tests would inherit them. What a fixture of
# a module set is gone after the module.
_environment_of_module = pytest.fixture(autouse=True, scope="module")(_restoring_the_environment)
_environment = pytest.fixture(autouse=True)(_restoring_the_environment)


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where a shell started the tests in the background and lets them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that some tests use: `PEFT_ELASTIC_DATA`, or `../shared/data` beside the checkout."""
    folder = Path(os.environ.get("PEFT_ELASTIC_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is no folder; PEFT_ELASTIC_DATA names another")
    return folder
