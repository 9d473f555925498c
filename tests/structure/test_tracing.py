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
"""The structure of convolutional nets, found by tracing: of every net of `support.convnets`, and against references by hand."""

import copy
import itertools
import random

import pytest
import torch
from support.convnets import (
    NETS,
    Basic,
    Branching,
    GroupShuffle,
    OldWeightNorm,
    Wrapped,
    counted_macs,
    images_for,
    make_net,
)
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from peft_elastic import ElasticConfig, get_elastic_model
from peft_elastic.cost.counts import CostModel


# what is recalibrated is tested in test_recalibration.py
pytestmark = pytest.mark.filterwarnings("ignore:The subnet gets the statistics:UserWarning")
WIDTHS = {"channels": [1.0, 0.5, 0.25]}


def elastic(net, x, **options):
    return get_elastic_model(net, ElasticConfig(**{"elastic_width": WIDTHS, **options}), x)


def structure_of(model):
    return model._own.parts.structure


def distance(first, second):
    pairs = list(zip(tree_leaves(first), tree_leaves(second), strict=True))
    return max(float((a - b).abs().max()) for a, b in pairs)


def random_subnets(space, count, seed=0):
    chosen = random.Random(seed)
    return [space.subnet({c.key: chosen.choice(c.options) for c in space}) for _ in range(count)]


@pytest.mark.parametrize("name", [name for name in NETS if name != "wrapped"])
def test_every_net(name):
    about, net, x = NETS[name], make_net(name), images_for(name)
    cls = type(net)
    with torch.no_grad():
        before = net(x)
    depth = "all" if about.blocks else None
    model = elastic(net, x, elastic_kernel=[5, 3, 1], elastic_depth=depth)
    structure = structure_of(model)
    assert distance(model(x), before) < 1e-5

    names = {c.name: c for c in structure.channels}
    assert set(about.elastic) <= {c.name for c in structure.elastic}
    for fixed, reason in about.fixed.items():
        assert reason in (names[fixed].fixed or "not fixed"), fixed
        assert fixed in structure.report()
    assert tuple(block.path for block in structure.blocks) == about.blocks

    costs = CostModel(model, model.search_space)
    whole = costs.costs(model.search_space.max)
    for subnet in [model.search_space.min, *random_subnets(model.search_space, 3)]:
        model.set_subnet(subnet)
        with torch.no_grad():
            narrowed = model(x)
        small = model.extract_subnet()
        assert type(small) is cls
        with torch.no_grad():
            assert distance(small(x), narrowed) < 1e-6
        found = costs.costs(subnet)
        assert found["parameters"] == sum(p.numel() for p in small.parameters())
        assert found["macs"] == counted_macs(small, x)
        model.train()
        sum(leaf.sum() for leaf in tree_leaves(model(x))).backward()
        model.eval()
    assert costs.costs(model.search_space.min)["macs"] < whole["macs"]
    # every choice alone takes something away
    for choice in model.search_space:
        smallest = costs.costs({**model.search_space.max, choice.key: choice.options[-1]})
        assert smallest["parameters"] < whole["parameters"], choice.key
    model.set_subnet("max")
    with torch.no_grad():
        assert distance(model(x), before) < 1e-5


# -- what narrowed means, in float64 and by hand -----------------------------------------------------------------------


def double(name):
    net = make_net(name, seed=3).double()
    return net, images_for(name, seed=4).double()


def chosen(model, **widths):
    """Channels by the name of their group, the rest whole; names with dots as "a__b"."""
    values = {f"channels:{name.replace('__', '.')}": value for name, value in widths.items()}
    subnet = model.search_space.subnet({**model.search_space.max, **values})
    model.set_subnet(subnet)
    return model


