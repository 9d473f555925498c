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
"""Random damage to what Python hands to the kernels and reads from files: refused with a ValueError, or right.

Run by test_levels.py in a process whose extension has sanitizers. Usage: fuzz_python.py EXTENSION COUNT SEED
"""

import copy
import importlib.machinery
import importlib.util
import json
import random
import sys
import tempfile
from array import array
from collections import Counter
from pathlib import Path


# whatever the name of the file ends in
loader = importlib.machinery.ExtensionFileLoader("peft_elastic._C", sys.argv[1])
spec = importlib.util.spec_from_loader(loader.name, loader)
sys.modules["peft_elastic._C"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["peft_elastic._C"])

import torch  # noqa: E402
from torch import nn  # noqa: E402

from peft_elastic import PruningPlan, SearchResult, SearchSpace, SparseLinear, Subnet  # noqa: E402
from peft_elastic.common import safetensors_files  # noqa: E402
from peft_elastic.cost import timing  # noqa: E402
from peft_elastic.deploy import checkpoint  # noqa: E402
from peft_elastic.layers import extension  # noqa: E402
from peft_elastic.search.result import Evaluation  # noqa: E402
from peft_elastic.supernet.space import Choice  # noqa: E402


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class OfAUser(torch.Tensor):
    pass


def numbers(chance, *shape):
    """A few random numbers; the generator of torch would take longer to set up."""
    count = 1
    for size in shape:
        count *= size
    return torch.tensor([chance.uniform(-1, 1) for _ in range(count)]).view(shape)


# -- tensors that lie in memory in other ways, or are others -----------------------------------------------------------

SAME_NUMBERS = [
    lambda tensor, chance: torch.stack([tensor, tensor], -1)[..., 1],
    lambda tensor, chance: tensor.T.contiguous().T if tensor.dim() == 2 else tensor,
    lambda tensor, chance: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape),
    lambda tensor, chance: tensor.as_subclass(OfAUser),
    lambda tensor, chance: nn.Parameter(tensor.clone(), requires_grad=False),
]
OTHER_NUMBERS = [
    lambda tensor, chance: tensor.flatten()[:1].expand(tensor.shape) if tensor.numel() else tensor,
    lambda tensor, chance: tensor.flatten()[:: chance.randint(2, 3)],
    lambda tensor, chance: tensor.flatten()[: chance.randint(0, tensor.numel())],
    lambda tensor, chance: torch.cat([tensor.flatten(), tensor.flatten()[:3]]),
    lambda tensor, chance: tensor[None],
    lambda tensor, chance: tensor.to(chance.choice([torch.int64, torch.int8, torch.float64, torch.float16])),
    lambda tensor, chance: tensor.to("meta"),
    lambda tensor, chance: torch._neg_view(tensor) if tensor.is_floating_point() else tensor.to_sparse(),
    lambda tensor, chance: flip(tensor, chance),
    lambda tensor, chance: torch.zeros((), dtype=tensor.dtype),
    lambda tensor, chance: None,
]


def flip(tensor, chance):
    """One bit of it."""
    tensor = tensor.clone()
    if tensor.numel():
        tensor.view(-1).view(torch.uint8)[chance.randrange(tensor.numel())] ^= 1 << chance.randrange(8)
    return tensor


def some_input(chance, in_features):
    dtype, rows = chance.choice(FLOATS), chance.randint(0, 3)
    x = numbers(chance, rows, in_features).to(dtype)
    kind = chance.randrange(4)
    if kind == 0:
        return torch.cat([x, x], 1)[:, :in_features]
    return x.T.contiguous().T if kind == 1 else x


