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
"""A Llama of transformers as a GGUF file, so that llama.cpp runs the very weights that the benchmark runs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: nn.Module, path: Path, kind: str) -> None:
    """Writes weights and shape, without a vocabulary. `kind` of the matrices: "f16", "bf16" or "q8_0"; norms stay float32."""
    import gguf

    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    stored_as = getattr(gguf.GGMLQuantizationType, kind.upper())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    def add(name: str, tensor: Tensor) -> None:
        values = tensor.detach().float().contiguous().numpy()
        if tensor.dim() == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, stored_as), raw_dtype=stored_as)

    def permute(weight: Tensor, heads: int) -> Tensor:
        # llama.cpp rotates neighbouring pairs of a head, transformers its two halves.
        return weight.view(heads, 2, head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)

    add("token_embd", model.model.embed_tokens.weight)
    add("output_norm", model.model.norm.weight)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        add("output", model.lm_head.weight)
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in _NAMES.items():
            weight = layer.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
                weight = permute(weight, heads)
            add(f"blk.{index}.{theirs}", weight)
    with torch.no_grad():
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    writer.close()