def test_a_residual_stream_by_hand():
    net, x = double("residual")
    model = elastic(net, x, importance="none")
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    chosen(model, stem=8, blocks__0__a=16, blocks__1__a=8)

    def norm(y, name):
        n = y.shape[1]
        mean, var, g, b = (
            state[f"{name}.{k}"][:n, None, None] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + 1e-5).sqrt() * g + b

    def block(y, name, width):
        n = y.shape[1]
        z = F.relu(norm(F.conv2d(y, state[f"{name}.a.weight"][:width, :n], padding=1), f"{name}.an"))
        return F.relu(y + norm(F.conv2d(z, state[f"{name}.b.weight"][:n, :width], padding=1), f"{name}.bn"))

    y = F.relu(norm(F.conv2d(x, state["stem.weight"][:8], padding=1), "norm"))
    y = block(block(block(y, "blocks.0", 16), "blocks.1", 8), "blocks.2", 32)
    y = block(F.conv2d(y, state["down.weight"][:, :8], state["down.bias"], stride=2), "last.0", 16)
    expected = F.linear(y.mean((2, 3)), state["head.weight"], state["head.bias"])
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_concatenation_by_masks():
    """Zeros in the inactive columns of whoever reads a layer, found by hand for each piece of the concatenation."""
    net, x = double("dense")
    model = elastic(net, x, importance="none")
    masked = make_net("dense", seed=3).double()
    chosen(model, stem=8, layers__0__d=4, layers__1__d=2, layers__2__d=8, layers__1__c=16)
    inactive = torch.zeros(40, dtype=torch.bool)
    inactive[8:16] = inactive[20:24] = inactive[26:32] = True
    with torch.no_grad():
        for number, layer in enumerate(masked.layers):
            layer.c.weight[:, inactive[: 16 + 8 * number]] = 0
        masked.layers[1].d.weight[:, 16:] = 0
        masked.head.weight[:, inactive] = 0
    torch.testing.assert_close(model(x), masked(x), rtol=1e-12, atol=1e-12)


def test_grouped_convolutions_by_hand():
    net, x = double("grouped")
    model = elastic(net, x, importance="none")
    s = {k: v.detach().clone() for k, v in model.state_dict().items()}
    chosen(model, stem=8, a=8)  # two groups of four

    def norm(y, name):
        n = y.shape[1]
        mean, var, g, b = (s[f"{name}.{k}"][:n, None, None] for k in ("running_mean", "running_var", "weight", "bias"))
        return (y - mean) / (var + 1e-5).sqrt() * g + b

    y = F.relu(F.conv2d(x, s["stem.weight"][:8], s["stem.bias"][:8], padding=1))
    z = F.relu(norm(F.conv2d(y, s["a.weight"][:8, :8], s["a.bias"][:8]), "an"))
    pieces = [
        F.conv2d(z[:, 4 * i : 4 * i + 4], s["g.weight"][4 * i : 4 * i + 4], s["g.bias"][4 * i : 4 * i + 4], padding=1)
        for i in range(2)
    ]
    z = F.relu(norm(torch.cat(pieces, 1), "gn"))
    y = y + norm(F.conv2d(z, s["b.weight"][:8, :8], s["b.bias"][:8]), "bn")
    expected = F.linear(y.mean((2, 3)), s["head.weight"][:, :8], s["head.bias"])
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_wrong_wiring_behind_a_norm_is_found():
    """Once narrowed, the shuffle sends channels elsewhere; a norm over all of them kept that from being compared with masks."""
    x = torch.randn(2, 3, 8, 8)
    for norm in (True, False):
        torch.manual_seed(0)
        model = elastic(GroupShuffle(norm).eval(), x)
        assert [c.name for c in structure_of(model).elastic] == ["b"]


# -- what cannot be ----------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3), norm or nn.Identity(), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.b(self.norm(self.a(x))).mean((2, 3))


class Ints(Small):
    def forward(self, x):
        return super().forward(x).argmax(1)


class Noisy(Small):
    def forward(self, x):
        return super().forward(x + torch.rand(1))


class Single(Small):
    def forward(self, x):
        return super().forward(x.to(torch.float32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Branching, "cannot be traced.*data-dependent.*register_layout"),
        (OldWeightNorm, "'stem'.*computed from other parameters"),
        (Wrapped, "'a'.*computed from other parameters"),
        (lambda: Small(nn.SyncBatchNorm(16)), "'norm'.*SyncBatchNorm.*before it is converted"),
        (Ints, "no outputs in floating point"),
        (Noisy, "something else each time"),
        (Single, "float64"),
    ],
)
def test_nets_that_are_refused(make, message):
    net = make().eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    cls = type(net)
    with pytest.raises(ValueError, match=message):
        elastic(net, torch.randn(2, 3, 8, 8))
    assert type(net) is cls
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())


