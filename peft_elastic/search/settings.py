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
"""What a search is asked to do, checked once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..common.checks import check_choice, check_whole, wrong
from ..cost.counts import ALWAYS_RECORDED
from ..cost.latency import LatencyModel
from ..supernet.space import SearchSpace
from .algorithms import ALGORITHMS, EVOLUTIONARY
from .constraints import collect_bounds, is_number
from .meter import fingerprint_of
from .objectives import Evaluate, Objective, ObjectiveLike, parse_objectives
from .result import minimised


LATENCY_FILE = "latency.json"  # in the folder of a search

# One point or several, each by name or in the order of the objectives.
ReferencePoints = Mapping[str, float] | Sequence[Mapping[str, float] | Sequence[float]]


@dataclass(frozen=True)
class SearchSettings:
    """The arguments of `search_subnet`, whose documentation says what they mean.

    Args:
        evaluate, held_out (`Callable`): as given.
        targets (`list[Objective]`): the objectives, the metric first.
        algorithm (`str`), n_evals, population, seed (`int`): as given.
        folder (`Path`, *optional*): `save_dir`.
        latency (`LatencyModel`, *optional*): the one to predict with: that of the folder, if a search began there.
        sequence_length (`int`, *optional*): whose attention products count.
        prepare (`Callable`, *optional*): as given.
        bounds (`dict[str, Any]`): by name of the cost, as the user wrote them.
        reference_points (`list[list[float]]`, *optional*): in the order and the units of the objectives.
    """

    evaluate: Evaluate
    held_out: Evaluate | None
    targets: list[Objective]
    algorithm: str
    n_evals: int
    population: int
    seed: int
    folder: Path | None = None
    latency: LatencyModel | None = None
    sequence_length: int | None = None
    prepare: Callable[[Any], Any] | None = None
    bounds: dict[str, Any] = field(default_factory=dict)
    reference_points: list[list[float]] | None = None

    @classmethod
    def checked(
        cls,
        space: SearchSpace,
        *,
        objectives: str | Sequence[ObjectiveLike] | None,
        mode: str | Mapping[str, str] | None,
        save_dir: str | os.PathLike[str] | None,
        constraints: Any,
        keywords: Mapping[str, Any],
        reference_points: Any,
        **given: Any,
    ) -> SearchSettings:
        """From what a user wrote.

        Args:
            space (`SearchSpace`): that will be searched.
            objectives, mode, save_dir, constraints, reference_points: as of `search_subnet`.
            keywords (`Mapping[str, Any]`): the bounds that have an argument of their own.
            given: the arguments that are kept as they are.

        Raises:
            ValueError: if an argument is not allowed.
        """
        _check_arguments(space, **given)
        latency = given["latency"]
        targets = parse_objectives(objectives, mode, given["evaluate"], latency is not None)
        bounds = collect_bounds(constraints, keywords, latency is not None)
        points = _parse_reference_points(reference_points, given["algorithm"], [target.name for target in targets])
        folder = None if save_dir is None else Path(save_dir)
        if latency is not None and folder is not None:
            given["latency"] = latency.as_begun(folder / LATENCY_FILE)
        return cls(targets=targets, folder=folder, bounds=bounds, reference_points=points, **given)

    @property
    def directions(self) -> dict[str, str]:
        """ "max" or "min" by name of the objective."""
        return {target.name: target.direction for target in self.targets}

    @property
    def minimised_points(self) -> np.ndarray | None:
        """The reference points, turned so that smaller is better."""
        if self.reference_points is None:
            return None
        directions = self.directions
        return np.array([minimised(dict(zip(directions, point)), directions) for point in self.reference_points])

    @property
    def recorded(self) -> dict[str, Any]:
        """What the result says of the search, but for its constraints."""
        settings: dict[str, Any] = {
            "algorithm": self.algorithm,
            "seed": self.seed,
            "population": self.population if self.algorithm in EVOLUTIONARY else None,
        }
        return settings | ({} if self.reference_points is None else {"reference_points": self.reference_points})

    def header(self, space: SearchSpace, largest: Mapping[str, float]) -> dict[str, Any]:
        """What makes a search another one: that of a folder is continued only if all of it is equal.

        Args:
            largest (`Mapping[str, float]`): the costs of the max subnet.
        """
        header = {
            "space": repr(space),
            "fingerprint": space.fingerprint,
            "objectives": self.directions,
        } | self.recorded
        header |= {f"{name} of the max subnet": largest[name] for name in ALWAYS_RECORDED}
        header |= {"constraints": self.bounds} if self.bounds else {}
        header |= {} if self.sequence_length is None else {"sequence_length": self.sequence_length}
        header |= {} if self.prepare is None else {"prepare": fingerprint_of(self.prepare)}
        return header | ({} if self.latency is None else {"latency": self.latency.workload})


def _check_arguments(
    space: SearchSpace,
    evaluate: Any,
    held_out: Any,
    algorithm: str,
    n_evals: int,
    population: int,
    seed: int,
    latency: Any,
    sequence_length: Any,
    prepare: Any,
) -> None:
    if not callable(evaluate):
        raise wrong("evaluate", "a function of the model", evaluate)
    if held_out is not None and not callable(held_out):
        raise wrong("held_out", "a function of the model", held_out)
    if prepare is not None and not callable(prepare):
        raise wrong("prepare", "a function of the model, or None", prepare)
    check_choice("algorithm", algorithm, sorted(ALGORITHMS))
    check_whole("n_evals", n_evals, least=1)
    check_whole("population", population, least=4)
    check_whole("seed", seed, least=0, most=2**32 - 1)
    check_whole("sequence_length", sequence_length, least=1, optional=True)
    if latency is not None and not isinstance(latency, LatencyModel):
        raise wrong("latency", "a LatencyModel", latency)
    if latency is not None and latency.space != space:
        raise ValueError(
            f"`latency` was measured for another search space ({latency.space!r}) than that of `model` ({space!r})."
        )


def _parse_reference_points(
    points: ReferencePoints | None, algorithm: str, names: list[str]
) -> list[list[float]] | None:
    """The points as lists of numbers in the order of the objectives, in their units."""
    if algorithm != "r-nsga2":
        if points is not None:
            raise ValueError(f"`reference_points` are for `algorithm='r-nsga2'`, not for {algorithm!r}.")
        return None
    example = "{" + ", ".join(f"{name!r}: ..." for name in names) + "}"
    if len(names) < 2:
        raise ValueError(f"`algorithm='r-nsga2'` needs at least two `objectives`, got {names}.")
    if isinstance(points, Mapping):
        points = [points]
    if not isinstance(points, Sequence) or isinstance(points, str) or not points:
        raise ValueError(f"`reference_points` must be a point such as {example} or a list of points, got {points!r}.")
    parsed = []
    for point in points:
        if isinstance(point, Mapping) and set(point) == set(names):
            values = [point[name] for name in names]
        elif isinstance(point, Sequence) and not isinstance(point, str) and len(point) == len(names):
            values = list(point)
        else:
            raise ValueError(
                f"a point of `reference_points` must be like {example}, with every objective, got {point!r}."
            )
        if not all(is_number(value) for value in values):
            raise ValueError(f"the values in `reference_points` must be finite numbers, got {point!r}.")
        parsed.append([float(value) for value in values])
    return parsed
