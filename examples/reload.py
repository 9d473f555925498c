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
"""Load a saved model and compare it with what it computed before it was saved. The other examples run this in a process of its
own: python reload.py FOLDER EXPECTED, where EXPECTED is a torch file with the inputs and the logits."""

import sys

import torch
import transformers

import peft_elastic  # noqa: F401  (for models whose blocks differ in their sizes)


def main(folder: str, expected: str) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype="auto").eval()
    known = torch.load(expected, map_location="cpu")
    with torch.inference_mode():
        logits = model(**known["inputs"]).logits
    difference = float((logits - known["logits"]).abs().max())
    scale = float(known["logits"].abs().max())
    print(f"reloaded {folder}: largest difference of a logit {difference:.1e}, of {scale:.1e}")
    # half precision on two devices differs in the last bits
    if difference > 1e-4 * scale and model.dtype == torch.float32:
        sys.exit("the reloaded model computes something else")


if __name__ == "__main__":
    main(*sys.argv[1:])
