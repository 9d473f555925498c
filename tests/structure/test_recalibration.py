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
"""Statistics of BatchNorm for each subnet: what they are, what they depend on, and what stays."""

import copy
import multiprocessing
import os
import pickle

import numpy as np
import pytest
import torch
from support.normed_net import NormedNet, images, reference
from torch import nn

from peft_elastic import ElasticConfig, get_elastic_model
from peft_elastic.common import ranks
from peft_elastic.layers.batch_norm import set_norm_narrowed
from peft_elastic.structure.recalibration import BatchNormRecalibration, recalibrate_batch_norm


SMALL, MIDDLE = (4, 6), (8, 4)


def outputs(model, seed=5):
    with torch.no_grad():
        return model(images((9,), seed)[0])


def buffers(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(state, model):
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("widths", [SMALL, MIDDLE, (4, 4)])
@pytest.mark.parametrize("seed", [0, 3])
def test_averages_are_those_of_the_definition_in_float64(widths, seed):
    model, batches = NormedNet(seed), images((7, 4, 5, 2), seed + 1)
    model.set_subnet(model.subnet(*widths))
    recalibrate_batch_norm(model, batches)
    for name, (mean, variance) in reference(model, batches).items():
        found = model.norms()[name].__dict__["statistics"]
        assert found[0].dtype == torch.float32 and len(found[0]) == len(mean)
        np.testing.assert_allclose(found[0].numpy(), mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found[1].numpy(), variance, rtol=1e-5, atol=1e-5)


def test_batches_of_unequal_size_count_by_their_samples():
    model, (one, two, _) = NormedNet(), images((8, 2, 1))
    model.set_subnet(model.subnet(*SMALL))
    parts = []
    for batches in ([one], [two], [one, two]):
        recalibrate_batch_norm(model, batches)
        parts.append([tensor.double() for tensor in model.first.__dict__["statistics"]])
    for first, second, both in zip(*parts):
        torch.testing.assert_close(both, (8 * first + 2 * second) / 10, rtol=1e-6, atol=1e-6)
        assert (both - (first + second) / 2).abs().max() > 1e-2


def test_order_of_evaluation_changes_no_bit_and_the_models_own_statistics_stay():
    """Mistake 1: the statistics of the subnet before were in those of the next."""
    orders = [[SMALL, MIDDLE, (8, 8), (4, 4)], [(4, 4), (8, 8), SMALL, MIDDLE, SMALL], [SMALL], [MIDDLE, (4, 4)]]
    seen = {}
    for order in orders:
        model, prepare = NormedNet(), BatchNormRecalibration(images())
        before, largest = buffers(model), outputs(model)
        for widths in order:
            model.set_subnet(model.subnet(*widths))
            prepare(model)
            result = outputs(model)
            assert torch.equal(result, seen.setdefault(widths, result))
            assert_same(before, model)
        model.set_subnet("max")
        assert torch.equal(outputs(model), largest)
        assert all(type(norm) is nn.BatchNorm2d for norm in model.norms().values())
    assert len(seen) == 4 and not torch.equal(seen[SMALL], seen[MIDDLE])


def test_batch_norm_alone_is_in_training_mode():
    """Mistake 2: in evaluation mode nothing is adapted, in training mode dropout distorts it. The modes are as before afterwards."""
    statistics = []
    for training in (False, True):
        model = NormedNet()
        model.set_subnet(model.subnet(*SMALL))
        own = [norm.running_mean.clone() for norm in model.norms().values()]
        for module in model.modules():
            module.training = training
        model.second.training = not training
        modes = [module.training for module in model.modules()]
        seen = []
        model.dropout.register_forward_hook(lambda module, args, output: seen.append(torch.equal(args[0], output)))
        torch.manual_seed(int(training))
        recalibrate_batch_norm(model, images())
        assert seen == [True] * 6
        assert [module.training for module in model.modules()] == modes
        statistics.append([norm.__dict__["statistics"] for norm in model.norms().values()])
        assert all((found[0] - mean).abs().max() > 0.05 for found, mean in zip(statistics[-1], own))
        assert not any(tensor.requires_grad for found in statistics[-1] for tensor in found)
    assert all(torch.equal(a, b) for one, two in zip(*statistics) for a, b in zip(one, two))


def test_evaluation_uses_them_until_another_subnet_is_active():
    model = NormedNet()
    model.set_subnet(model.subnet(*SMALL))
    without = outputs(model)
    recalibrate_batch_norm(model, images())
    assert (outputs(model) - without).abs().max() > 1e-2
    model.set_subnet(model.subnet(*MIDDLE))
    assert not any("statistics" in norm.__dict__ for norm in model.norms().values())
    model.set_subnet(model.subnet(*SMALL))
    assert torch.equal(outputs(model), without)


def test_nothing_is_done_for_the_largest_subnet_or_without_batch_norm():
    prepare = BatchNormRecalibration(images())
    model = NormedNet()
    before = buffers(model)
    model.forward = None  # not to be called
    prepare(model)
    assert_same(before, model)
    prepare(nn.Linear(3, 3))


class Calls:
    """How often a model was run."""

    def __init__(self, model):
        self.number = 0
        model.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.number += 1


def prepared(model, prepare, widths):
    model.set_subnet(model.subnet(*widths))
    prepare(model)
    return [tensor.clone() for norm in model.norms().values() for tensor in norm.__dict__["statistics"]]


@pytest.mark.parametrize("change", ["step", "data", "replaced", "loaded"])
def test_statistics_are_kept_as_long_as_no_weight_has_changed(change):
    model, prepare = NormedNet(), BatchNormRecalibration(images())
    calls = Calls(model)
    before = prepared(model, prepare, SMALL)
    prepared(model, prepare, MIDDLE)
    assert calls.number == 6
    again = prepared(model, prepare, SMALL)
    assert calls.number == 6 and all(map(torch.equal, before, again))
    weight = model.conv1.weight
    if change == "step":
        weight.grad = torch.ones_like(weight)
        torch.optim.SGD([weight], lr=0.1).step()
    elif change == "data":
        weight.data = weight.data * 1.5
    elif change == "replaced":
        model.conv1.weight = nn.Parameter(weight.detach() * 1.5)
    else:
        model.load_state_dict(
            {name: value * 1.5 for name, value in model.state_dict().items() if "num_" not in name}, strict=False
        )
    after = prepared(model, prepare, SMALL)
    assert calls.number == 9 and not torch.equal(before[0], after[0])
    fresh = BatchNormRecalibration(images())
    assert all(map(torch.equal, after, prepared(model, fresh, SMALL)))


def test_the_cache_is_bounded(monkeypatch):
    monkeypatch.setattr("peft_elastic.structure.recalibration._KEPT", 2)
    model, prepare = NormedNet(), BatchNormRecalibration(images())
    calls = Calls(model)
    for widths, number in [(SMALL, 3), (MIDDLE, 6), (SMALL, 6), ((4, 4), 9), (SMALL, 9), (MIDDLE, 12)]:
        prepared(model, prepare, widths)
        assert calls.number == number, widths


def test_two_models_and_copies_of_one_do_not_share():
    one, prepare = NormedNet(0), BatchNormRecalibration(images())
    first = prepared(one, prepare, SMALL)
    other = prepared(NormedNet(1), prepare, SMALL)
    assert not torch.equal(first[0], other[0])
    twin = copy.deepcopy(one)
    twin.__dict__["_peft_elastic_host"] = twin
    assert all(map(torch.equal, first, prepared(twin, prepare, SMALL)))


def test_pickled_without_what_it_has_kept():
    model, prepare = NormedNet(), BatchNormRecalibration(images(), max_samples=9)
    expected = prepared(model, prepare, SMALL)
    data = pickle.dumps(prepare)
    twin = pickle.loads(data)
    assert len(data) == len(pickle.dumps(BatchNormRecalibration(images(), max_samples=9)))
    assert twin.fingerprint == prepare.fingerprint
    assert all(map(torch.equal, expected, prepared(NormedNet(), twin, SMALL)))


def test_fingerprint_is_that_of_the_images():
    labels = torch.zeros(7, dtype=torch.long)
    prints = [
        BatchNormRecalibration(*arguments).fingerprint
        for arguments in [
            (images(),),
            (images(seed=2),),
            (images(), 11),
            ([{"pixel_values": batch} for batch in images()],),
            (images()[::-1],),
        ]
    ]
    assert len(set(prints)) == len(prints)
    one = images((7,))[0]
    assert BatchNormRecalibration([one]).fingerprint == BatchNormRecalibration([(one, labels)]).fingerprint


class ByName(NormedNet):
    """Called as models of transformers are."""

    def forward(self, pixel_values):
        return super().forward(pixel_values)


def test_kinds_of_batches_and_max_samples():
    def found(batches, model=None, **arguments):
        return prepared(model or NormedNet(), BatchNormRecalibration(batches, **arguments), SMALL)

    batches = images()
    expected = found(batches)
    labelled = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in batches]
    assert all(map(torch.equal, expected, found(labelled)))
    assert all(map(torch.equal, expected, found(iter(batches))))
    named = [{"pixel_values": x, "labels": y} for x, y in labelled]
    assert all(map(torch.equal, expected, found(named, ByName())))
    short = found([batches[0], batches[1][:2]])
    assert all(map(torch.equal, short, found(batches, max_samples=9)))
    assert all(map(torch.equal, short, found(labelled, max_samples=9)))
    assert not torch.equal(short[0], expected[0])


