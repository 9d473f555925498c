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
"""Checkpoints made by GPTQModel, one of each kind, once per run. `make test-gptq` has what these tests need; where it is
missing they are skipped."""

import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from checkpoints import GROUP_SIZE, SHAPE
from support.models import VOCABULARY, tiny_llama


# GPTQModel reads these. Its thread pool cannot be made, by default, on a machine with one or two cores, and its kernel
# for packing would have to be compiled first, for 20 s.
if find_spec("gptqmodel") is not None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")


@pytest.fixture(scope="session", autouse=True)
def gptqmodel():
    if find_spec("gptqmodel") is None:
        pytest.skip("no gptqmodel: `make test-gptq` runs these tests in an environment that has it")
    import gptqmodel

    return gptqmodel


@pytest.fixture(autouse=True)
def _uncompiled():
    """GPTQModel compiles its Python functions for every model, which takes longer than everything else here."""
    with torch._dynamo.config.patch(disable=True):
        yield


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory) -> Path:
    """The model that is quantized, in float16, and its tokenizer: GPTQModel does not load a folder without one."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("dense")
    tiny_llama(**SHAPE).half().save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(dense_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(dense_folder)


@pytest.fixture(scope="session")
def quantized_folder(gptqmodel, dense_folder, tmp_path_factory) -> Callable[..., Path]:
    """A function that quantizes the model with GPTQModel and returns the folder of the checkpoint."""

    @cache
    def quantize(bits: int = 4, sym: bool = True, desc_act: bool = False, form: str = "gptq") -> Path:
        config = gptqmodel.QuantizeConfig(
            bits=bits,
            group_size=GROUP_SIZE,
            sym=sym,
            desc_act=desc_act,
            act_group_aware=not desc_act,
            format=form,
            device="cpu",
            offload_to_disk=False,
        )
        model = gptqmodel.GPTQModel.load(str(dense_folder), config, dtype=torch.float16)
        ids = torch.randint(3, VOCABULARY, (16, 40), generator=torch.Generator().manual_seed(0))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp("logs"))  # where it writes one
            model.quantize([{"input_ids": row.tolist(), "attention_mask": [1] * 40} for row in ids], batch_size=1)
        folder = tmp_path_factory.mktemp(f"{form}-{bits}")
        model.save(str(folder))
        return folder

    return quantize
