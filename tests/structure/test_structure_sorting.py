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
"""Sorting heads and channels by importance: the same function in another order, by the formulas that are documented, and saved
with the adapter."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import sparse_qa
from support.elastic_models import (
    ALL,
    SETTINGS,
    adapted,
    build,
    close,
    elastic,
    inputs_of,
    readers,
)
from support.fresh import run_fresh
from support.models import (
    BLOCKS,
    TRANSFORMERS_ADAPTERS,
    default_dtype,
    outputs,
    randomize,
    tiny_llama,
    tiny_t5,
    tokens,
)
from torch import nn
from transformers import AutoModelForCausalLM

from peft_elastic import ElasticLoraConfig, SparseQALoraConfig, sort_by_importance
from peft_elastic.structure import Structure
from peft_elastic.structure.importance import noted_orders
from peft_elastic.supernet import get_elastic_host


pytestmark = pytest.mark.filterwarnings("ignore")

CAUSAL = [name for name in BLOCKS if name not in ("bert", "roberta", "distilbert", "vit")]
PLAIN = {"r": 4, "lora_alpha": 8, "elastic_ranks": [4, 2], "target_modules": ["q_proj", "o_proj", "down_proj"]}


def calibration(name):
    """Two batches with padding, and labels where the loss needs them."""
    first = inputs_of(name)
    second = {k: v.flip(0) for k, v in first.items()}
    if name in CAUSAL:
        return [first, second]
    if name.endswith("t5"):
        return [
            {**{k: v for k, v in b.items() if k != "decoder_input_ids"}, "labels": tokens(length=5, seed=2)}
            for b in (first, second)
        ]
    return [{**b, "labels": torch.tensor([0, 1, 2])[: len(next(iter(b.values())))]} for b in (first, second)]


def in_double(batches):
    return [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]


def unsorted(name="llama", dtype=torch.float32, importance="activation", **settings):
    return elastic(name, dtype, importance=importance, **settings)


def sorted_model(name="llama", **settings):
    model, inputs = unsorted(name, **settings)
    model.sort_by_importance(calibration(name), progress=False)
    return model, inputs


def original_weights(name="llama"):
    return {key: parameter.clone() for key, parameter in build(name).state_dict().items()}


# -- the same function -------------------------------------------------------------------------------------------------


EACH_KIND = ["llama", "gemma3", "phi3", "gpt2", "gpt_neox", "bert", "t5"]


@pytest.mark.parametrize(
    ("name", "importance"),
    [
        *((name, "activation") for name in ALL),
        *((name, importance) for name in EACH_KIND for importance in ("gradient", "magnitude", "own")),
    ],
)
def test_sorting_does_not_change_the_function(name, importance):
    model, inputs = unsorted(name, torch.float64)
    with model.disable_adapter():
        base = outputs(model, inputs)
    adapted = outputs(model, inputs)
    before = {key: parameter.clone() for key, parameter in model.named_parameters()}
    batches = in_double(calibration(name))
    own = None
    if importance == "own":
        structure = Structure(model.get_base_model())
        own = {o.name: torch.rand(w.units) for w in structure.widths for o in w.orders if w.kind == "heads"}
        importance = own
    scores = model.sort_by_importance(batches, importance, progress=False)
    assert all((score.diff() <= 0).all() for score in scores.values())  # falling
    if own is not None:
        assert all(torch.equal(scores[key], own[key].sort(descending=True)[0]) for key in own)
    close(outputs(model, inputs), adapted, 1e-10)
    with model.disable_adapter():
        close(outputs(model, inputs), base, 1e-10)
    moved = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert any("lora_A" in key for key in moved) and any("lora_B" in key for key in moved)
    assert any(".weight" in key and "lora" not in key for key in moved)
    for key, parameter in model.named_parameters():  # the same numbers, at other places
        assert torch.equal(parameter.flatten().sort()[0], before[key].flatten().sort()[0])
    if own is None:  # once more changes nothing
        weights = {key: parameter.clone() for key, parameter in model.named_parameters()}
        again = model.sort_by_importance(batches, importance, progress=False)
        assert all(torch.equal(parameter, weights[key]) for key, parameter in model.named_parameters())
        for key in scores:
            close(again[key], scores[key], 1e-4)
    # and the base comes back
    restored = model.unload()
    with default_dtype(torch.float64):
        original = build(name).double().state_dict()
    assert all(torch.equal(tensor, original[key]) for key, tensor in restored.state_dict().items())
    assert not noted_orders(restored) and "peft_elastic_order" not in restored.config.to_dict()


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "t5"])
def test_in_float32(name):
    model, inputs = unsorted(name)
    before = outputs(model, inputs)
    model.sort_by_importance(calibration(name), progress=False)
    close(outputs(model, inputs), before, 1e-5)


def test_the_bias_of_t5_moves_with_the_heads():
    model, inputs = unsorted("t5")
    before = outputs(model, inputs)
    bias = model.get_base_model().encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.clone()
    scores = {"encoder.block": torch.tensor([1.0, 4.0, 2.0, 3.0])}
    model.sort_by_importance(importance=scores)
    now = model.get_base_model().encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert torch.equal(now, bias[:, [1, 3, 2, 0]])
    close(outputs(model, inputs), before)


def test_a_model_without_adapters():
    model = tiny_llama()
    before = outputs(model, inputs_of("llama"))
    sort_by_importance(model, "magnitude", kinds=("mlp",))
    close(outputs(model, inputs_of("llama")), before)
    assert set(noted_orders(model)) == {"model.layers.0", "model.layers.1"}
    assert sort_by_importance(model, "none") == {}


def test_adapters_of_every_kind_move_along():
    model, inputs = unsorted(lora_bias=True)
    model.add_adapter("dora", ElasticLoraConfig(**PLAIN | {"use_dora": True, "target_modules": "all-linear"}))
    model.add_adapter("plain", ElasticLoraConfig(**PLAIN))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = {}
    for name in ("default", "dora", "plain"):
        model.set_adapter(name)
        expected[name] = outputs(model, inputs)
    model.set_adapter("default")
    model.sort_by_importance(calibration("llama"), progress=False)
    for name, logits in expected.items():
        model.set_adapter(name)
        close(outputs(model, inputs), logits)


@pytest.mark.parametrize("kind", sparse_qa.KINDS)
@pytest.mark.parametrize("base", ["float", "quantised"])
def test_masks_and_grids_move_along(kind, base, tmp_path):
    model = sparse_qa.pruned(tiny_llama())
    if base == "quantised":
        if kind == "sparse":
            pytest.skip("not mergeable")
        model = sparse_qa.quantized(
            model, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        )
    twin = copy.deepcopy(model)
    settings = {**SETTINGS, "importance": "activation", **sparse_qa.KINDS[kind]}
    model = get_peft_model(model, SparseQALoraConfig(**settings)).eval()
    randomize(model)
    inputs = inputs_of("llama")
    before = outputs(model, inputs)
    model.sort_by_importance(calibration("llama"), progress=False)
    close(outputs(model, inputs), before)
    model.set_subnet("min")
    narrowed = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(twin, tmp_path).eval()
    close(outputs(loaded, inputs), narrowed, 1e-6)
    close(outputs(model.extract_subnet(sparse_kernel=False), inputs), narrowed)


# -- the formulas ------------------------------------------------------------------------------------------------------


def observed(model, batches, paths):
    """Inputs of layers, of the tokens that are no padding: path -> (tokens, features)."""
    found = {path: [] for path in paths}
    for batch in batches:
        mask = batch["attention_mask"].bool()

        def hook(module, args, path):
            found[path].append(args[0].reshape(-1, args[0].shape[-1])[mask.flatten()])

        hooks = [
            model.get_submodule(path).register_forward_pre_hook(lambda m, a, path=path: hook(m, a, path))
            for path in paths
        ]
        with torch.no_grad():
            model(**batch)
        for handle in hooks:
            handle.remove()
    return {path: torch.cat(values) for path, values in found.items()}


def name_of(key, name):
    """The name of the order whose width has this key."""
    path = key.partition(":")[2]
    kinds = {"bert": "attention.self", "gpt2": "attn"}
    return path if key.startswith("mlp") else f"{path}.{kinds.get(name, 'self_attn')}"


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "bert"])
def test_activation_by_hand(name):
    model = build(name).double()
    batches = calibration(name)
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    batches[0]["attention_mask"][1, :3] = 0
    layers = {key: entries[0] for key, entries in readers(name).items()}
    inputs = observed(model, batches, [path for path, _ in layers.values()])
    kv_heads = BLOCKS[name].kv_heads
    expected = {}
    for key, (path, _) in layers.items():
        layer = model.get_submodule(path)
        weight = layer.weight.detach()
        columns = weight.norm(dim=0) if isinstance(layer, nn.Linear) else weight.norm(dim=1)
        per_feature = (inputs[path].norm(dim=0) * columns).square()
        units = kv_heads if key.startswith("heads") else len(columns)
        expected[name_of(key, name)] = per_feature.view(units, -1).sum(1).sqrt()
    scores = sort_by_importance(model, "activation", batches, progress=False)
    assert scores.keys() == expected.keys()
    for key in scores:
        order = noted_orders(model)[key]
        assert sorted(order.tolist()) == list(range(len(order)))
        close(scores[key].double(), expected[key][order], 1e-5)  # which `test_sorting_...` found to fall


@pytest.mark.parametrize("name", ["llama", "phi3", "bert", "t5"])
def test_gradient_by_hand(name):
    """A factor of one for each unit and sequence: its gradient is the first-order change when the unit vanishes."""
    model = build(name).double()
    batches = calibration(name)
    units = {}
    for key, layers in readers(name).items():
        for path, _ in layers:
            units[path] = key, (4 if name in ("bert", "t5") else 2) if key.startswith("heads") else 48
    squares, sequences = {path: 0.0 for path in units}, 0
    for batch in batches:
        arguments = dict(batch)
        if name in CAUSAL:
            seen = batch["attention_mask"].bool()
            seen[:, 1:] &= seen[:, :-1].clone()
            arguments["labels"] = batch["input_ids"].masked_fill(~seen, -100)
        count = len(batch["input_ids"])
        factors, hooks = {}, []
        for path, (_, number) in units.items():
            factor = factors[path] = torch.ones(count, number, dtype=torch.float64, requires_grad=True)

            def hook(module, args, factor=factor):
                x = args[0]
                return ((x.unflatten(-1, (factor.shape[1], -1)) * factor[:, None, :, None]).flatten(-2), *args[1:])

            hooks.append(model.get_submodule(path).register_forward_pre_hook(hook))
        loss = model(**arguments).loss
        for path, slope in zip(factors, torch.autograd.grad(loss * count, list(factors.values()))):
            squares[path] = squares[path] + slope.square().sum(0)
        for handle in hooks:
            handle.remove()
        sequences += count
    scores = sort_by_importance(model, "gradient", batches, progress=False)
    structure = Structure(model)
    for width in structure.widths:
        for order in width.orders:
            read = [slot.path for slot in order.slots if slot.side == "in"]
            expected = (sum(squares[path] for path in read) / sequences).sqrt()
            by_rank = expected.argsort(descending=True)
            assert torch.equal(noted_orders(model)[order.name], by_rank)
            close(scores[order.name].double(), expected[by_rank], 1e-5)


def test_magnitude_by_hand():
    model = tiny_llama(attention_bias=True)
    layer = model.model.layers[1]
    mlp = layer.mlp.gate_proj.weight.abs().sum(1) + layer.mlp.up_proj.weight.abs().sum(1)
    mlp = mlp + layer.mlp.down_proj.weight.abs().sum(0)
    attention = layer.self_attn
    heads = sum(
        p.weight.abs().sum(1).view(2, -1).sum(1) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    heads = heads + attention.o_proj.weight.abs().sum(0).view(2, -1).sum(1)
    scores = sort_by_importance(model, "magnitude")
    close(scores["model.layers.1"], mlp.sort(descending=True)[0].detach())
    close(scores["model.layers.1.self_attn"], heads.sort(descending=True)[0].detach())


def test_padding_does_not_count():
    batch = inputs_of("llama")
    assert (batch["attention_mask"] == 0).any()
    other = dict(batch, input_ids=torch.where(batch["attention_mask"] == 0, 50, batch["input_ids"]))
    orders = []
    for calibrated in (batch, other):
        for importance in ("activation", "gradient"):
            model = tiny_llama()
            orders.append(sort_by_importance(model, importance, [calibrated], progress=False))
    for first, second in ((orders[0], orders[2]), (orders[1], orders[3])):
        for key in first:
            close(first[key], second[key], 1e-4)


def test_whole_groups_move_together():
    model, inputs = unsorted()
    q = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    k = model.get_base_model().model.layers[0].self_attn.k_proj.base_layer.weight.clone()
    model.sort_by_importance(importance={"model.layers.0.self_attn": [0.0, 1.0]})
    attention = model.get_base_model().model.layers[0].self_attn
    assert torch.equal(attention.q_proj.base_layer.weight, torch.cat([q[16:], q[:16]]))
    assert torch.equal(attention.k_proj.base_layer.weight, torch.cat([k[8:], k[:8]]))


def test_a_narrowed_model_is_sorted_as_a_whole():
    model, inputs = sorted_model()
    expected = outputs(model, inputs)
    order = {key: value.clone() for key, value in noted_orders(model.get_base_model()).items()}
    model.set_subnet("min")
    model.sort_by_importance(calibration("llama"), progress=False)
    assert model.active_subnet == model.search_space.min
    assert all(torch.equal(noted_orders(model.get_base_model())[key], order[key]) for key in order)
    model.set_subnet("max")
    close(outputs(model, inputs), expected)


# -- saving and loading ------------------------------------------------------------------------------------------------


FRESH = """
import sys, torch
import peft_elastic
from support.models import tiny_llama, tiny_t5
from support.elastic_models import inputs_of
from peft import PeftModel
name, folder = sys.argv[1:]
model = PeftModel.from_pretrained({"llama": tiny_llama, "t5": tiny_t5}[name](), folder).eval()
with torch.no_grad():
    torch.save((model(**inputs_of(name)).logits, dict(model.active_subnet)), folder + "/logits.pt")
