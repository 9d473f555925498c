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
"""BootstrapNAS: a pretrained convolutional classifier becomes a super-network, is trained in stages, and subnets of it are searched.

    python examples/bootstrapnas_resnet.py --data FOLDER                   # ResNet-50 from the hub; FOLDER has train/ and test/, a folder a class
    python examples/bootstrapnas_resnet.py --model FOLDER_OR_NAME --data FOLDER
    python examples/bootstrapnas_resnet.py --smoke                         # a tiny ResNet on scikit-learn's digits, without the network

    model --get_elastic_model--> sorted by gamma --stages: depth, depth 2, + widths, + all widths--> super-network
      --search_subnet(validation, prepare=BatchNormRecalibration)--> subnet --extract_subnet--> smaller model --> a fresh process loads it

The defaults are those of the published run of ResNet-50 on CIFAR-10 (Munoz et al., "Automated Super-Network Generation for Scalable Neural
Architecture Search", AutoML-Conf 2022, and its configurations): the stages depth with the last block of each stack (25 epochs), the last two (40), half of the widths (50) and
all of them, sorted again (50); SGD with Nesterov momentum 0.9, learning rate 2.5e-6, weight decay 3e-7 but for norms and biases, label smoothing 0.1,
batches of 64, one random subnet a step; BatchNorm averaged over 1,500 images in training and 6,000 in the search; widths 1, 0.8, 0.6 and 0.5;
NSGA-II with 50 subnets per generation and 3,000 evaluations.

What differs: subnets are selected on images that were taken from the training data (`--validation` of them), and test images are reported beside; the learning
rate falls as one cosine; statistics of BatchNorm are averaged exactly, and not moved on by momentum.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    TrainingArguments,
)

from peft_elastic import (
    BatchNormRecalibration,
    ElasticConfig,
    ElasticTrainer,
    Stage,
    UniformSampler,
    get_elastic_model,
)
from peft_elastic.cost.counts import CostModel


Images = tuple[torch.Tensor, torch.Tensor]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="microsoft/resnet-50", help="folder or name of the hub, default %(default)s"
    )
    parser.add_argument("--data", type=Path, help="folder with train/CLASS/*.png and test/CLASS/*.png")
    parser.add_argument("--out", type=Path, default=Path("outputs/bootstrapnas_resnet"))
    parser.add_argument("--epochs", type=float, nargs=4, default=[25, 40, 50, 50], help="of the four stages")
    parser.add_argument("--lr", type=float, default=2.5e-6)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--widths", type=float, nargs="+", default=[1.0, 0.8, 0.6, 0.5])
    parser.add_argument(
        "--validation", type=float, default=0.1, help="share of the training images that subnets are selected on"
    )
    parser.add_argument("--evals", type=int, default=3000)
    parser.add_argument("--population", type=int, default=50)
    parser.add_argument(
        "--adaptation", type=int, nargs=2, default=[1500, 6000], help="images, in training and in the search"
    )
    parser.add_argument("--max-drop", type=float, default=0.01, help="of the accuracy against the largest subnet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(argv)
    if args.smoke:
        args.epochs, args.evals, args.population, args.adaptation, args.lr = [1, 1, 1, 1], 12, 4, [128, 256], 1e-2
    elif args.data is None:
        parser.error("--data is needed, or --smoke")
    return args


# -- data --------------------------------------------------------------------------------------------------------------


def digits() -> tuple[Images, Images]:
    """scikit-learn's 1,797 digits, 8 x 8: 1,297 to train on and 500 held out."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    scaled = (torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)[order] - 5) / 6
    classes = torch.tensor(labels)[order]
    return (scaled[:1297], classes[:1297]), (scaled[1297:], classes[1297:])


def of_folder(folder: Path, model: str) -> tuple[Images, Images]:
    """The images of a folder, as the processor of the model makes them; all are kept in memory."""
    from datasets import load_dataset

    processor = AutoImageProcessor.from_pretrained(model)
    loaded = load_dataset("imagefolder", data_dir=str(folder))
    parts = []
    for name in ("train", "test"):
        if name not in loaded:
            raise SystemExit(f"{folder} must have the folders train and test, got {sorted(loaded)}.")
        pixels = [
            processor(row["image"].convert("RGB"), return_tensors="pt")["pixel_values"][0] for row in loaded[name]
        ]
        parts.append((torch.stack(pixels), torch.tensor(loaded[name]["label"])))
    return parts[0], parts[1]


