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
"""Costs of width and depth, bounds on them, reference points and the hypervolume."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import save_file
from support.elastic_net import ElasticNet, quality, search, value_of
from support.models import tiny_gpt2, tiny_llama
from support.narrow_llama import NarrowLlama, extract
from test_search import counted_macs, make_result
from torch import nn

from peft_elastic import ElasticLoraConfig, QuantizedLinear, SparseLinear, SparseQALoraConfig
from peft_elastic.layers import ops
from peft_elastic.quantization import fit_grid
from peft_elastic.search import ALGORITHMS, CostModel, Evaluation, SearchResult, hypervolume_of
from peft_elastic.search.proposals import reference_subnets
from peft_elastic.supernet import Choice, SearchSpace
from peft_elastic.supernet.space import LayerShape


def size_on_disk(model, path):
    """Bytes of the tensors that a model saves, each shared one once."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not any(tensor.data_ptr() == other.data_ptr() for other in tensors.values()):
            tensors[name] = tensor.contiguous()
    save_file(tensors, path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size - 8 - header


# -- the cost model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_costs_of_width_and_depth_are_those_of_the_extracted_model(tmp_path, kwargs, dtype):
    host = NarrowLlama(tiny_llama(**kwargs).to(dtype)).eval()
    space = host.search_space
    for subnet in [space.max, space.min, space.heuristic, *(space.sample(i) for i in range(8))]:
        host.set_subnet(subnet)  # what is active makes no difference to the count
        costs = CostModel(host, space)
        small = extract(space, subnet, tiny_llama(**kwargs).to(dtype))
        sizes = [(layer.size(subnet), layer) for layer in space.layers if layer.in_features]
        adapter = sum(subnet[layer.rank] * sum(size) for size, layer in sizes)
        assert costs.parameters(subnet) == sum(p.numel() for p in small.parameters()) + adapter
        assert costs.macs(subnet) * 7 == counted_macs(small, input_ids=torch.arange(7)[None]) + 7 * adapter
        assert costs.bytes(subnet) == size_on_disk(small, tmp_path / "model.safetensors")


@pytest.mark.skipif(not ops.is_available(), reason="needs the C++ extension")
def test_bytes_of_sparse_layers_are_those_of_their_format():
    base = tiny_llama()
    weights = [base.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.down_proj.weight]
    torch.manual_seed(0)
    for weight, sparsity in zip(weights, (0.5, 0.2)):
        weight.data *= torch.rand_like(weight) >= sparsity
    dense = CostModel(base, space := SearchSpace([Choice("rank", "a", (1,))])).bytes(space.max)
    whole = sum(p.numel() * 4 for p in base.parameters())
    stored = SparseLinear.from_linear(base.model.layers[0].mlp.up_proj).stored_tensors()
    saved = weights[0].numel() * 4 - sum(t.numel() * t.element_size() for t in stored.values())
    assert dense == whole - saved  # 20% zeros do not count as sparse

    def cost(config, target):
        model = get_peft_model(copy.deepcopy(base), config(r=4, elastic_ranks=[4, 2], target_modules=[target]))
        return CostModel(model, model.search_space).bytes(model.search_space.max)

    assert cost(SparseQALoraConfig, "up_proj") == dense  # masked: the zeros survive the merge
    assert cost(ElasticLoraConfig, "up_proj") == whole
    assert cost(ElasticLoraConfig, "q_proj") == dense


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_bytes_of_quantized_layers(sparsity):
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    linear.weight.data *= torch.rand_like(linear.weight) >= sparsity
    layer = QuantizedLinear.from_linear(
        linear, fit_grid(linear.weight.detach(), bits=4, group_size=32, symmetric=False)
    )
    costs = CostModel(nn.ModuleDict({"a": layer}), space := SearchSpace([Choice("rank", "a", (1,))]))
    integers, zeros = layer.integers(), layer.grid.zeros
    if sparsity:
        nonzero = int((integers != zeros.repeat_interleave(32, dim=1)).sum())
        weight = 32 * 8 + -(-nonzero // 2) + 32 * 2 * (2 + 1)
    else:
        weight = 32 * 64 // 2 + 32 * 2 * 2 + 32 * 2 // 2  # as GPTQ packs it
    assert costs.bytes(space.max) == weight + 32 * 4
    assert costs.parameters(space.max) == 32 * 64 + 32
    assert costs.macs(space.max) == 32 * 64


def test_fused_layers_and_depth_alone():
    base = tiny_gpt2()
    space = SearchSpace(
        [Choice("heads", "h.0", (4, 2)), Choice("depth", "h.1.mlp", (1, 0))],
        [
            LayerShape("transformer.h.0.attn.c_attn", 96, 32, True, "heads:h.0", 4),
            LayerShape("transformer.h.0.attn.c_proj", 32, 32, True, "heads:h.0", 4, "in"),
            LayerShape("transformer.h.1.mlp.c_fc", 128, 32, True, depth=("depth:h.1.mlp",)),
            LayerShape("transformer.h.1.mlp.c_proj", 32, 128, True, depth=("depth:h.1.mlp",)),
        ],
    )
    costs = CostModel(base, space)
    difference = {n: costs.costs(space.max)[n] - costs.costs(space.min)[n] for n in ("macs", "parameters", "bytes")}
    weights = 48 * 32 + 32 * 16 + 2 * 128 * 32
    assert difference == {
        "macs": weights,
        "parameters": weights + 48 + 128 + 32,
        "bytes": 4 * (weights + 48 + 128 + 32),
    }


def test_costs_do_not_depend_on_the_active_subnet():
    config = ElasticLoraConfig(
        r=4,
        target_modules="all-linear",
        elastic_width={"heads": [1.0, 0.5], "mlp": [1.0, 0.5]},
        elastic_depth=[1],
        importance="none",
    )
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), config)
    space = model.search_space
    before = CostModel(model, space)
    model.set_subnet("min")
    after = CostModel(model, space)
    assert all(before.costs(subnet) == after.costs(subnet) for subnet in (space.max, space.heuristic, space.min))


