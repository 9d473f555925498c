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
"""Training masked and quantisation-aware adapters: checkpointing, the Trainer, several processes, torch.compile, FSDP2."""

import copy
import socket
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from packaging import version
from support.models import outputs, tiny_llama, tokens
from support.sparse_qa import ALL_KINDS, KINDS, QUANTIZED, adapted, base_weights, layers, pruned
from support.training import checkpointing, make_trainer
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peft_elastic import SubnetSamplingCallback
from peft_elastic.tuners.sparse_qa_lora import devices


pytestmark = pytest.mark.filterwarnings("ignore")


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained(folder, kind, seed=0, **settings):
    """(weights, losses) after a few steps of sampled subnets."""
    model = adapted(**ALL_KINDS[kind])
    trainer = make_trainer(model, folder, [SubnetSamplingCallback()], seed=seed, **settings)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: p.detach().clone() for name, p in trainable(model).items()}, losses


@pytest.mark.parametrize("kind", ["sparse", "sparse and quantised"])
def test_gradient_checkpointing(tmp_path, kind):
    """With a subnet sampled in each step; weights after four steps."""
    expected, losses = trained(tmp_path, kind)
    for checkpoint in ("reentrant", "non-reentrant"):
        found, found_losses = trained(tmp_path, kind, **checkpointing(checkpoint))
        assert found_losses == pytest.approx(losses, abs=1e-5)
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_gradients_under_checkpointing(kind):
    gradients = []
    for checkpoint in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        model = adapted(lora_dropout=0.3, **ALL_KINDS[kind]).train()
        model.sample_subnet(model.search_space.sample(3))
        if checkpoint is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(checkpoint)
        torch.manual_seed(0)
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    for found in gradients[1:]:
        for name, gradient in gradients[0].items():
            assert gradient.any()
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "bf16"), [("sparse", False), ("quantised", False), ("sparse and quantised", True)])
def test_the_trainer(tmp_path, kind, bf16):
    model = adapted(std=0.02, lora_dropout=0.05, **KINDS[kind])
    weights = base_weights(model)
    trainer = make_trainer(
        model, tmp_path, [SubnetSamplingCallback()], max_steps=24, per_device_train_batch_size=8, bf16=bf16
    )
    trainer.train_dataset = trainer.train_dataset[:8]  # to be learnt by heart
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.2
    assert all(torch.equal(weight, weights[path]) for path, weight in base_weights(model).items())
    model.eval()
    before = outputs(model, tokens())
    merged = model.merge_and_unload(sparse_kernel=False)
    tolerance = 0.05 if bf16 else 1e-4  # the Trainer leaves its autocast around the forward pass of the model
    torch.testing.assert_close(outputs(merged, tokens()), before, rtol=tolerance, atol=tolerance)
    if "sparse" in kind:
        assert all(merged.get_submodule(path).weight[weight == 0].eq(0).all() for path, weight in weights.items())


@pytest.mark.parametrize("kind", KINDS)
def test_layers_keep_no_tensor_of_the_size_of_their_weight(kind):
    """Whatever is saved for the backward pass of the whole model is a weight of the base or smaller than one."""
    for dropout in (0.0, 0.3):
        model = adapted(pruned(tiny_llama(intermediate_size=96)), lora_dropout=dropout, **KINDS[kind]).train()
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept = Counter()

        def pack(tensor, known=known, kept=kept):
            if tensor.untyped_storage().data_ptr() not in known:
                kept[tensor.numel()] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=tokens(1, 4), labels=tokens(1, 4)).loss  # noqa: B018
        sizes = {layer.get_base_layer().weight.numel() for layer in layers(model).values()}
        assert kept and max(kept) < min(sizes) == 512


@pytest.mark.parametrize("kind", ["sparse and quantised"])
def test_resumed_training(tmp_path, kind):
    """The grid comes back from the checkpoint as well: that of the model that resumes is another one."""

    def run(folder, shift, resume=None, **settings):
        model = adapted(**ALL_KINDS[kind])
        for layer in layers(model).values():
            for grid in layer.lora_grid.values():
                grid.scales.mul_(shift)
        trainer = make_trainer(
            model, folder, [SubnetSamplingCallback()], save_strategy="steps", save_steps=2, **settings
        )
        trainer.train(resume_from_checkpoint=resume)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    expected = run(tmp_path, 1.25)
    found = run(tmp_path / "resumed", 1.0, resume=str(tmp_path / "checkpoint-2"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


# -- torch.compile -------------------------------------------------------------------------------------------------


class TwoLayers(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))


def two_layers(**settings):
    torch.manual_seed(0)
    return adapted(pruned(TwoLayers()), target_modules=["0", "2"], **settings)


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [("sparse", 0.0), ("quantised", 0.0), ("sparse and quantised", 0.0), ("sparse and quantised", 1e-9)],
)
def test_compiled_models(kind, dropout):
    torch._dynamo.reset()
    model = two_layers(lora_dropout=dropout, **ALL_KINDS[kind]).train(dropout > 0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 32)
    for subnet in ("max", "min"):
        model.set_subnet(subnet)
        found, expected = (
            torch.autograd.grad(m(x).square().sum(), list(trainable(model).values())) for m in (compiled, model)
        )
        torch.testing.assert_close(compiled(x), model(x))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["sparse and quantised"])
