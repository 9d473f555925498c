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
"""Skipped and narrowed parts of models on which accelerate has put its hooks, as `device_map` does, or others a forward."""

import copy
import types

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from peft import get_peft_model
from support.models import outputs, randomize, tiny_gpt2, tiny_llama, tokens

from peft_elastic import ElasticLoraConfig, MultiPrunerConfig, prune_structured


INPUTS = {"input_ids": tokens(3, 7)}
STRUCTURE = {"elastic_width": {"heads": [1.0, 0.5], "mlp": [1.0, 0.5]}, "importance": "none"}
CONFIG = {"r": 4, "elastic_ranks": [4, 2], "target_modules": "all-linear", **STRUCTURE}


def hooked(model):
    """With the hooks of a model on two devices, both of which are the CPU."""
    names = {name: "cpu" for name, _ in model.named_children()}
    return dispatch_model(model, names, main_device="cpu", force_hooks=True)


def adapted(model, depth):
    model = get_peft_model(model, ElasticLoraConfig(**CONFIG, elastic_depth=depth)).eval()
    randomize(model, std=0.1)
    return model


def subnets(model):
    return [model.search_space.min, model.search_space.max, *(model.search_space.sample(i) for i in range(3))]


@pytest.mark.parametrize("when", ["before the adapter", "after it", "while something is skipped", "and taken off"])
@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_what_is_skipped_is_skipped(base, when):
    depth = ["0", "1.mlp"]
    wanted = adapted(base(), depth)
    model = adapted(hooked(base()) if when == "before the adapter" else base(), depth)
    if when == "while something is skipped":
        model.set_subnet("min")
    if when != "before the adapter":
        hooked(model.get_base_model())
    if when == "and taken off":
        remove_hook_from_submodules(model.get_base_model())
    for subnet in subnets(wanted):
        model.set_subnet(subnet)
        wanted.set_subnet(subnet)
        expected = outputs(wanted, INPUTS)
        assert torch.equal(outputs(model, INPUTS), expected)
        assert torch.equal(outputs(copy.deepcopy(model), INPUTS), expected)
    model.set_subnet("min")
    wanted.set_subnet("min")
    assert torch.equal(outputs(model.extract_subnet(), INPUTS), outputs(wanted.extract_subnet(), INPUTS))


def test_structured_pruning():
    config = MultiPrunerConfig(ratio=0.3, stages=("blocks", "sub-blocks", "channels"), split=(30, 30, 40), mlp_group=4)
    model, wanted = hooked(tiny_llama(num_hidden_layers=4)), tiny_llama(num_hidden_layers=4)
    plans = [prune_structured(each, config, [INPUTS], progress=False) for each in (model, wanted)]
    assert plans[0].values == plans[1].values
    assert torch.equal(outputs(model, INPUTS), outputs(wanted, INPUTS))


def test_a_forward_of_the_instance_is_refused():
    """As Liger kernels make them: skipping would change nothing, without a word."""
    model = adapted(tiny_llama(), ["1.mlp"])
    mlp = model.get_base_model().model.layers[1].mlp
    mlp.forward = types.MethodType(lambda self, x: 2 * x, mlp)
    before = outputs(model, INPUTS)
    with pytest.raises(
        ValueError, match=r"'model.layers.1.mlp' cannot be skipped: somebody has given this one module a forward"
    ):
        model.set_subnet("min")
    assert model.active_subnet == model.search_space.max
    assert torch.equal(outputs(model, INPUTS), before)
