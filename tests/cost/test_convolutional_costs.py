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
"""Costs of convolutional models: a subnet costs what is counted, while it runs, on the plain network built in its size."""

import itertools
import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BitConfig, BitForImageClassification, MobileViTConfig, MobileViTForImageClassification

from peft_elastic import ElasticConfig, get_elastic_model
from peft_elastic.cost.counts import CostModel, cost_in
from peft_elastic.cost.latency import LatencyModel
from peft_elastic.layers.convolutional import add_matrices, set_active_channels, set_kernel
from peft_elastic.search.plot import Picture, Point, draw
from peft_elastic.search.shown import profile
from peft_elastic.supernet import Choice, LayerShape, Run, SearchSpace
from peft_elastic.supernet.samplers import _expected_count, _only_ranks
from peft_elastic.supernet.summary import describe_parameters


A, B, C, E = "channels:a", "channels:b", "channels:c", "channels:e"
DEPTHWISE, TALL, DEPTH = "kernel:block.depthwise", "kernel:tall", "depth:block"
WITH_ADAPTERS = ("stem", "block.reduce", "tall", "mix", "tokens", "head")


@dataclass(frozen=True)
class Sizes:
    """Of a network: channels, kernel sizes, whether the block is there, and the image."""

    a: int = 8
    b: int = 12
    c: int = 4
    e: int = 6
    depthwise: int = 5
    tall: int = 5
    block: bool = True
    image: tuple[int, int] = (11, 8)
    dilation: int = 2

    @property
    def reduced(self) -> tuple[int, int]:
        """The image after a convolution with kernel 3, stride 2 and padding 1."""
        height, width = self.image
        return (height + 1) // 2, (width + 1) // 2


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        a, b, kernel, dilation = sizes.a, sizes.b, sizes.depthwise, sizes.dilation
        self.expand, self.expand_norm = nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b)
        padding = dilation * (kernel - 1) // 2
        self.depthwise = nn.Conv2d(b, b, kernel, padding=padding, dilation=dilation, groups=b, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(b)
        self.reduce, self.reduce_norm = nn.Conv2d(b, a, 1), nn.BatchNorm2d(a, affine=False)

    def forward(self, x):
        y = self.expand_norm(self.expand(x)).relu()
        y = self.depthwise_norm(self.depthwise(y)).relu()
        return x + self.reduce_norm(self.reduce(y))


class Network(nn.Module):
    """Stride, dilation, depthwise, grouped (whole groups of two go; and a fixed one), 5 x 1, two inputs of a concatenation, a linear
    layer at each position and one behind a flatten."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        a, c, e = sizes.a, sizes.c, sizes.e
        self.fixed = nn.Conv2d(3, 4, 3, padding=1)
        self.fixed_grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.stem, self.norm = nn.Conv2d(6, a, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(a)
        self.block = Block(sizes) if sizes.block else nn.Identity()
        self.grouped = nn.Conv2d(a, a, 3, padding=1, groups=a // 2)
        self.tall = nn.Conv2d(a, c, (sizes.tall, 1), padding=(sizes.tall // 2, 0))
        self.mix, self.group_norm = nn.Conv2d(c + a + 4, e, 1), nn.GroupNorm(1, e)
        self.act, self.tokens = nn.PReLU(e), nn.Linear(e, e)
        self.scale = nn.Parameter(torch.ones(e, 1, 1))
        height, width = sizes.reduced
        self.head = nn.Linear(e * height * width, 10)

    def forward(self, x):
        x = self.fixed(x)
        pooled = nn.functional.avg_pool2d(x, 2, ceil_mode=True)
        x = self.block(self.norm(self.stem(self.fixed_grouped(x))))
        x = torch.cat([self.tall(x), self.grouped(x), pooled], dim=1)
        x = self.act(self.group_norm(self.mix(x)))
        x = self.tokens(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * self.scale
        return self.head(x.flatten(1))


def space_of(sizes: Sizes, rank: int = 0, depth: bool = True) -> SearchSpace:
    """The space of a whole network, described by hand."""
    a, b, c, e = ((Run(full, key, full),) for full, key in ((sizes.a, A), (sizes.b, B), (sizes.c, C), (sizes.e, E)))
    height, width = sizes.reduced
    n, pixels = height * width, sizes.image[0] * sizes.image[1]
    inside = (DEPTH,) if depth else ()
    k = sizes.depthwise

    def norm(name, runs, **fields):
        return LayerShape(name, runs[0].length, 0, out_runs=runs, **fields)

    layers = [
        LayerShape("fixed", 4, 3, True, positions=pixels, kernel_size=(3, 3)),
        LayerShape("fixed_grouped", 6, 2, True, positions=pixels, kernel_size=(3, 3)),
        LayerShape("stem", sizes.a, 6, out_runs=a, positions=n, kernel_size=(3, 3)),
        norm("norm", a, bias=True, per_output=1, buffers=2),
        LayerShape("block.expand", sizes.b, sizes.a, False, None, 1, "out", None, inside, b, a, n, None, (1, 1)),
        norm("block.expand_norm", b, bias=True, per_output=1, buffers=2, depth=inside),
        LayerShape(
            "block.depthwise", sizes.b, 1, out_runs=b, positions=n, kernel=DEPTHWISE, kernel_size=(k, k), depth=inside
        ),
        # tensor by tensor
        norm("block.depthwise_norm.weight", b, per_output=1, depth=inside),
        norm("block.depthwise_norm.bias", b, bias=True, depth=inside),
        norm("block.depthwise_norm.running_mean", b, buffers=1, depth=inside),
        norm("block.depthwise_norm.running_var", b, buffers=1, depth=inside),
        LayerShape("block.depthwise_norm.num_batches_tracked", 1, 0, buffers=1, depth=inside),
        LayerShape(
            "block.reduce", sizes.a, sizes.b, True, None, 1, "out", None, inside, a, b, n, None, (1, 1)
        ),
        norm("block.reduce_norm", a, buffers=2, depth=inside),
        LayerShape("grouped", sizes.a, 2, True, out_runs=a, positions=n, kernel_size=(3, 3)),
        LayerShape(
            "tall", sizes.c, sizes.a, True, None, 1, "out", None, (), c, a, n, TALL, (sizes.tall, 1)
        ),
        LayerShape(
            "mix", sizes.e, sizes.c + sizes.a + 4, True, out_runs=e, in_runs=(*c, *a, Run(4)), positions=n, kernel_size=(1, 1)
        ),
        norm("group_norm", e, bias=True, per_output=1),
        norm("act", e, per_output=1),
        LayerShape("tokens", sizes.e, sizes.e, True, out_runs=e, in_runs=e, positions=n),
        norm("scale", e, per_output=1),
        LayerShape("head", 10, sizes.e * n, True, in_runs=(Run(sizes.e * n, E, sizes.e),)),
    ]  # fmt: skip
    choices = [
        Choice("channels", "a", tuple(range(sizes.a, 0, -2))),
        Choice("channels", "b", tuple(range(sizes.b, 0, -1))),
        Choice("channels", "c", tuple(range(sizes.c, 0, -1))),
        Choice("channels", "e", tuple(range(sizes.e, 0, -1))),
        Choice("kernel", "block.depthwise", tuple(range(k, 0, -2))),
        Choice("kernel", "tall", tuple(range(sizes.tall, 0, -2))),
    ]
    if depth:
        choices.append(Choice("depth", "block", (1, 0)))
    if rank:
        for i, layer in enumerate(layers):
            if layer.name in WITH_ADAPTERS:
                choices.append(
                    Choice("rank", layer.name, tuple(range(rank, 0, -1)), (layer.name,), layer.whole_of_rank)
                )
                layers[i] = replace(layer, rank=choices[-1].key)
    return SearchSpace(choices, layers)


def cut(sizes: Sizes, subnet) -> Sizes:
    return replace(
        sizes,
        a=subnet[A],
        b=subnet[B],
        c=subnet[C],
        e=subnet[E],
        depthwise=subnet[DEPTHWISE],
        tall=subnet[TALL],
        block=bool(subnet.get(DEPTH, 1)),
    )


def counted(model: nn.Module, image: tuple[int, int]) -> dict[str, int]:
    """What a network is seen to cost while it runs on an image."""
    macs = 0

    def convolution(module, args, output):
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()

    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    handles = [layer.register_forward_hook(convolution) for layer in layers]
    model.eval()
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        model(torch.zeros(1, 3, *image, dtype=dtype))
    for handle in handles:
        handle.remove()
    return {
        "macs": macs,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(t.numel() * t.element_size() for t in model.state_dict().values()),
    }


@st.composite
def cases(draw):
    sizes = Sizes(
        a=draw(st.sampled_from([2, 4, 6, 10])),
        b=draw(st.integers(1, 9)),
        c=draw(st.integers(1, 5)),
        e=draw(st.integers(1, 7)),
        depthwise=draw(st.sampled_from([1, 3, 5, 7])),
        tall=draw(st.sampled_from([3, 5])),
        image=draw(st.tuples(st.integers(5, 12), st.integers(5, 12))),
        dilation=draw(st.integers(1, 2)),
    )
    return sizes, draw(st.integers(0, 2**32)), draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))


@settings(max_examples=40, deadline=None)
@given(cases())
def test_a_subnet_costs_what_its_plain_network_does(case):
    sizes, seed, dtype = case
    space = space_of(sizes)
    costs = CostModel(Network(sizes).to(dtype), space)
    for subnet in (space.max, space.min, space.heuristic, space.sample(seed)):
        assert costs.costs(subnet) == counted(Network(cut(sizes, subnet)).to(dtype), sizes.image)


def test_the_whole_space_of_one_layer():
    """Every value of every choice, the others at their largest: none of them is without effect."""
    sizes = Sizes()
    space = space_of(sizes)
    costs = CostModel(Network(sizes), space)
    whole = costs.costs(space.max)
    for choice, value in ((c, v) for c in space for v in c.options[1:]):
        subnet = {**space.max, choice.key: value}
        assert costs.costs(subnet) == counted(Network(cut(sizes, subnet)), sizes.image)
        assert all(cost < whole[name] for name, cost in costs.costs(subnet).items())


@pytest.mark.parametrize("rank", [1, 3])
def test_adapters_are_computed_where_their_layers_are(rank):
    sizes = Sizes()
    space = space_of(sizes, rank)

    def adapted(sizes):
        targets = [name for name in WITH_ADAPTERS if sizes.block or not name.startswith("block.")]
        return lambda ranks: get_peft_model(
            Network(sizes), LoraConfig(r=rank, rank_pattern=ranks, target_modules=targets)
        )

    costs = CostModel(adapted(sizes)({}), space)  # whose layers have longer names than those of the space
    for subnet in (space.max, space.min, *(space.sample(seed) for seed in range(4))):
        small = cut(sizes, subnet)
        ranks = {name: subnet[f"rank:{name}"] for name in WITH_ADAPTERS}
        expected = counted(adapted(small)(ranks), sizes.image)
        merged = counted(Network(small), sizes.image)
        assert costs.costs(subnet) == {**expected, "bytes": merged["bytes"]}


def test_matrices_of_kernels_and_the_active_subnet_change_nothing():
    sizes = Sizes(depthwise=5)
    space = space_of(sizes)
    model = Network(sizes)
    plain = CostModel(model, space)
    subnets = [space.max, space.min, *(space.sample(seed) for seed in range(3))]
    add_matrices(model.block.depthwise, (5, 3, 1))
    add_matrices(model.tall, (5, 3))
    assert sum(p.numel() for p in model.parameters()) > plain.parameters(space.max)
    for narrowed in (False, True):
        if narrowed:
            set_kernel(model.block.depthwise, 3)
            set_kernel(model.tall, 3)
            set_active_channels(model.tall, "out", ((0, 2),))
            set_active_channels(model.mix, "in", ((0, 2), (4, 16)))
            for side in ("in", "out"):
                set_active_channels(model.tokens, side, ((0, 3),))
            set_active_channels(model.head, "in", ((0, 5),))
            assert model.head.in_features == 5
            assert model.tokens.weight.shape == (3, 3)
        costs = CostModel(model, space)
        assert [costs.costs(subnet) for subnet in subnets] == [plain.costs(subnet) for subnet in subnets]


class Traced(nn.Module):
    """A block without and one with affine norms, a kernel of 5 x 1, a concatenation, GroupNorm, flatten; `tall` is computed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.first, self.second = Residual(True), Residual(False)
        self.tall, self.group_norm = nn.Conv2d(16, 16, (5, 1), padding=(2, 0)), nn.GroupNorm(4, 32)
        self.head = nn.Linear(32 * 36, 10)

    def forward(self, x):
        x = self.second(self.first(self.norm(self.stem(x)).relu()))
        x = torch.cat([x, self.tall(self.tall(x))], dim=1)
        return self.head(self.group_norm(x).flatten(1))


class Residual(nn.Module):
    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32, affine=affine)
        self.conv2, self.norm2 = nn.Conv2d(32, 16, 5, padding=2, bias=False), nn.BatchNorm2d(16)

    def forward(self, x):
        return x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))


