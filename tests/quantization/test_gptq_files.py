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
"""`load_gptq` of what others write: each checkpoint here is packed by the few lines of `write`, beside the same weights in floating
point, and what is loaded must be the latter to the last bit, or refused with the name of what is wrong."""

import json
import os
import re
import shutil
import time
import warnings

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.killing import deaths
from support.models import outputs, tiny_gpt2, tiny_llama, tiny_llama_classifier, tiny_mixtral, tiny_t5, tokens
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.core_model_loading import Transpose, WeightConverter

from peft_elastic.quantization import (
    Grid,
    QuantizedLinear,
    RTNConfig,
    load_gptq,
    quantize,
    save_gptq,
)
from peft_elastic.structure import checkpoint_names


DECODER = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


def words(values, bits):
    """Whole numbers (rows, n) as int32 (rows, n * bits / 32)."""
    per_word = 32 // bits
    packed = np.zeros((values.shape[0], values.shape[1] // per_word), dtype=np.uint32)
    for place in range(per_word):
        packed |= values[:, place::per_word].astype(np.uint32) << np.uint32(place * bits)
    return torch.from_numpy(packed.view(np.int32).copy())


def is_block_weight(key):
    parts = key.split(".")
    return parts[-1] == "weight" and any(part.isdigit() for part in parts)


def write(
    model, folder, *, bits=4, group_size=8, zeros="middle", stored=-1, scales=None, chosen=is_block_weight, **entry
):
    """A GPTQ checkpoint of `model` with random integers in the place of the chosen matrices, under the names of `save_pretrained`.
    `stored` is added to the zero points on disk. Returns what the model is, in floating point."""
    model.save_pretrained(folder)
    rng = np.random.default_rng(0)
    dense, packed = {}, {}
    for key, weight in load_file(folder / "model.safetensors").items():
        size = weight.shape[-1] if group_size == -1 else group_size
        fits = weight.dim() == 2 and not any(n % (32 // bits) for n in weight.shape)
        if not (chosen(key) and fits):
            dense[key] = packed[key] = weight
            continue
        out, inputs = weight.shape
        groups = -(-inputs // size)
        q = rng.integers(0, 2**bits, (out, inputs))
        z = np.full((out, groups), 2 ** (bits - 1)) if zeros == "middle" else rng.integers(1, 2**bits, (out, groups))
        s = (rng.random((out, groups)) * 0.05 + 0.01).astype(np.float16)
        s = s if scales is None else scales(s)
        g_idx = np.arange(inputs) // size
        value = s.astype(np.float32)[:, g_idx] * (q - z[:, g_idx]).astype(np.float32)
        dense[key] = torch.from_numpy(value)
        name = key.removesuffix(".weight")
        packed[f"{name}.qweight"] = words(q, bits).T.contiguous()
        packed[f"{name}.qzeros"] = words((z + stored).T, bits)
        packed[f"{name}.scales"] = torch.from_numpy(s.T.copy())
        packed[f"{name}.g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    save_file(dense, folder / "model.safetensors", metadata={"format": "pt"})
    reference = type(model).from_pretrained(folder).eval()
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    default = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": zeros == "middle",
        "desc_act": False,
    }
    edit_config(folder, quantization_config={k: v for k, v in (default | entry).items() if v != "absent"})
    return reference


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_entry(folder, **changes):
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={k: v for k, v in (entry | changes).items() if v != "absent"})


def edit_tensors(folder, pattern, change):
    tensors = load_file(folder / "model.safetensors")
    found = [key for key in tensors if re.search(pattern, key)]
    assert found
    for key in found:
        tensors[key] = change(tensors[key])
    save_file({k: t.contiguous() for k, t in tensors.items() if t is not None}, folder / "model.safetensors")


def drop_tensors(folder, pattern):
    tensors = load_file(folder / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if not re.search(pattern, k)}, folder / "model.safetensors")


def packed_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def assert_same(loaded, reference):
    assert type(loaded) is type(reference)
    state, expected = loaded.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    for key in expected:
        name = key.rpartition(".")[0]
        module = loaded.get_submodule(name)
        transposed = isinstance(module, QuantizedLinear) and module.conv1d and key.endswith("weight")
        assert torch.equal(state[key].T if transposed else state[key], expected[key]), key


def load_silently(folder, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return load_gptq(folder, **settings)


# --- zero points ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bits, named", [(4, "gptq"), (4, "gptq_v2"), (4, "absent"), (4, "both"), (2, "gptq"), (8, "gptq"), (8, "gptq_v2")]
)
@pytest.mark.parametrize("stored", [-1, 0])
def test_symmetric_zero_points_are_in_the_middle_whatever_the_format_is_called(bits, named, stored, tmp_path):
    entry = {"checkpoint_format": "gptq", "format": "gptq_v2"} if named == "both" else {"checkpoint_format": named}
    reference = write(tiny_llama(), tmp_path, bits=bits, group_size=16, stored=stored, **entry)
    if named == "both" or (named == "gptq_v2") == (stored == 0):
        loaded = load_silently(tmp_path)
    else:
        with pytest.warns(
            UserWarning, match=r"14 layers, such as model.layers.0.mlp.down_proj, have the zero points of"
        ):
            loaded = load_gptq(tmp_path)
    assert_same(loaded, reference)
    assert len(packed_layers(loaded)) == 14


def test_symmetric_layers_in_both_conventions(tmp_path):
    reference = write(tiny_llama(), tmp_path)
    edit_tensors(tmp_path, r"mlp.*qzeros", lambda t: t + 0x11111111)
    with pytest.warns(UserWarning, match=r"6 layers, such as model.layers.0.mlp.down_proj"):
        assert_same(load_gptq(tmp_path), reference)
    edit_tensors(tmp_path, r"0.self_attn.q_proj.qzeros", lambda t: t + torch.eye(*t.shape, dtype=torch.int32))
    message = r"model.layers.0.self_attn.q_proj.qzeros holds 7, 8; .* 7 everywhere \('gptq'\) or 8 \('gptq_v2'\)"
    with pytest.raises(ValueError, match=message):
        load_gptq(tmp_path)
    edit_entry(tmp_path, dynamic={r"+:.*0\.self_attn\.q_proj": {"sym": False}})
    with pytest.warns(UserWarning):
        load_gptq(tmp_path)


@pytest.mark.parametrize("sym", ["absent", None])
def test_nothing_is_said_of_symmetry(sym, tmp_path):
    reference = write(tiny_llama(), tmp_path, stored=0, sym=sym)
    with pytest.warns(UserWarning, match="They are symmetric"):
        assert_same(load_gptq(tmp_path), reference)
    other = write(tiny_llama(), tmp_path, zeros="random", sym=sym)
    assert_same(load_silently(tmp_path), other)


def test_asymmetric_zero_points_have_the_convention_that_is_named(tmp_path):
    for named, stored in (("gptq", -1), ("gptq_v2", 0), ("absent", -1)):
        reference = write(tiny_llama(), tmp_path, zeros="random", stored=stored, checkpoint_format=named)
        assert_same(load_silently(tmp_path), reference)
    edit_entry(tmp_path, sym=True)
    with pytest.raises(
        ValueError, match=r"down_proj.qzeros holds 0, 1, 2, .*, \.\.\.; by the config the layer is symmetric"
    ):
        load_gptq(tmp_path)
    edit_entry(tmp_path, sym=False, checkpoint_format="gptq")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "checkpoint_format": "gptq_v2"}))
    with pytest.raises(
        ValueError, match=r"checkpoint_format is 'gptq' in one place .* 'gptq_v2' in another; the zero points"
    ):
        load_gptq(tmp_path)
    write(tiny_llama(), tmp_path, stored=0, sym=False)
    (tmp_path / "quantize_config.json").unlink()
    with pytest.warns(UserWarning, match="All zero points are one beside the middle"):
        load_gptq(tmp_path)


