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
"""What the tests of work on folders share: small models of several architectures, saved in shards, and what their files hold."""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load, load_file, save_file
from support.models import VOCABULARY, build, tiny_gpt2, tiny_llama


def mixtral():
    return build(
        transformers.MixtralForCausalLM, transformers.MixtralConfig, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip


def t5():
    return build(
        transformers.T5ForConditionalGeneration, transformers.T5Config, vocab_size=VOCABULARY, d_model=32, d_ff=48, d_kv=8,
        num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip


def gemma3():
    return build(
        transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=4,
    )  # fmt: skip


def opt():
    return build(
        transformers.OPTForCausalLM, transformers.OPTConfig, vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip


MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "mixtral": mixtral, "t5": t5, "gemma3": gemma3, "opt": opt}


def batches(model, count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(3, VOCABULARY, (2, 7 + i), generator=generator)
        found.append({"input_ids": ids, "labels": ids} if model.config.is_encoder_decoder else {"input_ids": ids})
    return found


def saved(model, folder, dtype=torch.bfloat16, shard="20KB"):
    """The model in shards whose borders run through blocks; returns the folder."""
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors(folder):
    """All tensors in the files of a folder, by name."""
    return {k: v for file in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(file).items()}


def tensors_in(files):
    """The same of the bytes of files by their names."""
    return {k: v for name, data in files.items() if name.endswith(".safetensors") for k, v in load(data).items()}


def same(one, other):
    """Whether two sets of tensors are the same, bit by bit."""
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


def contents(folder):
    """The bytes of every file, by name; hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def index(folder):
    return json.loads((Path(folder) / "model.safetensors.index.json").read_text())


def rewrite(file, change):
    """Pass the tensors of a file through `change`, which may alter the dict."""
    found = load_file(file)
    change(found)
    save_file({k: v.contiguous() for k, v in found.items()}, file, metadata={"format": "pt"})