@pytest.mark.parametrize(
    ("batches", "arguments", "message"),
    [
        ([], {}, "`batches` must have at least one sample"),
        ([torch.zeros(0, 3, 6, 6)], {}, "`batches` must have at least one sample"),
        (None, {}, "`batches` must be an iterable"),
        (3, {}, "`batches` must be an iterable of batches of images, got 3"),
        (["image.png"], {}, "`batches` must be a tensor"),
        ([{"labels": torch.zeros(3)}], {}, "`batches`: batch 0 holds labels alone"),
        (images(), {"max_samples": 0}, "`max_samples` must be"),
    ],
)
def test_bad_batches_are_refused_at_once(batches, arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchNormRecalibration(batches, **arguments)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([torch.zeros(4, 2, 6, 6)], r"`batches`: the model does not take a batch with the shapes \[\(4, 2, 6, 6\)\]"),
        ([torch.full((4, 3, 6, 6), float("nan"))], "`batches`: the statistics of 'first' are not finite"),
    ],
)
def test_data_that_does_not_fit_leaves_the_layers_as_they_were(batches, message):
    model = NormedNet()
    model.set_subnet(model.subnet(*SMALL))
    recalibrate_batch_norm(model, images())
    before = outputs(model)
    model.train()
    with pytest.raises(ValueError, match=message):
        recalibrate_batch_norm(model, batches)
    assert all(module.training for module in model.modules())
    assert torch.equal(outputs(model.eval()), before)
    assert not any("sums" in norm.__dict__ for norm in model.norms().values())


