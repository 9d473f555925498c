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
"""The latency model, on tiny models that are really timed."""

import json
import statistics

import numpy as np
import pytest
import torch
from peft import get_peft_model
from support.elastic_net import ElasticNet, search, value_of
from support.models import tiny_llama
from support.narrow_llama import NarrowLlama, extract
from torch import nn

from peft_elastic import ElasticLoraConfig, LatencyModel, QuantizedLinear, SearchResult, SparseQALoraConfig
from peft_elastic.cost import timing
from peft_elastic.cost.latency import LatencyReport, _features, _non_negative_least_squares
from peft_elastic.layers import ops
from peft_elastic.quantization import fit_grid
from peft_elastic.supernet import Subnet


INPUTS = {"input_ids": (2, 24)}


def base():
    return tiny_llama(num_hidden_layers=4)


@pytest.fixture(scope="module")
def timings(tmp_path_factory):
    """A file of timings of its own, and shorter ones."""
    file = tmp_path_factory.mktemp("timings") / "kernel_timings.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "timings_file", lambda: file)
        patch.setattr(timing, "_known", None)
        patch.setattr(timing, "_SECONDS", 0.02)
        patch.setattr(timing, "_MAX_COPIES_BYTES", 2**22)
        yield file


@pytest.fixture(scope="module")
def host(timings):
    return NarrowLlama(base()).eval()


@pytest.fixture(scope="module")
def latency(host):
    return LatencyModel(host, INPUTS, seconds=0.5)


@pytest.mark.parametrize("mode", ["forward", "decode"])
def test_predictions_are_near_what_is_measured(host, timings, mode):
    model = LatencyModel(host, INPUTS, mode=mode, seconds=0.5)
    space = model.space
    report = model.validate([space.max, space.heuristic], lambda subnet: extract(space, subnet, base()), seconds=0.2)
    # a tiny model takes a millisecond, nearly all of it Python, on a machine that others use too
    assert all(-0.6 < error < 1.5 for error in report.errors), str(report)


def test_depth_and_width_never_cost_less(latency):
    space = latency.space
    for seed in range(20):
        subnet = space.sample(seed)
        for choice in space:
            if choice.kind == "depth":
                on, off = ({**subnet, choice.key: value} for value in (1, 0))
                assert latency.predict(on) > latency.predict(off)
    assert (
        latency.predict("max") > latency.predict({**space.max, **{c.key: 0 for c in space if c.kind == "depth"}}) > 0
    )


def test_rank_does_not_change_it(latency):
    space = latency.space
    ranks = {c.key: c.options[-1] for c in space if c.kind == "rank"}
    assert latency.predict({**space.max, **ranks}) == latency.predict("max")


def test_the_model_is_left_as_it_was(host, timings):
    host.train()
    host.set_subnet("heuristic")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.modules()]
    LatencyModel(host, INPUTS, seconds=0)
    assert host.active_subnet == host.search_space.heuristic and all(m.training for m in host.modules())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.modules()] == hooks
    host.eval()


def test_shapes_are_timed_once_for_a_machine(host, timings, latency, monkeypatch):
    entries = [json.loads(key) for key in json.loads(timings.read_text())]
    shapes = {tuple(entry[entry.index("dense") + 1 :]) for entry in entries if "dense" in entry}
    # q_proj of 4 and 2 heads, down_proj of 48, 32 and 16 channels, the output embedding; 48 rows
    for size in ((32, 32), (16, 32), (32, 48), (32, 32), (32, 16), (96, 32)):
        assert (*size, False, 48, "float32") in shapes
    monkeypatch.setattr(timing, "_time_dense", lambda layers: pytest.fail("timed again"))
    monkeypatch.setattr(timing, "_known", None)  # as in a new process
    again = LatencyModel(host, INPUTS, seconds=0)
    assert again._layers == latency._layers and again._fixed == latency._fixed


def test_rows_bias_and_dtype_are_timed_apart(timings):
    layer = timing.DenseLayer(64, 128, False, 1, torch.float32)
    others = [layer, layer._replace(rows=64), layer._replace(bias=True), layer._replace(dtype=torch.bfloat16)]
    seconds = timing.measure_dense(others)
    assert set(seconds) == set(others) and all(value > 0 for value in seconds.values())
    large = timing.measure_dense([layer, big := timing.DenseLayer(1024, 1024, False, 64, torch.float32)])
    assert large[layer] == seconds[layer] and large[big] > 5 * seconds[layer]


