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
"""The table at the end of `quickstart`, and what it can and cannot tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from peft_elastic.common.tables import text_table


# Behind the name of a model that is also served in another way.
OPTIMIZED = ", optimize_generation"
# A difference of less than that many standard errors is called noise.
_CLEAR = 2.0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out one line per model.

    Args:
        rows: each with `name`; `measured`, what `measure` returned; `parameters`, all of them; `adapter_parameters`, those
            of the active subnet; `zeros`, the share of zeros in the pruned layers; `bytes` on disk; and, where it was
            measured, `serving` with `tokens_per_second`, `load_seconds` and `peak_bytes`.
    """
    lines = [
        ("", "accuracy %", "label loss", "perplexity", "parameters", "in adapter", "zeros %", "MB on disk")
        + ("tokens/s", "load s", "peak MB")
    ]
    for row in map(summary, rows):
        lines.append(
            (
                row["name"],
                f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_standard_error']:.1f}",
                f"{row['label_loss']:.3f} ± {row['label_loss_standard_error']:.3f}",
                f"{row['perplexity']:.1f}",
                f"{row['parameters']:,d}",
                f"{row['adapter_parameters']:,d}" if row["adapter_parameters"] else "-",
                f"{100 * row['zeros']:.1f}",
                f"{row['bytes'] / 1e6:,.1f}",
                *_serving(row["serving"]),
            )
        )
    formatted = text_table(lines)
    return "\n".join([formatted[0], "-" * len(formatted[0]), *formatted[1:]])


def _serving(serving: Mapping[str, Any] | None) -> tuple[str, str, str]:
    if serving is None:
        return "-", "-", "-"
    peak = serving["peak_bytes"]
    return (
        f"{serving['tokens_per_second']:.1f}",
        f"{serving['load_seconds']:.1f}",
        f"{peak / 1e6:,.0f}" if peak else "-",
    )


def serving_legend(serving: Mapping[str, Mapping[str, Any]], tokens: Sequence[int]) -> str:
    """Explain the columns of serving, and how much of the speed is not the sparse layers'."""
    optimized = [name for name, found in serving.items() if found["optimized"]]
    beside = [name for name in optimized if name.endswith(OPTIMIZED)]
    lines = [
        f"tokens/s: {tokens[1]} new tokens after a prompt of {tokens[0]}, one sequence, on the CPU; load s, peak MB: of a fresh",
        "process; medians of turns."
        + (
            " The deployed models run with `optimize_generation`, the dense one as transformers runs it;"
            if len(optimized) > len(beside)
            else ""
        ),
    ]
    for name in beside:
        speed = serving[name]["tokens_per_second"]
        lines.append(
            f"with `optimize_generation` the {name.removesuffix(OPTIMIZED)} one reaches {speed:.1f} tokens/s."
        )
    return "\n".join(lines)


def legend(examples: Mapping[str, int]) -> str:
    """Explain the columns."""
    return "\n".join(
        [
            f"accuracy, label loss: on {examples['test']} held-out examples, used for this table alone; ± is one standard error",
            "perplexity: of the text of 100 of their prompts at most; training was on labels alone",
            "parameters: of the base and of the active subnet; in adapter: of the active subnet",
            "zeros: in the linear layers of the blocks; on disk a zero takes a bit in the deployed models, elsewhere as much as",
            "any value",
        ]
    )


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Make a row with means and standard errors in place of the values of single examples."""
    measured = row["measured"]
    accuracy, accuracy_error = mean_and_error(measured["correct"])
    loss, loss_error = mean_and_error(measured["loss"])
    return {
        "name": row["name"],
        "accuracy": accuracy,
        "accuracy_standard_error": accuracy_error,
        "label_loss": loss,
        "label_loss_standard_error": loss_error,
        "perplexity": measured["perplexity"],
        **{name: row[name] for name in ("parameters", "adapter_parameters", "zeros", "bytes", "serving")},
    }


def compare(rows: Sequence[dict[str, Any]], pairs: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Compute differences between rows, (minuend, subtrahend) by name: of the accuracy, in [-1, 1], and of the label loss, in nats.

    Both were measured on the same examples, so the standard error is that of the differences example by example: smaller
    than the errors of the two means suggest.
    """
    measured = {row["name"]: row["measured"] for row in rows}
    differences: list[dict[str, Any]] = []
    for first, second in pairs:
        entry: dict[str, Any] = {"pair": [first, second]}
        for name, values in (("accuracy", "correct"), ("label_loss", "loss")):
            per_example = [a - b for a, b in zip(measured[first][values], measured[second][values], strict=True)]
            difference, error = mean_and_error(per_example)
            entry[name] = {
                "difference": difference,
                "standard_error": error,
                "within_noise": abs(difference) <= _CLEAR * error or difference == 0,
            }
        differences.append(entry)
    return differences


def describe(differences: Sequence[dict[str, Any]]) -> str:
    """Say `compare`'s result in words."""
    names = [" against ".join(entry["pair"]) for entry in differences]
    width = max(map(len, names))
    lines = [
        "Differences, example by example (clear: more than 2 standard errors, else within noise):",
        f"  {'':<{width}}  {'accuracy, points':<26}  label loss",
    ]
    for name, entry in zip(names, differences):
        accuracy, loss = entry["accuracy"], entry["label_loss"]
        points = f"{100 * accuracy['difference']:+5.1f} ± {100 * accuracy['standard_error']:.1f}  {_verdict(accuracy)}"
        nats = f"{loss['difference']:+.3f} ± {loss['standard_error']:.3f}  {_verdict(loss)}"
        lines.append(f"  {name:<{width}}  {points:<26}  {nats}")
    return "\n".join(lines)


def _verdict(difference: dict[str, Any]) -> str:
    return "within noise" if difference["within_noise"] else "clear"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean and its standard error."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
