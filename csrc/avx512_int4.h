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

// int4 for the levels above AVX2: rows of a tile as those of int8 (avx512.h), and sums that are scaled at the end of each group.
#pragma once

#include "avx512.h"

namespace peft_elastic {
namespace {

// 64 nibbles as bytes, the low one of each byte first.
PE_INLINE __m512i unpack_nibbles(const std::uint8_t* values) {
  const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
  // (wide | wide << 4) & 0x0f0f
  return _mm512_ternarylogic_epi32(wide, _mm512_slli_epi16(wide, 4), _mm512_set1_epi8(0x0f), 0xa8);
}

// The rows of a block as bytes q - zero. kStep: how many blocks further on the caller reads next.
template <bool kDense, int kStep>
class Int4Reader {
 public:
  PE_INLINE Int4Reader(const Weight& w, std::int64_t block)
      : bitmap_(w.bitmaps + block * w.tiles * tile_bitmap_bytes(ValueType::kInt8)), values_(w.values + w.offsets[block]),
        group_(w.groups + block * w.group_count) {
    if constexpr (kStep > 1) {
      end_ = w.values + w.offsets[block + 1];
      jump_ = block + kStep < w.blocks ? w.values + w.offsets[block + kStep] - end_ : 0;
    }
  }

  PE_INLINE void start_group() {
    const __m512i zeros = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group_->zeros)));
    zeros_ = _mm512_shuffle_epi8(zeros, _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c)));
  }

  // The scales of the group, which ends here.
  PE_INLINE __m512 end_group() { return _mm512_loadu_ps((group_++)->scales); }

  PE_INLINE __m512i next() {
    if constexpr (kDense) {
      const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values_)));
      values_ += kInt4DenseRowBytes;
      const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
      return _mm512_sub_epi8(_mm512_and_si512(_mm512_srlv_epi16(both, shifts), _mm512_set1_epi8(0x0f)), zeros_);
    } else {
      const auto mask = load_mask<ValueType::kInt8>(bitmap_);
      __m512i packed = unpack_nibbles(values_), target = _mm512_setzero_si512();
      PE_OPAQUE(packed);
      PE_OPAQUE(target);
      values_ += (count_bits(load64(bitmap_)) + 1) >> 1;
      bitmap_ += 8;
      return _mm512_maskz_sub_epi8(mask, _mm512_mask_expand_epi8(target, mask, packed), zeros_);
    }
  }

  PE_INLINE void prefetch() {
    const auto ahead = reinterpret_cast<std::uintptr_t>(values_) + kPrefetchDistance;
    std::uintptr_t jump = 0;
    if constexpr (kStep > 1) jump = ahead >= reinterpret_cast<std::uintptr_t>(end_) ? static_cast<std::uintptr_t>(jump_) : 0;
    _mm_prefetch(reinterpret_cast<const char*>(ahead + jump), _MM_HINT_T0);
  }

 private:
  const std::uint8_t* bitmap_;
  const std::uint8_t* values_;
  const QuantGroup* group_;
  __m512i zeros_;
  const std::uint8_t* end_;  // of the block, behind which the caller jumps
  std::ptrdiff_t jump_;
};

// kRows rows of the weight with kCount rows of activations and kBlocks blocks.
template <int kRows, int kSums, int kBlocks, int kCount, typename Reader>
PE_INLINE void multiply_int4_rows(Reader& left, Reader& right, const float* x, std::int64_t x_stride,
                                  __m512 (&sums)[kSums][kBlocks][kCount]) {
  left.prefetch();
  if constexpr (kBlocks > 1) right.prefetch();
  __m512i rows[kBlocks][kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    rows[0][r] = left.next();
    if constexpr (kBlocks > 1) rows[1][r] = right.next();
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r, x += 4) {
    Int8Float::Row prepared[kBlocks];
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) prepared[b] = Int8Float::prepare(rows[b][r]);
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) {
        auto& sum = sums[r % kSums][b][m];
        sum = Int8Float::add(sum, prepared[b], x + m * x_stride);
      }
    }
  }
}