def test_cost_model_errors():
    choices = [Choice("depth", "a", (1, 0))]
    with pytest.raises(ValueError, match=r"the choices \['depth:a'\], on which none"):
        CostModel(tiny_llama(), SearchSpace(choices))
    with pytest.raises(ValueError, match="layer 'nowhere'"):
        CostModel(tiny_llama(), SearchSpace(choices, [LayerShape("nowhere", 2, 2, depth=("depth:a",))]))
    with pytest.raises(ValueError, match=r"kind \['experts'\]"):
        CostModel(tiny_llama(), SearchSpace([Choice("experts", "a", (1, 0))]))


def test_attention_products_count_where_a_sequence_length_is_given(tmp_path):
    config = ElasticLoraConfig(r=4, elastic_width={"heads": [1.0, 0.5]}, target_modules=["q_proj"], importance="none")
    model = get_peft_model(tiny_llama(), config)
    space = model.search_space

    def run(**kwargs):
        return search(model, lambda m: float(sum(m.active_subnet.values())), n_evals=4, save_dir=tmp_path, **kwargs)

    result = run(sequence_length=100, max_macs="99%")
    costs = CostModel(model, space, sequence_length=100)
    assert [e.metrics["macs"] for e in result.history] == [costs.macs(e.subnet) for e in result.history]
    assert result.constraints == {"macs": pytest.approx(0.99 * costs.macs(space.max))}
    assert costs.macs(space.max) == CostModel(model, space).macs(space.max) + 2 * 2 * 100 * 32
    for other in (None, 50):
        with pytest.raises(ValueError, match=f"another search.*sequence_length is 100 there, {other} here"):
            run(sequence_length=other, max_macs="99%")
    with pytest.raises(ValueError, match="`sequence_length` must be a whole number >= 1, or None, got 0"):
        run(sequence_length=0)


# -- constraints -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host():
    return NarrowLlama().eval()