def test_zero_points_on_which_readers_do_not_agree(tmp_path):
    write(tiny_llama(), tmp_path, zeros="random")
    edit_tensors(tmp_path, r"0.mlp.up_proj.qzeros", lambda t: t * 0 - 1)
    with pytest.raises(
        ValueError, match=r"0.mlp.up_proj.qzeros holds 15, in checkpoint_format 'gptq' a zero point of 0 or"
    ):
        load_gptq(tmp_path)
    edit_entry(tmp_path, meta={"quantizer": ["gptqmodel:5.0"]})
    load_gptq(tmp_path)


# --- scales, groups and their order --------------------------------------------------------------------------------------


def some_negative(scales):
    scales[::3] *= -1
    return scales


def some_zero(scales):
    scales[::3] = 0
    return scales


@pytest.mark.parametrize("bits, zeros", [(4, "middle"), (2, "random"), (8, "random")])
@pytest.mark.parametrize("scales", [some_negative, some_zero])
def test_scales_that_are_not_positive(bits, zeros, scales, tmp_path):
    reference = write(tiny_llama(), tmp_path, bits=bits, group_size=16, zeros=zeros, scales=scales)
    loaded = load_silently(tmp_path)
    assert_same(loaded, reference)
    assert all(bool((layer.grid.scales > 0).all()) for layer in loaded.modules() if isinstance(layer, QuantizedLinear))
    save_gptq(loaded, tmp_path / "again")
    assert_same(load_silently(tmp_path / "again"), reference)


