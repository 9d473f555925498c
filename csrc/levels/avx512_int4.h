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

// int4 for the levels above AVX2, multiplied as whole numbers (limbs.h) and scaled at the end of each segment of the inputs.
#pragma once

#include "levels/avx512.h"
#include "levels/limbs.h"

namespace peft_elastic {
namespace {

// 64 nibbles as bytes, the low one of each byte first.
PE_INLINE __m512i unpack_nibbles(const std::uint8_t* values) {
  const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  // (wide | wide << 4) & 0x0f0f
  return _mm512_ternarylogic_epi32(wide, _mm512_slli_epi16(wide, 4), _mm512_set1_epi8(0x0f), 0xa8);
}

// The rows of a block as bytes q; where none is stored, the zero.
template <bool kDense>
class Int4Reader {
 public:
  PE_INLINE Int4Reader(const Weight& w, std::int64_t block)
      : bitmap_(w.bitmaps + block * w.tiles * tile_bitmap_bytes(ValueType::kInt4)), values_(w.values + w.offsets[block]),
        group_(w.groups + block * w.group_count) {}

  // The zeros, one in each 32 bits, and the scales of the group that begins.
  PE_INLINE __m512i start_group(__m512& scales) {
    const __m512i zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group_->zeros)));
    zeros_ = _mm512_shuffle_epi8(zeros, _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)));
    scales = _mm512_loadu_ps((group_++)->scales);
    return zeros;
  }

  PE_INLINE __m512i next() {
    if constexpr (kDense) {
      const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values_)));
      values_ += kInt4DenseRowBytes;
      const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
      return _mm512_and_si512(_mm512_srlv_epi16(both, shifts), _mm512_set1_epi8(0x0f));
    } else {
      __m512i packed = unpack_nibbles(values_), target = zeros_;
      PE_OPAQUE(packed);  // see expand_row
      PE_OPAQUE(target);
      const auto mask = load_mask<ValueType::kInt8>(bitmap_);
      values_ += (count_bits(load64(bitmap_)) + 1) >> 1;
      bitmap_ += 8;
      return _mm512_mask_expand_epi8(target, mask, packed);
    }
  }

  // The bitmap is a third of the bytes: fetched ahead as well, the whole is 1.1 times as fast (Intel, Emerald Rapids).
  PE_INLINE void prefetch() {
    const auto ahead = reinterpret_cast<std::uintptr_t>(values_) + kPrefetchDistance;
    _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
    if constexpr (!kDense) {
      _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(bitmap_) + kPrefetchDistance / 2), _MM_HINT_T0);
    }
  }

 private:
  const std::uint8_t* bitmap_;
  const std::uint8_t* values_;
  const QuantGroup* group_;
  __m512i zeros_;
};

PE_INLINE __m512i broadcast_quad(const std::int8_t* x) {
  std::int32_t quad;
  std::memcpy(&quad, x, sizeof(quad));
  return _mm512_set1_epi32(quad);
}

// The sum of q x, where q is the zero if none is stored, less the zero times the sum of x: whole numbers, so exact.
template <bool kDense, int kCount>
void multiply_int4_block(const Weight& w, const LimbInputs& inputs, std::int64_t block, float* out, std::int64_t out_stride) {
  constexpr int kSums = kCount == 1 ? 2 : 1;  // that take turns, as a dot product waits for the one before in its sum
  Int4Reader<kDense> reader(w, block);
  __m512 totals[kCount];
#pragma GCC unroll 8
  for (int m = 0; m < kCount; ++m) totals[m] = _mm512_setzero_ps();
  const std::int8_t* quads = inputs.quads;
  const Segment* segment = inputs.segments;
  for (std::int64_t group = 0; group < w.group_count; ++group) {
    __m512 scales;
    const __m512i zeros = reader.start_group(scales);
    for (std::int64_t left = rows_of_group(w, group); left > 0; left -= kSegmentRows, segment += kCount) {
      __m512i sums[kSums][kCount][kLimbs];
#pragma GCC unroll 8
      for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 3
        for (int i = 0; i < kLimbs; ++i) {
          const int less = -segment[m].sums[i] & 0xffff;  // a product of 16 bits
          sums[0][m][i] = _mm512_madd_epi16(zeros, _mm512_set1_epi32(less));
          if constexpr (kSums > 1) sums[1][m][i] = _mm512_setzero_si512();
        }
      }
      const auto add_row = [&](int s) __attribute__((always_inline)) {
        const __m512i row = reader.next();
#pragma GCC unroll 8
        for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 3
          for (int i = 0; i < kLimbs; ++i) {
            sums[s][m][i] = _mm512_dpbusd_epi32(sums[s][m][i], row, broadcast_quad(quads + 4 * (m * kLimbs + i)));
          }
        }
        quads += 4 * kLimbs * kCount;
      };
      std::int64_t rows = left < kSegmentRows ? left : kSegmentRows;
      for (; rows >= 2; rows -= 2) {
        reader.prefetch();
        add_row(0);
        add_row(kSums - 1);
      }
      if (rows) add_row(0);
#pragma GCC unroll 8
      for (int m = 0; m < kCount; ++m) {
        const auto sum = [&](int i) __attribute__((always_inline)) {
          return _mm512_cvtepi32_ps(kSums > 1 ? _mm512_add_epi32(sums[0][m][i], sums[kSums - 1][m][i]) : sums[0][m][i]);
        };
        const __m512 rest = _mm512_fmadd_ps(sum(1), _mm512_set1_ps(256.0f), sum(2));
        const __m512 value = _mm512_fmadd_ps(sum(0), _mm512_set1_ps(65536.0f), rest);
        const __m512 scale = _mm512_mul_ps(scales, _mm512_set1_ps(segment[m].scale));
        totals[m] = _mm512_fmadd_ps(value, scale, totals[m]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kCount; ++m) _mm512_store_ps(out + m * out_stride + block * kBlock, totals[m]);
}

// Rows of activations at a time.
#if defined(PEFT_ELASTIC_SOFTWARE_MODEL)
constexpr int kInt4Rows = 3;  // compilers take minutes for more of them in the model
#else
constexpr int kInt4Rows = 8;
#endif

template <bool kDense, int kCount = kInt4Rows>
void multiply_int4_blocks(const Weight& w, const LimbInputs& inputs, std::int64_t first, std::int64_t last, float* out,
                          std::int64_t out_stride) {
  if constexpr (kCount > 1) {
    if (inputs.count < kCount) {
      multiply_int4_blocks<kDense, kCount - 1>(w, inputs, first, last, out, out_stride);
      return;
    }
  }
  for (std::int64_t block = first; block < last; ++block) multiply_int4_block<kDense, kCount>(w, inputs, block, out, out_stride);
}

template <bool kDense>
void multiply_int4(const Weight& w, const void* x, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
                   std::int64_t last, float* out, std::int64_t out_stride, void* scratch) {
  const auto multiply_some = [&](const LimbInputs& inputs, std::int64_t begin) {
    multiply_int4_blocks<kDense>(w, inputs, first, last, out + begin * out_stride, out_stride);
  };
  multiply_in_limbs<kInt4Rows>(w, static_cast<const float*>(x), x_stride, rows, first, last, out, out_stride, scratch,
                               multiply_some);
}

}  // namespace
}  // namespace peft_elastic
