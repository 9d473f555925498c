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
"""The loss on calibration data: its value against one by hand for every architecture, state and size of the cache, and what it
computes for it."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.elastic_models import ALL
from support.masked_states import CLASSIFIERS, calibration_of, choices_of, deeper, loss_by_hand, random_state, without
from support.models import T5S, outputs, tiny_llama, tokens
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_elastic.pruning.structured.metric import CalibrationLoss
from peft_elastic.structure.blocks import Structure
from peft_elastic.structure.calibration import calibration_mode
from peft_elastic.structure.narrow import is_narrowed
from peft_elastic.structure.space import activate


TOLERANCE = 2e-6  # between a narrowed model and a masked one, both in float32
MEGABYTE = 1e6


def loss_of(model, batches, cache=MEGABYTE):
    structure = Structure(model)
    return CalibrationLoss(model, structure, batches, cache), structure


def restored(model, structure):
    activate(model, structure, {})
    assert not is_narrowed(model)


def by_hand(model, structure, name, batches, state):
    active = dict(structure.active)
    activate(model, structure, {})
    with without(model, name, state):
        value = loss_by_hand(model, name, batches)
    activate(model, structure, active)
    return value


# Sizes of what is kept: nothing; one output in several blocks; all.
CACHES = {"none": 0.0, "few": 20e3, "all": MEGABYTE}


@pytest.mark.parametrize("name", ALL)
def test_values(name):
    """Of random states and trunks."""
    model, batches = deeper(name), calibration_of(name)
    with calibration_mode(model):
        losses = {cache: loss_of(model, batches, size) for cache, size in CACHES.items()}
        assert losses["all"][0]._stored, "nothing is kept, so nothing is tested"
        whole = loss_by_hand(model, name, batches)
        seen = set()
        for seed in range(4):
            trunk, change = random_state(model, seed), random_state(model, 100 + seed, 1)
            state = {**trunk, **change}
            expected = by_hand(model, losses["all"][1], name, batches, state)
            for loss, structure in losses.values():
                assert loss(state, trunk).value == pytest.approx(expected, rel=TOLERANCE)
                activate(model, structure, {})
            seen.add(round(expected, 6))
            if seed == 2:  # back to the beginning
                for loss, structure in losses.values():
                    assert loss({}, {}).value == pytest.approx(whole, rel=TOLERANCE)
                    activate(model, structure, {})
        assert len(seen) == 4
    assert not is_narrowed(model)


@pytest.mark.parametrize("name", ["llama", "t5"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_sequence_of_states_and_trunks(name, data):
    """What is kept of one trunk never gets into the value of another."""
    model, batches = deeper(name, 6), calibration_of(name)
    choices = choices_of(model)
    states = st.dictionaries(st.sampled_from(sorted(choices)), st.integers(0, 3), max_size=4).map(
        lambda drawn: {key: choices[key][min(place, len(choices[key]) - 1)] for key, place in drawn.items()}
    )
    cache = data.draw(st.sampled_from([0.0, 12e3, 20e3, 60e3, MEGABYTE]))
    with calibration_mode(model):
        loss, structure = loss_of(model, batches, cache)
        for trunk, change in data.draw(st.lists(st.tuples(states, states), min_size=2, max_size=4)):
            state = {**trunk, **change} if data.draw(st.booleans()) else change
            found = loss(state, trunk).value
            assert found == pytest.approx(by_hand(model, structure, name, batches, state), rel=TOLERANCE)
        restored(model, structure)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_how_the_data_is_batched_does_not_matter(name):
    model, batches = deeper(name), calibration_of(name)
    single = [
        {key: value[place : place + 1] for key, value in batch.items()}
        for batch in batches
        for place in range(len(next(iter(batch.values()))))
    ]
    with calibration_mode(model):
        (one, structure), (other, again) = loss_of(model, batches), loss_of(model, single)
        for seed in range(3):
            state = random_state(model, seed)
            value = one(state, {}).value
            activate(model, structure, {})
            assert other(state, {}).value == pytest.approx(value, rel=1e-6)
            activate(model, again, {})


def test_half_precision():
    """The logits are what the model gives, and the loss is not rounded as they are."""
    model = tiny_llama().bfloat16()
    batches = calibration_of("llama")
    with calibration_mode(model):
        loss, structure = loss_of(model, batches)
        state = {"mlp:model.layers.1": 24}
        assert loss(state, {}).value == pytest.approx(loss_by_hand(model, "llama", batches), rel=1e-5)
        restored(model, structure)


# -- what is computed ----------------------------------------------------------------------------------------------------


@pytest.fixture
def computed():
    """A model of six blocks and a list that gets the number of every block that is computed for a batch."""
    model = tiny_llama(num_hidden_layers=6)
    numbers = []
    for number, layer in enumerate(model.model.layers):
        # a hook on the block would also be called when it is only said to run
        layer.input_layernorm.register_forward_hook(lambda *_, number=number: numbers.append(number))
    return model, numbers


def test_only_what_follows_the_change_is_computed(computed):
    model, numbers = computed
    batches = calibration_of("llama")
    with calibration_mode(model):
        loss, structure = loss_of(model, batches)

        def blocks(state, trunk):
            numbers.clear()
            measured = loss(state, trunk)
            assert measured.block_passes == len(numbers) / len(batches)
            assert all(numbers.count(number) % len(batches) == 0 for number in range(6))
            return sorted(numbers)[:: len(batches)]

        layer = "model.layers.{}".format
        assert blocks({}, {}) == [0, 1, 2, 3, 4, 5]
        assert blocks({}, {}) == [5]  # behind the last output that is kept
        assert blocks({f"mlp:{layer(4)}": 8}, {}) == [4, 5]
        assert blocks({f"heads:{layer(1)}": 2}, {}) == [1, 2, 3, 4, 5]
        assert blocks({f"depth:{layer(3)}": 0}, {}) == [4, 5]
        assert blocks({f"depth:{layer(5)}": 0}, {}) == []  # the whole model without its last block
        assert blocks({f"depth:{layer(5)}.mlp": 0, f"mlp:{layer(2)}": 8}, {}) == [2, 3, 4, 5]
        trunk = {f"depth:{layer(3)}": 0}
        numbers.clear()
        measured = loss({**trunk, f"mlp:{layer(5)}": 8}, trunk)
        # what is kept of the trunk from block 3 on, which is skipped, and then the last block
        assert measured.block_passes == len(numbers) / len(batches) == 2
        assert blocks({**trunk, f"mlp:{layer(2)}": 8}, trunk) == [2, 4, 5]
        assert blocks(trunk, trunk) == [5]
        restored(model, structure)


@pytest.mark.parametrize("cache", [0.0, 9e3, 20e3, 33e3, 60e3, MEGABYTE])
def test_block_passes_are_what_hooks_count(computed, cache):
    model, numbers = computed
    batches = calibration_of("llama")
    with calibration_mode(model):
        loss, structure = loss_of(model, batches, cache)
        total, full = 0, 0
        for seed in range(6):
            trunk = random_state(model, seed // 3)
            state = {**trunk, **random_state(model, 50 + seed, 1)}
            numbers.clear()
            measured = loss(state, trunk)
            assert measured.block_passes == len(numbers) / len(batches)
            total += measured.block_passes
            full += 6 - sum(state.get(f"depth:model.layers.{number}") == 0 for number in range(6))
        restored(model, structure)
    if cache == 0:
        assert total == full
    if cache == MEGABYTE:
        assert total < full


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("cache", [0.0, 15e3, 20e3, 30e3, 60e3, 100e3])
def test_no_more_is_kept_than_allowed(name, cache):
    """Counted in the tensors that are there."""
    model, batches = deeper(name, 6), calibration_of(name)
    with calibration_mode(model):
        loss, structure = loss_of(model, batches, cache)
        loss({}, {})
        tensors = [
            leaf
            for outputs_ in loss._kept.values()
            for output in outputs_
            for leaf in torch.utils._pytree.tree_leaves(output)
            if isinstance(leaf, torch.Tensor)
        ]
        kept = sum(tensor.untyped_storage().nbytes() for tensor in {id(t): t for t in tensors}.values())
        assert kept <= cache
        assert bool(kept) == (cache > 0) or (name == "t5" and cache < 60e3)
        restored(model, structure)


def test_as_much_memory_as_there_is():
    model, batches = tiny_llama(), calibration_of("llama")
    with calibration_mode(model):
        loss, structure = loss_of(model, batches, math.inf)
        assert loss({}, {}).value == pytest.approx(loss_by_hand(model, "llama", batches), rel=TOLERANCE)
        assert loss({"mlp:model.layers.1": 8}, {}).block_passes == 1
        restored(model, structure)


# -- models that do not allow it -------------------------------------------------------------------------------------------


class Twice(LlamaForCausalLM):
    """Each of its blocks runs twice."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return super().forward(inputs_embeds=hidden, attention_mask=attention_mask, **kwargs)


