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
"""Writes the files that `test_stored.py` reads, with the package of a commit before it was rearranged:

    git worktree add --detach ../before 147743b
    (cd ../before && python setup.py build_ext --inplace)
    OMP_NUM_THREADS=1 PYTHONPATH=../before python tests/stored/write.py

Run it again only for a format that changes on purpose, and then for that alone: what it wrote is what users have on their disks.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import shutil
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from shared import (
    BOUNDS,
    LAYERS,
    PRUNERS,
    PRUNING_JOURNAL,
    SEARCH,
    STORED,
    TARGETS,
    VERSIONS,
    VOCABULARY,
    base,
    calibration,
    densified,
    digests,
    drawn,
    evaluate,
    first,
    held_out,
    latency_model,
    layer_inputs,
    load,
    logits,
    machine,
    outcome,
    plan_outcome,
    pruned,
    trainer,
)

import peft_elastic
from peft_elastic import (
    ElasticLoraConfig,
    GPTQConfig,
    MagnitudeConfig,
    PruningPlan,
    RTNConfig,
    SearchResult,
    SparseQALoraConfig,
    load_gptq,
    prune,
    prune_structured,
    quantize,
    save_gptq,
    search_subnet,
    sparsify_linears,
)
from peft_elastic.journal import Journal
from peft_elastic.pruning.structured import to_pruning_config


COMMIT = "147743b"
# what is not written here
_KEPT = {"__pycache__", "shared.py", "write.py", "write_api.py", "public_api.json"}

outputs: dict[str, torch.Tensor] = {}
weights: dict[str, dict[str, str]] = {}
notes: dict[str, Any] = {"plans": {}}


def main() -> None:
    package = Path(peft_elastic.__file__).parent.parent
    commit = _git(package, "rev-parse", "HEAD")
    if not commit.startswith(COMMIT) or _git(package, "status", "--porcelain", "peft_elastic", "csrc"):
        raise SystemExit(f"{package} is not an unchanged checkout of {COMMIT}.")
    os.environ["PEFT_ELASTIC_HOME"] = tempfile.mkdtemp()  # measurements of this run alone
    torch.set_num_threads(1)
    for path in STORED.iterdir():
        if path.name not in _KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    write_base()
    write_layers()
    write_gptq()
    write_sparse()
    write_plans()
    write_blocks()
    write_adapters()
    write_search()
    write_training()

    for path in STORED.rglob("*"):
        if path.name == "README.md" or path.suffix in (".bin", ".pt", ".pth") or path.name == "generation_config.json":
            path.unlink()
    save_file(outputs, STORED / "outputs.safetensors")
    versions = {"python": platform.python_version()} | {name: metadata.version(name) for name in VERSIONS}
    note = {"commit": commit, "versions": versions, "machine": machine(), **notes, "weights": weights}
    write_json(STORED / "written.json", note)
    print(sum(path.stat().st_size for path in STORED.rglob("*") if path.is_file() and path.name not in _KEPT), "bytes")


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1 if path.stem == "written" else None) + "\n", encoding="utf-8")


def note(name: str, model: Any, reference: Any = None) -> None:
    """Remember what a model computes, in its own type and in float64, and with which weights."""
    weights[name] = digests(model)
    with torch.no_grad():
        found, wanted = logits(model), logits((densified(model) if reference is None else reference).double())
    keep(name, found, wanted)


def keep(name: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
    found, wanted = found.detach(), wanted.detach()
    error = float((found.double() - wanted).abs().max() / wanted.abs().max())
    print(f"{name}: relative error {error:.1e}")
    assert wanted.dtype == torch.float64 and error < BOUNDS[found.dtype] / 3
    outputs[name], outputs[f"{name}, float64"] = found.contiguous(), wanted.contiguous()


def random_(model: Any, seed: int) -> Any:
    """Random parameters that bfloat16 can hold, as large as those of a trained model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            values = 1 + 0.2 * values if "norm" in name or "ln_" in name and "weight" in name else 0.2 * values
            parameter.copy_(values.bfloat16())
    return model.eval()


def write_base() -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    random_(transformers.LlamaForCausalLM(config), 0).bfloat16().save_pretrained(STORED / "base")
    note("base", base())
    note("pruned", pruned())


# -- packed weights ----------------------------------------------------------------------------------------------------


def write_layers() -> None:
    (STORED / "layers").mkdir()
    for name, make in LAYERS.items():
        layer = make()
        save_file(layer.state_dict(), STORED / "layers" / f"{name}.safetensors")
        x = layer_inputs(layer.in_features)
        linear = layer.to_linear()
        weights[f"layers/{name}"] = digests(linear)
        keep(f"layers/{name}", layer(x), linear.double()(x.double()))


