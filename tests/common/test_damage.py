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

"""Damage of every kind to every JSON file that this package writes and reads: nothing but a ValueError comes of it, and no
half of a save that was interrupted is taken for a whole."""

import copy
import json
import os
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support.models import tiny_llama
from transformers import AutoModel, AutoModelForCausalLM

from peft_elastic import (
    Bounds,
    ElasticLoraConfig,
    MultiPrunerConfig,
    PruningPlan,
    SearchResult,
    Subnet,
    bounds_by_importance,
    prune_structured,
    search_subnet,
    sparsify_linears,
)
from peft_elastic.cli._examples import Example
from peft_elastic.cli.quickstart import splits as quickstart_splits
from peft_elastic.cli.quickstart.checklist import Checklist
from peft_elastic.common.documents import COUNT, NUMBER, Document, ListOf, MapOf, OneOf, Record, parse_json, read_json
from peft_elastic.cost import timing
from peft_elastic.deploy import checkpoint, stored_files
from peft_elastic.layers import extension
from peft_elastic.pruning.structured import from_pruning_config, importance, recall, to_pruning_config
from peft_elastic.search.history import HistoryFile
from peft_elastic.structure.blocks import Structure
from peft_elastic.supernet.space import SearchSpace


# --- the reader ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "Expecting value"),
        ('{"a": 1', "Expecting"),
        ("[" * 100_000, "nested too deeply"),
        ("[" * 80 + "]" * 80, "nested too deeply"),
        ('{"a": ' * 80 + "1" + "}" * 80, "nested too deeply"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('{"a": {"b": 1, "b": 1}}', "'b' is there twice"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ("1" * 5000, "digits"),
        ("\ufeff{}", "BOM"),
    ],
)
def test_text_that_is_no_json(text, reason, tmp_path):
    with pytest.raises(ValueError, match=f"^not valid JSON .*{reason}"):
        parse_json(text)
    (tmp_path / "x.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"x.json' is not JSON .*{reason}"):
        read_json(tmp_path / "x.json")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}' cannot be read: it is a folder"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
    (tmp_path / "file").write_text("{}")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "file" / "below")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="loop' cannot be read"):
        read_json(tmp_path / "loop")


THING = Document(
    "thing", "x/thing", 1, Record({"more": MapOf(NUMBER)}, rows=ListOf(Record(n=COUNT, side=OneOf("in", "out"))))
)


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "not a thing: expected the field 'format' to be 'x/thing', found 'list'"),
        ({"format": "x/other"}, "found 'x/other'"),
        ({"format": "x/thing", "version": 2}, "of version 2; this release reads version 1"),
        ({"format": "x/thing", "version": True}, "of version True"),
        ({"format": "x/thing", "version": 1}, "lacks the field 'rows'"),
        ({"format": "x/thing", "version": 1, "rows": {}}, r"'rows' must be a list, got {}"),
        ({"format": "x/thing", "version": 1, "rows": [{"n": -1, "side": "in"}]}, r"'rows'\[0\]\.n must be a whole"),
        ({"format": "x/thing", "version": 1, "rows": [{"n": 2**70, "side": "in"}]}, r"'rows'\[0\]\.n must be a whole"),
        ({"format": "x/thing", "version": 1, "rows": [{"n": True, "side": "in"}]}, r"'rows'\[0\]\.n must be a whole"),
        ({"format": "x/thing", "version": 1, "rows": [{"n": 1, "side": []}]}, r"'rows'\[0\]\.side must be one of"),
        ({"format": "x/thing", "version": 1, "rows": [], "more": {"a": "1"}}, r"'more'\['a'\] must be a number"),
        ({"format": "x/thing", "version": 1, "rows": [], "less": 1}, "has the unknown field 'less'"),
    ],
)
def test_the_field_is_named(data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        THING.unwrap(data)
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"x.json' is not a thing file: .*{message}"):
        THING.read(tmp_path / "x.json")