# -- sparse and quantised ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not ops.is_available(), reason="needs the C++ extension")
def test_layers_whose_zeros_survive_are_timed_with_the_kernel(timings):
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    torch.manual_seed(0)
    for name, module in model.named_modules():
        if name.endswith(("up_proj", "down_proj")):
            module.weight.data *= torch.rand_like(module.weight) > 0.6
    peft = get_peft_model(model, SparseQALoraConfig(r=4, elastic_ranks=[4, 2], target_modules=["up_proj", "q_proj"]))
    predictions = {k: LatencyModel(peft, INPUTS, kernel=k, seconds=0) for k in ("dense", "sparse", "auto")}
    entries = [json.loads(key) for key in json.loads(timings.read_text())]
    sparse = {tuple(e[e.index("bf16") - 3 : e.index("bf16")]) for e in entries if "bf16" in e}
    assert sparse == {(96, 64, 0.6), (64, 96, 0.6)}
    dense, kernel = predictions["dense"]._fixed, predictions["sparse"]._fixed
    per_layer = {
        shape: (
            timing.measure_dense([d := timing.DenseLayer(*shape, False, 48, torch.float32)])[d],
            timing.measure(*shape, 0.6, "bf16", torch.float32, None, 48).sparse,
        )
        for shape in ((96, 64), (64, 96))
    }
    difference = sum(2 * (b - a) for a, b in per_layer.values())  # two blocks
    assert kernel - dense == pytest.approx(difference, rel=1e-6, abs=1e-9)
    assert all(prediction.predict("max") > 0 for prediction in predictions.values())


@pytest.mark.skipif(not ops.is_available(), reason="needs the C++ extension")
def test_quantized_layers_become_int4(timings):
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    linear = model.model.layers[0].mlp.up_proj
    grid = fit_grid(linear.weight.detach(), bits=4, group_size=32, symmetric=False)
    model.model.layers[0].mlp.up_proj = QuantizedLinear.from_linear(linear, grid)
    peft = get_peft_model(model, ElasticLoraConfig(r=4, elastic_ranks=[4, 2], target_modules=["q_proj"]))
    LatencyModel(peft, INPUTS, kernel="sparse", seconds=0)
    entries = [json.loads(key) for key in json.loads(timings.read_text())]
    assert any(e[-7:] == [96, 64, 0.5, "int4 dense", "float32", 32, "48 rows"] for e in entries)


# -- in a search -------------------------------------------------------------------------------------------------------


def test_search_for_latency_under_a_bound(host, latency, tmp_path):
    seen = []
    result = search(
        host,
        lambda m: seen.append(m.active_subnet) or value_of(m),
        objectives=("accuracy", "latency"),
        latency=latency,
        max_latency="70%",
        n_evals=24,
        save_dir=tmp_path,
    )
    bound = 0.7 * latency.predict("max")
    assert result.constraints == {"latency": pytest.approx(bound)} and result.cost == "latency"
    assert [e.metrics["latency"] for e in result.history] == [latency.predict(subnet) for subnet in seen]
    assert all(e.metrics["latency"] <= bound * (1 + 1e-9) for e in result.history[3:])
    assert latency.predict(result.best()) <= bound * (1 + 1e-9) < result.history[0].metrics["latency"]
    assert result.plot().axes[1].get_xlabel() == "latency (s)"
    assert SearchResult.load(tmp_path) == result
    with pytest.raises(ValueError, match="no subnet keeps the bound '1%' on 'latency'"):
        search(host, value_of, latency=latency, max_latency="1%")


