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
"""`optimize_generation`: the same output as the model's own code, for whatever `generate` is asked to do."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.models import CACHE
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from peft_elastic.deploy.decode.step import DecodeStep
from peft_elastic.deploy.generation import explain_generation, optimize_generation, restore_generation


MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def make(name="llama", dtype=torch.float32, **settings):
    config_class, model_class = MODELS[name]
    torch.manual_seed(0)
    defaults = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,  # so that the logits, and with them the tokens, depend on the context
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "sliding_window": None,
    }
    if name == "llama":
        del defaults["sliding_window"]
    model = model_class(config_class(**defaults | settings)).to(dtype).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name or "bias" in parameter_name:
            nn.init.normal_(parameter, mean=1.0, std=0.3)
    return model


@pytest.fixture
def steps(monkeypatch):
    """Counts the steps that took the fast path."""
    count = []
    original = DecodeStep.step

    def step(self, *args):
        count.append(1)
        return original(self, *args)

    monkeypatch.setattr(DecodeStep, "step", step)
    return count


def prompt(batch=1, length=7):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def run(model, ids, **settings):
    torch.manual_seed(5)
    defaults = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    settings = {**defaults, **settings}
    return model.generate(ids, return_dict_in_generate=True, output_logits=True, **settings)


def assert_same(got, expected, tolerance=2e-4):
    assert torch.equal(got.sequences, expected.sequences)
    assert len(got.logits) == len(expected.logits)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (4, 1)])
def test_families(name, heads, steps):
    model = make(name, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    expected = run(model, prompt())
    assert optimize_generation(model) is model
    assert_same(run(model, prompt()), expected)
    assert len(steps) == 11  # all but the prompt


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.9, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.3},
    ],
    ids=["sampling", "beams", "beam-sampling", "several", "penalty"],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_ways_to_generate(settings, batch, steps):
    model = make()
    expected = run(model, prompt(batch), **settings)
    optimize_generation(model)
    assert_same(run(model, prompt(batch), **settings), expected)
    assert len(steps) == 11


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_left_padding(name, steps):
    model = make(name)
    ids = prompt(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :5], mask[2, :1] = 0, 0
    ids[mask == 0] = 0
    expected = run(model, ids, attention_mask=mask)
    alone = run(model, ids[:1, 5:])
    optimize_generation(model)
    got = run(model, ids, attention_mask=mask)
    assert_same(got, expected)
    # padding changes nothing: the check that both paths do not ignore the mask alike
    assert torch.equal(got.sequences[0, 9:], alone.sequences[0, 4:])
    assert len(steps) == 11


def test_many_lengths_and_growth_of_the_buffers(steps):
    model = make()
    calls = [(prompt(1, 3), 150), (prompt(2, 40), 5), (prompt(1, 130), 90), (prompt(1, 1), 20)]
    expected = [run(model, ids, max_new_tokens=n, min_new_tokens=n) for ids, n in calls]
    optimize_generation(model)
    for (ids, n), reference in zip(calls, expected, strict=True):
        assert_same(run(model, ids, max_new_tokens=n, min_new_tokens=n), reference, tolerance=1e-3)
    assert len(steps) == sum(n - 1 for _, n in calls)


def test_cache_that_is_continued_cropped_copied_and_leaves_inference_mode(steps):
    model = make()
    tokens = prompt(1, 12)

    def walk():
        cache, out = DynamicCache(config=model.config), []

        def feed(part, cache):
            out.append(model(part, **{CACHE: cache}, use_cache=True).logits)

        with torch.inference_mode():
            feed(tokens[:, :5], cache)
            feed(tokens[:, 5:6], cache)
        with torch.no_grad():
            feed(tokens[:, 6:7], cache)
            feed(tokens[:, 7:8], cache)
            other = copy.deepcopy(cache)
            shared = copy.copy(cache.layers[0])  # holds the same view
            before = shared.keys.clone()
            feed(tokens[:, 8:9], cache)
            feed(tokens[:, 9:10], other)
            feed(tokens[:, 10:12], cache)  # two at once: the model's own code
            feed(tokens[:, 1:2], cache)
            cache.crop(-3)
            feed(tokens[:, 2:3], cache)
            feed(tokens[:, 3:4], other)
            assert torch.equal(shared.keys, before)
        return out

    expected = walk()
    optimize_generation(model)
    for got, reference in zip(walk(), expected, strict=True):
        torch.testing.assert_close(got, reference, atol=2e-4, rtol=1e-4)
    assert len(steps) == 8


def test_bfloat16_is_as_close_to_float32_as_the_models_own_code(steps):
    exact, model = make(initializer_range=0.1).double(), make(initializer_range=0.1, dtype=torch.bfloat16)
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    ids = prompt(1, 40)

    def errors(model):
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids[:, :8], **{CACHE: cache})
            out = [model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(8, 40)]
        return torch.cat(out).double()

    reference = errors(exact)
    plain = (errors(model) - reference).norm()
    optimize_generation(model)
    fast = (errors(model) - reference).norm()
    assert len(steps) == 32
    assert fast < 1.25 * plain
    assert fast < 0.05 * reference.norm()


def test_undo():
    model = make()
    before = set(model.model.__dict__)
    with pytest.raises(ValueError, match="not optimized"):
        restore_generation(model)
    optimize_generation(optimize_generation(model))  # twice is once
    assert "forward" in model.model.__dict__
    assert restore_generation(model) is model
    assert set(model.model.__dict__) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_use_their_own_weights(duplicate, steps):
    model = optimize_generation(make())
    expected = run(model, prompt())
    other = duplicate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    steps.clear()
    assert_same(run(other, prompt()), expected)
    assert len(steps) == 11


def test_saved_as_before(tmp_path, steps):
    model = make()
    expected = run(model, prompt())
    optimize_generation(model).save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same(run(loaded, prompt()), expected)
    assert not steps


def test_peft_model_and_layers_swapped_later(steps):
    model = make()
    optimize_generation(model)
    peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    peft_model.eval()
    got = run(peft_model, prompt())
    assert len(steps) == 11
    restore_generation(peft_model)
    assert_same(got, run(peft_model, prompt()))

    merged = optimize_generation(peft_model.merge_and_unload())
    layer = merged.model.layers[0]
    layer.mlp.gate_proj = nn.Linear(64, 96)
    steps.clear()
    got = run(merged, prompt())
    assert len(steps) == 11
    assert_same(got, run(restore_generation(merged), prompt()))


def test_training_is_untouched(steps):
    model, reference = make(), make()
    optimize_generation(model)
    for each in (model, reference):
        each.train()
        each(prompt(2), labels=prompt(2)).loss.backward()
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    # a single position with a cache and gradients, in evaluation mode
    model.eval()
    model.zero_grad()
    cache = DynamicCache(config=model.config)
    model(prompt(), **{CACHE: cache})
    model(prompt(1, 1), **{CACHE: cache}).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    assert not steps


@pytest.mark.parametrize(
    "settings",
    [
        {"output_hidden_states": True},
        {"cache_implementation": "static", "disable_compile": True},
        {"use_cache": False},
    ],
    ids=["hidden-states", "static-cache", "no-cache"],
)
def test_other_requests_take_the_models_own_code(settings, steps):
    model = make()
    expected = run(model, prompt(), **settings)
    optimize_generation(model)
    got = run(model, prompt(), **settings)
    assert_same(got, expected)
    assert not steps
    if "output_hidden_states" in settings:
        assert len(got.hidden_states) == len(expected.hidden_states) == 12
        # the hooks that transformers leaves behind do not slow down what follows
        run(model, prompt())
        assert len(steps) == 11


def test_sliding_window_takes_the_models_own_code(steps):
    model = make("mistral", sliding_window=5)
    expected = run(model, prompt())
    optimize_generation(model)
    with pytest.warns(UserWarning, match="its own code generates: the model looks back through a sliding window"):
        assert_same(run(model, prompt()), expected)
    assert not steps
    assert explain_generation(model).obstacles == ("the model looks back through a sliding window",)


def test_window_with_a_cache_that_knows_no_window(steps):
    for name, settings in {
        "mistral": {},
        "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    }.items():
        model = make(name, sliding_window=5, **settings)
        expected = run(model, prompt(), **{CACHE: DynamicCache()})
        optimize_generation(model)
        assert_same(run(model, prompt(), **{CACHE: DynamicCache()}), expected)
    assert not steps


@pytest.mark.parametrize(
    "path", ["layers.1", "layers.1.self_attn", "layers.2.input_layernorm", "layers.0.self_attn.q_norm"]
)
def test_hooks_are_called(path, steps):
    model = optimize_generation(make("qwen3"))
    called = []
    handle = model.model.get_submodule(path).register_forward_hook(lambda *_: called.append(1))
    run(model, prompt())
    assert len(called) == 12 and not steps
    handle.remove()
    run(model, prompt())
    assert len(steps) == 11
    # hooks on linear layers are called on the fast path as well
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: called.append(1))
    called.clear()
    run(model, prompt())
    assert len(called) == 12 and len(steps) == 22


def test_global_hooks_are_called(steps):
    model = optimize_generation(make())
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    run(model, prompt())
    handle.remove()
    assert not steps
    assert called.count(model.model.layers[1].self_attn) == 12


def test_parts_that_are_replaced_between_steps(steps):
    model = optimize_generation(make("qwen3"))
    tokens = prompt(1, 12)

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return 2 * self.inner(*args, **kwargs)

    def walk():
        cache = DynamicCache(config=model.config)
        layers = model.model.layers
        norm, attention, layer = layers[0].input_layernorm, layers[1].self_attn, layers[2]
        with torch.no_grad():
            model(tokens[:, :5], **{CACHE: cache})
            yield model(tokens[:, 5:6], **{CACHE: cache}).logits
            layers[0].input_layernorm = Twice(norm)
            yield model(tokens[:, 6:7], **{CACHE: cache}).logits
            layers[0].input_layernorm = norm
            attention.k_norm = Twice(attention.k_norm)
            yield model(tokens[:, 7:8], **{CACHE: cache}).logits
            attention.k_norm = attention.k_norm.inner
            layer.input_layernorm.forward = lambda x: 3 * x
            yield model(tokens[:, 8:9], **{CACHE: cache}).logits
            del layer.input_layernorm.forward
            yield model(tokens[:, 9:10], **{CACHE: cache}).logits
            norm.weight = nn.Parameter(norm.weight * 1.5)
            yield model(tokens[:, 10:11], **{CACHE: cache}).logits
            norm.weight.data = norm.weight.data / 1.5
            yield model(tokens[:, 11:12], **{CACHE: cache}).logits

    got = list(walk())
    assert len(steps) == 4
    restore_generation(model)
    for ours, theirs in zip(got, walk(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_dropout_of_an_attention_in_training_mode(steps):
    model = optimize_generation(make(attention_dropout=0.5))
    run(model, prompt())
    assert len(steps) == 11
    model.model.layers[1].self_attn.train()
    run(model, prompt())
    assert len(steps) == 11


def test_cache_of_another_type_than_the_model(steps):
    model = optimize_generation(make())
    tokens = prompt(1, 8)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :6], **{CACHE: cache})
        for cached in cache.layers:
            cached.keys, cached.values = cached.keys.bfloat16(), cached.values.bfloat16()
        model(tokens[:, 6:7], **{CACHE: cache})  # torch.cat makes it float32 again
        assert not steps
        model(tokens[:, 7:8], **{CACHE: cache})
    assert len(steps) == 1


def test_compiled_model(steps):
    model = make()
    cache = DynamicCache(config=model.config)
    tokens = prompt(1, 8)
    with torch.no_grad():
        model(tokens[:, :7], **{CACHE: cache})
        expected = model(tokens[:, 7:], **{CACHE: copy.deepcopy(cache)}).logits
        optimize_generation(model)
        compiled = torch.compile(model, backend="eager")
        got = compiled(tokens[:, 7:], **{CACHE: copy.deepcopy(cache)}).logits
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
        assert not steps
        assert_same(run(model, prompt()), run(restore_generation(copy.deepcopy(model)), prompt()))
    assert len(steps) == 11


def test_refusals():
    with pytest.raises(ValueError, match="LlamaModel, MistralModel, Qwen2Model, Qwen3Model.*got BertModel"):
        optimize_generation(
            BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
        )
    model = make(attn_implementation="eager")
    with pytest.raises(ValueError, match="must have attn_implementation 'sdpa' .*, got 'eager'"):
        optimize_generation(model)
    model = make()
    model.model.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="forward of its LlamaModel was replaced"):
        optimize_generation(model)
    model = make()
    model.model.layers[1].self_attn = nn.Identity()
    with pytest.raises(ValueError, match="layer 1 must be made of .*got .*Identity"):
        optimize_generation(model)
    assert "forward" not in model.model.__dict__


# -- names that change from one version of transformers to the next, and reasons ------------------------------------


@pytest.mark.parametrize("name", ["cache", "past_key_values", "memory"])
@pytest.mark.parametrize("by_position", [False, True])
def test_the_cache_is_found_whatever_it_is_called(name, by_position, monkeypatch, steps):
    original = LlamaModel.forward
    # as decoders of transformers are written, with another name in the fourth place
    source = f"""
