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
"""Data for the commands: the options that say what to read, and how records of a dataset become examples."""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_elastic.common.files import scratch_folder
from peft_elastic.common.writing import write_error

from ._examples import Example
from ._options import positive_int


if TYPE_CHECKING:
    import datasets


_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
# Where to look for the three kinds of column, in this order, unless the user names them.
_PROMPT_COLUMNS = ("prompt", "question", "instruction", "sentence", "review", "text", "input")
_LABEL_COLUMNS = ("completion", "answer", "output", "response", "target", "label")
_TEXT_COLUMNS = ("text", "content")
# With at most that many different labels a dataset is taken for a classification.
_MOST_CLASSES = 10


# -- the command line ----------------------------------------------------------------------------------------------


def add_data_arguments(
    parser: argparse.ArgumentParser,
    use: str,
    required: bool = True,
    samples: int | None = None,
    samples_help: str = "use N records, drawn with --seed (default: all)",
) -> None:
    """Add the options that say which data to use and how to read it; `use` ends the sentence "the data to ..."."""
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


def read_examples(args: argparse.Namespace, samples: int | None = None) -> list[Example]:
    """Read the examples that the options of `add_data_arguments` describe; of only so many records, drawn with `args.seed`, if
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
    """Load a dataset by its name on the hub, or from a local file or a folder that `save_to_disk` wrote.

    Raises:
        ValueError: if there is no such dataset or split, or it cannot be read.
    """
    import datasets  # a second, which commands without data do without

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
    """Load a dataset from a local file, through the cache of `datasets` if there can be one: without a home, or with one that cannot be
    written to, in memory."""
    import datasets

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
    """Find the prompt and the label column; or None and the text column."""
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
    """Take the first line of the message of an exception, or its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
