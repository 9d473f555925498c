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

import json
import os
import zlib
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import Any, Optional, Union

from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType

from ...common.checks import check_bool, check_choice, check_whole, is_whole, wrong
from ...common.documents import read_json
from ...common.writing import atomic_write_text
from ...structure.importance import IMPORTANCES
from ...structure.space import checked_depth, checked_width


# The variants of LoRA that work on any leading part of A and B. The others keep state of their own for each rank
# (KaSA's singular values, MonteCLoRA's samplers, ...), derive it from all ranks once (Arrow's prototypes) or replace the
# matrices (BD-LoRA, QALoRA).
_ELASTIC_VARIANTS = {"alora_invocation_tokens", "use_dora", "velora_config"}


@dataclass
class ElasticLoraConfig(LoraConfig):
    """
    Configuration of an elastic LoRA super-adapter (peft type `ELASTIC_LORA`; neural low-rank adapter search of Shears,
    https://huggingface.co/papers/2404.10934).

    All of [`~peft.LoraConfig`] applies; `r` is the maximal rank. Whatever rank is active, the scaling stays
    `lora_alpha / r` (`lora_alpha / sqrt(r)` with rsLoRA).

    Args:
        elastic_ranks (`list[int]`, *optional*):
            The ranks a module may take; the largest must be `r`. `None` stands for `r`, three quarters of it and half of
            it, the space of the Shears paper, whatever `r` is when the adapter is made: see `rank_options`. A module with
            another maximal rank in `rank_pattern` takes the same fractions of its own, rounded up. `[r]` gives an adapter
            of fixed rank.
        rank_groups (`"module"`, `"block"` or `list[list[str]]`):
            Which modules share one rank. `"module"`: each has its own. `"block"`: all modules of a transformer block
            share one. A list of lists of module names ties the named modules within each transformer block, for example
            `[["q_proj", "k_proj", "v_proj"], ["up_proj", "gate_proj"], ["down_proj"]]`; a targeted module that is in
            no list keeps a rank of its own.
        elastic_width (`dict[str, list | dict[str, list]]`, *optional*):
            The widths that each transformer block of the base may take (LoNAS, https://aclanthology.org/2024.lrec-main.940):
            `{"heads": [1.0, 0.75, 0.5], "mlp": [1.0, 0.875, 0.75, 0.5]}`, one of the two or both. Fractions of the heads
            or MLP channels of the block, or whole numbers of them. Heads move in whole key-value groups: a fraction is
            rounded to the nearest one, and to the nearest multiple of 8 channels. A dict of lists by the path of the block, `{"mlp":
            {"layers.0": [1.0, 0.5], "layers.7": [0.75]}}`, has options of their own for some blocks; the others keep their width. The first heads and channels are kept, so
            they must be sorted by importance. Architectures are known by `peft_elastic.structure.register_layout`.
        elastic_depth (`"all"`, `int`, `str` or a list or `range` of them, *optional*):
            The transformer blocks that may be skipped: their numbers, `"4-8"`, paths inside the base model, or `"all"` of them
            but the first, as one has to stay.
            `".attention"` or `".mlp"` behind one of them, as in `"all.mlp"`, makes that part of it skippable alone.
        importance (`"activation"`, `"gradient"`, `"magnitude"`, `"movement"` or `"none"`):
            What heads and channels are sorted by before anything is narrowed, see `sort_by_importance`. `"magnitude"`
            needs no data and is done when the adapter is added. For the first two, call
            `model.sort_by_importance(calibration)` before the training. `"movement"`: train with `MovementCallback` first, then
            call `model.sort_by_importance()`. `"none"`: the base is sorted already.
        sorted_base (`bool`):
            Whether the adapter belongs to a sorted base. Written when it is sorted, and saved with the adapter, whose file
            holds the order.
        active_subnet (`dict[str, int]`, *optional*):
            The chosen subnet, by choice key; `None` is the maximal one. Written by `model.set_subnet`, saved with the
            adapter and restored when it is loaded.

    A configuration is a value: an adapter gets a copy of its own, and what is written into that (`active_subnet`,
    `sorted_base`) is never seen in the object it was made from. Fields may be set until then, and are checked again.

    Raises:
        ValueError: for ranks that are not positive integers or whose largest is not `r`, for malformed groups, and for
            options of `LoraConfig` that do not work with elastic ranks.
    """

    elastic_ranks: Optional[list[int]] = field(
        default=None,
        metadata={"help": "The ranks a module may take, the largest being r. Default: r, 3/4 r and 1/2 r."},
    )
    rank_groups: Union[str, list[list[str]]] = field(
        default="module",
        metadata={
            "help": "Which modules share one rank: 'module', 'block', or a list of lists of module names that are tied "
            "within each transformer block."
        },
    )
    elastic_width: Optional[dict[str, Union[list[Union[int, float]], dict[str, list[Union[int, float]]]]]] = field(
        default=None,
        metadata={
            "help": "The widths of a transformer block, {'heads': [1.0, 0.75], 'mlp': [1.0, 0.75, 0.5]}: fractions, or whole "
            "numbers of heads and channels; or a dict of such lists by the path of the block."
        },
    )
    elastic_depth: Optional[Union[str, int, list[Union[int, str]]]] = field(
        default=None,
        metadata={
            "help": "The blocks that may be skipped: numbers, '4-8', 'all' or paths; '.attention' or '.mlp' behind one of them "
            "for a part of it."
        },
    )
    importance: str = field(
        default="activation",
        metadata={
            "help": "What heads and channels are sorted by: 'activation', 'gradient', 'magnitude', 'movement' or 'none'."
        },
    )
    sorted_base: bool = field(
        default=False,
        metadata={"help": "Whether the adapter belongs to a sorted base. Set by sorting it."},
    )
    active_subnet: Optional[dict[str, int]] = field(
        default=None,
        metadata={"help": "The chosen subnet by choice key; None is the maximal one. Set it with model.set_subnet."},
    )

    # Of a file: what the weights beside it are, see `save_pretrained`.
    weights_crc32: InitVar[Optional[int]] = None

    # Not a field: what `init_lora_weights` was when the adapter was built. Users set it to True to save a PiSSA adapter's
    # initial state.
    initialized_with = None

    def __post_init__(self, weights_crc32: Optional[int] = None) -> None:
        super().__post_init__()
        self.peft_type = PeftType.ELASTIC_LORA
        self.check()

    def check(self) -> None:
        """Raise a ValueError if the fields are not right, alone or together. Done when the object is made, and when an adapter
        is made from it, as fields can be set in between."""
        self._check_lora_options()
        self._check_elastic_ranks()
        self._check_rank_groups()
        self._check_structure()
        if self.active_subnet is not None and not isinstance(self.active_subnet, dict):
            raise wrong("active_subnet", "a dict from choice key to value", self.active_subnet)

    def _check_lora_options(self) -> None:
        """Refuse what cannot follow a change of rank."""
        variants = {f.name for f in fields(LoraConfig) if f.metadata.get("is_lora_variant")} - _ELASTIC_VARIANTS
        # QALoRA exists for GPTQ layers only, and Megatron's parallel layers bring their own A and B
        for name in sorted(variants | {"megatron_config", "use_qalora"}):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` cannot be combined with elastic ranks, got {getattr(self, name)!r}. Leave it unset, or use "
                    "`LoraConfig`."
                )
        if self.init_lora_weights == "eva":
            raise ValueError(
                "`init_lora_weights='eva'` cannot be combined with elastic ranks: EVA redistributes the ranks of the "
                "modules after the adapter has been built. Use another initialisation, or `LoraConfig`."
            )

    def _check_elastic_ranks(self) -> None:
        r, ranks = self.r, self.elastic_ranks
        check_whole("r", r, least=1)
        if ranks is None:
            return
        if not isinstance(ranks, (list, tuple)) or not ranks:
            raise wrong("elastic_ranks", "a list with at least one rank", ranks)
        if any(not is_whole(k) or k < 1 for k in ranks):
            raise wrong("elastic_ranks", "positive integers", ranks)
        if len(set(ranks)) != len(ranks):
            raise ValueError(f"`elastic_ranks` must differ from each other, got {ranks!r}.")
        if max(ranks) != r:
            raise ValueError(
                f"The largest of `elastic_ranks` must be `r`, got elastic_ranks={list(ranks)!r} with r={r}. "
                f"Set r={max(ranks)} or change the list."
            )
        self.elastic_ranks = sorted(ranks, reverse=True)

    def _check_rank_groups(self) -> None:
        groups = self.rank_groups
        if groups in ("module", "block"):
            return
        well_formed = isinstance(groups, (list, tuple)) and all(
            isinstance(group, (list, tuple)) and group and all(isinstance(name, str) and name for name in group)
            for group in groups
        )
        if not well_formed or not groups:
            raise wrong(
                "rank_groups",
                "'module', 'block' or a list of non-empty lists of module names, for example [['q_proj', 'k_proj', 'v_proj'], "
                "['up_proj', 'gate_proj']]",
                groups,
            )
        names = [name for group in groups for name in group]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"`rank_groups` names {twice} more than once; a module has one rank.")
        self.rank_groups = [list(group) for group in groups]

    def _check_structure(self) -> None:
        self.elastic_width = checked_width(self.elastic_width)
        self.elastic_depth = checked_depth(self.elastic_depth)
        check_choice("importance", self.importance, IMPORTANCES)
        check_bool("sorted_base", self.sorted_base)
        if self.is_structural:
            for name in ("use_dora", "velora_config", "layer_replication"):
                if getattr(self, name, None):
                    raise ValueError(
                        f"`{name}` cannot be combined with `elastic_width` or `elastic_depth`. Leave it unset."
                    )

    # -- on disk ----------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str, *, weights_in: Optional[Union[str, os.PathLike[str]]] = None, **kwargs: Any
    ) -> None:
        """
        Write `adapter_config.json`.

        peft writes the weights of an adapter and then this file, into a folder that may hold another adapter, and may be
        stopped in between. So the file says which weights it goes with, and other ones are refused when it is read.

        Args:
            save_directory: the folder.
            weights_in: the folder of the weights it goes with; by default `save_directory` when the file is written with an
                adapter, and none when a configuration is saved alone.
        """
        if weights_in is None and "auto_mapping_dict" in kwargs:  # what a PeftModel says that has written the weights
            weights_in = save_directory
        super().save_pretrained(save_directory, **kwargs)
        weights = None if weights_in is None else _weights_file(Path(weights_in))
        if weights is not None:
            path = Path(save_directory) / CONFIG_NAME
            data = {**json.loads(path.read_text()), "weights_crc32": _crc32(weights)}
            atomic_write_text(path, json.dumps(data, indent=2, sort_keys=True))

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """
        Read `adapter_config.json`.

        Raises:
            ValueError: naming the file, if it is damaged, or was not saved with the weights in the same folder.
        """
        path = Path(path_json_file)
        data = read_json(path)
        if not isinstance(data, dict):
            raise ValueError(f"{os.fspath(path)!r} must hold an object, got {type(data).__name__}.")
        expected, weights = data.get("weights_crc32"), _weights_file(path.parent)
        if expected is not None and weights is not None and _crc32(weights) != expected:
            raise ValueError(
                f"{os.fspath(weights)!r} was not saved with this {CONFIG_NAME}, or is damaged: a `save_pretrained` over an older "
                "adapter was interrupted, or one of the two was exchanged. Save the adapter again. (If they do belong together, "
                f"remove `weights_crc32` from {CONFIG_NAME}.)"
            )
        return super().from_json_file(path_json_file, **kwargs)

    @property
    def depth_entries(self) -> list[Union[int, str]]:
        """`elastic_depth` as a list."""
        return self.elastic_depth if isinstance(self.elastic_depth, list) else []

    @property
    def is_structural(self) -> bool:
        """Whether subnets differ in width or depth of the base."""
        return bool(self.elastic_width) or bool(self.elastic_depth)

    def rank_options(self, max_rank: int, multiple: int = 1) -> tuple[int, ...]:
        """List the ranks open to a module with the maximal rank `max_rank` (`r`, or what `rank_pattern` says), from large to
        small: `elastic_ranks` times `max_rank / r`, rounded up.

        Args:
            max_rank (`int`): the maximal rank of the module.
            multiple (`int`): what its ranks have to be divisible by. All that are not asked for one by one are rounded up to
                that.
        """
        r, ranks = self.r, self.elastic_ranks
        if ranks is not None and max_rank == r:
            return tuple(sorted(ranks, reverse=True))
        fractions = (r, -(-3 * r // 4), -(-r // 2)) if ranks is None else ranks
        options = {-(-k * max_rank // (r * multiple)) * multiple for k in fractions}
        return tuple(sorted({min(k, max_rank) for k in options}, reverse=True))


def _weights_file(folder: Path) -> Optional[Path]:
    """Find the file that peft reads the weights of an adapter from."""
    files = [folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
    return next((file for file in files if file.is_file()), None)


def _crc32(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