def test_what_was_written_is_read(tmp_path):
    fields = {"rows": [{"n": 0, "side": "out"}], "more": {"a": float("inf"), "b": 1.5}}
    (tmp_path / "x.json").write_text(json.dumps(THING.wrap(fields)))
    assert THING.read(tmp_path / "x.json") == fields


# --- real files ---------------------------------------------------------------------------------------------------------


class Files:
    """One real file of every kind, and what reads it. `readers` maps the file to a function that reads it and then uses what it
    got, as the package does."""

    def __init__(self, folder):
        self.folder = folder
        self.model = tiny_llama()
        self.adapted = get_peft_model(
            tiny_llama(),
            ElasticLoraConfig(r=4, elastic_ranks=[4, 2], elastic_width={"mlp": [1.0, 0.5]}, importance="none"),
        )
        self.batches = [torch.arange(32).view(2, 16)]
        self.readers = {}
        self._search()
        self._pruning()
        self._others()

    def _search(self):
        folder, space = self.folder / "search", self.adapted.search_space
        self.result = search_subnet(
            self.adapted,
            lambda model: float(sum(model.active_subnet.values())),
            n_evals=6,
            save_dir=folder,
            progress=False,
        )
        space.max.save(folder / "subnet.json")
        (folder / "space.json").write_text(space.to_json())
        header = json.loads((folder / "history.jsonl").read_text().splitlines()[0])

        def read_space():
            found = SearchSpace.from_json((folder / "space.json").read_text(errors="replace"))
            for subnet in (found.max, found.min, found.heuristic, found.sample(0)):
                found.count_parameters(subnet), found.count_base_parameters(subnet)
            repr(found), found.fingerprint, found.to_json()

        def read_result():
            found = SearchResult.load(folder)
            found.pareto, found.hypervolume, found.to_dataframe(), found.evaluation("max")
            found.best(), found.best(max_drop=1e6, budget="80%")

        def read_history():
            file = HistoryFile(folder / "history.jsonl", header, [*self.result.objectives, "macs", "parameters"])
            for evaluation in self.result.history:
                metrics = file.recall(evaluation)
                assert metrics is None or all(np.isreal(metrics[name]) for name in self.result.objectives)

        self.readers[folder / "subnet.json"] = lambda: space.subnet(Subnet.load(folder / "subnet.json"))
        self.readers[folder / "space.json"] = read_space
        self.readers[folder / "search_result.json"] = read_result
        self.readers[folder / "history.jsonl"] = read_history

    def _pruning(self):
        folder, model = self.folder / "pruning", self.model
        config = MultiPrunerConfig(ratio=0.2, mlp_group=8, order="magnitude")
        plan = prune_structured(model, config, self.batches, save_dir=folder, extract=False, progress=False)
        plan.save(folder / "plan.json")
        l1 = prune_structured(
            model, MultiPrunerConfig(ratio=0.2, mlp_group=8, order="l1"), self.batches, extract=False, progress=False
        )
        (folder / "pruning_config.json").write_text(json.dumps(to_pruning_config(l1, model)))
        (order,) = folder.glob("order-*.json")
        widths = Structure(model).widths
        header = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[0])

        def read_plan():
            found = PruningPlan.load(folder / "plan.json")
            found.check(model)
            str(found), found.plain_block_passes, found.to_json()

        def read_evaluations():
            batches = [{"input_ids": batch} for batch in self.batches]
            journal = recall.open_journal(folder, model, batches, header["metric"])
            recall.Recalled(lambda state, trunk: recall.Measurement(1.0), "data", "order", journal)({}, {})

        self.readers[folder / "plan.json"] = read_plan
        self.readers[folder / "pruning_config.json"] = lambda: from_pruning_config(
            folder / "pruning_config.json", model
        )
        self.readers[folder / "evaluations.jsonl"] = read_evaluations
        self.readers[order] = lambda: importance.read_scores(order, widths)

    def _others(self):
        stages, splits = self.folder / "stages.json", self.folder / "data.json"
        Checklist(stages, {"seed": 0}, 2).run("a", "A", lambda: {"rows": [1]})
        quickstart_splits.write_splits(splits, {"test": [Example("a", " b", (" b", " c"))]})

        def read_stages():
            journal = Checklist(stages, {"seed": 0}, 2)
            journal.run("a", "A", lambda: {})
            sum(journal.seconds.values())

        bounds = self.folder / "bounds.json"
        scores = {order.name: torch.rand(w.units) for w in Structure(self.model).widths for order in w.orders}
        bounds_by_importance(self.model, scores, targets=["100%", "50%", "25%"]).save(bounds)

        def read_bounds():
            found = Bounds.load(bounds)
            str(found), found.to_json(), [target.is_close for target in found.targets]

        self.readers[bounds] = read_bounds
        self.readers[stages] = read_stages
        self.readers[splits] = lambda: quickstart_splits.read_splits(splits)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Files(tmp_path_factory.mktemp("files"))


