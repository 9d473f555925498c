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

// What the levels above AVX2 share: VPEXPANDW and VPEXPANDB put a row of a tile in place in one instruction. Everything is in
// an unnamed namespace, as each level compiles it for its own instructions.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "levels/simd.h"

namespace peft_elastic {
namespace {

PE_INLINE std::uint64_t load64(const std::uint8_t* p) {
  std::uint64_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

PE_INLINE int count_bits(std::uint64_t bits) { return static_cast<int>(_mm_popcnt_u64(bits)); }

// Hides from the compiler what a register holds.
#if defined(PEFT_ELASTIC_SOFTWARE_MODEL)
#define PE_OPAQUE(vector) static_cast<void>(vector)
#else
#define PE_OPAQUE(vector) asm("" : "+v"(vector))
#endif

// A mask register is filled faster from memory than from the general register that counts the bits, which gcc would choose.
template <ValueType type>
PE_INLINE auto load_mask(const std::uint8_t* bitmap) {
  std::conditional_t<type == ValueType::kBf16, __mmask32, __mmask64> mask;
#if defined(PEFT_ELASTIC_SOFTWARE_MODEL)
  std::memcpy(&mask, bitmap, sizeof(mask));
#else
  const auto& source = *reinterpret_cast<const std::uint8_t(*)[sizeof(mask)]>(bitmap);
  if constexpr (type == ValueType::kBf16) {
    asm("kmovd %1, %0" : "=k"(mask) : "m"(source));
  } else {
    asm("kmovq %1, %0" : "=k"(mask) : "m"(source));
  }
#endif
  return mask;
}

// Expands 64 bytes of values. Measured on AMD Zen 5, each by several times: the expansion must not read the memory itself,
// and it waits for the old content of its target even where that is zeroed by the mask, so that the target is zeroed first.
template <ValueType type>
PE_INLINE __m512i expand_row(const std::uint8_t* bitmap, const std::uint8_t* values) {
  __m512i packed = _mm512_loadu_si512(values), target = _mm512_setzero_si512();
  PE_OPAQUE(packed);
  PE_OPAQUE(target);
  if constexpr (type == ValueType::kBf16) {
    return _mm512_mask_expand_epi16(target, load_mask<type>(bitmap), packed);
  } else {
    return _mm512_mask_expand_epi8(target, load_mask<type>(bitmap), packed);
  }
}

// How far ahead of their use the values are fetched, in bytes: measured on AMD Zen 5, where 8 KiB is 1.5 times as fast as
// the processor's own prefetching, and less than 4 KiB is slower than none. The bitmap is left to the processor.
constexpr std::uintptr_t kPrefetchDistance = 8192;

// Reads the weights of a block row by row. kStep: how many blocks further on the caller reads next.
template <ValueType type, int kStep = 1>
class RowReader {
 public:
  PE_INLINE RowReader(const Weight& w, std::int64_t block)
      : bitmap_(w.bitmaps + block * w.tiles * tile_bitmap_bytes(type)), values_(values_of(w, block)) {
    if constexpr (kStep > 1) {
      end_ = values_of(w, block + 1);
      jump_ = block + kStep < w.blocks ? values_of(w, block + kStep) - end_ : 0;
    }
  }

  // Two rows at a time: the addresses of a pair wait for one addition alone.
  PE_INLINE void next(__m512i& first, __m512i& second) {
    constexpr int kRowBytes = tile_bitmap_bytes(type) / kTileRows;
    const auto ahead = reinterpret_cast<std::uintptr_t>(values_) + kPrefetchDistance;
    if constexpr (kStep > 1) {
      const bool beyond = ahead >= reinterpret_cast<std::uintptr_t>(end_);
      _mm_prefetch(reinterpret_cast<const char*>(ahead + (beyond ? static_cast<std::uintptr_t>(jump_) : 0)), _MM_HINT_T0);
    } else {
      _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T0);
    }
    std::int64_t in_first, in_both;
    if constexpr (type == ValueType::kBf16) {
      const std::uint64_t bits = load64(bitmap_);
      in_first = 2 * count_bits(bits & 0xffffffffu);
      in_both = 2 * count_bits(bits);
    } else {
      in_first = count_bits(load64(bitmap_));
      in_both = in_first + count_bits(load64(bitmap_ + kRowBytes));
    }
    first = expand_row<type>(bitmap_, values_);
    second = expand_row<type>(bitmap_ + kRowBytes, values_ + in_first);
    values_ += in_both;
    bitmap_ += 2 * kRowBytes;
  }

 private:
  static PE_INLINE const std::uint8_t* values_of(const Weight& w, std::int64_t block) {
    return w.values + w.offsets[block] * static_cast<std::uint64_t>(value_bytes(type));
  }

  const std::uint8_t* bitmap_;
  const std::uint8_t* values_;
  const std::uint8_t* end_;  // of the block, behind which the caller jumps
  std::ptrdiff_t jump_;
};

// An operation multiplies one row of a tile with the activations that belong to it and adds to the 16 sums of a block, which
// begin with start(offset): an offset of the row of activations (see offset_of).

struct Bf16Float {
  static constexpr ValueType kType = ValueType::kBf16;
  using Input = float;
  using Sum = __m512;
  struct Row {
    __m512 even, odd;
  };
  static std::int32_t offset_of(const Input*, std::int64_t) { return 0; }
  static PE_INLINE Sum start(std::int32_t) { return _mm512_setzero_ps(); }
  static PE_INLINE Row prepare(__m512i row) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(row, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(row, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static PE_INLINE Sum add(Sum sum, const Row& row, const Input* x) {
    sum = _mm512_fmadd_ps(row.even, _mm512_set1_ps(x[0]), sum);
    return _mm512_fmadd_ps(row.odd, _mm512_set1_ps(x[1]), sum);
  }
  static PE_INLINE Sum join(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static PE_INLINE __m512 finish(Sum sum) { return sum; }
};

struct Int8Float {
  static constexpr ValueType kType = ValueType::kInt8;
  using Input = float;
  using Sum = __m512;
  struct Row {
    __m512 k0, k1, k2, k3;
  };
  static std::int32_t offset_of(const Input*, std::int64_t) { return 0; }
  static PE_INLINE Sum start(std::int32_t) { return _mm512_setzero_ps(); }
  // Each byte becomes the top byte of a 32-bit integer, 2^24 times its value. A shuffle does that with less work for the
  // units that also expand and convert than a shift and a mask.
  static PE_INLINE __m512 widen(__m512i row, int byte) {
    const __m128i control = _mm_add_epi8(_mm_set1_epi32(byte << 24), _mm_setr_epi32(0x00808080, 0x04808080, 0x08808080, 0x0c808080));
    return _mm512_cvtepi32_ps(_mm512_shuffle_epi8(row, _mm512_broadcast_i32x4(control)));
  }
  static PE_INLINE Row prepare(__m512i row) { return {widen(row, 0), widen(row, 1), widen(row, 2), widen(row, 3)}; }
  static PE_INLINE Sum add(Sum sum, const Row& row, const Input* x) {
    sum = _mm512_fmadd_ps(row.k0, _mm512_set1_ps(x[0]), sum);
    sum = _mm512_fmadd_ps(row.k1, _mm512_set1_ps(x[1]), sum);
    sum = _mm512_fmadd_ps(row.k2, _mm512_set1_ps(x[2]), sum);
    return _mm512_fmadd_ps(row.k3, _mm512_set1_ps(x[3]), sum);
  }
  static PE_INLINE Sum join(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static PE_INLINE __m512 finish(Sum sum) {
    return _mm512_mul_ps(sum, _mm512_set1_ps(1.0f / 16777216.0f));  // 2^-24, without rounding
  }
};

// VPDPBUSD multiplies unsigned with signed bytes: the weights enter with 128 added, and the sums begin with -128 times the
// sum of the activations. Whatever wraps around on the way comes back, as the result fits.
struct Int8Int8 {
  static constexpr ValueType kType = ValueType::kInt8;
  using Input = std::int8_t;
  using Sum = __m512i;
  using Row = __m512i;
  static std::int32_t offset_of(const Input* x, std::int64_t width) {
    std::uint32_t sum = 0;
    for (std::int64_t k = 0; k < width; ++k) sum += static_cast<std::uint32_t>(static_cast<std::int32_t>(x[k]));
    return static_cast<std::int32_t>(0u - 128u * sum);
  }
  static PE_INLINE Sum start(std::int32_t offset) { return _mm512_set1_epi32(offset); }
  static PE_INLINE Row prepare(__m512i row) {
    return _mm512_xor_si512(row, _mm512_set1_epi32(static_cast<std::int32_t>(0x80808080u)));
  }
  static PE_INLINE Sum add(Sum sum, const Row& row, const Input* x) {
    std::int32_t quad;
    std::memcpy(&quad, x, sizeof(quad));
    return _mm512_dpbusd_epi32(sum, row, _mm512_set1_epi32(quad));
  }
  static PE_INLINE Sum join(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static PE_INLINE __m512 finish(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

constexpr int kGroupRows = 8;  // of activations, whose sums with two blocks fit the registers

// kCount rows of activations with kBlocks blocks, 1 or 2: each expanded row meets all activations, and each activation that
// is loaded meets both blocks, as two loads a cycle would not keep up with two multiplications. Few activations keep several
// sums for each block, which take turns from row to row, as a multiplication waits for the one before in its sum. How many
// does not depend on kBlocks, so that a block gets the same bits with and without a partner.
template <typename Op, int kCount, int kBlocks>
PE_INLINE void multiply_blocks(const Weight& w, const typename Op::Input* x, std::int64_t x_stride, std::int64_t block,
                               const std::int32_t* offsets, float* out, std::int64_t out_stride) {
  constexpr std::int64_t kGroup = group_inputs(Op::kType);
  constexpr int kSums = kCount == 1 ? 8 : kCount <= 3 ? 4 : kCount == 4 ? 2 : 1;
  constexpr int kRows = kSums < 2 ? 2 : kSums;  // of the weight in a turn of the loop
  typename Op::Sum sums[kSums][kBlocks][kCount];
#pragma GCC unroll 8
  for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
#pragma GCC unroll 8
      for (int s = 0; s < kSums; ++s) sums[s][b][m] = Op::start(s == 0 ? offsets[m] : 0);
    }
  }
  RowReader<Op::kType, kBlocks> left(w, block), right(w, block + kBlocks - 1);
  for (std::int64_t row = 0; row < w.tiles * kTileRows; row += kRows) {
    __m512i rows[kBlocks][kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r += 2) {
      left.next(rows[0][r], rows[0][r + 1]);
      if constexpr (kBlocks > 1) right.next(rows[1][r], rows[1][r + 1]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r, x += kGroup) {
      typename Op::Row prepared[kBlocks];
#pragma GCC unroll 2
      for (int b = 0; b < kBlocks; ++b) prepared[b] = Op::prepare(rows[b][r]);
#pragma GCC unroll 8
      for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 2
        for (int b = 0; b < kBlocks; ++b) {
          auto& sum = sums[r % kSums][b][m];
          sum = Op::add(sum, prepared[b], x + m * x_stride);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 2
    for (int b = 0; b < kBlocks; ++b) {
      auto sum = sums[0][b][m];
#pragma GCC unroll 8
      for (int s = 1; s < kSums; ++s) sum = Op::join(sum, sums[s][b][m]);
      _mm512_store_ps(out + m * out_stride + (block + b) * kBlock, Op::finish(sum));
    }
  }
}

// The block and, if there is a pair, the one behind it. Up to 3 activations leave the loads time enough, and two streams from
// memory are not faster than one.
template <typename Op, int kCount>
void multiply_group(const Weight& w, const typename Op::Input* x, std::int64_t x_stride, std::int64_t block, bool pair,
                    const std::int32_t* offsets, float* out, std::int64_t out_stride) {
  if constexpr (kCount > 3) {
    if (pair) {
      multiply_blocks<Op, kCount, 2>(w, x, x_stride, block, offsets, out, out_stride);
      return;
    }
  }
  multiply_blocks<Op, kCount, 1>(w, x, x_stride, block, offsets, out, out_stride);
  if (pair) multiply_blocks<Op, kCount, 1>(w, x, x_stride, block + 1, offsets, out, out_stride);
}

// Any number of rows of activations, in groups that fit the registers; each expands the weight anew, which is cheap here.
template <typename Op>
void multiply_rows(const Weight& w, const void* x_void, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
                   std::int64_t last, float* out, std::int64_t out_stride, void*) {
  const auto* x = static_cast<const typename Op::Input*>(x_void);
  std::int32_t offsets[kMaxRows];
  for (std::int64_t m = 0; m < rows; ++m) offsets[m] = Op::offset_of(x + m * x_stride, w.tiles * tile_inputs(Op::kType));
  const std::int64_t groups = (rows + kGroupRows - 1) / kGroupRows;
  // Block by block, so that the groups after the first find the blocks in the cache.
  for (std::int64_t block = first; block < last; block += 2) {
    const bool pair = block + 1 < last;
    for (std::int64_t group = 0; group < groups; ++group) {  // of about the same size
      const std::int64_t begin = rows * group / groups, count = rows * (group + 1) / groups - begin;
      constexpr decltype(&multiply_group<Op, 1>) kKernels[kGroupRows] = {
          &multiply_group<Op, 1>, &multiply_group<Op, 2>, &multiply_group<Op, 3>, &multiply_group<Op, 4>,
          &multiply_group<Op, 5>, &multiply_group<Op, 6>, &multiply_group<Op, 7>, &multiply_group<Op, 8>};
      kKernels[count - 1](w, x + begin * x_stride, x_stride, block, pair, offsets + begin, out + begin * out_stride, out_stride);
    }
  }
}

}  // namespace
}  // namespace peft_elastic
