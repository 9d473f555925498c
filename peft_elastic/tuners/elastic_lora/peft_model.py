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
"""What a PeftModel shows of an elastic adapter: methods of its own, as peft does not ask the tuner for these."""

from __future__ import annotations

import functools
import os
import sys
from typing import Any, Optional

from peft import PeftConfig, PeftModel, PeftModelForQuestionAnswering, PeftModelForTokenClassification
from peft.utils import CONFIG_NAME
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .config import ElasticLoraConfig
from .model import ElasticLoraModel
from .state import active_adapters, elastic_configs
from .subnets import activate_chosen, check_chosen


# What these classes write into the configuration that they were given once the adapter is there, which has a copy then.
_HEADS_NAMED_LATE = {
    PeftModelForTokenClassification: ["classifier", "score"],
    PeftModelForQuestionAnswering: ["qa_outputs"],
}


def watch_peft_models() -> None:
    """From now on, give every PeftModel that gets an elastic tuner what it must do itself: peft does not tell the tuner which
    PeftModel it belongs to, and looks for methods in the PeftModel first."""
    register_module_module_registration_hook(_welcome)


def _welcome(module: nn.Module, name: str, submodule: Optional[nn.Module]) -> None:
    """Equip a PeftModel that gets an elastic tuner; a hook of torch, called whenever any module gets a submodule."""
    if module.__dict__.get("_is_replica"):
        return  # a copy that `nn.DataParallel` makes for one forward pass
    if isinstance(submodule, ElasticLoraModel) and isinstance(module, PeftModel) and name == "base_model":
        module.__dict__["print_trainable_parameters"] = functools.partial(_print_trainable_parameters, module)
        module.__dict__["load_adapter"] = functools.partial(_load_adapter, module)
        module.__dict__["search_subnet"] = functools.partial(_search_subnet, module)
        submodule._state.in_peft_model = True
        for head, names in _HEADS_NAMED_LATE.items():
            if isinstance(module, head):
                for config in elastic_configs(submodule._configs).values():
                    named = config.modules_to_save or []
                    config.modules_to_save = [*named, *(name for name in names if name not in named)]
        submodule.restore_subnet()


def _print_trainable_parameters(model: PeftModel) -> None:
    """Stand in for `PeftModel.print_trainable_parameters`, which knows nothing of subnets."""
    type(model).print_trainable_parameters(model)
    tuner = model.base_model
    for adapter_name in active_adapters(tuner.model, tuner._configs):
        print(tuner.subnet_summary(adapter_name).describe())


def _search_subnet(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    from ...search import search_subnet

    return search_subnet(model, *args, **kwargs)


def _load_adapter(model: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """Stand in for `PeftModel.load_adapter`, which reads no configuration if there is an adapter of that name, as when Trainer
    resumes or goes back to the best model: the chosen subnet is part of what was saved."""
    load = functools.partial(type(model).load_adapter, model, model_id, adapter_name, *args, **kwargs)
    config = model.peft_config.get(adapter_name)
    # has just made the adapter, from a configuration that may have been given by the user
    by_from_pretrained = sys._getframe(1).f_code is PeftModel.from_pretrained.__func__.__code__
    file = os.path.join(model_id, kwargs.get("subfolder") or "", CONFIG_NAME)
    if not isinstance(config, ElasticLoraConfig) or by_from_pretrained:
        return load()
    if os.path.isdir(model_id) and not os.path.isfile(file):
        return load()  # weights alone
    saved = PeftConfig.from_pretrained(model_id, **model._split_kwargs(kwargs)[0])
    tuner = model.base_model
    before, config.active_subnet = config.active_subnet, getattr(saved, "active_subnet", None)
    try:
        if config.active_subnet is not None:
            check_chosen(config, adapter_name, tuner.get_search_space(adapter_name))
        return load()
    except Exception:
        config.active_subnet = before
        activate_chosen(tuner._state, tuner.model, tuner._configs, adapter_name)
        raise
