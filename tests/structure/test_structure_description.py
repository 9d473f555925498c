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
"""What a configuration says of a model that lost parts of it: for architectures whose blocks differ by their place, whatever goes
wrong, and in other processes."""

import copy
import json
import pickle

import pytest
import torch
import transformers
from peft import get_peft_model
from support.elastic_models import adapted, close
from support.fresh import run_fresh
from support.masked_states import calibration_of, same, snapshot
from support.models import VOCABULARY, randomize, tiny_gpt2, tiny_llama, tokens
from torch import nn

from peft_elastic import ElasticLoraConfig, MultiPrunerConfig, PruningPlan, prune_structured, sparsify_linears
from peft_elastic.layers import ops
from peft_elastic.layers.backends import float as float_backend
from peft_elastic.pruning.structured.plan import describe_model
from peft_elastic.structure import description
from peft_elastic.structure import extract as extraction
from peft_elastic.structure.blocks import Structure
from peft_elastic.structure.description import extract_described, plan_extraction, undescribable
from peft_elastic.structure.narrow import is_narrowed
from peft_elastic.structure.space import activate


pytestmark = pytest.mark.filterwarnings("ignore")

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
IMAGES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}


def pixels():
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))}


def ids():
    return {"input_ids": tokens()}


def pair():
    return {"input_ids": tokens(), "decoder_input_ids": tokens(length=4, seed=1)}


def image_and_text():
    return {"input_ids": torch.cat([torch.full((len(tokens()), 4), 3), tokens()], 1)} | {
        "pixel_values": torch.randn(len(tokens()), 3, 16, 16, generator=torch.Generator().manual_seed(5))
    }


def plain(cls, config, **settings):
    return lambda: getattr(transformers, cls)(getattr(transformers, config)(**settings))


def llava(**text):
    vision = transformers.CLIPVisionConfig(**IMAGES)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**DECODER | text), image_token_id=3
    )
    return transformers.LlavaForConditionalGeneration(config)


def encoder_decoder():
    decoder = transformers.BertConfig(**ENCODER, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.BertConfig(**ENCODER), decoder
    )
    return transformers.EncoderDecoderModel(config)


