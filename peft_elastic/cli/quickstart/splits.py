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
"""How `peft-elastic quickstart` divides its examples, and the file in which they are kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from peft_elastic.common.documents import TEXT, ListOf, MapOf, Record, read_json
from peft_elastic.common.writing import atomic_write_text

from .._examples import Example


_SPLITS = MapOf(ListOf(Record(prompt=TEXT, completion=TEXT, choices=ListOf(TEXT))))


def split_examples(examples: Sequence[Example], sizes: Mapping[str, int], seed: int) -> dict[str, list[Example]]:
    """Divide examples at random. All with the same prompt, up to the case of letters, spaces and punctuation, go to the
    same side; that side depends on the prompt and the seed alone, not on the order of the examples.

    Args:
        examples: what to divide.
        sizes: split name -> number of examples; what is left over goes to "train".
        seed: of the division.

    Returns:
        split name -> examples in a random order, exactly as many as `sizes` says. Where the last prompt of a split has
        more examples than fit in, the others are left out.

    Raises:
        ValueError: if there are too few examples to leave any for "train".
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(" ".join(re.findall(r"\w+", example.prompt.lower())), []).append(example)
    order = sorted(groups, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt}".encode()).digest())
    remaining = iter([groups[prompt] for prompt in order])
    splits: dict[str, list[Example]] = {}
    for name, size in sizes.items():
        splits[name] = []
        while len(splits[name]) < size and (group := next(remaining, None)):
            splits[name] += group
        splits[name] = splits[name][:size]
    splits["train"] = [example for group in remaining for example in group]
    if not splits["train"]:
        raise ValueError(
            f"`--dataset` has {len(examples)} examples with {len(groups)} different prompts; {sum(sizes.values())} are "
            f"needed for {' and '.join(sizes)}, and more for training."
        )
    return splits


def write_splits(path: Path, splits: Mapping[str, Sequence[Example]]) -> None:
    """Keep splits in a JSON file."""
    plain = {name: [asdict(example) for example in examples] for name, examples in splits.items()}
    atomic_write_text(path, json.dumps(plain))


def read_splits(path: Path) -> dict[str, list[Example]]:
    """Read what `write_splits` wrote."""
    plain = _SPLITS.check(read_json(path), str(path))
    return {
        name: [Example(row["prompt"], row["completion"], tuple(row["choices"])) for row in rows]
        for name, rows in plain.items()
    }