class FrozenBatchNorm2d(nn.Module):
    """As that of torchvision."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))


def test_a_batch_norm_that_keeps_the_statistics_of_the_whole_model_is_named():
    model = NormedNet()
    model.frozen = FrozenBatchNorm2d(3)
    recalibrate_batch_norm(model, images())  # all of the model is active
    model.set_subnet(model.subnet(*SMALL))
    with pytest.raises(
        ValueError, match="`model` is narrowed, but layer 'frozen' .FrozenBatchNorm2d. has the statistics of"
    ):
        recalibrate_batch_norm(model, images())


def test_layer_that_is_not_reached_takes_its_own():
    model = NormedNet()
    model.aside = nn.BatchNorm1d(4)
    model.aside.running_mean += torch.arange(4)
    model.set_subnet(model.subnet(*SMALL))
    set_norm_narrowed(model.aside, ((1, 3),), False)
    recalibrate_batch_norm(model, images())
    assert model.aside.__dict__["statistics"][0].tolist() == [1, 2]


class Plain(nn.Module):
    """A convolutional network that knows nothing of this package."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(24, 4)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.head(self.dropout(x.mean((2, 3))))


def test_traced_model_is_extracted_with_the_statistics_of_its_subnet():
    model = get_elastic_model(
        Plain().eval(), ElasticConfig(elastic_width={"channels": [1.0, 0.5]}), example_inputs=images()[0]
    )
    model.sort_by_importance()
    state = buffers(model)
    model.set_subnet("min")
    without = outputs(model)
    BatchNormRecalibration(images())(model)
    found = outputs(model)
    assert (found - without).abs().max() > 1e-2
    small = model.extract_subnet().eval()
    assert type(small.norm1) is nn.BatchNorm2d and small.norm1.running_mean.shape == (8,)
    torch.testing.assert_close(outputs(small), found, rtol=1e-5, atol=1e-5)
    # the same by hand, by the ordinary network, whose layers move on to the statistics of each batch
    theirs = {model.norm1: small.norm1, model.norm2: small.norm2}
    for norm in theirs.values():
        norm.momentum = 1.0
        norm.train()
    sums = dict.fromkeys(theirs, 0)
    for batch in images():
        small(batch)
        sums = {norm: total + len(batch) * theirs[norm].running_var.double() for norm, total in sums.items()}
    for norm, total in sums.items():
        variance = norm.__dict__["statistics"][1].double()
        torch.testing.assert_close(variance, total / sum(map(len, images())), rtol=1e-5, atol=1e-5)
    assert_same(state, model)


