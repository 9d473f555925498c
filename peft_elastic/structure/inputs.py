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

import inspect
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from .sequential import Unit


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def is_language_model(model: nn.Module) -> bool:
    """Whether position t of a model predicts token t + 1."""
    can_generate = getattr(model, "can_generate", lambda: False)()
    return bool(can_generate) and not is_encoder_decoder(model)


def own_labels(input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The labels by which a language model predicts its own inputs, for transformers, which shifts them.

    Args:
        input_ids: int64 (sequences, length), left as it is.
        mask: the attention mask (sequences, length), 0 for padding.

    Returns:
        int64 (sequences, length); -100 at padding, and at the first token behind padding, which nothing predicts.
    """
    if mask is None:
        return input_ids
    labels = input_ids.masked_fill(mask == 0, -100)
    labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
    return labels


class InputCollector:
    """
    Sums a statistic of the inputs of layers over all calibration tokens. A subclass says which, in `_measure`.

    Padding does not count. It is read from the batches: `attention_mask` (sequences, length), and in the decoder of an
    encoder-decoder model `decoder_attention_mask` or, without one, the positions whose label is -100.

    Args:
        batches: what the walker was given.
        is_encoder_decoder: whether `attention_mask` belongs to the encoder.
        fallback: what happens to a layer that no token reached, for the warning: "pruned by magnitude".
    """

    def __init__(self, batches: list[dict[str, Any]], is_encoder_decoder: bool, fallback: str):
        self._batches = batches
        self._is_encoder_decoder = is_encoder_decoder
        self._fallback = fallback
        self._warned = False
        self.tokens = 0  # that entered the first of all layers
        self._counted: set[int] = set()  # batches counted in it

    def _measure(self, tokens: torch.Tensor) -> torch.Tensor:
        """The statistic of tokens (tokens, in), float32 or float64; a new tensor."""
        raise NotImplementedError

    def collect(self, unit: Unit) -> dict[str, torch.Tensor]:
        """
        Feeds all batches to the unit.

        Returns:
            {layer name: the sum}, float32, or float64 for a float64 model. Layers that no token reached are left out with a
            warning.

        Raises:
            ValueError: no token reaches the unit, or an input is not finite.
        """
        sums: dict[str, torch.Tensor] = {}
        tokens = dict.fromkeys(unit.layers, 0)
        padding: _Padding
        # The input that was measured last: q, k and v of an attention, for instance, have the same.
        latest: tuple[torch.Tensor, int, torch.Tensor] | None = None

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            padding.enter(module, args, kwargs)

        def gather_for(name: str) -> Callable[[nn.Module, tuple, dict], None]:
            def gather(module: nn.Module, args: tuple, kwargs: dict) -> None:
                nonlocal latest
                source = (*args, *kwargs.values())[0]
                inputs = self._real_tokens(source, padding, name)
                if latest is None or latest[0] is not source or latest[1] != source._version:
                    measured = self._measure(inputs.to(torch.promote_types(inputs.dtype, torch.float32)))
                    latest = source, source._version, measured
                if name in sums:
                    sums[name] += latest[2]
                else:
                    sums[name] = latest[2].clone()
                tokens[name] += inputs.shape[0]
                if index not in self._counted:
                    self._counted.add(index)
                    self.tokens += inputs.shape[0]

            return gather

        with ExitStack() as hooks:
            hooks.enter_context(unit.module.register_forward_pre_hook(enter, with_kwargs=True))
            for name, layer in unit.layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(gather_for(name), with_kwargs=True))
            for index, batch in enumerate(self._batches):
                padding = _Padding(batch, self._is_encoder_decoder, in_block=bool(unit.name))
                unit.feed(index)
                latest = None

        unseen = [name for name, count in tokens.items() if count == 0]
        if len(unseen) == len(tokens):
            raise ValueError(f"calibration: no token reaches {unit.name or ', '.join(unit.layers)}.")
        if unseen:
            warnings.warn(
                f"No calibration token reaches {', '.join(unseen)}: {self._fallback}. More data may help (experts), or "
                "exclude_modules.",
                stacklevel=2,
            )
        for name, total in sums.items():
            if not torch.isfinite(total).all():
                raise ValueError(
                    f"calibration: the inputs of {name} are not finite; is its dtype too small for this model?"
                )
        return {name: total for name, total in sums.items() if tokens[name]}

    def _real_tokens(self, inputs: torch.Tensor, padding: _Padding, name: str) -> torch.Tensor:
        """(..., features) to (tokens, features) without the padding."""
        mask = padding.mask_of(inputs)
        if mask is None:
            return inputs.reshape(-1, inputs.shape[-1])
        mask = mask.to(inputs.device)
        places = inputs.shape[:-1]
        if places == mask.shape:
            return inputs[mask]
        if places == (mask.numel(),):
            return inputs[mask.flatten()]
        if places == mask.T.shape:
            return inputs[mask.T]
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"The inputs of {name}, of shape {tuple(inputs.shape)}, do not line up with the attention mask, of shape "
                f"{tuple(mask.shape)}: padding in it counts as data.",
                stacklevel=2,
            )
        return inputs.reshape(-1, inputs.shape[-1])


class _Padding:
    """Which positions of one batch are padding, from the view of the block that runs."""

    def __init__(self, batch: dict[str, Any], is_encoder_decoder: bool, in_block: bool):
        self._batch = batch
        self._is_encoder_decoder = is_encoder_decoder
        self._in_block = in_block
        self._look(encoder_states=None)

    def enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Called before the block runs, with its arguments."""
        arguments = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        self._look(arguments.get("encoder_hidden_states"))

    def _look(self, encoder_states: torch.Tensor | None) -> None:
        self._encoder_states = encoder_states
        self._encoder = self._mask("attention_mask" if self._is_encoder_decoder else "encoder_attention_mask")
        in_decoder = encoder_states is not None or not self._in_block
        if not self._is_encoder_decoder or not in_decoder:
            self._own = self._mask("attention_mask")
        elif self._batch.get("decoder_attention_mask") is not None:
            self._own = self._mask("decoder_attention_mask")
        else:
            labels = self._batch.get("labels")
            self._own = _unless_full(labels != -100) if labels is not None and labels.dim() == 2 else None

    def mask_of(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """The mask (sequences, length), True for real tokens, for these inputs of a layer; None if all of them are real."""
        states = self._encoder_states
        if states is not None and states.data_ptr() == inputs.data_ptr():  # keys and values of cross-attention
            return self._encoder
        return self._own

    def _mask(self, key: str) -> torch.Tensor | None:
        mask = self._batch.get(key)
        # Masks with more dimensions shape the attention; they do not tell padding.
        return _unless_full(mask != 0) if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def _unless_full(mask: torch.Tensor) -> torch.Tensor | None:
    return None if mask.all() else mask
