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
"""SQFT on GSM8K: sparse and low-precision models, fine-tuned with adapters that merge without losing either.

    python examples/sqft_gsm8k.py --pipeline sparsepeft                # sparse base, masked adapter -> sparse model
    python examples/sqft_gsm8k.py --pipeline qa-sparsepeft             # sparse int4 base -> sparse int4 model
    python examples/sqft_gsm8k.py --pipeline sqft                      # sparse int4 base, adapter beside it
    python examples/sqft_gsm8k.py --pipeline shears                    # sparse base, adapter beside it
    python examples/sqft_gsm8k.py --ranks 32                           # fixed rank instead of elastic ones
    python examples/sqft_gsm8k.py --smoke --train gsm8k_train.jsonl --test gsm8k_test.jsonl

Settings after the paper (https://huggingface.co/papers/2410.03750): Mistral-7B-v0.3, 50% unstructured Wanda sparsity, GPTQ to
4 bits in groups of 128, r = 32, lora_alpha = 64, ranks 32/28/24/20/16 tied over {q, k, v}, {up, gate} and {down}, learning
rate 3e-4, 3 epochs, batch 16. The paper reports 44.5% for sqft and 44.0% for qa-sparsepeft with int4, 50.1% for sparsepeft.
Training is without dropout: with it the update is a product of its own, and a step takes longer.
"""

from pathlib import Path

import shears
import tasks
from peft import get_peft_model
from pipeline import adapter_settings, prepare
from shears_math import accuracy

from peft_elastic import GPTQConfig, SparseQALoraConfig, WandaConfig, prune, quantize, save_gptq


# (sparse_adapter, quantization_aware, whether the base is quantised)
PIPELINES = {
    "shears": (False, False, False),
    "sparsepeft": (True, False, False),
    "sqft": (False, False, True),
    "qa-sparsepeft": (True, True, True),
}


def main() -> None:
    parser = shears.shears_parser(
        __doc__,
        model="mistralai/Mistral-7B-v0.3",
        train="openai/gsm8k:main",
        test="openai/gsm8k:main",
        out=Path("sqft-out"),
        ranks=[32, 28, 24, 20, 16],
        dropout=0.0,
    )
    parser.add_argument("--pipeline", choices=list(PIPELINES), default="qa-sparsepeft")
    parser.add_argument("--group-size", type=int, default=128, help="inputs that share a scale")
    args = parser.parse_args()
    fixed_rank = len(args.ranks) == 1
    data = prepare(args, tasks.math_example, accuracy)
    if args.smoke:
        args.group_size = 32
        args.ranks = [args.r] if fixed_rank else args.ranks
    sparse_adapter, quantization_aware, quantized_base = PIPELINES[args.pipeline]
    results = {"test examples": data.test_examples, "dense": data.test_accuracy(data.model)}

    calibration = data.calibration(args.calibration_samples)
    print(prune(data.model, WandaConfig(sparsity=args.sparsity), calibration=calibration))
    results["pruned"] = data.test_accuracy(data.model)
    if quantized_base:
        print(quantize(data.model, GPTQConfig(bits=4, group_size=args.group_size, act_order=True), calibration))
        results["pruned, int4"] = data.test_accuracy(data.model)

    config = SparseQALoraConfig(
        **adapter_settings(args), sparse_adapter=sparse_adapter, quantization_aware=quantization_aware
    )
    model = get_peft_model(data.model, config)
    model.print_trainable_parameters()
    shears.train(model, data, args)
    if fixed_rank:
        results["tuned"] = data.test_accuracy(model)
    else:
        shears.search(model, data, args, results)

    if sparse_adapter:
        merged = model.merge_and_unload(sparse_kernel=False)
        results["merged"] = data.test_accuracy(merged)
        if quantization_aware:
            save_gptq(merged, args.out / "merged", tokenizer=data.tokenizer)
        else:
            merged.save_pretrained(args.out / "merged")
            data.tokenizer.save_pretrained(args.out / "merged")
    shears.report(results, args)


if __name__ == "__main__":
    main()
