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
"""`export_lora`: the active sub-adapter as a plain LoRA adapter, loaded by stock peft in a process that has never seen
this package."""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from support import fresh, models
from support.models import ConvNet, net, outputs, randomize, tiny_llama, tokens
from support.places import TESTS
from torch import nn

from peft_elastic import ElasticLoraConfig
from peft_elastic.supernet import get_elastic_host


pytestmark = pytest.mark.filterwarnings("ignore")

QV = {"r": 8, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], "elastic_ranks": [8, 5, 3]}

# name -> (expression for the base model, expression for its input, settings)
CASES = {
    "plain": ("tiny_llama()", "tokens()", {}),
    "all-linear": ("tiny_llama()", "tokens()", {"target_modules": "all-linear"}),
    "regex": ("tiny_llama()", "tokens()", {"target_modules": r".*layers\.1\.self_attn\.(q|o)_proj"}),
    "one group": ("tiny_llama()", "tokens()", {"rank_groups": "block"}),
    "dora": ("tiny_llama()", "tokens()", {"use_dora": True}),
    "rslora": ("tiny_llama()", "tokens()", {"use_rslora": True}),
    "rslora with patterns": (
        "tiny_llama()",
        "tokens()",
        {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
    ),
    "patterns": ("tiny_llama()", "tokens()", {"rank_pattern": {"layers.0.*": 6}, "alpha_pattern": {"q_proj": 7}}),
    "conv1d": ("tiny_gpt2()", "tokens()", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}),
    "embedding": ("tiny_llama()", "tokens()", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": (
        "tiny_gemma()",
        "tokens()",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "modules_to_save": ("tiny_llama()", "tokens()", {"modules_to_save": ["lm_head"]}),
    "trainable tokens": ("tiny_llama()", "tokens()", {"trainable_token_indices": [4, 5]}),
    "experts": (
        "tiny_mixtral()",
        "tokens()",
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "old names of experts": ("tiny_mixtral()", "tokens()", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "biases": ("tiny_opt()", "tokens()", {"bias": "all"}),
    "lora_only biases": ("tiny_opt()", "tokens()", {"bias": "lora_only"}),
    "lora_bias": ("tiny_opt()", "tokens()", {"target_modules": ["fc1"], "lora_bias": True}),
    "classifier": ("tiny_bert()", "tokens()", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "encoder and decoder": (
        "tiny_t5()",
        "{'input_ids': tokens(), 'decoder_input_ids': tokens(length=3)}",
        {"target_modules": ["q", "wo"]},
    ),
    "convolutions": (
        "net(ConvNet)",
        "torch.linspace(-1, 1, 336).view(2, 3, 7, 8)",
        {"r": 8, "elastic_ranks": [8, 4], "target_modules": ["conv", "grouped", "pointwise", "head"]},
    ),
    "attention": (
        "net(AttentionNet)",
        "torch.linspace(-1, 1, 120).view(2, 5, 12)",
        {"target_modules": ["first", "attention"]},
    ),
    "ends of paths": (
        # a path that ends in another path, and one that is a regular expression
        "net(lambda: nn.ModuleDict({'a+b': nn.Linear(4, 4)} | {i: nn.ModuleDict({'a+b': nn.Linear(4, 4)}) for i in 'xy'}))",
        "None",
        {"target_modules": ["a+b"]},
    ),
}

FRESH = """
import json, sys
import torch
from support.models import *
from peft import PeftModel, PeftType

for name, (base, inputs) in json.load(open(sys.argv[1])).items():
    for folder in (name, f"{name} padded"):
        model = PeftModel.from_pretrained(eval(base), f"{sys.argv[2]}/{folder}").eval()
        assert model.peft_config["default"].peft_type == "LORA"
        result = outputs(model, eval(inputs)) if inputs != "None" else dict(model.named_parameters())
        torch.save(result, f"{sys.argv[2]}/{folder}.pt")
try:
    PeftModel.from_pretrained(tiny_llama(), f"{sys.argv[2]}/elastic")
except KeyError as error:
    assert "ELASTIC_LORA" in str(error)
else:
    raise AssertionError("this process knows the type")
assert "peft_elastic" not in sys.modules and "ELASTIC_LORA" not in PeftType.__members__
"""


def make(name):
    base, inputs, settings = CASES[name]
    scope = vars(models)
    model = get_peft_model(eval(base, scope), ElasticLoraConfig(**(QV | settings))).eval()
    randomize(model, seed=len(name))
    with torch.no_grad():
        for n, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" not in n:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if name == "one group":
        model.set_subnet("min")
    elif name == "ends of paths":
        model.set_subnet({"rank:a+b": 3, "rank:x.a+b": 5, "rank:y.a+b": 5})
    else:
        model.set_subnet(model.search_space.sample(2))
    return model, eval(inputs, scope)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Everything exported, and loaded in one fresh process: (name, padded?) -> (model, inputs, its outputs there)."""
    folder = tmp_path_factory.mktemp("exported")
    made = {name: make(name) for name in CASES}
    for name, (model, _) in made.items():
        model.export_lora(folder / name, pad=False)
        model.export_lora(folder / f"{name} padded")
    made["plain"][0].save_pretrained(folder / "elastic")
    (folder / "cases.json").write_text(json.dumps({name: case[:2] for name, case in CASES.items()}))
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-W", "ignore", "-c", FRESH, folder / "cases.json", folder]
    # in another folder: this package must not be found by chance
    result = fresh.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    folders = {(name, pad): f"{name} padded" if pad else name for name in CASES for pad in (False, True)}
    return {key: (*made[key[0]], torch.load(folder / f"{path}.pt"), folder / path) for key, path in folders.items()}


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_process_without_this_package_computes_the_same(exported, name, pad):
    model, inputs, found, folder = exported[name, pad]
    if inputs is not None:
        torch.testing.assert_close(found, outputs(model, inputs), rtol=1e-5, atol=1e-5)
        maximum = model.active_subnet
        model.set_subnet("max")
        assert (outputs(model, inputs) - found).abs().max() > 1e-4  # the subnet matters
        model.set_subnet(maximum)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert not {"elastic_ranks", "rank_groups", "active_subnet"} & config.keys()
    # nothing but the active ranks is in the file, or all of them have the same rank
    tensors = load_file(folder / "adapter_model.safetensors")
    size = sum(t.numel() for n, t in tensors.items() if ".lora_" in n)
    if "dora" not in name and "bias" not in name and not pad:
        active = model.search_space.count_parameters(model.active_subnet)
        assert size == active
    experts = 4 if "experts" in name else 1
    ranks = {n: t.shape[0] for n, t in tensors.items() if n.endswith(("lora_A.weight", "lora_embedding_A"))}
    assert config["r"] in {rank // width for rank in ranks.values() for width in (1, experts)}
    assert config["r"] == max(rank // (experts if ".experts." in n else 1) for n, rank in ranks.items())
    if pad:
        assert not config["rank_pattern"] and not config["alpha_pattern"]
        assert {rank // (experts if ".experts." in n else 1) for n, rank in ranks.items()} == {config["r"]}


def test_paths_that_end_in_others(exported):
    _, _, found, _ = exported["ends of paths", False]
    for path, rank in {"a+b": 3, "x.a+b": 5, "y.a+b": 5}.items():
        assert found[f"base_model.model.{path}.lora_A.default.weight"].shape[0] == rank


def test_the_scaling_can_be_read_in_either_way(exported):
    """`lora_alpha / r` for programs that take the shapes from the tensors, the patterns for peft."""
    for name in ("plain", "all-linear", "experts"):
        model, _, _, folder = exported[name, False]
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["lora_alpha"] / config["r"] == 12 / 8
        assert config["use_rslora"] is False
        for path, k in config["rank_pattern"].items():
            assert config["alpha_pattern"][path] == 1.5 * k
        assert config["rank_pattern"]


def reader_rules(folder, path):
    """The update of a module as three programs compute it from the file: peft's patterns aside, these are all they read."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{path}.lora_{side}.weight"].double() for side in "AB")
    update, rank = b @ a, a.shape[0]
    assert rank <= config["r"]  # vLLM has room for that many
    return {
        "vLLM": config["lora_alpha"] / config["r"] * update,
        "llama.cpp": config["lora_alpha"] / rank * update,
        "a reader of the patterns": config["alpha_pattern"].get(path, config["lora_alpha"]) / rank * update,
    }


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 5}}, {"rank_pattern": {"q_proj": 6}}]
)
@pytest.mark.parametrize("seed", range(3))
def test_other_programs_read_a_padded_export_right(tmp_path, settings, seed):
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**(QV | settings))).eval()
    randomize(model, seed=seed)
    model.set_subnet(model.search_space.sample(seed))
    model.export_lora(tmp_path)
    for path, layer in model.base_model._state.layers("default").items():
        expected = layer.get_delta_weight("default").double()
        for reader, update in reader_rules(tmp_path, path).items():
            torch.testing.assert_close(update, expected, rtol=1e-5, atol=1e-6, msg=f"{reader}, {path}")