@pytest.mark.parametrize("size", [(2, 3, 20, 20), (2, 4, 16, 16)])
def test_images_that_do_not_fit(size):
    with pytest.raises(ValueError, match="cannot be traced"):
        elastic(make_net("plain"), torch.randn(size))
    with pytest.raises(ValueError, match="`example_inputs` must be given"):
        get_elastic_model(make_net("plain"), ElasticConfig(elastic_width=WIDTHS))


def test_a_weight_of_two_layers_is_refused_by_name():
    model = elastic(make_net("tied"), images_for("tied"), elastic_kernel=[3, 1])
    names = {c.name: c.fixed for c in structure_of(model).channels}
    assert "is one of 'b' too" in names["stem"]
    with pytest.raises(ValueError, match="one of 'b' too"):
        elastic(make_net("tied"), images_for("tied"), elastic_kernel={"a": [3, 1]})


def test_nothing_of_the_model_is_touched():
    net, x = make_net("residual").train(), images_for("residual")
    net.blocks.eval()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = elastic(net, x, elastic_depth="all", importance="none")
    assert torch.equal(torch.rand(3), expected)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())


# -- kernels -----------------------------------------------------------------------------------------------------------


class OneKernel(nn.Module):
    def __init__(self, **options):
        super().__init__()
        kernel = options.pop("kernel_size")
        self.conv, self.head = nn.Conv2d(3, 8, kernel, **options), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.head(self.conv(x))


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"kernel_size": 5, "padding": 2, "stride": 2}, 3),
        ({"kernel_size": 5, "padding": 4, "dilation": 2}, 3),
        ({"kernel_size": (5, 1), "padding": (2, 0)}, 3),
        ({"kernel_size": (5, 3), "padding": (2, 1)}, 1),
        ({"kernel_size": 4, "padding": 1, "stride": 2}, 2),
        ({"kernel_size": 4, "padding": "same"}, 2),
        ({"kernel_size": 5, "padding": "same", "dilation": 3}, 3),
        ({"kernel_size": 5, "padding": 2, "padding_mode": "reflect"}, 3),
        ({"kernel_size": 5, "padding": "same", "padding_mode": "circular"}, 1),
        ({"kernel_size": 7, "padding": 4}, 3),
    ],
)
def test_a_smaller_kernel_is_the_middle_of_the_whole(options, size):
    torch.manual_seed(0)
    net, x = OneKernel(**options).double().eval(), torch.randn(2, 3, 17, 19).double()
    model = elastic(net, x, elastic_width=None, elastic_kernel={"conv": [size]})
    weight = model.conv.weight.detach()
    middle = torch.zeros_like(weight)
    small = [slice((k - min(k, size)) // 2, (k + min(k, size)) // 2) for k in weight.shape[2:]]
    middle[(slice(None), slice(None), *small)] = 1
    reference = OneKernel(**options).double()
    reference.load_state_dict({k: v for k, v in model.state_dict().items() if "matrix" not in k})
    with torch.no_grad():
        reference.conv.weight.mul_(middle)
    model.set_subnet("min")
    # reflected and circular paddings give the same values where both read
    torch.testing.assert_close(model(x), reference(x), rtol=1e-12, atol=1e-12)
    extracted = model.extract_subnet()
    assert tuple(extracted.conv.kernel_size) == tuple(min(k, size) for k in net.conv.__dict__["kernel_size"])
    torch.testing.assert_close(extracted(x), reference(x), rtol=1e-12, atol=1e-12)


def test_learned_matrices_are_applied_in_order_and_merged():
    torch.manual_seed(0)
    net, x = OneKernel(kernel_size=7, padding=3).double().eval(), torch.randn(2, 3, 9, 9).double()
    model = elastic(net, x, elastic_width=None, elastic_kernel=[7, 5, 3])
    first, second = model.conv.kernel_matrix_7_to_5, model.conv.kernel_matrix_5_to_3
    assert torch.equal(first, torch.eye(25).double()) and torch.equal(second, torch.eye(9).double())
    with torch.no_grad():
        first.add_(torch.randn_like(first) * 0.1)
        second.add_(torch.randn_like(second) * 0.1)
    w = model.conv.weight.detach()
    five = torch.einsum("oij,kj->oik", w[:, :, 1:6, 1:6].reshape(8, 3, 25), first.detach()).view(8, 3, 5, 5)
    three = torch.einsum("oij,kj->oik", five[:, :, 1:4, 1:4].reshape(8, 3, 9), second.detach()).view(8, 3, 3, 3)
    for size, kernel in ((5, five), (3, three)):
        model.set_subnet({"kernel:conv": size})
        expected = net.head(F.conv2d(x, kernel, model.conv.bias, padding=size // 2))
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
        extracted = model.extract_subnet()
        assert not any("matrix" in name for name in extracted.state_dict())
        torch.testing.assert_close(extracted(x), expected, rtol=1e-12, atol=1e-12)
    model(x).square().sum().backward()
    assert first.grad.abs().sum() > 0 and second.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("net", "asked", "message"),
    [
        ({"kernel_size": 5, "padding": 0}, {"conv": [3]}, "'conv'.*not possible.*padding"),
        ({"kernel_size": 5, "padding": 1}, {"conv": [3, 1]}, "has 1 for 'conv'"),
        ({"kernel_size": 4, "padding": 1}, {"conv": [3]}, "parity"),
        ({"kernel_size": 5, "padding": 2}, {"conv": [7]}, "has 7 for 'conv'"),
        ({"kernel_size": 5, "padding": 2}, {"head": [1]}, "names 0 convolutions"),
        ({"kernel_size": 3, "padding": 0}, [3, 1], "no convolution"),
    ],
)
def test_kernels_that_are_refused(net, asked, message):
    with pytest.raises(ValueError, match=message):
        elastic(OneKernel(**net), torch.randn(2, 3, 9, 9), elastic_width=None, elastic_kernel=asked)


# -- widths ------------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 12, 1), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))


@pytest.mark.parametrize(("width", "half"), [(100, 48), (68, 32), (30, 16), (6, 3)])
def test_the_largest_is_the_pretrained_model(width, half):
    net, x = Wide(width).eval(), torch.randn(2, 3, 6, 6)
    before = net(x)
    model = elastic(net, x, elastic_width={"channels": [0.5]})
    assert model.search_space.max["channels:a"] == width
    assert model.search_space.min["channels:a"] == half
    torch.testing.assert_close(model(x), before)
    model.set_subnet("max")
    assert model.extract_subnet().a.weight.shape[0] == width


@pytest.mark.parametrize(
    "options",
    [
        [2.0],
        [0.0],
        [-0.5],
        [],
        [float("nan")],
        [200],
        [0],
        {"nothing": [0.5]},
        {"head": [0.5]},
        {"a": [101]},
        {"a": "all"},
    ],
)
def test_widths_that_are_refused(options):
    with pytest.raises(ValueError, match="channels"):
        elastic(Wide(100), torch.randn(2, 3, 6, 6), elastic_width={"channels": options})


def test_numbers_that_break_groups_and_layers_that_are_not_named():
    x = images_for("grouped")
    with pytest.raises(ValueError, match="groups of 4"):
        elastic(make_net("grouped"), x, elastic_width={"channels": {"a": [32, 6]}})
    model = elastic(make_net("grouped"), x, elastic_width={"channels": {"a": [32, 12]}})
    assert [choice.key for choice in model.search_space] == ["channels:a"]


# -- depth and switching -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "next"])
def test_every_subset_of_blocks_in_any_order(name):
    """The same subnet computes the same bits, whatever was active before."""
    x = images_for(name)
    net = make_net(name)
    for module in net.modules():
        if hasattr(module, "gamma"):  # a layer scale, at first too small to see what its block does
            nn.init.uniform_(module.gamma, 0.5, 1.5)
    model = elastic(net, x, elastic_depth="all", elastic_kernel=[3, 1])
    fresh = copy.deepcopy(model)
    blocks = [f"depth:{path}" for path in NETS[name].blocks]
    expected = {}
    for values in itertools.product((1, 0), repeat=len(blocks)):
        for width in ("max", "min"):
            subnet = {**getattr(model.search_space, width), **dict(zip(blocks, values))}
            other = copy.deepcopy(fresh)
            other.set_subnet(subnet)
            with torch.no_grad():
                expected[values, width] = other(x)
    assert len({tensor.sum().item() for tensor in expected.values()}) == len(expected)
    walk = list(expected) * 2
    random.Random(7).shuffle(walk)
    for values, width in walk:
        model.set_subnet({**getattr(model.search_space, width), **dict(zip(blocks, values))})
        with torch.no_grad():
            assert torch.equal(model(x), expected[values, width])


def test_one_module_under_two_names_is_one():
    model = elastic(make_net("tied"), images_for("tied"), elastic_depth="all")
    assert [c.key for c in model.search_space] == ["channels:first.a", "depth:first"]
    model.set_subnet("min")
    small = model.extract_subnet()
    assert type(small.first) is nn.Identity and small.again is small.first


# -- order -------------------------------------------------------------------------------------------------------------


class Ordered(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        return self.b(F.relu(self.n(self.a(x)))).mean((2, 3))


@pytest.mark.parametrize("importance", ["gamma", "magnitude", "activation", "gradient"])
def test_scores_by_hand(importance):
    torch.manual_seed(1)
    net = Ordered().double().eval()
    nn.init.normal_(net.n.weight)
    nn.init.normal_(net.n.bias)
    batches = [(torch.randn(n, 3, 5, 5).double(), torch.arange(n) % 4) for n in (3, 2)]
    reader = net.b.weight.detach()[:, :, 0, 0]
    if importance == "gamma":
        expected = net.n.weight.detach().abs() * reader.norm(dim=0)
    elif importance == "magnitude":
        expected = net.a.weight.abs().sum((1, 2, 3)) + net.n.weight.abs() + net.n.bias.abs() + reader.abs().sum(0)
    else:
        total = 0
        for x, labels in batches:
            y = F.relu(net.n(net.a(x))).detach().requires_grad_()
            if importance == "activation":
                total = total + y.square().sum((0, 2, 3)) * reader.square().sum(0)
                continue
            for i in range(len(y)):  # the loss of each sample by itself
                loss = F.cross_entropy(net.b(y[i : i + 1]).mean((2, 3)), labels[i : i + 1])
                (gradient,) = torch.autograd.grad(loss, y)
                total = total + (gradient * y)[i].sum((1, 2)).square()
        expected = (total / (5 if importance == "gradient" else 1)).sqrt()
    model = elastic(net, batches[0][0], elastic_width={"channels": [6, 3]}, importance="none")
    found = model.sort_by_importance(batches, importance, progress=False)
    torch.testing.assert_close(
        found["a"].double(), expected.detach().sort(descending=True).values, rtol=1e-5, atol=1e-7
    )
    own = model.sort_by_importance(importance={"a": torch.arange(6.0)}, progress=False)
    assert own["a"].tolist() == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_sorting_in_a_training_changes_its_order_alone(optimizer):
    def start():
        model = elastic(make_net("residual").double(), images_for("residual").double(), importance="none")
        made = (
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
            if optimizer == "sgd"
            else torch.optim.AdamW(model.parameters(), lr=1e-2)
        )
        return model.train(), made

    def train(model, made, seed):
        torch.manual_seed(seed)
        for _ in range(3):
            loss = model(torch.randn(4, 3, 8, 8).double()).square().mean()
            made.zero_grad()
            loss.backward()
            made.step()

    one, other = start(), start()
    for model, made in (one, other):
        train(model, made, 0)
    other[0].sort_by_importance(importance="magnitude", optimizer=other[1], progress=False)
    assert not torch.equal(one[0].stem.weight, other[0].stem.weight)
    for model, made in (one, other):
        train(model, made, 1)
    x = images_for("residual", 9).double()
    torch.testing.assert_close(one[0].eval()(x), other[0].eval()(x), rtol=1e-8, atol=1e-9)
    order = other[0].noted_orders()["stem"]
    torch.testing.assert_close(one[0].stem.weight[order], other[0].stem.weight, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(one[0].norm.running_mean[order], other[0].norm.running_mean, rtol=1e-8, atol=1e-9)


def test_blocks_that_take_more_than_identity_does_are_named():
    model = elastic(make_net("arguments"), images_for("arguments"), elastic_depth="all")
    assert "Identity" in structure_of(model).problems["block"]
    with pytest.raises(ValueError, match="'block'.*Identity"):
        elastic(make_net("arguments"), images_for("arguments"), elastic_depth=["block"])
    assert isinstance(make_net("arguments").plain, Basic)