@pytest.mark.parametrize("algorithm", ["nsga2", "r-nsga2", "random"])
@pytest.mark.parametrize(
    "bounds",
    [{"max_macs": "60%"}, {"max_params": 9500}, {"constraints": {"bytes": "45%", "macs": "70%"}}, {"max_macs": "41%"}],
)
def test_no_evaluation_is_spent_on_what_exceeds_a_bound(host, algorithm, bounds):
    seen = []
    result = search(
        host, lambda m: seen.append(m.active_subnet) or value_of(m), algorithm=algorithm, n_evals=40, **bounds
    )
    costs = CostModel(host, host.search_space)
    most = costs.costs(host.search_space.max)
    limits = {
        name: float(bound.removesuffix("%")) / 100 * most[name] if isinstance(bound, str) else bound
        for name, bound in (
            bounds.get("constraints") or {{"max_params": "parameters"}.get(k, "macs"): v for k, v in bounds.items()}
        ).items()
    }
    assert result.constraints == pytest.approx(limits)
    references = reference_subnets(host.search_space)
    for subnet in seen:
        if subnet not in references:
            assert all(costs.costs(subnet)[name] <= limit * (1 + 1e-9) for name, limit in limits.items())
    assert len(seen) == len(set(seen)) == len(result.history) > 3
    allowed = [e for e in result.history if result.keeps_constraints(e)]
    assert result.history[0] not in allowed
    assert set(result.evaluation(result.best()).metrics) >= {"accuracy", *limits}
    assert result.evaluation(result.best()) in allowed and all(e in allowed for e in result.pareto)
    assert result.best() == max(allowed, key=lambda e: (e.metrics["accuracy"], -e.metrics["macs"])).subnet
    assert result.best(constrained=False) == host.search_space.max
    if "max_macs" in bounds:
        assert (
            result.best(budget="50%") == result.best(budget={"macs": "50%"}) if bounds["max_macs"] == "60%" else True
        )


@pytest.mark.parametrize("algorithm", ["exhaustive", "nsga2", "r-nsga2", "random"])
@pytest.mark.parametrize("bound", ["100%", "70%", "40%", "26%"])
def test_all_that_keep_a_tight_bound_are_found(algorithm, bound):
    model = ElasticNet(n_layers=3)  # 64 subnets
    space, costs = model.search_space, CostModel(model, model.search_space)
    limit = costs.macs(space.min) + float(bound[:-1]) / 100 * (costs.macs(space.max) - costs.macs(space.min))
    result = search(model, algorithm=algorithm, n_evals=64, max_macs=limit)
    allowed = {s for s in space.subnets() if costs.macs(s) <= limit}
    assert {e.subnet for e in result.history} == allowed | set(reference_subnets(space))
    assert len(result.history) == len({e.subnet for e in result.history})


def test_a_bound_that_only_the_min_subnet_keeps(host):
    costs = CostModel(host, host.search_space)
    result = search(host, value_of, max_bytes=costs.bytes(host.search_space.min), n_evals=20)
    assert result.best() == host.search_space.min or costs.bytes(result.best()) == costs.bytes(host.search_space.min)
    small = ElasticNet(n_layers=20)
    lowest = CostModel(small, small.search_space).macs(small.search_space.min)
    result = search(small, lambda m: 1.0, max_macs=lowest, algorithm="random")
    assert [e.source for e in result.history] == ["max", "min", "heuristic"]
    assert result.best() == small.search_space.min


