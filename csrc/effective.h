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

// The effective weight of a masked or quantisation-aware adapter, in one pass over the update (training on the CPU).
#pragma once

#include <cstdint>

#include "linear.h"

namespace peft_elastic {

// For each element of a panel [rows, columns], which holds the update D on entry:
//
//   panel = W + D, or W + D where W is not zero and 0 elsewhere (masked); just the (masked) D without `add`;
//   panel = s (clamp(round(panel / s) + z, 0, top) - z) with scales; rounding half to even, as torch does.
//
// slopes, if not null: 1 where the result follows D, 0 where it is constant (masked or clamped).
struct EffectivePanel {
  const void* weight;  // float32 or bfloat16 [rows, columns], weight_stride elements from one row to the next
  FloatType weight_type;
  std::int64_t rows, columns, weight_stride;
  float* panel;          // contiguous
  float* slopes;         // contiguous or null
  bool masked, add;
  const float* scales;   // [rows, columns / group_size] or null
  const float* zeros;    // of that shape
  std::int64_t group_size;
  float top;
  int threads;
  bool avx2, avx512;     // what the processor can do
};

// Throws std::invalid_argument if the sizes do not fit; nothing else.
void effective_panel(const EffectivePanel& call);

}  // namespace peft_elastic
