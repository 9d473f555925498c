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
"""The effective weight by Triton: its kernels in the interpreter, against torch; what compilers make of them for GPUs,
without one; and what happens where Triton fails. No GPU has run them yet."""

import json
import re
import sys
import warnings

import pytest
import torch
from packaging import version
from support.fresh import run_fresh
from support.in_interpreter import checks
from test_sparse_qa_product import gradients, problem

from peft_elastic.tuners.sparse_qa_lora import devices
from peft_elastic.tuners.sparse_qa_lora.effective_weight import effective_linear


triton = pytest.importorskip("triton", reason="triton has wheels for Linux only")
IS_OLD = version.parse(triton.__version__) < version.parse("3.7")  # 3.3, of torch 2.7, was tried, and 3.7


@pytest.fixture(scope="module")
def interpreted():
    """What the checks of `support.in_interpreter` say, by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        done = run_fresh("from support.in_interpreter import main; main()")
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", checks())
def test_in_the_interpreter(interpreted, name):
    assert interpreted[name] == "passed", interpreted[name]


# -- what compilers make of the kernels ------------------------------------------------------------------------------


POINTERS = {"panel": "*fp32", "scales": "*fp16", "zeros": "*u8", "g_idx": "*i32", "slopes": "*u8", "gradient": "*bf16"}


def compiled(kernel, target, dtype, tmp_path, monkeypatch, **constants):
    """The assembly of a kernel for a GPU that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peft_elastic.tuners.sparse_qa_lora import in_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants |= {"BLOCK_ROWS": in_triton._BLOCK_ROWS, "BLOCK_COLUMNS": in_triton._BLOCK_COLUMNS}
    function = getattr(in_triton, kernel)
    pointers = {**POINTERS, "weight": dtype, "out": dtype if kernel == "_fill_kernel" else "*fp32", "mask": dtype}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in function.arg_names}
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget(*target), options=in_triton._OPTIONS).asm


EVERYTHING = {"TOP": 15, "MASKED": True, "ADD": True, "GRID": True, "SUBTRACT": True, "SLOPES": True}


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_for_nvidia_every_operation_is_rounded_by_itself(capability, in_order, tmp_path, monkeypatch):
    """As in torch: the division to nearest, no product fused with a sum, bfloat16 to nearest even; and subnormal numbers
    stay. Where Triton is old they do not in the division, which matters for scales below 2.4e-38 alone: other quotients
    that it flushes are rounded to 0."""
    target = ("cuda", capability, 32)
    asm = compiled("_fill_kernel", target, "*bf16", tmp_path, monkeypatch, IN_ORDER=in_order, **EVERYTHING)
    assert asm["cubin"]
    found = set(
        re.findall(r"\b((?:fma|mad|div|mul|add|sub|cvt\.rn|cvt\.rz|rcp)[.\w]*\.?(?:f32|bf16)[.\w]*)", asm["ptx"])
    )
    if IS_OLD:
        found = {name.replace("div.rn.ftz", "div.rn") for name in found}
    assert found >= {"div.rn.f32", "mul.rn.f32", "add.rn.f32", "sub.rn.f32", "cvt.rn.bf16.f32"}
    assert not [
        name for name in found if name.startswith(("fma", "mad", "rcp", "cvt.rz")) or "ftz" in name or "approx" in name
    ]


@pytest.mark.parametrize("dtype", ["*fp32", "*fp16", "*bf16", "*u8"])
def test_the_gradient_compiles_for_nvidia(dtype, tmp_path, monkeypatch):
    assert compiled("_mask_kernel", ("cuda", 80, 32), dtype, tmp_path, monkeypatch)["cubin"]


@pytest.mark.skipif(IS_OLD, reason="an old Triton calls ROCm's linker, which is not on every machine")
def test_they_compile_for_amd(tmp_path, monkeypatch):
    target = ("hip", "gfx942", 64)
    assert compiled("_fill_kernel", target, "*bf16", tmp_path, monkeypatch, IN_ORDER=True, **EVERYTHING)["hsaco"]
    assert compiled("_mask_kernel", target, "*bf16", tmp_path, monkeypatch)["hsaco"]


# -- what is chosen ----------------------------------------------------------------------------------------------------


