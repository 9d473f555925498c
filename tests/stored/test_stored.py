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
"""What commit 147743b wrote is read as it was meant: every kind of file of that time, in `stored/`, still gives the same weights, the
same outputs and the same decisions. `stored/write.py` says how they came about.

Weights, integers, plans and subnets have to be equal on any machine. What is computed in floating point has to have the bits of then
where the machine is alike (`shared.machine`), and otherwise be as close to the float64 result as its type allows.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from stored.shared import (
    BOUNDS,
    GROUP,
    IN,
    LAYERS,
    OUT,
    PRUNERS,
    PRUNING_JOURNAL,
    SEARCH,
    STEPS,
    STORED,
    base,
    calibration,
    digests,
    drawn,
    evaluate,
    held_out,
    latency_model,
    layer_inputs,
    level,
    load,
    logits,
    machine,
    outcome,
    plan_outcome,
    pruned,
    read_json,
    trainer,
)
from support.places import TESTS
from torch import nn

from peft_elastic import (
    PruningPlan,
    QuantizedLinear,
    SearchResult,
    SearchSpace,
    SparseLinear,
    Subnet,
    load_gptq,
    prune_structured,
    save_gptq,
    search_subnet,
)
from peft_elastic.pruning.structured import from_pruning_config, to_pruning_config


WRITTEN = read_json(STORED / "written.json")
OUTPUTS = load_file(STORED / "outputs.safetensors")
# A check of each stored file: it takes an empty folder.
CHECKS: dict[str, Callable[[Path], None]] = {}


def check(*names: str) -> Callable[[Callable[[str, Path], None]], None]:
    def add(function: Callable[[str, Path], None]) -> None:
        for name in names:
            CHECKS[name] = lambda folder, name=name: function(name, folder)

    return add


# -- what is equal -----------------------------------------------------------------------------------------------------


def is_same_machine() -> bool:
    return machine() == WRITTEN["machine"]


def assert_output(name: str, found: torch.Tensor) -> None:
    """The bits of then on a machine like that of then; anywhere close to the float64 result of then."""
    stored, exact = OUTPUTS[name], OUTPUTS[f"{name}, float64"]
    assert found.dtype == stored.dtype
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert error < BOUNDS[found.dtype], f"{name}: the largest error is {error:.1e} of the largest output"
    if is_same_machine():
        assert torch.equal(found, stored), f"{name}: other bits, with an error of {error:.1e}"


def assert_weights(name: str, model: Any) -> None:
    assert digests(model) == WRITTEN["weights"][name]


def assert_model(name: str, model: Any) -> None:
    assert_weights(name, model)
    assert_output(name, logits(model))


def assert_tensors(found: Path, stored: Path, cast: bool = False) -> None:
    """The same tensors in a file that is written now."""
    now, then = load_file(found), load_file(stored)
    assert sorted(now) == sorted(then)
    for name, tensor in then.items():
        assert torch.equal(now[name].to(tensor.dtype) if cast else now[name], tensor), name


# -- packed weights ----------------------------------------------------------------------------------------------------


@check("base/float32")
def _base(name: str, folder: Path) -> None:
    assert_model("base", base())
    assert_model("pruned", pruned())


@check(*(f"layers/{name}" for name in LAYERS))
def _layer(name: str, folder: Path) -> None:
    kind = name.partition("/")[2]
    state = load_file(STORED / f"{name}.safetensors")
    if kind in ("bf16", "int8"):
        layer = SparseLinear.from_linear(nn.Linear(IN, OUT), kind)
    else:
        ones = torch.ones(OUT, -(-IN // GROUP))
        q = torch.ones(OUT, IN).int()
        layer = SparseLinear.from_quantized(
            q, ones, ones.int() * 2, group_size=GROUP, bias=ones[:, 0], sparse=kind == "int4"
        )
    layer.load_state_dict(state)
    assert (layer.value_dtype, layer.has_bitmask) == (kind.removesuffix("-dense"), "dense" not in kind)
    assert_weights(name, layer.to_linear())
    assert_output(name, layer(layer_inputs(IN)))
    now = layer.state_dict()
    assert sorted(now) == sorted(state) and all(torch.equal(now[key], state[key]) for key in state)
    # and what is made of the same numbers now is stored as it was then
    made = LAYERS[kind]().state_dict()
    assert sorted(made) == sorted(state) and all(torch.equal(made[key], state[key]) for key in state)


@check(*(f"sparse/{path.name}" for path in sorted((STORED / "sparse").iterdir())))
def _sparse(name: str, folder: Path) -> None:
    model = load(STORED / name, "auto")
    described = read_json(STORED / name / "config.json")["quantization_config"]["layers"]
    layers = {path: m.value_dtype for path, m in model.named_modules() if isinstance(m, SparseLinear)}
    assert layers == {path: entry["value_dtype"] for path, entry in described.items()}
    assert len(layers) >= 4
    assert_model(name, model)
    model.save_pretrained(folder / "again")
    assert_tensors(folder / "again/model.safetensors", STORED / name / "model.safetensors")
    assert read_json(folder / "again/config.json")["quantization_config"]["layers"] == described


@check("gptq/int4", "gptq/int8", "gptq/mixed")
def _gptq(name: str, folder: Path) -> None:
    model = load_gptq(STORED / name)
    bits = {path: m.grid.bits for path, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert set(bits.values()) == {"gptq/int4": {4}, "gptq/int8": {8}, "gptq/mixed": {2, 8}}[name]
    assert_model(name, model)
    save_gptq(model, folder / "again")
    assert_tensors(folder / "again/model.safetensors", STORED / name / "model.safetensors", cast=True)
    now, then = (read_json(path / "quantize_config.json") for path in (folder / "again", STORED / name))
    assert {**now, "meta": None} == {**then, "meta": None}
    now, then = (read_json(path / "config.json")["quantization_config"] for path in (folder / "again", STORED / name))
    assert {**now, "meta": None} == {**then, "meta": None}


# -- structure ---------------------------------------------------------------------------------------------------------


@check(*(f"plans/{name}" for name in PRUNERS))
def _plan(name: str, folder: Path) -> None:
    text = (STORED / f"{name}.json").read_text(encoding="utf-8")
    plan = PruningPlan.load(STORED / f"{name}.json")
    assert plan.to_json() == text
    noted = WRITTEN["plans"][name.partition("/")[2]]
    assert (str(plan), plan.plain_block_passes) == (noted["text"], noted["plain block passes"])
    model = base()
    plan.narrow(model)
    assert_close(name, logits(model))
    plan.restore(model)
    assert_weights("base", model)
    assert_model(name, plan.extract(model))


def assert_close(name: str, found: torch.Tensor) -> None:
    """To the float64 result alone: the same in another order."""
    exact = OUTPUTS[f"{name}, float64"]
    assert (found.double() - exact).abs().max() < BOUNDS[found.dtype] * exact.abs().max()


@check("plans/intel")
def _intel(name: str, folder: Path) -> None:
    stored, l1 = read_json(STORED / "plans/intel.json"), PruningPlan.load(STORED / "plans/l1.json")
    plan = from_pruning_config(STORED / "plans/intel.json", base())
    assert (plan.values, plan.units) == (l1.values, l1.units)
    assert to_pruning_config(l1, base()) == stored


def continued(file: Path, stored: Path, rows: int) -> None:
    """A journal has all rows that were stored, the torn one again, and so many of them."""
    begun = stored.read_bytes().splitlines(keepends=True)
    now = file.read_bytes().splitlines(keepends=True)
    whole = [line for line in begun if line.endswith(b"\n")]
    assert len(whole) == len(begun) - 1, "the stored journal ends in a torn row"
    assert now[: len(whole)] == whole
    assert len(now) == 1 + rows > len(begun)


@check("pruning-journal/continued")
def _pruning_journal(name: str, folder: Path) -> None:
    shutil.copytree(STORED / "pruning-journal", folder / "journal")
    plan = prune_structured(base(), PRUNING_JOURNAL, calibration(), save_dir=folder / "journal", progress=False)
    assert_plan(plan, PruningPlan.load(STORED / "plans/multi.json"))
    continued(
        folder / "journal/evaluations.jsonl", STORED / "pruning-journal/evaluations.jsonl", WRITTEN["pruning rows"]
    )

    # the order of the units comes from the folder, too: with another one there, others are kept
    (order,) = (folder / "journal").glob("order-*")
    assert order.name in {path.name for path in (STORED / "pruning-journal").iterdir()}
    order.write_text(json.dumps({name: [-score for score in scores] for name, scores in read_json(order).items()}))
    other = prune_structured(base(), PRUNING_JOURNAL, calibration(), save_dir=folder / "journal", progress=False)
    assert other.values == plan.values and other.units != plan.units


def assert_plan(plan: PruningPlan, wanted: PruningPlan) -> None:
    assert (plan.values, plan.units) == (wanted.values, wanted.units)
    assert_alike(plan_outcome(plan), plan_outcome(wanted), 1e-5)


def assert_alike(now: Any, then: Any, rel: float) -> None:
    """Equal JSON, but for the last digits of its numbers."""
    if isinstance(then, dict):
        assert now.keys() == then.keys()
        for key in then:
            assert_alike(now[key], then[key], rel)
    elif isinstance(then, list):
        assert len(now) == len(then)
        for pair in zip(now, then):
            assert_alike(*pair, rel)
    else:
        assert now == (pytest.approx(then, rel=rel) if isinstance(then, float) else then)


@check("blocks/float", "blocks/sparse")
def _blocks(name: str, folder: Path) -> None:
    model = load(STORED / name, torch.float32 if name == "blocks/float" else "auto")
    assert_model(name, model)
    assert any(isinstance(module, SparseLinear) for module in model.modules()) == (name == "blocks/sparse")
    model.save_pretrained(folder / "again")
    again = load(folder / "again", "auto")
    assert_model(name, again)


# -- adapters ------------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, Callable[[], Any]] = {
    "ranks": base,
    "structural": base,
    "sparse": pruned,
    "quantized": lambda: load_gptq(STORED / "gptq/int4"),
    "fitted": pruned,
}


@check(*(f"adapters/{name}" for name in ADAPTERS))
def _adapter(name: str, folder: Path) -> None:
    kind = name.partition("/")[2]
    model = PeftModel.from_pretrained(ADAPTERS[kind](), STORED / name).eval()
    config = read_json(STORED / name / "adapter_config.json")
    assert model.active_subnet.to_dict() == config["active_subnet"]
    assert model.active_subnet != model.search_space.max
    assert_output(f"{name}, beside", logits(model))

    extracted = model.extract_subnet(sparse_kernel=False)
    assert_output(name, logits(extracted))
    if kind in ("quantized", "fitted") or is_same_machine():  # integers, or the sums of a product
        assert_weights(name, extracted)

    model.save_pretrained(folder / "again")
    assert_tensors(folder / "again/adapter_model.safetensors", STORED / name / "adapter_model.safetensors")
    now, then = (read_json(path / "adapter_config.json") for path in (folder / "again", STORED / name))
    for key in then.keys() - {"peft_version", "base_model_name_or_path"}:
        assert in_order(now[key]) == in_order(then[key]), key
    model.set_subnet("max")
    assert_output(f"{name}, max", logits(model))


@check("exported/lora")
def _exported(name: str, folder: Path) -> None:
    model = PeftModel.from_pretrained(base(), STORED / "exported").eval()
    assert type(model.peft_config["default"]).__name__ == "LoraConfig"
    assert_close("adapters/ranks, beside", logits(model))
    elastic = PeftModel.from_pretrained(base(), STORED / "adapters/ranks")
    elastic.export_lora(folder / "again", pad=False)
    assert_tensors(folder / "again/adapter_model.safetensors", STORED / "exported/adapter_model.safetensors")
    now, then = (read_json(path / "adapter_config.json") for path in (folder / "again", STORED / "exported"))
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "peft_type", "use_rslora"):
        assert in_order(now[key]) == in_order(then[key]), key


def in_order(value: Any) -> Any:
    """peft writes sets as lists."""
    return sorted(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


# -- search and training -------------------------------------------------------------------------------------------------


def structural() -> Any:
    return PeftModel.from_pretrained(base(), STORED / "adapters/structural").eval()


@check("documents/spaces and measurements")
def _documents(name: str, folder: Path) -> None:
    text = (STORED / "documents/space.json").read_text(encoding="utf-8")
    space = SearchSpace.from_json(text)
    assert space.to_json() == text
    model = structural()
    assert space == model.search_space
    subnet = Subnet.load(STORED / "documents/subnet.json")
    assert subnet == model.active_subnet and subnet in space
    subnet.save(folder / "subnet.json")
    assert (folder / "subnet.json").read_bytes() == (STORED / "documents/subnet.json").read_bytes()

    latency = latency_model(model).as_begun(STORED / "documents/latency.json")
    for values, seconds in read_json(STORED / "documents/predictions.json"):
        assert latency.predict(values) == pytest.approx(seconds, rel=1e-12)
    latency.save(folder / "latency.json")
    assert read_json(folder / "latency.json") == read_json(STORED / "documents/latency.json")


@check("search/result")
def _search_result(name: str, folder: Path) -> None:
    result = SearchResult.load(STORED / "search")
    assert json.loads(result.space.to_json()) == read_json(STORED / "documents/space.json")
    assert_alike(outcome(result), read_json(STORED / "documents/outcome.json"), 1e-9)
    result.save(folder)
    assert (folder / "search_result.json").read_bytes() == (STORED / "search/search_result.json").read_bytes()


@check("search-journal/continued")
def _search_journal(name: str, folder: Path) -> None:
    journal = folder / "journal"
    shutil.copytree(STORED / "search-journal", journal)
    model = structural()
    latency = latency_model(model)  # of this machine: those that the search began with have to be used
    try:
        result = search_subnet(model, evaluate, save_dir=journal, held_out=held_out, latency=latency, **SEARCH)
    except ValueError as error:
        others = [name for name in ("numpy", "pymoo") if importlib.metadata.version(name) != WRITTEN["versions"][name]]
        if "another subnet" in str(error) and others:  # which propose what comes next
            warnings.warn(f"not continued: the search was begun with another {others[0]}")
            return
        raise
    continued(journal / "history.jsonl", STORED / "search-journal/history.jsonl", SEARCH["n_evals"])
    wanted = SearchResult.load(STORED / "search")
    assert (result.space, result.objectives) == (wanted.space, wanted.objectives)
    assert_alike(result.settings, wanted.settings, 1e-9)
    assert [(e.source, e.subnet) for e in result.history] == [(e.source, e.subnet) for e in wanted.history]
    for now, then in zip(result.history, wanted.history):
        assert_alike([now.metrics, now.held_out], [then.metrics, then.held_out], 1e-9)


@check("training/continued")
def _training(name: str, folder: Path) -> None:
    stored = read_json(STORED / "training/subnets.json")
    found = drawn(structural(), folder)
    assert found == stored and len(stored["uniform"]) == STEPS

    model = PeftModel.from_pretrained(base(), STORED / "training/checkpoint-2", is_trainable=True)
    with torch.no_grad():  # the weights come from the checkpoint
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.zero_()
    trainer(model, folder).train(resume_from_checkpoint=str(STORED / "training/checkpoint-2"))
    last = load_file(folder / "checkpoint-4/adapter_model.safetensors")
    begun = load_file(STORED / "training/checkpoint-2/adapter_model.safetensors")
    wanted = {key.removeprefix("training/"): value for key, value in OUTPUTS.items() if key.startswith("training/")}
    assert wanted
    for key, tensor in wanted.items():
        assert (tensor - begun[key]).abs().max() > 1e-3  # it did learn something after the checkpoint
        torch.testing.assert_close(last[key], tensor, rtol=1e-4, atol=1e-5)


# -- the tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CHECKS))
def test_computes_the_same(name, tmp_path, monkeypatch):
    if level() is None and name.startswith(("layers/", "sparse/", "blocks/sparse")):
        pytest.skip("no extension")
    monkeypatch.setenv("PEFT_ELASTIC_HOME", str(tmp_path / "home"))
    CHECKS[name](tmp_path)


@pytest.mark.skipif(level() is None, reason="no extension")
def test_in_a_fresh_interpreter(tmp_path):
    path = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    environment = os.environ | {"PEFT_ELASTIC_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == f"{len(CHECKS)} stored files compute the same"


def test_every_stored_folder_has_a_check():
    """And each file of outputs was looked at by name, so that none is forgotten."""
    listed = {path.name for path in STORED.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert listed == {name.partition("/")[0] for name in CHECKS}
    for folder in ("adapters", "blocks", "gptq", "layers", "plans", "sparse"):
        found = {f"{folder}/{path.stem}" for path in (STORED / folder).iterdir()}
        assert found == {name for name in CHECKS if name.startswith(f"{folder}/")}


def main() -> None:
    torch.set_num_threads(1)
    for name, function in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                function(Path(folder))
            except Exception as error:
                raise SystemExit(f"{name}: {error!r}") from error
    print(f"{len(CHECKS)} stored files compute the same")


if __name__ == "__main__":
    main()
