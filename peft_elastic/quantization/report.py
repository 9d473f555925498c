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
from dataclasses import asdict, dataclass, field
from typing import Any

from ..common.writing import atomic_write_text
from ..structure.report import layer_table, mean_over_weights, routers_line


@dataclass
class QuantizationReport:
    """
    What a call of `quantize` did.

    Args:
        method: "rtn" or "gptq".
        config: the fields of the config used.
        layers: one row per layer, in model order (`pandas.DataFrame(report.layers)` works): `name`, `shape` ([out, in]), `bits`,
            `group_size`, `weight_error` (||W - W_q||^2 / ||W||^2, with W as it was before), `output_error` (||X (W - W_q)^T|| /
            ||X W^T|| over the calibration tokens X, Frobenius norms; None without calibration), `sparsity` (share of weights
            that were zero, and are) and `zeros` (share of zeros among the rounded weights).
        seconds: wall time.
        calibration_tokens: tokens that entered the first layer, padding not counted; 0 for a method without data.
        routers: the layers by which mixtures of experts choose, which are left alone unless `target_modules` names them.
    """

    method: str
    config: dict[str, Any]
    layers: list[dict[str, Any]] = field(repr=False)
    seconds: float
    calibration_tokens: int = 0
    routers: list[str] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything above, ready for JSON."""
        return asdict(self)

    def save(self, path: str | os.PathLike) -> None:
        """Writes `to_dict()` as JSON, atomically."""
        atomic_write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    def __str__(self) -> str:
        columns = ("bits", "group", "zero", "rounded to 0", "weight error", "output error")
        tokens = f", {self.calibration_tokens:,} calibration tokens" if self.calibration_tokens else ""
        return "\n".join(
            [
                f"{self.method}: {self.seconds:.1f} s{tokens}",
                *layer_table(self.layers, columns, _summary),
                *routers_line(self.routers),
            ]
        )


def _summary(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    known = [row for row in rows if row["output_error"] is not None]
    return (
        "/".join(str(bits) for bits in sorted({row["bits"] for row in rows})),
        "/".join(str(size) for size in sorted({row["group_size"] for row in rows})),
        f"{mean_over_weights(rows, 'sparsity'):.2%}",
        f"{mean_over_weights(rows, 'zeros') - mean_over_weights(rows, 'sparsity'):.2%}",
        f"{mean_over_weights(rows, 'weight_error'):.4f}",
        f"{mean_over_weights(known, 'output_error'):.4f}" if known else "-",
    )
