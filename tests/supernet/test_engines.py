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
"""Engines that spread a training over processes, each against one process on the same global batch: losses, norms of gradients, and the
adapter that is saved. `support/engines.py` is what runs."""

import functools
import importlib.util
import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file
from support.engines import CASES, STEPS
from support.fresh import run
from support.places import REPOSITORY, TESTS

from peft_elastic import ElasticModel


SCRIPT = TESTS / "support" / "engines.py"
DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed; `make test-engines` makes an environment with it",
)
FSDP2 = pytest.mark.skipif(
    torch.__version__.startswith("2.7."),
    reason="torch 2.7 adds gradients up under `fully_shard` with gloo, where newer versions average them (norms of twice the size)",
)
# with one subnet a step, blocks that are skipped have no gradient, see `test_deepspeed_moves_skipped_blocks`
SKIPPING = [case for case in CASES if case in ("shape,one", "all,one", "weights,one")]


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """A function that trains a case with an engine, once: the folder with what came out, or the script's messages if it failed."""

    @functools.cache
    def trained(engine, case):
        folder = tmp_path_factory.mktemp("engines")
        processes = 1 if engine.startswith("one") or engine == "loop" else 2
        environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{TESTS}", "OMP_NUM_THREADS": "1"}
        if engine.startswith("zero"):
            environment["DS_ACCELERATOR"] = "cpu"
        command = [sys.executable, "-W", "ignore", SCRIPT, folder, processes, engine, case]
        done = run(command, env=environment, capture_output=True, timeout=300)
        return done.stderr if done.returncode else folder / case

    return trained


def assert_same(folder, alone, tolerance=1e-4):
    """`tolerance` is that of the weights, which move by up to 1e-2 a step: AdamW makes as much of rounding errors where there is next to no
    gradient, as there is in many places of a whole model."""
    assert not isinstance(folder, str), folder
    assert not isinstance(alone, str), alone
    found, expected = (json.loads((path / "rank-0.json").read_text()) for path in (folder, alone))
    assert len(expected["losses"]) >= STEPS
    difference = max(abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True))
    print(
        f"{folder.name}: losses from {max(expected['losses']):.3f} to {min(expected['losses']):.3f} differ by {difference:.1e} at most"
    )
    # of a whole model more is added up, in as many digits as float32 has
    whole = folder.name.startswith("weights")
    for what, relative in (("losses", 2e-6), ("norms", 1e-5)):
        torch.testing.assert_close(found[what], expected[what], rtol=relative if whole else 0, atol=1e-5)
    name = "model.safetensors" if whole else "adapter_model.safetensors"
    weights, wanted = (load_file(path / "adapter" / name) for path in (folder, alone))
    if whole:
        assert ElasticModel.from_pretrained(folder / "adapter").search_space.size > 1
    assert weights.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-3 if whole else tolerance)
    return found


def quick(cases, *names):
    return [case if case in names else pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ddp(train, case):
    assert assert_same(train("ddp", case), train("one", case))["wrapper"] == "DistributedDataParallel"


@FSDP2
@pytest.mark.parametrize("case", quick(CASES, "all,sandwich"))
def test_fsdp2_of_accelerate(train, case):
    found = assert_same(train("fsdp2", case), train("one", case))
    name = "LlamaForCausalLM" if case.startswith("weights") else "PeftModel"
    assert found["wrapper"] == f"FSDP{name}" and found["weights"] == "DTensor"


@DEEPSPEED
@pytest.mark.parametrize("case", [case for case in CASES if case not in SKIPPING])
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed(train, engine, case):
    found = assert_same(train(engine, case), train("one", case))
    assert found["wrapper"] == "DeepSpeedEngine" and found["sharded"] == (engine == "zero3")


@DEEPSPEED
@pytest.mark.parametrize("case", SKIPPING)
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_moves_skipped_blocks(train, engine, case):
    """What has no gradient in a step gets one of zeros under ZeRO-2, and the last one that it had under ZeRO-3, and AdamW moves it: as
    in one process that does the same, which is another training than one that leaves it alone. It is refused; the refusal is taken out
    here. Should this fail because a newer DeepSpeed leaves them alone, the refusal can go."""
    same = train("one-zeros" if engine == "zero2" else "one-stale", case)
    found = assert_same(train(f"{engine}-unchecked", case), same, tolerance=1e-3)["losses"]
    alone = json.loads((train("one", case) / "rank-0.json").read_text())["losses"]
    assert max(abs(a - b) for a, b in zip(found, alone)) > 1e-4
    message = train(engine, case)
    assert isinstance(message, str) and "whose weights DeepSpeed's optimizer would move all the same" in message


LOOPS = [
    ("blocks", "all,one"),
    ("blocks", "all,sandwich"),
    ("blocks", "masked,one"),
    ("blocks", "weights,sandwich"),
    ("root", "weights,one"),
    ("root", "all,one"),
    ("layers", "all,one"),
    ("linears", "ranks,one"),
    ("linears", "ranks,sandwich"),
]


@FSDP2
@pytest.mark.slow
@pytest.mark.parametrize("unit, case", LOOPS)
def test_fully_shard_in_a_loop_of_ones_own(train, unit, case):
    """On transformer blocks, on nothing but the whole model, on the LoRA layers, or on each linear layer in them."""
    found = assert_same(train(f"fsdp-{unit}", case), train("loop", case))
    assert found["weights"] == "DTensor"
