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
"""Super-networks of a model's own weights: what they compute, what comes out of them, what they refuse."""

import copy
import gc
import io
import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.elastic_models import ALL, MatrixProducts, build, close, inputs_of, masked
from support.fresh import run_fresh
from support.models import default_dtype, outputs, tiny_bert, tiny_llama, tiny_vit, tokens
from torch import nn
from transformers import BertForSequenceClassification

from peft_elastic import (
    Bounds,
    ElasticConfig,
    ElasticLoraConfig,
    ElasticModel,
    LatencyModel,
    MagnitudeConfig,
    RTNConfig,
    WandaConfig,
    bounds_by_importance,
    get_elastic_model,
    prune,
    quantize,
    search_subnet,
)
from peft_elastic.cost.counts import CostModel
from peft_elastic.structure.blocks import Structure
from peft_elastic.structure.importance import measure_importance, noted_orders
from peft_elastic.supernet import ElasticHost, get_elastic_host


pytestmark = pytest.mark.filterwarnings("ignore")

WIDTH = {"heads": [1.0, 0.5], "mlp": [1.0, 0.5, 1 / 6]}


def elastic(model, **settings):
    return get_elastic_model(model.eval(), ElasticConfig(**{"elastic_width": WIDTH, "importance": "none"} | settings))


def prune_by_magnitude(model):
    prune(model, MagnitudeConfig(sparsity=0.5))


def prune_by_wanda(model):
    prune(model, WandaConfig(sparsity=0.5), [{"input_ids": tokens()}], progress=False)


def round_to_nearest(model):
    quantize(model, RTNConfig(bits=4, group_size=16), progress=False)


def some_subnets(space):
    return [space.min, space.sample(0), space.sample(1)]


# -- what it computes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_subnets_compute_what_the_masked_model_does(name):
    """In float64, outputs and the gradients of all weights, which stand where the weights of the whole stand."""
    with default_dtype(torch.float64):
        model = build(name).double().eval()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_of(name).items()}
    reference = copy.deepcopy(model)
    host = elastic(model, elastic_depth="all")
    assert host is model and isinstance(model, ElasticHost) and get_elastic_host(model) is model
    close(outputs(model, inputs), outputs(reference, inputs), 1e-12)
    for subnet in some_subnets(model.search_space):
        model.set_subnet(subnet)
        assert model.active_subnet == subnet
        with masked(reference, name, subnet):
            results = []
            for each in (model, reference):
                each.zero_grad()
                output = each(**inputs)[0]
                output.square().mean().backward()
                results.append((output.detach(), {n: p.grad for n, p in each.named_parameters()}))
        (ours, gradients), (theirs, expected) = results
        close(ours, theirs, 1e-9)
        for key, gradient in gradients.items():
            zero = torch.zeros(()) if expected[key] is None else expected[key]
            close(torch.zeros_like(zero) if gradient is None else gradient, zero, 1e-9)
    model.set_subnet("max")
    close(outputs(model, inputs), outputs(reference, inputs), 1e-12)


def test_heads_of_32_as_minilm_has_them():
    model = tiny_bert(hidden_size=96, num_attention_heads=3, intermediate_size=64)
    elastic(model, elastic_width={"heads": [3, 1]})
    model.set_subnet("min")
    assert model.get_submodule("bert.encoder.layer.0.attention.self.query").weight.shape == (32, 96)
    small = model.extract_subnet()
    close(outputs(small, {"input_ids": tokens()}), outputs(model, {"input_ids": tokens()}))


def test_less_is_computed():
    model = elastic(tiny_llama())
    with MatrixProducts() as whole:
        model(tokens())
    model.set_subnet("min")
    with MatrixProducts() as narrow:
        model(tokens())
    work = [sum(m * k * n * c for (m, k, n), c in products.shapes.items()) for products in (whole, narrow)]
    costs = CostModel(model, model.search_space)
    shares = work[1] / work[0], costs.macs(model.search_space.min) / costs.macs(model.search_space.max)
    assert shares[0] == pytest.approx(shares[1], rel=1e-6)


