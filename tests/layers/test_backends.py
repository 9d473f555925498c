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
"""Every way of storing the weight of a linear layer, against weights made by hand in float64."""

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_elastic.layers import ops
from peft_elastic.layers.backends import (
    ABILITIES,
    BACKENDS,
    backend_of,
    find_backend,
    find_linear_backend,
    grid_layers,
)
from peft_elastic.layers.backends.bitsandbytes import BITSANDBYTES
from peft_elastic.layers.backends.float import EMBEDDING, FLOAT
from peft_elastic.layers.backends.foreign import FOREIGN
from peft_elastic.layers.backends.gptqmodel import GPTQMODEL
from peft_elastic.layers.backends.grid import GRID
from peft_elastic.layers.backends.sparse import SPARSE
from peft_elastic.layers.backends.torchao import TORCHAO
from peft_elastic.layers.gptq_format import pack_gptq
from peft_elastic.layers.grid import Grid
from peft_elastic.layers.quantized_linear import QuantizedLinear
from peft_elastic.layers.sparse_linear import SparseLinear
from peft_elastic.structure.narrow import set_active


OUT, IN, GROUP = 32, 64, 16
OUTPUTS, INPUTS = ((3, 8), (20, 25)), ((0, 32), (40, 47))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    layer: Any
    weight: torch.Tensor  # float64 (out, in)
    bytes: int
    computes: torch.Tensor | None = None  # the weight that the layer computes with, if that is another one
    exact: bool = True  # whether `weight` is met to the last bit of float32


def linear_case() -> Case:
    layer = nn.Linear(IN, OUT)
    layer.weight.data = random(OUT, IN)
    return Case(layer, layer.weight.data.double(), 4 * OUT * IN)


def conv1d_case() -> Case:
    layer = Conv1D(OUT, IN)
    layer.weight.data = random(IN, OUT)
    layer.bias.data = random(OUT)
    return Case(layer, layer.weight.data.double().T, 4 * OUT * IN)


def embedding_case() -> Case:
    layer = nn.Embedding(IN, OUT)
    layer.weight.data = random(IN, OUT)
    return Case(layer, layer.weight.data.double().T, 4 * OUT * IN)


