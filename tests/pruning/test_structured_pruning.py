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
"""Structured pruning as a user sees it: what is left computes the same as the masked whole, is a model that loads and trains, and
nothing is touched that should not be; plans; what is refused."""

import json
import math
import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from support.elastic_models import ALL, adapted, build, close, inputs_of
from support.fresh import run_fresh
from support.masked_states import (
    CLASSIFIERS,
    calibration_of,
    choices_of,
    deeper,
    random_state,
    same,
    snapshot,
    without,
)
from support.models import T5S, outputs, tiny_gpt2, tiny_llama, tiny_llama_classifier, tiny_phi, tokens
from transformers import AutoModelForCausalLM

from peft_elastic import (
    BlockPrunerConfig,
    ElasticLoraConfig,
    MultiPrunerConfig,
    PruningPlan,
    RTNConfig,
    TwoStagePrunerConfig,
    WidthPrunerConfig,
    prune_structured,
    quantize,
    sort_by_importance,
)
from peft_elastic.pruning.structured import StructuredPruningConfig
from peft_elastic.pruning.structured.plan import describe_model
from peft_elastic.structure.blocks import Structure
from peft_elastic.structure.narrow import is_narrowed


pytestmark = pytest.mark.filterwarnings("ignore")

GENERATE = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
EVERYTHING = {"stages": ("blocks", "sub-blocks", "channels", "heads"), "split": (25, 25, 40, 10), "mlp_group": 4}
CONFIG = MultiPrunerConfig(ratio=0.4, **EVERYTHING)


def prune(model, name="llama", config=CONFIG, **kwargs):
    return prune_structured(model, config, calibration_of(name), **{"progress": False, **kwargs})


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def sorted_as(plan, model, name):
    """A copy of the whole model in the order of the plan, by hand: the units that are kept in front."""
    widths = {order.name: width.units for width in Structure(model).widths for order in width.orders}
    scores = {
        key: torch.tensor(
            [float(len(kept) - kept.index(unit)) if unit in kept else 0.0 for unit in range(widths[key])]
        )
        for key, kept in plan.units.items()
    }
    if scores:
        sort_by_importance(model, scores, progress=False)
    return model


# -- what is left ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "order"), [*((name, "activation") for name in ALL), ("llama", "none"), ("gpt2", "none"), ("t5", "none")]
)
def test_extracted_narrowed_and_masked(name, order, tmp_path):
    model, inputs = deeper(name), inputs_of(name)
    config = MultiPrunerConfig(ratio=0.4, order=order, **EVERYTHING)
    whole = outputs(model, inputs)
    plan = prune(model, name, config)
    found = outputs(model, inputs)
    assert not is_narrowed(model) and (found - whole).abs().max() > 1e-3
    assert parameters(model) == plan.after["parameters"] and parameters(deeper(name)) == plan.before["parameters"]
    assert plan.after["parameters"] == pytest.approx(0.6 * plan.before["parameters"], rel=0.1)
    # hooks on the whole model in the order of the plan
    reference = sorted_as(plan, deeper(name), name)
    with without(reference, name, plan.values):
        close(found, outputs(reference, inputs))
    # narrowed, and whole again
    narrowed = deeper(name)
    before = snapshot(narrowed)
    plan.narrow(narrowed)
    assert is_narrowed(narrowed)
    close(outputs(narrowed, inputs), found)
    plan.restore(narrowed)
    same(before, snapshot(narrowed))
    # whole key-value groups, and something of everything that is there
    structure = Structure(model)
    for width in structure.widths:
        assert width.full >= 1 and width.full % width.units == 0
    for stack in {block.stack for block in structure.blocks}:
        assert any(len(block.removed) < 2 for block in structure.blocks if block.stack == stack)
    # on disk
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    close(outputs(loaded, inputs), found, 1e-6)
    assert loaded.state_dict().keys() == model.state_dict().keys() and parameters(loaded) == parameters(model)
    if model.can_generate():
        ids = tokens(2, 5)
        with_cache = model.generate(ids, **GENERATE)
        assert torch.equal(with_cache, model.generate(ids, **GENERATE, use_cache=False))
        assert torch.equal(with_cache, loaded.generate(ids, **GENERATE))


