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
"""`peft-elastic merge`: merge a subnet into the model, cut it out of a super-network, or export it as plain LoRA."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft_elastic import Subnet, merge_folder, save_gptq, sparsify_linears
from peft_elastic.layers.values import ROUNDED
from peft_elastic.structure.report import mean_over_weights

from . import _common
from ._options import summary


_LOADS = "AutoModelForCausalLM.from_pretrained(...)"
_LOADS_GPTQ = "peft_elastic.load_gptq(...), or AutoModelForCausalLM.from_pretrained(...) with GPTQModel"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "merge",
        help=summary(__doc__),
        description="Merge the active subnet of an adapter into its base model, and save that as an ordinary checkpoint that\n"
        "transformers loads without this package; or export the subnet as a plain LoRA adapter, which peft\n"
        "and other programs load without this package. With --sparse, layers that are still sparse are stored\n"
        "compressed and run on the sparse CPU kernel; that checkpoint loads where peft_elastic is imported.\n"
        "A subnet of fewer heads, channels or blocks becomes a smaller model; so does that of a model whose blocks then\n"
        "differ in size.\n"
        "Of a super-network of train --full the active subnet is cut out, as an ordinary smaller model.\n"
        "Adapters that were trained with --bits are merged into integers of so many bits: --gptq writes these as a\n"
        "GPTQ checkpoint, and --sparse stores them as they are.",
        epilog="examples:\n"
        "  peft-elastic merge --adapter adapter --out merged\n"
        "  peft-elastic merge --adapter adapter --subnet search/subnet.json --out merged --export-lora lora\n"
        "  peft-elastic merge --adapter adapter --out deployed --sparse bf16\n"
        "  peft-elastic merge --adapter adapter --out quantized --gptq\n"
        "  peft-elastic merge --adapter adapter --subnet heuristic --export-lora lora\n"
        "  peft-elastic merge --model supernet --subnet search/subnet.json --out small\n"
        "  peft-elastic merge --adapter adapter --model ./larger-than-memory --out merged --stream",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _common.add_tuned_arguments(parser)
    _common.add_stream_argument(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder for the merged model")
    parser.add_argument("--export-lora", type=Path, metavar="DIR", help="new folder for the plain LoRA adapter")
    parser.add_argument(
        "--subnet",
        help="max, min, heuristic, or a file such as search/subnet.json (default: the active one)",
    )
    parser.add_argument(
        "--sparse",
        choices=ROUNDED,
        help="swap in sparse layers with values of this type where they are faster on this machine (default: none)",
    )
    parser.add_argument(
        "--gptq", action="store_true", help="write a GPTQ checkpoint, of an adapter that was trained with --bits"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.out is None and args.export_lora is None:
        raise ValueError("nothing to do: give `--out`, `--export-lora` or both.")
    if args.sparse and args.out is None:
        raise ValueError("`--sparse` goes with `--out`: a plain LoRA adapter has no sparse layers.")
    if args.gptq and (args.out is None or args.sparse):
        raise ValueError("`--gptq` goes with `--out` and without `--sparse`.")
    if args.stream and (args.out is None or args.sparse or args.export_lora):
        raise ValueError(
            "`--stream` goes with `--out`, and without `--sparse` and `--export-lora`, which need the whole model."
        )
    if args.adapter is None:
        base = _common.check_supernet(args.model)
        for option in ("export_lora", "gptq", "stream"):
            if getattr(args, option):
                raise ValueError(
                    f"`--{option.replace('_', '-')}` goes with `--adapter`: {base!r} is a super-network of the model's own weights."
                )
    else:
        base = _common.base_model_name(args.model, args.adapter)
    in_memory = args.adapter is None or args.out is None or args.sparse or args.export_lora is not None
    stream = _common.streams(args, base, possible=not in_memory)
    for option, folder in (("--out", args.out), ("--export-lora", args.export_lora)):
        if folder is not None and not stream:
            _common.check_new_folder(folder, option)
    subnet = args.subnet
    if subnet is not None and subnet not in ("max", "min", "heuristic"):
        subnet = Subnet.load(subnet)
    if stream:
        device = _common.usable_device(args.device)
        rows = merge_folder(
            base, args.adapter, args.out, subnet=subnet, gptq=args.gptq, dtype=args.dtype, device=device
        )
        before, after = (mean_over_weights(rows, f"sparsity_{when}") for when in ("before", "after"))
        _say_if_dense(before, after)
        loads_with = _LOADS_GPTQ if args.gptq else _LOADS
        _common.say_written([(args.out, f"merged model: {loads_with}")])
        return 0
    tokenizer = _common.load_tokenizer(base, required=False)
    model = _load(base, args)
    if args.gptq and not any(getattr(config, "quantization_aware", False) for config in model.peft_config.values()):
        raise ValueError(
            "`--gptq`: the adapter was not trained with `--bits`, so there is nothing to write as integers."
        )
    if subnet is not None:
        model.set_subnet(subnet)
    print(model.subnet_summary().describe())

    written: list[tuple[Any, str]] = []
    with ExitStack() as folders:  # they appear together, at the end
        _fill(args, model, tokenizer, written, folders)
    _common.say_written(written)
    return 0


def _load(base: str, args: argparse.Namespace) -> Any:
    if args.adapter is None:
        return _common.load_supernet(base, args.dtype, args.device)
    return _common.load_adapter(_common.load_model(base, args.dtype, args.device), args.adapter)


def _fill(
    args: argparse.Namespace, model: Any, tokenizer: Any, written: list[tuple[Any, str]], folders: ExitStack
) -> None:
    if args.export_lora is not None:
        model.export_lora(folders.enter_context(_common.new_folder(args.export_lora)))
        written.append((args.export_lora, "plain LoRA adapter: PeftModel.from_pretrained(base, ...)"))
    if args.out is not None:
        merged = model.extract_subnet(sparse_kernel=False) if args.adapter is None else _merge(model)
        loads_with = _LOADS
        if args.sparse:
            print(sparsify_linears(merged, args.sparse))
        folder = folders.enter_context(_common.new_folder(args.out))
        if args.gptq:
            save_gptq(merged, folder, tokenizer=tokenizer)
            loads_with = _LOADS_GPTQ
        else:
            _common.save_model(merged, tokenizer, folder)
            if _common.needs_this_package(folder):
                loads_with = f"import peft_elastic; {loads_with}"
        written.append((args.out, f"{'smaller' if args.adapter is None else 'merged'} model: {loads_with}"))


def _merge(model: Any) -> Any:
    targets = [module for choice in model.search_space for module in choice.modules]
    before = _common.zero_share(model, targets)
    merged = model.merge_and_unload(progressbar=True, safe_merge=True, sparse_kernel=False)
    _say_if_dense(before, _common.zero_share(merged, targets))
    return merged


def _say_if_dense(before: float, after: float) -> None:
    if after < before - 0.01:
        print(
            f"Zeros in the merged layers: {before:.1%} before, {after:.1%} after. A LoRA update has no zeros, so a merged "
            "model is dense; `train --sparse-adapter` trains one that keeps them."
        )