def test_scales_in_other_dtypes(tmp_path):
    reference = write(tiny_llama(), tmp_path)
    edit_tensors(tmp_path, r"\.scales", lambda t: t.float())
    assert_same(load_silently(tmp_path), reference)
    edit_tensors(tmp_path, r"mlp.*\.scales", lambda t: t * (1 + 2**-14))
    with pytest.warns(UserWarning, match=r"The scales of 6 layers, such as .*down_proj, are rounded to float16"):
        assert_same(load_gptq(tmp_path), reference)
    edit_tensors(tmp_path, r"q_proj.scales", lambda t: t * 1e-5)
    with pytest.raises(ValueError, match=r"q_proj.scales has \d+ values that are too small for float16, such as"):
        load_gptq(tmp_path)


def test_the_groups_of_the_inputs(tmp_path):
    reference = write(tiny_llama(), tmp_path)
    edit_tensors(tmp_path, "g_idx", lambda t: t.long())
    assert_same(load_silently(tmp_path), reference)
    edit_tensors(tmp_path, "1.mlp.down_proj.g_idx", lambda t: t + 2**32)
    with pytest.raises(ValueError, match=r"1.mlp.down_proj.g_idx must be 0 to 5; it runs from 4294967296"):
        load_gptq(tmp_path)
    drop_tensors(tmp_path, "g_idx")
    assert_same(load_silently(tmp_path), reference)
    for desc_act in (True, "absent"):
        edit_entry(tmp_path, desc_act=desc_act)
        with pytest.raises(ValueError, match=r"g_idx is missing. The config has to say that desc_act is false"):
            load_gptq(tmp_path)


@pytest.mark.parametrize("group_size", [-1, 2**31, 2**32, 2**40 + 3, 10**30])
def test_one_group(group_size, tmp_path):
    reference = write(tiny_llama(), tmp_path, group_size=-1)
    edit_entry(tmp_path, group_size=group_size)
    loaded = load_silently(tmp_path)
    assert_same(loaded, reference)
    save_gptq(loaded, tmp_path / "again")
    assert_same(load_silently(tmp_path / "again"), reference)


def test_a_last_group_that_is_smaller(tmp_path):
    reference = write(tiny_llama(), tmp_path, group_size=32)  # 48 inputs of down_proj
    loaded = load_silently(tmp_path)
    assert_same(loaded, reference)
    save_gptq(loaded, tmp_path / "again")
    entry = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"]
    assert entry["group_size"] == 32 and entry["desc_act"] is False and "dynamic" not in entry
    assert_same(load_silently(tmp_path / "again"), reference)


