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
"""`nn.DataParallel`, which Trainer takes by itself on a machine with several GPUs. The copies to the GPUs are copies on the
CPU here; all else is torch's own."""

import importlib
import threading
from collections.abc import Mapping

import pytest
import torch
from peft import get_peft_model
from support.models import ConvNet, net, outputs, randomize, tiny_gpt2, tiny_llama, tokens
from support.training import arguments, dataset
from torch import nn
from transformers import Trainer

from peft_elastic import (
    ElasticLoraConfig,
    ElasticTrainer,
    MagnitudeConfig,
    SparseQALoraConfig,
    SubnetSamplingCallback,
    prune,
)


pytestmark = pytest.mark.filterwarnings("ignore")

QV = {"r": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
NARROW = {"elastic_width": {"mlp": [1.0, 0.5], "heads": [1.0, 0.5]}, "importance": "none"}
MODELS = {
    "plain": (tiny_llama, ElasticLoraConfig, QV),
    "dora": (tiny_llama, ElasticLoraConfig, QV | {"use_dora": True}),
    "bias": (tiny_gpt2, ElasticLoraConfig, {"target_modules": ["c_fc"], "lora_bias": True, "fan_in_fan_out": True}),
    "embedding": (tiny_llama, ElasticLoraConfig, QV | {"target_modules": ["embed_tokens", "q_proj"]}),
    "width": (tiny_llama, ElasticLoraConfig, QV | NARROW),
    "width, Conv1D": (
        tiny_gpt2,
        ElasticLoraConfig,
        {
            "target_modules": ["c_fc"],
            "fan_in_fan_out": True,
            "elastic_width": {"mlp": [1.0, 0.5]},
            "importance": "none",
        },
    ),
    "depth": (tiny_llama, ElasticLoraConfig, QV | {"elastic_depth": "all"}),
    "masked": (tiny_llama, SparseQALoraConfig, QV),
    "quantised": (tiny_llama, SparseQALoraConfig, QV | {"quantization_aware": True, "group_size": 16}),
    "quantised, narrowed": (
        tiny_llama,
        SparseQALoraConfig,
        QV | {"quantization_aware": True, "group_size": 16} | NARROW,
    ),
    "convolutions": (
        lambda: net(ConvNet),
        ElasticLoraConfig,
        {"target_modules": ["conv", "grouped"], "elastic_ranks": [8, 4]},
    ),
}


@pytest.fixture
def replicate(monkeypatch):
    module = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors, devices, detach=False):
        return [[tensor.detach().clone() if detach else tensor.clone() for tensor in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda *args, **kwargs: 0)
    return lambda model: module.replicate(model, ["cpu", "cpu"])


def make(name):
    base, cls, settings = MODELS[name]
    model = base()
    if cls is SparseQALoraConfig:
        prune(model, MagnitudeConfig(sparsity=0.5), progress=False)
    model = get_peft_model(model, cls(**{"r": 8, "lora_alpha": 16} | settings))
    randomize(model)
    inputs = tokens(batch=4) if base is not MODELS["convolutions"][0] else torch.randn(4, 3, 7, 8)
    return model.eval(), inputs


@pytest.mark.parametrize("subnet", ["max", "min"])
@pytest.mark.parametrize("name", MODELS)
def test_replicas_compute_and_learn_as_one_model(replicate, name, subnet):
    model, inputs = make(name)
    model.sample_subnet(subnet)  # the subnet of a training step
    parameters = [p for p in model.parameters() if p.requires_grad]

    def output(module, inputs):
        result = module(inputs)
        return getattr(result, "logits", result)

    whole = output(model, inputs)
    expected = torch.autograd.grad(whole.square().sum(), parameters, allow_unused=True)
    halves, errors = {}, []

    def run(index, replica, part):
        try:
            with torch.enable_grad():
                halves[index] = output(replica, part)
        except Exception as error:
            errors.append(error)

    replicas = replicate(model)
    assert model.active_subnet == getattr(model.search_space, subnet)
    threads = [threading.Thread(target=run, args=(i, *pair)) for i, pair in enumerate(zip(replicas, inputs.chunk(2)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    found = torch.cat([halves[0], halves[1]])
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.square().sum(), parameters, allow_unused=True)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert (gradient is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)
    # the model itself is as it was
    model.restore_subnet()
    model.set_subnet(subnet)
    torch.testing.assert_close(outputs(model, inputs), whole.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_trainer_wraps_the_model_itself(tmp_path, several):
    args = arguments(tmp_path, max_steps=3)
    args._n_gpu = 2  # what transformers counts
    model, _ = make("plain")
    seen = []

    class Seen(SubnetSamplingCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(model.active_subnet)
            super().on_step_end(*args, **kwargs)

    if several:
        trainer = ElasticTrainer(model=model, args=args, train_dataset=dataset(16))
    else:
        trainer = Trainer(model=model, args=args, train_dataset=dataset(16), callbacks=[Seen()])
    trainer.train()
    assert isinstance(trainer.model_wrapped, nn.DataParallel)
    assert several or len(set(seen)) == 3
    assert model.active_subnet == model.search_space.max


def gather(outputs):
    """As torch gathers them from several devices."""
    first = outputs[0]
    if isinstance(first, torch.Tensor):
        return torch.stack(outputs) if first.dim() == 0 else torch.cat(outputs)
    if isinstance(first, Mapping):
        return type(first)({key: gather([output[key] for output in outputs]) for key in first})
    return first


@pytest.fixture
def two_devices(replicate, monkeypatch):
    """`nn.DataParallel` over two devices that are both the CPU."""

    def forward(self, **inputs):
        parts = {name: value.chunk(2) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        others = {name: value for name, value in inputs.items() if name not in parts}
        replicas = replicate(self.module)
        return gather(
            [replica(**others, **{n: part[i] for n, part in parts.items()}) for i, replica in enumerate(replicas)]
        )

    monkeypatch.setattr(nn.DataParallel, "forward", forward)


@pytest.mark.parametrize(
    "name, several, average",
    [("plain", True, True), ("plain", True, False), ("quantised, narrowed", True, True), ("depth", False, True)],
)
def test_trainer_trains_as_with_one_device(two_devices, tmp_path, name, several, average):
    losses, weights = [], []
    for devices in (1, 2):
        model, _ = make(name)
        args = arguments(
            tmp_path, max_steps=4, per_device_train_batch_size=4 // devices, average_tokens_across_devices=average
        )
        args._n_gpu = devices
        settings = {"model": model, "args": args, "train_dataset": dataset(16)}
        if several:
            trainer = ElasticTrainer(**settings, distillation="max")
        else:
            trainer = Trainer(**settings, callbacks=[SubnetSamplingCallback()])
        trainer.train()
        assert isinstance(trainer.model_wrapped, nn.DataParallel) == (devices == 2)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append([p.detach() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)
    for found, expected in zip(*weights[::-1], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
