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

// The effective weight of an adapter. Included by the levels, which compile it for their own instructions.
//
// Every level gives the same bits, with FMA and without: the one product that is added to something is one by 0 or 1.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "lanes.h"

namespace peft_elastic {
namespace {

// Adding and subtracting this rounds to a whole number, half to even, below 2^22 in magnitude.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23

// Elements of one row that share a scale. The flags are template arguments, so that each loop becomes vectors.
template <typename W, bool kMasked, bool kAdd, bool kGrid, bool kSlopes>
PE_INLINE void fill_group(const W* weight, float* panel, float* slopes, std::int64_t count, float scale, float low, float high) {
  for (std::int64_t j = 0; j < count; ++j) {
    const float w = widen(weight[j]);
    float slope = 1.0f;
    float value = panel[j];
    if constexpr (kMasked) {
      slope = w != 0.0f ? 1.0f : 0.0f;
      value *= slope;
    }
    if constexpr (kAdd) value += w;
    if constexpr (kGrid) {
      // one step outside of the range is enough to tell that it is outside
      float steps = value / scale;
      steps = steps < low - 1.0f ? low - 1.0f : steps;
      steps = steps > high + 1.0f ? high + 1.0f : steps;
      steps = (steps + kRound) - kRound;
      if constexpr (kSlopes) slope = ((steps >= low) & (steps <= high)) ? slope : 0.0f;
      steps = steps < low ? low : steps;
      steps = steps > high ? high : steps;
      value = steps * scale;
    }
    panel[j] = value;
    if constexpr (kSlopes) slopes[j] = slope;
  }
}

template <typename W, bool kMasked, bool kAdd, bool kGrid, bool kSlopes>
PE_INLINE void fill_rows(const EffectivePanel& call, std::int64_t first, std::int64_t last) {
  const std::int64_t group_size = kGrid ? call.group_size : call.columns;
  const std::int64_t groups = kGrid ? call.columns / group_size : 1;
  for (std::int64_t row = first; row < last; ++row) {
    const W* weight = static_cast<const W*>(call.weight) + row * call.weight_stride;
    for (std::int64_t group = 0; group < groups; ++group) {
      const std::int64_t at = row * call.columns + group * group_size;
      const float zero = kGrid ? call.zeros[row * groups + group] : 0.0f;
      fill_group<W, kMasked, kAdd, kGrid, kSlopes>(weight + group * group_size, call.panel + at,
                                                       kSlopes ? call.slopes + at : nullptr, group_size,
                                                       kGrid ? call.scales[row * groups + group] : 1.0f, -zero, call.top - zero);
    }
  }
}

template <typename W, bool kMasked, bool kAdd>
PE_INLINE void fill_grid(const EffectivePanel& call, std::int64_t first, std::int64_t last) {
  if (call.scales && call.slopes) {
    fill_rows<W, kMasked, kAdd, true, true>(call, first, last);
  } else if (call.scales) {
    fill_rows<W, kMasked, kAdd, true, false>(call, first, last);
  } else if (call.slopes) {
    fill_rows<W, kMasked, kAdd, false, true>(call, first, last);
  } else {
    fill_rows<W, kMasked, kAdd, false, false>(call, first, last);
  }
}

template <typename W>
PE_INLINE void fill_typed(const EffectivePanel& call, std::int64_t first, std::int64_t last) {
  if (call.masked && call.add) {
    fill_grid<W, true, true>(call, first, last);
  } else if (call.masked) {
    fill_grid<W, true, false>(call, first, last);
  } else if (call.add) {
    fill_grid<W, false, true>(call, first, last);
  } else {
    fill_grid<W, false, false>(call, first, last);
  }
}

// `fill` of a level.
void fill(const EffectivePanel& call, std::int64_t first, std::int64_t last) {
  if (call.weight_type == FloatType::kFloat32) {
    fill_typed<float>(call, first, last);
  } else {
    fill_typed<std::uint16_t>(call, first, last);
  }
}

}  // namespace
}  // namespace peft_elastic