class InPlace(LlamaDecoderLayer):
    """Changes what it is given."""

    def forward(self, hidden_states, *args, **kwargs):
        hidden_states.mul_(1.5)
        return super().forward(hidden_states, *args, **kwargs)


def check_fallback(model, caplog, message, state_checks=6):
    batches = calibration_of("llama")
    with calibration_mode(model):
        loss, structure = loss_of(model, batches)
        assert message in caplog.text
        counted = []
        for layer in model.model.layers:
            layer.input_layernorm.register_forward_hook(lambda *_: counted.append(1))
        trunk = {}
        for seed in range(state_checks):
            state = {**trunk, **random_state(model, seed, 2)}
            counted.clear()
            measured = loss(state, trunk)
            assert measured.block_passes == len(counted) / len(batches)
            # hooks of `masked` in front of a block would see what it changes
            expected = loss_by_hand(model, "llama", batches)
            assert structure.active == state
            assert measured.value == pytest.approx(expected, rel=TOLERANCE)
            if seed % 2:
                trunk = state
        restored(model, structure)


def test_blocks_that_run_twice(caplog):
    torch.manual_seed(0)
    model = Twice(tiny_llama(num_hidden_layers=3).config).eval()
    check_fallback(model, caplog, "every pass is a full one")


@pytest.mark.parametrize("place", range(4))
def test_blocks_that_change_their_input(caplog, place):
    """Any of them: what is kept in front of it alone would be wrong."""
    model = tiny_llama(num_hidden_layers=4)
    model.model.layers[place].__class__ = InPlace
    if place == 0:  # the embeddings are not kept
        batches = calibration_of("llama")
        with calibration_mode(model):
            loss, structure = loss_of(model, batches)
            for seed in range(4):
                state = random_state(model, seed)
                assert loss(state, {}).value == pytest.approx(loss_by_hand(model, "llama", batches), rel=TOLERANCE)
            restored(model, structure)
        assert not caplog.text
        return
    check_fallback(model, caplog, "cannot be kept")