def bit():
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2]}
    return BitForImageClassification(BitConfig(**sizes, num_groups=8, layer_type="preactivation", num_labels=4))


def mobilevit():
    sizes = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 64]}
    return MobileViTForImageClassification(
        MobileViTConfig(image_size=64, **sizes, num_labels=4, num_attention_heads=2)
    )


@pytest.mark.parametrize(
    ("build", "size", "kernels"),
    [
        pytest.param(Traced, 12, [5, 3], id="by-hand"),
        pytest.param(bit, 32, None, id="norms-of-weights"),
        pytest.param(mobilevit, 64, None, id="patches-as-samples"),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_traced_model_costs_what_is_extracted(build, size, kernels, batch):
    """The layers that tracing describes, against what runs."""
    torch.manual_seed(0)
    config = ElasticConfig(
        elastic_width={"channels": [1.0, 0.75, 0.5]}, elastic_kernel=kernels, elastic_depth="all", importance="none"
    )
    model = get_elastic_model(build().eval(), config, example_inputs=torch.randn(batch, 3, size, size))
    space = model.search_space
    assert space.counted_per == "image"
    costs = CostModel(model, space)
    for subnet in (space.max, space.min, space.sample(0)):
        model.set_subnet("max")
        model.set_subnet(subnet)
        assert costs.costs(subnet) == counted(model.extract_subnet(), (size, size))
        assert CostModel(model, space).costs(subnet) == costs.costs(subnet)


def test_a_layer_that_is_computed_twice_or_never():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.idle = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 2, 3)

        def forward(self, x):
            return self.conv(self.conv(x))

    layers = [
        LayerShape("conv", 4, 4, True, positions=2 * 9, kernel_size=(3,), kernel="kernel:conv"),
        LayerShape("idle", 2, 4, True, positions=0, kernel_size=(3,)),
    ]
    space = SearchSpace([Choice("kernel", "conv", (3, 1))], layers)
    costs = CostModel(Twice(), space)
    assert [costs.macs(space.max), costs.macs(space.min)] == [2 * 9 * 4 * 4 * 3, 2 * 9 * 4 * 4]
    assert costs.parameters(space.min) == 4 * 4 + 4 + 2 * 4 * 3 + 2
    assert space.counted_per == "sample"


def test_transposed_convolutions_count_where_the_space_has_them():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.Conv2d(6, 2, 1))
    out = (Run(6, A, 6),)
    layers = [
        LayerShape(
            "0", 6, 4, True, out_runs=out, positions=5 * 7, kernel_size=(3, 3)
        ),  # the inputs, each goes to 3 x 3
        LayerShape("1", 2, 6, True, in_runs=out, positions=11 * 15, kernel_size=(1, 1)),
    ]
    space = SearchSpace([Choice("channels", "a", (6, 3))], layers)
    for subnet in space.subnets():
        a = subnet[A]
        assert CostModel(model, space).macs(subnet) == 35 * 4 * a * 9 + 165 * a * 2


