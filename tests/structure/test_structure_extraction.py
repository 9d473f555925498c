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
"""Subnets as models of their own: what they compute, how many parameters they have, and that they load again, here and in fresh
processes."""

import copy
import json
import pickle
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from support import sparse_qa
from support.elastic_models import ALL, SETTINGS, adapted, blocks_of, build, close, elastic, inputs_of
from support.fresh import run_fresh
from support.models import T5S, outputs, randomize, tiny_llama, tiny_llama_classifier, tokens
from transformers import AutoModelForCausalLM

from peft_elastic import SparseQALoraConfig, load_gptq, optimize_generation, quantize, save_gptq, sparsify_linears
from peft_elastic.layers import ops
from peft_elastic.layers.sparse_linear import SparseLinear
from peft_elastic.structure.narrow import is_narrowed


pytestmark = pytest.mark.filterwarnings("ignore")

GENERATE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
needs_kernels = pytest.mark.skipif(not ops.is_available(), reason="no C++ extension")


def flexible(name, **own):
    depth = ["all", "all.attention", "all.mlp"]
    if name in T5S:
        depth = ["encoder.block.1", "decoder.block.1.attention", "decoder.block.0.mlp"]
    return elastic(name, **{"elastic_depth": depth, "elastic_ranks": [5, 2], **own})


def computes(subnet, block):
    """Whether anything of a block is there."""
    if not subnet.get(f"depth:{block}", 1):
        return False
    return any(subnet.get(f"depth:{block}.{part}", 1) for part in ("attention", "mlp"))


def subnets_with_blocks(model, name, count=3):
    """Random ones in which every stack keeps a block."""
    found = []
    for seed in range(100):
        subnet = model.search_space.sample(seed)
        if name in T5S or any(computes(subnet, block) for block in blocks_of(name)):
            found.append(subnet)
        if len(found) == count:
            return found
    raise AssertionError


def whole_tensors(name):
    return sum(parameter.numel() for parameter in build(name).parameters())


# -- the same function, with the promised size -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_extraction(name, tmp_path):
    model, inputs = flexible(name)
    space = model.search_space
    before = {key: (id(module), type(module)) for key, module in model.named_modules()}
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = json.dumps(model.get_base_model().config.to_dict(), default=str)
    for number, subnet in enumerate(subnets_with_blocks(model, name, 2)):
        model.set_subnet(subnet)
        expected = outputs(model, inputs)
        model.set_subnet("max")
        whole = outputs(model, inputs)
        extracted = model.extract_subnet(subnet, sparse_kernel=False)
        close(outputs(extracted, inputs), expected)
        assert type(extracted) is type(build(name)) and not is_narrowed(extracted)
        assert not any("lora" in key for key in extracted.state_dict())
        predicted = whole_tensors(name) - space.count_base_parameters(space.max) + space.count_base_parameters(subnet)
        assert sum(parameter.numel() for parameter in extracted.parameters()) == predicted
        # the super-network is as it was
        assert torch.equal(outputs(model, inputs), whole) and model.active_subnet == space.max
        assert {key: (id(module), type(module)) for key, module in model.named_modules()} == before
        assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
        assert json.dumps(model.get_base_model().config.to_dict(), default=str) == config
        # on disk
        extracted.save_pretrained(tmp_path / str(number))
        loaded = type(extracted).from_pretrained(tmp_path / str(number))
        close(outputs(loaded, inputs), outputs(extracted, inputs), 1e-6)
        assert loaded.state_dict().keys() == extracted.state_dict().keys()
        if extracted.can_generate():
            ids = {"input_ids": tokens(2, 5)}
            model.set_subnet(subnet)
            wanted = model.generate(**ids, **GENERATE)
            assert torch.equal(extracted.generate(**ids, **GENERATE), wanted)
            assert torch.equal(loaded.generate(**ids, **GENERATE), wanted)


