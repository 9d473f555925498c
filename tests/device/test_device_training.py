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
"""Training on the device: losses and gradients of every kind of adapter against float64 on the CPU, in all precisions, with
checkpointing, torch.compile, the Trainer and ElasticTrainer."""

import contextlib
import copy

import pytest
import torch
from peft import get_peft_model
from support import sparse_qa
from support.devices import Arguments, is_on, moved, reference, without_waiting
from support.models import randomize, tiny_gpt2, tiny_llama, tiny_phi, tokens
from support.training import checkpointing, dataset
from torch import nn
from transformers import Trainer

from peft_elastic import (
    ElasticLoraConfig,
    ElasticTrainer,
    QuantizedLinear,
    SparseQALoraConfig,
    SubnetSamplingCallback,
)


RANKS = {"r": 6, "lora_alpha": 12, "elastic_ranks": [6, 3, 1], "target_modules": "all-linear"}
WIDTH = {"elastic_width": {"heads": [1.0, 0.5], "mlp": [1.0, 0.5]}, "importance": "none"}
ROUNDING = {"quantization_aware": True, "bits": 4, "group_size": 16}
KINDS = {
    "ranks": (ElasticLoraConfig, {}),
    "dora": (ElasticLoraConfig, {"use_dora": True}),
    "dropout": (ElasticLoraConfig, {"lora_dropout": 0.3}),
    "width": (ElasticLoraConfig, WIDTH),
    "depth": (ElasticLoraConfig, {"elastic_depth": "0"}),
    "width and depth": (ElasticLoraConfig, {**WIDTH, "elastic_depth": "0"}),
    "sparse": (SparseQALoraConfig, {}),
    "sparse with dropout": (SparseQALoraConfig, {"lora_dropout": 0.3}),
    "sparse and width": (SparseQALoraConfig, WIDTH),
    "rounded": (SparseQALoraConfig, {"sparse_adapter": False, **ROUNDING}),
    "sparse and rounded": (SparseQALoraConfig, ROUNDING),
    "sparse, rounded, width": (SparseQALoraConfig, {**ROUNDING, **WIDTH}),
}
BATCH = {
    "input_ids": tokens(3, 9),
    "labels": tokens(3, 9),
    "attention_mask": torch.tensor([[1] * 9, [1] * 9, [1] * 6 + [0] * 3]),
}


def some(kinds, quick):
    """`make test` takes the quick ones, `make test-gpu` all."""
    return [pytest.param(kind, marks=[] if kind in quick else pytest.mark.slow) for kind in kinds]


def make(kind, blocks=2, **settings):
    config_cls, own = KINDS[kind]
    model = sparse_qa.pruned(tiny_llama(num_hidden_layers=blocks))
    model = get_peft_model(model, config_cls(**{**RANKS, **own, **settings}))
    randomize(model, std=0.1)
    return model


def subnets(model):
    space = model.search_space
    return [space.max, space.min, space.sample(1), space.sample(2)]


def run(model, device, subnet, context=contextlib.nullcontext, train=True):
    """The loss and the gradients by name, on the CPU in float64, of one subnet."""
    model.train(train)
    model.set_subnet(subnet)
    model.zero_grad()
    with context():
        loss = model(**moved(BATCH, device)).loss
    loss.backward()
    gradients = {n: p.grad.detach().cpu().double() for n, p in model.named_parameters() if p.grad is not None}
    assert is_on(device, *(p.grad for p in model.parameters() if p.grad is not None))
    return loss.detach().cpu().double(), gradients


def agree(found, wanted, tolerance):
    """Losses relative to their size; gradients, tensor by tensor, relative to the length of the wanted one."""
    torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=0)
    assert found[1].keys() == wanted[1].keys() and found[1]
    whole = torch.cat([gradient.flatten() for gradient in wanted[1].values()]).norm()
    for name, gradient in wanted[1].items():
        off = (found[1][name] - gradient).norm()
        # what is nearly zero in both has no length to be measured by
        assert off <= tolerance * max(gradient.norm(), 1e-2 * whole), f"{name}: {off / gradient.norm():.1e}"