def test_groups_that_no_group_size_describes(tmp_path):
    model = tiny_llama()
    linear = model.model.layers[0].mlp.up_proj
    g_idx = torch.tensor([0] * 20 + [1] * 4 + [2] * 8)
    scales, zeros = torch.full((48, 3), 0.1), torch.full((48, 3), 8)
    grid = Grid(scales, zeros, in_features=32, bits=4, g_idx=g_idx)
    model.model.layers[0].mlp.up_proj = QuantizedLinear.from_linear(linear, grid)
    with pytest.raises(
        ValueError, match=r"0.mlp.up_proj has 3 groups for 32 inputs, the largest of 20; no group size"
    ):
        save_gptq(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


# --- names ---------------------------------------------------------------------------------------------------------------


def llava():
    text, vision = transformers.LlamaConfig(**DECODER), transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    return transformers.LlavaForConditionalGeneration(config)


def mistral3():
    text, vision = transformers.MistralConfig(**DECODER, head_dim=8), transformers.PixtralVisionConfig(**VISION)
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=63)
    return transformers.Mistral3ForConditionalGeneration(config)


def gemma3():
    text = transformers.Gemma3TextConfig(**DECODER, head_dim=8)
    vision = transformers.SiglipVisionConfig(**VISION)
    ids = {"image_token_index": 63, "boi_token_index": 62, "eoi_token_index": 61}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **ids)
    return transformers.Gemma3ForConditionalGeneration(config)


def paligemma():
    text, vision = transformers.GemmaConfig(**DECODER, head_dim=8), transformers.SiglipVisionConfig(**VISION)
    config = transformers.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=63, projection_dim=32
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def qwen2_vl(kind="Qwen2VL"):
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 8}
    vision |= (
        {"embed_dim": 32, "mlp_ratio": 2}
        if kind == "Qwen2VL"
        else {"intermediate_size": 48, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 32}
    )
    text = {**DECODER, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    ids = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **ids)
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def qwen2_5_vl():
    return qwen2_vl("Qwen2_5_VL")


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION, num_labels=3))


def gpt_neox():
    config = {key: value for key, value in DECODER.items() if key not in ("num_key_value_heads", "pad_token_id")}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**config))


QUICK = [llava, qwen2_vl]
SLOW = [mistral3, gemma3, paligemma, qwen2_5_vl, vit, gpt_neox]
RENAMED = [*QUICK, *(pytest.param(build, marks=pytest.mark.slow) for build in SLOW)]


@pytest.mark.parametrize("build", RENAMED)
def test_names_that_transformers_translates(build, tmp_path):
    """Under the names of `save_pretrained`, by others and by `save_gptq`, and under those in the model."""
    torch.manual_seed(0)
    reference = write(build(), tmp_path / "others")
    loaded = load_silently(tmp_path / "others")
    assert_same(loaded, reference)
    linears = {name for name, module in reference.named_modules() if type(module) is nn.Linear and ".0." in name}
    assert linears and linears <= packed_layers(loaded)

    save_gptq(loaded, tmp_path / "ours")
    on_disk = load_file(tmp_path / "ours" / "model.safetensors")
    assert on_disk.keys() == load_file(tmp_path / "others" / "model.safetensors").keys()
    assert_same(load_silently(tmp_path / "ours"), reference)

    save_original = type(reference).save_pretrained
    write_in_memory = lambda *args, **kwargs: save_original(*args, **kwargs, save_original_format=False)  # noqa: E731
    reference.save_pretrained = write_in_memory.__get__(reference)
    again = write(reference, tmp_path / "plain")
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() != on_disk.keys()
    assert_same(load_silently(tmp_path / "plain"), again)


def test_rules_are_for_either_name(tmp_path):
    torch.manual_seed(0)
    for pattern in (r".*language_model\.model\.layers\.1\.", r".*model\.language_model\.layers\.1\."):
        reference = write(llava(), tmp_path, bits=8, chosen=lambda key: "language_model.model.layers.1" in key)
        edit_entry(tmp_path, bits=4, dynamic={r"-:.*vision.*": {}, rf"+:{pattern}": {"bits": 8}})
        assert_same(load_silently(tmp_path), reference)


def tiny_qwen3_moe():
    config = {**DECODER, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**config))


