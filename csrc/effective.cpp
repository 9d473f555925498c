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

#include "effective.h"

#include <algorithm>
#include <stdexcept>

#include "floats.h"
#include "threads.h"

namespace peft_elastic {
namespace {

PE_INLINE float widen(float value) { return value; }
PE_INLINE float widen(std::uint16_t value) { return widen_bf16(value); }

// Adding and subtracting this rounds to a whole number, half to even, below 2^22 in magnitude.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23

// Elements of one row that share a scale. The flags are template arguments, so that each loop becomes vectors.
template <typename Weight, bool kMasked, bool kAdd, bool kGrid, bool kSlopes>
PE_INLINE void fill(const Weight* weight, float* panel, float* slopes, std::int64_t count, float scale, float low, float high) {
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
      if constexpr (kSlopes) slope = (steps >= low) & (steps <= high) ? slope : 0.0f;
      steps = steps < low ? low : steps;
      steps = steps > high ? high : steps;
      value = steps * scale;
    }
    panel[j] = value;
    if constexpr (kSlopes) slopes[j] = slope;
  }
}

template <typename Weight, bool kMasked, bool kAdd, bool kGrid, bool kSlopes>
PE_INLINE void fill_rows(const EffectivePanel& call, std::int64_t first, std::int64_t last) {
  const std::int64_t group_size = kGrid ? call.group_size : call.columns;
  const std::int64_t groups = kGrid ? call.columns / group_size : 1;
  for (std::int64_t row = first; row < last; ++row) {
    const Weight* weight = static_cast<const Weight*>(call.weight) + row * call.weight_stride;
    for (std::int64_t group = 0; group < groups; ++group) {
      const std::int64_t at = row * call.columns + group * group_size;
      const float zero = kGrid ? call.zeros[row * groups + group] : 0.0f;
      fill<Weight, kMasked, kAdd, kGrid, kSlopes>(weight + group * group_size, call.panel + at,
                                                 kSlopes ? call.slopes + at : nullptr, group_size,
                                                 kGrid ? call.scales[row * groups + group] : 1.0f, -zero, call.top - zero);
    }
  }
}

template <typename Weight, bool kMasked, bool kAdd>
PE_INLINE void fill_grid(const EffectivePanel& call, std::int64_t first, std::int64_t last) {
  if (call.scales && call.slopes) {
    fill_rows<Weight, kMasked, kAdd, true, true>(call, first, last);
  } else if (call.scales) {
    fill_rows<Weight, kMasked, kAdd, true, false>(call, first, last);
  } else if (call.slopes) {
    fill_rows<Weight, kMasked, kAdd, false, true>(call, first, last);
  } else {
    fill_rows<Weight, kMasked, kAdd, false, false>(call, first, last);
  }
}

template <typename Weight>
PE_INLINE void fill_typed(const EffectivePanel& call, std::int64_t first, std::int64_t last) {
  if (call.masked && call.add) {
    fill_grid<Weight, true, true>(call, first, last);
  } else if (call.masked) {
    fill_grid<Weight, true, false>(call, first, last);
  } else if (call.add) {
    fill_grid<Weight, false, true>(call, first, last);
  } else {
    fill_grid<Weight, false, false>(call, first, last);
  }
}

PE_INLINE void fill_any(const EffectivePanel& call, std::int64_t first, std::int64_t last) {
  if (call.weight_type == FloatType::kFloat32) {
    fill_typed<float>(call, first, last);
  } else {
    fill_typed<std::uint16_t>(call, first, last);
  }
}

void fill_baseline(const EffectivePanel& call, std::int64_t first, std::int64_t last) { fill_any(call, first, last); }

// The same code, for wider vectors. Without FMA, so that every version rounds alike.
#if defined(__GNUC__) && defined(__x86_64__)
__attribute__((target("avx2"))) void fill_avx2(const EffectivePanel& call, std::int64_t first, std::int64_t last) {
  fill_any(call, first, last);
}
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))) void fill_avx512(
    const EffectivePanel& call, std::int64_t first, std::int64_t last) {
  fill_any(call, first, last);
}
#else
void fill_avx2(const EffectivePanel& call, std::int64_t first, std::int64_t last) { fill_any(call, first, last); }
void fill_avx512(const EffectivePanel& call, std::int64_t first, std::int64_t last) { fill_any(call, first, last); }
#endif

struct Job {
  const EffectivePanel* call;
  int parts;
};

void fill_part(void* data, int part) {
  const Job& job = *static_cast<const Job*>(data);
  const EffectivePanel& call = *job.call;
  const auto fill = call.avx512 ? fill_avx512 : call.avx2 ? fill_avx2 : fill_baseline;
  fill(call, call.rows * part / job.parts, call.rows * (part + 1) / job.parts);
}

}  // namespace

void effective_panel(const EffectivePanel& call) {
  if (call.rows < 0 || call.columns < 0 || call.weight_stride < call.columns) {
    throw std::invalid_argument("the panel has no such rows and columns");
  }
  if (call.weight_type == FloatType::kFloat16) throw std::invalid_argument("a weight in float16 is not provided for");
  if (call.scales && (!call.zeros || call.group_size < 1 || call.columns % call.group_size)) {
    throw std::invalid_argument("the groups do not fit the columns");
  }
  Job job{&call, static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(call.threads, call.rows)))};
  run_parallel(job.parts, &fill_part, &job);
}

}  // namespace peft_elastic