def test_merge_and_unload_is_extraction_in_place():
    model, inputs = flexible("llama")
    subnet = subnets_with_blocks(model, "llama")[0]
    model.set_subnet(subnet)
    expected = model.extract_subnet(sparse_kernel=False)
    merged = model.merge_and_unload(sparse_kernel=False)
    assert merged.config.to_dict() == expected.config.to_dict()
    assert torch.equal(outputs(merged, inputs), outputs(expected, inputs))
    assert all(parameter.data_ptr() == parameter.untyped_storage().data_ptr() for parameter in merged.parameters())


def test_extraction_of_a_sampled_and_of_a_named_subnet():
    model, inputs = elastic("llama")
    model.set_subnet("min")
    expected = outputs(model, inputs)
    model.sample_subnet("max")
    close(outputs(model.extract_subnet(sparse_kernel=False), inputs), expected)  # the chosen one
    sampled = outputs(model, inputs)
    close(outputs(model.extract_subnet("max", sparse_kernel=False), inputs), sampled)
    assert torch.equal(outputs(model, inputs), sampled)
    for wrong in ("largest", {"mlp:model.layers.0": 8}, 3):
        with pytest.raises(ValueError, match="`subnet`"):
            model.extract_subnet(wrong)
    model.set_subnet("max")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        model.extract_subnet("min")


# -- what config.json says ---------------------------------------------------------------------------------------------


def test_the_words_of_the_configuration(tmp_path):
    model, inputs = flexible("llama")
    subnet = {
        **model.search_space.max,
        "mlp:model.layers.0": 24,
        "heads:model.layers.1": 2,
        "depth:model.layers.0.attention": 0,
    }
    extracted = model.extract_subnet(subnet, sparse_kernel=False)
    extracted.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert not {"quantization_config", "per_layer_config"} & saved.keys() and saved["num_hidden_layers"] == 2
    assert saved["peft_elastic_blocks"] == {
        "model.layers.0": {"intermediate_size": 24, "skip": ["attention"]},
        "model.layers.1": {"intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1},
    }
    model, _ = elastic("llama")
    uniform = model.extract_subnet("min", sparse_kernel=False)
    uniform.save_pretrained(tmp_path / "uniform")
    saved = json.loads((tmp_path / "uniform" / "config.json").read_text())
    assert not {"peft_elastic_blocks", "per_layer_config", "quantization_config"} & saved.keys()
    assert (saved["num_attention_heads"], saved["num_key_value_heads"], saved["intermediate_size"]) == (2, 1, 8)
    assert saved["head_dim"] == 8 and saved["hidden_size"] == 32


def test_encoder_decoders(tmp_path):
    model, inputs = flexible("t5")
    subnet = {**model.search_space.max, "mlp:encoder.block.1": 24, "depth:decoder.block.1.attention": 0}
    extracted = model.extract_subnet(subnet, sparse_kernel=False)
    extracted.save_pretrained(tmp_path)
    blocks = json.loads((tmp_path / "config.json").read_text())["peft_elastic_blocks"]
    assert blocks["encoder.block.1"]["d_ff"] == 24 and blocks["decoder.block.1"]["skip"] == ["attention"]
    close(outputs(type(extracted).from_pretrained(tmp_path), inputs), outputs(extracted, inputs), 1e-6)


def written_before(folder):
    """Let a checkpoint say what it says as earlier versions did."""
    saved = json.loads((folder / "config.json").read_text())
    blocks = saved.pop("peft_elastic_blocks")
    saved["per_layer_config"] = {path.rpartition(".")[2]: sizes for path, sizes in blocks.items()}
    saved["allow_global_per_layer_attribute_access"] = True
    saved.setdefault("quantization_config", {"quant_method": "peft_elastic", "version": 1, "layers": {}})
    (folder / "config.json").write_text(json.dumps(saved))


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_checkpoints_of_earlier_versions(tmp_path, name):
    model, inputs = flexible(name)
    first, second = (path for path in list(blocks_of(name))[:2])
    subnet = {**model.search_space.max, f"mlp:{first}": 24, f"heads:{second}": 2, f"depth:{first}.attention": 0}
    extracted = model.extract_subnet(subnet, sparse_kernel=False)
    for number in range(2):
        folder = tmp_path / str(number)
        extracted.save_pretrained(folder)
        if number == 0:
            written_before(folder)
        loaded = type(extracted).from_pretrained(folder)
        close(outputs(loaded, inputs), outputs(extracted, inputs), 1e-6)
        assert not getattr(loaded, "is_quantized", False) and not hasattr(loaded.config, "quantization_config")
        assert loaded.config.peft_elastic_blocks and "per_layer_config" not in loaded.config.to_dict()
        extracted = loaded  # and what is saved next is of this version


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model.layers.0": {"intermediate_size": 64}},
            "mlp of 'model.layers.0' must be a multiple of 1 up to 48, got 64",
        ),
        ({"model.layers.0": {"intermediate_size": 0}}, "mlp of 'model.layers.0' must be .*, got 0"),
        ({"model.layers.0": {"intermediate_size": "24"}}, "mlp of 'model.layers.0' must be .*, got '24'"),
        ({"model.layers.0": {"intermediate_size": True}}, "mlp of 'model.layers.0' must be .*, got True"),
        (
            {"model.layers.1": {"num_attention_heads": 3}},
            "heads of 'model.layers.1' must be a multiple of 2 up to 4, got 3",
        ),
        ({"model.layers.1": {"skip": ["norm"]}}, "says to skip 'norm' of 'model.layers.1', which cannot be skipped"),
        ({"model.layers.1": {"skip": "attention"}}, "describes 'model.layers.1' wrongly"),
        ({"model.layers.1": 3}, "describes 'model.layers.1' wrongly: 3"),
        ({"model.layers.5": {"intermediate_size": 24}}, "'model.layers.5', which is no block of the model"),
    ],
    ids=str,
)
def test_damaged_configurations(tmp_path, change, message):
    model, _ = elastic("llama")
    subnet = {**model.search_space.max, "mlp:model.layers.0": 24}
    model.extract_subnet(subnet, sparse_kernel=False).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for path, sizes in change.items():
        there = saved["peft_elastic_blocks"].setdefault(path, {})
        saved["peft_elastic_blocks"][path] = {**there, **sizes} if isinstance(sizes, dict) else sizes
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# -- fresh processes ---------------------------------------------------------------------------------------------------


