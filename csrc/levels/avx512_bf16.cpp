// Copyright 2026 The peft-elastic authors.
//
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//
//     http://www.apache.org/licenses/LICENSE-2.0
//
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
// See the License for the specific language governing permissions and
// limitations under the License.

// AVX512 with the dot product of bf16 (Intel from Cooper Lake and Sapphire Rapids, AMD from Zen 4).

#include "kernels.h"

#if (defined(__AVX512VBMI2__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__)) || defined(PEFT_ELASTIC_SOFTWARE_MODEL)

#include "levels/avx512_bf16.h"

namespace peft_elastic {

const Kernels* avx512_bf16_kernels() {
  static const Kernels kKernels = {
      {&multiply_rows<Bf16Float>, &multiply_rows<Int8Float>,
       avx512_kernels()->floats[index_of(ValueType::kInt4)],  // needs nothing that this level adds
       avx512_kernels()->floats[index_of(ValueType::kInt4Dense)]},
      {&multiply_rows<Bf16Bf16>, &multiply_rows<Int8Int8>},
      avx512_kernels()->attend,
      avx512_kernels()->dense,
      avx512_kernels()->fill,
  };
  return &kKernels;
}

}  // namespace peft_elastic

#else

namespace peft_elastic {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace peft_elastic

#endif
