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
"""`peft-elastic quantize`: round the weights of a model to 2, 4 or 8 bits."""

from __future__ import annotations

import argparse
from pathlib import Path

from peft_elastic import quantize, quantize_folder, save_gptq
from peft_elastic.quantization import QUANTIZATION_METHODS

from . import _common, _data, _methods
from .prune import calibration_batches, calibration_texts


_DEFAULT = "gptq"
_CONFIGS = {
    name: QUANTIZATION_METHODS[name].config for name in sorted(QUANTIZATION_METHODS, key=lambda name: name != _DEFAULT)
}
# `--samples` says how many there are
_WITHOUT = ("target_modules", "exclude_modules", "max_samples")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "quantize",
        help="round the weights of a model to 2, 4 or 8 bits",
        description="Round the weights of the linear layers in the transformer blocks to 2, 4 or 8 bits, and save the model\n"
        "as a GPTQ checkpoint. Weights that are zero stay zero. GPTQ makes up for the error of each rounding with\n"
        "the weights that are not rounded yet, over calibration data: use text that resembles what the model will\n"
        "see. Rounding to nearest (rtn) looks at the weights alone.",
        epilog="examples:\n"
        "  peft-elastic quantize --model pruned --group-size 64 --dataset train.jsonl --out int4\n"
        "  peft-elastic quantize --model ./my-model --bits 8 --method rtn --out int8\n"
        "  peft-elastic quantize --model ./larger-than-memory --dataset train.jsonl --out int4 --stream",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _common.add_model_arguments(parser)
    _common.add_stream_argument(parser)
    _common.add_activations_argument(parser)
    parser.add_argument("--method", choices=tuple(QUANTIZATION_METHODS), default=_DEFAULT, help="default: %(default)s")
    _methods.add_options(parser, _CONFIGS, _WITHOUT)
    parser.add_argument(
        "--format",
        choices=("gptq", "gptq_v2"),
        help="of the checkpoint (default: gptq with --symmetric, and gptq_v2 without)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the quantised model")
    _common.add_seed_argument(parser, "the choice of calibration data")
    _data.add_data_arguments(
        parser,
        "calibrate with (gptq only; default: short movie reviews, downloaded once)",
        required=False,
        samples=128,
        samples_help="calibrate with N sequences of --max-length tokens (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    method = QUANTIZATION_METHODS[args.method]
    if not method.calibrated:
        own = _methods.fields_of({method.name: method.config}, _WITHOUT)
        others = [name for name in _methods.fields_of(_CONFIGS, _WITHOUT) if name not in own]
        for name in ("dataset", *others):
            if getattr(args, name):
                option = _methods.option_of(name)
                raise ValueError(
                    f"`{option}` is of no use with `--method {method.name}`, which looks at the weights alone."
                )
    config = method.config(**_methods.given(args, _CONFIGS, method.name, _WITHOUT))
    stream = _common.streams(args, args.model)
    if not stream:
        _common.check_no_activations(args)
        _common.check_new_folder(args.out)
    tokenizer = _common.load_tokenizer(args.model, required=method.calibrated)
    calibration = None
    if method.calibrated:
        texts = calibration_texts(args)
        calibration = calibration_batches(tokenizer, texts, args.samples, args.max_length, args.seed)
    if stream:
        device = _common.usable_device(args.device)
        report = quantize_folder(
            args.model,
            args.out,
            config,
            calibration,
            checkpoint_format=args.format,
            dtype=args.dtype,
            device=device,
            activations_on_disk=args.activations_on_disk,
        )
        print(report)
        report.save(args.out / "quantization_report.json")
    else:
        model = _common.load_model(args.model, args.dtype, args.device)
        report = quantize(model, config, calibration)
        print(report)
        with _common.new_folder(args.out) as folder:
            save_gptq(model, folder, checkpoint_format=args.format, tokenizer=tokenizer)
            report.save(folder / "quantization_report.json")
    _common.say_written(
        [
            (args.out, "the quantised model; load it with peft_elastic.quantization.load_gptq, or with GPTQModel"),
            (args.out / "quantization_report.json", "the errors of every layer"),
        ]
    )
    return 0
