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
"""The same training in one process and in several, with each engine that spreads a training over processes.

As a script, `engines.py FOLDER PROCESSES ENGINE CASE...`, it trains each case in so many processes, into a folder of its name.
"""

import functools
import json
import os
import sys
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from support.models import tiny_llama
from support.processes import in_processes
from support.training import arguments, dataset
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from peft_elastic import (
    ElasticConfig,
    ElasticLoraConfig,
    ElasticTrainer,
    MagnitudeConfig,
    SparseQALoraConfig,
    SubnetSamplingCallback,
    get_elastic_model,
    prune,
)
from peft_elastic.common import ranks
from peft_elastic.supernet import callback


STEPS = 8
BATCH = 4  # of all processes together
SHAPE = {"elastic_width": {"mlp": [1.0, 0.5], "heads": [1.0, 0.5]}, "elastic_depth": "all", "importance": "none"}
METHODS = {
    "ranks": (ElasticLoraConfig, {}),
    "masked": (SparseQALoraConfig, {}),
    "rounded": (SparseQALoraConfig, {"quantization_aware": True, "group_size": 16}),
    "shape": (ElasticLoraConfig, SHAPE),
    "all": (SparseQALoraConfig, {"quantization_aware": True, "group_size": 16} | SHAPE),
    "weights": (ElasticConfig, SHAPE),
}
# one subnet in each step, or several with distillation; "accumulated" is the latter with two micro-batches a step
LOOPS = ("one", "sandwich")
CASES = [f"{method},{loop}" for method in METHODS for loop in LOOPS] + ["ranks,accumulated"]


def make_model(method):
    cls, settings = METHODS[method]
    base = tiny_llama(num_hidden_layers=3)
    if cls is ElasticConfig:
        return get_elastic_model(base, cls(**settings))
    if cls is SparseQALoraConfig:
        prune(base, MagnitudeConfig(sparsity=0.5), progress=False)
    torch.manual_seed(100)
    common = {"r": 8, "lora_alpha": 16, "elastic_ranks": [8, 6, 4, 2], "init_lora_weights": False}
    targets = ["q_proj", "v_proj", "down_proj"]
    return get_peft_model(base, cls(**common | {"target_modules": targets} | settings))


def settings_of(engine, method):
    """Arguments of the Trainer."""
    if engine == "ddp":
        return {"ddp_backend": "gloo", "ddp_find_unused_parameters": method in ("shape", "all", "weights")}
    if engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    if engine.startswith("zero"):
        return {
            "deepspeed": {
                "zero_optimization": {"stage": int(engine[4]), "stage3_param_persistence_threshold": 0}
                | (
                    # or a whole model is saved in shards of DeepSpeed's own
                    {"stage3_gather_16bit_weights_on_model_save": True} if engine[4] == "3" else {}
                ),
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,
            }
        }
    return {}


class AllMove(Trainer):
    """Gives what a step left without a gradient one all the same, as DeepSpeed does: zeros, or the last one that it had."""

    stale = False

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        last = self.__dict__.setdefault("last", {})
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            if parameter.grad is None:
                parameter.grad = last.get(parameter, torch.zeros_like(parameter)).clone()
            elif self.stale:
                last[parameter] = parameter.grad.clone()
        return loss


class AllMoveStale(AllMove):
    stale = True


def train(folder, engine, case):
    """Train; the losses and the norms of the gradients by step. The adapter is saved in the folder."""
    method, loop = case.split(",")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cls, callbacks = Trainer, [SubnetSamplingCallback("balanced")]
    if loop != "one":
        cls, callbacks = functools.partial(ElasticTrainer, distillation="max"), []
    model = make_model(method)
    settings = settings_of(engine, method)
    if engine.startswith("zero"):
        import deepspeed

        # it would compile collectives in shared memory of its own, which takes a compiler and minutes; gloo has them all
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accumulation = 2 if loop == "accumulated" else 1
    args = arguments(
        folder,
        per_device_train_batch_size=BATCH // world // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        max_grad_norm=0.5,
        **settings,
    )
    if engine == "fsdp2":
        # accelerate shards on accelerators alone, and takes the CPU for one that it can shard on if it is told so
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if engine.endswith("unchecked"):
        callback._check_nothing_skipped = lambda *args: None
    cls = {"one-zeros": AllMove, "one-stale": AllMoveStale}.get(engine, cls)
    trainer = cls(model=model, args=args, train_dataset=dataset(), callbacks=callbacks)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    # the optimizer and the clipping hide by how much gradients are too large or too small; their norm tells
    return {
        "losses": [entry["loss"] for entry in log],
        "norms": [float(entry["grad_norm"]) for entry in log],
        "wrapper": type(trainer.model_wrapped).__name__,
        "weights": type(next(model.parameters())).__name__,
        "sharded": any(p.numel() == 0 for p in model.parameters()),
    }


def units(model, kind):
    """What `fully_shard` is to be called on, before the whole model."""
    if kind == "blocks":
        return list(getattr(model, "get_base_model", lambda: model)().model.layers)
    classes = {"root": (), "layers": (LoraLayer,), "linears": (nn.Linear,)}[kind]
    return [
        module
        for module in model.modules()
        if isinstance(module, classes) and (kind != "linears" or not isinstance(module, LoraLayer))
    ]


def train_in_a_loop(folder, engine, case):
    """Do as `train`, in a loop without a Trainer: as one process with "loop", else with the model under `fully_shard`."""
    method, loop = case.split(",")
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    dist.init_process_group("gloo")
    model = make_model(method)
    teacher_and_students = ["max", "min"] if loop == "sandwich" else []
    if engine != "loop":
        mesh = init_device_mesh("cpu", (world,))
        for module in units(model, engine.removeprefix("fsdp-")):
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    space, share = model.search_space, BATCH // world
    data = dataset(BATCH * STEPS)
    losses, norms = [], []
    for step in range(STEPS):
        rows = data[BATCH * step :][share * rank : share * (rank + 1)]
        ids = torch.stack([row["input_ids"] for row in rows])
        total = 0.0
        for subnet in teacher_and_students or [space.sample([7, step])]:
            model.train()
            model.sample_subnet(subnet)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            total = total + loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / world)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.set_subnet("min")
    with torch.no_grad():
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    losses[-1] = sum(ranks.gather(losses[-1])) / world
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options) if engine != "loop" else None
    if rank == 0:
        model.save_pretrained(folder / "adapter", state_dict=state)
    wrapper = type(model).__name__
    return {"losses": losses, "norms": norms, "wrapper": wrapper, "weights": type(next(model.parameters())).__name__}


def run_case(folder, engine, case):
    """Write what `train` gives into a file of each process."""
    folder.mkdir(parents=True, exist_ok=True)
    in_a_loop = engine == "loop" or engine.startswith("fsdp-")
    found = (train_in_a_loop if in_a_loop else train)(folder, engine, case)
    (folder / f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found))


def main(folder, processes, engine, cases):
    if engine.startswith("zero"):
        import deepspeed  # noqa: F401
    for case in cases:
        status = in_processes(processes, run_case, Path(folder) / case, engine, case)
        if status:
            return status
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:] or CASES))