def write_gptq() -> None:
    """Integers of 2, 4 and 8 bits, with zero points in the middle and elsewhere, by both of the methods."""
    model = pruned().bfloat16()
    quantize(model, GPTQConfig(bits=4, group_size=16), calibration(), progress=False)
    save_gptq(model, STORED / "gptq/int4")
    model = first(2).bfloat16()
    quantize(model, RTNConfig(bits=8, group_size=-1, symmetric=True), progress=False)
    save_gptq(model, STORED / "gptq/int8")
    model = first(2).bfloat16()
    quantize(model, RTNConfig(bits=2, group_size=16, target_modules=["up_proj", "gate_proj"]), progress=False)
    quantize(
        model, RTNConfig(bits=8, group_size=32, target_modules=["q_proj", "layers.1.self_attn.o_proj"]), progress=False
    )
    save_gptq(model, STORED / "gptq/mixed")
    for name in ("int4", "int8", "mixed"):
        note(f"gptq/{name}", load_gptq(STORED / "gptq" / name))


def write_sparse() -> None:
    models = {"bf16": pruned(1).bfloat16(), "int8": pruned(1)}
    for name, model in models.items():
        sparsify_linears(model, name, when="always")
    models["int4"] = load_gptq(STORED / "gptq/int4")
    sparsify_linears(models["int4"], when="always")
    models["int4-dense"] = first(1)
    quantize(models["int4-dense"], RTNConfig(bits=4, group_size=16), progress=False)
    sparsify_linears(models["int4-dense"], when="always", min_sparsity=0.9)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    models["gpt2-int8"] = random_(transformers.GPT2LMHeadModel(config), 1)
    prune(models["gpt2-int8"], MagnitudeConfig(sparsity=0.6), progress=False)
    sparsify_linears(models["gpt2-int8"], "int8", when="always")
    for name, model in models.items():
        values = {module.value_dtype for module in model.modules() if hasattr(module, "value_dtype")}
        assert values == {name.removeprefix("gpt2-").removesuffix("-dense")}, (name, values)
        model.save_pretrained(STORED / "sparse" / name)
        note(f"sparse/{name}", load(STORED / "sparse" / name, "auto"))


# -- structure ---------------------------------------------------------------------------------------------------------


def write_plans() -> None:
    for name, config in PRUNERS.items():
        model = base()
        plan = prune_structured(model, config, calibration(), progress=False)
        (STORED / "plans").mkdir(exist_ok=True)
        plan.save(STORED / "plans" / f"{name}.json")
        print(name, plan.values)
        assert plan.values
        note(f"plans/{name}", model)
        notes["plans"][name] = {"text": str(plan), "plain block passes": plan.plain_block_passes}
    write_json(STORED / "plans/intel.json", to_pruning_config(plan, base()))

    with tempfile.TemporaryDirectory() as whole:
        again = prune_structured(base(), PRUNING_JOURNAL, calibration(), save_dir=whole, extract=False, progress=False)
        assert plan_outcome(again) == plan_outcome(PruningPlan.load(STORED / "plans/multi.json"))
        notes["pruning rows"] = len((Path(whole) / "evaluations.jsonl").read_text().splitlines()) - 1
    folder = STORED / "pruning-journal"
    with interrupted_after(9):
        prune_structured(base(), PRUNING_JOURNAL, calibration(), save_dir=folder, progress=False)