// As multiply_blocks. Between two groups the totals are in out.
template <bool kDense, int kCount, int kBlocks>
PE_INLINE void multiply_int4_blocks(const Weight& w, const float* x, std::int64_t x_stride, std::int64_t block, float* out,
                                    std::int64_t out_stride) {
  constexpr int kSums = kCount == 1 ? 4 : kCount <= 4 ? 2 : 1;
  constexpr int kRows = kSums < 2 ? 2 : kSums;  // of the weight in a turn of the loop
  out += block * kBlock;
  for (int m = 0; m < kCount; ++m) {
    for (int b = 0; b < kBlocks; ++b) _mm512_store_ps(out + m * out_stride + b * kBlock, _mm512_setzero_ps());
  }
  Int4Reader<kDense, kBlocks> left(w, block), right(w, block + kBlocks - 1);
  std::int64_t left_over = w.tiles * kTileRows;
  for (std::int64_t group = 0; group < w.group_count; ++group) {
    std::int64_t rows = group + 1 < w.group_count ? w.group_rows : left_over;
    left_over -= rows;
    __m512 sums[kSums][kBlocks][kCount];
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 4
        for (int s = 0; s < kSums; ++s) sums[s][b][m] = _mm512_setzero_ps();
      }
    }
    left.start_group();
    if constexpr (kBlocks > 1) right.start_group();
    for (; rows >= kRows; rows -= kRows, x += 4 * kRows) {
      multiply_int4_rows<kRows, kSums, kBlocks, kCount>(left, right, x, x_stride, sums);
    }
    for (; rows > 0; --rows, x += 4) multiply_int4_rows<1, kSums, kBlocks, kCount>(left, right, x, x_stride, sums);
    __m512 scales[kBlocks];
    scales[0] = left.end_group();
    if constexpr (kBlocks > 1) scales[1] = right.end_group();
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) {
        __m512 sum = sums[0][b][m];
#pragma GCC unroll 4
        for (int s = 1; s < kSums; ++s) sum = _mm512_add_ps(sum, sums[s][b][m]);
        float* const total = out + m * out_stride + b * kBlock;
        _mm512_store_ps(total, _mm512_fmadd_ps(Int8Float::finish(sum), scales[b], _mm512_load_ps(total)));
      }
    }
  }
}

template <bool kDense, int kCount>
void multiply_int4_group(const Weight& w, const float* x, std::int64_t x_stride, std::int64_t block, bool pair, float* out,
                         std::int64_t out_stride) {
  if constexpr (kCount > 3) {
    if (pair) {
      multiply_int4_blocks<kDense, kCount, 2>(w, x, x_stride, block, out, out_stride);
      return;
    }
  }
  multiply_int4_blocks<kDense, kCount, 1>(w, x, x_stride, block, out, out_stride);
  if (pair) multiply_int4_blocks<kDense, kCount, 1>(w, x, x_stride, block + 1, out, out_stride);
}

// As multiply_rows.
template <bool kDense>
void multiply_int4(const Weight& w, const void* x_void, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
                   std::int64_t last, float* out, std::int64_t out_stride, void*) {
  const auto* x = static_cast<const float*>(x_void);
  const std::int64_t groups = (rows + kGroupRows - 1) / kGroupRows;
  for (std::int64_t block = first; block < last; block += 2) {
    for (std::int64_t group = 0; group < groups; ++group) {
      const std::int64_t begin = rows * group / groups, count = rows * (group + 1) / groups - begin;
      constexpr decltype(&multiply_int4_group<kDense, 1>) kKernels[kGroupRows] = {
          &multiply_int4_group<kDense, 1>, &multiply_int4_group<kDense, 2>, &multiply_int4_group<kDense, 3>,
          &multiply_int4_group<kDense, 4>, &multiply_int4_group<kDense, 5>, &multiply_int4_group<kDense, 6>,
          &multiply_int4_group<kDense, 7>, &multiply_int4_group<kDense, 8>};
      kKernels[count - 1](w, x + begin * x_stride, x_stride, block, block + 1 < last, out + begin * out_stride, out_stride);
    }
  }
}

}  // namespace
}  // namespace peft_elastic
