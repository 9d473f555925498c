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
"""The configuration: what it accepts, what it refuses, and that it survives being saved."""

import json

import pytest
from peft import LoraConfig, PeftConfig, PeftType, get_peft_config

from peft_elastic import ElasticLoraConfig


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({"r": 8}, (8, 6, 4)),
        ({"r": 32}, (32, 24, 16)),
        ({"r": 5}, (5, 4, 3)),
        ({"r": 2}, (2, 1)),
        ({"r": 1}, (1,)),
        ({"r": 8, "elastic_ranks": [2, 8, 5]}, (8, 5, 2)),
        ({"r": 8, "elastic_ranks": (8, 1)}, (8, 1)),
        ({"r": 8, "elastic_ranks": [8]}, (8,)),
    ],
)
def test_elastic_ranks(settings, ranks):
    assert ElasticLoraConfig(**settings).rank_options(settings["r"]) == ranks


def test_rank_options_scale_with_the_maximal_rank_of_a_module():
    config = ElasticLoraConfig(r=8, elastic_ranks=[8, 5, 1])
    assert config.rank_options(8) == (8, 5, 1)
    assert config.rank_options(16) == (16, 10, 2)
    assert config.rank_options(4) == (4, 3, 1)  # rounded up
    assert config.rank_options(2) == (2, 1)  # equal ones are one
    assert config.rank_options(1) == (1,)
    assert ElasticLoraConfig(r=8).rank_options(16) == (16, 12, 8)


def test_rank_options_are_multiples_if_asked():
    assert ElasticLoraConfig(r=8).rank_options(8, 4) == (8, 4)
    assert ElasticLoraConfig(r=12).rank_options(12, 2) == (12, 10, 6)
    assert ElasticLoraConfig(r=8, elastic_ranks=[8, 3]).rank_options(16, 4) == (16, 8)
    assert ElasticLoraConfig(r=8, elastic_ranks=[8, 3]).rank_options(8, 4) == (8, 3)  # asked for one by one


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "`r` must be a whole number >= 1, got 0"),
        ({"r": -4}, "`r` must be a whole number >= 1, got -4"),
        ({"r": 4.0}, "`r` must be a whole number >= 1, got 4.0"),
        ({"elastic_ranks": [16, 8]}, r"largest of `elastic_ranks` must be `r`, got elastic_ranks=\[16, 8\] with r=8"),
        ({"elastic_ranks": [4, 2]}, "Set r=4 or change the list"),
        ({"elastic_ranks": []}, r"`elastic_ranks` must be a list with at least one rank, got \[\]"),
        ({"elastic_ranks": 8}, "`elastic_ranks` must be a list with at least one rank, got 8"),
        ({"elastic_ranks": "8,4"}, "`elastic_ranks` must be a list"),
        ({"elastic_ranks": [8, 0]}, r"`elastic_ranks` must be positive integers, got \[8, 0\]"),
        ({"elastic_ranks": [8, -1]}, "`elastic_ranks` must be positive integers"),
        ({"elastic_ranks": [8, 4.0]}, "`elastic_ranks` must be positive integers"),
        ({"elastic_ranks": [8, True]}, "`elastic_ranks` must be positive integers"),
        ({"elastic_ranks": [8, 8]}, "`elastic_ranks` must differ from each other"),
        ({"rank_groups": "layer"}, "`rank_groups` must be 'module', 'block' or a list.*got 'layer'"),
        ({"rank_groups": []}, "`rank_groups` must be"),
        ({"rank_groups": [[]]}, "`rank_groups` must be"),
        ({"rank_groups": ["q_proj"]}, "`rank_groups` must be"),
        ({"rank_groups": [["q_proj", 3]]}, "`rank_groups` must be"),
        ({"rank_groups": [["q_proj", ""]]}, "`rank_groups` must be"),
        ({"rank_groups": [["a", "b"], ["b"]]}, r"`rank_groups` names \['b'\] more than once"),
        ({"active_subnet": [4, 4]}, "`active_subnet` must be a dict from choice key to value, got \\[4, 4\\]"),
        ({"active_subnet": "max"}, "`active_subnet` must be a dict"),
        ({"init_lora_weights": "eva"}, "`init_lora_weights='eva'` cannot be combined with elastic ranks"),
        ({"kasa_config": {}}, None),  # an empty dict is peft's way to ask for the defaults
        ({"monteclora_config": {"num_samples": 2}}, "`monteclora_config` cannot be combined with elastic ranks"),
        ({"use_bdlora": {"target_modules_bd_a": ["q"], "nblocks": 2}}, "`use_bdlora` cannot be combined"),
        ({"arrow_config": {"top_k": 2}}, "`arrow_config` cannot be combined"),
        ({"use_qalora": True}, "`use_qalora` cannot be combined"),
        ({"megatron_config": {"x": 1}}, "`megatron_config` cannot be combined"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_settings_are_refused(settings, message):
    message = message or "`kasa_config` cannot be combined with elastic ranks"
    with pytest.raises(ValueError, match=message):
        ElasticLoraConfig(**settings)


def test_every_variant_of_peft_is_either_tested_or_refused():
    """A variant that a later peft adds is refused until it has been looked at."""
    from dataclasses import fields

    variants = {f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")}
    assert variants >= {"use_dora", "kasa_config", "monteclora_config", "arrow_config", "use_bdlora"}
    accepted = {"alora_invocation_tokens", "use_dora", "velora_config"}
    assert accepted <= variants
    for name in variants - accepted:
        config = ElasticLoraConfig()
        setattr(config, name, {"anything": 1})
        with pytest.raises(ValueError, match=f"`{name}` cannot be combined with elastic ranks"):
            config._check_lora_options()


def test_a_configuration_survives_saving(tmp_path):
    config = ElasticLoraConfig(
        r=12,
        elastic_ranks=[12, 4],
        lora_alpha=7,
        target_modules=["a", "b"],
        rank_groups=[["a", "b"]],
        rank_pattern={"a": 6},
        active_subnet={"rank:a": 2},
        use_dora=True,
    )
    config.save_pretrained(tmp_path)
    for loaded in (PeftConfig.from_pretrained(tmp_path), ElasticLoraConfig.from_pretrained(tmp_path)):
        assert type(loaded) is ElasticLoraConfig
        assert loaded.to_dict() == config.to_dict()
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "ELASTIC_LORA"
    assert saved["elastic_ranks"] == [12, 4]
    assert "initialized_with" not in saved
    assert type(get_peft_config({"peft_type": "ELASTIC_LORA", "r": 4})) is ElasticLoraConfig


def test_the_type_is_not_lora():
    config = ElasticLoraConfig()
    assert isinstance(config, LoraConfig)
    assert config.peft_type is PeftType.ELASTIC_LORA
    assert config.peft_type == "ELASTIC_LORA"
