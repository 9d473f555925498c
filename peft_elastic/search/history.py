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
"""The evaluations of a search on disk, so that it can be killed at any moment and continued."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from ..common.documents import ANYTHING, COUNT, MEASURED, Document, MapOf, Record
from ..common.journal import Journal
from .result import Evaluation
from .values import from_json, to_json


_DOCUMENT = Document("search history", "peft-elastic/search-history", 1, Record(None, ANYTHING))  # its first line


class HistoryFile(Journal):
    """The evaluations of a search, one row each.

    Args:
        path (`str` or `os.PathLike`): created with its folder if it does not exist.
        header (`Mapping[str, Any]`): JSON values that identify the search.
        metrics (`Iterable[str]`): names of metrics that every evaluation has.

    Raises:
        ValueError: if the file cannot be written, is damaged, or has another header; the message says what differs.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any], metrics: Iterable[str] = ()) -> None:
        values = Record(None, MEASURED, **dict.fromkeys(metrics, MEASURED))
        super().__init__(
            path,
            _DOCUMENT.wrap(header),
            "search",
            Record(None, ANYTHING, index=COUNT, metrics=values, subnet=MapOf(COUNT)),
        )
        self._by_index = {row["index"]: row for row in self.rows}
        if len(self._by_index) < len(self.rows):
            raise ValueError(f"`save_dir`: {os.fspath(path)!r} is damaged: an evaluation is there twice.")

    @property
    def n_rows(self) -> int:
        """Number of evaluations on file."""
        return len(self._by_index)

    def recall(self, evaluation: Evaluation) -> dict[str, float] | None:
        """The metrics of this evaluation, or None if it is not on file.

        Raises:
            ValueError: if the evaluation of this index was of another subnet.
        """
        row = self._by_index.get(evaluation.index)
        if row is None:
            return None
        if row["subnet"] != evaluation.subnet:
            raise ValueError(
                f"`save_dir`: evaluation {evaluation.index} in {os.fspath(self.path)!r} is another subnet than this search asks for. "
                "Was the file edited, or written with another version of pymoo or NumPy?"
            )
        try:
            return from_json(row["metrics"])
        except (AttributeError, ValueError) as error:
            raise ValueError(
                f"`save_dir`: evaluation {evaluation.index} in {os.fspath(self.path)!r} is damaged: {error}"
            ) from error

    def record(self, evaluation: Evaluation, metrics: Mapping[str, float]) -> None:
        """Add a row with the metrics of an evaluation and wait until it is on disk.

        Raises:
            ValueError: if another process has written to the file in the meantime.
        """
        row = {
            "index": evaluation.index,
            "source": evaluation.source,
            "metrics": to_json(metrics),
            "subnet": evaluation.subnet.to_dict(),
        }
        self.append(row)
        self._by_index[evaluation.index] = row