class interrupted_after:
    """The process ends while it writes another row to a journal."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __enter__(self) -> None:
        self.append = append = Journal.append
        rows = self.rows

        def interrupted(journal: Journal, row: Any) -> None:
            if len(journal.rows) == rows:
                with open(journal.path, "a") as file:
                    file.write(json.dumps(dict(row))[:25])
                raise KeyboardInterrupt
            append(journal, row)

        Journal.append = interrupted  # type: ignore[method-assign]

    def __exit__(self, kind: Any, *_: Any) -> bool:
        Journal.append = self.append  # type: ignore[method-assign]
        assert kind is KeyboardInterrupt
        return True


def write_blocks() -> None:
    model = base()
    prune_structured(model, PRUNERS["multi"], calibration(), progress=False)
    model.bfloat16().save_pretrained(STORED / "blocks/float")
    note("blocks/float", load(STORED / "blocks/float"))
    prune(model, MagnitudeConfig(sparsity=0.5), progress=False)
    sparsify_linears(model, "bf16", when="always")
    model.save_pretrained(STORED / "blocks/sparse")
    note("blocks/sparse", load(STORED / "blocks/sparse", "auto"))


# -- adapters ------------------------------------------------------------------------------------------------------------


def adapted(model: Any, config: Any, seed: int) -> Any:
    model = get_peft_model(model, config).eval()
    model.peft_config["default"].base_model_name_or_path = "base"  # on any machine
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def merged(model: Any) -> Any:
    return copy.deepcopy(model).merge_and_unload(sparse_kernel=False)


def write_adapters() -> None:
    ranks = {"r": 5, "lora_alpha": 12, "elastic_ranks": [5, 3, 2], "target_modules": TARGETS}
    model = adapted(base(), ElasticLoraConfig(**ranks, rank_groups=[["q_proj", "v_proj"], ["down_proj"]]), 1)
    write_adapter("ranks", model, model.search_space.sample(3))
    model.export_lora(STORED / "exported")

    model = structural()
    values = dict.fromkeys(model.search_space.max, None) | dict(model.search_space.sample(5))
    blocks = "model.layers.{}".format
    values |= {f"mlp:{blocks(0)}": 24, f"heads:{blocks(0)}": 2, f"heads:{blocks(2)}": 4, f"mlp:{blocks(2)}": 32}
    values |= {f"depth:{blocks(1)}": 0, f"depth:{blocks(2)}.attention": 0}
    write_adapter("structural", model, values)
    (STORED / "documents").mkdir()
    (STORED / "documents/space.json").write_text(model.search_space.to_json(), encoding="utf-8")
    model.active_subnet.save(STORED / "documents/subnet.json")

    model = adapted(pruned(), SparseQALoraConfig(**ranks), 2)
    write_adapter("sparse", model, "heuristic")
    aware = {"quantization_aware": True, **ranks}
    for name, build, options in (
        ("quantized", lambda: load_gptq(STORED / "gptq/int4"), {}),
        ("fitted", pruned, {"bits": 4, "group_size": 16, "clipping": "mse"}),
    ):
        for seed in range(3, 1000):
            model = adapted(build(), SparseQALoraConfig(**aware, **options), seed)
            model.set_subnet("heuristic")
            if margin(model) > 4e-5:
                break
        write_adapter(name, model, "heuristic")


def structural() -> Any:
    config = ElasticLoraConfig(
        r=3,
        lora_alpha=5,
        elastic_ranks=[3, 2, 1],
        rank_groups="block",
        target_modules="all-linear",
        elastic_width={"heads": [1.0, 0.5], "mlp": [1.0, 2 / 3, 0.5]},
        elastic_depth=[1, "2.attention", "2.mlp"],
        importance="magnitude",
    )
    return adapted(base(), config, 7)


def margin(model: Any) -> float:
    """How far the weights are at least from where a rounding error would change an integer."""
    least = 1.0
    for module in model.modules():
        if "default" not in getattr(module, "lora_grid", ()):
            continue
        grid = module.lora_grid["default"]
        rank = module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach()
        active = [v for k, v in model.active_subnet.items() if k.startswith("rank:")]
        for k in set(active):
            weight = module.get_base_layer().weight.detach().double()
            update = (rank[1][:, :k].double() @ rank[0][:k].double()) * module.scaling["default"]
            index = grid.g_idx.long()
            scales, zeros = grid.scales.double()[:, index], grid.zeros.double()[:, index]
            exact = (weight + update * (weight != 0)) / scales + zeros
            least = min(least, (exact - exact.floor() - 0.5).abs().min().item())
    return least


def write_adapter(name: str, model: Any, subnet: Any) -> None:
    model.set_subnet(subnet)
    assert model.active_subnet != model.search_space.max
    model.save_pretrained(STORED / "adapters" / name)
    note(f"adapters/{name}", merged(model))
    for subnet_name in ("beside", "max"):
        keep(f"adapters/{name}, {subnet_name}", logits(model), logits(densified(merged(model)).double()))
        model.set_subnet("max")
    model.set_subnet(subnet)


# -- search and training -------------------------------------------------------------------------------------------------


def write_search() -> None:
    model = structural()
    latency = latency_model(model)
    folder = STORED / "search"
    search_subnet(model, evaluate, save_dir=folder, held_out=held_out, latency=latency, **SEARCH)
    (folder / "history.jsonl").unlink()
    (folder / "held_out.jsonl").unlink()
    journal = STORED / "search-journal"
    journal.mkdir()
    shutil.copy(folder / "latency.json", journal)  # predictions as in the whole search
    os.replace(folder / "latency.json", STORED / "documents/latency.json")
    with interrupted_after(11):
        search_subnet(model, evaluate, save_dir=journal, held_out=held_out, latency=latency, **SEARCH)
    begun = latency.as_begun(STORED / "documents/latency.json")
    subnets = [model.search_space.sample(seed) for seed in range(5)]
    predictions = [[subnet.to_dict(), begun.predict(subnet)] for subnet in subnets]
    write_json(STORED / "documents/predictions.json", predictions)
    write_json(STORED / "documents/outcome.json", outcome(SearchResult.load(folder)))


def write_training() -> None:
    model = structural()
    with tempfile.TemporaryDirectory() as folder:
        write_json(STORED / "training/subnets.json", drawn(model, Path(folder)))
        trainer(model, Path(folder)).train()
        shutil.copytree(Path(folder) / "checkpoint-2", STORED / "training/checkpoint-2")
        last = load_file(Path(folder) / "checkpoint-4/adapter_model.safetensors")
        for name, tensor in last.items():
            if "layers.2.mlp" in name or "layers.0.self_attn.q" in name:  # enough to see a step that differs
                outputs[f"training/{name}"] = tensor


if __name__ == "__main__":
    main()
