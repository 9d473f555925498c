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

// int4 for AVX2, multiplied as whole numbers (limbs.h) a segment of the inputs at a time.
#pragma once

#include <cstddef>

#include "levels/limbs.h"
#include "levels/simd.h"

namespace peft_elastic {
namespace {

// Fetches what lies further on: the processor's own prefetching alone is slower.
PE_INLINE void fetch_ahead(const std::uint8_t* values) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(values) + 4096), _MM_HINT_T0);
}

// For each byte of a bitmap the control of VPSHUFB: 8 bytes, the n-th value into the byte of the n-th set bit; into the others the
// zero of their output, which for the first four is the 8th byte of the source, for the last four the 9th.
struct CodeShuffles {
  std::uint8_t of[257][8];  // 16 bytes are read
};

constexpr CodeShuffles make_code_shuffles() {
  CodeShuffles table{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int bit = 0; bit < 8; ++bit) table.of[bits][bit] = static_cast<std::uint8_t>((bits >> bit) & 1 ? next++ : 8 + bit / 4);
  }
  return table;
}

alignas(64) constexpr CodeShuffles kCodeShuffles = make_code_shuffles();

// What a segment of a block is expanded into.
struct CodePanel {
  alignas(32) std::uint8_t rows[kSegmentRows][64];            // q; where none is stored, the zero
  alignas(32) std::uint8_t packed[kSegmentRows * 64 + 64];  // the stored q, a byte for each
};

// The q of rows of tiles, whose bitmaps and values these are. Returns where the values of the next begin.
inline const std::uint8_t* expand_codes(const std::uint8_t* bitmap, const std::uint8_t* values, const std::uint8_t* zeros,
                                        std::int64_t rows, CodePanel& panel) {
  // First the nibbles to bytes, whose number the bitmap tells: a row begins with a byte of its own.
  std::int64_t bytes = 0;
  for (std::int64_t row = 0; row < rows; ++row) {
    std::uint64_t bits;
    std::memcpy(&bits, bitmap + 8 * row, sizeof(bits));
    bytes += (static_cast<std::int64_t>(_mm_popcnt_u64(bits)) + 1) >> 1;
  }
  for (std::int64_t i = 0; i < bytes; i += 16) {
    fetch_ahead(values + i);
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i)));
    const __m256i codes = _mm256_and_si256(_mm256_or_si256(wide, _mm256_slli_epi16(wide, 4)), _mm256_set1_epi8(0x0f));
    _mm256_store_si256(reinterpret_cast<__m256i*>(panel.packed + 2 * i), codes);
  }
  __m128 fill[8];  // the zeros of a byte of the bitmap in the upper half, where they stay when the lower half is loaded
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    fill[i] = _mm_castsi128_ps(_mm_setr_epi32(0, 0, zeros[2 * i] | zeros[2 * i + 1] << 8, 0));
  }
  const std::uint8_t* packed = panel.packed;
  for (std::int64_t row = 0; row < rows; ++row, bitmap += 8) {
    std::size_t next = 0;
#pragma GCC unroll 8
    for (int byte = 0; byte < 8; ++byte) {
      const std::size_t bits = bitmap[byte];
      const __m128i source = _mm_castps_si128(_mm_loadl_pi(fill[byte], reinterpret_cast<const __m64*>(packed + next)));
      const __m128i control = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kCodeShuffles.of[bits]));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(panel.rows[row] + 8 * byte), _mm_shuffle_epi8(source, control));
      next += static_cast<std::size_t>(_mm_popcnt_u64(bits));
    }
    packed += (next + 1) & ~std::size_t{1};
  }
  return values + bytes;
}

// A row as two registers, outputs 0 .. 7 and 8 .. 15.
template <bool kDense>
PE_INLINE void load_codes(const std::uint8_t* row, __m256i& left, __m256i& right) {
  const auto* source = reinterpret_cast<const __m256i*>(row);
  if constexpr (kDense) {
    const __m256i both = _mm256_loadu_si256(source), nibble = _mm256_set1_epi8(0x0f);
    left = _mm256_and_si256(both, nibble);
    right = _mm256_and_si256(_mm256_srli_epi16(both, 4), nibble);
  } else {
    left = _mm256_load_si256(source);
    right = _mm256_load_si256(source + 1);
  }
}