FRESH = """
import sys, torch
from support.models import tokens
from support.elastic_models import inputs_of
import transformers
results = {}
for folder in sys.argv[2:]:
    kind, name = folder.rsplit("/", 1)[1].split("-")[:2]
    model = getattr(transformers, kind).from_pretrained(folder)
    with torch.no_grad():
        result = model(**inputs_of(name))
    results[folder] = result.logits if hasattr(result, "logits") else result.last_hidden_state
    if kind == "AutoModelForCausalLM":
        results[folder, "ids"] = model.generate(input_ids=tokens(2, 5), max_new_tokens=8, min_new_tokens=8, do_sample=False)
torch.save(results, sys.argv[1])
"""


def save(extracted, folder, inputs, **options):
    extracted.save_pretrained(folder, **options)
    kind = folder.name.split("-")[0]
    model = extracted if kind != "AutoModel" else extracted.base_model
    with torch.no_grad():
        result = model(**inputs)
        wanted = {str(folder): result.logits if hasattr(result, "logits") else result.last_hidden_state}
        if kind == "AutoModelForCausalLM":
            wanted[str(folder), "ids"] = extracted.generate(input_ids=tokens(2, 5), **GENERATE)
    return wanted


def test_in_a_fresh_process(tmp_path):
    expected = {}
    for name in ("llama", "phi3", "gpt2", "gemma3"):
        model, inputs = flexible(name)
        for number, subnet in enumerate(subnets_with_blocks(model, name, 2)):
            extracted = model.extract_subnet(subnet, sparse_kernel=False)
            expected |= save(extracted, tmp_path / f"AutoModelForCausalLM-{name}-{number}", inputs)
            expected |= save(extracted, tmp_path / f"AutoModel-{name}-{number}", inputs)
        shards = save(extracted, tmp_path / f"AutoModelForCausalLM-{name}-shards", inputs, max_shard_size="4KB")
        assert len(list((tmp_path / f"AutoModelForCausalLM-{name}-shards").glob("*.safetensors"))) > 1
        expected |= shards
        half = copy.deepcopy(extracted).bfloat16()
        expected |= save(half, tmp_path / f"AutoModelForCausalLM-{name}-bf16", inputs)
    model = adapted(tiny_llama_classifier(), elastic_depth="all.mlp", task_type="SEQ_CLS")
    model.set_subnet(model.search_space.sample(1))
    merged = model.merge_and_unload(sparse_kernel=False)
    expected |= save(merged, tmp_path / "AutoModelForSequenceClassification-llama-0", inputs_of("llama"))
    run = run_fresh(
        "import peft_elastic\n" + FRESH, tmp_path / "results.pt", *[key for key in expected if isinstance(key, str)]
    )
    assert run.returncode == 0, run.stderr
    results = torch.load(tmp_path / "results.pt")
    assert results.keys() == expected.keys()
    for key, wanted in expected.items():
        assert results[key].dtype == wanted.dtype
        close(results[key], wanted, 4e-2 if wanted.dtype == torch.bfloat16 else 1e-6)


