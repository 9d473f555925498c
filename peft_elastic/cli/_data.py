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
"""Data for the commands: records of a dataset become examples, and examples become batches for a causal language model."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch

from peft_elastic.common.documents import TEXT, ListOf, MapOf, Record, read_json
from peft_elastic.common.files import scratch_folder
from peft_elastic.common.writing import atomic_write_text, write_error


_SPLITS = MapOf(ListOf(Record(prompt=TEXT, completion=TEXT, choices=ListOf(TEXT))))


_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
# Where to look for the three kinds of column, in this order, unless the user names them.
_PROMPT_COLUMNS = ("prompt", "question", "instruction", "sentence", "review", "text", "input")
_LABEL_COLUMNS = ("completion", "answer", "output", "response", "target", "label")
_TEXT_COLUMNS = ("text", "content")
# With at most that many different labels a dataset is taken for a classification.
_MOST_CLASSES = 10


@dataclass(frozen=True)
class Example:
    """A prompt and its right continuation; plain text is a continuation of nothing.

    Args:
        prompt (`str`): what the model is given.
        completion (`str`): what it learns to say, with the leading space.
        choices (`tuple[str, ...]`): the continuations to choose from, among them `completion`; empty if it is free text.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return self.prompt + self.completion


# -- the command line ----------------------------------------------------------------------------------------------


def add_data_arguments(
    parser: argparse.ArgumentParser,
    use: str,
    required: bool = True,
    samples: int | None = None,
    samples_help: str = "use N records, drawn with --seed (default: all)",
) -> None:
    """The options that say which data to use and how to read it; `use` ends the sentence "the data to ..."."""
    group = parser.add_argument_group("data")

    def add(option: str, help: str, **kwargs: Any) -> None:
        group.add_argument(option, help=help, **kwargs)

    add(
        "--dataset",
        f"the data to {use}: a name on the hub (owner/name, or owner/name:configuration), a file that ends in "
        f"{', '.join(_READERS)}, or a folder that save_to_disk wrote",
        metavar="NAME",
        required=required,
    )
    add("--split", "which split of it to use (default: %(default)s)", default="train")
    add("--samples", samples_help, type=positive_int, metavar="N", default=samples)
    add(
        "--text-column",
        f"plain text, every token a target; found by itself if called {' or '.join(_TEXT_COLUMNS)}",
        metavar="COLUMN",
    )
    add(
        "--prompt-column",
        f"what the model is given; found by itself if called {', '.join(_PROMPT_COLUMNS)}",
        metavar="COLUMN",
    )
    add(
        "--label-column",
        "what it should answer, with a prompt the only target; found by itself if called "
        f"{', '.join(_LABEL_COLUMNS)}. Numbers become words through a column 'choices', the class names of the dataset, "
        "or --label-names",
        metavar="COLUMN",
    )
    add("--label-names", "the words for the labels 0, 1, ...", nargs="+", metavar="WORD")
    add(
        "--template",
        "the prompt, with {} for the prompt column and {name} for any other, e.g. 'Review: {}\\nSentiment:' "
        "(default: {})",
        default="{}",
    )
    add(
        "--max-length",
        "plain text is cut into pieces of that many tokens, longer prompts are left out (default: %(default)s)",
        type=positive_int,
        metavar="TOKENS",
        default=512,
    )