# -- order ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["magnitude", "activation", "gradient"])
def test_sorting_keeps_the_largest_subnet(importance):
    with default_dtype(torch.float64):
        model = tiny_llama().double().eval()
    before = outputs(model, {"input_ids": tokens()})
    get_elastic_model(model, ElasticConfig(elastic_width=WIDTH, importance=importance))
    if importance != "magnitude":
        with pytest.raises(ValueError, match="not sorted by importance"):
            model.set_subnet("min")
        assert model.active_subnet == model.search_space.max
        model.sort_by_importance([{"input_ids": tokens()}], progress=False)
    assert noted_orders(model)
    close(outputs(model, {"input_ids": tokens()}), before, 1e-10)
    model.set_subnet("min")
    assert not torch.allclose(outputs(model, {"input_ids": tokens()}), before)


def test_sorting_at_a_narrow_subnet_sorts_the_whole():
    model, twin = tiny_llama(), tiny_llama()
    elastic(twin).sort_by_importance(importance="magnitude", progress=False)
    elastic(model).set_subnet("min")
    model.sort_by_importance(importance="magnitude", progress=False)
    assert model.active_subnet == model.search_space.min
    for name, weight in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_scores_of_both_kinds_where_one_is_elastic():
    model = tiny_llama().eval()
    scores = measure_importance(model, Structure(model).widths, "magnitude")
    elastic(model, elastic_width={"mlp": [1.0, 0.5]}).sort_by_importance(importance=scores, progress=False)
    assert all("mlp" in name or name.count(".") == 2 for name in noted_orders(model)) and noted_orders(model)
    with pytest.raises(ValueError, match="scores for 'nowhere'"):
        model.sort_by_importance(importance=scores | {"nowhere": torch.ones(3)}, progress=False)


# -- the model is still itself -------------------------------------------------------------------------------------------


def test_the_class_is_still_the_own():
    model = elastic(tiny_bert())
    assert isinstance(model, ElasticModel)
    assert type(model).__name__ == "BertForSequenceClassification" and issubclass(
        type(model), BertForSequenceClassification
    )
    plain = model.unload()
    assert plain is model and not isinstance(model, ElasticModel) and not hasattr(model, "set_subnet")


def test_unloading_gives_the_whole_model():
    model = tiny_llama().eval()
    before = outputs(model, {"input_ids": tokens()})
    elastic(model, elastic_depth="all").set_subnet("min")
    close(outputs(model.unload(), {"input_ids": tokens()}), before, 0)
    elastic(model).set_subnet("min")  # and it may become elastic once more


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(way):
    model = elastic(tiny_bert(), elastic_depth="all")
    model.set_subnet("heuristic")
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer := io.BytesIO())
        other = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert type(other) is type(model) and other.active_subnet == model.active_subnet
    close(outputs(other, {"input_ids": tokens()}), outputs(model, {"input_ids": tokens()}), 0)
    other.set_subnet("min")
    assert model.active_subnet == model.search_space.heuristic


def test_a_module_that_is_none_of_transformers():
    holder = nn.Module()
    holder.inner = tiny_bert().eval()
    elastic(holder, elastic_width={"mlp": [1.0, 0.5]})
    holder.set_subnet("min")
    assert holder.get_submodule("inner.bert.encoder.layer.0.intermediate.dense").weight.shape[0] < 48
    with pytest.raises(ValueError, match="`save_pretrained` is for models of transformers, got Module"):
        holder.save_pretrained("nowhere")


def test_sampling_and_evaluation_mode():
    model = elastic(tiny_bert()).train()
    space = model.search_space
    model.set_subnet("heuristic")
    model.sample_subnet(space.min)
    assert model.active_subnet == space.min
    model.eval()
    assert model.active_subnet == space.heuristic
    model.train()
    assert model.active_subnet == space.min
    model.restore_subnet()
    assert model.active_subnet == space.heuristic
    model.eval().train()
    assert model.active_subnet == space.heuristic