LAYERS, TEXT = "model.layers", "model.language_model.layers"
# How a model is built, its inputs, what is removed of it -> how its configuration says that
FAMILIES = {
    "dense blocks among mixtures": (
        plain("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **DECODER, **EXPERTS, mlp_only_layers=[1]),
        ids,
        {f"{LAYERS}.0": "ordinary", f"{LAYERS}.1": "ordinary", f"{LAYERS}.3.attention": "described"},
    ),
    "every other block a mixture": (
        plain("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **DECODER, **EXPERTS, decoder_sparse_step=2, head_dim=8),
        ids,
        {f"{LAYERS}.0": "empty", f"{LAYERS}.3": "ordinary", f"{LAYERS}.0.mlp": "described"},
    ),
    "the first block dense": (
        plain("Glm4MoeForCausalLM", "Glm4MoeConfig", **DECODER, **ROUTED, first_k_dense_replace=1),
        ids,
        {f"{LAYERS}.0": "empty", f"{LAYERS}.2": "ordinary"},
    ),
    "scaled by the place": (
        plain("GPT2LMHeadModel", "GPT2Config", **GPT2, scale_attn_by_inverse_layer_idx=True),
        ids,
        {"transformer.h.1": "empty", "transformer.h.3": "ordinary"},
    ),
    "sizes of each layer of its own": (
        plain(
            "Gemma4ForCausalLM",
            "Gemma4TextConfig",
            **DECODER,
            head_dim=8,
            global_head_dim=16,
            sliding_window=4,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=0,
        ),
        ids,
        {f"{LAYERS}.0": "empty", f"{LAYERS}.1.attention": "described", "mlp": "ordinary"},
    ),
    "windows of each layer": (
        plain(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **DECODER,
            head_dim=8,
            sliding_window=3,
            layer_types=["sliding_attention", "full_attention"] * 2,
        ),
        ids,
        {f"{LAYERS}.0": "ordinary", f"{LAYERS}.1": "ordinary", f"{LAYERS}.2.mlp": "described"},
    ),
    "the text beside a tower": (
        llava,
        image_and_text,
        {f"{TEXT}.1": "ordinary", f"{TEXT}.3.mlp": "described", f"{TEXT}.0": "ordinary"},
    ),
    "a classifier of images": (
        plain("Dinov2ForImageClassification", "Dinov2Config", **IMAGES),
        pixels,
        {"dinov2.encoder.layer.0": "ordinary", "dinov2.encoder.layer.3": "ordinary"},
    ),
    "a backbone": (
        plain("Dinov2Backbone", "Dinov2Config", **IMAGES, out_indices=[1, 3]),
        pixels,
        {"encoder.layer.0": "empty", "encoder.layer.3": "empty", "encoder.layer.1.mlp": "described"},
    ),
    "a depth of its own at each place": (
        plain("BeitForImageClassification", "BeitConfig", **IMAGES, drop_path_rate=0.2),
        pixels,
        {"beit.layers.1": "ordinary", "beit.layers.3": "ordinary"},
    ),
    "a mixture without an attention": (
        plain("PhimoeForCausalLM", "PhimoeConfig", **DECODER, num_local_experts=4),
        ids,
        {f"{LAYERS}.3.attention": "described", f"{LAYERS}.0": "ordinary"},
    ),
    "an encoder with norms behind": (
        plain("BartForConditionalGeneration", "BartConfig", **BART),
        pair,
        {"model.encoder.layers.1": "empty", "model.decoder.layers.1": "ordinary"},
    ),
}


def model_of(build, seed=0):
    """Random weights, norms and biases too, so that an error in any of them shows."""
    torch.manual_seed(seed)
    model = build().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise * 0.15 if parameter.dim() > 1 else parameter + noise * 0.1)
    return model


@torch.no_grad()
def results(model, inputs):
    result = model(**inputs)
    return [t for t in result.to_tuple() if isinstance(t, torch.Tensor)] or list(result.feature_maps)


def values_of(model, removed):
    """The entry that leaves out a block or a part, or half of all channels."""
    if removed != "mlp":
        return {f"depth:{removed}": 0}
    return {f"mlp:{w.name}": w.full // 2 for w in Structure(model).widths if w.kind == "mlp"}


def way(folder):
    saved = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in saved
    blocks = saved.get("peft_elastic_blocks")
    if blocks is None:
        return "ordinary"
    return "empty" if any("block" in sizes.get("skip", ()) for sizes in blocks.values()) else "described"


def check_removal(model, inputs, values, folder):
    """Narrowed, extracted and loaded it computes the same; returns how the configuration says it."""
    activate(model, Structure(model), values)
    expected = results(model, inputs)
    extract_described(model)
    assert not is_narrowed(model)
    model.save_pretrained(folder)
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for twin in (model, loaded.eval(), copy.deepcopy(model)):
        found = results(twin, inputs)
        assert len(found) == len(expected) > 0
        for one, other in zip(found, expected):
            close(one, other, 1e-4)
    return way(folder)


QUICK = ("every other block a mixture", "sizes of each layer of its own", "the text beside a tower", "a backbone")


@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES if n not in QUICK)]
)
def test_blocks_that_differ_by_their_place(name, tmp_path):
    build, inputs, removals = FAMILIES[name]
    whole = model_of(build)
    for number, (removed, expected) in enumerate(removals.items()):
        model = copy.deepcopy(whole)
        values = values_of(model, removed)
        assert undescribable(model, values) == {}
        assert check_removal(model, inputs(), values, tmp_path / str(number)) == expected, removed


