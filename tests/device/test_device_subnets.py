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
"""Adapters that are trained on the device: search, merge, extraction, export, and the way to the CPU and back."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import sparse_qa
from support.devices import is_on, moved, reference
from support.models import outputs, randomize, tiny_gpt2, tiny_llama, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from peft_elastic import (
    ElasticLoraConfig,
    LatencyModel,
    QuantizedLinear,
    SparseLinear,
    SparseQALoraConfig,
    densify_linears,
    optimize_generation,
    restore_generation,
    save_gptq,
    search_subnet,
    sparsify_linears,
)
from peft_elastic.layers import extension
from peft_elastic.search import LossEvaluator, MultipleChoiceEvaluator, PerplexityEvaluator


CPU = torch.device("cpu")
EXTENSION = pytest.mark.skipif(not extension.is_built(), reason="needs the C++ extension")
RANKS = {
    "r": 6,
    "lora_alpha": 12,
    "elastic_ranks": [6, 3, 1],
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}
STRUCTURE = {"elastic_width": {"heads": [1.0, 0.5], "mlp": [1.0, 0.5]}, "elastic_depth": "0", "importance": "none"}
ROUNDING = {"quantization_aware": True, "bits": 4, "group_size": 16}
KINDS = {
    "ranks": (ElasticLoraConfig, {}),
    "structure": (ElasticLoraConfig, STRUCTURE),
    "sparse": (SparseQALoraConfig, {}),
    "rounded": (SparseQALoraConfig, ROUNDING),
}


# `make test` takes one of the kinds, `make test-gpu` all
def some(*quick):
    return [pytest.param(kind, marks=[] if kind in quick else pytest.mark.slow) for kind in KINDS]


INPUTS = {"input_ids": tokens(3, 9), "attention_mask": torch.tensor([[1] * 9, [1] * 9, [1] * 6 + [0] * 3])}


def make(kind, place=CPU, base=tiny_llama, **settings):
    config_cls, own = KINDS[kind]
    number = {"n_layer": 2} if base is tiny_gpt2 else {"num_hidden_layers": 2}
    model = sparse_qa.pruned(base(**number)).to(place)
    model = get_peft_model(model, config_cls(**{**RANKS, **own, **settings})).eval()
    randomize(model, std=0.1)
    return model


def close(found, wanted, tolerance=2e-4):
    torch.testing.assert_close(
        found.cpu().double(), wanted.cpu().double(), rtol=0, atol=tolerance * float(wanted.abs().max())
    )


def on(device, model):
    return outputs(model, moved(INPUTS, device))


# -- search ------------------------------------------------------------------------------------------------------------

WORDS = [f"w{i}" for i in range(90)]


def tokenizer():
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<pad>", "<s>", "</s>", *WORDS])}, unk_token="<pad>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def examples(count=12):
    rng = np.random.default_rng(0)

    def text(words):
        return " ".join(rng.choice(WORDS, words))

    return [
        {"prompt": text(3 + i % 3), "choices": [f" {text(1 + j % 2)}" for j in range(3)], "label": i % 3}
        for i in range(count)
    ]


@pytest.mark.parametrize("kind", some("structure"))
def test_search(kind, device):
    """The same search as on the CPU: what the subnets are, what they cost, and what they are worth."""
    data = [{"input_ids": tokens(4, 11, seed=s), "labels": tokens(4, 11, seed=s)} for s in range(2)]
    results = []
    for place in (CPU, device):
        model = make(kind).to(place)
        evaluate = PerplexityEvaluator(data)
        before = model.active_subnet
        result = search_subnet(
            model, evaluate, ("perplexity", "macs"), n_evals=12, population=4, seed=3, progress=False
        )
        assert model.active_subnet == before and is_on(place, model)
        results.append(result)
    wanted, found = results
    # the algorithm sees values that differ in the last bits, so it may go other ways; in each it must be right
    assert [e.subnet for e in found.history[:4]] == [e.subnet for e in wanted.history[:4]]
    known = {e.subnet: e for e in wanted.history}
    common = [e for e in found.history if e.subnet in known]
    assert len(found.history) == 12 and len(common) >= 4
    for each in common:
        assert each.metrics["perplexity"] == pytest.approx(known[each.subnet].metrics["perplexity"], rel=1e-3)
        assert each.metrics["macs"] == known[each.subnet].metrics["macs"]


@pytest.mark.parametrize("base", [tiny_llama, pytest.param(tiny_gpt2, marks=pytest.mark.slow)])
def test_evaluators(base, device):
    model = make("ranks", base=base)
    wanted = reference(model)
    model.to(device)
    choices = MultipleChoiceEvaluator(examples(), tokenizer(), batch_size=5)
    found, right = choices.scores(model), choices.scores(wanted)
    for a, b in zip(found, right):
        assert a == pytest.approx(b, abs=1e-3)
    labels = tokens(4, 11)
    labels[:, :3] = -100
    data = [{"input_ids": tokens(4, 11), "labels": labels}]
    assert LossEvaluator(data)(model) == pytest.approx(LossEvaluator(data)(wanted), rel=1e-4)
    assert LossEvaluator([moved(data[0], device)])(model) == pytest.approx(LossEvaluator(data)(wanted), rel=1e-4)


# -- merge, extraction, export ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [tiny_llama, pytest.param(tiny_gpt2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", some("structure", "rounded"))
def test_merge_and_extract(kind, base, device, tmp_path):
    model = make(kind, device, base)
    for number, subnet in enumerate([model.search_space.max, model.search_space.sample(1), model.search_space.min]):
        one = copy.deepcopy(model)
        one.set_subnet(subnet)
        before = on(device, one)
        extracted = one.extract_subnet(subnet)
        merged = one.merge_and_unload(sparse_kernel="auto" if number else False)
        for each in (extracted, merged):
            assert is_on(device, each)
            close(on(device, each), before)
        if any(isinstance(module, QuantizedLinear) for module in merged.modules()):
            save_gptq(merged, tmp_path / str(number))
            merged = merged.dequantize()
            close(on(device, merged), before)
        merged.save_pretrained(tmp_path / f"merged-{number}")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"merged-{number}")
        assert is_on(CPU, loaded)
        close(on(CPU, loaded), before)


@pytest.mark.parametrize("kind", some("rounded"))
def test_merge_in_place_and_back(kind, device):
    """Merged on the device, carried elsewhere and back in between; unmerged it is what it was, to the last bit."""
    model = make(kind, device)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    wanted = on(device, model)
    model.merge_adapter()
    close(on(device, model), wanted)
    model.to("cpu")
    close(on(CPU, model), wanted)
    model.to(device)
    model.unmerge_adapter()
    close(on(device, model), wanted)
    for name, weight in model.state_dict().items():
        if kind in ("sparse", "rounded"):
            assert torch.equal(weight, before[name]), name
        else:  # peft subtracts the update
            torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-5)


@EXTENSION
def test_sparse_layers_are_for_the_cpu(device, tmp_path):
    """Demanded of a model on another device they are refused, and nothing is changed; "auto" leaves them out; on the CPU they come in;
    with them the model stays there."""
    if device.type == "cpu":
        pytest.skip("that is the CPU")
    model = make("sparse", device)
    wanted = on(device, model)
    with pytest.raises(ValueError, match="`sparse_kernel=True` cannot work on this model: it is not on the CPU"):
        model.merge_and_unload(sparse_kernel=True)
    with pytest.raises(ValueError, match="`sparse_kernel=True` cannot work on this model: it is not on the CPU"):
        model.extract_subnet(sparse_kernel=True)
    close(on(device, model), wanted, 1e-6)
    extracted = model.extract_subnet()
    assert not any(isinstance(module, SparseLinear) for module in extracted.modules()) and is_on(device, extracted)
    with pytest.raises(ValueError, match="not on the CPU"):
        sparsify_linears(extracted, progressbar=False)
    model.to("cpu")
    merged = model.merge_and_unload(sparse_kernel=True)
    assert any(isinstance(module, SparseLinear) for module in merged.modules())
    found = on(CPU, merged)
    close(found, wanted, 2e-2)  # values in bfloat16
    with pytest.raises(ValueError, match="SparseLinear runs on the CPU alone"):
        merged.to(device)
    merged.to("cpu")  # what has moved before the first of them comes back
    assert torch.equal(on(CPU, merged), found)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": str(device)})
    assert not any(isinstance(module, SparseLinear) for module in loaded.modules()) and is_on(device, loaded)
    close(on(device, loaded), found, 2e-2)
    close(on(device, densify_linears(merged).to(device)), found, 2e-2)


def test_what_speeds_up_generation_is_for_the_cpu(device):
    """It is no error elsewhere: the same tokens come out, without it. Latencies are measured on the CPU alone."""
    model, ids = tiny_llama().to(device), tokens(2, 5).to(device)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids, **options)
    optimize_generation(model)
    assert torch.equal(model.generate(ids, **options), wanted)
    restore_generation(model)
    assert torch.equal(model.generate(ids, **options), wanted)
    elastic = make("ranks", device)
    if device.type != "cpu":
        with pytest.raises(ValueError, match="`model` must be on the CPU"):
            LatencyModel(elastic, {"input_ids": tokens(1, 4)})


def test_export(device, tmp_path):
    for number, subnet in enumerate(["max", "min"]):
        model = make("ranks", device)
        model.set_subnet(subnet)
        folder = tmp_path / str(number)
        model.export_lora(folder)
        for place in (CPU, device):
            loaded = PeftModel.from_pretrained(
                sparse_qa.pruned(tiny_llama(num_hidden_layers=2)).to(place), folder
            ).eval()
            assert type(loaded.peft_config["default"]) is LoraConfig and is_on(place, loaded)
            close(on(place, loaded), on(device, model))


# -- places -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", some("rounded"))
def test_saved_and_loaded_across_devices(kind, device, tmp_path):
    """An adapter that is saved on one device goes onto a base on another."""
    for number, (there, here) in enumerate([(device, CPU), (CPU, device), (device, device)]):
        model = make(kind, there)
        model.set_subnet(model.search_space.sample(number))
        wanted = on(there, model)
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        base = sparse_qa.pruned(tiny_llama(num_hidden_layers=2)).to(here)
        loaded = PeftModel.from_pretrained(base, folder).eval()
        assert is_on(here, loaded) and loaded.active_subnet == model.active_subnet
        close(on(here, loaded), wanted)


@pytest.mark.parametrize("kind", some("structure"))
def test_moved_at_any_time(kind, device):
    """After the injection, with a subnet active, and back; the subnet stays, and others can be chosen wherever it is."""
    model = make(kind)
    subnets = [model.search_space.sample(i) for i in range(3)] + [model.search_space.max]
    wanted = []
    for subnet in subnets:
        model.set_subnet(subnet)
        wanted.append(on(CPU, model))
    model.set_subnet(subnets[0])
    for place, number in ((device, 0), (device, 1), (CPU, 1), (CPU, 2), (device, 2), (device, 3), (CPU, 3)):
        model.to(place)
        model.set_subnet(subnets[number])
        assert is_on(place, model)
        close(on(place, model), wanted[number])
    model.set_subnet(subnets[1])
    model.to(device)
    assert model.active_subnet == subnets[1]
    close(on(device, model), wanted[1])
    dtypes = copy.deepcopy(model).to("cpu").to(device).half().float()
    close(on(device, dtypes), wanted[1], 2e-2)


@pytest.mark.parametrize("kind", some("rounded"))
def test_state_dicts_across_devices(kind, device):
    model, other = make(kind, device), make(kind)
    randomize(other, seed=1, std=0.1)
    wanted = on(CPU, other)
    model.load_state_dict(other.state_dict())
    assert is_on(device, model)
    close(on(device, model), wanted)
    fresh = make(kind)
    fresh.load_state_dict(model.state_dict())
    assert is_on(CPU, fresh)
    close(on(CPU, fresh), wanted)


def test_several_adapters(device):
    """A second adapter, on a base that is on the device already; a mixed batch; one merged into the other."""
    results = []
    for place in (CPU, device):
        model = make("ranks", place)
        config_cls, own = KINDS["sparse"]
        model.add_adapter("other", ElasticLoraConfig(**{**RANKS, "r": 4, "elastic_ranks": [4, 2]}))
        randomize(model, seed=2, std=0.1, adapter_name="other")
        assert is_on(place, model)
        found = [outputs(model, moved(INPUTS, place), adapter_names=["default", "other", "__base__"])]
        model.add_weighted_adapter(["default", "other"], [0.5, 0.25], "sum", combination_type="cat")
        model.set_adapter("sum")
        found.append(on(place, model))
        results.append([each.cpu() for each in found])
    for a, b in zip(*results):
        close(b, a)


def test_elastic_with_sorted_base(device):
    """Activations are collected where the model is, adapters are sorted along, and what is computed stays."""
    data = [{"input_ids": tokens(4, 12)}]
    config = {**RANKS, **STRUCTURE, "importance": "activation"}
    results = []
    for place in (CPU, device):
        model = get_peft_model(tiny_llama(num_hidden_layers=2).to(place), ElasticLoraConfig(**config)).eval()
        randomize(model, std=0.1)
        before = on(place, model)
        model.sort_by_importance(data, progress=False)
        close(on(place, model), before)
        model.set_subnet("min")
        results.append(on(place, model).cpu())
    close(results[1], results[0])


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bitsandbytes(quant_type, device, tmp_path):
    """Elastic ranks, width and masks on a base that bitsandbytes has packed on the device."""
    pytest.importorskip("bitsandbytes")
    if device.type not in ("cuda", "xpu", "cpu"):
        pytest.skip(f"bitsandbytes has no kernels for {device.type}")
    from transformers import BitsAndBytesConfig

    base = sparse_qa.pruned(tiny_llama(hidden_size=64, intermediate_size=128))
    base.save_pretrained(tmp_path)
    packing = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch.float32
    )
    width = {"elastic_width": {"mlp": [1.0, 0.5]}, "importance": "none"}
    for config in (ElasticLoraConfig(**RANKS), ElasticLoraConfig(**RANKS, **width), SparseQALoraConfig(**RANKS)):
        packed = AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=packing, device_map={"": str(device)}
        )
        model = get_peft_model(packed, config).eval()
        randomize(model, std=0.1)
        # the same with dequantised layers
        plain = get_peft_model(
            AutoModelForCausalLM.from_pretrained(
                tmp_path, quantization_config=packing, device_map={"": str(device)}
            ).dequantize(),
            config,
        ).eval()
        randomize(plain, std=0.1)
        for subnet in (model.search_space.max, model.search_space.min):
            for each in (model, plain):
                each.set_subnet(subnet)
                each.zero_grad()
                each(**moved(INPUTS, device), labels=moved(INPUTS["input_ids"], device)).loss.backward()
            # on processors with AVX512-BF16 bitsandbytes evaluates in that, whatever is asked for
            rough = device.type == "cpu"
            close(on(device, model), on(device, plain), 1e-2 if rough else 1e-3)
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    close(parameter.grad, plain.get_parameter(name).grad, 5e-2 if rough else 1e-2)