@pytest.fixture
def choose():
    before = devices.set_triton("auto")
    yield devices.set_triton
    devices.set_triton(before)


def test_a_failure_is_said_once_and_torch_goes_on(choose):
    """There is no GPU here, which is how Triton fails for real."""
    choose("auto")
    panel, weight = torch.zeros(2, 3), torch.ones(2, 3)

    def launch(kernels):
        return kernels.fill(panel, weight, True, True, None, slice(0, 2), False, torch.float16, False)

    with pytest.warns(UserWarning, match="Triton does not work here.*PEFT_ELASTIC_TRITON=never"):
        assert devices.by_triton(launch) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.by_triton(launch) is None
    choose("always")
    with pytest.raises(RuntimeError, match="driver"):
        devices.by_triton(launch)


@pytest.mark.parametrize("kind", [None, {"bits": 4, "group_size": -1}])
def test_layers_are_computed_where_triton_fails(kind, choose, monkeypatch):
    """In the first forward pass, for real, and without Triton from then on."""
    monkeypatch.setattr(devices, "_TRITON_DEVICES", ("cpu",))  # where there is no driver for it
    arguments = problem(grid=kind, dtype=torch.float32)
    arguments = (*arguments[:5], True, arguments[5])
    before = devices.set_panel_memory(1000)
    try:
        choose("never")
        expected = gradients(effective_linear, *arguments)
        choose("auto")
        with pytest.warns(UserWarning, match="Triton does not work here"):
            found = gradients(effective_linear, *arguments)
    finally:
        devices.set_panel_memory(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_running_out_of_memory_is_no_failure_of_triton(choose):
    def run_out(kernels):
        raise torch.OutOfMemoryError("no memory")

    choose("auto")
    with pytest.raises(torch.OutOfMemoryError):
        devices.by_triton(run_out)
    assert devices.by_triton(lambda kernels: "goes on") == "goes on"


def test_on_the_cpu_triton_has_to_be_asked_for(choose):
    weight = torch.ones(2, 3)
    assert not devices.triton_is_for(weight)
    choose("always")
    assert devices.triton_is_for(weight) and devices.triton_is_for(torch.nn.Parameter(weight))
    assert not devices.triton_is_for(weight.to_sparse())
    choose("never")
    assert not devices.triton_is_for(weight)
    for wrong in ("yes", "", None, 1):
        with pytest.raises(ValueError, match="`choice` must be one of"):
            choose(wrong)
    assert devices.set_triton("auto") == "never"


@pytest.mark.parametrize("wrong", [0, -1, float("nan"), float("inf"), "many", True, [1]])
def test_memory_that_is_no_number_is_refused(wrong):
    before = devices.set_panel_memory(7)
    with pytest.raises(ValueError, match="`megabytes` must be a positive number"):
        devices.set_panel_memory(wrong)
    assert devices.set_panel_memory(before) == 7


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("PEFT_ELASTIC_TRITON", "yes", "one of"),
        ("PEFT_ELASTIC_PANEL_MB", "-3", "positive"),
        ("PEFT_ELASTIC_PANEL_MB", "1", ""),
    ],
)
def test_the_environment(name, value, message, monkeypatch):
    monkeypatch.setenv(name, value)
    done = run_fresh(
        "import torch\nfrom peft_elastic.tuners.sparse_qa_lora import devices\n"
        "print(devices.panel_elements(torch.device('cpu'), torch.float32))"
    )
    if message:
        assert done.returncode and f"Environment variable {name} must be" in done.stderr and message in done.stderr
    else:
        assert done.stdout.split() == [str(2**20 // 16)]


def test_without_triton_nothing_is_said(choose, monkeypatch):
    """As on Windows, or with a torch for CPUs."""
    choose("auto")
    monkeypatch.setitem(sys.modules, "triton", None)  # Python's own way to say that there is none
    monkeypatch.delitem(sys.modules, "peft_elastic.tuners.sparse_qa_lora.in_triton", raising=False)
    package = sys.modules["peft_elastic.tuners.sparse_qa_lora"]
    monkeypatch.delattr(package, "in_triton", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.by_triton(lambda kernels: 1) is None
    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(4, 3)
    output = effective_linear(x, weight, None, torch.zeros(4, 1), torch.zeros(1, 3), True, None)
    torch.testing.assert_close(output, x @ weight.T)
