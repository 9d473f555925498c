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

// Sums and exponentials as loops that compilers put into vectors. Everything is inlined into its caller, and so compiled for
// the caller's instructions.
#pragma once

#include <cstdint>

#include "floats.h"

namespace peft_elastic {

// Sums are kept in so many lanes, which the compiler puts into vectors; it may not reorder the terms of a single sum.
constexpr int kLanes = 16;

PE_INLINE float widen(float value) { return value; }
PE_INLINE float widen(std::uint16_t bf16) { return widen_bf16(bf16); }

PE_INLINE void store(float* target, float value) { *target = value; }
PE_INLINE void store(std::uint16_t* target, float value) { *target = round_to_bf16(value); }

PE_INLINE float sum_of(const float* lanes) {
  float eight[8], four[4];
  for (int i = 0; i < 8; ++i) eight[i] = lanes[i] + lanes[i + 8];
  for (int i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x to about 1e-7, between 1e-38 and 1e38: x = n ln 2 + r, the series of e^r, and n added to the exponent. Loops over it
// become vectors, which those over std::exp do not.
PE_INLINE float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the low bits are now those of n
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 1.0f / 2;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  return bits_to_float(float_to_bits(sum) + (float_to_bits(shifted) << 23));
}

template <typename T>
PE_INLINE float dot(const float* a, const T* b, std::int64_t count) {
  float sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += a[i + lane] * widen(b[i + lane]);
  }
  for (int lane = 0; i < count; ++i, ++lane) sums[lane] += a[i] * widen(b[i]);
  return sum_of(sums);
}

}  // namespace peft_elastic