def split(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    """Training and validation images."""
    order = torch.randperm(len(images[1]), generator=torch.Generator().manual_seed(seed))
    count = max(1, round(share * len(order)))
    return tuple((images[0][part], images[1][part]) for part in (order[count:], order[:count]))  # type: ignore[return-value]


def batches(images: Images, size: int) -> list[torch.Tensor]:
    return list(images[0].split(size))


# -- model -------------------------------------------------------------------------------------------------------------


def pretrained_digits(train: Images, seed: int) -> ResNetForImageClassification:
    """A tiny ResNet, pretrained for a few seconds."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=10
    )
    config.image_size = 8
    model = ResNetForImageClassification(config).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    for epoch in range(4):
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(epoch))
        for part in order.split(64):
            loss = model(pixel_values=train[0][part], labels=train[1][part]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def accuracy(images: Images, size: int = 250) -> Any:
    """A function of the model: the share of right answers."""

    def evaluate(model: torch.nn.Module) -> float:
        device = next(model.parameters()).device
        right = 0
        for pixels, labels in zip(images[0].split(size), images[1].split(size)):
            right += int((model(pixel_values=pixels.to(device)).logits.argmax(1).cpu() == labels).sum())
        return right / len(images[1])

    return evaluate


class SmoothedTrainer(ElasticTrainer):
    """Cross-entropy with label smoothing 0.1."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = F.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss


def last_two(paths: list[str]) -> list[str]:
    """The last two blocks of each stack, those that the second stage may skip."""
    stacks: dict[str, list[str]] = {}
    for path in paths:
        stacks.setdefault(path.rpartition(".")[0], []).append(path)
    return [path for blocks in stacks.values() for path in blocks[-2:]]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    every, test = digits() if args.smoke else of_folder(args.data, args.model)
    train, validation = split(every, args.validation, args.seed)
    if args.smoke:
        plain: Any = pretrained_digits(train, args.seed)
    else:
        classes = int(every[1].max()) + 1
        plain = AutoModelForImageClassification.from_pretrained(
            args.model, num_labels=classes, ignore_mismatched_sizes=True
        )
    rows: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        rows["pretrained"] = {"held-out": accuracy(test)(plain.eval())}

    example = {"pixel_values": train[0][:2]}
    found = get_elastic_model(plain, ElasticConfig(elastic_depth="all"), example)
    blocks = [choice.name for choice in found.search_space]
    model = get_elastic_model(
        found.unload(),
        ElasticConfig(elastic_width={"channels": args.widths}, elastic_depth=last_two(blocks)),
        example,
    )
    print(model.search_space)

    halves = max(2, (len(args.widths) + 1) // 2)
    deepest = 2 if len(last_two(blocks)) > len({path.rpartition(".")[0] for path in blocks}) else 1
    stages = [
        Stage(["depth"], epochs=args.epochs[0], options={"depth": 1}),
        Stage(["depth"], epochs=args.epochs[1], options={"depth": deepest}),
        Stage(["depth", "channels"], epochs=args.epochs[2], options={"channels": halves}),
        Stage(["depth", "channels"], epochs=args.epochs[3], sort=True),
    ]
    groups = model.optimizer_groups(weight_decay=3e-7)
    trainer = SmoothedTrainer(
        model,
        TrainingArguments(
            output_dir=str(args.out / "trainer"),
            per_device_train_batch_size=args.batch,
            num_train_epochs=sum(args.epochs),
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            seed=args.seed,
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            disable_tqdm=not sys.stderr.isatty(),
        ),
        train_dataset=[{"pixel_values": x, "labels": y} for x, y in zip(*train)],  # type: ignore[arg-type]
        optimizers=(torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True), None),
        strategy=UniformSampler(),
        stages=stages,
        prepare=BatchNormRecalibration(batches(train, args.batch), max_samples=args.adaptation[0]),
    )
    trainer.train()
    model.set_subnet("max")
    model.eval()
    model.save_pretrained(args.out / "supernet")

    prepare = BatchNormRecalibration(batches(train, args.batch), max_samples=args.adaptation[1])
    result = model.search_subnet(
        accuracy(validation),
        objectives=["accuracy", "macs"],
        n_evals=args.evals,
        population=args.population,
        seed=args.seed,
        save_dir=args.out / "search",
        held_out=accuracy(test),
        prepare=prepare,
    )
    best = result.best(max_drop=args.max_drop)
    result.plot(args.out / "pareto.png")
    costs = CostModel(model, model.search_space)
    small = model.extract_subnet(best, prepare=prepare)
    small.save_pretrained(args.out / "extracted")
    small.eval()
    with torch.no_grad():
        logits = small(pixel_values=test[0][:64]).logits
    torch.save((test[0][:64], logits), args.out / "logits.pt")
    evaluations = {e.subnet: e for e in result.history}
    for name, subnet in (("max", model.search_space.max), ("searched", best)):
        evaluation = evaluations[subnet]
        rows[name] = {
            "validation": evaluation.metrics["accuracy"],
            "held-out": evaluation.held_out["accuracy"],  # type: ignore[index]
            "macs": costs.macs(subnet),
            "parameters": costs.parameters(subnet),
        }
    (args.out / "results.json").write_text(json.dumps({"models": rows, "subnet": best.to_dict()}, indent=1))
    for name, row in rows.items():
        print(name, ", ".join(f"{key} {value:,.4g}" for key, value in row.items()))
    check = (
        "import sys, torch, peft_elastic; from transformers import AutoModelForImageClassification as M; "
        "x, y = torch.load(sys.argv[2]); m = M.from_pretrained(sys.argv[1]).eval(); "
        "print('largest difference of a logit in a fresh process', float((m(pixel_values=x).logits - y).abs().max().detach()))"
    )
    subprocess.run([sys.executable, "-c", check, args.out / "extracted", args.out / "logits.pt"], check=True)


if __name__ == "__main__":
    main()
