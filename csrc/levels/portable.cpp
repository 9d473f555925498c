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

// The portable level: plain C++, for every processor. It says what the others compute.

#include <cstring>

#include "bits.h"
#include "kernels.h"
#include "levels/attention.h"
#include "levels/fill.h"

namespace peft_elastic {
namespace {

// Activations and sums are float, or int8 with sums of 32 bits. Each row of a tile is expanded once for all activations.
template <typename V, typename X, typename Sum>
void multiply(const Weight& w, const void* x_void, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
              std::int64_t last, float* sums, std::int64_t sums_stride, void* scratch) {
  using Value = typename V::Value;
  constexpr int kGroup = static_cast<int>(group_inputs(V::kType));
  constexpr int kRow = static_cast<int>(kBlock) * kGroup;
  const X* x = static_cast<const X*>(x_void);
  Sum* total = static_cast<Sum*>(scratch);  // [rows][16]
  for (std::int64_t block = first; block < last; ++block) {
    const std::uint8_t* bitmap = w.bitmaps + block * w.tiles * tile_bitmap_bytes(V::kType);
    const std::uint8_t* values = w.values + w.offsets[block] * sizeof(Value);
    for (std::int64_t i = 0; i < rows * kBlock; ++i) total[i] = 0;
    for (std::int64_t row = 0; row < w.tiles * kTileRows; ++row, bitmap += kRow / 8) {
      std::uint64_t bits = load_bits(bitmap, kRow / 8);
      Sum dense[kRow];
      for (int i = 0; i < kRow; ++i, bits >>= 1) {
        Value value = 0;
        if (bits & 1) {
          std::memcpy(&value, values, sizeof(value));
          values += sizeof(value);
        }
        dense[i] = static_cast<Sum>(V::widen(value));
      }
      for (std::int64_t m = 0; m < rows; ++m) {
        const X* inputs = x + m * x_stride + row * kGroup;
        for (int n = 0; n < kBlock; ++n) {
          for (int k = 0; k < kGroup; ++k) total[m * kBlock + n] += dense[n * kGroup + k] * static_cast<Sum>(inputs[k]);
        }
      }
    }
    for (std::int64_t m = 0; m < rows; ++m) {
      for (int n = 0; n < kBlock; ++n) {
        sums[m * sums_stride + block * kBlock + n] = static_cast<float>(total[m * kBlock + n]);
      }
    }
  }
}

// int4: whole numbers q - zero within a group, whose sums are then scaled.
template <bool kDense>
void multiply_int4(const Weight& w, const void* x_void, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
                   std::int64_t last, float* sums, std::int64_t sums_stride, void* scratch) {
  constexpr int kRow = 64;
  const float* x = static_cast<const float*>(x_void);
  float* total = static_cast<float*>(scratch);  // [rows][16], of a group
  for (std::int64_t block = first; block < last; ++block) {
    const std::uint8_t* bitmap = w.bitmaps + block * w.tiles * tile_bitmap_bytes(w.type);
    const std::uint8_t* values = w.values + w.offsets[block];
    for (std::int64_t m = 0; m < rows; ++m) {
      for (int n = 0; n < kBlock; ++n) sums[m * sums_stride + block * kBlock + n] = 0;
    }
    std::int64_t row = 0;
    for (std::int64_t g = 0; g < w.group_count; ++g) {
      const QuantGroup& group = w.groups[block * w.group_count + g];
      const std::int64_t end = g + 1 < w.group_count ? row + w.group_rows : w.tiles * kTileRows;
      for (std::int64_t i = 0; i < rows * kBlock; ++i) total[i] = 0;
      for (; row < end; ++row) {
        float dense[kRow];
        if constexpr (kDense) {
          for (int i = 0; i < kRow; ++i) {
            const int code = i < 32 ? values[i] & 0xf : values[i - 32] >> 4;
            dense[i] = static_cast<float>(code - group.zeros[i / 4]);
          }
          values += kInt4DenseRowBytes;
        } else {
          const std::uint64_t bits = load_bits(bitmap, 8);
          int next = 0;
          for (int i = 0; i < kRow; ++i) {
            const bool stored = bits >> i & 1;
            const int code = stored ? values[next / 2] >> (next % 2 * 4) & 0xf : group.zeros[i / 4];
            dense[i] = static_cast<float>(code - group.zeros[i / 4]);
            next += stored;
          }
          values += (next + 1) / 2;
          bitmap += 8;
        }
        for (std::int64_t m = 0; m < rows; ++m) {
          const float* inputs = x + m * x_stride + row * 4;
          for (int n = 0; n < kBlock; ++n) {
            for (int k = 0; k < 4; ++k) total[m * kBlock + n] += dense[n * 4 + k] * inputs[k];
          }
        }
      }
      for (std::int64_t m = 0; m < rows; ++m) {
        for (int n = 0; n < kBlock; ++n) sums[m * sums_stride + block * kBlock + n] += total[m * kBlock + n] * group.scales[n];
      }
    }
  }
}

}  // namespace

const Kernels* portable_kernels() {
  static constexpr Kernels kKernels = {
      {&multiply<Bf16, float, float>, &multiply<Int8, float, float>, &multiply_int4<false>, &multiply_int4<true>},
      {nullptr, &multiply<Int8, std::int8_t, std::int32_t>},
      &attend,
      &multiply_dense,
      &fill,
  };
  return &kKernels;
}

}  // namespace peft_elastic