// Adds to the totals of 16 outputs what a segment gives, for kCount rows of activations. codes: rows of tiles as load_codes wants
// them. quads: of the first row of activations; `step` bytes from one row of tiles to the next.
template <bool kDense, int kCount>
void multiply_codes(const std::uint8_t* codes, std::int64_t rows, const QuantGroup& group, const std::int8_t* quads,
                    std::int64_t step, const Segment* segments, float* totals, std::int64_t stride) {
  // Products of two inputs are at most 2 x 15 x 128, of which 16 bits hold the sum of 8 rows.
  constexpr std::int64_t kShortRows = 8;
  __m256i sums[kCount][kLimbs][2];
  const __m128i zeros = _mm_loadu_si128(reinterpret_cast<const __m128i*>(group.zeros));
#pragma GCC unroll 2
  for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 3
    for (int i = 0; i < kLimbs; ++i) {
      const __m256i less = _mm256_set1_epi32(-segments[m].sums[i] & 0xffff);
      sums[m][i][0] = _mm256_madd_epi16(_mm256_cvtepu8_epi32(zeros), less);
      sums[m][i][1] = _mm256_madd_epi16(_mm256_cvtepu8_epi32(_mm_srli_si128(zeros, 8)), less);
    }
  }
  while (rows > 0) {
    __m256i shorts[kCount][kLimbs][2];
#pragma GCC unroll 2
    for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 3
      for (int i = 0; i < kLimbs; ++i) shorts[m][i][0] = shorts[m][i][1] = _mm256_setzero_si256();
    }
    for (std::int64_t end = rows > kShortRows ? rows - kShortRows : 0; rows > end; --rows, quads += step) {
      __m256i left, right;
      if constexpr (kDense) fetch_ahead(codes);
      load_codes<kDense>(codes, left, right);
      codes += kDense ? kInt4DenseRowBytes : 64;
#pragma GCC unroll 2
      for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 3
        for (int i = 0; i < kLimbs; ++i) {
          std::int32_t quad;
          std::memcpy(&quad, quads + 4 * (m * kLimbs + i), sizeof(quad));
          const __m256i x = _mm256_set1_epi32(quad);
          shorts[m][i][0] = _mm256_add_epi16(shorts[m][i][0], _mm256_maddubs_epi16(left, x));
          shorts[m][i][1] = _mm256_add_epi16(shorts[m][i][1], _mm256_maddubs_epi16(right, x));
        }
      }
    }
#pragma GCC unroll 2
    for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 3
      for (int i = 0; i < kLimbs; ++i) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i whole = _mm256_madd_epi16(shorts[m][i][half], _mm256_set1_epi16(1));
          sums[m][i][half] = _mm256_add_epi32(sums[m][i][half], whole);
        }
      }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < kCount; ++m) {
    const __m256 scale = _mm256_set1_ps(segments[m].scale);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      __m256 value = _mm256_cvtepi32_ps(sums[m][2][half]);
      value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m][1][half]), _mm256_set1_ps(256.0f), value);
      value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[m][0][half]), _mm256_set1_ps(65536.0f), value);
      float* const total = totals + m * stride + 8 * half;
      const __m256 scales = _mm256_mul_ps(_mm256_loadu_ps(group.scales + 8 * half), scale);
      _mm256_store_ps(total, _mm256_fmadd_ps(value, scales, _mm256_load_ps(total)));
    }
  }
}

template <bool kDense>
void multiply_int4_block(const Weight& w, const LimbInputs& inputs, std::int64_t block, float* out, std::int64_t out_stride) {
  CodePanel panel;
  const std::uint8_t* bitmap = w.bitmaps + block * w.tiles * tile_bitmap_bytes(w.type);
  const std::uint8_t* values = w.values + w.offsets[block];
  const std::int64_t step = inputs.count * kLimbs * 4;
  const std::int8_t* quads = inputs.quads;
  const Segment* segments = inputs.segments;
  float* const totals = out + block * kBlock;
  for (std::int64_t m = 0; m < inputs.count; ++m) {
    for (int half = 0; half < 2; ++half) _mm256_store_ps(totals + m * out_stride + 8 * half, _mm256_setzero_ps());
  }
  for (std::int64_t index = 0; index < w.group_count; ++index) {
    const QuantGroup& group = w.groups[block * w.group_count + index];
    for (std::int64_t left = rows_of_group(w, index); left > 0; left -= kSegmentRows) {
      const std::int64_t rows = left < kSegmentRows ? left : kSegmentRows;
      const std::uint8_t* codes = values;
      if constexpr (kDense) {
        values += rows * kInt4DenseRowBytes;
      } else {
        values = expand_codes(bitmap, values, group.zeros, rows, panel);
        codes = panel.rows[0];
        bitmap += 8 * rows;
      }
      std::int64_t m = 0;
      for (; m + 2 <= inputs.count; m += 2) {
        multiply_codes<kDense, 2>(codes, rows, group, quads + 4 * kLimbs * m, step, segments + m, totals + m * out_stride,
                                  out_stride);
      }
      if (m < inputs.count) {
        multiply_codes<kDense, 1>(codes, rows, group, quads + 4 * kLimbs * m, step, segments + m, totals + m * out_stride,
                                  out_stride);
      }
      quads += rows * step;
      segments += inputs.count;
    }
  }
}

template <bool kDense>
void multiply_int4(const Weight& w, const void* x, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
                   std::int64_t last, float* out, std::int64_t out_stride, void* scratch) {
  const auto multiply_some = [&](const LimbInputs& inputs, std::int64_t begin) {
    for (std::int64_t block = first; block < last; ++block) {
      multiply_int4_block<kDense>(w, inputs, block, out + begin * out_stride, out_stride);
    }
  };
  multiply_in_limbs<kMaxRows>(w, static_cast<const float*>(x), x_stride, rows, first, last, out, out_stride, scratch,
                              multiply_some);
}

}  // namespace
}  // namespace peft_elastic
