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
"""Models for the commands, what they write, and what they say."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peft_elastic import ElasticModel, Subnet
from peft_elastic.common.files import scratch_folder
from peft_elastic.common.writing import writing
from peft_elastic.elastic_model import saving
from peft_elastic.pruning import measure_sparsity
from peft_elastic.structure.folder_run import check_output
from peft_elastic.structure.rebuild import BLOCKS_ATTRIBUTE

from ._data import first_line
from ._options import seed


# What libraries raise when they meet a file that is damaged, which is not always their best.
_UNLOADABLE = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, SafetensorError)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser, required: bool = True, more_help: str = "") -> None:
    parser.add_argument(
        "--model", required=required, metavar="NAME", help="the base model: a name on the hub, or a folder" + more_help
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="precision to load it in (default: auto, that of the checkpoint; on CPUs float32 is usually several times as "
        "fast as the others)",
    )
    parser.add_argument("--device", help="where to compute, e.g. cpu or cuda:0 (default: the GPU if there is one)")


def add_tuned_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of the commands that take what `train` has written."""
    add_model_arguments(
        parser,
        required=False,
        more_help=" (default: the one the adapter was trained on); without --adapter, a super-network of train --full",
    )
    parser.add_argument("--adapter", metavar="DIR", help="the super-adapter, a folder or hub name")


def add_stream_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stream",
        action="store_true",
        help="go through the folder --model block by block, for models larger than memory: needs memory for the embeddings, two blocks "
        "and the activations, and goes on with --out where an earlier run was interrupted (default: if the weights are larger "
        "than the free memory)",
    )


def add_activations_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--activations-on-disk",
        action="store_true",
        help="with --stream: keep the activations of the calibration data in files in --out meanwhile, and not in memory",
    )


def check_no_activations(args: argparse.Namespace) -> None:
    """ValueError if the model is not gone through block by block, and an option is for that."""
    if args.activations_on_disk:
        raise ValueError("`--activations-on-disk` goes with `--stream`.")


def streams(args: argparse.Namespace, model: str, possible: bool = True) -> bool:
    """Whether a command is to go through the folder of its model block by block; says so if it decides that itself, which it does
    where it is `possible`.

    Raises:
        ValueError: it is to, and cannot.
    """
    folder = Path(model)
    if args.stream and not folder.is_dir():
        raise ValueError(f"`--stream` needs a folder as `--model`, got {model!r}; download the model first.")
    if not args.stream:
        if not possible:
            return False
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
        free = psutil.virtual_memory().available
        if weights <= free:
            return False
        print(
            f"The weights of {model} take {weights / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: going through them "
            "block by block, as with --stream."
        )
    check_output(folder, args.out)
    return True


def add_seed_argument(parser: argparse.ArgumentParser, of: str) -> None:
    parser.add_argument("--seed", type=seed, default=0, help=f"of {of} (default: %(default)s)")


def load_model(name: str, dtype: str = "auto", device: str | None = None) -> Any:
    """Load a pretrained model, of the class that its configuration names.

    Raises:
        ValueError: if there is no such model or device, or it cannot be loaded.
    """
    device = usable_device(device)
    _check_folder("--model", name, "config.json")
    # what libraries deprecate among themselves is of no use here
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        config = AutoConfig.from_pretrained(name)
        architecture = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
        return architecture.from_pretrained(name, dtype=dtype).to(device)
    except _UNLOADABLE as error:
        raise ValueError(f"`--model` {name!r} cannot be loaded: {first_line(error)}") from error


def usable_device(device: str | None) -> str:
    """Choose `device`, or else the GPU if there is one.

    Raises:
        ValueError: if it cannot be used.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device` {device!r} cannot be used: {first_line(error)}") from error
    return device


def load_causal_lm(name: str, dtype: str = "auto", device: str | None = None) -> Any:
    """Do as `load_model`, for the commands that work with language models alone."""
    return check_causal_lm(load_model(name, dtype, device), name)


def check_causal_lm(model: Any, name: str) -> Any:
    """Return the model.

    Raises:
        ValueError: if it is no causal language model.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(
            f"`--model` {name!r} is a {type(model).__name__}; this command knows causal language models (decoders). "
            "For other models use the Python API."
        )
    return model


def load_tokenizer(name: str, required: bool = True) -> Any:
    """Load the tokenizer of a model; None if it has none and none is required.

    Raises:
        ValueError: if one is required and cannot be loaded.
    """
    _check_folder("--model", name, "config.json")
    try:
        return AutoTokenizer.from_pretrained(name)
    except _UNLOADABLE as error:
        if not required:
            return None
        raise ValueError(f"`--model` {name!r} has no tokenizer that can be loaded: {first_line(error)}") from error


def base_model_name(model: str | None, adapter: str) -> str:
    """Choose `model`, or else the base model that the adapter itself names.

    Raises:
        ValueError: if the adapter is none, or names no base model.
    """
    _check_folder("--adapter", adapter, "adapter_config.json")
    try:
        config = PeftConfig.from_pretrained(adapter)
    except _UNLOADABLE as error:
        raise ValueError(f"`--adapter` {adapter!r} cannot be loaded: {first_line(error)}") from error
    if model or config.base_model_name_or_path:
        return model or config.base_model_name_or_path
    raise ValueError(f"`--model` is needed: the adapter {adapter!r} does not name its base model.")