def test_an_unpadded_export_says_the_largest_rank(tmp_path):
    """The most frequent one, say, would make vLLM refuse the file, or read past its buffers."""
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV)).eval()
    randomize(model)
    smallest = model.search_space.min.to_dict()
    model.set_subnet(smallest | {next(iter(smallest)): 5})
    model.export_lora(tmp_path, pad=False)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 7.5)
    assert sorted(config["rank_pattern"].values()) == [3, 3, 3]
    for path, layer in model.base_model._state.layers("default").items():
        readers = reader_rules(tmp_path, path)
        for reader in ("vLLM", "a reader of the patterns"):
            torch.testing.assert_close(
                readers[reader].float(), layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6
            )


def test_a_padded_rank_fits_the_groups_of_every_convolution(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.three = nn.Conv1d(6, 6, 3, groups=3)
            self.two = nn.Conv1d(6, 4, 1, groups=2)

        def forward(self, x):
            return self.two(self.three(x))

    def base():
        torch.manual_seed(0)
        return Net()

    ranks = {"two": 4, "three": 9}
    config = ElasticLoraConfig(r=6, target_modules=list(ranks), rank_pattern=ranks, elastic_ranks=[6])
    model = get_peft_model(base(), config).eval()
    randomize(model)
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x)
        model.export_lora(tmp_path)
        found = PeftModel.from_pretrained(base(), tmp_path).eval()(x)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 12
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_pad_is_checked(tmp_path, value):
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV))
    with pytest.raises(ValueError, match=f"`pad` must be True or False, got {value!r}"):
        model.export_lora(tmp_path / "new", pad=value)
    assert not (tmp_path / "new").exists()


