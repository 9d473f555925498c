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
"""Faster `generate` on the CPU: the work around the linear layers, in fewer and cheaper calls.

For a small model the many small operators of a decoder layer (norms, rotary embedding, growing the cache) and the
Python around them take as long as the linear layers. `optimize_generation` replaces what a decoder does for one new
token by a step written for it. Nothing is compiled, so it starts at once and needs no compiler; linear layers, dense
or sparse, with or without an adapter, are called as they are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ..structure.modules import output_head
from .decode.families import FAMILIES, kinds_of
from .decode.in_cpp import DenseStep, FusedLayers
from .decode.step import MODEL_CONDITIONS, Call, DecodeStep


__all__ = ["GenerationReport", "explain_generation", "optimize_generation", "restore_generation"]


# The name it had in this module; programs that count the steps it takes go by it.
_DecodeStep = DecodeStep


def optimize_generation(model: nn.Module) -> nn.Module:
    """Make `model.generate` faster on the CPU, in place; `restore_generation` undoes it.

    Only single-token steps of generation take the faster path, and with it a dense output embedding, which torch multiplies
    with few rows at half the speed of memory: one new position per sequence, evaluation mode, no
    gradients, CPU, attention "sdpa", and the `DynamicCache` that `generate` uses by default. Greedy search, sampling,
    beam search, batches and padding all come down to such steps. Everything else (the prompt, training, other caches,
    sliding-window attention, hidden states or attentions asked for, hooks inside the decoder layers, torch.compile,
    autocast) runs the model's own code as before.

    The result is that of the model's own code up to rounding: float32 logits agree to about 1e-5. In bfloat16 the
    norms and the rotary embedding round less often, so logits differ by a few bfloat16 steps, and greedy search can take another
    token where two are nearly tied.

    It may be called before or after layers are swapped, adapters merged or weights moved, and does not change what is
    saved. A copy (`copy.deepcopy`) of the model is optimized too.

    A model that generates and takes none of the faster steps warns once, with the reason; `explain_generation` has all of them.

    Args:
        model (`nn.Module`): a Llama, Mistral, Qwen2 or Qwen3 of transformers, whatever its head, or a wrapper around
            one, such as a PeftModel.

    Returns:
        `nn.Module`: `model` itself.

    Raises:
        ValueError: if there is no such decoder in `model`, if its attention is not "sdpa", if its layers are not those
            of transformers, or if something else has replaced its `forward`.
    """
    base: Any = _find(model)
    if isinstance(base.__dict__.get("forward"), DecodeStep):
        return model
    _check(base)
    base.forward = DecodeStep(base)
    head = output_head(model)
    if type(head) is nn.Linear and "forward" not in head.__dict__:
        head.forward = DenseStep(head)  # type: ignore[method-assign]
    return model


def _check(base: Any) -> None:
    """ValueError if the step cannot stand in for the forward of this decoder."""
    if "forward" in base.__dict__:
        raise ValueError(
            f"`model`: the forward of its {type(base).__name__} was replaced by {base.__dict__['forward']!r}; allowed "
            "is the one of transformers (accelerate's hooks go with accelerate.hooks.remove_hook_from_module)."
        )
    attention = base.config._attn_implementation
    if attention != "sdpa":
        raise ValueError(
            f"`model` must have attn_implementation 'sdpa' (`model.set_attn_implementation('sdpa')`), got {attention!r}."
        )
    for index, layer in enumerate(base.layers):
        found, expected = kinds_of(layer, FAMILIES[type(base)])
        if found != expected:
            raise ValueError(
                f"`model`: layer {index} must be made of {[kind.__name__ for kind in expected]} of transformers, got "
                f"{[kind.__name__ for kind in found]}."
            )


@dataclasses.dataclass(frozen=True)
class GenerationReport:
    """What became of the calls of an optimized decoder; printing it gives the reasons as text.

    Args:
        optimized (`bool`): whether `optimize_generation` was called.
        steps (`int`): calls that took the faster step, since then.
        steps_in_cpp (`int`): those of them whose layers ran in C++.
        own (`dict[str, int]`): calls that ran the model's own code, by the reason, the most frequent first. A prompt is one.
        own_in_torch (`dict[str, int]`): steps whose layers ran in torch and not in C++, by the reason.
        obstacles (`tuple[str, ...]`): what would keep the next call from the faster step, as the model is now.
        obstacles_in_cpp (`tuple[str, ...]`): what would keep the layers of the next step from C++.
    """

    optimized: bool
    steps: int
    steps_in_cpp: int
    own: dict[str, int]
    own_in_torch: dict[str, int]
    obstacles: tuple[str, ...]
    obstacles_in_cpp: tuple[str, ...]

    def __str__(self) -> str:
        if not self.optimized:
            head = "The model is not optimized" + ("." if self.obstacles else ": call `optimize_generation`.")
        else:
            head = f"{self.steps} steps of the faster kind, {self.steps_in_cpp} of them in C++."
        lines = [head]
        for title, reasons in (
            ("Calls that ran the model's own code:", self.own),
            ("Steps whose layers ran in torch:", self.own_in_torch),
        ):
            lines += [title, *(f"  {count:>6}  {reason}" for reason, count in reasons.items())] if reasons else []
        for title, found in (
            ("As the model is now, no faster step is taken:", self.obstacles),
            ("As the model is now, the layers do not run in C++:", self.obstacles_in_cpp),
        ):
            lines += [title, *(f"  {reason}" for reason in found)] if found else []
        return "\n".join(lines)


def explain_generation(model: nn.Module) -> GenerationReport:
    """Why the faster step of `optimize_generation` is taken or not; print it.

    Before `optimize_generation` it says whether the model can be optimized. After it, it counts the calls of the decoder by
    what became of them, and looks at the model as it is now.

    Args:
        model (`nn.Module`): any model; nothing about it is changed, and nothing is run.

    Returns:
        `GenerationReport`: counts and reasons.
    """
    try:
        base: Any = _find(model)
    except ValueError as error:
        return GenerationReport(False, 0, 0, {}, {}, (str(error),), ())
    step = base.__dict__.get("forward")
    optimized = isinstance(step, DecodeStep)
    if not optimized:
        try:
            _check(base)
        except ValueError as error:
            return GenerationReport(False, 0, 0, {}, {}, (str(error),), ())
        step = DecodeStep(base)
    call = Call(step, (), {})
    obstacles = tuple(condition.reason(call) for condition in MODEL_CONDITIONS if not condition.holds(call))
    in_cpp = None if call.layers is None else FusedLayers.make(call.layers.modules, call.layers.family)
    return GenerationReport(
        optimized,
        step.steps,
        step.steps_in_cpp,
        dict(step.own.most_common()),
        dict(step.own_in_torch.most_common()),
        obstacles,
        (in_cpp,) if isinstance(in_cpp, str) else (),
    )


def restore_generation(model: nn.Module) -> nn.Module:
    """Undo `optimize_generation`, in place.

    Returns:
        `nn.Module`: `model` itself.

    Raises:
        ValueError: if `model` is not optimized.
    """
    base = _find(model)
    if not isinstance(base.__dict__.get("forward"), DecodeStep):
        raise ValueError(f"`model` ({type(model).__name__}) is not optimized: call `optimize_generation` first.")
    del base.forward
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), DenseStep):
            del module.forward
    return model


def _find(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) in FAMILIES:
            return module
    raise ValueError(
        f"`model` must be or hold a decoder that can be optimized, one of "
        f"{', '.join(sorted(kind.__name__ for kind in FAMILIES))} of transformers, got {type(model).__name__}."
    )