# -- the space -------------------------------------------------------------------------------------------------------


def test_json_keeps_every_field():
    space = space_of(Sizes(), rank=2)
    again = SearchSpace.from_json(space.to_json())
    assert again == space and again.layers == space.layers
    assert again.to_json() == space.to_json()
    assert repr(again.layers) == repr(space.layers)


OLD_LAYER = {
    "name": "fc",
    "out_features": 12,
    "in_features": 8,
    "bias": True,
    "width": "mlp:0",
    "full_width": 4,
    "narrows": "in",
    "rank": None,
    "depth": ["depth:0"],
}


def test_files_of_before_load_and_are_written_as_before():
    choices = [
        {"kind": kind, "name": "0", "options": options, "modules": [], "unit_parameters": 0}
        for kind, options in (("mlp", [4, 3]), ("depth", [1, 0]))
    ]
    old = {"format": "peft-elastic/search-space", "version": 1, "choices": choices, "layers": [OLD_LAYER]}
    space = SearchSpace.from_json(json.dumps(old))
    assert space.layers == (LayerShape("fc", 12, 8, True, "mlp:0", 4, "in", None, ("depth:0",)),)
    assert json.loads(space.to_json()) == old
    assert space.layers[0].size({"mlp:0": 3, "depth:0": 1}) == (12, 6)
    assert space.layers[0].parameters({"mlp:0": 3, "depth:0": 1}) == 12 * 6 + 12
    assert space.layers[0].size({"mlp:0": 3, "depth:0": 0}) == (0, 0)
    assert space.counted_per == "token"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("positions", -1, "positions"),
        ("kernel_size", [0, 3], "kernel_size"),
        ("out_runs", [{"length": 12, "choice": None}], "lacks the field 'full'"),
        ("out_runs", [{"length": 11, "choice": None, "full": 1}], "`out_runs` of layer 'fc' must add up to its 12"),
        ("in_runs", [{"length": 8, "choice": "depth:0", "full": 1}], "must be empty where `width` narrows that side"),
        ("kernel", "depth:0", "`kernel_size` is empty"),
        ("buffers", 1.5, "buffers"),
        ("strides", 2, "unknown field 'strides'"),
    ],
)
def test_damaged_layers_are_refused(field, value, message):
    choices = [
        {"kind": kind, "name": "0", "options": options, "modules": [], "unit_parameters": 0}
        for kind, options in (("mlp", [4, 3]), ("depth", [1, 0]))
    ]
    data = {"format": "peft-elastic/search-space", "version": 1, "choices": choices}
    with pytest.raises(ValueError, match=message):
        SearchSpace.from_json(json.dumps({**data, "layers": [{**OLD_LAYER, field: value}]}))