def test_uniform_subnets_need_no_import(tmp_path):
    expected = {}
    for name in ("llama", "qwen3", "phi3", "gemma3", "mistral", "opt", "gpt_neox", "gpt2"):
        model, inputs = elastic(name, elastic_width={"mlp": [1.0, 0.5]}, elastic_depth=[1])
        if name not in ("opt", "gpt_neox", "gpt2"):
            model, inputs = elastic(name, elastic_depth=[1])
        extracted = model.extract_subnet("min", sparse_kernel=False)
        expected |= save(extracted, tmp_path / f"AutoModelForCausalLM-{name}", inputs)
        saved = json.loads((tmp_path / f"AutoModelForCausalLM-{name}" / "config.json").read_text())
        assert not {"quantization_config", "per_layer_config", "peft_elastic_blocks"} & saved.keys()
    for name, kind in (("bert", "AutoModelForSequenceClassification"), ("vit", "AutoModelForImageClassification")):
        model, inputs = elastic(name, elastic_width={"mlp": [1.0, 0.5]}, elastic_depth=[0])
        expected |= save(model.extract_subnet("min", sparse_kernel=False), tmp_path / f"{kind}-{name}", inputs)
    forbidden = "import sys\nsys.modules['peft_elastic'] = None\n"
    script = forbidden + FRESH.replace(
        "from support.elastic_models import inputs_of",
        "from support.models import BLOCKS\ninputs_of = lambda n: BLOCKS[n].inputs()",
    )
    run = run_fresh(script, tmp_path / "results.pt", *[key for key in expected if isinstance(key, str)])
    assert run.returncode == 0, run.stderr
    results = torch.load(tmp_path / "results.pt")
    for key, wanted in expected.items():
        close(results[key], wanted, 1e-6)


NO_IMPORT = """
import os, sys
os.environ["TRANSFORMERS_VERBOSITY"] = "warning"
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        print("LOADED", folder, file=sys.stderr)
    except RuntimeError as error:
        print("FAILED", error, file=sys.stderr)
assert "peft_elastic" not in sys.modules
"""


def test_without_the_import_loading_fails(tmp_path):
    """Where parts were removed, too: transformers would make up their weights with no more than a warning."""
    model, _ = flexible("llama")
    changes = {"mlp:model.layers.0": 24}, {"depth:model.layers.1.mlp": 0}, {"heads:model.layers.0": 2}
    for number, change in enumerate(changes):
        subnet = {**model.search_space.max, **change}
        model.extract_subnet(subnet, sparse_kernel=False).save_pretrained(tmp_path / str(number))
    run = run_fresh(NO_IMPORT, *(tmp_path / str(number) for number in range(len(changes))))
    assert run.returncode == 0, run.stderr
    assert "LOADED" not in run.stderr and run.stderr.count("FAILED You set `ignore_mismatched_sizes`") == len(changes)


