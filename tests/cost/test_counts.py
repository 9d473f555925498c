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
"""The attention products in the cost model: what a forward pass really multiplies, and what is published."""

import pytest
import torch
from support.elastic_models import ALL, adapted, build, inputs_of
from support.models import BLOCKS, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, BertModel

from peft_elastic.cost.counts import CostModel
from peft_elastic.supernet import Choice, SearchSpace


pytestmark = pytest.mark.filterwarnings("ignore")

LENGTH = 5
FIXED = SearchSpace([Choice("rank", "none", (1,))])


class BatchedProducts(TorchDispatchMode):
    """Counts the multiply-accumulates of products of batches of matrices, but for outer products, the angles of positions."""

    macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.bmm.default and args[0].shape[2] > 1:
            self.macs += args[0].numel() * args[1].shape[2]
        return result


@pytest.mark.parametrize("name", ALL)
def test_they_are_what_runs(name):
    model = adapted(build(name, attn_implementation="eager"), elastic_depth=["all", "all.attention"])
    inputs = inputs_of(name)
    if "pixel_values" in inputs:
        inputs = {"pixel_values": inputs["pixel_values"][:1]}  # four patches and the class
    else:
        inputs = {"input_ids": torch.arange(LENGTH)[None] + 3}
    if name not in BLOCKS:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    space = model.search_space
    without, costs = CostModel(model, space), CostModel(model, space, sequence_length=LENGTH)
    for subnet in [space.max, space.min, space.heuristic, *(space.sample(seed) for seed in range(3))]:
        model.set_subnet(subnet)
        with BatchedProducts() as products, torch.no_grad():
            model(**inputs)
        assert (costs.macs(subnet) - without.macs(subnet)) * LENGTH == products.macs
        assert costs.parameters(subnet) == without.parameters(subnet) and costs.bytes(subnet) == without.bytes(subnet)
    assert costs.macs(space.max) > without.macs(space.max)


@pytest.mark.parametrize("model_class", [BertModel, BertForSequenceClassification])
def test_bert_base_costs_what_is_published(model_class):
    with torch.device("meta"):
        model = model_class(BertConfig())
    macs = 128 * CostModel(model, FIXED, sequence_length=128).macs(FIXED.max)
    assert macs == pytest.approx(11.2e9, rel=0.01)
    # the linear layers alone are 2.7% less
    assert macs - 128 * CostModel(model, FIXED).macs(FIXED.max) == 12 * 2 * 128 * 128 * 768


def test_attentions_that_are_fixed_count_too():
    model = tiny_llama()
    fixed, none = (CostModel(model, FIXED, sequence_length=length).macs(FIXED.max) for length in (7, None))
    assert fixed - none == 2 * 2 * 7 * 32


@pytest.mark.parametrize("length", [0, -1, 1.5, True, "128"])
def test_a_sequence_length_is_a_whole_number(length):
    with pytest.raises(ValueError, match="`sequence_length` must be a whole number >= 1, or None, got"):
        CostModel(tiny_llama(), FIXED, sequence_length=length)
