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
"""The decode step in C++: the same as the model's own code around the same sparse layers."""

import copy
import pickle
import subprocess
import threading

import pytest
import torch
from support.compiling import COMPILER, CSRC, compile_file
from support.models import CACHE
from support.places import REPOSITORY
from test_generation import MODELS, assert_same, make, prompt, run
from torch import nn
from transformers import DynamicCache

from peft_elastic.layers import extension


if not extension.is_built():
    pytest.skip("the C++ extension is not built", allow_module_level=True)

from peft_elastic.deploy import SparseLinear
from peft_elastic.deploy.decode.in_cpp import DenseStep, FusedLayers
from peft_elastic.deploy.generation import explain_generation, optimize_generation, restore_generation
from peft_elastic.layers import ops


def sparsify(model, values="bf16", share=0.5):
    generator = torch.Generator().manual_seed(3)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            with torch.no_grad():
                layer.weight *= torch.rand(layer.weight.shape, generator=generator) >= share
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, SparseLinear.from_linear(layer, values))
    return model


def make_sparse(name="llama", values="bf16", **settings):
    return sparsify(make(name, **settings), values)


def densify(model):
    """A copy in float64 with the weights that the sparse layers hold."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SparseLinear):
            layer.linear_dtype = torch.float32  # else the product of int8 values and scales would be rounded
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, layer.to_linear())
    return model.double()


@pytest.fixture
def fused(monkeypatch):
    """Counts the steps that the C++ code took."""
    count = []
    original = FusedLayers.run

    def counting(self, *args):
        count.append(1)
        return original(self, *args)

    monkeypatch.setattr(FusedLayers, "run", counting)
    return count


@pytest.fixture(params=[1, 2, 3, 4])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=[level["name"] for level in extension.levels() if level["usable"]])
def level(request):
    before = extension.selected_level()
    extension.select_level(request.param)
    yield request.param
    extension.select_level(before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_families(name, heads, values, fused):
    model = make_sparse(name, values, num_attention_heads=heads[0], num_key_value_heads=heads[1])
    expected = run(model, prompt())
    optimize_generation(model)
    assert_same(run(model, prompt()), expected)
    assert len(fused) == 11
    assert (model.model.layers[0].self_attn.q_proj.bias is not None) == (name == "qwen2")


def test_levels(level, fused):
    model = make_sparse("qwen3")
    expected = run(model, prompt(2))
    optimize_generation(model)
    assert_same(run(model, prompt(2)), expected)
    assert len(fused) == 11


@pytest.mark.parametrize(
    "settings",
    [
        # nothing a multiple of a vector
        {"hidden_size": 44, "intermediate_size": 70, "head_dim": 10},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        {"num_hidden_layers": 1, "rms_norm_eps": 0.1},
    ],
    ids=["odd", "bias", "yarn", "one-layer"],
)
def test_configurations(settings, fused):
    model = make_sparse(**settings)
    expected = run(model, prompt(2))
    optimize_generation(model)
    assert_same(run(model, prompt(2)), expected)
    assert len(fused) == 11


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("values", ["bf16", "int8"])
def test_bfloat16_is_as_close_to_float64_as_the_models_own_code(name, values, fused, level):
    model = make_sparse(name, values, initializer_range=0.1, dtype=torch.bfloat16)
    ids = prompt(2, 40)

    def logits(model):
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            model(ids[:, :8], **{CACHE: cache})
            out = [model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(8, 40)]
        return torch.cat(out).double()

    reference = logits(densify(model))
    plain = (logits(model) - reference).norm()
    optimize_generation(model)
    ours = (logits(model) - reference).norm()
    assert len(fused) == 32
    assert ours < plain
    assert ours < 0.05 * reference.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float64(dtype, fused):
    """Not against the kernels, but against dense layers in double precision."""
    model = make_sparse("qwen2", "int8", dtype=dtype, initializer_range=0.1)
    exact = densify(model)
    optimize_generation(model)
    ids = prompt(3, 30)
    with torch.no_grad():
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        for first, last in [(0, 8), *[(i, i + 1) for i in range(8, 30)]]:
            got, expected = (
                each(ids[:, first:last], **{CACHE: cache}).logits[:, -1].double()
                for each, cache in zip((model, exact), caches, strict=True)
            )
            assert (got - expected).norm() < (1e-5 if dtype == torch.float32 else 0.03) * expected.norm()
    assert len(fused) == 22


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_left_padding(batch, name, fused):
    model = make_sparse(name)
    ids = prompt(3, 9)[:batch]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[2:, :1] = 0
    ids[mask == 0] = 0
    expected = run(model, ids, attention_mask=mask)
    alone = run(model, ids[:1, 5:])
    optimize_generation(model)
    got = run(model, ids, attention_mask=mask)
    assert_same(got, expected)
    assert torch.equal(got.sequences[0, 9:], alone.sequences[0, 4:])
    assert len(fused) == 11


def test_position_that_sees_nothing(fused):
    model = make_sparse()
    ids = prompt(2)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1] = 0

    def logits():
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, **{CACHE: cache})
            return model(ids[:, :1], **{CACHE: cache}, attention_mask=mask).logits

    expected = logits()
    optimize_generation(model)
    torch.testing.assert_close(logits(), expected, atol=2e-4, rtol=1e-4)
    assert len(fused) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["beams", "sampling", "beam-sampling", "lookup"],
)
def test_ways_to_generate(settings, fused):
    model = make_sparse()
    batch = 1 if "prompt_lookup_num_tokens" in settings else 2
    expected = run(model, prompt(batch), **settings)
    optimize_generation(model)
    assert_same(run(model, prompt(batch), **settings), expected)
    assert fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts_on_several_threads(dtype, threads, fused):
    """Long enough that the heads of the attention are shared out."""
    model = make_sparse(dtype=dtype, initializer_range=0.1, max_position_embeddings=4096)
    ids = prompt(2, 2500)
    reference = densify(model)

    def logits(model):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :2480], **{CACHE: cache})
            return torch.cat([model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(2480, 2500)], 1)

    expected = logits(reference)
    optimize_generation(model)
    difference = (logits(model).double() - expected).norm()
    assert difference < (1e-5 if dtype == torch.float32 else 0.03) * expected.norm()
    assert len(fused) == 20


def test_many_lengths_and_growth_of_the_buffers(fused):
    model = make_sparse()
    calls = [(prompt(1, 3), 150), (prompt(2, 40), 5), (prompt(1, 130), 90), (prompt(1, 1), 20)]
    expected = [run(model, ids, max_new_tokens=n, min_new_tokens=n) for ids, n in calls]
    optimize_generation(model)
    for (ids, n), reference in zip(calls, expected, strict=True):
        assert_same(run(model, ids, max_new_tokens=n, min_new_tokens=n), reference, tolerance=1e-3)
    assert len(fused) == sum(n - 1 for _, n in calls)


def test_cache_that_is_cropped_reordered_copied_and_leaves_inference_mode(fused):
    model = make_sparse()
    tokens = prompt(2, 16)

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
            before = cache.layers[0].keys
            kept = before.clone()
            feed(tokens[:, 8:9], cache)
            feed(tokens[:, 9:10], other)
            feed(tokens[:, 10:12], cache)  # two at once: the model's own code
            feed(tokens[:, 1:2], cache)
            cache.reorder_cache(torch.tensor([1, 0]))
            feed(tokens[:, 12:13], cache)
            cache.crop(-3)
            feed(tokens[:, 2:3], cache)
            feed(tokens[:, 3:4], other)
            cache.batch_select_indices(torch.tensor([1]))
            feed(tokens[:1, 13:14], cache)
            cache.layers[1].keys = cache.layers[1].keys.clone()
            cache.layers[2].values.mul_(2)
            feed(tokens[:1, 14:15], cache)
            assert torch.equal(before, kept)
        return out

    expected = walk()
    optimize_generation(model)
    for got, reference in zip(walk(), expected, strict=True):
        torch.testing.assert_close(got, reference, atol=2e-4, rtol=1e-4)
    assert len(fused) == len(expected) - 2


def _hook(layer, model):
    layer.mlp.down_proj.register_forward_hook(lambda module, args, output: 2 * output)


def _hook_before(layer, model):
    layer.mlp.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def _dense(layer, model):
    layer.self_attn.v_proj = nn.Linear(64, 32)


def _activation(layer, model):
    layer.mlp.act_fn = nn.GELU()


def _own_forward(layer, model):
    layer.mlp.gate_proj.forward = lambda x: x.new_ones(*x.shape[:-1], 96)


def _other_sparse(layer, model):
    layer.self_attn.o_proj = SparseLinear.from_linear(nn.Linear(64, 64))


def _other_weights(layer, model):
    state = SparseLinear.from_linear(nn.Linear(64, 96, bias=False)).state_dict()
    layer.mlp.up_proj.load_state_dict(state)


def _norm_weight(layer, model):
    layer.input_layernorm.weight = nn.Parameter(2 * layer.input_layernorm.weight)


def _norm_data(layer, model):
    layer.self_attn.k_norm.weight.data = layer.self_attn.k_norm.weight.data * 2


def _norm_in_place(layer, model):
    with torch.no_grad():
        layer.self_attn.q_norm.weight.mul_(2)


def _epsilon(layer, model):
    layer.post_attention_layernorm.variance_epsilon = 1.0


def _scaling(layer, model):
    layer.self_attn.scaling = 1.0


def _bias(layer, model):
    layer.self_attn.q_proj.bias = nn.Parameter(torch.ones(64))


def _layer(layer, model):
    model.model.layers[2] = copy.deepcopy(layer)
    model.model.layers[2].self_attn.layer_idx = 2


def _fewer(layer, model):
    model.config.num_hidden_layers = 2


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        (_hook, False),
        (_hook_before, False),
        (_dense, True),
        (_activation, False),
        (_own_forward, False),
        (_other_sparse, True),
        (_other_weights, True),
        (_norm_weight, True),
        (_norm_data, True),
        (_norm_in_place, True),
        (_epsilon, True),
        (_scaling, True),
        (_bias, True),
        (_layer, True),
        (_fewer, True),
    ],
)
def test_changes_between_steps(change, taken, fused):
    def walk(model, change):
        torch.manual_seed(9)
        tokens, cache = prompt(1, 12), DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens[:, :5], **{CACHE: cache})
            for i in range(5, 12):
                if i == 8:
                    change(model.model.layers[1], model)
                yield model(tokens[:, i : i + 1], **{CACHE: cache}).logits

    expected = torch.stack(list(walk(make_sparse("qwen3"), change)))
    got = torch.stack(list(walk(optimize_generation(make_sparse("qwen3")), change)))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-4)
    assert len(fused) == (7 if taken else 3)
    unchanged = torch.stack(list(walk(make_sparse("qwen3"), lambda layer, model: None)))
    assert torch.equal(unchanged[:3], expected[:3])
    assert not torch.allclose(unchanged[3:], expected[3:], atol=0.01)


def test_casts(fused):
    model = optimize_generation(make_sparse(initializer_range=0.1))
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        model.to(dtype)
        fused.clear()
        got = run(model, prompt()).logits[-1].float()
        assert len(fused) == 11
        plain = run(restore_generation(copy.deepcopy(model)), prompt()).logits[-1].float()
        torch.testing.assert_close(got, plain, atol=0.1, rtol=0.05)
    fused.clear()
    run(model.half(), prompt())  # float16: the step in torch
    assert not fused


def test_copies_and_state(tmp_path, fused):
    model = make_sparse()
    state = model.state_dict()
    optimize_generation(model)
    expected = run(model, prompt())
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in copies:
        fused.clear()
        assert_same(run(other, prompt()), expected)
        assert len(fused) == 11


def test_several_python_threads(fused):
    model = optimize_generation(make_sparse())
    inputs = [prompt(1, 5 + i) for i in range(4)]
    expected = [run(model, ids) for ids in inputs]
    got = {}

    def work(i):
        for _ in range(5):
            got[i] = run(model, inputs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i in range(4):
        assert_same(got[i], expected[i])


def test_large_batches_take_the_dense_product(fused, monkeypatch):
    monkeypatch.setattr(ops, "DENSE_ROWS", 64)
    model = optimize_generation(make_sparse())
    ids = prompt(70)
    got = run(model, ids, max_new_tokens=3, min_new_tokens=3)
    assert not fused
    assert_same(got, run(restore_generation(model), ids, max_new_tokens=3, min_new_tokens=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_dense_layers_among_them(dtype, name, share, threads, fused):
    """With rows beyond what the C++ step multiplies with dense layers, torch takes these steps."""
    model = make_sparse(name, dtype=dtype, initializer_range=0.1, hidden_size=256, intermediate_size=1024)
    generator = torch.Generator().manual_seed(5)
    for path, layer in list(model.named_modules()):
        if isinstance(layer, SparseLinear) and torch.rand(1, generator=generator) < share:
            owner, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(owner), attribute, layer.to_linear())
    exact = densify(model)
    optimize_generation(model)
    for batch in (1, 3, 6):
        ids = prompt(batch, 12)
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        fused.clear()
        with torch.no_grad():
            for first, last in [(0, 8), *[(i, i + 1) for i in range(8, 12)]]:
                got, expected = (
                    each(ids[:, first:last], **{CACHE: cache}).logits[:, -1].double()
                    for each, cache in zip((model, exact), caches, strict=True)
                )
                assert (got - expected).norm() < (1e-5 if dtype == torch.float32 else 0.03) * expected.norm()
        assert len(fused) == (4 if batch <= 4 or share == 0 else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (7, 33), (600, 576), (1000, 45)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_output_embedding(dtype, out_features, in_features, with_bias, threads):
    head = nn.Linear(in_features, out_features, bias=with_bias, dtype=dtype)
    step = DenseStep(head)
    exact = copy.deepcopy(head).double()
    for shape in [(1, 1), (4,), (2, 2), (5, 1), (1, 300), (0, 1), ()]:
        x = torch.randn(*shape, in_features, dtype=dtype)
        with torch.no_grad():
            got, expected = step(x), exact(x.double())
        assert got.dtype == dtype
        assert got.shape == expected.shape
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2 if dtype == torch.bfloat16 else 1e-3)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
        gradient = torch.randn_like(got)
        assert torch.autograd.grad(step(x), head.weight, gradient)[0].shape == head.weight.shape
    with torch.no_grad():
        strided = torch.randn(2, 2 * in_features, dtype=dtype)[:, ::2]
        torch.testing.assert_close(step(strided), step(strided.contiguous()), rtol=0, atol=0)
        head.weight = nn.Parameter((torch.randn(in_features, out_features) / in_features**0.5).to(dtype).t())
        torch.testing.assert_close(step(strided), nn.Linear.forward(head, strided))
        rows = torch.randn(3, in_features, dtype=dtype)
        exact = copy.deepcopy(head).double()
        torch.testing.assert_close(
            torch.vmap(step)(rows).double(), exact(rows.double()), rtol=tolerance, atol=tolerance
        )
        with pytest.raises(RuntimeError):
            step(torch.randn(1, in_features + 1, dtype=dtype))


def test_output_embedding_is_optimized_and_restored(fused):
    model = make_sparse()
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    seen = []
    expected = run(model, prompt())
    plain = dict(model.lm_head.__dict__)
    optimize_generation(model)
    assert isinstance(model.lm_head.forward, DenseStep)
    twin = copy.deepcopy(model)
    assert twin.lm_head.forward.linear is twin.lm_head
    seen.clear()
    assert_same(run(model, prompt()), expected)
    assert set(seen) == {1}  # a hook on it is called as before
    optimize_generation(restore_generation(model))
    restore_generation(model)
    assert model.lm_head.__dict__.keys() == plain.keys()


def test_weights_that_do_not_fit_go_to_torch(fused):
    model = optimize_generation(make_sparse())
    layer = model.model.layers[1]
    good = layer.mlp.down_proj
    for bad in (nn.Linear(95, 64), nn.Linear(96, 64, dtype=torch.float64), nn.Linear(96, 64, device="meta")):
        layer.mlp.down_proj = bad
        with pytest.raises((RuntimeError, NotImplementedError)), torch.no_grad():
            cache = DynamicCache(config=model.config)
            layer.mlp.down_proj = good
            model(prompt(), **{CACHE: cache})
            layer.mlp.down_proj = bad
            model(prompt(1, 1), **{CACHE: cache})
    assert not fused


def test_shapes_that_do_not_fit_are_refused():
    native = extension._C
    model = native.DecodeModel(native.FloatType.float32, 64, 16)
    linears = {
        shape: SparseLinear.from_linear(nn.Linear(*shape)).packed for shape in [(64, 64), (64, 32), (64, 96), (96, 64)]
    }
    ones = torch.ones(64)
    norm = native.DecodeNorm(weight=ones.data_ptr(), epsilon=1e-6)
    fitting = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]

    def add(shapes):
        layers = [
            native.DecodeLinear(
                out_features=s[1],
                in_features=s[0],
                weight=linears[s].data_ptr(),
                size=linears[s].numel(),
                scales=0,
                bias=0,
                bias_type=native.FloatType.float32,
            )
            for s in shapes
        ]
        model.add_layer(
            **dict(zip(("q", "k", "v", "o", "gate", "up", "down"), layers)),
            **dict.fromkeys(("input_norm", "mlp_norm", "q_norm", "k_norm"), norm),
            scaling=1.0,
        )

    add(fitting)
    for position in range(7):
        wrong = list(fitting)
        wrong[position] = (64, 96) if fitting[position] != (64, 96) else (64, 32)
        with pytest.raises(ValueError, match="expected|do not divide"):
            add(wrong)


def test_reasons_for_steps_in_torch(fused, monkeypatch):
    def reason_of(model, batch=1):
        before = len(fused)
        run(optimize_generation(model), prompt(batch))
        report = explain_generation(model)
        assert report.steps == 11 and report.steps_in_cpp == len(fused) - before == 0
        ((reason, count),) = report.own_in_torch.items()
        assert count == 11 and reason in str(report)
        return reason, report.obstacles_in_cpp

    model = make_sparse()
    model.model.layers[1].mlp.up_proj = nn.Linear(64, 96, dtype=torch.float64).to(torch.float32).requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.data = model.model.layers[1].mlp.up_proj.weight.data.T.contiguous().T
    reason, now = reason_of(model)
    assert "up_proj of layer 1 is a Linear" in reason and now == (reason,)
    model = make_sparse()
    model.model.layers[2].mlp.act_fn = nn.GELU()
    reason, now = reason_of(model)
    assert "the MLP of layer 2 is a LlamaMLP with GELU" in reason and now == (reason,)
    reason, now = reason_of(make(), batch=7)
    assert "more than 4 sequences at once" in reason and now == ()
    with monkeypatch.context() as patch:
        patch.setattr(extension, "_C", None)
        reason, now = reason_of(make())
        assert "the C++ extension is not built" in reason and now == (reason,)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_sanitizers(tmp_path):
    names = ("decode", "linear", "pack", "threads", "levels/portable", "levels/avx2")
    sources = [*(CSRC / f"{name}.cpp" for name in names), REPOSITORY / "tests/csrc/test_decode.cpp"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    objects = [compile_file(each, tmp_path / f"{each.stem}.o", "-O1", "-g1", *sanitize) for each in sources]
    program = tmp_path / "program"
    subprocess.run([COMPILER, *sanitize, "-pthread", *objects, "-o", program], check=True)
    result = subprocess.run([program, "40"], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and "0 failures" in result.stdout, result.stdout + result.stderr
