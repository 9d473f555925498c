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
"""BatchNorm in a network of which a part is active."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peft_elastic.layers.batch_norm import NarrowedBatchNorm, set_norm_narrowed


KINDS = [
    (nn.BatchNorm1d, (6, 7)),
    (nn.BatchNorm1d, (4, 7, 5)),
    (nn.BatchNorm2d, (4, 7, 3, 5)),
    (nn.BatchNorm3d, (2, 7, 3, 2, 2)),
]
RUNS = [((0, 4),), ((2, 5),), ((0, 2), (3, 4), (6, 7)), None]


def norm(cls, seed=0, **kwargs):
    torch.manual_seed(seed)
    layer = cls(7, **kwargs)
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        if tensor is not None:
            nn.init.normal_(tensor)
    if layer.running_var is not None:
        layer.running_var.uniform_(0.5, 2)
    return layer


def channels(runs):
    return torch.tensor([i for start, stop in runs or ((0, 7),) for i in range(start, stop)])


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracks", [True, False])
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize(("cls", "shape"), KINDS)
def test_outputs_are_those_of_the_active_channels(cls, shape, runs, tracks, affine):
    layer = norm(cls, affine=affine, track_running_stats=tracks)
    kept, x = channels(runs), torch.randn(shape)
    x = x[:, kept]
    whole = {name: value.clone() for name, value in layer.state_dict().items()}
    weight, bias = (None if value is None else value[kept].double() for value in (layer.weight, layer.bias))
    mean, variance = (None if not tracks else whole[f"running_{name}"][kept].double() for name in ("mean", "var"))
    set_norm_narrowed(layer, runs, False)
    assert layer.num_features == len(kept) and f"active={len(kept)}" in repr(layer)
    for training in (True, False):
        layer.train(training)
        by_batch = training or not tracks
        expected = F.batch_norm(
            x.double(),
            None if by_batch else mean,
            None if by_batch else variance,
            weight,
            bias,
            by_batch,
            0.0,
            layer.eps,
        )
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    statistics = torch.randn(len(kept)), torch.rand(len(kept)) + 0.5
    layer.__dict__["statistics"] = statistics
    if tracks:
        expected = F.batch_norm(x.double(), *(t.double() for t in statistics), weight, bias, False, 0.0, layer.eps)
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer.get_buffer("running_mean"), whole["running_mean"])
    state = layer.state_dict()
    assert state.keys() == whole.keys() and all(torch.equal(state[name], whole[name]) for name in whole)
    set_norm_narrowed(layer, None, True)
    assert type(layer) is cls and layer.num_features == 7 and not {"statistics", "active_out"} & layer.__dict__.keys()


def test_running_statistics_stay_in_training_and_move_again_when_whole():
    layer, x = norm(nn.BatchNorm2d), torch.randn(4, 7, 3, 3)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    for runs in RUNS:
        set_norm_narrowed(layer, runs, False)
        layer.train()(x[:, channels(runs)]).sum().backward()
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    assert layer.get_parameter("weight").grad.shape == (7,)
    set_norm_narrowed(layer, None, True)
    layer(x)
    assert layer.num_batches_tracked == 1 and not torch.equal(layer.running_mean, before["running_mean"])


def test_gradients_reach_the_active_channels_alone():
    layer = norm(nn.BatchNorm1d)
    set_norm_narrowed(layer, ((1, 3), (6, 7)), False)
    layer(torch.randn(5, 3)).pow(3).sum().backward()
    for name in ("weight", "bias"):
        moved = layer.get_parameter(name).grad != 0
        assert moved.tolist() == [False, True, True, False, False, False, True], name


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("runs", RUNS)
def test_copies(runs, copied):
    layer = norm(nn.BatchNorm2d).eval()
    set_norm_narrowed(layer, runs, False)
    count = len(channels(runs))
    layer.__dict__["statistics"] = torch.randn(count), torch.rand(count) + 0.5
    x = torch.randn(2, count, 3, 3)
    twin = copied(layer)
    assert isinstance(twin, NarrowedBatchNorm) and type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x)) and twin.get_parameter("weight").shape == (7,)
    assert twin.get_parameter("weight").data_ptr() != layer.get_parameter("weight").data_ptr()
    set_norm_narrowed(twin, None, True)
    assert type(twin) is nn.BatchNorm2d and torch.equal(twin.running_var, layer.get_buffer("running_var"))


def test_moved_and_cast_with_its_statistics():
    layer = norm(nn.BatchNorm2d).eval()
    set_norm_narrowed(layer, ((0, 3),), False)
    layer.__dict__["statistics"] = torch.randn(3), torch.rand(3) + 0.5
    layer.double()
    assert [tensor.dtype for tensor in layer.__dict__["statistics"]] == [torch.float64] * 2
    assert layer(torch.randn(2, 3, 2, 2).double()).dtype == torch.float64


@pytest.mark.parametrize("training", [True, False])
def test_compiled_and_exported(training):
    layer = norm(nn.BatchNorm2d).train(training)
    set_norm_narrowed(layer, ((0, 2), (3, 5)), False)
    layer.__dict__["statistics"] = torch.randn(4), torch.rand(4) + 0.5
    x = torch.randn(3, 4, 2, 2)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-6, atol=1e-6)
    if not training:
        exported = torch.export.export(nn.Sequential(layer), (x,)).module()
        torch.testing.assert_close(exported(x), layer(x), rtol=1e-6, atol=1e-6)


class WithActivation(nn.BatchNorm2d):
    """As in timm: a forward of its own, which a narrowed class would leave out."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Renamed(nn.BatchNorm2d):
    """Nothing of its own."""


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.SyncBatchNorm(7), r"layer 'a.b' \(SyncBatchNorm\) cannot be narrowed: it averages over processes"),
        (WithActivation(7), r"layer 'a.b' \(WithActivation\) cannot be narrowed: it has a forward of its own"),
        (nn.LazyBatchNorm2d(), r"layer 'a.b' \(LazyBatchNorm2d\) cannot be narrowed: it has not seen any input"),
        (nn.InstanceNorm2d(7), r"layer 'a.b' \(InstanceNorm2d\) cannot be narrowed: it is no nn.BatchNorm"),
        (nn.GroupNorm(7, 7), r"layer 'a.b' \(GroupNorm\) cannot be narrowed: it is no nn.BatchNorm"),
    ],
)
def test_what_cannot_be_narrowed_is_named(layer, message):
    cls = type(layer)
    with pytest.raises(ValueError, match=message):
        set_norm_narrowed(layer, None, False, "a.b")
    assert type(layer) is cls
    set_norm_narrowed(layer, None, True, "a.b")
    assert type(layer) is cls


