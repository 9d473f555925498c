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
"""What an elastic adapter computes, against stock LoRA with physically sliced matrices and against the formula."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear, LoraLayer
from support.models import (
    ARCHITECTURES,
    AttentionNet,
    ConvNet,
    EmbeddingNet,
    default_dtype,
    net,
    outputs,
    randomize,
    tiny_llama,
    tiny_mixtral,
    tokens,
)
from torch import nn

from peft_elastic import ElasticLoraConfig


def sliced_lora(elastic_model, base_model, config, subnet_ranks):
    """A stock LoRA model that holds nothing but the active ranks of `elastic_model`.

    Args:
        base_model: another copy of the base model.
        config: keyword arguments of `LoraConfig`, with the maximal rank.
        subnet_ranks: path -> active rank.
    """
    torch.manual_seed(0)
    model = get_peft_model(base_model, LoraConfig(**config))
    stock = {path: layer for path, layer in model.base_model.model.named_modules() if isinstance(layer, LoraLayer)}
    state = dict(elastic_model.base_model.model.named_parameters())
    for path, layer in stock.items():
        name = path.replace(".base_layer", "")
        experts = getattr(layer, "num_experts", 1)
        if experts > 1:
            name = f"{name}.{layer.parameter_name}"
        k = subnet_ranks[name]
        groups = getattr(layer.get_base_layer(), "groups", 1)
        if "default" in layer.lora_embedding_A:
            layer.lora_embedding_A["default"] = nn.Parameter(state[f"{path}.lora_embedding_A.default"][:k].clone())
            layer.lora_embedding_B["default"] = nn.Parameter(state[f"{path}.lora_embedding_B.default"][:, :k].clone())
            continue
        A, B = state[f"{path}.lora_A.default.weight"], state[f"{path}.lora_B.default.weight"]
        if experts > 1:
            A = A.reshape(experts, -1, A.shape[-1])[:, :k].reshape(experts * k, -1)
            B = B.reshape(len(B), -1, experts)[:, :k].reshape(len(B), -1)
        elif groups > 1:
            A = torch.cat([part[: k // groups] for part in A.chunk(groups)])
            B = B[:, : k // groups]
        else:
            A, B = A[:k], B[:, :k]
        layer.lora_A["default"].weight = nn.Parameter(A.clone())
        layer.lora_B["default"].weight = nn.Parameter(B.clone())
    others = {n: p for n, p in state.items() if "lora_" in n and "lora_A" not in n and "lora_B" not in n}
    for name, parameter in model.base_model.model.named_parameters():
        if name in others and "embedding" not in name:
            parameter.data.copy_(others[name])
        if name.endswith("lora_B.default.bias"):
            parameter.data.copy_(state[name])
    return model.eval()


def module_ranks(model):
    """path -> active rank."""
    subnet = model.active_subnet
    return {name: subnet[choice.key] for choice in model.search_space for name in choice.modules}


def subnets(model, n_random=2):
    space = model.search_space
    return [space.max, space.min, space.heuristic, *(space.sample(seed) for seed in range(n_random))]


CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"first": 12}, "alpha_pattern": {"first": 5}},
}


def first_target(architecture):
    return next(iter(architecture.modules))


@pytest.mark.parametrize(
    ("architecture", "case"),
    [(architecture, "plain") for architecture in ARCHITECTURES]
    + [(architecture, case) for architecture in ("llama", "gpt2", "bert") for case in CASES if case != "plain"],
)
def test_every_subnet_equals_stock_lora_with_sliced_matrices(architecture, case):
    arch = ARCHITECTURES[architecture]
    settings = {"r": 8, "lora_alpha": 16, "target_modules": list(arch.modules)} | CASES[case]
    for field in ("rank_pattern", "alpha_pattern"):
        if field in settings:
            settings[field] = {first_target(arch): value for value in settings[field].values()}
    with default_dtype(torch.float64):
        model = get_peft_model(arch.build(), ElasticLoraConfig(elastic_ranks=[8, 5, 3], **settings)).eval()
        randomize(model)
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in arch.inputs().items()}
        results = []
        for subnet in subnets(model, n_random=1):
            model.set_subnet(subnet)
            result = outputs(model, inputs)
            reference = sliced_lora(model, arch.build(), settings, module_ranks(model))
            torch.testing.assert_close(result, outputs(reference, inputs), rtol=1e-10, atol=1e-10)
            results.append(result)
    # the comparison would mean nothing if the subnets did not differ
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(results) for b in results[:i])


NETS = {
    "conv1d": (ConvNet, (1,), ["conv", "grouped", "pointwise", "head"], lambda: torch.randn(2, 3, 9)),
    "conv2d": (ConvNet, (2,), ["conv", "grouped", "pointwise", "head"], lambda: torch.randn(2, 3, 7, 8)),
    "conv3d": (ConvNet, (3,), ["conv", "grouped", "pointwise", "head"], lambda: torch.randn(2, 3, 5, 6, 7)),
    "conv2d-4-groups": (ConvNet, (2, 4), ["conv", "grouped", "pointwise"], lambda: torch.randn(2, 3, 7, 8)),
    "attention": (AttentionNet, (), ["first", "attention"], lambda: torch.randn(2, 5, 12)),
    "embedding": (EmbeddingNet, (), ["embedding", "conv1d", "linear"], lambda: torch.randint(0, 20, (2, 5))),
}


@pytest.mark.parametrize(
    # peft has no DoRA for nn.MultiheadAttention
    ("case", "dora"),
    [(case, False) for case in NETS] + [(case, True) for case in NETS if case != "attention"],
)
def test_other_layers_equal_stock_lora_with_sliced_matrices(case, dora):
    net_cls, args, targets, inputs = NETS[case]
    if dora:  # nor for grouped convolutions
        targets = [name for name in targets if name != "grouped"]
    settings = {"r": 8, "lora_alpha": 4, "target_modules": targets, "use_dora": dora}
    with default_dtype(torch.float64):
        model = get_peft_model(net(net_cls, *args), ElasticLoraConfig(elastic_ranks=[8, 4], **settings)).eval()
        randomize(model)
        x = inputs()
        results = []
        for subnet in subnets(model):
            model.set_subnet(subnet)
            result = outputs(model, x)
            reference = sliced_lora(model, net(net_cls, *args), settings, module_ranks(model))
            torch.testing.assert_close(result, outputs(reference, x), rtol=1e-10, atol=1e-10)
            results.append(result)
    assert (results[0] - results[1]).abs().max() > 1e-3


@pytest.mark.parametrize("use_rslora", [False, True])
def test_experts_equal_stock_lora_with_sliced_matrices(use_rslora):
    settings = {
        "r": 6,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "use_rslora": use_rslora,
    }
    with default_dtype(torch.float64):
        # transformers' grouped kernel knows no float64
        base = [tiny_mixtral(experts_implementation="eager") for _ in range(5)]
        model = get_peft_model(base.pop(), ElasticLoraConfig(elastic_ranks=[6, 5, 2], **settings)).eval()
        assert {choice.name.partition("layers.0.")[2] for choice in model.search_space} == {
            "self_attn.q_proj",
            "mlp.experts.gate_up_proj",
            "mlp.experts.down_proj",
            "",
        }
        randomize(model)
        results = []
        for subnet in subnets(model, n_random=1):
            model.set_subnet(subnet)
            result = outputs(model, tokens())
            reference = sliced_lora(model, base.pop(), settings, module_ranks(model))
            torch.testing.assert_close(result, outputs(reference, tokens()), rtol=1e-10, atol=1e-10)
            results.append(result)
    assert (results[0] - results[1]).abs().max() > 1e-3


@pytest.mark.parametrize("use_rslora", [False, True])
def test_each_linear_layer_computes_the_formula(use_rslora):
    """y = x W^T + b + s (x A_k^T) B_k^T, with the scaling s of the maximal rank, in float64."""
    r, alpha = 8, 12
    with default_dtype(torch.float64):
        model = get_peft_model(
            ARCHITECTURES["opt"].build(),
            ElasticLoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", use_rslora=use_rslora),
        ).eval()
        randomize(model)
        seen = {}

        def record(name):
            return lambda module, args, output: seen.update({name: (args[0], output)})

        layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, Linear)}
        for name, layer in layers.items():
            layer.register_forward_hook(record(name))
        for seed in range(3):
            model.set_subnet(model.search_space.sample(seed))
            outputs(model, tokens(seed=seed))
            ranks = module_ranks(model)
            assert len(set(ranks.values())) > 1
            for name, (x, y) in seen.items():
                base, k = layers[name].base_layer, ranks[name]
                A = layers[name].lora_A["default"]._parameters["weight"].detach()[:k]
                B = layers[name].lora_B["default"]._parameters["weight"].detach()[:, :k]
                s = alpha / (math.sqrt(r) if use_rslora else r)
                expected = x @ base.weight.T + base.bias + s * (x @ A.T) @ B.T
                torch.testing.assert_close(y, expected.detach(), rtol=1e-12, atol=1e-12)
        assert len(seen) == len(layers) == 12


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_equal_those_of_sliced_lora_and_are_zero_elsewhere(dora):
    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj", "down_proj"], "use_dora": dora}
    with default_dtype(torch.float64):
        model = get_peft_model(tiny_llama(), ElasticLoraConfig(elastic_ranks=[8, 5, 2], **settings))
        randomize(model)
        for seed in range(2):
            model.set_subnet(model.search_space.sample(seed))
            ranks = module_ranks(model)
            reference = sliced_lora(model, tiny_llama(), settings, ranks)
            reference.requires_grad_(False)
            for name, parameter in reference.named_parameters():
                parameter.requires_grad_("lora_" in name)
            for m in (model, reference):
                m.zero_grad()
                m.train()
                m(input_ids=tokens(), labels=tokens()).loss.backward()
            expected = {n: p.grad for n, p in reference.named_parameters() if p.requires_grad}
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            assert trained.keys() == expected.keys()
            for name, parameter in trained.items():
                assert parameter.grad is not None, name
                assert parameter.grad.shape == parameter.shape
                if "magnitude" in name:
                    active, inactive = parameter.grad, parameter.grad[:0]
                else:
                    k = ranks[name.removeprefix("base_model.model.").rpartition(".lora_")[0]]
                    parts = (parameter.grad, parameter.grad.T)["lora_B" in name]
                    active, inactive = parts[:k], parts[k:]
                    active = (active, active.T)["lora_B" in name]
                torch.testing.assert_close(active, expected[name], rtol=1e-9, atol=1e-12)
                assert active.abs().max() > 0
                assert inactive.eq(0).all()


def test_gradients_of_other_layers_are_zero_outside_of_the_subnet():
    for case, (net_cls, args, targets, inputs) in NETS.items():
        config = ElasticLoraConfig(r=8, elastic_ranks=[8, 4], target_modules=targets)
        model = get_peft_model(net(net_cls, *args), config)
        randomize(model)
        model.set_subnet("min")
        model(inputs()).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, (case, name)
                # half of the ranks, in whichever dimension they lie
                assert parameter.grad.count_nonzero() <= parameter.numel() / 2, (case, name)
                assert parameter.grad.count_nonzero() > 0, (case, name)


def test_training_one_subnet_leaves_the_other_ranks_untouched():
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(r=8, target_modules=["q_proj"]))
    randomize(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.sample_subnet("min")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        moved = parameter.detach().ne(before[name])
        if "lora_A" in name:
            assert moved[:4].any() and not moved[4:].any()
        elif "lora_B" in name:
            assert moved[:, :4].any() and not moved[:, 4:].any()
        else:
            assert not moved.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_bases(dtype, autocast_adapter_dtype):
    """The adapter's dtype follows peft's rule, whatever is active, and no rank is lost by casting."""
    config = {"r": 8, "lora_alpha": 4, "target_modules": ["embed_tokens", "q_proj", "down_proj"]}
    subnet = {}
    reference = get_peft_model(tiny_llama(), ElasticLoraConfig(**config))
    subnet = reference.search_space.min.to_dict()

    model = get_peft_model(
        tiny_llama().to(dtype),
        ElasticLoraConfig(active_subnet=subnet, **config),
        autocast_adapter_dtype=autocast_adapter_dtype,
    ).eval()
    expected = torch.float32 if autocast_adapter_dtype else dtype
    shapes = {n: p.shape for n, p in reference.named_parameters() if "lora_" in n}
    found = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert {n: p.shape for n, p in found.items()} == shapes
    assert {p.dtype for p in found.values()} == {expected}
    assert model.active_subnet == subnet

    stock = get_peft_model(tiny_llama().to(dtype), LoraConfig(**config), autocast_adapter_dtype=autocast_adapter_dtype)
    randomize(model)
    randomize(stock)
    model.set_subnet("max")
    assert torch.equal(outputs(model, tokens()), outputs(stock.eval(), tokens()))
    model.set_subnet("min")
    before = outputs(model, tokens())
    assert before.dtype == dtype and torch.isfinite(before).all()
    merged = outputs(model.merge_and_unload(), tokens())
    torch.testing.assert_close(merged.float(), before.float(), rtol=0.1, atol=0.1)


def test_a_second_adapter_keeps_its_ranks_when_cast():
    """peft casts embedding adapters by reading and replacing the parameter."""
    config = {"r": 8, "target_modules": ["embed_tokens"]}
    model = get_peft_model(tiny_llama().to(torch.bfloat16), ElasticLoraConfig(**config))
    chosen = model.search_space.min.to_dict()
    model.add_adapter("other", ElasticLoraConfig(active_subnet=chosen, **config))
    shapes = {n: (tuple(p.shape), p.dtype) for n, p in model.named_parameters() if "other" in n}
    assert sorted(shapes.values()) == [((8, 96), torch.float32), ((32, 8), torch.float32)]
    assert model.get_active_subnet("other") == chosen


def test_casting_by_peft_itself_never_loses_ranks():
    """`peft.functional.cast_adapter_dtype` knows no tuner."""
    from peft.functional import cast_adapter_dtype

    model = get_peft_model(
        tiny_llama().to(torch.bfloat16),
        ElasticLoraConfig(r=8, target_modules=["embed_tokens", "q_proj"]),
        autocast_adapter_dtype=False,
    ).eval()
    randomize(model)
    expected = {n: p.detach().float() for n, p in model.named_parameters() if "lora_" in n}
    model.set_subnet("min")
    cast_adapter_dtype(model, adapter_name="default")
    assert model.active_subnet == model.search_space.min
    found = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert found.keys() == expected.keys()
    assert all(p.dtype == torch.float32 and torch.equal(p, expected[n]) for n, p in found.items())


def test_replacing_a_part_of_an_embedding_adapter_is_refused():
    model = get_peft_model(net(EmbeddingNet), ElasticLoraConfig(r=8, target_modules=["embedding"]))
    randomize(model)
    model.set_subnet("min")
    matrices = model.base_model.model.embedding.lora_embedding_A
    for bad in (torch.zeros(4, 20), torch.zeros(5, 20)):
        with pytest.raises(ValueError, match=r"would lose its other ranks. Call `set_subnet\('max'\)` first"):
            matrices["default"] = bad
    matrices["default"] = nn.Parameter(torch.ones(8, 20))
    assert matrices["default"].shape == (4, 20) and matrices["default"].eq(1).all()


def test_lora_bias_is_no_rank():
    settings = {"r": 8, "target_modules": ["fc1", "out_proj"], "lora_bias": True}
    with default_dtype(torch.float64):
        build = ARCHITECTURES["opt"].build
        model = get_peft_model(build(), ElasticLoraConfig(**settings)).eval()
        randomize(model)
        model.set_subnet("heuristic")
        before = outputs(model, tokens())
        reference = sliced_lora(model, build(), settings, module_ranks(model))
        torch.testing.assert_close(before, outputs(reference, tokens()), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(outputs(model.merge_and_unload(), tokens()), before, rtol=1e-9, atol=1e-9)
