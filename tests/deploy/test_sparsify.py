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
"""`sparsify_linears`: what is swapped and what is not, and that the model computes the same."""

import copy
import json
import os
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import fresh
from support.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_elastic import ElasticLoraConfig, SparseLinear, SwapReport, densify_linears, sparsify_linears
from peft_elastic.cost import timing
from peft_elastic.layers import extension


if not extension.is_built():
    pytest.skip("the C++ extension is not built", allow_module_level=True)


@pytest.fixture(autouse=True)
def own_timings(tmp_path, monkeypatch):
    """Measurements of this test alone."""
    file = tmp_path / "timings" / "kernel_timings.json"
    monkeypatch.setattr(timing, "timings_file", lambda: file)
    monkeypatch.setattr(timing, "_known", None)
    return file


def zero_out(model, share=0.5):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                module.weight *= torch.rand_like(module.weight) >= share
    return model


def sparse_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def linears(model):
    return {name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)}


def ids(length=6):
    return torch.arange(1, 1 + length)[None]


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_swaps_all_but_the_output_embedding(dtype):
    model = zero_out(tiny_llama())
    expected = linears(model) - {"lm_head"}
    reference = copy.deepcopy(model)
    report = sparsify_linears(model, dtype, when="always")
    assert isinstance(report, SwapReport) and set(report.swapped) == sparse_layers(model) == expected
    for name in expected:
        layer = model.get_submodule(name)
        assert layer.value_dtype == dtype and not layer.training
        # the same model with the rounded weights, dense
        reference.set_submodule(name, layer.to_linear())
    torch.testing.assert_close(model(ids()).logits, reference(ids()).logits, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(
            model.generate(ids(), max_new_tokens=8, do_sample=False),
            reference.generate(ids(), max_new_tokens=8, do_sample=False),
        )


def test_densify_undoes_it():
    model = zero_out(tiny_llama())
    names = linears(model)
    sparsify_linears(model, when="always")
    expected = model(ids()).logits
    assert densify_linears(model) is model
    assert linears(model) == names and not sparse_layers(model)
    assert not hasattr(model.config, "quantization_config") and getattr(model, "hf_quantizer", None) is None
    torch.testing.assert_close(model(ids()).logits, expected, atol=2e-5, rtol=1e-5)
    assert densify_linears(nn.Linear(2, 2)) is not None  # nothing to do


def test_dequantize_of_transformers():
    model = zero_out(tiny_llama())
    sparsify_linears(model, when="always")
    expected = model(ids()).logits
    model.dequantize()
    assert not sparse_layers(model)
    torch.testing.assert_close(model(ids()).logits, expected, atol=2e-5, rtol=1e-5)


def test_min_sparsity_skip_and_lm_head():
    model = zero_out(tiny_llama(tie_word_embeddings=False))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.normal_()
    report = sparsify_linears(
        model, when="always", skip=["q_proj", "model.layers.1.mlp.down_proj"], lm_head=True, min_sparsity=0.4
    )
    reasons = {decision.name: decision.reason for decision in report.decisions if not decision.swapped}
    assert reasons == {
        "model.layers.0.mlp.up_proj": "fewer than 40% zeros",
        "model.layers.1.mlp.down_proj": "in `skip`",
        **{f"model.layers.{i}.self_attn.q_proj": "in `skip`" for i in range(len(model.model.layers))},
    }
    assert "lm_head" in report.swapped
    table = str(report)
    assert "model.layers.*.self_attn.q_proj" in table and "no: fewer than 40% zeros" in table


def test_tied_weights_stay_tied():
    model = zero_out(tiny_llama(tie_word_embeddings=True))
    report = sparsify_linears(model, when="always", lm_head=True)
    reasons = {decision.name: decision.reason for decision in report.decisions}
    assert reasons["lm_head"] == "its weight is also model.embed_tokens.weight"
    assert model.lm_head.weight is model.model.embed_tokens.weight

    shared = nn.Linear(32, 32)
    with torch.no_grad():
        shared.weight *= torch.rand_like(shared.weight) < 0.5
    twice = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(32, 32)})
    twice["c"].weight = shared.weight
    report = sparsify_linears(twice, when="always")
    assert not report.swapped and twice["a"] is twice["b"] and twice["c"].weight is shared.weight