def positive_int(text: str) -> int:
    """For argparse: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def read_examples(args: argparse.Namespace, samples: int | None = None) -> list[Example]:
    """The examples that the options of `add_data_arguments` describe; of only so many records, drawn with `args.seed`, if
    `samples` is given.

    Raises:
        ValueError: if the dataset cannot be read, a column does not exist or is not recognised (the message lists those
            there are), or a record lacks a value.
    """
    records = load_records(args.dataset, args.split)
    if samples is not None and samples < len(records):
        records = records.select(sorted(random.Random(args.seed).sample(range(len(records)), samples)))
    return to_examples(
        records, args.text_column, args.prompt_column, args.label_column, args.template, args.label_names
    )


# -- records -------------------------------------------------------------------------------------------------------


def load_records(name: str, split: str = "train") -> datasets.Dataset:
    """A dataset by its name on the hub, or from a local file or a folder that `save_to_disk` wrote.

    Raises:
        ValueError: if there is no such dataset or split, or it cannot be read.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
        elif path.is_file() and not path.stat().st_size:
            raise ValueError("the file is empty.")
        elif path.is_file() and path.suffix in _READERS:
            options = {"sep": "\t"} if path.suffix == ".tsv" else {}
            loaded = _load_file(_READERS[path.suffix], path, options)
        elif path.is_file():
            raise ValueError(f"files may end in {', '.join(_READERS)}.")
        elif path.suffix in _READERS or name.startswith((".", "/", "~")):
            raise ValueError("there is no such file or folder.")
        else:
            hub_name, _, configuration = name.partition(":")
            loaded = datasets.load_dataset(hub_name, configuration or None)
    # StopIteration is what a JSON file of blank lines raises
    except (OSError, ValueError, StopIteration, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # `datasets` says in the first message only that it failed
        if write_error(cause) is not None:
            cause = write_error(cause, datasets.config.HF_DATASETS_CACHE) or cause
        raise ValueError(f"`--dataset` {name!r} cannot be read: {first_line(cause)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"`--split` {split!r} is not a split of {name!r}, which has {sorted(loaded)}.")
        loaded = loaded[split]
    if not len(loaded):
        raise ValueError(f"`--dataset` {name!r} is empty.")
    return loaded


def _load_file(reader: str, path: Path, options: Mapping[str, Any]) -> datasets.Dataset:
    """A dataset from a local file, through the cache of `datasets` if there can be one: without a home, or with one that cannot be
    written to, in memory."""
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if cache.is_absolute() and nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK):
        return datasets.load_dataset(reader, data_files=str(path), split="train", **options)
    with scratch_folder(tempfile.gettempdir(), "peft-elastic-data") as folder:
        settings = {"cache_dir": str(folder), "keep_in_memory": True, **options}
        return datasets.load_dataset(reader, data_files=str(path.resolve()), split="train", **settings)


def to_examples(
    records: datasets.Dataset,
    text_column: str | None = None,
    prompt_column: str | None = None,
    label_column: str | None = None,
    template: str = "{}",
    label_names: Sequence[str] | None = None,
) -> list[Example]:
    """Read records as plain text (`text_column`) or as prompts with labels. Columns that are not named are looked for.

    Raises:
        ValueError: if a column does not exist or is not recognised, or a record lacks a value.
    """
    prompt_column, target_column = _find_columns(records.column_names, text_column, prompt_column, label_column)
    if prompt_column is None:
        texts = [_check_value(text, target_column, number) for number, text in enumerate(records[target_column])]
        examples = [Example("", text) for text in texts if text.strip()]
        if not examples:
            raise ValueError(f"`--text-column` {target_column!r} holds no text.")
        return examples

    feature = records.features[target_column]
    names = list(label_names or getattr(feature, "names", None) or [])
    examples = []
    for number, record in enumerate(records):
        prompt = _fill(template, _check_value(record[prompt_column], prompt_column, number), record)
        label, space = record[target_column], "" if prompt[-1:].isspace() else " "
        choices = tuple(space + str(choice) for choice in (record.get("choices") or names))
        if choices:
            if not isinstance(label, int) or label not in range(len(choices)):
                raise ValueError(
                    f"`--label-column` {target_column!r} of record {number} must be from 0 to {len(choices) - 1}, the "
                    f"number of a choice, got {label!r}."
                )
            completion = choices[label]
        else:
            completion = space + _check_value(label, target_column, number).strip()
        examples.append(Example(prompt, completion, choices))
    if not examples[0].choices:
        # a few different answers that come again and again are classes
        classes = tuple(sorted({example.completion for example in examples}))
        if 2 <= len(classes) <= min(_MOST_CLASSES, len(examples) // 2):
            examples = [Example(example.prompt, example.completion, classes) for example in examples]
    return examples


def _find_columns(
    columns: Sequence[str], text: str | None, prompt: str | None, label: str | None
) -> tuple[str | None, str]:
    """The prompt and the label column; or None and the text column."""
    for option, name in (("--text-column", text), ("--prompt-column", prompt), ("--label-column", label)):
        if name is not None and name not in columns:
            raise ValueError(f"`{option}` {name!r} is not a column; there are {', '.join(map(repr, columns))}.")
    if text is not None and (prompt is not None or label is not None):
        raise ValueError("`--text-column` goes without `--prompt-column` and `--label-column`.")
    if text is not None:
        return None, text
    named = prompt is not None or label is not None
    label = label or next((name for name in _LABEL_COLUMNS if name in columns), None)
    prompt = prompt or next((name for name in _PROMPT_COLUMNS if name in columns and name != label), None)
    if prompt is not None and label is not None:
        return prompt, label
    text = next((name for name in _TEXT_COLUMNS if name in columns), None)
    if text is not None and not named:
        return None, text
    raise ValueError(
        "cannot tell which columns to use; name them with `--text-column`, or `--prompt-column` and `--label-column`. "
        f"There are {', '.join(map(repr, columns))}."
    )


def _check_value(value: Any, column: str, number: int) -> str:
    if value is None or isinstance(value, (list, dict)):
        raise ValueError(f"column {column!r} of record {number} must be text or a number, got {value!r}.")
    return str(value)


def _fill(template: str, prompt: str, record: Mapping[str, Any]) -> str:
    try:
        # what a shell passes as backslash and n is meant as a new line
        return template.replace("\\n", "\n").format(prompt, **record)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"`--template` {template!r} may hold {{}} for the prompt column, and "
            f"{', '.join(f'{{{name}}}' for name in record)}; {error} does not fit."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of the message of an exception, or its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# -- splits --------------------------------------------------------------------------------------------------------


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
    """The inverse of `write_splits`."""
    plain = _SPLITS.check(read_json(path), str(path))
    return {
        name: [Example(row["prompt"], row["completion"], tuple(row["choices"])) for row in rows]
        for name, rows in plain.items()
    }


# -- batches -------------------------------------------------------------------------------------------------------


def encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> list[dict[str, list[int]]]:
    """Token ids, with labels on the completion alone; examples of more than `max_length` tokens are left out. Plain text
    (no prompts) is joined and cut instead, see `pack`.

    A completion that is no choice gets an end token, so that the model learns to stop.

    Raises:
        ValueError: if nothing remains.
    """
    if not any(example.prompt for example in examples):
        pieces = pack(tokenizer, [example.text for example in examples], max_length)
        return [{"input_ids": piece, "labels": list(piece)} for piece in pieces]
    features = []
    for example in examples:
        prompt = _without_end(tokenizer, tokenizer(example.prompt)["input_ids"])
        # together, as the model will see them; a token across the border belongs to the completion
        whole = _without_end(tokenizer, tokenizer(example.text)["input_ids"])
        shared = next((i for i, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole) - 1))
        if not example.choices and tokenizer.eos_token_id is not None:
            whole = [*whole, tokenizer.eos_token_id]
        if len(whole) <= max_length:
            features.append({"input_ids": whole, "labels": [-100] * shared + whole[shared:]})
    if not features:
        raise ValueError(
            f"`--max-length` {max_length} is less than the tokens of every one of {len(examples)} examples."
        )
    return features


def pack(tokenizer: Any, texts: Iterable[str], length: int, limit: int | None = None) -> list[list[int]]:
    """Token ids of the texts, joined by the end token and cut into pieces of `length` tokens, `limit` pieces at most. A
    shorter rest is dropped, unless it is all there is."""
    ids: list[int] = []
    for text in texts:
        ids += _without_end(tokenizer, tokenizer(text)["input_ids"])
        if tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        if limit is not None and len(ids) >= limit * length:
            break
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return pieces[:limit] or [ids]


def _without_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Without the end token that some tokenizers add."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


class Collator:
    """Pads encoded examples on the right, and asks the model for no more logits than the labels need: for short
    completions the output layer of a small model is a quarter of the work.

    Args:
        model: the model; whether it can leave out logits is read from its signature.
    """

    def __init__(self, model: Any) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        # several GPUs in one process would tear the list of positions apart
        self.trims = "logits_to_keep" in inspect.signature(base.forward).parameters and torch.cuda.device_count() < 2

    def __call__(self, features: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
        """Tensors of shape (batch, length): `input_ids`, `attention_mask` and `labels`, -100 where there is none; `labels`
        is shorter, as is the tensor of positions `logits_to_keep`, if logits are left out."""
        length = max(len(feature["input_ids"]) for feature in features)

        def pad(rows: Iterable[Sequence[int]], value: int) -> torch.Tensor:
            return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])

        batch = {
            "input_ids": pad((feature["input_ids"] for feature in features), 0),
            "attention_mask": pad(([1] * len(feature["input_ids"]) for feature in features), 0),
            "labels": pad((feature["labels"] for feature in features), -100),
        }
        if self.trims:
            # the logits at a position predict the next label
            first = max(0, int((batch["labels"] != -100).any(0).nonzero()[0]) - 1)
            batch["labels"] = batch["labels"][:, first:]
            batch["logits_to_keep"] = torch.arange(first, length)
        return batch


def batches(
    features: Sequence[Mapping[str, list[int]]], collator: Callable[..., dict[str, torch.Tensor]], size: int
) -> list[dict[str, torch.Tensor]]:
    """All examples in batches of similar length."""
    ordered = sorted(features, key=lambda feature: len(feature["input_ids"]))
    return [collator(ordered[start : start + size]) for start in range(0, len(ordered), size)]
