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
"""How `train` and `quickstart` train: with an `ElasticTrainer`, from the last checkpoint if there is one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainingArguments

from peft_elastic import ElasticModel, ElasticTrainer
from peft_elastic.common import ranks
from peft_elastic.common.documents import read_json
from peft_elastic.common.writing import writing
from peft_elastic.structure.blocks import Structure
from peft_elastic.structure.importance import measure_importance

from ._common import new_folder
from ._examples import Collator, batches


def sort(model: PeftModel | ElasticModel, features: Sequence[Mapping[str, list[int]]]) -> None:
    """Sort the heads and channels of the base of an adapter, or of a super-network, as the configuration says, where that takes data."""
    config, base = (
        (model.elastic_config, model)
        if isinstance(model, ElasticModel)
        else (model.active_peft_config, model.get_base_model())
    )
    if not (config.elastic_width and config.importance in ("activation", "gradient")):
        return
    calibration = batches(features, Collator(model), 8)
    if ranks.world_size() == 1:
        model.sort_by_importance(calibration)
        return
    # sums on GPUs differ in the last bits from run to run, and all processes must come to one order
    scores = None
    if ranks.is_main():
        widths = [width for width in Structure(base).widths if width.kind in config.elastic_width]
        scores = measure_importance(base, widths, config.importance, calibration)
    model.sort_by_importance(importance=ranks.share(scores))


def last_checkpoint(folder: Path) -> str | None:
    """Find the last complete checkpoint in a folder: a Trainer that is stopped while it saves leaves half of one."""
    states = [path for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    complete = [path.parent for path in states if path.parent.name.rpartition("-")[2].isdecimal()]
    complete.sort(key=lambda path: int(path.name.rpartition("-")[2]))
    return str(complete[-1]) if complete else None


def _is_json(path: Path) -> bool:
    # the Trainer writes this file last, but not at once
    try:
        read_json(path)
    except (OSError, ValueError):
        return False
    return True


def fit(
    model: PeftModel | ElasticModel,
    features: Sequence[Mapping[str, list[int]]],
    checkpoints: Path,
    strategy: str,
    seed: int,
    distillation: str | None = None,
    out: Path | None = None,
    tokenizer: Any = None,
    **training_arguments: Any,
) -> dict[str, Any]:
    """Train the elastic adapter of `model`, or all weights of a super-network, other subnets in each step; from the last checkpoint,
    if there is one.

    All processes of a run call this together; the main one writes.

    Args:
        model: with an elastic adapter, or elastic itself.
        features: what `encode` returned.
        checkpoints: folder for checkpoints.
        strategy, seed, distillation: of the `ElasticTrainer`.
        out: new folder for the adapter or the super-network, if it is to be saved.
        tokenizer: to be saved with it.
        training_arguments: passed to `TrainingArguments`.

    Returns:
        `steps`, `seconds` since the last start, and `log`: a list of `{"step", "loss", "learning_rate", ...}`.
    """
    grouped: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" not in {field.name for field in dataclasses.fields(TrainingArguments)}:
        grouped = {"group_by_length": True}  # its name in transformers 5.0
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        seed=seed,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=model.device.type == "cuda",
        save_total_limit=1,
        logging_steps=10,
        label_names=["labels"],
        # every step uses every module that is trained, only fewer rows of it, but for those in skipped blocks
        ddp_find_unused_parameters=any(choice.kind == "depth" for choice in model.search_space),
        report_to=[],
        # padding costs as much as text: random batches of texts of similar length
        **grouped,
        **training_arguments,
    )
    trainer = ElasticTrainer(
        model=model,
        args=arguments,
        train_dataset=features,
        data_collator=Collator(model),
        strategy=strategy,
        seed=seed,
        distillation=distillation,
    )
    with writing(checkpoints):
        output = trainer.train(resume_from_checkpoint=ranks.share(last_checkpoint(checkpoints)))
    model.eval()
    if out is not None:
        # of weights that are spread over the processes all of these have to give their part
        spread = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if spread else None
        if ranks.is_main():
            with new_folder(out) as folder:
                model.save_pretrained(folder, state_dict=weights)
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
        ranks.barrier()
    return {
        "steps": output.global_step,
        "seconds": output.metrics["train_runtime"],
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
