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
"""Convolutional super-networks as objects and as files: copies, pickles, dtypes, folders, and other processes."""

import copy
import pickle

import pytest
import torch
from support.convnets import NETS, images_for, make_net
from support.fresh import run_fresh
from torch import nn

from peft_elastic import ElasticConfig, get_elastic_model
from peft_elastic.structure.tracing.description import load_extracted, save_extracted


pytestmark = pytest.mark.filterwarnings("ignore:The subnet gets the statistics:UserWarning")


def narrowed(name, **options):
    """A super-network whose smallest subnet is active, and what it computes."""
    net, x = make_net(name), images_for(name)
    depth = "all" if NETS[name].blocks else None
    fields = {"elastic_width": {"channels": [1.0, 0.5]}, "elastic_kernel": [3, 1], "elastic_depth": depth, **options}
    model = get_elastic_model(net, ElasticConfig(**fields), x)
    model.set_subnet("min")
    with torch.no_grad():
        return model, x, model(x)


@pytest.mark.parametrize("name", ["residual", "next", "normalized", "activations"])
def test_copies_and_pickles_go_on_as_the_subnet(name):
    model, x, expected = narrowed(name, elastic_kernel=None)
    with torch.no_grad():
        for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert made.active_subnet == model.active_subnet
            assert torch.equal(made(x), expected)
            made.set_subnet("max")
            model.set_subnet("max")
            assert torch.equal(made(x), model(x))
            model.set_subnet("min")
        cls = type(make_net(name))
        assert type(model.extract_subnet()) is cls
        pickle.dumps(model.extract_subnet())
        model.set_subnet("max")
        whole = model(x)
        plain = model.unload()
        assert type(plain) is cls and torch.equal(plain(x), whole)


def test_other_dtypes_and_compiled():
    model, x, expected = narrowed("residual")
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager")(x), expected)
        model.double()
        torch.testing.assert_close(model(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.extract_subnet()(x.double()), model(x.double()))
        model.bfloat16()
        assert (model(x.bfloat16()).float() - expected).abs().max() < 0.05


@pytest.mark.parametrize("name", ["residual", "grouped", "next", "unet"])
def test_extracted_nets_are_exported(name):
    model, x, expected = narrowed(name, **({} if name in ("residual", "unet") else {"elastic_kernel": None}))
    small = model.extract_subnet()
    exported = torch.export.export(small, (x,)).module()
    with torch.no_grad():
        traced = torch.jit.trace(small, (x,))
        torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-4)


_RELOAD = """
import sys, torch
from support.convnets import NETS
from peft_elastic.structure.tracing.description import load_extracted
for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    x, expected = torch.load(f"{folder}/expected.pt")
    net = load_extracted(NETS[name].make(), folder).eval()
    with torch.no_grad():
        assert torch.equal(net(x), expected), name
print("loaded")
"""


def test_folders_are_loaded_by_another_process(tmp_path):
    names = ["residual", "next", "separable", "normalized", "tied", "activations", "sequence"]
    for name in names:
        kernel = {} if name in ("residual", "separable") else {"elastic_kernel": None}
        model, x, expected = narrowed(name, **kernel)
        save_extracted(model.extract_subnet(), tmp_path / name)
        torch.save((x, expected), tmp_path / name / "expected.pt")
    done = run_fresh(_RELOAD, str(tmp_path), *names)
    assert done.stdout.strip() == "loaded", done.stderr