def test_a_subclass_that_adds_nothing_can_be_narrowed():
    layer = Renamed(7)
    set_norm_narrowed(layer, ((0, 2),), False)
    assert layer(torch.randn(3, 2, 2, 2)).shape[1] == 2
    set_norm_narrowed(layer, None, True)
    assert type(layer) is Renamed


@pytest.mark.parametrize("runs", [(), ((0, 8),), ((3, 3),), ((4, 2),), ((2, 4), (3, 5)), ((-1, 2),), ((3, 5), (0, 2))])
def test_ranges_that_are_none(runs):
    layer = nn.BatchNorm2d(7)
    set_norm_narrowed(layer, ((0, 3),), False)
    layer.__dict__["statistics"] = statistics = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="`ranges` must be ascending runs .* from 0 to 7, or None"):
        set_norm_narrowed(layer, runs, False)
    with pytest.raises(ValueError, match="`ranges` must be None where `whole` is True"):
        set_norm_narrowed(layer, ((0, 3),), True)
    assert layer.num_features == 3 and layer.__dict__["statistics"] is statistics


def test_wrong_input_is_refused_as_by_the_plain_class():
    layer = nn.BatchNorm2d(7)
    set_norm_narrowed(layer, ((0, 3),), False)
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.randn(2, 3))