JUNK = [
    None,
    True,
    0,
    -1,
    3,
    1.5,
    2**62,
    2**70,
    -(2**70),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    {},
    [[]],
    {"a": 1},
]


def mutated_value(data, rng):
    """JSON data with one place of it changed: replaced, left out, doubled, or put where it does not belong."""
    data = json.loads(json.dumps(data))
    places = []

    def walk(value):
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        for key in keys:
            places.append((value, key))
            walk(value[key])

    walk(data)
    if not places or rng.random() < 0.03:
        return rng.choice(JUNK)
    # a place deep inside of what is long is as likely as one of the few at the top
    depth = rng.randrange(2)
    owner, key = rng.choice(places[: 1 + len(places) // 4] if depth else places)
    kind = rng.randrange(5)
    if kind == 0:
        del owner[key]
    elif kind == 1 and isinstance(owner, list):
        owner.insert(key, owner[key])
    elif kind == 1:
        owner[f"{key}x"] = owner.pop(key)
    elif kind == 2:
        owner[key] = rng.choice(places)[0]
        try:
            json.dumps(data)
        except ValueError:  # it would hold itself
            owner[key] = {}
    else:
        owner[key] = rng.choice(JUNK)
    return data


def mutated_bytes(raw, rng):
    kind, raw = rng.randrange(6), bytearray(raw)
    at = rng.randrange(len(raw))
    if kind == 0:
        return bytes(raw[:at])
    if kind == 1:
        raw[at] = rng.randrange(256)
    elif kind == 2:
        raw[at:at] = rng.choice(
            [b"[" * 100_000, b'{"a":' * 3000, b"9" * 5000, b"\0", b"\xff", b"1e999", b"NaN", b"\n"]
        )
    elif kind == 3:
        del raw[at : at + rng.randrange(1, 40)]
    elif kind == 4:
        raw += raw[at:]
    else:
        return rng.choice([b"", b"null", b"\n", b"{}", b"[" * 200_000, b"\xef\xbb\xbf{}"])
    return bytes(raw)


def mutated(raw, rng, lines):
    if rng.random() < 0.3:
        return mutated_bytes(raw, rng)
    if lines:
        rows = raw.splitlines(keepends=True)
        at = rng.randrange(len(rows))
        rows[at] = json.dumps(mutated_value(json.loads(rows[at]), rng)).encode() + b"\n"
        return b"".join(rows)
    return json.dumps(mutated_value(json.loads(raw), rng)).encode()


KINDS = [
    "search/subnet.json",
    "search/space.json",
    "search/search_result.json",
    "search/history.jsonl",
    "pruning/plan.json",
    "pruning/pruning_config.json",
    "pruning/evaluations.jsonl",
    "pruning/order-",
    "bounds.json",
    "stages.json",
    "data.json",
]
EXAMPLES = int(os.environ.get("DAMAGE_EXAMPLES", 60))


def test_every_kind_is_tried(files):
    assert len(files.readers) == len(KINDS)
    for read in files.readers.values():
        read()


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_a_value_error_or_harmless(kind, files):
    path, read = next((p, r) for p, r in files.readers.items() if str(p.relative_to(files.folder)).startswith(kind))
    raw, refused = path.read_bytes(), 0

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.integers(0, 2**32))
    def damage(seed):
        nonlocal refused
        path.write_bytes(mutated(raw, random.Random(seed), path.suffix == ".jsonl"))
        try:
            read()
        except ValueError as error:
            refused += 1
            assert type(error) is ValueError, repr(error)
            assert path.name == "space.json" or str(path) in str(error) or not isinstance(error.__cause__, OSError)

    try:
        damage()
    finally:
        path.write_bytes(raw)
    assert refused > EXAMPLES / 5


def test_folders_in_place_of_files(files, tmp_path):
    for path, read in files.readers.items():
        aside = tmp_path / path.name
        shutil.move(path, aside)
        path.mkdir()
        try:
            if path.name != "space.json":
                with pytest.raises(ValueError, match=path.name):
                    read()
        finally:
            path.rmdir()
            shutil.move(aside, path)


# --- the cache of timings ---------------------------------------------------------------------------------------------


@pytest.fixture
def timings(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_ELASTIC_HOME", str(tmp_path))
    monkeypatch.setattr(timing, "_time", lambda *layer: timing.Timing(2.0, 1.0))
    monkeypatch.setattr(timing, "_time_dense", lambda layers: [3.0] * len(layers))
    monkeypatch.setattr(timing, "_known", None)
    layer = timing.DenseLayer(8, 8, False, 1, torch.float32)

    def measure():
        timing._known = None
        assert timing.measure(8, 8, 0.5, "bf16", torch.float32) == timing.Timing(2.0, 1.0)
        assert timing.measure_dense([layer]) == {layer: 3.0}

    measure()
    return measure


def test_a_damaged_cache_is_measured_again(timings):
    path = timing.timings_file()
    raw = path.read_bytes()
    assert len(json.loads(raw)) == 2

    def plausible(data):
        """Numbers that a machine may have measured are taken as they are."""
        return isinstance(data, dict) and all(
            isinstance(row, list) and all(type(x) in (int, float) and 0 < x < 1e300 for x in row)
            for row in data.values()
        )

    damaged = 0
    for seed in range(200):
        new = mutated(raw, random.Random(seed), False)
        try:
            if plausible(parse_json(new)) and json.loads(new) != json.loads(raw):
                continue
        except ValueError:
            pass
        damaged += 1
        path.write_bytes(new)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            timings()
        assert len(said) <= 1 and all(
            str(path) in str(warning.message) or "it" in str(warning.message) for warning in said
        )
        path.write_bytes(raw)
    assert damaged > 50


@pytest.mark.parametrize("home", ["none", "a file", "read-only"])
def test_without_a_place_for_it_the_cache_is_left_out(home, timings, tmp_path, monkeypatch):
    monkeypatch.delenv("PEFT_ELASTIC_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "file").write_text("")
    if home == "none":
        monkeypatch.delenv("HOME")

        def expanduser(path):
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "expanduser", expanduser)
    elif home == "a file":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nothing")
    from peft_elastic.cli import info
    from peft_elastic.common import assets

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        timings()
        assert assets.cached() == []
        assert "  cache " in info._format(info.collect())
    with pytest.raises(assets.AssetError, match="PEFT_ELASTIC_HOME"):
        assets._asset("x", assets._VADER, assets._unpack_vader)


# --- checkpoints ------------------------------------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(not extension.is_built(), reason="needs the C++ extension")


def sparse_model(seed=0, dtype="bf16"):
    torch.manual_seed(seed)
    model = tiny_llama()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data *= torch.rand_like(layer.weight) < 0.5
        elif hasattr(layer, "weight"):
            layer.weight.data += torch.rand_like(layer.weight)
    sparsify_linears(model, dtype, when="always")
    return model


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


@needs_kernels
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_layers_and_tensors_must_agree(dtype, shards, tmp_path):
    model = sparse_model(dtype=dtype)
    model.save_pretrained(tmp_path / "all", max_shard_size=shards)
    names = sorted(json.loads((tmp_path / "all" / "config.json").read_text())["quantization_config"]["layers"])
    assert len(list((tmp_path / "all").glob("*.safetensors"))) > 1 or shards == "50GB"

    def copy_of_all():
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        return shutil.copytree(tmp_path / "all", tmp_path / "x")

    def refused(match):
        with pytest.raises(ValueError, match=match):
            AutoModelForCausalLM.from_pretrained(tmp_path / "x")

    for name in (names[0], names[-1], names[len(names) // 2]):
        edit(copy_of_all(), lambda c: c["layers"].pop(name))
        refused(f"layer '{name}' is left out")
    edit(copy_of_all(), lambda c: c.update(layers={}))
    refused("is left out")
    edit(copy_of_all(), lambda c: c["layers"].update({names[0].removeprefix("model."): c["layers"][names[0]]}))
    refused("are the same layer|is left out|is missing")
    edit(copy_of_all(), lambda c: c["layers"].update({"model.norm": c["layers"][names[0]]}))
    refused("'model.norm' is a LlamaRMSNorm, no linear layer")

    # the other way: tensors that are missing, given twice, or dense beside sparse
    def rewrite(change):
        folder = copy_of_all()
        file = sorted(folder.glob("*.safetensors"))[0]
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata=header["__metadata__"])

    some = next(n for n in names if f"{n}.weight_bitmask" in load_file(sorted((tmp_path / "all").glob("*.s*s"))[0]))
    rewrite(lambda tensors: tensors.pop(f"{some}.weight_bitmask"))
    refused(f"{some}.weight_bitmask must be .* got torch.uint8 .0,.")
    rewrite(
        lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(("norm.weight", "tokens.weight"))))
    )
    refused("norm.weight is missing|embed_tokens.weight is missing")
    rewrite(lambda tensors: tensors.update({f"{some}.weight": torch.zeros(2, 2)}))
    refused(f"{some}.weight is there as well")
    rewrite(lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight_values": torch.zeros(2)}))
    refused("layer 'model.layers.7.mlp.up_proj' is left out")
    if shards != "50GB":
        folder = copy_of_all()
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        first, second = sorted(set(index["weight_map"].values()))[:2]
        tensors = load_file(folder / second)
        tensors.update(dict(list(load_file(folder / first).items())[:1]))
        save_file(tensors, folder / second, metadata={"format": "pt"})
        refused(f"is in {first} and in {second}")


@needs_kernels
def test_halves_of_two_saves_are_refused(tmp_path):
    """Also of models that differ in the norms alone."""
    old, new = sparse_model(), sparse_model()
    with torch.no_grad():
        new.model.norm.weight.mul_(3)
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    for config, weights in (("old", "new"), ("new", "old")):
        folder = shutil.copytree(tmp_path / config, tmp_path / f"{config}-{weights}")
        shutil.copy(tmp_path / weights / "model.safetensors", folder)
        with pytest.raises(
            ValueError, match="^model.norm.weight in model.safetensors was not saved with this config.json"
        ):
            AutoModelForCausalLM.from_pretrained(folder)
    # shards over a single file: transformers leaves that and prefers it
    new.save_pretrained(tmp_path / "old", max_shard_size="20KB")
    with pytest.raises(ValueError, match="the file is of an older model beside the shards"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    (tmp_path / "old" / "model.safetensors").unlink()
    ids = torch.arange(4)[None]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "old")(ids).logits, new(ids).logits)
    # what releases wrote that knew no checksums of dense layers
    edit(tmp_path / "old", lambda c: c.pop("dense_sums"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "old", dtype=torch.bfloat16)
    loaded.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert torch.equal(again.model.norm.weight, loaded.model.norm.weight.float())


@needs_kernels
def test_checksums_of_tied_and_renamed_tensors(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    sparsify_linears(model, when="always")
    model.save_pretrained(tmp_path / "tied")
    ids = torch.arange(4)[None]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "tied")(ids).logits, model(ids).logits)
    base = AutoModel.from_pretrained(tmp_path / "tied")  # under other names
    base.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_checksums_do_not_depend_on_the_order_of_elements(tmp_path):
    tensors = {
        "f32": torch.randn(5, 7),
        "bf16": torch.randn(3, 3).bfloat16(),
        "i64": torch.arange(9) - 4,
        "u8": torch.arange(7, dtype=torch.uint8),
        "f64": torch.randn(1).double(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0),
        "strided": torch.randn(4, 6)[:, ::2],
    }
    sums = stored_files.dense_checksums(torch.nn.Module(), tensors)
    assert set(sums) == set(tensors) - {"empty"} and len(set(sums.values())) == len(sums)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    stored["f32"] = tensors["f32"].T.contiguous()
    save_file(stored, tmp_path / "x.safetensors")
    stored_files.check_files([str(tmp_path / "x.safetensors")], (), sums)
    for name in sums:
        changed = stored[name].clone()
        changed.view(-1)[-1] += 1
        save_file(stored | {name: changed}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=f"^{name} in x.safetensors was not saved with this config.json"):
            stored_files.check_files([str(tmp_path / "x.safetensors")], (), sums)


@needs_kernels
def test_pickled_weights_of_sparse_layers_are_refused(tmp_path):
    sparse_model().save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pytorch_model.bin is no safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@needs_kernels
def test_damaged_descriptions_are_value_errors(tmp_path):
    sparse_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    file = str(tmp_path / "model.safetensors")
    refused = 0
    for seed in range(150):
        description = mutated_value(config["quantization_config"], random.Random(seed))
        if not isinstance(description, dict):
            continue
        try:
            found = checkpoint.SparseCheckpointConfig(**description)
            found.check()
            stored_files.check_files([file], found.tensor_names(), found.dense_sums)
        except ValueError:
            refused += 1
    assert refused > 50


# --- adapters -----------------------------------------------------------------------------------------------------------


OURS = ["elastic_ranks", "rank_groups", "elastic_width", "elastic_depth", "importance", "sorted_base", "active_subnet"]


def adapter(seed=0, subnet="min"):
    base = tiny_llama()
    torch.manual_seed(seed)
    config = ElasticLoraConfig(r=4, elastic_ranks=[4, 2], rank_groups=[["q_proj", "v_proj"]], init_lora_weights=False)
    model = get_peft_model(base, config)
    model.set_subnet(subnet)
    return model


def test_an_adapter_with_another_ones_config_is_refused(tmp_path):
    old, new = adapter(1, "min"), adapter(2, "max")
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "old", tmp_path / "mixed")
    shutil.copy(tmp_path / "new" / "adapter_model.safetensors", tmp_path / "mixed")
    with pytest.raises(
        ValueError, match="mixed/adapter_model.safetensors' was not saved with this adapter_config.json"
    ):
        PeftModel.from_pretrained(tiny_llama(), tmp_path / "mixed")
    with pytest.raises(ValueError, match="was not saved with this"):
        new.load_adapter(tmp_path / "mixed", "other")
    new.save_pretrained(tmp_path / "mixed")  # says the message
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "mixed")
    assert loaded.active_subnet == new.active_subnet
    # a configuration that is saved alone belongs to no weights
    new.peft_config["default"].save_pretrained(tmp_path / "old")
    assert "weights_crc32" not in json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    assert PeftModel.from_pretrained(tiny_llama(), tmp_path / "old").active_subnet == new.active_subnet


def test_damaged_fields_of_an_adapter_config(tmp_path):
    adapter().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    raw, refused = path.read_text(), 0
    base = tiny_llama()
    for seed in range(80):
        rng = random.Random(seed)
        data = json.loads(raw)
        data["elastic_width"] = {"mlp": [1.0, 0.5]}
        name = rng.choice([*OURS, "weights_crc32"])
        data[name] = mutated_value({name: data[name]}, rng) if rng.random() < 0.5 else rng.choice(JUNK)
        path.write_text(json.dumps(data))
        try:
            PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        except ValueError:
            refused += 1
    assert refused > 40
    for text in ("[" * 100_000, "[]", "3", raw[:-20], raw.replace('"r": 4', '"r": 4, "r": 8')):
        path.write_text(text)
        with pytest.raises(ValueError, match="adapter_config.json"):
            ElasticLoraConfig.from_pretrained(tmp_path)
