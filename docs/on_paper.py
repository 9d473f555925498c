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
"""Writes the tables of docs/scaling.md that are computed on paper: python docs/on_paper.py (a test says that they are up to date).

Each figure is a formula of the shape of the model and of the settings below, which scaling.md repeats in words. The hours follow
from an assumed rate of products, named in the table; nothing here was measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from marked import main, put


PAGE = Path(__file__).with_name("scaling.md")
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """A decoder with grouped queries, a gated MLP and an output embedding of its own."""

    hidden: int
    channels: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of the linear layers of a block."""
        kv = self.hidden // self.heads * self.kv_heads
        attention = [(self.hidden, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, self.hidden)]
        return attention + 2 * [(self.channels, self.hidden)] + [(self.hidden, self.channels)]

    @property
    def block(self) -> int:
        """Parameters of a block, without its norms."""
        return sum(outputs * inputs for outputs, inputs in self.linears)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def total(self) -> int:
        return self.blocks * self.block + 2 * self.embedding

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA on every linear layer of every block."""
        return self.blocks * sum(rank * (outputs + inputs) for outputs, inputs in self.linears)


LLAMA_70B = Shape(hidden=8192, channels=28672, blocks=80, heads=64, kv_heads=8, vocabulary=128256)

SEQUENCES, LENGTH = 128, 2048  # of the calibration set
RANK = 16
BATCH = 8  # sequences of LENGTH a step, over all GPUs
STEPS = 1000
EVALUATIONS, EVALUATION_TOKENS = 200, 256 * 512
GPUS = 8
CPU_RATE = 2e12  # floating-point operations a second of products in bfloat16, of one server processor
GPU_RATE = 4e14  # of one GPU: 40% of 989e12, what an H100 can in bfloat16
DISK = 1e9  # bytes a second


def from_a_folder(shape: Shape) -> list[tuple[str, str, str]]:
    """Pruning and quantizing block by block: what, formula, figure."""
    block, embedding = 2 * shape.block, 2 * shape.embedding
    tokens = SEQUENCES * LENGTH
    activations = 2 * tokens * shape.hidden
    largest = max(inputs for _, inputs in shape.linears)
    hessian = 4 * largest**2
    weights = 2 * shape.total
    forward = 2 * shape.blocks * shape.block * tokens
    hessians = 2 * tokens * shape.blocks * sum({i: i**2 for _, i in shape.linears}.values())
    solve = shape.blocks * sum(outputs * inputs**2 + inputs**3 for outputs, inputs in shape.linears)
    return [
        ("the weights", "2 P", f"{weights / GB:.0f} GB"),
        ("embedding (the output embedding is not read)", "2 V h", f"{embedding / GB:.1f} GB"),
        ("a block", "2 B", f"{block / GB:.2f} GB"),
        ("activations between two blocks", "2 N T h, twice while a block runs", f"{2 * activations / GB:.1f} GB"),
        ("a Hessian, SparseGPT and GPTQ", "4 d^2, three of them", f"{3 * hessian / GB:.1f} GB"),
        (
            "**peak, Wanda**",
            "embedding + 2 blocks + activations",
            f"**{(embedding + 2 * block + 2 * activations) / GB:.0f} GB**",
        ),
        (
            "**peak, GPTQ**",
            "the same + Hessians",
            f"**{(embedding + 2 * block + 2 * activations + 3 * hessian) / GB:.0f} GB**",
        ),
        ("read and written", "2 reads, 1 write", f"{3 * weights / DISK / 3600:.2f} h at {DISK / GB:.0f} GB/s"),
        (
            "products, Wanda",
            "2 passes of 2 P N T",
            f"{2 * forward:.1e}: {2 * forward / CPU_RATE / 3600:.0f} h on one CPU, {2 * forward / GPU_RATE / 60:.0f} min on one GPU",
        ),
        (
            "products, GPTQ",
            "the same + 2 N T d^2 for each input + d^3 + o d^2 for each layer",
            f"{2 * forward + hessians + solve:.1e}: {(2 * forward + hessians + solve) / CPU_RATE / 3600:.0f} h on one CPU, "
            f"{(2 * forward + hessians + solve) / GPU_RATE / 60:.0f} min on one GPU",
        ),
    ]


def training(shape: Shape) -> list[tuple[str, str, str]]:
    """FSDP2 with the base in shares, over GPUS; checkpointing of every block."""
    tokens = BATCH * LENGTH
    mine = tokens / GPUS
    weights = 2 * shape.total / GPUS
    gathered = 2 * 2 * shape.block
    adapter = (4 + 4 + 4 + 4) * shape.adapter(RANK) / GPUS
    kept = 2 * mine * shape.hidden * shape.blocks
    inside = 2 * mine * (6 * shape.hidden + 4 * shape.channels)
    logits = (2 + 4) * mine * shape.vocabulary
    panel = 4 * max(outputs * inputs for outputs, inputs in shape.linears)
    once = 2 * shape.blocks * shape.block * tokens
    lora, masked = 3 * once, 4 * once
    return [
        ("weights of the base, in shares", "2 P / G", f"{weights / GB:.1f} GB"),
        ("two blocks, gathered", "2 x 2 B", f"{gathered / GB:.1f} GB"),
        ("adapter, gradients, AdamW, in shares", "16 bytes x A / G", f"{adapter / GB:.2f} GB"),
        ("activations, checkpointed", "2 t h L", f"{kept / GB:.1f} GB"),
        ("inside one block", "2 t (6 h + 4 f)", f"{inside / GB:.1f} GB"),
        ("logits and their gradient", "6 t V", f"{logits / GB:.1f} GB"),
        ("an effective weight and its gradient, SparsePEFT", "2 x 4 o d", f"{2 * panel / GB:.1f} GB"),
        (
            "**peak of a GPU, SparsePEFT**",
            "the sum",
            f"**{(weights + gathered + adapter + kept + inside + logits + 2 * panel) / GB:.0f} GB**",
        ),
        (
            "products of a step, LoRA and elastic ranks",
            "6 P t G: forward, again for checkpointing, gradient of inputs",
            f"{lora:.1e}: {lora / GPUS / GPU_RATE:.1f} s a step",
        ),
        (
            "products of a step, SparsePEFT",
            "8 P t G: and the gradient of the weight",
            f"{masked:.1e}: {masked / GPUS / GPU_RATE:.1f} s a step, {STEPS * masked / GPUS / GPU_RATE / 3600:.1f} h for {STEPS:,} steps",
        ),
        (
            f"search, {EVALUATIONS} evaluations of {EVALUATION_TOKENS:,} tokens",
            "2 P tokens each, one model over G GPUs",
            f"{EVALUATIONS * 2 * shape.total * EVALUATION_TOKENS / GPUS / GPU_RATE / 3600:.1f} h",
        ),
    ]


def tables() -> str:
    """Both tables."""
    shape = LLAMA_70B
    head = (
        f"P = {shape.total:.3e} parameters, B = {shape.block:.3e} in a block, A = {shape.adapter(RANK):.3e} in an adapter of rank "
        f"{RANK}, h = {shape.hidden}, f = {shape.channels}, L = {shape.blocks}, V = {shape.vocabulary}; d and o are the inputs and "
        f"outputs of a layer, N T = {SEQUENCES} x {LENGTH} tokens of calibration, G = {GPUS} GPUs, t = {BATCH * LENGTH // GPUS:,} "
        f"tokens of a step on each. Assumed rates: {CPU_RATE:.0e} operations a second for a CPU, {GPU_RATE:.0e} for a GPU."
    )
    parts = [head]
    for title, rows in (
        ("From a folder, on one machine", from_a_folder(shape)),
        (f"Training on {GPUS} GPUs", training(shape)),
    ):
        parts += ["", f"**{title}**", "", "| what | formula | figure |", "|---|---|---|"]
        parts += [f"| {what} | {formula} | {figure} |" for what, formula, figure in rows]
    return "\n".join(parts)


def page(text: str) -> str:
    """The page as it should be."""
    return put(PAGE, text, "on paper", tables())


if __name__ == "__main__":
    sys.exit(main(PAGE, "on paper", tables()))