# -- extracted models are models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gemma3", "bert", "t5"])
def test_elastic_once_more(name, tmp_path):
    model, inputs = flexible(name)
    # the last block stays, narrowed
    subnet = {
        k: model.search_space.max[k] if ".1" in k and "depth" in k else v
        for k, v in model.search_space.sample(2).items()
    }
    subnet |= {key: 24 for key in subnet if key.startswith("mlp") and ".1" in key}
    first = model.extract_subnet(subnet, sparse_kernel=False)
    expected = outputs(first, inputs)
    for source in ("memory", "disk"):
        if source == "disk":
            first = model.extract_subnet(subnet, sparse_kernel=False)
            first.save_pretrained(tmp_path / "first")
            first = type(first).from_pretrained(tmp_path / "first")
        again = adapted(first, elastic_depth="all.mlp", elastic_width={"heads": [1.0, 0.5], "mlp": [1.0, 0.5]})
        again.set_subnet("min")
        again.set_subnet("max")
        with again.disable_adapter():
            close(outputs(again, inputs), expected)
        for seed in range(3):
            smaller = again.search_space.sample(seed)
            again.set_subnet(smaller)
            wanted = outputs(again, inputs)
            second = again.extract_subnet(sparse_kernel=False)
            close(outputs(second, inputs), wanted)
            folder = tmp_path / f"{source}-{seed}"
            second.save_pretrained(folder)
            close(outputs(type(second).from_pretrained(folder), inputs), wanted)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_training_copies_and_pickles(name):
    model, inputs = flexible(name)
    extracted = model.extract_subnet(subnets_with_blocks(model, name)[1], sparse_kernel=False)
    expected = outputs(extracted, inputs)
    for twin in (copy.deepcopy(extracted), pickle.loads(pickle.dumps(extracted))):
        assert torch.equal(outputs(twin, inputs), expected)
    extracted.requires_grad_(True)
    optimizer = torch.optim.SGD(extracted.parameters(), lr=0.05)
    losses = []
    for _ in range(4):
        loss = extracted(**inputs, labels=inputs["input_ids"]).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] and (outputs(extracted, inputs) - expected).abs().max() > 1e-3


def test_compile():
    model, _ = flexible("llama")
    inputs = {"input_ids": tokens(), "use_cache": False}  # torch 2.7 cannot follow how transformers makes a cache
    subnet = {
        **model.search_space.max,
        "mlp:model.layers.0": 24,
        "heads:model.layers.1": 2,
        "depth:model.layers.1.mlp": 0,
    }
    extracted = model.extract_subnet(subnet, sparse_kernel=False)
    compiled = torch.compile(extracted, backend="aot_eager", fullgraph=True)
    close(outputs(compiled, inputs), outputs(extracted, inputs))
    # and the narrowed super-network, whose attributes are those of classes made for it
    model.set_subnet(subnet)
    expected = outputs(model, inputs)
    compiled = torch.compile(model, backend="aot_eager")
    close(outputs(compiled, inputs), expected)
    model.set_subnet("max")
    expected = outputs(model, inputs)
    close(outputs(compiled, inputs), expected)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_tied_weights_stay_tied(name, tmp_path):
    model = adapted(
        build(name, tie_word_embeddings=True), elastic_depth=["1.mlp"] if name == "llama" else "encoder.block.1"
    )
    inputs = inputs_of(name)
    model.set_subnet({**model.search_space.min})
    expected = outputs(model, inputs)
    extracted = model.merge_and_unload(sparse_kernel=False)
    assert extracted.lm_head.weight is extracted.get_input_embeddings().weight
    extracted.save_pretrained(tmp_path)
    loaded = type(extracted).from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    close(outputs(loaded, inputs), expected)


# -- sparse kernels, int4, GPTQ ----------------------------------------------------------------------------------------


KERNEL_FRESH = """
import sys, torch
import peft_elastic
from support.models import tokens
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.save((model(tokens()).logits, [type(m).__name__ for m in model.modules()]), folder + "/results.pt")
"""


