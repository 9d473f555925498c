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
"""What cannot be done to a model that an engine has spread over processes says so, before anything has changed."""

import copy

import pytest
import torch
from peft import get_peft_model
from support.engines import make_model, units
from support.models import outputs, tiny_llama, tokens
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peft_elastic import ElasticLoraConfig, MagnitudeConfig, SparseQALoraConfig, prune, sort_by_importance


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """Of one process, in which nothing is split but every parameter is a DTensor."""
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(model, mesh, kind="blocks"):
    for module in units(model, kind):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


SPREAD = "is spread over several processes by FSDP2 or DeepSpeed"


@pytest.mark.parametrize("method", ["ranks", "rounded", "shape"])
@pytest.mark.parametrize(
    "action",
    [
        lambda model, folder: model.merge_adapter(),
        lambda model, folder: model.merge_and_unload(),
        lambda model, folder: model.export_lora(folder / "lora"),
        lambda model, folder: model.extract_subnet("min"),
    ],
    ids=["merge_adapter", "merge_and_unload", "export_lora", "extract_subnet"],
)
def test_what_needs_whole_weights(mesh, tmp_path, method, action):
    if method == "rounded" and "export" in str(action.__code__.co_names):
        pytest.skip("there is no plain LoRA adapter of it, spread or not")
    model = sharded(make_model(method), mesh)
    before = outputs(model, tokens())
    with pytest.raises(ValueError, match=SPREAD):
        action(model, tmp_path)
    assert not list(tmp_path.iterdir())
    torch.testing.assert_close(outputs(model, tokens()), before, rtol=0, atol=0)


def test_pruning_and_sorting(mesh):
    base = tiny_llama()
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh)
    with pytest.raises(ValueError, match=SPREAD):
        prune(base, MagnitudeConfig(sparsity=0.5), progress=False)
    with pytest.raises(ValueError, match=SPREAD):
        sort_by_importance(base, "magnitude", progress=False)
    for config in (
        SparseQALoraConfig(target_modules=["q_proj"]),
        ElasticLoraConfig(target_modules=["q_proj"], elastic_width={"mlp": [1.0, 0.5]}),
    ):
        with pytest.raises(ValueError, match=SPREAD):
            get_peft_model(copy.copy(base), config)


@pytest.mark.parametrize(
    "method, message",
    [
        ("masked", "Masked and quantisation-aware adapters compute with the weights of base layer, A and B at once"),
        (
            "shape",
            "`fully_shard` was called on .* itself, which cannot be narrowed then. Call it on the transformer blocks",
        ),
    ],
)
def test_linear_layers_sharded_on_their_own(mesh, method, message):
    model = sharded(make_model(method), mesh, "linears")
    with pytest.raises(ValueError, match=message):
        model.sample_subnet("min")
        model(tokens())
    if method == "shape":
        assert model.active_subnet == model.search_space.max
    # plain elastic ranks work in any unit
    model = sharded(make_model("ranks"), mesh, "linears")
    alone = make_model("ranks")
    for each in (model, alone):
        each.set_subnet("min")
    torch.testing.assert_close(outputs(model, tokens()), outputs(alone, tokens()))