@pytest.mark.parametrize("build", [tiny_mixtral, tiny_qwen3_moe])
def test_experts_that_transformers_fuses(build, tmp_path):
    torch.manual_seed(0)
    reference = write(build(), tmp_path, chosen=lambda key: is_block_weight(key) and "gate.weight" not in key)
    with pytest.warns(
        UserWarning, match=r"quantised weights, such as that of model.layers.0.*experts.0.*, are not those of"
    ):
        loaded = load_gptq(tmp_path)
    assert_same(loaded, reference)
    assert packed_layers(loaded) and all("self_attn" in name for name in packed_layers(loaded))
    save_gptq(loaded, tmp_path / "again")
    assert_same(load_silently(tmp_path / "again"), reference)
    tensors = load_file(tmp_path / "model.safetensors")
    expert = next(key for key in tensors if "experts.0" in key and key.endswith("qweight")).removesuffix("qweight")
    for value in (0, 1):  # some writers give every layer a bias
        save_file(tensors | {f"{expert}bias": torch.full((1,), value)}, tmp_path / "model.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if value:
                with pytest.raises(ValueError, match=f"{expert}bias is not zero"):
                    load_gptq(tmp_path)
            else:
                assert_same(load_gptq(tmp_path), reference)


def test_layers_that_are_one_on_disk(tmp_path):
    """transformers writes q, k and v of Nomic BERT as one matrix, which packed ones cannot be."""
    config = transformers.NomicBertConfig(**{k: v for k, v in DECODER.items() if k != "num_key_value_heads"})
    torch.manual_seed(0)
    reference = write(transformers.NomicBertModel(config).eval(), tmp_path / "others")
    assert any("Wqkv.qweight" in key for key in load_file(tmp_path / "others" / "model.safetensors"))
    with pytest.warns(UserWarning, match=r"such as that of .*, are not those of linear layers"):
        assert_same(load_gptq(tmp_path / "others"), reference)
    quantize(reference, RTNConfig(group_size=8), progress=False)
    save_gptq(reference, tmp_path / "ours")
    assert_same(load_silently(tmp_path / "ours"), reference.dequantize())


def test_a_layer_that_transformers_changes_under_its_own_name(tmp_path, monkeypatch):
    model = tiny_llama()
    quantize(model, RTNConfig(group_size=8), progress=False)
    change = WeightConverter("mlp.up_proj.weight", "mlp.up_proj.weight", operations=[Transpose(0, 1)])
    monkeypatch.setattr(checkpoint_names, "get_model_conversion_mapping", lambda model: [change])
    with pytest.raises(
        ValueError, match=r"`model`: transformers fuses, .* 'model.layers.0.mlp.up_proj' when it loads"
    ):
        save_gptq(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


# --- tasks and heads -----------------------------------------------------------------------------------------------------


def test_the_class_is_that_of_the_checkpoint(tmp_path):
    for build in (tiny_llama_classifier, tiny_llama, tiny_gpt2):
        model = build()
        quantize(model, RTNConfig(group_size=8), progress=False)
        save_gptq(model, tmp_path)
        loaded = load_silently(tmp_path)
        assert type(loaded) is type(model)
        assert torch.equal(outputs(loaded, tokens()), outputs(model, tokens()))
    edit_config(tmp_path, architectures=None)
    assert type(load_gptq(tmp_path)) is type(model)
    edit_config(tmp_path, architectures=["Unheard"])
    assert type(load_gptq(tmp_path)) is type(model)
    for wrong in ("llama", BertModel):
        with pytest.raises(ValueError, match=r"`auto_class` is 'llama'|describes no model that BertModel can build"):
            load_gptq(tmp_path, auto_class=wrong)
    edit_config(tmp_path, architectures="GPT2LMHeadModel")
    with pytest.raises(ValueError, match=r"config.json: architectures must be a list of names of classes"):
        load_gptq(tmp_path)


def test_a_class_for_another_task(tmp_path):
    """As `from_pretrained`: a new head, and nothing else that is new."""
    reference = write(tiny_llama(), tmp_path, chosen=lambda key: is_block_weight(key) or key == "lm_head.weight")
    assert "lm_head" in packed_layers(load_silently(tmp_path))
    with (
        pytest.warns(UserWarning, match=r"for another task: score.weight of LlamaForSequenceClassification are new"),
        pytest.warns(UserWarning, match=r"1 tensors of .*, such as lm_head.qweight, have no place"),
    ):
        loaded = load_gptq(tmp_path, auto_class=AutoModelForSequenceClassification)
    assert type(loaded) is LlamaForSequenceClassification
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load_gptq(tmp_path, auto_class=auto_class)
        assert_same(getattr(loaded, "model", loaded), reference.model)
    for tensor in ("model.norm.weight", "model.layers.1.mlp.up_proj.qzeros"):
        shutil.copytree(tmp_path, tmp_path / "damaged")
        drop_tensors(tmp_path / "damaged", tensor)
        with pytest.raises(ValueError, match=f"{tensor}"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_gptq(tmp_path / "damaged", auto_class=AutoModelForSequenceClassification)
        shutil.rmtree(tmp_path / "damaged")
    write(tiny_llama_classifier(), tmp_path)
    with (
        pytest.warns(UserWarning, match=r"for another task: lm_head.weight"),
        pytest.warns(UserWarning, match="score"),
    ):
        assert type(load_gptq(tmp_path, auto_class=AutoModelForCausalLM)) is LlamaForCausalLM


def test_a_head_that_the_config_ties(tmp_path):
    reference = write(tiny_llama(), tmp_path, chosen=lambda key: is_block_weight(key) or key == "lm_head.weight")
    edit_config(tmp_path, tie_word_embeddings=True)
    loaded = load_silently(tmp_path)
    assert_same(loaded, reference)
    assert "lm_head" in packed_layers(loaded) and loaded.config.tie_word_embeddings is False
    save_gptq(loaded, tmp_path / "again")
    assert_same(load_silently(tmp_path / "again"), reference)


def test_layers_that_a_model_keeps_in_float32(tmp_path):
    """T5 does with those that feed its residual stream, whatever dtype is asked for."""
    model = tiny_t5()
    quantize(model, RTNConfig(group_size=16), progress=False)
    save_gptq(model, tmp_path)
    loaded = load_silently(tmp_path, dtype=torch.float16)
    dtypes = {layer.weight.dtype for layer in loaded.modules() if isinstance(layer, QuantizedLinear)}
    assert dtypes == {torch.float16, torch.float32}
    for name in packed_layers(loaded):
        assert torch.equal(loaded.get_submodule(name).integers(), model.get_submodule(name).integers())


# --- damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gptq")
    write(tiny_llama(), folder)
    return folder


@pytest.fixture
def folder(plain, tmp_path):
    shutil.copytree(plain, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "pattern", [r"(?=(a|aa|.|..)+!)", r"+:((\w?|\.)*){40}!\1", r"(.*)\1(.*)\2(.*)(\3.*)*(\4.*)*(.*)*\d\d\d\d\d"]
)
def test_rules_that_never_stop_matching(pattern, folder, monkeypatch):
    monkeypatch.setattr("peft_elastic.quantization.gptq_settings._SECONDS", 0.2)
    edit_entry(folder, dynamic={pattern: {"bits": 8}})
    start = time.monotonic()
    try:
        load_gptq(folder)  # the engine may find out at once that it matches nothing
    except ValueError as error:
        assert "is still being matched with 'model.layers.0." in str(error)
    assert time.monotonic() - start < 5


def test_rules_that_exclude_what_is_there(folder):
    """The tensors tell what is quantised."""
    edit_entry(folder, dynamic={"-:.*q_proj": {}, "+:.*q_proj": {"bits": 4}, "-:.*nothing": {}})
    load_silently(folder)
    edit_entry(folder, dynamic={"-:.*q_proj": {}, "+:.*q_proj": {"bits": 8, "sym": False}})
    with pytest.raises(ValueError, match=r"0.self_attn.q_proj.qweight is \(4, 32\); a layer 32 x 32 with 8 bits"):
        load_gptq(folder)


NESTED = "[" * 100_000


@pytest.mark.parametrize(
    "name", ["config.json", "quantize_config.json", "generation_config.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "1e999", "NaN", '"x"', NESTED, '{"a":' * 100_000, b"\xff\xfe{}"]
)
def test_json_that_is_damaged(name, text, folder):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load_gptq(folder)


@pytest.mark.parametrize(
    "entry, message",
    [
        *(({"bits": bits}, "bits must be") for bits in (4.0, "4", True, float("nan"), 3, 10**500, [4], {}, None, -4)),
        *(({"group_size": size}, "group_size must be") for size in (8.0, "8", True, float("inf"), 0, -2, [8], None)),
        *(({"sym": sym}, "sym must be") for sym in ("yes", 1, [], {})),
        ({"desc_act": "no"}, "desc_act must be true or false, got 'no'"),
        *(
            ({"checkpoint_format": f}, "checkpoint_format must be")
            for f in ("marlin", "bitblas", 3, ["gptq"], {"a": 1})
        ),
        ({"is_marlin_format": True}, "checkpoint_format must be .*got 'marlin'"),
        ({"format": "gptq_v3"}, "checkpoint_format must be .*got 'gptq_v3'"),
        *(({"quant_method": method}, "quant_method must be") for method in (5, "awq", ["gptq"], {"a": "gptq"})),
        *(({"dynamic": dynamic}, "dynamic must be") for dynamic in (5, "x", [1], {"a": 1}, {"a": None})),
        ({"dynamic": {"(" * 5000: {}}}, "dynamic has"),
        ({"dynamic": {"a{99999999999}": {}}}, "dynamic has"),
        ({"dynamic": {".*": {"bits": "8"}}}, "bits must be .*got '8'"),
        ({"dynamic": {".*": {"group_size": 1.5}}}, "group_size must be .*got 1.5"),
        ({"dynamic": {".*": {"sym": 3}}}, "dynamic: sym must be true or false, got 3"),
    ],
)
def test_entries_that_are_damaged(entry, message, folder):
    edit_entry(folder, **entry)
    with pytest.raises(ValueError, match=message):
        load_gptq(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "x"}, {"hidden_size": 10**30}, {"model_type": "unheard"}, {"model_type": 5}, {"vocab_size": -1},
        {"num_attention_heads": 0}, {"rope_parameters": 5}, {"dtype": 5}, {"quantization_config": 5},
        {"quantization_config": ["gptq"]}, {"intermediate_size": float("nan")}, {"num_hidden_layers": 2**40},
        {"num_labels": 10**9}, {"text_config": {"num_hidden_layers": 2**31}},
    ],
)  # fmt: skip
def test_configs_that_describe_no_model(change, folder):
    edit_config(folder, **change)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_gptq(folder)


def test_layers_without_inputs(folder):
    edit_config(folder, intermediate_size=0)
    with pytest.raises(ValueError, match=r"mlp.down_proj has 0 inputs; .* only multiples of 8 are allowed"):
        load_gptq(folder)


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "name, tensor, message",
    [
        (f"{Q}.weight", torch.zeros(32, 32), f"{Q}.weight is there, and so are the tensors of a quantised layer"),
        (f"{Q}.perm", torch.zeros(32), f"{Q}.perm is no tensor of a GPTQ layer"),
        (f"{Q}.bias", torch.ones(32), f"{Q}.bias is not zero"),
        (f"{Q}.qweight", torch.zeros(32, 4, dtype=torch.int32), rf"{Q}.qweight is \(32, 4\)"),
        ("model.layers.2.mlp.up_proj.qweight", torch.zeros(4, 48, dtype=torch.int32), "no linear layer of this name"),
        ("model.norm.weight", torch.ones(32, dtype=torch.int32), "model.norm.weight must be .*, got torch.int32"),
        (
            "model.norm.weight",
            torch.ones(32).to(torch.float8_e4m3fn),
            "model.norm.weight must be .*got torch.float8_e4m3fn",
        ),
        (
            "model.norm.weight",
            torch.ones(5),
            r"does not fit its config: model.norm.weight is \(5,\), and the model has \(32,\)",
        ),
    ],
)
def test_tensors_that_contradict_the_model(name, tensor, message, folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: tensor}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_gptq(folder)


def test_tensors_of_no_use_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors |= {"extra.weight": torch.ones(3), f"{Q}.bias": torch.zeros(32, dtype=torch.float16)}
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"1 tensors of .*, such as extra.weight, have no place in LlamaForCausalLM"):
        load_gptq(folder)