MORE = {
    "llama4": plain(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        **DECODER,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=2,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
    ),
    "ernie": plain(
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        **DECODER,
        moe_intermediate_size=16,
        moe_num_experts=4,
        moe_k=2,
        moe_layer_start_index=1,
        moe_num_shared_experts=1,
    ),
    "deepseek": plain(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        **DECODER | {"num_key_value_heads": 4},
        **ROUTED,
        first_k_dense_replace=2,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    "minicpm3": plain(
        "MiniCPM3ForCausalLM",
        "MiniCPM3Config",
        **DECODER | {"num_key_value_heads": 4},
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
    ),
    "gpt-oss": plain(
        "GptOssForCausalLM", "GptOssConfig", **DECODER, head_dim=8, num_local_experts=4, sliding_window=4
    ),
    "cohere2": plain("Cohere2ForCausalLM", "Cohere2Config", **DECODER, sliding_window=4),
    "smollm3": plain("SmolLM3ForCausalLM", "SmolLM3Config", **DECODER, no_rope_layer_interval=2),
    "exaone4": plain("Exaone4ForCausalLM", "Exaone4Config", **DECODER, sliding_window=4, sliding_window_pattern=2),
    "mixtral": plain("MixtralForCausalLM", "MixtralConfig", **DECODER, num_local_experts=4),
    "jamba": plain(
        "JambaForCausalLM",
        "JambaConfig",
        **DECODER,
        num_experts=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "qwen2": plain(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        **DECODER,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
    ),
    "olmo3": plain("Olmo3ForCausalLM", "Olmo3Config", **DECODER, sliding_window=4),
    "nemotron": plain("NemotronForCausalLM", "NemotronConfig", **DECODER),
    "vit": plain("ViTForImageClassification", "ViTConfig", **IMAGES),
    "deit": plain("DeiTForImageClassification", "DeiTConfig", **IMAGES),
    "beit backbone": plain("BeitBackbone", "BeitConfig", **IMAGES, out_indices=[1, 2, 4], add_fpn=False),
    "encoder and decoder": encoder_decoder,
    "electra": plain("ElectraForMaskedLM", "ElectraConfig", **ENCODER, embedding_size=16),
    "t5": plain(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=3,
        num_heads=4,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_any_removal_of_many_architectures(name, tmp_path):
    whole = model_of(MORE[name])
    images = hasattr(whole.config, "patch_size")
    inputs = pixels() if images else pair() if whole.config.is_encoder_decoder else ids()
    structure = Structure(whole)
    assert structure.blocks
    removals = [{f"depth:{b.path}" + ("" if p == "block" else f".{p}"): 0} for b in structure.blocks for p in b.skips]
    removals.append({f"{w.kind}:{w.name}": w.unit for w in structure.widths})
    removals.append({f"{w.kind}:{w.name}": w.unit for w in structure.widths[1:]})
    tried = 0
    for number, values in enumerate(filter(None, removals)):
        if not undescribable(whole, values):
            model = copy.deepcopy(whole)
            torch.manual_seed(0)
            check_removal(model, inputs, values, tmp_path / str(number))
            tried += 1
    assert tried > len(removals) / 2


def test_the_tower_keeps_its_own_configuration():
    model = model_of(llava)
    activate(model, Structure(model), {f"depth:{TEXT}.1": 0, f"depth:{TEXT}.2": 0})
    extract_described(model)
    assert model.config.vision_config.num_hidden_layers == 4 and model.config.text_config.num_hidden_layers == 2
    tower = next(module for name, module in model.named_modules() if name.endswith("vision_tower"))
    assert tower.config.num_hidden_layers == len(
        tower.vision_model.encoder.layers if hasattr(tower, "vision_model") else tower.encoder.layers
    )


def test_a_model_that_switches_by_its_inputs(tmp_path):
    """BigBird computes short inputs in another way, and stays at that: its runtime state is not its configuration."""
    model = model_of(plain("BigBirdForMaskedLM", "BigBirdConfig", **ENCODER))
    results(model, ids())
    values = values_of(model, "mlp")
    check_removal(copy.deepcopy(model), ids(), values, tmp_path)
    reasons = undescribable(model, {"depth:bert.encoder.layer.1.attention": 0})
    assert "set_attention_type" in reasons["depth:bert.encoder.layer.1.attention"]
    with pytest.raises(ValueError, match="`elastic_depth`.*layer.1.attention.*set_attention_type"):
        adapted(model, elastic_depth=["1.attention"], elastic_width=None, target_modules=["query"])
    assert not any("lora" in name for name, _ in model.named_modules())


def test_generation_with_a_cache_beside_empty_blocks(tmp_path):
    model = model_of(FAMILIES["every other block a mixture"][0])
    activate(model, Structure(model), {f"depth:{LAYERS}.0": 0})
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens(2, 5), **options)
    extract_described(model)
    for twin in (model, pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.generate(tokens(2, 5), **options), expected)
    # once more, from what is left
    before = sum(parameter.numel() for parameter in model.parameters())
    activate(model, Structure(model), {f"depth:{LAYERS}.3.attention": 0})
    expected = results(model, ids())
    extract_described(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    close(results(loaded, ids())[0], expected[0])
    assert sum(parameter.numel() for parameter in loaded.parameters()) < before


def test_a_model_inside_another_one(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.head = nn.Linear(VOCABULARY, 2)

        def forward(self, **inputs):
            return self.head(self.model(**inputs).logits)

    wrapped = Wrapped(tiny_gpt2(n_layer=3)).eval()
    values = {"depth:model.transformer.h.0": 0, "mlp:model.transformer.h.1": 64}
    activate(wrapped, Structure(wrapped), values)
    with torch.no_grad():
        expected = wrapped.model(**ids()).logits
        extract_described(wrapped)
        wrapped.model.save_pretrained(tmp_path)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        close(loaded(**ids()).logits, expected)


# -- a pruned model in floating point is an ordinary one ------------------------------------------------------------------


def uneven():
    """A Llama whose blocks have different sizes, and whose last block has no MLP."""
    model = tiny_llama(num_hidden_layers=3)
    values = {"mlp:model.layers.0": 24, "heads:model.layers.1": 2, "depth:model.layers.2.mlp": 0}
    activate(model, Structure(model), values)
    extract_described(model)
    return model


@pytest.mark.parametrize("source", ["extracted", "loaded"])
def test_trainer_and_casts(source, tmp_path):
    def make():
        model = uneven()
        if source == "loaded":
            model.save_pretrained(tmp_path / "model")
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert not getattr(model, "is_quantized", False) and getattr(model, "hf_quantizer", None) is None
        return model

    data = [{"input_ids": row, "labels": row} for row in tokens(4, 6)]
    arguments = transformers.TrainingArguments(
        tmp_path / "run",
        report_to=[],
        use_cpu=True,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=1,
    )
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != first
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) > 10
    again = type(model).from_pretrained(tmp_path / "run" / "checkpoint-2").eval()
    close(again(**ids()).logits, model.eval()(**ids()).logits)
    expected = make().eval()(**ids()).logits
    for cast in (
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half().float(),
    ):
        found = cast(make()).eval()(**ids()).logits.float()
        assert (found - expected).abs().max() < 0.05


def test_strict_state_dicts():
    model = uneven()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not any(twin.load_state_dict(model.state_dict(), strict=True))
    assert torch.equal(twin(**ids()).logits, model(**ids()).logits)


def test_a_model_with_weights_is_not_cut_behind_ones_back():
    """One that is built from such a configuration, and not loaded, is of full size: asking for its weights changes nothing."""
    config = uneven().config
    model = transformers.LlamaForCausalLM(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert before["model.layers.0.mlp.up_proj.weight"].shape == (48, 32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="does not describe it"):
        plan_extraction(model, {"depth:model.layers.0": 0})


@pytest.mark.skipif(not ops.is_available(), reason="no C++ extension")
def test_packed_layers_are_quantised_as_long_as_there_are_any(tmp_path):
    model = uneven().to(torch.float32)
    sparsify_linears(model, when="always", min_sparsity=0.0)
    expected = results(model, ids())[0]
    model.save_pretrained(tmp_path / "packed")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert loaded.is_quantized and torch.equal(results(loaded, ids())[0], expected)
    dense = loaded.dequantize()
    assert not dense.is_quantized
    dense.half().float().save_pretrained(tmp_path / "dense")
    assert way(tmp_path / "dense") == "described"
    close(results(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), ids())[0], expected, 1e-2)


FRESH = """
import sys, torch
import peft_elastic
import transformers
from support.models import tokens
found = {}
for folder in sys.argv[2:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model.half().float()
    assert not getattr(model, "is_quantized", False)
    with torch.no_grad():
        found[folder] = model(input_ids=tokens()).logits
torch.save(found, sys.argv[1])
"""


@pytest.mark.slow
def test_in_a_fresh_process(tmp_path):
    expected = {}
    removed = {"every other block a mixture": f"{LAYERS}.0", "scaled by the place": "transformer.h.1"}
    models = {"uneven": uneven()}
    for name, path in removed.items():
        models[name] = model_of(FAMILIES[name][0])
        activate(models[name], Structure(models[name]), {f"depth:{path}": 0})
        extract_described(models[name])
    for number, model in enumerate(models.values()):
        model.half().float().save_pretrained(tmp_path / str(number))
        expected[str(tmp_path / str(number))] = results(model, ids())[0]
    run = run_fresh(FRESH, tmp_path / "found.pt", *expected)
    assert run.returncode == 0, run.stderr
    for folder, logits in torch.load(tmp_path / "found.pt").items():
        close(logits, expected[folder], 1e-5)


# -- what goes wrong leaves everything as it was -----------------------------------------------------------------------------


class Unbuildable(transformers.LlamaForCausalLM):
    """What no configuration alone builds."""

    def __init__(self, config, extra=None):
        if extra is None:
            raise ValueError("it needs an `extra`")
        super().__init__(config)


def unbuildable():
    torch.manual_seed(0)
    return Unbuildable(tiny_llama(num_hidden_layers=3).config, extra=1).eval()


def test_what_cannot_be_described_is_refused_before_anything_happens(tmp_path):
    model = unbuildable()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    before = snapshot(model)
    with pytest.raises(ValueError, match="could be removed and saved, but not loaded.*it needs an `extra`"):
        prune_structured(model, MultiPrunerConfig(ratio=0.1, mlp_group=8), calibration_of("llama"), progress=False)
    for option in ({"elastic_depth": [1]}, {"elastic_width": {"mlp": [1.0, 0.5]}, "importance": "none"}):
        with pytest.raises(ValueError, match=f"`{next(iter(option))}.*it needs an `extra`"):
            get_peft_model(model, ElasticLoraConfig(r=4, target_modules=["q_proj"], **option))
    plan = PruningPlan("mine", {}, describe_model(model, Structure(model)), {"depth:model.layers.1": 0}, {}, {}, {})
    with pytest.raises(ValueError, match="it needs an `extra`"):
        plan.extract(model)
    same(before, snapshot(model))
    assert not calls
    # ranks alone change nothing of the base
    get_peft_model(model, ElasticLoraConfig(r=4, elastic_ranks=[4, 2], target_modules=["q_proj"]))


def test_units_that_cannot_be_described_are_not_offered(monkeypatch):
    """Here: an attention in the middle that the model gives orders to."""

    class Told(transformers.models.llama.modeling_llama.LlamaAttention):
        def set_mode(self, mode):
            self.mode = mode

    class Mixed(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[1].self_attn = Told(config, 1)

    torch.manual_seed(0)
    model = Mixed(tiny_llama(num_hidden_layers=3).config).eval()
    key = "depth:model.layers.1.attention"
    config = MultiPrunerConfig(ratio=0.3, stages=("attentions", "channels"), split=(1, 1), mlp_group=8)
    with pytest.warns(UserWarning, match="1 units such as 'depth:model.layers.1.attention' stay.*`set_mode`"):
        plan = prune_structured(model, config, calibration_of("llama"), progress=False)
    assert plan.values and key not in plan.values


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_extraction_that_fails_anywhere(error, monkeypatch):
    build = FAMILIES["windows of each layer"][0]
    values = {f"mlp:{LAYERS}.0": 16, f"heads:{LAYERS}.1": 2, f"depth:{LAYERS}.2.mlp": 0, f"depth:{LAYERS}.3": 0}
    counts = []

    def failing(function, at):
        def call(*args, **kwargs):
            counts[-1] += 1
            if counts[-1] == at:
                raise error("here")
            return function(*args, **kwargs)

        return call

    for where, name in ((float_backend, "cut_parameter"), (extraction, "_remove_blocks"), (description, "_settle")):
        at = 0
        while True:
            at += 9 if name == "cut_parameter" else 1
            model = model_of(build)
            activate(model, Structure(model), values)
            plans = plan_extraction(model)
            before, expected = snapshot(model), results(model, ids())
            counts.append(0)
            with monkeypatch.context() as patch:
                patch.setattr(where, name, failing(getattr(where, name), at))
                try:
                    extract_described(model, plans)
                    break
                except error:
                    same(before, snapshot(model))
                    assert torch.equal(results(model, ids())[0], expected[0])
        assert at > 1


def test_pruning_hands_out_its_plan(monkeypatch, tmp_path):
    model = tiny_llama(num_hidden_layers=4)
    config = MultiPrunerConfig(ratio=0.3, mlp_group=8)
    whole = copy.deepcopy(model)
    before = snapshot(model)
    plan = prune_structured(copy.deepcopy(model), config, calibration_of("llama"), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(description, "_settle", lambda *_: (_ for _ in ()).throw(ValueError("here")))
        with pytest.raises(ValueError, match="here") as raised:
            prune_structured(model, config, calibration_of("llama"), progress=False)
    same(before, snapshot(model))
    assert raised.value.plan.values == plan.values and raised.value.plan.units == plan.units
    raised.value.plan.save(tmp_path / "plan.json")
    extracted = PruningPlan.load(tmp_path / "plan.json").extract(copy.deepcopy(whole))
    close(results(extracted, ids())[0], results(plan.extract(whole), ids())[0])
    # in the middle: what had been removed until then
    calls = []

    def metric(model):
        calls.append(1)
        if len(calls) == 12:
            raise OSError("disk")
        return results(model, ids())[0].square().mean().item()

    with pytest.raises(OSError, match="disk") as raised:
        prune_structured(model, config, calibration_of("llama"), metric=metric, progress=False)
    same(before, snapshot(model))
    partial = raised.value.plan
    assert 0 < len(partial.history) < len(plan.history) and partial.values
    assert PruningPlan.from_json(partial.to_json()) == partial


def test_a_merge_that_is_refused_keeps_the_adapters(monkeypatch):
    model = adapted(tiny_llama(), elastic_depth=["1.mlp"])
    model.set_subnet("min")
    expected, keys = results(model, ids())[0], model.state_dict().keys()
    with monkeypatch.context() as patch:
        patch.setattr(description, "_plan", lambda *_, **__: (_ for _ in ()).throw(ValueError("not described")))
        for call in (model.merge_and_unload, lambda: model.extract_subnet("min")):
            with pytest.raises(ValueError, match="not described"):
                call()
            assert model.state_dict().keys() == keys and torch.equal(results(model, ids())[0], expected)
    randomize(model, seed=3, std=0.1, adapter_name="default")
    expected = results(model, ids())[0]
    close(results(model.merge_and_unload(sparse_kernel=False), ids())[0], expected)


# -- plans ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_blocks():
    return tiny_llama(num_hidden_layers=4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"mlp:model.layers.0": 49},
            r"`values\['mlp:model.layers.0'\]` must be one of the whole numbers from 1 to 48, got 49",
        ),
        ({"mlp:model.layers.0": 0}, ", got 0"),
        ({"mlp:model.layers.0": -8}, ", got -8"),
        ({"mlp:model.layers.0": 8.0}, ", got 8.0"),
        ({"mlp:model.layers.0": True}, ", got True"),
        ({"mlp:model.layers.0": "8"}, ", got '8'"),
        ({"mlp:model.layers.0": None}, ", got None"),
        ({"heads:model.layers.3": 3}, "must be one of the multiples of 2 from 2 to 4, got 3"),
        ({"depth:model.layers.1": 2}, r"must be 0 \(removed\) or 1, got 2"),
        ({"depth:model.layers.1": False}, ", got False"),
        ({"depth:model.layers.1.norm": 0}, "'depth:model.layers.1.norm' is no part"),
        ({"depth:model.layers.9": 0}, "is no part"),
        ({"mlp:model.layers": 8}, "is no part"),
        ({"rank:model.layers.0": 8}, "'rank:model.layers.0' is no part.*'heads:model.layers.0', say"),
        ({"nonsense": 1}, "'nonsense' is no part"),
        (
            {"mlp:model.layers.1": 8, "depth:model.layers.1": 0},
            "'mlp:model.layers.1' is 8, and 'depth:model.layers.1' is 0",
        ),
        ({"heads:model.layers.1": 2, "depth:model.layers.1.attention": 0}, "'depth:model.layers.1.attention' is 0"),
        ({f"depth:model.layers.{n}": 0 for n in range(4)}, "every block of 'model.layers' is removed"),
        (
            {f"depth:model.layers.{n}.{part}": 0 for n in range(4) for part in ("mlp", "attention")},
            "every block of 'model.layers' is removed",
        ),
    ],
    ids=str,
)
def test_values_of_a_plan_are_checked(four_blocks, values, message):
    model = four_blocks
    before = snapshot(model)
    plan = PruningPlan("mine", {}, describe_model(model, Structure(model)), values, {}, {}, {})
    for call in (plan.narrow, plan.extract, plan.check):
        with pytest.raises(ValueError, match=message):
            call(model)
    same(before, snapshot(model))


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"model.layers.0": [0, 1, 2, 3, 4, 5, 6, 48]}, "numbers from 0 to 47"),
        ({"model.layers.0": [-1]}, "numbers from 0 to 47"),
        ({"model.layers.0": list(range(9))}, "must have 8 different numbers"),
        ({"model.layers.0": [1] * 8}, "must have 8 different numbers"),
        ({"model.layers.0": [0.5]}, "must have 8 different numbers"),
        ({"model.layers.0": 3}, "must have 8 different numbers"),
        ({"model.layers.1": [0]}, "'model.layers.1' belongs to nothing"),
        ({"model.layers.0.self_attn": [0]}, "'model.layers.0.self_attn' belongs to nothing"),
    ],
    ids=str,
)
def test_units_of_a_plan_are_checked(four_blocks, units, message):
    model = four_blocks
    before = snapshot(model)
    plan = PruningPlan("mine", {}, describe_model(model, Structure(model)), {"mlp:model.layers.0": 8}, units, {}, {})
    for call in (plan.narrow, plan.extract):
        with pytest.raises(ValueError, match=message):
            call(model)
    same(before, snapshot(model))