FRESH = """
import sys, torch
import peft_elastic, transformers
from support.models import tokens
from support.elastic_models import inputs_of
results = {}
for folder in sys.argv[2:]:
    kind, name = folder.rsplit("/", 1)[1].split("-")[:2]
    model = getattr(transformers, kind).from_pretrained(folder)
    with torch.no_grad():
        results[folder] = model(**inputs_of(name)).logits
    if kind == "AutoModelForCausalLM":
        options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
        results[folder, True] = model.generate(tokens(2, 5), **options)
        results[folder, False] = model.generate(tokens(2, 5), **options, use_cache=False)
torch.save(results, sys.argv[1])
"""


def test_in_a_fresh_process(tmp_path):
    """Blocks of different widths, attentions and MLPs and blocks that are not there, and of a plan for another share."""
    kinds = {
        "bert": "AutoModelForSequenceClassification",
        "vit": "AutoModelForImageClassification",
        "t5": "AutoModelForSeq2SeqLM",
    }
    expected, kept = {}, []
    for name in ("llama", "gemma3", "gpt2", "opt", "phi3", "bert", "vit", "t5"):
        for ratio in (0.2, 0.45) if name == "llama" else (0.4,):
            model = deeper(name, 5)
            plan = prune(model, name, MultiPrunerConfig(ratio=ratio, order="l1", **EVERYTHING))
            kind = kinds.get(name, "AutoModelForCausalLM")
            folder = tmp_path / f"{kind}-{name}-{ratio}"
            model.save_pretrained(folder)
            expected[str(folder)] = outputs(model, inputs_of(name))
            kept.append(plan)
            if kind == "AutoModelForCausalLM":
                for cache in (True, False):
                    expected[str(folder), cache] = model.generate(tokens(2, 5), **GENERATE, use_cache=cache)
                assert torch.equal(expected[str(folder), True], expected[str(folder), False])
    stages = {row["stage"] for plan in kept for row in plan.history}
    assert stages == {"blocks", "sub-blocks", "channels", "heads"}, "not all of it is tested"
    run = run_fresh(FRESH, tmp_path / "results.pt", *[key for key in expected if isinstance(key, str)])
    assert run.returncode == 0, run.stderr
    results = torch.load(tmp_path / "results.pt")
    assert results.keys() == expected.keys()
    for key, wanted in expected.items():
        assert torch.equal(results[key], wanted), key


@pytest.mark.slow
def test_what_is_alike_loads_without_this_package(tmp_path):
    """All blocks with the same width, or whole blocks removed."""
    expected = {}
    uniform = WidthPrunerConfig(ratio=0.1, stages=("channels",), split=(1,), choose="uniform", order="l1", mlp_group=8)
    fewer = BlockPrunerConfig(ratio=0.3, stages=("blocks",))
    for name in ("llama", "gpt2"):
        for number, config in enumerate((uniform, fewer)):
            model = deeper(name)
            # as much as all blocks lose with one group each
            whole = parameters(model)
            if config is uniform:
                config = WidthPrunerConfig(
                    **{**vars(config), "ratio": 4 * 8 * 32 * (2 if name == "gpt2" else 3) / whole, "choose": "uniform"}
                )
            plan = prune(model, name, config)
            folder = tmp_path / f"{name}-{number}"
            model.save_pretrained(folder)
            saved = json.loads((folder / "config.json").read_text())
            assert not {"quantization_config", "per_layer_config", "peft_elastic_blocks"} & saved.keys(), plan
            expected[str(folder)] = outputs(model, {"input_ids": tokens()})
    script = """
import sys
sys.modules["peft_elastic"] = None
import torch, transformers
from support.models import tokens
results = {}
for folder in sys.argv[2:]:
    with torch.no_grad():
        results[folder] = transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens()).logits
torch.save(results, sys.argv[1])
"""
    run = run_fresh(script, tmp_path / "results.pt", *expected)
    assert run.returncode == 0, run.stderr
    results = torch.load(tmp_path / "results.pt")
    for key, wanted in expected.items():
        close(results[key], wanted, 1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "t5"])
