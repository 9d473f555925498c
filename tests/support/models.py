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
"""Tiny random models for the tests: built from configurations, without a hub, with the same weights at every call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.integrations.peft import MIN_PEFT_VERSION


VOCABULARY = 96
# For `model.add_adapter` of transformers, which may ask for a peft that is not out yet, as 5.24.0 does.
TRANSFORMERS_ADAPTERS = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers {transformers.__version__} takes adapters of peft {MIN_PEFT_VERSION} or newer alone",
)
# What the forwards of the installed transformers call their key-value cache.
CACHE = next(
    name
    for name, parameter in inspect.signature(transformers.LlamaModel.forward).parameters.items()
    if "Cache" in str(parameter.annotation)
)


def build(model_cls: type, config_cls: type, seed: int = 0, **settings: Any) -> Any:
    """A model of random weights, in evaluation mode. Weights are larger than transformers' default, so that errors in
    them show in the outputs."""
    torch.manual_seed(seed)
    model = model_cls(config_cls(**{"initializer_range": 0.1} | settings)).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def _decoder(**settings: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    } | settings


def tiny_llama(**settings: Any) -> Any:
    return build(transformers.LlamaForCausalLM, transformers.LlamaConfig, **_decoder(**settings))


def tiny_llama_classifier(**settings: Any) -> Any:
    return build(
        transformers.LlamaForSequenceClassification, transformers.LlamaConfig, **_decoder(num_labels=3, **settings)
    )


def tiny_qwen2(**settings: Any) -> Any:
    return build(transformers.Qwen2ForCausalLM, transformers.Qwen2Config, **_decoder(**settings))


def tiny_mistral(**settings: Any) -> Any:
    return build(transformers.MistralForCausalLM, transformers.MistralConfig, **_decoder(**settings))


def tiny_gemma(**settings: Any) -> Any:
    """Its embedding is tied with its output layer."""
    return build(
        transformers.GemmaForCausalLM,
        transformers.GemmaConfig,
        **_decoder(head_dim=8, tie_word_embeddings=True, **settings),
    )


def tiny_phi(**settings: Any) -> Any:
    return build(transformers.PhiForCausalLM, transformers.PhiConfig, **_decoder(num_key_value_heads=4, **settings))


def tiny_gpt2(**settings: Any) -> Any:
    return build(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        **{
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        | settings,
    )


def tiny_opt(**settings: Any) -> Any:
    return build(
        transformers.OPTForCausalLM,
        transformers.OPTConfig,
        **_decoder(ffn_dim=48, word_embed_proj_dim=32, init_std=0.1, **settings),
    )


def tiny_bert(**settings: Any) -> Any:
    return build(
        transformers.BertForSequenceClassification, transformers.BertConfig, **_decoder(num_labels=3, **settings)
    )


def tiny_t5(**settings: Any) -> Any:
    return build(
        transformers.T5ForConditionalGeneration,
        transformers.T5Config,
        **{
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_ff": 48,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        }
        | settings,
    )


def tiny_vit(**settings: Any) -> Any:
    return build(
        transformers.ViTForImageClassification,
        transformers.ViTConfig,
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 8,
            "num_labels": 3,
        }
        | settings,
    )


def tiny_qwen3(**settings: Any) -> Any:
    """With a norm of each query and key head."""
    return build(transformers.Qwen3ForCausalLM, transformers.Qwen3Config, **_decoder(head_dim=8, **settings))


_HYBRID = {
    "num_hidden_layers": 3,
    "head_dim": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "tie_word_embeddings": True,
}


def tiny_gemma2(**settings: Any) -> Any:
    """Layers with sliding and with full attention, norms in front of the residual connections."""
    return build(transformers.Gemma2ForCausalLM, transformers.Gemma2Config, **_decoder(**_HYBRID, **settings))


def tiny_gemma3(**settings: Any) -> Any:
    """Layers with sliding and with full attention, which have different position embeddings."""
    return build(transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, **_decoder(**_HYBRID, **settings))


def tiny_phi3(**settings: Any) -> Any:
    """Queries, keys and values in one layer, gate and up in one."""
    return build(transformers.Phi3ForCausalLM, transformers.Phi3Config, **_decoder(**settings))


def tiny_gpt_neox(**settings: Any) -> Any:
    """Queries, keys and values in one layer, head by head."""
    return build(transformers.GPTNeoXForCausalLM, transformers.GPTNeoXConfig, **_decoder(**settings))


def tiny_roberta(**settings: Any) -> Any:
    return build(
        transformers.RobertaForSequenceClassification, transformers.RobertaConfig, **_decoder(num_labels=3, **settings)
    )


def tiny_distilbert(**settings: Any) -> Any:
    return build(
        transformers.DistilBertForSequenceClassification,
        transformers.DistilBertConfig,
        **{
            "vocab_size": VOCABULARY,
            "dim": 32,
            "hidden_dim": 48,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "num_labels": 3,
        }
        | settings,
    )


def tiny_gated_t5(**settings: Any) -> Any:
    return tiny_t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False, **settings)


def tiny_mixtral(**settings: Any) -> Any:
    """A mixture of experts; its experts are parameters `(experts, out, in)`, to be named in `target_parameters`."""
    return build(
        transformers.MixtralForCausalLM,
        transformers.MixtralConfig,
        **_decoder(num_local_experts=4, num_experts_per_tok=2, **settings),
    )


class ConvNet(nn.Module):
    """Convolutions over `dim` dimensions, one of them in groups, and a linear head."""

    def __init__(self, dim: int = 2, groups: int = 2) -> None:
        super().__init__()
        conv_cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
        self.conv = conv_cls(3, 8, 3, stride=2, padding=1)
        self.grouped = conv_cls(8, 12, 3, padding=1, groups=groups)
        self.pointwise = conv_cls(12, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(torch.tanh(self.conv(x)))
        return self.head(self.pointwise(torch.tanh(x)).flatten(2).mean(dim=-1))


class AttentionNet(nn.Module):
    """`nn.MultiheadAttention`, whose weights peft adapts as a whole, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.last = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(self.attention(x, x, x)[0])