def test_fields_of_a_plan_are_checked(four_blocks):
    model = describe_model(four_blocks, Structure(four_blocks))
    data = json.loads(PruningPlan("mine", {}, model, {}, {}, {}, {}).to_json())
    right = {"config": dict, "seconds": int, "block_passes": int, "evaluations": int, "method": str, "metric": str}
    for field in PruningPlan.__dataclass_fields__:
        for wrong in (None, True, 3, "text", [1], [[]], {"a": [True]}, {"a": "b"}, {"a": {}}):
            text = json.dumps({**data, field: wrong})
            if type(wrong) is right.get(field):
                assert PruningPlan.from_json(text)
                continue
            with pytest.raises(ValueError, match=f"not a pruning plan: '{field}'"):
                PruningPlan.from_json(text)


def test_a_plan_that_nests_without_end():
    with pytest.raises(ValueError, match="not valid JSON|not a pruning plan"):
        PruningPlan.from_json('{"format":' + "[" * 100_000)


def test_what_a_removed_attention_returns_is_found_out_again_when_a_model_is_loaded(tmp_path):
    """That of LayoutLM does not return what the layout says that fits the names of its layers."""
    config = transformers.LayoutLMConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.LayoutLMForMaskedLM(config).eval()
    randomize(model)
    structure = Structure(model)
    activate(model, structure, {f"depth:{structure.blocks[1].path}.attention": 0})
    with torch.no_grad():
        expected = model(tokens(2, 7)).logits
        extract_described(model)
        model.save_pretrained(tmp_path)
        loaded = transformers.LayoutLMForMaskedLM.from_pretrained(tmp_path).eval()
        close(loaded(tokens(2, 7)).logits, expected)
