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
"""What the tests of width and depth share: elastic models of every architecture, and the same subnets computed in another way,
by a model of full size in which hooks take away what is not active."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import get_peft_model
from support.models import BLOCKS, T5S, default_dtype, randomize, tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_elastic import ElasticLoraConfig


WIDTH = {"heads": [1.0, 0.5], "mlp": [1.0, 0.5, 1 / 6]}
# a rank that is no other dimension of the models
RANK = 5
SETTINGS: dict[str, Any] = {
    "r": RANK,
    "lora_alpha": 10,
    "elastic_ranks": [RANK],
    "target_modules": "all-linear",
    "elastic_width": WIDTH,
    "importance": "none",
}
HEADS, HEAD_DIM, CHANNELS = 4, 8, 48
ALL = [*BLOCKS, *T5S]


def t5_inputs() -> dict[str, torch.Tensor]:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": tokens(length=4, seed=1)}


def build(name: str, **settings: Any) -> Any:
    return T5S[name](**settings) if name in T5S else BLOCKS[name].build(**settings)


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    return t5_inputs() if name in T5S else BLOCKS[name].inputs()


def adapted(model: Any, seed: int = 0, adapter_name: str = "default", **settings: Any) -> Any:
    """A model in evaluation mode with an adapter whose B is not zero."""
    config = ElasticLoraConfig(**{**SETTINGS, **settings})
    model = get_peft_model(model, config, adapter_name=adapter_name).eval()
    randomize(model, seed=seed, std=0.1, adapter_name=adapter_name)
    return model


def elastic(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """An elastic model of an architecture, and inputs."""
    with default_dtype(dtype):
        model = adapted(build(name).to(dtype), **settings)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs_of(name).items()}
    return model, inputs


def blocks_of(name: str, model: Any = None) -> dict[str, list[str]]:
    """The name of what has a width or may be skipped -> paths of the layers that read its heads, and its channels. Of `model`,
    which may have another number of blocks than the one that `build` gives."""
    if name not in T5S:
        layout = BLOCKS[name]
        count = layout.count if model is None else len(model.get_submodule(layout.path.rpartition(".")[0]))
        return {layout.path.format(i): [layout.attention, layout.mlp] for i in range(count)}
    mlps = {"encoder": "layer.1.DenseReluDense.wo", "decoder": "layer.2.DenseReluDense.wo"}
    counts = {part: 2 if model is None else len(model.get_submodule(f"{part}.block")) for part in mlps}
    return {f"{part}.block.{i}": ["layer.0.SelfAttention.o", mlps[part]] for part in mlps for i in range(counts[part])}


def readers(name: str, model: Any = None) -> dict[str, list[tuple[str, int]]]:
    """The key of a width -> (path of a layer that reads its units, features of one unit)."""
    found: dict[str, list[tuple[str, int]]] = {}
    for block, (attention, mlp) in blocks_of(name, model).items():
        found[f"mlp:{block}"] = [(f"{block}.{mlp}", 1)]
        stack = block.rpartition(".")[0] if name in T5S else block
        found.setdefault(f"heads:{stack}", []).append((f"{block}.{attention}", HEAD_DIM))
        if block.startswith("decoder") and name in T5S:
            found[f"heads:{stack}"].append((f"{block}.layer.1.EncDecAttention.o", HEAD_DIM))
    return found


@contextmanager
def masked(model: Any, name: str, subnet: Mapping[str, int]) -> Iterator[None]:
    """The reference: everything is computed at full size, and what a subnet does not have contributes nothing."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def only(size: int) -> Any:
        def hook(module: nn.Module, args: tuple) -> tuple:
            keep = torch.zeros(args[0].shape[-1], dtype=args[0].dtype)
            keep[:size] = 1
            return (args[0] * keep, *args[1:])

        return hook

    def nothing(module: nn.Module, args: tuple, output: Any) -> Any:
        return torch.zeros_like(output)

    def unchanged(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if type(module).__name__ in ("BertOutput", "RobertaOutput"):  # gets what is added last
            hidden = args[1]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    with ExitStack() as hooks:
        for key, layers in readers(name, base).items():
            for path, unit in layers if key in subnet else ():
                hooks.enter_context(base.get_submodule(path).register_forward_pre_hook(only(subnet[key] * unit)))
        for key, computed in subnet.items():
            kind, _, path = key.partition(":")
            if kind != "depth" or computed:
                continue
            block, _, part = path.rpartition(".")
            if part not in ("attention", "mlp"):
                hooks.enter_context(base.get_submodule(path).register_forward_hook(unchanged, with_kwargs=True))
                continue
            layer = blocks_of(name, base)[block][part == "mlp"]
            post_norm = BLOCKS[name].post_norm if name in BLOCKS else ()
            if post_norm:
                module = base.get_submodule(f"{block}.{post_norm[part == 'mlp']}")
                hooks.enter_context(module.register_forward_hook(unchanged, with_kwargs=True))
            else:
                hooks.enter_context(base.get_submodule(f"{block}.{layer}").register_forward_hook(nothing))
        yield


def some_subnets(model: Any, count: int = 2) -> list[Any]:
    space = model.search_space
    return [space.min, *(space.sample(seed) for seed in range(count))]


class MatrixProducts(TorchDispatchMode):
    """Counts the shapes (m, k, n) of all products of two matrices, in both passes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        matrices = {torch.ops.aten.mm.default: args[:2], torch.ops.aten.addmm.default: args[1:3]}.get(func)
        if matrices is not None:
            self.shapes[(*matrices[0].shape, matrices[1].shape[1])] += 1
        return func(*args, **(kwargs or {}))

    @property
    def of_base(self) -> Counter[tuple[int, int, int]]:
        """Without those of adapters."""
        return Counter({shape: count for shape, count in self.shapes.items() if RANK not in shape})


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
