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
"""Quantisation-aware and masked adapters on layers of GPTQModel, and merging others into them, which rounds again."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import (
    GROUP_SIZE,
    as_gptqmodel_computes,
    assert_close,
    assert_same_weights,
    gptqmodel_layers,
    load,
    name_of,
    own_layers,
    pruned,
)
from peft import LoraConfig, PeftModel, get_peft_model
from support.models import outputs, randomize, tiny_qwen2, tokens
from support.training import arguments, dataset
from transformers import Trainer

from peft_elastic import ElasticLoraConfig, SparseQALoraConfig, SubnetSamplingCallback, merge_and_requantize
from peft_elastic.quantization import GPTQConfig, RTNConfig, load_gptq, quantize, save_gptq


pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = {"r": 8, "lora_alpha": 8, "target_modules": TARGETS}
# of GPTQModel itself, but for the first, which is ours and sparse
KINDS = [
    "sparse",
    {},
    {"sym": False, "desc_act": True, "form": "gptq_v2"},
    {"bits": 8},
    {"bits": 2, "sym": False, "form": "gptq_v2"},
]
MASKED = pytest.mark.parametrize("sparse_adapter", [True, False], ids=["masked", "unmasked"])
SPARSE_AND_THEIRS = pytest.mark.parametrize("kind", KINDS[:3], ids=["sparse", "plain", "act-order"])


@pytest.fixture(scope="session")
def sparse_folder(tokenizer, tmp_path_factory):
    model = pruned()
    quantize(model, GPTQConfig(group_size=GROUP_SIZE), [tokens(8, 16)], progress=False)
    folder = tmp_path_factory.mktemp("sparse")
    save_gptq(model, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture
def folder_of(sparse_folder, quantized_folder):
    return lambda kind: sparse_folder if kind == "sparse" else quantized_folder(**kind)


def wrap(model, std=0.05, **settings):
    """`std`: updates of about a step of the grid."""
    model = get_peft_model(model, SparseQALoraConfig(**(LORA | settings))).eval()
    randomize(model, std=std)
    return model


def gradients(model):
    model.zero_grad()
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    model.eval()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close_gradients(actual, expected, rtol=1e-2):
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        error = (gradient - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert error < rtol, f"{name}: {error:.1e}"


def effect(model):
    """Of the adapter on the logits."""
    with model.disable_adapter():
        base = outputs(model, tokens())
    return (outputs(model, tokens()) - base).abs().max()


# -- quantisation-aware --------------------------------------------------------------------------------------------------


@MASKED
@pytest.mark.parametrize("kind", KINDS, ids=["sparse", *map(name_of, KINDS[1:])])
def test_as_on_our_layers(folder_of, kind, sparse_adapter):
    """Outputs and gradients of every subnet, with and without the adapter."""
    folder = folder_of(kind)
    settings = {"quantization_aware": True, "sparse_adapter": sparse_adapter}
    settings["std"] = 0.2 if kind != "sparse" and kind.get("bits") == 2 else 0.05
    model, own = wrap(load(folder), **settings), wrap(load_gptq(folder), **settings)
    assert {type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")} == {"SparseLoraLinear"}
    for name, layer in own.named_modules():
        if hasattr(layer, "lora_grid"):
            assert layer.lora_grid["default"].equals(model.get_submodule(name).lora_grid["default"])
    for option in ("bits", "group_size", "symmetric"):
        assert getattr(model.peft_config["default"], option) == getattr(own.peft_config["default"], option)
    for subnet in ("max", "min", model.search_space.sample(1)):
        for m in (model, own):
            m.set_subnet(subnet)
        assert_close(model, own)
        assert_close_gradients(gradients(model), gradients(own))
    model.set_subnet("max")
    assert effect(model) > 0.05
    with model.disable_adapter():
        assert torch.equal(outputs(model, tokens()), outputs(load(folder), tokens()))


@MASKED
@SPARSE_AND_THEIRS
def test_merging(folder_of, kind, sparse_adapter, tmp_path):
    """The merged model computes what the adapter did, with the zeros of the base, here and wherever it is loaded."""
    folder = folder_of(kind)
    model = wrap(load(folder), quantization_aware=True, sparse_adapter=sparse_adapter)
    zeros = {name: layer.dequantize_weight().T == 0 for name, layer in gptqmodel_layers(load(folder)).items()}
    model.set_subnet("heuristic")
    expected = outputs(model, tokens())
    merged = model.merge_and_unload(sparse_kernel=False)
    assert not gptqmodel_layers(merged) and len(own_layers(merged)) == 14
    assert_close(merged, expected)
    kept = [not own_layers(merged)[name].to_linear().weight[mask].any() for name, mask in zeros.items()]
    assert all(kept) if sparse_adapter else not all(kept)

    save_gptq(merged, tmp_path / "merged")
    assert torch.equal(outputs(load_gptq(tmp_path / "merged"), tokens()), outputs(merged, tokens()))
    theirs = load(tmp_path / "merged")
    assert_same_weights(merged, theirs)
    as_they_do = outputs(as_gptqmodel_computes(copy.deepcopy(merged)), tokens())
    torch.testing.assert_close(outputs(theirs, tokens()), as_they_do, rtol=1e-5, atol=1e-5)


def test_merged_in_a_fresh_process(sparse_folder, tmp_path):
    model = wrap(load(sparse_folder), quantization_aware=True)
    expected = outputs(model, tokens())
    save_gptq(model.merge_and_unload(sparse_kernel=False), tmp_path / "merged")
    torch.save({"ids": tokens(), "logits": expected}, tmp_path / "expected.pt")
    code = """if True:
        import sys, torch
        from transformers import AutoModelForCausalLM, GPTQConfig
        config = GPTQConfig(bits=4, backend="gptq_torch")
        folder = sys.argv[1] + "/merged"
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
        assert not any(name.startswith("peft_elastic") for name in sys.modules)
        from peft_elastic.quantization import load_gptq
        expected = torch.load(sys.argv[1] + "/expected.pt")
        with torch.no_grad():
            for model in (theirs.eval(), load_gptq(folder)):
                error = (model(expected["ids"]).logits - expected["logits"]).abs().max()
                assert error < 2e-3 * expected["logits"].abs().max(), error
        print("the same")
    """
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # see conftest.py
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "the same" in run.stdout, run.stderr


@SPARSE_AND_THEIRS
def test_merging_in_place_is_refused(folder_of, kind):
    model = wrap(load(folder_of(kind)), quantization_aware=True)
    expected, state = outputs(model, tokens()), {k: v.clone() for k, v in model.state_dict().items()}
    for merge in (model.merge_adapter, lambda: model.merge_adapter(safe_merge=True)):
        with pytest.raises(ValueError, match=r"which cannot be written to.*merge_and_unload"):
            merge()
        assert not any(layer.merged for layer in model.modules() if hasattr(layer, "lora_A"))
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(outputs(model, tokens()), expected)
        assert len(gptqmodel_layers(model)) == 14
    assert_close(model.merge_and_unload(sparse_kernel=False), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["adapter in float32", "adapter in 16 bits"])
def test_half_precision(tokenizer, dtype, autocast, tmp_path):
    """Qwen2, which has biases. The merged model keeps the dtype."""
    model = pruned(tiny_qwen2)
    quantize(model, RTNConfig(group_size=GROUP_SIZE), progress=False)
    save_gptq(model, tmp_path / "base", tokenizer=tokenizer)
    config = SparseQALoraConfig(**LORA, quantization_aware=True)
    model = get_peft_model(load(tmp_path / "base", dtype), config, autocast_adapter_dtype=autocast).eval()
    randomize(model, std=0.05)
    own = get_peft_model(load_gptq(tmp_path / "base", dtype=dtype), config, autocast_adapter_dtype=autocast).eval()
    randomize(own, std=0.05)
    rtol = 2e-2 if dtype == torch.float16 else 0.1
    expected = outputs(model, tokens())
    assert expected.dtype == dtype
    assert_close(expected.float(), outputs(own, tokens()).float(), rtol)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
    merged = model.merge_and_unload(sparse_kernel=False)
    assert outputs(merged, tokens()).dtype == dtype
    assert_close(outputs(merged, tokens()).float(), expected.float(), rtol)
    save_gptq(merged, tmp_path / "merged")
    assert_same_weights(merged, load(tmp_path / "merged"))
    assert_close(outputs(load(tmp_path / "merged", dtype), tokens()).float(), expected.float(), rtol)


def test_biases_and_a_dense_layer(tokenizer, tmp_path):
    """Where some layers are dense, GPTQModel leaves the others in another order, which must not matter."""
    model = pruned(tiny_qwen2)
    quantize(model, RTNConfig(group_size=GROUP_SIZE, exclude_modules=["o_proj"]), progress=False)
    save_gptq(model, tmp_path / "base", tokenizer=tokenizer)
    targets = [*TARGETS, "o_proj"]
    settings = {"quantization_aware": True, "target_modules": targets, "group_size": GROUP_SIZE}
    model = wrap(load(tmp_path / "base"), **settings)
    model.set_subnet(model.search_space.sample(3))
    expected = outputs(model, tokens())
    model.save_pretrained(tmp_path / "adapter")
    own = PeftModel.from_pretrained(load_gptq(tmp_path / "base"), tmp_path / "adapter", is_trainable=True).eval()
    assert own.active_subnet == model.active_subnet
    assert_close(expected, own)
    assert_close_gradients(gradients(model), gradients(own))
    merged = model.merge_and_unload(sparse_kernel=False)
    assert len(own_layers(merged)) == 14
    assert_close(merged, expected)
    save_gptq(merged, tmp_path / "merged")
    assert_close(load(tmp_path / "merged"), expected)


def test_gptqmodel_without_transformers(gptqmodel, sparse_folder, tmp_path):
    """The model in the object that GPTQModel.load returns."""
    loaded = gptqmodel.GPTQModel.load(
        str(sparse_folder), backend=gptqmodel.BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16
    )
    model = wrap(loaded.model, quantization_aware=True)
    expected = outputs(model, tokens()).float()
    assert_close(expected, wrap(load_gptq(sparse_folder), quantization_aware=True), 1e-2)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
    merged = model.merge_and_unload(sparse_kernel=False)
    assert_close(outputs(merged, tokens()).float(), expected, 1e-2)
    save_gptq(merged, tmp_path)
    assert_close(load(tmp_path), expected, 1e-2)


@SPARSE_AND_THEIRS
def test_adapters_are_saved(folder_of, kind, tmp_path):
    """And loaded on GPTQModel's layers and on ours, with the grid and the subnet."""
    folder = folder_of(kind)
    model = wrap(load(folder), quantization_aware=True)
    model.set_subnet("min")
    expected = outputs(model, tokens())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder), tmp_path).eval()
    assert loaded.active_subnet == model.active_subnet
    assert torch.equal(outputs(loaded, tokens()), expected)
    assert_close(PeftModel.from_pretrained(load_gptq(folder), tmp_path).eval(), expected)


