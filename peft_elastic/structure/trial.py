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
"""The trial of a layout: a small copy of the module that runs a stack of blocks, and the laws that must hold for it (`proof.py`)."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from ..layers.backends import backend_of
from ..layers.backends.float import FLOAT
from ..layers.narrowed import active_ranges
from .copies import FEW, LARGE, Copier, arguments_for, plain_module, shorten
from .features import layer_at, layer_sizes, permute
from .layouts import Returning, Skip
from .modules import module_at
from .narrow import check_narrowable, set_active, set_skipped, set_width
from .parts import Block, Width
from .reading import Reading
from .removed import main_first


# Of the greatest output: what float32 and another order of sums may change. A law that does not hold misses it by far.
_TOLERANCE = 2e-3
# A choice between experts, or a rounding, can be so close that another order of sums decides it: other weights decide otherwise.
_SEEDS = 3
# Blocks to try, where there are as many: a first, one in the middle and a last one.
_BLOCKS = 3
# Tokens that follow with a cache
_STEP = 3
_PARTS = ("block", "attention", "mlp")
_WORDS = {"heads": "heads", "mlp": "MLP channels"}


class Failure(Exception):
    """A law does not hold; the text is the end of a sentence about the block. Not of numbers: it will not with other weights."""

    of_numbers = False


class _Difference(Failure):
    of_numbers = True


@contextmanager
def laboratory() -> Iterator[None]:
    """Nothing of how the caller computes, and nothing that stays behind."""
    dtype = torch.get_default_dtype()
    level = logging.root.manager.disable
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)
            torch.set_default_dtype(dtype)


class Trial:
    """A copy of the module that runs a stack of blocks, and the laws."""

    def __init__(self, model: nn.Module, structure: Reading, blocks: list[Block], keys: Mapping[str, Any]) -> None:
        self._model, self._structure, self._keys = model, structure, keys
        self._real_blocks = blocks
        self._stack = blocks[0].stack
        whole = module_at(model, self._stack)
        seen: set[Any] = set()
        last = 0
        for block in blocks:
            if keys[block.path] not in seen:
                seen.add(keys[block.path])
                last = block.index
        self._count = min(max(last + 1, _BLOCKS), len(list(whole.children())))
        self._set_up(0)

    # -- the copy --

    def _set_up(self, seed: int) -> None:
        """Copy a module around the stack, and find arguments with which it runs the blocks."""
        reason: Exception | None = None
        for path in self._roots():
            for few in self._reductions():
                root = self._copy(path, few, seed)
                modules = [module_at(root, block.path) for block in self._blocks]
                shorten(root)
                hidden = _hidden_size(root, self._blocks)
                for arguments in arguments_for(root, modules, hidden, seed):
                    self._root, self._arguments = root, arguments
                    try:
                        self._base = self._outputs(must_run=modules)
                        return
                    except Failure as error:
                        reason = error if reason is None else reason
        raise Failure(f"it could not be tried ({reason}), so nothing is known about it")

    def _roots(self) -> list[str]:
        """Paths of the modules around the stack that may be tried: first the model that it belongs to, which makes the cache, then
        the others from the inside out. A model that reaches into another one for its blocks is what runs them."""
        parts = self._stack.split(".")[:-1]
        paths = [".".join(parts[:number]) for number in range(len(parts), -1, -1)]
        modules = {path: plain_module(module_at(self._model, path))[0] for path in paths}
        for path in reversed(paths):
            forward = getattr(type(modules[path]), "forward", None)
            inner = self._inside(self._stack, path)
            with contextlib.suppress(TypeError, OSError):  # without a source
                if "." in inner and f"self.{inner}" in inspect.getsource(forward):  # type: ignore[arg-type]
                    paths = paths[paths.index(path) :]
                    break
        models = [path for path in paths if isinstance(modules[path], PreTrainedModel)][:1]
        return list(dict.fromkeys(models + paths))

    def _reductions(self) -> list[tuple[str, ...]]:
        size = sum(p.numel() for p in module_at(self._model, self._real_blocks[0].path).parameters())
        return [("heads", "mlp"), ("mlp",), ("heads",), ()] if size > LARGE else [()]

    def _tried(self) -> list[Block]:
        return [block for block in self._real_blocks if block.index < self._count]

    @staticmethod
    def _inside(path: str, root: str) -> str:
        return path[len(root) + 1 :] if root else path

    def _copy(self, path: str, few: tuple[str, ...], seed: int) -> nn.Module:
        whole, _ = plain_module(module_at(self._model, self._stack))
        root = Copier({id(whole): self._count}, seed).module(module_at(self._model, path))
        for block in self._tried():
            for attention in block.attentions:
                attention.set_heads(module_at(root, self._inside(attention.path, path)), attention.heads)
        for width in self._structure.widths:
            for place, name in width.numbers:
                if f"{place}.".startswith(f"{path}." if path else ""):
                    with contextlib.suppress(AttributeError):  # of a block that was cut off
                        module_at(root, self._inside(place, path)).__dict__[name] = width.full
        names = {self._inside(block.path, path): block for block in self._tried()}
        read = Reading(root, {name: block.layout for name, block in names.items()})
        self._blocks = [block for block in read.blocks if block.path in names]
        if [block.path for block in self._blocks] != list(names):
            raise Failure("a copy of it is read in another way")
        self._key_of = {block.path: self._keys[names[block.path].path] for block in self._blocks}
        stack = self._blocks[0].stack
        mine = {block.path for block in self._blocks} | {stack}
        self._widths = [width for width in read.widths if width.name in mine]
        self._few(root, few)
        return root

    def _few(self, root: nn.Module, kinds: tuple[str, ...]) -> None:
        """Cut a copy of large blocks down to a few heads and channels."""

        if not kinds:
            return
        for width in self._widths:
            if width.kind in kinds and width.units > FEW[width.kind]:
                set_width(root, width, FEW[width.kind] * width.unit)
        for layer in list(root.modules()):
            if active_ranges(layer) != (None, None):
                _cut(layer)
        paths = {block.path: block.layout for block in self._blocks}
        read = Reading(root, paths)
        names = {width.name for width in self._widths}
        self._blocks = [block for block in read.blocks if block.path in paths]
        self._widths = [width for width in read.widths if width.name in names]

    # -- running --

    def _call(self, **more: Any) -> Any:
        arguments = {**self._arguments, **more}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = value.clone()  # some models add to what they are given
        torch.default_generator.manual_seed(0)  # and some leave out parts of it at random
        try:
            return self._root(**arguments)
        except Exception as error:  # noqa: BLE001 - whatever it is, it does not run in this way
            text = " ".join(str(error).split())
            raise Failure(f"the forward fails ({type(error).__name__}: {text[:160]})") from error

    def _outputs(self, must_run: Iterable[nn.Module] = (), **more: Any) -> list[torch.Tensor]:
        """The tensors that the copy returns, without a cache."""
        ran: Counter[int] = Counter()
        if "use_cache" in inspect.signature(self._root.forward).parameters:
            more.setdefault("use_cache", False)
        with ExitStack() as hooks:
            for module in must_run:
                hooks.enter_context(module.register_forward_hook(lambda module, *_: ran.update([id(module)])))
            outputs = [leaf for leaf in _leaves(self._call(**more)) if leaf.is_floating_point()]
        if not all(id(module) in ran for module in must_run):
            raise Failure("the model does not run the block by calling it")
        if ran:
            self._runs_once = max(ran.values()) == 1
        if not outputs or not all(torch.isfinite(output).all() for output in outputs):
            raise Failure("there are no finite outputs")
        return outputs

    def _demand(self, found: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
        if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
            shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (found, expected)]
            raise Failure(f"{what}: the outputs have the shapes {shapes[0]} in place of {shapes[1]}")
        for one, other in zip(found, expected):
            off = (one - other).abs().max().item() if one.numel() else 0.0
            if not off <= _TOLERANCE * max(other.abs().max().item(), 1e-3):
                raise _Difference(f"{what} (outputs of a trial differ by {off:.2g})")

    def _often(self, law: Callable[[], None]) -> str | None:
        """Why a law does not hold, with any of some seeds."""
        why = None
        for seed in range(_SEEDS):
            try:
                if seed:
                    self._set_up(seed)
                law()
                why = None
                break
            except Failure as failure:
                why = str(failure)
                if not failure.of_numbers:
                    break
            except Exception as error:  # noqa: BLE001 - of a block whose parts do not go together as its layout says
                why = f"the trial of it fails ({type(error).__name__}: {error})"
                break
        if seed:
            self._set_up(0)
        return why

    # -- widths --

    def _widths_of(self, key: Any, kind: str) -> list[Width]:
        paths = [path for path, other in self._key_of.items() if other[:-1] == key]
        stacks = {block.stack for block in self._blocks}
        return [w for w in self._widths if w.kind == kind and w.units > 1 and (w.name in paths or w.name in stacks)]

    def why_not_narrowed(self, key: Any, kind: str) -> str | None:
        if not self._widths_of(key, kind):
            return None
        word = _WORDS[kind]

        def law() -> None:
            widths = self._widths_of(key, kind)
            with self._weights_put_back():
                self._permute(widths)
                self._demand(
                    self._outputs(), self._base, f"another order of its {word} changes what the model computes"
                )
            if self._can_be_narrowed(widths):
                self._narrowed_is_masked(widths, max(1, widths[0].units // 2), word)

        return self._often(law)

    @contextmanager
    def _weights_put_back(self) -> Iterator[None]:
        weights = [(parameter, parameter.data) for parameter in self._root.parameters()]
        try:
            yield
        finally:
            for parameter, data in weights:
                parameter.data = data

    def _permute(self, widths: list[Width]) -> None:
        random = torch.Generator().manual_seed(1)
        for width in widths:
            for order in width.orders:
                new = torch.randperm(width.units, generator=random)
                if torch.equal(new, torch.arange(width.units)):
                    new = new.flip(0)
                for slot in order.slots:
                    permute(module_at(self._root, slot.path), slot.side, slot.index(new))

    def _can_be_narrowed(self, widths: list[Width]) -> bool:
        """Whether all of the layers can; who asks for it is told otherwise later."""

        try:
            for width in widths:
                for slot in width.slots:
                    check_narrowable(layer_at(self._root, slot.path), slot.path)
        except ValueError:
            return False
        return True

    def _narrowed_is_masked(self, widths: list[Width], kept: int, word: str) -> None:

        with self._weights_put_back():
            for width in widths:
                for slot in width.slots:
                    if slot.side != "in":
                        continue
                    layer = layer_at(self._root, slot.path)
                    weight = layer.get_parameter("weight")
                    in_dim = 1 - backend_of(layer).out_dim(layer)
                    mask = torch.zeros(weight.shape[in_dim])
                    for start, stop in slot.ranges(kept, width.units):
                        mask[start:stop] = 1
                    weight.data = weight.data * (mask if in_dim else mask[:, None])
            expected = self._outputs()
        try:
            for width in widths:
                set_width(self._root, width, kept * width.unit)
            try:
                found = self._outputs()
            except Failure as failure:
                raise Failure(f"with fewer {word} {failure}") from failure
            self._demand(found, expected, f"with fewer {word} it is not the model without the others")
        finally:
            for width in widths:
                set_width(self._root, width, width.full)

    # -- skips --

    def skips(self) -> dict[Any, dict[str, str | dict[str, Skip]]]:
        """For every class, what is known about each part that its layout can skip."""
        found: dict[Any, dict[str, Any]] = {key: {} for key in self._key_of.values()}
        self._cached = self._has_cache()
        for block in self._blocks:
            key = self._key_of[block.path]
            for part in block.skips:
                if part != "mlp" and self._cache_name and not self._runs_once:
                    found[key][part] = "the model runs it more than once, each time with another layer of the cache"
                elif part not in found[key]:
                    found[key][part] = self._try_skip(block.path, part)
        # several at once
        for part in _PARTS:
            good = [
                block.path for block in self._blocks if isinstance(found[self._key_of[block.path]].get(part), dict)
            ]
            if part == "block" and len(good) == self._count:
                good = good[:-1]
            if len(good) > 1:
                several = dict.fromkeys(good, str(part))
                why = self._often(lambda several=several: self._several_law(found, several))  # type: ignore[misc]
                for path in good if why is not None else ():
                    found[self._key_of[path]][part] = f"where several are skipped, {why}"
        return found

    def _try_skip(self, path: str, part: str) -> str | dict[str, Skip]:
        candidates: list[dict[str, Skip]] = []
        why: str | None = None

        def block() -> Block:
            return next(block for block in self._blocks if block.path == path)

        plain = {place[len(path) + 1 :]: skip for place, skip in block().skips[part].items()}
        candidates = [plain]
        adapted = self._adapted(path, plain)
        if adapted is not None and adapted != plain:
            candidates.insert(0, adapted)
        for skips in candidates:
            failed = self._often(lambda skips=skips: self._skip_law(block(), part, skips))  # type: ignore[misc]
            if failed is None:
                return skips
            why = failed
        return f"skipped, {why}" if why is not None else plain

    def _adapted(self, path: str, skips: dict[str, Skip]) -> dict[str, Skip] | None:
        """The skips, with the kind of result that the modules have."""
        kinds: dict[str, Skip] = {}

        def note(place: str, skip: Skip) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
                made = _skip_result(skip, module, args, kwargs)
                if made is None:
                    return
                if isinstance(output, (tuple, list)) and type(output) in (tuple, list):
                    if type(made) is not type(output) or len(made) != len(output):
                        kinds.setdefault(place, Returning(skip, type(output).__name__, len(output)))
                elif isinstance(output, torch.Tensor) and not isinstance(made, torch.Tensor):
                    kinds.setdefault(place, Returning(skip, "tensor", 1))

            return hook

        with ExitStack() as hooks:
            for place, skip in skips.items():
                module = module_at(self._root, f"{path}.{place}" if place else path)
                hooks.enter_context(module.register_forward_hook(note(place, skip), with_kwargs=True))
            self._outputs()
        return {**skips, **kinds} if kinds else None

    def _skip_law(self, block: Block, part: str, skips: dict[str, Skip]) -> None:
        found = {self._key_of[block.path]: {part: skips}}
        self._several_law(found, {block.path: part})

    def _several_law(self, found: Mapping[Any, Mapping[str, Any]], parts: Mapping[str, str]) -> None:
        """Skipping these parts of these blocks is right, without a cache and with one."""
        chosen: list[tuple[Block, str]] = []
        with ExitStack() as hooks:
            for block in self._blocks:
                if block.path not in parts:
                    continue
                part = parts[block.path]
                skips = found[self._key_of[block.path]][part]
                block.skips[part] = {
                    f"{block.path}.{path}" if path else block.path: skip for path, skip in skips.items()
                }
                chosen.append((block, part))
                for place, skip in block.skips[part].items():
                    module = module_at(self._root, place)
                    hooks.enter_context(module.register_forward_hook(_exchange(skip), with_kwargs=True))
            expected = self._outputs()
        try:
            for block, part in chosen:
                set_skipped(self._root, block, part, True)
            self._demand(self._outputs(), expected, "the model does not go on with the hidden states of the others")
            if self._cached:
                self._cache_law()
        finally:
            for block, part in chosen:
                set_skipped(self._root, block, part, False)

    # -- caches --

    def _has_cache(self) -> bool:
        """Whether the copy computes with a key-value cache what it computes without one."""
        names = inspect.signature(self._root.forward).parameters
        self._cache_name = next((name for name in ("cache", "past_key_values") if name in names), "")
        mains = [name for name in ("inputs_embeds", "input_ids", "hidden_states") if name in self._arguments]
        if not self._cache_name or "use_cache" not in names or not mains or "decoder_input_ids" in names:
            return False
        self._main = mains[0]
        try:
            self._cache_law()
        except Failure:
            return False
        return True

    def _cache_law(self) -> None:
        tokens = self._arguments[self._main]
        whole = self._outputs()[0]
        first = self._call(**{self._main: tokens[:, :-_STEP], "use_cache": True})
        values = first.values() if isinstance(first, ModelOutput) else first if isinstance(first, tuple) else ()
        cache = next((value for value in values if isinstance(value, Cache)), None)
        if cache is None:
            raise Failure("no cache is returned")
        second = self._call(**{self._main: tokens[:, -_STEP:], "use_cache": True, self._cache_name: cache})
        outputs = [_leaves(output)[0] for output in (first, second)]
        self._demand(
            [torch.cat(outputs, 1)], [whole], "with a key-value cache it computes something else than without"
        )


def _cut(layer: Any) -> None:
    """Leave the active part of a narrowed layer of a copy alone."""

    active = {"weight": layer.weight.clone(), "bias": None if layer.bias is None else layer.bias.clone()}
    set_active(layer, "out", None)
    set_active(layer, "in", None)
    for name, value in active.items():
        if value is not None:
            layer.get_parameter(name).data = value
    FLOAT.set_sizes(layer)


def _hidden_size(root: nn.Module, blocks: list[Block]) -> int:
    """Features of the hidden states, as far as the layers of the blocks tell."""
    for block in blocks:
        layout = block.layout
        names = [a.path(a.qkv[0]) for a in layout.attentions if "attention" not in block.removed]
        if layout.mlp is not None and "mlp" not in block.removed:
            names.append(layout.mlp.inputs[0])
        if names:
            return layer_sizes(layer_at(root, f"{block.path}.{names[0]}"))[1]
    return next((p.shape[-1] for p in root.parameters()), 1)


def _leaves(output: Any) -> list[torch.Tensor]:
    """The tensors of an output, without those of caches."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, Cache):
        return []
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return [leaf for entry in output for leaf in _leaves(entry)]
    return []


def _skip_result(skip: Skip, module: nn.Module, args: tuple, kwargs: dict) -> Any:
    """What a skip returns, None if it does not take these arguments."""
    try:
        args, kwargs = main_first(args, kwargs)
        return skip(module, *args, **kwargs)
    except Exception:  # noqa: BLE001 - the law says so, when it is tried
        return None


def _exchange(skip: Skip) -> Callable[..., Any]:
    """A hook that leaves what a module returns as it is, but for its first tensor."""

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        made = _leaves(_skip_result(skip, module, args, kwargs))
        leaves, spec = pytree.tree_flatten(output)
        place = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)), None)
        if not made or place is None or made[0].shape != leaves[place].shape:
            return None
        leaves[place] = made[0]
        return pytree.tree_unflatten(leaves, spec)

    return hook
