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
"""Quantisation of a folder block by block: the same bits as in memory, also after an interruption."""

import json

import pytest
import torch
from support import folders
from support.models import tiny_llama

from peft_elastic import GPTQConfig, RTNConfig, load_gptq, quantize, quantize_folder, save_gptq
from peft_elastic.structure.folder_run import FolderRun


GPTQ = GPTQConfig(bits=4, group_size=16)
CASES = [
    ("llama", GPTQ, torch.bfloat16),
    (
        "llama",
        GPTQConfig(bits=8, group_size=-1, symmetric=True, act_order=True, exclude_modules=["down_proj"]),
        torch.float32,
    ),
    ("llama", RTNConfig(bits=2, group_size=16, clipping="mse", target_modules=["lm_head", "q_proj"]), torch.bfloat16),
    ("gpt2", GPTQ, torch.float32),
    ("mixtral", GPTQConfig(bits=4, group_size=32, symmetric=True), torch.bfloat16),
    ("t5", GPTQ, torch.float32),
    ("opt", RTNConfig(group_size=16), torch.float16),
]


@pytest.mark.filterwarnings("ignore:.*three-dimensional parameters")
@pytest.mark.parametrize(("name", "config", "dtype"), CASES, ids=[f"{c[0]}-{c[1].method}" for c in CASES])
def test_bits_are_those_of_memory(name, config, dtype, tmp_path):
    model = folders.MODELS[name]()
    data = folders.batches(model)
    source = folders.saved(model, tmp_path / "model", dtype)
    before = folders.contents(source)
    full = type(model).from_pretrained(source, dtype="auto")
    expected = quantize(full, config, data, progress=False)
    save_gptq(full, tmp_path / "expected")

    report = quantize_folder(source, tmp_path / "out", config, data, progress=False)
    assert report.layers == expected.layers and report.calibration_tokens == expected.calibration_tokens
    assert report.routers == expected.routers
    assert folders.same(folders.tensors(tmp_path / "out"), folders.tensors(tmp_path / "expected"))
    for file in ("config.json", "quantize_config.json"):
        assert json.loads((tmp_path / "out" / file).read_text()) == json.loads(
            (tmp_path / "expected" / file).read_text()
        )
    index = folders.index(tmp_path / "out")
    assert index["weight_map"].keys() == folders.tensors(tmp_path / "out").keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in folders.tensors(tmp_path / "out").values())
    assert folders.contents(source) == before
    if not model.config.is_encoder_decoder:
        again, there = load_gptq(tmp_path / "out", dtype=dtype), load_gptq(tmp_path / "expected", dtype=dtype)
        assert torch.equal(again(**data[0]).logits, there(**data[0]).logits)


class Stop(BaseException):
    pass


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("done", [0, 1])
def test_an_interrupted_run_goes_on(name, done, tmp_path, monkeypatch):
    model = folders.MODELS[name]()
    data = folders.batches(model)
    source = folders.saved(model, tmp_path / "model", torch.float32)
    report = quantize_folder(source, tmp_path / "whole", GPTQ, data, progress=False)
    after, seen = FolderRun.after, []

    def stops(self, layers):
        seen.append(1)
        if len(seen) > done:
            raise Stop
        after(self, layers)

    monkeypatch.setattr(FolderRun, "after", stops)
    with pytest.raises(Stop):
        quantize_folder(source, tmp_path / "out", GPTQ, data, progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="output` holds another quantisation .*checkpoint_format is 'gptq_v2' there"):
        config = GPTQConfig(bits=4, group_size=16, symmetric=True)
        quantize_folder(source, tmp_path / "out", config, data, progress=False)
    again = quantize_folder(source, tmp_path / "out", GPTQ, data, progress=False)
    assert again.layers == report.layers
    assert folders.contents(tmp_path / "out") == folders.contents(tmp_path / "whole")


def test_what_cannot_be_written_is_refused_before_anything_is_made(tmp_path):
    source = folders.saved(tiny_llama(), tmp_path / "model")
    for config, options, message in [
        (RTNConfig(group_size=20), {}, "`group_size` is 20, which does not divide"),
        (RTNConfig(group_size=16), {"checkpoint_format": "gptq"}, "`checkpoint_format` must be 'gptq_v2'"),
        (RTNConfig(group_size=16), {"checkpoint_format": "awq"}, "`checkpoint_format` must be"),
        (GPTQ, {}, "`calibration` must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            quantize_folder(source, tmp_path / "out", config, progress=False, **options)
    odd = folders.saved(tiny_llama(intermediate_size=44), tmp_path / "odd")
    with pytest.raises(ValueError, match="gate_proj has 44 outputs; the GPTQ format packs 8 values"):
        quantize_folder(odd, tmp_path / "out", RTNConfig(group_size=4), progress=False)
    assert not (tmp_path / "out").exists()