def test_once_more(name, tmp_path):
    """The second plan is one of the smaller model."""
    model, inputs = deeper(name, 5), inputs_of(name)
    prune(model, name, MultiPrunerConfig(ratio=0.25, **EVERYTHING))
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first")
    once = parameters(model)
    second = prune(model, name, MultiPrunerConfig(ratio=0.25, **EVERYTHING))
    assert second.before["parameters"] == once and second.after["parameters"] == parameters(model) < 0.85 * once
    found = outputs(model, inputs)
    again = prune(loaded, name, MultiPrunerConfig(ratio=0.25, **EVERYTHING))
    assert again.values == second.values and again.units == second.units
    close(outputs(loaded, inputs), found)
    model.save_pretrained(tmp_path / "second")
    close(outputs(type(model).from_pretrained(tmp_path / "second"), inputs), found, 1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_elastic_afterwards(name):
    """The largest subnet of a super-network on what is left is what is left."""
    model, inputs = deeper(name, 5), inputs_of(name)
    plan = prune(model, name)
    expected = outputs(model, inputs)
    elastic = adapted(model, elastic_depth="all.mlp", elastic_width={"heads": [1.0, 0.5], "mlp": [1.0, 0.5]})
    with elastic.disable_adapter():
        close(outputs(elastic, inputs), expected)
    elastic.set_subnet("min")
    elastic.set_subnet("max")
    largest = elastic.extract_subnet("max", sparse_kernel=False)
    assert parameters(largest) == plan.after["parameters"]
    with pytest.raises(ValueError, match="^model: it has "):
        prune(elastic)
    with pytest.raises(ValueError, match="^model: it has "):
        plan.extract(elastic.get_base_model())


def test_lora_on_what_is_left(tmp_path):
    model = tiny_llama(num_hidden_layers=5)
    prune(model)
    model.save_pretrained(tmp_path / "base")
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = tokens()
    optimizer = torch.optim.Adam([p for p in lora.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(6):
        loss = lora(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    lora.eval()
    expected = outputs(lora, {"input_ids": ids})
    lora.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    close(outputs(loaded, {"input_ids": ids}), expected)
    merged = lora.merge_and_unload()
    close(outputs(merged, {"input_ids": ids}), expected)
    merged.save_pretrained(tmp_path / "merged")
    close(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), {"input_ids": ids}), expected)


def test_tied_embeddings_count_once(tmp_path):
    model = tiny_llama(num_hidden_layers=4, tie_word_embeddings=True)
    plan = prune(model)
    assert plan.after["parameters"] == parameters(model) and model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight and parameters(loaded) == parameters(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny_llama(num_hidden_layers=4).to(dtype)
    plan = prune(model)
    assert parameters(model) == plan.after["parameters"] and {p.dtype for p in model.parameters()} == {dtype}
    assert torch.isfinite(outputs(model, {"input_ids": tokens()})).all()


def test_classifiers_of_decoders(tmp_path):
    """Which have no output layer for tokens, and a loss of their own."""
    model = tiny_llama_classifier(num_hidden_layers=4)
    batches = [{"input_ids": tokens(3, 6), "labels": torch.tensor([0, 1, 2])}]
    plan = prune_structured(model, CONFIG, batches, progress=False)
    assert plan.metric == "loss" and parameters(model) == plan.after["parameters"]
    expected = -outputs(model, batches[0]).log_softmax(-1)[range(3), batches[0]["labels"]].mean()
    assert plan.after["loss"] == pytest.approx(float(expected), rel=1e-5)
    model.save_pretrained(tmp_path)
    close(outputs(type(model).from_pretrained(tmp_path), batches[0]), outputs(model, batches[0]), 1e-6)


def test_perplexities():
    """Those of the plan are the exponentials of a language model's loss, before and after."""
    model = tiny_llama(num_hidden_layers=4)
    ids = tokens(4, 9)
    before = float(model(input_ids=ids, labels=ids).loss.exp())
    plan = prune_structured(model, CONFIG, [ids[:1], ids[1:]], progress=False)
    after = float(model(input_ids=ids, labels=ids).loss.exp())
    assert plan.before["perplexity"] == pytest.approx(before, rel=1e-5)
    assert plan.after["perplexity"] == pytest.approx(after, rel=1e-5) == plan.history[-1]["value"]


def test_a_bar_of_progress(capsys):
    model = tiny_llama(num_hidden_layers=4)
    prune_structured(model, MultiPrunerConfig(ratio=0.2, order="l1"), calibration_of("llama"), extract=False)
    shown = capsys.readouterr().err
    assert "pruning: 100%" in shown and "evaluations" in shown and "parameters" in shown
    prune(model)
    captured = capsys.readouterr()
    assert not captured.out and not captured.err


def test_opt_with_everything_at_once():
    """Its layers are skipped and narrowed themselves: what one candidate leaves behind must not get into the next."""
    plan = prune(deeper("opt"), "opt", MultiPrunerConfig(ratio=0.3, split="auto", mlp_group=16, order="none"))
    alone = deeper("opt")
    plan.extract(alone)
    reference = deeper("opt")
    with without(reference, "opt", plan.values):
        close(outputs(alone, inputs_of("opt")), outputs(reference, inputs_of("opt")))


# -- nothing is touched ----------------------------------------------------------------------------------------------------


def files_of(model, folder):
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma", "bert", "t5"])
def test_nothing_to_remove(name, with_data, tmp_path):
    model = deeper(name)
    model.train()
    if name == "bert":
        model.config.problem_type = "single_label_classification"  # transformers notes it in every forward with labels
    files, before = files_of(model, tmp_path / "before"), snapshot(model)
    plan = prune_structured(
        model, MultiPrunerConfig(ratio=0), calibration_of(name) if with_data else None, progress=False
    )
    same(before, snapshot(model))
    assert files_of(model, tmp_path / "after") == files
    assert plan.values == plan.units == {} and plan.history == [] and plan.before == plan.after
    assert (plan.metric in plan.before) == with_data


@pytest.mark.parametrize("extract", [True, False])
@pytest.mark.parametrize("ratio", [0, 0.3])
def test_a_model_that_is_sorted_already(extract, ratio, tmp_path):
    """And one that was loaded so, whose adapters ask for that order."""
    model = tiny_llama(num_hidden_layers=4)
    sort_by_importance(model, "magnitude")
    model.save_pretrained(tmp_path / "sorted")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sorted")
    for one in (model, reloaded):
        before = snapshot(one)
        expected = outputs(one, {"input_ids": tokens()})
        plan = prune(one, config=MultiPrunerConfig(ratio=ratio), extract=extract)
        if ratio == 0 or not extract:
            same(before, snapshot(one))
            assert torch.equal(outputs(one, {"input_ids": tokens()}), expected)
        else:
            assert parameters(one) == plan.after["parameters"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "vit"])
@pytest.mark.parametrize("training", [True, False])
def test_without_extraction_the_model_is_as_it_was(name, training):
    model = deeper(name)
    model.train(training)
    next(model.parameters()).requires_grad_(False)
    if name == "vit":
        model.config.problem_type = "single_label_classification"  # transformers notes it in every forward with labels
    if training:
        model.get_submodule(
            next(path for path, m in model.named_modules() if isinstance(m, torch.nn.Dropout) or path)
        ).eval()
    if hasattr(model.config, "use_cache"):
        assert model.config.use_cache
    before = snapshot(model)
    plan = prune(model, name, extract=False)
    same(before, snapshot(model))
    extracted = deeper(name)
    assert prune(extracted, name).values == plan.values
    plan.extract(model)
    assert parameters(model) == parameters(extracted) and model.training == training
    close(outputs(model.eval(), inputs_of(name)), outputs(extracted, inputs_of(name)), 1e-6)


@pytest.mark.parametrize("calls", [1, 2, 9, 20])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
def test_after_an_exception_the_model_is_as_it_was(error, calls):
    model = tiny_llama(num_hidden_layers=4)
    model.train()
    before = snapshot(model)
    seen = []

    def metric(model):
        seen.append(model.config.use_cache)
        if len(seen) == calls:
            raise error("stop")
        return float(outputs(model, {"input_ids": tokens()}).square().mean())

    with pytest.raises(error, match="stop"):
        prune(model, metric=metric)
    same(before, snapshot(model))
    assert seen == [False] * calls


def test_interrupted_anywhere():
    """Also between two changes of the model: at every line of the code that makes them, one after the other."""
    import sys

    model = tiny_llama(num_hidden_layers=3)
    before = snapshot(model)
    config = BlockPrunerConfig(ratio=0.3, order="none")
    reached = 0
    for target in range(0, 400, 7):
        count = 0

        def local(frame, event, arg):
            nonlocal count
            if event == "line":
                count += 1
                if count == target:
                    raise KeyboardInterrupt
            return local

        def trace(frame, event, arg):
            inside = frame.f_code.co_filename.endswith(("structure/space.py", "structure/narrow.py"))
            walking = frame.f_code.co_name in ("activate", "set_skipped", "set_width", "set_active")
            while frame.f_back and frame.f_code.co_name in ("activate", "set_skipped", "set_width", "set_active"):
                frame = frame.f_back
            # not in what puts the model back
            return local if inside and walking and frame.f_code.co_name != "make_plan" else None

        sys.settrace(trace)
        try:
            prune(model, config=config, metric=lambda m: 1.0, extract=False)
        except KeyboardInterrupt:
            reached += 1
        finally:
            sys.settrace(None)
        same(before, snapshot(model))
    assert reached > 20


def test_after_ctrl_c_the_model_is_as_it_was(ctrl_c):
    model = tiny_llama(num_hidden_layers=4)
    before = snapshot(model)
    calls = []
    handle = model.lm_head.register_forward_hook(
        lambda *_: calls.append(1) or (len(calls) == 30 and os.kill(os.getpid(), signal.SIGINT)) or None
    )
    with pytest.raises(KeyboardInterrupt):
        prune(model)
    handle.remove()
    same(before, snapshot(model))


# -- plans -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_plan():
    return prune(tiny_llama(num_hidden_layers=5), extract=False)


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 10**12)
words = st.text(max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    values=st.dictionaries(words, st.integers(0, 10**6), max_size=4),
    units=st.dictionaries(words, st.lists(st.integers(0, 10**4), max_size=5), max_size=3),
    before=st.dictionaries(words, numbers, max_size=4),
    history=st.lists(
        st.fixed_dictionaries({"stage": words, "left": st.integers(0, 9), "value": st.none() | numbers}), max_size=4
    ),
    config=st.dictionaries(words, st.none() | numbers | words | st.lists(words, max_size=2), max_size=4),
    metric=words,
)
def test_plans_as_text(values, units, before, history, config, metric):
    plan = PruningPlan(
        "multipruner", config, {"class": "X", "blocks": {}}, values, units, before, before, metric, history
    )
    assert PruningPlan.from_json(plan.to_json()) == plan


def test_a_plan_on_disk(llama_plan, tmp_path):
    llama_plan.save(tmp_path / "plan.json")
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded == llama_plan and str(loaded) == str(llama_plan)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    text = str(llama_plan)
    assert "multipruner" in text and f"{llama_plan.after['parameters']:,}" in text and "perplexity" in text
    with pytest.raises(FileNotFoundError):
        PruningPlan.load(tmp_path / "none.json")
    data = json.loads(llama_plan.to_json())
    for name, content, message in (
        ("text", "hello", "not valid JSON"),
        ("list", "[]", "not a pruning plan"),
        ("other", "{}", "not a pruning plan"),
        ("newer", json.dumps({**data, "version": 2}), "version 2"),
        ("less", json.dumps({k: v for k, v in data.items() if k != "values"}), "not a pruning plan: .*values"),
        ("more", json.dumps({**data, "extra": 1}), "not a pruning plan: .*extra"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message) as error:
            PruningPlan.load(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


PLANS = """
import sys, torch
from peft_elastic import PruningPlan
from support.elastic_models import inputs_of
from support.masked_states import deeper
from support.models import outputs
results = {}
for path in sys.argv[2:]:
    name = path.rsplit("/", 1)[1].removesuffix(".json")
    model = deeper(name)
    PruningPlan.load(path).extract(model)
    results[path] = outputs(model, inputs_of(name))
torch.save(results, sys.argv[1])
"""


@pytest.mark.slow
def test_a_plan_in_a_fresh_process(tmp_path):
    expected = {}
    for name in ("llama", "gpt2", "t5"):
        model = deeper(name)
        plan = prune(model, name)
        path = tmp_path / f"{name}.json"
        plan.save(path)
        expected[str(path)] = outputs(model, inputs_of(name))
    run = run_fresh(PLANS, tmp_path / "results.pt", *expected)
    assert run.returncode == 0, run.stderr
    results = torch.load(tmp_path / "results.pt")
    for path, wanted in expected.items():
        assert torch.equal(results[path], wanted), path


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(seed=st.integers(0, 10**6))
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_any_plan_narrows_restores_and_extracts(name, seed):
    """Random values and random units, not those of an order of importance."""
    model, inputs = deeper(name), inputs_of(name)
    values = random_state(model, seed, 6)
    structure = Structure(model)
    for block in structure.blocks:  # what is skipped has no width
        for kind, part in (("heads", "attention"), ("mlp", "mlp")):
            if 0 in (values.get(f"depth:{block.path}"), values.get(f"depth:{block.path}.{part}")):
                values.pop(f"{kind}:{block.path}", None)
    generator = torch.Generator().manual_seed(seed)
    units = {}
    for width in structure.widths:
        value = values.get(f"{width.kind}:{width.name}")
        for order in width.orders if value is not None else ():
            units[order.name] = torch.randperm(width.units, generator=generator)[: value // width.unit].tolist()
    plan = PruningPlan("mine", {}, describe_model(model, structure), values, units, {}, {})
    before, whole = snapshot(model), outputs(model, inputs)
    gone = {
        b.path
        for b in structure.blocks
        if values.get(f"depth:{b.path}") == 0
        or all(values.get(f"depth:{b.path}.{p}") == 0 for p in ("attention", "mlp"))
    }
    if not all(
        any(b.stack == stack and b.path not in gone for b in structure.blocks)
        for stack in {b.stack for b in structure.blocks}
    ):
        for call in (plan.narrow, plan.extract):
            with pytest.raises(ValueError, match="at least one attention or MLP must stay"):
                call(model)
        same(before, snapshot(model))
        return
    plan.narrow(model)
    narrowed = outputs(model, inputs)
    plan.restore(model)
    same(before, snapshot(model))
    assert torch.equal(outputs(model, inputs), whole)
    reference = sorted_as(plan, deeper(name), name)
    with without(reference, name, values):
        close(narrowed, outputs(reference, inputs))
    plan.extract(model)
    close(outputs(model, inputs), narrowed)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: tiny_llama(num_hidden_layers=5, intermediate_size=64), "in this LlamaForCausalLM it is .*'mlp': 64"),
        (lambda: tiny_llama(num_hidden_layers=5, num_key_value_heads=4), "'kv_heads': 4"),
        (lambda: tiny_llama(num_hidden_layers=4), "'model.layers.4'"),
        (lambda: tiny_llama(num_hidden_layers=6), "'model.layers.5'"),
        (lambda: tiny_gpt2(n_layer=5, n_inner=48), "'transformer.h.0'"),
        (
            lambda: get_peft_model(tiny_llama(num_hidden_layers=5), LoraConfig(target_modules=["q_proj"])),
            "it has adapters",
        ),
    ],
    ids=["channels", "key-value heads", "fewer", "more", "class", "adapters"],
)
def test_models_that_a_plan_does_not_fit(llama_plan, other, message):
    model = other()
    before = snapshot(model)
    for act in (llama_plan.narrow, llama_plan.extract, llama_plan.check):
        with pytest.raises(ValueError, match=f"^model: .*{message}"):
            act(model)
        same(before, snapshot(model))


def test_a_plan_is_carried_out_once(llama_plan):
    model = tiny_llama(num_hidden_layers=5)
    llama_plan.narrow(model)
    before = snapshot(model)
    for act in (llama_plan.narrow, llama_plan.extract, prune):
        with pytest.raises(ValueError, match="^model: a part of it is not active"):
            act(model)
    same(before, snapshot(model))
    llama_plan.restore(model)
    llama_plan.extract(model)
    with pytest.raises(ValueError, match="^model: the plan is for"):
        llama_plan.extract(model)


def test_a_plan_for_a_fine_tuned_model(llama_plan):
    model = tiny_llama(num_hidden_layers=5)
    for parameter in model.parameters():
        parameter.data.add_(0.01)
    llama_plan.extract(model)
    assert parameters(model) == llama_plan.after["parameters"]


def test_plots(llama_plan, tmp_path):
    figure = llama_plan.plot(tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as image:
        assert image.format == "PNG" and min(image.size) > 300
        assert len(image.convert("RGB").getcolors(10**6)) > 20
    assert figure.axes[0].get_xlabel() == "parameters" and "perplexity" in figure.axes[0].get_ylabel()
    points = sum(len(c.get_offsets()) for c in figure.axes[0].collections)
    assert points == len(llama_plan.history) + 1
    llama_plan.plot()
    with pytest.raises(ValueError, match="`path` must end in"):
        llama_plan.plot(tmp_path / "plan.xyz")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]
    config = WidthPrunerConfig(ratio=0.1, choose="random", order="none")
    blind = prune_structured(tiny_llama(num_hidden_layers=3), config, progress=False)
    with pytest.raises(ValueError, match="^plot: "):
        blind.plot(tmp_path / "blind.png")
    assert not (tmp_path / "blind.png").exists() and "perplexity" not in str(blind)


# -- what is refused -------------------------------------------------------------------------------------------------------

BAD = [
    *[({"ratio": value}, "ratio") for value in (1, 1.0, -0.1, 2, math.nan, math.inf, True, "0.2", None)],
    *[({"stages": value}, "stages") for value in ((), ("layers",), ("channels", "channels"), "channels", None, 3)],
    *[
        ({"split": value}, "split")
        for value in (
            (1, 2),
            (1, 2, 3, 4),
            (1, -1, 1),
            (0, 0, 0),
            "even",
            None,
            (1, math.nan, 1),
            (1, math.inf, 1),
            (True, 1, 1),
            ("1", 1, 1),
            3,
        )
    ],
    *[
        ({"choose": value}, "choose")
        for value in (
            "best",
            ("metric",),
            ("metric", "metric", "best"),
            None,
            "score",
            "uniform",
            ("uniform", "metric", "metric"),
        )
    ],
    *[({"order": value}, "order") for value in ("l2", None, 3, ["activation"])],
    *[({"mlp_group": value}, "mlp_group") for value in (0, -1, 0.0, 1.0, 1.5, True, "8", math.nan)],
    *[({"head_group": value}, "head_group") for value in (0, -1, 0.5, None, True)],
    *[({"measure": value}, "measure") for value in ("flops", None)],
    *[({"slack": value}, "slack") for value in (-0.1, math.nan, None, True)],
    *[({"cache_gb": value}, "cache_gb") for value in (-1, math.nan, None)],
    *[({name: value}, name) for name in ("block_samples", "width_samples") for value in (0, -1, 1.5, True)],
    *[({"seed": value}, "seed") for value in (-1, 0.5, None)],
    ({"split": "auto", "choose": "random"}, "choose"),
    ({"stages": ("channels",), "split": (1,), "choose": "score", "order": "none"}, "order"),
]


@pytest.mark.parametrize(
    ("arguments", "named"), BAD, ids=lambda value: str(value) if isinstance(value, dict) else None
)
def test_configurations(arguments, named):
    with pytest.raises(ValueError, match=f"^`{named}` must be "):
        MultiPrunerConfig(**arguments)


def test_configurations_that_are_allowed():
    assert MultiPrunerConfig(split=[44, 52, 4], stages=["sub-blocks", "channels", "heads"]) == MultiPrunerConfig()
    for config in (MultiPrunerConfig(), BlockPrunerConfig(), WidthPrunerConfig(), TwoStagePrunerConfig()):
        assert isinstance(config, StructuredPruningConfig) and len(config.split) == len(config.stages) == len(
            config.choose
        )
    assert {cls.method for cls in (MultiPrunerConfig, BlockPrunerConfig, WidthPrunerConfig, TwoStagePrunerConfig)} == {
        "multipruner",
        "blockpruner",
        "width",
        "two-stage",
    }


def refused(model, message, config=CONFIG, calibration=None, **kwargs):
    before = snapshot(model) if hasattr(model, "config") else None
    with pytest.raises(ValueError, match=message):
        prune_structured(model, config, calibration, progress=False, **kwargs)
    if before:
        same(before, snapshot(model))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (None, "^`calibration` must be an iterable of batches.*, got None"),
        ([], "^calibration: it yielded no data"),
        ([tokens(3, 1)], "^calibration: .*nothing to predict"),
        ([{"input_ids": tokens(), "labels": torch.full((3, 7), -100)}], "^calibration: .*nothing to predict"),
        ("text", "^`calibration` must be an iterable of batches, got 'text'"),
        (3, "^`calibration` must be an iterable of batches, got 3"),
        ([{"input_ids": [[1, 2]]}], "^calibration: 'input_ids'"),
        ([{"input_ids": tokens(), "attention_mask": torch.zeros(3, 7)}], "^calibration: .*nothing to predict"),
    ],
    ids=["none", "empty", "one token", "no labels", "text", "number", "lists", "all padding"],
)
def test_calibration_data(calibration, message):
    refused(tiny_llama(num_hidden_layers=4), message, calibration=calibration)


