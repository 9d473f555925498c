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
"""How the blocks of an architecture are built: where its heads and MLP channels are, and what a skipped part returns.

A layout says it with module paths and attribute names. The layouts below cover the families that transformers' models share;
`register_layout` adds one for another architecture:

    register_layout(BlockLayout(
        name="my-decoder",
        attentions=(AttentionLayout("attn", qkv=("wq", "wk", "wv"), out="wo", heads=("n_heads",)),),
        mlp=MLPLayout(inputs=("ff.w1", "ff.w3"), out="ff.w2", skip={"ff": skip_to_zeros}),
    ))
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


# What a skipped module computes instead of its forward: f(module, *args, **kwargs).
Skip = Callable[..., Any]


def skip_to_zeros(module: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Of a module whose output is added to the residual stream."""
    return torch.zeros_like(hidden_states)


def skip_attention(module: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[Any, None]:
    """Of an attention that returns (what is added to the residual stream, attention weights)."""
    return torch.zeros_like(hidden_states), None


def skip_block(module: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Of a block that returns the hidden states alone."""
    return hidden_states


def skip_residual_attention(
    module: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Of an attention with the residual connection, and the norm behind it, inside."""
    return hidden_states, None


def _skip_inputs(module: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Of the first layer of an MLP, whose result nobody reads."""
    return hidden_states[..., :0]


def _skip_outputs(module: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Of the last layer of an MLP without a module of its own."""
    return hidden_states.new_zeros((*hidden_states.shape[:-1], module.out_features))


def _skip_bert_output(module: nn.Module, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
    return input_tensor


def _skip_t5_attention(
    module: nn.Module, hidden_states: torch.Tensor, *args: Any, position_bias: Any = None, **kwargs: Any
) -> tuple[torch.Tensor, Any, None]:
    return hidden_states, position_bias, None


def _skip_t5_block(
    module: nn.Module,
    hidden_states: torch.Tensor,
    attention_mask: Any = None,
    position_bias: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    encoder_decoder_position_bias: Any = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any, Any]:
    return hidden_states, position_bias, encoder_decoder_position_bias


@dataclass(frozen=True)
class Returning:
    """A skip that returns its first tensor in the way in which the module itself does.

    Args:
        skip (`Skip`): makes the tensor.
        kind (`"tensor"`, `"tuple"` or `"list"`): of result.
        length (`int`): of a tuple or list, whose other entries are those that `skip` returns, or None.
    """

    skip: Skip
    kind: str
    length: int

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made = self.skip(module, *args, **kwargs)
        entries = list(made) if isinstance(made, (tuple, list)) else [made]
        if self.kind == "tensor":
            return entries[0]
        entries = (entries + [None] * self.length)[: self.length]
        return entries if self.kind == "list" else tuple(entries)


@dataclass(frozen=True)
class AttentionLayout:
    """An attention. All paths are relative to the block.

    Args:
        module (`str`): path of the module whose forward splits the projections into heads.
        qkv (`tuple[str, ...]`): paths, relative to `module`, of the query, key and value projections, or of the one that
            holds all three.
        out (`str`): path of the output projection, relative to `module`; one that starts with "/" to the block.
        interleaved (`bool`): a single projection holds query, key and value head by head; by default all queries come first,
            then all keys, then all values.
        head_dim (`tuple[str, ...]`): attributes of `module`, the first there is gives the size of a head.
        heads, kv_heads, features (`tuple[str, ...]`): attributes of `module` that hold the number of query heads, of key and
            value heads, and the size of all query heads together. They follow the active width; those that a module does not
            have are passed over.
        reads_config (`bool`): the forward reads the numbers of heads from `module.config`.
        per_head (`tuple[str, ...]`): paths, relative to `module`, of embeddings with one column for each head, where there are
            any.
        skip (`Mapping[str, Skip]`): by path of a module, what it returns where the attention is skipped.
        cross (`bool`): reads the encoder.
    """

    module: str
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "o_proj"
    interleaved: bool = False
    head_dim: tuple[str, ...] = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
    heads: tuple[str, ...] = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    kv_heads: tuple[str, ...] = ("num_key_value_heads", "num_kv_heads")
    features: tuple[str, ...] = ("all_head_size", "inner_dim", "split_size")
    reads_config: bool = False
    per_head: tuple[str, ...] = ()
    skip: Mapping[str, Skip] = field(default_factory=dict)
    cross: bool = False

    def path(self, name: str) -> str:
        """Path relative to the block of what is given relative to `module`."""
        return name[1:] if name.startswith("/") else f"{self.module}.{name}"


@dataclass(frozen=True)
class MLPLayout:
    """An MLP. All paths are relative to the block.

    Args:
        inputs (`tuple[str, ...]`): paths of the layers that make the channels.
        out (`str`): path of the layer that reads them.
        stacked (`int`): how many sets of channels each of `inputs` holds, one after the other: 2 where gate and up are one.
        size (`str`): what the configuration calls the number of channels.
        features (`tuple[str, ...]`): attributes, of the module that holds `out`, with the number of channels. They follow the
            active width; those that a module does not have are passed over.
        skip (`Mapping[str, Skip]`): by path of a module, what it returns where the MLP is skipped.
    """

    inputs: tuple[str, ...]
    out: str
    stacked: int = 1
    size: str = "intermediate_size"
    features: tuple[str, ...] = ("intermediate_size", "ffn_dim", "d_ff", "hidden_dim")
    skip: Mapping[str, Skip] = field(default_factory=dict)


@dataclass(frozen=True)
class BlockLayout:
    """A transformer block.

    Args:
        name (`str`): of the layout.
        attentions (`tuple[AttentionLayout, ...]`): in the order of their use; none if heads cannot be narrowed.
        mlp (`MLPLayout`, *optional*): none if channels cannot be narrowed.
        skip (`Skip`): what a skipped block returns.
        tied_heads (`bool`): the blocks of a stack share state with one entry for each head, so that they have the same heads.
        first_is_fixed (`bool`): the first block of a stack, and its attention, make something for the others, so that they
            cannot be skipped.
    """

    name: str
    attentions: tuple[AttentionLayout, ...] = ()
    mlp: MLPLayout | None = None
    skip: Skip = skip_block
    tied_heads: bool = False
    first_is_fixed: bool = False

    def paths(self, without: Collection[str] = ()) -> list[str]:
        """The linear layers that a block must have, but for those of parts ("attention", "mlp") that were removed."""
        names = [a.path(name) for a in self.attentions if "attention" not in without for name in (*a.qkv, a.out)]
        return names + ([] if self.mlp is None or "mlp" in without else [*self.mlp.inputs, self.mlp.out])


_LAYOUTS: dict[str, BlockLayout] = {}


def register_layout(layout: BlockLayout) -> None:
    """Make an architecture known to elastic width and depth. A layout fits every block in which all of its paths lead to
    layers; the one that was registered last is tried first.

    Raises:
        ValueError: for a layout without attention and MLP.
    """
    if not layout.attentions and layout.mlp is None:
        raise ValueError(f"`layout` {layout.name!r} has neither `attentions` nor an `mlp`.")
    _LAYOUTS.pop(layout.name, None)
    _LAYOUTS[layout.name] = layout


def layouts() -> list[BlockLayout]:
    """All layouts, in the order in which they are tried."""
    return list(reversed(_LAYOUTS.values()))


_SELF_ATTENTION = {"self_attn": skip_attention}
_GATED = MLPLayout(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", skip={"mlp": skip_to_zeros})
_LLAMA_ATTENTION = AttentionLayout("self_attn", skip=_SELF_ATTENTION)
_FC = MLPLayout(("fc1",), "fc2", size="ffn_dim", skip={"fc1": _skip_inputs, "fc2": _skip_outputs})
_OPT_ATTENTION = AttentionLayout(
    "self_attn",
    out="out_proj",
    features=("all_head_size", "inner_dim", "split_size", "embed_dim"),
    skip=_SELF_ATTENTION,
)
_BERT = AttentionLayout(
    "attention.self",
    ("query", "key", "value"),
    "/attention.output.dense",
    skip={"attention": skip_residual_attention},
)


def _t5_mlp(position: int, inputs: tuple[str, ...]) -> MLPLayout:
    layer = f"layer.{position}"
    names = tuple(f"{layer}.DenseReluDense.{name}" for name in inputs)
    return MLPLayout(names, f"{layer}.DenseReluDense.wo", size="d_ff", skip={layer: skip_block})


_T5_SELF = AttentionLayout(
    "layer.0.SelfAttention",
    ("q", "k", "v"),
    "o",
    per_head=("relative_attention_bias",),
    skip={"layer.0": _skip_t5_attention},
)
_T5_CROSS = AttentionLayout(
    "layer.1.EncDecAttention", ("q", "k", "v"), "o", skip={"layer.1": _skip_t5_attention}, cross=True
)

# From the most general to the most special.
for _layout in (
    # an attention or an MLP that is known beside one that is not, a mixture of experts say
    BlockLayout("gated MLP", (), _GATED),
    BlockLayout("Llama attention", (_LLAMA_ATTENTION,)),
    # Llama, Mistral, Qwen, Gemma, SmolLM, ...
    BlockLayout("Llama", (_LLAMA_ATTENTION,), _GATED),
    BlockLayout(
        "Phi",
        (AttentionLayout("self_attn", out="dense", skip=_SELF_ATTENTION),),
        MLPLayout(("mlp.fc1",), "mlp.fc2", skip={"mlp": skip_to_zeros}),
    ),
    BlockLayout(
        "Phi-3",
        (AttentionLayout("self_attn", ("qkv_proj",), reads_config=True, skip=_SELF_ATTENTION),),
        MLPLayout(("mlp.gate_up_proj",), "mlp.down_proj", stacked=2, skip={"mlp": skip_to_zeros}),
    ),
    # GPT-BigCode without multi-query attention; of the same layers as the next, which is tried first
    BlockLayout(
        "GPT-2, head by head",
        (AttentionLayout("attn", ("c_attn",), "c_proj", True, skip={"attn": skip_attention}),),
        MLPLayout(("mlp.c_fc",), "mlp.c_proj", size="n_inner", skip={"mlp": skip_to_zeros}),
    ),
    BlockLayout(
        "GPT-2",
        (AttentionLayout("attn", ("c_attn",), "c_proj", skip={"attn": skip_attention}),),
        MLPLayout(("mlp.c_fc",), "mlp.c_proj", size="n_inner", skip={"mlp": skip_to_zeros}),
    ),
    BlockLayout(
        "GPT-NeoX",
        (AttentionLayout("attention", ("query_key_value",), "dense", True, skip={"attention": skip_attention}),),
        MLPLayout(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", skip={"mlp": skip_to_zeros}),
    ),
    BlockLayout(
        "ViT",
        (AttentionLayout("attention", skip={"attention": skip_attention}),),
        MLPLayout(("mlp.fc1",), "mlp.fc2", skip={"mlp": skip_to_zeros}),
    ),
    BlockLayout(
        "DistilBERT",
        (AttentionLayout("attention", ("q_lin", "k_lin", "v_lin"), "out_lin", skip={"attention": skip_attention}),),
        MLPLayout(("ffn.lin1",), "ffn.lin2", size="hidden_dim", skip={"ffn": skip_to_zeros}),
    ),
    # OPT, and the encoders and decoders of BART and Whisper
    BlockLayout("OPT", (_OPT_ATTENTION,), _FC),
    BlockLayout(
        "BERT",
        (_BERT,),
        MLPLayout(
            ("intermediate.dense",),
            "output.dense",
            skip={"intermediate": _skip_inputs, "output": _skip_bert_output},
        ),
    ),
    BlockLayout(
        "T5 encoder",
        (_T5_SELF,),
        _t5_mlp(1, ("wi",)),
        _skip_t5_block,
        tied_heads=True,
        first_is_fixed=True,
    ),
    BlockLayout(
        "gated T5 encoder",
        (_T5_SELF,),
        _t5_mlp(1, ("wi_0", "wi_1")),
        _skip_t5_block,
        tied_heads=True,
        first_is_fixed=True,
    ),
    BlockLayout(
        "T5 decoder",
        (_T5_SELF, _T5_CROSS),
        _t5_mlp(2, ("wi",)),
        _skip_t5_block,
        tied_heads=True,
        first_is_fixed=True,
    ),
    BlockLayout(
        "gated T5 decoder",
        (_T5_SELF, _T5_CROSS),
        _t5_mlp(2, ("wi_0", "wi_1")),
        _skip_t5_block,
        tied_heads=True,
        first_is_fixed=True,
    ),
):
    register_layout(_layout)