@pytest.mark.parametrize("arguments", [(-1,), (1.0,), (4, A, 0), (True,)])
def test_runs_are_whole_numbers(arguments):
    with pytest.raises(ValueError, match="must be a whole number"):
        Run(*arguments)


def test_a_space_without_a_choice_of_a_run_is_refused():
    layers = [LayerShape("x", 4, 4, in_runs=(Run(4, "channels:gone", 4),), kernel_size=(1, 1))]
    with pytest.raises(ValueError, match=r"`layers` depend on \['channels:gone'\]"):
        SearchSpace([Choice("channels", "a", (2,))], layers)


@pytest.mark.parametrize("seed", range(3))
def test_expected_count_where_both_sides_depend_on_one_choice(seed):
    """The sampler's mean against the sum over all subnets."""
    sizes = Sizes(a=4, b=2, c=2, e=3, depthwise=3, tall=3)
    space = space_of(sizes)
    rng = np.random.default_rng(seed)
    odds = [rng.dirichlet(np.ones(len(choice.options))) for choice in space]
    mean = 0.0
    for indices in itertools.product(*(range(len(choice.options)) for choice in space)):
        subnet = space.decode(indices)
        mean += np.prod([p[i] for p, i in zip(odds, indices)]) * space.count_base_parameters(subnet)
    assert _expected_count(space, odds) == pytest.approx(mean, rel=1e-12)