# -- extraction and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit", "t5"])
def test_extracted_equals_and_reloads_in_a_fresh_process(name, tmp_path):
    model = build(name).eval()
    elastic(model, elastic_depth="all")
    inputs = inputs_of(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for i, subnet in enumerate(some_subnets(model.search_space)):
        small = model.extract_subnet(subnet)
        assert not isinstance(small, ElasticModel) and model.active_subnet == model.search_space.max
        model.set_subnet(subnet)
        expected = outputs(model, inputs)
        close(outputs(small, inputs), expected)
        model.set_subnet("max")
        small.save_pretrained(tmp_path / str(i))
        torch.save((inputs, expected), tmp_path / str(i) / "expected.pt")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    done = run_fresh(
        """
import sys, torch, peft_elastic, transformers
for i in range(3):
    folder = f"{sys.argv[1]}/{i}"
    model = getattr(transformers, sys.argv[2]).from_pretrained(folder).eval()
    inputs, expected = torch.load(f"{folder}/expected.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-5, atol=1e-5)
""",
        tmp_path,
        type(small).__name__,
    )
    assert done.returncode == 0, done.stderr


def test_saved_as_an_ordinary_checkpoint_and_a_file(tmp_path):
    model = tiny_bert().eval()
    whole = outputs(model, {"input_ids": tokens()})
    get_elastic_model(model, ElasticConfig(WIDTH, "all.mlp", importance="magnitude"))
    model.set_subnet("min")
    narrow = outputs(model, {"input_ids": tokens()})
    model.train()
    model.sample_subnet("heuristic")  # in the middle of a step the chosen one is saved
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "elastic_model.json", "model.safetensors"]
    torch.save((tokens(), whole, narrow), tmp_path / "expected.pt")
    done = run_fresh(
        """
import sys, torch
from transformers import BertForSequenceClassification as Bert
folder = sys.argv[1]
ids, whole, narrow = torch.load(f"{folder}/expected.pt")
stock, loading = Bert.from_pretrained(folder, output_loading_info=True)
assert "peft_elastic" not in sys.modules and not any(loading["missing_keys"]) and not any(loading["unexpected_keys"])
with torch.no_grad():
    torch.testing.assert_close(stock.eval()(ids)[0], whole, rtol=1e-5, atol=1e-5)
from peft_elastic import ElasticModel
model = ElasticModel.from_pretrained(folder)
assert model.active_subnet == model.search_space.min and not model.training
with torch.no_grad():
    torch.testing.assert_close(model(ids)[0], narrow, rtol=1e-5, atol=1e-5)
model.save_pretrained(sys.argv[2])
assert not hasattr(type(model).from_pretrained(folder), "set_subnet")
""",
        tmp_path,
        tmp_path / "again",
    )
    assert done.returncode == 0, done.stderr
    first, again = ((folder / "elastic_model.json").read_text() for folder in (tmp_path, tmp_path / "again"))
    assert first == again


def saved(folder, importance="magnitude", **settings):
    model = get_elastic_model(
        tiny_bert().eval(), ElasticConfig(elastic_width=WIDTH, importance=importance, **settings)
    )
    model.save_pretrained(folder)
    return model


