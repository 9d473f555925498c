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
"""Models whose own weights are a super-network: an ordinary model of another class, with the methods of an `ElasticHost` in front."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..common.checks import wrong
from ..common.parameters import check_here
from ..layers.batch_norm import NarrowedBatchNorm
from ..layers.convolutional import with_active_tensors
from ..layers.narrowed import change_class
from ..quantization.saving import state_to_save
from ..structure.along import Along
from ..structure.importance import note_orders, noted_orders, order_digest
from ..supernet.host import HOST_ATTRIBUTE
from ..supernet.space import SearchSpace, Subnet
from ..supernet.summary import SubnetSummary
from . import saving
from .config import WITHOUT_DATA, ElasticConfig
from .parts import BlockParts, ChannelParts, find_parts


_STATE = "_elastic_state"


@dataclass(eq=False)
class _State:
    """What an elastic model knows."""

    config: ElasticConfig
    parts: BlockParts | ChannelParts
    active: Subnet
    # None: the largest
    chosen: Optional[Subnet] = None
    # whether a training step has activated another than the chosen one
    sampled: bool = False
    # what was active when evaluation mode interrupted a training step, and is again in training mode
    suspended: Optional[Subnet] = None


class ElasticModel(nn.Module):
    """
    A model whose own weights are a super-network: what `get_elastic_model` makes of a model is an instance of this class and of
    the one that it had.

    All subnets share the weights: one of w heads or channels of a block computes with the first w of them, and one without a block
    passes its input on (Once-for-All, https://arxiv.org/abs/1908.09791; EFTNAS, LREC-COLING 2024). Between training steps, and
    in evaluation mode, the model computes as the chosen subnet.

    **Attributes**:
        - **search_space** (`SearchSpace`): what can be chosen.
        - **active_subnet** (`Subnet`): what the model computes now.
        - **elastic_config** (`ElasticConfig`): what it was made with; not to be changed.
    """

    # of the model as it was
    plain_class: type[nn.Module]

    @property
    def elastic_config(self) -> ElasticConfig:
        return self._own.config

    @property
    def _own(self) -> _State:
        return self.__dict__[_STATE]

    # -- search space and subnets ------------------------------------------------------------------------------------

    @property
    def search_space(self) -> SearchSpace:
        """The choices: kinds "heads", "mlp" and "depth", or "channels", "kernel" and "depth"."""
        return self._own.parts.space

    @property
    def active_subnet(self) -> Subnet:
        """What the model computes now."""
        return self._own.active

    def set_subnet(self, subnet: Subnet | Mapping[str, int] | str) -> None:
        """Choose the subnet that the model computes from now on. The choice is saved with the model.

        Args:
            subnet (`Subnet`, `Mapping[str, int]` or `str`):
                A subnet of `search_space`, a dict from choice key to value, or `"max"`, `"min"`, `"heuristic"`.

        Raises:
            ValueError: if the subnet does not belong to the search space, is narrower than a model that is not sorted yet, or
                smaller than one that got an adapter meanwhile.
        """
        own = self._own
        checked = own.parts.space.subnet(subnet)
        self._activate(checked)
        own.chosen, own.sampled, own.suspended = checked, False, None

    def sample_subnet(self, subnet: Subnet | Mapping[str, int] | str) -> None:
        """Activate a subnet for a training step, without choosing it: saving and `restore_subnet()` go by the chosen one, and so
        does evaluation mode, after which `model.train()` goes on with the step.

        Args:
            subnet: as in `set_subnet`.

        Raises:
            ValueError: as `set_subnet`, and if no block of a stack would be left.
        """
        own = self._own
        checked = own.parts.space.subnet(subnet)
        own.parts.check_sampled(checked)
        self._activate(checked)
        own.sampled, own.suspended = True, None

    def restore_subnet(self) -> None:
        """Activate the chosen subnet again (see `set_subnet`; the largest one if none was chosen)."""
        own = self._own
        self._activate(own.parts.space.max if own.chosen is None else own.chosen)
        own.sampled, own.suspended = False, None

    def subnet_summary(self) -> SubnetSummary:
        """Sum up what is active, as a table when printed."""
        return SubnetSummary(None, self.active_subnet, self.search_space)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        own = self._own
        if not mode and own.sampled:
            sampled = own.active
            self.restore_subnet()
            own.suspended = sampled
        elif mode and own.suspended is not None:
            self.sample_subnet(own.suspended)
        return self

    def _activate(self, subnet: Subnet) -> None:
        own = self._own
        own.parts.check(self, subnet, own.config.importance)
        if subnet != own.parts.space.max:
            _check_unadapted(self, "A subnet smaller than the whole model")
        own.parts.activate(self, subnet)
        own.active = subnet

    # -- order -------------------------------------------------------------------------------------------------------

    def sort_by_importance(
        self,
        calibration: Any = None,
        importance: Optional[str | Mapping[str, torch.Tensor]] = None,
        *,
        max_samples: Optional[int] = None,
        progress: bool = True,
        optimizer: Any = None,
        averaged: Any = None,
    ) -> dict[str, torch.Tensor]:
        """Sort the heads and MLP channels that are elastic by falling importance, before a training or in the middle of one (then
        with its `optimizer`). It does not change what the largest subnet computes, and orders compose: what is saved says which
        unit of the original model each one is.

        Args:
            calibration: an iterable of batches, for `"activation"` and `"gradient"`.
            importance (*optional*): as in `peft_elastic.sort_by_importance`; defaults to that of the configuration.
            max_samples (`int`, *optional*): number of calibration sequences to use.
            progress (`bool`): show a progress bar.
            optimizer (*optional*): the optimizer of the training, or a list of some, whose state moves along.
            averaged (*optional*): an average of the weights (`AveragedModel`), another copy, or a list, sorted in the same way.

        Returns:
            `dict[str, torch.Tensor]`: the scores in the new order.

        Raises:
            ValueError: as `peft_elastic.sort_by_importance`, and if no width is elastic.
        """
        importance = self._own.config.importance if importance is None else importance
        with self._whole_to_sort() as parts:
            return parts.sort(
                self, importance, calibration, max_samples=max_samples, progress=progress, along=(optimizer, averaged)
            )

    def check_sort(self, calibration: Any = None, *, optimizer: Any = None, averaged: Any = None) -> None:
        """ValueError if `sort_by_importance` would refuse these arguments, or the importance of the configuration sorts nothing."""
        with self._whole_to_sort() as parts:
            parts.check_sort(self, self._own.config.importance, calibration, (optimizer, averaged))

    @contextmanager
    def _whole_to_sort(self) -> Iterator[BlockParts | ChannelParts]:
        """The parts of the model, all of it active inside."""
        own = self._own
        if not own.config.elastic_width:
            raise ValueError("`elastic_width` is not set, so there is nothing to sort for.")
        before = own.active
        own.parts.activate(self, own.parts.space.max)
        try:
            yield own.parts
        finally:
            own.parts.activate(self, before)

    def noted_orders(self) -> dict[str, torch.Tensor]:
        """Which unit of the original model each unit is now, int64 (units,), by the name of the order."""
        return noted_orders(self)

    def resume_orders(self, orders: Mapping[str, torch.Tensor], averaged: Any = None) -> None:
        """Note that the weights, which have just been loaded from a checkpoint, are in these orders.

        Args:
            orders: what `noted_orders` gave when the checkpoint was made.
            averaged (*optional*): as in `sort_by_importance`; they are in the same orders.

        Raises:
            ValueError: if they are none of this model; nothing is changed then.
        """
        self._own.parts.check_orders(orders)
        for each in (self, *Along(self, averaged=averaged).averaged):
            note_orders(each, orders)

    # -- training ----------------------------------------------------------------------------------------------------

    def optimizer_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The parameters that are trained, for an optimizer: norms and biases without weight decay, as transformers' Trainer
        groups them by itself.

        Args:
            weight_decay (`float`): of the other parameters.

        Returns:
            `list[dict]`: two groups, `{"params": [...], "weight_decay": ...}`.
        """
        norms = {
            id(parameter)
            for module in self.modules()
            if "norm" in type(module).__name__.lower()
            for parameter in module._parameters.values()
        }
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        others = [parameter for name, parameter in trained if "bias" in name or id(parameter) in norms]
        left_out = {*map(id, others)}
        decayed = [parameter for _, parameter in trained if id(parameter) not in left_out]
        return [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    @property
    def loader(self) -> Any:
        """What makes such a model of a folder, in the workers of a search."""
        return ElasticModel.from_pretrained

    def check_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """ValueError if a training is about to go on from the checkpoint of another super-network: its weights fit any, and would be
        trained on silently as subnets of this one.

        Args:
            folder: of the checkpoint; nothing is said of one that is not there, or has no `elastic_model.json`.
        """
        if not os.path.isfile(os.path.join(folder, saving.FILE)):
            return
        own, saved = self._own, saving.read(folder)
        same = saving.space_of(saved).fingerprint == own.parts.space.fingerprint and saved["order"] == order_digest(
            self
        )
        if not same:
            raise ValueError(
                f"{os.fspath(folder)!r} is a checkpoint of a super-network with other options, or with heads and channels in another "
                "order. Go on with the model that it was: `ElasticModel.from_pretrained(checkpoint)`, and resume from it."
            )

    # -- search ------------------------------------------------------------------------------------------------------

    def search_subnet(self, *args: Any, **kwargs: Any) -> Any:
        """`peft_elastic.search_subnet` of this model."""
        from ..search import search_subnet

        return search_subnet(self, *args, **kwargs)

    # -- out ---------------------------------------------------------------------------------------------------------

    def extract_subnet(
        self,
        subnet: Optional[Subnet | Mapping[str, int] | str] = None,
        *,
        sparse_kernel: str | bool = "auto",
        sparse_dtype: str = "bf16",
        prepare: Optional[Callable[[nn.Module], Any]] = None,
    ) -> nn.Module:
        """Copy what belongs to a subnet, while the super-network stays as it is.

        Args:
            subnet (`Subnet`, `Mapping[str, int]` or `str`, *optional*): as in `set_subnet`; the chosen one by default.
            sparse_kernel (`str` or `bool`): "auto" calls `peft_elastic.sparsify_linears` if the model is on the CPU and the C++
                extension is there, which swaps the layers that are measured to be faster; True swaps every layer with 30% zeros or
                more and raises where it cannot; False leaves the model dense.
            sparse_dtype (`str`): "bf16" or "int8", of the values of the sparse layers.
            prepare (`Callable`, *optional*): called with the copy when the subnet is active in it: a `BatchNormRecalibration`, whose
                statistics are written into what is returned. Without one it has those that were averaged for the subnet, if it is active and they were, and otherwise,
                with a warning, those of the largest subnet.

        Returns:
            `nn.Module`: a smaller ordinary model, of the class that the model had. Saved with `save_pretrained`, it loads with
            `from_pretrained`: of a subnet whose blocks are all alike without this package, otherwise after `import peft_elastic`.

        Raises:
            ValueError: as `set_subnet`, on a wrong argument, and if the model has got an adapter.
        """
        from ..deploy.merged import can_be_sparse, make_sparse

        own = self._own
        chosen = own.chosen or own.parts.space.max
        checked = chosen if subnet is None else own.parts.space.subnet(subnet)
        own.parts.check(self, checked, own.config.importance)
        check_here("the model", self.parameters())
        _check_unadapted(self, "`extract_subnet`")
        swap = can_be_sparse(self, sparse_kernel, sparse_dtype)
        copied = copy.deepcopy(self)
        copied._activate(checked)
        if prepare is not None:
            prepare(copied)
        _warn_of_statistics(copied)
        model = copied._as_plain()
        own.parts.extract(model)
        if swap:
            make_sparse(model, sparse_kernel, sparse_dtype, False)
        return model

    def unload(self) -> nn.Module:
        """Make this the ordinary model again that it was, whole, with the weights and in the order that it has now.

        Returns:
            `nn.Module`: this very object.
        """
        self.restore_subnet()
        own = self._own
        own.parts.activate(self, own.parts.space.max)
        own.parts.take_back(self)
        return self._as_plain()

    def _as_plain(self) -> nn.Module:
        change_class(self, with_active_tensors(_class_before(self), self))
        del self.__dict__[_STATE]
        return self

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Write the largest subnet as an ordinary checkpoint, in its order, which transformers loads without this package, and
        beside it `elastic_model.json`, with which `ElasticModel.from_pretrained` makes the super-network of it again. Arguments are
        those of the model's own `save_pretrained`.

        Raises:
            ValueError: if the model is none of transformers, has an adapter or quantised layers; what is in the folder stays then.
        """
        if not isinstance(self, PreTrainedModel):
            raise ValueError(
                f"`save_pretrained` is for models of transformers, got {self.plain_class.__name__}: save `state_dict()`, and what "
                "`extract_subnet` returns with `peft_elastic.save_extracted`."
            )
        _check_unadapted(self, "`save_pretrained`")
        state_to_save(self)  # refuses quantised layers, before the file of an earlier checkpoint is removed
        is_main, push = kwargs.get("is_main_process", True), kwargs.pop("push_to_hub", False)
        if is_main and not os.path.isfile(save_directory):
            saving.remove(save_directory)
        own = self._own
        if own.parts.inputs is not None:
            state = kwargs.get("state_dict")
            kwargs["state_dict"] = saving.without_matrices(self.state_dict() if state is None else state)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if is_main:
            saving.write(save_directory, self, own.config, own.parts.space, own.chosen, own.parts.inputs)
        if push:  # writes a folder of its own, by this method
            hub = {name: kwargs[name] for name in ("commit_message", "private", "token", "revision") if name in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or os.path.basename(os.fspath(save_directory)), **hub)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike[str], *args: Any, model_class: Any = None, **kwargs: Any
    ) -> Any:
        """Load a super-network that `save_pretrained` has written, with its chosen subnet.

        Args:
            name_or_path (`str` or `os.PathLike`): the folder, or a repository of the hub.
            model_class (*optional*): the class to load the model with, or an Auto class; by default the one it was saved from.
            *args, **kwargs: of its `from_pretrained`.

        Returns:
            `ElasticModel`: in evaluation mode, as transformers' `from_pretrained`.

        Raises:
            ValueError: if it is none, is damaged, has an adapter beside it, or the model does not have that search space.
        """
        if cls is not ElasticModel:
            return cls.plain_class.from_pretrained(name_or_path, *args, **kwargs)  # type: ignore[attr-defined]
        hub = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
        saved = saving.read(name_or_path, **{name: kwargs[name] for name in hub if name in kwargs})
        config = ElasticConfig.from_dict(saved["config"])
        model = (model_class or saving.class_of(saved)).from_pretrained(name_or_path, *args, **kwargs)
        model = model[0] if isinstance(model, tuple) else model  # `output_loading_info`
        if (adapted := _adapted(model)) is not None:
            raise ValueError(
                f"{os.fspath(name_or_path)!r} must not hold an adapter beside the super-network, got one in {adapted!r}, which transformers "
                "loads with it: move adapter_config.json and the weights of the adapter to another folder."
            )
        saving.take_orders(model, saved)
        parts = _read(model, config, saving.example_of(saved))
        space = parts.space
        if space.fingerprint != saving.space_of(saved).fingerprint:
            raise ValueError(
                f"{saving.FILE} of {os.fspath(name_or_path)!r} has another search space than its model: one of the two was exchanged."
            )
        chosen = None if saved["active_subnet"] is None else space.subnet(saved["active_subnet"])
        _make_elastic(model, _State(config, parts, space.max))
        saving.take_matrices(name_or_path, model, **{name: kwargs[name] for name in hub if name in kwargs})
        if chosen is not None:
            model.set_subnet(chosen)
        return model

    def __reduce_ex__(self, protocol: Any) -> Any:
        # copies and pickles are made from the plain class, which takes the state along
        return _new_elastic, (_class_before(self),), self.__dict__


# the model is its own host
setattr(ElasticModel, HOST_ATTRIBUTE, property(lambda model: model))


def get_elastic_model(model: nn.Module, config: ElasticConfig, example_inputs: Any = None) -> Any:
    """
    Make a super-network of a model's own weights, the sibling of `peft.get_peft_model`.

    Train it with `Trainer` and a `SubnetSamplingCallback`, or with `ElasticTrainer`; search it with `search_subnet`.

    Args:
        model (`nn.Module`): a model of transformers, or any with blocks of a known layout; it is changed in place, and computes what
            it did.
        config (`ElasticConfig`): what is elastic. The model keeps a copy.
        example_inputs (*optional*): what a model whose channels are found by tracing is called with, a tensor or a tuple or dict of
            arguments: two images (2, channels, height, width), say. Models of transformers need none.

    Returns:
        `ElasticModel`: the same object, which is of its own class still.

    Raises:
        ValueError: if the model has adapters or is elastic already, an option is not possible in it, or a subnet could be saved and
            not loaded; nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise wrong("model", "a model (`nn.Module`)", model)
    if not isinstance(config, ElasticConfig):
        raise wrong("config", "an `ElasticConfig`", config)
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "`model` must be made elastic before `torch.compile`: compile what `get_elastic_model` returns."
        )
    if isinstance(model, ElasticModel):
        raise ValueError("`model` is elastic already; `model.unload()` makes it an ordinary one.")
    adapted = _adapted(model)
    if adapted is not None or getattr(model, HOST_ATTRIBUTE, None) is not None:
        raise ValueError(
            f"`model` must have no adapters, got one in {adapted!r}: merge it (`merge_and_unload()`), or make the adapter elastic "
            "(`ElasticLoraConfig`)."
        )
    config = copy.deepcopy(config)
    config.check()
    parts = _read(model, config, example_inputs)
    parts.check_describable(model)
    sorted_now = bool(config.elastic_width) and config.importance in WITHOUT_DATA
    if sorted_now:
        parts.check_sortable(model)
    _make_elastic(model, _State(config, parts, parts.space.max))
    if sorted_now:
        model.sort_by_importance(progress=False)  # type: ignore[operator]
    return model


def _read(model: nn.Module, config: ElasticConfig, inputs: Any) -> BlockParts | ChannelParts:
    """The parts of a model that a configuration makes elastic.

    Raises:
        ValueError: if that is not possible.
    """
    check_here("the model", model.parameters())
    return find_parts(model, config, inputs)


def _warn_of_statistics(model: nn.Module) -> None:
    """Say so if a narrowed model normalizes by the statistics of the whole one."""
    for path, module in model.named_modules():
        if (
            isinstance(module, NarrowedBatchNorm)
            and module.running_mean is not None
            and "statistics" not in module.__dict__
        ):
            warnings.warn(
                f"The subnet gets the statistics of BatchNorm of the largest one, as in {path!r}, with which it is far worse than it can be. Give "
                "`extract_subnet(..., prepare=BatchNormRecalibration(batches))`, which averages its own.",
                stacklevel=3,
            )
            return


def _adapted(model: nn.Module) -> str | None:
    """Where a model has an adapter, if it does."""
    return next((path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)


def _check_unadapted(model: nn.Module, what: str) -> None:
    """ValueError if the model got an adapter after it became elastic: that is of the whole layers, and not narrowed along."""
    if (path := _adapted(model)) is not None:
        raise ValueError(
            f"{what} is not possible while the elastic model has an adapter, as in {path!r}: merge it (`merge_and_unload()`) or take it "
            "off (`unload()`) at the whole width, and add adapters to what `extract_subnet` returns."
        )


def _make_elastic(model: nn.Module, state: _State) -> None:
    state.parts.prepare(model)
    model.__dict__[_STATE] = state
    change_class(model, _elastic_class(type(model)))  # type: ignore[arg-type]


def _class_before(model: ElasticModel) -> type[nn.Module]:
    """That of an elastic model as it was. One that owns narrowed tensors has another class in front of its elastic one."""
    elastic = next(cls for cls in type(model).__mro__ if ElasticModel in cls.__bases__)
    return elastic.__dict__["plain_class"]


@functools.cache
def _elastic_class(cls: type[nn.Module]) -> type[ElasticModel]:
    # The name stays: transformers, accelerate and Trainer go by it.
    members = {"plain_class": cls, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (ElasticModel, cls), members)


def _new_elastic(cls: type[nn.Module]) -> nn.Module:
    elastic = _elastic_class(cls)  # type: ignore[arg-type]
    return elastic.__new__(elastic)
