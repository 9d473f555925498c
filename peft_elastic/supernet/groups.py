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
"""Which modules belong together: transformer blocks, and the groups of modules that share one rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..common.names import has_suffix


BlockOf = Callable[[str], "str | None"]


# Under which torch.compile, FSDP and checkpoint wrappers keep the module they wrap.
_WRAPPED = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")


def plain_path(path: str) -> str:
    """The path of a module, or the name of a parameter, as it is where nothing is compiled or wrapped."""
    return _WRAPPED.sub("", path).lstrip(".")


def find_blocks(model: nn.Module) -> BlockOf:
    """Find the transformer blocks of any model, without knowing its architecture.

    A block is an entry of an `nn.ModuleList`. Of several nested ones (a stage of blocks, a block of experts) it is the
    innermost that transformers itself treats as a layer to checkpoint, or else the outermost.

    Args:
        model (`nn.Module`): the model.

    Returns:
        A function from module path to the path of the block that contains it (never the module itself), or None.
    """
    entries: set[str] = set()
    checkpointed: set[str] = set()
    for list_path, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for key, entry in module.named_children():
                path = plain_path(f"{list_path}.{key}")
                entries.add(path)
                if isinstance(entry, GradientCheckpointingLayer):
                    checkpointed.add(path)

    def block_of(name: str) -> str | None:
        parts = name.split(".")
        above = [".".join(parts[:i]) for i in range(1, len(parts))]
        inner = [path for path in above if path in checkpointed]
        outer = [path for path in above if path in entries]
        return inner[-1] if inner else outer[0] if outer else None

    return block_of


def group_modules(
    names: Iterable[str], rank_groups: str | Sequence[Sequence[str]], block_of: BlockOf
) -> dict[str, list[str]]:
    """Sort the modules that carry an adapter into groups that share one rank.

    Args:
        names (`Iterable[str]`): paths of the modules, in the model's order.
        rank_groups (`"module"`, `"block"` or list of lists of module names):
            as in `ElasticLoraConfig`. A listed name matches a path that equals it or ends in `"." + name`.
        block_of: what `find_blocks` returned.

    Returns:
        group name -> module paths, in the model's order.

    Raises:
        ValueError: if a listed name matches no module, or a module is matched by two groups.
    """
    groups: dict[str, list[str]] = {}
    unmatched = {listed for group in rank_groups for listed in group} if not isinstance(rank_groups, str) else set()
    for name in names:
        group_name = name
        block = block_of(name)
        if rank_groups == "block":
            group_name = block or name
        elif not isinstance(rank_groups, str):
            hits = [(group, listed) for group in rank_groups for listed in group if has_suffix(name, listed)]
            unmatched -= {listed for _, listed in hits}
            if len({id(group) for group, _ in hits}) > 1:
                raise ValueError(
                    f"`rank_groups` puts the module {name!r} into several groups, through {[hit[1] for hit in hits]}."
                )
            if hits:
                tied = "+".join(hits[0][0])
                group_name = f"{block}.{tied}" if block else tied
        groups.setdefault(group_name, []).append(name)
    if unmatched:
        raise ValueError(
            f"`rank_groups` names {sorted(unmatched)}, which match no module that carries an adapter. Those are: "
            f"{sorted({name.rpartition('.')[2] for name in names})}."
        )
    return groups