def test_fixed_ranks(sparse_folder):
    model = wrap(load(sparse_folder), quantization_aware=True, elastic_ranks=[8])
    own = wrap(load_gptq(sparse_folder), quantization_aware=True, elastic_ranks=[8])
    expected = outputs(model, tokens())
    assert_close(expected, own)
    # with sparse layers, whose products are of bfloat16, where they are faster
    assert_close(model.merge_and_unload(), expected, 5e-2)


def test_another_grid_is_refused(sparse_folder):
    for option, value in (("bits", 8), ("group_size", 64), ("symmetric", True)):
        with pytest.raises(ValueError, match=rf"`{option}` is {value}, but 'model.layers.0.*' is quantised with"):
            wrap(load(sparse_folder), quantization_aware=True, **{option: value})


# -- training ------------------------------------------------------------------------------------------------------------


@MASKED
@pytest.mark.parametrize(
    ("dtype", "quantization_aware"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)], ids=str
)
def test_training(sparse_folder, dtype, quantization_aware, sparse_adapter):
    config = SparseQALoraConfig(**LORA, quantization_aware=quantization_aware, sparse_adapter=sparse_adapter)
    model = get_peft_model(load(sparse_folder, dtype), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(25):
        model.sample_subnet(model.search_space.sample(step))
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_trainer(sparse_folder, tmp_path):
    model = get_peft_model(load(sparse_folder), SparseQALoraConfig(**LORA, quantization_aware=True))
    settings = {"max_steps": 30, "learning_rate": 1e-2, "logging_steps": 1}
    trainer = Trainer(
        model,
        arguments(tmp_path / "trainer", **settings),
        train_dataset=dataset(8),
        callbacks=[SubnetSamplingCallback()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < sum(losses[:5]) - 2
    model.eval()
    model.set_subnet("max")
    expected = outputs(model, tokens())
    merged = model.merge_and_unload(sparse_kernel=False)
    assert_close(merged, expected)
    save_gptq(merged, tmp_path / "merged")
    assert_close(load(tmp_path / "merged"), expected)


@pytest.mark.parametrize("settings", [{"quantization_aware": True}, {}], ids=["quantisation-aware", "masked"])
def test_repacked_layers_are_refused(sparse_folder, settings):
    """TorchAtenLinear puts other buffers in the place of its own when it first runs in 16 bits: before the adapter, or after."""
    message = r"cannot be read.*gptq_torch.*load_gptq"
    model = load(sparse_folder, torch.float16, "gptq_torch_aten")
    outputs(model, tokens())
    with pytest.raises(ValueError, match=message):
        wrap(model, **settings)
    model = wrap(load(sparse_folder, torch.float16, "gptq_torch_aten"), **settings)
    with model.disable_adapter():
        outputs(model, tokens())
    with pytest.raises(ValueError, match=message):
        outputs(model, tokens())


# -- adapters that are not quantisation-aware ----------------------------------------------------------------------------


CONFIGS = {
    "sparse": SparseQALoraConfig(**LORA, init_lora_weights="gaussian"),
    "elastic": ElasticLoraConfig(**LORA),
    "lora": LoraConfig(**LORA),
}


@pytest.mark.parametrize("name", CONFIGS)
@SPARSE_AND_THEIRS
def test_beside_the_base(folder_of, kind, name):
    """Outputs and gradients as on our layers, and a merge that says what to do."""
    models = []
    for base in (load(folder_of(kind)), load_gptq(folder_of(kind))):
        models.append(get_peft_model(base, copy.deepcopy(CONFIGS[name])).eval())
        randomize(models[-1], std=0.05)
    model, own = models
    expected = outputs(model, tokens())
    assert_close(expected, own)
    assert_close_gradients(gradients(model), gradients(own))
    assert effect(model) > 0.05
    if name == "lora":  # stock peft's own
        with pytest.raises(ValueError, match="Cannot merge LORA layers when the model is gptq quantized"):
            model.merge_and_unload()
    else:
        with pytest.raises(ValueError, match="merge_and_requantize"):
            model.merge_and_unload()
        with pytest.raises(ValueError, match="merge_and_requantize"):
            model.merge_adapter()
    assert torch.equal(outputs(model, tokens()), expected)


@pytest.mark.parametrize(
    ("name", "refit"),
    [("sparse", False), ("elastic", False), ("lora", False), ("elastic", True)],
    ids=["sparse", "elastic", "lora", "refit"],
)
@SPARSE_AND_THEIRS
def test_requantizing(folder_of, kind, name, refit, tmp_path):
    """The weights, the report and the logits are what they say; the model can be saved and loaded by GPTQModel."""
    base, theirs = load(folder_of(kind)), load_gptq(folder_of(kind))
    model = get_peft_model(base, copy.deepcopy(CONFIGS[name])).eval()
    randomize(model, std=0.05)
    updates = {
        path.removeprefix("base_model.model."): layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for path, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    expected = outputs(model, tokens())
    merged, report = merge_and_requantize(model, refit=refit)
    layers = own_layers(merged)
    assert [row["name"] for row in report.layers] == list(updates) and len(layers) == 14
    errors = []
    for row in report.layers:
        before = own_layers(theirs)[row["name"]].to_linear().weight.detach()
        update = updates[row["name"]].detach()
        if name == "sparse":
            update = update * (before != 0)
        layer = layers[row["name"]]
        after = layer.grid.dequantize(layer.integers())
        old = own_layers(theirs)[row["name"]].grid
        assert torch.equal(layer.grid.g_idx, old.g_idx)
        if not refit:
            assert layer.grid.equals(old) and torch.equal(after, old.round(before + update))
        error = (after - before - update).norm()
        errors.append((error / update.norm()).item())
        assert row["update_error"] == pytest.approx(errors[-1], rel=1e-4)
        assert row["weight_error"] == pytest.approx((error / (before + update).norm()).item(), rel=1e-4)
        assert row["zeros_before"] == pytest.approx((before == 0).float().mean().item(), abs=1e-6)
        assert row["zeros_after"] == pytest.approx((after == 0).float().mean().item(), abs=1e-6)
    assert report.update_error == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert 0.01 < report.update_error < 2
    for path, layer in layers.items():
        if path not in updates:
            assert torch.equal(layer.integers(), own_layers(theirs)[path].integers())
    assert (outputs(merged, tokens()) - expected).abs().mean() < 0.5
    save_gptq(merged, tmp_path)
    assert torch.equal(outputs(load_gptq(tmp_path), tokens()), outputs(merged, tokens()))
    loaded = load(tmp_path)
    assert_same_weights(merged, loaded)
    assert_close(loaded, merged)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_requantizing_in_half_precision(tokenizer, dtype, tmp_path):
    model = pruned(tiny_qwen2)
    quantize(model, RTNConfig(group_size=GROUP_SIZE), progress=False)
    save_gptq(model, tmp_path / "base", tokenizer=tokenizer)
    model = get_peft_model(load(tmp_path / "base", dtype), LoraConfig(**LORA)).eval()
    randomize(model, std=0.05)
    expected = outputs(model, tokens())
    merged, report = merge_and_requantize(model)
    assert len(report.layers) == 6 and outputs(merged, tokens()).dtype == dtype
    assert (outputs(merged, tokens()) - expected).abs().mean() < 0.5
    save_gptq(merged, tmp_path / "merged")
    assert_same_weights(merged, load(tmp_path / "merged"))
    assert_close(outputs(load(tmp_path / "merged", dtype), tokens()).float(), outputs(merged, tokens()).float(), 0.1)