def test_what_was_not_saved_together_is_refused(tmp_path):
    saved(tmp_path / "sorted")
    saved(tmp_path / "plain", importance="none")
    for one, other in (("sorted", "plain"), ("plain", "sorted")):
        text = (tmp_path / one / "elastic_model.json").read_text()
        mixed = tmp_path / f"{one}-{other}"
        mixed.mkdir()
        for path in (tmp_path / other).iterdir():
            (mixed / path.name).write_bytes(path.read_bytes())
        (mixed / "elastic_model.json").write_text(text)
        with pytest.raises(ValueError, match="elastic_model.json and config.json were not saved together"):
            ElasticModel.from_pretrained(mixed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("orders"), "orders"),
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d["config"].update(elastic_widht=1), "`elastic_widht` is no field of ElasticConfig"),
        (lambda d: d["config"].update(elastic_width={"mlp": [1.0, 0.25]}), "another search space"),
        (lambda d: d.update(active_subnet={"mlp:nowhere": 3}), "does not belong to this search space"),
        (lambda d: d.update(model_class="NoSuchModel"), "`model_class` is needed.*'NoSuchModel'"),
        (lambda d: d["orders"].update({next(iter(d["orders"])): [0, 0]}), "no permutation"),
        (lambda d: d["orders"].popitem(), "`orders` are others than when it was written"),
        (lambda d: d.update(order=None, orders={}), "were not saved together"),
    ],
)
def test_damaged_files(change, message, tmp_path):
    saved(tmp_path)
    data = json.loads((tmp_path / "elastic_model.json").read_text())
    change(data)
    (tmp_path / "elastic_model.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        ElasticModel.from_pretrained(tmp_path)


def test_a_checkpoint_that_was_sorted_before(tmp_path):
    saved(tmp_path / "first")
    stock = BertForSequenceClassification.from_pretrained(tmp_path / "first")
    model = elastic(stock)
    model.set_subnet("min")
    model.save_pretrained(tmp_path / "second")
    again = ElasticModel.from_pretrained(tmp_path / "second")
    torch.testing.assert_close(outputs(again, {"input_ids": tokens()}), outputs(model, {"input_ids": tokens()}))
    again.save_pretrained(tmp_path / "third")
    first, second, third = (
        json.loads((tmp_path / name / "elastic_model.json").read_text()) for name in ("first", "second", "third")
    )
    assert first["order"] == second["order"] and second["orders"] == {} and second == third


def test_quantised_layers_are_refused_before_the_folder_changes(tmp_path):
    model = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    quantize(model, RTNConfig(bits=4, group_size=16), progress=False)
    with pytest.raises(ValueError, match="would write the weights of 12 quantised layers"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change", [prune_by_magnitude, prune_by_wanda, round_to_nearest])
def test_weights_of_a_narrowed_model_are_not_changed(change):
    model = elastic(tiny_llama())
    before = copy.deepcopy(model.state_dict())
    for subnet in (model.search_space.min, {**model.search_space.max, "mlp:model.layers.1": 24}):
        model.set_subnet(subnet)
        with pytest.raises(ValueError, match="A part of `model` is not active; choose the widest subnet first"):
            change(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.set_subnet("max")
    change(model)


def test_adapters_go_on_what_is_extracted(tmp_path):
    model = elastic(tiny_llama())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    model.set_subnet("max")
    for refused in (
        lambda: model.set_subnet("min"),
        lambda: model.sample_subnet("min"),
        lambda: model.extract_subnet("min"),
        lambda: model.extract_subnet("max"),
        lambda: model.save_pretrained(tmp_path),
    ):
        with pytest.raises(
            ValueError, match="while the elastic model has an adapter, as in 'model.layers.0.self_attn.q_proj'"
        ):
            refused()
    assert model.active_subnet == model.search_space.max and not list(tmp_path.iterdir())
    adapted.merge_and_unload()
    model.set_subnet("min")
    get_peft_model(model.extract_subnet(), LoraConfig(r=4, target_modules=["q_proj"]))(tokens())


def test_a_folder_with_an_adapter_in_it(tmp_path):
    get_peft_model(tiny_bert(), LoraConfig(r=4, target_modules=["query"])).save_pretrained(tmp_path)
    saved(tmp_path)
    with pytest.raises(ValueError, match="must not hold an adapter beside the super-network"):
        ElasticModel.from_pretrained(tmp_path)


def test_an_interrupted_save_is_no_super_network(tmp_path, monkeypatch):
    model = saved(tmp_path)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_elastic.elastic_model.saving.write", stop)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has no elastic_model.json"):
        ElasticModel.from_pretrained(tmp_path)


# -- search --------------------------------------------------------------------------------------------------------------


def closeness(whole):
    def evaluate(model):
        return -(model(tokens())[0] - whole).square().mean().item()

    return evaluate


def test_search(tmp_path):
    model = elastic(tiny_bert(), elastic_depth="all")
    whole = outputs(model, {"input_ids": tokens()})
    result = model.search_subnet(closeness(whole), ["closeness", "macs"], n_evals=12, progress=False, seed=1)
    again = search_subnet(model, closeness(whole), ["closeness", "macs"], n_evals=12, progress=False, seed=1)
    assert [e.subnet for e in again.history] == [e.subnet for e in result.history]
    best = next(e for e in result.history if e.subnet == result.best(budget={"macs": "70%"}))
    assert CostModel(model, model.search_space).macs(best.subnet) <= 0.7 * result.history[0].metrics["macs"]
    small = model.extract_subnet(best.subnet)
    assert closeness(whole)(small.eval()) == pytest.approx(best.metrics["closeness"], rel=1e-4)


def first_logit(model):
    return model(torch.arange(3, 9)[None])[0][0, 0].item()


def test_search_in_processes(tmp_path):
    """Workers load the saved super-network, and find what one process finds."""
    model = elastic(tiny_bert(), elastic_depth="all", importance="magnitude")
    model.save_pretrained(tmp_path)
    settings = {"objectives": ["logit", "macs"], "n_evals": 6, "progress": False}
    alone = search_subnet(model, first_logit, **settings)
    together = search_subnet(model, first_logit, **settings, executor=2, worker_model=tmp_path)
    assert [e.subnet for e in together.history] == [e.subnet for e in alone.history]
    for one, other in zip(together.history, alone.history):
        assert one.metrics == pytest.approx(
            other.metrics, rel=1e-5
        )  # weights that are read from a file lie elsewhere in memory


def test_the_search_holds_no_second_copy_of_the_weights():
    """Bytes of all tensors alive during an evaluation, against those before."""
    model = elastic(tiny_bert(hidden_size=128, num_attention_heads=4, intermediate_size=256))
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def alive():
        gc.collect()
        storages = {}
        for each in gc.get_objects():
            if type(each) in (torch.Tensor, nn.Parameter):  # and not what other tests have left of torch.compile
                storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        return sum(storages.values())

    most, before = [], alive()

    def evaluate(model):
        most.append(alive() - before)
        return 0.0

    model.search_subnet(evaluate, ["zero", "macs"], n_evals=6, progress=False)
    assert max(most) < 0.02 * size


def test_latency():
    model = elastic(tiny_bert(), elastic_depth="all")
    latency = LatencyModel(model, {"input_ids": (1, 16)}, seconds=0.2)
    space = model.search_space
    assert 0 < latency.predict(space.min) < latency.predict(space.max)
    assert model.active_subnet == space.max


# -- refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "`elastic_width`, `elastic_kernel` and `elastic_depth` must not all be left out"),
        ({"elastic_width": {"filters": [1.0]}}, "`elastic_width` must be a dict with the keys"),
        ({"elastic_width": {"channels": [1.0], "mlp": [1.0]}}, "make one of the two elastic"),
        ({"elastic_width": WIDTH, "importance": "gamma"}, "`importance` must be"),
        ({"elastic_width": {"channels": [1.0]}, "importance": "movement"}, "`importance` must be"),
        ({"elastic_kernel": [3.5]}, "`elastic_kernel` must be a list of kernel sizes"),
        ({"elastic_width": WIDTH, "importance": "luck"}, "`importance` must be"),
        ({"elastic_depth": []}, "`elastic_depth` must be at least one block"),
    ],
)
def test_configurations_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ElasticConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"elastic_width": {"mlp": [0.75, 0.5]}}, r"`elastic_width\['mlp'\]` must be options with the whole width, 1.0 or 48 for"),
        ({"elastic_width": {"mlp": [96, 48]}}, r"`elastic_width\['mlp'\]` has 96, but"),
        ({"elastic_width": {"heads": [4, 3, 5]}}, r"`elastic_width\['heads'\]` has 5, but"),
        ({"elastic_width": {"mlp": {"encoder.layer.9": [1.0]}}}, "'encoder.layer.9', which is no block of the model"),
        ({"elastic_depth": 7}, "`elastic_depth` has 7; the blocks are 0 to"),
    ],
)  # fmt: skip
def test_models_that_do_not_go_with_it(settings, message):
    model = tiny_bert()
    with pytest.raises(ValueError, match=message):
        get_elastic_model(model, ElasticConfig(**settings))
    assert not isinstance(model, ElasticModel) and not hasattr(model, "set_subnet")


