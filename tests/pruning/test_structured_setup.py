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
"""What a run of structured pruning decides before it runs anything."""

import math

import pytest
from support.masked_states import calibration_of
from support.models import tiny_llama

from peft_elastic import BlockPrunerConfig, MultiPrunerConfig, TwoStagePrunerConfig, WidthPrunerConfig
from peft_elastic.pruning.structured import evaluation
from peft_elastic.pruning.structured.greedy import Stage
from peft_elastic.pruning.structured.setup import make_stages, plan_run, stage_shares, step_sizes
from peft_elastic.pruning.structured.units import Units
from peft_elastic.structure import Structure


@pytest.fixture
def model():
    """One that cannot be run."""
    model = tiny_llama(num_hidden_layers=4)
    Structure(model)  # its trial runs a copy

    def fail(*args):
        raise AssertionError("the model is run")

    model.register_forward_pre_hook(fail)
    for layer in model.modules():
        layer.register_forward_pre_hook(fail)
    return model


def test_a_run_is_decided_without_running(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = calibration_of("llama")
    config = MultiPrunerConfig(ratio=0.3, mlp_group=8, block_samples=4, width_samples=2)
    setup = plan_run(model, config, iter(batches))
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert setup.costs({}) == whole and setup.target == whole * 0.7
    assert setup.shares == {"sub-blocks": 0.44, "channels": 0.52, "heads": 0.04}
    assert [stage.granularities[0] for stage in setup.stages] == [
        "sub-blocks", "channels", "heads", "heads", "channels", "sub-blocks",
    ]  # fmt: skip
    assert [stage.metric for stage in setup.stages[:3]] == ["4 sequences", "2 sequences", "2 sequences"]
    assert setup.sorted_kinds == ("mlp", "heads") and len(setup.sorted_widths) == 8 and setup.needs_order_data
    assert setup.evaluation.name == "perplexity" and setup.evaluation.shown(math.log(7)) == pytest.approx(7)
    assert all((value == before[name]).all() for name, value in model.state_dict().items())


def test_without_data(model):
    setup = plan_run(model, WidthPrunerConfig(ratio=0.2, mlp_group=8, choose="random", order="none"))
    assert all(stage.metric is None and stage.choose == "random" for stage in setup.stages) and setup.stages
    assert not setup.sorted_widths and not setup.needs_order_data
    nothing = plan_run(model, MultiPrunerConfig(ratio=0))
    assert nothing.stages == () and nothing.target == nothing.costs({}) and nothing.shares == {}


def test_a_metric_of_the_user(model):
    def accuracy(model):
        raise AssertionError

    setup = plan_run(model, BlockPrunerConfig(ratio=0.2), metric=accuracy, mode="max")
    assert {stage.metric for stage in setup.stages} == {"accuracy"} and setup.evaluation.shown(-0.9) == 0.9
    metrics = setup.evaluation.metrics(model, setup.structure, 1e9)
    assert list(metrics) == ["accuracy"] and setup.evaluation.batches is None


def test_stages():
    config = TwoStagePrunerConfig(ratio=0.5)
    shares = stage_shares(config)
    assert shares == {"channels": 0.8, "attentions": 0.2}
    assert make_stages(config, shares, 100.0, 50.0, lambda name: f"on {name}") == (
        Stage(("channels",), 60.0, "uniform", "on channels"),
        Stage(("attentions",), 50.0, "metric", "on attentions"),
        Stage(("attentions",), 50.0, "metric", "on attentions"),
        Stage(("channels",), 50.0, "uniform", "on channels"),
    )
    together = MultiPrunerConfig(split="auto")
    names = ("sub-blocks", "channels", "heads")
    assert make_stages(together, stage_shares(together), 100.0, 80.0, lambda name: None) == (
        Stage(names, 80.0, "metric", None, per_cost=True),
    )
    assert stage_shares(MultiPrunerConfig(split=(1, 0, 1))) == {"sub-blocks": 0.5, "heads": 0.5}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"mlp": 3, "heads": 1}),  # a 14th of 48 in multiples of 1
        ({"mlp_group": 16, "head_group": 2}, {"mlp": 16, "heads": 2}),
        ({"mlp_group": 0.5}, {"mlp": 24, "heads": 1}),
        ({"stages": ("channels",), "split": (1,), "choose": "uniform"}, {"mlp": 8}),
        ({"stages": ("blocks",), "split": (1,)}, {}),
    ],
)
def test_step_sizes(model, options, expected):
    structure = Structure(model)
    sizes = step_sizes(MultiPrunerConfig(**options), structure)
    assert sizes == expected
    units = Units(model, structure, sizes)
    assert {width.kind for width in units.widths.values()} == expected.keys()
    for key, group in units.groups.items():
        assert group == (sizes["mlp"] if key.startswith("mlp") else 2 * sizes["heads"])


def test_how_many_sequences():
    config = MultiPrunerConfig(block_samples=None, width_samples=4)
    found = evaluation.Evaluation(tiny_llama(), config, calibration_of("llama"), None, "min")
    there = found.sequences(None)
    assert (
        there == sum(len(batch["input_ids"]) for batch in calibration_of("llama")) and found.sequences(10**6) == there
    )
    assert found.data_of("blocks") == f"{there} sequences" and found.data_of("heads") == "4 sequences"
