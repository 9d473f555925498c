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
"""The public names and signatures are those of commit 147743b, which `stored/public_api.json` has, but for additions and the changes
that are listed here."""

import copy
import json
from typing import Any

import pytest
from stored.shared import STORED, read_json
from stored.write_api import describe


# What is not as it was -> (what it is now, why). None: it is gone.
CHANGED: dict[str, tuple[str | None, str]] = {
    "peft_elastic.load_gptq": (
        "(path, *, dense=None, dtype=torch.float32, auto_class=None)",
        "None is the class that the checkpoint names, so that vision-language models and classifiers are read as such",
    ),
}
for _model in ("ElasticLoraModel", "SparseQALoraModel"):
    CHANGED |= {
        f"peft_elastic.{_model}.__init__": (
            "(self, model, peft_config, *args, **kwargs)",
            "it copies the configuration, so that adapters do not share one; the arguments are peft's, as before",
        ),
        f"peft_elastic.{_model}.export_lora": (
            "(self, save_directory, adapter_name=None, *, pad=True)",
            "one rank for all modules by default, as llama.cpp and vLLM read no other",
        ),
    }
_TRAINER = (
    "(self, *args, strategy='sandwich', distillation=None, distillation_weight=0.5, distillation_temperature=1.0, seed=None, "
    "eval_subnet=None, stages=None, calibration=None, averaged=None, prepare=None, **kwargs)"
)
_CALLBACK = "peft_elastic.SubnetSamplingCallback"
CHANGED |= {
    "peft_elastic.ElasticTrainer.__init__": (_TRAINER, "arguments with defaults, by name alone, before **kwargs"),
    "peft_elastic.ElasticTrainerMixin.__init__": (_TRAINER, "arguments with defaults, by name alone, before **kwargs"),
    "peft_elastic.Stage.epochs": ("field = None", "a stage may be counted in `steps`"),
    f"{_CALLBACK}.__init__": (
        "(self, strategy='uniform', seed=None, eval_subnet=None, stages=None, *, calibration=None, averaged=None, prepare=None)",
        "arguments with defaults, by name alone",
    ),
    f"{_CALLBACK}.on_epoch_end": (
        "(self, args, state, control, model=None, **kwargs)",
        "what Trainer gives by name",
    ),
    f"{_CALLBACK}.on_step_begin": (
        "(self, args, state, control, optimizer=None, **kwargs)",
        "what Trainer gives by name",
    ),
    f"{_CALLBACK}.on_step_end": ("(self, args, state, control, model=None, **kwargs)", "what Trainer gives by name"),
    f"{_CALLBACK}.on_train_begin": (
        "(self, args, state, control, model=None, lr_scheduler=None, optimizer=None, **kwargs)",
        "what Trainer gives by name",
    ),
}


def differences(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, str | None]:
    """What is not as it was, by its dotted name -> what it is now, None if it is gone. Additions are none, nor are fields and arguments
    with a default behind the others."""
    found: dict[str, str | None] = {}
    for name, old in then.items():
        new, path = now.get(name), f"{prefix}{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            found |= differences(old, new, f"{path}.")
        elif name == "fields in order" and new is not None:
            added = now[name].removeprefix(old).strip(", ").split(", ")
            required = any("without a default" in now.get(field, "") for field in added)
            if not f"{new}, ".startswith(f"{old}, ") or required:
                found[path] = new
        elif new != old and not _has_more_defaults(old, new):
            found[path] = new if new is None or isinstance(new, str) else json.dumps(new)
    return found


def _has_more_defaults(old: Any, new: Any) -> bool:
    """Whether a signature is the old one with arguments behind the others, each with a default."""
    if not (isinstance(old, str) and isinstance(new, str) and new.startswith(f"{old[:-1]}, ") and old.startswith("(")):
        return False
    return all("=" in argument for argument in new[len(old) + 1 : -1].split(", "))


THEN = read_json(STORED / "public_api.json")


def test_the_public_interface_is_as_it_was_but_for_what_is_listed():
    found = differences(THEN, describe())
    listed = {path: now for path, (now, _) in CHANGED.items()}
    assert found == listed


@pytest.mark.parametrize(
    ("change", "path", "now"),
    [
        (lambda api: api.pop("peft_elastic.prune"), "peft_elastic.prune", None),
        (lambda api: api.update({"peft_elastic.prune": "(model)"}), "peft_elastic.prune", "(model)"),
        (
            lambda api: api.update({"peft_elastic.prune": api["peft_elastic.prune"][:-1] + ", more)"}),
            "peft_elastic.prune",
            THEN["peft_elastic.prune"][:-1] + ", more)",
        ),
        (lambda api: api.pop("peft_elastic.deploy.SparseLinear"), "peft_elastic.deploy.SparseLinear", None),
        (
            lambda api: api["peft_elastic.SparseLinear"].pop("to_linear"),
            "peft_elastic.SparseLinear.to_linear",
            None,
        ),
        (
            lambda api: api["peft_elastic.SwapReport"].update({"fields in order": "dtype, decisions, level, threads"}),
            "peft_elastic.SwapReport.fields in order",
            "dtype, decisions, level, threads",
        ),
        (
            lambda api: api["peft_elastic.SwapReport"].update(
                {"fields in order": "decisions, dtype, level, threads, more", "more": "field without a default"}
            ),
            "peft_elastic.SwapReport.fields in order",
            "decisions, dtype, level, threads, more",
        ),
        (
            lambda api: api["peft_elastic.GPTQConfig"].update(bits="field = 3"),
            "peft_elastic.GPTQConfig.bits",
            "field = 3",
        ),
    ],
)
def test_what_is_taken_away_is_found(change, path, now):
    api = copy.deepcopy(THEN)
    change(api)
    assert differences(THEN, api) == {path: now}


def test_what_is_added_is_no_difference():
    api = copy.deepcopy(THEN)
    api["peft_elastic.more"] = "()"
    api["peft_elastic.prune"] = api["peft_elastic.prune"][:-1] + ", more=1, others=None)"
    api["peft_elastic.SwapReport"] |= {
        "more": "field = 0",
        "fields in order": "decisions, dtype, level, threads, more",
    }
    assert differences(THEN, api) == {}