@pytest.mark.parametrize(
    "kind", some([k for k in KINDS if "dropout" not in k], ("width and depth", "sparse and rounded"))
)
def test_against_float64(kind, device):
    model = make(kind)
    wanted = reference(model)
    model.to(device)
    assert is_on(device, model)
    for subnet in subnets(model):
        agree(run(model, device, subnet), run(wanted, torch.device("cpu"), subnet), 2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("base", [tiny_gpt2, tiny_phi])
@pytest.mark.parametrize("kind", ["width and depth", "sparse and rounded"])
def test_other_architectures(kind, base, device):
    config_cls, own = KINDS[kind]
    model = get_peft_model(sparse_qa.pruned(base()), config_cls(**{**RANKS, **own}))
    randomize(model, std=0.1)
    wanted = reference(model)
    model.to(device)
    for subnet in subnets(model)[:3]:  # in evaluation mode, as GPT-2 has dropout of its own
        agree(run(model, device, subnet, train=False), run(wanted, torch.device("cpu"), subnet, train=False), 2e-4)


@pytest.mark.parametrize("kind", some(["ranks", "width and depth", "sparse", "sparse and rounded"], []))
def test_injected_on_the_device(kind, device):
    """The base is there first: grids, orders and adapters are made there."""
    config_cls, own = KINDS[kind]
    base = sparse_qa.pruned(tiny_llama())
    models = []
    for place in (device, "cpu"):
        torch.manual_seed(5)
        model = get_peft_model(copy.deepcopy(base).to(place), config_cls(**{**RANKS, **own}))
        randomize(model, std=0.1)
        models.append(model)
    model, wanted = models
    assert is_on(device, model)
    for subnet in subnets(model)[:2]:
        agree(run(model, device, subnet), run(wanted.double(), torch.device("cpu"), subnet), 2e-4)


@pytest.mark.parametrize(
    "kind", some(["ranks", "width and depth", "sparse", "sparse and rounded"], ["sparse and rounded"])
)
def test_bf16_autocast(kind, device):
    """Products in bfloat16 beside weights in float32: as far from float64 as those of the CPU are."""
    if kind == "sparse and rounded" and device.type == "mps":
        pytest.skip("no float64 there to tell the grids apart")
    model = make(kind)
    wanted = reference(model)
    seen = []
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.down_proj"))
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    model.to(device)
    for subnet in subnets(model)[:2]:
        found = run(model, device, subnet, lambda: torch.autocast(device.type, dtype=torch.bfloat16))
        agree(found, run(wanted, torch.device("cpu"), subnet), 0.1)
    assert set(seen) == {torch.bfloat16}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("kind", some(["ranks", "width", "sparse", "sparse and rounded"], []))
def test_bf16_weights(kind, device):
    model = make(kind)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()  # what the reference starts from, too
    wanted = reference(model)
    model.to(torch.bfloat16).to(device)
    for subnet in subnets(model)[:2]:
        agree(run(model, device, subnet), run(wanted, torch.device("cpu"), subnet), 0.1)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "kind",
    some(
        ["dropout", "width and depth", "sparse with dropout", "sparse and rounded"],
        ["sparse with dropout", "width and depth"],
    ),
)
def test_checkpointing(kind, reentrant, device):
    """The same as without, dropout included: the recomputation sees the same subnet and the same random numbers."""
    plain = make(kind).to(device)
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()
    for number, subnet in enumerate(subnets(plain)[:3]):
        results = []
        for model in (plain, checkpointed):
            torch.manual_seed(number)
            results.append(run(model, device, subnet))
        agree(results[1], results[0], 1e-5)


@pytest.mark.parametrize("kind", some(["ranks", "sparse", "sparse and rounded"], []))
def test_compiled(kind, device):
    """By Inductor on a GPU; elsewhere traced and run as it is, which takes a second instead of minutes."""
    backend = "inductor" if device.type in ("cuda", "xpu") else "aot_eager"
    model = make(kind, 1, target_modules=["q_proj", "down_proj"]).to(device)
    eager = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    for subnet in [model.search_space.min, *([model.search_space.max] if device.type == "cuda" else [])]:
        model.train().set_subnet(subnet)
        model.zero_grad()
        loss = compiled(**moved(BATCH, device)).loss
        loss.backward()
        gradients = {n: p.grad.cpu().double() for n, p in model.named_parameters() if p.grad is not None}
        agree((loss.detach().cpu().double(), gradients), run(eager, device, subnet), 1e-3)


@pytest.mark.parametrize("kind", ["sparse", "rounded", "sparse and rounded"])
def test_no_waiting_inside_of_a_layer(kind, device):
    """The host only queues work: neither pass of an adapted layer reads a value from the device."""
    if device.type not in ("cuda", "pretend"):
        pytest.skip(f"what waits for {device.type} cannot be found out")
    config_cls, own = KINDS[kind]
    layers = sparse_qa.pruned(nn.Sequential(nn.Linear(48, 32), nn.Linear(32, 48)))
    model = get_peft_model(layers, config_cls(**{**RANKS, **own, "target_modules": ["0", "1"]})).to(device)
    x = torch.randn(5, 48).to(device).requires_grad_()
    model(x).sum().backward()  # what is done once
    with without_waiting(device):
        y = model(x)
        y.sum().backward()
    assert is_on(device, y, x.grad)


