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
"""What the JSON files of a GPTQ checkpoint say: config.json, and the quantize_config.json of AutoGPTQ and GPTQModel."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from ..layers.gptq_format import FORMATS


CONFIG_FILE = "config.json"
QUANTIZE_CONFIG_FILE = "quantize_config.json"

_SECONDS = 3.0  # of this thread, for all matches of the rules of one checkpoint: some patterns would take years


def read_json(file: Path) -> Any:
    """
    Raises:
        ValueError: the file is missing or is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from error
    except RecursionError:
        raise ValueError(f"{file.name} is damaged: it is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{file.name} is damaged: it is not JSON ({error}).") from None


def read_object(file: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: the file is missing or holds something else than one JSON object.
    """
    content = read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} is damaged: it must hold one object, it holds {content!r:.100}.")
    return content


@dataclass(frozen=True)
class LayerSettings:
    """What a checkpoint says of one layer; None where it says nothing."""

    bits: Any
    group_size: Any
    symmetric: bool | None
    desc_act: bool | None


class Settings:
    """
    What a checkpoint says of its layers.

    Where config.json and quantize_config.json have both something to say, config.json has the word, as in transformers; GPTQModel
    asks the other one first. So what decides how tensors are read (`sym`, the format of the zero points, `desc_act`) counts as
    unknown where the two do not agree. Bits and group sizes are seen in the shapes of the tensors.

    Args:
        folder: of the checkpoint.
        entry: `quantization_config` of config.json, None if it has none.

    Attributes:
        formats (`set[str]`): the conventions for zero points that are named: none, one, or two that contradict each other.
        writer (`str`): the program that wrote it, as far as it says so.

    Raises:
        ValueError: there is neither, one is damaged or of another method, or says what no GPTQ checkpoint has.
    """

    def __init__(self, folder: Path, entry: Any) -> None:
        sources = []
        if entry is not None:
            sources.append((f"quantization_config in {CONFIG_FILE}", entry))
        if (folder / QUANTIZE_CONFIG_FILE).exists():
            sources.append((QUANTIZE_CONFIG_FILE, read_json(folder / QUANTIZE_CONFIG_FILE)))
        if not sources:
            raise ValueError(
                f"{str(folder)!r} is no GPTQ checkpoint: {CONFIG_FILE} has no quantization_config, and there is no "
                f"{QUANTIZE_CONFIG_FILE}."
            )
        for source, content in sources:
            _check_entry(source, content)
        source, main = sources[0]
        if "bits" not in main or "group_size" not in main:
            raise ValueError(f"{source}: bits and group_size must be there; it has {sorted(main)}.")
        self._main, self._source = main, source
        self._rules = _rules(source, main.get("dynamic") or {})
        self._left = _SECONDS
        entries = [content for _, content in sources]
        self.formats = {form for content in entries for form in _formats(content)}
        self.writer = " ".join(str(_meta(content).get("quantizer", "")) for content in entries)
        self._symmetric = _agreed(entries, "sym")
        self._desc_act = _agreed(entries, "desc_act")

    def of(self, *names: str) -> LayerSettings:
        """The settings of a layer, which its writer may have known by any of these names."""
        rule = next((rule for name in names for pattern, rule in self._rules if self._matches(pattern, name)), {})
        for key in ("sym", "desc_act"):
            _check_bool(f"{self._source}: dynamic", key, rule.get(key))
        return LayerSettings(
            rule.get("bits", self._main["bits"]),
            rule.get("group_size", self._main["group_size"]),
            rule.get("sym", self._symmetric),
            rule.get("desc_act", self._desc_act),
        )

    def _matches(self, pattern: Any, name: str) -> bool:
        start = time.thread_time()
        try:
            return pattern.match(name, timeout=max(self._left, 0.001)) is not None
        except TimeoutError:
            raise ValueError(
                f"{self._source}: dynamic has {pattern.pattern!r:.200}, which is still being matched with {name!r} after "
                f"{_SECONDS:.0f} s."
            ) from None
        finally:
            self._left -= time.thread_time() - start


def _check_entry(source: str, entry: Any) -> None:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{source} must be an object, got {entry!r:.100}.")
    method = entry.get("quant_method") or entry.get("method") or "gptq"
    if not isinstance(method, str) or method.lower() != "gptq":
        raise ValueError(f"{source}: quant_method must be 'gptq', got {method!r:.100}.")
    for form in _formats(entry):
        if form not in FORMATS:
            raise ValueError(f"{source}: checkpoint_format must be one of {list(FORMATS)}, got {form!r:.100}.")
    if entry.get("pack_dtype", "int32") not in ("int32", None):
        raise ValueError(f"{source}: pack_dtype must be 'int32', got {entry['pack_dtype']!r:.100}.")
    for key in ("sym", "desc_act"):
        _check_bool(source, key, entry.get(key))


def _check_bool(source: str, key: str, value: Any) -> None:
    if not (value is None or isinstance(value, bool)):
        raise ValueError(f"{source}: {key} must be true or false, got {value!r:.100}.")


def _formats(entry: Mapping[str, Any]) -> list[Any]:
    """What an entry calls its convention for zero points, which has two names for it and, in AutoGPTQ, a flag."""
    named = [entry[key] for key in ("checkpoint_format", "format") if entry.get(key) is not None]
    if entry.get("is_marlin_format"):
        named.append("marlin")
    return [form.lower() if isinstance(form, str) else form for form in named]


def _meta(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    meta = entry.get("meta")
    return meta if isinstance(meta, Mapping) else {}


def _agreed(entries: list[Mapping[str, Any]], key: str) -> bool | None:
    values = {entry[key] for entry in entries if entry.get(key) is not None}
    return values.pop() if len(values) == 1 else None


def _rules(source: str, dynamic: Any) -> list[tuple[Any, Mapping[str, Any]]]:
    """The patterns of `dynamic`, and what they say. The first that matches counts, and "-:" is what is not quantised, which the
    tensors tell."""
    if not isinstance(dynamic, Mapping) or not all(isinstance(rule, Mapping) for rule in dynamic.values()):
        raise ValueError(f"{source}: dynamic must be an object of objects, got {dynamic!r:.200}.")
    rules = []
    for pattern, rule in dynamic.items():
        if pattern.startswith("-:"):
            continue
        try:
            expression = pattern.removeprefix("+:")
            re.compile(expression)  # which knows less than `regex`, and is what the patterns are written for
            rules.append((regex.compile(expression), rule))
        except (re.error, regex.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{source}: dynamic has {pattern!r:.200}, no regular expression ({error}).") from None
    return rules