def compiled_base(model):
    return torch.compile(model, backend="eager")


def compiled_layers(model):
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager")
    return model


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(layer)
    return model


BASE_WRAPPERS = {
    "compiled": compiled_base,
    "compiled layer by layer": compiled_layers,
    "compiled in place": compiled_in_place,
    "checkpointed": checkpointed,
    "data parallel": nn.DataParallel,
}


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("wrapper", BASE_WRAPPERS)
def test_the_base_may_be_wrapped(tmp_path, wrapper, pad):
    groups = [["q_proj", "v_proj"]]
    settings = QV | {"rank_groups": groups, "target_modules": ["q_proj", "v_proj", "embed_tokens"]}
    model = get_peft_model(BASE_WRAPPERS[wrapper](tiny_llama()), ElasticLoraConfig(**settings)).eval()
    randomize(model)
    if wrapper != "data parallel":
        assert "rank:model.layers.0.q_proj+v_proj" in model.search_space.min
    model.set_subnet(model.search_space.sample(4))
    expected = outputs(model, tokens())
    model.export_lora(tmp_path, pad=pad)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    plain = get_peft_model(tiny_llama(), LoraConfig(target_modules=settings["target_modules"]))
    wanted = {name for name in get_peft_model_state_dict(plain) if "base_layer" not in name}
    assert {
        name for name in names if "base_layer" not in name
    } == wanted  # peft adds the embedding itself, where it finds it
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, tokens()), expected, rtol=1e-5, atol=1e-5)


def test_the_peft_model_may_be_wrapped(tmp_path):
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV)).eval()
    randomize(model)
    model.set_subnet("min")
    compiled = torch.compile(model, backend="eager")
    expected = outputs(compiled, tokens())
    compiled.export_lora(tmp_path / "compiled")
    get_elastic_host(nn.DataParallel(model)).export_lora(tmp_path / "parallel")
    for folder in ("compiled", "parallel"):
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / folder).eval()
        torch.testing.assert_close(outputs(loaded, tokens()), expected, rtol=1e-5, atol=1e-5)


def test_an_export_that_keeps_the_rank_does_not_load(tmp_path):
    """The mistake of earlier implementations: slices of A and B beside a configuration that says r=8."""
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV)).eval()
    randomize(model)
    model.set_subnet("min")
    LoraConfig(**{k: v for k, v in QV.items() if k != "elastic_ranks"}).save_pretrained(tmp_path)
    sliced = {
        name: (tensor[:3] if "lora_A" in name else tensor[:, :3]).contiguous()
        for name, tensor in get_peft_model_state_dict(model).items()
    }
    save_file(sliced, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match=r"size mismatch.*\[3, 32\]"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)
    # these are the tensors that belong there, so it was the configuration
    model.export_lora(tmp_path, pad=False)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert found.keys() == sliced.keys() and all(torch.equal(found[n], sliced[n]) for n in found)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, tokens()), outputs(model, tokens()), rtol=1e-5, atol=1e-5)