def forward(self, input_ids=None, attention_mask=None, position_ids=None, {name}=None, inputs_embeds=None,
            use_cache=None, **kwargs):
    return original(self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, {CACHE}={name},
                    inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)
"""
    space = {"original": original}
    exec(source, space)
    decoder, tokens = make().model, prompt(2, 9)

    def walk():
        cache = DynamicCache(config=decoder.config)
        with torch.no_grad():
            for first, last in [(0, 6), (6, 7), (7, 8), (8, 9)]:
                given = (None, None, cache) if by_position else ()
                out = decoder(tokens[:, first:last], *given, **({} if by_position else {name: cache}))
                assert out[1] is cache and out[CACHE] is cache
                yield out.last_hidden_state

    monkeypatch.setattr(LlamaModel, "forward", space["forward"])
    expected = list(walk())
    optimize_generation(decoder)
    for got, reference in zip(walk(), expected, strict=True):
        torch.testing.assert_close(got, reference, atol=2e-4, rtol=1e-4)
    assert len(steps) == 3


def test_arguments_of_tomorrow_take_the_models_own_code(monkeypatch, steps):
    original, seen = LlamaModel.forward, []

    def forward(self, input_ids=None, *, tomorrow=None, **kwargs):
        seen.append(tomorrow)
        return original(self, input_ids, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    decoder = optimize_generation(make()).model
    cache = DynamicCache(config=decoder.config)
    with torch.no_grad(), pytest.warns(UserWarning, match="does not know: .'tomorrow'"):
        for i in range(3):
            decoder(prompt()[:, i : i + 1], **{CACHE: cache}, tomorrow=i)
    assert not steps and seen == [0, 1, 2]
    assert any("tomorrow" in reason for reason in explain_generation(decoder).own)


def test_generate_makes_no_warning_of_ours(recwarn):
    run(optimize_generation(make()), prompt())
    assert not [w for w in recwarn if CACHE in str(w.message) or "peft_elastic" in w.filename]


def of_cache(change):
    """Settings of `run` with a cache that was filled by the prompt and changed."""

    def settings(model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompt()[:, :-1], **{CACHE: cache})
        change(cache)
        return {CACHE: cache}

    return settings


def add_hook(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)  # allowed
    model.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda *_: None)


# what is done to the model, what `generate` is asked for, and the reason that is to be given
REASONS = {
    "training": (lambda model: model.train(), {}, "training mode"),
    "eager": (lambda model: model.set_attn_implementation("eager"), {}, "'eager'; allowed is 'sdpa'"),
    "hook": (add_hook, {}, "LlamaRMSNorm at 'post_attention_layernorm' of a LlamaDecoderLayer has a hook"),
    "replaced": (
        lambda model: setattr(model.model.layers[2], "input_layernorm", nn.RMSNorm(64)),
        {},
        "layer 2 is made of .*, 'RMSNorm', .*allowed are",
    ),
    "attentions": (None, {"output_hidden_states": True}, "does not know: .'output_hidden_states'"),
    "static": (
        None,
        {"cache_implementation": "static", "disable_compile": True},
        "StaticCache; allowed is the DynamicC",
    ),
    "other layers": (
        None,
        of_cache(lambda cache: setattr(cache.layers[1], "__class__", type("Own", (type(cache.layers[1]),), {}))),
        "layers of another class than DynamicLayer",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_reasons(case, steps):
    change, settings, reason = REASONS[case]
    model = make()
    settings = settings(model) if callable(settings) else settings
    optimize_generation(model)
    if change is not None:
        change(model)
    with pytest.warns(UserWarning, match=reason) as found:
        run(model, prompt(), **settings)
        run(model, prompt())
    assert len([w for w in found if "its own code generates" in str(w.message)]) == 1
    report = explain_generation(model)
    assert report.optimized and report.steps == len(steps)
    assert sum(report.own.values()) == 24 - report.steps
    pattern = f"(?s).*{reason}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "warn", None)  # explaining warns of nothing
        assert any(re.match(pattern, each) for each in report.own), str(report)
        # what the model is, and not what the call was, stands there beforehand
        assert bool(report.obstacles) == (change is not None)
        assert re.match(pattern, str(report))


def test_explanation_before_and_after(steps):
    model = make()
    report = explain_generation(model)
    assert not report.optimized and not report.obstacles and "call `optimize_generation`" in str(report)
    assert "forward" not in model.model.__dict__
    optimize_generation(model)
    run(model, prompt())
    report = explain_generation(model)
    assert report.steps == len(steps) == 11 and not report.obstacles
    assert list(report.own.values()) == [1] and "prompt" in next(iter(report.own))
    # without a cache nothing is to be sped up: no warning, but the reason
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(optimize_generation(model := make()), prompt(), use_cache=False)
    assert explain_generation(model).own == {"use_cache is False": 12}
    assert explain_generation(nn.Linear(2, 2)).obstacles[0].endswith("of transformers, got Linear.")
    assert "'eager'" in explain_generation(make(attn_implementation="eager")).obstacles[0]


def test_a_step_is_not_asked_for_under_gradients():
    model = optimize_generation(make())
    cache = DynamicCache(config=model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(prompt(), **{CACHE: cache})
        model(prompt(1, 1), **{CACHE: cache})
    assert list(explain_generation(model).own.values()) == [2]