@pytest.mark.parametrize("name", [*CLASSIFIERS, *T5S])
def test_other_models_without_labels(name):
    batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in calibration_of(name)]
    refused(deeper(name), "^calibration: .*`labels`", BlockPrunerConfig(), batches)


def test_a_loss_that_is_not_finite():
    model = tiny_llama(num_hidden_layers=4)
    model.lm_head.weight.data[0, 0] = math.inf
    refused(model, "^calibration: the loss of the whole model is", BlockPrunerConfig(), calibration_of("llama"))


def test_arguments():
    model, batches = tiny_llama(num_hidden_layers=4), calibration_of("llama")
    refused(model, "^`config` must be ", {"ratio": 0.1}, batches)
    refused(model, "^`metric` must be ", calibration=batches, metric=3)
    refused(model, "^`mode` must be ", calibration=batches, metric=len, mode="best")
    refused(model, "^`mode` must be 'min' without a `metric`.*, got 'max'", calibration=batches, mode="max")
    refused(model, "`metric` returned nan", calibration=batches, metric=lambda m: math.nan)
    refused(
        model,
        "^`ratio` must be .*, got 0.95: .* are only [0-9.]+% of the parameters",
        MultiPrunerConfig(ratio=0.95),
        batches,
    )
    refused(
        model,
        "^stages: nothing of \\['channels'\\]",
        WidthPrunerConfig(stages=("channels",), split=(1,), mlp_group=48),
        batches,
    )
    before = snapshot(model)
    for wrong in (None, "good", [1, 2]):
        with pytest.raises((ValueError, TypeError)):
            prune(model, metric=lambda m, wrong=wrong: wrong)
        same(before, snapshot(model))