def test_every_subnet_can_be_exported(tmp_path):
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**(QV | {"target_modules": "all-linear"}))).eval()
    randomize(model)
    space = model.search_space
    for subnet in (space.max, space.min, space.heuristic, *(space.sample(seed) for seed in range(3))):
        model.set_subnet(subnet)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model.export_lora(tmp_path)  # over the one before
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert model.active_subnet == subnet
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
        torch.testing.assert_close(outputs(loaded, tokens()), outputs(model, tokens()), rtol=1e-5, atol=1e-5)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(outputs(merged, tokens()), outputs(model, tokens()), rtol=1e-5, atol=1e-5)


def test_one_of_several_adapters(tmp_path):
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV)).eval()
    model.add_adapter("b", ElasticLoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    randomize(model)
    model.set_subnet("min", adapter_name="b")
    model.export_lora(str(tmp_path / "b"), adapter_name="b")
    model.export_lora(tmp_path / "default")
    for name in ("default", "b"):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / name).eval()
        torch.testing.assert_close(outputs(loaded, tokens()), outputs(model, tokens()), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"one of the elastic adapters \['default', 'b'\], got 'c'"):
        model.export_lora(tmp_path, adapter_name="c")


def test_the_base_model_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "base")
    for task_type in ("CAUSAL_LM", None):
        model = get_peft_model(base, ElasticLoraConfig(**QV, task_type=task_type)).eval()
        randomize(model)
        model.set_subnet("min")
        model.export_lora(tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(tmp_path / "base")
        assert (config["auto_mapping"] is None) == (task_type is not None)
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(outputs(loaded, tokens()), outputs(model, tokens()), rtol=1e-5, atol=1e-5)
        base = model.unload()


def test_files_are_replaced_when_they_are_complete(tmp_path):
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV)).eval()
    (tmp_path / "README.md").write_text("kept")
    model.export_lora(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    # the weights cannot be written: a folder of that name is in the way
    model.set_subnet("min")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "weights")
    (tmp_path / "adapter_model.safetensors").mkdir()
    with pytest.raises(OSError):
        model.export_lora(tmp_path)
    (tmp_path / "adapter_model.safetensors").rmdir()
    (tmp_path / "weights").rename(tmp_path / "adapter_model.safetensors")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    mode = (tmp_path / "adapter_config.json").stat().st_mode
    (tmp_path / "any").write_text("")
    assert mode == (tmp_path / "any").stat().st_mode


def test_folders_that_cannot_be_written():
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV)).eval()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        existing = folder / "read-only"
        model.export_lora(existing)
        before = {p.name: p.read_bytes() for p in existing.iterdir()}
        model.set_subnet("min")
        existing.chmod(0o555)
        folder.chmod(0o555)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            for target in (existing, folder / "new"):
                with pytest.raises(PermissionError):
                    model.export_lora(target)
        finally:
            if user == 0:
                os.seteuid(0)
            folder.chmod(0o755)
            existing.chmod(0o755)
        assert {p.name: p.read_bytes() for p in existing.iterdir()} == before
        assert not (folder / "new").exists()
        (folder / "file").write_text("x")
        with pytest.raises(ValueError, match="`save_directory` must be a folder, '.*file' is a file"):
            model.export_lora(folder / "file")


def test_merged_adapters_can_be_exported(tmp_path):
    model = get_peft_model(tiny_llama(), ElasticLoraConfig(**QV)).eval()
    randomize(model)
    model.set_subnet("min")
    before = outputs(model, tokens())
    model.merge_adapter()
    model.export_lora(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(outputs(loaded, tokens()), before, rtol=1e-5, atol=1e-5)


def test_half_precision_is_kept(tmp_path):
    model = get_peft_model(
        tiny_llama().to(torch.bfloat16), ElasticLoraConfig(**QV), autocast_adapter_dtype=False
    ).eval()
    model.export_lora(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}


def test_convolution_groups_are_sliced_in_every_group(tmp_path):
    """A's rows lie group by group; the first k of all of them would belong to the first group."""
    model = get_peft_model(
        net(ConvNet), ElasticLoraConfig(r=8, elastic_ranks=[8, 4], target_modules=["grouped"])
    ).eval()
    randomize(model)
    model.set_subnet("min")
    model.export_lora(tmp_path)
    full = get_peft_model_state_dict(model)["base_model.model.grouped.lora_A.weight"]
    found = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.grouped.lora_A.weight"]
    assert torch.equal(found, full[[0, 1, 4, 5]])