def reload_fresh(*folders):
    run = run_fresh(KERNEL_FRESH, *folders)
    assert run.returncode == 0, run.stderr
    return [torch.load(folder / "results.pt") for folder in folders]


def pruned_llama():
    return sparse_qa.pruned(tiny_llama(hidden_size=64, intermediate_size=96, head_dim=16))


SUBNET = {"mlp:model.layers.0": 48, "heads:model.layers.1": 2, "depth:model.layers.0.attention": 0}


@needs_kernels
def test_sparse_kernels(tmp_path):
    config = SparseQALoraConfig(**{**SETTINGS, "elastic_depth": "all.attention"})
    model = get_peft_model(pruned_llama(), config).eval()
    randomize(model)
    model.set_subnet({**model.search_space.max, **SUBNET})
    expected = outputs(model, {"input_ids": tokens()})
    extracted = model.merge_and_unload(sparse_kernel=True)
    found = outputs(extracted, {"input_ids": tokens()})
    assert sum(isinstance(module, SparseLinear) for module in extracted.modules()) == 10
    assert ((found - expected).norm() / expected.norm()) < 0.02  # bfloat16
    extracted.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert len(saved["quantization_config"]["layers"]) == 10
    assert saved["peft_elastic_blocks"]["model.layers.0"]["skip"] == ["attention"]
    ((logits, names),) = reload_fresh(tmp_path)
    assert torch.equal(logits, found) and names.count("SparseLinear") == 10 and names.count("Removed") == 1


@needs_kernels
@pytest.mark.parametrize("base", ["float", "quantised"])
def test_int4(tmp_path, base):
    model = pruned_llama()
    settings = {**SETTINGS, "elastic_depth": "all.attention", "quantization_aware": True}
    if base == "quantised":
        from peft_elastic import RTNConfig

        quantize(model, RTNConfig(bits=4, group_size=16))
    else:
        settings |= {"bits": 4, "group_size": 16}
    model = get_peft_model(model, SparseQALoraConfig(**settings)).eval()
    randomize(model)
    model.set_subnet({**model.search_space.max, **SUBNET})
    expected = outputs(model, {"input_ids": tokens()})
    merged = model.merge_and_unload(sparse_kernel=False)
    close(outputs(merged, {"input_ids": tokens()}), expected)
    # as floating-point values that are exact
    merged.save_pretrained(tmp_path / "exact")
    with pytest.raises(ValueError, match="blocks of different sizes"):
        save_gptq(merged, tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()
    report = sparsify_linears(merged, when="always")
    assert sum(decision.swapped for decision in report.decisions) == 10
    found = outputs(merged, {"input_ids": tokens()})
    merged.save_pretrained(tmp_path / "int4")
    (exact, _), (logits, names) = reload_fresh(tmp_path / "exact", tmp_path / "int4")
    close(exact, expected)
    assert names.count("SparseLinear") == 10
    close(logits, found, 1e-5)


def test_gptq_of_a_uniform_subnet(tmp_path):
    model = tiny_llama(hidden_size=64, intermediate_size=96, head_dim=16)
    settings = {**SETTINGS, "quantization_aware": True, "sparse_adapter": False, "bits": 4, "group_size": 16}
    settings["elastic_width"] = {"heads": [1.0, 0.5], "mlp": [1.0, 0.5]}
    model = get_peft_model(model, SparseQALoraConfig(**settings)).eval()
    randomize(model)
    model.set_subnet("min")
    expected = outputs(model, {"input_ids": tokens()})
    merged = model.merge_and_unload(sparse_kernel=False)
    save_gptq(merged, tmp_path)
    close(outputs(load_gptq(tmp_path), {"input_ids": tokens()}), expected, 1e-4)


# -- random subnets ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def space_of_three_blocks():
    model = adapted(
        tiny_llama(num_hidden_layers=3),
        elastic_ranks=[5, 3, 1],
        elastic_width={"heads": [1.0, 0.5], "mlp": [48, 40, 11, 1]},
        elastic_depth=["all", "all.attention", "all.mlp"],
    )
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    return model, weights, outputs(model, {"input_ids": tokens()})


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_subnet(space_of_three_blocks, data):
    model, weights, whole = space_of_three_blocks
    space = model.search_space
    subnet = space.decode([data.draw(st.integers(0, len(choice.options) - 1)) for choice in space])
    model.set_subnet(subnet)
    assert model.active_subnet == subnet and type(subnet).from_json(subnet.to_json()) == subnet
    ids = {"input_ids": tokens()}
    expected = outputs(model, ids)
    if any(computes(subnet, f"model.layers.{i}") for i in range(3)):
        extracted = model.extract_subnet(sparse_kernel=False)
        close(outputs(extracted, ids), expected)
        everything = sum(parameter.numel() for parameter in tiny_llama(num_hidden_layers=3).parameters())
        predicted = everything - space.count_base_parameters(space.max) + space.count_base_parameters(subnet)
        assert sum(parameter.numel() for parameter in extracted.parameters()) == predicted
    else:
        with pytest.raises(ValueError, match="at least one attention or MLP must stay"):
            model.extract_subnet()
    model.set_subnet("max")
    assert torch.equal(outputs(model, ids), whole)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())