def test_folders_that_are_refused(tmp_path):
    model, _, _ = narrowed("residual")
    folder = tmp_path / "saved"
    with pytest.raises(ValueError, match="was not extracted"):
        save_extracted(make_net("residual"), folder)
    save_extracted(model.extract_subnet(), folder)
    other = make_net("plain")
    with pytest.raises(ValueError, match="Plain.*Residual"):
        load_extracted(other, folder)

    smaller = make_net("residual")
    smaller.blocks[2] = nn.Identity()
    smaller.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    state = {k: v.clone() for k, v in smaller.state_dict().items()}
    with pytest.raises(ValueError, match="stem|blocks"):
        load_extracted(smaller, folder)
    assert all(torch.equal(v, smaller.state_dict()[k]) for k, v in state.items())

    weights, text = folder / "extracted.safetensors", folder / "extracted.json"
    for file, damaged in (
        (weights, b"\x00" * 20),
        (text, b"{"),
        (text, text.read_bytes().replace(b'"stem"', b'"root"')),
    ):
        good = file.read_bytes()
        file.write_bytes(damaged)
        with pytest.raises(ValueError):
            load_extracted(make_net("residual"), folder)
        file.unlink()
        with pytest.raises(ValueError, match=file.name):
            load_extracted(make_net("residual"), folder)
        file.write_bytes(good)
    load_extracted(make_net("residual"), folder)


_FAMILIES = """
import sys, torch, transformers
import peft_elastic
from peft_elastic.elastic_model import ElasticModel
for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    x, small, sub = torch.load(f"{folder}.pt")
    with torch.no_grad():
        loaded = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        assert torch.equal(loaded(x).logits, small), name
        again = ElasticModel.from_pretrained(folder + "-super")
        assert again.active_subnet == sub, name
        torch.testing.assert_close(again(x).logits, small, rtol=1e-5, atol=1e-6)
print("loaded")
"""


def families():
    import transformers as t

    return {
        "resnet": lambda: t.ResNetForImageClassification(
            t.ResNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], layer_type="basic")
        ),
        "regnet": lambda: t.RegNetForImageClassification(
            t.RegNetConfig(embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], groups_width=8)
        ),
        "bit": lambda: t.BitForImageClassification(
            t.BitConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2], num_groups=8)
        ),
        "mobilenet_v1": lambda: t.MobileNetV1ForImageClassification(
            t.MobileNetV1Config(depth_multiplier=0.25, image_size=64)
        ),
        "mobilenet_v2": lambda: t.MobileNetV2ForImageClassification(
            t.MobileNetV2Config(depth_multiplier=0.35, image_size=64)
        ),
        "efficientnet": lambda: t.EfficientNetForImageClassification(
            t.EfficientNetConfig(image_size=64, width_coefficient=0.5, depth_coefficient=1.0, hidden_dim=640)
        ),
        "convnext": lambda: t.ConvNextForImageClassification(
            t.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2)
        ),
        "convnextv2": lambda: t.ConvNextV2ForImageClassification(
            t.ConvNextV2Config(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2)
        ),
        "mobilevit": lambda: t.MobileViTForImageClassification(
            t.MobileViTConfig(image_size=64, hidden_sizes=[32, 48, 64], neck_hidden_sizes=[16, 16, 24, 32, 32, 32, 64])
        ),
    }


@pytest.mark.slow
def test_families_of_transformers_are_loaded_by_another_process(tmp_path):
    made = families()
    for name, make in made.items():
        torch.manual_seed(0)
        model = make().eval()
        x = torch.randn(2, 3, 64, 64)
        if hasattr(model.config, "image_size"):
            model.config.image_size = 64
        with torch.no_grad():
            before = model(x).logits
        kernel = [5, 3, 1] if name in ("efficientnet", "resnet", "regnet", "convnext") else None
        config = ElasticConfig(
            elastic_width={"channels": [1.0, 0.75, 0.5]},
            elastic_kernel=kernel,
            elastic_depth=None if name == "mobilenet_v1" else "all",
        )
        model = get_elastic_model(model, config, {"pixel_values": x})
        with torch.no_grad():
            torch.testing.assert_close(model(x).logits, before, rtol=1e-4, atol=1e-5)
            model.set_subnet("min")
            small = model.extract_subnet()
            torch.testing.assert_close(small(x).logits, model(x).logits, rtol=1e-5, atol=1e-6)
            small.save_pretrained(tmp_path / name)
            model.save_pretrained(tmp_path / f"{name}-super")
            torch.save((x, small(x).logits, dict(model.active_subnet)), tmp_path / f"{name}.pt")
    done = run_fresh(_FAMILIES, str(tmp_path), *made)
    assert done.stdout.strip().endswith("loaded"), done.stderr[-2000:]
