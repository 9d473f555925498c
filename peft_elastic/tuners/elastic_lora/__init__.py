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
"""Elastic LoRA (peft type ELASTIC_LORA): LoRA whose rank can be chosen, module by module, after training.
Importing this folder registers the type with peft, and a hook of torch that tells of new PeftModels."""

from ...supernet.summary import SubnetSummary
from ..register import register_tuner
from .config import ElasticLoraConfig
from .model import ElasticLoraModel
from .peft_model import watch_peft_models


__all__ = ["ElasticLoraConfig", "ElasticLoraModel", "SubnetSummary"]


register_tuner("elastic_lora", config_cls=ElasticLoraConfig, model_cls=ElasticLoraModel)
watch_peft_models()
