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

// Activations as whole numbers of 24 bits, in three signed bytes ("limbs"), for products with int4 in integer instructions: these take
// 64 weights at a time, where floats take 16 after four conversions, which with one row of activations is the bound.
// Included by the levels, which compile it for their own instructions.
//
// A segment of the inputs (a group, or 128 inputs of a longer one) shares a scale, its largest size / kLargest. So an activation
// is off by at most 2^-23 of the largest one in its segment; the sums of whole numbers are exact.
#pragma once

#include <cstring>

#include "kernels.h"

namespace peft_elastic {
namespace {

constexpr int kLimbs = 3;
constexpr std::int64_t kSegmentRows = 32;  // of tiles: sums of limbs over a segment fit 16 bits
constexpr float kLargest = 127.0f * 65536.0f + 127.0f * 256.0f + 127.0f;

struct Segment {
  float scale;
  std::int32_t sums[kLimbs];  // of the limbs, highest first
};

// Of `count` rows of activations, side by side, so that a kernel finds them at constant distances.
struct LimbInputs {
  std::int64_t count;
  const std::int8_t* quads;  // [rows of tiles][count][kLimbs][4 inputs]
  const Segment* segments;   // [segments][count]
};

inline std::int64_t rows_of_group(const Weight& w, std::int64_t group) {
  return group + 1 < w.group_count ? w.group_rows : w.tiles * kTileRows - group * w.group_rows;
}

inline std::int64_t segments_of(std::int64_t rows) { return (rows + kSegmentRows - 1) / kSegmentRows; }

// Of one row of activations, in bytes of memory.
inline std::int64_t limb_bytes(const Weight& w) {
  const std::int64_t segments =
      (w.group_count - 1) * segments_of(w.group_rows) + segments_of(rows_of_group(w, w.group_count - 1));
  return (segments * static_cast<std::int64_t>(sizeof(Segment)) + kLimbs * w.tiles * 64 + 63) / 64 * 64;
}

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// One segment of a row of activations. quads: of the row, `step` bytes from one to the next. False if an input is infinite or NaN.
inline bool make_segment(const float* x, std::int64_t count, std::int8_t* quads, std::int64_t step, Segment& segment) {
  std::int32_t largest = 0;  // sizes compare as integers, which compilers vectorize
  for (std::int64_t i = 0; i < count; ++i) {
    const auto size = static_cast<std::int32_t>(bits_of(x[i]) & 0x7fffffffu);
    largest = size > largest ? size : largest;
  }
  if (largest >= 0x7f800000) return false;
  float most;
  std::memcpy(&most, &largest, sizeof(most));
  const bool tiny = most < 1e-30f;  // zero: its reciprocal would overflow
  const float up = tiny ? 0.0f : kLargest / most;
  segment.scale = tiny ? 0.0f : most / kLargest;
  std::int8_t limbs[kLimbs][4 * kSegmentRows];
  std::int32_t sums[kLimbs] = {};
  for (std::int64_t i = 0; i < count; ++i) {
    const float scaled = x[i] * up;
    std::int32_t value = static_cast<std::int32_t>(scaled + (scaled < 0 ? -0.5f : 0.5f));
    value = value > 8355711 ? 8355711 : value < -8355711 ? -8355711 : value;
    const std::int32_t l = ((value + 128) & 255) - 128, rest = (value - l) >> 8;
    const std::int32_t m = ((rest + 128) & 255) - 128, h = (rest - m) >> 8;
    limbs[0][i] = static_cast<std::int8_t>(h);
    limbs[1][i] = static_cast<std::int8_t>(m);
    limbs[2][i] = static_cast<std::int8_t>(l);
    sums[0] += h;
    sums[1] += m;
    sums[2] += l;
  }
  for (std::int64_t i = 0; i < count; i += 4, quads += step) {
    for (int limb = 0; limb < kLimbs; ++limb) std::memcpy(quads + 4 * limb, limbs[limb] + i, 4);
  }
  for (int limb = 0; limb < kLimbs; ++limb) segment.sums[limb] = sums[limb];
  return true;
}

// False if an input is infinite or NaN. memory: limb_bytes for each of the rows.
inline bool make_limbs(const Weight& w, const float* x, std::int64_t x_stride, std::int64_t rows, std::uint8_t* memory,
                       LimbInputs& inputs) {
  auto* const quads = reinterpret_cast<std::int8_t*>(memory);
  auto* const segments = reinterpret_cast<Segment*>(memory + rows * kLimbs * w.tiles * 64);
  inputs = {rows, quads, segments};
  const std::int64_t step = rows * kLimbs * 4;
  for (std::int64_t m = 0; m < rows; ++m) {
    std::int64_t at = 0, index = 0;
    for (std::int64_t group = 0; group < w.group_count; ++group) {
      for (std::int64_t left = rows_of_group(w, group); left > 0; left -= kSegmentRows, ++index) {
        const std::int64_t count = left < kSegmentRows ? left : kSegmentRows;
        if (!make_segment(x + m * x_stride + 4 * at, 4 * count, quads + at * step + m * kLimbs * 4, step,
                          segments[index * rows + m])) {
          return false;
        }
        at += count;
      }
    }
  }
  return true;
}

// Calls multiply(inputs, first row) for at most kMost rows of activations at a time. What are no finite numbers, or too many
// for the memory, the portable level multiplies.
template <int kMost, typename Multiply>
void multiply_in_limbs(const Weight& w, const float* x, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
                       std::int64_t last, float* sums, std::int64_t sums_stride, void* scratch, Multiply multiply) {
  const std::int64_t bytes = limb_bytes(w), room = static_cast<std::int64_t>(kScratchBytes) / bytes;
  const std::int64_t most = room < kMost ? room : kMost, parts = most > 0 ? (rows + most - 1) / most : 1;
  for (std::int64_t part = 0; part < parts; ++part) {  // of about the same size
    const std::int64_t begin = rows * part / parts, count = rows * (part + 1) / parts - begin;
    LimbInputs inputs;
    if (most > 0 && make_limbs(w, x + begin * x_stride, x_stride, count, static_cast<std::uint8_t*>(scratch), inputs)) {
      multiply(inputs, begin);
      continue;
    }
    portable_kernels()->floats[index_of(w.type)](
        w, x + begin * x_stride, x_stride, count, first, last, sums + begin * sums_stride, sums_stride, scratch);
  }
}

}  // namespace
}  // namespace peft_elastic