"""


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_in_a_fresh_process(tmp_path, name):
    model, inputs = sorted_model(name)
    model.set_subnet("min")
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    run = run_fresh(FRESH, name, tmp_path)
    assert run.returncode == 0, run.stderr
    logits, subnet = torch.load(tmp_path / "logits.pt")
    assert subnet == dict(model.active_subnet)
    close(logits, expected, 1e-6)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "t5"])
def test_on_a_fresh_base(tmp_path, name, is_trainable):
    model, inputs = sorted_model(name)
    for subnet in ("max", "min", model.search_space.sample(3)):
        model.set_subnet(subnet)
        expected = outputs(model, inputs)
        model.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["sorted_base"] is True
        loaded = PeftModel.from_pretrained(build(name), tmp_path, is_trainable=is_trainable).eval()
        assert torch.equal(outputs(loaded, inputs), expected)
        with loaded.disable_adapter():
            close(outputs(loaded, inputs), outputs(build(name), inputs))
        loaded.set_subnet("min")  # sorted, so it may be narrowed
    base = loaded.unload()
    original = original_weights(name)
    assert all(torch.equal(tensor, original[key]) for key, tensor in base.state_dict().items())


def test_magnitude_sorts_by_itself(tmp_path):
    model, inputs = unsorted(importance="magnitude")
    close(outputs(model, inputs), outputs(adapted_twin(model), inputs))
    model.set_subnet("min")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))


def adapted_twin(model):
    """The same adapter on an unsorted base."""
    twin = adapted(tiny_llama(), importance="none")
    orders = noted_orders(model.get_base_model())
    assert orders and any(not torch.equal(order, torch.arange(len(order))) for order in orders.values())
    scores = {key: torch.argsort(order).neg().float() for key, order in orders.items()}
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    # its adapter goes where the units come from
    undo = {key: -order.float() for key, order in orders.items()}
    moved = adapted(tiny_llama(), importance="none")
    moved.load_state_dict(model.state_dict())
    moved.sort_by_importance(importance=undo)
    for key, tensor in tiny_llama().state_dict().items():
        other = moved.get_base_model().state_dict()
        assert torch.equal(other.get(key, other.get(key.replace(".weight", ".base_layer.weight"))), tensor)
    assert scores
    return moved


def test_a_second_adapter_on_a_sorted_base(tmp_path):
    first, inputs = sorted_model()
    first.set_subnet("min")
    first.save_pretrained(tmp_path / "first")
    # trained later, on the same order
    second = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first", is_trainable=True).eval()
    randomize(second, seed=9)
    second.set_subnet(second.search_space.sample(1))
    second.save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "first", adapter_name="first").eval()
    model.load_adapter(tmp_path / "second", adapter_name="second")
    for _ in range(2):
        for name, own in (("first", first), ("second", second)):
            model.set_adapter(name)
            close(outputs(model, inputs), outputs(own, inputs), 1e-6)
    # one in another order
    other, _ = unsorted()
    other.sort_by_importance(calibration("llama"), "gradient", progress=False)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="sorts the heads or channels of the base in another way"):
        model.load_adapter(tmp_path / "other", adapter_name="other")


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("sorted_first", [True, False])
def test_a_plain_elastic_adapter_beside(tmp_path, sorted_first, settings):
    first, inputs = sorted_model(elastic_ranks=[5])
    first.save_pretrained(tmp_path / "first")
    config = ElasticLoraConfig(**PLAIN | settings | {"target_modules": "all-linear"})
    plain = get_peft_model(tiny_llama(), config).eval()
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    plain.save_pretrained(tmp_path / "plain")
    folders = ["first", "plain"] if sorted_first else ["plain", "first"]
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / folders[0], adapter_name=folders[0]).eval()
    model.load_adapter(tmp_path / folders[1], adapter_name=folders[1])
    for name, own in (("first", first), ("plain", plain)):
        model.set_adapter(name)
        close(outputs(model, inputs), outputs(own, inputs))
    # and again from there
    model.save_pretrained(tmp_path / "both")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "both" / "plain").eval()
    close(outputs(loaded, inputs), outputs(plain, inputs))
    for folder in ("first", "plain"):
        saved = json.loads((tmp_path / "both" / folder / "adapter_config.json").read_text())
        assert saved["sorted_base"] is True


def test_a_rounded_adapter_without_width_beside(tmp_path):
    first, inputs = sorted_model()
    first.save_pretrained(tmp_path / "first")
    config = SparseQALoraConfig(**PLAIN, sparse_adapter=False, **sparse_qa.QUANTIZED)
    rounded = get_peft_model(tiny_llama(), config).eval()
    randomize(rounded)
    rounded.save_pretrained(tmp_path / "rounded")
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "rounded", adapter_name="rounded").eval()
    config = SparseQALoraConfig(**{**SETTINGS, "importance": "magnitude", "sparse_adapter": False})
    model = PeftModel.from_pretrained(get_base(config, tmp_path), tmp_path / "sorted", adapter_name="sorted").eval()
    model.load_adapter(tmp_path / "rounded", adapter_name="rounded")
    model.set_adapter("rounded")
    close(outputs(model, inputs), outputs(rounded, inputs))


def get_base(config, tmp_path):
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "sorted")
    return tiny_llama()


def test_transformers_own_loading_is_an_error(tmp_path):
    """It knows nothing of the order in the file, and would compute something else."""
    model, inputs = sorted_model()
    model.save_pretrained(tmp_path)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="load it with `PeftModel.from_pretrained`"):
        outputs(loaded, inputs)
    # of an adapter without width that was saved from a sorted base, too
    model.add_adapter("plain", ElasticLoraConfig(**PLAIN))
    model.save_pretrained(tmp_path / "both")
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path / "both" / "plain"))
    with pytest.raises(ValueError, match="load it with `PeftModel.from_pretrained`"):
        outputs(loaded, inputs)


@TRANSFORMERS_ADAPTERS
def test_transformers_own_integration_of_a_new_adapter(tmp_path):
    model = tiny_llama()
    model.add_adapter(ElasticLoraConfig(**{**SETTINGS, "importance": "activation"}))
    randomize(model, std=0.1)
    inputs = inputs_of("llama")
    before = outputs(model, inputs)
    host = get_elastic_host(model)
    host.sort_by_importance(calibration("llama"), progress=False)
    close(outputs(model, inputs), before)
    host.set_subnet("min")
    narrowed = outputs(model, inputs)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["sorted_base"] is True
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    close(outputs(loaded, inputs), narrowed)


def test_a_file_without_its_order(tmp_path):
    from safetensors.torch import load_file, save_file

    model, _ = sorted_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    del config["weights_crc32"]  # by which every other file would be refused
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    orders = [key for key in tensors if key.endswith("elastic_order")]
    assert len(orders) == 4 and all(tensors[key].dtype == torch.int32 for key in orders)
    save_file({k: v for k, v in tensors.items() if k not in orders}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="its file does not hold the order; it is damaged"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    wrong = dict(tensors)
    wrong[orders[0]] = torch.zeros_like(tensors[orders[0]])
    save_file(wrong, path, {"format": "pt"})
    with pytest.raises(ValueError, match="does not belong to this model"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises((ValueError, RuntimeError)):
        PeftModel.from_pretrained(tiny_llama(intermediate_size=64), tmp_path)


# -- sorted models on disk ---------------------------------------------------------------------------------------------


def test_a_checkpoint_of_a_sorted_base_is_not_sorted_twice(tmp_path):
    model = tiny_llama()
    sort_by_importance(model, "magnitude")
    model.save_pretrained(tmp_path / "base")
    model = adapted(model, importance="none")
    model.set_subnet("min")
    inputs = inputs_of("llama")
    expected = outputs(model, inputs)
    model.save_pretrained(tmp_path / "adapter")
    on_original = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    close(outputs(on_original, inputs), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    weights = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    on_sorted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    close(outputs(on_sorted, inputs), expected)
    back = on_sorted.unload()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in back.state_dict().items())
    # that of another order is refused
    other = tiny_llama()
    sort_by_importance(other, {"model.layers.0": torch.rand(48)})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="sorted when it was saved, in another order"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "other"), tmp_path / "adapter")
    # an adapter that was trained on the checkpoint itself needs no order
    own = adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), importance="none")
    own.set_subnet("min")
    own.save_pretrained(tmp_path / "own")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "own"
    ).eval()
    assert torch.equal(outputs(loaded, inputs), outputs(own, inputs))


def test_unload_gives_back_the_base_that_was_given():
    base = tiny_llama()
    sort_by_importance(base, "magnitude")
    weights = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = adapted(base, importance="activation")
    model.sort_by_importance(calibration("llama"), progress=False)
    back = model.unload()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in back.state_dict().items())
    # unloaded from an unsorted one, it is not sorted: the next adapter must not believe it is
    model, _ = sorted_model()
    model = adapted(model.unload(), importance="activation")
    with pytest.raises(ValueError, match="not sorted by importance"):
        model.set_subnet("min")


def test_merged_models_stay_sorted(tmp_path):
    model, inputs = sorted_model()
    expected = outputs(model, inputs)
    merged = model.merge_and_unload(sparse_kernel=False)
    close(outputs(merged, inputs), expected)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(outputs(loaded, inputs), expected)


# -- out of a sorted base ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "t5"])
@pytest.mark.parametrize("settings", [{}, {"bias": "all"}, {"lora_bias": True}], ids=str)
def test_export_is_in_the_original_order(tmp_path, name, settings):
    model, inputs = unsorted(name, elastic_ranks=[5, 2], **settings)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.sort_by_importance(calibration(name), progress=False)
    for subnet in (
        model.search_space.max,
        {**model.search_space.max, **{k: 2 for k in model.search_space.max if "rank" in k}},
    ):
        model.set_subnet(subnet)
        model.export_lora(tmp_path / "plain")
        stock = PeftModel.from_pretrained(build(name), tmp_path / "plain").eval()
        assert type(stock.peft_config["default"]) is LoraConfig
        close(outputs(stock, inputs), outputs(model, inputs))
        shutil.rmtree(tmp_path / "plain")


def test_export_of_a_narrowed_subnet_is_refused(tmp_path):
    model, inputs = sorted_model(elastic_depth="1.mlp")
    for key, value in (("mlp:model.layers.0", 8), ("heads:model.layers.1", 2), ("depth:model.layers.1.mlp", 0)):
        model.set_subnet({**model.search_space.max, key: value})
        expected = outputs(model, inputs)
        with pytest.raises(ValueError, match=f"'{key}'.*which a plain LoRA adapter cannot say"):
            model.export_lora(tmp_path / "plain")
        assert not (tmp_path / "plain").exists() and torch.equal(outputs(model, inputs), expected)


def test_export_of_another_adapter_than_the_narrowed_one(tmp_path):
    model, inputs = sorted_model()
    model.add_adapter("plain", ElasticLoraConfig(**PLAIN))
    randomize(model, seed=3, adapter_name="plain")
    model.set_adapter("plain")
    expected = outputs(model, inputs)
    model.set_adapter("default")
    model.set_subnet("min")
    model.export_lora(tmp_path, adapter_name="plain")
    close(outputs(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval(), inputs), expected)


def test_pissa_on_a_base_that_is_sorted_later(tmp_path):
    config = {**SETTINGS, "importance": "activation", "init_lora_weights": "pissa"}
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**config)).eval()
    model.save_pretrained(tmp_path / "initial")
    inputs = inputs_of("llama")
    before = outputs(model, inputs)
    model.sort_by_importance(calibration("llama"), progress=False)
    close(outputs(model, inputs), before)
    with pytest.raises(ValueError, match="does not work with a base that was sorted after"):
        model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial")
    with pytest.raises(ValueError, match="fits only the base weights it has changed"):
        model.export_lora(tmp_path / "plain")


def test_pissa_with_depth_is_converted(tmp_path):
    config = {**SETTINGS, "elastic_width": None, "elastic_depth": "all", "init_lora_weights": "pissa"}
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**config)).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    randomize(model, std=0.05)
    model.set_subnet({**model.search_space.max, "depth:model.layers.1": 0})
    expected = outputs(model, inputs_of("llama"))
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "initial")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "converted").eval()
    assert loaded.active_subnet["depth:model.layers.1"] == 0
    close(outputs(loaded, inputs_of("llama")), expected, 1e-4)


def test_weighted_adapters_of_a_sorted_base():
    model, inputs = sorted_model()
    model.add_weighted_adapter(["default"], [1.0], "copy", "linear")
    model.set_subnet("min")
    expected = outputs(model, inputs)
    model.set_adapter("copy")
    model.set_subnet("min", adapter_name="copy")
    close(outputs(model, inputs), expected)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"importance": "l1"}, "`importance` must be one of"),
        ({"importance": 3}, "`importance` must be one of"),
        ({"importance": ["magnitude"]}, "`importance` must be one of"),
        ({"importance": "activation"}, "`calibration`: importance 'activation' needs data"),
        ({"importance": "activation", "calibration": []}, "calibration: it yielded no data"),
        ({"importance": "activation", "calibration": 3}, "`calibration` must be an iterable of batches, got 3"),
        ({"importance": "magnitude", "kinds": ("neurons",)}, "`kinds` must be"),
        ({"importance": "magnitude", "kinds": ()}, "`kinds` must be"),
        ({"importance": {"layers.0": [1.0]}}, "scores for 'layers.0'; the names of this model are"),
        ({"importance": {"model.layers.0": [1.0]}}, r"'model.layers.0' must be 48 finite numbers, got shape \(1,\)"),
        ({"importance": {"model.layers.0.self_attn": [1.0, float("nan")]}}, "must be 2 finite numbers"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, message):
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        sort_by_importance(model, **{"progress": False, **arguments})
    original = original_weights()
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.state_dict().items())


def test_losses_that_are_not_there():
    with pytest.raises(ValueError, match="'gradient' needs batches with `labels`"):
        sort_by_importance(build("bert"), "gradient", [inputs_of("bert")], progress=False)
    with pytest.raises(ValueError, match="'gradient' needs batches with `labels`"):
        sort_by_importance(tiny_t5(), "gradient", [inputs_of("t5")], progress=False)
    with pytest.raises(ValueError, match="has no block whose heads or mlp are known"):
        sort_by_importance(nn.Linear(3, 3), "magnitude")


def test_layers_that_cannot_be_sorted():
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    layer = bnb.nn.Linear8bitLt(48, 32, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(
        model.model.layers[1].mlp.down_proj.weight.data, requires_grad=False, has_fp16_weights=False
    )
    model.model.layers[1].mlp.down_proj = layer.to("cpu")
    with pytest.raises(
        ValueError, match="'model.layers.1.mlp.down_proj' is of type Linear8bitLt, whose packed weight"
    ):
        sort_by_importance(model, "magnitude")
    with pytest.raises(ValueError, match="whose packed weight"):
        adapted(model, importance="magnitude")
    assert not any("lora" in name for name, _ in model.named_modules())


def test_sorting_through_the_function_and_the_method():
    model, inputs = unsorted()
    before = outputs(model, inputs)
    sort_by_importance(model, "magnitude")  # a PeftModel
    close(outputs(model, inputs), before)
    model.set_subnet("min")
    with pytest.raises(ValueError, match=r"A part of `model` is not active.*set_subnet\('max'\)"):
        sort_by_importance(model, "magnitude")
    model, _ = elastic("llama", elastic_width=None)
    with pytest.raises(ValueError, match="No adapter has an `elastic_width`"):
        model.sort_by_importance()
    model, _ = unsorted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.sort_by_importance(importance="magnitude")


def test_magnitude_does_not_sort_under_another_adapter():
    model, inputs = elastic("llama", adapter_name="a")
    model.set_subnet("min")
    expected = outputs(model, inputs)
    with pytest.raises(ValueError, match="would sort the base under adapter 'a'"):
        model.add_adapter("b", ElasticLoraConfig(**{**SETTINGS, "importance": "magnitude"}))
    assert torch.equal(outputs(model, inputs), expected) and "b" not in model.peft_config
