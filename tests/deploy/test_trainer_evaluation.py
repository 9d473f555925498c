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
"""transformers' Trainer evaluates a model with sparse layers, made here or loaded, as it evaluates the dense one."""

import pytest
import torch
from support.models import tiny_llama
from support.training import arguments, dataset
from transformers import AutoModelForCausalLM, Trainer

from peft_elastic import MagnitudeConfig, SparseLinear, SparseQALoraConfig, prune, sparsify_linears
from peft_elastic.layers import ops


pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not ops.is_available(), reason="needs the C++ extension"),
]


def pruned():
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    prune(model, MagnitudeConfig(sparsity=0.5), progress=False)
    return model


def sparse(how, folder):
    model = pruned()
    if how == "merged":
        from peft import get_peft_model

        config = SparseQALoraConfig(r=4, target_modules=["up_proj"], task_type="CAUSAL_LM")
        return get_peft_model(model, config).merge_and_unload(sparse_kernel=True)
    sparsify_linears(model, "int8" if how == "int8" else "bf16", when="always")
    if how == "loaded":
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
    return model


@pytest.mark.parametrize("how", ["made", "int8", "loaded", "merged"])
def test_trainer_evaluates_sparse_models(tmp_path, how):
    model = sparse(how, tmp_path / "model")
    assert isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)
    results = []
    for tested in (model, pruned()):
        trainer = Trainer(model=tested, args=arguments(tmp_path), eval_dataset=dataset(8))
        predictions = trainer.predict(dataset(4)).predictions
        results.append((trainer.evaluate()["eval_loss"], torch.from_numpy(predictions)))
    assert results[0][0] == pytest.approx(results[1][0], rel=0.02)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.1, atol=0.1)