def numbers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers of 4 bits, scales, zero points, and the weight that they stand for."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(0, 16, (OUT, IN), generator=generator)
    scales = torch.rand(OUT, IN // GROUP, generator=generator).half().float() + 0.125
    zeros = torch.randint(1, 16, (OUT, IN // GROUP), generator=generator)
    group = torch.arange(IN) // GROUP
    return q, scales, zeros, scales.half().double()[:, group] * (q - zeros[:, group])


def grid_case() -> Case:
    q, scales, zeros, rounded = numbers()
    grid = Grid(scales, zeros, in_features=IN, bits=4)
    weight = (rounded + 0.03 * random(OUT, IN).clamp(-1, 1).double()).float()
    layer = QuantizedLinear(nn.Parameter(weight), nn.Parameter(random(OUT)), grid)
    return Case(layer, weight.double(), 4 * OUT * IN, rounded)


def bnb4_case() -> Case:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=False)
    layer.weight = bnb.nn.Params4bit(random(OUT, IN), requires_grad=False, quant_type="nf4", compress_statistics=False)
    layer = layer.to("cpu").train()  # which never reorders the weight
    state, packed = layer.weight.quant_state, layer.weight.data.flatten()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten().long()  # the first value in the upper bits
    values = state.code.double()[codes].view(-1, state.blocksize) * state.absmax.double()[:, None]
    size = OUT * IN // 2 + 4 * (OUT * IN // state.blocksize)
    return Case(layer, values.view(OUT, IN), size)


def bnb8_case() -> Case:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(random(OUT, IN), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    values = layer.weight.data.double() * layer.weight.SCB.double()[:, None] / 127
    return Case(layer, values, OUT * IN + 4 * OUT, exact=False)


class BaseQuantLinear(nn.Module):
    """Has the tensors of a layer of GPTQModel."""


BaseQuantLinear.__module__ = "gptqmodel.testing"


def gptqmodel_case() -> Case:
    q, scales, zeros, weight = numbers()
    tensors = {"q": q.to(torch.uint8), "scales": scales, "zeros": zeros.to(torch.uint8), "g_idx": None}
    layer: Any = BaseQuantLinear()
    for name, tensor in pack_gptq("x", {**tensors, "group_size": GROUP, "bits": 4}, "gptq_v2").items():
        layer.register_buffer(name, tensor)
    layer.bias = None
    layer.in_features, layer.out_features, layer.bits, layer.group_size = IN, OUT, 4, GROUP
    groups = OUT * IN // GROUP
    return Case(layer, weight, OUT * IN // 2 + groups // 2 + 2 * groups + 4 * IN)


def sparse_case() -> Case:
    if not ops.is_available():
        pytest.skip("no extension")
    dense = nn.Linear(IN, OUT)
    dense.weight.data = random(OUT, IN) * (random(OUT, IN, seed=1) > 0)
    layer = SparseLinear.from_linear(dense)
    return Case(layer, dense.weight.data.bfloat16().double(), layer.packed.numel())


class Rounded(torch.Tensor):
    """A weight of torchao, as far as it is asked for anything."""

    def dequantize(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


Rounded.__module__ = "torchao.testing"


def torchao_case() -> Case:
    layer = nn.Linear(IN, OUT)
    weight = random(OUT, IN)
    layer.weight = nn.Parameter(weight.as_subclass(Rounded), requires_grad=False)
    return Case(layer, weight.double(), 4 * OUT * IN)


MAKE = {
    "linear": (FLOAT, linear_case),
    "conv1d": (FLOAT, conv1d_case),
    "embedding": (EMBEDDING, embedding_case),
    "grid": (GRID, grid_case),
    "bitsandbytes 4": (BITSANDBYTES, bnb4_case),
    "bitsandbytes 8": (BITSANDBYTES, bnb8_case),
    "gptqmodel": (GPTQMODEL, gptqmodel_case),
    "sparse": (SPARSE, sparse_case),
    "torchao": (TORCHAO, torchao_case),
}
every = pytest.mark.parametrize("kind", MAKE)


def close(found: torch.Tensor, wanted: torch.Tensor, exact: bool = True) -> bool:
    return torch.allclose(found.double(), wanted.double(), rtol=1e-6 if exact else 1e-2, atol=1e-6 if exact else 1e-2)


def product(layer: Any, x: torch.Tensor, weight: torch.Tensor, rows: Any = slice(None)) -> torch.Tensor:
    bias = layer._parameters.get("bias")
    return x.double() @ weight.T + (0 if bias is None else bias.detach().double()[rows])


def places(ranges: tuple[tuple[int, int], ...]) -> list[int]:
    return [i for start, stop in ranges for i in range(start, stop)]


def state_of(layer: nn.Module) -> dict[str, Any]:
    """All tensors of a layer, bit by bit, with what bitsandbytes keeps in and beside its parameter."""
    found = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    found["data"] = layer._parameters["weight"].data.clone()
    for owner in (layer._parameters["weight"], getattr(layer, "state", None)):
        for name in ("CB", "SCB"):
            if isinstance(value := getattr(owner, name, None), torch.Tensor):
                found[f"{type(owner).__name__}.{name}"] = value.clone()
    return found


@every
def test_the_backend_is_found_and_no_other(kind):
    backend, make = MAKE[kind]
    layer = make().layer
    assert find_backend(layer) is backend and backend_of(layer) is backend
    assert find_linear_backend(layer) is (None if kind in ("embedding", "sparse") else backend)
    later = BACKENDS[BACKENDS.index(backend) + 1 :]
    # only those that other layers derive from would take it as well
    assert {each for each in later if each.matches(layer)} <= {FLOAT, FOREIGN}


@every
def test_weight(kind):
    backend, make = MAKE[kind]
    case = make()
    weight = backend.weight(case.layer)
    assert tuple(weight.shape) == backend.sizes(case.layer) == (OUT, IN)
    assert weight.is_floating_point() and not weight.requires_grad and type(weight) is torch.Tensor
    assert close(weight, case.weight)
    assert torch.equal(backend.weight(case.layer, whole=True), weight)
    assert backend.stored_bytes(case.layer) == case.bytes
    if not backend.packed:  # a view
        backend.weight(case.layer)[2, 5] = 77
        assert case.layer.weight[(5, 2) if backend.out_dim(case.layer) else (2, 5)] == 77


@every
def test_the_layer_computes_with_that_weight(kind):
    backend, make = MAKE[kind]
    case = make()
    if kind == "embedding":
        assert torch.equal(case.layer(torch.tensor([7])), backend.weight(case.layer)[:, [7]].T)
        return
    if kind in ("gptqmodel", "torchao"):
        pytest.skip("made up, and computes nothing")
    x = random(3, IN, seed=2)
    weight = case.weight if case.computes is None else case.computes
    wanted = product(case.layer, x, weight)
    found = case.layer(x).double()
    assert (found - wanted).norm() < (0.03 if kind == "bitsandbytes 8" else 1e-5) * wanted.norm()


def test_grid():
    q, scales, zeros, rounded = numbers()
    for kind in ("grid", "gptqmodel"):
        backend, make = MAKE[kind]
        layer = make().layer
        grid = backend.grid(layer)
        assert backend.on_grid and grid is not None
        assert torch.equal(grid.scales.float(), scales.half().float()) and torch.equal(grid.zeros.long(), zeros)
        assert close(grid.round(backend.weight(layer)), rounded)
    for kind in sorted(set(MAKE) - {"grid", "gptqmodel"}):
        backend, make = MAKE[kind]
        assert not backend.on_grid and backend.grid(make().layer) is None


def test_layers_on_a_grid():
    model = nn.ModuleDict({"a": grid_case().layer, "b": nn.ModuleList([nn.Linear(2, 2), grid_case().layer])})
    assert grid_layers(model) == {"a": model["a"], "b.1": model["b"][1]}


@every
@pytest.mark.parametrize("through", ["the same", "a copy", "a pickle"])
def test_replace_and_undo(kind, through):
    backend, make = MAKE[kind]
    case = make()
    layer = case.layer
    new = case.weight.float() + 0.25 * random(OUT, IN, seed=3)
    if backend.obstacle("write") and kind != "embedding":
        with pytest.raises(ValueError) as refusal:
            backend.replace(layer, new)
        assert str(refusal.value) == f"The base layer is of type {type(layer).__name__}, {backend.obstacle('write')}"
        assert close(backend.weight(layer), case.weight)
        return
    weight = backend.weight(layer).clone()  # first: reading 8 bits moves scales from the parameter to the layer
    before = state_of(layer)
    old = backend.replace(layer, new)
    if backend is BITSANDBYTES:
        assert (backend.weight(layer) - new).norm() < 0.2 * new.norm()
        assert (backend.weight(layer) - new).norm() < 0.5 * (weight - new).norm()
    else:
        assert torch.equal(backend.weight(layer), new)
    if through == "a copy":
        layer, old = copy.deepcopy((layer, old))
    elif through == "a pickle" and backend is not BITSANDBYTES:  # whose parameters lose their class
        layer, old = pickle.loads(pickle.dumps((layer, old)))
    assert torch.equal(old.matrix(layer), weight)
    old.put_back(layer)
    after = state_of(layer)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert torch.equal(backend.weight(layer), weight)


def test_replace_takes_over_a_grid():
    case = grid_case()
    layer, own = case.layer, case.layer.grid
    other = Grid(own.scales.float() * 2, own.zeros.int(), in_features=IN, bits=4)
    old = GRID.replace(layer, case.weight.float(), other)
    assert layer.grid.equals(other) and layer.grid is not other and old.grid is own
    old.put_back(layer)
    assert layer.grid is own
    assert GRID.replace(layer, case.weight.float(), Grid.copy_of(own)).grid is None


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_undo_follows_a_cast(kind):
    """A merged model may be cast before the adapters are taken out."""
    backend, make = MAKE[kind]
    case = make()
    old = backend.replace(case.layer, torch.zeros(OUT, IN))
    case.layer.to(torch.bfloat16)
    old.put_back(case.layer)
    assert torch.equal(backend.weight(case.layer), case.weight.float().bfloat16())


@every
@pytest.mark.parametrize(("outputs", "inputs"), [(OUTPUTS, None), (None, INPUTS), (OUTPUTS, INPUTS)])
def test_narrowed(kind, outputs, inputs):
    backend, make = MAKE[kind]
    case = make()
    layer, plain = case.layer, type(case.layer)
    if backend.obstacle("narrow"):
        assert backend.mixin(layer) is None and backend.ordinary(layer, torch.float32) is None
        with pytest.raises(ValueError, match="cannot be narrowed"):
            backend.narrowed_class(layer)
        return
    rows = list(range(OUT)) if outputs is None else places(outputs)
    columns = list(range(IN)) if inputs is None else places(inputs)
    set_active(layer, "out", outputs)
    set_active(layer, "in", inputs)
    assert type(layer) is not plain and isinstance(layer, plain) and backend_of(layer) is backend
    assert close(backend.weight(layer), case.weight[rows][:, columns])
    assert close(backend.weight(layer, whole=True), case.weight)
    assert backend.sizes(layer) == (OUT, IN)
    if kind != "embedding":
        x = random(3, len(columns), seed=2)
        weight = case.weight if case.computes is None else case.computes
        wanted = product(layer, x, weight[rows][:, columns], rows)
        assert (layer(x).double() - wanted).norm() < 1e-5 * wanted.norm()
    if backend.grid(layer) is not None:
        assert backend.grid(layer).scales.shape[0] == len(rows)
    pickled = layer if backend is BITSANDBYTES else pickle.loads(pickle.dumps(layer))
    for other in (copy.deepcopy(layer), pickled):
        assert type(other) is type(layer) and torch.equal(backend.weight(other), backend.weight(layer))
    set_active(layer, "out", None)
    set_active(layer, "in", None)
    assert type(layer) is plain and close(backend.weight(layer), case.weight)


@every
@pytest.mark.parametrize(("outputs", "inputs"), [(OUTPUTS, None), (None, INPUTS), (OUTPUTS, INPUTS)])
def test_cut(kind, outputs, inputs):
    """Rows and columns taken, for good, and put back."""
    backend, make = MAKE[kind]
    case = make()
    layer = case.layer
    rows = list(range(OUT)) if outputs is None else places(outputs)
    columns = list(range(IN)) if inputs is None else places(inputs)
    wanted = case.weight[rows][:, columns]
    if backend.packed:
        with pytest.raises(ValueError, match="cannot be cut"):
            backend.cut(layer, outputs, inputs, [])
        if backend.obstacle("narrow"):
            return
        set_active(layer, "out", outputs)
        set_active(layer, "in", inputs)
        ordinary = backend.ordinary(layer, torch.float32)
        assert type(ordinary) is nn.Linear and ordinary.weight.shape == wanted.shape
        assert close(ordinary.weight.detach(), wanted)
        assert torch.equal(ordinary.bias, layer._parameters["bias"][rows])
        return
    before, undo = state_of(layer), []
    attributes = {k: v for k, v in vars(layer).items() if isinstance(v, int)}
    backend.cut(layer, outputs, inputs, undo)
    assert close(backend.weight(layer), wanted) and layer.weight.is_contiguous()
    assert backend.sizes(layer)[0] == len(rows)
    if kind != "embedding":
        assert backend.sizes(layer)[1] == len(columns)
        x = random(3, len(columns), seed=2)
        computes = wanted if case.computes is None else case.computes[rows][:, columns]
        assert close(layer(x), product(layer, x, computes), exact=False)
    grid = layer._modules.get("grid")
    for put_back in reversed(undo):
        put_back()
    vars(layer).update(attributes)
    assert all(torch.equal(tensor, state_of(layer)[name]) for name, tensor in before.items())
    assert grid is None or (grid.out_features, grid.in_features) == (len(rows), len(columns))


@every
@pytest.mark.parametrize("side", ["out", "in"])
def test_permute(kind, side):
    backend, make = MAKE[kind]
    case = make()
    index = torch.randperm(OUT if side == "out" else IN, generator=torch.Generator().manual_seed(4))
    if backend.obstacle("sort"):
        with pytest.raises(ValueError) as refusal:
            backend.permute(case.layer, side, index)
        assert backend.obstacle("sort") in str(refusal.value)
        return
    bias = case.layer._parameters.get("bias")
    bias = None if bias is None else bias.detach().clone()
    backend.permute(case.layer, side, index)
    dim = 0 if side == "out" else 1
    assert close(backend.weight(case.layer), case.weight.index_select(dim, index))
    if bias is not None:
        assert torch.equal(case.layer.bias, bias[index] if side == "out" else bias)
    if case.computes is not None:
        assert close(case.layer.grid.round(case.layer.weight), case.computes.index_select(dim, index))


def test_a_layer_of_gptqmodel_has_a_stand_in_that_can_be_written_to():
    case = gptqmodel_case()
    stand_in = GPTQMODEL.writable(case.layer, torch.float32)
    assert backend_of(stand_in) is GRID and close(stand_in.grid.round(stand_in.weight), case.weight)
    for kind in ("linear", "grid", "bitsandbytes 4"):
        layer = MAKE[kind][1]().layer
        assert backend_of(layer).writable(layer, torch.float32) is layer


def foreign_layer(kind: str) -> nn.Module:
    layer: Any = nn.Module()
    layer.in_features, layer.out_features = IN, OUT
    if kind == "qweight":
        layer.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    elif kind == "int8":
        layer.weight = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.int8), requires_grad=False)
    elif kind == "float8":
        layer = nn.Linear(IN, OUT)
        layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    else:
        layer.__class__ = type("HQQLinear", (nn.Module,), {"__module__": "hqq.core.quantize"})
    return layer


@pytest.mark.parametrize("kind", ["qweight", "int8", "float8", "hqq"])
def test_layers_of_others_are_known_and_not_read(kind):
    layer = foreign_layer(kind)
    assert find_backend(layer) is find_linear_backend(layer) is FOREIGN
    assert FOREIGN.sizes(layer) == (OUT, IN)
    with pytest.raises(ValueError, match=f"The packed weight of a {type(layer).__name__} is not read here"):
        FOREIGN.weight(layer)
    with pytest.raises(ValueError, match="is not read here. Load the model in floating point"):
        FOREIGN.replace(layer, torch.zeros(OUT, IN))


@pytest.mark.parametrize(
    "module", [nn.LayerNorm(4), nn.Conv2d(2, 2, 1), nn.Sequential(nn.Linear(2, 2)), nn.Bilinear(2, 2, 2)]
)
def test_other_modules_have_none(module):
    assert find_backend(module) is None and find_linear_backend(module) is None
    with pytest.raises(TypeError, match=f"A {type(module).__name__} is neither a linear layer nor an embedding"):
        backend_of(module)


def test_torchao_itself():
    torchao = pytest.importorskip("torchao.quantization")
    case = linear_case()
    torchao.quantize_(case.layer, torchao.Int8WeightOnlyConfig())
    assert backend_of(case.layer) is TORCHAO
    weight = TORCHAO.weight(case.layer)
    assert type(weight) is torch.Tensor and 0 < (weight - case.weight).abs().max() < 0.02
    x = random(3, IN, seed=2)
    assert close(case.layer(x).detach(), product(case.layer, x, weight.double()), exact=False)
    assert TORCHAO.stored_bytes(case.layer) < 2 * OUT * IN


REFUSED = {
    FLOAT: "",
    EMBEDDING: "mask round write requantize prune quantize sparsify",
    GRID: "merge quantize",
    BITSANDBYTES: "round sort prune quantize sparsify",
    GPTQMODEL: "merge write narrow sort prune quantize sparsify",
    SPARSE: " ".join(ABILITIES),
    TORCHAO: "round write requantize narrow sort prune quantize sparsify",
    FOREIGN: "mask round write requantize narrow sort prune quantize sparsify",
}


def test_what_cannot_be_done():
    assert set(REFUSED) == set(BACKENDS)
    for backend, refused in REFUSED.items():
        assert set(backend.obstacles) <= set(ABILITIES), backend
        assert {a for a in ABILITIES if backend.obstacle(a) is not None} == set(refused.split()), backend
        for reason in backend.obstacles.values():
            assert reason.startswith(("which ", "whose ")) and reason.endswith("."), reason
    with pytest.raises(KeyError):
        FLOAT.obstacle("fly")
