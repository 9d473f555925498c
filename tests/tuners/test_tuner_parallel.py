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
"""Elastic adapters under torch.compile, torch.export, torch.func and FSDP."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from support.models import net, outputs, randomize, tiny_llama, tokens
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from peft_elastic import ElasticLoraConfig


pytestmark = pytest.mark.filterwarnings("ignore")


class TwoLayers(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def small(**settings):
    config = ElasticLoraConfig(**({"r": 8, "target_modules": ["0", "2"]} | settings))
    model = get_peft_model(net(TwoLayers), config).eval()
    randomize(model)
    return model


def test_compiled_models_follow_the_subnet():
    torch._dynamo.reset()
    model, x = small(), torch.randn(3, 8)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    frames = []
    for subnet in ("max", "min", "heuristic", "max", "min"):
        model.set_subnet(subnet)
        torch.testing.assert_close(compiled(x), model(x))
        frames.append(counter.frame_count)
    assert frames == [1, 2, 3, 3, 3]  # one graph for every subnet, compiled once
    # gradients are those of the active subnet
    compiled(x).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = (parameter.grad, parameter.grad.T)["lora_B" in name]
            assert grad[4:].eq(0).all() and grad[:4].abs().max() > 0


def test_many_subnets_of_a_compiled_model_stay_right():
    """After `recompile_limit` graphs torch runs the model uncompiled."""
    torch._dynamo.reset()
    model, x = small(elastic_ranks=list(range(1, 9))), torch.randn(3, 8)
    compiled = torch.compile(model, backend="eager")
    for seed in range(12):
        model.set_subnet(model.search_space.sample(seed))
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_by_inductor():
    torch._dynamo.reset()
    model, x = small(), torch.randn(3, 8)
    compiled = torch.compile(model)
    for subnet in ("max", "min"):
        model.set_subnet(subnet)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("subnet", ["max", "min"])
def test_exported_programs_hold_the_active_subnet(subnet):
    model, x = small(), torch.randn(3, 8)
    model.set_subnet(subnet)
    program = torch.export.export(model.base_model.model, (x,))
    expected = outputs(model, x)
    model.set_subnet("heuristic")
    torch.testing.assert_close(program.module()(x), expected)


def test_functional_calls_take_full_parameters():
    model, x = small(), torch.randn(3, 8)
    model.set_subnet("min")
    others = {n: torch.randn_like(p) for n, p in model.named_parameters() if "lora_" in n}
    found = torch.func.functional_call(model, others, (x,))
    expected = small()
    expected.load_state_dict(others, strict=False)
    expected.set_subnet("min")
    torch.testing.assert_close(found, expected(x))


def train(rank, world_size, port):
    """Train a sharded model beside an ordinary one, a different subnet in each step, and compare."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        config = {"r": 8, "target_modules": ["q_proj", "down_proj", "embed_tokens"]}
        model, reference = (get_peft_model(tiny_llama(), ElasticLoraConfig(**config)) for _ in range(2))
        for m in (model, reference):
            randomize(m)
        mesh = init_device_mesh("cpu", (world_size,))
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        pair = (model, reference)
        optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in pair]
        for step, subnet in enumerate(("max", "min", "heuristic", "min")):
            losses = []
            for m, optimizer in zip(pair, optimizers):
                m.train()
                m.sample_subnet(subnet)
                ids = tokens(seed=step)
                loss = m(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            torch.testing.assert_close(*losses)
        model.eval()
        assert model.active_subnet == model.search_space.max
        assert model.subnet_summary().total_parameters == reference.subnet_summary().total_parameters
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found = get_model_state_dict(model, options=options)
        assert found or rank > 0  # on other ranks it is empty
        for name, parameter in reference.named_parameters():
            if found and "lora_" in name:
                torch.testing.assert_close(found[name], parameter.detach())
    finally:
        dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_training_under_fsdp2():
    """In one process, where nothing is split but every hook is in place."""
    train(0, 1, free_port())


@pytest.mark.slow
def test_training_under_fsdp2_with_two_processes():
    mp.spawn(train, args=(2, free_port()), nprocs=2)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_is_refused(use_orig_params, monkeypatch):
    """It keeps views of flat parameters, which must neither be cut nor be read at the wrong time."""
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        model = get_peft_model(tiny_llama(), ElasticLoraConfig(r=8, target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="FSDP1 replaces it by a view into flat memory: use FSDP2"):
            FullyShardedDataParallel(
                model,
                auto_wrap_policy=fsdp_auto_wrap_policy(model),
                use_orig_params=use_orig_params,
                device_id=torch.device("cpu"),
            )
    finally:
        dist.destroy_process_group()