def check(x, y, weight, bias):
    """That y is the product, up to rounding."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert y.dtype == x.dtype and y.shape == expected.shape
    size = (x.double().abs() @ weight.double().abs().T) + (0 if bias is None else bias.double().abs()) + 1e-6
    seen = torch.isfinite(expected) & (expected.abs() < 6e4)
    wrong = ((y.double() - expected).abs() > 0.02 * size) & seen
    assert not wrong.any(), (y, expected)


def make_layers():
    chance, layers = random.Random(0), []
    for kind in ("bf16", "int8", "int4", "int4 dense", "int4 ordered"):
        for out_features, in_features in ((1, 1), (7, 30), (33, 70), (16, 64)):
            if not kind.startswith("int4"):
                linear = nn.Linear(in_features, out_features)
                linear.weight.data *= numbers(chance, out_features, in_features) < 0
                layers.append(SparseLinear.from_linear(linear, kind))
                continue
            q = torch.tensor([[chance.randrange(16) for _ in range(in_features)] for _ in range(out_features)])
            groups = -(-in_features // 8)
            g_idx = (
                (torch.arange(in_features) // 8).flip(0) if kind == "int4 ordered" and in_features % 8 == 0 else None
            )
            scales, zeros = numbers(chance, out_features, groups), torch.full((out_features, groups), 8)
            bias = numbers(chance, out_features)
            layers.append(
                SparseLinear.from_quantized(
                    q, scales, zeros, g_idx, group_size=8, bias=bias, sparse=kind != "int4 dense"
                )
            )
    return [(layer, layer.state_dict()) for layer in layers]


LAYERS = make_layers()


def state_dicts(chance):
    source, state = chance.choice(LAYERS)
    layer, state = copy.deepcopy(source), dict(state)
    for key in chance.sample(list(state), chance.randint(1, 2)):
        state[key] = chance.choice(SAME_NUMBERS if chance.randrange(2) else OTHER_NUMBERS)(state[key], chance)
        if state[key] is None:
            del state[key]
    try:
        layer.load_state_dict(state, assign=bool(chance.randrange(2)))
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise ValueError(str(error)) from None
    if layer.bias is not None and (layer.bias.is_meta or layer.bias.layout != torch.strided):
        raise ValueError("a bias that `assign` put there, and no product to compare with")
    x = some_input(chance, layer.in_features)
    with torch.no_grad():
        y = torch.Tensor(layer(x).float()).to(x.dtype)
        dense = layer.to_linear()
        check(x, y, dense.weight, None if layer.bias is None else layer.bias.detach().as_subclass(torch.Tensor))


# -- int4 --------------------------------------------------------------------------------------------------------------


def groups(chance):
    out_features, in_features = chance.randint(1, 24), chance.randint(1, 70)
    size = chance.choice([4, 8, 16, 64, in_features, 128, 2**31, 2**32 + 4, 2**61, chance.randint(-3, 80), 2**70])
    count = max(1, -(-in_features // size)) if size else 1
    top = chance.choice([15, 15, 15, 16, 300])
    q = torch.tensor([chance.randint(0, top) for _ in range(out_features * in_features)]).view(
        out_features, in_features
    )
    zeros = torch.tensor([chance.randint(0, 15) for _ in range(out_features * count)]).view(out_features, count)
    scales = numbers(chance, out_features, count)
    g_idx, kind = None, chance.randrange(5)
    if kind < 3:
        order = list(range(in_features))
        if kind < 2:
            chance.shuffle(order)
        g_idx = torch.tensor(order) // max(1, min(abs(size), in_features))
        if kind == 1 and chance.randrange(2):
            g_idx = chance.choice(OTHER_NUMBERS[:6])(g_idx, chance)
    given = {"q": q, "scales": scales, "zeros": zeros}
    for _ in range(chance.randint(0, 2)):
        key = chance.choice(list(given))
        given[key] = chance.choice(SAME_NUMBERS[:3] if chance.randrange(3) else OTHER_NUMBERS[:6])(given[key], chance)
    layer = SparseLinear.from_quantized(**given, g_idx=g_idx, group_size=size, sparse=bool(chance.randrange(2)))
    groups_of = torch.arange(in_features) // min(size, in_features) if g_idx is None else g_idx.long()
    weight = (given["q"] - given["zeros"][:, groups_of]) * given["scales"].float()[:, groups_of]
    x = some_input(chance, layer.in_features)
    with torch.no_grad():
        check(x, layer(x), weight, None)
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.packed, layer.packed)


# -- the decoding step -------------------------------------------------------------------------------------------------

PACKED = {}


def packed_weight(chance, out_features, in_features):
    """Packed, with its scales; of a few for each size, as packing takes longest."""
    kind = chance.choice(["bf16", "int8", "int4"])
    key = kind, out_features, in_features
    if key not in PACKED:
        if kind == "int4":
            q, one = torch.full((out_features, in_features), 3), torch.ones(out_features, 1)
            layer = SparseLinear.from_quantized(q, one / 64, one.long(), group_size=in_features)
        else:
            layer = SparseLinear.from_linear(nn.Linear(in_features, out_features, bias=False), kind)
        PACKED[key] = layer.packed, layer.scales
    return PACKED[key]


def decode(chance):
    native, kept = extension._C, []  # what is kept stays in memory
    types = [native.FloatType.float32, native.FloatType.bfloat16, native.FloatType.float16]  # as FLOATS
    type_ = chance.choice([0, 0, 1, 1, 2]) if chance.randrange(8) == 0 else chance.randrange(2)
    dtype = FLOATS[type_]
    dim, kv_heads, group, hidden, inner = chance.choice([2, 4, 6]), chance.randint(1, 2), chance.randint(1, 2), 8, 12
    heads = kv_heads * group
    sizes = [(heads * dim, hidden), (kv_heads * dim, hidden), (kv_heads * dim, hidden), (hidden, heads * dim)]
    sizes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    batch, length = chance.randint(1, 3), chance.randint(0, 5)
    capacity = length + chance.randint(1, 3)
    threads = chance.choice([1, 1, 2, 0, -1])
    damaged = chance.randrange(3) > 0

    def address(tensor):
        kept.append(tensor)
        return tensor.data_ptr()

    def memory(*shape):
        return address(numbers(chance, *shape).to(dtype))

    # that another even number is not the size of the heads, nothing tells
    claimed = chance.choice([-2, 0, 1, 3, 7]) if damaged and chance.randrange(8) == 0 else dim
    model = native.DecodeModel(types[type_], hidden, claimed)
    count = chance.randint(1, 2)
    for _ in range(count):
        linears = []
        for out_features, in_features in sizes:
            if chance.randrange(2):
                packed, scales = packed_weight(chance, out_features, in_features)
                weight = [address(packed), packed.numel(), 0 if scales is None else address(scales)]
            else:
                weight = [memory(out_features, in_features), 0, 0]
            bias_type = chance.randrange(2) if weight[1] else type_  # of a dense layer it is that of the model
            bias = address(numbers(chance, out_features).to(FLOATS[bias_type])) if chance.randrange(2) else 0
            linears.append([out_features, in_features, *weight, bias, bias_type])
        norms = [memory(size) for size in (hidden, hidden, dim, dim)]
        if chance.randrange(2):
            norms[2:] = [None, None]
        if damaged and chance.randrange(2):
            linear = chance.choice(linears)
            place = chance.randrange(5)
            if place < 2:
                linear[place] = chance.choice([0, -1, linear[place] + 1, linear[place] * 2, 2**40])
                if not linear[3]:  # of a dense layer nothing but its place among the others tells
                    linear[0], linear[1] = linear[0] + 1, linear[1]
            elif place == 2:
                linear[2] = 0
            elif place == 3 and linear[3]:
                linear[3] = chance.choice([1, linear[3] - 1, linear[3] + 64, 2**40])
                linear[3] = 1 if linear[3] > kept_bytes(kept, linear[2]) else linear[3]
            elif place == 4:
                linear[4] = 0 if linear[4] else linear[2]
        if damaged and chance.randrange(4) == 0:
            norms[chance.randrange(2)] = 0
        names = ("out_features", "in_features", "weight", "size", "scales", "bias", "bias_type")
        given = [dict(zip(names, [*each[:6], types[each[6]]], strict=True)) for each in linears]
        layers = zip(("q", "k", "v", "o", "gate", "up", "down"), [native.DecodeLinear(**each) for each in given])
        norms = [None if each is None else native.DecodeNorm(weight=each, epsilon=1e-5) for each in norms]
        model.add_layer(
            **dict(layers),
            **dict(zip(("input_norm", "mlp_norm", "q_norm", "k_norm"), norms, strict=True)),
            scaling=0.5,
        )
    cache = array("Q", [memory(batch, kv_heads, capacity, dim) for _ in range(2 * count)])
    per_row = bool(chance.randrange(2))
    mask = torch.tensor([chance.randrange(3) > 0 for _ in range(batch * (length + 1))])
    output = torch.full((batch, hidden), float("nan"), dtype=dtype)
    rows = batch if per_row else 1
    arguments = {
        "batch": batch, "length": length, "capacity": capacity, "hidden": memory(batch, hidden),
        "cos": memory(rows, dim), "sin": memory(rows, dim), "rotary_per_row": per_row,
        "mask": address(mask) if chance.randrange(2) else 0, "keys_and_values": cache.buffer_info()[0],
        "output": address(output), "threads": threads,
    }  # fmt: skip
    if damaged and chance.randrange(2):
        key = chance.choice(["hidden", "cos", "sin", "keys_and_values", "output", "batch", "length", "capacity"])
        arguments[key] = {"batch": chance.choice([0, -1]), "length": -1, "capacity": length}.get(key, 0)
    if damaged and chance.randrange(6) == 0:
        cache[chance.randrange(2 * count)] = 0
    native.decode(model, **arguments)
    assert torch.isfinite(output).all()
    weight = numbers(chance, 5, hidden).to(dtype)
    x, y = numbers(chance, 2, hidden).to(dtype), torch.empty(2, 5, dtype=dtype)
    shape = (2, 5) if chance.randrange(2) else (chance.randint(-1, 2), chance.randint(-1, 5))
    native.dense_linear(
        x=x.data_ptr(),
        rows=shape[0],
        out_features=shape[1],
        in_features=hidden,
        weight=weight.data_ptr(),
        bias=0,
        y=y.data_ptr() if chance.randrange(4) else 0,
        type=types[type_],
        threads=threads,
    )
    if shape == (2, 5):
        check(x, y, weight, None)


def kept_bytes(kept, address):
    return next((tensor.numel() * tensor.element_size() for tensor in kept if tensor.data_ptr() == address), 0)


# -- documents ---------------------------------------------------------------------------------------------------------

FOLDER = Path(tempfile.mkdtemp())
timing.timings_file = lambda: FOLDER / "kernel_timings.json"


def documents():
    layer, _ = LAYERS[9]
    described = {"quant_method": "peft_elastic", "version": 1, "layers": {"a.b": checkpoint._describe(layer)}}
    space = SearchSpace([Choice("rank", "a", (8, 4), ("a",), 3), Choice("depth", "b", (1, 0), ("b",), 5)])
    values = dict(space.max)
    blocks = {"layers.0": {"heads": 4, "kv_heads": 2, "mlp": 64}}
    sizes = {"parameters": 100.0, "macs": 90.0}
    removed = PruningPlan(
        "multipruner",
        {"ratio": 0.2},
        {"class": "A", "blocks": blocks},
        {"mlp:layers.0": 32},
        {"layers.0": [0, 2]},
        sizes,
        sizes,
    )
    plan = FOLDER / "plan.json"
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}

    def read_result(text):
        (FOLDER / "search_result.json").write_text(text, errors="surrogatepass")
        SearchResult.load(FOLDER)

    def read_plan(text):
        plan.write_text(text, errors="surrogatepass")
        PruningPlan.load(plan)

    def read_header(text):
        raw = text.encode(errors="surrogatepass")
        (FOLDER / "a.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(24))
        safetensors_files.check_safetensors(FOLDER / "a.safetensors")

    def read_timings(text):
        (FOLDER / "kernel_timings.json").write_text(text, errors="surrogatepass")
        timing._known = None
        for entry in timing._all_known().values():
            timing.Timing(*entry) if len(entry) == 2 else None

    def read_description(text):
        try:
            found = json.loads(text)
        except RecursionError:
            found = None
        if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
            raise ValueError("transformers reads no other")
        checkpoint.SparseCheckpointConfig(**{key: found[key] for key in found if key != "self"}).check()

    (FOLDER / "result").mkdir()
    row = Evaluation(0, "max", space.subnet(values), {"accuracy": 0.5})
    SearchResult(space, {"accuracy": "max"}, [row], {"seed": 0}).save(FOLDER / "result")
    return [
        (Subnet(values).to_json(), Subnet.from_json),
        (space.to_json(), SearchSpace.from_json),
        ((FOLDER / "result" / "search_result.json").read_text(), read_result),
        (json.dumps(described), read_description),
        (json.dumps({'["cpu", 1]': [1e-3, 2e-3], '["dense"]': [1e-3]}), read_timings),
        (json.dumps(header), read_header),
        (removed.to_json(), read_plan),
    ]


ODD = [None, True, 0, -1, 1.5, 1e400, float("nan"), 2**70, "", "a", "max", [], {}, [[]], {"a": {}}, [None], -(2**63)]


def damage(value, chance, depth=0):
    """A copy of a document with something in it replaced, left out or repeated."""
    if isinstance(value, (dict, list)) and value and (depth == 0 or chance.randrange(4)):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, value = chance.choice(keys), copy.copy(value)
        how = chance.randrange(8)
        if how == 0:
            del value[key]
        elif how == 1 and isinstance(value, dict):
            value[chance.choice(["", "a", "layers", key + "x"])] = value.pop(key)
        elif how == 2 and isinstance(value, list):
            value.append(value[key])
        else:
            value[key] = damage(value[key], chance, depth + 1)
        return value
    return copy.deepcopy(chance.choice(ODD))


def json_texts(chance):
    text, read = chance.choice(DOCUMENTS)
    for _ in range(chance.randint(1, 2)):
        how = chance.randrange(8)
        if how == 0:
            text = text[: chance.randrange(len(text) + 1)]
        elif how == 1:
            at = chance.randrange(len(text) + 1)
            text = text[:at] + chr(chance.choice([0, 34, 44, 91, 123, 125, 0xD800, 0xFFFF])) + text[at + 1 :]
        elif how == 2 and chance.randrange(20) == 0:
            text = "[" * 100_000 + text
        else:
            try:
                text = json.dumps(damage(json.loads(text), chance))
            except (ValueError, RecursionError):
                continue
    read(text)


ALL = [state_dicts, groups, decode, json_texts]


def main():
    count, seed = int(sys.argv[2]), sys.argv[3]
    refused, accepted = Counter(), Counter()
    torch.set_num_threads(2)
    for number in range(count):
        kind = ALL[number % len(ALL)]
        try:
            kind(random.Random(f"{seed} {number}"))
            accepted[kind.__name__] += 1
        except ValueError:
            refused[kind.__name__] += 1
        except BaseException:
            print(f"input {number} of seed {seed}, {kind.__name__}:", file=sys.stderr)
            raise
    for kind in ALL:
        print(f"{kind.__name__}: {refused[kind.__name__]} refused, {accepted[kind.__name__]} accepted")


DOCUMENTS = documents()
if __name__ == "__main__":
    main()
