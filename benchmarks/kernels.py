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
"""How fast one sparse linear layer is on this CPU, and how fast the alternatives are: see _support/kernels.py.

python benchmarks/kernels.py --out benchmarks/results
python benchmarks/kernels.py --help
"""

import os
import sys


# What holds torch (ATen, oneDNN, MKL, FBGEMM) and DeepSparse to AVX2; they read it when they are loaded.
ONLY_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "NM_ARCH": "avx2",
}

# transformers asks for a package of this name, and finds this file whenever a script of this folder runs: importing it
# must do nothing.
if __name__ == "__main__":
    if "--only-avx2" in sys.argv:
        os.environ.update(ONLY_AVX2)
    from _support.kernels import main

    main()
