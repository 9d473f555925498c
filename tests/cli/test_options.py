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
"""The command line has the defaults of the Python API, but where it says why not; and its choices are all that there are."""

import argparse

import pytest
from transformers import TrainingArguments

from peft_elastic import (
    ElasticLoraConfig,
    ElasticTrainer,
    GPTQConfig,
    LatencyModel,
    SparseQALoraConfig,
    SubnetSamplingCallback,
    optimize_generation,
    save_gptq,
    search_subnet,
    sparsify_linears,
)
from peft_elastic.cli._options import default_of, summary
from peft_elastic.cli.main import build_parser
from peft_elastic.cli.quickstart.plan import Plan
from peft_elastic.layers.values import ROUNDED
from peft_elastic.search import ALGORITHMS


# (command, option) -> where its default comes from. Those of `prune` and `quantize` that are fields of configs have none of their own.
API = {
    ("quantize", "--format"): (save_gptq, "checkpoint_format"),
    ("train", "--groups"): (ElasticLoraConfig, "rank_groups"),
    ("train", "--ranks"): (ElasticLoraConfig, "elastic_ranks"),
    ("train", "--elastic-width"): (ElasticLoraConfig, "elastic_width"),
    ("train", "--elastic-depth"): (ElasticLoraConfig, "elastic_depth"),
    ("train", "--importance"): (ElasticLoraConfig, "importance"),
    ("train", "--group-size"): (SparseQALoraConfig, "group_size"),
    ("train", "--strategy"): (SubnetSamplingCallback, "strategy"),
    ("train", "--distillation"): (ElasticTrainer, "distillation"),
    ("train", "--epochs"): (TrainingArguments, "num_train_epochs"),
    ("search", "--population"): (search_subnet, "population"),
    ("search", "--algorithm"): (search_subnet, "algorithm"),
    ("search", "--reference-point"): (search_subnet, "reference_points"),
    ("search", "--latency-kernel"): (LatencyModel, "kernel"),
    ("search", "--seed"): (search_subnet, "seed"),
    ("bench", "--values"): (sparsify_linears, "dtype"),
}
API |= {
    ("search", f"--max-{name}"): (search_subnet, f"max_{name}") for name in ("macs", "parameters", "bytes", "latency")
}
# (command, option) -> where the API has another default, and why.
DELIBERATE = {
    ("train", "--max-rank"): (ElasticLoraConfig, "r", "the setting of the Shears paper"),
    ("train", "--alpha"): (ElasticLoraConfig, "lora_alpha", "twice the rank, as in the Shears paper"),
    ("train", "--dropout"): (ElasticLoraConfig, "lora_dropout", "the setting of the Shears paper"),
    ("train", "--targets"): (ElasticLoraConfig, "target_modules", "peft knows targets of some architectures alone"),
    ("train", "--lr"): (TrainingArguments, "learning_rate", "the setting of the Shears paper"),
    ("train", "--batch-size"): (TrainingArguments, "per_device_train_batch_size", "the setting of the Shears paper"),
    ("train", "--save-steps"): (TrainingArguments, "save_steps", "on a CPU 500 steps are hours, lost if interrupted"),
    ("search", "--evals"): (search_subnet, "n_evals", "minutes on a CPU; the same command with more continues"),
    ("search", "--latency-mode"): (LatencyModel, "mode", "the commands know language models alone, which generate"),
    ("search", "--metric"): (search_subnet, "objectives", "the loss tells subnets apart on fewer examples"),
}
# What has no counterpart, by command; "" stands for what several have.
OWN = {
    "": ("--help", "--traceback", "--model", "--dtype", "--device", "--out", "--adapter", "--subnet", "--seed")
    + ("--dataset", "--split", "--samples", "--template", "--max-length", "--batch-size"),
    "quickstart": ("--fresh", "--smoke", "--width"),
    "prune": ("--structured", "--plan-only", "--stream", "--activations-on-disk"),
    "quantize": ("--method", "--stream", "--activations-on-disk"),
    "train": ("--full", "--bounds", "--resume", "--sparse-adapter", "--calibration"),
    "search": ("--cost", "--latency-of", "--select"),
    "merge": ("--gptq", "--stream"),
    "bench": ("--shapes", "--tokens"),
    "info": ("--json",),
}


def options():
    (action,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for command, parser in action.choices.items():
        for option in parser._actions:
            yield command, option.option_strings[-1], option


@pytest.mark.parametrize(
    "command, name, option", list(options()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_defaults(command, name, option):
    """A default of None says nothing: the API's stands."""
    if (command, name) in DELIBERATE:
        api, argument, _ = DELIBERATE[command, name]
        assert option.default != default_of(api, argument), "no exception any more"
    elif (command, name) in API:
        expected = default_of(*API[command, name])
        assert option.default in (expected, [expected])
    else:
        assert option.default is None or name in OWN[""] + OWN[command], "in none of the tables"


def test_the_tables_name_no_option_that_is_gone():
    there = {(command, name) for command, name, _ in options()}
    named = {*API, *DELIBERATE, *((command, name) for command, names in OWN.items() if command for name in names)}
    assert named <= there and set(OWN[""]) <= {name for _, name in there}


def test_choices_are_those_of_the_registries():
    choices = {(command, name): option.choices for command, name, option in options() if option.choices}
    assert choices["search", "--algorithm"] == tuple(ALGORITHMS)
    assert choices["bench", "--values"] == choices["merge", "--sparse"] == ROUNDED


def test_the_quickstart_says_how_much_it_does():
    shown = {name: option.help for command, name, option in options() if command == "quickstart"}
    for name in ("sparsity", "steps", "evals"):
        assert f"(default: {getattr(Plan(), name)})" in shown[f"--{name}"]


def test_default_of():
    assert default_of(GPTQConfig, "bits") == 4 and default_of(search_subnet, "population") == 8
    assert default_of(Plan, "ranks") == Plan().ranks
    with pytest.raises((KeyError, StopIteration)):
        default_of(optimize_generation, "nonsense")


@pytest.mark.parametrize(
    "docstring, line",
    [
        ("`peft-elastic x`: do that: now.\n\nMore: of it.", "do that: now"),
        ("`peft-elastic x`: over\ntwo lines", "over two lines"),
        ("", ""),
        (None, ""),
    ],
)
def test_summary(docstring, line):
    assert summary(docstring) == line