def load_adapter(model: Any, adapter: str) -> PeftModel:
    """Load an elastic adapter on the model, in evaluation mode, its active subnet restored.

    Raises:
        ValueError: if the adapter is not elastic or does not fit the model.
    """
    try:
        peft_model = PeftModel.from_pretrained(model, adapter)
    except _UNLOADABLE as error:
        raise ValueError(f"`--adapter` {adapter!r} cannot be loaded on this model: {first_line(error)}") from error
    if not hasattr(peft_model, "search_space"):
        raise ValueError(
            f"`--adapter` {adapter!r} is not elastic, it has the peft type {peft_model.active_peft_config.peft_type.value}."
        )
    return peft_model.eval()


def is_supernet(folder: Path) -> bool:
    """Say whether a folder holds a super-network of a model's own weights, of `train --full`."""
    return (folder / saving.FILE).is_file()


def check_supernet(model: str | None) -> str:
    """Find the super-network that a command is about which was given no adapter.

    Raises:
        ValueError: if the folder is none, or none was given; a name of the hub is not looked up.
    """
    if model is None:
        raise ValueError(
            "`--adapter` is needed, or `--model` with a super-network that `peft-elastic train --full` has written."
        )
    _check_folder("--model", model, "config.json")
    if Path(model).is_dir() and not is_supernet(Path(model)):
        raise ValueError(
            f"`--adapter` is needed: `--model` {model!r} holds no {saving.FILE}, so it is no super-network of "
            "`peft-elastic train --full` itself."
        )
    return model


def load_supernet(name: str, dtype: str = "auto", device: str | None = None) -> Any:
    """Load a super-network of a model's own weights, in evaluation mode, its chosen subnet active.

    Raises:
        ValueError: if there is none, or it cannot be loaded.
    """
    device = usable_device(device)
    check_supernet(name)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        return ElasticModel.from_pretrained(name, dtype=dtype).to(device)
    except _UNLOADABLE as error:
        raise ValueError(f"`--model` {name!r} cannot be loaded as a super-network: {first_line(error)}") from error


def _check_folder(option: str, name: str, needed: str) -> None:
    """What looks like a path is one: do not ask the hub for it."""
    path = Path(name).expanduser()
    if path.exists():
        if not (path / needed).is_file():
            raise ValueError(f"`{option}` {name!r} holds no {needed}.")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"`{option}` {name!r}: there is no such folder.")


def check_new_folder(path: Path, option: str = "--out") -> None:
    """Refuse to write over anything, and find out now rather than after an hour that a folder cannot be written to.

    Raises:
        ValueError: if `path` exists and is not an empty folder, or cannot be created.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"`{option}` {os.fspath(path)!r} exists already; choose another folder or remove it.")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"`{option}` {os.fspath(path)!r} cannot be created.")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Make a temporary folder beside `path` to fill; it becomes `path` on success and is removed on failure, so that `path`
    never holds half a model. `path` must not exist, or be an empty folder. What killed processes left is removed as well.

    Raises:
        OSError: naming `path`, if it cannot be written.
    """
    target = Path(os.path.realpath(path))
    with writing(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target.parent, target.name) as scratch:
            content = scratch / "content"
            content.mkdir()
            yield content
            os.replace(content, target)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a model and its tokenizer, if it has one."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def needs_this_package(folder: Path) -> bool:
    """Say whether a saved model has sparse layers or blocks of different sizes, which transformers alone does not build."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    packed = config.get("quantization_config", {}).get("quant_method") == "peft_elastic"
    return packed or bool(config.get(BLOCKS_ATTRIBUTE))


def set_active_subnet(model: PeftModel | ElasticModel, subnet: Subnet, saved: Path) -> None:
    """Choose the subnet, in the model and in the file beside its saved weights that says which it is: the configuration of an adapter, or
    that of a super-network. `saved` is the folder of the two."""
    model.set_subnet(subnet)
    with writing(saved):
        if isinstance(model, ElasticModel):
            saving.write(saved, model, model.elastic_config, model.search_space, subnet)
            return
        with scratch_folder(saved, CONFIG_NAME) as folder:
            model.active_peft_config.save_pretrained(str(folder), weights_in=saved)
            os.replace(folder / CONFIG_NAME, saved / CONFIG_NAME)


def zero_share(model: Any, names: Iterable[str]) -> float:
    """Measure the share of zeros in the weights of the named layers of a model, with adapters or without."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    shares = measure_sparsity(base)
    sizes = {name: base.get_submodule(name).weight.numel() for name in names if name in shares}
    return sum(shares[name] * size for name, size in sizes.items()) / max(1, sum(sizes.values()))


def say_written(files: Sequence[tuple[str | os.PathLike[str], str]], next_command: Sequence[Any] = ()) -> None:
    """Print what was written where, and the command that usually comes next."""
    print("\nWritten:")
    width = max(len(os.fspath(path)) for path, _ in files)
    for path, what in files:
        print(f"  {os.fspath(path):<{width}}  {what}")
    if next_command:
        print(f"\nNext:\n  {shlex.join(map(str, next_command))}")
    sys.stdout.flush()