class EmbeddingNet(nn.Module):
    """An embedding, a `transformers` Conv1D, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.conv1d = transformers.pytorch_utils.Conv1D(16, 12)
        self.linear = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.tanh(self.conv1d(self.embedding(x))))


class OddLora(nn.Module, LoraLayer):
    """A user's own LoRA layer, whose A and B are of a kind that cannot be elastic."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return 4, 4

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        self.r[adapter_name] = config.r
        self.lora_A[adapter_name] = nn.Bilinear(2, 2, config.r)
        self.lora_B[adapter_name] = nn.Bilinear(2, 2, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


def net(net_cls: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return net_cls(*args, **kwargs).eval()


def tokens(batch: int = 3, length: int = 7, seed: int = 0, low: int = 3) -> torch.Tensor:
    """Token ids for every model here, int64 (batch, length), without special tokens."""
    return torch.randint(low, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def _language(batch: int = 3) -> dict[str, torch.Tensor]:
    ids = tokens(batch)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class Architecture:
    """A model and what the tests must know of it.

    Args:
        build: returns the model.
        inputs: returns its inputs.
        modules: for one module name of each kind, how many of them a model has.
        groups: a `rank_groups` list for it.
        blocks: paths of its transformer blocks.
    """

    build: Callable[[], Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    modules: dict[str, int]
    groups: list[list[str]]
    blocks: list[str]


_QKV = {"q_proj": 2, "k_proj": 2, "v_proj": 2}
_GATED = {"gate_proj": 2, "up_proj": 2, "down_proj": 2}
_LAYERS = ["model.layers.0", "model.layers.1"]
_LLAMA_GROUPS = [["q_proj", "k_proj", "v_proj"], ["up_proj", "gate_proj"], ["down_proj"]]

ARCHITECTURES = {
    "llama": Architecture(tiny_llama, _language, _QKV | {"o_proj": 2} | _GATED, _LLAMA_GROUPS, _LAYERS),
    "qwen2": Architecture(tiny_qwen2, _language, _QKV | {"o_proj": 2} | _GATED, _LLAMA_GROUPS, _LAYERS),
    "mistral": Architecture(tiny_mistral, _language, _QKV | {"o_proj": 2} | _GATED, _LLAMA_GROUPS, _LAYERS),
    "gemma": Architecture(tiny_gemma, _language, _QKV | {"o_proj": 2} | _GATED, _LLAMA_GROUPS, _LAYERS),
    "phi": Architecture(
        tiny_phi,
        _language,
        _QKV | {"dense": 2, "fc1": 2, "fc2": 2},
        [["q_proj", "k_proj", "v_proj"], ["fc1", "fc2"]],
        _LAYERS,
    ),
    "gpt2": Architecture(
        tiny_gpt2,
        _language,
        {"c_attn": 2, "attn.c_proj": 2, "c_fc": 2, "mlp.c_proj": 2},
        [["c_attn", "attn.c_proj"], ["c_fc", "mlp.c_proj"]],
        ["transformer.h.0", "transformer.h.1"],
    ),
    "opt": Architecture(
        tiny_opt,
        _language,
        _QKV | {"out_proj": 2, "fc1": 2, "fc2": 2},
        [["q_proj", "k_proj", "v_proj"], ["fc1", "fc2"]],
        ["model.decoder.layers.0", "model.decoder.layers.1"],
    ),
    "bert": Architecture(
        tiny_bert,
        _language,
        {"query": 2, "key": 2, "value": 2, "attention.output.dense": 2, "intermediate.dense": 2},
        [["query", "key", "value"], ["attention.output.dense", "intermediate.dense"]],
        ["bert.encoder.layer.0", "bert.encoder.layer.1"],
    ),
    "t5": Architecture(
        tiny_t5,
        lambda: _language() | {"decoder_input_ids": tokens(length=5, seed=1)},
        {"q": 6, "k": 6, "v": 6, "wi": 4, "wo": 4},
        [["q", "k", "v"], ["wi", "wo"]],
        ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"],
    ),
    "vit": Architecture(
        tiny_vit,
        lambda: {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))},
        _QKV | {"o_proj": 2, "fc1": 2, "fc2": 2},
        [["q_proj", "k_proj", "v_proj"], ["fc1", "fc2"]],
        ["vit.layers.0", "vit.layers.1"],
    ),
}


@dataclass(frozen=True)
class Blocks:
    """A model with transformer blocks, and where their parts are: what the tests of width and depth know of it themselves.

    Args:
        build: returns the model, whose blocks have 4 heads of size 8 and 48 channels.
        path: of a block, with its number left open.
        attention, mlp: paths in a block of the layers that read the heads and the channels.
        kv_heads: how many there are.
        inputs: returns its inputs.
        count: of blocks.
        post_norm: names of the modules that a skipped attention and a skipped MLP leave out together with their norms; none where
            these are in front.
    """

    build: Callable[..., Any]
    path: str = "model.layers.{}"
    attention: str = "self_attn.o_proj"
    mlp: str = "mlp.down_proj"
    kv_heads: int = 2
    inputs: Callable[[], dict[str, torch.Tensor]] = _language
    count: int = 2
    post_norm: tuple[str, ...] = ()


def _padded() -> dict[str, torch.Tensor]:
    inputs = _language()
    inputs["attention_mask"][0, :2] = 0
    return inputs


_BERT_PARTS = ("attention.output.dense", "output.dense", 4, _padded, 2, ("attention", "output"))
BLOCKS = {
    "llama": Blocks(tiny_llama, inputs=_padded),
    "qwen2": Blocks(tiny_qwen2),
    "qwen3": Blocks(tiny_qwen3),
    "mistral": Blocks(tiny_mistral),
    "gemma": Blocks(tiny_gemma),
    "gemma2": Blocks(tiny_gemma2, count=3),
    "gemma3": Blocks(tiny_gemma3, count=3, inputs=_padded),
    "phi": Blocks(tiny_phi, attention="self_attn.dense", mlp="mlp.fc2", kv_heads=4),
    "phi3": Blocks(tiny_phi3),
    "gpt2": Blocks(lambda **s: tiny_gpt2(n_inner=48, **s), "transformer.h.{}", "attn.c_proj", "mlp.c_proj", 4),
    "gpt_neox": Blocks(tiny_gpt_neox, "gpt_neox.layers.{}", "attention.dense", "mlp.dense_4h_to_h", 4),
    "opt": Blocks(tiny_opt, "model.decoder.layers.{}", "self_attn.out_proj", "fc2", 4, _padded),
    "bert": Blocks(tiny_bert, "bert.encoder.layer.{}", *_BERT_PARTS),
    "roberta": Blocks(tiny_roberta, "roberta.encoder.layer.{}", *_BERT_PARTS),
    "distilbert": Blocks(
        tiny_distilbert, "distilbert.transformer.layer.{}", "attention.out_lin", "ffn.lin2", 4, _padded
    ),
    "vit": Blocks(tiny_vit, "vit.layers.{}", "attention.o_proj", "mlp.fc2", 4, ARCHITECTURES["vit"].inputs),
}
# Those with an encoder and a decoder, whose blocks differ.
T5S = {"t5": tiny_t5, "gated t5": tiny_gated_t5}


def randomize(model: nn.Module, seed: int = 0, std: float = 0.2, adapter_name: str | None = None) -> None:
    """Fill the adapter's weights, B too, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name and (adapter_name is None or f".{adapter_name}" in name):
            values = torch.randn(parameter.shape, generator=generator) * std
            parameter.data.copy_(values)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Any, **kwargs: Any) -> torch.Tensor:
    """Logits, in whatever mode the model is."""
    result = model(**inputs, **kwargs) if isinstance(inputs, dict) else model(inputs, **kwargs)
    return result if isinstance(result, torch.Tensor) else result.logits


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