def test_other_architectures():
    gpt2 = zero_out(tiny_gpt2())
    before = gpt2(ids()).logits
    assert len(sparsify_linears(gpt2, when="always").swapped) == 8  # Conv1D
    torch.testing.assert_close(gpt2(ids()).logits, before, atol=2e-2, rtol=2e-2)

    bert = zero_out(tiny_bert())
    before = bert(ids()).logits
    assert len(sparsify_linears(bert, when="always").swapped) == 14
    torch.testing.assert_close(bert(ids()).logits, before, atol=2e-2, rtol=2e-2)

    t5 = zero_out(tiny_t5())
    before = t5(input_ids=ids(), decoder_input_ids=ids()).logits
    report = sparsify_linears(t5, when="always")
    assert {d.reason for d in report.decisions if d.name.endswith(".wo")} == {"the model keeps it in float32"}
    assert report.swapped
    torch.testing.assert_close(t5(input_ids=ids(), decoder_input_ids=ids()).logits, before, atol=5e-2, rtol=5e-2)


def test_measures_and_swaps_what_is_faster(monkeypatch):
    model = zero_out(tiny_llama())
    asked = []

    def measure(out_features, in_features, sparsity, value_dtype, linear_dtype):
        asked.append((out_features, in_features, value_dtype, linear_dtype))
        assert 0.3 < sparsity < 0.7
        return timing.Timing(2e-6, 1e-6) if out_features > in_features else timing.Timing(1.04e-6, 1e-6)

    monkeypatch.setattr(timing, "measure", measure)
    report = sparsify_linears(model)
    assert {name.rpartition(".")[2] for name in report.swapped} == {"gate_proj", "up_proj"}
    assert all(dtype == torch.float32 and value == "bf16" for _, _, value, dtype in asked)
    reasons = {decision.name.rpartition(".")[2]: decision.reason for decision in report.decisions}
    assert reasons["gate_proj"] == "2.00 times as fast as dense"
    assert reasons["down_proj"] == "1.04 times as fast as dense"  # within the noise


def test_a_measurement_is_made_once_and_kept(own_timings, monkeypatch):
    made = []
    time = timing._time
    monkeypatch.setattr(timing, "_time", lambda *args: made.append(args) or time(*args))
    monkeypatch.setattr(timing, "_SECONDS", 0.01)
    monkeypatch.setattr(timing, "_MAX_COPIES_BYTES", 2**20)
    first = timing.measure(96, 64, 0.51, "bf16", torch.float32)
    assert first.dense > 0 and first.sparse > 0
    assert timing.measure(96, 64, 0.49, "bf16", torch.float32) == first  # both are 50%
    assert len(made) == 1
    entries = json.loads(own_timings.read_text())
    assert list(entries.values()) == [list(first)]
    monkeypatch.setattr(timing, "_known", None)  # as in a new process
    assert timing.measure(96, 64, 0.5, "bf16", torch.float32) == first and len(made) == 1
    for other in [(64, 96, 0.5, "bf16", torch.float32), (96, 64, 0.7, "bf16", torch.float32)]:
        timing.measure(*other)
    timing.measure(96, 64, 0.5, "int8", torch.float32)
    timing.measure(96, 64, 0.5, "bf16", torch.bfloat16)
    level = extension.selected_level()
    try:
        extension.select_level("portable")
        timing.measure(96, 64, 0.5, "bf16", torch.float32)
    finally:
        extension.select_level(level)
    assert len(made) == 6 and len(json.loads(own_timings.read_text())) == 6


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": ["x", 1]}', '{"a": [0, 1]}'])
def test_a_damaged_file_of_measurements_is_measured_again(own_timings, content, monkeypatch):
    monkeypatch.setattr(timing, "_time", lambda *args: timing.Timing(2.0, 1.0))
    own_timings.parent.mkdir(parents=True)
    own_timings.write_text(content)
    assert timing.measure(96, 64, 0.5, "bf16", torch.float32) == (2.0, 1.0)
    assert list(json.loads(own_timings.read_text()).values()) == [[2.0, 1.0]]