def test_unknown_architectures():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(
                [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for _ in range(3)]
            )

    with pytest.raises(ValueError, match="^model: no block of this Plain has a known layout.*register_layout"):
        prune_structured(Plain(), MultiPrunerConfig(), [tokens()], progress=False)


@pytest.mark.parametrize("order", ["none", "l1"])
def test_quantised_layers(order):
    """They can be skipped and narrowed, and their grids are sorted along."""
    model = tiny_llama(num_hidden_layers=4)
    quantize(model, RTNConfig(bits=4, group_size=16))
    before = snapshot(model)
    plan = prune(model, config=MultiPrunerConfig(ratio=0.2, order=order), extract=False)
    same(before, snapshot(model))
    plan.narrow(model)
    narrowed = outputs(model, {"input_ids": tokens()})
    plan.restore(model)
    same(before, snapshot(model))
    plan.extract(model)
    close(outputs(model, {"input_ids": tokens()}), narrowed)


def test_packed_layers():
    """What is no floating-point number cannot be sorted."""
    model = tiny_llama(num_hidden_layers=4)
    layer = model.model.layers[2].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    for config in (CONFIG, WidthPrunerConfig(ratio=0.1, order="l1", choose="uniform")):
        refused(
            model,
            "'model.layers.2.mlp.up_proj' is of type Linear, whose packed weight",
            config,
            calibration_of("llama"),
        )


def test_adapters():
    model = get_peft_model(tiny_llama(num_hidden_layers=4), LoraConfig(target_modules=["q_proj"]))
    refused(model, "^model: it has adapters", calibration=calibration_of("llama"))
    refused(model.get_base_model(), "^model: it has adapters", calibration=calibration_of("llama"))
    elastic = get_peft_model(
        tiny_llama(num_hidden_layers=4), ElasticLoraConfig(target_modules=["q_proj"], r=4, elastic_ranks=[4, 2])
    )
    refused(elastic, "^model: it has ", calibration=calibration_of("llama"))


def test_every_choice_is_reachable():
    """Of what can be chosen at all nothing is left out: as much as there is."""
    model = tiny_phi(num_hidden_layers=3)
    config = MultiPrunerConfig(
        ratio=0.6, mlp_group=12, order="none", **{k: v for k, v in EVERYTHING.items() if k != "mlp_group"}
    )
    plan = prune_structured(model, config, [tokens()], progress=False)
    assert parameters(model) == plan.after["parameters"]
    assert {row["stage"] for row in plan.history} >= {"blocks", "channels"}
    assert set(choices_of(build("phi", num_hidden_layers=3))) >= set(plan.values)