def test_nsga2_under_a_bound_beats_random():
    model = ElasticNet(n_layers=8, options=(8, 6, 4, 2))

    def evaluate(m):
        return sum((i + 1) * (1 - (1 - layer.rank / 8) ** 2) for i, layer in enumerate(m.layers)) / 36

    volumes = {}
    for algorithm in ("nsga2", "random"):
        results = [
            search(model, evaluate, algorithm=algorithm, n_evals=150, seed=seed, max_macs="75%") for seed in range(3)
        ]
        volumes[algorithm] = [result.hypervolume[-1] for result in results]
        assert len({json.dumps(result.hypervolume_box) for result in results}) == 1
    assert np.mean(volumes["nsga2"]) > np.mean(volumes["random"]), volumes


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_macs": "10%"}, r"no subnet keeps the bound '10%' on 'macs'.*smallest reachable value.*\d"),
        ({"max_params": 5}, "no subnet keeps the bound 5 on 'parameters'"),
        ({"constraints": {"bytes": 1}}, "no subnet keeps the bound 1 on 'bytes'"),
        ({"max_macs": "60"}, "bound on 'macs'.*'60'"),
        ({"max_macs": -1}, "bound on 'macs'.*-1"),
        ({"max_macs": True}, "bound on 'macs'.*True"),
        ({"max_bytes": math.nan}, "bound on 'bytes'.*nan"),
        (
            {"constraints": {"flops": 5}},
            r"`constraints` must be bounds on some of \['bytes', 'latency', .*, got 'flops'",
        ),
        ({"constraints": ["macs"]}, "`constraints` must be a dict"),
        ({"constraints": {"macs": 5}, "max_macs": 6}, "`max_macs` bounds 'macs', which another"),
        ({"max_params": 5, "max_parameters": 6}, "`max_params` bounds 'parameters', which another"),
        ({"max_latency": "60%"}, r"latency \(here '60%'\) needs.*latency=LatencyModel\(model, inputs\)"),
        ({"objectives": ("accuracy", "latency")}, r"'latency' needs.*latency=LatencyModel\(model, inputs\)"),
        ({"latency": 3.0}, "`latency` must be a LatencyModel, got 3.0"),
        ({"reference_points": {"accuracy": 1, "macs": 1}}, "`reference_points` are for"),
        ({"algorithm": "r-nsga2", "reference_points": []}, r"`reference_points` must be a point.*got \[\]"),
        ({"algorithm": "r-nsga2", "reference_points": {"accuracy": 1}}, "with every objective"),
        ({"algorithm": "r-nsga2", "reference_points": [[1, 2, 3]]}, "with every objective"),
        ({"algorithm": "r-nsga2", "reference_points": [[1, math.inf]]}, "finite numbers"),
        ({"algorithm": "r-nsga2", "objectives": "accuracy"}, "at least two `objectives`"),
        ({"algorithm": "exhaustive", "max_macs": "60%"}, "subnets that keep the constraints.*`n_evals` is 30"),
    ],
)
def test_bad_settings_are_refused_before_an_evaluation(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        search(ElasticNet(), lambda m: pytest.fail("evaluated"), save_dir=tmp_path / "search", **kwargs)
    assert not (tmp_path / "search").exists()


def test_search_continues_with_constraints_and_reference_points(tmp_path):
    def run(evaluate=quality, folder=tmp_path / "search", **kwargs):
        given = {
            "algorithm": "r-nsga2",
            "reference_points": [[0.7, 900], [0.5, 700]],
            "max_macs": "80%",
            "n_evals": 30,
        }
        return search(ElasticNet(), evaluate, save_dir=folder, **{**given, **kwargs})

    def interrupted(model):
        calls.append(model.active_subnet)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return quality(model)

    calls = []
    with pytest.raises(KeyboardInterrupt):
        run(interrupted)
    calls.clear()
    result = run(lambda m: calls.append(1) or quality(m))
    assert len(calls) == 30 - 13 and result == run(folder=None)
    assert SearchResult.load(tmp_path / "search") == result
    assert result.settings["reference_points"] == [[0.7, 900.0], [0.5, 700.0]]
    with pytest.raises(ValueError, match="constraints is {'macs': '80%'} there, {'macs': '70%'} here"):
        run(max_macs="70%")
    with pytest.raises(ValueError, match="constraints is {'macs': '80%'} there, None here"):
        run(max_macs=None)
    with pytest.raises(ValueError, match="reference_points"):
        run(reference_points=[[0.7, 900]])


def test_results_of_earlier_releases_load(tmp_path):
    """A result without the settings that came later."""
    result = make_result([(0.81, 100), (0.50, 40), (0.70, 70)])
    result.settings = {"algorithm": "nsga2", "seed": 0, "population": 8}
    result.save(tmp_path)
    loaded = SearchResult.load(tmp_path)
    assert loaded == result and loaded.constraints == {} and len(loaded.hypervolume) == 3
    assert loaded.best(budget=70) == loaded.history[2].subnet


def test_profile_shows_bounds_before_the_first_evaluation(host, capfd):
    shown = []

    def evaluate(model):
        shown.append(capfd.readouterr().err)
        return value_of(model)

    search(host, evaluate, max_macs="60%", n_evals=4, progress=True)
    lines = shown[0].splitlines()
    rows = {
        line.split()[0]: line
        for line in lines
        if line.split()[:1] and line.split()[0] in ("max", "min", "heuristic", "at")
    }
    assert set(rows) == {"max", "min", "heuristic", "at"} and "60.0%" in rows["at"]
    assert "hypervolume=" in capfd.readouterr().err


# -- few variables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_choices", [1, 2, 3])
def test_nsga2_with_few_choices_goes_on(n_choices):
    """Mutation hardly ever happens here, and crossover of few different parents finds nothing new."""
    model = ElasticNet(n_choices, options=tuple(range(40, 0, -1)))

    def evaluate(m):  # best in the middle, and no cost decides
        return -sum((layer.rank - 17) ** 2 for layer in m.layers)

    n_evals = 40 if n_choices == 1 else 120
    result = search(model, evaluate, objectives="accuracy", n_evals=n_evals)
    assert len({e.subnet for e in result.history}) == n_evals
    best = np.maximum.accumulate([e.metrics["accuracy"] for e in result.history])
    assert best[-1] > best[2] and best[-1] >= -30 * n_choices


# -- reference points --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "accuracy"), [(0.2, 0.75), (0.7, 0.97)])
def test_r_nsga2_goes_to_its_reference_point(share, accuracy):
    model = ElasticNet(n_layers=12)
    costs = CostModel(model, model.search_space)
    low, high = costs.macs(model.search_space.min), costs.macs(model.search_space.max)

    def evaluate(m):
        return sum((i + 1) * (1 - (1 - layer.rank / 8) ** 2) for i, layer in enumerate(m.layers)) / 78

    point = {"macs": low + share * (high - low), "accuracy": accuracy}

    def distance(algorithm, **kwargs):
        result = search(model, evaluate, algorithm=algorithm, n_evals=240, population=12, seed=1, **kwargs)
        off = [
            math.hypot((e.metrics["macs"] - point["macs"]) / (high - low), (e.metrics["accuracy"] - accuracy) / 0.5625)
            for e in result.history[-60:]
        ]
        return np.median(off)

    near, far = distance("r-nsga2", reference_points=point), distance("nsga2")
    assert near < 0.6 * far, (near, far)
    assert near == distance("r-nsga2", reference_points=[[accuracy, point["macs"]]])


# -- hypervolume -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3).flatmap(lambda d: st.lists(st.tuples(*[st.integers(0, 7)] * d), min_size=1, max_size=12)))
def test_hypervolume_counts_the_dominated_cells(points):
    n = 6
    names = ["accuracy", "macs", "other"][: len(points[0])]
    objectives = {name: "max" if name == "accuracy" else "min" for name in names}
    space = SearchSpace([Choice("rank", "a", tuple(range(len(points), 0, -1)))])
    history = [
        Evaluation(i, "search", space.decode([i]), {k: -v if k == "accuracy" else v for k, v in zip(names, point)})
        for i, point in enumerate(points)
    ]
    result = SearchResult(space, objectives, history)
    reference = {name: -n if name == "accuracy" else n for name in names}
    volumes = hypervolume_of(result, reference, dict.fromkeys(names, 0))
    cells = list(itertools.product(range(n), repeat=len(names)))
    for i, volume in enumerate(volumes):
        covered = sum(any(all(p <= c for p, c in zip(q, cell)) for q in points[: i + 1]) for cell in cells)
        assert volume == pytest.approx(covered / len(cells))
    assert volumes == sorted(volumes)


def test_hypervolume_of_a_search():
    a, b = (search(ElasticNet(), algorithm=name, n_evals=60) for name in ("nsga2", "random"))
    assert a.hypervolume_box == b.hypervolume_box
    assert a.hypervolume_box[0] == {"accuracy": a.history[1].metrics["accuracy"], "macs": a.history[0].metrics["macs"]}
    for result in (a, b):
        assert len(result.hypervolume) == 60 and result.hypervolume == sorted(result.hypervolume)
        assert result.hypervolume[:2] == [0, 0] and 0 < result.hypervolume[-1] <= 1
    assert a.hypervolume[-1] > b.hypervolume[-1]
    assert hypervolume_of(b, *a.hypervolume_box) == b.hypervolume
    with pytest.raises(ValueError, match="`ideal` names"):
        hypervolume_of(a, a.hypervolume_box[0], {"accuracy": 1})
    with pytest.raises(ValueError, match="worse than `reference`"):
        hypervolume_of(a, *a.hypervolume_box[::-1])


def test_hypervolume_where_the_references_agree():
    result = search(ElasticNet(), lambda m: 0.5)
    assert result.hypervolume == [0.0] * 30
    assert search(ElasticNet(), n_evals=1).hypervolume == [0.0]


def test_every_algorithm_is_tested():
    assert set(ALGORITHMS) == {"exhaustive", "nsga2", "r-nsga2", "random"}
