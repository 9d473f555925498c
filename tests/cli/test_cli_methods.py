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
"""Options that are read from the registries: of a method that somebody adds, too."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import pytest

from peft_elastic import GPTQConfig, MagnitudeConfig, RTNConfig, SparseGPTConfig, WandaConfig
from peft_elastic.cli import _methods, main, prune, quantize
from peft_elastic.cli.main import build_parser
from peft_elastic.pruning import PRUNING_METHODS
from peft_elastic.pruning.structured import STRUCTURED_METHODS
from peft_elastic.quantization import QUANTIZATION_METHODS


@dataclass(frozen=True)
class One:
    share: float | None = field(default=None, metadata={"help": "Share of it, 5% say."})
    number: int = field(default=3, metadata={"help": "How many."})
    how: Literal["so", "thus"] = field(default="so", metadata={"help": "The way."})
    own: list[str] | None = None


@dataclass(frozen=True)
class Other(One):
    number: int = field(default=4, metadata={"help": "How many."})
    steps: tuple[str, ...] = field(default=("a", "b"), metadata={"help": "MLP steps.", "choices": "abc"})
    group: int | float = field(default=0.5, metadata={"help": "Of a step."})
    loud: bool = field(default=False, metadata={"help": "Say so."})


CONFIGS = {"one": One, "other": Other}


@pytest.fixture
def parser():
    parser = argparse.ArgumentParser()
    _methods.add_options(parser, CONFIGS, without=("own",), names={"steps": "of_steps"})
    return parser


def read(parser, words, method):
    return CONFIGS[method](
        **_methods.given(parser.parse_args(words.split()), CONFIGS, method, ("own",), {"steps": "of_steps"})
    )


def test_fields_become_options(parser):
    assert read(parser, "", "one") == One() and read(parser, "", "other") == Other()
    assert read(parser, "--share 0.5 --number 7 --how thus", "one") == One(0.5, 7, "thus")
    words = "--of-steps c a --group 12 --loud"
    assert read(parser, words, "other") == Other(steps=["c", "a"], group=12, loud=True)
    assert type(read(parser, "--group 0.25", "other").group) is float
    text = " ".join(parser.format_help().split())
    assert "share of it, 5% say" in text and "how many (default: 3; of other: 4)" in text
    assert "MLP steps (other only; default: a b)" in text and "say so (other only)" in text and "--own" not in text
    with pytest.raises(ValueError, match="`--of-steps` is of no use with `--method one`; it goes with other"):
        read(parser, "--of-steps a", "one")
    for words in ("--number x", "--how so-so", "--of-steps d", "--group y"):
        with pytest.raises(SystemExit):
            parser.parse_args(words.split())


@pytest.mark.parametrize(
    "registry",
    [PRUNING_METHODS, QUANTIZATION_METHODS, STRUCTURED_METHODS],
    ids=["pruning", "quantization", "structured"],
)
def test_every_field_says_what_it_is(registry):
    for method in registry.values():
        config = getattr(method, "config", method)
        for one in dataclasses.fields(config):
            if one.name not in ("stages", "split", "choose") or config is STRUCTURED_METHODS["multipruner"]:
                assert one.metadata["help"].endswith("."), (config, one.name)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--sparsity 0.5", WandaConfig(sparsity=0.5)),
        ("--method sparsegpt --pattern 2:4 --damping 0.1", SparseGPTConfig(pattern="2:4", damping=0.1)),
        ("--method sparsegpt --sparsity 0.5 --block-size 64", SparseGPTConfig(sparsity=0.5, block_size=64)),
        ("--method magnitude --sparsity 0.5 --scope row", MagnitudeConfig(sparsity=0.5, scope="row")),
    ],
)
def test_pruning(words, expected):
    args = build_parser().parse_args(["prune", "--model", "m", "--out", "o", *words.split()])
    method = PRUNING_METHODS[args.method or "wanda"]
    assert method.config(**_methods.given(args, prune._CONFIGS, method.name, prune._WITHOUT)) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", GPTQConfig()),
        ("--bits 8 --method rtn --clipping mse", RTNConfig(bits=8, clipping="mse")),
        (
            "--act-order --damping 0.1 --group-size -1 --symmetric",
            GPTQConfig(4, -1, True, act_order=True, damping=0.1),
        ),
    ],
)
def test_quantization(words, expected):
    args = build_parser().parse_args(["quantize", "--model", "m", "--out", "o", *words.split()])
    method = QUANTIZATION_METHODS[args.method]
    assert method.config(**_methods.given(args, quantize._CONFIGS, method.name, quantize._WITHOUT)) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("prune --scope row --sparsity 0.5", "`--scope` is of no use with `--method wanda`; it goes with magnitude."),
        ("prune --structured --ratio 0.1 --damping 0.1", "`--damping` goes without `--structured`."),
        ("prune --sparsity 0.5 --ratio 0.1", "`--ratio` goes with `--structured`."),
        ("prune --sparsity 0.5 --head-group 2", "`--head-group` goes with `--structured`."),
        ("prune --method sparsegpt --sparsity 0.5 --block-size 0", "`block_size` must be a whole number >= 1, got 0."),
        (
            "quantize --method rtn --damping 0.1",
            "`--damping` is of no use with `--method rtn`, which looks at the weights",
        ),
        (
            "quantize --method rtn --dataset x",
            "`--dataset` is of no use with `--method rtn`, which looks at the weights",
        ),
    ],
)
def test_refusals(words, message, capsys, tmp_path):
    assert main([*words.split(), "--model", "m", "--out", str(tmp_path / "o")]) == 2
    assert message in capsys.readouterr().err.replace("\n", " ")