# -- cost --------------------------------------------------------------------------------------------------------------


def test_choosing_a_subnet_takes_milliseconds():
    model = adapted(
        tiny_llama(num_hidden_layers=30),
        elastic_ranks=[5, 2],
        elastic_depth=["all.attention", "all.mlp"],
        target_modules="all-linear",
    )
    subnets = [model.search_space.sample(seed) for seed in range(6)]
    times = []
    for subnet in subnets * 3:
        start = time.perf_counter()
        model.sample_subnet(subnet)
        times.append(time.perf_counter() - start)
    print(
        f"\nset_subnet, 30 blocks: median {sorted(times)[len(times) // 2] * 1e3:.1f} ms, fastest {min(times) * 1e3:.1f} ms"
    )
    assert min(times) < 0.03


@pytest.mark.parametrize("alike", [True, False])
def test_heads_that_do_not_divide_the_hidden_size(alike, tmp_path):
    # transformers' own validation of a Llama configuration rejects three heads for a hidden size of 32
    model = adapted(
        tiny_llama(num_attention_heads=4, num_key_value_heads=4),
        elastic_width={"heads": [1.0, 0.75]},
        elastic_depth=None,
        importance="none",
        target_modules=["q_proj"],
    )
    subnet = {**model.search_space.min} | ({} if alike else {"heads:model.layers.1": 4})
    small = model.extract_subnet(subnet, sparse_kernel=False).eval()
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(3, 13)[None]
    assert torch.equal(loaded(ids).logits, small(ids).logits)
    assert [layer.self_attn.q_proj.out_features for layer in loaded.model.layers] == [24, 24 if alike else 32]


@needs_kernels
@pytest.mark.parametrize("width", [{"mlp": [1.0, 0.5]}, {"heads": [1.0, 0.5], "mlp": [1.0, 0.5]}], ids=str)
def test_the_decode_step_of_blocks_of_different_sizes(width):
    settings = {"elastic_width": width, "elastic_depth": None, "importance": "none", "target_modules": ["q_proj"]}
    model = adapted(tiny_llama(num_hidden_layers=4), **settings)
    ids = torch.arange(3, 9)[None]
    for seed in range(3):
        small = model.extract_subnet(model.search_space.sample(seed), sparse_kernel=False).eval()
        expected = small.generate(ids, **GENERATE)
        optimize_generation(small)
        assert torch.equal(small.generate(ids, **GENERATE), expected)


def test_the_decode_step_is_refused_without_an_attention():
    settings = {"elastic_width": None, "elastic_depth": "1.attention", "target_modules": ["q_proj"]}
    small = adapted(tiny_llama(), **settings).extract_subnet("min", sparse_kernel=False)
    with pytest.raises(ValueError, match="`model`: layer 1 must be made of"):
        optimize_generation(small)