# -- trainers ----------------------------------------------------------------------------------------------------------


def arguments(folder, device, **settings):
    args = Arguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 2,
            "max_steps": 4,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": torch.device(device).type == "cpu",
            "dataloader_pin_memory": torch.device(device).type == "cuda",
            **settings,
        }
    )
    args.on = torch.device(device)
    args.__dict__.pop("_setup_devices", None)
    assert args.device == torch.device(device)
    return args


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


TRAINERS = {
    "callback": lambda model, args: Trainer(
        model, args, train_dataset=dataset(16), callbacks=[SubnetSamplingCallback()]
    ),
    "sandwich": lambda model, args: ElasticTrainer(
        model, args, train_dataset=dataset(16), strategy="sandwich", distillation="max"
    ),
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    "kind", some(["ranks", "width and depth", "sparse", "sparse and rounded"], ["width and depth"])
)
def test_trainers(kind, trainer, device, tmp_path):
    """Four steps of AdamW give the losses of the CPU, and the same weights."""
    found = {}
    start = make(kind)
    for place in ("cpu", device):
        model = copy.deepcopy(start)
        one = TRAINERS[trainer](model, arguments(tmp_path / str(place), place))
        one.train()
        assert is_on(torch.device(place), model)
        found[str(place)] = losses(one), {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
    wanted, got = found["cpu"], found[str(device)]
    assert len(got[0]) == 4
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(wanted[0]), rtol=2e-3, atol=0)
    moved_by = torch.cat([(w - dict(start.named_parameters())[n]).flatten() for n, w in wanted[1].items()]).norm()
    off = torch.cat([(got[1][n] - w).flatten() for n, w in wanted[1].items()]).norm()
    # Adam makes a step of the full length of what is rounding alone: of a gradient that should be zero
    assert moved_by > 1e-2 and off <= 0.1 * moved_by


@pytest.mark.parametrize("checkpoints", some(["none", "reentrant", "non-reentrant"], []))
def test_trainer_with_everything(checkpoints, device, tmp_path):
    """Accumulation, bfloat16, checkpointing, evaluation, saving; resumed, it goes on as if it had not been stopped."""
    # what transformers lets be trained in bfloat16
    mixed = device.type in ("cpu", "xpu") or (device.type == "cuda" and torch.cuda.is_bf16_supported())
    settings = dict(
        gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, bf16=mixed,
        **checkpointing(checkpoints),
    )  # fmt: skip
    results = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        args = arguments(tmp_path, device, **settings)
        trainer = Trainer(
            make("sparse with dropout"),
            args,
            train_dataset=dataset(32),
            eval_dataset=dataset(6, seed=1),
            callbacks=[SubnetSamplingCallback(eval_subnet="heuristic")],
        )
        trainer.train(resume_from_checkpoint=resume)
        results.append({n: p.detach().cpu() for n, p in trainer.model.named_parameters() if p.requires_grad})
        assert is_on(device, trainer.model)
        assert [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=1e-4, atol=1e-5)


def test_two_devices(device, second):
    """A model whose blocks are on two devices, as `device_map` lays it out, with hooks that carry the activations over."""
    from accelerate import dispatch_model

    for kind in ("ranks", "width and depth", "sparse", "sparse and rounded"):
        model = make(kind)
        wanted = reference(model)
        base = model.get_base_model()
        places = {"model.embed_tokens": device, "model.rotary_emb": device, "model.layers.0": device}
        places |= {"model.layers.1": second, "model.norm": second, "lm_head": second}
        dispatch_model(
            base, {name: str(place) for name, place in places.items()}, main_device=str(device), force_hooks=True
        )
        for subnet in subnets(model)[:2]:
            model.train().set_subnet(subnet)
            model.zero_grad()
            loss = model(**moved(BATCH, device)).loss
            loss.backward()
            gradients = {n: p.grad.cpu().double() for n, p in model.named_parameters() if p.grad is not None}
            agree((loss.detach().cpu().double(), gradients), run(wanted, torch.device("cpu"), subnet), 2e-4)


def test_quantized_base(device):
    """Adapters that round, beside layers that are rounded already, and are saved so."""
    base = sparse_qa.quantized(sparse_qa.pruned(tiny_llama()))
    model = sparse_qa.adapted(base, **sparse_qa.QUANTIZED, std=0.1)
    wanted = reference(model)
    assert any(isinstance(module, QuantizedLinear) for module in model.modules())
    model.to(device)
    for subnet in ("max", "min"):
        agree(run(model, device, subnet), run(wanted, torch.device("cpu"), subnet), 2e-4)