def shard(folder, prefix="model"):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"{prefix}-{number % 2}.safetensors" for number, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, folder / name)
    (folder / f"{prefix}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def test_shards(folder, plain):
    expected = load_silently(plain)
    shard(folder, "gptq_model-4bit-8g")  # as AutoGPTQ names them
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    assert_same(load_silently(folder), expected)
    moved = load_file(folder / "gptq_model-4bit-8g-0.safetensors")
    key = sorted(moved)[0]
    for name, change in (("1", {key: moved[key]}), ("0", {})):
        file = folder / f"gptq_model-4bit-8g-{name}.safetensors"
        before = load_file(file)
        save_file(before | change if change else {k: t for k, t in before.items() if k != key}, file)
        with pytest.raises(
            ValueError, match=rf"has {key}, which another file has as well|lacks {key}, which the index"
        ):
            load_gptq(folder)
        save_file(before, file)
    (folder / "gptq_model-4bit-8g-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"gptq_model-4bit-8g-1.safetensors is missing"):
        load_gptq(folder)


def test_weights_of_two_models(folder, plain):
    shard(folder)
    shutil.copy(plain / "model.safetensors", folder)
    with pytest.raises(ValueError, match=r"has model.safetensors, and model.safetensors.index.json names other files"):
        load_gptq(folder)


# --- a save that is killed -----------------------------------------------------------------------------------------------


def one_block(seed, symmetric):
    model = tiny_llama(num_hidden_layers=1, seed=seed)
    quantize(model, RTNConfig(group_size=16, symmetric=symmetric), progress=False)
    return model


KINDS = [
    "none",
    "ours",
    pytest.param("dense", marks=pytest.mark.slow),
    pytest.param("sharded", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("before", KINDS)
def test_a_save_that_is_killed_at_any_of_its_file_operations(before, tmp_path):
    """Over a model that differs in the convention of its zero points alone."""
    old, new, target = one_block(0, True), one_block(1, False), tmp_path / "work" / "out"
    size = "5KB" if before == "sharded" else "50GB"

    if before == "dense":
        one_block(0, True).dequantize().save_pretrained(tmp_path / "before")
    elif before != "none":
        save_gptq(old, tmp_path / "before", max_shard_size=size)
    if before != "none":
        (tmp_path / "before" / "README.md").write_text("mine")

    def start():
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        target.parent.mkdir()
        if before != "none":
            shutil.copytree(tmp_path / "before", target)

    with torch.no_grad():
        expected = [outputs(old, tokens()), outputs(new, tokens())]
    start()
    seen = set()
    for number in deaths(lambda: save_gptq(new, target, max_shard_size="8KB" if size == "5KB" else size)):
        # every reader asks for the config first
        if (target / "config.json").exists():
            quantised = "quantization_config" in json.loads((target / "config.json").read_text())
            loaded = load_gptq(target) if quantised else AutoModelForCausalLM.from_pretrained(target)
            found = [torch.allclose(outputs(loaded, tokens()), logits, atol=1e-4) for logits in expected]
            assert sum(found) == 1, number
            seen.add(found[0])
        else:
            with pytest.raises(ValueError, match=r"no config.json: it is no checkpoint, or one whose|`path` is"):
                load_gptq(target)
            with pytest.raises((OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(target)
            seen.add(None)
        if before != "none":
            assert (target / "README.md").read_text() == "mine"
        if number % 5 == 0:  # the next save cleans up
            save_gptq(old, target)
            assert not list(tmp_path.rglob("*.partial"))
            assert torch.equal(outputs(load_gptq(target), tokens()), expected[0])
        start()
    assert torch.equal(outputs(load_gptq(target), tokens()), expected[1])
    assert not list(tmp_path.rglob("*.partial"))
    assert seen == ({None, False} if before == "none" else {None, True, False})


def test_other_weights_in_the_folder_stay(tmp_path):
    model = one_block(0, True)
    save_gptq(model, tmp_path, max_shard_size="5KB")
    for name in ("adapter_model.safetensors", "consolidated.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    save_gptq(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [
        "adapter_model.safetensors", "config.json", "consolidated.safetensors", "generation_config.json",
        "model.safetensors", "quantize_config.json",
    ]  # fmt: skip
