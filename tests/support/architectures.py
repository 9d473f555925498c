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
"""Tiny models of every architecture of transformers for which generic small numbers make one, and inputs for them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto import configuration_auto, modeling_auto


VOCABULARY = 96
_LAYERS = 3
# What configurations call their numbers -> a small one.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(
        "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim hidden_dim_model projection_dim word_embed_proj_dim "
        "embedding_dim encoder_hidden_size cross_attention_hidden_size hidden_sizes_last width lru_width".split(),
        32,
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim moe_intermediate_size d_inner "
        "shared_expert_intermediate_size ffn_hidden_size mlp_dim dim_feedforward encoder_intermediate_size feed_forward_size".split(),
        48,
    ),
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers "
        "encoder_num_hidden_layers decoder_num_hidden_layers depth".split(),
        _LAYERS,
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "encoder_num_attention_heads decoder_num_attention_heads".split(),
        4,
    ),
    **dict.fromkeys(
        "num_key_value_heads num_kv_heads n_head_kv decoder_num_key_value_heads encoder_num_key_value_heads".split(), 2
    ),
    **dict.fromkeys("head_dim d_kv attention_head_size kv_channels global_head_dim".split(), 8),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_k moe_topk num_experts_per_token moe_top_k".split(), 2),
    **dict.fromkeys(
        "vocab_size src_vocab_size tgt_vocab_size vocab_size_per_layer_input text_vocab_size".split(), VOCABULARY
    ),
    **dict.fromkeys("max_position_embeddings n_positions max_seq_len max_target_positions n_ctx".split(), 64),
    **dict.fromkeys("max_encoder_position_embeddings max_decoder_position_embeddings".split(), 64),
    "max_source_positions": 16,
    "num_mel_bins": 16,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
    "sliding_window": 4,
    "attention_window": 4,
    "local_radius": 4,
    "block_size": 4,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "rotary_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "conv_dim": [16, 16],
    "conv_stride": [4, 4],
    "conv_kernel": [4, 4],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "hidden_sizes": [32, 32, 32, 32],
    "langs": ["a", "b"],
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "first_k_dense_replace": 1,
    "attention_types": [[["global", "local", "global"], 1]],
    "layerdrop": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
_MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
)
# What some need beside, or otherwise.
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"num_key_value_heads": 4},
    {"hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embed_dim": 64, "embedding_size": 64},
    {"num_hidden_layers": 4, "num_layers": 4, "n_layer": 4, "n_layers": 4},
)


def _small_numbers(config: PreTrainedConfig, changes: dict[str, Any]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    small = _SMALL | changes
    names = set(config.__dict__) | set(getattr(config, "attribute_map", {}))
    mapped = set(getattr(config, "attribute_map", {}))
    for name in sorted(names):
        value = config.__dict__.get(name)
        if isinstance(value, PreTrainedConfig):
            numbers[name] = _small_numbers(value, changes) | (
                {"model_type": value.model_type} if value.model_type else {}
            )
        elif name in small and name not in mapped:
            if isinstance(value, (list, tuple)) and not isinstance(small[name], list):
                continue
            if value is None and name in ("sliding_window", "q_lora_rank", "n_group", "topk_group"):
                continue
            numbers[name] = copy.deepcopy(small[name])
    return numbers


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights, norms and biases too, so that an error in any of them shows."""
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        with torch.no_grad():
            parameter.copy_(noise * 0.2 if parameter.dim() > 1 else parameter + noise * 0.2)
    return model.eval()


def inputs_of(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Inputs that may fit, the likely ones first."""
    random = torch.Generator().manual_seed(3)
    config: Any = model.config
    ids = torch.randint(4, VOCABULARY, (2, 9), generator=random)
    other = torch.randint(4, VOCABULARY, (2, 7), generator=random)
    names = set(transformers.utils.generic.inspect.signature(model.forward).parameters)
    pixels = None
    if "pixel_values" in names:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", 16)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        pixels = torch.randn(2, getattr(vision, "num_channels", 3) or 3, height, width, generator=random)
    if "decoder_input_ids" in names:
        if "input_ids" in names:
            yield {"input_ids": ids, "decoder_input_ids": other}
        if "input_features" in names:
            for shape in ((2, 16, 32), (2, 32, 16)):
                yield {"input_features": torch.randn(shape, generator=random), "decoder_input_ids": other}
        if "input_values" in names:
            yield {"input_values": torch.randn(2, 400, generator=random), "decoder_input_ids": other}
    if "input_ids" in names:
        yield {"input_ids": ids}
        if pixels is not None:
            yield {"input_ids": ids, "pixel_values": pixels}
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if pixels is not None:
        yield {"pixel_values": pixels}
    if "input_features" in names:
        for shape in ((2, 16, 32), (2, 32, 16)):
            yield {"input_features": torch.randn(shape, generator=random)}
    if "input_values" in names:
        for shape in ((2, 400), (2, 64, 16), (2, 1024, 128)):
            yield {"input_values": torch.randn(shape, generator=random)}


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Any], **more: Any) -> torch.Tensor:
    """The first tensor of floats that has a batch."""
    torch.manual_seed(0)  # some leave out parts of their inputs at random
    output = model(**inputs, **more)
    values = output.values() if hasattr(output, "values") else output
    batch = next(iter(inputs.values())).shape[0]
    return next(
        v
        for v in values
        if isinstance(v, torch.Tensor) and v.is_floating_point() and v.dim() > 1 and v.shape[0] == batch
    )


def model_classes() -> dict[str, list[type]]:
    """Of every type of configuration, the classes of models to be tried, by the type's name."""
    found: dict[str, list[type]] = {}
    for model_type in configuration_auto.CONFIG_MAPPING_NAMES:
        for mapping in _MAPPINGS:
            names = getattr(modeling_auto, mapping).get(model_type, ())
            for name in (names,) if isinstance(names, str) else names:
                cls = getattr(transformers, name, None)
                if isinstance(cls, type) and cls not in found.setdefault(model_type, []):
                    found[model_type].append(cls)
    return found


def tiny(model_type: str, classes: list[type]) -> tuple[nn.Module, dict[str, torch.Tensor]] | str:
    """A tiny model and inputs that it takes, or why there is none."""
    reason = "no model class"
    config_cls = getattr(transformers, configuration_auto.CONFIG_MAPPING_NAMES[model_type], None)
    if config_cls is None:
        return "no configuration class"
    for changes in _VARIANTS:
        try:
            config = config_cls(**_small_numbers(config_cls(), changes))
        except Exception as error:  # noqa: BLE001 - of libraries that are not there, and whatever a configuration checks
            reason = f"config: {type(error).__name__}: {str(error)[:100]}"
            continue
        for cls in classes:
            try:
                with torch.device("meta"):
                    size = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
                if size > 20_000_000:
                    reason = f"{cls.__name__} has {size} parameters"
                    continue
                torch.manual_seed(0)
                model = filled(cls(copy.deepcopy(config)).float())
            except Exception as error:  # noqa: BLE001
                reason = f"{cls.__name__}: {type(error).__name__}: {str(error)[:100]}"
                continue
            for inputs in inputs_of(model):
                try:
                    if torch.isfinite(run(model, inputs)).all():
                        return model, inputs
                    reason = f"{cls.__name__}: outputs are not finite"
                except Exception as error:  # noqa: BLE001
                    reason = f"{cls.__name__} does not run: {type(error).__name__}: {str(error)[:100]}"
    return reason