class Counting(LlamaForCausalLM):
    """Its loss depends on how many blocks have really run."""

    def forward(self, *args, **kwargs):
        ran = []
        hooks = [layer.mlp.register_forward_hook(lambda *_: ran.append(1)) for layer in self.model.layers]
        result = super().forward(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        result.logits = result.logits * len(ran)
        return result


def test_models_that_look_into_their_blocks(caplog):
    model = tiny_llama(num_hidden_layers=3)
    model.__class__ = Counting
    check_fallback(model, caplog, "the loss would be")


# -- what is refused -------------------------------------------------------------------------------------------------------


def test_sequences_without_predictions_do_not_count():
    model = tiny_llama()
    batches = calibration_of("llama")
    nothing = [{"input_ids": tokens(2, 1)}, {"input_ids": tokens(2, 4), "labels": torch.full((2, 4), -100)}]
    with calibration_mode(model):
        loss, structure = loss_of(model, [*nothing, *batches, *nothing])
        assert loss({}, {}).value == pytest.approx(loss_by_hand(model, "llama", batches), rel=TOLERANCE)
    for batch in nothing:
        with calibration_mode(model), pytest.raises(ValueError, match="^calibration: .* nothing to predict"):
            loss_of(model, [batch])


@pytest.mark.parametrize("name", [*CLASSIFIERS, *T5S])
def test_other_models_need_labels(name):
    model = deeper(name)
    batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in calibration_of(name)]
    with calibration_mode(model), pytest.raises(ValueError, match="^calibration: .*`labels`"):
        loss_of(model, batches)


def test_language_models_need_tokens_or_labels():
    model = tiny_llama()
    embedded = model.get_input_embeddings()(tokens()).detach()
    with calibration_mode(model):
        with pytest.raises(ValueError, match="^calibration: .*`labels`"):
            loss_of(model, [{"inputs_embeds": embedded}])
        loss, structure = loss_of(model, [{"inputs_embeds": embedded, "labels": tokens()}])
        expected = loss_by_hand(model, "llama", [{"input_ids": tokens()}])
        assert loss({}, {}).value == pytest.approx(expected, rel=TOLERANCE)


def test_a_loss_that_is_not_finite():
    model = tiny_llama()
    model.lm_head.weight.data[5] = math.nan
    with calibration_mode(model), pytest.raises(ValueError, match="^calibration: the loss of the whole model is nan"):
        loss_of(model, calibration_of("llama"))
    model = tiny_llama()
    model.lm_head.weight.data *= math.inf
    with calibration_mode(model), pytest.raises(ValueError, match="^calibration: the loss"):
        loss_of(model, calibration_of("llama"))


def test_a_state_whose_loss_is_no_number_is_the_worst():
    """It must never be chosen, and must not stop the search for a better one."""
    model = tiny_llama(num_hidden_layers=3)
    # the MLP of block 1 alone keeps what block 2 computes finite
    model.model.layers[2].mlp.down_proj.weight.data.fill_(math.inf)
    model.model.layers[2].mlp.gate_proj.weight.data.zero_()
    batches = calibration_of("llama")
    assert not torch.isfinite(outputs(model, batches[3])).all()
    structure = Structure(model)
    with calibration_mode(model):
        model.model.layers[2].mlp.down_proj.weight.data.fill_(0.0)
        loss = CalibrationLoss(model, structure, batches, MEGABYTE)
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.inf
        assert loss({"mlp:model.layers.1": 24}, {}).value == math.inf
        restored(model, structure)