def test_other_refusals():
    config = ElasticConfig(elastic_width=WIDTH, importance="none")
    with pytest.raises(ValueError, match="`model` must be a model"):
        get_elastic_model("bert", config)
    with pytest.raises(ValueError, match="`config` must be an `ElasticConfig`"):
        get_elastic_model(tiny_bert(), ElasticLoraConfig(elastic_width=WIDTH))
    with pytest.raises(ValueError, match="no block of the model"):
        get_elastic_model(nn.Sequential(nn.Linear(3, 3)), config)
    with pytest.raises(ValueError, match="`model` must have no adapters"):
        get_elastic_model(get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"])), config)
    model = get_elastic_model(tiny_bert(), config)
    with pytest.raises(ValueError, match="before `torch.compile`"):
        get_elastic_model(torch.compile(tiny_bert()), config)
    with pytest.raises(ValueError, match="elastic already"):
        get_elastic_model(model, config)
    with pytest.raises(ValueError, match="elastic itself"):
        get_peft_model(model, ElasticLoraConfig(target_modules=["query"]))
    for subnet in ({"mlp:bert.encoder.layer.0": 7}, "small", dict(model.search_space.min) | {"rank:x": 3}):
        with pytest.raises(ValueError, match="`subnet"):
            model.set_subnet(subnet)
    assert model.active_subnet == model.search_space.max
    with pytest.raises(ValueError, match="`elastic_width` is not set"):
        get_elastic_model(tiny_vit(), ElasticConfig(elastic_depth="all")).sort_by_importance()


def test_the_configuration_is_a_value():
    config = ElasticConfig(elastic_width={"mlp": [0.5, 1.0]}, importance="none")
    one, two = (get_elastic_model(tiny_bert(), config) for _ in range(2))
    one.set_subnet("min")
    config.elastic_width = {"mlp": [1.0]}
    assert two.active_subnet == two.search_space.max and two.elastic_config.elastic_width == {"mlp": [1.0, 0.5]}
    config.importance = "luck"
    with pytest.raises(ValueError, match="`importance` must be"):
        get_elastic_model(tiny_bert(), config)


def test_a_classifier_keeps_its_head(tmp_path):
    model = elastic(tiny_bert(), elastic_depth="all")
    model.set_subnet("min")
    model.save_pretrained(tmp_path)
    again = ElasticModel.from_pretrained(tmp_path)
    close(outputs(again, {"input_ids": tokens()}), outputs(model, {"input_ids": tokens()}))


# -- options that importance finds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_bounds_are_ready_to_use(name, tmp_path):
    """Options, order and subnets of the targets from the same scores; the kept set is the first of the sorted ones."""
    model = build(name, num_hidden_layers=3).eval()
    scores = measure_importance(model, Structure(model).widths, "magnitude")
    whole = outputs(model, inputs_of(name))
    bounds = bounds_by_importance(model, scores, targets=["100%", "75%", "55%"], sequence_length=16)
    bounds.save(tmp_path / "bounds.json")
    bounds = Bounds.load(tmp_path / "bounds.json")
    elastic(model, elastic_width=bounds.elastic_width, elastic_depth=bounds.elastic_depth, importance="magnitude")
    model.sort_by_importance(importance=scores, progress=False)
    costs = CostModel(model, model.search_space, sequence_length=16)
    for target in bounds.targets:
        model.set_subnet(target.subnet)
        assert costs.macs(target.subnet) == target.reached
    assert bounds.targets[0].subnet == model.search_space.max
    model.set_subnet("max")
    close(outputs(model, inputs_of(name)), whole)


def test_a_path_may_be_the_end_of_another():
    holder = nn.Module()
    holder.bert, holder.inner = tiny_bert().bert, tiny_bert()
    get_elastic_model(holder, ElasticConfig({"mlp": {"bert.encoder.layer.0": [1.0, 0.5]}}, "bert.encoder.layer.1"))
    keys = [choice.key for choice in holder.search_space]
    assert keys == ["mlp:bert.encoder.layer.0", "depth:bert.encoder.layer.1"]