def test_refusals_change_nothing():
    model = zero_out(tiny_llama())
    before = linears(model)
    for arguments, match in [
        ({"dtype": "int4"}, "`dtype` must be 'bf16' or 'int8', got 'int4'"),
        ({"when": "sometimes"}, "`when` must be 'faster' or 'always', got 'sometimes'"),
        ({"min_sparsity": 1.5}, "`min_sparsity` must be .*, got 1.5"),
        ({"skip": "q_proj"}, "`skip` must be a list of strings, got"),
        ({"skip": ["no_such_layer"]}, "`skip`: 'no_such_layer'"),
    ]:
        with pytest.raises(ValueError, match=match):
            sparsify_linears(model, **arguments)
    assert linears(model) == before and not hasattr(model.config, "quantization_config")
    with pytest.raises(ValueError, match="has adapters: merge them"):
        sparsify_linears(get_peft_model(model, LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(ValueError, match="not on the CPU"):
        sparsify_linears(nn.Linear(2, 2, device="meta"))


def test_weights_that_are_not_finite_stay_dense():
    model = zero_out(tiny_llama())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    report = sparsify_linears(model, when="always")
    (left,) = [d for d in report.decisions if not d.swapped and d.name != "lm_head"]
    assert (left.name, left.reason) == ("model.layers.0.mlp.up_proj", "with infinite or NaN weights")


def merged(sparse_kernel, targets=("q_proj",), **arguments):
    torch.manual_seed(0)
    model = zero_out(tiny_llama())
    config = ElasticLoraConfig(r=4, elastic_ranks=[4, 2], target_modules=list(targets), init_lora_weights=False)
    model = get_peft_model(model, config).eval()
    expected = model(ids()).logits
    return model.merge_and_unload(sparse_kernel=sparse_kernel, **arguments), expected


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_merge_and_unload_with_the_kernel(dtype):
    model, expected = merged(True, sparse_dtype=dtype)
    names = {name.rpartition(".")[2] for name in sparse_layers(model)}
    assert names == {"k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # q_proj is dense now
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert (model(ids()).logits - expected).abs().max() < (0.02 if dtype == "bf16" else 0.1)
    torch.manual_seed(0)
    plain, _ = merged(False)
    assert not sparse_layers(plain) and not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(plain(ids()).logits, expected, atol=1e-5, rtol=1e-4)


def test_merge_and_unload_measures_by_default(monkeypatch):
    monkeypatch.setattr(timing, "measure", lambda *args: timing.Timing(1.0, 3.0))
    model, _ = merged("auto")
    assert not sparse_layers(model)
    monkeypatch.setattr(timing, "measure", lambda *args: timing.Timing(3.0, 1.0))
    model, _ = merged("auto")
    assert sparse_layers(model)


def test_merge_and_unload_refuses_before_it_merges(monkeypatch):
    model = get_peft_model(
        zero_out(tiny_llama()), ElasticLoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="`sparse_kernel` must be 'auto', True or False, got 'yes'"):
        model.merge_and_unload(sparse_kernel="yes")
    with pytest.raises(ValueError, match="`sparse_dtype` must be .*, got 'int4'"):
        model.merge_and_unload(sparse_dtype="int4")
    monkeypatch.setattr("peft_elastic.layers.ops._C", None)
    with pytest.raises(ValueError, match="`sparse_kernel=True` cannot work on this model: the C\\+\\+ extension"):
        model.merge_and_unload(sparse_kernel=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.merge_and_unload()  # without the extension the default merges and swaps nothing


def test_the_environment_chooses_the_level():
    script = "import torch, peft_elastic as p; m = torch.nn.Linear(64, 64); m.weight.data[:, ::2] = 0\n"
    script += "print(p.sparsify_linears(torch.nn.Sequential(m), when='always').level)"
    run = fresh.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PEFT_ELASTIC_ISA": "portable"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["portable"]