def test_compiled_model():
    model = NormedNet()
    model.set_subnet(model.subnet(*SMALL))
    compiled = torch.compile(model, backend="eager")
    recalibrate_batch_norm(compiled, images())
    expected = NormedNet()
    expected.set_subnet(expected.subnet(*SMALL))
    recalibrate_batch_norm(expected, images())
    torch.testing.assert_close(outputs(compiled), outputs(expected), rtol=1e-6, atol=1e-6)


# -- processes ---------------------------------------------------------------------------------------------------------


def in_process(rank, folder, action):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    reductions = []
    reduce = torch.distributed.all_reduce
    torch.distributed.all_reduce = lambda tensor, **kwargs: (reductions.append(len(tensor)), reduce(tensor, **kwargs))
    try:
        outcome = action(rank)
    except ValueError as error:
        outcome = str(error)
    (folder / f"{rank}").write_bytes(pickle.dumps((outcome, reductions)))
    torch.distributed.barrier()
    os._exit(0)


def in_two(folder, action):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=in_process, args=(rank, folder, action)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [pickle.loads((folder / f"{rank}").read_bytes()) for rank in (0, 1)]


def share(rank, wrapped=False):
    model = NormedNet()
    model.set_subnet(model.subnet(*SMALL))
    # unequal shares: two batches and one
    mine = images()[:2] if rank == 0 else images()[2:]
    if wrapped:
        wrapper = nn.parallel.DistributedDataParallel(model)
        # its own call would send all buffers round, once for each batch, of which the others have another number
        calls = Calls(wrapper)
        recalibrate_batch_norm(wrapper, mine)
        assert calls.number == 0
    else:
        recalibrate_batch_norm(model, mine)
    return [tensor for norm in model.norms().values() for tensor in norm.__dict__["statistics"]]


def share_wrapped(rank):
    return share(rank, wrapped=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("action", [share, share_wrapped])
def test_two_processes_with_a_share_each_in_one_reduction(tmp_path, action):
    (first, reductions), (second, others) = in_two(tmp_path, action)
    alone = prepared(NormedNet(), BatchNormRecalibration(images()), SMALL)
    assert reductions == others and len(reductions) == 1
    assert all(map(torch.equal, first, second))
    for found, expected in zip(first, alone):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def one_fails(rank):
    model = NormedNet()
    model.set_subnet(model.subnet(*SMALL))
    recalibrate_batch_norm(model, images() if rank else [torch.zeros(4, 2, 6, 6)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_nobody_waits_for_a_process_that_has_failed(tmp_path):
    (first, _), (second, _) = in_two(tmp_path, one_fails)
    assert "does not take a batch with the shapes" in first and "has failed in another process" in second


def alone_in_two(rank):
    with ranks.apart():
        assert not ranks.are_together()
        found = prepared(NormedNet(), BatchNormRecalibration(images()), SMALL if rank else MIDDLE)
    assert ranks.are_together()
    return found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_work_apart_do_not_reduce(tmp_path):
    outcomes = in_two(tmp_path, alone_in_two)
    for (found, reductions), widths in zip(outcomes, (MIDDLE, SMALL)):
        assert reductions == []
        assert all(map(torch.equal, found, prepared(NormedNet(), BatchNormRecalibration(images()), widths)))