def test_a_space_of_ranks_alone_is_one_whose_base_is_whole():
    space = space_of(Sizes(), rank=2)
    whole = [replace(c, options=c.options[:1]) if c.kind != "rank" else c for c in space]
    assert _only_ranks(SearchSpace(whole, space.layers))
    for i, choice in enumerate(whole):
        if choice.kind != "rank":
            changed = [*whole[:i], replace(choice, options=space.choices[i].options[-1:]), *whole[i + 1 :]]
            assert not _only_ranks(SearchSpace(changed, space.layers)), choice.key


# -- words -----------------------------------------------------------------------------------------------------------


def test_words_say_what_is_counted():
    space = space_of(Sizes())
    plain = SearchSpace([Choice("mlp", "0", (2, 1))])
    assert (space.counted_per, plain.counted_per) == ("image", "token")
    assert cost_in(plain, "macs").title == "MACs per token" and cost_in(space, "macs").axis == "MACs per image"
    assert cost_in(space, "bytes") == cost_in(plain, "bytes")
    costs = CostModel(Network(Sizes()), space)
    assert "MACs per image" in profile(space, {"max": costs.costs(space.max)}, {})
    parameters = sum(p.numel() for p in Network(Sizes()).parameters())
    assert describe_parameters(space, space.max) == f"{parameters:,d} of {parameters:,d} parameters in layers, 100.0%"


def test_the_axis_of_a_figure():
    points = [Point(1, 0.5, 10.0, True, ["max"])]
    picture = Picture(points, [(10.0, 0.5)], [0.0], "accuracy", True, "macs", ["accuracy", "macs"], "MACs per image")
    assert "MACs per image" in [axes.get_xlabel() for axes in draw(picture, None).axes]


# -- refusals --------------------------------------------------------------------------------------------------------


def changed(space: SearchSpace, of: str, **fields) -> SearchSpace:
    layers = [replace(layer, **fields) if layer.name == of else layer for layer in space.layers]
    assert layers != list(space.layers)
    return SearchSpace(space.choices, layers)


def without(space: SearchSpace, name: str) -> SearchSpace:
    return SearchSpace(space.choices, [layer for layer in space.layers if layer.name != name])