def test_one_graph_for_each_subnet(kind):
    torch._dynamo.reset()
    model, x = two_layers(**ALL_KINDS[kind]), torch.randn(5, 32)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    frames = []
    for subnet in ("max", "min", "max", "min"):
        model.set_subnet(subnet)
        torch.testing.assert_close(compiled(x), model(x))
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("kind", "hook"), [("sparse", False), ("sparse and quantised", False), ("sparse and quantised", True)]
)
def test_compiled_models_keep_no_weights(kind, hook, monkeypatch):
    """A compiler that sees both passes would keep what both of them make. And it must not unroll the loop over panels."""
    monkeypatch.setattr(devices, "CPU_PANEL_ELEMENTS", 100)
    torch._dynamo.reset()
    model = adapted(pruned(nn.Sequential(nn.Linear(64, 48))), target_modules=["0"], **KINDS[kind])
    if hook:
        model.base_model.model[0].get_base_layer().register_forward_hook(lambda module, args, output: None)
    x, parameters = torch.randn(5, 64, requires_grad=True), list(trainable(model).values())
    expected = torch.autograd.grad(model(x).square().sum(), [x, *parameters])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not hook)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compiled(x).square().sum()
    assert kept and max(kept) < 48 * 64 / 4
    for a, b in zip(torch.autograd.grad(loss, [x, *parameters]), expected, strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_by_inductor(kind):
    torch._dynamo.reset()
    model, x = two_layers(**KINDS[kind]), torch.randn(5, 32)
    compiled = torch.compile(model, fullgraph=True)
    found, expected = (
        torch.autograd.grad(m(x).square().sum(), list(trainable(model).values())) for m in (compiled, model)
    )
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


READS_PROPERTIES = version.parse(torch.__version__) >= version.parse(
    "2.13"
)  # not with 2.7; those between were not tried


@pytest.mark.parametrize(
    "strict",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                not READS_PROPERTIES, reason="an older torch takes the parameter for the property"
            ),
        ),
    ],
)
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_exported_programs(kind, strict):
    model, x = two_layers(**ALL_KINDS[kind]), torch.randn(5, 32)
    model.set_subnet("min")
    with torch.no_grad():
        program = torch.export.export(model.base_model.model, (x,), strict=strict)
    expected = outputs(model, x)
    model.set_subnet("max")
    torch.testing.assert_close(program.module()(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_functional_calls(kind):
    """With other weights of the base too."""
    model, other = (two_layers(**KINDS[kind]) for _ in range(2))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * (parameter != 0))
    x = torch.randn(5, 32)
    weights = {name: p.detach() for name, p in other.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, weights, (x,)), other(x))


# -- several processes ---------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_group(rank, world_size, port, function):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    try:
        for settings in ALL_KINDS.values():
            function(rank, world_size, adapted(lora_dropout=0.0, **settings).train())
    finally:
        dist.destroy_process_group()


def losses_and_gradients(wrapped, model, ids, subnets):
    results = []
    for subnet in subnets:
        model.sample_subnet(subnet)
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in trainable(model).items()}
        model.zero_grad()
        results.append((loss.detach(), gradients))
    return results


def ddp(rank, world_size, model):
    reference = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    ids = tokens(2 * world_size)
    found = losses_and_gradients(wrapped, model, ids[2 * rank : 2 * rank + 2], ("max", "min"))
    expected = losses_and_gradients(reference, reference, ids, ("max", "min"))
    for (_, gradients), (_, wanted) in zip(found, expected):
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)
            others = [torch.empty_like(gradient) for _ in range(world_size)]
            dist.all_gather(others, gradient)
            assert all(torch.equal(other, gradient) for other in others)


def fsdp2(rank, world_size, model):
    reference = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    pair = (model, reference)
    optimizers = [torch.optim.SGD(trainable(m).values(), lr=0.1) for m in pair]
    for step, subnet in enumerate(("max", "min", "heuristic", "min")):
        losses = []
        for m, optimizer in zip(pair, optimizers):
            m.sample_subnet(subnet)
            ids = tokens(seed=step)
            loss = m(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses)


@pytest.mark.slow
def test_ddp_with_two_processes():
    mp.spawn(in_group, args=(2, free_port(), ddp), nprocs=2)


def test_fsdp2():
    """In one process, where nothing is split but every hook is in place."""
    in_group(0, 1, free_port(), fsdp2)


@pytest.mark.slow
def test_fsdp2_with_two_processes():
    mp.spawn(in_group, args=(2, free_port(), fsdp2), nprocs=2)


def test_ddp():
    in_group(0, 1, free_port(), ddp)


def test_quantised_training_sees_what_is_merged():
    """A loss computed in training is that of the merged model, dropout aside."""
    model = adapted(**QUANTIZED).train()
    optimizer = torch.optim.Adam(trainable(model).values(), lr=1e-2)
    for step in range(3):
        ids = tokens(seed=step)
        model.sample_subnet(model.search_space.sample(step))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, loss, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        optimizer.step()
        optimizer.zero_grad()