def test_a_search_goes_on_with_the_latencies_it_began_with(host, latency, tmp_path):
    settings = {"objectives": ("accuracy", "latency"), "constraints": {"latency": "60%"}, "save_dir": tmp_path}
    first = search(host, value_of, latency=latency, n_evals=9, **settings)
    measured_again = LatencyModel(host, INPUTS, seconds=0)
    measured_again._rest = [2 * value for value in measured_again._rest]  # a busier machine
    assert measured_again.predict("max") != latency.predict("max")
    longer = search(host, value_of, latency=measured_again, n_evals=20, **settings)
    assert longer.history[:9] == first.history
    assert longer == search(host, value_of, latency=latency, n_evals=20, **{**settings, "save_dir": None})
    decode = LatencyModel(host, {"input_ids": (1, 8)}, seconds=0)
    with pytest.raises(ValueError, match="latency is .* there"):
        search(host, value_of, latency=decode, n_evals=20, **settings)
    (tmp_path / "latency.json").write_text("{}")
    with pytest.raises(ValueError, match=r"latency\.json.*does not hold the measurements"):
        search(host, value_of, latency=latency, n_evals=20, **settings)


def test_latency_of_another_space_is_refused(latency):
    with pytest.raises(ValueError, match="`latency` was measured for another search space"):
        search(ElasticNet(), latency=latency)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"inputs": {}}, "`inputs` must be a dict"),
        ({"inputs": (1, 128)}, "`inputs` must be a dict"),
        ({"inputs": {"input_ids": "text"}}, r"`inputs\['input_ids'\]` must be a tensor"),
        ({"inputs": {"input_ids": (1, 0)}}, r"`inputs\['input_ids'\]`"),
        ({"mode": "prefill"}, "`mode` must be 'forward' or 'decode', got 'prefill'"),
        ({"mode": "decode", "inputs": {"inputs_embeds": torch.zeros(1, 2, 32)}}, "needs 'input_ids'"),
        ({"kernel": "fast"}, "`kernel` must be 'auto', 'dense' or 'sparse', got 'fast'"),
        ({"sparse_dtype": "fp8"}, "`sparse_dtype` must be 'bf16' or 'int8', got 'fp8'"),
        ({"seconds": -1}, "`seconds`.*-1"),
        ({"model": nn.Linear(2, 2)}, "no elastic adapter"),
    ],
)
def test_arguments_are_checked(host, kwargs, message):
    with pytest.raises(ValueError, match=message):
        LatencyModel(**{"model": host, "inputs": INPUTS, **kwargs})


def test_packed_weights_of_other_libraries_are_refused():
    host = NarrowLlama()
    packed = nn.Module()
    packed.in_features, packed.out_features = 32, 96
    host.model.lm_head = packed
    with pytest.raises(ValueError, match="packed weights .*lm_head"):
        LatencyModel(host, INPUTS)


def test_validate_checks_its_arguments(latency):
    with pytest.raises(ValueError, match="`subnets` is empty"):
        latency.validate([], lambda subnet: None)
    with pytest.raises(ValueError, match="does not belong"):
        latency.predict({"rank:a": 1})


def test_report():
    subnets = (Subnet({"a": 1}), Subnet({"a": 2}), Subnet({"a": 3}))
    report = LatencyReport(subnets, (0.011, 0.019, 0.03), (0.010, 0.020, 0.03))
    assert report.errors == pytest.approx((0.1, -0.05, 0.0))
    assert report.median_error == pytest.approx(0.05) and report.worst_error == pytest.approx(0.1)
    assert str(report).splitlines()[1].split() == ["0", "11.000", "10.000", "+10.0%"]
    assert "median 5.0%, worst 10.0%" in str(report)


# -- the fit -----------------------------------------------------------------------------------------------------------


def test_features_count_heads_channels_and_blocks():
    space = NarrowLlama(base()).search_space
    assert _features(space, space.max) == [1, 16, 192, 4]
    assert _features(space, {**space.max, "depth:model.layers.1": 0, "heads:model.layers.0": 2}) == [1, 10, 144, 3]
    assert _features(space, {**space.max, "depth:model.layers.1": 0, "heads:model.layers.1": 2}) == [1, 12, 144, 3]
    flat = NarrowLlama(base(), depth=False).search_space
    assert _features(flat, flat.min) == [1, 8, 64]


def test_least_squares_without_negative_costs():
    rng = np.random.default_rng(0)
    features = np.column_stack([np.ones(12), rng.integers(1, 10, (12, 3))])
    assert _non_negative_least_squares(features, features @ [3, 1, 0.5, 2]) == pytest.approx([3, 1, 0.5, 2])
    fitted = _non_negative_least_squares(features, features @ [3, 1, -0.5, 2])
    assert min(fitted) >= 0 and statistics.median(fitted) > 0