@pytest.mark.parametrize("name", ["fixed", "fixed_grouped", "head", "tokens"])
def test_a_layer_without_positions_is_refused(name):
    space = without(space_of(Sizes()), name)
    with pytest.raises(
        ValueError, match=f"no layer '{name}', a (Conv2d|Linear) of the model: it is unknown how often"
    ):
        CostModel(Network(Sizes()), space)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("norm", {"buffers": 1}, "'norm' with 8 numbers in buffers, in the model it has 16"),
        ("norm", {"per_output": 0}, "'norm' with 8 parameters, in the model it has 16"),
        ("norm", {"buffers": 0}, "not the buffer 'norm.running_mean'"),
        ("head", {"bias": False}, "'head' with 1440 parameters, in the model it has 1450"),
        ("stem", {"kernel_size": (3, 1)}, "'stem' with 144 parameters, in the model it has 432"),
        ("scale", {"name": "scales"}, "a layer 'scales', which the model does not have"),
    ],
)
def test_another_model_is_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        CostModel(Network(Sizes()), changed(space_of(Sizes()), name, **fields))


def test_more_refusals():
    sizes = Sizes()
    space, model = space_of(sizes), Network(sizes)
    with pytest.raises(ValueError, match="not the buffer 'block.depthwise_norm.running_var'"):
        CostModel(model, without(space, "block.depthwise_norm.running_var"))
    with pytest.raises(ValueError, match="not the buffer 'block.depthwise_norm.num_batches_tracked'"):
        CostModel(model, without(space, "block.depthwise_norm.num_batches_tracked"))
    with pytest.raises(
        ValueError, match="`sequence_length` must be None for a model whose MACs are counted per image"
    ):
        CostModel(model, space, sequence_length=4)
    with pytest.raises(ValueError, match=r"choices \['channels:more'\], on which none"):
        CostModel(model, SearchSpace([*space, Choice("channels", "more", (2, 1))], space.layers))
    with pytest.raises(
        ValueError, match=r"kind \['experts'\], the cost model knows rank, heads, mlp, channels, kernel, depth"
    ):
        CostModel(model, SearchSpace([*space, Choice("experts", "a", (2, 1))], space.layers))
    with_rank = SearchSpace([*space, Choice("rank", "grouped", (2, 1), ("grouped",), 8 * 9 + 8)], space.layers)
    with pytest.raises(ValueError, match="choice 'rank:grouped' of adapters with 80 parameters .* its layers have 0"):
        CostModel(model, with_rank)
    model.block.depthwise_norm.weight = model.block.expand_norm.weight
    with pytest.raises(ValueError, match="'block.expand_norm.weight' is 'block.depthwise_norm.weight' too"):
        CostModel(model, space)


def test_no_latency_is_predicted():
    sizes = Sizes()
    space, model = space_of(sizes), Network(sizes)
    with pytest.raises(ValueError, match="`model` has choices of kind 'channels', whose latency is not predicted"):
        LatencyModel.of_space(model, space, lambda subnet: None, {"x": torch.zeros(1, 3, *sizes.image)})
    fixed = SearchSpace([c for c in space if c.kind == "depth"], [replace(space.layers[0], depth=(DEPTH,))])
    with pytest.raises(ValueError, match="`model` is one of convolutions .* whose latency is not predicted"):
        LatencyModel.of_space(model, fixed, lambda subnet: None, {"x": torch.zeros(1, 3, *sizes.image)})


def test_a_name_that_others_end_with_is_found():
    """In a wrapper, layers deeper in the model end with the name of one at the top."""
    inner = nn.ModuleDict({"inner": nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3)}), "conv": nn.Conv2d(3, 4, 1)})
    layers = [
        LayerShape("inner.conv", 5, 3, True, positions=2, kernel_size=(3, 3)),
        LayerShape("conv", 4, 3, True, out_runs=(Run(4, A, 4),), positions=7, kernel_size=(1, 1)),
    ]
    space = SearchSpace([Choice("channels", "a", (4, 1))], layers)
    wrapped = nn.ModuleDict({"model": inner})
    for subnet in space.subnets():
        expected = 2 * 5 * 3 * 9 + 7 * subnet[A] * 3
        assert [CostModel(m, space).macs(subnet) for m in (inner, wrapped)] == [expected, expected]


def test_fields_are_those_of_before_in_their_places():
    assert list(asdict(LayerShape("x", 1, 1)))[:9] == list(OLD_LAYER)
