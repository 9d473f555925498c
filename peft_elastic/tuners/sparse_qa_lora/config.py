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
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from peft.utils import PeftType

from ...common.checks import check_bool, check_choice, wrong
from ...layers.grid import CLIPPING, check_grid_options
from ..elastic_lora.config import ElasticLoraConfig


# Initialisations that leave the base weights alone and need no state of their own.
_INITS = (True, False, "gaussian", "orthogonal")


@dataclass
class SparseQALoraConfig(ElasticLoraConfig):
    """
    Configuration of adapters that merge without losing the sparsity or the precision of their base (peft type
    `SPARSE_QA_LORA`; SQFT, https://huggingface.co/papers/2410.03750). All of [`ElasticLoraConfig`] applies, apart from variants
    of LoRA and initialisations that change the base; `elastic_ranks=[r]` gives a fixed rank. Adapted are linear layers and
    transformers' `Conv1D`.

    What you have and what you want to deploy decides:

    | base | to deploy | `sparse_adapter` | `quantization_aware` | pipeline of the paper |
    |---|---|---|---|---|
    | sparse | sparse, floating point | True | False | SparsePEFT |
    | sparse, or sparse and quantised | sparse, `bits` bits | True | True | QA-SparsePEFT |
    | dense, or dense and quantised | dense, `bits` bits | False | True | |
    | sparse and quantised | the base and the adapter beside it (not mergeable) | False | False | SQFT |
    | sparse | dense (sparsity is lost), or the adapter beside the base | False | False | Shears |

    Args:
        sparse_adapter (`bool`):
            Mask the update by the zeros of the base weight, in training as in the merge: W' = W + (B A) * (W != 0). The
            merged weight is zero wherever the base is.
        quantization_aware (`bool`):
            Train with the rounding that the merged weight will have: W' = s (q - z) with q = clamp(round((W + update) / s)
            + z, 0, 2^bits - 1). Merging stores exactly these q. Scales s and zero points z are fixed from the start: those of
            the base layer where it is quantised (`peft_elastic.quantize`, `peft_elastic.load_gptq`, GPTQModel), and else
            fitted to its weight. They are saved with the adapter.
        bits (`int`, *optional*):
            2, 4 or 8. By default as in a quantised base, and 4 for one in floating point. What was found in the base is
            written into the copy that the adapter keeps.
        group_size (`int`, *optional*):
            Inputs that share a scale; must divide the inputs of every layer, -1: all. By default as in a quantised base,
            and 128.
        symmetric (`bool`, *optional*):
            Whether zero points are in the middle of the range. By default as in a quantised base, and False.
        clipping (`str`):
            How scales are fitted to a weight in floating point: "minmax" covers its range, "mse" shrinks the range of each
            group to the smallest squared error.

    Raises:
        ValueError: for values out of range, and for options of `LoraConfig` that cannot be merged so.
    """

    sparse_adapter: bool = field(
        default=True,
        metadata={"help": "Mask the update by the zeros of the base weight, in training and in the merge."},
    )
    quantization_aware: bool = field(
        default=False, metadata={"help": "Train with the rounding to `bits` bits that the merged weight will have."}
    )
    bits: Optional[int] = field(default=None, metadata={"help": "2, 4 or 8. Default: as in the base, or 4."})
    group_size: Optional[int] = field(
        default=None, metadata={"help": "Inputs that share a scale, -1: all. Default: as in the base, or 128."}
    )
    symmetric: Optional[bool] = field(
        default=None, metadata={"help": "Zero points in the middle of the range. Default: as in the base, or False."}
    )
    clipping: str = field(
        default="minmax", metadata={"help": "How scales are fitted to a base in floating point: 'minmax' or 'mse'."}
    )

    def __post_init__(self, weights_crc32: Optional[int] = None) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SPARSE_QA_LORA

    def check(self) -> None:
        super().check()
        for name in ("sparse_adapter", "quantization_aware"):
            check_bool(name, getattr(self, name))
        check_grid_options(
            4 if self.bits is None else self.bits,
            128 if self.group_size is None else self.group_size,
            False if self.symmetric is None else self.symmetric,
        )
        check_choice("clipping", self.clipping, CLIPPING)
        given = (self.bits, self.group_size, self.symmetric, self.clipping)
        if not self.quantization_aware and given != (None, None, None, "minmax"):
            raise ValueError(
                "`bits`, `group_size`, `symmetric` and `clipping` belong to `quantization_aware=True`; set it, or leave them out."
            )
        self._check_update()

    def _check_update(self) -> None:
        """Refuse what makes the update of a layer something else than B A, or changes the base."""
        for name in ("use_dora", "lora_bias", "alora_invocation_tokens", "velora_config", "target_parameters"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` cannot be combined with `SparseQALoraConfig`, got {getattr(self, name)!r}. Leave it unset, or use "
                    "`ElasticLoraConfig`."
                )
        if self.init_lora_weights not in _INITS:
            raise wrong(
                "init_lora_weights",
                f"one of {list(_INITS)} in a `SparseQALoraConfig`, as others change the base weights, zeros included",
                self.init_lora_weights,
            )
